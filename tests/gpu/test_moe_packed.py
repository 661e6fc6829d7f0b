"""The sparse block with experts in 4 and 8 bits against plain f64 of the numbers that the codes stand for."""

import copy

import pytest
import torch
from launch import MoeDims, PackedMatrix, PackedMoe, call, error, poisoned, same_bits
from packed import Packed
from test_moe import EPS, LARGE_FAMILY, SMALL_FAMILY, TOLERANCE, norm_inputs

pytestmark = pytest.mark.gpu

# hidden, experts, top_k, width, shared_width
FAMILIES = {"35B": SMALL_FAMILY, "122B": LARGE_FAMILY, "397B": (4096, 512, 10, 1024, 1024)}
ODD = [
    (64, 5, 2, 64, 64),
    (192, 12, 12, 64, 0),
    (320, 16, 1, 192, 128),
    (576, 7, 3, 320, 64),
    (1088, 256, 8, 64, 576),
    (64, 40, 32, 64, 64),
]
# kind, group, zero points
INT4 = ("int4_f16", 128, False)
FP8 = ("fp8_block", 128, False)
BF16 = ("bf16", 0, False)
NVFP4 = ("fp4", 0, False)
# Of GGUF: in whole units of 128 columns.
Q4_K, Q5_K, Q6_K, Q8_0 = GGUF = [(kind, 0, False) for kind in ("q4_k", "q5_k", "q6_k", "q8_0")]
UNITS = [
    (128, 5, 2, 128, 128),
    (256, 12, 12, 128, 0),
    (384, 16, 1, 256, 128),
    (640, 7, 3, 384, 256),
    (1152, 256, 8, 128, 640),
    (128, 40, 32, 128, 128),
]
# Those of a Q4_K_M file; others beside int4 and bf16.
GGUF_MIXED = [
    (Q4_K, Q6_K, Q4_K, Q6_K),
    (Q4_K, Q4_K, Q8_0, Q8_0),
    (Q5_K, Q6_K, BF16, BF16),
    (Q8_0, INT4, Q5_K, ("int4_f16", 32, False)),
    (BF16, Q4_K, Q6_K, BF16),
]
FORMATS = [
    *(("int4_f16", group, zeros) for group in (32, 64, 128, 1 << 30) for zeros in (False, True)),
    ("int4_bf16", 32, True),
    ("int4_bf16", 128, False),
    FP8,
    ("fp8_row", 0, False),
    NVFP4,
]


