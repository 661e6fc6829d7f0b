"""The emulator's instructions against what they mean, worked out here: `python tests/emulator` runs these first."""

import ctypes
import os
import struct
import subprocess
import sys
from fractions import Fraction
from itertools import count
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.emulator

# Each lane has a, b and c, and gives d and e; p and q are predicates, f and g floats.
KERNEL = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry {name}(.param .u64 given, .param .u64 taken)
{{
    .reg .pred %p, %q;
    .reg .f32 %f, %g;
    .reg .b32 %a, %b, %c, %d, %e, %lane, %t<8>;
    .reg .b64 %from, %to, %n;
    .shared .align 16 .b8 room[512];
    ld.param.u64 %from, [given];
    ld.param.u64 %to, [taken];
    mov.u32 %lane, %tid.x;
    mul.wide.u32 %n, %lane, 16;
    add.s64 %from, %from, %n;
    add.s64 %to, %to, %n;
    ld.global.u32 %a, [%from];
    ld.global.u32 %b, [%from+4];
    ld.global.u32 %c, [%from+8];
    mov.u32 %e, 0;
    {body}
    st.global.v2.u32 [%to], {{%d, %e}};
    ret;
}}
"""
LANES = 32
NUMBERS = count()


def run(tmp_path, body, a, b=0, c=0):
    """d and e of a warp; a, b and c are words, or one for all lanes."""
    driver = ctypes.CDLL("libcuda.so.1")
    name = f"kernel_{next(NUMBERS)}"
    path = tmp_path / f"{name}.ptx"
    path.write_text(KERNEL.format(name=name, body=body))
    driver.emulator_read_ptx(os.fsencode(path))
    words = np.zeros((LANES, 4), np.uint32)
    for i, given in enumerate((a, b, c)):
        words[:, i] = np.asarray(given).astype(np.int64) & 0xFFFFFFFF
    given, taken = ctypes.c_void_p(), ctypes.c_void_p()
    for p in (given, taken):
        assert driver.cuMemAlloc_v2(ctypes.byref(p), ctypes.c_size_t(words.nbytes)) == 0
    ctypes.memmove(given, words.ctypes.data, words.nbytes)
    driver.emulator_launch(name.encode(), given, taken)
    found = np.zeros_like(words)
    ctypes.memmove(found.ctypes.data, taken, words.nbytes)
    for p in (given, taken):
        driver.cuMemFree_v2(p)
    return found[:, 0], found[:, 1]


def words(seed):
    return np.random.default_rng(seed).integers(0, 1 << 32, LANES, dtype=np.uint32)


def floats(seed):
    """Of many sizes, some of them near each other."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(LANES) * 2.0 ** rng.integers(-12, 12, LANES)).astype(np.float32)


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


def test_all_kernels_can_be_read():
    assert ctypes.CDLL("libcuda.so.1").emulator_assemble_all() > 100


def test_bytes_are_picked(tmp_path):
    a, b = words(0), words(1)
    for choice in (0x3210, 0x7654, 0x5410, 0x8C0F, 0x0123, 0xFFFF):
        d, _ = run(tmp_path, "prmt.b32 %d, %a, %b, %c;", a, b, choice)
        for lane in range(LANES):
            eight, want = struct.pack("<II", a[lane], b[lane]), []
            for digit in f"{choice:04x}"[::-1]:
                byte = eight[int(digit, 16) % 8]
                want.append((255 if byte > 127 else 0) if int(digit, 16) > 7 else byte)
            assert struct.pack("<I", d[lane]) == bytes(want), hex(choice)


def test_functions_of_three_bits(tmp_path):
    a, b, c = words(2), words(3), words(4)
    wanted = {
        0x96: a ^ b ^ c,
        0xE8: (a & b) | (a & c) | (b & c),
        0xCA: (a & b) | (~a & c),
        0xF8: a | (b & c),
        0xEA: (a & b) | c,
        0x40: a & b & ~c,
    }
    for table, want in wanted.items():
        d, _ = run(tmp_path, f"lop3.b32 %d, %a, %b, %c, {table};", a, b, c)
        assert np.array_equal(d, want), hex(table)


def test_bits_are_put_in(tmp_path):
    a, b = words(5), words(6)
    for start, length in ((0, 8), (8, 16), (28, 8), (5, 0), (0, 32), (31, 1), (32, 4)):
        d, _ = run(tmp_path, f"bfi.b32 %d, %a, %b, {start}, {length};", a, b)
        for lane in range(LANES):
            old, new = (f"{int(x):032b}"[::-1] for x in (b[lane], a[lane]))
            end = min(start + length, 32)
            want = old[:start] + new[: max(end - start, 0)] + old[max(end, start) :]
            assert f"{d[lane]:032b}"[::-1] == want[:32], (start, length)


