"""The sparse block and its routing on the GPU against plain f64."""

import copy
import math

import pytest
import torch
from launch import MoeDims, MoeWeights, call, error, poisoned, randn, same_bits

pytestmark = pytest.mark.gpu
TOLERANCE = 4e-3
EPS = 1e-6

# hidden, experts, top_k, width, shared_width
SMALL_FAMILY = (2048, 256, 8, 512, 512)  # 35B-A3B
LARGE_FAMILY = (3072, 256, 8, 1024, 1024)  # 122B
ODD = [
    (50, 5, 2, 6, 13),
    (50, 12, 12, 10, 0),
    (64, 16, 1, 24, 13),
    (48, 32, 3, 10, 6),
    (72, 256, 8, 24, 0),
    (200, 512, 10, 24, 40),
    (8, 1, 1, 8, 8),
    (33, 4, 4, 7, 3),
    (264, 12, 3, 136, 72),
    (130, 700, 70, 16, 16),
]


def empty(n, misaligned):
    """bf16, or no more aligned than one."""
    return torch.empty(n + misaligned, dtype=torch.bfloat16, device="cuda")[int(misaligned) :]


class Block:
    """Weights of a sparse block, drawn so that outputs are about 1."""

    def __init__(self, dims, *, seed=0, misaligned=False):
        hidden, experts, _, width, shared = dims
        generator = torch.Generator("cuda").manual_seed(seed)

        def draw(scale, *shape):
            n = math.prod(shape)
            flat = empty(n, misaligned)
            return flat.normal_(generator=generator).mul_(scale).view(shape)

        self.dims, self.here = dims, range(experts)
        self.router = draw(2 * hidden**-0.5, experts, hidden)
        self.gate_up = draw(hidden**-0.5, experts, 2 * width, hidden)
        self.down = draw(4 * width**-0.5, experts, hidden, width)
        self.shared_gate_up = draw(hidden**-0.5, 2 * shared, hidden) if shared else None
        self.shared_down = draw(4 * shared**-0.5, hidden, shared) if shared else None
        self.shared_gate = draw(hidden**-0.5, 1, hidden) if shared else None

    def part(self, here):
        """What a rank has that holds some of the experts."""
        part = copy.copy(self)
        part.here = here
        part.gate_up = self.gate_up[here.start : here.stop]
        part.down = self.down[here.start : here.stop]
        return part

    def without_shared(self):
        other = copy.copy(self)
        other.dims = (*self.dims[:4], 0)
        other.shared_gate_up = other.shared_down = other.shared_gate = None
        return other

    def struct(self):
        return MoeDims(*self.dims, self.here.start, len(self.here))

    def tokens(self, n, *, seed=1, misaligned=False):
        generator = torch.Generator("cuda").manual_seed(seed)
        return empty(n * self.dims[0], misaligned).normal_(generator=generator).view(n, self.dims[0])

    def weights(self):
        tensors = (
            self.router,
            self.gate_up,
            self.down,
            self.shared_gate_up,
            self.shared_down,
            self.shared_gate,
        )
        return MoeWeights(*(None if t is None else t.data_ptr() for t in tensors))

    def workspace(self, n):
        """NaN whichever way it is read, and a guard behind it."""
        size = call("q35_moe_workspace", n, self.struct())
        space = torch.full((size + 4096,), 0xFF, dtype=torch.uint8, device="cuda")
        space[size:] = 0xA5
        return space

    def run(self, x, *, max_tokens=None, out=None):
        n = x.shape[0]
        space = self.workspace(max_tokens or n)
        if out is None:
            out = torch.full_like(x, float("nan"))
        call("q35_moe", n, self.struct(), self.weights(), x, space, out)
        assert (space[-4096:] == 0xA5).all(), "wrote past the workspace"
        return out

    def run_norm(self, delta, residual, w, *, misaligned=False):
        """q35_norm_moe: the residual after it, x and the output."""
        n, hidden = residual.shape
        residual, space = residual.clone(), self.workspace(n)
        x = empty((n + 1) * hidden, misaligned).fill_(float("nan")).view(n + 1, hidden)
        out = poisoned(n + 1, hidden)
        dims, weights = self.struct(), self.weights()
        call("q35_norm_moe", n, dims, weights, delta, residual, w, EPS, x, space, out)
        assert (space[-4096:] == 0xA5).all(), "wrote past the workspace"
        assert x[-1].isnan().all() and out[-1].isnan().all()
        return residual, x[:-1], out[:-1]

    def run_norm_apart(self, delta, residual, w, *, misaligned=False):
        n, hidden = residual.shape
        residual = residual.clone()
        x = empty(n * hidden, misaligned).fill_(float("nan")).view(n, hidden)
        call("q35_rmsnorm_residual", n, hidden, delta, residual, w, EPS, x)
        return residual, x, self.run(x)

    def reference(self, x):
        """The block in f64, rounded between gate_up and down as the contract says, and the tokens whose experts f32
        logits decide as well."""
        _, experts, top_k, width, shared = self.dims
        x = x.double()
        logits, order = torch.sort(x @ self.router.double().T, dim=1, descending=True, stable=True)
        sure = torch.ones(len(x), dtype=torch.bool, device="cuda")
        if top_k < experts:
            gap = logits[:, top_k - 1] - logits[:, top_k]
            sure = (gap == 0) | (gap > 1e-4)
        chosen, weights = order[:, :top_k], torch.softmax(logits[:, :top_k], dim=1)

        def swiglu(x, gate_up, down, width):
            both = x @ gate_up.double().T
            inner = torch.nn.functional.silu(both[:, :width]) * both[:, width:]
            return inner.to(torch.bfloat16).double() @ down.double().T

        out = torch.zeros_like(x)
        for e in chosen.unique().tolist():
            if e not in self.here:
                continue
            token, place = (chosen == e).nonzero(as_tuple=True)
            at = e - self.here.start
            y = swiglu(x[token], self.gate_up[at], self.down[at], width)
            out.index_add_(0, token, weights[token, place, None] * y)
        if shared:
            gate = torch.sigmoid(x @ self.shared_gate.double().T)
            out += gate * swiglu(x, self.shared_gate_up, self.shared_down, shared)
        return out, sure

    def check(self, x, **options):
        out = self.run(x, **options)
        want, sure = self.reference(x)
        assert sure.sum() >= len(x) - 2 - len(x) // 50
        assert error(out[sure], want[sure]) < TOLERANCE
        rows = (out.double() - want).norm(dim=1) / want.norm(dim=1).clamp(min=1e-3)
        assert (rows[sure] < TOLERANCE).all(), "one token is off"
        return out


