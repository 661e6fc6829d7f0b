//! Checkpoints: safetensors and GGUF files, mapped and checked, and the map from their names to the net.

mod ahead;
mod checkpoint;
mod digest;
mod dtype;
mod elements;
pub mod form;
mod gguf;
mod hash;
mod mtp;
mod names;
pub mod quant;
mod random;
pub mod safetensors;
mod shard;
pub mod write;

pub use ahead::{ReadAhead, release_behind};
pub use checkpoint::{Checkpoint, Depth};
pub use dtype::DType;
pub use random::Random;

use std::sync::Arc;

use memmap2::Mmap;

use self::quant::{Encoded, Requantised};
use crate::mapped;

/// One tensor of a checkpoint, still in the mapped file, or of a model of random weights. Cloning copies no data.
///
/// Its elements lie in memory as they are ([`Tensor::bytes`]), or as codes of a quantised matrix ([`Tensor::encoded`]),
/// or are quantised when they are read ([`Tensor::scheme`]); [`Tensor::read_rows`] gives them as numbers whatever they
/// are.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// The checkpoint's name.
    pub name: String,
    /// Element type; F32 where the elements are encoded, or quantised when they are read.
    pub dtype: DType,
    /// Row-major shape, of the elements: `[out, in]` also where codes lie otherwise.
    pub shape: Vec<usize>,
    data: Data,
}

#[derive(Debug, Clone)]
enum Data {
    /// A file, and the tensor's bytes in it.
    Mapped(Arc<Mmap>, std::ops::Range<usize>),
    Random(Arc<Random>),
    /// A small parameter that was stored as something else.
    Owned(Arc<[u8]>),
    /// Codes, scales and zero points, tensors themselves.
    Encoded(Arc<Encoded>),
    /// Another tensor, quantised when it is read.
    Requantised(Arc<Requantised>),
}

impl Tensor {
    /// The raw little-endian elements, `shape.product() * dtype.size()` bytes, maybe unaligned. `None` where they are
    /// encoded, or quantised when they are read.
    pub fn bytes(&self) -> Option<&[u8]> {
        match &self.data {
            Data::Mapped(file, range) => Some(&file[range.clone()]),
            Data::Random(random) => Some(random.bytes()),
            Data::Owned(bytes) => Some(bytes),
            Data::Encoded(_) | Data::Requantised(_) => None,
        }
    }

    /// The codes and what they mean, where the elements are encoded.
    pub fn encoded(&self) -> Option<&Encoded> {
        match &self.data {
            Data::Encoded(encoded) => Some(encoded),
            _ => None,
        }
    }

    /// How it is drawn, where its elements are random.
    pub fn random_elements(&self) -> Option<&Random> {
        match &self.data {
            Data::Random(random) => Some(random),
            _ => None,
        }
    }

    /// Bytes that it is stored in: of an encoded matrix codes, scales and zero points; of one that is quantised when it
    /// is read, those that it then has.
    pub fn num_bytes(&self) -> usize {
        match &self.data {
            Data::Encoded(encoded) => encoded.parts().into_iter().map(Tensor::num_bytes).sum(),
            Data::Mapped(_, range) => range.len(),
            Data::Owned(bytes) => bytes.len(),
            Data::Random(_) => self.num_elements() * self.dtype.size(),
            Data::Requantised(requantised) => requantised.num_bytes(),
        }
    }

    /// What its elements are stored as, by the name that files have for it.
    pub fn type_name(&self) -> &'static str {
        match self.encoded() {
            Some(Encoded::Gguf(gguf)) => gguf.kind.name(),
            _ => self.dtype.name(),
        }
    }

    /// Says that the bytes will hardly be read again: the system may drop them from memory (and reads them from the
    /// file if they are).
    pub fn release(&self) {
        match &self.data {
            Data::Mapped(file, range) => mapped::release(file, range.clone()),
            Data::Random(_) | Data::Owned(_) => {}
            Data::Encoded(encoded) => encoded.parts().into_iter().for_each(Tensor::release),
            Data::Requantised(requantised) => requantised.source().release(),
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

impl ModelTensors {
    /// Every tensor of the text model.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let layers = self.layers.iter().flat_map(LayerTensors::tensors);
        [&self.embed_tokens, &self.norm].into_iter().chain(&self.lm_head).chain(layers)
    }
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

impl MtpTensors {
    /// Every tensor of the module.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.rest().into_iter().chain(self.layer.tensors())
    }

    /// All but its layer's.
    pub fn rest(&self) -> [&Tensor; 4] {
        [&self.fc, &self.pre_fc_norm_embedding, &self.pre_fc_norm_hidden, &self.norm]
    }
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

impl LayerTensors {
    /// Every tensor of the layer: [`LayerTensors::rest`], then [`LayerTensors::experts`].
    pub fn tensors(&self) -> Vec<&Tensor> {
        let mut list = self.rest();
        list.extend(self.experts());
        list
    }

    /// All but the routed experts.
    pub fn rest(&self) -> Vec<&Tensor> {
        let mut list = vec![&self.input_layernorm, &self.post_attention_layernorm];
        list.extend(self.mixer.tensors());
        match &self.ffn {
            FfnTensors::Dense { gate_proj, up_proj, down_proj } => {
                list.extend([gate_proj, up_proj, down_proj])
            }
            FfnTensors::Moe {
                gate,
                experts: _,
                shared_gate_proj,
                shared_up_proj,
                shared_down_proj,
                shared_expert_gate,
            } => {
                list.extend([gate, shared_gate_proj, shared_up_proj, shared_down_proj, shared_expert_gate]);
            }
        }
        list
    }

    /// The routed experts, where there are any.
    pub fn experts(&self) -> Vec<&Tensor> {
        match &self.ffn {
            FfnTensors::Dense { .. } => Vec::new(),
            FfnTensors::Moe { experts: ExpertTensors::Fused { gate_up_proj, down_proj }, .. } => {
                vec![gate_up_proj, down_proj]
            }
            FfnTensors::Moe { experts: ExpertTensors::PerExpert(experts), .. } => {
                experts.iter().flat_map(|e| [&e.gate_proj, &e.up_proj, &e.down_proj]).collect()
            }
        }
    }
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
