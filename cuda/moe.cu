// The sparse block: its workspace, routing, and the path of up to 16 tokens, which is bound by reading the experts hit.
#include "moe.cuh"

namespace {

// So many bytes of outputs of assignments are kept at a time: past that the down projection goes by blocks of columns,
// since n * (top_k + 1) * hidden floats would be more than all the other activations of a model.
constexpr int64_t Y_BYTES = int64_t(128) << 20;
constexpr int Y_STEP = 128;

// Where everything lies, for n tokens. Every size grows with n, so what serves max_tokens serves fewer.
Plan plan(int n, const q35_moe_dims &d, void *workspace) {
    Plan p = {};
    p.n = n, p.hidden = d.hidden, p.num_experts = d.num_experts, p.top_k = d.top_k;
    p.width = d.width, p.shared_width = d.shared_width, p.has_shared = d.shared_width > 0;
    const int64_t tokens = n, experts = d.num_experts, assignments = tokens * d.top_k;
    const int64_t rows = assignments + (p.has_shared ? tokens : 0), row_bytes = int64_t(d.hidden) * 4;
    p.num_chunks = int(ceil_div(assignments, CHUNK));
    p.max_tiles = int(assignments / SMALL_TILE + (experts < assignments ? experts : assignments));

    int64_t y_bytes = rows * row_bytes;
    p.y_cols = d.hidden;
    if (y_bytes > Y_BYTES) {
        const int64_t step = rows * Y_STEP * 4, most = step > Y_BYTES ? step : Y_BYTES;
        if (y_bytes > most) {
            y_bytes = most;
            if (n > FEW) p.y_cols = int(most / step * Y_STEP);
        }
        // Few tokens always have whole rows.
        const int64_t few_bytes = (n < FEW ? n : FEW) * (rows / tokens) * row_bytes;
        if (y_bytes < few_bytes) y_bytes = few_bytes;
    }

    const uintptr_t at = reinterpret_cast<uintptr_t>(workspace);
    auto take = [&](auto *&piece, int64_t count) {
        piece = reinterpret_cast<decltype(+piece)>(at + p.bytes);
        p.bytes += ceil_div(count * int64_t(sizeof(*piece)), 256) * 256;
    };
    take(p.logits, tokens * experts);
    take(p.weights, assignments);
    take(p.experts, assignments);
    take(p.gate, tokens);
    take(p.rank, (n < FEW ? n : FEW) * experts);
    take(p.hit, experts);
    take(p.hit_by, experts);
    take(p.num_hit, 1);
    take(p.counts, int64_t(p.num_chunks) * experts);
    take(p.offsets, experts + 1);
    take(p.tiles, p.max_tiles);
    take(p.num_tiles, 1);
    take(p.sorted, assignments);
    take(p.act, assignments * d.width);
    take(p.shared_act, tokens * d.shared_width);
    take(p.y, y_bytes / 4);
    return p;
}

bool valid(const q35_moe_dims &d) {
    // Blocks keep a word for each expert in shared memory.
    return d.hidden > 0 && d.num_experts > 0 && d.num_experts <= 8192 && d.top_k > 0 && d.top_k <= d.num_experts &&
           d.width > 0 && d.shared_width >= 0;
}

// --------------------------------------------------------------------------------------------------------- routing

// Top-k by repeated maxima (ties to the lower index), a warp a token.
__global__ void __launch_bounds__(128) route_kernel(int n, int num_experts, int top_k, const float *logits,
                                                    float *weights, int *experts) {
    const int token = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= n) return;
    const int64_t at = int64_t(token) * top_k;
    route_any(logits + int64_t(token) * num_experts, num_experts, top_k, 0, weights + at, experts + at, lane);
}

