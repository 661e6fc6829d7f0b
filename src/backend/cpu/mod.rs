//! The CPU backend: f32 arithmetic over bf16, f16 or f32 weights, used in place from the mapped file. It is the
//! specification that other backends are tested against, and what runs where there is no GPU.
//!
//! Every op gives a token the same bits whatever else is in the batch.

pub mod attention;
mod cached;
pub mod cholesky;
pub mod conv1d;
pub mod delta_rule;
mod gemm;
mod kernel;
pub mod linear;
pub mod moe;
pub mod norm;
mod packed;
pub mod parallel;
mod screen;
pub mod simd;
mod small;
pub mod softmax;
mod tile;

use std::borrow::Cow;
use std::cell::RefCell;
use std::sync::{Arc, Mutex, PoisonError};

use self::attention::{PagedRows, Queries};
use self::cached::{Rows, States};
use self::delta_rule::{Head, OutRows};
use self::linear::Linear;
use self::moe::Moe;
use self::parallel::Shared;
use self::screen::Screen;
use super::{Backend, Caches, DecayWeights, KvCache, MoeTensors, Precision, Rope, StateType};
use crate::batch::{Batch, BatchLimits, BatchSeq, PAGE_LEN};
use crate::config::{AttentionConfig, DeltaConfig, ModelConfig};
use crate::ranks::Group;
use crate::weights::{DType, Tensor};
use crate::{Error, Result};

/// Tokens of one attention task.
const QUERY_TILE: usize = 16;

/// The backend; alone it holds nothing.
#[derive(Default)]
pub struct Cpu {
    ranks: Option<Ranks>,
}

/// The ranks that share its model.
struct Ranks {
    group: Arc<dyn Group>,
    failed: Mutex<Option<Error>>,
}

impl Cpu {
    /// One of several ranks.
    pub fn among(group: Arc<dyn Group>) -> Self {
        Self { ranks: Some(Ranks { group, failed: Mutex::default() }) }
    }

    /// What every rank has of something, in the order of ranks; `None` alone, and where ranks have lost each other.
    fn exchange(&self, mine: &[f32]) -> Option<Vec<Vec<f32>>> {
        let ranks = self.ranks.as_ref()?;
        let mut failed = ranks.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.is_some() {
            return None;
        }
        let bytes: Vec<u8> = mine.iter().flat_map(|x| x.to_le_bytes()).collect();
        match ranks.group.exchange(&bytes, false) {
            Ok(all) => {
                let floats = |bytes: &Arc<[u8]>| {
                    let floats: Vec<f32> =
                        bytes.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect();
                    floats
                };
                Some(all.iter().map(floats).collect())
            }
            Err(error) => {
                *failed = Some(error);
                None
            }
        }
    }
}

/// Activations `[rows, width]`.
pub struct Buf {
    data: Vec<f32>,
    width: usize,
}

/// Keys and values of one attention layer, each `[num_pages, num_kv_heads, PAGE_LEN, head_dim]`.
pub struct Pages {
    k: Rows,
    v: Rows,
}

/// States `[num_slots, V, k_dim, v_dim]` and convolution tails `[num_slots, kernel - 1, C]` of one delta layer.
pub struct Slots {
    state: States,
    tail: Vec<f32>,
    state_len: usize,
    tail_len: usize,
}

impl Buf {
    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.width..(row + 1) * self.width]
    }
}

/// Zeros that the system hands out on first touch: a large pool costs nothing until it is used.
fn zeros<T: Clone + Default>(len: Option<usize>, what: &str) -> Result<Vec<T>> {
    let size = size_of::<T>();
    let too_large = || Error::OutOfMemory {
        what: format!(
            "{what} ({} bytes)",
            len.map_or("over 2^64".into(), |n| (size as u128 * n as u128).to_string())
        ),
        advice: "lower max_model_len, max_num_seqs or max_num_batched_tokens".into(),
    };
    let len = len.filter(|&n| n <= isize::MAX as usize / size).ok_or_else(too_large)?;
    // `vec![0; n]` asks for zeroed pages but aborts on failure, so ask first.
    Vec::<T>::new().try_reserve_exact(len).map_err(|_| too_large())?;
    Ok(vec![T::default(); len])
}

fn product(dims: &[usize]) -> Option<usize> {
    dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
}

