//! Activations rounded to e4m3: which products take them so, and where they are rounded to.

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use super::device::{Device, Memory};
use super::ffi;
use super::step::MIN_WIDE_ROWS;
use crate::batch::BatchLimits;
use crate::config::{FfnConfig, ModelConfig};
use crate::weights::form::Form;
use crate::{Error, Result};

/// Inputs of a product with such tokens are a multiple of this.
const MULTIPLE: usize = 128;

/// Steps of so many tokens round, where the number of tokens may matter: fewer gain little by it or lose
/// (`benches/results/h100/fp8_tokens.txt`), and are mostly decoding.
const MIN_ROWS: usize = 256;

/// Whether weights of this form with `k` inputs are multiplied by such tokens, by `cuda/packed_wgmma_launch.cuh`.
pub(super) fn takes(form: Form, k: usize) -> bool {
    k.is_multiple_of(MULTIPLE)
        && match form {
            Form::Fp8Blocks | Form::Fp8Rows => true,
            Form::Int4 { group, zeros, .. } => !zeros && (group == MULTIPLE || group >= k),
            Form::Bf16 | Form::Nvfp4 | Form::Gguf(_) => false,
        }
}

/// Sees that the current device multiplies fp8 by fp8.
///
/// # Errors
/// [`Error::Cuda`] where it does not.
pub(super) fn require() -> Result<()> {
    // SAFETY: asks about the device that is current.
    if unsafe { ffi::q35_has_fp8_tokens(MULTIPLE as c_int) } == 0 {
        return Err(Error::Cuda {
            what: "activation_dtype: found fp8 on a device without products of fp8 by fp8".into(),
            advice: "allowed: auto, or a GPU of compute capability 9.0 (Hopper)".into(),
        });
    }
    Ok(())
}

/// What a model without any such weights says.
pub(super) fn nothing_to_round() -> Error {
    let found = "fp8 for a model without weights in FP8 or in 4-bit integers of groups of 128, or of a row, without zero points";
    Error::request(
        "activation_dtype",
        found,
        "auto, or such weights (quantization=\"fp8\", \"int4\", \"mixed\")",
    )
}

/// Memory for the tokens of any product of a model.
pub(super) struct Rounding {
    memory: Memory,
    min_rows: usize,
}

impl Rounding {
    /// With `deterministic` the number of rows decides nothing. `None` where no step is large enough.
    pub fn new(
        device: &Arc<Device>,
        config: &ModelConfig,
        limits: &BatchLimits,
        moe: Option<ffi::MoeDims>,
        deterministic: bool,
    ) -> Result<Option<Self>> {
        let min_rows = if deterministic { MIN_WIDE_ROWS } else { MIN_ROWS };
        let tokens = limits.max_tokens.max(MIN_WIDE_ROWS);
        if tokens < min_rows {
            return Ok(None);
        }
        let tokens = tokens as i32;
        let width = match config.ffn {
            FfnConfig::Dense { width } => width,
            FfnConfig::Moe { .. } => 0,
        };
        // The MTP module's first product takes two rows side by side.
        let widths = [2 * config.hidden, config.attention.q_width(), config.delta.value_width(), width];
        // SAFETY: these only compute.
        let bytes = unsafe {
            let linears = widths.map(|k| ffi::q35_fp8_token_bytes(tokens, k as i32)).into_iter();
            linears.chain(moe.map(|dims| ffi::q35_fp8_token_moe_bytes(tokens, dims))).max()
        };
        let memory = device.alloc(bytes.and_then(|n| usize::try_from(n).ok()), "activations in fp8")?;
        Ok(Some(Self { memory, min_rows }))
    }

    /// Where a product of `n` rows of `k` elements rounds them; `None` for one that does not.
    pub fn of_linear(&self, n: usize, k: usize) -> Result<Option<*mut c_void>> {
        // SAFETY: only computes.
        self.room(n, unsafe { ffi::q35_fp8_token_bytes(n as c_int, k as c_int) })
    }

    /// The same of a sparse block.
    pub fn of_experts(&self, n: usize, dims: ffi::MoeDims) -> Result<Option<*mut c_void>> {
        // SAFETY: only computes.
        self.room(n, unsafe { ffi::q35_fp8_token_moe_bytes(n as c_int, dims) })
    }

    fn room(&self, n: usize, bytes: i64) -> Result<Option<*mut c_void>> {
        let found = self.memory.bytes();
        match usize::try_from(bytes) {
            _ if n < self.min_rows => Ok(None),
            Ok(bytes) if bytes <= found => Ok(Some(self.memory.ptr())),
            _ => Err(Error::Internal(format!(
                "{bytes} bytes of activations in fp8; there is room for {found}"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_that_take_such_tokens() {
        let int4 = |group, zeros| Form::Int4 { bf16_scales: false, group, zeros };
        assert!(takes(Form::Fp8Blocks, 256) && takes(Form::Fp8Rows, 128));
        assert!(
            takes(int4(128, false), 1024)
                && takes(int4(1024, false), 1024)
                && takes(int4(1 << 30, false), 256)
        );
        assert!(
            !takes(int4(128, true), 1024) && !takes(int4(32, false), 1024) && !takes(int4(256, false), 1024)
        );
        assert!(!takes(Form::Fp8Rows, 192) && !takes(int4(64, false), 64));
        assert!(!takes(Form::Bf16, 256) && !takes(Form::Nvfp4, 256));
    }
}
