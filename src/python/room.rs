//! Whether a machine has room for a model.

use crate::weights::{DType, ModelTensors, Tensor};
use crate::{Error, Result};

/// Refuses quantised matrices that are more than there is room for once they are decoded: a file's pages can be given
/// back, those cannot.
pub(super) fn check_decoded(tensors: &ModelTensors, dtype: Option<DType>, room: Option<u64>) -> Result<()> {
    let size = dtype.unwrap_or(DType::F32).size();
    let encoded = tensors.tensors().filter(|t| t.encoded().is_some() || t.scheme().is_some());
    let bytes = |tensor: &Tensor| (dtype.unwrap_or(tensor.dtype).size() * tensor.num_elements()) as u64;
    let bytes: u64 = encoded.map(bytes).sum();
    match room {
        Some(room) if bytes > room => Err(Error::OutOfMemory {
            what: format!("decoded matrices ({bytes} bytes; the machine has {room} available)"),
            advice: match size {
                4 => "dtype=\"bfloat16\" takes half of that; or take a smaller model, or a GPU".into(),
                _ => "take a smaller model, or a GPU".into(),
            },
        }),
        _ => Ok(()),
    }
}
