// Packed weights times many tokens with wgmma: codes become bf16 in the registers that are its operand A, tokens are
// B. A warp's rows of A lie over its lanes as those of mma.m16n8k16 do, so a tile of codes serves as it is. Sums of a
// group are added up by the tensor cores, then scaled and added to the row's sum, in the order of k; of fp4 and of
// GGUF's codes the scales are in the registers, of the latter rounded.
#pragma once
#include <type_traits>

#include "packed_wgmma_copies.cuh"

namespace packed_wgmma {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool HERE = true;
#else
constexpr bool HERE = false;  // for another architecture the kernel is empty
#endif

// d [64, N] += a [64, 16] b [16, N], or = where not `add`: a in registers as `mma` has its a, rows of b at `b`.
template <int N>
__device__ __forceinline__ void multiply(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int add);
#define Q35_MULTIPLY(I, N, A0, A1, A2, A3, B, ADD)                                                                  \
    template <>                                                                                                     \
    __device__ __forceinline__ void multiply<N>(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int add) {   \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #ADD ", 0;\n"                                         \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" Q35_D##I "}, {%" #A0 ", %" #A1    \
                     ", %" #A2 ", %" #A3 "}, %" #B ", add, 1, 1, 0;\n}"                                             \
                     : Q35_A##I                                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add)                                 \
                     : "memory");                                                                                   \
    }
Q35_MULTIPLY(4, 32, 16, 17, 18, 19, 20, 21)
Q35_MULTIPLY(8, 64, 32, 33, 34, 35, 36, 37)
Q35_MULTIPLY(12, 96, 48, 49, 50, 51, 52, 53)
Q35_MULTIPLY(16, 128, 64, 65, 66, 67, 68, 69)
#undef Q35_MULTIPLY

// Two codes of int4, each the lowest bits of a half, minus zero points: a bf16 from 128 to 255 counts in ones. bias:
// 128 + the zero point, as bf16, twice.
__device__ __forceinline__ uint32_t from_int4(uint32_t codes, uint32_t bias) {
    return bf16_sub(and_or(codes, 0x000f000fu, 0x43004300u), bias);
}
// Two codes of e4m3, each the upper byte of a half. Their bits in the places of a bf16's are the number divided by
// 2^120, small ones too.
__device__ __forceinline__ uint32_t from_e4m3(uint32_t codes) {
    return bf16_mul((codes & 0x80008000u) | (codes >> 4 & 0x07f007f0u), 0x7b807b80u);
}

// The two rows of weights whose products a lane has: where their scales start, and their codes in a stage.
struct Lane {
    uint32_t scales[2];
    int codes[2];  // GATE_UP: of gate and of up; ROWS: one tile has both rows
    int shift;     // GATE_UP: of the codes, so that those of row lane / 4 + 8 come first; fp4, GGUF: 1 for these
    float whole[2];  // fp4: what is left of the scales
};
template <int MODE, int FORM, typename M>
__device__ __forceinline__ Lane lane_of(const Task &t, const Item &item, int warp, int lane) {
    Lane of;
    const int half = MODE == GATE_UP ? warp % 2 : 0;  // of the rows of a tile of gates and one of ups
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int tile = MODE == GATE_UP ? warp / 2 + 4 * i : warp, row = lane / 4 + 8 * (MODE == GATE_UP ? half : i);
        const int row_tile = max(row_tile_at<MODE>(t, item, tile), 0);
        of.scales[i] = uint32_t(row_tile) * t.w.groups * t.w.each + (t.w.each == 16 ? row : 0);
        of.codes[i] = M::TOKEN_BYTES + tile * 2 * TILE_BYTES<FORM> + lane * 16;
        if constexpr (FORM == FP4_TILES) {
            // A word is four steps of a row.
            of.scales[i] = uint32_t(row_tile) * t.w.groups * t.w.each * 2 + lane / 4 * 2 + row / 8;
            of.whole[i] = whole_of(t.w, row_tile);
        }
    }
    of.shift = FORM == FP8_TILES ? 8 - 8 * half : FORM == FP4_TILES || IS_GGUF<FORM> ? half : 4 * half;
    return of;
}

