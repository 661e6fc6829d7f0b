//! Matrix products `y = x Wᵀ` with f32 activations and bf16, f16 or f32 weights, straight from the mapped
//! file.
//!
//! A product of one row and one weight row is always sixteen partial sums over k (lane i takes k = i,
//! i + 16, ...) and one fixed fold, whatever tile it is computed in: a token's result does not depend on
//! which other tokens are in the batch. Threads split the output features, never the reduction.

use std::cell::RefCell;

use super::gemm::{self, Tokens};
use super::parallel::{self, Shared};
use super::simd::{F32x16, Kernel, LANES, dispatch};
use super::tile::{Bf16, Element, F16, store_some, tile};
use crate::weights::{DType, Tensor};

/// A weight matrix `[out, in]`: the rows of one or more tensors, one after the other.
pub struct Linear {
    parts: Vec<Part>,
    /// Input features.
    pub num_in: usize,
    /// Output features.
    pub num_out: usize,
}

struct Part {
    rows: std::ops::Range<usize>,
    data: Data,
    dtype: DType,
}

enum Data {
    Mapped(Tensor),
    Owned(Vec<u8>),
}

impl Linear {
    /// The rows of `tensors` (each `[rows, in]`, or `[in]` for one row), one after the other. With `dtype`,
    /// tensors of another dtype are converted (rounded to nearest even); otherwise nothing is copied.
    pub fn new(tensors: &[Tensor], dtype: Option<DType>) -> Self {
        let num_in = tensors[0].shape.last().copied().unwrap_or(1);
        let (mut parts, mut num_out) = (Vec::new(), 0);
        for t in tensors {
            let rows = t.shape.iter().product::<usize>() / num_in.max(1);
            let wish = dtype.unwrap_or(t.dtype);
            let data = if wish == t.dtype { Data::Mapped(t.clone()) } else { Data::Owned(convert(t, wish)) };
            parts.push(Part { rows: num_out..num_out + rows, data, dtype: wish });
            num_out += rows;
        }
        Self { parts, num_in, num_out }
    }

    /// An f32 matrix in memory.
    pub fn from_f32(data: &[f32], num_in: usize) -> Self {
        let num_out = data.len() / num_in.max(1);
        let bytes = data.iter().flat_map(|x| x.to_ne_bytes()).collect();
        let part = Part { rows: 0..num_out, data: Data::Owned(bytes), dtype: DType::F32 };
        Self { parts: vec![part], num_in, num_out }
    }

    fn row(&self, row: usize) -> (*const u8, DType) {
        let part = &self.parts[self.parts.partition_point(|p| p.rows.end <= row)];
        let bytes = part.data.bytes();
        let offset = (row - part.rows.start) * self.num_in * part.dtype.size();
        debug_assert!(offset + self.num_in * part.dtype.size() <= bytes.len());
        (bytes[offset..].as_ptr(), part.dtype)
    }

