"""What cannot be served is refused with its own class, and with words that name the value and what is allowed."""

import contextlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from qwen35rs import LLM, ConfigError, OutOfMemoryError, Qwen35Error, RequestError, SamplingParams, _core

GREEDY = SamplingParams(temperature=0, max_tokens=12)


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
        ([[1, -1]], "prompt: found -1; allowed: token ids, 0 to 4294967295"),
        ([[1, 2**40]], f"prompt: found {2**40}; allowed: token ids, 0 to 4294967295"),
        ([2**70], f"prompt: found {2**70}; allowed: token ids, 0 to 4294967295"),
        (["a", None], "prompt: found None; allowed: text, a flat sequence of token ids, or a mapping"),
        ([[True, False]], "prompt: found [True, False]; allowed: a flat sequence of token ids"),
        ([True, False], "prompt: found [True, False]; allowed: a flat sequence of token ids"),
        ([[1.5]], "prompt: found [1.5]; allowed: a flat sequence of token ids"),
        ([["a", "b"]], "prompt: found ['a', 'b']; allowed: a flat sequence of token ids"),
        ([[[1, 2], [3]]], "prompt: found [[1, 2], [3]]; allowed: a flat sequence of token ids"),
        ([None], "prompt: found None; allowed: text, a flat sequence of token ids, or a mapping"),
        (
            {"prompt": "a", "prompt_token_ids": [1]},
            "prompt: found keys ['prompt', 'prompt_token_ids']; allowed: one",
        ),
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
        ("temperature", 1e308, "temperature: found 1e308; allowed: a finite number >= 0, in float32"),
        ("top_p", 0.0, "top_p: found 0; allowed: 0 < top_p <= 1"),
        ("top_p", 2**31, "top_p: found 2147483648; allowed: 0 < top_p <= 1"),
        ("top_p", 1e-300, "top_p: found 1e-300; allowed: 0 < top_p <= 1, in float32"),
        ("top_p", 1.1, "top_p: found 1.1"),
        ("min_p", -0.1, "min_p: found -0.1; allowed: 0 <= min_p <= 1"),
        ("top_k", -2, "top_k: found -2; allowed: a number of tokens; 0 or -1 for all of them"),
        ("presence_penalty", 2.5, "presence_penalty: found 2.5; allowed: -2 to 2"),
        ("frequency_penalty", -2.5, "frequency_penalty: found -2.5; allowed: -2 to 2"),
        ("repetition_penalty", 0.0, "repetition_penalty: found 0; allowed: a finite number > 0"),
        ("max_tokens", 0, "max_tokens: found 0; allowed: at least 1"),
        ("max_tokens", -5, "max_tokens: found -5; allowed: at least 1"),
        ("min_tokens", -1, "min_tokens: found -1; allowed: at least 0"),
        ("n", 0, "n: found 0; allowed: 1 to 4096"),
        ("logprobs", -1, "logprobs: found -1; allowed: at least 0"),
        ("logprobs", 5000, "logprobs: found 5000; allowed: 0 to 1024"),
        ("stop", "", "stop: found an empty string"),
        ("stop", 5, "stop: found 5; allowed: list[str]"),
        ("stop", "a\ud800", r"stop: found ['a\ud800']; allowed: text without lone surrogates"),
        ("seed", 2**70, f"seed: found {2**70}; allowed: integers of 64 bits"),
        ("stop_token_ids", [2**70], "]; allowed: integers of 64 bits"),
        ("ignore_eos", 3, "ignore_eos: found 3; allowed: bool"),
        ("stop_token_ids", [-1], "stop_token_ids: found -1; allowed: token ids"),
        ("logit_bias", {-1: 1.0}, "logit_bias: found -1; allowed: token ids"),
        ("logit_bias", {1: 1e39}, "logit_bias: found 1e39; allowed: finite numbers, in float32"),
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
    with pytest.raises(RequestError, match="temperature: found 'hot'"):
        SamplingParams(temperature="hot")
    with pytest.raises(TypeError):
        SamplingParams(beams=3)


