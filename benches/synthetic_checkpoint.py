"""Writes a checkpoint of random weights in the layout of `qwen35rs quantize`, as fast as its place takes it.

    python benches/synthetic_checkpoint.py -m 122b-a10b --quantization int4 DIR

Names, types, shapes, shards and `quantization_config` are those that `qwen35rs quantize` writes; with `none` those of a
release in bf16, experts fused. Every byte is written; codes and numbers repeat after 32 MiB, scales are such that
activations stay finite. There is no tokenizer, no vision tower and no MTP module: a model is loaded without them.
"""

import argparse
import json
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from qwen35rs import RequestError, _core, demo

KEY = "qwen35rs_bench"
QUANTIZATIONS = ("int4", "mixed", "fp8", "none")
SHARD_BYTES = 5_000_000_000
BLOCK_BYTES = 32 << 20
BLOCK = 128  # rows and inputs that share a scale of fp8
MAX_PARTS = 1024  # of one write
SIZES = {"BF16": 2, "F32": 4, "I32": 4, "I64": 8, "F8_E4M3": 1}


@dataclass(frozen=True)
class Entry:
    """A tensor of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    fill: tuple
    """What its bytes are: the key of a block, or the bytes themselves."""

    @property
    def num_bytes(self):
        return SIZES[self.dtype] * math.prod(self.shape)


def text_config(model, layers=None):
    """The `text_config` of a size of the family, of a config.json or of a checkpoint, maybe of its first layers alone."""
    planned = _core.plan_model(
        str(model),
        gpus=[],
        cards=[],
        schemes=[],
        context=1,
        fp8_kv=False,
        f16_state=False,
        with_vision=False,
        with_mtp=False,
    )
    found = json.loads(planned)["config"]
    attention, delta, rope = found["attention"], found["delta"], found["rope"]
    kinds = ["full_attention" if kind == "attention" else "linear_attention" for kind in found["layers"]]
    if layers is not None and not 1 <= layers <= len(kinds):
        raise RequestError(f"layers: found {layers}; allowed: 1 to {len(kinds)}")
    kinds = kinds[:layers]
    config = {
        "vocab_size": found["vocab"],
        "hidden_size": found["hidden"],
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "num_attention_heads": attention["num_q_heads"],
        "num_key_value_heads": attention["num_kv_heads"],
        "head_dim": attention["head_dim"],
        "linear_num_key_heads": delta["num_k_heads"],
        "linear_num_value_heads": delta["num_v_heads"],
        "linear_key_head_dim": delta["k_dim"],
        "linear_value_head_dim": delta["v_dim"],
        "linear_conv_kernel_dim": delta["conv_kernel"],
        "max_position_embeddings": found["max_position"],
        "rms_norm_eps": found["rms_eps"],
        "tie_word_embeddings": found["tied_embeddings"],
        "eos_token_id": found["eos_token_ids"][0],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rope["theta"],
            "partial_rotary_factor": rope["rotary_dim"] / attention["head_dim"],
            "mrope_section": rope["mrope_section"],
            "mrope_interleaved": True,
        },
    }
    if moe := found["ffn"].get("moe"):
        return config | {
            "num_experts": moe["num_experts"],
            "num_experts_per_tok": moe["top_k"],
            "moe_intermediate_size": moe["expert_width"],
            "shared_expert_intermediate_size": moe["shared_width"],
        }
    return config | {"intermediate_size": found["ffn"]["dense"]["width"]}


def config_json(text, section):
    """The whole config.json."""
    model_type = "qwen3_5_moe" if "num_experts" in text else "qwen3_5"
    whole = {
        "model_type": model_type,
        "dtype": "bfloat16",
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": {"model_type": f"{model_type}_text", "dtype": "bfloat16", **text},
    }
    return whole | ({"quantization_config": section} if section else {})


def quantization_config(quantization, group, ignore):
    """What config.json says of the quantisation; None of none."""
    if quantization == "none":
        return None
    if quantization == "fp8":
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ignore,
        }
    plain = {"symmetric": True, "dynamic": False}
    outputs = {"output_activations": None}
    int4 = {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group, **plain},
        "input_activations": None,
        "format": "pack-quantized",
        **outputs,
    }
    groups, name = {"group_0": int4}, "pack-quantized"
    if quantization == "mixed":
        int4["targets"] = [r"re:.*mlp\.experts\..*(gate|up|down)_proj$"]
        name, floats = "mixed-precision", {"num_bits": 8, "type": "float", "symmetric": True}
        groups["group_1"] = {
            "targets": [
                r"re:.*self_attn\.(q|k|v|o)_proj$",
                r"re:.*linear_attn\.(in_proj_qkv|in_proj_z|out_proj)$",
                r"re:.*mlp\.(shared_expert\.)?(gate|up|down)_proj$",
            ],
            "weights": {**floats, "strategy": "block", "block_structure": [BLOCK, BLOCK], "dynamic": False},
            "input_activations": {**floats, "strategy": "group", "group_size": BLOCK, "dynamic": True},
            "format": "float-quantized",
            **outputs,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def matrix_form(name, quantization):
    """What a tensor of this name becomes: int4, fp8, or none."""
    module = name.removesuffix(".weight")
    last = module.rpartition(".")[2]
    if quantization == "none" or not last.endswith("_proj") and last not in ("in_proj_qkv", "in_proj_z"):
        return "none"
    return {"mixed": "int4" if ".mlp.experts." in name else "fp8"}.get(quantization, quantization)


def parts(module, rows, k, std, form, group, quantization):
    """The tensors of one quantised matrix."""
    # Codes are uniform: integers of -8 to 7, or any e4m3 number, whose root mean squares are these.
    if form == "int4":
        return [
            Entry(f"{module}.weight_packed", "I32", (rows, k // 8), ("bytes",)),
            Entry(f"{module}.weight_scale", "BF16", (rows, k // group), ("scale", "BF16", std / 4.6)),
            Entry(f"{module}.weight_shape", "I64", (2,), ("own", np.array([rows, k], "<i8").tobytes())),
        ]
    scale, blocks = "weight_scale_inv" if quantization == "fp8" else "weight_scale", (rows, k)
    blocks = tuple(-(-size // BLOCK) for size in blocks)
    return [
        Entry(f"{module}.weight", "F8_E4M3", (rows, k), ("e4m3",)),
        Entry(f"{module}.{scale}", "F32", blocks, ("scale", "F32", std / 110)),
    ]


def units(text, quantization, group):
    """Tensors that lie in one shard together, in the order of the file; and the names of modules that stay plain."""
    by_place, plain = {}, []
    for tensor in demo.tensors(text):
        form, (*outer, k) = matrix_form(tensor.name, quantization), tensor.shape
        place = tensor.name.split(".")
        layer = int(place[3]) if "layers" in place else -1
        is_expert = ".mlp.experts." in tensor.name
        at = by_place.setdefault((layer, is_expert), [])
        if form == "none":
            dtype = "F32" if tensor.float32 else "BF16"
            fill = ("normal", dtype, tensor.std, tensor.mean, tensor.rule)
            at.append([Entry(tensor.name, dtype, tensor.shape, fill)])
            if outer and tensor.name.endswith(".weight"):
                plain.append(tensor.name.removesuffix(".weight"))
            continue
        if form == "int4" and k % group:
            raise RequestError(
                f"group_size: found {group}; allowed: divisors of {k}, the inputs of {tensor.name}"
            )
        common = (k, tensor.std, form, group, quantization)
        if not is_expert:
            at.append(parts(tensor.name.removesuffix(".weight"), outer[0], *common))
            continue
        base, _, name = tensor.name.rpartition(".")
        names = ("gate_proj", "up_proj") if name == "gate_up_proj" else ("down_proj",)
        for e in range(outer[0]):
            rows = outer[1] // len(names)
            at.extend(parts(f"{base}.{e}.{name}", rows, *common) for name in names)
    for (_, is_expert), several in by_place.items():
        if is_expert and quantization != "none":  # an expert's three matrices beside each other
            several.sort(key=lambda unit: int(unit[0].name.split(".")[6]))
    return [unit for place in sorted(by_place) for unit in by_place[place]], plain


class Blocks:
    """Bytes of each kind, made once."""

    def __init__(self):
        self._made, self._lock = {}, threading.Lock()

    def get(self, entry):
        kind, *facts = entry.fill
        if kind == "own":
            return facts[0]
        length = min(BLOCK_BYTES, entry.num_bytes) // SIZES[entry.dtype]
        with self._lock:
            found = self._made.get(entry.fill)
            if found is None or len(found) < length * SIZES[entry.dtype]:
                found = self._made[entry.fill] = memoryview(self._make(kind, facts, length, entry.dtype))
        return found

    def _make(self, kind, facts, length, dtype):
        rng = np.random.default_rng(length)
        if kind in ("bytes", "e4m3"):
            codes = rng.integers(0, 256, length * SIZES[dtype], np.uint8)
            if kind == "e4m3":
                codes[codes & 0x7F == 0x7F] = 0  # these are no numbers
            return codes.tobytes()
        if kind == "scale":
            return demo.to_bytes((facts[1] * rng.uniform(0.5, 1.5, length)).astype(np.float32), dtype)
        _, std, mean, rule = facts
        return demo.to_bytes(demo.draw(demo.Tensor("", (length,), std, mean, rule), rng, length), dtype)

    def slices(self, entry, turn):
        """The bytes of an entry: of the block again and again, from a place of its own on."""
        block, left = self.get(entry), entry.num_bytes
        size = SIZES[entry.dtype]
        at = turn * 1_000_003 * size % len(block) if entry.fill[0] != "own" else 0
        while left:
            piece = block[at : at + left]
            yield piece
            left, at = left - len(piece), 0


def write_all(fd, pieces):
    while pieces:
        done = os.writev(fd, pieces[:MAX_PARTS])
        while pieces and done >= len(pieces[0]):
            done -= len(pieces.pop(0))
        if done:
            pieces[0] = pieces[0][done:]


def write_shard(path, entries, blocks):
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for entry in entries:
        start, end = end, end + entry.num_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        pieces, waiting = [len(text).to_bytes(8, "little") + text], 0
        for turn, entry in enumerate(entries):
            pieces += blocks.slices(entry, turn)
            waiting += entry.num_bytes
            if waiting >= BLOCK_BYTES:
                write_all(fd, pieces)
                pieces, waiting = [], 0
        write_all(fd, pieces)
        os.fsync(fd)
    finally:
        os.close(fd)


def write(directory, model, quantization="int4", layers=None, group=128, threads=None):
    """Writes the checkpoint to a new or empty directory. Gives bytes, files and seconds; None where the same one is there.

    Raises RequestError for an argument, and for a directory that holds something else.
    """
    if quantization not in QUANTIZATIONS:
        raise RequestError(f"quantization: found {quantization}; allowed: {', '.join(QUANTIZATIONS)}")
    if group not in (32, 64, 128):
        raise RequestError(f"group_size: found {group}; allowed: 32, 64, 128")
    path, text = Path(directory), text_config(model, layers)
    made = {
        "model": str(model),
        "quantization": quantization,
        "layers": text["num_hidden_layers"],
        "group": group,
    }
    config = path / "config.json"
    if config.exists() and json.loads(config.read_text()).get(KEY) == made:
        return None
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        what = f"{min(path.iterdir()).name} and no checkpoint like this one" if path.is_dir() else "a file"
        raise RequestError(
            f"directory: found {path}, which is or has {what}; allowed: new, empty, or the same checkpoint from before"
        )
    path.mkdir(parents=True, exist_ok=True)
    try:
        return fill(path, text, quantization, group, threads, made)
    except BaseException:
        # What is half written would be in the way of the next run. It was empty.
        for file in path.iterdir():
            file.unlink()
        raise


def fill(path, text, quantization, group, threads, made):
    """Writes the files of a checkpoint."""
    several, plain = units(text, quantization, group)
    shards, filled = [], 0
    for unit in several:
        size = sum(entry.num_bytes for entry in unit)
        if not shards or filled and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        filled += size
        shards[-1].extend(unit)
    num = len(shards)
    names = [
        f"model-{i + 1:05}-of-{num:05}.safetensors" if num > 1 else "model.safetensors" for i in range(num)
    ]
    blocks = Blocks()
    for shard in shards:  # before the clock starts
        for entry in shard:
            blocks.get(entry)
    start = time.perf_counter()
    with ThreadPoolExecutor(threads or min(num, os.cpu_count() or 1)) as pool:
        list(
            pool.map(lambda job: write_shard(path / job[0], job[1], blocks), zip(names, shards, strict=True))
        )
    seconds = time.perf_counter() - start
    total = sum(entry.num_bytes for shard in shards for entry in shard)
    if num > 1:
        weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    # Last: a directory without it is no checkpoint.
    section = quantization_config(quantization, group, plain)
    (path / "config.json").write_text(json.dumps({KEY: made, **config_json(text, section)}, indent=2) + "\n")
    return {"bytes": total, "files": num, "seconds": seconds, "gb_per_s": total / 1e9 / seconds}


def add_options(parser):
    """Options that `benches/load.py` has too."""
    parser.add_argument("directory", help="new, empty, or with the same checkpoint from before")
    parser.add_argument("-m", "--model", help="a size of the family, or a config.json")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="int4")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--layers", type=int, help="only so many of its layers")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    args = parser.parse_args()
    if args.model is None:
        parser.error("-m: found nothing; allowed: a size of the family, or a config.json")
    print(json.dumps(write(args.directory, args.model, args.quantization, args.layers, args.group_size)))


if __name__ == "__main__":
    main()
