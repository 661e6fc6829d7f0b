"""GGUF files in numpy: read, written, decoded, and turned back into checkpoints as Hugging Face stores them.

Written from the format's description and from llama.cpp's converter, apart from the crate's code. `golden/make_gguf.py`
compares the decoders with the `gguf` package; `test_gguf.py` compares them with its record, and the crate with them.
"""

import json
import re
import struct

import numpy as np
import quantised as q
import tiny

#: Name of a type: its number, elements and bytes of a block.
TYPES = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "BF16": (30, 1, 2),
    "Q8_0": (8, 32, 34),
    "Q4_0": (2, 32, 18),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
}
#: Where in a block there are scales in f16.
SCALES = {"Q8_0": [0], "Q4_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST, U32, F32, BOOL = 8, 9, 4, 6, 7


# ------------------------------------------------------------------------------------------------ the file


def read(path):
    """Values, key to (type, value), of a list ((LIST, type of an item), items); tensors, name to (type, shape, bytes)."""
    data, at = path.read_bytes(), 0

    def take(form):
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return value

    def text():
        nonlocal at
        length = take("Q")
        at += length
        return data[at - length : at].decode()

    def value(kind):
        return text() if kind == TEXT else take(NUMBERS[kind])

    magic, version, num_tensors, num_keys = take("4s"), take("I"), take("Q"), take("Q")
    assert (magic, version) == (b"GGUF", 3)
    values, found = {}, []
    for _ in range(num_keys):
        key, kind = text(), take("I")
        if kind == LIST:
            item, length = take("I"), take("Q")
            values[key] = ((LIST, item), [value(item) for _ in range(length)])
        else:
            values[key] = (kind, value(kind))
    for _ in range(num_tensors):
        name = text()
        shape = [take("Q") for _ in range(take("I"))][::-1]
        found.append((name, shape, take("I"), take("Q")))
    start, names = -(-at // 32) * 32, {number: name for name, (number, _, _) in TYPES.items()}
    tensors = {}
    for name, shape, number, offset in found:
        kind = names[number]
        _, block, size = TYPES[kind]
        length = int(np.prod(shape)) // block * size
        tensors[name] = (kind, shape, data[start + offset : start + offset + length])
    return values, tensors


def header(values, tensors, alignment=32, version=3):
    """The bytes before the data."""
    text = lambda s: struct.pack("<Q", len(s.encode())) + s.encode()
    pack = lambda kind, value: text(value) if kind == TEXT else struct.pack("<" + NUMBERS[kind], value)
    out = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(values))]
    for key, (kind, value) in values.items():
        if isinstance(kind, tuple):
            out += [text(key), struct.pack("<IIQ", LIST, kind[1], len(value))]
            out += [pack(kind[1], item) for item in value]
        else:
            out += [text(key), struct.pack("<I", kind), pack(kind, value)]
    offset = 0
    for name, (kind, shape, data) in tensors.items():
        out += [text(name), struct.pack("<I", len(shape)), *(struct.pack("<Q", n) for n in shape[::-1])]
        out.append(struct.pack("<IQ", TYPES[kind][0], offset))
        offset = -(-(offset + len(data)) // alignment) * alignment
    return b"".join(out)


def write(path, values, tensors, alignment=32, version=3):
    out = header(values, tensors, alignment, version)
    for _, _, data in tensors.values():
        out += bytes(-len(out) % alignment) + data
    path.write_bytes(out + bytes(-len(out) % alignment))
    return path


# -------------------------------------------------------------------------------------------------- blocks


def decode(kind, raw):
    """Rows of blocks, uint8 ``[rows, bytes]``, as float32 ``[rows, elements]``."""
    size = TYPES[kind][2]
    rows = raw.shape[0]
    b = np.ascontiguousarray(raw).reshape(-1, size)
    half = lambda at: np.ascontiguousarray(b[:, at : at + 2]).view(np.float16).astype(np.float32)
    if kind == "Q8_0":
        out = b[:, 2:].view(np.int8).astype(np.float32) * half(0)
    elif kind == "Q4_0":
        codes = np.concatenate([b[:, 2:] & 15, b[:, 2:] >> 4], 1).astype(np.float32) - 8
        out = half(0) * codes
    elif kind in ("Q4_K", "Q5_K"):
        s = b[:, 4:16]
        scale, low = s[:, :4] & 63, s[:, 4:8] & 63
        scale = np.concatenate([scale, s[:, 8:] & 15 | (s[:, :4] >> 6) << 4], 1).astype(np.float32)
        low = np.concatenate([low, s[:, 8:] >> 4 | (s[:, 4:8] >> 6) << 4], 1).astype(np.float32)
        codes = b[:, size - 128 :].reshape(-1, 4, 1, 32)
        codes = np.concatenate([codes & 15, codes >> 4], 2).reshape(-1, 8, 32)
        if kind == "Q5_K":
            fifth = np.stack([b[:, 16:48] >> i & 1 for i in range(8)], 1)
            codes = codes + 16 * fifth
        out = (half(0) * scale)[..., None] * codes.astype(np.float32) - (half(2) * low)[..., None]
    else:
        low, high = b[:, :128].reshape(-1, 2, 64), b[:, 128:192].reshape(-1, 2, 32)
        low = np.concatenate([low & 15, low >> 4], 2).reshape(-1, 2, 4, 32)
        high = np.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], 2)
        codes = (low + 16 * high).reshape(-1, 16, 16).astype(np.float32) - 32
        scale = half(208) * b[:, 192:208].view(np.int8).astype(np.float32)
        out = scale[..., None] * codes
    return np.ascontiguousarray(out, np.float32).reshape(rows, -1)


