"""The sparse block of any number of tokens with experts in 4 and 8 bits, against plain f64 of the numbers that the
codes stand for."""

from itertools import product

import packed
import pytest
import torch
from launch import MoeDims, call, error, poisoned, same_bits
from test_moe import EPS, LARGE_FAMILY, SMALL_FAMILY, TOLERANCE, norm_inputs
from test_moe_packed import (
    BF16,
    FORMATS,
    FP8,
    GGUF,
    GGUF_MIXED,
    INT4,
    NVFP4,
    ODD,
    Q4_K,
    UNITS,
    Block,
)

pytestmark = pytest.mark.gpu
MIXED = [
    (INT4, INT4, BF16, BF16),
    (INT4, FP8, FP8, INT4),
    (FP8, ("int4_bf16", 32, True), ("fp8_row", 0, False), BF16),
    (("int4_f16", 64, True), ("int4_bf16", 1 << 30, False), ("int4_f16", 32, False), INT4),
    (BF16, INT4, FP8, FP8),
    (FP8, BF16, BF16, ("int4_f16", 32, True)),
    (NVFP4, NVFP4, BF16, INT4),
    (INT4, NVFP4, NVFP4, FP8),
]


# From experts of GGUF whose weights are not rounded to bf16. Rounded, they are up to 5.3e-3 away; cut off, 8.6e-3 or more.
FROM_EXACT = 7e-3


class Many(Block):
    def __init__(self, dims, formats, **options):
        super().__init__(dims, formats, **options)
        self.round_gguf(True)

    def round_gguf(self, rounded):
        """Says whether references have its weights rounded to bf16; gives whether there are any."""
        matrices = (self.gate_up, self.down, self.shared_gate_up, self.shared_down)
        matrices = [matrix for matrix in matrices if matrix is not None and matrix.kind in packed.GGUF]
        for matrix in matrices:
            matrix.rounded = rounded
        return bool(matrices)

    def tokens(self, n, *, seed=1):
        generator = torch.Generator("cuda").manual_seed(seed)
        x = torch.empty(n, self.dims[0], dtype=torch.bfloat16, device="cuda")
        return x.normal_(generator=generator)

    def run(self, x, *, max_tokens=None):
        n, hidden = x.shape
        space, out = self.workspace(max_tokens or n), poisoned(n + 1, hidden)
        call("q35_packed_moe", n, self.struct(), self.weights(), x, space, out)
        assert (space[-4096:] == 0xA5).all(), "wrote past the workspace"
        assert out[-1].isnan().all()
        return out[:-1]

    def check(self, x, **options):
        out = self.run(x, **options)
        want, sure = self.reference(x)
        assert sure.sum() >= len(x) - 2 - len(x) // 50
        assert error(out[sure], want[sure]) < TOLERANCE
        assert ((out.double() - want).abs() <= 1.01 * self.apart)[sure].all(), "one element is off"
        if self.round_gguf(False):
            exact, _ = self.reference(x)
            self.round_gguf(True)
            assert error(out[sure], exact[sure]) < FROM_EXACT
        return out

    def check_norm(self, x, out):
        """The norm after it gives the bits of the two; `out`: what the block alone gives."""
        n, hidden = x.shape
        _, residual, w = norm_inputs(n, hidden)
        together, apart, space = residual.clone(), residual.clone(), self.workspace(n)
        normed, want = x.clone(), poisoned(n, hidden)
        dims = self.struct()
        # The output takes the place of x.
        call("q35_packed_moe_then_norm", n, dims, self.weights(), normed, space, together, w, EPS, normed)
        call("q35_rmsnorm_residual", n, hidden, out, apart, w, EPS, want)
        assert (space[-4096:] == 0xA5).all(), "wrote past the workspace"
        assert same_bits(together, apart) and same_bits(normed, want)


@pytest.fixture(scope="module")
def small_family():
    return Many(SMALL_FAMILY, [INT4] * 4)


@pytest.mark.parametrize("n", [1, 2, 16, 17, 100, 1000])
def test_small_family(small_family, n):
    x = small_family.tokens(n)
    out = small_family.check(x)
    if n > 16:
        small_family.check_norm(x, out)


@pytest.mark.parametrize(
    ("dims", "formats"),
    [
        *((SMALL_FAMILY, [form] * 4) for form in (FP8, NVFP4, *GGUF)),
        *((LARGE_FAMILY, [form] * 4) for form in (INT4, FP8)),
        (LARGE_FAMILY, [INT4, INT4, BF16, BF16]),
        (LARGE_FAMILY, [NVFP4, NVFP4, BF16, BF16]),
        ((4096, 512, 10, 1024, 1024), [("int4_bf16", 32, True)] * 4),
        (LARGE_FAMILY, GGUF_MIXED[0]),
    ],
    ids=str,
)
def test_families(dims, formats):
    block = Many(dims, formats)
    for n in (17, 100):
        x = block.tokens(n)
        block.check_norm(x, block.check(x))


@pytest.mark.parametrize(("dims", "form"), [*product(ODD, FORMATS), *product(UNITS, GGUF)], ids=str)
def test_odd_sizes(dims, form):
    block = Many(dims, [form] * 4)
    for n in (1, 17, 300):
        x = block.tokens(n)
        out = block.check(x, max_tokens=300 if n % 2 else None)
        if n > 16:
            block.check_norm(x, out)


@pytest.mark.parametrize("formats", [*GGUF_MIXED, (Q4_K, FP8, NVFP4, BF16)], ids=str)
@pytest.mark.parametrize("dims", [(640, 7, 3, 384, 128), (128, 5, 2, 128, 384)], ids=str)
def test_mixed_kinds_of_gguf(dims, formats):
    block = Many(dims, formats)
    for n in (1, 17, 100, 1000):
        x = block.tokens(n)
        out = block.check(x)
        if n > 16:
            block.check_norm(x, out)


