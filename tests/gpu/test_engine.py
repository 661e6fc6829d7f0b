"""What is only there on a GPU: recorded steps, tokens chosen on the device, planned memory, random weights of full size."""

import gc
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from qwen35rs import LLM, OutOfMemoryError, SamplingParams, _core, hub, speed

pytestmark = pytest.mark.gpu

PROMPTS = [[5 + i, 900 - 7 * i, 31 * i + 2] + list(range(40 + i, 60 + 9 * i)) for i in range(24)]


def ids(prompts):
    return [{"prompt_token_ids": prompt} for prompt in prompts]


@pytest.fixture(scope="module")
def llm():
    return LLM(hub.EMBEDDED, device="cuda")


@pytest.mark.parametrize("num", [1, 2, 24])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_recorded_steps_give_the_same_bits(llm, num, temperature):
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=70, ignore_eos=True, logprobs=4)
    eager = LLM(hub.EMBEDDED, device="cuda", enforce_eager=True)
    for _ in range(2):  # the second time every shape is recorded
        got, want = (model.generate(ids(PROMPTS[:num]), params) for model in (llm, eager))
        for a, b in zip(got, want, strict=True):
            assert a.outputs[0].token_ids == b.outputs[0].token_ids
            assert a.outputs[0].logprobs == b.outputs[0].logprobs
    assert json.loads(llm._engine.report())["nodes_per_step"] is not None
    assert json.loads(eager._engine.report())["nodes_per_step"] is None


def test_a_recorded_step_follows_its_sequences(llm):
    """Lengths across the bounds of recorded shapes, and other pages and slots than those that were recorded."""
    params = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    long = [list(range(3, 903)), list(range(700, 2, -1))]
    eager = LLM(hub.EMBEDDED, device="cuda", enforce_eager=True)
    for prompts in (long, long[::-1], PROMPTS[:2]):
        got, want = (model.generate(ids(prompts), params) for model in (llm, eager))
        assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in want]


SAMPLED = [
    SamplingParams(temperature=1.3, top_k=40, seed=1, max_tokens=24),
    SamplingParams(temperature=0.9, top_p=0.7, seed=2, max_tokens=24, logprobs=5),
    SamplingParams(temperature=2.0, min_p=0.1, seed=3, max_tokens=24, repetition_penalty=1.3),
    SamplingParams(temperature=1.0, top_k=7, top_p=0.9, seed=4, max_tokens=24, frequency_penalty=0.6),
    SamplingParams(temperature=0.0, presence_penalty=1.5, logit_bias={9: 4.0}, max_tokens=24, logprobs=0),
    SamplingParams(temperature=1.0, seed=6, min_tokens=24, max_tokens=24),
]


def test_tokens_are_those_that_the_host_chooses(llm):
    """Parameters that the device does not serve (1,024 log-probabilities) bring a request to the host: with the same logits
    both choose the same."""
    for params in SAMPLED:
        fields = {name: getattr(params, name) for name in params.__dataclass_fields__}
        host = SamplingParams(**{**fields, "logprobs": 1024})
        got, want = (llm.generate(ids(PROMPTS[:1]), p)[0].outputs[0] for p in (params, host))
        assert got.token_ids == want.token_ids, params
        if params.logprobs is not None:
            for a, b in zip(got.logprobs, want.logprobs, strict=True):
                assert set(a) <= set(b)
                for token, found in a.items():
                    assert found.rank == b[token].rank and abs(found.logprob - b[token].logprob) < 1e-4


# In a process of its own, whose device holds nothing else: bytes used, and what the engine says of them.
MEMORY = """
import ctypes, json, sys
from qwen35rs import LLM, SamplingParams
llm = LLM(sys.argv[1], load_format="dummy", device="cuda", **json.loads(sys.argv[2]))
llm.generate([{"prompt_token_ids": list(range(700))}] * 4, SamplingParams(max_tokens=8, ignore_eos=True))
cuda, context, device = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_int()
free, total = ctypes.c_size_t(), ctypes.c_size_t()
assert cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0 and cuda.cuCtxSetCurrent(context) == 0
assert cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
print(json.dumps([total.value - free.value, llm.memory]))
"""


SMALL_CACHES = {"kv_cache_dtype": "fp8", "state_dtype": "float16"}


