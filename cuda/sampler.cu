// Tokens from logits. Blocks share a row by tiles of 2048 logits; the last of them to finish a pass decides what the
// next looks at, so that every row goes its own way through one sequence of kernels:
//   edit   the edited logits, beside the row
//   peak   the largest logit; greedy rows are done
//   weigh  sums of weights by tile, and how many tokens (with which sum) have each range of logits or weights; a draw
//          from all tokens is done
//   pick   the few tokens of the ranges that decide, in a list, from which one block chooses exactly
//   tidy   ranks of the chosen tokens; the marks of edits are taken back
#include "sampler.cuh"

namespace {

// Items a row's lists hold. Where more would be listed, the last block goes over the row itself: right, and slow.
__host__ __device__ constexpr int room(int job) { return job == 0 ? 32768 : 4096; }

struct Call {
    int n, vocab, num_tokens;
    int64_t row_bytes;
    const float *logits;
    const q35_sampling *sampling;
    const q35_edit *edits;
    char *workspace;
    q35_sampled *out;
    int32_t *tokens;
};

// The workspace of one row.
struct Space {
    Job *jobs;          // [2]
    Item *list;         // [room(0) + room(1)]
    unsigned *edited;   // [ceil(vocab / 32)] bits: the token is edited; zero between two uses
    float *values;      // [vocab]: to what
    int64_t bytes;
};

__host__ __device__ inline Space space_of(char *at, int vocab) {
    Space s = {};
    s.jobs = reinterpret_cast<Job *>(at), s.bytes = 2 * sizeof(Job);
    s.list = reinterpret_cast<Item *>(at + s.bytes), s.bytes += (room(0) + room(1)) * sizeof(Item);
    s.edited = reinterpret_cast<unsigned *>(at + s.bytes), s.bytes += ceil_div(vocab, 32) * sizeof(unsigned);
    s.values = reinterpret_cast<float *>(at + s.bytes), s.bytes += vocab * sizeof(float);
    s.bytes = ceil_div(s.bytes, 256) * 256;
    return s;
}

__device__ __forceinline__ Item *list_of(const Space &space, int j) { return space.list + (j == 0 ? 0 : room(0)); }

__device__ __forceinline__ Space space_of(const Call &c, int row) {
    return space_of(c.workspace + row * c.row_bytes, c.vocab);
}

__device__ __forceinline__ Row row_of(const Call &c, const Space &space, int row, bool edited) {
    const float *logits = c.logits + int64_t(row) * c.vocab;
    const bool wide = c.vocab % 4 == 0 && reinterpret_cast<uintptr_t>(c.logits) % 16 == 0;
    return {logits, edited && c.sampling[row].num_edits > 0 ? space.edited : nullptr, space.values, c.num_tokens, wide};
}

__device__ __forceinline__ void finish(const Call &c, int row, int token) {
    c.out[row].token = token;
    c.tokens[row] = token < 0 ? 0 : token;
}

__device__ __forceinline__ float logprob(const Job &job, float x) {
    return float(double(x) - double(job.rule.max) - log(job.total));
}

// The first of the four logits that this thread has of tile t of the TILES of its block.
template <int TILES>
__device__ __forceinline__ int first_id(int t) {
    return (int(blockIdx.x) * TILES + t) * TILE + 4 * int(threadIdx.x);
}

// ------------------------------------------------------------------------------------------------------------ edit

__global__ void __launch_bounds__(THREADS) edit_kernel(const __grid_constant__ Call c) {
    wait_for_inputs();
    let_next_start();
    const int row = blockIdx.y;
    const q35_sampling &p = c.sampling[row];
    const int num = p.num_edits;
    if (num <= 0) return;
    const float repetition = p.repetition_penalty, frequency = p.frequency_penalty, presence = p.presence_penalty;
    const Space space = space_of(c, row);
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < num; i += gridDim.x * THREADS) {
        const q35_edit e = c.edits[p.edit_start + i];
        if (e.token < 0 || e.token >= c.num_tokens) continue;
        float x = __fadd_rn(c.logits[int64_t(row) * c.vocab + e.token], e.bias);
        if (e.banned) x = -INFINITY;
        if (e.seen) x = x > 0.0f ? __fdiv_rn(x, repetition) : __fmul_rn(x, repetition);
        if (e.count > 0) x = __fsub_rn(x, __fadd_rn(__fmul_rn(frequency, float(e.count)), presence));
        space.values[e.token] = x;
        atomicOr(&space.edited[e.token / 32], 1u << (e.token % 32));
    }
}