/// Elements of a slot's state and of its tail.
fn slot_parts(dims: &DeltaConfig) -> (usize, usize) {
    (dims.num_v_heads * dims.k_dim * dims.v_dim, (dims.conv_kernel - 1) * dims.conv_channels())
}

impl Backend for Cpu {
    type Buf = Buf;
    type Linear = Linear;
    type Vector = Vec<f32>;
    type Screen = Option<Screen>;
    type Moe = Moe;
    type Pages = Pages;
    type Slots = Slots;
    type Scratch = moe::Scratch;

    fn buf(&self, rows: usize, width: usize, _precision: Precision) -> Result<Buf> {
        Ok(Buf { data: zeros(product(&[rows, width]), "activations")?, width })
    }

    fn scratch(&self, _config: &ModelConfig, _limits: &BatchLimits, _caches: Caches) -> Result<moe::Scratch> {
        Ok(moe::Scratch::default())
    }

    fn linear_weight(&self, tensors: &[Tensor], dtype: Option<DType>) -> Result<Linear> {
        tensors.iter().try_for_each(Tensor::check_finite)?;
        Ok(Linear::new(tensors, dtype))
    }

    fn table_weight(&self, tensor: &Tensor, dtype: Option<DType>) -> Result<Linear> {
        Ok(Linear::table(tensor, dtype))
    }

    fn screen(&self, head: &Tensor, dtype: Option<DType>) -> Result<Option<Screen>> {
        Ok(Screen::new(&Linear::table(head, dtype)))
    }

    fn vector(&self, tensor: &Tensor, offset: f32) -> Result<Vec<f32>> {
        Ok(tensor.to_f32().iter().map(|x| x + offset).collect())
    }

    fn conv_weight(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        Ok(conv1d::tap_major(tensor))
    }

    fn moe_weights(&self, t: MoeTensors<'_>, dtype: Option<DType>) -> Result<Moe> {
        let linear = |tensors: &[Tensor]| self.linear_weight(tensors, dtype);
        let [gate, up, shared_down] = t.shared.map(Tensor::clone);
        Ok(Moe {
            router: linear(std::slice::from_ref(t.router))?,
            gate_up: linear(&t.experts.gate_up())?,
            down: linear(&t.experts.down())?,
            shared: Some((linear(&[gate, up])?, linear(&[shared_down])?)),
            shared_gate: Some(linear(std::slice::from_ref(t.shared_gate))?),
            top_k: t.top_k,
            here: t.here,
        })
    }

    fn check(&self) -> Result<()> {
        let Some(ranks) = &self.ranks else { return Ok(()) };
        ranks.failed.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
    }

    fn all_reduce(&self, n: usize, x: &mut Buf) {
        let x = &mut x.data[..n * x.width];
        let Some(all) = self.exchange(x) else { return };
        x.fill(0.0);
        all.iter().for_each(|part| x.iter_mut().zip(part).for_each(|(sum, x)| *sum += x));
    }

    fn all_gather(&self, n: usize, part: &Buf, out: &mut Buf) {
        let Some(all) = self.exchange(&part.data[..n * part.width]) else { return };
        for (rank, part_of) in all.iter().enumerate() {
            let rows = part_of.chunks_exact(part.width).zip(out.data.chunks_exact_mut(out.width));
            rows.for_each(|(from, to)| to[rank * part.width..][..part.width].copy_from_slice(from));
        }
    }

    fn pages(&self, num_pages: usize, dims: &AttentionConfig, kv: KvCache) -> Result<Pages> {
        let num_rows = product(&[num_pages, PAGE_LEN, dims.num_kv_heads]);
        let rows = |what: &str| Rows::new(num_rows, dims.head_dim, kv, what);
        Ok(Pages { k: rows("pages of keys")?, v: rows("pages of values")? })
    }

    fn slots(&self, num_slots: usize, dims: &DeltaConfig, state: StateType) -> Result<Slots> {
        let (state_len, tail_len) = slot_parts(dims);
        Ok(Slots {
            state: States::new(product(&[num_slots, state_len]), state)?,
            tail: zeros(product(&[num_slots, tail_len]), "convolution tails")?,
            state_len,
            tail_len,
        })
    }

