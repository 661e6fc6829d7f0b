//! The Qwen3.5 net, top to bottom, one call per op, generic over the backend.
//!
//! It sees a [`Batch`], never a request: it does not allocate after it was made, and does not ask who is
//! asking.

mod mtp;
mod walk;

pub use self::walk::{Input, Walk};

use self::mtp::Mtp;
use crate::Result;
use crate::backend::{Backend, Caches, DeltaWeights, MoeTensors, Precision, Rope, Sampling};
use crate::batch::{Batch, BatchLimits, MAX_LOGIT_ROWS};
use crate::config::{FfnConfig, LayerKind, ModelConfig, Shard};
use crate::lend::Lendable;
use crate::weights::{DType, FfnTensors, LayerTensors, MixerTensors, ModelTensors};

/// The weights of the net on one device, or one rank's part of them.
pub struct Model<B: Backend> {
    /// Its own part's.
    config: ModelConfig,
    shard: Shard,
    caches: Caches,
    backend: B,
    rope: Rope,
    embed: B::Linear,
    /// Absent where the embedding is the head; of a part, the rows that are here.
    head: Option<B::Linear>,
    screen: B::Screen,
    norm: B::Vector,
    layers: Vec<Layer<B>>,
    /// Where it was asked for.
    mtp: Option<Mtp<B>>,
}

struct Layer<B: Backend> {
    input_norm: B::Vector,
    mixer: Mixer<B>,
    ffn_norm: B::Vector,
    ffn: Ffn<B>,
}

enum Mixer<B: Backend> {
    /// `index` counts the attention layers: which pages are its own.
    Attention { index: usize, qkv: B::Linear, out: B::Linear, q_norm: B::Vector, k_norm: B::Vector },
    /// `index` counts the delta layers: which slots are its own. `inputs` is `q|k|v|z|b|a`.
    Delta {
        index: usize,
        inputs: B::Linear,
        conv: B::Vector,
        a_log: B::Vector,
        dt_bias: B::Vector,
        norm: B::Vector,
        out: B::Linear,
    },
}

enum Ffn<B: Backend> {
    Dense { gate_up: B::Linear, down: B::Linear },
    Moe(B::Moe),
}

/// What every layer needs beside its weights.
struct Net<'a, B: Backend> {
    config: &'a ModelConfig,
    shard: Shard,
    caches: Caches,
    rope: &'a Rope,
    backend: &'a B,
}

impl<B: Backend> Clone for Net<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Net<'_, B> {}

/// What sequences leave behind between steps: pages of the attention layers, slots of the delta layers.
pub struct Memory<B: Backend> {
    pages: Vec<B::Pages>,
    slots: Vec<B::Slots>,
}

/// Buffers of one step, made once for the largest batch.
pub struct Workspace<B: Backend> {
    residual: B::Buf,
    normed: B::Buf,
    block: B::Buf,
    attention_inputs: B::Buf,
    q: B::Buf,
    attended: B::Buf,
    delta_inputs: B::Buf,
    mixed: B::Buf,
    core: B::Buf,
    gate_up: B::Buf,
    act: B::Buf,
    head_rows: B::Buf,
    logits: B::Buf,
    /// This rank's, where each has some of them.
    some_logits: B::Buf,
    /// For the MTP module: the hidden states it reads, and each beside the embedding of the token after it.
    hidden: B::Buf,
    pair: B::Buf,
    scratch: B::Scratch,
}

impl<B: Backend> Model<B> {
    /// Loads the net onto a device. With `dtype`, matrices are stored so; otherwise as the checkpoint has them.
    /// `progress(done, total)` is called after each layer and may end the load.
    ///
    /// # Errors
    /// Whatever the backend says of memory, and what `progress` returns.
    pub fn load(
        config: &ModelConfig,
        tensors: ModelTensors,
        dtype: Option<DType>,
        backend: B,
        progress: impl FnMut(usize, usize) -> Result<()>,
    ) -> Result<Self> {
        Self::load_shard(config, Shard::whole(), tensors, dtype, backend, progress)
    }

