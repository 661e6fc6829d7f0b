"""Inputs and outputs of Transformers' single functions, for `data/ops.npz`; called by `make_goldens.py`."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent))
from geometries import FULL, dims, rope


def text_config(**fields):
    defaults = dims(64, 1, 16, (4, 2), 256, (2, 4, 8, 8), (8, 2, 16, 16), layer_types=[FULL])
    config = transformers.Qwen3_5MoeTextConfig(**(defaults | fields))
    config._attn_implementation = config._experts_implementation = "eager"
    return config


OPS_ROPE = {
    "family": {"head_dim": 256, "rope_parameters": rope([11, 11, 10], theta=1e7)},
    "odd": {"head_dim": 40, "rope_parameters": rope([4, 3, 3], theta=1e4, factor=0.5)},
    "uneven": {"head_dim": 24, "rope_parameters": rope([9, 2, 1], theta=1e5, factor=1.0)},
    "yarn": {
        "head_dim": 256,
        "rope_parameters": rope([11, 11, 10], 1e7, rope_type="yarn", original_max_position_embeddings=262144)
        | {"factor": 4.0},
    },
    "yarn_short": {
        "head_dim": 32,
        "rope_parameters": rope([3, 3, 2], 2e4, 0.5, rope_type="yarn", original_max_position_embeddings=100)
        | {"factor": 2.5, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.2, "truncate": False},
    },
}


@torch.inference_mode()
def make_ops(seed=2035):
    """Inputs and outputs of Transformers' functions, under `op/case/array`; settings under `op/case/json`."""
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as m

    generator = torch.Generator().manual_seed(seed)
    saved = {}

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    def keep(case, settings=None, **arrays):
        saved.update(
            {f"{case}/{name}": np.asarray(value) for name, value in arrays.items() if value is not None}
        )
        if settings is not None:
            saved[f"{case}/json"] = np.frombuffer(json.dumps(settings).encode(), np.uint8)

    for case, width, eps in (("even", 64, 1e-6), ("odd", 41, 1e-5)):
        norm, gated = m.Qwen3_5MoeRMSNorm(width, eps), m.Qwen3_5MoeRMSNormGated(width, eps)
        norm.weight.copy_(normal(width, scale=0.4))
        gated.weight.copy_(1 + normal(width, scale=0.4))
        x, gate = normal(7, width, scale=3), normal(7, width, scale=2)
        x[3] *= 1e-4  # where epsilon matters
        keep(f"rms_norm/{case}", {"eps": eps}, x=x, weight=norm.weight, y=norm(x))
        keep(f"gated_rms_norm/{case}", {"eps": eps}, x=x, gate=gate, weight=gated.weight, y=gated(x, gate))

    for case, fields in OPS_ROPE.items():
        config = text_config(**fields)
        rotary = m.Qwen3_5MoeTextRotaryEmbedding(config)
        q, k = normal(1, 2, 6, config.head_dim), normal(1, 1, 6, config.head_dim)
        positions = torch.randint(0, 3000, (3, 6), generator=generator)
        positions[:, 0] = 0
        cos, sin = rotary(q, positions[:, None])
        q_out, k_out = m.apply_rotary_pos_emb(q, k, cos, sin)
        x, y = (torch.cat(pair, 1)[0].transpose(0, 1) for pair in ((q, k), (q_out, k_out)))
        keep(
            f"rope/{case}",
            config.rope_parameters | {"head_dim": config.head_dim},
            x=x,
            positions=positions,
            y=y,
        )

    for case, tokens, experts, top_k in (("top1", 6, 5, 1), ("family", 8, 256, 8), ("all", 4, 7, 7)):
        router = m.Qwen3_5MoeTopKRouter(
            text_config(num_experts=experts, num_experts_per_tok=top_k, hidden_size=experts)
        )
        router.weight.copy_(torch.eye(experts))
        logits, weights, chosen = router(normal(tokens, experts, scale=2))
        keep(f"route/{case}", {"top_k": top_k}, logits=logits, weights=weights, experts=chosen)

    for case, tokens, channels, taps in (("kernel4", 9, 24, 4), ("kernel3", 5, 7, 3), ("short", 2, 6, 4)):
        x, weight = normal(tokens, channels), normal(channels, taps, scale=0.5)
        y = m.causal_conv1d_fn(x.T[None], weight, activation="silu")[0].T
        state, step = normal(taps - 1, channels), normal(1, channels)
        after = state.T[None].clone()
        step_y = m.causal_conv1d_update(step.T[None], after, weight, activation="silu")[0].T
        keep(f"causal_conv1d/{case}", x=x, weight=weight, y=y)
        keep(f"causal_conv1d/{case}_step", x=step, weight=weight, state=state, y=step_y, state_out=after[0].T)

    shapes = {  # tokens, K, V, dk, dv
        "one": (1, 2, 2, 8, 8),
        "r3": (63, 1, 3, 12, 20),
        "r2": (64, 2, 4, 16, 16),
        "r4": (65, 1, 4, 24, 8),
        "long": (200, 1, 1, 16, 12),
        "family": (6, 1, 1, 128, 128),
    }
    for case, (tokens, num_k, num_v, k_dim, v_dim) in shapes.items():
        q, k, v = normal(tokens, num_k, k_dim), normal(tokens, num_k, k_dim), normal(tokens, num_v, v_dim)
        q[0], k[0] = q[0] * 1e-3, k[0] * 1e-3  # where the epsilon of the l2 norm matters
        g = -torch.exp(normal(tokens, num_v, scale=2) - 2)
        beta = torch.sigmoid(normal(tokens, num_v, scale=1.5))
        initial = normal(num_v, k_dim, v_dim, scale=0.3) if case != "r2" else None
        results = {}
        for mode in ("chunk", "recurrent"):
            out, state = getattr(m, f"torch_{mode}_gated_delta_rule")(
                *(x[None] for x in (q, k, v, g, beta)),
                initial_state=None if initial is None else initial[None],
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )
            results |= {f"o_{mode}": out[0], f"state_{mode}": state[0]}
        keep(f"gated_delta_rule/{case}", q=q, k=k, v=v, g=g, beta=beta, state=initial, **results)

    for case, (tokens, keys, heads, kv_heads, head_dim) in {
        "prefill": (11, 11, 4, 2, 24),
        "cached": (5, 40, 6, 1, 16),
        "decode": (1, 33, 16, 1, 32),
        "family": (3, 12, 2, 1, 256),
    }.items():
        q, k, v = (
            normal(tokens, heads, head_dim, scale=2),
            normal(keys, kv_heads, head_dim),
            normal(keys, kv_heads, head_dim),
        )
        stub = torch.nn.Module().eval()
        stub.num_key_value_groups = heads // kv_heads
        mask = torch.full((tokens, keys), -torch.inf).triu(keys - tokens + 1)
        y, _ = m.eager_attention_forward(
            stub, *(x.transpose(0, 1)[None] for x in (q, k, v)), mask[None, None], head_dim**-0.5
        )
        keep(f"attention/{case}", q=q, k=k, v=v, y=y[0])

    for case, tokens, hidden, experts, top_k, width, shared in (
        ("top2", 9, 32, 8, 2, 12, 20),
        ("all", 3, 24, 5, 5, 8, 8),
    ):
        config = text_config(
            hidden_size=hidden,
            num_experts=experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=width,
            shared_expert_intermediate_size=shared,
        )
        block = m.Qwen3_5MoeSparseMoeBlock(config).eval()
        weights = {name: normal(*p.shape, scale=p.shape[-1] ** -0.5) for name, p in block.named_parameters()}
        block.load_state_dict(weights)
        x = normal(tokens, hidden)
        keep(f"moe/{case}", {"top_k": top_k}, x=x, y=block(x[None])[0], **weights)
    return saved
