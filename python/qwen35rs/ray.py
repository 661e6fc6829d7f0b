"""Replicas of an `LLM` behind one handle, by Ray Serve: ``pip install 'qwen35rs[ray]'``.

    >>> from ray import serve                                                       # doctest: +SKIP
    >>> from qwen35rs.ray import build_app                                          # doctest: +SKIP
    >>> handle = serve.run(build_app("Qwen/Qwen3.5-35B-A3B", num_replicas=4), route_prefix=None)  # doctest: +SKIP
    >>> messages = [{"role": "user", "content": "Hello"}]                           # doctest: +SKIP
    >>> for delta in handle.options(stream=True).chat.remote(messages):             # doctest: +SKIP
    ...     print(delta["text"], end="")

Serve starts and replaces the replicas, and carries requests and cancellations to them. This module says what a replica
is; `qwen35rs.ray_router` says which one a conversation goes to.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict
from typing import Any, TypedDict

from ._core import RequestError, check_devices
from .arguments import short
from .llm import LLM, DeltaStream, Message, Prompt
from .outputs import Delta
from .sampling import SamplingParams

try:
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from .ray_router import ConversationRouter
except ImportError as error:
    raise ImportError(f"qwen35rs.ray: found no Ray Serve ({error}); pip install 'qwen35rs[ray]'") from None


class ReplicaDelta(TypedDict):
    """What some steps added to one sample of a request: a `Delta` as plain data."""

    text: str
    token_ids: list[int]
    index: int
    """Which of the ``n`` samples."""
    finish_reason: str | None
    """``"stop"`` or ``"length"`` on a sample's last delta."""
    logprobs: list[dict[int, dict[str, Any]]] | None
    """The fields of `Logprob` by token id, for each token; None where not asked for."""
    replica_id: str
    """Serve's name of the replica that answers."""


def build_app(
    model: str | os.PathLike[str] | None = None,
    *,
    num_replicas: int | None = None,
    tensor_parallel_size: int = 1,
    gpus_per_replica: float | None = None,
    deployment_config: Mapping[str, Any] | None = None,
    **llm_options: Any,
) -> serve.Application:
    """An application for ``serve.run``: replicas of one LLM. Its handle has the methods of `LLMReplica`.

    ``serve.run`` of an application of the same name with other arguments replaces its replicas a few at a time; requests
    go on meanwhile.

    Args:
        model: as for `LLM`. A directory must be there on every machine of the cluster.
        num_replicas: replicas, each with an LLM of its own; 1 by default, or what an ``autoscaling_config`` says.
        tensor_parallel_size: ranks of each replica. On GPUs a replica holds as many, all of one machine.
        gpus_per_replica: GPUs that Ray keeps for a replica: 0, ``tensor_parallel_size``, or with one rank a share such as
            0.5 (then ``gpu_memory_utilization`` is to leave room for the others). By default 0 where ``device`` (or
            QWEN35RS_DEVICE) is ``"cpu"``, or is ``"auto"`` and the cluster has no GPU.
        deployment_config: options of ``serve.deployment`` that take the place of those chosen here, such as ``name``,
            ``autoscaling_config``, ``max_ongoing_requests`` (of a replica; ``max_num_seqs`` by default),
            ``graceful_shutdown_timeout_s`` (how long a replica that is replaced has for its last answers; 600),
            ``health_check_period_s`` (2), ``ray_actor_options``.
        llm_options: further arguments of `LLM`.

    Raises RequestError for an argument that cannot be served, TypeError for one that `LLM` does not have. What only
    loading can refuse makes ``serve.run`` fail; ``serve.status()`` then has `LLM`'s words.
    """
    inspect.signature(LLM).bind(model, **llm_options)
    config = dict(deployment_config or {})
    if num_replicas is not None:
        config["num_replicas"] = _count("num_replicas", num_replicas)
    elif "autoscaling_config" not in config:
        config.setdefault("num_replicas", 1)
    _count("tensor_parallel_size", tensor_parallel_size)
    device, gpus = _place(llm_options.get("device", "auto"), tensor_parallel_size, gpus_per_replica)
    if device == "cpu":
        expert_parallel = bool(llm_options.get("expert_parallel", False))
        check_devices(device, tensor_parallel_size, expert_parallel, alone=True)
    actor = dict(config.pop("ray_actor_options", None) or {})
    if "num_gpus" in actor:
        raise RequestError(
            f"ray_actor_options: found num_gpus = {short(actor['num_gpus'])}; allowed: gpus_per_replica"
        )
    seats = llm_options.get("max_num_seqs", inspect.signature(LLM).parameters["max_num_seqs"].default)
    chosen = {
        "name": "LLMReplica",
        # What an engine can run at once; the others wait at the handle, where they can still go to any replica.
        "max_ongoing_requests": _count("max_num_seqs", seats),
        "graceful_shutdown_timeout_s": 600,
        "health_check_period_s": 2,
        "max_constructor_retry_count": 3,
        "request_router_config": RequestRouterConfig(request_router_class=ConversationRouter),
    }
    # One actor is on one machine, so its GPUs are too, and its ranks reach each other there.
    deployment = serve.deployment(
        LLMReplica, ray_actor_options={**actor, "num_gpus": gpus}, **{**chosen, **config}
    )
    options = {**llm_options, "device": device, "tensor_parallel_size": tensor_parallel_size}
    return deployment.bind(None if model is None else os.fspath(model), options)


