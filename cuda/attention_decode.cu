// Attention of sequences with few new tokens: their keys are split over blocks, and the results merged.
#include <algorithm>

#include "attention_tiles.cuh"

namespace {

constexpr int DECODE_WARPS = 4, DECODE_THREADS = 32 * DECODE_WARPS;
// A token's keys are split over teams of TEAM blocks.
constexpr int TEAM = 8;
// Partial results of one launch; more sequences take several launches. A GPU is full long before.
constexpr int64_t MAX_PARTIALS = int64_t(16) << 20;
constexpr int COUNTERS = 32768;  // at the start of the workspace; zero between launches

// From compute capability 9.0 on a team is a cluster: its blocks merge through each other's shared memory, each some of
// the rows. On older cards every block is on its own, and all is merged through the workspace.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int CLUSTER = 1;
#define IN_CLUSTERS
#else
constexpr int CLUSTER = TEAM;
#define IN_CLUSTERS __cluster_dims__(TEAM, 1, 1)
#endif

// WRITTEN: what a block wrote before is there for the others after it; without, only what they read has been read.
template <bool WRITTEN>
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    if (WRITTEN) asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    else asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
    __syncthreads();
#endif
}

// What the block of this rank has at an address of shared memory.
__device__ __forceinline__ uint32_t in_block(uint32_t address, int rank) {
#if __CUDA_ARCH__ >= 900
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
#else
    return address;
#endif
}

__device__ __forceinline__ float4 load4_in_block(uint32_t address) {
    float4 x;
#if __CUDA_ARCH__ >= 900
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(address)
                 : "memory");
#else
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(address)
                 : "memory");
#endif
    return x;
}

// How the keys of a token are split: functions of how many tiles of 16 keys it sees and of nothing else, so that
// neither the batch nor the tokens beside it change its bits. Up to 2048 keys one team has them all: merging over
// several costs more than 256 keys of a block. Above, enough blocks for one sequence to fill the GPU.
__host__ __device__ inline int max_teams(int kv_heads) {
    const int n = 128 / TEAM / kv_heads;
    return n < 1 ? 1 : n;
}

__host__ __device__ inline int num_teams(int tiles, int most) {
    if (tiles * DECODE_KEYS <= 2048) return 1;
    const int n = ceil_div(tiles * DECODE_KEYS, 1024);
    return n < most ? n : most;
}

// Tiles of rows of a sequence and key head: all rows of up to MAX_DECODE_LEN tokens, and one more where the number of
// tiles of keys grows between them.
inline int64_t row_tiles_bound(int slots, int group) { return ceil_div(int64_t(slots) * group, DECODE_ROWS) + 1; }

inline int64_t floats_of_part(int head_dim) { return int64_t(DECODE_ROWS) * (head_dim + 2); }

// Partial results of one launch, [sequence of the launch, key head, tile of rows, part].
struct Partials {
    float *sums;     // [.., DECODE_ROWS, D], weighted values, not yet divided
    float2 *scales;  // [.., DECODE_ROWS], the highest score and the sum of weights relative to it
    int *counters;   // [sequence of the launch, key head, tile of rows, TEAM]: parts that are there
    int parts, row_tiles, first_seq;
};

template <int D, typename Tiles>
constexpr int decode_shared_bytes() {
    return DECODE_ROWS * (D + 8) * int(sizeof(bf16)) + DECODE_WARPS * Tiles::STAGES * Tiles::BYTES +
           (DECODE_WARPS + 1) * DECODE_ROWS * int(sizeof(float2)) + 16;
}

// Sums of weighted values relative to their highest scores, added one after the other.
struct Merged {
    float highest, weights;
    float4 sum;

    __device__ Merged(float highest) : highest(highest == -INFINITY ? 0.0f : highest), weights(0), sum{0, 0, 0, 0} {}
    __device__ void add(float2 scale, float4 x) {
        const float fade = exp2f(scale.x - highest);
        weights += scale.y * fade;
        sum.x += fade * x.x, sum.y += fade * x.y, sum.z += fade * x.z, sum.w += fade * x.w;
    }
};

// What a block works at: rows row0 .. row_end (row = new token * group + head of the group; the `row_tile`-th tile of
// them) of a sequence and key head, and of their `tiles` tiles of keys its part of a team's.
struct Task {
    int seq, head, cached, first_token, row_tile, row0, row_end, tiles, team, teams;
    const int *pages;

    __device__ int begin(int rank) const { return unsigned(tiles) * (team * TEAM + rank) / (teams * TEAM); }
};

