"""Task 3: operations on words, letters and lists. With thinking, the list is numbered or the word is spelled first."""

from __future__ import annotations

import random
from collections.abc import Callable

from .item import Item, draw_in, same_text, say
from .words import NAMES, WORDS

TASK = "text"
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")

_Work = tuple[str, str, str, str]  # question, answer, reasoning, content


def _words(rng: random.Random, low: int, high: int) -> list[str]:
    return rng.sample(WORDS, rng.randint(low, high))


def _spell(word: str) -> str:
    return " ".join(word)


def _numbered(words: list[str]) -> str:
    return "\n".join(f"{i} {word}" for i, word in enumerate(words, 1))


def _reverse_words(rng: random.Random) -> _Work:
    words = _words(rng, 2, 8)
    text = " ".join(words)
    question = rng.choice(
        (
            "Reverse the order of these words: {}",
            "Write these words in reverse order: {}",
            "Reverse the words: {}",
        )
    ).format(text)
    return question, " ".join(reversed(words)), _numbered(words), text


def _reverse_letters(rng: random.Random) -> _Work:
    word = rng.choice(WORDS)
    question = rng.choice(
        (
            "Reverse the letters of the word {}.",
            "Write the word {} backwards.",
            "Spell the word {} backwards, as one word.",
        )
    ).format(word)
    return question, word[::-1], f"{_spell(word)}\n{_spell(word[::-1])}", word


def _spell_word(rng: random.Random) -> _Work:
    word = rng.choice(WORDS)
    question = rng.choice(("Spell the word {}.", "Write the letters of the word {} one by one.")).format(word)
    return question, _spell(word), f"{word} has {len(word)} letters.", word


def _sort_words(rng: random.Random) -> _Work:
    words: list[str] = []
    for word in _words(rng, 16, 24):
        if word[0] not in {w[0] for w in words}:
            words.append(word)
    words = words[: rng.randint(3, 6)]
    text = " ".join(words)
    question = rng.choice(
        (
            "Sort these words alphabetically: {}",
            "Put these words in alphabetical order: {}",
            "Sort the words from a to z: {}",
        )
    ).format(text)
    ordered = sorted(words)
    return question, " ".join(ordered), "\n".join(f"{w[0]} {w}" for w in ordered), text


def _sort_numbers(rng: random.Random) -> _Work:
    numbers = rng.sample(range(100 if rng.random() < 0.6 else 1000), rng.randint(3, 6))
    text, down = " ".join(map(str, numbers)), rng.random() < 0.3
    question = (
        rng.choice(("Sort these numbers from largest to smallest: {}", "Sort in descending order: {}"))
        if down
        else rng.choice(("Sort these numbers from smallest to largest: {}", "Sort in ascending order: {}"))
    ).format(text)
    ordered = sorted(numbers, reverse=down)
    lines = "\n".join(f"{len(str(n))} digits {n}" if n > 9 else f"1 digit {n}" for n in ordered)
    return question, " ".join(map(str, ordered)), lines, f"{text} {down}"


def _count_words(rng: random.Random) -> _Work:
    words = _words(rng, 2, 12)
    text = " ".join(words)
    question = rng.choice(("How many words are here: {}", "Count the words: {}", "Count these words: {}"))
    return question.format(text), str(len(words)), _numbered(words), text


def _count_letters(rng: random.Random) -> _Work:
    word = rng.choice(WORDS)
    question = rng.choice(
        ("How many letters does the word {} have?", "Count the letters of the word {}.")
    ).format(word)
    return question, str(len(word)), "\n".join(f"{i} {c}" for i, c in enumerate(word, 1)), word


def _case(
    question: tuple[str, ...], source: Callable[[str], str], target: Callable[[str], str]
) -> Callable[[random.Random], _Work]:
    def draw(rng: random.Random) -> _Work:
        words = _words(rng, 1, 4)
        if rng.random() < 0.2:
            words[-1] = rng.choice(NAMES).lower()
        before = [source(w) for w in words]
        after = [target(w) for w in words]
        lines = "\n".join(f"{w}: {_spell(w.lower())}: {t}" for w, t in zip(before, after, strict=True))
        return rng.choice(question).format(" ".join(before)), " ".join(after), lines, " ".join(before)

    return draw


def _nth(rng: random.Random) -> _Work:
    words = _words(rng, 2, 10)
    i = rng.randrange(len(words))
    which = "last" if i == len(words) - 1 and rng.random() < 0.7 else _ORDINALS[i]
    text = " ".join(words)
    question = rng.choice(
        ("What is the {} word of: {}", "Give the {} word of: {}", "Which is the {} word here: {}")
    )
    lines = _numbered(words if which == "last" else words[: i + 1])
    return question.format(which, text), words[i], lines, f"{which} {text}"


_OPERATIONS: dict[str, Callable[[random.Random], _Work]] = {
    "reverse words": _reverse_words,
    "reverse letters": _reverse_letters,
    "spell": _spell_word,
    "sort words": _sort_words,
    "sort numbers": _sort_numbers,
    "count words": _count_words,
    "count letters": _count_letters,
    "upper": _case(("Write in capital letters: {}", "Write in upper case: {}"), str.lower, str.upper),
    "lower": _case(("Write in small letters: {}", "Write in lower case: {}"), str.upper, str.lower),
    "title": _case(("Capitalize each word: {}", "Write in title case: {}"), str.lower, str.title),
    "nth word": _nth,
}


def draw(rng: random.Random, split: str, *, thinking: bool | None = None) -> Item:
    """One question, each operation as likely."""
    operation = rng.choice(list(_OPERATIONS))
    (question, answer, reasoning, _), key = draw_in(
        split, lambda: _OPERATIONS[operation](rng), lambda work: f"{operation} {work[3]}"
    )
    thinking = rng.random() < 0.5 if thinking is None else thinking
    messages = [{"role": "user", "content": question}]
    return Item(TASK, operation, key, messages, thinking, say(answer, reasoning, thinking), same_text(answer))
