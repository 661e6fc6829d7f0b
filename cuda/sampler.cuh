// What the kernels of the sampler share: their workspace, the order of tokens, and selection by one block.
#pragma once
#include "device.cuh"

namespace {

constexpr int THREADS = 512, TILE = 4 * THREADS, BINS = 2048, STAGED = 2048;
static_assert(STAGED >= TILE && STAGED >= Q35_MAX_TOP_K && BINS == TILE && TILE % 32 == 0, "see their uses");

// A token with its key, which grows with what it is ordered by: larger first, lower id first among equals. 0 is none.
typedef unsigned long long Item;
constexpr int ID_BITS = 20, ITEM_BITS = 32 + ID_BITS;
constexpr int MAX_VOCAB = 1 << ID_BITS, MAX_TILES = MAX_VOCAB / TILE;

__device__ __forceinline__ Item item_of(unsigned key, int id) { return Item(key) << ID_BITS | (MAX_VOCAB - 1 - id); }
__device__ __forceinline__ unsigned key_of(Item item) { return unsigned(item >> ID_BITS); }
__device__ __forceinline__ int id_of(Item item) { return MAX_VOCAB - 1 - int(item & (MAX_VOCAB - 1)); }

// The bits of a number, so changed that they compare as it does; both zeros are one.
__device__ __forceinline__ unsigned key_of_logit(float x) {
    const unsigned bits = __float_as_uint(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float logit_of_key(unsigned key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// e^x for x <= 0 with the bits of the CPU backend's (the order of tokens by weight is decided by them); 0 for NaN.
__device__ __forceinline__ float exp_weight(float x) {
    const float n = fmaxf(rintf(__fmul_rn(fmaxf(x, -88.0f), 1.44269504088896340736f)), -126.0f);
    const float r = fmaf(n, 2.1219444e-4f, fmaf(n, -0.693359375f, x));
    float p = fmaf(1.98756915e-4f, r, 1.39819995e-3f);
    p = fmaf(p, r, 8.3334519e-3f);
    p = fmaf(p, r, 4.1665796e-2f);
    p = fmaf(p, r, 1.66666655e-1f);
    p = fmaf(p, r, 0.50000001f);
    const float y = __fadd_rn(fmaf(p, __fmul_rn(r, r), r), 1.0f);
    return x >= -87.33654f ? __fmul_rn(y, __int_as_float((int(n) + 127) << 23)) : 0.0f;
}

// Sums of weights over many blocks are of integers, which have one value in any order. A weight is at most 1.
constexpr double FIXED_ONE = double(1ll << 43);
__device__ __forceinline__ unsigned long long fixed(float weight) {
    return __float2ull_rn(__fmul_rn(weight, float(FIXED_ONE)));
}

// By what a job orders tokens, and what it does: LIST and TOP_K find the largest logits, NUCLEUS the largest weights.
enum Kind { NOTHING, ALL, TOP_K, NUCLEUS, LIST };

struct Rule {
    int kind, want;  // want: of TOP_K and LIST, how many
    float max, scale, top_p, min_p;
    double uniform;
};

// Job 0 of a row chooses a token from its edited logits, job 1 lists the most likely of the logits as they are. Zero
// between two uses: best, arrived, listed, above, low and count.
struct Job {
    Item best;         // the largest logit
    unsigned arrived;  // blocks that are done
    unsigned listed;   // items put in the list, or that would have been
    unsigned above;    // logits above the chosen token's
    int cut, first, last;  // bins to be listed: up to `cut` for TOP_K and LIST; for NUCLEUS `cut` and first to last
    double total, before_cut;
    Rule rule;
    unsigned long long sums[MAX_TILES];  // of weights, by tile
    unsigned long long low[BINS];        // NUCLEUS: of the low bits of weights
    unsigned count[BINS];
};

__device__ __forceinline__ float weight_of(const Rule &rule, float x) {
    return exp_weight(__fmul_rn(x - rule.max, rule.scale));
}

// Weights have 32 bins an octave. What lies below the last is 2^-63 and less, and all of it together cannot tell.
constexpr int LOW_BITS = 18;
constexpr unsigned TOP_BIN = 0x3f800000u >> LOW_BITS;

__device__ __forceinline__ int bin_of_weight(float weight) {
    return int(TOP_BIN) - int(__float_as_uint(weight) >> LOW_BITS);
}

// Logits have 128 bins an octave of one and their distance from the largest, from that down; the last holds all below.
__device__ __forceinline__ int bin_of_logit(float max, float x) {
    const float distance = x == max ? 0.0f : max - x;
    const unsigned bin = (__float_as_uint(distance + 1.0f) - 0x3f800000u) >> 16;
    return int(bin < BINS ? bin : BINS - 1);
}

// The item of a token and its bin; 0 where it has no part.
__device__ __forceinline__ Item item_in(const Rule &rule, float x, int id, int &bin) {
    if (rule.kind == NUCLEUS) {
        const float weight = weight_of(rule, x);
        bin = bin_of_weight(weight);
        return weight >= rule.min_p && bin < BINS ? item_of(__float_as_uint(weight), id) : 0;
    }
    bin = bin_of_logit(rule.max, x);
    return x > -INFINITY ? item_of(key_of_logit(x), id) : 0;
}

// Logits of a row, edits applied: a token whose bit is set has its value in `values`.
struct Row {
    const float *logits;
    const unsigned *edited;  // null: as they are
    const float *values;
    int num_tokens;
    bool wide;
};

// N times four neighbours, from i (a multiple of 4) on at distances of a tile; -inf from num_tokens on. The loads of
// all are ahead of their use.
template <int N>
__device__ __forceinline__ void load_tiles(const Row &row, int i, float x[N][4]) {
#pragma unroll
    for (int t = 0; t < N; t++) {
        const int at = i + t * TILE;
        if (row.wide && at + 3 < row.num_tokens) {
            const float4 v = *reinterpret_cast<const float4 *>(row.logits + at);
            x[t][0] = v.x, x[t][1] = v.y, x[t][2] = v.z, x[t][3] = v.w;
        } else {
#pragma unroll
            for (int e = 0; e < 4; e++) x[t][e] = at + e < row.num_tokens ? row.logits[at + e] : -INFINITY;
        }
    }
    if (!row.edited) return;
    unsigned bits[N];
#pragma unroll
    for (int t = 0; t < N; t++) bits[t] = i + t * TILE < row.num_tokens ? row.edited[(i + t * TILE) / 32] : 0;
#pragma unroll
    for (int t = 0; t < N; t++) {
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (bits[t] >> (i % 32 + e) & 1) x[t][e] = row.values[i + t * TILE + e];
    }
}

// Whether this block is the last of its row to come here. If so it sees all that the others wrote before they came.
__device__ __forceinline__ bool arrives_last(unsigned *arrived) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // after the barrier it holds for what the whole block wrote
        last = atomicAdd(arrived, 1u) == gridDim.x - 1;
        if (last) *arrived = 0;
        __threadfence();
    }
    __syncthreads();
    return last;
}

// The sum over the block in thread 0.
__device__ __forceinline__ unsigned long long block_total(unsigned long long x) {
    __shared__ unsigned long long parts[THREADS / 32];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int w = 1; w < THREADS / 32; w++) x += parts[w];
    return x;
}

// ------------------------------------------------------------------------------------------------------- selection

struct Scratch {
    unsigned count[BINS], low[BINS];
    Item staged[STAGED], only;
    double warps[THREADS / 32], before;
    int first, last, num_staged;
};

struct Found {
    int at;         // -1: nothing is above 0
    double before;  // the sum of what is before it
    double total;
};

// The first of BINS non-negative numbers, value(0), value(1) ..., at which their running sum passes target(total), or
// where `reach` comes up to it; the last above 0 where none does.
template <typename Value, typename Target>
__device__ __forceinline__ Found find(Scratch &s, double start, bool reach, Value value, Target target) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    constexpr int EACH = BINS / THREADS;
    double v[EACH], own = 0.0;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        v[e] = value(int(threadIdx.x) * EACH + e);
        own += v[e];
    }
    double sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const double other = __shfl_up_sync(ALL_LANES, sum, step);
        if (lane >= step) sum += other;
    }
    double before = __shfl_up_sync(ALL_LANES, sum, 1);
    if (lane == 0) before = 0.0;
    __syncthreads();
    if (lane == 31) s.warps[warp] = sum;
    if (threadIdx.x == 0) s.first = BINS, s.last = -1;
    __syncthreads();
    double base = start, total = start;
    for (int w = 0; w < THREADS / 32; w++) {
        if (w == warp) base = total;
        total += s.warps[w];
    }
    before += base;

    const double t = target(total);
    int first = BINS, last = -1;
    double at = before;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const double after = at + v[e];
        if (v[e] > 0.0) {
            last = int(threadIdx.x) * EACH + e;
            if (first == BINS && (after > t || (reach && after == t))) first = last;
        }
        at = after;
    }
    first = __reduce_min_sync(ALL_LANES, first);
    last = __reduce_max_sync(ALL_LANES, last);
    if (lane == 0 && first < BINS) atomicMin(&s.first, first);
    if (lane == 0 && last >= 0) atomicMax(&s.last, last);
    __syncthreads();
    const int found = s.first < BINS ? s.first : s.last;
    if (found >= 0 && found / EACH == int(threadIdx.x)) {
#pragma unroll
        for (int e = 0; e < EACH; e++)
            if (e < found % EACH) before += v[e];
        s.before = before;
    }
    __syncthreads();
    return {found, s.before, total};
}

