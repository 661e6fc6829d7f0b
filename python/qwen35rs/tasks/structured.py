"""Task 5: facts told in prose, asked for as JSON or as a sentence."""

from __future__ import annotations

import json
import random
from typing import Any

from .item import Item, Reply, draw_in, same_text, say
from .words import ANIMALS, CITIES, COLORS, DAYS, JOBS, NAMES, WORDS

TASK = "json"
_Record = dict[str, Any]
# For each kind of record, for each key: how it is told, how it is asked, how that is answered.
_Fields = dict[str, tuple[tuple[str, ...], str, str]]
_KINDS: dict[str, _Fields] = {
    "person": {
        "age": (("{name} is {age} years old.", "The age of {name} is {age}."), "How old is {name}?", "{name} is {age} years old."),
        "city": (("{name} lives in {city}.", "The home of {name} is {city}."), "Where does {name} live?", "{name} lives in {city}."),
        "job": (("{name} works as a {job}.", "The job of {name} is {job}."), "What is the job of {name}?", "{name} works as a {job}."),
        "pet": (("{name} has a {pet}.", "The pet of {name} is a {pet}."), "Which pet does {name} have?", "{name} has a {pet}."),
    },
    "product": {
        "price": (("The {name} costs {price} dollars.", "The price of the {name} is {price}."), "What does the {name} cost?", "The {name} costs {price} dollars."),
        "color": (("The {name} is {color}.", "The color of the {name} is {color}."), "What color is the {name}?", "The {name} is {color}."),
        "stock": (("We have {stock} of the {name}.", "There are {stock} pieces of the {name}."), "How many of the {name} are there?", "There are {stock} of the {name}."),
    },
    "meeting": {
        "day": (("The meeting with {name} is on {day}.", "We meet {name} on {day}."), "When is the meeting with {name}?", "The meeting with {name} is on {day}."),
        "hour": (("The meeting with {name} starts at {hour}.", "We meet {name} at {hour} o'clock."), "At which hour is the meeting with {name}?", "The meeting with {name} starts at {hour}."),
        "city": (("The meeting with {name} is in {city}.", "We meet {name} in {city}."), "In which city is the meeting with {name}?", "The meeting with {name} is in {city}."),
    },
}  # fmt: skip
_ONE = (
    "Give this as JSON with the keys {}.",
    "Write these facts as JSON with the keys {}.",
    "Answer in JSON with the keys {}.",
)
_SEVERAL = (
    "Give this as a JSON list with the keys {}.",
    "Write these facts as a JSON list of objects with the keys {}.",
)


def _record(rng: random.Random, kind: str, name: str) -> _Record:
    values: _Record = {
        "name": name,
        "age": rng.randrange(1, 100),
        "city": rng.choice(CITIES),
        "job": rng.choice(JOBS),
        "pet": rng.choice(ANIMALS),
        "price": rng.randrange(1, 1000),
        "color": rng.choice(COLORS),
        "stock": rng.randrange(2, 100),
        "day": rng.choice(DAYS),
        "hour": rng.randrange(1, 13),
    }
    return {"name": name, **{key: values[key] for key in _KINDS[kind]}}


def _tell(rng: random.Random, kind: str, records: list[_Record], told: list[str]) -> str:
    sentences = []
    for record in records:
        fields = told[:]
        rng.shuffle(fields)
        sentences += [rng.choice(_KINDS[kind][key][0]).format(**record) for key in fields]
    return " ".join(sentences)


def draw(rng: random.Random, split: str, *, thinking: bool | None = None) -> Item:
    """One question: four in five ask for JSON."""

    def content() -> tuple[str, list[_Record]]:
        kind = rng.choice(list(_KINDS))
        names = rng.sample(WORDS if kind == "product" else NAMES, rng.choice((1, 1, 2, 3)))
        return kind, [_record(rng, kind, name) for name in names]

    (kind, records), key = draw_in(split, content, lambda c: f"{c[0]} {json.dumps(c[1])}")
    fields = list(_KINDS[kind])
    told = rng.sample(fields, rng.randint(2, len(fields)))
    text = _tell(rng, kind, records, told)
    thinking = rng.random() < 0.5 if thinking is None else thinking
    if rng.random() < 0.2:
        record, asked = rng.choice(records), rng.choice(told)
        _, question, answer = _KINDS[kind][asked]
        answer = answer.format(**record)
        messages = [{"role": "user", "content": f"{text} {question.format(**record)}"}]
        reasoning = f"The {asked} of {record['name']} is {record[asked]}."
        return Item(
            TASK, "sentence", key, messages, thinking, say(answer, reasoning, thinking), same_text(answer)
        )
    keys = ["name", *rng.sample(told, rng.randint(1, len(told)))]
    if rng.random() < 0.3:
        rng.shuffle(keys)
    listed = ", ".join(keys[:-1]) + " and " + keys[-1]
    wanted: Any = [{k: r[k] for k in keys} for r in records]
    if len(records) == 1:
        wanted = wanted[0]
    question = rng.choice(_ONE if len(records) == 1 else _SEVERAL).format(listed)
    lines = "\n".join(f"{k}: {r[k]}" for r in records for k in keys)

    def accepts(reply: Reply) -> bool:
        try:
            return not reply.tool_calls and bool(json.loads(reply.content) == wanted)
        except ValueError:
            return False

    messages = [{"role": "user", "content": f"{text} {question}"}]
    return Item(
        TASK,
        "object" if len(records) == 1 else "list",
        key,
        messages,
        thinking,
        say(json.dumps(wanted), lines, thinking),
        accepts,
    )
