"""qwen35rs: an inference engine for the Qwen3.5 family."""

from qwen35rs._core import DecodeStream, Tokenizer

__all__ = ["DecodeStream", "Tokenizer"]
