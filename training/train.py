"""Trains the embedded model: one command, one GPU, under 20 minutes. See README.md beside this.

python training/train.py --out DIR
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import checkpoint
import kernels
import mix
import net as network
import torch
from evaluate import evaluate, place
from optimizer import Optimizer
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", required=True, help="directory of the checkpoint and of log.json")
    parser.add_argument("--tokenizer", help="directory with the tokenizer's files; made where it is missing")
    parser.add_argument(
        "--steps", type=int, default=4265, help="0: as many as --budget allows, from a measurement"
    )
    parser.add_argument("--budget", type=float, default=16.0, help="minutes, from start to end")
    parser.add_argument("--tokens", type=int, default=131072, help="of a step")
    parser.add_argument("--longest", type=int, default=4000, help="recall text, in tokens")
    parser.add_argument("--prompt-weight", type=float, default=0.03, help="of what an assistant does not say")
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument(
        "--stable", type=float, default=0.2, help="share of the run before the rate falls to zero"
    )
    parser.add_argument("--decay", type=float, default=0.05, help="weight decay of the matrices")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--mtp-weight", type=float, default=0.3)
    parser.add_argument("--balance-weight", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="stop after these; the same command goes on"
    )
    parser.add_argument("--state", help="file to stop and go on with")
    parser.add_argument("--evaluations", type=int, default=8)
    parser.add_argument("--questions", type=int, default=96, help="held out, of each task, in an evaluation")
    parser.add_argument("--final-questions", type=int, default=512)
    parser.add_argument("--changes", default="{}", help="JSON: changes of text_config")
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def rate(args: argparse.Namespace, step: int) -> float:
    """Warm-up, plateau, straight to zero."""
    if step < args.warmup:
        return float(args.lr * (step + 1) / args.warmup)
    left = (args.steps - step) / (args.steps * (1 - args.stable))
    return float(args.lr * min(1.0, left))


def error_of_kernels(
    net: network.Net, args: argparse.Namespace, tokenizer: Path, device: torch.device
) -> float:
    """The largest relative difference of a matrix's gradient between the fast delta rule and Transformers' own."""
    batch = mix.Batches(tokenizer, 4096, 1000, args.seed)[500]
    fast, compiled, gradients = network.fla_delta_rule, net.compiled, []
    net.compiled = False
    for rule in (None, fast):
        network.fla_delta_rule = rule
        forward(net, args, batch, device)[0].backward()
        gradients.append([p.grad for p in net.parameters()])
        for p in net.parameters():
            p.grad = None
    net.compiled = compiled
    pairs = [(a, b) for a, b in zip(*gradients, strict=True) if a is not None and a.ndim >= 2]
    return max(float((a - b).norm() / a.norm()) for a, b in pairs)


def measure(net: network.Net, args: argparse.Namespace, tokenizer: Path, device: torch.device) -> float:
    """Seconds of a step, on batches of the end of the run, after everything is compiled. Leaves the weights alone."""
    data = mix.Batches(tokenizer, args.tokens, 1000, args.seed, args.longest, args.prompt_weight)
    batches = [data[i] for i in range(900, 912)]
    optimizer = Optimizer(net, args.optimizer == "muon", args.decay)
    for i in range(36):
        if i == 12:
            if device.type == "cuda":
                torch.cuda.synchronize()
            begun = time.time()
        forward(net, args, batches[i % 12], device)[0].backward()
        optimizer.step(0.0)
        if i == 0:
            print("first step done", flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.time() - begun) / 24


def forward(
    net: network.Net, args: argparse.Namespace, batch: dict[str, Any], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and its three parts."""
    tokens, weights, positions = place(batch, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        one, two, balance = net.losses(tokens, weights, positions)
        loss = one + args.mtp_weight * two + args.balance_weight * balance
    return loss, torch.stack([one.detach(), two.detach(), balance.detach()])


def as_text(content: dict[str, Any]) -> str:
    """JSON, an entry of a list on each line."""
    lines = []
    for key, value in content.items():
        entries = isinstance(value, list) and value
        shown = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if entries else json.dumps(value)
        lines.append(f"{json.dumps(key)}: {shown}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


class Log:
    """log.json, written anew at every entry, and lines on the standard output."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self.content = path, {**head, "steps": [], "evaluations": []}

    def add(self, kind: str, entry: dict[str, Any]) -> None:
        self.content[kind].append(entry)
        self.path.write_text(as_text(self.content))
        shown = {k: v for k, v in entry.items() if k not in ("kinds", "num")}
        print(json.dumps(shown), flush=True)


def main() -> None:
    args = arguments()
    begun = time.time()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = checkpoint.make_tokenizer(args.tokenizer or out)
    text = checkpoint.text_config(**json.loads(args.changes))
    net = network.Net(Qwen3_5MoeTextConfig(**text)).to(device)
    num_params = sum(p.numel() for p in net.parameters())
    optimizer = Optimizer(net, args.optimizer == "muon", args.decay)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{num_params:,} parameters on {card}, kernels of the delta rule: {net.kernels}", flush=True)
    if net.kernels != "none":
        error = error_of_kernels(net, args, tokenizer, device)
        print(f"kernels differ by {error:.3f} after {time.time() - begun:.0f} s", flush=True)
        if not error < 0.2:
            kernels.time_launches()
            error = error_of_kernels(net, args, tokenizer, device)
            print(f"with timed launches by {error:.3f} after {time.time() - begun:.0f} s", flush=True)
    if not args.no_compile and device.type == "cuda":
        net.compile()
    state = Path(args.state) if args.state else None
    saved: dict[str, Any] | None = None
    if state is not None and state.exists():
        saved = torch.load(state, map_location=device, weights_only=False)
        args.steps = saved["steps"]
    if args.steps == 0:
        each = measure(net, args, tokenizer, device)
        args.steps = int((60 * args.budget - (time.time() - begun) - 32) / (1.02 * each))
        print(f"{each * 1e3:.1f} ms a step after {time.time() - begun:.0f} s: {args.steps} steps", flush=True)
        optimizer = Optimizer(net, args.optimizer == "muon", args.decay)
    head = {
        "arguments": {k: v for k, v in vars(args).items() if k not in ("out", "tokenizer", "state")},
        "card": card,
        "torch": torch.__version__,
        "kernels": net.kernels,
        "params": num_params,
        "start_seconds": round(time.time() - begun, 1),
    }
    log = Log(out / "log.json", head)

    step = seconds = 0
    if saved is not None:
        net.load_state_dict(saved["net"])
        optimizer.load(saved["optimizer"])
        step, seconds, log.content = saved["step"], saved["seconds"], saved["log"]
        print(f"goes on at step {step} of {args.steps}", flush=True)

    data = mix.Batches(tokenizer, args.tokens, args.steps, args.seed, args.longest, args.prompt_weight)
    loader = torch.utils.data.DataLoader(
        data,
        batch_size=None,
        sampler=range(step, args.steps),
        num_workers=args.workers,
        prefetch_factor=6 if args.workers else None,
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)  # starts the workers
    questions = mix.held_out(tokenizer, max(args.tokens, 8192), args.questions, seed=args.seed)
    every = max(1, args.steps // args.evaluations)
    clock, waited, last = time.time(), 0.0, step
    sums = torch.zeros(4, device=device)
    while step < args.steps and time.time() - begun < 60 * args.minutes:
        before = time.time()
        batch = next(batches)
        waited += time.time() - before
        loss, parts = forward(net, args, batch, device)
        loss.backward()
        lr = rate(args, step)
        norm = optimizer.step(lr)
        sums += torch.cat([parts, norm.nan_to_num(0.0, 0.0).view(1)])
        step += 1
        if step % 100 == 0 or step == args.steps or step <= 3:
            num = step - last
            means = (sums / num).tolist()  # waits for the device
            passed = time.time() - clock
            seconds += passed
            entry = {
                "step": step,
                "tokens": step * args.tokens,
                "seconds": round(seconds, 1),
                "loss": round(means[0], 4),
                "mtp_loss": round(means[1], 4),
                "balance": round(means[2], 3),
                "gradient": round(means[3], 3),
                "rate": round(lr, 6),
                "tokens_per_s": round(num * args.tokens / passed),
                "waited": round(waited / passed, 2),
            }
            log.add("steps", entry)
            clock, waited, last = time.time(), 0.0, step
            sums.zero_()
            if not math.isfinite(means[0]):
                sys.exit("the loss is not finite")
        if step % every == 0 and step < args.steps:
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.time()
            log.add("evaluations", {"step": step, **evaluate(net, questions, device)})
            clock += time.time() - started  # is no time of the steps

    del batches, loader
    if state is not None:
        kept = {"step": step, "steps": args.steps, "seconds": seconds, "log": log.content}
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state(), **kept}, state)
    for p in net.parameters():  # as the file has them
        p.data = p.data.bfloat16().float()
    if step == args.steps:
        questions = mix.held_out(tokenizer, max(args.tokens, 8192), args.final_questions, seed=args.seed + 1)
    log.add("evaluations", {"step": step, **evaluate(net, questions, device)})
    written = checkpoint.write(out, net.lm, net.mtp, text, tokenizer)
    size = (out / "model.safetensors").stat().st_size
    log.content["seconds"] = round(time.time() - begun, 1)
    log.path.write_text(as_text(log.content))
    done = "done" if step == args.steps else "stopped"
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    summary = f"{done} at step {step}: {written:,} parameters, {size:,} bytes, {time.time() - begun:.0f} s, {memory:.1f} GiB"
    print(summary, flush=True)


if __name__ == "__main__":
    main()
