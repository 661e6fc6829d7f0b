// Products with weight matrices: few rows at the speed of the memory, many rows on tensor cores. Own code.
#include "mma.cuh"

namespace {

__device__ inline void store(bf16 *to, float x) { *to = __float2bfloat16_rn(x); }
__device__ inline void store(float *to, float x) { *to = x; }

// ---------------------------------------------------------------------------------------------------------- few rows

constexpr int FEW = 16;
constexpr int WARPS = 8;
constexpr int TILE_W = 8;             // rows of w in a tile
constexpr int CHUNK = 64;             // elements along k that a warp takes at a time: 128 bytes of a row
constexpr int UNIT = TILE_W * CHUNK;  // what is loaded at a time: one warp's chunk of a tile
constexpr int SUMS = WARPS * TILE_W * FEW;
constexpr int L2_AHEAD = 64 << 10;  // bytes of its weights that a block asks into L2 beside those in the ring

// For weights, which are read once: the first to leave L2, where the next kernel's may wait already.
__device__ __forceinline__ uint64_t read_once() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// 16 bytes of w to shared memory; zeros, and nothing is read, where `there` is false.
__device__ __forceinline__ void copy_weights(uint32_t to, const bf16 *from, bool there, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0), "l"(policy)
                 : "memory");
}

__device__ __forceinline__ void ask_into_l2(const bf16 *from, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)), "r"(bytes)
                 : "memory");
#endif
}

