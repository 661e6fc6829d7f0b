"""Task 2: facts scattered in a long text, asked for in any order over several turns."""

from __future__ import annotations

import random
import re

from .item import Item, Reply, draw_in, say
from .words import ADJECTIVES, ANIMALS, CITIES, COLORS, FOODS, NAMES, VERBS, WORDS

TASK = "recall"
_RELATIONS: dict[str, tuple[str, ...] | None] = {
    "code": None,  # four digits
    "color": COLORS,
    "city": CITIES,
    "animal": ANIMALS,
    "food": FOODS,
    "word": WORDS,
}
_INTRODUCTIONS = (
    "Read this text and answer my questions.",
    "Here is a text. Remember its facts.",
    "Read the text below.",
)
_QUESTIONS = ("What is the {} of {}?", "Tell me the {} of {}.", "Which is the {} of {}?")
_TOKENS_PER_SENTENCE = 12.1  # of filler and facts, with the embedded model's tokenizer
_TOKENS_PER_TURN = 26
_OVERHEAD = 40

Fact = tuple[str, str, str]


def _filler(rng: random.Random) -> str:
    choice = rng.choice
    subject = f"The {choice(ADJECTIVES)} {choice(WORDS)}" if rng.random() < 0.6 else choice(NAMES)
    return f"{subject} {choice(VERBS)} the {choice(ADJECTIVES)} {choice(WORDS)}."


def _facts(rng: random.Random, num_pairs: int) -> list[Fact]:
    relations = rng.sample(list(_RELATIONS), rng.randint(1, 3))
    asked = [(r, n) for r in relations for n in rng.sample(NAMES, min(len(NAMES), num_pairs))]
    facts = []
    for relation, name in rng.sample(asked, num_pairs):
        values = _RELATIONS[relation]
        facts.append(
            (relation, name, f"{rng.randrange(1000, 10000)}" if values is None else rng.choice(values))
        )
    return facts


def _sentence(fact: Fact) -> str:
    return f"The {fact[0]} of {fact[1]} is {fact[2]}."


def draw(
    rng: random.Random,
    split: str,
    *,
    num_tokens: int = 1024,
    num_turns: int | None = None,
    thinking: bool | None = None,
) -> Item:
    """One conversation of about `num_tokens` tokens; its last turn is the question. `num_turns` counts the questions:
    by default one to six, as far as there are facts."""
    longest = max(2, min(64, (num_tokens - _OVERHEAD - _TOKENS_PER_TURN) // 12))
    num_pairs = min(longest, int(2 * (longest / 2 + 1) ** rng.random()))
    num_pairs = max(2, num_pairs)
    facts, key = draw_in(
        split, lambda: _facts(rng, num_pairs), lambda f: "recall " + " ".join(map("/".join, sorted(f)))
    )
    turns = min(num_pairs, rng.randint(1, 6) if num_turns is None else num_turns)
    room = num_tokens - _OVERHEAD - turns * _TOKENS_PER_TURN
    num_sentences = max(num_pairs, int(room / _TOKENS_PER_SENTENCE))
    sentences = [_filler(rng) for _ in range(num_sentences - num_pairs)] + [_sentence(f) for f in facts]
    rng.shuffle(sentences)
    text = f"{rng.choice(_INTRODUCTIONS)}\n\n{' '.join(sentences)}\n\n"
    messages = []
    asked = rng.sample(facts, turns)
    for i, fact in enumerate(asked):
        question = rng.choice(_QUESTIONS).format(fact[0], fact[1])
        messages.append({"role": "user", "content": text + question if i == 0 else question})
        if i < turns - 1:
            messages.append({"role": "assistant", "content": _sentence(fact)})
    last = asked[-1]
    others = {f[2] for f in facts} - {last[2], last[0]}

    def accepts(reply: Reply) -> bool:
        words = re.findall(r"\w+", reply.content)
        return not reply.tool_calls and last[2] in words and others.isdisjoint(words)

    thinking = rng.random() < 0.5 if thinking is None else thinking
    reasoning = f"I look for the {last[0]} of {last[1]} in the text."
    limit = next((n for n in (256, 512, 1024, 2048, 4096) if num_tokens <= n), num_tokens)
    kind = f"to {limit} tokens"
    return Item(TASK, kind, key, messages, thinking, say(_sentence(last), reasoning, thinking), accepts)