// Scales and zero points of a unit as they are in memory; of fp4 and of GGUF's the words of its first and of its second
// tile.
template <int FORM, int GROUPS>
struct Side {
    uint32_t scale[GROUPS][2], zero[GROUPS][2];
    uint32_t whole[IS_GGUF<FORM> ? 2 : 1];  // GGUF: d and m
};
template <int FORM, int GROUPS>
__device__ __forceinline__ Side<FORM, GROUPS> load_side(const Task &t, const Lane &of, int unit) {
    Side<FORM, GROUPS> side;
    if constexpr (IS_GGUF<FORM>) {
        const uint32_t *const words = static_cast<const uint32_t *>(t.w.scales);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t at = of.scales[i] + unit * t.group_step;
            side.scale[0][i] = __ldg(words + at), side.zero[0][i] = __ldg(words + at + 16), side.whole[i] = 0;
            if (FORM != INT8_TILES)
                side.whole[i] = __ldg(reinterpret_cast<const uint32_t *>(t.w.zeros) + (at / 32 * 16 + at % 16));
        }
    } else if constexpr (FORM == FP4_TILES) {
        const uint32_t *const words = static_cast<const uint32_t *>(t.w.scales) + unit * t.group_step * 2;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            side.scale[0][i] = __ldg(words + of.scales[i]);
            side.zero[0][i] = __ldg(words + of.scales[i] + t.group_step);
        }
    } else {
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t at = of.scales[i] + (unit * GROUPS + group) * t.group_step;
                side.zero[group][i] = 8;
                if (FORM == FP8_TILES) {
                    side.scale[group][i] = __ldg(static_cast<const uint32_t *>(t.w.scales) + at);
                } else {
                    side.scale[group][i] = __ldg(static_cast<const uint16_t *>(t.w.scales) + at);
                    if (t.w.zeros != nullptr) side.zero[group][i] = __ldg(t.w.zeros + at);
                }
            }
        }
    }
    return side;
}
template <int FORM>
__device__ __forceinline__ float scale_of(uint32_t raw, uint32_t bf16_scales) {
    if (FORM == FP8_TILES) return __uint_as_float(raw);
    const float of_f16 = __half2float(__ushort_as_half(static_cast<unsigned short>(raw)));
    return __uint_as_float((raw << 16 & bf16_scales) | (__float_as_uint(of_f16) & ~bf16_scales));
}

// What load_fragments takes of it.
template <int FORM, int FIRST, int STEPS, int GROUPS>
__device__ __forceinline__ const uint32_t (&side_of(const Side<FORM, GROUPS> &side))[2] {
    return FORM == FP4_TILES && FIRST == 0 ? side.scale[0] : side.zero[FIRST / STEPS];
}

