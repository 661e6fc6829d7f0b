"""`qwen35rs bench`."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from .._core import RequestError
from . import options
from .options import Device, Dtype, Json, KvCacheDtype, LoadFormat, Model, Quantization, StateDtype
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
    tensor_parallel_size: options.TensorParallelSize = 1,
    expert_parallel: options.ExpertParallel = False,
    quantization: Quantization = None,
    kv_cache_dtype: KvCacheDtype = "auto",
    state_dtype: StateDtype = "float32",
    activation_dtype: options.ActivationDtype = "auto",
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

    llm = load(
        model,
        device=device,
        tensor_parallel_size=tensor_parallel_size,
        expert_parallel=expert_parallel,
        quantization=quantization,
        mtp=None,
        kv_cache_dtype=kv_cache_dtype,
        state_dtype=state_dtype,
        activation_dtype=activation_dtype,
    )
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
                "quantization": quantization,
                "seed": seed,
                "num_items": n,
                "seconds": round(time.perf_counter() - start, 3),
                "tasks": {r.task: _row(r) for r in results},
            }
        )


@bench.command()
@guarded
def engine(
    model: Model = None,
    load_format: LoadFormat = "auto",
    batch: Annotated[
        list[int] | None, typer.Option(help="Sequences of a decode step; may be repeated. \\[default: 1]")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of each sequence before it decodes.")] = 1024,
    steps: Annotated[int, typer.Option(help="Decode steps to time.")] = 64,
    prefill: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of a prompt to time; may be repeated. \\[default: as --context]"),
    ] = None,
    device: Device = "auto",
    tensor_parallel_size: options.TensorParallelSize = 1,
    expert_parallel: options.ExpertParallel = False,
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    kv_cache_dtype: KvCacheDtype = "auto",
    state_dtype: StateDtype = "float32",
    activation_dtype: options.ActivationDtype = "auto",
    max_num_batched_tokens: Annotated[int, typer.Option(help="Prompt tokens of one step.")] = 8192,
    enforce_eager: Annotated[
        bool, typer.Option("--enforce-eager", help="Launch kernels one by one, without CUDA graphs.")
    ] = False,
    json: Json = False,
) -> None:
    """Time decode steps and prompts, beside what the hardware allows.

    \b
    qwen35rs bench engine
    qwen35rs bench engine -m 35b-a3b --load-format dummy --batch 1 --batch 16

    \b
    Random token ids, greedy. The floor of a decode step is the bytes that
    it must move (weights once, of experts those that were really hit;
    keys, values and states) over the read bandwidth, which is measured
    here; that of a prompt two operations for each active parameter and
    token over the rate of a large bf16 product, measured too. Of several
    ranks it is what one has to do; sums over ranks are not in it. On the
    CPU nothing is measured, and no floor is shown.
    """
    from ..speed import decode, measured, room_for
    from ..speed import prefill as time_prompt

    batches, prompts = batch or [1], prefill or [context]
    limits = {"batch": batches, "context": [context], "steps": [steps], "prefill": prompts}
    limits["max_num_batched_tokens"] = [max_num_batched_tokens]
    for name, value in ((name, value) for name, values in limits.items() for value in values):
        least = 64 if name == "max_num_batched_tokens" else 1
        if not least <= value < 2**31:
            raise RequestError(f"{name}: found {value}; allowed: {least} to 2^31 - 1")
    rooms = [room_for(size, context, steps, max_num_batched_tokens) for size in batches]
    start = time.perf_counter()
    try:
        llm = load(
            model,
            load_format=load_format,
            device=device,
            tensor_parallel_size=tensor_parallel_size,
            expert_parallel=expert_parallel,
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            state_dtype=state_dtype,
            activation_dtype=activation_dtype,
            max_num_seqs=max(batches),
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max(*rooms, *(size + 1 for size in prompts)),
            enforce_eager=enforce_eager,
        )
    except RequestError as error:
        before, is_length, lengths = str(error).partition("max_model_len: ")
        if before or not is_length:
            raise
        raise RequestError(
            f"context, batch and steps, or prefill, need sequences that are too long: {lengths}"
        ) from None
    loaded = time.perf_counter() - start
    floors = measured(llm)
    found: dict[str, Any] = {"model": llm.model, "device": llm.device, "quantization": quantization}
    found |= {
        "kv_cache_dtype": kv_cache_dtype,
        "state_dtype": state_dtype,
        "activation_dtype": activation_dtype,
    }
    found |= {
        "tensor_parallel_size": tensor_parallel_size,
        "expert_parallel": expert_parallel,
        "load_seconds": round(loaded, 3),
        "measured": floors,
        "memory": llm.memory,
        "decode": [],
        "prefill": [],
    }
    if not json:
        write(f"loaded in {loaded:.2f} s on {llm.device}{_floors(floors)}\n")
    for size in batches:
        row = decode(llm, size, context, steps).facts(floors)
        found["decode"].append(row)
        if not json:
            write(_decode_line(row))
    for size in prompts:
        row = time_prompt(llm, size).facts(floors)
        found["prefill"].append(row)
        if not json:
            write(
                f"prompt of {size:,}: {1e3 * row['seconds']:.1f} ms to the first token, "
                f"{row['tokens_per_second']:,.0f} tokens/s{_share(row)}\n"
            )
    if json:
        write_json(found)


def _floors(floors: dict[str, float] | None) -> str:
    if not floors:
        return ""
    rate = floors.get("flops_per_s")
    return f"; reads {floors['read_bytes_per_s'] / 1e12:.2f} TB/s" + (
        f", multiplies {rate / 1e12:.0f} TFLOP/s" if rate else ""
    )


def _share(row: dict[str, Any]) -> str:
    return "" if row["share_of_floor"] is None else f", {row['share_of_floor']:.1%} of the floor"


def _decode_line(row: dict[str, Any]) -> str:
    hit = "" if row["experts_hit"] is None else f", {row['experts_hit']} experts hit"
    nodes = (
        ""
        if row["nodes"] is None
        else f", {row['nodes']} kernels a step ({row['nodes_per_layer']:.1f} a layer)"
    )
    return (
        f"decode, batch {row['batch']}, context {row['context']}: {1e3 * row['seconds']:.3f} ms a step, "
        f"{row['tokens_per_second']:,.1f} tokens/s{hit}, {row['bytes'] / 1e9:.2f} GB{_share(row)}{nodes}\n"
    )


def _row(result: Any) -> dict[str, Any]:
    return {
        "accuracy": result.accuracy,
        "interval": list(result.interval),
        "num_correct": result.num_correct,
        "perplexity": result.perplexity,
        "mtp_agreement": result.mtp_agreement,
    }
