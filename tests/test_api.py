"""The Python API on a small checkpoint: prompts, streams, samples and seeds, stops, log-probabilities."""

import gc
import json
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import tiny
from qwen35rs import LLM, RequestError, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12)
MESSAGES = [{"role": "user", "content": "in the end"}]


def sampled(**kwargs):
    return SamplingParams(**{"max_tokens": 24, "seed": 3, **kwargs})


# -------------------------------------------------------------------------------------------- prompts


def test_forms_of_a_prompt(llm):
    ids = llm.tokenizer.encode("the hen")
    (want,) = llm.generate("the hen", GREEDY)
    assert (want.prompt, want.prompt_token_ids) == ("the hen", ids)
    assert len(want.token_ids) == 12 and want.finish_reason == "length"
    same = [{"prompt": "the hen"}, {"prompt_token_ids": ids}, ids, tuple(ids), np.array(ids, np.int64)]
    for prompt in same:
        for got in (*llm.generate(prompt, GREEDY), *llm.generate([prompt], GREEDY)):
            assert (got.prompt_token_ids, got.token_ids, got.text) == (ids, want.token_ids, want.text)
            assert got.prompt in ("the hen", None)
    many = llm.generate(["the hen", "a", ids, np.array(ids, np.uint32)], GREEDY)
    assert [out.token_ids == want.token_ids for out in many] == [True, False, True, True]
    assert llm.generate([], GREEDY) == []
    assert llm.generate((p for p in ["the hen"]), GREEDY)[0].token_ids == want.token_ids


def test_one_set_of_parameters_each(llm):
    short, long = llm.generate(["a", "a"], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=5)])
    assert (len(short.token_ids), len(long.token_ids)) == (2, 5)
    with pytest.raises(RequestError, match="sampling_params: found 1; allowed: one, or one for each of 2"):
        llm.generate(["a", "b"], [GREEDY])


def test_text_is_the_tokens_decoded(llm):
    for out in llm.generate(["a"] * 8, [sampled(seed=s, max_tokens=60, temperature=3.0) for s in range(8)]):
        ids = out.token_ids[:-1] if out.finish_reason == "stop" else out.token_ids
        assert out.text == llm.tokenizer.decode(ids)
        with_special = sampled(
            seed=0, max_tokens=60, temperature=3.0, skip_special_tokens=False, ignore_eos=True
        )
    out = llm.generate("a", with_special)[0]
    assert out.text == llm.tokenizer.decode(out.token_ids, skip_special_tokens=False)


def test_chat(llm):
    text = llm.tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert text.startswith("<|im_start|>user\nin the end<|im_end|>")
    (want,) = llm.generate(text, GREEDY)
    assert llm.chat(MESSAGES, GREEDY)[0] == want
    assert [out.text for out in llm.chat([MESSAGES, MESSAGES], GREEDY)] == [want.text] * 2
    quiet = llm.chat(MESSAGES, GREEDY, enable_thinking=False)[0]
    assert "<think>\n\n</think>" in quiet.prompt
    tool = {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {}}},
    }
    assert '"look"' in llm.chat(MESSAGES, GREEDY, tools=[tool])[0].prompt
    assert "".join(d.text for d in llm.stream_chat(MESSAGES, GREEDY)) == want.text


# -------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize(
    "params", [GREEDY, sampled(temperature=3.0), sampled(stop=["e", "in"], temperature=2.0)]
)
def test_a_stream_adds_up_to_generate(llm, params):
    (want,) = llm.generate("a hen", params)
    deltas = list(llm.stream("a hen", params))
    assert "".join(d.text for d in deltas) == want.text
    assert [t for d in deltas for t in d.token_ids] == want.token_ids
    assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + [want.finish_reason]
    assert {d.index for d in deltas} == {0}


def test_a_stream_of_samples(llm):
    params = sampled(n=3, logprobs=1)
    want = llm.generate("a", params)[0].outputs
    texts, logprobs = ["", "", ""], [[], [], []]
    for delta in llm.stream("a", params):
        texts[delta.index] += delta.text
        logprobs[delta.index] += delta.logprobs
    assert texts == [out.text for out in want] and logprobs == [out.logprobs for out in want]


def test_closing_a_stream_ends_its_request(checkpoint):
    # With one seat, whoever comes next waits for the one before.
    llm = LLM(checkpoint, max_num_seqs=1)
    endless = SamplingParams(max_tokens=2000, ignore_eos=True)
    for started in (0, 3):
        stream = llm.stream("a", endless)
        for _ in range(started):
            next(stream)
        stream.close()
        start = time.perf_counter()
        llm.generate("a", SamplingParams(max_tokens=1))
        assert time.perf_counter() - start < 1.0
    stream = llm.stream("a", endless)
    next(stream)
    del stream
    gc.collect()
    start = time.perf_counter()
    llm.generate("a", SamplingParams(max_tokens=1))
    assert time.perf_counter() - start < 1.0


