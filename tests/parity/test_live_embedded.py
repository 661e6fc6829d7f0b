"""The embedded model in a live Transformers: the recorded answers, and others."""

from itertools import islice

import numpy as np
import pytest
import torch
from golden import embedded, ops_checks
from golden import make_embedded as reference
from qwen35rs import LLM, SamplingParams, hub, tasks


@pytest.fixture(scope="module")
def model():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield reference.load()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llm():
    return LLM(hub.EMBEDDED)


def test_the_records_are_made_again(model, llm):
    recorded, end = np.load(embedded.FILE), llm.tokenizer.added_tokens["<|im_end|>"]
    for i, (_, _, prompt, expected) in enumerate(embedded.questions()):
        if i % 5 or len(prompt) > 1500:
            continue
        fresh = reference.record(model, prompt, expected, end)
        assert np.array_equal(fresh["greedy"], recorded[f"greedy_{i}"]), i
        ops_checks.close(fresh["logits"], recorded[f"logits_{i}"], 5e-5)
        np.testing.assert_allclose(fresh["losses"], recorded[f"losses_{i}"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("task", tasks.SHORT)
def test_the_same_text(model, llm, task):
    end = llm.tokenizer.added_tokens["<|im_end|>"]
    for item in islice(tasks.items(task, seed=51), 4):
        prompt = llm.tokenizer.apply_chat_template(
            item.messages, tools=item.tools, enable_thinking=item.thinking, add_generation_prompt=True
        )
        (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=512))
        said = reference.answer(model, prompt, end, len(output.outputs[0].token_ids))
        assert output.outputs[0].token_ids == said