def test_parameters_that_were_changed(llm):
    params = SamplingParams()
    params.stop_token_ids.append("x")
    for call in (lambda: llm.generate("a", params), lambda: llm.stream("a", params)):
        with pytest.raises(RequestError, match=r"stop_token_ids: found \['x'\]; allowed: list\[int\]"):
            call()


def test_thinking_is_on_or_off(llm):
    for value in ("no", None, 0):
        with pytest.raises(RequestError, match=f"enable_thinking: found {value!r}; allowed: True, False"):
            llm.chat([{"role": "user", "content": "a"}], GREEDY, enable_thinking=value)


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
        ({"device": "tpu"}, RequestError, 'device: found "tpu"; allowed: "auto", "cpu", "cuda", "cuda:N"'),
        ({"gpu_memory_utilization": 0}, RequestError, "gpu_memory_utilization: found 0; allowed: above 0"),
        ({"max_model_len": 0}, RequestError, "max_model_len: found 0; allowed: 2 to 2048"),
        (
            {"max_model_len": -1},
            RequestError,
            "max_model_len: found -1; allowed: an integer from 2 to the model's",
        ),
        (
            {"max_model_len": "1"},
            RequestError,
            "max_model_len: found '1'; allowed: an integer from 2 to the model's",
        ),
        (
            {"max_num_seqs": None},
            RequestError,
            "max_num_seqs: found None; allowed: 1 to 2^63 - 1, an integer",
        ),
        ({"seed": 1.5}, RequestError, "seed: found 1.5; allowed: 0 to 2^63 - 1, an integer"),
        ({"deterministic": 1}, RequestError, "deterministic: found 1; allowed: True, False"),
        ({"enforce_eager": "no"}, RequestError, "enforce_eager: found 'no'; allowed: True, False"),
        ({"mtp": 1}, RequestError, "mtp: found 1; allowed: True, False, None"),
        ({"tokenizer": 5}, RequestError, "tokenizer: found 5; allowed: a path, a name on the"),
        (
            {"gpu_memory_utilization": "1"},
            RequestError,
            "gpu_memory_utilization: found '1'; allowed: a number",
        ),
        (
            {"kv_cache_bytes": 10**5000},
            RequestError,
            "kv_cache_bytes: found an integer of thousands of digits",
        ),
        ({"max_model_len": 4096}, RequestError, "max_model_len: found 4096; allowed: 2 to 2048, the context"),
        ({"max_num_seqs": 0}, RequestError, "max_num_seqs: found 0; allowed: at least 1"),
        (
            {"max_num_batched_tokens": 8},
            RequestError,
            "max_num_batched_tokens: found 8; allowed: at least 64",
        ),
        ({"kv_cache_bytes": 1}, RequestError, "kv_cache_bytes: found 1; allowed: at least "),
        ({"max_model_len": 2048, "kv_cache_bytes": 100_000}, OutOfMemoryError, "lower max_model_len to "),
        ({"max_num_seqs": 2**40}, OutOfMemoryError, "max_num_seqs"),
    ],
)
def test_arguments_that_cannot_be(checkpoint, arguments, error, words):
    with pytest.raises(error) as caught:
        LLM(checkpoint, **arguments)
    assert words in str(caught.value)


