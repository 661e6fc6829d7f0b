"""Task 1: sums, differences and products of integers of up to three digits, in digits and in words, in English and in
Chinese. With thinking, the steps digit by digit."""

from __future__ import annotations

import random

from .item import Item, Reply, draw_in, pick, say
from .numbers import chinese, english

TASK = "arithmetic"
_SIGNS = {"+": ("+", "plus", "加"), "-": ("-", "minus", "减"), "*": ("*", "times", "乘")}
_ENGLISH = (
    "What is {}?",
    "How much is {}?",
    "Calculate {}.",
    "Compute {}.",
    "{}",
    "{} = ?",
    "Please compute {}.",
)
_WORDS = ("What is {}?", "How much is {}?", "Calculate {}.", "Compute {}.", "Please compute {}.")
_CHINESE = ("{}等于多少？", "{}是多少？", "计算{}。", "请计算{}。")


def _number(rng: random.Random, num_digits: int) -> int:
    return rng.randrange(10 ** (num_digits - 1) if num_digits > 1 else 0, 10**num_digits)


def solve(a: int, sign: str, b: int) -> int:
    return a + b if sign == "+" else a - b if sign == "-" else a * b


def _columns(a: int, b: int, sign: str) -> list[str]:
    """The columns of a sum, or of a difference with a >= b, from the ones on."""
    lines, carry = [], 0
    width = max(len(str(a)), len(str(b)))
    for i in range(width):
        x, y = a // 10**i % 10, b // 10**i % 10
        if sign == "+":
            total = x + y + carry
            lines.append(f"{x} + {y} + {carry} = {total}, {total % 10} carry {total // 10}")
            carry = total // 10
        else:
            total = x - y - carry
            lines.append(f"{x} - {y} - {carry} = {total}, {total % 10} carry {int(total < 0)}")
            carry = int(total < 0)
    return lines


def steps(a: int, sign: str, b: int) -> str:
    """The work, one column a line; its last line is the result.

    >>> print(steps(17, "+", 25))
    17 + 25
    7 + 5 + 0 = 12, 2 carry 1
    1 + 2 + 1 = 4, 4 carry 0
    17 + 25 = 42
    """
    lines = [f"{a} {sign} {b}"]
    if sign == "+":
        lines += _columns(a, b, "+")
    elif sign == "-":
        if a < b:
            lines += [f"{b} is larger", f"{b} - {a}", *_columns(b, a, "-"), f"{b} - {a} = {b - a}"]
        else:
            lines += _columns(a, b, "-")
    else:
        total: int | None = None
        for i, digit in enumerate(reversed(str(b))):
            d, carry = int(digit), 0
            if d > 0 and a > 0:
                for x in map(int, reversed(str(a))):
                    part = x * d + carry
                    lines.append(f"{x} * {d} + {carry} = {part}, {part % 10} carry {part // 10}")
                    carry = part // 10
            scaled = a * d * 10**i
            lines.append(f"{a} * {d * 10**i} = {scaled}")
            if total is None:
                total = scaled
            else:
                if total and scaled:
                    lines += _columns(total, scaled, "+")
                lines.append(f"{total} + {scaled} = {total + scaled}")
                total += scaled
    last = f"{a} {sign} {b} = {solve(a, sign, b)}"
    if lines[-1] != last:
        lines.append(last)
    return "\n".join(lines)


def _ask(rng: random.Random, a: int, sign: str, b: int, form: str) -> tuple[str, str]:
    """A question and its answer."""
    symbol, word, character = _SIGNS[sign]
    result = solve(a, sign, b)
    if form == "words":
        text = f"{english(a)} {word} {english(b)}"
        return rng.choice(_WORDS).format(text), f"{text} is {english(result)}."
    if form == "chinese":
        text = f"{chinese(a)}{character}{chinese(b)}"
        return rng.choice(_CHINESE).format(text), f"{text}等于{chinese(result)}。"
    answer = f"{a} {symbol} {b} = {result}"
    if form == "chinese digits":
        text = pick(rng, (2, f"{a} {symbol} {b} "), (1, f"{a}{symbol}{b}"), (1, f"{a}{character}{b}"))
        return rng.choice(_CHINESE).format(text), answer
    shown = pick(rng, (3, f"{a} {symbol} {b}"), (1, f"{a}{symbol}{b}"), (1, f"{a} {word} {b}"))
    return rng.choice(_ENGLISH).format(shown), answer


def draw(
    rng: random.Random,
    split: str,
    *,
    lengths: tuple[tuple[int, int], ...] = ((1, 1), (1, 2), (2, 1), (2, 2)),
    signs: str = "+-*",
    thinking: bool | None = None,
) -> Item:
    """One question. `lengths` are the pairs of numbers of digits to draw from, each as likely."""

    def content() -> tuple[int, str, int]:
        left, right = rng.choice(lengths)
        return _number(rng, left), rng.choice(signs), _number(rng, right)

    (a, sign, b), key = draw_in(split, content, lambda c: f"{c[0]} {c[1]} {c[2]}")
    form = pick(rng, (4, "digits"), (2, "words"), (2, "chinese digits"), (2, "chinese"))
    question, answer = _ask(rng, a, sign, b, form)
    thinking = rng.random() < 0.5 if thinking is None else thinking

    def accepts(reply: Reply) -> bool:
        if reply.tool_calls:
            return False
        result = solve(a, sign, b)
        text = reply.content.rstrip(".。 ")
        for mark in ("=", " is ", "等于"):
            text = text.rpartition(mark)[2]
        return text.strip() in (str(result), english(result), chinese(result))

    width = f"{len(str(a))}x{len(str(b))}"
    kind = f"{sign} {width} {form} {'thinking' if thinking else 'direct'}"
    messages = [{"role": "user", "content": question}]
    return Item(TASK, kind, key, messages, thinking, say(answer, steps(a, sign, b), thinking), accepts)
