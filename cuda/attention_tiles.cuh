// Pages in bf16 and in fp8 as attention of few tokens takes them: tiles of 16 keys or values for one warp, on their way
// through shared memory, and the products with them.
#pragma once
#include "attention.cuh"
#include "packed.cuh"

constexpr int DECODE_ROWS = 16, DECODE_KEYS = 16;

// The leading `bytes` of 16 from global to shared memory, and zeros behind them.
__device__ __forceinline__ void copy_leading(uint32_t to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
                 "r"(bytes)
                 : "memory");
}

// STAGES tiles of BYTES are on their way at a time. `load` brings the one that starts at place 0 .. 63 of a page, with
// zeros from its key `len` on; all lanes of a warp call it.
template <int D, int STAGES_ = 3>
struct Bf16Tiles {
    static constexpr int STAGES = STAGES_, ROW = D + 8, BYTES = DECODE_KEYS * ROW * int(sizeof(bf16));

    static __device__ __forceinline__ void load(const AttentionArgs &args, unsigned char *stage, bool values, int page,
                                                int head, int place, int len) {
        const bf16 *from = (values ? args.v : args.k) + args.page_at(page, head) + int64_t(place) * D;
        bf16 *to = reinterpret_cast<bf16 *>(stage);
#pragma unroll
        for (int i = threadIdx.x % 32; i < DECODE_KEYS * (D / 8); i += 32) {
            const int row = i / (D / 8), column = i % (D / 8) * 8;
            copy16(to + row * ROW + column, from + row * D + column, row < len);
        }
    }

    // Eight elements of a query, from a multiple of eight on, to the place of its row in shared memory; zeros where it
    // is not there. What `multiply_keys` reads.
    static __device__ __forceinline__ void load_query(bf16 *row, int column, const bf16 *from, bool there) {
        copy16(row + column, from + column, there);
    }

    // s = q k^T. q_row: this lane's address for load_matrices of the queries.
    static __device__ __forceinline__ void multiply_keys(float (&s)[2][4], const bf16 *q_row,
                                                         const unsigned char *stage) {
        const int lane = threadIdx.x % 32;
        const bf16 *k_row =
            reinterpret_cast<const bf16 *>(stage) + (lane / 16 * 8 + lane % 8) * ROW + lane / 8 % 2 * 8;
        float odd[2][4] = {};  // of every other step: products of one sum wait for each other
#pragma unroll 4
        for (int k = 0; k < D; k += 32) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint32_t a[4], b[4];
                load_matrices(a, q_row + k + 16 * h);
                load_matrices(b, k_row + k + 16 * h);
                mma(h == 0 ? s[0] : odd[0], a, b);
                mma(h == 0 ? s[1] : odd[1], a, b + 2);
            }
        }
#pragma unroll
        for (int j = 0; j < 8; j++) s[j / 4][j % 4] += odd[j / 4][j % 4];
    }

    // out += p v, for weights p as `softmax_step` leaves them.
    static __device__ __forceinline__ void multiply_values(float (&out)[D / 8][4], float (&p)[2][4],
                                                           const unsigned char *stage) {
        const int lane = threadIdx.x % 32;
        const uint32_t a0 = pack2(p[0][0], p[0][1]), a1 = pack2(p[0][2], p[0][3]);
        const uint32_t a2 = pack2(p[1][0], p[1][1]), a3 = pack2(p[1][2], p[1][3]);
        const bf16 *v_row = reinterpret_cast<const bf16 *>(stage) + lane % 16 * ROW + lane / 16 * 8;
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t b[4];
            load_matrices_transposed(b, v_row + n * 16);
            mma(out[2 * n], a0, a1, a2, a3, b[0], b[1]);
            mma(out[2 * n + 1], a0, a1, a2, a3, b[2], b[3]);
        }
    }

    // Row lane / 4 + 8 i of out, times `fade`, to `row` of D floats.
    static __device__ __forceinline__ void store(float *row, const float (&out)[D / 8][4], int i, float fade) {
        float *to = row + threadIdx.x % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            *reinterpret_cast<float2 *>(to + 8 * n) = make_float2(out[n][2 * i] * fade, out[n][2 * i + 1] * fade);
        }
    }
};

// Rows of codes and, behind them, the scales of the tile. Codes go to the tensor cores as bf16, which holds them all.
// Scales are f32: of keys to the scores, of values to the weights, which are rounded to bf16 behind that.
// A 16-bit unit of a matrix load has two codes. Four codes of a lane are neighbours, and `from_e4m3` takes every other
// one: along a key, queries lie in shared memory in that order (even ones of each four first), and across the values a
// tile of products has every other column.
template <int D>
struct Fp8Tiles {
    static constexpr int STAGES = 4, ROW = D + 16, CODES = DECODE_KEYS * ROW, BYTES = CODES + DECODE_KEYS * 4;

