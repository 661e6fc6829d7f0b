// Activations rounded to e4m3, with a scale for each row: what Hopper's tensor cores multiply with codes of weights at
// twice the rate of bf16.
#pragma once
#include "device.cuh"

struct e4m3 {
    uint8_t bits;
};

// Rows [n, k], k a multiple of 128 up to 65,536, and scales [n]. The elements of each 16 are in the order 0, 8, 1, 9, .., 7, 15,
// in which load_bytes (packed_wgmma_bytes.cuh) has those of a row of weights: a word of 4-bit codes holds 2 t, 2 t + 8,
// 2 t + 1 and 2 t + 9 of it, a byte apart.
struct Fp8Tokens {
    e4m3 *codes;
    float *scales;
};

inline int64_t fp8_token_bytes(int64_t n, int64_t k) { return n * k + ceil_div(n, int64_t(4)) * 16; }
// Where they lie in memory, 16-byte aligned.
inline Fp8Tokens fp8_tokens_at(void *memory, int64_t n, int64_t k) {
    e4m3 *const codes = static_cast<e4m3 *>(memory);
    return {codes, reinterpret_cast<float *>(codes + n * k)};
}

// From rows x [n, k], 16-byte aligned. A scale is max |x| / 448, a code that of x / scale, to nearest even; a row of zeros
// has scale 0 and codes 0, one with an infinity or a NaN in it is NaN.
cudaError_t launch_fp8_tokens(cudaStream_t stream, int64_t n, int k, const bf16 *x, const Fp8Tokens &to);
