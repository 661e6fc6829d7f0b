// Products of up to 16 rows with packed weights, at the speed of the memory. Own code.
#include "packed.cuh"

namespace {

constexpr int FEW = 16;
constexpr int WARPS = 8;
constexpr int X_PITCH = UNIT_K + 8;  // of a row's elements of a unit: a matrix load hits all banks
constexpr int SUM_PITCH = 20;        // of the 16 sums of a row: a warp's stores hit all banks
constexpr int L2_AHEAD = 32 << 10;   // bytes of its weights that a block asks into L2 beside those in the ring

template <bool FP8>
constexpr int RING = FP8 ? 3 : 5;  // units of a warp

// Rows of bf16 behind those of the packed matrix: a warp has one; the first blocks of the grid have them.
struct Tail {
    const bf16 *w;
    int rows, blocks;
};

// The row's products with n rows of x. Each is a sum over k by lanes, which are then added: one order whatever n is.
__device__ __forceinline__ void tail_row(int n, const q35_packed &w, const Tail &tail, const bf16 *x, void *out, int wide,
                                         int stride) {
    constexpr int AHEAD = 4, TOKENS = 4;  // pieces of 16 bytes a lane under way; rows of x at a time
    const int lane = threadIdx.x % 32, row = blockIdx.x * WARPS + threadIdx.x / 32, k = w.k;
    const bf16 *const from = tail.w + int64_t(min(row, tail.rows - 1)) * k;
    uint4 pieces[AHEAD];
    auto load = [&](int k0) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int at = k0 + 256 * i + 8 * lane;
            pieces[i] = at < k ? __ldg(reinterpret_cast<const uint4 *>(from + at)) : make_uint4(0, 0, 0, 0);
        }
    };
    load(0);
    let_next_start();
    wait_for_inputs();
#pragma unroll 1
    for (int t0 = 0; t0 < n; t0 += TOKENS) {
        if (t0 > 0) load(0);
        float sums[TOKENS] = {};
#pragma unroll 1
        for (int k0 = 0; k0 < k; k0 += 256 * AHEAD) {
            if (k0 > 0) load(k0);
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const int at = k0 + 256 * i + 8 * lane;
                float a[8];
                unpack8(pieces[i], a);
#pragma unroll
                for (int t = 0; t < TOKENS; t++) {
                    if (at >= k || t0 + t >= n) continue;
                    float b[8];
                    unpack8(__ldcg(reinterpret_cast<const uint4 *>(x + int64_t(t0 + t) * k + at)), b);
#pragma unroll
                    for (int e = 0; e < 8; e++) sums[t] = fmaf(a[e], b[e], sums[t]);
                }
            }
        }
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const float sum = lane_sum<32>(sums[t]);
            if (lane > 0 || t0 + t >= n || row >= tail.rows) continue;
            const int64_t to = int64_t(t0 + t) * stride + w.rows + row;
            if (wide) {
                static_cast<float *>(out)[to] = sum;
            } else {
                static_cast<bf16 *>(out)[to] = __float2bfloat16_rn(sum);
            }
        }
    }
}

