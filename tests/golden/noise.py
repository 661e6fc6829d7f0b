"""How far logits are from others, in four measures, and what bf16 arithmetic costs in each (`make_noise.py`)."""

import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("bf16_noise.json")


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def compare(got, want):
    """Of logits `[rows, vocab]`: the root-mean-square difference over the deviation of `want`; the worst regret of a
    chosen token, in log-probability by `want`; mean and 99th percentile of the difference of the log-probabilities of
    the tokens that `want` holds likely (above 0.001)."""
    a, b = log_softmax(got), log_softmax(want)
    error = got.astype(np.float64) - want
    regret = b.max(-1) - b[np.arange(len(b)), got.argmax(-1)]
    apart = np.abs(a - b)[b > np.log(1e-3)]
    return {
        "distance": float(np.sqrt((error**2).mean()) / want.std()),
        "regret": float(regret.max()),
        "mean": float(apart.mean()),
        "p99": float(np.percentile(apart, 99)),
    }


def worst(several):
    """The largest of each measure."""
    several = list(several)
    return {name: max(one[name] for one in several) for name in several[0]}


def recorded(name):
    """What Transformers in bf16 costs."""
    return json.loads(FILE.read_text())[name]


def within(found, name):
    """Whether a cost is of the size of Transformers' own: one and a half times, and for the regret of a single token, a
    matter of luck, a tenth of a nat on top."""
    noise = recorded(name)
    slack = {"regret": 0.1, "mean": 1e-3, "p99": 1e-2}
    return all(found[k] <= 1.5 * noise[k] + slack.get(k, 0) for k in noise)
