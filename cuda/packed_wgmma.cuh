// Products of many rows with packed weights on Hopper, to stand in front of those of packed_many.cuh, with the same
// arguments. They return cudaErrorNotSupported, and launch nothing, where they do not serve: for k that is no multiple
// of 128, bf16, another card. That does not depend on how many rows there are, so a row has one order of its sums.
#pragma once
#include "packed_many.cuh"

// With `fp8_tokens`, fp8_token_bytes(n, w.k) of memory, the products with weights that packed_wgmma::takes_fp8_tokens are
// of x rounded to e4m3.
cudaError_t packed_wgmma_linear(cudaStream_t stream, int n, const Packed &w, int rows, const bf16 *x, void *out,
                                bool wide, int stride, void *fp8_tokens = nullptr);

// Of the list of tiles. They change the speed, and no sum.
Heights packed_wgmma_heights(const Plan &p);

// Which experts have a matrix that is served (of `Experts`; one that is absent counts). The two below serve all that
// `experts` names, or nothing. With `fp8_tokens`, packed_wgmma_token_bytes of memory, as above; `up` leaves there what it
// has rounded, the first call of `down` (terms.col0 0) what all of them take.
int packed_wgmma_serves(const Packed &routed, const Packed &shared);
int64_t packed_wgmma_token_bytes(const Plan &p);
cudaError_t packed_wgmma_up(cudaStream_t stream, const Plan &p, const Packed &gate_up, const Packed &shared_gate_up,
                            const bf16 *x, int experts, void *fp8_tokens = nullptr);
cudaError_t packed_wgmma_down(cudaStream_t stream, const Plan &p, const Packed &down, const Packed &shared_down,
                              const Terms &terms, int experts, void *fp8_tokens = nullptr);
