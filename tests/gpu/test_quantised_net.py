"""Quantised checkpoints on a GPU whose matrices are too small for its kernels, or in a form for which it has none: it holds
them as bf16, and computes the bits of the same matrices decoded by numpy. Those that keep their codes are in
`test_packed_net.py`."""

import json

import numpy as np
import pytest
import test_quantised as whole
from qwen35rs import LLM

pytestmark = pytest.mark.gpu

# Not those whose matrices keep their codes: the output projections of this model are 48 x 128.
KEPT = (
    "fp8",
    "fp8 per row",
    "fp8 per matrix",
    "gptq, symmetric",
    "nvfp4 of modelopt",
    "nvfp4 of compressed-tensors",
)
KEEPS_CODES = [("moe_bf16", name) for name in KEPT]
CASES = [(s, name) for s in whole.SOURCES for name in whole.FORMATS if (s, name) not in KEEPS_CODES]


@pytest.mark.parametrize(("source", "name"), CASES)
def test_a_model_is_that_of_its_decoded_matrices(source, name, tmp_path):
    one, other, count = whole.pair(tmp_path, source, name)
    assert count > 0
    ids = whole.ids(json.loads((one / "config.json").read_text()))
    got, want = (LLM(path, device="cuda", deterministic=True).logits(ids) for path in (one, other))
    assert np.array_equal(got, want) and np.isfinite(got).all()
