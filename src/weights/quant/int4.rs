//! 4-bit integers with a scale and a zero point per group of inputs of a row: what GPTQ, AWQ and compressed-tensors
//! (`pack-quantized`) store, each in its own order. Eight codes to an I32:
//!
//! ```text
//!             codes               zero points          scales               order in a word, lowest bits first
//! gptq        [in / 8, out]       [groups, out / 8]    [groups, out]        inputs 0 to 7; zero points: outputs 0 to 7
//! awq         [in, out / 8]       [groups, out / 8]    [groups, out]        outputs 0 2 4 6 1 3 5 7
//! packed      [out, in / 8]       [out / 8, groups]    [out, groups]        inputs 0 to 7; zero points: outputs 0 to 7
//! ```
//!
//! GPTQ's first version stores zero points minus one. Packed codes and zero points are stored plus eight, which the
//! difference of the two does not show; without zero points codes are around 8.

use std::borrow::Cow;
use std::ops::Range;

use super::find::{FLOATS, Module, Problem};
use crate::config::Int4Rule;
use crate::weights::elements::float_at;
use crate::weights::{DType, Tensor};

/// Codes in a word.
const WORD: usize = 8;
/// The zero point of a symmetric matrix.
const MIDDLE: u8 = 8;

/// A matrix `[out, in]` of 4-bit integers. An element is `(code - zero) * scale`, in f32: the difference is exact.
#[derive(Debug, Clone)]
pub struct Int4 {
    /// I32, in the order of `layout`; [`Int4::read_codes`] gives them in that of the matrix.
    pub codes: Tensor,
    /// BF16, F16 or F32.
    pub scales: Tensor,
    /// I32; absent where every zero point is 8.
    pub zeros: Option<Tensor>,
    /// Where what lies.
    pub layout: Layout,
    /// Inputs that share a scale; the last group of a row may be shorter.
    pub group: usize,
    /// `out`
    pub num_rows: usize,
    /// `in`
    pub num_cols: usize,
}

/// Who wrote the words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// GPTQ; with whether zero points are stored minus one.
    Gptq {
        /// As its first version does.
        minus_one: bool,
    },
    /// AWQ for GEMM kernels.
    Awq,
    /// `pack-quantized`.
    Packed,
}

impl Int4 {
    pub(super) fn new(
        module: &mut Module<'_>,
        [num_rows, num_cols]: [usize; 2],
        layout: Layout,
        rule: &Int4Rule,
    ) -> Result<Self, Problem> {
        let (rows_in_words, codes, scales, zeros) = match layout {
            Layout::Gptq { .. } => (true, "qweight", "scales", "qzeros"),
            Layout::Awq => (true, "qweight", "scales", "qzeros"),
            Layout::Packed => (false, "weight_packed", "weight_scale", "weight_zero_point"),
        };
        // What would be padded, no program writes.
        if rows_in_words && (num_rows % WORD != 0 || num_cols % WORD != 0) {
            let expected = format!("sizes that are multiples of {WORD}");
            return Err(module.problem(codes, format!("a matrix of {num_rows} x {num_cols}"), expected));
        }
        let codes_shape = match layout {
            Layout::Gptq { .. } => vec![num_cols / WORD, num_rows],
            Layout::Awq => vec![num_cols, num_rows / WORD],
            Layout::Packed => vec![num_rows, num_cols.div_ceil(WORD)],
        };
        let codes = module.part(codes, &[DType::I32], &[codes_shape])?;
        let sizes: Vec<usize> = rule.groups.iter().map(|g| g.map_or(num_cols, |g| g.min(num_cols))).collect();
        let by_group = |size: usize| match layout {
            Layout::Packed => vec![num_rows, num_cols.div_ceil(size.max(1))],
            _ => vec![num_cols.div_ceil(size.max(1)), num_rows],
        };
        let shapes: Vec<_> = sizes.iter().map(|&size| by_group(size)).collect();
        let scales = module.part(scales, &FLOATS, &shapes)?;
        let mut fitting = sizes.iter().copied().filter(|&size| by_group(size) == scales.shape);
        // `part` found its shape among them.
        let group = fitting.next().unwrap_or(num_cols);
        if let Some(other) = fitting.find(|&size| size != group) {
            let found = format!("shape {:?}, which groups of {group} and of {other} have", scales.shape);
            return Err(Problem { name: scales.name, found, expected: "a shape of one group size".into() });
        }
        let num_groups = num_cols.div_ceil(group.max(1));
        let zeros_shape = match layout {
            Layout::Packed => vec![num_rows.div_ceil(WORD), num_groups],
            _ => vec![num_groups, num_rows / WORD],
        };
        let zeros = match rule.needs_zeros || module.has(zeros) {
            true => Some(module.part(zeros, &[DType::I32], &[zeros_shape])?),
            false => None,
        };
        let int4 = Int4 { codes, scales, zeros, layout, group, num_rows, num_cols };
        match layout {
            Layout::Gptq { .. } => int4.check_order(module)?,
            Layout::Awq => {}
            Layout::Packed => int4.check_shape(module)?,
        }
        Ok(int4)
    }

