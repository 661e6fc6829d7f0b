"""The collectives of cuda/all_reduce.cu against float64, and to the bit against f32 sums in the order of ranks."""

import random
import time

import pytest
import torch
from launch import call, error, poisoned, randn, same_bits

from ranks import Ranks

BF16 = 4e-3
EPS = 1e-6
# On cards of their own two ranks are asked for by `two_gpus`, and fail without; with more cards come more ranks.
PLACES = [
    pytest.param("one card", 2, marks=pytest.mark.gpu),
    pytest.param("cards", 2, marks=pytest.mark.two_gpus),
]
WORLDS = PLACES + [
    pytest.param(where, world, marks=mark)
    for where, mark, most in (
        ("one card", pytest.mark.gpu, 8),
        ("cards", pytest.mark.two_gpus, torch.cuda.device_count()),
    )
    for world in (3, 4, 8)
    if world <= most
]
SIZES = [1, 3, 16, 64, 65, 500, 4097]
WIDTHS = [64, 2048, 3072, 4096]


def in_order(xs):
    """The f32 sum over ranks, in their order."""
    total = xs[0].cuda(0).float()
    for x in xs[1:]:
        total = total + x.cuda(0).float()
    return total


def exact(xs):
    return sum(x.cuda(0).double() for x in xs)


def inputs(ranks, n, width, seed=0):
    return [randn(n, width, seed=seed + 10 * r).to(d) for r, d in enumerate(ranks.devices)]


def weights(width):
    return 1 + randn(width, dtype=torch.float32, seed=2, scale=0.1)


def normed(residual, w):
    """What q35_rmsnorm_residual makes of it."""
    out = torch.empty(residual.shape, dtype=torch.bfloat16, device="cuda")
    call("q35_rmsnorm_residual", *residual.shape, None, residual.clone(), w, EPS, out)
    return out


def everywhere(found, want):
    return all(same_bits(x.cuda(0), want) for x in found)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("where, world", WORLDS)
def test_all_reduce(where, world, n, width):
    ranks = Ranks(where, world, width)
    xs = inputs(ranks, n, width)
    outs = ranks.spread(poisoned(n + 1, width))
    ranks.synchronize()
    ranks.all("q35_all_reduce", n, width, xs, outs)
    ranks.synchronize()
    assert ranks.waited_in_vain() == [0] * world
    assert all(out[-1].isnan().all() for out in outs)
    assert everywhere([out[:-1] for out in outs], in_order(xs).bfloat16())
    assert error(outs[0][:-1], exact(xs)) < BF16
    # In place, in slots that were used.
    again = [x.clone() for x in xs]
    ranks.synchronize()
    ranks.all("q35_all_reduce", n, width, again, again)
    ranks.synchronize()
    assert everywhere(again, outs[0][:-1].cuda(0))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("where, world", WORLDS)
def test_all_reduce_norm(where, world, n, width):
    ranks = Ranks(where, world, width)
    deltas, start, w = (
        inputs(ranks, n, width),
        randn(n, width, dtype=torch.float32, seed=5, scale=3),
        weights(width),
    )
    residuals, ws, outs = ranks.spread(start), ranks.spread(w), ranks.spread(poisoned(n + 1, width))
    ranks.synchronize()
    ranks.all("q35_all_reduce_norm", n, width, deltas, residuals, ws, EPS, outs)
    ranks.synchronize()
    assert ranks.waited_in_vain() == [0] * world
    want = start + in_order(deltas)
    assert everywhere(residuals, want) and all(out[-1].isnan().all() for out in outs)
    assert everywhere([out[:-1] for out in outs], normed(want, w))
    x = start.double() + exact(deltas)
    assert error(residuals[0], x) < 1e-6
    assert error(outs[0][:-1], x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * w.double()) < BF16
    # Where delta was; the residual goes on.
    again = [delta.clone() for delta in deltas]
    ranks.synchronize()
    ranks.all("q35_all_reduce_norm", n, width, again, residuals, ws, EPS, again)
    ranks.synchronize()
    want = want + in_order(deltas)
    assert everywhere(residuals, want) and everywhere(again, normed(want, w))


