//! Each op of the trait as a launch of its kernels.

use std::borrow::Cow;
use std::ffi::c_int;
use std::sync::{Arc, PoisonError};

use super::buffers::{
    Buf, Moe, Pages, Slots, Vector, bytes_of, delta_dims, fp8_page_bytes, is_run, product, slot_parts,
    takes_codes,
};
use super::form::Form;
use super::graph::{self, Graph, Turn};
use super::step::Step;
use super::weights::Linear;
use super::{Cuda, State, ffi, measure, sample};
use crate::backend::cpu::conv1d::tap_major;
use crate::backend::{
    Backend, Caches, DecayWeights, DeltaWeights, KvCache, Measured, MoeTensors, Precision, Rope, Sampled,
    Sampling, StateType, Stats,
};
use crate::batch::{Batch, BatchLimits, PAGE_LEN};
use crate::config::{AttentionConfig, DeltaConfig, ModelConfig};
use crate::lend::Lendable;
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
        *self.uploader.lock().unwrap_or_else(PoisonError::into_inner) = None;
        // Kernels read weights before what is ahead of them on the stream has ended.
        if !self.device.is_imagined() {
            self.device.synchronize()?;
        }
        let step = Step::new(&self.device, config, limits, caches)?;
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
        let width = |tensors: &[Tensor]| tensors.first().map_or(0, Tensor::num_cols) as i32;
        let dims = ffi::MoeDims {
            hidden: t.router.num_cols() as i32,
            num_experts: t.router.num_rows() as i32,
            top_k: t.top_k as i32,
            width: width(&down),
            shared_width: width(&shared_down),
        };
        let experts = |tensors: &[Tensor]| {
            let form = if takes_codes(&dims) { Form::of_all(tensors) } else { Form::Bf16 };
            self.whole(tensors, form)
        };
        let (gate_up, down) = (experts(&gate_up)?, experts(&down)?);
        let (shared_gate_up, shared_down) = (experts(&shared_gate_up)?, experts(&shared_down)?);
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
        self.launch("the batch", batch.num_tokens(), |step, _| step.begin(batch).map(|()| 0));
    }

    fn replay(&self, _batch: &Batch, ops: impl FnOnce() -> Result<()>) -> Result<()> {
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
                let graph = Graph::record(&self.device, ops)?;
                let State { graphs, error, .. } = &mut *self.state();
                if error.is_some() { Ok(()) } else { graphs.keep(shape, graph) }
            }
            _ => ops(),
        }
    }

    fn check(&self) -> Result<()> {
        match &self.state().error {
            None => Ok(()),
            Some(Error::Cuda { what, advice }) => {
                Err(Error::Cuda { what: what.clone(), advice: advice.clone() })
            }
            Some(error) => Err(Error::Internal(error.to_string())),
        }
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
        self.launch("sending tokens", 1, |step, _| step.sampler.send().map(|()| 0));
    }

    fn sampled(&self) -> Result<Vec<Sampled>> {
        self.check()?;
        match &mut self.state().step {
            Some(step) => step.sampler.read(),
            None => Err(Error::Internal("sampling without scratch".into())),
        }
    }

    fn lendable(&self, rows: usize, width: usize) -> Result<Option<Arc<dyn Lendable>>> {
        self.lend(rows, width).map(Some)
    }

    fn lend_rows(&self, n: usize, x: &Buf, to: &dyn Lendable, at: usize) -> Result<()> {
        self.check()?;
        self.copy_rows(n, x, to, at)
    }

    fn gather(&self, rows: &[usize], x: &Buf, out: &mut Buf) {
        debug_assert!(x.width == out.width);
        self.launch("gather", rows.len(), |step, stream| {
            let (row_bytes, num) = (x.row_bytes(), rows.len());
            if is_run(rows) && x.precision == out.precision {
                return out.memory.copy(0, &x.memory, rows[0] * row_bytes, num * row_bytes).map(|()| 0);
            }
            let same = x.precision == out.precision;
            let to = if same { out.memory.ptr() } else { step.gathered.ptr() };
            let (at, elements) = (step.rows(rows)?, (num * x.width) as i64);
            // SAFETY: rows of x, as many as fit `to`.
            let code =
                unsafe { ffi::q35_gather(stream, at, num as c_int, x.memory.ptr(), row_bytes as i64, to) };
            let from = &step.gathered;
            Ok(match (code, x.precision, out.precision) {
                (0, Precision::Compute, Precision::Full) => {
                    // SAFETY: as many elements as were gathered.
                    unsafe { ffi::q35_to_f32(stream, elements, from.ptr(), out.memory.ptr()) }
                }
                (0, Precision::Full, Precision::Compute) => {
                    // SAFETY: as above.
                    unsafe { ffi::q35_to_bf16(stream, elements, from.ptr(), out.memory.ptr()) }
                }
                _ => code,
            })
        });
    }

    fn scatter(&self, rows: &[usize], x: &Buf, out: &mut Buf) {
        debug_assert!(x.width == out.width && x.precision == out.precision);
        self.launch("scatter", rows.len(), |_, _| {
            let (bytes, mut done) = (x.row_bytes(), 0);
            for run in rows.chunk_by(|a, b| a + 1 == *b) {
                out.memory.copy(run[0] * bytes, &x.memory, done * bytes, run.len() * bytes)?;
                done += run.len();
            }
            Ok(0)
        });
    }

    fn concat(&self, n: usize, left: &Buf, right: &Buf, out: &mut Buf) {
        debug_assert!(left.width + right.width == out.width);
        self.launch("concat", n, |_, _| {
            let (a, b, pitch) = (left.row_bytes(), right.row_bytes(), out.row_bytes());
            out.memory.copy_columns(n, 0, pitch, &left.memory, a)?;
            out.memory.copy_columns(n, a, pitch, &right.memory, b)?;
            Ok(0)
        });
    }

    fn keep_rows(&self, rows: &[usize], buf: &mut Buf) {
        if is_run(rows) && rows.first() == Some(&0) {
            return;
        }
        self.launch("keep_rows", rows.len(), |step, stream| {
            let row_bytes = buf.row_bytes();
            let (at, to) = (step.rows(rows)?, step.gathered.ptr());
            let num = rows.len() as c_int;
            // SAFETY: rows of the buffer, as many as fit `gathered`.
            let code = unsafe { ffi::q35_gather(stream, at, num, buf.memory.ptr(), row_bytes as i64, to) };
            match code {
                0 => buf.memory.copy(0, &step.gathered, 0, rows.len() * row_bytes).map(|()| 0),
                code => Ok(code),
            }
        });
    }

    fn read<'a>(&self, buf: &'a mut Buf, rows: usize) -> Cow<'a, [f32]> {
        let (len, precision) = (rows * buf.width, buf.precision);
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