class LLMReplica:
    """One replica: an `LLM`, and streams of it for an event loop.

    Called through the handle, ``handle.options(stream=True).chat.remote(...)``, which gives an iterator, also an
    asynchronous one. ``cancel()`` on it ends the request; to drop it does not. The errors of `LLM` arrive as its classes.
    A stream whose replica is gone ends in Ray's ``RayActorError``; what was not begun there goes to another.
    """

    def __init__(self, model: str | None, options: Mapping[str, Any]) -> None:
        # What started Ray on several machines (srun, torchrun) has left here that this process is one of several. A
        # replica's ranks are its own threads, and it meets nobody.
        for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
            os.environ.pop(name, None)
        self._llm = LLM(model, **options)
        self._replica_id: str = serve.get_replica_context().replica_id.unique_id
        # A thread for each request under way. Serve bounds them by `max_ongoing_requests`, which may change.
        self._threads = ThreadPoolExecutor(max_workers=1 << 16, thread_name_prefix="qwen35rs-stream")

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        conversation_id: str | None = None,
    ) -> AsyncGenerator[ReplicaDelta, None]:
        """Completes one prompt, as `LLM.stream` does. Requests with the same ``conversation_id`` go to the same replica."""
        self._check(conversation_id)
        async with aclosing(self._stream(lambda: self._llm.stream(prompt, sampling_params))) as deltas:
            async for delta in deltas:
                yield delta

    async def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        conversation_id: str | None = None,
        **template: Any,
    ) -> AsyncGenerator[ReplicaDelta, None]:
        """Answers a conversation, as `LLM.stream_chat` does.

        Args:
            conversation_id: what the requests of one conversation have in common; they go to the same replica. By
                default the messages up to the user's first.
            template: ``tools``, ``enable_thinking``, and what else `LLM.stream_chat` takes.
        """
        self._check(conversation_id)

        def start() -> DeltaStream:
            return self._llm.stream_chat(messages, sampling_params, **template)

        async with aclosing(self._stream(start)) as deltas:
            async for delta in deltas:
                yield delta

    async def check_health(self) -> None:
        """For Serve, which replaces a replica whose check fails: raises what ended the engine's thread."""
        await asyncio.to_thread(lambda: self._llm.memory)

    @staticmethod
    def _check(conversation_id: object) -> None:
        if conversation_id is not None and not (isinstance(conversation_id, str) and conversation_id):
            raise RequestError(f"conversation_id: found {short(conversation_id)}; allowed: text, or None")

    async def _stream(self, start: Callable[[], DeltaStream]) -> AsyncGenerator[ReplicaDelta, None]:
        loop = asyncio.get_running_loop()
        reader = _Reader(start, loop)
        reading = loop.run_in_executor(self._threads, reader.run)
        try:
            while not reader.ended:
                for delta in _joined(await reader.deltas()):
                    yield self._plain(delta)
            await reading
        finally:
            reader.close()

    def _plain(self, delta: Delta) -> ReplicaDelta:
        logprobs = delta.logprobs
        return ReplicaDelta(
            text=delta.text,
            token_ids=delta.token_ids,
            index=delta.index,
            finish_reason=delta.finish_reason,
            logprobs=None if logprobs is None else [{i: asdict(x) for i, x in at.items()} for at in logprobs],
            replica_id=self._replica_id,
        )


