// The delta layers: causal convolution and the recurrent gated delta rule. The chunked form is in delta_chunk.cu and
// delta_walk.cu; the two and the gated norm in one kernel, for decode, in delta_decode.cu.
#include "delta.cuh"

namespace {

constexpr int CONV_THREADS = 64;
constexpr int CONV_RUN = 8;  // tokens whose inputs a thread loads at once
constexpr int REC_THREADS = 128;
constexpr int ANY_COLUMNS = 32, ANY_ROWS = 8;

struct ConvArgs {
    q35_batch batch;
    const float *weight;
    const bf16 *projected;
    int stride, channels, kernel, tile;
    bf16 *tails, *out;
};

// N neighbouring channels of one row, as f32.
template <int N, typename T>
__device__ __forceinline__ void conv_load(const T *p, float x[N]) {
    if constexpr (N == 8)
        load8(p, x);
    else
        x[0] = static_cast<float>(*p);
}

template <int N>
__device__ __forceinline__ void conv_store(bf16 *p, const float x[N]) {
    if constexpr (N == 8)
        store8(p, x);
    else
        *p = __float2bfloat16(*x);
}

// One output: `input(tap)` is where the input under a tap lies. Taps in order, so the bits do not depend on the tiling.
template <int N, int KERNEL, typename Input>
__device__ __forceinline__ void conv_output(const ConvArgs &args, int c, int64_t t, Input input) {
    const int kernel = KERNEL > 0 ? KERNEL : args.kernel;
    float acc[N] = {};
#pragma unroll
    for (int tap = 0; tap < kernel; tap++) {
        float x[N], w[N];
        conv_load<N>(input(tap), x);
        conv_load<N>(args.weight + static_cast<int64_t>(tap) * args.channels + c, w);
#pragma unroll
        for (int j = 0; j < N; j++) acc[j] = fmaf(w[j], x[j], acc[j]);
    }
#pragma unroll
    for (int j = 0; j < N; j++) acc[j] = conv_silu(acc[j]);
    conv_store<N>(args.out + t * args.channels + c, acc);
}

// Tokens from .. kernel - 2 of a sequence, which need its tail, and then the tail itself. All of it is one thread's
// work, so nobody reads a tail that somebody else has replaced.
template <int N, int KERNEL>
__device__ __forceinline__ void conv_head(const ConvArgs &args, int seq, int c, int from = 0) {
    const int before = (KERNEL > 0 ? KERNEL : args.kernel) - 1, len = args.batch.query_len[seq];
    const int64_t first = args.batch.query_start[seq];
    bf16 *tail = args.tails + static_cast<int64_t>(args.batch.slot[seq]) * before * args.channels + c;
    // Input i of the sequence: the tail holds those before the first token.
    const auto input = [&](int i) -> const bf16 * {
        return i < before ? tail + static_cast<int64_t>(i) * args.channels
                          : args.projected + (first + i - before) * args.stride + c;
    };
    for (int i = from; i < before && i < len; i++)
        conv_output<N, KERNEL>(args, c, first + i, [&](int tap) { return input(i + tap); });
    // Oldest first: input len + i is never before input i, so nothing is read after it is replaced.
    for (int i = 0; i < before; i++) {
        const bf16 *next = input(len + i);
        bf16 *to = tail + static_cast<int64_t>(i) * args.channels;
        if constexpr (N == 8)
            *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(next);
        else
            *to = *next;
    }
}

// Causal depthwise convolution (the short convolution of Mamba and of Qwen3.5's delta layers). A thread has N channels
// and a tile of tokens of the flat batch, of any sequences. KERNEL 0: the width is not known at compile time. Own code.
template <int N, int KERNEL>
__global__ __launch_bounds__(CONV_THREADS) void causal_conv1d(ConvArgs args) {
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (c >= args.channels) return;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * args.tile;
    const int64_t end = min(begin + args.tile, static_cast<int64_t>(args.batch.num_tokens));
    const int kernel = KERNEL > 0 ? KERNEL : args.kernel;
    // Tokens from..to, each by its own loads.
    const auto one_by_one = [&](int64_t from, int64_t to) {
        for (int64_t t = from; t < to; t++) {
            const int seq = args.batch.seq_of[t];
            const int64_t i = t - args.batch.query_start[seq];
            if (i == 0) conv_head<N, KERNEL>(args, seq, c);
            if (i >= kernel - 1)
                conv_output<N, KERNEL>(
                    args, c, t, [&](int tap) { return args.projected + (t - (kernel - 1 - tap)) * args.stride + c; });
        }
    };
    if constexpr (KERNEL > 0 && N == 8) {
        float w[KERNEL][N];
#pragma unroll
        for (int tap = 0; tap < KERNEL; tap++)
            load8(args.weight + static_cast<int64_t>(tap) * args.channels + c, w[tap]);
        wait_for_inputs();
        let_next_start();
        uint4 rows[KERNEL - 1 + CONV_RUN];
        bool ready = false;  // rows[0 .. KERNEL - 2] are the inputs before t
        for (int64_t t = begin; t < end; t += CONV_RUN) {
            const int64_t last = t + CONV_RUN - 1;
            const int seq = args.batch.seq_of[t];
            // Tokens of one sequence, none of which needs its tail; a tail is left by the thread of the first token.
            const bool plain = last < end && args.batch.seq_of[last] == seq &&
                               t - args.batch.query_start[seq] >= KERNEL - 1;
            if (!plain) {
                ready = false;
                one_by_one(t, min(last + 1, end));
                continue;
            }
            const bf16 *row = args.projected + t * args.stride + c;
            if (!ready)
#pragma unroll
                for (int i = 0; i < KERNEL - 1; i++)
                    rows[i] =
                        *reinterpret_cast<const uint4 *>(row - static_cast<int64_t>(KERNEL - 1 - i) * args.stride);
#pragma unroll
            for (int i = 0; i < CONV_RUN; i++)
                rows[KERNEL - 1 + i] = *reinterpret_cast<const uint4 *>(row + static_cast<int64_t>(i) * args.stride);
#pragma unroll
            for (int i = 0; i < CONV_RUN; i++)
                *reinterpret_cast<uint4 *>(args.out + (t + i) * args.channels + c) = convolved<KERNEL>(rows + i, w);
#pragma unroll
            for (int i = 0; i < KERNEL - 1; i++) rows[i] = rows[CONV_RUN + i];
            ready = true;
        }
    } else {
        wait_for_inputs();
        let_next_start();
        one_by_one(begin, end);
    }
}

// What the chunked form leaves of the convolution: the tokens behind the chunks, dealt over the blocks along z, and the
// tails, which no other block reads.
__global__ __launch_bounds__(CONV_THREADS) void conv_rest(ConvArgs args) {
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * 8, seq = blockIdx.x;
    wait_for_inputs();
    let_next_start();
    const int len = args.batch.query_len[seq], done = tokens_in_chunks(args.batch.chunked_len[seq]);
    if (c >= args.channels || len == 0) return;
    if (blockIdx.z == 0) conv_head<8, CHUNK_TAPS>(args, seq, c, done);
    const bf16 *in = args.projected + c;
    for (int i = max(done, CHUNK_TAPS - 1) + blockIdx.z; i < len; i += gridDim.z) {
        const int64_t t = static_cast<int64_t>(args.batch.query_start[seq]) + i;
        conv_output<8, CHUNK_TAPS>(args, c, t,
                                   [&](int tap) { return in + (t - (CHUNK_TAPS - 1 - tap)) * args.stride; });
    }
}

// The gated delta rule (Yang et al. 2024, arXiv:2412.06464), token by token. A block has 32 columns of a head's state,
// in registers from the first token to the last: thread (warp, lane) has columns 4 (lane % 8) .. + 3 of rows
// 16 i + 4 warp + lane / 8. One pass over it a token: q^T S_new = exp(g) q^T S + (q . k) d. Own code.
template <int K, typename T>
__global__ __launch_bounds__(REC_THREADS) void delta_recurrent(DeltaArgs args) {
    typedef typename State<T>::Four Four;
    constexpr int ROWS = K / 16, EACH = K / 32;
    __shared__ float2 keys[4][K];        // (k, q), normalised: each warp its own copy, so a token has one barrier
    __shared__ float4 sums[2][4][2][8];  // of k^T S and q^T S, by parity of the token and by warp
    const q35_delta_dims d = args.dims;
    const int slices = d.v_dim / 32;
    const int slice = blockIdx.x % slices, head = blockIdx.x / slices % d.num_v_heads;
    const int seq = blockIdx.x / slices / d.num_v_heads;
    wait_for_inputs();
    let_next_start();
    const int len = args.batch.query_len[seq], done = tokens_in_chunks(args.batch.chunked_len[seq]);
    if (done >= len) return;

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane % 8;
    const int column = 32 * slice + 4 * group, row = 4 * warp + lane / 8;
    T *state = static_cast<T *>(args.states) +
               (static_cast<int64_t>(args.batch.slot[seq]) * d.num_v_heads + head) * K * d.v_dim + column;
    float4 s[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++)
        s[i] = State<T>::wide(*reinterpret_cast<const Four *>(state + (16 * i + row) * d.v_dim));

    const int k_head = head / (d.num_v_heads / d.num_k_heads);
    const int64_t first = args.batch.query_start[seq];
    for (int i = done; i < len; i++) {
        const int64_t t = first + i;
        const bf16 *mixed = args.mixed + t * args.channels;
        const bf16 *q_row = mixed + k_head * K + lane * EACH, *k_row = q_row + d.num_k_heads * K;
        float q[EACH], k[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j += 2) {
            const float2 q2 = unpack2(*reinterpret_cast<const uint32_t *>(q_row + j));
            const float2 k2 = unpack2(*reinterpret_cast<const uint32_t *>(k_row + j));
            q[j] = q2.x, q[j + 1] = q2.y, k[j] = k2.x, k[j + 1] = k2.y;
        }
        const uint2 v_raw = *reinterpret_cast<const uint2 *>(mixed + 2 * d.num_k_heads * K + head * d.v_dim + column);
        const bf16 *ba = args.projected + t * args.stride + args.ba_start;
        const float decay = expf(log_decay(args, ba, head)), beta = write_strength(ba, head);
        const Norms norms = key_norms<K>(q, k);
        __syncwarp();  // the last token's keys are read
#pragma unroll
        for (int j = 0; j < EACH; j++) keys[warp][lane * EACH + j] = make_float2(k[j] * norms.k, q[j] * norms.q);
        __syncwarp();

        const auto key = [&](int r) { return keys[warp][16 * r + row]; };
        float4 ks, qs;
        read_state(s, decay, key, ks, qs);
        // Two buffers: a warp comes back to one only behind the next token's barrier, when all have read it.
        float4(*part)[2][8] = sums[i & 1];
        if (lane < 8) part[warp][0][group] = ks, part[warp][1][group] = qs;
        __syncthreads();
        ks = over_warps(part, 0, group), qs = over_warps(part, 1, group);
        const float2 v01 = unpack2(v_raw.x), v23 = unpack2(v_raw.y);
        const float4 delta = correction(beta, ks, make_float4(v01.x, v01.y, v23.x, v23.y));
#pragma unroll
        for (int r = 0; r < ROWS; r++) s[r] = State<T>::rounded4(axpy(key(r).x, delta, s[r]));
        if (threadIdx.x < 8) {
            const float4 o = axpy(norms.qk, delta, qs);
            *reinterpret_cast<uint2 *>(args.out + (t * d.num_v_heads + head) * d.v_dim + column) =
                make_uint2(pack2(o.x, o.y), pack2(o.z, o.w));
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++)
        State<T>::store4(state + (16 * i + row) * d.v_dim, s[i]);
}

// The same for any sizes, every token of a sequence by the recurrence; the state stays in memory, where each of its
// elements is one thread's. Block: ANY_COLUMNS columns, their rows dealt over ANY_ROWS warps. Own code.
template <typename T>
__global__ __launch_bounds__(ANY_COLUMNS *ANY_ROWS) void delta_recurrent_any(DeltaArgs args, int slices) {
    extern __shared__ float keys[];  // k, then q, normalised
    __shared__ float sums[2][ANY_ROWS][ANY_COLUMNS];
    const q35_delta_dims d = args.dims;
    const int slice = blockIdx.x % slices, head = blockIdx.x / slices % d.num_v_heads;
    const int seq = blockIdx.x / slices / d.num_v_heads;
    wait_for_inputs();
    let_next_start();
    const int len = args.batch.query_len[seq];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = ANY_COLUMNS * slice + lane;
    const bool inside = column < d.v_dim;
    T *state = static_cast<T *>(args.states) +
               (static_cast<int64_t>(args.batch.slot[seq]) * d.num_v_heads + head) * d.k_dim * d.v_dim + column;
    float *k_keys = keys, *q_keys = keys + d.k_dim;
    const int k_head = head / (d.num_v_heads / d.num_k_heads);
    const float q_scale = rsqrtf(static_cast<float>(d.k_dim));
    const int64_t first = args.batch.query_start[seq];
    for (int i = 0; i < len; i++) {
        const int64_t t = first + i;
        const bf16 *q_row = args.mixed + t * args.channels + static_cast<int64_t>(k_head) * d.k_dim;
        const bf16 *k_row = q_row + static_cast<int64_t>(d.num_k_heads) * d.k_dim;
        const bf16 *v_row = args.mixed + t * args.channels + 2 * static_cast<int64_t>(d.num_k_heads) * d.k_dim +
                            static_cast<int64_t>(head) * d.v_dim;
        const bf16 *ba = args.projected + t * args.stride + args.ba_start;
        const float decay = expf(log_decay(args, ba, head)), beta = write_strength(ba, head);
        __syncthreads();  // the last token's keys and sums are read
        if (warp < 2) {
            const bf16 *from = warp == 0 ? k_row : q_row;
            float *to = warp == 0 ? k_keys : q_keys;
            float squares = 0.0f;
            for (int j = lane; j < d.k_dim; j += 32) {
                const float x = __bfloat162float(from[j]);
                squares = fmaf(x, x, squares);
            }
            const float norm = (warp == 0 ? 1.0f : q_scale) / sqrtf(lane_sum(squares) + L2_EPS);
            for (int j = lane; j < d.k_dim; j += 32) to[j] = __bfloat162float(from[j]) * norm;
        }
        __syncthreads();
        float ks = 0.0f, qs = 0.0f;
        if (inside)
            for (int r = warp; r < d.k_dim; r += ANY_ROWS)
                ks = fmaf(k_keys[r], decay * State<T>::load(state + static_cast<int64_t>(r) * d.v_dim), ks);
        sums[0][warp][lane] = ks;
        __syncthreads();
        ks = 0.0f;
        for (int w = 0; w < ANY_ROWS; w++) ks += sums[0][w][lane];
        if (inside) {
            const float delta = beta * (__bfloat162float(v_row[column]) - ks);
            for (int r = warp; r < d.k_dim; r += ANY_ROWS) {
                T *p = state + static_cast<int64_t>(r) * d.v_dim;
                const float next = fmaf(k_keys[r], delta, decay * State<T>::load(p));
                State<T>::store(p, next);
                qs = fmaf(q_keys[r], next, qs);
            }
        }
        sums[1][warp][lane] = qs;
        __syncthreads();
        if (warp == 0 && inside) {
            qs = 0.0f;
            for (int w = 0; w < ANY_ROWS; w++) qs += sums[1][w][lane];
            args.out[(t * d.num_v_heads + head) * d.v_dim + column] = __float2bfloat16(qs);
        }
    }
}

cudaError_t launch_recurrent(cudaStream_t stream, const DeltaArgs &args) {
    const int64_t heads = static_cast<int64_t>(args.batch.num_seqs) * args.dims.num_v_heads;
    const unsigned blocks = static_cast<unsigned>(heads * (args.dims.v_dim / 32));
    const bool half = args.dims.half_states != 0;
    const auto kernel = args.dims.k_dim == 64 ? (half ? delta_recurrent<64, __half> : delta_recurrent<64, float>)
                                              : (half ? delta_recurrent<128, __half> : delta_recurrent<128, float>);
    return launch(kernel, blocks, REC_THREADS, 0, stream, args);
}

}  // namespace

extern "C" int q35_causal_conv1d(void *stream, q35_batch batch, q35_delta_dims dims, const float *weight,
                                 const q35_bf16 *projected, int stride, q35_bf16 *tails, q35_bf16 *out) {
    const int channels = conv_channels(dims);
    if (batch.num_tokens <= 0 || channels <= 0) return 0;
    const bool vec = channels % 8 == 0 && stride % 8 == 0 && aligned(weight, 16) && aligned(projected, 16) &&
                     aligned(tails, 16) && aligned(out, 16);
    // Few tokens: a token a block, to have enough blocks. Many: runs, which load each input and weight about once.
    const int tile = batch.num_tokens <= 128 ? 1 : batch.num_tokens <= 1024 ? CONV_RUN : 2 * CONV_RUN;
    const ConvArgs args = {batch,    weight,           as_bf16(projected), stride,
                           channels, dims.conv_kernel, tile,               as_bf16(tails), as_bf16(out)};
    const dim3 grid(static_cast<unsigned>(ceil_div(batch.num_tokens, tile)),
                    static_cast<unsigned>(ceil_div(channels, CONV_THREADS * (vec ? 8 : 1))));
    const auto kernel = !vec                    ? causal_conv1d<1, 0>
                        : dims.conv_kernel == 4 ? causal_conv1d<8, 4>
                                                : causal_conv1d<8, 0>;
    return launch(kernel, grid, CONV_THREADS, 0, as_stream(stream), args);
}

extern "C" int64_t q35_delta_workspace(int max_tokens, int max_seqs, q35_delta_dims dims) {
    return fast_dims(dims) ? chunk_workspace(max_tokens, max_seqs, dims) : 0;
}

extern "C" int q35_gated_delta_rule(void *stream, q35_batch batch, q35_delta_dims dims, const float *a_log,
                                    const float *dt_bias, const q35_bf16 *mixed, const q35_bf16 *projected, int stride,
                                    int ba_start, void *states, float *workspace, q35_bf16 *out) {
    if (batch.num_tokens <= 0 || batch.num_seqs <= 0 || dims.num_v_heads <= 0 || dims.v_dim <= 0) return 0;
    const DeltaArgs args = {batch,  dims,     a_log,  dt_bias,      as_bf16(mixed), as_bf16(projected),
                            stride, ba_start, states, as_bf16(out), conv_channels(dims)};
    const cudaStream_t s = as_stream(stream);
    const int64_t heads = static_cast<int64_t>(batch.num_seqs) * dims.num_v_heads;
    if (fast_dims(dims) && aligned(mixed, 16) && aligned(states, 16) && aligned(out, 16)) {
        if (batch.max_query_len > SHORT_CHUNK) {
            const cudaError_t error = launch_chunks(s, args, nullptr, workspace);
            if (error != cudaSuccess) return error;
        }
        return launch_recurrent(s, args);
    }
    const int slices = static_cast<int>(ceil_div(dims.v_dim, ANY_COLUMNS));
    const size_t shared = 2 * sizeof(float) * dims.k_dim;
    const auto kernel = dims.half_states != 0 ? delta_recurrent_any<__half> : delta_recurrent_any<float>;
    if (shared > 40 * 1024) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (error != cudaSuccess) return error;
    }
    const unsigned blocks = static_cast<unsigned>(heads * slices);
    return launch(kernel, blocks, ANY_COLUMNS * ANY_ROWS, shared, s, args, slices);
}

