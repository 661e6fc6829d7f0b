// The chunked form of the gated delta rule, 64 tokens at a time. With G the running sum of g in a chunk and
// D_ij = exp(G_i - G_j), rq and rk the reciprocal norms (q's with its scale), for one head:
//
//   T    = (I + tril(beta_i D_ij k_i . k_j, -1))^-1 diag(beta)       does not need the state: delta_prepare, all chunks
//   P    = tril(D_ij q_i . k_j)                                      of all heads side by side
//   x    = T (v - diag(exp(G) rk) k S)                               delta_walk, chunk after chunk
//   out  = diag(exp(G) rq) q S + P x
//   S    = exp(G_C) S + k^T diag(exp(G_C - G) rk) x
//
// Every exponent is a difference with the later index first, so none is positive. Rows of q and k go to the tensor cores
// as they are, bf16 without a rounding, and their norms into the f32 factors; f32 operands go there as two bf16 parts,
// but for S in q S, which only the output sees (with P and x rounded once too, keys that resemble each other cost 1e-2
// of the output).
//
// Source: Yang et al. 2024 (arXiv:2412.06464), the UT transform as in the flash-linear-attention project; own code.
#include "delta.cuh"
#include "mma.cuh"

namespace {

constexpr int C = Q35_CHUNK_LEN;
constexpr int MAX_WALK_BLOCKS = 2048;

// T and P as tiles of 16 x 16 on and below the diagonal: tile (row, column) is number row (row + 1) / 2 + column. In a
// tile of P the eight columns of half h of row i are together at 128 h + 8 i, in one of T the eight rows of half h of
// column j at 128 h + 8 j: as they come about, and as eight addresses of 16 bytes in a row for ldmatrix.
constexpr int TILES = 10, TILE = 16 * 16;
enum Part { T_HIGH, T_LOW, P_HIGH, P_LOW, NUM_PARTS };

__host__ __device__ __forceinline__ constexpr int tile_number(int row, int column) {
    return row * (row + 1) / 2 + column;
}

// Of a chunk of `len` tokens, with the rows it has.
__host__ __device__ __forceinline__ constexpr int num_tiles(int len) { return tile_number(ceil_div(len, 16), 0); }

// Where the tiles of a chunk lie that begins at token t of the batch: a chunk of more than SHORT_CHUNK tokens has at most
// 10 tiles for 49 of them, and as many fit between its first token and the next chunk's.
__host__ __device__ __forceinline__ constexpr int64_t tiles_before(int64_t t) { return ceil_div(10 * t, 49); }

// The workspace. First which chunks there are, counted on the device, since the host may not read chunked_len.
struct Plan {
    int32_t *counts;  // chunks, sequences that have any
    int32_t *seqs;    // [num_seqs]: a sequence that has chunks
    int2 *chunks;     // [max_chunks]: sequence, index of the chunk in it
    float4 *factors;  // [V, num_tokens]: exp(G) rq, exp(G) rk, exp(G_C - G) rk, exp(G_C)
    bf16 *tiles;      // [V, tiles_before(num_tokens), NUM_PARTS, TILE], a chunk's by parts

