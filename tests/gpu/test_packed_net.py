"""Models whose matrices keep their codes on the GPU, against the CPU, which computes with decoded matrices in f32.

The bound is the same model with its decoded matrices rounded to bf16: codes are exact, so they may only be closer.
"""

import json

import gguf_file as g
import numpy as np
import pytest
import quantised as q
import test_gguf as gguf
import test_quantised as whole
from qwen35rs import LLM, SamplingParams

pytestmark = pytest.mark.gpu

HIDDEN, WIDTH, VOCAB, EXPERTS = 256, 64, 512, 16
CONFIG = {
    "model_type": "qwen3_5_moe",
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen3_5_moe_text",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attn_output_gate": True,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "eos_token_id": 3,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 4,
        "vocab_size": VOCAB,
        "head_dim": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": WIDTH,
        "shared_expert_intermediate_size": 2 * WIDTH,
        "full_attention_interval": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
    },
}


def tensors():
    """The checkpoint's, in bf16, about as large as trained ones."""
    rng = np.random.default_rng(5)
    drawn = {}

    def draw(name, *shape, scale=1.0, mean=0.0):
        fan_in = shape[-1] if len(shape) > 1 else 1
        drawn[name] = q.tensor("BF16", mean + scale * fan_in**-0.5 * rng.standard_normal(shape))

    draw("model.language_model.embed_tokens.weight", VOCAB, HIDDEN, scale=8)
    draw("model.language_model.norm.weight", HIDDEN, scale=0.1)
    draw("lm_head.weight", VOCAB, HIDDEN, scale=3)
    for i in range(4):
        layer = f"model.language_model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            draw(f"{layer}{norm}.weight", HIDDEN, scale=0.1)
        if i < 3:
            mixer = f"{layer}linear_attn."
            for name, rows in (("qkv", 512), ("z", 256), ("b", 4), ("a", 4)):
                draw(f"{mixer}in_proj_{name}.weight", rows, HIDDEN)
            draw(f"{mixer}conv1d.weight", 512, 1, 4)
            draw(f"{mixer}A_log", 4, scale=0.3, mean=1.0)
            draw(f"{mixer}dt_bias", 4, scale=0.3, mean=-3.0)
            draw(f"{mixer}norm.weight", 64, scale=0.1, mean=1.0)
            draw(f"{mixer}out_proj.weight", HIDDEN, 256)
        else:
            mixer = f"{layer}self_attn."
            for name, rows in (("q", 512), ("k", 128), ("v", 128)):
                draw(f"{mixer}{name}_proj.weight", rows, HIDDEN)
            draw(f"{mixer}o_proj.weight", HIDDEN, 256)
            for name in ("q_norm", "k_norm"):
                draw(f"{mixer}{name}.weight", 64, scale=0.1)
        mlp = f"{layer}mlp."
        draw(f"{mlp}gate.weight", EXPERTS, HIDDEN, scale=2)
        draw(f"{mlp}shared_expert_gate.weight", 1, HIDDEN)
        names = [(f"{mlp}experts.{e}.", WIDTH) for e in range(EXPERTS)]
        for base, width in [*names, (f"{mlp}shared_expert.", 2 * WIDTH)]:
            draw(f"{base}gate_proj.weight", width, HIDDEN)
            draw(f"{base}up_proj.weight", width, HIDDEN)
            draw(f"{base}down_proj.weight", HIDDEN, width)
    return drawn


def packed(group, **more):
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group}
    return whole.compressed("pack-quantized", weights | more)


# Of each format its configuration, how a matrix is made, how it is decoded.
FORMATS = {
    "fp8 blocks": whole.FORMATS["fp8"],
    "fp8 rows": whole.FORMATS["fp8 per row"],
    "fp8 one scale": whole.FORMATS["fp8 per matrix"],
    "gptq 128": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
        lambda x: q.make_gptq(x, 128, symmetric=True),
        lambda parts: q.decode_gptq(parts, 128),
    ),
    "gptq 32 with zero points": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False},
        lambda x: q.make_gptq(x, 32),
        lambda parts: q.decode_gptq(parts, 32),
    ),
    "awq 64": (
        {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
        lambda x: q.make_awq(x, 64),
        lambda parts: q.decode_awq(parts, 64),
    ),
    "packed 128": (packed(128), lambda x: q.make_packed(x, 128), lambda parts: q.decode_packed(parts, 128)),
    "packed 32 with zero points": (
        packed(32, symmetric=False),
        lambda x: q.make_packed(x, 32, "F16", symmetric=False),
        lambda parts: q.decode_packed(parts, 32),
    ),
    "nvfp4 of modelopt": whole.FORMATS["nvfp4 of modelopt"],
    "nvfp4 of compressed-tensors": whole.FORMATS["nvfp4 of compressed-tensors"],
}
KEPT = {
    "all": whole.KEPT,
    "not the shared expert": (*whole.KEPT, "shared_expert."),
    "experts alone": (*whole.KEPT, "shared_expert.", "linear_attn", "self_attn"),
}


