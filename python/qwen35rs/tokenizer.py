"""The tokenizer with its chat template."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _core, hub
from ._core import RequestError
from .arguments import flag


class Tokenizer:
    """Text to token ids and back, exactly as the checkpoint's ``tokenizer.json`` says, and its chat template. Of a
    GGUF file: those beside it, or what its metadata say.

    Immutable; any number of threads may use one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads the directory of a checkpoint, a GGUF file, or a ``tokenizer.json``.

        Raises FileNotFoundError and kin for a file that cannot be read, ConfigError for one that is malformed
        or asks for something that is not done exactly here.
        """
        path = Path(path)
        hub.check_gguf(path)
        is_checkpoint = path.is_dir() or hub.is_gguf(path)
        self._directory = path if is_checkpoint else path.parent
        make = _core.Tokenizer.from_directory if is_checkpoint else _core.Tokenizer.from_file
        self._core = make(path)
        self._template: _core.ChatTemplate | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Tokenizer:
        """The tokenizer of a checkpoint directory, of a GGUF file or of a name on the Hugging Face hub."""
        return cls(hub.resolve(model, revision=revision, token=token, patterns=hub.TOKENIZER_FILES))

    def encode(self, text: str, *, split_special_tokens: bool = False) -> list[int]:
        """Token ids of a text. Nothing is put before or after.

        Added tokens that appear in the text become their ids; with ``split_special_tokens`` the special ones
        among them are text like any other.
        """
        try:
            return self._core.encode(text, split_special_tokens=split_special_tokens)
        except UnicodeEncodeError as error:
            raise _surrogate("text", error) from None

    def encode_array(self, text: str, *, split_special_tokens: bool = False) -> npt.NDArray[np.uint32]:
        """`encode`, as a uint32 array ``[num_tokens]``: faster for long texts."""
        try:
            return self._core.encode_array(text, split_special_tokens=split_special_tokens)
        except UnicodeEncodeError as error:
            raise _surrogate("text", error) from None

    def encode_batch(self, texts: Sequence[str], *, split_special_tokens: bool = False) -> list[list[int]]:
        """`encode` of every text, over all cores."""
        try:
            return self._core.encode_batch(texts, split_special_tokens=split_special_tokens)
        except UnicodeEncodeError as error:
            raise _surrogate("texts", error) from None

    def encode_batch_array(
        self, texts: Sequence[str], *, split_special_tokens: bool = False
    ) -> list[npt.NDArray[np.uint32]]:
        """`encode_array` of every text, over all cores."""
        try:
            return self._core.encode_batch_array(texts, split_special_tokens=split_special_tokens)
        except UnicodeEncodeError as error:
            raise _surrogate("texts", error) from None

    def decode(
        self, ids: Sequence[int] | npt.NDArray[np.integer[Any]], skip_special_tokens: bool = True
    ) -> str:
        """Text of token ids, with U+FFFD for bytes that are not UTF-8. RequestError for an unknown id."""
        return self._core.decode(ids, skip_special_tokens)

    def decode_batch(self, batch: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """`decode` of every list of ids."""
        return self._core.decode_batch(batch, skip_special_tokens)

    def decode_stream(self, skip_special_tokens: bool = True) -> _core.DecodeStream:
        """A decoder for ids that arrive one by one: ``push(id)`` gives the text that became certain, never half a
        character; ``finish()`` gives the rest."""
        return self._core.decode_stream(skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """Id of a token in the spelling of ``tokenizer.json``, or None."""
        try:
            return self._core.token_to_id(token)
        except UnicodeEncodeError as error:
            raise _surrogate("token", error) from None

    def id_to_token(self, id: int) -> str:
        """A token in the spelling of ``tokenizer.json``: bytes in GPT-2's printable form."""
        return self._core.id_to_token(id)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token decodes to, not always UTF-8."""
        return self._core.token_bytes(id)

    def get_vocab(self) -> dict[str, int]:
        """Every token in the spelling of ``tokenizer.json``, with its id."""
        vocab = {}
        for id in range(len(self)):
            try:
                vocab[self._core.id_to_token(id)] = id
            except RequestError:  # a gap in the ids
                continue
        return vocab

    def __len__(self) -> int:
        """One more than the largest id."""
        return len(self._core)

    @property
    def vocab_size(self) -> int:
        """Tokens of the model's own vocabulary, added tokens left out."""
        return self._core.vocab_size

    @property
    def added_tokens(self) -> dict[str, int]:
        """Added tokens by text."""
        return self._core.added_tokens

    @property
    def special_ids(self) -> list[int]:
        """Special tokens: those that decoding leaves out."""
        return self._core.special_ids

    @property
    def eos_token_id(self) -> int | None:
        """``eos_token`` of ``tokenizer_config.json``, or of a GGUF file."""
        return self._core.eos_token_id

    @property
    def pad_token_id(self) -> int | None:
        """``pad_token`` of ``tokenizer_config.json``, or of a GGUF file."""
        return self._core.pad_token_id

    @property
    def chat_template(self) -> str:
        """The template's text: the checkpoint's, or the family's where it has none."""
        return self._chat().source

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool = True,
        tokenize: bool = True,
        **variables: Any,
    ) -> str | list[int]:
        """A conversation as the model expects it: token ids, or text with ``tokenize=False``.

        Args:
            messages: ``{"role": ..., "content": ...}``; assistant messages may have ``reasoning_content`` and
                ``tool_calls`` (arguments as a mapping or as JSON text).
            tools: functions in the OpenAI form.
            add_generation_prompt: end with the start of the assistant's turn.
            enable_thinking: leave the reasoning open; False closes it empty.
            variables: further variables of the template, for example ``add_vision_id``.

        Raises RequestError for a conversation that the template refuses, naming the message.
        """
        flag("enable_thinking", enable_thinking)
        try:
            text = self._chat().render(
                _json("messages", messages),
                None if tools is None else _json("tools", tools),
                bool(add_generation_prompt),
                _json("chat template variables", {"enable_thinking": enable_thinking, **variables}),
            )
        except UnicodeEncodeError as error:
            raise _surrogate("messages", error) from None
        return self.encode(text) if tokenize else text

    def _chat(self) -> _core.ChatTemplate:
        if self._template is None:
            self._template = _core.ChatTemplate(self._directory)
        return self._template

    def __repr__(self) -> str:
        return f"Tokenizer({os.fspath(self._directory)!r}, {len(self)} tokens)"


def _surrogate(name: str, error: UnicodeEncodeError) -> RequestError:
    found = f"{error.object[error.start]!r} at character {error.start}"
    return RequestError(f"{name}: found {found}; allowed: text without lone surrogates")


def _json(name: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{name}: found {error}; allowed: values that JSON can hold") from None


def _plain(value: Any) -> Any:
    """Mappings and sequences that are not dict and list."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    if isinstance(value, (np.integer, np.floating)):
        return value.item()
    raise TypeError(f"{type(value).__name__}")