    __device__ __forceinline__ float4 *factors_of(int64_t num_tokens, int head, int64_t first) const {
        return factors + head * num_tokens + first;
    }
    __device__ __forceinline__ bf16 *tiles_of(int64_t num_tokens, int head, int64_t first) const {
        return tiles + (head * tiles_before(num_tokens) + tiles_before(first)) * (NUM_PARTS * TILE);
    }
};

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
__global__ void delta_plan(q35_batch batch, Plan plan) {
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

// Two neighbouring accumulator tiles [16, 8] as one A operand [16, 16], in two bf16 parts.
__device__ __forceinline__ void split(const float (*c)[4], uint32_t high[4], uint32_t low[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float *x = &c[i / 2][i % 2 * 2];
        high[i] = pack2(x[0], x[1]);
        const float2 h = unpack2(high[i]);
        low[i] = pack2(x[0] - h.x, x[1] - h.y);
    }
}

// out [16, 64] += x [16, 64] m^T for a lower triangular m in two parts of tiles, x in A operands of two parts. Without
// low by low, which is under f32's own rounding. `at`: a lane's place in a tile.
template <bool TRANSPOSED>
__device__ __forceinline__ void multiply_lower(float (*out)[4], const uint32_t (*high)[4], const uint32_t (*low)[4],
                                               const bf16 (*m)[TILES][TILE], int at) {
#pragma unroll
    for (int jj = 0; jj < C / 16; jj++)
#pragma unroll
        for (int part = 0; part < 2; part++) {
            uint32_t b[C / 16][4];
#pragma unroll
            for (int row = jj; row < C / 16; row++) {
                const bf16 *tile = &m[part][tile_number(row, jj)][at];
                if (TRANSPOSED)
                    load_matrices_transposed(b[row], tile);
                else
                    load_matrices(b[row], tile);
            }
#pragma unroll
            for (int with = 0; with < 2 - part; with++)
#pragma unroll
                for (int row = jj; row < C / 16; row++) {
                    const uint32_t *a = with == 0 ? high[jj] : low[jj];
                    mma(out[2 * row], a, b[row]);
                    mma(out[2 * row + 1], a, b[row] + 2);
                }
        }
}

// WIDTH columns of 64 rows, those from `len` on zeros, by threads 0 .. THREADS - 1. The source of a zero is `from` itself:
// an address that is valid.
template <int WIDTH, int LD, int THREADS>
__device__ __forceinline__ void copy_rows(int thread, bf16 *to, const bf16 *from, int64_t stride, int len) {
    constexpr int ACROSS = WIDTH / 8, STEP = THREADS / ACROSS;
    static_assert(THREADS % ACROSS == 0 && C % STEP == 0, "a thread stays in its column");
    const int row = thread / ACROSS, column = thread % ACROSS * 8;
    const bf16 *source = from + row * stride + column;
    to += row * LD + column;
#pragma unroll 4
    for (int r = 0; r < C; r += STEP) {
        const bool there = row + r < len;
        copy16(to + r * LD, there ? source : from, there);
        source += STEP * stride;
    }
}

// What a warp of delta_prepare keeps of its head.
struct HeadGates {
    float g_high[C], g_low[C];  // running sum of g in two parts: exact behind a token of total decay
    float beta[C];
};

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
        } made;
    };
    float system[WARPS][TILES][TILE];  // beta_i D_ij k_i . k_j below the diagonal, zeros on and above it
};

// T, P and the factors of a chunk for the value heads of one key head, with nothing of the state: the UT transform of
// Yang et al. 2024, by an inverse in f32. The products of q and k are the block's, then each warp has a head. Own code.
template <int K, int WARPS>
__global__ __launch_bounds__(32 * WARPS, 12 / WARPS) void delta_prepare(DeltaArgs args, Plan plan) {
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
    const bf16 *q_rows = args.mixed + first * args.channels + k_head * K, *k_rows = q_rows + d.num_k_heads * K;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    copy_rows<K, K + 8, THREADS>(tid, &s.rows.q[0][0], q_rows, args.channels, len);
    copy_rows<K, K + 8, THREADS>(tid, &s.rows.k[0][0], k_rows, args.channels, len);
    copy_commit();
    copy_wait<0>();
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
    float(*system)[TILE] = s.system[warp];
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
            float4 *factors = plan.factors_of(args.batch.num_tokens, head, first);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int i = 2 * lane + j;
                const float high = static_cast<float>(sums[j]);
                gates.g_high[i] = high;
                gates.g_low[i] = static_cast<float>(sums[j] - high);
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
                float pair[8], coupling[8], gj_high[8], gj_low[8], rk_j[8];
                load8(&s.made.qk[tile][16 * row + 8 * half], pair);
                load8(&s.made.kk[tile][16 * row + 8 * half], coupling);
                load8(&gates.g_high[j0], gj_high);
                load8(&gates.g_low[j0], gj_low);
                load8(&s.made.rk[j0], rk_j);
                float rest[8];
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    const int j = j0 + e;
                    // Above the diagonal the exponent would be positive: not taken at all.
                    const float decay = j <= i ? __expf((gi_high - gj_high[e]) + (gi_low - gj_low[e])) : 0.0f;
                    const float scale = decay * rk_j[e];
                    pair[e] = j <= i ? pair[e] * rq_i * scale : 0.0f;
                    coupling[e] = j < i ? coupling[e] * write * scale : 0.0f;
                    rest[e] = pair[e] - __bfloat162float(__float2bfloat16(pair[e]));
                }
                store8(&system[tile][16 * row + 8 * half], coupling);
                if (r < stripes) {
                    bf16 *p = out + (P_HIGH * tiles + tile) * TILE + 128 * half + 8 * row;
                    store8(p, pair);
                    store8(p + tiles * TILE, rest);
                }
            }
        }
        __syncwarp();

        // Forward substitution: a lane has columns lane and lane + 32 of the inverse, the second from row 32 on, all of
        // it in registers; four sums each to shorten the chains.
        float x[C], y[C / 2];
