"""Tests of replicas: `pip install qwen35rs[test,ray]`, then `pytest -m ray tests/ray`."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    here = Path(__file__).resolve().parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.ray)
            # Warnings of Ray's are not this project's.
            item.add_marker(pytest.mark.filterwarnings("default"))
