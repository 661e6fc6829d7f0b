//! The list of ops that a device must provide, with their shapes and contracts. `model.rs` is generic over
//! [`Backend`]; `cpu` is the executable specification that every other backend is tested against.
//!
//! Shapes are row-major, last dimension contiguous. `n` is the number of tokens of the batch. A buffer may
//! be larger than the op needs; ops touch the leading `n` rows only. No op allocates device memory after
//! the buffers were made, and none looks at who is asking: a [`Batch`] is all it sees.

pub mod caches;
mod choice;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
// Text against text: needs no compiler for CUDA.
#[cfg(test)]
#[path = "cuda/ffi_tests.rs"]
mod ffi_tests;

mod sampling;

pub use caches::{Caches, KvCache, StateType};
pub use choice::Device;
pub use sampling::{Edit, Logprobs, Sampled, Sampling};

use std::ops::Range;
use std::sync::Arc;

use crate::Result;
use crate::batch::{Batch, BatchLimits};
use crate::config::{AttentionConfig, DeltaConfig, ModelConfig, RopeConfig};
use crate::lend::Lendable;
use crate::weights::{DType, ExpertTensors, Tensor};

/// How an activation buffer is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// f32 everywhere: the residual stream and logits.
    Full,
    /// What the device multiplies: f32 on the CPU, bf16 on a GPU.
    Compute,
}

/// A device that can run the net.
pub trait Backend: Send + Sync {
    /// Activations: `[rows, width]`, both fixed when it is made.
    type Buf: Send;
    /// A linear layer's weight `[out, in]`, in the layout that its kernel wants.
    type Linear: Send + Sync;
    /// What finds the largest logits of a head quickly.
    type Screen: Send + Sync;
    /// A small parameter, f32 inside.
    type Vector: Send + Sync;
    /// The routed experts of a layer and its shared expert.
    type Moe: Send + Sync;
    /// Keys and values of one attention layer: `[num_pages, PAGE_LEN]` tokens.
    type Pages: Send;
    /// Recurrent states and convolution tails of one delta layer, one slot a sequence.
    type Slots: Send;
    /// Scratch memory of the ops, made once for the largest batch.
    type Scratch: Send;

    // Making things. Called at start-up only.

