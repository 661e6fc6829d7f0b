//! The ops of `qwen35rs.ops` on memory and a stream of the caller's, each mapped onto launchers of `cuda/launch.h`.
//! What they make is allocated and freed in the order of that stream. Nothing waits, but `gated_delta_rule` for its
//! gates.
//!
//! A launcher may read weights before the kernel ahead of it has ended (`cuda/device.cuh`), and here that kernel may be
//! the one that makes them: a clear, which begins when all before it has ended, stands between (`fence`).

mod gates;
mod queue;

use std::ffi::{CStr, c_int};
use std::sync::Arc;

use half::bf16;

use self::gates::gates;
pub use self::queue::{Memory, Queue, View};
use super::ffi;
use crate::backend::Rope;
use crate::batch::PAGE_LEN;
use crate::{Error, Result};

/// Bytes of an element.
const BF16: usize = 2;
const F32: usize = 4;

/// The bits of a gate whose sigmoid is 1, the bf16 64.
const OPEN: u16 = 0x4280;

const ADVICE: &str = "this, or what was launched before it, failed";

/// The error of a launcher.
fn launched(name: &str, code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the runtime has a text for every code, which lives forever.
    let text = unsafe { CStr::from_ptr(ffi::cudaGetErrorString(code)) };
    Err(Error::Cuda {
        what: format!("{name}: {} (error {code})", text.to_string_lossy()),
        advice: ADVICE.into(),
    })
}

/// A size as launchers take it.
fn int(n: usize) -> Result<c_int> {
    c_int::try_from(n).map_err(|_| Error::request("shape", format!("a size of {n}"), "sizes below 2^31"))
}

