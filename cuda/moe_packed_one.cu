// The experts of a single token in int4 and fp8, on cards whose copy engine fills shared memory (compute capability 9.0 and
// later; run on 9.0), where sizes allow two blocks on a multiprocessor: what packed_up and packed_down of moe_packed.cu do,
// with the same sums in the same order.
//
// One token leaves little to do for a weight, so what is not hidden is what counts: the codes of a row tile are one piece of
// memory, and its scales another; one thread asks for whole ones, and the warps find them in shared memory, in a loop that
// is short. What one_down reads before it waits is as in few_down. Own code.
#include "moe_packed_token.cuh"

namespace {

constexpr int UP_WARPS = 8, UP_BLOCKS = 2;  // as packed_up's: the warps split k; one more routes, copies and adds up
constexpr int UP_THREADS = 32 * (UP_WARPS + 1);
enum UpBarriers { MULTIPLIED = 1, ROUTED, TOKEN_THERE };
constexpr int MOST_BUFFERS = 4;  // tiles under way in a block of one_up
constexpr int MOST_ITEMS = 20;   // warps of a block of one_down: the experts hit and the shared one

// -------------------------------------------------------------------------------------------------------- gate and up

struct Up {
    Packed gate_up, shared;
    int early, spread, buffers;
};

// A block has the tiles `block`, `block` + blocks, ... of the experts hit, and some blocks one of the shared expert before,
// which they multiply while the experts hit are being found. One warp finds those, asks for what the others multiply, and
// adds up their sums.
template <int FORM, bool ZEROS>
__global__ void __launch_bounds__(UP_THREADS, UP_BLOCKS) one_up(Plan p, Up a, const bf16 *x, Norm norm) {
    if constexpr (HERE) {
        constexpr bool SUMS = FORM != FP8_TILES;  // of the token, for zero points
        extern __shared__ __align__(128) uint8_t memory[];  // buffers, the token, its sums
        __shared__ float sums[2][UP_WARPS][2 * TILE_ROWS];
        __shared__ int4 hits[32];
        __shared__ __align__(8) uint64_t barriers[MOST_BUFFERS];
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
        const int blocks = gridDim.x;
        // The last blocks have room when those of the kernel before have gone, and have no tile of the shared expert. Of the
        // others those that have one are kept apart, on whichever multiprocessors they settle.
        const bool late = int(blockIdx.x) >= a.early;
        const int block = late ? int(blockIdx.x) : int(blockIdx.x) * a.spread % a.early;
        const int hidden = p.hidden, k_tiles = hidden / TILE_K;
        const int shared_tiles = p.shared_width / TILE_ROWS, expert_tiles = p.width / TILE_ROWS;
        const int before = a.early - shared_tiles;
        const int with_shared = !late && block >= before;
        const Kept kept(a.gate_up);
        const int buffer_bytes = 2 * kept.bytes;
        const uint32_t buffers = shared_address(memory), full = shared_address(barriers);
        uint8_t *const token = memory + a.buffers * buffer_bytes;
        float *const x_sums = reinterpret_cast<float *>(token + k_tiles * TOKEN_PITCH);

        // The shared expert's tile, where there is one, then those of so many experts hit.
        auto items_of = [&](int num_hit) {
            const int end = num_hit * expert_tiles;
            return with_shared + (end > block ? ceil_div(end - block, blocks) : 0);
        };
        auto copy = [&](const Packed &m, int item, int row_tile, int up) {
            const int number = item % a.buffers;
            const uint32_t to = buffers + number * buffer_bytes, barrier = full + 8 * number;
            barrier_arrive_and_expect(barrier, buffer_bytes);
            copy_row_tile(to, m, row_tile, barrier);
            copy_row_tile(to + kept.bytes, m, row_tile + up, barrier);
        };
        if (threadIdx.x == 32 * UP_WARPS) {
            for (int i = 0; i < a.buffers; i++) barrier_init(full + 8 * i, 1);
            barriers_are_there();
            if (with_shared) copy(a.shared, 0, block - before, shared_tiles);
        }
        __syncthreads();
        wait_for_inputs();
        let_next_start();  // not before: one_down reads what the kernels before this one wrote

        if (warp == UP_WARPS) {
            list_hits(p, choose(p, lane).expert, hits, lane);
            __syncwarp();
            const int items = items_of(hits[0].w);
            auto copy_hit = [&](int item) {
                const int tile = block + (item - with_shared) * blocks, own = tile / expert_tiles;
                if (lane == 0 && item < items)
                    copy(a.gate_up, item, (hits[own].x * 2 - own) * expert_tiles + tile, expert_tiles);
            };
            for (int i = with_shared; i < a.buffers; i++) copy_hit(i);
            write_residual(p, norm, 32 * block + lane, 32 * blocks);
            for (int item = 0;; item++) {
                if (item == with_shared) named_barrier<ROUTED, UP_THREADS>();
                if (item == items) break;
                const int tile = block + (item - with_shared) * blocks, own = tile / expert_tiles;
                named_barrier<MULTIPLIED, UP_THREADS>();
                copy_hit(item + a.buffers);
                if (lane < TILE_ROWS) {
                    float gate = 0.0f, up = 0.0f;
#pragma unroll
                    for (int k = 0; k < UP_WARPS; k++)
                        gate += sums[item % 2][k][lane], up += sums[item % 2][k][TILE_ROWS + lane];
                    const bool shared = item < with_shared;
                    bf16 *const to = shared ? p.shared_act : p.act + int64_t(hits[own].z) * p.width;
                    const int feature = (shared ? block - before : tile - own * expert_tiles) * TILE_ROWS + lane;
                    to[2 * in_tile_order(feature / 2) + feature % 2] = __float2bfloat16_rn(swiglu(gate, up));
                }
            }
            return;
        }

        keep_token(token, x, hidden, threadIdx.x, 32 * UP_WARPS);
        named_barrier<TOKEN_THERE, 32 * UP_WARPS>();
        for (int first = 8 * warp; SUMS && first < k_tiles; first += 8 * UP_WARPS)
            sum_token(shared_address(token), first, k_tiles, x_sums);
        if (SUMS) named_barrier<TOKEN_THERE, 32 * UP_WARPS>();
        const uint32_t own_token = shared_address(token) + lane % 4 * 32, x_sums_at = shared_address(x_sums);
        int items = with_shared;
        for (int item = 0;; item++) {
            if (item == with_shared) {
                named_barrier<ROUTED, UP_THREADS>();
                items = items_of(hits[0].w);
            }
            if (item == items) break;
            const int number = item % a.buffers;
            const Place<FORM, ZEROS> place(a.gate_up, buffers + number * buffer_bytes);
            barrier_wait(full + 8 * number, item / a.buffers & 1);
            float acc[2][2] = {};
#pragma unroll 2
            for (int t = warp; t < k_tiles; t += UP_WARPS) {
                uint32_t b[8];
                load_token(b, own_token + t * TOKEN_PITCH);
                const float x_sum = SUMS ? kept_float(x_sums_at + 4 * t) : 0.0f;
#pragma unroll
                for (int i = 0; i < 2; i++) add_tile(acc[i], place, i * kept.bytes, t, b, x_sum);
            }
            if (lane % 4 == 0) {
#pragma unroll
                for (int i = 0; i < 4; i++) sums[item % 2][warp][8 * i + g] = acc[i / 2][i % 2];
            }
            named_barrier<MULTIPLIED, UP_THREADS>();
        }
    }
}

// --------------------------------------------------------------------------------------------------------------- down

struct Down {
    Packed down, shared;
    int item_bytes, most_k;  // of a row tile in shared memory; elements of k
};

// A block has a row tile of the output, and each warp one expert's part of it; the first has the shared expert's.
template <int FORM, bool ZEROS>
__global__ void __launch_bounds__(32 * MOST_ITEMS, 1) one_down(Plan p, Down a, bf16 *out) {
    if constexpr (HERE) {
        constexpr bool SUMS = FORM != FP8_TILES;
        extern __shared__ __align__(128) uint8_t memory[];  // by warp a row tile, then by warp its token and its sums
        __shared__ int4 hits[32];
        __shared__ float weights[MOST_ITEMS], sums[MOST_ITEMS][TILE_ROWS];
        __shared__ __align__(8) uint64_t barriers[MOST_ITEMS];
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, num_warps = blockDim.x / 32;
        const int row_tile = blockIdx.x, row_tiles = gridDim.x;
        const uint32_t rows = shared_address(memory), full = shared_address(barriers);

        if (threadIdx.x == 0) {
            for (int i = 0; i < num_warps; i++) barrier_init(full + 8 * i, 1);
            barriers_are_there();
            if (p.has_shared) {
                barrier_arrive_and_expect(full, Kept(a.shared).bytes);
                copy_row_tile(rows, a.shared, row_tile, full);
                weights[0] = precise_sigmoid(__ldcg(p.gate));
            }
        }
        __syncthreads();
        if (warp == num_warps - 1) {
            const Chosen own = choose(p, lane);
            const float weight = weight_of(own, p.top_k, lane);
            const bool here = list_hits(p, own.expert, hits, lane);
            const int place = p.has_shared + __popc(__ballot_sync(ALL_LANES, here) & ((1u << lane) - 1));
            if (here) {
                weights[place] = weight;
                barrier_arrive_and_expect(full + 8 * place, Kept(a.down).bytes);
                const int of = (own.expert - p.first_expert) * row_tiles + row_tile;
                copy_row_tile(rows + place * a.item_bytes, a.down, of, full + 8 * place);
            }
        }
        const bool shared = p.has_shared && warp == 0;
        const int hit = warp - p.has_shared, k = shared ? p.shared_width : p.width, k_tiles = k / TILE_K;
        uint8_t *const token = memory + num_warps * a.item_bytes + warp * token_bytes(a.most_k);
        float *const x_sums = reinterpret_cast<float *>(token + k_tiles * TOKEN_PITCH);
        const uint32_t own_token = shared_address(token) + lane % 4 * 32, x_sums_at = shared_address(x_sums);
        const Place<FORM, ZEROS> place(shared ? a.shared : a.down, rows + warp * a.item_bytes);
        __syncthreads();
        wait_for_inputs();
        if (shared || hit < hits[0].w) {
            keep_token(token, shared ? p.shared_act : p.act + int64_t(hits[hit].z) * k, k, lane, 32);
            __syncwarp();
            for (int first = 0; SUMS && first < k_tiles; first += 8)
                sum_token(shared_address(token), first, k_tiles, x_sums);
            __syncwarp();
            let_next_start();  // what its blocks ask the memory for would be ahead of the token
            barrier_wait(full + 8 * warp, 0);
            float acc[2] = {};
#pragma unroll 2
            for (int t = 0; t < k_tiles; t++) {
                uint32_t b[8];
                load_token(b, own_token + t * TOKEN_PITCH);
                add_tile(acc, place, 0, t, b, SUMS ? kept_float(x_sums_at + 4 * t) : 0.0f);
            }
            if (lane % 4 == 0) sums[warp][g] = acc[0], sums[warp][g + 8] = acc[1];
        }
        __syncthreads();
        if (int(threadIdx.x) < TILE_ROWS) {
            float sum = 0.0f;
#pragma unroll 8
            for (int i = p.has_shared; i < p.has_shared + hits[0].w; i++)
                sum = fmaf(weights[i], sums[i][threadIdx.x], sum);
            if (p.has_shared) sum = fmaf(weights[0], sums[0][threadIdx.x], sum);
            out[row_tile * TILE_ROWS + threadIdx.x] = __float2bfloat16_rn(sum);
        }
    }
}

// -------------------------------------------------------------------------------------------------------- launchers

bool is_taken(const Packed &m, int form, bool zeros) {
    const Kept kept(m);
    return m.form == form && (m.zeros != nullptr) == zeros && !m.halves && (kept.zeros - kept.scales) % 16 == 0 &&
           aligned(m.scales) && aligned(m.zeros);
}
// A row tile of the shared expert takes the place of one of the others', and the way through it.
bool are_alike(const Packed &a, const Packed &b) {
    return a.groups == b.groups && a.each == b.each && a.bf16_scales == b.bf16_scales;
}

template <int FORM, bool ZEROS>
int launch_up(cudaStream_t stream, const Plan &p, const Packed &m, const Packed &shared, const Norm &norm,
              const bf16 *x) {
    const Card card = this_card();
    if (!is_taken(m, FORM, ZEROS) || (p.has_shared && (!is_taken(shared, FORM, ZEROS) || !are_alike(m, shared))))
        return cudaErrorNotSupported;
    const int room = room_of(card), tile_bytes = 2 * Kept(m).bytes, token = token_bytes(p.hidden);
    const int fit = (room - token) / tile_bytes, buffers = fit < MOST_BUFFERS ? fit : MOST_BUFFERS;
    const int shared_tiles = p.shared_width / TILE_ROWS, most = shared_tiles + p.slots * (p.width / TILE_ROWS);
    const int blocks = most < UP_BLOCKS * card.count ? most : UP_BLOCKS * card.count, early = blocks - blocks / 8;
    if (buffers < 1 || early < shared_tiles) return cudaErrorNotSupported;
    const cudaError_t code = prepare(one_up<FORM, ZEROS>, room);
    if (code != cudaSuccess) return code;
    return launch(one_up<FORM, ZEROS>, blocks, UP_THREADS, size_t(buffers * tile_bytes + token), stream, p,
                  Up{m, shared, early, spread_of(early), buffers}, x, norm);
}

template <int FORM, bool ZEROS>
int launch_down(cudaStream_t stream, const Plan &p, const Packed &m, const Packed &shared, bf16 *out) {
    const int items = p.top_k + p.has_shared, room = room_of(this_card());
    if (items > MOST_ITEMS || !is_taken(m, FORM, ZEROS) || (p.has_shared && !is_taken(shared, FORM, ZEROS)))
        return cudaErrorNotSupported;
    Down down = {m, shared, Kept(m).bytes, p.width};
    if (p.has_shared && Kept(shared).bytes > down.item_bytes) down.item_bytes = Kept(shared).bytes;
    if (p.shared_width > down.most_k) down.most_k = p.shared_width;
    const int bytes = items * (down.item_bytes + token_bytes(down.most_k));
    if (bytes > room) return cudaErrorNotSupported;
    const cudaError_t code = prepare(one_down<FORM, ZEROS>, room);
    if (code != cudaSuccess) return code;
    return launch(one_down<FORM, ZEROS>, p.hidden / TILE_ROWS, 32 * items, size_t(bytes), stream, p, down, out);
}

}  // namespace

int launch_one_up(cudaStream_t stream, const Plan &p, const Packed &m, const Packed &shared, const Norm &norm,
                  const bf16 *x) {
    if (p.n != 1 || p.slots > 32 || !has_dependent_launch()) return cudaErrorNotSupported;
    if (m.form != INT4_TILES) return launch_up<FP8_TILES, false>(stream, p, m, shared, norm, x);
    return m.zeros != nullptr ? launch_up<INT4_TILES, true>(stream, p, m, shared, norm, x)
                              : launch_up<INT4_TILES, false>(stream, p, m, shared, norm, x);
}

int launch_one_down(cudaStream_t stream, const Plan &p, const Packed &m, const Packed &shared, bf16 *out) {
    if (p.n != 1 || !has_dependent_launch()) return cudaErrorNotSupported;
    if (m.form != INT4_TILES) return launch_down<FP8_TILES, false>(stream, p, m, shared, out);
    return m.zeros != nullptr ? launch_down<INT4_TILES, true>(stream, p, m, shared, out)
                              : launch_down<INT4_TILES, false>(stream, p, m, shared, out);
}
