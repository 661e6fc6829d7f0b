// Packed weights (q35_packed) on the way to the tensor cores: a ring of stages in shared memory, what a lane copies to
// it, the fragments of its codes, and the sums of its groups.
#pragma once
#include <cuda_fp16.h>

#include "mma.cuh"

constexpr int PACKED_ROWS = 16;  // of a tile
constexpr int UNIT_K = 128;      // elements along k that a warp takes at a time: two tiles

// A stage of a ring holds a unit: the codes of its tiles, then scales, then zero points. A scale is for STEPS steps of
// k 16: 2, 4 or 8.
template <bool FP8, int STEPS>
struct Stage {
    static constexpr int GROUPS = 8 / STEPS;
    static constexpr int TILE = FP8 ? 1024 : 512;
    static constexpr int CODES = 2 * TILE;
    static constexpr int BYTES = CODES + (FP8 ? 64 : 48 * GROUPS);
};

// packed_many.cu: the product of more than 16 rows, with weights that have been checked.
cudaError_t launch_packed_many(cudaStream_t stream, int n, const q35_packed &w, const bf16 *x, void *out, bool wide,
                               int stride);

// For weights, which are read once: the first to leave L2, where the next kernel's may wait already.
__device__ __forceinline__ uint64_t first_to_leave() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// 16 bytes of weights to shared memory; zeros, and nothing is read, where `there` is false.
__device__ __forceinline__ void copy_once16(uint32_t to, const void *from, bool there, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0), "l"(policy)
                 : "memory");
}

__device__ __forceinline__ void copy4(uint32_t to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(__cvta_generic_to_global(from)) : "memory");
}

// Both a multiple of 16.
__device__ __forceinline__ void ask_for(const void *from, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)), "r"(bytes)
                 : "memory");
#endif
}

// What one lane copies of a matrix.
template <bool FP8, int STEPS>
struct Source {
    using S = Stage<FP8, STEPS>;
    const unsigned char *codes, *side;  // this lane's: of codes, and of scales or zero points
    int k_tiles, num_groups;
    int unit_groups;  // groups that a unit moves on by; 0: rows have one scale
    int side_bytes;   // from group to group
    int side_group;   // of those of a unit, whose this lane copies
    bool has_side, alone;  // alone: a scale for all rows of a tile

    __device__ __forceinline__ Source(const q35_packed &w, int lane) {
        codes = static_cast<const unsigned char *>(w.codes) + 16 * lane;
        k_tiles = w.k / 64;
        alone = FP8 && w.kind == q35_fp8_block;
        num_groups = alone ? ceil_div(w.k, UNIT_K) : FP8 || w.group >= w.k ? 1 : ceil_div(w.k, w.group);
        unit_groups = !alone && num_groups == 1 ? 0 : S::GROUPS;
        side = static_cast<const unsigned char *>(w.scales) + 16 * lane;
        if (FP8) {
            side_bytes = alone ? 4 : 64, side_group = 0, has_side = lane < (alone ? 1 : 4);
        } else {
            const bool scale = lane < 2 * S::GROUPS;
            side_group = scale ? lane / 2 : lane - 2 * S::GROUPS, side_bytes = scale ? 32 : 16;
            has_side = scale || (w.zeros != nullptr && lane < 3 * S::GROUPS);
            if (!scale && has_side) side = w.zeros + 16 * side_group;
        }
    }

    // This lane's part of a unit of a row tile, to a stage. Past the end of k codes and scales are zeros.
    __device__ __forceinline__ void copy(uint32_t stage, int tile, int unit, int lane, uint64_t policy) const {
        const unsigned char *from = codes + int64_t(tile * k_tiles + 2 * unit) * S::TILE;
        const uint32_t to = stage + 16 * lane;
        const bool whole = 2 * unit + 1 < k_tiles;
#pragma unroll
        for (int i = 0; i < S::CODES; i += 512) {
            copy_once16(to + i, from + i, i < S::TILE || whole, policy);
        }
        if (!has_side) return;
        const int group = unit * unit_groups;
        const unsigned char *scale = side + int64_t(tile * num_groups + group) * side_bytes;
        if (FP8 && alone) {
            copy4(to + S::CODES, scale);
        } else {
            copy_once16(to + S::CODES, scale, group + side_group < num_groups, policy);
        }
    }
};

// (x & mask) | bits in one instruction; left to itself the compiler takes two.
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
    return y;
}

__device__ __forceinline__ uint32_t subtract2(uint32_t a, uint32_t b) {
    __nv_bfloat162 d = __hsub2(*reinterpret_cast<__nv_bfloat162 *>(&a), *reinterpret_cast<__nv_bfloat162 *>(&b));
    return *reinterpret_cast<uint32_t *>(&d);
}

