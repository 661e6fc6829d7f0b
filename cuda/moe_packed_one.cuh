// How moe_packed.cu finds the kernels of moe_packed_one.cu and of moe_packed_several.cu.
#pragma once
#include <numeric>

#include "moe.cuh"
#include "moe_packed.cuh"

// A step near the golden section of a round of blocks, that comes by every one of them.
static inline int spread_of(int blocks) {
    int step = blocks * 618 / 1000;
    while (std::gcd(step, blocks) != 1) step++;
    return step;
}

// gate_up of a single token's experts, whose x is in the order of tiles, and of the shared one; `down` and the weighted
// sum. Each may be followed by, or follow, the one of moe_packed.cu. cudaErrorNotSupported, and nothing is done, where
// these kernels do not take the card, the weights, their sizes or the number of tokens.
int launch_one_up(cudaStream_t stream, const Plan &p, const Packed &m, const Packed &shared, const Norm &norm,
                  const bf16 *x);
int launch_one_down(cudaStream_t stream, const Plan &p, const Packed &m, const Packed &shared, bf16 *out);
// moe_packed_several.cu: the same of 2 to 16 tokens.
int launch_several_up(cudaStream_t stream, const Plan &p, const Packed &m, const Packed &shared, const Norm &norm,
                      const bf16 *x);
int launch_several_down(cudaStream_t stream, const Plan &p, const Packed &m, const Packed &shared, bf16 *out);
