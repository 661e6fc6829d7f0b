"""Packed weights with rows of bf16 behind them, in one kernel."""

import pytest
import torch
from launch import call, error, poisoned, randn, same_bits
from test_packed import FP4, FP8_BLOCK, FP8_ROW, INT4_BF16, INT4_F16, check_chain, filled, into, linear

pytestmark = pytest.mark.gpu
# 122B, 35B, 27B, 397B
TAILS = [(20480, 3072, 128), (12288, 2048, 64), (16384, 5120, 96), (20480, 4096, 128)]


@pytest.mark.parametrize(("rows", "k", "tail"), [(48, 192, 1), (208, 1088, 40), (112, 8192, 17), *TAILS])
@pytest.mark.parametrize(
    ("kind", "group"), [(INT4_F16, 128), (INT4_BF16, 32), (FP8_BLOCK, 128), (FP8_ROW, 128), (FP4, 16)]
)
def test_a_tail_of_bf16(rows, k, tail, kind, group):
    """The packed rows have the bits that they have alone, and every row those that it has among 16."""
    m, w, all_x = filled(kind, rows, k, group, seed=k), randn(tail, k, seed=19), randn(16, k, seed=20)
    stride, most = rows + tail + 3, None
    want = all_x.double() @ w.double().T
    for n in (16, 1, 2, 7, 8, 9, 15):
        x = all_x[16 - n :].contiguous()
        for wide, dtype, bound in ((1, torch.float32, 1e-5), (0, torch.bfloat16, 4e-3)):
            out = poisoned(n, stride, dtype=dtype)
            call("q35_packed_linear_tail", n, m.struct, w, tail, x, out, wide, stride)
            assert out[:, rows + tail :].isnan().all()
            found = out[:, rows : rows + tail]
            assert error(found, want[16 - n :]) < bound, (n, wide)
            assert same_bits(out[:, :rows].contiguous(), linear(m, x, bool(wide)))
            most = found.clone() if most is None else most
            assert same_bits(found.contiguous(), most[16 - n :].to(dtype)), (n, wide)


@pytest.mark.parametrize("n", [1, 16])
def test_a_tail_in_a_graph(n):
    """The tail reads its inputs when they are there, though its weights are loaded before."""
    up, down = filled(INT4_F16, 4096, 2048, seed=21), filled(INT4_F16, 2048, 4096 + 64, seed=22)
    tail = randn(64, 2048, seed=23, scale=0.1)

    def with_tail(x, y):
        call("q35_packed_linear_tail", n, up.struct, tail, 64, x, y, 0, 4096 + 64)

    check_chain(n, 2048, 4096 + 64, with_tail, into(n, down), seed=24)
