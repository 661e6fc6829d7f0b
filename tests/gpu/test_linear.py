"""The linear launchers against plain float64."""

from itertools import pairwise

import pytest
import torch
from launch import call, error, poisoned, randn, same_bits

pytestmark = pytest.mark.gpu
FEW = 16  # rows; up to here the sum has one order, above it another


def linear(x, w, dtype=torch.bfloat16):
    """The product; what lies behind the output is untouched."""
    n, out_dim = len(x), len(w)
    out = torch.full((n * out_dim + 64,), float("nan"), dtype=dtype, device="cuda")
    name = "q35_linear" if dtype == torch.bfloat16 else "q35_linear_f32"
    call(name, n, x.shape[1], out_dim, x, w, out, out_dim)
    assert out[n * out_dim :].isnan().all(), "past the output"
    return out[: n * out_dim].view(n, out_dim)


def check(x, w):
    want = x.double() @ w.double().T
    for dtype, bound in ((torch.bfloat16, 4e-3), (torch.float32, 1e-4)):
        found = linear(x, w, dtype)
        assert error(found, want) < bound
        each = (found.double() - want).abs() / (x.double().norm(dim=1)[:, None] * w.double().norm(dim=1))
        assert each.max() < bound
        assert same_bits(found, linear(x, w, dtype))


# Those of the family, then any; above 4608, x of 16 rows does not fit beside the weights in shared memory.
SHAPES = [
    *[(2048, 12352), (4096, 2048), (2048, 9216), (3072, 20480), (8192, 3072), (2048, 256), (3072, 256)],
    *[(2048, 8192), (2048, 2048), (3072, 512), (4096, 3072), (2048, 16400), (512, 1), (8, 17)],
    *[(64, 5000), (72, 4231), (200, 16391), (50, 33), (10, 1), (1, 7), (33, 300), (24, 40)],
    *[(4104, 4300), (9000, 31), (17408, 5120)],
]


@pytest.mark.parametrize(("inner", "out_dim"), SHAPES)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 15, 16, 17, 129])
def test_linear(n, inner, out_dim):
    check(randn(n, inner, seed=n), randn(out_dim, inner, seed=100 + out_dim))


@pytest.mark.parametrize(
    ("inner", "out_dim"),
    [(2048, 8192), (2048, 512), (3072, 16391), (8192, 3072), (9000, 1100), (50, 33), (72, 100)],
)
def test_rows_are_the_same_in_any_number(inner, out_dim):
    x, w = randn(300, inner, seed=1), randn(out_dim, inner, seed=2)
    for low, high in ((1, FEW), (FEW + 1, 300)):
        most = linear(x[:high].contiguous(), w, torch.float32)
        for n in (low, 5, 8, 9, 13, 60, 128, 200):
            if low <= n < high:
                first = high - n  # other places in the tiles too
                assert same_bits(linear(x[first:high].contiguous(), w, torch.float32), most[first:]), n


def test_rows_do_not_leak_into_each_other():
    for n in (2, 16, 40):
        x, w = randn(n, 256, seed=3), randn(200, 256, seed=4)
        want = linear(x, w)
        x[-1] = float("nan")
        found = linear(x, w)
        assert same_bits(found[:-1], want[:-1])
        assert found[-1].isnan().all()


def test_unaligned_operands():
    x, w = randn(20 * 64 + 1, seed=5), randn(100 * 64 + 1, seed=6)
    for n in (4, 20):
        check(x[1:].view(20, 64)[:n], w[1:].view(100, 64))


def test_vocabulary_head():
    x, w = randn(3, 2048, seed=7), randn(248320, 2048, seed=8, scale=0.02)
    found = linear(x, w, torch.float32)
    some = torch.arange(0, 248320, 997, device="cuda")
    assert torch.isfinite(found).all()
    assert error(found[:, some], x.double() @ w[some].double().T) < 1e-4
    assert same_bits(found[1:2], linear(x[1:2], w, torch.float32))


@pytest.mark.parametrize("n", [1, 8, 16])
def test_a_chain_in_a_graph(n):
    """Kernels that start under the ones before them see what those wrote, in a graph too."""
    dims = (2048, 12352, 2048, 9216, 3072, 8192, 3072, 2048)
    ws = [randn(b, a, seed=i, scale=a**-0.5) for i, (a, b) in enumerate(pairwise(dims))]
    norm = 1 + randn(2048, dtype=torch.float32, seed=20, scale=0.1)
    start = randn(n, 2048, seed=21)
    rows = [torch.full((n, d), float("nan"), dtype=torch.bfloat16, device="cuda") for d in (2048, *dims[:-1])]
    residual = torch.zeros(n, 2048, dtype=torch.float32, device="cuda")

    def layers(between):
        for _ in range(3):
            call("q35_rmsnorm_residual", n, 2048, rows[0], residual, norm, 1e-6, rows[1])
            between()
            for w, x, y in zip(ws, rows[1:], [*rows[2:], rows[0]], strict=True):
                call("q35_linear", n, w.shape[1], len(w), x, w, y, len(w))
                between()

    def reset():
        rows[0].copy_(start)
        residual.zero_()
        torch.cuda.synchronize()

    reset()
    layers(torch.cuda.synchronize)
    want = rows[0].clone()
    assert torch.isfinite(want).all()
    graph = torch.cuda.CUDAGraph()
    reset()
    with torch.cuda.graph(graph):
        layers(lambda: None)
    for run in (lambda: layers(lambda: None), graph.replay, graph.replay):
        reset()
        run()
        torch.cuda.synchronize()
        assert same_bits(rows[0], want)


@pytest.mark.parametrize("n", [1, 3, 16, 17, 200])
@pytest.mark.parametrize(("inner", "out_dim"), [(192, 50), (30, 7)])
def test_columns_of_something_wider(n, inner, out_dim):
    x, w = randn(n, inner, seed=20), randn(out_dim, inner, seed=21)
    wide = poisoned(n, out_dim + 9)
    call("q35_linear", n, inner, out_dim, x, w, wide[:, 4:], out_dim + 9)
    assert same_bits(wide[:, 4 : 4 + out_dim], linear(x, w))
    assert wide[:, :4].isnan().all() and wide[:, 4 + out_dim :].isnan().all()


def test_nothing_to_do():
    for name in ("q35_linear", "q35_linear_f32"):
        call(name, 0, 64, 64, None, None, None, 64)
