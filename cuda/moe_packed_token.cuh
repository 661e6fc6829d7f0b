// What the kernels of moe_packed_one.cu are made of: routing by a warp, a row tile and a token in shared memory, and
// their product. And what those of moe_packed_several.cu ask of a card as well.
#pragma once
#include "hopper.cuh"
#include "moe_packed_one.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool HERE = true;
#else
constexpr bool HERE = false;  // for an older architecture the kernels are empty
#endif

// Of a block, where two are on a multiprocessor: the driver keeps 1 KB of each, and some is static.
constexpr int STATIC = 4 << 10;
static inline int room_of(const Card &card) { return (card.shared + 1024) / 2 - 1024 - STATIC; }

template <typename... Parameters>
cudaError_t prepare(void (*kernel)(Parameters...), int room) {
    cudaFuncAttributes of = {};
    cudaError_t code = cudaFuncGetAttributes(&of, kernel);
    if (code == cudaSuccess && of.ptxVersion < 90) code = cudaErrorNotSupported;
    if (code == cudaSuccess) code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room);
    if (code != cudaSuccess) return code;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
}

constexpr int TOKEN_PITCH = 2 * TILE_K + 16;  // of a k tile of the token: those of eight tiles hit all banks
constexpr int FAST_EXPERTS = 256;             // 8 logits a lane

// The token in shared memory, and its sums.
__host__ __device__ constexpr int token_bytes(int k) {
    return (k / TILE_K * (TOKEN_PITCH + int(sizeof(float))) + 15) / 16 * 16;
}

__device__ __forceinline__ uint4 kept16(uint32_t at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}
__device__ __forceinline__ uint32_t kept2(uint32_t at) {
    uint16_t v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at));
    return v;
}
__device__ __forceinline__ int kept1(uint32_t at) {
    uint16_t v;
    asm volatile("ld.shared.u8 %0, [%1];" : "=h"(v) : "r"(at));
    return v;
}
__device__ __forceinline__ float kept_float(uint32_t at) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at));
    return v;
}

// A row tile in shared memory: its codes, its scales, its zero points.
struct Kept {
    int scales, zeros, bytes;  // where those are, and all of it
    __host__ __device__ Kept(const Packed &m) {
        scales = m.row_tile_bytes, zeros = scales + m.groups * m.each * (m.form == FP8_TILES ? 4 : 2);
        bytes = zeros + (m.zeros != nullptr ? m.groups * m.each : 0);
    }
};
__device__ __forceinline__ void copy_row_tile(uint32_t to, const Packed &m, int row_tile, uint32_t barrier) {
    const Kept kept(m);
    const int64_t scales = kept.zeros - kept.scales, zeros = kept.bytes - kept.zeros;
    bulk_copy(to, m.codes + int64_t(row_tile) * m.row_tile_bytes, m.row_tile_bytes, barrier);
    bulk_copy(to + kept.scales, static_cast<const uint8_t *>(m.scales) + row_tile * scales, int(scales), barrier);
    if (zeros > 0) bulk_copy(to + kept.zeros, m.zeros + row_tile * zeros, int(zeros), barrier);
}

// Where a lane finds its codes and scales of a row tile that is kept at `at`, and how scales lie. ZEROS: of int4, with
// zero points of its own.
template <int FORM, bool ZEROS>
struct Place {
    static constexpr int BYTES = FORM == FP8_TILES ? 4 : 2;  // of a scale
    uint32_t codes, scales, zeros, bf16_scales;
    int each, shift;
    __device__ __forceinline__ Place(const Packed &m, uint32_t at) {
        const Kept kept(m);
        const int lane = threadIdx.x % 32, g = lane / 4;
        each = FORM == FP8_TILES ? m.each : 16;
        codes = at + 16 * lane, scales = at + kept.scales + (each > 1 ? g * BYTES : 0), zeros = at + kept.zeros + g;
        shift = m.shift, bf16_scales = m.bf16_scales;
    }
};

// Eights of the token's elements, `first` and every `step`th, to shared memory. Loads first, so that they wait together.
__device__ __forceinline__ void keep_token(uint8_t *token, const bf16 *x, int k, int first, int step) {
    constexpr int AT_ONCE = 4;
    for (int base = first; base < k / 8; base += AT_ONCE * step) {
        uint4 v[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (base + i * step < k / 8) v[i] = reinterpret_cast<const uint4 *>(x)[base + i * step];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int at = base + i * step;
            if (at < k / 8) *reinterpret_cast<uint4 *>(token + at / 8 * TOKEN_PITCH + at % 8 * 16) = v[i];
        }
    }
}

// The token's elements of a k tile, which lie at `at`, for tensor cores.
__device__ __forceinline__ void load_token(uint32_t (&b)[8], uint32_t at) {
    const uint4 lo = kept16(at), hi = kept16(at + 16);
    b[0] = lo.x, b[1] = lo.y, b[2] = lo.z, b[3] = lo.w;
    b[4] = hi.x, b[5] = hi.y, b[6] = hi.z, b[7] = hi.w;
}

