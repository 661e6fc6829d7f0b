//! What the weights of a checkpoint that is quantised already come to once they are loaded: counted, tensor by tensor.

use std::path::Path;

use super::{Scheme, WeightBytes};
use crate::Result;
use crate::config::ModelConfig;
use crate::weights::quant::Encoded;
use crate::weights::{Checkpoint, ModelTensors, Tensor};

/// The weights in `dir` as a GPU holds them.
///
/// # Errors
/// As [`Checkpoint::open`] and [`ModelTensors::resolve`].
pub fn stored(dir: &Path, config: &ModelConfig) -> Result<WeightBytes> {
    let tensors = ModelTensors::resolve(&Checkpoint::open(dir)?, config)?;
    let resident = tensors.tensors().map(held).sum();
    Ok(WeightBytes { scheme: Scheme::Stored, resident, read_per_token: tensors.per_token(config, held) })
}

/// Codes stay codes where kernels take them; everything else becomes bf16.
fn held(tensor: &Tensor) -> u64 {
    match tensor.encoded() {
        Some(Encoded::Int4(_) | Encoded::Fp8(_) | Encoded::Nvfp4(_)) => tensor.num_bytes() as u64,
        Some(Encoded::Gguf(gguf)) if gguf.is_int4() => tensor.num_bytes() as u64,
        _ => 2 * tensor.num_elements() as u64,
    }
}
