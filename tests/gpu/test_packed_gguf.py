"""GGUF's K-quants and Q8_0: on their way to the device, and in products of few and of many rows. Experts are in
test_moe_packed.py and test_moe_packed_many.py."""

import pytest
import torch
from launch import HeadOrder, PackedMatrix, call, error, poisoned, randn, same_bits
from test_packed import (
    FAMILY,
    HEAD_ROWS,
    INT4_F16,
    check,
    check_chain,
    check_rows_apart,
    filled,
    into,
    linear,
    some_rows_of_head,
)
from test_packed_many import check as check_many
from test_packed_tail import TAILS

pytestmark = pytest.mark.gpu
Q4_K, Q5_K, Q6_K, Q8_0 = 6, 7, 8, 9
KINDS = [Q4_K, Q5_K, Q6_K, Q8_0]
LENGTHS = {Q4_K: (256, 144), Q5_K: (256, 176), Q6_K: (256, 210), Q8_0: (32, 34)}
TILE_BYTES = {Q4_K: 512, Q5_K: 768, Q6_K: 768, Q8_0: 1024}
AS_THEY_ARE = HeadOrder(0, 0, 0, 0)


def blocks_of(kind, rows, k, *, seed=0):
    """Random blocks, uint8 [rows, blocks, bytes], with scales that are numbers."""
    length, size = LENGTHS[kind]
    generator = torch.Generator("cuda").manual_seed(seed)
    blocks = torch.empty(rows, k // length, size, dtype=torch.uint8, device="cuda")
    blocks.random_(0, 256, generator=generator)
    for at, scale in {Q4_K: ((0, 1e-3), (2, 7e-3)), Q5_K: ((0, 1e-3), (2, 1.5e-2)), Q6_K: ((208, 1e-4),)}.get(
        kind, ((0, 1e-2),)
    ):
        drawn = 0.5 + torch.rand(rows, k // length, 1, generator=generator, device="cuda")
        blocks[..., at : at + 2] = (drawn * scale).half().view(torch.uint8)
    return blocks


def numbers_of(kind, blocks):
    """float64 [rows, k], as the format has them."""
    rows = blocks.shape[0]
    wide = blocks.to(torch.int32)

    def half(at):
        return blocks[..., at : at + 2].contiguous().view(torch.float16).double()

    if kind == Q8_0:
        return (half(0) * blocks[..., 2:].contiguous().view(torch.int8)).view(rows, -1)
    if kind == Q6_K:
        low = wide[..., :128].unflatten(-1, (2, 1, 2, 32)) >> torch.tensor([0, 4], device="cuda").view(
            2, 1, 1
        )
        high = wide[..., 128:192].unflatten(-1, (2, 1, 32)) >> 2 * torch.arange(4, device="cuda").view(4, 1)
        codes = (low & 15).flatten(-4) | (high & 3).flatten(-3) << 4
        scales = blocks[..., 192:208].contiguous().view(torch.int8).double().repeat_interleave(16, -1)
        return (half(208) * scales * (codes - 32)).view(rows, -1)
    first, second, both = wide[..., 4:8], wide[..., 8:12], wide[..., 12:16]
    scales = torch.cat([first & 63, both & 15 | first >> 6 << 4], -1).double()
    minima = torch.cat([second & 63, both >> 4 | second >> 6 << 4], -1).double()
    codes = wide[..., -128:].unflatten(-1, (4, 1, 32)) >> torch.tensor([0, 4], device="cuda").view(2, 1)
    codes = (codes & 15).flatten(-3)
    if kind == Q5_K:
        fifth = wide[..., 16:48].unsqueeze(-2) >> torch.arange(8, device="cuda").view(8, 1)
        codes = codes | (fifth & 1).flatten(-2) << 4
    d, m = (half(0) * scales).repeat_interleave(32, -1), (half(2) * minima).repeat_interleave(32, -1)
    return (d * codes - m).view(rows, -1)


class Matrix:
    """A packed matrix on the device; what nothing writes is poison."""

    def __init__(self, kind, rows, k):
        self.kind, self.rows, self.k = kind, rows, k
        self.codes = torch.full(
            (rows // 16 * (k // 64) * TILE_BYTES[kind],), 0x77, dtype=torch.uint8, device="cuda"
        )
        self.num_words = rows * k // 64
        size = 4 * self.num_words + (0 if kind == Q8_0 else rows * k // 32)
        self.scales = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
        self.struct = PackedMatrix(self.codes.data_ptr(), self.scales.data_ptr(), None, rows, k, 64, kind)

    def unpacked(self):
        """Codes [rows, k], as the header says where they are."""
        tiles, k_tiles = self.rows // 16, self.k // 64
        parts = self.codes.view(tiles, k_tiles, TILE_BYTES[self.kind])
        words = parts[..., :512].contiguous().view(torch.int32).view(tiles, k_tiles, 32, 4)
        rest = parts[..., 512:].contiguous().view(torch.int32)
        out = torch.empty(tiles, 16, k_tiles, 64, dtype=torch.int32, device="cuda")
        lane = torch.arange(32, device="cuda")
        g, t = lane // 4, lane % 4
        for step in range(4):
            for i in range(4):
                if self.kind == Q8_0:
                    half = (words if step < 2 else rest.view(tiles, k_tiles, 32, 4))[
                        ..., step % 2 * 2 + i // 2
                    ]
                    pair = half >> (8 * (i % 2)) & 0x00FF00FF
                else:
                    pair = words[..., step] >> (4 * i) & 0x000F000F
                    if self.kind != Q4_K:
                        upper = rest.view(tiles, k_tiles, 32, 2)[..., step // 2]
                        pair = pair | (upper >> (8 * (step % 2) + 2 * i) & 0x00030003) << 4
                for element in range(2):
                    column = 16 * step + 2 * t + 8 * (i // 2) + element
                    out[:, g + 8 * (i % 2), :, column] = (pair >> (16 * element) & 255).permute(2, 0, 1)
        return out.view(self.rows, self.k)

    def parts(self, first, end, tiles):
        """Four bytes of each row, by so many parts of k."""
        words = self.scales[first:end].view(self.rows // 16, tiles, 16, 4)
        return words.transpose(1, 2).reshape(self.rows, tiles, 4)

    def dequantised(self):
        """float64 [rows, k]."""
        codes, rows = self.unpacked(), self.rows
        words = self.parts(0, 4 * self.num_words, self.k // 64)
        if self.kind == Q8_0:
            codes = torch.where(codes > 127, codes - 256, codes)
            scales = words.contiguous().view(torch.float16).double().reshape(rows, -1)
            return codes * scales.repeat_interleave(32, 1)
        wholes = self.parts(4 * self.num_words, None, self.k // 128).contiguous().view(torch.float16).double()
        d, m = (wholes[..., i].repeat_interleave(4, 1) for i in range(2))  # of 32 columns each
        if self.kind == Q6_K:
            assert ((m == 0) | m.isnan()).all()  # or nothing is there
            steps = d.repeat_interleave(2, 1) * (words.double().reshape(rows, -1) - 128)
            return (steps[..., None] * (codes - 32).view(rows, -1, 16)).view(rows, -1)
        s, t = (words[..., i : i + 2].double().reshape(rows, -1) for i in (0, 2))
        return ((d * s)[..., None] * codes.view(rows, -1, 32) - (m * t)[..., None]).view(rows, -1)

    def multiplied(self, weights):
        """What products of many rows take for these."""
        return weights.float().to(torch.bfloat16).double()


def gguf(kind, rows, k, seed=0):
    m, blocks = Matrix(kind, rows, k), blocks_of(kind, rows, k, seed=seed)
    middle = rows // 32 * 16
    call("q35_pack_gguf", m.struct, 0, middle, blocks, AS_THEY_ARE)
    call("q35_pack_gguf", m.struct, middle, rows - middle, blocks[middle:], AS_THEY_ARE)
    torch.cuda.synchronize()
    return m


# ------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "k"), [(16, 256), (48, 512), (150, 1280), (37, 3072)])
def test_files(rows, k, kind):
    tall = rows + -rows % 16
    m, blocks = Matrix(kind, 32 + tall + 16, k), blocks_of(kind, rows, k, seed=4)
    call("q35_pack_gguf", m.struct, 32, rows, blocks, AS_THEY_ARE)
    found = m.dequantised()
    part = found[32 : 32 + tall]
    assert torch.equal(part[:rows], numbers_of(kind, blocks))
    assert (part[rows:] == 0).all()
    # What nothing wrote is what it was.
    tile = k // 64 * TILE_BYTES[kind]
    assert (m.codes[: 2 * tile] == 0x77).all() and (m.codes[-tile:] == 0x77).all()
    words = m.parts(0, 4 * m.num_words, k // 64)
    assert (words[:32] == 255).all() and (words[32 + tall :] == 255).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [(0, 2, 4, 128), (256, 2, 3, 128), (0, 4, 2, 256)])
def test_heads_in_another_order(order, kind):
    start, k_heads, per, dim = order
    k = start + k_heads * per * dim
    m, blocks = Matrix(kind, 32, k), blocks_of(kind, 32, k, seed=5)
    call("q35_pack_gguf", m.struct, 0, 32, blocks, HeadOrder(*order))
    want = numbers_of(kind, blocks)
    heads = want[:, start:].view(32, per, k_heads, dim).transpose(1, 2).reshape(32, -1)
    assert torch.equal(m.dequantised(), torch.cat([want[:, :start], heads], 1))


# ------------------------------------------------------------------------------------------------------------ products


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "k"), [(16, 256), (48, 512), (16, 1280), (2080, 2304), (112, 3072)])
def test_few_rows(rows, k, kind):
    check(gguf(kind, rows, k, seed=k), range(1, 17))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "k"), FAMILY)
def test_few_rows_of_the_family(rows, k, kind):
    check(gguf(kind, rows, k, seed=rows), (1, 4, 8, 13, 16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "k"), [(16, 256), (48, 512), (208, 768), (2080, 2304)])
def test_many_rows(rows, k, kind):
    check_many(gguf(kind, rows, k, seed=k))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "k"), FAMILY)
def test_many_rows_of_the_family(rows, k, kind):
    check_many(gguf(kind, rows, k, seed=rows), (17, 64, 200))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "k"), [(272, 256), (80, 768), (144, 512), (528, 256)])
def test_edges_of_tiles(rows, k, kind):
    check_many(gguf(kind, rows, k, seed=rows), (17, 32, 33, 64, 65, 96, 97, 127, 128, 129, 255, 256, 257))


@pytest.mark.parametrize("kind", KINDS)
def test_more_tiles_than_blocks(kind):
    check_many(gguf(kind, 33920, 256, seed=6), (17, 300))


def test_units_of_eight_bits():
    """K-quants have blocks of 256; Q8_0 goes by 128."""
    for k in (128, 384, 1152):
        m = gguf(Q8_0, 80, k, seed=k)
        check(m, (1, 9, 16))
        check_many(m, (17, 129))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "k", "tail"), [(208, 2304, 40), (112, 8192, 17), *TAILS])
