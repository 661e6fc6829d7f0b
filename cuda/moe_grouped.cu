// More than 16 tokens: of the assignments sorted by expert one grouped product of tiles for each projection.
#include "mma.cuh"
#include "moe.cuh"

namespace {

// -------------------------------------------------------------------------------------------- the product of tiles

enum Mode { LOGITS, GATE_UP, DOWN };

constexpr int TILE_N = 128;  // rows of the weights
constexpr int TILE_K = 64;   // 128 bytes a row: 8 groups of 16 bytes, swizzled by the row
constexpr int STAGES = 3;
constexpr int ROW_BYTES = TILE_K * 2;

template <int TILE_M> constexpr int tile_bytes() { return STAGES * (TILE_M + TILE_N) * ROW_BYTES; }

struct TileArgs {
    const bf16 *x, *weights, *shared_weights;
    int feature_tiles;  // of a row of tiles
    int shared_tiles;   // rows of tiles of the shared expert; they come first
    int col0, cols;     // DOWN: columns of the output
};

// 16 bytes of shared memory from `left` (any sign) elements that may lie anywhere.
__device__ __forceinline__ void gather16(uint8_t *to, const bf16 *from, int left) {
    uint32_t v[4] = {};
    const uint16_t *words = reinterpret_cast<const uint16_t *>(from);
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < left) v[i / 2] |= static_cast<uint32_t>(words[i]) << (i % 2 * 16);
    *reinterpret_cast<uint4 *>(to) = make_uint4(v[0], v[1], v[2], v[3]);
}

// A tile of TILE_M tokens of one expert by 128 rows of its weights: a pipeline of cp.async, ldmatrix and mma as in
// CUTLASS's multistage products for sm_80, own code. A warp has 32 by 64 of it. An element is the sum over k in steps
// of 16 whatever the tile's height, its place in it and the other rows are.
// LOGITS: x times the router. GATE_UP: 64 features, 8 gate rows and the 8 up rows of the same features alternating, so
// that a thread has both and stores silu(gate) * up; tokens are gathered. DOWN: from rows in sorted order to y, by
// assignment. VEC: rows of both operands start at multiples of 16 bytes.
template <int TILE_M, int MODE, bool VEC>
__global__ void __launch_bounds__(TILE_M * 2, TILE_M == 64 ? 3 : 2) tile_kernel(Plan p, TileArgs args) {
    extern __shared__ __align__(1024) uint8_t smem[];
    constexpr int STEP = TILE_M / 4;  // rows that the threads copy at a time, 8 threads a row
    constexpr int STAGE_BYTES = (TILE_M + TILE_N) * ROW_BYTES;
    wait_for_inputs();
    let_next_start();
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int tile = blockIdx.x / args.feature_tiles, feature_tile = blockIdx.x % args.feature_tiles;

    // The group: rows `row0`.. of `count` rows from `start` (in sorted order) times the matrix at `w`.
    const bool shared = MODE != LOGITS && tile < args.shared_tiles;
    int row0 = tile * TILE_M, start = 0, count = p.n;
    int k = p.hidden, features = p.num_experts, first = feature_tile * TILE_N, end = p.num_experts;
    const bf16 *w = args.weights;
    if (MODE != LOGITS) {
        int expert = 0;
        if (shared) {
            w = args.shared_weights;
        } else {
            if (tile - args.shared_tiles >= *p.num_tiles) return;
            const int2 entry = p.tiles[tile - args.shared_tiles];
            expert = tile_expert(entry), start = tile_first(entry), count = tile_rows(entry);
            row0 = 0;
        }
        const int width = shared ? p.shared_width : p.width;
        if (MODE == GATE_UP) {
            features = end = width;
            first = feature_tile * (TILE_N / 2);
            w += int64_t(expert) * 2 * width * k;
        } else {
            k = width;
            features = p.hidden;
            first += args.col0, end = args.col0 + args.cols;
            w += int64_t(expert) * features * k;
        }
    }
    if (first >= end) return;

    // What this thread copies: group `c` of 8 elements of rows r, r + STEP, ..
    const int c = tid % 8, r = tid / 8;
    const uint32_t at = r * ROW_BYTES + ((c ^ (r & 7)) << 4);  // STEP is a multiple of 8: the same swizzle for all
    const bf16 *a = args.x;
    if (MODE == DOWN) a = shared ? p.shared_act : p.act + int64_t(start) * k;
    int a_rows[4];
    uint32_t there = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = row0 + r + i * STEP;
        if (row < count) there |= 1u << i;
        const int row_in = row < count ? row : row0;
        a_rows[i] = MODE == GATE_UP && !shared ? p.sorted[start + row_in] / p.top_k : row_in;
    }
    // Row j of the tile of weights is gate (j / 8 even) or up of feature j / 16 * 8 + j % 8, else feature j.
    const int feature = first + (MODE == GATE_UP ? r / 16 * 8 + r % 8 : r);
    const bf16 *b_row = w + int64_t(feature) * k + (MODE == GATE_UP && (r / 8 & 1) ? int64_t(features) * k : 0);
    constexpr int FEATURE_STEP = MODE == GATE_UP ? STEP / 2 : STEP;

    const uint32_t smem_at = shared_address(smem);
    auto load = [&](int stage, int k0) {
        const int col = k0 + c * 8;
        const uint32_t a_at = stage * STAGE_BYTES + at, b_at = a_at + TILE_M * ROW_BYTES;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const bool in = (there >> i & 1) && col < k;
            const bf16 *from = a + int64_t(a_rows[i]) * k + col;
            if (VEC)
                copy16(smem_at + a_at + i * STEP * ROW_BYTES, __cvta_generic_to_global(in ? from : args.weights), in);
            else
                gather16(smem + a_at + i * STEP * ROW_BYTES, from, in ? k - col : 0);
        }