// The fragments of COUNT steps of k 16 of a unit in a stage, from step FIRST on; they are in one tile of codes. `zero`:
// zero points, of fp4 words of scales.
template <int MODE, int FORM, int FIRST, int COUNT>
__device__ __forceinline__ void load_fragments(uint32_t stage, const Lane &of, const uint32_t (&zero)[2],
                                               uint32_t (&a)[COUNT][4]) {
    constexpr int OWN = MODE == GATE_UP ? 2 : 1, TILE = FIRST / 4 * TILE_BYTES<FORM>;
    if constexpr (FORM == FP8_TILES) {
        static_assert(COUNT == 4, "a tile");
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4 v[OWN];
#pragma unroll
            for (int i = 0; i < OWN; i++) v[i] = load_shared16(stage + of.codes[i] + TILE + 512 * half);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                uint32_t(&to)[4] = a[2 * half + j];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint4 from = v[i % OWN];
                    const int shift = MODE == GATE_UP ? of.shift : 8 - 8 * i;
                    to[i] = from_e4m3((j == 0 ? from.x : from.z) << shift);
                    to[i + 2] = from_e4m3((j == 0 ? from.y : from.w) << shift);
                }
            }
        }
    } else {
        uint32_t words[OWN][4];
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const uint4 v = load_shared16(stage + of.codes[i] + TILE);
            words[i][0] = v.x, words[i][1] = v.y, words[i][2] = v.z, words[i][3] = v.w;
        }
        if constexpr (FORM == FP4_TILES) {
            static_assert(COUNT == 4, "a tile");
#pragma unroll
            for (int j = 0; j < 4; j++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint32_t word = words[i % OWN][j], scale = fp4_scale(zero[i], j);
                    uint32_t codes[2];
                    if (MODE == GATE_UP) {
                        fp4_codes_of(word, of.shift, codes);
                    } else {
                        codes[0] = fp4_codes(word, i), codes[1] = fp4_codes(word, i + 2);
                    }
                    a[j][i] = fp4_times(codes[0], scale), a[j][i + 2] = fp4_times(codes[1], scale);
                }
            }
        } else {
            const uint32_t bias[2] = {0x43004300u + zero[0] * 0x00010001u, 0x43004300u + zero[1] * 0x00010001u};
#pragma unroll
            for (int j = 0; j < COUNT; j++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint32_t codes = words[i % OWN][FIRST % 4 + j] >> (MODE == GATE_UP ? of.shift : 4 * i);
                    a[j][i] = from_int4(codes, bias[i]), a[j][i + 2] = from_int4(codes >> 8, bias[i]);
                }
            }
        }
    }
}

__device__ __forceinline__ uint2 load_shared8(uint32_t from) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(from) : "memory");
    return v;
}

// The same of GGUF's codes, of a tile, with their scales.
template <int MODE, int FORM, int FIRST>
__device__ __forceinline__ void load_scaled(uint32_t stage, const Lane &of, const Side<FORM, 1> &side, bool minima,
                                            int lane, uint32_t (&a)[4][4]) {
    constexpr int OWN = MODE == GATE_UP ? 2 : 1, TILE = FIRST / 4 * TILE_BYTES<FORM>, BITS = GGUF_BITS<FORM>;
    uint4 v[OWN][BITS == 8 ? 2 : 1];
    uint2 upper[OWN] = {};
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const uint32_t from = stage + of.codes[i] + TILE;
        v[i][0] = load_shared16(from);
        if constexpr (BITS == 8) v[i][1] = load_shared16(from + 512);
        if constexpr (BITS == 6) upper[i] = load_shared8(from + 512 - 8 * lane);
    }
    const uint32_t bias = gguf_bias(minima);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const GgufScales<BITS> row =
            gguf_scales<BITS>(FIRST == 0 ? side.scale[0][i] : side.zero[0][i], side.whole[i], minima);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t words[2], codes[2];
            gguf_words<BITS>(v[i % OWN], upper[i % OWN], j, words);
            gguf_codes<BITS>(words, j, MODE == GATE_UP ? of.shift : i, bias, codes);
            const float scale = row.scale[BITS == 6 ? j : j / 2], min = row.min[j / 2];
            a[j][i] = gguf_times(codes[0], scale, min), a[j][i + 2] = gguf_times(codes[1], scale, min);
        }
    }
}

template <int MODE, int FORM, int FIRST, int STEPS, int GROUPS, int COUNT>
__device__ __forceinline__ void load_steps(const Task &t, uint32_t stage, const Lane &of,
                                           const Side<FORM, GROUPS> &side, int lane, uint32_t (&a)[COUNT][4]) {
    if constexpr (IS_GGUF<FORM>) {
        load_scaled<MODE, FORM, FIRST>(stage, of, side, t.w.minima, lane, a);
    } else {
        load_fragments<MODE, FORM, FIRST, COUNT>(stage, of, side_of<FORM, FIRST, STEPS>(side), a);
    }
}

