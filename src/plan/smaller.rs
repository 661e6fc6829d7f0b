//! What would fit a device that has no room for a model's weights.

use super::layout::AT_LOAD;
use super::room::{GIB, Room};
use super::stored::stored_in;
use super::{Part, PlanOptions, Scheme, part_of};
use crate::batch::PAGE_LEN;
use crate::config::{ModelConfig, Shard};
use crate::ranks::MAX_CARDS;
use crate::weights::quant::Quantization;
use crate::weights::{Checkpoint, ModelTensors};
use crate::{Error, Result};

/// GiB that an engine's buffers take beside weights, slots and pages.
const BUFFERS_GIB: f64 = 0.8;

/// How a model was to be loaded.
struct Load<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    shard: Shard,
    /// Bytes that the device had for it.
    free: usize,
}

/// An error of loading a rank's weights. Where it is that they are too large, it says what would fit so many bytes; every other
/// stays as it is. `quantization` is what the checkpoint was quantised to at load.
pub fn what_fits(
    error: Error,
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    shard: Shard,
    quantization: Option<Quantization>,
    free: Option<usize>,
) -> Error {
    let (Error::OutOfMemory { what, .. }, Some(free)) = (&error, free) else { return error };
    if !what.starts_with("weights") {
        return error;
    }
    let load = Load { checkpoint, config, shard, free };
    load.too_large(quantization).unwrap_or(error)
}

impl Load<'_> {
    fn too_large(&self, quantization: Option<Quantization>) -> Result<Error> {
        let scheme = match quantization {
            Some(to) => to.into(),
            None if self.is_quantised()? => Scheme::Stored,
            None => Scheme::Bf16,
        };
        let bytes = self.bytes(scheme, self.shard.world)?;
        let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / GIB);
        let on = if self.shard.is_whole() { "" } else { " on each device" };
        Ok(Error::OutOfMemory {
            what: format!("weights ({}{on}; the device has {} free)", gib(bytes), gib(self.free as u64)),
            advice: self.advice(scheme, bytes),
        })
    }

    fn advice(&self, scheme: Scheme, bytes: u64) -> String {
        let (world, from) = (self.shard.world, AT_LOAD.iter().position(|&other| other == scheme));
        let smaller = &AT_LOAD[from.map_or(1, |from| from + 1)..];
        let here = smaller.iter().find_map(|&to| self.fitting(to, world).filter(|(n, _)| *n < bytes));
        let shared = (world + 1..=MAX_CARDS).find_map(|world| self.fitting(scheme, world));
        let both = || (world + 1..=MAX_CARDS).find_map(|world| self.fitting(*smaller.last()?, world));
        let ways: Vec<String> = match (here, shared) {
            (None, None) => both().into_iter().map(|(_, way)| way).collect(),
            (here, shared) => here.into_iter().chain(shared).map(|(_, way)| way).collect(),
        };
        let others = "or end what else runs on the device";
        match ways.is_empty() {
            true => format!("take a device with more memory or a smaller model, {others}"),
            false => format!("what would fit: {}; {others}", ways.join(", or ")),
        }
    }

    /// What it takes in a precision on each of so many devices, and its arguments, if it fits.
    fn fitting(&self, scheme: Scheme, world: usize) -> Option<(u64, String)> {
        let part = self.part(world).ok()?;
        let bytes = self.bytes(scheme, world).ok()?;
        let left = self.free as f64 - bytes as f64 - BUFFERS_GIB * GIB;
        let fits = Room::new(left, part.config(), &PlanOptions::default()).max_seqs(PAGE_LEN) > 0;
        let quantization = scheme.quantization().map(|to| format!("quantization=\"{to}\""));
        let size = (world > 1).then(|| format!("tensor_parallel_size={world}"));
        let arguments: Vec<String> = size.into_iter().chain(quantization).collect();
        let each = if world > 1 { " on each device" } else { "" };
        let way = format!("{} ({:.1} GiB{each})", arguments.join(" with "), bytes as f64 / GIB);
        fits.then_some((bytes, way))
    }

    fn part(&self, world: usize) -> Result<Part> {
        let expert_parallel = self.shard.expert_parallel && world > 1;
        part_of(self.config, Shard { rank: 0, world, expert_parallel })
    }

    fn bytes(&self, scheme: Scheme, world: usize) -> Result<u64> {
        let part = self.part(world)?;
        let weights = match scheme {
            Scheme::Stored => stored_in(self.checkpoint, self.config, &part)?,
            scheme => part.weights(scheme).ok_or_else(|| Error::Internal("a scheme without bytes".into()))?,
        };
        Ok(weights.resident)
    }

    fn is_quantised(&self) -> Result<bool> {
        let tensors = ModelTensors::resolve(self.checkpoint, self.config)?;
        Ok(tensors.tensors().any(|tensor| tensor.encoded().is_some()))
    }
}
