// Attention of sequences with few new tokens: their keys are split over blocks, and the results merged.
#include "attention.cuh"

namespace {

constexpr int DECODE_WARPS = 4, DECODE_THREADS = 32 * DECODE_WARPS, DECODE_ROWS = 16, DECODE_KEYS = 16, STAGES = 2;
constexpr int MIN_SEGMENT = 128;
// Partial results of one launch; more sequences take several launches. A GPU is full long before.
constexpr int64_t MAX_PARTIALS = int64_t(24) << 20;

// Segments that the keys of a token are split into, at most: enough blocks for one sequence to fill the GPU.
__host__ __device__ inline int max_segments(int kv_heads) {
    const int n = 128 / kv_heads;
    return n < 8 ? 8 : n > 64 ? 64 : n;
}

// Keys of a segment of a token that sees `len` keys: a function of nothing else, so that neither the batch nor the
// tokens beside it change its bits.
__host__ __device__ inline int64_t segment_len(int len, int most) {
    int64_t segment = MIN_SEGMENT;
    while (segment * most < len) segment *= 2;
    return segment;
}

inline int segments_bound(int max_kv_len, int most) {
    const int n = max_kv_len / MIN_SEGMENT + 1;
    return n < most ? n : most;
}

inline int64_t floats_per_token(int segments, int q_heads, int head_dim) {
    return int64_t(segments) * q_heads * (head_dim + 2);
}

// Partial results, [slot, segment, query head]: slot = sequence of this launch * slots_per_seq + new token.
struct Partials {
    float *sums;     // [.., D], weighted values, not yet divided
    float2 *scales;  // the highest score and the sum of weights relative to it
    int segments, slots_per_seq, first_seq;

