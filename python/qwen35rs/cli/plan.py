"""`qwen35rs plan`."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import _core, hub
from .inspect import cache, facts, parameters, table_of
from .layout import show_choice, show_held
from .options import Json
from .terminal import BOLD, FAILED, console, gib, guarded, note, write, write_json

if TYPE_CHECKING:
    from rich.table import Table

GPUS = ["RTX 4090", "RTX 5090", "RTX PRO 6000", "L40S", "A100 80GB", "H100 80GB", "H200"]
CARDS = [1, 2, 4, 8]
MOST_CARDS = 4096
SCHEMES = ["bf16", "fp8", "int4"]
STORED = "stored"
CONTEXT = 8192
LINKS = {"nvlink": "NVLink", "bridge": "NVLink bridges", "pcie": "PCIe", "network": "a network"}


@guarded
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A size of the family (0.8b 2b 4b 9b 27b 35b-a3b 122b-a10b 397b-a17b), a config.json, "
            "the directory of a checkpoint, a GGUF file, or a name on the hub. No weights are needed.",
            show_default=False,
        ),
    ],
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            help="Card, such as 4090, h100 or 'RTX PRO 6000', or its memory, such as 48GiB; may be repeated. "
            f"\\[default: {', '.join(GPUS)}]"
        ),
    ] = None,
    cards: Annotated[
        list[int] | None,
        typer.Option(
            help="Number of cards; may be repeated. With --gpu, a layout of them is chosen. "
            "\\[default: the fewest of 1, 2, 4, 8 that do]"
        ),
    ] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            help="bf16, fp8, fp8-head, int4, int4-experts, nvfp4, nvfp4-experts, mixed, or stored: as the checkpoint has "
            "them; may be repeated. \\[default: bf16, fp8, int4; all of them for a --gpu; stored for a checkpoint that is "
            "quantised and for GGUF]"
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help=f"Tokens of each sequence. \\[default: {CONTEXT}]"),
    ] = None,
    fp8_kv: Annotated[bool, typer.Option("--fp8-kv", help="Keys and values in fp8.")] = False,
    f16_state: Annotated[bool, typer.Option("--f16-state", help="Recurrent states in f16.")] = False,
    vision: Annotated[bool, typer.Option("--vision", help="Hold the vision tower.")] = False,
    mtp: Annotated[bool, typer.Option("--mtp", help="Hold the multi-token-prediction module.")] = False,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            "--dry-run",
            help="What this version would hold on each card, byte by byte: as published, or with --quantization.",
        ),
    ] = False,
    quantization: Annotated[
        str | None,
        typer.Option(help="With --memory: quantised at load to int4, fp8 or mixed.", show_default=False),
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(help="With --memory: cards that share the model. \\[default: 1]")
    ] = None,
    expert_parallel: Annotated[
        bool, typer.Option("--expert-parallel", help="With --memory: some of the experts whole on each card.")
    ] = False,
    max_model_len: Annotated[
        int | None, typer.Option(help="With --memory: longest prompt plus output.", show_default=False)
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(
            help="Requests that run at once, with --memory, or over all replicas of a layout. \\[default: 32]"
        ),
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="With --memory: prompt tokens of a step. \\[default: 512]")
    ] = None,
    all_reduce_us: Annotated[
        float | None,
        typer.Option(
            help="Microseconds that a sum over the cards of a model takes. \\[default: by the link of the card: 6 over "
            "NVLink, 20 over PCIe, 60 over a network]"
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Say whether a model fits on GPUs, how fast it could decode at most, and which layout to take. No GPU is needed.

    \b
    qwen35rs plan 122b-a10b
    qwen35rs plan 35b-a3b --gpu 4090 --gpu 5090 --context 32768
    qwen35rs plan 122b-a10b --gpu h100 --cards 4
    qwen35rs plan ./demo/config.json --json

    \b
    "At most" is memory bandwidth over the bytes that a card must read for
    a token of one sequence, and what the cards of a model exchange: no
    engine decodes faster without drafting tokens. Cards that share a model
    are ranks (tensor parallel). Of a --gpu and a number of --cards a layout
    is chosen: the first precision that fits, and in it the cards to a model
    with the most tokens per second of --max-num-seqs requests.
    """
    sizes = {
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "tensor_parallel_size": tensor_parallel_size,
    }
    chooses = bool(gpu and cards)
    for name, value in sizes.items():
        of_layout = name == "max_num_seqs"
        if value is not None and not memory and not (chooses and of_layout):
            also = ", or with --gpu and --cards" if of_layout else ""
            raise _core.RequestError(f"{name}: found it without --memory; allowed: with it{also}")
        if value is not None and not 0 <= value < 2**63:
            raise _core.RequestError(f"{name}: found {value}; allowed: numbers from 1 to 2^63 - 1")
    for name, given in {"quantization": quantization, "expert_parallel": expert_parallel}.items():
        if given and not memory:
            raise _core.RequestError(f"{name}: found it without --memory; allowed: with it")
    if quantization not in (None, "int4", "fp8", "mixed"):
        raise _core.RequestError(f"quantization: found {quantization}; allowed: int4, fp8, mixed")
    others: dict[str, Any] = {"scheme": scheme, "cards": cards, "context": context, "vision": vision or None}
    others["all_reduce_us"] = all_reduce_us
    for name, other in others.items():
        if memory and other is not None:
            raise _core.RequestError(
                f"{name}: found it with --memory; allowed: without (no vision; cards are --tensor-parallel-size)"
            )
    source, asked_context = _source(model), context

    def ask(gpus: list[str], cards: list[int], schemes: list[str], context: int) -> dict[str, Any]:
        text = _core.plan_model(
            source,
            gpus=gpus,
            cards=cards,
            schemes=schemes,
            context=context,
            fp8_kv=fp8_kv,
            f16_state=f16_state,
            with_vision=vision,
            with_mtp=mtp,
            num_seqs=(32 if max_num_seqs is None else max_num_seqs) if chooses else None,
            max_model_len=asked_context,
            all_reduce_us=all_reduce_us,
        )
        plan: dict[str, Any] = json_text.loads(text)
        return plan

    for number in cards or []:
        if not 1 <= number <= MOST_CARDS:
            raise _core.RequestError(f"cards: found {number}; allowed: 1 to {MOST_CARDS}")
    if context is not None and not 1 <= context < 2**63:
        raise _core.RequestError(f"context: found {context}; allowed: numbers from 1 to 2^63 - 1")
    planned = ask([], [], [], 1)
    quantised = planned["config"]["quantization"]
    if context is None:
        context = min(CONTEXT, planned["config"]["max_position"])
    schemes = scheme or ([] if gpu else SCHEMES)
    if planned["stored"] and not scheme and not memory:
        schemes = [STORED]
        try:
            ask([], [], schemes, context)
        except (_core.ConfigError, _core.RequestError, OSError) as error:
            if not quantised:
                raise
            schemes = [_declared(quantised)]
            note(
                f"note: {model} is quantised, and its weights cannot be counted ({error}); this counts {schemes[0]}, the "
                "nearest to what config.json says"
            )
    found = ask(gpu or GPUS, cards or CARDS, schemes, context)
    for named in found["cards"]:
        if gpu and named["others"]:
            too = " and ".join(named["others"])
            note(f"note: --gpu {named['named']} is taken as {named['card']}; there is {too} too")
    if memory:
        limits: dict[str, Any] = {"max_num_seqs": 32, "max_num_batched_tokens": 512}
        limits |= {"tensor_parallel_size": 1, "expert_parallel": expert_parallel}
        limits |= {"max_model_len": None, "mtp": mtp}
        limits |= {"fp8_kv": fp8_kv, "f16_state": f16_state}
        limits |= {name: value for name, value in sizes.items() if value is not None}
        limits["quantization"] = quantization
        limits["gpu_memory_utilization"] = planned["options"]["memory_utilization"]
        held = {name: _held(source, name, limits) for name in gpu or ["H100 80GB"]}
        if json:
            write_json({"model": model, **found, "memory": held})
        else:
            cards_of = {named["named"]: named["card"] for named in found["cards"]}
            for name, report in held.items():
                show_held(cards_of.get(name, name), report)
        if all("error" in report for report in held.values()):
            raise typer.Exit(FAILED)
        return
    if json:
        write_json({"model": model, **found})
        return
    _show(model, found, fewest=not cards)
    for choice in found["choices"]:
        show_choice(choice)