// A warp takes every fourth tile of the block's keys and has its own sums, which are merged in the order of the warps,
// then of the blocks of a team, then of the teams.
template <int D, typename Tiles>
__device__ void decode_rows(const AttentionArgs &args, const Partials &partials, const Task &task,
                            unsigned char *memory) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = args.group(), rank = blockIdx.x % TEAM;
    const int row0 = task.row0, row_end = task.row_end, head = task.head, cached = task.cached;
    const int64_t first_token = task.first_token;
    constexpr int STAGES = Tiles::STAGES, STAGE = Tiles::BYTES;
    bf16 *q_tile = reinterpret_cast<bf16 *>(memory);
    unsigned char *all_stages = memory + DECODE_ROWS * (D + 8) * sizeof(bf16);
    unsigned char *stages = all_stages + warp * STAGES * STAGE;
    float2 *warp_scales = reinterpret_cast<float2 *>(all_stages + DECODE_WARPS * STAGES * STAGE);
    float2 *block_scales = warp_scales + DECODE_WARPS * DECODE_ROWS;
    int *is_last = reinterpret_cast<int *>(block_scales + DECODE_ROWS);

    const int begin = task.begin(rank), end = task.begin(rank + 1), end_key = cached + (row_end - 1) / group + 1;
    const int first = begin + warp, count = end > first ? ceil_div(end - first, DECODE_WARPS) : 0;
    // The warp's tiles lie in pages that follow each other: a lane has the page of every 32nd.
    static_assert(DECODE_WARPS * DECODE_KEYS == Q35_PAGE_LEN, "a tile of each warp is a page");
    auto pages_from = [&](int i) {
        return i + lane < count ? task.pages[first / DECODE_WARPS + i + lane] : 0;
    };
    int page_ids = pages_from(0);
    for (int i = threadIdx.x; i < DECODE_ROWS * (D / 8); i += DECODE_THREADS) {
        const int r = i / (D / 8), column = i % (D / 8) * 8;
        const bool there = row0 + r < row_end;
        const int row = there ? row0 + r : row0;
        const int64_t at = (first_token + row / group) * args.q_heads + head * group + row % group;
        Tiles::load_query(q_tile + r * (D + 8), column, args.q + at * D, there);
    }
    // Step 2 i: the keys of the warp's tile i; step 2 i + 1: its values.
    auto load = [&](int step, int stage) {
        const int i = step / 2;
        if (i < count) {
            if (step % 2 == 0 && i > 0 && i % 32 == 0) page_ids = pages_from(i);
            const int key0 = (first + i * DECODE_WARPS) * DECODE_KEYS;
            const int page = __shfl_sync(ALL_LANES, page_ids, i % 32);
            Tiles::load(args, stages + stage * STAGE, step % 2 != 0, page, head, key0 % Q35_PAGE_LEN, end_key - key0);
        }
        copy_commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES; i++) load(i, i);
    copy_wait<STAGES - 1>();
    __syncthreads();  // the queries are there

    int position[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = row0 + lane / 4 + 8 * i;
        position[i] = row < row_end ? cached + row / group : -1;
    }
    float out[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    const bf16 *q_row = q_tile + lane % 16 * (D + 8) + lane / 16 * 8;
    int stage = 0;
    auto next_stage = [&](int step) {
        __syncwarp();  // the stage is free
        load(step, stage);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        copy_wait<STAGES - 1>();
        __syncwarp();
    };
#pragma unroll 1
    for (int i = 0; i < count; i++) {
        float s[2][4] = {};
        Tiles::multiply_keys(s, q_row, stages + stage * STAGE);
        next_stage(2 * i + STAGES);
        softmax_step<2, D>(args, s, (first + i * DECODE_WARPS) * DECODE_KEYS, position, top, sum, out);
        Tiles::multiply_values(out, s, stages + stage * STAGE);
        next_stage(2 * i + 1 + STAGES);
    }

#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 1);
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 2);
        if (lane % 4 == 0) warp_scales[warp * DECODE_ROWS + lane / 4 + 8 * i] = make_float2(top[i], sum[i]);
    }
    copy_wait<0>();
    __syncthreads();  // the scales are there, and the stages are free for the sums of the warps
    float *sums = reinterpret_cast<float *>(all_stages);  // [warp][row][D + 8]; those of the block in the first warp's
    static_assert(DECODE_ROWS * (D + 8) * 4 <= STAGES * STAGE && STAGE % 16 == 0, "sums fit in stages");
    auto highest_of_block = [&](int r) {
        float highest = -INFINITY;
#pragma unroll
        for (int w = 0; w < DECODE_WARPS; w++) highest = fmaxf(highest, warp_scales[w * DECODE_ROWS + r].x);
        return highest;
    };
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = lane / 4 + 8 * i;
        const float highest = highest_of_block(r);
        const float fade = exp2f(top[i] - (highest == -INFINITY ? 0.0f : highest));
        Tiles::store(sums + (warp * DECODE_ROWS + r) * (D + 8), out, i, fade);
    }
    if (threadIdx.x < DECODE_ROWS) {
        const float highest = highest_of_block(threadIdx.x), safe = highest == -INFINITY ? 0.0f : highest;
        float weights = 0.0f;
#pragma unroll
        for (int w = 0; w < DECODE_WARPS; w++) {
            const float2 scale = warp_scales[w * DECODE_ROWS + threadIdx.x];
            weights += scale.y * exp2f(scale.x - safe);
        }
        block_scales[threadIdx.x] = make_float2(highest, weights);
    }

    // From here on a block has some of the rows, four neighbouring columns a thread at a time.
    constexpr int ROWS_HERE = DECODE_ROWS / CLUSTER, ITEMS = ROWS_HERE * (D / 4);
    const int r0 = CLUSTER == 1 ? 0 : rank * ROWS_HERE;
    auto is_row = [&](int item) { return item < ITEMS && row0 + r0 + item / (D / 4) < row_end; };
    auto gates_of = [&](int item) {
        float4 gates = make_float4(0, 0, 0, 0);
        if (is_row(item)) {
            const int row = row0 + r0 + item / (D / 4);
            const bf16 *from = args.gate(first_token + row / group, head * group + row % group) + item % (D / 4) * 4;
            gates = make_float4(__bfloat162float(from[0]), __bfloat162float(from[1]), __bfloat162float(from[2]),
                                __bfloat162float(from[3]));
        }
        return gates;
    };
    auto finish = [&](int item, const Merged &merged, float4 gates) {
        const int row = row0 + r0 + item / (D / 4);
        const int64_t at = (first_token + row / group) * args.q_heads + head * group + row % group;
        const float4 x = merged.sum;
        const float w = merged.weights;
        *reinterpret_cast<uint2 *>(args.out + at * D + item % (D / 4) * 4) =
            make_uint2(pack2(x.x / w * sigmoid(gates.x), x.y / w * sigmoid(gates.y)),
                       pack2(x.z / w * sigmoid(gates.z), x.w / w * sigmoid(gates.w)));
    };
    float4 gates = gates_of(threadIdx.x);  // long before they are needed
    __syncthreads();
    for (int i = threadIdx.x; i < DECODE_ROWS * (D / 4); i += DECODE_THREADS) {
        float *at = sums + i / (D / 4) * (D + 8) + i % (D / 4) * 4;
        float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int w = 0; w < DECODE_WARPS; w++) {
            const float4 x = *reinterpret_cast<const float4 *>(at + w * DECODE_ROWS * (D + 8));
            total.x += x.x, total.y += x.y, total.z += x.z, total.w += x.w;
        }
        *reinterpret_cast<float4 *>(at) = total;
    }
    cluster_sync<true>();

    const int num_parts = task.teams * (TEAM / CLUSTER), part = CLUSTER == 1 ? task.team * TEAM + rank : task.team;
    const int64_t tile = (int64_t(task.seq - partials.first_seq) * args.kv_heads + head) * partials.row_tiles +
                         task.row_tile;
    const int64_t part0 = tile * partials.parts;
    for (int item = threadIdx.x; is_row(item); item += DECODE_THREADS) {
        const int r = r0 + item / (D / 4), column = item % (D / 4) * 4;
        const uint32_t scale_at = shared_address(block_scales + r);
        const uint32_t sum_at = shared_address(sums + r * (D + 8) + column);
        float2 scales[CLUSTER];
        float4 x[CLUSTER];
        float highest = -INFINITY;
#pragma unroll
        for (int b = 0; b < CLUSTER; b++) {
            const int from = CLUSTER == 1 ? rank : b;
            const float4 two = load4_in_block(in_block(scale_at & ~15u, from));  // this row's and its neighbour's
            scales[b] = r % 2 == 0 ? make_float2(two.x, two.y) : make_float2(two.z, two.w);
            x[b] = load4_in_block(in_block(sum_at, from));
            highest = fmaxf(highest, scales[b].x);
        }
        Merged merged(highest);
#pragma unroll
        for (int b = 0; b < CLUSTER; b++) merged.add(scales[b], x[b]);
        if (num_parts == 1) {
            finish(item, merged, gates);
            gates = gates_of(item + DECODE_THREADS);
        } else {
            const int64_t at = (part0 + part) * DECODE_ROWS + r;
            *reinterpret_cast<float4 *>(partials.sums + at * D + column) = merged.sum;
            if (column == 0) partials.scales[at] = make_float2(highest, merged.weights);
        }
    }
    cluster_sync<false>();  // nobody reads this block's shared memory any more
    if (num_parts == 1) return;

    // The last block to get here has all parts of its rows before it.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int *counter = partials.counters + tile * TEAM + (CLUSTER == 1 ? 0 : rank);
        *is_last = atomicAdd(counter, 1) == num_parts - 1;
        if (*is_last) *counter = 0;
    }
    __syncthreads();
    if (!*is_last) return;
    __threadfence();
    for (int item = threadIdx.x; is_row(item); item += DECODE_THREADS) {
        const int r = r0 + item / (D / 4), column = item % (D / 4) * 4;
        const float2 *scales = partials.scales + part0 * DECODE_ROWS + r;
        const float *from = partials.sums + (part0 * DECODE_ROWS + r) * D + column;
        float highest = -INFINITY;
#pragma unroll 8
        for (int i = 0; i < num_parts; i++) highest = fmaxf(highest, __ldcg(scales + i * DECODE_ROWS).x);
        Merged merged(highest);
#pragma unroll 8
        for (int i = 0; i < num_parts; i++) {
            merged.add(__ldcg(scales + i * DECODE_ROWS),
                       __ldcg(reinterpret_cast<const float4 *>(from + int64_t(i) * DECODE_ROWS * D)));
        }
        finish(item, merged, gates);
        gates = gates_of(item + DECODE_THREADS);
    }
}

