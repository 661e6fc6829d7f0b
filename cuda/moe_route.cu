// Up to 16 tokens, before the projections: the norm and the logits of the router, and the list of the experts hit; and
// the whole block for sizes that are not made of vectors.
#include "all_reduce.cuh"
#include "moe.cuh"

namespace {

// --------------------------------------------------------------------------------------------------- router logits

constexpr int LOGITS_WARPS = 8;
// The sum of squares of a row goes by LANES lanes of 8 elements, here one a thread.
static_assert(LANES == 32 * LOGITS_WARPS && MOST_HIDDEN == 2 * 8 * LANES, "");

// What the residual stream is changed by before its norm: the delta as it is, or the sum of those of all ranks.
struct Own {
    static constexpr bool OF_RANKS = false;
};
struct OfRanks {
    static constexpr bool OF_RANKS = true;
    q35_peers peers;
    int64_t lines_at;
};

// Router logits and the shared expert's gate (row E) of M tokens: a warp a row, which it loads before it waits. Each
// block puts its tokens' rows into shared memory; NORM: it norms them itself, and the first one writes them to x. The
// residual is written by few_up, when no block reads it any more. VECS: groups of 8 elements of a row a thread has.
// Of ranks the first block sends the others this one's row, as reduce_few (all_reduce.cu) would, and every block adds up
// what comes: a kernel less. Their turn is counted when all have read it, which is with the residual.
template <int M, int VECS, bool NORM, typename Change>
__global__ void __launch_bounds__(LANES, Change::OF_RANKS ? 2 : 1) few_logits(Plan p, const bf16 *router, const bf16 *shared_gate, Norm norm,
                                                    const __grid_constant__ Change change, bf16 *x, bf16 *tiles) {
    __shared__ __align__(16) bf16 rows[M][8 * LANES * VECS];
    __shared__ float parts[M][LOGITS_WARPS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, hidden = p.hidden;
    const int row = blockIdx.x * LOGITS_WARPS + warp, first = blockIdx.y * M;
    const bool there = row < p.num_experts + p.has_shared;
    const bf16 *w = row < p.num_experts ? router + int64_t(row) * hidden : shared_gate;
    uint4 packed[8 * VECS];
#pragma unroll
    for (int u = 0; u < 8 * VECS; u++) {
        packed[u] = make_uint4(0, 0, 0, 0);
        const int i = lane * 8 + u * 256;
        if (there && i < hidden) packed[u] = stream16_in_order(w + i);
    }
    float norm_w[VECS][8];
#pragma unroll
    for (int v = 0; v < VECS; v++) {
        const int i = 8 * (threadIdx.x + v * LANES);
        if (NORM && i < hidden) load8(norm.w + i, norm_w[v]);
    }
    bool early = true;
    if constexpr (Change::OF_RANKS) early = change.peers.early;
    if (early) let_next_start();
    wait_for_inputs();

    if constexpr (NORM) {
        float values[M][VECS][8];
        uint4 own[VECS] = {};
        if constexpr (Change::OF_RANKS) {
#pragma unroll
            for (int v = 0; v < VECS; v++) {
                const int i = 8 * (threadIdx.x + v * LANES);
                if (i < hidden) own[v] = *reinterpret_cast<const uint4 *>(norm.delta + i);
            }
        }
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int v = 0; v < VECS; v++) {
                const int i = 8 * (threadIdx.x + v * LANES);
                if (i < hidden) load8(norm.residual + int64_t(min(first + m, p.n - 1)) * hidden + i, values[m][v]);
            }
        }
        if constexpr (Change::OF_RANKS) {
            static_assert(M == 1, "a turn of a channel is a row");
            const uint32_t count = turn_after(get_word(norm.turns));
            if (__syncthreads_or(get_word(change.peers.status) != 0)) return;
            const Lines lines = {change.peers, change.lines_at, 0, hidden, count};
            if (blockIdx.x == 0) lines.send(threadIdx.x, own);
            float sum[VECS][8];
            bool waiting = true;
            lines.add_up<1>(threadIdx.x, own, waiting, sum);
#pragma unroll
            for (int v = 0; v < VECS; v++) {
                const int i = 8 * (threadIdx.x + v * LANES);
                if (i >= hidden) continue;
#pragma unroll
                for (int j = 0; j < 8; j++) values[0][v][j] += sum[v][j];
                if (blockIdx.x == 0) store8(norm.fresh + i, values[0][v]);
            }
        } else if (norm.delta != nullptr) {
#pragma unroll
            for (int m = 0; m < M; m++) {
#pragma unroll
                for (int v = 0; v < VECS; v++) {
                    const int i = 8 * (threadIdx.x + v * LANES);
                    if (i >= hidden) continue;
                    float d[8];
                    load8(norm.delta + int64_t(min(first + m, p.n - 1)) * hidden + i, d);
#pragma unroll
                    for (int j = 0; j < 8; j++) values[m][v][j] += d[j];
                }
            }
        }
#pragma unroll
        for (int m = 0; m < M; m++) {
            float squares = 0.0f;
#pragma unroll
            for (int v = 0; v < VECS; v++) {
                if (8 * int(threadIdx.x + v * LANES) >= hidden) continue;
#pragma unroll
                for (int j = 0; j < 8; j++) squares = fmaf(values[m][v][j], values[m][v][j], squares);
            }
            squares = lane_sum(squares);
            if (lane == 0) parts[m][warp] = squares;
        }
        __syncthreads();
#pragma unroll
        for (int m = 0; m < M; m++) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < LOGITS_WARPS; i++) sum += parts[m][i];
            const float scale = 1.0f / sqrtf(sum / float(hidden) + norm.eps);
#pragma unroll
            for (int v = 0; v < VECS; v++) {
                const int i = 8 * (threadIdx.x + v * LANES);
                if (i >= hidden) continue;
                float y[8];
#pragma unroll
                for (int j = 0; j < 8; j++) y[j] = values[m][v][j] * scale * norm_w[v][j];
                store8(rows[m] + i, y);
                if (blockIdx.x == 0 && first + m < p.n) store8(x + int64_t(first + m) * hidden + i, y);
            }
        }
    } else {
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int v = 0; v < VECS; v++) {
                const int i = 8 * (threadIdx.x + v * LANES);
                const bf16 *from = x + int64_t(min(first + m, p.n - 1)) * hidden + i;
                if (i < hidden) *reinterpret_cast<uint4 *>(rows[m] + i) = *reinterpret_cast<const uint4 *>(from);
            }
        }
    }
    __syncthreads();

    if (tiles != nullptr) {
        const int words = hidden / 2;
        for (int i = blockIdx.x * LANES + threadIdx.x; i < M * words; i += gridDim.x * LANES) {
            const int m = i / words, at = i % words;
            if (first + m < p.n)
                reinterpret_cast<uint32_t *>(tiles + int64_t(first + m) * hidden)[at] =
                    reinterpret_cast<const uint32_t *>(rows[m])[from_tile_order(at)];
        }
    }

    float acc[M] = {};
