"""The network that is trained: Transformers' own Qwen3.5 classes on packed rows, and the multi-token-prediction module.

Their modules hold the parameters and compute the mixers. What is ours: documents of a row do not see each other
(attention, convolution and delta rule get their bounds); the experts of a token are computed as one dense product with
the weights of the router in between, which is the same sum and faster at this size; the MTP module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import kernels
import torch
import torch.nn.functional as F
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe as reference
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

try:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule as fla_delta_rule
except ImportError:
    fla_delta_rule = None


@dataclass
class Row:
    """The row that is being computed."""

    positions: Tensor  # int32 [n], from 0 in every document
    cu_seqlens: Tensor  # int64 [num + 1]
    cu_seqlens_32: Tensor
    chunks: Tensor  # int64 [num_chunks, 2]: document, and chunk of 64 tokens in it
    bounds: list[int]
    longest: int


ROW: Row | None = None
_reference_conv = reference.causal_conv1d_fn
_reference_delta = getattr(
    reference.torch_chunk_gated_delta_rule, "__wrapped__", reference.torch_chunk_gated_delta_rule
)
_library_delta = reference.torch_chunk_gated_delta_rule


def set_row(row: Row | None) -> None:
    """Packed from now on; None: as Transformers has it."""
    global ROW
    ROW = row


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "silu", **rest: Any
) -> Tensor:
    """x [1, channels, n]; weight [channels, 4]. No token reads past the start of its document."""
    if ROW is None:
        return _reference_conv(x, weight, bias, activation=activation, **rest)
    rows, width = x[0].t(), weight.shape[1]
    padded = F.pad(rows, (0, 0, width - 1, 0))
    total = rows * weight[:, width - 1]
    for back in range(1, width):
        at = width - 1 - back
        inside = (ROW.positions >= back).unsqueeze(1)
        total = total + torch.where(inside, padded[at : at + len(rows)], 0) * weight[:, at]
    return F.silu(total).t().unsqueeze(0)


@torch.compiler.disable
def delta_rule(q: Tensor, k: Tensor, v: Tensor, *more: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """q, k, v [1, n, heads, dim]; g, beta [1, n, heads]."""
    if ROW is None:  # whoever calls it then, and however
        return _library_delta(q, k, v, *more, **options)
    g, beta = options["g"], options["beta"]
    if q.is_cuda and fla_delta_rule is not None:
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
        out = fla_delta_rule(
            q,
            k,
            v,
            g.float(),
            beta.to(q.dtype),
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=ROW.cu_seqlens,
            chunk_indices=ROW.chunks,
        )
        return out[0], None
    # Documents of as many chunks of 64 tokens go together, filled up with what changes nothing.
    out = torch.zeros_like(v, dtype=torch.float32)
    begins, ends = ROW.cu_seqlens[:-1], ROW.cu_seqlens[1:]
    counts = (ends - begins + 63) // 64
    for count in counts.unique().tolist():
        these = counts == count
        place = begins[these, None] + torch.arange(64 * count, device=q.device)
        inside = place < ends[these, None]
        place = place.clamp(max=q.shape[1] - 1)
        cut = [x[0][place] * inside.view(*inside.shape, *[1] * (x.ndim - 2)) for x in (q, k, v, g, beta)]
        done = _reference_delta(*cut[:3], g=cut[3], beta=cut[4], use_qk_l2norm_in_kernel=True)[0]
        out = out.index_put((torch.zeros_like(place[inside]), place[inside]), done[inside].float())
    return out.to(v.dtype), None


@torch.compiler.disable
def attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **rest: Any
) -> tuple[Tensor, None]:
    """q [1, heads, n, dim]; k, v [1, kv_heads, n, dim] to [1, n, heads, dim], causal inside each document."""
    assert ROW is not None
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if q.is_cuda:
        q, k, v = (x[0].transpose(0, 1).to(torch.bfloat16).contiguous() for x in (q, k, v))
        cu, longest = ROW.cu_seqlens_32, ROW.longest
        flash = torch.ops.aten._flash_attention_forward
        out = flash(q, k, v, cu, cu, longest, longest, 0.0, True, False, scale=scaling)[0]
        return out.unsqueeze(0), None
    parts = [
        F.scaled_dot_product_attention(
            q[:, :, a:b], k[:, :, a:b].to(q.dtype), v[:, :, a:b].to(q.dtype), is_causal=True, scale=scaling
        )
        for a, b in zip(ROW.bounds, ROW.bounds[1:], strict=False)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("packed", attention)
reference.causal_conv1d_fn = conv
reference.torch_chunk_gated_delta_rule = delta_rule


class Mtp(nn.Module):
    """Drafts the token after the next from the last hidden state and the next token (`mtp.*` of a checkpoint)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        norm = reference.Qwen3_5MoeRMSNorm
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.pre_fc_norm_embedding = norm(hidden, eps=eps)
        self.pre_fc_norm_hidden = norm(hidden, eps=eps)
        full = config.layer_types.index("full_attention")
        self.layers = nn.ModuleList([reference.Qwen3_5MoeDecoderLayer(config, full)])
        self.norm = norm(hidden, eps=eps)


