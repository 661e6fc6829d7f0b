"""Products of more than 16 rows with packed weights, against float64 of the numbers that the codes stand for."""

import pytest
import torch
from launch import PackedMatrix, call, error, poisoned, randn, same_bits
from test_packed import (
    FAMILY,
    FP4,
    FP8_BLOCK,
    FP8_ROW,
    INT4_BF16,
    INT4_F16,
    PACKED,
    ROW,
    Matrix,
    check_chain,
    check_rows_apart,
    filled,
    into,
    linear,
)

pytestmark = pytest.mark.gpu
NS = (17, 31, 64, 65, 200, 1000)
SHAPES = [(16, 64), (48, 192), (208, 576), (2080, 1088)]


def check(m, ns=NS, seed=0):
    most, weights = max(ns), m.dequantised()
    all_x = randn(most, m.k, seed=seed)
    want, exact = (all_x.double() @ w.T for w in (m.multiplied(weights), weights))
    of_most = linear(m, all_x, True)
    assert error(of_most, want) < 1e-5
    # Also where weights are rounded to bf16. Cut off instead, they would be 3.2e-3 away.
    assert error(of_most, exact) < 2.5e-3 and error(of_most.to(torch.bfloat16), exact) < 4e-3
    for n in ns:
        x = all_x[most - n :].contiguous()  # in other places than among all
        for wide, bound in ((True, 1e-5), (False, 4e-3)):
            found = linear(m, x, wide)
            assert error(found, want[most - n :]) < bound, (n, wide)
            assert same_bits(found, linear(m, x, wide))
        assert same_bits(linear(m, x, True), of_most[most - n :]), n
        assert same_bits(linear(m, x, False), of_most[most - n :].to(torch.bfloat16)), n


@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("kind", [INT4_F16, INT4_BF16])
@pytest.mark.parametrize("group", [32, 64, 128, ROW])
@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_int4(rows, k, group, kind, with_zeros):
    check(filled(kind, rows, k, group, with_zeros, seed=k))


@pytest.mark.parametrize("kind", [FP8_BLOCK, FP8_ROW, FP4])
@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_floats(rows, k, kind):
    check(filled(kind, rows, k, seed=k))


@pytest.mark.parametrize("k", [64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 1024])
@pytest.mark.parametrize(("kind", "group"), [(INT4_F16, 32), (INT4_F16, 128), (FP8_BLOCK, 128), (FP4, 16)])
def test_every_end_of_k(kind, group, k):
    """The two parts of k, of all lengths that differ."""
    check(filled(kind, 80, k, group, kind == INT4_F16, seed=k), (17, 33))


@pytest.mark.parametrize("rows", [16, 32, 64, 112, 128, 144, 4096, 8464, 16400])
@pytest.mark.parametrize(("kind", "group"), [(INT4_F16, 128), (FP8_ROW, 128), (FP4, 16)])
def test_every_height_of_a_block(kind, group, rows):
    check(filled(kind, rows, 256, group, seed=rows), (17, 32, 33, 64, 129))


@pytest.mark.parametrize(("rows", "k"), FAMILY)
@pytest.mark.parametrize(
    ("kind", "group"), [(INT4_F16, 128), (INT4_BF16, 32), (FP8_BLOCK, 128), (FP8_ROW, 128), (FP4, 16)]
)
def test_sizes_of_the_family(rows, k, kind, group):
    check(filled(kind, rows, k, group, seed=rows), (17, 64, 200))


def test_many_tiles_of_tokens():
    check(filled(INT4_F16, 272, 192, seed=3), (17, 1024, 1025, 5000))


@pytest.mark.parametrize(("kind", "wide"), [(INT4_F16, 0), (FP8_BLOCK, 0), (INT4_F16, 1), (FP4, 0)])
@pytest.mark.parametrize("stride", [48, 56, 57])
def test_columns_of_something_wider(kind, wide, stride):
    m, x = filled(kind, 48, 256), randn(70, 256, seed=4)
    dtype = torch.float32 if wide else torch.bfloat16
    for start in (0, stride - 48):
        out = poisoned(70, stride, dtype=dtype)
        call("q35_packed_linear", 70, m.struct, x, out[:, start:], wide, stride)
        assert same_bits(out[:, start : start + 48], linear(m, x, bool(wide)))
        assert out[:, :start].isnan().all() and out[:, start + 48 :].isnan().all()


def test_all_codes_of_fp8():
    """Each number, small ones too, comes out as it is: of every row one element counts."""
    m = Matrix(FP8_ROW, 256, 64)
    number = torch.arange(256, dtype=torch.uint8)
    number = torch.where(number % 128 == 127, number - 1, number)
    codes = torch.full((256, 64), 0x7E, dtype=torch.uint8)
    codes[:, 37] = number
    on_device, one = codes.cuda(), torch.ones(1, dtype=torch.float32, device="cuda")
    call("q35_pack_fp8", m.struct, 0, 256, on_device)
    call("q35_pack_scales", m.struct, 0, 256, one, 0, 1, 0, 0)
    torch.cuda.synchronize()
    x = torch.zeros(40, 64, dtype=torch.bfloat16, device="cuda")
    x[33, 37] = 1
    found = linear(m, x, True)
    assert torch.equal(found[33].cpu(), number.view(torch.float8_e4m3fn).float())
    found[33] = 0
    assert (found == 0).all()


def test_all_codes_of_int4():
    """As many rows as codes and zero points there are: (code - zero) * scale, to the bit."""
    m = Matrix(INT4_F16, 256, 64, ROW, with_zeros=True)
    row = torch.arange(256)
    words = torch.zeros(256, 8, dtype=torch.int64)
    words[:, 37 // 8] = row % 16 << 4 * (37 % 8)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).cuda()
    call("q35_pack_int4", m.struct, 0, 256, words, PACKED)
    m.zeros.view(-1).copy_(row // 16)  # a row of scales for 16 rows
    m.scales.fill_(0.5)
    torch.cuda.synchronize()
    x = torch.zeros(20, 64, dtype=torch.bfloat16, device="cuda")
    x[18, 37] = 1
    found = linear(m, x, True)
    assert torch.equal(found[18].cpu(), (row % 16 - row // 16) * 0.5)
    found[18] = 0
    assert (found == 0).all()


@pytest.mark.parametrize("kind", [INT4_F16, FP8_BLOCK, FP4])
@pytest.mark.parametrize("n", [17, 64, 100])
def test_rows_do_not_leak_into_each_other(n, kind):
    check_rows_apart(filled(kind, 208, 256, seed=11), n)


@pytest.mark.parametrize("kind", [INT4_BF16, FP8_BLOCK, FP4])
@pytest.mark.parametrize("n", [17, 64, 300])
def test_a_chain_in_a_graph(n, kind):
    up, down = filled(kind, 4608, 1024, seed=13), filled(kind, 1024, 4608, seed=14)
    check_chain(n, 1024, 4608, into(n, up), into(n, down))


def test_plain_rows_of_bf16():
    x, w = randn(33, 192, seed=16), randn(50, 192, seed=17)
    struct = PackedMatrix(w.data_ptr(), None, None, 50, 192, 0, 0)
    for dtype, name in ((torch.bfloat16, "q35_linear"), (torch.float32, "q35_linear_f32")):
        found, want = poisoned(33, 50, dtype=dtype), poisoned(33, 50, dtype=dtype)
        call("q35_packed_linear", 33, struct, x, found, int(dtype == torch.float32), 50)
        call(name, 33, 192, 50, x, w, want, 50)
        assert same_bits(found, want)
