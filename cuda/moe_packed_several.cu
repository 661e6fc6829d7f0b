// The experts of 2 to 16 tokens in int4, on cards whose copy engine fills shared memory (compute capability 9.0 and
// later; run on 9.0): what packed_up and packed_down of moe_packed.cu do, with the same sums in the same order. Own code.
//
// An expert that is hit has one or two tokens, so the time is that of its codes. Pairs of row tiles go round all warps
// of the card, so that neighbours in memory are read together and no multiprocessor is ahead of the others, and each
// warp has a ring of its own that its first lane keeps full of copies: none waits for another. What a row tile of `down`
// adds to an assignment goes to memory, and a second kernel takes the weighted sums.
#include "moe_packed_token.cuh"

namespace {

// A row tile of gate and the one of up; or neighbours of `down`.
enum Matrix { GATE_UP, DOWN };
// Partial sums of an element: k tile t adds to number t mod PARTIALS, as the warps of packed_up have them.
template <Matrix OF>
constexpr int PARTIALS = OF == GATE_UP ? 8 : 1;
// Of a block. With more warps of `down` the tokens that are loaded ahead are no longer in registers; of gate and up those
// are full of partial sums.
template <Matrix OF>
constexpr int WARPS = OF == GATE_UP ? 4 : 6;
constexpr int BLOCKS = 2;  // on a multiprocessor
constexpr int PAIR = 2;
constexpr int GROUP = 2, PART = 2 * GROUP;  // k tiles with one scale; those of a pair that are copied together
constexpr int CODES = PART * TILE_BYTES<INT4_TILES>, SCALES = PART / GROUP * TILE_ROWS * 2;  // of a row tile
constexpr int PART_BYTES = PAIR * (CODES + SCALES);
constexpr int ALL_PLACES = 24;  // of such parts in a block
template <Matrix OF>
constexpr int PLACES = ALL_PLACES / WARPS<OF>;  // in a warp's ring
constexpr int RINGS = ALL_PLACES * PART_BYTES;

// So few that the registers `several` leaves are enough for a block to be there before it has ended.
constexpr int SUM_THREADS = 64, SUM_COLUMNS = 4 * SUM_THREADS;
constexpr int MOST_TERMS = 33;  // of a sum

// Of an expert hit or the shared one: its codes, the distance of the row tiles of a pair, in k tiles; its tokens, as rows
// of x (of gate and up as a mask), and where what becomes of them goes.
struct Pair {
    const uint8_t *codes, *scales;
    const bf16 *x;
    void *y;
    int k_tiles, apart, num_tokens, width;
    uint32_t mask, bf16_scales;
};

// acc += the k tiles of group `group` of a part of a pair, times eight tokens; the first adds to number `first`.
template <int COUNT>
__device__ __forceinline__ void add_group(float (&acc)[COUNT][PAIR][4], int first, const uint32_t (&b)[GROUP][8],
                                          const uint8_t *codes, int group, uint32_t bf16_scales) {
    const uint32_t ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
    const int lane = threadIdx.x % 32;
    const uint8_t *const scales = codes + PAIR * CODES + group * TILE_ROWS * 2 + lane / 4 * 2;
    float scale[PAIR][2];
#pragma unroll
    for (int i = 0; i < PAIR; i++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const uint32_t raw = *reinterpret_cast<const uint16_t *>(scales + i * SCALES + 16 * r);
            const float of_f16 = __half2float(__ushort_as_half(static_cast<unsigned short>(raw)));
            scale[i][r] = __uint_as_float((raw << 16 & bf16_scales) | (__float_as_uint(of_f16) & ~bf16_scales));
        }
    }
#pragma unroll
    for (int t = 0; t < GROUP; t++) {
        float x_sums[4] = {};
#pragma unroll
        for (int j = 0; j < 4; j++) mma(x_sums, ones, b[t] + 2 * j);
#pragma unroll
        for (int i = 0; i < PAIR; i++) {
            float(&to)[4] = acc[(first + t) % COUNT][i];
            const uint4 own = *reinterpret_cast<const uint4 *>(
                codes + i * CODES + (group * GROUP + t) * TILE_BYTES<INT4_TILES> + 16 * lane);
            float c[4] = {};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t a[4];
                int4_fragment(j == 0 ? own.x : j == 1 ? own.y : j == 2 ? own.z : own.w, a);
                mma(c, a, b[t] + 2 * j);
            }
            // 16 that int4_fragment adds, and the zero point.
#pragma unroll
            for (int e = 0; e < 4; e++) to[e] = fmaf(scale[i][e / 2], fmaf(-24.0f, x_sums[e], c[e]), to[e]);
        }
    }
}

