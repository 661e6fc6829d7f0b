//! The gated delta rule, one value head of one sequence at a time: chunked for the tokens of a prompt,
//! recurrent for the others. f32 throughout.
//!
//! State `S` `[k_dim, v_dim]`; per token `S = exp(g) S;  d = beta (v - kᵀ S);  S = S + k dᵀ;  o = qᵀ S`.
//!
//! The chunked form over tokens `[0, C)`, with `G` the running sum of `g` and `D_ij = exp(G_i - G_j)`:
//!
//! ```text
//! rhs_i = beta_i (v_i - exp(G_i) k_iᵀ S)
//! x_i   = rhs_i - sum_{j < i} beta_i D_ij (k_i · k_j) x_j          forward substitution
//! o_i   = exp(G_i) q_iᵀ S + sum_{j <= i} D_ij (q_i · k_j) x_j
//! S     = exp(G_C) S + sum_j exp(G_C - G_j) k_j x_jᵀ
//! ```
//!
//! Source: the gated delta rule of Yang et al. (2024, arXiv:2412.06464) in the form of Transformers'
//! `torch_chunk_gated_delta_rule`; own code. Every exponent is a difference of sums with the later index
//! first, so none is positive.

use std::cell::RefCell;

use super::kernel::kernel;
use super::norm::l2_norm;
use super::simd::{F32x16, LANES};
use super::small::{matmul_nn, matmul_nt};
use crate::backend::caches::to_f16;
use crate::batch::CHUNK_LEN;

/// One value head of one sequence: where its rows are. Row `t` of each is `stride` elements after row `t - 1`.
#[derive(Clone, Copy)]
pub struct Head<'a> {
    /// `[num_tokens, stride]`, `k_dim` used.
    pub q: &'a [f32],
    /// `[num_tokens, stride]`, `k_dim` used.
    pub k: &'a [f32],
    /// `[num_tokens, stride]`, `v_dim` used.
    pub v: &'a [f32],
    /// Elements from a token's row to the next, in q, k and v.
    pub strides: [usize; 3],
    /// Log decay of each token, `<= 0`.
    pub g: &'a [f32],
    /// Write strength of each token.
    pub beta: &'a [f32],
    /// Width of a key.
    pub k_dim: usize,
    /// Width of a value.
    pub v_dim: usize,
    /// Multiplied into q.
    pub scale: f32,
    /// Whether q and k are l2-normalised first.
    pub qk_l2norm: bool,
}

/// Where output rows go: token `t` at `out + t * stride`, `v_dim` elements.
#[derive(Clone, Copy)]
pub struct OutRows {
    /// Row of the first token.
    pub out: *mut f32,
    /// Elements from a row to the next.
    pub stride: usize,
}

/// Runs `g.len()` tokens, the first `chunked_len` by the chunked form (in chunks of [`CHUNK_LEN`]).
///
/// `state` `[k_dim, v_dim]` is read and replaced.
///
/// # Safety
/// `out` is valid for every token's row and is written by this call alone.
pub unsafe fn gated_delta_rule(head: Head<'_>, chunked_len: usize, state: &mut [f32], out: OutRows) {
    let num_tokens = head.g.len();
    let Head { k_dim, v_dim, strides, .. } = head;
    assert!(head.beta.len() == num_tokens && state.len() == k_dim * v_dim && chunked_len <= num_tokens);
    let reach =
        |stride: usize, width: usize| num_tokens.saturating_sub(1) * stride + width.min(num_tokens * width);
    assert!(head.q.len() >= reach(strides[0], k_dim) && head.k.len() >= reach(strides[1], k_dim));
    assert!(head.v.len() >= reach(strides[2], v_dim));
    let mut t = 0;
    while t < num_tokens {
        let len = if t < chunked_len { CHUNK_LEN.min(chunked_len - t) } else { 1 };
        let rows = |x: &'_ [f32], stride: usize| -> *const f32 { x[t * stride..].as_ptr() };
        let (q, k, v) = (rows(head.q, strides[0]), rows(head.k, strides[1]), rows(head.v, strides[2]));
        // SAFETY: t < num_tokens, and `out` is the caller's.
        let out = OutRows { out: unsafe { out.out.add(t * out.stride) }, ..out };
        SCRATCH.with_borrow_mut(|scratch| {
            let rows = Rows { q, k, v, len };
            normalise(&head, rows, scratch);
            let (g, beta) = (&head.g[t..t + len], &head.beta[t..t + len]);
            if t < chunked_len {
                chunk(head, rows, g, beta, scratch, state, out);
            } else {
                recurrent(head, rows, g[0].exp(), beta[0], scratch, state, out);
            }
        });
        t += len;
    }
}

