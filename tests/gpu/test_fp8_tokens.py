"""Products of more than 16 rows whose tokens are rounded to e4m3, against float64 of the rounded tokens."""

import pytest
import torch
from launch import MoeDims, PackedMatrix, call, error, poisoned, randn, same_bits
from test_moe import EPS, LARGE_FAMILY, SMALL_FAMILY, norm_inputs
from test_moe_packed import BF16, FP8, INT4, NVFP4
from test_moe_packed_many import Many
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
    filled,
    linear,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="Hopper alone"
    ),
]
KINDS = [(INT4_F16, 128), (INT4_BF16, ROW), (FP8_BLOCK, 128), (FP8_ROW, 128)]
# The tensor cores add up 128 products in fewer bits than f32 has.
SUMS = 1e-3
# Of a token's experts: what lies between the projections is rounded twice, and may lie so near to a tie that f32 sums and
# f64 differ. One such largest activation moves the codes of a row.
HALF_OF_THEM, ANY = 7e-3, 4.5e-2


def rounded(x):
    """float64: what is multiplied in place of x."""
    # In f64: torch multiplies f32 by the reciprocal of a number.
    scale = (x.double().abs().amax(-1, keepdim=True) / 448).float()
    codes = torch.where(scale == 0, 0, x.float() / scale).to(torch.float8_e4m3fn)
    return codes.float().double() * scale.double()


def memory(num_bytes):
    return torch.full((num_bytes + 256,), 0xA5, dtype=torch.uint8, device="cuda")


def product(m, x, wide):
    """The product; what lies behind the output and the memory is untouched."""
    n, dtype = len(x), torch.float32 if wide else torch.bfloat16
    out, space = poisoned(n * m.rows + 64, dtype=dtype), memory(call("q35_fp8_token_bytes", n, m.k))
    call("q35_fp8_token_linear", n, m.struct, x, space, out, int(wide), m.struct.rows)
    assert out[n * m.rows :].isnan().all(), "past the output"
    assert (space[-256:] == 0xA5).all(), "past the memory"
    return out[: n * m.rows].view(n, m.rows)


def check(m, ns=(17, 31, 64, 65, 200, 1000), seed=0):
    most, weights = max(ns), m.dequantised()
    all_x = randn(most, m.k, seed=seed)
    want, exact = (x.double() @ weights.T for x in (rounded(all_x), all_x))
    of_most = product(m, all_x, True)
    assert error(of_most, want) < SUMS
    assert error(of_most.to(torch.bfloat16), want) < 4e-3
    assert error(of_most, exact) > 1e-2, "nothing was rounded"
    for n in ns:
        x = all_x[most - n :].contiguous()  # in other places than among all
        assert same_bits(product(m, x, True), of_most[most - n :]), n
        assert same_bits(product(m, x, False), of_most[most - n :].to(torch.bfloat16)), n


def test_it_is_there():
    assert call("q35_has_fp8_tokens", 256) == 1 and call("q35_has_fp8_tokens", 192) == 0


@pytest.mark.parametrize("kind", [INT4_F16, INT4_BF16])
@pytest.mark.parametrize("group", [128, ROW])
@pytest.mark.parametrize(("rows", "k"), [(16, 128), (208, 640), (2080, 1152)])
def test_int4(rows, k, group, kind):
    check(filled(kind, rows, k, group, seed=k))


@pytest.mark.parametrize("kind", [FP8_BLOCK, FP8_ROW])
@pytest.mark.parametrize(("rows", "k"), [(16, 128), (208, 640), (2080, 1152)])
def test_fp8(rows, k, kind):
    check(filled(kind, rows, k, seed=k))


@pytest.mark.parametrize("rows", [16, 112, 128, 144, 256, 4096, 8464])
@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_every_height_of_a_tile(kind, group, rows):
    check(filled(kind, rows, 256, group, seed=rows), (17, 32, 33, 64, 96, 97, 129))


@pytest.mark.parametrize("k", [128, 256, 384, 512, 640, 768, 896, 1024, 1152])
@pytest.mark.parametrize(("kind", "group"), [(INT4_F16, 128), (FP8_BLOCK, 128)])
def test_every_number_of_units(kind, group, k):
    check(filled(kind, 80, k, group, seed=k), (17, 33))


@pytest.mark.parametrize(("rows", "k"), FAMILY)
@pytest.mark.parametrize(("kind", "group"), [(INT4_F16, 128), (FP8_BLOCK, 128), (FP8_ROW, 128)])
def test_sizes_of_the_family(rows, k, kind, group):
    check(filled(kind, rows, k, group, seed=rows), (17, 64, 200))


def test_many_tiles_of_tokens():
    check(filled(INT4_F16, 272, 256, seed=3), (17, 1024, 1025, 5000))