/// Where tokens are.
pub enum Positions<'a> {
    /// T, H and W of each.
    Host(&'a [[u32; 3]]),
    /// int32 or int64 `[n]` or `[3, n]`.
    Device(View<'a>),
}

/// The weights of [`Queue::moe`], bf16, as `q35_moe_weights` but for the shared expert's two.
#[allow(missing_docs)]
pub struct MoeViews<'a> {
    pub router: View<'a>,
    pub gate_up: View<'a>,
    pub down: View<'a>,
    /// `gate_proj`, `up_proj`, `down_proj`, `gate`
    pub shared: Option<[View<'a>; 4]>,
}

impl Queue {
    /// An f32 copy of f32 or bf16.
    fn widened(self: &Arc<Self>, x: View<'_>) -> Result<Memory> {
        let wide = self.alloc(&[x.len], F32)?;
        if x.size == F32 {
            self.copy(wide.at, x)?;
        } else if x.len > 0 {
            // SAFETY: as many elements in both.
            launched("to_f32", unsafe { ffi::q35_to_f32(self.on(), x.len as i64, x.ptr(), wide.ptr()) })?;
        }
        Ok(wide)
    }

    /// `1 + weight` in f32. The op that adds is that of the residual stream, of one row: ones are added to it.
    fn one_plus(self: &Arc<Self>, weight: View<'_>) -> Result<Memory> {
        let sum = self.widened(weight)?;
        let width = weight.len as u64;
        // f32 ones, bf16 ones, and room for the norm, which nobody reads.
        let scratch = self.alloc(&[2, weight.len], F32)?;
        let (delta, norm) = (scratch.at + 4 * width, scratch.at + 6 * width);
        self.fill(scratch.at, 1.0, weight.len)?;
        self.fill16(delta, bf16::ONE.to_bits(), weight.len)?;
        // SAFETY: one row of each, `width` long.
        launched("rmsnorm_residual", unsafe {
            ffi::q35_rmsnorm_residual(
                self.on(),
                1,
                int(weight.len)?,
                delta as *const _,
                sum.ptr(),
                scratch.ptr(),
                1.0,
                norm as *mut _,
            )
        })?;
        Ok(sum)
    }

    /// `out[i] = x[rows(i)]` for `num` rows of `width` elements, which the caller has seen to be rows of x.
    fn gather(
        self: &Arc<Self>,
        x: View<'_>,
        (num, width): (usize, usize),
        rows: impl Fn(usize) -> usize,
    ) -> Result<Memory> {
        let (num_rows, row_bytes) = (int(num)?, (width * x.size) as i64);
        int(x.len / width)?;
        let rows = self.upload(&(0..num).map(|i| rows(i) as i32).collect::<Vec<_>>())?;
        let out = self.alloc(&[num, width], x.size)?;
        self.fence(&out)?;
        // SAFETY: rows of x, and as many as there is room for.
        launched("gather", unsafe {
            ffi::q35_gather(self.on(), rows.ptr(), num_rows, x.ptr(), row_bytes, out.ptr())
        })?;
        Ok(out)
    }

    /// The batch of one sequence: `n` new tokens after `cached`, in pages 0 and on and in slot 0.
    fn sequence(
        self: &Arc<Self>,
        n: usize,
        cached: usize,
        chunked: usize,
        positions: Option<&[[u32; 3]]>,
    ) -> Result<(Memory, ffi::Batch)> {
        let len = n + cached;
        // A list of zeros is its token ids and the sequences of its tokens; one zero is its first token, slot and page.
        let mut ints = vec![0; n];
        match positions {
            Some(positions) => ints.extend(positions.iter().flatten().map(|&p| p as i32)),
            None => ints.resize(4 * n, 0),
        }
        ints.extend([0, int(n)?, int(cached)?, int(chunked)?]);
        ints.extend(0..int(len.div_ceil(PAGE_LEN))?);
        int(len)?;
        let memory = self.upload(&ints)?;
        let at = |i: usize| memory.ptr::<i32>().wrapping_add(i).cast_const();
        let batch = ffi::Batch {
            num_tokens: n as i32,
            num_seqs: 1,
            max_query_len: n as i32,
            max_kv_len: len as i32,
            token_ids: at(0),
            positions: at(n),
            seq_of: at(0),
            query_start: at(4 * n),
            query_len: at(4 * n + 1),
            cached_len: at(4 * n + 2),
            chunked_len: at(4 * n + 3),
            slot: at(4 * n),
            page_start: at(4 * n),
            pages: at(4 * n + 4),
        };
        Ok((memory, batch))
    }

    /// `ops.rms_norm`: x bf16 or f32 (bf16 beside a residual), weight and residual either. The norm in bf16, and
    /// `x + residual` in f32.
    pub fn rms_norm(
        self: &Arc<Self>,
        x: View<'_>,
        weight: View<'_>,
        eps: f32,
        residual: Option<View<'_>>,
    ) -> Result<(Memory, Option<Memory>)> {
        let _current = self.bind()?;
        let (y, n) = (self.alloc(&[x.len], BF16)?, x.len / weight.len.max(1));
        let sum = match residual {
            Some(residual) => Some(self.widened(residual)?),
            None if x.size == BF16 => Some(self.widened(x)?),
            None => None,
        };
        if n > 0 {
            let weight_plus_one = self.one_plus(weight)?;
            self.fence(&y)?;
            let delta = if residual.is_some() { x.ptr() } else { std::ptr::null_mut() };
            let stream = sum.as_ref().map_or(x.ptr(), Memory::ptr);
            let (n, width) = (int(n)?, int(weight.len)?);
            // SAFETY: n rows of `width`. Without a delta the residual stream is read only, so it may be x itself.
            launched("rms_norm", unsafe {
                let w = weight_plus_one.ptr();
                ffi::q35_rmsnorm_residual(self.on(), n, width, delta, stream, w, eps, y.ptr())
            })?;
        }
        Ok((y, sum.filter(|_| residual.is_some())))
    }

    /// `ops.rope`: x bf16 `[n, heads, head_dim]`. The launcher norms before it rotates: beside an epsilon of 2^100 the
    /// mean square of numbers below 2^38 is nothing, so the norm divides by 2^50, exactly, and its weight multiplies by
    /// that.
    pub fn rope(
        self: &Arc<Self>,
        x: View<'_>,
        [n, heads, head_dim]: [usize; 3],
        rope: &Rope,
        positions: Positions<'_>,
    ) -> Result<Memory> {
        const LARGE: f32 = (1u64 << 50) as f32;
        let _current = self.bind()?;
        let out = self.alloc(&[x.len], BF16)?;
        if x.len == 0 {
            return Ok(out);
        }
        let host = match positions {
            Positions::Host(list) => Some(list),
            Positions::Device(_) => None,
        };
        let (_ints, mut batch) = self.sequence(n, 0, 0, host)?;
        let on_device = match positions {
            Positions::Host(_) => None,
            Positions::Device(from) => {
                // The low half of an int64 is the int32.
                let (axes, halves) = (from.len / n, from.size / 4);
                let at = |i: usize| ((i % 3).min(axes - 1) * n + i / 3) * halves;
                Some(self.gather(from.of_size(4), (3 * n, 1), at)?)
            }
        };
        batch.positions = on_device.as_ref().map_or(batch.positions, |p| p.ptr::<i32>().cast_const());
        // Rows [q | gate] of each head, then a key and a value. Nobody looks at what is not q.
        let slots = 2 * heads + 2;
        let row = |i: usize| match i % slots {
            slot if slot < 2 * heads && slot % 2 == 0 => i / slots * heads + slot / 2,
            _ => 0,
        };
        let projected = self.gather(x, (n.saturating_mul(slots), head_dim), row)?;
        let (inv_freq, axis) = (self.upload(&rope.inv_freq)?, self.upload(&rope.axis)?);
        let norm = self.alloc(&[head_dim], F32)?;
        self.fill(norm.at, LARGE, head_dim)?;
        let pages = [n.div_ceil(PAGE_LEN), PAGE_LEN, head_dim];
        let (k, v) = (self.alloc(&pages, BF16)?, self.alloc(&pages, BF16)?);
        let dims = ffi::AttentionDims { num_q_heads: int(heads)?, num_kv_heads: 1, head_dim: int(head_dim)? };
        let (num_freqs, stride) = (int(rope.inv_freq.len())?, int(slots.saturating_mul(head_dim))?);
        self.fence(&out)?;
        // SAFETY: shapes are those of the launcher.
        launched("rope", unsafe {
            ffi::q35_qk_norm_rope_write(
                self.on(),
                batch,
                dims,
                norm.ptr(),
                norm.ptr(),
                LARGE * LARGE,
                inv_freq.ptr(),
                axis.ptr(),
                num_freqs,
                rope.scale,
                projected.ptr(),
                stride,
                out.ptr(),
                k.ptr(),
                v.ptr(),
            )
        })?;
        Ok(out)
    }

    /// `ops.route`: logits f32 or bf16 `[n, num_experts]`. Weights f32 and experts int32, `[n, top_k]`.
    pub fn route(
        self: &Arc<Self>,
        logits: View<'_>,
        num_experts: usize,
        top_k: usize,
    ) -> Result<(Memory, Memory)> {
        let _current = self.bind()?;
        let n = logits.len / num_experts;
        let (weights, experts) = (self.alloc(&[n, top_k], F32)?, self.alloc(&[n, top_k], size_of::<i32>())?);
        let wide = if logits.size == BF16 { Some(self.widened(logits)?) } else { None };
        let from = wide.as_ref().map_or(logits.ptr(), Memory::ptr);
        let (n, num_experts, top_k) = (int(n)?, int(num_experts)?, int(top_k)?);
        // SAFETY: n rows of each.
        launched("route", unsafe {
            ffi::q35_route(self.on(), n, num_experts, top_k, from, weights.ptr(), experts.ptr())
        })?;
        Ok((weights, experts))
    }

    /// `ops.causal_conv1d`: x bf16 `[n, channels]`, weight f32 or bf16 `[channels, kernel]`, state bf16
    /// `[kernel - 1, channels]`. The output and the new state, bf16.
    pub fn causal_conv1d(
        self: &Arc<Self>,
        x: View<'_>,
        weight: View<'_>,
        [n, channels, kernel]: [usize; 3],
        state: Option<View<'_>>,
    ) -> Result<(Memory, Memory)> {
        let _current = self.bind()?;
        let out = self.alloc(&[x.len], BF16)?;
        let tail = self.copy_or_zeros(state, &[kernel - 1, channels], BF16)?;
        if x.len == 0 {
            return Ok((out, tail));
        }
        let (_ints, batch) = self.sequence(n, 0, 0, None)?;
        let wide = self.widened(weight)?;
        let by_tap = |i: usize| i % channels * kernel + i / channels;
        let taps = self.gather(wide.view(), (wide.len, 1), by_tap)?;
        // Its channels are those of one value head and no keys.
        let (stride, conv_kernel) = (int(channels)?, int(kernel)?);
        let dims = ffi::DeltaDims {
            num_k_heads: 1,
            num_v_heads: 1,
            k_dim: 0,
            v_dim: stride,
            conv_kernel,
            half_states: 0,
        };
        self.fence(&out)?;
        // SAFETY: shapes are those of the launcher; one slot.
        launched("causal_conv1d", unsafe {
            let (taps, tails) = (taps.ptr(), tail.ptr());
            ffi::q35_causal_conv1d(self.on(), batch, dims, taps, x.ptr(), stride, tails, out.ptr())
        })?;
        Ok((out, tail))
    }

    /// `ops.gated_delta_rule`: q, k bf16 `[n, num_k_heads, k_dim]`, v bf16 `[n, num_v_heads, v_dim]`, g and beta f32 or
    /// bf16 `[n, num_v_heads]`, state f32 `[num_v_heads, k_dim, v_dim]`. The output in bf16, the new state in f32. The
    /// launcher takes b and a of the gates in bf16: the host finds them.
    pub fn gated_delta_rule(
        self: &Arc<Self>,
        [q, k, v, g, beta]: [View<'_>; 5],
        [n, num_k_heads, k_dim, num_v_heads, v_dim]: [usize; 5],
        state: Option<View<'_>>,
        chunked: bool,
    ) -> Result<(Memory, Memory)> {
        let _current = self.bind()?;
        let out = self.alloc(&[v.len], BF16)?;
        let states = self.copy_or_zeros(state, &[num_v_heads, k_dim, v_dim], F32)?;
        if v.len == 0 {
            return Ok((out, states));
        }
        let gates = gates(&self.read(g)?, &self.read(beta)?, num_v_heads)?;
        let (gates, zeros) = (self.upload(&gates)?, self.zeros(&[num_v_heads], F32)?);
        let (keys, values) = (num_k_heads * k_dim, num_v_heads * v_dim);
        let width = 2 * keys + values;
        // All of q, then k, then v; and from there a row of each token, in pieces that divide all three.
        let all = self.alloc(&[n, width], BF16)?;
        for (x, first) in [(q, 0), (k, n * keys), (v, 2 * n * keys)] {
            self.copy(all.at + (BF16 * first) as u64, x)?;
        }
        let piece = gcd(keys, values);
        let row = |i: usize| {
            let (token, column) = (i / (width / piece), i % (width / piece) * piece);
            let (first, columns, column) = match column / keys {
                0 => (0, keys, column),
                1 => (n * keys, keys, column - keys),
                _ => (2 * n * keys, values, column - 2 * keys),
            };
            (first + token * columns + column) / piece
        };
        let mixed = self.gather(all.view(), (n * width / piece, piece), row)?;
        let (_ints, batch) = self.sequence(n, 0, if chunked { n } else { 0 }, None)?;
        let dims = ffi::DeltaDims {
            num_k_heads: int(num_k_heads)?,
            num_v_heads: int(num_v_heads)?,
            k_dim: int(k_dim)?,
            v_dim: int(v_dim)?,
            conv_kernel: 1,
            half_states: 0,
        };
        int(width)?;
        // SAFETY: only computes.
        let elements = unsafe { ffi::q35_delta_workspace(int(n)?, 1, dims) };
        let (workspace, stride) = (self.workspace(elements, F32)?, int(2 * num_v_heads)?);
        self.fence(&out)?;
        // SAFETY: shapes are those of the launcher; one slot; a decay of 1 and no bias, so that a alone makes g.
        launched("gated_delta_rule", unsafe {
            ffi::q35_gated_delta_rule(
                self.on(),
                batch,
                dims,
                zeros.ptr(),
                zeros.ptr(),
                mixed.ptr(),
                gates.ptr(),
                stride,
                0,
                states.ptr(),
                workspace.ptr(),
                out.ptr(),
            )
        })?;
        Ok((out, states))
    }

    /// `ops.attention`: q bf16 `[n, num_q_heads, head_dim]`, k and v bf16 `[num_keys, num_kv_heads, head_dim]`. Keys
    /// and values are put in pages, and the gates are open.
    pub fn attention(
        self: &Arc<Self>,
        [q, k, v]: [View<'_>; 3],
        [n, num_keys, num_q_heads, num_kv_heads, head_dim]: [usize; 5],
    ) -> Result<Memory> {
        let _current = self.bind()?;
        let out = self.alloc(&[q.len], BF16)?;
        if q.len == 0 {
            return Ok(out);
        }
        let num_rows = num_keys.next_multiple_of(PAGE_LEN).saturating_mul(num_kv_heads);
        // Pages are [num_kv_heads, PAGE_LEN, head_dim]. Places past the end hold the first row, which nobody looks at.
        let row = |i: usize| {
            let (page, head) = (i / PAGE_LEN / num_kv_heads, i / PAGE_LEN % num_kv_heads);
            let key = page * PAGE_LEN + i % PAGE_LEN;
            if key < num_keys { key * num_kv_heads + head } else { 0 }
        };
        let pages = (num_rows, head_dim);
        let (k_pages, v_pages) = (self.gather(k, pages, row)?, self.gather(v, pages, row)?);
        let stride = 2 * num_q_heads * head_dim;
        let gates = self.alloc(&[n, stride], BF16)?;
        self.fill16(gates.at, OPEN, gates.len)?;
        let (_ints, batch) = self.sequence(n, num_keys - n, 0, None)?;
        let dims = ffi::AttentionDims {
            num_q_heads: int(num_q_heads)?,
            num_kv_heads: int(num_kv_heads)?,
            head_dim: int(head_dim)?,
        };
        // SAFETY: only computes.
        let elements = unsafe { ffi::q35_attention_workspace(int(n)?, 1, int(num_keys)?, dims) };
        let (workspace, stride) = (self.workspace(elements, F32)?, int(stride)?);
        self.fence(&out)?;
        // SAFETY: shapes are those of the launcher; the pages are those of the batch.
        launched("attention", unsafe {
            ffi::q35_gated_attention(
                self.on(),
                batch,
                dims,
                q.ptr(),
                gates.ptr(),
                stride,
                k_pages.ptr(),
                v_pages.ptr(),
                workspace.ptr(),
                out.ptr(),
            )
        })?;
        Ok(out)
    }

    /// `ops.moe`: all bf16, x `[n, hidden]`; sizes are hidden, num_experts, top_k, width and shared_width.
    pub fn moe(
        self: &Arc<Self>,
        x: View<'_>,
        weights: MoeViews<'_>,
        [hidden, num_experts, top_k, width, shared_width]: [usize; 5],
    ) -> Result<Memory> {
        let _current = self.bind()?;
        let out = self.alloc(&[x.len], BF16)?;
        if x.len == 0 {
            return Ok(out);
        }
        let shared_gate_up = self.alloc(&[2, shared_width, hidden], BF16)?;
        let mut all = ffi::MoeWeights {
            router: weights.router.ptr(),
            gate_up: weights.gate_up.ptr(),
            down: weights.down.ptr(),
            shared_gate_up: shared_gate_up.ptr(),
            shared_down: std::ptr::null(),
            shared_gate: std::ptr::null(),
        };
        if let Some([gate_proj, up_proj, down_proj, gate]) = weights.shared {
            self.copy(shared_gate_up.at, gate_proj)?;
            self.copy(shared_gate_up.at + (BF16 * shared_width * hidden) as u64, up_proj)?;
            (all.shared_down, all.shared_gate) = (down_proj.ptr(), gate.ptr());
        }
        let dims = ffi::MoeDims {
            hidden: int(hidden)?,
            num_experts: int(num_experts)?,
            top_k: int(top_k)?,
            width: int(width)?,
            shared_width: int(shared_width)?,
            first_expert: 0,
            num_here: int(num_experts)?,
        };
        let n = int(x.len / hidden)?;
        // SAFETY: only computes.
        let workspace = self.workspace(unsafe { ffi::q35_moe_workspace(n, dims) }, 1)?;
        self.fence(&out)?;
        // SAFETY: shapes are those of the launcher.
        launched("moe", unsafe {
            ffi::q35_moe(self.on(), n, dims, all, x.ptr(), workspace.ptr(), out.ptr())
        })?;
        Ok(out)
    }

    /// A copy of a state, which the launcher replaces.
    fn copy_or_zeros(
        self: &Arc<Self>,
        from: Option<View<'_>>,
        dims: &[usize],
        size: usize,
    ) -> Result<Memory> {
        let Some(from) = from else { return self.zeros(dims, size) };
        let memory = self.alloc(dims, size)?;
        self.copy(memory.at, from)?;
        Ok(memory)
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
