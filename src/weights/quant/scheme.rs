//! Quantising at load: which tensors of a model get which form, and tensors that carry it. Nothing is computed here
//! before somebody reads: a device that quantises itself takes [`Tensor::scheme`] and [`Tensor::source`], every other
//! place reads the quantised numbers by [`Tensor::read_rows`].

use std::ops::Range;
use std::sync::Arc;

use half::bf16;
use rayon::prelude::*;
use serde::Serialize;

use super::Encoded;
use super::quantise::{BLOCK, dequantise_fp8, dequantise_int4, quantise_fp8, quantise_int4};
use crate::gguf::TensorType;
use crate::weights::{
    DType, Data, ExpertTensors, FfnTensors, LayerTensors, MixerTensors, ModelTensors, MtpTensors, Tensor,
};
use crate::{Error, Result};

/// What a model is quantised to when it is loaded.
///
/// Norms, routers, gates of shared experts, convolutions, the decay and beta projections of the delta layers, the
/// embedding (also where it is the head), the `fc` of the MTP module and the vision tower stay as they are; and so does
/// every matrix that the checkpoint has in as few bits or in fewer: 4-bit integers, NVFP4, GGUF's Q4_0 and Q4_K, and, where
/// 8 bits are asked for, FP8 and GGUF's Q5_K, Q6_K and Q8_0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quantization {
    /// 4-bit integers for experts and projections, 8-bit floats for the head.
    Int4 {
        /// Inputs of a row that share a scale.
        group: usize,
    },
    /// 8-bit floats for experts, projections and the head.
    Fp8,
    /// 4-bit integers for experts, shared ones too; 8-bit floats for projections, the block of a dense model, and the
    /// head.
    Mixed {
        /// Inputs of a row that share a scale.
        group: usize,
    },
}

impl Quantization {
    /// Inputs of a row that share a scale of 4-bit integers, where nothing else is asked for.
    pub const GROUP: usize = 128;
    /// What that may be, in order.
    pub const GROUPS: [usize; 3] = [32, 64, 128];

    /// The one of a name: `int4`, `fp8` or `mixed`.
    ///
    /// # Errors
    /// `Request` with the names, or with the sizes that groups may have.
    pub fn parse(name: &str, group: usize) -> Result<Self> {
        if !Self::GROUPS.contains(&group) {
            return Err(Error::request("group_size", group, "32, 64, 128"));
        }
        match name {
            "int4" => Ok(Self::Int4 { group }),
            "fp8" => Ok(Self::Fp8),
            "mixed" => Ok(Self::Mixed { group }),
            other => Err(Error::request("quantization", other, "int4, fp8, mixed")),
        }
    }

    /// Inputs of a row that share a scale of 4-bit integers, where there are any.
    pub fn group(self) -> Option<usize> {
        match self {
            Self::Int4 { group } | Self::Mixed { group } => Some(group),
            Self::Fp8 => None,
        }
    }
}

impl std::fmt::Display for Quantization {
    /// Its name.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Int4 { .. } => "int4",
            Self::Fp8 => "fp8",
            Self::Mixed { .. } => "mixed",
        })
    }
}

/// What one tensor is quantised to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// 4-bit integers, zero point 8, a bf16 scale for each group of a row.
    Int4 {
        /// Inputs of a row that share a scale; no more than the row has.
        group: usize,
    },
    /// 8-bit floats with an f32 scale for each block of 128 x 128.
    Fp8 {
        /// Rows of one matrix: the tensor's may be several one after the other, and blocks are counted from the first
        /// row of each.
        matrix_rows: usize,
    },
}

/// A tensor, and what it is quantised to when it is read.
#[derive(Debug)]
pub struct Requantised {
    source: Tensor,
    scheme: Scheme,
}

impl Requantised {
    pub(in crate::weights) fn source(&self) -> &Tensor {
        &self.source
    }

    pub(in crate::weights) fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Bytes of codes and scales.
    pub(in crate::weights) fn num_bytes(&self) -> usize {
        let (rows, k) = (self.source.num_rows(), self.source.num_cols());
        match self.scheme {
            Scheme::Int4 { group } => rows * (k.div_ceil(2) + 2 * k.div_ceil(group.max(1))),
            Scheme::Fp8 { matrix_rows } => {
                let matrices = rows / matrix_rows.max(1);
                rows * k + 4 * matrices * matrix_rows.div_ceil(BLOCK) * k.div_ceil(BLOCK)
            }
        }
    }

