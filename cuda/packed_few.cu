// Products of up to 16 rows with packed weights, at the speed of the memory. Own code.
#include <type_traits>

#include "packed.cuh"

namespace {

constexpr int FEW = 16;
constexpr int WARPS = 8;             // that share a row tile: a team
constexpr int X_PITCH = UNIT_K + 8;  // of a row's elements of a unit: a matrix load hits all banks
constexpr int SUM_PITCH = 20;        // of the 16 sums of a row: a warp's stores hit all banks
// Bytes of its weights that a team asks into L2 beside those under way. APART: where the next kernel's blocks are on the
// same multiprocessor they ask too, and more of it only delays the kernel that still runs.
template <bool APART>
constexpr int L2_AHEAD = APART ? 8 << 10 : 32 << 10;

// Units under way of a warp, in registers. SMALL: a third of a multiprocessor's registers is for two warps of four.
template <int OF, int STEPS, bool SMALL>
constexpr int DEPTH = IS_GGUF<OF> ? (SMALL ? 2 : 4)
                      : OF == FP8_CODES || STEPS == 2 ? 2 : !SMALL ? 4 : STEPS == 8 ? 3 : 2;

// Whether sums of x are needed; of codes of 6 bits, where there are minima.
template <int OF>
constexpr bool HAS_SUMS = OF == INT4_CODES || OF == K4_CODES || OF == K6_CODES;

// Rows of bf16 behind those of the packed matrix, and the blocks that have them: the first of the grid.
struct Tail {
    const bf16 *w;
    int rows, blocks;
};

__device__ __forceinline__ float2 load_pair(uint32_t from) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(from));
    return v;
}

// Of GGUF's codes: what is taken off for the sums of x of a unit.
template <int N>
__device__ __forceinline__ void take_minima(uint32_t sums_at, const float (&zero)[4][2], float (&acc)[N][4]) {
#pragma unroll
    for (int group = 0; group < 4; group++) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float2 add = load_pair(sums_at + (group * 8 * N + 8 * i) * 4);
#pragma unroll
            for (int e = 0; e < 4; e++)
                acc[i][e] = fmaf(-zero[group][e / 2], e % 2 == 0 ? add.x : add.y, acc[i][e]);
        }
    }
}

// Among the warps of a team.
template <int TEAMS>
__device__ __forceinline__ void team_barrier(int team) {
    if (TEAMS == 1) {
        __syncthreads();
    } else {
        asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(32 * WARPS) : "memory");
    }
}

