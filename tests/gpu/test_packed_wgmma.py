"""What Hopper's products with packed weights have of their own: k in units of 128, tiles of 128 tokens, pairs of blocks.
The launchers are those of test_packed_many.py and test_moe_packed_many.py."""

import pytest
from launch import same_bits
from test_moe_packed import BF16, FORMATS, FP8, GGUF, INT4, NVFP4, Q4_K, Q6_K
from test_moe_packed_many import Many
from test_packed import FP4, FP8_BLOCK, FP8_ROW, INT4_BF16, INT4_F16, ROW, filled
from test_packed_many import check

pytestmark = pytest.mark.gpu
EDGES = (17, 32, 33, 64, 65, 96, 97, 127, 128, 129, 255, 256, 257)
FORMS = [
    *((INT4_F16, group, zeros) for group in (32, 64, 128, ROW) for zeros in (False, True)),
    (INT4_BF16, 128, True),
    (FP8_BLOCK, 128, False),
    (FP8_ROW, 128, False),
    (FP4, 16, False),
]
# hidden, experts, top_k, width, shared_width
DIMS = [(256, 8, 2, 128, 128), (384, 12, 3, 256, 128), (128, 5, 1, 128, 0)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("k", [128, 256, 640])
def test_edges_of_tiles(k, form):
    """The second block of a pair has a row tile, or part of one."""
    kind, group, zeros = form
    check(filled(kind, 272, k, group, zeros, seed=k), EDGES)


@pytest.mark.parametrize("rows", [16, 80, 128, 144, 208, 256, 528])
@pytest.mark.parametrize("kind", [INT4_F16, FP8_BLOCK, FP4])
def test_rows_that_fill_no_block(kind, rows):
    check(filled(kind, rows, 384, seed=rows), (17, 100, 129))


@pytest.mark.parametrize(("rows", "n"), [(33920, 300), (528, 1100), (4112, 3000)])
@pytest.mark.parametrize("kind", [INT4_F16, FP8_BLOCK, FP4])
def test_more_tiles_than_blocks(kind, rows, n):
    check(filled(kind, rows, 256, seed=rows), (17, n))


@pytest.mark.parametrize("form", [*FORMATS, *GGUF], ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_experts(dims, form):
    block = Many(dims, [form] * 4)
    x = block.tokens(1000)
    out = block.check(x)
    block.check_norm(x, out)
    for n in (17, 127, 300):
        assert same_bits(block.check(x[-n:].contiguous()), out[-n:])


@pytest.mark.parametrize("form", [INT4, FP8, NVFP4, *GGUF], ids=str)
@pytest.mark.parametrize("n", EDGES)
def test_one_expert_takes_every_token(n, form):
    block = Many((128, 16, 1, 128, 128), [form] * 4)
    block.router.zero_()
    block.check(block.tokens(n))


@pytest.mark.parametrize(
    "formats",
    [
        (INT4, FP8, BF16, BF16),
        (NVFP4, NVFP4, BF16, INT4),
        (NVFP4, BF16, NVFP4, FP8),
        (BF16, INT4, FP8, BF16),
        (Q4_K, BF16, Q6_K, FP8),
        (("int4_f16", 32, True), BF16, ("int4_bf16", 64, False), ("fp8_row", 0, False)),
    ],
    ids=str,
)
def test_experts_that_are_not_all_served(formats):
    block = Many((256, 8, 2, 128, 128), formats)
    for n in (17, 300):
        x = block.tokens(n)
        block.check_norm(x, block.check(x))


@pytest.mark.parametrize("form", [INT4, NVFP4], ids=str)
@pytest.mark.parametrize("dims", [(256, 8, 2, 128, 192), (192, 8, 2, 256, 128), (256, 8, 2, 192, 0)], ids=str)
def test_sizes_that_are_not_all_served(dims, form):
    """Matrices whose k is no multiple of 128 beside others."""
    block = Many(dims, [form] * 4)
    for n in (17, 300):
        x = block.tokens(n)
        block.check_norm(x, block.check(x))