    fn page_bytes(&self, dims: &AttentionConfig, kv: KvCache) -> usize {
        2 * PAGE_LEN * dims.num_kv_heads * cached::row_bytes(dims.head_dim, kv)
    }

    fn slot_bytes(&self, dims: &DeltaConfig, state: StateType) -> usize {
        let (state_len, tail_len) = slot_parts(dims);
        cached::element_bytes(state) * state_len + 4 * tail_len
    }

    fn embed(&self, batch: &Batch, table: &Linear, out: &mut Buf) {
        for (&id, row) in batch.token_ids.iter().zip(out.data.chunks_exact_mut(out.width)) {
            table.read_row(id as usize, row);
        }
    }

    fn rmsnorm_residual(
        &self,
        n: usize,
        delta: Option<&Buf>,
        residual: &mut Buf,
        w: &Vec<f32>,
        eps: f32,
        out: &mut Buf,
    ) {
        let width = residual.width;
        let (residual, out) = (Shared::new(&mut residual.data), Shared::new(&mut out.data));
        parallel::for_each(n, 4 * width, |t| {
            // SAFETY: one row per token.
            let (residual, out) = unsafe { (residual.slice(t * width, width), out.slice(t * width, width)) };
            if let Some(delta) = delta {
                residual.iter_mut().zip(delta.row(t)).for_each(|(r, d)| *r += d);
            }
            norm::rms_norm(residual, w, eps, out);
        });
    }

    fn linear(&self, n: usize, x: &Buf, w: &Linear, out: &mut Buf) {
        debug_assert!(x.width == w.num_in && out.width == w.num_out);
        w.forward(&x.data, &mut out.data, n);
    }

    fn top_logits(
        &self,
        n: usize,
        x: &Buf,
        head: (&Linear, &Option<Screen>),
        k: usize,
        num_tokens: usize,
        out: &mut Buf,
    ) {
        let (w, screen) = head;
        let screened =
            screen.as_ref().is_some_and(|s| s.top_logits(w, &x.data, n, k, num_tokens, &mut out.data));
        if !screened {
            self.linear(n, x, w, out);
        }
    }

    fn causal_conv1d(
        &self,
        batch: &Batch,
        dims: &DeltaConfig,
        weight: &Vec<f32>,
        projected: &Buf,
        slots: &mut Slots,
        out: &mut Buf,
    ) {
        for seq in &batch.seqs {
            let tail = &mut slots.tail[seq.slot.0 as usize * slots.tail_len..][..slots.tail_len];
            let rows = seq.query_start * out.width..(seq.query_start + seq.query_len) * out.width;
            let x = &projected.data[seq.query_start * projected.width..];
            conv1d::causal_conv1d(
                x,
                projected.width,
                weight,
                dims.conv_channels(),
                tail,
                &mut out.data[rows],
            );
        }
    }

    fn gated_delta_rule(
        &self,
        batch: &Batch,
        dims: &DeltaConfig,
        decay: DecayWeights<'_, Vec<f32>>,
        mixed: &Buf,
        projected: &Buf,
        slots: &mut Slots,
        out: &mut Buf,
    ) {
        let (heads, width) = (dims.num_v_heads, out.width);
        let (head_len, state_len) = (dims.k_dim * dims.v_dim, slots.state_len);
        let (out, states) = (Shared::new(&mut out.data), slots.state.share());
        let longest = batch.seqs.iter().map(|s| s.query_len).max().unwrap_or(0);
        parallel::for_each(batch.seqs.len() * heads, 3 * longest * head_len, |task| {
            let (seq, head) = (&batch.seqs[task / heads], task % heads);
            let (g, beta) = gates(seq, dims, &decay, projected, head);
            let k_head = head / (heads / dims.num_k_heads);
            let rows = &mixed.data[seq.query_start * mixed.width..];
            let head_args = Head {
                q: &rows[k_head * dims.k_dim..],
                k: &rows[dims.key_width() + k_head * dims.k_dim..],
                v: &rows[2 * dims.key_width() + head * dims.v_dim..],
                strides: [mixed.width; 3],
                g: &g,
                beta: &beta,
                k_dim: dims.k_dim,
                v_dim: dims.v_dim,
                scale: (dims.k_dim as f32).sqrt().recip(),
                qk_l2norm: true,
            };
            // SAFETY: a task has its own head of its own sequence: its state and its columns of `out`.
            unsafe {
                let at = seq.slot.0 as usize * state_len + head * head_len;
                let first = out.get().add(seq.query_start * width + head * dims.v_dim);
                let rows = OutRows { out: first, stride: width };
                states.run(at, head_args, seq.chunked_len, rows);
            }
        });
    }

