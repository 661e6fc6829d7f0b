//! The names of the multi-token-prediction module. It is optional: a model runs without it, so nothing here is looked
//! at unless the module is wanted.

use super::names::{MTP_PREFIX, Resolver};
use super::{Checkpoint, MtpTensors};
use crate::config::{LayerKind, ModelConfig};
use crate::{Error, Result};

impl MtpTensors {
    /// Finds every tensor of the module, and checks shape and dtype of each. Its experts may be fused or one by one,
    /// whatever those of the model are.
    ///
    /// # Errors
    /// `Config` where `config` declares no module. `Tensor` where the checkpoint has none, and for the first tensor of
    /// it that is missing, misshapen, of a dtype that does not load, or not part of it; its text says how many more
    /// there are.
    pub fn resolve(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Self> {
        if config.num_mtp_layers == 0 {
            let field = if checkpoint.is_gguf() { "nextn_predict_layers" } else { "mtp_num_hidden_layers" };
            return Err(Error::config(field, 0, "1, where the MTP module is wanted"));
        }
        let of_module = || checkpoint.iter().filter(|tensor| checkpoint.is_of_mtp(tensor));
        if of_module().next().is_none() && !checkpoint.is_random() {
            return Err(Error::Tensor {
                name: format!("{MTP_PREFIX}*"),
                found: "nothing".into(),
                expected: "the multi-token-prediction module: this checkpoint was saved without it".into(),
            });
        }
        let mut resolver = Resolver::new(checkpoint, config);
        let tensors = resolver.mtp(config);
        of_module().for_each(|tensor| resolver.note_unless_taken(tensor));
        match (tensors, resolver.into_error()) {
            (_, Some(error)) => Err(error),
            (Some(tensors), None) => Ok(tensors),
            (None, None) => Err(Error::Internal("a tensor is missing and no problem was noted".to_string())),
        }
    }
}

impl Resolver<'_> {
    fn mtp(&mut self, config: &ModelConfig) -> Option<MtpTensors> {
        let hidden = config.hidden;
        let mut take = |name: &str, shape: &[usize]| self.take(format!("{MTP_PREFIX}{name}.weight"), shape);
        let fc = take("fc", &[hidden, 2 * hidden]);
        let pre_fc_norm_embedding = take("pre_fc_norm_embedding", &[hidden]);
        let pre_fc_norm_hidden = take("pre_fc_norm_hidden", &[hidden]);
        let norm = take("norm", &[hidden]);
        let layer = self.layer(config, LayerKind::Attention, &format!("{MTP_PREFIX}layers.0."));
        Some(MtpTensors {
            fc: fc?,
            pre_fc_norm_embedding: pre_fc_norm_embedding?,
            pre_fc_norm_hidden: pre_fc_norm_hidden?,
            layer: layer?,
            norm: norm?,
        })
    }
}

#[cfg(test)]
mod tests;
