// Packed weights (q35_packed) from GGUF's blocks. Own code.
//
// It does not let the next kernel start: what reads weights does so before it waits for its inputs.
#include "device.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int ROWS = 16, TILE_K = 64;  // of a tile

// Elements and bytes of a block.
template <int KIND>
constexpr int BLOCK_LEN = KIND == q35_q8_0 ? 32 : 256;
template <int KIND>
constexpr int BLOCK_BYTES = KIND == q35_q4_k ? 144 : KIND == q35_q5_k ? 176 : KIND == q35_q6_k ? 210 : 34;
template <int KIND>
constexpr int TILE_BYTES = KIND == q35_q4_k ? 512 : KIND == q35_q8_0 ? 1024 : 768;

// Where a file has a column.
__device__ __forceinline__ int source_of(const q35_head_order &order, int column) {
    const int after = column - order.start;
    if (order.head_dim == 0 || after < 0) return column;
    const int head = after / order.head_dim, k_head = head / order.per_k_head, i = head % order.per_k_head;
    return order.start + (i * order.num_k_heads + k_head) * order.head_dim + after % order.head_dim;
}

__device__ __forceinline__ uint32_t load_two(const uint8_t *p) { return *reinterpret_cast<const uint16_t *>(p); }

// Codes of elements `at` (even) and `at` + 1 of a block, in the halves of a word.
template <int KIND>
__device__ __forceinline__ uint32_t code_pair(const uint8_t *block, int at) {
    const int part = at / 32, j = at % 32;
    uint32_t low, high = 0;  // of both, in the bytes of a half
    if (KIND == q35_q8_0) {
        low = load_two(block + 2 + at);
    } else if (KIND == q35_q6_k) {
        const int half = part / 4, quarter = part % 4;
        low = load_two(block + 64 * half + 32 * (quarter % 2) + j) >> (4 * (quarter / 2)) & 0x0f0f;
        high = load_two(block + 128 + 32 * half + j) >> (2 * quarter) & 0x0303;
    } else {
        low = load_two(block + (KIND == q35_q5_k ? 48 : 16) + part / 2 * 32 + j) >> (4 * (part % 2)) & 0x0f0f;
        if (KIND == q35_q5_k) high = load_two(block + 16 + j) >> part & 0x0101;
    }
    const uint32_t both = low | high << 4;
    return (both & 0xff) | both >> 8 << 16;
}

// The word of scales of the 64 elements from `at` on.
template <int KIND>
__device__ __forceinline__ uint32_t scale_word(const uint8_t *block, int at) {
    if (KIND == q35_q8_0) return load_two(block) | load_two(block + BLOCK_BYTES<KIND>) << 16;
    uint32_t word = 0;
    if (KIND == q35_q6_k) {
#pragma unroll
        for (int i = 0; i < 4; i++) word |= uint32_t(block[192 + at / 16 + i] ^ 128) << (8 * i);
        return word;
    }
    const uint8_t *const six = block + 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int i = at / 32 + h;
        uint32_t scale = six[i] & 63, min = six[i + 4] & 63;
        if (i >= 4) {  // upper bits stand over the first four
            scale = (six[i + 4] & 15) | (six[i - 4] >> 2 & 48);
            min = six[i + 4] >> 4 | (six[i] >> 2 & 48);
        }
        word |= scale << (8 * h) | min << (16 + 8 * h);
    }
    return word;
}

