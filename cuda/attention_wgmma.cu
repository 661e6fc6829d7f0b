// Attention of sequences with many new tokens on Hopper, after FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608):
// a producer warp has the copy engine bring pages, and two warpgroups multiply; the products of a page overlap the
// softmax of the next, and those of one warpgroup the softmax of the other. Own code.
#include "attention_wgmma.cuh"
#include "attention_prefill.cuh"

namespace {

constexpr int D = 256, KEYS = Q35_PAGE_LEN;
constexpr int CONSUMERS = 2, GROUP_ROWS = 64, ROWS = CONSUMERS * GROUP_ROWS;  // rows of a warpgroup, of a block
constexpr int WARPGROUP = 128, THREADS = WARPGROUP * (1 + CONSUMERS);
constexpr int STAGES = 2;  // pages of keys, and of values, in shared memory

// A tile is 64 rows (queries of a warpgroup, keys or values of a page) of D elements: blocks of 64 columns one after
// the other, each as 64 rows of 128 bytes (see matrix_at).
constexpr int BLOCK_COLUMNS = 64, BLOCKS = D / BLOCK_COLUMNS, BLOCK_BYTES = 64 * 128, TILE_BYTES = BLOCKS * BLOCK_BYTES;
constexpr int SHARED_BYTES = (CONSUMERS + 2 * STAGES) * TILE_BYTES + 1024;  // tiles are aligned to 1024
static_assert(KEYS == 64 && GROUP_ROWS == 64, "the products are of 64 rows and 64 keys");

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Registers of a thread: what __launch_bounds__ leaves of 65536 for each, 168, moves from the producer to the others.
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;

// A running maximum follows the scores only where they exceed it by a factor of 2^8 of their weights: what is summed
// stays far from any overflow, and the results are hardly ever rescaled.
constexpr float SLACK = 8.0f;

__device__ __forceinline__ void prefetch_to_l2(const bf16 *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Pages of keys or values on their way through shared memory: the i-th of a block is in tile i % STAGES. `full` and
// `empty` are the barriers of the first tile, those of the next follow.
struct Ring {
    uint32_t tiles, full, empty;

    __device__ uint32_t tile(int i) const { return tiles + i % STAGES * TILE_BYTES; }
    __device__ void load(int i, const CUtensorMap &map, int row) const {
        const uint32_t barrier = full + i % STAGES * 8;
        barrier_wait(empty + i % STAGES * 8, i / STAGES % 2 ^ 1);
        barrier_arrive_and_expect(barrier, TILE_BYTES);
#pragma unroll
        for (int n = 0; n < BLOCKS; n++) {
            load_box(tile(i) + n * BLOCK_BYTES, map, n * BLOCK_COLUMNS, row, barrier);
        }
    }
    __device__ void wait(int i) const { barrier_wait(full + i % STAGES * 8, i / STAGES % 2); }
    // Every warp that used the tile calls it.
    __device__ void release(int i) const {
        if (threadIdx.x % 32 == 0) barrier_arrive(empty + i % STAGES * 8);
    }
};

// A tile of queries: rows of one sequence and key head, row = new token * group + head of the group.
struct Queries {
    int head, group, row0, num_rows, cached, num_pages;
    int64_t first;  // token of the batch

    // A row of the tile; one past its end stands for the last.
    __device__ int row(int r) const { return row0 + min(r, num_rows - 1); }
    // The last key that it sees.
    __device__ int position(int r) const { return cached + row(r) / group; }
};

// One thread: the pages in the order in which the others need them.
__device__ __forceinline__ void load_pages(const CUtensorMap &key_map, const CUtensorMap &value_map, const Ring &keys,
                                           const Ring &values, const int *pages, const Queries &tile, int kv_heads) {
    int page = pages[0], value_row = 0;
    for (int i = 0; i <= tile.num_pages; i++) {
        const int row = (page * kv_heads + tile.head) * KEYS;
        if (i + 1 < tile.num_pages) page = pages[i + 1];
        if (i < tile.num_pages) keys.load(i, key_map, row);
        if (i > 0) values.load(i - 1, value_map, value_row);
        value_row = row;
    }
}

// The rows of a warpgroup, by its 128 threads; zeros past the tile's end.
__device__ __forceinline__ void load_queries(const AttentionArgs &args, const Queries &tile, uint32_t to, int r0) {
    const int thread = threadIdx.x % WARPGROUP, piece = thread % 32;
#pragma unroll 4
    for (int r = thread / 32; r < GROUP_ROWS; r += WARPGROUP / 32) {
        const int row = tile.row(r0 + r);
        const int64_t at = (tile.first + row / tile.group) * args.q_heads + tile.head * tile.group + row % tile.group;
        copy16(to + piece / 8 * BLOCK_BYTES + r * 128 + (piece % 8 ^ r % 8) * 16,
               __cvta_generic_to_global(args.q + at * D + piece * 8), r0 + r < tile.num_rows);
    }
    copy_commit();
    copy_wait<0>();
    written_for_products();
}

// s = q k^T
__device__ __forceinline__ void multiply_keys(float (&s)[KEYS / 8][4], uint64_t q, uint64_t k) {
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const int at = i / 4 * BLOCK_BYTES + i % 4 * 32;
        multiply_rows(s, matrix_plus(q, at), matrix_plus(k, at), i > 0);
    }
    products_commit();
}

// out += p v
__device__ __forceinline__ void multiply_values(float (&out)[D / 8][4], const uint32_t (&p)[KEYS / 16][4], uint64_t v) {
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) multiply_columns(out, p[i], matrix_plus(v, i * 16 * 128));
    products_commit();
}

