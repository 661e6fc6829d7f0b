"""The model of the package: its files, its speed, its answers, and that Transformers says the same of it."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from golden import embedded
from golden.cases import Golden
from qwen35rs import LLM, SamplingParams, bench, hub, tasks, vocabulary

REPO = Path(__file__).parent.parent
GREEDY = SamplingParams(temperature=0, max_tokens=bench.MAX_TOKENS)


@pytest.fixture(scope="module")
def llm():
    return LLM(hub.EMBEDDED, mtp=True)


@pytest.fixture(scope="module")
def recorded():
    return np.load(embedded.FILE)


# ------------------------------------------------------------------------------------------------- files


def test_it_is_small_and_complete():
    sizes = {file.name: file.stat().st_size for file in hub.EMBEDDED.iterdir()}
    assert sorted(sizes) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sum(sizes.values()) <= 16_000_000


def test_it_has_every_kind_of_block():
    text = json.loads((hub.EMBEDDED / "config.json").read_text())["text_config"]
    kinds = text["layer_types"]
    assert len(kinds) >= 8 and kinds == (["linear_attention"] * 3 + ["full_attention"]) * (len(kinds) // 4)
    assert text["linear_num_value_heads"] > text["linear_num_key_heads"]
    assert text["num_attention_heads"] > text["num_key_value_heads"] and text["attn_output_gate"]
    assert (
        text["rope_parameters"]["partial_rotary_factor"] < 1 and text["rope_parameters"]["mrope_interleaved"]
    )
    assert text["num_experts"] >= 16 and text["num_experts_per_tok"] >= 4
    assert text["shared_expert_intermediate_size"] > 0 and not text["tie_word_embeddings"]
    header = (hub.EMBEDDED / "model.safetensors").read_bytes()[:60_000]
    assert b'"mtp.fc.weight"' in header and b'"lm_head.weight"' in header


def test_its_vocabulary_is_the_start_of_the_familys(llm):
    added = len(llm.tokenizer.added_tokens)
    assert 3000 <= llm.tokenizer.vocab_size <= 6000 and added == 33
    num = len(llm.tokenizer) - added
    ranks = vocabulary.real_ranks(num)
    assert [llm.tokenizer.token_bytes(i) for i in range(num)] == sorted(ranks, key=ranks.get)
    assert llm.tokenizer.chat_template == (REPO / "src/tokenizer/qwen3_5.jinja").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------- the default


def test_it_runs_where_no_model_is_named_and_says_so():
    code = "from qwen35rs import LLM; print(LLM().model)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "embedded\n"
    assert done.stderr.startswith("note: no model is named") and "tiny demonstration model" in done.stderr


def test_it_is_quick():
    start = time.perf_counter()
    llm = LLM(hub.EMBEDDED)
    loaded = time.perf_counter()
    first, num = None, 0
    for _ in llm.stream_chat([{"role": "user", "content": "Who are you?"}], GREEDY):
        first = first or time.perf_counter()
        num += 1
    end = time.perf_counter()
    assert loaded - start < 0.3 and first - loaded < 0.2
    assert num > 20 and (num - 1) / (end - first) > 100


# --------------------------------------------------------------------------------- what Transformers says


@pytest.mark.parametrize("i", range(embedded.NUM))
def test_logits_and_answer_are_those_of_transformers(i, llm, recorded):
    prompt, greedy = recorded[f"prompt_{i}"].tolist(), recorded[f"greedy_{i}"].tolist()
    want = recorded[f"logits_{i}"]
    found = llm.logits(prompt + greedy)[recorded[f"rows_{i}"]]
    assert np.abs(found - want).max() <= Golden.TOLERANCE * np.abs(want).max()
    (output,) = llm.generate([prompt], GREEDY)
    assert output.outputs[0].token_ids == greedy


def test_the_questions_are_the_recorded_ones(recorded):
    for i, (_, _, prompt, expected) in enumerate(embedded.questions()):
        assert recorded[f"prompt_{i}"].tolist() == prompt and len(recorded[f"losses_{i}"]) == len(expected)


def test_perplexity_is_that_of_transformers(llm, recorded):
    losses = {task: ([], []) for task in tasks.SUITE}
    for i, (task, _, prompt, expected) in enumerate(embedded.questions()):
        rows = llm.logits(prompt + expected)[len(prompt) - 1 : -1, : len(llm.tokenizer)].astype(np.float64)
        mine = np.logaddexp.reduce(rows, axis=1) - rows[np.arange(len(expected)), expected]
        losses[task][0].extend(mine)
        losses[task][1].extend(recorded[f"losses_{i}"])
    for task, (mine, theirs) in losses.items():
        assert np.exp(np.mean(mine)) == pytest.approx(np.exp(np.mean(theirs)), rel=1e-3), task


# ------------------------------------------------------------------------------------------- the task suite

# Right answers of the first questions. Greedy decoding has the same bits on every processor: a number that changes is a
# changed result.
SLICE = {
    "arithmetic": (16, 16),
    "arithmetic, three digits": (14, 16),
    "recall": (16, 16),
    "recall, long": (6, 6),
    "text": (14, 16),
    "tools": (15, 16),
    "json": (16, 16),
    "talk": (16, 16),
}


@pytest.mark.parametrize("task", tasks.SUITE)
def test_the_first_questions(llm, task):
    num_correct, num_items = SLICE[task]
    (result,) = bench.measure(llm, [task], num_items=num_items)
    assert result.num_correct == num_correct
    assert result.mtp_agreement > 0.97


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_full_suite(llm):
    least = {
        "arithmetic": 0.95,
        "recall": 0.97,
        "recall, long": 0.9,
        "text": 0.9,
        "tools": 0.95,
        "json": 0.95,
    }
    for result in bench.measure(llm, num_items=512):
        assert result.accuracy >= least.get(result.task, 0), result


def test_a_history_of_other_questions_does_not_confuse_it(llm):
    questions = itertools.islice(tasks.items("arithmetic", seed=2), 3)
    messages = []
    for item in questions:
        messages += [*item.messages, {"role": "assistant", "content": item.expected["content"]}]
    messages.append({"role": "user", "content": "What is 17 + 25?"})
    (output,) = llm.chat(messages, GREEDY, enable_thinking=False)
    assert output.outputs[0].text == "17 + 25 = 42"
