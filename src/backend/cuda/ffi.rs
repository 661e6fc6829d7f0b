//! `cuda/launch.h`, by hand; its comments say what each launcher computes. A test holds this page to the header.

#[path = "ffi_ranks.rs"]
mod ranks;

use std::ffi::{c_char, c_int, c_void};

pub use ranks::*;

/// `cudaStream_t`
pub type Stream = *mut c_void;
/// bf16, opaque.
pub type Bf16 = u16;

/// `q35_batch`
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Batch {
    pub num_tokens: i32,
    pub num_seqs: i32,
    pub max_query_len: i32,
    pub max_kv_len: i32,
    pub token_ids: *const i32,
    pub positions: *const i32,
    pub seq_of: *const i32,
    pub query_start: *const i32,
    pub query_len: *const i32,
    pub cached_len: *const i32,
    pub chunked_len: *const i32,
    pub slot: *const i32,
    pub page_start: *const i32,
    pub pages: *const i32,
}

/// `q35_delta_dims`
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct DeltaDims {
    pub num_k_heads: i32,
    pub num_v_heads: i32,
    pub k_dim: i32,
    pub v_dim: i32,
    pub conv_kernel: i32,
    pub half_states: i32,
}

/// `q35_attention_dims`
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct AttentionDims {
    pub num_q_heads: i32,
    pub num_kv_heads: i32,
    pub head_dim: i32,
}

/// `q35_moe_dims`
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct MoeDims {
    pub hidden: i32,
    pub num_experts: i32,
    pub top_k: i32,
    pub width: i32,
    pub shared_width: i32,
    pub first_expert: i32,
    pub num_here: i32,
}

/// `q35_moe_weights`
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct MoeWeights {
    pub router: *const Bf16,
    pub gate_up: *const Bf16,
    pub down: *const Bf16,
    pub shared_gate_up: *const Bf16,
    pub shared_down: *const Bf16,
    pub shared_gate: *const Bf16,
}

/// `q35_packed`
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Packed {
    pub codes: *const c_void,
    pub scales: *const c_void,
    pub zeros: *const u8,
    pub rows: i32,
    pub k: i32,
    pub group: i32,
    pub kind: i32,
}

// SAFETY: addresses on a device, which this process reads nothing at.
unsafe impl Send for Packed {}

/// `q35_head_order`
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct HeadOrder {
    pub start: i32,
    pub num_k_heads: i32,
    pub per_k_head: i32,
    pub head_dim: i32,
}

/// `q35_packed_moe_weights`
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct PackedMoe {
    pub gate_up: Packed,
    pub down: Packed,
    pub shared_gate_up: Packed,
    pub shared_down: Packed,
    pub router: *const Bf16,
    pub shared_gate: *const Bf16,
}

/// `Q35_MAX_RANKS`
pub const MAX_RANKS: usize = 8;
/// `Q35_GATHERED_AT`
pub const GATHERED_AT: usize = 16384;

/// `q35_peers`
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Peers {
    pub rank: i32,
    pub world: i32,
    pub channels: i32,
    pub early: i32,
    pub width: i32,
    pub gather_bytes: i64,
    pub timeout_ns: i64,
    pub regions: [*mut c_void; MAX_RANKS],
    pub status: *mut i32,
}

/// See `q35_sampling`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Sampling {
    pub uniform: f64,
    pub temperature: f32,
    pub top_p: f32,
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub frequency_penalty: f32,
    pub presence_penalty: f32,
    pub top_k: i32,
    pub num_logprobs: i32,
    pub edit_start: i32,
    pub num_edits: i32,
}

/// See `q35_edit`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Edit {
    pub token: i32,
    pub bias: f32,
    pub banned: i32,
    pub seen: i32,
    pub count: i32,
}

/// `Q35_MAX_TOP_K`
pub const MAX_TOP_K: usize = 1024;
/// `Q35_MAX_LOGPROBS`
pub const MAX_LOGPROBS: usize = 32;

/// See `q35_sampled`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Sampled {
    pub token: i32,
    pub rank: i32,
    pub logprob: f32,
    pub num_top: i32,
    pub top_tokens: [i32; MAX_LOGPROBS],
    pub top_logprobs: [f32; MAX_LOGPROBS],
}

