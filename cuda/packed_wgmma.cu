// More than 16 rows times packed weights on Hopper: linears.
#include <atomic>

#include "packed_wgmma_launch.cuh"

using namespace packed_wgmma;

namespace {

struct Device {
    std::atomic<bool> asked;  // the number is there
    int multiprocessors;  // 0 where the kernels do not serve
};

}  // namespace

int packed_wgmma::multiprocessors() {
    static Device known[64];
    int device = 0, major = 0, minor = 0, count = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return 0;
    Device &d = known[device];
    if (!d.asked.load(std::memory_order_acquire)) {
        if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
            cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
            cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
            return 0;
        if (major == 9 && minor == 0) {
            // Where the build has no code for sm_90a the kernel is empty, which shows in its registers.
            cudaFuncAttributes attributes;
            const auto kernel = packed_wgmma_kernel<ROWS, INT4_TILES, 8, bf16, TOKENS>;
            if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return 0;
            if (attributes.numRegs > 64 && count > 1 && map_encoder() != nullptr) d.multiprocessors = count;
        }
        d.asked.store(true, std::memory_order_release);
    }
    return d.multiprocessors;
}

bool packed_wgmma::encode_rows(CUtensorMap *map, const Task &t, int rows) {
    return t.token_scales != nullptr ? encode_bytes_map(map, t.x, rows, t.w.k, BOX_ROWS)
                                     : encode_map(map, static_cast<const bf16 *>(t.x), 1, 1, rows, t.w.k, BOX_ROWS);
}

cudaError_t packed_wgmma_linear(cudaStream_t stream, int n, const Packed &w, int rows, const bf16 *x, void *out,
                                bool wide, int stride, void *fp8_tokens) {
    if (!takes(w) || !aligned(x)) return cudaErrorNotSupported;
    Tasks<2> tasks = {};
    Task &t = tasks.of[0];
    t = task_of(w);
    t.row_tiles = rows / 16, t.n = n, t.x = x;
    t.out = out, t.cols = rows, t.stride = stride, t.high = rows_high(n);
    t.store = wide ? WIDE : aligned(out) && stride % 8 == 0 ? PIECES : ELEMENTS;
    if (fp8_tokens != nullptr && takes_fp8_tokens(w)) {
        const Fp8Tokens of = fp8_tokens_at(fp8_tokens, n, w.k);
        const cudaError_t code = launch_fp8_tokens(stream, n, w.k, x, of);
        if (code != cudaSuccess) return code;
        t.x = of.codes, t.token_scales = of.scales;
    }
    if (!encode_rows(&tasks.tokens[0], t, n)) return cudaErrorInvalidValue;
    return launch_tasks<ROWS>(stream, tasks, {ceil_div(n, t.high), 0});
}

extern "C" int64_t q35_fp8_token_bytes(int n, int k) { return fp8_token_bytes(n, k); }
extern "C" int64_t q35_has_fp8_tokens(int k) { return k % UNIT == 0 && multiprocessors() > 0; }
