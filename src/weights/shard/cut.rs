//! A part of a tensor: some of its rows and columns, one run after the other, and zeros behind them. What is one run of
//! whole rows in a mapped file stays there; everything else is copied, by all threads. Codes and scales of encoded
//! matrices are cut so as well, as bytes (`codes.rs`).

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::codes;
use crate::config::gcd;
use crate::gguf::TensorType;
use crate::weights::quant::{Encoded, Scheme};
use crate::weights::{DType, Data, Tensor};

/// Bytes that one thread copies at least.
const MIN_BYTES: usize = 1 << 18;

/// Places along a dimension.
///
/// ```text
/// [0, real)      the places of the whole that are in `runs`, in that order
/// [real, len)    zeros
/// ```
#[derive(Debug, Clone, PartialEq)]
pub(in crate::weights) struct Axis {
    runs: Vec<Range<usize>>,
    len: usize,
}

impl Axis {
    /// These runs.
    pub fn of(runs: &[Range<usize>]) -> Self {
        let runs: Vec<_> = runs.iter().filter(|run| !run.is_empty()).cloned().collect();
        let len = runs.iter().map(ExactSizeIterator::len).sum();
        Axis { runs, len }
    }

    /// One run.
    pub fn run(run: Range<usize>) -> Self {
        Self::of(&[run])
    }

    /// One run, and zeros up to `len`.
    pub fn padded(run: Range<usize>, len: usize) -> Self {
        let axis = Self::run(run);
        Axis { len: len.max(axis.len), ..axis }
    }

    /// Places, zeros among them.
    pub fn len(&self) -> usize {
        self.len
    }

    fn num_real(&self) -> usize {
        self.runs.iter().map(ExactSizeIterator::len).sum()
    }

    /// Whether zeros are behind the runs.
    pub fn has_zeros(&self) -> bool {
        self.num_real() < self.len
    }

    /// The run, where it is one and no zeros.
    pub fn as_run(&self) -> Option<Range<usize>> {
        match &self.runs[..] {
            [run] if !self.has_zeros() => Some(run.clone()),
            _ => None,
        }
    }

    /// Whether it is a dimension of `size` as it was.
    pub fn is_whole(&self, size: usize) -> bool {
        self.as_run() == Some(0..size) || self.len == 0 && size == 0
    }

    /// Whether every place is one of a whole dimension.
    fn is_in(&self, whole: &Axis) -> bool {
        self.runs.iter().all(|run| run.end <= whole.len)
    }

    /// Whether it is one run of whole pieces of `size`.
    pub fn is_pieces(&self, size: usize) -> bool {
        let whole = |run: &Range<usize>| run.start.is_multiple_of(size) && run.len().is_multiple_of(size);
        self.as_run().is_some_and(|run| whole(&run))
    }

    /// The places of the whole, in order.
    pub fn sources(&self) -> impl Iterator<Item = usize> {
        self.runs.iter().cloned().flatten()
    }

    /// The same of places that are elsewhere: neighbours become one run.
    pub fn mapped(&self, source: impl Fn(usize) -> usize) -> Self {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for place in self.sources().map(source) {
            match runs.last_mut() {
                Some(last) if last.end == place => last.end += 1,
                _ => runs.push(place..place + 1),
            }
        }
        Axis { runs, len: self.len }
    }

    /// The same counted in words of `size` places of a dimension of `total`, whose last word may be shorter; `None` where
    /// a word is cut.
    pub fn words(&self, size: usize, total: usize) -> Option<Self> {
        let last = self.runs.last().filter(|_| !self.has_zeros());
        let is_end = |run: &Range<usize>| Some(run) == last && run.end == total;
        let fits = |run: &Range<usize>| {
            run.start.is_multiple_of(size) && (run.end.is_multiple_of(size) || is_end(run))
        };
        let whole = self.runs.iter().all(fits) && (self.len.is_multiple_of(size) || !self.has_zeros());
        let word = |run: &Range<usize>| run.start / size..run.end.div_ceil(size);
        whole.then(|| Axis { runs: self.runs.iter().map(word).collect(), len: self.len.div_ceil(size) })
    }

