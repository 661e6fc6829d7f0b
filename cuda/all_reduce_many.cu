// Sums over ranks of many rows: chunks of rows go through slots in the receivers' regions, with a flag behind each. A
// block has three parts that work at the same time on different chunks. With few ranks all send all to all: one part
// sends, two sum and finish rows. With more, each rank sums a share of the rows of each step: one part sends to each
// rank its share, one sums the own and sends the sums to all, one finishes rows. Own code.
#include "all_reduce.cuh"

namespace {

constexpr int PARTS = 3, SENDERS = 128, THREADS = SENDERS + 2 * LANES;

// What the parts of a block tell each other, in shared memory.
struct Board {
    volatile int sent;             // steps
    volatile int finished[PARTS];  // steps, by the parts that finish rows
    volatile int verdict[PARTS];   // whether the last wait of a part had an end
    volatile int dead;             // whether a wait of any part had none
};

template <bool NORM, int VECS, bool SHARES>
struct Channel {
    // The most steps that a rank sends ahead of those it has finished, less one. All to all: a chunk that has come from
    // another says that the other had finished those up to AHEAD + 1 before it, and what is sent is at most AHEAD + 1
    // later than what has come from all, so slots of 2 * AHEAD + 2 chunks ago are free. In shares: sums that have come
    // from all for a step say that all parts of it were read, so the parts of AHEAD + 1 steps ago were; and parts of a
    // step that have come from a rank say that it has finished with the sums of AHEAD + 1 steps before.
    static constexpr int AHEAD = SHARES ? SLOTS - 1 : SLOTS / 2 - 1;
    static constexpr int V = AT_ONCE<VECS>;

    const q35_peers &peers;
    const Reduction &task;
    const Places &at;
    Board &board;
    int chunk_rows;
    uint32_t base;  // the count of this launch's step 0
    int part, lane;

    __device__ int ranks_in_step() const { return SHARES ? peers.world : 1; }
    __device__ int groups() const { return task.width / 8; }

