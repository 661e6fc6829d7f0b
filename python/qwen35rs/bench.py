"""Measures a model on the held-out questions of `qwen35rs.tasks`, through the public API."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from . import tasks
from ._core import RequestError
from .sampling import SamplingParams

if TYPE_CHECKING:
    from .llm import LLM

MAX_TOKENS = 512
"""Most tokens of an answer; the longest expected one has fewer."""

MAX_ITEMS = 100_000
"""Most questions of a task: they are all asked at once."""


@dataclass
class TaskResult:
    """What a model made of one task."""

    task: str
    num_items: int
    num_correct: int
    perplexity: float
    """Of the expected answers after their prompts, per token; what follows from the model's logits."""
    mtp_agreement: float | None = None
    """Share of the tokens of the model's own answers that the multi-token-prediction module had drafted; None for an
    `LLM` without it."""

    @property
    def accuracy(self) -> float:
        """Share of the answers that were right."""
        return self.num_correct / self.num_items

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy (Wilson 1927)."""
        n, p, z = self.num_items, self.accuracy, 1.959964
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - reach), min(1.0, middle + reach)


def measure(
    llm: LLM,
    names: str | Iterable[str] | None = None,
    *,
    num_items: int = 100,
    seed: int = 0,
    done: Callable[[TaskResult], None] | None = None,
) -> list[TaskResult]:
    """Asks held-out questions, greedily.

    Args:
        names: tasks of ``qwen35rs.tasks.SUITE``, or one of them; all by default.
        num_items: questions of each.
        seed: which questions; the same seed, the same questions.
        done: called with each task's result as soon as it is there.

    Raises RequestError for an unknown task, no questions or too many, or a model whose context is too short for one.
    """
    wanted = [names] if isinstance(names, str) else list(tasks.SUITE if names is None else names)
    for name in wanted:
        if name not in tasks.SUITE:
            raise RequestError(f"task: found {name!r}; allowed: {', '.join(map(repr, tasks.SUITE))}")
    if not isinstance(num_items, (int, np.integer)) or not 1 <= num_items <= MAX_ITEMS:
        raise RequestError(f"num_items: found {num_items!r}; allowed: an integer from 1 to {MAX_ITEMS}")
    results = []
    for name in wanted:
        results.append(_measure(llm, name, num_items, seed))
        if done is not None:
            done(results[-1])
    return results


def _measure(llm: LLM, name: str, num_items: int, seed: int) -> TaskResult:
    items = list(islice(tasks.items(name, seed=seed), num_items))
    prompts = [prompt_of(llm, item) for item in items]
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    # Special tokens are no part of an answer's text; a turn that does not end is no answer.
    answers = [result.outputs[0] for result in llm.generate(prompts, params)]
    right = [
        answer.finish_reason == "stop" and item.check(answer.text)
        for item, answer in zip(items, answers, strict=True)
    ]
    loss = [_losses(llm, prompt, item.completion) for prompt, item in zip(prompts, items, strict=True)]
    agreement = None
    if llm.has_mtp:
        drafted = [_drafted(llm, p, answer.token_ids) for p, answer in zip(prompts, answers, strict=True)]
        agreement = float(np.concatenate(drafted).mean())
    return TaskResult(name, num_items, sum(right), float(np.exp(np.concatenate(loss).mean())), agreement)


def prompt_of(llm: LLM, item: tasks.Item) -> str:
    """A question, in the chat template."""
    text: Any = llm.tokenizer.apply_chat_template(
        item.messages,
        tools=item.tools,
        add_generation_prompt=True,
        tokenize=False,
        enable_thinking=item.thinking,
    )
    assert isinstance(text, str)
    return text


def _losses(llm: LLM, prompt: str, completion: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Negative log-probabilities, in nats, of the completion's tokens."""
    before, after = llm.tokenizer.encode(prompt), llm.tokenizer.encode(completion)
    logits = llm.logits(before + after)[len(before) - 1 : -1, : len(llm.tokenizer)].astype(np.float64)
    largest = logits.max(axis=1)
    total = np.log(np.exp(logits - largest[:, None]).sum(axis=1)) + largest
    return np.asarray(total - logits[np.arange(len(after)), after])


def _drafted(llm: LLM, prompt: str, said: list[int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether each token that the model said was the module's first choice, one token earlier."""
    before = llm.tokenizer.encode(prompt)
    # Row t is of token t + 2: the first that counts is two before the answer, and the last token has no row.
    logits = llm.mtp_logits([*before, *said[:-1]])[len(before) - 2 :, : len(llm.tokenizer)]
    return np.asarray(logits.argmax(axis=1) == said)