#pragma unroll
        for (int i = 0; i < TILE_N / STEP; i++) {
            const bool in = feature + i * FEATURE_STEP < end && col < k;
            const bf16 *from = b_row + int64_t(i * FEATURE_STEP) * k + col;
            if (VEC)
                copy16(smem_at + b_at + i * STEP * ROW_BYTES, __cvta_generic_to_global(in ? from : args.weights), in);
            else
                gather16(smem + b_at + i * STEP * ROW_BYTES, from, in ? k - col : 0);
        }
    };

    float acc[2][8][4] = {};
    const int warp_m = warp / 2 * 32, warp_n = warp % 2 * 64;
    // Lanes of an ldmatrix: rows and halves of 16 k of the four 8x8 matrices. Rows are lane % 8 from a multiple of 8.
    const uint32_t a_frag = (warp_m + lane % 16) * ROW_BYTES, a_half = lane / 16;
    const uint32_t b_frag = (TILE_M + warp_n + lane / 16 * 8 + lane % 8) * ROW_BYTES, b_half = lane / 8 & 1;
    const uint32_t swizzle = lane & 7;

    const int steps = ceil_div(k, TILE_K);
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) load(s, s * TILE_K);
        copy_commit();
    }
    int stage = 0;
    for (int step = 0; step < steps; step++) {
        // All but the newest group are there, this step's with them; and every warp is done with the step before, whose
        // stage is filled next.
        copy_wait<STAGES - 2>();
        __syncthreads();
        const int fill = stage == 0 ? STAGES - 1 : stage - 1;
        if (step + STAGES - 1 < steps) load(fill, (step + STAGES - 1) * TILE_K);
        copy_commit();

        const uint32_t from = smem_at + stage * STAGE_BYTES;
#pragma unroll
        for (int kk = 0; kk < TILE_K / 16; kk++) {
            uint32_t a[2][4];
#pragma unroll
            for (int i = 0; i < 2; i++)
                load_matrices(a[i], from + a_frag + i * 16 * ROW_BYTES + (((kk * 2 + a_half) ^ swizzle) << 4));
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t b[4];
                load_matrices(b, from + b_frag + j * 16 * ROW_BYTES + (((kk * 2 + b_half) ^ swizzle) << 4));
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    mma(acc[i][2 * j], a[i], b);
                    mma(acc[i][2 * j + 1], a[i], b + 2);
                }
            }
        }
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }

    // A thread has columns 2 (lane % 4), + 1 of rows lane / 4, + 8 of each 16 by 8.
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = row0 + warp_m + i * 16 + h * 8 + lane / 4;
            if (row >= count) continue;
            if constexpr (MODE == GATE_UP) {
                bf16 *to = shared ? p.shared_act + int64_t(row) * features
                                  : p.act + int64_t(start + row) * features;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int col = first + warp_n / 2 + j * 8 + lane % 4 * 2;
                    const float one = swiglu(acc[i][2 * j][2 * h], acc[i][2 * j + 1][2 * h]);
                    const float two = swiglu(acc[i][2 * j][2 * h + 1], acc[i][2 * j + 1][2 * h + 1]);
                    if (features % 2 == 0 && col < end) {
                        *reinterpret_cast<__nv_bfloat162 *>(to + col) = __floats2bfloat162_rn(one, two);
                    } else {
                        if (col < end) to[col] = __float2bfloat16_rn(one);
                        if (col + 1 < end) to[col + 1] = __float2bfloat16_rn(two);
                    }
                }
            } else {
                const int stride = MODE == LOGITS ? p.num_experts : p.y_cols;
                float *to = MODE == LOGITS ? p.logits + int64_t(row) * stride
                            : shared ? p.y + (int64_t(p.n) * p.top_k + row) * stride
                                     : p.y + int64_t(p.sorted[start + row]) * stride;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const int col = first + warp_n + j * 8 + lane % 4 * 2;
                    float *pair = to + col - (MODE == DOWN ? args.col0 : 0);
                    if (stride % 2 == 0 && col < end) {
                        *reinterpret_cast<float2 *>(pair) = make_float2(acc[i][j][2 * h], acc[i][j][2 * h + 1]);
                    } else {
                        if (col < end) pair[0] = acc[i][j][2 * h];
                        if (col + 1 < end) pair[1] = acc[i][j][2 * h + 1];
                    }
                }
            }
        }
}