    /// Sees that the groups are those of the inputs in order.
    fn check_order(&self, module: &mut Module<'_>) -> Result<(), Problem> {
        if !module.has("g_idx") {
            return Ok(());
        }
        let order = module.part("g_idx", &[DType::I32], &[vec![self.num_cols]])?;
        let words = order.bytes().unwrap_or_default().as_chunks().0;
        let wrong =
            |&(i, &word): &(usize, &[u8; 4])| i32::from_le_bytes(word) as i64 != (i / self.group) as i64;
        if let Some((i, &word)) = words.iter().enumerate().find(wrong) {
            let found = format!("group {} for input {i}", i32::from_le_bytes(word));
            let expected = format!("group {}: inputs in order, {} to a group", i / self.group, self.group);
            return Err(module.problem("g_idx", found, expected));
        }
        order.release();
        Ok(())
    }

    /// Sees that the shape in the file is the shape of the matrix.
    fn check_shape(&self, module: &mut Module<'_>) -> Result<(), Problem> {
        let shape = module.part("weight_shape", &[DType::I64, DType::I32], &[vec![2]])?;
        let bytes = shape.bytes().unwrap_or_default();
        let found: Vec<i64> = match shape.dtype {
            DType::I64 => bytes.as_chunks().0.iter().map(|&x| i64::from_le_bytes(x)).collect(),
            _ => bytes.as_chunks().0.iter().map(|&x| i32::from_le_bytes(x).into()).collect(),
        };
        let expected = [self.num_rows as i64, self.num_cols as i64];
        if found != expected {
            return Err(module.problem("weight_shape", format!("{found:?}"), format!("{expected:?}")));
        }
        Ok(())
    }

    pub(super) fn format(&self) -> String {
        let by = match self.layout {
            Layout::Gptq { .. } => "gptq",
            Layout::Awq => "awq",
            Layout::Packed => "compressed-tensors",
        };
        if self.group >= self.num_cols {
            format!("int4 ({by}), a scale per row")
        } else {
            format!("int4 ({by}), groups of {}", self.group)
        }
    }

    /// Whether every zero point is 8.
    pub fn is_symmetric(&self) -> bool {
        let stored = if self.layout == (Layout::Gptq { minus_one: true }) { MIDDLE - 1 } else { MIDDLE };
        let zeros = self.zeros.as_ref().and_then(Tensor::bytes).unwrap_or_default();
        zeros.iter().all(|&two| two == stored * 0x11)
    }

    /// Groups of a row.
    pub fn num_groups(&self) -> usize {
        self.num_cols.div_ceil(self.group.max(1))
    }

    /// Writes the codes of `rows`, 0 to 15 each: `[rows, in]`.
    pub fn read_codes(&self, rows: Range<usize>, out: &mut [u8]) {
        let (words, k) = (words(&self.codes), self.num_cols);
        if rows.is_empty() || k == 0 {
            return;
        }
        match self.layout {
            Layout::Gptq { .. } => {
                for (i, words) in words.chunks_exact(self.num_rows).enumerate() {
                    for (row, &word) in words[rows.clone()].iter().enumerate() {
                        let at = row * k + i * WORD;
                        unpack(word, &mut out[at..at + WORD]);
                    }
                }
            }
            Layout::Awq => {
                for (i, words) in words.chunks_exact(self.num_rows / WORD).enumerate() {
                    for (row, r) in rows.clone().enumerate() {
                        out[row * k + i] = nibble(words[r / WORD], AWQ_PLACES[r % WORD]);
                    }
                }
            }
            Layout::Packed => {
                let len = k.div_ceil(WORD);
                let rows = words[rows.start * len..rows.end * len].chunks_exact(len);
                for (words, out) in rows.zip(out.chunks_exact_mut(k)) {
                    words.iter().zip(out.chunks_mut(WORD)).for_each(|(&word, out)| unpack(word, out));
                }
            }
        }
    }