    pub(in crate::weights) fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let k = self.source.num_cols();
        match self.scheme {
            Scheme::Int4 { group } => {
                let mut codes = vec![0; out.len()];
                let groups = k.div_ceil(group.max(1));
                let mut scales = vec![0.0; rows.len() * groups];
                self.source.read_rounded(rows, out);
                quantise_int4(out, k, group, &mut codes, &mut scales);
                dequantise_int4(&codes, k, group, &scales, out);
            }
            Scheme::Fp8 { matrix_rows } => {
                let mut scales = vec![0.0; k.div_ceil(BLOCK)];
                let mut next = rows.start;
                while next < rows.end {
                    let block = block_of(next, matrix_rows);
                    let wanted = next - block.start..rows.end.min(block.end) - block.start;
                    let mut w = vec![0.0; block.len() * k];
                    let mut codes = vec![0; w.len()];
                    self.source.read_rounded(block.clone(), &mut w);
                    quantise_fp8(&w, k, &mut codes, &mut scales);
                    let out = &mut out[(next - rows.start) * k..][..wanted.len() * k];
                    dequantise_fp8(&codes[wanted.start * k..wanted.end * k], k, &scales, out);
                    next = block.end;
                }
            }
        }
    }
}

/// The rows that share their scales with a row.
fn block_of(row: usize, matrix_rows: usize) -> Range<usize> {
    let first = row / matrix_rows * matrix_rows;
    let start = first + (row - first) / BLOCK * BLOCK;
    start..(start + BLOCK).min(first + matrix_rows)
}

impl Tensor {
    /// The same tensor, quantised when it is read; itself where it is stored in as few bits or in fewer. Reads nothing.
    /// A tensor of more than two dimensions is matrices one after the other.
    pub fn requantised(self, scheme: Scheme) -> Self {
        let bits = |scheme: Scheme| if matches!(scheme, Scheme::Int4 { .. }) { 4 } else { 8 };
        let stored = match (self.encoded(), self.scheme()) {
            (Some(Encoded::Int4(_) | Encoded::Nvfp4(_)), _) => 4,
            (Some(Encoded::Gguf(gguf)), _) if gguf.is_int4() => 4,
            (Some(Encoded::Gguf(gguf)), _) if gguf.keeps_codes() => match gguf.kind {
                TensorType::Q4_K => 4,
                _ => 8,
            },
            (Some(Encoded::Fp8(_)), _) => 8,
            // No device multiplies their codes: whoever asks for fewer bits gets them.
            (Some(Encoded::Gguf(_)), _) => 16,
            (None, Some(scheme)) => bits(scheme),
            (None, None) => 16,
        };
        if stored <= bits(scheme) {
            return self;
        }
        let scheme = match scheme {
            Scheme::Int4 { group } => Scheme::Int4 { group: group.min(self.num_cols()) },
            fp8 => fp8,
        };
        let (name, shape) = (self.name.clone(), self.shape.clone());
        let data = Data::Requantised(Arc::new(Requantised { source: self, scheme }));
        Tensor { name, dtype: DType::F32, shape, data }
    }

    /// What it is quantised to when it is read: not what the checkpoint has it in ([`Tensor::encoded`]).
    pub fn scheme(&self) -> Option<Scheme> {
        match &self.data {
            Data::Requantised(requantised) => Some(requantised.scheme),
            _ => None,
        }
    }

    /// What it is quantised from, rounded to bf16 first; itself where nothing is.
    pub fn source(&self) -> &Tensor {
        match &self.data {
            Data::Requantised(requantised) => requantised.source(),
            _ => self,
        }
    }

    /// [`Tensor::read_rows`], rounded to bf16: what is quantised.
    pub fn read_rounded(&self, rows: Range<usize>, out: &mut [f32]) {
        self.read_rows(rows, out);
        if self.dtype != DType::BF16 {
            out.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
        }
    }

    /// Refuses a tensor that is to be quantised and has an element that is no finite number in bf16. Reads all of it,
    /// by all threads.
    ///
    /// # Errors
    /// `Tensor`, with its name, the element and its place.
    pub fn check_finite(&self) -> Result<()> {
        let (source, k) = (self.source(), self.num_cols());
        if self.scheme().is_none() || source.random_elements().is_some() || k == 0 {
            return Ok(());
        }
        let bad = (0..source.num_rows()).into_par_iter().step_by(BLOCK).find_map_first(|first| {
            let rows = first..(first + BLOCK).min(source.num_rows());
            let mut w = vec![0.0; rows.len() * k];
            source.read_rounded(rows, &mut w);
            w.iter().position(|x| !x.is_finite()).map(|i| (first + i / k, i % k, w[i]))
        });
        match bad {
            None => Ok(()),
            Some((row, column, x)) => Err(self.not_finite(row, column, x)),
        }
    }

