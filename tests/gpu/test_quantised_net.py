"""Quantised checkpoints on a GPU: as long as it holds them as bf16, the bits of the same matrices decoded by numpy."""

import json

import numpy as np
import pytest
import test_quantised as whole
from qwen35rs import LLM

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("source", whole.SOURCES)
@pytest.mark.parametrize("name", whole.FORMATS)
def test_a_model_is_that_of_its_decoded_matrices(name, source, tmp_path):
    one, other, count = whole.pair(tmp_path, source, name)
    assert count > 0
    ids = whole.ids(json.loads((one / "config.json").read_text()))
    got, want = (LLM(path, device="cuda", deterministic=True).logits(ids) for path in (one, other))
    assert np.array_equal(got, want) and np.isfinite(got).all()
