"""Attention over pages in fp8, and what writes them, against float64 over the numbers that the codes stand for."""

import pytest
import torch
from launch import PAGE, AttentionDims, call, error, poisoned, randn, same_bits
from test_attention import NAN, RAGGED, SMALL, Case, make_batch, norm_rope_reference, places

pytestmark = pytest.mark.gpu
E4M3 = torch.float8_e4m3fn


def quantise(x):
    """Codes and scales of rows, in f32 on the CPU."""
    x = x.float().cpu()
    largest = x.abs().amax(-1, keepdim=True)
    scale = torch.where(largest.isfinite(), largest / 448, NAN)
    codes = torch.where(scale == 0, 0, x / scale).clamp(-448, 448).to(E4M3).view(torch.uint8)
    return codes.cuda(), scale[..., 0].cuda()


class Pages:
    """uint8 [num_pages, Hkv, 2, 64 * (d + 4)]: NaN wherever nothing was written."""

    def __init__(self, num_pages, hkv, d):
        self.bytes = torch.full((num_pages, hkv, 2, PAGE * (d + 4)), 255, dtype=torch.uint8, device="cuda")
        self.codes = self.bytes[..., : PAGE * d].unflatten(-1, (PAGE, d))
        self.scales = self.bytes[..., PAGE * d :].view(torch.float32)

    def numbers(self, kind, pages, place):
        codes = self.codes[pages, :, kind, place].view(E4M3).double()
        return codes * self.scales[pages, :, kind, place].double()[..., None]


