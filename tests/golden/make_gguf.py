"""GGUF files of llama.cpp's own converter, the checkpoints that they were made from, and what the `gguf` package makes of
random blocks: `gguf/`.

    pip install torch transformers safetensors gguf
    python tests/golden/make_gguf.py LLAMA_CPP

`LLAMA_CPP` is a source tree of llama.cpp with `convert_hf_to_gguf.py`; recorded with that inside llama-cpp-python 0.3.36
and gguf 0.19.

| file | what it is |
|---|---|
| dense/, moe/ | checkpoints as Hugging Face stores them, random, with a tokenizer; moe has an MTP module and bf16 |
| dense-f32.gguf, moe-bf16.gguf, moe-q8_0.gguf | what the converter makes of them |
| blocks.safetensors | random blocks of each quantised type, and `expected.<type>` by `gguf.dequantize` |

Of the converter one thing is replaced: it knows a pre-tokenizer by the hash of a text's tokens, and no small vocabulary
has that hash. Ratios of heads are above one, and in moe a block of 32 inputs of the output projection is two heads.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gguf_file
import quantised
import tiny

OUT = Path(__file__).resolve().parent / "gguf"
VOCAB = 280  # the tokens of `tiny`, and a few rows without any
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
QUANTISED = ["Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K"]
ROPE = {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
SHARED = {
    "dtype": "float32",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_key_value_heads": 1,
    "linear_num_key_heads": 2,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": ROPE | {"mrope_interleaved": True},
    "eos_token_id": 256 + len(tiny.MERGED) + tiny.ADDED.index("<|im_end|>"),
}
DENSE = SHARED | {
    "model_type": "qwen3_5_text",
    "architectures": ["Qwen3_5ForCausalLM"],
    "tie_word_embeddings": True,
    "num_attention_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "intermediate_size": 48,
    "full_attention_interval": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
MOE = SHARED | {
    "model_type": "qwen3_5_moe_text",
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
    "num_attention_heads": 3,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["full_attention", "linear_attention"],
    "mtp_num_hidden_layers": 1,
}
RNG = np.random.default_rng(20261122)


def normal(*shape, scale):
    return torch.from_numpy((scale * RNG.standard_normal(shape)).astype(np.float32))


def matrix(rows, cols):
    return normal(rows, cols, scale=1.5 * cols**-0.5)


def layer(c, kind):
    """The tensors of a layer, with names behind its prefix."""
    hidden, out = c["hidden_size"], {}
    norm = lambda n: normal(n, scale=0.3)
    out |= {f"{name}.weight": norm(hidden) for name in ("input_layernorm", "post_attention_layernorm")}
    if kind == "full_attention":
        q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
        shapes = {
            "q_proj": (2 * q, hidden),
            "k_proj": (kv, hidden),
            "v_proj": (kv, hidden),
            "o_proj": (hidden, q),
        }
        out |= {f"self_attn.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        out |= {f"self_attn.{name}.weight": norm(c["head_dim"]) for name in ("q_norm", "k_norm")}
    else:
        heads, v_dim = c["linear_num_value_heads"], c["linear_value_head_dim"]
        channels = 2 * c["linear_num_key_heads"] * c["linear_key_head_dim"] + heads * v_dim
        shapes = {"in_proj_qkv": (channels, hidden), "in_proj_z": (heads * v_dim, hidden)}
        shapes |= {
            "in_proj_b": (heads, hidden),
            "in_proj_a": (heads, hidden),
            "out_proj": (hidden, heads * v_dim),
        }
        out |= {f"linear_attn.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        out["linear_attn.conv1d.weight"] = normal(channels, 1, c["linear_conv_kernel_dim"], scale=0.5)
        out["linear_attn.A_log"] = torch.from_numpy(np.log(RNG.uniform(0.5, 8, heads)).astype(np.float32))
        out["linear_attn.dt_bias"] = normal(heads, scale=1.0)
        out["linear_attn.norm.weight"] = 1 + norm(v_dim)
    triple = lambda width: {
        "gate_proj": (width, hidden),
        "up_proj": (width, hidden),
        "down_proj": (hidden, width),
    }
    if "num_experts" not in c:
        return out | {f"mlp.{n}.weight": matrix(*s) for n, s in triple(c["intermediate_size"]).items()}
    experts, width = c["num_experts"], c["moe_intermediate_size"]
    out["mlp.gate.weight"] = matrix(experts, hidden)
    out["mlp.shared_expert_gate.weight"] = matrix(1, hidden)
    shared = triple(c["shared_expert_intermediate_size"])
    out |= {f"mlp.shared_expert.{n}.weight": matrix(*s) for n, s in shared.items()}
    out["mlp.experts.gate_up_proj"] = normal(experts, 2 * width, hidden, scale=1.5 * hidden**-0.5)
    out["mlp.experts.down_proj"] = normal(experts, hidden, width, scale=1.5 * width**-0.5)
    return out


def checkpoint(folder, config, prefix, described):
    """A random checkpoint with a tokenizer, a template and defaults of sampling."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    c, hidden = config, config["hidden_size"]
    tensors = {f"{prefix}embed_tokens.weight": normal(VOCAB, hidden, scale=0.5)}
    tensors[f"{prefix}norm.weight"] = normal(hidden, scale=0.3)
    for i, kind in enumerate(c["layer_types"]):
        tensors |= {f"{prefix}layers.{i}.{name}": value for name, value in layer(c, kind).items()}
    if not c["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(VOCAB, hidden, scale=0.5)
    if c.get("mtp_num_hidden_layers"):
        tensors |= {f"mtp.layers.0.{name}": value for name, value in layer(c, "full_attention").items()}
        tensors["mtp.fc.weight"] = matrix(hidden, 2 * hidden)
        for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
            tensors[f"mtp.{name}.weight"] = normal(hidden, scale=0.3)
    if c["dtype"] == "bfloat16":
        tensors = {name: value.to(torch.bfloat16) for name, value in tensors.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n")
    generation = {"eos_token_id": c["eos_token_id"], "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    (folder / "generation_config.json").write_text(json.dumps(generation) + "\n")
    tiny.write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


CONVERT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import convert_hf_to_gguf
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen35"
convert_hf_to_gguf.main()
"""


def convert(llama_cpp, folder, kind, out, *options):
    """By the converter's own `main`, with the `gguf` package of its tree."""
    command = [
        sys.executable,
        "-c",
        CONVERT,
        llama_cpp,
        folder,
        "--outtype",
        kind,
        "--outfile",
        out,
        *options,
    ]
    subprocess.run([str(word) for word in command], check=True)


def blocks():
    """Random bytes, with scales that are numbers."""
    import gguf

    tensors = {}
    for name in QUANTISED:
        kind = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows, cols = 3, 512
        raw = RNG.integers(0, 256, (rows, cols // block, size), dtype=np.uint8)
        for at in gguf_file.SCALES[name]:
            scale = RNG.uniform(-0.05, 0.05, raw.shape[:2]).astype(np.float16)
            raw[:, :, at : at + 2] = scale[..., None].view(np.uint8)
        raw = raw.reshape(rows, -1)
        wide = gguf.dequantize(raw, kind)
        assert wide.dtype == np.float32 and wide.shape == (rows, cols)
        assert quantised.same_bits(gguf_file.decode(name, raw), wide), name
        tensors[name], tensors[f"expected.{name}"] = torch.from_numpy(raw), torch.from_numpy(wide.copy())
    save_file(tensors, OUT / "blocks.safetensors")


def main():
    OUT.mkdir(exist_ok=True)
    moe = {
        "model_type": "qwen3_5_moe",
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "tie_word_embeddings": False,
        "text_config": MOE,
    }
    checkpoint(OUT / "dense", DENSE, "model.", DENSE)
    checkpoint(OUT / "moe", MOE, "model.language_model.", moe)
    blocks()
    with tempfile.TemporaryDirectory() as scratch:
        # Without the option it wants an MTP module.
        for name, kind, *options in [("dense", "f32", "--no-mtp"), ("moe", "bf16"), ("moe", "q8_0")]:
            # It reads whatever lies beside the weights.
            source = shutil.copytree(OUT / name, Path(scratch) / f"{name}-{kind}" / name)
            convert(sys.argv[1], source, kind, OUT / f"{name}-{kind}.gguf", *options)


if __name__ == "__main__":
    main()
