"""The compiled module. Private: `qwen35rs` gives its names their public form."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, TypeAlias, final

import numpy as np
import numpy.typing as npt

__all__ = [
    "ChatTemplate",
    "ConfigError",
    "CudaError",
    "CudaOps",
    "DecodeStream",
    "Delta",
    "DeviceTensor",
    "Engine",
    "Generation",
    "OutOfMemoryError",
    "Qwen35Error",
    "RankError",
    "RequestError",
    "Tokenizer",
    "__version__",
    "check_devices",
    "check_sampling_params",
    "find_tokenizer",
    "inspect_checkpoint",
    "ops_attention",
    "ops_causal_conv1d",
    "ops_gated_delta_rule",
    "ops_moe",
    "ops_rms_norm",
    "ops_rope",
    "ops_route",
    "plan_memory",
    "plan_model",
    "quantize_checkpoint",
]

__version__: str

class Qwen35Error(Exception): ...
class ConfigError(Qwen35Error, ValueError): ...
class RequestError(Qwen35Error, ValueError): ...
class OutOfMemoryError(Qwen35Error, MemoryError): ...
class CudaError(Qwen35Error, RuntimeError): ...
class RankError(Qwen35Error, RuntimeError): ...

# tokenizer

_Ids: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]

@final
class Tokenizer:
    @staticmethod
    def from_file(path: str | PathLike[str]) -> Tokenizer: ...
    @staticmethod
    def from_directory(path: str | PathLike[str]) -> Tokenizer: ...
    def encode(self, text: str, *, split_special_tokens: bool = False) -> list[int]: ...
    def encode_array(self, text: str, *, split_special_tokens: bool = False) -> npt.NDArray[np.uint32]: ...
    def encode_batch(
        self, texts: Sequence[str], *, split_special_tokens: bool = False
    ) -> list[list[int]]: ...
    def encode_batch_array(
        self, texts: Sequence[str], *, split_special_tokens: bool = False
    ) -> list[npt.NDArray[np.uint32]]: ...
    def decode(self, ids: _Ids, skip_special_tokens: bool = True) -> str: ...
    def decode_batch(self, batch: Sequence[_Ids], skip_special_tokens: bool = True) -> list[str]: ...
    def decode_stream(self, skip_special_tokens: bool = True) -> DecodeStream: ...
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, id: int) -> str: ...
    def token_bytes(self, id: int) -> bytes: ...
    def __len__(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def added_tokens(self) -> dict[str, int]: ...
    @property
    def special_ids(self) -> list[int]: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def pad_token_id(self) -> int | None: ...

@final
class DecodeStream:
    def push(self, id: int) -> str: ...
    def finish(self) -> str: ...

@final
class ChatTemplate:
    def __new__(cls, path: str | PathLike[str]) -> ChatTemplate: ...
    @staticmethod
    def from_source(source: str) -> ChatTemplate: ...
    @property
    def source(self) -> str: ...
    def render(self, messages: str, tools: str | None, add_generation_prompt: bool, kwargs: str) -> str: ...

# engine

class _SamplingParams(Protocol):
    @property
    def temperature(self) -> float | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def min_p(self) -> float | None: ...
    @property
    def presence_penalty(self) -> float | None: ...
    @property
    def frequency_penalty(self) -> float | None: ...
    @property
    def repetition_penalty(self) -> float | None: ...
    @property
    def max_tokens(self) -> int | None: ...
    @property
    def min_tokens(self) -> int: ...
    @property
    def stop(self) -> Sequence[str]: ...
    @property
    def include_stop_str_in_output(self) -> bool: ...
    @property
    def stop_token_ids(self) -> Sequence[int]: ...
    @property
    def ignore_eos(self) -> bool: ...
    @property
    def skip_special_tokens(self) -> bool: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def logprobs(self) -> int | None: ...
    @property
    def n(self) -> int: ...
    @property
    def logit_bias(self) -> Mapping[int, float] | None: ...

def check_sampling_params(params: _SamplingParams) -> None: ...
def check_devices(
    device: str, tensor_parallel_size: int, expert_parallel: bool, *, alone: bool = False
) -> None: ...

@final
class Engine:
    def __new__(
        cls,
        path: str | PathLike[str],
        tokenizer: Tokenizer | None,
        *,
        load_format: str,
        device: str,
        dtype: str,
        quantization: str | None,
        deterministic: bool,
        enforce_eager: bool,
        tensor_parallel_size: int,
        expert_parallel: bool,
        mtp: bool | None,
        kv_cache_dtype: str,
        state_dtype: str,
        activation_dtype: str,
        max_model_len: int | None,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        kv_cache_bytes: int | None,
        gpu_memory_utilization: float,
        seed: int,
        progress: Callable[[int, int], object] | None,
    ) -> Engine: ...
    @property
    def device(self) -> str: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_num_batched_tokens(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def has_mtp(self) -> bool: ...
    @property
    def eos_token_ids(self) -> list[int]: ...
    def generate(self, prompts: Sequence[_Ids], params: Sequence[_SamplingParams]) -> Generation: ...
    def report(self) -> str: ...
    def measure(self) -> str: ...
    def step_facts(self, batch: int, context: int, experts_hit: int) -> tuple[float, int]: ...
    def logits(self, prompt: _Ids) -> npt.NDArray[np.float32]: ...
    def device_logits(self, prompt: _Ids) -> DeviceTensor: ...
    def mtp_logits(self, prompt: _Ids) -> npt.NDArray[np.float32]: ...

@final
class Generation:
    def __iter__(self) -> Iterator[Delta]: ...
    def __next__(self) -> Delta: ...
    def close(self) -> None: ...

@final
class Delta:
    @property
    def index(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def token_id(self) -> int: ...
    @property
    def logprobs(self) -> tuple[float, int, list[tuple[int, float]]] | None: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def seconds(self) -> float: ...

# ops: arrays are C-contiguous float32

_Array: TypeAlias = npt.NDArray[np.float32]

def ops_rms_norm(x: _Array, weight: _Array, eps: float) -> _Array: ...

# rotary_dim, theta, mrope_section, yarn
_Rotation: TypeAlias = tuple[int, float, Sequence[int], Mapping[str, Any] | None]

def ops_rope(x: _Array, positions: Sequence[Sequence[int]], rotation: _Rotation) -> _Array: ...
def ops_route(logits: _Array, top_k: int) -> tuple[_Array, npt.NDArray[np.int32]]: ...
def ops_causal_conv1d(x: _Array, weight: _Array, state: _Array | None) -> tuple[_Array, _Array]: ...
def ops_gated_delta_rule(
    q: _Array,
    k: _Array,
    v: _Array,
    g: _Array,
    beta: _Array,
    state: _Array | None,
    chunked: bool,
    qk_l2norm: bool,
    scale: float | None,
) -> tuple[_Array, _Array]: ...
def ops_attention(q: _Array, k: _Array, v: _Array, scale: float | None) -> _Array: ...
def ops_moe(
    x: _Array,
    gate: _Array,
    gate_up: _Array,
    down: _Array,
    top_k: int,
    shared: Sequence[_Array] | None,
) -> _Array: ...

# ops on a CUDA device: arguments have the DLPack protocol

@final
class DeviceTensor:
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

@final
class CudaOps:
    def __new__(cls, device: int, stream: int) -> CudaOps: ...
    def rms_norm(
        self, x: Any, weight: Any, eps: float, residual: Any | None
    ) -> tuple[DeviceTensor, DeviceTensor | None]: ...
    def rope(
        self,
        x: Any,
        host_positions: Sequence[Sequence[int]] | None,
        device_positions: Any | None,
        rotation: _Rotation,
    ) -> DeviceTensor: ...
    def route(self, logits: Any, top_k: int) -> tuple[DeviceTensor, DeviceTensor]: ...
    def causal_conv1d(self, x: Any, weight: Any, state: Any | None) -> tuple[DeviceTensor, DeviceTensor]: ...
    def gated_delta_rule(
        self,
        q: Any,
        k: Any,
        v: Any,
        g: Any,
        beta: Any,
        state: Any | None,
        chunked: bool,
        qk_l2norm: bool,
        scale: float | None,
    ) -> tuple[DeviceTensor, DeviceTensor]: ...
    def attention(self, q: Any, k: Any, v: Any, scale: float | None) -> DeviceTensor: ...
    def moe(
        self, x: Any, gate: Any, gate_up: Any, down: Any, top_k: int, shared: Sequence[Any] | None
    ) -> DeviceTensor: ...

# tools of the command line: JSON text

def find_tokenizer(path: str | PathLike[str]) -> Path | None: ...
def inspect_checkpoint(path: str | PathLike[str], full: bool) -> str: ...
def plan_memory(
    model: str,
    *,
    gpu: str,
    quantization: str | None,
    mtp: bool,
    fp8_kv: bool,
    f16_state: bool,
    max_model_len: int | None,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    gpu_memory_utilization: float,
    tensor_parallel_size: int = 1,
    expert_parallel: bool = False,
) -> str | None: ...
def plan_model(
    model: str,
    *,
    gpus: Sequence[str],
    cards: Sequence[int],
    schemes: Sequence[str],
    context: int,
    fp8_kv: bool,
    f16_state: bool,
    with_vision: bool,
    with_mtp: bool,
    num_seqs: int | None = None,
    max_model_len: int | None = None,
    all_reduce_us: float | None = None,
) -> str: ...
def quantize_checkpoint(
    path: str | PathLike[str],
    out: str | PathLike[str],
    *,
    scheme: str,
    group_size: int,
    progress: Callable[[int, int], object] | None,
    calibrate: Sequence[str | PathLike[str]] = ...,
    calibration_length: int | None = None,
    calibration_tokens: int | None = None,
) -> str: ...
