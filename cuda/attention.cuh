// What the attention kernels share.
#pragma once
#include "mma.cuh"

// Bytes of the keys, or of the values, of a page's head in fp8.
__host__ __device__ constexpr int fp8_bytes(int head_dim) { return Q35_PAGE_LEN * (head_dim + 4); }

// What every attention kernel reads.
struct AttentionArgs {
    q35_batch batch;
    int q_heads, kv_heads, head_dim, stride;
    float scale;  // of the scores, times log2(e): all exponentials are powers of two
    const bf16 *q, *projected, *k, *v;
    bf16 *out;
    const uint8_t *codes;  // pages in fp8; k and v are null then

    __device__ int group() const { return q_heads / kv_heads; }
    // The gate of a token's query head; element i is its i-th.
    __device__ const bf16 *gate(int64_t token, int head) const {
        return projected + token * stride + (int64_t(2) * head + 1) * head_dim;
    }
    // The first key or value of a page's head.
    __device__ int64_t page_at(int page, int head) const {
        return (int64_t(page) * kv_heads + head) * Q35_PAGE_LEN * head_dim;
    }
    // Keys or values of a page's head in fp8: codes [64, head_dim], then scales f32 [64].
    __device__ const uint8_t *codes_at(int page, int head, bool values) const {
        return codes + ((int64_t(page) * kv_heads + head) * 2 + values) * fp8_bytes(head_dim);
    }
};

// Sequences with more new tokens than this are prefill: one block walks all keys of a tile of queries. The others are
// decode: their keys are split over blocks.
constexpr int MAX_DECODE_LEN = 8;

// The two for head_dim 64, 128 or 256; each leaves the other's sequences alone. `fits`: whether a device with so much
// shared memory for a block can run it.
cudaError_t attention_prefill(cudaStream_t stream, const AttentionArgs &args);
cudaError_t attention_decode(cudaStream_t stream, const AttentionArgs &args, float *workspace);
bool attention_prefill_fits(int head_dim, int shared_limit);
bool attention_decode_fits(int head_dim, int shared_limit);
int64_t attention_decode_workspace(int max_seqs, q35_attention_dims dims);

// Sequences that are prefill, from pages in fp8: decodes those to `pages`, bf16 keys [room, ..] then values, and runs
// attention_prefill over them. page_list, int32 [room], and page_start, int32 [num_seqs], are where the decoded pages are.
cudaError_t attention_prefill_fp8(cudaStream_t stream, const AttentionArgs &args, int room, bf16 *pages, int *page_list,
                                  int *page_start);

// A step of the running softmax: the products s of 16 rows with the 8 TILES keys from key0 on become weights. Of this
// thread's rows i = 0, 1, which see the keys up to position[i]: the highest score so far, the sum of the weights
// relative to it in the thread's columns, and the accumulators of the result.
template <int TILES, int D>
__device__ __forceinline__ void softmax_step(const AttentionArgs &args, float (&s)[TILES][4], int key0,
                                             const int (&position)[2], float (&top)[2], float (&sum)[2],
                                             float (&out)[D / 8][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float highest = top[i];
#pragma unroll
        for (int n = 0; n < TILES; n++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float &x = s[n][2 * i + j];
                const int key = key0 + 8 * n + lane % 4 * 2 + j;
                x = key <= position[i] ? x * args.scale : -INFINITY;
                highest = fmaxf(highest, x);
            }
        }
        highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, 2));
        const float safe = highest == -INFINITY ? 0.0f : highest;
        const float fade = exp2f(top[i] - safe);
        top[i] = highest;
        sum[i] *= fade;
#pragma unroll
        for (int n = 0; n < TILES; n++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                s[n][2 * i + j] = exp2f(s[n][2 * i + j] - safe);
                sum[i] += s[n][2 * i + j];
            }
        }
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            out[n][2 * i] *= fade;
            out[n][2 * i + 1] *= fade;
        }
    }
}
