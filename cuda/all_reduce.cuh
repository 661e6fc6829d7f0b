// What the files of the collectives share: the layout of a region, waiting for other ranks, sums over ranks, and what
// is done with them.
//
// A block of a launch is a channel: block c of each rank exchanges with blocks c of the others and no other, so blocks
// wait for nothing of their own card but what they wait for through the others. Memory of a channel is used in turns,
// counted by the channel itself in its region: launches are the same on all ranks, so counts are. A count is of 32 bits
// and wraps: flags are compared by difference; a mark that a line still has from 2^32 turns ago would have to be of
// exactly this turn, and each line is written every second turn (wider rows than usual aside).
//
// Why nothing is overwritten that is still needed. Whatever a rank writes to another it writes after wait_for_inputs,
// so after all earlier kernels of its stream have ended; that the next kernel's blocks are there early changes nothing.
// A rank's kernel ends when it has received from all ranks. So a rank that is in launch e has, from every other, data
// of launch e - 1, and those others had by then finished launch e - 2 and all that their streams had before: memory of
// e - 2 is free. Within a launch the same holds from turn to turn; the kernels say how.
#pragma once
#include "peers.cuh"

// What is to be reduced, and what becomes of the sums. Without a norm, residual and w are null.
struct Reduction {
    int n, width;
    const bf16 *x;
    float *residual;
    const float *w;
    float eps;
    bf16 *out;
};

// all_reduce_many.cu
int reduce_many(cudaStream_t stream, const q35_peers &peers, const Reduction &task);

