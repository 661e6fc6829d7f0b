"""Fixtures of the Python tests."""

import os
import re
import signal

import pytest
import tiny

# What is tested is the CPU, to the bit, also where there is a GPU; `tests/gpu` names its device.
os.environ["QWEN35RS_DEVICE"] = "cpu"

# A shell that starts this in the background has SIGINT ignored, and so would every process that a test starts: Ctrl-C
# could not be tested.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    try:
        import pytest_timeout  # noqa: F401
    except ImportError:
        # The setting in pyproject.toml is then known, and without effect.
        parser.addini("timeout", "seconds a test may take; needs pytest-timeout")


def pytest_configure(config):
    # Ranks of one card wait for each other, and a kernel that is loaded meanwhile would wait for them. Ranks of two cards
    # may not do this: libraries would load their kernels for both.
    asked = {
        name
        for name in ("gpu", "two_gpus")
        if re.search(rf"(?<!not )\b{name}\b", config.getoption("markexpr"))
    }
    if len(asked) == 2 and not config.getoption("collectonly"):
        raise pytest.UsageError("-m: found gpu and two_gpus; allowed: one of them, then the other")
    if asked == {"gpu"}:
        os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")  # read when CUDA starts


def pytest_ignore_collect(collection_path, config):
    """The folders of marks that are not asked for, as in `pytest -m gpu`, are left alone: they import torch or Ray, or need
    the emulator. Where they are asked for, they fail without what they need."""
    name, asked = collection_path.name, config.getoption("markexpr")
    if name in ("emulator", "gpu", "parity", "ray") and (name not in asked or f"not {name}" in asked):
        return True
    return None


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The directory of a small checkpoint with a tokenizer."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def processes():
    """What a test starts and adds here does not outlive it."""
    started = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def llm(checkpoint):
    from qwen35rs import LLM

    return LLM(checkpoint)
