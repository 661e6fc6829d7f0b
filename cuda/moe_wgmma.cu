// More than 16 tokens on Hopper: the products with wgmma. Weights are the rows of a product and tokens its columns, any
// multiple of 8 of them up to 160: an expert's last few tokens cost what they are. Blocks work in pairs that share a
// tile of weights, each with half of the tokens: what either reads of L2 serves the products of both.
#include "moe.cuh"
#include "moe_wgmma.cuh"

namespace {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool HERE = true;
#else
constexpr bool HERE = false;  // for another architecture the kernel is empty
#endif

enum Mode { LOGITS, GATE_UP, DOWN };

// Of a tile: its features, and the products that each of two warpgroups makes of 64 rows of weights for them. A block
// copies half of those rows to both blocks. The router is small: low tiles of it keep more pairs busy.
template <int MODE> constexpr int FEATURES = MODE == DOWN ? 256 : 128;
template <int MODE> constexpr int PRODUCTS = MODE == LOGITS ? 1 : 2;
template <int MODE> constexpr int HALF_BYTES = PRODUCTS<MODE> * 64 * 128;
constexpr int COLUMNS = WGMMA_ROWS / 2;  // tokens of a block, at most
constexpr int LOGITS_ROWS = 256;         // tokens of a pair, at most
constexpr int TILE_K = 64;
constexpr int STAGES = 4;     // each filled by a warp of its own
constexpr int THREADS = 384;  // a warpgroup that copies and two that multiply
constexpr int PRODUCER_REGISTERS = 72, CONSUMER_REGISTERS = 216;  // of the 168 that a thread starts with

// Shared memory, from its start.
constexpr int WEIGHT_BYTES = 2 * HALF_BYTES<DOWN>;
constexpr int STAGE_BYTES = WEIGHT_BYTES + COLUMNS * 128;
constexpr int BOX_ROWS = 16;                                         // tokens of a tensor copy
constexpr int STAGING = STAGES * STAGE_BYTES, STAGING_BYTES = 2048;  // outputs of a warp on their way
constexpr int FULL = STAGING + 8 * STAGING_BYTES, EMPTY = FULL + STAGES * 8;
constexpr int SHARED_BYTES = EMPTY + STAGES * 8;
static_assert(SHARED_BYTES <= 227 * 1024, "more than a block may have");
static_assert(COLUMNS % BOX_ROWS == 0 && COLUMNS % 32 == 0, "not whole boxes, or whole warps");

// The tensors of the copies; dense ones have rows of tokens in their order: of the router, or the shared expert.
struct Maps {
    CUtensorMap weights, dense_weights;
    CUtensorMap tokens, dense_tokens;  // rows of the activations; GATE_UP gathers x for routed experts
};

struct Args {
    const bf16 *x;      // GATE_UP: rows of k elements
    int feature_tiles;  // of a row of tiles
    int dense_tiles;    // rows of tiles for all tokens in their order
    int dense_rows;     // of each
    int col0, cols;     // DOWN: columns of the output
    bool routed;        // there are tiles of the sorted list, too
};

// The order of all tiles: every so-many'th row of tiles is dense until there are no more of those, in the first three
// quarters. Their weights stay in L2, those of the others come from memory: mixed, neither has to wait for the other.
struct Order {
    int total, every;
};
__device__ __forceinline__ Order order_of(const Plan &p, const Args &a) {
    const int tiles = a.dense_tiles + (a.routed ? *p.num_tiles : 0);
    return {tiles * a.feature_tiles, a.dense_tiles > 0 ? max(tiles * 3 / (a.dense_tiles * 4), 1) : 1};
}
__device__ __forceinline__ bool is_dense(const Args &a, const Order &order, int tile) {
    return tile % order.every == 0 && tile / order.every < a.dense_tiles;
}

// One tile of the output, and what this block has of it.
struct Item {
    bool dense;
    int expert, feature;  // the first feature
    int first, rows;      // rows first .. of all tokens, or of the sorted list; the second block may have none
    int cols;             // of the products: the first block's rows in eights
};

// Its entry in the sorted list of tiles, which a block asks for long before it needs it.
__device__ __forceinline__ int2 entry_at(const Plan &p, const Args &a, const Order &order, int index) {
    const int tile = index / a.feature_tiles;
    if (index >= order.total || is_dense(a, order, tile)) return make_int2(0, 0);
    return p.tiles[tile - min(ceil_div(tile, order.every), a.dense_tiles)];
}

template <int MODE>
__device__ __forceinline__ Item item_at(const Plan &p, const Args &a, const Order &order, int index, int2 entry,
                                         int rank) {
    const int tile = index / a.feature_tiles, feature_tile = index - tile * a.feature_tiles;
    Item item;
    item.feature = feature_tile * FEATURES<MODE> + (MODE == DOWN ? a.col0 : 0);
    item.dense = is_dense(a, order, tile);
    item.expert = item.dense ? 0 : tile_expert(entry);
    const int first = item.dense ? tile / order.every * a.dense_rows : tile_first(entry);
    const int rows = item.dense ? min(a.dense_rows, p.n - first) : tile_rows(entry);
    item.cols = ceil_div(rows, 16) * 8;
    item.first = first + rank * item.cols;
    item.rows = rank == 0 ? min(item.cols, rows) : max(rows - item.cols, 0);
    return item;
}

template <int MODE>
__device__ __forceinline__ int depth(const Plan &p, const Item &item) {
    return MODE != DOWN ? p.hidden : item.dense ? p.shared_width : p.width;
}
// Past the last feature.
template <int MODE>
__device__ __forceinline__ int features_end(const Plan &p, const Args &a, const Item &item) {
    if (MODE == LOGITS) return p.num_experts;
    if (MODE == DOWN) return a.col0 + a.cols;
    return item.dense ? p.shared_width : p.width;
}
// The steps along k of a tile; 0 where there is nothing: routed and shared experts may have different widths.
template <int MODE>
__device__ __forceinline__ int steps_of(const Plan &p, const Args &a, const Item &item) {
    return item.feature < features_end<MODE>(p, a, item) ? ceil_div(depth<MODE>(p, item), TILE_K) : 0;
}

// What a copying warp gathers: lane l has rows l + 32 q of the tile, as entries of the sorted list.
template <int MODE>
__device__ __forceinline__ void load_rows(const Plan &p, const Item &item, int lane, uint32_t (&rows)[COLUMNS / 32]) {
#pragma unroll
    for (int q = 0; q < COLUMNS / 32; q++) {
        const int row = 32 * q + lane;
        rows[q] = MODE == GATE_UP && !item.dense && row < item.rows ? p.sorted[item.first + row] : 0;
    }
}

// Fills stage `warp` with every fourth step of the tiles of this block: half of the weights, for both blocks, and rows
// of tokens by tensor copies of one lane; rows of x that routed experts take, which lie anywhere, 16 bytes a lane. A
// stage is free when both blocks are done with it.
template <int MODE>
__device__ __forceinline__ void produce(const Plan &p, const Args &a, const Maps &maps, const Order &order,
                                        uint32_t shared, int rank, int warp, int lane) {
    const uint32_t stage = shared + warp * STAGE_BYTES, full = shared + FULL + warp * 8;
    const uint32_t empty = shared + EMPTY + warp * 8, half = stage + rank * HALF_BYTES<MODE>;
    const int own = rank * (FEATURES<MODE> / 2);  // where its features start
    // Rows lane / 8 + 4 i of the tile, bytes 16 (lane % 8) ..: one swizzle for even i, one for odd.
    const int c = lane % 8, r = lane / 8;
    const uint32_t to_even = stage + WEIGHT_BYTES + r * 128 + ((c ^ r) << 4);
    const uint32_t to_odd = stage + WEIGHT_BYTES + (r + 4) * 128 + ((c ^ (r + 4)) << 4);
    const size_t x = __cvta_generic_to_global(a.x);

    const int stride = gridDim.x / 2;
    int index = blockIdx.x / 2;
    uint32_t rows[COLUMNS / 32];
    Item item = item_at<MODE>(p, a, order, index, entry_at(p, a, order, index), rank);
    load_rows<MODE>(p, item, lane, rows);
    int2 entry = entry_at(p, a, order, index + stride);
    uint32_t done = 0;  // steps of the tiles before
    for (; index < order.total; index += stride) {
        const int k = depth<MODE>(p, item), steps = steps_of<MODE>(p, a, item);
        const bool gathers = MODE == GATE_UP && !item.dense;
        const int boxes = gathers ? 0 : ceil_div(item.rows, BOX_ROWS);
        uint32_t at[COLUMNS / 32];  // of the rows, in units of 16 bytes
#pragma unroll
        for (int q = 0; q < COLUMNS / 32; q++) at[q] = rows[q] / uint32_t(p.top_k) * uint32_t(k / 8);
        // Of the next tile, whose entry is there by now, and the entry of the one after it.
        const Item next = item_at<MODE>(p, a, order, index + stride, entry, rank);
        load_rows<MODE>(p, next, lane, rows);
        entry = entry_at(p, a, order, index + 2 * stride);

        const CUtensorMap *weights = item.dense ? &maps.dense_weights : &maps.weights;
        const CUtensorMap *tokens = item.dense ? &maps.dense_tokens : &maps.tokens;
        for (int step = (warp - done) & 3; step < steps; step += STAGES) {
            barrier_wait(empty, (((done + step) / STAGES) & 1) ^ 1);
            __syncwarp();  // before the first lane sets off what would end a second phase, of the parity waited for
            const int k0 = step * TILE_K;
            if (lane == 0) {
                barrier_arrive_and_expect(full, 2 * HALF_BYTES<MODE> + boxes * BOX_ROWS * 128);
                tensor_copy_to_both(half, weights, k0, item.feature + own, 0, item.expert, full);
#pragma unroll 1
                for (int i = 0; i < boxes; i++) {
                    const uint32_t to = stage + WEIGHT_BYTES + i * BOX_ROWS * 128;
                    tensor_copy(to, tokens, k0, item.first + i * BOX_ROWS, 0, 0, full);
                }
                if (MODE == GATE_UP && !gathers) barrier_arrive(full);
                // The weights come from memory, once: L2 asks for them when their stage is not yet free.
                constexpr int AHEAD = STAGES;
                const bool same = step + AHEAD < steps;
                const int later = same ? step + AHEAD : step + AHEAD - steps;
                const int first = same ? item.feature : next.feature, expert = same ? item.expert : next.expert;
                const CUtensorMap *of = (same ? item.dense : next.dense) ? &maps.dense_weights : &maps.weights;
                if (same || (index + stride < order.total && later < steps_of<MODE>(p, a, next)))
                    tensor_prefetch(of, later * TILE_K, first + own, 0, expert);
            }
            __syncwarp();
            if (!gathers) continue;
            const bool there = k0 + c * 8 < k;
            const uint32_t col = there ? k0 / 8 + c : 0;
#pragma unroll
            for (int q = 0; q < COLUMNS / 32; q++) {
#pragma unroll
                for (int i = 0; i < 8; i += 2) {
                    if (32 * q + 4 * i >= item.rows) break;
#pragma unroll
                    for (int odd = 0; odd < 2; odd++) {
                        const uint32_t row = __shfl_sync(ALL_LANES, at[q], 4 * (i + odd) + r);
                        copy16((odd ? to_odd : to_even) + (q * 4 + i / 2) * 1024, x + uint64_t(row + col) * 16, there);
                    }
                }
            }
            copies_to_products();
            __syncwarp();
            if (lane == 0) barrier_arrive(full);
        }
        done += steps;
        item = next;
    }
}

// Stores what a warp has of a tile, through 2 KB of its own at `staging`: products of 16 rows each for COLS tokens.
// `places` has for the rows lane + 32 q where they go in y.
template <int MODE, int COLS>
__device__ __forceinline__ void store_tile(const Plan &p, const Args &a, const Item &item,
                                           float (&d)[PRODUCTS<MODE>][COLS / 2], uint32_t staging,
                                           const int (&places)[COLUMNS / 32], int feature, int lane) {
    const int end = features_end<MODE>(p, a, item);
    if constexpr (MODE == LOGITS) {
#pragma unroll
        for (int i = 0; i < COLS / 2; i++) {
            const int row = i / 4 * 8 + lane % 4 * 2 + i % 2, e = feature + i % 4 / 2 * 8 + lane / 4;
            if (row < item.rows && e < end) p.logits[int64_t(item.first + row) * p.num_experts + e] = d[0][i];
        }
    } else if constexpr (MODE == GATE_UP) {
        // 16 features a token: 32 bytes. Four tokens are a row of all banks, 64 what there is room for.
        const int column = lane % 8, part = lane / 8 & 1;
        const uint32_t to = staging + column * 32 + ((part ^ column / 4) << 4);
        const int token = lane / 2, col = feature + lane % 2 * 8;
        const uint32_t from = staging + token * 32 + ((lane % 2 ^ (token / 4 & 1)) << 4);
        const int width = item.dense ? p.shared_width : p.width;
        bf16 *out = (item.dense ? p.shared_act : p.act) + int64_t(item.first + token) * width + col;
#pragma unroll
        for (int most = 0; most < COLS; most += 64) {
            if (most > 0) __syncwarp();
#pragma unroll
            for (int j = most / 8; j < COLS / 8 && j < most / 8 + 8; j++) {
                uint32_t m[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int at = 4 * j + 2 * i;
                    m[i] = pack2(quick_swiglu(d[0][at], d[1][at]), quick_swiglu(d[0][at + 1], d[1][at + 1]));
                }
                store_transposed(to + (j % 8) * 256, m[0], m[1]);
            }
            __syncwarp();
            uint4 v[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (most + 16 * i < COLS) v[i] = load_shared16(from + i * 512);
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (most + 16 * i < COLS)
                    store_global16(out + int64_t(most + 16 * i) * width, v[i],
                                   most + 16 * i + token < item.rows && col < end);
        }
    } else {
        // 32 features a token: 64 bytes. Two tokens are a row of all banks, 32 what there is room for.
        const int column = lane % 8, part = lane / 8;
        const uint32_t to = staging + column * 64 + ((part ^ column / 2) << 4);
        const int token = lane / 4, col = feature + lane % 4 * 8;
        const uint32_t from = staging + token * 64 + ((lane % 4 ^ token / 2) << 4);
        bf16 *out = reinterpret_cast<bf16 *>(p.y) + (col - a.col0);
#pragma unroll
        for (int most = 0; most < COLS; most += 32) {
            if (most > 0) __syncwarp();
#pragma unroll
            for (int j = most / 8; j < COLS / 8 && j < most / 8 + 4; j++) {
                uint32_t m[4];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    m[i] = pack2(d[i % 2][4 * j + i / 2 * 2], d[i % 2][4 * j + i / 2 * 2 + 1]);
                store_transposed(to + (j % 4) * 512, m[0], m[1], m[2], m[3]);
            }
            __syncwarp();
            uint4 v[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (most + 8 * i < COLS) v[i] = load_shared16(from + i * 512);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (most + 8 * i >= COLS) continue;
                const int place = __shfl_sync(ALL_LANES, places[most / 32], 8 * i + token);
                store_global16(out + int64_t(place) * a.cols, v[i], most + 8 * i + token < item.rows && col < end);
            }
        }
    }
    __syncwarp();
}

// COLS columns of a tile: the sums over k in steps of 16 whatever COLS and the other columns are. `released` is the
// barrier that this lane tells, one of each block, when its warp is done with stage 0.
template <int MODE, int COLS>
__device__ __forceinline__ void consume(const Plan &p, const Args &a, const Item &item, uint32_t shared,
                                        uint32_t released, uint32_t done, const int (&places)[COLUMNS / 32], int group,
                                        int warp, int lane) {
    // GATE_UP: of a warpgroup's 128 rows the first product takes the gates, the second those of up. DOWN: each takes
    // every other eight rows, so that a warp has 32 neighbouring features: of their eights 0 and 2, and 1 and 3.
    constexpr int OF_SECOND = MODE == GATE_UP ? 64 * 128 : 1024, BYTES_OF_8 = MODE == DOWN ? 2048 : 1024;
    // A stage is free when the next one's products are set off; at once where copies are what is waited for.
    constexpr int BEHIND = COLS > 64 ? 1 : 0;
    const int steps = steps_of<MODE>(p, a, item);
    float d[PRODUCTS<MODE>][COLS / 2] = {};
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        const uint32_t use = done + step, number = use % STAGES, stage = shared + number * STAGE_BYTES;
        barrier_wait(shared + FULL + number * 8, use / STAGES & 1);
        const uint64_t first = operand(stage + group * HALF_BYTES<MODE>, BYTES_OF_8);
        const uint64_t second = operand(stage + group * HALF_BYTES<MODE> + OF_SECOND, BYTES_OF_8);
        const uint64_t tokens = operand(stage + WEIGHT_BYTES, 1024);
        products_begin();
#pragma unroll
        for (int i = 0; i < TILE_K / 16; i++) {
            wgmma<COLS>(d[0], first + 2 * i, tokens + 2 * i);
            if constexpr (PRODUCTS<MODE> == 2) wgmma<COLS>(d[1], second + 2 * i, tokens + 2 * i);
        }
        products_commit();
        products_wait<BEHIND>();
        if (step >= BEHIND && lane < 2) barrier_arrive_there(released + (use - BEHIND) % STAGES * 8);
    }
    products_wait<0>();
#pragma unroll
    for (auto &product : d) products_end(product);
    if (BEHIND > 0 && lane < 2) barrier_arrive_there(released + (done + steps - 1) % STAGES * 8);
    const int feature = item.feature + (group * 4 + warp) * (FEATURES<MODE> / 8);
    store_tile<MODE, COLS>(p, a, item, d, shared + STAGING + (group * 4 + warp) * STAGING_BYTES, places, feature, lane);
}

template <int MODE, int COLS = 8>
__device__ __forceinline__ void consume_any(const Plan &p, const Args &a, const Item &item, uint32_t shared,
                                            uint32_t released, uint32_t done, const int (&places)[COLUMNS / 32],
                                            int group, int warp, int lane) {
    if constexpr (COLS < (MODE == LOGITS ? LOGITS_ROWS / 2 : COLUMNS)) {
        if (item.cols > COLS) {
            consume_any<MODE, COLS + 8>(p, a, item, shared, released, done, places, group, warp, lane);
            return;
        }
    }
    consume<MODE, COLS>(p, a, item, shared, released, done, places, group, warp, lane);
}

// As many blocks as multiprocessors, each pair taking every so-many'th tile: a warpgroup copies, two multiply. The
// tiles of an expert follow each other, so that its weights and rows are read from L2 again. DOWN: to y, bf16, by
// assignment, then the shared expert's.
template <int MODE>
__global__ void Q35_PAIRS __launch_bounds__(THREADS, 1)
    wgmma_kernel(Plan p, Args a, const __grid_constant__ Maps maps) {
    if constexpr (HERE) {
        extern __shared__ __align__(1024) uint8_t smem[];
        const uint32_t shared = shared_address(smem);
        // The same for a whole warp, and known to be.
        const int warp = __shfl_sync(ALL_LANES, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
        const int rank = rank_in_pair();
        if (threadIdx.x == 0) {
            for (int i = 0; i < STAGES; i++) {
                barrier_init(shared + FULL + i * 8, MODE == GATE_UP ? 2 : 1);  // for the tensor copies, and a gather
                barrier_init(shared + EMPTY + i * 8, 2 * 8);  // the warps that multiply, of both blocks
            }
            barriers_are_there();
            prefetch_map(&maps.weights);
            prefetch_map(&maps.dense_weights);
            prefetch_map(&maps.tokens);
            prefetch_map(&maps.dense_tokens);
        }
        pair_barrier();
        wait_for_inputs();
        let_next_start();
        const Order order = order_of(p, a);

        if (warp < 4) {
            give_registers<PRODUCER_REGISTERS>();
            produce<MODE>(p, a, maps, order, shared, rank, warp, lane);
        } else {
            take_registers<CONSUMER_REGISTERS>();
            const uint32_t released = address_of(shared + EMPTY, lane & 1);
            const int stride = gridDim.x / 2;
            int2 entry = entry_at(p, a, order, blockIdx.x / 2);
            uint32_t done = 0;
            for (int index = blockIdx.x / 2; index < order.total; index += stride) {
                const Item item = item_at<MODE>(p, a, order, index, entry, rank);
                entry = entry_at(p, a, order, index + stride);
                int places[COLUMNS / 32] = {};
                if (MODE == DOWN) {
#pragma unroll
                    for (int q = 0; q < COLUMNS / 32; q++) {
                        const int row = lane + 32 * q;
                        if (row < item.rows)
                            places[q] = item.dense ? p.n * p.top_k + item.first + row : p.sorted[item.first + row];
                    }
                }
                const int steps = steps_of<MODE>(p, a, item);
                if (steps > 0)
                    consume_any<MODE>(p, a, item, shared, released, done, places, warp / 4 - 1, warp % 4, lane);
                done += steps;
            }
        }
        pair_barrier();  // until now the other block may have had copies and arrivals on their way to this one
    }
}

// ------------------------------------------------------------------------------------------------------- launchers

struct Device {
    bool asked, serves;
    int multiprocessors;
};

Device this_device() {
    static Device known[64];
    int device = 0, major = 0, minor = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return {};
    Device &d = known[device];
    if (!d.asked) {
        if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
            cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
            cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
            return {};
        if (major == 9 && minor == 0) {
            // Where the build has no code for sm_90a the kernel is empty, which shows in its registers.
            cudaFuncAttributes attributes;
            if (cudaFuncGetAttributes(&attributes, wgmma_kernel<GATE_UP>) != cudaSuccess) return {};
            d.serves = attributes.numRegs > 64 && d.multiprocessors > 1 && map_encoder() != nullptr;
        }
        d.asked = true;
    }
    return d;
}

template <int MODE>
int launch_wgmma(cudaStream_t stream, const Plan &p, const Args &a, const Maps &maps) {
    const int64_t assignments = a.routed ? int64_t(p.n) * p.top_k : 0;
    const int64_t most = p.num_here < assignments ? p.num_here : assignments;
    const int64_t tiles = (a.dense_tiles + assignments / WGMMA_ROWS + most) * a.feature_tiles;
    const int pairs = this_device().multiprocessors / 2;
    if (tiles > 0x3fffffff) return cudaErrorInvalidValue;
    const cudaError_t code =
        cudaFuncSetAttribute(wgmma_kernel<MODE>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
    if (code != cudaSuccess) return code;
    return launch(wgmma_kernel<MODE>, dim3(static_cast<unsigned>(2 * (tiles < pairs ? tiles : pairs))), dim3(THREADS),
                  SHARED_BYTES, stream, p, a, maps);
}

}  // namespace

bool has_wgmma(const Plan &p, const q35_moe_weights &w, const bf16 *x, const bf16 *out) {
    auto serves = [](int k) { return k >= TILE_K && k % 8 == 0; };
    return serves(p.hidden) && serves(p.width) && (!p.has_shared || serves(p.shared_width)) && aligned(x) &&
           aligned(out) && aligned(w.router) && aligned(w.gate_up) && aligned(w.down) &&
           (!p.has_shared || (aligned(w.shared_gate_up) && aligned(w.shared_down))) && this_device().serves;
}

int launch_wgmma_logits(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, const bf16 *x) {
    Args a = {};
    a.feature_tiles = ceil_div(p.num_experts, FEATURES<LOGITS>);
    // So high that there is a tile for every pair.
    const int64_t rows = ceil_div(int64_t(p.n) * a.feature_tiles, this_device().multiprocessors / 2);
    a.dense_rows = rows < LOGITS_ROWS ? static_cast<int>(ceil_div(rows, WGMMA_STEP)) * WGMMA_STEP : LOGITS_ROWS;
    a.dense_tiles = ceil_div(p.n, a.dense_rows);
    Maps maps;
    if (!encode_map(&maps.weights, as_bf16(w.router), 1, 1, p.num_experts, p.hidden, FEATURES<LOGITS> / 2) ||
        !encode_map(&maps.tokens, x, 1, 1, p.n, p.hidden, BOX_ROWS))
        return cudaErrorInvalidValue;
    maps.dense_weights = maps.weights, maps.dense_tokens = maps.tokens;
    return launch_wgmma<LOGITS>(stream, p, a, maps);
}

int launch_wgmma_experts(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, const bf16 *x, bf16 *out) {
    Args a = {};
    a.routed = true;
    if (p.has_shared) {
        a.dense_tiles = ceil_div(p.n, WGMMA_ROWS);
        a.dense_rows = ceil_div(ceil_div(p.n, a.dense_tiles), WGMMA_STEP) * WGMMA_STEP;
    }
    Maps up, down;
    constexpr int UP_BOX = FEATURES<GATE_UP> / 2, DOWN_BOX = FEATURES<DOWN> / 2;
    bool encoded = encode_map(&up.weights, as_bf16(w.gate_up), p.num_here, 2, p.width, p.hidden, UP_BOX) &&
                   encode_map(&down.weights, as_bf16(w.down), p.num_here, 1, p.hidden, p.width, DOWN_BOX) &&
                   encode_map(&up.tokens, x, 1, 1, p.n, p.hidden, BOX_ROWS) &&
                   encode_map(&down.tokens, p.act, 1, 1, p.n * p.top_k, p.width, BOX_ROWS);
    up.dense_weights = up.weights, up.dense_tokens = up.tokens;
    down.dense_weights = down.weights, down.dense_tokens = down.tokens;
    if (p.has_shared)
        encoded = encoded &&
                  encode_map(&up.dense_weights, as_bf16(w.shared_gate_up), 1, 2, p.shared_width, p.hidden, UP_BOX) &&
                  encode_map(&down.dense_weights, as_bf16(w.shared_down), 1, 1, p.hidden, p.shared_width, DOWN_BOX) &&
                  encode_map(&down.dense_tokens, p.shared_act, 1, 1, p.n, p.shared_width, BOX_ROWS);
    if (!encoded) return cudaErrorInvalidValue;

    a.x = x;
    a.feature_tiles = ceil_div(p.width > p.shared_width ? p.width : p.shared_width, FEATURES<GATE_UP>);
    int code = launch_wgmma<GATE_UP>(stream, p, a, up);
    if (code != cudaSuccess) return code;

    const int most = 2 * p.y_cols;  // as bf16
    for (a.col0 = 0; a.col0 < p.hidden; a.col0 += a.cols) {
        a.cols = p.hidden - a.col0 < most ? p.hidden - a.col0 : most;
        a.feature_tiles = ceil_div(a.cols, FEATURES<DOWN>);
        code = launch_wgmma<DOWN>(stream, p, a, down);
        if (code != cudaSuccess) return code;
        if (out == nullptr) continue;
        code = launch_bf16_sum(stream, p, a.col0, a.cols, out);
        if (code != cudaSuccess) return code;
    }
    return cudaSuccess;
}
