"""`device`: what it may be, what `auto` is, and what is said where there is no GPU."""

import os
import subprocess
import sys

import pytest
from qwen35rs import LLM, RequestError


def test_auto_is_what_the_environment_says(checkpoint, monkeypatch):
    assert LLM(checkpoint).device == LLM(checkpoint, device="cpu").device == "cpu"
    monkeypatch.setenv("QWEN35RS_DEVICE", "gpu")
    with pytest.raises(
        RequestError, match='QWEN35RS_DEVICE: found "gpu"; allowed: "auto", "cpu", "cuda", "cuda:N"$'
    ):
        LLM(checkpoint)
    assert LLM(checkpoint, device="cpu").device == "cpu"


def without_a_gpu(code, path, **environment):
    """Runs code where the driver, if there is one, shows no device: it reads that when it starts."""
    kept = {k: v for k, v in os.environ.items() if k != "QWEN35RS_DEVICE"}
    command = [
        sys.executable,
        "-c",
        f"import sys; from qwen35rs import *; from qwen35rs import _core; {code}",
    ]
    done = subprocess.run(
        [*command, str(path)],
        env={**kept, "CUDA_VISIBLE_DEVICES": "", **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


@pytest.mark.parametrize("environment", [{}, {"QWEN35RS_DEVICE": ""}, {"QWEN35RS_DEVICE": "auto"}], ids=str)
def test_auto_is_the_cpu_where_there_is_no_gpu(checkpoint, environment):
    assert without_a_gpu("print(LLM(sys.argv[1]).device)", checkpoint, **environment) == "cpu\n"


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
@pytest.mark.parametrize(
    "use",
    [
        "LLM(sys.argv[1], device={})",
        "_core.check_devices({}, 1, False)",
        "LLM(sys.argv[1], device={}, tensor_parallel_size=2)",
    ],
)
def test_a_gpu_that_is_not_there(checkpoint, device, use):
    code = f"""
try:
    {use.format(repr(device))}
except CudaError as error:
    assert isinstance(error, Qwen35Error) and isinstance(error, RuntimeError)
    print(error)
"""
    text = without_a_gpu(code, checkpoint)
    assert text.startswith("cuda: ") and 'device="cpu"' in text
    reasons = ("found no NVIDIA driver", "found no device", "built without CUDA")
    assert any(reason in text for reason in reasons), text


@pytest.mark.parametrize("device", ["", "cuda:", "cuda:x", "cuda:-1", "CPU"])
def test_other_names(checkpoint, device):
    with pytest.raises(
        RequestError, match='device: found ".*"; allowed: "auto", "cpu", "cuda", "cuda:N", "cuda:N,M"$'
    ):
        LLM(checkpoint, device=device)
