"""The Python API on a small checkpoint: prompts, streams, stops, errors, signals, threads, memory."""

import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import qwen35rs
import tiny
from qwen35rs import LLM, ConfigError, OutOfMemoryError, Qwen35Error, RequestError, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12)
MESSAGES = [{"role": "user", "content": "in the end"}]


def sampled(**kwargs):
    return SamplingParams(**{"max_tokens": 24, "seed": 3, **kwargs})


def python(code, *args, **kwargs):
    """Runs a program in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, **kwargs)


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
        with_special = sampled(seed=0, max_tokens=60, temperature=3.0, skip_special_tokens=False, ignore_eos=True)
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
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    assert '"look"' in llm.chat(MESSAGES, GREEDY, tools=[tool])[0].prompt
    assert "".join(d.text for d in llm.stream_chat(MESSAGES, GREEDY)) == want.text


# -------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("params", [GREEDY, sampled(temperature=3.0), sampled(stop=["e", "in"], temperature=2.0)])
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
    few = LLM(checkpoint, max_num_seqs=4, max_model_len=128, max_num_batched_tokens=64, kv_cache_bytes=300_000)
    long = ["the hen in the end " * 3] * 6
    got, want = ([o.token_ids for o in m.generate(long, [sampled(seed=s) for s in range(6)])] for m in (few, llm))
    assert got == want


def test_samples_of_one_prompt(llm):
    (out,) = llm.generate("the", sampled(n=4))
    assert [c.index for c in out.outputs] == [0, 1, 2, 3]
    assert len({tuple(c.token_ids) for c in out.outputs}) == 4
    assert (out.text, out.token_ids) == (out.outputs[0].text, out.outputs[0].token_ids)
    assert llm.generate("the", sampled(n=4))[0] == out
    assert llm.generate("the", sampled(n=2))[0].outputs == out.outputs[:2]


def test_without_a_seed_the_engine_seed_decides(checkpoint):
    draw = lambda seed: LLM(checkpoint, seed=seed).generate(["the"] * 2, SamplingParams(max_tokens=24))  # noqa: E731
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
    across = next(a[-1] + b[0] for a, b in zip(pieces[5:], pieces[6:], strict=False) if a.isascii() and b.isascii())
    for stop in (across, pieces[9], [across, "never there"]):
        first = across if stop == [across, "never there"] else stop
        at = free.text.index(first)
        out = llm.generate("the", sampled(max_tokens=60, stop=stop))[0]
        assert (out.text, out.finish_reason) == (free.text[:at], "stop")
        assert len(out.token_ids) < len(free.token_ids) and out.token_ids == free.token_ids[: len(out.token_ids)]
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


# --------------------------------------------------------------------------------------------- errors


def test_classes_of_errors():
    assert issubclass(ConfigError, (Qwen35Error, ValueError)) and issubclass(ConfigError, Qwen35Error)
    assert issubclass(RequestError, Qwen35Error) and issubclass(RequestError, ValueError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(OutOfMemoryError, Qwen35Error) and issubclass(OutOfMemoryError, MemoryError)
    assert issubclass(Qwen35Error, Exception) and not issubclass(Qwen35Error, ValueError)
    assert {c.__module__ for c in (Qwen35Error, ConfigError, RequestError, OutOfMemoryError)} == {"qwen35rs"}


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([[]], "prompt: found 0 tokens; allowed: 1 to 2047 tokens"),
        ("", "prompt: found 0 tokens; allowed: 1 to 2047 tokens"),
        ([[1] * 2048], "prompt: found 2048 tokens; allowed: 1 to 2047 tokens (max_model_len is 2048)"),
        ([[1, tiny.VOCAB]], f"prompt_token_ids: found {tiny.VOCAB}; allowed: token ids below {tiny.VOCAB}"),
        ([[1, -1]], "prompt: found -1; allowed: token ids from 0"),
        ([[1, 2**40]], f"prompt: found {2**40}; allowed: token ids from 0"),
        ([[True, False]], "prompt: found [True, False]; allowed: a flat sequence of token ids"),
        ([True, False], "prompt: found [True, False]; allowed: a flat sequence of token ids"),
        ([[1.5]], "prompt: found [1.5]; allowed: a flat sequence of token ids"),
        ([["a", "b"]], "prompt: found ['a', 'b']; allowed: a flat sequence of token ids"),
        ([[[1, 2], [3]]], "prompt: found [[1, 2], [3]]; allowed: a flat sequence of token ids"),
        ([None], "prompt: found None; allowed: a flat sequence of token ids"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "prompt: found keys ['prompt', 'prompt_token_ids']; allowed: one"),
        ({"text": "a"}, "prompt: found keys ['text']; allowed: one of 'prompt', 'prompt_token_ids'"),
        ({"prompt_token_ids": "abc"}, "prompt_token_ids: found 'abc'; allowed: a flat sequence of token ids"),
    ],
)
def test_prompts_that_cannot_be_served(llm, prompt, words):
    with pytest.raises(RequestError) as caught:
        llm.generate(prompt, GREEDY)
    assert words in str(caught.value)


def test_a_bad_prompt_among_good_ones_is_named_and_nothing_runs(llm):
    with pytest.raises(RequestError, match=r"request 1: prompt_token_ids: found 9999"):
        llm.generate([[1], [9999], [2]], GREEDY)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -1.0, "temperature: found -1; allowed: a finite number >= 0"),
        ("temperature", math.nan, "temperature: found NaN"),
        ("temperature", math.inf, "temperature: found inf"),
        ("top_p", 0.0, "top_p: found 0; allowed: 0 < top_p <= 1"),
        ("top_p", 1.1, "top_p: found 1.1"),
        ("min_p", -0.1, "min_p: found -0.1; allowed: 0 <= min_p <= 1"),
        ("top_k", -2, "top_k: found -2; allowed: a number of tokens; 0 or -1 for all of them"),
        ("presence_penalty", 2.5, "presence_penalty: found 2.5; allowed: -2 to 2"),
        ("frequency_penalty", -2.5, "frequency_penalty: found -2.5; allowed: -2 to 2"),
        ("repetition_penalty", 0.0, "repetition_penalty: found 0; allowed: a finite number > 0"),
        ("max_tokens", 0, "max_tokens: found 0; allowed: at least 1"),
        ("max_tokens", -5, "max_tokens: found -5; allowed: at least 1"),
        ("min_tokens", -1, "min_tokens: found -1; allowed: at least 0"),
        ("n", 0, "n: found 0; allowed: at least 1"),
        ("logprobs", -1, "logprobs: found -1; allowed: at least 0"),
        ("logprobs", 5000, "logprobs: found 5000; allowed: 0 to 1024"),
        ("stop", "", "stop: found an empty string"),
        ("stop_token_ids", [-1], "stop_token_ids: found -1; allowed: token ids"),
        ("logit_bias", {-1: 1.0}, "logit_bias: found -1; allowed: token ids"),
        ("logit_bias", {1: math.nan}, "logit_bias: found NaN; allowed: finite numbers"),
    ],
)
def test_parameters_that_cannot_be(field, value, words):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert words in str(caught.value)


def test_parameters_against_the_model(llm):
    with pytest.raises(RequestError, match="min_tokens: found 5; allowed: at most max_tokens = 3"):
        SamplingParams(min_tokens=5, max_tokens=3)
    with pytest.raises(RequestError, match=f"stop_token_ids: found {tiny.VOCAB}; allowed: token ids, 0 to"):
        llm.generate("a", SamplingParams(stop_token_ids=[tiny.VOCAB]))
    with pytest.raises(RequestError, match="logit_bias: found 100000"):
        llm.generate("a", SamplingParams(logit_bias={100000: 1.0}))
    with pytest.raises(TypeError):
        SamplingParams(temperature="hot")
    with pytest.raises(TypeError):
        SamplingParams(beams=3)


def test_logits_that_cannot_be(llm):
    for ids, words in [
        ([], "prompt: found 0 tokens; allowed: 1 to 2048"),
        ([1] * 2049, "prompt: found 2049 tokens"),
        ([-1], "token_ids: found -1"),
        ([tiny.VOCAB], f"found {tiny.VOCAB}; allowed: token ids below {tiny.VOCAB}"),
        ("abc", "token_ids: found 'abc'; allowed: a flat sequence of token ids"),
    ]:
        with pytest.raises(RequestError) as caught:
            llm.logits(ids)
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"dtype": "int3"}, RequestError, "dtype: found int3; allowed: auto, float32, bfloat16, float16"),
        ({"device": "cuda"}, RequestError, "device: found 'cuda'; allowed: 'cpu', 'auto'"),
        ({"max_model_len": 0}, RequestError, "max_model_len: found 0; allowed: 1 to 2048"),
        ({"max_model_len": -1}, RequestError, "max_model_len: found -1"),
        ({"max_model_len": 4096}, RequestError, "max_model_len: found 4096; allowed: 1 to 2048, the context"),
        ({"max_num_seqs": 0}, RequestError, "max_num_seqs: found 0; allowed: at least 1"),
        ({"max_num_batched_tokens": 8}, RequestError, "max_num_batched_tokens: found 8; allowed: at least 64"),
        ({"max_model_len": 2048, "kv_cache_bytes": 1}, OutOfMemoryError, "lower max_model_len to 64"),
        ({"max_num_seqs": 2**40}, OutOfMemoryError, "max_num_seqs"),
    ],
)
def test_arguments_that_cannot_be(checkpoint, arguments, error, words):
    with pytest.raises(error) as caught:
        LLM(checkpoint, **arguments)
    assert words in str(caught.value)


def test_places_that_hold_no_checkpoint(checkpoint, tmp_path):
    with pytest.raises(RequestError, match="model: found nothing"):
        LLM()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        LLM(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        LLM("./missing/model")
    with pytest.raises(FileNotFoundError, match="is a file"):
        LLM(checkpoint / "config.json")
    with pytest.raises(FileNotFoundError, match="config.json"):
        LLM(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "error", "words"),
    [
        ("config.json", b"{", ConfigError, "config.json"),
        ("config.json", b'{"model_type": "llama"}', ConfigError, 'model_type: found "llama"; allowed: qwen3_5'),
        ("generation_config.json", b"[", ConfigError, "generation_config.json"),
        ("tokenizer.json", b"{}", ConfigError, "tokenizer.json"),
        ("tokenizer.json", b"\xff", ConfigError, "tokenizer.json"),
        ("model.safetensors", b"", ConfigError, "model.safetensors: 0 bytes"),
        ("model.safetensors", b"\xff" * 64, ConfigError, "model.safetensors: a header of"),
        ("model.safetensors", None, ConfigError, "found no weights; expected model.safetensors"),
    ],
)
def test_broken_files(checkpoint, tmp_path, file, content, error, words):
    path = tmp_path / "m"
    shutil.copytree(checkpoint, path)
    (path / file).unlink()
    if content is not None:
        (path / file).write_bytes(content)
    with pytest.raises(error) as caught:
        LLM(path)
    assert words in str(caught.value)


def test_a_truncated_checkpoint(checkpoint, tmp_path):
    path = tmp_path / "m"
    shutil.copytree(checkpoint, path)
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ConfigError, match="^tensor "):
        LLM(path)


def test_weights_that_are_not_numbers(tmp_path):
    path = tiny.write_checkpoint(tmp_path / "m")
    tensors = tiny.read_safetensors(path / "model.safetensors")
    (name,) = [n for n in tensors if n.endswith("embed_tokens.weight")]
    dtype, shape, data = tensors[name]
    tensors[name] = (dtype, shape, np.full(shape, np.nan, np.float32).tobytes())
    tiny.write_safetensors(path / "model.safetensors", tensors)
    llm = LLM(path)
    with pytest.raises(Qwen35Error, match="no finite logit"):
        llm.generate("a", GREEDY)
    with pytest.raises(Qwen35Error, match="no finite logit"):  # and it lives on
        llm.generate("a", GREEDY)
    assert np.isnan(llm.logits([1])).all()


def test_a_checkpoint_without_a_tokenizer(tmp_path, checkpoint):
    path = tiny.write_checkpoint(tmp_path / "m", tokenizer=False)
    llm = LLM(path)
    out = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, temperature=0))[0]
    assert (out.text, len(out.token_ids)) == ("", 4)
    with pytest.raises(ConfigError, match="found no tokenizer.json; allowed: prompts as token ids"):
        llm.generate("a", GREEDY)
    with pytest.raises(RequestError, match="this checkpoint has no tokenizer; use stop_token_ids"):
        llm.generate([[1]], SamplingParams(stop=["a"]))
    assert LLM(path, tokenizer=checkpoint).generate("the", GREEDY)[0].text != ""


def test_a_template_that_refuses(llm):
    with pytest.raises(RequestError, match="chat template: "):
        llm.chat([{"role": "captain", "content": "?"}], GREEDY)
    with pytest.raises(RequestError, match="allowed: values that JSON can hold"):
        llm.chat([{"role": "user", "content": object()}], GREEDY)


def test_after_a_fork(llm):
    llm.generate("a", GREEDY)
    pid = os.fork()
    if pid == 0:  # the child: no pytest beyond this point
        status = 1
        try:
            llm.generate("a", GREEDY)
        except RequestError as error:
            status = 0 if "forked after the model was loaded" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    llm.generate("a", GREEDY)


# --------------------------------------------------------------------------- signals, threads, lifetime


def test_ctrl_c(checkpoint):
    code = """
        import signal, sys, threading, time
        from qwen35rs import LLM, SamplingParams
        llm = LLM(sys.argv[1])
        endless = SamplingParams(max_tokens=2000, ignore_eos=True)
        calls = {
            "generate": lambda: llm.generate(["a"] * 200, endless),
            "stream": lambda: [d for _ in range(200) for d in llm.stream("a", endless)],
            "logits": lambda: [llm.logits([1] * 2000) for _ in range(500)],
        }
        for name, call in calls.items():
            sent = []
            def interrupt():
                time.sleep(0.3)
                sent.append(time.perf_counter())
                signal.raise_signal(signal.SIGINT)
            thread = threading.Thread(target=interrupt)
            thread.start()
            try:
                call()
            except KeyboardInterrupt:
                late = time.perf_counter() - sent[0]
                print(name, "ok" if late < 1 else late)
            thread.join()
            start = time.perf_counter()
            assert len(llm.generate("a", SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3
            assert time.perf_counter() - start < 1, "the interrupted requests still run"
    """
    done = python(code, checkpoint)
    assert done.stdout.split() == ["generate", "ok", "stream", "ok", "logits", "ok"], done.stderr


def test_ctrl_c_from_outside(checkpoint):
    code = """
        import sys
        from qwen35rs import LLM, SamplingParams
        llm = LLM(sys.argv[1])
        print("ready", flush=True)
        llm.generate(["a"] * 500, SamplingParams(max_tokens=2000, ignore_eos=True))
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", textwrap.dedent(code), str(checkpoint)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    start = time.perf_counter()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert time.perf_counter() - start < 2  # with the interpreter's own end
    assert process.returncode in (130, -signal.SIGINT) and "KeyboardInterrupt" in stderr


def test_threads_share_one_llm(llm):
    prompts = ["the", "a hen", "in the end", "x"]
    want = [out.text for out in llm.generate(prompts, GREEDY)]
    failures = []

    def work(i):
        try:
            for round in range(5):
                which = (i + round) % 4
                if i % 3 == 0:
                    next(llm.stream(prompts[which], sampled()))  # dropped in the middle
                elif i % 3 == 1:
                    assert "".join(d.text for d in llm.stream(prompts[which], GREEDY)) == want[which]
                else:
                    assert llm.generate(prompts[which], GREEDY)[0].text == want[which]
                    llm.logits([1, 2, 3])
        except BaseException as error:  # noqa: BLE001  shown by the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def engine_threads():
    names = []
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/comm") as f:
                names.append(f.read().strip())
        except FileNotFoundError:
            continue  # ended meanwhile
    return sum(name.startswith("qwen35rs-engi") for name in names)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted by /proc")
def test_an_llm_that_is_collected_ends_its_thread(checkpoint):
    gc.collect()
    before = engine_threads()
    llm = LLM(checkpoint)
    stream = llm.stream("a", SamplingParams(max_tokens=2000, ignore_eos=True))
    next(stream)
    assert engine_threads() == before + 1
    del llm, stream
    gc.collect()
    deadline = time.monotonic() + 5
    while engine_threads() != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine_threads() == before


def test_progress_is_silent_where_there_is_no_terminal(checkpoint, capfd):
    LLM(checkpoint, progress=True).generate(["a", "b"], GREEDY, progress=True)
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------- memory, imports

MEMORY = """
    import sys
    import numpy
    from qwen35rs import LLM, SamplingParams

    def anonymous():
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) << 10 for line in f if line.startswith("RssAnon"))

    before = anonymous()
    llm = LLM(sys.argv[1], dtype=sys.argv[2], max_model_len=64)
    llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    print(anonymous() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_a_checkpoint_is_held_once_or_not_at_all(tmp_path):
    # An embedding of 1.8 million rows of 40 float32: 288 MB, a hole in the file.
    path = tiny.write_checkpoint(tmp_path / "big", vocab=1_800_000, tokenizer=False, embedding=False)
    size = (path / "model.safetensors").stat().st_size
    assert size > 280e6
    # Logits of a step, their copy in the sampler, and its weights: a few rows of 7 MB each.
    small = 60e6
    as_it_is = python(MEMORY, path, "auto")
    assert float(as_it_is.stdout or "nan") < small, as_it_is.stderr
    converted = python(MEMORY, path, "bfloat16")
    assert float(converted.stdout or "nan") < size / 2 + small, converted.stderr


def test_the_import_is_light():
    done = python(
        """
        import sys
        import qwen35rs
        assert "LLM" in dir(qwen35rs)
        heavy = {"torch", "transformers", "rich", "huggingface_hub", "typer", "jinja2", "tokenizers"}
        print(sorted(heavy & set(sys.modules)))
        from qwen35rs import LLM, SamplingParams, Tokenizer, ops
        print(sorted(heavy & set(sys.modules)))
        """
    )
    assert done.stdout.split("\n")[:2] == ["[]", "[]"], done.stderr
    code = """
        import time
        import numpy
        start = time.perf_counter()
        import qwen35rs
        print(time.perf_counter() - start)
    """
    times = sorted(float(python(code).stdout) for _ in range(5))
    assert times[0] < 0.05, times  # the best: what the machine does besides is not ours


def test_dir_and_all():
    for name in qwen35rs.__all__:
        assert getattr(qwen35rs, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qwen35rs.nothing


def test_torch_tensors_cross_without_a_copy():
    torch = pytest.importorskip("torch")
    from qwen35rs import ops

    x = torch.randn(5, 7)
    array = ops._array("x", x)
    assert array.ctypes.data == x.data_ptr() and array.dtype == np.float32
    y = torch.from_dlpack(ops.rms_norm(x, torch.zeros(7)))
    assert torch.allclose(y, x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), atol=1e-6)
    with pytest.raises(RequestError, match="x: found Tensor"):
        ops.rms_norm(x.to(torch.bfloat16), torch.zeros(7))
