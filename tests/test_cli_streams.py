"""The command line where a stream is full, closed, or holds what is no message."""

import json
import shlex
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
