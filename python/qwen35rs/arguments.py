"""What arguments may be, said alike wherever one is refused: `name: found X; allowed: Y`."""

from __future__ import annotations

import numbers
import operator
from typing import Any

from ._core import RequestError


def short(value: object) -> str:
    """A value for a message."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "an integer of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


def refuse(name: str, value: object, allowed: str) -> RequestError:
    """The error of an argument."""
    return RequestError(f"{name}: found {short(value)}; allowed: {allowed}")


def whole(name: str, value: Any, allowed: str, least: int = 0, most: int = 2**63 - 1) -> int:
    """An integer of those limits; no bool and no float. `allowed` may be narrower: the core knows more."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise refuse(name, value, allowed) from None
    if not least <= number <= most:
        raise refuse(name, value, allowed)
    return number


def number(name: str, value: Any, allowed: str) -> None:
    """Sees that a value is a number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise refuse(name, value, allowed)


def flag(name: str, value: Any, *, or_none: bool = False) -> None:
    """Sees that a value is True or False: what else Python takes for one of them is mostly a mistake."""
    if not isinstance(value, bool) and not (or_none and value is None):
        raise refuse(name, value, "True, False, None" if or_none else "True, False")


def named(name: str, value: Any, allowed: str) -> None:
    """Sees that a value is text, of which the core says whether it is one of the names."""
    if not isinstance(value, str) or not is_unicode(value):
        raise refuse(name, value, allowed)


def is_unicode(text: str) -> bool:
    """Whether a text is one: bytes that are no UTF-8 reach Python as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
