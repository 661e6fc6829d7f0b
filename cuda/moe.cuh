// What the files of the sparse block share: where things lie in its workspace, dot products and routing by a warp.
#pragma once
#include "peers.cuh"

// Up to so many tokens the weights are streamed past vectors; more take the tensor cores.
constexpr int FEW = 16;
// Tokens whose experts are counted together.
constexpr int GROUP = 32;
// The smaller of the two heights of a tile of moe_grouped.cu.
constexpr int SMALL_TILE = 64;
// No list has tiles that are to be lower; there is room for these.
constexpr int LEAST_TILE = 32;

// The pieces of the workspace and what a launch needs to know besides. Passed by value to kernels.
struct Plan {
    int n, hidden, num_experts, top_k, width, shared_width, has_shared;
    int first_expert, num_here;
    // Columns of `hidden` that `y` holds at a time.
    int y_cols;
    int num_groups, max_tiles;
    float *logits;      // [n, E]
    float *weights;     // [n, top_k], or NOT_HERE
    int *experts;       // [n, top_k], of all; what follows numbers those that are here, from 0
    float *gate;        // [n]: shared_gate . x
    int slots;          // few: no more experts than this are hit
    int4 *hits;         // few: [slots], an expert hit, its tokens (bit t: token t), where they start in `sorted`
    int *num_hit;       // few: [1]
    int *place;         // few: [n * top_k], where an assignment stands in `sorted`; 0 where its expert is not here
    uint32_t *counts;   // many: [num_groups, experts rounded up to words], a byte each: how many of 32 tokens it has
    int2 *tiles;        // many: [max_tiles], expert, rows and first of its assignments
    int *num_tiles;     // many: [1]
    int *sorted;        // [n * top_k], assignments (pairs of a token and one of its experts) by expert, then token;
                        // those alone whose experts are here
    bf16 *act;          // [n * top_k, width], in the order of `sorted`
    bf16 *shared_act;   // [n, shared_width]
    float *y;           // [n * top_k + n, y_cols]: by assignment, then the shared expert's
    float *fresh;       // [hidden], see Norm
    int64_t bytes;
};

// Of a list of tiles of up to so many rows: no more than these.
static inline int64_t most_tiles(const Plan &p, int high) {
    const int64_t assignments = int64_t(p.n) * p.top_k;
    return assignments / high + (p.num_here < assignments ? p.num_here : assignments);
}

// In place of the weight, which is 0 or more, of an assignment to an expert that is not here: its term is left out of
// sums, since nobody computes it.
constexpr float NOT_HERE = -1.f;

// The norm before a sparse block; without one `w` is null. Where ranks add up `delta` on the way, of a single token,
// `fresh` is what becomes of the residual, [hidden], and `turns` the count of this rank's sums.
struct Norm {
    const bf16 *delta;
    float *residual;
    const float *w;
    float eps;
    float *fresh;
    uint32_t *turns;
};

// Rows of up to so many elements are normed and routed by the fast kernels.
constexpr int MOST_HIDDEN = 4096;

// Where things are for n tokens; false where the sizes are none.
bool make_plan(int n, const q35_moe_dims &dims, void *workspace, Plan &p);
// Of the device that is current.
int num_sms();

// Whether the fast kernels take up to 16 tokens of this block. That may not depend on how many they are.
bool few_is_fast(const Plan &p, const q35_moe_weights &w, const bf16 *x);
// With a norm, which asks for few_is_fast, x is written, else read.
// Given `peers`, of a single token, delta is the sum of all ranks'.
int launch_few(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, Norm norm, bf16 *x, bf16 *out,
               const q35_peers *peers = nullptr);
// Its parts: p.logits and p.gate; then routing and the list of experts hit; and, for any sizes, the whole of it.
// `tiles`: rows of x are written there too, in the order of tiles; or null.
int launch_logits(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, const Norm &norm, bf16 *x,
                  bf16 *tiles = nullptr);