extern "C" int q35_delta_prompt(void *stream, q35_batch batch, q35_delta_dims dims, const float *weight,
                                const float *a_log, const float *dt_bias, const float *norm, float eps,
                                const q35_bf16 *projected, int stride, int z_start, int ba_start, q35_bf16 *tails,
                                void *states, float *workspace, q35_bf16 *mixed, q35_bf16 *out) {
    if (batch.num_tokens <= 0 || batch.num_seqs <= 0 || dims.num_v_heads <= 0 || dims.v_dim <= 0) return 0;
    const bool fused = fast_dims(dims) && dims.k_dim == 128 && dims.conv_kernel == CHUNK_TAPS &&
                       dims.num_v_heads % dims.num_k_heads == 0 && batch.max_query_len > SHORT_CHUNK &&
                       stride % 8 == 0 && aligned(weight) && aligned(projected) && aligned(tails) && aligned(mixed) &&
                       aligned(states) && aligned(out);
    int error = cudaSuccess;
    if (fused) {
        const int channels = conv_channels(dims);
        const DeltaArgs args = {batch,  dims,     a_log,  dt_bias,      as_bf16(mixed), as_bf16(projected),
                                stride, ba_start, states, as_bf16(out), channels};
        const ConvInputs conv = {weight, as_bf16(tails), as_bf16(mixed)};
        const ConvArgs rest = {batch, weight, args.projected, stride, channels, CHUNK_TAPS, 1, conv.tails, conv.mixed};
        // What a preempted sequence had generated is behind its chunks: where sequences are few, more blocks for each.
        const int shares = batch.num_seqs < 32 ? 64 / batch.num_seqs : 1;
        const dim3 grid(static_cast<unsigned>(batch.num_seqs),
                        static_cast<unsigned>(ceil_div(channels, CONV_THREADS * 8)),
                        static_cast<unsigned>(shares < 16 ? shares : 16));
        const cudaStream_t s = as_stream(stream);
        error = launch_chunks(s, args, &conv, workspace);
        if (error == cudaSuccess) error = launch(conv_rest, grid, CONV_THREADS, 0, s, rest);
        if (error == cudaSuccess) error = launch_recurrent(s, args);
    } else {
        error = q35_causal_conv1d(stream, batch, dims, weight, projected, stride, tails, mixed);
        if (error == cudaSuccess)
            error = q35_gated_delta_rule(stream, batch, dims, a_log, dt_bias, mixed, projected, stride, ba_start,
                                         states, workspace, out);
    }
    if (error == cudaSuccess)
        error = q35_gated_rmsnorm(stream, batch.num_tokens, dims.num_v_heads, dims.v_dim, norm, eps, projected, stride,
                                  z_start, out);
    return error;
}
