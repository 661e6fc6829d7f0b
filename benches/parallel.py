"""Ranks that share a model, on the GPUs of one machine: first whether they say what one says, then how fast they are.

    python benches/parallel.py [--output FILE] [--skip-parity] [--only NAME ...]

Runs tests/gpu/test_shared_net.py, then every row of the table below in a process of its own, on random weights of full size: the
model on one card where it fits and on two. Then the sums over ranks alone (benches/all_reduce.py). JSON with the cards, the
driver and the commit.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Name: model, quantization, ranks, whether by experts, sequences of decode steps, tokens of prompts.
TABLE = {
    "122B bf16, 2 cards": ("122b-a10b", None, 2, False, (1, 16, 64), (8192,)),
    "122B fp8, 1 card": ("122b-a10b", "fp8", 1, False, (1, 16, 64), (8192,)),
    "122B fp8, 2 cards": ("122b-a10b", "fp8", 2, False, (1, 16, 64), (8192,)),
    "122B fp8, 2 cards, expert parallel": ("122b-a10b", "fp8", 2, True, (1, 16, 64), (8192,)),
    "122B int4, 1 card": ("122b-a10b", "int4", 1, False, (1, 16, 64), (8192,)),
    "122B int4, 2 cards": ("122b-a10b", "int4", 2, False, (1, 16, 64), (8192,)),
    "122B int4, 2 cards, expert parallel": ("122b-a10b", "int4", 2, True, (1, 16, 64), (8192,)),
}
RUN = """
import json, sys, time
from qwen35rs import LLM
from qwen35rs.speed import decode, measured, prefill, room_for
model, quantization, ranks, by_experts, batches, prompts = json.loads(sys.argv[1])
rooms = [room_for(size, 1024, 64, 8192) for size in batches]
start = time.perf_counter()
length = max(*rooms, *(n + 1 for n in prompts))
llm = LLM(model, load_format="dummy", device="cuda", quantization=quantization, tensor_parallel_size=ranks,
          expert_parallel=by_experts, max_num_seqs=max(batches), max_num_batched_tokens=8192, max_model_len=length)
loaded = time.perf_counter() - start
floors = measured(llm)
facts = {"device": llm.device, "load_seconds": round(loaded, 2), "measured": floors, "memory": llm.memory}
rows = {"decode": [decode(llm, size, 1024).facts(floors) for size in batches]}
rows["prefill"] = [prefill(llm, size).facts(floors) for size in prompts]
print(json.dumps(facts | rows))
"""


def say(*command):
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else None


def measure(name):
    what = json.dumps(TABLE[name])
    done = subprocess.run([sys.executable, "-c", RUN, what], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def show(name, found):
    if "error" in found:
        return f"{name}: {found['error']}"
    lines = [f"{name}: loaded in {found['load_seconds']} s"]
    for row in found["decode"]:
        lines.append(
            f"  {row['batch']:>3} sequences {1e3 * row['seconds']:8.3f} ms {row['tokens_per_second']:9.1f} tokens/s"
            f" {row['share_of_floor']:6.1%} of the floor"
        )
    for row in found["prefill"]:
        lines.append(
            f"  prompt of {row['num_tokens']} {1e3 * row['seconds']:8.1f} ms {row['share_of_floor'] or 0:6.1%}"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--skip-parity", action="store_true")
    parser.add_argument("--only", nargs="+", choices=TABLE, default=list(TABLE), metavar="NAME")
    args = parser.parse_args()
    found = {
        "cards": say("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "commit": os.environ.get("COMMIT") or say("git", "rev-parse", "--short", "HEAD"),
        "command": " ".join(["python", "benches/parallel.py", *sys.argv[1:]]),
    }
    if not args.skip_parity:
        tests = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            str(ROOT / "tests" / "gpu" / "test_shared_net.py"),
        ]
        done = subprocess.run(tests, check=False, capture_output=True, text=True, cwd=ROOT)
        found["parity"] = (done.stdout.strip().splitlines() or ["no output"])[-1]
        print("parity:", found["parity"], flush=True)
        if done.returncode != 0:
            print(done.stdout[-4000:])
            return 1
    found["rows"] = {}
    for name in args.only:
        found["rows"][name] = measure(name)
        print(show(name, found["rows"][name]), flush=True)
        if args.output:
            args.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
