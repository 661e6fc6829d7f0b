//! GGUF's blocks: rows of codes with their scales, as ggml's quantisations lay them out, some with heads in the order of
//! llama.cpp. Also plain floats in such an order.
//!
//! ```text
//! Q8_0   d f16, 32 x i8                                            code * d
//! Q4_0   d f16, 16 bytes: elements 0 to 15 low, 16 to 31 high      (code - 8) * d
//! Q4_K   d f16, m f16, 8 scales and minima in 12 bytes, 128 bytes  (d * scale) * code - (m * minimum), per 32
//! Q5_K   the same, with 32 bytes of fifth bits before the codes
//! Q6_K   128 bytes low, 64 bytes high, 16 scales i8, d f16         (d * scale) * (code - 32), per 16
//! ```
//!
//! Each product and difference is rounded to f32, as in the package that defines them (`gguf`, quants.py).

use std::ops::Range;

use half::f16;

use crate::gguf::TensorType;
use crate::weights::elements::widen;
use crate::weights::{DType, Tensor};

/// A matrix `[out, in]`, or several of a shape, as rows of blocks.
#[derive(Debug, Clone)]
pub struct Gguf {
    /// U8 `[rows, bytes of a row]`, in the order of the file.
    pub codes: Tensor,
    /// What a block is.
    pub kind: TensorType,
    /// `in`
    pub num_cols: usize,
    /// What the file has in another order.
    pub moved: Option<Moved>,
}

/// Value heads in another order, along the rows or along the columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moved {
    /// Whole rows: blocks stay together.
    Rows(HeadOrder),
    /// Columns of every row: a block may hold parts of several heads.
    Cols(HeadOrder),
}

/// Value heads as llama.cpp's converter deals them out. A model has those of a key head side by side; its files have the
/// first of each key head, then the second of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadOrder {
    /// Rows or columns before those of the value heads.
    pub start: usize,
    /// Key heads.
    pub num_k_heads: usize,
    /// Value heads of a key head.
    pub per_k_head: usize,
    /// Rows or columns of a value head.
    pub head_dim: usize,
}

impl HeadOrder {
    /// Where the file has what the model has at `index`.
    pub fn source(&self, index: usize) -> usize {
        let Some(after) = index.checked_sub(self.start) else { return index };
        let (head, element) = (after / self.head_dim, after % self.head_dim);
        let (k_head, i) = (head / self.per_k_head, head % self.per_k_head);
        self.start + (i * self.num_k_heads + k_head) * self.head_dim + element
    }
}

/// Columns that stay together where a device has K-quants or Q8_0.
const UNIT: usize = 128;

/// Bytes that so many elements take there: those of codes, then those of scales (`cuda/launch.h`). Codes of Q5_K have a
/// bit to spare.
pub fn kept_bytes(kind: TensorType, len: usize) -> Option<[usize; 2]> {
    match kind {
        TensorType::Q4_K => Some([len / 2, len / 16 + len / 32]),
        TensorType::Q5_K | TensorType::Q6_K => Some([len / 4 * 3, len / 16 + len / 32]),
        TensorType::Q8_0 => Some([len, len / 16]),
        _ => None,
    }
}

impl Gguf {
    pub(super) fn format(&self) -> String {
        format!("gguf {}", self.kind)
    }

    /// The blocks of a row of the matrix.
    pub fn row_codes(&self, row: usize) -> &[u8] {
        let source = match self.moved {
            Some(Moved::Rows(order)) => order.source(row),
            _ => row,
        };
        let len = self.codes.num_cols();
        &self.codes.bytes().unwrap_or_default()[source * len..(source + 1) * len]
    }

    /// Whether it is 4-bit integers with an f16 scale for 32 inputs, in the order of the file's blocks.
    pub fn is_int4(&self) -> bool {
        let whole = |order: HeadOrder| {
            let len = self.kind.block_len();
            order.start.is_multiple_of(len) && order.head_dim.is_multiple_of(len)
        };
        self.kind == TensorType::Q4_0 && !matches!(self.moved, Some(Moved::Cols(order)) if !whole(order))
    }

