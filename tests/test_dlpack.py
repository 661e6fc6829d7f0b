"""The ops on tensors of a CUDA device, as far as a machine without one can go: what is borrowed, checked, refused and
given back. `gpu/test_ops_cuda.py` has the rest."""

import ctypes
import re

import numpy as np
import pytest
from qwen35rs import CudaError, Qwen35Error, RequestError, ops

_NEW = ctypes.pythonapi.PyCapsule_New
_NEW.restype, _NEW.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_CODES = {"float16": (2, 16), "float32": (2, 32), "bfloat16": (4, 16), "int32": (0, 32), "uint8": (1, 8)}
ABSENT = 99  # no machine has so many


class _Managed(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *[(name, ctypes.c_int32) for name in ("device_type", "device_id", "ndim")],
        *[("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)],
        *[("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64)],
        *[("owner", ctypes.c_void_p), ("deleter", _DELETER)],
    ]


class Tensor:
    """What a library says of a tensor on a device that is not there."""

    def __init__(self, *shape, dtype="bfloat16", device=ABSENT, strides=None, offset=0, says=None):
        self.shape, self.device, self.given_back, self.says = shape, device, 0, says
        rank, (code, bits) = len(shape), _CODES[dtype]
        self._lists = [(ctypes.c_int64 * rank)(*x) for x in (shape, strides or ()) if x]
        places = [ctypes.addressof(x) for x in self._lists] + [None, None]
        self._deleter = _DELETER(self._count)
        device = device if says is None else says
        self._managed = _Managed(
            4096, 2, device, rank, code, bits, 1, *places[:2], offset, None, self._deleter
        )

    def _count(self, _):
        self.given_back += 1

    def __dlpack_device__(self):
        return 2, self.device

    def __dlpack__(self, *, stream=None):
        assert stream == 1, "the default stream as the protocol names it"
        self.capsule = _NEW(ctypes.addressof(self._managed), b"dltensor", None)
        return self.capsule


class Unwilling(Tensor):
    error: BaseException = BufferError("it needs a gradient")

    def __dlpack__(self, *, stream=None):
        raise self.error


def refused(call, words, kind=RequestError):
    """A build without CUDA says that first."""
    with pytest.raises(Qwen35Error) as caught:
        call()
    text = str(caught.value)
    if "built without CUDA" not in text:
        assert isinstance(caught.value, kind) and re.match(words, text), text


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.rms_norm(x(3, 8), x(8, dtype="float32"), residual=x(3, 8)),
        lambda x: ops.rope(x(3, 2, 8), np.arange(3)),
        lambda x: ops.rope(x(3, 2, 8), x(3, 3, dtype="int32"), rotary_dim=4, mrope_section=(1, 1, 0)),
        lambda x: ops.route(x(3, 8, dtype="float32"), 2),
        lambda x: ops.causal_conv1d(x(3, 8), x(8, 1, 4), x(3, 8)),
        lambda x: ops.gated_delta_rule(x(3, 2, 4), x(3, 2, 4), x(3, 4, 5), x(3, 4), x(3, 4)),
        lambda x: ops.attention(x(3, 2, 8), x(5, 1, 8), x(5, 1, 8), scale=8**-0.5),
        lambda x: ops.moe(
            x(3, 8), x(4, 8), x(4, 6, 8), x(4, 8, 3), 2, shared=(x(5, 8), x(5, 8), x(8, 5), x(8))
        ),
    ],
)
def test_a_cuda_device_that_is_not_there(call):
    made = []

    def tensor(*shape, **what):
        made.append(Tensor(*shape, **what))
        return made[-1]

    words = f"cuda: found (no NVIDIA driver|no device|a driver|.* no cuda:{ABSENT})"
    refused(lambda: call(tensor), words, CudaError)
    for x in made:  # what was taken is given back, once, and cannot be taken again
        capsule = getattr(x, "capsule", None)
        assert x.given_back == (capsule is not None)
        assert capsule is None or '"used_dltensor"' in repr(capsule)


@pytest.mark.parametrize(
    "words, call",
    [
        ("x: found dtype float16; allowed: bfloat16 or float32", lambda: ops.rms_norm(Tensor(3, 8, dtype="float16"), Tensor(8))),
        ("q: found dtype float32; allowed: bfloat16$", lambda: ops.attention(Tensor(3, 2, 8, dtype="float32"), Tensor(3, 2, 8), Tensor(3, 2, 8))),
        ("x: found dtype uint8;", lambda: ops.causal_conv1d(Tensor(3, 8, dtype="uint8"), Tensor(8, 4))),
        (r"weight: found shape \[7\]; allowed: \[8\]", lambda: ops.rms_norm(Tensor(3, 8), Tensor(7))),
        (r"residual: found shape \[2, 8\]; allowed: x's shape \[3, 8\]", lambda: ops.rms_norm(Tensor(3, 8), Tensor(8), residual=Tensor(2, 8))),
        (r"x: found strides \[1, 3\] of shape \[3, 8\]", lambda: ops.rms_norm(Tensor(3, 8, strides=(1, 3)), Tensor(8))),
        ("x: found memory 2 bytes after a multiple of 16", lambda: ops.rms_norm(Tensor(3, 8, offset=2), Tensor(8))),
        (r"x: found shape \[2147483648\]; allowed: sizes below", lambda: ops.rms_norm(Tensor(2**31), Tensor(2**31))),
        (f"x: found a tensor on DLPack's device .2, 3.; allowed: cuda:{ABSENT}", lambda: ops.rms_norm(Tensor(3, 8, says=3), Tensor(8))),
        (f"weight: found an array that is on no CUDA device; allowed: one on cuda:{ABSENT}, where x is", lambda: ops.rms_norm(Tensor(3, 8), np.ones(8))),
        (f"weight: found a tensor on cuda:98; allowed: one on cuda:{ABSENT}", lambda: ops.rms_norm(Tensor(3, 8), Tensor(8, device=98))),
        ("x: found an array that is on no CUDA device", lambda: ops.rope(np.ones((3, 2, 8)), Tensor(3, dtype="int32"))),
        ("x: found Unwilling .it needs a gradient.; allowed", lambda: ops.rms_norm(Unwilling(3, 8), Tensor(8))),
        ("positions: found 4 of them", lambda: ops.rope(Tensor(3, 2, 8), np.arange(4))),
        ("positions: found 2147483648", lambda: ops.rope(Tensor(1, 2, 8), np.array([2**31]))),
        (r"positions: found shape \[2, 3\]", lambda: ops.rope(Tensor(3, 2, 8), Tensor(2, 3, dtype="int32"))),
        ("top_k: found 9", lambda: ops.route(Tensor(3, 8), 9)),
        ("scale: found 0.5", lambda: ops.attention(Tensor(3, 2, 8), Tensor(3, 2, 8), Tensor(3, 2, 8), 0.5)),
        ("q: found head_dim 2000", lambda: ops.attention(*[Tensor(3, 2, 2000)] * 3)),
        ("qk_l2norm: found False", lambda: ops.gated_delta_rule(*[Tensor(3, 2, 4)] * 3, *[Tensor(3, 2)] * 2, qk_l2norm=False)),
        ("shared gate_proj: found dtype float32", lambda: ops.moe(Tensor(3, 8), Tensor(4, 8), Tensor(4, 6, 8), Tensor(4, 8, 3), 2, [Tensor(5, 8, dtype="float32")] * 4)),
    ],
)  # fmt: skip
def test_cuda_tensors_that_do_not_fit_are_refused(words, call):
    refused(call, words)


@pytest.mark.parametrize(
    ("shape", "strides"), [((3, 1, 8), (8, 5, 1)), ((0, 8), (1, 7)), ((1,), (4,)), ((), None)]
)
def test_strides_that_say_nothing(shape, strides):
    """Of a single row or of none; what is wrong here is the weight."""
    words = r"x: found shape \[\]; allowed" if not shape else r"weight: found shape \[5, 5\]; allowed"
    refused(lambda: ops.rms_norm(Tensor(*shape, strides=strides), Tensor(5, 5)), words)


def test_what_interrupts_a_library_passes():
    x = Unwilling(3, 8)
    x.error = KeyboardInterrupt()
    with pytest.raises((KeyboardInterrupt, CudaError)):
        ops.rms_norm(x, Tensor(8))
