"""What `qwen35rs plan` prints of a layout: the one that it chose, and what each card of one would hold."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from .inspect import table_of
from .terminal import BOLD, console, write


def show_choice(choice: dict[str, Any]) -> None:
    """The layouts of the precision that was chosen, which of them to take, and why."""
    chosen = choice["chosen"]
    table = table_of(
        f"{choice['num_cards']} x {choice['gpu']}",
        ("precision", "left"),
        ("ranks", "right"),
        ("replicas", "right"),
        ("weights each", "right"),
        ("longest context", "right"),
        ("sequences each", "right"),
        ("one request", "right"),
        ("at once", "right"),
        ("all of them", "right"),
    )
    for layout in choice["layouts"]:
        if chosen and layout["scheme"] != chosen["scheme"]:
            continue
        does = layout["max_seqs"] > 0
        table.add_row(
            layout["scheme"],
            str(layout["tensor_parallel_size"]),
            str(layout["replicas"]) + (f" ({layout['idle_cards']} idle)" if layout["idle_cards"] else ""),
            f"{layout['weights_gib_per_card']:.1f} GiB",
            f"{layout['max_context']:,}" if does else "does not fit",
            f"{layout['max_seqs']:,}" if does else "",
            _speed(layout["tokens_per_s_alone"]),
            f"{layout['running']:,}" if does else "",
            _speed(layout["tokens_per_s"]),
        )
    console().print(table)
    if chosen:
        replicas = "one replica" if chosen["replicas"] == 1 else f"{chosen['replicas']} replicas"
        idle = f", {chosen['idle_cards']} idle" if chosen["idle_cards"] else ""
        write(f"Take {_arguments(chosen['arguments'])}: {replicas}{idle}.\n", BOLD)
    if chosen and chosen["published"]:
        write(
            f"This needs a checkpoint published in {chosen['published']}: another is held as it is stored.\n"
        )
    for sentence in choice["why"]:
        write(f"{sentence}\n")
    if choice["refused"]:
        sizes = ", ".join(str(refused["tensor_parallel_size"]) for refused in choice["refused"])
        _, _, allowed = choice["refused"][0]["why"].partition("; ")
        write(f"tensor_parallel_size cannot be {sizes}; {allowed}.\n")


def _arguments(arguments: dict[str, Any]) -> str:
    """As `LLM` takes them."""
    said = {name: f'"{value}"' if isinstance(value, str) else value for name, value in arguments.items()}
    return ", ".join(f"{name}={value}" for name, value in said.items() if value is not None)


def _speed(tokens: float | None) -> str:
    return "" if tokens is None else f"{tokens:,.0f} tok/s"


def show_held(gpu: str, report: dict[str, Any]) -> None:
    """What cards hold, or would have to hold at least; ranks with the same bytes side by side in one column."""
    error = report.get("error")
    if error:
        write(f"{gpu}: does not fit: {error}\n")
    ranks = report["ranks"]
    alike = [
        (found, [i for i, _ in group])
        for found, group in groupby(enumerate(ranks), key=lambda numbered: numbered[1])
    ]
    title = f"One {gpu}" if len(ranks) == 1 else f"Each of {len(ranks)} x {gpu}"
    title += ", if it were large enough" if error else ""
    columns = [("GiB" if len(ranks) == 1 else _ranks(numbers), "right") for _, numbers in alike]
    table = table_of(title, ("held for", "left"), *columns)
    names = {name: max(found.get(name, 0) for found in ranks) for found in ranks for name in found}
    for name in sorted(names, key=lambda name: -names[name]):
        if names[name]:
            table.add_row(name, *(f"{found.get(name, 0) / 2**30:.3f}" for found, _ in alike))
    table.add_section()
    table.add_row("all of it", *(f"{sum(found.values()) / 2**30:.3f}" for found, _ in alike))
    console().print(table)
    if error:
        write(f"Pages are those of one sequence of {report['max_model_len']:,} tokens.\n")
        return
    write(
        f"Pages hold {64 * report['num_pages']:,} tokens, a sequence at most {report['max_model_len']:,}. "
        "What recorded decode steps take comes later, up to 0.06 GiB.\n"
    )


def _ranks(numbers: list[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return f"rank {first}, GiB" if first == last else f"ranks {first} to {last}, GiB"
