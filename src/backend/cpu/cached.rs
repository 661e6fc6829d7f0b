//! Pages and slots on the CPU: as f32, or quantised where they are written and decoded where they are read.

use std::cell::RefCell;

use half::f16;

use super::delta_rule::{self, Head, OutRows};
use super::parallel::Shared;
use super::zeros;
use crate::Result;
use crate::backend::caches::{self, KvCache, StateType};
use crate::batch::PAGE_LEN;
use crate::weights::quant::decode_e4m3;

/// Keys or values of one layer: rows of `head_dim` elements, `[num_pages, num_kv_heads, PAGE_LEN]`.
pub enum Rows {
    Full(Vec<f32>),
    Fp8 { codes: Vec<u8>, scales: Vec<f32> },
}

/// Bytes of a row of `head_dim` elements.
pub fn row_bytes(head_dim: usize, kv: KvCache) -> usize {
    match kv {
        KvCache::Auto => 4 * head_dim,
        KvCache::Fp8 => head_dim + 4,
    }
}

impl Rows {
    pub fn new(num_rows: Option<usize>, head_dim: usize, kv: KvCache, what: &str) -> Result<Self> {
        let len = num_rows.and_then(|n| n.checked_mul(head_dim));
        Ok(match kv {
            KvCache::Auto => Rows::Full(zeros(len, what)?),
            KvCache::Fp8 => Rows::Fp8 { codes: zeros(len, what)?, scales: zeros(num_rows, what)? },
        })
    }

    pub fn share(&mut self) -> SharedRows {
        match self {
            Rows::Full(x) => SharedRows::Full(Shared::new(x)),
            Rows::Fp8 { codes, scales } => SharedRows::Fp8(Shared::new(codes), Shared::new(scales)),
        }
    }

    /// The rows of a page and head, the first of which is `row`; `buffer` holds what had to be decoded.
    pub fn page(&self, row: usize, head_dim: usize, buffer: &RefCell<Vec<f32>>) -> *const f32 {
        let at = row * head_dim..(row + PAGE_LEN) * head_dim;
        match self {
            Rows::Full(x) => x[at].as_ptr(),
            Rows::Fp8 { codes, scales } => {
                let mut buffer = buffer.borrow_mut();
                buffer.clear();
                for (codes, scale) in codes[at].chunks_exact(head_dim).zip(&scales[row..]) {
                    buffer.extend(codes.iter().map(|&code| decode_e4m3(code) * scale));
                }
                buffer.as_ptr()
            }
        }
    }
}

/// [`Rows`] that tasks write to.
#[derive(Clone, Copy)]
pub enum SharedRows {
    Full(Shared<f32>),
    Fp8(Shared<u8>, Shared<f32>),
}

impl SharedRows {
    /// # Safety
    /// The row is there, and no other task touches it meanwhile.
    pub unsafe fn write(self, row: usize, x: &[f32]) {
        let at = row * x.len();
        // SAFETY: the caller's.
        unsafe {
            match self {
                SharedRows::Full(to) => to.slice(at, x.len()).copy_from_slice(x),
                SharedRows::Fp8(codes, scales) => {
                    scales.slice(row, 1)[0] = caches::quantise_row(x, codes.slice(at, x.len()));
                }
            }
        }
    }
}

/// Recurrent states of one layer.
pub enum States {
    Full(Vec<f32>),
    /// Bits of f16.
    Half(Vec<u16>),
}

/// Bytes of an element of a state.
pub fn element_bytes(state: StateType) -> usize {
    match state {
        StateType::F32 => 4,
        StateType::F16 => 2,
    }
}

impl States {
    pub fn new(len: Option<usize>, state: StateType) -> Result<Self> {
        let what = "recurrent states";
        Ok(match state {
            StateType::F32 => States::Full(zeros(len, what)?),
            StateType::F16 => States::Half(zeros(len, what)?),
        })
    }

    pub fn share(&mut self) -> SharedStates {
        match self {
            States::Full(x) => SharedStates::Full(Shared::new(x)),
            States::Half(x) => SharedStates::Half(Shared::new(x)),
        }
    }

    pub fn clear(&mut self, at: usize, len: usize) {
        match self {
            States::Full(x) => x[at..at + len].fill(0.0),
            States::Half(x) => x[at..at + len].fill(0),
        }
    }
}

/// [`States`] that tasks write to.
#[derive(Clone, Copy)]
pub enum SharedStates {
    Full(Shared<f32>),
    Half(Shared<u16>),
}

