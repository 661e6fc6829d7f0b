"""A model shared by ranks that are threads of one process. On the CPU."""

import threading
import time

import gguf_file as g
import numpy as np
import pytest
from golden.cases import Golden
from qwen35rs import LLM, RequestError, SamplingParams
from test_gguf import GOLDEN, QUANTISED, wide
from test_quantised import FORMATS, pair
from test_ranks_processes import QUESTIONS

GREEDY = SamplingParams(temperature=0, max_tokens=24)


def prompt(n):
    return [(7 * i * i + 3 * i) % 140 for i in range(n)]


def answers(llm):
    return [out.text for out in llm.chat([[{"role": "user", "content": q}] for q in QUESTIONS], GREEDY)]


def near(one, other):
    largest = np.abs(one).max()
    assert np.abs(one - other).max() <= 2e-5 * largest


@pytest.fixture(scope="module")
def alone():
    return answers(LLM(device="cpu"))


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_the_embedded_model_says_the_same(alone, expert_parallel):
    llm = LLM(device="cpu", tensor_parallel_size=2, expert_parallel=expert_parallel)
    assert answers(llm) == alone


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("expert_parallel", [False, True])
def test_logits_are_those_of_transformers(world, expert_parallel):
    """Against the reference itself, not only against one rank."""
    golden = Golden("moe_ranks")
    llm = LLM(
        golden.path,
        device="cpu",
        tensor_parallel_size=world,
        expert_parallel=expert_parallel,
        mtp=True,
    )
    one = LLM(golden.path, device="cpu", mtp=True)
    for prompt in golden.prompts:
        logits = llm.logits(prompt.sequence)
        near(prompt.logits, logits[prompt.rows])
        near(one.logits(prompt.sequence), logits)
        near(one.mtp_logits(prompt.sequence), llm.mtp_logits(prompt.sequence))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("source", "worlds"), [("moe_ranks", (2, 4, 8)), ("dense_bf16", (2,)), ("moe_bf16", (2,))]
)
def test_every_format_is_shared(tmp_path, name, source, worlds):
    """Blocks and groups are cut, or filled up with zeros: nothing is decoded otherwise than alone."""
    checkpoint, _, _ = pair(tmp_path, source, name)
    ids = prompt(70)
    alone = LLM(checkpoint, device="cpu").logits(ids)
    ways = [(world, False) for world in worlds]
    if source.startswith("moe"):  # experts whole, in every way that they are stored
        ways.append((worlds[len(worlds) // 2], True))
    for world, expert_parallel in ways:
        llm = LLM(checkpoint, device="cpu", tensor_parallel_size=world, expert_parallel=expert_parallel)
        near(alone, llm.logits(ids))


@pytest.mark.parametrize("quantization", ["int4", "fp8", "mixed"])
def test_what_is_quantised_at_load_is_cut_first(quantization):
    """Groups are then those of a rank's own matrices: not the same numbers, but no worse ones."""
    ids = prompt(200)
    exact = LLM(device="cpu").logits(ids)

    def error(world):
        logits = LLM(device="cpu", quantization=quantization, tensor_parallel_size=world).logits(ids)
        return np.sqrt(np.square(logits - exact).mean())

    one = error(1)
    assert one / 1.25 <= error(2) <= 1.1 * one


@pytest.mark.parametrize("kind", [None, *QUANTISED])
def test_gguf_files_are_shared(kind, tmp_path):
    """Blocks of 256 are cut along both of their dimensions; value heads are in an order of the file's own."""
    path = GOLDEN / "dense-f32.gguf"
    if kind is not None:
        values, tensors, _ = wide(kind)
        path = g.write(tmp_path / "wide.gguf", values, tensors)
    one, two = (LLM(path, device="cpu", tensor_parallel_size=world) for world in (1, 2))
    near(one.logits(prompt(70)), two.logits(prompt(70)))


def test_sizes_that_cannot_be():
    for size, text in [(3, "allowed: 1, 2, which divide 2 key and 4 value heads"), (0, "allowed: 1 to 1024")]:
        with pytest.raises(RequestError, match=f"tensor_parallel_size: found {size}; {text}"):
            LLM(device="cpu", tensor_parallel_size=size)
    for size in (True, "2", 2.0, None):
        with pytest.raises(
            RequestError, match="tensor_parallel_size: found .*; allowed: 1 to 1024, an integer"
        ):
            LLM(device="cpu", tensor_parallel_size=size)
    assert LLM(device="cpu", tensor_parallel_size=np.int64(2)).device == "cpu"
    with pytest.raises(RequestError, match="expert_parallel: found True with one rank"):
        LLM(device="cpu", expert_parallel=True)
    with pytest.raises(RequestError, match="expert_parallel: found 'no'; allowed: True, False"):
        LLM(device="cpu", tensor_parallel_size=2, expert_parallel="no")


def test_a_way_to_add_up_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("QWEN35RS_COLLECTIVES", "Nccl")
    with pytest.raises(RequestError, match='QWEN35RS_COLLECTIVES: found "Nccl"; allowed: auto, direct, nccl'):
        LLM(device="cpu", tensor_parallel_size=2)
    LLM(device="cpu")


def test_python_goes_on_while_an_llm_ends():
    # A step among ranks is not abandoned, and who drops the last handle waits for it; other threads do not.
    llm = LLM(device="cpu", tensor_parallel_size=2, max_num_batched_tokens=4096)
    stream = llm.stream([1] * 4000, SamplingParams(max_tokens=1))
    time.sleep(0.1)
    ended, gaps = threading.Event(), []

    def tick():
        last = time.perf_counter()
        while not ended.is_set():
            time.sleep(0.005)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    ticking = threading.Thread(target=tick)
    ticking.start()
    start = time.perf_counter()
    del llm, stream
    took = time.perf_counter() - start
    ended.set()
    ticking.join()
    assert took > 0.2 and max(gaps) < took / 2, (took, max(gaps))