// ------------------------------------------------------------------------------------------------------------ peak

// By one thread: what a row is to do, its largest logit found.
__device__ void plan_choice(const Call &c, int row, Job &job, Item best) {
    const q35_sampling p = c.sampling[row];
    Rule rule = {NOTHING, 0, logit_of_key(key_of(best)), fminf(1.0f / p.temperature, 3.402823466e38f),
                 p.top_p, fminf(p.min_p, 1.0f), p.uniform};
    if (best == 0) {
        finish(c, row, -1);
    } else if (!(p.temperature > 0.0f) || p.top_k == 1 || rule.max == INFINITY) {
        finish(c, row, id_of(best));
    } else if (p.top_k > 0 && p.top_k < c.num_tokens) {
        rule.kind = TOP_K, rule.want = min(p.top_k, int(Q35_MAX_TOP_K));
    } else {
        rule.kind = p.top_p < 1.0f ? NUCLEUS : ALL;
    }
    job.rule = rule;
}

__device__ void plan_list(const Call &c, int row, Job &job, Item best) {
    const int want = min(c.sampling[row].num_logprobs, int(Q35_MAX_LOGPROBS));
    job.rule = {best == 0 ? NOTHING : LIST, want, logit_of_key(key_of(best)), 1.0f, 1.0f, 0.0f, 0.0};
    c.out[row].num_top = 0;
}

template <int TILES>
__global__ void __launch_bounds__(THREADS) peak_kernel(const __grid_constant__ Call c) {
    wait_for_inputs();
    let_next_start();
    __shared__ Item warps[THREADS / 32];
    const int row = blockIdx.y;
    const Space space = space_of(c, row);
#pragma unroll 1
    for (int j = blockIdx.z; j < 2; j += gridDim.z) {
        if (j == 1 && c.sampling[row].num_logprobs < 0) continue;
        float x[TILES][4], most = -INFINITY;
        load_tiles<TILES>(row_of(c, space, row, j == 0), first_id<TILES>(0), x);
        int id = 0;
#pragma unroll
        for (int t = 0; t < TILES; t++) {
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (x[t][e] > most) most = x[t][e], id = first_id<TILES>(t) + e;
        }
        Item best = most > -INFINITY ? item_of(key_of_logit(most), id) : 0;
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            const Item other = __shfl_xor_sync(ALL_LANES, best, step);
            best = other > best ? other : best;
        }
        __syncthreads();
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
        __syncthreads();
        Job &job = space.jobs[j];
        if (threadIdx.x == 0) {
            for (int w = 1; w < THREADS / 32; w++) best = warps[w] > best ? warps[w] : best;
            if (best) atomicMax(&job.best, best);
        }
        if (arrives_last(&job.arrived) && threadIdx.x == 0) {
            best = job.best;
            job.best = 0;
            if (j == 0)
                plan_choice(c, row, job, best);
            else
                plan_list(c, row, job, best);
        }
    }
}

// ----------------------------------------------------------------------------------------------------------- weigh

// Whether sums by tile are needed.
__device__ __forceinline__ bool has_sums(const Rule &rule) {
    return rule.kind == ALL || rule.kind == LIST || (rule.kind == NUCLEUS && rule.min_p > 0.0f);
}

__device__ __forceinline__ double tile_sum(const Job &job, int num_tokens, int tile) {
    return tile < ceil_div(num_tokens, TILE) ? double(job.sums[tile]) / FIXED_ONE : 0.0;
}

// A draw from all tokens, by id: the tile, then the token.
__device__ __forceinline__ int draw(Scratch &s, const Job &job, const Row &row, const Rule &rule) {
    const Found tile = find(
        s, 0.0, false, [&](int i) { return tile_sum(job, row.num_tokens, i); },
        [&](double total) { return rule.uniform * total; });
    const int first = tile.at * TILE;
    float x[1][4];
    load_tiles<1>(row, first + 4 * threadIdx.x, x);
    const Found found = find(
        s, tile.before, false,
        [&](int i) {
            const float weight = weight_of(rule, x[0][i % 4]);
            return weight >= rule.min_p ? double(fixed(weight)) / FIXED_ONE : 0.0;
        },
        [&](double) { return rule.uniform * tile.total; });
    return first + found.at;
}

