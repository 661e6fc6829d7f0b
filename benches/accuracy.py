"""What each option that saves bytes or time costs the embedded model, on the questions of the task suite.

    python benches/accuracy.py [--device cuda] [--n 512] [--jobs 8] [--task NAME]... [--option NAME]...

A column an option, in a process of its own; accuracy, and perplexity of the expected answers. The same questions in each.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from qwen35rs import LLM, tasks
from qwen35rs.bench import measure

OPTIONS = {
    "as published": {},
    "int4": {"quantization": "int4"},
    "mixed": {"quantization": "mixed"},
    "fp8": {"quantization": "fp8"},
    "fp8 pages": {"kv_cache_dtype": "fp8"},
    "f16 states": {"state_dtype": "float16"},
    "fp8, rounded": {"quantization": "fp8", "activation_dtype": "fp8"},
}


def column(name, arguments):
    """Results of one option, in this process."""
    llm = LLM(device=arguments.device, kv_cache_bytes=1 << 30, progress=False, **OPTIONS[name])
    results = measure(llm, arguments.task or None, num_items=arguments.n)
    return {r.task: (r.accuracy, r.perplexity) for r in results}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--jobs", type=int, default=1, help="columns at a time")
    parser.add_argument("--task", action="append", choices=list(tasks.SUITE))
    parser.add_argument("--option", action="append", choices=list(OPTIONS))
    parser.add_argument("--alone", choices=list(OPTIONS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone is not None:
        print(json.dumps(column(arguments.alone, arguments)))
        return
    names = arguments.option or list(OPTIONS)

    def run(name):
        done = subprocess.run(
            [sys.executable, *sys.argv, "--alone", name], stdout=subprocess.PIPE, check=False
        )
        return json.loads(done.stdout) if done.returncode == 0 else {}

    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = dict(zip(names, pool.map(run, names), strict=True))
    print(" " * 26 + "".join(f"{name:>18}" for name in names))
    for task in arguments.task or tasks.SUITE:
        cells = (f"{100 * r[task][0]:.1f}%  {r[task][1]:.5f}" if r else "failed" for r in found.values())
        print(f"{task:<26}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
