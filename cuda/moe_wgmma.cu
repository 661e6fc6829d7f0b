// More than 16 tokens on Hopper: the products with wgmma. Weights are the rows of a product and tokens its columns, any
// multiple of 16 of them up to 256: an expert's last few tokens cost what they are, and a tile of weights is read once
// for as many tokens as the accumulators hold.
#include "moe.cuh"
#include "moe_wgmma.cuh"

namespace {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool HERE = true;
#else
constexpr bool HERE = false;  // for another architecture the kernel is empty
#endif

enum Mode { LOGITS, GATE_UP, DOWN };

constexpr int FEATURES = 128;  // rows of the weights: 64 for each of two warpgroups
constexpr int TILE_K = 64;
constexpr int STAGES = 4;      // each filled by a warp of its own
constexpr int LOGITS_ROWS = 128;
constexpr int THREADS = 384;   // a warpgroup that copies and two that multiply
constexpr int PRODUCER_REGISTERS = 72, CONSUMER_REGISTERS = 216;  // of the 168 that a thread starts with

// Shared memory, from its start.
constexpr int WEIGHT_BYTES = FEATURES * 128, STAGE_BYTES = WEIGHT_BYTES + WGMMA_ROWS * 128;
constexpr int STAGING = STAGES * STAGE_BYTES, STAGING_BYTES = 16384;  // outputs of a warpgroup on their way
constexpr int ROWS = STAGING + 2 * STAGING_BYTES, ROWS_BYTES = WGMMA_ROWS * 4;  // DOWN: where they go in y
constexpr int FULL = ROWS + 2 * ROWS_BYTES, EMPTY = FULL + STAGES * 8;
constexpr int SHARED_BYTES = EMPTY + STAGES * 8;
static_assert(SHARED_BYTES <= 227 * 1024, "more than a block may have");

struct Args {
    const bf16 *in;     // rows of k elements: x, or the activations
    const bf16 *dense;  // the same for rows of tokens in their order: of the router, or the shared expert
    int feature_tiles;  // of a row of tiles
    int dense_tiles;    // rows of tiles for all tokens in their order; they come first
    int dense_rows;     // of each
    int col0, cols;     // DOWN: columns of the output
    bool routed;        // tiles of the sorted list follow
};

// One tile of the output.
struct Item {
    bool dense;
    int expert, first, rows;  // rows first .. of all tokens, or of the sorted list
    int feature;              // its first
};

// Its entry in the sorted list of tiles, which a block asks for long before it needs it.
__device__ __forceinline__ int2 entry_at(const Plan &p, const Args &a, int index, int total) {
    const int tile = index / a.feature_tiles - a.dense_tiles;
    return index < total && tile >= 0 ? p.tiles[tile] : make_int2(0, 0);
}

template <int MODE>
__device__ __forceinline__ Item item_at(const Plan &p, const Args &a, int index, int2 entry) {
    const int tile = index / a.feature_tiles, feature_tile = index - tile * a.feature_tiles;
    Item item;
    item.feature = feature_tile * (MODE == GATE_UP ? FEATURES / 2 : FEATURES) + (MODE == DOWN ? a.col0 : 0);
    item.dense = tile < a.dense_tiles;
    item.expert = item.dense ? 0 : tile_expert(entry);
    item.first = item.dense ? tile * a.dense_rows : tile_first(entry);
    item.rows = item.dense ? min(a.dense_rows, p.n - item.first) : tile_rows(entry);
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

// What a copying warp has of a tile: lane l has rows l + 32 q of the input, as entries of the sorted list or numbers.
template <int MODE>
__device__ __forceinline__ void load_rows(const Plan &p, const Item &item, int lane, int (&rows)[WGMMA_ROWS / 32]) {
#pragma unroll
    for (int q = 0; q < WGMMA_ROWS / 32; q++) {
        rows[q] = 0;
        if (32 * q >= item.rows) continue;
        const int row = item.first + (32 * q + lane < item.rows ? 32 * q + lane : 0);
        rows[q] = MODE == GATE_UP && !item.dense ? p.sorted[row] : row;
    }
}

// The boxes of a tile of weights, each from a row of theirs: for GATE_UP 8 rows of gate, then the 8 of up for the same
// features, for each warp that multiplies.
template <int MODE, typename Copy>
__device__ __forceinline__ void each_box(Copy copy) {
#pragma unroll
    for (int i = 0; i < (MODE == GATE_UP ? FEATURES / 16 : 1); i++) copy(i, 8 * i);
}

// Fills stage `warp` with every fourth step of the tiles of this block: the weights by tensor copies of one lane, the
// rows of the tokens, which lie anywhere, 16 bytes a lane.
template <int MODE>
__device__ __forceinline__ void produce(const Plan &p, const Args &a, const CUtensorMap *weights,
                                        const CUtensorMap *dense_weights, uint32_t shared, int total, int warp,
                                        int lane) {
    const uint32_t stage = shared + warp * STAGE_BYTES, full = shared + FULL + warp * 8;
    const uint32_t empty = shared + EMPTY + warp * 8;
    // Rows lane / 8 + 4 i of the tile, bytes 16 (lane % 8) ..: one swizzle for even i, one for odd.
    const int c = lane % 8, r = lane / 8;
    const uint32_t to_even = stage + WEIGHT_BYTES + r * 128 + ((c ^ r) << 4);
    const uint32_t to_odd = stage + WEIGHT_BYTES + (r + 4) * 128 + ((c ^ (r + 4)) << 4);

    const int stride = gridDim.x;
    int index = blockIdx.x, rows[WGMMA_ROWS / 32];
    Item item = item_at<MODE>(p, a, index, entry_at(p, a, index, total));
    load_rows<MODE>(p, item, lane, rows);
    int2 entry = entry_at(p, a, index + stride, total);
    uint32_t done = 0;  // steps of the tiles before
    for (; index < total; index += stride) {
        const int k = depth<MODE>(p, item), steps = steps_of<MODE>(p, a, item);
        uint32_t at[WGMMA_ROWS / 32];  // of the rows, in units of 16 bytes
#pragma unroll
        for (int q = 0; q < WGMMA_ROWS / 32; q++) {
            const uint32_t row = MODE == GATE_UP && !item.dense ? uint32_t(rows[q]) / uint32_t(p.top_k) : rows[q];
            at[q] = row * uint32_t(k / 8);
        }
        // Of the next tile, whose entry is there by now, and the entry of the one after it.
        const Item next = item_at<MODE>(p, a, index + stride, entry);
        load_rows<MODE>(p, next, lane, rows);
        entry = entry_at(p, a, index + 2 * stride, total);

        const size_t in = __cvta_generic_to_global(item.dense ? a.dense : a.in);
        const CUtensorMap *map = item.dense ? dense_weights : weights;
        for (int step = (warp - done) & 3; step < steps; step += STAGES) {
            barrier_wait(empty, (((done + step) / STAGES) & 1) ^ 1);
            const int k0 = step * TILE_K;
            if (lane == 0) {
                barrier_arrive_and_expect(full, WEIGHT_BYTES);
                each_box<MODE>([&](int i, int row) {
                    tensor_copy(stage + i * 2048, map, k0, item.feature + row, 0, item.expert, full);
                });
                // The weights come from memory, once: L2 asks for them when their stage is not yet free.
                constexpr int AHEAD = STAGES;
                const bool same = step + AHEAD < steps;
                const int later = same ? step + AHEAD : step + AHEAD - steps;
                const int first = same ? item.feature : next.feature, expert = same ? item.expert : next.expert;
                const CUtensorMap *of = (same ? item.dense : next.dense) ? dense_weights : weights;
                if (same || (index + stride < total && later < steps_of<MODE>(p, a, next)))
                    each_box<MODE>([&](int, int row) {
                        tensor_prefetch(of, later * TILE_K, first + row, 0, expert);
                    });
            }
            __syncwarp();
            const bool there = k0 + c * 8 < k;
            const uint32_t col = there ? k0 / 8 + c : 0;
#pragma unroll
            for (int q = 0; q < WGMMA_ROWS / 32; q++) {
                if (32 * q >= item.rows) continue;
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    if (i == 4 && 32 * q + 16 >= item.rows) break;
                    const uint32_t row = __shfl_sync(ALL_LANES, at[q], 4 * i + r);
                    const uint32_t to = (i % 2 == 0 ? to_even : to_odd) + (q * 4 + i / 2) * 1024;
                    copy16(to, in + uint64_t(row + col) * 16, there);
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

// Stores what a warpgroup has of a tile: features `feature` .. of COLS tokens. `group` is the warpgroup, t its thread.
template <int MODE, int COLS>
__device__ __forceinline__ void store_tile(const Plan &p, const Args &a, const Item &item, const float (&d)[COLS / 2],
                                           uint32_t shared, const int (&sorted)[2], int group, int t, bf16 *y) {
    const int warp = t / 32, lane = t % 32, end = features_end<MODE>(p, a, item);
    const uint32_t staging = shared + STAGING + group * STAGING_BYTES;
    if constexpr (MODE == LOGITS) {
        const int feature = item.feature + group * 64 + warp * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < COLS / 2; i++) {
            const int row = i / 4 * 8 + lane % 4 * 2 + i % 2, e = feature + i % 4 / 2 * 8;
            if (row < item.rows && e < end) p.logits[int64_t(item.first + row) * p.num_experts + e] = d[i];
        }
    } else if constexpr (MODE == GATE_UP) {
        // 32 features a token: 64 bytes, of which a warp has 16. Two tokens are a row of all banks.
        group_barrier(group);
        const int column = lane % 16;
        const uint32_t to = staging + column * 64 + ((warp ^ (column / 2 & 3)) << 4);
#pragma unroll
        for (int j = 0; j < COLS / 8; j += 2) {
            uint32_t m[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int at = 4 * (j + i);
                m[i] = pack2(quick_swiglu(d[at], d[at + 2]), quick_swiglu(d[at + 1], d[at + 3]));
            }
            store_transposed(to + j * 512, m[0], m[1]);
        }
        group_barrier(group);
        const int c = t % 4, col = item.feature + group * 32 + c * 8;
        const uint32_t from = staging + t / 4 * 64 + ((c ^ (t / 8 & 3)) << 4);
        const int width = item.dense ? p.shared_width : p.width;
        bf16 *out = (item.dense ? p.shared_act : p.act) + int64_t(item.first) * width + col;
        uint4 v[ceil_div(COLS, 32)];
#pragma unroll
        for (int i = 0; i < ceil_div(COLS, 32); i++) v[i] = load_shared16(from + i * 2048);
#pragma unroll
        for (int i = 0; i < ceil_div(COLS, 32); i++) {
            const int row = t / 4 + 32 * i;
            store_global16(out + int64_t(row) * width, v[i], row < item.rows && col < end);
        }
    } else {
        // 64 features a token: 128 bytes, of which a warp has 32; 128 tokens at a time.
        const uint32_t places = shared + ROWS + group * ROWS_BYTES;
#pragma unroll
        for (int half = 0; half < COLS; half += 128) {
            group_barrier(group);
            if (half == 0) {
#pragma unroll
                for (int i = 0; i < 2; i++) store_shared4(places + (t + 128 * i) * 4, sorted[i]);
            }
            const int column = lane / 16 * 8 + lane % 8, part = 2 * warp + (lane / 8 & 1);
            const uint32_t to = staging + column * 128 + ((part ^ (lane & 7)) << 4);
#pragma unroll
            for (int j = half / 8; j < (COLS < half + 128 ? COLS : half + 128) / 8; j += 2) {
                const float *v = d + 4 * j;
                store_transposed(to + (j - half / 8) * 1024, pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]),
                                 pack2(v[6], v[7]));
            }
            group_barrier(group);
            const int c = t % 8, col = item.feature + group * 64 + c * 8;
            const uint32_t from = staging + t / 8 * 128 + ((c ^ (t / 8 & 7)) << 4);
            constexpr int MOST = COLS < 128 ? COLS / 16 : 8;
            uint4 v[MOST];
            int place[MOST];
#pragma unroll
            for (int i = 0; i < MOST; i++) {
                if (half + 16 * i >= COLS) continue;
                v[i] = load_shared16(from + i * 2048);
                place[i] = load_shared4(places + (half + t / 8 + 16 * i) * 4);
            }
#pragma unroll
            for (int i = 0; i < MOST; i++) {
                if (half + 16 * i >= COLS) continue;
                const bool there = half + t / 8 + 16 * i < item.rows && col < end;
                store_global16(y + int64_t(place[i]) * a.cols + (col - a.col0), v[i], there);
            }
        }
    }
}

// A tile of at least item.rows columns: the sum over k in steps of 16 whatever COLS and the other columns are.
template <int MODE, int COLS>
__device__ __forceinline__ void consume(const Plan &p, const Args &a, const Item &item, uint32_t shared, uint32_t done,
                                        const int (&sorted)[2], int group, int t, bf16 *y) {
    const int steps = steps_of<MODE>(p, a, item);
    float d[COLS / 2] = {};
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        const uint32_t use = done + step, number = use % STAGES, stage = shared + number * STAGE_BYTES;
        barrier_wait(shared + FULL + number * 8, use / STAGES & 1);
        const uint64_t features = operand(stage + group * (64 * 128)), tokens = operand(stage + WEIGHT_BYTES);
        products_begin();
#pragma unroll
        for (int i = 0; i < TILE_K / 16; i++) wgmma<COLS>(d, features + 2 * i, tokens + 2 * i);
        products_commit();
        // The step before is over, and its stage free.
        products_wait<1>();
        if (step > 0 && t % 32 == 0) barrier_arrive(shared + EMPTY + (use - 1) % STAGES * 8);
    }
    products_wait<0>();
    products_end(d);
    if (t % 32 == 0) barrier_arrive(shared + EMPTY + (done + steps - 1) % STAGES * 8);
    store_tile<MODE, COLS>(p, a, item, d, shared, sorted, group, t, y);
}

template <int MODE, int COLS = WGMMA_STEP>
__device__ __forceinline__ void consume_any(const Plan &p, const Args &a, const Item &item, uint32_t shared,
                                            uint32_t done, const int (&sorted)[2], int group, int t, bf16 *y) {
    constexpr int MOST = MODE == LOGITS ? LOGITS_ROWS : WGMMA_ROWS;
    if constexpr (COLS < MOST) {
        if (item.rows > COLS) {
            consume_any<MODE, COLS + WGMMA_STEP>(p, a, item, shared, done, sorted, group, t, y);
            return;
        }
    }
    consume<MODE, COLS>(p, a, item, shared, done, sorted, group, t, y);
}

// As many blocks as multiprocessors, each taking every so-many'th tile: a warpgroup copies, two multiply. The tiles of
// an expert follow each other, so that its weights and rows are read from L2 again.
// GATE_UP: rows 16 i .. 16 i + 7 of a tile of weights are gates, the 8 after them the same features of up: a thread has
// both. DOWN: to y, bf16, by assignment, then the shared expert's.
template <int MODE>
__global__ void __launch_bounds__(THREADS, 1)
    wgmma_kernel(Plan p, Args a, const __grid_constant__ CUtensorMap weights,
                 const __grid_constant__ CUtensorMap dense_weights) {
    if constexpr (HERE) {
        extern __shared__ __align__(1024) uint8_t smem[];
        const uint32_t shared = shared_address(smem);
        // The same for a whole warp, and known to be.
        const int warp = __shfl_sync(ALL_LANES, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
        if (threadIdx.x == 0) {
            for (int i = 0; i < STAGES; i++) {
                barrier_init(shared + FULL + i * 8, 2);   // for the tensor copies, and for the others
                barrier_init(shared + EMPTY + i * 8, 8);  // the warps that multiply
            }
            barriers_are_there();
            prefetch_map(&weights);
            prefetch_map(&dense_weights);
        }
        __syncthreads();
        wait_for_inputs();
        let_next_start();
        const int total = (a.dense_tiles + (a.routed ? *p.num_tiles : 0)) * a.feature_tiles;

        if (warp < 4) {
            give_registers<PRODUCER_REGISTERS>();
            produce<MODE>(p, a, &weights, &dense_weights, shared, total, warp, lane);
        } else {
            take_registers<CONSUMER_REGISTERS>();
            const int group = warp / 4 - 1, t = threadIdx.x % 128;
            bf16 *y = reinterpret_cast<bf16 *>(p.y);
            const int stride = gridDim.x;
            int2 entry = entry_at(p, a, blockIdx.x, total);
            uint32_t done = 0;
            for (int index = blockIdx.x; index < total; index += stride) {
                const Item item = item_at<MODE>(p, a, index, entry);
                entry = entry_at(p, a, index + stride, total);
                int places[2] = {};
                if (MODE == DOWN) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int row = t + 128 * i;
                        if (row < item.rows)
                            places[i] = item.dense ? p.n * p.top_k + item.first + row : p.sorted[item.first + row];
                    }
                }
                const int steps = steps_of<MODE>(p, a, item);
                if (steps > 0) consume_any<MODE>(p, a, item, shared, done, places, group, t, y);
                done += steps;
            }
        }
    }
}

// out[:, col0 .. col0 + cols] = the weighted sums of y in bf16, the experts in the order of their weights, then the
// shared expert; a thread 8 columns.
__global__ void __launch_bounds__(256) wgmma_sum(Plan p, int col0, int cols, bf16 *out) {
    wait_for_inputs();
    let_next_start();
    const int groups = cols / 8;
    const int64_t index = int64_t(blockIdx.x) * 256 + threadIdx.x;
    const int token = static_cast<int>(index / groups), col = static_cast<int>(index % groups) * 8;
    if (token >= p.n) return;
    const float *weights = p.weights + int64_t(token) * p.top_k;
    const bf16 *y = reinterpret_cast<const bf16 *>(p.y) + int64_t(token) * p.top_k * cols + col;
    float sum[8] = {};
    auto load16 = [](const bf16 *from) { return *reinterpret_cast<const uint4 *>(from); };
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
    for (int first = 0; first < p.top_k; first += 4) {
        uint4 v[4];  // loaded together
        float weight[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = min(first + i, p.top_k - 1);
            weight[i] = weights[r], v[i] = load16(y + int64_t(r) * cols);
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (first + i < p.top_k) add(weight[i], v[i]);
    }
    if (p.has_shared) add(precise_sigmoid(gate), of_shared);
    store8(out + int64_t(token) * p.hidden + col0 + col, sum);
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
            d.serves = attributes.numRegs > 64 && map_encoder() != nullptr;
        }
        d.asked = true;
    }
    return d;
}

