// What the two halves of the gated delta rule share: recurrent (delta.cu) and chunked (delta_chunk.cu).
#pragma once
#include "device.cuh"

struct DeltaArgs {
    q35_batch batch;
    q35_delta_dims dims;
    const float *a_log, *dt_bias;
    const bf16 *mixed, *projected;
    int stride, ba_start;
    float *states;
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

// Log decay and write strength of a token: `ba` is its column ba_start.
__device__ __forceinline__ float log_decay(const DeltaArgs &args, const bf16 *ba, int head) {
    const float a = __bfloat162float(ba[args.dims.num_v_heads + head]) + args.dt_bias[head];
    // Above 20, log(1 + e^a) is a to f32 rounding: the reference's own threshold.
    return -expf(args.a_log[head]) * (a > 20.0f ? a : log1pf(expf(a)));
}

__device__ __forceinline__ float write_strength(const bf16 *ba, int head) {
    return precise_sigmoid(__bfloat162float(ba[head]));
}

// Whether the kernels that hold states in registers take these sizes; the others go through the plain recurrence.
static inline bool fast_dims(q35_delta_dims d) { return (d.k_dim == 64 || d.k_dim == 128) && d.v_dim % 32 == 0; }

// f32 elements of workspace, and the launch of the chunked tokens. Sizes for which fast_dims holds.
int64_t chunk_workspace(int64_t tokens, int64_t seqs, q35_delta_dims dims);
cudaError_t launch_chunks(cudaStream_t stream, const DeltaArgs &args, float *workspace);
