// The sparse block for up to 16 tokens with experts in 4 and 8 bits: what moe_few.cu does, over tiles in the order of
// tensor-core fragments. The routed experts and the shared one may have different forms, and so may gate_up and down.
//
// A sum goes by k tiles of 64 (in groups of 32 by halves of one): of exact products on tensor cores in f32, then times
// their scale, then added to the row's sum. What packed_down reads before it waits is as in few_down.
#include "moe_packed_one.cuh"

namespace {

// Forms that a kernel has beside bf16, int4 and fp8: fp4; or, instead of fp8, GGUF's.
enum More { NO_MORE, FP4_TOO, GGUF_TOO };

constexpr int UP_WARPS = 8;
constexpr int UP_PITCH = 2 * TILE_ROWS + 4, DOWN_PITCH = TILE_ROWS + 4;  // a warp's stores of sums hit all banks
constexpr int MOST_TOP_K = 32;
constexpr int MOST_SHARED = 48 << 10;

constexpr int UP_BLOCKS = 2;  // on an SM
// At most so many in a block that has an SM to itself; of two blocks each has half. The registers are divided so.
template <int N, int MORE>
constexpr int DOWN_WARPS = N > 1 ? 16 : MORE == GGUF_TOO ? 18 : 20;
constexpr bool UP_EARLY = true;  // packed_up starts under the kernel before it

// What to call with a form known when compiled.
template <int FORM>
struct Of {
    static constexpr int form = FORM;
};
template <int MORE, typename F>
__device__ __forceinline__ void by_form(const Packed &m, F call) {
    if constexpr (MORE == FP4_TOO) {
        if (m.form == FP4_TILES) return call(Of<FP4_TILES>());
    }
    if constexpr (MORE == GGUF_TOO) {
        if (m.form == K4_TILES) return call(Of<K4_TILES>());
        if (m.form == K6_TILES) return call(Of<K6_TILES>());
        if (m.form == INT8_TILES) return call(Of<INT8_TILES>());
    }
    if (m.form == INT4_TILES) {
        m.halves ? call(Of<INT4_HALVES>()) : call(Of<INT4_TILES>());
    } else if (MORE != GGUF_TOO && m.form == FP8_TILES) {
        if constexpr (MORE != GGUF_TOO) call(Of<FP8_TILES>());
    } else {
        call(Of<BF16_ROWS>());
    }
}

// Of fp4: sums of row tiles, times what is left of their scales.
template <int N, int MATS>
__device__ __forceinline__ void times(float (&acc)[MATS][N][4], const float (&whole)[MATS]) {
#pragma unroll
    for (int i = 0; i < MATS; i++) {
#pragma unroll
        for (int s = 0; s < N; s++) {
#pragma unroll
            for (int e = 0; e < 4; e++) acc[i][s][e] *= whole[i];
        }
    }
}

// gate_up and the activation, in tiles of 16 features: a row tile of gate and the one of up. Tiles of experts hit go
// round the blocks; the last blocks have one of the shared expert before, which they can load early. The warps of a block
// share out the k tiles and their sums are added in the order of the warps, so a sum has one order.
// ONE: a single token, which goes to shared memory. `spread`: a step round the blocks that keeps those with one tile
// more apart, on whichever SMs they settle. x and the activations are in the order of tiles.
template <int N, bool ONE, int MORE>
__global__ void __launch_bounds__(32 * UP_WARPS, UP_BLOCKS)
    packed_up(Plan p, Packed gate_up, Packed shared_gate_up, int spread, const bf16 *x, Norm norm) {
    extern __shared__ int4 hits[];  // [slots], then the token
    __shared__ float sums[2][UP_WARPS][8 * N][UP_PITCH];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    const int blocks = gridDim.x, block = int(blockIdx.x) * spread % blocks;
    const int hidden = p.hidden, k_tiles = hidden / TILE_K;
    auto share = [&](const Packed &m, int apart) {
        return Share{ceil_div(k_tiles - warp, UP_WARPS), apart * m.row_tile_bytes};
    };
    const int shared_tiles = p.shared_width / TILE_ROWS, expert_tiles = p.width / TILE_ROWS;
    const int before = max(blocks - shared_tiles, 0);  // blocks that start with an expert hit
    const bool with_shared = block >= before;

    Held held;
    if (with_shared) {
        by_form<MORE>(shared_gate_up, [&](auto of) {
            constexpr int form = decltype(of)::form;
            const Cursor at = aim_at<form>(shared_gate_up, block - before, shared_tiles, warp);
            start_walk<form, 2, UP_WARPS>(held, shared_gate_up, at, share(shared_gate_up, shared_tiles));
        });
    }
    wait_for_inputs();
    let_next_start();  // not before: packed_down reads what the kernels before this one wrote

    // Of a single token the last warp finds the experts hit while the others fetch the token; a block that starts with the
    // shared expert does so after that.
    int num_hit = 0;
    uint32_t *const token = reinterpret_cast<uint32_t *>(hits + p.slots);
    if (ONE) {
        const int threads = with_shared ? blockDim.x : blockDim.x - 32;
        for (int i = 8 * threadIdx.x; int(threadIdx.x) < threads && i < hidden; i += 8 * threads)
            *reinterpret_cast<uint4 *>(token + i / 2) = *reinterpret_cast<const uint4 *>(x + i);
    } else {
        for (int i = threadIdx.x; i < p.slots; i += blockDim.x) hits[i] = p.hits[i];
        num_hit = *p.num_hit;
    }
    if (!ONE || with_shared) __syncthreads();

    int turn = 0;  // of the two places of sums: one barrier a tile
    // Tiles `tile`, `tile` + `blocks`, .. up to `end`.
    auto run = [&](auto of, const Packed &m, bool shared, bool started, int tile, int end) {
        constexpr int form = decltype(of)::form;
        const int tiles = shared ? shared_tiles : expert_tiles, width = shared ? p.shared_width : p.width;
        auto row_tile_of = [&](int to) { return shared ? to : hits[to / tiles].x * 2 * tiles + to % tiles; };
        auto aim = [&](int to) { return aim_at<form>(m, row_tile_of(to), tiles, warp); };
        Cursor now = {}, next = {};
        if (tile < end) now = aim(tile);
        const Share own = share(m, tiles);
        if (tile < end && !started) start_walk<form, 2, UP_WARPS>(held, m, now, own);
        while (tile < end) {
            const int after = tile + blocks;
            const int4 hit = shared ? make_int4(0, int(all_tokens(p.n)), 0, 0) : hits[tile / tiles];
            const int num_tokens = __popc(hit.y);
            if (after < end) next = aim(after);
            // Two warps, one for the gates and one for what they gate. Fewer tokens are quicker without.
            if constexpr (N > 1 && IS_INT4<form>) {
                if (after < end && warp < 2) ask_for_scales(m, row_tile_of(after) + warp * tiles);
            }
            float acc[2][N][4] = {}, whole[2];
            if constexpr (form == FP4_TILES) {
#pragma unroll
                for (int i = 0; i < 2; i++) whole[i] = whole_of(m, row_tile_of(tile) + i * tiles);
            }
            Tokens<N> source;
            source.both = num_tokens > 8;
#pragma unroll
            for (int i = 0; i < N; i++) {
                const uint32_t *row = token;
                if (!ONE) {
                    row = reinterpret_cast<const uint32_t *>(x + int64_t(token_of(hit.y, 8 * i + g)) * hidden);
                }
                source.rows[i] = row + warp * TILE_K / 2;
            }
            walk<N, form, 2, UP_WARPS>(held, m, now, next, after < end, own, source, acc);
            if constexpr (form == FP4_TILES) times<N, 2>(acc, whole);
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int s = 0; s < N; s++) {
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        sums[turn][warp][8 * s + lane % 4 * 2 + e % 2][16 * i + g + e / 2 * 8] = acc[i][s][e];
                }
            }
            __syncthreads();
            if (int(threadIdx.x) < TILE_ROWS * num_tokens) {
                const int i = threadIdx.x % TILE_ROWS, token = threadIdx.x / TILE_ROWS;
                float gate = 0.0f, up = 0.0f;
#pragma unroll
                for (int k = 0; k < UP_WARPS; k++)
                    gate += sums[turn][k][token][i], up += sums[turn][k][token][TILE_ROWS + i];
                bf16 *to = (shared ? p.shared_act : p.act) + int64_t(hit.z + token) * width;
                const int feature = tile % tiles * TILE_ROWS + i;
                to[2 * in_tile_order(feature / 2) + feature % 2] = __float2bfloat16_rn(swiglu(gate, up));
            }
            turn ^= 1;
            tile = after, now = next;
        }
    };
    if (with_shared) {
        by_form<MORE>(shared_gate_up,
                      [&](auto of) { run(of, shared_gate_up, true, true, block - before, shared_tiles); });
    }
    if (ONE) {
        if (warp == UP_WARPS - 1) {
            const int e = route_any(p.logits, p.num_experts, p.top_k, lane, nullptr, nullptr, lane);
            list_hits(p, e, hits, lane);
        }
        __syncthreads();
        num_hit = hits[0].w;
    }
    by_form<MORE>(gate_up, [&](auto of) { run(of, gate_up, false, false, block, num_hit * expert_tiles); });
    write_residual(p, norm, block * blockDim.x + threadIdx.x, blocks * blockDim.x);
}

