"""A sum over ranks, the norm after it and a rank's part of the sparse block: to the bit what they give one after the other."""

import pytest
import test_moe
import test_moe_packed
import torch
from launch import Peers, call, poisoned, randn, same_bits
from test_all_reduce import EPS, PLACES, WORLDS, inputs, weights
from test_moe_packed import FP8, INT4, NVFP4, Q4_K

from ranks import Ranks

FAMILIES = {"35B": test_moe.SMALL_FAMILY, "122B": test_moe.LARGE_FAMILY}
# Two ranks may share a card; more of them would wait for each other's room there.
ON = [PLACES[0], *(place for place in WORLDS if place.values[0] == "cards")]
# bf16; codes.
FORMS = [None, INT4, FP8, NVFP4, Q4_K]


class Shared:
    """A rank's experts, and what it computes with; the residual stream is the same on all ranks."""

    def __init__(self, ranks, dims, form, n):
        self.ranks, self.n, self.hidden, self.packed = ranks, n, dims[0], form is not None
        self.deltas = inputs(ranks, n, self.hidden)
        self.start = randn(n, self.hidden, dtype=torch.float32, seed=5, scale=3)
        self.ws = ranks.spread(weights(self.hidden))
        self.parts, self.spaces = [], []
        for rank, device in enumerate(ranks.devices):
            with torch.cuda.device(device):
                whole = test_moe_packed.Block(dims, [form] * 4) if self.packed else test_moe.Block(dims)
                here = range(dims[1] * rank // ranks.world, dims[1] * (rank + 1) // ranks.world)
                self.parts.append(whole.part(here))
                self.spaces.append(self.parts[rank].workspace(n))
        # A kernel that is loaded while ranks wait for each other waits for them: first each has a world of its own.
        among, state = ranks.peers, self.fresh()
        ranks.peers = [Peers.from_buffer_copy(peers) for peers in among]
        for rank, peers in enumerate(ranks.peers):
            peers.rank, peers.world = 0, 1
            peers.regions[0] = among[rank].regions[rank]
        ranks.synchronize()
        self.at_once(state)
        self.in_turn(state)
        ranks.synchronize()
        ranks.peers = among

    def fresh(self):
        """Residuals, x and outputs of all ranks; a row more of the last two, which is nobody's."""
        rows = [self.ranks.spread(poisoned(self.n + 1, self.hidden)) for _ in range(2)]
        return self.ranks.spread(self.start), *rows

    def launch(self, rank, name, delta, state):
        residual, x, out = (of[rank] for of in state)
        part = self.parts[rank]
        what = (self.n, part.struct(), part.weights(), delta, residual, self.ws[rank], EPS, x)
        if "all_reduce" in name:
            self.ranks.call(rank, name, *what, self.spaces[rank], out)
        else:
            with torch.cuda.stream(self.ranks.streams[rank]):
                call(name, *what, self.spaces[rank], out)

    def at_once_on(self, rank, delta, state):
        name = "q35_all_reduce_packed_norm_moe" if self.packed else "q35_all_reduce_norm_moe"
        self.launch(rank, name, delta, state)

    def at_once(self, state, deltas=None):
        for rank in range(self.ranks.world):
            self.at_once_on(rank, (deltas or self.deltas)[rank], state)

    def in_turn(self, state):
        name = "q35_packed_norm_moe" if self.packed else "q35_norm_moe"
        residuals, xs, _ = state
        self.ranks.all("q35_all_reduce_norm", self.n, self.hidden, self.deltas, residuals, self.ws, EPS, xs)
        for rank in range(self.ranks.world):
            self.launch(rank, name, None, state)

    def same(self, found, want):
        self.ranks.synchronize()
        assert self.ranks.waited_in_vain() == [0] * self.ranks.world
        for of, other in zip(found, want, strict=True):
            for a, b in zip(of, other, strict=True):
                assert same_bits(a[: self.n], b[: self.n])
        assert all(rows[-1].isnan().all() for of in found[1:] for rows in of)
        assert not any(rows[: self.n].isnan().any() for of in found for rows in of)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("where, world", ON)
def test_families(where, world, name, form):
    for n in (1, 2, 16):
        dims = FAMILIES[name]
        shared = Shared(Ranks(where, world, dims[0]), dims, form, n)
        states = found, want = shared.fresh(), shared.fresh()
        shared.ranks.synchronize()
        for _ in range(3):  # in slots that either way has used
            for state, run in zip(states, (shared.at_once, shared.in_turn), strict=True):
                run(state)
                shared.ranks.synchronize()
        shared.same(found, want)
        # The output where the delta was.
        outs = [rows[:n] for rows in found[2]]
        for out, delta in zip(outs, shared.deltas, strict=True):
            out.copy_(delta)
        shared.ranks.synchronize()
        shared.at_once(found, outs)
        shared.ranks.synchronize()
        shared.in_turn(want)
        shared.same(found, want)


@pytest.mark.parametrize(
    "dims", [(64, 8, 2, 64, 64), (1088, 16, 8, 64, 0), (2112, 12, 3, 128, 64), (192, 4, 1, 64, 0)], ids=str
)
@pytest.mark.parametrize("where, world", PLACES)
def test_odd_sizes(where, world, dims):
    for form in (None, INT4):
        shared = Shared(Ranks(where, world, dims[0] + 8), dims, form, 1)  # rows need not be the widest
        found, want = shared.fresh(), shared.fresh()
        shared.ranks.synchronize()
        shared.at_once(found)
        shared.in_turn(want)
        shared.same(found, want)


@pytest.mark.parametrize("form", [None, FP8], ids=str)
@pytest.mark.parametrize("where, world", PLACES)
def test_in_graphs(where, world, form):
    """Turns are counted on the device: each replay goes on where the last one ended, other sums between them too."""
    dims, times = test_moe.SMALL_FAMILY, 5
    shared = Shared(Ranks(where, world, dims[0]), dims, form, 1)
    ranks = shared.ranks
    found, want = shared.fresh(), shared.fresh()
    ranks.synchronize()
    shared.at_once(found)
    ranks.synchronize()

    def steps(rank):
        for _ in range(times):
            shared.at_once_on(rank, shared.deltas[rank], found)

    graphs = ranks.graphs(steps)
    sums = ranks.spread(poisoned(1, dims[0]))
    ranks.synchronize()
    for _ in range(2):
        for rank, graph in enumerate(graphs):
            with torch.cuda.stream(ranks.streams[rank]):
                graph.replay()
        ranks.all("q35_all_reduce", 1, dims[0], shared.deltas, sums)
    ranks.synchronize()
    for _ in range(1 + 2 * times):
        shared.in_turn(want)
        ranks.synchronize()
    shared.same(found, want)
