// More than 16 tokens, before the products: routing, and the list of assignments sorted by expert, then token.
#include "moe.cuh"

namespace {

// --------------------------------------------------------------------------------------------------------- routing

// Past L1, and ahead of what follows.
__device__ __forceinline__ float4 load_logits(const float *p) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(__cvta_generic_to_global(p)));
    return v;
}

// What route_row finds, for up to 32 rounds over up to 128 PARTS experts, a multiple of 4: a lane has logits
// 128 j + 4 lane + i of the row. Returns the expert of round `lane`; `chosen` [32] is memory of the warp's own.
template <int PARTS>
__device__ __forceinline__ int route_parts(const float4 (&logits)[PARTS], int num_experts, int rounds, float *weights,
                                           int *chosen, int lane) {
    uint32_t keys[4 * PARTS];
#pragma unroll
    for (int j = 0; j < PARTS; j++) {
        const float values[4] = {logits[j].x, logits[j].y, logits[j].z, logits[j].w};
#pragma unroll
        for (int i = 0; i < 4; i++) keys[4 * j + i] = 128 * j + 4 * lane < num_experts ? route_key(values[i]) : 0;
    }
    auto index_of = [](int i) { return i / 4 * 128 + i % 4; };  // of key i of lane 0
    const unsigned bit = 1u << lane, upto = bit | (bit - 1);
    int *to = chosen;
    uint32_t own = 0;  // the key of round `lane`
#pragma unroll 1
    for (int r = 0; r < rounds; r++) {
        uint32_t tops[PARTS], top = 0;
#pragma unroll
        for (int j = 0; j < PARTS; j++) {
            tops[j] = max(max(keys[4 * j], keys[4 * j + 1]), max(keys[4 * j + 2], keys[4 * j + 3]));
            top = max(top, tops[j]);
        }
        top = __reduce_max_sync(ALL_LANES, top);
        if (lane == r) own = top;
        // Of equals the lowest index: by part, then lane, then place in the part.
        unsigned having = 0;
#pragma unroll
        for (int j = PARTS - 1; j >= 0; j--) {
            const unsigned here = __ballot_sync(ALL_LANES, tops[j] == top);
            having = here != 0 ? here : having;
        }
        const bool mine = (having & upto) == bit;
        int place = index_of(4 * PARTS - 1);
#pragma unroll
        for (int i = 4 * PARTS - 2; i >= 0; i--) place = keys[i] == top ? index_of(i) : place;
        if (mine) *to = place + 4 * lane;
        to++;
        place = mine ? place : -1;
#pragma unroll
        for (int i = 0; i < 4 * PARTS; i++) keys[i] = place == index_of(i) ? 0 : keys[i];
    }
    // The sum has the order of the rounds.
    const float value = route_value(own), max = __shfl_sync(ALL_LANES, value, 0);
    float weight = value == max ? 1.f : expf(value - max), sum = 0.f;
    if (weight != weight) weight = max != max ? 1.f : 0.f;
#pragma unroll 1
    for (int r = 0; r < rounds; r++) sum += __shfl_sync(ALL_LANES, weight, r);
    if (lane < rounds) weights[lane] = weight / sum;
    __syncwarp();
    const int expert = chosen[lane];
    __syncwarp();
    return expert;
}

// Routes a group of tokens, a warp a token at a time, takes the dot products of the shared expert's gate, and counts
// the tokens of each expert. PARTS: of route_parts, or 0 where it does not serve.
template <int PARTS, bool VEC>
__global__ void __launch_bounds__(32 * GROUP) many_route(Plan p, const bf16 *shared_gate, const bf16 *x) {
    extern __shared__ uint32_t counts[];  // a byte an expert, which has a token once
    __shared__ int chosen[GROUP][32];
    const int words = ceil_div(p.num_here, 4), warps = blockDim.x / 32, lane = threadIdx.x % 32;
    for (int i = threadIdx.x; i < words; i += blockDim.x) counts[i] = 0;
    wait_for_inputs();
    let_next_start();
    __syncthreads();
    auto count = [&](int expert, float &weight) {
        const int own = expert - p.first_expert;
        if (is_here(p, own)) {
            atomicAdd(&counts[own / 4], 1u << own % 4 * 8);
        } else {
            weight = NOT_HERE;
        }
    };
    const int first = blockIdx.x * GROUP, end = min(first + GROUP, p.n);
    for (int token = first + threadIdx.x / 32; token < end; token += warps) {
        const float *row = p.logits + int64_t(token) * p.num_experts;
        float *weights = p.weights + int64_t(token) * p.top_k;
        int *experts = p.experts + int64_t(token) * p.top_k;
        float4 logits[PARTS > 0 ? PARTS : 1];
#pragma unroll
        for (int j = 0; j < PARTS; j++) logits[j] = load_logits(row + min(128 * j + 4 * lane, p.num_experts - 4));
        if (p.has_shared) {
            const bf16 *const w[1] = {shared_gate}, *const in[1] = {x + int64_t(token) * p.hidden};
            float acc[1][1];
            warp_dots<1, 1, 4, VEC>(w, in, p.hidden, lane, acc);
            if (lane == 0) p.gate[token] = acc[0][0];
        }
        if constexpr (PARTS > 0) {
            int *own = chosen[threadIdx.x / 32];
            const int expert = route_parts<PARTS>(logits, p.num_experts, p.top_k, weights, own, lane);
            if (lane < p.top_k) experts[lane] = expert, count(expert, weights[lane]);
        } else {
            route_any(row, p.num_experts, p.top_k, 0, weights, experts, lane);
            for (int r = lane; r < p.top_k; r += 32) count(experts[r], weights[r]);  // what this lane wrote itself
        }
    }
    __syncthreads();
    uint32_t *to = p.counts + int64_t(blockIdx.x) * words;
    for (int i = threadIdx.x; i < words; i += blockDim.x) to[i] = counts[i];
}