// Which bins hold the end of the nucleus, and which may hold the token: it lies at uniform times the sum of the
// nucleus, and that is known up to what its last bin adds.
__device__ __forceinline__ void bound_nucleus(Scratch &s, Job &job, int num_tokens, const Rule &rule) {
    // The bins hold what min-p leaves, but top-p is a part of all.
    const bool all = has_sums(rule);
    double total = 0.0;
    if (all) {
        const auto sum = [&](int i) { return tile_sum(job, num_tokens, i); };
        total = find(s, 0.0, false, sum, [](double) { return 0.0; }).total;
    }
    const auto sum = [&](int bin) { return sum_of_bin(job, bin); };
    const Found cut = find(
        s, 0.0, true, sum, [&](double binned) { return double(rule.top_p) * (all ? total : binned); });
    if (!all) total = cut.total;
    const double most = cut.before + sum_of_bin(job, cut.at);
    const Found first = find(s, 0.0, false, sum, [&](double) { return rule.uniform * cut.before * (1.0 - 1e-12); });
    const Found last = find(s, 0.0, false, sum, [&](double) { return rule.uniform * most; });
    if (threadIdx.x == 0) {
        job.total = total, job.before_cut = cut.before;
        job.cut = cut.at, job.first = first.at, job.last = min(last.at, cut.at);
    }
}

// By the last block of a row, its sums known.
__device__ __noinline__ void settle(Scratch &s, const Call &c, int index, int j) {
    const Space space = space_of(c, index);
    Job &job = space.jobs[j];
    const Rule rule = job.rule;
    if (rule.kind == ALL) {
        const int token = draw(s, job, row_of(c, space, index, true), rule);
        if (threadIdx.x == 0) finish(c, index, token), job.rule.kind = NOTHING;
    } else if (rule.kind == NUCLEUS) {
        bound_nucleus(s, job, c.num_tokens, rule);
    } else {
        if (rule.kind == LIST) {
            const auto sum = [&](int i) { return tile_sum(job, c.num_tokens, i); };
            const double total = find(s, 0.0, false, sum, [](double) { return 0.0; }).total;
            if (threadIdx.x == 0) job.total = total;
        }
        const auto count = [&](int bin) { return double(job.count[bin]); };
        const int cut = find(s, 0.0, false, count, [&](double) { return rule.want - 1.0; }).at;
        if (threadIdx.x == 0) job.cut = cut;
    }
}

template <int TILES>
__global__ void __launch_bounds__(THREADS, 2) weigh_kernel(const __grid_constant__ Call c) {
    wait_for_inputs();
    let_next_start();
    __shared__ Scratch s;
    const int index = c.n - 1 - int(blockIdx.y);  // back from where the pass before ended: that is in L2
    const Space space = space_of(c, index);
#pragma unroll 1
    for (int j = blockIdx.z; j < 2; j += gridDim.z) {
        if (j == 1 && c.sampling[index].num_logprobs < 0) continue;
        Job &job = space.jobs[j];
        const Rule rule = job.rule;
        if (rule.kind == NOTHING) continue;
        const Row row = row_of(c, space, index, j == 0);
        const bool summed = has_sums(rule), binned = rule.kind != ALL && !(rule.kind == LIST && rule.want == 0);
        float x[TILES][4];
        load_tiles<TILES>(row, first_id<TILES>(0), x);
        __syncthreads();
        if (binned)
            for (int b = threadIdx.x; b < BINS; b += THREADS) s.count[b] = s.low[b] = 0;
        __syncthreads();
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            unsigned long long sum = 0;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                if (summed) {
                    const float weight = weight_of(rule, x[t][e]);
                    if (rule.kind != ALL || weight >= rule.min_p) sum += fixed(weight);
                }
                int bin;
                if (binned && item_in(rule, x[t][e], 0, bin)) {
                    atomicAdd(&s.count[bin], 1u);
                    if (rule.kind == NUCLEUS) {
                        const unsigned bits = __float_as_uint(weight_of(rule, x[t][e]));
                        atomicAdd(&s.low[bin], bits & ((1u << LOW_BITS) - 1));
                    }
                }
            }
            const int tile = int(blockIdx.x) * TILES + t;
            if (summed && tile * TILE < c.num_tokens) {
                sum = block_total(sum);
                if (threadIdx.x == 0) job.sums[tile] = sum;
            }
        }
        __syncthreads();
        if (binned) {
            for (int b = threadIdx.x; b < BINS; b += THREADS) {
                if (s.count[b]) atomicAdd(&job.count[b], s.count[b]);
                if (s.low[b]) atomicAdd(&job.low[b], static_cast<unsigned long long>(s.low[b]));
            }
        }
        if (arrives_last(&job.arrived)) settle(s, c, index, j);
    }
}

// ------------------------------------------------------------------------------------------------------------ pick