#pragma unroll
        for (int i = 0; i < C; i++) {
            float acc[4] = {lane == i ? -1.0f : 0.0f, 0.0f, 0.0f, 0.0f};
            float acc2[4] = {lane + 32 == i ? -1.0f : 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int j = 0; j < i; j++) {
                // A tile's rows are 16-byte aligned: the compiler makes one load of four.
                const float a = system[tile_number(i / 16, j / 16)][i % 16 * 16 + j % 16];
                acc[j % 4] = fmaf(a, x[j], acc[j % 4]);
                if (j >= 32) acc2[j % 4] = fmaf(a, y[j - 32], acc2[j % 4]);
            }
            x[i] = -((acc[0] + acc[1]) + (acc[2] + acc[3]));
            if (i >= 32) y[i - 32] = -((acc2[0] + acc2[1]) + (acc2[2] + acc2[3]));
        }
        const float beta[2] = {gates.beta[lane], gates.beta[lane + 32]};
#pragma unroll
        for (int second = 0; second < 2; second++)
#pragma unroll
            for (int r = 2 * second; r < C / 16; r++) {
                const int c = 2 * second + lane / 16;
                if (c <= r && r < stripes)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        float t[8], rest[8];
#pragma unroll
                        for (int e = 0; e < 8; e++) {
                            const int i = 16 * r + 8 * h + e;
                            t[e] = (second ? y[i - 32] : x[i]) * beta[second];
                            rest[e] = t[e] - __bfloat162float(__float2bfloat16(t[e]));
                        }
                        bf16 *to = out + tile_number(r, c) * TILE + 128 * h + 8 * (lane % 16);
                        store8(to, t);
                        store8(to + tiles * TILE, rest);
                    }
            }
    }
}

// V: columns of values of a block, 16 for two warps.
template <int K, int V>
struct WalkStage {
    bf16 q[C][K + 8], k[C][K + 8];
    bf16 v[C][V + 8];
    bf16 tiles[NUM_PARTS][TILES][TILE];
    float4 factors[C];
};
template <int K, int V, int STAGES>
struct WalkShared {
    WalkStage<K, V> stages[STAGES];
    uint4 state[V / 16][K / 16][32];  // S of 16 columns as A operands, its high part
    uint4 x[V / 16][C / 16][2][32];   // the same of x, two parts
};

__device__ __forceinline__ uint4 as_uint4(const uint32_t a[4]) { return make_uint4(a[0], a[1], a[2], a[3]); }

