// Packed weights (q35_packed) from the layouts of checkpoints, and quantised from bf16. Own code.
//
// None of these lets the next kernel start: what reads weights does so before it waits for its inputs.
#include <cuda_fp16.h>

#include "device.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int ROWS = 16;  // of a tile
constexpr int BLOCK = 128;  // rows and columns that share a scale of fp8
constexpr int CANDIDATES = 8;

// Which 16 bytes of a packed matrix a thread writes: those of `lane` in tile (tile, k_tile), of fp8 in its half.
struct Piece {
    int64_t at;  // in pieces, from the first row tile written
    int tile, k_tile, half, lane;
};

template <int HALVES>
__device__ Piece this_piece(int k) {
    Piece p;
    p.at = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    const int64_t tiles = p.at / (32 * HALVES);
    p.lane = int(p.at % 32), p.half = int(p.at / 32 % HALVES);
    p.tile = int(tiles / (k / 64)), p.k_tile = int(tiles % (k / 64));
    return p;
}

// code(row, column) gives two codes, of this column and the next, in the halves of a word; 0 for a row past the last.
template <typename Code>
__device__ uint4 int4_piece(const Piece &p, Code code) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        words[j] = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = p.tile * ROWS + p.lane / 4 + i % 2 * 8;
            words[j] |= code(row, p.k_tile * 64 + 16 * j + i / 2 * 8 + p.lane % 4 * 2) << (4 * i);
        }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

template <typename Code>
__device__ uint4 fp8_piece(const Piece &p, Code code) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int row = p.tile * ROWS + p.lane / 4;
        const int column = p.k_tile * 64 + 32 * p.half + 16 * (j / 2) + 8 * (j % 2) + p.lane % 4 * 2;
        words[j] = code(row, column) | code(row + 8, column) << 8;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// Where in its word AWQ has one of eight rows.
__device__ __forceinline__ int awq_place(int row) { return row % 8 / 2 + row % 2 * 4; }

__global__ void __launch_bounds__(THREADS)
    pack_int4_kernel(int rows, int k, const uint32_t *codes, int order, uint4 *to) {
    wait_for_inputs();
    const Piece p = this_piece<1>(k);
    if (p.tile * ROWS >= rows) return;
    const auto one = [&](int64_t row, int64_t column) {
        if (order == q35_order_packed) return codes[row * (k / 8) + column / 8] >> (column % 8 * 4);
        if (order == q35_order_gptq) return codes[column / 8 * rows + row] >> (column % 8 * 4);
        return codes[column * (rows / 8) + row / 8] >> (awq_place(int(row % 8)) * 4);
    };
    to[p.at] = int4_piece(p, [&](int row, int column) {
        return row < rows ? (one(row, column) & 15) | (one(row, column + 1) & 15) << 16 : 0u;
    });
}

__global__ void __launch_bounds__(THREADS) pack_fp8_kernel(int rows, int k, const uint8_t *codes, uint4 *to) {
    wait_for_inputs();
    const Piece p = this_piece<2>(k);
    if (p.tile * ROWS >= rows) return;
    to[p.at] = fp8_piece(p, [&](int row, int column) {
        if (row >= rows) return 0u;
        const uint32_t pair = *reinterpret_cast<const uint16_t *>(codes + int64_t(row) * k + column);
        return (pair & 255) | pair >> 8 << 16;
    });
}

// A number of e4m3, without its sign, as fp4 has scales; 0 for zero, whose codes are then 0.
__device__ __forceinline__ uint32_t fp4_scale_of(uint32_t e4m3) {
    const uint32_t size = e4m3 & 127;
    if (size >= 8 || size == 0) return size == 0 ? 0 : size + 16;
    const int top = 31 - __clz(size);  // below 2^-6 they count in steps of 2^-9
    return 8 * top + (size << (3 - top) & 7);
}