    /// Whether a device multiplies its blocks as they are: K-quants and Q8_0, where heads that moved along the columns are
    /// whole units.
    pub fn keeps_codes(&self) -> bool {
        let whole =
            |order: HeadOrder| order.start.is_multiple_of(UNIT) && order.head_dim.is_multiple_of(UNIT);
        let moved = matches!(self.moved, Some(Moved::Cols(order)) if !whole(order));
        kept_bytes(self.kind, 0).is_some() && self.num_cols.is_multiple_of(UNIT) && !moved
    }

    /// The blocks of a row, in the order of the matrix, of one that [`Gguf::is_int4`].
    fn int4_blocks(&self, row: usize) -> impl Iterator<Item = &[u8]> {
        let (codes, len) = (self.row_codes(row), self.kind.block_len());
        (0..self.num_cols / len).map(move |block| {
            let source = match self.moved {
                Some(Moved::Cols(order)) => order.source(block * len) / len,
                _ => block,
            };
            &codes[source * self.kind.block_bytes()..][..self.kind.block_bytes()]
        })
    }

    /// Writes the codes of a row, two to a byte, that of the lower input in the low half: `[in / 2]`.
    pub fn read_int4_codes(&self, row: usize, out: &mut [u8]) {
        for (block, out) in self.int4_blocks(row).zip(out.chunks_exact_mut(16)) {
            // In a block a byte has two that are 16 apart.
            let half = |i: usize| if i < 16 { block[2 + i] & 15 } else { block[2 + i - 16] >> 4 };
            out.iter_mut().enumerate().for_each(|(i, out)| *out = half(2 * i) | half(2 * i + 1) << 4);
        }
    }

    /// Writes the scales of a row, f16: `[in / 32]`.
    pub fn read_int4_scales(&self, row: usize, out: &mut [u8]) {
        for (block, out) in self.int4_blocks(row).zip(out.chunks_exact_mut(2)) {
            out.copy_from_slice(&block[..2]);
        }
    }

    pub(super) fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let mut decoded = vec![0.0; self.num_cols];
        for (row, out) in rows.zip(out.chunks_exact_mut(self.num_cols.max(1))) {
            let codes = self.row_codes(row);
            match self.moved {
                Some(Moved::Cols(order)) => {
                    decode(self.kind, codes, &mut decoded);
                    out.iter_mut().enumerate().for_each(|(i, out)| *out = decoded[order.source(i)]);
                }
                _ => decode(self.kind, codes, out),
            }
        }
    }
}