@pytest.mark.parametrize("width", [5120, 8, 20000])
@pytest.mark.parametrize("n", [2, 70])
@pytest.mark.parametrize("where, world", WORLDS)
def test_other_widths(where, world, n, width):
    ranks = Ranks(where, world, width + 8)  # rows need not be the widest
    deltas, start, w = inputs(ranks, n, width), randn(n, width, dtype=torch.float32, seed=5), weights(width)
    residuals, ws, outs = ranks.spread(start), ranks.spread(w), ranks.spread(poisoned(n, width))
    sums = ranks.spread(poisoned(n, width))
    ranks.synchronize()
    ranks.all("q35_all_reduce_norm", n, width, deltas, residuals, ws, EPS, outs)
    ranks.all("q35_all_reduce", n, width, deltas, sums)
    ranks.synchronize()
    want = start + in_order(deltas)
    assert everywhere(residuals, want) and everywhere(outs, normed(want, w))
    assert everywhere(sums, in_order(deltas).bfloat16())


@pytest.mark.parametrize("where, world", WORLDS)
def test_a_row_alone_is_itself(where, world):
    n, width = 500, 3072
    ranks = Ranks(where, world, width)
    deltas, start, w = inputs(ranks, n, width), randn(n, width, dtype=torch.float32, seed=5), weights(width)
    residuals, ws, outs = ranks.spread(start), ranks.spread(w), ranks.spread(poisoned(n, width))
    sums = ranks.spread(poisoned(n, width))
    ranks.synchronize()
    ranks.all("q35_all_reduce_norm", n, width, deltas, residuals, ws, EPS, outs)
    ranks.all("q35_all_reduce", n, width, deltas, sums)
    for row in (0, 77, 499):
        alone = [delta[row : row + 1].clone() for delta in deltas]
        one, found, total = (
            ranks.spread(x) for x in (start[row : row + 1], poisoned(1, width), poisoned(1, width))
        )
        ranks.synchronize()
        ranks.all("q35_all_reduce_norm", 1, width, alone, one, ws, EPS, found)
        ranks.all("q35_all_reduce", 1, width, alone, total)
        ranks.synchronize()
        assert everywhere(found, outs[0][row : row + 1].cuda(0))
        assert everywhere(one, residuals[0][row : row + 1].cuda(0))
        assert everywhere(total, sums[0][row : row + 1].cuda(0))


@pytest.mark.parametrize("n, width", [(1, 4), (1, 31040), (3, 1004), (64, 7764), (2, 124160)])
@pytest.mark.parametrize("where, world", WORLDS)
def test_gather_columns(where, world, n, width):
    ranks = Ranks(where, world, 8, gather_bytes=4 * n * width * world)
    for turn in range(3):
        xs = [
            randn(n, width, dtype=torch.float32, seed=turn + 10 * r).to(d)
            for r, d in enumerate(ranks.devices)
        ]
        ranks.synchronize()
        ranks.all("q35_gather_columns", n, width, xs)
        ranks.synchronize()
        want = torch.cat([x.cuda(0) for x in xs], dim=1)
        assert everywhere([ranks.gathered(r, n, world * width) for r in range(world)], want)
    assert ranks.waited_in_vain() == [0] * world


@pytest.mark.parametrize("where, world", WORLDS)
def test_a_thousand_in_a_row(where, world):
    """Each rank now and then late, launches of all kinds and sizes: nothing overtakes."""
    width, columns, turns = 1024, 260, 1000
    draw = random.Random(world)
    ns = [draw.choice((1, 1, 1, 2, 5, 16, 40, 70)) for _ in range(turns)]
    starts = [sum(ns[:i]) for i in range(turns + 1)]
    ranks = Ranks(where, world, width, gather_bytes=4 * 4 * columns * world)
    xs, start = inputs(ranks, starts[-1], width), randn(starts[-1], width, dtype=torch.float32, seed=5)
    wide = [randn(4 * turns, columns, dtype=torch.float32, seed=r).to(d) for r, d in enumerate(ranks.devices)]
    w = weights(width)
    residuals, ws = ranks.spread(start), ranks.spread(w)
    sums, outs = (ranks.spread(poisoned(starts[-1], width)) for _ in range(2))
    gathered = ranks.spread(poisoned(4 * turns, world * columns, dtype=torch.float32))
    ranks.synchronize()
    for turn in range(turns):
        here, n = slice(starts[turn], starts[turn + 1]), ns[turn]
        if turn % 5 == 0:
            with torch.cuda.stream(ranks.streams[draw.randrange(world)]):
                torch.cuda._sleep(draw.choice((1000, 10_000, 100_000)))
        if turn % 3 < 2:
            ranks.all("q35_all_reduce", n, width, [x[here] for x in xs], [x[here] for x in sums])
        if turn % 3 > 0:
            rows = ([x[here] for x in values] for values in (xs, residuals, outs))
            deltas, residual, out = rows
            ranks.all("q35_all_reduce_norm", n, width, deltas, residual, ws, EPS, out)
        if turn % 4 == 0:
            few = 1 + turn % 3
            rows = slice(4 * turn, 4 * turn + few)
            ranks.all("q35_gather_columns", few, columns, [x[rows] for x in wide])
            for rank in range(world):
                with torch.cuda.stream(ranks.streams[rank]):
                    gathered[rank][rows].copy_(ranks.gathered(rank, few, world * columns))
    ranks.synchronize()
    assert ranks.waited_in_vain() == [0] * world
    total, side = in_order(xs), torch.cat([x.cuda(0) for x in wide], dim=1)
    want = normed(start + total, w)
    for turn in range(turns):
        here = slice(starts[turn], starts[turn + 1])
        if turn % 3 < 2:
            assert everywhere([x[here] for x in sums], total[here].bfloat16()), turn
        if turn % 3 > 0:
            assert everywhere([x[here] for x in residuals], (start + total)[here]), turn
            assert everywhere([x[here] for x in outs], want[here]), turn
        if turn % 4 == 0:
            rows = slice(4 * turn, 4 * turn + 1 + turn % 3)
            assert everywhere([x[rows] for x in gathered], side[rows]), turn


