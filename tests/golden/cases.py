"""The committed goldens as the tests see them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parent / "data"
CASES = sorted(path.parent.name for path in DATA.glob("*/expected.npz"))
assert len(CASES) == 16, f"the goldens are incomplete: {CASES}"


@dataclass
class Prompt:
    tokens: list  # the prompt
    greedy: list  # what Transformers continues it with
    rows: np.ndarray  # positions of `sequence` whose logits are kept
    logits: np.ndarray  # [rows, vocab], float32 arithmetic
    logits_bf16: np.ndarray | None  # the same from a bf16 run of Transformers

    @property
    def sequence(self):
        """Every token that has logits: the prompt, and the continuation but for its last token."""
        return self.tokens + self.greedy[:-1]


class Golden:
    """One case: its checkpoint directory and its prompts."""

    # Of the largest logit magnitude. Transformers itself, in float32, is up to 3.2e-5 from float64.
    TOLERANCE = 2e-4

    def __init__(self, name):
        self.path = DATA / name

    @cached_property
    def prompts(self):
        saved = np.load(self.path / "expected.npz")
        prompts = []
        while f"prompt_{len(prompts)}" in saved:
            i = len(prompts)
            prompts.append(
                Prompt(
                    saved[f"prompt_{i}"].tolist(),
                    saved[f"greedy_{i}"].tolist(),
                    saved[f"rows_{i}"],
                    saved[f"logits_{i}"],
                    saved.get(f"logits_bf16_{i}"),
                )
            )
        return prompts