def encode(kind, x):
    """Rows of float32 as blocks of Q8_0 or Q4_0, to the nearest, as llama.cpp rounds them: a tensor."""
    blocks = np.asarray(x, np.float32).reshape(-1, 32)
    rows = np.arange(len(blocks))
    top = blocks[rows, np.abs(blocks).argmax(1)]
    step = np.abs(top) / np.float32(127) if kind == "Q8_0" else top / np.float32(-8)
    scale = step.astype(np.float16)
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step != 0)[:, None]
    if kind == "Q8_0":
        codes = np.round(blocks * inverse).astype(np.int8).view(np.uint8)
    else:
        codes = np.minimum(blocks * inverse + np.float32(8.5), 15).astype(np.uint8)
        codes = codes[:, :16] | codes[:, 16:] << 4
    raw = np.concatenate([scale[:, None].view(np.uint8), codes], 1)
    return kind, list(x.shape), raw.tobytes()


def random_blocks(rng, kind, shape, size=0.02):
    """A tensor of random codes whose scales are numbers: about as large as weights are."""
    _, block, length = TYPES[kind]
    raw = rng.integers(0, 256, (int(np.prod(shape)) // block, length), dtype=np.uint8)
    steps = {"Q8_0": 1 / 74, "Q4_0": 1 / 5, "Q4_K": 1 / 300, "Q5_K": 1 / 600, "Q6_K": 1 / 1300}
    for at in SCALES[kind]:
        scale = (size * steps[kind] * rng.uniform(0.5, 2, len(raw))).astype(np.float16)
        raw[:, at : at + 2] = scale[:, None].view(np.uint8)
    return kind, list(shape), raw.tobytes()


def numbers(entry):
    """A tensor as float32."""
    kind, shape, data = entry
    if kind in ("F32", "F16", "BF16"):
        return q.numbers(entry)
    return decode(kind, np.frombuffer(data, np.uint8).reshape(int(np.prod(shape[:-1])), -1)).reshape(shape)


# ----------------------------------------------------------------------------------------- back to a checkpoint

LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_qkv.weight": "linear_attn.in_proj_qkv.weight",
    "attn_gate.weight": "linear_attn.in_proj_z.weight",
    "ssm_beta.weight": "linear_attn.in_proj_b.weight",
    "ssm_alpha.weight": "linear_attn.in_proj_a.weight",
    "ssm_conv1d.weight": "linear_attn.conv1d.weight",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_norm.weight": "linear_attn.norm.weight",
    "ssm_out.weight": "linear_attn.out_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
    "ffn_gate_shexp.weight": "mlp.shared_expert.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_expert.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_expert.down_proj.weight",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
}
MTP = {
    "nextn.eh_proj.weight": "mtp.fc.weight",
    "nextn.enorm.weight": "mtp.pre_fc_norm_embedding.weight",
    "nextn.hnorm.weight": "mtp.pre_fc_norm_hidden.weight",
    "nextn.shared_head_norm.weight": "mtp.norm.weight",
}
WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def group_heads(x, axis, c):
    """Value heads dealt out over key heads, along an axis that may have queries and keys before them: side by side."""
    k, v = c["linear_num_key_heads"], c["linear_num_value_heads"]
    if x.shape[axis] % v == 0 and x.shape[axis] // v in (1, c["linear_value_head_dim"]):
        before = 0
    else:
        before = 2 * k * c["linear_key_head_dim"]
    first, heads = np.split(x, [before], axis)
    shape = heads.shape
    dealt = heads.reshape(*shape[:axis], v // k, k, shape[axis] // v, *shape[axis + 1 :])
    return np.concatenate([first, dealt.swapaxes(axis, axis + 1).reshape(shape)], axis)


def as_hugging_face(tensors, config, folder):
    """A checkpoint of the same model: `config` is its config.json. Quantised matrices become float32."""
    c, out = config.get("text_config", config), {}
    layers = c["num_hidden_layers"]
    for name, entry in tensors.items():
        kind = entry[0] if entry[0] in ("F32", "F16", "BF16") else "F32"
        x = numbers(entry)
        block = re.match(r"blk\.(\d+)\.(.*)", name)
        if name in WHOLE:
            place, rest = WHOLE[name], name
        else:
            n, rest = int(block[1]), block[2]
            prefix = f"model.layers.{n}." if n < layers else "mtp.layers.0."
            if rest in MTP:
                place = MTP[rest]
            elif rest == "ffn_gate_exps.weight":
                place, up = prefix + "mlp.experts.gate_up_proj", numbers(tensors[name.replace("gate", "up")])
                x = np.concatenate([x, up], 1)
            elif rest == "ffn_up_exps.weight":
                continue
            else:
                place = prefix + LAYER[rest]
        if rest == "ssm_a":
            x = np.log(-x.astype(np.float64)).astype(np.float32)
        elif rest.endswith("norm.weight") and rest != "ssm_norm.weight":
            x = x - np.float32(1)
        if rest.startswith(("ssm_", "attn_qkv", "attn_gate")) and rest != "ssm_norm.weight":
            x = group_heads(x, 1 if rest == "ssm_out.weight" else 0, c)
        if rest == "ssm_conv1d.weight":
            x = x[:, None]
        if rest == "ffn_gate_inp_shexp.weight":
            x = x.reshape(1, -1)
        out[place] = q.tensor(kind, x)
    folder.mkdir(parents=True)
    tiny.write_safetensors(folder / "model.safetensors", out)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ------------------------------------------------------------------------------------------ from a checkpoint


def deal_heads(x, axis, c):
    """What `group_heads` undoes."""
    k, v, dim = (c[f"linear_{what}"] for what in ("num_key_heads", "num_value_heads", "value_head_dim"))
    own = v if x.shape[axis] == v else v * dim
    first, heads = np.split(x, [x.shape[axis] - own], axis)
    shape = heads.shape
    grouped = heads.reshape(*shape[:axis], k, v // k, own // v, *shape[axis + 1 :])
    return np.concatenate([first, grouped.swapaxes(axis, axis + 1).reshape(shape)], axis)


def from_hugging_face(tensors, config, stored):
    """Tensors of a checkpoint of stacked experts as a GGUF file has them; `stored(name, array)` makes each. Without MTP."""
    c, out = config.get("text_config", config), {}
    names = {place: name for name, place in (LAYER | WHOLE).items()}
    for place, entry in tensors.items():
        if place.startswith("mtp."):
            continue
        place, x = place.replace("model.language_model.", "model."), q.numbers(entry)
        block = re.match(r"model\.layers\.(\d+)\.(.*)", place)
        prefix, rest = (f"blk.{block[1]}.", block[2]) if block else ("", place)
        if rest == "mlp.experts.gate_up_proj":
            for kind, half in zip(("gate", "up"), np.split(x, 2, 1), strict=True):
                name = f"{prefix}ffn_{kind}_exps.weight"
                out[name] = stored(name, np.ascontiguousarray(half))
            continue
        name = names[rest]
        if name == "ssm_a":
            x = -np.exp(x.astype(np.float64)).astype(np.float32)
        elif name.endswith("norm.weight") and name != "ssm_norm.weight":
            x = x + np.float32(1)
        if name == "ssm_conv1d.weight":
            x = x[:, 0]
        if name.startswith(("ssm_", "attn_qkv", "attn_gate")) and name != "ssm_norm.weight":
            x = deal_heads(x, 1 if name == "ssm_out.weight" else 0, c)
        out[prefix + name] = stored(prefix + name, np.ascontiguousarray(x))
    return out


def values_of(config):
    """The metadata of a sparse model, by its config.json; the tokenizer's files are to lie beside."""
    c = config.get("text_config", config)
    rope, kinds = c["rope_parameters"], c["layer_types"]
    sizes = {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        "ssm.conv_kernel": "linear_conv_kernel_dim",
        "ssm.state_size": "linear_key_head_dim",
        "ssm.group_count": "linear_num_key_heads",
        "ssm.time_step_rank": "linear_num_value_heads",
    }
    values = {key: (U32, c[name]) for key, name in sizes.items()}
    values |= {
        "ssm.inner_size": (U32, c["linear_num_value_heads"] * c["linear_value_head_dim"]),
        "rope.dimension_count": (U32, int(c["head_dim"] * rope["partial_rotary_factor"])),
        "rope.dimension_sections": ((LIST, 5), [*rope["mrope_section"], 0]),
        "rope.freq_base": (F32, rope["rope_theta"]),
        "attention.layer_norm_rms_epsilon": (F32, c["rms_norm_eps"]),
        "attention.recurrent_layers": ((LIST, BOOL), [kind == "linear_attention" for kind in kinds]),
    }
    general = {
        "general.architecture": (TEXT, "qwen35moe"),
        "tokenizer.ggml.eos_token_id": (U32, c["eos_token_id"]),
    }
    return general | {f"qwen35moe.{key}": value for key, value in values.items()}
