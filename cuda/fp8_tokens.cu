// Rounds activations to e4m3.
#include <cuda_fp8.h>

#include "fp8_tokens.cuh"

namespace {

constexpr int BLOCK = 128;  // threads, or as many as a row takes

__device__ __forceinline__ uint32_t codes_of(float low, float high) {
    return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}
// Bits of numbers without sign are in their order, NaN last.
__device__ __forceinline__ uint32_t size_of(uint32_t pair) {
    return max(pair << 16 & 0x7fff0000u, pair & 0x7fff0000u);
}

// `threads` of a block have a row, up to V eights of neighbours each.
template <int V>
__global__ void __launch_bounds__(V > 4 ? 1024 : 512)
    round_kernel(int64_t n, int k, int threads, const bf16 *x, uint2 *codes, float *scales) {
    __shared__ uint32_t sizes[32];
    let_next_start();
    wait_for_inputs();
    const int own = threadIdx.x / threads, thread = threadIdx.x % threads, rows = blockDim.x / threads;
    const int64_t row = int64_t(blockIdx.x) * rows + own;
    const bool there = row < n;
    const uint4 *const from = reinterpret_cast<const uint4 *>(x + (there ? row : 0) * k);
    uint4 v[V];
    uint32_t size = 0;
#pragma unroll
    for (int i = 0; i < V; i++) {
        const int at = thread + i * threads;
        v[i] = at < k / 8 ? from[at] : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < V; i++)
        size = max(max(size, max(size_of(v[i].x), size_of(v[i].y))), max(size_of(v[i].z), size_of(v[i].w)));
    size = __reduce_max_sync(ALL_LANES, size);
    if (threads > 32) {  // then a row is all of the block's
        if (threadIdx.x % 32 == 0) sizes[threadIdx.x / 32] = size;
        __syncthreads();
        for (int i = 0; i < threads / 32; i++) size = max(size, sizes[i]);
    }
    const float scale = size < 0x7f800000u ? __uint_as_float(size) / 448.f : __uint_as_float(0x7fc00000u);
    if (thread == 0 && there) scales[row] = scale;
    uint2 *const to = codes + (there ? row : 0) * (k / 8);
#pragma unroll
    for (int i = 0; i < V; i++) {
        float y[8];
        unpack8(v[i], y);
        uint32_t words[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint32_t low = codes_of(y[4 * h] / scale, y[4 * h + 1] / scale);
            words[h] = low | codes_of(y[4 * h + 2] / scale, y[4 * h + 3] / scale) << 16;
        }
        // Of 16 elements this lane has 8, its neighbour the others: the even one writes the first four of both.
        const bool even = thread % 2 == 0;
        const uint32_t other = __shfl_xor_sync(ALL_LANES, even ? words[1] : words[0], 1);
        const uint32_t first = even ? words[0] : other, second = even ? other : words[1];
        uint2 mixed = make_uint2(__byte_perm(first, second, 0x5140), __byte_perm(first, second, 0x7362));
        if (scale == 0.f) mixed = make_uint2(0, 0);
        const int at = thread + i * threads;
        if (there && at < k / 8) to[at] = mixed;
    }
}

}  // namespace

cudaError_t launch_fp8_tokens(cudaStream_t stream, int64_t n, int k, const bf16 *x, const Fp8Tokens &to) {
    const bool many = k > 4 * 8 * 512;
    const int threads = ceil_div(k, (many ? 8 : 4) * 8 * 32) * 32;  // whole warps
    const int rows = threads > 32 ? 1 : BLOCK / threads;
    if (threads > 1024 || ceil_div(n, int64_t(rows)) > INT32_MAX) return cudaErrorInvalidValue;
    return launch(many ? round_kernel<8> : round_kernel<4>, unsigned(ceil_div(n, int64_t(rows))), threads * rows, 0,
                  stream, n, k, threads, x, reinterpret_cast<uint2 *>(to.codes), to.scales);
}