class _Reader:
    """Reads a stream on a thread of its own for an event loop, which takes what has come since it last looked."""

    def __init__(self, start: Callable[[], DeltaStream], loop: asyncio.AbstractEventLoop) -> None:
        self._start, self._loop = start, loop
        self._stream: DeltaStream | None = None
        self._come: deque[Delta | None] = deque()
        self._wake = asyncio.Event()
        self._closed = False
        self.ended = False

    def run(self) -> None:
        """The thread. Raises what the stream raises."""
        try:
            if self._closed:  # while it waited for a thread
                return
            self._stream = self._start()
            if self._closed:  # before there was a stream to close
                self._stream.close()
            for delta in self._stream:
                self._put(delta)
        finally:
            self._put(None)

    def _put(self, delta: Delta | None) -> None:
        self._come.append(delta)
        # Where the event is still set, the loop has yet to look.
        if not self._wake.is_set() and not self._closed:
            self._loop.call_soon_threadsafe(self._wake.set)

    async def deltas(self) -> list[Delta]:
        """Waits, and gives all that has come; now and then that is nothing."""
        await self._wake.wait()
        self._wake.clear()
        deltas = []
        while self._come:
            delta = self._come.popleft()
            if delta is None:
                self.ended = True
            else:
                deltas.append(delta)
        return deltas

    def close(self) -> None:
        """Ends the stream. For the event loop's thread."""
        self._closed = True
        if self._stream is not None:
            self._stream.close()


def _joined(deltas: Iterable[Delta]) -> list[Delta]:
    """One delta for each sample, of those that came together: a slow reader gets larger pieces and no longer a queue."""
    samples: dict[int, list[Delta]] = {}
    for delta in deltas:
        samples.setdefault(delta.index, []).append(delta)
    return [
        Delta(
            "".join(d.text for d in several),
            [token for d in several for token in d.token_ids],
            index,
            several[-1].finish_reason,
            None if several[0].logprobs is None else [x for d in several for x in d.logprobs or ()],
        )
        for index, several in samples.items()
    ]


def _place(device: object, ranks: int, gpus: object) -> tuple[str, float]:
    """The device of a replica's LLM, and the GPUs that it holds."""
    if device == "auto":
        device = os.environ.get("QWEN35RS_DEVICE") or "auto"
    if device not in ("auto", "cpu", "cuda"):
        raise RequestError(
            f"device: found {short(device)}; allowed: auto, cpu, cuda (Ray decides which GPUs a replica gets)"
        )
    if gpus is None and device == "auto":
        if not ray.is_initialized():
            ray.init()  # as `serve.run` does
        gpus = ranks if ray.cluster_resources().get("GPU") else 0
    elif gpus is None:
        gpus = 0 if device == "cpu" else ranks
    right: dict[object, list[float]] = {"cpu": [0], "cuda": [ranks]}
    allowed = right.get(device, [0, ranks])
    share = ranks == 1 and device != "cpu" and isinstance(gpus, float) and 0 < gpus < 1
    if isinstance(gpus, bool) or not isinstance(gpus, (int, float)) or not (share or gpus in allowed):
        words = " or ".join(map(str, allowed)) + (
            ", or a share of one GPU" if ranks == 1 and device != "cpu" else ""
        )
        raise RequestError(f"gpus_per_replica: found {short(gpus)}; allowed: {words}")
    return ("cuda" if gpus else "cpu"), gpus


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RequestError(f"{name}: found {short(value)}; allowed: at least 1")
    return value