def test_a_tail_of_bf16(rows, k, tail, kind):
    m, w, all_x = gguf(kind, rows, k, seed=k), randn(tail, k, seed=19), randn(16, k, seed=20)
    want = all_x.double() @ w.double().T
    for n in (16, 1, 7, 9):
        x, out = all_x[16 - n :].contiguous(), poisoned(n, rows + tail + 3, dtype=torch.float32)
        call("q35_packed_linear_tail", n, m.struct, w, tail, x, out, 1, rows + tail + 3)
        assert out[:, rows + tail :].isnan().all()
        assert error(out[:, rows : rows + tail], want[16 - n :]) < 1e-5
        assert same_bits(out[:, :rows].contiguous(), linear(m, x, True))


@pytest.mark.parametrize("kind", [Q6_K, Q8_0])
def test_vocabulary_head(kind):
    """Of few rows, and of more, whose weights are rounded to bf16."""
    k, n_most, some = 2048, 40, some_rows_of_head()
    m, x = gguf(kind, HEAD_ROWS, k, seed=9), randn(n_most, k, seed=10)
    want = x.double() @ numbers_of(kind, blocks_of(kind, HEAD_ROWS, k, seed=9)[some]).T
    for n in (1, 4, 16, n_most):
        last = x[n_most - n :].contiguous()
        found = linear(m, last, True)
        assert torch.isfinite(found).all()
        assert error(found[:, some], want[n_most - n :]) < (1e-5 if n <= 16 else 4e-3)
        assert same_bits(found, linear(m, last, True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 16, 17, 100])
