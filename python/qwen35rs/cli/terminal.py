"""What every command says and how: results on stdout, notes on stderr, errors in one line, exit codes.

Text of the user or of the model is never read as markup.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ..llm import LLM

OK, FAILED, INTERRUPTED, PIPE_CLOSED = 0, 1, 130, 128 + signal.SIGPIPE
DIM, BOLD, RESET = "\x1b[2m", "\x1b[1m", "\x1b[0m"

# On a terminal, control characters are shown as pictures: a model must not move the cursor.
_PICTURES = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)

_Command = TypeVar("_Command", bound=Callable[..., None])


def guarded(command: _Command) -> _Command:
    """A command whose errors become one line on stderr and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            _check_names(kwargs)
            command(*args, **kwargs)
            sys.stdout.flush()
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            drop_output()  # the reader left
            raise typer.Exit(PIPE_CLOSED) from None
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("typer", "click"):
                raise  # exits and usage errors
            error_line(error)
            raise typer.Exit(FAILED) from None

    return run  # type: ignore[return-value]


def drop_output() -> None:
    """Where stdout cannot be written to: what Python flushes at its end must go somewhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


#: Paths, which may be any bytes, and texts, which are checked where they are read.
_ANY_BYTES = {"model", "file", "directory", "out", "prompts", "text", "system", "stop"}


def _check_names(options: dict[str, Any]) -> None:
    """Refuses text that is not UTF-8, by the name of its option."""
    from .options import check_text

    for name, value in options.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and name not in _ANY_BYTES:
                check_text(name, text)


def error_line(error: Exception) -> None:
    """Prints an error as one line on stderr."""
    from .._core import Qwen35Error

    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, (Qwen35Error, OSError)):
        text = str(error)
    elif isinstance(error, OverflowError):
        text = f"an option: found a number that is too large ({error})"
    elif isinstance(error, MemoryError):
        text = "out of memory"
    else:
        text = f"internal error, please report it: {type(error).__name__}: {error}"
        if os.environ.get("QWEN35RS_TRACEBACK"):
            raise error
        text += " (QWEN35RS_TRACEBACK=1 shows where)"
    note(f"error: {text}")


def note(text: str) -> None:
    """Prints a line on stderr, where that can be written to."""
    line = " ".join(text.splitlines()).translate(_PICTURES)
    line = line.encode("utf-8", "replace").decode("utf-8")
    sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):  # a full disk, a reader that left, a closed file
        encoding = sys.stderr.encoding or "utf-8"
        sys.stderr.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        sys.stderr.flush()


def write(text: str, style: str = "") -> None:
    """Writes text on stdout as it is, at once; on a terminal without control characters and in a style."""
    if not text:
        return
    if sys.stdout.isatty():
        text = text.translate(_PICTURES)
        if style and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb":
            text = f"{style}{text}{RESET}"
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def write_json(value: Any, indent: int | None = 2) -> None:
    """Writes one JSON value on stdout."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    text = json.dumps(_finite(value), ensure_ascii=not unicode, allow_nan=False, indent=indent)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    """JSON has no infinities; they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def console() -> Console:
    """For tables on stdout. Strings are printed to the letter; a pipe gets 120 columns."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise  # noqa: PLE0704  it is called where the error is handled; `guarded` knows what to do

    width = None if sys.stdout.isatty() else 120
    return Plain(markup=False, emoji=False, highlight=False, width=width)


def gib(num_bytes: float) -> str:
    """Bytes for reading: `61.3 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} TiB"


def count(number: float) -> str:
    """A number for reading: `122.1 B`, `94,632`."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,.0f}"


def load(model: str | None, **options: Any) -> LLM:
    """The model of a command, the embedded one if none is named; says so if its weights are random. `options` are
    those of `LLM`."""
    from ..demo import NOTICE, is_demo
    from ..llm import LLM

    llm = LLM(model, **options)
    if is_demo(llm.path):
        note(f"note: {model} has {NOTICE}")
    return llm
