"""Records what Transformers says of the embedded model, in float32 arithmetic: python tests/golden/make_embedded.py

Needs the parity extra. Writes embedded.npz beside this file: for each of 50 held-out questions the prompt, the greedy
answer, the logits of two rows, and the losses of the expected answer's tokens.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from qwen35rs import Tokenizer, hub

sys.path.insert(0, str(Path(__file__).resolve().parent))
from embedded import FILE, questions
from make_goldens import greedy


def load():
    """The model in Transformers; every tensor must have found its place."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        hub.EMBEDDED,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(found.values()), found
    return model.eval()


def answer(model, prompt, end, at_least, most=512):
    """The greedy answer up to and with the token that ends it."""
    num = at_least
    while True:
        tokens = greedy(model, prompt, num)
        if end in tokens:
            return tokens[: tokens.index(end) + 1]
        assert num < most, tokens
        num = min(most, 2 * num)


@torch.inference_mode()
def logits(model, tokens):
    return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


def record(model, prompt, expected, end):
    """The greedy answer; logits after the prompt and in the middle of that answer; losses of the expected one."""
    said = answer(model, prompt, end, len(expected))
    rows = np.array([len(prompt) - 1, len(prompt) - 1 + len(said) // 2], np.int32)
    kept = logits(model, prompt + said)[torch.from_numpy(rows).long()]
    after = logits(model, prompt + expected)[len(prompt) - 1 : -1]
    losses = F.cross_entropy(
        after[:, : len(Tokenizer(hub.EMBEDDED))], torch.tensor(expected), reduction="none"
    )
    return {
        "prompt": np.array(prompt, np.uint16),
        "greedy": np.array(said, np.uint16),
        "rows": rows,
        "logits": kept.numpy(),
        "losses": losses.numpy(),
    }


def main():
    torch.set_num_threads(2)
    model, end, out = load(), Tokenizer(hub.EMBEDDED).added_tokens["<|im_end|>"], {}
    for i, (task, _, prompt, expected) in enumerate(questions()):
        for name, value in record(model, prompt, expected, end).items():
            out[f"{name}_{i}"] = value
        print(i, task, len(prompt), len(out[f"greedy_{i}"]), flush=True)
    np.savez_compressed(FILE, **out)
    print(FILE, FILE.stat().st_size)


if __name__ == "__main__":
    main()
