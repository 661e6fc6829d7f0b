// A decode step of a delta layer in one kernel: what causal_conv1d, delta_recurrent and gated_rmsnorm do one after the
// other for sequences of one new token, with their roundings to bf16 between them and their orders of summation.
#include "delta.cuh"

namespace {

constexpr int TAPS = 4;

// Adds one to a counter and returns what it was; what the block did before its barrier is before it, also for the block
// that counts last.
__device__ __forceinline__ int count_arrival(int32_t *counter) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

__device__ __forceinline__ uint32_t bits(bf16 x) { return __bfloat16_as_ushort(x); }

struct DecodeArgs {
    DeltaArgs rule;
    const float *weight, *norm;
    float eps;
    int z_start;
    bf16 *tails;
    int32_t *counters;  // [num_seqs, K]: heads that have read the tail of their key head
};

// A block has a value head of a sequence, with k_dim = v_dim = D: its state is in registers, four warps for 32 columns.
// The first 3 D / 2 threads convolve two channels each, of q, of k and of v; the D behind them have the gates, and the
// one behind those the decay. Heads that share a key head convolve its channels each for itself; the last of them to
// have read their tail replaces it. Own code.
template <int D, typename T>
__global__ __launch_bounds__(4 * D, 256 / D) void delta_decode(DecodeArgs args) {
    constexpr int ROWS = D / 16, EACH = D / 32, PAIRS = D / 2;
    constexpr int FIRST_GATE = 3 * PAIRS, COUNTING = 4 * D - 32, NORM_LANES = D / 8;
    static_assert(FIRST_GATE % 32 == 0 && FIRST_GATE + D < COUNTING, "no warp has two of these");
    __shared__ __align__(16) float2 keys[D];          // (k, q), not normalised
    __shared__ __align__(16) float values[D];
    __shared__ float4 sums[D / 32][4][2][8];          // of k^T S and q^T S
    __shared__ __align__(16) bf16 core[D];            // the rule's output
    __shared__ __align__(16) float gains[D], gates[D];
    __shared__ uint32_t recent[TAPS - 1][2 * PAIRS];  // the next tail of q and k
    __shared__ float2 rates;                          // decay, beta
    __shared__ bool last;
    const DeltaArgs &rule = args.rule;
    const q35_delta_dims d = rule.dims;
    const int tid = threadIdx.x, warp = tid / 32 % 4, lane = tid % 32, slice = tid / 128, group = lane % 8;
    const int sharing = gridDim.x, k_head = blockIdx.y, head = k_head * sharing + blockIdx.x, seq = blockIdx.z;
    const int part = tid / PAIRS, pair = tid % PAIRS;  // 0: q, 1: k, 2: v
    const int element = tid - FIRST_GATE;  // whose gate it has
    const bool convolves = part < 3, has_gate = element >= 0 && element < D, has_rates = element == D;
    const int part_start = part == 0   ? k_head * D
                           : part == 1 ? (d.num_k_heads + k_head) * D
                                       : 2 * d.num_k_heads * D + head * D;
    const int channel = part_start + 2 * pair;
    const int column = 32 * slice + 4 * group, row = 4 * warp + lane / 8;

    // Weights and inputs of a thread's part; all parts in the same registers, since the state takes most.
    float2 w[TAPS];
    uint32_t x[TAPS];
    if (convolves) {
#pragma unroll
        for (int tap = 0; tap < TAPS; tap++)
            w[tap] = *reinterpret_cast<const float2 *>(args.weight + tap * rule.channels + channel);
    } else if (has_gate) {
        w[0].x = args.norm[element];
    } else if (has_rates) {
        w[0] = make_float2(rule.a_log[head], rule.dt_bias[head]);
    }

    // What the last step left: it was over when this one began.
    const int t = rule.batch.query_start[seq], slot = rule.batch.slot[seq];
    bf16 *tail = args.tails + static_cast<int64_t>(slot) * (TAPS - 1) * rule.channels + channel;
    if (convolves) {
#pragma unroll
        for (int i = 0; i < TAPS - 1; i++) x[i] = *reinterpret_cast<const uint32_t *>(tail + i * rule.channels);
    }
    T *state = static_cast<T *>(rule.states) + (static_cast<int64_t>(slot) * d.num_v_heads + head) * D * D + row * D +
               column;
    typedef typename State<T>::Four Four;
    Four loaded[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) loaded[r] = *reinterpret_cast<const Four *>(state + 16 * r * D);
    wait_for_inputs();
    let_next_start();

    const bf16 *projected = rule.projected + static_cast<int64_t>(t) * rule.stride;
    if (convolves) {
        x[TAPS - 1] = *reinterpret_cast<const uint32_t *>(projected + channel);
    } else if (has_gate) {
        x[0] = bits(projected[args.z_start + head * D + element]);
    } else if (has_rates) {
        x[0] = bits(projected[rule.ba_start + d.num_v_heads + head]);
        x[1] = bits(projected[rule.ba_start + head]);
    }

    if (convolves) {
        float2 y = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int tap = 0; tap < TAPS; tap++) {
            const float2 in = unpack2(x[tap]);
            y.x = fmaf(w[tap].x, in.x, y.x), y.y = fmaf(w[tap].y, in.y, y.y);
        }
        y = unpack2(pack2(conv_silu(y.x), conv_silu(y.y)));
        if (part == 2) {
            *reinterpret_cast<float2 *>(&values[2 * pair]) = y;
#pragma unroll
            for (int i = 0; i < TAPS - 1; i++) *reinterpret_cast<uint32_t *>(tail + i * rule.channels) = x[i + 1];
        } else {
#pragma unroll
            for (int i = 0; i < TAPS - 1; i++) recent[i][tid] = x[i + 1];
            float *to = reinterpret_cast<float *>(&keys[2 * pair]) + (part == 0);
            to[0] = y.x, to[2] = y.y;
        }
    } else if (has_gate) {
        gains[element] = w[0].x, gates[element] = silu(unpack2(x[0]).x);
    } else if (has_rates) {
        rates = make_float2(expf(log_decay(w[0].x, w[0].y, unpack2(x[0]).x)), write_strength(unpack2(x[1]).x));
    }
    __syncthreads();  // the tails are read, what all need of this token is there