    // Rows of chunk `share` of this block's step m: first and how many.
    __device__ int first_row(int m, int share) const {
        const int chunk = (blockIdx.x + m * gridDim.x) * ranks_in_step() + share;
        return min(chunk * chunk_rows, task.n);
    }
    __device__ int num_rows(int m, int share) const { return min(chunk_rows, task.n - first_row(m, share)); }
    __device__ int num_steps() const {
        const int all = ceil_div(task.n, chunk_rows * ranks_in_step());
        return ceil_div(all - static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
    }

    __device__ int slot(int m, int sender) const {
        return (blockIdx.x * SLOTS + (base + m) % SLOTS) * peers.world + sender;
    }
    __device__ char *parts_slot(int rank, int m, int sender) const {
        return region(peers, rank) + at.parts + static_cast<int64_t>(slot(m, sender)) * at.chunk;
    }
    __device__ char *sums_slot(int rank, int m, int sender) const {
        return region(peers, rank) + at.sums + static_cast<int64_t>(2 * slot(m, sender)) * at.chunk;
    }

    __device__ void meet_part() const {
        if (part == 0) {
            meet<SENDERS>(1);
        } else {
            meet<LANES>(1 + part);
        }
    }

    // The first warp waits, a lane for each rank, until `there(rank)`; the whole part learns whether it came to that.
    // What is this rank's own to do waits for another in its turn, there.
    template <typename There>
    __device__ bool wait(There there) const {
        if (lane < 32) {
            bool came = true;
            if (lane < peers.world) {
                Wait wait;
                while (came && !there(lane)) {
                    came = !board.dead && (lane == peers.rank || go_on(peers, lane, wait));
                }
            }
            came = __all_sync(ALL_LANES, came);
            if (lane == 0) {
                board.verdict[part] = came;
                if (!came) board.dead = 1;
            }
        }
        meet_part();
        return board.verdict[part];
    }

    __device__ bool has_come(Flag flag, int sender, int m) const {
        const uint32_t count = acquire(flags_of(peers, peers.rank, flag) + sender);
        return static_cast<int32_t>(count - (base + m + 1)) >= 0;
    }

    // Behind a meeting of the part.
    __device__ void tell(Flag flag, int m, bool self) const {
        if (lane < peers.world && (self || lane != peers.rank)) {
            release(flags_of(peers, lane, flag) + peers.rank, base + m + 1);
        }
    }
    __device__ void note(volatile int &place, int value) const {
        __threadfence_block();
        if (lane == 0) place = value;
    }

    __device__ void send() const {
        constexpr int AT_A_TIME = 8;
        const int steps = num_steps();
        for (int m = 0; m < steps; m++) {
            // Others are waited for by those who finish.
            const bool came = wait([&](int rank) {
                if (rank != peers.rank) return true;
                return (SHARES || board.finished[1] >= m - AHEAD) && board.finished[2] >= m - AHEAD;
            });
            if (!came) return;
            for (int d = 1; d < peers.world; d++) {
                const int rank = other(peers, d), share = SHARES ? rank : 0;
                const uint4 *const from = reinterpret_cast<const uint4 *>(
                    task.x + static_cast<int64_t>(first_row(m, share)) * task.width);
                char *const to = parts_slot(rank, m, peers.rank);
                const int total = num_rows(m, share) * groups();
                for (int i = lane; i < total; i += AT_A_TIME * SENDERS) {
                    uint4 v[AT_A_TIME];
#pragma unroll
                    for (int k = 0; k < AT_A_TIME; k++) {
                        if (i + k * SENDERS < total) v[k] = from[i + k * SENDERS];
                    }
#pragma unroll
                    for (int k = 0; k < AT_A_TIME; k++) {
                        if (i + k * SENDERS < total) put16(to + 16 * static_cast<int64_t>(i + k * SENDERS), v[k]);
                    }
                }
            }
            meet_part();
            note(board.sent, m + 1);
            tell(FLAG_PARTS, m, false);
        }
    }

    // Of row i of the chunk `share` of step m, which this rank has the parts of.
    __device__ void sum_parts(int m, int share, int i, int first, float (&sum)[V][8]) const {
        constexpr int RANKS = SHARES ? 4 : ALL_TO_ALL;  // whose parts are loaded together
        const uint4 *const own = reinterpret_cast<const uint4 *>(
            task.x + static_cast<int64_t>(first_row(m, share) + i) * task.width);
        const char *const row = parts_slot(peers.rank, m, 0) + static_cast<int64_t>(i) * 2 * task.width;
#pragma unroll 1
        for (int r = 0; r < (SHARES ? peers.world : 1); r += RANKS) {
            uint4 got[V][RANKS];
#pragma unroll
            for (int k = 0; k < RANKS; k++) {
                const char *const from = row + static_cast<int64_t>(r + k) * at.chunk;
#pragma unroll
                for (int v = 0; v < V; v++) {
                    const int group = first + v * LANES;
                    got[v][k] = make_uint4(0, 0, 0, 0);
                    if (r + k < peers.world && group < groups()) {
                        got[v][k] = r + k == peers.rank ? own[group] : get16(from + 16 * group);
                    }
                }
            }
            add_ranks(r, peers.world, got, sum);
        }
    }

    // All to all: parts 1 and 2 of the block take turns at rows.
    __device__ void finish_parts(float (&squares)[2][LANES / 32]) const {
        const int steps = num_steps();
        float w[V][8];
        int turn = 0;
        for (int m = 0; m < steps; m++) {
            // Of this rank: that its sender has read the rows, which may be written over.
            const bool came = wait([&](int rank) {
                return rank == peers.rank ? board.sent > m : has_come(FLAG_PARTS, rank, m);
            });
            if (!came) return;
            for (int i = part - 1; i < num_rows(m, 0); i += 2, turn++) {
                finish_row<NORM, VECS, false>(
                    task, first_row(m, 0) + i, lane, squares[turn % 2], 1 + part, w,
                    [&](int first, float(&sum)[V][8]) { sum_parts(m, 0, i, first, sum); });
            }
            meet_part();
            note(board.finished[part], m + 1);
        }
    }

    // In shares: sums of the own chunk to all ranks, this one too. Rows are bf16, or for a norm f32: the first halves
    // of all groups of 8, then the second halves.
    __device__ void send_sums() const {
        const int steps = num_steps();
        for (int m = 0; m < steps; m++) {
            // Of this rank: that what lay in its slot of the sums is finished, as it is where its sender is that far.
            const bool came = wait([&](int rank) {
                return rank == peers.rank ? board.sent > m : has_come(FLAG_PARTS, rank, m);
            });
            if (!came) return;
            for (int i = 0; i < num_rows(m, peers.rank); i++) {
                const int passes = num_passes<VECS>(groups());
                for (int pass = 0; pass < passes; pass++) {
                    const int first = lane + pass * LANES;
                    float sum[V][8];
                    sum_parts(m, peers.rank, i, first, sum);
                    for (int d = 0; d < peers.world; d++) {
                        char *const row = sums_slot(other(peers, d), m, peers.rank) +
                                          static_cast<int64_t>(i) * (NORM ? 4 : 2) * task.width;
#pragma unroll
                        for (int v = 0; v < V; v++) {
                            const int group = first + v * LANES;
                            if (group >= groups()) continue;
                            const float *const s = sum[v];
                            if constexpr (NORM) {
                                put16(row + 16 * group,
                                      make_uint4(__float_as_uint(s[0]), __float_as_uint(s[1]), __float_as_uint(s[2]),
                                                 __float_as_uint(s[3])));
                                put16(row + 16 * (groups() + group),
                                      make_uint4(__float_as_uint(s[4]), __float_as_uint(s[5]), __float_as_uint(s[6]),
                                                 __float_as_uint(s[7])));
                            } else {
                                put16(row + 16 * group, make_uint4(pack2(s[0], s[1]), pack2(s[2], s[3]),
                                                                   pack2(s[4], s[5]), pack2(s[6], s[7])));
                            }
                        }
                    }
                }
            }
            meet_part();
            tell(FLAG_SUMS, m, true);
        }
    }

    __device__ void finish_sums(float (&squares)[2][LANES / 32]) const {
        const int steps = num_steps();
        float w[V][8];
        int turn = 0;
        for (int m = 0; m < steps; m++) {
            const bool came = wait([&](int rank) { return has_come(FLAG_SUMS, rank, m); });
            if (!came) return;
            for (int share = 0; share < peers.world; share++) {
                for (int i = 0; i < num_rows(m, share); i++, turn++) {
                    const char *const row = sums_slot(peers.rank, m, share) +
                                            static_cast<int64_t>(i) * (NORM ? 4 : 2) * task.width;
                    const auto sums = [&](int first, float(&sum)[V][8]) {
                        uint4 got[V][2];
#pragma unroll
                        for (int v = 0; v < V; v++) {
                            const int group = first + v * LANES;
                            got[v][0] = got[v][1] = make_uint4(0, 0, 0, 0);
                            if (group >= groups()) continue;
                            got[v][0] = get16(row + 16 * group);
                            if (NORM) got[v][1] = get16(row + 16 * (groups() + group));
                        }
#pragma unroll
                        for (int v = 0; v < V; v++) {
                            if constexpr (NORM) {
                                const uint4 a = got[v][0], b = got[v][1];
                                const uint32_t words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
                                for (int j = 0; j < 8; j++) sum[v][j] = __uint_as_float(words[j]);
                            } else {
                                unpack8(got[v][0], sum[v]);
                            }
                        }
                    };
                    finish_row<NORM, VECS, false>(task, first_row(m, share) + i, lane, squares[turn % 2], 1 + part, w,
                                                  sums);
                }
            }
            meet_part();
            note(board.finished[part], m + 1);
        }
    }
};

template <bool NORM, int VECS, bool SHARES>
__global__ void __launch_bounds__(THREADS, 1)
    reduce_chunks(const __grid_constant__ q35_peers peers, const __grid_constant__ Reduction task,
                  const __grid_constant__ Places at, int chunk_rows) {
    __shared__ Board board;
    __shared__ float squares[PARTS][2][LANES / 32];
    if (peers.early) let_next_start();
    wait_for_inputs();
    const uint32_t base = get_word(count_of(peers, COUNT_CHUNKS));
    if (threadIdx.x == 0) {
        board.sent = board.dead = 0;
        for (int p = 0; p < PARTS; p++) board.finished[p] = 0;
    }
    if (__syncthreads_or(get_word(peers.status) != 0)) return;
    // Whole warps are of one part.
    const int behind = static_cast<int>(threadIdx.x) - SENDERS, part = behind < 0 ? 0 : 1 + behind / LANES;
    const int lane = behind < 0 ? static_cast<int>(threadIdx.x) : behind % LANES;
    const Channel<NORM, VECS, SHARES> channel{peers, task, at, board, chunk_rows, base, part, lane};
    if (part == 0) {
        channel.send();
    } else if (!SHARES) {
        channel.finish_parts(squares[part]);
    } else if (part == 1) {
        channel.send_sums();
    } else {
        channel.finish_sums(squares[part]);
    }
    __syncthreads();
    if (threadIdx.x == 0) *count_of(peers, COUNT_CHUNKS) = base + channel.num_steps();
}

template <bool NORM, int VECS>
auto kernel_for(bool shares) {
    return shares ? reduce_chunks<NORM, VECS, true> : reduce_chunks<NORM, VECS, false>;
}

}  // namespace

int reduce_many(cudaStream_t stream, const q35_peers &peers, const Reduction &task) {
    const Places at = places(peers);
    const bool shares = in_shares(peers.world), wide = task.width > 2 * 8 * LANES;
    const int ranks = shares ? peers.world : 1;
    const int most = at.chunk / (2 * task.width), even = ceil_div(task.n, peers.channels * ranks);
    const int rows = even < most ? even : most;
    const int64_t steps = ceil_div(static_cast<int64_t>(task.n), static_cast<int64_t>(rows) * ranks);
    const auto kernel = task.residual ? (wide ? kernel_for<true, 0>(shares) : kernel_for<true, 2>(shares))
                                      : (wide ? kernel_for<false, 0>(shares) : kernel_for<false, 2>(shares));
    return launch(kernel, static_cast<unsigned>(steps < peers.channels ? steps : peers.channels), THREADS, 0,
                  stream, peers, task, at, rows);
}
