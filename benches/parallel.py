"""Ranks that share a model, on the GPUs of one machine: whether they say what one says, and how fast they are.

    python benches/parallel.py [--output FILE] [--steps parity tasks speed sums] [--only NAME ...]

parity: the tests that want two cards. tasks: the embedded model's share of right answers, on one card and on two. speed:
every row of the table below in a process of its own, on random weights of full size, on one card where they fit and on two.
sums: those over ranks alone (benches/all_reduce.py). JSON with the cards, the driver and the commit.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from origin import origin

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("parity", "tasks", "speed", "sums")
PATIENCE = 300  # seconds for what may wait for another card
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


def measure(name):
    what = json.dumps(TABLE[name])
    command = [sys.executable, "-c", RUN, what]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return {"error": f"it did not end within {PATIENCE} s"}
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


def parity():
    """Every test that wants two cards; the sums, the net and NCCL."""
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "two_gpus", str(ROOT / "tests" / "gpu")]
    done = subprocess.run(tests, check=False, capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.strip().splitlines() or ["no output"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    found = {"result": lines[-1], "code": done.returncode, "failed": failed}
    print("\n".join(["parity:", *found["failed"], found["result"]]), flush=True)
    return found


def tasks(device, questions):
    """Right answers of the embedded model, of so many questions of each task, on one rank and on two, in each precision."""
    found = {}
    for precision in (None, "fp8", "int4"):
        for layout in (
            [],
            ["--tensor-parallel-size", "2"],
            ["--tensor-parallel-size", "2", "--expert-parallel"],
        ):
            quantised = [] if precision is None else ["--quantization", precision]
            name = " ".join([precision or "as stored", *(part.removeprefix("--") for part in layout)])
            command = [sys.executable, "-m", "qwen35rs", "bench", "tasks", "--json", "--n", str(questions)]
            done = subprocess.run(
                [*command, "--device", device, *layout, *quantised],
                check=False,
                capture_output=True,
                text=True,
            )
            if done.returncode != 0:
                found[name] = {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
            else:
                found[name] = {
                    task: row["num_correct"] for task, row in json.loads(done.stdout)["tasks"].items()
                }
            print(f"tasks, {name}: {found[name]}", flush=True)
    return found


def sums():
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sums.json"
        command = [sys.executable, str(ROOT / "benches" / "all_reduce.py"), "--json", str(file)]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired as cut:
            done = subprocess.CompletedProcess(command, 1, (cut.stdout or b"").decode(), "it did not end")
        print(done.stdout, flush=True)
        if done.returncode == 0:
            return json.loads(file.read_text())
        return {"error": done.stderr.strip().splitlines()[-1:], "shown": done.stdout.splitlines()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="a JSON file, written after each step")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--only", nargs="+", choices=TABLE, default=list(TABLE), metavar="NAME")
    parser.add_argument("--questions", type=int, default=64, help="of each task (default: 64)")
    parser.add_argument("--device", default="cuda", help="of the tasks (default: cuda)")
    args = parser.parse_args()
    found = origin()

    def keep():
        if args.output:
            args.output.write_text(json.dumps(found, indent=1) + "\n")

    for step in args.steps:
        if step == "parity":
            found["parity"] = parity()
        elif step == "tasks":
            found["tasks"] = tasks(args.device, args.questions)
        elif step == "sums":
            found["sums"] = sums()
        else:
            found["rows"] = {}
            for name in args.only:
                found["rows"][name] = measure(name)
                print(show(name, found["rows"][name]), flush=True)
                keep()
        keep()
    parts = [*found.get("tasks", {}).values(), *found.get("rows", {}).values(), found.get("sums", {})]
    return 1 if found.get("parity", {}).get("code") or any("error" in part for part in parts) else 0


if __name__ == "__main__":
    sys.exit(main())
