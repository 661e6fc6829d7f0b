//! Parts of encoded matrices: codes, scales and zero points to the bit. What shares a scale becomes smaller where a cut goes
//! through it, and parts of it have the same scale. Zeros behind a matrix are codes of zero, with scales of zero.

use std::ops::Range;

use super::cut::{Axis, Grid};
use crate::weights::Tensor;
use crate::weights::quant::{Encoded, Fp8, Gguf, HeadOrder, Int4, Layout, Moved, Nvfp4};

/// 4-bit integers in a word, and inputs that share a scale of NVFP4.
const WORD: usize = 8;
const NVFP4_GROUP: usize = 16;
/// Two codes of 8, which stand for zero.
const EIGHTS: u8 = 0x88;

/// Some rows and columns, in the same form; `None` where its codes or scales cannot be cut so.
pub(super) fn cut(encoded: &Encoded, rows: &Axis, cols: &Axis) -> Option<Encoded> {
    match encoded {
        Encoded::Fp8(fp8) => cut_fp8(fp8, rows, cols).map(Encoded::Fp8),
        Encoded::Int4(int4) => cut_int4(int4, rows, cols).map(Encoded::Int4),
        Encoded::Nvfp4(nvfp4) => cut_nvfp4(nvfp4, rows, cols).map(Encoded::Nvfp4),
        Encoded::Gguf(gguf) => cut_gguf(gguf, rows, cols).map(Encoded::Gguf),
    }
}

/// The same lines and columns of a tensor, as a matrix.
fn part(tensor: &Tensor, unit: usize, width: usize, lines: &Axis, cols: &Axis, fill: u8) -> Tensor {
    Grid { tensor, unit, width }.cut(lines, cols, vec![lines.len(), cols.len()], fill)
}

fn cut_fp8(from: &Fp8, rows: &Axis, cols: &Axis) -> Option<Fp8> {
    let [block_rows, block_cols] = from.block;
    let grid_rows = from.num_rows.div_ceil(block_rows.max(1));
    // Blocks are counted from the first row of each matrix.
    let (num_rows, block_rows, lines) = match rows.as_run().filter(|_| rows.is_pieces(from.num_rows)) {
        Some(run) => {
            let matrices = run.start / from.num_rows..run.end / from.num_rows;
            let lines = Axis::run(matrices.start * grid_rows..matrices.end * grid_rows);
            (from.num_rows, block_rows, lines)
        }
        None => {
            let mut matrices = rows.sources().map(|row| row / from.num_rows);
            let matrix = matrices.next().unwrap_or(0);
            if matrices.any(|other| other != matrix) {
                return None;
            }
            let (block_rows, lines) = rows.mapped(|row| row - matrix * from.num_rows).blocks(block_rows);
            (rows.len(), block_rows, lines.mapped(|line| matrix * grid_rows + line))
        }
    };
    let (block_cols, scale_cols) = cols.blocks(block_cols);
    let codes = part(&from.codes, 1, from.num_cols, rows, cols, 0);
    let (size, width) = (from.scales.dtype.size(), from.num_cols.div_ceil(from.block[1].max(1)));
    let scales = part(&from.scales, size, width, &lines, &scale_cols, 0);
    Some(Fp8 { codes, scales, block: [block_rows, block_cols], num_rows, num_cols: cols.len() })
}

fn cut_int4(from: &Int4, rows: &Axis, cols: &Axis) -> Option<Int4> {
    let (group, groups) = cols.blocks(from.group);
    let (row_words, col_words) = (rows.words(WORD, from.num_rows), cols.words(WORD, from.num_cols));
    let (num_groups, size) = (from.num_groups(), from.scales.dtype.size());
    let codes = match from.layout {
        Layout::Packed => part(&from.codes, 4, from.num_cols.div_ceil(WORD), rows, &col_words?, EIGHTS),
        Layout::Gptq { .. } => part(&from.codes, 4, from.num_rows, &col_words?, rows, EIGHTS),
        Layout::Awq => part(&from.codes, 4, from.num_rows / WORD, cols, row_words.as_ref()?, EIGHTS),
    };
    let scales = match from.layout {
        Layout::Packed => part(&from.scales, size, num_groups, rows, &groups, 0),
        _ => part(&from.scales, size, from.num_rows, &groups, rows, 0),
    };
    let zeros = match &from.zeros {
        None => None,
        Some(zeros) => Some(match from.layout {
            Layout::Packed => part(zeros, 4, num_groups, row_words.as_ref()?, &groups, EIGHTS),
            layout => {
                let minus_one = layout == (Layout::Gptq { minus_one: true });
                let eights = if minus_one { EIGHTS - 0x11 } else { EIGHTS };
                part(zeros, 4, from.num_rows / WORD, &groups, row_words.as_ref()?, eights)
            }
        }),
    };
    let (num_rows, num_cols) = (rows.len(), cols.len());
    Some(Int4 { codes, scales, zeros, layout: from.layout, group, num_rows, num_cols })
}

fn cut_nvfp4(from: &Nvfp4, rows: &Axis, cols: &Axis) -> Option<Nvfp4> {
    let groups = cols.words(NVFP4_GROUP, from.num_cols)?;
    let pairs = cols.words(2, from.num_cols)?;
    let codes = part(&from.codes, 1, from.num_cols / 2, rows, &pairs, 0);
    let scales = part(&from.scales, 1, from.num_cols / NVFP4_GROUP, rows, &groups, 0);
    Some(Nvfp4 { codes, scales, num_cols: cols.len(), ..from.clone() })
}

fn cut_gguf(from: &Gguf, rows: &Axis, cols: &Axis) -> Option<Gguf> {
    // No block of every kind is zero.
    if rows.has_zeros() || cols.has_zeros() {
        return None;
    }
    let (lines, moved) = match from.moved {
        // In the order of the model from here on.
        Some(Moved::Rows(order)) => (rows.mapped(|row| order.source(row)), None),
        moved => (rows.clone(), moved),
    };
    let (cols, moved) = match moved {
        Some(Moved::Cols(order)) if !cols.is_whole(from.num_cols) => {
            let (runs, order) = heads_of(order, cols.as_run()?)?;
            (Axis::of(&runs), Some(Moved::Cols(order)))
        }
        moved => (cols.clone(), moved),
    };
    let (len, bytes) = (from.kind.block_len(), from.kind.block_bytes());
    let blocks = cols.words(len, from.num_cols)?;
    let codes = part(&from.codes, bytes, from.num_cols / len, &lines, &blocks, 0);
    let codes = Tensor { shape: vec![lines.len(), blocks.len() * bytes], ..codes };
    Some(Gguf { codes, kind: from.kind, num_cols: cols.len(), moved })
}

/// Where a file has the value heads of some key heads, and the order that they then are in; `None` where a run of the
/// model's columns is not all of some key heads.
fn heads_of(order: HeadOrder, run: Range<usize>) -> Option<(Vec<Range<usize>>, HeadOrder)> {
    let HeadOrder { start, num_k_heads, per_k_head, head_dim } = order;
    let unit = per_k_head * head_dim;
    if start > 0 || !Axis::run(run.clone()).is_pieces(unit) {
        return None;
    }
    let heads = run.start / unit..run.end / unit;
    let column = |i: usize, head: usize| (i * num_k_heads + head) * head_dim;
    let runs = (0..per_k_head).map(|i| column(i, heads.start)..column(i, heads.end)).collect();
    Some((runs, HeadOrder { num_k_heads: heads.len(), ..order }))
}