/// Plain numbers, of which every bit pattern is one.
///
/// # Safety
/// Only for types of which that is so.
pub unsafe trait Plain: Copy {}
// SAFETY: a number.
unsafe impl Plain for f32 {}
// SAFETY: numbers, without padding.
unsafe impl Plain for Sampling {}
// SAFETY: as above.
unsafe impl Plain for Edit {}
// SAFETY: as above.
unsafe impl Plain for Sampled {}

#[allow(dead_code)] // some are for the tests under `tests/gpu` and for benchmarks
unsafe extern "C" {
    pub fn q35_embed(stream: Stream, batch: Batch, table: *const Bf16, hidden: c_int, out: *mut f32)
    -> c_int;
    pub fn q35_rmsnorm_residual(
        stream: Stream,
        n: c_int,
        hidden: c_int,
        delta: *const Bf16,
        residual: *mut f32,
        w: *const f32,
        eps: f32,
        out: *mut Bf16,
    ) -> c_int;
    pub fn q35_gather(
        stream: Stream,
        rows: *const i32,
        num_rows: c_int,
        x: *const c_void,
        row_bytes: i64,
        out: *mut c_void,
    ) -> c_int;
    pub fn q35_silu_mul(
        stream: Stream,
        n: c_int,
        width: c_int,
        gate_up: *const Bf16,
        out: *mut Bf16,
    ) -> c_int;
    pub fn q35_gated_rmsnorm(
        stream: Stream,
        n: c_int,
        v_heads: c_int,
        v_dim: c_int,
        w: *const f32,
        eps: f32,
        projected: *const Bf16,
        stride: c_int,
        z_start: c_int,
        core: *mut Bf16,
    ) -> c_int;
    pub fn q35_to_bf16(stream: Stream, n: i64, x: *const f32, out: *mut Bf16) -> c_int;
    pub fn q35_to_f32(stream: Stream, n: i64, x: *const Bf16, out: *mut f32) -> c_int;
    pub fn q35_fill_normal(
        stream: Stream,
        first: i64,
        n: i64,
        seed: u64,
        scale: f32,
        out: *mut Bf16,
    ) -> c_int;
    pub fn q35_causal_conv1d(
        stream: Stream,
        batch: Batch,
        dims: DeltaDims,
        weight: *const f32,
        projected: *const Bf16,
        stride: c_int,
        tails: *mut Bf16,
        out: *mut Bf16,
    ) -> c_int;
    pub fn q35_delta_workspace(max_tokens: c_int, max_seqs: c_int, dims: DeltaDims) -> i64;
    pub fn q35_gated_delta_rule(
        stream: Stream,
        batch: Batch,
        dims: DeltaDims,
        a_log: *const f32,
        dt_bias: *const f32,
        mixed: *const Bf16,
        projected: *const Bf16,
        stride: c_int,
        ba_start: c_int,
        states: *mut c_void,
        workspace: *mut f32,
        out: *mut Bf16,
    ) -> c_int;
    pub fn q35_delta_prompt(
        stream: Stream,
        batch: Batch,
        dims: DeltaDims,
        weight: *const f32,
        a_log: *const f32,
        dt_bias: *const f32,
        norm: *const f32,
        eps: f32,
        projected: *const Bf16,
        stride: c_int,
        z_start: c_int,
        ba_start: c_int,
        tails: *mut Bf16,
        states: *mut c_void,
        workspace: *mut f32,
        mixed: *mut Bf16,
        out: *mut Bf16,
    ) -> c_int;
    pub fn q35_delta_decode(
        stream: Stream,
        batch: Batch,
        dims: DeltaDims,
        weight: *const f32,
        a_log: *const f32,
        dt_bias: *const f32,
        norm: *const f32,
        eps: f32,
        projected: *const Bf16,
        stride: c_int,
        z_start: c_int,
        ba_start: c_int,
        tails: *mut Bf16,
        states: *mut c_void,
        counters: *mut i32,
        mixed: *mut Bf16,
        out: *mut Bf16,
    ) -> c_int;
    pub fn q35_qk_norm_rope_write(
        stream: Stream,
        batch: Batch,
        dims: AttentionDims,
        q_norm: *const f32,
        k_norm: *const f32,
        eps: f32,
        inv_freq: *const f32,
        axis: *const u8,
        num_freqs: c_int,
        rope_scale: f32,
        projected: *const Bf16,
        stride: c_int,
        q: *mut Bf16,
        k_pages: *mut Bf16,
        v_pages: *mut Bf16,
    ) -> c_int;
    pub fn q35_attention_workspace(
        max_tokens: c_int,
        max_seqs: c_int,
        max_kv_len: c_int,
        dims: AttentionDims,
    ) -> i64;
    pub fn q35_gated_attention(
        stream: Stream,
        batch: Batch,
        dims: AttentionDims,
        q: *const Bf16,
        projected: *const Bf16,
        stride: c_int,
        k_pages: *const Bf16,
        v_pages: *const Bf16,
        workspace: *mut f32,
        out: *mut Bf16,
    ) -> c_int;
    pub fn q35_qk_norm_rope_write_fp8(
        stream: Stream,
        batch: Batch,
        dims: AttentionDims,
        q_norm: *const f32,
        k_norm: *const f32,
        eps: f32,
        inv_freq: *const f32,
        axis: *const u8,
        num_freqs: c_int,
        rope_scale: f32,
        projected: *const Bf16,
        stride: c_int,
        q: *mut Bf16,
        pages: *mut u8,
    ) -> c_int;
    pub fn q35_attention_fp8_workspace(room: c_int, max_seqs: c_int, dims: AttentionDims) -> i64;
    pub fn q35_gated_attention_fp8(
        stream: Stream,
        batch: Batch,
        dims: AttentionDims,
        q: *const Bf16,
        projected: *const Bf16,
        stride: c_int,
        pages: *const u8,
        room: c_int,
        max_seqs: c_int,
        workspace: *mut f32,
        out: *mut Bf16,
    ) -> c_int;
    pub fn q35_linear(
        stream: Stream,
        n: c_int,
        num_in: c_int,
        out_dim: c_int,
        x: *const Bf16,
        w: *const Bf16,
        out: *mut Bf16,
        stride: c_int,
    ) -> c_int;
    pub fn q35_linear_f32(
        stream: Stream,
        n: c_int,
        num_in: c_int,
        out_dim: c_int,
        x: *const Bf16,
        w: *const Bf16,
        out: *mut f32,
        stride: c_int,
    ) -> c_int;
    pub fn q35_route(
        stream: Stream,
        n: c_int,
        num_experts: c_int,
        top_k: c_int,
        logits: *const f32,
        weights: *mut f32,
        experts: *mut i32,
    ) -> c_int;
    pub fn q35_moe_workspace(max_tokens: c_int, dims: MoeDims) -> i64;
    pub fn q35_moe_experts_at(n: c_int, dims: MoeDims) -> i64;
    pub fn q35_moe(
        stream: Stream,
        n: c_int,
        dims: MoeDims,
        weights: MoeWeights,
        x: *const Bf16,
        workspace: *mut c_void,
        out: *mut Bf16,
    ) -> c_int;
    pub fn q35_norm_moe(
        stream: Stream,
        n: c_int,
        dims: MoeDims,
        weights: MoeWeights,
        delta: *const Bf16,
        residual: *mut f32,
        norm: *const f32,
        eps: f32,
        x: *mut Bf16,
        workspace: *mut c_void,
        out: *mut Bf16,
    ) -> c_int;
    pub fn q35_moe_then_norm(
        stream: Stream,
        n: c_int,
        dims: MoeDims,
        weights: MoeWeights,
        x: *const Bf16,
        workspace: *mut c_void,
        residual: *mut f32,
        norm: *const f32,
        eps: f32,
        out: *mut Bf16,
    ) -> c_int;
    pub fn q35_packed_linear(
        stream: Stream,
        n: c_int,
        w: Packed,
        x: *const Bf16,
        out: *mut c_void,
        wide: c_int,
        stride: c_int,
    ) -> c_int;
    pub fn q35_fp8_token_bytes(n: c_int, k: c_int) -> i64;
    pub fn q35_fp8_token_linear(
        stream: Stream,
        n: c_int,
        w: Packed,
        x: *const Bf16,
        memory: *mut c_void,
        out: *mut c_void,
        wide: c_int,
        stride: c_int,
    ) -> c_int;
    pub fn q35_has_fp8_tokens(k: c_int) -> i64;
    pub fn q35_packed_linear_tail(
        stream: Stream,
        n: c_int,
        w: Packed,
        tail: *const Bf16,
        tail_rows: c_int,
        x: *const Bf16,
        out: *mut c_void,
        wide: c_int,
        stride: c_int,
    ) -> c_int;
    pub fn q35_pack_int4(
        stream: Stream,
        to: Packed,
        row0: c_int,
        rows: c_int,
        codes: *const i32,
        order: c_int,
    ) -> c_int;
    pub fn q35_pack_zeros(
        stream: Stream,
        to: Packed,
        row0: c_int,
        rows: c_int,
        zeros: *const i32,
        order: c_int,
        minus_one: c_int,
    ) -> c_int;
    pub fn q35_pack_fp8(stream: Stream, to: Packed, row0: c_int, rows: c_int, codes: *const u8) -> c_int;
    pub fn q35_pack_fp4(
        stream: Stream,
        to: Packed,
        row0: c_int,
        rows: c_int,
        codes: *const u8,
        scales: *const u8,
        whole: f32,
    ) -> c_int;
    pub fn q35_pack_gguf(
        stream: Stream,
        to: Packed,
        row0: c_int,
        rows: c_int,
        blocks: *const u8,
        order: HeadOrder,
    ) -> c_int;
    pub fn q35_pack_scales(
        stream: Stream,
        to: Packed,
        row0: c_int,
        rows: c_int,
        scales: *const c_void,
        kind: c_int,
        block_rows: c_int,
        row_stride: i64,
        group_stride: i64,
    ) -> c_int;
    pub fn q35_quantise_int4(stream: Stream, to: Packed, row0: c_int, rows: c_int, w: *const Bf16) -> c_int;
    pub fn q35_quantise_fp8(stream: Stream, to: Packed, row0: c_int, rows: c_int, w: *const Bf16) -> c_int;
    pub fn q35_packed_norm_moe(
        stream: Stream,
        n: c_int,
        dims: MoeDims,
        weights: PackedMoe,
        delta: *const Bf16,
        residual: *mut f32,
        norm: *const f32,
        eps: f32,
        x: *mut Bf16,
        workspace: *mut c_void,
        out: *mut Bf16,
    ) -> c_int;
    pub fn q35_packed_moe(
        stream: Stream,
        n: c_int,
        dims: MoeDims,
        weights: PackedMoe,
        x: *const Bf16,
        workspace: *mut c_void,
        out: *mut Bf16,
    ) -> c_int;
    pub fn q35_packed_moe_then_norm(
        stream: Stream,
        n: c_int,
        dims: MoeDims,
        weights: PackedMoe,
        x: *const Bf16,
        workspace: *mut c_void,
        residual: *mut f32,
        norm: *const f32,
        eps: f32,
        out: *mut Bf16,
    ) -> c_int;
    pub fn q35_fp8_token_moe_bytes(n: c_int, dims: MoeDims) -> i64;
    pub fn q35_fp8_token_moe(
        stream: Stream,
        n: c_int,
        dims: MoeDims,
        weights: PackedMoe,
        x: *const Bf16,
        workspace: *mut c_void,
        memory: *mut c_void,
        residual: *mut f32,
        norm: *const f32,
        eps: f32,
        out: *mut Bf16,
    ) -> c_int;
    pub fn q35_sample_workspace(max_rows: c_int, vocab: c_int) -> i64;
    pub fn q35_sample(
        stream: Stream,
        n: c_int,
        vocab: c_int,
        num_tokens: c_int,
        logits: *const f32,
        sampling: *const Sampling,
        edits: *const Edit,
        workspace: *mut c_void,
        out: *mut Sampled,
        tokens: *mut i32,
    ) -> c_int;
    pub fn q35_read(stream: Stream, num_bytes: i64, x: *const c_void, out: *mut u32) -> c_int;

    /// Of the CUDA runtime.
    pub fn cudaGetErrorString(error: c_int) -> *const c_char;
}
