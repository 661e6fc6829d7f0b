//! How matrices are stored: which of a model have which format, and the bytes of one.

use serde::Serialize;

use crate::config::{FfnConfig, ModelConfig};
use crate::weights::quant::Quantization;
use crate::{Error, Result};

/// What a matrix does, as far as quantisation schemes tell matrices apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Routed experts.
    Experts,
    SharedExpert,
    /// The feed-forward block of a dense model.
    DenseFfn,
    /// The large projections of both mixers.
    Mixer,
    Head,
    /// Embedding rows, norms, routers, gates, convolutions, beta and decay projections.
    Rest,
}

/// Storage of one matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightFormat {
    /// 16 bits.
    Bf16,
    /// 8 bits, and a 16-bit scale per block of 128 x 128.
    Fp8,
    /// 4 bits, and a 16-bit scale and a 4-bit zero point per 128 inputs of a row.
    Int4,
    /// 4 bits, and an 8-bit scale per 16 inputs of a row.
    Nvfp4,
}

impl WeightFormat {
    /// Bytes of a matrix `[rows, cols]`.
    pub fn bytes(self, rows: u64, cols: u64) -> u64 {
        let weights = rows * cols;
        match self {
            WeightFormat::Bf16 => 2 * weights,
            WeightFormat::Fp8 => weights + 2 * rows.div_ceil(128) * cols.div_ceil(128),
            WeightFormat::Int4 => weights.div_ceil(2) + (rows * cols.div_ceil(128) * 5).div_ceil(2),
            WeightFormat::Nvfp4 => weights.div_ceil(2) + rows * cols.div_ceil(16),
        }
    }
}

/// Which matrices of a model are stored how. Embedding, norms, routers, gates, convolutions and the small
/// projections of the DeltaNet layers are 16-bit in every scheme.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scheme {
    /// Everything in 16 bits.
    Bf16,
    /// FP8 for all large matrices, head in 16 bits: the official `-FP8` checkpoints.
    Fp8,
    /// FP8 for all large matrices and the head: `quantization="fp8"`.
    Fp8Head,
    /// Int4 for all large matrices, FP8 for the head: `quantization="int4"`.
    Int4,
    /// Int4 for the routed experts (dense: the feed-forward block) only: the official `-GPTQ-Int4` checkpoints.
    Int4Experts,
    /// NVFP4 for all large matrices, head in 16 bits.
    Nvfp4,
    /// NVFP4 for the routed experts only. Mixture-of-experts models only.
    Nvfp4Experts,
    /// Int4 for the experts, FP8 for the other large matrices and the head: `quantization="mixed"`.
    Mixed,
    /// As a checkpoint's files have them: [`stored`] counts them, no configuration says.
    Stored,
}

impl Scheme {
    /// Every scheme that a configuration is enough for.
    pub const ALL: [Scheme; 8] = [
        Scheme::Bf16,
        Scheme::Fp8,
        Scheme::Fp8Head,
        Scheme::Int4,
        Scheme::Int4Experts,
        Scheme::Nvfp4,
        Scheme::Nvfp4Experts,
        Scheme::Mixed,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Scheme::Bf16 => "bf16",
            Scheme::Fp8 => "fp8",
            Scheme::Fp8Head => "fp8-head",
            Scheme::Int4 => "int4",
            Scheme::Int4Experts => "int4-experts",
            Scheme::Nvfp4 => "nvfp4",
            Scheme::Nvfp4Experts => "nvfp4-experts",
            Scheme::Mixed => "mixed",
            Scheme::Stored => "stored",
        }
    }

    /// The scheme of a name.
    ///
    /// # Errors
    /// `Request` with the list of names.
    pub fn from_name(name: &str) -> Result<Self> {
        let all = || Scheme::ALL.into_iter().chain([Scheme::Stored]);
        all().find(|scheme| scheme.name() == name).ok_or_else(|| {
            let names = all().map(Scheme::name).collect::<Vec<_>>().join(", ");
            Error::request("scheme", name, names)
        })
    }

    /// The argument of `LLM` that makes it of a checkpoint in 16 bits.
    pub fn quantization(self) -> Option<Quantization> {
        let group = Quantization::GROUP;
        match self {
            Scheme::Fp8Head => Some(Quantization::Fp8),
            Scheme::Int4 => Some(Quantization::Int4 { group }),
            Scheme::Mixed => Some(Quantization::Mixed { group }),
            _ => None,
        }
    }

    /// What a checkpoint must be published in that is to be held so: no argument makes it of another.
    pub fn published(self) -> Option<&'static str> {
        match self {
            Scheme::Fp8 => Some("fp8, as the official -FP8 ones"),
            Scheme::Int4Experts => Some("int4 experts, as the official -GPTQ-Int4 ones"),
            Scheme::Nvfp4 => Some("nvfp4"),
            Scheme::Nvfp4Experts => Some("nvfp4 experts"),
            _ => None,
        }
    }

    pub(super) fn format(self, role: Role) -> WeightFormat {
        use WeightFormat::{Bf16, Fp8, Int4, Nvfp4};
        let [experts, shared, dense, mixer, head] = match self {
            Scheme::Bf16 | Scheme::Stored => [Bf16; 5],
            Scheme::Fp8 => [Fp8, Fp8, Fp8, Fp8, Bf16],
            Scheme::Fp8Head => [Fp8; 5],
            Scheme::Int4 => [Int4, Int4, Int4, Int4, Fp8],
            Scheme::Int4Experts => [Int4, Bf16, Int4, Bf16, Bf16],
            Scheme::Nvfp4 => [Nvfp4, Nvfp4, Nvfp4, Nvfp4, Bf16],
            Scheme::Nvfp4Experts => [Nvfp4, Bf16, Nvfp4, Bf16, Bf16],
            Scheme::Mixed => [Int4, Int4, Fp8, Fp8, Fp8],
        };
        match role {
            Role::Experts => experts,
            Role::SharedExpert => shared,
            Role::DenseFfn => dense,
            Role::Mixer => mixer,
            Role::Head => head,
            Role::Rest => Bf16,
        }
    }

    /// Whether the scheme says anything about this model.
    pub fn applies_to(self, config: &ModelConfig) -> bool {
        match self {
            Scheme::Nvfp4Experts => matches!(config.ffn, FfnConfig::Moe { .. }),
            scheme => scheme != Scheme::Stored,
        }
    }
}

impl From<Quantization> for Scheme {
    fn from(quantization: Quantization) -> Self {
        match quantization {
            Quantization::Int4 { .. } => Scheme::Int4,
            Quantization::Fp8 => Scheme::Fp8Head,
            Quantization::Mixed { .. } => Scheme::Mixed,
        }
    }
}
