"""Trains several variants at once, one on each GPU of the machine, and prints what each reached.

python training/sweep.py --out DIR --common "--budget 9.3" "--lr 4e-3" "--lr 6e-3 --seed 2"

It stays until the last has ended. What a variant prints goes to DIR/N.log, its checkpoint to DIR/N.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return lines[-1][:200] if lines else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True)
    parser.add_argument("--common", default="", help="arguments of train.py for all")
    parser.add_argument("variants", nargs="+", help="arguments of train.py for one")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("train.py")
    running: dict[int, subprocess.Popen[bytes]] = {}
    for i, variant in enumerate(args.variants):
        command = [sys.executable, str(script), "--out", str(out / str(i))]
        command += shlex.split(args.common) + shlex.split(variant)
        log = (out / f"{i}.log").open("wb")
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(i), "PYTHONUNBUFFERED": "1"}
        running[i] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    shown = time.time()
    while running:
        time.sleep(1)
        ended = [i for i, process in running.items() if process.poll() is not None]
        for i in ended:
            print(f"{i} ended with {running.pop(i).returncode}: {last_line(out / f'{i}.log')}", flush=True)
        if time.time() - shown > 30:
            shown = time.time()
            for i in running:
                print(f"{i}: {last_line(out / f'{i}.log')}", flush=True)
    for i, variant in enumerate(args.variants):
        log_file = out / str(i) / "log.json"
        if log_file.exists():
            reached = json.loads(log_file.read_text())["evaluations"]
            found = {k: round(100 * v, 1) for k, v in reached[-1]["accuracy"].items()} if reached else {}
            print(f"{i} {variant}: {found}", flush=True)


if __name__ == "__main__":
    main()