impl SharedStates {
    /// [`delta_rule::gated_delta_rule`] over the state that starts at element `at`.
    ///
    /// # Safety
    /// The state is there, `out` is valid for every token's row, and no other task touches either meanwhile.
    pub unsafe fn run(self, at: usize, head: Head<'_>, chunked_len: usize, out: OutRows) {
        let len = head.k_dim * head.v_dim;
        // SAFETY: the caller's.
        unsafe {
            match self {
                SharedStates::Full(x) => {
                    delta_rule::gated_delta_rule(head, chunked_len, x.slice(at, len), out);
                }
                SharedStates::Half(x) => {
                    let stored = x.slice(at, len);
                    let mut state: Vec<f32> = stored.iter().map(|&s| f16::from_bits(s).to_f32()).collect();
                    delta_rule::gated_delta_rule_f16(head, chunked_len, &mut state, out);
                    stored.iter_mut().zip(state).for_each(|(to, s)| *to = caches::to_f16(s).to_bits());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::caches::to_f16;

    fn numbers(len: usize, seed: u64) -> Vec<f32> {
        let bits = |i| crate::random::mix(crate::random::mix(seed) ^ i as u64) >> 40;
        (0..len).map(|i| bits(i) as f32 / (1u64 << 23) as f32 - 1.0).collect()
    }

    #[test]
    fn rows_are_read_as_they_were_quantised() {
        for d in [1, 7, 64, 256] {
            let mut rows = Rows::new(Some(3 * PAGE_LEN), d, KvCache::Fp8, "keys").unwrap();
            let (shared, x) = (rows.share(), numbers(PAGE_LEN * d, d as u64));
            for (i, x) in x.chunks_exact(d).enumerate() {
                // SAFETY: rows of the second page, one after the other.
                unsafe { shared.write(PAGE_LEN + i, x) };
            }
            let buffer = RefCell::default();
            rows.page(PAGE_LEN, d, &buffer);
            for (x, y) in x.chunks_exact(d).zip(buffer.borrow().chunks_exact(d)) {
                let largest = x.iter().fold(0f32, |m, x| m.max(x.abs()));
                for (x, y) in x.iter().zip(y) {
                    // Half a step of three bits, or of the smallest exponent.
                    assert!(
                        (x - y).abs() <= (x.abs() / 16.0).max(largest / 448.0 / 1024.0) * 1.00001,
                        "{x} {y}"
                    );
                }
            }
            rows.page(0, d, &buffer);
            assert!(buffer.borrow().iter().all(|&x| x == 0.0));
        }
    }

    /// The recurrence in f64, with the state rounded to f16 after each token, or after the tokens of a chunk.
    fn recurrence(head: &Head<'_>, chunked_len: usize, state: &mut [f64]) -> Vec<f64> {
        let (dk, dv, mut out) = (head.k_dim, head.v_dim, Vec::new());
        for t in 0..head.g.len() {
            let row = |x: &[f32], stride: usize, width: usize| -> Vec<f64> {
                x[t * stride..][..width].iter().map(|&x| f64::from(x)).collect()
            };
            let (q, k, v) = (
                row(head.q, head.strides[0], dk),
                row(head.k, head.strides[1], dk),
                row(head.v, head.strides[2], dv),
            );
            state.iter_mut().for_each(|s| *s *= f64::from(head.g[t]).exp());
            for j in 0..dv {
                let memory: f64 = (0..dk).map(|i| k[i] * state[i * dv + j]).sum();
                let d = f64::from(head.beta[t]) * (v[j] - memory);
                (0..dk).for_each(|i| state[i * dv + j] += k[i] * d);
                out.push((0..dk).map(|i| q[i] * state[i * dv + j]).sum::<f64>() * f64::from(head.scale));
            }
            if t >= chunked_len || (t + 1) % 64 == 0 || t + 1 == chunked_len {
                state.iter_mut().for_each(|s| *s = f64::from(to_f16(*s as f32).to_f32()));
            }
        }
        out
    }

    #[test]
    fn half_states_are_rounded_where_the_contract_says_and_cuts_do_not_matter() {
        let (dk, dv, n) = (16, 24, 200);
        let (mut q, mut k, v) = (numbers(n * dk, 1), numbers(n * dk, 2), numbers(n * dv, 3));
        for row in q.chunks_exact_mut(dk).chain(k.chunks_exact_mut(dk)) {
            let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
            row.iter_mut().for_each(|x| *x /= norm);
        }
        let g: Vec<f32> = numbers(n, 4).iter().map(|x| -0.1 - 0.1 * x).collect();
        let beta: Vec<f32> = numbers(n, 5).iter().map(|x| 0.5 + 0.4 * x).collect();
        let run = |from: usize, to: usize, chunked: usize, states: &mut States, out: &mut [f32]| {
            let head = Head {
                q: &q[from * dk..],
                k: &k[from * dk..],
                v: &v[from * dv..],
                strides: [dk, dk, dv],
                g: &g[from..to],
                beta: &beta[from..to],
                k_dim: dk,
                v_dim: dv,
                scale: 0.25,
                qk_l2norm: false,
            };
            let rows = OutRows { out: out[from * dv..].as_mut_ptr(), stride: dv };
            // SAFETY: `out` has a row for every token, and there is one state.
            unsafe { states.share().run(0, head, chunked, rows) };
        };
        for chunked in [0, 64, 130, 200] {
            let mut whole = States::new(Some(dk * dv), StateType::F16).unwrap();
            let mut found = vec![0f32; n * dv];
            run(0, n, chunked, &mut whole, &mut found);
            // In steps that end at 64 and at 128, and every ten tokens of the recurrence.
            let mut cut = States::new(Some(dk * dv), StateType::F16).unwrap();
            let (mut again, mut t) = (vec![0f32; n * dv], 0);
            while t < n {
                let end = if t < chunked { (t + 64).min(chunked) } else { (t + 10).min(n) };
                run(t, end, if t < chunked { end - t } else { 0 }, &mut cut, &mut again);
                t = end;
            }
            assert_eq!(found, again);
            let (States::Half(whole), States::Half(cut)) = (whole, cut) else { panic!("f32") };
            assert_eq!(whole, cut);

            let head = Head {
                q: &q,
                k: &k,
                v: &v,
                strides: [dk, dk, dv],
                g: &g,
                beta: &beta,
                k_dim: dk,
                v_dim: dv,
                scale: 0.25,
                qk_l2norm: false,
            };
            let want = recurrence(&head, chunked, &mut vec![0f64; dk * dv]);
            let far: f64 = found.iter().zip(&want).map(|(x, y)| (f64::from(*x) - y).powi(2)).sum();
            let size: f64 = want.iter().map(|y| y * y).sum();
            // An f32 just beside the middle of two f16 may be rounded the other way.
            assert!((far / size).sqrt() < 2e-4, "{}", (far / size).sqrt());
        }
    }
}
