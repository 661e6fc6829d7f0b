// Weights of 4 and 8 bits, and bf16 beside them, as tensor-core fragments: tiles of 16 rows and 64 of k, loaded by a
// warp.
#pragma once
#include <cuda_fp16.h>

#include "fp4.cuh"
#include "gguf.cuh"
#include "int4.cuh"
#include "mma.cuh"
#include "packed_form.cuh"

// What a walk along k of one row tile, or of MATS row tiles at once, holds of them: up to 128 bytes a lane under way,
// and the scales of two k tiles.
template <int FORM, int MATS>
struct Walk {
    // 16 bytes of a tile, a lane; codes of 6 bits have another half.
    static constexpr int UNITS = FORM == FP8_TILES || FORM == INT8_TILES ? 2 : FORM == BF16_ROWS ? 4 : 1;
    static constexpr int DEPTH = (FORM == K6_TILES ? 4 : 8 / UNITS) / MATS;  // k tiles under way
    static constexpr int AHEAD = FORM == FP4_TILES ? 4 / MATS : DEPTH < 2 ? DEPTH : 2;  // of their scales
    // Bytes from a k tile to the next.
    static constexpr int STEP = FORM == BF16_ROWS ? 2 * TILE_K : TILE_BYTES<FORM>;
};
struct RawScales {
    uint32_t scale[2], zero[2];  // by half of a k tile, where it has two groups
};
struct Held {
    uint4 w[8];
    RawScales raw[2];  // fp4: four pairs of words

    // Of codes of 6 bits, of which there are four tiles, the upper ones.
    __device__ __forceinline__ void keep_upper(int i, uint2 bits) {
        uint4 &to = w[4 + i / 2];
        if (i % 2 == 0) {
            to.x = bits.x, to.y = bits.y;
        } else {
            to.z = bits.x, to.w = bits.y;
        }
    }
    __device__ __forceinline__ uint2 upper(int i) const {
        const uint4 &of = w[4 + i / 2];
        return i % 2 == 0 ? make_uint2(of.x, of.y) : make_uint2(of.z, of.w);
    }

    __device__ __forceinline__ uint32_t (&pair(int i))[2] { return i % 2 == 0 ? raw[i / 2].scale : raw[i / 2].zero; }
};

// Where a lane reads a row tile and its scales.
struct Cursor {
    const uint8_t *codes;
    uint32_t scale;
};