    __device__ int64_t at(int seq, int token, int segment, int q_heads) const {
        return ((int64_t(seq - first_seq) * slots_per_seq + token) * segments + segment) * q_heads;
    }
};

template <int D>
constexpr int decode_shared_bytes() {
    return (DECODE_ROWS + DECODE_WARPS * STAGES * 2 * DECODE_KEYS) * (D + 8) * int(sizeof(bf16));
}

// Keys key0.. of a page and head, and their values, for one warp; those from `len` on are zeros (see load_page of
// attention_prefill.cu).
template <int D>
__device__ void load_keys(bf16 *stage, const bf16 *k, const bf16 *v, int len) {
#pragma unroll
    for (int i = threadIdx.x % 32; i < DECODE_KEYS * (D / 8); i += 32) {
        const int row = i / (D / 8), column = i % (D / 8) * 8;
        copy16(stage + row * (D + 8) + column, k + row * D + column, row < len);
    }
    stage += DECODE_KEYS * (D + 8);
#pragma unroll
    for (int i = threadIdx.x % 32; i < DECODE_KEYS * (D / 8); i += 32) {
        const int row = i / (D / 8), column = i % (D / 8) * 8;
        copy16(stage + row * (D + 8) + column, v + row * D + column, row < len);
    }
}

// 16 rows (row = new token * group + head of the group; rows row0 .. row_end) over the keys begin .. end of a sequence.
// Each warp has its own 16 keys of every 64 and its own sums; they are merged at the end, in the order of the warps.
template <int D>
__device__ void decode_tile(const AttentionArgs &args, const Partials &partials, int seq, int head, int segment,
                            int row0, int row_end, int begin, int end, unsigned char *memory) {
    const q35_batch &batch = args.batch;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = args.group();
    const int cached = batch.cached_len[seq];
    const int64_t first = batch.query_start[seq];
    const int *pages = batch.pages + batch.page_start[seq];
    bf16 *q_tile = reinterpret_cast<bf16 *>(memory);
    constexpr int STAGE = 2 * DECODE_KEYS * (D + 8);
    bf16 *stages = q_tile + DECODE_ROWS * (D + 8) + warp * STAGES * STAGE;
    __shared__ float2 warp_scales[DECODE_WARPS][DECODE_ROWS];

    __syncthreads();  // the tile before this one is done with the shared memory
    for (int i = threadIdx.x; i < DECODE_ROWS * (D / 8); i += DECODE_THREADS) {
        const int r = i / (D / 8), column = i % (D / 8) * 8, row = row0 + r;
        uint4 words = make_uint4(0, 0, 0, 0);
        if (row < row_end) {
            const int64_t at = (first + row / group) * args.q_heads + head * group + row % group;
            words = *reinterpret_cast<const uint4 *>(args.q + at * D + column);
        }
        *reinterpret_cast<uint4 *>(q_tile + r * (D + 8) + column) = words;
    }

    const int num_tiles = ceil_div(end - begin, DECODE_KEYS);
    auto load = [&](int tile, int stage) {
        if (tile < num_tiles) {
            const int key0 = begin + tile * DECODE_KEYS;
            const int64_t at =
                args.page_at(pages[key0 / Q35_PAGE_LEN], head) + int64_t(key0 % Q35_PAGE_LEN) * D;
            load_keys<D>(stages + stage * STAGE, args.k + at, args.v + at, end - key0);
        }
        copy_commit();
    };
    load(warp, 0);
    load(warp + DECODE_WARPS, 1);
    __syncthreads();  // the queries are there

    int position[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = row0 + lane / 4 + 8 * i;
        position[i] = row < row_end ? cached + row / group : -1;
    }
    float out[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    const bf16 *q_row = q_tile + lane % 16 * (D + 8) + lane / 16 * 8;
    int stage = 0;
    for (int tile = warp; tile < num_tiles; tile += DECODE_WARPS, stage ^= 1) {
        copy_wait<1>();
        __syncwarp();
        const bf16 *keys = stages + stage * STAGE, *values = keys + DECODE_KEYS * (D + 8);
        const bf16 *k_row = keys + (lane / 16 * 8 + lane % 8) * (D + 8) + lane / 8 % 2 * 8;
        const bf16 *v_row = values + lane % 16 * (D + 8) + lane / 16 * 8;
        float s[2][4] = {};
#pragma unroll 8
        for (int k = 0; k < D; k += 16) {
            uint32_t a[4], b[4];
            load_matrices(a, q_row + k);
            load_matrices(b, k_row + k);
            mma(s[0], a, b);
            mma(s[1], a, b + 2);
        }
        const int key0 = begin + tile * DECODE_KEYS;
        softmax_step<2, D>(args, s, key0, position, top, sum, out);
        const uint32_t a0 = pack2(s[0][0], s[0][1]), a1 = pack2(s[0][2], s[0][3]);
        const uint32_t a2 = pack2(s[1][0], s[1][1]), a3 = pack2(s[1][2], s[1][3]);
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t b[4];
            load_matrices_transposed(b, v_row + n * 16);
            mma(out[2 * n], a0, a1, a2, a3, b[0], b[1]);
            mma(out[2 * n + 1], a0, a1, a2, a3, b[2], b[3]);
        }
        __syncwarp();  // the stage is free
        load(tile + STAGES * DECODE_WARPS, stage);
    }

#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 1);
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 2);
        if (lane % 4 == 0) warp_scales[warp][lane / 4 + 8 * i] = make_float2(top[i], sum[i]);
    }
    copy_wait<0>();
    __syncthreads();  // the scales are there, and the stages are free for the sums of the warps
    float *merged = reinterpret_cast<float *>(q_tile + DECODE_ROWS * (D + 8));  // [warp][row][D + 8]
    static_assert(DECODE_WARPS * DECODE_ROWS * (D + 8) * 4 <= DECODE_WARPS * STAGES * STAGE * 2, "sums fit in stages");
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = lane / 4 + 8 * i;
        float highest = -INFINITY;
