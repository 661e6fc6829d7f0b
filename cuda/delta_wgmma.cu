// The walk over the chunks of the delta rule on Hopper: delta_walk's products and roundings by warpgroups, for keys of
// 128 and slices of 64 columns. The formulas are at the head of delta_chunk.cu.
#include <stddef.h>

#include "delta_chunk.cuh"
#include "delta_wgmma.cuh"

namespace {

constexpr int K = 128, V = 64, STAGES = 2;
constexpr int MAX_BLOCKS = 512;  // a few for each multiprocessor, which has room for one: many sequences have no chunks
constexpr int WARPGROUP = 128, THREADS = 2 * WARPGROUP;

// A chunk. Rows of 64 elements lie as right_operand has them.
struct Stage {
    bf16 q[2][C][64], k[2][C][64];  // by halves of the row
    bf16 tiles[NUM_PARTS][C][C];    // T transposed (row j has T_ij of all i), P as it is
    bf16 v[C][V + 8];
    float4 factors[C];
};
struct Shared {
    Stage stages[STAGES];
    uint4 state[V / 16][K / 16][32];  // S of 16 columns as A operands, its high part
    uint4 x[V / 16][C / 16][2][32];   // the same of x, two parts
};
constexpr int SHARED_BYTES = sizeof(Shared) + 1024;  // aligned to 1024
static_assert(sizeof(Stage) % 1024 == 0 && offsetof(Stage, tiles) % 1024 == 0, "tiles are aligned to 1024");

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int N = C / 8;

// Barriers by number, beside those of the pairs of warps (1 + warp: the state is there, 5 + warp: x is): a chunk is
// there; the recurrence has done with the stage of an even or odd chunk. It never waits for an output.
constexpr int READY = 9, FREE = 10;

// A slice of a sequence's head on its way through the chunks.
struct Walk {
    int tokens, head, k_head, column;  // of the sequence in chunks; first of the slice's columns of the head
    int64_t first;                     // token of the batch
};

__device__ __forceinline__ uint4 as_uint4(const uint32_t (&a)[4]) { return make_uint4(a[0], a[1], a[2], a[3]); }
__device__ __forceinline__ void from_uint4(uint32_t (&a)[4], uint4 v) {
    a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
}

// By the threads of a warpgroup. Tiles above the diagonal stay as they are: zeros.
__device__ __forceinline__ void load_chunk(const DeltaArgs &args, const ChunkPlan &plan, const Walk &walk, int chunk,
                                           Stage &stage) {
    const q35_delta_dims d = args.dims;
    const int thread = threadIdx.x % WARPGROUP, warp = thread / 32, lane = thread % 32;
    const int64_t start = walk.first + static_cast<int64_t>(chunk) * C;
    const int len = min(walk.tokens - chunk * C, C), tiles = num_tiles(len);
    {
        // A thread has one piece of every eighth row.
        const int row = thread / 16, piece = thread % 16;
        const int at = piece / 8 * ACROSS_BYTES + row * ROW_BYTES + (piece % 8 ^ row) * 16;
        const uint32_t to_q = shared_address(stage.q) + at, to_k = shared_address(stage.k) + at;
        const bf16 *q = args.mixed + (start + (row < len ? row : 0)) * args.channels + walk.k_head * K + piece * 8;
        const bf16 *k = q + d.num_k_heads * K;
        const size_t step = static_cast<size_t>(8) * args.channels * sizeof(bf16);
        const size_t q_from = __cvta_generic_to_global(q), k_from = __cvta_generic_to_global(k);
#pragma unroll
        for (int i = 0; i < C / 8; i++) {
            const bool there = 8 * i + row < len;
            copy16(to_k + i * 8 * ROW_BYTES, k_from + (there ? i * step : 0), there);
            copy16(to_q + i * 8 * ROW_BYTES, q_from + (there ? i * step : 0), there);
        }
    }
    const bf16 *v = args.mixed + start * args.channels + 2 * d.num_k_heads * K + walk.head * d.v_dim + walk.column;
    copy_rows<V, V + 8, WARPGROUP>(thread, &stage.v[0][0], v, args.channels, len);
    if (thread < C) {
        const float4 *factors = plan.factors_of(args.batch.num_tokens, walk.head, start);
        copy16(&stage.factors[thread], factors + (thread < len ? thread : 0), thread < len);
    }
    // A warp has a part, a lane eight elements of each tile: of a column of T, of a row of P.
    const bf16 *from = plan.tiles_of(args.batch.num_tokens, walk.head, start) + 8 * lane;
    const uint32_t to = shared_address(stage.tiles[warp]) + lane % 16 * ROW_BYTES;
    const bool down = warp <= T_LOW;
#pragma unroll
    for (int r = 0; r < C / 16; r++)
#pragma unroll
        for (int c = 0; c <= r; c++) {
            const int tile = tile_number(r, c), row = down ? c : r, column = down ? r : c;
            const bool there = tile < tiles;
            copy16(to + 16 * row * ROW_BYTES + (2 * column + lane / 16 ^ lane % 8) * 16,
                   __cvta_generic_to_global(from + (there ? (warp * tiles + tile) * TILE : 0)), there);
        }
    copy_commit();
}

// By the same threads: what they have loaded is there for all.
__device__ __forceinline__ void chunk_is_there() {
    copy_wait<0>();
    written_for_products();
    named_arrive<THREADS>(READY);
}

// A chunk of the recurrence. The state is transposed: accumulator tile n has value columns as rows and key elements
// 8 n .. 8 n + 7 as columns. Each product's result is the left operand of the next, in two parts. What the output needs
// is left for the warp of the other group that has the same value columns.
__device__ __forceinline__ void step_state(float (&st)[K / 8][4], const Stage &stage, uint4 (*state)[32],
                                           uint4 (*published)[2][32]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, pair = lane % 4 * 2;
    const int v_row = lane % 8 + lane / 16 * 8, v_column = 16 * warp + lane / 8 % 2 * 8;
    const uint64_t k_rows = right_operand(shared_address(stage.k)), t = right_operand(shared_address(stage.tiles));
    const uint64_t k_columns = right_operand(shared_address(stage.k), ACROSS_BYTES);
    float x[N][4] = {};  // (k S)^T [64, 64]
    uint32_t high[K / 16][4], low[K / 16][4];
    keep_order(x);
#pragma unroll
    for (int i = 0; i < K / 16; i++) {
        split(&st[2 * i], high[i], low[i]);
        keep_order(high[i]), keep_order(low[i]);
        products_begin();
        const uint64_t b = further(k_rows, i / 4 * ACROSS_BYTES + i % 4 * 32);
        multiply64<false>(x, high[i], b);
        multiply64<false>(x, low[i], b);
        products_commit();
    }
#pragma unroll
    for (int i = 0; i < K / 16; i++) state[i][lane] = as_uint4(high[i]);
    named_arrive<64>(1 + warp);
    uint32_t v[N / 2][4];
    float2 from_start[N], to_end[N];  // factors of this lane's tokens
#pragma unroll
    for (int n = 0; n < N / 2; n++) load_matrices_transposed(v[n], &stage.v[16 * n + v_row][v_column]);
#pragma unroll
    for (int n = 0; n < N; n++)
        from_start[n] = make_float2(stage.factors[8 * n + pair].y, stage.factors[8 * n + pair + 1].y);
    products_wait<0>();
    keep_order(x);
#pragma unroll
    for (int i = 0; i < K / 16; i++) keep_order(high[i]), keep_order(low[i]);

    // x = v - factor (k S), then T of it.
    float y[N][4] = {};
    keep_order(y);
#pragma unroll
    for (int jj = 0; jj < C / 16; jj++) {
#pragma unroll
        for (int m = 0; m < 2; m++) {
            const float2 f = from_start[2 * jj + m];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float2 value = unpack2(v[jj][2 * m + half]);
                float *e = &x[2 * jj + m][2 * half];
                e[0] = fmaf(-f.x, e[0], value.x), e[1] = fmaf(-f.y, e[1], value.y);
            }
        }
        split(&x[2 * jj], high[jj], low[jj]);
        keep_order(high[jj]), keep_order(low[jj]);
        products_begin();
        const uint64_t b = further(t, 16 * jj * ROW_BYTES);
        multiply64<true>(y, high[jj], b);
        multiply64<true>(y, low[jj], b);
        multiply64<true>(y, high[jj], further(b, T_LOW * ACROSS_BYTES));
        products_commit();
    }
    const float decay = stage.factors[0].w;
#pragma unroll
    for (int n = 0; n < K / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) st[n][e] *= decay;
#pragma unroll
    for (int n = 0; n < N; n++)
        to_end[n] = make_float2(stage.factors[8 * n + pair].z, stage.factors[8 * n + pair + 1].z);
    products_wait<0>();
    keep_order(y), keep_order(st);
#pragma unroll
    for (int jj = 0; jj < C / 16; jj++) keep_order(high[jj]), keep_order(low[jj]);

