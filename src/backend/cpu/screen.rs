//! The largest logits of a large head, to the bit, without reading most of it.
//!
//! An 8-bit copy of the head gives every logit within a bound that is proved, row by row: by Cauchy and Schwarz
//! `|w · x - v · x| <= |w - v| |x|`, and the distance of a row to its copy is known when the copy is made. Rows that
//! cannot be among the k largest are left out; the others are computed from the head itself. Half the bytes of a
//! bf16 head, for the same tokens.

use std::cell::RefCell;

use rayon::prelude::*;

use super::linear::Linear;
use super::parallel::{self, Shared};
use super::simd::{F32x16, Kernel, LANES, dispatch};

/// Rows that lie side by side: one stream for the memory, four chains of sums for the processor.
const GROUP: usize = 4;
/// Rows of which one bound is kept.
const BLOCK: usize = 64;
/// Blocks of a task.
const TASK: usize = 32;
/// Rows below which a head is not worth a copy.
const MIN_ROWS: usize = 64 * BLOCK;
/// Lengths of x and of rows below which rounding is not in proportion any more.
const SMALLEST_LENGTH: f32 = 1e-10;
/// Tokens up to which the copy is quicker than the whole product.
const MAX_TOKENS: usize = 8;

thread_local! {
    /// Bounds of the blocks, kept from step to step.
    static BEST: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// An 8-bit copy of a matrix `[num_out, num_in]`.
pub struct Screen {
    num_in: usize,
    /// `[num_out / 4][num_in / 16][4][16]`, zeros past the ends.
    copy: Vec<i8>,
    /// What a row's copy is multiplied with.
    scales: Vec<f32>,
    /// Times the length of x: how far a logit of the copy can be from that of the row, rounding included.
    slack: Vec<f32>,
}

impl Screen {
    /// A copy of a matrix, or nothing where it is small.
    pub fn new(w: &Linear) -> Option<Self> {
        if w.num_out < MIN_ROWS {
            return None;
        }
        let (num_in, width) = (w.num_in, w.num_in.next_multiple_of(LANES));
        let rows = w.num_out.next_multiple_of(GROUP);
        let mut screen =
            Self { num_in, copy: vec![0; rows * width], scales: vec![0.0; rows], slack: vec![0.0; rows] };
        let groups = screen.copy.par_chunks_exact_mut(GROUP * width);
        let bounds = screen.scales.par_chunks_exact_mut(GROUP).zip(screen.slack.par_chunks_exact_mut(GROUP));
        groups.zip(bounds).enumerate().for_each_init(
            || vec![0.0; num_in],
            |row, (group, (copy, (scales, slack)))| {
                for r in 0..GROUP.min(w.num_out - group * GROUP) {
                    w.read_row(group * GROUP + r, row);
                    (scales[r], slack[r]) = dispatch(Quantize { row, copy: &mut copy[r * LANES..] });
                }
            },
        );
        Some(screen)
    }

    /// `out[t, o] = x[t] · w[o]` wherever that may be among the `k` largest of token t's first `num_tokens`
    /// features; -inf where it is not, or beyond. False, and nothing done, where the whole product is the better way.
    pub fn top_logits(
        &self,
        w: &Linear,
        x: &[f32],
        num_rows: usize,
        k: usize,
        num_tokens: usize,
        out: &mut [f32],
    ) -> bool {
        let blocks = num_tokens / BLOCK;
        if num_rows > MAX_TOKENS || k == 0 || 4 * k > blocks {
            return false;
        }
        let mut lengths = [0.0; MAX_TOKENS];
        for (to, x) in lengths.iter_mut().zip(x.chunks_exact(self.num_in).take(num_rows)) {
            *to = length(x);
            // No sum of the copy may overflow, and no slack lose its digits.
            let largest = f32::MAX / (127.0 * (self.num_in as f32).sqrt());
            if !(SMALLEST_LENGTH..largest).contains(to) {
                return false;
            }
        }
        let mut t = 0;
        for width in [4, 2, 1] {
            while t + width <= num_rows {
                let (x, out) = (&x[t * self.num_in..], &mut out[t * w.num_out..]);
                let lengths = &lengths[t..];
                match width {
                    4 => self.some::<4>(w, x, lengths, k, num_tokens, out),
                    2 => self.some::<2>(w, x, lengths, k, num_tokens, out),
                    _ => self.some::<1>(w, x, lengths, k, num_tokens, out),
                }
                t += width;
            }
        }
        true
    }

    fn some<const T: usize>(
        &self,
        w: &Linear,
        x: &[f32],
        lengths: &[f32],
        k: usize,
        num_tokens: usize,
        out: &mut [f32],
    ) {
        let vocab = w.num_out;
        let blocks = num_tokens.div_ceil(BLOCK);
        // The largest lower bound of each block: the k-th largest of them bounds the k-th largest logit from below.
        let mut best = BEST.take();
        best.clear();
        best.resize(T * blocks, f32::NEG_INFINITY);
        let (out, best_of) = (Shared::new(out), Shared::new(&mut best));
        let work = TASK * BLOCK * self.num_in * T / 4;
        let rows_of = |block: usize| block * BLOCK..((block + 1) * BLOCK).min(num_tokens);
        parallel::for_each(blocks.div_ceil(TASK), work, |task| {
            for block in task * TASK..((task + 1) * TASK).min(blocks) {
                let rows = rows_of(block);
                // SAFETY: a block's logits and bounds are its task's alone.
                unsafe {
                    dispatch(Approximate::<T> { screen: self, rows: rows.clone(), x, vocab, out });
                    for t in 0..T {
                        let logits = out.slice(t * vocab + rows.start, rows.len());
                        let lower =
                            logits.iter().zip(&self.slack[rows.clone()]).map(|(a, s)| a - s * lengths[t]);
                        *best_of.get().add(t * blocks + block) = lower
                            .filter(|a| a.is_finite())
                            .fold(f32::NEG_INFINITY, |best, a| if a > best { a } else { best });
                    }
                }
            }
        });
        let mut floor = [f32::NEG_INFINITY; T];
        for (floor, best) in floor.iter_mut().zip(best.chunks_exact_mut(blocks)) {
            *floor = *best.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1;
        }
        parallel::for_each(blocks.div_ceil(TASK), work / 64, |task| {
            for block in task * TASK..((task + 1) * TASK).min(blocks) {
                let rows = rows_of(block);
                for t in 0..T {
                    // SAFETY: as above.
                    let logits = unsafe { out.slice(t * vocab + rows.start, rows.len()) };
                    let slack = &self.slack[rows.clone()];
                    // What is not a number is kept, too.
                    let kept = |a: f32, s: f32| {
                        let upper = a + s * lengths[t];
                        upper >= floor[t] || upper.is_nan()
                    };
                    if !logits.iter().zip(slack).fold(false, |any, (&a, &s)| any | kept(a, s)) {
                        logits.fill(f32::NEG_INFINITY);
                        continue;
                    }
                    for (i, (logit, &s)) in logits.iter_mut().zip(slack).enumerate() {
                        if kept(*logit, s) {
                            let row = rows.start + i;
                            let x = x[t * self.num_in..].as_ptr();
                            let to = std::ptr::from_mut(logit);
                            // SAFETY: the token has `num_in` floats; one logit is written.
                            unsafe { w.rows(row..row + 1, 1, |_| x, None, |_| to) };
                        } else {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        });
        for t in 0..T {
            // SAFETY: the padding rows of token t.
            unsafe { out.slice(t * vocab + num_tokens, vocab - num_tokens) }.fill(f32::NEG_INFINITY);
        }
        BEST.set(best);
    }
}

/// Writes a row's 8-bit numbers into its group; returns their scale, and the slack of the row.
struct Quantize<'a> {
    row: &'a [f32],
    /// Sixteen of every 64.
    copy: &'a mut [i8],
}

impl Kernel for Quantize<'_> {
    type Out = (f32, f32);
    #[inline(always)]
    unsafe fn run<V: F32x16>(self) -> (f32, f32) {
        let largest = self.row.iter().fold(0.0f32, |m, x| if x.abs() > m { x.abs() } else { m });
        let scale = largest / 127.0;
        let per = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        // Sixteen sums each, so that the compiler may keep them in lanes.
        let (mut off, mut own) = ([0.0f64; LANES], [0.0f64; LANES]);
        for (x, q) in self.row.chunks(LANES).zip(self.copy.chunks_mut(GROUP * LANES)) {
            for (i, (&x, q)) in x.iter().zip(q).enumerate() {
                let rounded = (x * per).round_ties_even().clamp(-127.0, 127.0);
                *q = rounded as i8;
                let distance = f64::from(x) - f64::from(scale) * f64::from(rounded);
                off[i] += distance * distance;
                own[i] += f64::from(x) * f64::from(x);
            }
        }
        let (off, own) = (off.iter().sum::<f64>().sqrt(), own.iter().sum::<f64>().sqrt());
        // A sum of n products in f32 is within n roundings of the true one, in units of its terms: here n / 16 terms
        // in each lane, and the fold. Twice: once for the row, once for its copy, which is scaled afterwards.
        let roundings = (self.row.len().div_ceil(LANES) + 8) as f64 * f64::from(f32::EPSILON);
        let slack = (off + roundings * (2.0 * own + off)) * (1.0 + 1e-6);
        // Also where something is NaN or infinite, or the numbers are so small that they lose digits.
        if slack.is_finite() && own > f64::from(SMALLEST_LENGTH) || own == 0.0 {
            (scale, slack as f32)
        } else {
            (0.0, f32::INFINITY)
        }
    }
}

/// The Euclidean length, not below.
fn length(x: &[f32]) -> f32 {
    (x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt() * (1.0 + 1e-6)) as f32
}

/// Logits of the copy for some rows, from a multiple of four on.
struct Approximate<'a, const T: usize> {
    screen: &'a Screen,
    rows: std::ops::Range<usize>,
    x: &'a [f32],
    vocab: usize,
    out: Shared<f32>,
}

impl<const T: usize> Kernel for Approximate<'_, T> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<V: F32x16>(self) {
        let Self { screen, rows, x, vocab, out } = self;
        let n = screen.num_in;
        let width = n.next_multiple_of(LANES);
        let mut row = rows.start;
        while row < rows.end {
            let group = &screen.copy[row * width..(row + GROUP) * width];
            // SAFETY: tokens have n floats, the group its rows; the logits are the caller's.
            unsafe {
                let mut acc = [[V::splat(0.0); GROUP]; T];
                for j in 0..width / LANES {
                    let mut xv = [V::splat(0.0); T];
                    for t in 0..T {
                        let from = x.as_ptr().add(t * n + j * LANES);
                        xv[t] =
                            if (j + 1) * LANES <= n { V::load(from) } else { V::load_part(from, n % LANES) };
                    }
                    for r in 0..GROUP {
                        let w = V::load_i8(group.as_ptr().add((j * GROUP + r) * LANES));
                        for t in 0..T {
                            acc[t][r] = w.fma(xv[t], acc[t][r]);
                        }
                    }
                }
                let scales = &screen.scales[row..row + GROUP];
                for t in 0..T {
                    let sums = V::sum4(acc[t]);
                    for r in 0..GROUP.min(rows.end - row) {
                        *out.get().add(t * vocab + row + r) = sums[r] * scales[r];
                    }
                }
            }
            row += GROUP;
        }
    }
}

#[cfg(test)]
mod tests;
