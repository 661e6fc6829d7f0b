"""The launchers of cuda/elementwise.cu against float64."""

import pytest
import torch
from launch import Batch, call, error, poisoned, randn, same_bits

pytestmark = pytest.mark.gpu
BF16 = 4e-3
EPS = 1e-6


def twice(run, *outputs):
    """Runs `run` on fresh copies of `outputs` twice; both give the same bits."""
    results = []
    for _ in range(2):
        copies = [o.clone() for o in outputs]
        run(*copies)
        results.append(copies)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    return results[0]


@pytest.mark.parametrize("hidden", [3072, 2048, 50, 24, 7])
def test_embed(hidden):
    batch = Batch([(0, 5, 5), (64, 0, 0), (3, 1, 0), (0, 70, 70)])
    ids = torch.arange(batch.num_tokens) * 7 % 33
    batch.set_token_ids(ids)
    table = randn(33, hidden)
    guard = poisoned(batch.num_tokens + 1, hidden, dtype=torch.float32)
    (out,) = twice(lambda o: call("q35_embed", batch.struct, table, hidden, o), guard)
    assert torch.equal(out[:-1], table[ids.cuda()].float()) and out[-1].isnan().all()


@pytest.mark.parametrize("hidden", [3072, 2048, 4096, 6144, 9000, 16384, 20000, 50, 24, 7])
@pytest.mark.parametrize("with_delta", [True, False])
def test_rmsnorm_residual(hidden, with_delta):
    n = 9
    residual = randn(n, hidden, dtype=torch.float32, scale=3)
    delta = randn(n, hidden, seed=1) if with_delta else None
    w = 1 + randn(hidden, dtype=torch.float32, seed=2, scale=0.1)
    name = "q35_rmsnorm_residual"
    found, out = twice(
        lambda r, o: call(name, n, hidden, delta, r, w, EPS, o), residual, poisoned(n + 1, hidden)
    )
    want = residual.double() + (delta.double() if with_delta else 0)
    assert error(found, want) < 1e-6 and out[-1].isnan().all()
    if not with_delta:
        assert same_bits(found, residual)
    assert error(out[:-1], want / (want.square().mean(-1, keepdim=True) + EPS).sqrt() * w.double()) < BF16
    # A row alone is itself.
    alone, y = residual[4:5].clone(), poisoned(1, hidden)
    call(name, 1, hidden, delta[4:5].contiguous() if with_delta else None, alone, w, EPS, y)
    assert same_bits(y, out[4:5]) and same_bits(alone, found[4:5])


