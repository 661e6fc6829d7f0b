"""The embedded model in 4 bits, rounded to the nearest and calibrated: errors of its matrices, held-out text, tasks.

    python benches/calibrated.py                      # errors and held-out text
    python benches/calibrated.py --tasks 64           # accuracy on so many questions of each task, too

Calibration reads questions of the training split with their answers, in the chat format; what is measured is of the test
split. Perplexity is of every token after the first; the divergence is KL(published weights || quantised) a token, in nats.
"""

import argparse
import json
import tempfile
import time
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
from qwen35rs import LLM, _core, hub, tasks
from qwen35rs.bench import measure, prompt_of


def documents(llm, split, number, seed):
    """Questions with their answers, task after task in turns."""
    drawn = [islice(tasks.items(name, split=split, seed=seed), number) for name in tasks.SHORT]
    for item in (item for row in zip_longest(*drawn) for item in row):
        yield prompt_of(llm, item) + item.completion + "\n"


def log_probabilities(llm, ids):
    logits = llm.logits(ids)[:-1, : len(llm.tokenizer)].astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def held_out(llm, plain, texts):
    """Loss in nats a token, its change and that change's standard error, and the divergence."""
    losses, changes, divergence = [], [], []
    for ids in texts:
        want, got = log_probabilities(plain, ids), log_probabilities(llm, ids)
        rows, told = np.arange(len(ids) - 1), ids[1:]
        losses.append(-got[rows, told])
        changes.append((want - got)[rows, told])
        divergence.append((np.exp(want) * (want - got)).sum(1))
    losses, changes, divergence = (np.concatenate(part) for part in (losses, changes, divergence))
    return losses.mean(), changes.mean(), changes.std() / len(changes) ** 0.5, divergence.mean()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", type=int, default=0)
    options = parser.parse_args()
    plain = LLM(hub.EMBEDDED, device="cpu")
    texts = [plain.tokenizer.encode(text) for text in documents(plain, "test", 20, seed=5)]
    loss, *_ = held_out(plain, plain, texts)
    print(f"held out: {sum(map(len, texts))} tokens; published weights: perplexity {np.exp(loss):.5f}")
    print(
        f"{'':24}{'outputs':>9}{'weights':>9}{'perplexity':>12}{'loss':>20}{'divergence':>12}{'seconds':>9}"
    )
    models = {"published": plain}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        lines = (json.dumps({"text": line}) + "\n" for line in documents(plain, "train", 150, seed=1))
        text.write_text("".join(lines))
        for scheme, tokens in [
            ("int4", None), ("int4", 2048), ("int4", 8192), ("int4", 32768), ("int4", 131072),
            ("mixed", None), ("mixed", 32768),
        ]:  # fmt: skip
            name = f"{scheme}, {f'{tokens} tokens' if tokens else 'rounded'}"
            out, began = Path(folder) / name, time.perf_counter()
            done = _core.quantize_checkpoint(
                hub.EMBEDDED,
                out,
                scheme=scheme,
                group_size=32,
                progress=None,
                calibrate=[text] if tokens else [],
                calibration_length=2048,
                calibration_tokens=tokens,
            )
            seconds, facts = time.perf_counter() - began, json.loads(done)
            llm = models[name] = LLM(out, device="cpu")
            loss, change, spread, divergence = held_out(llm, plain, texts)
            read = facts.get("calibration")
            outputs = f"{read['weighted_error']:.3%}" if read else ""
            print(
                f"{name:24}{outputs:>9}{facts['relative_rms_error']:9.2%}{np.exp(loss):12.5f}"
                f"{change:+11.5f} ± {spread:.5f}{divergence:12.6f}{seconds:9.1f}",
                flush=True,
            )
            if read:
                print(
                    f"    rounded, on the same text: {read['rounded_weighted_error']:.3%} of the outputs; ",
                    end="",
                )
                print(f"{read['num_calibrated']} matrices calibrated, {read['num_fallen_back']} fell back")
        if options.tasks:
            kept = [
                "published",
                "int4, rounded",
                "int4, 32768 tokens",
                "mixed, rounded",
                "mixed, 32768 tokens",
            ]
            print(f"\n{'':26}" + "".join(f"{name:>22}" for name in kept))
            for task in tasks.SHORT:
                found = [measure(models[name], task, num_items=options.tasks)[0] for name in kept]
                cells = "".join(f"{f'{r.accuracy:.1%}  {r.perplexity:.4f}':>22}" for r in found)
                print(f"{task:26}{cells}", flush=True)


if __name__ == "__main__":
    main()
