// The chunked form of the gated delta rule, 64 tokens at a time. With G the running sum of g in a chunk and
// D_ij = exp(G_i - G_j), rq and rk the reciprocal norms (q's with its scale), for one head:
//
//   T    = (I + tril(beta_i D_ij k_i . k_j, -1))^-1 diag(beta)       does not need the state: delta_prepare, all chunks
//   P    = tril(D_ij q_i . k_j)                                      of all heads side by side
//   x    = T (v - diag(exp(G) rk) k S)                               delta_walk, chunk after chunk
//   out  = diag(exp(G) rq) q S + P x
//   S    = exp(G_C) S + k^T diag(exp(G_C - G) rk) x
//
// Every exponent is a difference with the later index first, so none is positive. Rows of q and k go to tensor cores
// as they are, bf16 without a rounding, and their norms into the f32 factors; f32 operands go there as two bf16 parts,
// but for S in q S, which only the output sees (with P and x rounded once too, keys that resemble each other cost 1e-2
// of the output).
//
// Source: Yang et al. 2024 (arXiv:2412.06464), the UT transform as in the flash-linear-attention project; own code.
#include "delta_conv.cuh"

namespace {

// A chunk that is not short has more than SHORT_CHUNK tokens; a sequence has at most one that is not full.
int64_t max_chunks(int64_t tokens, int64_t seqs) {
    const int64_t by_seqs = tokens / C + seqs, by_tokens = tokens / (SHORT_CHUNK + 1);
    return by_seqs < by_tokens ? by_seqs : by_tokens;
}

int64_t plan_floats(int64_t tokens, int64_t seqs) {
    return ceil_div(4 + 2 * max_chunks(tokens, seqs) + seqs, 32) * 32;
}

int64_t factor_floats(int64_t tokens, q35_delta_dims dims) { return ceil_div(4 * dims.num_v_heads * tokens, 32) * 32; }

// One warp. The list of chunks is in the order of the sequences.
__global__ void delta_plan(q35_batch batch, ChunkPlan plan) {
    const int lane = threadIdx.x;
    wait_for_inputs();
    let_next_start();
    int num_chunks = 0, num_seqs = 0;
    for (int base = 0; base < batch.num_seqs; base += 32) {
        const int seq = base + lane;
        const int count = seq < batch.num_seqs ? ceil_div(tokens_in_chunks(batch.chunked_len[seq]), C) : 0;
        int sum = count;
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(ALL_LANES, sum, step);
            if (lane >= step) sum += other;
        }
        const int first = num_chunks + sum - count;
        const unsigned active = __ballot_sync(ALL_LANES, count > 0);
        if (count > 0) plan.seqs[num_seqs + __popc(active & ((1u << lane) - 1))] = seq;
        for (unsigned left = active; left != 0; left &= left - 1) {
            const int from = __ffs(left) - 1;
            const int n = __shfl_sync(ALL_LANES, count, from), at = __shfl_sync(ALL_LANES, first, from);
            for (int i = lane; i < n; i += 32) plan.chunks[at + i] = make_int2(base + from, i);
        }
        num_chunks += __shfl_sync(ALL_LANES, sum, 31);
        num_seqs += __popc(active);
    }
    if (lane == 0) plan.counts[0] = num_chunks, plan.counts[1] = num_seqs;
}

// Eight elements in two bf16 parts.
struct Parts {
    uint4 high, low;
};
__device__ __forceinline__ Parts parts_of(const float x[8]) {
    uint32_t h[4], l[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        h[i] = pack2(x[2 * i], x[2 * i + 1]);
        const float2 rounded = unpack2(h[i]);
        l[i] = pack2(x[2 * i] - rounded.x, x[2 * i + 1] - rounded.y);
    }
    return {make_uint4(h[0], h[1], h[2], h[3]), make_uint4(l[0], l[1], l[2], l[3])};
}

// To shared memory.
__device__ __forceinline__ void split8(bf16 *high, bf16 *low, const float x[8]) {
    const Parts parts = parts_of(x);
    *reinterpret_cast<uint4 *>(high) = parts.high, *reinterpret_cast<uint4 *>(low) = parts.low;
}

// To global memory; by name, since plain stores were made into four of 4 bytes.
__device__ __forceinline__ void store_parts(bf16 *high, bf16 *low, const float x[8]) {
    const Parts parts = parts_of(x);
    __stcg(reinterpret_cast<uint4 *>(high), parts.high), __stcg(reinterpret_cast<uint4 *>(low), parts.low);
}