// Walks the chunks of (sequence, head, V columns). Half of the warps have the recurrence: each keeps 16 columns of the
// state, transposed, in the accumulators of its mma from the first chunk to the last, and each product's result is the
// left operand of the next. The other half loads the next chunk and has the output of the same columns, of the operands
// that its partner leaves in shared memory. Chunkwise form of Yang et al. 2024; own code.
template <int K, int V, int STAGES>
__global__ __launch_bounds__(4 * V) void delta_walk(DeltaArgs args, Plan plan) {
    constexpr int LOADERS = 2 * V, N = C / 8;
    extern __shared__ __align__(16) unsigned char raw[];
    WalkShared<K, V, STAGES> &s = *reinterpret_cast<WalkShared<K, V, STAGES> *>(raw);
    const q35_delta_dims d = args.dims;
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32 % (V / 16), loader = tid - LOADERS;
    const bool recurrent = loader < 0;
    // Places in a lane's ldmatrix: right operand with rows n (16 rows, 16 columns), its transposed form, tiles.
    const int b_row = lane % 8 + lane / 16 * 8, b_column = lane / 8 % 2 * 8;
    const int kt_row = lane % 16, kt_column = lane / 16 * 8;
    const int t_at = 8 * lane, p_at = lane / 8 % 2 * 128 + lane / 16 * 64 + lane % 8 * 8;
    wait_for_inputs();
    let_next_start();
    const int slices = d.v_dim / V;
    const int64_t items = static_cast<int64_t>(plan.counts[1]) * d.num_v_heads * slices;

    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const int slice = item % slices, head = item / slices % d.num_v_heads;
        const int seq = plan.seqs[item / slices / d.num_v_heads];
        const int tokens = tokens_in_chunks(args.batch.chunked_len[seq]), chunks = ceil_div(tokens, C);
        const int k_head = head / (d.num_v_heads / d.num_k_heads);
        const int64_t first = args.batch.query_start[seq];

        const auto load = [&](int chunk) {
            WalkStage<K, V> &stage = s.stages[chunk % STAGES];
            const int64_t start = first + static_cast<int64_t>(chunk) * C;
            const int len = min(tokens - chunk * C, C), tiles = num_tiles(len);
            const bf16 *row = args.mixed + start * args.channels;
            copy_rows<K, K + 8, LOADERS>(loader, &stage.k[0][0], row + (d.num_k_heads + k_head) * K, args.channels, len);
            copy_rows<V, V + 8, LOADERS>(loader, &stage.v[0][0],
                                         row + 2 * d.num_k_heads * K + head * d.v_dim + slice * V, args.channels, len);
            copy_rows<K, K + 8, LOADERS>(loader, &stage.q[0][0], row + k_head * K, args.channels, len);
            const float4 *factors = plan.factors_of(args.batch.num_tokens, head, start);
            for (int i = loader; i < C; i += LOADERS)
                copy16(&stage.factors[i], factors + (i < len ? i : 0), i < len);
            const bf16 *from = plan.tiles_of(args.batch.num_tokens, head, start);
            constexpr int PIECES = TILES * TILE / 8;
#pragma unroll
            for (int part = 0; part < NUM_PARTS; part++)
                for (int i = loader; i < PIECES; i += LOADERS) {
                    const bool there = i < tiles * (TILE / 8);
                    copy16(&stage.tiles[part][0][8 * i], from + (there ? part * tiles * TILE + 8 * i : 0), there);
                }
            copy_commit();
        };

        __syncthreads();  // the last item's shared memory is read
        if (!recurrent && STAGES > 1) load(0);

        // Accumulator tile n, thread (g = lane / 4, t = lane % 4): rows (value columns) g and g + 8 of state columns
        // (key elements) 8 n + 2 t, + 1.
        float *state = args.states +
                       (static_cast<int64_t>(args.batch.slot[seq]) * d.num_v_heads + head) * K * d.v_dim +
                       slice * V + warp * 16 + lane / 4;
        float st[K / 8][4];
        const auto publish_state = [&] {
#pragma unroll
            for (int kk = 0; kk < K / 16; kk++) {
                const float(*c)[4] = &st[2 * kk];
                s.state[warp][kk][lane] = make_uint4(pack2(c[0][0], c[0][1]), pack2(c[0][2], c[0][3]),
                                                     pack2(c[1][0], c[1][1]), pack2(c[1][2], c[1][3]));
            }
        };
        if (recurrent) {
#pragma unroll
            for (int n = 0; n < K / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    st[n][e] = state[(8 * n + lane % 4 * 2 + e % 2) * d.v_dim + e / 2 * 8];
            publish_state();
        }

        for (int chunk = 0; chunk < chunks; chunk++) {
            WalkStage<K, V> &stage = s.stages[chunk % STAGES];
            if (STAGES == 1) {
                __syncthreads();  // nobody reads the last chunk any more
                if (!recurrent) load(chunk);
            }
            copy_wait<0>();
            __syncthreads();  // this chunk and the state are there, and nobody reads the last chunk any more
            if (recurrent) {
                float x[N][4] = {};  // (k S)^T [16, 64]
#pragma unroll
                for (int kk = 0; kk < K / 16; kk++) {
                    uint32_t high[4], low[4], b[N / 2][4];
                    split(&st[2 * kk], high, low);
#pragma unroll
                    for (int n = 0; n < N / 2; n++)
                        load_matrices(b[n], &stage.k[16 * n + b_row][16 * kk + b_column]);
#pragma unroll
                    for (int n = 0; n < N; n++) mma(x[n], high, b[n / 2] + n % 2 * 2);
#pragma unroll
                    for (int n = 0; n < N; n++) mma(x[n], low, b[n / 2] + n % 2 * 2);
                }
                // x = v - factor (k S).
#pragma unroll
                for (int n = 0; n < N; n += 2) {
                    uint32_t v[4];
                    load_matrices_transposed(v, &stage.v[8 * n + b_row][16 * warp + b_column]);
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        const int i = 8 * (n + m) + lane % 4 * 2;
                        const float f0 = stage.factors[i].y, f1 = stage.factors[i + 1].y;
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            const float2 value = unpack2(v[2 * m + half]);
                            float *e = &x[n + m][2 * half];
                            e[0] = fmaf(-f0, e[0], value.x), e[1] = fmaf(-f1, e[1], value.y);
                        }
                    }
                }
                uint32_t high[C / 16][4], low[C / 16][4];
#pragma unroll
                for (int jj = 0; jj < C / 16; jj++) split(&x[2 * jj], high[jj], low[jj]);
                float y[N][4] = {};  // the x of above
                multiply_lower<true>(y, high, low, &stage.tiles[T_HIGH], t_at);
#pragma unroll
                for (int jj = 0; jj < C / 16; jj++) {
                    split(&y[2 * jj], high[jj], low[jj]);
                    s.x[warp][jj][0][lane] = as_uint4(high[jj]);
                    s.x[warp][jj][1][lane] = as_uint4(low[jj]);
                }
                named_sync<64>(1 + warp);  // x is there, and the partner has read the state

                // S^T = exp(G_C) S^T + (factor x)^T k.
                const float decay = stage.factors[0].w;
#pragma unroll
                for (int n = 0; n < K / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) st[n][e] *= decay;
#pragma unroll
                for (int jj = 0; jj < C / 16; jj++) {
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        const int i = 16 * jj + 8 * m + lane % 4 * 2;
                        const float f0 = stage.factors[i].z, f1 = stage.factors[i + 1].z;
                        float *e = y[2 * jj + m];
                        e[0] *= f0, e[1] *= f1, e[2] *= f0, e[3] *= f1;
                    }
                    split(&y[2 * jj], high[jj], low[jj]);
#pragma unroll
                    for (int n = 0; n < K / 8; n += 4) {
                        uint32_t b[8];
                        load_matrices_transposed(b, &stage.k[16 * jj + kt_row][8 * n + kt_column]);
                        load_matrices_transposed(b + 4, &stage.k[16 * jj + kt_row][8 * n + 16 + kt_column]);
#pragma unroll
                        for (int m = 0; m < 4; m++) mma(st[n + m], high[jj], b + 2 * m);
#pragma unroll
                        for (int m = 0; m < 4; m++) mma(st[n + m], low[jj], b + 2 * m);
                    }
                }
                publish_state();
            } else {
                if (STAGES > 1 && chunk + 1 < chunks) load(chunk + 1);
                float o[N][4] = {};  // (q S)^T [16, 64]
#pragma unroll
                for (int kk = 0; kk < K / 16; kk++) {
                    const uint4 a = s.state[warp][kk][lane];
                    uint32_t b[N / 2][4];
#pragma unroll
                    for (int n = 0; n < N / 2; n++)
                        load_matrices(b[n], &stage.q[16 * n + b_row][16 * kk + b_column]);
#pragma unroll
                    for (int n = 0; n < N; n++)
                        mma(o[n], a.x, a.y, a.z, a.w, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
                }
#pragma unroll
                for (int n = 0; n < N; n++) {
                    const int i = 8 * n + lane % 4 * 2;
                    const float f0 = stage.factors[i].x, f1 = stage.factors[i + 1].x;
                    o[n][0] *= f0, o[n][1] *= f1, o[n][2] *= f0, o[n][3] *= f1;
                }
                named_sync<64>(1 + warp);
                uint32_t high[C / 16][4], low[C / 16][4];
#pragma unroll
                for (int jj = 0; jj < C / 16; jj++) {
                    const uint4 a = s.x[warp][jj][0][lane], b = s.x[warp][jj][1][lane];
                    high[jj][0] = a.x, high[jj][1] = a.y, high[jj][2] = a.z, high[jj][3] = a.w;
                    low[jj][0] = b.x, low[jj][1] = b.y, low[jj][2] = b.z, low[jj][3] = b.w;
                }
                multiply_lower<false>(o, high, low, &stage.tiles[P_HIGH], p_at);

                // Out by way of these columns of v, which the partner has read, to have 16-byte stores.
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        stage.v[8 * n + lane % 4 * 2 + e % 2][16 * warp + lane / 4 + e / 2 * 8] =
                            __float2bfloat16(o[n][e]);
                __syncwarp();
                const int64_t out_stride = static_cast<int64_t>(d.num_v_heads) * d.v_dim;
                const int start = chunk * C, column = lane % 2 * 8;
                bf16 *out = args.out + (first + start) * out_stride + head * d.v_dim + slice * V + warp * 16 + column;
#pragma unroll
                for (int r = 0; r < C; r += 16) {
                    const int row = r + lane / 2;
                    if (start + row < tokens)
                        *reinterpret_cast<uint4 *>(out + row * out_stride) =
                            *reinterpret_cast<const uint4 *>(&stage.v[row][16 * warp + column]);
                }
            }
        }
        if (recurrent)
