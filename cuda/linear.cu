// Products with weight matrices: few rows at the speed of the memory, many rows on tensor cores. Own code.
#include <type_traits>

#include "mma.cuh"

namespace {

__device__ inline void store(bf16 *to, float x) { *to = __float2bfloat16_rn(x); }
__device__ inline void store(float *to, float x) { *to = x; }

// ---------------------------------------------------------------------------------------------------------- few rows

constexpr int FEW = 16;
constexpr int CHUNK = 64;  // elements along k that a warp takes at a time: 128 bytes of a row

// A block has 16 * M rows of w; its warps split k, chunk by chunk in turn, and their sums are added in the order of the
// warps. The weights are the 16-row operand of the tensor cores and go from memory to registers as they are: which
// element of k stands in which place of the tile does not matter while w and x agree. N: tiles of 8 rows of x. Neither
// M nor N changes the order of a sum.
template <int M, int N, int WARPS, typename Out>
__global__ void __launch_bounds__(32 * WARPS, WARPS == 8 ? 3 : 2)
    few_rows_kernel(int n, int in, int out_dim, const bf16 *__restrict__ x, const bf16 *__restrict__ w, Out *out) {
    constexpr int ROWS = 16 * M, COLUMN = ROWS + 4;  // 4: the warps' stores hit all banks
    constexpr int AHEAD = 2 / M;                     // chunks that are loaded before the first is used
    __shared__ float sums[WARPS][8 * N][COLUMN];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, place = lane % 4 * 8;
    const int row0 = blockIdx.x * ROWS;
    const bf16 *w_block = w + int64_t(row0) * in;
    unsigned rows[2 * M];  // offsets: half the registers of pointers
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        // Rows past the last are the last one again, and are not written.
        rows[i] = unsigned(min(8 * i + g, out_dim - 1 - row0)) * in + place;
    }
    const unsigned x_row = unsigned(g) * in + place;
    float acc[M][N][4] = {};
    const int num_chunks = ceil_div(in, CHUNK);
    auto step = [&](int chunk, auto inside) {
        uint4 a[AHEAD][2][2 * M];
#pragma unroll
        for (int c = 0; c < AHEAD; c++) {
#pragma unroll
            for (int i = 0; i < 2 * M; i++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int k = (chunk + c * WARPS) * CHUNK + 32 * h;
                    a[c][h][i] = make_uint4(0, 0, 0, 0);
                    if (decltype(inside)::value || k + place < in) {
                        a[c][h][i] = stream16_in_order(w_block + (rows[i] + k));
                    }
                }
            }
        }
#pragma unroll
        for (int c = 0; c < AHEAD; c++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int k = (chunk + c * WARPS) * CHUNK + 32 * h;
#pragma unroll
                for (int j = 0; j < N; j++) {
                    uint4 b = make_uint4(0, 0, 0, 0);
                    if ((decltype(inside)::value || k + place < in) && 8 * j + g < n) {
                        b = __ldg(reinterpret_cast<const uint4 *>(x + (x_row + unsigned(8 * j) * in + k)));
                    }
#pragma unroll
                    for (int m = 0; m < M; m++) {
                        const uint4 lo = a[c][h][2 * m], hi = a[c][h][2 * m + 1];
                        mma(acc[m][j], lo.x, hi.x, lo.y, hi.y, b.x, b.y);
                        mma(acc[m][j], lo.z, hi.z, lo.w, hi.w, b.z, b.w);
                    }
                }
            }
        }
    };
    int chunk = warp;
#pragma unroll 1
    for (; chunk + (AHEAD - 1) * WARPS < in / CHUNK; chunk += AHEAD * WARPS) step(chunk, std::true_type());
#pragma unroll 1
    for (; chunk < num_chunks; chunk += AHEAD * WARPS) step(chunk, std::false_type());
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int j = 0; j < N; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                sums[warp][8 * j + lane % 4 * 2 + i % 2][16 * m + g + i / 2 * 8] = acc[m][j][i];
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * n; i += 32 * WARPS) {
        const int row = i % ROWS, column = i / ROWS;
        float total = 0.0f;
#pragma unroll
        for (int k = 0; k < WARPS; k++) total += sums[k][column][row];
        if (row0 + row < out_dim) store(out + int64_t(column) * out_dim + row0 + row, total);
    }
}

