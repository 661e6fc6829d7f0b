// The product of a block's rows of packed weights with a tile of tokens, for many rows: weights are A of mma.m16n8k16,
// tokens B. Own code.
#pragma once
#include "moe_packed.cuh"

// A block has ROW_WARPS pairs of warps. A pair has two row tiles by TOKENS tokens, and each of its warps one of two
// parts of k. A stage in shared memory is a k tile of both parts: rows of 128 bytes of the tokens, with the 16 bytes c
// of row r at place c ^ (r % 8), then each warp's own codes.
template <int FORM, int TOKENS, int ROW_WARPS>
struct Shape {
    static constexpr int THREADS = 64 * ROW_WARPS, ROWS = 2 * TILE_ROWS * ROW_WARPS;
    static constexpr int ROW_BYTES = 2 * TILE_K, TOKEN_BYTES = TOKENS * ROW_BYTES;
    static constexpr int STAGE = 2 * TOKEN_BYTES + 4 * ROW_WARPS * TILE_BYTES<FORM>;
    // One block an SM of any card, or, of fewer tokens, two.
    static constexpr int ROOM = (TOKENS == 64 ? 96 : 80) << 10;
    static constexpr int STAGES = ROOM / STAGE < 8 ? ROOM / STAGE : 8;
    static constexpr int BYTES = STAGES * STAGE;
    static constexpr int BLOCKS = (TOKENS == 64 ? 1 : 2) * 4 / ROW_WARPS;  // an SM, for registers
    // Of the sums [TOKENS][PITCH] that take the place of the stages: a warp's stores hit all banks.
    static constexpr int PITCH = ROWS + 4;
    static_assert(STAGES >= 2 && TOKENS * PITCH * 4 <= BYTES);
};

// Sums [token][local row] in `memory`, for all threads of the block, of `count` tokens, those past a half of TOKENS
// only where there are some. Local rows 32 i .. 32 i + 31 are those of warps i and i + ROW_WARPS: row tiles `row_tile`
// and `row_tile` + `apart`, if `there`. Token i is row row_of(i) of x, which may be asked after ready().
//
// The two parts of k are added at the end; within one, k goes by tiles of 64, in groups of at most 128 whose exact
// products are summed in f32, then times their scale; of fp4 the sum of all groups is, and of GGUF's the elements are,
// which are rounded to bf16. None of this depends on the tokens, nor on TOKENS or ROW_WARPS.
template <int FORM, int TOKENS, int ROW_WARPS, typename Ready, typename RowOf>
__device__ __forceinline__ const float *multiply(unsigned char *memory, const Packed &m, int row_tile, int apart,
                                                 bool there, const bf16 *x, int count, Ready ready, RowOf row_of) {
    typedef Shape<FORM, TOKENS, ROW_WARPS> S;
    constexpr int COPY_ROWS = S::THREADS / 8, COPIES = TOKENS / COPY_ROWS;  // 8 threads a row of tokens
    constexpr int EIGHTS = TOKENS / 8, UNITS = TILE_BYTES<FORM> / 512;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp / ROW_WARPS;
    // The second part starts with a group.
    const int middle = min(2 * ceil_div(m.k_tiles, 4), m.k_tiles), steps = middle;
    const int first = part == 0 ? 0 : middle, share = !there ? 0 : part == 0 ? middle : m.k_tiles - middle;
    const uint32_t memory_at = shared_address(memory);

    const uint8_t *codes = m.codes + int64_t(row_tile) * m.row_tile_bytes;
    codes += FORM == BF16_ROWS ? lane / 8 * m.k * 2 + lane % 8 * 16 : 16 * lane;
    const int apart_bytes = apart * m.row_tile_bytes;
    const uint32_t codes_at = 2 * S::TOKEN_BYTES + warp * 2 * TILE_BYTES<FORM>;
    auto load_weights = [&](int stage, int step) {
        if (step >= share) return;
        const uint32_t to = memory_at + stage * S::STAGE + codes_at;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const uint8_t *from = codes + j * apart_bytes;
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                if (FORM == BF16_ROWS) {  // swizzled as the tokens
                    const int row = lane / 8 + 4 * u, place = lane % 8 ^ (row & 7);
                    copy16(to + j * TILE_BYTES<FORM> + row * S::ROW_BYTES + 16 * place,
                           __cvta_generic_to_global(from + 4 * u * m.k * 2 + (first + step) * S::ROW_BYTES), true);
                } else {
                    copy16(to + j * TILE_BYTES<FORM> + 512 * u + 16 * lane,
                           __cvta_generic_to_global(from + (first + step) * TILE_BYTES<FORM> + 512 * u), true);
                }
            }
            if (FORM == K6_TILES && lane < 16) {
                copy16(to + j * TILE_BYTES<FORM> + 512 + 16 * lane,
                       __cvta_generic_to_global(from + (first + step) * TILE_BYTES<FORM> + 512), true);
            }
        }
    };
