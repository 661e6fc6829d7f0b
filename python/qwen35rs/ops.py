"""The ops of the net on numpy arrays, for research and tests: the CPU backend's own code.

Arguments may be numpy arrays, anything with the DLPack protocol on the CPU (torch tensors, ...), or nested
lists. A C-contiguous float32 array is read in place; anything else is copied to one first. Results are new
numpy float32 arrays (``torch.from_dlpack`` takes them without a copy). Arithmetic is float32.

Every function raises RequestError, naming the argument, its shape and the shape that is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _core
from ._core import RequestError

__all__ = ["attention", "causal_conv1d", "gated_delta_rule", "moe", "rms_norm", "rope", "route"]

Array = npt.NDArray[np.float32]


def rms_norm(x: Any, weight: Any, eps: float = 1e-6, residual: Any = None) -> Any:
    """RMSNorm with a zero-centred weight: ``x / sqrt(mean(x²) + eps) * (1 + weight)``.

    Args:
        x: ``[..., width]``; weight: ``[width]``.
        residual: added to x first, ``[..., width]``.

    Returns:
        ``y`` like x; with a residual, ``(y, x + residual)``.

    Source: Transformers ``Qwen3_5RMSNorm``.
    """
    x = _array("x", x)
    if not eps >= 0:
        raise RequestError(f"eps: found {eps}; allowed: 0 or more")
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
) -> Array:
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

    Source: Transformers ``Qwen3_5TextRotaryEmbedding``; YaRN by Peng et al. (2023, arXiv:2309.00071).
    """
    x = _array("x", x)
    if rotary_dim is None:
        rotary_dim = x.shape[-1] // 4 if x.ndim else 0
    half = rotary_dim // 2
    if mrope_section is None:
        mrope_section = (11, 11, 10) if half == 32 else (half, 0, 0)
    where = np.asarray(positions)
    if where.ndim == 1:
        where = np.stack([where] * 3)
    if (
        where.ndim != 2
        or where.shape[0] != 3
        or where.dtype.kind not in "iu"
        or (where.size and where.min() < 0)
    ):
        raise RequestError(
            f"positions: found shape {list(np.shape(positions))} of {where.dtype}; "
            "allowed: [num_tokens] or [3, num_tokens] of integers from 0"
        )
    full = None
    if yarn is not None:
        defaults = {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "attention_factor": 0.1 * float(np.log(max(yarn.get("factor", 1.0), 1.0))) + 1.0,
            "truncate": True,
        }
        full = {**defaults, **yarn}
        needed = {"factor", "original_max_position_embeddings", *defaults}
        if set(full) != needed:
            raise RequestError(f"yarn: found keys {sorted(full)}; allowed: {sorted(needed)}")
    return _core.ops_rope(x, where.T.tolist(), rotary_dim, theta, list(mrope_section), full)


def route(logits: Any, top_k: int) -> tuple[Array, npt.NDArray[np.int32]]:
    """Routing: softmax over all experts, the ``top_k`` largest, renormalised to sum to one.

    Args:
        logits: ``[num_tokens, num_experts]``. Ties go to the lower index, NaN ranks last, infinities share
            the weight.

    Returns:
        ``(weights, experts)``, float32 and int32 ``[num_tokens, top_k]``, best first.

    Source: Transformers ``Qwen3_5MoeTopKRouter``.
    """
    return _core.ops_route(_array("logits", logits), top_k)


def causal_conv1d(x: Any, weight: Any, state: Any = None) -> tuple[Array, Array]:
    """Causal depthwise convolution, then SiLU.

    Args:
        x: ``[num_tokens, channels]``; weight: ``[channels, kernel]`` or ``[channels, 1, kernel]``.
        state: the inputs before the first token, ``[kernel - 1, channels]``; zeros by default.

    Returns:
        ``(y, state)``: ``[num_tokens, channels]``, and the last inputs ``[kernel - 1, channels]``.
    """
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
) -> tuple[Array, Array]:
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

    Source: Yang et al. (2024, arXiv:2412.06464); Transformers ``torch_chunk_gated_delta_rule``.
    """
    if mode not in ("chunked", "recurrent"):
        raise RequestError(f"mode: found {mode!r}; allowed: 'chunked', 'recurrent'")
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


def attention(q: Any, k: Any, v: Any, scale: float | None = None) -> Array:
    """Causal softmax attention with grouped heads: query t sees the keys up to ``num_keys - num_tokens + t``.

    Args:
        q: ``[num_tokens, num_q_heads, head_dim]``; k, v: ``[num_keys, num_kv_heads, head_dim]``.
        scale: of the scores; ``head_dim ** -0.5`` by default.

    Returns:
        ``[num_tokens, num_q_heads, head_dim]``.
    """
    return _core.ops_attention(_array("q", q), _array("k", k), _array("v", v), scale)


def moe(x: Any, gate: Any, gate_up: Any, down: Any, top_k: int, shared: Sequence[Any] | None = None) -> Array:
    """The sparse block: routed SwiGLU experts, weighted and summed, plus the gated shared expert.

    Args:
        x: ``[num_tokens, hidden]``; gate: the router, ``[num_experts, hidden]``.
        gate_up: ``[num_experts, 2 * width, hidden]``, gate rows first; down: ``[num_experts, hidden, width]``.
        shared: ``(gate_proj [S, hidden], up_proj [S, hidden], down_proj [hidden, S], gate [1, hidden])``.

    Returns:
        ``[num_tokens, hidden]``.

    Source: Transformers ``Qwen3_5MoeSparseMoeBlock``.
    """
    parts = None
    if shared is not None:
        if len(shared) != 4:
            raise RequestError(
                f"shared: found {len(shared)} arrays; allowed: gate_proj, up_proj, down_proj, gate"
            )
        names = ("gate_proj", "up_proj", "down_proj", "gate")
        parts = [_array(f"shared {name}", s) for name, s in zip(names, shared)]
        if parts[3].ndim == 1:
            parts[3] = parts[3][None]
    return _core.ops_moe(
        _array("x", x), _array("gate", gate), _array("gate_up", gate_up), _array("down", down), top_k, parts
    )


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
