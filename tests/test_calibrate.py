"""`qwen35rs quantize --calibrate`: what is written, what it gains on text that it has not seen, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import quantised as q
import tiny
from golden.cases import Golden
from qwen35rs import LLM, Qwen35Error, RequestError, _core, hub, tasks
from qwen35rs.bench import prompt_of
from qwen35rs.cli import app
from test_quantised import pair
from test_quantize import DENSE, convert, source_matrix, tensors
from typer.testing import CliRunner

NAMES = ["arithmetic", "text", "json", "talk"]


def documents(split, number):
    """Questions with their answers, as the chat template prints them."""
    llm = LLM(device="cpu")
    for name in NAMES:
        for item in islice(tasks.items(name, split=split, seed=11), number):
            yield prompt_of(llm, item) + item.completion + "\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents("train", 24)))
    return path


def calibrated(out, text, scheme="int4", source=hub.EMBEDDED, progress=None, tokens=4096, length=512):
    found = _core.quantize_checkpoint(
        source,
        out,
        scheme=scheme,
        group_size=32,
        progress=progress,
        calibrate=[text] if not isinstance(text, list) else text,
        calibration_length=length,
        calibration_tokens=tokens,
    )
    return json.loads(found), json.loads((out / "quantization_report.json").read_text())


def numbers(after, module):
    parts = {part: after[f"{module}.{part}"] for part in ("weight_packed", "weight_scale", "weight_shape")}
    return q.decode_packed(parts, 32), q.numbers(parts["weight_scale"])


def test_integers_that_are_there_are_not_fitted_again(text, tmp_path):
    """The model reads the text with them, and what is left is fitted."""
    one, _, count = pair(tmp_path, hub.EMBEDDED, "gptq", kept=DENSE)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hub.EMBEDDED / file, one)
    summary, report = calibrated(tmp_path / "out", text, source=one)
    assert (summary["num_kept"], summary["num_quantised"]) == (count, 30)
    assert summary["calibration"]["num_calibrated"] == 30 and len(report["matrices"]) == 30
    convert(tmp_path / "rounded", "int4", source=one)
    fitted, rounded = tensors(tmp_path / "out"), tensors(tmp_path / "rounded")
    differ = {name for name in fitted if fitted[name] != rounded[name]}
    assert differ and all("_attn." in name for name in differ)


def test_the_file_is_laid_out_as_without_and_the_report_says_how_far_off(text, tmp_path):
    summary, report = calibrated(tmp_path / "out", text)
    convert(tmp_path / "plain", "int4")
    plain_report = json.loads((tmp_path / "plain" / "quantization_report.json").read_text())
    before, after, plain = (tensors(path) for path in (hub.EMBEDDED, tmp_path / "out", tmp_path / "plain"))
    assert {name: entry[:2] for name, entry in after.items()} == {
        name: entry[:2] for name, entry in plain.items()
    }
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert report["calibration"] == {"files": [str(text)], "length": 512, "tokens": 4096}
    read = summary["calibration"]
    assert (read["num_sequences"], read["num_tokens"]) == (8, 4096)
    assert summary == report["summary"] and report["matrices"].keys() == plain_report["matrices"].keys()
    gains, moved, fallen = [], 0, 0
    for module, facts in report["matrices"].items():
        w, (own, scales) = source_matrix(before, module).astype(np.float64), numbers(after, module)
        error = np.abs(w - own)
        assert facts["max_abs_error"] == pytest.approx(error.max(), rel=1e-6)
        assert facts["relative_rms_error"] == pytest.approx(
            np.sqrt((error**2).mean() / (w**2).mean()), rel=1e-6
        )
        assert np.isfinite(scales).all()
        found, rounded = facts["calibration"], plain_report["matrices"][module]
        if "fallback" in found:
            fallen += 1
            assert "its expert saw" in found["fallback"] and ".experts." in module
            assert (own == numbers(plain, module)[0]).all()
            continue
        assert {name: found["rounded"][name] for name in rounded if name != "format"} == {
            name: rounded[name] for name in rounded if name != "format"
        }
        gains.append(found["weighted_error"] / found["rounded"]["weighted_error"])
        moved += (own != numbers(plain, module)[0]).any()
        whole = ".experts." not in module
        assert found["hessian"] in (["own"] if whole else ["own", "layer"]) and found["damping"] == 0.01
        if whole:  # The MTP module reads pairs of tokens.
            assert found["tokens"] == (4088 if module.startswith("mtp.") else 4096)
        else:
            assert 0 < found["tokens"] <= 4096
    assert (read["num_calibrated"], read["num_fallen_back"]) == (len(gains), fallen)
    assert len(gains) > 450 and moved == len(gains)
    assert np.mean(np.array(gains) < 1) > 0.98 and np.mean(gains) < 0.75
    assert read["weighted_error"] < 0.75 * read["rounded_weighted_error"]


def log_probabilities(llm, ids):
    logits = llm.logits(ids)[:, : len(llm.tokenizer)].astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def test_it_is_nearer_on_text_that_it_has_not_seen(text, tmp_path):
    calibrated(tmp_path / "out", text)
    convert(tmp_path / "plain", "int4")
    models = [LLM(path, device="cpu") for path in (hub.EMBEDDED, tmp_path / "plain", tmp_path / "out")]
    divergence = np.zeros(2)
    for document in documents("test", 12):
        ids = models[0].tokenizer.encode(document)
        want, *others = (log_probabilities(llm, ids) for llm in models)
        divergence += [(np.exp(want) * (want - other)).sum() for other in others]
    assert divergence[1] < 0.75 * divergence[0]


def test_fp8_beside_it_is_rounded_to_the_nearest(text, tmp_path):
    _, report = calibrated(tmp_path / "mixed", text, scheme="mixed")
    convert(tmp_path / "plain", "mixed")
    after, plain = tensors(tmp_path / "mixed"), tensors(tmp_path / "plain")
    assert {facts["format"] for facts in report["matrices"].values()} == {"int4", "fp8"}
    for module, facts in report["matrices"].items():
        assert ("calibration" in facts) == (facts["format"] == "int4")
        if facts["format"] == "fp8":
            assert after[f"{module}.weight"] == plain[f"{module}.weight"]


def test_what_is_in_fp8_is_decoded_and_calibrated(text, tmp_path):
    """Experts then stand one by one."""
    convert(tmp_path / "fp8", "fp8")
    summary, _ = calibrated(tmp_path / "out", text, source=tmp_path / "fp8", tokens=2048)
    read = summary["calibration"]
    assert read["num_calibrated"] + read["num_fallen_back"] == summary["num_quantised"] == 489
    assert read["weighted_error"] < 0.75 * read["rounded_weighted_error"]


def write_dense(folder):
    """A dense checkpoint of random weights whose sizes are whole groups, from a committed one."""
    source = Golden("dense_bf16").path
    config = json.loads((source / "config.json").read_text())
    config["text_config"].update(hidden_size=64, intermediate_size=96, vocab_size=tiny.VOCAB)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    rng, found = np.random.default_rng(6), tensors(source)
    for name, (_, shape, _) in found.items():
        sizes = {72: 64, 151: tiny.VOCAB} | ({48: 96} if ".mlp." in name else {})
        shape = [sizes.get(size, size) for size in shape]
        found[name] = q.tensor("BF16", rng.standard_normal(shape) * (0.1 if len(shape) < 2 else 0.2))
    tiny.write_safetensors(folder / "model.safetensors", found)


def test_a_dense_model(tmp_path):
    source, out, text = (tmp_path / name for name in ("dense", "out", "text.txt"))
    write_dense(source)
    text.write_text("".join(documents("train", 4)))
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        calibrated(out, text, source=source)
    tiny.write_tokenizer(source)
    summary, report = calibrated(out, text, source=source)
    read = summary["calibration"]
    assert (read["num_calibrated"], read["num_fallen_back"]) == (summary["num_quantised"], 0)
    kinds = {module.rsplit(".", 1)[1] for module in report["matrices"]}
    assert {"down_proj", "gate_proj", "out_proj", "o_proj", "in_proj_z", "k_proj"} <= kinds
    for facts in report["matrices"].values():
        found = facts["calibration"]
        assert found["hessian"] == "own" and found["weighted_error"] < found["rounded"]["weighted_error"]
    convert(tmp_path / "plain", "int4", source=source)
    ids = LLM(source, device="cpu").tokenizer.encode("".join(documents("test", 1)))
    want, rounded, own = (LLM(path, device="cpu").logits(ids) for path in (source, tmp_path / "plain", out))
    assert ((own - want) ** 2).mean() < 0.9 * ((rounded - want) ** 2).mean()
    shutil.copy(hub.EMBEDDED / "tokenizer.json", source)
    with pytest.raises(
        RequestError, match=r"calibrate: found token \d+ of the tokenizer; allowed: tokens below"
    ):
        calibrated(tmp_path / "other", text, source=source)


def test_the_same_bytes_on_any_number_of_threads_and_any_instruction_set(text, tmp_path):
    code = (
        "import sys; from qwen35rs import _core; _core.quantize_checkpoint(sys.argv[1], sys.argv[2], scheme='int4', "
        "group_size=32, progress=None, calibrate=[sys.argv[3]], calibration_length=128, calibration_tokens=256)"
    )
    settings = [{"RAYON_NUM_THREADS": "1"}, {"RAYON_NUM_THREADS": "3"}, {"QWEN35RS_ISA": "plain"}]
    for i, setting in enumerate(settings):
        command = [sys.executable, "-c", code, hub.EMBEDDED, tmp_path / str(i), text]
        subprocess.run(command, env={**os.environ, **setting}, check=True)
    for name in ("model.safetensors", "quantization_report.json"):
        assert len({(tmp_path / str(i) / name).read_bytes() for i in range(len(settings))}) == 1


def test_text_of_several_files(text, tmp_path):
    """Files follow one another; .jsonl is lines, anything else is text as it is."""
    lines = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    middle = len(lines) // 2
    (tmp_path / "a.txt").write_text("".join(lines[:middle]))
    (tmp_path / "b.jsonl").write_text("".join(f"{json.dumps({'text': line})}\n\n" for line in lines[middle:]))
    calibrated(tmp_path / "one", text, tokens=4096)
    calibrated(tmp_path / "two", [tmp_path / "a.txt", tmp_path / "b.jsonl"], tokens=4096)
    assert tensors(tmp_path / "one") == tensors(tmp_path / "two")


def test_what_is_refused(text, tmp_path):
    out = tmp_path / "out"

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    files = [
        (
            "empty.txt",
            "",
            "calibrate: found 0 tokens in .*empty.txt; allowed: text of at least one sequence: 512",
        ),
        ("short.txt", "Hello.", r"calibrate: found \d tokens in .*short.txt; allowed: text of at least one"),
        ("latin.txt", "Gr\xfc\xdfe".encode("latin-1"), "latin.txt: byte 2: found what is no UTF-8"),
        ("broken.jsonl", '{"text": "a"}\n{"text"', "broken.jsonl: line 2: found no JSON"),
        ("list.jsonl", "[1]\n", "list.jsonl: line 1: found no object; expected an object with"),
        ("other.jsonl", '{"body": "a"}\n', 'other.jsonl: line 1: found an object without "text"'),
        ("number.jsonl", '{"text": 1}\n', 'number.jsonl: line 1: found a "text" that is no string'),
    ]
    for name, content, error in files:
        path = write(name, content)
        with pytest.raises(Qwen35Error, match=error):
            calibrated(out, path)
        path.unlink()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        calibrated(out, tmp_path / "nowhere.txt")
    with pytest.raises(IsADirectoryError):
        calibrated(out, tmp_path)
    with pytest.raises(RequestError, match="calibrate: found a text for scheme fp8; allowed: int4 or mixed"):
        calibrated(out, text, scheme="fp8")
    with pytest.raises(RequestError, match="calibration_length: found 1; allowed: 2 to 8192 tokens"):
        calibrated(out, text, length=1)
    with pytest.raises(RequestError, match="calibration_length: found 8193; allowed: 2 to 8192 tokens"):
        calibrated(out, text, length=8193)
    with pytest.raises(
        RequestError, match="calibration_tokens: found 511; allowed: at least calibration_length"
    ):
        calibrated(out, text, tokens=511)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing(text, tmp_path):
    for last in (1, 5, 40):
        calls = 0

        def interrupt(done, total, last=last):
            nonlocal calls
            calls += 1
            if calls == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrated(tmp_path / "out", text, progress=interrupt)
        assert not list(tmp_path.iterdir()) and calls == last


def test_the_command(text, tmp_path):
    def run(*args):
        return CliRunner().invoke(app, ["quantize", str(hub.EMBEDDED), *map(str, args)])

    options = ["--scheme", "int4", "--group-size", 32, "--calibration-length", 128]
    done = run(
        tmp_path / "a",
        *options,
        "--calibrate",
        text,
        "--calibrate",
        text,
        "--calibration-tokens",
        256,
        "--json",
    )
    found = json.loads(done.stdout)
    assert found["calibration"]["num_tokens"] == 256 and found["num_quantised"] == 489
    done = run(tmp_path / "b", *options, "--calibrate", text, "--calibration-tokens", 256)
    assert (
        "calibrated on 256 tokens: " in done.stdout and "rounded to the nearest, as the report" in done.stdout
    )
    done = run(tmp_path / "c", *options, "--calibrate", tmp_path / "none.txt")
    assert done.exit_code == 1 and "none.txt" in done.stderr
    done = run(tmp_path / "c", *options)
    assert done.exit_code == 1
    assert "calibration_length: found 128, and no text; allowed: with calibrate alone" in done.stderr
    few = run(tmp_path / "d", *options, "--calibrate", text, "--calibration-tokens", 10**9)
    assert "tokens of 1,000,000,000 that were asked for" in few.stdout


@pytest.mark.parametrize("value", [-1, 0, 1 << 63, 10**25])
@pytest.mark.parametrize("option", ["--calibration-length", "--calibration-tokens"])
def test_numbers_that_no_option_takes(option, value, text, tmp_path):
    args = [
        "quantize",
        str(hub.EMBEDDED),
        str(tmp_path / "out"),
        "--scheme",
        "int4",
        "--calibrate",
        str(text),
    ]
    done = CliRunner().invoke(app, [*args, option, str(value)])
    assert done.exit_code == 1 and f"{option}: found {value}; allowed: 1 to 2^63 - 1" in done.stderr


@pytest.mark.parametrize("place", ["", "."])
def test_a_directory_is_no_text(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["quantize", str(hub.EMBEDDED), "out", "--scheme", "int4", "--calibrate", place]
    done = CliRunner().invoke(app, args)
    assert (
        done.exit_code == 1 and "--calibrate: found '.', a directory; allowed: files of text" in done.stderr
    )
