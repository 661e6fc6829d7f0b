// The C launchers of the CUDA backend: what each computes, over which memory. `src/backend/cuda/` calls them; the tests
// under `tests/gpu` call them too.
//
// Shapes are row-major, last dimension contiguous. Activations are bf16; the residual stream, logits, recurrent states,
// norm weights and everything that is summed are f32. Every output that is bf16 is rounded once, at its store. All
// pointers are device memory unless said otherwise. `stream` is a cudaStream_t. A launcher only launches: it does not
// allocate, synchronise or read device memory, so it may be captured in a graph. It returns a cudaError_t, 0 for none.
//
// Same row, same bits: what a token gets does not depend on what else is in the batch.
// Any sizes are allowed, odd ones too, where a comment does not say otherwise; the sizes of the family are fast.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Opaque bf16, so that this file can be read by a C compiler.
typedef uint16_t q35_bf16;

enum { Q35_PAGE_LEN = 64, Q35_CHUNK_LEN = 64 };

// One ragged batch (see src/batch.rs). The struct is on the host and passed by value to kernels; what it points to is
// device memory. `num_tokens` rows of every activation are real.
typedef struct {
    int32_t num_tokens;
    int32_t num_seqs;
    int32_t max_query_len;        // of its sequences
    int32_t max_kv_len;           // of its sequences: cached_len + query_len
    const int32_t *token_ids;     // [num_tokens]
    const int32_t *positions;     // [num_tokens, 3]: T, H, W
    const int32_t *seq_of;        // [num_tokens]: the sequence of a token
    const int32_t *query_start;   // [num_seqs]: its first token
    const int32_t *query_len;     // [num_seqs]: new tokens
    const int32_t *cached_len;    // [num_seqs]: tokens before them, in pages and slot
    const int32_t *chunked_len;   // [num_seqs]: leading new tokens that take the chunked delta rule
    const int32_t *slot;          // [num_seqs]: its recurrent state
    const int32_t *page_start;    // [num_seqs]: its first entry in `pages`
    const int32_t *pages;         // page numbers of every sequence, one after the other
} q35_batch;

// ------------------------------------------------------------------------------------------------- elementwise.cu

// out[t] = table[token_ids[t]]: table bf16 [vocab, hidden], out f32 [num_tokens, hidden].
int q35_embed(void *stream, q35_batch batch, const q35_bf16 *table, int hidden, float *out);

// residual += delta (delta may be null), then out = residual / sqrt(mean(residual^2) + eps) * w.
// delta, out bf16 [n, hidden]; residual f32 [n, hidden]; w f32 [hidden], the 1 of the zero-centred norms added already.
int q35_rmsnorm_residual(void *stream, int n, int hidden, const q35_bf16 *delta, float *residual, const float *w,
                         float eps, q35_bf16 *out);

// out[i] = x[rows[i]]: rows int32 [num_rows]; rows of `row_bytes` bytes (even). x and out do not overlap.
int q35_gather(void *stream, const int32_t *rows, int num_rows, const void *x, int64_t row_bytes, void *out);

// out = silu(gate) * up: gate_up bf16 [n, 2 * width] (gate first), out bf16 [n, width].
int q35_silu_mul(void *stream, int n, int width, const q35_bf16 *gate_up, q35_bf16 *out);

// Per value head: core = core / sqrt(mean(core^2) + eps) * w * silu(z), in place.
// core bf16 [n, v_heads * v_dim]; w f32 [v_dim]; z: columns z_start.. of projected, bf16 [n, stride].
int q35_gated_rmsnorm(void *stream, int n, int v_heads, int v_dim, const float *w, float eps,
                      const q35_bf16 *projected, int stride, int z_start, q35_bf16 *core);

// f32 to bf16 (round to nearest even) and back, `n` elements.
int q35_to_bf16(void *stream, int64_t n, const float *x, q35_bf16 *out);
int q35_to_f32(void *stream, int64_t n, const q35_bf16 *x, float *out);

// Fills bf16 with elements first .. first + n - 1 of scale * N(0, 1) from a counter-based generator: element i depends
// on (seed, i) alone.
int q35_fill_normal(void *stream, int64_t first, int64_t n, uint64_t seed, float scale, q35_bf16 *out);

