"""The net against Transformers, on the committed checkpoints of `golden/data`.

Logits to 2e-4 of the largest, greedy tokens exactly; then the engine against itself: in a batch, with the
prompt in pieces, token by token. Those must not change a bit, except that decoding token by token rounds
otherwise than a prefill.
"""

from functools import cache

import numpy as np
import pytest
from golden.cases import CASES, Golden
from qwen35rs import LLM, SamplingParams

TOLERANCE = Golden.TOLERANCE


@cache
def load(name, **limits):
    return LLM(str(Golden(name).path), **limits)


def generate(llm, prompts, num_tokens):
    """For each prompt, the completion: `token_ids` and `logprobs` of the chosen and the best five."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=5)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    assert [list(out.prompt_token_ids) for out in outputs] == prompts
    return [out.outputs[0] for out in outputs]


def same(a, b):
    """Equal tokens and, to the bit, equal log-probabilities."""
    assert list(a.token_ids) == list(b.token_ids)
    assert a.logprobs == b.logprobs


def chosen_logprobs(completion):
    """The log-probability of each generated token."""
    entries = zip(completion.logprobs, completion.token_ids, strict=True)
    values = [entry[token] if isinstance(entry, dict) else entry for entry, token in entries]
    return np.array([getattr(v, "logprob", getattr(v, "chosen", v)) for v in values], np.float64)


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def distance(got, want):
    """Largest and root-mean-square difference, as shares of the largest magnitude of `want`."""
    scale, error = np.abs(want).max(), got.astype(np.float64) - want
    return np.abs(error).max() / scale, np.sqrt((error**2).mean()) / scale


@pytest.mark.parametrize("name", CASES)
def test_logits(name):
    for prompt in Golden(name).prompts:
        logits = load(name).logits(prompt.sequence)
        assert logits.dtype == np.float32
        assert logits.shape == (len(prompt.sequence), prompt.logits.shape[1])
        assert distance(logits[prompt.rows], prompt.logits)[0] <= TOLERANCE, len(prompt.tokens)


@pytest.mark.parametrize("name", [name for name in CASES if Golden(name).prompts[0].logits_bf16 is not None])
def test_16_bit_weights_cost_no_16_bit_arithmetic(name):
    """Our distance from float32 arithmetic is a small part of the distance of Transformers' own bf16 run."""
    for prompt in Golden(name).prompts:
        ours = distance(load(name).logits(prompt.sequence)[prompt.rows], prompt.logits)
        theirs = distance(prompt.logits_bf16, prompt.logits)
        assert ours[0] <= theirs[0] / 20 and ours[1] <= theirs[1] / 20, (ours, theirs)


@pytest.mark.parametrize("name", CASES)
def test_greedy(name):
    for prompt in Golden(name).prompts:
        (completion,) = generate(load(name), [prompt.tokens], len(prompt.greedy))
        assert list(completion.token_ids) == prompt.greedy
        assert completion.finish_reason == "length"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("max_num_seqs", [2, 16])
def test_a_batch_changes_nothing(name, max_num_seqs):
    """All prompts at once, of uneven lengths, with fewer seats than prompts or more: the bits of each alone."""
    prompts = [prompt.tokens for prompt in Golden(name).prompts]
    prompts = [*prompts, prompts[-1], prompts[-1][:3]]
    together = generate(load(name, max_num_seqs=max_num_seqs), prompts, 24)
    for prompt, completion in zip(prompts, together, strict=True):
        same(completion, generate(load(name), [prompt], 24)[0])


@pytest.mark.parametrize("name", CASES)
def test_a_prompt_in_pieces_changes_nothing(name):
    """A prefill of 64 tokens a step and one of 4096: the same bits."""
    whole, pieces = load(name, max_num_batched_tokens=4096), load(name, max_num_batched_tokens=64)
    for prompt in Golden(name).prompts:
        assert np.array_equal(whole.logits(prompt.sequence), pieces.logits(prompt.sequence))
        same(*(generate(llm, [prompt.tokens], 8)[0] for llm in (whole, pieces)))
    prompts = [prompt.tokens for prompt in Golden(name).prompts]
    for a, b in zip(*(generate(llm, prompts, 8) for llm in (whole, pieces)), strict=True):
        same(a, b)


@pytest.mark.parametrize("name", CASES)
def test_pieces_of_any_size(name):
    """Steps whose limit is no multiple of the delta rule's chunk: equal to float32 rounding."""
    odd = load(name, max_num_batched_tokens=100)
    for prompt in Golden(name).prompts:
        logits = odd.logits(prompt.sequence)
        assert distance(logits[prompt.rows], prompt.logits)[0] <= TOLERANCE
        assert list(generate(odd, [prompt.tokens], 24)[0].token_ids) == prompt.greedy


@pytest.mark.parametrize("name", CASES)
def test_decoding_is_prefilling(name):
    """The log-probabilities of the decode are those of one pass over prompt and continuation."""
    for prompt in Golden(name).prompts:
        (completion,) = generate(load(name), [prompt.tokens], len(prompt.greedy))
        logits = load(name).logits(prompt.sequence)[len(prompt.tokens) - 1 :]
        expected = log_softmax(logits)[np.arange(len(prompt.greedy)), prompt.greedy]
        scale = np.abs(logits).max()
        assert np.abs(chosen_logprobs(completion) - expected).max() <= TOLERANCE * scale


@pytest.mark.parametrize("name", CASES)
def test_the_same_twice(name):
    prompt = Golden(name).prompts[-1]
    assert np.array_equal(load(name).logits(prompt.sequence), load(name).logits(prompt.sequence))
    same(*(generate(load(name), [prompt.tokens], 24)[0] for _ in range(2)))
