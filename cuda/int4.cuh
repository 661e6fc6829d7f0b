// Codes of 4 bits as bf16, for kernels that take their zero points off the sums.
#pragma once
#include "device.cuh"

// (x & mask) | bits in one instruction; left to itself the compiler takes two.
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
    return y;
}

// The fragment of a step of k 16, of whose codes a lane has a word: 16 + code. A bf16 from 16 to 31 counts in eighths,
// so that the code stands in the upper bits of its fraction. What that adds to a sum is 16 times the sum of x; a base
// of 128, with the code in the lowest bits, would take one shift less and cost eight times as much of the sum's
// precision.
__device__ __forceinline__ void int4_fragment(uint32_t word, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = and_or(i == 0 ? word << 3 : word >> (4 * i - 3), 0x00780078u, 0x41804180u);
}

__device__ __forceinline__ uint32_t bf16_sub(uint32_t a, uint32_t b) {
    const __nv_bfloat162 d =
        __hsub2(*reinterpret_cast<const __nv_bfloat162 *>(&a), *reinterpret_cast<const __nv_bfloat162 *>(&b));
    return *reinterpret_cast<const uint32_t *>(&d);
}
