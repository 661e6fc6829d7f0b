// The walk over the chunks of the delta rule: what needs the state. The formulas are at the head of delta_chunk.cu.
#include "delta_chunk.cuh"

namespace {

constexpr int MAX_WALK_BLOCKS = 2048;

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
template <int K, int V, int STAGES, typename T>
__global__ __launch_bounds__(4 * V) void delta_walk(DeltaArgs args, ChunkPlan plan) {
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
            const bf16 *q = args.mixed + start * args.channels + k_head * K, *k = q + d.num_k_heads * K;
            const bf16 *v = k + (d.num_k_heads - k_head) * K + head * d.v_dim + slice * V;
            copy_rows<K, K + 8, LOADERS>(loader, &stage.k[0][0], k, args.channels, len);
            copy_rows<V, V + 8, LOADERS>(loader, &stage.v[0][0], v, args.channels, len);
            copy_rows<K, K + 8, LOADERS>(loader, &stage.q[0][0], q, args.channels, len);
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
        T *state = static_cast<T *>(args.states) +
                   (static_cast<int64_t>(args.batch.slot[seq]) * d.num_v_heads + head) * K * d.v_dim + slice * V +
                   warp * 16 + lane / 4;
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
                    st[n][e] = State<T>::load(state + (8 * n + lane % 4 * 2 + e % 2) * d.v_dim + e / 2 * 8);
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
#pragma unroll
                for (int n = 0; n < K / 8; n++)
                    State<T>::round(st[n][0], st[n][1]), State<T>::round(st[n][2], st[n][3]);
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
                    State<T>::store(state + (8 * n + lane % 4 * 2 + e % 2) * d.v_dim + e / 2 * 8, st[n][e]);
    }
}

template <int K, int V, int STAGES, typename T>
cudaError_t launch_walk(cudaStream_t stream, const DeltaArgs &args, const ChunkPlan &plan, int64_t most_seqs) {
    const int64_t items = most_seqs * args.dims.num_v_heads * (args.dims.v_dim / V);
    const int shared = sizeof(WalkShared<K, V, STAGES>);
    const cudaError_t error =
        cudaFuncSetAttribute(delta_walk<K, V, STAGES, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) {
        cudaGetLastError();  // more shared memory than the card has: the caller has a smaller one
        return error;
    }
    const unsigned blocks = static_cast<unsigned>(items < MAX_WALK_BLOCKS ? items : MAX_WALK_BLOCKS);
    return launch(delta_walk<K, V, STAGES, T>, blocks, 4 * V, shared, stream, args, plan);
}

template <int K, typename T>
cudaError_t launch_fitting(cudaStream_t stream, const DeltaArgs &args, const ChunkPlan &plan, int64_t most_seqs) {
    // Wide slices load less, narrow ones fill the machine; a warp's bits are the same in both.
    cudaError_t error = cudaErrorInvalidValue;
    if (args.dims.v_dim % 64 == 0 && most_seqs * args.dims.num_v_heads * (args.dims.v_dim / 64) > 100)
        error = launch_walk<K, 64, 2, T>(stream, args, plan, most_seqs);
    if (error == cudaErrorInvalidValue) error = launch_walk<K, 32, 2, T>(stream, args, plan, most_seqs);
    return error == cudaErrorInvalidValue ? launch_walk<K, 32, 1, T>(stream, args, plan, most_seqs) : error;
}

}  // namespace

cudaError_t launch_walks(cudaStream_t stream, const DeltaArgs &args, const ChunkPlan &plan, int64_t most_seqs) {
    if (walk_wgmma_fits(args.dims)) return walk_wgmma(stream, args, plan, most_seqs);
    const bool half = args.dims.half_states != 0;
    const auto launch = args.dims.k_dim == 64 ? (half ? launch_fitting<64, __half> : launch_fitting<64, float>)
                                              : (half ? launch_fitting<128, __half> : launch_fitting<128, float>);
    return launch(stream, args, plan, most_seqs);
}