// A thread for each lane of a tile.
template <int KIND>
__global__ void __launch_bounds__(THREADS)
    pack_gguf_kernel(int rows, int k, const uint8_t *blocks, const q35_head_order order, uint8_t *codes,
                     uint32_t *scales, uint32_t *wholes) {
    wait_for_inputs();
    constexpr int LEN = BLOCK_LEN<KIND>, BYTES = BLOCK_BYTES<KIND>;
    const int64_t number = int64_t(blockIdx.x) * THREADS + threadIdx.x, tile = number / 32;
    const int lane = int(number % 32), k_tiles = k / TILE_K, k_tile = int(tile % k_tiles);
    const int row0 = int(tile / k_tiles) * ROWS;
    if (row0 >= rows) return;
    const int column0 = source_of(order, k_tile * TILE_K);  // whose 64 neighbours stay together
    const auto block_of = [&](int row, int column) {
        return blocks + (int64_t(row) * (k / LEN) + column / LEN) * BYTES;
    };

    uint32_t low[4] = {}, rest[4] = {};  // of 8 bits the second half, of 6 the upper bits
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = row0 + lane / 4 + 8 * r;
        if (row >= rows) continue;
#pragma unroll
        for (int step = 0; step < 4; step++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int column = column0 + 16 * step + 8 * h + lane % 4 * 2, i = r + 2 * h;
                const uint32_t pair = code_pair<KIND>(block_of(row, column), column % LEN);
                if (KIND == q35_q8_0) {
                    (step < 2 ? low : rest)[step % 2 * 2 + h] |= pair << (8 * r);
                } else {
                    low[step] |= (pair & 0x000f000f) << (4 * i);
                    rest[step / 2] |= (pair >> 4 & 0x00030003) << (8 * (step % 2) + 2 * i);
                }
            }
        }
    }
    uint8_t *const to = codes + tile * TILE_BYTES<KIND>;
    reinterpret_cast<uint4 *>(to)[lane] = make_uint4(low[0], low[1], low[2], low[3]);
    if (KIND == q35_q8_0) {
        reinterpret_cast<uint4 *>(to + 512)[lane] = make_uint4(rest[0], rest[1], rest[2], rest[3]);
    } else if (KIND != q35_q4_k) {
        reinterpret_cast<uint2 *>(to + 512)[lane] = make_uint2(rest[0], rest[1]);
    }

    if (lane >= ROWS) return;
    const int row = row0 + lane;
    const uint8_t *const block = row < rows ? block_of(row, column0) : nullptr;
    scales[tile * ROWS + lane] = row < rows ? scale_word<KIND>(block, column0 % LEN) : 0;
    if (KIND == q35_q8_0 || k_tile % 2 != 0) return;
    uint32_t whole = 0;
    if (row < rows) whole = KIND == q35_q6_k ? load_two(block + 208) : load_two(block) | load_two(block + 2) << 16;
    wholes[tile / 2 * ROWS + lane] = whole;
}

// -------------------------------------------------------------------------------------------------------- launchers

template <int KIND>
int run(void *stream, const q35_packed &to, int row0, int rows, const uint8_t *blocks, const q35_head_order &order) {
    const int64_t first = int64_t(row0 / ROWS) * (to.k / TILE_K);  // tile
    const int64_t grid = ceil_div(int64_t(ceil_div(rows, ROWS)) * (to.k / TILE_K) * 32, int64_t(THREADS));
    if (grid > INT32_MAX || to.k % BLOCK_LEN<KIND> != 0) return cudaErrorInvalidValue;
    uint8_t *const codes = static_cast<uint8_t *>(const_cast<void *>(to.codes)) + first * TILE_BYTES<KIND>;
    uint32_t *const scales = static_cast<uint32_t *>(const_cast<void *>(to.scales));
    uint32_t *const wholes = scales + int64_t(to.rows) * (to.k / TILE_K) + first / 2 * ROWS;
    return launch(pack_gguf_kernel<KIND>, unsigned(grid), THREADS, 0, as_stream(stream), rows, to.k, blocks, order,
                  codes, scales + first * ROWS, wholes);
}

}  // namespace

extern "C" int q35_pack_gguf(void *stream, q35_packed to, int row0, int rows, const uint8_t *blocks,
                             q35_head_order order) {
    if (row0 < 0 || row0 % ROWS != 0 || rows < 0 || rows > to.rows - row0 || to.rows % ROWS != 0 || to.k <= 0 ||
        to.k % (2 * TILE_K) != 0 || !aligned(to.codes) || !aligned(to.scales) || !aligned(blocks, 2)) {
        return cudaErrorInvalidValue;
    }
    const bool heads = order.head_dim != 0;
    if (heads && (order.head_dim < 0 || order.head_dim % (2 * TILE_K) != 0 || order.start < 0 ||
                  order.start % (2 * TILE_K) != 0 || order.num_k_heads <= 0 || order.per_k_head <= 0)) {
        return cudaErrorInvalidValue;
    }
    if (heads && order.start + int64_t(order.num_k_heads) * order.per_k_head * order.head_dim != to.k) {
        return cudaErrorInvalidValue;
    }
    if (rows == 0) return cudaSuccess;
    switch (to.kind) {
        case q35_q4_k: return run<q35_q4_k>(stream, to, row0, rows, blocks, order);
        case q35_q5_k: return run<q35_q5_k>(stream, to, row0, rows, blocks, order);
        case q35_q6_k: return run<q35_q6_k>(stream, to, row0, rows, blocks, order);
        case q35_q8_0: return run<q35_q8_0>(stream, to, row0, rows, blocks, order);
    }
    return cudaErrorInvalidValue;
}
