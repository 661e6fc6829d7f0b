// What a card can do, measured: the floors that speeds are set beside.
#include "device.cuh"

namespace {

constexpr int THREADS = 512, AHEAD = 8;  // 16-byte loads of a thread that are under way together

__global__ void __launch_bounds__(THREADS) read_kernel(int64_t n, const uint4 *x, uint32_t *out) {
    const int64_t step = int64_t(gridDim.x) * THREADS * AHEAD;
    uint32_t mixed = 0;
    for (int64_t first = int64_t(blockIdx.x) * THREADS * AHEAD + threadIdx.x; first < n; first += step) {
        uint4 v[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int64_t at = first + i * THREADS;
            v[i] = at < n ? __ldcs(x + at) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) mixed ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
    }
    // Never so: it keeps the loads from being left out.
    if (mixed == 0x9e3779b9u && n < 0) *out = mixed;
}

}  // namespace

extern "C" int q35_read(void *stream, int64_t num_bytes, const void *x, uint32_t *out) {
    if (num_bytes < 16) return cudaSuccess;
    read_kernel<<<132 * 16, THREADS, 0, as_stream(stream)>>>(num_bytes / 16, static_cast<const uint4 *>(x), out);
    return cudaGetLastError();
}
