"""What the kernels' benchmarks share: random data, a clock that empties the L2 cache, a table of rows beside their floors."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

BF16, F32 = torch.bfloat16, torch.float32


def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> torch.Tensor:
    return (torch.randn(shape, device="cuda", dtype=torch.float32) * scale).to(dtype)


def weights(*shape: int) -> torch.Tensor:
    """Without an f32 copy: they may be large."""
    return torch.empty(shape, device="cuda", dtype=BF16).normal_(std=shape[-1] ** -0.5)


class Clock:
    def __init__(self) -> None:
        self.flush = torch.zeros(64 << 20, dtype=torch.int32, device="cuda")
        self.most = torch.empty((), dtype=torch.int32, device="cuda")

    def seconds(self, work: Callable[[], object], repeats: int = 20) -> float:
        for _ in range(3):
            work()
        times = []
        for _ in range(repeats):
            # Half a millisecond in which the host queues what follows: else its pauses count.
            torch.cuda._sleep(1_000_000)
            # Read, not written: what is dirty in L2 would go to memory while `work` is timed.
            torch.amax(self.flush, 0, out=self.most)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)


def recorded(work: Callable[[], object]) -> Callable[[], object]:
    """The launches of `work`, from a graph: what Python and a launch take is not in their time."""
    work()  # what the first launch of a kernel loads cannot be recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


class Table:
    def __init__(self, clock: Clock, only: str) -> None:
        self.clock, self.only, self.rows = clock, only, []
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        self.bandwidth = 2 * len(source) / clock.seconds(lambda: target.copy_(source))
        a, b = random(8192, 8192), random(8192, 8192)
        self.rate = 2 * 8192**3 / clock.seconds(lambda: a @ b, 8)
        print(
            f"copy {self.bandwidth / 1e12:.2f} TB/s, bf16 product {self.rate / 1e12:.0f} TFLOP/s", flush=True
        )

    def add(
        self, name: str, work: Callable[[], object], *, num_bytes: float = 0.0, flops: float = 0.0
    ) -> None:
        """`num_bytes` that must be read and written, `flops` that must be done: the larger floor counts."""
        if self.only not in name:
            return
        try:
            seconds = self.clock.seconds(work)
        except (AssertionError, AttributeError) as error:
            print(f"{name:<58} {error}", flush=True)
            return
        floor = max(num_bytes / self.bandwidth, flops / self.rate)
        row = {
            "name": name,
            "us": seconds * 1e6,
            "gb_per_s": num_bytes / seconds / 1e9,
            "tflops": flops / seconds / 1e12,
            "share_of_floor": floor / seconds,
        }
        self.rows.append(row)
        shown = (
            f"{row['tflops']:8.1f} TFLOP/s"
            if flops / self.rate > num_bytes / self.bandwidth
            else f"{row['gb_per_s']:8.0f} GB/s"
        )
        print(
            f"{name:<58} {row['us']:10.1f} us {shown} {100 * row['share_of_floor']:5.1f} % of the floor",
            flush=True,
        )