// What a warp of delta_prepare keeps of its head.
struct HeadGates {
    float g_high[C], g_low[C];  // running sum of g in two parts: exact behind a token of total decay
    float beta[C];
    float to_tile_end[C];  // exp(G_e - G_j) rk_j, where e is the last token of j's sixteen
};

// A head's beta_i D_ij k_i . k_j below the diagonal. Tiles below it in two bf16 parts, laid out as P's; tiles on it in
// f32, by rows, with zeros on and above the diagonal, until their inverses take their place, in two parts, as T's.
struct System {
    bf16 below[2][TILES - 4][TILE];
    union {
        float diagonal[4][TILE];
        bf16 inverse[2][4][TILE];
    };
};

// out [16, 16] += x m^T, both in two parts.
__device__ __forceinline__ void multiply_parts(float (&out)[2][4], const uint32_t (&x)[2][4],
                                               const uint32_t (&m)[2][4]) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
        mma(out[n], x[0], m[0] + 2 * n);
        mma(out[n], x[1], m[0] + 2 * n);
        mma(out[n], x[0], m[1] + 2 * n);
    }
}

template <int K, int WARPS>
struct PrepareShared {
    union {
        struct {
            bf16 q[C][K + 8], k[C][K + 8];
        } rows;
        struct {
            float qk[TILES][TILE], kk[TILES][TILE];  // q_i . k_j and k_i . k_j, tiles by rows
            float rq[C], rk[C];
            HeadGates gates[WARPS];
            System systems[WARPS];
        } made;
    };
};