@pytest.mark.parametrize("formats", MIXED, ids=str)
@pytest.mark.parametrize("dims", [(576, 7, 3, 320, 64), (192, 5, 2, 64, 320)], ids=str)
def test_mixed_kinds(dims, formats):
    block = Many(dims, formats)
    for n in (1, 16, 17, 100, 1000):
        x = block.tokens(n)
        out = block.check(x)
        if n > 16:
            block.check_norm(x, out)


@pytest.mark.parametrize("form", GGUF, ids=str)
def test_a_token_of_gguf_does_not_see_the_batch(form):
    block = Many((640, 64, 8, 128, 384), [form] * 4)
    x = block.tokens(1500)
    out = block.run(x)
    for first, n in ((0, 17), (100, 40), (260, 64), (700, 300)):
        assert same_bits(block.run(x[first : first + n]), out[first : first + n])


@pytest.mark.parametrize("formats", [[INT4] * 4, [FP8] * 4, [NVFP4] * 4, [INT4, INT4, BF16, BF16]], ids=str)
@pytest.mark.parametrize(("width", "shared"), [(64, 0), (64, 64), (128, 128), (128, 256)])
def test_one_expert_takes_every_token(width, shared, formats):
    """So that it has several tiles, also of few tokens, which are for what experts have in the mean."""
    block = Many((128, 16, 1, width, shared), formats)
    block.router.zero_()  # all tied: the lowest index
    for n in (1, 16, 17, 200, 1000):
        block.check(block.tokens(n))


@pytest.mark.parametrize("formats", [[INT4] * 4, [BF16, INT4, BF16, INT4]], ids=str)
def test_as_many_tiles_as_there_can_be(formats):
    """Lists of tiles of few tokens, taken by the kernels of every card: of a width that Hopper's do not take, and of bf16."""
    block = Many((128, 2, 1, 64 if formats[0] == INT4 else 128, 0), formats)
    for n, first in ((48, 33), (47, 14), (40, 7)):
        x = block.tokens(n)
        # The first expert takes so many, the other one the rest: by a column in which tokens differ.
        block.router.zero_()
        x[:, 0] = torch.where(torch.arange(n, device="cuda") < first, 4.0, -4.0).to(torch.bfloat16)
        block.router[0, 0], block.router[1, 0] = 1.0, -1.0
        block.check(x)


@pytest.mark.parametrize("n", [1, 17, 65])
def test_every_expert_has_every_token(n):
    block = Many((64, 32, 32, 64, 64), [INT4] * 4)
    block.check(block.tokens(n))


@pytest.mark.parametrize("kind", ["fp8_block", "fp8_row"])
def test_the_smallest_numbers_of_8_bits(kind):
    """Half of them below the normal ones."""
    block = Many((320, 8, 2, 128, 64), [(kind, 0, False)] * 4)
    for matrix in (block.gate_up, block.down, block.shared_gate_up, block.shared_down):
        matrix.keep_small()
    block.check(block.tokens(40))


def test_outputs_by_blocks_of_columns(small_family):
    """So many tokens that their outputs by expert are not kept whole."""
    x = small_family.tokens(12000)
    out = small_family.run(x)
    assert same_bits(small_family.run(x[2000:2100].contiguous()), out[2000:2100])
    small_family.check_norm(x, out)


@pytest.mark.parametrize("formats", [[INT4] * 4, [FP8, FP8, BF16, BF16], MIXED[3], [NVFP4] * 4], ids=str)
@pytest.mark.parametrize("dims", [(256, 8, 2, 128, 192), (1088, 64, 8, 64, 576)], ids=str)
def test_a_token_does_not_see_the_batch(dims, formats):
    """Tiles of few and of many tokens, and all places in them."""
    block = Many(dims, formats)
    x = block.tokens(1500)
    for n in (2, 5, 16):
        out = block.run(x[:n])
        for t in range(n):
            assert same_bits(block.run(x[t : t + 1]), out[t : t + 1])
    out = block.run(x)
    for first, n in ((0, 17), (100, 40), (260, 64), (700, 300)):
        assert same_bits(block.run(x[first : first + n]), out[first : first + n])


@pytest.mark.parametrize("n", [1, 17, 300])
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


@pytest.mark.parametrize("n", [5, 17, 100, 1000])
def test_in_a_graph(small_family, n):
    x = small_family.tokens(n)
    want = small_family.run(x)
    space, out = small_family.workspace(n), torch.full_like(x, float("nan"))
    dims, weights = MoeDims(*small_family.dims), small_family.weights()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(2):  # the second starts under the first
            call("q35_packed_moe", n, dims, weights, x, space, out)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert same_bits(out, want)


def test_nothing_and_what_is_refused():
    dims = (64, 4, 2, 64, 64)
    block = Many(dims, [INT4] * 4)
    call("q35_packed_moe", 0, MoeDims(*dims), block.weights(), None, None, None)
    call("q35_packed_moe_then_norm", 0, MoeDims(*dims), block.weights(), None, None, None, None, EPS, None)
    x, space = block.tokens(17), block.workspace(17)
    _, residual, w = norm_inputs(16, 64)
    with pytest.raises(AssertionError, match="CUDA error 1"):
        call(
            "q35_packed_moe_then_norm",
            16,
            MoeDims(*dims),
            block.weights(),
            x,
            space,
            residual,
            w,
            EPS,
            poisoned(16, 64),
        )
    block.gate_up.group = 48
    with pytest.raises(AssertionError, match="CUDA error 1"):
        block.run(x)
