// Products of many rows with packed weights: what their launchers call. Where a card has something faster, it stands in
// front of these at the three places that call them.
#pragma once
#include "moe.cuh"
#include "moe_packed.cuh"

// out = x W^T: x bf16 [n, w.k], out [n, rows], `stride` elements a row, in f32 where `wide`, else bf16. w.form is not
// BF16_ROWS.
cudaError_t packed_many_linear(cudaStream_t stream, int n, const Packed &w, int rows, const bf16 *x, void *out,
                               bool wide, int stride);

// What q35_packed_linear calls; as in packed.cuh.
cudaError_t launch_packed_many(cudaStream_t stream, int n, const q35_packed &w, const bf16 *x, void *out, bool wide,
                               int stride, void *fp8_tokens);

// Of a sparse block, the experts that a product is for. Either may be absent from a launch, so that the two can go to
// different kernels.
enum Experts { ROUTED_EXPERTS = 1, SHARED_EXPERT = 2, ALL_EXPERTS = 3 };

// Of the list of tiles. Any other will do for the two functions below as well.
constexpr Heights PACKED_HEIGHTS = {64, 16};

// After launch_sort: p.act (and p.shared_act) from x. `shared` has no codes where there is no shared expert.
cudaError_t packed_many_up(cudaStream_t stream, const Plan &p, const Packed &gate_up, const Packed &shared_gate_up,
                           const bf16 *x, int experts);

// Where the outputs of experts go: columns col0 .. col0 + cols - 1 of them to p.y, in rows of `stride`, by assignment
// and then those of the shared expert; bf16 where `rounded`, else f32. col0 is a multiple of 128, cols of 64.
struct Terms {
    int col0, cols, stride;
    bool rounded;
};

// From p.act (and p.shared_act) to p.y.
cudaError_t packed_many_down(cudaStream_t stream, const Plan &p, const Packed &down, const Packed &shared_down,
                             const Terms &terms, int experts);