    /// Writes row `row`, widened, into `out` (`[in]`).
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        let (w, dtype) = self.row(row);
        assert!(out.len() == self.num_in && row < self.num_out);
        // SAFETY: the row has `num_in` elements.
        unsafe { widen_row(w, dtype, out.as_mut_ptr(), self.num_in) }
    }

    /// `out[t, o] = x[t] · w[o]` for `num_rows` rows: `x` `[num_rows, in]`, `out` `[num_rows, out]`.
    pub fn forward(&self, x: &[f32], out: &mut [f32], num_rows: usize) {
        assert!(x.len() >= num_rows * self.num_in && out.len() >= num_rows * self.num_out);
        let out = Shared::new(out);
        let work = self.num_in * num_rows;
        // Laid out once, for all tasks.
        let mut panel = PACKED.take();
        let packed = num_rows >= gemm::MIN_TOKENS;
        if packed {
            pack(x, num_rows, self.num_in, &mut panel);
        }
        let panel_at = Shared::new(&mut panel);
        let per_task = parallel::items_per_task(self.num_out, work);
        parallel::for_each(self.num_out.div_ceil(per_task), per_task * work, |task| {
            let rows = task * per_task..((task + 1) * per_task).min(self.num_out);
            let start = rows.start;
            // SAFETY: t < num_rows and start < num_out; tasks write disjoint features.
            let out_row = |t: usize| unsafe { out.get().add(t * self.num_out + start) };
            // SAFETY: every token has `num_in` floats, the panel holds them all, and there is room for the features
            // of this task.
            unsafe {
                let panel = packed.then_some(panel_at.get().cast_const());
                self.rows_of(rows, num_rows, |t| x[t * self.num_in..].as_ptr(), panel, out_row);
            }
        });
        PACKED.set(panel);
    }

    /// Output features `rows` for `num_rows` tokens, on this thread.
    ///
    /// # Safety
    /// Token `t` is read at `x(t)` (`num_in` floats) and written at `out(t)` (`rows.len()` floats), which nobody
    /// else touches meanwhile.
    pub unsafe fn rows<X, Y>(&self, rows: std::ops::Range<usize>, num_rows: usize, x: X, out: Y)
    where
        X: Fn(usize) -> *const f32,
        Y: Fn(usize) -> *mut f32,
    {
        // SAFETY: the caller's.
        unsafe { self.rows_of(rows, num_rows, x, None, out) }
    }

    /// [`Linear::rows`], from a panel that [`pack`] laid out where there is one.
    unsafe fn rows_of<X, Y>(
        &self,
        rows: std::ops::Range<usize>,
        num_rows: usize,
        x: X,
        panel: Option<*const f32>,
        out: Y,
    ) where
        X: Fn(usize) -> *const f32,
        Y: Fn(usize) -> *mut f32,
    {
        let first = self.parts.partition_point(|p| p.rows.end <= rows.start);
        for part in self.parts[first..].iter().take_while(|p| p.rows.start < rows.end) {
            let (start, end) = (rows.start.max(part.rows.start), rows.end.min(part.rows.end));
            let (k, size) = (self.num_in, part.dtype.size());
            let bytes = &part.data.bytes()[(start - part.rows.start) * k * size..];
            assert!(bytes.len() >= (end - start) * k * size);
            let before = start - rows.start;
            let product = Product {
                w: bytes.as_ptr(),
                dtype: part.dtype,
                num_out: end - start,
                k,
                num_rows,
                x: &x,
                panel,
                // SAFETY: the part's features follow those of the parts before it.
                out: |t| unsafe { out(t).add(before) },
            };
            dispatch(product);
        }
    }
}

impl Data {
    fn bytes(&self) -> &[u8] {
        match self {
            Data::Mapped(t) => t.bytes(),
            Data::Owned(v) => v,
        }
    }
}

thread_local! {
    /// The x panel of the product at hand.
    static PACKED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Lays out tokens `x` `[num_rows, k]` for the tile of this machine, over all threads.
fn pack(x: &[f32], num_rows: usize, k: usize, panel: &mut Vec<f32>) {
    let width = dispatch(TileTokens);
    let len = gemm::packed_len(num_rows, k, width);
    if panel.len() < len {
        panel.resize(len, 0.0);
    }
    let tiles = num_rows.div_ceil(width);
    let to = Shared::new(panel);
    parallel::for_each(tiles, width * k, |tile| dispatch(PackTile { x, num_rows, k, tile, to }));
}

/// Tokens of a register tile.
struct TileTokens;

impl Kernel for TileTokens {
    type Out = usize;
    #[inline(always)]
    unsafe fn run<V: F32x16>(self) -> usize {
        V::TILE.1
    }
}

struct PackTile<'a> {
    x: &'a [f32],
    num_rows: usize,
    k: usize,
    tile: usize,
    to: Shared<f32>,
}

impl Kernel for PackTile<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<V: F32x16>(self) {
        let Self { x, num_rows, k, tile, to } = self;
        let row = |t: usize| x[t * k..(t + 1) * k].as_ptr();
        // SAFETY: `pack` sized the panel; each tile is one task's.
        unsafe {
            match V::TILE.1 {
                6 => gemm::pack::<V, 6>(tile..tile + 1, num_rows, k, row, to.get()),
                3 => gemm::pack::<V, 3>(tile..tile + 1, num_rows, k, row, to.get()),
                _ => gemm::pack::<V, 2>(tile..tile + 1, num_rows, k, row, to.get()),
            }
        }
    }
}

/// Some output features of a product, on one thread.
struct Product<'a, X, Y> {
    w: *const u8,
    dtype: DType,
    num_out: usize,
    k: usize,
    num_rows: usize,
    x: &'a X,
    panel: Option<*const f32>,
    out: Y,
}

impl<X: Fn(usize) -> *const f32, Y: Fn(usize) -> *mut f32> Kernel for Product<'_, X, Y> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<V: F32x16>(self) {
        // SAFETY: `Linear::rows` checked the extent of `w`; tokens and outputs are its caller's.
        unsafe {
            match self.dtype {
                DType::F32 => self.elements::<V, f32>(),
                DType::BF16 => self.elements::<V, Bf16>(),
                _ => self.elements::<V, F16>(),
            }
        }
    }
}

