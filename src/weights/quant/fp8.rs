//! FP8 e4m3: `weight` and a grid of scales, `weight_scale_inv` (the name is historical: it is multiplied) or
//! `weight_scale`, for blocks of both dimensions, whole rows, or the whole matrix.

use std::ops::Range;

use super::find::{FLOATS, Module, Problem};
use crate::config::{Fp8Rule, QuantMethod};
use crate::weights::elements::float_at;
use crate::weights::{DType, Tensor};

/// A matrix of 8-bit floats `[out, in]`, or several of a shape, `[matrices, out, in]`. An element is
/// `code * scale`, in f32.
#[derive(Debug, Clone)]
pub struct Fp8 {
    /// F8_E4M3, of the matrix's own shape.
    pub codes: Tensor,
    /// BF16, F16 or F32: of each matrix `ceil(out / block[0])` rows of `ceil(in / block[1])`, whatever its shape says.
    pub scales: Tensor,
    /// `[rows, columns]` that share a scale.
    pub block: [usize; 2],
    /// `out`, of one matrix.
    pub num_rows: usize,
    /// `in`
    pub num_cols: usize,
}

impl Fp8 {
    /// `codes` of `matrices` stacked, or of one.
    pub(super) fn new(
        module: &mut Module<'_>,
        codes: Tensor,
        matrices: Option<usize>,
        [num_rows, num_cols]: [usize; 2],
        rule: &Fp8Rule,
        method: QuantMethod,
    ) -> Result<Self, Problem> {
        let names = match method {
            QuantMethod::Fp8 => ["weight_scale_inv", "weight_scale"],
            _ => ["weight_scale", "weight_scale_inv"],
        };
        let name = names.into_iter().find(|&name| module.has(name)).unwrap_or(names[0]);
        // What shares a scale, and the shapes that the scales then may have.
        let stacked = |shape: &[usize]| matrices.into_iter().chain(shape.iter().copied()).collect::<Vec<_>>();
        let mut layouts = vec![
            ([num_rows, num_cols], vec![stacked(&[]), stacked(&[1]), stacked(&[1, 1])]),
            ([1, num_cols], vec![stacked(&[num_rows]), stacked(&[num_rows, 1])]),
        ];
        for &block in &rule.blocks {
            let (rows, cols) = (num_rows.div_ceil(block[0]), num_cols.div_ceil(block[1]));
            let mut shapes = vec![stacked(&[rows, cols])];
            // It keeps the dimensions that it took the largest of.
            if method == QuantMethod::Modelopt {
                shapes.push(stacked(&[rows, 1, cols, 1]));
            }
            layouts.push((block, shapes));
        }
        let shapes: Vec<Vec<usize>> = layouts.iter().flat_map(|(_, shapes)| shapes.clone()).collect();
        let scales = module.part(name, &FLOATS, &shapes)?;
        let block =
            layouts.iter().find(|(_, shapes)| shapes.contains(&scales.shape)).map(|(block, _)| *block);
        // `part` found its shape among them.
        let block = block.unwrap_or([num_rows, num_cols]);
        Ok(Fp8 { codes, scales, block, num_rows, num_cols })
    }

    pub(super) fn format(&self) -> String {
        let [rows, cols] = self.block;
        if rows == 1 && cols == self.num_cols {
            "fp8, a scale per row".into()
        } else if rows == self.num_rows && cols == self.num_cols {
            "fp8, one scale".into()
        } else {
            format!("fp8, a scale per block of {rows} x {cols}")
        }
    }

    /// Codes of `rows`, counted through all matrices.
    pub fn code_rows(&self, rows: Range<usize>) -> &[u8] {
        let bytes = self.codes.bytes().unwrap_or_default();
        &bytes[rows.start * self.num_cols..rows.end * self.num_cols]
    }

    /// Writes the scales of `row`, counted through all matrices: one for each `block[1]` columns.
    pub fn read_scales(&self, row: usize, out: &mut [f32]) {
        let num_blocks = self.num_cols.div_ceil(self.block[1]);
        let grid_rows = self.num_rows.div_ceil(self.block[0]);
        let grid_row = row / self.num_rows * grid_rows + row % self.num_rows / self.block[0];
        let bytes = self.scales.bytes().unwrap_or_default();
        for (i, out) in out[..num_blocks].iter_mut().enumerate() {
            *out = float_at(bytes, self.scales.dtype, grid_row * num_blocks + i);
        }
    }

    pub(super) fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        if self.num_cols == 0 {
            return;
        }
        let mut scales = vec![0.0; self.num_cols.div_ceil(self.block[1])];
        let codes = self.code_rows(rows.clone()).chunks_exact(self.num_cols);
        for ((row, codes), out) in rows.zip(codes).zip(out.chunks_exact_mut(self.num_cols)) {
            self.read_scales(row, &mut scales);
            let blocks = codes.chunks(self.block[1]).zip(out.chunks_mut(self.block[1]));
            for ((codes, out), scale) in blocks.zip(&scales) {
                codes.iter().zip(out).for_each(|(&code, out)| *out = decode_e4m3(code) * scale);
            }
        }
    }
}

/// The number of an e4m3 code: 4 bits of exponent, 3 of mantissa, no infinity, NaN where all of them are set.
pub fn decode_e4m3(code: u8) -> f32 {
    const NUMBERS: [f32; 256] = {
        let mut numbers = [0.0; 256];
        let mut code = 0;
        while code < 256 {
            numbers[code] = number(code as u32);
            code += 1;
        }
        numbers
    };
    NUMBERS[code as usize]
}

const fn number(code: u32) -> f32 {
    let (sign, exponent, mantissa) = (code >> 7 << 31, code >> 3 & 15, code & 7);
    match (exponent, mantissa) {
        (15, 7) => f32::from_bits(sign | f32::NAN.to_bits()),
        // Below the smallest exponent the mantissa counts in steps of 2^-9, the bits of which are 118 << 23.
        (0, _) => {
            let x = mantissa as f32 * f32::from_bits(118 << 23);
            f32::from_bits(sign | x.to_bits())
        }
        // Bias 7 becomes bias 127.
        _ => f32::from_bits(sign | (exponent + 120) << 23 | mantissa << 20),
    }
}

/// The dtype of codes.
pub(super) const CODES: DType = DType::F8_E4M3;
