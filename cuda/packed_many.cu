// Products of more than 16 rows with packed weights, on tensor cores. Own code.
#include "packed_many.cuh"
#include "packed_tiles.cuh"
#include "packed_wgmma.cuh"

namespace {

constexpr int TOGETHER = 16;  // tiles of tokens whose blocks follow one another for the same weights

// A block: ROW_WARPS pairs of row tiles by TOKENS tokens.
template <int FORM, int TOKENS, int ROW_WARPS>
__global__ void __launch_bounds__(Shape<FORM, TOKENS, ROW_WARPS>::THREADS, Shape<FORM, TOKENS, ROW_WARPS>::BLOCKS)
    packed_many_kernel(int n, Packed m, int rows, const bf16 *x, void *out, bool wide, int stride) {
    typedef Shape<FORM, TOKENS, ROW_WARPS> S;
    extern __shared__ __align__(128) unsigned char memory[];
    const int row_blocks = ceil_div(rows, S::ROWS), token_tiles = ceil_div(n, TOKENS);
    const int set = blockIdx.x / (TOGETHER * row_blocks), in_set = blockIdx.x % (TOGETHER * row_blocks);
    const int tiles = min(TOGETHER, token_tiles - set * TOGETHER);
    const int token0 = (set * TOGETHER + in_set % tiles) * TOKENS, row0 = in_set / tiles * S::ROWS;
    const int count = min(TOKENS, n - token0), row_tile = row0 / TILE_ROWS + threadIdx.x / 32 % ROW_WARPS * 2;
    const int left = rows / TILE_ROWS - row_tile;  // row tiles; a pair may have one
    auto ready = [] {
        let_next_start();
        wait_for_inputs();
    };
    const float *sums = multiply<FORM, TOKENS, ROW_WARPS>(memory, m, left > 0 ? row_tile : 0, left > 1, left > 0, x,
                                                          count, ready, [&](int i) { return token0 + i; });
    const bool vector = reinterpret_cast<size_t>(out) % 16 == 0 && stride % 8 == 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < count * (S::ROWS / 8); i += S::THREADS) {
        const int token = i / (S::ROWS / 8), row = i % (S::ROWS / 8) * 8;
        if (row0 + row >= rows) continue;
        float v[8];
        load8(sums + token * S::PITCH + row, v);
        const int64_t to = int64_t(token0 + token) * stride + row0 + row;
        float *const f32 = static_cast<float *>(out) + to;
        bf16 *const rounded = static_cast<bf16 *>(out) + to;
        if (vector) {
            wide ? store8(f32, v) : store8(rounded, v);
            continue;
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            if (wide) {
                f32[j] = v[j];
            } else {
                rounded[j] = __float2bfloat16_rn(v[j]);
            }
        }
    }
}

template <int FORM, int TOKENS, int ROW_WARPS>
cudaError_t run(cudaStream_t stream, int n, const Packed &w, int rows, const bf16 *x, void *out, bool wide,
                int stride) {
    typedef Shape<FORM, TOKENS, ROW_WARPS> S;
    const int64_t blocks = int64_t(ceil_div(n, TOKENS)) * ceil_div(rows, S::ROWS);
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    const auto kernel = packed_many_kernel<FORM, TOKENS, ROW_WARPS>;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::BYTES);
    if (status != cudaSuccess) return status;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared);
    if (status != cudaSuccess) return status;
    return launch(kernel, unsigned(blocks), S::THREADS, S::BYTES, stream, n, w, rows, x, out, wide, stride);
}

// Blocks of fewer rows where the multiprocessors would not all have one: this changes the speed, and no sum.
template <int FORM, int TOKENS>
cudaError_t by_rows(cudaStream_t stream, int n, const Packed &w, int rows, const bf16 *x, void *out, bool wide,
                    int stride) {
    const int64_t tiles = ceil_div(n, TOKENS), enough = num_sms() * 3 / 4;
    if (tiles * ceil_div(rows, 128) >= enough) return run<FORM, TOKENS, 4>(stream, n, w, rows, x, out, wide, stride);
    if (tiles * ceil_div(rows, 64) >= enough) return run<FORM, TOKENS, 2>(stream, n, w, rows, x, out, wide, stride);
    return run<FORM, TOKENS, 1>(stream, n, w, rows, x, out, wide, stride);
}

template <int FORM>
cudaError_t by_tokens(cudaStream_t stream, int n, const Packed &w, int rows, const bf16 *x, void *out, bool wide,
                      int stride) {
    return n <= 32 ? by_rows<FORM, 32>(stream, n, w, rows, x, out, wide, stride)
                   : by_rows<FORM, 64>(stream, n, w, rows, x, out, wide, stride);
}

}  // namespace

cudaError_t packed_many_linear(cudaStream_t stream, int n, const Packed &w, int rows, const bf16 *x, void *out,
                               bool wide, int stride) {
    if (w.form == FP4_TILES) return by_tokens<FP4_TILES>(stream, n, w, rows, x, out, wide, stride);
    // Of GGUF's there is one kernel each.
    if (w.form == K4_TILES) return run<K4_TILES, 64, 4>(stream, n, w, rows, x, out, wide, stride);
    if (w.form == K6_TILES) return run<K6_TILES, 64, 4>(stream, n, w, rows, x, out, wide, stride);
    if (w.form == INT8_TILES) return run<INT8_TILES, 64, 4>(stream, n, w, rows, x, out, wide, stride);
    return w.form == INT4_TILES ? by_tokens<INT4_TILES>(stream, n, w, rows, x, out, wide, stride)
                                : by_tokens<FP8_TILES>(stream, n, w, rows, x, out, wide, stride);
}

cudaError_t launch_packed_many(cudaStream_t stream, int n, const q35_packed &w, const bf16 *x, void *out, bool wide,
                               int stride, void *fp8_tokens) {
    Packed m;
    if (!take_packed(w, w.rows, w.k, m) || !aligned(fp8_tokens)) return cudaErrorInvalidValue;
    const cudaError_t code = packed_wgmma_linear(stream, n, m, w.rows, x, out, wide, stride, fp8_tokens);
    return code != cudaErrorNotSupported ? code : packed_many_linear(stream, n, m, w.rows, x, out, wide, stride);
}