@pytest.mark.parametrize(
    ("kind", "group", "k", "with_zeros"),
    [
        *((INT4_F16, group, 256, False) for group in (32, 64)),
        *((INT4_F16, group, 256, True) for group in (128, ROW)),
        *((FP4, 16, 256, False), (FP8_ROW, 128, 192, False)),
    ],
)
def test_others_stay_exact(kind, group, k, with_zeros):
    m, x = filled(kind, 208, k, group, with_zeros), randn(40, k)
    assert same_bits(product(m, x, True), linear(m, x, True))


@pytest.mark.parametrize("n", [1, 16])
def test_few_rows_stay_exact(n):
    m, x = filled(FP8_BLOCK, 208, 256), randn(n, 256)
    assert same_bits(product(m, x, True), linear(m, x, True))


def test_all_codes_of_tokens():
    """Each number of e4m3 comes out as it is, at every place of k."""
    m = Matrix(FP8_ROW, 128, 128)
    on_device, one = (
        torch.eye(128).mul(448).to(torch.float8_e4m3fn).view(torch.uint8).cuda(),
        torch.ones(1, device="cuda"),
    )
    call("q35_pack_fp8", m.struct, 0, 128, on_device)
    call("q35_pack_scales", m.struct, 0, 128, one, 0, 1, 0, 0)
    torch.cuda.synchronize()
    codes = torch.arange(256, dtype=torch.uint8)
    codes = torch.where(codes % 128 == 127, codes - 1, codes)
    x = codes.view(torch.float8_e4m3fn).to(torch.bfloat16).cuda()
    x = torch.stack([x.roll(i) for i in range(256)])[:, :128]
    x = torch.where(x.abs().amax(1, keepdim=True) == 448, x, 0).contiguous()
    assert (x != 0).any(1).sum() > 120
    assert torch.equal(product(m, x, True), x.float() * 448)


def test_all_codes_of_int4():
    m = Matrix(INT4_F16, 16, 128, ROW)
    row = torch.arange(16)
    words = torch.zeros(16, 16, dtype=torch.int64)
    words[:, 37 // 8] = row << 4 * (37 % 8)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).cuda()
    call("q35_pack_int4", m.struct, 0, 16, words, PACKED)
    m.scales.fill_(0.5)
    torch.cuda.synchronize()
    x = torch.zeros(20, 128, dtype=torch.bfloat16, device="cuda")
    x[18, 37] = 448
    found = product(m, x, True)
    assert torch.equal(found[18].cpu(), (row - 8) * 224.0)
    found[18] = 0
    assert (found == 0).all()


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("kind", "group"), [(INT4_F16, 128), (FP8_BLOCK, 128)])
def test_what_is_no_number_stays_in_its_row(kind, group, odd):
    m, x = filled(kind, 208, 256, group), randn(70, 256, seed=12)
    want = product(m, x, False)
    x[3, 100], x[-1] = odd, odd
    found = product(m, x, False)
    assert found[3].isnan().all() and found[-1].isnan().all()
    found[3], found[-1] = want[3], want[-1]
    assert same_bits(found, want)


def test_zeros_and_the_smallest_numbers():
    m, x = filled(FP8_BLOCK, 80, 256), randn(40, 256)
    before = product(m, x, True)
    x[5], x[6, :128], x[7] = 0, 0, x[7] * 2.0**-90
    found, want = product(m, x, True), rounded(x) @ m.dequantised().T
    assert (found[5] == 0).all()
    assert error(found[6], want[6]) < SUMS
    assert same_bits(found[7] * 2.0**90, before[7])


@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_a_row_has_a_scale_of_its_own(kind, group):
    """Times a power of two, which scales take up: not that of a neighbour, wherever a row is in a tile."""
    m, x = filled(kind, 208, 384, group), randn(300, 384, seed=7)
    by = 2.0 ** ((torch.arange(300, device="cuda") * 5) % 17 - 8)[:, None]
    assert same_bits(product(m, (x * by).to(torch.bfloat16), True), product(m, x, True) * by)


@pytest.mark.parametrize(("kind", "wide"), [(INT4_F16, 0), (FP8_BLOCK, 0), (INT4_F16, 1)])
@pytest.mark.parametrize("stride", [48, 56, 57])
def test_columns_of_something_wider(kind, wide, stride):
    m, x = filled(kind, 48, 256), randn(70, 256, seed=4)
    space = memory(call("q35_fp8_token_bytes", 70, 256))
    for start in (0, stride - 48):
        out = poisoned(70, stride, dtype=torch.float32 if wide else torch.bfloat16)
        call("q35_fp8_token_linear", 70, m.struct, x, space, out[:, start:], wide, stride)
        assert same_bits(out[:, start : start + 48], product(m, x, bool(wide)))
        assert out[:, :start].isnan().all() and out[:, start + 48 :].isnan().all()