// ------------------------------------------------------------------------------------------------------- delta.cu

typedef struct {
    int32_t num_k_heads, num_v_heads, k_dim, v_dim, conv_kernel;  // value head h uses key head h / (V / K)
    int32_t half_states;                                          // states are f16 in memory, not f32
} q35_delta_dims;

// The causal depthwise convolution and SiLU over the first C = 2 K k_dim + V v_dim columns of projected
// (bf16 [num_tokens, stride]), continuing from the tail of each sequence's slot and leaving the last conv_kernel - 1
// inputs there (oldest first). weight f32 [conv_kernel, C], the last tap is the current token's;
// tails bf16 [num_slots, conv_kernel - 1, C]; out bf16 [num_tokens, C].
int q35_causal_conv1d(void *stream, q35_batch batch, q35_delta_dims dims, const float *weight,
                      const q35_bf16 *projected, int stride, q35_bf16 *tails, q35_bf16 *out);

// The gated delta rule over mixed (bf16 [num_tokens, C]: q [K, k_dim] | k [K, k_dim] | v [V, v_dim]).
// b and a are columns ba_start.. and ba_start + V.. of projected (bf16 [num_tokens, stride]):
// beta = sigmoid(b); g = -exp(a_log) * softplus(a + dt_bias), softplus(x) = x above 20; a_log, dt_bias f32 [V].
// q and k are l2-normalised (x / sqrt(sum(x^2) + 1e-6)), q then scaled by k_dim^-1/2. States f32
// [num_slots, V, k_dim, v_dim] are read and replaced. Per token, S [k_dim, v_dim]:
//   S = exp(g) S;  d = beta (v - k^T S);  S = S + k d^T;  out = q^T S
// The first chunked_len tokens of a sequence take the chunked form in chunks of 64 counted from its first new token
// (cached_len is then a multiple of 64), the others this recurrence. Both are f32 sums of the same thing; the chunked
// form may use tensor cores with bf16 operands, states stay f32. out bf16 [num_tokens, V * v_dim].
// With half_states a state is computed in f32 and rounded to f16 after each chunk and after each token of the
// recurrence: to nearest even, to the largest f16 what is larger, infinity too; NaN stays. Outputs are those of the state
// before it is rounded. So where a sequence is cut into batches does not matter.
// workspace: f32 [q35_delta_workspace(...)] elements, contents undefined before and after.
int64_t q35_delta_workspace(int max_tokens, int max_seqs, q35_delta_dims dims);
int q35_gated_delta_rule(void *stream, q35_batch batch, q35_delta_dims dims, const float *a_log, const float *dt_bias,
                         const q35_bf16 *mixed, const q35_bf16 *projected, int stride, int ba_start, void *states,
                         float *workspace, q35_bf16 *out);

// q35_causal_conv1d, q35_gated_delta_rule and q35_gated_rmsnorm (z: columns z_start.. of projected, norm f32 [v_dim]),
// with the same bits; where the sizes allow, tokens in chunks are convolved as the rule comes to them.
// mixed: bf16 [num_tokens, C], scratch. workspace: as q35_gated_delta_rule.
int q35_delta_prompt(void *stream, q35_batch batch, q35_delta_dims dims, const float *weight, const float *a_log,
                     const float *dt_bias, const float *norm, float eps, const q35_bf16 *projected, int stride,
                     int z_start, int ba_start, q35_bf16 *tails, void *states, float *workspace, q35_bf16 *mixed,
                     q35_bf16 *out);

// For batches whose every sequence has one new token: q35_causal_conv1d, q35_gated_delta_rule and q35_gated_rmsnorm
// (z: columns z_start.. of projected, norm f32 [v_dim]) in one kernel where the sizes allow, with the same bits.
// mixed: bf16 [num_tokens, C], scratch. counters: int32 [num_seqs * K], zero before and after. The batch, tails and states
// are read while the kernel before this one may still run: after whatever wrote them a copy has to come, or the host's wait.
int q35_delta_decode(void *stream, q35_batch batch, q35_delta_dims dims, const float *weight, const float *a_log,
                     const float *dt_bias, const float *norm, float eps, const q35_bf16 *projected, int stride,
                     int z_start, int ba_start, q35_bf16 *tails, void *states, int32_t *counters, q35_bf16 *mixed,
                     q35_bf16 *out);

