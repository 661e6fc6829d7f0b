// Packed weights (q35_packed) on the way to the tensor cores: what a lane loads of a matrix, the fragments of its
// codes, and the sums of its groups.
#pragma once
#include <cuda_fp16.h>

#include "fp4.cuh"
#include "gguf.cuh"
#include "int4.cuh"
#include "mma.cuh"

// What codes are; the last three are GGUF's (gguf.cuh).
enum Codes { INT4_CODES, FP8_CODES, FP4_CODES, K4_CODES, K6_CODES, INT8_CODES };
template <int OF>
constexpr bool IS_GGUF = OF >= K4_CODES;
template <int OF>
constexpr int GGUF_BITS = OF == K4_CODES ? 4 : OF == K6_CODES ? 6 : 8;

constexpr int PACKED_ROWS = 16;  // of a tile
constexpr int UNIT_K = 128;      // elements along k that a warp takes at a time: two tiles

// packed_many.cu: the product of more than 16 rows, with weights that have been checked. fp8_tokens: as `memory` of
// q35_fp8_token_linear.
cudaError_t launch_packed_many(cudaStream_t stream, int n, const q35_packed &w, const bf16 *x, void *out, bool wide,
                               int stride, void *fp8_tokens);

// For weights, which are read once: the first to leave L2, where the next kernel's may wait already.
__device__ __forceinline__ uint64_t first_to_leave() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// 16 bytes of weights. This and the next are in the order of the program: ahead of what uses them.
__device__ __forceinline__ uint4 load_once16(const void *from, uint64_t policy) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(__cvta_generic_to_global(from)), "l"(policy));
    return v;
}

__device__ __forceinline__ uint32_t load_word(const void *from) {
    uint32_t v;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(from)));
    return v;
}
__device__ __forceinline__ uint32_t load_half_word(const void *from) {
    unsigned short v;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(__cvta_generic_to_global(from)));
    return v;
}

__device__ __forceinline__ uint2 load_once8(const void *from, uint64_t policy) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.L2::128B.v2.u32 {%0, %1}, [%2], %3;"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(__cvta_generic_to_global(from)), "l"(policy));
    return v;
}

// Both a multiple of 16.
__device__ __forceinline__ void ask_for(const void *from, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)), "r"(bytes)
                 : "memory");
#endif
}

// What a lane holds of a unit: 16 bytes of each half KB of its codes, and a word of scales and of zero points, which
// the lanes pass on to each other.
template <int OF>
struct Unit {
    uint4 codes[OF == FP8_CODES || OF == INT8_CODES ? 4 : 2];
    uint32_t scale, zero;
};
// Of fp4 each lane has the scales of its own rows, by tile.
template <>
struct Unit<FP4_CODES> {
    uint4 codes[2];
    uint2 scales[2];
};
// `scale`: of GGUF's the word of row lane % 16 in tile lane / 16, `zero`: that row's d and dmin.
template <>
struct Unit<K6_CODES> {
    uint4 codes[2];
    uint2 upper[2];
    uint32_t scale, zero;
};

// Where a lane reads: of a unit the codes, and the word of scales.
struct Cursor {
    const unsigned char *codes;
    uint32_t word;
};

// What one lane loads of a matrix, of whose units along k its warp has `warp`, `warp` + WARPS, ... A scale is for STEPS
// steps of k 16: 1, 2, 4 or 8.
template <int OF, int STEPS, int WARPS>
struct Source {
    static constexpr bool FP8 = OF == FP8_CODES, FP4 = OF == FP4_CODES;
    static constexpr int GROUPS = 8 / STEPS;  // of a unit
    static constexpr bool GGUF = IS_GGUF<OF>;
    static constexpr int TILE = FP8 || OF == INT8_CODES ? 1024 : OF == K6_CODES ? 768 : 512;
    static constexpr int CODES = WARPS * 2 * TILE;  // from unit to unit of a warp
    const void *scales;
    const uint8_t *zeros;  // of GGUF's: d and dmin
    uint64_t policy;
    Cursor start;                     // of row tile 0
    int tile_codes, tile_words;       // from row tile to row tile
    int words;                        // from unit to unit of a warp
    int upper;                        // from codes of 6 bits to the rest of them
    int short_unit;                   // of the warp's: the one that has one tile, if there is one
    int scaled;                       // of the warp's units, the first so many have scales for this lane

