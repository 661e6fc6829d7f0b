// Of Hopper's products what the walk of the delta rule uses.
#pragma once
#include "hopper.cuh"

// A matrix in shared memory, the right operand of a product: rows of 128 bytes, eight of them 1024 bytes aligned to as
// much, the 16-byte pieces of row r exchanged by r % 8 (piece p is at p ^ r % 8). `across`: where the sum goes down the
// rows and there are more than 64 columns, the distance from 64 of them to the next.
constexpr int ROW_BYTES = 128, ACROSS_BYTES = 64 * ROW_BYTES;
__device__ __forceinline__ uint64_t right_operand(uint32_t address, int across = 0) {
    return uint64_t(address >> 4) | uint64_t(across >> 4) << 16 | uint64_t(8 * ROW_BYTES >> 4) << 32 |
           uint64_t(1) << 62;
}
// The same matrix `bytes` further.
__device__ __forceinline__ uint64_t further(uint64_t matrix, int bytes) { return matrix + uint64_t(bytes >> 4); }

// Ordinary accesses to the registers of products stay on their side of this.
template <int N>
__device__ __forceinline__ void keep_order(float (&x)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])::"memory");
}
__device__ __forceinline__ void keep_order(uint32_t (&a)[4]) {
    asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
}

// Of accumulators c of 64 rows, warp w of the group has rows 16 w .. 16 w + 15, and of those a lane what `mma` has of
// its c for each eight columns; a is in registers as `mma` has its a.
#define Q35_FOUR(x) "+f"((x)[0]), "+f"((x)[1]), "+f"((x)[2]), "+f"((x)[3])
#define Q35_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define Q35_32 Q35_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define Q35_64                                                                                              \
    Q35_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
           "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// c [64, 32] += a [64, 16] b [32, 16]^T.
__device__ __forceinline__ void multiply32(float (*c)[4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" Q35_16 "}, {%16, %17, %18, %19}, %20, "
                 "1, 1, 1, 0;"
                 : Q35_FOUR(c[0]), Q35_FOUR(c[1]), Q35_FOUR(c[2]), Q35_FOUR(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
                 : "memory");
}

// c [64, 64] += a [64, 16] b: b [64, 16]^T, or [16, 64] where DOWN.
template <bool DOWN>
__device__ __forceinline__ void multiply64(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" Q35_32 "}, {%32, %33, %34, %35}, %36, "
                 "1, 1, 1, %37;"
                 : Q35_FOUR(c[0]), Q35_FOUR(c[1]), Q35_FOUR(c[2]), Q35_FOUR(c[3]),
                   Q35_FOUR(c[4]), Q35_FOUR(c[5]), Q35_FOUR(c[6]), Q35_FOUR(c[7])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(static_cast<int>(DOWN))
                 : "memory");
}

// c [64, 128] += a [64, 16] b [16, 128].
__device__ __forceinline__ void multiply128(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" Q35_64 "}, {%64, %65, %66, %67}, %68, "
                 "1, 1, 1, 1;"
                 : Q35_FOUR(c[0]), Q35_FOUR(c[1]), Q35_FOUR(c[2]), Q35_FOUR(c[3]),
                   Q35_FOUR(c[4]), Q35_FOUR(c[5]), Q35_FOUR(c[6]), Q35_FOUR(c[7]),
                   Q35_FOUR(c[8]), Q35_FOUR(c[9]), Q35_FOUR(c[10]), Q35_FOUR(c[11]),
                   Q35_FOUR(c[12]), Q35_FOUR(c[13]), Q35_FOUR(c[14]), Q35_FOUR(c[15])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
                 : "memory");
}

#undef Q35_FOUR
#undef Q35_16
#undef Q35_32
#undef Q35_64
