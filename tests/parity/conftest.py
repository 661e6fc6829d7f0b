"""Tests against a live Transformers: `pip install qwen35rs[test,parity]`, then `pytest tests/parity`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `golden`


def pytest_configure(config):
    config.addinivalue_line("markers", "parity: needs torch, transformers and safetensors")


def pytest_collection_modifyitems(items):
    here = Path(__file__).resolve().parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.parity)
