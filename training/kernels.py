"""flash-linear-attention's kernels of the gated delta rule, as this training uses them.

On Hopper with Triton 3.4 to 3.7.0 the library refuses its own kernel for one step of the backward pass, because that
compiler gets it wrong (fla-org/flash-linear-attention issue 640): a step in plain PyTorch takes its place there, and
nowhere else. And the launch of every kernel is chosen by rule: timing all that the library proposes takes 100 s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _step(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, h: Tensor, dh: Tensor, g: Tensor, dv: Tensor, scale: float,
    place: Tensor, inside: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k [n, heads, k_dim]; v, do, dv [n, heads, v_dim]; g [n, heads]; h, dh [chunks, heads, k_dim, v_dim];
    place, inside [chunks, length]: the token of each place of a chunk, and whether there is one."""
    num, there = len(q), inside[:, None, :, None]

    def cut(x: Tensor) -> Tensor:
        return torch.where(there, x[place].transpose(1, 2), 0)  # [chunks, heads, length, dim]

    q, k, v, do, dv = cut(q), cut(k), cut(v), cut(do), cut(dv)
    g = torch.where(inside[:, None, :], g[place].transpose(1, 2), 0)
    length = inside.shape[1]
    last = (inside.sum(1) - 1)[:, None, None]
    g_last = g.gather(2, last.expand(-1, g.shape[1], 1))
    # Only between places that hold tokens: g is zero elsewhere, and the decay from there on has no bound.
    before = torch.tril(torch.ones(length, length, dtype=torch.bool, device=g.device)) & there
    ht = h.to(do.dtype).mT
    dw = -(dv @ ht)
    dq = (do @ ht).float() * (torch.exp2(g) * scale).unsqueeze(-1)
    dk = (v @ dh.to(v.dtype).mT).float() * torch.where(
        inside[:, None, :], torch.exp2(g_last - g), 0
    ).unsqueeze(-1)
    of_last = (h.float() * dh.float()).sum((-2, -1)) * torch.exp2(g_last[..., 0]) + (dk * k).sum((-2, -1))
    decay = torch.where(before, torch.exp2(torch.where(before, g.unsqueeze(-1) - g.unsqueeze(-2), 0)), 0)
    ds = ((do @ v.mT).float() * decay * scale).to(k.dtype)
    dq = dq + (ds @ k).float()
    dk = dk + (ds.mT @ q).float()
    dg = (dq * q).sum(-1) - (dk * k).sum(-1)
    at = torch.arange(length, device=g.device)[None, None, :]
    dg = dg + torch.where(at == last, of_last.unsqueeze(-1), 0)
    where = torch.where(inside, place, num).reshape(-1)  # what is not there goes past the end

    def join(x: Tensor, dtype: torch.dtype) -> Tensor:
        rows = x.transpose(1, 2).flatten(0, 1).to(dtype)
        out = rows.new_zeros(num + 1, *rows.shape[1:])
        return out.index_put((where,), rows)[:num].unsqueeze(0)

    return join(dq, q.dtype), join(dk, q.dtype), join(dw, q.dtype), join(dg, torch.float32)


_compiled: Any = None


def chunk_bwd_dqkwg(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, h: Tensor, dh: Tensor, w: Tensor, g: Tensor, dv: Tensor,
    scale: float, cu_seqlens: Tensor, chunk_indices: Tensor, chunk_size: int = 64, **rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As the library's function of that name, for one packed row with as many key heads as value heads."""
    assert q.shape[0] == 1 and q.shape[2] == v.shape[2] and not rest.get("state_v_first")
    bounds = cu_seqlens.to(q.device)
    document, chunk = chunk_indices.to(q.device).long().unbind(1)
    place = (bounds[document] + chunk * chunk_size)[:, None] + torch.arange(chunk_size, device=q.device)
    inside = place < bounds[document + 1][:, None]
    place = place.clamp(max=q.shape[1] - 1)
    step = _compiled if _compiled is not None else _step
    return step(*(x[0] for x in (q, k, v, do, h, dh, g, dv)), scale, place, inside)  # type: ignore[no-any-return]


_timed: Any = None


def choose_launches() -> None:
    """Of the launches that a kernel may be tuned over, the one nearest to four warps and three stages."""
    from triton.runtime.autotuner import Autotuner

    global _timed
    if _timed is None:
        _timed = Autotuner._bench

    def rank(self: Any, *args: Any, config: Any, **rest: Any) -> list[float]:
        blocks = sum(v for v in config.kwargs.values() if isinstance(v, int))
        return [100.0 * abs(config.num_warps - 4) + 10.0 * abs(config.num_stages - 3) - 0.01 * blocks] * 3

    Autotuner._bench = rank


def time_launches() -> None:
    """Takes that back: from now on the library times what it proposes."""
    import gc

    from triton.runtime.autotuner import Autotuner

    Autotuner._bench = _timed
    for found in gc.get_objects():
        if isinstance(found, Autotuner):
            found.cache.clear()


def install(compiled: bool) -> str:
    """What was done."""
    global _compiled
    import fla.ops.gated_delta_rule.chunk as library
    from fla.utils import IS_NVIDIA_HOPPER, TRITON_ABOVE_3_4_0, TRITON_ABOVE_3_7_1

    if _timed is None:
        choose_launches()
    if not IS_NVIDIA_HOPPER or not TRITON_ABOVE_3_4_0 or TRITON_ABOVE_3_7_1:
        return "flash-linear-attention"
    library.chunk_bwd_dqkwg = chunk_bwd_dqkwg
    _compiled = torch.compile(_step, dynamic=True) if compiled else None
    return "flash-linear-attention, one backward step in PyTorch"
