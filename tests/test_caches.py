"""Keys and values in fp8, states in f16: how near to the plain ones, the same bits however a prompt is cut, and what is
refused."""

import json

import numpy as np
import pytest
from golden.cases import DATA
from qwen35rs import LLM, RequestError, SamplingParams
from qwen35rs.cli import app
from typer.testing import CliRunner

SMALL = {"kv_cache_dtype": "fp8", "state_dtype": "float16"}
SOURCES = ["dense_bf16", "moe_bf16", "dense_delta_only"]


def tokens(length, seed=0):
    return np.random.default_rng(seed).integers(0, 140, length).tolist()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("options", "most"), [({}, 0.0), (SMALL, 0.1), ({"state_dtype": "float16"}, 0.01)])
def test_logits_are_near(source, options, most):
    prompt = tokens(200)
    want = LLM(DATA / source, device="cpu").logits(prompt)
    found = LLM(DATA / source, device="cpu", **options).logits(prompt)
    distance = np.linalg.norm(found - want) / np.linalg.norm(want)
    assert distance <= most
    assert (distance == 0) == (not options)


@pytest.mark.parametrize("source", SOURCES)
def test_decode_equals_prefill(source):
    """What is generated token by token is what a prompt with those tokens says comes next."""
    llm = LLM(DATA / source, device="cpu", **SMALL)
    prompt = tokens(70, seed=1)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=1)
    out = llm.generate(prompt, params)[0].outputs[0]
    logits = llm.logits(prompt + list(out.token_ids))[len(prompt) - 1 : -1]
    logits = logits - logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, token, entry in zip(logprobs, out.token_ids, out.logprobs, strict=True):
        assert abs(row[token] - entry[token].logprob) < 0.05


@pytest.mark.parametrize("source", SOURCES)
def test_same_bits_in_any_steps(source):
    prompts = [tokens(length, seed=length) for length in (1, 63, 64, 65, 130, 200)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2)
    together = LLM(DATA / source, device="cpu", max_num_batched_tokens=64, **SMALL).generate(prompts, params)
    alone = LLM(DATA / source, device="cpu", **SMALL)
    for prompt, out in zip(prompts, together, strict=True):
        assert alone.generate(prompt, params)[0].outputs == out.outputs


def test_other_names_are_refused():
    with pytest.raises(RequestError, match="kv_cache_dtype: found int8; allowed: auto, fp8"):
        LLM(DATA / "dense_bf16", kv_cache_dtype="int8")
    with pytest.raises(RequestError, match="state_dtype: found bfloat16; allowed: float32, float16"):
        LLM(DATA / "dense_bf16", state_dtype="bfloat16")
    with pytest.raises(RequestError, match="activation_dtype: found int8; allowed: auto, fp8"):
        LLM(DATA / "dense_bf16", activation_dtype="int8")


def test_activations_are_rounded_on_a_gpu_alone():
    with pytest.raises(
        RequestError, match=r"activation_dtype: found fp8 on the CPU; allowed: auto \(fp8 on a GPU\)"
    ):
        LLM(DATA / "dense_bf16", device="cpu", activation_dtype="fp8")


def test_the_command_line():
    def run(*args):
        return CliRunner().invoke(app, [str(arg) for arg in args])

    common = ("--json", "--token-ids", "--max-tokens", 4, "--device", "cpu", "-m", DATA / "dense_bf16")
    common = ("generate", "--json", "--token-ids", "1 2 3", "--max-tokens", 4, "--device", "cpu")
    common += ("-m", DATA / "dense_bf16")
    found = run(*common, "--kv-cache-dtype", "fp8", "--state-dtype", "float16")
    assert found.exit_code == 0, found.output
    assert len(json.loads(found.stdout)["outputs"][0]["samples"][0]["token_ids"]) == 4
    found = run(*common, "--kv-cache-dtype", "fp4")
    assert found.exit_code != 0
    plain, small = (
        json.loads(run("plan", "35b", "--gpu", "h100", "--json", *more).stdout)
        for more in ((), ("--fp8-kv", "--f16-state"))
    )
    assert small["options"]["f16_state"] and not plain["options"]["f16_state"]
    cache = small["cache"]
    assert 512 * cache["kv_per_token_fp8"] == 260 * cache["kv_per_token"]
    assert 2 * cache["recurrent_per_seq_f16"] == cache["recurrent_per_seq"]
    assert small["rows"][0]["max_seqs"] > plain["rows"][0]["max_seqs"]