__global__ void __launch_bounds__(THREADS)
    pack_fp4_kernel(int rows, int k, const uint8_t *codes, const uint8_t *scales, float whole, uint4 *to,
                    uint2 *to_scales, float *to_wholes) {
    wait_for_inputs();
    const Piece p = this_piece<1>(k);
    if (p.tile * ROWS >= rows) return;
    const int row0 = p.tile * ROWS + p.lane / 4;
    uint32_t words[4] = {}, side[2] = {};
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int64_t row = row0 + 8 * r;
        if (row >= rows) break;
#pragma unroll
        for (int step = 0; step < 4; step++) {
            const uint32_t scale = scales[row * (k / 16) + p.k_tile * 4 + step];
            side[r] |= fp4_scale_of(scale) << 8 * step;
            if ((scale & 127) == 0) continue;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int i = r + 2 * h;
                uint32_t pair = codes[row * (k / 2) + p.k_tile * 32 + 8 * step + 4 * h + p.lane % 4];
                pair = (pair & 15) | pair >> 4 << 16;
                if ((scale & 128) != 0) pair ^= 0x00080008u;
                words[step] |= (pair & 0x00070007u) << 3 * i | (pair >> 3 & 0x00010001u) << (12 + (i ^ 1));
            }
        }
    }
    to[p.at] = make_uint4(words[0], words[1], words[2], words[3]);
    if (p.lane % 4 == 0) to_scales[p.at / 4] = make_uint2(side[0], side[1]);
    if (p.lane == 0 && p.k_tile == 0) to_wholes[p.tile] = whole;
}

// A thread for each entry of the scales or zero points: [row tile][group][each].
struct Entry {
    int64_t at;
    int row, group;
};
__device__ Entry this_entry(int groups, int each) {
    Entry e;
    e.at = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    e.group = int(e.at / each % groups);
    e.row = int(e.at / each / groups * ROWS + e.at % each);
    return e;
}

__device__ float read_scale(const void *scales, int type, int64_t i) {
    if (type == 0) return static_cast<const float *>(scales)[i];
    if (type == 1) return __half2float(static_cast<const __half *>(scales)[i]);
    return __bfloat162float(static_cast<const bf16 *>(scales)[i]);
}
__device__ void write_scale(void *scales, int kind, int64_t i, float scale) {
    if (kind == q35_int4_f16) {
        static_cast<__half *>(scales)[i] = __float2half_rn(scale);
    } else if (kind == q35_int4_bf16) {
        static_cast<bf16 *>(scales)[i] = __float2bfloat16_rn(scale);
    } else {
        static_cast<float *>(scales)[i] = scale;
    }
}

__global__ void __launch_bounds__(THREADS)
    pack_scales_kernel(int rows, int groups, int kind, const void *scales, int type, int block_rows, int64_t row_stride,
                       int64_t group_stride, void *to) {
    wait_for_inputs();
    const Entry e = this_entry(groups, kind == q35_fp8_block ? 1 : ROWS);
    if (e.row / ROWS * ROWS >= rows) return;
    const int64_t from = e.row / block_rows * row_stride + e.group * group_stride;
    write_scale(to, kind, e.at, e.row < rows ? read_scale(scales, type, from) : 0.0f);
}

__global__ void __launch_bounds__(THREADS)
    pack_zeros_kernel(int rows, int groups, const uint32_t *zeros, int order, int minus_one, uint8_t *to) {
    wait_for_inputs();
    const Entry e = this_entry(groups, ROWS);
    if (e.row / ROWS * ROWS >= rows) return;
    uint32_t zero = e.row < rows ? 8 : 0;
    if (e.row < rows && zeros != nullptr) {
        const int place = order == q35_order_awq ? awq_place(e.row) : e.row % 8;
        const int64_t word = order == q35_order_packed ? int64_t(e.row / 8) * groups + e.group
                                                       : int64_t(e.group) * (rows / 8) + e.row / 8;
        zero = ((zeros[word] >> (4 * place)) + (minus_one ? 1 : 0)) & 15;
    }
    to[e.at] = uint8_t(zero);
}

// -------------------------------------------------------------------------------------------------------- quantising

// From -8 to 7; everything is 0 where the scale is.
__device__ __forceinline__ float to_int4(float x, float scale) {
    return scale > 0.0f ? fminf(fmaxf(rintf(x / scale), -8.0f), 7.0f) : 0.0f;
}

__device__ __forceinline__ float rounded(float scale, int kind) {
    return kind == q35_int4_f16 ? __half2float(__float2half_rn(scale)) : __bfloat162float(__float2bfloat16_rn(scale));
}

