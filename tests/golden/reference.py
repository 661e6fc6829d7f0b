"""The Qwen3.5 text model in numpy float64, for tests: every op, and the net that they make.

Written from the published description of the layers and not from any engine's code, so that three
implementations meet in the tests: Transformers, this file, and qwen35rs. Slow, whole sequences only,
one sequence at a time. Ops take any float array and answer in float64. The rotary angle is the one
quantity kept in float32, because there the rounding is part of the definition.
"""

import json
import math
from pathlib import Path

import numpy as np

# ---------------------------------------------------------------------------------------------- ops


def sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x, np.float64)))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(0, np.asarray(x, np.float64))


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def rms_norm(x, weight, eps=1e-6, residual=None):
    """Zero-centred RMSNorm over the last axis: `x / rms(x) * (1 + weight)`.

    With a residual, the norm of `x + residual`, and that sum.
    """
    x = np.asarray(x, np.float64) if residual is None else np.asarray(x, np.float64) + residual
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * (1 + np.asarray(weight, np.float64))
    return y if residual is None else (y, x)


def gated_rms_norm(x, gate, weight, eps=1e-6):
    """Plain RMSNorm over the last axis, times `silu(gate)`."""
    x = np.asarray(x, np.float64)
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * np.asarray(weight, np.float64)
    return normed * silu(np.asarray(gate, np.float64))