// Rows whose length or address does not allow 16-byte loads: a warp per element of the result.
constexpr int PLAIN_WARPS = 8;
template <typename Out>
__global__ void __launch_bounds__(32 * PLAIN_WARPS)
    plain_kernel(int n, int in, int out_dim, const bf16 *__restrict__ x, const bf16 *__restrict__ w, Out *out) {
    const int64_t task = int64_t(blockIdx.x) * PLAIN_WARPS + threadIdx.x / 32;
    if (task >= int64_t(n) * out_dim) return;
    const int64_t row = task / n, t = task % n;
    float sum = 0.0f;
    for (int k = threadIdx.x % 32; k < in; k += 32) {
        sum += __bfloat162float(w[row * in + k]) * __bfloat162float(x[t * in + k]);
    }
    sum = lane_sum(sum);
    if (threadIdx.x % 32 == 0) store(out + t * out_dim + row, sum);
}

// --------------------------------------------------------------------------------------------------------- many rows

constexpr int TILE = 128, DEPTH = 32, STAGES = 3, TILE_THREADS = 256;
constexpr int TILE_ROW = DEPTH + 8;  // 16 bytes more than needed: the rows of a matrix load hit all banks
constexpr int TILE_STAGE = 2 * TILE * TILE_ROW;
constexpr int TILE_SHARED = STAGES * TILE_STAGE * int(sizeof(bf16));

// Rows row0.. and elements k.. of a matrix [rows, in]; zeros past both ends.
template <bool VECTOR>
__device__ void load_tile(bf16 *tile, const bf16 *matrix, int64_t rows, int in, int64_t row0, int k) {
    if constexpr (VECTOR) {
#pragma unroll
        for (int i = threadIdx.x; i < TILE * (DEPTH / 8); i += TILE_THREADS) {
            const int row = i / (DEPTH / 8), column = i % (DEPTH / 8) * 8;
            const bool there = row0 + row < rows && k + column < in;
            const bf16 *from = there ? matrix + (row0 + row) * in + k + column : matrix;
            copy16(tile + row * TILE_ROW + column, from, there);
        }
    } else {
        for (int i = threadIdx.x; i < TILE * DEPTH; i += TILE_THREADS) {
            const int row = i / DEPTH, column = i % DEPTH;
            const bool there = row0 + row < rows && k + column < in;
            tile[row * TILE_ROW + column] =
                there ? matrix[(row0 + row) * in + k + column] : __float2bfloat16_rn(0.0f);
        }
    }
}

