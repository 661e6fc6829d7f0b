//! Which tokens of which requests run next. Pure policy: no device, no data.
//!
//! Oldest first. Every running request that waits for one token gets it; prefill shares what
//! `max_prefill_tokens` leaves. Where pages run out, the youngest request gives all of its own back and is
//! computed again later.

use std::collections::VecDeque;

use crate::batch::{Batch, BatchSeq, CHUNK_LEN, DraftBatch, SlotId};
use crate::cache::{Cache, pages_for};
use crate::request::{Request, RequestId, Wanted};

/// Requests and the accounts of their memory.
#[derive(Debug)]
pub struct Scheduler {
    /// Requests that hold a slot, oldest first.
    running: Vec<Request>,
    /// Requests that hold nothing, oldest first.
    waiting: VecDeque<Request>,
    cache: Cache,
    max_prefill_tokens: usize,
    max_seqs: usize,
}

/// What runs in one step.
#[derive(Debug, Default)]
pub struct Step {
    /// The batch; its `seqs` and `requests` go together.
    pub batch: Batch,
    /// What the MTP module computes after it; empty for most steps.
    pub drafts: DraftBatch,
    /// Whose sequences they are.
    pub requests: Vec<RequestId>,
    /// The request of each of the batch's `logit_rows`.
    pub logit_owners: Vec<RequestId>,
    /// Slots that were given out in this step and hold an old state.
    pub new_slots: Vec<SlotId>,
}

impl Scheduler {
    /// `max_prefill_tokens` is at least [`CHUNK_LEN`].
    pub fn new(cache: Cache, max_prefill_tokens: usize, max_seqs: usize) -> Self {
        let max_prefill_tokens = max_prefill_tokens.max(CHUNK_LEN);
        Self { running: Vec::new(), waiting: VecDeque::new(), cache, max_prefill_tokens, max_seqs }
    }

    /// Queues a request.
    pub fn add(&mut self, request: Request) {
        self.wait(request);
    }

    /// Whether nothing is left to do.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// A request that runs.
    pub fn running(&self, id: RequestId) -> Option<&Request> {
        self.running.iter().find(|r| r.id == id)
    }

    /// A request that runs.
    pub fn running_mut(&mut self, id: RequestId) -> Option<&mut Request> {
        self.running.iter_mut().find(|r| r.id == id)
    }

    /// Takes a request out and its memory back.
    pub fn remove(&mut self, id: RequestId) -> Option<Request> {
        if let Some(i) = self.waiting.iter().position(|r| r.id == id) {
            return self.waiting.remove(i);
        }
        let i = self.running.iter().position(|r| r.id == id)?;
        let mut request = self.running.remove(i);
        let logits = std::mem::take(&mut request.logits);
        self.cache.release(&mut request);
        request.logits = logits;
        Some(request)
    }

    /// Reserves memory for the next step and lists its tokens. Changes no request but its reservations.
    pub fn schedule(&mut self) -> Step {
        let mut step = Step::default();
        let mut prefill_left = self.max_prefill_tokens;
        let mut i = 0;
        while i < self.running.len() {
            let len = next_len(&self.running[i], prefill_left);
            if len > 0 {
                if !self.make_room(i, len, &mut step) {
                    break; // request i itself was sent back, and with it all younger ones
                }
                self.push(i, len, &mut step, &mut prefill_left);
            }
            i += 1;
        }
        while let Some(request) = self.waiting.front_mut() {
            let len = next_len(request, prefill_left);
            if self.running.len() >= self.max_seqs || len == 0 {
                break;
            }
            let Some(new_slot) = self.cache.reserve(request, len) else { break };
            debug_assert!(new_slot);
            let Some(request) = self.waiting.pop_front() else { break };
            step.new_slots.extend(request.slot);
            let i = self.running.partition_point(|r| r.id < request.id);
            self.running.insert(i, request);
            self.push(i, len, &mut step, &mut prefill_left);
        }
        step
    }

    /// Reserves for request `i`, sending back younger requests (last first, then `i` itself) until it fits.
    fn make_room(&mut self, i: usize, len: usize, step: &mut Step) -> bool {
        loop {
            let upto = self.running[i].computed_len + len;
            match self.cache.reserve(&mut self.running[i], upto) {
                Some(new_slot) => {
                    step.new_slots.extend(self.running[i].slot.filter(|_| new_slot));
                    return true;
                }
                None => {
                    let Some(mut youngest) = self.running.pop() else { return false };
                    self.cache.release(&mut youngest);
                    self.wait(youngest);
                    if i == self.running.len() {
                        return false;
                    }
                }
            }
        }
    }

