// Rounds activations to e4m3.
#include <cuda_fp8.h>

#include "fp8_tokens.cuh"

namespace {

constexpr int THREADS = 128;

__device__ __forceinline__ uint32_t codes_of(float low, float high) {
    return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}
// Bits of numbers without sign are in their order, NaN last.
__device__ __forceinline__ uint32_t size_of(float2 x) {
    return max(__float_as_uint(fabsf(x.x)), __float_as_uint(fabsf(x.y)));
}

// A row a block. Of each 16 elements four threads have 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
__global__ void __launch_bounds__(THREADS) round_kernel(int k, const bf16 *x, uint32_t *codes, float *scales) {
    __shared__ uint32_t sizes[THREADS / 32];
    let_next_start();
    wait_for_inputs();
    const int thread = threadIdx.x;
    const uint4 *const row = reinterpret_cast<const uint4 *>(x + int64_t(blockIdx.x) * k);
    uint32_t size = 0;
    for (int i = thread; i < k / 8; i += THREADS) {
        const uint4 v = row[i];
        size = max(max(size, size_of(unpack2(v.x))), max(size_of(unpack2(v.y)), size_of(unpack2(v.z))));
        size = max(size, size_of(unpack2(v.w)));
    }
    size = __reduce_max_sync(ALL_LANES, size);
    if (thread % 32 == 0) sizes[thread / 32] = size;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) size = max(size, sizes[i]);
    const float scale = size < 0x7f800000u ? __uint_as_float(size) / 448.f : __uint_as_float(0x7fc00000u);
    if (thread == 0) scales[blockIdx.x] = scale;
    const uint32_t *const pairs = reinterpret_cast<const uint32_t *>(row);
    uint32_t *const to = codes + int64_t(blockIdx.x) * (k / 4);
    for (int i = thread; i < k / 4; i += THREADS) {
        const int at = i / 4 * 8 + i % 4;
        const float2 low = unpack2(pairs[at]), high = unpack2(pairs[at + 4]);
        const uint32_t even = codes_of(low.x / scale, high.x / scale), odd = codes_of(low.y / scale, high.y / scale);
        to[i] = scale == 0.f ? 0 : even | odd << 16;
    }
}

}  // namespace

cudaError_t launch_fp8_tokens(cudaStream_t stream, int64_t n, int k, const bf16 *x, const Fp8Tokens &to) {
    if (n > INT32_MAX) return cudaErrorInvalidValue;
    return launch(round_kernel, unsigned(n), THREADS, 0, stream, k, x, reinterpret_cast<uint32_t *>(to.codes), to.scales);
}