    /// An activation buffer of zeros.
    fn buf(&self, rows: usize, width: usize, precision: Precision) -> Result<Self::Buf>;
    /// Scratch for batches of up to these sizes, over pages and slots that are held so. One workspace of a model is used
    /// at a time.
    fn scratch(&self, config: &ModelConfig, limits: &BatchLimits, caches: Caches) -> Result<Self::Scratch>;
    /// A linear layer from the rows of one or more tensors, one after the other; with `dtype`, stored so. Tensors may be
    /// encoded, each in another form: [`Tensor::encoded`] for a device that multiplies codes, else
    /// [`Tensor::read_rows_as`].
    fn linear_weight(&self, tensors: &[Tensor], dtype: Option<DType>) -> Result<Self::Linear>;
    /// A linear layer of which [`Backend::embed`] reads rows; the head too, where they are tied.
    fn table_weight(&self, tensor: &Tensor, dtype: Option<DType>) -> Result<Self::Linear>;
    /// What [`Backend::top_logits`] needs beside a head.
    fn screen(&self, head: &Tensor, dtype: Option<DType>) -> Result<Self::Screen>;
    /// A small parameter with `offset` added to each element (1 for the zero-centred norms).
    fn vector(&self, tensor: &Tensor, offset: f32) -> Result<Self::Vector>;
    /// The taps of a causal convolution, from `[C, 1, kernel]`.
    fn conv_weight(&self, tensor: &Tensor) -> Result<Self::Vector>;
    /// Experts; `router` is `[E, H]`, the shared expert's `gate|up` rows are one linear, `shared_gate` `[1, H]`.
    fn moe_weights(&self, tensors: MoeTensors<'_>, dtype: Option<DType>) -> Result<Self::Moe>;
    /// Pages of one attention layer.
    fn pages(&self, num_pages: usize, dims: &AttentionConfig, kv: KvCache) -> Result<Self::Pages>;
    /// Slots of one delta layer.
    fn slots(&self, num_slots: usize, dims: &DeltaConfig, state: StateType) -> Result<Self::Slots>;
    /// Bytes of one page of an attention layer.
    fn page_bytes(&self, dims: &AttentionConfig, kv: KvCache) -> usize;
    /// Bytes of one slot of a delta layer.
    fn slot_bytes(&self, dims: &DeltaConfig, state: StateType) -> usize;

    /// Bytes of memory of its own that can still be allocated; `None` for a device that shares the host's.
    fn free_memory(&self) -> Result<Option<usize>> {
        Ok(None)
    }

    /// What it can say of itself.
    fn stats(&self) -> Stats {
        Stats::default()
    }

    /// What it reaches, measured now; `None` where nothing is measured.
    fn measure(&self) -> Result<Option<Measured>> {
        Ok(None)
    }

    // Steps. Ops may return before they have run.

    /// The batch of the ops that follow: what the device must know of it is sent there, once.
    fn begin(&self, _batch: &Batch) {}

    /// Runs `ops`, the ops of a batch from its first to its last. A device may record them, and for a batch of the same
    /// shape repeat what it recorded: they must be the same for every batch of a shape, and read nothing back. Where a
    /// recording fails they are called again.
    fn replay(&self, _batch: &Batch, mut ops: impl FnMut() -> Result<()>) -> Result<()> {
        ops()
    }

    /// The first error of any op so far, where ops can fail. Nothing that was read since is to be used then.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// The ranks have lost each other: what waits for another one is to end, since what is given back next may wait for it.
    fn give_up(&self) {}

    // The ops.

    /// `out[t] = table[token_ids[t]]`, `[n, hidden]`.
    fn embed(&self, batch: &Batch, table: &Self::Linear, out: &mut Self::Buf);

    /// `residual += delta` (where given), then `out = residual / rms(residual) * w`, all `[n, hidden]`.
    fn rmsnorm_residual(
        &self,
        n: usize,
        delta: Option<&Self::Buf>,
        residual: &mut Self::Buf,
        w: &Self::Vector,
        eps: f32,
        out: &mut Self::Buf,
    );

    /// `out = x Wᵀ`: `x` `[n, in]`, `out` `[n, out]`.
    fn linear(&self, n: usize, x: &Self::Buf, w: &Self::Linear, out: &mut Self::Buf);

    /// As [`Backend::linear`] with the head, but only the logits that may be among the `k` largest of a row's first
    /// `num_tokens` need be there: any other may be -inf. `x` `[n, hidden]`, `out` `[n, vocab]`.
    fn top_logits(
        &self,
        n: usize,
        x: &Self::Buf,
        head: (&Self::Linear, &Self::Screen),
        k: usize,
        num_tokens: usize,
        out: &mut Self::Buf,
    );

    /// The causal depthwise convolution and SiLU over the first `C` columns of `projected` (`q|k|v|z|b|a`),
    /// continuing from each sequence's slot and leaving the last `kernel - 1` inputs there. `out` `[n, C]`.
    fn causal_conv1d(
        &self,
        batch: &Batch,
        dims: &DeltaConfig,
        weight: &Self::Vector,
        projected: &Self::Buf,
        slots: &mut Self::Slots,
        out: &mut Self::Buf,
    );

    /// The gated delta rule over `mixed` (`[n, C]` after the convolution), with `b` and `a` read from the last
    /// `2 V` columns of `projected`: q and k are l2-normalised, q scaled by `k_dim^-1/2`, the state of each
    /// sequence's slot is read and updated. The batch says which tokens take the chunked form. `out`
    /// `[n, V * v_dim]`.
    #[allow(clippy::too_many_arguments)]
    fn gated_delta_rule(
        &self,
        batch: &Batch,
        dims: &DeltaConfig,
        decay: DecayWeights<'_, Self::Vector>,
        mixed: &Self::Buf,
        projected: &Self::Buf,
        slots: &mut Self::Slots,
        out: &mut Self::Buf,
    );

    /// Per value head: `core = core / rms(core) * w * silu(z)` in place; `z` is read from `projected`.
    fn gated_rmsnorm(
        &self,
        n: usize,
        dims: &DeltaConfig,
        w: &Self::Vector,
        eps: f32,
        projected: &Self::Buf,
        core: &mut Self::Buf,
    );

    /// What a delta layer does between its projections: [`Backend::causal_conv1d`] to `mixed`,
    /// [`Backend::gated_delta_rule`] to `core`, [`Backend::gated_rmsnorm`].
    #[allow(clippy::too_many_arguments)]
    fn gated_delta_net(
        &self,
        batch: &Batch,
        dims: &DeltaConfig,
        w: &DeltaWeights<'_, Self::Vector>,
        eps: f32,
        projected: &Self::Buf,
        slots: &mut Self::Slots,
        mixed: &mut Self::Buf,
        core: &mut Self::Buf,
    ) {
        self.causal_conv1d(batch, dims, w.conv, projected, slots, mixed);
        let decay = DecayWeights { a_log: w.a_log, dt_bias: w.dt_bias };
        self.gated_delta_rule(batch, dims, decay, mixed, projected, slots, core);
        self.gated_rmsnorm(batch.num_tokens(), dims, w.norm, eps, projected, core);
    }

    /// Splits `projected` (`[n, (q|gate) per head | k | v]`): q and k are normed per head and rotated; q goes to
    /// `q` (`[n, Hq * d]`), k and v to the pages of their tokens.
    #[allow(clippy::too_many_arguments)]
    fn qk_norm_rope_write(
        &self,
        batch: &Batch,
        dims: &AttentionConfig,
        rope: &Rope,
        norms: (&Self::Vector, &Self::Vector),
        eps: f32,
        projected: &Self::Buf,
        q: &mut Self::Buf,
        pages: &mut Self::Pages,
    );

    /// Causal softmax attention of each token over its sequence's pages, times `sigmoid(gate)` read from
    /// `projected`. `q`, `out` `[n, Hq * d]`.
    #[allow(clippy::too_many_arguments)]
    fn gated_attention(
        &self,
        batch: &Batch,
        dims: &AttentionConfig,
        q: &Self::Buf,
        projected: &Self::Buf,
        pages: &Self::Pages,
        scratch: &mut Self::Scratch,
        out: &mut Self::Buf,
    );

    /// `out = silu(gate) * up` from `gate|up`: `[n, 2 * width]` to `[n, width]`.
    fn silu_mul(&self, n: usize, gate_up: &Self::Buf, out: &mut Self::Buf);

    /// The sparse block: softmax over all experts, top-k, renormalise, the experts' SwiGLUs weighted and summed,
    /// plus the gated shared expert. `x`, `out` `[n, hidden]`.
    fn moe(
        &self,
        n: usize,
        x: &Self::Buf,
        weights: &Self::Moe,
        scratch: &mut Self::Scratch,
        out: &mut Self::Buf,
    );

    /// [`Backend::rmsnorm_residual`] of the change in `block`, to `x`; then [`Backend::moe`] of that, to `block`. `norm` is
    /// the weight and eps.
    #[allow(clippy::too_many_arguments)]
    fn norm_moe(
        &self,
        n: usize,
        residual: &mut Self::Buf,
        norm: (&Self::Vector, f32),
        x: &mut Self::Buf,
        weights: &Self::Moe,
        scratch: &mut Self::Scratch,
        block: &mut Self::Buf,
    ) {
        self.rmsnorm_residual(n, Some(block), residual, norm.0, norm.1, x);
        self.moe(n, x, weights, scratch, block);
    }

    /// [`Backend::norm_moe`], then [`Backend::rmsnorm_residual`] of the change that it leaves in `block`, to `x`; `block`
    /// is undefined afterwards. `norms` are the weights before and after the experts, and eps.
    #[allow(clippy::too_many_arguments)]
    fn norm_moe_norm(
        &self,
        n: usize,
        residual: &mut Self::Buf,
        norms: (&Self::Vector, &Self::Vector, f32),
        x: &mut Self::Buf,
        weights: &Self::Moe,
        scratch: &mut Self::Scratch,
        block: &mut Self::Buf,
    ) {
        let (before, after, eps) = norms;
        self.norm_moe(n, residual, (before, eps), x, weights, scratch, block);
        self.rmsnorm_residual(n, Some(block), residual, after, eps, x);
    }

    // Ranks that share a model: each computes a part of some sums, and of the logits. Alone, a part is the whole.

    /// `x` becomes the sum of every rank's, added in the order of ranks: the same bits on all. `[n, width]`.
    fn all_reduce(&self, _n: usize, _x: &mut Self::Buf) {}

    /// [`Backend::all_reduce`] of `delta`, which is undefined afterwards, then [`Backend::rmsnorm_residual`] of the sum.
    fn all_reduce_norm(
        &self,
        n: usize,
        delta: &mut Self::Buf,
        residual: &mut Self::Buf,
        w: &Self::Vector,
        eps: f32,
        out: &mut Self::Buf,
    ) {
        self.all_reduce(n, delta);
        self.rmsnorm_residual(n, Some(delta), residual, w, eps, out);
    }

    /// [`Backend::all_reduce_norm`] of `block`, to `x`; then [`Backend::moe`] of that, to `block`: this rank's part of it.
    /// `norm` is the weight and eps.
    #[allow(clippy::too_many_arguments)]
    fn all_reduce_norm_moe(
        &self,
        n: usize,
        residual: &mut Self::Buf,
        norm: (&Self::Vector, f32),
        x: &mut Self::Buf,
        weights: &Self::Moe,
        scratch: &mut Self::Scratch,
        block: &mut Self::Buf,
    ) {
        self.all_reduce_norm(n, block, residual, norm.0, norm.1, x);
        self.moe(n, x, weights, scratch, block);
    }

    /// `out[t] = part of rank 0 | part of rank 1 | ...`: `part` `[n, width]`, `out` `[n, ranks * width]`, both
    /// [`Precision::Full`]. Not called alone.
    fn all_gather(&self, _n: usize, _part: &Self::Buf, _out: &mut Self::Buf) {}

    // Choosing tokens, for devices that can; elsewhere logits are read and the host chooses.

    /// Whether it ever can.
    const SAMPLES: bool = false;

    /// Whether [`Backend::sample`] can choose a token for each of these rows.
    fn can_sample(&self, _rows: &[Sampling]) -> bool {
        false
    }

    /// Sends how the tokens of the batch are chosen to the device.
    fn begin_sampling(&self, _rows: &[Sampling]) {}

    /// Chooses tokens `first..first + n` of those that [`Backend::begin_sampling`] announced, from `n` rows of logits of
    /// which the first `num_tokens` exist.
    fn sample(&self, _first: usize, _n: usize, _num_tokens: usize, _logits: &Self::Buf) {}

    /// Has the tokens that the batch's [`Backend::sample`] chose sent to the host, after all that was launched so far.
    fn send_sampled(&self) {}

    /// Waits for the tokens of the oldest [`Backend::send_sampled`] that was not asked for yet, of two at most.
    fn sampled(&self) -> Result<Vec<Sampled>> {
        Ok(Vec::new())
    }

    /// Memory for f32 rows `[rows, width]` that other libraries can be lent; `None` on a device whose results lie on the
    /// host anyway.
    fn lendable(&self, _rows: usize, _width: usize) -> Result<Option<Arc<dyn Lendable>>> {
        Ok(None)
    }

    /// Copies the leading `n` rows of `x` to row `at` and on of such memory, and waits until they are there.
    fn lend_rows(&self, _n: usize, _x: &Self::Buf, _to: &dyn Lendable, _at: usize) -> Result<()> {
        Ok(())
    }

    /// `out[i] = x[rows[i]]`: gathers the tokens whose logits are wanted.
    fn gather(&self, rows: &[usize], x: &Self::Buf, out: &mut Self::Buf);

    /// `out[rows[i]] = x[i]`, with no row twice: undoes [`Backend::gather`].
    fn scatter(&self, rows: &[usize], x: &Self::Buf, out: &mut Self::Buf);

    /// `out[t] = left[t] | right[t]`: `[n, a]` and `[n, b]` to `[n, a + b]`.
    fn concat(&self, n: usize, left: &Self::Buf, right: &Self::Buf, out: &mut Self::Buf);

    /// `buf[i] = buf[rows[i]]`, with `rows` ascending.
    fn keep_rows(&self, rows: &[usize], buf: &mut Self::Buf);

    /// The leading `rows * width` elements, on the host as f32.
    fn read<'a>(&self, buf: &'a mut Self::Buf, rows: usize) -> std::borrow::Cow<'a, [f32]>;