    /// The same of an element by its number, which is read again.
    pub fn not_finite_at(&self, index: usize) -> Error {
        let (row, column) = (index / self.num_cols(), index % self.num_cols());
        let mut w = vec![0.0; self.num_cols()];
        self.source().read_rounded(row..row + 1, &mut w);
        self.not_finite(row, column, w[column])
    }

    /// The error of an element that cannot be quantised.
    pub fn not_finite(&self, row: usize, column: usize, found: f32) -> Error {
        Error::Tensor {
            name: self.name.clone(),
            found: format!("{found} in row {row}, column {column}"),
            expected: "finite numbers, where they are quantised".into(),
        }
    }
}

/// What matrices do, as far as a [`Quantization`] tells them apart.
#[derive(Clone, Copy, PartialEq)]
enum Role {
    Expert,
    Projection,
    Head,
}

impl Quantization {
    fn scheme(self, role: Role, matrix_rows: usize) -> Scheme {
        let int4 = self.group().filter(|_| match (self, role) {
            (_, Role::Head) => false,
            (Self::Mixed { .. }, role) => role == Role::Expert,
            _ => true,
        });
        int4.map_or(Scheme::Fp8 { matrix_rows }, |group| Scheme::Int4 { group })
    }

    /// Tensors of one matrix each.
    fn apply<const N: usize>(self, role: Role, tensors: [&mut Tensor; N]) {
        for tensor in tensors {
            let rows = tensor.num_rows();
            self.apply_stack(role, tensor, rows);
        }
    }

    /// A tensor of several matrices of so many rows.
    fn apply_stack(self, role: Role, tensor: &mut Tensor, matrix_rows: usize) {
        *tensor = tensor.clone().requantised(self.scheme(role, matrix_rows));
    }
}

impl ModelTensors {
    /// The same, with the matrices that `quantization` names quantised when they are read.
    pub fn requantised(mut self, quantization: Quantization) -> Self {
        if let Some(head) = &mut self.lm_head {
            quantization.apply(Role::Head, [head]);
        }
        self.layers.iter_mut().for_each(|layer| layer.requantise(quantization));
        self
    }
}

impl MtpTensors {
    /// As [`ModelTensors::requantised`]: its layer as the model's.
    pub fn requantised(mut self, quantization: Quantization) -> Self {
        self.layer.requantise(quantization);
        self
    }
}

impl LayerTensors {
    fn requantise(&mut self, quantization: Quantization) {
        match &mut self.mixer {
            MixerTensors::Attention { q_proj, k_proj, v_proj, o_proj, .. } => {
                quantization.apply(Role::Projection, [q_proj, k_proj, v_proj, o_proj]);
            }
            MixerTensors::DeltaNet { in_proj_qkv, in_proj_z, out_proj, .. } => {
                quantization.apply(Role::Projection, [in_proj_qkv, in_proj_z, out_proj]);
            }
        }
        match &mut self.ffn {
            FfnTensors::Dense { gate_proj, up_proj, down_proj } => {
                quantization.apply(Role::Projection, [gate_proj, up_proj, down_proj]);
            }
            FfnTensors::Moe { experts, shared_gate_proj, shared_up_proj, shared_down_proj, .. } => {
                quantization.apply(Role::Expert, [shared_gate_proj, shared_up_proj, shared_down_proj]);
                match experts {
                    ExpertTensors::Fused { gate_up_proj, down_proj } => {
                        // Gate and up are two matrices.
                        let (width, hidden) = (gate_up_proj.shape[1] / 2, down_proj.shape[1]);
                        quantization.apply_stack(Role::Expert, gate_up_proj, width);
                        quantization.apply_stack(Role::Expert, down_proj, hidden);
                    }
                    ExpertTensors::PerExpert(experts) => {
                        for e in experts {
                            quantization
                                .apply(Role::Expert, [&mut e.gate_proj, &mut e.up_proj, &mut e.down_proj]);
                        }
                    }
                }
            }
        }
    }
}
