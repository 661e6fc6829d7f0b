"""The whole net on a GPU against the CPU: the goldens, the embedded model, and requests in any company.

A GPU multiplies bf16 and rounds activations to it, so that tokens may differ where two are as good as equal: what is
bounded is how much worse, by the CPU's logits, the GPU's choice is, and how far log-probabilities are apart.
"""

from functools import lru_cache
from itertools import islice

import numpy as np
import pytest
from golden import embedded
from golden.cases import CASES, Golden
from golden.noise import compare, log_softmax, recorded, within
from qwen35rs import LLM, RequestError, SamplingParams, bench, hub, tasks

pytestmark = pytest.mark.gpu


@lru_cache(4)  # a device is not endless
def load(path, device, **limits):
    return LLM(path, device=device, **limits)


def greedy(llm, prompts, num_tokens, **params):
    params = SamplingParams(temperature=0, max_tokens=num_tokens, **params)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    return [out.outputs[0] for out in outputs]


def questions(num):
    """Prompts of the task suite, and their expected answers, as token ids."""
    tokenizer, found = load(hub.EMBEDDED, "cpu").tokenizer, []
    for task in tasks.SUITE:
        for item in islice(tasks.items(task, seed=3), num):
            prompt = tokenizer.apply_chat_template(
                item.messages, tools=item.tools, enable_thinking=item.thinking, add_generation_prompt=True
            )
            found.append((prompt, tokenizer.encode(item.completion)))
    return found


# ------------------------------------------------------------------------------------------------ goldens


@lru_cache
def pairs(name):
    """Logits on the GPU and on the CPU."""
    path, found = str(Golden(name).path), []
    for prompt in Golden(name).prompts:
        got, want = (load(path, device).logits(prompt.sequence) for device in ("cuda", "cpu"))
        assert got.shape == want.shape and np.isfinite(got).all()
        found.append((got, want))
    return found


@pytest.mark.parametrize("name", CASES)
def test_logits_of_the_goldens(name):
    """As near to float32 arithmetic as Transformers in bf16 (random weights: every rounding shows)."""
    assert within(compare(pairs(name)), name), (compare(pairs(name)), recorded(name))


def test_the_best_tokens_of_the_goldens():
    found = compare([pair for name in CASES for pair in pairs(name)])
    assert within(found, "goldens", ("regret_mean", "regret_p99")), (found, recorded("goldens"))


def test_generated_tokens_are_as_good_as_the_best():
    """Token by token (the decode kernels), judged by the CPU's logits of the same sequence; what Transformers in bf16 costs
    is weighted as these tokens are."""
    found, noise = [], []
    for name in CASES:
        path = str(Golden(name).path)
        for prompt in Golden(name).prompts:
            (out,) = greedy(load(path, "cuda"), [prompt.tokens], 24, ignore_eos=True)
            sequence = prompt.tokens + list(out.token_ids)
            rows = log_softmax(load(path, "cpu").logits(sequence[:-1])[len(prompt.tokens) - 1 :])
            found.append(rows.max(-1) - rows[np.arange(len(out.token_ids)), list(out.token_ids)])
            noise.append(recorded(name)["regret_mean"])
    regret = np.concatenate(found)
    print(regret.mean(), np.mean(noise), np.percentile(regret, 99), regret.max(), len(regret))
    assert regret.mean() <= 1.5 * np.mean(noise), (regret.mean(), np.mean(noise))
    assert np.percentile(regret, 99) <= 1.5 * recorded("goldens")["regret_p99"]


# -------------------------------------------------------------------------------------- the embedded model


def test_logits_of_the_embedded_model():
    found = []
    for _, _, prompt, expected in embedded.questions():
        if len(prompt) < 1500:
            got, want = (load(hub.EMBEDDED, d).logits(prompt + expected) for d in ("cuda", "cpu"))
            rows = slice(len(prompt) - 1, -1)
            found.append((got[rows], want[rows]))
    assert within(compare(found), "embedded"), (compare(found), recorded("embedded"))


def test_answers_of_the_embedded_model():
    """The same text for at least 95 % of the questions."""
    prompts = [prompt for prompt, _ in questions(16)]
    got, want = (greedy(load(hub.EMBEDDED, d), prompts, bench.MAX_TOKENS) for d in ("cuda", "cpu"))
    same = [a.token_ids == b.token_ids for a, b in zip(got, want, strict=True)]
    assert np.mean(same) >= 0.95, f"{len(same) - sum(same)} of {len(same)} differ"