class Block:
    """Weights of a sparse block, drawn so that outputs are about 1. `formats`: of gate_up and down, of all experts
    and of the shared one."""

    def __init__(self, dims, formats, *, seed=0):
        hidden, experts, _, width, shared = dims
        generator = torch.Generator("cuda").manual_seed(seed)

        def plain(*shape, scale):
            return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(torch.bfloat16)

        def packed(rows, k, form, scale):
            return Packed(rows, k, *form, scale=scale * k**-0.5, generator=generator)

        self.dims, self.here = dims, range(experts)
        self.router = plain(experts, hidden, scale=2 * hidden**-0.5)
        self.gate_up = packed(experts * 2 * width, hidden, formats[0], 1)
        self.down = packed(experts * hidden, width, formats[1], 4)
        self.shared_gate_up = packed(2 * shared, hidden, formats[2], 1) if shared else None
        self.shared_down = packed(hidden, shared, formats[3], 4) if shared else None
        self.shared_gate = plain(1, hidden, scale=hidden**-0.5) if shared else None

    def part(self, here):
        """What a rank has that holds some of the experts."""
        hidden, _, _, width, _ = self.dims
        part = copy.copy(self)
        part.here = here
        part.gate_up = self.gate_up.part(2 * width * here.start, 2 * width * here.stop)
        part.down = self.down.part(hidden * here.start, hidden * here.stop)
        return part

    def without_shared(self):
        other = copy.copy(self)
        other.dims = (*self.dims[:4], 0)
        other.shared_gate_up = other.shared_down = other.shared_gate = None
        return other

    def struct(self):
        return MoeDims(*self.dims, self.here.start, len(self.here))

    def weights(self):
        packed = (self.gate_up, self.down, self.shared_gate_up, self.shared_down)
        pointers = (None if t is None else t.data_ptr() for t in (self.router, self.shared_gate))
        return PackedMoe(*(PackedMatrix() if p is None else p.struct() for p in packed), *pointers)

    def workspace(self, n):
        """NaN whichever way it is read, and a guard behind it."""
        size = call("q35_moe_workspace", n, self.struct())
        space = torch.full((size + 4096,), 0xFF, dtype=torch.uint8, device="cuda")
        space[size:] = 0xA5
        return space

    def run(self, delta, residual, w):
        """The residual after it, x and the output."""
        n, hidden = residual.shape
        residual, space = residual.clone(), self.workspace(n)
        x, out = poisoned(n + 1, hidden), poisoned(n + 1, hidden)
        dims, weights = self.struct(), self.weights()
        call("q35_packed_norm_moe", n, dims, weights, delta, residual, w, EPS, x, space, out)
        assert (space[-4096:] == 0xA5).all(), "wrote past the workspace"
        assert x[-1].isnan().all() and out[-1].isnan().all()
        return residual, x[:-1], out[:-1]

    def taken(self, x, matrix):
        """f64, what products with a matrix take for x."""
        return x

    def reference(self, x):
        """The block in f64, rounded between gate_up and down as the contract says, and the tokens whose experts f32
        logits decide as well. `apart`: how far from it an output may be that rounds each expert's term to bf16, their
        sum, and the activations between, which may lie so near to a tie that f32 rounds them the other way."""
        hidden, experts, top_k, width, shared = self.dims
        x = x.double()
        logits, order = torch.sort(x @ self.router.double().T, dim=1, descending=True, stable=True)
        sure = torch.ones(len(x), dtype=torch.bool, device="cuda")
        if top_k < experts:
            gap = logits[:, top_k - 1] - logits[:, top_k]
            sure = (gap == 0) | (gap > 1e-4)
        chosen, weights = order[:, :top_k], torch.softmax(logits[:, :top_k], dim=1)

        def swiglu(x, matrices, rows, width):
            gate_up, down = (matrix.plain(*own) for matrix, own in zip(matrices, rows, strict=True))
            both = self.taken(x, matrices[0]) @ gate_up.T
            inner = torch.nn.functional.silu(both[:, :width]) * both[:, width:]
            least, most = ((inner * (1 + by)).to(torch.bfloat16).double() for by in (-1e-5, 1e-5))
            term = self.taken(inner.to(torch.bfloat16).double(), matrices[1]) @ down.T
            either = (most - least).abs() + 1e-6 * inner.abs()
            return term, 2**-8 * term.abs() + either @ down.abs().T

        def add(token, weight, term, apart):
            out.index_add_(0, token, weight * term)
            self.apart.index_add_(0, token, weight * apart)

        out, self.apart = torch.zeros_like(x), torch.zeros_like(x)
        for e in chosen.unique().tolist():
            if e not in self.here:
                continue
            token, place = (chosen == e).nonzero(as_tuple=True)
            at = e - self.here.start
            rows = ((2 * width * at, 2 * width * (at + 1)), (hidden * at, hidden * (at + 1)))
            matrices = (self.gate_up, self.down)
            add(token, weights[token, place, None], *swiglu(x[token], matrices, rows, width))
        if shared:
            gate = torch.sigmoid(x @ self.shared_gate.double().T)
            matrices, rows = (self.shared_gate_up, self.shared_down), ((0, 2 * shared), (0, hidden))
            add(torch.arange(len(x), device="cuda"), gate, *swiglu(x, matrices, rows, shared))
        self.apart += 2**-8 * out.abs() + 1e-6
        return out, sure

    def check(self, n, *, with_delta=True):
        delta, residual, w = norm_inputs(n, self.dims[0], with_delta=with_delta)
        after, x, out = self.run(delta, residual, w)
        normed = poisoned(n, self.dims[0])
        call("q35_rmsnorm_residual", n, self.dims[0], delta, residual, w, EPS, normed)
        assert same_bits(after, residual) and same_bits(x, normed)
        want, sure = self.reference(x)
        assert sure.sum() >= n - 2
        if sure.any():
            assert error(out[sure], want[sure]) < TOLERANCE
        rows = (out.double() - want).norm(dim=1) / want.norm(dim=1).clamp(min=1e-3)
        assert (rows[sure] < TOLERANCE).all(), "one token is off"