/// The same, with the state rounded to f16 after each chunk and after each token of the recurrence: where its bits are
/// lost does not depend on how a sequence is cut into calls.
///
/// # Safety
/// As [`gated_delta_rule`].
pub unsafe fn gated_delta_rule_f16(head: Head<'_>, chunked_len: usize, state: &mut [f32], out: OutRows) {
    let (num_tokens, mut t) = (head.g.len(), 0);
    while t < num_tokens {
        let chunked = if t < chunked_len { CHUNK_LEN.min(chunked_len - t) } else { 0 };
        let end = t + chunked.max(1);
        let part = Head {
            q: &head.q[t * head.strides[0]..],
            k: &head.k[t * head.strides[1]..],
            v: &head.v[t * head.strides[2]..],
            g: &head.g[t..end],
            beta: &head.beta[t..end],
            ..head
        };
        // SAFETY: the caller's rows, from token t on.
        unsafe {
            gated_delta_rule(part, chunked, state, OutRows { out: out.out.add(t * out.stride), ..out })
        };
        state.iter_mut().for_each(|s| *s = to_f16(*s).to_f32());
        t = end;
    }
}

#[derive(Clone, Copy)]
struct Rows {
    q: *const f32,
    k: *const f32,
    v: *const f32,
    len: usize,
}

