// The sparse block for up to 16 tokens, which is bound by reading the experts hit. Own code.
//
// Kernels overlap: while one runs, the next is let in and loads what it can. few_down goes further than `wait_for_inputs`
// allows in general: before it waits for few_up it reads what the kernels before that one wrote (logits, the list of
// experts hit), past L1. That is sound since few_up lets it start only when it has itself waited for them.
#include <type_traits>

#include "moe.cuh"
#include "mma.cuh"

namespace {

// --------------------------------------------------------------------------------------------------- router logits

constexpr int LOGITS_WARPS = 8;
// The sum of squares of a row goes by so many lanes of 8 elements, here one a thread.
constexpr int LANES = 32 * LOGITS_WARPS;
constexpr int MOST_HIDDEN = 2 * 8 * LANES;

// Router logits and the shared expert's gate (row E) of M tokens: a warp a row, which it loads before it waits. Each
// block puts its tokens' rows into shared memory; NORM: it norms them itself, and the first one writes them to x. The
// residual is written by few_up, when no block reads it any more. VECS: groups of 8 elements of a row a thread has.
template <int M, int VECS, bool NORM>
__global__ void __launch_bounds__(LANES) few_logits(Plan p, const bf16 *router, const bf16 *shared_gate, Norm norm,
                                                    bf16 *x) {
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
    let_next_start();
    wait_for_inputs();

    if constexpr (NORM) {
        float values[M][VECS][8];
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int v = 0; v < VECS; v++) {
                const int i = 8 * (threadIdx.x + v * LANES);
                if (i < hidden) load8(norm.residual + int64_t(min(first + m, p.n - 1)) * hidden + i, values[m][v]);
            }
        }
        if (norm.delta != nullptr) {
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
    extern __shared__ unsigned by[];  // [E], the tokens of an expert
    int *starts = reinterpret_cast<int *>(by + p.num_experts);  // [E]
    __shared__ int warp_hits[FEW], warp_tokens[FEW];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    let_next_start();
    for (int e = threadIdx.x; e < p.num_experts; e += blockDim.x) by[e] = 0;
    wait_for_inputs();
    __syncthreads();
    int *experts = p.experts + warp * p.top_k;
    if (warp < p.n) {
        route_any(p.logits + int64_t(warp) * p.num_experts, p.num_experts, p.top_k, 0, p.weights + warp * p.top_k,
                  experts, lane);
        for (int r = lane; r < p.top_k; r += 32) atomicOr(&by[experts[r]], 1u << warp);  // what this lane wrote itself
    }
    __syncthreads();

    // Each warp lists a stretch of experts, behind those of the warps before.
    const int span = ceil_div(p.num_experts, 32 * FEW) * 32, first = warp * span;
    int hits = 0, tokens = 0;
    for (int i = first; i < first + span; i += 32) {
        const unsigned mask = i + lane < p.num_experts ? by[i + lane] : 0;
        hits += __popc(__ballot_sync(ALL_LANES, mask != 0));
        tokens += __reduce_add_sync(ALL_LANES, __popc(mask));
    }
    if (lane == 0) warp_hits[warp] = hits, warp_tokens[warp] = tokens;
    __syncthreads();
    int at = 0, start = 0;
    for (int i = 0; i < warp; i++) at += warp_hits[i], start += warp_tokens[i];
    if (warp == FEW - 1 && lane == 0) *p.num_hit = at + hits;
    for (int i = first; i < first + span; i += 32) {
        const unsigned mask = i + lane < p.num_experts ? by[i + lane] : 0;
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
        const int e = experts[r], place = starts[e] + __popc(by[e] & ((1u << warp) - 1));
        p.place[warp * p.top_k + r] = place;
        p.sorted[place] = warp * p.top_k + r;
    }
}

// The `i`-th token of a mask, or 0.
__device__ __forceinline__ int token_of(unsigned mask, int i) {
    for (; i > 0; i--) mask &= mask - 1;
    return mask != 0 ? __ffs(mask) - 1 : 0;
}

__device__ __forceinline__ unsigned all_tokens(int n) { return (1u << n) - 1; }

// ------------------------------------------------------------------------------------- the projections, tensor cores

constexpr int FEATURES = 8;  // of a tile of gate_up: 8 gate rows and 8 up rows are the 16 rows of an mma
constexpr int ROWS = 16;     // of the output of `down` that a block has
constexpr int PITCH = 20;    // of 16 sums in shared memory: a warp's stores hit all banks
constexpr int PART = 64;     // elements along k that a warp loads at a time: 128 bytes of a row
constexpr int UP_WARPS = 8;
constexpr int UP_STEP = 2 * PART * UP_WARPS, DOWN_STEP = 4 * PART;
constexpr int MOST_TOP_K = 32;

// 64 elements of 16 rows; lane 4 g + q has elements 8 q .. and 32 + 8 q .. of rows g and g + 8. Which place of an mma an
// element takes does not matter while weights and tokens agree.
struct Part {
    uint4 w[2][2];  // by half, then row
};

// `left`: elements of the row from this lane's first on. WHOLE: there are always enough.
template <bool WHOLE>
__device__ __forceinline__ void load_part(Part &part, const bf16 *const (&rows)[2], int offset, int left) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            part.w[h][r] = make_uint4(0, 0, 0, 0);
            if (WHOLE || offset + 32 * h < left) part.w[h][r] = stream16_in_order(rows[r] + offset + 32 * h);
        }
    }
}

