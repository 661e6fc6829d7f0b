"""`device`: what it may be, what `auto` is, and what is said where there is no GPU."""

import ctypes.util

import pytest
from qwen35rs import LLM, CudaError, Qwen35Error, RequestError, _core

HAS_DRIVER = ctypes.util.find_library("cuda") is not None


def test_auto_is_what_the_environment_says(checkpoint, monkeypatch):
    assert LLM(checkpoint).device == LLM(checkpoint, device="cpu").device == "cpu"
    monkeypatch.setenv("QWEN35RS_DEVICE", "gpu")
    with pytest.raises(RequestError, match='QWEN35RS_DEVICE: found "gpu"; allowed: "auto", "cpu", "cuda"'):
        LLM(checkpoint)
    assert LLM(checkpoint, device="cpu").device == "cpu"


@pytest.mark.skipif(HAS_DRIVER, reason="there is an NVIDIA driver")
@pytest.mark.parametrize("value", ["", "auto", None])
def test_auto_is_the_cpu_where_there_is_no_gpu(checkpoint, monkeypatch, value):
    if value is None:
        monkeypatch.delenv("QWEN35RS_DEVICE")
    else:
        monkeypatch.setenv("QWEN35RS_DEVICE", value)
    assert LLM(checkpoint).device == "cpu"


@pytest.mark.skipif(HAS_DRIVER, reason="there is an NVIDIA driver")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there(checkpoint, device):
    for use in (LLM, lambda path, device: _core.find_device(device)):
        with pytest.raises(CudaError) as caught:
            use(checkpoint, device=device)
        assert isinstance(caught.value, Qwen35Error) and isinstance(caught.value, RuntimeError)
        text = str(caught.value)
        built = "found no NVIDIA driver" in text or "built without CUDA" in text
        assert text.startswith("cuda: ") and built and 'device="cpu"' in text


@pytest.mark.parametrize("device", ["", "cuda:", "cuda:x", "cuda:-1", "CPU"])
def test_other_names(checkpoint, device):
    with pytest.raises(RequestError, match='device: found ".*"; allowed: "auto", "cpu", "cuda", "cuda:N"'):
        LLM(checkpoint, device=device)