__device__ __forceinline__ uint32_t load_scale16(const void *p) {
    uint32_t v;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
__device__ __forceinline__ uint32_t load_scale32(const void *p) {
    uint32_t v;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
__device__ __forceinline__ uint2 stream8_in_order(const void *p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
__device__ __forceinline__ uint32_t load_zero(const uint8_t *p) {
    uint32_t v;
    asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

// Has L2 fetch the scales and zero points of a row tile, a line a lane.
__device__ __forceinline__ void ask_for_scales(const Packed &m, int row_tile) {
    const auto ask = [](const void *of, int64_t at, int bytes) {
        const char *const from = static_cast<const char *>(of) + at;
        for (int line = threadIdx.x % 32 * 128; line < bytes; line += 32 * 128)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from + line)) : "memory");
    };
    const int count = m.groups * m.each;
    ask(m.scales, int64_t(row_tile) * count * 2, count * 2);
    if (m.zeros != nullptr) ask(m.zeros, int64_t(row_tile) * count, count);
}

// At k tile `first` of a row tile. Of the scales of a pair of them lanes 16 .. 31 load those of the second, `apart` row
// tiles on.
template <int FORM>
__device__ __forceinline__ Cursor aim_at(const Packed &m, int row_tile, int apart, int first = 0) {
    const int lane = threadIdx.x % 32;
    Cursor c;
    c.codes = m.codes + (int64_t(row_tile) * m.row_tile_bytes + first * Walk<FORM, 1>::STEP);
    c.codes += FORM == BF16_ROWS ? (lane / 4 * m.k + lane % 4 * 8) * 2 : lane * 16;
    c.scale = 0;
    if (FORM == FP4_TILES) {
        c.scale = (uint32_t(row_tile) * m.groups + first) * m.each + lane / 4;
    } else if (FORM != BF16_ROWS) {
        const uint32_t own = uint32_t(row_tile) + (lane >= 16 ? apart : 0);
        const uint32_t group = FORM == INT4_HALVES ? 2 * first : first >> m.shift;
        c.scale = (own * m.groups + group) * m.each + (m.each == 16 ? lane % 16 : 0);
    }
    return c;
}

// `from`: at the k tile of a lane's first row tile; the next one of MATS is `apart` bytes on.
template <int FORM, int MATS>
__device__ __forceinline__ void load_codes(Held &held, int slot, const Packed &m, const uint8_t *from, int apart) {
    typedef Walk<FORM, MATS> W;
#pragma unroll
    for (int i = 0; i < MATS; i++, from += apart) {
        uint4 *to = held.w + (slot * MATS + i) * W::UNITS;
        const bf16 *const p = reinterpret_cast<const bf16 *>(from);  // elements of 2 bytes
        if (FORM == BF16_ROWS) {
            to[0] = stream16_in_order(p), to[1] = stream16_in_order(p + 32);
            to[2] = stream16_in_order(p + 8 * m.k), to[3] = stream16_in_order(p + 8 * m.k + 32);
        } else {
#pragma unroll
            for (int u = 0; u < W::UNITS; u++) to[u] = stream16_in_order(p + 256 * u);
            if constexpr (FORM == K6_TILES) {
                const int rest = 512 - 8 * static_cast<int>(threadIdx.x % 32);
                held.keep_upper(slot * MATS + i, stream8_in_order(from + rest));
            }
        }
    }
}

template <int FORM>
__device__ __forceinline__ void load_scales(RawScales &raw, const Packed &m, uint32_t from, int k_tile) {
    if (FORM == FP8_TILES) {
        const uint32_t at = from + uint32_t(k_tile >> m.shift) * m.each;
        raw.scale[0] = load_scale32(static_cast<const float *>(m.scales) + at);
    } else if (FORM == INT4_TILES) {
        const uint32_t at = from + uint32_t(m.halves ? 2 * k_tile : k_tile >> m.shift) * 16;
        const uint16_t *const scales = static_cast<const uint16_t *>(m.scales);
        raw.scale[0] = load_scale16(scales + at), raw.zero[0] = raw.zero[1] = 8;
        if (m.halves) raw.scale[1] = load_scale16(scales + at + 16);
        if (m.zeros != nullptr) {
            raw.zero[0] = load_zero(m.zeros + at);
            if (m.halves) raw.zero[1] = load_zero(m.zeros + at + 16);
        }
    }
}

// Those of int4 for a walk, which knows its groups.
template <bool HALVES>
__device__ __forceinline__ void load_int4_scales(RawScales &raw, const Packed &m, uint32_t from, int k_tile) {
    const uint32_t at = from + uint32_t(HALVES ? 2 * k_tile : k_tile >> m.shift) * 16;
#pragma unroll
    for (int i = 0; i < (HALVES ? 2 : 1); i++) {
        raw.scale[i] = load_scale16(static_cast<const uint16_t *>(m.scales) + at + 16 * i);
        raw.zero[i] = 8;
        if (m.zeros != nullptr) raw.zero[i] = load_zero(m.zeros + at + 16 * i);
    }
}

// Of GGUF's, the words of a row.
template <int FORM>
__device__ __forceinline__ void load_words(RawScales &raw, const Packed &m, uint32_t from, int k_tile) {
    const uint32_t at = from + uint32_t(k_tile) * 16;
    raw.scale[0] = load_scale32(static_cast<const uint32_t *>(m.scales) + at);
    raw.zero[0] = 0;
    if (FORM != INT8_TILES) raw.zero[0] = load_scale32(m.zeros + 4 * int64_t(at / 32 * 16 + at % 16));
}

// Those of fp4, of rows g and g + 8 of a k tile.
__device__ __forceinline__ uint2 load_pair(const Packed &m, uint32_t from, int k_tile) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(static_cast<const uint2 *>(m.scales) + (from + uint32_t(k_tile) * m.each)));
    return v;
}
// What is left to multiply sums of a row tile of fp4 with.
__device__ __forceinline__ float whole_of(const Packed &m, int row_tile) {
    return __ldg(m.wholes + row_tile) * FP4_REST;
}

