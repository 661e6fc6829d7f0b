// Packed weights times many tokens with wgmma: the tiles of the output, and what is copied for them.
//
// A tile has 128 rows of weights, of two warpgroups, and up to 128 tokens; k goes by units of 128. Tokens are bf16, or
// rounded to e4m3 (fp8_tokens.cuh): T. In kernels for tiles of up to 32 tokens (HIGH) two blocks share a
// multiprocessor, and more of the weights is under way: beside so few the products do not hide how long codes take.
#pragma once
#include "moe_wgmma.cuh"
#include "packed_wgmma.cuh"
#include "fp8_tokens.cuh"

namespace packed_wgmma {

// ROWS: the rows of the output are features of one matrix. Blocks come in pairs of 256 features and the same tokens, of
// which each copies half to both. GATE_UP: rows are 64 gates and the 64 ups beside them; tokens lie anywhere.
enum Mode { ROWS, GATE_UP };

constexpr int UNIT = 128;     // elements along k of a stage
constexpr int TOKENS = 128;   // of a tile, at most
constexpr int FEW_TOKENS = 32;
constexpr int BOX_ROWS = 32;  // of a tensor copy, and the step of a tile's columns
constexpr int BAND = 8;       // tiles of tokens whose turn comes together
constexpr int COPIERS = 4;    // warps that fill stages, every fourth unit each
constexpr int WARPS = 8;      // that multiply
constexpr int THREADS = 384;  // a warpgroup that copies and two that multiply
template <int HIGH> constexpr int ON_SM = HIGH == FEW_TOKENS ? 2 : 1;  // blocks
// Of the 168 that a thread starts with, or 80.
template <int HIGH> constexpr int PRODUCER_REGISTERS = HIGH == FEW_TOKENS ? 40 : 72;
template <int HIGH> constexpr int CONSUMER_REGISTERS = HIGH == FEW_TOKENS ? 96 : 216;

template <int MODE> constexpr int BLOCKS = MODE == ROWS ? 2 : 1;            // of a cluster
template <int MODE> constexpr int FEATURES = MODE == ROWS ? 2 * 128 : 64;  // of a cluster
// Of a scale; of GGUF's a word.
template <int FORM> constexpr int SIDE_BYTES = FORM == FP4_TILES ? 8 : FORM == FP8_TILES || IS_GGUF<FORM> ? 4 : 2;

// Shared memory: stages, of tokens in tiles of 128 bytes along k (two of bf16, one of e4m3), then the codes of 8 row
// tiles; outputs of the warps on their way; barriers.
template <int FORM, typename T, int HIGH>
struct Memory {
    static constexpr int STAGES = sizeof(T) == 1 ? 6 : HIGH == TOKENS || FORM == FP8_TILES ? 4 : 6;
    static constexpr int STAGING_BYTES = HIGH < 64 ? HIGH * 32 : 2048;  // of a warp
    static constexpr int HALF_BYTES = HIGH * 128;
    static constexpr int TOKEN_BYTES = int(sizeof(T)) * HALF_BYTES;
    static constexpr int STAGE_BYTES = TOKEN_BYTES + 8 * 2 * TILE_BYTES<FORM>;
    static constexpr int STAGING = STAGES * STAGE_BYTES;
    static constexpr int FULL = STAGING + WARPS * STAGING_BYTES;
    static constexpr int EMPTY = FULL + STAGES * 8;
    static constexpr int BYTES = EMPTY + STAGES * 8;
    static_assert(ON_SM<HIGH> * (BYTES + 1024) <= 228 * 1024, "more than a block may have");
    // With more stages than warps that copy, a gather arrives by itself.
    static constexpr bool BY_ITSELF = STAGES > COPIERS;
};

// Stages as those who multiply see them: use `i` of a stage has the i'th unit of a block.
template <typename M, int MODE>
struct Ring {
    uint32_t shared;
    static __device__ __forceinline__ uint32_t slot(uint32_t use) { return use % M::STAGES; }
    __device__ __forceinline__ uint32_t stage_of(uint32_t use) const { return shared + slot(use) * M::STAGE_BYTES; }
    __device__ __forceinline__ void wait_for(uint32_t use) const {
        barrier_wait(shared + M::FULL + slot(use) * 8, use / M::STAGES & 1);
        // Of a gather's copies, which the barrier has waited for.
        if (M::BY_ITSELF && MODE == GATE_UP) written_for_products();
    }
};

// How the output is stored: bf16 in pieces of 16 bytes, or by elements, where it is not aligned to those; or f32.
enum Store { PIECES, ELEMENTS, WIDE };

struct Task {
    Packed w;
    int row_tiles;   // of an expert; GATE_UP: of its gates, and as many of up
    int group_step;  // from the scales of a group (fp4, GGUF: a unit) to those of the next; 0: there is one
    // Tiles of tokens: those of the sorted list, or, where that is null, of n rows in their order.
    const int2 *tiles;
    const int *num_tiles, *sorted;
    int n, top_k;
    const void *x;   // rows of w.k elements
    const float *token_scales;  // of tokens in e4m3, by their rows; else null
    // Features first_feature .. first_feature + cols - 1 go to rows of `stride` elements. ROWS: the row of an
    // assignment is its number, that of n rows in their order counts from first_row.
    void *out;
    int store, stride, first_feature, cols, first_row;
    int feature_tiles;
    int high;  // no tile has more tokens
};
// What is done in one launch, the items of the first first. ROWS: `tokens` are their rows. Only kernels of few tokens take two:
// of one a thread knows where everything is, which is up to 2 us and 2 % faster.
template <int COUNT>
struct Tasks {
    Task of[COUNT];
    CUtensorMap tokens[COUNT];
};
template <int HIGH> constexpr int MOST_TASKS = HIGH == FEW_TOKENS ? 2 : 1;

// One tile of the output.
struct Item {
    int expert, feature;  // the first feature of this block
    int first, rows;      // of all rows, or of the sorted list
};

__device__ __forceinline__ int num_items(const Task &t) {
    return (t.tiles != nullptr ? *t.num_tiles : ceil_div(t.n, t.high)) * t.feature_tiles;
}
// The items of the tasks: so many of the first, and of all.
template <int COUNT>
struct Items {
    int of_first, all;
    __device__ __forceinline__ Items(const Tasks<COUNT> &tasks) {
        all = of_first = num_items(tasks.of[0]);
        if (COUNT > 1 && tasks.of[COUNT - 1].cols > 0) all += num_items(tasks.of[COUNT - 1]);
    }
    __device__ __forceinline__ int task_of(int index) const { return COUNT > 1 && index >= of_first; }
    __device__ __forceinline__ int in_task(int index) const { return task_of(index) ? index - of_first : index; }
};
// An item's entry in the sorted list, which a warp asks for long before it needs it.
template <int COUNT>
__device__ __forceinline__ int2 entry_at(const Tasks<COUNT> &tasks, const Items<COUNT> &items, int index) {
    if (index >= items.all) return make_int2(0, 0);
    const Task &t = tasks.of[items.task_of(index)];
    return t.tiles != nullptr ? t.tiles[items.in_task(index) / t.feature_tiles] : make_int2(0, 0);
}
// Tiles of an expert follow each other; of rows in their order a band takes turns at each feature tile: what blocks
// read at a time stays in L2.
template <int MODE>
__device__ __forceinline__ Item item_at(const Task &t, int index, int2 entry, int rank) {
    Item item;
    int feature_tile;
    if (t.tiles != nullptr) {
        feature_tile = index % t.feature_tiles;
        item.expert = tile_expert(entry), item.first = tile_first(entry), item.rows = tile_rows(entry);
    } else {
        const int band = index / (BAND * t.feature_tiles), rest = index - band * BAND * t.feature_tiles;
        const int height = max(min(BAND, ceil_div(t.n, t.high) - band * BAND), 1);
        feature_tile = rest / height;
        item.expert = 0, item.first = (band * BAND + rest % height) * t.high;
        item.rows = min(t.high, t.n - item.first);
    }
    item.feature = t.first_feature + feature_tile * FEATURES<MODE> + (MODE == ROWS ? rank * 128 : 0);
    return item;
}
// The products' columns: whole boxes.
__device__ __forceinline__ int columns_of(const Item &item) { return ceil_div(item.rows, BOX_ROWS) * BOX_ROWS; }

// Row tile `i` of the 8 of a tile of the output, of all experts'; -1 past the last feature.
template <int MODE>
__device__ __forceinline__ int row_tile_at(const Task &t, const Item &item, int i) {
    const int own = item.feature / 16;
    if (MODE == GATE_UP) return item.expert * 2 * t.row_tiles + i / 4 * t.row_tiles + own + i % 4;
    return own + i < (t.first_feature + t.cols) / 16 ? item.expert * t.row_tiles + own + i : -1;
}

// Has L2 fetch what lies there.
__device__ __forceinline__ void ask_l2_for(const void *from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from)) : "memory");
}

