//! Matrices that are quantised already and go to the file with the codes and scales that they have: 8-bit floats in
//! blocks as they are, 4-bit integers in the order of compressed-tensors (`pack-quantized`), whoever wrote them.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Range;

use super::matrix::{WORD, Work, pack};
use crate::weights::quant::{BLOCK, Encoded, Fp8, Int4, Quantization};
use crate::weights::write::Entry;
use crate::weights::{DType, Tensor};
use crate::{Error, Result};

/// Sees that rows of a matrix that is stored in as few bits as it would get can be kept: the file's method has their
/// form, and blocks begin where they do.
pub(super) fn check_kept(tensor: &Tensor, first: usize, quantization: Quantization) -> Result<()> {
    let can = match tensor.encoded() {
        Some(Encoded::Fp8(fp8)) => {
            !matches!(quantization, Quantization::Int4 { .. })
                && is_in_blocks(fp8)
                && (first % fp8.num_rows.max(1)).is_multiple_of(BLOCK)
        }
        // Readers take whole groups; the method fp8 has no integers.
        Some(Encoded::Int4(int4)) => {
            quantization != Quantization::Fp8 && int4.num_cols.is_multiple_of(int4.group.max(1))
        }
        _ => false,
    };
    if can {
        return Ok(());
    }
    Err(Error::Tensor {
        name: tensor.name.clone(),
        found: tensor.encoded().map_or_else(String::new, Encoded::format),
        expected: "a matrix in more bits than it is to have, or one that can be kept: for fp8 and mixed, fp8 with a scale \
                   per block of 128 x 128; for int4 and mixed, 4-bit integers of GPTQ, AWQ or compressed-tensors in whole \
                   groups"
            .into(),
    })
}

/// A matrix of one block may be read as one with one scale: the same.
fn is_in_blocks(fp8: &Fp8) -> bool {
    let sizes = [fp8.num_rows, fp8.num_cols];
    fp8.block.iter().zip(sizes).all(|(&block, size)| block == BLOCK || block >= size && size <= BLOCK)
}

/// Has all matrices of one size of groups written with zero points where any needs them: readers know one form for each
/// pattern of names.
pub(super) fn settle_zeros(work: &mut [Work]) {
    let needing = work.iter().filter_map(|work| match work {
        Work::KeptInt4 { int4, zeros: true, .. } => Some(int4.group),
        _ => None,
    });
    let needing: HashSet<usize> = needing.collect();
    for work in work {
        if let Work::KeptInt4 { int4, zeros, .. } = work {
            *zeros |= needing.contains(&int4.group);
        }
    }
}

/// The codes and scales of rows in blocks.
pub(super) fn fp8_parts(fp8: &Fp8, rows: Range<usize>) -> Vec<Cow<'_, [u8]>> {
    let mut scales = Vec::new();
    let mut of_row = vec![0.0; fp8.num_cols.div_ceil(BLOCK)];
    for row in rows.clone().step_by(BLOCK) {
        fp8.read_scales(row, &mut of_row);
        scales.extend(of_row.iter().flat_map(|x| x.to_le_bytes()));
    }
    vec![Cow::Borrowed(fp8.code_rows(rows)), scales.into()]
}

/// The tensors of a whole matrix of 4-bit integers, with or without zero points.
pub(super) fn int4_entries(int4: &Int4, module: &str, zeros: bool) -> Vec<Entry> {
    let (rows, k, groups) = (int4.num_rows, int4.num_cols, int4.num_groups());
    let entry = |part: &str, dtype, shape: &[usize]| Entry {
        name: format!("{module}.{part}"),
        dtype,
        shape: shape.to_vec(),
    };
    let mut entries = vec![
        entry("weight_packed", DType::I32, &[rows, k.div_ceil(WORD)]),
        entry("weight_scale", int4.scales.dtype, &[rows, groups]),
        entry("weight_shape", DType::I64, &[2]),
    ];
    if zeros {
        entries.push(entry("weight_zero_point", DType::I32, &[rows.div_ceil(WORD), groups]));
    }
    entries
}

/// Their elements.
pub(super) fn int4_parts(int4: &Int4, zeros: bool) -> Vec<Cow<'_, [u8]>> {
    let (rows, k) = (int4.num_rows, int4.num_cols);
    let mut codes = vec![0; rows * k];
    int4.read_codes(0..rows, &mut codes);
    let packed: Vec<u8> = codes.chunks(k.max(1)).flat_map(|row| row.chunks(WORD)).flat_map(pack).collect();
    let shape: Vec<u8> = [rows as i64, k as i64].iter().flat_map(|n| n.to_le_bytes()).collect();
    let mut parts: Vec<Cow<'_, [u8]>> = vec![packed.into(), int4.scales_by_row(), shape.into()];
    if zeros {
        parts.push(packed_zeros(int4).into());
    }
    parts
}

/// Zero points, eight rows to a word.
fn packed_zeros(int4: &Int4) -> Vec<u8> {
    let (rows, groups) = (int4.num_rows, int4.num_groups());
    let mut zeros = vec![0; rows * groups];
    int4.read_zeros(0..rows, &mut zeros);
    let mut packed = Vec::with_capacity(rows.div_ceil(WORD) * groups * 4);
    for eight in zeros.chunks((WORD * groups).max(1)) {
        for group in 0..groups {
            let column: Vec<u8> = eight.iter().skip(group).step_by(groups).copied().collect();
            packed.extend(pack(&column));
        }
    }
    packed
}
