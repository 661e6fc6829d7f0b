"""Whole models with `activation_dtype="fp8"`: which steps round, and that nothing else changes them."""

import copy
import json

import numpy as np
import pytest
import torch
from qwen35rs import LLM, RequestError, SamplingParams
from test_packed_net import CONFIG, VOCAB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="Hopper alone"
    ),
]
IDS = np.random.default_rng(5).integers(0, VOCAB, 300).tolist()
# Steps of so many tokens round.
FROM = 256
# How far from exact logits. One product is 2.6 % off (a step of four significant bits is 2^-4 to 2^-3 of a number); these
# have gone through four layers and the head.
LEAST, MOST = 0.045, 0.07


@pytest.fixture
def load(tmp_path):
    """A random model of wide enough experts, quantised; `dense` without experts."""
    config = copy.deepcopy(CONFIG)
    config["text_config"] |= {"moe_intermediate_size": 128, "mtp_num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    dense = copy.deepcopy(config) | {"model_type": "qwen3_5"}
    text = {k: v for k, v in dense["text_config"].items() if "expert" not in k and "moe" not in k}
    dense["text_config"] = text | {"model_type": "qwen3_5_text", "intermediate_size": 640}
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(json.dumps(dense))

    def make(scheme, rounds=True, dense=False, **options):
        path = tmp_path / ("dense" if dense else "") / "config.json"
        options = {"max_num_seqs": 32, "max_model_len": 1024, "quantization": scheme} | options
        options["activation_dtype"] = "fp8" if rounds else "auto"
        return LLM(path, load_format="dummy", device="cuda", **options)

    return make


def apart(found, want):
    return np.linalg.norm(found - want) / np.linalg.norm(want)


@pytest.mark.parametrize(
    ("scheme", "dense"),
    [("fp8", False), ("int4", False), ("mixed", False), ("fp8", True), ("int4", True)],
)
def test_steps_of_many_tokens_round(load, scheme, dense):
    exact, rounds = (load(scheme, rounds=r, dense=dense) for r in (False, True))
    assert rounds.memory["activations in fp8"] > 0 and "activations in fp8" not in exact.memory
    for n in (1, 17, FROM - 1):
        assert np.array_equal(exact.logits(IDS[:n]), rounds.logits(IDS[:n])), n
    for n in (FROM, len(IDS)):
        found, want = rounds.logits(IDS[:n]), exact.logits(IDS[:n])
        assert LEAST < apart(found, want) < MOST, n
        assert np.array_equal(found, rounds.logits(IDS[:n]))


@pytest.mark.parametrize("scheme", ["fp8", "int4", "mixed"])
def test_drafts_round_too(load, scheme):
    exact, rounds = (load(scheme, rounds=r, mtp=True) for r in (False, True))
    assert 0.04 < apart(rounds.mtp_logits(IDS), exact.mtp_logits(IDS)) < 0.06


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("scheme", ["fp8", "int4", "mixed"])
def test_deterministic_steps_round_alike(load, scheme, dense):
    """One token, some, and all at once: the same bits, and rounded ones."""
    whole, pieces = (
        load(scheme, dense=dense, deterministic=True, max_num_batched_tokens=n) for n in (512, 64)
    )
    exact = load(scheme, rounds=False, dense=dense, deterministic=True)
    want = whole.logits(IDS)
    assert np.array_equal(pieces.logits(IDS), want)
    assert np.array_equal(whole.logits(IDS[:1]), want[:1])
    assert np.array_equal(whole.logits(IDS[:40]), want[:40])
    assert apart(want[:1], exact.logits(IDS[:1])) > 0.02


@pytest.mark.parametrize("scheme", ["fp8", "mixed"])
def test_steps_in_a_graph(load, scheme):
    """Of 20 sequences: exact ones, and with `deterministic` rounded ones."""
    prompts = [{"prompt_token_ids": IDS[10 * i : 10 * i + 5 + i % 7]} for i in range(20)]
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=3, ignore_eos=True)

    def run(**options):
        return [out.outputs[0] for out in load(scheme, **options).generate(prompts, params)]

    assert run() == run(rounds=False)
    graphs = run(deterministic=True)
    assert graphs == run(deterministic=True, enforce_eager=True)
    assert graphs != run(deterministic=True, rounds=False)


def test_a_model_with_nothing_to_round_is_refused(load):
    with pytest.raises(
        RequestError,
        match=r"activation_dtype: found fp8 for a model without weights in FP8 or .*allowed: auto",
    ):
        load(None)