// About one block a multiprocessor; block b has the tiles b, b + gridDim.x, ... Its warps split k: warp i takes the
// chunks i, i + WARPS, ... in this order, and the sums of the warps are added in their order, whatever n is. The
// weights come through a ring of RING units for each warp, filled before the inputs are there; a lane reads back what
// it copied itself, so the ring needs no barriers. Which element of k stands in which place of the tensor cores' tile
// does not matter while w and x agree.
//
// x is their 16-row operand (BOTH: its upper 8 rows are there too), and lies in shared memory in the order in which it
// is read: `slab` chunks of each warp at a time. Where one slab is not all of k, TILES tiles share it.
template <int TILES, bool BOTH, int RING, typename Out>
__global__ void __launch_bounds__(32 * WARPS, 2)
    few_rows_kernel(int n, int in, int out_dim, int slab, const bf16 *x, const bf16 *w, Out *out, int stride) {
    extern __shared__ __align__(16) unsigned char memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, place = lane % 4 * 8;
    const int num_tiles = ceil_div(out_dim, TILE_W), num_chunks = ceil_div(in, CHUNK), step = gridDim.x;
    float *sums = reinterpret_cast<float *>(memory);  // [2][WARPS][FEW][TILE_W]
    uint4 *ring = reinterpret_cast<uint4 *>(sums + 2 * SUMS) + warp * RING * (UNIT / 8) + lane;
    uint4 *x_kept = reinterpret_cast<uint4 *>(sums + 2 * SUMS) + WARPS * RING * (UNIT / 8) + warp * slab * n * 8;
    const uint32_t ring_address = shared_address(ring);
    const uint64_t policy = read_once();

    // What is loaded next: tile `first + t * step`.
    int next_first = warp < num_chunks ? blockIdx.x : num_tiles, next_chunk = warp, next_t = 0;
    auto load = [&](int slot) {
        if (next_first < num_tiles) {
            // Rows past the last are the last one again, and are not written.
            const int row = min((next_first + next_t * step) * TILE_W + g, out_dim - 1);
            const int k = next_chunk * CHUNK + place;
            const bf16 *from = w + (int64_t(row) * in + k);
            const uint32_t to = ring_address + slot * (UNIT * 2);
            copy_weights(to, from, k < in, policy);
            copy_weights(to + UNIT, from + 32, k + 32 < in, policy);
            if (TILES == 1 || ++next_t == TILES || next_first + next_t * step >= num_tiles) {
                next_t = 0;
                next_chunk += WARPS;
                if (next_chunk >= num_chunks) {
                    next_chunk = warp;
                    next_first += TILES * step;
                }
            }
        }
        copy_commit();
    };
#pragma unroll
    for (int i = 0; i < RING; i++) load(i);
    if (lane == 0) {
        const int in_ring = RING / ceil_div(num_chunks, WARPS), ahead = ceil_div(L2_AHEAD, 2 * TILE_W * in);
        for (int i = in_ring; i < in_ring + ahead; i++) {
            const int64_t row = (int64_t(blockIdx.x) + int64_t(i) * step) * TILE_W + warp;
            if (row >= out_dim) break;
            ask_into_l2(w + row * in, 2 * in);
        }
    }
    const unsigned inverse = 0xffffffffu / n + 1;  // item / n for n > 1 and fewer than 2^28 items
    let_next_start();
    wait_for_inputs();

    // A warp's chunks of x, from `chunk` on. The rows of a chunk's half lie one after the other, so that reading a
    // fragment hits all banks for every n.
    auto keep_x = [&](int chunk) {
        constexpr int AT_ONCE = 8;
        const int count = min(slab, ceil_div(num_chunks - chunk, WARPS)) * n * 8;
        __syncwarp();  // nobody reads the slab before it
        for (int first = lane; first < count; first += 32 * AT_ONCE) {
            uint4 words[AT_ONCE];
            int to[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int item = first + 32 * i, c = n == 1 ? item / 8 : __umulhi(item / 8, inverse);
                const int row = item / 8 - c * n, k = (chunk + c * WARPS) * CHUNK + lane % 8 * 8;
                to[i] = ((c * 2 + lane / 4 % 2) * n + row) * 4 + lane % 4;
                words[i] = make_uint4(0, 0, 0, 0);
                if (item < count && k < in) {
                    words[i] = __ldcg(reinterpret_cast<const uint4 *>(x + (int64_t(row) * in + k)));
                }
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                if (first + 32 * i < count) x_kept[to[i]] = words[i];
            }
        }
        __syncwarp();
    };
    // Rows past the last are the last one again here too.
    const int low = min(g, n - 1) * 4 + lane % 4, high = min(g + 8, n - 1) * 4 + lane % 4;
    if (TILES == 1 && warp < num_chunks) keep_x(warp);

    int slot = 0, parity = 0;
#pragma unroll 1
    for (int first = blockIdx.x; first < num_tiles; first += TILES * step) {
        float acc[TILES][4] = {};
        int kept = 0;
#pragma unroll 1
        for (int chunk = warp; chunk < num_chunks; chunk += WARPS, kept++) {
            if (TILES > 1 && kept % slab == 0) {
                keep_x(chunk);
                kept = 0;
            }
            uint4 a[2][2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint4 *from = x_kept + (2 * kept + h) * n * 4;
                a[h][0] = from[low];
                a[h][1] = BOTH ? from[high] : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                if (TILES > 1 && first + t * step >= num_tiles) break;
                copy_wait<RING - 1>();
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const uint4 b = ring[slot * (UNIT / 8) + 32 * h], lo = a[h][0], hi = a[h][1];
                    mma(acc[t], lo.x, hi.x, lo.y, hi.y, b.x, b.y);
                    mma(acc[t], lo.z, hi.z, lo.w, hi.w, b.z, b.w);
                }
                load(slot);
                slot = slot + 1 == RING ? 0 : slot + 1;
            }
        }
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            const int tile = first + t * step;
            if (TILES > 1 && tile >= num_tiles) break;
            float *all = sums + parity * SUMS, *mine = all + warp * (FEW * TILE_W) + 2 * lane;
            *reinterpret_cast<float2 *>(mine) = make_float2(acc[t][0], acc[t][1]);
            if (BOTH) *reinterpret_cast<float2 *>(mine + 8 * TILE_W) = make_float2(acc[t][2], acc[t][3]);
            __syncthreads();  // one is enough: the next tile's sums go to the other half
            parity ^= 1;
            const int row = tile * TILE_W + threadIdx.x % TILE_W, token = threadIdx.x / TILE_W;
            if (token >= n || row >= out_dim) continue;
            float total = 0.0f;
#pragma unroll
            for (int i = 0; i < WARPS; i++) total += all[i * (FEW * TILE_W) + threadIdx.x];
            store(out + (int64_t(token) * stride + row), total);
        }
    }
}

// Rows whose length or address does not allow 16-byte loads: a warp per element of the result.
constexpr int PLAIN_WARPS = 8;
template <typename Out>
__global__ void __launch_bounds__(32 * PLAIN_WARPS)
    plain_kernel(int n, int in, int out_dim, const bf16 *x, const bf16 *w, Out *out, int stride) {
    let_next_start();
    wait_for_inputs();
    const int64_t task = int64_t(blockIdx.x) * PLAIN_WARPS + threadIdx.x / 32;
    if (task >= int64_t(n) * out_dim) return;
    const int64_t row = task / n, t = task % n;
    float sum = 0.0f;
    for (int k = threadIdx.x % 32; k < in; k += 32) {
        sum += __bfloat162float(w[row * in + k]) * __bfloat162float(x[t * in + k]);
    }
    sum = lane_sum(sum);
    if (threadIdx.x % 32 == 0) store(out + t * stride + row, sum);
}