    __device__ __forceinline__ Source(const q35_packed &w, int warp, int lane) {
        scales = w.scales, zeros = w.zeros, policy = first_to_leave();
        const bool alone = FP8 && w.kind == q35_fp8_block;  // a scale for all rows of a tile
        const int groups = alone ? ceil_div(w.k, UNIT_K) : FP8 || GGUF || w.group >= w.k ? 1 : ceil_div(w.k, w.group);
        const int moved = !alone && groups == 1 ? 0 : GROUPS;  // groups that a unit moves on by; 0: rows have one scale
        const int each = !FP8 ? 8 : alone ? 1 : 16;            // words of a group; of int4 one is for two rows
        const int word = lane % (GROUPS * each), k_tiles = w.k / 64;
        start.codes = static_cast<const unsigned char *>(w.codes) + (warp * 2 * TILE + 16 * lane);
        start.word = warp * moved * each + word;
        tile_codes = k_tiles * TILE, tile_words = groups * each, words = WARPS * moved * each;
        // Words of fp4 have 8 bytes: a tile has one for each of the 8 g.
        if (FP4) start.word = warp * 16 + lane / 4, tile_words = k_tiles * 8, words = WARPS * 16;
        if (GGUF) {
            start.word = warp * 32 + lane, tile_words = k_tiles * 16, words = WARPS * 32, upper = 512 - 8 * lane;
            zeros = static_cast<const uint8_t *>(scales) + int64_t(w.rows) * (w.k / 16);
        }
        short_unit = k_tiles % 2 != 0 && k_tiles / 2 % WARPS == warp ? k_tiles / 2 / WARPS : -1;
        scaled = moved == 0 ? w.k : (groups - word / each - warp * GROUPS + WARPS * GROUPS - 1) / (WARPS * GROUPS);
    }

    __device__ __forceinline__ void move_tiles(Cursor &at, int tiles) const {
        at.codes += int64_t(tiles) * tile_codes, at.word += tiles * tile_words;
    }
    __device__ __forceinline__ void move_units(Cursor &at, int units) const {
        at.codes += units * CODES, at.word += units * words;
    }

    // This lane's part of the warp's unit `unit`, which is `further` units from the cursor. Codes of a tile that is not
    // there stay what they are, and stand against zeros of x; scales past the last group are zeros.
    __device__ __forceinline__ void load(Unit<OF> &to, const Cursor &at, int further, int unit) const {
        constexpr int PIECES = TILE / 512;
        const unsigned char *from = at.codes + further * CODES;
        const uint32_t word = at.word + further * words;
        if constexpr (FP4) {
            const uint2 *const side = static_cast<const uint2 *>(scales) + word;
            to.scales[0] = load_once8(side, policy);
            to.codes[0] = load_once16(from, policy);
            if (unit == short_unit) return;
            to.scales[1] = load_once8(side + 8, policy);
            to.codes[1] = load_once16(from + TILE, policy);
        } else if constexpr (GGUF) {
            to.scale = load_word(static_cast<const uint32_t *>(scales) + word);
            if (OF != INT8_CODES) to.zero = load_word(zeros + 4 * int64_t(word / 32 * 16 + word % 16));
#pragma unroll
            for (int tile = 0; tile < 2; tile++) {
#pragma unroll
                for (int i = 0; i < PIECES; i++) {
                    to.codes[tile * PIECES + i] = load_once16(from + TILE * tile + 512 * i, policy);
                }
                if constexpr (OF == K6_CODES) to.upper[tile] = load_once8(from + TILE * tile + upper, policy);
            }
        } else {
            if (GROUPS > 1) to.scale = to.zero = 0;
            if (GROUPS == 1 || unit < scaled) {
                to.scale = load_word(static_cast<const uint32_t *>(scales) + word);
                if (!FP8 && zeros != nullptr) to.zero = load_half_word(zeros + 2 * int64_t(word));
            }
#pragma unroll
            for (int i = 0; i < PIECES; i++) to.codes[i] = load_once16(from + 512 * i, policy);
            if (unit == short_unit) return;
#pragma unroll
            for (int i = 0; i < PIECES; i++) to.codes[PIECES + i] = load_once16(from + TILE + 512 * i, policy);
        }
    }
};

// Keeps the compiler from working a number out anew wherever it is used.
__device__ __forceinline__ void keep(uint32_t &x) { asm volatile("" : "+r"(x)); }

// Two e4m3 codes, in the upper bytes of the halves of a word, as bf16. Their bits in the places of a bf16's are the
// number divided by 2^120, small ones too.
__device__ __forceinline__ uint32_t from_e4m3(uint32_t codes) {
    uint32_t bits = (codes & 0x80008000u) | ((codes >> 4) & 0x07f007f0u), by = 0x7b807b80u;
    __nv_bfloat162 d = __hmul2(*reinterpret_cast<__nv_bfloat162 *>(&bits), *reinterpret_cast<__nv_bfloat162 *>(&by));
    return *reinterpret_cast<uint32_t *>(&d);
}

// The fragment of step `step` (0 .. 3) of a tile, of which a lane has one (int4) or two (fp8) pieces of 16 bytes.
template <bool FP8>
__device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint4 *tile, int step) {
    if (FP8) {
        const uint4 half = tile[step / 2];
        const uint32_t first = step % 2 == 0 ? half.x : half.z, second = step % 2 == 0 ? half.y : half.w;
        a[0] = from_e4m3(first << 8), a[1] = from_e4m3(first);
        a[2] = from_e4m3(second << 8), a[3] = from_e4m3(second);
    } else {
        const uint32_t word = step == 0 ? tile[0].x : step == 1 ? tile[0].y : step == 2 ? tile[0].z : tile[0].w;
        int4_fragment(word, a);
    }
}