// acc[i] += the part times tokens 8 i .. 8 i + 7; a lane loads of token g what it has of the rows.
template <int N, bool WHOLE>
__device__ __forceinline__ void use_part(const Part &part, const bf16 *const (&tokens)[N], int count, int offset,
                                         int left, float (&acc)[N][4]) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (i > 0 && count <= 8 * i) continue;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint4 x = make_uint4(0, 0, 0, 0);
            if (8 * i + g < count && (WHOLE || offset + 32 * h < left))
                x = *reinterpret_cast<const uint4 *>(tokens[i] + offset + 32 * h);
            const uint4 lo = part.w[h][0], hi = part.w[h][1];
            mma(acc[i], lo.x, hi.x, lo.y, hi.y, x.x, x.y);
            mma(acc[i], lo.z, hi.z, lo.w, hi.w, x.z, x.w);
        }
    }
}

// gate_up and the activation, in tiles of 8 features of an expert hit; tiles go round the blocks, the shared expert's
// first. The warps of a block split k and their sums are added in the order of the warps, so a sum has one order. A
// warp's loads run two parts ahead, past the end of a tile into the next.
template <int N, bool WHOLE>
__global__ void __launch_bounds__(32 * UP_WARPS, 3)
    few_up(Plan p, const bf16 *gate_up, const bf16 *shared_gate_up, const bf16 *x, Norm norm) {
    extern __shared__ int4 hits[];  // [slots]
    __shared__ float sums[UP_WARPS][8 * N][PITCH];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    const int hidden = p.hidden, own = warp * PART + lane % 4 * 8;  // this lane's first element
    const int shared_tiles = ceil_div(p.shared_width, FEATURES), expert_tiles = ceil_div(p.width, FEATURES);
    const int steps = ceil_div(hidden, UP_STEP);

    const bf16 *rows[2];
    int left;
    auto aim = [&](int tile) {
        const bool shared = tile < shared_tiles;
        const int width = shared ? p.shared_width : p.width, routed = tile - shared_tiles;
        const int feature = min((shared ? tile : routed % expert_tiles) * FEATURES + g, width - 1);
        const bf16 *base = shared_gate_up;
        if (!shared) base = gate_up + int64_t(hits[routed / expert_tiles].x) * 2 * width * hidden;
        rows[0] = base + int64_t(feature) * hidden + own;
        rows[1] = rows[0] + int64_t(width) * hidden;
        left = hidden - own;
    };
    Part parts[2];
    auto load = [&](int i) { load_part<WHOLE>(parts[i], rows, i * PART * UP_WARPS, left); };

    const bool early = int(blockIdx.x) < shared_tiles;
    if (early) aim(blockIdx.x), load(0), load(1);
    wait_for_inputs();
    let_next_start();  // not before: see few_down
    int num_hit = p.top_k;
    if (p.n == 1) {
        if (warp == 0) {
            const int e = route_any(p.logits, p.num_experts, p.top_k, lane, nullptr, nullptr, lane);
            if (lane < p.top_k) hits[lane] = make_int4(e, 1, lane, 0);
        }
    } else {
        for (int i = threadIdx.x; i < p.slots; i += blockDim.x) hits[i] = p.hits[i];
        num_hit = *p.num_hit;
    }
    __syncthreads();
    const int tiles = shared_tiles + num_hit * expert_tiles;
    if (!early && int(blockIdx.x) < tiles) aim(blockIdx.x), load(0), load(1);

    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int next = tile + gridDim.x, routed = tile - shared_tiles;
        const bool shared = tile < shared_tiles;
        const int4 hit = shared ? make_int4(0, int(all_tokens(p.n)), 0, 0) : hits[routed / expert_tiles];
        const int count = __popc(hit.y);
        const bf16 *tokens[N];
#pragma unroll
        for (int i = 0; i < N; i++) tokens[i] = x + int64_t(token_of(hit.y, 8 * i + g)) * hidden + own;
        float acc[N][4] = {};
#pragma unroll 1
        for (int step = 0; step < steps; step++) {
            const bool last = step + 1 == steps, more = !last || next < tiles;
            if (!last) {
                rows[0] += UP_STEP, rows[1] += UP_STEP, left -= UP_STEP;
            } else if (more) {
                aim(next);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int k = step * UP_STEP + i * PART * UP_WARPS;
                use_part<N, WHOLE>(parts[i], tokens, count, k, hidden - own, acc);
                if (more) load(i);
            }
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
#pragma unroll
            for (int e = 0; e < 4; e++) sums[warp][8 * i + lane % 4 * 2 + e % 2][g + e / 2 * 8] = acc[i][e];
        }
        __syncthreads();
        if (int(threadIdx.x) < FEATURES * count) {
            const int i = threadIdx.x % FEATURES, token = threadIdx.x / FEATURES;
            const int width = shared ? p.shared_width : p.width;
            const int feature = (shared ? tile : routed % expert_tiles) * FEATURES + i;
            float gate = 0.0f, up = 0.0f;
#pragma unroll
            for (int k = 0; k < UP_WARPS; k++) gate += sums[k][token][i], up += sums[k][token][FEATURES + i];
            bf16 *to = (shared ? p.shared_act : p.act) + int64_t(hit.z + token) * width;
            if (feature < width) to[feature] = __float2bfloat16_rn(swiglu(gate, up));
        }
        __syncthreads();
    }

    // What few_logits added, written now that it has been read: by the blocks with the fewest tiles.
    if (norm.delta == nullptr) return;
    for (int i = (gridDim.x - 1 - blockIdx.x) * blockDim.x + threadIdx.x; i < p.n * (hidden / 8);
         i += gridDim.x * blockDim.x) {
        float y[8], d[8];
        load8(norm.residual + 8 * i, y);
        load8(norm.delta + 8 * i, d);
#pragma unroll
        for (int j = 0; j < 8; j++) y[j] += d[j];
        store8(norm.residual + 8 * i, y);
    }
}