/// Decodes whole blocks.
fn decode(kind: TensorType, codes: &[u8], out: &mut [f32]) {
    let blocks = codes.chunks_exact(kind.block_bytes()).zip(out.chunks_exact_mut(kind.block_len()));
    match kind {
        TensorType::F32 => widen(codes, DType::F32, out),
        TensorType::F16 => widen(codes, DType::F16, out),
        TensorType::BF16 => widen(codes, DType::BF16, out),
        TensorType::Q8_0 => blocks.for_each(|(block, out)| {
            let d = half_at(block, 0);
            out.iter_mut().zip(&block[2..]).for_each(|(out, &code)| *out = f32::from(code as i8) * d);
        }),
        TensorType::Q4_0 => blocks.for_each(|(block, out)| {
            let d = half_at(block, 0);
            let (low, high) = out.split_at_mut(16);
            for ((low, high), &byte) in low.iter_mut().zip(high).zip(&block[2..]) {
                *low = d * f32::from((byte & 15) as i8 - 8);
                *high = d * f32::from((byte >> 4) as i8 - 8);
            }
        }),
        TensorType::Q4_K => blocks.for_each(|(block, out)| with_minima(block, &block[16..], None, out)),
        TensorType::Q5_K => {
            blocks.for_each(|(block, out)| with_minima(block, &block[48..], Some(&block[16..48]), out));
        }
        TensorType::Q6_K => blocks.for_each(|(block, out)| six_bits(block, out)),
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Q4_K, and Q5_K with its `fifth` bits.
fn with_minima(block: &[u8], codes: &[u8], fifth: Option<&[u8]>, out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let packed = &block[4..16];
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        // Of eight pairs in 6 bits the last four have their upper bits over the first four.
        let (scale, minimum) = match i {
            0..4 => (packed[i] & 63, packed[i + 4] & 63),
            _ => {
                let both = packed[i + 4];
                (both & 15 | packed[i - 4] >> 2 & 48, both >> 4 | packed[i] >> 2 & 48)
            }
        };
        let (d, m) = (d * f32::from(scale), m * f32::from(minimum));
        for (j, (out, &byte)) in out.iter_mut().zip(&codes[i / 2 * 32..]).enumerate() {
            let code = byte >> (4 * (i % 2)) & 15;
            let bit = fifth.map_or(0, |bits| bits[j] >> i & 1);
            *out = d * f32::from(code | bit << 4) - m;
        }
    }
}

/// Q6_K.
fn six_bits(block: &[u8], out: &mut [f32]) {
    let (low, high, scales, d) = (&block[..128], &block[128..192], &block[192..208], half_at(block, 208));
    for (i, out) in out.iter_mut().enumerate() {
        let (half, quarter, j) = (i / 128, i % 128 / 32, i % 32);
        let code = low[64 * half + 32 * (quarter % 2) + j] >> (4 * (quarter / 2)) & 15;
        let upper = high[32 * half + j] >> (2 * quarter) & 3;
        let scale = d * f32::from(scales[i / 16] as i8);
        *out = scale * f32::from((code | upper << 4) as i8 - 32);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::{Gguf, HeadOrder, Moved, TensorType, half_at, kept_bytes};
    use crate::weights::quant::{Encoded, Scheme};
    use crate::weights::{Checkpoint, DType, Data, Tensor};

    const KINDS: [TensorType; 5] =
        [TensorType::Q8_0, TensorType::Q4_0, TensorType::Q4_K, TensorType::Q5_K, TensorType::Q6_K];
    const ORDER: HeadOrder = HeadOrder { start: 0, num_k_heads: 2, per_k_head: 4, head_dim: 64 };

    #[test]
    fn blocks_are_what_their_package_says() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf/blocks.safetensors");
        let golden = Checkpoint::open(&path).unwrap();
        for kind in KINDS {
            let codes = golden.get(kind.name()).unwrap();
            let expected = golden.get(&format!("expected.{kind}")).unwrap();
            let (num_rows, num_cols) = (expected.num_rows(), expected.num_cols());
            let expected = expected.to_f32();
            let bits = |xs: &[f32]| xs.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let mut gguf = Gguf { codes, kind, num_cols, moved: None };
            let mut out = vec![0.0; expected.len()];
            gguf.read_rows(0..num_rows, &mut out);
            assert_eq!(bits(&out), bits(&expected), "{kind}");
            // Rows of some, and heads that are parts of a block.
            gguf.moved = Some(Moved::Cols(ORDER));
            let mut last = vec![0.0; num_cols];
            gguf.read_rows(num_rows - 1..num_rows, &mut last);
            let row = &expected[(num_rows - 1) * num_cols..];
            let moved: Vec<f32> = (0..num_cols).map(|i| row[ORDER.source(i)]).collect();
            assert_eq!(bits(&last), bits(&moved), "{kind}");
        }
    }

    /// What a device takes of Q4_0 is what is decoded.
    #[test]
    fn blocks_of_four_bits_are_int4() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf/blocks.safetensors");
        let golden = Checkpoint::open(&path).unwrap();
        let codes = golden.get("Q4_0").unwrap();
        let num_cols = golden.get("expected.Q4_0").unwrap().num_cols();
        let num_rows = codes.num_rows();
        let odd = HeadOrder { head_dim: 16, ..ORDER };
        let rows = HeadOrder { start: 0, num_k_heads: 2, per_k_head: num_rows / 2, head_dim: 1 };
        let mut gguf = Gguf { codes, kind: TensorType::Q4_0, num_cols, moved: Some(Moved::Cols(odd)) };
        assert!(!gguf.is_int4());
        for moved in [None, Some(Moved::Rows(rows)), Some(Moved::Cols(ORDER))] {
            gguf.moved = moved;
            assert!(gguf.is_int4());
            let mut want = vec![0.0; num_rows / 2 * 2 * num_cols];
            gguf.read_rows(0..num_rows / 2 * 2, &mut want);
            for (row, want) in want.chunks_exact(num_cols).enumerate() {
                let (mut codes, mut scales) = (vec![0; num_cols / 2], vec![0; num_cols / 16]);
                gguf.read_int4_codes(row, &mut codes);
                gguf.read_int4_scales(row, &mut scales);
                for (i, &want) in want.iter().enumerate() {
                    let code = codes[i / 2] >> (i % 2 * 4) & 15;
                    assert_eq!(half_at(&scales, i / 32 * 2) * f32::from(code as i8 - 8), want);
                }
            }
        }
        // So it stays, where others are quantised anew.
        let asked = |gguf: &Gguf| {
            let data = Data::Encoded(Arc::new(Encoded::Gguf(gguf.clone())));
            let shape = vec![num_rows, num_cols];
            let tensor = Tensor { name: "x".into(), dtype: DType::F32, shape, data };
            tensor.requantised(Scheme::Int4 { group: 32 }).scheme().is_some()
        };
        assert!(!asked(&gguf));
        gguf.kind = TensorType::Q8_0;
        assert!(!gguf.is_int4() && asked(&gguf));
    }

    #[test]
    fn blocks_that_stay() {
        let codes = Tensor {
            name: "x".into(),
            dtype: DType::U8,
            shape: vec![16, 0],
            data: Data::Owned(Vec::new().into()),
        };
        let mut gguf = Gguf { codes, kind: TensorType::Q4_K, num_cols: 1024, moved: None };
        let stays = |gguf: &Gguf, scheme: Scheme| {
            let data = Data::Encoded(Arc::new(Encoded::Gguf(gguf.clone())));
            let tensor = Tensor { name: "x".into(), dtype: DType::F32, shape: vec![16, gguf.num_cols], data };
            tensor.requantised(scheme).scheme().is_none()
        };
        let (int4, fp8) = (Scheme::Int4 { group: 128 }, Scheme::Fp8 { matrix_rows: 16 });
        // Bits an element, in hundredths.
        for (kind, bits) in [(0, 475), (1, 675), (2, 675), (3, 850)] {
            gguf.kind = [TensorType::Q4_K, TensorType::Q5_K, TensorType::Q6_K, TensorType::Q8_0][kind];
            gguf.moved = None;
            assert!(gguf.keeps_codes() && stays(&gguf, fp8));
            assert_eq!(stays(&gguf, int4), gguf.kind == TensorType::Q4_K);
            let bytes: usize = kept_bytes(gguf.kind, 3 << 20).unwrap().iter().sum();
            assert_eq!(bytes * 800, bits * (3 << 20), "{}", gguf.kind);
            gguf.moved = Some(Moved::Rows(ORDER));
            assert!(gguf.keeps_codes());
            // Heads of 128 columns are whole units, those of 64 are not.
            gguf.moved = Some(Moved::Cols(HeadOrder { head_dim: 128, ..ORDER }));
            assert!(gguf.keeps_codes());
            gguf.moved = Some(Moved::Cols(ORDER));
            assert!(!gguf.keeps_codes() && !stays(&gguf, fp8));
        }
        (gguf.moved, gguf.num_cols) = (None, 1056);
        assert!(!gguf.keeps_codes());
        gguf.kind = TensorType::Q4_0;
        assert!(kept_bytes(gguf.kind, 32).is_none() && gguf.is_int4());
    }

    #[test]
    fn heads_are_where_the_converter_put_them() {
        // As its text has it: of two key heads with three value heads each, 0 3 1 4 2 5.
        let order = HeadOrder { start: 5, num_k_heads: 2, per_k_head: 3, head_dim: 2 };
        let file: Vec<usize> =
            [0, 3, 1, 4, 2, 5].into_iter().flat_map(|head| [2 * head, 2 * head + 1]).collect();
        for i in 0..5 {
            assert_eq!(order.source(i), i);
        }
        for i in 0..12 {
            assert_eq!(file[order.source(5 + i) - 5], i);
        }
    }
}