@pytest.mark.parametrize("width", [32, 16, 8])
def test_shuffles(tmp_path, width):
    """As CUDA's __shfl_*_sync: lanes whose source is outside of their segment keep what they have."""
    a, lanes = words(7), np.arange(LANES)
    for by in (0, 1, 3, 8):
        sources = {
            "up": lanes - by,
            "down": lanes + by,
            "bfly": lanes ^ by,
            "idx": lanes // width * width + by % width,
        }
        for kind, source in sources.items():
            bounds = (32 - width) << 8 | (0 if kind == "up" else 31)
            body = f"shfl.sync.{kind}.b32 %d|%p, %a, {by}, {bounds}, -1; selp.b32 %e, 1, 0, %p;"
            d, there = run(tmp_path, body, a)
            inside = (source >= 0) & (source < LANES) & (source // width == lanes // width)
            if kind == "bfly":  # lanes of an earlier segment may be read
                inside = source // width <= lanes // width
            assert np.array_equal(there, inside), (kind, by)
            assert np.array_equal(d, a[np.where(inside, source, lanes)]), (kind, by)


def test_votes_and_reductions(tmp_path):
    a = words(8)
    odd, _ = run(tmp_path, "and.b32 %t0, %a, 1; setp.ne.s32 %p, %t0, 0; vote.sync.ballot.b32 %d, %p, -1;", a)
    assert set(odd) == {sum(1 << i for i in range(LANES) if a[i] % 2)}
    least, most = run(tmp_path, "redux.sync.min.s32 %d, %a, -1; redux.sync.max.u32 %e, %a, -1;", a)
    assert set(least.view(np.int32)) == {a.view(np.int32).min()}
    assert set(most) == {a.max()}


def test_rounding_to_half_precision(tmp_path):
    tie = bits(
        [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 65519, 65520, 2.0**-25, 3 * 2.0**-26]
    )
    a = np.concatenate([tie, bits(floats(9))[: LANES - len(tie)]])
    half, _ = run(tmp_path, "mov.b32 %f, %a; mov.b32 %g, %b; cvt.rn.f16x2.f32 %d, %f, %g;", a, bits(3.0))
    with np.errstate(over="ignore"):
        want = a.view(np.float32).astype(np.float16).view(np.uint16)
    assert np.array_equal(half >> 16, want)
    assert set(half & 0xFFFF) == {np.float16(3).view(np.uint16)}
    brain, _ = run(tmp_path, "mov.b32 %f, %a; mov.b32 %g, %b; cvt.rn.bf16x2.f32 %d, %g, %f;", a, bits(-2.0))
    for x, got in zip(a, brain & 0xFFFF, strict=True):
        near = [(int(x) >> 16) + i for i in (0, 1)]
        value = [
            abs(Fraction(float(np.uint32(n << 16).view(np.float32))) - Fraction(float(x.view(np.float32))))
            for n in near
        ]
        assert got == (
            near[0] if value[0] < value[1] or (value[0] == value[1] and near[0] % 2 == 0) else near[1]
        )
    assert set(brain >> 16) == {0xC000}


def test_rounding_down_and_to_zero(tmp_path):
    a, b, c = floats(10), floats(11), floats(12)
    c[:4], a[:4], b[:4] = (1, -1, 2.0**-60, 0), (2.0**-40, 2.0**-40, 1, 3), (2.0**-40, -(2.0**-40), 1, 5)
    load = "mov.b32 %f, %a; mov.b32 %g, %b; mov.b32 %t0, %c; .reg .f32 %h, %r; mov.b32 %h, %c;"
    d, e = run(
        tmp_path,
        load + "fma.rm.f32 %r, %f, %g, %h; mov.b32 %d, %r; add.rz.f32 %r, %f, %h; mov.b32 %e, %r;",
        bits(a),
        bits(b),
        bits(c),
    )
    for x, y, z, down, zero in zip(a, b, c, d.view(np.float32), e.view(np.float32), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        above = np.nextafter(down, np.float32(np.inf))
        assert Fraction(float(down)) <= exact < Fraction(float(above)), (x, y, z)
        exact = Fraction(float(x)) + Fraction(float(z))
        beyond = np.nextafter(zero, np.float32(np.copysign(np.inf, float(exact))))
        assert abs(Fraction(float(zero))) <= abs(exact) < abs(Fraction(float(beyond))) or exact == zero


def test_integers_from_floats(tmp_path):
    a = bits([2.5, 3.5, -2.5, -0.5, 3e9, -3e9, np.nan, np.inf] * 4)
    near, cut = run(tmp_path, "mov.b32 %f, %a; cvt.rni.s32.f32 %d, %f; cvt.rzi.s32.f32 %e, %f;", a)
    ends = [2**31 - 1, -(2**31), 0, 2**31 - 1]
    assert list(near.view(np.int32)[:8]) == [2, 4, -2, 0, *ends]
    assert list(cut.view(np.int32)[:8]) == [2, 3, -2, 0, *ends]


def test_asynchronous_copies_are_late(tmp_path):
    """A kernel that reads before it waits does not get what it copied."""
    body = """
    mov.u32 %t0, room;
    mad.lo.s32 %t0, %lane, 16, %t0;
    st.shared.u32 [%t0], 7;
    cp.async.cg.shared.global [%t0], [%from], 16;
    cp.async.commit_group;
    ld.shared.u32 %d, [%t0];
    cp.async.wait_group 0;
    ld.shared.u32 %e, [%t0];
    """
    d, e = run(tmp_path, body, words(13))
    assert set(d) == {7} and np.array_equal(e, words(13))


def test_lanes_part_and_meet(tmp_path):
    body = """
    mov.u32 %d, 0;
    mov.u32 %t0, 0;
    and.b32 %t2, %lane, 3;
    AGAIN:
    setp.ge.u32 %p, %t0, %t2;
    @%p bra DONE;
    add.u32 %d, %d, %a;
    add.u32 %t0, %t0, 1;
    bra AGAIN;
    DONE:
    bar.warp.sync -1;
    shfl.sync.bfly.b32 %e, %d, 1, 31, -1;
    """
    a = words(14)
    want = a * (np.arange(LANES) % 4).astype(np.uint32)
    d, e = run(tmp_path, body, a)
    assert np.array_equal(d, want) and np.array_equal(e, want[np.arange(LANES) ^ 1])


def test_tensor_cores(tmp_path):
    """Small whole numbers, so that every sum is exact; where each lane's lie is PTX's figure of m16n8k16 in bf16."""
    rng, group, pair = np.random.default_rng(15), np.arange(LANES) // 4, 2 * (np.arange(LANES) % 4)
    low, high = ((bits(rng.integers(-9, 10, LANES)) >> 16) for _ in range(2))
    one, other, half = high << 16 | low, low << 16 | high, 0x3F003F00  # the last: two of 0.5
    sums = rng.integers(-9, 10, LANES).astype(np.float32)
    body = """
    .reg .f32 %r<4>;
    mov.b32 %f, %c;
    neg.f32 %g, %f;
    mov.b32 %t0, 0x3F003F00;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {{%r0, %r1, %r2, %r3}}, {{%a, %b, %t0, %a}}, {{%b, %a}}, {{%f, %g, %f, %f}};
    mov.b32 %d, %r{};
    mov.b32 %e, %r{};
    """
    found = [
        x.view(np.float32)
        for i in (0, 2)
        for x in run(tmp_path, body.format(i, i + 1), one, other, bits(sums))
    ]
    a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for i, words in enumerate([one, other, half, one]):  # rows 0, 8, 0, 8 on; columns 0, 0, 8, 8 on
        for j in range(2):
            a[group + 8 * (i % 2), pair + 8 * (i // 2) + j] = bf16(words, j)
    for i, words in enumerate([other, one]):
        for j in range(2):
            b[pair + 8 * i + j, group] = bf16(words, j)
    places = [(group + 8 * (i // 2), pair + i % 2) for i in range(4)]
    for place, sign in zip(places, (1, -1, 1, 1), strict=True):
        c[place] = sign * sums
    want = a @ b + c
    for got, place in zip(found, places, strict=True):
        assert np.array_equal(got, want[place])


def bf16(words, i):
    """The i-th number of each word."""
    return (np.broadcast_to(words, LANES).astype(np.uint32) >> 16 * i << 16).view(np.float32)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("ld.global.u32 %d, [%from+512];", "lane 0: 4 bytes at"),
        ("mov.u32 %t0, room; ld.shared.u32 %d, [%t0+510];", "not aligned to 4"),
        ("setp.ne.u32 %p, %lane, 0; @%p bar.sync 0;", "a barrier for lanes"),
        ("sinh.b32 %d, %a;", "unknown instruction: sinh.b32 %d, %a"),
    ],
)
def test_what_may_not_be_ends_the_process(tmp_path, body, said):
    """With the instruction, and the line where it stands."""
    code = "import pathlib, sys, test_instructions as t; t.run(pathlib.Path(sys.argv[1]), sys.argv[2], 0)"
    command = [sys.executable, "-c", code, str(tmp_path), body]
    done = subprocess.run(command, check=False, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode < 0 and said in done.stderr, done.stderr
    line = KERNEL[: KERNEL.index("{body}")].count("\n") + 1
    last = body.split(";")[-2].rpartition("@%p")[2].strip()
    (where,) = [text for text in done.stderr.splitlines() if f".ptx:{line}: " in text]
    assert where.endswith(last), where
