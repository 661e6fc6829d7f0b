// The sparse block of many tokens with experts in 4 and 8 bits: routing and the sorted list as in moe_grouped.cu, then
// each projection as one grouped product of packed_tiles.cuh.
#include "packed_many.cuh"
#include "packed_tiles.cuh"
#include "packed_wgmma.cuh"

namespace {

enum Mode { UP, DOWN };

constexpr int ROW_WARPS = 4, ROWS = 2 * TILE_ROWS * ROW_WARPS;  // of weights, a block
constexpr int MOST_TOP_K = 32;

struct Matrices {
    Packed of[2];  // routed, shared
};

struct Products {
    const bf16 *x;
    int feature_blocks;  // of a tile of tokens
    int shared_tiles;    // of tokens of the shared expert; they come first
    Terms terms;         // DOWN
};

// Of each form, and of a shared expert in rows of bf16 beside it.
template <int FORM, int TOKENS>
constexpr int bytes() {
    constexpr int own = Shape<FORM, TOKENS, ROW_WARPS>::BYTES, plain = Shape<BF16_ROWS, TOKENS, ROW_WARPS>::BYTES;
    return own > plain ? own : plain;
}

// A block has 128 rows of an expert's weights and the tokens of a tile of the list, TOKENS at a time, of the routed
// experts in FORM and of the shared one in FORM or in rows of bf16.
// UP: a pair of warps has the gate rows and the up rows of 16 features; to act. DOWN: from act to y.
template <int FORM, int TOKENS, int MODE>
__global__ void __launch_bounds__(64 * ROW_WARPS, Shape<FORM, TOKENS, ROW_WARPS>::BLOCKS)
    packed_experts(Plan p, const __grid_constant__ Matrices m, Products a) {
    typedef Shape<FORM, TOKENS, ROW_WARPS> S;
    constexpr int FEATURES = MODE == UP ? ROWS / 2 : ROWS;  // of a block
    extern __shared__ __align__(128) unsigned char memory[];
    let_next_start();
    wait_for_inputs();
    const int tile = blockIdx.x / a.feature_blocks, feature0 = blockIdx.x % a.feature_blocks * FEATURES;
    const bool is_shared = tile < a.shared_tiles;
    int expert = 0, first = tile * TOKENS, total = min(TOKENS, p.n - first);
    if (!is_shared) {
        if (tile - a.shared_tiles >= *p.num_tiles) return;
        const int2 entry = p.tiles[tile - a.shared_tiles];
        expert = tile_expert(entry), first = tile_first(entry), total = tile_rows(entry);
    }
    const int width = is_shared ? p.shared_width : p.width, own = threadIdx.x / 32 % ROW_WARPS;
    if (MODE == UP && feature0 >= width) return;

    const bf16 *x = MODE == UP ? a.x : is_shared ? p.shared_act : p.act;
    // Pairs of row tiles are whole, for widths are multiples of 64.
    const int tiles = (MODE == UP ? width : p.hidden) / TILE_ROWS;
    const bool there = MODE == UP || feature0 + 2 * TILE_ROWS * own < a.terms.cols;
    const int row_tile = MODE == UP ? expert * 2 * tiles + feature0 / TILE_ROWS + own
                         : there    ? expert * tiles + (a.terms.col0 + feature0) / TILE_ROWS + 2 * own
                                    : 0;
    const int apart = MODE == UP ? tiles : 1;

#pragma unroll 1
    for (int done = 0; done < total; done += TOKENS) {
        if (done > 0) __syncthreads();  // the sums of those before have been read
        const int row0 = first + done, count = min(TOKENS, total - done);
        auto row_of = [&](int i) {
            return MODE == UP && !is_shared ? p.sorted[row0 + i] / p.top_k : row0 + i;
        };
        const float *sums;
        if (FORM != BF16_ROWS && is_shared && m.of[1].form == BF16_ROWS) {
            sums = multiply<BF16_ROWS, TOKENS, ROW_WARPS>(memory, m.of[1], row_tile, apart, there, x, count, [] {},
                                                          row_of);
        } else {
            // In place: in registers it would crowd out sums.
            sums = multiply<FORM, TOKENS, ROW_WARPS>(memory, m.of[is_shared], row_tile, apart, there, x, count, [] {},
                                                     row_of);
        }
#pragma unroll 1
        for (int i = threadIdx.x; i < count * (FEATURES / 8); i += S::THREADS) {
            const int token = i / (FEATURES / 8), feature = i % (FEATURES / 8) * 8, row = row0 + token;
            if constexpr (MODE == UP) {
                const float *from = sums + token * S::PITCH + feature / TILE_ROWS * 2 * TILE_ROWS + feature % TILE_ROWS;
                float gate[8], up[8];
                load8(from, gate);
                load8(from + TILE_ROWS, up);
#pragma unroll
                for (int j = 0; j < 8; j++) gate[j] = swiglu(gate[j], up[j]);
                store8((is_shared ? p.shared_act : p.act) + int64_t(row) * width + feature0 + feature, gate);
            } else {
                const int column = feature0 + feature;
                if (column >= a.terms.cols) continue;
                float v[8];
                load8(sums + token * S::PITCH + feature, v);
                const int64_t term = is_shared ? int64_t(p.n) * p.top_k + row : p.sorted[row];
                const int64_t to = term * a.terms.stride + column;
                a.terms.rounded ? store8(reinterpret_cast<bf16 *>(p.y) + to, v) : store8(p.y + to, v);
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------------- launchers

template <int FORM, int TOKENS, int MODE>
cudaError_t run(cudaStream_t stream, const Plan &p, const Packed &routed, const Packed &shared, Products a,
                int experts) {
    a.shared_tiles = experts & SHARED_EXPERT ? ceil_div(p.n, TOKENS) : 0;
    // Of the routed ones a bound: what there is beyond *num_tiles returns at once.
    const int64_t tiles = a.shared_tiles + int64_t(experts & ROUTED_EXPERTS ? p.max_tiles : 0);
    if (tiles * a.feature_blocks > INT32_MAX) return cudaErrorInvalidValue;
    const auto kernel = packed_experts<FORM, TOKENS, MODE>;
    constexpr int shared_bytes = bytes<FORM, TOKENS>();
    cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (code != cudaSuccess) return code;
    code = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (code != cudaSuccess) return code;
    return launch(kernel, unsigned(tiles * a.feature_blocks), 64 * ROW_WARPS, shared_bytes, stream, p,
                  Matrices{{routed, shared}}, a);
}

// Tiles of so many tokens as experts have: this changes the speed, and no sum.
template <int FORM, int MODE>
cudaError_t by_tokens(cudaStream_t stream, const Plan &p, const Packed &routed, const Packed &shared,
                      const Products &a, int experts) {
    const int64_t each = experts & ROUTED_EXPERTS ? int64_t(p.n) * p.top_k / p.num_experts : p.n;
    return each <= 24 ? run<FORM, 32, MODE>(stream, p, routed, shared, a, experts)
                      : run<FORM, 64, MODE>(stream, p, routed, shared, a, experts);
}

// One launch for both kinds of experts where a kernel has both forms, else two.
template <int MODE>
cudaError_t by_form(cudaStream_t stream, const Plan &p, const Packed &routed, const Packed &shared, const Products &a,
                    int experts) {
    if (!p.has_shared) experts &= ~SHARED_EXPERT;
    if (experts == 0) return cudaSuccess;
    if (experts == ALL_EXPERTS && shared.form != routed.form && shared.form != BF16_ROWS) {
        const cudaError_t code = by_form<MODE>(stream, p, routed, shared, a, SHARED_EXPERT);
        return code != cudaSuccess ? code : by_form<MODE>(stream, p, routed, shared, a, ROUTED_EXPERTS);
    }
    const int form = experts & ROUTED_EXPERTS ? routed.form : shared.form;
    if (form == INT4_TILES) return by_tokens<INT4_TILES, MODE>(stream, p, routed, shared, a, experts);
    if (form == FP4_TILES) return by_tokens<FP4_TILES, MODE>(stream, p, routed, shared, a, experts);
    // Of GGUF's there is one kernel each.
    if (form == K4_TILES) return run<K4_TILES, 64, MODE>(stream, p, routed, shared, a, experts);
    if (form == K6_TILES) return run<K6_TILES, 64, MODE>(stream, p, routed, shared, a, experts);
    if (form == INT8_TILES) return run<INT8_TILES, 64, MODE>(stream, p, routed, shared, a, experts);
    if (form == FP8_TILES) return by_tokens<FP8_TILES, MODE>(stream, p, routed, shared, a, experts);
    return by_tokens<BF16_ROWS, MODE>(stream, p, routed, shared, a, experts);
}

// What both of the block's launchers ask for. `m`: gate_up, down, and those of the shared expert.
bool take(int n, const q35_moe_dims &dims, const q35_packed_moe_weights &w, const q35_bf16 *x, void *workspace,
          Plan &p, Packed (&m)[4]) {
    if (!make_plan(n, dims, workspace, p) || p.hidden > MOST_HIDDEN || p.top_k > MOST_TOP_K) return false;
    const int64_t experts = p.num_here, shared = p.shared_width;
    // Rows of gate and of up are whole pairs of tiles: they are the k of `down`, a multiple of 64.
    if (!take_packed(w.gate_up, experts * 2 * p.width, p.hidden, m[0]) ||
        !take_packed(w.down, experts * p.hidden, p.width, m[1]))
        return false;
    if (p.has_shared && (!take_packed(w.shared_gate_up, 2 * shared, p.hidden, m[2]) ||
                         !take_packed(w.shared_down, p.hidden, p.shared_width, m[3])))
        return false;
    return aligned(w.router) && aligned(w.shared_gate) && aligned(x) && aligned(workspace);
}

// To `out`, or, where it is null, to y, which must then have all columns. `rounded`: y is bf16. fp8_tokens: memory to round
// activations in, or null.
int launch_block(cudaStream_t stream, Plan p, const q35_moe_weights &routing, const Packed (&m)[4],
                 const bf16 *x, bool rounded, void *fp8_tokens, bf16 *out) {
    int code = rounded ? launch_wgmma_logits(stream, p, routing, x) : launch_tile_logits(stream, p, routing, x);
    if (code == cudaSuccess) code = launch_routes(stream, p, routing, x);
    const int up = packed_wgmma_serves(m[0], m[2]), down = packed_wgmma_serves(m[1], m[3]);
    const bool high = ((up | down) & ROUTED_EXPERTS) != 0;
    const Heights heights = high ? packed_wgmma_heights(p) : PACKED_HEIGHTS;
    p.max_tiles = int(most_tiles(p, heights.most));
    if (code == cudaSuccess) code = launch_sort(stream, p, heights);
    if (code == cudaSuccess) code = packed_wgmma_up(stream, p, m[0], m[2], x, up, fp8_tokens);
    if (code == cudaSuccess && up != ALL_EXPERTS)
        code = packed_many_up(stream, p, m[0], m[2], x, ALL_EXPERTS & ~up);
    const int most = rounded ? 2 * p.y_cols : p.y_cols;
    for (int col0 = 0; col0 < p.hidden && code == cudaSuccess; col0 += most) {
        const int cols = p.hidden - col0 < most ? p.hidden - col0 : most;
        const Terms terms = {col0, cols, rounded ? cols : p.y_cols, rounded};
        code = packed_wgmma_down(stream, p, m[1], m[3], terms, down, fp8_tokens);
        if (code == cudaSuccess && down != ALL_EXPERTS)
            code = packed_many_down(stream, p, m[1], m[3], terms, ALL_EXPERTS & ~down);
        if (code != cudaSuccess || out == nullptr) continue;
        code = rounded ? launch_bf16_sum(stream, p, col0, cols, out) : launch_sum(stream, p, col0, cols, out);
    }
    return code;
}

q35_moe_weights routing_of(const q35_packed_moe_weights &w) {
    q35_moe_weights routing = {};
    routing.router = w.router, routing.shared_gate = w.shared_gate;
    return routing;
}

}  // namespace

cudaError_t packed_many_up(cudaStream_t stream, const Plan &p, const Packed &gate_up, const Packed &shared_gate_up,
                           const bf16 *x, int experts) {
    const int widest = (experts & SHARED_EXPERT) != 0 && p.shared_width > p.width ? p.shared_width : p.width;
    const Products a = {x, ceil_div(widest, ROWS / 2), 0, Terms{}};
    return by_form<UP>(stream, p, gate_up, shared_gate_up, a, experts);
}

cudaError_t packed_many_down(cudaStream_t stream, const Plan &p, const Packed &down, const Packed &shared_down,
                             const Terms &terms, int experts) {
    const Products a = {nullptr, ceil_div(terms.cols, ROWS), 0, terms};
    return by_form<DOWN>(stream, p, down, shared_down, a, experts);
}

extern "C" int64_t q35_fp8_token_moe_bytes(int n, q35_moe_dims dims) {
    Plan p = {};
    return n > 0 && make_plan(n, dims, nullptr, p) ? packed_wgmma_token_bytes(p) : 0;
}

extern "C" int q35_fp8_token_moe(void *stream, int n, q35_moe_dims dims, q35_packed_moe_weights weights,
                                 const q35_bf16 *x, void *workspace, void *memory, float *residual, const float *norm,
                                 float eps, q35_bf16 *out) {
    if (n <= 0) return cudaSuccess;
    Plan p = {};
    Packed m[4] = {};
    if (!take(n, dims, weights, x, workspace, p, m) || !aligned(memory)) return cudaErrorInvalidValue;
    if (norm != nullptr && n <= FEW) return cudaErrorInvalidValue;
    if (n <= FEW) memory = nullptr;
    const q35_moe_weights routing = routing_of(weights);
    const bool rounded = n > FEW && has_wgmma(p, routing, as_bf16(x), as_bf16(out));
    if (norm != nullptr && norm_is_fast(p, routing, as_bf16(x), residual, norm, as_bf16(out))) {
        const int code = launch_block(as_stream(stream), p, routing, m, as_bf16(x), rounded, memory, nullptr);
        return code != cudaSuccess ? code
                                   : launch_sum_norm(as_stream(stream), p, rounded, residual, norm, eps, as_bf16(out));
    }
    // As in q35_moe_then_norm the block's own output waits in `out`.
    const int code = launch_block(as_stream(stream), p, routing, m, as_bf16(x), rounded, memory, as_bf16(out));
    return code != cudaSuccess || norm == nullptr
               ? code
               : q35_rmsnorm_residual(stream, n, dims.hidden, out, residual, norm, eps, out);
}

extern "C" int q35_packed_moe(void *stream, int n, q35_moe_dims dims, q35_packed_moe_weights weights,
                              const q35_bf16 *x, void *workspace, q35_bf16 *out) {
    return q35_fp8_token_moe(stream, n, dims, weights, x, workspace, nullptr, nullptr, nullptr, 0.f, out);
}

extern "C" int q35_packed_moe_then_norm(void *stream, int n, q35_moe_dims dims, q35_packed_moe_weights weights,
                                        const q35_bf16 *x, void *workspace, float *residual, const float *norm,
                                        float eps, q35_bf16 *out) {
    if (n > 0 && norm == nullptr) return cudaErrorInvalidValue;
    return q35_fp8_token_moe(stream, n, dims, weights, x, workspace, nullptr, residual, norm, eps, out);
}
