//! Each op of the trait as a launch of its kernels.

use std::borrow::Cow;
use std::ffi::c_int;
use std::sync::{Arc, PoisonError};

use super::buffers::{
    Buf, Moe, Pages, Slots, Vector, bytes_of, delta_dims, fp8_page_bytes, product, slot_parts,
};
use super::graph::{self, Graph, Turn};
use super::others::{Largest, Others};
use super::rounding::{self, Rounding};
use super::step::Step;
use super::weights::Linear;
use super::{Cuda, State, ffi, measure, sample};
use crate::backend::cpu::conv1d::tap_major;
use crate::backend::{
    Backend, Caches, DecayWeights, DeltaWeights, KvCache, Measured, MoeTensors, Precision, Rope, Sampled,
    Sampling, StateType, Stats,
};
use crate::batch::{Batch, BatchLimits, MAX_LOGIT_ROWS, PAGE_LEN};
use crate::config::{AttentionConfig, DeltaConfig, ModelConfig};
use crate::lend::Lendable;
use crate::weights::form::{BlockSizes, Form};
use crate::weights::{DType, Tensor};
use crate::{Error, Result};

impl Backend for Cuda {
    type Buf = Buf;
    type Linear = Linear;
    type Screen = ();
    type Vector = Vector;
    type Moe = Moe;
    type Pages = Pages;
    type Slots = Slots;
    type Scratch = ();

    fn buf(&self, rows: usize, width: usize, precision: Precision) -> Result<Buf> {
        let bytes = product(&[rows, width, bytes_of(precision)]);
        Ok(Buf { memory: self.device.zeros(bytes, "activations")?, rows, width, precision, host: None })
    }

    fn scratch(&self, config: &ModelConfig, limits: &BatchLimits, caches: Caches) -> Result<()> {
        // The weights are there now.
        let uploader = self.uploader.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Kernels read weights before what is ahead of them on the stream has ended.
        if !self.device.is_imagined() {
            self.device.synchronize()?;
        }
        let mut step = Step::new(&self.device, config, limits, caches)?;
        if self.fp8_activations {
            if !uploader.is_some_and(|uploader| uploader.takes_rounded) {
                return Err(rounding::nothing_to_round());
            }
            let moe = step.moe_dims;
            step.rounding = Rounding::new(&self.device, config, limits, moe, self.deterministic)?;
        }
        if let Some(ranks) = &self.ranks {
            let rows = limits.max_tokens;
            let logits = product(&[rows.min(MAX_LOGIT_ROWS), config.vocab, 4]).unwrap_or_default();
            let largest = Largest { rows, width: config.hidden, gather_bytes: logits };
            let loads = self.blas.is_some();
            step.others = Some(ranks.join(&self.device, self.deterministic, loads, &largest)?);
        }
        self.state().step = Some(step);
        Ok(())
    }

    fn linear_weight(&self, tensors: &[Tensor], _dtype: Option<DType>) -> Result<Linear> {
        self.upload(|uploader| uploader.linear(tensors))
    }

    fn table_weight(&self, tensor: &Tensor, _dtype: Option<DType>) -> Result<Linear> {
        // Rows are read from it: no codes.
        self.whole(std::slice::from_ref(tensor), Form::Bf16)
    }

    fn screen(&self, _head: &Tensor, _dtype: Option<DType>) -> Result<()> {
        Ok(())
    }

    fn vector(&self, tensor: &Tensor, offset: f32) -> Result<Vector> {
        let values: Vec<f32> = tensor.to_f32().iter().map(|x| x + offset).collect();
        Ok(Vector(self.upload(|uploader| uploader.vector(&values))?))
    }

    fn conv_weight(&self, tensor: &Tensor) -> Result<Vector> {
        Ok(Vector(self.upload(|uploader| uploader.vector(&tap_major(tensor)))?))
    }