#pragma unroll
    for (int u = 0; u < 8 * VECS; u++) {
        const int i = lane * 8 + u * 256;
        if (i >= hidden) continue;
        float b[8];
        unpack8(packed[u], b);
#pragma unroll
        for (int m = 0; m < M; m++) {
            float a[8];
            load8(rows[m] + i, a);
#pragma unroll
            for (int j = 0; j < 8; j++) acc[m] = fmaf(a[j], b[j], acc[m]);
        }
    }
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++) {
        const float sum = lane_sum(acc[m]);
        const int t = first + m;
        if (lane == 0 && there && t < p.n)
            *(row < p.num_experts ? p.logits + int64_t(t) * p.num_experts + row : p.gate + t) = sum;
    }
}

// --------------------------------------------------------------------------------------------------------- routing

// Routes up to 16 tokens, a warp each, and lists the experts hit with their tokens.
__global__ void __launch_bounds__(32 * FEW) few_route(Plan p) {
    extern __shared__ unsigned by[];  // [num_here], the tokens of an expert
    int *starts = reinterpret_cast<int *>(by + p.num_here);  // [num_here]
    __shared__ int warp_hits[FEW], warp_tokens[FEW];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    let_next_start();
    for (int e = threadIdx.x; e < p.num_here; e += blockDim.x) by[e] = 0;
    wait_for_inputs();
    __syncthreads();
    int *experts = p.experts + warp * p.top_k;
    if (warp < p.n) {
        float *weights = p.weights + warp * p.top_k;
        route_any(p.logits + int64_t(warp) * p.num_experts, p.num_experts, p.top_k, 0, weights, experts, lane);
        for (int r = lane; r < p.top_k; r += 32) {  // what this lane wrote itself
            const int e = experts[r] - p.first_expert;
            if (is_here(p, e)) {
                atomicOr(&by[e], 1u << warp);
            } else {
                weights[r] = NOT_HERE;
            }
        }
    }
    __syncthreads();

    // Each warp lists a stretch of experts, behind those of the warps before.
    const int span = ceil_div(p.num_here, 32 * FEW) * 32, first = warp * span;
    int hits = 0, tokens = 0;
    for (int i = first; i < first + span; i += 32) {
        const unsigned mask = i + lane < p.num_here ? by[i + lane] : 0;
        hits += __popc(__ballot_sync(ALL_LANES, mask != 0));
        tokens += __reduce_add_sync(ALL_LANES, __popc(mask));
    }
    if (lane == 0) warp_hits[warp] = hits, warp_tokens[warp] = tokens;
    __syncthreads();
    int at = 0, start = 0;
    for (int i = 0; i < warp; i++) at += warp_hits[i], start += warp_tokens[i];
    if (warp == FEW - 1 && lane == 0) *p.num_hit = at + hits;
    for (int i = first; i < first + span; i += 32) {
        const unsigned mask = i + lane < p.num_here ? by[i + lane] : 0;
        const unsigned any = __ballot_sync(ALL_LANES, mask != 0);
        const int own = __popc(mask);
        int sum = own;  // up to and with this lane's
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const int before = __shfl_up_sync(ALL_LANES, sum, d);
            if (lane >= d) sum += before;
        }
        if (mask != 0) {
            starts[i + lane] = start + sum - own;
            p.hits[at + __popc(any & ((1u << lane) - 1))] = make_int4(i + lane, int(mask), start + sum - own, 0);
        }
        at += __popc(any);
        start += __shfl_sync(ALL_LANES, sum, 31);
    }
    __syncthreads();
    if (warp >= p.n) return;
    for (int r = lane; r < p.top_k; r += 32) {
        const int e = experts[r] - p.first_expert, at = warp * p.top_k + r;
        int place = 0;
        if (is_here(p, e)) {
            place = starts[e] + __popc(by[e] & ((1u << warp) - 1));
            p.sorted[place] = at;
        }
        p.place[at] = place;
    }
}

