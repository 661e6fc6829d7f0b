// The sparse block for up to 16 tokens, which is bound by reading the experts hit. Own code.
//
// Kernels overlap: while one runs, the next is let in and loads what it can. few_down goes further than what
// `wait_for_inputs` allows in general: before it waits for few_up it reads what the kernels before that one wrote
// (logits, the list of experts hit), past L1. That is sound since few_up lets it start only when it has itself waited
// for them.
#include "moe.cuh"
#include "mma.cuh"

namespace {

// ------------------------------------------------------------------------------------- the projections, tensor cores

constexpr int FEATURES = 8;  // of a tile of gate_up: 8 gate rows and 8 up rows are the 16 rows of an mma
constexpr int ROWS = 16;     // of the output of `down` that a block has
constexpr int PITCH = 20;    // of 16 sums in shared memory: a warp's stores hit all banks
constexpr int PART = 64;     // elements along k that a warp loads at a time: 128 bytes of a row
constexpr int UP_WARPS = 8;
constexpr int UP_STEP = 2 * PART * UP_WARPS, DOWN_STEP = 4 * PART;
constexpr int MOST_TOP_K = 32;
constexpr int MOST_SHARED = 48 << 10;

// 64 elements of 16 rows; lane 4 g + q has elements 8 q .. and 32 + 8 q .. of rows g and g + 8. Which place of an mma
// an element takes does not matter while weights and tokens agree.
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

// 16 bytes of activations, from memory or shared memory, in the order of the program: beside loads of weights, so that
// the wait for those hides the one for these.
__device__ __forceinline__ uint4 load16_in_order(const bf16 *p) {
    uint4 v;
    asm volatile("ld.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

// What a lane has of token `token` of `count`, as of the rows: two halves of a part, 0 past the end.
template <bool WHOLE>
__device__ __forceinline__ void load_token(uint4 (&x)[2], const bf16 *from, int token, int count, int offset,
                                           int left) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        x[h] = make_uint4(0, 0, 0, 0);
        if (token < count && (WHOLE || offset + 32 * h < left)) x[h] = load16_in_order(from + offset + 32 * h);
    }
}

__device__ __forceinline__ void mma_part(float (&acc)[4], const Part &part, const uint4 (&x)[2]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const uint4 lo = part.w[h][0], hi = part.w[h][1];
        mma(acc, lo.x, hi.x, lo.y, hi.y, x[h].x, x[h].y);
        mma(acc, lo.z, hi.z, lo.w, hi.w, x[h].z, x[h].w);
    }
}

// acc[i] += two parts, `apart` elements apart, times tokens 8 i .. 8 i + 7; a part that is done with is loaded again.
template <int N, bool WHOLE, typename Load>
__device__ __forceinline__ void use_two(Part *parts, const bf16 *const (&tokens)[N], int count, int offset, int apart,
                                        int left, float (&acc)[N][4], Load load_again) {
    const int g = threadIdx.x % 32 / 4;
    uint4 x[2][2];
#pragma unroll
    for (int i = 0; i < 2; i++) load_token<WHOLE>(x[i], tokens[0], g, count, offset + i * apart, left);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        mma_part(acc[0], parts[i], x[i]);
        if (N > 1 && count > 8) {
            load_token<WHOLE>(x[i], tokens[N - 1], 8 + g, count, offset + i * apart, left);
            mma_part(acc[N - 1], parts[i], x[i]);
        }
        load_again(i);
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
    int num_hit = 0;
    if (p.n == 1) {
        if (warp == 0) {
            const int e = route_any(p.logits, p.num_experts, p.top_k, lane, nullptr, nullptr, lane);
            list_hits(p, e, hits, lane);
        }
    } else {
        for (int i = threadIdx.x; i < p.slots; i += blockDim.x) hits[i] = p.hits[i];
        num_hit = *p.num_hit;
    }
    __syncthreads();
    if (p.n == 1) num_hit = hits[0].w;
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
            auto again = [&](int i) {
                if (more) load(i);
            };
            use_two<N, WHOLE>(parts, tokens, count, step * UP_STEP, PART * UP_WARPS, hidden - own, acc, again);
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
    // Most by the blocks with the fewest tiles.
    write_residual(p, norm, (gridDim.x - 1 - blockIdx.x) * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);
}

// What few_down keeps in shared memory: the list, then a scale and a place for each assignment, the scales of the
// shared expert, and a row of sums for each assignment (in the order of `sorted`) and each token of the shared expert.
int down_bytes(int n, const Plan &p) {
    const int assignments = n * p.top_k, slots = assignments < p.num_here ? assignments : p.num_here;
    return slots * 16 + (2 * assignments + n + (assignments + n) * PITCH) * 4;
}