// ------------------------------------------------------------------------------------------------- the sorted list

constexpr int SORT_THREADS = 1024, SORT_WARPS = SORT_THREADS / 32;
// A block places at least a group; a few more where there would be more blocks than multiprocessors.
constexpr int SORT_BLOCKS = 128;

// An expert's tiles, and their rows in steps: 0 of both where it has no token.
__device__ __forceinline__ int2 tiles_of(int total, Heights heights) {
    const int tiles = ceil_div(total, heights.most);
    return make_int2(tiles, tiles == 0 ? 0 : ceil_div(ceil_div(total, tiles), heights.step));
}

// Inclusive sums over the lanes.
__device__ __forceinline__ int sums_upto(int x, int lane) {
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
        const int before = __shfl_up_sync(ALL_LANES, x, d);
        if (lane >= d) x += before;
    }
    return x;
}

// Adds the counts of all groups to totals [num_here], those of groups below `first` to `before` too; by the whole block.
__device__ __forceinline__ void add_counts(const Plan &p, int first, int *totals, int *before) {
    constexpr int BATCH = 16;  // loaded together; as many bytes of up to 32 do not overflow 16 bits
    const int words = ceil_div(p.num_here, 4), parts = max(SORT_THREADS / words, 1);
    for (int item = threadIdx.x; item < words * parts; item += SORT_THREADS) {
        const int word = item % words;
        int all[4] = {}, some[4] = {};
        for (int group = item / words; group < p.num_groups; group += BATCH * parts) {
            uint32_t loaded[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                const int g = group + i * parts;
                loaded[i] = g < p.num_groups ? __ldcg(p.counts + int64_t(g) * words + word) : 0;
            }
            uint32_t even = 0, odd = 0, even_before = 0, odd_before = 0;
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                const uint32_t a = loaded[i] & 0x00ff00ffu, b = loaded[i] >> 8 & 0x00ff00ffu;
                even += a, odd += b;
                if (group + i * parts < first) even_before += a, odd_before += b;
            }
            all[0] += even & 0xffff, all[1] += odd & 0xffff, all[2] += even >> 16, all[3] += odd >> 16;
            some[0] += even_before & 0xffff, some[1] += odd_before & 0xffff;
            some[2] += even_before >> 16, some[3] += odd_before >> 16;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (all[i] != 0) atomicAdd(&totals[4 * word + i], all[i]);
            if (some[i] != 0) atomicAdd(&before[4 * word + i], some[i]);
        }
    }
}

