"""How far logits are from others, and what bf16 arithmetic costs in each (`make_noise.py`)."""

import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("bf16_noise.json")


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def compare(pairs):
    """Over all rows of pairs of logits `[rows, vocab]`, of the first against the second: the root-mean-square difference
    over the deviation; mean and 99th percentile of the regret of the most likely token, in log-probability by the second;
    mean and 99th percentile of the difference of the log-probabilities of the tokens that the second holds likely (above
    0.001). The worst regret too, which is a matter of luck: for reading, not for judging."""
    squares, values, regrets, apart = [], [], [], []
    for got, want in pairs:
        a, b = log_softmax(got), log_softmax(want)
        squares.append(((got.astype(np.float64) - want) ** 2).mean())
        values.append(want.std())
        regrets.append(b.max(-1) - b[np.arange(len(b)), got.argmax(-1)])
        apart.append(np.abs(a - b)[b > np.log(1e-3)])
    regret, difference = np.concatenate(regrets), np.concatenate(apart)
    return {
        "distance": float(np.sqrt(np.mean(squares)) / np.mean(values)),
        "regret_mean": float(regret.mean()),
        "regret_p99": float(np.percentile(regret, 99)),
        "mean": float(difference.mean()),
        "p99": float(np.percentile(difference, 99)),
        "regret_worst": float(regret.max()),
    }


def recorded(name):
    """What Transformers in bf16 costs."""
    return json.loads(FILE.read_text())[name]


def within(found, name, measures=("distance", "mean", "p99")):
    """Whether a cost is of the size of Transformers' own: at most one and a half times, and a little more where that is
    next to nothing.

    The regret is that of few tokens, most of which cost nothing: it is judged over all goldens together ("goldens")."""
    noise = recorded(name)
    slack = {"distance": 0.0, "mean": 1e-3, "p99": 1e-2}
    return all(found[k] <= 1.5 * noise[k] + slack.get(k, 0.0) for k in measures)
