"""How far the delta rule drifts where its state is rounded to f16 after each token.

python benches/f16_states.py [--steps N] [--seed N]

One head of 128 x 128, random unit keys that share a direction, values of a few magnitudes, write strengths around a
half, and one decay for each row of the table. The recurrence in f32, once with its state rounded to f16 (what
state_dtype="float16" does) and once as it is, against the same in f64: error of the outputs of the last eighth of the
steps, and of the last state, as ||found - want|| / ||want||.
"""

from __future__ import annotations

import argparse

import numpy as np

DECAYS = (0.9, 0.99, 0.999, 0.9999, 1.0)


def rounded(state: np.ndarray) -> np.ndarray:
    return np.clip(state, -65504, 65504).astype(np.float16).astype(np.float32)


def distance(found: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))


def drift(steps: int, decay: float, seed: int) -> list[float]:
    rng = np.random.default_rng(seed)
    # f32 with rounding, f32, f64
    states = [np.zeros((128, 128), dtype) for dtype in (np.float32, np.float32, np.float64)]
    outputs: list[list[np.ndarray]] = [[], [], []]
    shared = rng.standard_normal(128)
    for step in range(steps):
        q, k = rng.standard_normal((2, 128)) + 0.5 * shared
        q, k = q / np.linalg.norm(q) / 128**0.5, k / np.linalg.norm(k)
        v = rng.standard_normal(128) * np.exp(rng.standard_normal())
        beta = 1 / (1 + np.exp(-rng.standard_normal()))
        for i, state in enumerate(states):
            kt, qt, vt = k.astype(state.dtype), q.astype(state.dtype), v.astype(state.dtype)
            state *= state.dtype.type(decay)
            state += np.outer(kt, state.dtype.type(beta) * (vt - kt @ state))
            if step >= steps - steps // 8:
                outputs[i].append(qt @ state)
            if i == 0:
                state[:] = rounded(state)
    want = np.array(outputs[2])
    return [
        *(distance(np.array(outputs[i]), want) for i in (0, 1)),
        *(distance(states[i], states[2]) for i in (0, 1)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, action="append")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{'steps':>6} {'decay':>7}  outputs: {'f16':>8} {'f32':>8}   state: {'f16':>8} {'f32':>8}")
    for steps in options.steps or [4096, 32768]:
        for decay in DECAYS:
            row = drift(steps, decay, options.seed)
            print(
                f"{steps:>6} {decay:>7}           {row[0]:8.1e} {row[1]:8.1e}          {row[2]:8.1e} {row[3]:8.1e}"
            )


if __name__ == "__main__":
    main()
