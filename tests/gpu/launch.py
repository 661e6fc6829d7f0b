"""The launchers of `cuda/launch.h` for torch tensors: compiled here where there is an nvcc, or the library that
QWEN35RS_CUDA_LIB names."""

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

# Ranks of one card wait for each other (ranks.py): no stream may be queued behind another. The driver reads this once.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import torch

CUDA = Path(__file__).resolve().parents[2] / "cuda"
PAGE = 64
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


def _ints(*names):
    return [(name, _INT) for name in names]


def _pointers(*names):
    return [(name, _POINTER) for name in names]


class BatchStruct(ctypes.Structure):
    _fields_ = [
        *_ints("num_tokens", "num_seqs", "max_query_len", "max_kv_len"),
        *_pointers(
            "token_ids", "positions", "seq_of", "query_start", "query_len", "cached_len", "chunked_len"
        ),
        *_pointers("slot", "page_start", "pages"),
    ]


class DeltaDims(ctypes.Structure):
    _fields_ = _ints("num_k_heads", "num_v_heads", "k_dim", "v_dim", "conv_kernel", "half_states")


class AttentionDims(ctypes.Structure):
    _fields_ = _ints("num_q_heads", "num_kv_heads", "head_dim")


class MoeDims(ctypes.Structure):
    _fields_ = _ints("hidden", "num_experts", "top_k", "width", "shared_width", "first_expert", "num_here")

    def __init__(self, hidden, num_experts, top_k, width, shared_width, first_expert=0, num_here=None):
        here = num_experts if num_here is None else num_here
        super().__init__(hidden, num_experts, top_k, width, shared_width, first_expert, here)


class MoeWeights(ctypes.Structure):
    _fields_ = _pointers("router", "gate_up", "down", "shared_gate_up", "shared_down", "shared_gate")


class Peers(ctypes.Structure):
    _fields_ = [
        *_ints("rank", "world", "channels", "early", "width"),
        ("gather_bytes", _LONG),
        ("timeout_ns", _LONG),
        ("regions", _POINTER * 8),
        ("status", _POINTER),
    ]


class PackedMatrix(ctypes.Structure):
    _fields_ = [*_pointers("codes", "scales", "zeros"), *_ints("rows", "k", "group", "kind")]


class HeadOrder(ctypes.Structure):
    _fields_ = _ints("start", "num_k_heads", "per_k_head", "head_dim")


class PackedMoe(ctypes.Structure):
    _fields_ = [
        *((name, PackedMatrix) for name in ("gate_up", "down", "shared_gate_up", "shared_down")),
        *_pointers("router", "shared_gate"),
    ]


def _floats(*names):
    return [(name, ctypes.c_float) for name in names]


class Sampling(ctypes.Structure):
    _fields_ = [
        ("uniform", ctypes.c_double),
        *_floats("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty"),
        *_floats("presence_penalty"),
        *_ints("top_k", "num_logprobs", "edit_start", "num_edits"),
    ]


class Edit(ctypes.Structure):
    _fields_ = [("token", _INT), ("bias", ctypes.c_float), *_ints("banned", "seen", "count")]


class Sampled(ctypes.Structure):
    _fields_ = [
        *_ints("token", "rank"),
        ("logprob", ctypes.c_float),
        ("num_top", _INT),
        ("top_tokens", _INT * 32),
        ("top_logprobs", ctypes.c_float * 32),
    ]


_TYPES = {
    "q35_batch": BatchStruct,
    "q35_delta_dims": DeltaDims,
    "q35_attention_dims": AttentionDims,
    "q35_moe_dims": MoeDims,
    "q35_moe_weights": MoeWeights,
    "q35_peers": Peers,
    "q35_packed": PackedMatrix,
    "q35_head_order": HeadOrder,
    "q35_packed_moe_weights": PackedMoe,
    "int": ctypes.c_int,
    "int32_t": _INT,
    "int64_t": _LONG,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
}


def _library():
    named = os.environ.get("QWEN35RS_CUDA_LIB")
    if named:
        return ctypes.CDLL(named)
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    assert nvcc, "no nvcc, and QWEN35RS_CUDA_LIB names no library"
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major >= 9 else "")
    out = Path(tempfile.mkdtemp()) / "launch.so"
    flags = [
        "-O3",
        "-std=c++17",
        "-Xcompiler",
        "-fPIC",
        "-shared",
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
    ]
    subprocess.run([nvcc, *flags, "-o", str(out), *map(str, sorted(CUDA.glob("*.cu")))], check=True)
    return ctypes.CDLL(str(out))