// Sums over a unit, fragments of c: those of each of its tiles apart, which hides the latency of the tensor cores, and
// of each group.
template <int STEPS, int N>
struct UnitSums {
    static constexpr int PARTS = STEPS < 4 ? 4 / STEPS : 1;  // groups of a tile
    float acc[2][PARTS][N][4];

    __device__ __forceinline__ float of(int group, int i, int e) const {
        return STEPS == 8 ? acc[0][0][i][e] + acc[1][0][i][e]
                          : acc[STEPS == 4 ? group : group / PARTS][PARTS > 1 ? group % PARTS : 0][i][e];
    }
};

// take(a, tile, step) gives the left fragment of a step. x[i]: this lane's address of rows 8 i .. 8 i + 7 for
// load_matrices, at the unit's first element of k.
template <int STEPS, int N, typename Take>
__device__ __forceinline__ void multiply_unit(const uint32_t (&x)[N], UnitSums<STEPS, N> &sums, Take take) {
    sums = {};
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            uint32_t b[N][4];
#pragma unroll
            for (int i = 0; i < N; i++) load_matrices(b[i], x[i] + 128 * tile + 64 * pair);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                uint32_t a[4];
                take(a, tile, 2 * pair + j);
#pragma unroll
                for (int i = 0; i < N; i++)
                    mma(sums.acc[tile][STEPS == 1 ? 2 * pair + j : STEPS == 2 ? pair : 0][i], a, b[i] + 2 * j);
            }
        }
    }
}

// What a lane takes of words that hold the scales, or zero points, of rows 2 i and 2 i + 1: `scale` moves its half up.
struct Picks {
    uint32_t scale, from;
    uint32_t bf16;  // of int4: all ones where scales are bf16, else zeros
    __device__ __forceinline__ Picks(int lane, int kind) {
        scale = lane / 4 % 2 != 0 ? 0x3244 : 0x1044, from = lane / 8;
        bf16 = kind == q35_int4_bf16 ? 0xffffffffu : 0;
        keep(scale), keep(from);
    }
    // 2^23 + the lane's zero point, as f32.
    __device__ __forceinline__ float counted(uint32_t pair) const {
        return __uint_as_float(__byte_perm(pair, 0x4b000000u, 0x7440 | scale >> 13));
    }
};

// By group of a unit, for rows g and g + 8: the scale, and 16 + the zero point of int4.
template <int OF, int STEPS>
struct UnitScales {
    static constexpr bool FP8 = OF == FP8_CODES;
    float scale[8 / STEPS][2], zero[8 / STEPS][2];

    __device__ __forceinline__ UnitScales(const Unit<OF> &unit, int lane, const Picks &picks, bool has_zeros) {
#pragma unroll
        for (int group = 0; group < 8 / STEPS; group++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                if (FP8) {
                    scale[group][r] = __uint_as_float(__shfl_sync(ALL_LANES, unit.scale, lane / 4 + 8 * r));
                    continue;
                }
                const uint32_t pair = __shfl_sync(ALL_LANES, unit.scale, picks.from + 8 * group + 4 * r);
                const uint32_t high = __byte_perm(pair, 0, picks.scale);
                const float of_f16 = __half2float(__ushort_as_half(static_cast<unsigned short>(high >> 16)));
                scale[group][r] = __uint_as_float((high & picks.bf16) | (__float_as_uint(of_f16) & ~picks.bf16));
                zero[group][r] = 24.0f;
            }
        }
        if constexpr (!FP8) {
            if (!has_zeros) return;
#pragma unroll
            for (int group = 0; group < 8 / STEPS; group++) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const uint32_t pair = __shfl_sync(ALL_LANES, unit.zero, picks.from + 8 * group + 4 * r);
                    zero[group][r] = picks.counted(pair) - 8388592.0f;
                }
            }
        }
    }
};
// Of fp4 they are in the fragments.
template <int STEPS>
struct UnitScales<FP4_CODES, STEPS> {
    __device__ __forceinline__ UnitScales(const Unit<FP4_CODES> &, int, const Picks &, bool) {}
};
// Of GGUF's: `zero` is by 32 of k what is taken off for the sum of x, of 4 bits with the 16 of int4_fragment.
template <int OF>
struct GgufUnitScales {
    static constexpr int BITS = GGUF_BITS<OF>, PARTS = GgufScales<BITS>::PARTS;
    float scale[2 * PARTS][2], zero[4][2];

    __device__ __forceinline__ GgufUnitScales(const Unit<OF> &unit, int lane, const Picks &, bool minima) {
        const GgufScales<BITS> own = gguf_scales<BITS>(unit.scale, unit.zero, minima);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int tile = i / 2, r = i % 2, from = 16 * tile + 8 * r + lane / 4;
#pragma unroll
            for (int part = 0; part < PARTS; part++)
                scale[PARTS * tile + part][r] = __shfl_sync(ALL_LANES, own.scale[part], from);
            if constexpr (BITS != 8) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float min = BITS == 4 ? fmaf(16.0f, own.scale[half], own.min[half]) : own.min[half];
                    zero[2 * tile + half][r] = __shfl_sync(ALL_LANES, min, from);
                }
            }
        }
    }
};
