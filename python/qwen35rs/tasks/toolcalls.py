"""Task 4: one to four tools are given; call the right one with the right arguments, answer from its response, and call
nothing when none fits."""

from __future__ import annotations

import json
import random
from typing import Any

from .item import Item, Reply, calls, draw_in, pick, same_text, say
from .toolset import FUNCTIONS, Function

TASK = "tools"
_NONE = "I have no tool for that."


class _Named:
    """A function under one of its names, each parameter under one of its own."""

    def __init__(self, rng: random.Random, function: Function) -> None:
        self.function = function
        self.name = rng.choice(function.names)
        self.names = [rng.choice(p.names) for p in function.parameters]
        if len(set(self.names)) < len(self.names):
            self.names = [p.names[0] for p in function.parameters]
        self.about = rng.choice(function.about)

    def schema(self) -> dict[str, Any]:
        properties = {
            name: {"type": p.type, "description": p.about}
            for name, p in zip(self.names, self.function.parameters, strict=True)
        }
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.about,
                "parameters": {"type": "object", "properties": properties, "required": self.names},
            },
        }


def draw(rng: random.Random, split: str, *, kind: str | None = None, thinking: bool | None = None) -> Item:
    """One question. By default three in five want a call ("call"), one has the response of a tool ("answer"), one fits
    no tool ("none")."""
    kind = kind or pick(rng, (3, "call"), (1, "answer"), (1, "none"))

    def content() -> tuple[list[_Named], dict[str, Any], str]:
        drawn = rng.sample(FUNCTIONS, rng.randint(1, 4) + (kind == "none"))
        tools = [_Named(rng, f) for f in drawn]
        wanted = tools[0]
        values = {p.names[0]: p.draw(rng) for p in wanted.function.parameters}
        return tools, values, rng.choice(wanted.function.requests).format(**values)

    (tools, values, request), key = draw_in(
        split, content, lambda c: f"tools {c[2]} {c[0][0].name} {c[0][0].names}"
    )
    wanted = tools[0]
    offered = tools[1:] if kind == "none" else tools
    rng.shuffle(offered)
    schemas = [t.schema() for t in offered]
    thinking = rng.random() < 0.5 if thinking is None else thinking
    messages: list[dict[str, Any]] = [{"role": "user", "content": request}]
    if rng.random() < 0.2:
        messages.insert(0, {"role": "system", "content": "You are a helpful assistant."})
    if kind == "none":
        expected = say(_NONE, "No tool fits.", thinking)
        return Item(TASK, kind, key, messages, thinking, expected, same_text(_NONE), schemas)
    arguments = dict(zip(wanted.names, values.values(), strict=True))
    call = {"type": "function", "function": {"name": wanted.name, "arguments": arguments}}
    plan = f"I call {wanted.name}."
    if kind == "answer":
        response = {name: give(rng) for name, give in wanted.function.returns.items()}
        messages.append({**say("", plan, thinking), "tool_calls": [call]})
        messages.append({"role": "tool", "content": json.dumps(response)})
        text = wanted.function.answer.format(**values, **response)
        expected = say(text, f"{wanted.name} has answered.", thinking)
        return Item(TASK, kind, key, messages, thinking, expected, same_text(text), schemas)
    expected = {**say("", plan, thinking), "tool_calls": [call]}
    right = calls(expected)

    def accepts(reply: Reply) -> bool:
        return reply.tool_calls == right

    return Item(TASK, f"call, {len(offered)} tools", key, messages, thinking, expected, accepts, schemas)