// Two blocks a multiprocessor where three fit, else one; block b of those of w has the row tiles b, b + step, ...
// Its warps split k: warp i takes the units i, i + WARPS, ... in this order, and the sums of the warps are added in their
// order, whatever n is. Each warp has a ring of units, filled before the inputs are there, and its own part of x in
// shared memory: `slab` units at a time. Where one slab is not all of k, TILES row tiles share it. BOTH: x has rows
// past the first 8.
template <bool FP8, int STEPS, bool BOTH, int TILES>
__global__ void __launch_bounds__(32 * WARPS, BOTH || TILES > 1 ? 2 : STEPS == 2 ? 3 : 4)
    packed_kernel(int n, q35_packed w, Tail tail, int slab, const bf16 *x, void *out, int wide, int stride) {
    if (int(blockIdx.x) < tail.blocks) return tail_row(n, w, tail, x, out, wide, stride);
    using S = Stage<FP8, STEPS>;
    constexpr int N = BOTH ? 2 : 1, DEPTH = RING<FP8>;
    extern __shared__ __align__(16) unsigned char memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int num_tiles = w.rows / PACKED_ROWS, num_units = ceil_div(w.k, UNIT_K);
    const int block = int(blockIdx.x) - tail.blocks, step = int(gridDim.x) - tail.blocks;
    const unsigned char *ring = memory + warp * DEPTH * S::BYTES;
    bf16 *all_x = reinterpret_cast<bf16 *>(memory + WARPS * DEPTH * S::BYTES);
    bf16 *x_kept = all_x + warp * slab * n * X_PITCH;
    float *sums = reinterpret_cast<float *>(all_x + WARPS * slab * n * X_PITCH);  // [BOTH ? 1 : 2][WARPS][n][16]
    const uint32_t ring_address = shared_address(ring);
    const uint64_t policy = first_to_leave();
    const Source<FP8, STEPS> source(w, lane);

    // What is loaded next: tile `next_first + next_t * step`.
    int next_first = warp < num_units ? block : num_tiles, next_unit = warp, next_t = 0;
    auto load = [&](int slot) {
        if (next_first < num_tiles) {
            source.copy(ring_address + slot * S::BYTES, next_first + next_t * step, next_unit, lane, policy);
            if (TILES == 1 || ++next_t == TILES || next_first + next_t * step >= num_tiles) {
                next_t = 0;
                next_unit += WARPS;
                if (next_unit >= num_units) {
                    next_unit = warp;
                    next_first += TILES * step;
                }
            }
        }
        copy_commit();
    };
#pragma unroll
    for (int i = 0; i < DEPTH; i++) load(i);
    if (lane == 0) {
        const int share = w.k / 64 * (S::TILE / WARPS);  // of a row tile's bytes, a warp's
        const int in_ring = DEPTH / ceil_div(num_units, WARPS), ahead = ceil_div(L2_AHEAD, WARPS * share);
        for (int i = in_ring; i < in_ring + ahead; i++) {
            const int tile = block + i * step;
            if (tile >= num_tiles) break;
            ask_for(static_cast<const unsigned char *>(w.codes) + (int64_t(tile) * WARPS + warp) * share, share);
        }
    }
    const unsigned inverse = 0xffffffffu / n + 1;  // item / n for n > 1 and fewer than 2^28 items
    let_next_start();
    wait_for_inputs();

    // A warp's units of x, from `unit` on, zeros past the end of k.
    auto keep_x = [&](int unit) {
        constexpr int AT_ONCE = BOTH ? 8 : 4, PIECES = UNIT_K / 8;
        const int count = min(slab, ceil_div(num_units - unit, WARPS)) * n * PIECES;
        __syncwarp();  // nobody reads the slab before it
        for (int first = lane; first < count; first += 32 * AT_ONCE) {
            uint4 words[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int item = first + 32 * i, line = item / PIECES, c = n == 1 ? line : __umulhi(line, inverse);
                const int row = line - c * n, k = (unit + c * WARPS) * UNIT_K + item % PIECES * 8;
                words[i] = make_uint4(0, 0, 0, 0);
                if (item < count && k < w.k) {
                    words[i] = __ldcg(reinterpret_cast<const uint4 *>(x + (int64_t(row) * w.k + k)));
                }
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int item = first + 32 * i;
                if (item >= count) break;
                *reinterpret_cast<uint4 *>(x_kept + item / PIECES * X_PITCH + item % PIECES * 8) = words[i];
            }
        }
        __syncwarp();
    };
    // Of the fragments of x; rows past the last are the last one again, and are not written.
    uint32_t x_address[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        x_address[i] = shared_address(x_kept + min(8 * i + lane % 8, n - 1) * X_PITCH + lane / 8 * 8);
    }
    if (TILES == 1 && warp < num_units) keep_x(warp);

    int slot = 0, parity = 0;
#pragma unroll 1
    for (int first = block; first < num_tiles; first += TILES * step) {
        float acc[TILES][N][4] = {};
        int kept = 0;
#pragma unroll 1
        for (int unit = warp; unit < num_units; unit += WARPS, kept++) {
            if (TILES > 1 && kept % slab == 0) {
                keep_x(unit);
                kept = 0;
            }
            uint32_t at[N];
#pragma unroll
            for (int i = 0; i < N; i++) at[i] = x_address[i] + kept * n * X_PITCH * 2;
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                if (TILES > 1 && first + t * step >= num_tiles) break;
                copy_wait<DEPTH - 1>();
                __syncwarp();  // other lanes' scales are there too
                multiply_unit<FP8, STEPS, N>(ring + slot * S::BYTES, at, lane, w.kind, w.zeros != nullptr, acc[t]);
                __syncwarp();  // and read
                load(slot);
                slot = slot + 1 == DEPTH ? 0 : slot + 1;
            }
        }
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            const int tile = first + t * step;
            if (TILES > 1 && tile >= num_tiles) break;
            // Two halves in turn, or one, which is used again when all have read it.
            if (BOTH) __syncthreads();
            float *all = sums + parity * WARPS * n * SUM_PITCH;
#pragma unroll
            for (int i = 0; i < N; i++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int row = 8 * i + lane % 4 * 2 + e % 2;
                    if (row < n) all[(warp * n + row) * SUM_PITCH + lane / 4 + e / 2 * 8] = acc[t][i][e];
                }
            }
            __syncthreads();
            if (!BOTH) parity ^= 1;
            const int column = threadIdx.x % PACKED_ROWS, row = threadIdx.x / PACKED_ROWS;
            if (row >= n) continue;
            float total = 0.0f;
