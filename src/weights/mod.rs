//! Checkpoints: safetensors files, mapped and checked, and the map from their names to the net.

mod checkpoint;
mod dtype;
mod hash;
mod mtp;
mod names;
mod random;
pub mod safetensors;

pub use checkpoint::{Checkpoint, Depth};
pub use dtype::DType;
pub use random::Random;

use std::sync::Arc;

use memmap2::Mmap;

/// One tensor of a checkpoint, still in the mapped file, or of a model of random weights. Cloning copies no data.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// The checkpoint's name.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Row-major shape.
    pub shape: Vec<usize>,
    data: Data,
}

#[derive(Debug, Clone)]
enum Data {
    /// A file, and the tensor's bytes in it.
    Mapped(Arc<Mmap>, std::ops::Range<usize>),
    Random(Arc<Random>),
}

impl Tensor {
    /// The raw little-endian bytes, `shape.product() * dtype.size()` of them. May be unaligned.
    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            Data::Mapped(file, range) => &file[range.clone()],
            Data::Random(random) => random.bytes(),
        }
    }

    /// How it is drawn, where its elements are random.
    pub fn random_elements(&self) -> Option<&Random> {
        match &self.data {
            Data::Mapped(..) => None,
            Data::Random(random) => Some(random),
        }
    }

    /// Says that the bytes will hardly be read again: the system may drop them from memory (and reads them from the
    /// file if they are).
    pub fn release(&self) {
        if let Data::Mapped(file, range) = &self.data {
            safetensors::release(file, range.clone());
        }
    }

    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        // Cannot overflow: the header check bounds the product (or a dimension is zero).
        if self.shape.contains(&0) { 0 } else { self.shape.iter().product() }
    }
}

/// Every tensor of the text model, by its place in the net. Names are the checkpoint's.
#[derive(Debug, Clone)]
pub struct ModelTensors {
    /// `[vocab, hidden]`
    pub embed_tokens: Tensor,
    /// `[hidden]`
    pub norm: Tensor,
    /// `[vocab, hidden]`; absent when tied.
    pub lm_head: Option<Tensor>,
    /// First layer first.
    pub layers: Vec<LayerTensors>,
    /// The vision tower, kept aside: its names and shapes are not checked.
    pub vision: Vec<Tensor>,
    /// The multi-token-prediction module, kept aside: [`MtpTensors::resolve`] checks it, where it is wanted.
    pub mtp: Vec<Tensor>,
}

/// The multi-token-prediction (MTP) module, which drafts the token after the next.
#[derive(Debug, Clone)]
pub struct MtpTensors {
    /// `[hidden, 2 * hidden]`: the half of the embedding, then that of the hidden state.
    pub fc: Tensor,
    /// `[hidden]`
    pub pre_fc_norm_embedding: Tensor,
    /// `[hidden]`
    pub pre_fc_norm_hidden: Tensor,
    /// Attention and the model's kind of feed-forward block.
    pub layer: LayerTensors,
    /// `[hidden]`
    pub norm: Tensor,
}

/// One decoder layer.
#[derive(Debug, Clone)]
pub struct LayerTensors {
    /// `[hidden]`
    pub input_layernorm: Tensor,
    /// `[hidden]`
    pub post_attention_layernorm: Tensor,
    /// `linear_attn.*` or `self_attn.*`
    pub mixer: MixerTensors,
    /// `mlp.*`
    pub ffn: FfnTensors,
}

/// The mixer of a layer; shapes in `spec` terms are `[out, in]`.
#[allow(missing_docs, clippy::large_enum_variant)] // one per layer, and not moved about
#[derive(Debug, Clone)]
pub enum MixerTensors {
    Attention {
        q_proj: Tensor,
        k_proj: Tensor,
        v_proj: Tensor,
        o_proj: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
    },
    DeltaNet {
        in_proj_qkv: Tensor,
        in_proj_z: Tensor,
        in_proj_b: Tensor,
        in_proj_a: Tensor,
        conv1d: Tensor,
        a_log: Tensor,
        dt_bias: Tensor,
        norm: Tensor,
        out_proj: Tensor,
    },
}

/// The feed-forward block of a layer.
#[allow(missing_docs, clippy::large_enum_variant)] // one per layer, and not moved about
#[derive(Debug, Clone)]
pub enum FfnTensors {
    Dense {
        gate_proj: Tensor,
        up_proj: Tensor,
        down_proj: Tensor,
    },
    Moe {
        gate: Tensor,
        experts: ExpertTensors,
        shared_gate_proj: Tensor,
        shared_up_proj: Tensor,
        shared_down_proj: Tensor,
        shared_expert_gate: Tensor,
    },
}

/// Routed experts, as the checkpoint stores them.
#[derive(Debug, Clone)]
pub enum ExpertTensors {
    /// `gate_up_proj [E, 2M, H]` and `down_proj [E, H, M]`.
    Fused {
        /// `[E, 2M, H]`
        gate_up_proj: Tensor,
        /// `[E, H, M]`
        down_proj: Tensor,
    },
    /// One triple per expert.
    PerExpert(Vec<ExpertTriple>),
}

impl ExpertTensors {
    /// Tensors whose rows, one after the other, are each expert's gate rows, then its up rows: `[E * 2M, H]`.
    pub fn gate_up(&self) -> Vec<Tensor> {
        match self {
            Self::Fused { gate_up_proj, .. } => vec![gate_up_proj.clone()],
            Self::PerExpert(experts) => {
                experts.iter().flat_map(|e| [e.gate_proj.clone(), e.up_proj.clone()]).collect()
            }
        }
    }

    /// Tensors whose rows, one after the other, are each expert's down rows: `[E * H, M]`.
    pub fn down(&self) -> Vec<Tensor> {
        match self {
            Self::Fused { down_proj, .. } => vec![down_proj.clone()],
            Self::PerExpert(experts) => experts.iter().map(|e| e.down_proj.clone()).collect(),
        }
    }
}

/// `experts.N.{gate,up,down}_proj.weight`
#[allow(missing_docs)]
#[derive(Debug, Clone)]
pub struct ExpertTriple {
    pub gate_proj: Tensor,
    pub up_proj: Tensor,
    pub down_proj: Tensor,
}

#[cfg(test)]
mod tests;
