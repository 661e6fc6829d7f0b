"""What a file of results says of where it comes from."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def said(*command: str) -> str | None:
    """What a command prints; None where it is not there or fails."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor())}, {os.cpu_count()} logical cores"


def origin() -> dict[str, str | None]:
    """The command, its commit (a copy of the tree without git says it in COMMIT), the day, the processor, and the GPUs with
    their driver or None."""
    return {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "commit": os.environ.get("COMMIT") or said("git", "describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu(),
        "cards": said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
    }