    // S^T = exp(G_C) S^T + (factor x)^T k.
#pragma unroll
    for (int jj = 0; jj < C / 16; jj++) {
        float scaled[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++) {
            const float2 f = to_end[2 * jj + m];
            const float *e = y[2 * jj + m];
            scaled[m][0] = e[0] * f.x, scaled[m][1] = e[1] * f.y, scaled[m][2] = e[2] * f.x, scaled[m][3] = e[3] * f.y;
        }
        split(scaled, high[jj], low[jj]);
        keep_order(high[jj]), keep_order(low[jj]);
        products_begin();
        const uint64_t b = further(k_columns, 16 * jj * ROW_BYTES);
        multiply128(st, high[jj], b);
        multiply128(st, low[jj], b);
        products_commit();
    }
#pragma unroll
    for (int jj = 0; jj < C / 16; jj++) {
        uint32_t parts[2][4];
        split(&y[2 * jj], parts[0], parts[1]);
        published[jj][0][lane] = as_uint4(parts[0]), published[jj][1][lane] = as_uint4(parts[1]);
    }
    named_arrive<64>(5 + warp);
    products_wait<0>();
    keep_order(st);
#pragma unroll
    for (int jj = 0; jj < C / 16; jj++) keep_order(high[jj]), keep_order(low[jj]);
}

