// Experts with packed weights on Hopper, for more than 16 tokens: the products of the sorted list of tiles, and those
// of all tokens in their order for the shared expert; in one launch where tiles are of few tokens, for the shared expert
// alone would leave most multiprocessors without work.
#include "packed_wgmma_launch.cuh"

using namespace packed_wgmma;

namespace {

// Where experts have so many tokens at most, in the mean, tiles are of few: with more, many experts would have two tiles,
// and their codes be converted twice.
constexpr int MOST_FEW = 24;

// Tiles of tokens, at most.
int64_t tiles_of(const Plan &p, bool shared, int high) {
    return shared ? ceil_div(p.n, high) : most_tiles(p, high);
}

Task expert_task(const Plan &p, const Packed &w, bool shared) {
    Task t = task_of(w);
    t.n = p.n, t.top_k = p.top_k, t.high = has_few(w) ? packed_wgmma_heights(p).most : TOKENS;
    if (!shared) t.tiles = p.tiles, t.num_tiles = p.num_tiles, t.sorted = p.sorted;
    return t;
}

// The activations of the shared expert lie behind those of the routed ones.
int64_t routed_bytes(const Plan &p) { return fp8_token_bytes(int64_t(p.n) * p.top_k, p.width); }

// The task with rows x [n, t.w.k] in e4m3 at `memory`, rounded now or, where not `now`, before.
cudaError_t with_fp8_tokens(cudaStream_t stream, Task &t, int64_t n, const bf16 *x, void *memory, bool now) {
    const Fp8Tokens of = fp8_tokens_at(memory, n, t.w.k);
    t.x = of.codes, t.token_scales = of.scales, t.high = TOKENS;
    return now ? launch_fp8_tokens(stream, n, t.w.k, x, of) : cudaSuccess;
}

// Launches what make(weights, shared, task) makes for each that `experts` names, if all of them are served: in one launch
// where that can be.
template <int MODE, typename F>
cudaError_t launch_each(cudaStream_t stream, const Plan &p, int experts, const Packed &routed, const Packed &shared,
                        F make) {
    if ((experts & ~packed_wgmma_serves(routed, shared)) != 0) return cudaErrorNotSupported;
    Tasks<2> tasks = {};
    int64_t tiles[2] = {};
    int count = 0;
    const auto start = [&]() {
        const cudaError_t code = count > 0 ? launch_tasks<MODE>(stream, tasks, tiles) : cudaSuccess;
        tasks = Tasks<2>{}, tiles[0] = tiles[1] = 0, count = 0;
        return code;
    };
    const auto add = [&](const Packed &w, bool is_shared) {
        Task t = expert_task(p, w, is_shared);
        cudaError_t code = make(w, is_shared, t);
        if (code == cudaSuccess && count > 0 && !alike(tasks.of[0], t)) code = start();
        if (code != cudaSuccess) return code;
        tasks.of[count] = t, tiles[count] = tiles_of(p, is_shared, t.high);
        if (MODE == ROWS && !encode_rows(&tasks.tokens[count], t, is_shared ? p.n : p.n * p.top_k))
            return cudaErrorInvalidValue;
        count++;
        return cudaSuccess;
    };
    cudaError_t code = cudaSuccess;
    if ((experts & SHARED_EXPERT) != 0 && shared.codes != nullptr) code = add(shared, true);
    if (code == cudaSuccess && (experts & ROUTED_EXPERTS) != 0) code = add(routed, false);
    return code == cudaSuccess ? start() : code;
}

}  // namespace

int packed_wgmma_serves(const Packed &routed, const Packed &shared) {
    return (takes(routed) ? ROUTED_EXPERTS : 0) | (shared.codes == nullptr || takes(shared) ? SHARED_EXPERT : 0);
}

Heights packed_wgmma_heights(const Plan &p) {
    const int64_t each = int64_t(p.n) * p.top_k / p.num_experts;
    return {each <= MOST_FEW ? LEAST_TILE : TOKENS, BOX_ROWS};
}

int64_t packed_wgmma_token_bytes(const Plan &p) {
    const int64_t up = fp8_token_bytes(p.n, p.hidden);
    const int64_t down = routed_bytes(p) + (p.has_shared ? fp8_token_bytes(p.n, p.shared_width) : 0);
    return up > down ? up : down;
}

cudaError_t packed_wgmma_up(cudaStream_t stream, const Plan &p, const Packed &gate_up, const Packed &shared_gate_up,
                            const bf16 *x, int experts, void *fp8_tokens) {
    const auto odd = [](int width) { return width % FEATURES<GATE_UP> != 0; };
    if (odd(p.width) || odd(p.shared_width) || !aligned(x)) return cudaErrorNotSupported;
    bool there = false;
    return launch_each<GATE_UP>(stream, p, experts, gate_up, shared_gate_up, [&](const Packed &w, bool shared, Task &t) {
        t.x = x;
        if (fp8_tokens != nullptr && takes_fp8_tokens(w)) {
            const cudaError_t code = with_fp8_tokens(stream, t, p.n, x, fp8_tokens, !there);
            if (code != cudaSuccess) return code;
            there = true;
        }
        t.cols = t.stride = shared ? p.shared_width : p.width, t.row_tiles = t.cols / 16;
        t.out = shared ? p.shared_act : p.act;
        return cudaSuccess;
    });
}

cudaError_t packed_wgmma_down(cudaStream_t stream, const Plan &p, const Packed &down, const Packed &shared_down,
                              const Terms &terms, int experts, void *fp8_tokens) {
    return launch_each<ROWS>(stream, p, experts, down, shared_down, [&](const Packed &w, bool shared, Task &t) {
        t.row_tiles = p.hidden / 16, t.first_row = p.n * p.top_k;
        t.out = p.y, t.first_feature = terms.col0, t.cols = terms.cols, t.stride = terms.stride;
        t.store = !terms.rounded ? WIDE : t.stride % 8 == 0 ? PIECES : ELEMENTS;
        const int rows = shared ? p.n : p.n * p.top_k;
        t.x = shared ? p.shared_act : p.act;
        if (fp8_tokens != nullptr && takes_fp8_tokens(w)) {
            uint8_t *const at = static_cast<uint8_t *>(fp8_tokens) + (shared ? routed_bytes(p) : 0);
            return with_fp8_tokens(stream, t, rows, static_cast<const bf16 *>(t.x), at, terms.col0 == 0);
        }
        return cudaSuccess;
    });
}
