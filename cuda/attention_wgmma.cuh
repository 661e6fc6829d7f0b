// Of Hopper's copies and products what attention of many tokens uses.
#pragma once
#include "hopper.cuh"

// The box of the map at (column, row); its bytes arrive at the barrier.
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap &map, int column, int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        :
        : "r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

// A matrix in shared memory for a product: rows of 128 bytes, eight of them 1024 bytes aligned to as much, the 16-byte
// pieces of row r exchanged by r % 8 (piece p is at p ^ r % 8). Where the summed dimension is along the row, as in A
// and B of `multiply_rows`, `leading` is not used; where it is across, as in B of `multiply_columns`, `leading` is the
// distance in bytes between blocks of 64 columns.
__device__ __forceinline__ uint64_t matrix_at(uint32_t address, int leading) {
    return uint64_t(address >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
// The same matrix `bytes` further.
__device__ __forceinline__ uint64_t matrix_plus(uint64_t matrix, int bytes) { return matrix + uint64_t(bytes >> 4); }

// Ordinary accesses to the registers of products stay on their side of this.
template <int N>
__device__ __forceinline__ void keep_order(float (&x)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])::"memory");
}
template <int N>
__device__ __forceinline__ void keep_order(uint32_t (&x)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i][0]), "+r"(x[i][1]), "+r"(x[i][2]), "+r"(x[i][3])::"memory");
}

#define Q35_FOUR(x) "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])

// Of the accumulators c of 64 rows, warp w of the group has rows 16 w .. 16 w + 15, and of those a lane what `mma` has
// of its c for each eight columns.

// c [64, 64] = a [64, 16] b [64, 16]^T, or += where `add`.
__device__ __forceinline__ void multiply_rows(float (&c)[8][4], uint64_t a, uint64_t b, int add) {
    asm volatile("{\n\t"
                 ".reg .pred add;\n\t"
                 "setp.ne.b32 add, %34, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
                 " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "%32, %33, add, 1, 1, 0, 0;\n\t"
                 "}"
                 : Q35_FOUR(c[0]), Q35_FOUR(c[1]), Q35_FOUR(c[2]), Q35_FOUR(c[3]),
                   Q35_FOUR(c[4]), Q35_FOUR(c[5]), Q35_FOUR(c[6]), Q35_FOUR(c[7])
                 : "l"(a), "l"(b), "r"(add)
                 : "memory");
}

// c [64, 256] += a [64, 16] b [16, 256], a in registers as `mma` has its a.
__device__ __forceinline__ void multiply_columns(float (&c)[32][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
                 " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"
                 " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"
                 " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63,"
                 " %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79,"
                 " %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95,"
                 " %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111,"
                 " %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
                 "{%128, %129, %130, %131}, %132, 1, 1, 1, 1;"
                 : Q35_FOUR(c[0]), Q35_FOUR(c[1]), Q35_FOUR(c[2]), Q35_FOUR(c[3]),
                   Q35_FOUR(c[4]), Q35_FOUR(c[5]), Q35_FOUR(c[6]), Q35_FOUR(c[7]),
                   Q35_FOUR(c[8]), Q35_FOUR(c[9]), Q35_FOUR(c[10]), Q35_FOUR(c[11]),
                   Q35_FOUR(c[12]), Q35_FOUR(c[13]), Q35_FOUR(c[14]), Q35_FOUR(c[15]),
                   Q35_FOUR(c[16]), Q35_FOUR(c[17]), Q35_FOUR(c[18]), Q35_FOUR(c[19]),
                   Q35_FOUR(c[20]), Q35_FOUR(c[21]), Q35_FOUR(c[22]), Q35_FOUR(c[23]),
                   Q35_FOUR(c[24]), Q35_FOUR(c[25]), Q35_FOUR(c[26]), Q35_FOUR(c[27]),
                   Q35_FOUR(c[28]), Q35_FOUR(c[29]), Q35_FOUR(c[30]), Q35_FOUR(c[31])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
                 : "memory");
}

#undef Q35_FOUR
