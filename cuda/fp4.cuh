// Elements of q35_fp4 with the scales of their groups in them, as bf16: which is exact, for a code has two bits that
// count and a scale four. What is left is one f32 scale, for the sums.
#pragma once
#include "device.cuh"

// What fp4_codes times fp4_scale is short of.
constexpr float FP4_REST = 128.0f;

// The scale in byte `step` of a word, times 2^119, twice.
__device__ __forceinline__ uint32_t fp4_scale(uint32_t word, int step) {
    return __byte_perm(word, 0, 0x4040 | 0x0101 * step) * 16 + 0x76807680u;
}

// The two codes of register `i` in a word. Their bits in the places of a bf16's are the number divided by 2^126, one
// half too.
__device__ __forceinline__ uint32_t fp4_codes(uint32_t word, int i) {
    const uint32_t size = i < 3 ? word << (6 - 3 * i) : word >> 3, sign = word << (3 - (i ^ 1));
    return (sign & 0x80008000u) | (size & 0x01c001c0u);
}

// Those of registers `half` and `half` + 2.
__device__ __forceinline__ void fp4_codes_of(uint32_t word, int half, uint32_t (&codes)[2]) {
    codes[0] = (word << (2 + half) & 0x80008000u) | (word << (6 - 3 * half) & 0x01c001c0u);
    codes[1] = (word << half & 0x80008000u) | (word >> 3 * half & 0x01c001c0u);
}

__device__ __forceinline__ uint32_t fp4_times(uint32_t codes, uint32_t scale) {
    const __nv_bfloat162 d =
        __hmul2(*reinterpret_cast<const __nv_bfloat162 *>(&codes), *reinterpret_cast<const __nv_bfloat162 *>(&scale));
    return *reinterpret_cast<const uint32_t *>(&d);
}

// The fragment of step `step` (0 .. 3) of a tile: its codes, and the scales of rows g and g + 8.
__device__ __forceinline__ void fp4_fragment(const uint4 &tile, const uint2 &scales, int step, uint32_t (&a)[4]) {
    const uint32_t word = step == 0 ? tile.x : step == 1 ? tile.y : step == 2 ? tile.z : tile.w;
    const uint32_t of[2] = {fp4_scale(scales.x, step), fp4_scale(scales.y, step)};
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = fp4_times(fp4_codes(word, i), of[i % 2]);
}