// What rows g and g + 8 of a tile are scaled by; of int4 also 128 + the zero point, as bf16, twice.
struct RowScales {
    float scale[2];
    uint32_t bias[2];
};
template <int FORM>
__device__ __forceinline__ RowScales row_scales(const RawScales &raw, int half, int mat, uint32_t bf16_scales) {
    const int from = 16 * mat + threadIdx.x % 32 / 4;
    RowScales of;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (FORM == INT4_TILES) {
            const uint32_t both = __shfl_sync(ALL_LANES, raw.scale[half] | raw.zero[half] << 16, from + 8 * r);
            const float of_f16 = __half2float(__ushort_as_half(static_cast<unsigned short>(both & 0xffff)));
            of.scale[r] = __uint_as_float((both << 16 & bf16_scales) | (__float_as_uint(of_f16) & ~bf16_scales));
            of.bias[r] = __byte_perm(both, 0x43434343, 0x4242);
        } else {
            of.scale[r] = __uint_as_float(__shfl_sync(ALL_LANES, raw.scale[half], from + 8 * r));
            of.bias[r] = 0;
        }
    }
    return of;
}

__device__ __forceinline__ uint32_t bf16_mul(uint32_t a, uint32_t b) {
    const __nv_bfloat162 d =
        __hmul2(*reinterpret_cast<const __nv_bfloat162 *>(&a), *reinterpret_cast<const __nv_bfloat162 *>(&b));
    return *reinterpret_cast<const uint32_t *>(&d);
}

// The fragment of step `j` of k 16 of a tile in w. Of fp8 (word >> 8 i) & 0x00ff00ff are the two elements of register
// i; the bits of e4m3 are those of a bf16 that is 2^120 times smaller, small ones too.
template <int FORM>
__device__ __forceinline__ void fragment(const uint4 *w, int j, const uint32_t (&bias)[2], uint32_t (&a)[4]) {
    if (FORM == INT4_TILES) {
        const uint32_t word = j == 0 ? w[0].x : j == 1 ? w[0].y : j == 2 ? w[0].z : w[0].w;
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = bf16_sub(and_or(word >> 4 * i, 0x000f000fu, 0x43004300u), bias[i % 2]);
    } else if (FORM == FP8_TILES) {
        const uint4 half = w[j / 2];
        const uint32_t words[2] = {j % 2 == 0 ? half.x : half.z, j % 2 == 0 ? half.y : half.w};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t word = words[i], even = (word << 8 & 0x80008000u) | (word << 4 & 0x07f007f0u);
            const uint32_t odd = (word & 0x80008000u) | (word >> 4 & 0x07f007f0u);
            a[2 * i] = bf16_mul(even, 0x7b807b80u), a[2 * i + 1] = bf16_mul(odd, 0x7b807b80u);
        }
    } else {
        const uint4 lo = w[j / 2], hi = w[2 + j / 2];
        a[0] = j % 2 == 0 ? lo.x : lo.z, a[1] = j % 2 == 0 ? hi.x : hi.z;
        a[2] = j % 2 == 0 ? lo.y : lo.w, a[3] = j % 2 == 0 ? hi.y : hi.w;
    }
}

// Rows of tokens in the order of tiles, at a k tile; past the last any row, whose products nobody reads.
template <int N>
struct Tokens {
    const uint32_t *rows[N];
    bool both;  // there are more than 8

