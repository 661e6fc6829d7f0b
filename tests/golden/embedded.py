"""The 50 held-out questions whose answers by Transformers are recorded for the embedded model."""

from itertools import islice
from pathlib import Path

from qwen35rs import Tokenizer, hub, tasks

FILE = Path(__file__).with_name("embedded.npz")
SEED, NUM = 50, 50


def questions():
    """As many of each task: its name, the item, the ids of its prompt and of its expected answer."""
    tokenizer, found = Tokenizer(hub.EMBEDDED), []
    for i, task in enumerate(tasks.SUITE):
        num = NUM // len(tasks.SUITE) + (i < NUM % len(tasks.SUITE))
        for item in islice(tasks.items(task, seed=SEED), num):
            ids = tokenizer.apply_chat_template(
                item.messages, tools=item.tools, enable_thinking=item.thinking, add_generation_prompt=True
            )
            found.append((task, item, ids, tokenizer.encode(item.completion)))
    return found