@pytest.mark.parametrize("form", [INT4, ("int4_bf16", 32, True), FP8, NVFP4, *GGUF], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, form):
    block = Block(FAMILIES[name], [form] * 4)
    for n in (1, 2, 7, 16):
        block.check(n, with_delta=n != 7)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dims", ODD, ids=str)
def test_odd_sizes(dims, form):
    block = Block(dims, [form] * 4)
    for n in (1, 2, 7, 8, 9, 15, 16):
        block.check(n, with_delta=n != 8)


@pytest.mark.parametrize("form", GGUF, ids=str)
@pytest.mark.parametrize("dims", UNITS, ids=str)
def test_units_of_gguf(dims, form):
    block = Block(dims, [form] * 4)
    for n in (1, 2, 7, 8, 9, 15, 16):
        block.check(n, with_delta=n != 8)


@pytest.mark.parametrize("formats", GGUF_MIXED, ids=str)
@pytest.mark.parametrize("dims", [SMALL_FAMILY, (640, 7, 3, 384, 256)], ids=str)
def test_mixed_kinds_of_gguf(dims, formats):
    block = Block(dims, formats)
    for n in (1, 2, 7, 16):
        block.check(n)


@pytest.mark.parametrize(
    "formats",
    [
        (INT4, INT4, BF16, BF16),
        (INT4, FP8, FP8, INT4),
        (FP8, ("int4_bf16", 32, True), ("fp8_row", 0, False), BF16),
        (("int4_f16", 64, True), ("int4_bf16", 1 << 30, False), ("int4_f16", 32, False), INT4),
        (BF16, INT4, FP8, FP8),
        (FP8, BF16, BF16, ("int4_f16", 32, True)),
        (NVFP4, NVFP4, BF16, BF16),
        (NVFP4, INT4, FP8, NVFP4),
        (FP8, NVFP4, NVFP4, INT4),
    ],
    ids=str,
)
@pytest.mark.parametrize("dims", [SMALL_FAMILY, (576, 7, 3, 320, 64)], ids=str)
def test_mixed_kinds(dims, formats):
    block = Block(dims, formats)
    for n in (1, 2, 7, 16):
        block.check(n)


@pytest.mark.parametrize("kind", ["fp8_block", "fp8_row"])
def test_the_smallest_numbers_of_8_bits(kind):
    """Half of them below the normal ones."""
    block = Block((320, 8, 2, 128, 64), [(kind, 0, False)] * 4)
    for matrix in (block.gate_up, block.down, block.shared_gate_up, block.shared_down):
        matrix.keep_small()
    for n in (1, 16):
        block.check(n)


@pytest.mark.parametrize("form", [INT4, FP8, NVFP4, *GGUF], ids=str)
def test_one_expert_takes_all_tokens(form):
    block = Block((2048, 64, 1, 512, 512), [form] * 4)
    block.router.zero_()
    for n in (1, 2, 7, 8, 9, 15, 16):
        block.check(n)


@pytest.mark.parametrize(
    "formats",
    [
        [INT4] * 4,
        [FP8] * 4,
        [("int4_bf16", 32, True)] * 2 + [BF16] * 2,
        [NVFP4] * 4,
        [NVFP4] * 2 + [BF16] * 2,
        # One token takes kernels of its own for these; for the last, in `down` alone.
        [("int4_f16", 128, True)] * 4,
        [("int4_bf16", 64, False)] * 4,
        [("fp8_row", 0, False)] * 4,
        [INT4, INT4, ("int4_f16", 32, False), INT4],
    ],
    ids=str,
)
@pytest.mark.parametrize("dims", [SMALL_FAMILY, (576, 12, 3, 320, 64)], ids=str)
def test_a_token_does_not_see_the_batch(dims, formats):
    alone_and_among_others(dims, formats)


@pytest.mark.parametrize("form", [INT4, FP8], ids=str)
@pytest.mark.parametrize(
    "dims",
    [
        (3072, 16, 8, 1024, 1024),
        (4096, 16, 10, 1024, 1024),
        (1152, 16, 4, 256, 768),
        (1024, 16, 4, 256, 768),
        (512, 12, 3, 512, 0),
    ],
    ids=str,
)
def test_a_token_of_a_large_block_does_not_see_the_batch(dims, form):
    """Of which one token's kernels have two tiles, or one, under way, or leave `down` or both to those of several. And
    some of which the shared expert is wider than the others, or none."""
    alone_and_among_others(dims, [form] * 4)