// --------------------------------------------------------------------------------------------------- attention.cu

typedef struct {
    int32_t num_q_heads, num_kv_heads, head_dim;  // query head h uses key head h / (Hq / Hkv)
} q35_attention_dims;

// projected bf16 [num_tokens, stride]: per query head q [d] | gate [d], then k [Hkv, d], then v [Hkv, d].
// q and k are normed per head (x / rms * w; q_norm, k_norm f32 [d], the 1 added already) and rotated: with
// half = num_freqs, element i < half pairs with element i + half; angle = positions[t][axis[i]] * inv_freq[i], in f32;
// cos and sin are multiplied by rope_scale; elements from 2 * half on stay. q goes to q bf16 [num_tokens, Hq * d];
// k and v to the pages of their tokens: k_pages, v_pages bf16 [num_pages, Hkv, 64, d]; token p of a sequence is at place
// p % 64 of page pages[page_start + p / 64], p = cached_len + its index among the new tokens.
int q35_qk_norm_rope_write(void *stream, q35_batch batch, q35_attention_dims dims, const float *q_norm,
                           const float *k_norm, float eps, const float *inv_freq, const uint8_t *axis, int num_freqs,
                           float rope_scale, const q35_bf16 *projected, int stride, q35_bf16 *q, q35_bf16 *k_pages,
                           q35_bf16 *v_pages);

// Causal softmax attention of each token over its sequence's pages (the new tokens are there already), scores scaled by
// d^-1/2, times sigmoid(gate) read from projected. What is in pages past a sequence's end, NaN too, is not touched.
// q, out bf16 [num_tokens, Hq * d]. Decode splits the keys over blocks; the split depends on a token's position alone,
// never on the batch. max_kv_len of the batch may be larger than any of its sequences. workspace: f32
// [q35_attention_workspace(...)] elements, zero before the first use, kept between uses.
int64_t q35_attention_workspace(int max_tokens, int max_seqs, int max_kv_len, q35_attention_dims dims);
int q35_gated_attention(void *stream, q35_batch batch, q35_attention_dims dims, const q35_bf16 *q,
                        const q35_bf16 *projected, int stride, const q35_bf16 *k_pages, const q35_bf16 *v_pages,
                        float *workspace, q35_bf16 *out);

// The two over pages in fp8: uint8 [num_pages, Hkv, 2 (keys, values), 64 * (d + 4)], 16-byte aligned: for each place d
// e4m3 codes, behind those of all places an f32 scale for each. A row's scale is max |x| / 448 and its codes are those of
// x / scale, to nearest even, with keys in f32. A row of zeros, or of numbers too small for a scale, has scale 0 and
// codes 0; one with an infinity or a NaN has scale NaN. An element is code * scale. Decode is exact in codes: keys'
// scales are multiplied into scores, values' into weights, before those are rounded to bf16. For sequences of more than
// 8 new tokens elements are decoded to bf16, rounded once, in the workspace, which has room for `room` pages: together
// they have at most so many. workspace: f32 [q35_attention_fp8_workspace(...)] elements of the same room and max_seqs,
// 16-byte aligned, zero before the first use, kept between uses.
int q35_qk_norm_rope_write_fp8(void *stream, q35_batch batch, q35_attention_dims dims, const float *q_norm,
                               const float *k_norm, float eps, const float *inv_freq, const uint8_t *axis,
                               int num_freqs, float rope_scale, const q35_bf16 *projected, int stride, q35_bf16 *q,
                               uint8_t *pages);
int64_t q35_attention_fp8_workspace(int room, int max_seqs, q35_attention_dims dims);
int q35_gated_attention_fp8(void *stream, q35_batch batch, q35_attention_dims dims, const q35_bf16 *q,
                            const q35_bf16 *projected, int stride, const uint8_t *pages, int room, int max_seqs,
                            float *workspace, q35_bf16 *out);

// ------------------------------------------------------------------------------------------------------ linear.cu

// out = x W^T: x bf16 [n, in], w bf16 [out_dim, in]; out bf16 or f32 [n, out_dim], `stride` elements a row. For 1 <= n <= 16 rows one pass over
// w at the speed of the memory; more rows work too (tensor cores, one tile order for every n), for odd sizes and where
// cuBLASLt is not wanted. The sum of a row has one order whatever n is, in each of the two ranges of n.
int q35_linear(void *stream, int n, int in, int out_dim, const q35_bf16 *x, const q35_bf16 *w, q35_bf16 *out,
               int stride);