// out = sum over the experts in the order of their weights, then the shared expert; each thread 4 columns (WIDE) or 1.
template <bool WIDE>
__global__ void __launch_bounds__(256) sum_kernel(Plan p, int col0, int cols, bf16 *out) {
    const int token = blockIdx.x, col = (blockIdx.y * 256 + threadIdx.x) * (WIDE ? 4 : 1);
    if (col >= cols) return;
    const float *weights = p.weights + int64_t(token) * p.top_k;
    const float *y = p.y + int64_t(token) * p.top_k * p.y_cols + col;
    float sum[WIDE ? 4 : 1] = {};
    auto add = [&](float weight, const float *from) {
        if constexpr (WIDE) {
            const float4 v = *reinterpret_cast<const float4 *>(from);
            sum[0] = fmaf(weight, v.x, sum[0]), sum[1] = fmaf(weight, v.y, sum[1]);
            sum[2] = fmaf(weight, v.z, sum[2]), sum[3] = fmaf(weight, v.w, sum[3]);
        } else {
            sum[0] = fmaf(weight, *from, sum[0]);
        }
    };
#pragma unroll 8
    for (int r = 0; r < p.top_k; r++) add(weights[r], y + int64_t(r) * p.y_cols);
    if (p.has_shared)
        add(precise_sigmoid(p.gate[token]), p.y + (int64_t(p.n) * p.top_k + token) * p.y_cols + col);
    bf16 *to = out + int64_t(token) * p.hidden + col0 + col;
    if constexpr (WIDE) {
        *reinterpret_cast<uint2 *>(to) = make_uint2(pack2(sum[0], sum[1]), pack2(sum[2], sum[3]));
    } else {
        *to = __float2bfloat16_rn(sum[0]);
    }
}

// ------------------------------------------------------------------------------------------------------ few tokens

// Router logits and the shared expert's gate: a warp a row of the router (the gate is row E), M tokens at a time.
template <int M, bool VEC>
__global__ void __launch_bounds__(64) few_logits(Plan p, const bf16 *router, const bf16 *shared_gate, const bf16 *x) {
    const int row = blockIdx.x * 2 + threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.y * M;
    if (row >= p.num_experts + p.has_shared) return;
    const bf16 *const w[1] = {row < p.num_experts ? router + int64_t(row) * p.hidden : shared_gate};
    const bf16 *in[M];
#pragma unroll
    for (int m = 0; m < M; m++) in[m] = x + int64_t(min(first + m, p.n - 1)) * p.hidden;
    float acc[1][M];
    warp_dots<1, M, 4, VEC>(w, in, p.hidden, lane, acc);
#pragma unroll
    for (int m = 0; m < M; m++) {
        const int t = first + m;
        if (lane == 0 && t < p.n)
            *(row < p.num_experts ? p.logits + int64_t(t) * p.num_experts + row : p.gate + t) = acc[0][m];
    }
}

// Routes up to 16 tokens, a warp each, and lists the experts hit with their tokens.
__global__ void __launch_bounds__(32 * FEW) few_route(Plan p) {
    extern __shared__ unsigned by[];  // [E]
    for (int e = threadIdx.x; e < p.num_experts; e += blockDim.x) by[e] = 0;
    __syncthreads();
    const int token = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token < p.n) {
        int *experts = p.experts + token * p.top_k;
        route_any(p.logits + int64_t(token) * p.num_experts, p.num_experts, p.top_k, 0,
                  p.weights + token * p.top_k, experts, lane);
        for (int r = lane; r < p.top_k; r += 32) {  // what this lane wrote itself
            p.rank[token * p.num_experts + experts[r]] = r;
            atomicOr(&by[experts[r]], 1u << token);
        }
    }
    __syncthreads();
    if (token > 0) return;
    int count = 0;
    for (int first = 0; first < p.num_experts; first += 32) {
        const int e = first + lane;
        const unsigned tokens = e < p.num_experts ? by[e] : 0, any = __ballot_sync(ALL_LANES, tokens != 0);
        if (tokens != 0) {
            const int at = count + __popc(any & ((1u << lane) - 1));
            p.hit[at] = e, p.hit_by[at] = tokens;
        }
        count += __popc(any);
    }
    if (lane == 0) *p.num_hit = count;
}

