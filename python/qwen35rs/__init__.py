"""qwen35rs: an inference engine for the Qwen3.5 family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._core import ConfigError, CudaError, OutOfMemoryError, Qwen35Error, RequestError, __version__

if TYPE_CHECKING:
    from . import ops
    from .llm import LLM
    from .outputs import CompletionOutput, Delta, Logprob, RequestOutput
    from .sampling import SamplingParams
    from .tokenizer import Tokenizer

__all__ = [
    "LLM",
    "CompletionOutput",
    "ConfigError",
    "CudaError",
    "Delta",
    "Logprob",
    "OutOfMemoryError",
    "Qwen35Error",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "Tokenizer",
    "__version__",
    "ops",
]

# Read on first use, so that the import costs little more than numpy's.
_HOME = {
    "CompletionOutput": "outputs",
    "Delta": "outputs",
    "LLM": "llm",
    "Logprob": "outputs",
    "RequestOutput": "outputs",
    "SamplingParams": "sampling",
    "Tokenizer": "tokenizer",
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
