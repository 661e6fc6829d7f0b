// The sparse block: its workspace, routing alone, the sum over experts, and the choice between few and many tokens.
#include "moe.cuh"

namespace {

// So many bytes of outputs of assignments are kept at a time, on Hopper all of 8192 tokens of 35B-A3B: past that the
// down projection goes by blocks of columns, since n * (top_k + 1) * hidden floats would be more than all the other
// activations of a model.
constexpr int64_t Y_BYTES = int64_t(320) << 20;
constexpr int Y_STEP = 128;

// Where everything lies, for n tokens. Every size grows with n, so what serves max_tokens serves fewer.
Plan plan(int n, const q35_moe_dims &d, void *workspace) {
    Plan p = {};
    p.n = n, p.hidden = d.hidden, p.num_experts = d.num_experts, p.top_k = d.top_k;
    p.width = d.width, p.shared_width = d.shared_width, p.has_shared = d.shared_width > 0;
    p.first_expert = d.first_expert, p.num_here = d.num_here;
    const int64_t tokens = n, experts = d.num_here, assignments = tokens * d.top_k;
    const int64_t few_assignments = int64_t(n < FEW ? n : FEW) * d.top_k;
    const int64_t rows = assignments + (p.has_shared ? tokens : 0), row_bytes = int64_t(d.hidden) * 4;
    p.slots = int(few_assignments < experts ? few_assignments : experts);
    p.num_groups = ceil_div(n, GROUP);
    p.max_tiles = int(most_tiles(p, LEAST_TILE));

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
    take(p.logits, tokens * d.num_experts);
    take(p.weights, assignments);
    take(p.experts, assignments);
    take(p.gate, tokens);
    take(p.hits, p.slots);
    take(p.num_hit, 1);
    take(p.place, few_assignments);
    take(p.counts, p.num_groups * ceil_div(experts, 4));
    take(p.tiles, p.max_tiles);
    take(p.num_tiles, 1);
    take(p.sorted, assignments);
    take(p.act, assignments * d.width);
    take(p.shared_act, tokens * d.shared_width);
    take(p.y, y_bytes / 4);
    take(p.fresh, d.hidden);
    return p;
}

bool valid(const q35_moe_dims &d) {
    // Blocks keep a word for each expert in shared memory.
    return d.hidden > 0 && d.num_experts > 0 && d.num_experts <= 8192 && d.top_k > 0 && d.top_k <= d.num_experts &&
           d.width > 0 && d.shared_width >= 0 && d.first_expert >= 0 && d.num_here > 0 &&
           d.num_here <= d.num_experts - d.first_expert;
}

// --------------------------------------------------------------------------------------------------------- routing

// Top-k by repeated maxima (ties to the lower index), a warp a token.
__global__ void __launch_bounds__(128) route_kernel(int n, int num_experts, int top_k, const float *logits,
                                                    float *weights, int *experts) {
    const int token = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    let_next_start();
    wait_for_inputs();
    if (token >= n) return;
    const int64_t at = int64_t(token) * top_k;
    route_any(logits + int64_t(token) * num_experts, num_experts, top_k, 0, weights + at, experts + at, lane);
}

// out = sum over the experts in the order of their weights, then the shared expert; each thread 4 columns (WIDE) or 1.
// PART: some experts are not here.
template <bool WIDE, bool PART>
__global__ void __launch_bounds__(256) sum_kernel(Plan p, int col0, int cols, bf16 *out) {
    const int token = blockIdx.x, col = (blockIdx.y * 256 + threadIdx.x) * (WIDE ? 4 : 1);
    let_next_start();
    wait_for_inputs();
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
    for (int r = 0; r < p.top_k; r++) {
        const float weight = weights[r];
        if (!PART || weight >= 0) add(weight, y + int64_t(r) * p.y_cols);
    }
    if (p.has_shared)
        add(precise_sigmoid(p.gate[token]), p.y + (int64_t(p.n) * p.top_k + token) * p.y_cols + col);
    bf16 *to = out + int64_t(token) * p.hidden + col0 + col;
    if constexpr (WIDE) {
        *reinterpret_cast<uint2 *>(to) = make_uint2(pack2(sum[0], sum[1]), pack2(sum[2], sum[3]));
    } else {
        *to = __float2bfloat16_rn(sum[0]);
    }
}

// out[:, col0 .. col0 + cols] = the weighted sums of y in bf16, the experts in the order of their weights, then the
// shared expert; a thread 8 columns. PART: some experts are not here.
template <bool PART>
__global__ void __launch_bounds__(128) bf16_sum_kernel(Plan p, int col0, int cols, bf16 *out) {
    wait_for_inputs();
    let_next_start();
    const int token = blockIdx.x, col = (blockIdx.y * 128 + threadIdx.x) * 8;
    if (col >= cols) return;
    const float *weights = p.weights + int64_t(token) * p.top_k;
    const bf16 *y = reinterpret_cast<const bf16 *>(p.y) + int64_t(token) * p.top_k * cols + col;
    float sum[8] = {};
    auto load16 = [](const bf16 *from) { return __ldcs(reinterpret_cast<const uint4 *>(from)); };  // read once
    auto add = [&](float weight, uint4 packed) {
        float v[8];
        unpack8(packed, v);
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] = fmaf(weight, v[i], sum[i]);
    };
    uint4 of_shared = {};
    float gate = 0.f;
    if (p.has_shared) {
        gate = p.gate[token];
        of_shared = load16(reinterpret_cast<const bf16 *>(p.y) + (int64_t(p.n) * p.top_k + token) * cols + col);
    }
    for (int first = 0; first < p.top_k; first += 8) {
        uint4 v[8];  // loaded together
        float weight[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int r = min(first + i, p.top_k - 1);
            weight[i] = weights[r];
            if (!PART || weight[i] >= 0) v[i] = load16(y + int64_t(r) * cols);
        }
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (first + i < p.top_k && (!PART || weight[i] >= 0)) add(weight[i], v[i]);
    }
    if (p.has_shared) add(precise_sigmoid(gate), of_shared);
    store8(out + int64_t(token) * p.hidden + col0 + col, sum);
}

}  // namespace