// --------------------------------------------------------------------------------------------------------- many rows

constexpr int TILE = 128, DEPTH = 32, STAGES = 3, TILE_THREADS = 256;
constexpr int TILE_ROW = DEPTH + 8;  // 16 bytes more than needed: the rows of a matrix load hit all banks
constexpr int TILE_STAGE = 2 * TILE * TILE_ROW;
constexpr int TILE_SHARED = STAGES * TILE_STAGE * int(sizeof(bf16));

// Rows row0.. and elements k.. of a matrix [rows, in]; zeros past both ends.
template <bool VECTOR>
__device__ void load_tile(bf16 *tile, const bf16 *matrix, int64_t rows, int in, int64_t row0, int k) {
    if constexpr (VECTOR) {
#pragma unroll
        for (int i = threadIdx.x; i < TILE * (DEPTH / 8); i += TILE_THREADS) {
            const int row = i / (DEPTH / 8), column = i % (DEPTH / 8) * 8;
            const bool there = row0 + row < rows && k + column < in;
            const bf16 *from = there ? matrix + (row0 + row) * in + k + column : matrix;
            copy16(tile + row * TILE_ROW + column, from, there);
        }
    } else {
        for (int i = threadIdx.x; i < TILE * DEPTH; i += TILE_THREADS) {
            const int row = i / DEPTH, column = i % DEPTH;
            const bool there = row0 + row < rows && k + column < in;
            tile[row * TILE_ROW + column] =
                there ? matrix[(row0 + row) * in + k + column] : __float2bfloat16_rn(0.0f);
        }
    }
}

