"""GGUF files: what llama.cpp's converter made of two checkpoints, and whole models in every type of tensor.

`golden/make_gguf.py` recorded the files with the converter itself and the blocks with the `gguf` package. The way back
from GGUF's names, orders and numbers to Hugging Face's is written again in `gguf_file.py`: a model read from GGUF must be,
to the bit, the model of the checkpoint that this makes.
"""

import json
import re
import shutil
import struct
import subprocess
import sys

import gguf_file as g
import numpy as np
import pytest
import quantised as q
import tiny
from golden.cases import DATA
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from qwen35rs import LLM, ConfigError, Qwen35Error, Tokenizer, _core

GOLDEN = DATA.parent / "gguf"
FILES = {"dense-f32": "dense", "moe-bf16": "moe", "moe-q8_0": "moe"}
QUANTISED = ["Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K"]
TEXT = "the <|im_end|>théâtre in 12 <think>\n\n日本 </think>"


def ids(count=90):
    return np.random.default_rng(3).integers(0, tiny.NUM_TOKENS, count).tolist()


def described(path):
    return json.loads(_core.inspect_checkpoint(path, False))


def config_of(name):
    return json.loads((GOLDEN / FILES[name] / "config.json").read_text())


@pytest.mark.parametrize("kind", QUANTISED)
def test_the_decoders_are_those_of_the_package(kind):
    saved = tiny.read_safetensors(GOLDEN / "blocks.safetensors")
    got = g.decode(kind, q.numbers(saved[kind]))
    want = q.numbers(saved[f"expected.{kind}"])
    assert np.array_equal(got.view(np.int32), want.view(np.int32))


# ------------------------------------------------------------------------------------------- the converter's files


@pytest.mark.parametrize("name", ["dense-f32", "moe-bf16"])
@pytest.mark.parametrize("mtp", [False, True])
def test_the_converted_model_is_the_model(name, mtp):
    if mtp and "dense" in name:
        with pytest.raises(ConfigError, match="nextn_predict_layers: found 0; allowed: 1"):
            LLM(GOLDEN / f"{name}.gguf", mtp=True)
        return
    ours, theirs = LLM(GOLDEN / f"{name}.gguf", mtp=mtp), LLM(GOLDEN / FILES[name], mtp=mtp)
    pairs = [(ours.logits(ids()), theirs.logits(ids()))]
    if mtp:
        pairs.append((ours.mtp_logits(ids()), theirs.mtp_logits(ids())))
    for got, want in pairs:
        # A logarithm of an exponential, and 1 added and taken away: some units in the last place of few numbers.
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("name", FILES)
def test_to_the_bit(name, tmp_path):
    _, tensors = g.read(GOLDEN / f"{name}.gguf")
    other = g.as_hugging_face(tensors, config_of(name), tmp_path / "model")
    mtp = FILES[name] == "moe"
    ours, theirs = LLM(GOLDEN / f"{name}.gguf", mtp=mtp), LLM(other, mtp=mtp)
    assert np.array_equal(ours.logits(ids()), theirs.logits(ids()))
    if mtp:
        assert np.array_equal(ours.mtp_logits(ids()), theirs.mtp_logits(ids()))


@pytest.mark.parametrize("name", FILES)
def test_its_description(name):
    ours, theirs = described(GOLDEN / f"{name}.gguf"), described(GOLDEN / FILES[name])
    assert ours["refused"] is None
    # GGUF has no dtype of the whole.
    assert ours["config"] | {"dtype": theirs["config"]["dtype"]} == theirs["config"]
    assert ours["params"] == theirs["params"]
    moe = FILES[name] == "moe"
    assert (ours["num_mtp_tensors"], ours["expert_layout"]) == ((20, "stacked") if moe else (0, None))
    shares = {share["dtype"]: share["num_tensors"] for share in ours["dtypes"]}
    _, tensors = g.read(GOLDEN / f"{name}.gguf")
    assert shares == {kind: sum(t[0] == kind for t in tensors.values()) for kind in shares}
    assert sum(shares.values()) == ours["num_tensors"] == len(tensors)
    assert ours["tensor_bytes"] == sum(len(data) for _, _, data in tensors.values())
    # 5 in each layer but the routers, and 9 experts, of 2 layers and the MTP module; embedding, head, and fc.
    formats = {share["format"]: share["num_matrices"] for share in ours["quantized"]}
    assert formats == ({"gguf Q8_0": 47} if "q8" in name else {})


