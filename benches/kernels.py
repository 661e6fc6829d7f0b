"""Speed of the CUDA kernels at the family's sizes, each beside the floor of the card it runs on.

python benches/kernels.py [--only NAME] [--json FILE]

Random data; other data is read through the L2 cache before every launch; the median of many, timed with events. The floors are
measured here, on the same card: bytes a second of a device-to-device copy (read and written both counted), and the rate
of a large bf16 product of cuBLAS.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))
from kernel_table import BF16, F32, Clock, Table, random, recorded, weights
from kernels_packed import (
    packed_chains,
    packed_experts,
    packed_experts_many,
    packed_linears,
    packed_many,
    packed_rows_in_graphs,
    packed_tails,
)
from launch import (
    AttentionDims,
    Batch,
    DeltaDims,
    Edit,
    MoeDims,
    MoeWeights,
    Sampled,
    Sampling,
    call,
    structs,
)
from origin import origin

from ranks import Ranks


def norms(table: Table) -> None:
    for n, hidden in ((1, 2048), (1, 3072), (64, 3072), (8192, 3072)):
        delta, residual, out = random(n, hidden), random(n, hidden, dtype=F32), random(n, hidden)
        w = random(hidden, dtype=F32)
        table.add(
            f"rmsnorm_residual {n} x {hidden}",
            lambda d=delta, r=residual, o=out, n=n, w=w, h=hidden: call(
                "q35_rmsnorm_residual", n, h, d, r, w, 1e-6, o
            ),
            num_bytes=12 * n * hidden,
        )


def linears(table: Table) -> None:
    shapes = ((9216, 2048), (12352, 2048), (2048, 4096), (248320, 2048), (20480, 3072), (3072, 8192))
    for out_dim, width in shapes:
        w = weights(out_dim, width)
        for n in (1, 4, 16, 2048) if out_dim < 100_000 else (1, 16):
            x, out = random(n, width), torch.empty(n, out_dim, device="cuda", dtype=BF16)
            table.add(
                f"linear {n} x {width} -> {out_dim}",
                lambda n=n, x=x, w=w, o=out, i=width, d=out_dim: call("q35_linear", n, i, d, x, w, o, d),
                num_bytes=2 * (w.numel() + x.numel() + out.numel()),
                flops=2 * n * w.numel(),
            )
        if out_dim < 100_000:
            x = random(2048, width)
            table.add(
                f"  cuBLAS 2048 x {width} -> {out_dim}",
                lambda x=x, w=w: x @ w.T,
                num_bytes=2 * w.numel(),
                flops=2 * 2048 * w.numel(),
            )


def chains(table: Table) -> None:
    """What is around the mixers of some layers, in a graph, so that kernels overlap as they do in a step."""
    for name, hidden, projected, inner in (("35B", 2048, 12352, 4096), ("122B", 3072, 20480, 8192)):
        num_layers = 8
        layers = [(weights(projected, hidden), weights(hidden, inner)) for _ in range(num_layers)]
        norm = random(hidden, dtype=F32)
        for n in (1, 4, 8, 16):
            delta, residual, x = random(n, hidden), random(n, hidden, dtype=F32), random(n, hidden)
            wide = random(n, projected)

            def run(
                n: int = n,
                d: torch.Tensor = delta,
                r: torch.Tensor = residual,
                x: torch.Tensor = x,
                y: torch.Tensor = wide,
                w: torch.Tensor = norm,
                all_weights: list[tuple[torch.Tensor, torch.Tensor]] = layers,
            ) -> None:
                for first, second in all_weights:
                    call("q35_rmsnorm_residual", n, len(second), d, r, w, 1e-6, x)
                    call("q35_linear", n, len(second), len(first), x, first, y, len(first))
                    # The rows are not those of y, but as many numbers of it.
                    call("q35_linear", n, second.shape[1], len(second), y, second, d, len(second))

            table.add(
                f"norm, linear, linear {name}, {n} rows, {num_layers} layers",
                recorded(run),
                num_bytes=num_layers
                * (2 * hidden * (projected + inner) + 2 * n * (6 * hidden + 2 * projected)),
            )
        del layers


def experts(table: Table) -> None:
    for name, hidden, width, shared in (("35B", 2048, 512, 512), ("122B", 3072, 1024, 1024)):
        dims = MoeDims(hidden, 256, 8, width, shared)
        parts = {
            "router": weights(256, hidden),
            "gate_up": weights(256, 2 * width, hidden),
            "down": weights(256, hidden, width),
            "shared_gate_up": weights(2 * shared, hidden),
            "shared_down": weights(hidden, shared),
            "shared_gate": weights(1, hidden),
        }
        struct = MoeWeights(**{k: v.data_ptr() for k, v in parts.items()})
        for n in (1, 4, 16, 64, 512, 1024, 4096, 8192):
            x, out = random(n, hidden), torch.empty(n, hidden, device="cuda", dtype=BF16)
            space = torch.empty(call("q35_moe_workspace", n, dims), device="cuda", dtype=torch.uint8)
            hit = (x.float() @ parts["router"].float().T).topk(8).indices.unique().numel()
            table.add(
                f"moe {name} {n} tokens, {hit} experts hit",
                lambda n=n, x=x, o=out, s=space, d=dims, w=struct: call("q35_moe", n, d, w, x, s, o),
                num_bytes=2 * 3 * hidden * (hit * width + shared) + 2 * 256 * hidden + 4 * n * hidden,
                flops=6 * n * hidden * (8 * width + shared),
            )
            if n > 16:
                residual, norm = random(n, hidden, dtype=F32), random(hidden, dtype=F32)
                table.add(
                    f"moe then norm {name} {n} tokens, {hit} experts hit",
                    lambda n=n, x=x, o=out, s=space, d=dims, w=struct, r=residual, g=norm: call(
                        "q35_moe_then_norm", n, d, w, x, s, r, g, 1e-6, o
                    ),
                    num_bytes=2 * 3 * hidden * (hit * width + shared) + 2 * 256 * hidden + 12 * n * hidden,
                    flops=6 * n * hidden * (8 * width + shared),
                )
                continue
            # Layer after layer in a graph, past L2, as in a step: what a launch costs alone is not in it. Each layer has
            # a router and a shared expert of its own, and so other experts of the same weights.
            layers = max(2, -(-(1 << 30) // (6 * hidden * (hit * width + shared))))
            residual, norm = random(n, hidden, dtype=F32), random(hidden, dtype=F32)
            deltas = [random(n, hidden, scale=1e-3) for _ in range(layers)]
            routers = [weights(256, hidden) for _ in range(layers)]
            own = ("shared_gate_up", "shared_down")
            sets = [{**parts, "router": r, **{k: parts[k].clone() for k in own}} for r in routers]
            structs = [MoeWeights(**{k: v.data_ptr() for k, v in tensors.items()}) for tensors in sets]
            normed = torch.empty_like(x)

            def step(n=n, h=normed, o=out, s=space, d=dims, r=residual, g=norm, de=deltas, st=structs):
                for delta, struct in zip(de, st, strict=True):
                    call("q35_norm_moe", n, d, struct, delta, r, g, 1e-6, h, s, o)

            replay = recorded(step)
            # What the layers hit, from the x of each.
            num_bytes = 0
            for delta, router, struct in zip(deltas, routers, structs, strict=True):
                call("q35_norm_moe", n, dims, struct, delta, residual, norm, 1e-6, normed, space, out)
                hit = (normed.float() @ router.float().T).topk(8).indices.unique().numel()
                num_bytes += 2 * 3 * hidden * (hit * width + shared) + 2 * 256 * hidden + 14 * n * hidden
            table.add(f"norm moe {name} {n} tokens, {layers} layers in a graph", replay, num_bytes=num_bytes)
        del parts


def delta_rule(table: Table) -> None:
    for name, heads in (("35B", 32), ("122B", 64)):
        dims = DeltaDims(16, heads, 128, 128, 4)
        channels = 2 * 16 * 128 + heads * 128
        stride = channels + heads * 128 + 2 * heads
        for what, seqs in (
            ("decode 1", [(100, 1, 0)]),
            ("decode 64", [(100, 1, 0)] * 64),
            ("prefill 8192", [(0, 8192, 8192)]),
            ("prefill 32768", [(0, 32768, 32768)]),
        ):
            batch = Batch(seqs)
            n = batch.num_tokens
            mixed, projected = random(n, channels), random(n, stride)
            states = torch.zeros(batch.num_slots, heads, 128, 128, device="cuda")
            out = torch.empty(n, heads * 128, device="cuda", dtype=BF16)
            space = torch.empty(call("q35_delta_workspace", n, len(seqs), dims), device="cuda", dtype=F32)
            rates = random(heads, dtype=F32), random(heads, dtype=F32)
            # Chunked: products of chunk x chunk and chunk x state for each head.
            flops = 2 * n * heads * (3 * 128 * 128 + 4 * 64 * 128) if seqs[0][2] else 0
            table.add(
                f"delta rule {name} {what}",
                lambda b=batch, d=dims, m=mixed, p=projected, s=states, w=space, o=out, r=rates, t=stride, h=heads: (
                    call("q35_gated_delta_rule", b.struct, d, r[0], r[1], m, p, t, t - 2 * h, s, w, o)
                ),
                num_bytes=2 * len(seqs) * heads * 128 * 128 * 4 + 2 * n * (channels + heads * 130),
                flops=flops,
            )
            conv = random(4, channels, dtype=F32)
            tails = torch.zeros(batch.num_slots, 3, channels, device="cuda", dtype=BF16)
            table.add(
                f"causal conv {name} {what}",
                lambda b=batch, d=dims, c=conv, p=projected, s=stride, t=tails, m=mixed: call(
                    "q35_causal_conv1d", b.struct, d, c, p, s, t, m
                ),
                num_bytes=4 * n * channels,
            )
            if seqs[0][2]:
                norm = random(128, dtype=F32)
                table.add(
                    f"delta prompt {name} {what}",
                    lambda b=batch, d=dims, c=conv, r=rates, g=norm, p=projected, s=stride, z=channels, t=tails, x=states, w=space, m=mixed, o=out, h=heads: (
                        call(
                            "q35_delta_prompt",
                            *(b.struct, d, c, r[0], r[1], g, 1e-6, p, s, z, s - 2 * h, t, x, w, m, o),
                        )
                    ),
                    num_bytes=2 * len(seqs) * heads * 128 * 128 * 4 + 2 * n * (stride + heads * 128),
                    flops=flops,
                )
                half, halves = DeltaDims(16, heads, 128, 128, 4, 1), states.half()
                table.add(
                    f"delta prompt f16 {name} {what}",
                    lambda b=batch, d=half, c=conv, r=rates, g=norm, p=projected, s=stride, z=channels, t=tails, x=halves, w=space, m=mixed, o=out, h=heads: (
                        call(
                            "q35_delta_prompt",
                            *(b.struct, d, c, r[0], r[1], g, 1e-6, p, s, z, s - 2 * h, t, x, w, m, o),
                        )
                    ),
                    num_bytes=2 * len(seqs) * heads * 128 * 128 * 2 + 2 * n * (stride + heads * 128),
                    flops=flops,
                )
            else:
                counters = torch.zeros(len(seqs) * 16, device="cuda", dtype=torch.int32)
                norm = random(128, dtype=F32)
                table.add(
                    f"delta decode {name} {what}",
                    lambda b=batch, d=dims, c=conv, r=rates, g=norm, p=projected, s=stride, z=channels, t=tails, x=states, n=counters, m=mixed, o=out, h=heads: (
                        call(
                            "q35_delta_decode",
                            *(b.struct, d, c, r[0], r[1], g, 1e-6, p, s, z, s - 2 * h, t, x, n, m, o),
                        )
                    ),
                    num_bytes=2 * len(seqs) * heads * 128 * 128 * 4 + n * (14 * channels + 4 * heads * 129),
                )
                half, halves = DeltaDims(16, heads, 128, 128, 4, 1), states.half()
                table.add(
                    f"delta decode f16 {name} {what}",
                    lambda b=batch, d=half, c=conv, r=rates, g=norm, p=projected, s=stride, z=channels, t=tails, x=halves, n=counters, m=mixed, o=out, h=heads: (
                        call(
                            "q35_delta_decode",
                            *(b.struct, d, c, r[0], r[1], g, 1e-6, p, s, z, s - 2 * h, t, x, n, m, o),
                        )
                    ),
                    num_bytes=2 * len(seqs) * heads * 128 * 128 * 2 + n * (14 * channels + 4 * heads * 129),
                )


def attention(table: Table) -> None:
    for name, q_heads in (("35B", 16), ("122B", 32)):
        dims = AttentionDims(q_heads, 2, 256)
        stride = 2 * q_heads * 256 + 2 * 2 * 256
        for what, seqs in (
            ("decode 1, 1k", [(1024, 1, 0)]),
            ("decode 1, 32k", [(32768, 1, 0)]),
            ("decode 1, 1k, up to 32k", [(1024, 1, 0)]),
            ("decode 1, 4k", [(4096, 1, 0)]),
            ("decode 64, 1k", [(1024, 1, 0)] * 64),
            ("decode 64, 1k, up to 32k", [(1024, 1, 0)] * 64),
            ("decode 64, 8k", [(8192, 1, 0)] * 64),
            ("prefill 8192", [(0, 8192, 8192)]),
            ("prefill 32768", [(0, 32768, 32768)]),
            ("prefill 2048 after 32k", [(32768, 2048, 2048)]),
            ("prefill 1024", [(0, 1024, 1024)]),
            ("prefill 16 of 512", [(0, 512, 512)] * 16),
        ):
            batch = Batch(seqs)
            n, longest = batch.num_tokens, max(c + q for c, q, _ in seqs)
            if "up to" in what:
                longest = batch.struct.max_kv_len = 32768
            q, projected = random(n, q_heads * 256), random(n, stride)
            pages = [random(batch.num_pages, 2, 64, 256) for _ in range(2)]
            out = torch.empty_like(q)
            size = call("q35_attention_workspace", n, len(seqs), longest, dims)
            space = torch.zeros(max(1, size), device="cuda", dtype=F32)
            keys = sum((c + (q + 1) / 2) * q for c, q, _ in seqs)
            table.add(
                f"attention {name} {what}",
                lambda b=batch, d=dims, q=q, p=projected, s=stride, k=pages, w=space, o=out: call(
                    "q35_gated_attention", b.struct, d, q, p, s, k[0], k[1], w, o
                ),
                num_bytes=2 * 2 * 2 * 256 * sum(c + q for c, q, _ in seqs) + 6 * n * q_heads * 256,
                flops=4 * q_heads * 256 * keys,
            )
            coded = torch.randint(0, 120, (batch.num_pages, 2, 2, 64 * 260), device="cuda", dtype=torch.uint8)
            coded[..., 64 * 256 :].view(F32).fill_(0.01)
            room = max(1, sum(-(-(c + q) // 64) for c, q, _ in seqs if q > 8))
            size = call("q35_attention_fp8_workspace", room, len(seqs), dims)
            large = torch.zeros(size, device="cuda", dtype=F32)
            table.add(
                f"attention fp8 {name} {what}",
                lambda b=batch, d=dims, q=q, p=projected, s=stride, k=coded, r=room, w=large, o=out: call(
                    "q35_gated_attention_fp8", b.struct, d, q, p, s, k, r, b.struct.num_seqs, w, o
                ),
                num_bytes=2 * 2 * 260 * sum(c + q for c, q, _ in seqs) + 6 * n * q_heads * 256,
                flops=4 * q_heads * 256 * keys,
            )
            norm, freqs = random(256, dtype=F32), random(32, dtype=F32)
            axis = torch.zeros(32, device="cuda", dtype=torch.uint8)
            table.add(
                f"norm, rotation, write {name} {what}",
                lambda b=batch, d=dims, w=norm, f=freqs, a=axis, p=projected, s=stride, q=q, k=pages: call(
                    "q35_qk_norm_rope_write", b.struct, d, w, w, 1e-6, f, a, 32, 1.0, p, s, q, k[0], k[1]
                ),
                num_bytes=2 * n * (q_heads + 2 * 2) * 256 * 2,
            )
            table.add(
                f"norm, rotation, write fp8 {name} {what}",
                lambda b=batch, d=dims, w=norm, f=freqs, a=axis, p=projected, s=stride, q=q, k=coded: call(
                    "q35_qk_norm_rope_write_fp8", b.struct, d, w, w, 1e-6, f, a, 32, 1.0, p, s, q, k
                ),
                num_bytes=n * (2 * (2 * q_heads + 2 * 2) * 256 + 2 * 2 * 260),
            )


def samplers(table: Table) -> None:
    """With the logits in memory; in a decode step the product that made them has left those of few rows in L2. As in a
    step, the launches are replayed from a graph: five by way of Python would take longer than the kernels."""
    vocab, num_tokens = 248_320, 248_077
    edits = structs([Edit(token, 0.0, 0, 1, token % 3) for token in range(0, 200_000, 200)])
    for n in (1, 8, 64):
        logits = random(n, vocab, scale=2.0, dtype=F32)
        space = torch.zeros(call("q35_sample_workspace", n, vocab), device="cuda", dtype=torch.uint8)
        out = torch.empty(n * ctypes.sizeof(Sampled), device="cuda", dtype=torch.uint8)
        tokens = torch.empty(n, device="cuda", dtype=torch.int32)
        for what, changed in (
            ("greedy", {"temperature": 0.0}),
            ("all", {}),
            ("top-k 50", {"top_k": 50}),
            ("top-k 1024, top-p 0.95", {"top_k": 1024, "top_p": 0.95}),
            ("top-p 0.95", {"top_p": 0.95}),
            ("min-p 0.05", {"min_p": 0.05}),
            ("top-p 0.95, 1000 edits", {"top_p": 0.95, "num_edits": 1000}),
            ("top-p 0.95, 20 log-probabilities", {"top_p": 0.95, "num_logprobs": 20}),
        ):
            plain = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.1, "num_logprobs": -1}
            rows = structs([Sampling(uniform=(i + 0.5) / n, **(plain | changed)) for i in range(n)])
            arguments = (n, vocab, num_tokens, logits, rows, edits, space, out, tokens)
            sample = recorded(lambda a=arguments: call("q35_sample", *a))
            table.add(f"sample {n} x {vocab}, {what}", sample, num_bytes=4 * n * vocab)


def collectives(table: Table) -> None:
    """Of one rank, which waits for nobody: what they cost beside the exchange. `benches/all_reduce.py` has several."""
    width = 3072
    ranks = Ranks("one card", 1, width, gather_bytes=4 * 64 * 248_320)
    peers = ranks.peers[0]
    for n in (1, 64, 8192):
        delta, residual, out = random(n, width), random(n, width, dtype=F32), random(n, width)
        w = random(width, dtype=F32)
        table.add(
            f"all_reduce {n} x {width}, one rank",
            lambda d=delta, o=out, n=n: call("q35_all_reduce", peers, n, width, d, o),
            num_bytes=4 * n * width,
        )
        table.add(
            f"all_reduce_norm {n} x {width}, one rank",
            lambda d=delta, r=residual, o=out, n=n, w=w: call(
                "q35_all_reduce_norm", peers, n, width, d, r, w, 1e-6, o
            ),
            num_bytes=12 * n * width,
        )
    for n in (1, 64):
        x = random(n, 248_320, dtype=F32)
        table.add(
            f"gather_columns {n} x 248320, one rank",
            lambda x=x, n=n: call("q35_gather_columns", peers, n, 248_320, x),
            num_bytes=8 * n * 248_320,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    torch.manual_seed(0)
    table = Table(Clock(), args.only)
    for part in (
        norms,
        linears,
        chains,
        packed_linears,
        packed_rows_in_graphs,
        packed_tails,
        packed_many,
        packed_chains,
        experts,
        packed_experts,
        packed_experts_many,
        delta_rule,
        attention,
        samplers,
        collectives,
    ):
        part(table)
        torch.cuda.empty_cache()
    if args.json:
        found: dict[str, Any] = origin() | {
            "copy_tb_per_s": table.bandwidth / 1e12,
            "bf16_tflops": table.rate / 1e12,
            "rows": table.rows,
        }
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
