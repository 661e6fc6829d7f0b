"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Logprob:
    """Log-probability of a token at one place."""

    logprob: float
    rank: int
    """1 for the most likely token."""
    decoded_token: str | None
    """Its text alone; None without a tokenizer."""


@dataclass
class CompletionOutput:
    """One sample of a prompt."""

    index: int
    """Which of the ``n`` samples."""
    text: str = ""
    """Generated text, without stop string, stop token and special tokens; empty without a tokenizer."""
    token_ids: list[int] = field(default_factory=list)
    """Generated tokens, the stop token included."""
    finish_reason: str | None = None
    """``"stop"``, ``"length"``, or None while it goes on."""
    logprobs: list[dict[int, Logprob]] | None = None
    """Per token, the chosen and the best; None where not asked for."""


@dataclass
class RequestOutput:
    """What one prompt gave. ``text``, ``token_ids``, ``finish_reason`` and ``logprobs`` are the first sample's."""

    prompt: str | None
    """The prompt, where it was given as text."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> list[dict[int, Logprob]] | None:
        return self.outputs[0].logprobs


@dataclass(frozen=True)
class Delta:
    """What one step added to one sample of a stream."""

    text: str
    """Text that became certain: whole characters, never the start of a stop string. May be empty."""
    token_ids: list[int]
    index: int
    """Which of the ``n`` samples."""
    finish_reason: str | None
    """``"stop"`` or ``"length"`` on a sample's last delta."""
    logprobs: list[dict[int, Logprob]] | None
