"""`qwen35rs.ops` on torch CUDA tensors against the same op on the CPU, on the same numbers."""

import gc

import numpy as np
import pytest
import torch
from launch import error, randn, same_bits
from qwen35rs import RequestError, ops

pytestmark = pytest.mark.gpu
BF16 = 4e-3
F32 = torch.float32


def numbers(*tensors):
    """As the CPU takes them."""
    found = [None if t is None else t.float().cpu().numpy() for t in tensors]
    return found[0] if len(found) == 1 else found


def agree(found, want, bound=BF16, dtype=torch.bfloat16):
    assert isinstance(found, torch.Tensor) and found.is_cuda and found.dtype == dtype
    assert found.shape == want.shape and found.is_contiguous()
    assert error(found, torch.from_numpy(np.asarray(want))) < bound or not want.size


class Borrowed:
    """A tensor of a library that is not torch."""

    def __init__(self, tensor):
        self.tensor, self.shape = tensor, tensor.shape

    def __dlpack__(self, *, stream=None):
        self.stream = stream
        return self.tensor.__dlpack__(stream=stream)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


# ------------------------------------------------------------------------------------------------ each op


@pytest.mark.parametrize("shape", [(9, 3072), (1, 2048), (2, 3, 50), (4, 7), (0, 24), (17,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, F32])
def test_rms_norm(shape, dtype):
    x, residual = randn(*shape, scale=3), randn(*shape, seed=1, dtype=dtype)
    weight = randn(shape[-1], seed=2, scale=0.3, dtype=dtype)
    agree(ops.rms_norm(x, weight, eps=1e-5), ops.rms_norm(*numbers(x, weight), eps=1e-5))
    before = residual.clone()
    found, want = (
        ops.rms_norm(x, weight, residual=residual),
        ops.rms_norm(*numbers(x, weight), 1e-6, numbers(residual)),
    )
    agree(found[0], want[0])
    agree(found[1], want[1], 1e-6, F32)
    assert same_bits(residual, before)
    wide = randn(*shape, scale=3, dtype=F32)
    kept = wide.clone()
    agree(ops.rms_norm(wide, weight), ops.rms_norm(*numbers(wide, weight)))
    assert same_bits(wide, kept)


@pytest.mark.parametrize(
    "n, heads, head_dim, settings",
    [
        (70, 16, 256, {}),
        (1, 2, 256, {}),
        (65, 3, 128, {"rotary_dim": 128, "theta": 1e4}),
        (5, 2, 24, {"rotary_dim": 10, "mrope_section": (2, 2, 1)}),
        (0, 2, 24, {"rotary_dim": 10}),
        (9, 1, 64, {"yarn": {"factor": 4.0, "original_max_position_embeddings": 1000}}),
    ],
)
def test_rope(n, heads, head_dim, settings):
    # Small and large numbers: nothing of a norm may be left.
    x = randn(n, heads, head_dim) * torch.logspace(-6, 6, max(heads, 1), device="cuda")[:, None].bfloat16()
    rng = np.random.default_rng(0)
    for positions in (rng.integers(0, 5000, n), rng.integers(0, 5000, (3, n))):
        want = ops.rope(numbers(x), positions, **settings)
        outs = [ops.rope(x, positions, **settings)]
        for dtype in (torch.int32, torch.int64):
            outs.append(ops.rope(x, torch.tensor(positions, dtype=dtype, device="cuda"), **settings))
        for out in outs:
            agree(out, want)
            assert same_bits(out, outs[0])
            for head in range(heads):
                agree(out[:, head].contiguous(), want[:, head])
        rotary_dim = settings.get("rotary_dim", head_dim // 4)
        assert same_bits(outs[0][..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("n, experts, top_k", [(1, 256, 8), (33, 512, 10), (5, 7, 7), (0, 8, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, F32])
def test_route(n, experts, top_k, dtype):
    logits = randn(n, experts, dtype=dtype)
    found, want = ops.route(logits, top_k), ops.route(numbers(logits), top_k)
    agree(found[0], want[0], 1e-5, F32)
    assert found[1].dtype == torch.int32 and np.array_equal(found[1].cpu().numpy(), want[1])


@pytest.mark.parametrize(
    "n, channels, kernel", [(300, 8192, 4), (1, 8192, 4), (2, 50, 4), (7, 33, 5), (3, 8, 1), (0, 8, 4)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, F32])
def test_causal_conv1d(n, channels, kernel, dtype):
    x, weight = randn(n, channels), randn(channels, kernel, seed=1, dtype=dtype)
    for state in (None, randn(kernel - 1, channels, seed=2)):
        before = None if state is None else state.clone()
        for w in (weight, weight[:, None]):
            y, after = ops.causal_conv1d(x, w, state)
            want, want_after = ops.causal_conv1d(*numbers(x, weight, state))
            agree(y, want)
            assert after.dtype == torch.bfloat16 and np.array_equal(numbers(after), want_after)
        assert state is None or same_bits(state, before)


@pytest.mark.parametrize("mode", ["chunked", "recurrent"])
@pytest.mark.parametrize(
    "n, k_heads, v_heads, k_dim, v_dim",
    [
        (300, 16, 32, 128, 128),
        (1, 16, 32, 128, 128),
        (130, 2, 4, 64, 64),
        (70, 2, 6, 24, 10),
        (0, 1, 2, 64, 64),
    ],
)
def test_gated_delta_rule(mode, n, k_heads, v_heads, k_dim, v_dim):
    q, k = randn(n, k_heads, k_dim), randn(n, k_heads, k_dim, seed=1)
    v, state = randn(n, v_heads, v_dim, seed=2), randn(v_heads, k_dim, v_dim, seed=3, dtype=F32)
    # Gates that the kernel's own are exactly, in float32; and others, which it rounds.
    a, b = randn(n, v_heads, seed=4, mean=-2).double(), randn(n, v_heads, seed=5).double()
    exact = [(-torch.nn.functional.softplus(a)).float(), torch.sigmoid(b).float()]
    others = [-randn(n, v_heads, seed=6, dtype=F32).square(), randn(n, v_heads, seed=7, dtype=F32).sigmoid()]
    for gates, start, bound in ((exact, state, 1e-4), (exact, None, 1e-4), (others, state, BF16)):
        before = state.clone()
        o, after = ops.gated_delta_rule(q, k, v, *gates, start, mode=mode)
        want, want_after = ops.gated_delta_rule(*numbers(q, k, v, *gates, start), mode=mode)
        agree(o, want)
        agree(after, want_after, bound, F32)
        assert same_bits(state, before)


@pytest.mark.parametrize(
    "n, keys, q_heads, kv_heads, head_dim",
    [
        (300, 300, 16, 2, 256),
        (1, 1000, 16, 2, 256),
        (8, 64, 8, 2, 128),
        (9, 129, 4, 4, 64),
        (3, 70, 6, 3, 40),
        (0, 5, 2, 2, 64),
    ],
)
def test_attention(n, keys, q_heads, kv_heads, head_dim):
    q, k = randn(n, q_heads, head_dim), randn(keys, kv_heads, head_dim, seed=1)
    v = randn(keys, kv_heads, head_dim, seed=2)
    agree(ops.attention(q, k, v), ops.attention(*numbers(q, k, v)))
    assert same_bits(ops.attention(q, k, v), ops.attention(q, k, v, scale=head_dim**-0.5))


@pytest.mark.parametrize("n", [0, 1, 7, 16, 17, 130])
@pytest.mark.parametrize(
    "hidden, experts, top_k, width, shared_width",
    [(2048, 64, 8, 512, 512), (48, 10, 3, 24, 40), (30, 5, 2, 7, 9), (64, 16, 4, 32, 0)],
)
def test_moe(n, hidden, experts, top_k, width, shared_width):
    x, gate = randn(n, hidden), randn(experts, hidden, seed=1)
    gate_up = randn(experts, 2 * width, hidden, seed=2, scale=hidden**-0.5)
    down = randn(experts, hidden, width, seed=3, scale=width**-0.5)
    shared = None
    if shared_width:
        gate_proj, up_proj = (randn(shared_width, hidden, seed=s, scale=hidden**-0.5) for s in (4, 5))
        shared = (gate_proj, up_proj, randn(hidden, shared_width, seed=6, scale=shared_width**-0.5))
        shared = (*shared, randn(hidden, seed=7, scale=hidden**-0.5))
    found = ops.moe(x, gate, gate_up, down, top_k, shared)
    want = ops.moe(*numbers(x, gate, gate_up, down), top_k, shared and numbers(*shared))
    # Tokens whose experts f32 logits decide as well.
    logits = (x.double() @ gate.double().T).sort(dim=1, descending=True).values
    sure = (logits[:, top_k - 1] - logits[:, top_k] > 1e-4).cpu()
    assert sure.sum() >= n - 2
    agree(found[sure], want[sure.numpy()])


# ------------------------------------------------------------------------------------------- the protocol


def test_results_are_lent_without_a_copy():
    x, weight = randn(5, 64), randn(64, seed=1)
    result = ops.rms_norm(Borrowed(x), Borrowed(weight))
    assert isinstance(result, ops.DeviceTensor)
    assert (result.shape, result.dtype, result.device) == ((5, 64), "bfloat16", "cuda:0")
    one, two = torch.from_dlpack(result), torch.from_dlpack(result)
    assert one.data_ptr() == two.data_ptr() and one.is_cuda
    want = ops.rms_norm(x, weight)
    assert same_bits(one, want)
    # A tensor outlives what it was made of; a capsule that nobody takes is given back.
    result.__dlpack__(stream=1)
    del result, one
    gc.collect()
    ops.rms_norm(randn(5, 64, seed=9), weight)
    assert same_bits(two, want)
    two.add_(1)


def test_arguments_are_read_where_they_are():
    """No memory beside results and scratch is taken: the weights are larger than what is allowed."""
    x, gate = randn(1, 2048), randn(64, 2048, seed=1)
    gate_up, down = torch.zeros(64, 2048, 2048, dtype=torch.bfloat16, device="cuda"), randn(64, 2048, 1024)
    ops.moe(x, gate, gate_up, down, 8)
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    kept = ops.moe(x, gate, gate_up, down, 8)
    assert before - torch.cuda.mem_get_info()[0] < gate_up.nbytes / 4
    assert kept.isfinite().all()


def test_on_the_callers_stream():
    old, new, weight = randn(64, 2048), randn(64, 2048, seed=1), randn(2048, seed=2)
    want = ops.rms_norm(new, weight)
    x, stream = old.clone(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.rms_norm(x, weight)  # kernels are loaded, and the driver has memory at hand
        torch.cuda._sleep(200_000_000)
        x.copy_(new)
        borrowed = Borrowed(x)
        found, lent = ops.rms_norm(x, weight), ops.rms_norm(borrowed, weight)
        assert borrowed.stream == stream.cuda_stream
        assert not stream.query(), "the op has waited"
    # Taken on the default stream, which must wait for the other.
    taken = torch.from_dlpack(lent).clone()
    torch.cuda.current_stream().synchronize()
    assert same_bits(taken, want)
    stream.synchronize()
    assert same_bits(found, want)
    borrowed = Borrowed(x)
    ops.rms_norm(borrowed, weight)
    assert borrowed.stream == 1


def test_memory_is_given_back():
    x, weight, k = randn(4096, 2048), randn(2048, seed=1), randn(4096, 2, 256, seed=2)

    def free(times):
        for _ in range(times):
            y, total = ops.rms_norm(x, weight, residual=x)
            ops.rope(y.reshape(4096, 8, 256), np.arange(4096))
            ops.attention(y.reshape(4096, 8, 256), k, k)
            with torch.cuda.stream(stream):
                torch.from_dlpack(ops.rms_norm(Borrowed(x), weight)).sum()
            del y, total
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info()[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    first = free(3)
    # One round of results alone is 80 MB.
    assert first - free(100) < 64 << 20


@pytest.mark.parametrize(
    "words, call",
    [
        ("x: found dtype float16; allowed: bfloat16 or float32", lambda x: ops.rms_norm(x(3, 64).half(), x(64))),
        ("x: found dtype float32; allowed: bfloat16", lambda x: ops.moe(x(3, 64).float(), x(4, 64), x(4, 64, 64), x(4, 64, 32), 2)),
        ("state: found dtype bfloat16; allowed: float32", lambda x: ops.gated_delta_rule(x(3, 2, 64), x(3, 2, 64), x(3, 2, 64), x(3, 2), x(3, 2), x(2, 64, 64))),
        ("weight: found shape", lambda x: ops.rms_norm(x(3, 64), x(32))),
        ("residual: found shape", lambda x: ops.rms_norm(x(3, 64), x(64), residual=x(2, 64))),
        ("weight: found an array that is on no CUDA device; allowed: one on cuda:0", lambda x: ops.rms_norm(x(3, 64), x(64).cpu())),
        ("x: found strides", lambda x: ops.rms_norm(x(64, 64).T, x(64))),
        ("x: found memory 2 bytes after", lambda x: ops.rms_norm(x(65)[1:], x(64))),
        ("x: found Tensor .*gradient", lambda x: ops.rms_norm(x(3, 64).requires_grad_(), x(64))),
        ("scale: found", lambda x: ops.attention(x(3, 2, 64), x(3, 2, 64), x(3, 2, 64), scale=0.5)),
        ("qk_l2norm: found", lambda x: ops.gated_delta_rule(x(3, 2, 64), x(3, 2, 64), x(3, 2, 64), x(3, 2), x(3, 2), qk_l2norm=False)),
        ("beta: found", lambda x: ops.gated_delta_rule(x(3, 2, 64), x(3, 2, 64), x(3, 2, 64), -x(3, 2).abs(), 2 + x(3, 2).abs())),
        ("positions: found shape", lambda x: ops.rope(x(3, 2, 64), torch.zeros(2, 3, dtype=torch.int32, device="cuda"))),
        ("positions: found 4 of them", lambda x: ops.rope(x(3, 2, 64), np.arange(4))),
        ("x: found an array that is on no CUDA device", lambda x: ops.rope(x(3, 2, 64).float().cpu(), torch.arange(3, device="cuda"))),
        ("top_k: found 9", lambda x: ops.route(x(3, 8), 9)),
    ],
)  # fmt: skip
def test_refusals(words, call):
    with pytest.raises(RequestError, match=words):
        call(randn)
    torch.cuda.synchronize()


def test_a_stream_that_is_captured_is_refused():
    x, weight = randn(3, 64), randn(64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x + 1
        with pytest.raises(RequestError, match="captured"):
            ops.rms_norm(x, weight)
    graph.replay()
    assert same_bits(y, x + 1)