    fn push(&self, i: usize, len: usize, step: &mut Step, prefill_left: &mut usize) {
        let (r, batch) = (&self.running[i], &mut step.batch);
        let (start, end) = (r.computed_len, r.computed_len + len);
        if len > 1 {
            *prefill_left -= len;
        }
        let query_start = batch.token_ids.len();
        batch.seqs.push(BatchSeq {
            query_start,
            query_len: len,
            cached_len: start,
            chunked_len: r.num_prompt.saturating_sub(start).min(len),
            slot: r.slot.unwrap_or(SlotId(u32::MAX)),
            page_start: batch.pages.len(),
        });
        batch.pages.extend_from_slice(&r.pages);
        batch.token_ids.extend_from_slice(&r.tokens[start..end]);
        batch.positions.extend((start..end).map(|p| [p as u32; 3]));
        let first_row = batch.logit_rows.len();
        match r.wanted {
            Wanted::Tokens(_) if !r.samples_at(end) => {}
            Wanted::Tokens(_) => batch.logit_rows.push(query_start + len - 1),
            Wanted::Logits | Wanted::DeviceLogits => batch.logit_rows.extend(query_start..query_start + len),
            Wanted::MtpLogits => {
                // The last token has none after it, and so no draft.
                let drafted = end.min(r.num_logit_rows()) - start;
                batch.logit_rows.extend(query_start..query_start + drafted);
                step.drafts.hidden_rows.extend(first_row..first_row + drafted);
                push_drafts(r, start, drafted, &mut step.drafts.batch);
            }
        }
        step.logit_owners.resize(batch.logit_rows.len(), r.id);
        step.requests.push(r.id);
    }

    /// Whether the next step is one token of each of these requests, in this order, and nothing else: all they have is
    /// computed, no other request is there, and none has to give way.
    pub fn is_lockstep(&self, requests: &[RequestId]) -> bool {
        let missing = |r: &Request| pages_for(r.tokens.len() + 1).saturating_sub(r.pages.len());
        self.waiting.is_empty()
            && self.running.iter().map(|r| &r.id).eq(requests)
            && self.running.iter().all(|r| r.computed_len == r.tokens.len())
            && self.running.iter().map(missing).sum::<usize>() <= self.cache.num_free_pages()
    }

    /// Keeps what the step computed: its tokens now count as computed.
    pub fn commit(&mut self, step: &Step) {
        for (id, seq) in step.requests.iter().zip(&step.batch.seqs) {
            if let Some(r) = self.running_mut(*id) {
                r.computed_len += seq.query_len;
            }
        }
    }

    /// Takes back what a failed step reserved: its states are undefined, so its requests start over.
    pub fn abort(&mut self, requests: &[RequestId]) {
        while let Some(i) = self.running.iter().rposition(|r| requests.contains(&r.id)) {
            let mut request = self.running.remove(i);
            self.cache.release(&mut request);
            self.wait(request);
        }
    }

    /// Queues a request that holds nothing, by age.
    fn wait(&mut self, request: Request) {
        let i = self.waiting.partition_point(|r| r.id < request.id);
        self.waiting.insert(i, request);
    }

    /// Every page and slot has exactly one owner, and requests are in order.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check_integrity(&self) -> Result<(), String> {
        if !self.running.is_sorted_by_key(|r| r.id) || !self.waiting.iter().is_sorted_by_key(|r| r.id) {
            return Err("requests out of order".into());
        }
        if let Some(r) = self.waiting.iter().find(|r| r.slot.is_some() || !r.pages.is_empty()) {
            return Err(format!("{:?} waits and holds memory", r.id));
        }
        self.cache.check_integrity(self.running.iter())
    }
}

/// The draft of each of a request's tokens `[start, start + len)`.
fn push_drafts(r: &Request, start: usize, len: usize, batch: &mut Batch) {
    batch.seqs.push(BatchSeq {
        query_start: batch.token_ids.len(),
        query_len: len,
        cached_len: start,
        chunked_len: len,
        slot: SlotId(u32::MAX),
        page_start: batch.pages.len(),
    });
    batch.pages.extend_from_slice(&r.pages);
    batch.token_ids.extend_from_slice(&r.tokens[start + 1..][..len]);
    batch.positions.extend((start..start + len).map(|p| [p as u32; 3]));
}

/// Tokens of a request that run next: all it has left, as far as the prefill budget goes, cut inside the prompt
/// at a multiple of [`CHUNK_LEN`] only. One token is decode and always runs.
fn next_len(r: &Request, prefill_left: usize) -> usize {
    let left = r.tokens.len() - r.computed_len;
    if left <= 1 {
        return left;
    }
    let end = r.computed_len + left.min(prefill_left);
    let end = if end < r.num_prompt { end - end % CHUNK_LEN } else { end };
    end.saturating_sub(r.computed_len)
}

#[cfg(test)]
mod tests;
