// Elements of GGUF's K-quants and Q8_0 (q35_q4_k .. q35_q8_0): codes as integers in bf16, which is exact, and what they
// are multiplied with.
#pragma once
#include <cuda_fp16.h>

#include "int4.cuh"

// Of a row in a tile: by half, of 6 bits by step of k 16, the scales, and by half what is taken off.
template <int BITS>
struct GgufScales {
    static constexpr int PARTS = BITS == 6 ? 4 : 2;
    float scale[PARTS], min[2];
};

// From the row's two words; of 8 bits there is one. `minima`: q4_k and q5_k.
template <int BITS>
__device__ __forceinline__ GgufScales<BITS> gguf_scales(uint32_t word, uint32_t whole, bool minima) {
    const auto half = [](uint32_t bits) {
        return __half2float(__ushort_as_half(static_cast<unsigned short>(bits & 0xffff)));
    };
    GgufScales<BITS> of;
    if constexpr (BITS == 8) {
        of.scale[0] = half(word), of.scale[1] = half(word >> 16);
        of.min[0] = of.min[1] = 0.0f;
    } else {
        // 2^23 + a byte, as f32.
        const auto counted = [&](int i) {
            return __uint_as_float(__byte_perm(word, 0x4b000000u, static_cast<unsigned>(0x7440 | i)));
        };
        const float d = half(whole), m = half(whole >> 16);
        const bool halves = BITS == 4 || minima;  // else by step, plus 128, and m is 0
        const float base = halves ? 8388608.0f : 8388736.0f;
#pragma unroll
        for (int i = 0; i < of.PARTS; i++)
            of.scale[i] = d * (counted(BITS == 4 ? i : halves ? i / 2 : i) - base);
#pragma unroll
        for (int i = 0; i < 2; i++) of.min[i] = m * (counted(2 + i) - 8388608.0f);
    }
    return of;
}

// What stands for the codes of a step of k 16: of 4 bits a word, of 6 also the word of upper bits, of 8 two.
template <int BITS>
__device__ __forceinline__ void gguf_words(const uint4 *tile, const uint2 &upper, int step, uint32_t (&words)[2]) {
    if (BITS == 8) {
        const uint4 half = tile[step / 2];
        words[0] = step % 2 == 0 ? half.x : half.z, words[1] = step % 2 == 0 ? half.y : half.w;
    } else {
        words[0] = step == 0 ? tile[0].x : step == 1 ? tile[0].y : step == 2 ? tile[0].z : tile[0].w;
        words[1] = step < 2 ? upper.x : upper.y;
    }
}

// What is taken off codes of 6 bits, which stand in bf16 from 128 to 191, twice.
__device__ __forceinline__ uint32_t gguf_bias(bool minima) { return minima ? 0x43004300u : 0x43204320u; }

// Two bytes in the lower halves' places. A bf16 from 128 on has seven bits behind the first: the eighth, of 128, is
// taken off.
__device__ __forceinline__ uint32_t from_int8(uint32_t codes) {
    return bf16_sub(and_or(codes, 0x007f007fu, 0x43004300u), and_or(codes, 0x00800080u, 0x43004300u));
}

// The elements of registers `half` and `half` + 2 of a step, not scaled.
template <int BITS>
__device__ __forceinline__ void gguf_codes(const uint32_t (&words)[2], int step, int half, uint32_t bias,
                                           uint32_t (&to)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (BITS == 8) {
            to[i] = from_int8(words[i] >> 8 * half);
        } else {
            uint32_t codes = and_or(words[0] >> 4 * half >> 8 * i, 0x000f000fu, 0x43004300u);
            if (BITS == 6) {
                const int right = 8 * (step % 2) + 4 * i - 4;
                codes = and_or(right < 0 ? words[1] << (4 - 2 * half) : words[1] >> (max(right, 0) + 2 * half),
                               0x00300030u, codes);
            }
            to[i] = bf16_sub(codes, BITS == 6 ? bias : 0x43004300u);
        }
    }
}

// The fragment of a step, not scaled.
template <int BITS>
__device__ __forceinline__ void gguf_fragment(const uint32_t (&words)[2], int step, uint32_t bias, uint32_t (&a)[4]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t to[2];
        gguf_codes<BITS>(words, step, half, bias, to);
        a[half] = to[0], a[half + 2] = to[1];
    }
}

// Two elements, rounded to bf16.
__device__ __forceinline__ uint32_t gguf_times(uint32_t codes, float scale, float min) {
    const float2 x = unpack2(codes);
    return pack2(fmaf(x.x, scale, -min), fmaf(x.y, scale, -min));
}
