//! Matrix products `y = x Wᵀ` with f32 activations and bf16, f16 or f32 weights, straight from the mapped
//! file. Quantised matrices are decoded when they are loaded, to f32, which is exact.
//!
//! A product of one row and one weight row is always sixteen partial sums over k (lane i takes k = i,
//! i + 16, ...) and one fixed fold, whatever tile it is computed in: a token's result does not depend on
//! which other tokens are in the batch. Threads split the output features, never the reduction.

use super::gemm::{self, Panel, Rows, Strips};
use super::packed::Packed;
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
}

enum Data {
    /// Rows of plain elements, in the file or converted.
    Mapped(Tensor),
    Owned(Vec<u8>, DType),
    Packed(Packed),
}

impl Linear {
    /// The rows of `tensors` (each `[rows, in]`, or `[in]` for one row), one after the other. With `dtype`,
    /// tensors of another dtype are converted (rounded to nearest even). bf16 is packed; f16 and f32 are used where
    /// they are, in the mapped file; what is encoded, or quantised now, becomes f32.
    pub fn new(tensors: &[Tensor], dtype: Option<DType>) -> Self {
        Self::from_parts(tensors, |t| match Data::new(t, dtype) {
            Data::Mapped(t) if t.dtype == DType::BF16 => {
                let packed = Packed::new(plain(&t), t.shape.last().copied().unwrap_or(1));
                t.release();
                Data::Packed(packed)
            }
            Data::Owned(bytes, DType::BF16) => {
                Data::Packed(Packed::new(&bytes, t.shape.last().copied().unwrap_or(1)))
            }
            other => other,
        })
    }

    /// A matrix of which single rows are read, by [`Linear::read_row`]: never packed.
    pub fn table(tensor: &Tensor, dtype: Option<DType>) -> Self {
        Self::from_parts(std::slice::from_ref(tensor), |t| Data::new(t, dtype))
    }

    fn from_parts(tensors: &[Tensor], data: impl Fn(&Tensor) -> Data) -> Self {
        let num_in = tensors[0].shape.last().copied().unwrap_or(1);
        let (mut parts, mut num_out) = (Vec::new(), 0);
        for t in tensors {
            let rows = t.shape.iter().product::<usize>() / num_in.max(1);
            parts.push(Part { rows: num_out..num_out + rows, data: data(t) });
            num_out += rows;
        }
        Self { parts, num_in, num_out }
    }

    /// An f32 matrix in memory.
    pub fn from_f32(data: &[f32], num_in: usize) -> Self {
        let num_out = data.len() / num_in.max(1);
        let bytes = data.iter().flat_map(|x| x.to_ne_bytes()).collect();
        let part = Part { rows: 0..num_out, data: Data::Owned(bytes, DType::F32) };
        Self { parts: vec![part], num_in, num_out }
    }

    /// Writes row `row`, widened, into `out` (`[in]`). Quick for a table only.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(out.len() == self.num_in && row < self.num_out);
        let part = &self.parts[self.parts.partition_point(|p| p.rows.end <= row)];
        let row = row - part.rows.start;
        match part.data.elements() {
            Ok((bytes, dtype)) => {
                let len = self.num_in * dtype.size();
                widen_row(&bytes[row * len..(row + 1) * len], dtype, out);
            }
            Err(packed) => packed.read_row(row, out),
        }
    }

    /// `out[t, o] = x[t] · w[o]` for `num_rows` rows: `x` `[num_rows, in]`, `out` `[num_rows, out]`.
    pub fn forward(&self, x: &[f32], out: &mut [f32], num_rows: usize) {
        assert!(x.len() >= num_rows * self.num_in && out.len() >= num_rows * self.num_out);
        let out = Shared::new(out);
        let x = |t: usize| x[t * self.num_in..].as_ptr();
        // SAFETY: every token has `num_in` floats.
        let panel = unsafe { Panel::new(num_rows, self.num_in, x, true) };
        let work = self.num_in * num_rows;
        let per_task = parallel::items_per_task(self.num_out, work);
        parallel::for_each(self.num_out.div_ceil(per_task), per_task * work, |task| {
            let rows = task * per_task..((task + 1) * per_task).min(self.num_out);
            let start = rows.start;
            // SAFETY: t < num_rows and start < num_out; tasks write disjoint features.
            let out_row = |t: usize| unsafe { out.get().add(t * self.num_out + start) };
            // SAFETY: every token has `num_in` floats and there is room for the features of this task.
            unsafe { self.rows(rows, num_rows, x, panel.as_ref(), out_row) };
        });
    }

    /// Output features `rows` for `num_rows` tokens, on this thread.
    ///
    /// # Safety
    /// Token `t` is read at `x(t)` (`num_in` floats), or in `panel` where there are enough of them for one, and written
    /// at `out(t)` (`rows.len()` floats), which nobody else touches meanwhile.
    pub unsafe fn rows<X, Y>(
        &self,
        rows: std::ops::Range<usize>,
        num_rows: usize,
        x: X,
        panel: Option<&Panel>,
        out: Y,
    ) where
        X: Fn(usize) -> *const f32,
        Y: Fn(usize) -> *mut f32,
    {
        let first = self.parts.partition_point(|p| p.rows.end <= rows.start);
        for part in self.parts[first..].iter().take_while(|p| p.rows.start < rows.end) {
            let (start, end) = (rows.start.max(part.rows.start), rows.end.min(part.rows.end));
            let before = start - rows.start;
            let product = Product {
                w: &part.data,
                first: start - part.rows.start,
                num_out: end - start,
                k: self.num_in,
                num_rows,
                x: &x,
                panel: panel.map(Panel::as_ptr),
                // SAFETY: the part's features follow those of the parts before it.
                out: |t| unsafe { out(t).add(before) },
            };
            dispatch(product);
        }
    }
}

