// Of Hopper's copies and products what the experts of many tokens use: tiles of which both agree on the layout.
//
// A tile has rows of 64 bf16: 128 bytes. It starts at a multiple of 1024 bytes, row r at 128 r, and the 16 bytes c of a
// row are at place c ^ (r % 8): what a tensor copy with a swizzle of 128 bytes writes.
#pragma once
#include "hopper.cuh"

// A kernel whose blocks come in pairs, each on a multiprocessor of its own: of either all shared memory is in reach of
// the copies and barriers of both. Other architectures compile it without.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define Q35_PAIRS __cluster_dims__(2, 1, 1)
#else
#define Q35_PAIRS
#endif

// Which of the two this block is.
__device__ __forceinline__ int rank_in_pair() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// All threads of both blocks come here before any goes on; what they wrote to shared memory is known to all.
__device__ __forceinline__ void pair_barrier() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// What lies at `at` in this block, in the block of that rank: an address for barrier_arrive_there.
__device__ __forceinline__ uint32_t address_of(uint32_t at, int rank) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
    return there;
}
__device__ __forceinline__ void barrier_arrive_there(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// A tensor [experts, parts, rows, k], and the box that a copy takes of them: 64 of k by so many rows of every part.
inline bool encode_map(CUtensorMap *map, const bf16 *tensor, int experts, int parts, int rows, int k, int box_rows) {
    const cuuint64_t row_bytes = cuuint64_t(k) * 2;
    const cuuint64_t dims[4] = {cuuint64_t(k), cuuint64_t(rows), cuuint64_t(parts), cuuint64_t(experts)};
    const cuuint64_t strides[3] = {row_bytes, row_bytes * rows, row_bytes * rows * parts};
    const cuuint32_t box[4] = {64, cuuint32_t(box_rows), cuuint32_t(parts), 1}, every[4] = {1, 1, 1, 1};
    return map_encoder()(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<bf16 *>(tensor), dims, strides, box,
                         every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                         CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Rows [rows, k] of e4m3, by so many of them and 128 of k; in the dimensions of the other.
inline bool encode_bytes_map(CUtensorMap *map, const void *tensor, int rows, int k, int box_rows) {
    const cuuint64_t row_bytes = cuuint64_t(k), all = row_bytes * rows;
    const cuuint64_t dims[4] = {row_bytes, cuuint64_t(rows), 1, 1}, strides[3] = {row_bytes, all, all};
    const cuuint32_t box[4] = {128, cuuint32_t(box_rows), 1, 1}, every[4] = {1, 1, 1, 1};
    return map_encoder()(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 4, const_cast<void *>(tensor), dims, strides, box, every,
                         CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                         CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Waits for this thread's copy16, and lets products read what they and its stores have written to shared memory, once
// the threads that issue those are told.
__device__ __forceinline__ void copies_to_products() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    written_for_products();
}

// An arrival at the barrier when all copy16 of this thread so far have ended. Those who wait call
// written_for_products before products read what was copied.
__device__ __forceinline__ void arrive_with_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// The box of a tensor of four dimensions that starts at (c0, c1, c2, c3), innermost first; zeros outside the tensor.
__device__ __forceinline__ void tensor_copy(uint32_t to, const CUtensorMap *map, int c0, int c1, int c2, int c3,
                                            uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
                 "[%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
                 "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier)
                 : "memory");
}

// The same box to the same place in both blocks of a pair, where the same barrier counts its bytes.
__device__ __forceinline__ void tensor_copy_to_both(uint32_t to, const CUtensorMap *map, int c0, int c1, int c2, int c3,
                                                    uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
                 "[%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
                 "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier), "h"(uint16_t(3))
                 : "memory");
}

// Has L2 fetch the same box.
__device__ __forceinline__ void tensor_prefetch(const CUtensorMap *map, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(map), "r"(c0), "r"(c1),
                 "r"(c2), "r"(c3)
                 : "memory");
}

// Stores 8x8 matrices that lie over a warp as in `mma`'s c, columns of them as rows of 16 bytes: lane 8 i + j has the
// address of column j of matrix i.
__device__ __forceinline__ void store_transposed(uint32_t column, uint32_t m0, uint32_t m1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(column), "r"(m0), "r"(m1)
                 : "memory");
}
__device__ __forceinline__ void store_transposed(uint32_t column, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(column), "r"(m0),
                 "r"(m1), "r"(m2), "r"(m3)
                 : "memory");
}

__device__ __forceinline__ uint4 load_shared16(uint32_t at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
}
// 16 bytes to global memory, in one piece, if `there`.
__device__ __forceinline__ void store_global16(void *to, uint4 v, bool there) {
    asm volatile("{\n.reg .pred there;\nsetp.ne.b32 there, %5, 0;\n"
                 "@there st.global.v4.u32 [%0], {%1, %2, %3, %4};\n}" ::"l"(__cvta_generic_to_global(to)),
                 "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(static_cast<int>(there))
                 : "memory");
}

// Rows at `at` as an operand, each 8 of them so many bytes after the 8 before. Bits 0 to 13: the address; 16 to 29: not
// used with this swizzle, 1; 32 to 45: those bytes, all in units of 16 bytes; 49 to 51: 0, every 8 rows start where the
// swizzle does; 62 and 63: 1, the swizzle of 128 bytes. 2 more is 16 elements further along k.
__device__ __forceinline__ uint64_t operand(uint32_t at, int bytes_of_8) {
    return uint64_t(1) << 62 | uint64_t(bytes_of_8 / 16) << 32 | uint64_t(1) << 16 | (at & 0x3ffff) >> 4;
}

