"""`benches/formats.py`: the embedded model in each published format is still the embedded model, and in that format."""

import json
import sys
from pathlib import Path

import gguf_file as g
import numpy as np
import pytest
import quantised as q
import tiny
from qwen35rs import LLM, _core, hub

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benches"))
import formats

FORMS = {
    "gptq": "int4 (gptq), groups of 32",
    "awq": "int4 (awq), groups of 32",
    "packed int4": "int4 (compressed-tensors), groups of 32",
    "nvfp4": "nvfp4 (compressed-tensors)",
    "fp8": "fp8, a scale per block of 128 x 128",
    "fp8 per row": "fp8, a scale per row",
    "gguf Q8_0": "Q8_0",
    "gguf Q4_0": "Q4_0",
}
#: What is lost, of the logits: the bits that there are, and an error in any transform shows.
ERROR = {"nvfp4": 0.25, "fp8": 0.08, "fp8 per row": 0.08, "gguf Q8_0": 0.03}


@pytest.mark.parametrize("name", [*formats.FORMATS, *formats.GGUF])
def test_each_is_nearly_the_same_model(name, tmp_path):
    path = formats.write(name, tmp_path / "out")
    llm, plain = LLM(path, device="cpu"), LLM(hub.EMBEDDED, device="cpu")
    ids = plain.tokenizer.encode("What is 17 + 25? Answer in words.")
    assert llm.tokenizer.encode("What is 17 + 25? Answer in words.") == ids
    got, want = llm.logits(ids), plain.logits(ids)
    error = np.sqrt(np.square(got - want).mean() / np.square(want).mean())
    assert 0.001 < error < ERROR.get(name, 0.25), error
    found = json.loads(_core.inspect_checkpoint(str(path), False))["quantized"]
    assert any(FORMS[name] in share["format"] for share in found), found


@pytest.mark.parametrize(("kind", "levels"), [("Q8_0", 127), ("Q4_0", 8)])
def test_blocks_are_rounded_to_the_nearest(kind, levels):
    x = np.random.default_rng(4).standard_normal((6, 64)).astype(np.float32)
    x[0, :32] = 0
    got = g.numbers(g.encode(kind, x)).reshape(-1, 32)
    steps = np.abs(x.reshape(-1, 32)).max(1, keepdims=True) / levels
    off = np.abs(got - x.reshape(-1, 32))
    # The largest of the other sign has no code of its own in four bits.
    last = np.abs(x.reshape(-1, 32)) > steps * (levels - 1)
    assert (np.where(last, 0, off) <= steps * 0.51).all() and (off <= steps * 1.01).all()


def test_the_way_to_gguf_and_back(tmp_path):
    """In float32, but for what is a logarithm."""
    config = json.loads((hub.EMBEDDED / "config.json").read_text())
    tensors = tiny.read_safetensors(hub.EMBEDDED / "model.safetensors")
    there = g.from_hugging_face(tensors, config, lambda name, x: q.tensor("F32", x))
    back = tiny.read_safetensors(g.as_hugging_face(there, config, tmp_path / "back") / "model.safetensors")
    want = {name.replace("language_model.", ""): q.numbers(entry) for name, entry in tensors.items()}
    assert {name for name in want if not name.startswith("mtp.")} == set(back)
    for name, entry in back.items():
        assert np.allclose(q.numbers(entry), want[name], rtol=0, atol=1e-6), name
