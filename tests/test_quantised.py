"""Checkpoints in the published quantised formats: whole models, against the same model of decoded matrices in float32.

Decoding one matrix is tested against the packages that define the formats, in the crate (`src/weights/quant/tests.rs`)
and here, where the numpy decoders of `quantised.py` meet their record. Here those decoders make the model that the engine
must equal, to the bit: whatever is dropped, doubled, transposed or exchanged between two modules changes logits.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import quantised as q
import tiny
from qwen35rs import LLM, ConfigError, OutOfMemoryError, SamplingParams, _core

GOLDEN = Path(__file__).resolve().parent / "golden"
CASES = json.loads((GOLDEN / "quant" / "cases.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_the_decoders_are_those_of_the_packages(case):
    saved = tiny.read_safetensors(GOLDEN / "quant" / f"{case}.safetensors")
    for module, facts in CASES[case]["modules"].items():
        got = q.decode(q.parts_of(saved, module), CASES[case]["quantization_config"], facts)
        assert q.same_bits(got, q.numbers(saved[f"expected.{module}"]))


# ------------------------------------------------------------------------------------------- whole models

FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
PACKED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}
NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}


def compressed(form, *weights):
    groups = {f"group_{i}": {"targets": ["Linear"], "weights": w} for i, w in enumerate(weights)}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def whole_fp8(block):
    return lambda x: q.make_fp8(x, block or x.shape, name="weight_scale_inv" if block else "weight_scale")


def row_fp8(x):
    return q.make_fp8(x, (1, x.shape[1]), "F32", "weight_scale")


# Of each format its configuration, how a matrix is made, how it is decoded, and which sizes it has.
FORMATS = {
    "fp8": (
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
        lambda x: q.make_fp8(x, (128, 128)),
        lambda parts: q.decode_fp8(parts, (128, 128)),
    ),
    "fp8 in small blocks": (
        {"quant_method": "fp8", "weight_block_size": [16, 24]},
        lambda x: q.make_fp8(x, (16, 24), "F32"),
        lambda parts: q.decode_fp8(parts, (16, 24)),
    ),
    "fp8 per row": (
        compressed("float-quantized", FP8 | {"strategy": "channel"}),
        row_fp8,
        lambda parts: q.decode_fp8(parts, None),
    ),
    "fp8 per matrix": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        whole_fp8(None),
        lambda parts: q.decode_fp8(parts, None),
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": False},
        lambda x: q.make_gptq(x, 8),
        lambda parts: q.decode_gptq(parts, 8),
    ),
    "gptq, symmetric": (
        {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True, "checkpoint_format": "gptq_v2"},
        lambda x: q.make_gptq(x, None, "BF16", minus_one=False, symmetric=True, order=False),
        lambda parts: q.decode_gptq(parts, None, minus_one=False),
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm"},
        lambda x: q.make_awq(x, 8),
        lambda parts: q.decode_awq(parts, 8),
    ),
    "pack-quantized": (
        compressed("pack-quantized", PACKED),
        lambda x: q.make_packed(x, 8),
        lambda parts: q.decode_packed(parts, 8),
    ),
    "pack-quantized, asymmetric": (
        compressed("pack-quantized", PACKED | {"symmetric": False}),
        lambda x: q.make_packed(x, 8, "F16", symmetric=False),
        lambda parts: q.decode_packed(parts, 8),
    ),
    "nvfp4 of modelopt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        lambda x: q.make_nvfp4(x, divides=False),
        q.decode_nvfp4,
    ),
    "nvfp4 of compressed-tensors": (
        compressed("nvfp4-pack-quantized", NVFP4),
        lambda x: q.make_nvfp4(x, divides=True),
        q.decode_nvfp4,
    ),
}
# A dense model, one with wide heads and one with many experts, one with an MTP module; and how many of their matrices a
# format can have, NVFP4 fewer.
SOURCES = {
    "dense_bf16": (25, 8),
    "family_heads_bf16": (55, 18),
    "moe_bf16": (298, 205),
    "moe_vision_mtp": (122, 5),
}


def fits(name, shape):
    """Whether a matrix of every format may be of this shape."""
    multiple = 16 if "nvfp4" in name else 8
    return len(shape) == 2 and shape[1] % multiple == 0 and (shape[0] % 8 == 0 or "fp8" in name)


def read(source):
    """Every tensor of a golden checkpoint, and its configuration."""
    folder, tensors = GOLDEN / "data" / source, {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= tiny.read_safetensors(path)
    return json.loads((folder / "config.json").read_text()), tensors


def one_by_one(tensors):
    """Stacked experts as the quantised releases have them."""
    split = {}
    for name, (dtype, shape, data) in tensors.items():
        base, _, last = name.rpartition(".")
        if not base.endswith(".experts"):
            split[name] = (dtype, shape, data)
            continue
        array = q.numbers((dtype, shape, data))
        for e, expert in enumerate(array):
            if last == "gate_up_proj":
                gate, up = np.split(expert, 2)
                split[f"{base}.{e}.gate_proj.weight"] = q.tensor(dtype, gate)
                split[f"{base}.{e}.up_proj.weight"] = q.tensor(dtype, up)
            else:
                split[f"{base}.{e}.down_proj.weight"] = q.tensor(dtype, expert)
    return split


# What no release quantises; and of the experts some stay as they are.
KEPT = ("in_proj_a", "in_proj_b", "conv1d", "mlp.gate.", "shared_expert_gate", "visual", "mtp.fc")
MIXED = (*KEPT, "experts.3.")


def is_quantised(name, kept):
    return "layers." in name and name.endswith(".weight") and not any(part in name for part in kept)


def write(folder, config, tensors):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tiny.write_safetensors(folder / "model.safetensors", tensors)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    return folder


def pair(folder, source, name, kept=MIXED, make=None):
    """A quantised checkpoint, and the same matrices decoded, as float32; and how many those are."""
    quantization, made, decode = FORMATS[name]
    make = make or made
    config, tensors = read(source)
    stored, plain, count = {}, {}, 0
    for key, entry in one_by_one(tensors).items():
        if is_quantised(key, kept) and fits(name, entry[1]):
            parts = make(q.numbers(entry))
            stored |= {key.removesuffix("weight") + part: value for part, value in parts.items()}
            plain[key] = q.tensor("F32", decode(parts))
            count += 1
        else:
            stored[key] = entry
            plain[key] = q.tensor("F32", q.numbers(entry))
    one = write(folder / "quantised", config | {"quantization_config": quantization}, stored)
    return one, write(folder / "plain", config, plain), count


def ids(config, n=70):
    vocab = config.get("text_config", config)["vocab_size"]
    return np.random.default_rng(3).integers(0, vocab, n).tolist()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_model_is_that_of_its_decoded_matrices(name, source, tmp_path):
    one, other, count = pair(tmp_path, source, name)
    assert count >= SOURCES[source]["nvfp4" in name]
    prompt = ids(json.loads((one / "config.json").read_text()))
    mtp = source == "moe_vision_mtp"
    got, want = LLM(one, mtp=mtp), LLM(other, mtp=mtp)
    assert np.array_equal(got.logits(prompt), want.logits(prompt))
    if mtp:
        assert np.array_equal(got.mtp_logits(prompt), want.mtp_logits(prompt))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    first, second = (llm.generate([{"prompt_token_ids": prompt}], params)[0] for llm in (got, want))
    assert list(first.outputs[0].token_ids) == list(second.outputs[0].token_ids)


@pytest.mark.parametrize("name", FORMATS)
def test_matrices_rounded_to_bf16(name, tmp_path):
    """`dtype="bfloat16"` is the decoded model, rounded."""
    one, other, _ = pair(tmp_path, "dense_bf16", name)
    prompt = ids(json.loads((one / "config.json").read_text()))
    got, want, exact = LLM(one, dtype="bfloat16"), LLM(other, dtype="bfloat16"), LLM(one)
    assert np.array_equal(got.logits(prompt), want.logits(prompt))
    assert not np.array_equal(got.logits(prompt), exact.logits(prompt))


def test_what_has_more_bits_is_quantised_anew(tmp_path):
    """To what the decoded matrices are quantised to."""
    one, other, _ = pair(tmp_path, "dense_bf16", "fp8 in small blocks")
    prompt = ids(json.loads((one / "config.json").read_text()))
    got, want, kept = LLM(one, quantization="int4"), LLM(other, quantization="int4"), LLM(one)
    assert np.array_equal(got.logits(prompt), want.logits(prompt))
    assert not np.array_equal(got.logits(prompt), kept.logits(prompt))


def test_four_bits_stay_as_they_are(tmp_path):
    one, _, _ = pair(tmp_path, "dense_bf16", "gptq", kept=KEPT)
    prompt = ids(json.loads((one / "config.json").read_text()))
    assert np.array_equal(LLM(one, quantization="int4").logits(prompt), LLM(one).logits(prompt))


def test_stacked_experts_in_fp8(tmp_path):
    """As Transformers saves a model that it quantised itself."""
    config, tensors = read("moe_bf16")
    stored, plain = {}, {}
    for key, (dtype, shape, data) in tensors.items():
        array = q.numbers((dtype, shape, data))
        plain[key] = q.tensor("F32", array)
        stored[key] = (dtype, shape, data)
        if ".experts." in key:
            parts = [q.make_fp8(x, (8, 24), "F32") for x in array]
            scales = np.stack([q.numbers(p["weight_scale_inv"]) for p in parts])
            codes = b"".join(p["weight"][2] for p in parts)
            stored[key], stored[f"{key}_scale_inv"] = ("F8_E4M3", shape, codes), q.tensor("F32", scales)
            plain[key] = q.tensor("F32", np.stack([q.decode_fp8(p, (8, 24)) for p in parts]))
    quantization = {"quant_method": "fp8", "weight_block_size": [8, 24]}
    one = write(tmp_path / "one", config | {"quantization_config": quantization}, stored)
    other = write(tmp_path / "other", config, plain)
    prompt = ids(config)
    assert np.array_equal(LLM(one).logits(prompt), LLM(other).logits(prompt))


def test_several_formats_in_one_model(tmp_path):
    """As mixed exports have it: experts in NVFP4, attention in FP8 of two kinds, the rest as it is, with the scales of
    activations and of the cache, which are not used."""
    config, tensors = read("dense_bf16")
    layers = {"a": {"quant_algo": "NVFP4"}, "b": {"quant_algo": "FP8"}}
    quantization = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    stored, plain, kinds = {}, {}, []
    for key, entry in tensors.items():
        stored[key], array = entry, q.numbers(entry)
        plain[key] = q.tensor("F32", array)
        base = key.removesuffix("weight")
        if re.search(r"mlp\.down_proj\.weight", key):
            parts, decode = q.make_nvfp4(array, False), q.decode_nvfp4
        elif re.search(r"self_attn\.[qk]_proj\.weight", key):
            parts, decode = row_fp8(array), lambda parts: q.decode_fp8(parts, None)
        elif re.search(r"linear_attn\.out_proj\.weight|v_proj\.weight", key):
            parts, decode = whole_fp8(None)(array), lambda parts: q.decode_fp8(parts, None)
        else:
            continue
        del stored[key]
        kinds.append(len(parts))
        plain[key] = q.tensor("F32", decode(parts))
        stored |= {base + part: value for part, value in parts.items()}
        stored[base + "input_scale"] = q.tensor("F32", np.float32(0.1))
        if "k_proj" in key or "v_proj" in key:
            stored[base + key.split(".")[-2][0] + "_scale"] = q.tensor("F32", np.array([0.5]))
    assert set(kinds) == {2, 3}
    one = write(tmp_path / "one", config | {"quantization_config": quantization}, stored)
    other = write(tmp_path / "other", config, plain)
    prompt = ids(config)
    assert np.array_equal(LLM(one).logits(prompt), LLM(other).logits(prompt))


def test_a_quantised_head_and_embedding(tmp_path):
    """A head of its own beside a shared embedding, both encoded."""
    config, tensors = read("moe_vision_mtp")
    quantization, make, decode = FORMATS["fp8 per row"]
    tensors = {k: v for k, v in tensors.items() if not k.startswith("mtp.")}
    config["text_config"]["mtp_num_hidden_layers"] = 0
    stored, plain = dict(tensors), dict(tensors)
    for key in [k for k in tensors if k.endswith(("embed_tokens.weight", "lm_head.weight"))]:
        parts = make(q.numbers(stored.pop(key)))
        stored |= {key.removesuffix("weight") + part: value for part, value in parts.items()}
        plain[key] = q.tensor("F32", decode(parts))
    one = write(tmp_path / "one", config | {"quantization_config": quantization}, stored)
    other = write(tmp_path / "other", config, plain)
    prompt = ids(config)
    assert np.array_equal(LLM(one).logits(prompt), LLM(other).logits(prompt))


# ------------------------------------------------------------------------------------------------ inspect


def inspected(path):
    return json.loads(_core.inspect_checkpoint(str(path), False))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("fp8", "fp8, a scale per block of 128 x 128"),
        ("fp8 per row", "fp8, a scale per row"),
        ("gptq", "int4 (gptq), groups of 8"),
        ("gptq, symmetric", "int4 (gptq), a scale per row"),
        ("awq", "int4 (awq), groups of 8"),
        ("pack-quantized", "int4 (compressed-tensors), groups of 8"),
        ("nvfp4 of modelopt", "nvfp4 (modelopt)"),
    ],
)
def test_inspect_counts_what_is_quantised(name, form, tmp_path):
    one, other, count = pair(tmp_path, "moe_vision_mtp", name)
    found, plain = inspected(one), inspected(other)
    assert found["refused"] is None and found["mtp_refused"] is None and plain["quantized"] == []
    shares = found["quantized"]
    stored = tiny.read_safetensors(one / "model.safetensors")
    codes = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv")
    bases = {key.rpartition(".")[0] for key in stored if key.endswith(codes)}
    # Codes, scales and zero points; not what only says again what the shape says.
    sizes = [
        len(data)
        for key, (_, _, data) in stored.items()
        if key.rpartition(".")[0] in bases and not key.endswith(("g_idx", "weight_shape"))
    ]
    assert sum(share["num_matrices"] for share in shares) == count == len(bases)
    assert sum(share["bytes"] for share in shares) == sum(sizes)
    assert found["weight_bytes_per_token"] < plain["weight_bytes_per_token"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_token_reads_what_is_stored(name, tmp_path):
    """A dense model with a shared embedding: all of it, but for what only says again what the shape says."""
    one, _, _ = pair(tmp_path, "dense_bf16", name)
    stored = tiny.read_safetensors(one / "model.safetensors")
    sizes = [len(data) for key, (_, _, data) in stored.items() if not key.endswith(("g_idx", "weight_shape"))]
    assert inspected(one)["weight_bytes_per_token"] == sum(sizes)


def test_inspect_prints_it(tmp_path):
    from qwen35rs.cli import app
    from typer.testing import CliRunner

    one, other, count = pair(tmp_path, "dense_bf16", "awq")
    text = CliRunner().invoke(app, ["inspect", str(one)]).stdout
    assert re.search(rf"int4 \(awq\), groups of 8 +{count} ", text), text
    assert "Quantised" in text and "Quantised" not in CliRunner().invoke(app, ["inspect", str(other)]).stdout


# ------------------------------------------------------------------------------------------------- errors


def damaged(folder, source, name, change):
    """A quantised checkpoint of which `change` has its way with the tensors; what is said of it."""
    one, _, _ = pair(folder, source, name)
    tensors = tiny.read_safetensors(one / "model.safetensors")
    change(tensors)
    tiny.write_safetensors(one / "model.safetensors", tensors)
    with pytest.raises(ConfigError) as error:
        LLM(one)
    assert inspected(one)["refused"] == str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", FORMATS)
def test_every_part_is_needed_and_nothing_else_is_taken(name, tmp_path):
    one, _, _ = pair(tmp_path / "whole", "dense_bf16", name)
    tensors = tiny.read_safetensors(one / "model.safetensors")
    base = next(k for k in tensors if ".mlp.down_proj." in k).rpartition(".")[0]
    parts = [k for k in tensors if k.startswith(base + ".")]
    assert len(parts) >= 2
    for i, part in enumerate(parts):
        if part.endswith("g_idx"):
            continue
        text = damaged(tmp_path / f"less{i}", "dense_bf16", name, lambda t, part=part: t.pop(part))
        # Codes that are missing are said to be a missing matrix.
        codes = part.endswith((".weight", ".weight_packed", ".qweight"))
        assert text.startswith(f"tensor {base + '.weight' if codes else part}: found nothing; expected "), (
            text
        )
    for i, extra in enumerate(["weight_other", "weight_scale_3", "pre_quant_scale", "bias"]):
        text = damaged(
            tmp_path / f"more{i}",
            "dense_bf16",
            name,
            lambda t, extra=extra: t.update({f"{base}.{extra}": q.tensor("F32", np.zeros(2))}),
        )
        assert text == f"tensor {base}.{extra}: found F32 [2]; expected no such tensor in this model"


def test_scales_beside_a_plain_matrix_are_refused(tmp_path):
    def change(tensors):
        key = next(k for k in tensors if k.endswith("down_proj.weight"))
        parts = {"weight": tensors[key], "weight_scale_inv": tensors[key + "_scale_inv"]}
        tensors[key] = q.tensor("BF16", q.decode_fp8(parts, (128, 128)))

    text = damaged(tmp_path, "dense_bf16", "fp8", change)
    assert re.fullmatch(
        r"tensor \S+down_proj\.weight_scale_inv: found BF16 \[1, 1\]; expected no such tensor in this model",
        text,
    )


def test_codes_without_a_configuration_are_refused(tmp_path):
    one, _, _ = pair(tmp_path, "dense_bf16", "fp8")
    config = json.loads((one / "config.json").read_text())
    del config["quantization_config"]
    (one / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match="found dtype F8_E4M3; expected BF16, F16 or F32, as the configuration has no"
    ):
        LLM(one)


def test_matrices_that_do_not_fit_once_decoded(tmp_path):
    """A file of holes: it takes no space, and its matrices four times as much memory as there is."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(line for line in lines if line.startswith("MemAvailable"))
    hidden, width = 1 << 12, 1 << 18
    layers = int(available.split()[1]) * 1024 // (3 * hidden * width) + 1
    config, tensors = read("dense_attention_only")
    config |= {"hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers}
    config |= {"layer_types": ["full_attention"] * layers, "vocab_size": 8}
    config.pop("full_attention_interval", None)
    heads, kv, dim = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    shapes = {"input_layernorm": [hidden], "post_attention_layernorm": [hidden]}
    shapes |= {
        "self_attn.q_norm": [dim],
        "self_attn.k_norm": [dim],
        "self_attn.o_proj": [hidden, heads * dim],
    }
    shapes |= {"self_attn.q_proj": [2 * heads * dim, hidden]}
    shapes |= {f"self_attn.{name}_proj": [kv * dim, hidden] for name in "kv"}
    prefix = next(key for key in tensors if "embed_tokens" in key).removesuffix("embed_tokens.weight")
    holes = {
        f"{prefix}embed_tokens.weight": ("BF16", [8, hidden], None),
        f"{prefix}norm.weight": ("BF16", [hidden], None),
    }
    if "lm_head.weight" in tensors:
        holes["lm_head.weight"] = ("BF16", [8, hidden], None)
    for i in range(layers):
        at = f"{prefix}layers.{i}."
        holes |= {f"{at}{name}.weight": ("BF16", shape, None) for name, shape in shapes.items()}
        for name, shape in [("gate", [width, hidden]), ("up", [width, hidden]), ("down", [hidden, width])]:
            holes[f"{at}mlp.{name}_proj.weight"] = ("F8_E4M3", shape, None)
            holes[f"{at}mlp.{name}_proj.weight_scale"] = ("F32", [], None)
    one = write(tmp_path / "one", config | {"quantization_config": {"quant_method": "fp8"}}, holes)
    needed = []
    for ranks in (1, 2):  # which need half of it each
        with pytest.raises(
            OutOfMemoryError, match=r"decoded matrices \(\d+ bytes; .*bfloat16.* takes half of that"
        ) as refused:
            LLM(one, tensor_parallel_size=ranks)
        needed.append(int(re.search(r"\((\d+) bytes", str(refused.value))[1]))
    assert needed[1] - needed[0] in (0, 1)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "bitsandbytes"}, 'quant_method: found "bitsandbytes"; allowed: fp8, gptq, awq, '),
        ({"quant_method": "gptq", "bits": 8}, "bits: found 8; allowed: 4"),
        ({"quant_method": "gptq", "bits": 4, "desc_act": True}, "desc_act: found true; allowed: false"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, 'version: found "gemv"; allowed: gemm'),
        (compressed("int-quantized", PACKED), 'format: found "int-quantized"; allowed: pack-quantized, '),
        ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, 'quant_algo: found "MXFP8"; allowed: FP8, '),
    ],
)
def test_schemes_that_are_not_known(config, said, tmp_path):
    one, _, _ = pair(tmp_path, "dense_bf16", "fp8")
    whole = json.loads((one / "config.json").read_text())
    (one / "config.json").write_text(json.dumps(whole | {"quantization_config": config}))
    with pytest.raises(ConfigError, match="^" + re.escape(f"quantization_config.{said}")):
        LLM(one)