#pragma unroll
            for (int n = 0; n < K / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    state[(8 * n + lane % 4 * 2 + e % 2) * d.v_dim + e / 2 * 8] = st[n][e];
    }
}

template <int K, int WARPS>
cudaError_t launch_prepare(cudaStream_t stream, const DeltaArgs &args, const Plan &plan) {
    const int64_t chunks = max_chunks(args.batch.num_tokens, args.batch.num_seqs);
    const int shared = sizeof(PrepareShared<K, WARPS>);
    const cudaError_t error =
        cudaFuncSetAttribute(delta_prepare<K, WARPS>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
    const unsigned blocks = static_cast<unsigned>(chunks * args.dims.num_k_heads);
    return launch(delta_prepare<K, WARPS>, blocks, 32 * WARPS, shared, stream, args, plan);
}

template <int K, int V, int STAGES>
cudaError_t launch_walk(cudaStream_t stream, const DeltaArgs &args, const Plan &plan, int64_t most_seqs) {
    const int64_t items = most_seqs * args.dims.num_v_heads * (args.dims.v_dim / V);
    const int shared = sizeof(WalkShared<K, V, STAGES>);
    const cudaError_t error =
        cudaFuncSetAttribute(delta_walk<K, V, STAGES>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) {
        cudaGetLastError();  // more shared memory than the card has: the caller has a smaller one
        return error;
    }
    const unsigned blocks = static_cast<unsigned>(items < MAX_WALK_BLOCKS ? items : MAX_WALK_BLOCKS);
    return launch(delta_walk<K, V, STAGES>, blocks, 4 * V, shared, stream, args, plan);
}

template <int K>
cudaError_t launch_both(cudaStream_t stream, const DeltaArgs &args, const Plan &plan) {
    const int64_t seqs = args.batch.num_seqs, heads = args.dims.num_v_heads;
    cudaError_t error = heads / args.dims.num_k_heads > 2 ? launch_prepare<K, 4>(stream, args, plan)
                                                          : launch_prepare<K, 2>(stream, args, plan);
    if (error != cudaSuccess) return error;
    // Wide slices load less, narrow ones fill the machine; a warp's bits are the same in both.
    const int64_t by_tokens = args.batch.num_tokens / (SHORT_CHUNK + 1), most_seqs = seqs < by_tokens ? seqs : by_tokens;
    error = cudaErrorInvalidValue;
    if (args.dims.v_dim % 64 == 0 && most_seqs * heads * (args.dims.v_dim / 64) > 100)
        error = launch_walk<K, 64, 2>(stream, args, plan, most_seqs);
    if (error == cudaErrorInvalidValue) error = launch_walk<K, 32, 2>(stream, args, plan, most_seqs);
    return error == cudaErrorInvalidValue ? launch_walk<K, 32, 1>(stream, args, plan, most_seqs) : error;
}

}  // namespace