// Flash-decoding (Dao et al. 2023) with the heads of a key head packed into the rows of a tile; own code.
// blockIdx: sequence, key head and block of a team; teams y, y + gridDim.y, ... (so that those which few sequences have
// come last); tiles z, z + gridDim.z, ... of the rows.
template <int D, typename Tiles>
__global__ void IN_CLUSTERS __launch_bounds__(DECODE_THREADS, 2) decode_kernel(AttentionArgs args, Partials partials) {
    extern __shared__ __align__(16) unsigned char memory[];
    let_next_start();
    const q35_batch &batch = args.batch;
    Task task;
    const int seq_and_head = blockIdx.x / TEAM;
    task.seq = partials.first_seq + seq_and_head / args.kv_heads, task.head = seq_and_head % args.kv_heads;
    task.row_tile = 0;
    const int group = args.group(), most = max_teams(args.kv_heads);
    wait_for_inputs();
    const int query_len = batch.query_len[task.seq], cached = batch.cached_len[task.seq];
    task.cached = cached, task.first_token = batch.query_start[task.seq];
    task.pages = batch.pages + batch.page_start[task.seq];
    if (query_len > MAX_DECODE_LEN) return;
    // Tokens that see equally many tiles of keys, at a time; mostly that is all of them.
    for (int token = 0, next; token < query_len; token = next) {
        task.tiles = ceil_div(cached + token + 1, DECODE_KEYS);
        task.teams = num_teams(task.tiles, most);
        next = token + 1;
        while (next < query_len && ceil_div(cached + next + 1, DECODE_KEYS) == task.tiles) next++;
        for (int row0 = token * group; row0 < next * group; row0 += DECODE_ROWS, task.row_tile++) {
            if (task.row_tile % gridDim.z != blockIdx.z) continue;
            task.row0 = row0, task.row_end = min(row0 + DECODE_ROWS, next * group);
            for (task.team = blockIdx.y; task.team < task.teams; task.team += gridDim.y) {
                decode_rows<D, Tiles>(args, partials, task, memory);
            }
        }
    }
}

