// More than 16 rows times packed weights on Hopper: linears.
#include "packed_wgmma_launch.cuh"

using namespace packed_wgmma;

namespace {

struct Device {
    bool asked;
    int multiprocessors;  // 0 where the kernels do not serve
};

}  // namespace

int packed_wgmma::multiprocessors() {
    static Device known[64];
    int device = 0, major = 0, minor = 0, count = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return 0;
    Device &d = known[device];
    if (!d.asked) {
        if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
            cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
            cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
            return 0;
        if (major == 9 && minor == 0) {
            // Where the build has no code for sm_90a the kernel is empty, which shows in its registers.
            cudaFuncAttributes attributes;
            if (cudaFuncGetAttributes(&attributes, packed_wgmma_kernel<ROWS, INT4_TILES, 8>) != cudaSuccess) return 0;
            if (attributes.numRegs > 64 && count > 1 && map_encoder() != nullptr) d.multiprocessors = count;
        }
        d.asked = true;
    }
    return d.multiprocessors;
}

cudaError_t packed_wgmma::launch_rows(cudaStream_t stream, const Task &t, const bf16 *tokens, int rows,
                                      int64_t tiles) {
    CUtensorMap map;
    if (!encode_map(&map, tokens, 1, 1, rows, t.w.k, BOX_ROWS)) return cudaErrorInvalidValue;
    return launch_task<ROWS>(stream, t, map, tiles);
}

cudaError_t packed_wgmma_linear(cudaStream_t stream, int n, const Packed &w, int rows, const bf16 *x, void *out,
                                bool wide, int stride) {
    if (!takes(w) || !aligned(x)) return cudaErrorNotSupported;
    Task t = task_of(w);
    t.row_tiles = rows / 16, t.n = n;
    t.out = out, t.cols = rows, t.stride = stride;
    t.store = wide ? WIDE : aligned(out) && stride % 8 == 0 ? PIECES : ELEMENTS;
    return launch_rows(stream, t, x, n, ceil_div(n, TOKENS));
}
