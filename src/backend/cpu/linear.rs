//! Matrix products `y = x Wᵀ` with f32 activations and bf16, f16 or f32 weights, straight from the mapped
//! file.
//!
//! A product of one row and one weight row is always sixteen partial sums over k (lane i takes k = i,
//! i + 16, ...) and one fixed fold, whatever tile it is computed in: a token's result does not depend on
//! which other tokens are in the batch. Threads split the output features, never the reduction.

use std::cell::RefCell;

use super::parallel::{self, Shared};
use super::simd::{F32x16, Kernel, LANES, dispatch};
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
            let data =
                if wish == t.dtype { Data::Mapped(t.clone()) } else { Data::Owned(convert(t, wish)) };
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
        let per_task = parallel::items_per_task(self.num_out, work);
        parallel::for_each(self.num_out.div_ceil(per_task), per_task * work, |task| {
            let rows = task * per_task..((task + 1) * per_task).min(self.num_out);
            let write = |t: usize, row: usize, y: f32| {
                // SAFETY: t < num_rows and row < num_out; tasks write disjoint rows.
                unsafe { *out.get().add(t * self.num_out + row) = y }
            };
            self.rows(rows, num_rows, |t| x[t * self.num_in..].as_ptr(), write);
        });
    }

    /// Output features `rows` for `num_rows` tokens, on this thread: token `t` is read at `x(t)` (`[in]`),
    /// its feature `o` is handed to `write(t, o, y)`.
    pub fn rows<X, Y>(&self, rows: std::ops::Range<usize>, num_rows: usize, x: X, write: Y)
    where
        X: Fn(usize) -> *const f32,
        Y: Fn(usize, usize, f32),
    {
        let first = self.parts.partition_point(|p| p.rows.end <= rows.start);
        for part in self.parts[first..].iter().take_while(|p| p.rows.start < rows.end) {
            let (start, end) = (rows.start.max(part.rows.start), rows.end.min(part.rows.end));
            let (k, size) = (self.num_in, part.dtype.size());
            let bytes = &part.data.bytes()[(start - part.rows.start) * k * size..];
            assert!(bytes.len() >= (end - start) * k * size);
            let product = Product {
                w: bytes.as_ptr(),
                dtype: part.dtype,
                num_out: end - start,
                k,
                num_rows,
                x: &x,
                write: |t, o, y| write(t, start + o, y),
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

/// The dot product of two f32 vectors, by the same partial sums as a product's.
#[inline(always)]
pub unsafe fn dot<V: F32x16>(a: *const f32, b: *const f32, n: usize) -> f32 {
    // SAFETY: the caller's; both have n elements.
    unsafe { tile::<V, f32, 1, 1>([a], [b], n)[0][0] }
}

/// How a weight element is loaded and widened.
pub trait Element: Copy {
    /// Sixteen of them. # Safety: valid for sixteen elements, any alignment.
    unsafe fn load<V: F32x16>(p: *const Self) -> V;
    /// One of them. # Safety: valid for one element, any alignment.
    unsafe fn widen(p: *const Self) -> f32;
    /// `n < 16` of them, the other lanes zero. # Safety: valid for n elements.
    #[inline(always)]
    unsafe fn load_part<V: F32x16>(p: *const Self, n: usize) -> V {
        let mut lanes = [0f32; LANES];
        // SAFETY: the caller's.
        unsafe {
            for (i, lane) in lanes.iter_mut().enumerate().take(n) {
                *lane = Self::widen(p.add(i));
            }
            V::load(lanes.as_ptr())
        }
    }
}

/// bfloat16 bits.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Bf16(u16);

/// IEEE half bits.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct F16(u16);

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<V: F32x16>(p: *const Self) -> V {
        // SAFETY: the caller's.
        unsafe { V::load(p) }
    }
    #[inline(always)]
    unsafe fn widen(p: *const Self) -> f32 {
        // SAFETY: the caller's.
        unsafe { p.read_unaligned() }
    }
}

impl Element for Bf16 {
    #[inline(always)]
    unsafe fn load<V: F32x16>(p: *const Self) -> V {
        // SAFETY: the caller's.
        unsafe { V::load_bf16(p.cast()) }
    }
    #[inline(always)]
    unsafe fn widen(p: *const Self) -> f32 {
        // SAFETY: the caller's.
        f32::from_bits(u32::from(unsafe { p.read_unaligned() }.0) << 16)
    }
}

impl Element for F16 {
    #[inline(always)]
    unsafe fn load<V: F32x16>(p: *const Self) -> V {
        // SAFETY: the caller's.
        unsafe { V::load_f16(p.cast()) }
    }
    #[inline(always)]
    unsafe fn widen(p: *const Self) -> f32 {
        // SAFETY: the caller's.
        half::f16::from_bits(unsafe { p.read_unaligned() }.0).to_f32()
    }
}

/// `R` weight rows times `T` token rows.
#[inline(always)]
pub unsafe fn tile<V: F32x16, E: Element, const R: usize, const T: usize>(
    w: [*const E; R],
    x: [*const f32; T],
    k: usize,
) -> [[f32; T]; R] {
    // SAFETY: every row has k elements.
    unsafe {
        let mut acc = [[V::splat(0.0); T]; R];
        let mut i = 0;
        while i + LANES <= k {
            let mut wv = [V::splat(0.0); R];
            for r in 0..R {
                wv[r] = E::load::<V>(w[r].add(i));
            }
            for t in 0..T {
                let xv = V::load(x[t].add(i));
                for r in 0..R {
                    acc[r][t] = wv[r].fma(xv, acc[r][t]);
                }
            }
            i += LANES;
        }
        if i < k {
            for t in 0..T {
                let xv = V::load_part(x[t].add(i), k - i);
                for r in 0..R {
                    acc[r][t] = E::load_part::<V>(w[r].add(i), k - i).fma(xv, acc[r][t]);
                }
            }
        }
        let mut out = [[0f32; T]; R];
        for t in 0..T {
            let mut r = 0;
            while r + 4 <= R {
                let s = V::sum4([acc[r][t], acc[r + 1][t], acc[r + 2][t], acc[r + 3][t]]);
                for j in 0..4 {
                    out[r + j][t] = s[j];
                }
                r += 4;
            }
            while r < R {
                out[r][t] = acc[r][t].sum();
                r += 1;
            }
        }
        out
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
    write: Y,
}

impl<X: Fn(usize) -> *const f32, Y: Fn(usize, usize, f32)> Kernel for Product<'_, X, Y> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<V: F32x16>(self) {
        // SAFETY: `Linear::rows` checked the extent of `w`; `x(t)` is valid for k elements by contract.
        unsafe {
            match self.dtype {
                DType::F32 => self.elements::<V, f32>(self.w.cast()),
                DType::BF16 if self.num_rows >= 8 => self.widened::<V, Bf16>(),
                DType::F16 if self.num_rows >= 8 => self.widened::<V, F16>(),
                DType::BF16 => self.elements::<V, Bf16>(self.w.cast()),
                _ => self.elements::<V, F16>(self.w.cast()),
            }
        }
    }
}

thread_local! {
    /// Widened weight rows of the tile at hand.
    static WIDENED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl<X: Fn(usize) -> *const f32, Y: Fn(usize, usize, f32)> Product<'_, X, Y> {
    /// Widens a few weight rows at a time, for products with so many tokens that it pays.
    #[inline(always)]
    unsafe fn widened<V: F32x16, E: Element>(&self) {
        let step = V::TILE.0;
        // Taken out and put back, not borrowed in a closure: a closure would lose the instruction set.
        let mut buffer = WIDENED.take();
        buffer.resize(step * self.k, 0.0);
        for o in (0..self.num_out).step_by(step) {
            let rows = step.min(self.num_out - o);
            // SAFETY: `rows` rows of k elements at `w`, and as many floats in the buffer.
            unsafe {
                widen::<V, E>(self.w.cast::<E>().add(o * self.k), buffer.as_mut_ptr(), rows * self.k);
                self.row_tile::<V, f32>(buffer.as_ptr(), o, rows);
            }
        }
        WIDENED.set(buffer);
    }

    #[inline(always)]
    unsafe fn elements<V: F32x16, E: Element>(&self, w: *const E) {
        let step = V::TILE.0;
        for o in (0..self.num_out).step_by(step) {
            // SAFETY: the caller's.
            unsafe { self.row_tile::<V, E>(w.add(o * self.k), o, step.min(self.num_out - o)) };
        }
    }

    /// Up to `TILE.0` weight rows at `w` times all tokens.
    #[inline(always)]
    unsafe fn row_tile<V: F32x16, E: Element>(&self, w: *const E, o: usize, rows: usize) {
        // SAFETY: the caller's.
        unsafe {
            match (V::TILE, rows) {
                ((4, _), 4) => self.tokens::<V, E, 4, 6>(w, o),
                ((2, 3), 2) => self.tokens::<V, E, 2, 3>(w, o),
                ((2, _), 2) => self.tokens::<V, E, 2, 2>(w, o),
                _ => {
                    for r in 0..rows {
                        self.tokens::<V, E, 1, 4>(w.add(r * self.k), o + r);
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn tokens<V: F32x16, E: Element, const R: usize, const T: usize>(&self, w: *const E, o: usize) {
        // SAFETY: the caller's.
        unsafe {
            let mut w_rows = [w; R];
            for (r, p) in w_rows.iter_mut().enumerate() {
                *p = w.add(r * self.k);
            }
            let mut t = 0;
            while t + T <= self.num_rows {
                self.one_tile::<V, E, R, T>(w_rows, o, t);
                t += T;
            }
            while t + 2 <= self.num_rows {
                self.one_tile::<V, E, R, 2>(w_rows, o, t);
                t += 2;
            }
            if t < self.num_rows {
                self.one_tile::<V, E, R, 1>(w_rows, o, t);
            }
        }
    }

    #[inline(always)]
    unsafe fn one_tile<V: F32x16, E: Element, const R: usize, const T: usize>(
        &self,
        w: [*const E; R],
        o: usize,
        t: usize,
    ) {
        let mut x = [std::ptr::null(); T];
        for (i, p) in x.iter_mut().enumerate() {
            *p = (self.x)(t + i);
        }
        // SAFETY: the caller's.
        let y = unsafe { tile::<V, E, R, T>(w, x, self.k) };
        for (r, row) in y.iter().enumerate() {
            for (i, &v) in row.iter().enumerate() {
                (self.write)(t + i, o + r, v);
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