// The rows that one warp of few_rows computes, for M of the tokens of its expert.
template <bool DOWN, int M, bool VEC>
__device__ __forceinline__ void few_tile(const bf16 *const (&w)[4], const bf16 *in, const int *in_rows, const int *rows,
                                         int count, int k, int feature, int features, bf16 *act, float *y, int lane) {
    const bf16 *x[M];
#pragma unroll
    for (int m = 0; m < M; m++) x[m] = in + int64_t(in_rows[min(m, count - 1)]) * k;
    float acc[4][M];
    warp_dots<4, M, (M < 4 ? 2 : 1), VEC>(w, x, k, lane, acc);
#pragma unroll
    for (int m = 0; m < M; m++) {
        if (lane != 0 || m >= count) continue;
        const int64_t at = int64_t(rows[m]) * features + feature;
        if constexpr (DOWN) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (feature + i < features) y[at + i] = acc[i][m];
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (feature + i < features) act[at + i] = __float2bfloat16_rn(swiglu(acc[i][m], acc[2 + i][m]));
        }
    }
}

// One projection of the experts hit: blockIdx.y is the shared expert (0, where there is one) or an expert of the list,
// blockIdx.x a block of its rows; a warp takes 4 rows (gate_up: 2 gate rows and the up rows of the same features) past
// every token of the expert. ONE: a single token, which every block routes itself, as far as its own expert; that is
// less than the wait for another kernel.
template <bool DOWN, bool ONE, bool VEC>
__global__ void __launch_bounds__(128, 4) few_rows(Plan p, const bf16 *weights, const bf16 *shared_weights,
                                                const bf16 *x) {
    constexpr int FEATURES = DOWN ? 4 : 2;
    __shared__ int s_expert, s_in[FEW], s_rows[FEW];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool shared = p.has_shared && blockIdx.y == 0;
    const int slot = blockIdx.y - p.has_shared;
    const int width = shared ? p.shared_width : p.width;
    const int features = DOWN ? p.hidden : width, k = DOWN ? width : p.hidden;
    if (static_cast<int>(blockIdx.x) * 4 * FEATURES >= features) return;

    // Which expert, which rows of the input, which of the output.
    int expert = 0, count = 1;
    if (shared) {
        count = p.n;
        if (threadIdx.x < p.n) {
            s_in[threadIdx.x] = threadIdx.x;
            s_rows[threadIdx.x] = threadIdx.x + (DOWN ? p.n * p.top_k : 0);
        }
    } else if (ONE) {
        if (warp == 0) {
            const bool writes = blockIdx.x == 0 && slot == 0;
            const int e = route_any(p.logits, p.num_experts, writes ? p.top_k : slot + 1, slot,
                                    writes ? p.weights : nullptr, p.experts, lane);
            if (lane == 0) s_expert = e, s_in[0] = 0, s_rows[0] = slot;
        }
    } else {
        if (slot >= *p.num_hit) return;
        expert = p.hit[slot];
        const unsigned by = p.hit_by[slot];
        count = __popc(by);
        if (threadIdx.x < FEW && (by >> threadIdx.x & 1)) {
            const int t = threadIdx.x, place = __popc(by & ((1u << t) - 1));
            const int assignment = t * p.top_k + p.rank[t * p.num_experts + expert];
            s_in[place] = DOWN ? assignment : t;
            s_rows[place] = assignment;
        }
    }
    __syncthreads();
    if (ONE && !shared) expert = s_expert;

    const int feature = (blockIdx.x * 4 + warp) * FEATURES;
    if (feature >= features) return;
    const bf16 *base = shared ? shared_weights : weights + int64_t(expert) * (DOWN ? 1 : 2) * features * k;
    const bf16 *w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = min(feature + i % FEATURES, features - 1) + i / FEATURES * features;
        w[i] = base + int64_t(row) * k;
    }
    const bf16 *in = !DOWN ? x : shared ? p.shared_act : p.act;
    bf16 *act = shared ? p.shared_act : p.act;
    if constexpr (ONE) {
        few_tile<DOWN, 1, VEC>(w, in, s_in, s_rows, 1, k, feature, features, act, p.y, lane);
    } else {
        // More than eight tokens take a second pass over rows that are in L2 by then.
        for (int m = 0; m < count; m += 8) {
            const int left = count - m, *ins = s_in + m, *outs = s_rows + m;
            if (left == 1)
                few_tile<DOWN, 1, VEC>(w, in, ins, outs, 1, k, feature, features, act, p.y, lane);
            else if (left == 2)
                few_tile<DOWN, 2, VEC>(w, in, ins, outs, 2, k, feature, features, act, p.y, lane);
            else if (left <= 4)
                few_tile<DOWN, 4, VEC>(w, in, ins, outs, left, k, feature, features, act, p.y, lane);
            else
                few_tile<DOWN, 8, VEC>(w, in, ins, outs, min(left, 8), k, feature, features, act, p.y, lane);
        }
    }
}

