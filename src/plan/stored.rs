//! What the weights of a checkpoint that is quantised already come to once they are loaded: counted, tensor by tensor.

use std::path::Path;

use super::{Part, Scheme, WeightBytes};
use crate::Result;
use crate::config::{FfnConfig, ModelConfig};
use crate::weights::quant::{Encoded, Gguf, kept_bytes};
use crate::weights::{Checkpoint, FfnTensors, LayerTensors, ModelTensors, Tensor};

/// The weights in `dir` as a GPU holds them, or as that of a rank holds its part; `config` is the whole model's.
///
/// # Errors
/// As [`Checkpoint::open`] and [`ModelTensors::resolve`].
pub fn stored(dir: &Path, config: &ModelConfig, part: &Part) -> Result<WeightBytes> {
    stored_in(&Checkpoint::open(dir)?, config, part)
}

/// Those of a checkpoint.
pub(super) fn stored_in(checkpoint: &Checkpoint, config: &ModelConfig, part: &Part) -> Result<WeightBytes> {
    let tensors = ModelTensors::resolve(checkpoint, config)?;
    // The same places, whose parts are made without reading anything.
    let shapes = ModelTensors::resolve(&Checkpoint::random(), config)?;
    let head = tensors.lm_head.as_ref().unwrap_or(&tensors.embed_tokens);
    let head = held(&[head], &[&shapes.sharded_head(part.shard())]);
    let whole = |tensor: &Tensor| held(&[tensor], &[tensor]);
    let beside = if part.has_embedding() { whole(&tensors.embed_tokens) } else { 0 };
    let (mut always, mut experts) = (head + whole(&tensors.norm), 0);
    for (layer, shape) in tensors.layers.iter().zip(&shapes.layers) {
        let here = shape.sharded(config, part.shard())?;
        always += layer.rest().into_iter().zip(here.rest()).map(|(t, h)| held(&[t], &[h])).sum::<u64>();
        for (all, own) in experts_of(layer).iter().zip(&experts_of(&here)) {
            experts += held(&Vec::from_iter(all), &Vec::from_iter(own));
        }
    }
    let read = match config.ffn {
        FfnConfig::Moe { num_experts, top_k, .. } => experts / num_experts as u64 * top_k as u64,
        FfnConfig::Dense { .. } => 0,
    };
    Ok(WeightBytes {
        scheme: Scheme::Stored,
        resident: always + experts + beside,
        read_per_token: always + read,
        experts,
    })
}

/// The matrices into the routed experts, and out of them.
fn experts_of(layer: &LayerTensors) -> [Vec<Tensor>; 2] {
    match &layer.ffn {
        FfnTensors::Dense { .. } => Default::default(),
        FfnTensors::Moe { experts, .. } => [experts.gate_up(), experts.down()],
    }
}

/// Bytes of what is `here` of tensors whose rows are of one length: their share of the elements.
fn held(whole: &[&Tensor], here: &[&Tensor]) -> u64 {
    let elements = |tensors: &[&Tensor]| tensors.iter().map(|t| t.num_elements() as u64).sum::<u64>();
    let num_cols = here.first().map_or(0, |tensor| tensor.num_cols());
    let bytes: u64 = whole.iter().map(|tensor| held_in_rows_of(tensor, num_cols)).sum();
    (u128::from(bytes) * u128::from(elements(here)) / u128::from(elements(whole).max(1))) as u64
}

/// Bytes of a tensor whose rows are cut into such as long: codes stay codes where kernels take them, and everything else
/// becomes bf16, also blocks of GGUF that are cut through.
fn held_in_rows_of(tensor: &Tensor, num_cols: usize) -> u64 {
    let bf16 = 2 * tensor.num_elements() as u64;
    match tensor.encoded() {
        Some(Encoded::Int4(_) | Encoded::Fp8(_) | Encoded::Nvfp4(_)) => tensor.num_bytes() as u64,
        Some(Encoded::Gguf(gguf)) => {
            let part = Gguf { num_cols, ..gguf.clone() };
            match kept_bytes(gguf.kind, tensor.num_elements()) {
                _ if !num_cols.is_multiple_of(gguf.kind.block_len()) => bf16,
                Some(bytes) if part.keeps_codes() => bytes.iter().sum::<usize>() as u64,
                None if part.is_int4() => tensor.num_bytes() as u64,
                _ => bf16,
            }
        }
        None => bf16,
    }
}