// ------------------------------------------------------------------------------------------------------- any sizes

// The logits where rows are too long for few_logits, or not made of vectors.
template <bool VEC>
__global__ void __launch_bounds__(64) any_logits(Plan p, const bf16 *router, const bf16 *shared_gate, const bf16 *x) {
    const int row = blockIdx.x * 2 + threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.y * 4;
    let_next_start();
    wait_for_inputs();
    if (row >= p.num_experts + p.has_shared) return;
    const bf16 *const w[1] = {row < p.num_experts ? router + int64_t(row) * p.hidden : shared_gate};
    const bf16 *in[4];
#pragma unroll
    for (int m = 0; m < 4; m++) in[m] = x + int64_t(min(first + m, p.n - 1)) * p.hidden;
    float acc[1][4];
    warp_dots<1, 4, 4, VEC>(w, in, p.hidden, lane, acc);
#pragma unroll
    for (int m = 0; m < 4; m++) {
        const int t = first + m;
        if (lane == 0 && t < p.n)
            *(row < p.num_experts ? p.logits + int64_t(t) * p.num_experts + row : p.gate + t) = acc[0][m];
    }
}

// One projection of the experts hit: blockIdx.y is the shared expert (0, where there is one) or an expert of the list;
// a warp takes a feature past every token.
template <bool DOWN, bool VEC>
__global__ void __launch_bounds__(128) any_rows(Plan p, const bf16 *weights, const bf16 *shared_weights,
                                                const bf16 *x) {
    let_next_start();
    wait_for_inputs();
    const int lane = threadIdx.x % 32, feature = blockIdx.x * 4 + threadIdx.x / 32;
    const bool shared = int(blockIdx.y) < p.has_shared;
    const int slot = blockIdx.y - p.has_shared, width = shared ? p.shared_width : p.width;
    const int features = DOWN ? p.hidden : width, k = DOWN ? width : p.hidden;
    if (feature >= features || (!shared && slot >= *p.num_hit)) return;
    const int4 hit = shared ? make_int4(0, int(all_tokens(p.n)), 0, 0) : p.hits[slot];
    const int64_t row = int64_t(shared ? 0 : hit.x) * (DOWN ? 1 : 2) * features + feature;
    const bf16 *const gate = (shared ? shared_weights : weights) + row * k, *const up = gate + int64_t(features) * k;
    const int count = __popc(hit.y);
    bf16 *act = (shared ? p.shared_act : p.act) + int64_t(hit.z) * width;
    for (int i = 0; i < count; i++) {
        if constexpr (DOWN) {
            const bf16 *const w[1] = {gate}, *const in[1] = {act + int64_t(i) * width};
            float acc[1][1];
            warp_dots<1, 1, 1, VEC>(w, in, k, lane, acc);
            const int at = shared ? p.n * p.top_k + i : p.sorted[hit.z + i];
            if (lane == 0) p.y[int64_t(at) * features + feature] = acc[0][0];
        } else {
            const bf16 *const w[2] = {gate, up}, *const in[1] = {x + int64_t(token_of(hit.y, i)) * k};
            float acc[2][1];
            warp_dots<2, 1, 1, VEC>(w, in, k, lane, acc);
            if (lane == 0) act[int64_t(i) * width + feature] = __float2bfloat16_rn(swiglu(acc[0][0], acc[1][0]));
        }
    }
}