@pytest.mark.parametrize("formats", [*([form] * 4 for form in GGUF), GGUF_MIXED[0]], ids=str)
@pytest.mark.parametrize("dims", [SMALL_FAMILY, (640, 12, 3, 384, 128)], ids=str)
def test_a_token_of_gguf_does_not_see_the_batch(dims, formats):
    alone_and_among_others(dims, formats)


def alone_and_among_others(dims, formats):
    block = Block(dims, formats)
    delta, residual, w = norm_inputs(16, dims[0])
    alone = [block.run(delta[t : t + 1], residual[t : t + 1], w) for t in range(16)]
    for n in (2, 5, 8, 9, 16):
        found = block.run(delta[:n], residual[:n], w)
        for piece, rows in zip(found, zip(*alone, strict=True), strict=True):
            assert same_bits(piece, torch.cat(rows[:n]))


@pytest.mark.parametrize("formats", [[INT4] * 4, [("fp8_row", 0, False)] * 4], ids=str)
@pytest.mark.parametrize(
    "dims", [(256, 256, 8, 128, 128), (256, 300, 6, 128, 0), (192, 9, 9, 64, 64)], ids=str
)
def test_a_single_token_is_routed_as_among_others(dims, formats):
    """Among ties, NaN and infinite logits: one token finds its experts in another way than several."""

    def all_equal(router):
        router[:] = router[0]

    def in_pairs(router):
        router[1::2] = router[: len(router) - 1 : 2]

    def with_nan(router):
        router[::3] = float("nan")

    def with_infinities(router):
        router[::4] *= float("inf")

    def only_nan(router):
        router[:] = float("nan")

    for change in (all_equal, in_pairs, with_nan, with_infinities, only_nan):
        block = Block(dims, formats)
        change(block.router)
        delta, residual, w = norm_inputs(8, dims[0])
        among = block.run(delta, residual, w)
        for t in range(8):
            alone = block.run(delta[t : t + 1], residual[t : t + 1], w)
            for one, all_rows in zip(alone, among, strict=True):
                assert same_bits(one, all_rows[t : t + 1]), change.__name__


@pytest.mark.parametrize("n", [1, 4, 16])
@pytest.mark.parametrize("form", [INT4, FP8, NVFP4, Q4_K, Q6_K], ids=str)
def test_layer_after_layer(form, n):
    """Kernels of neighbouring layers overlap, and share a workspace: many in a graph, against one at a time."""
    blocks = [Block(SMALL_FAMILY, [form] * 4, seed=seed) for seed in (0, 5)]
    dims, hidden, layers = MoeDims(*SMALL_FAMILY), SMALL_FAMILY[0], 24
    first, start, w = norm_inputs(n, hidden)
    space = blocks[0].workspace(n)
    residual, x = start.clone(), torch.empty_like(first)
    deltas = [first, *(torch.empty_like(first) for _ in range(2))]

    def step(layer):
        delta = deltas[0] if layer == 0 else deltas[1 + (layer - 1) % 2]
        weights, out = blocks[layer % 2].weights(), deltas[1 + layer % 2]
        call("q35_packed_norm_moe", n, dims, weights, delta, residual, w, EPS, x, space, out)

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


def test_nothing_and_what_is_refused():
    dims = (64, 4, 2, 64, 64)
    block = Block(dims, [INT4] * 4)
    call("q35_packed_norm_moe", 0, MoeDims(*dims), block.weights(), None, None, None, EPS, None, None, None)
    delta, residual, w = norm_inputs(17, 64)
    with pytest.raises(AssertionError, match="CUDA error 1"):
        block.run(delta, residual, w)
    block.gate_up.group = 48
    with pytest.raises(AssertionError, match="CUDA error 1"):
        block.run(delta[:1], residual[:1], w)
    # Columns that are no whole units, and floats of few bits beside GGUF's.
    for dims, formats in (
        ((192, 4, 2, 128, 128), [Q4_K] * 4),
        ((128, 4, 2, 128, 128), [Q4_K, FP8, Q4_K, NVFP4]),
    ):
        delta, residual, w = norm_inputs(1, dims[0])
        with pytest.raises(AssertionError, match="CUDA error 1"):
            Block(dims, formats).run(delta, residual, w)