// The token's sums over the k tiles first .. first + 7, of `count`, to `sums`: the columns of one product, each with the
// bits that it has alone.
__device__ __forceinline__ void sum_token(uint32_t token, int first, int count, float *sums) {
    const int lane = threadIdx.x % 32, own = min(first + lane / 4, count - 1);
    const uint32_t ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
    uint32_t b[8];
    load_token(b, token + own * TOKEN_PITCH + lane % 4 * 32);
    float c[4] = {};
#pragma unroll
    for (int j = 0; j < 4; j++) mma(c, ones, b + 2 * j);
    if (lane < 4) {
        const int to = first + 2 * lane;
        if (to < count) sums[to] = c[0];
        if (to + 1 < count) sums[to + 1] = c[1];
    }
}

// acc += rows g and g + 8 of k tile `t` of the row tile `by` bytes behind the place's, times the token.
template <int FORM, bool ZEROS>
__device__ __forceinline__ void add_tile(float (&acc)[2], const Place<FORM, ZEROS> &place, int by, int t,
                                         const uint32_t (&b)[8], float x_sum) {
    const uint32_t codes = place.codes + by + t * TILE_BYTES<FORM>;
    constexpr int BYTES = Place<FORM, ZEROS>::BYTES;
    const uint32_t scales = place.scales + by + (t >> place.shift) * place.each * BYTES;
    uint4 tile[2] = {kept16(codes)};
    if (FORM == FP8_TILES) tile[1] = kept16(codes + 512);
    float c[4] = {};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        uint32_t a[4];
        if constexpr (FORM == FP8_TILES) {
            fragment<FORM>(tile, j, {0, 0}, a);
        } else {
            int4_fragment(j == 0 ? tile[0].x : j == 1 ? tile[0].y : j == 2 ? tile[0].z : tile[0].w, a);
        }
        mma(c, a, b + 2 * j);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const uint32_t at = scales + (place.each > 1 ? r * 8 * BYTES : 0);
        if constexpr (FORM == FP8_TILES) {
            acc[r] = fmaf(kept_float(at), c[2 * r], acc[r]);
        } else {
            const uint32_t raw = kept2(at);
            const float of_f16 = __half2float(__ushort_as_half(static_cast<unsigned short>(raw)));
            const float scale =
                __uint_as_float((raw << 16 & place.bf16_scales) | (__float_as_uint(of_f16) & ~place.bf16_scales));
            // 16 that int4_fragment adds, and the zero point: 8 where none is kept.
            float zero = 24.0f;
            if (ZEROS) zero = float(16 + kept1(place.zeros + by + (t >> place.shift) * 16 + 8 * r));
            acc[r] = fmaf(scale, fmaf(-zero, x_sum, c[2 * r]), acc[r]);
        }
    }
}

struct Chosen {
    int expert;
    uint32_t key;  // of its logit
};
// What route_any chooses, by a warp: lane r has the expert of round r. Of few enough experts with a shorter way from round
// to round.
__device__ __forceinline__ Chosen choose(const Plan &p, int lane) {
    if (p.num_experts > FAST_EXPERTS) {
        const int expert = route_any(p.logits, p.num_experts, p.top_k, lane, nullptr, nullptr, lane);
        return {expert, lane < p.top_k ? route_key(__ldcg(p.logits + expert)) : 0};
    }
    constexpr int OWN = FAST_EXPERTS / 32;
    float values[OWN];
    uint32_t keys[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) values[i] = __ldcg(p.logits + min(lane + 32 * i, p.num_experts - 1));
#pragma unroll
    for (int i = 0; i < OWN; i++) keys[i] = lane + 32 * i < p.num_experts ? route_key(values[i]) : 0;
    Chosen own = {};
#pragma unroll 1
    for (int r = 0; r < p.top_k; r++) {
        uint32_t best[OWN];
        int at[OWN];
#pragma unroll
        for (int i = 0; i < OWN; i++) best[i] = keys[i], at[i] = i;
#pragma unroll
        for (int step = 1; step < OWN; step *= 2) {
#pragma unroll
            for (int i = 0; i + step < OWN; i += 2 * step)
                if (best[i + step] > best[i]) best[i] = best[i + step], at[i] = at[i + step];  // of equals the first
        }
        const uint32_t most = __reduce_max_sync(ALL_LANES, best[0]);
        const unsigned have = __ballot_sync(ALL_LANES, best[0] == most);
        int expert = lane + 32 * at[0];
        if ((have & (have - 1)) == 0) {
            expert = __shfl_sync(ALL_LANES, expert, __ffs(have) - 1);
        } else {
            expert = static_cast<int>(
                __reduce_min_sync(ALL_LANES, best[0] == most ? static_cast<unsigned>(expert) : 0x7fffffffu));
        }
#pragma unroll
        for (int i = 0; i < OWN; i++)
            if (expert == lane + 32 * i) keys[i] = 0;
        if (lane == r) own = {expert, most};
    }
    return own;
}
// And what route_any has for weights: lane r that of round r.
__device__ __forceinline__ float weight_of(const Chosen &own, int top_k, int lane) {
    const float value = route_value(own.key), max = __shfl_sync(ALL_LANES, value, 0);
    float weight = value == max ? 1.f : expf(value - max), sum = 0.f;
    if (weight != weight) weight = max != max ? 1.f : 0.f;
    for (int r = 0; r < top_k; r++) sum += __shfl_sync(ALL_LANES, weight, r);
    return weight / sum;
}