    fn moe_weights(&self, t: MoeTensors<'_>, _dtype: Option<DType>) -> Result<Moe> {
        let [gate, up, shared_down] = t.shared.map(Tensor::clone);
        let (gate_up, down) = (t.experts.gate_up(), t.experts.down());
        let (shared_gate_up, shared_down) = (vec![gate, up], vec![shared_down]);
        let cols = |tensors: &[Tensor]| tensors.first().map_or(0, Tensor::num_cols);
        let sizes = BlockSizes {
            hidden: t.router.num_cols(),
            width: cols(&down),
            shared_width: cols(&shared_down),
            top_k: t.top_k,
        };
        let dims = ffi::MoeDims {
            hidden: sizes.hidden as i32,
            num_experts: t.router.num_rows() as i32,
            top_k: t.top_k as i32,
            width: sizes.width as i32,
            shared_width: sizes.shared_width as i32,
            first_expert: t.here.start as i32,
            num_here: t.here.len() as i32,
        };
        let parts = [&gate_up, &down, &shared_gate_up, &shared_down];
        let forms = parts.map(|tensors| Form::of_all(tensors.iter().map(Form::of)));
        let forms = Form::of_block(forms, sizes);
        let (gate_up, down) = (self.whole(&gate_up, forms[0])?, self.whole(&down, forms[1])?);
        let (shared_gate_up, shared_down) =
            (self.whole(&shared_gate_up, forms[2])?, self.whole(&shared_down, forms[3])?);
        let plain = |tensor: &Tensor| self.whole(std::slice::from_ref(tensor), Form::Bf16);
        let (router, shared_gate) = (plain(t.router)?, plain(t.shared_gate)?);
        Ok(Moe { dims, router, gate_up, down, shared_gate_up, shared_down, shared_gate })
    }

    fn pages(&self, num_pages: usize, dims: &AttentionConfig, kv: KvCache) -> Result<Pages> {
        if kv == KvCache::Fp8 {
            let bytes = product(&[num_pages, fp8_page_bytes(dims)]);
            return Ok(Pages::Fp8(self.device.alloc(bytes, "pages of keys and values")?));
        }
        let bytes = product(&[num_pages, PAGE_LEN, dims.kv_width(), 2]);
        Ok(Pages::Bf16 {
            k: self.device.alloc(bytes, "pages of keys")?,
            v: self.device.alloc(bytes, "pages of values")?,
        })
    }

    fn slots(&self, num_slots: usize, dims: &DeltaConfig, state_type: StateType) -> Result<Slots> {
        let (state_bytes, tail_bytes) = slot_parts(dims, state_type);
        Ok(Slots {
            state: self.device.zeros(product(&[num_slots, state_bytes]), "recurrent states")?,
            tail: self.device.zeros(product(&[num_slots, tail_bytes]), "convolution tails")?,
            state_type,
            state_bytes,
            tail_bytes,
        })
    }

    fn page_bytes(&self, dims: &AttentionConfig, kv: KvCache) -> usize {
        match kv {
            KvCache::Auto => 2 * 2 * PAGE_LEN * dims.kv_width(),
            KvCache::Fp8 => fp8_page_bytes(dims),
        }
    }

    fn slot_bytes(&self, dims: &DeltaConfig, state: StateType) -> usize {
        let (state, tail) = slot_parts(dims, state);
        state + tail
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        // Recorded steps come later.
        self.device.free_memory().map(|free| Some(free.saturating_sub(graph::RESERVED_BYTES)))
    }

    fn stats(&self) -> Stats {
        let state = self.state();
        // Deterministic products have more rows than the step has tokens, and the experts' numbers lie elsewhere.
        let step = state.step.as_ref().filter(|_| !self.deterministic);
        let experts = step.and_then(|step| step.experts_hit(&self.device).ok().flatten());
        Stats {
            memory: self.device.ledger(),
            nodes_per_step: state.graphs.last_num_nodes,
            experts_hit: experts,
        }
    }

    fn measure(&self) -> Result<Option<Measured>> {
        measure::measure(&self.device, self.blas.as_ref())
    }

    fn begin(&self, batch: &Batch) {
        self.launch("the batch", batch.num_tokens(), |step, _| {
            // A recorded step does not ask.
            step.others.as_ref().map_or(Ok(()), Others::check).map_err(|error| self.why_lost(error))?;
            step.begin(batch).map(|()| 0)
        });
    }

    fn replay(&self, _batch: &Batch, mut ops: impl FnMut() -> Result<()>) -> Result<()> {
        let turn = {
            let State { step, graphs, error } = &mut *self.state();
            let shape = step.as_ref().and_then(Step::shape).filter(|_| self.records && error.is_none());
            match shape {
                Some(shape) => (graphs.turn(shape)?, Some(shape)),
                None => (Turn::Run, None),
            }
        };
        match turn {
            (Turn::Launched, _) => Ok(()),
            (Turn::Record, Some(shape)) => {
                let Some(graph) = Graph::record(&self.device, &mut ops)? else {
                    // Nothing has run; what launches said of a recording that was lost is not to be kept.
                    self.state().error = None;
                    return ops();
                };
                let State { graphs, error, .. } = &mut *self.state();
                if error.is_some() { Ok(()) } else { graphs.keep(shape, graph) }
            }
            _ => ops(),
        }
    }

