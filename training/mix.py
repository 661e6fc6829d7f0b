"""What the embedded model reads: conversations of the train split, mixed, tokenized, weighted and packed.

A batch is one row of tokens that holds many conversations end to end, none of which sees another. The batch of a step
depends on the seed and on the step alone, whatever the number of workers.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from qwen35rs import Tokenizer, tasks
from qwen35rs.tasks import Item, arithmetic, recall, smalltalk, structured, textops, toolcalls

# Shares of the tokens.
SHARES = {"arithmetic": 0.35, "recall": 0.20, "text": 0.18, "tools": 0.17, "json": 0.07, "talk": 0.03}
# Longest recall text, from this share of the run on.
_LENGTHS = ((0.0, 256), (0.08, 512), (0.18, 1024), (0.32, 2048), (0.45, 4000))
_TWO = ((1, 1), (1, 2), (2, 1), (2, 2), (2, 2), (2, 2))
_THREE = tuple((a, b) for a in (1, 2, 3) for b in (1, 2, 3) if max(a, b) == 3)


class Encoder:
    """Conversations to token ids and the weights of the loss."""

    def __init__(self, tokenizer: str | Path, prompt: float = 0.03) -> None:
        self.prompt = prompt  # weight in the loss of a token that is not an assistant's
        self.tokenizer = Tokenizer(tokenizer)
        ids = self.tokenizer.added_tokens
        self.start, self.end, self.pad = ids["<|im_start|>"], ids["<|im_end|>"], ids["<|endoftext|>"]
        self.header = np.array(self.tokenizer.encode("<|im_start|>assistant\n"), np.int32)
        self.closed = np.array(self.tokenizer.encode("<think>\n\n</think>\n\n"), np.int32)
        self.open = np.array(self.tokenizer.encode("<think>\n"), np.int32)

    def __call__(self, item: Item) -> tuple[np.ndarray, np.ndarray, int]:
        """Ids `[n]`, the weight `[n]` of each as a target, and where the last answer starts."""
        text = self.tokenizer.apply_chat_template(
            [*item.messages, item.expected], tools=item.tools, add_generation_prompt=False, tokenize=False
        )
        ids = self.tokenizer.encode_array(text).astype(np.int32)
        weights = np.full(len(ids), self.prompt, np.float32)
        ends, first = np.flatnonzero(ids == self.end), 0
        for at in np.flatnonzero(ids == self.start):
            first = at + len(self.header)
            if not np.array_equal(ids[at:first], self.header):
                continue
            for prefix in (self.closed, self.open):
                if np.array_equal(ids[first : first + len(prefix)], prefix):
                    weights[first : first + len(prefix)] = 0
                    first += len(prefix)
                    break
            last = ends[np.searchsorted(ends, first)]
            # Short answers say in few tokens what long ones say in many.
            weights[first : last + 1] = min(4.0, max(0.5, math.sqrt(48 / (last + 1 - first))))
        return ids, weights, first


def _arithmetic(rng: random.Random) -> Item:
    kind = rng.random()
    if kind < 0.30:  # what needs the most practice
        return arithmetic.draw(rng, "train", lengths=((2, 2),), signs="*", thinking=False)
    if kind < 0.75:
        return arithmetic.draw(rng, "train", lengths=_TWO)
    return arithmetic.draw(rng, "train", lengths=_THREE, thinking=rng.random() < 0.7)


def _recall(rng: random.Random, progress: float, limit: int) -> Item:
    longest = min(limit, max(n for share, n in _LENGTHS if progress >= share))
    num_tokens = int(math.exp(rng.uniform(math.log(90), math.log(longest))))
    return recall.draw(rng, "train", num_tokens=num_tokens, num_turns=rng.randint(1, 12))


_SHORT = {"text": textops.draw, "json": structured.draw, "talk": smalltalk.draw}


def draw(rng: random.Random, family: str, progress: float, longest: int = 4000) -> Item:
    """One conversation; one in four of the short ones has a history of other questions."""
    if family == "recall":
        return _recall(rng, progress, longest)
    if family == "tools":
        # That no tool fits is learned last, and at once: with fewer examples some seeds never came to it.
        return toolcalls.draw(rng, "train", kind=rng.choices(("call", "answer", "none"), (5, 2, 3))[0])
    item = _arithmetic(rng) if family == "arithmetic" else _SHORT[family](rng, "train")
    if rng.random() < 0.25:
        for _ in range(rng.randint(1, 3)):
            earlier = rng.choice((_arithmetic, *(lambda r, f=f: f(r, "train") for f in _SHORT.values())))(rng)
            item.messages[:0] = [
                *earlier.messages,
                {"role": "assistant", "content": earlier.expected["content"]},
            ]
    return item


def pack(documents: list[tuple[np.ndarray, np.ndarray, int]], size: int, pad: int) -> dict[str, Any]:
    """Conversations end to end in a row of `size` tokens, the rest of it padding.

    tokens, positions int32 [size]; weights float32 [size] of each token as a target; cu_seqlens int64 [num + 1];
    chunks int64 [num_chunks, 2], the document and the place in it of every 64 tokens
    """
    tokens = np.full(size, pad, np.int32)
    weights = np.zeros(size, np.float32)
    positions = np.zeros(size, np.int32)
    bounds, at = [0], 0
    for ids, weight, _ in documents:
        n = len(ids)
        tokens[at : at + n], weights[at : at + n], positions[at : at + n] = ids, weight, np.arange(n)
        weights[at] = 0  # nothing predicts it
        at += n
        bounds.append(at)
    while at < size:  # in short pieces
        n = min(64, size - at)
        positions[at : at + n] = np.arange(n)
        at += n
        bounds.append(at)
    lengths = np.diff(bounds)
    counts = -(-lengths // 64)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    chunks = np.stack([np.repeat(np.arange(len(counts)), counts), np.arange(counts.sum()) - starts], axis=1)
    return {
        "tokens": torch.from_numpy(tokens),
        "weights": torch.from_numpy(weights),
        "positions": torch.from_numpy(positions),
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int64),
        "chunks": torch.from_numpy(chunks.astype(np.int64)),
        "longest": int(lengths.max()),
    }


class Batches(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The batch of every step, by its index."""

    def __init__(
        self,
        tokenizer: str | Path,
        size: int,
        steps: int,
        seed: int,
        longest: int = 4000,
        prompt: float = 0.03,
    ) -> None:
        self.tokenizer, self.size, self.steps, self.seed = str(tokenizer), size, steps, seed
        self.longest, self.prompt = longest, prompt
        self.encode: Encoder | None = None

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        if self.encode is None:
            self.encode = Encoder(self.tokenizer, self.prompt)
        rng = random.Random(f"{self.seed}/{step}")
        filled, used, documents, misses = 0, dict.fromkeys(SHARES, 0), [], 0
        while misses < 6:
            # The family that is furthest behind its share; a random one first, for the tails of small batches.
            family = max(SHARES, key=lambda f: SHARES[f] * (filled + rng.random() * 2000) - used[f])
            document = self.encode(draw(rng, family, step / self.steps, self.longest))
            n = len(document[0])
            if filled + n > self.size:
                misses += 1
                continue
            documents.append(document)
            filled += n
            used[family] += n
        return pack(documents, self.size, self.encode.pad)


def held_out(tokenizer: str | Path, size: int, num: int, seed: int) -> list[dict[str, Any]]:
    """Packed batches of `num` test questions of each task of the suite; `spans` are (task, kind, first, end) of the
    answers."""
    encode = Encoder(tokenizer)
    batches, documents, spans, filled = [], [], [], 0

    def close() -> None:
        nonlocal documents, spans, filled
        if documents:
            batches.append({**pack(documents, size, encode.pad), "spans": spans})
        documents, spans, filled = [], [], 0

    for task in tasks.SUITE:
        for _, item in zip(range(num), tasks.items(task, seed=seed), strict=False):
            ids, weights, first = encode(item)
            if filled + len(ids) > size:
                close()
            # The last token is the line feed after the end of the turn.
            spans.append((task, item.kind, filled + first, filled + len(ids) - 1))
            documents.append((ids, weights, first))
            filled += len(ids)
    close()
    return batches
