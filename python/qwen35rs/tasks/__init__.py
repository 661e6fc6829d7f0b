"""The task suite: six families of generated questions with checkable answers, in the chat format, thinking on and off.

A content belongs to one of two splits by its hash, whatever its phrasing; the embedded model was trained on the one and
is measured on the other. The same seed gives the same questions.

>>> item = next(items("arithmetic", seed=1))
>>> item.check(item.completion)
True
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

from . import arithmetic, recall, smalltalk, structured, textops, toolcalls
from .item import SPLITS, Item, Reply, parse, split_of

__all__ = ["SHORT", "SPLITS", "SUITE", "Item", "Reply", "items", "parse", "split_of"]

_THREE = tuple((a, b) for a in (1, 2, 3) for b in (1, 2, 3) if max(a, b) == 3)


def _recall(rng: random.Random, split: str, low: int, high: int) -> Item:
    return recall.draw(rng, split, num_tokens=rng.randint(low, high))


SUITE: dict[str, Callable[[random.Random, str], Item]] = {
    "arithmetic": arithmetic.draw,
    "arithmetic, three digits": partial(arithmetic.draw, lengths=_THREE),
    "recall": partial(_recall, low=100, high=1024),
    "recall, long": partial(_recall, low=1025, high=4000),
    "text": textops.draw,
    "tools": toolcalls.draw,
    "json": structured.draw,
    "talk": smalltalk.draw,
}
"""What is measured, by name. Arithmetic is of one and two digits, each pair of lengths as likely; recall is to 1,024
and to 4,096 tokens of prompt."""

SHORT = [task for task in SUITE if task != "recall, long"]
"""All but the one with prompts of thousands of tokens, for what has no time for it."""


def items(task: str, *, split: str = "test", seed: int = 0) -> Iterator[Item]:
    """Questions of one task of `SUITE`, without end. The i-th of a seed does not depend on how many are taken."""
    i = 0
    while True:
        yield SUITE[task](random.Random(f"{task}/{split}/{seed}/{i}"), split)
        i += 1
