"""Packed weights: their places against the contract of `cuda/launch.h`, products against plain float64."""

import ctypes

import pytest
import torch
from launch import PackedMatrix, call, error, poisoned, randn, same_bits
from packed import of_e2m1, of_fp4_scales

pytestmark = pytest.mark.gpu
INT4_F16, INT4_BF16, FP8_BLOCK, FP8_ROW, FP4 = 1, 2, 3, 4, 5
PACKED, GPTQ, AWQ = 0, 1, 2
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ROW = 1 << 20  # a group that is a row


class Matrix:
    """A packed matrix on the device; what nothing writes is poison."""

    def __init__(self, kind, rows, k, group=128, with_zeros=False):
        self.kind, self.rows, self.k, self.int4 = kind, rows, k, kind in (INT4_F16, INT4_BF16)
        self.group = {FP8_BLOCK: 128, FP8_ROW: k, FP4: 16}.get(kind, min(group, k))
        self.groups = -(-k // self.group)
        self.codes = torch.full(
            (rows * k // (2 if self.int4 or kind == FP4 else 1),), 0x77, dtype=torch.uint8, device="cuda"
        )
        dtype = {INT4_F16: torch.float16, INT4_BF16: torch.bfloat16}.get(kind, torch.float32)
        each = 1 if kind == FP8_BLOCK else 16
        self.scales = poisoned(rows // 16, self.groups, each, dtype=dtype)
        if kind == FP4:
            self.scales = torch.full((rows * k // 16 + rows // 4,), 0xFF, dtype=torch.uint8, device="cuda")
        self.zeros = None
        if with_zeros:
            self.zeros = torch.full((rows // 16, self.groups, 16), 99, dtype=torch.uint8, device="cuda")
        pointers = [None if t is None else t.data_ptr() for t in (self.codes, self.scales, self.zeros)]
        self.struct = PackedMatrix(*pointers, rows, k, group, kind)

    def unpacked(self):
        """Codes [rows, k], as the header says where they are."""
        tiles, k_tiles = self.rows // 16, self.k // 64
        words = self.codes.view(torch.int32)
        out = torch.empty(tiles, 16, k_tiles, 64, dtype=torch.uint8, device="cuda")
        lane = torch.arange(32, device="cuda")
        g, t = lane // 4, lane % 4
        for step in range(4):
            for i in range(4):
                if self.kind == FP4:
                    word = words.view(tiles, k_tiles, 32, 4)[..., step]
                    pair = (word >> (3 * i) & 0x00070007) | (word >> (12 + (i ^ 1)) & 0x00010001) << 3
                elif self.int4:
                    word = words.view(tiles, k_tiles, 32, 4)[..., step]
                    pair = (word >> (4 * i)) & 0x000F000F
                else:
                    word = words.view(tiles, k_tiles, 2, 32, 2, 2)[:, :, step // 2, :, step % 2, i // 2]
                    pair = (word >> (8 * (i % 2))) & 0x00FF00FF
                for half in range(2):
                    column = 16 * step + 2 * t + 8 * (i // 2) + half
                    code = (pair >> (16 * half)) & 255
                    # The indexed dimensions come first.
                    out[:, g + 8 * (i % 2), :, column] = code.permute(2, 0, 1).to(torch.uint8)
        return out.view(self.rows, self.k)

    def by_row(self, parts):
        """Scales or zero points [rows, groups]."""
        return parts.expand(-1, -1, 16).transpose(1, 2).reshape(self.rows, self.groups)

    def rows_of(self, parts):
        return self.by_row(parts).cpu()

    def fp4_scales(self):
        """Bytes [rows, k / 16], and f32 [row tiles]."""
        wholes = self.scales[self.rows * self.k // 16 :].view(torch.float32)
        tiles = self.scales[: self.rows * self.k // 16].view(self.rows // 16, self.k // 64, 8, 2, 4)
        return tiles.permute(0, 3, 2, 1, 4).reshape(self.rows, self.k // 16), wholes

    def multiplied(self, weights):
        """What products of many rows take for these."""
        return weights

    def dequantised(self):
        """float64 [rows, k]."""
        codes = self.unpacked()
        if self.kind == FP4:
            scales, wholes = self.fp4_scales()
            scales = of_fp4_scales(scales) * wholes.double().repeat_interleave(16)[:, None]
            return of_e2m1(codes) * scales.repeat_interleave(16, 1)
        scales = self.by_row(self.scales).double().repeat_interleave(self.group, 1)[:, : self.k]
        if not self.int4:
            return codes.view(torch.float8_e4m3fn).float().double() * scales
        if self.zeros is None:
            return (codes.double() - 8) * scales
        zeros = self.by_row(self.zeros).repeat_interleave(self.group, 1)[:, : self.k]
        return (codes.double() - zeros) * scales


def words_of(numbers, order=tuple(range(8))):
    """int32 of eight 4-bit numbers each, along the last dimension."""
    eights = numbers.to(torch.int64).reshape(*numbers.shape[:-1], -1, 8)[..., list(order)]
    words = (eights << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).cuda()


def padded(numbers, multiple, dim):
    missing = -numbers.shape[dim] % multiple
    shape = list(numbers.shape)
    shape[dim] = missing
    return torch.cat([numbers, torch.zeros(shape, dtype=numbers.dtype)], dim)


def drawn(high, *shape, seed):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def drawn_fp8(*shape, seed):
    codes = drawn(256, *shape, seed=seed)
    return torch.where(codes % 128 == 127, codes - 1, codes)  # no NaN


def filled(kind, rows, k, group=128, with_zeros=False, seed=0):
    """A matrix of random codes, packed from a checkpoint's layout."""
    m = Matrix(kind, rows, k, group, with_zeros)
    generator, kept = torch.Generator("cuda").manual_seed(seed), []
    if kind == FP4:
        kept += [drawn(256, rows, k // 2, seed=seed).cuda(), drawn_fp8(rows, k // 16, seed=seed + 1).cuda()]
        codes, scales = kept
        middle = rows // 32 * 16
        call("q35_pack_fp4", m.struct, 0, middle, codes, scales, 0.5)
        call("q35_pack_fp4", m.struct, middle, rows - middle, codes[middle:], scales[middle:], -0.3)
        torch.cuda.synchronize()
        return m
    if m.int4:
        words = torch.randint(-(1 << 31), 1 << 31, (rows, k // 8), generator=generator, device="cuda")
        kept.append(words.to(torch.int32))
        call("q35_pack_int4", m.struct, 0, rows, kept[-1], PACKED)
    else:
        codes = torch.randint(0, 256, (rows, k), generator=generator, device="cuda", dtype=torch.uint8)
        kept.append(torch.where(codes % 128 == 127, codes - 1, codes))  # no NaN
        call("q35_pack_fp8", m.struct, 0, rows, kept[-1])
    if with_zeros:
        kept.append(words_of(drawn(16, m.groups, rows, seed=seed + 1)))
        call("q35_pack_zeros", m.struct, 0, rows, kept[-1], GPTQ, 0)
    block = 128 if kind == FP8_BLOCK else 1
    kept.append(0.5 + randn(-(-rows // block), m.groups, dtype=torch.float32, seed=seed + 2).abs())
    call("q35_pack_scales", m.struct, 0, rows, kept[-1], 0, block, m.groups, 1)
    torch.cuda.synchronize()
    return m


def linear(m, x, wide):
    """The product; what lies behind the output is untouched."""
    n, dtype = len(x), torch.float32 if wide else torch.bfloat16
    out = poisoned(n * m.rows + 64, dtype=dtype)
    call("q35_packed_linear", n, m.struct, x, out, int(wide), m.struct.rows)
    assert out[n * m.rows :].isnan().all(), "past the output"
    return out[: n * m.rows].view(n, m.rows)


def check(m, ns, seed=0):
    all_x = randn(16, m.k, seed=seed)
    want = all_x.double() @ m.dequantised().T
    most = linear(m, all_x, True)
    for n in ns:
        x = all_x[16 - n :].contiguous()  # in other places than among 16
        for wide, bound in ((True, 1e-5), (False, 4e-3)):
            found = linear(m, x, wide)
            assert error(found, want[16 - n :]) < bound, (n, wide)
            assert same_bits(found, linear(m, x, wide))
        assert same_bits(linear(m, x, True), most[16 - n :]), n
        assert same_bits(linear(m, x, False), most[16 - n :].to(torch.bfloat16)), n


# ------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("order", [PACKED, GPTQ, AWQ])
@pytest.mark.parametrize(
    ("rows", "k", "group"), [(16, 64, 32), (48, 192, 128), (160, 320, 64), (72, 256, ROW)]
)
def test_int4_of_checkpoints(order, rows, k, group):
    if order == PACKED:
        rows -= 3
    tall = rows + -rows % 16
    m = Matrix(INT4_F16, 32 + tall, k, group, with_zeros=True)
    other = Matrix(INT4_F16, 32 + tall, k, group, with_zeros=True)
    codes, zeros = drawn(16, rows, k, seed=1), drawn(16, rows, m.groups, seed=2)
    minus_one = int(order == GPTQ)
    stored = (zeros + 15) % 16 if minus_one else zeros
    if order == PACKED:
        words, zero_words = words_of(codes), words_of(padded(stored, 8, 0).T.contiguous()).T.contiguous()
    elif order == GPTQ:
        words, zero_words = words_of(codes).T.contiguous(), words_of(stored.T.contiguous())
    else:
        words, zero_words = (words_of(part.T.contiguous(), AWQ_ORDER) for part in (codes, stored))
    scales = randn(rows, m.groups, dtype=torch.float16, seed=3)
    call("q35_pack_int4", m.struct, 32, rows, words, order)
    call("q35_pack_zeros", m.struct, 32, rows, zero_words, order, minus_one)
    if order == PACKED:
        call("q35_pack_scales", m.struct, 32, rows, scales, 1, 1, m.groups, 1)
    else:
        turned = scales.T.contiguous()
        call("q35_pack_scales", m.struct, 32, rows, turned, 1, 1, 1, rows)
    found = m.unpacked().cpu()
    assert torch.equal(found[32 : 32 + rows], codes)
    assert (found[32 + rows :] == 0).all()
    assert torch.equal(m.rows_of(m.zeros)[32 : 32 + rows], zeros)
    assert same_bits(m.rows_of(m.scales)[32 : 32 + rows], scales.cpu())
    assert (m.rows_of(m.scales)[32 + rows :] == 0).all()
    for part in ("codes", "scales", "zeros"):  # of other tensors
        mine, untouched = getattr(m, part), getattr(other, part)
        count = 32 * mine.numel() // m.rows
        assert torch.equal(
            mine.view(-1).view(torch.uint8)[:count], untouched.view(-1).view(torch.uint8)[:count]
        )


def test_int4_without_zero_points_beside_some_with():
    m = Matrix(INT4_BF16, 32, 128, 64, with_zeros=True)
    call("q35_pack_zeros", m.struct, 16, 16, None, PACKED, 0)
    assert (m.zeros[1] == 8).all() and (m.zeros[0] == 99).all()


@pytest.mark.parametrize(("rows", "k"), [(16, 64), (48, 192), (150, 320), (300, 256)])
@pytest.mark.parametrize("dtype", list(SCALE_TYPES))
def test_fp8_of_checkpoints(rows, k, dtype):
    tall = rows + -rows % 16
    codes = drawn_fp8(rows, k, seed=4)
    by_block = randn(-(-rows // 128), -(-k // 128), dtype=dtype, seed=5)
    by_row = randn(rows, dtype=dtype, seed=6)
    on_device = codes.cuda()
    for kind, scales, layout in (
        (FP8_BLOCK, by_block, (128, by_block.shape[1], 1)),
        (FP8_ROW, by_row, (1, 1, 0)),
        (FP8_ROW, by_row[:1], (1, 0, 0)),
    ):
        m = Matrix(kind, 16 + tall, k)
        call("q35_pack_fp8", m.struct, 16, rows, on_device)
        call("q35_pack_scales", m.struct, 16, rows, scales, SCALE_TYPES[dtype], *layout)
        found = m.unpacked().cpu()
        assert torch.equal(found[16 : 16 + rows], codes)
        assert (found[16 + rows :] == 0).all() and (found[:16] == 0x77).all()
        want = scales.float().cpu().view(-1, scales.shape[1] if kind == FP8_BLOCK else 1)
        want = want.repeat_interleave(128, 0)[:rows] if kind == FP8_BLOCK else want.expand(rows, 1)
        assert torch.equal(m.rows_of(m.scales)[16 : 16 + rows], want)
        assert m.scales[0].isnan().all()


@pytest.mark.parametrize("kind", [INT4_F16, INT4_BF16])
@pytest.mark.parametrize(
    ("rows", "k", "group"), [(16, 64, 32), (45, 192, 128), (64, 1024, 64), (33, 3072, 128), (20, 320, ROW)]
)
def test_int4_of_bf16(kind, rows, k, group):
    w = randn(rows, k, seed=7, scale=0.02)
    w[3, : k // 2] = 0
    m = Matrix(kind, 16 + rows + -rows % 16, k, group)
    call("q35_quantise_int4", m.struct, 16, rows, w)
    scales = m.rows_of(m.scales)[16:]
    assert (scales[rows:] == 0).all()
    scales, groups = scales[:rows], m.groups
    x = padded(w.float().cpu(), m.group, 1).view(rows, groups, -1)
    steps = (1 - torch.arange(8, dtype=torch.float32) / 32).view(-1, 1, 1)
    tried = (x.abs().amax(2) * steps / 7).to(scales.dtype)
    assert (scales.view(1, rows, groups) == tried).any(0).all()

    def codes_of(scale):
        scale = scale.float()[..., None]
        return torch.where(scale > 0, (x / scale).round().clamp(-8, 7), torch.zeros_like(x))

    def squares(scale):
        return ((codes_of(scale) * scale.float()[..., None]).double() - x.double()).square().sum(2)

    least = torch.stack([squares(scale) for scale in tried]).amin(0)
    assert (squares(scales) <= least * (1 + 1e-5)).all()
    want = codes_of(scales).view(rows, -1)[:, :k] + 8
    found = m.unpacked().cpu()
    assert torch.equal(found[16 : 16 + rows], want.to(torch.uint8))
    assert (found[16 + rows :] == 0).all() and (found[:16] == 7).all()


@pytest.mark.parametrize(("rows", "k"), [(16, 64), (45, 192), (128, 128), (300, 1088)])
def test_fp8_of_bf16(rows, k):
    w = randn(rows, k, seed=8, scale=0.02)
    if rows > 128:
        w[128:256, 128:256] = 0
    m = Matrix(FP8_BLOCK, 16 + rows + -rows % 16, k)
    call("q35_quantise_fp8", m.struct, 16, rows, w)
    x = padded(padded(w.float().cpu(), 128, 0), 128, 1)
    most = x.view(x.shape[0] // 128, 128, -1, 128).abs().amax((1, 3))
    scales = (most / 448).repeat_interleave(128, 0)[:rows]
    assert torch.equal(m.rows_of(m.scales)[16 : 16 + rows], scales)
    scales = scales.repeat_interleave(128, 1)[:, :k]
    want = torch.where(scales > 0, x[:rows, :k] / scales, torch.zeros_like(scales)).to(torch.float8_e4m3fn)
    found = m.unpacked().cpu()
    assert torch.equal(found[16 : 16 + rows].view(torch.float8_e4m3fn).float(), want.float())
    assert (found[16 + rows :] == 0).all() and (found[:16] == 0x77).all()


# -------------------------------------------------------------------------------------------------------------- linear


# Fewer units along k than warps, halves of units, fewer row tiles than multiprocessors, several row tiles a block.
SMALL = [(16, 64), (48, 192), (16, 320), (2080, 1088), (112, 3072), (48, 128), (9632, 1152)]


@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("kind", [INT4_F16, INT4_BF16])
@pytest.mark.parametrize("group", [32, 64, 128, ROW])
@pytest.mark.parametrize(("rows", "k"), SMALL)
def test_int4_linear(rows, k, group, kind, with_zeros):
    check(filled(kind, rows, k, group, with_zeros, seed=k), range(1, 17))


@pytest.mark.parametrize("kind", [FP8_BLOCK, FP8_ROW, FP4])
@pytest.mark.parametrize(("rows", "k"), SMALL)
def test_float_linear(rows, k, kind):
    check(filled(kind, rows, k, seed=k), range(1, 17))


FAMILY = [
    *[(20608, 3072), (3072, 8192), (17408, 3072), (2048, 3072), (3072, 1024)],  # 122B
    *[(12352, 2048), (2048, 4096), (9216, 2048)],  # 35B
    *[(16384, 5120), (14336, 5120), (5120, 6144), (34816, 5120), (5120, 17408)],  # 27B
    *[(20480, 4096), (17408, 4096), (4096, 8192)],  # 397B
]


@pytest.mark.parametrize(("rows", "k"), FAMILY)
@pytest.mark.parametrize(
    ("kind", "group"), [(INT4_F16, 128), (INT4_BF16, 32), (FP8_BLOCK, 128), (FP8_ROW, 128), (FP4, 16)]
)
def test_sizes_of_the_family(rows, k, kind, group):
    check(filled(kind, rows, k, group, seed=rows), (1, 4, 8, 13, 16))


HEAD_ROWS = 248320


def some_rows_of_head():
    """Those of every 97th row tile."""
    first = torch.arange(0, HEAD_ROWS, 16 * 97, device="cuda")
    return (first[:, None] + torch.arange(16, device="cuda")).view(-1)


@pytest.mark.parametrize("k", [2048, 3072, 4096, 5120])
def test_vocabulary_head(k):
    n_most, some = 40, some_rows_of_head()
    x, w = randn(n_most, k, seed=9), torch.empty(HEAD_ROWS, k, dtype=torch.bfloat16, device="cuda")
    w.normal_(std=0.02, generator=torch.Generator("cuda").manual_seed(10))  # not in f32 first: 5 GB
    m = Matrix(FP8_BLOCK, HEAD_ROWS, k)
    call("q35_quantise_fp8", m.struct, 0, HEAD_ROWS, w)
    torch.cuda.synchronize()
    part, tiles = Matrix(FP8_BLOCK, len(some), k), some[::16] // 16
    part.codes = m.codes.view(-1, 16 * k)[tiles].view(-1).contiguous()
    part.scales = m.scales[tiles].contiguous()
    want = x.double() @ part.dequantised().T
    for n in (1, 4, 16, n_most):
        last = x[n_most - n :].contiguous()
        found = linear(m, last, True)
        assert torch.isfinite(found).all()
        assert error(found[:, some], want[n_most - n :]) < 1e-5
        assert error(found[:, ::997], last.double() @ w[::997].double().T) < 4e-2
        assert same_bits(found, linear(m, last, True))


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
    x = torch.zeros(3, 64, dtype=torch.bfloat16, device="cuda")
    x[1, 37] = 1
    found = linear(m, x, True)
    assert torch.equal(found[1].cpu(), number.view(torch.float8_e4m3fn).float())
    assert (found[[0, 2]] == 0).all()


def check_chain(n, hidden, width, up, down, seed=15):
    """Kernels that start under the ones before them see what those wrote, in a graph too: norms, and what `up` and `down`
    launch, from x to y and from y to z."""
    norm = 0.01 + torch.zeros(hidden, dtype=torch.float32, device="cuda")
    start, residual = randn(n, hidden, seed=seed), torch.zeros(n, hidden, dtype=torch.float32, device="cuda")
    x, y, z = poisoned(n, hidden), poisoned(n, width), poisoned(n, hidden)

    def layers(between):
        for _ in range(4):
            call("q35_rmsnorm_residual", n, hidden, z, residual, norm, 1e-6, x)
            between()
            up(x, y)
            between()
            down(y, z)
            between()

    def reset():
        z.copy_(start)
        residual.zero_()
        torch.cuda.synchronize()

    reset()
    layers(torch.cuda.synchronize)
    want = z.clone()
    assert torch.isfinite(want).all()
    graph = torch.cuda.CUDAGraph()
    reset()
    with torch.cuda.graph(graph):
        layers(lambda: None)
    for run in (lambda: layers(lambda: None), graph.replay, graph.replay):
        reset()
        run()
        torch.cuda.synchronize()
        assert same_bits(z, want)


def check_rows_apart(m, n):
    """A row that is no number leaves the others as they are."""
    x = randn(n, m.struct.k, seed=12)
    want = linear(m, x, False)
    x[-1] = float("nan")
    found = linear(m, x, False)
    assert same_bits(found[:-1], want[:-1])
    assert found[-1].isnan().all()


def into(n, m):
    """Launches the product with a matrix."""
    return lambda x, out: call("q35_packed_linear", n, m.struct, x, out, 0, m.struct.rows)


@pytest.mark.parametrize("kind", [INT4_F16, FP8_BLOCK, FP4])
def test_rows_do_not_leak_into_each_other(kind):
    m = filled(kind, 208, 256, seed=11)
    for n in (2, 16):
        check_rows_apart(m, n)


@pytest.mark.parametrize("kind", [INT4_BF16, FP8_BLOCK, FP4])
@pytest.mark.parametrize("n", [1, 8, 16])
def test_a_chain_in_a_graph(n, kind):
    up, down = filled(kind, 9216, 2048, seed=13), filled(kind, 2048, 9216, seed=14)
    check_chain(n, 2048, 9216, into(n, up), into(n, down))


@pytest.mark.parametrize("n", [1, 3, 16, 17, 200])
@pytest.mark.parametrize("kind", [INT4_F16, FP8_BLOCK, FP4])
def test_columns_of_something_wider(n, kind):
    m, x = filled(kind, 48, 256, 128), randn(n, 256, seed=18)
    wide = poisoned(n, 48 + 9)
    call("q35_packed_linear", n, m.struct, x, wide[:, 4:], 0, 48 + 9)
    assert same_bits(wide[:, 4:52], linear(m, x, False))
    assert wide[:, :4].isnan().all() and wide[:, 52:].isnan().all()


def test_plain_rows_of_bf16():
    x, w = randn(5, 192, seed=16), randn(50, 192, seed=17)
    struct = PackedMatrix(w.data_ptr(), None, None, 50, 192, 0, 0)
    for dtype, name in ((torch.bfloat16, "q35_linear"), (torch.float32, "q35_linear_f32")):
        found, want = poisoned(5, 50, dtype=dtype), poisoned(5, 50, dtype=dtype)
        call("q35_packed_linear", 5, struct, x, found, int(dtype == torch.float32), 50)
        call(name, 5, 192, 50, x, w, want, 50)
        assert same_bits(found, want)


def test_what_is_refused():
    m = filled(INT4_F16, 32, 128, 64)
    x, out = randn(17, 128), poisoned(17, 32)

    def refused(name, *arguments):
        with pytest.raises(AssertionError, match="CUDA error 1$"):
            call(name, *arguments)

    def changed(**fields):
        struct = PackedMatrix.from_buffer_copy(
            ctypes.string_at(ctypes.byref(m.struct), ctypes.sizeof(PackedMatrix))
        )
        for name, value in fields.items():
            setattr(struct, name, value)
        return struct

    refused("q35_packed_linear", 1, m.struct, x, out, 0, 31)
    for fields in ({"kind": 10}, {"group": 48}, {"rows": 24}, {"k": 96}, {"codes": m.codes.data_ptr() + 4}):
        refused("q35_packed_linear", 1, changed(**fields), x, out, 0, 32)
    for n, tail, stride in ((17, 16, 48), (1, 0, 48), (1, 16, 47), (-1, 16, 48)):
        refused("q35_packed_linear_tail", n, m.struct, x, tail, x, out, 0, stride)
    refused("q35_packed_linear_tail", 1, changed(kind=0), x, 16, x, out, 0, 48)
    refused("q35_packed_linear_tail", 1, m.struct, x.data_ptr() + 8, 16, x, out, 0, 48)
    refused("q35_pack_int4", m.struct, 8, 16, m.codes, PACKED)
    refused("q35_pack_int4", m.struct, 16, 32, m.codes, PACKED)
    refused("q35_pack_fp8", m.struct, 0, 16, m.codes)
    refused("q35_quantise_fp8", m.struct, 0, 16, x)
    call("q35_packed_linear", 0, m.struct, None, None, 0, 32)
