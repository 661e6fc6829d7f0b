// Plain device code that all kernels share: bf16 and vectors of it, streaming loads, reductions in a fixed order, the
// activations. Tensor cores and asynchronous copies are in mma.cuh.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "launch.h"

typedef __nv_bfloat16 bf16;

static inline const bf16 *as_bf16(const q35_bf16 *p) { return reinterpret_cast<const bf16 *>(p); }
static inline bf16 *as_bf16(q35_bf16 *p) { return reinterpret_cast<bf16 *>(p); }

static inline cudaStream_t as_stream(void *stream) { return static_cast<cudaStream_t>(stream); }

static inline bool aligned(const void *p, size_t bytes = 16) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

template <typename A, typename B>
__host__ __device__ constexpr auto ceil_div(A a, B b) {
    return (a + b - 1) / b;
}

// What launchers ask of a card.
struct Card {
    int count, shared;  // multiprocessors, and the most shared memory of a block
};

// Zeros where there is no device.
static inline Card this_card() {
    static Card known[64];
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return {};
    // Ranks may ask at once: the count, which says that the rest is known, comes last.
    if (__atomic_load_n(&known[device].count, __ATOMIC_ACQUIRE) == 0) {
        Card card = {};
        if (cudaDeviceGetAttribute(&card.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess ||
            cudaDeviceGetAttribute(&card.count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
            return {};
        }
        known[device].shared = card.shared;
        __atomic_store_n(&known[device].count, card.count, __ATOMIC_RELEASE);
    }
    return known[device];
}

// Programmatic dependent launch, on compute capability 9.0 and later: a kernel launched by `launch` may start while the
// one before it in the stream still runs. Until `wait_for_inputs` it may read weights alone (which no kernel writes), or
// the batch and what an earlier step left (delta_decode: a step begins with copies, which wait for all before them), and
// write nothing; every thread that is not gone calls it, and no block ends before it has. `let_next_start`, called by
// every block, lets the next kernel's blocks in as room appears: as early as registers and shared memory allow, or later
// where what those blocks ask the memory for would delay this kernel. Where it is not called they come when the last block
// ends. On older cards all of it is an ordinary launch.
static inline bool has_dependent_launch() {
    static int known[64];  // by device: 0 not asked yet, 1 no, 2 yes
    int device = 0, major = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return false;
    if (known[device] == 0) {
        if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
        known[device] = major >= 9 ? 2 : 1;
    }
    return known[device] == 2;
}

// EARLY false: an ordinary launch, which starts when the kernel before it has ended.
template <bool EARLY = true, typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   Arguments... arguments) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = stream;
    config.attrs = &early, config.numAttrs = EARLY && has_dependent_launch() ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// With expf, which rounds better and costs more.
__device__ __forceinline__ float precise_sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// x / (1 + e^-x): at x = -inf this is -inf * 0, but every x here is a finite sum.
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

// Two elements, the first in the low half. A bf16 is the upper half of an f32.
__device__ __forceinline__ float2 unpack2(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

__device__ __forceinline__ uint32_t pack2(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}

__device__ __forceinline__ void unpack8(uint4 v, float x[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = unpack2(words[i]);
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
    }
}

// Eight neighbouring elements as f32. The pointers are 16-byte aligned.
__device__ __forceinline__ void load8(const bf16 *p, float x[8]) { unpack8(*reinterpret_cast<const uint4 *>(p), x); }

__device__ __forceinline__ void load8(const float *p, float x[8]) {
    const float4 a = reinterpret_cast<const float4 *>(p)[0], b = reinterpret_cast<const float4 *>(p)[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
    x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

__device__ __forceinline__ void store8(bf16 *p, const float x[8]) {
    *reinterpret_cast<uint4 *>(p) =
        make_uint4(pack2(x[0], x[1]), pack2(x[2], x[3]), pack2(x[4], x[5]), pack2(x[6], x[7]));
}

__device__ __forceinline__ void store8(float *p, const float x[8]) {
    reinterpret_cast<float4 *>(p)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4 *>(p)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

// 16 bytes that are read once: not kept in L1, where they would displace what is read again.
__device__ __forceinline__ uint4 stream16(const bf16 *p) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(__cvta_generic_to_global(p)));
    return v;
}

// The same in the order of the program: neighbouring loads stay together, ahead of what uses them. It has L2 fetch 128
// bytes instead of 256.
__device__ __forceinline__ uint4 stream16_in_order(const bf16 *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

// The sum over the `LANES` neighbouring lanes of a group, the same bits in each of them.
template <int LANES = 32>
__device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}