// Fills stages with every fourth unit of the tiles of this block. A stage is free when all blocks that get what is
// copied to it are done with it.
template <int MODE, int FORM, int STEPS, typename T, int HIGH>
__device__ __forceinline__ void produce(const Tasks<MOST_TASKS<HIGH>> &tasks, const Items<MOST_TASKS<HIGH>> &items,
                                        uint32_t shared, int rank, int warp, int lane) {
    using M = Memory<FORM, T, HIGH>;
    constexpr bool BYTES = sizeof(T) == 1;
    constexpr int PIECE = 16 / sizeof(T);  // elements of 16 bytes
    // Of a gather: rows lane / 8 + 4 i of the tile, bytes 16 (lane % 8) ..: one swizzle for even i, one for odd.
    const int c = lane % 8, r = lane / 8;
    const uint32_t even = r * 128 + ((c ^ r) << 4), odd = r * 128 + ((c ^ (r + 4)) << 4);
    const int stride = gridDim.x / BLOCKS<MODE>;
    int index = blockIdx.x / BLOCKS<MODE>;
    int2 entry = entry_at(tasks, items, index);
    uint32_t done = 0;  // units of the tiles before
    for (; index < items.all; index += stride) {
        const int number = items.task_of(index);
        const Task &t = tasks.of[number];
        const int units = t.w.k / UNIT;
        const size_t x = __cvta_generic_to_global(t.x);
        const Item item = item_at<MODE>(t, items.in_task(index), entry, rank);
        entry = entry_at(tasks, items, index + stride);
        const int own_tile = lane < 8 ? row_tile_at<MODE>(t, item, lane) : -1;
        const int code_bytes = __popc(__ballot_sync(ALL_LANES, own_tile >= 0)) * 2 * TILE_BYTES<FORM>;
        const uint8_t *codes = t.w.codes + int64_t(own_tile) * t.w.row_tile_bytes;
        const int columns = columns_of(item);
        uint32_t at[HIGH / 32];  // of the rows lane + 32 q, in units of 16 bytes; of e4m3 rows
        if (MODE == GATE_UP) {
#pragma unroll
            for (int q = 0; q < HIGH / 32; q++) {
                const int row = min(32 * q + lane, item.rows - 1) + item.first;
                const int token = t.sorted != nullptr ? t.sorted[row] / t.top_k : row;
                at[q] = BYTES ? uint32_t(token) : uint32_t(token) * uint32_t(t.w.k / PIECE);
            }
        }
        for (int unit = (warp - done) % COPIERS; unit < units; unit += COPIERS) {
            const uint32_t use = done + unit, slot = M::BY_ITSELF ? use % M::STAGES : warp;
            const uint32_t stage = shared + slot * M::STAGE_BYTES, full = shared + M::FULL + slot * 8;
            barrier_wait(shared + M::EMPTY + slot * 8, ((use / M::STAGES) & 1) ^ 1);
            __syncwarp();  // before the first lane sets off what would end a second phase, of the parity waited for
            if (lane == 0) {
                constexpr int ROW_BYTES = UNIT * int(sizeof(T));
                barrier_arrive_and_expect(full, code_bytes + (MODE == ROWS ? columns * ROW_BYTES : 0));
                if (MODE == ROWS) {
#pragma unroll 1
                    for (int row = rank * BOX_ROWS; row < columns; row += 2 * BOX_ROWS) {
                        const uint32_t to = stage + row * 128;
                        tensor_copy_to_both(to, &tasks.tokens[number], unit * UNIT, item.first + row, 0, 0, full);
                        if (!BYTES)
                            tensor_copy_to_both(to + M::HALF_BYTES, &tasks.tokens[number], unit * UNIT + 64, item.first + row, 0, 0,
                                                full);
                    }
                }
            }
            __syncwarp();
            if (own_tile >= 0) {
                bulk_copy(stage + M::TOKEN_BYTES + lane * 2 * TILE_BYTES<FORM>, codes + unit * 2 * TILE_BYTES<FORM>,
                          2 * TILE_BYTES<FORM>, full);
                // Those who multiply load scales a unit ahead, which is enough for L2 and not for memory.
                const int64_t side = int64_t(own_tile) * t.w.groups * t.w.each + unit * (8 / STEPS) * t.group_step;
                ask_l2_for(static_cast<const uint8_t *>(t.w.scales) + side * SIDE_BYTES<FORM>);
                if (FORM == INT4_TILES && t.w.zeros != nullptr) ask_l2_for(t.w.zeros + side);
                if (FORM == K4_TILES || FORM == K6_TILES) ask_l2_for(t.w.zeros + side * 2);
            }
            if (MODE == ROWS) continue;
            const uint32_t col = unit * (UNIT / PIECE) + c;
#pragma unroll
            for (int q = 0; q < HIGH / 32; q++) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    if (32 * q + 4 * i >= item.rows) break;
                    const uint32_t row = __shfl_sync(ALL_LANES, at[q], 4 * i + r);
                    const uint32_t to = stage + (i % 2 != 0 ? odd : even) + (32 * q + 4 * i) * 128;
                    if (BYTES) {
                        copy16(to, x + (uint64_t(row) * (t.w.k / PIECE) + col) * 16, true);
                    } else {
                        copy16(to, x + uint64_t(row + col) * 16, true);
                        copy16(to + M::HALF_BYTES, x + uint64_t(row + col + 8) * 16, true);
                    }
                }
            }
            if (M::BY_ITSELF) {
                arrive_with_copies(full);
            } else {
                copies_to_products();
                __syncwarp();
                if (lane == 0) barrier_arrive(full);
            }
        }
        done += units;
    }
}

}  // namespace packed_wgmma
