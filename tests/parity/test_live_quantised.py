"""Quantised checkpoints against Transformers, which reads them itself: the same names, the same logits.

Where Transformers can: FP8 sizes of whole blocks (it takes the block from the number of scales), experts that are all
quantised alike, no stacks of NVFP4. Scales are float32, since it decodes in their type. Needs `accelerate` and
`compressed-tensors` too.
"""

import json

import numpy as np
import pytest
import quantised as q
import test_quantised as whole
import torch
import transformers
from golden.cases import Golden
from qwen35rs import LLM

WIDE = "family_heads_bf16"  # with projections of several blocks, and experts
FP8 = transformers.FineGrainedFP8Config(dequantize=True)
CASES = {
    "fp8": ([WIDE], lambda x: q.make_fp8(x, (128, 128), "F32"), FP8),
    "fp8 per row": ([WIDE, "dense_bf16"], None, None),
    "pack-quantized": ([WIDE, "dense_bf16"], lambda x: q.make_packed(x, 8, "F32"), None),
    # It rounds to bf16 at the end.
    "nvfp4 of compressed-tensors": (["dense_bf16"], None, None),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "source"), [(name, source) for name, (sources, *_) in CASES.items() for source in sources]
)
def test_transformers_reads_the_same(name, source, tmp_path):
    _, make, config = CASES[name]
    one, _, _ = whole.pair(tmp_path, source, name, kept=whole.KEPT, make=make)
    config = config or transformers.CompressedTensorsConfig(dequantize=True)
    facts = json.loads((one / "config.json").read_text())
    ids = whole.ids(facts)
    kind = getattr(transformers, facts["architectures"][0])
    model = kind.from_pretrained(one, dtype=torch.float32, quantization_config=config)
    with torch.inference_mode():
        want = model.float()(torch.tensor([ids])).logits[0].numpy()
    got = LLM(one, dtype="bfloat16" if "nvfp4" in name else "auto").logits(ids)
    assert np.abs(got - want).max() <= Golden.TOLERANCE * np.abs(want).max()
    # What is compared is not what the model was before.
    assert np.abs(got - LLM(Golden(source).path).logits(ids)).max() > 0.005 * np.abs(want).max()