def test_tokenizer_template_and_sampling():
    ours, theirs = Tokenizer(GOLDEN / "dense-f32.gguf"), Tokenizer(GOLDEN / "dense")
    assert ours.encode(TEXT) == theirs.encode(TEXT) and ours.decode(ours.encode(TEXT)) == theirs.decode(
        theirs.encode(TEXT)
    )
    assert ours.get_vocab() == theirs.get_vocab() and len(ours) == tiny.NUM_TOKENS
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    # What looks like <|...|> is a control token to the converter; <think> and kin are not.
    assert ours.special_ids == theirs.special_ids
    assert ours.chat_template == (GOLDEN / "dense" / "chat_template.jinja").read_text()
    messages = [{"role": "user", "content": "the"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    generation = described(GOLDEN / "dense-f32.gguf")["generation"]
    assert [generation[key] for key in ("temperature", "top_p", "top_k")] == [0.6, 0.95, 20]
    llm = LLM(GOLDEN / "dense-f32.gguf")
    assert llm.generate("the", seed_params(4))[0].outputs[0].token_ids == (
        LLM(GOLDEN / "dense").generate("the", seed_params(4))[0].outputs[0].token_ids
    )


def seed_params(n):
    from qwen35rs import SamplingParams

    return SamplingParams(seed=n, max_tokens=12, ignore_eos=True)


# --------------------------------------------------------------------------------------------------- every type

WIDE = {
    "hidden_size": 256,
    "head_dim": 128,
    "linear_key_head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 64,
    "intermediate_size": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.25},
}
WIDE_VALUES = {
    "embedding_length": 256,
    "attention.key_length": 128,
    "attention.value_length": 128,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 4,
    "ssm.inner_size": 256,
    "feed_forward_length": 256,
    "rope.dimension_count": 32,
}


def wide(kind):
    """A dense model whose matrices all have rows of whole blocks of 256, and its config.json. Each block of the output
    projection of the delta layers holds four value heads."""
    values, tensors = g.read(GOLDEN / "dense-f32.gguf")
    values |= {f"qwen35.{key}": (g.U32, value) for key, value in WIDE_VALUES.items()}
    # What the converter writes where there are none.
    values["qwen35.rope.dimension_sections"] = ((g.LIST, 5), [11, 11, 10, 0])
    rng, hidden, out = np.random.default_rng(11), 256, {}
    shapes = {"ssm_conv1d": [320, 4], "attn_qkv": [320, hidden], "ssm_norm": [64]}
    shapes |= {"ssm_alpha": [4, hidden], "ssm_beta": [4, hidden], "ssm_a": [4], "ssm_dt": [4]}
    shapes |= {"attn_q_norm": [128], "attn_k_norm": [128], "attn_q": [512, hidden]}
    shapes |= {"attn_k": [128, hidden], "attn_v": [128, hidden]}
    for name, (_, shape, _) in tensors.items():
        stem = name.split(".")[-2 if name.endswith(("weight", "bias")) else -1]
        default = [shape[0] if shape[0] == 280 else hidden] + [hidden] * (len(shape) - 1)
        shape = shapes.get(stem, default)
        x = rng.standard_normal(shape).astype(np.float32)
        if stem == "ssm_a":
            x = -np.exp(x)
        elif "norm" in stem:
            x = 1 + np.float32(0.3) * x
        plain = len(shape) == 1 or stem == "ssm_conv1d"
        size = 0.35 if stem == "token_embd" else 0.06
        out[name] = q.tensor("F32", x) if plain else g.random_blocks(rng, kind, shape, size)
    return values, out, config_of("dense-f32") | WIDE


@pytest.mark.parametrize("kind", QUANTISED)
def test_every_type(kind, tmp_path):
    values, tensors, config = wide(kind)
    path = g.write(tmp_path / "wide.gguf", values, tensors)
    ours = LLM(path).logits(ids(40))
    theirs = LLM(g.as_hugging_face(tensors, config, tmp_path / "wide")).logits(ids(40))
    assert 0.5 < np.abs(theirs).max() < 1e3
    assert np.array_equal(ours, theirs)
    halves = [LLM(path, dtype=dtype).logits(ids(40)) for dtype in ("bfloat16", "float32")]
    assert np.array_equal(halves[1], ours) and not np.array_equal(halves[0], ours)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_floats_whose_heads_are_moved(kind, tmp_path):
    values, tensors = g.read(GOLDEN / "dense-f32.gguf")
    for name, entry in tensors.items():
        if len(entry[1]) == 2 and "conv1d" not in name:
            tensors[name] = q.tensor(kind, g.numbers(entry))
    path = g.write(tmp_path / "half.gguf", values, tensors)
    other = g.as_hugging_face(tensors, config_of("dense-f32"), tmp_path / "half")
    assert np.array_equal(LLM(path).logits(ids()), LLM(other).logits(ids()))


def test_experts_in_one_stack_and_files_of_other_programs(tmp_path):
    """Gates and ups in one tensor, as the converter writes them with its option; version 2; another alignment; numbers
    of heads by layer."""
    values, tensors = g.read(GOLDEN / "moe-q8_0.gguf")
    want = LLM(GOLDEN / "moe-q8_0.gguf").logits(ids())
    fused = {}
    for name, (kind, shape, data) in tensors.items():
        if "ffn_gate_exps" in name:
            up = tensors[name.replace("gate", "up")][2]
            parts = [np.frombuffer(raw, np.uint8).reshape(shape[0], -1) for raw in (data, up)]
            both = np.concatenate(parts, 1).tobytes()
            fused[name.replace("gate", "gate_up")] = (kind, [shape[0], 2 * shape[1], shape[2]], both)
        elif "ffn_up_exps" not in name:
            fused[name] = (kind, shape, data)
    values["qwen35moe.attention.head_count_kv"] = ((g.LIST, g.U32), [1, 0, 1])
    values["general.alignment"] = (g.U32, 128)
    path = g.write(tmp_path / "fused.gguf", values, fused, alignment=128, version=2)
    assert np.array_equal(LLM(path).logits(ids()), want)


def test_yarn(tmp_path):
    values, tensors = g.read(GOLDEN / "dense-f32.gguf")
    scaling = {"factor": 2.5, "yarn_attn_factor": 1.25, "yarn_beta_fast": 8.0, "yarn_beta_slow": 2.0}
    values["qwen35.rope.scaling.type"] = (g.TEXT, "yarn")
    values["qwen35.rope.scaling.original_context_length"] = (g.U32, 128)
    values |= {f"qwen35.rope.scaling.{key}": (g.F32, value) for key, value in scaling.items()}
    path = g.write(tmp_path / "yarn.gguf", values, tensors)
    config = config_of("dense-f32")
    config["rope_parameters"] |= {
        "rope_type": "yarn",
        "factor": 2.5,
        "original_max_position_embeddings": 128,
        "attention_factor": 1.25,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
    }
    other = g.as_hugging_face(tensors, config, tmp_path / "yarn")
    assert described(path)["config"]["rope"] == described(other)["config"]["rope"]
    assert np.array_equal(LLM(path).logits(ids()), LLM(other).logits(ids()))


# ------------------------------------------------------------------------------------------------------- places


def split(folder, count=3, name="model"):
    """The mixed model in parts, as llama.cpp's converter and gguf-split write them."""
    values, tensors = g.read(GOLDEN / "moe-q8_0.gguf")
    names = list(tensors)
    for no in range(count):
        part = {n: tensors[n] for n in names[no * len(names) // count : (no + 1) * len(names) // count]}
        facts = {"split.no": (2, no), "split.count": (2, count), "split.tensors.count": (5, len(names))}
        g.write(folder / f"{name}-{no + 1:05}-of-{count:05}.gguf", (values if no == 0 else {}) | facts, part)


def test_directories_and_parts(tmp_path):
    want = LLM(GOLDEN / "moe-q8_0.gguf").logits(ids())
    (tmp_path / "one").mkdir()
    shutil.copy(GOLDEN / "moe-q8_0.gguf", tmp_path / "one" / "x.GGUF")
    (tmp_path / "one" / "mmproj-x.gguf").write_bytes(b"GGUF")
    (tmp_path / "parts").mkdir()
    split(tmp_path / "parts")
    first = tmp_path / "parts" / "model-00001-of-00003.gguf"
    for path in (tmp_path / "one", tmp_path / "parts", first):
        llm = LLM(path)
        assert np.array_equal(llm.logits(ids()), want)
        assert llm.tokenizer.encode(TEXT) == Tokenizer(GOLDEN / "moe").encode(TEXT)
        assert described(path)["fingerprint"] == described(GOLDEN / "moe-q8_0.gguf")["fingerprint"]
    assert [file["name"] for file in described(first)["files"]] == [
        f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)
    ]
    with pytest.raises(ConfigError, match="one of 3 parts; give the first, model-00001-of-00003.gguf"):
        LLM(tmp_path / "parts" / "model-00002-of-00003.gguf")
    shutil.copy(first, tmp_path / "parts" / "renamed.gguf")
    with pytest.raises(ConfigError, match="says 3 parts; expected a name like X-00001-of-00003.gguf"):
        LLM(tmp_path / "parts" / "renamed.gguf")
    with pytest.raises(
        ConfigError, match="found model-00001-of-00003.gguf, renamed.gguf; expected one model"
    ):
        LLM(tmp_path / "parts")
    second, third = (tmp_path / "parts" / f"model-0000{i}-of-00003.gguf" for i in (2, 3))
    kept = second.read_bytes()
    shutil.copy(third, second)
    with pytest.raises(ConfigError, match="00002-of-00003.gguf: split.no: found 2; allowed: 1"):
        LLM(first)
    values, tensors = g.read(third)
    g.write(second, values | {"split.no": (2, 1)}, tensors)
    with pytest.raises(ConfigError, match="tensor .*: found it in two parts; expected it in one"):
        LLM(first)
    second.write_bytes(kept)
    g.write(third, values, dict(list(tensors.items())[1:]))
    with pytest.raises(ConfigError, match="split.tensors.count 58, and 57 tensors in all parts"):
        LLM(first)
    third.unlink()
    with pytest.raises(FileNotFoundError, match="model-00003-of-00003.gguf"):
        LLM(first)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        LLM(tmp_path / "missing.gguf")


def test_tokenizer_files_beside_it(tmp_path):
    path = shutil.copy(GOLDEN / "dense-f32.gguf", tmp_path / "model.gguf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "dense" / name, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("beside")
    (tmp_path / "generation_config.json").write_text('{"top_k": 7}')
    assert Tokenizer(path).chat_template == Tokenizer(tmp_path).chat_template == "beside"
    assert described(path)["generation"]["top_k"] == 7
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    file["added_tokens"][1]["content"] = "<|other|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(
        ConfigError, match=r'tokenizer.json: token 269 is "<\|other\|>"; in .*model.gguf it is'
    ):
        LLM(path)


def test_a_file_without_a_tokenizer(tmp_path):
    values, tensors = g.read(GOLDEN / "dense-f32.gguf")
    values = {key: value for key, value in values.items() if not key.startswith("tokenizer.")}
    path = g.write(tmp_path / "bare.gguf", values, tensors)
    llm = LLM(path)
    assert np.array_equal(llm.logits(ids()), LLM(GOLDEN / "dense-f32.gguf").logits(ids()))
    with pytest.raises(Qwen35Error, match="tokenizer"):
        llm.generate("the")


# ----------------------------------------------------------------------------------------------------- refusals


def without(key):
    return lambda values, tensors: values.pop(key)


def valued(key, kind, value):
    return lambda values, tensors: values.update({key: (kind, value)})


def with_tensor(name, kind, shape):
    def change(values, tensors):
        data = q.tensor("F32", np.zeros(shape))[2] if kind == "F32" else bytes(1)
        tensors[name] = (kind, list(shape), data)

    return change


def renamed_type(number, name):
    """Calls a tensor's type something else, in the bytes."""
    return lambda data: data.replace(
        name.encode() + struct.pack("<IQI", 1, 32, 0), name.encode() + struct.pack("<IQI", 1, 32, number)
    )


A = "qwen35."
REFUSED = [
    (without("general.architecture"), 'general.architecture: found nothing; allowed: "qwen35", "qwen35moe"'),
    (valued("general.architecture", g.TEXT, "clip"), 'general.architecture: found "clip"; allowed'),
    (without(A + "embedding_length"), "qwen35.embedding_length: found nothing"),
    (
        valued(A + "embedding_length", g.U32, 0),
        "qwen35.embedding_length: found 0; allowed: an integer from 1",
    ),
    (valued(A + "embedding_length", g.TEXT, "x"), 'qwen35.embedding_length: found "x"; allowed: a number'),
    (valued(A + "block_count", g.U32, 1 << 31), "qwen35.block_count: found 2147483648"),
    (
        valued(A + "block_count", g.U32, 3),
        "attention.recurrent_layers: found a list of 2 items .*; allowed: 3 bools",
    ),
    (valued(A + "ssm.inner_size", g.U32, 73), "ssm.inner_size: found 73; allowed: a multiple of"),
    (valued(A + "ssm.group_count", g.U32, 4), "ssm.time_step_rank: found 6; allowed: a multiple of"),
    (
        valued(A + "attention.value_length", g.U32, 8),
        "attention.value_length: found 8; allowed: .*key_length, 16",
    ),
    (
        valued(A + "attention.head_count_kv", (g.LIST, g.U32), [1, 2]),
        "head_count_kv: .*one number for all layers",
    ),
    (
        valued(A + "rope.dimension_sections", (g.LIST, 5), [9, 1, 1, 0]),
        "rope.dimension_sections: found .*sum to 4",
    ),
    (
        valued(A + "rope.scaling.type", g.TEXT, "linear"),
        'rope.scaling.type: found "linear"; allowed: "none", "yarn"',
    ),
    (valued(A + "attention.causal", g.BOOL, False), "qwen35.attention.causal: found false"),
    (valued(A + "attention.sliding_window", g.U32, 64), "qwen35.attention.sliding_window: found 64"),
    (valued(A + "nextn_predict_layers", g.U32, 2), "qwen35.block_count: found 2; allowed: more than"),
    (valued("tokenizer.ggml.model", g.TEXT, "llama"), 'tokenizer.ggml.model: found "llama"; allowed: "gpt2"'),
    (
        valued("tokenizer.ggml.pre", g.TEXT, "default"),
        'tokenizer.ggml.pre: found "default"; allowed: "qwen35"',
    ),
    (valued("tokenizer.ggml.add_bos_token", g.BOOL, True), "add_bos_token: found true; allowed: false"),
    (valued("tokenizer.ggml.eos_token_id", g.U32, 999), "tokenizer.ggml.eos_token_id: found 999"),
    (valued("tokenizer.ggml.token_type", (g.LIST, 5), [1]), "token_type: .*a type for each of 280 tokens"),
    (valued("tokenizer.ggml.token_type", (g.LIST, 5), [2] * 280), r"token_type\[0\]: found 2; allowed: 1"),
    (
        valued("tokenizer.ggml.merges", (g.LIST, g.TEXT), ["abc"]),
        r"tokenizer.ggml.merges\[0\]: found \"abc\"",
    ),
    (valued("tokenizer.chat_template", g.TEXT, "{% if %}"), "the chat template does not compile"),
    (valued("general.alignment", g.U32, 48), "general.alignment: found 48; allowed: a power of two"),
    (valued("general.sampling.top_p", g.F32, 2.0), "general.sampling.top_p: found 2"),
    (lambda v, t: t.pop("blk.1.attn_q.weight"), r"tensor blk.1.attn_q.weight: found nothing; .*\[64, 32\]"),
    (lambda v, t: t.pop("token_embd.weight"), "tensor token_embd.weight: found nothing"),
    (lambda v, t: t.pop("blk.0.ssm_a"), r"tensor blk.0.ssm_a: found nothing; expected shape \[6\]"),
    (with_tensor("blk.0.ssm_a", "F32", [5]), r"tensor blk.0.ssm_a: found shape \[5\]; expected shape \[6\]"),
    (
        with_tensor("blk.0.extra.weight", "F32", [5]),
        r"tensor blk.0.extra.weight: found F32 \[5\]; expected no such",
    ),
    (
        with_tensor("blk.2.nextn.enorm.weight", "F32", [32]),
        "tensor blk.2.nextn.enorm.weight: found .*no such tensor",
    ),
    (
        lambda v, t: t.update({"blk.0.ssm_a": q.tensor("F32", np.ones(6))}),
        "tensor blk.0.ssm_a: found 1 for head 0; expected numbers of at most 0",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refused_by_name(change, message, tmp_path):
    values, tensors = g.read(GOLDEN / "dense-f32.gguf")
    change(values, tensors)
    path = g.write(tmp_path / "bad.gguf", values, tensors)
    with pytest.raises(ConfigError, match=message):
        llm = LLM(path)
        _ = llm.tokenizer.chat_template


@pytest.mark.parametrize(
    ("number", "found"),
    [(10, "type Q2_K"), (23, "type IQ4_XS"), (26, "type I32"), (99, "type number 99, which is not known")],
)
def test_types_that_are_not_read(number, found, tmp_path):
    data = (GOLDEN / "dense-f32.gguf").read_bytes()
    changed = renamed_type(number, "output_norm.weight")(data)
    assert changed != data
    (tmp_path / "bad.gguf").write_bytes(changed)
    expected = "expected one of F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q5_K, Q6_K"
    with pytest.raises(ConfigError, match=f"tensor output_norm.weight: found {found}; {expected}"):
        LLM(tmp_path / "bad.gguf")


def test_the_command_line():
    path = GOLDEN / "moe-q8_0.gguf"
    run = lambda *words: (
        subprocess.run(
            [sys.executable, "-m", "qwen35rs", *map(str, words), "--json"],
            check=True,
            capture_output=True,
            timeout=60,
        ).stdout
    )
    assert json.loads(run("inspect", path))["num_tensors"] == 58
    assert json.loads(run("plan", path, "--gpu", "h100"))["config"]["model_type"] == "qwen3_5_moe"
    tokens = json.loads(run("tokenize", "--model", path, "the in"))
    assert "the" in json.dumps(tokens)
    assert json.loads(run("generate", "--model", path, "--max-tokens", 3, "--ignore-eos", "the"))


# --------------------------------------------------------------------------------------------------------- fuzz

SMALL = (GOLDEN / "dense-f32.gguf").read_bytes()
HEADER = len(g.header(*g.read(GOLDEN / "dense-f32.gguf")))
HOSTILE = [0, 1, 2, 255, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 32, (1 << 64) - 1]
PLACES = st.integers(0, HEADER - 1)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.one_of(
            st.tuples(PLACES, st.binary(min_size=1, max_size=4)),
            st.tuples(PLACES, st.sampled_from(HOSTILE).map(lambda n: struct.pack("<Q", n))),
            st.tuples(st.integers(0, 23), st.sampled_from(HOSTILE).map(lambda n: struct.pack("<Q", n))),
        ),
        min_size=1,
        max_size=4,
    ),
    length=st.one_of(st.none(), st.integers(0, len(SMALL))),
)
@example(edits=[(0, b"GGUF")], length=0)
@example(edits=[(8, struct.pack("<Q", (1 << 20) - 1))], length=None)
@example(edits=[(16, struct.pack("<Q", (1 << 16) - 1))], length=None)
def test_no_header_does_harm(edits, length, tmp_path):
    data = bytearray(SMALL)
    for at, raw in edits:
        data[at : at + len(raw)] = raw
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(data[:length])
    for use in (described, Tokenizer, _core.ChatTemplate, _core.find_tokenizer):
        try:
            use(path)
        except Qwen35Error as error:
            assert str(error) and "internal error" not in str(error)


def test_files_that_are_not_there_or_not_called_so(tmp_path):
    other = tmp_path / "dense.bin"
    shutil.copy(GOLDEN / "dense-f32.gguf", other)
    missing = tmp_path / "dense.gguf"
    words = {
        other: "dense.bin: is a GGUF file under another name; give it one that ends in .gguf",
        missing: f"dense.gguf: does not exist; {tmp_path} has no GGUF file",
    }
    for path, said in words.items():
        for call in (LLM, Tokenizer):
            with pytest.raises(FileNotFoundError, match=re.escape(said)):
                call(path)
        for command in ("plan", "inspect"):
            done = subprocess.run(
                [sys.executable, "-m", "qwen35rs", command, path], check=False, capture_output=True, text=True
            )
            assert done.returncode == 1 and said in done.stderr
    shutil.copy(other, tmp_path / "b.gguf")
    with pytest.raises(FileNotFoundError, match=r"dense.gguf: does not exist; .* has b\.gguf"):
        LLM(missing)
    with pytest.raises(
        FileNotFoundError, match="nowhere/x.gguf: does not exist; nor does its directory nowhere"
    ):
        LLM("nowhere/x.gguf")
    (tmp_path / "c.gguf").symlink_to(other)
    assert np.array_equal(LLM(tmp_path / "c.gguf").logits([1]), LLM(tmp_path / "b.gguf").logits([1]))
