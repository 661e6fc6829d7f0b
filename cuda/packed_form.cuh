// How matrices lie that kernels of experts and of many rows take: bf16, and weights of 4, 6 and 8 bits.
#pragma once
#include "device.cuh"

// How the codes of a matrix lie: rows of bf16, or tiles in the order of fragments. INT4_HALVES: what walks call int4 in
// groups of 32. The last three are GGUF's (gguf.cuh).
enum Form { BF16_ROWS, INT4_TILES, FP8_TILES, FP4_TILES, INT4_HALVES, K4_TILES, K6_TILES, INT8_TILES };
template <int FORM>
constexpr bool IS_INT4 = FORM == INT4_TILES || FORM == INT4_HALVES;
template <int FORM>
constexpr bool IS_GGUF = FORM >= K4_TILES;
template <int FORM>
constexpr int GGUF_BITS = FORM == K4_TILES ? 4 : FORM == K6_TILES ? 6 : 8;
// Codes of 16 rows and 64 of k.
template <int FORM>
constexpr int TILE_BYTES = FORM == FP8_TILES || FORM == INT8_TILES ? 1024
                           : FORM == BF16_ROWS                     ? 2048
                           : FORM == K6_TILES                      ? 768
                                                                   : 512;

constexpr int TILE_ROWS = 16, TILE_K = 64;
constexpr int MOST_K = 1 << 16;  // so that what is between two row tiles of an expert has less than 2^31 bytes

// A matrix as kernels take it. Tiles of 8 bits are two halves of k 32, 16 bytes a lane each.
struct Packed {
    const uint8_t *codes;
    const void *scales;     // [row tile][group][each]: 16 bits (int4), f32 (fp8), 8 bytes (fp4) or a word (GGUF)
    const uint8_t *zeros;   // int4: as scales; null: 8. GGUF: words of d and m
    const float *wholes;    // fp4: by row tile
    int row_tile_bytes;
    int form, k, k_tiles;
    int groups, each;       // each: 16 scales for the rows of a tile, or 1 for all; fp4: 8 pairs of rows, by k tile
    int shift;              // k tile >> shift is its group; groups of 32: `halves`, two a tile
    uint32_t bf16_scales;   // int4: all ones, or 0 where they are f16
    bool halves;
    bool minima;            // GGUF: q4_k or q5_k
};

// What kernels take of a matrix of the caller's, `rows` by `k`; false where they do not take it.
static inline bool take_packed(const q35_packed &from, int64_t rows, int k, Packed &to) {
    to = Packed{};
    if (from.codes == nullptr || !aligned(from.codes) || from.rows != rows || from.k != k) return false;
    if (rows % TILE_ROWS != 0 || k % TILE_K != 0 || k <= 0 || k > MOST_K) return false;
    to.codes = static_cast<const uint8_t *>(from.codes), to.scales = from.scales, to.zeros = nullptr;
    to.k = k, to.k_tiles = k / TILE_K, to.groups = 1, to.each = 16, to.shift = 31;
    switch (from.kind) {
        case 0:
            to.form = BF16_ROWS, to.row_tile_bytes = TILE_ROWS * k * 2;
            return true;
        case q35_int4_f16:
        case q35_int4_bf16:
            to.form = INT4_TILES, to.row_tile_bytes = TILE_ROWS * k / 2;
            to.zeros = from.zeros, to.bf16_scales = from.kind == q35_int4_bf16 ? 0xffffffffu : 0;
            if (from.group > 0 && from.group < k) {
                if (from.group != 32 && from.group != 64 && from.group != 128) return false;
                to.groups = ceil_div(k, from.group), to.halves = from.group == 32, to.shift = from.group == 128;
            }
            break;
        case q35_fp8_block:
            to.groups = ceil_div(k, 128), to.each = 1, to.shift = 1;
            [[fallthrough]];
        case q35_fp8_row:
            to.form = FP8_TILES, to.row_tile_bytes = TILE_ROWS * k;
            break;
        case q35_fp4:
            to.form = FP4_TILES, to.row_tile_bytes = TILE_ROWS * k / 2;
            to.groups = to.k_tiles, to.each = 8, to.shift = 0;
            if (!aligned(from.scales)) return false;
            to.wholes = static_cast<const float *>(from.scales) + rows / TILE_ROWS * (k / 4);
            break;
        case q35_q4_k:
        case q35_q5_k:
        case q35_q6_k:
        case q35_q8_0:
            if (k % (2 * TILE_K) != 0) return false;
            to.form = from.kind == q35_q4_k ? K4_TILES : from.kind == q35_q8_0 ? INT8_TILES : K6_TILES;
            to.row_tile_bytes = to.k_tiles * (to.form == K4_TILES ? 512 : to.form == INT8_TILES ? 1024 : 768);
            to.groups = to.k_tiles, to.shift = 0, to.minima = from.kind != q35_q6_k;
            to.zeros = static_cast<const uint8_t *>(from.scales) + rows * (k / 16);
            break;
        default:
            return false;
    }
    // Places of scales are counted in 32 bits.
    return to.scales != nullptr && aligned(to.scales, 4) && rows / TILE_ROWS * to.groups * to.each < int64_t(1) << 31;
}
