// What the files of the delta layers share: convolution and recurrence (delta.cu), both and the norm in one kernel for
// decode (delta_decode.cu), the chunked form (delta_chunk.cu). One step of the recurrence is here, so that it has the
// same bits everywhere.
#pragma once
#include <cuda_fp16.h>

#include "device.cuh"

struct DeltaArgs {
    q35_batch batch;
    q35_delta_dims dims;
    const float *a_log, *dt_bias;
    const bf16 *mixed, *projected;
    int stride, ba_start;
    void *states;  // f32, or f16 where dims.half_states
    bf16 *out;
    int channels;  // of a row of mixed
};

// A last chunk of at most this many tokens takes the recurrence instead: decode and speculation launch no chunk
// kernels, and it depends on the sequence's own chunked_len alone.
constexpr int SHORT_CHUNK = 8;
constexpr float L2_EPS = 1e-6f;

__host__ __device__ __forceinline__ int tokens_in_chunks(int chunked_len) {
    const int rest = chunked_len % Q35_CHUNK_LEN;
    return rest <= SHORT_CHUNK ? chunked_len - rest : chunked_len;
}

// Barriers of `THREADS` threads by number, 1 and up: who arrives does not wait.
template <int THREADS>
__device__ __forceinline__ void named_arrive(int number) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "n"(THREADS) : "memory");
}
template <int THREADS>
__device__ __forceinline__ void named_sync(int number) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(THREADS) : "memory");
}

// The convolution's activation: `silu` by approximate functions that take what is below 2^-126 for 0; the bf16 of the
// result hides their error of two f32 roundings. The exact quotient costs more instructions than all the rest of an
// output, and the care of numbers that small as many again. At x = -inf it is NaN, too.
__device__ __forceinline__ float conv_silu(float x) {
    float power, quotient;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-1.4426950408889634f * x));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(quotient) : "f"(1.0f + power));
    return x * quotient;
}

// One output of eight channels of the rows under its taps, oldest first. Taps in order, so the bits do not depend on
// who has a token.
template <int TAPS>
__device__ __forceinline__ uint4 convolved(const uint4 *rows, const float (&w)[TAPS][8]) {
    float y[8] = {};
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++) {
        float x[8];
        unpack8(rows[tap], x);
#pragma unroll
        for (int j = 0; j < 8; j++) y[j] = fmaf(w[tap][j], x[j], y[j]);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) y[j] = conv_silu(y[j]);
    return make_uint4(pack2(y[0], y[1]), pack2(y[2], y[3]), pack2(y[4], y[5]), pack2(y[6], y[7]));
}

// Log decay and write strength of a token, of its columns of a and b.
__device__ __forceinline__ float log_decay(float a_log, float dt_bias, float column) {
    const float a = column + dt_bias;
    // Above 20, log(1 + e^a) is a to f32 rounding: the reference's own threshold.
    return -expf(a_log) * (a > 20.0f ? a : log1pf(expf(a)));
}

__device__ __forceinline__ float write_strength(float column) { return precise_sigmoid(column); }

// The same, where `ba` is the token's column ba_start.
__device__ __forceinline__ float log_decay(const DeltaArgs &args, const bf16 *ba, int head) {
    return log_decay(args.a_log[head], args.dt_bias[head], __bfloat162float(ba[args.dims.num_v_heads + head]));
}

__device__ __forceinline__ float write_strength(const bf16 *ba, int head) {
    return write_strength(__bfloat162float(ba[head]));
}

__device__ __forceinline__ float4 operator*(float s, float4 a) {
    return make_float4(s * a.x, s * a.y, s * a.z, s * a.w);
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

__device__ __forceinline__ float4 axpy(float s, float4 a, float4 b) {
    return make_float4(fmaf(s, a.x, b.x), fmaf(s, a.y, b.y), fmaf(s, a.z, b.z), fmaf(s, a.w, b.w));
}

__device__ __forceinline__ float4 add_lanes(float4 a, int step) {
    return a + make_float4(__shfl_xor_sync(ALL_LANES, a.x, step), __shfl_xor_sync(ALL_LANES, a.y, step),
                           __shfl_xor_sync(ALL_LANES, a.z, step), __shfl_xor_sync(ALL_LANES, a.w, step));
}

// The recurrence in registers. Four warps have 32 columns of a head's state: thread (warp, lane) columns
// 4 (lane % 8) .. + 3 of rows 16 r + 4 warp + lane / 8.

// The factors that normalise q (with its scale) and k, of which each lane has K / 32 neighbouring elements, and q . k
// of the normalised.
struct Norms {
    float q, k, qk;
};
template <int K>
__device__ __forceinline__ Norms key_norms(const float (&q)[K / 32], const float (&k)[K / 32]) {
    float qq = 0.0f, kk = 0.0f, qk = 0.0f;
#pragma unroll
    for (int j = 0; j < K / 32; j++) qq = fmaf(q[j], q[j], qq), kk = fmaf(k[j], k[j], kk);
    const float q_scale = rsqrtf(static_cast<float>(K));
    const float q_norm = q_scale / sqrtf(lane_sum(qq) + L2_EPS), k_norm = 1.0f / sqrtf(lane_sum(kk) + L2_EPS);
#pragma unroll
    for (int j = 0; j < K / 32; j++) qk = fmaf(q[j] * q_norm, k[j] * k_norm, qk);
    return {q_norm, k_norm, lane_sum(qk)};
}

// Decays a thread's rows and adds up k^T S and q^T S over those of its warp; key(r) is (k, q) of its row r.
template <int ROWS, typename Key>
__device__ __forceinline__ void read_state(float4 (&s)[ROWS], float decay, Key key, float4 &ks, float4 &qs) {
    ks = qs = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float2 x = key(r);
        s[r] = decay * s[r];
        ks = axpy(x.x, s[r], ks);
        qs = axpy(x.y, s[r], qs);
    }
    ks = add_lanes(add_lanes(ks, 8), 16);
    qs = add_lanes(add_lanes(qs, 8), 16);
}

