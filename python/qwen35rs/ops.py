"""The ops of the net on arrays, for research and tests: the backends' own code.

On the CPU, arguments may be numpy arrays, anything with the DLPack protocol (torch tensors, ...), or nested
lists. A C-contiguous float32 array is read in place; anything else is copied to one first. Results are new
numpy float32 arrays (``torch.from_dlpack`` takes them without a copy). Arithmetic is float32.

On a CUDA device, arguments are tensors of one device with the DLPack protocol (torch, ...), contiguous and
aligned to 16 bytes, and are read where they are. Activations and large weights are bfloat16, each function
says what else may be float32; so are results. The op runs on torch's current stream where torch is imported,
else on the default stream, and returns at once. Results are new torch tensors for torch tensors, else
DeviceTensor (any ``from_dlpack`` takes it without a copy). Their memory is given back in the order of that
stream; to use one on another stream, make that stream wait, and keep the tensor until it has run. These ops
cannot be captured in a graph.

Every function raises RequestError for what it cannot take, naming the argument, what was found and what is
allowed; CudaError where the device fails.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _core
from ._core import DeviceTensor, RequestError
from .arguments import flag, refuse, whole

__all__ = [
    "DeviceTensor",
    "attention",
    "causal_conv1d",
    "gated_delta_rule",
    "moe",
    "rms_norm",
    "rope",
    "route",
]

Array = npt.NDArray[np.float32]
_MOST_FLOAT32 = float(np.finfo(np.float32).max)


def rms_norm(x: Any, weight: Any, eps: float = 1e-6, residual: Any = None) -> Any:
    """RMSNorm with a zero-centred weight: ``x / sqrt(mean(x²) + eps) * (1 + weight)``.

    Args:
        x: ``[..., width]``; weight: ``[width]``.
        residual: added to x first, ``[..., width]``.

    Returns:
        ``y`` like x; with a residual, ``(y, x + residual)``.

    On CUDA, weight and residual may be float32 or bfloat16, and x too where there is no residual; y is bfloat16,
    the sum float32.

    Source: Transformers ``Qwen3_5RMSNorm``.
    """
    if not _number("eps", eps) >= 0:
        raise RequestError(f"eps: found {eps}; allowed: 0 or more")
    if cuda := _cuda({"x": x, "weight": weight, "residual": residual}):
        y, total = cuda.rms_norm(x, weight, eps, residual)
        return _like(x, y) if total is None else (_like(x, y), _like(x, total))
    x = _array("x", x)
    if residual is None:
        return _core.ops_rms_norm(x, _array("weight", weight), eps)
    residual = _array("residual", residual)
    if residual.shape != x.shape:
        raise RequestError(
            f"residual: found shape {list(residual.shape)}; allowed: x's shape {list(x.shape)}"
        )
    total = x + residual
    return _core.ops_rms_norm(total, _array("weight", weight), eps), total


def rope(
    x: Any,
    positions: Any,
    rotary_dim: int | None = None,
    theta: float = 1e7,
    mrope_section: Sequence[int] | None = None,
    yarn: Mapping[str, Any] | None = None,
) -> Any:
    """Partial rotary embedding with interleaved mRoPE; element i rotates with element ``i + rotary_dim / 2``.

    Args:
        x: ``[num_tokens, num_heads, head_dim]``.
        positions: ``[num_tokens]``, or ``[3, num_tokens]`` for the T, H and W axes.
        rotary_dim: leading dimensions that rotate; a quarter of head_dim by default.
        theta: base of the frequencies.
        mrope_section: frequencies of each axis, ``rotary_dim / 2`` together; ``(11, 11, 10)`` where that
            fits, else all T.
        yarn: ``factor`` and ``original_max_position_embeddings``; optionally ``beta_fast`` (32),
            ``beta_slow`` (1), ``attention_factor`` (``0.1 ln(factor) + 1``), ``truncate`` (True).

    Returns:
        ``[num_tokens, num_heads, head_dim]``.

    On CUDA, positions may be on the CPU, or int32 or int64 on the device, where negative ones are not noticed.

    Source: Transformers ``Qwen3_5TextRotaryEmbedding``; YaRN by Peng et al. (2023, arXiv:2309.00071).
    """
    cuda = _cuda({"x": x})
    if cuda is None:
        x = _array("x", x)
    if rotary_dim is None:
        rotary_dim = x.shape[-1] // 4 if len(x.shape) else 0
    half = _whole("rotary_dim", rotary_dim) // 2
    if mrope_section is None:
        mrope_section = (11, 11, 10) if half == 32 else (half, 0, 0)
    sections = [_whole("mrope_section", section) for section in _listed("mrope_section", mrope_section)]
    # The last of H sits at frequency 3h - 2, the last of W at 3w - 1.
    if len(sections) != 3 or 3 * sections[1] >= half + 2 or 3 * sections[2] >= half + 1:
        allowed = (
            f"three numbers that sum to rotary_dim / 2 = {half} and can be interleaved as T H W T H W ..."
        )
        raise refuse("mrope_section", sections, allowed)
    base = _number("theta", theta)
    if not 1.0 < base <= _MOST_FLOAT32:
        raise refuse("theta", theta, "a number above 1 that float32 holds")
    full = None if yarn is None else _yarn(yarn)
    rotation = (rotary_dim, base, sections, full)
    if _cuda_device(positions) is not None:
        cuda = _cuda({"x": x, "positions": positions})
        assert cuda is not None
        return _like(x, cuda.rope(x, None, positions, rotation))
    try:
        where = np.asarray(positions)
    except ValueError:  # rows of several lengths
        raise refuse("positions", positions, "[num_tokens] or [3, num_tokens] of integers from 0") from None
    if where.ndim == 1:
        where = np.stack([where] * 3)
    if (
        where.ndim != 2
        or where.shape[0] != 3
        or where.dtype.kind not in "iu"
        or (where.size and not 0 <= where.min() <= where.max() < 2**32)
    ):
        raise RequestError(
            f"positions: found shape {list(np.shape(positions))} of {where.dtype}; "
            "allowed: [num_tokens] or [3, num_tokens] of integers from 0, below 2^32"
        )
    on_host = where.T.tolist()
    if cuda:
        return _like(x, cuda.rope(x, on_host, None, rotation))
    return _core.ops_rope(x, on_host, rotation)


def route(logits: Any, top_k: int) -> Any:
    """Routing: softmax over all experts, the ``top_k`` largest, renormalised to sum to one.

    Args:
        logits: ``[num_tokens, num_experts]``. Ties go to the lower index, NaN ranks last, infinities share
            the weight.

    Returns:
        ``(weights, experts)``, float32 and int32 ``[num_tokens, top_k]``, best first.

    On CUDA, logits are float32 or bfloat16.

    Source: Transformers ``Qwen3_5MoeTopKRouter``.
    """
    top_k = _whole("top_k", top_k)
    if cuda := _cuda({"logits": logits}):
        weights, experts = cuda.route(logits, top_k)
        return _like(logits, weights), _like(logits, experts)
    return _core.ops_route(_array("logits", logits), top_k)


def causal_conv1d(x: Any, weight: Any, state: Any = None) -> Any:
    """Causal depthwise convolution, then SiLU.

    Args:
        x: ``[num_tokens, channels]``; weight: ``[channels, kernel]`` or ``[channels, 1, kernel]``.
        state: the inputs before the first token, ``[kernel - 1, channels]``; zeros by default.

    Returns:
        ``(y, state)``: ``[num_tokens, channels]``, and the last inputs ``[kernel - 1, channels]``.

    On CUDA, weight is float32 or bfloat16; y and both states are bfloat16.
    """
    if cuda := _cuda({"x": x, "weight": weight, "state": state}):
        y, after = cuda.causal_conv1d(x, weight, state)
        return _like(x, y), _like(x, after)
    weight = _array("weight", weight)
    if weight.ndim == 3 and weight.shape[1] == 1:
        weight = weight[:, 0]
    return _core.ops_causal_conv1d(_array("x", x), weight, None if state is None else _array("state", state))


def gated_delta_rule(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    state: Any = None,
    *,
    mode: str = "chunked",
    qk_l2norm: bool = True,
    scale: float | None = None,
) -> Any:
    """The gated delta rule over one sequence, continuing from a state.

    Per token and value head: ``S = exp(g) S; d = beta (v - kᵀ S); S = S + k dᵀ; o = qᵀ S``. Value head h reads
    key head ``h // (num_v_heads / num_k_heads)``.

    Args:
        q, k: ``[num_tokens, num_k_heads, k_dim]``; v: ``[num_tokens, num_v_heads, v_dim]``.
        g: log decay, ``<= 0``; beta: write strength; both ``[num_tokens, num_v_heads]``.
        state: ``[num_v_heads, k_dim, v_dim]``; zeros by default.
        mode: ``"chunked"`` (64 tokens at a time, as prefill runs) or ``"recurrent"`` (as decode runs).
        qk_l2norm: l2-normalise q and k first.
        scale: multiplied into q; ``k_dim ** -0.5`` by default.

    Returns:
        ``(o, state)``: ``[num_tokens, num_v_heads, v_dim]``, and the state after the last token.

    On CUDA, q, k, v and o are bfloat16, g and beta float32 or bfloat16, both states float32. The kernel makes
    ``beta = sigmoid(b)`` and ``g = -softplus(a)`` of bfloat16 b and a, as the net does: the op waits for g and
    beta, finds b and a on the host, and so rounds beta and ``exp(g)``, by less than 1e-3. qk_l2norm and scale
    must be as by default, beta from 0 to 1.

    Source: Yang et al. (2024, arXiv:2412.06464); Transformers ``torch_chunk_gated_delta_rule``.
    """
    if mode not in ("chunked", "recurrent"):
        raise RequestError(f"mode: found {mode!r}; allowed: 'chunked', 'recurrent'")
    flag("qk_l2norm", qk_l2norm)
    scale = None if scale is None else _number("scale", scale)
    if cuda := _cuda({"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state}):
        o, after = cuda.gated_delta_rule(q, k, v, g, beta, state, mode == "chunked", qk_l2norm, scale)
        return _like(q, o), _like(q, after)
    return _core.ops_gated_delta_rule(
        _array("q", q),
        _array("k", k),
        _array("v", v),
        _array("g", g),
        _array("beta", beta),
        None if state is None else _array("state", state),
        mode == "chunked",
        qk_l2norm,
        scale,
    )


def attention(q: Any, k: Any, v: Any, scale: float | None = None) -> Any:
    """Causal softmax attention with grouped heads: query t sees the keys up to ``num_keys - num_tokens + t``.

    Args:
        q: ``[num_tokens, num_q_heads, head_dim]``; k, v: ``[num_keys, num_kv_heads, head_dim]``.
        scale: of the scores; ``head_dim ** -0.5`` by default.

    Returns:
        ``[num_tokens, num_q_heads, head_dim]``.

    On CUDA, scale must be as by default, and head_dim at most 1024. Keys and values are copied to pages first.
    """
    scale = None if scale is None else _number("scale", scale)
    if cuda := _cuda({"q": q, "k": k, "v": v}):
        return _like(q, cuda.attention(q, k, v, scale))
    return _core.ops_attention(_array("q", q), _array("k", k), _array("v", v), scale)


def moe(x: Any, gate: Any, gate_up: Any, down: Any, top_k: int, shared: Sequence[Any] | None = None) -> Any:
    """The sparse block: routed SwiGLU experts, weighted and summed, plus the gated shared expert.

    Args:
        x: ``[num_tokens, hidden]``; gate: the router, ``[num_experts, hidden]``.
        gate_up: ``[num_experts, 2 * width, hidden]``, gate rows first; down: ``[num_experts, hidden, width]``.
        shared: ``(gate_proj [S, hidden], up_proj [S, hidden], down_proj [hidden, S], gate [1, hidden])``.

    Returns:
        ``[num_tokens, hidden]``.

    On CUDA everything is bfloat16, with at most 8192 experts. The shared expert's gate_proj and up_proj are
    copied to one matrix.

    Source: Transformers ``Qwen3_5MoeSparseMoeBlock``.
    """
    top_k = _whole("top_k", top_k)
    named: dict[str, Any] = {}
    if shared is not None:
        shared = _listed("shared", shared)
        if len(shared) != 4:
            raise RequestError(
                f"shared: found {len(shared)} arrays; allowed: gate_proj, up_proj, down_proj, gate"
            )
        names = ("gate_proj", "up_proj", "down_proj", "gate")
        named = {f"shared {name}": part for name, part in zip(names, shared)}
    if cuda := _cuda({"x": x, "gate": gate, "gate_up": gate_up, "down": down, **named}):
        return _like(x, cuda.moe(x, gate, gate_up, down, top_k, list(named.values()) or None))
    parts = None
    if named:
        parts = [_array(name, part) for name, part in named.items()]
        if parts[3].ndim == 1:
            parts[3] = parts[3][None]
    return _core.ops_moe(
        _array("x", x), _array("gate", gate), _array("gate_up", gate_up), _array("down", down), top_k, parts
    )


def _yarn(yarn: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of YaRN, within the limits of a checkpoint's configuration."""
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None, "truncate": True}
    needed = ["factor", "original_max_position_embeddings", *defaults]
    if not isinstance(yarn, Mapping):
        raise refuse("yarn", yarn, f"a mapping with {', '.join(needed)}")
    full = {**defaults, **yarn}
    if set(full) != set(needed):
        raise RequestError(f"yarn: found keys {sorted(map(str, full))}; allowed: {sorted(needed)}")
    flag("yarn: truncate", full["truncate"])
    limits = {"factor": (1.0, 65536.0), "beta_fast": (0.0, 1e9), "beta_slow": (0.0, 1e9)}
    for key, (least, most) in limits.items():
        found = _number(f"yarn: {key}", full[key])
        if not least <= found <= most or not found:
            above = "from 1" if least else "above 0"
            raise refuse(f"yarn: {key}", full[key], f"a number {above}, at most {most:g}")
        full[key] = found
    if full["beta_fast"] < full["beta_slow"]:
        raise refuse(
            "yarn: beta_fast", full["beta_fast"], f"a number not below beta_slow, {full['beta_slow']}"
        )
    if full["attention_factor"] is None:
        full["attention_factor"] = 0.1 * float(np.log(full["factor"])) + 1.0
    scale = full["attention_factor"] = _number("yarn: attention_factor", full["attention_factor"])
    if not 0.0 < scale <= 65536.0:
        raise refuse("yarn: attention_factor", scale, "a number above 0, at most 65536")
    key = "original_max_position_embeddings"
    full[key] = _whole(f"yarn: {key}", full[key])
    if full[key] == 0:
        raise refuse(f"yarn: {key}", 0, "1 to 2^31 - 1")
    return full


