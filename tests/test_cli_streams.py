"""The command line where a stream is full, closed, or holds what is no message; terminals of other kinds."""

import json
import os
import pty
import shlex
import signal
import subprocess
import sys

import pytest
from qwen35rs.cli import app
from qwen35rs.demo import make_checkpoint
from typer.testing import CliRunner

SCRIPT = [sys.executable, "-m", "qwen35rs"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("cli") / "demo", vocab="bytes").path)


def test_notes_that_cannot_be_written_are_dropped():
    """That the embedded model runs, and that log-probabilities are not shown."""
    with open("/dev/full", "w") as full:
        args = ["generate", "hi", "--max-tokens", "2", "--logprobs", "1"]
        done = subprocess.run([*SCRIPT, *args], check=False, stdout=subprocess.PIPE, stderr=full, timeout=20)
    assert done.returncode == 0 and done.stdout


@pytest.mark.parametrize(
    "args", [["--help"], ["plan", "--help"], ["plan", "0.8b"], ["generate", "hi", "--max-tokens", "1"]]
)
def test_output_that_cannot_be_written_is_an_error_in_one_line(args):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*SCRIPT, *args], check=False, stdout=full, stderr=subprocess.PIPE, timeout=20)
    lines = [line for line in done.stderr.decode().splitlines() if not line.startswith("note: ")]
    assert done.returncode == 1 and len(lines) == 1 and "No space left" in lines[0]


@pytest.mark.parametrize("args", [["chat"], ["tokenize"], ["generate"], ["generate", "--file", "-"]])
def test_stdin_that_is_closed(demo, args):
    command = shlex.join([*SCRIPT, *args, "--model", demo]) + " <&-"
    done = subprocess.run(["sh", "-c", command], check=False, capture_output=True, timeout=20, text=True)
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert done.returncode == 1 and done.stdout == ""
    assert line.startswith("error: ") and "found" in line and "internal" not in line


def test_chat_goes_on_after_lines_that_are_no_messages(demo):
    args = ["chat", "--model", demo, "--max-tokens", "2", "--json"]
    result = CliRunner().invoke(app, args, input=b"caf\xe9\n/reset now\nHello\n /reset\n/etc/hosts?\n")
    assert result.exit_code == 1
    assert [json.loads(line)["user"] for line in result.stdout.splitlines()] == [
        "Hello",
        " /reset",
        "/etc/hosts?",
    ]
    first, second = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert first == "error: stdin: found bytes that are not UTF-8 at byte 3"
    assert second.startswith("error: command: found /reset; allowed: /clear, /exit, /quit, /help; ")
    assert CliRunner().invoke(app, args, input="/help\n/clear\nHello\n/exit\n").exit_code == 0


def test_a_reader_of_the_help_that_leaves():
    reader, writer = os.pipe()
    os.close(reader)
    for args in (["--help"], ["plan", "--help"]):
        done = subprocess.run(
            [*SCRIPT, *args], check=False, stdout=writer, stderr=subprocess.PIPE, timeout=20
        )
        assert (done.returncode, done.stderr) == (141, b"")
    os.close(writer)


@pytest.mark.parametrize(
    "option", ["dtype", "device", "quantization", "kv-cache-dtype", "state-dtype", "max-model-len"]
)
def test_options_that_the_core_cannot_take_are_named(demo, option):
    value = str(2**64) if option == "max-model-len" else b"\xff"
    args = ["generate", "-m", demo, "x", f"--{option}", value]
    done = subprocess.run([*SCRIPT, *args], check=False, capture_output=True, timeout=20)
    assert done.returncode == 1
    assert done.stderr.decode().startswith(f"error: {option.replace('-', '_')}: found "), done.stderr


