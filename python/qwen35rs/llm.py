"""`LLM`: a loaded model that generates."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from . import _core, arguments, hub
from ._core import ConfigError, DeviceTensor, RequestError
from .arguments import short
from .outputs import CompletionOutput, Delta, Logprob, RequestOutput
from .sampling import SamplingParams
from .tokenizer import Tokenizer

Prompt = str | Mapping[str, Any] | Sequence[int]
"""Text, a list of token ids, or ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``."""
TokenIds = Sequence[int] | npt.NDArray[np.integer]
Message = Mapping[str, Any]

NOTICE = (
    "note: no model is named, so this is the embedded one: a tiny demonstration model of 8 million parameters that "
    "knows arithmetic, recall, words, tools and JSON, and nothing of the world"
)


class LLM:
    """A Qwen3.5 model, loaded, with a thread of its own that runs it.

    Any number of threads may call any method at the same time: their requests share the batches, and none
    changes what another gets.

    Args:
        model: directory of a checkpoint as Hugging Face stores it, a GGUF file (of a model in parts, the first), or
            a name on the hub. None, the default, is the small demonstration model that comes with the package; a line
            on stderr says so.
        tokenizer: another directory or hub name for the tokenizer; the model's own by default. A model
            without one runs on token ids.
        load_format: ``"auto"`` reads the checkpoint. ``"dummy"`` takes random weights of the model's sizes instead, made
            where they are held, for measurements: ``model`` may then also be a ``config.json``, or a size of the
            family such as ``"35b-a3b"``, and has no tokenizer unless there is one beside it.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"``: what the environment's QWEN35RS_DEVICE says, else
            the first GPU where it can be used, else the CPU.
        dtype: how matrices are held: ``"auto"`` as the checkpoint has them, and quantised ones as float32, which is
            exact; ``"float32"``, ``"bfloat16"`` or ``"float16"``. On the CPU bfloat16 is packed at load, without loss,
            into three quarters of its bytes; matrices of the other types, and the embedding, stay in the mapped file
            where it has them in that type; arithmetic is float32 always. On a GPU matrices and activations are
            bfloat16, whatever the checkpoint has.
        quantization: what matrices are quantised to while they are loaded: ``"int4"`` (4-bit integers, a scale for 128
            inputs of a row; the head in fp8), ``"fp8"`` (e4m3, a scale for 128 x 128), or ``"mixed"`` (experts as int4,
            every other projection and the head as fp8). None, the default, leaves all as published. Norms, routers,
            gates, convolutions, the decay and beta projections and the embedding (also where it is the head) are
            never quantised, and what the checkpoint has in as few bits or fewer stays as it is. On the CPU the numbers
            are those of the quantised model, held as ``dtype`` says.
        deterministic: on a GPU, make the bits of a request independent of what else is in its batches, at the cost of
            speed. On the CPU they always are.
        enforce_eager: on a GPU, launch the kernels of a decode step one by one, and not as a recorded CUDA graph. The
            same bits, more slowly: for debugging.
        tensor_parallel_size: ranks that share the model: heads, widths of feed-forward blocks and the vocabulary are
            divided among them. Rank r takes the r-th GPU from the one that ``device`` names, or with
            ``device="cuda:0,2"`` the one in its place; on the CPU ranks are threads. In processes that were started
            together (torchrun, Slurm), as many as this, each is a rank: rank 0's LLM is used, and that of any other
            does as rank 0 orders, does not return, and ends the process (SystemExit) when rank 0's is gone. GPUs add up
            in memory that each of them addresses where all are on one host and can (NVLink, PCIe), else by NCCL
            (``pip install 'qwen35rs[cuda]'``); the environment's QWEN35RS_COLLECTIVES says ``direct`` or ``nccl`` where
            it must be one of them, for measurements and in trouble. NCCL reads its own environment, in which
            NCCL_NVLS_ENABLE is set to 0 where it is not set. It rounds sums to bfloat16 from rank to rank, and is
            refused with ``deterministic`` between more than two.
        expert_parallel: give each rank some of the experts whole, and not a slice of each.
        mtp: load the multi-token-prediction module too, for `mtp_logits`: True, or None for where the checkpoint
            has one that can be run. It takes memory, and no part in generating.
        kv_cache_dtype: how keys and values are held: ``"auto"`` as they are computed (float32 on the CPU, bfloat16 on a
            GPU); ``"fp8"`` in 8 bits, each row of a head with a scale of its own, which is computed from it.
        state_dtype: how the recurrent states are held between tokens: ``"float32"``, or ``"float16"`` in half the bytes.
            They are computed in float32 either way.
        activation_dtype: what products of a step of 256 tokens or more take beside weights in FP8, and in 4-bit integers
            without zero points in groups of 128 or of a row: ``"auto"`` bfloat16, exactly; ``"fp8"`` e4m3 with a scale
            for each token (of each rank's part of it), as other engines do by default where weights are FP8. Prompts are
            read faster, and every activation is rounded to four significant bits. On GPUs of compute capability 9.0
            (Hopper); products with other weights, and of inputs that are no multiple of 128, stay as they are. It takes
            5 to 17 KB more a token of ``max_num_batched_tokens``. With ``deterministic`` it holds for any number of
            tokens. A model with none of these weights is refused.
        max_model_len: longest prompt plus output, in tokens; the model's context, or what
            ``kv_cache_bytes`` holds of it, by default.
        seed: decides the samples of requests without a seed.
        max_num_seqs: requests that run at once.
        max_num_batched_tokens: prompt tokens of one step, at least 64.
        kv_cache_bytes: most memory for keys and values. By default 4 GiB on the CPU, used as it is needed, and on a
            GPU what ``gpu_memory_utilization`` leaves.
        gpu_memory_utilization: share of a GPU's memory that is free once the weights are loaded, for keys and values,
            states and buffers.
        revision, token: for the hub.
        progress: show a bar while a large checkpoint loads; where the terminal can, by default.

    Raises ConfigError for a checkpoint that cannot be run, or that has no whole module where ``mtp=True`` wants one,
    FileNotFoundError and kin for one that cannot be read, RequestError for an argument, CudaError for a GPU that is
    not there, OutOfMemoryError for limits that do not fit, RankError for ranks that lost each other or differ.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        load_format: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        quantization: str | None = None,
        deterministic: bool = False,
        enforce_eager: bool = False,
        tensor_parallel_size: int = 1,
        expert_parallel: bool = False,
        mtp: bool | None = False,
        kv_cache_dtype: str = "auto",
        state_dtype: str = "float32",
        activation_dtype: str = "auto",
        max_model_len: int | None = None,
        seed: int = 0,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        kv_cache_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        revision: str | None = None,
        token: str | bool | None = None,
        progress: bool | None = None,
    ) -> None:
        names = {
            "device": (device, "auto, cpu, cuda, cuda:N, cuda:N,M"),
            "load_format": (load_format, "auto, dummy"),
            "dtype": (dtype, "auto, float32, bfloat16, float16"),
            "quantization": ("" if quantization is None else quantization, "None, int4, fp8, mixed"),
            "kv_cache_dtype": (kv_cache_dtype, "auto, fp8"),
            "state_dtype": (state_dtype, "float32, float16"),
            "activation_dtype": (activation_dtype, "auto, fp8"),
        }
        for name, (found, allowed) in names.items():
            arguments.named(name, found, allowed)
        flags = {"deterministic": deterministic, "enforce_eager": enforce_eager}
        for name, flag in {**flags, "expert_parallel": expert_parallel}.items():
            arguments.flag(name, flag)
        for name, choice in {"mtp": mtp, "progress": progress}.items():
            arguments.flag(name, choice, or_none=True)
        for name, place in {"model": model, "tokenizer": tokenizer}.items():
            if place is not None and not isinstance(place, (str, os.PathLike)):
                raise arguments.refuse(name, place, "a path, a name on the Hugging Face hub, or None")
        arguments.number("gpu_memory_utilization", gpu_memory_utilization, "a number above 0, at most 1")
        tensor_parallel_size = arguments.whole(
            "tensor_parallel_size", tensor_parallel_size, "1 to 1024, an integer", 1, 1024
        )
        max_num_seqs = arguments.whole("max_num_seqs", max_num_seqs, "1 to 2^63 - 1, an integer")
        max_num_batched_tokens = arguments.whole(
            "max_num_batched_tokens", max_num_batched_tokens, "64 to 2^63 - 1, an integer"
        )
        seed = arguments.whole("seed", seed, "0 to 2^63 - 1, an integer")
        if max_model_len is not None:
            max_model_len = arguments.whole(
                "max_model_len", max_model_len, "an integer from 2 to the model's context, or None"
            )
        if kv_cache_bytes is not None:
            allowed = "an integer from the bytes of a page to 2^63 - 1, or None"
            kv_cache_bytes = arguments.whole("kv_cache_bytes", kv_cache_bytes, allowed)
        _core.check_devices(device, tensor_parallel_size, expert_parallel)
        if load_format == "dummy" and model is not None and not Path(model).is_dir():
            path = Path(model)
        else:
            path = hub.resolve(model, revision=revision, token=token)
        if ggufs := hub.passed_over(path):
            logging.getLogger("qwen35rs").warning(
                "%s: reads its *.safetensors; for %s give the path of the file", path, ", ".join(ggufs)
            )
        self._tokenizer: Tokenizer | None = None
        if tokenizer is not None:
            self._tokenizer = Tokenizer.from_pretrained(tokenizer, revision=revision, token=token)
        elif (place := _core.find_tokenizer(path)) is not None:
            self._tokenizer = Tokenizer.from_pretrained(place)
        with _LoadBar(path, progress) as bar:
            self._engine = _core.Engine(
                path,
                None if self._tokenizer is None else self._tokenizer._core,
                load_format=load_format,
                device=device,
                dtype=dtype,
                quantization=quantization,
                deterministic=deterministic,
                enforce_eager=enforce_eager,
                tensor_parallel_size=tensor_parallel_size,
                expert_parallel=expert_parallel,
                mtp=mtp,
                kv_cache_dtype=kv_cache_dtype,
                state_dtype=state_dtype,
                activation_dtype=activation_dtype,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                kv_cache_bytes=kv_cache_bytes,
                gpu_memory_utilization=gpu_memory_utilization,
                seed=seed,
                progress=bar.update,
            )
        self.model = "embedded" if model is None else os.fspath(model)
        self.path = path
        if model is None and sys.stderr is not None:
            with contextlib.suppress(
                OSError, ValueError
            ):  # a full disk, a closed file: a note is worth no error
                print(NOTICE, file=sys.stderr, flush=True)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ConfigError where the checkpoint has none."""
        if self._tokenizer is None:
            raise ConfigError(
                f"{self.path}: found no tokenizer.json; allowed: prompts as token ids, or LLM(..., tokenizer=DIR)"
            )
        return self._tokenizer

    @property
    def device(self) -> str:
        """Where it runs: ``"cpu"``, ``"cuda:N"``, or ``"cuda:N,M"`` with several ranks."""
        return self._engine.device

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that are held on a GPU, by what they are for; empty on the CPU. `qwen35rs plan` says the same beforehand."""
        memory: dict[str, int] = json.loads(self._engine.report())["memory"]
        return memory

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output of a request, in tokens."""
        return self._engine.max_model_len

    @property
    def has_mtp(self) -> bool:
        """Whether the multi-token-prediction module is loaded."""
        return self._engine.has_mtp

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end a turn."""
        return self._engine.eos_token_ids

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Completes prompts, in their order.

        Args:
            prompts: one prompt or many (see `Prompt`). A flat list of int is one prompt.
            sampling_params: for all, or one each; the checkpoint's defaults by default.
            progress: show a bar of finished requests.

        Raises RequestError for a prompt or a parameter that cannot be served; nothing runs then.

        Ctrl-C ends all of its requests at once.
        """
        requests = [self._request(p) for p in _prompts(prompts)]
        return self._run(requests, _each(sampling_params, len(requests)), progress)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> DeltaStream:
        """Completes one prompt, yielding what each step adds. Closing the iterator ends the request."""
        return self._stream(self._request(prompt), *_each(sampling_params, 1))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answers one conversation or many, through the checkpoint's chat template.

        Args:
            messages: a list of ``{"role": ..., "content": ...}``, or a list of such lists.
            tools: functions in the OpenAI form, offered in every conversation.
            enable_thinking: whether the answer starts with reasoning.
            chat_template_kwargs: further variables of the template.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
            raise RequestError(
                f"messages: found {short(messages)}; allowed: a list of messages, or of such lists"
            )
        several = len(messages) > 0 and not isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = messages if several else [messages]
        requests = [
            self._request(
                self._render(m, tools, enable_thinking, add_generation_prompt, chat_template_kwargs)
            )
            for m in conversations
        ]
        return self._run(requests, _each(sampling_params, len(requests)), progress)

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> DeltaStream:
        """Answers one conversation, yielding what each step adds."""
        text = self._render(messages, tools, enable_thinking, add_generation_prompt, chat_template_kwargs)
        return self._stream(self._request(text), *_each(sampling_params, 1))

    @overload
    def logits(
        self, token_ids: TokenIds, *, on_device: Literal[False] = False
    ) -> npt.NDArray[np.float32]: ...
    @overload
    def logits(self, token_ids: TokenIds, *, on_device: Literal[True]) -> DeviceTensor: ...
    def logits(
        self, token_ids: TokenIds, *, on_device: bool = False
    ) -> npt.NDArray[np.float32] | DeviceTensor:
        """Logits after every token of a sequence: float32 ``[num_tokens, vocab]``, padding rows included.

        With ``on_device`` they stay in memory of the model's CUDA device, without a copy to the host:
        ``torch.from_dlpack(llm.logits(ids, on_device=True))``. That memory is none of the model's; it is given back when
        the last tensor made of it goes.

        Raises RequestError for an empty sequence, one longer than the context, an unknown id, or ``on_device`` on the
        CPU; OutOfMemoryError where there is no room for them on the device.
        """
        ids = _ids("token_ids", token_ids)
        return self._engine.device_logits(ids) if on_device else self._engine.logits(ids)

    def mtp_logits(self, token_ids: TokenIds) -> npt.NDArray[np.float32]:
        """What the multi-token-prediction module drafts over a sequence: float32 ``[num_tokens - 1, vocab]``, padding
        rows included.

        Row t holds the draft's logits of token t + 2, given tokens up to t + 1: the module reads the model's hidden
        state after token t and the embedding of token t + 1.

        Raises RequestError for an LLM made without ``mtp=True``, a sequence of fewer than two tokens or longer than the
        context, or an unknown id.
        """
        return self._engine.mtp_logits(_ids("token_ids", token_ids))

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        enable_thinking: bool,
        add_generation_prompt: bool,
        kwargs: Mapping[str, Any] | None,
    ) -> str:
        variables = {"enable_thinking": enable_thinking, **(kwargs or {})}
        arguments.flag("add_generation_prompt", add_generation_prompt)
        for name in ("messages", "tools", "add_generation_prompt", "tokenize"):
            if name in variables:
                allowed = "other variables of the template"
                raise RequestError(f"chat_template_kwargs: found {name!r}; allowed: {allowed}")
        _refuse_media(messages)
        text = self.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False, **variables
        )
        assert isinstance(text, str)
        return text

    def _request(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            keys = {"prompt", "prompt_token_ids"} & prompt.keys()
            if len(prompt) != 1 or len(keys) != 1:
                raise RequestError(
                    f"prompt: found keys {sorted(map(str, prompt))}; allowed: one of 'prompt', 'prompt_token_ids'"
                )
            if "prompt_token_ids" in prompt:
                return None, _ids("prompt_token_ids", prompt["prompt_token_ids"])
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt)
        if not isinstance(prompt, (Sequence, np.ndarray)):
            raise RequestError(
                f"prompt: found {short(prompt)}; allowed: text, a flat sequence of token ids, or a mapping of either"
            )
        return None, _ids("prompt", prompt)

    def _run(
        self, requests: list[tuple[str | None, list[int]]], params: list[SamplingParams], progress: bool
    ) -> list[RequestOutput]:
        if not requests:
            return []
        outputs = [
            RequestOutput(text, ids, [CompletionOutput(i, logprobs=_empty(p)) for i in range(p.n)])
            for (text, ids), p in zip(requests, params, strict=True)
        ]
        flat = [completion for output in outputs for completion in output.outputs]
        texts: list[list[str]] = [[] for _ in flat]
        with _RequestBar(len(flat), progress) as bar:
            for delta in self._submit([ids for _, ids in requests], params):
                completion = flat[delta.index]
                texts[delta.index].append(delta.text)
                completion.token_ids.append(delta.token_id)
                if completion.logprobs is not None:
                    completion.logprobs.append(self._logprobs(delta))
                if delta.finish_reason is not None:
                    completion.finish_reason = delta.finish_reason
                    bar.advance()
        for completion, pieces in zip(flat, texts, strict=True):
            completion.text = "".join(pieces)
        return outputs

    def _stream(self, request: tuple[str | None, list[int]], params: SamplingParams) -> DeltaStream:
        # Submitted here and not at the first `next`, so that a bad request is refused at the call.
        return DeltaStream(self, self._submit([request[1]], [params]))

    def _submit(self, ids: list[list[int]], params: list[SamplingParams]) -> _core.Generation:
        try:
            return self._engine.generate(ids, params)
        except TypeError:  # lists in them may have changed since they were checked
            for one in params:
                one.check()
            raise

    def _logprobs(self, delta: _core.Delta) -> dict[int, Logprob]:
        assert delta.logprobs is not None
        chosen, rank, top = delta.logprobs
        best = {i: Logprob(x, r, self._text(i)) for r, (i, x) in enumerate(top, 1)}
        return {delta.token_id: Logprob(chosen, rank, self._text(delta.token_id)), **best}

    def _text(self, token_id: int) -> str | None:
        if self._tokenizer is None or token_id >= len(self._tokenizer):
            return None
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def __repr__(self) -> str:
        return f"LLM({self.model!r}, device={self.device!r}, max_model_len={self.max_model_len})"


class DeltaStream(Iterator[Delta]):
    """What the steps of one request add to it. Dropping it ends the request."""

    def __init__(self, llm: LLM, generation: _core.Generation) -> None:
        self._llm, self._generation = llm, generation

    def __next__(self) -> Delta:
        d = next(self._generation)
        logprobs = None if d.logprobs is None else [self._llm._logprobs(d)]
        return Delta(d.text, [d.token_id], d.index, d.finish_reason, logprobs)

    def close(self) -> None:
        """Ends the request. Any thread may call it; one that waits for the next delta gets StopIteration."""
        self._generation.close()


def _refuse_media(messages: Any) -> None:
    """Images and videos would become placeholder tokens without content: there is no vision tower here."""
    media = {"image", "image_url", "video", "video_url"}
    for i, message in enumerate(messages if isinstance(messages, Sequence) else ()):
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, (list, tuple)) else ():
            if isinstance(part, Mapping) and (part.get("type") in media or not media.isdisjoint(part)):
                raise RequestError(
                    f"messages[{i}]: found {short(part)}; allowed: text (no vision in this version)"
                )


def _prompts(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if isinstance(prompts, (bytes, bytearray)) or not isinstance(prompts, Iterable):
        raise RequestError(
            f"prompts: found {short(prompts)}; allowed: a prompt or several, text or token ids"
        )
    several = list(prompts)
    if several and all(isinstance(p, (int, np.integer)) for p in several):
        return [several]  # type: ignore[list-item]
    return several  # type: ignore[return-value]


def _ids(name: str, ids: Any) -> list[int]:
    if isinstance(ids, (bytes, bytearray)):
        raise RequestError(f"{name}: found {short(ids)}; allowed: a flat sequence of token ids")
    if isinstance(ids, (list, tuple)) and any(isinstance(i, bool) for i in ids):
        raise RequestError(f"{name}: found {short(ids)}; allowed: a flat sequence of token ids")
    try:
        array = np.asarray(ids)
    except ValueError:
        array = np.asarray(None)
    if array.size == 0 and array.ndim == 1:
        return []
    if array.ndim == 1 and array.dtype.kind in "Of" and all(isinstance(i, (int, np.integer)) for i in ids):
        array = array.astype(object)  # integers of more than 64 bits
    elif array.ndim != 1 or array.dtype.kind not in "iu":
        raise RequestError(f"{name}: found {short(ids)}; allowed: a flat sequence of token ids")
    if array.min() < 0 or array.max() >= 2**32:
        bad = next(int(i) for i in ids if not 0 <= i < 2**32)
        raise RequestError(f"{name}: found {bad}; allowed: token ids, 0 to {2**32 - 1}")
    ids_list: list[int] = array.tolist()
    return ids_list


def _each(params: SamplingParams | Sequence[SamplingParams] | None, num: int) -> list[SamplingParams]:
    if params is None:
        return [SamplingParams()] * num
    if isinstance(params, SamplingParams):
        return [params] * num
    several = list(params) if isinstance(params, Sequence) else [params]
    for one in several:
        if not isinstance(one, SamplingParams):
            raise RequestError(f"sampling_params: found {short(one)}; allowed: SamplingParams")
    if len(several) != num:
        raise RequestError(
            f"sampling_params: found {len(several)}; allowed: one, or one for each of {num} prompts"
        )
    return several


def _empty(params: SamplingParams) -> list[dict[int, Logprob]] | None:
    return None if params.logprobs is None else []


class _LoadBar:
    """A progress bar while a checkpoint loads; none for one that is loaded at once."""

    SIZE = 1 << 30

    def __init__(self, path: Path, show: bool | None) -> None:
        # A link to nothing is for the core to refuse.
        size = sum(f.stat().st_size for f in path.glob("*.safetensors") if f.is_file())
        self._show = show if show is not None else size > self.SIZE
        self._bar: Any = None

    def __enter__(self) -> _LoadBar:  # noqa: PYI034  `Self` is of Python 3.11
        if self._show:
            self._bar = _bar()
            self._bar.start()
            self._task = self._bar.add_task("loading", total=None)
        return self

    def update(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


class _RequestBar(_LoadBar):
    """A progress bar of finished requests."""

    def __init__(self, total: int, show: bool) -> None:
        self._show, self._bar, self._done, self._total = show, None, 0, total

    def __enter__(self) -> _RequestBar:  # noqa: PYI034
        super().__enter__()
        return self

    def advance(self) -> None:
        self._done += 1
        self.update(self._done, self._total)


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    # On stderr, and only where that is a terminal: output that is piped stays clean.
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