__device__ __forceinline__ void hide_keys(float (&s)[KEYS / 8][4], int key0, const int (&position)[2]) {
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int key = key0 + 8 * n + threadIdx.x % 4 * 2 + j % 2;
            if (key > position[j / 2]) s[n][j] = -INFINITY;
        }
    }
}

// Scores become weights, relative to a maximum. Of this thread's two rows: the maximum in use, the sum of the weights
// in the thread's columns, and by how much what was summed before is to be multiplied. A row always sees the first key.
__device__ __forceinline__ void weigh(float (&s)[KEYS / 8][4], float scale, float (&top)[2], float (&sum)[2],
                                      float (&fade)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float highest = s[0][2 * i];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) highest = fmaxf(highest, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
        highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, 2)) * scale;
        const float chosen = highest > top[i] + SLACK ? highest : top[i];
        fade[i] = power_of_2(top[i] - chosen);
        top[i] = chosen;
        sum[i] *= fade[i];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int j = 2 * i; j < 2 * i + 2; j++) {
                s[n][j] = power_of_2(fmaf(s[n][j], scale, -chosen));
                sum[i] += s[n][j];
            }
        }
    }
}

__device__ __forceinline__ void pack(uint32_t (&p)[KEYS / 16][4], const float (&s)[KEYS / 8][4]) {
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
        p[n / 2][n % 2 * 2] = pack2(s[n][0], s[n][1]);
        p[n / 2][n % 2 * 2 + 1] = pack2(s[n][2], s[n][3]);
    }
}

// Values from `len` on become zeros, by all consumers: memory past the sequence's end may hold NaN, which a weight of 0
// would not undo.
__device__ __forceinline__ void clear_values(unsigned char *tile, int len) {
    for (int i = threadIdx.x - WARPGROUP; i < (KEYS - len) * (D / 8); i += CONSUMERS * WARPGROUP) {
        const int row = len + i / (D / 8), piece = i % (D / 8);
        const int at = piece / 8 * BLOCK_BYTES + row * 128 + piece % 8 * 16;
        *reinterpret_cast<uint4 *>(tile + at) = make_uint4(0, 0, 0, 0);
    }
    written_for_products();
    named_barrier<1, CONSUMERS * WARPGROUP>();
}

// Brings the gates of a warpgroup's rows to the L2 cache.
__device__ __forceinline__ void prefetch_gates(const AttentionArgs &args, const Queries &tile, int r0) {
    const int thread = threadIdx.x % WARPGROUP, row = tile.row(r0 + thread / 2);
    const bf16 *gate = args.gate(tile.first + row / tile.group, tile.head * tile.group + row % tile.group);
    prefetch_to_l2(gate + thread % 2 * 128), prefetch_to_l2(gate + thread % 2 * 128 + 64);
}

// The gates of a row at this thread's columns of eight blocks of eight: pairs where their alignment allows it.
__device__ __forceinline__ void load_gates(uint32_t (&gates)[8], const bf16 *gate, bool in_pairs) {
#pragma unroll
    for (int n = 0; n < 8; n++) {
        if (in_pairs) {
            gates[n] = *reinterpret_cast<const uint32_t *>(gate + 8 * n);
        } else {
            const uint16_t *pair = reinterpret_cast<const uint16_t *>(gate + 8 * n);
            gates[n] = pair[0] | uint32_t(pair[1]) << 16;
        }
    }
}

// Good to some units in the last place of f32, and 0 from x = -87 on.
__device__ __forceinline__ float quick_sigmoid(float x) {
    return reciprocal(1.0f + power_of_2(-1.4426950408889634f * x));
}