def _declare(lib):
    """Argument types from the header itself."""
    text = re.sub(r"//[^\n]*", "", (CUDA / "launch.h").read_text())
    for result, name, arguments in re.findall(r"\b(int|int64_t) (q35_\w+)\(([^)]*)\);", text):
        if not hasattr(lib, name):
            continue  # not every kernel is there yet
        function = getattr(lib, name)
        function.restype = _TYPES[result]
        function.argtypes = [
            _POINTER if "*" in a else _TYPES[a.strip().removeprefix("const ").rsplit(" ", 1)[0].strip()]
            for a in arguments.split(",")
        ]
    return lib


_lib = None


def call(name, *arguments):
    """Calls a launcher on torch's current stream; tensors are passed by their address. Raises on an error code."""
    global _lib
    if _lib is None:
        torch.cuda.init()
        torch.zeros(1, device="cuda")  # makes the context
        _lib = _declare(_library())
    plain = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    if getattr(_lib, name).restype is _LONG:
        return getattr(_lib, name)(*plain)
    code = getattr(_lib, name)(torch.cuda.current_stream().cuda_stream, *plain)
    assert code == 0, f"{name}: CUDA error {code}"
    return None


class Batch:
    """A ragged batch on the device. `seqs` are (cached_len, query_len, chunked_len); pages and slots are drawn."""

    def __init__(self, seqs, *, seed=0, spare_pages=3, num_slots=None):
        generator = torch.Generator().manual_seed(seed)
        num = sum(q for _, q, _ in seqs)
        counts = [-(-(c + q) // PAGE) for c, q, _ in seqs]
        self.seqs, self.num_tokens = seqs, num
        self.num_pages = sum(counts) + spare_pages
        order = torch.randperm(self.num_pages, generator=generator)[: sum(counts)]
        self.num_slots = num_slots or len(seqs) + 2
        slots = torch.randperm(self.num_slots, generator=generator)[: len(seqs)]
        starts, page_starts, at, page_at = [], [], 0, 0
        positions, seq_of = [], []
        for i, ((cached, query, _), count) in enumerate(zip(seqs, counts, strict=True)):
            starts.append(at)
            page_starts.append(page_at)
            positions += [[p, p, p] for p in range(cached, cached + query)]
            seq_of += [i] * query
            at, page_at = at + query, page_at + count
        self.positions = torch.tensor(positions, dtype=torch.int32).reshape(num, 3)
        self.starts, self.page_starts, self.slots, self.pages = (
            starts,
            page_starts,
            slots.tolist(),
            order.tolist(),
        )
        self._kept = {
            "token_ids": torch.zeros(num, dtype=torch.int32),
            "positions": self.positions,
            "seq_of": torch.tensor(seq_of, dtype=torch.int32),
            "query_start": torch.tensor(starts, dtype=torch.int32),
            "query_len": torch.tensor([q for _, q, _ in seqs], dtype=torch.int32),
            "cached_len": torch.tensor([c for c, _, _ in seqs], dtype=torch.int32),
            "chunked_len": torch.tensor([k for _, _, k in seqs], dtype=torch.int32),
            "slot": slots.to(torch.int32),
            "page_start": torch.tensor(page_starts, dtype=torch.int32),
            "pages": order.to(torch.int32),
        }
        self._kept = {k: v.cuda() for k, v in self._kept.items()}
        longest_query = max((q for _, q, _ in seqs), default=0)
        longest = max((c + q for c, q, _ in seqs), default=0)
        pointers = {k: v.data_ptr() for k, v in self._kept.items()}
        self.struct = BatchStruct(num, len(seqs), longest_query, longest, **pointers)

    def set_token_ids(self, ids):
        self._kept["token_ids"].copy_(ids.to(torch.int32))

    def set_positions(self, positions):
        """int32 [num_tokens, 3]; where they are not the text's own."""
        self.positions = positions.cpu()
        self._kept["positions"].copy_(positions.to(torch.int32))


def structs(items):
    """An array of ctypes structures on the device, as bytes."""
    return torch.frombuffer(bytearray(b"".join(bytes(x) for x in items)), dtype=torch.uint8).cuda()


def randn(*shape, dtype=torch.bfloat16, seed=0, scale=1.0, mean=0.0):
    """Normal numbers; the same seed, the same numbers."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return (mean + scale * torch.randn(*shape, generator=generator, device="cuda")).to(dtype)


def poisoned(*shape, dtype=torch.bfloat16):
    """NaN, for outputs that must be written and memory that must not be read."""
    return torch.full(shape, float("nan"), dtype=dtype, device="cuda")


def error(found, want):
    """||found - want|| / ||want|| in f64; NaN where anything is not finite."""
    found, want = found.double().cpu(), want.double().cpu()
    return (
        float((found - want).norm() / want.norm().clamp(min=1e-30))
        if torch.isfinite(found).all()
        else float("nan")
    )


def same_bits(a, b):
    """Equal to the bit, NaN and the sign of zero included."""
    bits = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))
