// How moe_packed.cu finds the kernels of moe_packed_one.cu.
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

// The experts of a single token by weights gate_up and down, and those of the shared expert; x is in the order of tiles.
// cudaErrorNotSupported, and nothing is done, where these kernels do not take the card or the weights.
int launch_one(cudaStream_t stream, const Plan &p, const Packed (&m)[4], const Norm &norm, const bf16 *x, bf16 *out);