__device__ __forceinline__ void store(const AttentionArgs &args, const Queries &tile, int r0, float (&out)[D / 8][4],
                                      const float (&sum)[2]) {
    const bool in_pairs = args.stride % 2 == 0 && reinterpret_cast<size_t>(args.projected) % 4 == 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float total = sum[i] + __shfl_xor_sync(ALL_LANES, sum[i], 1);
        total += __shfl_xor_sync(ALL_LANES, total, 2);
        const int r = r0 + threadIdx.x % WARPGROUP / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i;
        if (r >= tile.num_rows) continue;
        const int row = tile.row(r), q_head = tile.head * tile.group + row % tile.group;
        const int64_t token = tile.first + row / tile.group;
        const int column = threadIdx.x % 4 * 2;
        const bf16 *gate = args.gate(token, q_head) + column;
        bf16 *to = args.out + (token * args.q_heads + q_head) * D + column;
        const float inverse = 1.0f / total;
#pragma unroll
        for (int n0 = 0; n0 < D / 8; n0 += 8) {
            uint32_t gates[8];
            load_gates(gates, gate + 8 * n0, in_pairs);
#pragma unroll
            for (int n = n0; n < n0 + 8; n++) {
                const float2 g = unpack2(gates[n - n0]);
                const float a = out[n][2 * i] * inverse * quick_sigmoid(g.x);
                const float b = out[n][2 * i + 1] * inverse * quick_sigmoid(g.y);
                *reinterpret_cast<uint32_t *>(to + 8 * n) = pack2(a, b);
            }
        }
    }
}

// A warpgroup of 64 rows. The products of a page with the queries are begun before those of the page before with its
// weights, and its softmax runs while the latter are under way.
__device__ __forceinline__ void attend(const AttentionArgs &args, const Queries &tile, const Ring &keys,
                                       const Ring &values, unsigned char *value_tiles, uint32_t q_tile, int r0,
                                       int kv_len) {
    load_queries(args, tile, q_tile, r0);
    named_barrier<1, CONSUMERS * WARPGROUP>();
    const uint64_t q = matrix_at(q_tile, 0);
    const int r = r0 + threadIdx.x % WARPGROUP / 32 * 16 + threadIdx.x % 32 / 4;
    const int position[2] = {tile.position(r), tile.position(r + 8)};
    const int seen_by_all = tile.position(r0);
    float s[KEYS / 8][4] = {}, out[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {}, fade[2];
    uint32_t p[KEYS / 16][4];

    keys.wait(0);
    products_begin();
    multiply_keys(s, q, matrix_at(keys.tile(0), 0));
    products_wait<0>();
    keep_order(s);
    keys.release(0);
    if (KEYS - 1 > seen_by_all) hide_keys(s, 0, position);
    weigh(s, args.scale, top, sum, fade);
    pack(p, s);

    for (int i = 1; i < tile.num_pages; i++) {
        keys.wait(i);
        keep_order(s), keep_order(p), keep_order(out);
        products_begin();
        multiply_keys(s, q, matrix_at(keys.tile(i), 0));
        values.wait(i - 1);
        products_begin();
        multiply_values(out, p, matrix_at(values.tile(i - 1), BLOCK_BYTES));
        products_wait<1>();
        keep_order(s);
        keys.release(i);
        if (i * KEYS + KEYS - 1 > seen_by_all) hide_keys(s, i * KEYS, position);
        weigh(s, args.scale, top, sum, fade);
        keep_order(s);
        // The wait is in blocks of its own, or the assembler would move it ahead of the softmax.
        if (__any_sync(ALL_LANES, fade[0] != 1.0f || fade[1] != 1.0f)) {
            products_wait<0>();
            keep_order(out);
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
#pragma unroll
                for (int j = 0; j < 4; j++) out[n][j] *= fade[j / 2];
            }
        }
        products_wait<0>();
        keep_order(out), keep_order(p);
        values.release(i - 1);
        pack(p, s);
    }

    prefetch_gates(args, tile, r0);
    const int last = tile.num_pages - 1;
    values.wait(last);
    if (kv_len < tile.num_pages * KEYS) {
        clear_values(value_tiles + last % STAGES * TILE_BYTES, kv_len - last * KEYS);
    }
    keep_order(p), keep_order(out);
    products_begin();
    multiply_values(out, p, matrix_at(values.tile(last), BLOCK_BYTES));
    products_wait<0>();
    keep_order(out);
    store(args, tile, r0, out, sum);
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// One block: ROWS rows of one sequence and key head. Keys are walked page by page from the start of the sequence, and a
// page that a row does not see leaves its sums as they are, so a token's bits depend on its position alone.
__global__ void __launch_bounds__(THREADS, 1) wgmma_kernel(const __grid_constant__ CUtensorMap key_map,
                                                           const __grid_constant__ CUtensorMap value_map,
                                                           AttentionArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    let_next_start();
    extern __shared__ unsigned char memory[];
    __shared__ uint64_t barriers[4 * STAGES];
    const uint32_t start = shared_address(memory), tiles = (start + 1023) & ~1023u;
    const uint32_t key_tiles = tiles + CONSUMERS * TILE_BYTES, value_tiles = key_tiles + STAGES * TILE_BYTES;
    const uint32_t first_barrier = shared_address(barriers);
    const Ring keys{key_tiles, first_barrier, first_barrier + STAGES * 8};
    const Ring values{value_tiles, first_barrier + 2 * STAGES * 8, first_barrier + 3 * STAGES * 8};
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(keys.full + 8 * i, 1), barrier_init(values.full + 8 * i, 1);
            barrier_init(keys.empty + 8 * i, CONSUMERS * WARPGROUP / 32);
            barrier_init(values.empty + 8 * i, CONSUMERS * WARPGROUP / 32);
        }
        barriers_are_there();
        prefetch_map(&key_map), prefetch_map(&value_map);
    }
    wait_for_inputs();
    const q35_batch &batch = args.batch;
    Queries tile;
    int seq, index;
    tile.head = blockIdx.x % args.kv_heads, tile.group = args.group();
    if (!find_tile<ROWS>(batch, tile.group, blockIdx.x / args.kv_heads, seq, index)) return;
    tile.row0 = index * ROWS;
    tile.num_rows = min(ROWS, batch.query_len[seq] * tile.group - tile.row0);
    tile.cached = batch.cached_len[seq];
    tile.num_pages = ceil_div(tile.position(tile.num_rows - 1) + 1, KEYS);
    tile.first = batch.query_start[seq];
    const int *pages = batch.pages + batch.page_start[seq];
    __syncthreads();  // the barriers are there

    // The same in all lanes, and the compiler is to know it.
    const int warpgroup = __shfl_sync(ALL_LANES, threadIdx.x / WARPGROUP, 0);
    if (warpgroup == 0) {
        give_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            load_pages(key_map, value_map, keys, values, pages, tile, args.kv_heads);
        }
    } else {
        take_registers<CONSUMER_REGISTERS>();
        attend(args, tile, keys, values, memory + (value_tiles - start), tiles + (warpgroup - 1) * TILE_BYTES,
               (warpgroup - 1) * GROUP_ROWS, tile.cached + batch.query_len[seq]);
    }
