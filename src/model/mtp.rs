//! The multi-token-prediction module: drafts token t + 2 from the hidden state of token t and from token t + 1, through
//! one decoder layer with pages of its own. It is loaded only where it is asked for, and runs after a forward.

use super::{Layer, Memory, Model, Net, Workspace};
use crate::backend::Backend;
use crate::batch::{Batch, DraftBatch};
use crate::config::LayerKind;
use crate::weights::{DType, MtpTensors};
use crate::{Error, Result};

/// Its weights; embedding and head are the model's.
pub(super) struct Mtp<B: Backend> {
    embedding_norm: B::Vector,
    hidden_norm: B::Vector,
    /// `[hidden, 2 * hidden]`, over embedding and hidden state
    fc: B::Linear,
    pub(super) layer: Layer<B>,
    norm: B::Vector,
}

impl<B: Backend> Mtp<B> {
    /// `index` as of an attention layer.
    pub(super) fn load(
        tensors: MtpTensors,
        index: usize,
        net: Net<'_, B>,
        dtype: Option<DType>,
    ) -> Result<Self> {
        let (config, b) = (net.config, net.backend);
        Ok(Self {
            embedding_norm: b.vector(&tensors.pre_fc_norm_embedding, 1.0)?,
            hidden_norm: b.vector(&tensors.pre_fc_norm_hidden, 1.0)?,
            fc: b.linear_weight(&[tensors.fc], dtype)?,
            layer: Layer::load(tensors.layer, index, (config, net.shard), dtype, b)?,
            norm: b.vector(&tensors.norm, 1.0)?,
        })
    }

    /// What its layer reads, to `residual`: the embeddings of the batch's tokens beside those rows of `hidden`.
    pub(super) fn inputs(
        &self,
        net: Net<'_, B>,
        embed: &B::Linear,
        batch: &Batch,
        rows: &[usize],
        w: &mut Workspace<B>,
    ) {
        let (n, eps, b) = (batch.num_tokens(), net.config.rms_eps, net.backend);
        b.embed(batch, embed, &mut w.residual);
        b.rmsnorm_residual(n, None, &mut w.residual, &self.embedding_norm, eps, &mut w.block);
        b.gather(rows, &w.hidden, &mut w.residual);
        b.rmsnorm_residual(n, None, &mut w.residual, &self.hidden_norm, eps, &mut w.normed);
        b.concat(n, &w.block, &w.normed, &mut w.pair);
        b.linear(n, &w.pair, &self.fc, &mut w.residual);
    }
}

impl<B: Backend> Model<B> {
    /// Loads the module too, of which `tensors` are this rank's part; `dtype` as in [`Model::load`]. Memory and workspaces made afterwards have room for it.
    ///
    /// # Errors
    /// Whatever the backend says of memory.
    pub fn with_mtp(mut self, tensors: MtpTensors, dtype: Option<DType>) -> Result<Self> {
        // Its pages come after those of the model's layers.
        let index = self.config.num_layers_of(LayerKind::Attention);
        self.mtp = Some(Mtp::load(tensors, index, self.net(), dtype)?);
        Ok(self)
    }

    /// Whether the module is loaded.
    pub fn has_mtp(&self) -> bool {
        self.mtp.is_some()
    }

    /// Layers that hold keys and values, the module's included.
    pub fn num_kv_layers(&self) -> usize {
        self.config.num_layers_of(LayerKind::Attention) + usize::from(self.has_mtp())
    }

    /// Runs the module over the hidden states that [`Model::forward`] left, and puts its own in their place: for those
    /// rows [`Model::compute_logits`] then gives the drafts. Each token's keys and values must be written in the order of its
    /// sequence, as in a forward. `poll` is called once, before anything is done, and may end the step.
    ///
    /// # Errors
    /// What `poll` returned; `Internal` where the module is not loaded.
    pub fn forward_mtp(
        &self,
        drafts: &DraftBatch,
        memory: &mut Memory<B>,
        w: &mut Workspace<B>,
        poll: impl Fn() -> Result<()>,
    ) -> Result<()> {
        let mtp = self.mtp.as_ref().ok_or_else(|| Error::Internal("drafts without the MTP module".into()))?;
        let (batch, rows, eps, b) = (&drafts.batch, &drafts.hidden_rows, self.config.rms_eps, &self.backend);
        let n = batch.num_tokens();
        poll()?;
        // The layer below works in `normed`, so what the forward left there waits in `hidden`.
        std::mem::swap(&mut w.normed, &mut w.hidden);
        b.begin(batch);
        mtp.inputs(self.net(), &self.embed, batch, rows, w);
        b.rmsnorm_residual(n, None, &mut w.residual, &mtp.layer.input_norm, eps, &mut w.normed);
        self.net().layer(&mtp.layer, batch, None, Some(&mtp.norm), memory, w);
        b.scatter(rows, &w.normed, &mut w.hidden);
        std::mem::swap(&mut w.normed, &mut w.hidden);
        b.check()
    }
}
