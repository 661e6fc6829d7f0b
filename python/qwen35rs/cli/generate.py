"""`qwen35rs generate`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._core import RequestError
from . import options
from .options import (
    Device,
    Dtype,
    IgnoreEos,
    Json,
    KvCacheDtype,
    MaxModelLen,
    Model,
    Quantization,
    StateDtype,
)
from .terminal import BOLD, guarded, load, note, write, write_json

if TYPE_CHECKING:
    from ..llm import LLM
    from ..sampling import SamplingParams


_OPEN = "<think>\n"


@guarded
def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="Texts to complete; stdin, as one prompt, by default."),
    ] = None,
    model: Model = None,
    file: Annotated[
        list[str] | None,
        typer.Option(
            "--file",
            "-f",
            help="File with a prompt on each line ('-' for stdin); blank lines are skipped. May be repeated.",
        ),
    ] = None,
    token_ids: Annotated[
        list[str] | None,
        typer.Option(help='A prompt as token ids, "1 2 3"; may be repeated. Needs no tokenizer.'),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send each prompt as a user's message.")] = False,
    no_thinking: Annotated[
        bool, typer.Option("--no-thinking", help="With --chat: answer without reasoning first.")
    ] = False,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    n: options.SampleN = 1,
    stop: options.Stop = None,
    min_tokens: options.MinTokens = 0,
    ignore_eos: IgnoreEos = False,
    presence_penalty: options.Presence = None,
    frequency_penalty: options.Frequency = None,
    repetition_penalty: options.Repetition = None,
    logprobs: options.Logprobs = None,
    device: Device = "auto",
    tensor_parallel_size: options.TensorParallelSize = 1,
    expert_parallel: options.ExpertParallel = False,
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    kv_cache_dtype: KvCacheDtype = "auto",
    state_dtype: StateDtype = "float32",
    activation_dtype: options.ActivationDtype = "auto",
    max_model_len: MaxModelLen = None,
    json: Json = False,
) -> None:
    """Complete prompts. One is printed as it comes; several run together and are printed in order.

    \b
    qwen35rs generate --chat "What is 17 + 25?"
    qwen35rs generate "Once upon a time" --model ./demo --max-tokens 32
    qwen35rs generate --file prompts.txt --model ./demo --json > out.json
    echo "Once upon a time" | qwen35rs generate -m ./demo --temperature 0
    """
    if sum(map(bool, (prompts, file, token_ids))) > 1:
        raise typer.BadParameter("give prompts as arguments, or --file, or --token-ids")
    if chat and token_ids:
        raise typer.BadParameter("--chat needs text, not --token-ids")
    if no_thinking and not chat:
        raise typer.BadParameter("--no-thinking needs --chat")
    params = options.sampling(
        stop,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        n=n,
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
        logprobs=logprobs,
    )
    texts: list[str] = []
    if token_ids:
        ids = [options.parse_ids(text) for text in token_ids]
    else:
        texts = _read_prompts(prompts, file)
    started = time.perf_counter()
    llm = load(
        model,
        device=device,
        tensor_parallel_size=tensor_parallel_size,
        expert_parallel=expert_parallel,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        state_dtype=state_dtype,
        activation_dtype=activation_dtype,
        max_model_len=max_model_len,
    )
    load_s = time.perf_counter() - started
    if not token_ids:
        shown = [_as_message(llm, text, no_thinking) for text in texts] if chat else texts
        ids = [llm.tokenizer.encode(text) for text in shown]
    if logprobs is not None and not json:
        note("note: --logprobs shows in --json only")
    # A template that opens the reasoning leaves the tag in the prompt; the text shown begins with it.
    opened = bool(chat) and all(text.endswith(_OPEN) for text in shown)
    run = _Run(llm, ids, params, show=not json, before=_OPEN if opened else "")
    if json:
        write_json(_report(llm.model, texts, ids, run, load_s))
    elif sys.stderr.isatty():
        note(run.summary())


def _read_prompts(prompts: Sequence[str] | None, files: Sequence[str] | None) -> list[str]:
    if prompts:
        return [options.check_text(f"prompt {i}", text) for i, text in enumerate(prompts, 1)]
    if files:
        return [prompt for file in files for prompt in _read_lines(file)]
    if sys.stdin is None or sys.stdin.isatty():
        raise RequestError(
            'prompt: found none; allowed: arguments, --file, --token-ids "1 2 3", or text on stdin'
        )
    text = options.read_text("stdin", sys.stdin.buffer.read()).removesuffix("\n").removesuffix("\r")
    if not text:
        raise RequestError("prompt: found nothing on stdin; allowed: a text")
    return [text]


def _read_lines(file: str) -> list[str]:
    data = options.stdin_bytes().read() if file == "-" else Path(file).read_bytes()
    # Only line feeds separate: other separators of unicode may be part of a prompt.
    lines = [line.rstrip("\r") for line in options.read_text(file, data).split("\n")]
    found = [line for line in lines if line.strip()]
    if not found:
        raise RequestError(f"{file}: found no prompt; allowed: a prompt on each line")
    return found


def _as_message(llm: LLM, text: str, no_thinking: bool) -> str:
    message = [{"role": "user", "content": text}]
    rendered = llm.tokenizer.apply_chat_template(message, enable_thinking=not no_thinking, tokenize=False)
    assert isinstance(rendered, str)
    return rendered


@dataclass
class _Sample:
    text: str = ""
    shown: str = ""  # the text, or the token ids where there is no tokenizer
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[Any] | None = None
    first_s: float = 0.0
    last_s: float = 0.0


class _Run:
    """All prompts at once, and what came of them."""

    def __init__(
        self, llm: LLM, ids: list[list[int]], params: SamplingParams, show: bool, before: str
    ) -> None:
        self.samples = [
            _Sample(logprobs=None if params.logprobs is None else []) for _ in range(len(ids) * params.n)
        ]
        self.num_samples = params.n
        printer = _Printer(self.samples, params.n, before) if show else None
        started = time.perf_counter()
        for delta in llm._engine.generate(ids, [params] * len(ids)):
            sample = self.samples[delta.index]
            sample.last_s = time.perf_counter() - started
            sample.first_s = sample.first_s or sample.last_s
            sample.text += delta.text
            sample.shown += delta.text if llm._tokenizer is not None else f"{delta.token_id} "
            sample.token_ids.append(delta.token_id)
            sample.finish_reason = delta.finish_reason
            if sample.logprobs is not None:
                sample.logprobs.append(llm._logprobs(delta))
            if printer is not None:
                printer.advance()
        self.total_s = time.perf_counter() - started
        self.num_output_tokens = sum(len(s.token_ids) for s in self.samples)

    def summary(self) -> str:
        first = min(s.first_s for s in self.samples)
        rate = self.num_output_tokens / self.total_s
        return f"{self.num_output_tokens} tokens, first after {first * 1e3:.0f} ms, {rate:.1f} tokens/s"


class _Printer:
    """Shows samples in order: the first unfinished one as it comes, the others when their turn is there."""

    def __init__(self, samples: list[_Sample], n: int, before: str) -> None:
        self.samples, self.n, self.before = samples, n, before
        self.at = 0
        self.num_written: int | None = None  # characters of the sample at `at`; None before its heading

    def advance(self) -> None:
        while self.at < len(self.samples):
            sample = self.samples[self.at]
            if not sample.token_ids:
                return
            if self.num_written is None:
                self._heading()
                write(self.before)
                self.num_written = 0
            write(sample.shown[self.num_written :])
            self.num_written = len(sample.shown)
            if sample.finish_reason is None:
                return
            write("\n")
            self.at, self.num_written = self.at + 1, None

    def _heading(self) -> None:
        if len(self.samples) > 1:
            sample = f", sample {self.at % self.n + 1}" if self.n > 1 else ""
            write(f"=== prompt {self.at // self.n + 1}{sample} ===", BOLD)
            write("\n")


def _report(model: str, texts: list[str], ids: list[list[int]], run: _Run, load_s: float) -> dict[str, Any]:
    outputs = []
    for i, prompt_ids in enumerate(ids):
        samples = []
        for k, sample in enumerate(run.samples[i * run.num_samples : (i + 1) * run.num_samples]):
            decode_s = sample.last_s - sample.first_s
            item: dict[str, Any] = {
                "index": k,
                "text": sample.text,
                "token_ids": sample.token_ids,
                "finish_reason": sample.finish_reason,
                "time_to_first_token_s": sample.first_s,
                # After the first token; null for a single one.
                "decode_tokens_per_s": (len(sample.token_ids) - 1) / decode_s if decode_s > 0 else None,
            }
            if sample.logprobs is not None:
                item["logprobs"] = [
                    [{"token_id": token} | asdict(logprob) for token, logprob in entry.items()]
                    for entry in sample.logprobs
                ]
            samples.append(item)
        prompt = texts[i] if texts else None
        outputs.append({"prompt": prompt, "prompt_token_ids": prompt_ids, "samples": samples})
    timing = {
        "load_s": load_s,
        "time_to_first_token_s": min(s.first_s for s in run.samples),
        "total_s": run.total_s,
        "num_prompt_tokens": sum(map(len, ids)),
        "num_output_tokens": run.num_output_tokens,
        "output_tokens_per_s": run.num_output_tokens / run.total_s,
    }
    return {"model": model, "outputs": outputs, "timing": timing}
