"""`bench tasks`: right and wrong answers are told apart, through the public API."""

import json
import re
import subprocess
import sys
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from qwen35rs import LLM, RequestError, bench, tasks
from qwen35rs.demo import make_checkpoint


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("demo") / "bytes", vocab="bytes").path


class Answers:
    """The demo model's tokenizer and logits, with answers that are known."""

    def __init__(self, llm, answers):
        self.tokenizer, self.logits, self.answers, self.prompts = llm.tokenizer, llm.logits, answers, []
        self.has_mtp = False

    def generate(self, prompts, params):
        assert params.temperature == 0
        self.prompts += prompts
        outputs = islice(self.answers, len(prompts))
        return [SimpleNamespace(outputs=[SimpleNamespace(text=t, finish_reason=why)]) for t, why in outputs]


@pytest.fixture(scope="module")
def llm(demo):
    return LLM(demo)


@pytest.mark.parametrize("name", [name for name in tasks.SUITE if "recall" not in name])
def test_expected_answers_are_right_and_others_are_not(llm, name):
    items = list(islice(tasks.items(name, seed=3), 6))
    texts = [item.completion.removesuffix("<|im_end|>") for item in items]
    right = Answers(llm, ((text, "stop") for text in texts))
    (result,) = bench.measure(right, [name], num_items=6, seed=3)
    assert (result.task, result.num_items, result.num_correct) == (name, 6, 6) and result.accuracy == 1
    assert all(
        item.messages[-1]["content"] in prompt for item, prompt in zip(items, right.prompts, strict=True)
    )
    cut = Answers(llm, ((text, "length") for text in texts))
    assert bench.measure(cut, [name], num_items=6, seed=3)[0].num_correct == 0
    wrong = Answers(llm, (("no", "stop") for _ in texts))
    assert bench.measure(wrong, [name], num_items=6, seed=3)[0].num_correct == 0


def test_the_interval_is_wilsons():
    # Values of Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for right, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)):  # fmt: skip
        result = bench.TaskResult("", n, right, 1.0)
        np.testing.assert_allclose(result.interval, (low, high), atol=5e-5)


def test_perplexity_is_that_of_the_logits(llm):
    (result,) = bench.measure(llm, ["talk"], num_items=1, seed=1)
    item = next(tasks.items("talk", seed=1))
    prompt = llm.tokenizer.apply_chat_template(
        item.messages, add_generation_prompt=True, tokenize=False, enable_thinking=item.thinking
    )
    ids, total = llm.tokenizer.encode(prompt), []
    for token in llm.tokenizer.encode(item.completion):  # one at a time, from the last logits
        row = llm.logits(ids)[-1, : len(llm.tokenizer)].astype(np.float64)
        total.append(np.logaddexp.reduce(row) - row[token])
        ids.append(token)
    assert result.perplexity == pytest.approx(np.exp(np.mean(total)), rel=1e-4)


class Drafted(Answers):
    """Of every three tokens of its answers, the module drafted the first."""

    def __init__(self, llm, num_tokens):
        super().__init__(llm, [])
        self.has_mtp, self.mtp_logits, self.num_tokens = True, llm.mtp_logits, num_tokens

    def generate(self, prompts, params):
        outputs = []
        for prompt, num_tokens in zip(prompts, self.num_tokens, strict=True):
            ids, first = self.tokenizer.encode(prompt), len(self.tokenizer.encode(prompt))
            for i in range(num_tokens):  # one at a time, from the last draft
                draft = int(self.mtp_logits(ids)[-1, : len(self.tokenizer)].argmax())
                ids.append(draft if i % 3 == 0 else (draft + 1) % len(self.tokenizer))
            answer = SimpleNamespace(text="", finish_reason="stop", token_ids=ids[first:])
            outputs.append(SimpleNamespace(outputs=[answer]))
        return outputs


def test_agreement_is_that_of_the_drafts(demo, tmp_path):
    path = tiny.add_mtp(tmp_path / "model", demo)
    llm = LLM(path, mtp=True)
    (result,) = bench.measure(Drafted(llm, [6, 1]), ["talk"], num_items=2)
    assert result.mtp_agreement == 3 / 7  # every token counts alike
    (row,) = json.loads(command(path, "--json"))["tasks"].values()
    assert 0 <= row["mtp_agreement"] <= 1
    assert re.search(r"perplexity [\d.e+]+   drafts agree +[\d.]+%\n$", command(path))


def test_what_is_refused(llm):
    with pytest.raises(
        RequestError, match="task: found 'chess'; allowed: 'arithmetic', 'arithmetic, three digits', "
    ):
        bench.measure(llm, ["chess"])
    for num_items in (0, 10**9):
        with pytest.raises(
            RequestError, match=f"num_items: found {num_items}; allowed: an integer from 1 to"
        ):
            bench.measure(llm, num_items=num_items)
    with pytest.raises(RequestError, match=r"num_items: found 1\.5; allowed: an integer"):
        bench.measure(llm, num_items=1.5)
    with pytest.raises(RequestError, match="task: found 'chess'; allowed: "):
        bench.measure(llm, "chess")


def command(path, *more):
    words = ["bench", "tasks", "--model", str(path), "--n", "2", "--task", "talk", *more]
    return subprocess.check_output([sys.executable, "-m", "qwen35rs", *words], text=True)


def test_the_command(demo):
    found = json.loads(command(demo, "--json"))
    (row,) = found["tasks"].values()
    assert found["num_items"] == 2 and row["num_correct"] == 0 and row["perplexity"] > 50
    assert row["interval"][0] == 0 and 0.6 < row["interval"][1] < 0.7
    assert row["mtp_agreement"] is None
    text = command(demo)
    assert text.startswith("talk                         0.0%   0.0% to 65.8%") and "draft" not in text