    template <int FORM>
    __device__ __forceinline__ void load(uint32_t (&b)[N][8], int k) const {
        const int t4 = threadIdx.x % 4;
#pragma unroll
        for (int s = 0; s < N; s++) {
            const uint32_t *const from = rows[s] + k / 2;
            if (s > 0 && !both) break;
            if (FORM == BF16_ROWS) {  // those have the words 4 t4 .. 4 t4 + 3, and 16 on
#pragma unroll
                for (int i = 0; i < 8; i++) b[s][i] = from[i % 4 * 8 + i / 4 * 4 + t4];
            } else {
                const uint4 *const own = reinterpret_cast<const uint4 *>(from + t4 * 8);
                const uint4 lo = own[0], hi = own[1];
                b[s][0] = lo.x, b[s][1] = lo.y, b[s][2] = lo.z, b[s][3] = lo.w;
                b[s][4] = hi.x, b[s][5] = hi.y, b[s][6] = hi.z, b[s][7] = hi.w;
            }
        }
    }
};

// acc[i][s] += the tile of matrix i in place `slot`, with scales in place `side`, times tokens 8 s .. 8 s + 7; `both`:
// there are more than 8. Of int4: products of 16 + code, from whose sum over a group (16 + the zero point) times the sum
// of the tokens' elements is taken, which comes from the tensor cores as well.
template <int N, bool HALVES, int MATS>
__device__ __forceinline__ void add_int4(const Held &held, int slot, int side, const Packed &m,
                                         const uint32_t (&b)[N][8], bool both, float (&acc)[MATS][N][4]) {
    constexpr int GROUPS = HALVES ? 2 : 1, STEPS = 4 / GROUPS;
    const uint32_t ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
    const RawScales &raw = held.raw[side];
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        float c[MATS][N][4] = {}, x_sums[N][4] = {};
#pragma unroll
        for (int j = group * STEPS; j < (group + 1) * STEPS; j++) {
            mma(x_sums[0], ones, b[0] + 2 * j);
            if (N > 1 && both) mma(x_sums[N - 1], ones, b[N - 1] + 2 * j);
#pragma unroll
            for (int i = 0; i < MATS; i++) {
                const uint4 &tile = held.w[slot * MATS + i];
                uint32_t a[4];
                int4_fragment(j == 0 ? tile.x : j == 1 ? tile.y : j == 2 ? tile.z : tile.w, a);
                mma(c[i][0], a, b[0] + 2 * j);
                if (N > 1 && both) mma(c[i][N - 1], a, b[N - 1] + 2 * j);
            }
        }
        // Of the row whose scale this lane has loaded.
        const float of_f16 = __half2float(__ushort_as_half(static_cast<unsigned short>(raw.scale[group])));
        const float own_zero = float(16 + raw.zero[group]);
        const float own = __uint_as_float((raw.scale[group] << 16 & m.bf16_scales) |
                                          (__float_as_uint(of_f16) & ~m.bf16_scales));
#pragma unroll
        for (int i = 0; i < MATS; i++) {
            float scale[2], zero[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                scale[r] = __shfl_sync(ALL_LANES, own, 16 * i + g + 8 * r);
                zero[r] = __shfl_sync(ALL_LANES, own_zero, 16 * i + g + 8 * r);
            }
#pragma unroll
            for (int s = 0; s < N; s++) {
#pragma unroll
                for (int e = 0; e < 4; e++)
                    acc[i][s][e] = fmaf(scale[e / 2], fmaf(-zero[e / 2], x_sums[s][e], c[i][s][e]), acc[i][s][e]);
            }
        }
    }
}

