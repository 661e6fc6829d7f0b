// Attention of sequences with many new tokens: FlashAttention-2 (Dao 2023, arXiv 2307.08691) over pages, the query
// heads of a key head packed into the rows of a tile; own code. Hopper's, for head_dim 256, is in attention_wgmma.cu.
#include "attention_prefill.cuh"

namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS, ROWS = 16 * WARPS;

// Rows of shared tiles are 16 bytes longer than they need be, so that the eight rows of a matrix load hit all banks.
template <int D, int KEYS>
constexpr int shared_bytes() {
    return (ROWS + 2 * KEYS) * (D + 8) * int(sizeof(bf16));
}

// A step's keys or values of one head, of a page or half of one; those from `len` on are zeros: memory past the
// sequence's end may hold NaN, which a weight of 0 would not undo.
template <int D, int KEYS>
__device__ void load_keys(bf16 *tile, const bf16 *from, int len) {
#pragma unroll
    for (int i = threadIdx.x; i < KEYS * (D / 8); i += THREADS) {
        const int row = i / (D / 8), column = i % (D / 8) * 8;
        copy16(tile + row * (D + 8) + column, from + row * D + column, row < len);
    }
}

// One block: ROWS rows (row = new token * group + head of the group) of one sequence and key head; a warp has 16 rows.
// Keys are walked KEYS at a time from the start of the sequence, and a step of which a row sees nothing leaves its sums
// as they are, so a token's bits depend on its position alone.
template <int D, int KEYS>
__global__ void __launch_bounds__(THREADS, 1) prefill_kernel(AttentionArgs args) {
    let_next_start();
    wait_for_inputs();
    const q35_batch &batch = args.batch;
    const int head = blockIdx.x % args.kv_heads, group = args.group();
    int tile, seq;
    if (!find_tile<ROWS>(batch, group, blockIdx.x / args.kv_heads, seq, tile)) return;
    const int query_len = batch.query_len[seq], row0 = tile * ROWS;
    const int num_rows = min(ROWS, query_len * group - row0);
    const int cached = batch.cached_len[seq];
    const int num_keys = cached + (row0 + num_rows - 1) / group + 1;
    const int num_steps = ceil_div(num_keys, KEYS);
    const int64_t first = batch.query_start[seq];
    const int *pages = batch.pages + batch.page_start[seq];
    const auto at_step = [&](int step) {
        const int key = step * KEYS;
        return args.page_at(pages[key / Q35_PAGE_LEN], head) + int64_t(key % Q35_PAGE_LEN) * D;
    };

    extern __shared__ __align__(16) unsigned char memory[];
    bf16 *q_tile = reinterpret_cast<bf16 *>(memory);
    bf16 *k_tile = q_tile + ROWS * (D + 8), *v_tile = k_tile + KEYS * (D + 8);

    for (int i = threadIdx.x; i < ROWS * (D / 8); i += THREADS) {
        const int r = i / (D / 8), column = i % (D / 8) * 8;
        const bool there = r < num_rows;
        const int row = there ? row0 + r : row0;
        const int64_t at = (first + row / group) * args.q_heads + head * group + row % group;
        copy16(q_tile + r * (D + 8) + column, args.q + at * D + column, there);
    }
    load_keys<D, KEYS>(k_tile, args.k + at_step(0), num_keys);
    copy_commit();

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // This thread's rows of the accumulators are `lane / 4` and 8 further; a row sees the keys up to its position.
    int position[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = 16 * warp + lane / 4 + 8 * i;
        position[i] = r < num_rows ? cached + (row0 + r) / group : -1;
    }
    float out[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    const bf16 *q_row = q_tile + (16 * warp + lane % 16) * (D + 8) + lane / 16 * 8;
    const bf16 *k_row = k_tile + (lane / 16 * 8 + lane % 8) * (D + 8) + lane / 8 % 2 * 8;
    const bf16 *v_row = v_tile + lane % 16 * (D + 8) + lane / 16 * 8;

    for (int step = 0; step < num_steps; step++) {
        const int key0 = step * KEYS;
        load_keys<D, KEYS>(v_tile, args.v + at_step(step), num_keys - key0);
        copy_commit();
        copy_wait<1>();  // all but the values: the keys are there
        __syncthreads();

        float s[KEYS / 8][4] = {};
#pragma unroll 4
        for (int k = 0; k < D; k += 16) {
            uint32_t a[4];
            load_matrices(a, q_row + k);
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                uint32_t b[4];
                load_matrices(b, k_row + n * 16 * (D + 8) + k);
                mma(s[2 * n], a, b);
                mma(s[2 * n + 1], a, b + 2);
            }
        }
        __syncthreads();  // nobody reads the keys any more
        if (step + 1 < num_steps) load_keys<D, KEYS>(k_tile, args.k + at_step(step + 1), num_keys - key0 - KEYS);
        copy_commit();

        softmax_step<KEYS / 8, D>(args, s, key0, position, top, sum, out);

        copy_wait<1>();  // all but the next keys: the values are there
        __syncthreads();
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
            const uint32_t a0 = pack2(s[2 * k][0], s[2 * k][1]), a1 = pack2(s[2 * k][2], s[2 * k][3]);
            const uint32_t a2 = pack2(s[2 * k + 1][0], s[2 * k + 1][1]);
            const uint32_t a3 = pack2(s[2 * k + 1][2], s[2 * k + 1][3]);
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                uint32_t b[4];
                load_matrices_transposed(b, v_row + k * 16 * (D + 8) + n * 16);
                mma(out[2 * n], a0, a1, a2, a3, b[0], b[1]);
                mma(out[2 * n + 1], a0, a1, a2, a3, b[2], b[3]);
            }
        }
        __syncthreads();  // nobody reads the values any more
    }

