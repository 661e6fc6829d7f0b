// Sums over the ranks of a net that several cards compute together, and rows gathered from them, through memory that
// all of them address. Here: few rows, which each rank sends to all others in lines that carry their own marks (the
// protocol of NCCL's LL: one way over the link, nothing to wait for but the data itself), and gathers. Own code.
#include "all_reduce.cuh"

namespace {

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
        count = turn_after(count);
        const Lines lines = {peers, lines_at, static_cast<int>(blockIdx.x), task.width, count};
        for (int pass = 0; pass < passes; pass++) {
            const int first = lane + pass * LANES;
            if (turn > 0 || VECS == 0) load_own(row, first);
            if (waiting) lines.send(first, own);
        }
        const auto sums = [&](int first, float(&sum)[V][8]) {
            if (VECS == 0) load_own(row, first);
            lines.add_up<4>(first, own, waiting, sum);
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
