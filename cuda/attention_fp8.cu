// Attention of many tokens over pages in fp8: the pages are decoded to bf16 once, for the kernels that take those.
// What is decoded is little beside the products: each key meets every query of its sequence.
#include "attention.cuh"
#include "packed.cuh"

namespace {

constexpr int DECODE_THREADS = 256, MAX_BLOCKS = 2048;

struct Decoded {
    bf16 *keys, *values;
    int *page_list, *page_start;
    int room;
};

// The `index`-th page of the batch's prefill sequences, counted one after the other: every warp looks through their
// lengths, 32 at a time.
__device__ bool find_page(const q35_batch &batch, int index, int &seq, int &page) {
    const int lane = threadIdx.x % 32;
    for (int first = 0; first < batch.num_seqs; first += 32) {
        const int mine = first + lane, len = mine < batch.num_seqs ? batch.query_len[mine] : 0;
        const int pages = len > MAX_DECODE_LEN ? ceil_div(batch.cached_len[mine] + len, int(Q35_PAGE_LEN)) : 0;
        int end = pages;  // of the pages of this lane's sequence and those before it
#pragma unroll
        for (int i = 1; i < 32; i *= 2) {
            const int before = __shfl_up_sync(ALL_LANES, end, i);
            if (lane >= i) end += before;
        }
        const unsigned past = __ballot_sync(ALL_LANES, index < end);
        if (past != 0) {
            const int found = __ffs(past) - 1;
            seq = first + found;
            page = index - __shfl_sync(ALL_LANES, end - pages, found);
            return true;
        }
        index -= __shfl_sync(ALL_LANES, end, 31);
    }
    return false;
}

// A warp at a time: keys or values of a page and head. An element is rounded to bf16 once. What is behind a sequence's
// end may become NaN, as it may be in pages in bf16.
template <int D>
__global__ void __launch_bounds__(DECODE_THREADS) decode_pages(AttentionArgs args, Decoded to) {
    let_next_start();
    wait_for_inputs();
    constexpr int PIECES = D / 8;  // of a row, a lane each
    const int lane = threadIdx.x % 32, parts = 2 * args.kv_heads;
    const int num_warps = int(gridDim.x) * (DECODE_THREADS / 32);
    const int64_t end = int64_t(to.room) * parts;
    for (int64_t unit = blockIdx.x * (DECODE_THREADS / 32) + threadIdx.x / 32; unit < end; unit += num_warps) {
        const int index = int(unit / parts), part = int(unit % parts), head = part / 2;
        const bool is_value = part % 2 != 0;
        int seq, page;
        if (!find_page(args.batch, index, seq, page)) return;
        if (part == 0 && lane == 0) {
            to.page_list[index] = index;
            if (page == 0) to.page_start[seq] = index;
        }
        const uint8_t *codes = args.codes_at(args.batch.pages[args.batch.page_start[seq] + page], head, is_value);
        const float *scales = reinterpret_cast<const float *>(codes + Q35_PAGE_LEN * D);
        bf16 *rows = (is_value ? to.values : to.keys) + args.page_at(index, head);
#pragma unroll 8
        for (int i = lane; i < Q35_PAGE_LEN * PIECES; i += 32) {
            const uint2 x = reinterpret_cast<const uint2 *>(codes)[i];
            const float scale = scales[i / PIECES];
            float y[8];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint32_t word = h == 0 ? x.x : x.y;
                const float2 even = unpack2(from_e4m3(word << 8)), odd = unpack2(from_e4m3(word));
                y[4 * h] = even.x * scale, y[4 * h + 1] = odd.x * scale;
                y[4 * h + 2] = even.y * scale, y[4 * h + 3] = odd.y * scale;
            }
            store8(rows + 8 * i, y);
        }
    }
}

}  // namespace

cudaError_t attention_prefill_fp8(cudaStream_t stream, const AttentionArgs &args, int room, bf16 *pages, int *page_list,
                                  int *page_start) {
    bf16 *values = pages + int64_t(room) * args.kv_heads * Q35_PAGE_LEN * args.head_dim;
    const Decoded to{pages, values, page_list, page_start, room};
    const int64_t blocks = ceil_div(int64_t(room) * args.kv_heads * 2, DECODE_THREADS / 32);
    const auto kernel = args.head_dim == 64    ? decode_pages<64>
                        : args.head_dim == 128 ? decode_pages<128>
                                               : decode_pages<256>;
    const cudaError_t status =
        launch(kernel, unsigned(blocks < MAX_BLOCKS ? blocks : MAX_BLOCKS), DECODE_THREADS, 0, stream, args, to);
    if (status != cudaSuccess) return status;
    AttentionArgs decoded = args;
    decoded.k = pages, decoded.v = values, decoded.codes = nullptr;
    decoded.batch.pages = page_list, decoded.batch.page_start = page_start;
    return attention_prefill(stream, decoded);
}
