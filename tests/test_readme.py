"""The README's Python blocks and commands run as they are written."""

import re
import shlex
from pathlib import Path

import pytest
from qwen35rs.cli import app
from qwen35rs.demo import make_checkpoint
from typer.testing import CliRunner

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SHELL = "\n".join(re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
# The parts between `&&` count too.
COMMANDS = [part.strip() for line in SHELL.splitlines() for part in line.split("&&")]
COMMANDS = [command for command in COMMANDS if command.startswith("qwen35rs ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with `./demo`."""
    path = tmp_path_factory.mktemp("readme")
    make_checkpoint(path / "demo", vocab="bytes")
    return path


def test_the_readme_has_examples():
    assert len(BLOCKS) == 2 and len(COMMANDS) >= 8


@pytest.mark.parametrize("block", BLOCKS)
def test_python(block, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    names = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)  # noqa: S102
    if "print(" in block:
        assert capsys.readouterr().out.startswith("17 + 25 = 42")
    if "logits" in names:
        assert names["logits"].ndim == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("qwen35rs.vocabulary.has_real_ranks", lambda: False)
    args = shlex.split(command, comments=True)[1:]
    result = CliRunner().invoke(app, args, input="Hello\n")
    assert result.exit_code == 0, result.output
    assert result.stdout


def test_the_commands_of_the_readme_are_all_there():
    single = {command.name or command.callback.__name__ for command in app.registered_commands}
    groups = {group.name for group in app.registered_groups}
    assert {shlex.split(command)[1] for command in COMMANDS} == single | groups
