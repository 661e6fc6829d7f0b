//! Rotary embedding, and causal attention over pages with a running softmax, f32 throughout.
//!
//! A query's softmax is folded page by page from the start of its sequence, so its bits depend on its position
//! alone: not on the chunk it was computed in, nor on the rest of the batch.

use std::cell::RefCell;

use super::kernel::kernel;
use super::parallel::Shared;
use super::simd::LANES;
use super::small::{matmul_nn, matmul_nt};
use crate::backend::Rope;
use crate::batch::PAGE_LEN;

/// Cosines and sines of one token, `[rotary_dim / 2]` each.
pub fn rotation(rope: &Rope, position: [u32; 3], cos: &mut [f32], sin: &mut [f32]) {
    for (i, freq) in rope.inv_freq.iter().enumerate() {
        let angle = position[usize::from(rope.axis[i])] as f32 * freq;
        cos[i] = angle.cos() * rope.scale;
        sin[i] = angle.sin() * rope.scale;
    }
}

/// Rotates the leading `2 * cos.len()` elements of a head: element i with element i + `cos.len()`.
pub fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, rest) = head.split_at_mut(cos.len());
    for (((a, b), c), s) in first.iter_mut().zip(rest).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

/// The query heads of some tokens that share a key head.
#[derive(Clone, Copy)]
pub struct Queries<'a> {
    /// `[num_tokens, stride]`: the group's heads lie side by side, `group * head_dim` elements.
    pub q: &'a [f32],
    /// Elements from a token's row to the next, in `q` and in the output.
    pub stride: usize,
    /// Query heads per key head.
    pub group: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Position in its sequence of the first token; the others follow.
    pub first_pos: usize,
    /// Number of tokens.
    pub num_tokens: usize,
    /// Multiplied into the scores.
    pub scale: f32,
}

/// Keys or values of one head, page by page: `page(i)` is `[PAGE_LEN, row_stride]`.
#[derive(Clone, Copy)]
pub struct PagedRows<'a, P> {
    /// Where page i of the sequence starts.
    pub page: &'a P,
    /// Elements from a token's row to the next.
    pub row_stride: usize,
}

#[derive(Default)]
struct Scratch {
    /// Queries, `[rows, head_dim]`, row = token * group + head.
    q: Vec<f32>,
    /// Scores, then weights, of one page: `[rows, PAGE_LEN]`.
    p: Vec<f32>,
    /// Running sum of weighted values, `[rows, head_dim]`.
    acc: Vec<f32>,
    /// Running maximum and sum of each row, and the factor that the last page scaled it by.
    max: Vec<f32>,
    sum: Vec<f32>,
    fade: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Attention of a tile of queries over the pages of their sequence; `out` has the layout of `queries.q`.
///
/// `k(i)` and `v(i)` give page i of the key head; both are valid up to the last token of the tile.
pub fn attend<'a, K, U>(queries: Queries<'a>, k: PagedRows<'a, K>, v: PagedRows<'a, U>, out: Shared<f32>)
where
    K: Fn(usize) -> *const f32,
    U: Fn(usize) -> *const f32,
{
    SCRATCH.with_borrow_mut(|scratch| {
        let Queries { q, stride, group, head_dim, first_pos, num_tokens, .. } = queries;
        let rows = num_tokens * group;
        scratch.q.clear();
        for t in 0..num_tokens {
            scratch.q.extend_from_slice(&q[t * stride..t * stride + group * head_dim]);
        }
        scratch.p.resize(rows * PAGE_LEN, 0.0);
        for (buffer, start) in
            [(&mut scratch.max, f32::NEG_INFINITY), (&mut scratch.sum, 0.0), (&mut scratch.fade, 0.0)]
        {
            buffer.clear();
            buffer.resize(rows, start);
        }
        scratch.acc.clear();
        scratch.acc.resize(rows * head_dim, 0.0);
        let num_keys = first_pos + num_tokens;
        for page in 0..num_keys.div_ceil(PAGE_LEN) {
            let first_key = page * PAGE_LEN;
            let len = PAGE_LEN.min(num_keys - first_key);
            let (keys, values) = (Page((k.page)(page), k.row_stride), Page((v.page)(page), v.row_stride));
            attend_page(queries, keys, values, first_key, len, scratch);
        }
        for row in 0..rows {
            let (t, head) = (row / group, row % group);
            // SAFETY: a tile's output rows are its own.
            let out = unsafe { out.slice(t * stride + head * head_dim, head_dim) };
            let inverse = 1.0 / scratch.sum[row];
            for (o, a) in out.iter_mut().zip(&scratch.acc[row * head_dim..]) {
                *o = a * inverse;
            }
        }
    });
}

#[derive(Clone, Copy)]
struct Page(*const f32, usize);

kernel! {
    fn attend_page<V>(
        queries: Queries<'a>,
        keys: Page,
        values: Page,
        first_key: usize,
        len: usize,
        scratch: &'a mut Scratch,
    ) {
        let Queries { group, head_dim, first_pos, num_tokens, scale, .. } = queries;
        let rows = num_tokens * group;
        // Keys of this page that a row may see; rows before the page see none and are left out.
        let visible = |row: usize| (first_pos + row / group + 1).saturating_sub(first_key).min(len);
        let start = (0..num_tokens).position(|t| first_pos + t >= first_key).unwrap_or(num_tokens) * group;
        let n = rows - start;
        let (q, p) = (scratch.q.as_ptr().add(start * head_dim), scratch.p.as_mut_ptr());
        matmul_nt::<V>(n, len, head_dim, |_| 0, q, head_dim, keys.0, keys.1, p, PAGE_LEN);
        for i in 0..n {
            let (row, seen) = (start + i, visible(start + i));
            let scores = std::slice::from_raw_parts_mut(p.add(i * PAGE_LEN), PAGE_LEN);
            let mut max = scratch.max[row];
            for s in &mut scores[..seen] {
                *s *= scale;
                max = max.max(*s);
            }
            scores[seen..].fill(f32::NEG_INFINITY);
            let mut sum = V::splat(0.0);
            for j in (0..PAGE_LEN).step_by(LANES) {
                let w = V::load(scores.as_ptr().add(j)).sub(V::splat(max)).exp();
                w.store(scores.as_mut_ptr().add(j));
                sum = sum.add(w);
            }
            let fade = (scratch.max[row] - max).exp();
            scratch.sum[row] = scratch.sum[row].mul_add(fade, sum.sum());
            (scratch.max[row], scratch.fade[i]) = (max, fade);
        }
        let (fade, acc) = (&scratch.fade, scratch.acc.as_mut_ptr().add(start * head_dim));
        matmul_nn::<V>(
            n, head_dim, |i| visible(start + i), |i| fade[i], p, PAGE_LEN, values.0, values.1, acc, head_dim,
        );
    }
}
