// What the kernels of attention with many new tokens share.
#pragma once
#include "attention.cuh"

// For head_dim 256 on cards of compute capability 9.x, in attention_wgmma.cu. `fits`: whether this card is one and the
// kernel was compiled for it.
cudaError_t attention_wgmma(cudaStream_t stream, const AttentionArgs &args);
bool attention_wgmma_fits(int head_dim);

// The most tiles of `rows` rows (row = new token * group + head of the group) that a batch can have for a key head:
// each sequence has one that is not full.
inline int64_t max_tiles(const AttentionArgs &args, int rows) {
    return int64_t(args.batch.num_tokens) * (args.q_heads / args.kv_heads) / rows + args.batch.num_seqs;
}

// The `index`-th tile of the batch's prefill sequences: every warp looks through their lengths, 32 at a time. A grid of
// the longest sequence's tiles for each sequence would be mostly empty blocks.
template <int ROWS>
__device__ bool find_tile(const q35_batch &batch, int group, int index, int &seq, int &tile) {
    const int lane = threadIdx.x % 32;
    for (int first = 0; first < batch.num_seqs; first += 32) {
        const int len = first + lane < batch.num_seqs ? batch.query_len[first + lane] : 0;
        const int tiles = len > MAX_DECODE_LEN ? (len * group + ROWS - 1) / ROWS : 0;
        int end = tiles;  // of the tiles of this lane's sequence and those before it
#pragma unroll
        for (int i = 1; i < 32; i *= 2) {
            const int before = __shfl_up_sync(ALL_LANES, end, i);
            if (lane >= i) end += before;
        }
        const unsigned past = __ballot_sync(ALL_LANES, index < end);
        if (past != 0) {
            const int found = __ffs(past) - 1;
            seq = first + found;
            // The last tiles of a sequence see the most keys, so they start first.
            tile = __shfl_sync(ALL_LANES, end, found) - 1 - index;
            return true;
        }
        index -= __shfl_sync(ALL_LANES, end, 31);
    }
    return false;
}
