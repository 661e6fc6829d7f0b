"""The stubs are those of the binary, and the package's own types hold."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*args):
    # Not in the source tree's own directory: the installed package is what is checked.
    done = subprocess.run(
        [sys.executable, "-m", *args], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_stubs_are_those_of_the_binary():
    run("mypy.stubtest", "qwen35rs._core", "--mypy-config-file", str(ROOT / "pyproject.toml"))


def test_the_package_is_typed():
    run("mypy")


def test_the_package_says_that_it_is_typed():
    import qwen35rs

    home = Path(qwen35rs.__file__).parent
    assert (home / "py.typed").exists()
    assert (home / "_core.pyi").exists()
