"""Sparse blocks of which some experts alone are here, as on a rank with expert parallelism: each against f64, and all
together against the whole block."""

from itertools import pairwise

import pytest
import torch
from launch import MoeDims, call, error, poisoned, same_bits
from test_moe import EPS, LARGE_FAMILY, SMALL_FAMILY, TOLERANCE, Block, norm_inputs
from test_moe_norm import apart, together
from test_moe_packed import BF16, FP8, INT4, NVFP4, Q4_K, Q6_K
from test_moe_packed import Block as PackedBlock
from test_moe_packed_many import Many

pytestmark = pytest.mark.gpu

PLAIN = [
    SMALL_FAMILY,
    (*SMALL_FAMILY[:4], 0),
    LARGE_FAMILY,
    (50, 12, 12, 50, 0),
    (48, 32, 3, 60, 6),
    (72, 256, 8, 72, 0),
    (264, 12, 3, 136, 72),
    (130, 700, 70, 50, 16),
]
PACKED = [
    (SMALL_FAMILY, [INT4] * 4),
    (SMALL_FAMILY, [FP8] * 4),
    (SMALL_FAMILY, [Q4_K, Q6_K, Q4_K, Q6_K]),
    (LARGE_FAMILY, [NVFP4, NVFP4, BF16, BF16]),
    ((576, 8, 3, 320, 64), [("int4_bf16", 32, True), FP8, FP8, BF16]),
    ((192, 12, 12, 64, 0), [INT4] * 4),
]


def splits(experts):
    """Into halves, quarters, and one expert and the others."""
    half, quarter = experts // 2, experts // 4
    ends = [(0, half, experts), (0, quarter, 2 * quarter, 3 * quarter, experts), (0, experts - 1, experts)]
    return [[range(*both) for both in pairwise(end)] for end in ends]


def nothing_here(block, x):
    return not block.reference(x)[0].any()


def check_sum(block, parts, run):
    """The shared expert is the first part's."""
    outs = [run(part if i == 0 else part.without_shared()) for i, part in enumerate(parts)]
    assert error(sum(out.double() for out in outs), run(block).double()) < TOLERANCE


@pytest.mark.parametrize("n", [1, 2, 16, 17, 100, 1000])
@pytest.mark.parametrize("dims", PLAIN, ids=str)
def test_parts(dims, n):
    block = Block(dims)
    x = block.tokens(n)
    _, residual, w = norm_inputs(n, dims[0], with_delta=False)
    for split in splits(dims[1]):
        parts = [block.part(here) for here in split]
        for part in parts:
            if nothing_here(part, x):
                assert (part.run(x) == 0).all()
            else:
                part.check(x)
            want, found = apart(part, x, residual, w), together(part, x, residual, w)
            assert same_bits(found[0], want[0]) and same_bits(found[1], want[1])
        check_sum(block, parts, lambda part: part.run(x))