template <int MODE>
int launch_wgmma(cudaStream_t stream, const Plan &p, Args a, const CUtensorMap &weights, const CUtensorMap &dense) {
    const int64_t assignments = a.routed ? int64_t(p.n) * p.top_k : 0;
    const int64_t most = p.num_experts < assignments ? p.num_experts : assignments;
    const int64_t tiles = (a.dense_tiles + assignments / WGMMA_ROWS + most) * a.feature_tiles;
    const int blocks = this_device().multiprocessors;
    if (tiles > 0x3fffffff) return cudaErrorInvalidValue;
    const cudaError_t code =
        cudaFuncSetAttribute(wgmma_kernel<MODE>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
    if (code != cudaSuccess) return code;
    return launch(wgmma_kernel<MODE>, dim3(static_cast<unsigned>(tiles < blocks ? tiles : blocks)), dim3(THREADS),
                  SHARED_BYTES, stream, p, a, weights, dense);
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
    a.in = a.dense = x;
    a.feature_tiles = ceil_div(p.num_experts, FEATURES);
    a.dense_rows = LOGITS_ROWS, a.dense_tiles = ceil_div(p.n, LOGITS_ROWS);
    CUtensorMap router;
    if (!encode_map(&router, as_bf16(w.router), 1, 1, p.num_experts, p.hidden, FEATURES)) return cudaErrorInvalidValue;
    return launch_wgmma<LOGITS>(stream, p, a, router, router);
}

int launch_wgmma_experts(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, const bf16 *x, bf16 *out) {
    Args a = {};
    a.routed = true;
    a.dense_rows = WGMMA_ROWS, a.dense_tiles = p.has_shared ? ceil_div(p.n, WGMMA_ROWS) : 0;
    CUtensorMap up, down, shared_up, shared_down;
    bool encoded = encode_map(&up, as_bf16(w.gate_up), p.num_experts, 2, p.width, p.hidden, 8) &&
                   encode_map(&down, as_bf16(w.down), p.num_experts, 1, p.hidden, p.width, FEATURES);
    shared_up = up, shared_down = down;
    if (p.has_shared)
        encoded = encoded && encode_map(&shared_up, as_bf16(w.shared_gate_up), 1, 2, p.shared_width, p.hidden, 8) &&
                  encode_map(&shared_down, as_bf16(w.shared_down), 1, 1, p.hidden, p.shared_width, FEATURES);
    if (!encoded) return cudaErrorInvalidValue;

    a.in = a.dense = x;
    a.feature_tiles = ceil_div(p.width > p.shared_width ? p.width : p.shared_width, FEATURES / 2);
    int code = launch_wgmma<GATE_UP>(stream, p, a, up, shared_up);
    if (code != cudaSuccess) return code;

    a.in = p.act, a.dense = p.shared_act;
    const int most = 2 * p.y_cols;  // as bf16
    for (a.col0 = 0; a.col0 < p.hidden; a.col0 += a.cols) {
        a.cols = p.hidden - a.col0 < most ? p.hidden - a.col0 : most;
        a.feature_tiles = ceil_div(a.cols, FEATURES);
        code = launch_wgmma<DOWN>(stream, p, a, down, shared_down);
        if (code != cudaSuccess) return code;
        if (out == nullptr) continue;
        const int64_t blocks = ceil_div(int64_t(p.n) * (a.cols / 8), 256);
        code = launch(wgmma_sum, dim3(static_cast<unsigned>(blocks)), dim3(256), 0, stream, p, a.col0, a.cols, out);
        if (code != cudaSuccess) return code;
    }
    return cudaSuccess;
}