// What follows sees the fragments as they are by now.
template <int COUNT>
__device__ __forceinline__ void written_fragments(uint32_t (&a)[COUNT][4]) {
#pragma unroll
    for (int j = 0; j < COUNT; j++)
        asm volatile("" : "+r"(a[j][0]), "+r"(a[j][1]), "+r"(a[j][2]), "+r"(a[j][3])::"memory");
}

// Stores what a warp has of a tile, through 2 KB (of 32 tokens half of that) of its own at `staging`. `places` has for the rows lane + 32 q where
// they go in the output; `feature`: the warp's first.
template <int MODE, int N>
__device__ __forceinline__ void store_tile(const Task &t, const Item &item, const float (&sum)[N / 2], uint32_t staging,
                                           const int *places, int feature, int lane) {
    if (MODE == ROWS && feature >= t.first_feature + t.cols) return;
    bf16 *out = static_cast<bf16 *>(t.out) + (feature - t.first_feature);
    if constexpr (MODE == GATE_UP) {
        // 8 features a token: 16 bytes.
#pragma unroll
        for (int j = 0; j < N / 8; j += 4) {
            uint32_t m[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int at = 4 * (j + i);
                m[i] = pack2(quick_swiglu(sum[at], sum[at + 2]), quick_swiglu(sum[at + 1], sum[at + 3]));
            }
            store_transposed(staging + (8 * j + lane) * 16, m[0], m[1], m[2], m[3]);
        }
        __syncwarp();
#pragma unroll
        for (int q = 0; q < N / 32; q++) {
            const uint4 v = load_shared16(staging + (32 * q + lane) * 16);
            store_global16(out + int64_t(places[q]) * t.stride, v, 32 * q + lane < item.rows);
        }
    } else if (t.store != PIECES) {
        const int64_t column = feature - t.first_feature + lane / 4;
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int row = 8 * j + lane % 4 * 2 + e;
                const int place = __shfl_sync(ALL_LANES, places[j / 4], row % 32);
                if (row >= item.rows) continue;
                const int64_t to = int64_t(place) * t.stride + column;
                const float low = sum[4 * j + e], high = sum[4 * j + 2 + e];
                if (t.store == WIDE) {
                    float *of = static_cast<float *>(t.out) + to;
                    of[0] = low, of[8] = high;
                } else {
                    bf16 *of = static_cast<bf16 *>(t.out) + to;
                    of[0] = __float2bfloat16_rn(low), of[8] = __float2bfloat16_rn(high);
                }
            }
        }
    } else {
        // 16 features a token: 32 bytes. Four tokens are a row of all banks, 64 what there is room for.
        const int column = lane % 8, part = lane / 8 & 1, token = lane / 2;
        const uint32_t to = staging + column * 32 + ((part ^ column / 4) << 4);
        const uint32_t from = staging + token * 32 + ((lane % 2 ^ (token / 4 & 1)) << 4);
#pragma unroll
        for (int most = 0; most < N; most += 64) {
            if (most > 0) __syncwarp();
#pragma unroll
            for (int j = most / 8; j < N / 8 && j < most / 8 + 8; j++) {
                store_transposed(to + j % 8 * 256, pack2(sum[4 * j], sum[4 * j + 1]),
                                 pack2(sum[4 * j + 2], sum[4 * j + 3]));
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int first = most + 16 * i;
                if (first >= N) continue;
                const uint4 v = load_shared16(from + i * 512);
                const int place = __shfl_sync(ALL_LANES, places[first / 32], first % 32 + token);
                store_global16(out + int64_t(place) * t.stride + lane % 2 * 8, v, first + token < item.rows);
            }
        }
    }
    __syncwarp();
}

