"""`qwen35rs.ops` against float64 numpy on any shape, and against Transformers' recorded outputs.

Shapes and hostile values come from hypothesis, the bulk of each array from a seeded generator. The oracles
are in `golden/reference.py` and have the same signatures.
"""

import math

import numpy as np
import pytest
from golden import ops_checks, reference
from golden.ops_checks import close
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen35rs import RequestError, ops

TRANSFORMERS = {
    case: v for case, v in ops_checks.load_cases().items() if case.split("/")[0] in ops_checks.CHECKS
}

any_shape = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)
counts = st.integers(0, 9)  # of tokens: none is a number too
widths = st.integers(1, 70)


def normal(rng, *shape, scale=1.0):
    return (scale * rng.standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_as_transformers(case):
    ops_checks.CHECKS[case.split("/")[0]](ops, *TRANSFORMERS[case])


# ------------------------------------------------------------------------------------------- rms_norm


@any_shape
@given(
    seeds,
    counts,
    widths,
    st.sampled_from([1e-6, 1e-5, 1e-2]),
    st.sampled_from([1e-4, 1.0, 1e4]),
    st.booleans(),
)
def test_rms_norm(rng, num_tokens, hidden, eps, scale, with_residual):
    x, weight = normal(rng, num_tokens, hidden, scale=scale), normal(rng, hidden, scale=0.5)
    if with_residual:
        residual = normal(rng, num_tokens, hidden, scale=scale)
        y, total = ops.rms_norm(x, weight, eps=eps, residual=residual)
        want, want_total = reference.rms_norm(x, weight, eps, residual)
        assert np.array_equal(total, x + residual)
        assert total.dtype == np.float32
        close(y, want)
        close(total / scale, want_total / scale)
    else:
        y = ops.rms_norm(x, weight, eps=eps)
        close(y, reference.rms_norm(x, weight, eps))
    assert y.dtype == np.float32


def test_rms_norm_of_zeros_is_zero():
    assert not ops.rms_norm(np.zeros((2, 5), np.float32), np.ones(5, np.float32)).any()


# ----------------------------------------------------------------------------------------------- rope


@st.composite
def ropes(draw):
    rotary_dim = 2 * draw(st.integers(1, 20))
    head_dim = rotary_dim + draw(st.integers(0, 24))
    height, width = draw(st.integers(0, rotary_dim // 6)), draw(st.integers(0, rotary_dim // 6))
    yarn = None
    if draw(st.booleans()):
        yarn = {
            "factor": draw(st.sampled_from([1.0, 2.0, 4.5])),
            "original_max_position_embeddings": draw(st.sampled_from([64, 1000, 262144])),
        }
        if draw(st.booleans()):
            yarn |= {
                "attention_factor": 1.3,
                "beta_fast": 20.0,
                "beta_slow": 2.0,
                "truncate": draw(st.booleans()),
            }
    section = (rotary_dim // 2 - height - width, height, width)
    theta = draw(st.sampled_from([1e4, 1e6, 1e7]))
    return head_dim, {"rotary_dim": rotary_dim, "theta": theta, "mrope_section": section, "yarn": yarn}


@any_shape
@given(seeds, counts, st.integers(1, 5), ropes(), st.sampled_from([10, 500, 5000]))
def test_rope(rng, num_tokens, num_heads, rope, furthest):
    head_dim, settings_ = rope
    x, positions = normal(rng, num_tokens, num_heads, head_dim), rng.integers(0, furthest, (3, num_tokens))
    y = ops.rope(x, positions, **settings_)
    assert y.dtype == np.float32
    close(y, reference.rope(x, positions, **settings_), 1e-5 + 1e-6 * furthest)
    assert np.array_equal(y[..., settings_["rotary_dim"] :], x[..., settings_["rotary_dim"] :])
    one_axis = ops.rope(x, positions[0], **settings_)
    assert np.array_equal(one_axis, ops.rope(x, np.repeat(positions[:1], 3, axis=0), **settings_))


@any_shape
@given(seeds, st.integers(1, 6), st.integers(1, 4), ropes())
def test_rope_turns_and_only_turns(rng, num_tokens, num_heads, rope):
    """Without YaRN lengths stay; position 0 changes nothing; scores depend on the difference of positions."""
    head_dim, settings_ = rope
    settings_["yarn"] = None
    q, k = (normal(rng, num_tokens, num_heads, head_dim) for _ in range(2))
    positions = rng.integers(0, 100, num_tokens)

    def turned(x, offset):
        return ops.rope(x, positions + offset, **settings_).astype(np.float64)

    close(np.linalg.norm(turned(q, 0), axis=-1), np.linalg.norm(q, axis=-1))
    close(ops.rope(q, np.zeros(num_tokens, int), **settings_), q)
    near, far = ((turned(q, n + 3) * turned(k, n)).sum(-1) for n in (0, 50))
    close(near, far, 1e-4)


# ---------------------------------------------------------------------------------------------- route

hostile = st.sampled_from([0.0, 0.0, -0.0, 1.0, 1.0, -1.0, 88.0, -200.0, 3e38, np.inf, -np.inf, np.nan])


@st.composite
def routings(draw):
    num_experts = draw(st.integers(1, 40))
    top_k = draw(st.integers(1, num_experts))
    shape = (draw(counts), num_experts)
    values = hostile if draw(st.booleans()) else st.integers(-3, 3).map(float)
    flat = draw(st.lists(values, min_size=shape[0] * num_experts, max_size=shape[0] * num_experts))
    return np.array(flat, np.float32).reshape(shape), top_k


@settings(any_shape, max_examples=300)
@given(routings())
def test_route_on_ties_and_infinities(routing):
    logits, top_k = routing
    weights, experts = ops.route(logits, top_k)
    want_weights, want_experts = reference.route(logits, top_k)
    assert weights.dtype == np.float32 and experts.dtype == np.int32
    assert np.array_equal(experts, want_experts)
    close(weights, want_weights, 1e-6)
    close(weights.sum(1), np.ones(len(logits)), 1e-6)


@any_shape
@given(seeds, counts, st.data())
def test_route(rng, num_tokens, data):
    num_experts = data.draw(st.integers(1, 600))
    top_k = data.draw(st.integers(1, min(num_experts, 16)))
    logits = normal(rng, num_tokens, num_experts, scale=3)
    weights, experts = ops.route(logits, top_k)
    want_weights, want_experts = reference.route(logits, top_k)
    assert np.array_equal(experts, want_experts)
    close(weights, want_weights, 1e-6)
    # Experts renamed are experts renamed, tokens moved are tokens moved (unequal logits: no ties to break).
    if np.all([len(np.unique(row)) == num_experts for row in logits]):
        order, rows = rng.permutation(num_experts), rng.permutation(num_tokens)
        moved_weights, moved = ops.route(np.ascontiguousarray(logits[rows][:, order]), top_k)
        assert np.array_equal(order[moved], experts[rows])
        assert np.array_equal(moved_weights, weights[rows])
    close(ops.route(logits + np.float32(4), top_k)[0], weights, 1e-5)


# -------------------------------------------------------------------------------------- causal_conv1d


@any_shape
@given(seeds, st.integers(0, 12), widths, st.integers(1, 6), st.booleans(), st.data())
def test_causal_conv1d(rng, num_tokens, channels, taps, with_state, data):
    x, weight = normal(rng, num_tokens, channels), normal(rng, channels, taps)
    state = normal(rng, taps - 1, channels) if with_state else None
    y, after = ops.causal_conv1d(x, weight, state)
    want, want_after = reference.causal_conv1d(x, weight, state)
    close(y, want)
    assert y.dtype == after.dtype == np.float32
    assert np.array_equal(after, want_after.astype(np.float32))
    cut = data.draw(st.integers(0, num_tokens))
    first, middle = ops.causal_conv1d(x[:cut], weight, state)
    second, end = ops.causal_conv1d(x[cut:], weight, middle)
    assert np.array_equal(np.concatenate([first, second]), y)
    assert np.array_equal(end, after)


# ----------------------------------------------------------------------------------- gated_delta_rule


@st.composite
def delta_rules(draw, max_tokens=200):
    """Inputs of the delta rule by name, with or without a state, decays from none to total."""
    rng, num_k_heads = draw(seeds), draw(st.integers(1, 3))
    num_v_heads = num_k_heads * draw(st.integers(1, 4))
    k_dim, v_dim = draw(st.integers(1, 33)), draw(st.integers(1, 33))
    borders = [n for n in (63, 64, 65, 128, 129) if n <= max_tokens]
    num_tokens = draw(st.one_of(st.integers(0, max_tokens), st.sampled_from(borders)))
    shape = (num_tokens, num_v_heads)
    g = {
        "spread": -np.exp(rng.normal(-2, 2, shape)),
        "none": np.zeros(shape),
        "total": np.full(shape, -1e4),
        "mixed": np.where(rng.random(shape) < 0.1, -1e4, -rng.random(shape) * rng.integers(0, 2, shape)),
    }[draw(st.sampled_from(["spread", "spread", "none", "total", "mixed"]))]
    scale = rng.choice([1e-3, 1.0, 1.0, 30.0], (2, num_tokens, 1, 1))  # at 1e-3 the l2 norm's epsilon matters
    q, k = (scale * normal(rng, 2, num_tokens, num_k_heads, k_dim)).astype(np.float32)
    return {
        "q": q,
        "k": k,
        "v": normal(rng, num_tokens, num_v_heads, v_dim),
        "g": g.astype(np.float32),
        "beta": rng.random(shape).astype(np.float32),
        "state": normal(rng, num_v_heads, k_dim, v_dim) if draw(st.booleans()) else None,
    }


@pytest.mark.parametrize("mode", ["chunked", "recurrent"])
@any_shape
@given(delta_rules(), st.booleans())
def test_gated_delta_rule(mode, inputs, with_scale):
    scale = 0.7 if with_scale else None
    out, state = ops.gated_delta_rule(**inputs, mode=mode, scale=scale)
    want, want_state = reference.gated_delta_rule(**inputs, scale=scale)
    assert out.dtype == state.dtype == np.float32
    close(out, want, 5e-5)
    close(state, want_state, 5e-5)


@pytest.mark.parametrize("mode", ["chunked", "recurrent"])
@any_shape
@given(delta_rules(max_tokens=80))
def test_gated_delta_rule_without_l2norm(mode, inputs):
    # Keys no longer than one, or the recurrence itself grows without bound.
    length = np.linalg.norm(inputs["k"], axis=-1, keepdims=True)
    inputs["k"] = (inputs["k"] / np.maximum(length, 1)).astype(np.float32)
    out, state = ops.gated_delta_rule(**inputs, mode=mode, qk_l2norm=False)
    want, want_state = reference.gated_delta_rule(**inputs, qk_l2norm=False)
    close(out, want, 5e-5)
    close(state, want_state, 5e-5)


@pytest.mark.parametrize(
    "modes", [("chunked", "chunked"), ("recurrent", "recurrent"), ("chunked", "recurrent")]
)
@any_shape
@given(delta_rules(max_tokens=150), st.data())
def test_gated_delta_rule_continues_from_its_state(modes, inputs, data):
    cut = data.draw(st.integers(0, len(inputs["v"])))
    state = inputs.pop("state")
    whole, end = ops.gated_delta_rule(**inputs, state=state, mode=modes[0])
    parts = []
    for mode, part in zip(modes, (slice(None, cut), slice(cut, None)), strict=True):
        out, state = ops.gated_delta_rule(
            **{name: x[part] for name, x in inputs.items()}, state=state, mode=mode
        )
        parts.append(out)
    exact = modes == ("recurrent", "recurrent") or (modes == ("chunked", "chunked") and cut % 64 == 0)
    for got, want in ((np.concatenate(parts), whole), (state, end)):
        close(got, want, 1e-4)
        assert not exact or np.array_equal(got, want)


def test_gated_delta_rule_of_nothing_keeps_the_state():
    state = normal(np.random.default_rng(0), 4, 3, 5)
    empty = [np.zeros((0, heads, width), np.float32) for heads, width in ((2, 3), (2, 3), (4, 5))]
    gates = [np.zeros((0, 4), np.float32)] * 2
    for mode in ("chunked", "recurrent"):
        out, after = ops.gated_delta_rule(*empty, *gates, state=state, mode=mode)
        assert out.shape == (0, 4, 5)
        assert np.array_equal(after, state)


# ------------------------------------------------------------------------------------------ attention


@any_shape
@given(
    seeds,
    counts,
    st.integers(0, 90),
    st.integers(1, 3),
    st.integers(1, 6),
    widths,
    st.sampled_from([0.1, 1, 30]),
)
def test_attention(rng, num_tokens, num_cached, num_kv_heads, group, head_dim, sharpness):
    num_keys = num_tokens + num_cached
    q = normal(rng, num_tokens, num_kv_heads * group, head_dim, scale=sharpness)
    k, v = (normal(rng, num_keys, num_kv_heads, head_dim) for _ in range(2))
    y = ops.attention(q, k, v)
    assert y.dtype == np.float32
    close(y, reference.attention(q, k, v), 2e-5 * max(1, sharpness))
    close(
        ops.attention(q, k, v, scale=0.05), reference.attention(q, k, v, scale=0.05), 2e-5 * max(1, sharpness)
    )


@any_shape
@given(seeds, st.integers(1, 9), st.integers(0, 20), st.data())
def test_attention_sees_no_later_key(rng, num_tokens, num_cached, data):
    q, later = normal(rng, num_tokens, 4, 8), data.draw(st.integers(0, num_tokens - 1))
    k, v = (normal(rng, num_tokens + num_cached, 2, 8) for _ in range(2))
    y = ops.attention(q, k, v)
    k[num_cached + later + 1 :], v[num_cached + later + 1 :] = 99, np.nan
    assert np.array_equal(ops.attention(q, k, v)[: later + 1], y[: later + 1])


# ------------------------------------------------------------------------------------------------ moe


@any_shape
@given(
    seeds,
    counts,
    widths,
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.data(),
)
def test_moe(rng, num_tokens, hidden, num_experts, width, shared_width, with_shared, data):
    top_k = data.draw(st.integers(1, num_experts))
    x, gate = normal(rng, num_tokens, hidden), normal(rng, num_experts, hidden)
    gate_up = normal(rng, num_experts, 2 * width, hidden, scale=hidden**-0.5)
    down = normal(rng, num_experts, hidden, width, scale=width**-0.5)
    shared = None
    if with_shared:
        gate_proj, up_proj = (normal(rng, shared_width, hidden, scale=hidden**-0.5) for _ in range(2))
        down_proj = normal(rng, hidden, shared_width, scale=shared_width**-0.5)
        shared = (gate_proj, up_proj, down_proj, normal(rng, 1, hidden))
    y = ops.moe(x, gate, gate_up, down, top_k, shared=shared)
    assert y.dtype == np.float32
    close(y, reference.moe(x, gate, gate_up, down, top_k, shared), 3e-5)
    for token in range(num_tokens):  # the same bits alone
        assert np.array_equal(
            ops.moe(x[token : token + 1], gate, gate_up, down, top_k, shared=shared)[0], y[token]
        )


# --------------------------------------------------------------------------------------------- inputs


def test_views_give_what_copies_give():
    rng = np.random.default_rng(0)
    big = normal(rng, 10, 6, 16)
    view, weight = big[::2, ::3, 1::2], normal(rng, 8)
    assert not view.flags.c_contiguous
    copy = np.ascontiguousarray(view)
    assert np.array_equal(ops.rms_norm(view[:, 0], weight), ops.rms_norm(copy[:, 0].copy(), weight))
    assert np.array_equal(ops.attention(view, view, view), ops.attention(copy, copy, copy))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.rms_norm(x(3, 8), x(7)),
        lambda x: ops.rms_norm(x(3, 8), x(8), residual=x(2, 8)),
        lambda x: ops.rope(x(3, 2, 8), np.zeros(4, int), rotary_dim=4, mrope_section=(1, 1, 0)),
        lambda x: ops.rope(x(3, 2, 8), np.zeros(3, int), rotary_dim=10, mrope_section=(3, 1, 1)),
        lambda x: ops.rope(x(3, 2, 8), np.zeros(3, int), rotary_dim=3, mrope_section=(1, 0, 0)),
        lambda x: ops.route(x(3, 8), 9),
        lambda x: ops.route(x(3, 8), 0),
        lambda x: ops.causal_conv1d(x(3, 8), x(7, 4)),
        lambda x: ops.causal_conv1d(x(3, 8), x(8, 4), x(4, 8)),
        lambda x: ops.gated_delta_rule(x(3, 2, 4), x(3, 2, 4), x(3, 3, 4), x(3, 3), x(3, 3)),
        lambda x: ops.gated_delta_rule(x(3, 2, 4), x(3, 2, 5), x(3, 2, 4), x(3, 2), x(3, 2)),
        lambda x: ops.gated_delta_rule(x(3, 2, 4), x(3, 2, 4), x(3, 2, 4), x(3, 2), x(3, 2), mode="fast"),
        lambda x: ops.attention(x(4, 2, 8), x(3, 2, 8), x(3, 2, 8)),
        lambda x: ops.attention(x(3, 3, 8), x(3, 2, 8), x(3, 2, 8)),
        lambda x: ops.attention(x(3, 2, 8), x(3, 2, 8), x(4, 2, 8)),
        lambda x: ops.moe(x(3, 8), x(4, 8), x(4, 6, 8), x(4, 8, 4), 2),
        lambda x: ops.moe(x(3, 8), x(4, 8), x(4, 6, 8), x(4, 8, 3), 5),
        lambda x: ops.moe(
            x(3, 8), x(4, 8), x(4, 6, 8), x(4, 8, 3), 2, shared=(x(5, 8), x(6, 8), x(8, 5), x(1, 8))
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call):
    with pytest.raises(ValueError):
        call(lambda *shape: np.ones(shape, np.float32))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda ones: ops.route(ones(2, 4), 10**30), f"top_k: found {10**30}; allowed: whole numbers from 0"),
        (lambda ones: ops.route(ones(2, 4), -1), "top_k: found -1; allowed: whole numbers from 0"),
        (lambda ones: ops.route(ones(2, 4), "2"), "top_k: found '2'; allowed: whole numbers"),
        (lambda ones: ops.rms_norm(ones(2, 4), ones(4), eps="a"), "eps: found 'a'; allowed: a number"),
        (lambda ones: ops.rope(ones(2, 1, 8), [0, 1], rotary_dim=2**40), f"rotary_dim: found {2**40}"),
        (lambda ones: ops.rope(ones(2, 1, 8), [0, 1], theta=10**400), "theta: found 1000"),
        (lambda ones: ops.rope(ones(2, 1, 8), [0, 1], mrope_section=[1, 0.5, 0]), "mrope_section: found 0.5"),
        (lambda ones: ops.rope(ones(2, 1, 8), [0, 1], mrope_section=(1, 0)), "mrope_section: found [1, 0]"),
        (
            lambda ones: ops.rope(ones(2, 1, 8), [0, 1], 8, mrope_section=(0, 4, 0)),
            "mrope_section: found [0, 4",
        ),
        (
            lambda ones: ops.rope(ones(2, 1, 8), [0, 1], mrope_section=1),
            "mrope_section: found 1; allowed: a seq",
        ),
        (lambda ones: ops.rope(ones(2, 1, 8), [1, [2]]), "positions: found [1, [2]]; allowed: [num_tokens]"),
        (lambda ones: ops.rope(ones(1, 1, 8), [2**32]), "positions: found shape [1] of int64; allowed"),
        (
            lambda ones: ops.gated_delta_rule(*[ones(1, 1, 1)] * 3, *[ones(1, 1)] * 2, qk_l2norm=1),
            "qk_l2norm: found 1; allowed: True, False",
        ),
        (
            lambda ones: ops.moe(ones(1, 1), ones(1, 1), ones(1, 2, 1), ones(1, 1, 1), 1, shared=0),
            "shared: found 0; allowed: a sequence",
        ),
        (
            lambda ones: ops.attention(ones(2, 1, 8), ones(2, 1, 8), ones(2, 1, 8), scale=[]),
            "scale: found []",
        ),
    ],
)
def test_numbers_that_cannot_be_are_named(call, text):
    with pytest.raises(RequestError) as refused:
        call(lambda *shape: np.ones(shape, np.float32))
    assert str(refused.value).startswith(text)


@pytest.mark.parametrize("theta", [-1, 0, 1, math.nan, math.inf, 1e39])
def test_bases_that_give_no_frequencies(theta):
    with pytest.raises(RequestError) as refused:
        ops.rope(np.ones((1, 1, 8), np.float32), [1], theta=theta)
    assert str(refused.value) == f"theta: found {theta}; allowed: a number above 1 that float32 holds"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"factor": 0}, "yarn: factor: found 0; allowed: a number from 1, at most 65536"),
        ({"factor": -1}, "yarn: factor: found -1"),
        ({"factor": math.nan}, "yarn: factor: found nan"),
        ({"factor": math.inf}, "yarn: factor: found inf"),
        ({"factor": "x"}, "yarn: factor: found 'x'; allowed: a number"),
        ({"truncate": 0}, "yarn: truncate: found 0; allowed: True, False"),
        ({"original_max_position_embeddings": -1}, "yarn: original_max_position_embeddings: found -1"),
        ({"original_max_position_embeddings": 0}, "yarn: original_max_position_embeddings: found 0"),
        ({"beta_slow": 0}, "yarn: beta_slow: found 0; allowed: a number above 0, at most 1e+09"),
        ({"beta_fast": 0.5}, "yarn: beta_fast: found 0.5; allowed: a number not below beta_slow, 1.0"),
        ({"attention_factor": math.nan}, "yarn: attention_factor: found nan"),
        ({"beta": 1}, "yarn: found keys ['attention_factor', 'beta'"),
        (None, "yarn: found 5; allowed: a mapping with factor, "),
    ],
)
def test_settings_of_yarn_that_cannot_be(changes, text):
    yarn = 5 if changes is None else {"factor": 4, "original_max_position_embeddings": 64, **changes}
    with pytest.raises(RequestError) as refused:
        ops.rope(np.ones((1, 1, 8), np.float32), [1], yarn=yarn)
    assert str(refused.value).startswith(text)
