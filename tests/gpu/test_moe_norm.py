"""The sparse block together with the norm after it, against the two apart; and lists of very many tokens."""

import pytest
import torch
from launch import MoeDims, call, error, poisoned, same_bits
from test_moe import EPS, LARGE_FAMILY, ODD, SMALL_FAMILY, TOLERANCE, Block, norm_inputs

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def small_family():
    return Block(SMALL_FAMILY)


def apart(block, x, residual, w):
    residual, out = residual.clone(), torch.empty_like(x)
    call("q35_rmsnorm_residual", *residual.shape, block.run(x), residual, w, EPS, out)
    return residual, out


def together(block, x, residual, w, *, in_place=False):
    n, hidden = residual.shape
    residual, space = residual.clone(), block.workspace(n)
    out = poisoned(n + 1, hidden)
    given = out[:n].copy_(x) if in_place else x
    dims, weights = block.struct(), block.weights()
    call("q35_moe_then_norm", n, dims, weights, given, space, residual, w, EPS, out)
    assert (space[-4096:] == 0xA5).all(), "wrote past the workspace"
    assert out[-1].isnan().all()
    return residual, out[:-1]


def check(block, n):
    x = block.tokens(n)
    _, residual, w = norm_inputs(n, block.dims[0], with_delta=False)
    want = apart(block, x, residual, w)
    for in_place in (False, True):
        found = together(block, x, residual, w, in_place=in_place)
        assert same_bits(found[0], want[0]) and same_bits(found[1], want[1])
    sums, sure = block.reference(x)
    after = residual.double() + sums
    assert error(want[0][sure], after[sure]) < TOLERANCE
    after = after / (after.square().mean(-1, keepdim=True) + EPS).sqrt() * w.double()
    assert error(want[1][sure], after[sure]) < TOLERANCE


@pytest.mark.parametrize("n", [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 64, 300, 1000])
def test_small_family(small_family, n):
    check(small_family, n)


@pytest.mark.parametrize("n", [16, 17, 65, 300])
def test_large_family(n):
    check(Block(LARGE_FAMILY), n)


@pytest.mark.parametrize("dims", [*ODD, (4096, 16, 2, 64, 64), (4104, 16, 2, 64, 64)], ids=str)
@pytest.mark.parametrize("misaligned", [False, True])
def test_odd_sizes(dims, misaligned):
    block = Block(dims, misaligned=misaligned)
    for n in (1, 7, 16, 17, 33, 64, 300):
        check(block, n)


def test_whole_rows_of_many_tokens_and_blocks_of_columns(small_family):
    """On Hopper the outputs by expert of 8192 tokens are whole rows, those of 10000 are not."""
    for n in (4097, 8192, 10000):
        x = small_family.tokens(n)
        _, residual, w = norm_inputs(n, SMALL_FAMILY[0], with_delta=False)
        want, found = apart(small_family, x, residual, w), together(small_family, x, residual, w)
        assert same_bits(found[0], want[0]) and same_bits(found[1], want[1])
        rows = slice(n - 100, n)
        fewer = together(small_family, x[rows], residual[rows], w)
        assert same_bits(fewer[0], found[0][rows]) and same_bits(fewer[1], found[1][rows])


def test_layer_after_layer(small_family):
    """Kernels of neighbouring layers overlap, and share a workspace: many in a graph, against one at a time."""
    n, layers = 200, 12
    dims, weights = MoeDims(*small_family.dims), small_family.weights()
    start = small_family.tokens(n)
    _, first, w = norm_inputs(n, SMALL_FAMILY[0], with_delta=False)
    x, residual, space = start.clone(), first.clone(), small_family.workspace(n)

    def step():
        call("q35_moe_then_norm", n, dims, weights, x, space, residual, w, EPS, x)

    for _ in range(layers):
        step()
        torch.cuda.synchronize()
    want = residual.clone(), x.clone()
    assert want[1].isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(layers):
            step()
    for _ in range(10):
        residual.copy_(first)
        x.copy_(start)
        graph.replay()
        assert same_bits(residual, want[0]) and same_bits(x, want[1])


def test_nothing(small_family):
    dims, weights = MoeDims(*small_family.dims), small_family.weights()
    call("q35_moe_then_norm", 0, dims, weights, None, None, None, None, EPS, None)


@pytest.mark.parametrize("n", [4096, 4097, 8229, 33000])
@pytest.mark.parametrize("dims", [(64, 256, 8, 64, 64), (64, 512, 10, 64, 0), (64, 700, 3, 64, 64)], ids=str)
def test_lists_of_very_many_tokens(dims, n):
    """A block of the sort places one group of tokens, or several."""
    block = Block(dims)
    x = block.tokens(n)
    out = block.check(x)
    for first in (0, n // 2, n - 70):
        assert same_bits(block.run(x[first : first + 70]), out[first : first + 70])


def test_very_many_experts():
    block = Block((64, 8192, 8, 16, 16))
    for n in (17, 300, 5000):
        block.check(block.tokens(n))