    /// Writes the scales of `rows`: `[rows, groups]`.
    pub fn read_scales(&self, rows: Range<usize>, out: &mut [f32]) {
        let (bytes, dtype, groups) =
            (self.scales.bytes().unwrap_or_default(), self.scales.dtype, self.num_groups());
        for (row, out) in rows.zip(out.chunks_exact_mut(groups.max(1))) {
            for (group, out) in out.iter_mut().enumerate() {
                let index = match self.layout {
                    Layout::Packed => row * groups + group,
                    _ => group * self.num_rows + row,
                };
                *out = float_at(bytes, dtype, index);
            }
        }
    }

    /// The bytes of all scales, of their own dtype: `[out, groups]`.
    pub fn scales_by_row(&self) -> Cow<'_, [u8]> {
        let (bytes, groups) = (self.scales.bytes().unwrap_or_default(), self.num_groups());
        if self.layout == Layout::Packed {
            return Cow::Borrowed(bytes);
        }
        let size = self.scales.dtype.bits() / 8;
        let mut out = Vec::with_capacity(bytes.len());
        for row in 0..self.num_rows {
            for group in 0..groups {
                out.extend_from_slice(&bytes[(group * self.num_rows + row) * size..][..size]);
            }
        }
        Cow::Owned(out)
    }

    /// Writes the zero points of `rows`, 0 to 15 each: `[rows, groups]`.
    pub fn read_zeros(&self, rows: Range<usize>, out: &mut [u8]) {
        let Some(zeros) = &self.zeros else { return out.fill(MIDDLE) };
        let (words, groups) = (words(zeros), self.num_groups());
        for (row, out) in rows.zip(out.chunks_exact_mut(groups.max(1))) {
            for (group, out) in out.iter_mut().enumerate() {
                let (word, place) = match self.layout {
                    Layout::Packed => (row / WORD * groups + group, row % WORD),
                    Layout::Gptq { .. } => (group * (self.num_rows / WORD) + row / WORD, row % WORD),
                    Layout::Awq => (group * (self.num_rows / WORD) + row / WORD, AWQ_PLACES[row % WORD]),
                };
                let zero = nibble(words[word], place);
                // In four bits: a zero point of 0 is stored as 15.
                let minus_one = self.layout == Layout::Gptq { minus_one: true };
                *out = if minus_one { (zero + 1) % 16 } else { zero };
            }
        }
    }

    pub(super) fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let (groups, k) = (self.num_groups(), self.num_cols);
        if rows.is_empty() || k == 0 {
            return;
        }
        let mut codes = vec![0; rows.len() * k];
        let (mut scales, mut zeros) = (vec![0.0; rows.len() * groups], vec![0; rows.len() * groups]);
        self.read_codes(rows.clone(), &mut codes);
        self.read_scales(rows.clone(), &mut scales);
        self.read_zeros(rows, &mut zeros);
        let by_row = scales.chunks_exact(groups).zip(zeros.chunks_exact(groups));
        for ((codes, out), (scales, zeros)) in codes.chunks_exact(k).zip(out.chunks_exact_mut(k)).zip(by_row)
        {
            let by_group = codes.chunks(self.group).zip(out.chunks_mut(self.group));
            for ((codes, out), (scale, &zero)) in by_group.zip(scales.iter().zip(zeros)) {
                for (&code, out) in codes.iter().zip(out) {
                    *out = f32::from(code as i8 - zero as i8) * scale;
                }
            }
        }
    }
}

/// Where in its word AWQ has each of eight outputs.
const AWQ_PLACES: [usize; WORD] = [0, 4, 1, 5, 2, 6, 3, 7];

fn words(tensor: &Tensor) -> &[[u8; 4]] {
    tensor.bytes().unwrap_or_default().as_chunks().0
}

fn nibble(word: [u8; 4], place: usize) -> u8 {
    (word[place / 2] >> (4 * (place % 2))) & 15
}

fn unpack(word: [u8; 4], out: &mut [u8]) {
    for (place, out) in out.iter_mut().enumerate() {
        *out = nibble(word, place);
    }
}
