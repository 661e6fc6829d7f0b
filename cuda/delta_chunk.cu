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
// as they are, bf16 without a rounding, and their norms into the f32 factors; f32 operands go there as two bf16 parts
// (with P and x rounded once instead, keys that resemble each other cost 1e-2 of the output).
//
// Source: Yang et al. 2024 (arXiv:2412.06464), the UT transform as in the flash-linear-attention project; own code.
#include "delta.cuh"
#include "mma.cuh"

namespace {

constexpr int C = Q35_CHUNK_LEN;
constexpr int PREPARE_THREADS = 128;
constexpr int MAX_WALK_BLOCKS = 2048;

// What delta_prepare leaves for a head of a chunk: these f32 rows, then T and P in two parts, bf16 [64, 64] each.
enum Coefficient { Q_FACTOR, K_FACTOR, X_FACTOR, LAST, NUM_COEFFICIENTS };  // LAST: exp(G_C) in its first element
constexpr int COEF_FLOATS = NUM_COEFFICIENTS * C;
constexpr int SLOT_FLOATS = 4 * C * C / 2 + COEF_FLOATS;

// The head of the workspace: which chunks there are, counted on the device, since the host may not read chunked_len.
struct Plan {
    int32_t *counts;  // chunks, sequences that have any
    int2 *seqs;       // [num_seqs]: sequence, its first chunk slot
    int2 *chunks;     // [max_chunks]: sequence, index of the chunk in it
    float *slots;     // [max_chunks, V, SLOT_FLOATS]
};

// A chunk that is not short has more than SHORT_CHUNK tokens; a sequence has at most one that is not full.
int64_t max_chunks(int64_t tokens, int64_t seqs) {
    const int64_t by_seqs = tokens / C + seqs, by_tokens = tokens / (SHORT_CHUNK + 1);
    return by_seqs < by_tokens ? by_seqs : by_tokens;
}

int64_t plan_floats(int64_t tokens, int64_t seqs) {
    return ceil_div(4 + 2 * seqs + 2 * max_chunks(tokens, seqs), 32) * 32;
}

// One warp. The list of chunks is in the order of the sequences.
__global__ void delta_plan(q35_batch batch, Plan plan) {
    const int lane = threadIdx.x;
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
        if (count > 0) plan.seqs[num_seqs + __popc(active & ((1u << lane) - 1))] = make_int2(seq, first);
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

// out [16, 64] += x [16, 64] m^T for a lower triangular m [64, 64] in two parts: from 16 jj on alone, the rows before are
// above the diagonal. Without low by low, which is under f32's own rounding.
__device__ __forceinline__ void multiply_lower(float (*out)[4], const float (*x)[4], const bf16 (*m)[C][C + 8],
                                               int b_row, int b_column) {
#pragma unroll
    for (int jj = 0; jj < C / 16; jj++) {
        uint32_t high[4], low[4];
        split(&x[2 * jj], high, low);
#pragma unroll
        for (int n = 2 * jj; n < C / 8; n += 4) {
            const bool two = n + 2 < C / 8;
            uint32_t b[2][4];
#pragma unroll
            for (int part = 0; part < 2; part++) {
                load_matrices(b[0], &m[part][8 * n + b_row][16 * jj + b_column]);
                if (two) load_matrices(b[1], &m[part][8 * n + 16 + b_row][16 * jj + b_column]);
#pragma unroll
                for (int with = 0; with < 2 - part; with++) {
                    const uint32_t *a = with == 0 ? high : low;
                    mma(out[n], a, b[0]);
                    mma(out[n + 1], a, b[0] + 2);
                    if (two) mma(out[n + 2], a, b[1]), mma(out[n + 3], a, b[1] + 2);
                }
            }
        }
    }
}

// WIDTH columns of 64 rows, those from `len` on zeros. The source of a zero is `from` itself: an address that is valid.
template <int WIDTH, int LD, int THREADS>
__device__ __forceinline__ void copy_rows(bf16 *to, const bf16 *from, int64_t stride, int len) {
    constexpr int ACROSS = WIDTH / 8, STEP = THREADS / ACROSS;
    static_assert(THREADS % ACROSS == 0 && C % STEP == 0, "a thread stays in its column");
    const int row = threadIdx.x / ACROSS, column = threadIdx.x % ACROSS * 8;
    const bf16 *source = from + row * stride + column;
    to += row * LD + column;
#pragma unroll 4
    for (int r = 0; r < C; r += STEP) {
        const bool there = row + r < len;
        copy16(to + r * LD, there ? source : from, there);
        source += STEP * stride;
    }
}

template <int K>
struct PrepareShared {
    union {
        struct {
            bf16 q[C][K + 8], k[C][K + 8];
        } rows;
        float system[C][C];  // beta_i D_ij k_i . k_j below the diagonal, zeros on and above it
    };
    float g_high[C], g_low[C];  // running sum of g in two parts: exact behind a token of total decay
    float beta[C], rq[C], rk[C];
};

// T, P and the factors of one head of one chunk, with nothing of the state: the UT transform of Yang et al. 2024, by an
// inverse in f32. Own code.
template <int K>
__global__ __launch_bounds__(PREPARE_THREADS) void delta_prepare(DeltaArgs args, Plan plan) {
    extern __shared__ __align__(16) unsigned char raw[];
    PrepareShared<K> &s = *reinterpret_cast<PrepareShared<K> *>(raw);
    const q35_delta_dims d = args.dims;
    const int slot = blockIdx.x / d.num_v_heads, head = blockIdx.x % d.num_v_heads;
    if (slot >= plan.counts[0]) return;
    const int2 which = plan.chunks[slot];
    const int seq = which.x;
    const int len = min(C, tokens_in_chunks(args.batch.chunked_len[seq]) - which.y * C);
    const int64_t first = args.batch.query_start[seq] + static_cast<int64_t>(which.y) * C;
    const int k_head = head / (d.num_v_heads / d.num_k_heads);
    const bf16 *q_rows = args.mixed + first * args.channels + k_head * K, *k_rows = q_rows + d.num_k_heads * K;
    copy_rows<K, K + 8, PREPARE_THREADS>(&s.rows.q[0][0], q_rows, args.channels, len);
    copy_rows<K, K + 8, PREPARE_THREADS>(&s.rows.k[0][0], k_rows, args.channels, len);

    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    float *coef = plan.slots + (static_cast<int64_t>(slot) * d.num_v_heads + head) * SLOT_FLOATS;
    bf16 *t_high = reinterpret_cast<bf16 *>(coef + COEF_FLOATS), *t_low = t_high + C * C;
    bf16 *p_high = t_low + C * C, *p_low = p_high + C * C;
    if (warp == 0) {
        // Tokens 2 lane and 2 lane + 1. Past the end: no decay, no write.
        double g[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int i = 2 * lane + j;
            const bf16 *ba = args.projected + (first + (i < len ? i : 0)) * args.stride + args.ba_start;
            g[j] = i < len ? log_decay(args, ba, head) : 0.0f;
            s.beta[i] = i < len ? write_strength(ba, head) : 0.0f;
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
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float high = static_cast<float>(sums[j]);
            s.g_high[2 * lane + j] = high;
            s.g_low[2 * lane + j] = static_cast<float>(sums[j] - high);
        }
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();

    {  // Two threads a row.
        const int row = tid / 2, half = tid % 2 * (K / 2);
        float qq = 0.0f, kk = 0.0f;
#pragma unroll
        for (int i = 0; i < K / 2; i += 8) {
            float q[8], k[8];
            load8(&s.rows.q[row][half + i], q);
            load8(&s.rows.k[row][half + i], k);
#pragma unroll
            for (int j = 0; j < 8; j++) qq = fmaf(q[j], q[j], qq), kk = fmaf(k[j], k[j], kk);
        }
        const float rq = rsqrtf(static_cast<float>(K)) / sqrtf(lane_sum<2>(qq) + L2_EPS);
        const float rk = 1.0f / sqrtf(lane_sum<2>(kk) + L2_EPS);
        if (tid % 2 == 0) {
            s.rq[row] = rq, s.rk[row] = rk;
            const float from_start = expf(s.g_high[row] + s.g_low[row]);
            const float to_end = expf((s.g_high[C - 1] - s.g_high[row]) + (s.g_low[C - 1] - s.g_low[row]));
            const bool there = row < len;
            coef[Q_FACTOR * C + row] = there ? rq * from_start : 0.0f;
            coef[K_FACTOR * C + row] = there ? rk * from_start : 0.0f;
            coef[X_FACTOR * C + row] = there ? rk * to_end : 0.0f;
            // Past the end g is 0: the last sum is the chunk's.
            coef[LAST * C + row] = row == 0 ? expf(s.g_high[C - 1] + s.g_low[C - 1]) : 0.0f;
        }
    }

    // q k^T and k k^T, lower triangles: a warp has rows 16 warp .. + 15.
    float qk[C / 8][4] = {}, kk[C / 8][4] = {};
    {
        const int a_row = 16 * warp + lane % 16, a_column = lane / 16 * 8;
        const int b_row = lane % 8 + lane / 16 * 8, b_column = lane / 8 % 2 * 8;
#pragma unroll
        for (int x = 0; x < K; x += 16) {
            uint32_t qa[4], ka[4];
            load_matrices(qa, &s.rows.q[a_row][x + a_column]);
            load_matrices(ka, &s.rows.k[a_row][x + a_column]);
#pragma unroll
            for (int n = 0; n < C / 8; n += 2)
                if (n / 2 <= warp) {
                    uint32_t b[4];
                    load_matrices(b, &s.rows.k[8 * n + b_row][x + b_column]);
                    mma(qk[n], qa, b);
                    mma(qk[n + 1], qa, b + 2);
                    mma(kk[n], ka, b);
                    mma(kk[n + 1], ka, b + 2);
                }
        }
    }
    __syncthreads();  // the rows are read, `system` takes their place; rq and rk are there

#pragma unroll
    for (int n = 0; n < C / 8; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = 16 * warp + 8 * half + lane / 4, j0 = 8 * n + lane % 4 * 2;
            float pair[2], coupling[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int j = j0 + e;
                // Above the diagonal the exponent would be positive: not taken at all.
                const float decay = j <= i ? expf((s.g_high[i] - s.g_high[j]) + (s.g_low[i] - s.g_low[j])) : 0.0f;
                const float scale = decay * s.rk[j];
                pair[e] = j <= i ? qk[n][2 * half + e] * s.rq[i] * scale : 0.0f;
                coupling[e] = j < i ? kk[n][2 * half + e] * (s.beta[i] * s.rk[i]) * scale : 0.0f;
            }
            const uint32_t high = pack2(pair[0], pair[1]);
            const float2 h = unpack2(high);
            *reinterpret_cast<uint32_t *>(p_high + i * C + j0) = high;
            *reinterpret_cast<uint32_t *>(p_low + i * C + j0) = pack2(pair[0] - h.x, pair[1] - h.y);
            *reinterpret_cast<float2 *>(&s.system[i][j0]) = make_float2(coupling[0], coupling[1]);
        }
    __syncthreads();

    // Forward substitution, a thread a column of the inverse, all of it in registers; four sums to shorten the chain.
    if (tid < C) {
        float x[C];
        const float beta = s.beta[tid];
#pragma unroll
        for (int i = 0; i < C; i++) {
            float acc[4] = {tid == i ? -1.0f : 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int j = 0; j < i; j += 4) {
                // From column i on the row is zeros, so the last four may run over it.
                const float4 row = *reinterpret_cast<const float4 *>(&s.system[i][j]);
                acc[0] = fmaf(row.x, x[j], acc[0]);
                if (j + 1 < i) acc[1] = fmaf(row.y, x[j + 1], acc[1]);
                if (j + 2 < i) acc[2] = fmaf(row.z, x[j + 2], acc[2]);
                if (j + 3 < i) acc[3] = fmaf(row.w, x[j + 3], acc[3]);
            }
            x[i] = -((acc[0] + acc[1]) + (acc[2] + acc[3]));
            const float t = x[i] * beta;
            const bf16 high = __float2bfloat16(t);
            t_high[i * C + tid] = high;
            t_low[i * C + tid] = __float2bfloat16(t - __bfloat162float(high));
        }
    }
}

// V: columns of values of a block, 16 a warp. k is read until the end of its chunk, so the next one's goes elsewhere.
template <int K, int V>
struct WalkShared {
    bf16 q[C][K + 8], k[2][C][K + 8];
    bf16 v[2][C][V + 8];
    bf16 t[2][C][C + 8], p[2][C][C + 8];
    float coef[2][COEF_FLOATS];
};

// Walks the chunks of (sequence, head, V columns). A warp is on its own: it keeps its 16 columns of the state,
// transposed, in the accumulators of its mma from the first chunk to the last, and each product's result is the left
// operand of the next. The block shares what is loaded. Chunkwise form of Yang et al. 2024; own code.
template <int K, int V>
__global__ __launch_bounds__(2 * V) void delta_walk(DeltaArgs args, Plan plan) {
    constexpr int THREADS = 2 * V, TILES = C / 8;
    extern __shared__ __align__(16) unsigned char raw[];
    WalkShared<K, V> &s = *reinterpret_cast<WalkShared<K, V> *>(raw);
    const q35_delta_dims d = args.dims;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int slices = d.v_dim / V;
    const int64_t items = static_cast<int64_t>(plan.counts[1]) * d.num_v_heads * slices;
    // Places in a lane's ldmatrix: right operand with rows n (16 rows, 16 columns), its transposed form, values.
    const int b_row = lane % 8 + lane / 16 * 8, b_column = lane / 8 % 2 * 8;
    const int kt_row = lane % 16, kt_column = lane / 16 * 8;

    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const int slice = item % slices, head = item / slices % d.num_v_heads;
        const int2 which = plan.seqs[item / slices / d.num_v_heads];
        const int seq = which.x, tokens = tokens_in_chunks(args.batch.chunked_len[seq]);
        const int k_head = head / (d.num_v_heads / d.num_k_heads);
        const int64_t first = args.batch.query_start[seq];
        const bf16 *q_rows = args.mixed + first * args.channels + k_head * K;
        const bf16 *k_rows = q_rows + d.num_k_heads * K;
        const bf16 *v_rows = args.mixed + first * args.channels + 2 * d.num_k_heads * K + head * d.v_dim + slice * V;
        const float *slots = plan.slots + (static_cast<int64_t>(which.y) * d.num_v_heads + head) * SLOT_FLOATS;
        const int64_t slot_stride = static_cast<int64_t>(d.num_v_heads) * SLOT_FLOATS;
        const int64_t out_stride = static_cast<int64_t>(d.num_v_heads) * d.v_dim;
        bf16 *out = args.out + first * out_stride + head * d.v_dim + slice * V + warp * 16;

        const auto load_kv = [&](int chunk) {
            const int64_t at = static_cast<int64_t>(chunk) * C * args.channels;
            const int len = tokens - chunk * C, stage = chunk & 1;
            copy_rows<K, K + 8, THREADS>(&s.k[stage][0][0], k_rows + at, args.channels, len);
            copy_rows<V, V + 8, THREADS>(&s.v[stage][0][0], v_rows + at, args.channels, len);
            const float *coef = slots + chunk * slot_stride;
            for (int i = tid; i < COEF_FLOATS / 4; i += THREADS) copy16(&s.coef[stage][4 * i], coef + 4 * i, true);
        };
        const auto load_q = [&](int chunk) {
            const int64_t at = static_cast<int64_t>(chunk) * C * args.channels;
            copy_rows<K, K + 8, THREADS>(&s.q[0][0], q_rows + at, args.channels, tokens - chunk * C);
        };
        const auto load_tp = [&](int chunk) {
            const bf16 *t = reinterpret_cast<const bf16 *>(slots + chunk * slot_stride + COEF_FLOATS);
            copy_rows<C, C + 8, THREADS>(&s.t[0][0][0], t, C, C);
            copy_rows<C, C + 8, THREADS>(&s.t[1][0][0], t + C * C, C, C);
            copy_rows<C, C + 8, THREADS>(&s.p[0][0][0], t + 2 * C * C, C, C);
            copy_rows<C, C + 8, THREADS>(&s.p[1][0][0], t + 3 * C * C, C, C);
        };

        __syncthreads();  // the last item's shared memory is read
        load_kv(0);
        load_q(0);
        load_tp(0);

        // Accumulator tile n, thread (g = lane / 4, t = lane % 4): rows (value columns) g and g + 8 of state columns
        // (key elements) 8 n + 2 t, + 1.
        float *state = args.states +
                       (static_cast<int64_t>(args.batch.slot[seq]) * d.num_v_heads + head) * K * d.v_dim +
                       slice * V + warp * 16 + lane / 4;
        float st[K / 8][4];
#pragma unroll
        for (int n = 0; n < K / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                st[n][e] = state[(8 * n + lane % 4 * 2 + e % 2) * d.v_dim + e / 2 * 8];

        const int chunks = ceil_div(tokens, C);
        for (int chunk = 0; chunk < chunks; chunk++) {
            const int stage = chunk & 1;
            const bool more = chunk + 1 < chunks;
            copy_commit();
            copy_wait<0>();
            __syncthreads();  // this chunk is there, and nobody reads the last one's k, v and factors any more
            if (more) load_kv(chunk + 1);

            float x[TILES][4] = {}, o[TILES][4] = {};  // (k S)^T and (q S)^T [16, 64]
#pragma unroll
            for (int kk = 0; kk < K / 16; kk++) {
                uint32_t high[4], low[4];
                split(&st[2 * kk], high, low);
#pragma unroll
                for (int n = 0; n < TILES; n += 2) {
                    uint32_t kb[4], qb[4];
                    load_matrices(kb, &s.k[stage][8 * n + b_row][16 * kk + b_column]);
                    load_matrices(qb, &s.q[8 * n + b_row][16 * kk + b_column]);
                    // Three others between two products into one accumulator, to hide the latency.
                    mma(x[n], high, kb);
                    mma(x[n + 1], high, kb + 2);
                    mma(o[n], high, qb);
                    mma(o[n + 1], high, qb + 2);
                    mma(x[n], low, kb);
                    mma(x[n + 1], low, kb + 2);
                    mma(o[n], low, qb);
                    mma(o[n + 1], low, qb + 2);
                }
            }
            __syncthreads();  // q is read
            if (more) load_q(chunk + 1);

            // x = v - factor (k S), o = factor (q S).
            const float *coef = s.coef[stage];
            bf16(*own)[V + 8] = s.v[stage];
#pragma unroll
            for (int n = 0; n < TILES; n += 2) {
                uint32_t v[4];
                load_matrices_transposed(v, &own[8 * n + b_row][16 * warp + b_column]);
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    const int i = 8 * (n + m) + lane % 4 * 2;
                    const float2 kf = *reinterpret_cast<const float2 *>(&coef[K_FACTOR * C + i]);
                    const float2 qf = *reinterpret_cast<const float2 *>(&coef[Q_FACTOR * C + i]);
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const float2 value = unpack2(v[2 * m + half]);
                        float *xe = &x[n + m][2 * half], *oe = &o[n + m][2 * half];
                        xe[0] = fmaf(-kf.x, xe[0], value.x), xe[1] = fmaf(-kf.y, xe[1], value.y);
                        oe[0] *= qf.x, oe[1] *= qf.y;
                    }
                }
            }

            float y[TILES][4] = {};
            multiply_lower(y, x, s.t, b_row, b_column);  // the x of above
            multiply_lower(o, y, s.p, b_row, b_column);
            __syncthreads();  // T and P are read
            if (more) load_tp(chunk + 1);

            // Out by way of this warp's own columns of v, which nobody reads any more, to have 16-byte stores.
            __syncwarp();
#pragma unroll
            for (int n = 0; n < TILES; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    own[8 * n + lane % 4 * 2 + e % 2][16 * warp + lane / 4 + e / 2 * 8] = __float2bfloat16(o[n][e]);
            __syncwarp();
            const int len = tokens - chunk * C;
#pragma unroll
            for (int r = 0; r < C; r += 16) {
                const int row = r + lane / 2, column = lane % 2 * 8;
                if (row < len)
                    *reinterpret_cast<uint4 *>(out + (static_cast<int64_t>(chunk) * C + row) * out_stride + column) =
                        *reinterpret_cast<const uint4 *>(&own[row][16 * warp + column]);
            }

            // S^T = exp(G_C) S^T + (factor x)^T k.
            const float decay = coef[LAST * C];
#pragma unroll
            for (int n = 0; n < K / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) st[n][e] *= decay;
#pragma unroll
            for (int jj = 0; jj < C / 16; jj++) {
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    const float2 f =
                        *reinterpret_cast<const float2 *>(&coef[X_FACTOR * C + 16 * jj + 8 * m + lane % 4 * 2]);
                    float *e = y[2 * jj + m];
                    e[0] *= f.x, e[1] *= f.y, e[2] *= f.x, e[3] *= f.y;
                }
                uint32_t high[4], low[4];
                split(&y[2 * jj], high, low);
#pragma unroll
                for (int n = 0; n < K / 8; n += 4) {
                    uint32_t b[8];
                    load_matrices_transposed(b, &s.k[stage][16 * jj + kt_row][8 * n + kt_column]);
                    load_matrices_transposed(b + 4, &s.k[stage][16 * jj + kt_row][8 * n + 16 + kt_column]);
#pragma unroll
                    for (int m = 0; m < 4; m++) mma(st[n + m], high, b + 2 * m);
#pragma unroll
                    for (int m = 0; m < 4; m++) mma(st[n + m], low, b + 2 * m);
                }
            }
        }
#pragma unroll
        for (int n = 0; n < K / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                state[(8 * n + lane % 4 * 2 + e % 2) * d.v_dim + e / 2 * 8] = st[n][e];
    }
}

template <int K, int V>
cudaError_t launch_walk(cudaStream_t stream, const DeltaArgs &args, const Plan &plan, int64_t most_seqs) {
    const int64_t items = most_seqs * args.dims.num_v_heads * (args.dims.v_dim / V);
    const int shared = sizeof(WalkShared<K, V>);
    const cudaError_t error =
        cudaFuncSetAttribute(delta_walk<K, V>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
    const unsigned blocks = static_cast<unsigned>(items < MAX_WALK_BLOCKS ? items : MAX_WALK_BLOCKS);
    delta_walk<K, V><<<blocks, 2 * V, shared, stream>>>(args, plan);
    return cudaGetLastError();
}

template <int K>
cudaError_t launch(cudaStream_t stream, const DeltaArgs &args, const Plan &plan) {
    const int64_t tokens = args.batch.num_tokens, seqs = args.batch.num_seqs, heads = args.dims.num_v_heads;
    const int64_t chunks = max_chunks(tokens, seqs), by_tokens = tokens / (SHORT_CHUNK + 1);
    const int shared = sizeof(PrepareShared<K>);
    delta_prepare<K><<<static_cast<unsigned>(chunks * heads), PREPARE_THREADS, shared, stream>>>(args, plan);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    // Wide slices load less, narrow ones fill the machine; a warp's bits are the same in both.
    const int64_t most_seqs = seqs < by_tokens ? seqs : by_tokens;
    const bool wide = args.dims.v_dim % 64 == 0 && most_seqs * heads * (args.dims.v_dim / 64) > 100;
    if (wide) {
        const cudaError_t wide_error = launch_walk<K, 64>(stream, args, plan, most_seqs);
        if (wide_error != cudaErrorInvalidValue) return wide_error;
        cudaGetLastError();  // sm_86 and sm_89 do not have the shared memory for it: narrow then
    }
    return launch_walk<K, 32>(stream, args, plan, most_seqs);
}

}  // namespace

int64_t chunk_workspace(int64_t tokens, int64_t seqs, q35_delta_dims dims) {
    // 32 more, to begin at a multiple of 128 bytes wherever the workspace does.
    return 32 + plan_floats(tokens, seqs) + max_chunks(tokens, seqs) * dims.num_v_heads * SLOT_FLOATS;
}

cudaError_t launch_chunks(cudaStream_t stream, const DeltaArgs &args, float *workspace) {
    const int64_t tokens = args.batch.num_tokens, seqs = args.batch.num_seqs;
    if (max_chunks(tokens, seqs) == 0) return cudaSuccess;
    float *base = reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(workspace) + 127) / 128 * 128);
    int32_t *ints = reinterpret_cast<int32_t *>(base);
    Plan plan;
    plan.counts = ints;
    plan.seqs = reinterpret_cast<int2 *>(ints + 4);
    plan.chunks = plan.seqs + seqs;
    plan.slots = base + plan_floats(tokens, seqs);
    delta_plan<<<1, 32, 0, stream>>>(args.batch, plan);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    return args.dims.k_dim == 64 ? launch<64>(stream, args, plan) : launch<128>(stream, args, plan);
}
