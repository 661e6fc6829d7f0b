// What the attention and linear kernels share: tensor-core tiles, asynchronous copies, bf16.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "launch.h"

namespace q35 {

using bf16 = __nv_bfloat16;

inline const bf16 *native(const q35_bf16 *p) { return reinterpret_cast<const bf16 *>(p); }
inline bf16 *native(q35_bf16 *p) { return reinterpret_cast<bf16 *>(p); }
inline bool aligned(const void *p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ inline unsigned shared_address(const void *p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory; zeros, and nothing is read, where `there` is false.
__device__ inline void copy16(void *to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(there ? 16 : 0)
                 : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `N` of this thread's latest groups are under way.
template <int N>
__device__ inline void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices; lanes 8 i .. 8 i + 7 hold the addresses of the rows of matrix i.
__device__ inline void load_matrices(unsigned (&r)[4], const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ inline void load_matrices_transposed(unsigned (&r)[4], const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8]. With g = lane / 4 and p = 2 (lane % 4):
// a: (g, p), (g + 8, p), (g, p + 8), (g + 8, p + 8), two along k each; b: (p, g), (p + 8, g), two along k each;
// c: (g, p), (g, p + 1), (g + 8, p), (g + 8, p + 1).
__device__ inline void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                           unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two floats as bf16, the first in the low half.
__device__ inline unsigned pack(float lo, float hi) {
    __nv_bfloat162 two = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<unsigned *>(&two);
}

__device__ inline void unpack8(uint4 v, float (&x)[8]) {
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// What every attention kernel reads.
struct AttentionArgs {
    q35_batch batch;
    int q_heads, kv_heads, head_dim, stride;
    float scale;  // of the scores, times log2(e): all exponentials are powers of two
    const bf16 *q, *projected, *k, *v;
    bf16 *out;

    __device__ int group() const { return q_heads / kv_heads; }
    // The gate of a token's query head; element i is its i-th.
    __device__ const bf16 *gate(int64_t token, int head) const {
        return projected + token * stride + (int64_t(2) * head + 1) * head_dim;
    }
    // The first key or value of a page's head.
    __device__ int64_t page_at(int page, int head) const {
        return (int64_t(page) * kv_heads + head) * Q35_PAGE_LEN * head_dim;
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
int64_t attention_decode_workspace(int max_seqs, int max_kv_len, q35_attention_dims dims);

}  // namespace q35
