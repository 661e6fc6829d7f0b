"""From how many tokens on it is faster to round them to e4m3: products exactly and rounded, on one Hopper GPU.

    python benches/fp8_tokens.py

A line for each matrix and for the experts of a layer: microseconds exactly and rounded, and their ratio, by tokens.
"""

from __future__ import annotations

import torch
from kernel_table import BF16, F32, Clock, random, weights
from kernels_packed import MoeDims, PackedMoe, call, packed
from origin import origin

TOKENS = (24, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
FORMS = (("int4", 1), ("fp8", 3))
LINEARS = ((20608, 3072), (3072, 8192), (12352, 2048), (2048, 4096))
MODELS = (("35B", 2048, 512), ("122B", 3072, 1024))


def memory(num_bytes):
    return torch.empty(num_bytes, device="cuda", dtype=torch.uint8)


def show(name, clock, pairs):
    shown = []
    for n, exact, rounded in pairs:
        a, b = (1e6 * clock.seconds(work, 15) for work in (exact, rounded))
        shown.append(f"{n}: {a:.0f} {b:.0f} ({a / b:.2f})")
    print(f"{name:<28}", ", ".join(shown), flush=True)


def linear(kind, rows, k):
    struct, _, kept = packed(kind, rows, k)
    for n in TOKENS:
        x, out = random(n, k), torch.empty(n, rows, device="cuda", dtype=BF16)
        space = memory(call("q35_fp8_token_bytes", n, k))
        yield (
            n,
            lambda x=x, out=out, n=n: call("q35_packed_linear", n, struct, x, out, 0, rows),
            lambda x=x, out=out, n=n, space=space: call(
                "q35_fp8_token_linear", n, struct, x, space, out, 0, rows
            ),
        )
    del kept


def experts(kind, hidden, width):
    dims = MoeDims(hidden, 256, 8, width, width)
    sizes = ((256 * 2 * width, hidden), (256 * hidden, width), (2 * width, hidden), (hidden, width))
    parts = [packed(kind, rows, k, scale=1e-3) for rows, k in sizes]
    router, gate = weights(256, hidden), weights(1, hidden)
    struct = PackedMoe(*(part[0] for part in parts), router.data_ptr(), gate.data_ptr())
    for n in TOKENS:
        x, out = random(n, hidden), torch.empty(n, hidden, device="cuda", dtype=BF16)
        norm = (random(n, hidden, dtype=F32), random(hidden, dtype=F32), 1e-6, out)
        space = memory(call("q35_moe_workspace", n, dims))
        rounded = memory(call("q35_fp8_token_moe_bytes", n, dims))
        yield (
            n,
            lambda n=n, x=x, space=space, norm=norm: call(
                "q35_packed_moe_then_norm", n, dims, struct, x, space, *norm
            ),
            lambda n=n, x=x, space=space, rounded=rounded, norm=norm: call(
                "q35_fp8_token_moe", n, dims, struct, x, space, rounded, *norm
            ),
        )


def main():
    clock = Clock()
    print("\n".join(f"{key}: {value}" for key, value in origin().items()))
    print("us exactly, us rounded (ratio), by tokens\n")
    for form, kind in FORMS:
        for rows, k in LINEARS:
            show(f"linear {form} {k} -> {rows}", clock, linear(kind, rows, k))
    for name, hidden, width in MODELS:
        for form, kind in FORMS:
            show(f"experts {form} {name}", clock, experts(kind, hidden, width))


if __name__ == "__main__":
    main()