def _declared(quantised: dict[str, Any]) -> str:
    """The scheme that is nearest to a `quantization_config`, which names forms and hardly the matrices that have them."""
    if quantised["int4"]:
        experts = "int4-experts" if quantised["method"] == "gptq" else "int4"
        return "mixed" if quantised["fp8"] else experts
    return "nvfp4" if quantised["nvfp4"] else "fp8"


def _held(source: str, gpu: str, limits: dict[str, Any]) -> dict[str, Any]:
    """What an engine holds on a card; or why it does not fit, and what it would have to hold."""
    text = _core.plan_memory(source, gpu=gpu, **limits)
    if text is None:
        raise _core.RequestError("--memory: found a build without CUDA; allowed: a build with it")
    report: dict[str, Any] = json_text.loads(text)
    return report


def _source(model: str) -> str:
    """What the core plans: an existing path as it is, a family name, else a name on the hub."""
    hub.check_gguf(Path(model))
    if Path(model).exists() or "/" not in model or model.lower().startswith("qwen/") and _is_size(model):
        return model
    return str(hub.resolve(model, patterns=["config.json"]))


def _is_size(name: str) -> bool:
    try:
        _core.plan_model(
            name,
            gpus=[],
            cards=[],
            schemes=[],
            context=1,
            fp8_kv=False,
            f16_state=False,
            with_vision=False,
            with_mtp=False,
        )
    except _core.RequestError:
        return False
    return True