// A warp for each row and group.
__global__ void __launch_bounds__(THREADS)
    int4_scales_kernel(int rows, int k, int group, int groups, int kind, const bf16 *w, void *to) {
    wait_for_inputs();
    const int lane = threadIdx.x % 32;
    const int64_t task = int64_t(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
    const int row = int(task / groups), own = int(task % groups);
    if (row / ROWS * ROWS >= rows) return;
    const int64_t at = (int64_t(row / ROWS) * groups + own) * ROWS + row % ROWS;
    if (row >= rows) {
        if (lane == 0) write_scale(to, kind, at, 0.0f);
        return;
    }
    const int first = own * group, count = min(group, k - first);
    const bf16 *from = w + int64_t(row) * k + first;
    float most = 0.0f;
    for (int i = lane; i < count; i += 32) most = fmaxf(most, fabsf(__bfloat162float(from[i])));
    most = __uint_as_float(__reduce_max_sync(ALL_LANES, __float_as_uint(most)));
    float scales[CANDIDATES], errors[CANDIDATES];
#pragma unroll
    for (int c = 0; c < CANDIDATES; c++) {
        scales[c] = rounded(most * (1.0f - c / 32.0f) / 7.0f, kind);
        errors[c] = 0.0f;
    }
    for (int i = lane; i < count; i += 32) {
        const float x = __bfloat162float(from[i]);
#pragma unroll
        for (int c = 0; c < CANDIDATES; c++) {
            const float off = fmaf(-to_int4(x, scales[c]), scales[c], x);
            errors[c] = fmaf(off, off, errors[c]);
        }
    }
    float best = scales[0], least = lane_sum(errors[0]);
#pragma unroll
    for (int c = 1; c < CANDIDATES; c++) {
        const float error = lane_sum(errors[c]);
        if (error < least) least = error, best = scales[c];
    }
    if (lane == 0) write_scale(to, kind, at, best);
}

__global__ void __launch_bounds__(THREADS)
    int4_codes_kernel(int rows, int k, int group, int groups, int kind, const bf16 *w, const void *scales, uint4 *to) {
    wait_for_inputs();
    const Piece p = this_piece<1>(k);
    if (p.tile * ROWS >= rows) return;
    to[p.at] = int4_piece(p, [&](int row, int column) {
        if (row >= rows) return 0u;
        const int64_t at = (int64_t(p.tile) * groups + column / group) * ROWS + row % ROWS;
        const float scale = read_scale(scales, kind == q35_int4_f16 ? 1 : 2, at);
        const float2 x = unpack2(*reinterpret_cast<const uint32_t *>(w + int64_t(row) * k + column));
        return uint32_t(int(to_int4(x.x, scale)) + 8) | uint32_t(int(to_int4(x.y, scale)) + 8) << 16;
    });
}

// To nearest even; what is larger than the largest number becomes it.
__device__ __forceinline__ uint32_t to_e4m3(float x) {
    const uint32_t sign = __float_as_uint(x) >> 24 & 0x80;
    const float size = fminf(fabsf(x), 448.0f);
    // Below 2^-6 codes count in steps of 2^-9.
    if (size < 0.015625f) return sign | uint32_t(__float2int_rn(size * 512.0f));
    const uint32_t bits = __float_as_uint(size);
    return sign | (((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3));
}

// A thread block for each block of weights: columns blockIdx.x, rows blockIdx.y.
__global__ void __launch_bounds__(THREADS)
    quantise_fp8_kernel(int rows, int k, const bf16 *w, float *scales, uint4 *to) {
    __shared__ uint32_t most_of[THREADS / 32];
    wait_for_inputs();
    const int row0 = blockIdx.y * BLOCK, column0 = blockIdx.x * BLOCK;
    const int num_rows = min(BLOCK, rows - row0), num_columns = min(BLOCK, k - column0);
    uint32_t most = 0;  // the bits of a positive number grow with it
    for (int i = threadIdx.x; i < num_rows * (num_columns / 2); i += THREADS) {
        const int row = row0 + i / (num_columns / 2), column = column0 + i % (num_columns / 2) * 2;
        const uint32_t pair = *reinterpret_cast<const uint32_t *>(w + int64_t(row) * k + column);
        most = max(most, max(pair & 0x7fff, pair >> 16 & 0x7fff));
    }
    most = __reduce_max_sync(ALL_LANES, most);
    if (threadIdx.x % 32 == 0) most_of[threadIdx.x / 32] = most;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) most = max(most, most_of[i]);
    const float scale = __uint_as_float(most << 16) / 448.0f;

    const int k_tiles = num_columns / 64, num_tiles = ceil_div(num_rows, ROWS);
    if (int(threadIdx.x) < num_tiles) {
        scales[int64_t(row0 / ROWS + threadIdx.x) * ceil_div(k, BLOCK) + blockIdx.x] = scale;
    }
    for (int i = threadIdx.x; i < num_tiles * k_tiles * 64; i += THREADS) {
        Piece p;
        p.lane = i % 32, p.half = i / 32 % 2;
        p.k_tile = column0 / 64 + i / 64 % k_tiles, p.tile = row0 / ROWS + i / 64 / k_tiles;
        p.at = ((int64_t(p.tile) * (k / 64) + p.k_tile) * 2 + p.half) * 32 + p.lane;
        to[p.at] = fp8_piece(p, [&](int row, int column) {
            if (row >= rows || !(scale > 0.0f)) return 0u;
            const float2 x = unpack2(*reinterpret_cast<const uint32_t *>(w + int64_t(row) * k + column));
            return to_e4m3(x.x / scale) | to_e4m3(x.y / scale) << 16;
        });
    }
}

// -------------------------------------------------------------------------------------------------------- launchers

bool is_int4(const q35_packed &w) { return w.kind == q35_int4_f16 || w.kind == q35_int4_bf16; }
bool is_fp8(const q35_packed &w) { return w.kind == q35_fp8_block || w.kind == q35_fp8_row; }

bool fits(const q35_packed &to, int row0, int rows) {
    return row0 >= 0 && row0 % ROWS == 0 && rows >= 0 && rows <= to.rows - row0 && to.rows % ROWS == 0 && to.k > 0 &&
           to.k % 64 == 0;
}
bool has_rows(const q35_packed &to, int row0, int rows) {
    return fits(to, row0, rows) && (is_fp8(to) || (is_int4(to) && to.group > 0));
}

int num_groups(const q35_packed &w) {
    if (w.kind == q35_fp8_row) return 1;
    return ceil_div(w.k, w.kind == q35_fp8_block ? BLOCK : w.group);
}

// In bytes.
template <typename T>
T *part(const void *from, int64_t offset) {
    return reinterpret_cast<T *>(static_cast<unsigned char *>(const_cast<void *>(from)) + offset);
}
template <typename T>
T *codes_at(const q35_packed &to, int row0) {
    return part<T>(to.codes, int64_t(row0) * to.k / (is_int4(to) ? 2 : 1));
}
template <typename T>
T *scales_at(const q35_packed &to, int row0) {
    const int64_t entries = int64_t(row0) * num_groups(to) / (to.kind == q35_fp8_block ? ROWS : 1);
    return part<T>(to.scales, entries * (is_int4(to) ? 2 : 4));
}

// A thread for each of `each` things of every row tile.
template <typename... Parameters, typename... Arguments>
int by_row_tile(void (*kernel)(Parameters...), void *stream, int rows, int64_t each, Arguments... arguments) {
    const int64_t blocks = ceil_div(ceil_div(rows, ROWS) * each, int64_t(THREADS));
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    return launch(kernel, unsigned(blocks), THREADS, 0, as_stream(stream), arguments...);
}

}  // namespace