int q35_linear_f32(void *stream, int n, int in, int out_dim, const q35_bf16 *x, const q35_bf16 *w, float *out,
                   int stride);

// -------------------------------------------------------------------------------------------------- packed_few.cu

// A matrix [rows, k] of 4 or 8 bits an element; rows a multiple of 16, k of 64. Its tiles of 16 rows by 64 of k lie in
// the order [row tile][k tile], and are what the lanes of a warp hold as A of mma.m16n8k16 in four steps of k 16. With
// g = lane / 4 and t = lane % 4, registers a0 .. a3 of a step are the elements 2 t and 2 t + 1 (low half, high half) of
// row g, the same of row g + 8, then 2 t + 8 and 2 t + 9 of row g and of row g + 8.
//   int4: [lane][4 words], a word a step: (word >> 4 i) & 0x000f000f are the two codes of a_i. An element is
//     (code - zero) * scale; scales f16 or bf16 [row tile][group][16], zeros uint8 likewise, at most 15 (null: all 8);
//     a group is 32, 64 or 128 neighbours along k, the last may be shorter, or (group >= k) a row.
//   fp8 (e4m3, no NaN): [half][lane][2 steps][2 words]: (word >> 8 i) & 0x00ff00ff of the words of a step are the codes
//     of a0 and a1, then of a2 and a3. Scales f32, for blocks of 128 x 128 [row tile][ceil(k / 128)], for rows
//     [row tile][16]; `group` is not looked at.
//   fp4 (NVFP4): [lane][4 words], a word a step. Of the two codes of a_i (e2m1: s e e m), each in its half of the word,
//     e e m are bits 3 i .. 3 i + 2 and s is bit 12 + (i ^ 1). Scales are uint8, one for 16 of k,
//     [row tile][k tile][g][row g, row g + 8][step]: b, at most 143, is (8 + b % 8) 2^(b / 8 - 12). Behind them, f32
//     [row tile], is what codes times scales are multiplied with. `group` is not looked at.
//   q4_k, q5_k, q6_k, q8_0 (GGUF): k a multiple of 128. q4_k: codes as int4. q5_k, q6_k: tiles of 768 bytes, the lower
//     four bits as int4, behind them [lane][2 words]: of step j (word of j / 2) >> (8 (j % 2) + 2 i) & 0x00030003 are
//     the bits above. q8_0: int8, as fp8. Scales: 4 bytes a row and k tile, [row tile][k tile][16]; of the first three
//     there is, behind them, [row tile][k / 128][16] two f16, d and m. An element is
//       q4_k, q5_k: (d * s) * code - m * t: s, s, t, t are uint8, of the halves of the tile
//       q6_k: (d * (s - 128)) * (code - 32): four uint8, by step; m is 0
//       q8_0: s * code: two f16, of the halves
//     `group` is not looked at.
// Codes, scales and zeros are 16-byte aligned. Kind 0: codes are bf16 [rows, k], of any rows and k.
typedef struct {
    const void *codes;
    const void *scales;
    const uint8_t *zeros;
    int32_t rows, k, group;
    int32_t kind;
} q35_packed;

enum { q35_int4_f16 = 1, q35_int4_bf16 = 2, q35_fp8_block = 3, q35_fp8_row = 4, q35_fp4 = 5,
       q35_q4_k = 6, q35_q5_k = 7, q35_q6_k = 8, q35_q8_0 = 9 };

// out = x W^T: x bf16 [n, k], 16-byte aligned; out [n, rows], `stride` elements a row, f32 where `wide`, else bf16.
// Products are exact, f32 sums of a group are scaled and summed in f32; for n > 16 elements of GGUF's kinds are rounded
// to bf16. The sum of a row has one order whatever n is, in each of the two ranges n <= 16 and n > 16 (packed_many.cu).
int q35_packed_linear(void *stream, int n, q35_packed w, const q35_bf16 *x, void *out, int wide, int stride);