def test_places_that_hold_no_checkpoint(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        LLM(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        LLM("./missing/model")
    with pytest.raises(
        FileNotFoundError, match='0.8B: does not exist; .*of the size 0.8B, load_format="dummy" makes'
    ):
        LLM("0.8B")
    with pytest.raises(FileNotFoundError, match="is a file"):
        LLM(checkpoint / "config.json")
    with pytest.raises(FileNotFoundError, match="config.json"):
        LLM(tmp_path)


@pytest.mark.parametrize(
    ("option", "allowed"),
    [
        ("device", "auto, cpu, cuda, cuda:N, cuda:N,M"),
        ("load_format", "auto, dummy"),
        ("dtype", "auto, float32, bfloat16, float16"),
        ("kv_cache_dtype", "auto, fp8"),
        ("state_dtype", "float32, float16"),
        ("activation_dtype", "auto, fp8"),
    ],
)
def test_options_that_are_names(checkpoint, option, allowed):
    for value in (None, 16, "\ud800"):
        with pytest.raises(
            RequestError, match=f"^{option}: found {re.escape(repr(value))}; allowed: {allowed}$"
        ):
            LLM(checkpoint, **{option: value})
    with pytest.raises(RequestError, match="^quantization: found 4; allowed: None, int4, fp8, mixed$"):
        LLM(checkpoint, quantization=4)


@pytest.mark.parametrize(
    ("file", "content", "error", "words"),
    [
        ("config.json", b"{", ConfigError, "config.json"),
        (
            "config.json",
            b'{"model_type": "llama"}',
            ConfigError,
            'model_type: found "llama"; allowed: qwen3_5',
        ),
        ("generation_config.json", b"[", ConfigError, "generation_config.json"),
        ("tokenizer.json", b"{}", ConfigError, "tokenizer.json"),
        ("tokenizer.json", b"[]", ConfigError, "tokenizer.json: begins with '['; expected a JSON object"),
        ("tokenizer.json", b'{"model": 1}', ConfigError, "invalid type: integer `1`, expected an object at"),
        (
            "tokenizer_config.json",
            b"[]",
            ConfigError,
            "tokenizer_config.json: begins with '['; expected a JSON",
        ),
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
    with pytest.raises(ConfigError, match=r"m/model\.safetensors: truncated, shorter than its header says: "):
        LLM(path)


FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "hf_quant_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
]


def without(checkpoint, path, file):
    """A copy without a file; an index is looked for where there is no single file of weights."""
    shutil.copytree(checkpoint, path)
    for name in {file, "model.safetensors"} if file.endswith("index.json") else {file}:
        (path / name).unlink(missing_ok=True)
    return path / file


@pytest.mark.timeout(20)
@pytest.mark.parametrize("file", FILES)
def test_a_special_file_is_not_opened(checkpoint, tmp_path, file):
    path = tmp_path / "m"
    os.mkfifo(without(checkpoint, path, file))
    with pytest.raises(ConfigError, match=f"{file}: not a regular file"):
        LLM(path).tokenizer.chat_template  # noqa: B018


@pytest.mark.parametrize("file", FILES)
def test_a_link_to_nothing_is_named(checkpoint, tmp_path, file):
    path = tmp_path / "m"
    without(checkpoint, path, file).symlink_to(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=f"{file}: a link to a file that does not exist"):
        LLM(path).tokenizer.chat_template  # noqa: B018


def test_a_file_of_settings_without_an_end(checkpoint, tmp_path):
    path = tmp_path / "m"
    with without(checkpoint, path, "generation_config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match=r"generation_config\.json: longer than 16777216 bytes"):
        LLM(path)


def test_what_is_no_model(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "e.gguf").symlink_to(tmp_path / "nothing")
    for path, words in {
        tmp_path / "fifo": "is neither a directory nor a regular file",
        tmp_path / "e.gguf": "is a link to nothing$",
        "/dev/null": "is neither a directory nor a regular file",
    }.items():
        with pytest.raises(FileNotFoundError, match=f"{path}: {words}"):
            LLM(path)


def test_a_link_to_nothing_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="a/b: is a link to nothing"):
        LLM("a/b")


def test_a_gguf_that_is_passed_over_is_named(checkpoint, tmp_path, caplog):
    path = tmp_path / "m"
    shutil.copytree(checkpoint, path)
    (path / "other.gguf").touch()
    (path / "mmproj.gguf").touch()
    LLM(path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: reads its *.safetensors; for other.gguf give the path of the file"
    ]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_beams", 4, "num_beams: found 4; allowed: 1; this version does not implement it"),
        ("suppress_tokens", [1], "suppress_tokens: found [1]; allowed: null; this version"),
        ("max_length", 30, "max_length: found 30; allowed: null, or the context of 2048 tokens"),
        ("eos_token_id", [1, 9999], f"eos_token_id: found 9999; allowed: token ids, 0 to {tiny.VOCAB - 1}"),
    ],
)
def test_generation_that_is_not_implemented(checkpoint, tmp_path, key, value, words):
    path = tmp_path / "m"
    shutil.copytree(checkpoint, path)
    (path / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(ConfigError) as caught:
        LLM(path)
    assert f"generation_config.{words}" in str(caught.value)
    assert json.loads(_core.inspect_checkpoint(path, False))["refused"] == str(caught.value)


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ messages[0].content | shout }}", "{{ shout(messages) }}"]
)
def test_a_broken_chat_template(checkpoint, tmp_path, template):
    path = tmp_path / "m"
    shutil.copytree(checkpoint, path)
    (path / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match="template"):
        LLM(path).chat([{"role": "user", "content": "a"}], GREEDY)