// The same of a single token, whose delta is the sum of all ranks'. It sets what norm has of ranks, for the kernel after it.
int launch_logits(cudaStream_t stream, const q35_peers &peers, const Plan &p, const q35_moe_weights &w, Norm &norm,
                  bf16 *x, bf16 *tiles = nullptr);
int launch_route(cudaStream_t stream, const Plan &p);
int launch_any(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, const bf16 *x, bf16 *out);
// p.logits of any number of tokens.
int launch_tile_logits(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, const bf16 *x);
// Without `out` it leaves y, which must then have all columns: in bf16 where has_wgmma says so, else in f32.
int launch_many(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, const bf16 *x, bf16 *out);
// moe_norm.cu: many tokens, then the norm after the block in the kernel of the weighted sums; and whether it serves.
bool norm_is_fast(const Plan &p, const q35_moe_weights &w, const bf16 *x, const float *residual, const float *norm,
                  const bf16 *out);
int launch_many_then_norm(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, const bf16 *x,
                          float *residual, const float *norm, float eps, bf16 *out);
// Its end: from y, with all columns, in bf16 where `rounded`, else in f32.
int launch_sum_norm(cudaStream_t stream, const Plan &p, bool rounded, float *residual, const float *norm, float eps,
                    bf16 *out);
// out[:, col0 .. col0 + cols] = the weighted sums of y.
int launch_sum(cudaStream_t stream, const Plan &p, int col0, int cols, bf16 *out);
// The same of rows of `cols` bf16, a multiple of 8; `out` is 16-byte aligned.
int launch_bf16_sum(cudaStream_t stream, const Plan &p, int col0, int cols, bf16 *out);

// ------------------------------------------------------------------------------------------------ device functions

template <int R, int M, int U>
__device__ __forceinline__ void dot_step(const bf16 *const (&w)[R], const bf16 *const (&x)[M], int i,
                                         float (&acc)[R][M]) {
    uint4 packed[U][R];
#pragma unroll
    for (int u = 0; u < U; u++)
#pragma unroll
        for (int r = 0; r < R; r++) packed[u][r] = stream16(w[r] + i + u * 256);
#pragma unroll
    for (int u = 0; u < U; u++)
#pragma unroll
        for (int m = 0; m < M; m++) {
            float a[8];
            load8(x[m] + i + u * 256, a);
#pragma unroll
            for (int r = 0; r < R; r++) {
                float b[8];
                unpack8(packed[u][r], b);
#pragma unroll
                for (int j = 0; j < 8; j++) acc[r][m] = fmaf(a[j], b[j], acc[r][m]);
            }
        }
}

// acc[r][m] = w[r] . x[m] over k elements, by the whole warp; every lane has every sum. A lane adds its elements in
// ascending order, then lanes are added as a butterfly: a sum has one order, whatever R, M and U (the steps whose loads
// are in flight together) are. VEC: k a multiple of 8 and every pointer 16-byte aligned.
template <int R, int M, int U, bool VEC>
__device__ __forceinline__ void warp_dots(const bf16 *const (&w)[R], const bf16 *const (&x)[M], int k, int lane,
                                          float (&acc)[R][M]) {
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int m = 0; m < M; m++) acc[r][m] = 0.f;
    if (VEC) {
        int i = lane * 8;
#pragma unroll 1
        for (; i + (U - 1) * 256 < k; i += U * 256) dot_step<R, M, U>(w, x, i, acc);
        if (U > 1) {
#pragma unroll 1
            for (; i < k; i += 256) dot_step<R, M, 1>(w, x, i, acc);
        }
    } else {
#pragma unroll 1
        for (int i = lane; i < k; i += 32) {
            float a[M];
#pragma unroll
            for (int m = 0; m < M; m++) a[m] = __bfloat162float(x[m][i]);
#pragma unroll
            for (int r = 0; r < R; r++) {
                const float b = __bfloat162float(w[r][i]);
#pragma unroll
                for (int m = 0; m < M; m++) acc[r][m] = fmaf(a[m], b, acc[r][m]);
            }
        }
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int m = 0; m < M; m++) acc[r][m] = lane_sum(acc[r][m]);
}