// TEAM / CLUSTER of the code that runs on this card, which may be an older architecture's.
int parts_of_team() {
    cudaFuncAttributes code = {};
    if (cudaFuncGetAttributes(&code, decode_kernel<64, Bf16Tiles<64>>) != cudaSuccess) return TEAM;
    return code.ptxVersion >= 90 ? 1 : TEAM;
}

template <int D, typename Tiles>
cudaError_t decode(cudaStream_t stream, const AttentionArgs &args, float *workspace) {
    const q35_batch &batch = args.batch;
    const int group = args.q_heads / args.kv_heads;
    const int slots = batch.max_query_len < MAX_DECODE_LEN ? batch.max_query_len : MAX_DECODE_LEN;
    const int teams = num_teams(ceil_div(batch.max_kv_len, DECODE_KEYS), max_teams(args.kv_heads));
    const int64_t row_tiles = row_tiles_bound(slots, group), tiles = row_tiles * args.kv_heads;
    const int parts = teams * parts_of_team();
    const int64_t floats = tiles * parts * floats_of_part(D);
    int64_t most = COUNTERS / (tiles * TEAM);
    if (parts > 1 && most > MAX_PARTIALS / floats) most = MAX_PARTIALS / floats > 1 ? MAX_PARTIALS / floats : 1;
    // Beside prefill most sequences have one new token: no blocks for tiles of rows that hardly any has.
    const int rows = batch.max_query_len <= MAX_DECODE_LEN ? slots * group : 1;
    const int blocks_z = ceil_div(rows, DECODE_ROWS);
    if (most < 1 || blocks_z > 65535) return cudaErrorInvalidValue;
    const auto kernel = decode_kernel<D, Tiles>;
    constexpr int SHARED = decode_shared_bytes<D, Tiles>();
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED);
    if (status != cudaSuccess) return status;
    for (int64_t first = 0; first < batch.num_seqs; first += most) {
        const int64_t left = batch.num_seqs - first, n = left < most ? left : most;
        float *sums = workspace + COUNTERS, *scales = sums + n * tiles * parts * DECODE_ROWS * D;
        const Partials partials{sums,  reinterpret_cast<float2 *>(scales), reinterpret_cast<int *>(workspace),
                                parts, int(row_tiles),                     int(first)};
        // Not more teams than fill the GPU: max_kv_len may be far above what the sequences have.
        const int64_t useful = ceil_div(64, n * args.kv_heads);
        const dim3 grid(unsigned(TEAM * n * args.kv_heads), unsigned(teams < useful ? teams : useful),
                        unsigned(blocks_z));
        const cudaError_t launched =
            launch(kernel, grid, DECODE_THREADS, size_t(SHARED), stream, args, partials);
        if (launched != cudaSuccess) return launched;
    }
    return cudaSuccess;
}

}  // namespace