// T, P and the factors of a chunk for the value heads of one key head, with nothing of the state: the UT transform of
// Yang et al. 2024, by an inverse in f32. The products of q and k are the block's, then each warp has a head. With CONV
// the block first convolves the channels of all of these heads. Own code.
template <int K, int WARPS, bool CONV>
__global__ __launch_bounds__(32 * WARPS, WARPS == 4 ? 3 : 5) void delta_prepare(DeltaArgs args, ConvInputs conv,
                                                                                 ChunkPlan plan) {
    constexpr int THREADS = 32 * WARPS, STRIPES = 4 / WARPS, PER_ROW = THREADS / C;
    extern __shared__ __align__(16) unsigned char raw[];
    PrepareShared<K, WARPS> &s = *reinterpret_cast<PrepareShared<K, WARPS> *>(raw);
    const q35_delta_dims d = args.dims;
    const int slot = blockIdx.x / d.num_k_heads, k_head = blockIdx.x % d.num_k_heads;
    const int sharing = d.num_v_heads / d.num_k_heads;
    wait_for_inputs();
    let_next_start();
    if (slot >= plan.counts[0]) return;
    const int2 which = plan.chunks[slot];
    const int seq = which.x;
    const int len = min(C, tokens_in_chunks(args.batch.chunked_len[seq]) - which.y * C);
    const int64_t first = args.batch.query_start[seq] + static_cast<int64_t>(which.y) * C;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    if constexpr (CONV) {
        convolve_chunk<K, K + 8, THREADS>(args, conv, args.batch.slot[seq], which.y == 0, first, len, k_head, s.rows.q,
                                          s.rows.k);
    } else {
        const bf16 *q_rows = args.mixed + first * args.channels + k_head * K, *k_rows = q_rows + d.num_k_heads * K;
        copy_rows<K, K + 8, THREADS>(tid, &s.rows.q[0][0], q_rows, args.channels, len);
        copy_rows<K, K + 8, THREADS>(tid, &s.rows.k[0][0], k_rows, args.channels, len);
        copy_commit();
        copy_wait<0>();
    }
    __syncthreads();

    float rq, rk;  // of row tid / PER_ROW
    {
        const int row = tid / PER_ROW, part = tid % PER_ROW * (K / PER_ROW);
        float qq = 0.0f, kk = 0.0f;
#pragma unroll
        for (int i = 0; i < K / PER_ROW; i += 8) {
            float q[8], k[8];
            load8(&s.rows.q[row][part + i], q);
            load8(&s.rows.k[row][part + i], k);
#pragma unroll
            for (int j = 0; j < 8; j++) qq = fmaf(q[j], q[j], qq), kk = fmaf(k[j], k[j], kk);
        }
        rq = rsqrtf(static_cast<float>(K)) / sqrtf(lane_sum<PER_ROW>(qq) + L2_EPS);
        rk = 1.0f / sqrtf(lane_sum<PER_ROW>(kk) + L2_EPS);
    }

    // q k^T and k k^T, lower triangles: a warp has 16 rows, or the first and the last 16 of what is left.
    float qk[STRIPES][C / 8][4] = {}, kk[STRIPES][C / 8][4] = {};
#pragma unroll
    for (int i = 0; i < STRIPES; i++) {
        const int stripe = i == 0 ? warp : 3 - warp;
        const int a_row = 16 * stripe + lane % 16, a_column = lane / 16 * 8;
        const int b_row = lane % 8 + lane / 16 * 8, b_column = lane / 8 % 2 * 8;
#pragma unroll
        for (int x = 0; x < K; x += 16) {
            uint32_t qa[4], ka[4];
            load_matrices(qa, &s.rows.q[a_row][x + a_column]);
            load_matrices(ka, &s.rows.k[a_row][x + a_column]);
#pragma unroll
            for (int n = 0; n < C / 8; n += 2)
                if (n / 2 <= stripe) {
                    uint32_t b[4];
                    load_matrices(b, &s.rows.k[8 * n + b_row][x + b_column]);
                    mma(qk[i][n], qa, b);
                    mma(qk[i][n + 1], qa, b + 2);
                    mma(kk[i][n], ka, b);
                    mma(kk[i][n + 1], ka, b + 2);
                }
        }
    }
    __syncthreads();  // the rows are read, `made` takes their place
    if (tid % PER_ROW == 0) s.made.rq[tid / PER_ROW] = rq, s.made.rk[tid / PER_ROW] = rk;
#pragma unroll
    for (int i = 0; i < STRIPES; i++) {
        const int stripe = i == 0 ? warp : 3 - warp;
#pragma unroll
        for (int n = 0; n < C / 8; n++)
            if (n / 2 <= stripe)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int tile = tile_number(stripe, n / 2);
                    const int at = (8 * half + lane / 4) * 16 + n % 2 * 8 + lane % 4 * 2;
                    const float *q2 = &qk[i][n][2 * half], *k2 = &kk[i][n][2 * half];
                    *reinterpret_cast<float2 *>(&s.made.qk[tile][at]) = make_float2(q2[0], q2[1]);
                    *reinterpret_cast<float2 *>(&s.made.kk[tile][at]) = make_float2(k2[0], k2[1]);
                }
    }
    __syncthreads();

    HeadGates &gates = s.made.gates[warp];
    System &system = s.made.systems[warp];
    const int tiles = num_tiles(len), stripes = ceil_div(len, 16);
    for (int member = warp; member < sharing; member += WARPS) {
        const int head = k_head * sharing + member;
        __syncwarp();  // the last head's gates and system are read
        {
            // Tokens 2 lane and 2 lane + 1. Past the end: no decay, no write.
            double g[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int i = 2 * lane + j;
                const bf16 *ba = args.projected + (first + (i < len ? i : 0)) * args.stride + args.ba_start;
                g[j] = i < len ? log_decay(args, ba, head) : 0.0f;
                gates.beta[i] = i < len ? write_strength(ba, head) : 0.0f;
            }
            double sum = g[0] + g[1];
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const double other = __shfl_up_sync(ALL_LANES, sum, step);
                if (lane >= step) sum += other;
            }
            double before = __shfl_up_sync(ALL_LANES, sum, 1);
            if (lane == 0) before = 0.0;
            const double sums[2] = {before + g[0], sum};
            const double all = __shfl_sync(ALL_LANES, sum, 31);  // past the end g is 0: the chunk's
            const double tile_end = __shfl_sync(ALL_LANES, sum, lane / 8 * 8 + 7);
            float4 *factors = plan.factors_of(args.batch.num_tokens, head, first);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int i = 2 * lane + j;
                const float high = static_cast<float>(sums[j]);
                gates.g_high[i] = high;
                gates.g_low[i] = static_cast<float>(sums[j] - high);
                gates.to_tile_end[i] = expf(static_cast<float>(tile_end - sums[j])) * s.made.rk[i];
                const float from_start = expf(high), to_end = expf(static_cast<float>(all - sums[j]));
                if (i < len)
                    factors[i] = make_float4(s.made.rq[i] * from_start, s.made.rk[i] * from_start,
                                             s.made.rk[i] * to_end, expf(static_cast<float>(all)));
            }
        }
        __syncwarp();

        // Half a row of a tile a lane.
        bf16 *out = plan.tiles_of(args.batch.num_tokens, head, first);
        const int row = lane / 2, half = lane % 2;
