"""The embedded model in each published format that is read, on the questions of the task suite, on the CPU.

    python benches/formats.py [--n 64] [--task NAME]... [--format NAME]...

Each checkpoint is made by the tests' helpers, to the nearest and without calibration: experts and projections, as the
releases have it. Groups are of 32 inputs, which is how wide an expert is.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from qwen35rs import LLM, hub, tasks
from qwen35rs.bench import measure

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import gguf_file as g
import quantised as q
import tiny
from test_quantised import FP8, KEPT, NVFP4, PACKED, compressed, is_quantised, one_by_one

GROUP = 32
INT4 = {"bits": 4, "group_size": GROUP}
# Of each its quantization_config, and how a matrix is made.
FORMATS = {
    "gptq": ({"quant_method": "gptq", "sym": False, **INT4}, lambda x: q.make_gptq(x, GROUP)),
    "awq": (
        {"quant_method": "awq", "zero_point": True, "version": "gemm", **INT4},
        lambda x: q.make_awq(x, GROUP),
    ),
    "packed int4": (
        compressed("pack-quantized", PACKED | {"group_size": GROUP}),
        lambda x: q.make_packed(x, GROUP),
    ),
    "nvfp4": (compressed("nvfp4-pack-quantized", NVFP4), lambda x: q.make_nvfp4(x, divides=True)),
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        lambda x: q.make_fp8(x, (128, 128)),
    ),
    "fp8 per row": (
        compressed("float-quantized", FP8 | {"strategy": "channel"}),
        lambda x: q.make_fp8(x, (1, x.shape[1]), "F32", "weight_scale"),
    ),
}
GGUF = {"gguf Q8_0": "Q8_0", "gguf Q4_0": "Q4_0"}
#: What llama.cpp leaves as it is; in a file of four bits embedding and head have eight.
PLAIN = ("norm", "ssm_a", "ssm_b", "ssm_dt", "ssm_conv1d", "ffn_gate_inp")
ENDS = ("token_embd.weight", "output.weight")


def write(name, folder):
    """The embedded model in a format; what is to be loaded."""
    config = json.loads((hub.EMBEDDED / "config.json").read_text())
    tensors = tiny.read_safetensors(hub.EMBEDDED / "model.safetensors")
    folder.mkdir()
    for file in hub.EMBEDDED.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, folder)
    if name in GGUF:

        def stored(place, x):
            if any(part in place for part in PLAIN):
                return q.tensor("F32", x)
            return g.encode("Q8_0" if place in ENDS else GGUF[name], x)

        tensors = g.from_hugging_face(tensors, config, stored)
        return g.write(folder / "model.gguf", g.values_of(config), tensors)
    quantization, make = FORMATS[name]
    out = {}
    for key, entry in one_by_one(tensors).items():
        if is_quantised(key, KEPT) and len(entry[1]) == 2:
            parts = make(q.numbers(entry))
            out |= {key.removesuffix("weight") + part: value for part, value in parts.items()}
        else:
            out[key] = entry
    tiny.write_safetensors(folder / "model.safetensors", out)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--task", action="append", choices=list(tasks.SUITE))
    parser.add_argument("--format", action="append", choices=[*FORMATS, *GGUF])
    options = parser.parse_args()
    names = options.format or [*FORMATS, *GGUF]
    with tempfile.TemporaryDirectory() as folder:
        models = {"as published": LLM(hub.EMBEDDED, device="cpu")}
        models |= {name: LLM(write(name, Path(folder) / name), device="cpu") for name in names}
        print(f"{'':26}" + "".join(f"{name:>17}" for name in models))
        ids = models["as published"].tokenizer.encode(
            "".join(item.completion for item, _ in zip(tasks.items("talk"), range(20)))
        )
        want = models["as published"].logits(ids)
        errors = [
            np.sqrt(np.square(llm.logits(ids) - want).mean() / np.square(want).mean())
            for llm in models.values()
        ]
        print(f"{'error of logits':26}" + "".join(f"{error:>17.2%}" for error in errors), flush=True)
        for task in options.task or tasks.SHORT:
            found = [measure(llm, task, num_items=options.n)[0] for llm in models.values()]
            cells = "".join(f"{f'{r.accuracy:.1%}  {r.perplexity:.4f}':>17}" for r in found)
            print(f"{task:26}{cells}", flush=True)


if __name__ == "__main__":
    main()
