"""Error feedback in numpy: `gptq.safetensors`.

    python tests/golden/make_gptq.py

The algorithm of GPTQ (Frantar et al., arXiv 2210.17323) as the paper has it, in float64, one block of all columns: the
Hessian of correlated inputs with 1 % of its mean diagonal, the Cholesky factor of its inverse, column after column. A
group's bf16 scale is the best of eight by squared error, each error over the square of the factor's diagonal. Of each
group size: `weight`, `inputs`, and the `numbers` and `scales` that come of them.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import quantised as q
import tiny

OUT = Path(__file__).resolve().parent / "gptq.safetensors"


def bf16(x):
    return q.numbers(q.tensor("BF16", np.asarray(x, np.float32)))


def gptq(weight, inputs, group):
    """Numbers and scales of a matrix [rows, k] for inputs [tokens, k], in float64."""
    w, x = weight.astype(np.float64), inputs.astype(np.float64)
    hessian = x.T @ x
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    numbers, scales = np.zeros_like(w), []
    for column in range(w.shape[1]):
        if column % group == 0:
            rest, cost = w[:, column : column + group], np.diag(upper)[column : column + group] ** -2
            most = np.abs(rest).max(1)
            steps = bf16(most[:, None] * (1 - np.arange(8) / 32) / 7).astype(np.float64)
            nearest = np.clip(np.rint(rest[:, None] / steps[..., None]), -8, 7) * steps[..., None]
            best = (cost * (rest[:, None] - nearest) ** 2).sum(-1).argmin(1)
            scales.append(steps[np.arange(len(w)), best])
        numbers[:, column] = np.clip(np.rint(w[:, column] / scales[-1]), -8, 7) * scales[-1]
        error = (w[:, column] - numbers[:, column]) / upper[column, column]
        w[:, column:] -= error[:, None] * upper[column, column:]
    return numbers, np.stack(scales, 1)


def main():
    rng = np.random.default_rng(20261122)
    found = {}
    for group, rows, k, tokens in [(32, 12, 96, 150), (64, 6, 192, 200), (128, 5, 256, 150)]:
        weight = bf16(0.03 * rng.standard_normal((rows, k)) * np.where(rng.random((rows, k)) < 0.02, 5, 1))
        common = rng.standard_normal((tokens, 12)) @ rng.standard_normal((12, k))
        inputs = bf16((common + rng.standard_normal((tokens, k))) * np.exp(0.5 * rng.standard_normal(k)))
        numbers, scales = gptq(weight, inputs, group)
        # A scale of 8 bits times a code of 4 is exact in float32.
        parts = {"weight": weight, "inputs": inputs, "scales": scales, "numbers": numbers.astype(np.float32)}
        for name, values in parts.items():
            found[f"{group}.{name}"] = q.tensor("F32" if name == "numbers" else "BF16", values)
    tiny.write_safetensors(OUT, found)


if __name__ == "__main__":
    main()