// The same for n <= 16 with rows of bf16 behind those of w, in one kernel: their columns of out are w.rows and on.
// tail: bf16 [tail_rows, k], 16-byte aligned; w has rows and is not of kind 0.
int q35_packed_linear_tail(void *stream, int n, q35_packed w, const q35_bf16 *tail, int tail_rows, const q35_bf16 *x,
                           void *out, int wide, int stride);

// The same for n > 16 with x rounded to e4m3, a scale for each row, on Hopper and with k a multiple of 128 and w of fp8, or
// of int4 with groups of 128 or of rows and no zero points. Else it is q35_packed_linear. A scale is max |x| / 448, codes
// are to nearest even; sums of 128 are the tensor cores', sums of those f32. k is at most 65,536. memory, null for
// q35_packed_linear: bytes [q35_fp8_token_bytes(n, w.k)], 16-byte aligned.
int64_t q35_fp8_token_bytes(int n, int k);
int q35_fp8_token_linear(void *stream, int n, q35_packed w, const q35_bf16 *x, void *memory, void *out, int wide,
                         int stride);
// 1 where the current device has these products for k columns, else 0.
int64_t q35_has_fp8_tokens(int k);

// -------------------------------------------------------------------------------------------------------- pack.cu

// These write rows row0 .. row0 + rows - 1 of a packed matrix, through the pointers of `to`; row0 is a multiple of 16.
// Rows that are missing to a multiple of 16 get code 0 and scale 0. What is read has all of k. Kernels read weights
// before those ahead of them in the stream have ended: synchronise it between these and the first use.

// How eight 4-bit numbers lie in an int32, lowest bits first, and those in memory.
enum {
    q35_order_packed = 0,  // codes [rows, k / 8], zeros [ceil(rows / 8), groups]: neighbours
    q35_order_gptq = 1,    // codes [k / 8, rows], zeros [groups, rows / 8]: neighbours
    q35_order_awq = 2      // codes [k, rows / 8], zeros [groups, rows / 8]: rows 0 2 4 6 1 3 5 7
};
int q35_pack_int4(void *stream, q35_packed to, int row0, int rows, const int32_t *codes, int order);

// zeros null: all 8. minus_one: zero points are stored minus one, in four bits.
int q35_pack_zeros(void *stream, q35_packed to, int row0, int rows, const int32_t *zeros, int order, int minus_one);

// codes: e4m3 [rows, k], 2-byte aligned.
int q35_pack_fp8(void *stream, q35_packed to, int row0, int rows, const uint8_t *codes);

// NVFP4 as checkpoints have it: codes uint8 [rows, k / 2], the lower column in the low half, scales e4m3 (no NaN)
// [rows, k / 16]. An element is code * scale * whole. What lies behind the scales is at its place for all rows of `to`.
int q35_pack_fp4(void *stream, q35_packed to, int row0, int rows, const uint8_t *codes, const uint8_t *scales,
                 float whole);

// GGUF's blocks as files have them (a row's of k / 256, or k / 32 of q8_0, one behind the other), 2-byte aligned.
// `order`: the columns from `start` on are heads in the order of llama.cpp's converter, which has the first value head
// of each key head, then the second of each (src/weights/quant/gguf.rs); start and head_dim are multiples of 128,
// head_dim 0 stands for none. What lies behind the scales is at its place for all rows of `to`.
typedef struct {
    int32_t start, num_k_heads, per_k_head, head_dim;
} q35_head_order;
int q35_pack_gguf(void *stream, q35_packed to, int row0, int rows, const uint8_t *blocks, q35_head_order order);

// The scale of a row and a group is scales[row / block_rows * row_stride + group * group_stride], rounded where `to`
// has less precise ones. type: 0 f32, 1 f16, 2 bf16. block_rows is 1, or a multiple of 16 (a must for blocks of fp8).
int q35_pack_scales(void *stream, q35_packed to, int row0, int rows, const void *scales, int type, int block_rows,
                    int64_t row_stride, int64_t group_stride);

// bf16 [rows, k] quantised; w is 4-byte aligned. int4: zero point 8 (zeros of `to` must be null), for a group the scale
// max |w| (1 - i / 32) / 7, i in 0 .. 7, rounded to 16 bits, of the least squared error, the first of equals; groups of
// whole rows too. fp8: blocks of 128 x 128 counted from row0, with scale max |w| / 448. Codes are to nearest even.
int q35_quantise_int4(void *stream, q35_packed to, int row0, int rows, const q35_bf16 *w);
int q35_quantise_fp8(void *stream, q35_packed to, int row0, int rows, const q35_bf16 *w);