// Tiles of 128 rows of x by 128 of w, 32 elements of k at a time, three stages in shared memory; a warp has 64 x 32.
template <bool VECTOR, typename Out>
__global__ void __launch_bounds__(TILE_THREADS)
    many_rows_kernel(int n, int in, int out_dim, const bf16 *__restrict__ x, const bf16 *__restrict__ w, Out *out) {
    extern __shared__ __align__(16) unsigned char memory[];
    bf16 *stages = reinterpret_cast<bf16 *>(memory);
    const int64_t x0 = int64_t(blockIdx.x) * TILE, w0 = int64_t(blockIdx.y) * TILE;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int x_warp = warp / 4 * 64, w_warp = warp % 4 * 32;
    const int steps = ceil_div(in, DEPTH);
    auto load = [&](int step) {
        if (step < steps) {
            bf16 *stage = stages + step % STAGES * TILE_STAGE;
            load_tile<VECTOR>(stage, x, n, in, x0, step * DEPTH);
            load_tile<VECTOR>(stage + TILE * TILE_ROW, w, out_dim, in, w0, step * DEPTH);
        }
        copy_commit();
    };
    float acc[4][4][4] = {};
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) load(i);
    for (int step = 0; step < steps; step++) {
        copy_wait<STAGES - 2>();
        __syncthreads();  // this step's stage is there, and the stage before it is free
        load(step + STAGES - 1);
        const bf16 *x_tile = stages + step % STAGES * TILE_STAGE, *w_tile = x_tile + TILE * TILE_ROW;
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            uint32_t a[4][4], b[2][4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                load_matrices(a[i], x_tile + (x_warp + 16 * i + lane % 16) * TILE_ROW + k + lane / 16 * 8);
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int row = w_warp + 16 * j + lane / 16 * 8 + lane % 8;
                load_matrices(b[j], w_tile + row * TILE_ROW + k + lane / 8 % 2 * 8);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    mma(acc[i][j], a[i], b[j / 2] + j % 2 * 2);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int64_t row = x0 + x_warp + 16 * i + 8 * half + lane / 4;
            if (row >= n) continue;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int64_t column = w0 + w_warp + 8 * j + lane % 4 * 2;
                Out *to = out + row * out_dim + column;
                if (column < out_dim) store(to, acc[i][j][2 * half]);
                if (column + 1 < out_dim) store(to + 1, acc[i][j][2 * half + 1]);
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------------- launchers

template <int M, int N, int WARPS, typename Out>
void few_rows(cudaStream_t stream, int n, int in, int out_dim, const bf16 *x, const bf16 *w, Out *out) {
    few_rows_kernel<M, N, WARPS><<<ceil_div(out_dim, 16 * M), 32 * WARPS, 0, stream>>>(n, in, out_dim, x, w, out);
}

// The shape of the matrix alone chooses the blocks. Few of them: more warps for each, so that enough is under way; very
// many: more rows for each, so that x is read less often.
template <int N, typename Out>
void few_rows(cudaStream_t stream, int n, int in, int out_dim, const bf16 *x, const bf16 *w, Out *out) {
    if (out_dim >= 16384) {
        few_rows<2, N, 8>(stream, n, in, out_dim, x, w, out);
    } else if (out_dim > 16 * 264) {
        few_rows<1, N, 8>(stream, n, in, out_dim, x, w, out);
    } else {
        few_rows<1, N, 16>(stream, n, in, out_dim, x, w, out);
    }
}

template <bool VECTOR, typename Out>
cudaError_t many_rows(cudaStream_t stream, int n, int in, int out_dim, const bf16 *x, const bf16 *w, Out *out) {
    const cudaError_t status = cudaFuncSetAttribute(many_rows_kernel<VECTOR, Out>,
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize, TILE_SHARED);
    if (status != cudaSuccess) return status;
    const dim3 grid(unsigned(ceil_div(n, TILE)), unsigned(ceil_div(out_dim, TILE)));
    if (grid.y > 65535) return cudaErrorInvalidValue;
    many_rows_kernel<VECTOR><<<grid, TILE_THREADS, TILE_SHARED, stream>>>(n, in, out_dim, x, w, out);
    return cudaGetLastError();
}

template <typename Out>
cudaError_t linear(void *on, int n, int in, int out_dim, const bf16 *x, const bf16 *w, Out *out) {
    if (n == 0 || out_dim == 0) return cudaSuccess;
    const cudaStream_t stream = as_stream(on);
    const bool vector = in % 8 == 0 && aligned(x, 16) && aligned(w, 16);
    if (n > FEW) {
        return vector ? many_rows<true>(stream, n, in, out_dim, x, w, out)
                      : many_rows<false>(stream, n, in, out_dim, x, w, out);
    }
    if (!vector) {
        const int64_t blocks = ceil_div(int64_t(n) * out_dim, PLAIN_WARPS);
        if (blocks > INT32_MAX) return cudaErrorInvalidValue;
        plain_kernel<<<unsigned(blocks), 32 * PLAIN_WARPS, 0, stream>>>(n, in, out_dim, x, w, out);
    } else if (n <= 8) {
        few_rows<1>(stream, n, in, out_dim, x, w, out);
    } else {
        few_rows<2>(stream, n, in, out_dim, x, w, out);
    }
    return cudaGetLastError();
}

}  // namespace

extern "C" int q35_linear(void *stream, int n, int in, int out_dim, const q35_bf16 *x, const q35_bf16 *w,
                          q35_bf16 *out) {
    return linear(stream, n, in, out_dim, as_bf16(x), as_bf16(w), as_bf16(out));
}

extern "C" int q35_linear_f32(void *stream, int n, int in, int out_dim, const q35_bf16 *x, const q35_bf16 *w,
                              float *out) {
    return linear(stream, n, in, out_dim, as_bf16(x), as_bf16(w), out);
}