__device__ __forceinline__ float swiglu(float gate, float up) { return gate / (1.f + expf(-gate)) * up; }

// Where word `i` of a row (of two elements) is in the order of tiles: of each 64 elements lane t of four takes the words
// t, t + 4, .. for tensor-core fragments, and has them one after the other.
__device__ __forceinline__ int in_tile_order(int i) { return (i & ~31) | (i % 4 * 8 + i % 32 / 4); }
__device__ __forceinline__ int from_tile_order(int i) { return (i & ~31) | (i % 8 * 4 + i % 32 / 8); }

// What few_logits made of the residual, written by the kernel after it: now nobody reads the old one any more. Its
// `count` threads are numbered from 0.
__device__ __forceinline__ void write_residual(const Plan &p, const Norm &norm, int thread, int count) {
    if (norm.delta == nullptr) return;
    for (int i = thread; i < p.n * (p.hidden / 8); i += count) {
        float y[8];
        if (norm.fresh != nullptr) {
            load8(norm.fresh + 8 * i, y);
        } else {
            float d[8];
            load8(norm.residual + 8 * i, y);
            load8(norm.delta + 8 * i, d);
#pragma unroll
            for (int j = 0; j < 8; j++) y[j] += d[j];
        }
        store8(norm.residual + 8 * i, y);
    }
    if (norm.turns != nullptr && thread == 0) *norm.turns = turn_after(*norm.turns);
}

// The `i`-th token of a mask, or 0.
__device__ __forceinline__ int token_of(unsigned mask, int i) {
    for (; i > 0; i--) mask &= mask - 1;
    return mask != 0 ? __ffs(mask) - 1 : 0;
}

__device__ __forceinline__ unsigned all_tokens(int n) { return (1u << n) - 1; }