// What follows sees the accumulators as the wait before has left them.
template <int COUNT>
__device__ __forceinline__ void products_end(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// d [64, COLS] += a [64, 16] b [COLS, 16]^T, by a warpgroup. Warp w of it has rows 16 w ..; of those,
// with g = lane / 4 and p = 8 j + 2 (lane % 4), d[4 j ..]: (g, p), (g, p + 1), (g + 8, p), (g + 8, p + 1).
template <int COLS>
__device__ __forceinline__ void wgmma(float (&d)[COLS / 2], uint64_t a, uint64_t b);

// The 4 i accumulators of a thread: D_i names them in the text, A_i are the statement's operands.
#define Q35_D1 "%0, %1, %2, %3"
#define Q35_D2 Q35_D1 ", %4, %5, %6, %7"
#define Q35_D3 Q35_D2 ", %8, %9, %10, %11"
#define Q35_D4 Q35_D3 ", %12, %13, %14, %15"
#define Q35_D5 Q35_D4 ", %16, %17, %18, %19"
#define Q35_D6 Q35_D5 ", %20, %21, %22, %23"
#define Q35_D7 Q35_D6 ", %24, %25, %26, %27"
#define Q35_D8 Q35_D7 ", %28, %29, %30, %31"
#define Q35_D9 Q35_D8 ", %32, %33, %34, %35"
#define Q35_D10 Q35_D9 ", %36, %37, %38, %39"
#define Q35_D11 Q35_D10 ", %40, %41, %42, %43"
#define Q35_D12 Q35_D11 ", %44, %45, %46, %47"
#define Q35_D13 Q35_D12 ", %48, %49, %50, %51"
#define Q35_D14 Q35_D13 ", %52, %53, %54, %55"
#define Q35_D15 Q35_D14 ", %56, %57, %58, %59"
#define Q35_D16 Q35_D15 ", %60, %61, %62, %63"
#define Q35_D17 Q35_D16 ", %64, %65, %66, %67"
#define Q35_D18 Q35_D17 ", %68, %69, %70, %71"
#define Q35_D19 Q35_D18 ", %72, %73, %74, %75"
#define Q35_D20 Q35_D19 ", %76, %77, %78, %79"
#define Q35_A(i) "+f"(d[4 * i]), "+f"(d[4 * i + 1]), "+f"(d[4 * i + 2]), "+f"(d[4 * i + 3])
#define Q35_A1 Q35_A(0)
#define Q35_A2 Q35_A1, Q35_A(1)
#define Q35_A3 Q35_A2, Q35_A(2)
#define Q35_A4 Q35_A3, Q35_A(3)
#define Q35_A5 Q35_A4, Q35_A(4)
#define Q35_A6 Q35_A5, Q35_A(5)
#define Q35_A7 Q35_A6, Q35_A(6)
#define Q35_A8 Q35_A7, Q35_A(7)
#define Q35_A9 Q35_A8, Q35_A(8)
#define Q35_A10 Q35_A9, Q35_A(9)
#define Q35_A11 Q35_A10, Q35_A(10)
#define Q35_A12 Q35_A11, Q35_A(11)
#define Q35_A13 Q35_A12, Q35_A(12)
#define Q35_A14 Q35_A13, Q35_A(13)
#define Q35_A15 Q35_A14, Q35_A(14)
#define Q35_A16 Q35_A15, Q35_A(15)
#define Q35_A17 Q35_A16, Q35_A(16)
#define Q35_A18 Q35_A17, Q35_A(17)
#define Q35_A19 Q35_A18, Q35_A(18)
#define Q35_A20 Q35_A19, Q35_A(19)
#define Q35_WGMMA(I, COLS, A, B)                                                                                 \
    template <>                                                                                                     \
    __device__ __forceinline__ void wgmma<COLS>(float (&d)[COLS / 2], uint64_t a, uint64_t b) {                     \
        asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                               \
                     "wgmma.mma_async.sync.aligned.m64n" #COLS "k16.f32.bf16.bf16 {" Q35_D##I "}, %" #A ", %" #B    \
                     ", add, 1, 1, 0, 0;\n}"                                                                       \
                     : Q35_A##I                                                                                     \
                     : "l"(a), "l"(b)                                                                               \
                     : "memory");                                                                                   \
    }
Q35_WGMMA(1, 8, 4, 5)
Q35_WGMMA(2, 16, 8, 9)
Q35_WGMMA(3, 24, 12, 13)
Q35_WGMMA(4, 32, 16, 17)
Q35_WGMMA(5, 40, 20, 21)
Q35_WGMMA(6, 48, 24, 25)
Q35_WGMMA(7, 56, 28, 29)
Q35_WGMMA(8, 64, 32, 33)
Q35_WGMMA(9, 72, 36, 37)
Q35_WGMMA(10, 80, 40, 41)
Q35_WGMMA(11, 88, 44, 45)
Q35_WGMMA(12, 96, 48, 49)
Q35_WGMMA(13, 104, 52, 53)
Q35_WGMMA(14, 112, 56, 57)
Q35_WGMMA(15, 120, 60, 61)
Q35_WGMMA(16, 128, 64, 65)
Q35_WGMMA(17, 136, 68, 69)
Q35_WGMMA(18, 144, 72, 73)
Q35_WGMMA(19, 152, 76, 77)
Q35_WGMMA(20, 160, 80, 81)
#undef Q35_WGMMA
