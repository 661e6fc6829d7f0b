// The kernel of packed weights on Hopper, and how it is launched.
#pragma once
#include "packed_wgmma_bytes.cuh"

// Blocks of a cluster; other architectures compile the kernel without.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define Q35_CLUSTER(COUNT) __cluster_dims__(COUNT, 1, 1)
#else
#define Q35_CLUSTER(COUNT)
#endif

namespace packed_wgmma {

// As many blocks as multiprocessors (or twice), each cluster taking every so-many'th tile: a warpgroup copies, two multiply.
template <int MODE, int FORM, int STEPS, typename T, int HIGH>
__global__ void Q35_CLUSTER(BLOCKS<MODE>) __launch_bounds__(THREADS, ON_SM<HIGH>)
    packed_wgmma_kernel(const __grid_constant__ Tasks<MOST_TASKS<HIGH>> tasks) {
    if constexpr (HERE) {
        using M = Memory<FORM, T, HIGH>;
        extern __shared__ __align__(1024) uint8_t smem[];
        const uint32_t shared = shared_address(smem);
        // The same for a whole warp, and known to be.
        const int warp = __shfl_sync(ALL_LANES, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
        // Arrivals at a full stage: for the copy engine, and of a gather the warp's, or its threads'.
        constexpr int FILLERS = MODE == ROWS ? 1 : M::BY_ITSELF ? 33 : 2;
        const int rank = MODE == ROWS ? rank_in_pair() : 0;
        if (threadIdx.x == 0) {
            for (int i = 0; i < M::STAGES; i++) {
                barrier_init(shared + M::FULL + i * 8, FILLERS);
                barrier_init(shared + M::EMPTY + i * 8, BLOCKS<MODE> * WARPS);  // that multiply
            }
            barriers_are_there();
            if (MODE == ROWS) prefetch_map(&tasks.tokens[0]);
        }
        pair_barrier();
        wait_for_inputs();
        let_next_start();
        const Items<MOST_TASKS<HIGH>> items(tasks);
        if (warp < 4) {
            give_registers<PRODUCER_REGISTERS<HIGH>>();
            produce<MODE, FORM, STEPS, T, HIGH>(tasks, items, shared, rank, warp, lane);
        } else {
            take_registers<CONSUMER_REGISTERS<HIGH>>();
            const uint32_t released = address_of(shared + M::EMPTY, lane % BLOCKS<MODE>);
            const int stride = gridDim.x / BLOCKS<MODE>;
            int index = blockIdx.x / BLOCKS<MODE>;
            int2 entry = entry_at(tasks, items, index);
            uint32_t done = 0;
            for (; index < items.all; index += stride) {
                const Task &t = tasks.of[items.task_of(index)];
                const Item item = item_at<MODE>(t, items.in_task(index), entry, rank);
                entry = entry_at(tasks, items, index + stride);
                int places[HIGH / 32];
#pragma unroll
                for (int q = 0; q < HIGH / 32; q++) {
                    const int row = item.first + min(32 * q + lane, item.rows - 1);
                    places[q] = MODE == ROWS && t.sorted != nullptr ? t.sorted[row] : t.first_row + row;
                }
                const int columns = columns_of(item);
                auto run = [&](auto n) {
                    constexpr int N = decltype(n)::value;
                    if constexpr (sizeof(T) == 1) {
                        consume_bytes<MODE, FORM, M, N>(t, item, shared, released, done, places, warp - 4, lane);
                    } else {
                        consume<MODE, FORM, STEPS, M, N>(t, item, shared, released, done, places, warp - 4, lane);
                    }
                };
                if constexpr (HIGH == FEW_TOKENS) {
                    run(std::integral_constant<int, FEW_TOKENS>());
                } else if constexpr (IS_GGUF<FORM>) {  // in two widths, for the size of the code
                    columns > 64 ? run(std::integral_constant<int, 128>()) : run(std::integral_constant<int, 64>());
                } else if (columns > 96) {
                    run(std::integral_constant<int, 128>());
                } else if (columns > 64) {
                    run(std::integral_constant<int, 96>());
                } else if (columns > 32) {
                    run(std::integral_constant<int, 64>());
                } else {
                    run(std::integral_constant<int, 32>());
                }
                done += t.w.k / UNIT;
            }
        }
        pair_barrier();  // until now another block may have had copies and arrivals on their way to this one
    }
}

// Of the device that is current; 0 where the kernel does not serve it.
int multiprocessors();

inline bool takes(const Packed &w) {
    return w.codes != nullptr && w.form != BF16_ROWS && w.k % UNIT == 0 && multiprocessors() > 0;
}

inline Task task_of(const Packed &w) {
    Task t = {};
    const bool by_unit = w.form == FP4_TILES || w.form >= K4_TILES;
    t.w = w, t.group_step = by_unit ? UNIT / TILE_K * w.each : w.groups == 1 ? 0 : w.each;
    return t;
}

// Whether it takes such weights times tokens in e4m3: those with a scale for 128 inputs, or for all of a row, and without
// zero points.
inline bool takes_fp8_tokens(const Packed &w) {
    if (!takes(w)) return false;
    return w.form == FP8_TILES || (w.form == INT4_TILES && w.zeros == nullptr && !w.halves && w.shift != 0);
}

static_assert(FEW_TOKENS == LEAST_TILE, "the tiles that lists have room for");

// The height of tiles of so many rows in their order.
inline int rows_high(int rows) { return rows <= FEW_TOKENS ? FEW_TOKENS : TOKENS; }

template <int MODE, int FORM, int STEPS, typename T = bf16, int HIGH = TOKENS>
cudaError_t launch_form(cudaStream_t stream, const Tasks<2> &tasks, int64_t items) {
    const int64_t clusters = ON_SM<HIGH> * multiprocessors() / BLOCKS<MODE>;
    const auto kernel = packed_wgmma_kernel<MODE, FORM, STEPS, T, HIGH>;
    constexpr int bytes = Memory<FORM, T, HIGH>::BYTES;
    const cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (code != cudaSuccess) return code;
    const unsigned blocks = static_cast<unsigned>(BLOCKS<MODE> * (items < clusters ? items : clusters));
    Tasks<MOST_TASKS<HIGH>> taken;
    for (int i = 0; i < MOST_TASKS<HIGH>; i++) taken.of[i] = tasks.of[i], taken.tokens[i] = tasks.tokens[i];
    return launch(kernel, dim3(blocks), dim3(THREADS), bytes, stream, taken);
}

// Forms that have kernels of their own for few tokens.
inline bool has_few(const Packed &w) {
    return w.form == FP8_TILES || w.form == FP4_TILES || (w.form == INT4_TILES && !w.halves && w.shift != 0);
}
template <int MODE, int FORM>
cudaError_t launch_few(cudaStream_t stream, const Tasks<2> &tasks, int64_t items) {
    return tasks.of[0].high == FEW_TOKENS ? launch_form<MODE, FORM, 8, bf16, FEW_TOKENS>(stream, tasks, items)
                                          : launch_form<MODE, FORM, 8>(stream, tasks, items);
}

// Whether one launch does both.
inline bool alike(const Task &a, const Task &b) {
    const auto is_few = [](const Task &t) {
        return t.high == FEW_TOKENS && t.token_scales == nullptr && has_few(t.w);
    };
    return is_few(a) && is_few(b) && a.w.form == b.w.form;
}

// One task, or two that are alike. `tiles`: of tokens of each, at most so many. ROWS: with their maps.
template <int MODE>
cudaError_t launch_tasks(cudaStream_t stream, Tasks<2> &tasks, const int64_t (&tiles)[2]) {
    int64_t items = 0;
    for (int i = 0; i < 2; i++) {
        Task &t = tasks.of[i];
        t.feature_tiles = ceil_div(t.cols, FEATURES<MODE>);
        items += tiles[i] * t.feature_tiles;
    }
    if (items > 0x3fffffff) return cudaErrorInvalidValue;
    const Packed &w = tasks.of[0].w;
    if (tasks.of[0].token_scales != nullptr) {
        return w.form == FP8_TILES ? launch_form<MODE, FP8_TILES, 8, e4m3>(stream, tasks, items)
                                   : launch_form<MODE, INT4_TILES, 8, e4m3>(stream, tasks, items);
    }
    if (w.form == FP8_TILES) return launch_few<MODE, FP8_TILES>(stream, tasks, items);
    if (w.form == FP4_TILES) return launch_few<MODE, FP4_TILES>(stream, tasks, items);
    if (w.form == K4_TILES) return launch_form<MODE, K4_TILES, 8>(stream, tasks, items);
    if (w.form == K6_TILES) return launch_form<MODE, K6_TILES, 8>(stream, tasks, items);
    if (w.form == INT8_TILES) return launch_form<MODE, INT8_TILES, 8>(stream, tasks, items);
    if (w.halves) return launch_form<MODE, INT4_TILES, 2>(stream, tasks, items);
    return w.shift == 0 ? launch_form<MODE, INT4_TILES, 4>(stream, tasks, items)
                        : launch_few<MODE, INT4_TILES>(stream, tasks, items);
}

// The map of rows [rows, k], bf16 or, where the task has scales of them, e4m3.
bool encode_rows(CUtensorMap *map, const Task &t, int rows);

}  // namespace packed_wgmma
