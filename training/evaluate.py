"""Held-out accuracy without generating: an answer counts where every token of the expected one is the model's first
choice after those before it, which is when greedy decoding gives that text. Other right answers count as wrong."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import net as network
import torch
import torch.nn.functional as F


def place(batch: dict[str, Any], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Puts a batch on the device and makes it the row that is computed; tokens, weights, positions."""
    names = ("tokens", "weights", "positions", "cu_seqlens", "chunks")
    tokens, weights, positions, cu, chunks = (batch[k].to(device, non_blocking=True) for k in names)
    bounds = batch["cu_seqlens"].tolist()
    network.set_row(network.Row(positions, cu, cu.int(), chunks, bounds, batch["longest"]))
    return tokens, weights, positions


@torch.no_grad()
def evaluate(net: network.Net, batches: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """By task and kind: questions, exact answers; and how often the MTP module's draft is what the model says."""
    right: dict[tuple[str, str], list[bool]] = defaultdict(list)
    drafts = agreed = 0
    losses: list[torch.Tensor] = []
    for batch in batches:
        tokens, _, positions = place(batch, device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            h, m, _ = net.hidden(tokens, positions)
            head = net.lm.lm_head.weight
            said, drafted, nll = [], [], []
            for at in range(0, len(h), 16384):
                logits = F.linear(h[at : at + 16384], head).float()
                said.append(logits.argmax(-1))
                target = F.pad(tokens, (0, 1))[at + 1 : at + 1 + len(logits)].long()
                nll.append(F.cross_entropy(logits, target, reduction="none"))
                drafted.append(F.linear(m[at : at + 16384], head).argmax(-1))
        # said[t] is the model's token t + 1, drafted[t] the draft of token t + 2.
        one, two, lost = torch.cat(said).cpu(), torch.cat(drafted).cpu(), torch.cat(nll).cpu()
        truth = batch["tokens"].long()
        for task, kind, first, end in batch["spans"]:
            right[task, kind].append(bool((one[first - 1 : end - 1] == truth[first:end]).all()))
            drafts += end - first
            agreed += int((two[first - 2 : end - 2] == one[first - 1 : end - 1]).sum())
            losses.append(lost[first - 1 : end - 1])
    by_task: dict[str, list[bool]] = defaultdict(list)
    for (task, _), found in right.items():
        by_task[task] += found
    return {
        "accuracy": {task: sum(x) / len(x) for task, x in by_task.items()},
        "num": {task: len(x) for task, x in by_task.items()},
        "kinds": {f"{task}: {kind}": [sum(x), len(x)] for (task, kind), x in sorted(right.items())},
        "mtp_agreement": agreed / max(1, drafts),
        "answer_loss": float(torch.cat(losses).mean()),
    }