// A lane's part of eight tokens at the k tiles of a group.
__device__ __forceinline__ void load_group(uint32_t (&b)[GROUP][8], const uint4 *x) {
#pragma unroll
    for (int t = 0; t < GROUP; t++) {
        const uint4 lo = x[t * TILE_K / 8], hi = x[t * TILE_K / 8 + 1];
        b[t][0] = lo.x, b[t][1] = lo.y, b[t][2] = lo.z, b[t][3] = lo.w;
        b[t][4] = hi.x, b[t][5] = hi.y, b[t][6] = hi.z, b[t][7] = hi.w;
    }
}

// Tokens are taken by eights. The shared expert's are shared out like experts; of an expert hit, which hardly ever has
// more than one, they follow each other, and codes are copied again. x and norm: of gate and up.
template <Matrix OF>
__global__ void __launch_bounds__(32 * WARPS<OF>, BLOCKS)
    several(Plan p, Packed experts, Packed shared, const bf16 *x_rows, Norm norm) {
    if constexpr (HERE) {
        constexpr int OWN_WARPS = WARPS<OF>, OWN_PLACES = PLACES<OF>, COUNT = PARTIALS<OF>;
        constexpr int PARTS = COUNT > PART ? COUNT / PART : 1;  // that use other partial sums
        extern __shared__ __align__(128) uint8_t memory[];      // rings, the list of hits
        __shared__ __align__(8) uint64_t barriers[OWN_WARPS][OWN_PLACES];
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
        const uint8_t *const ring = memory + warp * OWN_PLACES * PART_BYTES;
        const uint32_t ring_at = shared_address(ring), full = shared_address(barriers[warp]);
        int4 *const hits = reinterpret_cast<int4 *>(memory + RINGS);
        if (lane == 0) {
            for (int i = 0; i < OWN_PLACES; i++) barrier_init(full + 8 * i, 1);
            barriers_are_there();
        }
        if (OF == GATE_UP) {
            wait_for_inputs();
            let_next_start();  // not before: `down` reads what the kernels before this one wrote
        }
        for (int i = threadIdx.x; i < p.slots; i += 32 * OWN_WARPS) hits[i] = __ldcg(p.hits + i);
        const int num_hit = __ldcg(p.num_hit);
        __syncthreads();

        // A step of a warp's way: eight tokens from `token` on, of pair `number`. The last round of pairs, where some
        // warps have none, is dealt out to the blocks in turn.
        struct Step {
            int round, number, token;
        };
        const int rows = OF == GATE_UP ? TILE_ROWS : PAIR * TILE_ROWS;  // of `experts` and `shared`, that a pair makes
        const int own_pairs = (OF == GATE_UP ? p.width : p.hidden) / rows;
        const int shared_pairs = (OF == GATE_UP ? p.shared_width : p.hidden) / rows;
        const int of_hits = num_hit * own_pairs, workers = int(gridDim.x) * OWN_WARPS;
        const int pairs = of_hits + p.has_shared * ceil_div(p.n, 8) * shared_pairs;
        auto number_in = [&](int round) {
            const int own = (round + 1) * workers <= pairs ? int(blockIdx.x) * OWN_WARPS + warp
                                                           : warp * int(gridDim.x) + int(blockIdx.x);
            return round * workers + own;
        };
        auto move = [&](Step &step, const Pair &pair) {
            step.token += 8;
            if (step.token >= pair.num_tokens) step.token = 0, step.number = number_in(++step.round);
        };
        auto pair_of = [&](int number) {
            const bool of_shared = number >= of_hits;
            const int in = of_shared ? number - of_hits : number, each = of_shared ? shared_pairs : own_pairs;
            const int item = in / each, pair_in = in - item * each;
            const int before = of_shared ? 8 * item : 0, num_shared = min(p.n - before, 8);
            const int4 hit = of_shared ? make_int4(0, int(all_tokens(num_shared) << before), before, 0) : hits[item];
            Pair pair;
            pair.k_tiles = of_shared ? shared.k_tiles : experts.k_tiles;
            pair.apart = (OF == GATE_UP ? each : 1) * pair.k_tiles;
            pair.num_tokens = __popc(hit.y), pair.mask = hit.y;
            const int row_tile = (OF == GATE_UP ? 1 : PAIR) * pair_in;
            const int64_t tiles = (int64_t(hit.x) * PAIR * each + row_tile) * pair.k_tiles;
            pair.codes = (of_shared ? shared.codes : experts.codes) + tiles * TILE_BYTES<INT4_TILES>;
            const void *const scales = of_shared ? shared.scales : experts.scales;
            pair.scales = static_cast<const uint8_t *>(scales) + tiles * (SCALES / PART);
            pair.bf16_scales = of_shared ? shared.bf16_scales : experts.bf16_scales;
            if (OF == GATE_UP) {
                pair.x = x_rows, pair.width = of_shared ? p.shared_width : p.width;
                bf16 *const act = of_shared ? p.shared_act : p.act;
                pair.y = act + (int64_t(hit.z) * pair.width + 2 * in_tile_order(row_tile * TILE_ROWS / 2));
            } else {
                pair.x = (of_shared ? p.shared_act : p.act) + int64_t(hit.z) * pair.k_tiles * TILE_K;
                pair.width = p.hidden;
                const int row = of_shared ? p.n * p.top_k + before : hit.z;
                pair.y = p.y + (int64_t(row) * p.hidden + row_tile * TILE_ROWS);
            }
            return pair;
        };
        // Past the last token any row, whose products nobody reads.
        auto x_of = [&](const Pair &pair, int token) {
            const int row = OF == GATE_UP ? token_of(pair.mask, token + g) : min(token + g, pair.num_tokens - 1);
            return reinterpret_cast<const uint4 *>(pair.x + int64_t(row) * pair.k_tiles * TILE_K) + lane % 4 * 2;
        };

        Step asked = {0, number_in(0), 0};
        Pair wanted = {};
        int asked_tile = 0;
        auto ask = [&](int place) {  // for the next part
            if (asked.number >= pairs) return;
            if (asked_tile == 0) wanted = pair_of(asked.number);
            if (lane == 0) {
                const uint32_t to = ring_at + place * PART_BYTES, barrier = full + 8 * place;
                barrier_arrive_and_expect(barrier, PART_BYTES);
#pragma unroll
                for (int i = 0; i < PAIR; i++) {
                    const int tile = i * wanted.apart + asked_tile;
                    bulk_copy(to + i * CODES, wanted.codes + tile * TILE_BYTES<INT4_TILES>, CODES, barrier);
                    bulk_copy(to + PAIR * CODES + i * SCALES, wanted.scales + tile * (SCALES / PART), SCALES, barrier);
                }
            }
            asked_tile += PART;
            if (asked_tile == wanted.k_tiles) asked_tile = 0, move(asked, wanted);
        };
        for (int place = 0; place < OWN_PLACES; place++) ask(place);
        if (OF == GATE_UP) {
            write_residual(p, norm, int(blockIdx.x * blockDim.x + threadIdx.x), int(gridDim.x * blockDim.x));
        } else {
            wait_for_inputs();
            let_next_start();  // not before: sum_several reads what the kernels before this one wrote
        }

        // Tokens are loaded a group ahead.
        int place = 0, parity = 0;
        Step now = {0, number_in(0), 0};
        if (now.number >= pairs) return;
        Pair pair = pair_of(now.number);
        const uint4 *x = x_of(pair, 0);
        uint32_t even[GROUP][8], odd[GROUP][8];
        load_group(even, x);
        while (now.number < pairs) {
            const Pair own = pair;
            const int token = now.token;
            float acc[COUNT][PAIR][4] = {};
#pragma unroll 1
            for (int tile = 0; tile < own.k_tiles; tile += PARTS * PART) {
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    const uint8_t *const codes = ring + place * PART_BYTES;
                    load_group(odd, x + GROUP * TILE_K / 8);
                    x += PART * TILE_K / 8;
                    if (part == PARTS - 1 && tile + PARTS * PART == own.k_tiles) {
                        move(now, own);
                        if (now.token == 0 && now.number < pairs) pair = pair_of(now.number);
                        x = x_of(pair, now.token);
                    }
                    barrier_wait(full + 8 * place, parity);
                    add_group(acc, part * PART, even, codes, 0, own.bf16_scales);
                    load_group(even, x);
                    add_group(acc, part * PART + GROUP, odd, codes, 1, own.bf16_scales);
                    __syncwarp();
                    ask(place);
                    if (++place == OWN_PLACES) place = 0, parity ^= 1;
                }
            }
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int column = token + lane % 4 * 2 + e % 2, row = g + e / 2 * 8;
                if (column >= own.num_tokens) continue;
                if constexpr (OF == GATE_UP) {
                    float gate = 0.0f, up = 0.0f;
#pragma unroll
                    for (int k = 0; k < COUNT; k++) gate += acc[k][0][e], up += acc[k][1][e];
                    bf16 *const to = static_cast<bf16 *>(own.y) + int64_t(column) * own.width;
                    to[2 * in_tile_order(row / 2) + row % 2] = __float2bfloat16_rn(swiglu(gate, up));
                } else {
                    float *const to = static_cast<float *>(own.y) + int64_t(column) * own.width + row;
#pragma unroll
                    for (int i = 0; i < PAIR; i++) to[i * TILE_ROWS] = acc[0][i][e];
                }
            }
        }
    }
}