// Of the want largest logits, in their order.
__device__ __forceinline__ int pick_of_largest(Scratch &s, const Source &from, const Rule &rule) {
    const int num = largest(s, from, rule.want);
    const auto weight = [&](int i) { return i < num ? weight_of(rule, logit_of_key(key_of(s.staged[i]))) : 0.0f; };
    int keep = 1 + find(
        s, 0.0, true, [&](int i) { return double(weight(i)); },
        [&](double total) { return double(rule.top_p) * total; }).at;
    if (rule.min_p > 0.0f) {
        const auto below = [&](int i) { return i < num && weight(i) < rule.min_p ? 1.0 : 0.0; };
        const int end = find(s, 0.0, false, below, [](double) { return 0.0; }).at;
        if (end >= 0) keep = min(keep, end);
    }
    const Found found = find(
        s, 0.0, false, [&](int i) { return i < keep ? double(weight(i)) : 0.0; },
        [&](double total) { return rule.uniform * total; });
    return id_of(s.staged[found.at]);
}

// Of the nucleus, in the order of weights: first where it ends, then the token.
__device__ __forceinline__ int pick_of_nucleus(Scratch &s, const Source &from, const Job &job, const Rule &rule) {
    Place end = place_of_bin(job, job.cut, job.before_cut);
    const double reach = double(rule.top_p) * job.total;
    narrow(s, stage(s, from, end), end, ID_BITS, true, reach, true);
    double weight = double(__uint_as_float(unsigned(end.prefix)));
    const double equals = fmin(fmax(ceil((reach - end.before) / weight), 1.0), double(end.count));
    const double sum = end.before + equals * weight;

    // A hair below the sum, so that rounding leads to nothing past the end.
    const double target = fmin(rule.uniform, 1.0 - 1e-13) * sum;
    const Found bin = find(
        s, 0.0, false, [&](int b) { return sum_of_bin(job, b); }, [&](double) { return target; });
    const bool listed = bin.at == job.cut || (bin.at >= job.first && bin.at <= job.last);
    Place place = place_of_bin(job, bin.at, bin.before);
    const Source all = {listed ? from.items : nullptr, from.count, from.row, from.rule};
    const Source in = stage(s, all, place);
    narrow(s, in, place, ID_BITS, true, target, false);
    weight = double(__uint_as_float(unsigned(place.prefix)));
    const double before = fmin(fmax(floor((target - place.before) / weight), 0.0), double(place.count - 1));
    place.before = 0.0;
    narrow(s, in, place, 0, false, before, false);
    return id_of(place.prefix);
}

// By the last block of a row, its list complete.
__device__ __noinline__ void choose(Scratch &s, const Call &c, int index, int j) {
    const Space space = space_of(c, index);
    Job &job = space.jobs[j];
    const Rule rule = job.rule;
    const Row row = row_of(c, space, index, j == 0);
    const bool fits = job.listed <= unsigned(room(j));
    const Source from = {fits ? list_of(space, j) : nullptr, int(job.listed), row, rule};
    q35_sampled &out = c.out[index];
    if (rule.kind == LIST) {
        const int num = largest(s, from, rule.want);
        for (int i = threadIdx.x; i < num; i += THREADS) {
            out.top_tokens[i] = id_of(s.staged[i]);
            out.top_logprobs[i] = logprob(job, logit_of_key(key_of(s.staged[i])));
        }
        if (threadIdx.x == 0) out.num_top = num;
    } else {
        const int token = rule.kind == TOP_K ? pick_of_largest(s, from, rule) : pick_of_nucleus(s, from, job, rule);
        if (threadIdx.x == 0) finish(c, index, token);
    }
    __syncthreads();
    for (int b = threadIdx.x; b < BINS; b += THREADS) job.count[b] = 0, job.low[b] = 0;
    if (threadIdx.x == 0) job.listed = 0;
}

