"""Rows of `kernels.py` for weights of 4 and 8 bits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from kernel_table import BF16, F32, Table, random, recorded, weights

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))
from launch import MoeDims, PackedMatrix, PackedMoe, call

NVFP4, Q4_K, Q6_K, Q8_0 = 5, 6, 8, 9
GGUF_BITS = {Q4_K: 4, Q6_K: 6, Q8_0: 8}


def packed(
    kind: int, rows: int, k: int, group: int = 128, scale: float = 0.01
) -> tuple[PackedMatrix, int, list[torch.Tensor]]:
    """A matrix of random codes: its struct, the bytes of codes and scales, and the tensors that hold them."""
    if kind in GGUF_BITS:
        codes = torch.empty(rows * k * GGUF_BITS[kind] // 8, device="cuda", dtype=torch.uint8).random_(0, 256)
        words = torch.full((rows * k // 16,), 32, device="cuda", dtype=torch.uint8)
        wholes = torch.full((0 if kind == Q8_0 else rows * k // 128, 2), scale / 32, device="cuda").half()
        if kind == Q8_0:
            words.view(torch.float16).fill_(scale)
        elif kind == Q6_K:
            wholes[:, 1] = 0
        scales = torch.cat([words, wholes.view(-1).view(torch.uint8)])
        struct = PackedMatrix(codes.data_ptr(), scales.data_ptr(), None, rows, k, 64, kind)
        return struct, codes.numel() + scales.numel(), [codes, scales]
    four = kind <= 2 or kind == NVFP4
    codes = torch.empty(rows * k // (2 if four else 1), device="cuda", dtype=torch.uint8).random_(0, 256)
    codes.bitwise_and_(255 if four else 0xF7)  # no NaN
    if kind == NVFP4:
        scales = torch.full((rows * k // 16 + rows // 4,), 72, device="cuda", dtype=torch.uint8)  # 1
        scales[rows * k // 16 :].view(F32).fill_(scale)
    else:
        entries = rows // 16 * (1 if kind == 4 else -(-k // group)) * (1 if kind == 3 else 16)
        scales = torch.full((entries,), scale, device="cuda", dtype=torch.float16 if kind == 1 else F32)
    struct = PackedMatrix(codes.data_ptr(), scales.data_ptr(), None, rows, k, group, kind)
    return struct, codes.numel() + scales.numel() * scales.element_size(), [codes, scales]


def packed_linears(table: Table) -> None:
    family = (
        *((20608, 3072), (3072, 8192), (17408, 3072), (2048, 3072), (3072, 1024), (248320, 3072)),
        *((12352, 2048), (2048, 4096), (9216, 2048), (248320, 2048)),
    )
    forms = (
        ("int4 g128", 1, 128),
        ("int4 g32", 1, 32),
        ("fp8 blocks", 3, 128),
        ("fp8 rows", 4, 128),
        ("nvfp4", NVFP4, 16),
        ("q4_k", Q4_K, 64),
        ("q6_k", Q6_K, 64),
        ("q8_0", Q8_0, 64),
    )
    for name, kind, group in forms:
        for rows, k in family:
            struct, num_bytes, kept = packed(kind, rows, k, group)
            for n in (1, 4, 16):
                x, out = random(n, k), torch.empty(n, rows, device="cuda", dtype=BF16)
                table.add(
                    f"packed linear {name} {n} x {k} -> {rows}",
                    lambda n=n, w=struct, x=x, o=out: call("q35_packed_linear", n, w, x, o, 0, w.rows),
                    num_bytes=num_bytes + 2 * (x.numel() + out.numel()),
                    flops=2 * n * rows * k,
                )
            del kept


def packed_rows_in_graphs(table: Table) -> None:
    """One row by one matrix after the other, past L2, from a graph: without what a launch and two events cost, which is
    5 us of `packed_linears`, and with weights on their way before the kernel ahead has ended, as in a step."""
    shapes = ((20608, 3072), (3072, 8192), (17408, 3072), (12352, 2048), (2048, 4096), (9216, 2048))
    for name, kind, group in (("int4 g128", 1, 128), ("fp8 blocks", 3, 128), ("fp8 rows", 4, 128)):
        for rows, k in shapes:
            each = packed(kind, rows, k, group)[1]
            count = -(-(400 << 20) // each)
            matrices = [packed(kind, rows, k, group) for _ in range(count)]
            x, out = random(1, k), torch.empty(1, rows, device="cuda", dtype=BF16)

            def run(every=matrices, x=x, o=out) -> None:
                for struct, _, _ in every:
                    call("q35_packed_linear", 1, struct, x, o, 0, struct.rows)

            table.add(
                f"packed linear {name} 1 x {k} -> {rows}, {count} in a graph",
                recorded(run),
                num_bytes=count * (each + 2 * (x.numel() + out.numel())),
            )
            del matrices, run


def packed_tails(table: Table) -> None:
    """The delta layers' projections: packed rows, and rows of bf16 behind them, in one kernel and in two."""
    for name, kind in (("int4 g128", 1), ("fp8 blocks", 3)):
        for rows, tail, k in ((20480, 128, 3072), (12288, 64, 2048)):
            struct, num_bytes, kept = packed(kind, rows, k)
            w, stride = weights(tail, k), rows + tail
            for n in (1, 4, 16):
                x, out = random(n, k), torch.empty(n, stride, device="cuda", dtype=BF16)
                ends = out[:, rows:]

                def one(n=n, s=struct, w=w, tail=tail, x=x, o=out, stride=stride) -> None:
                    call("q35_packed_linear_tail", n, s, w, tail, x, o, 0, stride)

                def two(n=n, s=struct, w=w, tail=tail, x=x, o=out, e=ends, k=k, stride=stride) -> None:
                    call("q35_packed_linear", n, s, x, o, 0, stride)
                    call("q35_linear", n, k, tail, x, w, e, stride)

                for how, run in (("one kernel", one), ("two", two)):
                    table.add(
                        f"packed linear {name} {n} x {k} -> {rows} + {tail} of bf16, {how}",
                        run,
                        num_bytes=num_bytes + 2 * (w.numel() + x.numel() + out.numel()),
                        flops=2 * n * stride * k,
                    )
            del kept


