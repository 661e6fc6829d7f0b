//! GPTQ (Frantar et al., arXiv 2210.17323): codes of a row are chosen one after the other, and what each is off is made
//! up for by the inputs that are still to come, as the Hessian of the row's squared output error says. That Hessian is
//! the sum of x xᵀ over the inputs x of a calibration text.
//!
//! A group's scale is chosen when its first input is reached, from the weights as they then are. Rows know nothing of
//! each other: threads share them, and every sum has one order.

use rayon::prelude::*;

use crate::backend::cpu::cholesky::inverse_factor;
use crate::backend::cpu::linear::Linear;
use crate::weights::quant::{int4_scales, to_int4};

/// Columns within which errors are fed back one by one; what lies beyond gets those of all at once. A multiple of every
/// group.
const BLOCK: usize = 128;
/// Rows that a thread takes.
const ROWS: usize = 32;
/// Rows of a Hessian that are summed at once.
const SUMMED: usize = 256;
/// What is added to the diagonal, in terms of its mean: the first that makes the matrix positive definite.
const DAMPING: [f64; 4] = [0.01, 0.1, 1.0, 10.0];

/// `sum x xᵀ` over tokens, and how many there were.
pub(super) struct Hessian {
    sum: Vec<f32>,
    k: usize,
    num_tokens: usize,
}

impl Hessian {
    pub fn new(k: usize) -> Self {
        Self { sum: vec![0.0; k * k], k, num_tokens: 0 }
    }

    /// Inputs, of which the first `k` elements count.
    pub fn add(&mut self, inputs: &[&[f32]]) {
        let (n, k) = (inputs.len(), self.k);
        if n == 0 {
            return;
        }
        self.num_tokens += n;
        let mut columns = vec![0.0; k * n];
        columns.par_chunks_mut(n).enumerate().for_each(|(i, column)| {
            column.iter_mut().zip(inputs).for_each(|(to, x)| *to = x[i]);
        });
        let product = Linear::from_f32(&columns, n);
        let mut some = vec![0.0; SUMMED.min(k) * k];
        for (sum, columns) in self.sum.chunks_mut(SUMMED * k).zip(columns.chunks(SUMMED * n)) {
            product.forward(columns, &mut some, columns.len() / n);
            sum.iter_mut().zip(&some).for_each(|(sum, x)| *sum += x);
        }
    }

    pub fn num_inputs(&self) -> usize {
        self.k
    }

    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }
}

/// A Hessian as the feedback needs it: the upper triangular U with `UᵀU = (H + damping)⁻¹`.
pub(super) struct Curvature {
    k: usize,
    blocks: Vec<Block>,
    /// What a squared error of each input counts, in the choice of a scale.
    weights: Vec<f32>,
    /// What was added to the diagonal.
    added: f64,
    /// The same in terms of the mean of the diagonal.
    pub damping: f64,
    /// Tokens that the Hessian is of.
    pub num_tokens: usize,
}

/// Rows of U.
struct Block {
    /// Where they and their columns begin.
    start: usize,
    /// Their triangle.
    square: Vec<f32>,
    /// The columns after it, `[k - end, rows]`.
    rest: Option<Linear>,
}

impl Curvature {
    /// `None` where the Hessian is not positive definite with any damping: it is zero, or not finite.
    pub fn new(hessian: Hessian) -> Option<Self> {
        let Hessian { sum, k, num_tokens } = hessian;
        let mean = (0..k).map(|i| f64::from(sum[i * k + i])).sum::<f64>() / k.max(1) as f64;
        if !(mean > 0.0 && mean.is_finite()) {
            return None;
        }
        let (damping, ut) = DAMPING.into_iter().find_map(|damping| {
            let added = damping * mean;
            let element = |i: usize, j: usize| f64::from(sum[i * k + j]) + if i == j { added } else { 0.0 };
            Some((damping, inverse_factor(k, element)?))
        })?;
        drop(sum);
        // What an error costs after the inputs that follow have made up for it as well as they can.
        let weights = (0..k).map(|i| ut[i * k + i].powi(-2)).collect();
        let blocks = (0..k).step_by(BLOCK).map(|start| Block::new(&ut, k, start)).collect();
        Some(Self { k, blocks, weights, added: damping * mean, damping, num_tokens })
    }