    fn give_up(&self) {
        if let Some(others) = self.state().step.as_ref().and_then(|step| step.others.as_ref()) {
            others.give_up();
        }
    }

    fn check(&self) -> Result<()> {
        self.state().error.as_ref().map_or(Ok(()), |error| Err(error.again()))
    }

    fn embed(&self, batch: &Batch, table: &Linear, out: &mut Buf) {
        let hidden = table.num_in as c_int;
        self.launch("embed", batch.num_tokens(), |step, stream| {
            // SAFETY: shapes are those of the trait.
            Ok(unsafe { ffi::q35_embed(stream, step.batch, table.ptr(), hidden, out.memory.ptr()) })
        });
    }

    fn rmsnorm_residual(
        &self,
        n: usize,
        delta: Option<&Buf>,
        residual: &mut Buf,
        w: &Vector,
        eps: f32,
        out: &mut Buf,
    ) {
        let (rows, hidden) = (n as c_int, residual.width as c_int);
        let delta = delta.map_or(std::ptr::null_mut(), |d| d.memory.ptr());
        let (residual, w, out) = (residual.memory.ptr(), w.0.ptr(), out.memory.ptr());
        self.launch("rmsnorm_residual", n, |_, stream| {
            // SAFETY: shapes are those of the trait.
            Ok(unsafe { ffi::q35_rmsnorm_residual(stream, rows, hidden, delta, residual, w, eps, out) })
        });
    }

    fn all_reduce(&self, n: usize, x: &mut Buf) {
        if self.ranks.is_some() {
            self.sum(n, x);
        }
    }

    fn all_reduce_norm(
        &self,
        n: usize,
        delta: &mut Buf,
        residual: &mut Buf,
        w: &Vector,
        eps: f32,
        out: &mut Buf,
    ) {
        match self.ranks {
            Some(_) => self.sum_norm(n, delta, residual, w, eps, out),
            None => self.rmsnorm_residual(n, Some(delta), residual, w, eps, out),
        }
    }

    fn all_reduce_norm_moe(
        &self,
        n: usize,
        residual: &mut Buf,
        norm: (&Vector, f32),
        x: &mut Buf,
        weights: &Moe,
        _scratch: &mut (),
        block: &mut Buf,
    ) {
        self.sum_norm_experts(n, residual, norm, x, weights, block);
    }

    fn all_gather(&self, n: usize, part: &Buf, out: &mut Buf) {
        self.gather_parts(n, part, out);
    }

    fn linear(&self, n: usize, x: &Buf, w: &Linear, out: &mut Buf) {
        debug_assert!(x.width == w.num_in && out.width == w.num_out);
        let n = self.num_rows(n, x.rows.min(out.rows));
        self.products(n, x, &w.parts, out);
    }

    fn top_logits(
        &self,
        n: usize,
        x: &Buf,
        head: (&Linear, &()),
        _k: usize,
        _num_tokens: usize,
        out: &mut Buf,
    ) {
        self.linear(n, x, head.0, out);
    }

    fn causal_conv1d(
        &self,
        batch: &Batch,
        dims: &DeltaConfig,
        weight: &Vector,
        projected: &Buf,
        slots: &mut Slots,
        out: &mut Buf,
    ) {
        let stride = projected.width as c_int;
        let (weight, x, tails, out) =
            (weight.0.ptr(), projected.memory.ptr(), slots.tail.ptr(), out.memory.ptr());
        self.launch("causal_conv1d", batch.num_tokens(), |step, stream| {
            // SAFETY: shapes are those of the trait.
            Ok(unsafe {
                ffi::q35_causal_conv1d(
                    stream,
                    step.batch,
                    delta_dims(dims, slots.state_type),
                    weight,
                    x,
                    stride,
                    tails,
                    out,
                )
            })
        });
    }