@pytest.fixture(scope="module")
def small_family():
    return Block(SMALL_FAMILY)


@pytest.fixture(scope="module")
def large_family():
    return Block(LARGE_FAMILY)


# ---------------------------------------------------------------------------------------------------- routing


def plain_route(logits, top_k):
    weights, experts = [], []
    for row in logits.tolist():
        key = [(math.isnan(v), 0.0 if math.isnan(v) else -v, e) for e, v in enumerate(row)]
        chosen = sorted(range(len(row)), key=key.__getitem__)[:top_k]
        top = row[chosen[0]]
        w = []
        for e in chosen:
            if math.isnan(row[e]):
                w.append(1.0 if math.isnan(top) else 0.0)
            elif row[e] == top:
                w.append(1.0)
            else:
                w.append(math.exp(row[e] - top))
        weights.append([v / sum(w) for v in w])
        experts.append(chosen)
    return torch.tensor(weights), torch.tensor(experts, dtype=torch.int32)


def run_route(logits, top_k):
    n, num_experts = logits.shape
    logits = logits.cuda()
    weights = torch.full((n, top_k), float("nan"), device="cuda")
    experts = torch.full((n, top_k), -7, dtype=torch.int32, device="cuda")
    call("q35_route", n, num_experts, top_k, logits, weights, experts)
    return weights.cpu(), experts.cpu()


def check_route(logits, top_k):
    weights, experts = run_route(logits, top_k)
    want_weights, want_experts = plain_route(logits, top_k)
    assert torch.equal(experts, want_experts)
    torch.testing.assert_close(weights, want_weights.float(), rtol=5e-6, atol=1e-12)
    again = run_route(logits, top_k)
    assert same_bits(weights, again[0]) and torch.equal(experts, again[1])


@pytest.mark.parametrize(
    ("num_experts", "top_k"),
    [
        (1, 1),
        (4, 2),
        (5, 5),
        (12, 3),
        (31, 31),
        (32, 8),
        (33, 7),
        (256, 8),
        (257, 40),
        (512, 10),
        (512, 512),
        (700, 33),
    ],
)
def test_route(num_experts, top_k):
    generator = torch.Generator().manual_seed(num_experts)
    logits = torch.randn(19, num_experts, generator=generator) * 3
    check_route(logits, top_k)
    check_route((logits * 2).round() / 2, top_k)  # ties
    check_route(logits * 1e30, top_k)