template <int TILE_M, int MODE, bool VEC>
int launch_tiles(cudaStream_t stream, const Plan &p, const TileArgs &args, int64_t tiles) {
    const int64_t blocks = tiles * args.feature_tiles;
    if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
    auto kernel = tile_kernel<TILE_M, MODE, VEC>;
    const int bytes = tile_bytes<TILE_M>();
    const cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (code != cudaSuccess) return code;
    return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(TILE_M * 2), bytes, stream, p, args);
}

// The grouped products: tall tiles where experts have many tokens, since a tile of weights then serves twice as many.
template <int MODE>
int launch_groups(cudaStream_t stream, const Plan &p, TileArgs args, int height, bool vec) {
    args.shared_tiles = p.has_shared ? ceil_div(p.n, height) : 0;
    // Of the routed ones a bound: what there is beyond *num_tiles returns at once.
    const int64_t assignments = int64_t(p.n) * p.top_k;
    const int64_t most = p.num_here < assignments ? p.num_here : assignments;
    const int64_t tiles = args.shared_tiles + assignments / height + most;
    if (!vec) return launch_tiles<64, MODE, false>(stream, p, args, tiles);
    if (height == 64) return launch_tiles<64, MODE, true>(stream, p, args, tiles);
    return launch_tiles<128, MODE, true>(stream, p, args, tiles);
}

}  // namespace

int launch_tile_logits(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, const bf16 *x) {
    const TileArgs args = {x, as_bf16(w.router), nullptr, ceil_div(p.num_experts, TILE_N), 0, 0, 0};
    const int row_tiles = ceil_div(p.n, SMALL_TILE);
    return p.hidden % 8 == 0 && aligned(x) && aligned(w.router)
               ? launch_tiles<64, LOGITS, true>(stream, p, args, row_tiles)
               : launch_tiles<64, LOGITS, false>(stream, p, args, row_tiles);
}

int launch_many(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, const bf16 *x, bf16 *out) {
    const bool whole = p.hidden % 8 == 0 && aligned(x);
    const bool vec_up = whole && aligned(w.gate_up) && (!p.has_shared || aligned(w.shared_gate_up));
    const bool vec_down = p.width % 8 == 0 && p.shared_width % 8 == 0 && aligned(w.down) &&
                          (!p.has_shared || aligned(w.shared_down));
    const bool hopper = has_wgmma(p, w, x, out);
    const int64_t per_expert = int64_t(p.n) * p.top_k / p.num_experts;
    // One height for both projections: they share the list of tiles.
    const int height = vec_up && vec_down && per_expert >= 192 ? 128 : SMALL_TILE;

    int code = hopper ? launch_wgmma_logits(stream, p, w, x) : launch_tile_logits(stream, p, w, x);
    if (code != cudaSuccess) return code;
    code = launch_routes(stream, p, w, x);
    if (code != cudaSuccess) return code;
    code = launch_sort(stream, p, hopper ? Heights{WGMMA_ROWS, WGMMA_STEP} : Heights{height, height});
    if (code != cudaSuccess) return code;
    if (hopper) return launch_wgmma_experts(stream, p, w, x, out);

    TileArgs args = {};
    args.x = x;
    const int widest = p.width > p.shared_width ? p.width : p.shared_width;
    args.weights = as_bf16(w.gate_up), args.shared_weights = as_bf16(w.shared_gate_up);
    args.feature_tiles = ceil_div(widest, TILE_N / 2);
    code = launch_groups<GATE_UP>(stream, p, args, height, vec_up);
    if (code != cudaSuccess) return code;

    args.weights = as_bf16(w.down), args.shared_weights = as_bf16(w.shared_down);
    for (int col0 = 0; col0 < p.hidden; col0 += p.y_cols) {
        args.col0 = col0, args.cols = p.hidden - col0 < p.y_cols ? p.hidden - col0 : p.y_cols;
        args.feature_tiles = ceil_div(args.cols, TILE_N);
        code = launch_groups<DOWN>(stream, p, args, height, vec_down);
        if (code == cudaSuccess && out != nullptr) code = launch_sum(stream, p, col0, args.cols, out);
        if (code != cudaSuccess) return code;
    }
    return cudaSuccess;
}