    fn gated_rmsnorm(
        &self,
        n: usize,
        dims: &DeltaConfig,
        w: &Vec<f32>,
        eps: f32,
        projected: &Buf,
        core: &mut Buf,
    ) {
        let (width, d) = (core.width, dims.v_dim);
        let core = Shared::new(&mut core.data);
        parallel::for_each(n, 16 * width, |t| {
            // SAFETY: one row per token.
            let row = unsafe { core.slice(t * width, width) };
            let z = &projected.row(t)[dims.conv_channels()..][..width];
            for (x, z) in row.chunks_exact_mut(d).zip(z.chunks_exact(d)) {
                norm::gated_rms_norm(x, w, z, eps);
            }
        });
    }

    fn qk_norm_rope_write(
        &self,
        batch: &Batch,
        dims: &AttentionConfig,
        rope: &Rope,
        norms: (&Vec<f32>, &Vec<f32>),
        eps: f32,
        projected: &Buf,
        q: &mut Buf,
        pages: &mut Pages,
    ) {
        let (d, half) = (dims.head_dim, rope.inv_freq.len());
        let (width, kv) = (q.width, dims.num_kv_heads);
        let (q, k_pages, v_pages) = (Shared::new(&mut q.data), pages.k.share(), pages.v.share());
        for seq in &batch.seqs {
            parallel::for_each(seq.query_len, 16 * width, |i| {
                let t = seq.query_start + i;
                let row = projected.row(t);
                let mut angles = vec![0f32; 2 * half];
                let (cos, sin) = angles.split_at_mut(half);
                attention::rotation(rope, batch.positions[t], cos, sin);
                // SAFETY: one row of q per token.
                let q = unsafe { q.slice(t * width, width) };
                for (head, out) in q.chunks_exact_mut(d).enumerate() {
                    norm::rms_norm(&row[2 * head * d..][..d], norms.0, eps, out);
                    attention::rotate(out, cos, sin);
                }
                let (page, place) = batch.place(seq, seq.cached_len + i);
                let mut k = vec![0f32; d];
                for head in 0..kv {
                    let at = (page.0 as usize * kv + head) * PAGE_LEN + place;
                    norm::rms_norm(&row[2 * width + head * d..][..d], norms.1, eps, &mut k);
                    attention::rotate(&mut k, cos, sin);
                    let v = &row[2 * width + (kv + head) * d..][..d];
                    // SAFETY: a token has its own place in the pages of its sequence.
                    unsafe { (k_pages.write(at, &k), v_pages.write(at, v)) };
                }
            });
        }
    }

    fn gated_attention(
        &self,
        batch: &Batch,
        dims: &AttentionConfig,
        q: &Buf,
        projected: &Buf,
        pages: &Pages,
        _scratch: &mut moe::Scratch,
        out: &mut Buf,
    ) {
        let (d, kv, width) = (dims.head_dim, dims.num_kv_heads, q.width);
        let group = dims.num_q_heads / kv;
        let tiles: Vec<(&BatchSeq, usize, usize)> = batch
            .seqs
            .iter()
            .flat_map(|seq| (0..seq.query_len).step_by(QUERY_TILE).map(move |i| (seq, i)))
            .flat_map(|(seq, i)| (0..kv).map(move |head| (seq, i, head)))
            .collect();
        let longest = batch.seqs.iter().map(|s| s.cached_len + s.query_len).max().unwrap_or(0);
        let out = Shared::new(&mut out.data);
        parallel::for_each(tiles.len(), 2 * longest * group * d, |task| {
            let (seq, first, head) = tiles[task];
            let (t, len) = (seq.query_start + first, QUERY_TILE.min(seq.query_len - first));
            let place = |i: usize| (batch.pages[seq.page_start + i].0 as usize * kv + head) * PAGE_LEN;
            let buffers = [RefCell::default(), RefCell::default()];
            let queries = Queries {
                q: &q.data[t * width + head * group * d..],
                stride: width,
                group,
                head_dim: d,
                first_pos: seq.cached_len + first,
                num_tokens: len,
                scale: (d as f32).sqrt().recip(),
            };
            // SAFETY: a tile has its own tokens and its own group of heads.
            let rows = Shared::new(unsafe {
                out.slice(t * width + head * group * d, (len - 1) * width + group * d)
            });
            let k = |i: usize| pages.k.page(place(i), d, &buffers[0]);
            let v = |i: usize| pages.v.page(place(i), d, &buffers[1]);
            attention::attend(
                queries,
                PagedRows { page: &k, row_stride: d },
                PagedRows { page: &v, row_stride: d },
                rows,
            );
            for i in 0..len {
                let gates = projected.row(t + i);
                for g in 0..group {
                    let at = head * group + g;
                    // SAFETY: as above.
                    let out = unsafe { out.slice((t + i) * width + at * d, d) };
                    norm::sigmoid_mul(&gates[(2 * at + 1) * d..][..d], out);
                }
            }
        });
    }