// The output of a chunk, from what step_state leaves. `column`: the first of the warp's 16 in a row of args.out.
// `more`: the next chunk is under way.
__device__ __forceinline__ void step_output(const DeltaArgs &args, Stage &stage, const uint4 (*state)[32],
                                            const uint4 (*published)[2][32], int64_t first, int len, int column,
                                            bool more) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, pair = lane % 4 * 2;
    const uint64_t q = right_operand(shared_address(stage.q)), p = right_operand(shared_address(stage.tiles[P_HIGH]));
    float o[N][4] = {};  // (q S)^T [64, 64]
    uint32_t a[K / 16][4];
    named_sync<64>(1 + warp);
#pragma unroll
    for (int i = 0; i < K / 16; i++) from_uint4(a[i], state[i][lane]);
#pragma unroll
    for (int i = 0; i < K / 16; i++) keep_order(a[i]);
    keep_order(o);
    products_begin();
#pragma unroll
    for (int i = 0; i < K / 16; i++) multiply64<false>(o, a[i], further(q, i / 4 * ACROSS_BYTES + i % 4 * 32));
    products_commit();
    products_wait<0>();
    keep_order(o);
#pragma unroll
    for (int i = 0; i < K / 16; i++) keep_order(a[i]);
#pragma unroll
    for (int n = 0; n < N; n++) {
        const float f0 = stage.factors[8 * n + pair].x, f1 = stage.factors[8 * n + pair + 1].x;
        o[n][0] *= f0, o[n][1] *= f1, o[n][2] *= f0, o[n][3] *= f1;
    }

    named_sync<64>(5 + warp);
#pragma unroll
    for (int jj = 0; jj < C / 16; jj++) {
        from_uint4(a[2 * jj], published[jj][0][lane]), from_uint4(a[2 * jj + 1], published[jj][1][lane]);
        keep_order(a[2 * jj]), keep_order(a[2 * jj + 1]);
    }
    keep_order(o);
    products_begin();
    // The upper 32 rows of P have nothing right of column 31.
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int jj = 0; jj < 2 * (i + 1); jj++) {
            const uint64_t b = further(p, 32 * i * ROW_BYTES + 32 * jj);
            multiply32(&o[4 * i], a[2 * jj], b);
            multiply32(&o[4 * i], a[2 * jj + 1], b);
            multiply32(&o[4 * i], a[2 * jj], further(b, ACROSS_BYTES));
        }
    products_commit();
    if (more) chunk_is_there();  // this warp has read the state and x, the next may take their place
    products_wait<0>();
    keep_order(o);
#pragma unroll
    for (int i = 0; i < K / 16; i++) keep_order(a[i]);

    // Out by way of these columns of v, which the partner has read, to have 16-byte stores.
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            stage.v[8 * n + pair + e % 2][16 * warp + lane / 4 + e / 2 * 8] = __float2bfloat16(o[n][e]);
    __syncwarp();
    const int64_t out_stride = static_cast<int64_t>(args.dims.num_v_heads) * args.dims.v_dim;
    const int piece = lane % 2 * 8;
    bf16 *out = args.out + first * out_stride + column + piece;
#pragma unroll
    for (int r = 0; r < C; r += 16) {
        const int row = r + lane / 2;
        if (row < len)
            *reinterpret_cast<uint4 *>(out + row * out_stride) =
                *reinterpret_cast<const uint4 *>(&stage.v[row][16 * warp + piece]);
    }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// Walks the chunks of (sequence, head, 64 columns): the first warpgroup has the recurrence, the second loads the next