def packed_many(table: Table) -> None:
    """Packed weights with many rows of tokens."""
    k = 3072
    for name, kind, rows in (
        ("int4", 1, 16384),
        ("fp8", 3, 16384),
        ("nvfp4", NVFP4, 16384),
        ("nvfp4", NVFP4, 20608),
        ("q4_k", Q4_K, 20608),
        ("q6_k", Q6_K, 20608),
        ("q8_0", Q8_0, 20608),
    ):
        struct, num_bytes, kept = packed(kind, rows, k)
        for n in (17, 64, 8192):
            x, out = random(n, k), torch.empty(n, rows, device="cuda", dtype=BF16)
            table.add(
                f"packed linear {name} {n} x {k} -> {rows}",
                lambda n=n, w=struct, x=x, o=out: call("q35_packed_linear", n, w, x, o, 0, w.rows),
                num_bytes=num_bytes + 2 * (x.numel() + out.numel()),
                flops=2 * n * rows * k,
            )
        del kept
    for name, kind in (("int4", 1), ("fp8", 3)):
        for rows, k in ((16384, 3072), (3072, 8192)):
            struct, num_bytes, kept = packed(kind, rows, k)
            for n in (64, 8192):
                x, out = random(n, k), torch.empty(n, rows, device="cuda", dtype=BF16)
                space = torch.empty(call("q35_fp8_token_bytes", n, k), device="cuda", dtype=torch.uint8)
                table.add(
                    f"packed linear {name} {n} x {k} -> {rows}, rows in fp8",
                    lambda n=n, w=struct, x=x, s=space, o=out: call(
                        "q35_fp8_token_linear", n, w, x, s, o, 0, w.rows
                    ),
                    num_bytes=num_bytes + 2 * (x.numel() + out.numel()),
                    flops=2 * n * rows * k,
                )
            del kept


