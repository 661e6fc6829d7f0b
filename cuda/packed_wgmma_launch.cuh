// How the kernel of packed weights on Hopper is launched.
#pragma once
#include "packed_wgmma_tiles.cuh"

namespace packed_wgmma {

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

// `tiles`: of tokens, at most so many.
template <int MODE, int FORM, int STEPS>
cudaError_t launch_form(cudaStream_t stream, const Task &t, const CUtensorMap &tokens, int64_t tiles) {
    const int64_t items = tiles * t.feature_tiles, clusters = multiprocessors() / BLOCKS<MODE>;
    if (items > 0x3fffffff) return cudaErrorInvalidValue;
    const auto kernel = packed_wgmma_kernel<MODE, FORM, STEPS>;
    const cudaError_t code =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES<FORM>);
    if (code != cudaSuccess) return code;
    const unsigned blocks = static_cast<unsigned>(BLOCKS<MODE> * (items < clusters ? items : clusters));
    return launch(kernel, dim3(blocks), dim3(THREADS), SHARED_BYTES<FORM>, stream, t, tokens);
}

template <int MODE>
cudaError_t launch_task(cudaStream_t stream, Task t, const CUtensorMap &tokens, int64_t tiles) {
    t.feature_tiles = ceil_div(t.cols, FEATURES<MODE>);
    if (t.w.form == FP8_TILES) return launch_form<MODE, FP8_TILES, 8>(stream, t, tokens, tiles);
    if (t.w.form == FP4_TILES) return launch_form<MODE, FP4_TILES, 8>(stream, t, tokens, tiles);
    if (t.w.form == K4_TILES) return launch_form<MODE, K4_TILES, 8>(stream, t, tokens, tiles);
    if (t.w.form == K6_TILES) return launch_form<MODE, K6_TILES, 8>(stream, t, tokens, tiles);
    if (t.w.form == INT8_TILES) return launch_form<MODE, INT8_TILES, 8>(stream, t, tokens, tiles);
    if (t.w.halves) return launch_form<MODE, INT4_TILES, 2>(stream, t, tokens, tiles);
    return t.w.shift == 0 ? launch_form<MODE, INT4_TILES, 4>(stream, t, tokens, tiles)
                          : launch_form<MODE, INT4_TILES, 8>(stream, t, tokens, tiles);
}

// `rows` of tokens, bf16 [rows, k].
cudaError_t launch_rows(cudaStream_t stream, const Task &t, const bf16 *tokens, int rows, int64_t tiles);

}  // namespace packed_wgmma
