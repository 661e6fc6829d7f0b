//! `config.json` to a checked [`ModelConfig`]: every number the net needs, and a refusal by name of
//! whatever it cannot run. Owns no files beyond the two it reads; knows no weights and no device.
//!
//! A missing key takes the default of the Transformers configuration class (5.23), because that is what
//! the file means to the program that wrote it. Products of sizes cannot overflow a `u64`: each size has
//! a limit far above any model of the family (see `parse`).

mod fields;
mod generation;
mod gguf;
mod parse;
mod quant;
mod rope;
mod shard;

pub use generation::GenerationConfig;
pub use quant::{Fp8Rule, Int4Rule, QuantConfig, QuantMethod};
pub use shard::Shard;
pub(crate) use shard::gcd;

use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use crate::gguf::Gguf;
use crate::{Error, Result, files};

/// What some exports write in place of `quantization_config`.
const QUANT_FILE: &str = "hf_quant_config.json";

/// The geometry and constants of one Qwen3.5 text model. All sizes are in elements.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelConfig {
    /// `qwen3_5` or `qwen3_5_moe`, as the checkpoint says (a `_text` suffix is dropped).
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding and of the head, padding rows included.
    pub vocab: usize,
    /// The mixer of each layer, first layer first.
    pub layers: Vec<LayerKind>,
    /// Full-attention layers.
    pub attention: AttentionConfig,
    /// Gated DeltaNet layers.
    pub delta: DeltaConfig,
    /// The feed-forward block, the same in every layer.
    pub ffn: FfnConfig,
    /// Epsilon of every RMSNorm.
    pub rms_eps: f32,
    /// Rotary embedding of the full-attention layers.
    pub rope: RopeConfig,
    /// Longest context, in tokens, that the checkpoint declares.
    pub max_position: usize,
    /// Whether `lm_head` is the embedding.
    pub tied_embeddings: bool,
    /// Whether the checkpoint declares a vision tower.
    pub has_vision: bool,
    /// Layers of the multi-token-prediction module (0 or 1).
    pub num_mtp_layers: usize,
    /// Sizes of the vision tower, where the checkpoint declares one.
    pub vision: Option<VisionConfig>,
    /// The dtype the checkpoint declares (`bfloat16`, ...). The tensors speak for themselves.
    pub dtype: Option<String>,
    /// The formats that large matrices may have besides plain floats.
    pub quantization: Option<QuantConfig>,
    /// `eos_token_id` of the configuration. For the family this is end-of-text and not end-of-turn: stop
    /// tokens come from [`GenerationConfig`] first.
    pub eos_token_ids: Vec<u32>,
}

/// Sizes of the vision tower. Only counted, not run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VisionConfig {
    /// Blocks.
    pub depth: usize,
    /// Width of a block's residual stream.
    pub hidden: usize,
    /// Width of a block's feed-forward layer.
    pub width: usize,
    /// Attention heads; divides `hidden`.
    pub num_heads: usize,
    /// Colour channels.
    pub in_channels: usize,
    /// Side of a patch, in pixels.
    pub patch: usize,
    /// Frames of a patch.
    pub temporal_patch: usize,
    /// Side of the square of patches that becomes one token.
    pub merge: usize,
    /// Width of a token that leaves the tower: the text model's `hidden`.
    pub out_hidden: usize,
    /// Rows of the learned position table.
    pub num_positions: usize,
}

/// The two mixers of the hybrid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerKind {
    /// Gated DeltaNet: a recurrent state per sequence.
    DeltaNet,
    /// Softmax attention over every earlier token: pages of keys and values.
    Attention,
}

/// Sizes of the full-attention layers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AttentionConfig {
    /// Query heads.
    pub num_q_heads: usize,
    /// Key and value heads; divides `num_q_heads`.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

/// Sizes of the Gated DeltaNet layers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DeltaConfig {
    /// Query/key heads.
    pub num_k_heads: usize,
    /// Value heads; a multiple of `num_k_heads`. Value head `h` reads key head `h / (V / K)`.
    pub num_v_heads: usize,
    /// Width of a key head.
    pub k_dim: usize,
    /// Width of a value head.
    pub v_dim: usize,
    /// Taps of the causal convolution.
    pub conv_kernel: usize,
}

