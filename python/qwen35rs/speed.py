"""How fast a model runs: decode steps of a batch, prompts, loading; beside the bytes and operations that they need."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import _core
from .llm import LLM
from .sampling import SamplingParams

WARM_UP = 4
"""Steps of a batch before any is timed: kernels are loaded, and the step is recorded."""


@dataclass(frozen=True)
class Step:
    """One decode step of `batch` sequences of about `context` tokens each."""

    batch: int
    context: int
    seconds: float
    """Median."""
    spread: tuple[float, float]
    """10th and 90th percentile."""
    num_steps: int
    experts_hit: int | None
    """Different experts of the last layer in the steps that were timed, median; None where the device does not say."""
    nodes: int | None
    """Kernels and copies of the step, where it is launched as one."""
    num_bytes: float
    """That a rank moves at least in the step: weights (of experts, those hit), keys and values, recurrent states twice."""

    num_layers: int

    def facts(self, floors: dict[str, float] | None) -> dict[str, Any]:
        """The same and what follows from it, given what the device reaches."""
        share = self.num_bytes / floors["read_bytes_per_s"] / self.seconds if floors else None
        return {
            "batch": self.batch,
            "context": self.context,
            "seconds": self.seconds,
            "spread": list(self.spread),
            "num_steps": self.num_steps,
            "tokens_per_second": self.batch / self.seconds,
            "experts_hit": self.experts_hit,
            "bytes": self.num_bytes,
            "share_of_floor": share,
            "nodes": self.nodes,
            "nodes_per_layer": None if self.nodes is None else self.nodes / self.num_layers,
        }


@dataclass(frozen=True)
class Prefill:
    """One prompt, from its submission to its first token."""

    num_tokens: int
    seconds: float
    """Median."""
    runs: list[float] = field(default_factory=list)
    flops: float = 0.0
    """Of a rank: two for each active parameter and token, attention not counted."""

    def facts(self, floors: dict[str, float] | None) -> dict[str, Any]:
        """As of a step."""
        rate = floors.get("flops_per_s") if floors else None
        return {
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
            "runs": self.runs,
            "tokens_per_second": self.num_tokens / self.seconds,
            "flops": self.flops,
            "share_of_floor": self.flops / rate / self.seconds if rate else None,
        }


def measured(llm: LLM) -> dict[str, float] | None:
    """What the device reaches at best, measured now: bytes a second of reading, operations a second of a large bf16
    product (absent without cuBLASLt). None for the CPU."""
    found: dict[str, float | None] | None = json.loads(llm._engine.measure())
    return {k: v for k, v in found.items() if v is not None} if found else None


def _prompts(llm: LLM, num: int, length: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    known = llm._engine.vocab if llm._tokenizer is None else len(llm._tokenizer)
    ids: list[list[int]] = rng.integers(0, known, (num, length)).tolist()
    return ids


def room_for(batch: int, context: int, num_steps: int, max_num_batched_tokens: int) -> int:
    """Tokens that a sequence may come to have in `decode`: prompts are taken in turn, by chunks of 64, so the first
    sequences are some steps ahead of the last."""
    prompt_tokens = batch * -(-context // 64) * 64
    return context + WARM_UP + num_steps + 4 + -(-prompt_tokens // max(max_num_batched_tokens // 64 * 64, 64))


def decode(llm: LLM, batch: int, context: int, num_steps: int = 64, *, seed: int = 0) -> Step:
    """Times decode steps: `batch` prompts of `context` random tokens, and greedy tokens after them.

    Raises RequestError where the engine has no room for that batch at once.
    """
    room, wanted = (
        room_for(batch, context, num_steps, llm._engine.max_num_batched_tokens),
        WARM_UP + num_steps + 1,
    )
    if batch > llm._engine.max_num_seqs or room > llm.max_model_len:
        raise _core.RequestError(
            f"batch of {batch} sequences of {context} tokens: found an LLM for {llm._engine.max_num_seqs} sequences of "
            f"{llm.max_model_len}; allowed: smaller, or larger limits ({room} tokens a sequence)"
        )
    prompts = _prompts(llm, batch, context, seed)
    params = SamplingParams(temperature=0.0, max_tokens=room - context, ignore_eos=True)
    last = batch - 1  # the last to be admitted: while it decodes, all do
    times: list[float] = []
    for delta in llm._engine.generate(prompts, [params] * batch):
        if delta.index == last:
            times.append(delta.seconds)  # the engine's own: deltas wait in a queue while Python is held up
        if len(times) == wanted or delta.finish_reason is not None:
            break
    if len(times) < wanted:
        raise _core.Qwen35Error(
            f"{len(times)} of {wanted} steps of the whole batch were seen before its first end"
        )
    # Asked for in steps of their own: asking waits for the device.
    count, reports = 0, []
    for delta in llm._engine.generate(prompts, [params] * batch):
        if delta.index == last:
            count += 1
            if count > WARM_UP:
                reports.append(json.loads(llm._engine.report()))
        if len(reports) == 8 or delta.finish_reason is not None:
            break
    hits = [report["experts_hit"] for report in reports if report["experts_hit"] is not None]
    steps = np.diff(times[WARM_UP:])
    hit = round(statistics.median(hits)) if hits else None
    middle = context + len(times) // 2
    num_bytes, _ = llm._engine.step_facts(batch, middle, hit or 0)
    low, high = np.percentile(steps, (10, 90))
    return Step(
        batch,
        context,
        float(np.median(steps)),
        (float(low), float(high)),
        len(steps),
        hit,
        reports[-1]["nodes_per_step"] if reports else None,
        num_bytes,
        llm._engine.num_layers,
    )


def prefill(llm: LLM, num_tokens: int, repeats: int = 3, *, seed: int = 0) -> Prefill:
    """Times a prompt of random tokens, to its first token."""
    runs = []
    for i in range(repeats + 1):
        (prompt,) = _prompts(llm, 1, num_tokens, seed + i)
        start = time.perf_counter()
        for _ in llm._engine.generate([prompt], [SamplingParams(temperature=0.0, max_tokens=1)]):
            pass
        runs.append(time.perf_counter() - start)
    _, active = llm._engine.step_facts(1, 1, 0)
    return Prefill(num_tokens, statistics.median(runs[1:]), runs[1:], 2.0 * active * num_tokens)
