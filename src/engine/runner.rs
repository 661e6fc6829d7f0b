//! A model and what its steps need, alone or as rank 0 of several; and the other ranks, which do as rank 0 orders. What
//! they all do, they do in the same order.

use std::borrow::Cow;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::told::{Told, ToldBatch, ToldDrafts, ToldSampling, sampling, shorten_sampling};
use crate::backend::{Backend, Sampled, Sampling};
use crate::batch::{Batch, BatchLimits, DraftBatch, SlotId};
use crate::lend::Lendable;
use crate::model::{Memory, Model, Workspace};
use crate::ranks::{self, Group};
use crate::{Error, Result};

/// What rank 0 has the others do, beside it.
#[derive(Serialize, Deserialize)]
pub(super) enum Order<'a> {
    /// [`Model::workspace`]
    Workspace(BatchLimits),
    /// [`Model::memory`]
    Memory(usize, usize),
    /// [`Model::clear_slot`] of each
    Clear(Cow<'a, [SlotId]>),
    /// [`Model::forward`]
    Forward(ToldBatch<'a>),
    /// [`Model::forward_mtp`]
    Drafts(ToldDrafts<'a>),
    /// [`Model::launch_sampled`], with the number of tokens that exist
    Launch(ToldBatch<'a>, Vec<ToldSampling<'a>>, usize),
    /// [`Backend::sampled`]
    Sampled,
    /// [`Model::compute_logits`]
    Logits(Cow<'a, [usize]>, Option<(usize, usize)>),
}

impl Order<'_> {
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        postcard::to_stdvec(self).map_err(|e| Error::Internal(format!("an order: {e}")))
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self> {
        postcard::from_bytes(bytes).map_err(|_| ranks::lost("rank 0 is another version of qwen35rs"))
    }
}

/// A model that is loaded, before its memory is made.
pub(super) struct Loaded<B: Backend> {
    pub model: Model<B>,
    group: Option<Arc<dyn Group>>,
}

/// A model with its memory.
pub(super) struct Runner<B: Backend> {
    loaded: Loaded<B>,
    memory: Memory<B>,
    workspace: Workspace<B>,
    told: Told,
}

impl<B: Backend> Loaded<B> {
    pub fn new(model: Model<B>, group: Option<Arc<dyn Group>>) -> Self {
        Self { model, group }
    }

    fn order(&self, order: impl FnOnce() -> Order<'static>) -> Result<()> {
        self.send(|| order().to_bytes())
    }

    fn send(&self, order: impl FnOnce() -> Result<Vec<u8>>) -> Result<()> {
        self.group.as_ref().map_or(Ok(()), |group| group.send(&order()?))
    }

    /// Of the rank that has least.
    pub fn free_memory(&self) -> Result<Option<usize>> {
        let free = self.model.backend().free_memory()?;
        self.group.as_ref().map_or(Ok(free), |group| ranks::least(group.as_ref(), free))
    }

    pub fn workspace(&self, limits: &BatchLimits) -> Result<Workspace<B>> {
        self.order(|| Order::Workspace(*limits))?;
        self.model.workspace(limits)
    }

    /// Memory of every rank; none is left without.
    pub fn with_memory(
        self,
        num_pages: usize,
        num_slots: usize,
        workspace: Workspace<B>,
    ) -> Result<Runner<B>> {
        self.order(|| Order::Memory(num_pages, num_slots))?;
        let memory = self.model.memory(num_pages, num_slots)?;
        self.all_there()?;
        Ok(Runner { loaded: self, memory, workspace, told: Told::default() })
    }

    /// Tells the other ranks why this one ends, and waits for them no more.
    fn fail(&self, why: &str) {
        if let Some(group) = &self.group {
            group.fail(why);
            self.model.backend().give_up();
        }
    }

    fn all_there(&self) -> Result<()> {
        self.group.as_ref().map_or(Ok(()), |group| group.exchange(&[], true).map(drop))
    }
}

impl<B: Backend> Runner<B> {
    pub fn model(&self) -> &Model<B> {
        &self.loaded.model
    }

    pub fn is_alone(&self) -> bool {
        self.loaded.group.is_none()
    }

    /// Tells the other ranks why this one ends, which is not in order.
    pub fn fail(&self, why: &str) {
        self.loaded.fail(why);
    }

    /// What may end a step: among ranks only before it has begun, for none may leave the others alone.
    fn poll<'a>(&self, poll: impl Fn() -> Result<()> + 'a) -> Result<impl Fn() -> Result<()> + 'a> {
        let alone = self.is_alone();
        if !alone {
            poll()?;
        }
        Ok(move || if alone { poll() } else { Ok(()) })
    }

    pub fn clear_slots(&mut self, slots: &[SlotId]) -> Result<()> {
        if slots.is_empty() {
            return Ok(());
        }
        self.loaded.send(|| Order::Clear(slots.into()).to_bytes())?;
        slots.iter().for_each(|slot| self.loaded.model.clear_slot(&mut self.memory, slot.0 as usize));
        Ok(())
    }

    pub fn forward(&mut self, batch: &Batch, poll: impl Fn() -> Result<()>) -> Result<()> {
        let poll = self.poll(poll)?;
        self.loaded.send(|| Order::Forward(self.told.shorten(batch)).to_bytes())?;
        self.loaded.model.forward(batch, &mut self.memory, &mut self.workspace, poll)
    }

    pub fn forward_mtp(&mut self, drafts: &DraftBatch, poll: impl Fn() -> Result<()>) -> Result<()> {
        let poll = self.poll(poll)?;
        self.loaded.send(|| Order::Drafts(self.told.shorten_drafts(drafts)).to_bytes())?;
        self.loaded.model.forward_mtp(drafts, &mut self.memory, &mut self.workspace, poll)
    }

    pub fn launch_sampled(
        &mut self,
        batch: &Batch,
        rows: &[Sampling],
        num_tokens: usize,
        poll: impl Fn() -> Result<()>,
    ) -> Result<()> {
        let poll = self.poll(poll)?;
        let Self { loaded, memory, workspace, told } = self;
        loaded.send(|| Order::Launch(told.shorten(batch), shorten_sampling(rows), num_tokens).to_bytes())?;
        loaded.model.launch_sampled(batch, rows, num_tokens, memory, workspace, poll)
    }

    /// The tokens of the oldest launch that was not asked for yet: every rank has chosen the same.
    pub fn sampled(&self) -> Result<Vec<Sampled>> {
        self.loaded.order(|| Order::Sampled)?;
        self.model().backend().sampled()
    }

    pub fn logits(&mut self, rows: &[usize], top: Option<(usize, usize)>) -> Result<Cow<'_, [f32]>> {
        self.compute_logits(rows, top)?;
        let logits = self.loaded.model.read_logits(rows.len(), &mut self.workspace);
        self.loaded.model.backend().check()?;
        Ok(logits)
    }

    pub fn lend_logits(&mut self, rows: &[usize], to: &dyn Lendable, at: usize) -> Result<()> {
        self.compute_logits(rows, None)?;
        self.loaded.model.lend_logits(rows.len(), to, at, &self.workspace)
    }

    fn compute_logits(&mut self, rows: &[usize], top: Option<(usize, usize)>) -> Result<()> {
        self.loaded.send(|| Order::Logits(rows.into(), top).to_bytes())?;
        self.loaded.model.compute_logits(rows, top, &mut self.workspace);
        Ok(())
    }
}