// --------------------------------------------------------------------------------------------------------- moe.cu

typedef struct {
    int32_t hidden, num_experts, top_k, width, shared_width;  // shared_width 0: no shared expert
    int32_t first_expert, num_here;  // the routed experts that are here: num_here of them, from first_expert on
} q35_moe_dims;

typedef struct {
    const q35_bf16 *router;       // [E, H], E = num_experts
    const q35_bf16 *gate_up;      // [E', 2 * width, H], E' = num_here: an expert's gate rows, then its up rows
    const q35_bf16 *down;         // [E', H, width]
    const q35_bf16 *shared_gate_up;  // [2 * shared_width, H]
    const q35_bf16 *shared_down;     // [H, shared_width]
    const q35_bf16 *shared_gate;     // [1, H]
} q35_moe_weights;

// Routing alone: logits f32 [n, E] to the top_k largest, best first, ties to the lower index, NaN below every number;
// weights = softmax over those chosen (equal to softmax over all, renormalised). weights f32, experts int32 [n, top_k].
int q35_route(void *stream, int n, int num_experts, int top_k, const float *logits, float *weights, int32_t *experts);

// out = sum over the chosen experts, in the order of their weights, of weight * expert(x), plus
// sigmoid(shared_gate . x) * shared(x); expert(x) = down (silu(gate x) * (up x)). Router logits are f32 sums; the
// activation between gate_up and down is rounded to bf16; the sums over experts are f32, rounded once (on Hopper, for more
// than 16 tokens, of terms rounded to bf16). Where not all experts are here (0 and num_experts: a whole block), routing
// and weights are those of the whole, and terms of experts elsewhere are left out; where none is here that was chosen
// and there is no shared expert, out is 0.
// x, out bf16 [n, hidden]. n <= 16: only the experts hit are read, once. More: tokens sorted by expert, tensor cores,
// no padding to capacity, no host round trip. workspace: bytes [q35_moe_workspace(...)].
int64_t q35_moe_workspace(int max_tokens, q35_moe_dims dims);
int q35_moe(void *stream, int n, q35_moe_dims dims, q35_moe_weights weights, const q35_bf16 *x, void *workspace,
            q35_bf16 *out);

// Where in the workspace the last q35_moe of n tokens left the experts of each: int32 [n, top_k], so many bytes in.
int64_t q35_moe_experts_at(int n, q35_moe_dims dims);

// q35_rmsnorm_residual, then q35_moe of what it leaves in x (bf16 [n, hidden]); for n <= 16 with fewer kernels. The same
// bits as the two. out may be delta, which may be null; x may not.
int q35_norm_moe(void *stream, int n, q35_moe_dims dims, q35_moe_weights weights, const q35_bf16 *delta,
                 float *residual, const float *norm, float eps, q35_bf16 *x, void *workspace, q35_bf16 *out);

// q35_moe, then q35_rmsnorm_residual of what it leaves, to out; for n > 16 without writing it out where the workspace
// holds whole rows of all experts' outputs. The same bits as the two. out may be x.
int q35_moe_then_norm(void *stream, int n, q35_moe_dims dims, q35_moe_weights weights, const q35_bf16 *x,
                      void *workspace, float *residual, const float *norm, float eps, q35_bf16 *out);

// ---------------------------------------------------------------------------------------------------- moe_packed.cu

// Routed matrices are those of all experts that are here, one after the other; each may be of another kind.
typedef struct {
    q35_packed gate_up;           // [E' * 2 * width, H]: an expert's gate rows, then its up rows
    q35_packed down;              // [E' * H, width]
    q35_packed shared_gate_up;    // [2 * shared_width, H]
    q35_packed shared_down;       // [H, shared_width]
    const q35_bf16 *router;       // [E, H]
    const q35_bf16 *shared_gate;  // [1, H]
} q35_packed_moe_weights;