def test_drafts_of_the_embedded_model():
    for prompt, expected in questions(1):
        got, want = (load(hub.EMBEDDED, d, mtp=True).mtp_logits(prompt + expected) for d in ("cuda", "cpu"))
        found = compare([(got[len(prompt) :], want[len(prompt) :])])
        assert found["distance"] < 0.05 and found["mean"] < 0.05, found


# ---------------------------------------------------------------------------------------------- any company


def deterministic(**limits):
    return load(hub.EMBEDDED, "cuda", deterministic=True, **limits)


def test_a_prompt_in_pieces():
    """64 tokens a step or 512: the same tokens, and with `deterministic` the same bits."""
    long = [max((p for p, _ in questions(2)), key=len), questions(1)[0][0]]
    for prompt in long:
        whole, pieces = (deterministic(max_num_batched_tokens=n).logits(prompt) for n in (512, 64))
        assert np.array_equal(whole, pieces)
        whole, pieces = (
            load(hub.EMBEDDED, "cuda", max_num_batched_tokens=n).logits(prompt) for n in (512, 64)
        )
        found = compare([(pieces[-64:], whole[-64:])])
        assert found["distance"] < 0.05 and found["mean"] < 0.05, found


def test_alone_and_among_32():
    """With `deterministic` the same tokens and, to the bit, the same log-probabilities; without it the same tokens but
    where two are as good as equal."""
    prompts = [prompt for prompt, _ in questions(4)][:32]
    llm = deterministic(max_num_seqs=32)
    together = greedy(llm, prompts, 48, logprobs=3)
    for prompt, out in zip(prompts, together, strict=True):
        (alone,) = greedy(llm, [prompt], 48, logprobs=3)
        assert alone.token_ids == out.token_ids and alone.logprobs == out.logprobs
    llm = load(hub.EMBEDDED, "cuda")
    together = greedy(llm, prompts, 48)
    same = [
        greedy(llm, [p], 48)[0].token_ids == out.token_ids for p, out in zip(prompts, together, strict=True)
    ]
    assert np.mean(same) >= 0.9


@pytest.mark.parametrize("name", ["moe_bf16", "family_heads_bf16"])
def test_prompts_whose_keys_are_decoded_in_pieces(name):
    """Pages in fp8 that are too many to be decoded at once, in heads that have tiles and heads that have not."""
    path, prompt = str(Golden(name).path), Golden(name).prompts[-1].sequence
    prompts = [[*prompt[i:], *prompt][:100] for i in range(4)]
    limits = {"max_model_len": 128, "max_num_batched_tokens": 512, "kv_cache_dtype": "fp8"}
    llm = LLM(path, device="cuda", deterministic=True, **limits)
    together = greedy(llm, prompts, 8, ignore_eos=True, logprobs=3)
    for prompt, out in zip(prompts, together, strict=True):
        (alone,) = greedy(llm, [prompt], 8, ignore_eos=True, logprobs=3)
        assert alone.token_ids == out.token_ids and alone.logprobs == out.logprobs


def test_preemption():
    """Too few pages for all: requests are sent back and computed again."""
    prompts = [prompt for prompt, _ in questions(4) if len(prompt) < 200][:12]
    config = {"max_model_len": 512, "max_num_seqs": 8}
    few, many = (deterministic(kv_cache_bytes=n, **config) for n in (1_000_000, 1 << 30))
    got, want = (greedy(llm, prompts, 200, ignore_eos=True) for llm in (few, many))
    # Tokens that are computed again go through attention side by side, which sums in another order.
    same = [a.token_ids == b.token_ids for a, b in zip(got, want, strict=True)]
    assert np.mean(same) >= 0.9


def test_limits():
    llm = LLM(hub.EMBEDDED, device="cuda", gpu_memory_utilization=0.2)
    assert llm.device == "cuda:0" and llm.max_model_len == load(hub.EMBEDDED, "cpu").max_model_len
    with pytest.raises(RequestError, match="dtype: found float32; allowed: auto, bfloat16"):
        LLM(hub.EMBEDDED, device="cuda", dtype="float32")