// out = the weighted sums of what several_down left. A block has a part of one token's.
__global__ void __launch_bounds__(SUM_THREADS) sum_several(Plan p, bf16 *out) {
    __shared__ float weights[MOST_TERMS];
    __shared__ int rows[MOST_TERMS];
    const int token = blockIdx.y, column = int(blockIdx.x) * SUM_COLUMNS + 4 * int(threadIdx.x);
    // Routing was there before several_down let this kernel in.
    for (int r = threadIdx.x; r < p.top_k; r += SUM_THREADS)
        weights[r] = __ldcg(p.weights + token * p.top_k + r), rows[r] = __ldcg(p.place + token * p.top_k + r);
    if (p.has_shared && threadIdx.x == SUM_THREADS - 1)
        weights[p.top_k] = precise_sigmoid(__ldcg(p.gate + token)), rows[p.top_k] = p.n * p.top_k + token;
    __syncthreads();
    let_next_start();
    wait_for_inputs();
    if (column >= p.hidden) return;
    float sum[4] = {};
#pragma unroll 9
    for (int r = 0; r < p.top_k + p.has_shared; r++) {
        const float4 v = __ldcg(reinterpret_cast<const float4 *>(p.y + int64_t(rows[r]) * p.hidden + column));
        const float term[4] = {v.x, v.y, v.z, v.w}, weight = weights[r];
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = weight < 0 ? sum[i] : fmaf(weight, term[i], sum[i]);
    }
    *reinterpret_cast<uint2 *>(out + int64_t(token) * p.hidden + column) =
        make_uint2(pack2(sum[0], sum[1]), pack2(sum[2], sum[3]));
}