@pytest.mark.parametrize("where, world", WORLDS)
def test_in_graphs(where, world):
    width, columns = 2048, 1000
    ranks = Ranks(where, world, width, gather_bytes=4 * 2 * columns * world)
    ns = (1, 7, 300, 2, 65, 1)
    xs, w = [inputs(ranks, n, width) for n in ns], weights(width)
    ws, wide = ranks.spread(w), inputs(ranks, 2, columns)
    wide = [x.float() for x in wide]
    residuals = [ranks.spread(torch.zeros(n, width, device="cuda")) for n in ns]
    outs = [ranks.spread(poisoned(n, width)) for n in ns]

    def step(rank):
        for n, x, residual, out in zip(ns, xs, residuals, outs, strict=True):
            ranks.call(
                rank, "q35_all_reduce_norm", n, width, x[rank], residual[rank], ws[rank], EPS, out[rank]
            )
            ranks.call(rank, "q35_all_reduce", n, width, out[rank], out[rank])
        ranks.call(rank, "q35_gather_columns", 2, columns, wide[rank])

    # What is launched for the first time may wait for the device: in turn, then.
    ranks.synchronize()
    for n, x, residual, out in zip(ns, xs, residuals, outs, strict=True):
        ranks.all("q35_all_reduce_norm", n, width, x, residual, ws, EPS, out)
        ranks.all("q35_all_reduce", n, width, out, out)
    ranks.all("q35_gather_columns", 2, columns, wide)
    ranks.synchronize()
    graphs = ranks.graphs(step)
    want = [residual[0].cuda(0).clone() for residual in residuals]
    ranks.synchronize()
    for turn in range(4):
        for i, n in enumerate(ns):
            for rank, x in enumerate(inputs(ranks, n, width, seed=1000 * (turn + 1))):
                xs[i][rank].copy_(x)
        ranks.synchronize()
        for rank, graph in enumerate(graphs):
            with torch.cuda.stream(ranks.streams[rank]):
                graph.replay()
        ranks.synchronize()
        assert ranks.waited_in_vain() == [0] * world
        for i in range(len(ns)):
            want[i] = want[i] + in_order(xs[i])
            assert everywhere(residuals[i], want[i]), (turn, i)
            assert everywhere(outs[i], in_order([normed(want[i], w)] * world).bfloat16()), (turn, i)
        columns_of_all = torch.cat([x.cuda(0) for x in wide], dim=1)
        assert everywhere([ranks.gathered(r, 2, world * columns) for r in range(world)], columns_of_all)


@pytest.mark.parametrize("where, world", WORLDS)
def test_counts_wrap(where, world):
    """2^32 turns are as if a few."""
    width = 64
    ranks = Ranks(where, world, width, gather_bytes=4 * width * world)
    for region in ranks.regions:
        words = region.view(torch.int32)
        words[64 : 64 + 3 * 64] = -3  # counts of all channels
        words[512 : 512 + 4 * 64 * 8] = -3  # their flags
    for turn in range(8):
        few, many = inputs(ranks, 3, width, seed=turn), inputs(ranks, 200, width, seed=turn + 1)
        wide = [x[:1].float() for x in few]
        sums = [ranks.spread(poisoned(n, width)) for n in (3, 200)]
        ranks.synchronize()
        ranks.all("q35_all_reduce", 3, width, few, sums[0])
        ranks.all("q35_all_reduce", 200, width, many, sums[1])
        ranks.all("q35_gather_columns", 1, width, wide)
        ranks.synchronize()
        assert ranks.waited_in_vain() == [0] * world
        assert everywhere(sums[0], in_order(few).bfloat16()), turn
        assert everywhere(sums[1], in_order(many).bfloat16()), turn
        side = torch.cat([x.cuda(0) for x in wide], dim=1)
        assert everywhere([ranks.gathered(r, 1, world * width) for r in range(world)], side), turn