def write(folder, name, kept):
    config, make, decode = FORMATS[name]
    stored, plain = {}, {}
    for key, entry in tensors().items():
        stored[key] = entry
        plain[key] = q.tensor("F32", q.numbers(entry))
        if whole.is_quantised(key, KEPT[kept]) and "norm" not in key:
            parts = make(q.numbers(entry))
            del stored[key]
            stored |= {key.removesuffix("weight") + part: value for part, value in parts.items()}
            plain[key] = q.tensor("F32", decode(parts))
    one = whole.write(folder / "one", CONFIG | {"quantization_config": config}, stored)
    return one, whole.write(folder / "plain", CONFIG, plain)


def distance(found, want):
    return np.linalg.norm(found - want) / np.linalg.norm(want)


def logprobs(logits, tokens):
    """Of each row's token."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide[np.arange(len(tokens)), tokens] - np.log(np.exp(wide).sum(-1))


PROMPT = np.random.default_rng(3).integers(0, VOCAB, 150).tolist()


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_as_close_as_bf16(name, kept, tmp_path):
    one, plain = write(tmp_path, name, kept)
    on_cpu = LLM(one, device="cpu")
    want = on_cpu.logits(PROMPT)
    assert np.array_equal(want, LLM(plain, device="cpu").logits(PROMPT))
    on_gpu, rounded = LLM(one, device="cuda"), LLM(plain, device="cuda")
    assert on_gpu.memory["weights"] < 0.8 * rounded.memory["weights"]
    # All rows at once. A token whose routing is nearly a tie may go either way.
    bf16 = rounded.logits(PROMPT)
    assert distance(on_gpu.logits(PROMPT), want) < 1.25 * distance(bf16, want)
    # Rows by steps of one, and of twenty sequences: their log-probabilities, told for the tokens that they chose. The
    # median, since one token whose routing went the other way is far off.
    best = want.argmax(-1)
    noise = np.median(np.abs(logprobs(bf16, best) - logprobs(want, best)))
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)
    alone = on_gpu.generate([{"prompt_token_ids": PROMPT}], params)
    for answer in (alone[0], on_gpu.generate([{"prompt_token_ids": PROMPT}] * 20, params)[7]):
        tokens = list(answer.outputs[0].token_ids)
        told = [answer.outputs[0].logprobs[i][token].logprob for i, token in enumerate(tokens)]
        exact = logprobs(on_cpu.logits(PROMPT + tokens)[len(PROMPT) - 1 : -1], tokens)
        assert np.median(np.abs(np.array(told) - exact)) < 2 * noise


@pytest.mark.parametrize("count", [8, 90])
@pytest.mark.parametrize("kind", gguf.QUANTISED)
def test_types_of_gguf(kind, count, tmp_path):
    """They keep their codes, also where the file has heads in another order."""
    values, stored, config = gguf.wide(kind)
    one = g.write(tmp_path / "one.gguf", values, stored)
    plain = g.as_hugging_face(stored, config, tmp_path / "plain")
    prompt = gguf.ids(count)
    want = LLM(one, device="cpu").logits(prompt)
    on_gpu, rounded = LLM(one, device="cuda"), LLM(plain, device="cuda")
    assert on_gpu.memory["weights"] < 0.8 * rounded.memory["weights"]
    assert distance(on_gpu.logits(prompt), want) < 1.25 * distance(rounded.logits(prompt), want)


def sparse_of_gguf():
    """A sparse model of Q4_K with some Q6_K, whose rows are whole blocks, and its config.json; value heads of 128."""
    values, tensors = g.read(gguf.GOLDEN / "moe-q8_0.gguf")
    sizes = {"embedding_length": 256, "attention.head_count": 2, "rope.dimension_count": 32}
    sizes |= {"attention.key_length": 128, "attention.value_length": 128, "ssm.inner_size": 512}
    sizes |= {"expert_feed_forward_length": 256, "expert_shared_feed_forward_length": 256}
    values |= {f"qwen35moe.{key}": (g.U32, value) for key, value in sizes.items()}
    values["qwen35moe.rope.dimension_sections"] = ((g.LIST, 5), [11, 11, 10, 0])
    shapes = {"attn_q": [512, 256], "attn_k": [128, 256], "attn_v": [128, 256], "attn_output": [256, 256]}
    shapes |= {"attn_q_norm": [128], "attn_k_norm": [128], "ssm_norm": [128], "ssm_out": [256, 512]}
    shapes |= {"attn_qkv": [576, 256], "attn_gate": [512, 256], "ssm_conv1d": [576, 4], "eh_proj": [256, 512]}
    rng, out = np.random.default_rng(12), {}
    for name, (stored, shape, _) in tensors.items():
        stem = name.split(".")[-2 if name.endswith(("weight", "bias")) else -1]
        # Heads and experts stay as many as they are.
        shape = shapes.get(stem, [x if x in (3, 4, 280) and i == 0 else 256 for i, x in enumerate(shape)])
        if stem == "ffn_gate_inp_shexp":
            shape = [1, 256]
        x = rng.standard_normal(shape).astype(np.float32)
        if stem == "ssm_a":
            x = -np.exp(x)
        elif "norm" in stem:
            x = 1 + np.float32(0.3) * x
        elif stem.startswith("ffn_gate_inp"):
            x *= np.float32(0.1)
        plain = len(shape) == 1 or stem.startswith(("ffn_gate_inp", "ssm_conv1d"))
        kind = "Q6_K" if stem in ("ffn_down_exps", "attn_v", "output") else "Q4_K"
        size = 0.35 if stem == "token_embd" else 0.06
        out[name] = q.tensor("F32", x) if plain else g.random_blocks(rng, kind, shape, size)
    config = gguf.config_of("moe-q8_0")
    config["text_config"] |= {
        "hidden_size": 256,
        "head_dim": 128,
        "num_attention_heads": 2,
        "linear_value_head_dim": 128,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.25},
    }
    return values, out, config


@pytest.mark.parametrize("count", [8, 90])
def test_experts_of_gguf(count, tmp_path):
    values, stored, config = sparse_of_gguf()
    one = g.write(tmp_path / "one.gguf", values, stored)
    plain = g.as_hugging_face(stored, config, tmp_path / "plain")
    prompt = gguf.ids(count)
    want = LLM(one, device="cpu").logits(prompt)
    assert np.array_equal(want, LLM(plain, device="cpu").logits(prompt))
    on_gpu, rounded = LLM(one, device="cuda"), LLM(plain, device="cuda")
    assert on_gpu.memory["weights"] < 0.6 * rounded.memory["weights"]
    # By token: one whose routing is nearly a tie may go either way.
    found, bf16 = (np.median(np.linalg.norm(llm.logits(prompt) - want, axis=1)) for llm in (on_gpu, rounded))
    assert found < 1.25 * bf16


@pytest.mark.parametrize("scheme", ["int4", "fp8", "mixed"])
def test_quantised_on_the_device(scheme, tmp_path):
    """The GPU quantises to the numbers that the CPU quantises to."""
    plain = whole.write(tmp_path / "plain", CONFIG, tensors())
    on_gpu, on_cpu = (LLM(plain, device=d, quantization=scheme) for d in ("cuda", "cpu"))
    unquantised = LLM(plain, device="cpu").logits(PROMPT)
    want = on_cpu.logits(PROMPT)
    noise = distance(LLM(plain, device="cuda").logits(PROMPT), unquantised)
    assert distance(on_gpu.logits(PROMPT), want) < 1.25 * noise < distance(unquantised, want)


@pytest.mark.parametrize(
    ("name", "kept", "scheme"),
    [
        ("fp8 blocks", "all", "int4"),
        ("fp8 blocks", "all", "mixed"),
        ("gptq 128", "experts alone", "mixed"),
    ],
)
def test_codes_are_quantised_on_the_device(name, kept, scheme, tmp_path):
    """Those of more bits than are asked for anew, and what beside 4 bits has none, as the CPU does."""
    one, plain = write(tmp_path, name, kept)
    on_gpu, on_cpu = (LLM(one, device=d, quantization=scheme) for d in ("cuda", "cpu"))
    assert on_gpu.memory["weights"] < LLM(one, device="cuda").memory["weights"]
    unquantised, want = LLM(one, device="cpu").logits(PROMPT), on_cpu.logits(PROMPT)

    def apart(logits, other):
        """By token: one whose routing is nearly a tie may go either way."""
        return np.median(np.linalg.norm(logits - other, axis=1))

    noise = apart(LLM(plain, device="cuda").logits(PROMPT), unquantised)
    assert apart(on_gpu.logits(PROMPT), want) < 2 * noise < apart(unquantised, want) / 2


@pytest.mark.parametrize("scheme", ["int4", "fp8", "mixed"])
def test_random_weights_are_those_of_the_cpu(scheme, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found, want = (
        LLM(tmp_path, load_format="dummy", device=d, quantization=scheme, max_model_len=512).logits(PROMPT)
        for d in ("cuda", "cpu")
    )
    exact = LLM(tmp_path, load_format="dummy", device="cpu", max_model_len=512).logits(PROMPT)
    assert distance(found, want) < 0.03 < distance(exact, want)
