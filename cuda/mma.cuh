// Tensor-core tiles and asynchronous copies to shared memory, for all kernels.
#pragma once
#include "device.cuh"

__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory; zeros, and nothing is read, where `there` is false.
// The first takes addresses of those spaces, the second generic ones.
__device__ __forceinline__ void copy16(uint32_t to, size_t from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy16(void *to, const void *from, bool there) {
    copy16(shared_address(to), reinterpret_cast<size_t>(from), there);
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `N` of this thread's latest groups are under way.
template <int N>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices; lanes 8 i .. 8 i + 7 hold the addresses of the rows of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t r[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void load_matrices(uint32_t r[4], const bf16 *row) { load_matrices(r, shared_address(row)); }
__device__ __forceinline__ void load_matrices_transposed(uint32_t r[4], const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8]. With g = lane / 4 and p = 2 (lane % 4):
// a: (g, p), (g + 8, p), (g, p + 8), (g + 8, p + 8), two along k each; b: (p, g), (p + 8, g), two along k each;
// c: (g, p), (g, p + 1), (g + 8, p), (g + 8, p + 1).
__device__ __forceinline__ void mma(float c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    mma(c, a[0], a[1], a[2], a[3], b[0], b[1]);
}