// The sum of `count` weights that have the bits of `key` above those that `low` sums. Exact.
__device__ __forceinline__ double sum_of_bin(unsigned count, unsigned key, double low) {
    const unsigned ulp = ((key >> 23) - 23) << 23;
    return count * double(__uint_as_float(key)) + low * double(__uint_as_float(ulp));
}

// The sum of a bin of weights of a whole row.
__device__ __forceinline__ double sum_of_bin(const Job &job, int bin) {
    const unsigned count = job.count[bin];
    return count ? sum_of_bin(count, (TOP_BIN - bin) << LOW_BITS, double(job.low[bin])) : 0.0;
}

// Items in memory, or where `items` is null those of a row by its rule, made again.
struct Source {
    const Item *items;
    int count;
    const Row &row;
    const Rule &rule;
};

template <typename Each>
__device__ __forceinline__ void for_each(const Source &from, Each each) {
    constexpr int AHEAD = 4;
    // Copies, since what `each` writes might else change them.
    const Item *items = from.items;
    if (items) {
        const int count = from.count;
        for (int i = threadIdx.x; i < count; i += AHEAD * THREADS) {
            Item item[AHEAD];
#pragma unroll
            for (int a = 0; a < AHEAD; a++) item[a] = i + a * THREADS < count ? items[i + a * THREADS] : 0;
#pragma unroll
            for (int a = 0; a < AHEAD; a++)
                if (item[a]) each(item[a]);
        }
        return;
    }
    const Row row = from.row;
    const Rule rule = from.rule;
    for (int i = 4 * threadIdx.x; i < row.num_tokens; i += AHEAD * TILE) {
        float x[AHEAD][4];
        load_tiles<AHEAD>(row, i, x);
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int bin;
                const Item item = item_in(rule, x[a][e], i + a * TILE + e, bin);
                if (item) each(item);
            }
        }
    }
}