template <int TILES>
__global__ void __launch_bounds__(THREADS, 2) pick_kernel(const __grid_constant__ Call c) {
    wait_for_inputs();
    let_next_start();
    __shared__ Scratch s;
    __shared__ unsigned start;
    const int index = blockIdx.y;
    const Space space = space_of(c, index);
#pragma unroll 1
    for (int j = blockIdx.z; j < 2; j += gridDim.z) {
        if (j == 1 && c.sampling[index].num_logprobs < 0) continue;
        Job &job = space.jobs[j];
        const Rule rule = job.rule;
        if (rule.kind == NOTHING || (rule.kind == LIST && rule.want == 0)) continue;
        const Row row = row_of(c, space, index, j == 0);
        const int cut = job.cut;
        const int low = rule.kind == NUCLEUS ? job.first : 0, high = rule.kind == NUCLEUS ? job.last : cut;
        int first = first_id<TILES>(0);
        asm volatile("" : "+r"(first));  // not known to be the same for both jobs: what follows from it is not kept
        float x[TILES][4];
        load_tiles<TILES>(row, first, x);
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            __syncthreads();
            if (threadIdx.x == 0) s.num_staged = 0;
            __syncthreads();
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int bin;
                const Item item = item_in(rule, x[t][e], first + t * TILE + e, bin);
                if (item && (bin == cut || (bin >= low && bin <= high))) s.staged[atomicAdd(&s.num_staged, 1)] = item;
            }
            __syncthreads();
            const int num = s.num_staged;
            if (num == 0) continue;
            if (threadIdx.x == 0) start = atomicAdd(&job.listed, unsigned(num));
            __syncthreads();
            for (int i = threadIdx.x; i < num; i += THREADS)
                if (start + i < unsigned(room(j))) list_of(space, j)[start + i] = s.staged[i];
        }
        if (arrives_last(&job.arrived)) choose(s, c, index, j);
    }
}

// ------------------------------------------------------------------------------------------------------------ tidy

template <int TILES>
__global__ void __launch_bounds__(THREADS) tidy_kernel(const __grid_constant__ Call c) {
    wait_for_inputs();
    let_next_start();
    const int index = c.n - 1 - int(blockIdx.y);
    const Space space = space_of(c, index);
    const q35_sampling &p = c.sampling[index];
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < p.num_edits; i += gridDim.x * THREADS) {
        const int token = c.edits[p.edit_start + i].token;
        if (token >= 0 && token < c.num_tokens) space.edited[token / 32] = 0;
    }
    if (p.num_logprobs < 0) return;
    q35_sampled &out = c.out[index];
    const int token = out.token;
    Job &job = space.jobs[1];
    const float chosen = token < 0 ? INFINITY : c.logits[int64_t(index) * c.vocab + token];
    float x[TILES][4];
    load_tiles<TILES>(row_of(c, space, index, false), first_id<TILES>(0), x);
    unsigned above = 0;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int e = 0; e < 4; e++) above += x[t][e] > chosen;
    }
    above = unsigned(block_total(above));
    if (threadIdx.x == 0 && above) atomicAdd(&job.above, above);
    if (arrives_last(&job.arrived) && threadIdx.x == 0) {
        out.rank = token < 0 ? 0 : 1 + int(job.above);
        out.logprob = token < 0 ? 0.0f : logprob(job, chosen);
        if (token < 0) out.num_top = 0;
        job.above = 0;
    }
}

template <int TILES>
cudaError_t sample(cudaStream_t stream, const Call &c) {
    const unsigned blocks = ceil_div(ceil_div(c.vocab, TILE), TILES), n = c.n;
    const dim3 one(blocks, n), both(blocks, n, n <= 2 ? 2 : 1);  // few rows: the two jobs side by side
    cudaError_t error = launch(edit_kernel, one, THREADS, 0, stream, c);
    if (error == cudaSuccess) error = launch(peak_kernel<TILES>, both, THREADS, 0, stream, c);
    if (error == cudaSuccess) error = launch(weigh_kernel<TILES>, both, THREADS, 0, stream, c);
    if (error == cudaSuccess) error = launch(pick_kernel<TILES>, both, THREADS, 0, stream, c);
    if (error == cudaSuccess) error = launch(tidy_kernel<TILES>, one, THREADS, 0, stream, c);
    return error;
}

}  // namespace

extern "C" int64_t q35_sample_workspace(int max_rows, int vocab) {
    return max_rows * space_of(nullptr, vocab).bytes;
}

extern "C" int q35_sample(void *stream, int n, int vocab, int num_tokens, const float *logits,
                          const q35_sampling *sampling, const q35_edit *edits, void *workspace, q35_sampled *out,
                          int32_t *tokens) {
    if (n < 0 || n > 65535 || vocab < 1 || vocab > MAX_VOCAB || num_tokens < 1 || num_tokens > vocab)
        return cudaErrorInvalidValue;
    if (n == 0) return cudaSuccess;
    const Call c = {n, vocab, num_tokens, space_of(nullptr, vocab).bytes, logits, sampling, edits,
                    static_cast<char *>(workspace), out, tokens};
    // Blocks of one tile fill the card with a row; of four, many rows take fewer.
    return n <= 16 ? sample<1>(as_stream(stream), c) : sample<4>(as_stream(stream), c);
}