// `down` of the experts hit and their weighted sum. A block has a row tile of the output; its warps share out the
// experts, the shared one first, and each has all of k. The first loads are under way before packed_up has ended.
// ONE: a single token, whose activations go to shared memory.
template <int N, bool ONE, int MORE>
__global__ void __launch_bounds__(32 * DOWN_WARPS<N, MORE>, 1)
    packed_down(Plan p, Packed down, Packed shared_down, bf16 *out) {
    extern __shared__ int4 hits[];  // [slots]
    const int assignments = p.n * p.top_k, routed = p.top_k * p.width, staged = ONE ? routed + p.shared_width : 0;
    uint32_t *const token = reinterpret_cast<uint32_t *>(hits + p.slots);  // [staged / 2]
    float *const scales = reinterpret_cast<float *>(token + staged / 2);  // [assignments], then [n] of the shared one
    int *const places = reinterpret_cast<int *>(scales + assignments + p.n);
    float *const sums = reinterpret_cast<float *>(places + assignments);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32, g = lane / 4;
    const int row_tile = blockIdx.x, row_tiles = gridDim.x;

    const bool with_shared = p.has_shared && warp == 0;
    auto share = [](const Packed &m) { return Share{m.k_tiles, 0}; };

    Held held;
    if (with_shared) {
        by_form<MORE>(shared_down, [&](auto of) {
            constexpr int form = decltype(of)::form;
            start_walk<form, 1, 1>(held, shared_down, aim_at<form>(shared_down, row_tile, 0, 0), share(shared_down));
        });
    }
    int num_hit = 0;
    if (p.n == 1) {
        if (warp == num_warps - 1) {
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

    const int first = with_shared ? num_warps - 1 : warp - p.has_shared;  // of the list
    auto row_tile_of = [&](int item) { return hits[item].x * row_tiles + row_tile; };
    if (!with_shared && first < num_hit) {
        by_form<MORE>(down, [&](auto of) {
            constexpr int form = decltype(of)::form;
            start_walk<form, 1, 1>(held, down, aim_at<form>(down, row_tile_of(first), 0, 0), share(down));
        });
    }
    let_next_start();
    wait_for_inputs();

    if (ONE) {
        for (int i = 8 * threadIdx.x; i < staged; i += 8 * blockDim.x) {
            const bf16 *from = i < routed ? p.act + i : p.shared_act + (i - routed);
            *reinterpret_cast<uint4 *>(token + i / 2) = *reinterpret_cast<const uint4 *>(from);
        }
        __syncthreads();
    }

    auto run = [&](auto of, const Packed &m, bool shared, bool started, int item, int end) {
        constexpr int form = decltype(of)::form;
        auto aim = [&](int to) { return aim_at<form>(m, shared ? row_tile : row_tile_of(to), 0, 0); };
        Cursor now = {}, next = {};
        if (item < end) now = aim(item);
        if (item < end && !started) start_walk<form, 1, 1>(held, m, now, share(m));
        while (item < end) {
            const int after = item + num_warps;
            if (after < end) next = aim(after);
            if constexpr (N > 1 && IS_INT4<form>) {
                if (after < end) ask_for_scales(m, row_tile_of(after));
            }
            const int4 hit = shared ? make_int4(0, int(all_tokens(p.n)), 0, 0) : hits[item];
            const int num_tokens = __popc(hit.y);
            float acc[1][N][4] = {}, whole[1];
            if constexpr (form == FP4_TILES) whole[0] = whole_of(m, shared ? row_tile : row_tile_of(item));
            Tokens<N> source;
            source.both = num_tokens > 8;
#pragma unroll
            for (int i = 0; i < N; i++) {
                const int64_t row = hit.z + min(8 * i + g, num_tokens - 1);
                source.rows[i] = ONE ? token + (shared ? routed : hit.z * m.k) / 2
                                     : reinterpret_cast<const uint32_t *>((shared ? p.shared_act : p.act) + row * m.k);
            }
            walk<N, form, 1, 1>(held, m, now, next, after < end, share(m), source, acc);
            if constexpr (form == FP4_TILES) times<N, 1>(acc, whole);
            float *to = sums + (shared ? assignments : hit.z) * DOWN_PITCH;
#pragma unroll
            for (int s = 0; s < N; s++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int token = 8 * s + lane % 4 * 2 + e % 2;
                    if (token < num_tokens) to[token * DOWN_PITCH + g + e / 2 * 8] = acc[0][s][e];
                }
            }
            item = after, now = next;
        }
    };
    if (with_shared) by_form<MORE>(shared_down, [&](auto of) { run(of, shared_down, true, true, 0, 1); });
    by_form<MORE>(down, [&](auto of) { run(of, down, false, !with_shared, first, num_hit); });
    __syncthreads();
    for (int i = threadIdx.x; i < p.n * TILE_ROWS; i += blockDim.x) {
        const int row = i % TILE_ROWS, t = i / TILE_ROWS;
        float sum = 0.0f;
        for (int r = t * p.top_k; r < (t + 1) * p.top_k; r++) {
            const float with = fmaf(scales[r], sums[places[r] * DOWN_PITCH + row], sum);
            sum = scales[r] < 0 ? sum : with;
        }
        if (p.has_shared) sum = fmaf(scales[assignments + t], sums[(assignments + t) * DOWN_PITCH + row], sum);
        out[int64_t(t) * p.hidden + row_tile * TILE_ROWS + row] = __float2bfloat16_rn(sum);
    }
}

// -------------------------------------------------------------------------------------------------------- launchers

// In shared memory: the list of hits; a token of the normed activations, where it is staged.
int up_bytes(const Plan &p) { return p.slots * int(sizeof(int4)) + (p.n == 1 ? 2 * p.hidden : 0); }
// The list, then a scale and a place for each assignment, the scales of the shared expert, and a row of sums for each
// assignment (in the order of `sorted`) and each token of the shared expert.
int down_bytes(int n, const Plan &p) {
    const int assignments = n * p.top_k, slots = assignments < p.num_here ? assignments : p.num_here;
    return slots * 16 + (2 * assignments + n + (assignments + n) * DOWN_PITCH) * 4;
}

// N: eights of tokens. Of GGUF's forms there are kernels of one token and of two eights.
template <int N, int MORE>
int launch_experts(cudaStream_t stream, const Plan &p, const Packed (&m)[4], const Norm &norm, const bf16 *x,
                   bf16 *out) {
    // One wave of blocks, fewer where there are fewer tiles.
    const int sms = num_sms(), most_blocks = UP_BLOCKS * sms;
    const int64_t most = p.shared_width / TILE_ROWS + int64_t(p.slots) * (p.width / TILE_ROWS);
    const int up_blocks = most < most_blocks ? int(most) : most_blocks;
    constexpr int FULL = MORE == GGUF_TOO ? 2 : N;
    auto up = packed_up<FULL, false, MORE>;
    if constexpr (N == 1) {
        if (p.n == 1) up = packed_up<1, true, MORE>;
    }
    constexpr bool MAY_BE_ONE = N == 1 && MORE == NO_MORE;
    int code = MAY_BE_ONE ? launch_one_up(stream, p, m[0], m[2], norm, x) : cudaErrorNotSupported;
    if (MORE == NO_MORE && code == cudaErrorNotSupported) code = launch_several_up(stream, p, m[0], m[2], norm, x);
    if (code == cudaErrorNotSupported)
        code = launch<UP_EARLY>(up, up_blocks, 32 * UP_WARPS, up_bytes(p), stream, p, m[0], m[2], spread_of(up_blocks),
                                x, norm);
    if (code != cudaSuccess) return code;
    code = MAY_BE_ONE ? launch_one_down(stream, p, m[1], m[3], out) : cudaErrorNotSupported;
    if (MORE == NO_MORE && code == cudaErrorNotSupported) code = launch_several_down(stream, p, m[1], m[3], out);
    if (code != cudaErrorNotSupported) return code;

    // One wave here too, where an SM has room for two blocks; of equal turns.
    const int blocks = p.hidden / TILE_ROWS, items = p.slots + p.has_shared;
    int bytes = down_bytes(p.n, p), most_warps = DOWN_WARPS<FULL, MORE>;
    const int64_t own = 2 * (int64_t(p.top_k) * p.width + p.shared_width);
    auto last = packed_down<FULL, false, MORE>;
    if constexpr (N == 1) {
        if (p.n == 1 && bytes + own <= MOST_SHARED) {
            last = packed_down<1, true, MORE>, bytes += int(own), most_warps = DOWN_WARPS<1, MORE>;
        }
    }
    most_warps = blocks <= sms ? most_warps : most_warps / 2;
    const int warps = ceil_div(items, ceil_div(items, most_warps));
    return launch(last, blocks, 32 * warps, bytes, stream, p, m[1], m[3], out);
}

// Given `peers`, of a single token, delta is the sum of all ranks'.
int norm_moe(cudaStream_t stream, const q35_peers *peers, int n, q35_moe_dims dims,
             const q35_packed_moe_weights &weights, const q35_bf16 *delta, float *residual, const float *norm,
             float eps, q35_bf16 *x, void *workspace, q35_bf16 *out) {
    Plan p = {};
    if (n > FEW || !make_plan(n, dims, workspace, p)) return cudaErrorInvalidValue;
    Packed m[4] = {};
    const int64_t experts = p.num_here, shared = p.shared_width;
    if (!take_packed(weights.gate_up, experts * 2 * p.width, p.hidden, m[0]) ||
        !take_packed(weights.down, experts * p.hidden, p.width, m[1]))
        return cudaErrorInvalidValue;
    if (p.has_shared && (!take_packed(weights.shared_gate_up, 2 * shared, p.hidden, m[2]) ||
                         !take_packed(weights.shared_down, p.hidden, p.shared_width, m[3])))
        return cudaErrorInvalidValue;
    const void *const pointers[] = {weights.router, weights.shared_gate, delta, residual, norm, x, workspace};
    for (const void *pointer : pointers)
        if (!aligned(pointer)) return cudaErrorInvalidValue;
    // Rows of gate and of up are whole tiles: of the matrices this follows from their being the k of `down`.
    if (p.hidden > MOST_HIDDEN || p.top_k > MOST_TOP_K || down_bytes(FEW, p) > MOST_SHARED)
        return cudaErrorInvalidValue;

    q35_moe_weights routing = {};
    routing.router = weights.router, routing.shared_gate = weights.shared_gate;
    Norm before = {as_bf16(delta), residual, norm, eps, nullptr, nullptr};
    bf16 *const tiles = reinterpret_cast<bf16 *>(p.y);  // written when who reads it has ended
    bool fp4 = false, floats = false, gguf = false;
    for (const Packed &matrix : m) {
        fp4 = fp4 || matrix.form == FP4_TILES, gguf = gguf || matrix.form >= K4_TILES;
        floats = floats || fp4 || matrix.form == FP8_TILES;
    }
    if (floats && gguf) return cudaErrorInvalidValue;
    int code = peers != nullptr ? launch_logits(stream, *peers, p, routing, before, as_bf16(x), tiles)
                                : launch_logits(stream, p, routing, before, as_bf16(x), tiles);
    if (code == cudaSuccess && n > 1) code = launch_route(stream, p);
    if (code != cudaSuccess) return code;
    const auto run = [&](auto experts) {
        return experts(stream, p, m, before, tiles, as_bf16(out));
    };
    if (gguf) return n == 1 ? run(launch_experts<1, GGUF_TOO>) : run(launch_experts<2, GGUF_TOO>);
    if (fp4) return n <= 8 ? run(launch_experts<1, FP4_TOO>) : run(launch_experts<2, FP4_TOO>);
    return n <= 8 ? run(launch_experts<1, NO_MORE>) : run(launch_experts<2, NO_MORE>);
}

}  // namespace