    /// One rank's part of the net; `config` and `tensors` are the whole model's.
    ///
    /// # Errors
    /// As [`Model::load`], and [`ModelConfig::sharded`].
    pub fn load_shard(
        config: &ModelConfig,
        shard: Shard,
        tensors: ModelTensors,
        dtype: Option<DType>,
        backend: B,
        mut progress: impl FnMut(usize, usize) -> Result<()>,
    ) -> Result<Self> {
        let (whole, config) = (config, &config.sharded(shard)?);
        let total = tensors.layers.len() + 1;
        progress(0, total)?;
        let embed = backend.table_weight(&tensors.embed_tokens, dtype)?;
        let some_rows = shard.head_rows(config.vocab).len() < config.vocab;
        let own_head = tensors.sharded_head(shard);
        let screen = backend.screen(&own_head, dtype)?;
        let has_head = some_rows || tensors.lm_head.is_some();
        let head = has_head.then(|| backend.linear_weight(&[own_head], dtype)).transpose()?;
        progress(1, total)?;
        let mut layers = Vec::with_capacity(tensors.layers.len());
        let (mut num_attention, mut num_delta) = (0, 0);
        for layer in tensors.layers {
            let count = match layer.mixer {
                MixerTensors::Attention { .. } => &mut num_attention,
                MixerTensors::DeltaNet { .. } => &mut num_delta,
            };
            let layer = layer.sharded(whole, shard)?;
            layers.push(Layer::load(layer, *count, (config, shard), dtype, &backend)?);
            *count += 1;
            progress(layers.len() + 1, total)?;
        }
        let norm = backend.vector(&tensors.norm, 1.0)?;
        let rope = Rope::new(&config.rope);
        let (config, caches) = (config.clone(), Caches::default());
        Ok(Self { config, shard, caches, rope, embed, head, screen, norm, layers, mtp: None, backend })
    }

    /// Holds keys, values and states so, in memory that is made afterwards.
    #[must_use]
    pub fn with_caches(mut self, caches: Caches) -> Self {
        self.caches = caches;
        self
    }

    /// Bytes of a page, in all layers.
    pub fn page_bytes(&self) -> usize {
        self.num_kv_layers() * self.backend.page_bytes(&self.config.attention, self.caches.kv)
    }

    /// Bytes of a slot, in all layers.
    pub fn slot_bytes(&self) -> usize {
        let num_layers = self.config.num_layers_of(LayerKind::DeltaNet);
        num_layers * self.backend.slot_bytes(&self.config.delta, self.caches.state)
    }

    /// The geometry; of a part, its own, but for the vocabulary and the number of experts.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Pages and slots for every layer.
    pub fn memory(&self, num_pages: usize, num_slots: usize) -> Result<Memory<B>> {
        let mut memory = Memory { pages: Vec::new(), slots: Vec::new() };
        for layer in self.layers.iter().chain(self.mtp.iter().map(|mtp| &mtp.layer)) {
            self.net().memory(layer, num_pages, num_slots, &mut memory)?;
        }
        Ok(memory)
    }

