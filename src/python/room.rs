//! Whether a machine has room for a model.

use crate::config::{ModelConfig, Shard};
use crate::machine::host;
use crate::plan::{Part, Scheme};
use crate::ranks::{Group, sum_of_host};
use crate::weights::{DType, ModelTensors, Tensor};
use crate::{Error, Result};

/// What a rank takes of its host's memory for good: a file's pages can be given back, this cannot.
pub(super) struct Need {
    what: &'static str,
    bytes: u64,
    advice: &'static str,
}

impl Need {
    /// Of random weights.
    pub fn random(config: &ModelConfig, shard: Shard) -> Result<Self> {
        let weights = Part::new(config, shard)?.weights(Scheme::Bf16);
        let bytes = weights.map_or(0, |bytes| bytes.resident);
        Ok(Self { what: "random weights", bytes, advice: "take a smaller model, or a GPU" })
    }

    /// Of quantised matrices once they are decoded. Ranks have equal shares of all but the embedding.
    pub fn decoded(tensors: &ModelTensors, dtype: Option<DType>, shard: Shard) -> Self {
        let encoded = |t: &&Tensor| t.encoded().is_some() || t.scheme().is_some();
        let bytes = |t: &Tensor| (dtype.unwrap_or(t.dtype).size() * t.num_elements()) as u64;
        let all: u64 = tensors.tensors().filter(encoded).map(bytes).sum();
        let embedding = Some(&tensors.embed_tokens).filter(encoded).map_or(0, bytes);
        let advice = match dtype.unwrap_or(DType::F32).size() {
            4 => "dtype=\"bfloat16\" takes half of that; or take a smaller model, or a GPU",
            _ => "take a smaller model, or a GPU",
        };
        let share = (all - embedding).div_ceil(shard.world as u64);
        Self { what: "decoded matrices", bytes: embedding + share, advice }
    }

    /// Refuses what is more than `room`, with the other ranks of this host. All ranks call it.
    pub fn check(self, group: Option<&dyn Group>, room: Option<u64>) -> Result<()> {
        let bytes = match group {
            Some(group) => sum_of_host(group, &host(), self.bytes)?,
            None => self.bytes,
        };
        match room {
            Some(room) if bytes > room => Err(Error::OutOfMemory {
                what: format!("{} ({bytes} bytes; the machine has {room} available)", self.what),
                advice: self.advice.into(),
            }),
            _ => Ok(()),
        }
    }
}