#pragma unroll
        for (int w = 0; w < DECODE_WARPS; w++) highest = fmaxf(highest, warp_scales[w][r].x);
        const float fade = exp2f(top[i] - (highest == -INFINITY ? 0.0f : highest));
        float *to = merged + (warp * DECODE_ROWS + r) * (D + 8) + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            *reinterpret_cast<float2 *>(to + 8 * n) = make_float2(out[n][2 * i] * fade, out[n][2 * i + 1] * fade);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < DECODE_ROWS * (D / 4); i += DECODE_THREADS) {
        const int r = i / (D / 4), column = i % (D / 4) * 4, row = row0 + r;
        if (row >= row_end) continue;
        float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int w = 0; w < DECODE_WARPS; w++) {
            const float4 x = *reinterpret_cast<const float4 *>(merged + (w * DECODE_ROWS + r) * (D + 8) + column);
            total.x += x.x, total.y += x.y, total.z += x.z, total.w += x.w;
        }
        const int64_t at = partials.at(seq, row / group, segment, args.q_heads) + head * group + row % group;
        *reinterpret_cast<float4 *>(partials.sums + at * D + column) = total;
        if (column == 0) {
            float highest = -INFINITY, weights = 0.0f;
            for (int w = 0; w < DECODE_WARPS; w++) highest = fmaxf(highest, warp_scales[w][r].x);
            const float safe = highest == -INFINITY ? 0.0f : highest;
            for (int w = 0; w < DECODE_WARPS; w++) weights += warp_scales[w][r].y * exp2f(warp_scales[w][r].x - safe);
            partials.scales[at] = make_float2(highest, weights);
        }
    }
}

// Flash-decoding (Dao et al. 2023) with the heads of a key head packed into the rows of a tile; own code.
// blockIdx: sequence and key head, segment, tiles z, z + gridDim.z, ... of the rows.
template <int D>
__global__ void __launch_bounds__(DECODE_THREADS) decode_kernel(AttentionArgs args, Partials partials) {
    extern __shared__ __align__(16) unsigned char memory[];
    const q35_batch &batch = args.batch;
    const int seq = partials.first_seq + blockIdx.x / args.kv_heads, head = blockIdx.x % args.kv_heads;
    const int segment = blockIdx.y, group = args.group();
    const int query_len = batch.query_len[seq], cached = batch.cached_len[seq];
    if (query_len > MAX_DECODE_LEN) return;
    const int most = max_segments(args.kv_heads);
    unsigned tile = 0;
    // Tokens whose segments are of one length, at a time; mostly that is all of them.
    for (int token = 0, next; token < query_len; token = next) {
        const int64_t len = segment_len(cached + token + 1, most);
        next = token + 1;
        while (next < query_len && segment_len(cached + next + 1, most) == len) next++;
        for (int row0 = token * group; row0 < next * group; row0 += DECODE_ROWS, tile++) {
            if (tile % gridDim.z != blockIdx.z) continue;
            const int row_end = min(row0 + DECODE_ROWS, next * group);
            const int64_t begin = segment * len;
            const int64_t end = min(begin + len, int64_t(cached + (row_end - 1) / group + 1));
            if (begin >= end) continue;
            decode_tile<D>(args, partials, seq, head, segment, row0, row_end, int(begin), int(end), memory);
        }
    }
}

// Merges the segments of a token and query head in a fixed order, and gates. A thread has four elements of every
// fourth segment.
template <int D>
__global__ void __launch_bounds__(D) decode_merge_kernel(AttentionArgs args, Partials partials) {
    __shared__ float2 scales[64];
    __shared__ float weights[64];
    __shared__ float4 parts[4][D / 4];
    const q35_batch &batch = args.batch;
    const int seq = partials.first_seq + blockIdx.x / partials.slots_per_seq;
    const int index = blockIdx.x % partials.slots_per_seq, head = blockIdx.y;
    const int query_len = batch.query_len[seq];
    if (query_len > MAX_DECODE_LEN || index >= query_len) return;
    const int len = batch.cached_len[seq] + index + 1;
    const int64_t segment = segment_len(len, max_segments(args.kv_heads));
    const int num = int(ceil_div(len, segment)), t = threadIdx.x;
    const int64_t at = partials.at(seq, index, 0, args.q_heads) + head;
    if (t < num) scales[t] = partials.scales[at + int64_t(t) * args.q_heads];
    __syncthreads();
    float highest = -INFINITY, total = 0.0f;
    for (int i = 0; i < num; i++) highest = fmaxf(highest, scales[i].x);
    const float safe = highest == -INFINITY ? 0.0f : highest;
    if (t < num) weights[t] = exp2f(scales[t].x - safe);
    __syncthreads();
    for (int i = 0; i < num; i++) total += scales[i].y * weights[i];
    const int part = t / (D / 4), column = t % (D / 4) * 4;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int i = part; i < num; i += 4) {
        const float w = weights[i];
        const float4 x =
            *reinterpret_cast<const float4 *>(partials.sums + (at + int64_t(i) * args.q_heads) * D + column);
        sum.x += w * x.x, sum.y += w * x.y, sum.z += w * x.z, sum.w += w * x.w;
    }
    parts[part][column / 4] = sum;
    __syncthreads();
    float value = 0.0f;
    for (int i = 0; i < 4; i++) value += reinterpret_cast<const float *>(parts[i])[t];
    const int64_t token = int64_t(batch.query_start[seq]) + index;
    const float gate = __bfloat162float(args.gate(token, head)[t]);
    args.out[(token * args.q_heads + head) * D + t] = __float2bfloat16_rn(value / total * sigmoid(gate));
}