    static __device__ __forceinline__ void load(const AttentionArgs &args, unsigned char *stage, bool values, int page,
                                                int head, int place, int len) {
        const int lane = threadIdx.x % 32;
        const uint8_t *part = args.codes_at(page, head, values), *from = part + place * D;
#pragma unroll
        for (int i = lane; i < DECODE_KEYS * (D / 16); i += 32) {
            const int row = i / (D / 16), column = i % (D / 16) * 16;
            copy16(stage + row * ROW + column, from + row * D + column, row < len);
        }
        if (lane < DECODE_KEYS / 4) {
            const int bytes = min(max(4 * (len - 4 * lane), 0), 16);
            const uint8_t *scales = part + Q35_PAGE_LEN * D + 4 * place + 16 * lane;
            copy_leading(shared_address(stage + CODES + 16 * lane), scales, bytes);
        }
    }

    // Of each 16 elements, e is at place 2 (e / 4) + e / 2 % 2 + 8 (e % 2).
    static __device__ __forceinline__ void load_query(bf16 *row, int column, const bf16 *from, bool there) {
        uint4 x = make_uint4(0, 0, 0, 0);
        if (there) x = *reinterpret_cast<const uint4 *>(from + column);
        uint32_t *to = reinterpret_cast<uint32_t *>(row + column / 16 * 16 + column % 16 / 2);
        *reinterpret_cast<uint2 *>(to) = make_uint2(__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.z, x.w, 0x5410));
        *reinterpret_cast<uint2 *>(to + 4) = make_uint2(__byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x7632));
    }

    // x[n][j], x[n][2 + j] *= the scale of key 8 n + 2 (lane % 4) + j.
    static __device__ __forceinline__ void apply_scales(float (&x)[2][4], const unsigned char *stage) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const float2 scale = reinterpret_cast<const float2 *>(stage + CODES)[4 * n + threadIdx.x % 4];
            x[n][0] *= scale.x, x[n][1] *= scale.y, x[n][2] *= scale.x, x[n][3] *= scale.y;
        }
    }

    static __device__ __forceinline__ void multiply_keys(float (&s)[2][4], const bf16 *q_row,
                                                         const unsigned char *stage) {
        const int lane = threadIdx.x % 32;
        const unsigned char *k_row = stage + (lane / 16 * 8 + lane % 8) * ROW + lane / 8 % 2 * 16;
        float odd[2][4] = {};
#pragma unroll 4
        for (int k = 0; k < D; k += 32) {
            uint32_t codes[4];  // of keys 0 .. 7, elements 0 .. 15 and 16 .. 31, then of keys 8 .. 15
            load_matrices(codes, shared_address(k_row + k));
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint32_t a[4];
                load_matrices(a, q_row + k + 16 * h);
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const uint32_t word = codes[2 * n + h], b[2] = {from_e4m3(word << 8), from_e4m3(word)};
                    mma(h == 0 ? s[n] : odd[n], a, b);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < 8; j++) s[j / 4][j % 4] += odd[j / 4][j % 4];
        apply_scales(s, stage);
    }

    // Tile 2 n + m of out has columns 16 n + m, 16 n + m + 2, ..
    static __device__ __forceinline__ void multiply_values(float (&out)[D / 8][4], float (&p)[2][4],
                                                           const unsigned char *stage) {
        const int lane = threadIdx.x % 32;
        apply_scales(p, stage);
        const uint32_t a0 = pack2(p[0][0], p[0][1]), a1 = pack2(p[0][2], p[0][3]);
        const uint32_t a2 = pack2(p[1][0], p[1][1]), a3 = pack2(p[1][2], p[1][3]);
        const unsigned char *v_row = stage + lane % 16 * ROW + lane / 16 * 16;
#pragma unroll
        for (int n = 0; n < D / 16; n += 2) {
            uint32_t codes[4];  // columns 16 n .. + 15 of keys 0 .. 7 and of keys 8 .. 15, then the next 16 columns
            load_matrices_transposed(codes, reinterpret_cast<const bf16 *>(v_row + n * 16));
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint32_t low = codes[2 * h], high = codes[2 * h + 1];
                mma(out[2 * (n + h)], a0, a1, a2, a3, from_e4m3(low << 8), from_e4m3(high << 8));
                mma(out[2 * (n + h) + 1], a0, a1, a2, a3, from_e4m3(low), from_e4m3(high));
            }
        }
    }

    static __device__ __forceinline__ void store(float *row, const float (&out)[D / 8][4], int i, float fade) {
        float *to = row + threadIdx.x % 4 * 4;
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            *reinterpret_cast<float4 *>(to + 16 * n) =
                make_float4(out[2 * n][2 * i] * fade, out[2 * n + 1][2 * i] * fade, out[2 * n][2 * i + 1] * fade,
                            out[2 * n + 1][2 * i + 1] * fade);
        }
    }
};
