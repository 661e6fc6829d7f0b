// The row-wise pieces of the net: embedding, norms, activations, conversions. Bound by memory: 16-byte accesses where
// the rows allow it, one element at a time where not. Own code.
#include "device.cuh"

namespace {

constexpr int THREADS = 256;

// Blocks for a grid-stride loop over `n` items.
unsigned stride_blocks(int64_t n) {
    const int64_t blocks = ceil_div(n, THREADS);
    return static_cast<unsigned>(blocks < 65536 ? blocks : 65536);
}

template <bool VEC>
__global__ void embed(q35_batch batch, const bf16 *table, int hidden, float *out) {
    let_next_start();
    wait_for_inputs();
    const int64_t t = blockIdx.x;
    const bf16 *row = table + static_cast<int64_t>(batch.token_ids[t]) * hidden;
    out += t * hidden;
    if constexpr (VEC) {
        for (int i = 8 * threadIdx.x; i < hidden; i += 8 * blockDim.x) {
            float x[8];
            load8(row + i, x);
            store8(out + i, x);
        }
    } else {
        for (int i = threadIdx.x; i < hidden; i += blockDim.x) out[i] = __bfloat162float(row[i]);
    }
}

// The sum of squares of a row has one order for every kernel that needs it: of 256 lanes, lane l adds its elements in
// ascending order, element i being of lane i / 8 % 256, or of lane i % 256 where `hidden` is no multiple of 8; then the
// lanes of each 32 in a butterfly, and the eight sums in ascending order. Here a thread is a lane.
constexpr int NORM_LANES = 256;

__device__ __forceinline__ float norm_scale(float squares, int hidden, float eps) {
    __shared__ float parts[NORM_LANES / 32];
    squares = lane_sum(squares);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = squares;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < NORM_LANES / 32; i++) sum += parts[i];
    return 1.0f / sqrtf(sum / hidden + eps);
}

// The row stays in registers between the sum and the scaling: VECS groups of 8 elements a thread.
template <int VECS>
__global__ void __launch_bounds__(NORM_LANES) rmsnorm_residual(int hidden, const bf16 *delta, float *residual,
                                                               const float *w, float eps, bf16 *out) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * hidden;
    float scales[VECS][8], x[VECS][8], squares = 0.0f;
#pragma unroll
    for (int v = 0; v < VECS; v++) {
        const int i = 8 * (threadIdx.x + v * NORM_LANES);
        if (i < hidden) load8(w + i, scales[v]);
    }
    let_next_start();
    wait_for_inputs();
    // All loads are under way before the first store, which they might alias for all the compiler knows.
    uint4 deltas[VECS];
#pragma unroll
    for (int v = 0; v < VECS; v++) {
        const int i = 8 * (threadIdx.x + v * NORM_LANES);
        deltas[v] = make_uint4(0, 0, 0, 0);
        if (i < hidden) {
            load8(residual + row + i, x[v]);
            if (delta) deltas[v] = *reinterpret_cast<const uint4 *>(delta + row + i);
        }
    }
#pragma unroll
    for (int v = 0; v < VECS; v++) {
        const int i = 8 * (threadIdx.x + v * NORM_LANES);
        if (i < hidden) {
            if (delta) {
                float d[8];
                unpack8(deltas[v], d);
#pragma unroll
                for (int j = 0; j < 8; j++) x[v][j] += d[j];
                store8(residual + row + i, x[v]);
            }
#pragma unroll
            for (int j = 0; j < 8; j++) squares = fmaf(x[v][j], x[v][j], squares);
        }
    }
    const float scale = norm_scale(squares, hidden, eps);
#pragma unroll
    for (int v = 0; v < VECS; v++) {
        const int i = 8 * (threadIdx.x + v * NORM_LANES);
        if (i < hidden) {
#pragma unroll
            for (int j = 0; j < 8; j++) x[v][j] = x[v][j] * scale * scales[v][j];
            store8(out + row + i, x[v]);
        }
    }
}

// A thread reads back only what it wrote itself.
__global__ void __launch_bounds__(NORM_LANES) rmsnorm_residual_any(int hidden, const bf16 *delta, float *residual,
                                                                   const float *w, float eps, bf16 *out) {
    let_next_start();
    wait_for_inputs();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * hidden;
    const int width = hidden % 8 == 0 ? 8 : 1;
    float squares = 0.0f;
    for (int first = width * threadIdx.x; first < hidden; first += width * NORM_LANES) {
        for (int i = first; i < first + width; i++) {
            float x = residual[row + i];
            if (delta) {
                x += __bfloat162float(delta[row + i]);
                residual[row + i] = x;
            }
            squares = fmaf(x, x, squares);
        }
    }
    const float scale = norm_scale(squares, hidden, eps);
    for (int first = width * threadIdx.x; first < hidden; first += width * NORM_LANES) {
        for (int i = first; i < first + width; i++) {
            out[row + i] = __float2bfloat16(residual[row + i] * scale * w[i]);
        }
    }
}