impl<X: Fn(usize) -> *const f32, Y: Fn(usize) -> *mut f32> Product<'_, X, Y> {
    #[inline(always)]
    unsafe fn elements<V: F32x16, E: Element>(&self) {
        let Self { num_out, k, num_rows, x, out, .. } = self;
        let tokens = match self.panel {
            Some(panel) => Tokens::Packed(panel),
            None => Tokens::Rows(x),
        };
        let w = self.w.cast::<E>();
        // SAFETY: the caller's.
        unsafe {
            match (*num_rows >= gemm::MIN_TOKENS, V::TILE) {
                (true, (4, _)) => gemm::product::<V, E, 4, 6>(w, *num_out, *k, *num_rows, tokens, out),
                (true, (2, 3)) => gemm::product::<V, E, 2, 3>(w, *num_out, *k, *num_rows, tokens, out),
                (true, _) => gemm::product::<V, E, 2, 2>(w, *num_out, *k, *num_rows, tokens, out),
                (false, _) => {
                    let mut t = 0;
                    while t + 4 <= *num_rows {
                        self.few::<V, E, 4>(w, t);
                        t += 4;
                    }
                    while t + 2 <= *num_rows {
                        self.few::<V, E, 2>(w, t);
                        t += 2;
                    }
                    if t < *num_rows {
                        self.few::<V, E, 1>(w, t);
                    }
                }
            }
        }
    }

    /// `T` tokens from `t`. The weights pass as one plain stream, row after row: four rows side by side, with or
    /// without prefetch, reached half of the memory's speed (AMD EPYC, 2026-11).
    #[inline(always)]
    unsafe fn few<V: F32x16, E: Element, const T: usize>(&self, w: *const E, t: usize) {
        const R: usize = 4;
        let (mut x, mut out) = ([std::ptr::null(); T], [std::ptr::null_mut(); T]);
        for i in 0..T {
            x[i] = (self.x)(t + i);
            out[i] = (self.out)(t + i);
        }
        // SAFETY: the caller's.
        unsafe {
            for o in (0..self.num_out).step_by(R) {
                let rows = R.min(self.num_out - o);
                let mut acc = [[V::splat(0.0); R]; T];
                for r in 0..rows {
                    let row = tile::<V, E, 1, T>([w.add((o + r) * self.k)], x, self.k);
                    for i in 0..T {
                        acc[i][r] = row[i][0];
                    }
                }
                for i in 0..T {
                    store_some::<V, R>(acc[i], out[i].add(o), rows);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn widen<V: F32x16, E: Element>(w: *const E, out: *mut f32, n: usize) {
    // SAFETY: the caller's; n elements in, n floats out.
    unsafe {
        let mut i = 0;
        while i + LANES <= n {
            E::load::<V>(w.add(i)).store(out.add(i));
            i += LANES;
        }
        for i in i..n {
            *out.add(i) = E::widen(w.add(i));
        }
    }
}

struct WidenRow {
    w: *const u8,
    dtype: DType,
    out: *mut f32,
    n: usize,
}

impl Kernel for WidenRow {
    type Out = ();
    #[inline(always)]
    unsafe fn run<V: F32x16>(self) {
        // SAFETY: the maker's.
        unsafe {
            match self.dtype {
                DType::F32 => widen::<V, f32>(self.w.cast(), self.out, self.n),
                DType::BF16 => widen::<V, Bf16>(self.w.cast(), self.out, self.n),
                _ => widen::<V, F16>(self.w.cast(), self.out, self.n),
            }
        }
    }
}

unsafe fn widen_row(w: *const u8, dtype: DType, out: *mut f32, n: usize) {
    dispatch(WidenRow { w, dtype, out, n });
}

/// A tensor's elements as f32.
pub fn to_f32(t: &Tensor) -> Vec<f32> {
    let n = t.shape.iter().product();
    let mut out = vec![0f32; n];
    assert!(t.bytes().len() == n * t.dtype.size());
    // SAFETY: the tensor has n elements, checked above.
    unsafe { widen_row(t.bytes().as_ptr(), t.dtype, out.as_mut_ptr(), n) };
    out
}

fn convert(t: &Tensor, dtype: DType) -> Vec<u8> {
    let wide = to_f32(t);
    match dtype {
        DType::BF16 => wide.iter().flat_map(|&x| half::bf16::from_f32(x).to_ne_bytes()).collect(),
        DType::F16 => wide.iter().flat_map(|&x| half::f16::from_f32(x).to_ne_bytes()).collect(),
        _ => wide.iter().flat_map(|x| x.to_ne_bytes()).collect(),
    }
}

#[cfg(test)]
pub(crate) mod tests;