    float q[EACH], k[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) k[j] = keys[lane * EACH + j].x, q[j] = keys[lane * EACH + j].y;
    const Norms norms = key_norms<D>(q, k);
    const float2 *rows = &keys[row];
    const auto key = [&](int r) { return make_float2(rows[16 * r].x * norms.k, rows[16 * r].y * norms.q); };
    float4 s[ROWS], ks, qs;
#pragma unroll
    for (int r = 0; r < ROWS; r++) s[r] = State<T>::wide(loaded[r]);
    read_state(s, rates.x, key, ks, qs);
    if (lane < 8) sums[slice][warp][0][group] = ks, sums[slice][warp][1][group] = qs;
    __syncthreads();
    ks = over_warps(sums[slice], 0, group), qs = over_warps(sums[slice], 1, group);
    const float4 delta = correction(rates.y, ks, *reinterpret_cast<const float4 *>(&values[column]));
    if (warp == 0) {
        const float4 o = axpy(norms.qk, delta, qs);
        if (lane < 8) *reinterpret_cast<uint2 *>(&core[column]) = make_uint2(pack2(o.x, o.y), pack2(o.z, o.w));
        named_arrive<D + 32>(1);
    }
    if (tid == COUNTING) {
        int32_t *counter = args.counters + seq * d.num_k_heads + k_head;
        last = sharing == 1 || count_arrival(counter) == sharing - 1;
        if (last && sharing > 1) *counter = 0;
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        State<T>::store4(state + 16 * r * D, axpy(key(r).x, delta, s[r]));
    if (tid / 32 == FIRST_GATE / 32) {
        named_sync<D + 32>(1);  // core is there
        const int at = lane % NORM_LANES * 8;
        float y[8], weights[8], open[8];
        load8(&core[at], y);
        load8(&gains[at], weights);
        load8(&gates[at], open);
        float squares = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) squares = fmaf(y[j], y[j], squares);
        const float scale = 1.0f / sqrtf(lane_sum<NORM_LANES>(squares) / D + args.eps);
#pragma unroll
        for (int j = 0; j < 8; j++) y[j] = weights[j] * (y[j] * scale * open[j]);
        if (lane < NORM_LANES) store8(rule.out + (static_cast<int64_t>(t) * d.num_v_heads + head) * D + at, y);
    }
    __syncthreads();  // last is there
    if (part < 2 && last)
#pragma unroll
        for (int i = 0; i < TAPS - 1; i++) *reinterpret_cast<uint32_t *>(tail + i * rule.channels) = recent[i][tid];
}

}  // namespace

extern "C" int q35_delta_decode(void *stream, q35_batch batch, q35_delta_dims dims, const float *weight,
                                const float *a_log, const float *dt_bias, const float *norm, float eps,
                                const q35_bf16 *projected, int stride, int z_start, int ba_start, q35_bf16 *tails,
                                void *states, int32_t *counters, q35_bf16 *mixed, q35_bf16 *out) {
    if (batch.num_tokens <= 0 || dims.num_v_heads <= 0) return 0;
    if (batch.max_query_len > 1) return cudaErrorInvalidValue;
    // Where one of the three launchers would take its kernel for any sizes, its sums have another order.
    const bool fused = dims.k_dim == dims.v_dim && (dims.k_dim == 64 || dims.k_dim == 128) &&
                       dims.conv_kernel == TAPS && batch.num_tokens == batch.num_seqs && batch.num_seqs < 65536 &&
                       dims.num_k_heads < 65536 && dims.num_v_heads % dims.num_k_heads == 0 &&
                       stride % 8 == 0 &&
                       z_start % 8 == 0 && aligned(weight) && aligned(norm) && aligned(projected) && aligned(tails) &&
                       aligned(states) && aligned(mixed) && aligned(out);
    if (!fused) {
        // Sequences of one token take the recurrence, which has no workspace.
        int error = q35_causal_conv1d(stream, batch, dims, weight, projected, stride, tails, mixed);
        if (error == 0)
            error = q35_gated_delta_rule(stream, batch, dims, a_log, dt_bias, mixed, projected, stride, ba_start,
                                         states, nullptr, out);
        if (error == 0)
            error = q35_gated_rmsnorm(stream, batch.num_tokens, dims.num_v_heads, dims.v_dim, norm, eps, projected,
                                      stride, z_start, out);
        return error;
    }
    const DeltaArgs rule = {batch,  dims,     a_log,  dt_bias,      as_bf16(mixed), as_bf16(projected),
                            stride, ba_start, states, as_bf16(out), conv_channels(dims)};
    const DecodeArgs args = {rule, weight, norm, eps, z_start, as_bf16(tails), counters};
    const dim3 blocks(dims.num_v_heads / dims.num_k_heads, dims.num_k_heads, batch.num_seqs);
    const bool half = dims.half_states != 0;
    const auto kernel = dims.k_dim == 64 ? (half ? delta_decode<64, __half> : delta_decode<64, float>)
                                         : (half ? delta_decode<128, __half> : delta_decode<128, float>);
    return launch(kernel, blocks, 4 * dims.k_dim, 0, as_stream(stream), args);
}