def experts(mlp: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The sparse block on x [n, hidden], and the loss that balances its router: 1 where every expert gets its share."""
    num, top_k = mlp.gate.num_experts, mlp.gate.top_k
    with torch.autocast(x.device.type, enabled=False):
        probs = F.linear(x.float(), mlp.gate.weight.float()).softmax(-1)
        mine, other = probs.detach().unsqueeze(2), probs.detach().unsqueeze(1)
        place = torch.arange(num, device=x.device)
        before = (other > mine) | ((other == mine) & (place[None, :] < place[:, None]))
        chosen = (before.sum(-1) < top_k).float()
        weights = probs * chosen
        weights = weights / weights.sum(-1, keepdim=True)
        balance = num / top_k * (chosen.mean(0) * probs.mean(0)).sum()
    up, down = mlp.experts.gate_up_proj, mlp.experts.down_proj
    width, hidden = down.shape[2], down.shape[1]
    gate, up = F.linear(x, up.reshape(-1, hidden)).view(-1, num, 2 * width).chunk(2, dim=-1)
    inner = F.silu(gate) * up * weights.to(gate.dtype).unsqueeze(-1)
    routed = F.linear(inner.reshape(-1, num * width), down.transpose(0, 1).reshape(hidden, num * width))
    shared = torch.sigmoid(mlp.shared_expert_gate(x)) * mlp.shared_expert(x)
    return routed + shared, balance


def block(layer: nn.Module, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """A decoder layer on h [1, n, hidden]."""
    x = layer.input_layernorm(h)
    if layer.block_type == "linear_attention":
        h = h + layer.linear_attn(x)
    else:
        h = h + layer.self_attn(x, position_embeddings=(cos, sin), attention_mask=None)[0]
    y, balance = experts(layer.mlp, layer.post_attention_layernorm(h)[0])
    return h + y.unsqueeze(0), balance


def draft_input(mtp: nn.Module, embedded: Tensor, h: Tensor) -> Tensor:
    """[1, n, hidden] of the embeddings of the next tokens and of the final hidden states."""
    both = torch.cat([mtp.pre_fc_norm_embedding(embedded), mtp.pre_fc_norm_hidden(h)], dim=-1)
    return mtp.fc(both).float()


def token_loss(head: Tensor, h: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the cross-entropies of h [n, hidden]."""
    if not h.is_cuda:  # where shapes may differ, what has no weight is left out
        used = weights > 0
        h, targets, weights = h[used], targets[used], weights[used]
    logits = F.linear(h, head).float()
    return ((logits.logsumexp(-1) - logits.gather(1, targets.unsqueeze(1))[:, 0]) * weights).sum()


def ahead(x: Tensor, by: int) -> Tensor:
    """x[t + by] at t; zero past the end."""
    return F.pad(x[by:], (0, by))


class Net(nn.Module):
    """The language model and its MTP module."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.kernels = "none"
        if fla_delta_rule is not None and torch.cuda.is_available():
            self.kernels = kernels.install(compiled=False)
        self.lm = reference.Qwen3_5MoeForCausalLM(config)
        self.mtp = Mtp(config)
        self.mtp.apply(self.lm._init_weights)
        self.lm.config._attn_implementation = "packed"
        self.compiled = False
        std = config.initializer_range
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, reference.Qwen3_5MoeGatedDeltaNet):
                    # Memories from one to a thousand tokens long, as Mamba and its kin begin.
                    step = torch.exp(torch.empty_like(module.dt_bias).uniform_(math.log(1e-3), math.log(0.1)))
                    module.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
                    module.A_log.copy_(torch.empty_like(module.A_log).uniform_(1, 16).log())
                    nn.init.normal_(module.conv1d.weight, std=0.3)
                elif isinstance(module, reference.Qwen3_5MoeSparseMoeBlock):
                    nn.init.normal_(module.gate.weight, std=std)
            nn.init.normal_(self.lm.model.embed_tokens.weight, std=0.2)

    def compile(self) -> None:  # type: ignore[override]
        self.compiled = True
        torch._dynamo.config.cache_size_limit = 64
        if fla_delta_rule is not None:
            kernels.install(compiled=True)
        self._block = torch.compile(block, dynamic=False)
        self._loss = torch.compile(token_loss, dynamic=False)
        self._draft = torch.compile(draft_input, dynamic=False)

    def hidden(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Final hidden states of the model and of the MTP module, [n, hidden] both, and the balance losses."""
        use = self.compiled and torch.is_grad_enabled()
        layer_of, draft = (self._block, self._draft) if use else (block, draft_input)
        model = self.lm.model
        ids, balances = tokens.long().unsqueeze(0), []
        embedded = model.embed_tokens(ids)
        places = positions.view(1, 1, -1).expand(3, 1, -1)
        cos, sin = model.rotary_emb(embedded, places)
        h = embedded
        for layer in model.layers:
            h, balance = layer_of(layer, h, cos, sin)
            balances.append(balance)
        h = model.norm(h)
        m = draft(self.mtp, _next(embedded), h)
        m, balance = layer_of(self.mtp.layers[0], m, cos, sin)
        return h[0], self.mtp.norm(m)[0], [*balances, balance]

    def losses(self, tokens: Tensor, weights: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean losses of the next token, of the one after it, and of the routers' balance."""
        h, m, balances = self.hidden(tokens, positions)
        loss = self._loss if self.compiled and torch.is_grad_enabled() else token_loss
        head, targets = self.lm.lm_head.weight, tokens.long()
        # A weight is zero at the first token of a document; the draft is of the second after, inside the document.
        next_weights = ahead(weights, 1)
        later_weights = ahead(weights * (positions >= 2), 2)
        one = loss(head, h, ahead(targets, 1), next_weights) / next_weights.sum()
        two = loss(head, m, ahead(targets, 2), later_weights) / later_weights.sum()
        return one, two, torch.stack(balances).mean()


def _next(x: Tensor) -> Tensor:
    """x [1, n, hidden] one token ahead; the last stays."""
    return torch.cat([x[:, 1:], x[:, -1:]], dim=1)