constexpr int ONE_ROWS = 8;
constexpr int ONE_TOP_K = 64;

// A single token's down projections and their sum: a block has 8 rows of the output, its warps share out the experts.
// The dot products and the sum have the order of few_rows and sum_kernel.
template <bool VEC>
__global__ void one_down(Plan p, const bf16 *down, const bf16 *shared_down, bf16 *out) {
    __shared__ float y[(ONE_TOP_K + 1) * ONE_ROWS];
    const int lane = threadIdx.x % 32, num_warps = blockDim.x / 32, first = blockIdx.x * ONE_ROWS;
    for (int item = threadIdx.x / 32; item < p.top_k + p.has_shared; item += num_warps) {
        const bool shared = item == p.top_k;
        const int k = shared ? p.shared_width : p.width;
        const bf16 *base = shared ? shared_down : down + int64_t(p.experts[item]) * p.hidden * k;
        const bf16 *const in[1] = {shared ? p.shared_act : p.act + int64_t(item) * k};
        const bf16 *w[ONE_ROWS];
#pragma unroll
        for (int r = 0; r < ONE_ROWS; r++) w[r] = base + int64_t(min(first + r, p.hidden - 1)) * k;
        float acc[ONE_ROWS][1];
        warp_dots<ONE_ROWS, 1, 1, VEC>(w, in, k, lane, acc);
        if (lane == 0) {
#pragma unroll
            for (int r = 0; r < ONE_ROWS; r++) y[item * ONE_ROWS + r] = acc[r][0];
        }
    }
    __syncthreads();
    const int row = threadIdx.x;
    if (row >= ONE_ROWS || first + row >= p.hidden) return;
    float sum = 0.f;
    for (int r = 0; r < p.top_k; r++) sum = fmaf(p.weights[r], y[r * ONE_ROWS + row], sum);
    if (p.has_shared) sum = fmaf(precise_sigmoid(p.gate[0]), y[p.top_k * ONE_ROWS + row], sum);
    out[first + row] = __float2bfloat16_rn(sum);
}

template <bool ONE>
void launch_rows(cudaStream_t stream, const Plan &p, bool down, bool vec, const q35_moe_weights &w, const bf16 *x) {
    const int widest = p.width > p.shared_width ? p.width : p.shared_width;
    const int slots = p.n * p.top_k < p.num_experts ? p.n * p.top_k : p.num_experts;
    const dim3 grid(down ? ceil_div(p.hidden, 16) : ceil_div(widest, 8), slots + p.has_shared);
    const bf16 *weights = as_bf16(down ? w.down : w.gate_up);
    const bf16 *shared = as_bf16(down ? w.shared_down : w.shared_gate_up);
    if constexpr (ONE) {
        auto kernel = vec ? few_rows<false, true, true> : few_rows<false, true, false>;
        kernel<<<grid, 128, 0, stream>>>(p, weights, shared, x);
    } else {
        auto kernel = down ? vec ? few_rows<true, false, true> : few_rows<true, false, false>
                      : vec ? few_rows<false, false, true>
                            : few_rows<false, false, false>;
        kernel<<<grid, 128, 0, stream>>>(p, weights, shared, x);
    }
}

}  // namespace