    fn net(&self) -> Net<'_, B> {
        let Self { config, shard, caches, rope, backend, .. } = self;
        Net { config, shard: *shard, caches: *caches, rope, backend }
    }

    /// Buffers for batches of up to these sizes.
    pub fn workspace(&self, limits: &BatchLimits) -> Result<Workspace<B>> {
        self.net().workspace(limits, self.has_mtp())
    }

    /// Zeroes a slot for a new sequence.
    pub fn clear_slot(&self, memory: &mut Memory<B>, slot: usize) {
        for slots in &mut memory.slots {
            self.backend.clear_slot(slots, slot);
        }
    }

    /// Runs the net over a batch: afterwards the workspace holds the normed hidden states of the batch's
    /// `logit_rows`, for [`Model::compute_logits`]. The last layer does for other tokens only what later tokens need: its
    /// pages or slots. `poll` is called before each layer and may end the step; the batch's slots are then
    /// undefined.
    pub fn forward(
        &self,
        batch: &Batch,
        memory: &mut Memory<B>,
        w: &mut Workspace<B>,
        poll: impl Fn() -> Result<()>,
    ) -> Result<()> {
        let b = &self.backend;
        b.begin(batch);
        b.replay(batch, || self.run(batch, memory, w, &poll))?;
        b.check()
    }

    /// As [`Model::forward`], and chooses a token for each of the batch's `logit_rows`, where the backend can
    /// ([`Backend::can_sample`]): [`Backend::sampled`] waits for them. The first `num_tokens` logits of a row exist.
    ///
    /// # Errors
    /// What `poll` returned, and what the device says.
    pub fn launch_sampled(
        &self,
        batch: &Batch,
        rows: &[Sampling],
        num_tokens: usize,
        memory: &mut Memory<B>,
        w: &mut Workspace<B>,
        poll: impl Fn() -> Result<()>,
    ) -> Result<()> {
        let b = &self.backend;
        b.begin(batch);
        b.begin_sampling(rows);
        b.replay(batch, || {
            self.run(batch, memory, w, &poll)?;
            for first in (0..rows.len()).step_by(MAX_LOGIT_ROWS) {
                let n = MAX_LOGIT_ROWS.min(rows.len() - first);
                if first == 0 {
                    self.head_logits(n, &w.normed, None, (&mut w.some_logits, &mut w.logits));
                } else {
                    let places: Vec<usize> = (first..first + n).collect();
                    b.gather(&places, &w.normed, &mut w.head_rows);
                    self.head_logits(n, &w.head_rows, None, (&mut w.some_logits, &mut w.logits));
                }
                b.sample(first, n, num_tokens, &w.logits);
            }
            Ok(())
        })?;
        b.send_sampled();
        b.check()
    }

    fn head(&self) -> &B::Linear {
        self.head.as_ref().unwrap_or(&self.embed)
    }

    /// The layers, from the embedding to the normed hidden states.
    fn run(
        &self,
        batch: &Batch,
        memory: &mut Memory<B>,
        w: &mut Workspace<B>,
        poll: &impl Fn() -> Result<()>,
    ) -> Result<()> {
        let (mut n, eps, b) = (batch.num_tokens(), self.config.rms_eps, &self.backend);
        b.embed(batch, &self.embed, &mut w.residual);
        if let Some(first) = self.layers.first() {
            b.rmsnorm_residual(n, None, &mut w.residual, &first.input_norm, eps, &mut w.normed);
        }
        for (i, layer) in self.layers.iter().enumerate() {
            poll()?;
            n = match self.layers.get(i + 1) {
                Some(next) => self.net().layer(layer, batch, None, Some(&next.input_norm), memory, w),
                None => self.net().layer(layer, batch, Some(&batch.logit_rows), None, memory, w),
            };
        }
        poll()?;
        b.all_reduce_norm(n, &mut w.block, &mut w.residual, &self.norm, eps, &mut w.normed);
        Ok(())
    }

    /// The `n` rows that [`Model::compute_logits`] computed last, `[n, vocab]`, f32, on the host.
    pub fn read_logits<'a>(&self, n: usize, w: &'a mut Workspace<B>) -> std::borrow::Cow<'a, [f32]> {
        self.backend.read(&mut w.logits, n)
    }

    /// Logits of up to [`MAX_LOGIT_ROWS`] of the `logit_rows` of the batch that [`Model::forward`] ran last, by their
    /// place in that list. With `top` of `(k, num_tokens)`, logits that are not among a row's k largest below
    /// `num_tokens` may be -inf.
    pub fn compute_logits(&self, rows: &[usize], top: Option<(usize, usize)>, w: &mut Workspace<B>) {
        self.backend.gather(rows, &w.normed, &mut w.head_rows);
        self.head_logits(rows.len(), &w.head_rows, top, (&mut w.some_logits, &mut w.logits));
    }

    /// Logits of `n` rows, from every rank's.
    fn head_logits(
        &self,
        n: usize,
        x: &B::Buf,
        top: Option<(usize, usize)>,
        (some, all): (&mut B::Buf, &mut B::Buf),
    ) {
        let (b, head) = (&self.backend, self.head());
        let here = self.shard.head_rows(self.config.vocab);
        let whole = here.len() == self.config.vocab;
        let out = if whole { &mut *all } else { &mut *some };
        // Of the tokens that exist, those that are here.
        match top.map(|(k, num_tokens)| (k, num_tokens.min(here.end).saturating_sub(here.start))) {
            Some((k, num_tokens)) if num_tokens > 0 => {
                b.top_logits(n, x, (head, &self.screen), k.min(num_tokens), num_tokens, out);
            }
            _ => b.linear(n, x, head, out),
        }
        if !whole {
            b.all_gather(n, some, all);
        }
    }

    /// Copies them to row `at` and on of memory of the device.
    ///
    /// # Errors
    /// What the device says.
    pub fn lend_logits(&self, n: usize, to: &dyn Lendable, at: usize, w: &Workspace<B>) -> Result<()> {
        self.backend.lend_rows(n, &w.logits, to, at)
    }
}