def test_rows_do_not_leak_into_each_other(n, kind):
    check_rows_apart(gguf(kind, 208, 256, seed=11), n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 16, 64])
def test_a_chain_in_a_graph(n, kind):
    up, down = gguf(kind, 4608, 1024, seed=13), gguf(kind, 1024, 4608, seed=14)
    check_chain(n, 1024, 4608, into(n, up), into(n, down))


def test_what_is_refused():
    m, int4 = Matrix(Q4_K, 32, 512), filled(INT4_F16, 32, 128, 64)
    x, out, blocks = randn(1, 512), poisoned(1, 32), blocks_of(Q4_K, 32, 512)

    def refused(name, *arguments):
        with pytest.raises(AssertionError, match="CUDA error 1$"):
            call(name, *arguments)

    refused("q35_pack_gguf", int4.struct, 0, 16, blocks, AS_THEY_ARE)
    refused("q35_pack_gguf", m.struct, 8, 16, blocks, AS_THEY_ARE)
    refused("q35_pack_gguf", m.struct, 16, 32, blocks, AS_THEY_ARE)
    refused("q35_pack_gguf", m.struct, 0, 16, blocks, HeadOrder(0, 2, 4, 64))
    refused("q35_pack_gguf", m.struct, 0, 16, blocks, HeadOrder(0, 2, 4, 128))
    refused("q35_pack_gguf", Matrix(Q4_K, 32, 384).struct, 0, 16, blocks, AS_THEY_ARE)
    refused("q35_pack_scales", m.struct, 0, 16, blocks, 0, 1, 8, 1)
    narrow = PackedMatrix(m.codes.data_ptr(), m.scales.data_ptr(), None, 32, 192, 64, Q4_K)
    refused("q35_packed_linear", 1, narrow, x, out, 0, 32)
