//! Quantised matrices: codes, scales and zero points, each still in the mapped file, and what they mean. Three forms,
//! whatever program wrote the file: FP8, 4-bit integers, NVFP4; and blocks as GGUF has them. A device that has kernels for a form takes it from
//! [`Tensor::encoded`]; every other place reads numbers by [`Tensor::read_rows`].
//!
//! A decoded element is a product in f32 of exactly widened factors, in the order that each form states: nothing rounds
//! but that product, and of NVFP4 the one that makes a step of two scales.

mod find;
mod fp8;
mod gguf;
mod int4;
mod nvfp4;
mod quantise;
mod scheme;

pub(super) use find::{Problem, find, is_ignored};
pub use fp8::{Fp8, decode_e4m3};
pub use gguf::{Gguf, HeadOrder, Moved, kept_bytes};
pub use int4::{Int4, Layout};
pub use nvfp4::{Nvfp4, decode_e2m1};
pub use quantise::{
    BLOCK, dequantise_fp8, dequantise_int4, encode_e4m3, int4_scales, quantise_fp8, quantise_int4, to_int4,
};
pub use scheme::{Quantization, Requantised, Scheme};

use std::ops::Range;

use super::Tensor;

/// A matrix `[out, in]` (of FP8 also several, `[matrices, out, in]`) that is stored as codes.
#[derive(Debug, Clone)]
pub enum Encoded {
    /// 8-bit floats with a scale per block, row or matrix.
    Fp8(Fp8),
    /// 4-bit integers with a scale and a zero point per group of inputs of a row.
    Int4(Int4),
    /// 4-bit floats with a scale per 16 inputs of a row, and one for all.
    Nvfp4(Nvfp4),
    /// Blocks of codes and scales along a row; or floats, with heads in another order.
    Gguf(Gguf),
}

impl Encoded {
    /// What it is called: the form, who wrote it where that matters, and what shares a scale.
    pub fn format(&self) -> String {
        match self {
            Encoded::Fp8(fp8) => fp8.format(),
            Encoded::Int4(int4) => int4.format(),
            Encoded::Nvfp4(nvfp4) => nvfp4.format(),
            Encoded::Gguf(gguf) => gguf.format(),
        }
    }

    /// The tensors of the file that it is made of.
    pub fn parts(&self) -> Vec<&Tensor> {
        match self {
            Encoded::Fp8(Fp8 { codes, scales, .. }) => vec![codes, scales],
            Encoded::Int4(Int4 { codes, scales, zeros, .. }) => {
                [codes, scales].into_iter().chain(zeros).collect()
            }
            Encoded::Nvfp4(Nvfp4 { codes, scales, global, .. }) => vec![codes, scales, global],
            Encoded::Gguf(Gguf { codes, .. }) => vec![codes],
        }
    }

    /// Whether its elements are codes: floats may be here for their order alone.
    pub fn is_quantised(&self) -> bool {
        !matches!(self, Encoded::Gguf(gguf) if !gguf.kind.is_quantised())
    }

    pub(super) fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        match self {
            Encoded::Fp8(fp8) => fp8.read_rows(rows, out),
            Encoded::Int4(int4) => int4.read_rows(rows, out),
            Encoded::Nvfp4(nvfp4) => nvfp4.read_rows(rows, out),
            Encoded::Gguf(gguf) => gguf.read_rows(rows, out),
        }
    }
}

#[cfg(test)]
mod tests;