// Tiles of 128 rows of x by 128 of w, 32 elements of k at a time, three stages in shared memory; a warp has 64 x 32.
template <bool VECTOR, typename Out>
__global__ void __launch_bounds__(TILE_THREADS)
    many_rows_kernel(int n, int in, int out_dim, const bf16 *x, const bf16 *w, Out *out, int stride) {
    extern __shared__ __align__(16) unsigned char memory[];
    bf16 *stages = reinterpret_cast<bf16 *>(memory);
    const int64_t x0 = int64_t(blockIdx.x) * TILE, w0 = int64_t(blockIdx.y) * TILE;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int x_warp = warp / 4 * 64, w_warp = warp % 4 * 32;
    const int steps = ceil_div(in, DEPTH);
    auto load = [&](int step) {
        if (step < steps) {
            bf16 *stage = stages + step % STAGES * TILE_STAGE;
            load_tile<VECTOR>(stage, x, n, in, x0, step * DEPTH);
            load_tile<VECTOR>(stage + TILE * TILE_ROW, w, out_dim, in, w0, step * DEPTH);
        }
        copy_commit();
    };
    let_next_start();
    wait_for_inputs();
    float acc[4][4][4] = {};
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) load(i);
    for (int step = 0; step < steps; step++) {
        copy_wait<STAGES - 2>();
        __syncthreads();  // this step's stage is there, and the stage before it is free
        load(step + STAGES - 1);
        const bf16 *x_tile = stages + step % STAGES * TILE_STAGE, *w_tile = x_tile + TILE * TILE_ROW;
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            uint32_t a[4][4], b[2][4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                load_matrices(a[i], x_tile + (x_warp + 16 * i + lane % 16) * TILE_ROW + k + lane / 16 * 8);
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int row = w_warp + 16 * j + lane / 16 * 8 + lane % 8;
                load_matrices(b[j], w_tile + row * TILE_ROW + k + lane / 8 % 2 * 8);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    mma(acc[i][j], a[i], b[j / 2] + j % 2 * 2);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int64_t row = x0 + x_warp + 16 * i + 8 * half + lane / 4;
            if (row >= n) continue;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int64_t column = w0 + w_warp + 8 * j + lane % 4 * 2;
                Out *to = out + row * stride + column;
                if (column < out_dim) store(to, acc[i][j][2 * half]);
                if (column + 1 < out_dim) store(to + 1, acc[i][j][2 * half + 1]);
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------------- launchers

// What is chosen here changes the speed, and no sum.
template <typename Out>
cudaError_t few_rows(cudaStream_t stream, int n, int in, int out_dim, const bf16 *x, const bf16 *w, Out *out,
                     int stride) {
    const Card card = this_card();
    if (card.count == 0) return cudaErrorInvalidDevice;
    constexpr int RING_BYTES = WARPS * UNIT * int(sizeof(bf16)), SUMS_BYTES = 2 * SUMS * int(sizeof(float));
    const int chunk_bytes = n * WARPS * CHUNK * int(sizeof(bf16));  // of x, a chunk of every warp
    const int chunks = ceil_div(in, WARPS * CHUNK);
    // Two blocks of a multiprocessor: this kernel's, and the next one's that loads its weights meanwhile; a ring of 5
    // units is as short as the memory's speed allows. The driver keeps 1 KB of each block.
    const int half = (card.shared + 1024) / 2 - 1024 - SUMS_BYTES, all = card.shared - SUMS_BYTES;
    const int64_t x_bytes = int64_t(chunks) * chunk_bytes;
    const bool deep = 8 * RING_BYTES + x_bytes <= half || (5 * RING_BYTES + x_bytes > half && 16 * RING_BYTES <= all);
    const int ring_bytes = (deep ? 8 : 5) * RING_BYTES;
    const int room = (all - ring_bytes) / chunk_bytes, slab = room < chunks ? room : chunks;
    if (slab < 1) return cudaErrorInvalidValue;
    const int tiles = ceil_div(out_dim, TILE_W), blocks = ceil_div(tiles, ceil_div(tiles, card.count));
    const int shared = SUMS_BYTES + ring_bytes + slab * chunk_bytes;
    const auto run = [&](auto kernel) {
        const cudaError_t status =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, card.shared);
        if (status != cudaSuccess) return status;
        return launch(kernel, blocks, 32 * WARPS, size_t(shared), stream, n, in, out_dim, slab, x, w, out, stride);
    };
    if (slab < chunks) {
        if (n <= 8) return deep ? run(few_rows_kernel<4, false, 8, Out>) : run(few_rows_kernel<4, false, 5, Out>);
        return deep ? run(few_rows_kernel<4, true, 8, Out>) : run(few_rows_kernel<4, true, 5, Out>);
    }
    if (n <= 8) return deep ? run(few_rows_kernel<1, false, 8, Out>) : run(few_rows_kernel<1, false, 5, Out>);
    return deep ? run(few_rows_kernel<1, true, 8, Out>) : run(few_rows_kernel<1, true, 5, Out>);
}

template <bool VECTOR, typename Out>
cudaError_t many_rows(cudaStream_t stream, int n, int in, int out_dim, const bf16 *x, const bf16 *w, Out *out,
                      int stride) {
    const cudaError_t status = cudaFuncSetAttribute(many_rows_kernel<VECTOR, Out>,
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize, TILE_SHARED);
    if (status != cudaSuccess) return status;
    const dim3 grid(unsigned(ceil_div(n, TILE)), unsigned(ceil_div(out_dim, TILE)));
    if (grid.y > 65535) return cudaErrorInvalidValue;
    return launch(many_rows_kernel<VECTOR, Out>, grid, TILE_THREADS, TILE_SHARED, stream, n, in, out_dim, x, w, out,
                  stride);
}

template <typename Out>
cudaError_t linear(void *on, int n, int in, int out_dim, const bf16 *x, const bf16 *w, Out *out, int stride) {
    if (n == 0 || out_dim == 0) return cudaSuccess;
    if (stride < out_dim) return cudaErrorInvalidValue;
    const cudaStream_t stream = as_stream(on);
    const bool vector = in % 8 == 0 && aligned(x, 16) && aligned(w, 16);
    if (n > FEW) {
        return vector ? many_rows<true>(stream, n, in, out_dim, x, w, out, stride)
                      : many_rows<false>(stream, n, in, out_dim, x, w, out, stride);
    }
    if (vector) return few_rows(stream, n, in, out_dim, x, w, out, stride);
    const int64_t blocks = ceil_div(int64_t(n) * out_dim, PLAIN_WARPS);
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    return launch(plain_kernel<Out>, unsigned(blocks), 32 * PLAIN_WARPS, 0, stream, n, in, out_dim, x, w, out, stride);
}

}  // namespace

extern "C" int q35_linear(void *stream, int n, int in, int out_dim, const q35_bf16 *x, const q35_bf16 *w,
                          q35_bf16 *out, int stride) {
    return linear(stream, n, in, out_dim, as_bf16(x), as_bf16(w), as_bf16(out), stride);
}

extern "C" int q35_linear_f32(void *stream, int n, int in, int out_dim, const q35_bf16 *x, const q35_bf16 *w,
                              float *out, int stride) {
    return linear(stream, n, in, out_dim, as_bf16(x), as_bf16(w), out, stride);
}
