"""What a task hands out: a conversation, the answer that is expected, and a check of any other answer."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

SPLITS = ("train", "test")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Reply:
    """An assistant's turn, taken apart."""

    content: str
    reasoning: str = ""
    tool_calls: tuple[tuple[str, dict[str, str]], ...] = ()
    """Name and arguments, each argument as the chat template prints it."""


@dataclass(frozen=True)
class Item:
    """One question of the suite."""

    task: str
    kind: str
    """A class inside the task, for a finer table."""
    key: str
    """The content without its phrasing: decides the split."""
    messages: list[dict[str, Any]]
    thinking: bool
    expected: dict[str, Any]
    """The assistant message that training shows."""
    accepts: Callable[[Reply], bool] = field(repr=False)
    tools: list[dict[str, Any]] | None = None

    def check(self, text: str) -> bool:
        """Whether a generated text, from the end of the prompt on, answers the question."""
        reply = parse(text, thinking=self.thinking)
        return reply is not None and self.accepts(reply)

    @property
    def completion(self) -> str:
        """The expected text after the generation prompt, as the family's chat template prints it, with the end of
        the turn."""
        text: str = self.expected["content"]
        if self.thinking:
            text = f"{self.expected['reasoning_content']}\n</think>\n\n{text}"
        for i, call in enumerate(self.expected.get("tool_calls", ())):
            text += ("\n\n" if i == 0 and self.expected["content"] else "\n" if i else "") + _show_call(call)
        return text + "<|im_end|>"


def say(content: str, reasoning: str, thinking: bool) -> dict[str, Any]:
    """An assistant message; its reasoning only where it thinks."""
    return {"role": "assistant", "content": content, "reasoning_content": reasoning if thinking else ""}


def split_of(key: str) -> str:
    """The split that a content belongs to: one in ten is held out.

    >>> split_of("17 + 25") in SPLITS
    True
    """
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return "test" if int.from_bytes(digest, "big") % 10 == 0 else "train"


def draw_in(split: str, draw: Callable[[], _T], key: Callable[[_T], str]) -> tuple[_T, str]:
    """Draws until the content falls into the split."""
    while True:
        drawn = draw()
        name = key(drawn)
        if split_of(name) == split:
            return drawn, name


def pick(rng: random.Random, *weighted: tuple[float, _T]) -> _T:
    """One of several values by weight."""
    return rng.choices([v for _, v in weighted], [w for w, _ in weighted])[0]


def _show(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _show_call(call: dict[str, Any]) -> str:
    function = call["function"]
    text = f"<tool_call>\n<function={function['name']}>\n"
    for name, value in function["arguments"].items():
        text += f"<parameter={name}>\n{_show(value)}\n</parameter>\n"
    return text + "</function>\n</tool_call>"


def calls(message: dict[str, Any]) -> tuple[tuple[str, dict[str, str]], ...]:
    """The tool calls of a message, as `Reply` has them."""
    return tuple(
        (c["function"]["name"], {k: _show(v) for k, v in c["function"]["arguments"].items()})
        for c in message.get("tool_calls", ())
    )


_CALL = re.compile(r"<tool_call>\n<function=([^>\n]+)>\n(.*?)</function>\n</tool_call>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n(.*?)\n</parameter>\n", re.DOTALL)


def parse(text: str, *, thinking: bool) -> Reply | None:
    """Takes a generated text apart; None where it is malformed: a thought without end, a broken tool call."""
    text = text.removesuffix("<|im_end|>")
    reasoning = ""
    if thinking:
        reasoning, end, text = text.partition("</think>")
        if not end:
            return None
    elif "</think>" in text:
        return None
    found = tuple((name, dict(_PARAMETER.findall(body))) for name, body in _CALL.findall(text))
    content = _CALL.sub("", text).strip()
    if "<tool_call>" in content or "</tool_call>" in content:
        return None
    return Reply(content, reasoning.strip(), found)


def same_text(expected: str) -> Callable[[Reply], bool]:
    """Accepts this content and no tool call; spaces at its ends and its last full stop do not count."""

    def plain(text: str) -> str:
        return " ".join(text.split()).rstrip(".。")

    return lambda reply: not reply.tool_calls and plain(reply.content) == plain(expected)