// Adds to next[e] the totals of the experts before e, by the whole block.
__device__ __forceinline__ void add_starts(int num_experts, const int *totals, int *next) {
    __shared__ int sums[SORT_WARPS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int span = ceil_div(num_experts, SORT_THREADS) * 32, first = warp * span;
    int sum = 0;
    for (int e = first + lane; e < first + span; e += 32) sum += e < num_experts ? totals[e] : 0;
    sum = __reduce_add_sync(ALL_LANES, sum);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    int start = __reduce_add_sync(ALL_LANES, lane < warp ? sums[lane] : 0);
    for (int e = first + lane; e < first + span; e += 32) {
        const int own = e < num_experts ? totals[e] : 0, upto = sums_upto(own, lane);
        if (e < num_experts) next[e] += start + upto - own;
        start += __shfl_sync(ALL_LANES, upto, 31);
    }
}

// The list of tiles: the highest first, so that blocks that take every so-many'th have about the same to do; those of
// an expert together. By the whole block, a warp a height; `tiles` [num_here] is room for it, and `totals` is lost.
__device__ __forceinline__ void list_tiles(const Plan &p, Heights heights, int *totals, const int *starts,
                                           int *tiles) {
    __shared__ int of_height[32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, highest = heights.most / heights.step;
    const int behind = starts[p.num_here - 1] + totals[p.num_here - 1];  // all assignments
    for (int e = threadIdx.x; e < p.num_here; e += SORT_THREADS) {
        const int2 own = tiles_of(totals[e], heights);
        tiles[e] = own.x << 5 | own.y;
    }
    __syncthreads();
    if (warp >= 1 && warp <= highest) {
        int sum = 0;
#pragma unroll 4
        for (int first = 0; first < p.num_here; first += 32) {
            const int e = first + lane, both = e < p.num_here ? tiles[e] : 0;
            const int own = (both & 31) == warp ? both >> 5 : 0, upto = sums_upto(own, lane);
            // Where its first is of those of its height. Its assignments can still be told from where the next begin.
            if (own != 0) totals[e] = sum + upto - own;
            sum += __shfl_sync(ALL_LANES, upto, 31);
        }
        if (lane == 0) of_height[warp] = sum;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < p.num_here; e += SORT_THREADS) {
        const int count = tiles[e] >> 5, height = tiles[e] & 31, rows = height * heights.step;
        if (count == 0) continue;
        const int start = starts[e], end = e + 1 < p.num_here ? starts[e + 1] : behind;
        int2 *to = p.tiles + totals[e];
        for (int h = height + 1; h <= highest; h++) to += of_height[h];
        for (int i = 0; i < count; i++)
            to[i] = tile_entry(e, min(rows, end - start - i * rows), start + i * rows);
    }
    if (threadIdx.x == 0) {
        int sum = 0;
        for (int h = 1; h <= highest; h++) sum += of_height[h];
        *p.num_tiles = sum;
    }
}

// A stable counting sort (as radix sorts do a digit): each block adds up for itself where its groups' assignments of
// every expert start. The first block lists the tiles, the others place the assignments of so many groups each.
__global__ void __launch_bounds__(SORT_THREADS) many_sort(Plan p, Heights heights, int groups) {
    extern __shared__ int totals[];  // [num_here rounded up to a multiple of 4], and two more of these
    const int experts = ceil_div(p.num_here, 4) * 4, tid = threadIdx.x;
    int *next = totals + experts, *masks = next + experts;
    const bool lists = blockIdx.x == 0;
    const int first = lists ? 0 : (blockIdx.x - 1) * groups, end = min(first + groups, p.num_groups);
    for (int i = tid; i < 3 * experts; i += SORT_THREADS) totals[i] = 0;
    wait_for_inputs();
    let_next_start();
    // The expert of assignment i of a group, which may be none that is here.
    auto count_of = [&](int group) { return min(GROUP, p.n - group * GROUP) * p.top_k; };
    auto expert_of = [&](int group, int i) {
        return __ldcg(p.experts + int64_t(group) * GROUP * p.top_k + i) - p.first_expert;
    };
    auto own_of = [&](int group) { return group < end && tid < count_of(group) ? expert_of(group, tid) : 0; };
    int own = own_of(first);
    __syncthreads();
    add_counts(p, first, totals, next);
    __syncthreads();
    add_starts(p.num_here, totals, next);
    __syncthreads();
    if (lists) {
        list_tiles(p, heights, totals, next, masks);
        return;
    }
    for (int group = first; group < end; group++) {
        // Bit t of an expert's mask: token t of the group goes there.
        const int count = count_of(group), later = own_of(group + 1);
        for (int i = tid; i < count; i += SORT_THREADS) {
            const int e = i == tid ? own : expert_of(group, i);
            if (is_here(p, e)) atomicOr(&masks[e], int(1u << i / p.top_k));
        }
        __syncthreads();
        for (int i = tid; i < count; i += SORT_THREADS) {
            const int e = i == tid ? own : expert_of(group, i);
            if (!is_here(p, e)) continue;
            const unsigned before = unsigned(masks[e]) & ((1u << i / p.top_k) - 1);
            p.sorted[next[e] + __popc(before)] = group * GROUP * p.top_k + i;
        }
        __syncthreads();
        for (int e = tid; e < p.num_here; e += SORT_THREADS) next[e] += __popc(masks[e]), masks[e] = 0;
        __syncthreads();
        own = later;
    }
}

}  // namespace

int launch_routes(cudaStream_t stream, const Plan &p, const q35_moe_weights &w, const bf16 *x) {
    const bool vec = p.hidden % 8 == 0 && aligned(x) && aligned(w.shared_gate);
    const int parts = p.num_experts % 4 != 0 || p.top_k > 32 ? 0
                      : p.num_experts <= 256                 ? 2
                      : p.num_experts <= 512                 ? 4
                                                             : 0;
    auto kernel = parts == 2   ? vec ? many_route<2, true> : many_route<2, false>
                  : parts == 4 ? vec ? many_route<4, true> : many_route<4, false>
                  : vec        ? many_route<0, true>
                               : many_route<0, false>;
    // A warp a token as long as all blocks have a multiprocessor each; else two blocks share one.
    const int threads = p.num_groups <= SORT_BLOCKS ? 32 * GROUP : 16 * GROUP;
    return launch(kernel, p.num_groups, threads, ceil_div(p.num_here, 4) * 4, stream, p, as_bf16(w.shared_gate), x);
}

int launch_sort(cudaStream_t stream, const Plan &p, Heights heights) {
    const int bytes = 3 * ceil_div(p.num_here, 4) * 4 * int(sizeof(int));
    const cudaError_t code = cudaFuncSetAttribute(many_sort, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (code != cudaSuccess) return code;
    const int groups = ceil_div(p.num_groups, SORT_BLOCKS);
    return launch(many_sort, 1 + ceil_div(p.num_groups, groups), SORT_THREADS, bytes, stream, p, heights, groups);
}
