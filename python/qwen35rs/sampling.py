"""How tokens are chosen and when a request ends."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from . import _core
from .arguments import refuse


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a request ends.

    A field left at ``None`` takes the checkpoint's value (``generation_config.json``), or the neutral one
    given here. The steps apply in this order: ``logit_bias``, ``min_tokens``, penalties, ``temperature``,
    ``top_k``, ``top_p`` (over what ``top_k`` left), ``min_p``.

    Raises RequestError, naming the field, the value and what is allowed.

    >>> SamplingParams(temperature=0.7, top_p=0.9, max_tokens=64).top_p
    0.9
    """

    temperature: float | None = None
    """Divides the logits; 0 takes the most likely token (ties: the lowest id). Neutral: 1."""
    top_p: float | None = None
    """Keep the most likely tokens whose probabilities reach this sum, in (0, 1]. Neutral: 1."""
    top_k: int | None = None
    """Keep this many of the most likely tokens (ties: the lowest ids); 0 or -1 for all. Neutral: 0."""
    min_p: float | None = None
    """Keep tokens at least this likely, relative to the most likely one, in [0, 1]. Neutral: 0."""
    presence_penalty: float | None = None
    """Subtracted from the logit of each token that the output has, -2 to 2. Neutral: 0."""
    frequency_penalty: float | None = None
    """Times its count in the output, subtracted from a token's logit, -2 to 2. Neutral: 0."""
    repetition_penalty: float | None = None
    """Divides positive and multiplies negative logits of tokens in prompt or output. Neutral: 1."""
    max_tokens: int | None = None
    """Tokens to generate at most; the rest of the context where neither this nor the checkpoint says."""
    min_tokens: int = 0
    """No stop token is chosen before this many tokens."""
    stop: list[str] = dataclasses.field(default_factory=list)
    """Strings that end the text (one string is a list of one). They are not part of it."""
    include_stop_str_in_output: bool = False
    """Leave the stop string in the text."""
    stop_token_ids: list[int] = dataclasses.field(default_factory=list)
    """Tokens that end the request, besides the checkpoint's own; their text is not shown."""
    ignore_eos: bool = False
    """Treat the checkpoint's own stop tokens as ordinary ones."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    seed: int | None = None
    """Same seed, same text, whatever else is in the batch. Without one, ``LLM(seed=)`` and the order of the
    requests decide."""
    logprobs: int | None = None
    """Log-probabilities of the chosen token and of this many of the best, by the logits as the model gives
    them, before any step above."""
    n: int = 1
    """Samples of each prompt."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these tokens."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", [self.stop])
        elif self.stop is None:
            object.__setattr__(self, "stop", [])
        if self.stop_token_ids is None:
            object.__setattr__(self, "stop_token_ids", [])
        self.check()

    def check(self) -> None:
        """Sees that some model could serve it, as making one does: the lists in it may have changed since.

        Raises RequestError, naming the field, the value and what is allowed.
        """
        try:
            _core.check_sampling_params(self)
        except TypeError as error:
            # PyO3 names the field last; its cause says what was wrong with the value.
            name = str(error).rsplit(".", 1)[-1]
            field = type(self).__dataclass_fields__.get(name)
            if field is None:
                raise
            value = getattr(self, name)
            allowed = str(field.type)
            if isinstance(error.__cause__, OverflowError):
                allowed = "integers of 64 bits"
            elif isinstance(error.__cause__, UnicodeEncodeError):
                allowed = "text without lone surrogates"
            raise refuse(name, value, allowed) from None