// Two e4m3 codes, in the upper bytes of the halves of a word, as bf16. Their bits in the places of a bf16's are the
// number divided by 2^120, small ones too.
__device__ __forceinline__ uint32_t from_e4m3(uint32_t codes) {
    uint32_t bits = (codes & 0x80008000u) | ((codes >> 4) & 0x07f007f0u), by = 0x7b807b80u;
    __nv_bfloat162 d = __hmul2(*reinterpret_cast<__nv_bfloat162 *>(&bits), *reinterpret_cast<__nv_bfloat162 *>(&by));
    return *reinterpret_cast<uint32_t *>(&d);
}

// The fragment of step `step` (0 .. 3) of a tile, of which a lane has one (int4) or two (fp8) pieces of 16 bytes.
// zeros: 128 + the zero point of rows g and g + 8, as bf16, twice.
template <bool FP8>
__device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint4 *tile, int step, const uint32_t (&zeros)[2]) {
    if (FP8) {
        const uint4 half = tile[step / 2];
        const uint32_t first = step % 2 == 0 ? half.x : half.z, second = step % 2 == 0 ? half.y : half.w;
        a[0] = from_e4m3(first << 8), a[1] = from_e4m3(first);
        a[2] = from_e4m3(second << 8), a[3] = from_e4m3(second);
    } else {
        const uint32_t word = step == 0 ? tile[0].x : step == 1 ? tile[0].y : step == 2 ? tile[0].z : tile[0].w;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // A bf16 from 128 to 255 counts in ones.
            a[i] = subtract2(and_or(word >> (4 * i), 0x000f000fu, 0x43004300u), zeros[i % 2]);
        }
    }
}

// The scales of rows g and g + 8 of a group of a unit.
template <bool FP8, int STEPS>
__device__ __forceinline__ float2 scales_of(const unsigned char *stage, int group, int g, int kind) {
    const unsigned char *from = stage + Stage<FP8, STEPS>::CODES;
    if (FP8) {
        const float *scales = reinterpret_cast<const float *>(from);
        return kind == q35_fp8_block ? make_float2(scales[0], scales[0]) : make_float2(scales[g], scales[g + 8]);
    }
    const unsigned short *scales = reinterpret_cast<const unsigned short *>(from) + 16 * group + g;
    const unsigned short low = scales[0], high = scales[8];
    if (kind == q35_int4_bf16) return make_float2(__uint_as_float(low << 16), __uint_as_float(uint32_t(high) << 16));
    return make_float2(__half2float(__ushort_as_half(low)), __half2float(__ushort_as_half(high)));
}

// sums[i], a fragment of c, += a unit in a stage times rows 8 i .. 8 i + 7 of x. x[i]: this lane's address of them for
// load_matrices, at the unit's first element of k. Each tile of a unit has sums of its own, which hides the latency of
// the tensor cores; groups are added in their order.
template <bool FP8, int STEPS, int N>
__device__ __forceinline__ void multiply_unit(const unsigned char *stage, const uint32_t (&x)[N], int lane, int kind,
                                              bool has_zeros, float (&sums)[N][4]) {
    using S = Stage<FP8, STEPS>;
    constexpr int PARTS = STEPS == 2 ? 2 : 1;  // groups of a tile
    const int g = lane / 4;
    uint4 codes[S::CODES / 512];
#pragma unroll
    for (int i = 0; i < S::CODES / 512; i++) codes[i] = reinterpret_cast<const uint4 *>(stage + 512 * i)[lane];
    uint32_t zeros[S::GROUPS][2];
#pragma unroll
    for (int i = 0; i < S::GROUPS; i++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            zeros[i][r] = 0x43084308u;
            if (!FP8 && has_zeros) {
                zeros[i][r] = 0x43004300u + stage[S::CODES + 32 * S::GROUPS + 16 * i + g + 8 * r] * 0x00010001u;
            }
        }
    }
    float acc[2][PARTS][N][4] = {};
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            uint32_t b[N][4];
#pragma unroll
            for (int i = 0; i < N; i++) load_matrices(b[i], x[i] + 128 * tile + 64 * pair);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                constexpr int PIECES = S::TILE / 512;
                const int step = 2 * pair + j, group = (4 * tile + step) / STEPS;
                uint32_t a[4];
                fragment<FP8>(a, codes + PIECES * tile, step, zeros[group]);
#pragma unroll
                for (int i = 0; i < N; i++) mma(acc[tile][PARTS == 2 ? pair : 0][i], a, b[i] + 2 * j);
            }
        }
    }
#pragma unroll
    for (int group = 0; group < S::GROUPS; group++) {
        const float2 scale = scales_of<FP8, STEPS>(stage, group, g, kind);
#pragma unroll
        for (int i = 0; i < N; i++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float sum = STEPS == 8 ? acc[0][0][i][e] + acc[1][0][i][e]
                                             : acc[STEPS == 4 ? group : group / 2][PARTS == 2 ? group % 2 : 0][i][e];
                sums[i][e] = fmaf(e < 2 ? scale.x : scale.y, sum, sums[i][e]);
            }
        }
    }
}