// Two k tiles have one scale, and a row tile is whole rounds of parts.
template <Matrix OF>
bool is_taken(const Packed &m) {
    constexpr int WHOLE = PARTIALS<OF> > PART ? PARTIALS<OF> : PART;
    return m.form == INT4_TILES && m.zeros == nullptr && m.shift == 1 && m.k_tiles % WHOLE == 0 && aligned(m.scales);
}

// Where the kernels are for this card and take these.
template <Matrix OF>
int launch_several(cudaStream_t stream, const Plan &p, const Packed &m, const Packed &shared, const bf16 *x,
                   const Norm &norm) {
    const int bytes = RINGS + p.slots * int(sizeof(int4));
    if (p.n < 2 || p.n > FEW || !has_dependent_launch() || bytes > room_of(this_card()) || !is_taken<OF>(m) ||
        (p.has_shared && !is_taken<OF>(shared))) {
        return cudaErrorNotSupported;
    }
    const cudaError_t code = prepare(several<OF>, room_of(this_card()));
    if (code != cudaSuccess) return code;
    return launch(several<OF>, BLOCKS * this_card().count, 32 * WARPS<OF>, bytes, stream, p, m, shared, x, norm);
}

}  // namespace

int launch_several_up(cudaStream_t stream, const Plan &p, const Packed &m, const Packed &shared, const Norm &norm,
                      const bf16 *x) {
    // Where a warp has but one or two pairs the blocks of packed_up, which split k, are done sooner; of more than 8 tokens
    // they are slower.
    const int64_t most_pairs = int64_t(p.slots) * (p.width / TILE_ROWS);
    if (p.n <= 8 && most_pairs < 3 * BLOCKS * WARPS<GATE_UP> * this_card().count) return cudaErrorNotSupported;
    return launch_several<GATE_UP>(stream, p, m, shared, x, norm);
}

int launch_several_down(cudaStream_t stream, const Plan &p, const Packed &m, const Packed &shared, bf16 *out) {
    if (p.hidden % (PAIR * TILE_ROWS) != 0 || p.y_cols != p.hidden || p.top_k + p.has_shared > MOST_TERMS ||
        !aligned(p.y) || !aligned(out, 8)) {
        return cudaErrorNotSupported;
    }
    const int code = launch_several<DOWN>(stream, p, m, shared, nullptr, Norm{});
    if (code != cudaSuccess) return code;
    return launch(sum_several, dim3(ceil_div(p.hidden, SUM_COLUMNS), p.n), SUM_THREADS, 0, stream, p, out);
}