    fn silu_mul(&self, n: usize, gate_up: &Buf, out: &mut Buf) {
        let width = out.width;
        let out = Shared::new(&mut out.data);
        parallel::for_each(n, 16 * width, |t| {
            let (gate, up) = gate_up.row(t).split_at(width);
            // SAFETY: one row per token.
            norm::silu_mul(gate, up, unsafe { out.slice(t * width, width) });
        });
    }

    fn moe(&self, n: usize, x: &Buf, weights: &Moe, scratch: &mut moe::Scratch, out: &mut Buf) {
        weights.forward(n, &x.data, scratch, &mut out.data);
    }

    fn gather(&self, rows: &[usize], x: &Buf, out: &mut Buf) {
        for (&row, out) in rows.iter().zip(out.data.chunks_exact_mut(out.width)) {
            out.copy_from_slice(x.row(row));
        }
    }

    fn scatter(&self, rows: &[usize], x: &Buf, out: &mut Buf) {
        for (i, &row) in rows.iter().enumerate() {
            out.data[row * out.width..(row + 1) * out.width].copy_from_slice(x.row(i));
        }
    }

    fn concat(&self, n: usize, left: &Buf, right: &Buf, out: &mut Buf) {
        debug_assert!(left.width + right.width == out.width);
        for (t, out) in out.data.chunks_exact_mut(out.width).take(n).enumerate() {
            let (a, b) = out.split_at_mut(left.width);
            a.copy_from_slice(left.row(t));
            b.copy_from_slice(right.row(t));
        }
    }

    fn keep_rows(&self, rows: &[usize], buf: &mut Buf) {
        debug_assert!(rows.is_sorted());
        for (i, &row) in rows.iter().enumerate() {
            buf.data.copy_within(row * buf.width..(row + 1) * buf.width, i * buf.width);
        }
    }

    fn read<'a>(&self, buf: &'a mut Buf, rows: usize) -> Cow<'a, [f32]> {
        Cow::Borrowed(&buf.data[..rows * buf.width])
    }

    fn clear_slot(&self, slots: &mut Slots, slot: usize) {
        slots.state.clear(slot * slots.state_len, slots.state_len);
        slots.tail[slot * slots.tail_len..][..slots.tail_len].fill(0.0);
    }
}

/// `g = -exp(a_log) * softplus(a + dt_bias)` and `beta = sigmoid(b)` of one head, for a sequence's new tokens.
fn gates(
    seq: &BatchSeq,
    dims: &DeltaConfig,
    decay: &DecayWeights<'_, Vec<f32>>,
    projected: &Buf,
    head: usize,
) -> (Vec<f32>, Vec<f32>) {
    let first = dims.conv_channels() + dims.value_width();
    let rate = -decay.a_log[head].exp();
    (seq.query_start..seq.query_start + seq.query_len)
        .map(|t| {
            let row = &projected.row(t)[first..];
            let (b, a) = (row[head], row[dims.num_v_heads + head] + decay.dt_bias[head]);
            // Above 20, log(1 + e^a) is a to f32 rounding: the reference's own threshold.
            let softplus = if a > 20.0 { a } else { a.exp().ln_1p() };
            (rate * softplus, 1.0 / (1.0 + (-b).exp()))
        })
        .unzip()
}
