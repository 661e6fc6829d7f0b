"""The command line. One file per command; `terminal` has what they share."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from .bench import bench
from .chat import chat
from .demo import demo
from .generate import generate
from .inspect import inspect
from .plan import plan
from .quantize import quantize
from .terminal import INTERRUPTED, PIPE_CLOSED, drop_output
from .tokenize import tokenize

app = typer.Typer(
    name="qwen35rs",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(show: bool) -> None:
    if show:
        from .._core import __version__

        typer.echo(f"qwen35rs {__version__}")
        raise typer.Exit()


@app.callback()
def qwen35rs(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run Qwen3.5 models.

    \b
    qwen35rs chat                     talk
    qwen35rs generate "Hello" -m DIR  complete a prompt
    qwen35rs plan 122b-a10b           will it fit, how fast could it be
    qwen35rs bench tasks              questions whose answers are checked

    \b
    A model is the directory of a checkpoint, or a name on the Hugging
    Face hub; where none is named, the small one of the package runs.
    Results go to stdout, notes and errors to stderr; every command has
    --json. Exit codes: 0 done, 1 error, 2 usage, 130 Ctrl-C.
    """


for command in (generate, chat, tokenize, inspect, plan, quantize, demo):
    app.command()(command)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the script `qwen35rs`."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: `qwen35rs ... >&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        app(prog_name="qwen35rs")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except SystemExit as exit:
        # The help is printed by libraries, which leave like that where its reader has left.
        if isinstance(exit.__context__, BrokenPipeError):
            drop_output()
            sys.exit(PIPE_CLOSED)
        raise
    except OSError as error:  # what is printed cannot be written: a full disk
        drop_output()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