namespace {

constexpr int LANES = 256;  // of a row: the order of sums of RMSNorm (elementwise.cu)
constexpr int SLOTS = 4;    // of large exchanges

// Flags and counts, for each channel; flags are of the rank that wrote them.
enum Flag { FLAG_READY, FLAG_GATHERED, FLAG_PARTS, FLAG_SUMS, NUM_FLAGS };
enum Count { COUNT_LINES, COUNT_CHUNKS, COUNT_GATHERS, NUM_COUNTS };
constexpr int COUNTS_AT = 256, FLAGS_AT = 2048;
static_assert(COUNTS_AT + 4 * NUM_COUNTS * Q35_MAX_CHANNELS <= FLAGS_AT, "counts");
static_assert(FLAGS_AT + 4 * NUM_FLAGS * Q35_MAX_CHANNELS * Q35_MAX_RANKS <= Q35_GATHERED_AT, "flags");

// Of many rows, up to so many ranks send all to all. With more, a share of the sums is each rank's, which sends them to
// the others: that is less to send.
constexpr int ALL_TO_ALL = 3;
constexpr bool in_shares(int world) { return world > ALL_TO_ALL; }

// Where parts of a region start, in bytes. Lines: [channel][2][sender][4 * width]; parts of large exchanges:
// [channel][SLOTS][sender][chunk]; sums, where they are in shares: [channel][SLOTS][sender][2 * chunk].
struct Places {
    int64_t lines, parts, sums, end;
    int chunk;  // bytes
};

inline Places places(int world, int channels, int width, int64_t gather_bytes) {
    Places p;
    const int64_t row = 2 * static_cast<int64_t>(width), most = in_shares(world) ? 16384 : 32768;
    p.chunk = static_cast<int>(row < most ? most / row * row : row);
    const int64_t senders = static_cast<int64_t>(channels) * world;
    p.lines = Q35_GATHERED_AT + ceil_div(gather_bytes, 256) * 256;
    p.parts = p.lines + senders * 2 * 2 * row;
    p.sums = p.parts + senders * SLOTS * p.chunk;
    p.end = p.sums + (in_shares(world) ? senders * SLOTS * 2 * p.chunk : 0);
    return p;
}

inline Places places(const q35_peers &peers) {
    return places(peers.world, peers.channels, peers.width, peers.gather_bytes);
}

constexpr int MAX_WIDTH = 1 << 24;

inline bool possible(int world, int channels, int width, int64_t gather_bytes) {
    return world >= 1 && world <= Q35_MAX_RANKS && channels >= 1 && channels <= Q35_MAX_CHANNELS && width >= 8 &&
           width <= MAX_WIDTH && width % 8 == 0 && gather_bytes >= 0;
}

inline bool valid(const q35_peers &peers) {
    if (!possible(peers.world, peers.channels, peers.width, peers.gather_bytes) || peers.rank < 0 ||
        peers.rank >= peers.world || peers.timeout_ns <= 0 || peers.status == nullptr) {
        return false;
    }
    for (int r = 0; r < peers.world; r++) {
        if (peers.regions[r] == nullptr || !aligned(peers.regions[r], 256)) return false;
    }
    return true;
}

__device__ __forceinline__ char *region(const q35_peers &peers, int rank) {
    return static_cast<char *>(peers.regions[rank]);
}

// Of this block's channel.
__device__ __forceinline__ uint32_t *count_of(const q35_peers &peers, Count which) {
    return reinterpret_cast<uint32_t *>(region(peers, peers.rank) + COUNTS_AT) + which * Q35_MAX_CHANNELS + blockIdx.x;
}

// The flags [sender] of this block's channel that lie in the region of `rank`.
__device__ __forceinline__ uint32_t *flags_of(const q35_peers &peers, int rank, Flag which) {
    return reinterpret_cast<uint32_t *>(region(peers, rank) + FLAGS_AT) +
           (which * Q35_MAX_CHANNELS + blockIdx.x) * Q35_MAX_RANKS;
}

// The d-th of the other ranks, d from 1: each rank starts with another.
__device__ __forceinline__ int other(const q35_peers &peers, int d) {
    const int rank = peers.rank + d;
    return rank < peers.world ? rank : rank - peers.world;
}

// How long one wait has lasted. Clock and host are asked now and then only.
struct Wait {
    uint64_t since = 0;
    uint32_t polls = 0;
};

// Whether to look again for what rank `from` has not sent yet. If not, the wait is over for all of this rank.
__device__ __forceinline__ bool go_on(const q35_peers &peers, int from, Wait &wait) {
    if (++wait.polls % 32 != 0) return true;
    const uint64_t now = nanoseconds();
    if (wait.since == 0) wait.since = now;
    const uint64_t waited = now - wait.since;
    if (waited <= static_cast<uint64_t>(peers.timeout_ns) && get_word(region(peers, peers.rank)) == 0 &&
        get_word(peers.status) == 0) {
        if (waited > 20000) __nanosleep(100);
        return true;
    }
    atomicCAS(peers.status, 0, 1 + from);
    return false;
}

// Adds to the sums of V groups of 8 elements those of ranks first .. first + RANKS - 1, in their order.
template <int V, int RANKS>
__device__ __forceinline__ void add_ranks(int first, int world, const uint4 (&x)[V][RANKS], float (&sum)[V][8]) {
#pragma unroll
    for (int k = 0; k < RANKS; k++) {
        if (first + k < world) {
#pragma unroll
            for (int v = 0; v < V; v++) {
                float y[8];
                unpack8(x[v][k], y);
#pragma unroll
                for (int j = 0; j < 8; j++) sum[v][j] = first + k == 0 ? y[j] : sum[v][j] + y[j];
            }
        }
    }
}

// A row that ranks exchange in lines, in one turn of a channel.
struct Lines {
    const q35_peers &peers;
    int64_t lines_at;
    int channel, width;
    uint32_t count;

    // Of a sender, in any region.
    __device__ __forceinline__ int64_t slot(int sender) const {
        return lines_at + ((channel * 2 + count % 2) * static_cast<int64_t>(peers.world) + sender) * 4 * peers.width;
    }