def launches(ranks, n, width):
    """Of each kind, on one rank."""
    device = ranks.devices[0]
    x = torch.ones(n, width, device=device)
    delta, residual, w = x.bfloat16(), x.clone(), torch.ones(width, device=device)
    out = torch.empty_like(delta)
    return {
        "q35_all_reduce": (n, width, delta, out),
        "q35_all_reduce_norm": (n, width, delta, residual, w, EPS, out),
        "q35_gather_columns": (n, width, x),
    }


@pytest.mark.parametrize("name", ["q35_all_reduce", "q35_all_reduce_norm", "q35_gather_columns"])
@pytest.mark.parametrize("n", [1, 100])
@pytest.mark.parametrize("where, world", PLACES)
def test_who_does_not_come(where, world, n, name):
    width = 256
    ranks = Ranks(where, world, width, gather_bytes=4 * n * width * world, seconds=0.5)
    arguments = launches(ranks, n, width)[name]
    ranks.synchronize()
    start = time.monotonic()
    ranks.call(0, name, *arguments)
    ranks.streams[0].synchronize()
    assert 0.4 < time.monotonic() - start < 5
    assert ranks.waited_in_vain() == [2, 0]
    start = time.monotonic()
    for _ in range(20):
        ranks.call(0, name, *arguments)
    ranks.streams[0].synchronize()
    assert time.monotonic() - start < 0.4 and ranks.waited_in_vain() == [2, 0]
    # From the beginning, with both.
    for tensor in (*ranks.regions, *ranks.status):
        tensor.zero_()
    both = inputs(ranks, n, width)
    sums = ranks.spread(poisoned(n, width))
    ranks.synchronize()
    ranks.all("q35_all_reduce", n, width, both, sums)
    ranks.synchronize()
    assert everywhere(sums, in_order(both).bfloat16()) and ranks.waited_in_vain() == [0, 0]


@pytest.mark.parametrize("name", ["q35_all_reduce", "q35_all_reduce_norm", "q35_gather_columns"])
@pytest.mark.parametrize("n", [1, 100])
@pytest.mark.parametrize("where, world", PLACES)
def test_who_waits_can_be_told_to_stop(where, world, n, name):
    width = 256
    ranks = Ranks(where, world, width, gather_bytes=4 * n * width * world, seconds=60)
    arguments = launches(ranks, n, width)[name]
    word = torch.ones(4, dtype=torch.uint8).pin_memory()
    side = torch.cuda.Stream(device=ranks.devices[0])
    ranks.synchronize()
    start = time.monotonic()
    ranks.call(0, name, *arguments)
    time.sleep(0.1)
    assert not ranks.streams[0].query()
    with torch.cuda.stream(side):
        ranks.regions[0][:4].copy_(word, non_blocking=True)
    ranks.streams[0].synchronize()
    assert time.monotonic() - start < 10
    assert ranks.waited_in_vain() == [2, 0]


@pytest.mark.gpu
def test_what_cannot_be():
    ranks = Ranks("one card", 2, 64, gather_bytes=4096)
    x = torch.ones(64, 72, dtype=torch.bfloat16, device="cuda")
    wide = torch.ones(64, 64, device="cuda")
    for name, *arguments in (
        ("q35_all_reduce", 1, 72, x, x),  # wider than the regions are for
        ("q35_all_reduce", 1, 60, x, x),
        ("q35_all_reduce", 1, 64, x.flatten()[1:], x),  # not aligned
        ("q35_all_reduce_norm", 1, 64, x, None, wide, EPS, x),
        ("q35_gather_columns", 9, 64, wide),  # no room
        ("q35_gather_columns", 1, 6, wide),
    ):
        with pytest.raises(AssertionError, match="CUDA error 1"):
            ranks.call(0, name, *arguments)
    assert call("q35_peer_bytes", 9, 1, 64, 0) == call("q35_peer_bytes", 2, 65, 64, 0) == -1
    ranks.all("q35_all_reduce", 0, 64, x, x)  # no rows: nothing is launched
    ranks.synchronize()
    assert ranks.waited_in_vain() == [0, 0]