#pragma unroll
        for (int r = 0; r < C / 16; r++) {
            const int i = 16 * r + row;
            const float gi_high = gates.g_high[i], gi_low = gates.g_low[i];
            const float rq_i = s.made.rq[i], write = gates.beta[i] * s.made.rk[i];
#pragma unroll
            for (int c = 0; c <= r; c++) {
                const int tile = tile_number(r, c), j0 = 16 * c + 8 * half;
                float pair[8], coupling[8];
                load8(&s.made.qk[tile][16 * row + 8 * half], pair);
                load8(&s.made.kk[tile][16 * row + 8 * half], coupling);
                if (c < r) {
                    // exp(G_i - G_e) exp(G_e - G_j): neither exponent is positive.
                    const int end = 16 * c + 15;
                    const float decay = __expf((gi_high - gates.g_high[end]) + (gi_low - gates.g_low[end]));
                    float column[8];
                    load8(&gates.to_tile_end[j0], column);
#pragma unroll
                    for (int e = 0; e < 8; e++) {
                        pair[e] *= rq_i * decay * column[e];
                        coupling[e] *= write * decay * column[e];
                    }
                } else {
                    float gj_high[8], gj_low[8], rk_j[8];
                    load8(&gates.g_high[j0], gj_high);
                    load8(&gates.g_low[j0], gj_low);
                    load8(&s.made.rk[j0], rk_j);
#pragma unroll
                    for (int e = 0; e < 8; e++) {
                        const int j = j0 + e;
                        // Above the diagonal the exponent would be positive: not taken.
                        const float exponent = (gi_high - gj_high[e]) + (gi_low - gj_low[e]);
                        const float scale = __expf(fminf(exponent, 0.0f)) * rk_j[e];
                        pair[e] = j <= i ? pair[e] * rq_i * scale : 0.0f;
                        coupling[e] = j < i ? coupling[e] * write * scale : 0.0f;
                    }
                }
                if (c < r) {
                    const int below = tile_number(r - 1, c), at = 128 * half + 8 * row;
                    split8(&system.below[0][below][at], &system.below[1][below][at], coupling);
                } else {
                    store8(&system.diagonal[r][16 * row + 8 * half], coupling);
                }
                if (r < stripes) {
                    bf16 *p = out + (P_HIGH * tiles + tile) * TILE + 128 * half + 8 * row;
                    store_parts(p, p + tiles * TILE, pair);
                }
            }
        }
        __syncwarp();

        // The inverse of a tile of the diagonal by forward substitution: a lane has a column of two tiles, all of it in
        // registers.
        {
            const int first_tile = lane / 16, column = lane % 16;
            float x[2][16];
#pragma unroll
            for (int i = 0; i < 16; i++)
#pragma unroll
                for (int u = 0; u < 2; u++) {
                    const float *a = &system.diagonal[first_tile + 2 * u][16 * i];
                    float acc[4] = {column == i ? -1.0f : 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                    for (int j = 0; j < i; j++) acc[j % 4] = fmaf(a[j], x[u][j], acc[j % 4]);
                    x[u][i] = -((acc[0] + acc[1]) + (acc[2] + acc[3]));
                }
            __syncwarp();
#pragma unroll
            for (int u = 0; u < 2; u++) {
                const int r = first_tile + 2 * u;
                const float beta = gates.beta[16 * r + column];
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int at = 128 * h + 8 * column;
                    float t[8];
#pragma unroll
                    for (int e = 0; e < 8; e++) t[e] = x[u][8 * h + e];
                    split8(&system.inverse[0][r][at], &system.inverse[1][r][at], t);
#pragma unroll
                    for (int e = 0; e < 8; e++) t[e] *= beta;
                    bf16 *to = out + tile_number(r, r) * TILE + at;
                    if (r < stripes) store_parts(to, to + tiles * TILE, t);
                }
            }
            __syncwarp();
        }

        // The tiles below, down each column c, transposed: X_rc = -(sum of X_kc A_rk^T over c <= k < r) X_rr.
        const int t_at = 8 * lane, p_at = lane / 8 % 2 * 128 + lane / 16 * 64 + lane % 8 * 8;
