// Sums over the ranks of a net that several cards compute together, and rows gathered from them, through memory that
// all of them address. Here: few rows, which each rank sends to all others in lines that carry their own marks (the
// protocol of NCCL's LL: one way over the link, nothing to wait for but the data itself), and gathers. Own code.
#include "all_reduce.cuh"

namespace {

constexpr int MAX_WIDTH = 1 << 24;
constexpr int RANKS_AT_ONCE = 4;  // whose lines are looked at together

// Block c takes rows c, c + gridDim.x, ...: a turn each. A thread sends its groups of a row to all other ranks, in two
// lines each, and receives theirs.
// The slot of a turn was that of two turns ago. Within a launch a thread sends a turn after it has received the same
// groups of the turn before, which the other rank's thread sent after it had received those of two turns ago: lines of
// a launch belong to the same thread on all ranks.
template <bool NORM, int VECS>
__global__ void __launch_bounds__(LANES) reduce_few(const __grid_constant__ q35_peers peers,
                                                    const __grid_constant__ Reduction task, int64_t lines_at) {
    constexpr int V = AT_ONCE<VECS>;
    __shared__ float parts[2][LANES / 32];
    const int lane = threadIdx.x, groups = task.width / 8, passes = num_passes<VECS>(groups);
    float w[V][8];
    if constexpr (NORM && VECS > 0) load_weights<VECS>(task, lane, w);
    if (peers.early) let_next_start();
    wait_for_inputs();

    uint4 own[V] = {};
    const auto load_own = [&](int row, int first) {
        const uint4 *const x = reinterpret_cast<const uint4 *>(task.x + static_cast<int64_t>(row) * task.width);
#pragma unroll
        for (int v = 0; v < V; v++) {
            if (first + v * LANES < groups) own[v] = x[first + v * LANES];
        }
    };
    load_own(blockIdx.x, lane);  // on its way while the block meets
    uint32_t count = get_word(count_of(peers, COUNT_LINES));
    if (__syncthreads_or(get_word(peers.status) != 0)) return;
    bool waiting = true;  // until a wait was in vain
    int turn = 0;
    for (int row = blockIdx.x; row < task.n; row += gridDim.x, turn++) {
        count += count == UINT32_MAX ? 3 : 1;  // never 0, as in new lines; odd and even in turns
        // Of a sender, in any region.
        const auto slot_at = [&](int sender) {
            const int64_t slot = (blockIdx.x * 2 + count % 2) * static_cast<int64_t>(peers.world) + sender;
            return lines_at + slot * 4 * peers.width;
        };
        for (int pass = 0; pass < passes; pass++) {
            const int first = lane + pass * LANES;
            if (turn > 0 || VECS == 0) load_own(row, first);
            for (int d = 1; waiting && d < peers.world; d++) {
                char *const to = region(peers, other(peers, d)) + slot_at(peers.rank);
#pragma unroll
                for (int v = 0; v < V; v++) {
                    const int group = first + v * LANES;
                    if (group < groups) {
                        put_line(to + 16 * group, own[v].x, own[v].y, count);
                        put_line(to + 16 * (groups + group), own[v].z, own[v].w, count);
                    }
                }
            }
        }
        const auto sums = [&](int first, float(&sum)[V][8]) {
            for (int base = 0; base < peers.world; base += RANKS_AT_ONCE) {
                Line lines[V][RANKS_AT_ONCE][2] = {};
                const auto wanted = [&](int v, int k) {
                    return base + k < peers.world && base + k != peers.rank && first + v * LANES < groups;
                };
                Wait wait;
                int missing = -1;
                do {
                    // All loads, then all marks.
#pragma unroll
                    for (int k = 0; k < RANKS_AT_ONCE; k++) {
#pragma unroll
                        for (int v = 0; v < V; v++) {
                            if (!wanted(v, k)) continue;
                            const char *const from = region(peers, peers.rank) + slot_at(base + k);
                            const int group = first + v * LANES;
                            lines[v][k][0] = get_line(from + 16 * group);
                            lines[v][k][1] = get_line(from + 16 * (groups + group));
                        }
                    }
                    missing = -1;
#pragma unroll
                    for (int k = 0; k < RANKS_AT_ONCE; k++) {
#pragma unroll
                        for (int v = 0; v < V; v++) {
#pragma unroll
                            for (int i = 0; i < 4; i++) {
                                const uint32_t mark = static_cast<uint32_t>(lines[v][k][i / 2].halves[i % 2] >> 32);
                                if (wanted(v, k) && mark != count) missing = base + k;
                            }
                        }
                    }
                } while (missing >= 0 && waiting && (waiting = go_on(peers, missing, wait)));
                if (VECS == 0) load_own(row, first);
                uint4 got[V][RANKS_AT_ONCE];
#pragma unroll
                for (int v = 0; v < V; v++) {
#pragma unroll
                    for (int k = 0; k < RANKS_AT_ONCE; k++) {
                        const Line &a = lines[v][k][0], &b = lines[v][k][1];
                        got[v][k] = base + k == peers.rank
                                        ? own[v]
                                        : make_uint4(static_cast<uint32_t>(a.halves[0]),
                                                     static_cast<uint32_t>(a.halves[1]),
                                                     static_cast<uint32_t>(b.halves[0]),
                                                     static_cast<uint32_t>(b.halves[1]));
                    }
                }
                add_ranks(base, peers.world, got, sum);
            }
        };
        finish_row<NORM, VECS, VECS != 0>(task, row, lane, parts[turn % 2], 0, w, sums);
    }
    if (threadIdx.x == 0) *count_of(peers, COUNT_LINES) = count;
}

// A block takes every gridDim.x-th run of 4 * LANES vectors of 16 bytes. Rows are written where they are read, so every
// rank first says that whatever read the last ones has ended, which is so once the kernel has its inputs.
__global__ void __launch_bounds__(LANES) gather_columns(const __grid_constant__ q35_peers peers, uint32_t total,
                                                        uint32_t row_vectors, const uint4 *x) {
    constexpr int AT_A_TIME = 4;
    if (peers.early) let_next_start();
    wait_for_inputs();
    const int lane = threadIdx.x, world = peers.world;
    const uint32_t count = get_word(count_of(peers, COUNT_GATHERS)) + 1;
    if (__syncthreads_or(get_word(peers.status) != 0)) return;
    // Threads 0 .. world - 1 stand for a rank each.
    const bool for_peer = lane < world && lane != peers.rank;
    const auto tell = [&](Flag flag) {
        if (for_peer) release(flags_of(peers, lane, flag) + peers.rank, count);
    };
    const auto hear = [&](Flag flag) {
        if (!for_peer) return true;
        Wait wait;
        while (static_cast<int32_t>(acquire(flags_of(peers, peers.rank, flag) + lane) - count) < 0) {
            if (!go_on(peers, lane, wait)) return false;
        }
        return true;
    };
    tell(FLAG_READY);
    if (__syncthreads_or(!hear(FLAG_READY))) return;
    for (uint32_t base = blockIdx.x * AT_A_TIME * LANES; base < total; base += gridDim.x * AT_A_TIME * LANES) {
        uint4 v[AT_A_TIME];
#pragma unroll
        for (int k = 0; k < AT_A_TIME; k++) {
            const uint32_t i = base + k * LANES + lane;
            if (i < total) v[k] = x[i];
        }
#pragma unroll
        for (int k = 0; k < AT_A_TIME; k++) {
            const uint32_t i = base + k * LANES + lane;
            if (i >= total) continue;
            const uint32_t row = i / row_vectors, column = i % row_vectors;
            const int64_t to = (static_cast<int64_t>(row) * world + peers.rank) * row_vectors + column;
            for (int d = 0; d < world; d++) put16(region(peers, other(peers, d)) + Q35_GATHERED_AT + 16 * to, v[k]);
        }
    }
    __syncthreads();
    tell(FLAG_GATHERED);
    hear(FLAG_GATHERED);
    if (lane == 0) *count_of(peers, COUNT_GATHERS) = count;
}

bool possible(int world, int channels, int width, int64_t gather_bytes) {
    return world >= 1 && world <= Q35_MAX_RANKS && channels >= 1 && channels <= Q35_MAX_CHANNELS && width >= 8 &&
           width <= MAX_WIDTH && width % 8 == 0 && gather_bytes >= 0;
}

bool valid(const q35_peers &peers) {
    if (!possible(peers.world, peers.channels, peers.width, peers.gather_bytes) || peers.rank < 0 ||
        peers.rank >= peers.world || peers.timeout_ns <= 0 || peers.status == nullptr) {
        return false;
    }
    for (int r = 0; r < peers.world; r++) {
        if (peers.regions[r] == nullptr || !aligned(peers.regions[r], 256)) return false;
    }
    return true;
}

template <bool NORM>
int reduce(void *stream, const q35_peers &peers, const Reduction &task) {
    if (task.n <= 0 || task.width <= 0) return 0;
    if (!valid(peers) || task.width % 8 != 0 || task.width > peers.width || !aligned(task.x) || !aligned(task.out) ||
        !aligned(task.residual) || !aligned(task.w)) {
        return cudaErrorInvalidValue;
    }
    // Lines are twice their data, and go to everyone: more rows are sent otherwise.
    if (task.n > 64 || task.n * (peers.world - 1) > 192) return reduce_many(as_stream(stream), peers, task);
    const auto kernel = task.width <= 2 * 8 * LANES ? reduce_few<NORM, 2> : reduce_few<NORM, 0>;
    return launch(kernel, task.n < peers.channels ? task.n : peers.channels, LANES, 0, as_stream(stream), peers, task,
                  places(peers).lines);
}

}  // namespace

