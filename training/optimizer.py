"""Muon for the matrices of the layers, AdamW for the rest.

Muon (K. Jordan, 2024) orthogonalizes the momentum of a matrix by a Newton-Schulz iteration; the step is scaled to the
size of AdamW's (J. Liu et al., 2025), so that both share one learning rate.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(x: Tensor, steps: int = 5) -> Tensor:
    """Nearly the nearest orthogonal matrices to x [..., rows, columns]."""
    a, b, c = _COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = x.bfloat16().mT if tall else x.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Muon:
    """Matrices of one shape are stepped together; experts are matrices of their own."""

    def __init__(self, params: list[nn.Parameter], momentum: float = 0.95, decay: float = 0.05) -> None:
        self.momentum, self.decay = momentum, decay
        groups = defaultdict(list)
        for p in params:
            groups[p.shape].append(p)
        self.groups = list(groups.values())
        self.buffers = [[torch.zeros_like(p) for p in group] for group in self.groups]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group, buffers in zip(self.groups, self.buffers, strict=True):
            grads = [p.grad for p in group]
            torch._foreach_lerp_(buffers, grads, 1 - self.momentum)
            ahead = torch._foreach_lerp(grads, buffers, self.momentum)
            updates = orthogonalize(torch.stack(ahead)).float()
            scale = 0.2 * max(group[0].shape[-2:]) ** 0.5
            torch._foreach_mul_(group, 1 - lr * self.decay)
            torch._foreach_add_(group, list((updates * scale).unbind()), alpha=-lr)


class Optimizer:
    """Both, over the parameters of a model."""

    def __init__(self, net: nn.Module, muon: bool, decay: float) -> None:
        matrices, embeddings, rest = [], [], []
        for name, p in net.named_parameters():
            small = name.endswith(
                ("mlp.gate.weight", "shared_expert_gate.weight", "in_proj_a.weight", "in_proj_b.weight")
            )
            if "embed_tokens" in name or "lm_head" in name:
                embeddings.append(p)
            elif p.ndim >= 2 and "conv1d" not in name and not small:
                matrices.append(p)
            else:
                rest.append(p)
        self.params = [*matrices, *embeddings, *rest]
        self.muon = Muon(matrices, decay=decay) if muon else None
        groups = [{"params": embeddings, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.0}]
        if not muon:
            groups.append({"params": matrices, "weight_decay": decay})
        self.adam = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-8, fused=matrices[0].is_cuda)

    def step(self, lr: float, clip: float = 1.0) -> Tensor:
        grads = [p.grad for p in self.params]
        norm = nn.utils.get_total_norm(grads, foreach=True)
        # A step whose gradient is not finite moves nothing.
        scale = torch.where(norm.isfinite(), (clip / (norm + 1e-6)).clamp(max=1.0), 0.0)
        for grad in grads:
            grad.nan_to_num_(0.0, 0.0, 0.0)
        torch._foreach_mul_(grads, scale)
        if self.muon is not None:
            self.muon.step(lr)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        for p in self.params:
            p.grad = None
        return norm

    def state(self) -> dict[str, object]:
        return {"adam": self.adam.state_dict(), "muon": self.muon.buffers if self.muon else None}

    def load(self, state: dict[str, object]) -> None:
        self.adam.load_state_dict(state["adam"])  # type: ignore[arg-type]
        if self.muon is not None:
            for mine, theirs in zip(self.muon.buffers, state["muon"], strict=True):  # type: ignore[arg-type]
                for a, b in zip(mine, theirs, strict=True):
                    a.copy_(b)