#pragma unroll
    for (int s = 0; s < S::STAGES - 1; s++) load_weights(s, s);
    const Cursor at = aim_at<FORM>(m, row_tile, apart);
    // Of fp4 the words of both row tiles, else those of the lane's.
    constexpr bool FP4 = FORM == FP4_TILES, GGUF = IS_GGUF<FORM>;
    RawScales raw[2] = {};
    auto load_side = [&](RawScales &to, int k_tile) {
        if constexpr (FP4) {
            const uint2 v[2] = {load_pair(m, at.scale, k_tile),
                                load_pair(m, at.scale + uint32_t(apart * m.groups * m.each), k_tile)};
            to.scale[0] = v[0].x, to.scale[1] = v[0].y, to.zero[0] = v[1].x, to.zero[1] = v[1].y;
        } else if constexpr (GGUF) {
            load_words<FORM>(to, m, at.scale, k_tile);
        } else {
            load_scales<FORM>(to, m, at.scale, k_tile);
        }
    };
#pragma unroll
    for (int s = 0; s < 2; s++) {
        if (s < share && (s == 0 || FP4 || m.shift == 0)) load_side(raw[s], first + s);
    }
    ready();

    // What this thread copies of the tokens: 16 bytes of rows copy_row, copy_row + COPY_ROWS, ..
    const int copy_row = threadIdx.x / 8, column = threadIdx.x % 8;
    const uint32_t copy_at = memory_at + copy_row * S::ROW_BYTES + ((column ^ (copy_row & 7)) << 4);
    int rows[COPIES];
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
        const int token = copy_row + i * COPY_ROWS;
        rows[i] = token < count ? row_of(token) : -1;
    }
    auto load_tokens = [&](int stage, int step) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int k_tile = h * middle + step;
            if (step >= steps || k_tile >= m.k_tiles) break;
#pragma unroll
            for (int i = 0; i < COPIES; i++) {
                const bf16 *from = x + (int64_t(max(rows[i], 0)) * m.k + k_tile * TILE_K + column * 8);
                copy16(copy_at + stage * S::STAGE + h * S::TOKEN_BYTES + i * COPY_ROWS * S::ROW_BYTES,
                       __cvta_generic_to_global(from), rows[i] >= 0);
            }
        }
    };
#pragma unroll
    for (int s = 0; s < S::STAGES - 1; s++) {
        load_tokens(s, s);
        copy_commit();
    }

    float acc[2][EIGHTS][4] = {}, sums[2][EIGHTS][4] = {};  // of a group, and of all
    RowScales of[2] = {};
    const bool more = count > TOKENS / 2;
    auto fold = [&]() {
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int i = 0; i < EIGHTS; i++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    sums[j][i][e] = FP4 || GGUF ? sums[j][i][e] + acc[j][i][e]
                                                : fmaf(of[j].scale[e / 2], acc[j][i][e], sums[j][i][e]);
                    acc[j][i][e] = 0.0f;
                }
            }
        }
    };
    // Lanes of a matrix load: rows, and halves of 16 k, of four 8x8 matrices.
    const uint32_t token_frag = part * S::TOKEN_BYTES + (lane / 16 * 8 + lane % 8) * S::ROW_BYTES;
    const uint32_t weight_frag = codes_at + lane % 16 * S::ROW_BYTES, swizzle = lane % 8;
    // `fresh`: a group starts, and the next one two steps on.
    auto multiply_step = [&](int stage, int step, RawScales &scales, bool fresh) {
        const uint32_t from = memory_at + stage * S::STAGE;
        uint4 words[2][UNITS];
        if constexpr (FORM != BF16_ROWS && !GGUF) {
            const uint4 *own_codes = reinterpret_cast<const uint4 *>(memory + stage * S::STAGE + codes_at) + lane;
#pragma unroll
            for (int j = 0; j < 2; j++) {
#pragma unroll
                for (int u = 0; u < UNITS; u++) words[j][u] = own_codes[32 * (j * UNITS + u)];
                if (!FP4 && fresh) of[j] = row_scales<FORM>(scales, 0, j, m.bf16_scales);
            }
        }
        GgufScales<GGUF ? GGUF_BITS<FORM> : 4> own;  // of the row whose words this lane has loaded
        uint2 upper[2] = {};
        if constexpr (GGUF) {
            own = gguf_scales<GGUF_BITS<FORM>>(scales.scale[0], scales.zero[0], m.minima);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const unsigned char *tile = memory + stage * S::STAGE + codes_at + j * TILE_BYTES<FORM>;
#pragma unroll
                for (int u = 0; u < UNITS; u++) words[j][u] = reinterpret_cast<const uint4 *>(tile)[32 * u + lane];
                if (FORM == K6_TILES) upper[j] = reinterpret_cast<const uint2 *>(tile + 512)[lane];
            }
        }