@pytest.mark.parametrize("n", [1, 2, 8, 9, 16])
@pytest.mark.parametrize("dims", [SMALL_FAMILY, (264, 12, 3, 136, 72), (64, 128, 32, 16, 0)], ids=str)
def test_parts_behind_a_norm(dims, n):
    block = Block(dims)
    for with_delta in (True, False):
        inputs = norm_inputs(n, dims[0], with_delta=with_delta)
        for split in splits(dims[1]):
            for here in split:
                part = block.part(here)
                found, want = part.run_norm(*inputs), part.run_norm_apart(*inputs)
                assert all(same_bits(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("n", [1, 2, 8, 9, 16])
@pytest.mark.parametrize(("dims", "formats"), PACKED, ids=str)
def test_parts_in_codes(dims, formats, n):
    block = PackedBlock(dims, formats)
    delta, residual, w = norm_inputs(n, dims[0])
    _, x, _ = block.run(delta, residual, w)
    for split in splits(dims[1]):
        parts = [block.part(here) for here in split]
        for part in parts:
            if nothing_here(part, x):
                assert (part.run(delta, residual, w)[2] == 0).all()
            else:
                part.check(n)
        check_sum(block, parts, lambda part: part.run(delta, residual, w)[2])


@pytest.mark.parametrize("n", [2, 17, 100, 1000])
@pytest.mark.parametrize(("dims", "formats"), PACKED, ids=str)
def test_parts_in_codes_of_many_tokens(dims, formats, n):
    block = Many(dims, formats)
    x = block.tokens(n)
    for split in splits(dims[1]):
        parts = [block.part(here) for here in split]
        for part in parts:
            if nothing_here(part, x):
                out = part.run(x)
                assert (out == 0).all()
            else:
                out = part.check(x)
            if n > 16:
                part.check_norm(x, out)
        check_sum(block, parts, lambda part: part.run(x))


@pytest.mark.parametrize("shared", [0, 64])
@pytest.mark.parametrize("n", [1, 2, 16, 17, 300])
def test_nothing_that_was_chosen_is_here(n, shared):
    """All tokens take experts 0 and 1: other parts have the shared expert alone."""
    dims = (256, 16, 2, 64, shared)
    plain, packed = Block(dims), Many(dims, [INT4] * 4)
    few = PackedBlock(dims, [INT4] * 4)
    delta, residual, w = norm_inputs(n, dims[0])
    for block in (plain, packed, few):
        block.router.zero_()
        for here in (range(8, 16), range(15, 16), range(2, 3)):
            part = block.part(here)
            if block is few and n > 16:
                continue
            if block is few:
                _, x, out = part.run(delta, residual, w)
            else:
                x = block.tokens(n)
                out = part.run(x)
            want, _ = part.reference(x)
            if shared:
                assert error(out, want) < TOLERANCE
            else:
                assert not want.any() and (out == 0).all()


@pytest.mark.parametrize("here", [range(128), range(200, 256)], ids=str)
def test_a_token_does_not_see_the_batch(here):
    plain, packed = Block(SMALL_FAMILY).part(here), Many(SMALL_FAMILY, [INT4] * 4).part(here)
    few = PackedBlock(SMALL_FAMILY, [INT4] * 4).part(here)
    x = plain.tokens(300)
    for part in (plain, packed):
        out = part.run(x)
        for rows in (slice(17), slice(100, 165), slice(270, 300)):
            assert same_bits(part.run(x[rows]), out[rows])
    out = plain.run(x[:16])
    delta, residual, w = norm_inputs(16, SMALL_FAMILY[0])
    found = few.run(delta, residual, w)[2]
    for rows in (slice(1), slice(3, 5), slice(15, 16), slice(7, 16)):
        assert same_bits(plain.run(x[rows]), out[rows])
        assert same_bits(few.run(delta[rows], residual[rows], w)[2], found[rows])


@pytest.mark.parametrize("n", [1, 8, 16, 100])
def test_layer_after_layer(n):
    """Kernels of neighbouring layers overlap, and share a workspace: many in a graph, against one at a time."""
    blocks = [Many(SMALL_FAMILY, [INT4] * 4, seed=seed).part(range(64, 128)) for seed in (0, 5)]
    start, space = blocks[0].tokens(n), blocks[0].workspace(n)
    _, first, w = norm_inputs(n, SMALL_FAMILY[0], with_delta=False)
    x, out, residual, dims = start.clone(), poisoned(n, SMALL_FAMILY[0]), first.clone(), blocks[0].struct()

    def step(layer):
        weights = blocks[layer % 2].weights()
        if n > 16:
            call("q35_packed_moe_then_norm", n, dims, weights, x, space, residual, w, EPS, x)
        else:
            delta = start if layer == 0 else out
            call("q35_packed_norm_moe", n, dims, weights, delta, residual, w, EPS, x, space, out)

    for layer in range(12):
        step(layer)
        torch.cuda.synchronize()
    want = residual.clone(), x.clone()
    assert want[1].isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(12):
            step(layer)
    for _ in range(10):
        residual.copy_(first)
        x.copy_(start)
        graph.replay()
        assert same_bits(residual, want[0]) and same_bits(x, want[1])


def test_workspace_of_the_whole_serves_parts():
    for dims in PLAIN:
        for n in (1, 16, 17, 1000, 9000):
            whole = call("q35_moe_workspace", n, MoeDims(*dims))
            for here in (range(dims[1] // 2), range(dims[1] - 1, dims[1])):
                part = MoeDims(*dims, here.start, len(here))
                assert 0 < call("q35_moe_workspace", n, part) <= whole
                assert call("q35_moe_experts_at", n, part) == call("q35_moe_experts_at", n, MoeDims(*dims))


@pytest.mark.parametrize("here", [(-1, 2), (0, 0), (3, 2), (0, 5)])
def test_experts_that_cannot_be(here):
    block = Block((64, 4, 2, 64, 64))
    x = block.tokens(3)
    with pytest.raises(AssertionError, match="CUDA error 1"):
        call("q35_moe", 3, MoeDims(*block.dims, *here), block.weights(), x, block.workspace(3), x.clone())
