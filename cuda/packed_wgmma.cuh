// Products of many rows with packed weights on Hopper, to stand in front of those of packed_many.cuh, with the same
// arguments. They return cudaErrorNotSupported, and launch nothing, where they do not serve: for k that is no multiple
// of 128, bf16, another card. That does not depend on how many rows there are, so a row has one order of its sums.
#pragma once
#include "packed_many.cuh"

cudaError_t packed_wgmma_linear(cudaStream_t stream, int n, const Packed &w, int rows, const bf16 *x, void *out,
                                bool wide, int stride);

// Of the list of tiles: none is higher.
constexpr Heights PACKED_WGMMA_HEIGHTS = {128, 32};

// Which experts have a matrix that is served (of `Experts`; one that is absent counts). The two below serve all that
// `experts` names, or nothing.
int packed_wgmma_serves(const Packed &routed, const Packed &shared);
cudaError_t packed_wgmma_up(cudaStream_t stream, const Plan &p, const Packed &gate_up, const Packed &shared_gate_up,
                            const bf16 *x, int experts);
cudaError_t packed_wgmma_down(cudaStream_t stream, const Plan &p, const Packed &down, const Packed &shared_down,
                              const Terms &terms, int experts);
