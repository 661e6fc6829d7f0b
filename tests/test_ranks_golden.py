"""The recorded models on 2, 3, 4 and 8 ranks against Transformers: their heads and widths are filled up until they divide,
which changes no number. On the CPU."""

import json
from itertools import islice

import numpy as np
import pytest
from golden.cases import CASES, Golden
from qwen35rs import LLM, SamplingParams, hub, tasks
from qwen35rs.bench import prompt_of
from widened import widen

WORLDS = (2, 3, 4, 8)


def geometry(path):
    config = json.loads((path / "config.json").read_text())
    return config.get("text_config", config)


def check(golden, llm, prompts):
    for prompt in prompts:
        found, want = llm.logits(prompt.sequence)[prompt.rows], prompt.logits
        assert np.abs(found - want).max() <= Golden.TOLERANCE * np.abs(want).max()


@pytest.mark.parametrize("name", [name for name in CASES if name != "moe_ranks"])
def test_logits_are_those_of_transformers(name, tmp_path):
    golden = Golden(name)
    path = widen(golden.path, tmp_path / "wide")
    sizes = geometry(path)
    assert sizes["num_attention_heads"] % 24 == 0 and sizes["linear_num_key_heads"] % 24 == 0
    check(golden, LLM(path, device="cpu"), golden.prompts)
    experts = sizes.get("num_experts") or 0
    ways = [(world, False) for world in WORLDS]
    ways += [(world, True) for world in WORLDS if experts and experts % world == 0]
    for world, expert_parallel in ways:
        llm = LLM(path, device="cpu", tensor_parallel_size=world, expert_parallel=expert_parallel)
        check(golden, llm, golden.prompts[-1:])


@pytest.mark.parametrize(
    ("name", "kv_heads"), [("dense_bf16", 2), ("dense_attention_only", 1), ("moe_r4", 2)]
)
def test_ranks_that_are_more_than_key_value_heads(name, kv_heads, tmp_path):
    """Each then holds the one that its queries read, as other ranks do."""
    golden = Golden(name)
    path = widen(golden.path, tmp_path / "wide", keep_kv=True)
    assert geometry(path)["num_key_value_heads"] == kv_heads
    for world in WORLDS:
        if world % kv_heads == 0:
            check(golden, LLM(path, device="cpu", tensor_parallel_size=world), golden.prompts)


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_four_ranks_answer_what_one_answers(expert_parallel, tmp_path):
    """The embedded model has two key heads."""
    path = widen(hub.EMBEDDED, tmp_path / "wide", multiple=4, keep_kv=True)
    sizes = geometry(path)
    assert (sizes["linear_num_key_heads"], sizes["num_key_value_heads"]) == (4, 2)
    params = SamplingParams(temperature=0, max_tokens=48)

    def answers(llm):
        items = [item for name in tasks.SHORT for item in islice(tasks.items(name), 2)]
        prompts = [prompt_of(llm, item) for item in items]
        return [list(result.outputs[0].token_ids) for result in llm.generate(prompts, params)]

    one = answers(LLM(hub.EMBEDDED, device="cpu"))
    assert sum(map(len, one)) > 200
    four = LLM(path, device="cpu", tensor_parallel_size=4, expert_parallel=expert_parallel)
    assert answers(four) == one