// q35_norm_moe for n <= 16 with such weights, but for fp4 or fp8 beside GGUF's: of each expert it gives what exact
// weights, such as (q - z) * scale, would, up to f32 sums. hidden (at most 4096), width and shared_width are multiples
// of 64, top_k is at most 32; activations, codes, router and norm are 16-byte aligned, scales 4-byte.
// cudaErrorInvalidValue for anything else. The workspace is that of q35_moe.
int q35_packed_norm_moe(void *stream, int n, q35_moe_dims dims, q35_packed_moe_weights weights, const q35_bf16 *delta,
                        float *residual, const float *norm, float eps, q35_bf16 *x, void *workspace, q35_bf16 *out);

// q35_moe, for any n, and q35_moe_then_norm, for n > 16, with such weights and under the same conditions
// (moe_packed_many.cu), in any mixture of kinds. Workspace and rounding are those of the two; elements of GGUF's kinds
// are rounded to bf16.
int q35_packed_moe(void *stream, int n, q35_moe_dims dims, q35_packed_moe_weights weights, const q35_bf16 *x,
                   void *workspace, q35_bf16 *out);
int q35_packed_moe_then_norm(void *stream, int n, q35_moe_dims dims, q35_packed_moe_weights weights, const q35_bf16 *x,
                             void *workspace, float *residual, const float *norm, float eps, q35_bf16 *out);

// The two with what the projections of experts take rounded to e4m3, as q35_fp8_token_linear does and where it does: for
// more than 16 tokens, else exact ones. Without `norm` the first, which writes `out`. memory, null for exact products: bytes
// [q35_fp8_token_moe_bytes(n, dims)], 16-byte aligned.
int64_t q35_fp8_token_moe_bytes(int n, q35_moe_dims dims);
int q35_fp8_token_moe(void *stream, int n, q35_moe_dims dims, q35_packed_moe_weights weights, const q35_bf16 *x,
                      void *workspace, void *memory, float *residual, const float *norm, float eps, q35_bf16 *out);

// ------------------------------------------------------------------------------------------------------ sampler.cu

// How to choose one token. Of the edits of a row at most one names a token.
typedef struct {
    double uniform;               // in [0, 1): the row's random number
    float temperature;            // 0: the largest logit
    float top_p, min_p;           // 1, 0: all
    float repetition_penalty, frequency_penalty, presence_penalty;
    int32_t top_k;                // 0: all, else at most Q35_MAX_TOP_K
    int32_t num_logprobs;         // -1: none; else so many of the most likely, at most Q35_MAX_LOGPROBS, beside the chosen
    int32_t edit_start, num_edits;  // in `edits`
} q35_sampling;

// A token whose logit is changed before anything is chosen: x + bias, then -inf if banned, then, if seen (in prompt or
// output), x / repetition_penalty where above 0, else x * repetition_penalty, then, if count (in the output) is above 0,
// x - (frequency_penalty * count + presence_penalty).
typedef struct {
    int32_t token;
    float bias;
    int32_t banned, seen, count;
} q35_edit;

enum { Q35_MAX_TOP_K = 1024, Q35_MAX_LOGPROBS = 32 };

typedef struct {
    int32_t token;                // -1: no logit is a number above -inf
    int32_t rank;                 // 1 + the number of logits above the chosen token's
    float logprob;                // of the chosen token; these two, and the lists, where num_logprobs >= 0
    int32_t num_top;              // entries of the lists: fewer than num_logprobs where fewer logits are above -inf
    int32_t top_tokens[Q35_MAX_LOGPROBS];
    float top_logprobs[Q35_MAX_LOGPROBS];
} q35_sampled;

// A token for each of n rows of logits (f32 [n, vocab], of which the first num_tokens exist; unchanged): what
// src/sampler.rs chooses, sums apart. Log-probabilities are of the logits as they are, before edits and temperature.
// sampling [n], edits, out [n] on the device. tokens: int32 [n], the chosen tokens (0 for none) once more, so that a
// next step can read them. workspace: bytes [q35_sample_workspace(...)], zero before the first use, kept between uses.
int64_t q35_sample_workspace(int max_rows, int vocab);
int q35_sample(void *stream, int n, int vocab, int num_tokens, const float *logits, const q35_sampling *sampling,
               const q35_edit *edits, void *workspace, q35_sampled *out, int32_t *tokens);

