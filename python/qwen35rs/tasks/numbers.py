"""Integers as words, in English and in Chinese."""

from __future__ import annotations

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_ZH = "零一二三四五六七八九"


def english(n: int) -> str:
    """An integer below a million in absolute value.

    >>> english(-342)
    'minus three hundred forty-two'
    """
    if n < 0:
        return "minus " + english(-n)
    if n < 20:
        return _ONES[n]
    if n < 100:
        return _TENS[n // 10] + ("" if n % 10 == 0 else "-" + _ONES[n % 10])
    if n < 1000:
        return _ONES[n // 100] + " hundred" + ("" if n % 100 == 0 else " " + english(n % 100))
    return english(n // 1000) + " thousand" + ("" if n % 1000 == 0 else " " + english(n % 1000))


def chinese(n: int) -> str:
    """An integer below a hundred million in absolute value.

    >>> chinese(10), chinese(-342), chinese(60007)
    ('十', '负三百四十二', '六万零七')
    """
    if n < 0:
        return "负" + chinese(-n)
    if n == 0:
        return _ZH[0]
    if n >= 10000:
        high, low = divmod(n, 10000)
        rest = "" if low == 0 else ("零" if low < 1000 else "") + _below(low)
        return chinese(high) + "万" + rest
    text = _below(n)
    return text[1:] if text.startswith("一十") else text


def _below(n: int) -> str:
    """1 to 9999, with 一十 for ten."""
    text, gap = "", False
    for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = n // unit % 10
        if digit == 0:
            gap = gap or bool(text)
            continue
        text += ("零" if gap else "") + _ZH[digit] + name
        gap = False
    return text