// The same of GGUF's. Of 4 bits minima are taken off as zero points are; of 6 and 8 bits codes are multiplied as they
// are.
template <int N, int FORM, int MATS>
__device__ __forceinline__ void add_gguf(const Held &held, int slot, int side, const Packed &m,
                                         const uint32_t (&b)[N][8], bool both, float (&acc)[MATS][N][4]) {
    constexpr int BITS = GGUF_BITS<FORM>, PARTS = GgufScales<BITS>::PARTS, STEPS = 4 / PARTS;
    const uint32_t bias = gguf_bias(m.minima);
    // Of the row whose words this lane has loaded.
    const GgufScales<BITS> own = gguf_scales<BITS>(held.raw[side].scale[0], held.raw[side].zero[0], m.minima);
    // Sums of matrix i times what its rows have.
    auto add = [&](int i, float factor, const float (&sums)[N][4]) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float of_row = __shfl_sync(ALL_LANES, factor, 16 * i + threadIdx.x % 32 / 4 + 8 * r);
#pragma unroll
            for (int s = 0; s < N; s++) {
#pragma unroll
                for (int e = 2 * r; e < 2 * r + 2; e++) acc[i][s][e] = fmaf(of_row, sums[s][e], acc[i][s][e]);
            }
        }
    };
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
#pragma unroll
        for (int i = 0; i < MATS; i++) {
            const int place = slot * MATS + i;
            float c[N][4] = {};
#pragma unroll
            for (int j = part * STEPS; j < (part + 1) * STEPS; j++) {
                uint2 upper = {};
                if constexpr (BITS == 6) upper = held.upper(place);
                uint32_t words[2], a[4];
                gguf_words<BITS>(held.w + place * Walk<FORM, MATS>::UNITS, upper, j, words);
                if (BITS == 4) {
                    int4_fragment(words[0], a);
                } else {
                    gguf_fragment<BITS>(words, j, bias, a);
                }
                mma(c[0], a, b[0] + 2 * j);
                if (N > 1 && both) mma(c[N - 1], a, b[N - 1] + 2 * j);
            }
            add(i, own.scale[part], c);
        }
    }
    if constexpr (BITS != 8) {
        if (BITS == 6 && !m.minima) return;
        const uint32_t ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sums[N][4] = {};
#pragma unroll
            for (int j = 2 * half; j < 2 * half + 2; j++) {
                mma(sums[0], ones, b[0] + 2 * j);
                if (N > 1 && both) mma(sums[N - 1], ones, b[N - 1] + 2 * j);
            }
            const float min = BITS == 4 ? fmaf(16.0f, own.scale[half], own.min[half]) : own.min[half];
#pragma unroll
            for (int i = 0; i < MATS; i++) add(i, -min, sums);
        }
    }
}

// The same of the others.
template <int N, int FORM, int MATS>
__device__ __forceinline__ void add_tile(Held &held, int slot, int side, const Packed &m, const uint32_t (&b)[N][8],
                                         bool both, float (&acc)[MATS][N][4]) {
#pragma unroll
    for (int i = 0; i < MATS; i++) {
        const uint4 *const tile = held.w + (slot * MATS + i) * Walk<FORM, MATS>::UNITS;
        if constexpr (FORM == BF16_ROWS || FORM == FP4_TILES) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t a[4];
                if constexpr (FORM == FP4_TILES) {
                    const uint32_t(&pair)[2] = held.pair(side * MATS + i);
                    fp4_fragment(tile[0], make_uint2(pair[0], pair[1]), j, a);
                } else {
                    fragment<FORM>(tile, j, {0, 0}, a);
                }
                mma(acc[i][0], a, b[0] + 2 * j);
                if (N > 1 && both) mma(acc[i][N - 1], a, b[N - 1] + 2 * j);
            }
        } else {
            float c[N][4] = {};
            const RowScales of = row_scales<FORM>(held.raw[side], 0, MATS > 1 ? i : 0, m.bf16_scales);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t a[4];
                fragment<FORM>(tile, j, of.bias, a);
                mma(c[0], a, b[0] + 2 * j);
                if (N > 1 && both) mma(c[N - 1], a, b[N - 1] + 2 * j);
            }
#pragma unroll
            for (int s = 0; s < N; s++) {
#pragma unroll
                for (int e = 0; e < 4; e++) acc[i][s][e] = fmaf(of.scale[e / 2], c[s][e], acc[i][s][e]);
            }
        }
    }
}