def _whole(name: str, value: Any) -> int:
    return whole(name, value, "whole numbers from 0, below 2^31", most=2**31 - 1)


def _listed(name: str, value: Any) -> list[Any]:
    try:
        return list(value)
    except TypeError:
        raise refuse(name, value, "a sequence") from None


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise refuse(name, value, "a number") from None


def _cuda_device(value: Any) -> int | None:
    """The CUDA device that an argument is on, by DLPack's numbers; None for any other place."""
    if not hasattr(value, "__dlpack_device__"):
        return None
    try:
        kind, index = value.__dlpack_device__()
    except (BufferError, RuntimeError, TypeError, ValueError):
        return None  # whoever reads it says what is wrong
    return int(index) if kind == 2 else None


def _cuda(arguments: Mapping[str, Any]) -> _core.CudaOps | None:
    """The ops of the CUDA device that the arguments are on, on the caller's stream; None where none is on one."""
    found = {name: _cuda_device(value) for name, value in arguments.items() if value is not None}
    first = next((name for name, device in found.items() if device is not None), None)
    if first is None:
        return None
    device = found[first]
    assert device is not None
    for name, other in found.items():
        if other != device:
            place = "an array that is on no CUDA device" if other is None else f"a tensor on cuda:{other}"
            raise RequestError(f"{name}: found {place}; allowed: one on cuda:{device}, where {first} is")
    # Only what has been imported is asked: nobody has a stream of torch's before torch has started its CUDA.
    torch = sys.modules.get("torch")
    stream = 0
    if torch is not None and torch.cuda.is_initialized():
        stream = torch.cuda.current_stream(device).cuda_stream
    return _core.CudaOps(device, stream)


def _like(argument: Any, result: DeviceTensor) -> Any:
    """A result as the argument's library has it."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(argument, torch.Tensor):
        return torch.from_dlpack(result)
    return result


def _array(name: str, value: Any) -> Array:
    """A C-contiguous float32 array of the value; the value's own memory where it already is one."""
    if not isinstance(value, np.ndarray) and hasattr(value, "__dlpack__"):
        try:
            value = np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise RequestError(
                f"{name}: found {type(value).__name__} ({error}); allowed: a tensor on the CPU of a type that "
                "numpy has (float32 is read without a copy)"
            ) from None
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise RequestError(f"{name}: found {type(value).__name__} ({error}); allowed: an array") from None
    if array.dtype.kind not in "fiu":
        raise RequestError(
            f"{name}: found dtype {array.dtype}; allowed: floating point (computed in float32)"
        )
    return np.ascontiguousarray(array, dtype=np.float32)
