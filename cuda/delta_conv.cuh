// The convolution inside delta_prepare: the channels of a key head and its value heads, a chunk at a time.
#pragma once
#include "delta_chunk.cuh"

// Tokens first .. first + len - 1 of a sequence, `at_start` its first: their channels to mixed, and q and k to shared
// memory too, with zeros up to row 63. A thread has runs of tokens of eight channels, and loads the next ones of a run
// before it has to do with these.
template <int K, int LD, int THREADS>
__device__ __forceinline__ void convolve_chunk(const DeltaArgs &args, const ConvInputs &conv, int slot, bool at_start,
                                               int64_t first, int len, int k_head, bf16 (*q_rows)[LD],
                                               bf16 (*k_rows)[LD]) {
    constexpr int BEFORE = CHUNK_TAPS - 1, RUN = THREADS == 64 ? C : 16, AT_ONCE = 8, PIECES = K / 8;
    const q35_delta_dims d = args.dims;
    const int v_width = d.num_v_heads / d.num_k_heads * d.v_dim, pieces = 2 * PIECES + v_width / 8;
    for (int item = threadIdx.x; item < pieces * (C / RUN); item += THREADS) {
        const int piece = item % pieces, start = item / pieces * RUN;
        const int part = min(piece / PIECES, 2);  // q, k, v
        const int column = 8 * (piece - part * PIECES);
        const int c = part < 2 ? (part * d.num_k_heads + k_head) * K + column
                               : 2 * d.num_k_heads * K + k_head * v_width + column;
        bf16(*rows_there)[LD] = part == 0 ? q_rows : k_rows;
        if (start >= len) {
            if (part < 2)
                for (int i = start; i < start + RUN; i++)
                    *reinterpret_cast<uint4 *>(&rows_there[i][column]) = make_uint4(0, 0, 0, 0);
            continue;
        }
        const bf16 *in = args.projected + first * args.stride + c;
        bf16 *out = conv.mixed + first * args.channels + c;
        uint4 rows[BEFORE + 2 * AT_ONCE];
        const auto load = [&](uint4 *to, int t) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                to[i] = t + i < len
                            ? *reinterpret_cast<const uint4 *>(in + static_cast<int64_t>(t + i) * args.stride)
                            : make_uint4(0, 0, 0, 0);
        };
#pragma unroll
        for (int i = 0; i < BEFORE; i++) {
            const bf16 *row = at_start && start == 0
                                  ? conv.tails + (static_cast<int64_t>(slot) * BEFORE + i) * args.channels + c
                                  : in + static_cast<int64_t>(start - BEFORE + i) * args.stride;
            rows[i] = *reinterpret_cast<const uint4 *>(row);
        }
        load(rows + BEFORE, start);
        float w[CHUNK_TAPS][8];
#pragma unroll
        for (int tap = 0; tap < CHUNK_TAPS; tap++)
            load8(conv.weight + static_cast<int64_t>(tap) * args.channels + c, w[tap]);
#pragma unroll 1
        for (int t = start; t < start + RUN; t += AT_ONCE) {
            if (t + AT_ONCE < start + RUN) load(rows + BEFORE + AT_ONCE, t + AT_ONCE);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                uint4 y = convolved<CHUNK_TAPS>(rows + i, w);
                if (t + i < len)
                    *reinterpret_cast<uint4 *>(out + static_cast<int64_t>(t + i) * args.channels) = y;
                else
                    y = make_uint4(0, 0, 0, 0);
                if (part < 2) *reinterpret_cast<uint4 *>(&rows_there[t + i][column]) = y;
            }
#pragma unroll
            for (int i = 0; i < BEFORE + AT_ONCE; i++) rows[i] = rows[AT_ONCE + i];
        }
    }
}