#pragma unroll
            for (int i = 0; i < WARPS; i++) total += all[(i * n + row) * SUM_PITCH + column];
            const int64_t to = int64_t(row) * stride + tile * PACKED_ROWS + column;
            if (wide) {
                static_cast<float *>(out)[to] = total;
            } else {
                static_cast<bf16 *>(out)[to] = __float2bfloat16_rn(total);
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------------- launchers

struct Card {
    int count, shared;  // multiprocessors, and the most shared memory of a block
};

// Zeros where there is no device.
Card this_card() {
    static Card known[64];
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return {};
    if (known[device].count == 0) {
        Card card = {};
        if (cudaDeviceGetAttribute(&card.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess ||
            cudaDeviceGetAttribute(&card.count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
            return {};
        }
        known[device] = card;
    }
    return known[device];
}

// What is chosen here changes the speed, and no sum.
template <bool FP8, int STEPS>
cudaError_t few_rows(cudaStream_t stream, int n, const q35_packed &w, const bf16 *tail, int tail_rows, const bf16 *x,
                     void *out, int wide, int stride) {
    const Card card = this_card();
    if (card.count == 0) return cudaErrorInvalidDevice;
    const int ring = WARPS * RING<FP8> * Stage<FP8, STEPS>::BYTES;
    const int fixed = ring + (n > 8 ? 1 : 2) * WARPS * n * SUM_PITCH * int(sizeof(float));
    const int unit_bytes = WARPS * n * X_PITCH * int(sizeof(bf16));  // of x, a unit of every warp
    const int units = ceil_div(ceil_div(w.k, UNIT_K), WARPS), room = (card.shared - fixed) / unit_bytes;
    const int slab = room < units ? room : units;
    if (slab < 1) return cudaErrorInvalidValue;
    // The driver keeps 1 KB of each block. What else fits is for the next kernel's blocks, which load meanwhile.
    const int shared = fixed + slab * unit_bytes, most = (card.shared + 1024) / (shared + 1024) < 3 ? 1 : 2;
    const int tiles = w.rows / PACKED_ROWS, blocks = ceil_div(tiles, ceil_div(tiles, most * card.count));
    const auto run = [&](auto kernel) {
        cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, card.shared);
        if (status != cudaSuccess) return status;
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                      cudaSharedmemCarveoutMaxShared);
        if (status != cudaSuccess) return status;
        const Tail rows = {tail, tail_rows, ceil_div(tail_rows, WARPS)};
        return launch(kernel, rows.blocks + blocks, 32 * WARPS, size_t(shared), stream, n, w, rows, slab, x, out, wide,
                      stride);
    };
    if (slab < units) {
        return n <= 8 ? run(packed_kernel<FP8, STEPS, false, 2>) : run(packed_kernel<FP8, STEPS, true, 2>);
    }
    return n <= 8 ? run(packed_kernel<FP8, STEPS, false, 1>) : run(packed_kernel<FP8, STEPS, true, 1>);
}

// q35_packed_linear for n <= 16 rows, of codes, with a tail that may have no rows.
int few_rows_of(void *on, int n, const q35_packed &w, const q35_bf16 *tail, int tail_rows, const q35_bf16 *x, void *out,
                int wide, int stride) {
    const auto run = [&](auto few) {
        return few(as_stream(on), n, w, as_bf16(tail), tail_rows, as_bf16(x), out, wide, stride);
    };
    if (w.kind == q35_fp8_block || w.kind == q35_fp8_row) return run(few_rows<true, 8>);
    if (w.group >= w.k || w.group == 128) return run(few_rows<false, 8>);
    return w.group == 64 ? run(few_rows<false, 4>) : run(few_rows<false, 2>);
}

bool takes(const q35_packed &w, const q35_bf16 *x) {
    const bool fp8 = w.kind == q35_fp8_block || w.kind == q35_fp8_row;
    const bool group = fp8 || w.group >= w.k || w.group == 128 || w.group == 64 || w.group == 32;
    return (fp8 || w.kind == q35_int4_f16 || w.kind == q35_int4_bf16) && group && w.rows % PACKED_ROWS == 0 &&
           w.k % 64 == 0 && w.k > 0 && aligned(w.codes) && aligned(w.scales) && aligned(w.zeros) && aligned(x);
}

}  // namespace