impl<B: Backend> Drop for Runner<B> {
    fn drop(&mut self) {
        // Giving memory back takes its time, in which the process may end.
        if let Some(group) = &self.loaded.group {
            group.end();
        }
    }
}

/// What every rank but 0 does, until rank 0 ends.
///
/// # Errors
/// What its device says, and where the ranks lose each other.
pub fn follow<B: Backend>(model: Model<B>, group: Arc<dyn Group>) -> Result<()> {
    let loaded = Loaded::new(model, Some(Arc::clone(&group)));
    let mut room = Room { memory: None, workspace: None, told: Told::default() };
    // The others know before what they may write to is given back.
    match catch_unwind(AssertUnwindSafe(|| obey(&loaded, group.as_ref(), &mut room))) {
        Ok(end) => end.inspect_err(|error| loaded.fail(&error.to_string())),
        Err(panic) => {
            loaded.fail("it panicked");
            resume_unwind(panic)
        }
    }
}

/// A rank's, once it has been ordered.
struct Room<B: Backend> {
    memory: Option<Memory<B>>,
    workspace: Option<Workspace<B>>,
    told: Told,
}

fn obey<B: Backend>(loaded: &Loaded<B>, group: &dyn Group, room: &mut Room<B>) -> Result<()> {
    let model = &loaded.model;
    let early = || ranks::lost("rank 0 ordered a step before its memory");
    loaded.free_memory()?;
    while let Some(bytes) = group.receive()? {
        match Order::from_bytes(&bytes)? {
            Order::Workspace(limits) => {
                room.workspace = Some(model.workspace(&limits)?);
                loaded.free_memory()?;
            }
            Order::Memory(num_pages, num_slots) => {
                room.memory = Some(model.memory(num_pages, num_slots)?);
                loaded.all_there()?;
            }
            Order::Sampled => drop(model.backend().sampled()?),
            order => {
                let Room { memory: Some(memory), workspace: Some(w), told } = room else {
                    return Err(early());
                };
                step(model, order, memory, w, told)?;
            }
        }
    }
    Ok(())
}

fn step<B: Backend>(
    model: &Model<B>,
    order: Order<'_>,
    memory: &mut Memory<B>,
    w: &mut Workspace<B>,
    told: &mut Told,
) -> Result<()> {
    let go_on = || Ok(());
    match order {
        Order::Clear(slots) => {
            slots.iter().for_each(|slot| model.clear_slot(memory, slot.0 as usize));
            Ok(())
        }
        Order::Forward(batch) => model.forward(&told.batch(batch)?, memory, w, go_on),
        Order::Drafts(drafts) => model.forward_mtp(&told.drafts(drafts)?, memory, w, go_on),
        Order::Launch(batch, rows, num_tokens) => {
            let (batch, rows) = (told.batch(batch)?, sampling(rows)?);
            model.launch_sampled(&batch, &rows, num_tokens, memory, w, go_on)
        }
        Order::Logits(rows, top) => {
            model.compute_logits(&rows, top, w);
            model.backend().check()
        }
        Order::Workspace(_) | Order::Memory(..) | Order::Sampled => Ok(()),
    }
}
