"""`qwen35rs tokenize`."""

from __future__ import annotations

import json as json_text
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .._core import RequestError
from . import options
from .options import Json
from .terminal import guarded, write, write_json


@guarded
def tokenize(
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="Text; stdin to the last byte by default.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Directory of a checkpoint, a name on the hub, or a tokenizer.json; the embedded model by default.",
            show_default=False,
        ),
    ] = None,
    token_ids: Annotated[str | None, typer.Option(help='Decode these instead: "1 2 3".')] = None,
    split_special: Annotated[
        bool, typer.Option("--split-special-tokens", help="Read <|im_start|> and its kind as ordinary text.")
    ] = False,
    json: Json = False,
) -> None:
    """Show the tokens of a text: an id and its piece on each line.

    \b
    qwen35rs tokenize "Hello, world" --model ./demo
    qwen35rs tokenize --token-ids "72 101" --json

    \b
    A piece is quoted as in JSON; one that is no UTF-8 by itself is shown
    as its bytes, <E4 BD>.
    """
    if text is not None and token_ids is not None:
        raise typer.BadParameter("give a text or --token-ids")
    if text is None and token_ids is None and (sys.stdin is None or sys.stdin.isatty()):
        raise RequestError("text: found none; allowed: an argument, or text on stdin")
    from ..tokenizer import Tokenizer

    if model is not None and Path(model).is_file():
        tokenizer = Tokenizer(model)
    else:
        tokenizer = Tokenizer.from_pretrained(model)
    if token_ids is not None:
        ids = options.parse_ids(token_ids)
        text = tokenizer.decode(ids, skip_special_tokens=False)
    else:
        text = (
            options.read_text("stdin", sys.stdin.buffer.read())
            if text is None
            else options.check_text("text", text)
        )
        ids = tokenizer.encode(text, split_special_tokens=split_special)
    pieces = [tokenizer.token_bytes(id) for id in ids]
    if json:
        tokens: list[dict[str, Any]] = [
            {"id": id, "text": _text(piece), "bytes": piece.hex()}
            for id, piece in zip(ids, pieces, strict=True)
        ]
        write_json({"text": text, "num_tokens": len(ids), "token_ids": ids, "tokens": tokens})
        return
    for id, piece in zip(ids, pieces, strict=True):
        part = _text(piece)
        shown = f"<{piece.hex(' ').upper()}>" if part is None else json_text.dumps(part, ensure_ascii=False)
        write(f"{id:>6}  {shown}\n")


def _text(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None