extern "C" int q35_pack_int4(void *stream, q35_packed to, int row0, int rows, const int32_t *codes, int order) {
    if (!has_rows(to, row0, rows) || !is_int4(to) || order < q35_order_packed || order > q35_order_awq ||
        (order == q35_order_awq && rows % 8 != 0)) {
        return cudaErrorInvalidValue;
    }
    if (rows == 0) return cudaSuccess;
    return by_row_tile(pack_int4_kernel, stream, rows, int64_t(to.k) / 2, rows, to.k,
                       reinterpret_cast<const uint32_t *>(codes), order, codes_at<uint4>(to, row0));
}

extern "C" int q35_pack_zeros(void *stream, q35_packed to, int row0, int rows, const int32_t *zeros, int order,
                              int minus_one) {
    if (!has_rows(to, row0, rows) || !is_int4(to) || to.zeros == nullptr || order < q35_order_packed ||
        order > q35_order_awq || (zeros != nullptr && order != q35_order_packed && rows % 8 != 0)) {
        return cudaErrorInvalidValue;
    }
    if (rows == 0) return cudaSuccess;
    const int groups = num_groups(to);
    return by_row_tile(pack_zeros_kernel, stream, rows, int64_t(groups) * ROWS, rows, groups,
                       reinterpret_cast<const uint32_t *>(zeros), order, minus_one,
                       part<uint8_t>(to.zeros, int64_t(row0) * groups));
}