def test_a_stream_is_closed_by_another_thread(checkpoint, tmp_path):
    # A context so long that no machine comes to its end meanwhile.
    path, most = tmp_path / "long", 200_000
    shutil.copytree(checkpoint, path)
    config = json.loads((path / "config.json").read_text())
    config.get("text_config", config)["max_position_embeddings"] = 2 * most
    (path / "config.json").write_text(json.dumps(config))
    llm = LLM(path, max_num_seqs=1)
    endless = SamplingParams(max_tokens=most, ignore_eos=True)
    busy = llm.stream("a", endless)
    next(busy)
    waiting = llm.stream("a", endless)
    with ThreadPoolExecutor(1) as pool:
        deltas = pool.submit(list, waiting)  # in vain: the only seat is taken
        time.sleep(0.1)
        waiting.close()
        assert deltas.result(1.0) == []
        # One that is read all the while ends too.
        deltas = pool.submit(list, busy)
        time.sleep(0.1)
        busy.close()
        assert 0 < len(deltas.result(1.0)) < most - 1
    start = time.perf_counter()
    llm.generate("a", SamplingParams(max_tokens=1))
    assert time.perf_counter() - start < 1.0
    busy.close()
    assert list(busy) == []


def test_a_bad_request_is_refused_at_the_call(llm):
    with pytest.raises(RequestError, match="found 0 tokens"):
        llm.stream([], GREEDY)


# ------------------------------------------------------------------------------------ samples and seeds


def test_a_seed_decides_whatever_runs_beside_it(llm, checkpoint):
    alone = [llm.generate("the", sampled(seed=s))[0].token_ids for s in range(6)]
    assert len({tuple(ids) for ids in alone}) == 6
    together = llm.generate(["the"] * 6, [sampled(seed=s) for s in range(6)])
    assert [out.token_ids for out in together] == alone
    with ThreadPoolExecutor(6) as pool:
        threads = pool.map(lambda s: llm.generate("the", sampled(seed=s))[0].token_ids, range(6))
        assert list(threads) == alone
    # A pool of pages too small for all: requests are sent back and computed again.
    few = LLM(
        checkpoint, max_num_seqs=4, max_model_len=128, max_num_batched_tokens=64, kv_cache_bytes=300_000
    )
    long = ["the hen in the end " * 3] * 6
    got, want = (
        [o.token_ids for o in m.generate(long, [sampled(seed=s) for s in range(6)])] for m in (few, llm)
    )
    assert got == want


def test_samples_of_one_prompt(llm):
    (out,) = llm.generate("the", sampled(n=4))
    assert [c.index for c in out.outputs] == [0, 1, 2, 3]
    assert len({tuple(c.token_ids) for c in out.outputs}) == 4
    assert (out.text, out.token_ids) == (out.outputs[0].text, out.outputs[0].token_ids)
    assert llm.generate("the", sampled(n=4))[0] == out
    assert llm.generate("the", sampled(n=2))[0].outputs == out.outputs[:2]


def test_without_a_seed_the_engine_seed_decides(checkpoint):
    draw = lambda seed: LLM(checkpoint, seed=seed).generate(["the"] * 2, SamplingParams(max_tokens=24))
    first, second = draw(1)
    assert first.token_ids != second.token_ids
    assert draw(1) == [first, second]
    assert draw(2)[0].token_ids != first.token_ids


def test_the_checkpoint_gives_defaults(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "m")
    path = tmp_path / "m" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": False, "max_new_tokens": 7}))
    llm = LLM(tmp_path / "m")
    a, b = llm.generate(["the", "the"])
    assert a.token_ids == b.token_ids and len(a.token_ids) == 7
    assert len(llm.generate("the", SamplingParams(temperature=1.0, max_tokens=9, seed=1))[0].token_ids) == 9


# -------------------------------------------------------------------------------------------- stops


def test_stop_strings(llm):
    free = llm.generate("the", sampled(max_tokens=60))[0]
    pieces = [llm.tokenizer.decode([t]) for t in free.token_ids]
    # One that spans two tokens, one inside a token, one that never comes.
    across = next(a[-1] + b[0] for a, b in pairwise(pieces[5:]) if a.isascii() and b.isascii())
    for stop in (across, pieces[9], [across, "never there"]):
        first = across if stop == [across, "never there"] else stop
        at = free.text.index(first)
        out = llm.generate("the", sampled(max_tokens=60, stop=stop))[0]
        assert (out.text, out.finish_reason) == (free.text[:at], "stop")
        assert (
            len(out.token_ids) < len(free.token_ids) and out.token_ids == free.token_ids[: len(out.token_ids)]
        )
        kept = llm.generate("the", sampled(max_tokens=60, stop=stop, include_stop_str_in_output=True))[0]
        assert kept.text == free.text[:at] + first
        streamed = "".join(d.text for d in llm.stream("the", sampled(max_tokens=60, stop=stop)))
        assert streamed == out.text
    out = llm.generate("the", sampled(max_tokens=60, stop="never there"))[0]
    assert (out.text, out.finish_reason) == (free.text, "length")