extern "C" int64_t q35_peer_bytes(int world, int channels, int width, int64_t gather_bytes) {
    if (!possible(world, channels, width, gather_bytes)) return -1;
    return places(world, channels, width, gather_bytes).end;
}

extern "C" int q35_all_reduce(void *stream, q35_peers peers, int n, int width, const q35_bf16 *x, q35_bf16 *out) {
    return reduce<false>(stream, peers, {n, width, as_bf16(x), nullptr, nullptr, 0.0f, as_bf16(out)});
}

extern "C" int q35_all_reduce_norm(void *stream, q35_peers peers, int n, int width, const q35_bf16 *delta,
                                   float *residual, const float *w, float eps, q35_bf16 *out) {
    if (n > 0 && width > 0 && (residual == nullptr || w == nullptr)) return cudaErrorInvalidValue;
    return reduce<true>(stream, peers, {n, width, as_bf16(delta), residual, w, eps, as_bf16(out)});
}

extern "C" int q35_gather_columns(void *stream, q35_peers peers, int n, int width, const float *x) {
    if (n <= 0 || width <= 0) return 0;
    const int64_t total = static_cast<int64_t>(n) * width / 4;
    if (!valid(peers) || width % 4 != 0 || !aligned(x) || total > INT32_MAX ||
        16 * total * peers.world > peers.gather_bytes) {
        return cudaErrorInvalidValue;
    }
    const int64_t blocks = ceil_div(total, 4 * LANES);
    return launch(gather_columns, static_cast<unsigned>(blocks < peers.channels ? blocks : peers.channels), LANES, 0,
                  as_stream(stream), peers, static_cast<uint32_t>(total), static_cast<uint32_t>(width / 4),
                  reinterpret_cast<const uint4 *>(x));
}