// Unsigned order of the keys is the order of routing: NaN 1, then -inf up to +inf, -0 with +0. 0 is no logit.
__device__ __forceinline__ uint32_t route_key(float x) {
    const uint32_t bits = __float_as_uint(x + 0.f);  // -0 + 0 is +0
    const uint32_t key = bits ^ (static_cast<uint32_t>(static_cast<int>(bits) >> 31) | 0x80000000u);
    return x != x ? 1 : key;
}
__device__ __forceinline__ float route_value(uint32_t key) {
    if (key == 1) return __uint_as_float(0x7fffffffu);
    return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// The `rounds` best of a row of logits by one warp, a maximum a round; returns the expert of round `want`. With
// `weights`, rounds is top_k, and they and `experts` are written, element r by lane r % 32.
// P: logits a lane holds in registers (num_experts <= 32 P), or 0: they are read again every round. They are read past
// L1, which may hold older ones while kernels overlap.
template <int P>
__device__ int route_row(const float *row, int num_experts, int rounds, int want, float *weights, int *experts,
                         int lane) {
    uint32_t keys[P > 0 ? P : 1];
    if (P > 0) {
        float values[P > 0 ? P : 1];  // all loads before the first use
#pragma unroll
        for (int i = 0; i < P; i++) values[i] = __ldcg(row + min(lane + 32 * i, num_experts - 1));
#pragma unroll
        for (int i = 0; i < P; i++) keys[i] = lane + 32 * i < num_experts ? route_key(values[i]) : 0;
    }
    uint32_t last_key = 0xffffffffu;  // above every key
    int last = -1, wanted = 0;
    float max = 0.f, sum = 0.f;
    for (int r = 0; r < rounds; r++) {
        uint32_t best_key = 0;
        int best = 0x7fffffff;
        if (P > 0) {
#pragma unroll
            for (int i = 0; i < P; i++) {
                if (lane + 32 * i == last) keys[i] = 0;
                if (keys[i] > best_key) best_key = keys[i], best = lane + 32 * i;  // of equals the first
            }
        } else {
            for (int e = lane; e < num_experts; e += 32) {
                const uint32_t key = route_key(__ldcg(row + e));
                const bool left = key < last_key || (key == last_key && e > last);
                if (left && key > best_key) best_key = key, best = e;
            }
        }
        last_key = __reduce_max_sync(ALL_LANES, best_key);
        last = static_cast<int>(
            __reduce_min_sync(ALL_LANES, best_key == last_key ? static_cast<unsigned>(best) : 0x7fffffffu));
        if (r == want) wanted = last;
        if (weights != nullptr) {
            const float value = route_value(last_key);
            if (r == 0) max = value;
            float weight = value == max ? 1.f : expf(value - max);
            if (weight != weight) weight = max != max ? 1.f : 0.f;
            sum += weight;
            if (lane == (r & 31)) weights[r] = weight, experts[r] = last;
        }
    }
    if (weights != nullptr)
        for (int r = lane; r < rounds; r += 32) weights[r] /= sum;
    return wanted;
}

__device__ __forceinline__ int route_any(const float *row, int num_experts, int rounds, int want, float *weights,
                                         int *experts, int lane) {
    if (num_experts <= 256) return route_row<8>(row, num_experts, rounds, want, weights, experts, lane);
    if (num_experts <= 512) return route_row<16>(row, num_experts, rounds, want, weights, experts, lane);
    return route_row<0>(row, num_experts, rounds, want, weights, experts, lane);
}

// Whether an expert is here, by its number among those that are.
__device__ __forceinline__ bool is_here(const Plan &p, int own) { return unsigned(own) < unsigned(p.num_here); }

// By one warp, the experts hit of a single token, of which lane r has the one of round r: those that are here, in the
// order of their weights, to hits [min(top_k, num_here)], each with the number of them. False where a lane's is none.
__device__ __forceinline__ bool list_hits(const Plan &p, int expert, int4 *hits, int lane) {
    const int own = expert - p.first_expert;
    const bool here = lane < p.top_k && is_here(p, own);
    const unsigned all = __ballot_sync(ALL_LANES, here);
    if (here || (all == 0 && lane == 0))
        hits[__popc(all & ((1u << lane) - 1))] = make_int4(own, 1, lane, __popc(all));
    return here;
}

// -------------------------------------------------------------------------------------- many tokens, and on Hopper

// An entry of Plan::tiles: an expert, how many rows, and where in `sorted` they start.
__device__ __forceinline__ int2 tile_entry(int expert, int rows, int first) {
    return make_int2(expert | rows << 16, first);
}
__device__ __forceinline__ int tile_expert(int2 tile) { return tile.x & 0xffff; }
__device__ __forceinline__ int tile_rows(int2 tile) { return tile.x >> 16; }
__device__ __forceinline__ int tile_first(int2 tile) { return tile.y; }

// moe_sort.cu: how the assignments of an expert become tiles: as few as have at most `most` rows, shared out evenly in
// multiples of `step`, of which `most` has up to 31.
struct Heights {
    int most, step;
};
// From p.logits to p.weights, p.experts and p.counts, with p.gate from x; then to p.sorted and p.tiles.
int launch_routes(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, const bf16 *x);
int launch_sort(cudaStream_t stream, const Plan &p, Heights heights);

// moe_wgmma.cu: the products for cards of compute capability 9.0. Their tiles have up to so many rows, half of them for
// each of two blocks; an expert's are shared out evenly, in multiples of the step.
constexpr int WGMMA_ROWS = 320;
constexpr int WGMMA_STEP = 16;
// Whether they serve this card, these sizes and addresses.
bool has_wgmma(const Plan &p, const q35_moe_weights &w, const bf16 *x, const bf16 *out);
int launch_wgmma_logits(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, const bf16 *x);
// From the sorted list to `out`: both projections and the weighted sum, or, where out is null, to y.
int launch_wgmma_experts(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, const bf16 *x, bf16 *out);

// silu(gate) * up with the quick exponential and reciprocal: some units in the last place of an f32.
__device__ __forceinline__ float quick_swiglu(float gate, float up) {
    float e, r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(gate * -1.44269504f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.f + e));
    return gate * r * up;
}
