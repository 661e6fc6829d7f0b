//! NVFP4: two 4-bit floats to a byte, the one of the lower input in the low half; an e4m3 scale per 16 inputs of a
//! row; one f32 scale for all. ModelOpt's files hold what the last is multiplied with, compressed-tensors' what is
//! divided by it.

use std::ops::Range;

use super::find::{Module, Problem};
use super::fp8::decode_e4m3;
use crate::weights::elements::float_at;
use crate::weights::{DType, Tensor};

/// Inputs that share a scale.
pub const GROUP: usize = 16;

/// A matrix `[out, in]` of 4-bit floats. An element is `code * step`, where `step` is `scale * global` or
/// `scale / global`; both in f32, the step first. So do ModelOpt's `NVFP4QTensor.dequantize` and compressed-tensors'
/// `dequantize`.
#[derive(Debug, Clone)]
pub struct Nvfp4 {
    /// U8 `[out, in / 2]`
    pub codes: Tensor,
    /// F8_E4M3 `[out, in / 16]`, row after row.
    pub scales: Tensor,
    /// F32, one.
    pub global: Tensor,
    /// Whether scales are divided by `global`; otherwise multiplied.
    pub divides: bool,
    /// `in`
    pub num_cols: usize,
}

impl Nvfp4 {
    /// `codes` is of dtype U8 and in the module's `weight` (ModelOpt) or `weight_packed` (compressed-tensors).
    pub(super) fn new(
        module: &mut Module<'_>,
        [num_rows, num_cols]: [usize; 2],
        divides: bool,
    ) -> Result<Self, Problem> {
        let (codes, global) = match divides {
            true => ("weight_packed", "weight_global_scale"),
            false => ("weight", "weight_scale_2"),
        };
        if num_cols % GROUP != 0 {
            let expected = format!("a number of inputs that is a multiple of {GROUP}");
            return Err(module.problem(codes, format!("a matrix of {num_rows} x {num_cols}"), expected));
        }
        let codes = module.part(codes, &[DType::U8], &[vec![num_rows, num_cols / 2]])?;
        let scales = module.part("weight_scale", &[DType::F8_E4M3], &[vec![num_rows, num_cols / GROUP]])?;
        let global = module.part(global, &[DType::F32], &[vec![], vec![1], vec![1, 1]])?;
        Ok(Nvfp4 { codes, scales, global, divides, num_cols })
    }

    pub(super) fn format(&self) -> String {
        let by = if self.divides { "compressed-tensors" } else { "modelopt" };
        format!("nvfp4 ({by})")
    }

    /// The scale of the whole matrix.
    pub fn global(&self) -> f32 {
        float_at(self.global.bytes().unwrap_or_default(), DType::F32, 0)
    }

    /// Codes of `rows`: `[rows, in / 2]`, low half first.
    pub fn code_rows(&self, rows: Range<usize>) -> &[u8] {
        let len = self.num_cols / 2;
        &self.codes.bytes().unwrap_or_default()[rows.start * len..rows.end * len]
    }

    /// Scales of `rows`: e4m3 `[rows, in / 16]`.
    pub fn scale_rows(&self, rows: Range<usize>) -> &[u8] {
        let len = self.num_cols / GROUP;
        &self.scales.bytes().unwrap_or_default()[rows.start * len..rows.end * len]
    }

    /// What codes times scales are multiplied with.
    pub fn whole(&self) -> f32 {
        if self.divides { 1.0 / self.global() } else { self.global() }
    }

    /// Writes the steps of `rows`: `[rows, in / 16]`.
    pub fn read_steps(&self, rows: Range<usize>, out: &mut [f32]) {
        let global = self.global();
        for (&scale, out) in self.scale_rows(rows).iter().zip(out) {
            let scale = decode_e4m3(scale);
            *out = if self.divides { scale / global } else { scale * global };
        }
    }

    pub(super) fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let mut steps = vec![0.0; rows.len() * self.num_cols / GROUP];
        self.read_steps(rows.clone(), &mut steps);
        let groups = self.code_rows(rows).chunks_exact(GROUP / 2).zip(out.chunks_exact_mut(GROUP));
        for ((codes, out), step) in groups.zip(steps) {
            for (&byte, out) in codes.iter().zip(out.chunks_exact_mut(2)) {
                out[0] = decode_e2m1(byte & 15) * step;
                out[1] = decode_e2m1(byte >> 4) * step;
            }
        }
    }
}

/// The number of an e2m1 code, 0..16: bit 3 is the sign.
pub fn decode_e2m1(code: u8) -> f32 {
    const NUMBERS: [f32; 16] =
        [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
    NUMBERS[usize::from(code & 15)]
}