    // A thread's groups first + v * LANES to all other ranks, in two lines each.
    template <int V>
    __device__ __forceinline__ void send(int first, const uint4 (&own)[V]) const {
        const int groups = width / 8;
        for (int d = 1; d < peers.world; d++) {
            char *const to = region(peers, other(peers, d)) + slot(peers.rank);
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

    // Their sums over ranks, in the order of ranks. RANKS_AT_ONCE: whose lines are looked at together. `waiting`: as long
    // as no wait was in vain.
    template <int RANKS_AT_ONCE, int V>
    __device__ __forceinline__ void add_up(int first, const uint4 (&own)[V], bool &waiting, float (&sum)[V][8]) const {
        const int groups = width / 8;
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
                        const char *const from = region(peers, peers.rank) + slot(base + k);
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
            uint4 got[V][RANKS_AT_ONCE];
#pragma unroll
            for (int v = 0; v < V; v++) {
#pragma unroll
                for (int k = 0; k < RANKS_AT_ONCE; k++) {
                    const Line &a = lines[v][k][0], &b = lines[v][k][1];
                    got[v][k] = base + k == peers.rank
                                    ? own[v]
                                    : make_uint4(static_cast<uint32_t>(a.halves[0]), static_cast<uint32_t>(a.halves[1]),
                                                 static_cast<uint32_t>(b.halves[0]), static_cast<uint32_t>(b.halves[1]));
                }
            }
            add_ranks(base, peers.world, got, sum);
        }
    }
};

// A thread's groups of 8 elements of a row: with VECS, lane + v * LANES for v < VECS, all at once; with 0, one after the
// other.
template <int VECS>
constexpr int AT_ONCE = VECS > 0 ? VECS : 1;

template <int VECS>
__device__ __forceinline__ int num_passes(int groups) {
    return VECS > 0 ? 1 : ceil_div(groups, LANES);
}

template <int VECS>
__device__ __forceinline__ void load_weights(const Reduction &task, int first, float (&w)[AT_ONCE<VECS>][8]) {
#pragma unroll
    for (int v = 0; v < AT_ONCE<VECS>; v++) {
        const int group = first + v * LANES;
        if (group < task.width / 8) load8(task.w + 8 * group, w[v]);
    }
}

// One row by LANES threads that meet at `barrier`: what `sums(first, sum)` gives for groups first + v * LANES goes to
// out, or to the residual, whose norm goes to out: to the bit as elementwise.cu does it. `parts` is not that of the row
// before. `w` has the norm's weights already where LOADED.
template <bool NORM, int VECS, bool LOADED, typename Sums>
__device__ __forceinline__ void finish_row(const Reduction &task, int64_t row, int lane, float *parts, int barrier,
                                           float (&w)[AT_ONCE<VECS>][8], Sums sums) {
    constexpr int V = AT_ONCE<VECS>;
    const int groups = task.width / 8, passes = num_passes<VECS>(groups);
    float x[V][8], squares = 0.0f;
    bf16 *const out = task.out + row * task.width;
    float *const residual = NORM ? task.residual + row * task.width : nullptr;
    for (int pass = 0; pass < passes; pass++) {
        const int first = lane + pass * LANES;
        float old[V][8];
        if constexpr (NORM) {
#pragma unroll
            for (int v = 0; v < V; v++) {
                if (first + v * LANES < groups) load8(residual + 8 * (first + v * LANES), old[v]);
            }
        }
        sums(first, x);
#pragma unroll
        for (int v = 0; v < V; v++) {
            const int at = 8 * (first + v * LANES);
            if (at < task.width) {
                if constexpr (NORM) {
#pragma unroll
                    for (int j = 0; j < 8; j++) x[v][j] = old[v][j] + x[v][j];
                    store8(residual + at, x[v]);
#pragma unroll
                    for (int j = 0; j < 8; j++) squares = fmaf(x[v][j], x[v][j], squares);
                } else {
                    store8(out + at, x[v]);
                }
            }
        }
    }
    if constexpr (NORM) {
        squares = lane_sum(squares);
        if (lane % 32 == 0) parts[lane / 32] = squares;
        meet<LANES>(barrier);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < LANES / 32; i++) sum += parts[i];
        const float scale = 1.0f / sqrtf(sum / task.width + task.eps);
        for (int pass = 0; pass < passes; pass++) {
            const int first = lane + pass * LANES;
            if (!LOADED) load_weights<VECS>(task, first, w);
#pragma unroll
            for (int v = 0; v < V; v++) {
                const int at = 8 * (first + v * LANES);
                if (at < task.width) {
                    if (VECS == 0) load8(residual + at, x[v]);  // which this thread has just written
#pragma unroll
                    for (int j = 0; j < 8; j++) x[v][j] = x[v][j] * scale * w[v][j];
                    store8(out + at, x[v]);
                }
            }
        }
    }
}

}  // namespace