extern "C" int q35_packed_norm_moe(void *stream, int n, q35_moe_dims dims, q35_packed_moe_weights weights,
                                   const q35_bf16 *delta, float *residual, const float *norm, float eps, q35_bf16 *x,
                                   void *workspace, q35_bf16 *out) {
    if (n <= 0) return cudaSuccess;
    return norm_moe(as_stream(stream), nullptr, n, dims, weights, delta, residual, norm, eps, x, workspace, out);
}

extern "C" int q35_all_reduce_packed_norm_moe(void *stream, q35_peers peers, int n, q35_moe_dims dims,
                                              q35_packed_moe_weights weights, const q35_bf16 *delta, float *residual,
                                              const float *norm, float eps, q35_bf16 *x, void *workspace,
                                              q35_bf16 *out) {
    if (n <= 0) return cudaSuccess;
    if (n > FEW || residual == nullptr || norm == nullptr) return cudaErrorInvalidValue;
    if (n > 1) {
        const int code = q35_all_reduce_norm(stream, peers, n, dims.hidden, delta, residual, norm, eps, x);
        if (code != cudaSuccess) return code;
        delta = nullptr;  // it is in the residual
    }
    return norm_moe(as_stream(stream), n > 1 ? nullptr : &peers, n, dims, weights, delta, residual, norm, eps, x,
                    workspace, out);
}