// Into one of the places that a walk has for scales: those of the k tile `tiles` from the cursor; `apart` as for codes.
template <int FORM, int MATS>
__device__ __forceinline__ void load_side(Held &held, int slot, const Packed &m, uint32_t from, int tiles, int apart) {
    if constexpr (FORM == FP4_TILES) {
#pragma unroll
        for (int i = 0; i < MATS; i++) {
            // A row tile has 64 bytes of codes for 8 of scales.
            const uint2 v = load_pair(m, from + uint32_t(i * (apart / 64)), tiles);
            held.pair(slot * MATS + i)[0] = v.x, held.pair(slot * MATS + i)[1] = v.y;
        }
    } else if constexpr (IS_INT4<FORM>) {
        load_int4_scales<FORM == INT4_HALVES>(held.raw[slot], m, from, tiles);
    } else if constexpr (IS_GGUF<FORM>) {
        load_words<FORM>(held.raw[slot], m, from, tiles);
    } else {
        load_scales<FORM>(held.raw[slot], m, from, tiles);
    }
}

// A warp's k tiles of a row tile: `count` of them, STRIDE apart, from the cursor on. Where a group of scales has two,
// STRIDE is even or the cursor at an even one. Row tiles of a walk are `apart` bytes apart.
struct Share {
    int count, apart;
};

// The first loads of a row tile.
template <int FORM, int MATS, int STRIDE>
__device__ __forceinline__ void start_walk(Held &held, const Packed &m, const Cursor &c, const Share &of) {
    typedef Walk<FORM, MATS> W;
#pragma unroll
    for (int s = 0; s < W::DEPTH; s++)
        if (s < of.count) load_codes<FORM, MATS>(held, s, m, c.codes + s * STRIDE * W::STEP, of.apart);
#pragma unroll
    for (int s = 0; s < W::AHEAD; s++)
        if (s < of.count) load_side<FORM, MATS>(held, s, m, c.scale, s * STRIDE, of.apart);
}

// acc += those k tiles, times the tokens. What is done with is loaded again, at the end with what start_walk would load
// of the row tile at `next`, if there is `more`.
template <int N, int FORM, int MATS, int STRIDE>
__device__ __forceinline__ void walk(Held &held, const Packed &m, const Cursor &now, const Cursor &next, bool more,
                                     const Share &of, const Tokens<N> &tokens, float (&acc)[MATS][N][4]) {
    typedef Walk<FORM, MATS> W;
    constexpr int STEP = STRIDE * W::STEP;
    const uint8_t *codes = now.codes;
#pragma unroll 1
    for (int base = 0; base < of.count; base += W::DEPTH) {
        codes += W::DEPTH * STEP;
#pragma unroll
        for (int s = 0; s < W::DEPTH; s++) {
            const int i = base + s, slot = s % W::AHEAD;
            if (i < of.count) {
                uint32_t b[N][8];
                tokens.template load<FORM>(b, i * STRIDE * TILE_K);
                if constexpr (IS_INT4<FORM>) {
                    add_int4<N, FORM == INT4_HALVES, MATS>(held, s, slot, m, b, tokens.both, acc);
                } else if constexpr (IS_GGUF<FORM>) {
                    add_gguf<N, FORM, MATS>(held, s, slot, m, b, tokens.both, acc);
                } else {
                    add_tile<N, FORM, MATS>(held, s, slot, m, b, tokens.both, acc);
                }
                const bool here = i + W::DEPTH < of.count;
                if (here || more)
                    load_codes<FORM, MATS>(held, s, m, (here ? codes : next.codes) + s * STEP, of.apart);
                const bool soon = i + W::AHEAD < of.count;
                if (soon || more)
                    load_side<FORM, MATS>(held, slot, m, soon ? now.scale : next.scale,
                                          (soon ? i + W::AHEAD : slot) * STRIDE, of.apart);
            }
        }
    }
}
