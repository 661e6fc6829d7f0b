"""Makes the committed goldens: small random checkpoints and what Transformers says about them.

    python tests/golden/make_goldens.py                  # everything, into tests/golden/data
    python tests/golden/make_goldens.py --only moe_r4    # one case

Needs torch, transformers and safetensors; the tests that read the result need numpy only. Each case is
a directory in the published layout (`config.json`, `generation_config.json`, safetensors) with

    expected.npz    per prompt i: prompt_i, greedy_i (the continuation), rows_i (positions kept of
                    prompt + greedy[:-1]) and logits_i (float32, one row per position kept); for a bf16
                    checkpoint also logits_bf16_i, from the reference's own bf16 run of the same tokens
    expected.json   what the case covers, the margins found, the versions that made it

The logits are Transformers' own in float32 arithmetic (16-bit weights widened), one sequence at a time.
Prompts are drawn until every routing decision and every greedy choice is clear by a margin, so that
float32 rounding cannot flip one. `ops.npz` holds inputs and outputs of Transformers' single functions.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
from geometries import CASES, FULL, LINEAR, MOE
from make_ops import make_ops
from reference import Net

DATA = Path(__file__).resolve().parent / "data"
ARGMAX_MARGIN = 1e-3  # of the largest logit magnitude: five times what the tests allow a logit to move
ROUTER_MARGIN = 1e-4  # in router logits, which are of order one


# ----------------------------------------------------------------------------------------- checkpoints


def base_config(case):
    fields = {
        "model_type": f"{case.kind}_text",
        "dtype": case.dtype,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attn_output_gate": True,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "eos_token_id": 3,
    }
    return fields | case.text


def layer_types(text):
    interval = text.get("full_attention_interval", 4)
    default = [LINEAR if (i + 1) % interval else FULL for i in range(text["num_hidden_layers"])]
    return text.get("layer_types") or default


def write_config(case, directory):
    text = base_config(case)
    architecture = "Qwen3_5Moe" if case.kind == MOE else "Qwen3_5"
    config = text | {"architectures": [architecture + "ForCausalLM"]}
    if case.nested:
        # Ids of the vision tokens must lie inside the small vocabulary.
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        config = {
            "architectures": [architecture + "ForConditionalGeneration"],
            "model_type": case.kind,
            "dtype": case.dtype,
            "tie_word_embeddings": text["tie_word_embeddings"],
            "text_config": text,
            "vision_config": vision_config(case),
        } | {name: text["vocab_size"] - 1 - i for i, name in enumerate(names)}
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    generation = {
        "bos_token_id": 2,
        "eos_token_id": [3, 2],
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
    }
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")


def vision_config(case):
    return {
        "model_type": f"{case.kind}_vision",
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "num_position_embeddings": 16,
        "out_hidden_size": case.text["hidden_size"],
    }


def mixer_shapes(text, kind):
    hidden, head_dim = text["hidden_size"], text["head_dim"]
    q, kv = text["num_attention_heads"] * head_dim, text["num_key_value_heads"] * head_dim
    if kind == FULL:
        return {
            "self_attn.q_proj.weight": (2 * q, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, q),
            "self_attn.q_norm.weight": (head_dim,),
            "self_attn.k_norm.weight": (head_dim,),
        }
    v_heads, v_dim = text["linear_num_value_heads"], text["linear_value_head_dim"]
    channels = 2 * text["linear_num_key_heads"] * text["linear_key_head_dim"] + v_heads * v_dim
    return {
        "linear_attn.in_proj_qkv.weight": (channels, hidden),
        "linear_attn.in_proj_z.weight": (v_heads * v_dim, hidden),
        "linear_attn.in_proj_b.weight": (v_heads, hidden),
        "linear_attn.in_proj_a.weight": (v_heads, hidden),
        "linear_attn.conv1d.weight": (channels, 1, text["linear_conv_kernel_dim"]),
        "linear_attn.A_log": (v_heads,),
        "linear_attn.dt_bias": (v_heads,),
        "linear_attn.norm.weight": (v_dim,),
        "linear_attn.out_proj.weight": (hidden, v_heads * v_dim),
    }


def mlp_shapes(prefix, hidden, width):
    return {
        f"{prefix}gate_proj.weight": (width, hidden),
        f"{prefix}up_proj.weight": (width, hidden),
        f"{prefix}down_proj.weight": (hidden, width),
    }


def layer_shapes(text, kind):
    hidden = text["hidden_size"]
    shapes = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    shapes |= mixer_shapes(text, kind)
    if "num_experts" not in text:
        return shapes | mlp_shapes("mlp.", hidden, text["intermediate_size"])
    experts, width = text["num_experts"], text["moe_intermediate_size"]
    shapes |= mlp_shapes("mlp.shared_expert.", hidden, text["shared_expert_intermediate_size"])
    return shapes | {
        "mlp.gate.weight": (experts, hidden),
        "mlp.experts.gate_up_proj": (experts, 2 * width, hidden),
        "mlp.experts.down_proj": (experts, hidden, width),
        "mlp.shared_expert_gate.weight": (1, hidden),
    }


def text_shapes(text):
    """Every tensor of the text model, without the prefix `model.` or `model.language_model.`."""
    hidden, vocab = text["hidden_size"], text["vocab_size"]
    shapes = {"embed_tokens.weight": (vocab, hidden), "norm.weight": (hidden,)}
    for layer, kind in enumerate(layer_types(text)):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in layer_shapes(text, kind).items()}
    if not text["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def extra_shapes(case):
    """The vision tower and the MTP module, under their full names."""
    text, v = base_config(case), vision_config(case)
    hidden, width, ffn, patch = text["hidden_size"], v["hidden_size"], v["intermediate_size"], v["patch_size"]
    linears = {
        "blocks.0.attn.qkv": (3 * width, width),
        "blocks.0.attn.proj": (width, width),
        "blocks.0.mlp.linear_fc1": (ffn, width),
        "blocks.0.mlp.linear_fc2": (width, ffn),
        "merger.linear_fc1": (4 * width, 4 * width),
        "merger.linear_fc2": (hidden, 4 * width),
        "patch_embed.proj": (width, 3, 2, patch, patch),
        "blocks.0.norm1": (width,),
        "blocks.0.norm2": (width,),
        "merger.norm": (width,),
    }
    shapes = {f"model.visual.{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"model.visual.{name}.bias": shape[:1] for name, shape in linears.items()}
    shapes["model.visual.pos_embed.weight"] = (v["num_position_embeddings"], width)
    shapes |= {
        f"mtp.{name}.weight": (hidden,) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    }
    shapes["mtp.fc.weight"] = (hidden, 2 * hidden)
    return shapes | {f"mtp.layers.0.{name}": shape for name, shape in layer_shapes(text, FULL).items()}


def random_tensor(name, shape, rng, tied=False):
    """Values of a trained model's scale: logits of several units, decays from slow to fast, uneven norms."""
    normal = rng.standard_normal(shape)
    if name.endswith("A_log"):
        values = np.log(rng.uniform(0.05, 8, shape))
    elif name.endswith("dt_bias"):  # softplus(dt_bias) from 0.001 to 0.5
        values = np.log(np.expm1(np.exp(rng.uniform(math.log(1e-3), math.log(0.5), shape))))
    elif name.endswith("linear_attn.norm.weight"):
        values = 1 + 0.3 * normal
    elif name.endswith(("q_norm.weight", "k_norm.weight")):
        values = 0.3 + 0.3 * normal
    elif len(shape) == 1:
        values = 0.25 * normal
    elif name.endswith("embed_tokens.weight") and not tied:
        values = normal
    elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
        values = 3 * normal / math.sqrt(shape[-1])
    elif name.endswith("conv1d.weight"):
        values = 0.8 * normal / math.sqrt(shape[-1])
    elif name.endswith(("in_proj_a.weight", "in_proj_b.weight", "mlp.gate.weight")):
        values = 1.5 * normal / math.sqrt(shape[-1])
    else:
        values = normal / math.sqrt(shape[-1])
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def checkpoint_tensors(case):
    """What goes into the files: final names, dtypes and expert layout."""
    text = base_config(case)
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    tied = text["tie_word_embeddings"]
    tensors = {}
    for name, shape in text_shapes(text).items():
        prefix = "" if name == "lm_head.weight" else "model.language_model." if case.nested else "model."
        tensors[prefix + name] = random_tensor(name, shape, rng, tied)
    if case.extras:
        tensors |= {name: random_tensor(name, shape, rng) for name, shape in extra_shapes(case).items()}
    split = {}
    for name, tensor in tensors.items():
        released = torch.float32 if name.endswith(("A_log", "linear_attn.norm.weight")) else None
        tensor = tensor.to(released if released and case.f32_decay else getattr(torch, case.dtype))
        stem, _, leaf = name.rpartition(".")
        if stem.endswith("mlp.experts") and (case.per_expert or name.startswith("mtp.")):
            for e, matrix in enumerate(tensor):
                parts = (
                    {"down": matrix} if leaf == "down_proj" else dict(zip(("gate", "up"), matrix.chunk(2)))
                )
                split |= {f"{stem}.{e}.{part}_proj.weight": m.contiguous() for part, m in parts.items()}
        else:
            split[name] = tensor
    return split