// -------------------------------------------------------------------------------------------------------- launchers

template <int M, bool NORM, typename Change = Own>
int launch_logits(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, const Norm &norm, bf16 *x, bf16 *tiles,
                  const Change &change = {}) {
    const dim3 grid(ceil_div(p.num_experts + p.has_shared, LOGITS_WARPS), ceil_div(p.n, M));
    auto kernel = p.hidden <= MOST_HIDDEN / 2 ? few_logits<M, 1, NORM, Change> : few_logits<M, 2, NORM, Change>;
    return launch(kernel, grid, LANES, 0, stream, p, as_bf16(w.router), as_bf16(w.shared_gate), norm, change, x, tiles);
}

}  // namespace

int launch_logits(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, const Norm &norm, bf16 *x,
                  bf16 *tiles) {
    auto launch = norm.w == nullptr ? p.n == 1 ? launch_logits<1, false, Own> : launch_logits<4, false, Own>
                  : p.n == 1        ? launch_logits<1, true, Own>
                                    : launch_logits<4, true, Own>;
    return launch(stream, p, w, norm, x, tiles, {});
}

int launch_logits(cudaStream_t stream, const q35_peers &peers, const Plan &p, const q35_moe_weights &w, Norm &norm,
                  bf16 *x, bf16 *tiles) {
    if (p.n != 1 || norm.w == nullptr || norm.delta == nullptr || !valid(peers) || p.hidden > peers.width)
        return cudaErrorInvalidValue;
    norm.fresh = p.fresh;
    norm.turns = reinterpret_cast<uint32_t *>(static_cast<char *>(peers.regions[peers.rank]) + COUNTS_AT) +
                 COUNT_LINES * Q35_MAX_CHANNELS;
    return launch_logits<1, true, OfRanks>(stream, p, w, norm, x, tiles, {peers, places(peers).lines});
}

int launch_route(cudaStream_t stream, const Plan &p) {
    const int bytes = 2 * p.num_here * int(sizeof(int));
    if (bytes > 40 << 10) {
        const cudaError_t code = cudaFuncSetAttribute(few_route, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (code != cudaSuccess) return code;
    }
    return launch(few_route, 1, 32 * FEW, bytes, stream, p);
}

int launch_any(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, const bf16 *x, bf16 *out) {
    const bool vec = p.hidden % 8 == 0 && aligned(x) && aligned(w.router) && aligned(w.shared_gate);
    const bool vec_up = p.hidden % 8 == 0 && aligned(x) && aligned(w.gate_up) && aligned(w.shared_gate_up);
    const bool vec_down = p.width % 8 == 0 && p.shared_width % 8 == 0 && aligned(p.act) && aligned(w.down) &&
                          aligned(w.shared_down);
    int code = launch(vec ? any_logits<true> : any_logits<false>,
                      dim3(ceil_div(p.num_experts + p.has_shared, 2), ceil_div(p.n, 4)), 64, 0, stream, p,
                      as_bf16(w.router), as_bf16(w.shared_gate), x);
    if (code == cudaSuccess) code = launch_route(stream, p);
    if (code != cudaSuccess) return code;
    const int widest = p.width > p.shared_width ? p.width : p.shared_width;
    code = launch(vec_up ? any_rows<false, true> : any_rows<false, false>,
                  dim3(ceil_div(widest, 4), p.slots + p.has_shared), 128, 0, stream, p, as_bf16(w.gate_up),
                  as_bf16(w.shared_gate_up), x);
    if (code != cudaSuccess) return code;
    code = launch(vec_down ? any_rows<true, true> : any_rows<true, false>,
                  dim3(ceil_div(p.hidden, 4), p.slots + p.has_shared), 128, 0, stream, p, as_bf16(w.down),
                  as_bf16(w.shared_down), x);
    return code != cudaSuccess ? code : launch_sum(stream, p, 0, p.hidden, out);
}