#pragma unroll
        for (int c = 0; c < 3; c++) {
            uint32_t x[4][2][4];
#pragma unroll
            for (int part = 0; part < 2; part++) load_matrices(x[c][part], &system.inverse[part][c][t_at]);
            const float beta[2] = {gates.beta[16 * c + lane / 4], gates.beta[16 * c + 8 + lane / 4]};
#pragma unroll
            for (int r = c + 1; r < 4; r++) {
                float sum[2][4] = {}, found[2][4] = {};
                uint32_t m[2][4], sums[2][4];
#pragma unroll
                for (int k = c; k < r; k++) {
#pragma unroll
                    for (int part = 0; part < 2; part++)
                        load_matrices(m[part], &system.below[part][tile_number(r - 1, k)][p_at]);
                    multiply_parts(sum, x[k], m);
                }
#pragma unroll
                for (int part = 0; part < 2; part++)
                    load_matrices_transposed(m[part], &system.inverse[part][r][t_at]);
                split(sum, sums[0], sums[1]);
                multiply_parts(found, sums, m);
                bf16 *to = out + tile_number(r, c) * TILE + lane / 4 * 8 + lane % 4 * 2;
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        float *e = &found[n][2 * half];
                        e[0] = -e[0], e[1] = -e[1];
                        const float t0 = e[0] * beta[half], t1 = e[1] * beta[half];
                        const uint32_t high = pack2(t0, t1);
                        const float2 rounded = unpack2(high);
                        uint32_t *place = reinterpret_cast<uint32_t *>(to + 128 * n + 64 * half);
                        if (r < stripes) {
                            place[0] = high;
                            place[tiles * TILE / 2] = pack2(t0 - rounded.x, t1 - rounded.y);
                        }
                    }
                split(found, x[r][0], x[r][1]);
            }
        }
    }
}

template <int K, int WARPS, bool CONV>
cudaError_t launch_prepare(cudaStream_t stream, const DeltaArgs &args, const ConvInputs &conv, const ChunkPlan &plan) {
    const int64_t chunks = max_chunks(args.batch.num_tokens, args.batch.num_seqs);
    const int shared = sizeof(PrepareShared<K, WARPS>);
    const cudaError_t error =
        cudaFuncSetAttribute(delta_prepare<K, WARPS, CONV>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
    const unsigned blocks = static_cast<unsigned>(chunks * args.dims.num_k_heads);
    return launch(delta_prepare<K, WARPS, CONV>, blocks, 32 * WARPS, shared, stream, args, conv, plan);
}

}  // namespace

int64_t chunk_workspace(int64_t tokens, int64_t seqs, q35_delta_dims dims) {
    // 32 more, to begin at a multiple of 128 bytes wherever the workspace does.
    return 32 + plan_floats(tokens, seqs) + factor_floats(tokens, dims) +
           dims.num_v_heads * tiles_before(tokens) * (NUM_PARTS * TILE / 2);
}

cudaError_t launch_chunks(cudaStream_t stream, const DeltaArgs &args, const ConvInputs *conv, float *workspace) {
    const int64_t tokens = args.batch.num_tokens, seqs = args.batch.num_seqs;
    if (max_chunks(tokens, seqs) == 0) return cudaSuccess;
    float *base = reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(workspace) + 127) / 128 * 128);
    int32_t *ints = reinterpret_cast<int32_t *>(base);
    ChunkPlan plan;
    plan.counts = ints;
    plan.chunks = reinterpret_cast<int2 *>(ints + 4);
    plan.seqs = ints + 4 + 2 * max_chunks(tokens, seqs);
    plan.factors = reinterpret_cast<float4 *>(base + plan_floats(tokens, seqs));
    plan.tiles = reinterpret_cast<bf16 *>(base + plan_floats(tokens, seqs) + factor_floats(tokens, args.dims));
    cudaError_t error = launch(delta_plan, 1, 32, 0, stream, args.batch, plan);
    if (error != cudaSuccess) return error;
    const bool many = args.dims.num_v_heads / args.dims.num_k_heads > 2;
    if (conv != nullptr)
        error = (many ? launch_prepare<128, 4, true> : launch_prepare<128, 2, true>)(stream, args, *conv, plan);
    else if (args.dims.k_dim == 64)
        error = (many ? launch_prepare<64, 4, false> : launch_prepare<64, 2, false>)(stream, args, {}, plan);
    else
        error = (many ? launch_prepare<128, 4, false> : launch_prepare<128, 2, false>)(stream, args, {}, plan);
    if (error != cudaSuccess) return error;
    const int64_t by_tokens = tokens / (SHORT_CHUNK + 1);
    return launch_walks(stream, args, plan, seqs < by_tokens ? seqs : by_tokens);
}