// `down` of the experts hit and their weighted sum. A block has 16 rows of the output; its warps share out the experts,
// the shared one first, and each has all of k. Loads run four parts ahead, past the end of an expert into the next, and
// the first are under way before few_up has ended. `staged`: so many activations, a single token's, go to shared
// memory, so that a block waits for them once; 0: none.
template <int N, bool WHOLE>
__global__ void __launch_bounds__(512, 1)
    few_down(Plan p, const bf16 *down, const bf16 *shared_down, int staged, bf16 *out) {
    extern __shared__ int4 hits[];  // [slots]
    bf16 *stage = reinterpret_cast<bf16 *>(hits + p.slots);  // [staged]
    const int assignments = p.n * p.top_k;
    float *scales = reinterpret_cast<float *>(stage + staged);  // [assignments], then [n] of the shared expert
    int *places = reinterpret_cast<int *>(scales + assignments + p.n);
    float *sums = reinterpret_cast<float *>(places + assignments);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32, g = lane / 4;
    const int row0 = blockIdx.x * ROWS, own = lane % 4 * 8;

    int num_hit = 0;
    if (p.n == 1) {
        if (warp == 0) {
            route_any(p.logits, p.num_experts, p.top_k, 0, scales, places, lane);
            const bool chosen = lane < p.top_k;  // then it reads what it wrote itself
            const bool here = list_hits(p, chosen ? places[lane] : 0, hits, lane);
            if (chosen) places[lane] = lane;
            if (chosen && !here) scales[lane] = NOT_HERE;
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
    if (p.n == 1) num_hit = hits[0].w;

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

    const bf16 *act = p.act, *shared_act = p.shared_act;
    if (staged > 0) {
        const int routed = p.top_k * p.width;
        for (int i = 8 * threadIdx.x; i < staged; i += 8 * blockDim.x) {
            const bf16 *from = i < routed ? p.act + i : p.shared_act + (i - routed);
            *reinterpret_cast<uint4 *>(stage + i) = *reinterpret_cast<const uint4 *>(from);
        }
        act = stage, shared_act = stage + routed;
        __syncthreads();
    }

    for (int item = warp; item < items; item += num_warps) {
        const int next = item + num_warps;
        const bool shared = item < p.has_shared;
        const int4 hit = shared ? make_int4(0, int(all_tokens(p.n)), 0, 0) : hits[item - p.has_shared];
        const int count = __popc(hit.y), k = shared ? p.shared_width : p.width, steps = ceil_div(k, DOWN_STEP);
        const bf16 *tokens[N];
#pragma unroll
        for (int i = 0; i < N; i++)
            tokens[i] = (shared ? shared_act : act) + int64_t(hit.z + min(8 * i + g, count - 1)) * k + own;
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
            for (int half = 0; half < 4; half += 2) {
                auto again = [&](int i) {
                    if (more) load(half + i);
                };
                const int offset = step * DOWN_STEP + half * PART;
                use_two<N, WHOLE>(parts + half, tokens, count, offset, PART, k - own, acc, again);
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
        for (int r = t * p.top_k; r < (t + 1) * p.top_k; r++) {
            const float with = fmaf(scales[r], sums[places[r] * PITCH + row], sum);
            sum = scales[r] < 0 ? sum : with;
        }
        if (p.has_shared) sum = fmaf(scales[assignments + t], sums[(assignments + t) * PITCH + row], sum);
        if (row0 + row < p.hidden) out[int64_t(t) * p.hidden + row0 + row] = __float2bfloat16_rn(sum);
    }
}

// -------------------------------------------------------------------------------------------------------- launchers

template <int N>
int launch_fast(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, Norm norm, bf16 *x, bf16 *out,
                const q35_peers *peers) {
    int code = peers != nullptr ? launch_logits(stream, *peers, p, w, norm, x) : launch_logits(stream, p, w, norm, x);
    if (code == cudaSuccess && p.n > 1) code = launch_route(stream, p);
    if (code != cudaSuccess) return code;

    // One wave of blocks, fewer where there are fewer tiles.
    const int sms = num_sms();
    const int64_t most = ceil_div(p.shared_width, FEATURES) + int64_t(p.slots) * ceil_div(p.width, FEATURES);
    const int up_blocks = most < 3 * sms ? int(most) : 3 * sms;
    auto up = p.hidden % UP_STEP == 0 ? few_up<N, true> : few_up<N, false>;
    // Measured on an H100: started early, its wave settles badly on the SMs beside what runs before it, and a decode step
    // of 35B takes 6 % (1 token) to 14 % (4 tokens) longer (benches/results/h100/early_start.txt).
    code = launch<false>(up, up_blocks, 32 * UP_WARPS, p.slots * sizeof(int4), stream, p, as_bf16(w.gate_up),
                  as_bf16(w.shared_gate_up), x, norm);
    if (code != cudaSuccess) return code;

    // One wave here too: the warps of an SM have room for 16 warps' loads, of one block or of two.
    const int blocks = ceil_div(p.hidden, ROWS), items = p.slots + p.has_shared, most_warps = blocks <= sms ? 16 : 8;
    // Of equal turns.
    const int warps = ceil_div(items, ceil_div(items, most_warps));
    auto down = p.width % DOWN_STEP == 0 && p.shared_width % DOWN_STEP == 0 ? few_down<N, true> : few_down<N, false>;
    int bytes = down_bytes(p.n, p), staged = 0;
    const int64_t own = int64_t(p.top_k) * p.width + p.shared_width;
    if (p.n == 1 && bytes + own * 2 <= MOST_SHARED) staged = int(own), bytes += staged * 2;
    return launch(down, blocks, 32 * warps, bytes, stream, p, as_bf16(w.down), as_bf16(w.shared_down), staged, out);
}

}  // namespace

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

bool few_is_fast(const Plan &p, const q35_moe_weights &w, const bf16 *x) {
    const void *const pointers[] = {w.router,      w.gate_up,     w.down, w.shared_gate_up,
                                    w.shared_down, w.shared_gate, x,      p.act,
                                    p.shared_act};
    for (const void *pointer : pointers)
        if (!aligned(pointer)) return false;
    return p.hidden % 8 == 0 && p.hidden <= MOST_HIDDEN && p.width % 8 == 0 && p.shared_width % 8 == 0 &&
           p.top_k <= MOST_TOP_K && down_bytes(FEW, p) <= MOST_SHARED;
}

int launch_few(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, Norm norm, bf16 *x, bf16 *out,
               const q35_peers *peers) {
    if (!few_is_fast(p, w, x)) return launch_any(stream, p, w, x, out);
    return p.n <= 8 ? launch_fast<1>(stream, p, w, norm, x, out, peers) : launch_fast<2>(stream, p, w, norm, x, out, peers);
}