def write_checkpoint(case, directory):
    directory.mkdir(parents=True, exist_ok=True)
    write_config(case, directory)
    tensors = checkpoint_tensors(case)
    if case.shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for shard in range(case.shards):
        file = f"model-{shard + 1:05}-of-{case.shards:05}.safetensors"
        part = names[shard * len(names) // case.shards : (shard + 1) * len(names) // case.shards]
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


# --------------------------------------------------------------------------------------- Transformers


def load(directory, dtype="float32"):
    """The reference model of a checkpoint directory; every tensor must have found its place."""
    architecture = json.loads((Path(directory) / "config.json").read_text())["architectures"][0]
    model, found = getattr(transformers, architecture).from_pretrained(
        directory,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    problems = {key: value for key, value in found.items() if value and key != "error_msgs"}
    allowed = {"missing_keys": {"lm_head.weight"}}  # where it is tied
    for key, names in problems.items():
        left = {str(n) for n in names if not str(n).startswith(("mtp.", "model.visual."))} - allowed.get(
            key, set()
        )
        assert not left, (directory, key, left)
    return model.eval()


@torch.inference_mode()
def forward(model, token_ids):
    """Logits [tokens, vocab] and, for each MoE layer, router logits [tokens, experts], of one whole pass."""
    more = {"output_router_logits": True} if "Moe" in type(model).__name__ else {}
    out = model(torch.tensor([list(map(int, token_ids))]), use_cache=False, **more)
    routers = [r.float().reshape(len(token_ids), -1) for r in out.router_logits] if more else []
    return out.logits[0].float(), routers


@torch.inference_mode()
def greedy(model, prompt, num_tokens):
    """The greedy continuation, one token at a time on the reference's own cache."""
    tokens = []
    if FULL not in model.config.get_text_config().layer_types:  # a cache it can neither size nor mask
        while len(tokens) < num_tokens:
            tokens.append(int(forward(model, [*prompt, *tokens])[0][-1].argmax()))
        return tokens
    # By place: Transformers 5.24 renamed `past_key_values`, the fourth, to `cache`.
    cache, step = transformers.DynamicCache(config=model.config), list(map(int, prompt))
    while len(tokens) < num_tokens:
        out = model(torch.tensor([step]), None, None, cache, use_cache=True)
        step = [int(out.logits[0, -1].argmax())]
        tokens += step
    return tokens


def kept_rows(prompt_len, num_rows):
    """Positions whose logits are stored: both ends, both sides of every chunk border, some of the decode."""
    rows = {0, 1, 2, prompt_len - 2, prompt_len - 1, prompt_len, prompt_len + 7, num_rows - 1}
    rows |= {border + side for border in range(64, num_rows, 64) for side in (-1, 0, 1)}
    return np.array(sorted(r for r in rows if 0 <= r < num_rows), np.int32)


def router_gap(routers, top_k):
    """The smallest difference between the last expert chosen and the first refused."""
    gaps = [torch.inf]
    for logits in routers:
        if top_k < logits.shape[1]:
            ordered = logits.sort(dim=1, descending=True).values
            gaps.append(float((ordered[:, top_k - 1] - ordered[:, top_k]).min()))
    return min(gaps)


def clear_prompt(model, text, length, num_greedy, seed, attempts=400):
    """A prompt, its continuation, and the logits of both, with no near tie in routing or in the choices."""
    for attempt in range(attempts):
        rng = np.random.default_rng([seed, length, attempt])
        prompt = rng.integers(4, text["vocab_size"] - 4, length).astype(np.int32)
        tokens = greedy(model, prompt, num_greedy)
        logits, routers = forward(model, [*prompt, *tokens[:-1]])
        top = logits[length - 1 :].topk(2, dim=1)
        argmax_gap = float((top.values[:, 0] - top.values[:, 1]).min() / logits.abs().max())
        gap = router_gap(routers, text.get("num_experts_per_tok", 0))
        if argmax_gap < ARGMAX_MARGIN or gap < ROUTER_MARGIN:
            continue
        assert top.indices[:, 0].tolist() == tokens, "the cached and the whole pass disagree"
        return prompt, np.array(tokens, np.int32), logits.numpy(), argmax_gap, gap
    raise SystemExit(f"no clear prompt of {length} tokens in {attempts} attempts")


def distance(a, b):
    """Largest and root-mean-square difference, as shares of the largest magnitude of `b`."""
    scale = np.abs(b).max()
    return {"max": float(np.abs(a - b).max() / scale), "rms": float(np.sqrt(((a - b) ** 2).mean()) / scale)}


def make_case(case, directory, log=print):
    """Writes one case into `directory` and returns its expected.json."""
    shutil.rmtree(directory, ignore_errors=True)
    write_checkpoint(case, directory)
    text, model, net = base_config(case), load(directory), Net(directory)
    half = load(directory, "bfloat16") if case.dtype == "bfloat16" else None
    arrays, prompts = {}, []
    for i, length in enumerate(case.prompts):
        seed = zlib.crc32(case.name.encode())
        prompt, tokens, logits, argmax_gap, gap = clear_prompt(model, text, length, case.num_greedy, seed)
        sequence = [*prompt, *tokens[:-1]]
        rows = kept_rows(length, len(sequence))
        arrays |= {
            f"prompt_{i}": prompt,
            f"greedy_{i}": tokens,
            f"rows_{i}": rows,
            f"logits_{i}": logits[rows],
        }
        facts = {
            "length": length,
            "largest_logit": float(np.abs(logits).max()),
            "logit_spread": float(logits.std()),
        }
        facts |= {"argmax_margin": argmax_gap, "router_margin": gap if math.isfinite(gap) else None}
        facts["from_float64"] = distance(logits, net(sequence))
        if half is not None:
            arrays[f"logits_bf16_{i}"] = forward(half, sequence)[0].numpy()[rows]
            facts["bf16_run"] = distance(arrays[f"logits_bf16_{i}"], logits[rows])
        prompts.append(facts)
        log(f"  {case.name} {facts}")
    np.savez_compressed(directory / "expected.npz", **arrays)
    expected = {
        "about": case.about,
        "dtype": case.dtype,
        "prompts": prompts,
        "argmax_margin": min(p["argmax_margin"] for p in prompts),
        "router_margin": min((p["router_margin"] for p in prompts if p["router_margin"]), default=None),
        "made_by": {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]},
    }
    (directory / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    return expected


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[*(case.name for case in CASES), "ops"])
    parser.add_argument("--output", type=Path, default=DATA)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the same sums in the same order
    transformers.logging.set_verbosity_error()
    args.output.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        if not args.only or case.name in args.only:
            with tempfile.TemporaryDirectory() as directory:  # a case is whole or absent
                expected = make_case(case, Path(directory) / case.name)
                shutil.rmtree(args.output / case.name, ignore_errors=True)
                shutil.copytree(Path(directory) / case.name, args.output / case.name)
            size = sum(f.stat().st_size for f in (args.output / case.name).iterdir())
            margins = {key: expected[key] for key in ("argmax_margin", "router_margin")}
            print(f"{case.name}: {size / 1000:.0f} kB, {margins}")
    if not args.only or "ops" in args.only:
        np.savez_compressed(args.output / "ops.npz", **make_ops())


if __name__ == "__main__":
    main()
