"""Quantised checkpoints on a GPU whose matrices are too small for its kernels, or in a form for which it has none: it holds
them as bf16, and computes the bits of the same matrices decoded by numpy. Those that keep their codes are in
`test_packed_net.py`."""

import json

import numpy as np
import pytest
import test_quantised as whole
from qwen35rs import LLM

pytestmark = pytest.mark.gpu

# The output projections of this model are 48 x 128.
KEEPS_CODES = [("moe_bf16", name) for name in ("fp8", "fp8 per row", "fp8 per matrix", "gptq, symmetric")]


@pytest.mark.parametrize("source", whole.SOURCES)
@pytest.mark.parametrize("name", whole.FORMATS)
def test_a_model_is_that_of_its_decoded_matrices(name, source, tmp_path):
    one, other, count = whole.pair(tmp_path, source, name)
    assert count > 0
    ids = whole.ids(json.loads((one / "config.json").read_text()))
    models = [LLM(path, device="cuda", deterministic=True) for path in (one, other)]
    got, want = (llm.logits(ids) for llm in models)
    assert np.isfinite(got).all()
    if (source, name) in KEEPS_CODES:
        assert models[0].memory["weights"] < models[1].memory["weights"]
    else:
        assert np.array_equal(got, want)
