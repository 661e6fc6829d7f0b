"""The engine's figures on one GPU, each in a file that says where it comes from: what README's tables are made of.

    python benches/figures.py DIR [--only engine_35b]... [--device cuda]

Writes DIR/NAME.json for each of `FIGURES`: `qwen35rs bench engine` on random weights of full size in a process of its own,
and its time from `import` to the first token. A figure that fails leaves no file, and the rest goes on.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from origin import origin

_122B = (
    "-m 122b-a10b --batch 1 --batch 4 --batch 16 --batch 32"
    " --prefill 1024 --prefill 8192 --prefill 32768 --prefill 65536"
)
_35B = "-m 35b-a3b --batch 1 --batch 4 --batch 16 --batch 64"
FIGURES = {
    "engine_35b": f"{_35B} --prefill 1024 --prefill 8192 --prefill 32768",
    "engine_35b_int4": f"{_35B} --prefill 8192 --quantization int4",
    "engine_35b_fp8": f"{_35B} --prefill 8192 --quantization fp8",
    "engine_35b_fp8_activations": f"{_35B} --prefill 8192 --quantization fp8 --activation-dtype fp8",
    "engine_122b_int4": f"{_122B} --quantization int4",
    "engine_122b_mixed": f"{_122B} --quantization mixed",
    "engine_122b_int4_activations": f"{_122B} --quantization int4 --activation-dtype fp8",
}
FIRST = """
import sys, time; start = time.perf_counter()
from qwen35rs import LLM, SamplingParams
model, device, quantization = sys.argv[1:]
llm = LLM(model, load_format="dummy", device=device, quantization=quantization or None)
loaded = time.perf_counter() - start
llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1))
print(loaded, time.perf_counter() - start)
"""


def run(*command):
    """What it prints; None, and its errors are shown, where it fails."""
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def value_of(options, name):
    return options[options.index(name) + 1] if name in options else ""


def measure(options, device):
    """What is found; None where it fails."""
    common = ["bench", "engine", "--load-format", "dummy", "--device", device, "--json"]
    engine = run("-m", "qwen35rs", *common, *options)
    first = engine and run("-c", FIRST, value_of(options, "-m"), device, value_of(options, "--quantization"))
    if not first:
        return None
    loaded, token = map(float, first.split())
    command = shlex.join(["qwen35rs", *common, *options])
    seconds = {"import_to_loaded_seconds": loaded, "import_to_first_token_seconds": token}
    return origin() | {"command": command} | json.loads(engine) | seconds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", action="append", choices=list(FIGURES))
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in arguments.only or FIGURES:
        found = measure(shlex.split(FIGURES[name]), arguments.device)
        if found is None:
            failed.append(name)
            continue
        (arguments.directory / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        rows = [f"batch {row['batch']} {1e3 * row['seconds']:.2f} ms" for row in found["decode"]]
        rows += [f"{row['num_tokens']:,} tokens {row['seconds']:.3f} s" for row in found["prefill"]]
        print(f"{name}: {', '.join(rows)}", flush=True)
    if failed:
        sys.exit(f"error: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
