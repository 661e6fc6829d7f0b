"""Speed of the CUDA kernels over pages in fp8 and states in f16, beside the same floors as in kernels.py.

python benches/kernels_caches.py [--only NAME] [--json FILE]
"""

from __future__ import annotations

import kernels
import torch
from kernels import BF16, F32, AttentionDims, Batch, DeltaDims, Table, call, random


def attention(table: Table) -> None:
    for name, q_heads in (("35B", 16), ("122B", 32)):
        dims = AttentionDims(q_heads, 2, 256)
        stride = 2 * q_heads * 256 + 2 * 2 * 256
        for what, seqs in (
            ("decode 1, 1k", [(1024, 1, 0)]),
            ("decode 1, 32k", [(32768, 1, 0)]),
            ("decode 1, 4k", [(4096, 1, 0)]),
            ("decode 64, 1k", [(1024, 1, 0)] * 64),
            ("decode 64, 8k", [(8192, 1, 0)] * 64),
            ("prefill 8192", [(0, 8192, 8192)]),
            ("prefill 2048 after 32k", [(32768, 2048, 2048)]),
            ("prefill 16 of 512", [(0, 512, 512)] * 16),
        ):
            batch = Batch(seqs)
            n = batch.num_tokens
            q, projected = random(n, q_heads * 256), random(n, stride)
            pages = torch.randint(0, 120, (batch.num_pages, 2, 2, 64 * 260), device="cuda", dtype=torch.uint8)
            pages[..., 64 * 256 :].view(F32).fill_(0.01)
            out = torch.empty_like(q)
            room = sum(-(-(c + k) // 64) for c, k, _ in seqs if k > 8)
            size = call("q35_attention_fp8_workspace", room, len(seqs), dims)
            space = torch.zeros(size, device="cuda", dtype=F32)
            keys = sum((c + (k + 1) / 2) * k for c, k, _ in seqs)
            table.add(
                f"attention fp8 {name} {what}",
                lambda b=batch, d=dims, q=q, p=projected, s=stride, k=pages, r=room, w=space, o=out: call(
                    "q35_gated_attention_fp8", b.struct, d, q, p, s, k, r, b.struct.num_seqs, w, o
                ),
                num_bytes=2 * 2 * 260 * sum(c + k for c, k, _ in seqs) + 6 * n * q_heads * 256,
                flops=4 * q_heads * 256 * keys,
            )
            norm, freqs = random(256, dtype=F32), random(32, dtype=F32)
            axis = torch.zeros(32, device="cuda", dtype=torch.uint8)
            table.add(
                f"norm, rotation, write fp8 {name} {what}",
                lambda b=batch, d=dims, w=norm, f=freqs, a=axis, p=projected, s=stride, q=q, k=pages: call(
                    "q35_qk_norm_rope_write_fp8", b.struct, d, w, w, 1e-6, f, a, 32, 1.0, p, s, q, k
                ),
                num_bytes=n * (2 * (2 * q_heads + 2 * 2) * 256 + 2 * 2 * 260),
            )


def delta_rule(table: Table) -> None:
    for name, heads in (("35B", 32), ("122B", 64)):
        dims = DeltaDims(16, heads, 128, 128, 4, 1)
        channels = 2 * 16 * 128 + heads * 128
        stride = channels + heads * 128 + 2 * heads
        rates = random(heads, dtype=F32), random(heads, dtype=F32)
        conv, norm = random(4, channels, dtype=F32), random(128, dtype=F32)
        for what, seqs in (
            ("decode 1", [(100, 1, 0)]),
            ("decode 64", [(100, 1, 0)] * 64),
            ("prefill 8192", [(0, 8192, 8192)]),
        ):
            batch, is_prompt = Batch(seqs), seqs[0][2] > 0
            n = batch.num_tokens
            mixed, projected = random(n, channels), random(n, stride)
            states = torch.zeros(batch.num_slots, heads, 128, 128, device="cuda", dtype=torch.float16)
            tails = torch.zeros(batch.num_slots, 3, channels, device="cuda", dtype=BF16)
            out = torch.empty(n, heads * 128, device="cuda", dtype=BF16)
            size = call("q35_delta_workspace", n, len(seqs), dims)
            counters = torch.zeros(len(seqs) * 16, device="cuda", dtype=torch.int32)
            space = torch.empty(size, device="cuda", dtype=F32) if is_prompt else counters
            launcher = "q35_delta_prompt" if is_prompt else "q35_delta_decode"
            small = 2 * (stride + heads * 128) if is_prompt else 14 * channels + 4 * heads * 129
            arguments = (batch.struct, dims, conv, *rates, norm, 1e-6, projected, stride, channels)
            arguments += (stride - 2 * heads, tails, states, space, mixed, out)
            table.add(
                f"{launcher[4:].replace('_', ' ')} f16 {name} {what}",
                lambda launcher=launcher, arguments=arguments: call(launcher, *arguments),
                num_bytes=2 * len(seqs) * heads * 128 * 128 * 2 + n * small,
                flops=2 * n * heads * (3 * 128 * 128 + 4 * 64 * 128) if is_prompt else 0,
            )


if __name__ == "__main__":
    kernels.main((attention, delta_rule))