int64_t chunk_workspace(int64_t tokens, int64_t seqs, q35_delta_dims dims) {
    // 32 more, to begin at a multiple of 128 bytes wherever the workspace does.
    return 32 + plan_floats(tokens, seqs) + factor_floats(tokens, dims) +
           dims.num_v_heads * tiles_before(tokens) * (NUM_PARTS * TILE / 2);
}

cudaError_t launch_chunks(cudaStream_t stream, const DeltaArgs &args, float *workspace) {
    const int64_t tokens = args.batch.num_tokens, seqs = args.batch.num_seqs;
    if (max_chunks(tokens, seqs) == 0) return cudaSuccess;
    float *base = reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(workspace) + 127) / 128 * 128);
    int32_t *ints = reinterpret_cast<int32_t *>(base);
    Plan plan;
    plan.counts = ints;
    plan.chunks = reinterpret_cast<int2 *>(ints + 4);
    plan.seqs = ints + 4 + 2 * max_chunks(tokens, seqs);
    plan.factors = reinterpret_cast<float4 *>(base + plan_floats(tokens, seqs));
    plan.tiles = reinterpret_cast<bf16 *>(base + plan_floats(tokens, seqs) + factor_floats(tokens, args.dims));
    const cudaError_t error = launch(delta_plan, 1, 32, 0, stream, args.batch, plan);
    if (error != cudaSuccess) return error;
    return args.dims.k_dim == 64 ? launch_both<64>(stream, args, plan) : launch_both<128>(stream, args, plan);
}
