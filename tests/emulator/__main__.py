"""The tests that need a GPU, without one: the CUDA backend and its kernels on an emulated card.

    python tests/emulator [--cards N] [--shared BYTES] [--order N] [--report FILE] [pytest arguments]

Builds the extension and the kernels' PTX for sm_80 (with nvcc, as build.rs finds it) and a library that stands for the
driver and the run time and runs that PTX on the CPU; then runs pytest on them. Unless the arguments for pytest have a
mark (`-m`), those are the emulator's own tests and the goldens of tests/gpu/test_net.py. Everything it makes is in
target/emulator.

Every access of a kernel is checked against what was allocated, memory starts as NaN, and asynchronous copies are done as
late as they may be. What it cannot: kernels for Hopper alone (wgmma, TMA, clusters) are not run; cuBLASLt and NCCL are
not there; times mean nothing; what only weakly ordered memory shows is not seen. Needs cargo, nvcc and g++.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "target" / "emulator"
LIBRARY = OUT / "libcuda.so.1"
GOLDENS = [
    *("-m", "gpu or emulator", "-k", "goldens or test_instructions"),
    *("tests/emulator/test_instructions.py", "tests/gpu/test_net.py"),
]
# No contraction: what a kernel adds after a product is rounded twice, as PTX says.
FLAGS = ["-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]

# Compiles to PTX alone, left beside the object that has it too: a card's own code is what takes the time.
NVCC = """#!/bin/sh
# Made by tests/emulator: nvcc as build.rs calls it.
object= previous=
for argument; do
    [ "$previous" = -o ] && object=$argument
    previous=$argument
    shift
    set -- "$@" "$(printf %s "$argument" | sed 's/code=\\[sm_80,compute_80\\]/code=compute_80/')"
done
case $object in *.o) ;; *) exec {nvcc} "$@" ;; esac
kept=${{object%.o}}.kept
mkdir -p "$kept" && {nvcc} "$@" --keep --keep-dir "$kept" && mv "$kept"/*.ptx "${{object%.o}}.ptx" && rm -r "$kept"
"""


def find_nvcc():
    """Where build.rs looks."""
    if os.environ.get("NVCC"):
        return os.environ["NVCC"]
    places = [Path(os.environ["CUDA_HOME"]) / "bin"] if os.environ.get("CUDA_HOME") else []
    places += [Path(entry) / "nvidia/cu13/bin" for entry in sys.path]
    found = [str(place / "nvcc") for place in places if (place / "nvcc").is_file()]
    nvcc = found[0] if found else shutil.which("nvcc")
    if nvcc is None:
        sys.exit("found no nvcc: set NVCC or CUDA_HOME, or install the packages that build.rs names")
    return nvcc


def make_toolkit(nvcc):
    """A toolkit for build.rs: that nvcc, and a run time without functions, so that they are looked for when the
    extension is loaded."""
    wrapper, runtime = OUT / "toolkit/bin/nvcc", OUT / "toolkit/lib/libcudart_static.a"
    for path, text in ((wrapper, NVCC.format(nvcc=f"'{nvcc}'")), (runtime, "!<arch>\n")):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    wrapper.chmod(0o755)
    return wrapper


def build_extension(nvcc):
    """The extension, and the folder of its kernels' PTX."""
    env = os.environ | {"NVCC": str(make_toolkit(nvcc)), "PYO3_PYTHON": sys.executable}
    env |= {"QWEN35RS_CUDA_ARCHS": "80", "CARGO_TARGET_DIR": str(OUT / "cargo")}
    # Quick to build rather than quick: the kernels are emulated anyway.
    env |= {"CARGO_PROFILE_RELEASE_LTO": "off", "CARGO_PROFILE_RELEASE_CODEGEN_UNITS": "16"}
    command = ["cargo", "build", "--locked", "--release", "--lib", "--features", "python,cuda"]
    command += ["--message-format", "json-render-diagnostics"]
    done = subprocess.run(command, check=False, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(done.returncode)
    library = ptx = None
    for message in map(json.loads, done.stdout.splitlines()):
        if f"{ROOT.as_uri()}#" not in message.get("package_id", ""):
            continue
        ptx = message.get("out_dir", ptx)
        library = next((f for f in message.get("filenames", ()) if f.endswith(".so")), library)
    return library, ptx


def make_site(extension):
    """The package with that extension."""
    package = OUT / "site/qwen35rs"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for path in (ROOT / "python/qwen35rs").iterdir():
        if path.suffix != ".so" and path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    shutil.copy(extension, package / "_core.abi3.so")
    return package.parent


def build_library():
    """What stands for the driver and the run time."""
    sources = sorted(HERE.glob("*.cpp"))
    changed = max(path.stat().st_mtime for path in [*sources, *HERE.glob("*.h")])
    if LIBRARY.exists() and LIBRARY.stat().st_mtime > changed:
        return
    objects = OUT / "objects"
    objects.mkdir(parents=True, exist_ok=True)

    def compile(source):
        command = ["g++", *FLAGS, *WARNINGS, "-c", str(source), "-o", str(objects / f"{source.stem}.o")]
        return subprocess.run(command, check=False).returncode

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if any(list(pool.map(compile, sources))):
            sys.exit(1)
    made = [str(objects / f"{source.stem}.o") for source in sources]
    subprocess.run(["g++", "-shared", *made, "-o", str(LIBRARY), "-lpthread"], check=True)


def settings(args, ptx):
    """What the library is told (settings.h)."""
    told = {"CARDS": args.cards, "SHARED": args.shared, "ORDER": args.order}
    told |= {"PTX": ptx, "REPORT": os.path.abspath(args.report) if args.report else None}
    return {f"EMULATOR_{name}": str(value) for name, value in told.items() if value is not None}


def main():
    parser = argparse.ArgumentParser(
        prog="tests/emulator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cards", type=int, default=1, choices=range(1, 9), metavar="N")
    parser.add_argument(
        "--shared", type=int, default=166912, metavar="BYTES", help="shared memory a block may have"
    )
    parser.add_argument(
        "--order",
        type=int,
        default=0,
        help="of warps and blocks: 0 as they come, -1 backwards, others a random one; no result may depend on it",
    )
    parser.add_argument("--report", metavar="FILE", help="adds a line for each kernel that ran")
    args, arguments = parser.parse_known_args()
    OUT.mkdir(parents=True, exist_ok=True)
    build_library()
    extension, ptx = build_extension(find_nvcc())
    site = make_site(extension)
    env = os.environ | settings(args, ptx)
    env["LD_PRELOAD"] = str(LIBRARY)
    env["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (str(OUT), os.environ.get("LD_LIBRARY_PATH"))))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    if "-m" not in arguments:
        arguments = [*GOLDENS, *arguments]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, check=False, cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