@pytest.mark.parametrize("kind", [INT4_BF16, FP8_BLOCK])
@pytest.mark.parametrize("n", [17, 300])
def test_a_chain_in_a_graph(n, kind):
    up, down = filled(kind, 4608, 1024, seed=13), filled(kind, 1024, 4608, seed=14)
    space = memory(call("q35_fp8_token_bytes", n, 4608))

    def into(m):
        return lambda x, out: call("q35_fp8_token_linear", n, m.struct, x, space, out, 0, m.struct.rows)

    check_chain(n, 1024, 4608, into(up), into(down))


class Rounded(Many):
    """A sparse block whose launchers round, and its reference."""

    rounds = True

    def taken(self, x, matrix):
        taken = matrix.kind.startswith("fp8") or (matrix.kind.startswith("int4") and matrix.group >= 128)
        return rounded(x) if self.rounds and taken and matrix.k % 128 == 0 else x

    def run(self, x, *, norm=(None, None)):
        n, hidden = x.shape
        dims, space = self.struct(), self.workspace(n)
        tokens, out = memory(call("q35_fp8_token_moe_bytes", n, dims)), poisoned(n + 1, hidden)
        call("q35_fp8_token_moe", n, dims, self.weights(), x, space, tokens, *norm, EPS, out)
        assert (space[-4096:] == 0xA5).all(), "wrote past the workspace"
        assert (tokens[-256:] == 0xA5).all() and out[-1].isnan().all()
        return out[:-1]

    def check(self, x):
        out = self.run(x)
        want, sure = self.reference(x)
        self.rounds = False
        exact, _ = self.reference(x)
        self.rounds = True
        found = (out[sure].double() - want[sure]).norm(dim=1) / want[sure].norm(dim=1)
        assert error(want[sure], exact[sure]) > 1e-2, "nothing was rounded"
        assert found.median() < HALF_OF_THEM and found.max() < ANY
        _, residual, w = norm_inputs(*x.shape)
        together, apart, normed = residual.clone(), residual.clone(), poisoned(*x.shape)
        call("q35_rmsnorm_residual", *x.shape, out, apart, w, EPS, normed)
        assert same_bits(self.run(x, norm=(together, w)), normed) and same_bits(together, apart)
        return out


@pytest.mark.parametrize(
    ("dims", "formats"),
    [
        *((dims, [form] * 4) for dims in (SMALL_FAMILY, LARGE_FAMILY) for form in (INT4, FP8)),
        (LARGE_FAMILY, [INT4, INT4, BF16, BF16]),
        (LARGE_FAMILY, [INT4, INT4, FP8, FP8]),
        ((4096, 512, 10, 1024, 1024), [FP8] * 4),
        ((640, 7, 3, 384, 128), [("int4_bf16", 1 << 30, False)] * 4),
        ((640, 7, 3, 384, 128), [("fp8_row", 0, False)] * 4),
        ((256, 8, 2, 128, 0), [INT4] * 4),
        ((576, 7, 3, 320, 128), [FP8] * 4),  # only the shared expert's `down` has whole groups
        ((256, 8, 2, 128, 128), [NVFP4, INT4, ("int4_bf16", 32, True), FP8]),
    ],
    ids=str,
)
def test_experts(dims, formats):
    block = Rounded(dims, formats)
    for n in (17, 100, 700):
        block.check(block.tokens(n))


def test_outputs_by_blocks_of_columns():
    """So many tokens that their outputs by expert are not kept whole."""
    block = Rounded(SMALL_FAMILY, [FP8] * 4)
    x = block.tokens(12000)
    assert same_bits(block.run(x)[2000:2100], block.run(x[2000:2100].contiguous()))


@pytest.mark.parametrize("formats", [[INT4] * 4, [FP8, FP8, BF16, BF16]], ids=str)
def test_a_token_does_not_see_the_batch(formats):
    block = Rounded((256, 8, 2, 128, 256), formats)
    x = block.tokens(1500)
    out = block.run(x)
    for first, n in ((0, 17), (100, 40), (260, 64), (700, 300)):
        assert same_bits(block.run(x[first : first + n]), out[first : first + n])
    assert same_bits(block.run(x), out)


@pytest.mark.parametrize("n", [1, 16])
def test_few_tokens_stay_exact(n):
    block = Rounded((256, 8, 2, 128, 128), [FP8] * 4)
    x = block.tokens(n)
    assert same_bits(block.run(x), Many.run(block, x))


def test_what_is_refused():
    m, x, out = filled(FP8_BLOCK, 32, 256), randn(40, 256), poisoned(40, 32)
    space = memory(call("q35_fp8_token_bytes", 40, 256))
    with pytest.raises(AssertionError, match="CUDA error 1"):
        call("q35_fp8_token_linear", 40, m.struct, x, space[1:], out, 0, 32)
    dims = MoeDims(256, 8, 2, 128, 128)
    assert call("q35_fp8_token_moe_bytes", 0, dims) == 0
    assert call("q35_fp8_token_moe_bytes", 3, MoeDims(256, 0, 2, 128, 128)) == 0
    call("q35_fp8_token_linear", 0, PackedMatrix(), None, None, None, 0, 0)
