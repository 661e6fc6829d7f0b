"""What `qwen35rs quantize` writes, as other programs read it: compressed-tensors quantises to the same codes and decodes
to the same numbers, and Transformers computes the same logits. Needs `accelerate` and `compressed-tensors` too.

Transformers takes blocks of FP8 from the number of scales, so sizes that are no multiples of 128 are not compared there.
"""

import json

import numpy as np
import pytest
import quantised as q
import test_quantize as own
import tiny
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from golden.cases import Golden
from qwen35rs import LLM, hub
from qwen35rs.demo import make_checkpoint
from test_calibrate import calibrated, documents


@pytest.mark.parametrize("group", [32, 64, 128])
def test_compressed_tensors_packs_and_decodes_the_same(group, tmp_path):
    make_checkpoint(tmp_path / "demo", vocab="bytes", hidden=256, experts=4)
    own.convert(tmp_path / "out", "int4", group, tmp_path / "demo")
    before, after = own.tensors(tmp_path / "demo"), own.tensors(tmp_path / "out")
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    names = [name.removesuffix(".weight_packed") for name in after if name.endswith(".weight_packed")]
    assert len(names) > 30
    for module in names:
        w = torch.from_numpy(own.source_matrix(before, module).copy())
        parts = {
            part: after[f"{module}.{part}"] for part in ("weight_packed", "weight_scale", "weight_shape")
        }
        scale = torch.from_numpy(q.numbers(parts["weight_scale"]).copy())
        found = PackedQuantizationCompressor.compress({"weight": w, "weight_scale": scale}, scheme)
        assert (found["weight_packed"].numpy() == q.numbers(parts["weight_packed"])).all(), module
        assert found["weight_shape"].tolist() == q.numbers(parts["weight_shape"]).tolist()
        wide = {**found, "weight_scale": scale}
        numbers = PackedQuantizationCompressor.decompress(wide, scheme)["weight"].numpy()
        assert (numbers == q.decode_packed(parts, group)).all(), module


def test_compressed_tensors_gives_the_same_floats(tmp_path):
    make_checkpoint(tmp_path / "demo", vocab="bytes", hidden=256, experts=4)
    own.convert(tmp_path / "out", "mixed", 32, tmp_path / "demo")
    before, after = own.tensors(tmp_path / "demo"), own.tensors(tmp_path / "out")
    args = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block"}
    args = QuantizationArgs(**args, block_structure=[128, 128])
    names = [name.removesuffix(".weight") for name in after if after[name][0] == "F8_E4M3"]
    assert len(names) > 10
    for module in names:
        w = own.source_matrix(before, module)
        if any(size % 128 for size in w.shape):
            continue
        scale = torch.from_numpy(q.numbers(after[f"{module}.weight_scale"]).copy())
        zero = torch.zeros_like(scale)
        codes = quantize(torch.from_numpy(w.copy()), scale, zero, args, dtype=torch.float8_e4m3fn)
        found = np.frombuffer(after[f"{module}.weight"][2], np.uint8).reshape(w.shape)
        assert (codes.view(torch.uint8).numpy() == found).all(), module


def widen_scales(folder):
    """Scales as float32, the same numbers: Transformers decodes in their type, and rounds to it."""
    found = own.tensors(folder)
    for name, scale in found.items():
        if name.endswith(".weight_scale"):
            found[name] = q.tensor("F32", q.numbers(scale))
    tiny.write_safetensors(folder / "model.safetensors", found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("source", "scheme"),
    [
        ("embedded", "int4"),
        ("embedded", "mixed"),
        ("calibrated", "int4"),
        ("demo", "int4"),
        ("demo", "fp8"),
        ("demo", "mixed"),
    ],
)
def test_transformers_computes_the_same(source, scheme, tmp_path):
    path = hub.EMBEDDED
    if source == "demo":
        path = tmp_path / "demo"
        make_checkpoint(path, vocab="bytes", hidden=256, experts=4)
    out = tmp_path / "out"
    if source == "calibrated":
        (tmp_path / "text.txt").write_text("".join(documents("train", 8)))
        calibrated(out, tmp_path / "text.txt", scheme, tokens=2048)
    else:
        own.convert(out, scheme, 32, path)
    config = (
        transformers.FineGrainedFP8Config(dequantize=True)
        if scheme == "fp8"
        else transformers.CompressedTensorsConfig(dequantize=True)
    )
    facts = json.loads((out / "config.json").read_text())
    kind = getattr(transformers, facts["architectures"][0])
    ids = [i % 256 for i in own.IDS]
    widen_scales(out)
    model = kind.from_pretrained(out, dtype=torch.float32, quantization_config=config)
    with torch.inference_mode():
        want = model.float()(torch.tensor([ids])).logits[0].numpy()
    got = LLM(out, device="cpu").logits(ids)
    assert np.abs(got - want).max() <= Golden.TOLERANCE * np.abs(want).max()
    assert np.abs(got - LLM(path, device="cpu").logits(ids)).max() > 0.005 * np.abs(want).max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("scheme", "kept"), [("mixed", own.ROUTED), ("int4", own.KEPT)])
def test_transformers_reads_kept_integers(scheme, kept, tmp_path):
    """Of GPTQ, symmetric: of experts Transformers takes no zero points, and one form for all that is dense."""
    path, _, _ = own.pair(tmp_path, hub.EMBEDDED, "gptq, symmetric", kept=kept)
    out = tmp_path / "out"
    own.convert(out, scheme, 128, path)
    widen_scales(out)
    model = transformers.Qwen3_5MoeForConditionalGeneration.from_pretrained(
        out,
        dtype=torch.float32,
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
    )
    with torch.inference_mode():
        want = model.float()(torch.tensor([own.IDS])).logits[0].numpy()
    got = LLM(out, device="cpu").logits(own.IDS)
    assert np.abs(got - want).max() <= Golden.TOLERANCE * np.abs(want).max()


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_compressed_tensors_decodes_kept_integers(name, tmp_path):
    """With their zero points."""
    path, other, count = own.pair(tmp_path, hub.EMBEDDED, name, kept=own.DENSE)
    own.convert(tmp_path / "out", "mixed", 128, path)
    found, want = own.tensors(tmp_path / "out"), own.tensors(other)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (weights,) = (g["weights"] for g in config["config_groups"].values() if g["weights"]["num_bits"] == 4)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    modules = [name.removesuffix(".weight_packed") for name in found if name.endswith(".weight_packed")]
    assert len(modules) == count
    for module in modules:
        parts = {part: torch.from_numpy(q.numbers(x).copy()) for part, x in own.stored(found, module).items()}
        numbers = PackedQuantizationCompressor.decompress(parts, scheme)["weight"].numpy()
        assert np.array_equal(numbers, q.numbers(want[f"{module}.weight"])), module