    /// Zeroes the state and the convolution tail of one slot.
    fn clear_slot(&self, slots: &mut Self::Slots, slot: usize);
}

/// What a device says of itself.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Stats {
    /// Bytes of its own memory, by what they are for.
    pub memory: std::collections::BTreeMap<&'static str, usize>,
    /// Kernels and copies of the last step, where it was launched as one graph.
    pub nodes_per_step: Option<usize>,
    /// Different experts of the last layer that tokens of the last step were sent to, where that step was recorded.
    pub experts_hit: Option<usize>,
}

/// What a device reaches at best.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Measured {
    /// Reading memory.
    pub read_bytes_per_s: f64,
    /// A large product in bf16, where there is a library for it.
    pub flops_per_s: Option<f64>,
}

/// What decides the decay of a delta layer: `g = -exp(a_log) * softplus(a + dt_bias)`.
pub struct DecayWeights<'a, V> {
    /// `[V]`
    pub a_log: &'a V,
    /// `[V]`
    pub dt_bias: &'a V,
}

/// The small parameters of a delta layer.
pub struct DeltaWeights<'a, V> {
    /// `[kernel, C]`
    pub conv: &'a V,
    /// `[V]`
    pub a_log: &'a V,
    /// `[V]`
    pub dt_bias: &'a V,
    /// `[v_dim]`
    pub norm: &'a V,
}

/// The tensors of one sparse block.
pub struct MoeTensors<'a> {
    /// `[E, H]`
    pub router: &'a Tensor,
    /// Routed experts: those that are here.
    pub experts: &'a ExpertTensors,
    /// Which of all they are; an assignment to another is another rank's.
    pub here: Range<usize>,
    /// `gate_proj [S, H]`, `up_proj [S, H]`, `down_proj [H, S]`
    pub shared: [&'a Tensor; 3],
    /// `[1, H]`
    pub shared_gate: &'a Tensor,
    /// Experts a token is sent to.
    pub top_k: usize,
}

/// The rotary embedding, reduced to what a kernel needs.
#[derive(Debug, Clone)]
pub struct Rope {
    /// One frequency per rotated pair, YaRN applied.
    pub inv_freq: Vec<f32>,
    /// Which position (0 T, 1 H, 2 W) each frequency follows.
    pub axis: Vec<u8>,
    /// Multiplied into cos and sin.
    pub scale: f32,
}

impl Rope {
    /// The rotary embedding of a configuration.
    pub fn new(config: &RopeConfig) -> Self {
        Self { inv_freq: config.inv_freq(), axis: config.frequency_axes(), scale: config.attention_scale() }
    }
}
