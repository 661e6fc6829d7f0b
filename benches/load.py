"""How fast a checkpoint is loaded, and what bounds it: the disk, the processor or the bus.

    python benches/load.py -m 122b-a10b --quantization int4 DIR --json FILE
    python benches/load.py DIR
    python benches/load.py -m 122b-a10b --quantization none --load-quantization int4 DIR

The first writes a checkpoint of random weights to DIR (`benches/synthetic_checkpoint.py`), where the same one is not
there yet; the second takes what is in DIR, also one of a release; the third has one in bf16 quantised at load. Each of
these in a process of its own: the files read in order by several threads, with an empty page cache and a full one;
`LLM(DIR)` likewise; the files copied out of a mapping; and, on a GPU, page-locked memory copied to it (needs torch). The
page cache is emptied of the files by `posix_fadvise(POSIX_FADV_DONTNEED)`, which needs no rights and does nothing to a
tmpfs; what was still there is said.

`weights` of a load is from the first report of progress to the last: start of process and device, and memory for keys and
values, are left out. The floor is the slowest of what a load has to do: read, copy, send. What quantising takes is not in
it.
"""

import argparse
import contextlib
import json
import mmap
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import qwen35rs
import synthetic_checkpoint

PIECE = 16 << 20
RANGE = 256 << 20
SAMPLES = 16
_own = threading.local()


def files_of(directory):
    found = sorted(Path(directory).glob("*.safetensors"))
    if not found:
        raise SystemExit(
            f"error: {directory}: found no *.safetensors; allowed: a checkpoint, or -m to write one"
        )
    return found


def ranges(files):
    return [
        (path, start, min(start + RANGE, size))
        for path in files
        for size in [path.stat().st_size]
        for start in range(0, size, RANGE)
    ]


def timed(files, work, threads):
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        num_bytes = sum(pool.map(lambda part: work(*part), ranges(files)))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "gb_per_s": num_bytes / 1e9 / seconds, "threads": threads}


def buffer_of_thread():
    """Made and touched once."""
    if not hasattr(_own, "buffer"):
        _own.buffer = bytearray(PIECE)
    return _own.buffer


def read(path, start, end):
    buffer = buffer_of_thread()
    fd = os.open(path, os.O_RDONLY)
    try:
        at = start
        while at < end:
            got = os.preadv(fd, [memoryview(buffer)[: end - at]], at)
            if not got:
                raise SystemExit(f"error: {path}: found its end at {at}; it is being written")
            at += got
    finally:
        os.close(fd)
    return end - start


def copy_mapped(path, start, end):
    import numpy as np

    buffer = np.frombuffer(buffer_of_thread(), np.uint8)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        whole = np.frombuffer(mapping, np.uint8)
        for at in range(start, end, PIECE):
            piece = whole[at : min(at + PIECE, end)]
            np.copyto(buffer[: len(piece)], piece)
        del whole, piece
    return end - start