/// The feed-forward block.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FfnConfig {
    /// One SwiGLU of this width.
    Dense {
        /// Width of the hidden activation.
        width: usize,
    },
    /// Routed experts and one gated shared expert.
    Moe {
        /// Routed experts.
        num_experts: usize,
        /// Experts a token is sent to.
        top_k: usize,
        /// Width of a routed expert.
        expert_width: usize,
        /// Width of the shared expert.
        shared_width: usize,
    },
}

/// The rotary embedding of the full-attention layers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Leading dimensions of a head that rotate (even).
    pub rotary_dim: usize,
    /// Frequencies that follow the T, H and W position; sums to `rotary_dim / 2`.
    pub mrope_section: [usize; 3],
    /// YaRN, where the checkpoint asks for it.
    pub yarn: Option<YarnConfig>,
}

/// YaRN's context extension (static: it also applies to short prompts).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct YarnConfig {
    /// Context multiplier.
    pub factor: f64,
    /// The context the model was trained for.
    pub original_max_position: usize,
    /// Wavelengths per context above which a frequency is kept.
    pub beta_fast: f64,
    /// Wavelengths per context below which a frequency is divided by `factor`.
    pub beta_slow: f64,
    /// Multiplied into cos and sin.
    pub attention_factor: f64,
    /// Whether the correction range is rounded outwards to whole frequencies.
    pub truncate: bool,
}

impl DeltaConfig {
    /// Channels of the convolution: q, k and v side by side.
    pub fn conv_channels(&self) -> usize {
        2 * self.key_width() + self.value_width()
    }

    /// Width of all key heads.
    pub fn key_width(&self) -> usize {
        self.num_k_heads * self.k_dim
    }

    /// Width of all value heads.
    pub fn value_width(&self) -> usize {
        self.num_v_heads * self.v_dim
    }
}

impl AttentionConfig {
    /// Width of all query heads.
    pub fn q_width(&self) -> usize {
        self.num_q_heads * self.head_dim
    }

    /// Width of all key (or value) heads.
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }
}

impl ModelConfig {
    /// Reads and checks `config.json` of a checkpoint directory, and `hf_quant_config.json` where that alone says how
    /// the weights are quantised; or the metadata of a GGUF file, where `dir` means one ([`crate::gguf::find`]).
    ///
    /// # Errors
    /// `Io` if the file cannot be read, `File` if it is not JSON or not GGUF, `Config` for the first value that
    /// cannot be run.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        if let Some(file) = crate::gguf::find(dir)? {
            return Self::from_gguf(&Gguf::open(&file)?);
        }
        let path = dir.join("config.json");
        let mut value = parse_json(&files::read_text(&path, files::SETTINGS)?, &path)?;
        let beside = dir.join(QUANT_FILE);
        if value.get("quantization_config").is_none()
            && let Some(text) = files::read_text_if_there(&beside, files::SETTINGS)?
        {
            quant::with_file(&mut value, parse_json(&text, &beside)?, &beside)?;
        }
        Self::from_value(&value)
    }

    /// Checks the metadata of a GGUF file.
    ///
    /// # Errors
    /// `Config` for the first value that is missing or cannot be run, by its key.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        gguf::model_config(gguf)
    }

    /// Checks the text of a `config.json`. `origin` is the file that errors name.
    ///
    /// # Errors
    /// `File` if the text is not JSON, `Config` for the first value that cannot be run.
    pub fn from_json(text: &str, origin: &Path) -> Result<Self> {
        Self::from_value(&parse_json(text, origin)?)
    }

    /// Checks a parsed `config.json`.
    ///
    /// # Errors
    /// `Config` for the first value that cannot be run.
    pub fn from_value(value: &Value) -> Result<Self> {
        parse::model_config(value)
    }

    /// Layers of one kind.
    pub fn num_layers_of(&self, kind: LayerKind) -> usize {
        self.layers.iter().filter(|&&k| k == kind).count()
    }

    /// Longest context in tokens that the checkpoint can serve: `max_position`, or what YaRN makes of the
    /// context it extends, whichever is longer.
    pub fn max_context(&self) -> usize {
        match &self.rope.yarn {
            // Both factors are limited to 2^31, far below where a f64 loses integers.
            Some(yarn) => {
                self.max_position.max((yarn.factor * yarn.original_max_position as f64).floor() as usize)
            }
            None => self.max_position,
        }
    }
}

fn parse_json(text: &str, origin: &Path) -> Result<Value> {
    serde_json::from_str(text).map_err(|e| Error::file(origin, format!("not JSON: {e}")))
}

#[cfg(test)]
mod tests;