// --------------------------------------------------------------------------------------------------- all_reduce.cu

enum {
    Q35_MAX_RANKS = 8,
    Q35_MAX_CHANNELS = 64,
    Q35_GATHERED_AT = 16384  // where in a region q35_gather_columns leaves its rows
};

// Cards that compute one net together, each a rank with a region of memory that all of them can address (or several
// ranks with streams of their own on one card). Regions have q35_peer_bytes, are aligned to 256 bytes and zero before
// the first use. All ranks launch the same functions with the same sizes in the same order, each in one stream of its
// own; fields not said to differ are the same on all ranks.
// Ranks that share a card must have room there for all their channels at once (a block of 640 threads may need most of a
// multiprocessor's registers) and `early` 0, or the next kernel of one rank could take the room that another's needs.
// Their streams must not be put into one queue by the driver, and kernels be loaded before one of them waits.
// Where one rank waits for another for longer than timeout_ns, or finds the first word of its own region not 0 (any
// host may write it), its status becomes 1 + the rank waited for, and this launch and all later ones end at once, with
// undefined results. After that, zero regions and status of all ranks while nothing runs.
typedef struct {
    int32_t rank;                 // this one, of `world`
    int32_t world;                // 1 .. Q35_MAX_RANKS
    int32_t channels;             // blocks of a launch at most, 1 .. Q35_MAX_CHANNELS
    int32_t early;                // not 0: the next kernel of the stream may start while this one waits
    int32_t width;                // of the widest row to be reduced, a multiple of 8
    int64_t gather_bytes;         // room for the rows of q35_gather_columns
    int64_t timeout_ns;           // above 0
    void *regions[Q35_MAX_RANKS];  // the region of each rank, as this one addresses it
    int32_t *status;              // of this rank, on its card; 0
} q35_peers;

// Bytes of a region; -1 for sizes that cannot be.
int64_t q35_peer_bytes(int world, int channels, int width, int64_t gather_bytes);

// Sums over ranks are f32, in the order of ranks; all ranks have the same bits, and a row has the same bits whatever n
// is. width is a multiple of 8, at most that of `peers`; x, delta, residual, w and out are 16-byte aligned.
// out = the sum of all ranks' x: bf16 [n, width]. out may be x.
int q35_all_reduce(void *stream, q35_peers peers, int n, int width, const q35_bf16 *x, q35_bf16 *out);

// residual += the sum of all ranks' delta, which is not rounded, then out = residual / sqrt(mean(residual^2) + eps) * w,
// with the bits of q35_rmsnorm_residual. delta, out bf16 [n, width]; residual f32 [n, width], the same on all ranks;
// w f32 [width]. out may be delta.
int q35_all_reduce_norm(void *stream, q35_peers peers, int n, int width, const q35_bf16 *delta, float *residual,
                        const float *w, float eps, q35_bf16 *out);

// Rows side by side: x f32 [n, width] of rank r to columns r * width .. of f32 [n, world * width], which all ranks find
// Q35_GATHERED_AT bytes into their own region until the next gather. width is a multiple of 4, x 16-byte aligned;
// the rows have room in gather_bytes.
int q35_gather_columns(void *stream, q35_peers peers, int n, int width, const float *x);

// q35_all_reduce_norm, then q35_moe (with packed weights: as q35_packed_norm_moe, n <= 16) of what it leaves in x, which
// is this rank's part of the block; for a single token with a kernel less. The same bits as the two. out may be delta.
int q35_all_reduce_norm_moe(void *stream, q35_peers peers, int n, q35_moe_dims dims, q35_moe_weights weights,
                            const q35_bf16 *delta, float *residual, const float *norm, float eps, q35_bf16 *x,
                            void *workspace, q35_bf16 *out);
int q35_all_reduce_packed_norm_moe(void *stream, q35_peers peers, int n, q35_moe_dims dims,
                                   q35_packed_moe_weights weights, const q35_bf16 *delta, float *residual,
                                   const float *norm, float eps, q35_bf16 *x, void *workspace, q35_bf16 *out);

// ------------------------------------------------------------------------------------------------------ measure.cu

// Reads memory and does nothing with it. out: never written.
int q35_read(void *stream, int64_t num_bytes, const void *x, uint32_t *out);

#ifdef __cplusplus
}
#endif