/// Per-thread scratch of one chunk. `C` is [`CHUNK_LEN`].
#[derive(Default)]
struct Scratch {
    /// q, normalised and scaled, `[C, k_dim]`.
    q: Vec<f32>,
    /// k, normalised, `[C, k_dim]`.
    k: Vec<f32>,
    /// k decayed to the end of the chunk, transposed: `[k_dim, C]`.
    k_last: Vec<f32>,
    /// `k_i · k_j`, then minus the system's coefficients, `[C, C]`.
    kk: Vec<f32>,
    /// `q_i · k_j`, decayed, `[C, C]`.
    qk: Vec<f32>,
    /// Right-hand sides, then the solution, `[C, v_dim]`.
    x: Vec<f32>,
    /// Running sum of g.
    g: Vec<f32>,
    /// What of the running sum f32 cannot hold.
    g_low: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

fn normalise(head: &Head<'_>, rows: Rows, scratch: &mut Scratch) {
    let d = head.k_dim;
    scratch.q.resize(CHUNK_LEN * d, 0.0);
    scratch.k.resize(CHUNK_LEN * d, 0.0);
    for i in 0..rows.len {
        // SAFETY: `gated_delta_rule` checked that each of `len` rows has k_dim elements.
        let (q, k) = unsafe {
            let row = |p: *const f32, stride: usize| std::slice::from_raw_parts(p.add(i * stride), d);
            (row(rows.q, head.strides[0]), row(rows.k, head.strides[1]))
        };
        let (q_out, k_out) = (&mut scratch.q[i * d..(i + 1) * d], &mut scratch.k[i * d..(i + 1) * d]);
        if head.qk_l2norm {
            l2_norm(q, head.scale, q_out);
            l2_norm(k, 1.0, k_out);
        } else {
            q_out.iter_mut().zip(q).for_each(|(o, q)| *o = q * head.scale);
            k_out.copy_from_slice(k);
        }
    }
}

kernel! {
    fn chunk<V>(
        head: Head<'a>,
        rows: Rows,
        g: &'a [f32],
        beta: &'a [f32],
        scratch: &'a mut Scratch,
        state: &'a mut [f32],
        out: OutRows,
    ) {
        const C: usize = CHUNK_LEN;
        let (len, dk, dv) = (rows.len, head.k_dim, head.v_dim);
        let Scratch { q, k, k_last, kk, qk, x, g: sums, g_low: lows } = scratch;
        for buffer in [&mut *kk, &mut *qk] {
            buffer.resize(C * C, 0.0);
        }
        k_last.resize(dk * C, 0.0);
        x.resize(C * dv, 0.0);
        // In two f32 parts: behind a token of total decay (g = -1e4) the differences of later sums are still
        // exact, where one f32 would leave them 1e-3 apart.
        sums.clear();
        lows.clear();
        let mut sum = 0.0_f64;
        for &g in g {
            sum += f64::from(g);
            sums.push(sum as f32);
            lows.push((sum - f64::from(sum as f32)) as f32);
        }
        let (last, last_low) = (sums[len - 1], lows[len - 1]);
        sums.resize(C, 0.0);
        lows.resize(C, 0.0);

        matmul_nt::<V>(len, len, dk, |j| j, k.as_ptr(), dk, k.as_ptr(), dk, kk.as_mut_ptr(), C);
        matmul_nt::<V>(len, len, dk, |j| j, q.as_ptr(), dk, k.as_ptr(), dk, qk.as_mut_ptr(), C);
        for i in 0..len {
            decay_row::<V>((sums[i], lows[i]), (sums, lows), -beta[i], &mut kk[i * C..], i);
            decay_row::<V>((sums[i], lows[i]), (sums, lows), 1.0, &mut qk[i * C..], i + 1);
            let to_end = ((last - sums[i]) + (last_low - lows[i])).exp();
            for c in 0..dk {
                k_last[c * C + i] = k[i * dk + c] * to_end;
            }
        }

        // x_i = beta_i (v_i - exp(G_i) k_iᵀ S), then the forward substitution, row by row.
        x[..len * dv].fill(0.0);
        matmul_nn::<V>(len, dv, |_| dk, |_| 0.0, k.as_ptr(), dk, state.as_ptr(), dv, x.as_mut_ptr(), dv);
        for i in 0..len {
            let decay = sums[i].exp();
            let v = std::slice::from_raw_parts(rows.v.add(i * head.strides[2]), dv);
            for (x, v) in x[i * dv..(i + 1) * dv].iter_mut().zip(v) {
                *x = beta[i] * decay.mul_add(-*x, *v);
            }
        }
        for i in 1..len {
            let (solved, rest) = x.split_at_mut(i * dv);
            matmul_nn::<V>(1, dv, |_| i, |_| 1.0, kk[i * C..].as_ptr(), C, solved.as_ptr(), dv, rest.as_mut_ptr(), dv);
        }

        // o_i = exp(G_i) q_iᵀ S + sum_{j <= i} qk_ij x_j
        zero_rows(len, dv, out);
        matmul_nn::<V>(len, dv, |_| dk, |_| 0.0, q.as_ptr(), dk, state.as_ptr(), dv, out.out, out.stride);
        matmul_nn::<V>(len, dv, |i| i + 1, |i| sums[i].exp(), qk.as_ptr(), C, x.as_ptr(), dv, out.out, out.stride);

        matmul_nn::<V>(dk, dv, |_| len, |_| last.exp(), k_last.as_ptr(), C, x.as_ptr(), dv, state.as_mut_ptr(), dv);
    }
}

/// `row[j] *= factor * exp(from - sums[j] - lows[j])` for the first `n` j (and more, up to a whole vector, that nobody
/// reads).
#[inline(always)]
unsafe fn decay_row<V: F32x16>(
    from: (f32, f32),
    (sums, lows): (&[f32], &[f32]),
    factor: f32,
    row: &mut [f32],
    n: usize,
) {
    for j in (0..n).step_by(LANES) {
        // SAFETY: `sums`, `lows` and `row` have CHUNK_LEN elements, a multiple of LANES.
        unsafe {
            let high = V::splat(from.0).sub(V::load(sums.as_ptr().add(j)));
            let low = V::splat(from.1).sub(V::load(lows.as_ptr().add(j)));
            let decay = high.add(low).exp().mul(V::splat(factor));
            let p = row.as_mut_ptr().add(j);
            V::load(p).mul(decay).store(p);
        }
    }
}

unsafe fn zero_rows(len: usize, width: usize, rows: OutRows) {
    for i in 0..len {
        // SAFETY: the caller's rows.
        unsafe { std::slice::from_raw_parts_mut(rows.out.add(i * rows.stride), width).fill(0.0) };
    }
}

kernel! {
    /// One token: two passes over the state.
    fn recurrent<V>(
        head: Head<'a>,
        rows: Rows,
        decay: f32,
        beta: f32,
        scratch: &'a mut Scratch,
        state: &'a mut [f32],
        out: OutRows,
    ) {
        let mut j = 0;
        while j + 8 * LANES <= head.v_dim {
            columns::<V, 8>(head, rows, decay, beta, scratch, state, out, j);
            j += 8 * LANES;
        }
        while j + LANES <= head.v_dim {
            columns::<V, 1>(head, rows, decay, beta, scratch, state, out, j);
            j += LANES;
        }
        for j in j..head.v_dim {
            let (k, q) = (&scratch.k[..head.k_dim], &scratch.q[..head.k_dim]);
            let (mut memory, mut o) = (0f32, 0f32);
            for (i, k) in k.iter().enumerate() {
                memory = k.mul_add(state[i * head.v_dim + j] * decay, memory);
            }
            let d = beta * (*rows.v.add(j) - memory);
            for (i, (k, q)) in k.iter().zip(q).enumerate() {
                let s = &mut state[i * head.v_dim + j];
                *s = k.mul_add(d, *s * decay);
                o = q.mul_add(*s, o);
            }
            *out.out.add(j) = o;
        }
    }
}

/// Columns `[j, j + 16 N)` of the state.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn columns<V: F32x16, const N: usize>(
    head: Head<'_>,
    rows: Rows,
    decay: f32,
    beta: f32,
    scratch: &Scratch,
    state: &mut [f32],
    out: OutRows,
    j: usize,
) {
    // SAFETY: the state has k_dim rows of v_dim >= j + 16 N columns; v and out have v_dim elements.
    unsafe {
        let (k, q) = (&scratch.k[..head.k_dim], &scratch.q[..head.k_dim]);
        let s = state.as_mut_ptr().add(j);
        let decay = V::splat(decay);
        let mut acc = [V::splat(0.0); N];
        for (i, &k) in k.iter().enumerate() {
            let k = V::splat(k);
            for n in 0..N {
                acc[n] = k.fma(V::load(s.add(i * head.v_dim + n * LANES)).mul(decay), acc[n]);
            }
        }
        let mut d = [V::splat(0.0); N];
        for n in 0..N {
            d[n] = V::splat(beta).mul(V::load(rows.v.add(j + n * LANES)).sub(acc[n]));
            acc[n] = V::splat(0.0);
        }
        for (i, (&k, &q)) in k.iter().zip(q).enumerate() {
            let (k, q) = (V::splat(k), V::splat(q));
            for n in 0..N {
                let p = s.add(i * head.v_dim + n * LANES);
                let next = k.fma(d[n], V::load(p).mul(decay));
                next.store(p);
                acc[n] = q.fma(next, acc[n]);
            }
        }
        for n in 0..N {
            acc[n].store(out.out.add(j + n * LANES));
        }
    }
}