extern "C" int q35_packed_linear(void *on, int n, q35_packed w, const q35_bf16 *x, void *out, int wide,
                                 int stride) {
    if (n < 0) return cudaErrorInvalidValue;
    if (n == 0 || w.rows == 0) return cudaSuccess;
    const cudaStream_t stream = as_stream(on);
    if (w.kind == 0) {
        const q35_bf16 *codes = static_cast<const q35_bf16 *>(w.codes);
        return wide ? q35_linear_f32(stream, n, w.k, w.rows, x, codes, static_cast<float *>(out), stride)
                    : q35_linear(stream, n, w.k, w.rows, x, codes, static_cast<q35_bf16 *>(out), stride);
    }
    if (stride < w.rows || !takes(w, x)) return cudaErrorInvalidValue;
    if (n > FEW) return launch_packed_many(stream, n, w, as_bf16(x), out, wide != 0, stride);
    return few_rows_of(on, n, w, nullptr, 0, x, out, wide, stride);
}

extern "C" int q35_packed_linear_tail(void *on, int n, q35_packed w, const q35_bf16 *tail, int tail_rows,
                                      const q35_bf16 *x, void *out, int wide, int stride) {
    if (n < 0 || n > FEW || w.rows <= 0 || tail_rows <= 0 || stride < w.rows + tail_rows || !aligned(tail) ||
        !takes(w, x)) {
        return cudaErrorInvalidValue;
    }
    return n == 0 ? int(cudaSuccess) : few_rows_of(on, n, w, tail, tail_rows, x, out, wide, stride);
}
