//! Elements of tensors as numbers, whatever they are stored as. Every place that wants numbers and has no kernel for
//! the stored form comes here, so that a backend need not know formats.

use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use super::{DType, Data, Tensor};

/// Elements that one thread reads at a time.
const PIECE: usize = 1 << 16;
/// Rows that are read together at least: some layouts have rows side by side, some share scales.
const MIN_ROWS: usize = 128;

/// Element `index` of plain floats.
pub(super) fn float_at(bytes: &[u8], dtype: DType, index: usize) -> f32 {
    match dtype {
        DType::F32 => bytes.as_chunks().0.get(index).map_or(0.0, |&x| f32::from_le_bytes(x)),
        DType::F16 => bytes.as_chunks().0.get(index).map_or(0.0, |&x| f16::from_le_bytes(x).to_f32()),
        _ => bytes.as_chunks().0.get(index).map_or(0.0, |&x| bf16::from_le_bytes(x).to_f32()),
    }
}

/// Plain floats, widened.
pub(super) fn widen(bytes: &[u8], dtype: DType, out: &mut [f32]) {
    match dtype {
        DType::F32 => {
            out.iter_mut().zip(bytes.as_chunks().0).for_each(|(out, &x)| *out = f32::from_le_bytes(x));
        }
        DType::F16 => out
            .iter_mut()
            .zip(bytes.as_chunks().0)
            .for_each(|(out, &x)| *out = f16::from_le_bytes(x).to_f32()),
        _ => out
            .iter_mut()
            .zip(bytes.as_chunks().0)
            .for_each(|(out, &x)| *out = bf16::from_le_bytes(x).to_f32()),
    }
}

/// Numbers as `dtype`, rounded to nearest even.
fn narrow(wide: &[f32], dtype: DType, out: &mut [u8]) {
    match dtype {
        DType::F32 => wide
            .iter()
            .zip(out.as_chunks_mut().0)
            .for_each(|(x, out): (_, &mut [u8; 4])| *out = x.to_ne_bytes()),
        DType::F16 => {
            wide.iter()
                .zip(out.as_chunks_mut().0)
                .for_each(|(&x, out)| *out = f16::from_f32(x).to_ne_bytes());
        }
        _ => {
            wide.iter()
                .zip(out.as_chunks_mut().0)
                .for_each(|(&x, out)| *out = bf16::from_f32(x).to_ne_bytes());
        }
    }
}

impl Tensor {
    /// Elements of a row: the last dimension, 1 of a scalar.
    pub fn num_cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Rows: the product of all dimensions but the last.
    pub fn num_rows(&self) -> usize {
        if self.num_cols() == 0 { 0 } else { self.num_elements() / self.num_cols() }
    }

    /// Writes `rows` (of `[num_rows, num_cols]`) as f32 to `out`, row after row. Floats are widened; an encoded matrix
    /// is decoded exactly, as its format says, and so is one that is quantised now. Runs on this thread; whole matrices
    /// are quicker by [`Tensor::convert`].
    ///
    /// # Panics
    /// If the rows do not exist or `out` is not of their size.
    pub fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let num_cols = self.num_cols();
        assert!(rows.end <= self.num_rows() && out.len() == rows.len() * num_cols, "rows of {}", self.name);
        let plain = |bytes: &[u8], out: &mut [f32]| {
            let size = num_cols * self.dtype.size();
            widen(&bytes[rows.start * size..rows.end * size], self.dtype, out);
        };
        match &self.data {
            Data::Mapped(file, range) => plain(&file[range.clone()], out),
            Data::Random(random) => plain(random.bytes(), out),
            Data::Owned(bytes) => plain(bytes, out),
            Data::Encoded(encoded) => encoded.read_rows(rows, out),
            Data::Requantised(requantised) => requantised.read_rows(rows, out),
        }
    }

    /// The same as `dtype` (F32, BF16 or F16), rounded to nearest even: `rows.len() * num_cols * dtype.size()` bytes.
    ///
    /// # Panics
    /// As [`Tensor::read_rows`].
    pub fn read_rows_as(&self, rows: Range<usize>, dtype: DType, out: &mut [u8]) {
        let num_cols = self.num_cols();
        if let (Some(bytes), true) = (self.bytes(), dtype == self.dtype) {
            let size = num_cols * dtype.size();
            return out.copy_from_slice(&bytes[rows.start * size..rows.end * size]);
        }
        let mut wide = vec![0.0; rows.len().min(MIN_ROWS) * num_cols];
        for (i, out) in out.chunks_mut((MIN_ROWS * num_cols * dtype.size()).max(1)).enumerate() {
            let first = rows.start + i * MIN_ROWS;
            let some = first..rows.end.min(first + MIN_ROWS);
            let wide = &mut wide[..some.len() * num_cols];
            self.read_rows(some, wide);
            narrow(wide, dtype, out);
        }
    }

    /// All elements as `dtype` (F32, BF16 or F16), rounded to nearest even, by all threads.
    pub fn convert(&self, dtype: DType) -> Vec<u8> {
        let row_len = self.num_cols() * dtype.size();
        let mut bytes = vec![0; self.num_elements() * dtype.size()];
        let rows = (PIECE / self.num_cols().max(1)).next_multiple_of(MIN_ROWS).max(MIN_ROWS);
        bytes.par_chunks_mut((rows * row_len).max(1)).enumerate().for_each(|(i, out)| {
            let first = i * rows;
            self.read_rows_as(first..first + out.len() / row_len, dtype, out);
        });
        bytes
    }

    /// All elements, on this thread.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.num_elements()];
        self.read_rows(0..self.num_rows(), &mut out);
        out
    }
}
