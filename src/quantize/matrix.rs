//! One matrix on its way to a file: its parts, their bytes, and how far they are from what was there.

use std::borrow::Cow;
use std::ops::Range;

use half::bf16;

use super::gptq::Curvature;
use super::kept::{check_kept, fp8_parts, int4_entries, int4_parts};
use crate::weights::quant::{
    BLOCK, Encoded, Int4, Quantization, Scheme, dequantise_fp8, dequantise_int4, quantise_fp8, quantise_int4,
};
use crate::weights::write::{Entry, Made, Unit};
use crate::weights::{DType, Tensor};
use crate::{Error, Result};

/// Codes in a word.
pub(super) const WORD: usize = 8;

/// What becomes one tensor of the file, or the parts of one matrix.
pub(super) enum Work {
    /// As it is.
    Copied(Tensor),
    /// Rows of a tensor, quantised.
    Matrix { module: String, tensor: Tensor, rows: Range<usize>, scheme: Scheme, scale_name: &'static str },
    /// Rows of a matrix that is stored in blocks of fp8 already.
    Kept { module: String, tensor: Tensor, rows: Range<usize>, scale_name: &'static str },
    /// A matrix of 4-bit integers; with whether its zero points are written.
    KeptInt4 { module: String, int4: Int4, zeros: bool },
}

/// Sums over a matrix, and over several.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Deviation {
    squares: f64,
    errors: f64,
    /// The largest error.
    pub most: f64,
}

impl Deviation {
    /// The root of the mean of squared errors over that of squared weights; 0 where all weights are.
    pub fn relative_rms(&self) -> f64 {
        if self.squares > 0.0 { (self.errors / self.squares).sqrt() } else { 0.0 }
    }

    pub fn add(&mut self, other: &Deviation) {
        self.squares += other.squares;
        self.errors += other.errors;
        self.most = self.most.max(other.most);
    }

    fn count(&mut self, before: &[f32], after: &[f32]) {
        for (&x, &y) in before.iter().zip(after) {
            let (x, y) = (f64::from(x), f64::from(y));
            self.squares += x * x;
            self.errors += (x - y) * (x - y);
            self.most = self.most.max((x - y).abs());
        }
    }
}

/// What became of a matrix.
#[derive(Debug, Clone)]
pub(super) struct Outcome {
    pub deviation: Deviation,
    /// Where error was fed back.
    pub calibrated: Option<Calibrated>,
}

/// What feeding back changed.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Calibrated {
    /// The deviation of rounding to the nearest.
    pub rounded: Deviation,
    /// `tr(W H Wᵀ)`, and the same of what rounding is off, and of what the matrix is off.
    pub squares: f64,
    pub rounded_errors: f64,
    pub errors: f64,
}

impl Calibrated {
    /// The squared errors that rounding to the nearest and the matrix leave on the calibration text, over the squares of
    /// its outputs; 0 where those are.
    pub fn weighted_errors(&self) -> [f64; 2] {
        let relative = |errors: f64| if self.squares > 0.0 { errors / self.squares } else { 0.0 };
        [relative(self.rounded_errors), relative(self.errors)]
    }
}

impl Work {
    /// Rows of a tensor that has a scheme or is encoded.
    pub fn matrix(
        module: String,
        tensor: &Tensor,
        rows: Range<usize>,
        quantization: Quantization,
    ) -> Result<Self> {
        let official = quantization == Quantization::Fp8;
        let scale_name = if official { "weight_scale_inv" } else { "weight_scale" };
        let tensor = tensor.clone();
        let Some(scheme) = tensor.scheme() else {
            check_kept(&tensor, rows.start, quantization)?;
            if let Some(Encoded::Int4(int4)) = tensor.encoded() {
                let zeros = !int4.is_symmetric();
                return Ok(Work::KeptInt4 { module, int4: int4.clone(), zeros });
            }
            return Ok(Work::Kept { module, tensor, rows, scale_name });
        };
        Ok(Work::Matrix { module, tensor, rows, scheme, scale_name })
    }

    /// The form that the matrix gets.
    pub fn format(&self) -> &'static str {
        match self {
            Work::Matrix { scheme: Scheme::Int4 { .. }, .. } | Work::KeptInt4 { .. } => "int4",
            Work::Copied(_) => "as it was",
            _ => "fp8",
        }
    }

    /// Its parts; with a Hessian, 4-bit integers whose errors are fed back.
    pub fn made(&self, curvature: Option<&Curvature>) -> Result<Made<'_, Option<Outcome>>> {
        match self {
            Work::Copied(tensor) => Ok((vec![Cow::Borrowed(tensor.bytes().unwrap_or_default())], None)),
            Work::Kept { tensor, rows, .. } => {
                let Some(Encoded::Fp8(fp8)) = tensor.encoded() else {
                    return Err(Error::Internal(format!("{} is not fp8", tensor.name)));
                };
                Ok((fp8_parts(fp8, rows.clone()), None))
            }
            Work::KeptInt4 { int4, zeros, .. } => {
                let parts = int4_parts(int4, *zeros);
                [&int4.codes, &int4.scales].into_iter().chain(&int4.zeros).for_each(Tensor::release);
                Ok((parts, None))
            }
            Work::Matrix { tensor, rows, scheme, .. } => {
                let (parts, outcome) = quantised(tensor, rows.clone(), *scheme, curvature)?;
                Ok((parts.into_iter().map(Cow::Owned).collect(), Some(outcome)))
            }
        }
    }
}

