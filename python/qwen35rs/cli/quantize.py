"""`qwen35rs quantize`."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import Annotated

import typer

from .. import _core, hub
from .options import Json
from .terminal import gib, guarded, write, write_json

GROUPS = (32, 64, 128)


@guarded
def quantize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="Directory of a checkpoint, or a name on the Hugging Face hub.",
            show_default=False,
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="New or empty directory.", show_default=False)],
    scheme: Annotated[
        str,
        typer.Option(
            help="int4; fp8; or mixed: routed experts int4, every other projection fp8.", show_default=False
        ),
    ],
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale of int4: 32, 64, 128. \\[default: 128]", show_default=False
        ),
    ] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Text that int4 is fitted to (GPTQ): UTF-8, or .jsonl with a text in each line. May be repeated.",
            show_default=False,
        ),
    ] = None,
    calibration_length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence of it: 2048 by default.", show_default=False)
    ] = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens that are read of it: 32768 by default, more for many or wide experts.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write a quantised copy of a checkpoint.

    \b
    qwen35rs quantize ./demo ./demo-fp8 --scheme fp8
    qwen35rs quantize ./demo ./demo-mixed --scheme mixed --group-size 32
    qwen35rs quantize ./demo ./out --scheme int4 --group-size 64 --calibrate a.txt

    \b
    int4 and mixed are written as compressed-tensors has them, fp8 as the
    official FP8 releases are: other programs read them too. Norms,
    routers, gates, convolutions, the small projections of the delta
    layers, embedding, head and vision stay as they are.
    4-bit integers that IN has already (GPTQ, AWQ, compressed-tensors) keep
    their codes under int4 and mixed.
    quantization_report.json in OUT has the error of each matrix.

    \b
    Weights are rounded to the nearest; with --calibrate, int4 by GPTQ: the
    model reads the text on the CPU, layer by layer, and each weight makes
    up for the errors of those before it. Use text like what the model will
    meet, chat template included.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    if group_size is not None and scheme == "fp8":
        raise _core.RequestError(
            f"--group-size: found {group_size} with --scheme fp8; allowed: it with int4 and mixed (a scale of fp8 is "
            "that of 128 x 128 weights)"
        )
    if group_size is not None and group_size not in GROUPS:
        allowed = ", ".join(map(str, GROUPS))
        raise _core.RequestError(f"--group-size: found {group_size}; allowed: {allowed}")
    for option, value in (
        ("--calibration-length", calibration_length),
        ("--calibration-tokens", calibration_tokens),
    ):
        if value is not None and not 1 <= value < 1 << 63:
            raise _core.RequestError(f"{option}: found {value}; allowed: 1 to 2^63 - 1")
    for file in calibrate or []:
        if file.is_dir():
            raise _core.RequestError(f"--calibrate: found {str(file)!r}, a directory; allowed: files of text")
    path = hub.resolve(model)
    # On stderr, and only on a terminal.
    console = Console(stderr=True)
    columns = (TextColumn("quantizing"), BarColumn(), DownloadColumn(binary_units=True), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("quantizing", total=None)
        text = _core.quantize_checkpoint(
            path,
            out,
            scheme=scheme,
            group_size=group_size or GROUPS[-1],
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            calibrate=calibrate or [],
            calibration_length=calibration_length,
            calibration_tokens=calibration_tokens,
        )
    found = json_text.loads(text)
    if json:
        write_json({"model": model, "directory": out, "scheme": scheme, **found})
        return
    kept = f", {found['num_kept']:,} kept as they were" if found["num_kept"] else ""
    write(
        f"{out}: {found['num_quantised']:,} matrices quantised{kept}; {gib(found['bytes_before'])} became "
        f"{gib(found['bytes_after'])}\n"
    )
    if found["worst"]:
        write(
            f"relative RMS error {found['relative_rms_error']:.2%}, at worst "
            f"{found['worst_relative_rms_error']:.2%} ({found['worst']})\n"
        )
    if read := found.get("calibration"):
        fallen = read["num_fallen_back"]
        back = f"; {fallen:,} rounded to the nearest, as the report says" if fallen else ""
        asked = calibration_tokens or 0
        short = f" of {asked:,} that were asked for" if read["num_tokens"] < asked else ""
        write(
            f"calibrated on {read['num_tokens']:,} tokens{short}: {read['num_calibrated']:,} matrices{back}; mean squared "
            f"error of their outputs {read['weighted_error']:.3%}, rounded {read['rounded_weighted_error']:.3%}\n"
        )