def packed_chains(table: Table) -> None:
    """`chains` with packed weights, of so many layers that they are past L2."""
    for name, hidden, projected, inner in (("35B", 2048, 12352, 4096), ("122B", 3072, 20608, 8192)):
        for form, kind in (("int4", 1), ("fp8", 3)):
            num_layers = 24
            layers = [
                (packed(kind, projected, hidden), packed(kind, hidden, inner)) for _ in range(num_layers)
            ]
            norm = random(hidden, dtype=F32)
            for n in (1, 4, 8, 16):
                delta, residual, x = random(n, hidden), random(n, hidden, dtype=F32), random(n, hidden)
                wide = random(n, projected)

                def run(n=n, h=hidden, d=delta, r=residual, x=x, y=wide, w=norm, every=layers) -> None:
                    for first, second in every:
                        call("q35_rmsnorm_residual", n, h, d, r, w, 1e-6, x)
                        call("q35_packed_linear", n, first[0], x, y, 0, first[0].rows)
                        # The rows are not those of y, but as many numbers of it.
                        call("q35_packed_linear", n, second[0], y, d, 0, second[0].rows)

                table.add(
                    f"norm, packed linear, packed linear {form} {name}, {n} rows, {num_layers} layers",
                    recorded(run),
                    num_bytes=sum(a[1] + b[1] for a, b in layers)
                    + num_layers * 2 * n * (6 * hidden + 2 * projected),
                )
            del layers


