"""A checkpoint with a tokenizer, made from a committed one: 2 MB, loaded in milliseconds.

The vocabulary is 256 bytes, a few longer tokens and Qwen's added tokens. Weights of the embedding (which is the
head) are drawn so that printable tokens are likely.
"""

import json
import shutil
import struct
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parent / "golden" / "data"
SOURCE = GOLDEN / "dense_r1"

MERGED = ["th", "he", "in", "er", "an", "the", " t", " a", " the", "é", "日", "\n\n"]
ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
SPECIAL = ADDED[:3]
VOCAB = 320  # rows of the embedding: the last ones are padding
NUM_TOKENS = 256 + len(MERGED) + len(ADDED)

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _printable():
    """GPT-2's printable character of each byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def write_tokenizer(directory):
    form = _printable()
    spell = lambda text: "".join(form[b] for b in text.encode())
    vocab = {form[b]: b for b in range(256)}
    merges = []
    for i, text in enumerate(MERGED):
        raw = text.encode()
        vocab[spell(text)] = 256 + i
        if len(raw) > 2:
            left = next(
                (n for n in range(len(raw) - 1, 0, -1) if _known(raw[:n], raw[n:], vocab, form)), None
            )
            if left is None:
                continue
        else:
            left = 1
        merges.append([_spell(raw[:left], form), _spell(raw[left:], form)])
    special = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    first = 256 + len(MERGED)
    added = [
        {"id": first + i, "content": text, "special": text in SPECIAL, **special}
        for i, text in enumerate(ADDED)
    ]
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
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
            "vocab": vocab,
            "merges": merges,
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def _spell(raw, form):
    return "".join(form[b] for b in raw)


def _known(left, right, vocab, form):
    return _spell(left, form) in vocab and _spell(right, form) in vocab


def read_safetensors(path):
    """Name to (dtype name, shape, bytes)."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    return {
        name: (t["dtype"], t["shape"], body[slice(*t["data_offsets"])])
        for name, t in header.items()
        if name != "__metadata__"
    }


def write_safetensors(path, tensors):
    """The reverse. A value of None for the bytes leaves a hole: zeros that take no space on disk."""
    sizes = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1, "I32": 4, "I64": 8}
    header, end = {}, 0
    for name, (dtype, shape, _) in tensors.items():
        start, end = end, end + int(np.prod(shape)) * sizes[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, (_, _, data) in tensors.items():
            if data is not None:
                f.seek(8 + len(text) + header[name]["data_offsets"][0])
                f.write(data)
        f.truncate(8 + len(text) + end)


def write_checkpoint(
    directory, vocab=VOCAB, tokenizer=True, embedding=True, source=SOURCE, max_position=2048
):
    """A checkpoint like `source` with another vocabulary. With `embedding=False` its embedding is a hole."""
    directory.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    config.update(vocab_size=vocab, max_position_embeddings=max_position)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = read_safetensors(source / "model.safetensors")
    (name,) = [name for name in tensors if name.endswith("embed_tokens.weight")]
    dtype, (_, width), _ = tensors[name]
    data = None
    if embedding:
        rows = np.random.default_rng(5).standard_normal((vocab, width)).astype(np.float32)
        rows *= 0.35  # logits of about 2.5, so that samples vary
        rows[128:256] *= 0.2  # half characters
        rows[:32] *= 0.2  # control characters
        rows[NUM_TOKENS - len(ADDED) : NUM_TOKENS] *= 0.2
        rows[NUM_TOKENS:] *= 3.0  # padding that would be drawn if it could be
        assert dtype == "F32"
        data = rows.tobytes()
    tensors[name] = (dtype, [vocab, width], data)
    write_safetensors(directory / "model.safetensors", tensors)
    end = 256 + len(MERGED) + ADDED.index("<|im_end|>")
    generation = {"eos_token_id": end} if tokenizer else {"eos_token_id": 3}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    if tokenizer:
        write_tokenizer(directory)
    return directory


def add_mtp(directory, source):
    """The checkpoint of `source`, in one file, with a random MTP module whose layer is its last attention layer."""
    shutil.copytree(source, directory)
    config = json.loads((source / "config.json").read_text())
    config.get("text_config", config)["mtp_num_hidden_layers"] = 1
    (directory / "config.json").write_text(json.dumps(config))
    tensors = read_safetensors(source / "model.safetensors")
    *_, name = sorted(name for name in tensors if name.endswith("self_attn.q_proj.weight"))
    layer = name.removesuffix("self_attn.q_proj.weight")
    for name in [name for name in tensors if name.startswith(layer)]:
        tensors["mtp.layers.0." + name.removeprefix(layer)] = tensors[name]
    rng, hidden = np.random.default_rng(7), tensors[layer + "input_layernorm.weight"][1][0]
    for name, shape, scale in [
        ("fc", [hidden, 2 * hidden], (2 * hidden) ** -0.5),
        ("pre_fc_norm_embedding", [hidden], 0.3),
        ("pre_fc_norm_hidden", [hidden], 0.3),
        ("norm", [hidden], 0.3),
    ]:
        values = (scale * rng.standard_normal(shape)).astype(np.float32)
        tensors[f"mtp.{name}.weight"] = ("F32", shape, values.tobytes())
    write_safetensors(directory / "model.safetensors", tensors)
    return directory