template <typename T>
__global__ void gather(const int32_t *rows, const T *x, int64_t width, T *out) {
    let_next_start();
    wait_for_inputs();
    const T *from = x + rows[blockIdx.x] * width;
    T *to = out + blockIdx.x * width;
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
}

template <bool VEC>
__global__ void silu_mul(int64_t total, int width, const bf16 *gate_up, bf16 *out) {
    let_next_start();
    wait_for_inputs();
    constexpr int N = VEC ? 8 : 1;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < total; item += step) {
        const int64_t at = item * N, row = at / width;
        const bf16 *gate = gate_up + at + row * width;  // row * 2 * width + column
        if constexpr (VEC) {
            float g[8], u[8];
            load8(gate, g);
            load8(gate + width, u);
#pragma unroll
            for (int j = 0; j < 8; j++) u[j] *= silu(g[j]);
            store8(out + at, u);
        } else {
            out[at] = __float2bfloat16(silu(__bfloat162float(gate[0])) * __bfloat162float(gate[width]));
        }
    }
}

// LANES lanes take a head of 8 * LANES elements.
template <int LANES>
__global__ void gated_rmsnorm(int64_t heads, int v_heads, const float *w, float eps, const bf16 *projected, int stride,
                              int z_start, bf16 *core) {
    constexpr int DIM = 8 * LANES;
    const int64_t item = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / LANES;
    const int i = threadIdx.x % LANES * 8;
    // A group past the end computes the last head again, and does not store it: the shuffles need whole warps.
    const int64_t head = item < heads ? item : heads - 1;
    const bf16 *z = projected + head / v_heads * stride + z_start + head % v_heads * DIM;
    float x[8], y[8], gate[8];
    load8(w + i, y);
    let_next_start();
    wait_for_inputs();
    load8(core + head * DIM + i, x);
    load8(z + i, gate);
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) squares = fmaf(x[j], x[j], squares);
    const float scale = 1.0f / sqrtf(lane_sum<LANES>(squares) / DIM + eps);
#pragma unroll
    for (int j = 0; j < 8; j++) y[j] *= x[j] * scale * silu(gate[j]);
    if (item < heads) store8(core + head * DIM + i, y);
}

// A warp takes a head.
__global__ void gated_rmsnorm_any(int64_t heads, int v_heads, int v_dim, const float *w, float eps,
                                  const bf16 *projected, int stride, int z_start, bf16 *core) {
    let_next_start();
    wait_for_inputs();
    const int64_t head = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    if (head >= heads) return;
    const int lane = threadIdx.x % 32;
    const bf16 *z = projected + head / v_heads * stride + z_start + head % v_heads * v_dim;
    core += head * v_dim;
    float squares = 0.0f;
    for (int i = lane; i < v_dim; i += 32) {
        const float x = __bfloat162float(core[i]);
        squares = fmaf(x, x, squares);
    }
    const float scale = 1.0f / sqrtf(lane_sum(squares) / v_dim + eps);
    for (int i = lane; i < v_dim; i += 32) {
        const float x = __bfloat162float(core[i]) * scale;
        core[i] = __float2bfloat16(x * w[i] * silu(__bfloat162float(z[i])));
    }
}

__device__ __forceinline__ void convert(float x, bf16 &out) { out = __float2bfloat16(x); }
__device__ __forceinline__ void convert(bf16 x, float &out) { out = __bfloat162float(x); }

// `groups` groups of 8, then what is left of `n`.
template <typename From, typename To>
__global__ void convert_all(int64_t n, int64_t groups, const From *x, To *out) {
    let_next_start();
    wait_for_inputs();
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (int64_t i = first; i < groups; i += step) {
        float y[8];
        load8(x + 8 * i, y);
        store8(out + 8 * i, y);
    }
    for (int64_t i = 8 * groups + first; i < n; i += step) convert(x[i], out[i]);
}

__device__ __forceinline__ uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// splitmix64 (Steele et al. 2014) of the counter, then Box-Muller. The first uniform is never 0.
__global__ void fill_normal(int64_t first, int64_t n, uint64_t seed, float scale, bf16 *out) {
    let_next_start();
    wait_for_inputs();
    const uint64_t key = mix(seed + 0x9e3779b97f4a7c15ull);
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
        const uint64_t bits = mix(key + static_cast<uint64_t>(first + i) * 0x9e3779b97f4a7c15ull);
        const float u = (static_cast<float>(bits >> 40) + 0.5f) * 0x1p-24f;
        const float turn = static_cast<float>(bits & 0xffffff) * 0x1p-24f;
        out[i] = __float2bfloat16(scale * sqrtf(-2.0f * logf(u)) * cospif(2.0f * turn));
    }
}

template <typename From, typename To>
int launch_convert(void *stream, int64_t n, const From *x, To *out) {
    if (n <= 0) return 0;
    const int64_t groups = aligned(x, 16) && aligned(out, 16) ? n / 8 : 0;
    const int64_t items = groups > n - 8 * groups ? groups : n - 8 * groups;
    return launch(convert_all<From, To>, stride_blocks(items), THREADS, 0, as_stream(stream), n, groups, x, out);
}

