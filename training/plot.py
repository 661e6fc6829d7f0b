"""Draws the run that log.json tells of: losses and held-out accuracies over the tokens seen.

python training/plot.py LOG.json PICTURE.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt


def main(log: str, picture: str) -> None:
    run = json.loads(Path(log).read_text())
    per_step = run["arguments"]["tokens"] / 1e6
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    millions = [e["tokens"] / 1e6 for e in run["steps"]]
    left.plot(millions, [e["loss"] for e in run["steps"]], label="next token", linewidth=1.2)
    left.plot(millions, [e["mtp_loss"] for e in run["steps"]], label="MTP: the one after", linewidth=1.2)
    left.set(yscale="log", xlabel="million tokens", ylabel="loss (weighted)")
    left.legend(frameon=False)
    seen = [e["step"] * per_step for e in run["evaluations"]]
    for task in run["evaluations"][-1]["accuracy"]:
        right.plot(
            seen, [100 * e["accuracy"][task] for e in run["evaluations"]], marker=".", linewidth=1, label=task
        )
    drafts = [100 * e["mtp_agreement"] for e in run["evaluations"]]
    right.plot(seen, drafts, "k:", linewidth=1, label="MTP agreement")
    right.set(xlabel="million tokens", ylabel="held-out, exact answers (%)", ylim=(0, 101))
    right.legend(frameon=False, fontsize=7, ncols=2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{run['params'] / 1e6:.2f} M parameters, {run['card']}, {run['seconds'] / 60:.1f} min", fontsize=9
    )
    plt.rcParams["svg.hashsalt"] = "qwen35rs"
    plt.rcParams["svg.fonttype"] = "none"  # letters, not their outlines
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