int launch_sum(cudaStream_t stream, const Plan &p, int col0, int cols, bf16 *out) {
    // col0 and, unless it is the last, cols are multiples of 128.
    const bool wide = p.hidden % 4 == 0 && p.y_cols % 4 == 0 && aligned(out, 8);
    const dim3 grid(p.n, ceil_div(cols, wide ? 1024 : 256));
    auto kernel = p.num_here == p.num_experts ? wide ? sum_kernel<true, false> : sum_kernel<false, false>
                  : wide                      ? sum_kernel<true, true>
                                              : sum_kernel<false, true>;
    return launch(kernel, grid, 256, 0, stream, p, col0, cols, out);
}

int launch_bf16_sum(cudaStream_t stream, const Plan &p, int col0, int cols, bf16 *out) {
    auto kernel = p.num_here == p.num_experts ? bf16_sum_kernel<false> : bf16_sum_kernel<true>;
    return launch(kernel, dim3(p.n, ceil_div(cols, 1024)), 128, 0, stream, p, col0, cols, out);
}

bool make_plan(int n, const q35_moe_dims &dims, void *workspace, Plan &p) {
    if (!valid(dims)) return false;
    p = plan(n, dims, workspace);
    return true;
}

extern "C" int q35_route(void *stream, int n, int num_experts, int top_k, const float *logits, float *weights,
                         int32_t *experts) {
    if (n <= 0) return cudaSuccess;
    if (top_k < 1 || top_k > num_experts) return cudaErrorInvalidValue;
    return launch(route_kernel, ceil_div(n, 4), 128, 0, as_stream(stream), n, num_experts, top_k, logits, weights,
                  experts);
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
    if (n > FEW) return launch_many(as_stream(stream), p, weights, as_bf16(x), as_bf16(out));
    return launch_few(as_stream(stream), p, weights, Norm{}, const_cast<bf16 *>(as_bf16(x)), as_bf16(out));
}

extern "C" int q35_norm_moe(void *stream, int n, q35_moe_dims dims, q35_moe_weights weights, const q35_bf16 *delta,
                            float *residual, const float *norm, float eps, q35_bf16 *x, void *workspace,
                            q35_bf16 *out) {
    if (n <= 0) return cudaSuccess;
    if (!valid(dims)) return cudaErrorInvalidValue;
    const Plan p = plan(n, dims, workspace);
    if (n <= FEW && few_is_fast(p, weights, as_bf16(x)) && aligned(delta) && aligned(residual) && aligned(norm)) {
        const Norm before = {as_bf16(delta), residual, norm, eps, nullptr, nullptr};
        return launch_few(as_stream(stream), p, weights, before, as_bf16(x), as_bf16(out));
    }
    const int code = q35_rmsnorm_residual(stream, n, dims.hidden, delta, residual, norm, eps, x);
    return code != cudaSuccess ? code : q35_moe(stream, n, dims, weights, x, workspace, out);
}

extern "C" int q35_all_reduce_norm_moe(void *stream, q35_peers peers, int n, q35_moe_dims dims, q35_moe_weights weights,
                                       const q35_bf16 *delta, float *residual, const float *norm, float eps,
                                       q35_bf16 *x, void *workspace, q35_bf16 *out) {
    if (n <= 0) return cudaSuccess;
    if (!valid(dims) || residual == nullptr || norm == nullptr) return cudaErrorInvalidValue;
    const Plan p = plan(n, dims, workspace);
    if (n == 1 && few_is_fast(p, weights, as_bf16(x)) && aligned(delta) && aligned(residual) && aligned(norm)) {
        const Norm before = {as_bf16(delta), residual, norm, eps, nullptr, nullptr};
        return launch_few(as_stream(stream), p, weights, before, as_bf16(x), as_bf16(out), &peers);
    }
    const int code = q35_all_reduce_norm(stream, peers, n, dims.hidden, delta, residual, norm, eps, x);
    return code != cudaSuccess ? code : q35_moe(stream, n, dims, weights, x, workspace, out);
}

extern "C" int q35_moe_then_norm(void *stream, int n, q35_moe_dims dims, q35_moe_weights weights, const q35_bf16 *x,
                                 void *workspace, float *residual, const float *norm, float eps, q35_bf16 *out) {
    if (n <= 0) return cudaSuccess;
    if (!valid(dims)) return cudaErrorInvalidValue;
    const Plan p = plan(n, dims, workspace);
    if (n > FEW && norm_is_fast(p, weights, as_bf16(x), residual, norm, as_bf16(out)))
        return launch_many_then_norm(as_stream(stream), p, weights, as_bf16(x), residual, norm, eps, as_bf16(out));
    // The block's own output can wait in `out`: every kernel that reads x has ended when it comes, and the norm reads a
    // row before it writes it.
    const int code = q35_moe(stream, n, dims, weights, x, workspace, out);
    return code != cudaSuccess ? code
                               : q35_rmsnorm_residual(stream, n, dims.hidden, out, residual, norm, eps, out);
}
