// The end of a sparse block of many tokens together with the norm that follows: the weighted sums of the experts'
// outputs go straight to the residual and to the next layer's input.
#include "moe.cuh"

namespace {

// The sum of squares has the order of elementwise.cu: 256 lanes of 8 elements, a thread a lane.
constexpr int LANES = 256;

// 8 neighbouring elements, read once.
__device__ __forceinline__ uint4 load_once(const bf16 *p) { return __ldcs(reinterpret_cast<const uint4 *>(p)); }
struct Eight {
    float4 a, b;
};
__device__ __forceinline__ Eight load_once(const float *p) {
    return {__ldcs(reinterpret_cast<const float4 *>(p)), __ldcs(reinterpret_cast<const float4 *>(p) + 1)};
}
__device__ __forceinline__ void unpack8(const Eight &v, float x[8]) {
    x[0] = v.a.x, x[1] = v.a.y, x[2] = v.a.z, x[3] = v.a.w;
    x[4] = v.b.x, x[5] = v.b.y, x[6] = v.b.z, x[7] = v.b.w;
}

// A block a token. The sum is rounded to bf16 before the residual takes it, as where it goes through memory.
// VECS: groups of 8 columns a thread has. T: what y holds. PART: some experts are not here.
template <int VECS, typename T, bool PART>
__global__ void __launch_bounds__(LANES) sum_norm(Plan p, float *residual, const float *norm, float eps, bf16 *out) {
    constexpr int BATCH = sizeof(T) == 2 ? 8 : 4;  // experts' rows whose loads are under way together
    __shared__ float parts[LANES / 32];
    const int token = blockIdx.x, hidden = p.hidden;
    const int64_t row = int64_t(token) * hidden;
    float scales[VECS][8], x[VECS][8], squares = 0.0f;
#pragma unroll
    for (int v = 0; v < VECS; v++) {
        const int col = 8 * (threadIdx.x + v * LANES);
        if (col < hidden) load8(norm + col, scales[v]);
    }
    let_next_start();
    wait_for_inputs();
    const float *weights = p.weights + int64_t(token) * p.top_k;
    const T *y = reinterpret_cast<const T *>(p.y);
    const float gate = p.has_shared ? p.gate[token] : 0.f;
#pragma unroll
    for (int v = 0; v < VECS; v++) {
        const int col = 8 * (threadIdx.x + v * LANES);
        if (col >= hidden) continue;
        const T *routed = y + row * p.top_k + col;
        decltype(load_once(y)) of_shared = {};
        if (p.has_shared) of_shared = load_once(y + int64_t(p.n) * p.top_k * hidden + row + col);
        load8(residual + row + col, x[v]);
        float sum[8] = {};
        for (int first = 0; first < p.top_k; first += BATCH) {
            decltype(load_once(y)) packed[BATCH];
            float weight[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                if (first + i >= p.top_k) break;
                weight[i] = weights[first + i];
                if (!PART || weight[i] >= 0) packed[i] = load_once(routed + int64_t(first + i) * hidden);
            }
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                if (first + i >= p.top_k) break;
                if (PART && weight[i] < 0) continue;
                float one[8];
                unpack8(packed[i], one);
#pragma unroll
                for (int j = 0; j < 8; j++) sum[j] = fmaf(weight[i], one[j], sum[j]);
            }
        }
        if (p.has_shared) {
            float one[8];
            unpack8(of_shared, one);
            const float weight = precise_sigmoid(gate);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] = fmaf(weight, one[j], sum[j]);
        }
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            const float2 rounded = unpack2(pack2(sum[j], sum[j + 1]));
            x[v][j] += rounded.x, x[v][j + 1] += rounded.y;
        }
    }
#pragma unroll
    for (int v = 0; v < VECS; v++) {
        const int col = 8 * (threadIdx.x + v * LANES);
        if (col >= hidden) continue;
        store8(residual + row + col, x[v]);
#pragma unroll
        for (int j = 0; j < 8; j++) squares = fmaf(x[v][j], x[v][j], squares);
    }
    squares = lane_sum(squares);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = squares;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < LANES / 32; i++) sum += parts[i];
    const float scale = 1.0f / sqrtf(sum / hidden + eps);
#pragma unroll
    for (int v = 0; v < VECS; v++) {
        const int col = 8 * (threadIdx.x + v * LANES);
        if (col >= hidden) continue;
#pragma unroll
        for (int j = 0; j < 8; j++) x[v][j] = x[v][j] * scale * scales[v][j];
        store8(out + row + col, x[v]);
    }
}

template <typename T>
int launch_of(cudaStream_t stream, const Plan &p, float *residual, const float *norm, float eps, bf16 *out) {
    const bool one = p.hidden <= 8 * LANES;
    const auto kernel = p.num_here == p.num_experts ? one ? sum_norm<1, T, false> : sum_norm<2, T, false>
                        : one                       ? sum_norm<1, T, true>
                                                    : sum_norm<2, T, true>;
    return launch(kernel, p.n, LANES, 0, stream, p, residual, norm, eps, out);
}

}  // namespace

int launch_sum_norm(cudaStream_t stream, const Plan &p, bool rounded, float *residual, const float *norm, float eps,
                    bf16 *out) {
    return rounded ? launch_of<bf16>(stream, p, residual, norm, eps, out)
                   : launch_of<float>(stream, p, residual, norm, eps, out);
}

bool norm_is_fast(const Plan &p, const q35_moe_weights &w, const bf16 *x, const float *residual, const float *norm,
                  const bf16 *out) {
    const int columns = has_wgmma(p, w, x, out) ? 2 * p.y_cols : p.y_cols;  // that y holds
    return p.hidden % 8 == 0 && p.hidden <= MOST_HIDDEN && p.hidden <= columns && aligned(residual) &&
           aligned(norm) && aligned(out);
}

int launch_many_then_norm(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, const bf16 *x,
                          float *residual, const float *norm, float eps, bf16 *out) {
    const int code = launch_many(stream, p, w, x, nullptr);
    if (code != cudaSuccess) return code;
    return launch_sum_norm(stream, p, has_wgmma(p, w, x, out), residual, norm, eps, out);
}
