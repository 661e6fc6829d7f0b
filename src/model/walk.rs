//! The net one layer at a time, over sequences of one length: what reads a layer's inputs needs no more weights in
//! memory than that layer's, and the residual stream of every sequence. The layers are those of the forward.

use super::mtp::Mtp;
use super::{Ffn, Layer, Memory, Mixer, Net, Workspace};
use crate::Result;
use crate::backend::{Backend, Caches, Precision, Rope};
use crate::batch::{Batch, BatchLimits, BatchSeq, PAGE_LEN, PageId, SlotId};
use crate::config::{ModelConfig, Shard};
use crate::weights::{LayerTensors, MtpTensors, Tensor};

/// What a matrix of a layer is multiplied with: f32 rows, one for each token of a sequence.
pub enum Input<'a, B: Backend> {
    /// Of the projections into the mixer: `[tokens, hidden]`.
    Mixer(&'a [f32]),
    /// Of the projection out of it: `[tokens, query or value width]`.
    MixerOut(&'a [f32]),
    /// Of gate and up, of routed and shared experts alike: `[tokens, hidden]`. With the scratch memory of the experts
    /// that have run on it.
    Ffn(&'a [f32], &'a B::Scratch),
    /// Of the down projection of a dense model: `[tokens, width]`.
    Down(&'a [f32]),
}

/// Sequences on their way through the layers.
pub struct Walk<'a, B: Backend> {
    config: &'a ModelConfig,
    rope: Rope,
    backend: B,
    embed: B::Linear,
    sequences: Vec<Batch>,
    /// Of each sequence.
    residuals: Vec<B::Buf>,
    w: Workspace<B>,
}

impl<'a, B: Backend> Walk<'a, B> {
    /// Starts `sequences`, all of one length, at the embedding. Ids are below the model's vocabulary.
    ///
    /// # Errors
    /// Whatever the backend says of memory.
    pub fn new(
        config: &'a ModelConfig,
        embed_tokens: &Tensor,
        sequences: &[&[u32]],
        backend: B,
    ) -> Result<Self> {
        let len = sequences.iter().map(|ids| ids.len()).max().unwrap_or(0);
        let limits =
            BatchLimits { max_tokens: len, max_seqs: 1, max_len: len, max_pages: len.div_ceil(PAGE_LEN) };
        let embed = backend.table_weight(embed_tokens, None)?;
        let rope = Rope::new(&config.rope);
        let net =
            Net { config, shard: Shard::whole(), caches: Caches::default(), rope: &rope, backend: &backend };
        let w = net.workspace(&limits, config.num_mtp_layers > 0)?;
        let sequences: Vec<Batch> = sequences.iter().map(|ids| sequence(ids)).collect();
        let mut residuals = Vec::with_capacity(sequences.len());
        for batch in &sequences {
            let mut residual = backend.buf(len, config.hidden, Precision::Full)?;
            backend.begin(batch);
            backend.embed(batch, &embed, &mut residual);
            residuals.push(residual);
        }
        Ok(Self { config, rope, backend, embed, sequences, residuals, w })
    }

    /// Takes every sequence through the next layer, and shows what its matrices are multiplied with. `see` is called at
    /// least three times a sequence, and may end it; nothing is to be asked of it then.
    ///
    /// # Errors
    /// What `see` returned, and whatever the backend says.
    pub fn layer(
        &mut self,
        tensors: &LayerTensors,
        see: impl FnMut(Input<'_, B>) -> Result<()>,
    ) -> Result<()> {
        let layer = Layer::load(tensors.clone(), 0, (self.config, Shard::whole()), None, &self.backend)?;
        self.run(&layer, see)
    }

    /// As [`Walk::layer`], after the last one: the layer of the multi-token-prediction module, over one token less.
    ///
    /// # Errors
    /// As [`Walk::layer`].
    pub fn module(
        &mut self,
        norm: &Tensor,
        tensors: &MtpTensors,
        see: impl FnMut(Input<'_, B>) -> Result<()>,
    ) -> Result<()> {
        let Self { config, rope, backend: b, embed, sequences, residuals, w } = self;
        let net = Net { config, shard: Shard::whole(), caches: Caches::default(), rope, backend: &*b };
        let mtp = Mtp::load(tensors.clone(), 0, net, None)?;
        let norm = b.vector(norm, 1.0)?;
        for (batch, residual) in sequences.iter_mut().zip(residuals) {
            let n = batch.num_tokens();
            b.rmsnorm_residual(n, None, residual, &norm, config.rms_eps, &mut w.hidden);
            *batch = sequence(&batch.token_ids[1..]);
            let rows: Vec<usize> = (0..n - 1).collect();
            b.begin(batch);
            std::mem::swap(&mut w.residual, residual);
            mtp.inputs(net, embed, batch, &rows, w);
            std::mem::swap(&mut w.residual, residual);
        }
        self.run(&mtp.layer, see)
    }

    fn run(&mut self, layer: &Layer<B>, mut see: impl FnMut(Input<'_, B>) -> Result<()>) -> Result<()> {
        let Self { config, rope, backend: b, sequences, residuals, w, .. } = self;
        let (net, eps) = (
            Net { config, shard: Shard::whole(), caches: Caches::default(), rope, backend: &*b },
            config.rms_eps,
        );
        let mut memory = Memory { pages: Vec::new(), slots: Vec::new() };
        let num_pages = sequences.iter().map(|batch| batch.pages.len()).max().unwrap_or(0);
        net.memory(layer, num_pages, 1, &mut memory)?;
        for (batch, residual) in sequences.iter().zip(residuals) {
            let n = batch.num_tokens();
            std::mem::swap(&mut w.residual, residual);
            memory.slots.iter_mut().for_each(|slots| b.clear_slot(slots, 0));
            b.begin(batch);
            b.rmsnorm_residual(n, None, &mut w.residual, &layer.input_norm, eps, &mut w.normed);
            see(Input::Mixer(&b.read(&mut w.normed, n)))?;
            // Without a norm that comes next the inputs are left where they were read.
            net.layer(layer, batch, None, None, &mut memory, w);
            let out = match layer.mixer {
                Mixer::Attention { .. } => &mut w.attended,
                Mixer::Delta { .. } => &mut w.core,
            };
            see(Input::MixerOut(&b.read(out, n)))?;
            see(Input::Ffn(&b.read(&mut w.normed, n), &w.scratch))?;
            if matches!(layer.ffn, Ffn::Dense { .. }) {
                see(Input::Down(&b.read(&mut w.act, n)))?;
            }
            // Adds the change; what is normed here is not used.
            b.rmsnorm_residual(n, Some(&w.block), &mut w.residual, &layer.input_norm, eps, &mut w.normed);
            std::mem::swap(&mut w.residual, residual);
        }
        b.check()
    }
}

/// A whole sequence as a batch, in pages and the slot from the first on.
fn sequence(ids: &[u32]) -> Batch {
    let len = ids.len();
    let seq = BatchSeq {
        query_start: 0,
        query_len: len,
        cached_len: 0,
        chunked_len: len,
        slot: SlotId(0),
        page_start: 0,
    };
    Batch {
        token_ids: ids.to_vec(),
        positions: (0..len as u32).map(|t| [t; 3]).collect(),
        seqs: vec![seq],
        pages: (0..len.div_ceil(PAGE_LEN) as u32).map(PageId).collect(),
        ..Batch::default()
    }
}

#[cfg(test)]
mod tests;
