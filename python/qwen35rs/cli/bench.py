"""`qwen35rs bench`."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from .options import Device, Json, Model
from .terminal import guarded, load, write, write_json

bench = typer.Typer(
    help="Measure a model.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@bench.callback()
def _group() -> None:
    """Measure a model."""


@bench.command()
@guarded
def tasks(
    model: Model = None,
    n: Annotated[int, typer.Option("--n", help="Questions of each task.")] = 100,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="Only this task; may be repeated.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Which questions; the same seed, the same questions.")] = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Ask held-out questions whose answers can be checked.

    \b
    qwen35rs bench tasks
    qwen35rs bench tasks --model ./model --n 20 --task arithmetic --json

    \b
    Arithmetic, recall from long texts, operations on words, tool calls,
    JSON, small talk; greedy, in the chat format, with and without
    thinking. Prints the share that was right with its 95 % confidence
    interval, and the perplexity of the expected answers; and where the
    checkpoint has a multi-token-prediction module, how often the model
    said what the module had drafted.
    """
    from ..bench import TaskResult, measure

    llm = load(model, device=device, mtp=None)
    start = time.perf_counter()

    def show(result: TaskResult) -> None:
        low, high = result.interval
        drafts = "" if result.mtp_agreement is None else f"   drafts agree {result.mtp_agreement:.1%}"
        write(
            f"{result.task:<26}{result.accuracy:>7.1%}   {low:.1%} to {high:.1%}"
            f"   perplexity {result.perplexity:.4g}{drafts}\n"
        )

    results = measure(llm, task, num_items=n, seed=seed, done=None if json else show)
    if json:
        write_json(
            {
                "model": llm.model,
                "seed": seed,
                "num_items": n,
                "seconds": round(time.perf_counter() - start, 3),
                "tasks": {r.task: _row(r) for r in results},
            }
        )


def _row(result: Any) -> dict[str, Any]:
    return {
        "accuracy": result.accuracy,
        "interval": list(result.interval),
        "num_correct": result.num_correct,
        "perplexity": result.perplexity,
        "mtp_agreement": result.mtp_agreement,
    }