#pragma unroll
        for (int s = 0; s < 4; s++) {
            if (FORM == INT4_TILES && s == 2 && m.halves) {
                fold();
#pragma unroll
                for (int j = 0; j < 2; j++) of[j] = row_scales<FORM>(scales, 1, j, m.bf16_scales);
            }
            uint32_t a[2][4];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if constexpr (FORM == BF16_ROWS) {
                    load_matrices(a[j], from + weight_frag + j * TILE_BYTES<FORM> +
                                            (((2 * s + lane / 16) ^ swizzle) << 4));
                } else if constexpr (FP4) {
                    const uint32_t(&pair)[2] = j == 0 ? scales.scale : scales.zero;
                    fp4_fragment(words[j][0], make_uint2(pair[0], pair[1]), s, a[j]);
                } else if constexpr (GGUF) {
                    constexpr int BITS = GGUF_BITS<FORM>;
                    uint32_t of_step[2];
                    gguf_words<BITS>(words[j], upper[j], s, of_step);
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        const int from_lane = 16 * j + 8 * r + lane / 4;
                        const float scale = __shfl_sync(ALL_LANES, own.scale[BITS == 6 ? s : s / 2], from_lane);
                        const float min = BITS == 8 ? 0.0f : __shfl_sync(ALL_LANES, own.min[s / 2], from_lane);
                        uint32_t codes[2];
                        gguf_codes<BITS>(of_step, s, r, gguf_bias(m.minima), codes);
                        a[j][r] = gguf_times(codes[0], scale, min), a[j][r + 2] = gguf_times(codes[1], scale, min);
                    }
                } else {
                    fragment<FORM>(words[j], s, of[j].bias, a[j]);
                }
            }
            const uint32_t tokens = from + token_frag + (((2 * s + lane / 8 % 2) ^ swizzle) << 4);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (half == 1 && !more) break;
#pragma unroll
                for (int i = half * EIGHTS / 2; i < (half + 1) * EIGHTS / 2; i += 2) {
                    uint32_t b[4];
                    load_matrices(b, tokens + i * 8 * S::ROW_BYTES);
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        mma(acc[j][i], a[j], b);
                        mma(acc[j][i + 1], a[j], b + 2);
                    }
                }
            }
        }
        if constexpr (FORM != BF16_ROWS) {
            if ((!FP4 && !GGUF && m.shift == 0) || (step & 1) != 0 || step + 1 == share) fold();
            if (fresh && step + 2 < share) load_side(scales, first + step + 2);
        }
    };
    int stage = 0;
#pragma unroll 1
    for (int base = 0; base < steps; base += 2) {
#pragma unroll
        for (int s = 0; s < 2; s++) {
            const int step = base + s;
            if (step >= steps) break;
            copy_wait<S::STAGES - 2>();
            __syncthreads();  // this step's stage is there, and the stage before it is free
            const int fill = stage == 0 ? S::STAGES - 1 : stage - 1;
            load_weights(fill, step + S::STAGES - 1);
            load_tokens(fill, step + S::STAGES - 1);
            copy_commit();
            if (step < share) multiply_step(stage, step, raw[s], s == 0 || FP4 || m.shift == 0);
            stage = stage == S::STAGES - 1 ? 0 : stage + 1;
        }
    }
    if constexpr (FP4) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float whole = whole_of(m, row_tile + j * apart);
#pragma unroll
            for (int i = 0; i < EIGHTS; i++) {
#pragma unroll
                for (int e = 0; e < 4; e++) sums[j][i][e] *= whole;
            }
        }
    }
    __syncthreads();  // the stages have been read

    float *const out = reinterpret_cast<float *>(memory) + warp % ROW_WARPS * 32 + lane / 4;
    auto each = [&](auto call) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int i = 0; i < EIGHTS; i++) {
                if (i >= EIGHTS / 2 && !more) break;
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float &to = out[(8 * i + lane % 4 * 2 + e % 2) * S::PITCH + TILE_ROWS * j + e / 2 * 8];
                    call(to, FORM == BF16_ROWS ? acc[j][i][e] : sums[j][i][e]);
                }
            }
        }
    };
    if (part == 1) each([](float &to, float sum) { to = sum; });
    __syncthreads();
    if (part == 0) each([](float &to, float sum) { to = sum + to; });
    __syncthreads();
    return reinterpret_cast<const float *>(memory);
}
