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

// As many blocks as multiprocessors, each cluster taking every so-many'th tile: a warpgroup copies, two multiply.
template <int MODE, int FORM, int STEPS, typename T>
__global__ void Q35_CLUSTER(BLOCKS<MODE>) __launch_bounds__(THREADS, 1)
    packed_wgmma_kernel(const __grid_constant__ Task t, const __grid_constant__ CUtensorMap tokens) {
    if constexpr (HERE) {
        extern __shared__ __align__(1024) uint8_t smem[];
        const uint32_t shared = shared_address(smem);
        // The same for a whole warp, and known to be.
        const int warp = __shfl_sync(ALL_LANES, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
        // Arrivals at a full stage: for the copy engine, and of a gather the warp's, or its threads'.
        constexpr int FILLERS = MODE == ROWS ? 1 : sizeof(T) == 2 ? 2 : 33;
        const int rank = MODE == ROWS ? rank_in_pair() : 0;
        if (threadIdx.x == 0) {
            for (int i = 0; i < STAGES<T>; i++) {
                barrier_init(shared + FULL<FORM, T> + i * 8, FILLERS);
                barrier_init(shared + EMPTY<FORM, T> + i * 8, BLOCKS<MODE> * WARPS);  // that multiply
            }
            barriers_are_there();
            if (MODE == ROWS) prefetch_map(&tokens);
        }
        pair_barrier();
        wait_for_inputs();
        let_next_start();
        const int total = num_items(t);
        if (warp < 4) {
            give_registers<PRODUCER_REGISTERS>();
            produce<MODE, FORM, STEPS, T>(t, tokens, total, shared, rank, warp, lane);
        } else {
            take_registers<CONSUMER_REGISTERS>();
            const uint32_t released = address_of(shared + EMPTY<FORM, T>, lane % BLOCKS<MODE>);
            const int stride = gridDim.x / BLOCKS<MODE>, units = t.w.k / UNIT;
            int index = blockIdx.x / BLOCKS<MODE>;
            int2 entry = entry_at(t, total, index);
            uint32_t done = 0;
            for (; index < total; index += stride, done += units) {
                const Item item = item_at<MODE>(t, index, entry, rank);
                entry = entry_at(t, total, index + stride);
                int places[TOKENS / 32];
#pragma unroll
                for (int q = 0; q < TOKENS / 32; q++) {
                    const int row = item.first + min(32 * q + lane, item.rows - 1);
                    places[q] = MODE == ROWS && t.sorted != nullptr ? t.sorted[row] : t.first_row + row;
                }
                const int columns = columns_of(item);
                auto run = [&](auto n) {
                    constexpr int N = decltype(n)::value;
                    if constexpr (sizeof(T) == 1) {
                        consume_bytes<MODE, FORM, N>(t, item, shared, released, done, places, warp - 4, lane);
                    } else {
                        consume<MODE, FORM, STEPS, N>(t, item, shared, released, done, places, warp - 4, lane);
                    }
                };
                if constexpr (IS_GGUF<FORM>) {  // in two widths, for the size of the code
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

// `tiles`: of tokens, at most so many.
template <int MODE, int FORM, int STEPS, typename T = bf16>
cudaError_t launch_form(cudaStream_t stream, const Task &t, const CUtensorMap &tokens, int64_t tiles) {
    const int64_t items = tiles * t.feature_tiles, clusters = multiprocessors() / BLOCKS<MODE>;
    if (items > 0x3fffffff) return cudaErrorInvalidValue;
    const auto kernel = packed_wgmma_kernel<MODE, FORM, STEPS, T>;
    const cudaError_t code =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES<FORM, T>);
    if (code != cudaSuccess) return code;
    const unsigned blocks = static_cast<unsigned>(BLOCKS<MODE> * (items < clusters ? items : clusters));
    return launch(kernel, dim3(blocks), dim3(THREADS), SHARED_BYTES<FORM, T>, stream, t, tokens);
}

template <int MODE>
cudaError_t launch_task(cudaStream_t stream, Task t, const CUtensorMap &tokens, int64_t tiles) {
    t.feature_tiles = ceil_div(t.cols, FEATURES<MODE>);
    if (t.token_scales != nullptr) {
        return t.w.form == FP8_TILES ? launch_form<MODE, FP8_TILES, 8, e4m3>(stream, t, tokens, tiles)
                                     : launch_form<MODE, INT4_TILES, 8, e4m3>(stream, t, tokens, tiles);
    }
    if (t.w.form == FP8_TILES) return launch_form<MODE, FP8_TILES, 8>(stream, t, tokens, tiles);
    if (t.w.form == FP4_TILES) return launch_form<MODE, FP4_TILES, 8>(stream, t, tokens, tiles);
    if (t.w.form == K4_TILES) return launch_form<MODE, K4_TILES, 8>(stream, t, tokens, tiles);
    if (t.w.form == K6_TILES) return launch_form<MODE, K6_TILES, 8>(stream, t, tokens, tiles);
    if (t.w.form == INT8_TILES) return launch_form<MODE, INT8_TILES, 8>(stream, t, tokens, tiles);
    if (t.w.halves) return launch_form<MODE, INT4_TILES, 2>(stream, t, tokens, tiles);
    return t.w.shift == 0 ? launch_form<MODE, INT4_TILES, 4>(stream, t, tokens, tiles)
                          : launch_form<MODE, INT4_TILES, 8>(stream, t, tokens, tiles);
}

// `rows` of tokens [rows, k], bf16 or, where the task has scales of them, e4m3.
cudaError_t launch_rows(cudaStream_t stream, const Task &t, const void *tokens, int rows, int64_t tiles);

}  // namespace packed_wgmma