impl<B: Backend> Net<'_, B> {
    /// Pages or slots of one layer.
    fn memory(
        self,
        layer: &Layer<B>,
        num_pages: usize,
        num_slots: usize,
        memory: &mut Memory<B>,
    ) -> Result<()> {
        match layer.mixer {
            Mixer::Attention { .. } => {
                memory.pages.push(self.backend.pages(num_pages, &self.config.attention, self.caches.kv)?);
            }
            Mixer::Delta { .. } => {
                memory.slots.push(self.backend.slots(num_slots, &self.config.delta, self.caches.state)?);
            }
        }
        Ok(())
    }

    /// Buffers for batches of up to these sizes, and for the MTP module where it `has_mtp`.
    fn workspace(self, limits: &BatchLimits, has_mtp: bool) -> Result<Workspace<B>> {
        let (c, max_tokens) = (self.config, limits.max_tokens);
        let buf = |width: usize| self.backend.buf(max_tokens, width, Precision::Compute);
        let logit_rows = MAX_LOGIT_ROWS.min(max_tokens);
        let ffn_width = match c.ffn {
            FfnConfig::Dense { width } => width,
            FfnConfig::Moe { .. } => 0,
        };
        let mtp_width = if has_mtp { c.hidden } else { 0 };
        let here = self.shard.head_rows(c.vocab).len();
        let some_logits = if here < c.vocab { here } else { 0 };
        let delta_inputs = c.delta.conv_channels() + c.delta.value_width() + 2 * c.delta.num_v_heads;
        Ok(Workspace {
            residual: self.backend.buf(max_tokens, c.hidden, Precision::Full)?,
            normed: buf(c.hidden)?,
            block: buf(c.hidden)?,
            attention_inputs: buf(2 * c.attention.q_width() + 2 * c.attention.kv_width())?,
            q: buf(c.attention.q_width())?,
            attended: buf(c.attention.q_width())?,
            delta_inputs: buf(delta_inputs)?,
            mixed: buf(c.delta.conv_channels())?,
            core: buf(c.delta.value_width())?,
            gate_up: buf(2 * ffn_width)?,
            act: buf(ffn_width)?,
            head_rows: self.backend.buf(logit_rows, c.hidden, Precision::Compute)?,
            logits: self.backend.buf(logit_rows, c.vocab, Precision::Full)?,
            some_logits: self.backend.buf(logit_rows, some_logits, Precision::Full)?,
            hidden: buf(mtp_width)?,
            pair: buf(2 * mtp_width)?,
            scratch: self.backend.scratch(c, limits, self.caches)?,
        })
    }

    /// A decoder layer: reads `residual` and what its input norm has made of it, `normed`. It leaves `residual` and
    /// `block`, the change that is still to be added to it (of a rank its part of it); or, given the norm that comes `next`, `residual` with that
    /// change and `normed`. With `keep`, tokens that are not in it get as far as the layer's pages or slots, and the rows
    /// of the others move to the front. Returns the number of rows left.
    fn layer(
        self,
        layer: &Layer<B>,
        batch: &Batch,
        keep: Option<&[usize]>,
        next: Option<&B::Vector>,
        memory: &mut Memory<B>,
        w: &mut Workspace<B>,
    ) -> usize {
        let (mut n, eps, b) = (batch.num_tokens(), self.config.rms_eps, self.backend);
        match &layer.mixer {
            Mixer::Attention { index, qkv, out, q_norm, k_norm } => {
                let (dims, pages) = (&self.config.attention, &mut memory.pages[*index]);
                let inputs = &mut w.attention_inputs;
                b.linear(n, &w.normed, qkv, inputs);
                b.qk_norm_rope_write(batch, dims, self.rope, (q_norm, k_norm), eps, inputs, &mut w.q, pages);
                b.gated_attention(batch, dims, &w.q, inputs, pages, &mut w.scratch, &mut w.attended);
                if let Some(rows) = keep {
                    n = rows.len();
                    b.keep_rows(rows, &mut w.attended);
                }
                b.linear(n, &w.attended, out, &mut w.block);
            }
            Mixer::Delta { index, inputs, conv, a_log, dt_bias, norm, out } => {
                let (dims, slots) = (&self.config.delta, &mut memory.slots[*index]);
                let projected = &mut w.delta_inputs;
                b.linear(n, &w.normed, inputs, projected);
                let weights = DeltaWeights { conv, a_log, dt_bias, norm };
                b.gated_delta_net(batch, dims, &weights, eps, projected, slots, &mut w.mixed, &mut w.core);
                if let Some(rows) = keep {
                    n = rows.len();
                    b.keep_rows(rows, &mut w.core);
                }
                b.linear(n, &w.core, out, &mut w.block);
            }
        }
        if let Some(rows) = keep {
            b.keep_rows(rows, &mut w.residual);
        }
        let (block, residual, normed) = (&mut w.block, &mut w.residual, &mut w.normed);
        match &layer.ffn {
            Ffn::Dense { gate_up, down } => {
                b.all_reduce_norm(n, block, residual, &layer.ffn_norm, eps, normed);
                b.linear(n, normed, gate_up, &mut w.gate_up);
                b.silu_mul(n, &w.gate_up, &mut w.act);
                b.linear(n, &w.act, down, block);
                if let Some(next) = next {
                    b.all_reduce_norm(n, block, residual, next, eps, normed);
                }
            }
            Ffn::Moe(moe) if !self.shard.is_whole() => {
                let norm = (&layer.ffn_norm, eps);
                b.all_reduce_norm_moe(n, residual, norm, normed, moe, &mut w.scratch, block);
                if let Some(next) = next {
                    b.all_reduce_norm(n, block, residual, next, eps, normed);
                }
            }
            Ffn::Moe(moe) => match next {
                Some(next) => {
                    let norms = (&layer.ffn_norm, next, eps);
                    b.norm_moe_norm(n, residual, norms, normed, moe, &mut w.scratch, block);
                }
                None => {
                    b.norm_moe(n, residual, (&layer.ffn_norm, eps), normed, moe, &mut w.scratch, block);
                }
            },
        }
        n
    }
}