@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 3), (16, 16), (256, 8), (512, 10), (600, 9)])
def test_route_of_what_is_not_finite(num_experts, top_k):
    nan, inf = float("nan"), float("inf")
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(12, num_experts, generator=generator)
    rows[0] = nan
    rows[1] = -inf
    rows[2] = 0.0
    rows[2, 1::2] = -0.0
    rows[3, 2], rows[3, 4] = inf, inf
    rows[4, 0], rows[4, 3] = nan, inf
    rows[5] = nan
    rows[5, 4] = -1.0
    rows[6] = nan
    rows[6, num_experts - 1], rows[6, 1] = -inf, -inf
    rows[7, ::2] = nan
    rows[8] = inf
    rows[9] = torch.full((num_experts,), -3e38)
    rows[9, 3] = 3e38
    rows[10, ::2] = torch.tensor(-nan)
    rows[11] = torch.tensor([1e-42, -1e-42]).repeat(num_experts)[:num_experts]
    check_route(rows, top_k)


def test_route_of_nothing():
    call("q35_route", 0, 8, 2, None, None, None)


# -------------------------------------------------------------------------------------------------- the block


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 15, 16, 17, 64, 300, 1000])
def test_small_family(small_family, n):
    small_family.check(small_family.tokens(n))


@pytest.mark.parametrize("n", [1, 3, 16, 17, 300])
def test_large_family(large_family, n):
    large_family.check(large_family.tokens(n))


@pytest.mark.parametrize("dims", ODD, ids=str)
@pytest.mark.parametrize("misaligned", [False, True])
def test_odd_sizes(dims, misaligned):
    block = Block(dims, misaligned=misaligned)
    for n in (1, 2, 3, 7, 16, 17, 64, 300):
        block.check(block.tokens(n, misaligned=misaligned), max_tokens=300 if n % 2 else None)


@pytest.mark.parametrize("n", [1, 3, 16, 17])
def test_every_expert_chosen(n):
    block = Block((64, 512, 512, 16, 8))
    block.check(block.tokens(n))


@pytest.mark.parametrize("shared", [0, 64])
def test_one_expert_takes_every_token(shared):
    block = Block((128, 16, 1, 64, shared))
    block.router.zero_()  # all tied: the lowest index
    for n in (1, 9, 16, 17, 200, 1000, 5000):
        block.check(block.tokens(n))


def test_tied_experts():
    block = Block((128, 40, 5, 64, 64))
    block.router.zero_()
    for n in (1, 5, 16, 100):
        block.check(block.tokens(n))


@pytest.mark.parametrize("n", [3, 40])
def test_offsets_beyond_32_bits(n):
    block = Block((3072, 512, 10, 1024, 0))  # gate_up has 3.2e9 elements
    x = block.tokens(n)
    chosen = (x.double() @ block.router.double().T).topk(10).indices
    assert (chosen > 400).any()
    block.check(x)


@pytest.mark.parametrize("dims", [(256, 8, 2, 128, 192), (2048, 4, 2, 512, 512), (72, 4, 3, 40, 24)], ids=str)
def test_many_tokens_an_expert(dims):
    """Tall tiles, and the same bits as low ones give."""
    block = Block(dims)
    x = block.tokens(1500)
    out = block.check(x)
    for first, n in ((0, 17), (700, 100)):
        assert same_bits(block.run(x[first : first + n]), out[first : first + n])


def test_outputs_by_blocks_of_columns(small_family):
    """So many tokens that their outputs by expert are not kept whole."""
    x = small_family.tokens(12000)
    out = small_family.check(x)
    assert same_bits(small_family.run(x[2000:2100]), out[2000:2100])


@pytest.mark.parametrize(
    "dims", [SMALL_FAMILY, (50, 12, 3, 10, 13), (264, 12, 3, 136, 0), (64, 128, 70, 16, 16)], ids=str
)
def test_a_token_does_not_see_the_batch(dims, small_family):
    block = small_family if dims == SMALL_FAMILY else Block(dims)
    x = block.tokens(300)
    for n in (2, 5, 16):
        out = block.run(x[:n])
        for t in range(n):
            assert same_bits(block.run(x[t : t + 1]), out[t : t + 1])
    repeated = x[:1].repeat(16, 1)  # sixteen tokens of the same experts
    assert same_bits(block.run(repeated), block.run(x[:1]).repeat(16, 1))
    out = block.run(x)
    for first in (0, 100, 260):
        assert same_bits(block.run(x[first : first + 40]), out[first : first + 40])