def test_other_commands_name_options_that_are_no_text(demo, tmp_path):
    for args in (["quantize", demo, tmp_path / "out", "--scheme", b"\xff"], ["plan", "9b", "--gpu", b"\xff"]):
        done = subprocess.run([*SCRIPT, *args], check=False, capture_output=True, timeout=20)
        words = f"error: {args[-2][2:]}: found bytes that are not UTF-8 at character 0\n"
        assert (done.returncode, done.stderr.decode()) == (1, words)


def test_a_model_whose_name_is_no_text():
    done = subprocess.run([*SCRIPT, "plan", b"a\xff"], check=False, capture_output=True, timeout=20)
    assert done.returncode == 1 and done.stderr.startswith(b"error: model: found a"), done.stderr


def test_ids_of_thousands_of_digits(demo):
    result = CliRunner().invoke(app, ["generate", "-m", demo, "--token-ids", "9" * 5000])
    assert result.exit_code == 1
    assert "token_ids: found a number of 5000 digits; allowed: token ids" in result.stderr


def test_prompts_of_several_files(demo, tmp_path):
    (tmp_path / "a").write_text("one\ntwo\n")
    (tmp_path / "b").write_text("three\n")
    args = ["generate", "-m", demo, "-f", str(tmp_path / "a"), "-f", str(tmp_path / "b"), "--max-tokens", "1"]
    outputs = json.loads(CliRunner().invoke(app, [*args, "--json"]).stdout)["outputs"]
    assert [output["prompt"] for output in outputs] == ["one", "two", "three"]


def on_a_terminal(code, typed, **environment):
    """What a program of chat's classes says on a terminal where `typed` was typed before it started."""
    parent, child = pty.openpty()
    os.write(parent, typed)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=child,
        stdout=child,
        stderr=child,
        env=env,
        timeout=30,
        check=False,
    )
    os.close(child)
    said = b""
    try:
        while piece := os.read(parent, 4096):
            said += piece
    except OSError:  # the end
        pass
    os.close(parent)
    return done.returncode, said.decode()


SESSION = """
import signal, sys
from types import SimpleNamespace
from qwen35rs.cli.chat import _Session
def render(*_, **__):
    signal.raise_signal(signal.SIGINT)
model = SimpleNamespace(model="m", max_model_len=100, tokenizer=SimpleNamespace(apply_chat_template=render))
sys.exit(0 if _Session(model, None, [], True, False).run() else 1)
"""


def test_ctrl_c_before_an_answer_begins_stops_the_answer():
    code, said = on_a_terminal(SESSION, b"Hello\n/exit\n")
    assert code == 0 and "(stopped)" in said and "Traceback" not in said, said


def test_a_line_that_is_not_in_the_encoding_of_the_terminal():
    code, said = on_a_terminal(SESSION, "é\n/exit\n".encode(), PYTHONIOENCODING="ascii")
    assert code == 0 and "error: message: found bytes that are not ascii at byte 0; allowed: " in said, said


@pytest.mark.parametrize(("term", "styled"), [("dumb", False), ("xterm", True)])
def test_styles_are_for_terminals_that_have_them(term, styled):
    code = 'from qwen35rs.cli.terminal import DIM, write; write("so", DIM)'
    assert ("\x1b" in on_a_terminal(code, b"", TERM=term)[1]) == styled


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_stopped_can_be_made_again(tmp_path, signal_):
    path = tmp_path / "d"
    for beside in (tmp_path, path):  # where the folder is new, and where it is there
        args = ["demo", path, "--vocab", "bytes", "--hidden", "1024", "--layers", "64"]
        with subprocess.Popen([*SCRIPT, *args]) as child:
            while not any(beside.glob(".d.partial-*/model.safetensors")):
                assert child.poll() is None
            child.send_signal(signal_)
        assert not (path / "config.json").exists()
        if signal_ == signal.SIGINT:
            assert not any(beside.glob(".d.partial-*")) and child.returncode == 130
        path.mkdir(exist_ok=True)
    assert CliRunner().invoke(app, ["demo", str(path), "--vocab", "bytes"]).exit_code == 0