    fn gated_delta_net(
        &self,
        batch: &Batch,
        dims: &DeltaConfig,
        w: &DeltaWeights<'_, Vector>,
        eps: f32,
        projected: &Buf,
        slots: &mut Slots,
        mixed: &mut Buf,
        core: &mut Buf,
    ) {
        self.launch("gated_delta_net", batch.num_tokens(), |step, stream| {
            let (x, stride) = (projected.memory.ptr(), projected.width as c_int);
            let z_start = dims.conv_channels() as c_int;
            let ba_start = (dims.conv_channels() + dims.value_width()) as c_int;
            let (conv, a_log, dt_bias, norm) =
                (w.conv.0.ptr(), w.a_log.0.ptr(), w.dt_bias.0.ptr(), w.norm.0.ptr());
            let (tails, states) = (slots.tail.ptr(), slots.state.ptr());
            let (mixed, out) = (mixed.memory.ptr(), core.memory.ptr());
            let (batch, dims) = (step.batch, delta_dims(dims, slots.state_type));
            // SAFETY: shapes are those of the trait; counters and workspace are for the largest batch.
            Ok(unsafe {
                if step.is_decode() {
                    let counters = step.counters.ptr();
                    ffi::q35_delta_decode(
                        stream, batch, dims, conv, a_log, dt_bias, norm, eps, x, stride, z_start, ba_start,
                        tails, states, counters, mixed, out,
                    )
                } else {
                    let workspace = step.delta.ptr();
                    ffi::q35_delta_prompt(
                        stream, batch, dims, conv, a_log, dt_bias, norm, eps, x, stride, z_start, ba_start,
                        tails, states, workspace, mixed, out,
                    )
                }
            })
        });
    }

    fn gated_delta_rule(
        &self,
        batch: &Batch,
        dims: &DeltaConfig,
        decay: DecayWeights<'_, Vector>,
        mixed: &Buf,
        projected: &Buf,
        slots: &mut Slots,
        out: &mut Buf,
    ) {
        self.launch("gated_delta_rule", batch.num_tokens(), |step, stream| {
            // SAFETY: shapes are those of the trait; the workspace is for the largest batch.
            Ok(unsafe {
                ffi::q35_gated_delta_rule(
                    stream,
                    step.batch,
                    delta_dims(dims, slots.state_type),
                    decay.a_log.0.ptr(),
                    decay.dt_bias.0.ptr(),
                    mixed.memory.ptr(),
                    projected.memory.ptr(),
                    projected.width as c_int,
                    (dims.conv_channels() + dims.value_width()) as c_int,
                    slots.state.ptr(),
                    step.delta.ptr(),
                    out.memory.ptr(),
                )
            })
        });
    }

    fn gated_rmsnorm(
        &self,
        n: usize,
        dims: &DeltaConfig,
        w: &Vector,
        eps: f32,
        projected: &Buf,
        core: &mut Buf,
    ) {
        self.launch("gated_rmsnorm", n, |_, stream| {
            // SAFETY: shapes are those of the trait.
            Ok(unsafe {
                ffi::q35_gated_rmsnorm(
                    stream,
                    n as c_int,
                    dims.num_v_heads as c_int,
                    dims.v_dim as c_int,
                    w.0.ptr(),
                    eps,
                    projected.memory.ptr(),
                    projected.width as c_int,
                    dims.conv_channels() as c_int,
                    core.memory.ptr(),
                )
            })
        });
    }

    fn qk_norm_rope_write(
        &self,
        batch: &Batch,
        dims: &AttentionConfig,
        rope: &Rope,
        norms: (&Vector, &Vector),
        eps: f32,
        projected: &Buf,
        q: &mut Buf,
        pages: &mut Pages,
    ) {
        self.write_pages(batch, dims, rope, norms, eps, projected, q, pages);
    }

    fn gated_attention(
        &self,
        batch: &Batch,
        dims: &AttentionConfig,
        q: &Buf,
        projected: &Buf,
        pages: &Pages,
        _scratch: &mut (),
        out: &mut Buf,
    ) {
        self.attend(batch, dims, q, projected, pages, out);
    }

    fn silu_mul(&self, n: usize, gate_up: &Buf, out: &mut Buf) {
        let (rows, width) = (n as c_int, out.width as c_int);
        let (gate_up, out) = (gate_up.memory.ptr(), out.memory.ptr());
        self.launch("silu_mul", n, |_, stream| {
            // SAFETY: shapes are those of the trait.
            Ok(unsafe { ffi::q35_silu_mul(stream, rows, width, gate_up, out) })
        });
    }

