// Experts with packed weights on Hopper, for more than 16 tokens: the products of the sorted list of tiles, and those
// of all tokens in their order for the shared expert, in launches of their own.
#include "packed_wgmma_launch.cuh"

using namespace packed_wgmma;

namespace {

// Tiles of tokens, at most.
int64_t tiles_of(const Plan &p, bool shared) {
    const int64_t assignments = int64_t(p.n) * p.top_k;
    return shared ? ceil_div(p.n, TOKENS)
                  : assignments / SMALL_TILE + (p.num_here < assignments ? p.num_here : assignments);
}

Task expert_task(const Plan &p, const Packed &w, bool shared) {
    Task t = task_of(w);
    t.n = p.n, t.top_k = p.top_k;
    if (!shared) t.tiles = p.tiles, t.num_tiles = p.num_tiles, t.sorted = p.sorted;
    return t;
}

// The activations of the shared expert lie behind those of the routed ones.
int64_t routed_bytes(const Plan &p) { return fp8_token_bytes(int64_t(p.n) * p.top_k, p.width); }

// The task with rows x [n, t.w.k] in e4m3 at `memory`, rounded now or, where not `now`, before.
cudaError_t with_fp8_tokens(cudaStream_t stream, Task &t, int64_t n, const bf16 *x, void *memory, bool now) {
    const Fp8Tokens of = fp8_tokens_at(memory, n, t.w.k);
    t.x = of.codes, t.token_scales = of.scales;
    return now ? launch_fp8_tokens(stream, n, t.w.k, x, of) : cudaSuccess;
}

// Calls run(weights, shared) for each that `experts` names, if all of them are served.
template <typename F>
cudaError_t each_of(int experts, const Packed &routed, const Packed &shared, F run) {
    if ((experts & ~packed_wgmma_serves(routed, shared)) != 0) return cudaErrorNotSupported;
    cudaError_t code = cudaSuccess;
    if ((experts & ROUTED_EXPERTS) != 0) code = run(routed, false);
    if (code == cudaSuccess && (experts & SHARED_EXPERT) != 0 && shared.codes != nullptr) code = run(shared, true);
    return code;
}

}  // namespace

int packed_wgmma_serves(const Packed &routed, const Packed &shared) {
    return (takes(routed) ? ROUTED_EXPERTS : 0) | (shared.codes == nullptr || takes(shared) ? SHARED_EXPERT : 0);
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
    return each_of(experts, gate_up, shared_gate_up, [&](const Packed &w, bool shared) {
        Task t = expert_task(p, w, shared);
        t.x = x;
        if (fp8_tokens != nullptr && takes_fp8_tokens(w)) {
            const cudaError_t code = with_fp8_tokens(stream, t, p.n, x, fp8_tokens, !there);
            if (code != cudaSuccess) return code;
            there = true;
        }
        t.cols = t.stride = shared ? p.shared_width : p.width, t.row_tiles = t.cols / 16;
        t.out = shared ? p.shared_act : p.act;
        return launch_task<GATE_UP>(stream, t, CUtensorMap{}, tiles_of(p, shared));
    });
}

cudaError_t packed_wgmma_down(cudaStream_t stream, const Plan &p, const Packed &down, const Packed &shared_down,
                              const Terms &terms, int experts, void *fp8_tokens) {
    return each_of(experts, down, shared_down, [&](const Packed &w, bool shared) {
        Task t = expert_task(p, w, shared);
        t.row_tiles = p.hidden / 16, t.first_row = p.n * p.top_k;
        t.out = p.y, t.first_feature = terms.col0, t.cols = terms.cols, t.stride = terms.stride;
        t.store = !terms.rounded ? WIDE : t.stride % 8 == 0 ? PIECES : ELEMENTS;
        const int rows = shared ? p.n : p.n * p.top_k;
        t.x = shared ? p.shared_act : p.act;
        if (fp8_tokens != nullptr && takes_fp8_tokens(w)) {
            uint8_t *const at = static_cast<uint8_t *>(fp8_tokens) + (shared ? routed_bytes(p) : 0);
            const cudaError_t code =
                with_fp8_tokens(stream, t, rows, static_cast<const bf16 *>(t.x), at, terms.col0 == 0);
            if (code != cudaSuccess) return code;
        }
        return launch_rows(stream, t, t.x, rows, tiles_of(p, shared));
    });
}