    /// Of a dimension whose blocks of `size` share something: how many places of this one share it, and where it is. Blocks
    /// that are cut become smaller ones, several of which have the same; zeros are in blocks of their own.
    pub fn blocks(&self, size: usize) -> (usize, Self) {
        let size = size.max(1);
        let last = self.runs.len().saturating_sub(1);
        let mut common = size;
        for (i, run) in self.runs.iter().enumerate() {
            common = gcd(common, run.start);
            if i < last || self.has_zeros() {
                common = gcd(common, run.len());
            }
        }
        let unit = match self.as_run() {
            Some(run) if common < size && run.start / size == (run.end - 1) / size => run.len(),
            // No more than there are.
            _ => common.min(self.len.max(1)),
        };
        let starts = self.runs.iter().flat_map(|run| run.clone().step_by(unit));
        let runs: Vec<_> = starts.map(|at| at / size..at / size + 1).collect();
        let len = self.len.div_ceil(unit);
        let merged = Axis { len: runs.len(), runs }.mapped(|block| block);
        (unit, Axis { len, ..merged })
    }
}

/// Lines of columns of `unit` bytes, `width` to a line: as a tensor that holds them is cut.
pub(super) struct Grid<'a> {
    pub tensor: &'a Tensor,
    pub unit: usize,
    pub width: usize,
}

impl Grid<'_> {
    /// Some lines and columns, of this shape; bytes of zeros are `fill`.
    pub fn cut(&self, lines: &Axis, cols: &Axis, shape: Vec<usize>, fill: u8) -> Tensor {
        let Grid { tensor, unit, width } = *self;
        let line = width * unit;
        let data = match (&tensor.data, lines.as_run()) {
            (Data::Mapped(map, range), Some(run)) if cols.is_whole(width) => {
                Data::Mapped(Arc::clone(map), range.start + run.start * line..range.start + run.end * line)
            }
            (Data::Owned(bytes), Some(run)) if cols.is_whole(width) && run.len() * line == bytes.len() => {
                Data::Owned(Arc::clone(bytes))
            }
            _ => {
                let bytes = tensor.bytes().unwrap_or_default();
                let sources: Vec<usize> = lines.sources().collect();
                Data::Owned(by_lines(lines.len(), cols.len() * unit, fill, &sources, |source, out| {
                    let from = &bytes[source * line..(source + 1) * line];
                    copy_runs(from, cols, unit, out);
                }))
            }
        };
        Tensor { name: tensor.name.clone(), dtype: tensor.dtype, shape, data }
    }
}

/// `num_lines` lines of `line` bytes: of each source `write` makes one, the others are `fill`.
fn by_lines(
    num_lines: usize,
    line: usize,
    fill: u8,
    sources: &[usize],
    write: impl Fn(usize, &mut [u8]) + Sync,
) -> Arc<[u8]> {
    let mut bytes: Arc<[u8]> = std::iter::repeat_n(fill, num_lines * line).collect();
    // Nobody else has it yet.
    if let (Some(bytes), 1..) = (Arc::get_mut(&mut bytes), line) {
        let lines = bytes.par_chunks_exact_mut(line).zip(sources);
        lines.with_min_len((MIN_BYTES / line).max(1)).for_each(|(out, &source)| write(source, out));
    }
    bytes
}

/// The columns of a line.
fn copy_runs(from: &[u8], cols: &Axis, unit: usize, out: &mut [u8]) {
    let mut at = 0;
    for run in &cols.runs {
        let len = run.len() * unit;
        out[at..at + len].copy_from_slice(&from[run.start * unit..run.end * unit]);
        at += len;
    }
}

impl Tensor {
    /// Rows `rows`, one range after the other, of `[num_rows, num_cols]`; of a vector, elements. In the mapped file where
    /// they are one range there, else copied. Codes stay codes, with their scales, but where no scale grid or word of
    /// theirs can be cut so: those become f32, exactly.
    ///
    /// # Panics
    /// If the rows do not exist.
    pub fn row_slices(&self, rows: &[Range<usize>]) -> Tensor {
        self.cut(&Axis::of(rows), &self.all_cols())
    }

    /// [`Tensor::row_slices`] of one range.
    pub fn row_slice(&self, rows: Range<usize>) -> Tensor {
        self.cut(&Axis::run(rows), &self.all_cols())
    }