// Threads for a row of `items` items: whole warps.
int row_threads(int64_t items, int most) {
    const int64_t threads = 32 * ceil_div(items, 32);
    return static_cast<int>(threads < 32 ? 32 : threads > most ? most : threads);
}

}  // namespace

extern "C" int q35_embed(void *stream, q35_batch batch, const q35_bf16 *table, int hidden, float *out) {
    if (batch.num_tokens <= 0 || hidden <= 0) return 0;
    const bool vec = hidden % 8 == 0 && aligned(table, 16) && aligned(out, 16);
    const int threads = row_threads(vec ? hidden / 8 : hidden, THREADS);
    return launch(vec ? embed<true> : embed<false>, batch.num_tokens, threads, 0, as_stream(stream), batch,
                  as_bf16(table), hidden, out);
}

extern "C" int q35_rmsnorm_residual(void *stream, int n, int hidden, const q35_bf16 *delta, float *residual,
                                    const float *w, float eps, q35_bf16 *out) {
    if (n <= 0 || hidden <= 0) return 0;
    const bool vec = hidden % 8 == 0 && hidden <= 8 * 8 * NORM_LANES && aligned(delta, 16) && aligned(residual, 16) &&
                     aligned(w, 16) && aligned(out, 16);
    const auto kernel = !vec                            ? rmsnorm_residual_any
                        : hidden <= 8 * NORM_LANES      ? rmsnorm_residual<1>
                        : hidden <= 2 * 8 * NORM_LANES  ? rmsnorm_residual<2>
                        : hidden <= 4 * 8 * NORM_LANES  ? rmsnorm_residual<4>
                                                        : rmsnorm_residual<8>;
    return launch(kernel, n, NORM_LANES, 0, as_stream(stream), hidden, as_bf16(delta), residual, w, eps, as_bf16(out));
}

extern "C" int q35_gather(void *stream, const int32_t *rows, int num_rows, const void *x, int64_t row_bytes,
                          void *out) {
    if (num_rows <= 0 || row_bytes <= 0) return 0;
    const cudaStream_t s = as_stream(stream);
    if (row_bytes % 16 == 0 && aligned(x, 16) && aligned(out, 16)) {
        const int64_t width = row_bytes / 16;
        return launch(gather<uint4>, num_rows, row_threads(width, THREADS), 0, s, rows, static_cast<const uint4 *>(x),
                      width, static_cast<uint4 *>(out));
    }
    const int64_t width = row_bytes / 2;
    return launch(gather<uint16_t>, num_rows, row_threads(width, THREADS), 0, s, rows,
                  static_cast<const uint16_t *>(x), width, static_cast<uint16_t *>(out));
}

extern "C" int q35_silu_mul(void *stream, int n, int width, const q35_bf16 *gate_up, q35_bf16 *out) {
    if (n <= 0 || width <= 0) return 0;
    const bool vec = width % 8 == 0 && aligned(gate_up, 16) && aligned(out, 16);
    const int64_t items = static_cast<int64_t>(n) * width / (vec ? 8 : 1);
    return launch(vec ? silu_mul<true> : silu_mul<false>, stride_blocks(items), THREADS, 0, as_stream(stream), items,
                  width, as_bf16(gate_up), as_bf16(out));
}

extern "C" int q35_gated_rmsnorm(void *stream, int n, int v_heads, int v_dim, const float *w, float eps,
                                 const q35_bf16 *projected, int stride, int z_start, q35_bf16 *core) {
    if (n <= 0 || v_heads <= 0 || v_dim <= 0) return 0;
    const int64_t heads = static_cast<int64_t>(n) * v_heads;
    const bool vec = stride % 8 == 0 && z_start % 8 == 0 && aligned(w, 16) && aligned(projected, 16) &&
                     aligned(core, 16);
    const cudaStream_t s = as_stream(stream);
    const auto blocks = [&](int lanes) { return static_cast<unsigned>(ceil_div(heads * lanes, THREADS)); };
    if (vec && (v_dim == 128 || v_dim == 64)) {
        return launch(v_dim == 128 ? gated_rmsnorm<16> : gated_rmsnorm<8>, blocks(v_dim / 8), THREADS, 0, s, heads,
                      v_heads, w, eps, as_bf16(projected), stride, z_start, as_bf16(core));
    }
    return launch(gated_rmsnorm_any, blocks(32), THREADS, 0, s, heads, v_heads, v_dim, w, eps, as_bf16(projected),
                  stride, z_start, as_bf16(core));
}

extern "C" int q35_to_bf16(void *stream, int64_t n, const float *x, q35_bf16 *out) {
    return launch_convert(stream, n, x, as_bf16(out));
}

extern "C" int q35_to_f32(void *stream, int64_t n, const q35_bf16 *x, float *out) {
    return launch_convert(stream, n, as_bf16(x), out);
}

extern "C" int q35_fill_normal(void *stream, int64_t first, int64_t n, uint64_t seed, float scale, q35_bf16 *out) {
    if (n <= 0) return 0;
    return launch(fill_normal, stride_blocks(n), THREADS, 0, as_stream(stream), first, n, seed, scale, as_bf16(out));
}