@pytest.mark.parametrize("n", [1, 2, 16, 17, 300])
def test_twice_the_same(small_family, n):
    x = small_family.tokens(n)
    first = small_family.run(x)
    assert same_bits(first, small_family.run(x))
    assert same_bits(first, small_family.run(x, max_tokens=1000))


def test_other_tokens_do_not_spread(small_family):
    """A token of NaN costs no other token anything."""
    for n in (5, 100):
        x = small_family.tokens(n)
        want = small_family.run(x)
        x[2] = float("nan")
        out = small_family.run(x)
        assert out[2].isnan().all()
        out[2] = want[2]
        assert same_bits(out, want)


@pytest.mark.parametrize("n", [1, 5, 100, 200, 1500])
def test_in_a_graph(small_family, n):
    x = small_family.tokens(n)
    want = small_family.run(x)
    space, out = small_family.workspace(n), torch.full_like(x, float("nan"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(2):  # the second starts under the first
            call("q35_moe", n, MoeDims(*small_family.dims), small_family.weights(), x, space, out)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert same_bits(out, want)


def test_no_tokens_touch_nothing(small_family):
    x = small_family.tokens(1)
    out = torch.full_like(x, 3.0)
    call("q35_moe", 0, MoeDims(*small_family.dims), small_family.weights(), x, None, out)
    assert (out == 3.0).all()


@pytest.mark.parametrize("dims", [SMALL_FAMILY, LARGE_FAMILY, *ODD], ids=str)
def test_workspace_serves_fewer_tokens(dims):
    tokens = [*range(1, 2000), *range(2000, 300000, 4999)]
    sizes = [call("q35_moe_workspace", n, MoeDims(*dims)) for n in tokens]
    assert sizes == sorted(sizes)
    assert all(s % 256 == 0 for s in sizes)


# ------------------------------------------------------------------------------------------ the norm before it


def norm_inputs(n, hidden, *, with_delta=True, seed=0):
    residual = randn(n, hidden, dtype=torch.float32, scale=3, seed=seed)
    delta = randn(n, hidden, seed=seed + 1) if with_delta else None
    return delta, residual, 1 + randn(hidden, dtype=torch.float32, scale=0.1, seed=seed + 2)


def check_norm(block, n, *, with_delta=True, misaligned=False):
    delta, residual, w = norm_inputs(n, block.dims[0], with_delta=with_delta)
    together = block.run_norm(delta, residual, w, misaligned=misaligned)
    apart = block.run_norm_apart(delta, residual, w, misaligned=misaligned)
    for a, b in zip(together, apart, strict=True):
        assert same_bits(a, b)
    want = residual.double() + (delta.double() if with_delta else 0)
    assert error(together[0], want) < 1e-6
    want = want / (want.square().mean(-1, keepdim=True) + EPS).sqrt() * w.double()
    assert error(together[1], want) < TOLERANCE


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 100])
@pytest.mark.parametrize("with_delta", [True, False])
def test_norm_moe_small_family(small_family, n, with_delta):
    check_norm(small_family, n, with_delta=with_delta)


@pytest.mark.parametrize("n", [1, 4, 9, 16, 17])
def test_norm_moe_large_family(large_family, n):
    check_norm(large_family, n)


@pytest.mark.parametrize("dims", [*ODD, (4096, 16, 2, 8, 8), (4104, 16, 2, 8, 8)], ids=str)
@pytest.mark.parametrize("misaligned", [False, True])
def test_norm_moe_odd_sizes(dims, misaligned):
    block = Block(dims, misaligned=misaligned)
    for n in (1, 2, 7, 8, 9, 16, 17):
        check_norm(block, n, with_delta=n != 7, misaligned=misaligned)


@pytest.mark.parametrize("dims", [SMALL_FAMILY, (264, 12, 3, 136, 72), (64, 128, 32, 16, 16)], ids=str)
def test_norm_moe_of_a_token_does_not_see_the_batch(dims, small_family):
    block = small_family if dims == SMALL_FAMILY else Block(dims)
    delta, residual, w = norm_inputs(16, dims[0])
    alone = [block.run_norm(delta[t : t + 1], residual[t : t + 1], w) for t in range(16)]
    for n in (2, 5, 8, 9, 16):
        found = block.run_norm(delta[:n], residual[:n], w)
        for piece, rows in zip(found, zip(*alone, strict=True), strict=True):
            assert same_bits(piece, torch.cat(rows[:n]))


