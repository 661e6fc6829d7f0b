"""The sampler through the public API, against numpy on the model's own logits."""

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen35rs import LLM, SamplingParams

PROMPT = [10, 200, 31, 45]
DRAWS = 64


@pytest.fixture(scope="module")
def row(llm):
    return llm.logits(PROMPT)[-1, : tiny.NUM_TOKENS].astype(np.float64)


def may_be_drawn(row, temperature, top_k, top_p, min_p, slack):
    """The tokens that filters leave, from a sort of all."""
    order = np.argsort(-row, kind="stable")[: top_k or None]
    weights = np.exp((row[order] - row[order[0]]) / temperature)
    before = np.concatenate([[0], np.cumsum(weights)[:-1]]) / weights.sum()
    keep = (before < top_p + slack) & (weights >= min_p - slack)
    keep[0] = True
    return order[: np.argmin(keep) if not keep.all() else None]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    temperature=st.sampled_from([0.2, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 50, tiny.NUM_TOKENS, 10**6]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(0, 2**62),
)
def test_filters(llm, row, temperature, top_k, top_p, min_p, seed):
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, n=DRAWS, max_tokens=1
    )
    (out,) = llm.generate([PROMPT], params)
    drawn = {completion.token_ids[0] for completion in out.outputs}
    args = (row, temperature, top_k, top_p, min_p)
    assert drawn <= set(may_be_drawn(*args, 1e-5).tolist())
    # A token with p > 0.3 is missed by 64 draws once in 10^10.
    least = may_be_drawn(*args, -1e-5)
    weights = np.exp((row[least] - row[least[0]]) / temperature)
    assert set(least[weights / weights.sum() > 0.3].tolist()) <= drawn
    (again,) = llm.generate([PROMPT], params)
    assert again == out


def test_frequencies(llm, row):
    (out,) = llm.generate([PROMPT], SamplingParams(temperature=1.0, seed=11, n=4000, max_tokens=1))
    counts = np.bincount([c.token_ids[0] for c in out.outputs], minlength=tiny.NUM_TOKENS)
    p = np.exp(row - row.max())
    p /= p.sum()
    likely = p > 0.01
    error = np.abs(counts - 4000 * p)[likely] / np.sqrt(4000 * p * (1 - p))[likely]
    assert error.max() < 4.5, error


def test_penalties(llm):
    repeat = {"temperature": 0, "max_tokens": 12, "logit_bias": {65: 8.0, 66: 7.5}, "ignore_eos": True}
    plain = llm.generate([PROMPT], SamplingParams(**repeat))[0].token_ids
    assert plain.count(65) > 6
    present = llm.generate([PROMPT], SamplingParams(**repeat, presence_penalty=2.0))[0].token_ids
    frequent = llm.generate([PROMPT], SamplingParams(**repeat, frequency_penalty=2.0))[0].token_ids
    assert 66 in present and 66 in frequent
    assert max(frequent.count(t) for t in set(frequent)) < plain.count(65)
    # The prompt counts for repetition_penalty, and for no other.
    seen = {"temperature": 0, "max_tokens": 1, "logit_bias": {PROMPT[0]: 12.0}}
    assert llm.generate([PROMPT], SamplingParams(**seen, presence_penalty=2.0))[0].token_ids == PROMPT[:1]
    assert llm.generate([PROMPT], SamplingParams(**seen, repetition_penalty=100.0))[0].token_ids != PROMPT[:1]


def test_a_temperature_of_next_to_nothing_is_greedy(llm):
    greedy = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=8))[0].token_ids
    for extra in ({}, {"top_p": 0.5}, {"top_k": 5}, {"min_p": 0.5}):
        for temperature in (1e-6, 1e-30):
            params = SamplingParams(temperature=temperature, max_tokens=8, **extra)
            assert llm.generate([PROMPT], params)[0].token_ids == greedy


def test_what_is_found_by_the_few_largest_logits_is_what_all_give(tmp_path):
    # A head of 9000 rows has its 8-bit copy; asking for log-probabilities takes all logits from the head itself.
    llm = LLM(tiny.write_checkpoint(tmp_path / "wide", vocab=9000, tokenizer=False))
    prompts = [list(range(i, i + 5 + i)) for i in range(0, 60, 5)]
    for sampling in (
        {"temperature": 0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.95},
        {"temperature": 2.0, "top_k": 30, "min_p": 0.1, "n": 2},
        {"temperature": 1.0, "top_k": 2000},  # too many for the copy
    ):
        params = {"max_tokens": 12, "seed": 7, "ignore_eos": True, **sampling}
        few, whole = (
            [
                out.token_ids
                for result in llm.generate(prompts, SamplingParams(**params, **more))
                for out in result.outputs
            ]
            for more in ({}, {"logprobs": 0})
        )
        assert few == whole and len({tuple(ids) for ids in few}) > 1
        # All at once there are more tokens in a step than the copy is used for; one or three at once there are not.
        for size in (1, 3):
            parts = [
                out.token_ids
                for i in range(0, 6, size)
                for result in llm.generate(prompts[i : i + size], SamplingParams(**params))
                for out in result.outputs
            ]
            assert parts == whole[: len(parts)]