def _show(model: str, found: dict[str, Any], fewest: bool) -> None:
    config, context = found["config"], found["options"]["context"]
    out = console()
    write(f"{model}\n", BOLD)
    kinds = config["layers"]
    rows = {"layers": f"{len(kinds)} ({kinds.count('attention')} attention), hidden {config['hidden']}"}
    rows |= parameters(found["params"]) | cache(found["cache"])
    rows["context"] = f"{config['max_position']:,} tokens"
    out.print(facts(rows, ""))
    out.print(_weights(found))
    out.print(_rows(found, context, fewest))
    options = found["options"]
    held = [name for name in ("vision", "mtp") if options[f"with_{name}"]]
    write(
        f"Sequences are {context:,} tokens long, keys and values {'fp8' if options['fp8_kv'] else 'bf16'}, "
        f"states {'f16' if options['f16_state'] else 'f32'}"
        f"{''.join(f', {name} held' for name in held)}; {options['reserve_gib']} GiB of each card are left for work space, "
        f"and {options['memory_utilization']:.0%} of what weights leave beside them is used. Tokens per second are what the "
        f"bandwidth allows one sequence at most.{_sums(found['rows'])}\n"
    )


def _sums(rows: list[dict[str, Any]]) -> str:
    """What is assumed of sums between cards, where any row has several."""
    links: dict[float, list[str]] = {}
    for row in rows:
        if row["num_cards"] == 1 or row["refused"]:
            continue
        # A bridge joins two.
        link = "pcie" if row["link"] == "bridge" and row["num_cards"] > 2 else row["link"]
        names = links.setdefault(row["all_reduce_us"], [])
        names += [LINKS[link]] if LINKS[link] not in names else []
    if not links:
        return ""
    each = ", ".join(f"{us:g} us over {' and '.join(names)}" for us, names in sorted(links.items()))
    return f" Between cards two sums a layer are assumed to take {each} each."


def _weights(found: dict[str, Any]) -> Table:
    table = table_of("Weights", ("precision", "left"), ("resident", "right"), ("read per token", "right"))
    for row in found["weights"]:
        table.add_row(row["scheme"], gib(row["resident"]), gib(row["read_per_token"]))
    return table


def _rows(found: dict[str, Any], context: int, fewest: bool) -> Table:
    table = table_of(
        "Cards",
        ("card", "left"),
        ("precision", "left"),
        ("cards", "right"),
        ("weights each", "right"),
        ("longest context", "right"),
        ("sequences", "right"),
        ("at most", "right"),
    )
    chosen: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        chosen.setdefault((row["gpu"], row["scheme"]), []).append(row)
    last = None
    for (gpu, scheme), rows in chosen.items():
        if last not in (None, gpu):
            table.add_section()
        most = rows[-1]["num_cards"]
        if fewest:
            able = [row for row in rows if not row["refused"]] or rows
            rows = [row for row in able if row["max_seqs"] > 0][:1] or able[-1:]
        for row in rows:
            does, cannot = row["max_seqs"] > 0, row["refused"] is not None
            # Where the most that were tried cannot share it, more would do no better.
            few = not does and fewest and not cannot and row["num_cards"] == most
            speed = row["decode_limit_tokens_per_s"]
            longest = f"{row['max_context']:,}" if row["fits"] else "" if few else "does not fit"
            table.add_row(
                gpu if gpu != last else "",
                scheme,
                f"more than {row['num_cards']}" if few else str(row["num_cards"]),
                "" if few or cannot else f"{row['weights_gib_per_card']:.1f} GiB",
                "cannot share it" if cannot else longest,
                f"{row['max_seqs']:,}" if does else "" if few or cannot else "0",
                f"{speed:,.0f} tok/s" if does and speed else "",
            )
            last = gpu
    return table
