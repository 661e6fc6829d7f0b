"""Records how far Transformers in bf16 is from itself in float32, for every golden and for the embedded model: what bf16
arithmetic costs, and so what a backend that works in bf16 may cost: python tests/golden/make_noise.py

Needs the parity extra. Writes bf16_noise.json beside this file.
"""

import json
import sys
from pathlib import Path

import torch
import transformers

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import make_goldens as goldens
from embedded import questions
from golden.cases import CASES, Golden
from noise import FILE, compare
from qwen35rs import hub


def pairs(name):
    golden = Golden(name)
    exact, rounded = goldens.load(golden.path), goldens.load(golden.path, "bfloat16")
    return [
        (goldens.forward(rounded, p.sequence)[0].numpy(), goldens.forward(exact, p.sequence)[0].numpy())
        for p in golden.prompts
    ]


@torch.inference_mode()
def of_embedded():
    def load(dtype):
        return transformers.AutoModelForCausalLM.from_pretrained(hub.EMBEDDED, dtype=dtype).eval()

    def logits(model, prompt, expected):
        rows = model(torch.tensor([prompt + expected]), use_cache=False).logits[0]
        return rows[len(prompt) - 1 : -1].float().numpy()

    exact, rounded = load(torch.float32), load(torch.bfloat16)
    return compare(
        (logits(rounded, prompt, expected), logits(exact, prompt, expected))
        for _, _, prompt, expected in questions()
        if len(prompt) < 1500
    )


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    of_goldens = {name: pairs(name) for name in CASES}
    found = {name: compare(some) for name, some in of_goldens.items()}
    found["goldens"] = compare([pair for some in of_goldens.values() for pair in some])
    found["embedded"] = of_embedded()
    lines = [f"{json.dumps(name)}: {json.dumps(noise)}" for name, noise in found.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