#endif
}

// Keys or values as a matrix of D columns, a row for each place of each page's head; loaded in boxes of 64 by 64. How
// many pages there are nobody knows here: rows of 512 GB.
cudaError_t make_map(CUtensorMap &map, const bf16 *pages) {
    const auto encode = map_encoder();
    if (encode == nullptr) return cudaErrorNotSupported;
    const cuuint64_t sizes[2] = {D, uint64_t(1) << 30}, stride = D * sizeof(bf16);
    const cuuint32_t box[2] = {BLOCK_COLUMNS, KEYS}, steps[2] = {1, 1};
    const CUresult status =
        encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<bf16 *>(pages), sizes, &stride, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

bool attention_wgmma_fits(int head_dim) {
    static int known[64];  // by device: 0 not asked yet, 1 no, 2 yes
    int device = 0, major = 0;
    if (head_dim != D || cudaGetDevice(&device) != cudaSuccess || device >= 64) return false;
    if (known[device] == 0) {
        if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
        cudaFuncAttributes kernel = {};
        // Compiled for anything but sm_90a it is empty and has hardly any registers.
        const bool there =
            major == 9 && cudaFuncGetAttributes(&kernel, wgmma_kernel) == cudaSuccess && kernel.numRegs > 100;
        known[device] = there ? 2 : 1;
    }
    return known[device] == 2;
}

cudaError_t attention_wgmma(cudaStream_t stream, const AttentionArgs &args) {
    const int64_t group = args.q_heads / args.kv_heads, blocks = max_tiles(args, ROWS) * args.kv_heads;
    if (args.batch.max_query_len * group > INT32_MAX - ROWS || blocks > INT32_MAX) return cudaErrorInvalidValue;
    CUtensorMap keys, values;
    cudaError_t status = make_map(keys, args.k);
    if (status == cudaSuccess) status = make_map(values, args.v);
    if (status == cudaSuccess) {
        status = cudaFuncSetAttribute(wgmma_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
    }
    if (status != cudaSuccess) return status;
    return launch(wgmma_kernel, unsigned(blocks), THREADS, size_t(SHARED_BYTES), stream, keys, values, args);
}