int launch_sum(cudaStream_t stream, const Plan &p, int col0, int cols, bf16 *out) {
    // col0 and, unless it is the last, cols are multiples of 128.
    const bool wide = p.hidden % 4 == 0 && p.y_cols % 4 == 0 && aligned(out, 8);
    const dim3 grid(p.n, ceil_div(cols, wide ? 1024 : 256));
    (wide ? sum_kernel<true> : sum_kernel<false>)<<<grid, 256, 0, stream>>>(p, col0, cols, out);
    return cudaGetLastError();
}

int launch_few(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, const bf16 *x, bf16 *out) {
    const bool whole = p.hidden % 8 == 0 && aligned(x);
    const bool vec_logits = whole && aligned(w.router) && (!p.has_shared || aligned(w.shared_gate));
    const bool vec_up = whole && aligned(w.gate_up) && (!p.has_shared || aligned(w.shared_gate_up));
    const bool vec_down = p.width % 8 == 0 && p.shared_width % 8 == 0 && aligned(w.down) &&
                          (!p.has_shared || aligned(w.shared_down));
    const bool one = p.n == 1 && p.top_k <= ONE_TOP_K;

    const int rows = p.num_experts + p.has_shared, tokens = p.n == 1 ? 1 : 4;
    auto logits = p.n == 1 ? vec_logits ? few_logits<1, true> : few_logits<1, false>
                  : vec_logits ? few_logits<4, true>
                               : few_logits<4, false>;
    logits<<<dim3(ceil_div(rows, 2), ceil_div(p.n, tokens)), 64, 0, stream>>>(p, as_bf16(w.router),
                                                                              as_bf16(w.shared_gate), x);
    if (one) {
        launch_rows<true>(stream, p, false, vec_up, w, x);
        const int items = p.top_k + p.has_shared, threads = 32 * (items < 16 ? items : 16);
        (vec_down ? one_down<true> : one_down<false>)<<<ceil_div(p.hidden, ONE_ROWS), threads, 0, stream>>>(
            p, as_bf16(w.down), as_bf16(w.shared_down), out);
        return cudaGetLastError();
    }
    few_route<<<1, 32 * FEW, p.num_experts * sizeof(unsigned), stream>>>(p);
    launch_rows<false>(stream, p, false, vec_up, w, x);
    launch_rows<false>(stream, p, true, vec_down, w, x);
    return launch_sum(stream, p, 0, p.hidden, out);
}

extern "C" int q35_route(void *stream, int n, int num_experts, int top_k, const float *logits, float *weights,
                         int32_t *experts) {
    if (n <= 0) return cudaSuccess;
    if (top_k < 1 || top_k > num_experts) return cudaErrorInvalidValue;
    route_kernel<<<ceil_div(n, 4), 128, 0, as_stream(stream)>>>(n, num_experts, top_k, logits, weights, experts);
    return cudaGetLastError();
}

extern "C" int64_t q35_moe_workspace(int max_tokens, q35_moe_dims dims) {
    return max_tokens > 0 && valid(dims) ? plan(max_tokens, dims, nullptr).bytes : 0;
}

extern "C" int64_t q35_moe_experts_at(int n, q35_moe_dims dims) {
    return n > 0 && valid(dims) ? int64_t(reinterpret_cast<uintptr_t>(plan(n, dims, nullptr).experts)) : 0;
}

extern "C" int q35_moe(void *stream, int n, q35_moe_dims dims, q35_moe_weights weights, const q35_bf16 *x,
                       void *workspace, q35_bf16 *out) {
    if (n <= 0) return cudaSuccess;
    if (!valid(dims)) return cudaErrorInvalidValue;
    const Plan p = plan(n, dims, workspace);
    auto launch = n <= FEW ? launch_few : launch_many;
    return launch(as_stream(stream), p, weights, as_bf16(x), as_bf16(out));
}
