"""A model shared by ranks on GPUs: two of one card, which is what one card can show, and two cards (`-m two_gpus`).

Ranks of one card wait for each other inside kernels. Whatever makes the driver wait for the card meanwhile (a kernel that
is loaded, memory for it, a library that starts) ends in a rank that waits in vain: so kernels are loaded at once
(conftest.py), no library is used (`deterministic`), and everything is done by one rank first.
"""

import json
import os
import signal
import time

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # read when CUDA starts

from functools import lru_cache

import numpy as np
import pytest
from golden import embedded
from golden.cases import CASES, Golden
from golden.noise import compare, recorded, within
from qwen35rs import LLM, RequestError, SamplingParams, bench, hub
from test_net import greedy, questions
from test_ranks_processes import QUESTIONS, free_port, start

TWO = [
    pytest.param("cuda:0,0", marks=pytest.mark.gpu),
    pytest.param("cuda:0,1", marks=pytest.mark.two_gpus),
]


@lru_cache(4)
def load(path, device, **options):
    if device == "cuda:0,0":
        options["deterministic"] = True
    return LLM(path, device=device, tensor_parallel_size=device.count(",") + 1, **options)


def on(device, run, path=hub.EMBEDDED, **options):
    """What `run` gives of a model there; `options` are of ranks where there are any."""
    if device == "cuda:0,0":
        alone = {name: value for name, value in options.items() if name != "expert_parallel"}
        run(load(path, "cuda:0", deterministic=True, **alone))
    return run(load(path, device, **options))


def divides(name, **options):
    try:
        LLM(Golden(name).path, device="cpu", tensor_parallel_size=2, **options)
    except RequestError:
        return False
    return True


SHARED = [name for name in CASES if divides(name)]
BY_EXPERTS = [name for name in SHARED if name.startswith("moe") and divides(name, expert_parallel=True)]


@pytest.mark.parametrize("device", TWO)
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in SHARED] + [(name, {"expert_parallel": True}) for name in BY_EXPERTS],
    ids=str,
)
def test_logits_of_the_goldens(name, options, device):
    """As near to float32 arithmetic as Transformers in bf16."""
    path, prompts = str(Golden(name).path), Golden(name).prompts

    def run(llm):
        return [llm.logits(prompt.sequence) for prompt in prompts]

    found = list(zip(on(device, run, path, **options), on("cpu", run, path), strict=True))
    assert all(a.shape == b.shape and np.isfinite(a).all() for a, b in found)
    assert within(compare(found), name), (compare(found), recorded(name))


@pytest.mark.parametrize("device", TWO)
@pytest.mark.parametrize("by_experts", [False, True])
@pytest.mark.parametrize("quantization", [None, "fp8", "int4", "mixed"])
def test_logits_of_the_embedded_model(device, quantization, by_experts):
    """Quantised, against the CPU's two ranks, whose groups are the same."""
    options = {"quantization": quantization, "expert_parallel": by_experts}
    cpu = LLM(hub.EMBEDDED, device="cpu", tensor_parallel_size=2, **options)
    cases = [(p, e) for _, _, p, e in embedded.questions() if len(p) < 1500]

    def run(llm):
        return [llm.logits(prompt + expected)[len(prompt) - 1 : -1] for prompt, expected in cases]

    found = list(zip(on(device, run, **options), run(cpu), strict=True))
    assert within(compare(found), "embedded"), (compare(found), recorded("embedded"))


@pytest.mark.parametrize("device", TWO)
@pytest.mark.parametrize("by_experts", [False, True])
def test_answers_of_the_embedded_model(device, by_experts):
    """The same text for at least 95 % of the questions, alone and many at once; recorded steps give what others do."""
    prompts = [prompt for prompt, _ in questions(16)]
    options = {"expert_parallel": by_experts}
    want = greedy(load(hub.EMBEDDED, "cpu"), prompts, bench.MAX_TOKENS)
    got = on(device, lambda llm: greedy(llm, prompts, bench.MAX_TOKENS), **options)
    same = [a.token_ids == b.token_ids for a, b in zip(got, want, strict=True)]
    assert np.mean(same) >= 0.95, f"{len(same) - sum(same)} of {len(same)} differ"
    one, other = (
        on(device, lambda llm: greedy(llm, prompts[:1], 64, logprobs=3)[0], enforce_eager=eager, **options)
        for eager in (False, True)
    )
    assert one.token_ids == other.token_ids and one.logprobs == other.logprobs


@pytest.mark.parametrize("device", TWO)
def test_drafts_of_the_embedded_model(device):
    def run(llm):
        return [llm.mtp_logits(prompt + expected)[len(prompt) :] for prompt, expected in questions(1)]

    for pair in zip(on(device, run, mtp=True), on("cpu", run, mtp=True), strict=True):
        found = compare([pair])
        assert found["distance"] < 0.05 and found["mean"] < 0.05, found


@pytest.mark.parametrize("device", TWO)
def test_the_same_seeds_give_the_same_tokens_twice(device):
    """Every rank chooses its tokens itself: the same on all, or nothing after the first would be."""
    params = SamplingParams(temperature=1, top_p=0.9, top_k=40, max_tokens=48, seed=5, logprobs=2)
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in questions(2)]
    one, other = (on(device, lambda llm: llm.generate(prompts, params)) for _ in range(2))
    assert [o.outputs[0].token_ids for o in one] == [o.outputs[0].token_ids for o in other]


@pytest.mark.two_gpus
class TestProcesses:
    def test_they_say_the_same(self, processes):
        port = free_port()
        processes += [start(rank, 2, port, device="cuda") for rank in range(2)]
        out, err = processes[0].communicate(timeout=120)
        assert processes[0].returncode == 0, err
        llm = load(hub.EMBEDDED, "cuda:0,1")
        params = SamplingParams(temperature=0, max_tokens=24)
        want = llm.chat([[{"role": "user", "content": q}] for q in QUESTIONS], params)
        assert json.loads(out.splitlines()[-1]) == [o.text for o in want]
        assert processes[1].wait(60) == 0

    @pytest.mark.parametrize("victim", [0, 1])
    def test_a_rank_that_is_killed_ends_the_other(self, victim, processes):
        port = free_port()
        processes += [start(rank, 2, port, "on and on", device="cuda") for rank in range(2)]
        assert processes[0].stdout.readline() == "ready\n"
        processes[0].stdout.readline()
        processes[victim].send_signal(signal.SIGKILL)
        since = time.monotonic()
        _, err = processes[1 - victim].communicate(timeout=120)
        assert time.monotonic() - since < 60
        assert processes[1 - victim].returncode == 1 and "qwen35rs.RankError: ranks: rank" in err