// What few_down keeps in shared memory: the list, then a scale and a place for each assignment, the scales of the shared
// expert, and a row of sums for each assignment (in the order of `sorted`) and for each token of the shared expert.
int down_bytes(int n, const Plan &p) {
    const int assignments = n * p.top_k, slots = assignments < p.num_experts ? assignments : p.num_experts;
    return slots * 16 + (2 * assignments + n + (assignments + n) * PITCH) * 4;
}

// `down` of the experts hit and their weighted sum. A block has 16 rows of the output; its warps share out the experts,
// the shared one first, and each has all of k. Loads run four parts ahead, past the end of an expert into the next, and
// the first are under way before few_up has ended.
template <int N, bool WHOLE>
__global__ void __launch_bounds__(N == 1 ? 576 : 512, 1) few_down(Plan p, const bf16 *down, const bf16 *shared_down, bf16 *out) {
    extern __shared__ int4 hits[];  // [slots]
    const int assignments = p.n * p.top_k;
    float *scales = reinterpret_cast<float *>(hits + p.slots);  // [assignments], then [n] of the shared expert
    int *places = reinterpret_cast<int *>(scales + assignments + p.n);
    float *sums = reinterpret_cast<float *>(places + assignments);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32, g = lane / 4;
    const int row0 = blockIdx.x * ROWS, own = lane % 4 * 8;

    int num_hit = p.top_k;
    if (p.n == 1) {
        if (warp == 0) {
            route_any(p.logits, p.num_experts, p.top_k, 0, scales, places, lane);
            if (lane < p.top_k) {  // what this lane wrote itself
                hits[lane] = make_int4(places[lane], 1, lane, 0);
                places[lane] = lane;
            }
        }
    } else {
        for (int i = threadIdx.x; i < p.slots; i += blockDim.x) hits[i] = __ldcg(p.hits + i);
        for (int i = threadIdx.x; i < assignments; i += blockDim.x)
            scales[i] = __ldcg(p.weights + i), places[i] = __ldcg(p.place + i);
        num_hit = __ldcg(p.num_hit);
    }
    if (p.has_shared && int(threadIdx.x) < p.n)
        scales[assignments + threadIdx.x] = precise_sigmoid(__ldcg(p.gate + threadIdx.x));
    __syncthreads();

    const int items = p.has_shared + num_hit;
    const bf16 *rows[2];
    int left;
    auto aim = [&](int item) {
        const bool shared = item < p.has_shared;
        const int k = shared ? p.shared_width : p.width;
        const bf16 *base = shared_down;
        if (!shared) base = down + int64_t(hits[item - p.has_shared].x) * p.hidden * k;
        rows[0] = base + int64_t(min(row0 + g, p.hidden - 1)) * k + own;
        rows[1] = base + int64_t(min(row0 + g + 8, p.hidden - 1)) * k + own;
        left = k - own;
    };
    Part parts[4];
    auto load = [&](int i) { load_part<WHOLE>(parts[i], rows, i * PART, left); };
    if (warp < items) {
        aim(warp);
#pragma unroll
        for (int i = 0; i < 4; i++) load(i);
    }
    let_next_start();
    wait_for_inputs();

    for (int item = warp; item < items; item += num_warps) {
        const int next = item + num_warps;
        const bool shared = item < p.has_shared;
        const int4 hit = shared ? make_int4(0, int(all_tokens(p.n)), 0, 0) : hits[item - p.has_shared];
        const int count = __popc(hit.y), k = shared ? p.shared_width : p.width, steps = ceil_div(k, DOWN_STEP);
        const bf16 *tokens[N];
#pragma unroll
        for (int i = 0; i < N; i++)
            tokens[i] = (shared ? p.shared_act : p.act) + int64_t(hit.z + min(8 * i + g, count - 1)) * k + own;
        float acc[N][4] = {};
#pragma unroll 1
        for (int step = 0; step < steps; step++) {
            const bool last = step + 1 == steps, more = !last || next < items;
            if (!last) {
                rows[0] += DOWN_STEP, rows[1] += DOWN_STEP, left -= DOWN_STEP;
            } else if (more) {
                aim(next);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                use_part<N, WHOLE>(parts[i], tokens, count, step * DOWN_STEP + i * PART, k - own, acc);
                if (more) load(i);
            }
        }
        float *to = sums + (shared ? assignments : hit.z) * PITCH;
#pragma unroll
        for (int i = 0; i < N; i++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int token = 8 * i + lane % 4 * 2 + e % 2;
                if (token < count) to[token * PITCH + g + e / 2 * 8] = acc[i][e];
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < p.n * ROWS; i += blockDim.x) {
        const int row = i % ROWS, t = i / ROWS;
        float sum = 0.0f;
        for (int r = t * p.top_k; r < (t + 1) * p.top_k; r++)
            sum = fmaf(scales[r], sums[places[r] * PITCH + row], sum);
        if (p.has_shared) sum = fmaf(scales[assignments + t], sums[(assignments + t) * PITCH + row], sum);
        if (row0 + row < p.hidden) out[int64_t(t) * p.hidden + row0 + row] = __float2bfloat16_rn(sum);
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

// One projection of the experts hit: blockIdx.y is the shared expert (0, where there is one) or an expert of the list, a
// warp takes a feature past every token.
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

int route(cudaStream_t stream, const Plan &p) {
    const int bytes = 2 * p.num_experts * int(sizeof(int));
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
    if (code == cudaSuccess) code = route(stream, p);
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

int num_sms() {
    static int known[64];  // by device
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return 132;
    if (known[device] == 0) {
        int count = 0;
        if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 132;
        known[device] = count;
    }
    return known[device];
}

template <int N>
int launch_fast(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, const Norm &norm, bf16 *x, bf16 *out) {
    const bool narrow = p.hidden <= MOST_HIDDEN / 2;
    constexpr int M = 4;
    auto logits = norm.w == nullptr ? p.n == 1 ? narrow ? few_logits<1, 1, false> : few_logits<1, 2, false>
                                      : narrow ? few_logits<M, 1, false>
                                               : few_logits<M, 2, false>
                  : p.n == 1 ? narrow ? few_logits<1, 1, true> : few_logits<1, 2, true>
                  : narrow   ? few_logits<M, 1, true>
                             : few_logits<M, 2, true>;
    const dim3 logits_grid(ceil_div(p.num_experts + p.has_shared, LOGITS_WARPS), ceil_div(p.n, M));
    int code = launch(logits, logits_grid, LANES, 0, stream, p, as_bf16(w.router), as_bf16(w.shared_gate), norm, x);
    if (code == cudaSuccess && p.n > 1) code = route(stream, p);
    if (code != cudaSuccess) return code;

    // One wave of blocks, fewer where there are fewer tiles.
    const int sms = num_sms();
    const int64_t most = ceil_div(p.shared_width, FEATURES) + int64_t(p.slots) * ceil_div(p.width, FEATURES);
    const int up_blocks = most < 3 * sms ? int(most) : 3 * sms;
    auto up = p.hidden % UP_STEP == 0 ? few_up<N, true> : few_up<N, false>;
    code = launch(up, up_blocks, 32 * UP_WARPS, p.slots * sizeof(int4), stream, p, as_bf16(w.gate_up),
                  as_bf16(w.shared_gate_up), x, norm);
    if (code != cudaSuccess) return code;

    const int blocks = ceil_div(p.hidden, ROWS), items = p.slots + p.has_shared;
    const int most_warps = blocks <= sms ? 16 : p.n == 1 ? 9 : 8, warps = items < most_warps ? items : most_warps;
    auto down = p.width % DOWN_STEP == 0 && p.shared_width % DOWN_STEP == 0 ? few_down<N, true> : few_down<N, false>;
    return launch(down, blocks, 32 * warps, down_bytes(p.n, p), stream, p, as_bf16(w.down), as_bf16(w.shared_down),
                  out);
}

}  // namespace

bool few_is_fast(const Plan &p, const q35_moe_weights &w, const bf16 *x) {
    const void *const pointers[] = {w.router,      w.gate_up,     w.down, w.shared_gate_up,
                                    w.shared_down, w.shared_gate, x,      p.act,
                                    p.shared_act};
    for (const void *pointer : pointers)
        if (!aligned(pointer)) return false;
    return p.hidden % 8 == 0 && p.hidden <= MOST_HIDDEN && p.width % 8 == 0 && p.shared_width % 8 == 0 &&
           p.top_k <= MOST_TOP_K && down_bytes(FEW, p) <= 48 << 10;
}

int launch_few(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, const Norm &norm, bf16 *x, bf16 *out) {
    if (!few_is_fast(p, w, x)) return launch_any(stream, p, w, x, out);
    return p.n <= 8 ? launch_fast<1>(stream, p, w, norm, x, out) : launch_fast<2>(stream, p, w, norm, x, out);
}