@pytest.mark.parametrize("n", [1, 4, 16])
def test_norm_moe_layer_after_layer(small_family, n):
    """Kernels of neighbouring layers overlap, and share a workspace: many in a graph, against one at a time."""
    blocks = [small_family, Block(SMALL_FAMILY, seed=5)]
    dims, hidden, layers = MoeDims(*SMALL_FAMILY), SMALL_FAMILY[0], 24
    first, start, w = norm_inputs(n, hidden)
    space = small_family.workspace(n)
    residual, x = start.clone(), torch.empty_like(first)
    deltas = [first, *(torch.empty_like(first) for _ in range(2))]

    def step(layer):
        delta = deltas[0] if layer == 0 else deltas[1 + (layer - 1) % 2]
        weights, out = blocks[layer % 2].weights(), deltas[1 + layer % 2]
        call("q35_norm_moe", n, dims, weights, delta, residual, w, EPS, x, space, out)

    for layer in range(layers):
        step(layer)
        torch.cuda.synchronize()
    last = deltas[1 + (layers - 1) % 2]
    want = residual.clone(), last.clone()
    assert want[1].isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            step(layer)
    for _ in range(20):
        residual.copy_(start)
        last.fill_(float("nan"))
        graph.replay()
        assert same_bits(residual, want[0]) and same_bits(last, want[1])


def test_norm_moe_of_nothing(small_family):
    dims, weights = MoeDims(*small_family.dims), small_family.weights()
    call("q35_norm_moe", 0, dims, weights, None, None, None, EPS, None, None, None)


# ------------------------------------------------------------------------------------------------- many tokens


@pytest.mark.parametrize("dims", [(256, 8, 1, 128, 64), (264, 8, 1, 136, 0), (520, 4, 1, 200, 328)], ids=str)
def test_an_expert_of_any_number_of_tokens(dims):
    """Tiles of every height and of two and three parts, and the same bits from each."""
    block = Block(dims)
    block.router.zero_()
    x = block.tokens(1000)
    out = block.check(x)
    edges = (
        31,
        32,
        47,
        64,
        65,
        127,
        128,
        129,
        159,
        160,
        191,
        255,
        256,
        319,
        320,
        322,
        511,
        639,
        640,
        642,
        961,
    )
    for n in (*range(17, 338, 16), *edges):
        assert same_bits(block.check(x[:n]), out[:n])


@pytest.mark.parametrize("n", [17, 25, 40, 300])
def test_every_expert_has_every_token(n):
    """Of the last rows of one expert, those after them are the next one's, and after the last there are none."""
    block = Block((128, 12, 12, 72, 64))
    x = block.tokens(n)
    out = block.check(x)
    assert same_bits(block.run(x[n - 17 :]), out[n - 17 :])


@pytest.mark.parametrize("dims", [(128, 700, 3, 64, 64), (136, 257, 5, 64, 0)], ids=str)
def test_experts_of_one_token(dims):
    """Half of the blocks have nothing to store."""
    block = Block(dims)
    x = block.tokens(200)
    out = block.check(x)
    for first, n in ((0, 17), (60, 40), (183, 17)):
        assert same_bits(block.run(x[first : first + n]), out[first : first + n])


@pytest.mark.parametrize(
    "dims",
    [(512, 24, 2, 192, 128), (328, 300, 4, 72, 104), (1032, 40, 3, 64, 0), (128, 8, 2, 320, 72)],
    ids=str,
)
def test_experts_of_uneven_shares(dims):
    block = Block(dims)
    block.router *= torch.linspace(0.2, 3, dims[1], device="cuda")[:, None]
    x = block.tokens(1200)
    out = block.check(x)
    for first, n in ((0, 17), (300, 128), (640, 129), (500, 400)):
        assert same_bits(block.run(x[first : first + n]), out[first : first + n])


def test_several_blocks_of_columns(small_family):
    x = small_family.tokens(10000)
    out = small_family.check(x)
    assert same_bits(small_family.run(x[9000:9100]), out[9000:9100])
    assert same_bits(small_family.run(x), out)


def test_many_tokens_of_the_large_family(large_family):
    x = large_family.tokens(2000)
    out = large_family.check(x)
    assert same_bits(large_family.run(x[1000:1050]), out[1000:1050])