// chunk and has the output of this one. Chunkwise form of Yang et al. 2024; own code.
template <typename T>
__global__ __launch_bounds__(THREADS, 1) void delta_walk_wgmma(DeltaArgs args, ChunkPlan plan) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ unsigned char raw[];
    Shared &s = *reinterpret_cast<Shared *>(raw + (0u - shared_address(raw)) % 1024);
    const q35_delta_dims d = args.dims;
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32 % 4;
    // The same in all lanes, and the compiler is to know it.
    const bool recurrent = __shfl_sync(ALL_LANES, tid / WARPGROUP, 0) == 0;
    for (int stage = 0; stage < STAGES; stage++) {
        uint4 *tiles = reinterpret_cast<uint4 *>(s.stages[stage].tiles);
        for (int i = tid; i < NUM_PARTS * C * C / 8; i += THREADS) tiles[i] = make_uint4(0, 0, 0, 0);
    }
    written_for_products();
    wait_for_inputs();
    let_next_start();
    const int slices = d.v_dim / V;
    const int64_t items = static_cast<int64_t>(plan.counts[1]) * d.num_v_heads * slices;

    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const int slice = item % slices, seq = plan.seqs[item / slices / d.num_v_heads];
        Walk walk;
        walk.head = item / slices % d.num_v_heads, walk.k_head = walk.head / (d.num_v_heads / d.num_k_heads);
        walk.column = slice * V, walk.first = args.batch.query_start[seq];
        walk.tokens = tokens_in_chunks(args.batch.chunked_len[seq]);
        const int chunks = ceil_div(walk.tokens, C);

        __syncthreads();  // the last item's shared memory is read
        if (recurrent) {
            T *state = static_cast<T *>(args.states) +
                       (static_cast<int64_t>(args.batch.slot[seq]) * d.num_v_heads + walk.head) * K * d.v_dim +
                       walk.column + warp * 16 + lane / 4;
            float st[K / 8][4];
#pragma unroll
            for (int n = 0; n < K / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    st[n][e] = State<T>::load(state + (8 * n + lane % 4 * 2 + e % 2) * d.v_dim + e / 2 * 8);
            for (int chunk = 0; chunk < chunks; chunk++) {
                named_sync<THREADS>(READY);
                step_state(st, s.stages[chunk % STAGES], s.state[warp], s.x[warp]);
#pragma unroll
                for (int n = 0; n < K / 8; n++)
                    State<T>::round(st[n][0], st[n][1]), State<T>::round(st[n][2], st[n][3]);
                if (chunk + STAGES < chunks) named_arrive<THREADS>(FREE + chunk % STAGES);
            }
            asm volatile("" : "+l"(state));  // the addresses once more, rather than kept in registers
#pragma unroll
            for (int n = 0; n < K / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    State<T>::store(state + (8 * n + lane % 4 * 2 + e % 2) * d.v_dim + e / 2 * 8, st[n][e]);
        } else {
            load_chunk(args, plan, walk, 0, s.stages[0]);
            chunk_is_there();
            for (int chunk = 0; chunk < chunks; chunk++) {
                const int next = chunk + 1;
                if (next < chunks) {
                    if (next >= STAGES) named_sync<THREADS>(FREE + next % STAGES);
                    load_chunk(args, plan, walk, next, s.stages[next % STAGES]);
                }
                step_output(args, s.stages[chunk % STAGES], s.state[warp], s.x[warp],
                            walk.first + static_cast<int64_t>(chunk) * C, walk.tokens - chunk * C,
                            walk.head * d.v_dim + walk.column + 16 * warp, next < chunks);
            }
        }
    }
#endif
}

}  // namespace

// One sequence of fewer heads leaves too much of the card idle: of 32, at 8192 tokens on an H100, 465 us for the whole
// rule against 414 with the narrower slices of delta_walk.cu; of 64, 505 against 537 (benches/results/h100/delta_walk.txt). It
// may not depend on the batch.
constexpr int MIN_HEADS = 48;

bool walk_wgmma_fits(q35_delta_dims dims) {
    static int known[64];  // by device: 0 not asked yet, 1 no, 2 yes
    int device = 0, major = 0;
    if (dims.num_v_heads < MIN_HEADS || dims.k_dim != K || dims.v_dim % V != 0) return false;
    if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return false;
    if (known[device] == 0) {
        if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
        cudaFuncAttributes kernel = {};
        // Compiled for anything but sm_90a it is empty and has hardly any registers.
        const bool there =
            major == 9 && cudaFuncGetAttributes(&kernel, delta_walk_wgmma<float>) == cudaSuccess && kernel.numRegs > 100;
        known[device] = there ? 2 : 1;
    }
    return known[device] == 2;
}

cudaError_t walk_wgmma(cudaStream_t stream, const DeltaArgs &args, const ChunkPlan &plan, int64_t most_seqs) {
    const int64_t items = most_seqs * args.dims.num_v_heads * (args.dims.v_dim / V);
    const auto kernel = args.dims.half_states != 0 ? delta_walk_wgmma<__half> : delta_walk_wgmma<float>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
    if (error != cudaSuccess) return error;
    const unsigned blocks = static_cast<unsigned>(items < MAX_BLOCKS ? items : MAX_BLOCKS);
    return launch(kernel, blocks, THREADS, static_cast<size_t>(SHARED_BYTES), stream, args, plan);
}
