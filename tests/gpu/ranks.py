"""Ranks that exchange through peer memory: streams of one card, or a card each."""

import ctypes
from pathlib import Path

import torch
from launch import Peers, call

MAX_CHANNELS = 64
GATHERED_AT = 16384


def _let_cards_see_each_other(devices):
    """With the runtime that torch has loaded; that it is so already is no error."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    runtime = ctypes.CDLL(next(line.split()[-1] for line in maps if "libcudart.so" in line))
    for device in set(devices):
        with torch.cuda.device(device):
            for peer in set(devices) - {device}:
                code = runtime.cudaDeviceEnablePeerAccess(peer, 0)
                assert code in (0, 704), f"cudaDeviceEnablePeerAccess: {code}"
                runtime.cudaGetLastError()


class Ranks:
    """`where` is "one card" or "cards". What ranks launch, each launches in its own stream; allocate, and call
    `synchronize`, before ranks wait for each other: both may wait for the device."""

    def __init__(self, where, world, width, *, gather_bytes=0, seconds=20.0):
        self.world, self.one_card = world, where == "one card"
        self.devices = [0 if self.one_card else rank for rank in range(world)]
        if not self.one_card:
            _let_cards_see_each_other(self.devices)
        channels = MAX_CHANNELS // world if self.one_card else MAX_CHANNELS
        size = call("q35_peer_bytes", world, channels, width, gather_bytes)
        assert size > 0
        self.regions = [torch.zeros(size, dtype=torch.uint8, device=d) for d in self.devices]
        self.status = [torch.zeros(1, dtype=torch.int32, device=d) for d in self.devices]
        self.streams = [torch.cuda.Stream(device=d) for d in self.devices]
        addresses = (ctypes.c_void_p * 8)(*(region.data_ptr() for region in self.regions))
        self.peers = [
            Peers(
                rank,
                world,
                channels,
                0 if self.one_card else 1,
                width,
                gather_bytes,
                int(seconds * 1e9),
                addresses,
                self.status[rank].data_ptr(),
            )
            for rank in range(world)
        ]
        for rank in range(world):  # loads what tests run while others wait
            with torch.cuda.stream(self.streams[rank]):
                torch.cuda._sleep(1)
                torch.zeros(4, dtype=torch.uint8, device=self.devices[rank]).clone()
        self.synchronize()

    def synchronize(self):
        for device in set(self.devices):
            torch.cuda.synchronize(device)

    def call(self, rank, name, *arguments):
        with torch.cuda.stream(self.streams[rank]):
            call(name, self.peers[rank], *arguments)

    def all(self, name, *arguments):
        """Launches on every rank; a list is an argument for each."""
        for rank in range(self.world):
            self.call(rank, name, *(a[rank] if isinstance(a, list) else a for a in arguments))

    def graphs(self, launch):
        """A graph on every rank, of what `launch(rank)` launches there."""
        graphs = []
        for rank, device in enumerate(self.devices):
            with torch.cuda.device(device):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self.streams[rank]):
                    launch(rank)
            graphs.append(graph)
        return graphs

    def spread(self, x):
        """Copies of a tensor for all ranks."""
        return [x.to(device, copy=True) for device in self.devices]

    def gathered(self, rank, n, columns):
        """The rows that a gather leaves; reading them is in the order of the reader's stream."""
        rows = self.regions[rank][GATHERED_AT : GATHERED_AT + 4 * n * columns]
        return rows.view(torch.float32).reshape(n, columns)

    def waited_in_vain(self):
        return [int(status) for status in self.status]