// The items whose upper bits are `prefix`: `count` of them, with the sum `before` ahead of them.
struct Place {
    Item prefix;
    int shift;
    double before;
    unsigned count;
};

__device__ __forceinline__ Place place_of_bin(const Job &job, int bin, double before) {
    return {Item(TOP_BIN - bin), ID_BITS + LOW_BITS, before, job.count[bin]};
}

// The items of a place in shared memory where they fit.
__device__ __noinline__ Source stage(Scratch &s, const Source &from, const Place &place) {
    if (place.count > STAGED) return from;
    const Item prefix = place.prefix;
    const int shift = place.shift;
    __syncthreads();
    if (threadIdx.x == 0) s.num_staged = 0;
    __syncthreads();
    for_each(from, [&](Item item) {
        if (item >> shift == prefix) s.staged[atomicAdd(&s.num_staged, 1)] = item;
    });
    __syncthreads();
    return {s.staged, s.num_staged, from.row, from.rule};
}

// Digit by digit to the bits from `end` up of the first item, largest first, at which the running sum passes `target`:
// of weights where `weighted`, else of ones.
__device__ __noinline__ void narrow(Scratch &s, const Source &from, Place &place, int end, bool weighted,
                                    double target, bool reach) {
    while (place.shift > end) {
        const Item prefix = place.prefix;
        const int at = place.shift;
        if (place.count == 1) {
            __syncthreads();
            for_each(from, [&](Item item) {
                if (item >> at == prefix) s.only = item;
            });
            __syncthreads();
            place.prefix = s.only >> end, place.shift = end;
            return;
        }
        const int next = at > 41 ? 41 : at > 30 ? 30 : at > 20 ? 20 : at > 10 ? 10 : 0;
        const int bits = at - next, mask = (1 << bits) - 1;
        __syncthreads();
        for (int b = threadIdx.x; b < BINS; b += THREADS) s.count[b] = s.low[b] = 0;
        __syncthreads();
        for_each(from, [&](Item item) {
            if (item >> at != prefix) return;
            const int bin = mask - (int(item >> next) & mask);
            atomicAdd(&s.count[bin], 1u);
            if (weighted && next > ID_BITS) atomicAdd(&s.low[bin], key_of(item) & ((1u << (next - ID_BITS)) - 1));
        });
        __syncthreads();
        const Found found = find(
            s, place.before, reach,
            [&](int bin) {
                if (!weighted) return double(s.count[bin]);
                const unsigned key = unsigned((prefix << bits | (mask - bin)) << (next - ID_BITS));
                return s.count[bin] ? sum_of_bin(s.count[bin], key, s.low[bin]) : 0.0;
            },
            [&](double) { return target; });
        place.prefix = prefix << bits | (mask - found.at);
        place.shift = next, place.before = found.before, place.count = s.count[found.at];
    }
}

