// What the kernels of the chunked delta rule share: what delta_chunk.cu leaves for delta_walk.cu, and where.
#pragma once
#include "delta.cuh"
#include "mma.cuh"

constexpr int C = Q35_CHUNK_LEN;

// T and P as tiles of 16 x 16 on and below the diagonal: tile (row, column) is number row (row + 1) / 2 + column. In a
// tile of P the eight columns of half h of row i are together at 128 h + 8 i, in one of T the eight rows of half h of
// column j at 128 h + 8 j: as they come about, and as eight addresses of 16 bytes in a row for ldmatrix.
constexpr int TILES = 10, TILE = 16 * 16;
enum Part { T_HIGH, T_LOW, P_HIGH, P_LOW, NUM_PARTS };

__host__ __device__ __forceinline__ constexpr int tile_number(int row, int column) {
    return row * (row + 1) / 2 + column;
}

// Of a chunk of `len` tokens, with the rows it has.
__host__ __device__ __forceinline__ constexpr int num_tiles(int len) { return tile_number(ceil_div(len, 16), 0); }

// Where the tiles of a chunk lie that begins at token t of the batch. A chunk of more than SHORT_CHUNK tokens has at
// most 10 tiles for 49 of them, and its tiles end before those of what follows for each of its lengths.
__host__ __device__ __forceinline__ constexpr int64_t tiles_before(int64_t t) { return ceil_div(10 * t, 49); }

// In the workspace. First which chunks there are, counted on the device, since the host may not read chunked_len.
struct ChunkPlan {
    int32_t *counts;  // chunks, sequences that have any
    int32_t *seqs;    // [num_seqs]: a sequence that has chunks
    int2 *chunks;     // [max_chunks]: sequence, index of the chunk in it
    float4 *factors;  // [V, num_tokens]: exp(G) rq, exp(G) rk, exp(G_C - G) rk, exp(G_C)
    bf16 *tiles;      // [V, tiles_before(num_tokens), NUM_PARTS, TILE], a chunk's by parts

    __device__ __forceinline__ float4 *factors_of(int64_t num_tokens, int head, int64_t first) const {
        return factors + head * num_tokens + first;
    }
    __device__ __forceinline__ bf16 *tiles_of(int64_t num_tokens, int head, int64_t first) const {
        return tiles + (head * tiles_before(num_tokens) + tiles_before(first)) * (NUM_PARTS * TILE);
    }
};

// Two neighbouring accumulator tiles [16, 8] as one A operand [16, 16], in two bf16 parts.
__device__ __forceinline__ void split(const float (*c)[4], uint32_t high[4], uint32_t low[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float *x = &c[i / 2][i % 2 * 2];
        high[i] = pack2(x[0], x[1]);
        const float2 h = unpack2(high[i]);
        low[i] = pack2(x[0] - h.x, x[1] - h.y);
    }
}

// WIDTH columns of 64 rows, those from `len` on zeros, by threads 0 .. THREADS - 1. The source of a zero is `from`
// itself: an address that is valid.
template <int WIDTH, int LD, int THREADS>
__device__ __forceinline__ void copy_rows(int thread, bf16 *to, const bf16 *from, int64_t stride, int len) {
    constexpr int ACROSS = WIDTH / 8, STEP = THREADS / ACROSS;
    static_assert(THREADS % ACROSS == 0 && C % STEP == 0, "a thread stays in its column");
    const int row = thread / ACROSS, column = thread % ACROSS * 8;
    const bf16 *source = from + row * stride + column;
    to += row * LD + column;
#pragma unroll 4
    for (int r = 0; r < C; r += STEP) {
        const bool there = row + r < len;
        copy16(to + r * LD, there ? source : from, there);
        source += STEP * stride;
    }
}

// The part that goes from chunk to chunk. most_seqs: no more sequences than this have chunks.
cudaError_t launch_walks(cudaStream_t stream, const DeltaArgs &args, const ChunkPlan &plan, int64_t most_seqs);

// The same on Hopper, for the sizes that walk_wgmma_fits says.
bool walk_wgmma_fits(q35_delta_dims dims);
cudaError_t walk_wgmma(cudaStream_t stream, const DeltaArgs &args, const ChunkPlan &plan, int64_t most_seqs);