    fn moe(&self, n: usize, x: &Buf, m: &Moe, _scratch: &mut (), out: &mut Buf) {
        self.experts(n, x, m, out);
    }

    fn norm_moe(
        &self,
        n: usize,
        residual: &mut Buf,
        norm: (&Vector, f32),
        x: &mut Buf,
        m: &Moe,
        _scratch: &mut (),
        block: &mut Buf,
    ) {
        self.norm_experts(n, residual, norm, x, m, block);
    }

    fn norm_moe_norm(
        &self,
        n: usize,
        residual: &mut Buf,
        norms: (&Vector, &Vector, f32),
        x: &mut Buf,
        m: &Moe,
        _scratch: &mut (),
        block: &mut Buf,
    ) {
        self.norm_experts_norm(n, residual, norms, x, m, block);
    }

    const SAMPLES: bool = true;

    fn can_sample(&self, rows: &[Sampling]) -> bool {
        sample::can_sample(rows)
    }

    fn begin_sampling(&self, rows: &[Sampling]) {
        self.launch("sampling", rows.len(), |step, _| step.sampler.begin(rows).map(|()| 0));
    }

    fn sample(&self, first: usize, n: usize, num_tokens: usize, logits: &Buf) {
        self.launch("sample", n, |step, stream| {
            let sizes = (logits.width, num_tokens);
            // SAFETY: logits are f32, as many rows as were computed.
            Ok(unsafe {
                step.sampler.launch(stream, (first, n), sizes, logits.memory.ptr(), step.next_tokens())
            })
        });
    }

    fn send_sampled(&self) {
        self.launch("sending tokens", 1, |step, _| {
            // First: whoever has waited for the tokens finds it.
            step.others.as_mut().map_or(Ok(()), Others::send)?;
            step.sampler.send().map(|()| 0)
        });
    }

    fn sampled(&self) -> Result<Vec<Sampled>> {
        self.check()?;
        match &mut self.state().step {
            Some(step) => {
                let sampled = step.sampler.read();
                // Where a rank was lost, that is why the device failed.
                step.others.as_ref().map_or(Ok(()), Others::check).map_err(|error| self.why_lost(error))?;
                sampled
            }
            None => Err(Error::Internal("sampling without scratch".into())),
        }
    }

    fn lendable(&self, rows: usize, width: usize) -> Result<Option<Arc<dyn Lendable>>> {
        self.lend(rows, width).map(Some)
    }

    fn lend_rows(&self, n: usize, x: &Buf, to: &dyn Lendable, at: usize) -> Result<()> {
        self.check()?;
        self.copy_rows(n, x, to, at)?;
        self.check_others();
        self.check()
    }

    fn gather(&self, rows: &[usize], x: &Buf, out: &mut Buf) {
        self.gather_of(rows, x, out);
    }

    fn scatter(&self, rows: &[usize], x: &Buf, out: &mut Buf) {
        self.scatter_of(rows, x, out);
    }

    fn concat(&self, n: usize, left: &Buf, right: &Buf, out: &mut Buf) {
        self.concat_of(n, left, right, out);
    }

    fn keep_rows(&self, rows: &[usize], buf: &mut Buf) {
        self.kept_rows_of(rows, buf);
    }

    fn read<'a>(&self, buf: &'a mut Buf, rows: usize) -> Cow<'a, [f32]> {
        let (len, precision) = (rows * buf.width, buf.precision);
        self.check_others();
        match buf.fetch(&self.device, rows) {
            Ok(host) if precision == Precision::Full => Cow::Borrowed(&host.items()[..len]),
            Ok(host) => {
                let pairs = host.as_slice()[..2 * len].chunks_exact(2);
                Cow::Owned(pairs.map(|x| half::bf16::from_ne_bytes([x[0], x[1]]).to_f32()).collect())
            }
            Err(error) => {
                // The first error is the one that says what happened.
                self.state().error.get_or_insert(error);
                Cow::Owned(vec![0.0; len])
            }
        }
    }

    fn clear_slot(&self, slots: &mut Slots, slot: usize) {
        let clear = || {
            slots.state.clear(slot * slots.state_bytes, slots.state_bytes)?;
            slots.tail.clear(slot * slots.tail_bytes, slots.tail_bytes)
        };
        if let Err(error) = clear() {
            self.state().error.get_or_insert(error);
        }
    }
}