def test_ids_that_no_vocabulary_has(llm):
    for call in (
        lambda: llm.tokenizer.decode([2**70]),
        lambda: llm.tokenizer.decode([1, -(2**70)]),
        lambda: llm.tokenizer.token_bytes(2**70),
    ):
        with pytest.raises(RequestError, match=r"^token id: found -?1180591620717411303424; allowed: "):
            call()


def test_a_note_that_cannot_be_written(monkeypatch, tmp_path):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stderr", full)
        assert LLM().model == "embedded"
        with contextlib.suppress(OSError):
            full.close()
        assert LLM().model == "embedded"


def test_weights_that_are_not_numbers(tmp_path):
    path = tiny.write_checkpoint(tmp_path / "m")
    tensors = tiny.read_safetensors(path / "model.safetensors")
    (name,) = [n for n in tensors if n.endswith("embed_tokens.weight")]
    dtype, shape, _ = tensors[name]
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
            status = 0 if "a fork of process" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    llm.generate("a", GREEDY)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda llm: llm.generate(b"abc"), "prompts"),
        (lambda llm: llm.generate([b"abc"]), "prompt"),
        (lambda llm: llm.generate([1, 2], {"max_tokens": 2}), "sampling_params"),
        (lambda llm: llm.generate(None), "prompts"),
        (lambda llm: llm.generate([1], SamplingParams(n=2**40)), "n"),
        (lambda llm: llm.chat(None), "messages"),
    ],
)
def test_arguments_of_another_kind(llm, call, word):
    with pytest.raises(RequestError, match=f"^{word}: found .*; allowed: "):
        call(llm)


def test_an_image_is_not_dropped(llm):
    content = [{"type": "image_url", "image_url": {"url": "file:///cat.png"}}, {"type": "text", "text": "a"}]
    with pytest.raises(RequestError, match=r"^messages\[0\]: found .*image_url.*; allowed: text"):
        llm.chat([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs: found 0"),
        ({"max_num_batched_tokens": 3}, "max_num_batched_tokens: found 3"),
        ({"max_model_len": 10**9}, "max_model_len: found 1000000000"),
        ({"gpu_memory_utilization": 2.0}, "gpu_memory_utilization: found 2"),
    ],
)
def test_limits_are_looked_at_before_weights(limit, message, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(Path(__file__).parent / "golden" / "data" / "dense_bf16", path)
    next(path.glob("*.safetensors")).unlink()
    with pytest.raises(ConfigError, match="safetensors"):
        LLM(path)
    with pytest.raises(RequestError, match=message):
        LLM(path, **limit)