impl Unit for Work {
    type Note = Option<Outcome>;

    fn entries(&self) -> Vec<Entry> {
        let entry = |module: &str, part: &str, dtype, shape: &[usize]| Entry {
            name: format!("{module}.{part}"),
            dtype,
            shape: shape.to_vec(),
        };
        match self {
            Work::Copied(t) => vec![Entry { name: t.name.clone(), dtype: t.dtype, shape: t.shape.clone() }],
            Work::Matrix { module, tensor, rows, scheme: Scheme::Int4 { group }, scale_name } => {
                let (rows, k) = (rows.len(), tensor.num_cols());
                vec![
                    entry(module, "weight_packed", DType::I32, &[rows, k.div_ceil(WORD)]),
                    entry(module, scale_name, DType::BF16, &[rows, k.div_ceil((*group).max(1))]),
                    entry(module, "weight_shape", DType::I64, &[2]),
                ]
            }
            Work::KeptInt4 { module, int4, zeros } => int4_entries(int4, module, *zeros),
            Work::Matrix { module, tensor, rows, scale_name, .. }
            | Work::Kept { module, tensor, rows, scale_name } => {
                let (rows, k) = (rows.len(), tensor.num_cols());
                vec![
                    entry(module, "weight", DType::F8_E4M3, &[rows, k]),
                    entry(module, scale_name, DType::F32, &[rows.div_ceil(BLOCK), k.div_ceil(BLOCK)]),
                ]
            }
        }
    }

    fn make(&self) -> Result<Made<'_, Self::Note>> {
        self.made(None)
    }
}

/// The parts of a matrix, by blocks of rows.
fn quantised(
    tensor: &Tensor,
    rows: Range<usize>,
    scheme: Scheme,
    curvature: Option<&Curvature>,
) -> Result<(Vec<Vec<u8>>, Outcome)> {
    let (source, k) = (tensor.source(), tensor.num_cols());
    let (mut codes_out, mut scales_out, mut deviation) = (Vec::new(), Vec::new(), Deviation::default());
    let mut calibrated = curvature.map(|_| Calibrated::default());
    for first in rows.clone().step_by(BLOCK) {
        let some = first..rows.end.min(first + BLOCK);
        let mut before = vec![0.0; some.len() * k];
        source.read_rows(some.clone(), &mut before);
        let w: Vec<f32> = before.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
        if let Some(i) = w.iter().position(|x| !x.is_finite()) {
            return Err(tensor.not_finite(first + i / k, i % k, w[i]));
        }
        let (mut codes, mut after) = (vec![0; w.len()], vec![0.0; w.len()]);
        match scheme {
            Scheme::Int4 { group } => {
                let mut scales = vec![0.0; some.len() * k.div_ceil(group)];
                quantise_int4(&w, k, group, &mut codes, &mut scales);
                dequantise_int4(&codes, k, group, &scales, &mut after);
                if let (Some(curvature), Some(calibrated)) = (curvature, &mut calibrated) {
                    let error = |after: &[f32]| {
                        let off: Vec<f32> = w.iter().zip(after).map(|(x, y)| x - y).collect();
                        curvature.norm(&off)
                    };
                    calibrated.rounded.count(&before, &after);
                    calibrated.squares += curvature.norm(&w);
                    calibrated.rounded_errors += error(&after);
                    curvature.quantise_int4(&w, group, &mut codes, &mut scales);
                    dequantise_int4(&codes, k, group, &scales, &mut after);
                    calibrated.errors += error(&after);
                }
                codes_out.extend(codes.chunks(k).flat_map(|row| row.chunks(WORD)).flat_map(pack));
                scales_out.extend(scales.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()));
            }
            Scheme::Fp8 { .. } => {
                let mut scales = vec![0.0; k.div_ceil(BLOCK)];
                quantise_fp8(&w, k, &mut codes, &mut scales);
                dequantise_fp8(&codes, k, &scales, &mut after);
                codes_out.extend(codes);
                scales_out.extend(scales.iter().flat_map(|x| x.to_le_bytes()));
            }
        }
        deviation.count(&before, &after);
    }
    source.release();
    let mut parts = vec![codes_out, scales_out];
    if let Scheme::Int4 { .. } = scheme {
        parts.push([rows.len() as i64, k as i64].iter().flat_map(|n| n.to_le_bytes()).collect());
    }
    Ok((parts, Outcome { deviation, calibrated }))
}

/// Eight codes, or the last ones of a row, to a word: the first in the lowest bits.
pub(super) fn pack(codes: &[u8]) -> [u8; 4] {
    let word = codes.iter().enumerate().fold(0u32, |word, (i, &code)| word | u32::from(code) << (4 * i));
    word.to_le_bytes()
}