    /// Columns `cols` of every row, copied. Otherwise as [`Tensor::row_slices`].
    ///
    /// # Panics
    /// If the columns do not exist.
    pub fn column_slice(&self, cols: Range<usize>) -> Tensor {
        self.cut(&self.all_rows(), &Axis::run(cols))
    }

    /// Every row of [`Tensor::cut`].
    pub(super) fn all_rows(&self) -> Axis {
        Axis::run(0..if self.shape.len() == 1 { self.shape[0] } else { self.num_rows() })
    }

    /// Every column of [`Tensor::cut`].
    pub(super) fn all_cols(&self) -> Axis {
        Axis::run(0..self.cut_width())
    }

    /// Columns as [`Tensor::cut`] counts them: a vector has rows of one.
    fn cut_width(&self) -> usize {
        if self.shape.len() == 1 { 1 } else { self.num_cols() }
    }

    /// Some rows and columns of `[num_rows, num_cols]`, and zeros: `[rows, columns]`, or `[rows]` of a vector.
    ///
    /// # Panics
    /// If they do not exist.
    pub(in crate::weights) fn cut(&self, rows: &Axis, cols: &Axis) -> Tensor {
        let shape = [rows.len(), cols.len()];
        self.cut_to(rows, cols, shape[..self.shape.len().min(2)].to_vec())
    }

    /// The same, of a shape with as many elements.
    pub(in crate::weights) fn cut_to(&self, rows: &Axis, cols: &Axis, shape: Vec<usize>) -> Tensor {
        assert!(rows.is_in(&self.all_rows()) && cols.is_in(&self.all_cols()), "a part of {}", self.name);
        let width = self.cut_width();
        let tensor = |dtype, data| Tensor { name: self.name.clone(), dtype, shape: shape.clone(), data };
        let is_whole = *rows == self.all_rows() && *cols == self.all_cols();
        match &self.data {
            data if is_whole => tensor(self.dtype, data.clone()),
            Data::Mapped(..) | Data::Owned(_) => {
                let grid = Grid { tensor: self, unit: self.dtype.size(), width };
                grid.cut(rows, cols, shape, 0)
            }
            Data::Random(random) => {
                let places = rows.runs.iter().chain(&cols.runs).flat_map(|run| [run.start, run.end]);
                tensor(self.dtype, Data::Random(Arc::new(random.part(places, shape.iter().product()))))
            }
            Data::Requantised(requantised) => {
                let scheme = match requantised.scheme() {
                    Scheme::Fp8 { matrix_rows } if !rows.is_pieces(matrix_rows) => {
                        Scheme::Fp8 { matrix_rows: rows.len() }
                    }
                    scheme => scheme,
                };
                requantised.source().cut_to(rows, cols, shape).requantised(scheme)
            }
            Data::Encoded(encoded) => match codes::cut(encoded, rows, cols) {
                // In the order of the model they are floats like any other.
                Some(Encoded::Gguf(gguf)) if gguf.moved.is_none() && !gguf.kind.is_quantised() => {
                    tensor(float_type(gguf.kind), gguf.codes.data)
                }
                Some(encoded) => tensor(DType::F32, Data::Encoded(Arc::new(encoded))),
                None => {
                    let (dtype, bytes) = self.decoded(encoded, rows, cols);
                    tensor(dtype, Data::Owned(bytes))
                }
            },
        }
    }

    /// The elements as floats that hold them exactly.
    fn decoded(&self, encoded: &Encoded, rows: &Axis, cols: &Axis) -> (DType, Arc<[u8]>) {
        let dtype = match encoded {
            Encoded::Gguf(gguf) => float_type(gguf.kind),
            _ => DType::F32,
        };
        let (unit, sources) = (dtype.size(), rows.sources().collect::<Vec<_>>());
        let bytes = by_lines(rows.len(), cols.len() * unit, 0, &sources, |source, out| {
            let mut row = vec![0; self.num_cols() * unit];
            self.read_rows_as(source..source + 1, dtype, &mut row);
            copy_runs(&row, cols, unit, out);
        });
        (dtype, bytes)
    }
}

/// What holds the elements of a type exactly.
fn float_type(kind: TensorType) -> DType {
    match kind {
        TensorType::F16 => DType::F16,
        TensorType::BF16 => DType::BF16,
        _ => DType::F32,
    }
}
