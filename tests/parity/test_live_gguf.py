"""GGUF files whose matrices the `gguf` package quantises and decodes itself: `pip install gguf`.

Transformers 5.23 does not read GGUF files of this family, so the package is the other program here: it writes the file
with its own writer, and the numbers that it decodes make the checkpoint that the engine must equal, to the bit.
"""

import gguf_file as g
import numpy as np
import pytest
import quantised as q
import test_gguf as whole
from qwen35rs import LLM

import gguf


def write(path, values, tensors):
    """By the package's own writer."""
    arch = values["general.architecture"][1]
    writer = gguf.GGUFWriter(path, arch)
    kinds = gguf.GGUFValueType
    for key, (kind, value) in values.items():
        if key == "general.architecture":
            continue
        if isinstance(kind, tuple):
            writer.add_key_value(key, value, kinds.ARRAY, sub_type=kinds(kind[1]))
        else:
            writer.add_key_value(key, value, kinds(kind))
    for name, (kind, raw) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_what_the_package_quantises(kind, tmp_path):
    values, tensors, config = whole.wide("Q8_0")
    number = gguf.GGMLQuantizationType[kind]
    stored, decoded = {}, {}
    for name, entry in tensors.items():
        x = g.numbers(entry)
        if entry[0] == "F32":
            stored[name], decoded[name] = ("F32", x), entry
        else:
            raw = gguf.quantize(x, number)
            stored[name] = (kind, raw)
            decoded[name] = q.tensor("F32", gguf.dequantize(raw, number))
    write(tmp_path / "wide.gguf", values, stored)
    other = g.as_hugging_face(decoded, config, tmp_path / "wide")
    got = LLM(tmp_path / "wide.gguf", dtype="float32").logits(whole.ids(40))
    assert np.array_equal(got, LLM(other, dtype="float32").logits(whole.ids(40)))


@pytest.mark.parametrize("kind", whole.QUANTISED)
def test_random_blocks(kind):
    rng = np.random.default_rng()
    _, _, raw = g.random_blocks(rng, kind, [64, 1024])
    raw = np.frombuffer(raw, np.uint8).reshape(64, -1)
    want = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(g.decode(kind, raw).view(np.int32), want.view(np.int32))