// Cards of compute capability 8.6, 8.9 and 12.x have no room for more of head_dim 256.
using FewStages = Bf16Tiles<256, 2>;

bool attention_decode_fits(int head_dim, int shared_limit) {
    const int needed = head_dim == 64    ? decode_shared_bytes<64, Bf16Tiles<64>>()
                       : head_dim == 128 ? decode_shared_bytes<128, Bf16Tiles<128>>()
                                         : std::max(decode_shared_bytes<256, FewStages>(),
                                                    decode_shared_bytes<256, Fp8Tiles<256>>());
    return needed <= shared_limit;
}

int64_t attention_decode_workspace(int max_seqs, q35_attention_dims dims) {
    const int group = dims.num_q_heads / dims.num_kv_heads;
    const int64_t tiles = row_tiles_bound(MAX_DECODE_LEN, group) * dims.num_kv_heads;
    const int64_t parts = max_teams(dims.num_kv_heads) * parts_of_team();
    // What one sequence needs at the most, and what all need if that is less than the bound of one launch.
    const int64_t one = tiles * parts * floats_of_part(dims.head_dim);
    const int64_t all = max_seqs * one, most = one > MAX_PARTIALS ? one : MAX_PARTIALS;
    return COUNTERS + (all < most ? all : most);
}

template <int D>
static cudaError_t decode_pages(cudaStream_t stream, const AttentionArgs &args, float *workspace) {
    return args.codes == nullptr ? decode<D, Bf16Tiles<D>>(stream, args, workspace)
                                 : decode<D, Fp8Tiles<D>>(stream, args, workspace);
}

cudaError_t attention_decode(cudaStream_t stream, const AttentionArgs &args, float *workspace) {
    const bool few = this_card().shared < decode_shared_bytes<256, Bf16Tiles<256>>();
    switch (args.head_dim) {
        case 64: return decode_pages<64>(stream, args, workspace);
        case 128: return decode_pages<128>(stream, args, workspace);
        case 256:
            if (few && args.codes == nullptr) return decode<256, FewStages>(stream, args, workspace);
            return decode_pages<256>(stream, args, workspace);
        default: return cudaErrorInvalidValue;
    }
}
