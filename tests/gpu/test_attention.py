"""The attention launchers against plain float64, on ragged batches over scattered, poisoned pages."""

import pytest
import torch
from launch import PAGE, AttentionDims, Batch, call, error, poisoned, randn, same_bits

pytestmark = pytest.mark.gpu
NAN = float("nan")
ABSURD = 1 << 30

RAGGED = [
    *[(0, 1), (1, 1), (63, 1), (64, 3), (700, 8), (4097, 1), (0, 9), (1, 65), (63, 300), (64, 0), (700, 9)],
    *[(4097, 300), (0, 300), (63, 8), (4097, 3), (0, 0), (64, 65), (700, 1)],
]
SMALL = [(0, 1), (64, 3), (63, 9), (700, 8), (0, 0), (1, 65), (127, 2)]


def make_batch(seqs, seed=0):
    """Absurd page numbers follow each sequence's list."""
    batch = Batch([(cached, query, 0) for cached, query in seqs], seed=seed)
    pages, starts = [ABSURD], []
    for (cached, query), start in zip(seqs, batch.page_starts, strict=True):
        starts.append(len(pages))
        pages += batch.pages[start : start - (-(cached + query) // PAGE)] + [ABSURD, -ABSURD]
    batch.kept = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in (pages, starts)]
    batch.struct.pages, batch.struct.page_start = (x.data_ptr() for x in batch.kept)
    return batch


def places(batch, index):
    """Pages and places in them of all tokens of a sequence."""
    cached, query, _ = batch.seqs[index]
    at = torch.arange(cached + query)
    pages = torch.tensor(batch.pages, dtype=torch.int64)[batch.page_starts[index] + at // PAGE]
    return pages.cuda(), (at % PAGE).cuda()


class Case:
    """A batch, its projections and its pages: random keys and values, NaN wherever no token is."""

    def __init__(self, seqs, hq, hkv, d, *, extra=0, seed=0):
        self.batch, self.dims = make_batch(seqs, seed), AttentionDims(hq, hkv, d)
        self.hq, self.hkv, self.d = hq, hkv, d
        n = self.batch.num_tokens
        self.stride = (2 * hq + 2 * hkv) * d + extra
        self.projected = randn(n, self.stride, seed=seed + 1)
        self.q = randn(n, hq * d, seed=seed + 2, scale=2.0)
        self.k, self.v = (poisoned(self.batch.num_pages, hkv, PAGE, d) for _ in range(2))
        for i, (cached, query, _) in enumerate(self.batch.seqs):
            pages, place = places(self.batch, i)
            self.k[pages, :, place] = randn(cached + query, hkv, d, seed=seed + 100 + i)
            self.v[pages, :, place] = randn(cached + query, hkv, d, seed=seed + 200 + i)

    def part(self, index, skip=0):
        """The last tokens of one sequence alone, those before them cached, in other pages."""
        cached, query, _ = self.batch.seqs[index]
        alone = object.__new__(Case)
        alone.__dict__.update(self.__dict__)
        alone.batch = make_batch([(cached + skip, query - skip)], seed=77)
        rows = slice(self.batch.starts[index] + skip, self.batch.starts[index] + query)
        alone.projected, alone.q = self.projected[rows].clone(), self.q[rows].clone()
        (old, place), (new, _) = places(self.batch, index), places(alone.batch, 0)
        alone.k, alone.v = (poisoned(alone.batch.num_pages, self.hkv, PAGE, self.d) for _ in range(2))
        alone.k[new, :, place], alone.v[new, :, place] = self.k[old, :, place], self.v[old, :, place]
        return alone, rows

    def run(self, times=1):
        """The last of some runs with one workspace, which is zero before the first."""
        batch, guard = self.batch, 64
        struct = batch.struct
        size = call(
            "q35_attention_workspace", batch.num_tokens, struct.num_seqs, struct.max_kv_len, self.dims
        )
        workspace = torch.zeros(size + guard, dtype=torch.float32, device="cuda")
        workspace[size:] = 7.0
        for _ in range(times):
            out = poisoned(batch.num_tokens + 1, self.hq * self.d)
            arguments = (self.q, self.projected, self.stride, self.k, self.v, workspace, out)
            call("q35_gated_attention", struct, self.dims, *arguments)
        assert (workspace[size:] == 7.0).all(), "past the workspace"
        assert out[-1].isnan().all(), "past the output"
        return out[:-1]

    def want(self):
        out = torch.zeros(self.batch.num_tokens, self.hq, self.d, dtype=torch.float64, device="cuda")
        group = self.hq // self.hkv
        for i, (cached, query, _) in enumerate(self.batch.seqs):
            if query == 0:
                continue
            rows = slice(self.batch.starts[i], self.batch.starts[i] + query)
            pages, place = places(self.batch, i)
            at = torch.arange(cached + query, device="cuda")
            hidden = at[None, :] > at[cached:, None]
            q = self.q[rows].reshape(query, self.hq, self.d)
            for h in range(self.hkv):
                k, v = self.k[pages, h, place].double(), self.v[pages, h, place].double()
                heads = q[:, h * group : (h + 1) * group].double().transpose(0, 1)
                scores = (heads @ k.T * self.d**-0.5).masked_fill(hidden, -torch.inf)
                out[rows, h * group : (h + 1) * group] = (scores.softmax(-1) @ v).transpose(0, 1)
        gate = self.projected[:, : 2 * self.hq * self.d].reshape(-1, self.hq, 2, self.d)[:, :, 1]
        return (out * gate.double().sigmoid()).flatten(1)


def check(case):
    found, want = case.run(), case.want()
    assert torch.isfinite(found).all()
    assert error(found, want) < 4e-3
    each = (found.double() - want).norm(dim=1) / want.norm(dim=1)
    assert each.max() < 8e-3, f"token {each.argmax()}: {each.max()}"
    assert same_bits(found, case.run(times=3))
    return found


@pytest.mark.parametrize(("hq", "hkv", "extra"), [(32, 2, 0), (16, 2, 3)])
def test_attention_of_the_family(hq, hkv, extra):
    case = Case(RAGGED, hq, hkv, 256, extra=extra)
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
    case = Case(SMALL, hq, hkv, d, extra=5, seed=3)
    found = check(case)
    for i, (_, query) in enumerate(SMALL):
        if query > 0:
            alone, rows = case.part(i)
            assert same_bits(alone.run(), found[rows]), SMALL[i]


# Where the keys are split anew: with every 16 keys, above 2048 keys over 3 teams of blocks, up to 8 with two key heads
# and 16 with one; with sixteen all is one team.
@pytest.mark.parametrize(
    ("seqs", "hq", "hkv", "d"),
    [
        ([(8190, 4), (5, 1)], 16, 2, 256),
        ([(8193, 1)], 32, 2, 256),
        ([(2044, 8), (2047, 1), (2048, 1), (3071, 2), (14, 4)], 16, 2, 256),
        ([(33000, 2), (2046, 4)], 32, 2, 256),
        ([(17000, 3), (2046, 8)], 8, 1, 128),
        ([(1022, 5), (2047, 2), (0, 8), (9000, 1)], 16, 16, 64),
    ],
)
def test_decode_where_segments_grow(seqs, hq, hkv, d):
    found = check(case := Case(seqs, hq, hkv, d, seed=5))
    for i, (_, query) in enumerate(seqs):
        alone, rows = case.part(i, skip=query - 1)
        assert same_bits(alone.run(), found[rows])


@pytest.mark.parametrize(
    ("cached", "query", "skip"), [(63, 300, 200), (700, 65, 1), (0, 130, 121), (700, 8, 5)]
)
def test_chunks_change_no_bits(cached, query, skip):
    case = Case([(cached, query)], 16, 2, 256, seed=9)
    alone, rows = case.part(0, skip)
    assert same_bits(alone.run(), check(case)[rows])


@pytest.mark.parametrize(("bound", "count"), [(300, 2), (40000, 1), (40000, 40)])
def test_a_larger_bound_of_the_lengths_changes_no_bits(bound, count):
    case = Case([(130 + 61 * i % 2500, 1 + i % 2) for i in range(count)], 16, 2, 256, seed=15)
    found = check(case)
    case.batch.struct.max_kv_len = max(case.batch.struct.max_kv_len, bound)
    assert same_bits(case.run(times=2), found)


@pytest.mark.parametrize("seqs", [[(2040, 1), (17, 1), (700, 1)], [(64, 500), (0, 140), (700, 3)]], ids=str)
def test_norm_and_attention_in_a_graph(seqs):
    """Each kernel started under the one before it, for tokens and chunks that follow each other."""
    hq, hkv, d, steps = 16, 2, 256, 3
    case = Case(seqs, hq, hkv, d, seed=17)
    n = case.batch.num_tokens
    norm = 1 + randn(d, dtype=torch.float32, seed=18, scale=0.1)
    inv_freq = (1e7 ** -(torch.arange(32).float() / 32)).cuda()
    axis = torch.zeros(32, dtype=torch.uint8, device="cuda")
    size = call("q35_attention_workspace", n, 3, 4096, case.dims)
    workspace = torch.zeros(size, dtype=torch.float32, device="cuda")
    q, out = torch.empty_like(case.q), [poisoned(n, hq * d) for _ in range(steps)]

    def run(between):
        for i in range(steps):
            freqs = (inv_freq, axis, 32, 1.0)
            rope = (case.dims, norm, norm, 1e-6, *freqs, case.projected, case.stride, q, case.k, case.v)
            call("q35_qk_norm_rope_write", case.batch.struct, *rope)
            between()
            arguments = (q, case.projected, case.stride, case.k, case.v, workspace, out[i])
            call("q35_gated_attention", case.batch.struct, case.dims, *arguments)
            between()

    run(torch.cuda.synchronize)
    want = out[0].clone()
    assert torch.isfinite(want).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(lambda: None)
    for _ in range(3):
        for each in out:
            each.fill_(NAN)
        q.fill_(NAN)
        graph.replay()
        assert all(same_bits(each, want) for each in out)


# Tiles of 128 rows: 16 tokens or 8, one head alone, groups that tokens do not fill; pages that end in a tile.
@pytest.mark.parametrize(
    ("seqs", "hq", "hkv"),
    [
        ([(0, 2000), (4097, 515), (640, 64), (5, 130), (0, 9), (63, 1)], 16, 2),
        ([(64, 1030), (0, 16), (1, 17), (127, 128), (20000, 40)], 32, 2),
        ([(0, 300), (100, 129)], 4, 4),
        ([(0, 64), (0, 63), (0, 65), (64, 64), (63, 65), (1, 127)], 16, 2),
        ([(9, 77), (0, 200)], 20, 1),
        ([(9, 77), (0, 50)], 3, 1),
    ],
)
def test_prefill_of_long_prompts(seqs, hq, hkv):
    case = Case(seqs, hq, hkv, 256, seed=21)
    found = check(case)
    for i, (_, query) in enumerate(seqs):
        alone, rows = case.part(i)
        assert same_bits(alone.run(), found[rows]), seqs[i]


@pytest.mark.parametrize(("hq", "cached", "query"), [(16, 0, 700), (32, 192, 450), (16, 5000, 300)])
def test_prefill_in_chunks(hq, cached, query):
    """However a prompt is cut at multiples of 64, its tokens get the same bits."""
    case = Case([(cached, query)], hq, 2, 256, seed=23)
    found = check(case)
    for skip in range(64, query - 8, 64):
        alone, rows = case.part(0, skip)
        assert same_bits(alone.run(), found[rows]), skip


@pytest.mark.parametrize(("first", "last"), [(0.2, 12.0), (12.0, 0.2)])
def test_prefill_where_scores_grow_or_shrink(first, last):
    """A running maximum that moves with every page, and one that the first page sets."""
    case = Case([(0, 900), (300, 40)], 16, 2, 256, seed=25)
    for i, (cached, query, _) in enumerate(case.batch.seqs):
        pages, place = places(case.batch, i)
        factor = torch.linspace(first, last, cached + query, device="cuda")
        case.k[pages, :, place] = (case.k[pages, :, place].float() * factor[:, None, None]).bfloat16()
    found, want = case.run(), case.want()
    assert torch.isfinite(found).all()
    assert error(found, want) < 4e-3


def test_prefill_gates_that_close():
    case = Case([(0, 100)], 16, 2, 256, seed=27)
    gate = case.projected[:, : 2 * 16 * 256].view(-1, 16, 2, 256)[:, :, 1]
    gate[:, :, :64], gate[:, :, 64:128], gate[:, :, 128:192] = -200, 200, -20
    found, want = case.run().view(-1, 16, 256), case.want().view(-1, 16, 256)
    assert (found[:, :, :64] == 0).all()
    for start in (64, 128, 192):
        columns = slice(start, start + 64)
        assert error(found[:, :, columns], want[:, :, columns]) < 4e-3


def test_many_sequences_of_many_lengths():
    check(Case([(37 * i % 400, i % 3) for i in range(150)] + [(50, 700)], 16, 2, 256, seed=11))


def test_large_scores_and_gates():
    case = Case([(300, 20), (300, 2)], 16, 2, 256, seed=13)
    case.q *= 50
    case.projected *= 30
    found, want = case.run(), case.want()
    assert error(found, want) < 4e-3


def norm_rope_reference(batch, x, w, eps, inv_freq, axis, scale):
    """x [n, heads, d], f64."""
    x = x.double()
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w.double()
    # The product is rounded to f32, as the contract has it.
    angle = batch.positions.cuda()[:, axis.long()].float() * inv_freq
    cos, sin = (f(angle.double())[:, None] * scale for f in (torch.cos, torch.sin))
    half = len(inv_freq)
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1)


@pytest.mark.parametrize(
    ("hq", "hkv", "d", "half", "extra"),
    [
        *[
            (32, 2, 256, 32, 0),
            (16, 2, 256, 32, 64),
            (16, 2, 256, 32, 1),
            (4, 1, 256, 128, 0),
            (4, 2, 128, 16, 8),
        ],
        *[(4, 2, 10, 2, 0), (2, 1, 12, 3, 0), (6, 3, 24, 8, 0), (2, 2, 40, 12, 3), (2, 1, 64, 0, 0)],
        (2, 1, 320, 160, 0),
    ],
)
def test_qk_norm_rope_write(hq, hkv, d, half, extra):
    seqs = [(0, 1), (63, 3), (4097, 9), (64, 0), (700, 65), (1, 1), (0, 300)]
    batch, eps, scale = make_batch(seqs, seed=1), 1e-6, 1.25
    n, stride = batch.num_tokens, (2 * hq + 2 * hkv) * d + extra
    generator = torch.Generator().manual_seed(4)
    positions = torch.randint(0, 5000, (n, 3), generator=generator)
    positions[0], positions[1] = 0, 262143
    batch.set_positions(positions.to(torch.int32))
    inv_freq = (1e7 ** -(torch.arange(half).float() / max(half, 1))).cuda()
    axis = (torch.arange(half) % 3).to(torch.uint8).cuda()
    q_norm, k_norm = (1 + torch.randn(d, generator=generator) / 4 for _ in range(2))
    q_norm, k_norm = q_norm.cuda(), k_norm.cuda()
    projected = randn(n, stride, seed=5, scale=3.0)

    def run():
        q = poisoned(n + 1, hq * d)
        k, v = (poisoned(batch.num_pages, hkv, PAGE, d) for _ in range(2))
        freqs = (inv_freq, axis, half, scale)
        dims = AttentionDims(hq, hkv, d)
        call(
            "q35_qk_norm_rope_write",
            batch.struct,
            dims,
            q_norm,
            k_norm,
            eps,
            *freqs,
            projected,
            stride,
            q,
            k,
            v,
        )
        assert q[-1].isnan().all()
        return q[:-1], k, v

    q, k, v = run()
    heads = projected[:, : 2 * hq * d].reshape(n, hq, 2, d)[:, :, 0]
    want = norm_rope_reference(batch, heads, q_norm, eps, inv_freq, axis, scale)
    assert error(q, want.flatten(1)) < 4e-3
    rest = projected[:, 2 * hq * d :][:, : 2 * hkv * d].reshape(n, 2, hkv, d)
    want = norm_rope_reference(batch, rest[:, 0], k_norm, eps, inv_freq, axis, scale)
    for i, (cached, query) in enumerate(seqs):
        if query == 0:
            continue
        rows = slice(batch.starts[i], batch.starts[i] + query)
        pages, place = (x[cached:] for x in places(batch, i))
        assert error(k[pages, :, place], want[rows]) < 4e-3
        assert same_bits(v[pages, :, place], rest[rows, 1])
        for written in (k, v):
            written[pages, :, place] = NAN
    assert k.isnan().all() and v.isnan().all(), "written where no new token is"
    again = run()
    assert same_bits(again[0], q)


def test_nothing_to_do():
    dims = AttentionDims(4, 2, 64)
    for seqs in ([], [(64, 0)]):
        batch = make_batch(seqs)
        batch.struct.num_tokens = 0
        call("q35_gated_attention", batch.struct, dims, None, None, 0, None, None, None, None)
        arguments = (None, None, 1e-6, None, None, 0, 1.0, None, 0, None, None, None)
        call("q35_qk_norm_rope_write", batch.struct, dims, *arguments)