// A team has the row tiles b, b + number of teams, ...; its warps split k: warp i takes the units i, i + WARPS, ... in
// this order, and the sums of the warps are added in their order, whatever n is. Units come straight to registers, the
// first of them before the inputs are there; x lies in shared memory, each warp's part of it apart: `slab` units at a
// time. Where one slab is not all of k, TILES row tiles share it; where x takes much of the shared memory, TEAMS share
// it. BOTH: x has rows past the first 8. Codes are multiplied as 16 + code, and (16 + zero point) times the group's sum
// of x, which is in shared memory too, is taken off the group's sum. Of GGUF's codes the minimum is taken off so, and
// a slab that is all of k is loaded once.
template <int OF, int STEPS, bool BOTH, int TILES, int TEAMS>
__global__ void __launch_bounds__(32 * WARPS * TEAMS, TEAMS > 1 || TILES > 1 ? 1 : STEPS <= 2 ? 2 : 3)
    packed_kernel(int n, q35_packed w, Tail tail, int slab, const bf16 *x, void *out, int wide, int stride) {
    constexpr bool APART = TILES * TEAMS == 1;  // beside blocks of the next kernel, which come when x is here, not before
    using S = Source<OF, STEPS, WARPS>;
    using Scales = std::conditional_t<IS_GGUF<OF>, GgufUnitScales<OF>, UnitScales<OF, STEPS>>;
    constexpr bool INT4 = OF == INT4_CODES, FP4 = OF == FP4_CODES, GGUF = IS_GGUF<OF>;
    constexpr int N = BOTH ? 2 : 1, D = DEPTH<OF, STEPS, APART>, TEAM = 32 * WARPS;
    constexpr int SUM_STEPS = GGUF ? 2 : STEPS, SUM_GROUPS = HAS_SUMS<OF> ? 8 / SUM_STEPS : 0;
    constexpr int X_SUMS = SUM_GROUPS * 8 * N;  // of a unit
    static_assert(TILES == 1 || TEAMS == 1, "a slab is one team's");
    const bool minima = w.kind != q35_q6_k;
    extern __shared__ __align__(16) unsigned char memory[];
    const int team = TEAMS == 1 ? 0 : threadIdx.x / TEAM, thread = threadIdx.x % TEAM;
    const int warp = thread / 32, lane = thread % 32, g = lane / 4, t4 = lane % 4;
    const int num_units = ceil_div(w.k, UNIT_K), units = warp < num_units ? ceil_div(num_units - warp, WARPS) : 0;
    bf16 *x_kept = reinterpret_cast<bf16 *>(memory) + warp * slab * n * X_PITCH;
    float *all_sums = reinterpret_cast<float *>(reinterpret_cast<bf16 *>(memory) + WARPS * slab * n * X_PITCH);
    float *x_sums = all_sums + warp * slab * X_SUMS;  // [unit][group][8 N]
    // [BOTH ? 1 : 2][WARPS][n][SUM_PITCH]
    float *sums = all_sums + WARPS * slab * X_SUMS + team * (BOTH ? 1 : 2) * WARPS * n * SUM_PITCH;
    const unsigned inverse = 0xffffffffu / n + 1;  // item / n for n > 1 and fewer than 2^28 items
    // Of the fragments of x; rows past the last are the last one again, and are not written.
    uint32_t x_address[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        x_address[i] = shared_address(x_kept + min(8 * i + lane % 8, n - 1) * X_PITCH + lane / 8 * 8);
    }

    // Of a warp's part of x a slab, from its unit `from` on, and its sums; zeros past the end of k.
    auto keep_x = [&](int from) {
        constexpr int AT_ONCE = BOTH ? 8 : 4, PIECES = UNIT_K / 8;
        const int mine = (min(slab, units - from) + TEAMS - 1 - team) / TEAMS, count = mine * n * PIECES;
        __syncwarp();  // nobody reads the slab before it
        for (int first = lane; first < count; first += 32 * AT_ONCE) {
            uint4 words[AT_ONCE];
            int to[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int item = first + 32 * i, line = item / PIECES, c = n == 1 ? line : __umulhi(line, inverse);
                const int row = line - c * n, unit = c * TEAMS + team;
                const int k = ((from + unit) * WARPS + warp) * UNIT_K + item % PIECES * 8;
                to[i] = (unit * n + row) * X_PITCH + item % PIECES * 8;
                words[i] = make_uint4(0, 0, 0, 0);
                if (item < count && k < w.k) {
                    words[i] = __ldcg(reinterpret_cast<const uint4 *>(x + (int64_t(row) * w.k + k)));
                }
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                if (first + 32 * i < count) *reinterpret_cast<uint4 *>(x_kept + to[i]) = words[i];
            }
        }
        if (HAS_SUMS<OF> && (INT4 || minima)) {
            __syncwarp();
#pragma unroll 1
            for (int unit = team; unit < mine * TEAMS; unit += TEAMS) {
                uint32_t at[N];
#pragma unroll
                for (int i = 0; i < N; i++) at[i] = x_address[i] + unit * n * X_PITCH * 2;
                UnitSums<SUM_STEPS, N> of;
                multiply_unit<SUM_STEPS, N>(at, of, [](uint32_t (&a)[4], int, int) {
                    a[0] = a[1] = a[2] = a[3] = 0x3f803f80u;  // ones
                });
#pragma unroll
                for (int group = 0; group < SUM_GROUPS; group++) {
#pragma unroll
                    for (int i = 0; i < N; i++) {
                        float *to = x_sums + unit * X_SUMS + group * 8 * N + 8 * i + 2 * lane;
                        const float2 pair = make_float2(of.of(group, i, 0), of.of(group, i, 1));
                        if (lane < 4) *reinterpret_cast<float2 *>(to) = pair;
                    }
                }
            }
        }
        if (TEAMS == 1) {
            __syncwarp();
        } else {
            __syncthreads();
        }
    };

    int parity = 0;
    // Adds the warps' sums of a row tile, whose first row is `row0` of out, and writes the first `rows` of it.
    auto finish = [&](const float (&acc)[N][4], int row0, int rows) {
        // Two halves in turn, or one, which is used again when all have read it.
        if (BOTH) team_barrier<TEAMS>(team);
        float *all = sums + parity * WARPS * n * SUM_PITCH;
#pragma unroll
        for (int i = 0; i < N; i++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int row = 8 * i + t4 * 2 + e % 2;
                if (row < n) all[(warp * n + row) * SUM_PITCH + g + e / 2 * 8] = acc[i][e];
            }
        }
        team_barrier<TEAMS>(team);
        if (!BOTH) parity ^= 1;
        const int column = thread % PACKED_ROWS, row = thread / PACKED_ROWS;
        if (row >= n || column >= rows) return;
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; i++) total += all[(i * n + row) * SUM_PITCH + column];
        const int64_t to = int64_t(row) * stride + row0 + column;
        if (wide) {
            static_cast<float *>(out)[to] = total;
        } else {
            static_cast<bf16 *>(out)[to] = __float2bfloat16_rn(total);
        }
    };

    if (int(blockIdx.x) < tail.blocks) {
        // Which element of k stands in which place of the tensor cores' tile does not matter while w and x agree: a
        // lane takes 8 neighbours of each 32.
        const int row0 = (blockIdx.x * TEAMS + team) * PACKED_ROWS;
        const bf16 *rows[2];  // past the last, the last one again
#pragma unroll
        for (int r = 0; r < 2; r++) rows[r] = tail.w + int64_t(min(row0 + g + 8 * r, tail.rows - 1)) * w.k + 8 * t4;
        uint4 a[2][4];
        auto load = [&](int unit) {
#pragma unroll
            for (int h = 0; h < 4; h++) {
                const int k = (unit * WARPS + warp) * UNIT_K + 32 * h;
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    a[r][h] = make_uint4(0, 0, 0, 0);
                    if (k < w.k) a[r][h] = stream16_in_order(rows[r] + k);
                }
            }
        };
        load(0);
        if (!APART) let_next_start();
        wait_for_inputs();
        if (TILES == 1) keep_x(0);
        if (APART) let_next_start();
        float acc[N][4] = {};