def packed_experts(table: Table) -> None:
    """Experts in 4 and 8 bits, layer after layer in a graph, as in `experts`."""
    for name, hidden, num_experts, top_k, width in (
        ("35B", 2048, 256, 8, 512),
        ("122B", 3072, 256, 8, 1024),
        ("397B", 4096, 512, 10, 1024),
    ):
        dims = MoeDims(hidden, num_experts, top_k, width, width)
        for what, kind, bytes_each in (
            ("int4", 1, 0.5 + 2 / 128),
            ("fp8", 3, 1 + 4 / 2048),
            ("nvfp4", NVFP4, 0.5 + 1 / 16),
            ("q4_k", Q4_K, 0.5 + 3 / 32),
            ("q6_k", Q6_K, 0.75 + 3 / 32),
        ):

            def draw(rows: int, k: int, kind: int = kind) -> tuple[PackedMatrix, Any]:
                if kind >= NVFP4:
                    struct, _, kept = packed(kind, rows, k, scale=0.3 * k**-0.5)
                    return struct, kept
                codes = torch.empty(
                    rows * k // (2 if kind == 1 else 1), device="cuda", dtype=torch.uint8
                ).random_()
                if kind == 1:
                    scales = torch.rand(rows * k // 128, device="cuda").mul_(k**-0.5).half()
                else:
                    codes.bitwise_and_(0xBF)  # no NaN
                    scales = torch.rand(rows * k // 2048, device="cuda").mul_(k**-0.5)
                return PackedMatrix(codes.data_ptr(), scales.data_ptr(), None, rows, k, 128, kind), (
                    codes,
                    scales,
                )

            (gate_up, kept_up), (down, kept_down) = (
                draw(num_experts * 2 * width, hidden),
                draw(num_experts * hidden, width),
            )
            shared_gate = weights(1, hidden)
            for n in (1, 4, 16):
                x, out = random(n, hidden), torch.empty(n, hidden, device="cuda", dtype=BF16)
                space = torch.empty(call("q35_moe_workspace", n, dims), device="cuda", dtype=torch.uint8)
                few = min(num_experts, n * top_k)
                layers = max(2, int((1 << 30) / (3 * hidden * width * (few + 1) * bytes_each)) + 1)
                residual, norm = random(n, hidden, dtype=F32), random(hidden, dtype=F32)
                deltas = [random(n, hidden, scale=1e-3) for _ in range(layers)]
                routers = [weights(num_experts, hidden) for _ in range(layers)]
                shared = [(draw(2 * width, hidden), draw(hidden, width)) for _ in range(layers)]
                structs = [
                    PackedMoe(gate_up, down, a[0], b[0], router.data_ptr(), shared_gate.data_ptr())
                    for router, (a, b) in zip(routers, shared, strict=True)
                ]

                def step(n=n, h=x, o=out, s=space, d=dims, r=residual, g=norm, de=deltas, st=structs):
                    for delta, struct in zip(de, st, strict=True):
                        call("q35_packed_norm_moe", n, d, struct, delta, r, g, 1e-6, h, s, o)

                replay = recorded(step)
                # What the layers hit, from the x of each.
                num_bytes = 0.0
                for delta, router, struct in zip(deltas, routers, structs, strict=True):
                    call("q35_packed_norm_moe", n, dims, struct, delta, residual, norm, 1e-6, x, space, out)
                    hit = (x.float() @ router.float().T).topk(top_k).indices.unique().numel()
                    num_bytes += 3 * hidden * width * (hit + 1) * bytes_each
                    num_bytes += 2 * num_experts * hidden + 14 * n * hidden
                table.add(
                    f"norm moe {what} {name} {n} tokens, {layers} layers in a graph",
                    replay,
                    num_bytes=num_bytes,
                )
            del kept_up, kept_down


def packed_experts_many(table: Table) -> None:
    """Experts in 4 and 8 bits with many tokens, as the rows of `experts` of bf16."""
    for name, hidden, width in (("35B", 2048, 512), ("122B", 3072, 1024)):
        dims = MoeDims(hidden, 256, 8, width, width)
        for what, kind in (("int4", 1), ("fp8", 3), ("nvfp4", NVFP4), ("q4_k", Q4_K), ("q6_k", Q6_K)):
            parts = [
                packed(kind, rows, k, scale=1e-3)
                for rows, k in (
                    *((256 * 2 * width, hidden), (256 * hidden, width)),
                    *((2 * width, hidden), (hidden, width)),
                )
            ]
            router, shared_gate = weights(256, hidden), weights(1, hidden)
            struct = PackedMoe(*(part[0] for part in parts), router.data_ptr(), shared_gate.data_ptr())
            for n in (64, 8192):
                x, out = random(n, hidden), torch.empty(n, hidden, device="cuda", dtype=BF16)
                residual, norm = random(n, hidden, dtype=F32), random(hidden, dtype=F32)
                space = torch.empty(call("q35_moe_workspace", n, dims), device="cuda", dtype=torch.uint8)
                hit = (x.float() @ router.float().T).topk(8).indices.unique().numel()
                routed, shared = (sum(part[1] for part in half) for half in (parts[:2], parts[2:]))
                num_bytes = routed * hit / 256 + shared + 2 * 256 * hidden + 4 * n * hidden
                flops = 6 * n * hidden * 9 * width
                table.add(
                    f"moe {what} {name} {n} tokens, {hit} experts hit",
                    lambda n=n, x=x, o=out, s=space, d=dims, w=struct: call(
                        "q35_packed_moe", n, d, w, x, s, o
                    ),
                    num_bytes=num_bytes,
                    flops=flops,
                )
                table.add(
                    f"moe then norm {what} {name} {n} tokens, {hit} experts hit",
                    lambda n=n, x=x, o=out, s=space, d=dims, w=struct, r=residual, g=norm: call(
                        "q35_packed_moe_then_norm", n, d, w, x, s, r, g, 1e-6, o
                    ),
                    num_bytes=num_bytes + 8 * n * hidden,
                    flops=flops,
                )
                if what not in ("int4", "fp8"):
                    continue
                rounded = torch.empty(
                    call("q35_fp8_token_moe_bytes", n, dims), device="cuda", dtype=torch.uint8
                )
                table.add(
                    f"moe then norm {what} {name} {n} tokens in fp8, {hit} experts hit",
                    lambda n=n, x=x, o=out, s=space, d=dims, w=struct, r=residual, g=norm, b=rounded: call(
                        "q35_fp8_token_moe", n, d, w, x, s, b, r, g, 1e-6, o
                    ),
                    num_bytes=num_bytes + 8 * n * hidden,
                    flops=flops,
                )
            del parts