// The `want` largest items, largest first, to s.staged; how many there are.
__device__ __noinline__ int largest(Scratch &s, const Source &from, int want) {
    Item least = 1;
    if (!from.items || from.count > Q35_MAX_TOP_K) {
        Place place = {0, ITEM_BITS, 0.0, 0};
        narrow(s, from, place, 0, false, want - 1, false);
        least = place.prefix;
    }
    __syncthreads();
    if (threadIdx.x == 0) s.num_staged = 0;
    __syncthreads();
    for_each(from, [&](Item item) {
        if (item >= least) s.staged[atomicAdd(&s.num_staged, 1)] = item;
    });
    __syncthreads();
    const int num = s.num_staged;
    int size = 1;
    while (size < num) size *= 2;
    for (int i = num + threadIdx.x; i < size; i += THREADS) s.staged[i] = 0;
    // Bitonic: runs of `run` alternate in direction.
    for (int run = 2; run <= size; run *= 2) {
        for (int step = run / 2; step > 0; step /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < size / 2; i += THREADS) {
                const int a = 2 * i - (i & (step - 1)), b = a + step;
                const Item x = s.staged[a], y = s.staged[b];
                if ((x < y) == ((a & run) == 0)) s.staged[a] = y, s.staged[b] = x;
            }
        }
    }
    __syncthreads();
    return num < want ? num : want;
}

}  // namespace