    /// 4-bit codes around 8 and bf16 scales (widened) of rows of bf16 numbers, as
    /// [`quantise_int4`](crate::weights::quant::quantise_int4) gives them; `group` divides rows and [`BLOCK`].
    pub fn quantise_int4(&self, w: &[f32], group: usize, codes: &mut [u8], scales: &mut [f32]) {
        let (k, groups) = (self.k, self.k / group);
        let codes = codes.par_chunks_mut(ROWS * k).zip(scales.par_chunks_mut(ROWS * groups));
        w.par_chunks(ROWS * k).zip(codes).for_each(|(w, (codes, scales))| {
            self.feed_back(&mut w.to_vec(), |row, column, rest| {
                let scale = &mut scales[row * groups + column / group];
                if column.is_multiple_of(group) {
                    *scale = int4_scale(&rest[..group], &self.weights[column..column + group]);
                }
                let code = to_int4(rest[0], *scale);
                codes[row * k + column] = (code + 8.0) as u8;
                code * *scale
            });
        });
    }

    /// `sum e H eᵀ` over rows e: without the damping, up to rounding.
    pub fn norm(&self, e: &[f32]) -> f64 {
        let squares: Vec<(f64, f64)> = e
            .par_chunks(ROWS * self.k.max(1))
            .map(|rows| {
                let plain = rows.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
                // Where nothing is kept of a row, what is fed back is the row times U⁻¹.
                (self.feed_back(&mut rows.to_vec(), |_, _, _| 0.0), plain)
            })
            .collect();
        squares.iter().map(|(damped, plain)| damped - self.added * plain).sum::<f64>().max(0.0)
    }

    /// Goes over rows of k numbers column by column. `choose(row, column, rest)` gives the number that stays in
    /// a column, of which `rest` is the row from there on, as far as the block goes, after what was fed back. Returns the
    /// sum of the squares of what was fed back.
    fn feed_back(&self, w: &mut [f32], mut choose: impl FnMut(usize, usize, &[f32]) -> f32) -> f64 {
        let (k, rows) = (self.k, w.len() / self.k.max(1));
        let mut sum = 0.0;
        for Block { start, square, rest } in &self.blocks {
            let width = BLOCK.min(k - start);
            let mut errors = vec![0.0; rows * width];
            for (r, (w, errors)) in w.chunks_mut(k).zip(errors.chunks_mut(width)).enumerate() {
                let w = &mut w[*start..start + width];
                for j in 0..width {
                    let u = &square[j * width + j..(j + 1) * width];
                    let chosen = choose(r, start + j, &w[j..]);
                    let error = (w[j] - chosen) / u[0];
                    w[j..].iter_mut().zip(u).for_each(|(x, u)| *x -= error * u);
                    errors[j] = error;
                    sum += f64::from(error) * f64::from(error);
                }
            }
            if let Some(rest) = rest {
                let mut change = vec![0.0; rows * rest.num_out];
                rest.forward(&errors, &mut change, rows);
                for (w, change) in w.chunks_mut(k).zip(change.chunks(rest.num_out)) {
                    w[start + width..].iter_mut().zip(change).for_each(|(x, change)| *x -= change);
                }
            }
        }
        sum
    }
}

impl Block {
    /// The rows of U from `start` on, of its transpose.
    fn new(ut: &[f32], k: usize, start: usize) -> Self {
        let end = k.min(start + BLOCK);
        let width = end - start;
        let mut square = vec![0.0; width * width];
        for (j, row) in square.chunks_mut(width).enumerate() {
            row.iter_mut().enumerate().for_each(|(l, x)| *x = ut[(start + l) * k + start + j]);
        }
        let rest: Vec<f32> = ut[end * k..].chunks(k).flat_map(|row| &row[start..end]).copied().collect();
        let rest = (end < k).then(|| Linear::from_f32(&rest, width));
        Self { start, square, rest }
    }
}

/// Of the scales that rounding to the nearest tries, the first with the least squared error, weighted.
fn int4_scale(w: &[f32], weights: &[f32]) -> f32 {
    let most = w.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
    let mut best = (0.0, f32::INFINITY);
    for (i, scale) in int4_scales(most).enumerate() {
        let error = w.iter().zip(weights).map(|(&x, h)| h * (x - to_int4(x, scale) * scale).powi(2)).sum();
        if i == 0 || error < best.1 {
            best = (scale, error);
        }
    }
    best.0
}

#[cfg(test)]
mod tests;