// States are T in memory, float or __half. What an f32 becomes there: `State<T>::round`, of two neighbours.
template <typename T>
struct State;
template <>
struct State<float> {
    typedef float4 Four;  // four neighbours as they are in memory
    static __device__ __forceinline__ float4 wide(float4 x) { return x; }
    static __device__ __forceinline__ void store4(float *p, float4 x) { *reinterpret_cast<float4 *>(p) = x; }
    static __device__ __forceinline__ float load(const float *p) { return *p; }
    static __device__ __forceinline__ void store(float *p, float x) { *p = x; }
    static __device__ __forceinline__ float4 rounded4(float4 x) { return x; }
    static __device__ __forceinline__ void round(float &, float &) {}
};
template <>
struct State<__half> {
    // To nearest even; what is too large becomes the largest f16, and NaN stays.
    static __device__ __forceinline__ __half2 from2(float a, float b) {
        const __half2 largest = __halves2half2(__ushort_as_half(0x7bff), __ushort_as_half(0x7bff));
        return __hmax2_nan(__hmin2_nan(__floats2half2_rn(a, b), largest), __hneg2(largest));
    }
    typedef uint2 Four;
    static __device__ __forceinline__ float4 wide(uint2 words) {
        const float2 a = __half22float2(*reinterpret_cast<const __half2 *>(&words.x));
        const float2 b = __half22float2(*reinterpret_cast<const __half2 *>(&words.y));
        return make_float4(a.x, a.y, b.x, b.y);
    }
    static __device__ __forceinline__ void store4(__half *p, float4 x) {
        const __half2 a = from2(x.x, x.y), b = from2(x.z, x.w);
        *reinterpret_cast<uint2 *>(p) =
            make_uint2(*reinterpret_cast<const uint32_t *>(&a), *reinterpret_cast<const uint32_t *>(&b));
    }
    static __device__ __forceinline__ float load(const __half *p) { return __half2float(*p); }
    static __device__ __forceinline__ void store(__half *p, float x) { *p = __low2half(from2(x, 0.0f)); }
    static __device__ __forceinline__ void round(float &a, float &b) {
        const float2 x = __half22float2(from2(a, b));
        a = x.x, b = x.y;
    }
    static __device__ __forceinline__ float4 rounded4(float4 x) {
        round(x.x, x.y), round(x.z, x.w);
        return x;
    }
};

// A sum over the four warps: parts[warp][0] of k^T S, [1] of q^T S.
__device__ __forceinline__ float4 over_warps(const float4 (*parts)[2][8], int which, int group) {
    return (parts[0][which][group] + parts[1][which][group]) + (parts[2][which][group] + parts[3][which][group]);
}

// d of four columns.
__device__ __forceinline__ float4 correction(float beta, float4 ks, float4 v) { return beta * axpy(-1.0f, ks, v); }

// C of launch.h.
static inline int conv_channels(q35_delta_dims d) { return 2 * d.num_k_heads * d.k_dim + d.num_v_heads * d.v_dim; }

// Whether the kernels that hold states in registers take these sizes; the others go through the plain recurrence.
static inline bool fast_dims(q35_delta_dims d) { return (d.k_dim == 64 || d.k_dim == 128) && d.v_dim % 32 == 0; }

// What the convolution adds to DeltaArgs where the chunked form has it inside; mixed is written.
struct ConvInputs {
    const float *weight;
    bf16 *tails, *mixed;
};
constexpr int CHUNK_TAPS = 4;

// f32 elements of workspace, and the launch of the chunked tokens. Sizes for which fast_dims holds. Where `conv` is not
// null, k_dim is 128 and conv_kernel CHUNK_TAPS: the tokens in chunks are convolved first. Tails are only read.
int64_t chunk_workspace(int64_t tokens, int64_t seqs, q35_delta_dims dims);
cudaError_t launch_chunks(cudaStream_t stream, const DeltaArgs &args, const ConvInputs *conv, float *workspace);