def drop(files):
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # what is not written yet stays
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def cached_share(files):
    """Of a few places in each file; None where the file system does not say."""
    hits = []
    for path in files:
        fd, size = os.open(path, os.O_RDONLY), path.stat().st_size
        try:
            for i in range(SAMPLES):
                try:
                    os.preadv(fd, [bytearray(1)], size * i // SAMPLES, os.RWF_NOWAIT)
                    hits.append(1)
                except BlockingIOError:
                    hits.append(0)
        except OSError:
            return None
        finally:
            os.close(fd)
    return statistics.mean(hits)


def empty_cache(files):
    """Gives the share that is still cached. Asking reads a little: it is dropped again."""
    drop(files)
    share = cached_share(files)
    drop(files)
    return share


def load(directory, args):
    """Times `LLM(directory)`."""
    from qwen35rs import LLM, llm

    reports = []
    llm._LoadBar.update = lambda self, done, total: reports.append((time.perf_counter(), done, total))
    size = sum(path.stat().st_size for path in files_of(directory))
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    options = {"dtype": args.dtype, "quantization": args.load_quantization}
    model = LLM(directory, device=args.device, max_num_seqs=1, max_model_len=256, **options)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    weights = reports[-1][0] - reports[0][0]
    found = {
        "seconds": seconds,
        "start_seconds": reports[0][0] - start,
        "weights_seconds": weights,
        "gb_per_s": size / 1e9 / weights,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "system_seconds": after.ru_stime - before.ru_stime,
        "page_faults": after.ru_minflt - before.ru_minflt,
        "page_faults_that_read": after.ru_majflt - before.ru_majflt,
        "peak_rss_bytes": 1024 * after.ru_maxrss,
        "device": model.device,
        "quantization": args.load_quantization,
    }
    with contextlib.suppress(OSError):  # not everywhere
        lines = Path("/proc/self/io").read_text().splitlines()
        found["disk_bytes"] = int(dict(line.split(": ") for line in lines)["read_bytes"])
    return found


def send(num_bytes):
    """The rate of copies from page-locked memory: of 16 MiB each, and of 1 GiB."""
    try:
        import torch
    except ImportError:
        return {"missing": "torch"}
    found = {}
    for name, size in (("16_mib", PIECE), ("1_gib", 1 << 30)):
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        device, repeats = torch.empty_like(host, device="cuda"), max(min(num_bytes, 16 << 30) // size, 4)
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        found[f"gb_per_s_{name}"] = repeats * size / 1e9 / (time.perf_counter() - start)
    return found


def filesystem(directory):
    """Its type."""
    best, kind = -1, None
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            left, _, right = line.partition(" - ")
            place = Path(left.split()[4])
            if Path(directory).resolve().is_relative_to(place) and len(place.parts) > best:
                best, kind = len(place.parts), right.split()[0]
    return kind


def bound(num_bytes, weights_seconds, rates):
    """Which of these rates alone would take longest, and how near a load comes to that."""
    seconds = {name: num_bytes / 1e9 / rate for name, rate in rates.items() if rate}
    slowest = max(seconds, key=seconds.get)
    share = seconds[slowest] / weights_seconds
    return {"slowest": slowest, "floor_seconds": seconds[slowest], "share_of_floor": share}


def in_process(args, what):
    command = [sys.executable, __file__, args.directory, "--only", what]
    command += ["--device", args.device, "--dtype", args.dtype, "--threads", str(args.threads)]
    if args.load_quantization:
        command += ["--load-quantization", args.load_quantization]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(done.returncode)  # it has said why
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    return json.loads(lines[-1].removeprefix("FOUND "))


def only(args):
    files = files_of(args.directory)
    if args.only == "load":
        return load(args.directory, args)
    if args.only == "send":
        return send(sum(path.stat().st_size for path in files))
    return timed(files, {"read": read, "copy": copy_mapped}[args.only], args.threads)


def measure(args):
    written = None
    if args.model is not None:
        options = (args.model, args.quantization, args.layers, args.group_size)
        written = synthetic_checkpoint.write(args.directory, *options)
    files = files_of(args.directory)
    num_bytes = sum(path.stat().st_size for path in files)
    found = {"model": args.model, "quantization": args.quantization if args.model else None}
    found |= {"layers": args.layers, "bytes": num_bytes, "files": len(files), "cpus": os.cpu_count()}
    found |= {"filesystem": filesystem(args.directory), "written": written}
    found["still_cached"] = {"read": empty_cache(files)}
    found["cold_read"] = in_process(args, "read")
    found["warm_read"] = in_process(args, "read")
    found["mapped_copy"] = in_process(args, "copy")
    found["still_cached"]["load"] = empty_cache(files)
    found["cold"] = in_process(args, "load")
    found["warm"] = [in_process(args, "load") for _ in range(args.runs)]
    cuda = found["cold"]["device"] != "cpu"
    sent = found["host_to_device"] = in_process(args, "send") if cuda else None
    bus = max((rate for name, rate in (sent or {}).items() if name.startswith("gb")), default=None)
    copied = found["mapped_copy"]["gb_per_s"]
    for name, reading, seconds in (
        ("cold", found["cold_read"]["gb_per_s"], found["cold"]["weights_seconds"]),
        ("warm", None, statistics.median(run["weights_seconds"] for run in found["warm"])),
    ):
        rates = {"disk": reading, "processor": copied, "bus": bus}
        found[f"{name}_bound"] = bound(num_bytes, seconds, rates)
    return found


def show(found):
    print(f"{found['bytes'] / 1e9:.2f} GB in {found['files']} files on {found['filesystem']}")
    if found["written"]:
        print(f"written at {found['written']['gb_per_s']:.2f} GB/s")
    for name in ("cold_read", "warm_read", "mapped_copy"):
        row = found[name]
        print(f"{name.replace('_', ' ')}: {row['gb_per_s']:.2f} GB/s, {row['threads']} threads")
    if found["host_to_device"]:
        print(f"host to device: {found['host_to_device']}")
    for name, row in [("cold", found["cold"])] + [("warm", run) for run in found["warm"]]:
        to = f" to {row['quantization']}" if row["quantization"] else ""
        print(
            f"{name} load{to} on {row['device']}: {row['seconds']:.2f} s, of them weights {row['weights_seconds']:.2f} s, "
            f"{row['gb_per_s']:.2f} GB/s; processor {row['cpu_seconds']:.1f} s, {row['page_faults']:,} page faults"
        )
    for name in ("cold", "warm"):
        row = found[f"{name}_bound"]
        print(
            f"{name}: the {row['slowest']} alone would take {row['floor_seconds']:.2f} s, "
            f"{row['share_of_floor']:.0%} of the load"
        )
    shares = found["still_cached"].values()
    said = ", ".join("not said by the file system" if share is None else f"{share:.0%}" for share in shares)
    print(f"still in the page cache before the cold read and the cold load: {said}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    synthetic_checkpoint.add_options(parser)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--load-quantization", choices=("int4", "mixed", "fp8"), help="what is quantised to at load"
    )
    parser.add_argument("--runs", type=int, default=2, help="warm loads")
    parser.add_argument(
        "--threads", type=int, default=min(16, os.cpu_count() or 1), help="that read and copy"
    )
    parser.add_argument("--json", help="file for what was found")
    parser.add_argument("--only", choices=("load", "read", "copy", "send"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print("FOUND " + json.dumps(only(args)))
        return
    if args.runs < 1 or args.threads < 1:
        parser.error("--runs, --threads: allowed: 1 or more")
    found = measure(args)
    show(found)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (qwen35rs.Qwen35Error, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
