"""Sums over ranks through peer memory: a reduce's time inside a CUDA graph, beside NCCL's.

python benches/all_reduce.py [--world N] [--width W] [--json FILE]

Each rank has a card where there are as many, else all are streams of one card, which then moves all of it; NCCL is
measured where each has a card. A graph holds many reduces, one after the other; two replays are queued on every rank
behind a pause that they are launched in, and the second is timed: the median of many. GB/s are the bytes of one rank's
rows over the time of a reduce, and bytes a rank must at least send are 2 (world - 1) / world of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # as an engine's ranks have it

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))
from kernel_table import random
from origin import origin

from ranks import Ranks

ROWS = (1, 8, 16, 64, 512, 8192)
REPEATS = 15
PAUSE = 2_000_000  # cycles: longer than it takes to launch the replays


def in_a_graph(n: int) -> int:
    return 96 if n <= 512 else 16


def ours(ranks: Ranks, n: int, width: int, name: str) -> float:
    """Seconds of one reduce of n rows."""
    norm = name == "q35_all_reduce_norm"
    count = in_a_graph(n)
    arguments: list[tuple[Any, ...]] = []
    for x in ranks.spread(random(n, width)):
        residual = (torch.zeros(n, width, device=x.device), torch.ones(width, device=x.device), 1e-6)
        arguments.append((n, width, x, *(residual if norm else ()), torch.empty_like(x)))
    ranks.synchronize()
    for _ in range(3):
        for rank in range(ranks.world):
            ranks.call(rank, name, *arguments[rank])
    ranks.synchronize()

    def reduces(rank: int) -> None:
        for _ in range(count):
            ranks.call(rank, name, *arguments[rank])

    graphs = ranks.graphs(reduces)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(REPEATS):
        ranks.synchronize()
        for stream in ranks.streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(PAUSE)
        for turn in range(2):
            for rank, graph in enumerate(graphs):
                with torch.cuda.stream(ranks.streams[rank]):
                    if turn == 1 and rank == 0:
                        start.record()
                    graph.replay()
                    if turn == 1 and rank == 0:
                        end.record()
        ranks.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / count)
    assert ranks.waited_in_vain() == [0] * ranks.world
    return statistics.median(times)


def nccl(rank: int, world: int, width: int, folder: str) -> None:
    """The process of one rank: seconds of one reduce by number of rows, left in a file."""
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=world,
        device_id=torch.device("cuda", rank),
    )
    found = {}
    for n in ROWS:
        count = in_a_graph(n)
        x, fresh = random(n, width), random(n, width)
        for _ in range(3):
            torch.distributed.all_reduce(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # NCCL's own threads ask the device now and then.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(count):
                torch.distributed.all_reduce(x)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(REPEATS):
            x.copy_(fresh)
            torch.distributed.barrier()
            torch.cuda.synchronize()
            graph.replay()
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / count)
        found[n] = statistics.median(times)
        del graph  # a communicator's end waits for those that it was recorded in
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def with_nccl(world: int, width: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(nccl, args=(world, width, folder), nprocs=world)
        found: dict[str, float] = json.loads((Path(folder) / "found.json").read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", type=int, default=2, help="ranks, 2 to 8")
    parser.add_argument("--width", type=int, default=3072, help="of a row")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    where = "cards" if torch.cuda.device_count() >= args.world else "one card"
    torch.manual_seed(0)
    print(f"{args.world} ranks, {where}: {torch.cuda.get_device_name()}", flush=True)
    ranks = Ranks(where, args.world, args.width)
    names: dict[str, Callable[[int], float]] = {
        "all_reduce": lambda n: ours(ranks, n, args.width, "q35_all_reduce"),
        "all_reduce_norm": lambda n: ours(ranks, n, args.width, "q35_all_reduce_norm"),
    }
    rows = []
    if where == "cards":  # after ours, which a library that does not start must not keep from being told
        names["NCCL all_reduce"] = lambda n: theirs[str(n)]
    theirs: dict[str, float] = {}
    for name, measure in names.items():
        if name.startswith("NCCL"):
            theirs |= with_nccl(args.world, args.width)
        for n in ROWS:
            seconds = measure(n)
            num_bytes = 2 * n * args.width
            row = {
                "name": name,
                "n": n,
                "width": args.width,
                "us": seconds * 1e6,
                "gb_per_s": num_bytes / seconds / 1e9,
            }
            rows.append(row)
            shown = f"{name} {n} x {args.width}"
            print(f"{shown:<34} {row['us']:9.1f} us {row['gb_per_s']:7.1f} GB/s", flush=True)
    if args.json:
        found = origin() | {
            "where": where,
            "world": args.world,
            "rows": rows,
        }
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