extern "C" int q35_pack_fp8(void *stream, q35_packed to, int row0, int rows, const uint8_t *codes) {
    if (!has_rows(to, row0, rows) || !is_fp8(to) || !aligned(codes, 2)) return cudaErrorInvalidValue;
    if (rows == 0) return cudaSuccess;
    return by_row_tile(pack_fp8_kernel, stream, rows, int64_t(to.k), rows, to.k, codes, codes_at<uint4>(to, row0));
}

extern "C" int q35_pack_fp4(void *stream, q35_packed to, int row0, int rows, const uint8_t *codes,
                            const uint8_t *scales, float whole) {
    if (!fits(to, row0, rows) || to.kind != q35_fp4 || !aligned(to.codes) || !aligned(to.scales)) {
        return cudaErrorInvalidValue;
    }
    if (rows == 0) return cudaSuccess;
    const int64_t tile = row0 / ROWS;
    return by_row_tile(pack_fp4_kernel, stream, rows, int64_t(to.k) / 2, rows, to.k, codes, scales, whole,
                       part<uint4>(to.codes, tile * to.k * 8), part<uint2>(to.scales, tile * to.k),
                       part<float>(to.scales, int64_t(to.rows / ROWS) * to.k + tile * 4));
}

extern "C" int q35_pack_scales(void *stream, q35_packed to, int row0, int rows, const void *scales, int type,
                               int block_rows, int64_t row_stride, int64_t group_stride) {
    const bool whole = block_rows % ROWS == 0 || (block_rows == 1 && to.kind != q35_fp8_block);
    if (!has_rows(to, row0, rows) || type < 0 || type > 2 || block_rows < 1 || !whole) return cudaErrorInvalidValue;
    if (rows == 0) return cudaSuccess;
    const int groups = num_groups(to), each = to.kind == q35_fp8_block ? 1 : ROWS;
    return by_row_tile(pack_scales_kernel, stream, rows, int64_t(groups) * each, rows, groups, to.kind, scales, type,
                       block_rows, row_stride, group_stride, scales_at<void>(to, row0));
}

extern "C" int q35_quantise_int4(void *stream, q35_packed to, int row0, int rows, const q35_bf16 *w) {
    if (!has_rows(to, row0, rows) || !is_int4(to) || to.zeros != nullptr || !aligned(w, 4)) {
        return cudaErrorInvalidValue;
    }
    if (rows == 0) return cudaSuccess;
    const int groups = num_groups(to), group = to.group < to.k ? to.group : to.k;
    void *scales = scales_at<void>(to, row0);
    // A warp for each row and group.
    const int code = by_row_tile(int4_scales_kernel, stream, rows, int64_t(groups) * ROWS * 32, rows, to.k, group,
                                 groups, to.kind, as_bf16(w), scales);
    if (code != cudaSuccess) return code;
    return by_row_tile(int4_codes_kernel, stream, rows, int64_t(to.k) / 2, rows, to.k, group, groups, to.kind,
                       as_bf16(w), scales, codes_at<uint4>(to, row0));
}

extern "C" int q35_quantise_fp8(void *stream, q35_packed to, int row0, int rows, const q35_bf16 *w) {
    if (!has_rows(to, row0, rows) || to.kind != q35_fp8_block || !aligned(w, 4)) return cudaErrorInvalidValue;
    if (rows == 0) return cudaSuccess;
    const dim3 grid(unsigned(ceil_div(to.k, BLOCK)), unsigned(ceil_div(rows, BLOCK)));
    if (grid.y > 65535) return cudaErrorInvalidValue;
    return launch(quantise_fp8_kernel, grid, THREADS, 0, as_stream(stream), rows, to.k, as_bf16(w),
                  scales_at<float>(to, row0), codes_at<uint4>(to, row0));
}