def rope_frequencies(rotary_dim, theta=1e7, yarn=None):
    """The `rotary_dim / 2` frequencies, and the factor on cos and sin (1 without YaRN)."""
    exponent = np.arange(0, rotary_dim, 2) / rotary_dim
    frequencies = float(theta) ** -exponent
    if yarn is None:
        return frequencies, 1.0

    def dimension_of(rotations):  # the index whose wavelength fits the context this many times
        wavelengths = yarn["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return rotary_dim * math.log(wavelengths) / (2 * math.log(theta))

    low, high = dimension_of(yarn.get("beta_fast") or 32), dimension_of(yarn.get("beta_slow") or 1)
    if yarn.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    high += 0.001 if low == high else 0
    slow = np.clip((np.arange(rotary_dim // 2) - low) / (high - low), 0, 1)
    factor = yarn["factor"]
    attention_factor = yarn.get("attention_factor")
    if attention_factor is None:
        attention_factor = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return frequencies * (1 - slow + slow / factor), attention_factor


def rope(x, positions, rotary_dim, theta=1e7, mrope_section=(11, 11, 10), yarn=None):
    """Rotates the first `rotary_dim` of each head of x [tokens, heads, head_dim]; positions [tokens] or [3, tokens]."""
    x = np.asarray(x, np.float64)
    frequencies, factor = rope_frequencies(rotary_dim, theta, yarn)
    positions = np.broadcast_to(np.asarray(positions), (3, x.shape[0]))
    index = np.arange(rotary_dim // 2)
    axis = np.zeros(rotary_dim // 2, int)
    for which in (1, 2):  # height, then width
        axis[(index % 3 == which) & (index < 3 * mrope_section[which])] = which
    angle = positions[axis].T.astype(np.float32) * frequencies.astype(np.float32)
    cos, sin = (factor * f(angle.astype(np.float64))[:, None] for f in (np.cos, np.sin))
    a, b = x[..., : rotary_dim // 2], x[..., rotary_dim // 2 : rotary_dim]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., rotary_dim:]], -1)


def route(logits, top_k):
    """The `top_k` experts of each row by falling logit, ties to the lower index, NaN last; and their weights.

    A weight is the softmax over the chosen. Infinite logits share all of it, and NaN gets none while there is
    anything else.
    """
    logits = np.asarray(logits, np.float64)
    weights, experts = np.zeros((len(logits), top_k)), np.zeros((len(logits), top_k), np.int32)
    for row, values in enumerate(logits):
        rank = [(True, 0, e) if np.isnan(value) else (False, -value, e) for e, value in enumerate(values)]
        experts[row] = [e for *_, e in sorted(rank)][:top_k]
        chosen = values[experts[row]]
        if np.isfinite(chosen[0]):
            share = np.nan_to_num(np.exp(chosen - chosen[0]))
        else:
            share = np.isnan(chosen) if np.isnan(chosen[0]) else chosen == chosen[0]
        weights[row] = share / share.sum()
    return weights, experts


def causal_conv1d(x, weight, state=None):
    """Depthwise causal convolution and SiLU of x [tokens, channels], weight [channels, kernel], after the rows `state`."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    taps = weight.shape[1]
    before = np.zeros((taps - 1, x.shape[1])) if state is None else np.asarray(state, np.float64)
    padded = np.concatenate([before, x])
    out = sum(padded[j : j + len(x)] * weight[:, j] for j in range(taps))
    return silu(out), padded[len(x) :]


def gated_delta_rule(q, k, v, g, beta, state=None, mode="recurrent", qk_l2norm=True, scale=None):
    """The recurrence, token by token in either mode, over q, k [T, K, dk], v [T, V, dv] and g, beta [T, V].

    The state is [V, dk, dv].
    """
    q, k, v, g, beta = (np.asarray(x, np.float64) for x in (q, k, v, g, beta))
    num_v_heads, k_dim, v_dim = v.shape[1], q.shape[2], v.shape[2]
    if qk_l2norm:
        q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    repeat = num_v_heads // q.shape[1]
    q, k = (
        np.repeat(q, repeat, axis=1) * (k_dim**-0.5 if scale is None else scale),
        np.repeat(k, repeat, axis=1),
    )
    shape = (num_v_heads, k_dim, v_dim)
    state = np.zeros(shape) if state is None else np.array(state, np.float64)
    out = np.zeros(v.shape)
    for t in range(len(v)):
        state = state * np.exp(g[t])[:, None, None]
        delta = beta[t][:, None] * (v[t] - np.einsum("hk,hkv->hv", k[t], state))
        state = state + k[t][:, :, None] * delta[:, None, :]
        out[t] = np.einsum("hk,hkv->hv", q[t], state)
    return out, state


def attention(q, k, v, scale=None):
    """Causal attention: q [T, heads, d] are the last T of the S positions of k and v [S, kv heads, d]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scale = q.shape[2] ** -0.5 if scale is None else scale
    out = np.zeros(q.shape)
    for t in range(len(q)):
        seen = len(k) - len(q) + t + 1
        weights = softmax(np.einsum("hd,shd->hs", q[t], k[:seen]) * scale)
        out[t] = np.einsum("hs,shd->hd", weights, v[:seen])
    return out


def swiglu(x, gate_proj, up_proj, down_proj):
    return (silu(x @ gate_proj.T) * (x @ up_proj.T)) @ down_proj.T


def moe(x, gate, gate_up, down, top_k, shared=None):
    """Routed experts, and the gated shared one: `shared` is (gate_proj, up_proj, down_proj, shared_gate)."""
    x, gate, gate_up, down = (np.asarray(a, np.float64) for a in (x, gate, gate_up, down))
    width = down.shape[2]
    out = np.zeros(x.shape)
    for token, (weights, experts) in enumerate(zip(*route(x @ gate.T, top_k))):
        for weight, e in zip(weights, experts):
            out[token] += weight * swiglu(x[token], gate_up[e, :width], gate_up[e, width:], down[e])
    if shared is not None:
        *mlp, shared_gate = (np.asarray(a, np.float64) for a in shared)
        out += sigmoid(x @ shared_gate.reshape(1, -1).T) * swiglu(x, *mlp)
    return out


# ------------------------------------------------------------------------------------- checkpoints


def read_safetensors(path):
    """Every tensor of one file, by name, widened to float32."""
    data = Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        raw = data[start + begin : start + end]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[entry["dtype"]]).astype(np.float32)
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def read_checkpoint(directory):
    """The text configuration and the tensors of the text model, under their names without any prefix, and of its MTP
    module."""
    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text())
    tied = config.get("tie_word_embeddings", False)
    config = {"tie_word_embeddings": tied} | config.get("text_config", config)
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, values in read_safetensors(file).items():
            if not name.startswith("model.visual."):
                tensors[name.removeprefix("model.").removeprefix("language_model.")] = values
    return config, tensors


class Net:
    """The text model of a checkpoint directory: `net(token_ids)` gives the logits [tokens, vocab]."""

    def __init__(self, directory):
        self.config, self.tensors = read_checkpoint(directory)
        self.router_gaps = []  # of every routing decision: the last chosen logit less the first refused

    def __call__(self, token_ids):
        self.router_gaps.clear()
        return self.hidden(token_ids) @ self.head().T

    def mtp_logits(self, token_ids):
        """The MTP module's drafts [tokens - 1, vocab]: row t is of token t + 2."""
        after = self.weight("embed_tokens.weight")[np.asarray(token_ids)[1:]]
        halves = [
            self.norm(after, "mtp.pre_fc_norm_embedding.weight"),
            self.norm(self.hidden(token_ids)[:-1], "mtp.pre_fc_norm_hidden.weight"),
        ]
        x = np.concatenate(halves, axis=1) @ self.weight("mtp.fc.weight").T
        x = self.layer("mtp.layers.0.", "full_attention", x)
        return self.norm(x, "mtp.norm.weight") @ self.head().T

    def hidden(self, token_ids):
        """[tokens, hidden], after the final norm."""
        x = self.weight("embed_tokens.weight")[np.asarray(token_ids)]
        for layer, kind in enumerate(self.layer_types()):
            x = self.layer(f"layers.{layer}.", kind, x)
        return self.norm(x, "norm.weight")

    def head(self):
        return self.weight("embed_tokens.weight" if self.config["tie_word_embeddings"] else "lm_head.weight")

    def layer(self, prefix, kind, x):
        mixer = self.full_attention if kind == "full_attention" else self.delta_net
        x = x + mixer(prefix, self.norm(x, prefix + "input_layernorm.weight"))
        return x + self.feed_forward(
            prefix + "mlp.", self.norm(x, prefix + "post_attention_layernorm.weight")
        )

    def weight(self, name):
        return self.tensors[name].astype(np.float64)

    def norm(self, x, name):
        return rms_norm(x, self.weight(name), self.config["rms_norm_eps"])

    def layer_types(self):
        if self.config.get("layer_types"):
            return self.config["layer_types"]
        interval = self.config.get("full_attention_interval", 4)
        kinds = ["full_attention", "linear_attention"]
        return [kinds[(i + 1) % interval > 0] for i in range(self.config["num_hidden_layers"])]

    def full_attention(self, prefix, x):
        c, prefix, tokens = self.config, prefix + "self_attn.", len(x)
        rotary = c.get("rope_parameters") or {}
        head_dim = c["head_dim"]
        q, gate = np.split(
            (x @ self.weight(prefix + "q_proj.weight").T).reshape(tokens, -1, 2 * head_dim), 2, -1
        )
        k, v = ((x @ self.weight(f"{prefix}{n}_proj.weight").T).reshape(tokens, -1, head_dim) for n in "kv")
        q, k = (self.norm(a, f"{prefix}{n}_norm.weight") for a, n in ((q, "q"), (k, "k")))
        rotary_dim = int(head_dim * rotary.get("partial_rotary_factor", 0.25))
        yarn = rotary if rotary.get("rope_type", "default") == "yarn" else None
        section = rotary.get("mrope_section", (11, 11, 10))
        q, k = (rope(a, np.arange(tokens), rotary_dim, rotary["rope_theta"], section, yarn) for a in (q, k))
        out = attention(q, k, v) * sigmoid(gate)
        return out.reshape(tokens, -1) @ self.weight(prefix + "o_proj.weight").T

    def delta_net(self, prefix, x):
        c, prefix, tokens = self.config, prefix + "linear_attn.", len(x)
        k_heads, k_dim, v_dim = (
            c[f"linear_{n}"] for n in ("num_key_heads", "key_head_dim", "value_head_dim")
        )
        qkv, z, a, b = (x @ self.weight(f"{prefix}in_proj_{n}.weight").T for n in ("qkv", "z", "a", "b"))
        qkv, _ = causal_conv1d(qkv, self.weight(prefix + "conv1d.weight")[:, 0])
        q, k, v = np.split(qkv, [k_heads * k_dim, 2 * k_heads * k_dim], -1)
        g = -np.exp(self.weight(prefix + "A_log")) * softplus(a + self.weight(prefix + "dt_bias"))
        q, k, v, z = (y.reshape(tokens, -1, d) for y, d in ((q, k_dim), (k, k_dim), (v, v_dim), (z, v_dim)))
        out, _ = gated_delta_rule(q, k, v, g, sigmoid(b))
        out = gated_rms_norm(out, z, self.weight(prefix + "norm.weight"), c["rms_norm_eps"])
        return out.reshape(tokens, -1) @ self.weight(prefix + "out_proj.weight").T

    def feed_forward(self, prefix, x):
        names = [f"{n}_proj.weight" for n in ("gate", "up", "down")]
        if "num_experts" not in self.config:
            return swiglu(x, *(self.weight(prefix + n) for n in names))
        top_k, gate = self.config["num_experts_per_tok"], self.weight(prefix + "gate.weight")
        ordered = np.sort(x @ gate.T, -1)[:, ::-1]
        if top_k < len(gate):
            self.router_gaps.append(ordered[:, top_k - 1] - ordered[:, top_k])
        if prefix + "experts.gate_up_proj" in self.tensors:
            gate_up, down = (
                self.weight(prefix + "experts.gate_up_proj"),
                self.weight(prefix + "experts.down_proj"),
            )
        else:
            one = [[self.weight(f"{prefix}experts.{e}.{n}") for n in names] for e in range(len(gate))]
            gate_up, down = np.stack([np.concatenate(w[:2]) for w in one]), np.stack([w[2] for w in one])
        shared = [self.weight(f"{prefix}shared_expert.{n}") for n in names]
        return moe(
            x, gate, gate_up, down, top_k, (*shared, self.weight(prefix + "shared_expert_gate.weight"))
        )