impl<B: Backend> Layer<B> {
    fn load(
        tensors: LayerTensors,
        index: usize,
        (config, shard): (&ModelConfig, Shard),
        dtype: Option<DType>,
        b: &B,
    ) -> Result<Self> {
        let linear = |tensors: &[crate::weights::Tensor]| b.linear_weight(tensors, dtype);
        let mixer = match tensors.mixer {
            MixerTensors::Attention { q_proj, k_proj, v_proj, o_proj, q_norm, k_norm } => Mixer::Attention {
                index,
                qkv: linear(&[q_proj, k_proj, v_proj])?,
                out: linear(&[o_proj])?,
                q_norm: b.vector(&q_norm, 1.0)?,
                k_norm: b.vector(&k_norm, 1.0)?,
            },
            MixerTensors::DeltaNet {
                in_proj_qkv,
                in_proj_z,
                in_proj_b,
                in_proj_a,
                conv1d,
                a_log,
                dt_bias,
                norm,
                out_proj,
            } => Mixer::Delta {
                index,
                inputs: linear(&[in_proj_qkv, in_proj_z, in_proj_b, in_proj_a])?,
                conv: b.conv_weight(&conv1d)?,
                a_log: b.vector(&a_log, 0.0)?,
                dt_bias: b.vector(&dt_bias, 0.0)?,
                norm: b.vector(&norm, 0.0)?,
                out: linear(&[out_proj])?,
            },
        };
        let ffn = match (tensors.ffn, &config.ffn) {
            (FfnTensors::Dense { gate_proj, up_proj, down_proj }, _) => {
                Ffn::Dense { gate_up: linear(&[gate_proj, up_proj])?, down: linear(&[down_proj])? }
            }
            (
                FfnTensors::Moe {
                    gate,
                    experts,
                    shared_gate_proj,
                    shared_up_proj,
                    shared_down_proj,
                    shared_expert_gate,
                },
                ffn,
            ) => {
                let (top_k, here) = match ffn {
                    FfnConfig::Moe { top_k, num_experts, .. } => (*top_k, shard.experts(*num_experts)),
                    FfnConfig::Dense { .. } => {
                        return Err(crate::Error::Internal("experts in a dense model".into()));
                    }
                };
                let tensors = MoeTensors {
                    router: &gate,
                    experts: &experts,
                    shared: [&shared_gate_proj, &shared_up_proj, &shared_down_proj],
                    shared_gate: &shared_expert_gate,
                    top_k,
                    here,
                };
                Ffn::Moe(b.moe_weights(tensors, dtype)?)
            }
        };
        Ok(Self {
            input_norm: b.vector(&tensors.input_layernorm, 1.0)?,
            mixer,
            ffn_norm: b.vector(&tensors.post_attention_layernorm, 1.0)?,
            ffn,
        })
    }
}