#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 1);
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 2);
        if (position[i] < 0) continue;
        const int row = row0 + 16 * warp + lane / 4 + 8 * i;
        const int64_t token = first + row / group;
        const int q_head = head * group + row % group;
        const bf16 *gate = args.gate(token, q_head);
        bf16 *to = args.out + (token * args.q_heads + q_head) * D;
        const float inverse = 1.0f / sum[i];
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const int column = 8 * n + lane % 4 * 2;
            const float a = out[n][2 * i] * inverse * sigmoid(__bfloat162float(gate[column]));
            const float b = out[n][2 * i + 1] * inverse * sigmoid(__bfloat162float(gate[column + 1]));
            *reinterpret_cast<uint32_t *>(to + column) = pack2(a, b);
        }
    }
}

template <int D, int KEYS = Q35_PAGE_LEN>
cudaError_t prefill(cudaStream_t stream, const AttentionArgs &args) {
    const int64_t group = args.q_heads / args.kv_heads;
    const int64_t blocks = max_tiles(args, ROWS) * args.kv_heads;
    if (args.batch.max_query_len * group > INT32_MAX - ROWS || blocks > INT32_MAX) return cudaErrorInvalidValue;
    const auto kernel = prefill_kernel<D, KEYS>;
    constexpr int SHARED = shared_bytes<D, KEYS>();
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED);
    if (status != cudaSuccess) return status;
    return launch(kernel, unsigned(blocks), THREADS, size_t(SHARED), stream, args);
}

}  // namespace

// Of head_dim 256, on cards that have no room for a page: 8.6, 8.9 and 12.x.
constexpr int FEW_KEYS = Q35_PAGE_LEN / 2;

bool attention_prefill_fits(int head_dim, int shared_limit) {
    const int needed = head_dim == 64    ? shared_bytes<64, Q35_PAGE_LEN>()
                       : head_dim == 128 ? shared_bytes<128, Q35_PAGE_LEN>()
                                         : shared_bytes<256, FEW_KEYS>();
    return needed <= shared_limit;
}

cudaError_t attention_prefill(cudaStream_t stream, const AttentionArgs &args) {
    if (attention_wgmma_fits(args.head_dim)) return attention_wgmma(stream, args);
    switch (args.head_dim) {
        case 64: return prefill<64>(stream, args);
        case 128: return prefill<128>(stream, args);
        case 256:
            if (this_card().shared < shared_bytes<256, Q35_PAGE_LEN>()) return prefill<256, FEW_KEYS>(stream, args);
            return prefill<256>(stream, args);
        default: return cudaErrorInvalidValue;
    }
}