def test_stop_tokens(llm):
    free = llm.generate("the", sampled(max_tokens=60, ignore_eos=True))[0]
    stop = free.token_ids[10]
    first = free.token_ids.index(stop)
    out = llm.generate("the", sampled(max_tokens=60, ignore_eos=True, stop_token_ids=[stop]))[0]
    assert (out.token_ids, out.finish_reason) == (free.token_ids[: first + 1], "stop")
    assert out.text == llm.tokenizer.decode(free.token_ids[:first])  # its text is not shown


def test_eos_and_min_tokens(llm):
    (end,) = llm.eos_token_ids
    likely = {"logit_bias": {end: 50.0}, "temperature": 0}
    out = llm.generate("the", SamplingParams(**likely))[0]
    assert (out.token_ids, out.text, out.finish_reason) == ([end], "", "stop")
    out = llm.generate("the", SamplingParams(**likely, min_tokens=5))[0]
    assert len(out.token_ids) == 6 and out.token_ids[-1] == end and end not in out.token_ids[:5]
    out = llm.generate("the", SamplingParams(**likely, ignore_eos=True, max_tokens=4))[0]
    assert (out.token_ids, out.finish_reason, out.text) == ([end] * 4, "length", "")


def test_max_tokens_and_the_context(checkpoint):
    llm = LLM(checkpoint, max_model_len=20)
    assert llm.max_model_len == 20
    out = llm.generate([[1, 2, 3]], SamplingParams(ignore_eos=True))[0]
    assert (len(out.token_ids), out.finish_reason) == (17, "length")
    assert len(llm.generate([[1] * 19], SamplingParams(ignore_eos=True, max_tokens=100))[0].token_ids) == 1


# ------------------------------------------------------------------------------------ logits, logprobs


def test_logprobs_and_logits(llm):
    ids = llm.tokenizer.encode("the hen")
    (out,) = llm.generate([ids], sampled(logprobs=4, temperature=0.3, logit_bias={5: 2.0}, ignore_eos=True))
    logits = llm.logits(ids + out.token_ids)
    assert logits.shape == (len(ids) + 24, tiny.VOCAB) and logits.dtype == np.float32
    raw = logits[len(ids) - 1 : -1, : tiny.NUM_TOKENS].astype(np.float64)
    expected = raw - np.log(np.exp(raw).sum(-1, keepdims=True))
    for token, row, entry in zip(out.token_ids, expected, out.logprobs, strict=True):
        assert math.isclose(entry[token].logprob, row[token], abs_tol=1e-3)
        assert entry[token].rank == 1 + (row > row[token]).sum()
        assert entry[token].decoded_token == llm.tokenizer.decode([token], skip_special_tokens=False)
        best = [i for i, _ in sorted(entry.items(), key=lambda x: x[1].rank)][:4]
        assert set(best) == set(np.argsort(-row)[:4].tolist())
    assert llm.generate([ids], GREEDY)[0].logprobs is None
    only = llm.generate([ids], sampled(logprobs=0))[0]
    assert [list(entry) for entry in only.logprobs] == [[t] for t in only.token_ids]


def test_padding_rows_are_never_drawn(llm):
    # Their logits are the largest of all (see tiny.py).
    assert (llm.logits([1, 2, 3]).argmax(-1) >= tiny.NUM_TOKENS).any()
    for out in llm.generate(["the"] * 4, [sampled(seed=s, temperature=5.0, logprobs=20) for s in range(4)]):
        assert max(out.token_ids) < tiny.NUM_TOKENS
        assert max(max(entry) for entry in out.logprobs) < tiny.NUM_TOKENS


def test_logit_bias(llm):
    out = llm.generate("the", SamplingParams(temperature=0, max_tokens=5, logit_bias={65: 100.0}))[0]
    assert out.text == "AAAAA"
    banned = llm.generate("the", GREEDY)[0].token_ids[0]
    out = llm.generate("the", SamplingParams(temperature=0, max_tokens=5, logit_bias={banned: -100.0}))[0]
    assert banned not in out.token_ids


def test_logits_of_any_form_of_ids(llm):
    want = llm.logits([1, 2, 3])
    for ids in ((1, 2, 3), np.array([1, 2, 3]), np.array([1, 2, 3], np.uint32), range(1, 4)):
        assert np.array_equal(llm.logits(ids), want)
    long = list(np.random.default_rng(1).integers(0, 250, 200))
    assert np.array_equal(llm.logits(long)[:100], llm.logits(long[:100]))
