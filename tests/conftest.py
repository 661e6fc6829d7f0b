"""Fixtures of the Python tests."""

import pytest
import tiny


def pytest_addoption(parser):
    try:
        import pytest_timeout  # noqa: F401
    except ImportError:
        # The setting in pyproject.toml is then known, and without effect.
        parser.addini("timeout", "seconds a test may take; needs pytest-timeout")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The directory of a small checkpoint with a tokenizer."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def llm(checkpoint):
    from qwen35rs import LLM

    return LLM(checkpoint)
