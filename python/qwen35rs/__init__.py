"""qwen35rs: an inference engine for the Qwen3.5 family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops
    from ._core import (
        ConfigError,
        CudaError,
        OutOfMemoryError,
        Qwen35Error,
        RankError,
        RequestError,
        __version__,
    )
    from .llm import LLM, DeltaStream
    from .outputs import CompletionOutput, Delta, Logprob, RequestOutput
    from .sampling import SamplingParams
    from .tokenizer import Tokenizer

__all__ = [
    "LLM",
    "CompletionOutput",
    "ConfigError",
    "CudaError",
    "Delta",
    "DeltaStream",
    "Logprob",
    "OutOfMemoryError",
    "Qwen35Error",
    "RankError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "Tokenizer",
    "__version__",
    "ops",
]

# Read on first use: the import costs next to nothing, and the command line is ready for Ctrl-C before the rest is read.
_HOME = {
    "CompletionOutput": "outputs",
    "ConfigError": "_core",
    "CudaError": "_core",
    "Delta": "outputs",
    "DeltaStream": "llm",
    "LLM": "llm",
    "Logprob": "outputs",
    "OutOfMemoryError": "_core",
    "Qwen35Error": "_core",
    "RankError": "_core",
    "RequestError": "_core",
    "RequestOutput": "outputs",
    "SamplingParams": "sampling",
    "Tokenizer": "tokenizer",
    "__version__": "_core",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "ops":
        return import_module(".ops", __name__)
    if name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
