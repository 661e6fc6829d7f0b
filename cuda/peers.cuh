// Memory that several cards write and read while their kernels run: accesses past the caches that are not coherent, and
// their order.
#pragma once
#include "device.cuh"

// 16 bytes of two words of data, each with `mark` beside it. In the memory model a vector is two accesses of 8 bytes:
// each is written and read whole, so a mark that has come says that its word has.
struct Line {
    uint64_t halves[2];
};

__device__ __forceinline__ void put_line(void *to, uint32_t first, uint32_t second, uint32_t mark) {
    const uint64_t high = static_cast<uint64_t>(mark) << 32;
    asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(to), "l"(high | first), "l"(high | second)
                 : "memory");
}

__device__ __forceinline__ Line get_line(const void *from) {
    Line line;
    asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];"
                 : "=l"(line.halves[0]), "=l"(line.halves[1])
                 : "l"(from)
                 : "memory");
    return line;
}

// 16 bytes to memory of any rank; a flag that is released after them says that they are there.
__device__ __forceinline__ void put16(void *to, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// 16 bytes that another card wrote, from L2: what L1 has of them may be old.
__device__ __forceinline__ uint4 get16(const void *from) {
    uint4 v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}

__device__ __forceinline__ uint32_t get_word(const void *from) {
    uint32_t v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}

// Who acquires a flag sees what was written before its release: by the thread that released it, and by those that met
// it at a barrier before.
__device__ __forceinline__ uint32_t acquire(const uint32_t *flag) {
    uint32_t v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory");
    return v;
}

__device__ __forceinline__ void release(uint32_t *flag, uint32_t v) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(v) : "memory");
}

// Turns are counted as lines are marked: never 0, as new lines are, and by turns odd and even.
__device__ __forceinline__ uint32_t turn_after(uint32_t count) { return count + (count == UINT32_MAX ? 3 : 1); }

__device__ __forceinline__ uint64_t nanoseconds() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

// The threads of a block that wait together: THREADS of them (whole warps), at the barrier of that number, of four. The
// instruction has the number in it, or it would take all barriers of the block.
template <int THREADS>
__device__ __forceinline__ void meet(int number) {
    switch (number) {
        case 0: asm volatile("bar.sync 0, %0;" ::"n"(THREADS) : "memory"); break;
        case 1: asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); break;
        case 2: asm volatile("bar.sync 2, %0;" ::"n"(THREADS) : "memory"); break;
        default: asm volatile("bar.sync 3, %0;" ::"n"(THREADS) : "memory");
    }
}