@pytest.mark.parametrize(
    ("model", "quantization", "caches"),
    [
        ("0.8b", None, {}),
        ("9b", None, {}),
        ("9b", "fp8", SMALL_CACHES),
        ("122b", "int4", {}),
        ("122b", "mixed", SMALL_CACHES),
    ],
)
def test_memory_is_what_was_planned(model, quantization, caches):
    free, total = torch.cuda.mem_get_info()
    limits = {"max_model_len": 4096, "max_num_seqs": 16, "max_num_batched_tokens": 2048}
    limits["quantization"] = quantization
    small = {"fp8_kv": bool(caches), "f16_state": bool(caches)}
    plan = _core.plan_memory(model, gpu="h200", mtp=False, gpu_memory_utilization=0.9, **limits, **small)
    planned = json.loads(plan)["memory"]
    command = [sys.executable, "-c", MEMORY, model, json.dumps(limits | caches)]
    # conftest.py may have all kernels loaded at once, which take more.
    lazy = os.environ | {"CUDA_MODULE_LOADING": "LAZY"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=lazy)
    used, held = json.loads(done.stdout)
    assert held == {k: v for k, v in planned.items() if k != "the driver and its kernels"}
    # What this process holds of the device is not in the plan.
    assert used - (total - free) == pytest.approx(sum(planned.values()), rel=0.03), (
        used,
        total - free,
        planned,
    )


def test_too_little_memory_is_an_error():
    with pytest.raises(
        OutOfMemoryError, match=r"weights \(738.3 GiB; .* what would fit: tensor_parallel_size="
    ):
        LLM("397b", load_format="dummy", device="cuda")
    with pytest.raises(OutOfMemoryError, match=r"left for keys and values; .* lower max_num_seqs to \d+, or"):
        LLM("9b", load_format="dummy", device="cuda", max_num_seqs=4096)


def test_random_weights_of_full_size():
    """The same on the device as on the host, up to the last rounding of a few."""
    on_gpu, on_cpu = (LLM("0.8b", load_format="dummy", device=d, max_model_len=256) for d in ("cuda", "cpu"))
    tokens = list(range(100, 140))
    got, want = on_gpu.logits(tokens), on_cpu.logits(tokens)
    assert np.sqrt(((got - want) ** 2).mean()) < 0.05 * want.std()
    step = speed.decode(on_gpu, 1, 32, 8)
    assert step.nodes is not None and step.seconds < 0.1


def test_steps_ahead_of_their_tokens_change_nothing(llm):
    """A step that starts before the host has read the tokens of the one before, with requests that come, end early and
    are given up meanwhile. More log-probabilities than the device gives are asked for where no step may run ahead."""

    def params(i, **changes):
        return SamplingParams(
            temperature=0.8 * (i % 2), seed=i, max_tokens=30 + 3 * i, ignore_eos=True, **changes
        )

    def run(i, **changes):
        return llm.generate(ids(PROMPTS[i : i + 1]), params(i, **changes))[0].outputs[0].token_ids

    numbers = range(12)
    waited = [run(i, logprobs=40) for i in numbers]
    stops = [waited[i][5 + i : 6 + i] if i % 3 else [] for i in numbers]
    expected = [t[: t.index(s[0]) + 1] if s else t for t, s in zip(waited, stops, strict=True)]
    for i in numbers:
        assert run(i, stop_token_ids=stops[i]) == expected[i]
    together = [params(i, stop_token_ids=stops[i]) for i in numbers]
    assert [o.outputs[0].token_ids for o in llm.generate(ids(PROMPTS[:12]), together)] == expected

    got = {}

    def serve(first):
        for i in range(first, 12, 3):
            for _ in zip(range(7), llm.stream(ids(PROMPTS[20:21])[0], params(3)), strict=False):
                pass  # given up after some tokens
            got[i] = run(i, stop_token_ids=stops[i])

    threads = [threading.Thread(target=serve, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [got.get(i) for i in numbers] == expected


@pytest.mark.parametrize("num", [1, 5, 700])
def test_logits_stay_on_the_device(num):
    llm = LLM(hub.EMBEDDED, device="cuda", max_num_batched_tokens=256)
    token_ids = [(37 * i + 5) % 900 for i in range(num)]
    free = torch.cuda.mem_get_info()[0]
    logits = torch.from_dlpack(llm.logits(token_ids, on_device=True))
    assert logits.is_cuda and logits.dtype == torch.float32
    assert free - torch.cuda.mem_get_info()[0] >= logits.nbytes - (2 << 20)
    expected = torch.from_numpy(llm.logits(token_ids))
    assert torch.equal(logits.cpu().view(torch.int32), expected.view(torch.int32))
    del llm
    gc.collect()
    assert torch.equal(logits.cpu().view(torch.int32), expected.view(torch.int32))


def test_a_thread_that_waits_for_the_whole_device():
    """It ends every recording that is under way, and is refused itself; the step is then run as it is."""
    prompts, params = ids(PROMPTS[:8]), SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    llm, eager = (LLM(device="cuda", deterministic=True, enforce_eager=eager) for eager in (False, True))
    want = [out.outputs[0].token_ids for out in eager.generate(prompts, params)]
    done, refused = threading.Event(), []

    def wait():
        while not done.is_set():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                refused.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    try:
        for n in range(1, 9):  # a shape each
            found = [out.outputs[0].token_ids for out in llm.generate(prompts[:n], params)]
            assert found == want[:n]
    finally:
        done.set()
        waiting.join()
    assert refused, "no recording was met"
    assert all("capturing" in why for why in refused), refused[:3]