impl Data {
    fn new(t: &Tensor, dtype: Option<DType>) -> Self {
        let wish = dtype.unwrap_or(t.dtype);
        let plain = t.encoded().is_none() && t.scheme().is_none();
        if wish == t.dtype && plain {
            return Data::Mapped(t.clone());
        }
        let converted = Data::Owned(t.convert(wish), wish);
        t.release();
        converted
    }

    fn elements(&self) -> Result<(&[u8], DType), &Packed> {
        match self {
            Data::Mapped(t) => Ok((plain(t), t.dtype)),
            Data::Owned(bytes, dtype) => Ok((bytes, *dtype)),
            Data::Packed(packed) => Err(packed),
        }
    }
}

/// Some output features of a product, on one thread.
struct Product<'a, X, Y> {
    w: &'a Data,
    first: usize,
    num_out: usize,
    k: usize,
    num_rows: usize,
    x: &'a X,
    panel: Option<*const f32>,
    out: Y,
}

/// Weights that few tokens are multiplied with, as they pass.
pub trait Stream {
    /// `out(t)[o] = x(t) · w[first + o]` for `num_out` rows and T tokens: 1, 2 or 4.
    ///
    /// # Safety
    /// `V`'s instruction set is present, the rows exist, tokens have the elements of a row, outputs room for `num_out`.
    unsafe fn few<V: F32x16, const T: usize>(
        &self,
        first: usize,
        num_out: usize,
        x: [*const f32; T],
        out: [*mut f32; T],
    );
}

impl<X: Fn(usize) -> *const f32, Y: Fn(usize) -> *mut f32> Kernel for Product<'_, X, Y> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<V: F32x16>(self) {
        let (bytes, dtype) = match self.w.elements() {
            Ok(elements) => elements,
            Err(packed) => {
                assert!(self.first + self.num_out <= packed.num_out());
                // SAFETY: the caller's.
                return unsafe { self.product::<V>(packed) };
            }
        };
        let num_rows = bytes.len() / (self.k * dtype.size()).max(1);
        assert!(self.first + self.num_out <= num_rows);
        let (w, k) = (bytes.as_ptr(), self.k);
        // SAFETY: the bytes are `num_rows` rows of k elements; tokens and outputs are the caller's.
        unsafe {
            match dtype {
                DType::F32 => self.product::<V>(&Rows { w: w.cast::<f32>(), num_rows, k }),
                DType::BF16 => self.product::<V>(&Rows { w: w.cast::<Bf16>(), num_rows, k }),
                _ => self.product::<V>(&Rows { w: w.cast::<F16>(), num_rows, k }),
            }
        }
    }
}

impl<X: Fn(usize) -> *const f32, Y: Fn(usize) -> *mut f32> Product<'_, X, Y> {
    #[inline(always)]
    unsafe fn product<V: F32x16>(&self, w: &(impl Strips + Stream)) {
        let Self { first, num_out, k, num_rows, ref out, .. } = *self;
        // SAFETY: the caller's.
        unsafe {
            match (self.panel, V::TILE) {
                (Some(x), (12, _)) => gemm::product::<V, 12, 4>(w, first, num_out, k, num_rows, x, out),
                (Some(x), (3, _)) => gemm::product::<V, 3, 1>(w, first, num_out, k, num_rows, x, out),
                (Some(x), _) => gemm::product::<V, 2, 2>(w, first, num_out, k, num_rows, x, out),
                (None, _) => {
                    let mut t = 0;
                    while t + 4 <= num_rows {
                        self.few::<V, 4>(w, t);
                        t += 4;
                    }
                    while t + 2 <= num_rows {
                        self.few::<V, 2>(w, t);
                        t += 2;
                    }
                    if t < num_rows {
                        self.few::<V, 1>(w, t);
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn few<V: F32x16, const T: usize>(&self, w: &impl Stream, t: usize) {
        let (mut x, mut out) = ([std::ptr::null(); T], [std::ptr::null_mut(); T]);
        for i in 0..T {
            x[i] = (self.x)(t + i);
            out[i] = (self.out)(t + i);
        }
        // SAFETY: the caller's.
        unsafe { w.few::<V, T>(self.first, self.num_out, x, out) }
    }
}

impl<E: Element> Stream for Rows<E> {
    /// The weights pass as one plain stream, row after row: four rows side by side, with or without prefetch, reached
    /// half of the memory's speed (AMD EPYC, 2026-11).
    #[inline(always)]
    unsafe fn few<V: F32x16, const T: usize>(
        &self,
        first: usize,
        num_out: usize,
        x: [*const f32; T],
        out: [*mut f32; T],
    ) {
        const R: usize = 4;
        // SAFETY: the caller's.
        unsafe {
            for o in (0..num_out).step_by(R) {
                let rows = R.min(num_out - o);
                let mut acc = [[V::splat(0.0); R]; T];
                for r in 0..rows {
                    let w = self.w.add((first + o + r) * self.k);
                    let row = tile::<V, E, 1, T>([w], x, self.k);
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

fn widen_row(bytes: &[u8], dtype: DType, out: &mut [f32]) {
    assert!(bytes.len() == out.len() * dtype.size());
    dispatch(WidenRow { w: bytes.as_ptr(), dtype, out: out.as_mut_ptr(), n: out.len() });
}

/// The elements of a tensor that is not encoded: no other is held as it is.
fn plain(t: &Tensor) -> &[u8] {
    t.bytes().unwrap_or_default()
}

#[cfg(test)]
pub(crate) mod tests;