template <int D>
cudaError_t launch(cudaStream_t stream, const AttentionArgs &args, float *workspace) {
    const q35_batch &batch = args.batch;
    const int slots = batch.max_query_len < MAX_DECODE_LEN ? batch.max_query_len : MAX_DECODE_LEN;
    const int segments = segments_bound(batch.max_kv_len, max_segments(args.kv_heads));
    const int64_t each = slots * floats_per_token(segments, args.q_heads, D);
    const int64_t seqs = MAX_PARTIALS / each > 1 ? MAX_PARTIALS / each : 1;
    // Beside prefill most sequences have one new token: no blocks for tiles of rows that hardly any has.
    const int rows = slots * (args.q_heads / args.kv_heads);
    int tiles = 1;
    if (batch.max_query_len <= MAX_DECODE_LEN) tiles = ceil_div(rows, DECODE_ROWS);
    if (args.q_heads > 65535 || tiles > 65535) return cudaErrorInvalidValue;
    const cudaError_t status = cudaFuncSetAttribute(decode_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    decode_shared_bytes<D>());
    if (status != cudaSuccess) return status;
    for (int64_t first = 0; first < batch.num_seqs; first += seqs) {
        const int64_t left = batch.num_seqs - first, n = left < seqs ? left : seqs;
        float *scales = workspace + n * slots * segments * args.q_heads * D;
        const Partials partials{workspace, reinterpret_cast<float2 *>(scales), segments, slots, int(first)};
        const dim3 grid(unsigned(n * args.kv_heads), unsigned(segments), unsigned(tiles));
        decode_kernel<D><<<grid, DECODE_THREADS, decode_shared_bytes<D>(), stream>>>(args, partials);
        decode_merge_kernel<D>
            <<<dim3(unsigned(n * slots), unsigned(args.q_heads)), D, 0, stream>>>(args, partials);
    }
    return cudaGetLastError();
}

}  // namespace

bool attention_decode_fits(int head_dim, int shared_limit) {
    const int needed = head_dim == 64    ? decode_shared_bytes<64>()
                       : head_dim == 128 ? decode_shared_bytes<128>()
                                         : decode_shared_bytes<256>();
    return needed + 1024 <= shared_limit;  // and the static arrays
}

int64_t attention_decode_workspace(int max_seqs, int max_kv_len, q35_attention_dims dims) {
    const int segments = segments_bound(max_kv_len, max_segments(dims.num_kv_heads));
    // What one sequence needs at the most, and what all need if that is less than the bound of one launch.
    const int64_t one = MAX_DECODE_LEN * floats_per_token(segments, dims.num_q_heads, dims.head_dim);
    const int64_t all = max_seqs * one, most = one > MAX_PARTIALS ? one : MAX_PARTIALS;
    return all < most ? all : most;
}

cudaError_t attention_decode(cudaStream_t stream, const AttentionArgs &args, float *workspace) {
    switch (args.head_dim) {
        case 64: return launch<64>(stream, args, workspace);
        case 128: return launch<128>(stream, args, workspace);
        case 256: return launch<256>(stream, args, workspace);
        default: return cudaErrorInvalidValue;
    }
}
