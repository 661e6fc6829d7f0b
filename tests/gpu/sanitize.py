"""The op tests under compute-sanitizer.

    python tests/gpu/sanitize.py [--tool memcheck|racecheck] [--seconds 60] [--jobs 4] [--only NAME ...] [pytest options]

Every test function is run once with its smallest arguments, then with larger ones, until a file's time is up. Only our kernels are instrumented. Prints a line per file and tool, and each error; ends with 1 if a
test failed, a function did not run, or the tool found something.
"""

import argparse
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
# Whole nets and the engine are made of what these test; of kernels that wait for each other the tool runs one at a time.
NOT_OPS = ("engine", "net", "packed_net", "quantised_net", "shared_net", "ops_cuda", "all_reduce", "nccl")
OWN_KERNELS = "regex=^_ZN[0-9]+_GLOBAL__N_"


def size(item):
    """The product of the numbers among its arguments."""
    return math.prod(int(x) for x in re.findall(r"\d+", item.name[len(item.originalname) :]) if int(x))


def pytest_collection_modifyitems(items):
    items.sort(key=size)
    seen = {}

    def turn(item):
        seen[item.originalname] = seen.get(item.originalname, 0) + 1
        return seen[item.originalname]

    items.sort(key=turn)
    print(f"functions: {len(seen)}")


def pytest_sessionstart(session):
    session.config.stop_at = time.monotonic() + float(os.environ["SANITIZE_SECONDS"])


def pytest_runtest_teardown(item):
    if time.monotonic() > item.config.stop_at:
        item.session.shouldstop = "time is up"


def run(tool, name, seconds, options):
    """The tool over one file: a line that sums it up, what the tool said, and whether all is well."""
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", OWN_KERNELS, "--print-limit", "20"]
    command += [sys.executable, "-m", "pytest", "-p", "sanitize", "-p", "no:cacheprovider", "-v", "--tb=line"]
    command += ["-m", "gpu", *options, str(HERE / f"test_{name}.py")]
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path, "SANITIZE_SECONDS": str(seconds)}
    if tool == "memcheck":  # it sees the bounds of every tensor where no cache is in between
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    try:
        done = subprocess.run(
            command,
            check=False,
            env=env,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=3 * seconds,
        )
        out = done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        out = (late.stdout or b"").decode(errors="replace") + "\n(killed: a test took too long)"
    passed = re.findall(r"::(test_\w+)\S* PASSED", out)
    failed = re.findall(r"::(test_\S+) (?:FAILED|ERROR)", out)
    functions = int((re.findall(r"functions: (\d+)", out) or [0])[0])
    summary = (re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", out) or ["no summary"])[-1]
    clean = summary.startswith("0 ")
    line = f"{tool} {name}: {len(passed)} tests of {len(set(passed))} of {functions} functions passed"
    line += f", {len(failed)} failed; {summary}"
    said = (
        [x for x in out.splitlines() if x.startswith("========= ") and "Host Frame" not in x]
        if not clean
        else []
    )
    said += [x for x in out.splitlines() if re.match(r"(E  |\S+\.py:\d+: |\(killed)", x)]
    return line, said, clean and not failed and 0 < functions == len(set(passed))


def main():
    names = sorted(p.stem[5:] for p in HERE.glob("test_*.py") if p.stem[5:] not in NOT_OPS)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tool", action="append", choices=("memcheck", "racecheck"))
    parser.add_argument("--seconds", type=float, default=60, help="a file and tool may take")
    parser.add_argument("--jobs", type=int, default=4, help="files at once; they share the card's memory")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help="test_NAME.py"
    )
    args, options = parser.parse_known_args()
    all_well = True
    work = [
        (tool, name, args.seconds, options)
        for tool in args.tool or ("memcheck", "racecheck")
        for name in args.only
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        for line, said, well in pool.map(lambda job: run(*job), work):
            all_well &= well
            print(line, *(f"    {x}" for x in said[:40]), sep="\n", flush=True)
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
