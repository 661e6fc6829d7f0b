"""Checkpoints that any number of ranks divides, with the same numbers as others: heads are copied and widths filled up.

What is added does nothing: heads whose columns of the output projection are zero, inputs of a down projection that are
zero. What is there is spread evenly, so that every rank of a few has some of it. Exact: bits of weights are moved, never
computed.
"""

import json
import shutil

import numpy as np
import tiny

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def array(entry):
    """The bits of a tensor's elements."""
    _, shape, data = entry
    size = len(data) // max(1, int(np.prod(shape)))
    return np.frombuffer(data, WORDS[size]).reshape(shape)


def spread(old, new):
    """Where so many things lie among more places."""
    return np.arange(old) * new // old


def up(size, multiple):
    return -(-size // multiple) * multiple


def take(bits, axis, places, unit=1):
    """Blocks of `unit` elements along an axis, by number; zeros for -1."""
    shape = bits.shape
    blocks = bits.reshape(*shape[:axis], shape[axis] // unit, unit, *shape[axis + 1 :])
    out = np.take(blocks, np.maximum(places, 0), axis)
    out[(slice(None),) * axis + (places < 0,)] = 0
    return out.reshape(*shape[:axis], -1, *shape[axis + 1 :])


def grouped(readers, owners, multiple, keep):
    """Readers in groups of one owner each, more of both: `(owner of each place, reader of each place, live readers)`,
    where readers that are not live are -1 in the last. Each live reader has a copy of its owner; or owners stay, and
    their groups grow."""
    ratio = readers // owners
    if keep:
        size = ratio
        while owners * size % multiple:
            size += 1
        source = np.repeat(np.arange(owners) * ratio, size)
        live = np.full(owners * size, -1)
        for owner in range(owners):
            live[owner * size + spread(ratio, size)] = owner * ratio + np.arange(ratio)
        return np.arange(owners), np.where(live < 0, source, live), live
    places = up(max(readers, multiple), multiple)
    at, owner = spread(readers, places), np.zeros(places, int)
    owner[at] = np.arange(readers) // ratio
    source = (owner[:, None] * ratio + np.arange(ratio)).reshape(-1)
    live = np.full(places * ratio, -1)
    live[at * ratio + np.arange(readers) % ratio] = np.arange(readers)
    return owner, source, live


def width(size, multiple):
    new = up(size, multiple)
    places = np.full(new, -1)
    places[spread(size, new)] = np.arange(size)
    return places


class Widened:
    """The changes to a model of that configuration."""

    def __init__(self, config, multiple, keep_kv):
        self.c = c = config.get("text_config", config)
        self.kv, self.q, self.q_live = grouped(
            c["num_attention_heads"], c["num_key_value_heads"], multiple, keep_kv
        )
        self.key, self.value, self.value_live = grouped(
            c["linear_num_value_heads"], c["linear_num_key_heads"], multiple, False
        )
        names = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
        self.widths = {name: width(c[name], multiple) for name in names if c.get(name)}

    def config(self):
        sizes = {
            "num_attention_heads": self.q,
            "num_key_value_heads": self.kv,
            "linear_num_key_heads": self.key,
            "linear_num_value_heads": self.value,
        }
        return {name: len(places) for name, places in (sizes | self.widths).items()}

    def tensor(self, name, bits):
        c, last = self.c, name.removesuffix(".weight").rpartition(".")[2]
        if ".self_attn." in name:
            dim = c["head_dim"]
            match last:
                case "q_proj":  # queries and gates of a head side by side
                    return take(bits, 0, self.q, 2 * dim)
                case "k_proj" | "v_proj":
                    return take(bits, 0, self.kv, dim)
                case "o_proj":
                    return take(bits, 1, self.q_live, dim)
        if ".linear_attn." in name:
            key_dim, dim = c["linear_key_head_dim"], c["linear_value_head_dim"]
            match last:
                case "in_proj_qkv" | "conv1d":
                    keys = c["linear_num_key_heads"] * key_dim
                    parts = np.split(bits, [keys, 2 * keys])
                    parts = [take(part, 0, self.key, key_dim) for part in parts[:2]] + [
                        take(parts[2], 0, self.value, dim)
                    ]
                    return np.concatenate(parts)
                case "in_proj_z":
                    return take(bits, 0, self.value, dim)
                case "in_proj_a" | "in_proj_b" | "A_log" | "dt_bias":
                    return take(bits, 0, self.value)
                case "out_proj":
                    return take(bits, 1, self.value_live, dim)
        if ".mlp." in name and last in ("gate_proj", "up_proj", "down_proj", "gate_up_proj"):
            places = self.widths[self.width_of(name)]
            if last == "gate_up_proj":
                return np.concatenate([take(half, 1, places) for half in np.split(bits, 2, 1)], 1)
            return take(bits, bits.ndim - 1 if last == "down_proj" else bits.ndim - 2, places)
        return bits

    def width_of(self, name):
        if ".shared_expert." in name:
            return "shared_expert_intermediate_size"
        return "moe_intermediate_size" if ".experts." in name else "intermediate_size"


def widen(source, folder, multiple=24, keep_kv=False):
    """A copy of a checkpoint whose heads and widths are multiples; `keep_kv` leaves key-value heads as many as they are."""
    config = json.loads((source / "config.json").read_text())
    widened = Widened(config, multiple, keep_kv)
    out = {}
    for path in sorted(source.glob("*.safetensors")):
        for name, entry in tiny.read_safetensors(path).items():
            bits = widened.tensor(name, array(entry))
            out[name] = (entry[0], list(bits.shape), np.ascontiguousarray(bits).tobytes())
    widened.c.update(widened.config())
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja") and not file.name.endswith(".index.json"):
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config))
    tiny.write_safetensors(folder / "model.safetensors", out)
    return folder
