"""`qwen35rs inspect`."""

from __future__ import annotations

import json as json_text
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import _core, hub
from .options import Json
from .terminal import BOLD, console, count, gib, guarded, write, write_json

if TYPE_CHECKING:
    from rich.table import Table


@guarded
def inspect(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Directory of a checkpoint, a GGUF file, or a name on the hub; the embedded model by default.",
            show_default=False,
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="Read every byte for the fingerprint, not only headers and samples."),
    ] = False,
    json: Json = False,
) -> None:
    """Show what a checkpoint holds: geometry, parameters, bytes per token, formats, files, fingerprint.

    \b
    qwen35rs inspect ./demo
    qwen35rs inspect ./demo --full --json

    \b
    A checkpoint that this version cannot run is described too; "refused"
    says why.
    """
    found = json_text.loads(_core.inspect_checkpoint(hub.resolve(model), full))
    if json:
        write_json(found)
        return
    write(f"{found['dir']}\n", BOLD)
    out = console()
    out.print(facts(_geometry(found["config"]) if found["config"] else {}, "Geometry"))
    out.print(facts(_sizes(found), "Sizes"))
    out.print(_formats(found))
    if found["quantized"]:
        out.print(_quantized(found))
    out.print(_files(found))
    out.print(facts({"fingerprint": found["fingerprint"]}, ""))
    if found["refused"]:
        write(f"refused: {found['refused']}\n", BOLD)


def facts(rows: dict[str, str], title: str) -> Table:
    """A table of names and values."""
    table = table_of(title, ("", "left"), ("", "left"))
    table.show_header = False
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def table_of(title: str, *columns: tuple[str, str]) -> Table:
    """An empty table; a column is a heading and a side."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None, box=box.SIMPLE, title_justify="left", pad_edge=False)
    for heading, side in columns:
        table.add_column(heading, justify="right" if side == "right" else "left", overflow="fold")
    return table


def _geometry(config: dict[str, Any]) -> dict[str, str]:
    attention, delta = config["attention"], config["delta"]
    kinds = config["layers"]
    num_full = kinds.count("attention")
    pattern = " ".join(f"{len(list(run))}x{kind}" for kind, run in groupby(kinds))
    if len(kinds) % 4 == 0 and kinds == (["delta_net"] * 3 + ["attention"]) * (len(kinds) // 4):
        pattern = f"{len(kinds) // 4} times (3 delta_net, 1 attention)"
    if "moe" in config["ffn"]:
        moe = config["ffn"]["moe"]
        ffn = (
            f"{moe['num_experts']} experts of width {moe['expert_width']}, {moe['top_k']} for each token, "
            f"shared width {moe['shared_width']}"
        )
    else:
        ffn = f"dense, width {config['ffn']['dense']['width']}"
    rope = config["rope"]
    yarn = "" if rope["yarn"] is None else ", YaRN"
    return {
        "model": f"{config['model_type']}, {config['dtype'] or 'dtype not given'}",
        "hidden": f"{config['hidden']}",
        "vocabulary": f"{config['vocab']:,} rows, {'tied' if config['tied_embeddings'] else 'untied'} head",
        "layers": f"{len(kinds)} ({num_full} attention): {pattern}",
        "attention": f"{attention['num_q_heads']} query heads, {attention['num_kv_heads']} KV heads of "
        f"{attention['head_dim']}",
        "delta_net": f"{delta['num_k_heads']} key heads of {delta['k_dim']}, {delta['num_v_heads']} value heads of "
        f"{delta['v_dim']}, convolution over {delta['conv_kernel']}",
        "feed-forward": ffn,
        "rope": f"theta {rope['theta']:g}, {rope['rotary_dim']} of {attention['head_dim']} dimensions rotate{yarn}",
        "context": f"{config['max_position']:,} tokens",
    }


def _sizes(found: dict[str, Any]) -> dict[str, str]:
    rows: dict[str, str] = {}
    if found["params"]:
        rows |= parameters(found["params"])
    if found["weight_bytes_per_token"] is not None:
        rows["read per token"] = f"{gib(found['weight_bytes_per_token'])} of weights"
    if found["cache"]:
        rows |= cache(found["cache"])
    layout = {None: "", "per_expert": ", experts one by one", "fused": ", experts stacked"}
    rows["tensors"] = f"{found['num_tensors']:,}, {gib(found['tensor_bytes'])}" + layout.get(
        found["expert_layout"], f", experts {found['expert_layout']}"
    )
    rows["vision tower"] = _tensors(found["num_vision_tensors"], "not loaded: this version runs text")
    why = found["mtp_refused"]
    rows["MTP module"] = _tensors(
        found["num_mtp_tensors"], f"refused: {why}" if why else "loaded with LLM(..., mtp=True)"
    )
    return rows


def parameters(params: dict[str, int]) -> dict[str, str]:
    """Rows on parameter counts."""
    parts = [f"text {count(params['text'])}"]
    parts += [f"{name} {count(params[name])}" for name in ("vision", "mtp") if params[name]]
    return {
        "parameters": f"{count(params['total'])} ({', '.join(parts)})",
        "active": f"{count(params['active'])} for each token",
    }


def cache(sizes: dict[str, int]) -> dict[str, str]:
    """Rows on what sequences hold."""
    state, half = (
        sizes[name] + sizes["conv_per_seq"] for name in ("recurrent_per_seq", "recurrent_per_seq_f16")
    )
    return {
        "keys and values": f"{gib(sizes['kv_per_token'])} per token ({gib(sizes['kv_per_token_fp8'])} in fp8)",
        "state": f"{gib(state)} per sequence, whatever its length ({gib(half)} in f16)",
    }


def _tensors(number: int, loaded: str) -> str:
    return f"{number:,} tensors ({loaded})" if number else "none in the files"


def _formats(found: dict[str, Any]) -> Table:
    table = table_of(
        "Formats", ("dtype", "left"), ("tensors", "right"), ("elements", "right"), ("bytes", "right")
    )
    for share in found["dtypes"]:
        table.add_row(
            share["dtype"], f"{share['num_tensors']:,}", f"{share['num_elements']:,}", gib(share["bytes"])
        )
    return table


def _quantized(found: dict[str, Any]) -> Table:
    table = table_of(
        "Quantised", ("how", "left"), ("matrices", "right"), ("elements", "right"), ("bytes", "right")
    )
    for share in found["quantized"]:
        table.add_row(
            share["format"], f"{share['num_matrices']:,}", f"{share['num_elements']:,}", gib(share["bytes"])
        )
    return table


def _files(found: dict[str, Any]) -> Table:
    table = table_of("Files", ("name", "left"), ("bytes", "right"))
    files = found["files"]
    shown = files if len(files) <= 12 else [*files[:5], None, *files[-5:]]
    for file in shown:
        if file is None:
            table.add_row(f"... {len(files) - 10} more", "")
        else:
            table.add_row(file["name"], gib(file["bytes"]))
    return table