#pragma unroll 1
        for (int unit = 0, kept = 0; unit < units; unit++, kept++) {
            if (TILES > 1 && unit % slab == 0) {
                keep_x(unit);
                kept = 0;
            }
#pragma unroll
            for (int h = 0; h < 4; h++) {
#pragma unroll
                for (int i = 0; i < N; i++) {
                    const bf16 *from = x_kept + (kept * n + min(8 * i + g, n - 1)) * X_PITCH + 32 * h + 8 * t4;
                    const uint4 lo = a[0][h], hi = a[1][h], b = *reinterpret_cast<const uint4 *>(from);
                    mma(acc[i], lo.x, hi.x, lo.y, hi.y, b.x, b.y);
                    mma(acc[i], lo.z, hi.z, lo.w, hi.w, b.z, b.w);
                }
            }
            load(unit + 1);
        }
        finish(acc, w.rows + row0, tail.rows - row0);
        return;
    }

    const S source(w, warp, lane);
    constexpr int AHEAD = D / TILES;  // units
    const int num_tiles = w.rows / PACKED_ROWS, step = (gridDim.x - tail.blocks) * TEAMS;
    const int first_tile = (blockIdx.x - tail.blocks) * TEAMS + team;
    const int items = units * TILES;  // a warp's units of as many row tiles, those of one place in k together
    Cursor next[TILES];
    Unit<OF> held[D] = {};
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        next[t] = source.start;
        source.move_tiles(next[t], first_tile + t * step);
    }
    // Of fp4, which counts them a row tile ahead: the f32 scales.
    const float *const wholes = reinterpret_cast<const float *>(
        static_cast<const unsigned char *>(w.scales) + int64_t(num_tiles) * w.k);
    float whole[TILES] = {};
    auto load_wholes = [&](int tile) {
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            if (tile + t * step < num_tiles) whole[t] = __ldg(wholes + tile + t * step);
        }
    };
    if (FP4) load_wholes(first_tile);
