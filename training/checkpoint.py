"""The embedded model's geometry, and its files in the published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from qwen35rs import demo, vocabulary
from safetensors.torch import save_file
from torch import Tensor, nn

NUM_RANKS = 3000
_FLOAT32 = ("A_log", "linear_attn.norm.weight")  # as in the releases


_IDS = vocabulary.added_token_ids(NUM_RANKS)
# What differs from the demo's small model.
_TEXT = {
    "vocab_size": -(-(NUM_RANKS + len(vocabulary.ADDED_TOKENS)) // 64) * 64,
    "hidden_size": 256,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "max_position_embeddings": 8192,
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "router_aux_loss_coef": 0.001,
}


def text_config(**changes: Any) -> dict[str, Any]:
    """The `text_config` of config.json."""
    text: dict[str, Any] = demo.config(NUM_RANKS, **{**_TEXT, **changes})["text_config"]
    return text


def model_config(text: dict[str, Any]) -> dict[str, Any]:
    """config.json."""
    return demo.config(NUM_RANKS, **text)


def generation_config() -> dict[str, Any]:
    """generation_config.json. The model answers in one way only, so nothing is sampled by default."""
    return {
        "bos_token_id": _IDS["<|endoftext|>"],
        "eos_token_id": [_IDS["<|im_end|>"], _IDS["<|endoftext|>"]],
        "pad_token_id": _IDS["<|endoftext|>"],
        "do_sample": False,
        "max_new_tokens": 1024,
    }


def tensors(lm: nn.Module, mtp: nn.Module) -> dict[str, Tensor]:
    """Every tensor by its published name: the experts of the layers fused, those of the MTP module one by one."""
    found = {}
    for name, tensor in lm.state_dict().items():
        found[
            "lm_head.weight"
            if name == "lm_head.weight"
            else name.replace("model.", "model.language_model.", 1)
        ] = tensor
    for name, tensor in mtp.state_dict().items():
        at, dot, kind = name.rpartition(".mlp.experts.")
        if not dot:
            found[f"mtp.{name}"] = tensor
            continue
        for i, expert in enumerate(tensor):
            parts = {"gate_proj": expert.chunk(2)[0], "up_proj": expert.chunk(2)[1]}
            for part, matrix in parts.items() if kind == "gate_up_proj" else [("down_proj", expert)]:
                found[f"mtp.{at}.mlp.experts.{i}.{part}.weight"] = matrix
    return {
        name: tensor.detach()
        .to("cpu", torch.float32 if name.endswith(_FLOAT32) else torch.bfloat16)
        .contiguous()
        .clone()
        for name, tensor in found.items()
    }


def write(
    directory: str | Path, lm: nn.Module, mtp: nn.Module, text: dict[str, Any], tokenizer: str | Path
) -> int:
    """Writes the checkpoint; returns its number of parameters. `tokenizer` holds the tokenizer's files."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("config.json", model_config(text)),
        ("generation_config.json", generation_config()),
    ):
        (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).write_bytes(Path(tokenizer, name).read_bytes())
    state = tensors(lm, mtp)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return sum(t.numel() for t in state.values())


def make_tokenizer(directory: str | Path) -> Path:
    """The first ranks of the family's vocabulary, its added tokens, its chat template."""
    from qwen35rs import Tokenizer

    path = vocabulary.make(directory, NUM_RANKS)
    template = path / "chat_template.jinja"
    if not template.exists():
        template.write_text(Tokenizer(path).chat_template, encoding="utf-8")
    return path
