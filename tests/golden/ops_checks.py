"""How each op is held against Transformers' outputs of `make_goldens.make_ops`.

`CHECKS[op](ops, arrays, settings)` runs one case through `ops` (a module with the functions of
`qwen35rs.ops`, such as `reference`) and asserts that the outputs agree.
"""

import json
from pathlib import Path

import numpy as np

OPS_FILE = Path(__file__).resolve().parent / "data" / "ops.npz"
YARN_FIELDS = (
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "truncate",
)


def close(got, want, tolerance=1e-5):
    """Same shape, and no element further off than `tolerance` of the largest magnitude (or of one)."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, (got.shape, want.shape)
    if want.size:
        assert np.isfinite(got).all()
        error, scale = np.abs(got - want.astype(np.float64)).max(), max(1.0, np.abs(want).max())
        assert error <= tolerance * scale, f"off by {error:.3g} at a scale of {scale:.3g}"


def load_cases(saved=None):
    """Every case of `ops.npz` (or of a fresh `make_ops`), as {"op/case": (arrays, settings)}."""
    saved = np.load(OPS_FILE) if saved is None else saved
    cases = {}
    for key in saved:
        case, name = key.rsplit("/", 1)
        arrays, settings = cases.setdefault(case, ({}, {}))
        if name == "json":
            settings |= json.loads(bytes(saved[key]))
        else:
            arrays[name] = saved[key]
    return cases


def yarn_of(settings):
    """The `yarn` argument of `rope` for a `rope_parameters` dictionary: its YaRN fields, or None."""
    if settings.get("rope_type") != "yarn":
        return None
    return {name: settings[name] for name in YARN_FIELDS if settings.get(name) is not None}


def check_rms_norm(ops, a, settings):
    close(ops.rms_norm(a["x"], a["weight"], eps=settings["eps"]), a["y"])


def check_rope(ops, a, settings):
    y = ops.rope(
        a["x"],
        a["positions"],
        rotary_dim=int(settings["head_dim"] * settings["partial_rotary_factor"]),
        theta=settings["rope_theta"],
        mrope_section=tuple(settings["mrope_section"]),
        yarn=yarn_of(settings),
    )
    close(y, a["y"], 2e-3)  # float32 frequencies an ulp apart, times positions of thousands


def check_route(ops, a, settings):
    weights, experts = ops.route(a["logits"], settings["top_k"])
    assert np.array_equal(experts, a["experts"])
    close(weights, a["weights"])


def check_causal_conv1d(ops, a, settings):
    y, state = ops.causal_conv1d(a["x"], a["weight"], a.get("state"))
    close(y, a["y"])
    if "state_out" in a:
        close(state, a["state_out"])


def check_gated_delta_rule(ops, a, settings):
    inputs = [a[name] for name in ("q", "k", "v", "g", "beta")]
    for mode, theirs in (("chunked", "chunk"), ("recurrent", "recurrent")):
        out, state = ops.gated_delta_rule(*inputs, state=a.get("state"), mode=mode)
        close(out, a[f"o_{theirs}"], 2e-5)
        close(state, a[f"state_{theirs}"], 2e-5)


def check_attention(ops, a, settings):
    close(ops.attention(a["q"], a["k"], a["v"]), a["y"])


def check_moe(ops, a, settings):
    shared = [a[f"shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down")]
    y = ops.moe(
        a["x"],
        a["gate.weight"],
        a["experts.gate_up_proj"],
        a["experts.down_proj"],
        settings["top_k"],
        shared=(*shared, a["shared_expert_gate.weight"]),
    )
    close(y, a["y"])


CHECKS = {
    "rms_norm": check_rms_norm,
    "rope": check_rope,
    "route": check_route,
    "causal_conv1d": check_causal_conv1d,
    "gated_delta_rule": check_gated_delta_rule,
    "attention": check_attention,
    "moe": check_moe,
}