#pragma unroll
    for (int s = 0; s < D; s++) {
        const int t = s % TILES, unit = s / TILES;
        if (s < items && first_tile + t * step < num_tiles) source.load(held[s], next[t], unit, unit);
    }
    if (lane < L2_AHEAD<APART> / WARPS / (2 * S::TILE) && units > 0) {
        const int i = min(units, AHEAD) + lane, ahead = i / units * step, unit = i % units;
        if (first_tile + ahead < num_tiles) {
            Cursor at = next[0];
            source.move_tiles(at, ahead);
            source.move_units(at, unit);
            ask_for(at.codes - 16 * lane, unit == source.short_unit ? S::TILE : 2 * S::TILE);
        }
    }
    if (!APART) let_next_start();
    wait_for_inputs();
    if (TILES == 1) keep_x(0);
    if (APART) let_next_start();

    const Picks picks(lane, w.kind);
    const uint32_t bias = gguf_bias(minima);
    const uint32_t x_unit = n * X_PITCH * 2;
    const uint32_t x_sums_at = shared_address(x_sums + 2 * t4);
#pragma unroll 1
    for (int tile = first_tile; tile < num_tiles; tile += TILES * step) {
        Cursor now[TILES];  // AHEAD units on
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            now[t] = next[t];
            source.move_units(now[t], AHEAD);
            source.move_tiles(next[t], TILES * step);
        }
        float acc[TILES][N][4] = {}, rest[TILES];
        if (FP4) {
#pragma unroll
            for (int t = 0; t < TILES; t++) rest[t] = whole[t] * FP4_REST;
            load_wholes(tile + TILES * step);
        }
        uint32_t x_at[N], sums_at = x_sums_at;
#pragma unroll
        for (int i = 0; i < N; i++) x_at[i] = x_address[i];
#pragma unroll 1
        for (int first = 0; first < units; first += AHEAD) {
            if (TILES > 1 && first % slab == 0 && (!GGUF || slab < units || tile == first_tile)) {
                keep_x(first);
                sums_at = x_sums_at;
#pragma unroll
                for (int i = 0; i < N; i++) x_at[i] = x_address[i];
            }
#pragma unroll
            for (int s = 0; s < D; s++) {
                const int t = s % TILES, unit = first + s / TILES;
                if (unit < units && tile + t * step < num_tiles) {
                    const Scales scales(held[s], lane, picks, GGUF ? minima : w.zeros != nullptr);
                    UnitSums<STEPS, N> of;
                    multiply_unit<STEPS, N>(x_at, of, [&](uint32_t (&a)[4], int half, int j) {
                        if constexpr (FP4) {
                            fp4_fragment(held[s].codes[half], held[s].scales[half], j, a);
                        } else if constexpr (OF == K6_CODES || OF == INT8_CODES) {
                            uint2 upper = {};
                            if constexpr (OF == K6_CODES) upper = held[s].upper[half];
                            uint32_t words[2];
                            gguf_words<GGUF_BITS<OF>>(held[s].codes + S::TILE / 512 * half, upper, j, words);
                            gguf_fragment<GGUF_BITS<OF>>(words, j, bias, a);
                        } else {
                            fragment<OF == FP8_CODES>(a, held[s].codes + S::TILE / 512 * half, j);
                        }
                    });
                    // What comes next in its place: AHEAD units on, or one of the first of the next row tile.
                    const bool here = unit + AHEAD < units;
                    if (here || tile + (TILES + t) * step < num_tiles) {
                        const Cursor from = here ? now[t] : next[t];
                        source.load(held[s], from, s / TILES, here ? unit + AHEAD : s / TILES);
                    }
#pragma unroll
                    for (int group = 0; group < S::GROUPS; group++) {
#pragma unroll
                        for (int i = 0; i < N; i++) {
                            float2 add = make_float2(0.0f, 0.0f);
                            if (INT4) add = load_pair(sums_at + (group * 8 * N + 8 * i) * 4);
#pragma unroll
                            for (int e = 0; e < 4; e++) {
                                float sum = of.of(group, i, e);
                                if constexpr (FP4) {
                                    acc[t][i][e] += sum;
                                } else if constexpr (GGUF) {
                                    acc[t][i][e] = fmaf(scales.scale[group][e / 2], sum, acc[t][i][e]);
                                } else {
                                    if (INT4) sum = fmaf(-scales.zero[group][e / 2], e % 2 == 0 ? add.x : add.y, sum);
                                    acc[t][i][e] = fmaf(scales.scale[group][e / 2], sum, acc[t][i][e]);
                                }
                            }
                        }
                    }
                    if constexpr (GGUF && HAS_SUMS<OF>) {
                        if (minima) take_minima<N>(sums_at, scales.zero, acc[t]);
                    }
                }
                if (t + 1 < TILES) continue;
                sums_at += X_SUMS * 4;
#pragma unroll
                for (int i = 0; i < N; i++) x_at[i] += x_unit;
            }
#pragma unroll
            for (int t = 0; t < TILES; t++) source.move_units(now[t], AHEAD);
        }
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            if (t > 0 && tile + t * step >= num_tiles) break;
            if (FP4) {
#pragma unroll
                for (int i = 0; i < N; i++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) acc[t][i][e] *= rest[t];
                }
            }
            finish(acc[t], (tile + t * step) * PACKED_ROWS, PACKED_ROWS);
        }
    }
}