// N columns of a tile: a row's sums are the same whatever N and the other columns are. A scale is for STEPS steps of k
// 16. While the tensor cores are at some of them, the codes of the next are converted; while a warpgroup scales its
// sums, the other has them.
template <int MODE, int FORM, int STEPS, typename M, int N>
__device__ __forceinline__ void consume(const Task &t, const Item &item, uint32_t shared, uint32_t released,
                                        uint32_t done, const int *places, int warp, int lane) {
    constexpr int COUNT = STEPS < 4 ? STEPS : 4, PARTS = 8 / COUNT, GROUPS = 8 / STEPS;
    const int units = t.w.k / UNIT;
    const Lane of = lane_of<MODE, FORM, M>(t, item, warp, lane);
    float acc[N / 2] = {}, sum[N / 2] = {};
    uint32_t a[2][COUNT][4];
    const Ring<M, MODE> ring = {shared};

    Side<FORM, GROUPS> side = load_side<FORM, GROUPS>(t, of, 0);
    ring.wait_for(done);
    load_steps<MODE, FORM, 0, STEPS>(t, ring.stage_of(done), of, side, lane, a[0]);
#pragma unroll 1
    for (int unit = 0; unit < units; unit++) {
        const uint32_t use = done + unit, stage = ring.stage_of(use);
        const Side<FORM, GROUPS> next = load_side<FORM, GROUPS>(t, of, min(unit + 1, units - 1));
        auto part = [&](auto number) {
            constexpr int PART = decltype(number)::value, GROUP = PART * COUNT / STEPS;
            constexpr bool STARTS = PART * COUNT % STEPS == 0, ENDS = (PART + 1) * COUNT % STEPS == 0;
            written_fragments(a[PART % 2]);
            products_begin();
#pragma unroll
            for (int j = 0; j < COUNT; j++) {
                constexpr int FIRST = PART * COUNT;
                const uint64_t tokens = operand(stage + FIRST / 4 * M::HALF_BYTES, 1024) + 2 * (FIRST % 4 + j);
                multiply<N>(acc, a[PART % 2][j], tokens, !STARTS || j > 0);
            }
            products_commit();
            if (!STARTS) products_wait<1>();  // for the registers of the part before
            if constexpr (PART + 1 < PARTS) {
                constexpr int LATER = (PART + 1) * COUNT;
                load_steps<MODE, FORM, LATER, STEPS>(t, stage, of, side, lane, a[(PART + 1) % 2]);
            } else if (unit + 1 < units) {
                ring.wait_for(use + 1);
                load_steps<MODE, FORM, 0, STEPS>(t, ring.stage_of(use + 1), of, next, lane, a[0]);
            }
            if constexpr (ENDS) {
                products_wait<0>();
                products_end(acc);
                const float low = scale_of<FORM>(side.scale[GROUP][0], t.w.bf16_scales);
                const float high = scale_of<FORM>(side.scale[GROUP][1], t.w.bf16_scales);
#pragma unroll
                for (int i = 0; i < N / 2; i++) {
                    sum[i] = FORM == FP4_TILES || IS_GGUF<FORM> ? sum[i] + acc[i]
                                                                : fmaf(i % 4 < 2 ? low : high, acc[i], sum[i]);
                }
            }
        };
        part(std::integral_constant<int, 0>());
        part(std::integral_constant<int, 1>());
        if constexpr (PARTS == 4) {
            part(std::integral_constant<int, 2>());
            part(std::integral_constant<int, 3>());
        }
        if (lane < BLOCKS<MODE>) barrier_arrive_there(released + ring.slot(use) * 8);
        side = next;
    }
    if constexpr (FORM == FP4_TILES) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) sum[i] *= of.whole[i % 4 / 2];
    }
    const int feature = item.feature + warp * (MODE == GATE_UP ? 8 : 16);
    store_tile<MODE, N>(t, item, sum, shared + M::STAGING + warp * M::STAGING_BYTES, places, feature, lane);
}

}  // namespace packed_wgmma
