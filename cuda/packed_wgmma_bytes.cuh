// Packed weights times many tokens in e4m3 (fp8_tokens.cuh), with wgmma. FP8's codes are the operand as they are; those of 4
// bits become 512ths, which are the smallest numbers of e4m3. The tensor cores add up 128 products, in fewer bits than f32
// has; their sums are scaled by the weights' scale and added to the row's in f32, and at the end by the token's.
#pragma once
#include "packed_wgmma_tiles.cuh"

namespace packed_wgmma {

// d [64, N] += a [64, 32] b [32, N], or = where not `add`, all e4m3: a in registers, rows of b at `b`.
template <int N>
__device__ __forceinline__ void multiply_bytes(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int add);
#define Q35_MULTIPLY(I, N, A0, A1, A2, A3, B, ADD)                                                                  \
    template <>                                                                                                     \
    __device__ __forceinline__ void multiply_bytes<N>(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,        \
                                                      int add) {                                                    \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #ADD ", 0;\n"                                         \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" Q35_D##I "}, {%" #A0 ", %" #A1    \
                     ", %" #A2 ", %" #A3 "}, %" #B ", add, 1, 1;\n}"                                                \
                     : Q35_A##I                                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add)                                 \
                     : "memory");                                                                                   \
    }
Q35_MULTIPLY(2, 16, 8, 9, 10, 11, 12, 13)
Q35_MULTIPLY(4, 32, 16, 17, 18, 19, 20, 21)
Q35_MULTIPLY(6, 48, 24, 25, 26, 27, 28, 29)
Q35_MULTIPLY(8, 64, 32, 33, 34, 35, 36, 37)
#undef Q35_MULTIPLY

// Four codes of int4, each the lower half of a byte, minus 8: 512ths in e4m3, a sign and a size.
__device__ __forceinline__ uint32_t bytes_of_int4(uint32_t codes) {
    uint32_t size;
    asm("vabsdiff4.u32.u32.u32 %0, %1, %2, %3;" : "=r"(size) : "r"(codes & 0x0f0f0f0fu), "r"(0x08080808u), "r"(0u));
    return (~codes & 0x08080808u) * 16 + size;
}

// The fragments of a unit in a stage: four steps of k 32.
template <int MODE, int FORM>
__device__ __forceinline__ void load_bytes(uint32_t stage, const Lane &of, uint32_t (&a)[4][4]) {
    constexpr int OWN = MODE == GATE_UP ? 2 : 1;
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
        if constexpr (FORM == FP8_TILES) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint4 v[OWN];
#pragma unroll
                for (int i = 0; i < OWN; i++)
                    v[i] = load_shared16(stage + of.codes[i] + tile * TILE_BYTES<FORM> + 512 * half);
                uint32_t(&to)[4] = a[2 * tile + half];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint4 from = v[i % OWN];
                    const bool later = MODE == GATE_UP ? of.shift == 0 : i != 0;
                    const uint32_t which = later ? 0x7351 : 0x6240;  // bytes of row lane / 4 + 8, or of row lane / 4
                    to[i] = __byte_perm(from.x, from.y, which);
                    to[i + 2] = __byte_perm(from.z, from.w, which);
                }
            }
        } else {
            uint32_t words[OWN][4];
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                const uint4 v = load_shared16(stage + of.codes[i] + tile * TILE_BYTES<FORM>);
                words[i][0] = v.x, words[i][1] = v.y, words[i][2] = v.z, words[i][3] = v.w;
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int shift = MODE == GATE_UP ? of.shift : 4 * i;
                    a[2 * tile + half][i] = bytes_of_int4(words[i % OWN][2 * half] >> shift);
                    a[2 * tile + half][i + 2] = bytes_of_int4(words[i % OWN][2 * half + 1] >> shift);
                }
            }
        }
    }
}

// As `consume`. Half of the columns are multiplied while the sums of the other half are scaled.
template <int MODE, int FORM, typename M, int N>
__device__ __forceinline__ void consume_bytes(const Task &t, const Item &item, uint32_t shared, uint32_t released,
                                              uint32_t done, const int *places, int warp, int lane) {
    constexpr int HALF = N / 2;
    const int units = t.w.k / UNIT;
    const Lane of = lane_of<MODE, FORM, M>(t, item, warp, lane);
    const Ring<M, MODE> ring = {shared};
    float acc[2][HALF / 2], sum[N / 2] = {};
    uint32_t a[2][4][4];

    auto multiply_half = [&](auto half, const uint32_t (&fragments)[4][4], uint32_t stage) {
        constexpr int H = decltype(half)::value;
        products_begin();
#pragma unroll
        for (int j = 0; j < 4; j++)
            multiply_bytes<HALF>(acc[H], fragments[j], operand(stage + H * HALF * 128, 1024) + 2 * j, j > 0);
        products_commit();
    };
    auto scale_half = [&](auto half, const float (&scale)[2]) {
        constexpr int H = decltype(half)::value;
        products_end(acc[H]);
#pragma unroll
        for (int i = 0; i < HALF / 2; i++) {
            float &to = sum[H * (HALF / 2) + i];
            to = fmaf(scale[i % 4 / 2], acc[H][i], to);
        }
    };
    constexpr std::integral_constant<int, 0> first;
    constexpr std::integral_constant<int, 1> second;

    Side<FORM, 1> side = load_side<FORM, 1>(t, of, 0);
    ring.wait_for(done);
    load_bytes<MODE, FORM>(ring.stage_of(done), of, a[0]);
    auto part = [&](int unit, auto number) {
        constexpr int OWN = decltype(number)::value;
        const uint32_t use = done + unit, stage = ring.stage_of(use);
        const int following = min(unit + 1, units - 1);
        written_fragments(a[OWN]);
        multiply_half(first, a[OWN], stage);
        multiply_half(second, a[OWN], stage);
        const Side<FORM, 1> next = load_side<FORM, 1>(t, of, following);
        ring.wait_for(done + following);
        load_bytes<MODE, FORM>(ring.stage_of(done + following), of, a[1 - OWN]);
        float scale[2];
#pragma unroll
        for (int i = 0; i < 2; i++) scale[i] = scale_of<FORM>(side.scale[0][i], t.w.bf16_scales);
        products_wait<1>();
        scale_half(first, scale);
        products_wait<0>();
        if (lane < BLOCKS<MODE>) barrier_arrive_there(released + ring.slot(use) * 8);
        scale_half(second, scale);
        side = next;
    };
#pragma unroll 1
    for (int unit = 0; unit < units; unit += 2) {
        part(unit, first);
        if (unit + 1 < units) part(unit + 1, second);
    }
    // Of the tokens lane + 32 q; a lane has columns 8 j + 2 (lane % 4) and the next.
#pragma unroll
    for (int q = 0; q < N / 32; q++) {
        const int row = item.first + min(32 * q + lane, item.rows - 1);
        const int token = MODE == GATE_UP && t.sorted != nullptr ? t.sorted[row] / t.top_k : row;
        const float own = t.token_scales[token] * (FORM == INT4_TILES ? 512.f : 1.f);
#pragma unroll
        for (int j = 4 * q; j < 4 * q + 4; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float scale = __shfl_sync(ALL_LANES, own, 8 * (j % 4) + lane % 4 * 2 + e);
                sum[4 * j + e] *= scale, sum[4 * j + e + 2] *= scale;
            }
        }
    }
    const int feature = item.feature + warp * (MODE == GATE_UP ? 8 : 16);
    store_tile<MODE, N>(t, item, sum, shared + M::STAGING + warp * M::STAGING_BYTES, places, feature, lane);
}

}  // namespace packed_wgmma