// -------------------------------------------------------------------------------------------------------- launchers

// What is chosen here changes the speed, and no sum.
template <int OF, int STEPS>
cudaError_t few_rows(cudaStream_t stream, int n, const q35_packed &w, const bf16 *tail, int tail_rows, const bf16 *x,
                     void *out, int wide, int stride) {
    const Card card = this_card();
    if (card.count == 0) return cudaErrorInvalidDevice;
    const int team_bytes = (n > 8 ? 1 : 2) * WARPS * n * SUM_PITCH * int(sizeof(float));
    constexpr int GROUPS = IS_GGUF<OF> ? 4 : 8 / STEPS;  // of a unit's sums of x
    const int x_sums = HAS_SUMS<OF> ? GROUPS * (n > 8 ? 16 : 8) * int(sizeof(float)) : 0;
    const int unit_bytes = WARPS * (n * X_PITCH * int(sizeof(bf16)) + x_sums);  // of x, a unit of every warp
    const int units = ceil_div(ceil_div(w.k, UNIT_K), WARPS), all = units * unit_bytes;
    // Two teams a multiprocessor: two blocks where three fit, so that there is room for the next kernel's blocks, which
    // load meanwhile, or one. The driver keeps 1 KB of each block.
    const bool apart = n <= 8 && 3 * (all + team_bytes + 1024) <= card.shared + 1024;
    // Of GGUF's codes there is no kernel of two teams.
    const bool in_slabs = !apart && (IS_GGUF<OF> || all + 2 * team_bytes > card.shared);
    const int teams = apart || in_slabs ? 1 : 2;
    int slab = units;
    if (in_slabs) {
        constexpr int STEP = DEPTH<OF, STEPS, false> / 2;
        const int room = (card.shared - team_bytes) / unit_bytes / STEP * STEP;
        slab = room < units ? room : ceil_div(units, STEP) * STEP;
        if (slab < 1) return cudaErrorInvalidValue;
    }
    const int shared = slab * unit_bytes + teams * team_bytes;
    const int tail_blocks = ceil_div(ceil_div(tail_rows, PACKED_ROWS), teams);
    const int most = (apart ? 2 : 1) * card.count, half = ceil_div(most, 2);
    const int left = most - tail_blocks > half ? most - tail_blocks : half;
    const int tiles = w.rows / PACKED_ROWS, rounds = ceil_div(tiles, left * teams);
    int blocks = ceil_div(ceil_div(tiles, rounds), teams);  // with as many row tiles each
    // Apart, so few settle on fewer multiprocessors still: every block that has room.
    if (apart) blocks = tiles < left ? tiles : left;
    blocks += tail_blocks;
    // Of a multiprocessor's memory; the rest is L1, which holds what is under way to registers. A quarter leaves room
    // for the next kernel's blocks.
    const int least = (apart ? 3 : 1) * (shared + 1024) * 100 / (card.shared + 1024) + 1;
    const int percent = least < 25 ? 25 : least > 100 ? 100 : least;
    const auto run = [&](auto kernel) {
        cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, card.shared);
        if (status != cudaSuccess) return status;
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, percent);
        if (status != cudaSuccess) return status;
        return launch(kernel, blocks, 32 * WARPS * teams, size_t(shared), stream, n, w,
                      Tail{tail, tail_rows, tail_blocks}, slab, x, out, wide, stride);
    };
    if (apart) return run(packed_kernel<OF, STEPS, false, 1, 1>);
    if (in_slabs) {
        return n <= 8 ? run(packed_kernel<OF, STEPS, false, 2, 1>) : run(packed_kernel<OF, STEPS, true, 2, 1>);
    }
    if constexpr (!IS_GGUF<OF>) {
        return n <= 8 ? run(packed_kernel<OF, STEPS, false, 1, 2>) : run(packed_kernel<OF, STEPS, true, 1, 2>);
    }
    return cudaErrorNotSupported;
}