@pytest.mark.parametrize("hidden", [3072, 2048, 1000, 20000, 50])
@pytest.mark.parametrize("shift", [0, 1])
def test_rmsnorm_has_one_order_of_sums(hidden, shift):
    """256 lanes, a butterfly over each 32 and the eight sums in turn, however the row is read."""
    n = 3
    x = randn(n, hidden, dtype=torch.float32, scale=3)
    w = (1 + randn(hidden + 1, dtype=torch.float32, seed=2, scale=0.1))[shift : shift + hidden]
    out = poisoned(n, hidden)
    call("q35_rmsnorm_residual", n, hidden, None, x, w, EPS, out)
    width = 8 if hidden % 8 == 0 else 1
    rounds = -(-hidden // (256 * width))
    padded = torch.zeros(n, rounds * 256 * width)
    padded[:, :hidden] = x.cpu()
    terms = padded.reshape(n, rounds, 256, width).transpose(1, 2).reshape(n, 256, -1)
    lanes = torch.zeros(n, 256)
    for i in range(terms.shape[-1]):
        lanes = (lanes.double() + terms[..., i].double() ** 2).float()
    for step in (16, 8, 4, 2, 1):
        lanes = lanes + lanes[:, torch.arange(256) ^ step]
    total = torch.zeros(n)
    for i in range(8):
        total = total + lanes[:, 32 * i]
    scale = 1.0 / (total / hidden + torch.tensor(EPS, dtype=torch.float32)).sqrt()
    want = (x.cpu() * scale[:, None] * w.cpu()).bfloat16()
    assert same_bits(out.cpu(), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [3072, 50, 7])
def test_gather(width, dtype):
    x, rows = randn(40, width, dtype=dtype), [39, 0, 7, 7, 21]
    index = torch.tensor(rows, dtype=torch.int32, device="cuda")
    out = poisoned(len(rows) + 1, width, dtype=dtype)
    call("q35_gather", index, len(rows), x, width * x.element_size(), out)
    assert same_bits(out[:-1], x[rows]) and out[-1].isnan().all()


@pytest.mark.parametrize("n, width", [(1, 512), (33, 1024), (3, 50), (5, 7)])
def test_silu_mul(n, width):
    gate_up = randn(n, 2 * width, scale=4)
    gate_up[0, 0], gate_up[0, 1] = -1e4, 1e4
    (out,) = twice(lambda o: call("q35_silu_mul", n, width, gate_up, o), poisoned(n + 1, width))
    gate, up = gate_up.double().split(width, dim=-1)
    want = torch.nn.functional.silu(gate) * up
    assert error(out[:-1], want) < BF16 and out[-1].isnan().all()
    assert error(out[:-1, 2:], want[:, 2:]) < BF16


@pytest.mark.parametrize("heads, dim", [(32, 128), (64, 128), (8, 64), (5, 64), (3, 10), (2, 24), (3, 50)])
def test_gated_rmsnorm(heads, dim):
    n, z_start = 7, 2 * dim
    stride = z_start + heads * dim + 2 * heads
    core, projected = randn(n + 1, heads * dim, scale=0.1), randn(n, stride, seed=1, scale=2)
    w = 1 + randn(dim, dtype=torch.float32, seed=2, scale=0.1)
    (out,) = twice(
        lambda c: call("q35_gated_rmsnorm", n, heads, dim, w, EPS, projected, stride, z_start, c), core
    )
    x = core[:n].double().reshape(n, heads, dim)
    z = projected[:, z_start : z_start + heads * dim].double().reshape(n, heads, dim)
    want = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * w.double() * torch.nn.functional.silu(z)
    assert error(out[:n].reshape(n, heads, dim), want) < BF16
    assert same_bits(out[n:], core[n:])


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("n", [1, 7, 8, 1001, 1 << 16])
def test_conversions(n, offset):
    x = randn(n + offset, dtype=torch.float32)[offset:]
    x[0] = float("inf")
    out = poisoned(n + 1)
    call("q35_to_bf16", n, x, out)
    assert same_bits(out[:n], x.bfloat16()) and out[n:].isnan().all()
    back = poisoned(n + 1, dtype=torch.float32)
    call("q35_to_f32", n, out, back)
    assert same_bits(back[:n], x.bfloat16().float()) and back[n:].isnan().all()


def test_fill_normal():
    n = (1 << 20) + 3
    (out,) = twice(lambda o: call("q35_fill_normal", 0, n, 5, 0.5, o), poisoned(n + 1))
    x = out[:n].double() / 0.5
    assert out[n:].isnan().all() and x.isfinite().all()
    moments = [float((x**k).mean()) for k in (1, 2, 3, 4)]
    assert all(abs(a - b) < 0.05 for a, b in zip(moments, [0, 1, 0, 3], strict=True)), moments
    assert abs(float((x[1:] * x[:-1]).mean())) < 0.01
    short = poisoned(100)
    call("q35_fill_normal", 0, 100, 5, 0.5, short)
    assert same_bits(short, out[:100])
    call("q35_fill_normal", 77, 23, 5, 0.5, short)
    assert same_bits(short[:23], out[77:100]) and same_bits(short[23:], out[23:100])
    call("q35_fill_normal", 0, 100, 6, 0.5, short)
    assert not same_bits(short, out[:100])


def test_no_rows():
    x = poisoned(8)
    f = poisoned(8, dtype=torch.float32)
    empty = Batch([(0, 0, 0)])
    call("q35_embed", empty.struct, x, 8, f)
    call("q35_rmsnorm_residual", 0, 8, x, f, f, EPS, x)
    call("q35_gather", None, 0, x, 16, f)
    call("q35_silu_mul", 0, 4, x, x)
    call("q35_gated_rmsnorm", 0, 1, 8, f, EPS, x, 8, 0, x)
    call("q35_to_bf16", 0, f, x)
    call("q35_to_f32", 0, x, f)
    call("q35_fill_normal", 0, 0, 1, 1.0, x)
    torch.cuda.synchronize()
    assert x.isnan().all() and f.isnan().all()
