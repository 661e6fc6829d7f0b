"""Ranks on GPUs that add up by NCCL, asked for by QWEN35RS_COLLECTIVES: two cards, since NCCL wants one for each rank."""

import json
import os
import signal
import subprocess
import sys
import time

# Read when NCCL is loaded, which importing torch does: multicast belongs to the whole host, which others may share.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import numpy as np
import pytest
import torch
from golden.cases import Golden
from golden.noise import compare, recorded, within
from qwen35rs import LLM, CudaError, SamplingParams, bench, hub
from test_net import greedy, load, questions
from test_ranks_processes import QUESTIONS, free_port, start

TWO = "cuda:0,1"


@pytest.fixture(autouse=True)
def nccl(monkeypatch):
    monkeypatch.setenv("QWEN35RS_COLLECTIVES", "nccl")


@pytest.fixture(scope="module")
def llm():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN35RS_COLLECTIVES", "nccl")
        return LLM(hub.EMBEDDED, device=TWO, tensor_parallel_size=2, max_num_seqs=32, max_model_len=4096)


@pytest.mark.gpu
def test_ranks_of_one_card_are_refused():
    text = "ranks 0 and 1 have one card, and NCCL wants one for each; allowed: .*QWEN35RS_COLLECTIVES=direct"
    with pytest.raises(CudaError, match=text):
        LLM(device="cuda:0,0", tensor_parallel_size=2)


# Without torch, which loads NCCL itself.
WHICH = """
import os, sys
from qwen35rs import LLM, SamplingParams
llm = LLM(device=sys.argv[1], tensor_parallel_size=2)
out = llm.generate("one two " * 100, SamplingParams(temperature=0, max_tokens=2))  # many rows: cuBLASLt's
print("libnccl" in open("/proc/self/maps").read(), os.environ.get("NCCL_NVLS_ENABLE"))
"""


@pytest.mark.two_gpus
@pytest.mark.parametrize(("way", "loaded"), [("nccl", "True 0"), ("direct", "False None")])
def test_the_way_is_the_one_asked_for(way, loaded):
    """Multicast may stay unset only where NCCL is not loaded. What cards cannot do is refused, not done another way."""
    environment = {name: value for name, value in os.environ.items() if name != "NCCL_NVLS_ENABLE"}
    environment["QWEN35RS_COLLECTIVES"] = way
    command = [sys.executable, "-c", WHICH, TWO]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=200)
    if way == "direct" and not torch.cuda.can_device_access_peer(0, 1):
        assert "CudaError" in done.stderr and "cannot address the memory" in done.stderr
    else:
        assert done.stdout.split("\n")[0] == loaded, done.stderr


@pytest.mark.two_gpus
@pytest.mark.parametrize("way", ["nccl", "direct"])
def test_libraries_may_not_load_kernels_for_all_cards(way):
    """Which would wait for a card that waits for the rank that loads them."""
    environment = os.environ | {"QWEN35RS_COLLECTIVES": way, "CUDA_MODULE_LOADING": "EAGER"}
    command = [sys.executable, "-c", WHICH, TWO]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "RequestError: CUDA_MODULE_LOADING: found EAGER" in done.stderr, (
        done.stderr
    )


@pytest.mark.two_gpus
@pytest.mark.parametrize("name", ["dense_bf16", "moe_bf16"])
def test_logits_of_the_goldens(name):
    """As near to float32 arithmetic as Transformers in bf16; many rows are gathered at once."""
    llm, found = LLM(Golden(name).path, device=TWO, tensor_parallel_size=2), []
    for prompt in Golden(name).prompts:
        got, want = llm.logits(prompt.sequence), load(str(Golden(name).path), "cpu").logits(prompt.sequence)
        assert got.shape == want.shape and np.isfinite(got).all()
        found.append((got, want))
    assert within(compare(found), name), (compare(found), recorded(name))


@pytest.mark.two_gpus
def test_answers_of_the_embedded_model(llm):
    """The same text for at least 95 % of the questions, alone and many at once; recorded steps give what others do."""
    prompts = [prompt for prompt, _ in questions(16)]
    want = greedy(load(hub.EMBEDDED, "cpu"), prompts, bench.MAX_TOKENS)
    got = greedy(llm, prompts, bench.MAX_TOKENS)
    same = [a.token_ids == b.token_ids for a, b in zip(got, want, strict=True)]
    assert np.mean(same) >= 0.95, f"{len(same) - sum(same)} of {len(same)} differ"
    eager = LLM(
        hub.EMBEDDED,
        device=TWO,
        tensor_parallel_size=2,
        max_num_seqs=32,
        max_model_len=4096,
        enforce_eager=True,
    )
    for _ in range(2):  # the second time every shape is recorded
        one, other = (greedy(each, prompts[:1], 64, logprobs=3)[0] for each in (llm, eager))
        assert one.token_ids == other.token_ids and one.logprobs == other.logprobs
    assert json.loads(llm._engine.report())["nodes_per_step"] is not None


@pytest.mark.two_gpus
def test_two_ranks_can_be_deterministic():
    llm = LLM(hub.EMBEDDED, device=TWO, tensor_parallel_size=2, max_num_seqs=32, deterministic=True)
    prompts = [prompt for prompt, _ in questions(8)]
    many = greedy(llm, prompts, 32, logprobs=2)
    for prompt, together in zip(prompts, many, strict=True):
        (alone,) = greedy(llm, [prompt], 32, logprobs=2)
        assert alone.token_ids == together.token_ids and alone.logprobs == together.logprobs


@pytest.mark.two_gpus
def test_models_come_and_go():
    """Communicators end in order: nothing waits for the other rank, and no memory stays."""
    params = SamplingParams(temperature=0, max_tokens=24)
    free = []
    for _ in range(4):
        llm = LLM(hub.EMBEDDED, device=TWO, tensor_parallel_size=2, max_num_seqs=4, max_model_len=1024)
        llm.chat([{"role": "user", "content": QUESTIONS[0]}], params)
        since = time.monotonic()
        del llm
        assert time.monotonic() - since < 8
        time.sleep(2)  # NCCL gives its memory back in threads of its own
        free.append(torch.cuda.mem_get_info(1)[0])
    assert free[3] >= free[1] - 2**24, free


@pytest.mark.two_gpus
class TestProcesses:
    def test_they_say_the_same(self, llm, processes):
        port = free_port()
        processes += [start(rank, 2, port, device="cuda") for rank in range(2)]
        out, err = processes[0].communicate(timeout=120)
        assert processes[0].returncode == 0, err
        params = SamplingParams(temperature=0, max_tokens=24)
        want = llm.chat([[{"role": "user", "content": q}] for q in QUESTIONS], params)
        assert json.loads(out.splitlines()[-1]) == [o.text for o in want]
        assert processes[1].wait(60) == 0

    # A rank 0 that is stopped is one that has no orders: the others wait for it.
    @pytest.mark.parametrize(
        ("victim", "sign"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)]
    )
    def test_a_rank_that_does_not_answer_ends_the_other(self, victim, sign, processes):
        port = free_port()
        processes += [start(rank, 2, port, "on and on", device="cuda") for rank in range(2)]
        assert processes[0].stdout.readline() == "ready\n"
        processes[0].stdout.readline()
        processes[victim].send_signal(sign)
        since = time.monotonic()
        _, err = processes[1 - victim].communicate(timeout=150)
        assert time.monotonic() - since < 90
        assert processes[1 - victim].returncode == 1 and "qwen35rs.RankError: ranks: " in err