bool is_fp8(const q35_packed &w) { return w.kind == q35_fp8_block || w.kind == q35_fp8_row; }
bool has_groups_of_128(const q35_packed &w) { return w.group >= w.k || w.group == 128; }

bool is_taken(const q35_packed &w, const void *x) {
    if (w.rows % PACKED_ROWS != 0 || w.k % 64 != 0 || w.k <= 0 || !aligned(w.codes) || !aligned(w.scales) ||
        !aligned(w.zeros) || !aligned(x)) {
        return false;
    }
    if (is_fp8(w) || w.kind == q35_fp4) return true;
    if (w.kind >= q35_q4_k && w.kind <= q35_q8_0) return w.k % UNIT_K == 0;
    if (w.kind != q35_int4_f16 && w.kind != q35_int4_bf16) return false;
    return has_groups_of_128(w) || w.group == 64 || w.group == 32;
}

cudaError_t few_rows_of(cudaStream_t stream, int n, const q35_packed &w, const bf16 *tail, int tail_rows, const bf16 *x,
                        void *out, int wide, int stride) {
    const auto run = [&](auto few) { return few(stream, n, w, tail, tail_rows, x, out, wide, stride); };
    if (is_fp8(w)) return run(few_rows<FP8_CODES, 8>);
    if (w.kind == q35_fp4) return run(few_rows<FP4_CODES, 8>);
    if (w.kind == q35_q4_k) return run(few_rows<K4_CODES, 2>);
    if (w.kind == q35_q8_0) return run(few_rows<INT8_CODES, 2>);
    if (w.kind == q35_q5_k || w.kind == q35_q6_k) return run(few_rows<K6_CODES, 1>);
    if (has_groups_of_128(w)) return run(few_rows<INT4_CODES, 8>);
    return w.group == 64 ? run(few_rows<INT4_CODES, 4>) : run(few_rows<INT4_CODES, 2>);
}

}  // namespace

extern "C" int q35_fp8_token_linear(void *on, int n, q35_packed w, const q35_bf16 *x, void *memory, void *out,
                                    int wide, int stride) {
    if (n < 0) return cudaErrorInvalidValue;
    if (n == 0 || w.rows == 0) return cudaSuccess;
    const cudaStream_t stream = as_stream(on);
    if (w.kind == 0) {
        const q35_bf16 *codes = static_cast<const q35_bf16 *>(w.codes);
        return wide ? q35_linear_f32(stream, n, w.k, w.rows, x, codes, static_cast<float *>(out), stride)
                    : q35_linear(stream, n, w.k, w.rows, x, codes, static_cast<q35_bf16 *>(out), stride);
    }
    if (stride < w.rows || !is_taken(w, x)) return cudaErrorInvalidValue;
    if (n > FEW) return launch_packed_many(stream, n, w, as_bf16(x), out, wide != 0, stride, memory);
    return few_rows_of(stream, n, w, nullptr, 0, as_bf16(x), out, wide, stride);
}

extern "C" int q35_packed_linear(void *on, int n, q35_packed w, const q35_bf16 *x, void *out, int wide,
                                 int stride) {
    return q35_fp8_token_linear(on, n, w, x, nullptr, out, wide, stride);
}

extern "C" int q35_packed_linear_tail(void *on, int n, q35_packed w, const q35_bf16 *tail, int tail_rows,
                                      const q35_bf16 *x, void *out, int wide, int stride) {
    if (n < 0 || n > FEW || w.rows <= 0 || tail_rows <= 0 || stride < w.rows + tail_rows || !aligned(tail) ||
        !is_taken(w, x)) {
        return cudaErrorInvalidValue;
    }
    if (n == 0) return cudaSuccess;
    return few_rows_of(as_stream(on), n, w, as_bf16(tail), tail_rows, as_bf16(x), out, wide, stride);
}