class Case8(Case):
    """A case of the neighbours with its keys and values quantised; `k` and `v` are the numbers that are meant."""

    def __init__(self, seqs, hq, hkv, d, *, extra=0, seed=0):
        super().__init__(seqs, hq, hkv, d, extra=extra, seed=seed)
        self.pages = Pages(self.batch.num_pages, hkv, d)
        for i in range(len(self.batch.seqs)):
            pages, place = places(self.batch, i)
            for kind, x in enumerate((self.k, self.v)):
                codes, scales = quantise(x[pages, :, place])
                self.pages.codes[pages, :, kind, place] = codes
                self.pages.scales[pages, :, kind, place] = scales
        self.decode()

    def decode(self):
        """Prefill takes elements that are rounded to bf16, with heads of the family's sizes."""
        self.k, self.v = (torch.full_like(x, NAN, dtype=torch.float64) for x in (self.k, self.v))
        for i, (_, query, _) in enumerate(self.batch.seqs):
            pages, place = places(self.batch, i)
            for kind, x in enumerate((self.k, self.v)):
                numbers = self.pages.numbers(kind, pages, place)
                if query > 8 and self.d in (64, 128, 256):
                    numbers = numbers.float().bfloat16().double()
                x[pages, :, place] = numbers

    def part(self, index, skip=0):
        """The last tokens of one sequence alone, those before them cached, in other pages."""
        cached, query, _ = self.batch.seqs[index]
        alone = object.__new__(Case8)
        alone.__dict__.update(self.__dict__)
        alone.batch = make_batch([(cached + skip, query - skip)], seed=77)
        rows = slice(self.batch.starts[index] + skip, self.batch.starts[index] + query)
        alone.projected, alone.q = self.projected[rows].clone(), self.q[rows].clone()
        (old, place), (new, _) = places(self.batch, index), places(alone.batch, 0)
        alone.k, alone.v = (poisoned(alone.batch.num_pages, self.hkv, PAGE, self.d) for _ in range(2))
        alone.pages = Pages(alone.batch.num_pages, self.hkv, self.d)
        alone.pages.codes[new, :, :, place] = self.pages.codes[old, :, :, place]
        alone.pages.scales[new, :, :, place] = self.pages.scales[old, :, :, place]
        alone.decode()
        return alone, rows

    def room(self):
        return sum(-(-(c + q) // PAGE) for c, q, _ in self.batch.seqs if q > 8)

    def run(self, times=1, spare=0):
        """The last of some runs with one workspace, which is zero before the first and has just enough room."""
        struct, guard = self.batch.struct, 64
        room, max_seqs = self.room() + spare, struct.num_seqs + spare
        size = call("q35_attention_fp8_workspace", room, max_seqs, self.dims)
        workspace = torch.zeros(size + guard, dtype=torch.float32, device="cuda")
        workspace[size:] = 7.0
        for _ in range(times):
            out = poisoned(self.batch.num_tokens + 1, self.hq * self.d)
            arguments = (
                self.q,
                self.projected,
                self.stride,
                self.pages.bytes,
                room,
                max_seqs,
                workspace,
                out,
            )
            call("q35_gated_attention_fp8", struct, self.dims, *arguments)
        assert (workspace[size:] == 7.0).all(), "past the workspace"
        assert out[-1].isnan().all(), "past the output"
        return out[:-1]


def check(case):
    found, want = case.run(), case.want()
    assert torch.isfinite(found).all()
    assert error(found, want) < 4e-3
    each = (found.double() - want).norm(dim=1) / want.norm(dim=1)
    assert each.max() < 8e-3, f"token {each.argmax()}: {each.max()}"
    assert same_bits(found, case.run(times=3)) and same_bits(found, case.run(spare=5))
    return found


@pytest.mark.parametrize(("hq", "hkv", "extra"), [(32, 2, 0), (16, 2, 3)])
def test_attention_of_the_family(hq, hkv, extra):
    case = Case8(RAGGED, hq, hkv, 256, extra=extra)
    found = check(case)
    for i, (_, query) in enumerate(RAGGED):
        if query > 0:
            alone, rows = case.part(i)
            assert same_bits(alone.run(), found[rows]), RAGGED[i]


@pytest.mark.parametrize(
    ("hq", "hkv", "d"),
    [*[(4, 4, 64), (6, 2, 64), (8, 1, 128), (40, 2, 128), (3, 1, 256)]]
    + [(4, 2, 10), (2, 1, 12), (6, 3, 24), (2, 2, 40), (2, 1, 72), (2, 1, 320)],
)
def test_attention_of_other_shapes(hq, hkv, d):
    case = Case8(SMALL, hq, hkv, d, extra=5, seed=3)
    found = check(case)
    for i, (_, query) in enumerate(SMALL):
        if query > 0:
            alone, rows = case.part(i)
            assert same_bits(alone.run(), found[rows]), SMALL[i]


@pytest.mark.parametrize("cached", [2047, 2048, 20000, 70000])
def test_decode_of_long_sequences(cached):
    case = Case8([(cached, 1), (cached + 3, 5), (10, 1)], 16, 2, 256, seed=5)
    found = check(case)
    # A bound far above what the sequences have, as in a recorded step.
    case.batch.struct.max_kv_len = 262144
    assert same_bits(case.run(), found)


@pytest.mark.parametrize("cached", [0, 55, 700])
def test_prefill_and_decode_agree(cached):
    """The same tokens by either path: elements rounded to bf16, or exact with rounded weights."""
    many = Case8([(cached, 12)], 16, 2, 256, seed=7)
    found = many.run()
    few, rows = many.part(0, skip=6)
    assert error(few.run(), found[rows]) < 8e-3


def test_many_sequences_of_many_lengths():
    check(Case8([(37 * i % 400, i % 3) for i in range(150)] + [(50, 700), (64, 30)], 16, 2, 256, seed=11))


def test_a_row_that_is_not_finite_shows_where_it_is_seen():
    case = Case8([(100, 6), (100, 12), (100, 3)], 16, 2, 256, seed=13)
    for i, kind, key in ((0, 0, 103), (1, 0, 103), (2, 1, 50)):
        pages, place = places(case.batch, i)
        case.pages.scales[pages[key], 1, kind, place[key]] = NAN
    found = case.run().view(-1, 16, 256)
    assert found[:, :8].isfinite().all()
    first, second, third = case.batch.starts
    for start, end in ((first, second), (second, third)):
        assert found[start : start + 3, 8:].isfinite().all() and found[start + 3 : end, 8:].isnan().all()
    assert found[third:, 8:].isnan().all()


@pytest.mark.parametrize(
    ("hq", "hkv", "d", "half", "extra"),
    [*[(32, 2, 256, 32, 0), (16, 2, 256, 32, 1), (4, 1, 256, 128, 0), (4, 2, 128, 16, 8)]]
    + [(4, 2, 10, 2, 0), (2, 1, 12, 3, 0), (6, 3, 24, 8, 0), (2, 1, 64, 0, 0), (2, 1, 320, 160, 0)],
)
def test_qk_norm_rope_write(hq, hkv, d, half, extra):
    seqs = [(0, 1), (63, 3), (4097, 9), (64, 0), (700, 65), (1, 1), (0, 300)]
    batch, eps, scale = make_batch(seqs, seed=1), 1e-6, 1.25
    n, stride = batch.num_tokens, (2 * hq + 2 * hkv) * d + extra
    generator = torch.Generator().manual_seed(4)
    inv_freq = (1e7 ** -(torch.arange(half).float() / max(half, 1))).cuda()
    axis = (torch.arange(half) % 3).to(torch.uint8).cuda()
    q_norm, k_norm = (1 + torch.randn(d, generator=generator) / 4 for _ in range(2))
    q_norm, k_norm = q_norm.cuda(), k_norm.cuda()
    projected = randn(n, stride, seed=5, scale=3.0)
    values = projected[:, (2 * hq + hkv) * d :][:, : hkv * d]
    # Rows of zeros, of the smallest numbers, and what is not finite.
    values[0], values[1], values[2] = 0.0, -0.0, 1e-40
    values[3, 0], values[4, -1], values[5, 1] = NAN, float("inf"), -float("inf")
    projected[6, 2 * hq * d] = NAN
    dims, pages = AttentionDims(hq, hkv, d), Pages(batch.num_pages, hkv, d)
    q = poisoned(n + 1, hq * d)
    arguments = (q_norm, k_norm, eps, inv_freq, axis, half, scale, projected, stride, q, pages.bytes)
    call("q35_qk_norm_rope_write_fp8", batch.struct, dims, *arguments)
    assert q[-1].isnan().all()

    heads = projected[:, : 2 * hq * d].reshape(n, hq, 2, d)[:, :, 0]
    want = norm_rope_reference(batch, heads, q_norm, eps, inv_freq, axis, scale)
    assert error(q[:-1], want.flatten(1)) < 4e-3
    keys = projected[:, 2 * hq * d :][:, : hkv * d].reshape(n, hkv, d)
    keys = norm_rope_reference(batch, keys, k_norm, eps, inv_freq, axis, scale)
    codes, scales = quantise(values.reshape(n, hkv, d))
    for i, (cached, query) in enumerate(seqs):
        if query == 0:
            continue
        rows = slice(batch.starts[i], batch.starts[i] + query)
        page, place = (x[cached:] for x in places(batch, i))
        # Values are what they are in f32: to the bit. A NaN's codes are of no account.
        found, finite = pages.scales[page, :, 1, place], scales[rows].isfinite()
        assert torch.equal(found.isfinite(), finite) and torch.equal(found[finite], scales[rows][finite])
        assert torch.equal(pages.codes[page, :, 1, place][finite], codes[rows][finite])
        # Keys: half a step of three bits, or of the smallest exponent; f32 may fall on the other side of a tie.
        found, finite = pages.numbers(0, page, place), keys[rows].isfinite().all(-1)
        assert torch.equal(found.isfinite().all(-1), finite)
        found, want = found[finite], keys[rows][finite]
        largest = want.abs().amax(-1, keepdim=True)
        step = torch.maximum(want.abs() / 16, largest / 448 / 1024)
        assert ((found - want).abs() <= 1.001 * step + 1e-6 * largest).all()
        assert error(pages.scales[page, :, 0, place][finite], largest[..., 0] / 448) < 1e-5
        pages.codes[page, :, :, place], pages.scales[page, :, :, place] = 255, NAN
    fresh = Pages(batch.num_pages, hkv, d)
    fresh.scales.fill_(NAN)
    pages.scales[pages.scales.isnan()] = NAN
    assert torch.equal(pages.bytes, fresh.bytes), "written where no new token is"


def test_nothing_to_do():
    dims = AttentionDims(4, 2, 64)
    for seqs in ([], [(64, 0)]):
        batch = make_batch(seqs)
        batch.struct.num_tokens = 0
        call("q35_gated_attention_fp8", batch.struct, dims, None, None, 0, None, 0, 1, None, None)
        arguments = (None, None, 1e-6, None, None, 0, 1.0, None, 0, None, None)
        call("q35_qk_norm_rope_write_fp8", batch.struct, dims, *arguments)
