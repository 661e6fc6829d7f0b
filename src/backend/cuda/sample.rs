//! Choosing tokens on the device: how rows are sampled goes up before a step, and what was chosen comes back after it.

use std::collections::VecDeque;
use std::sync::Arc;

use super::device::{Device, Memory, Pinned};
use super::ffi;
use crate::backend::{Logprobs, Sampled, Sampling};
use crate::{Error, Result};

/// Edits of all rows of a step; requests that need more are sampled on the host.
const MAX_EDITS: usize = 1 << 16;

pub(super) struct Sampler {
    staging: Pinned,
    rows: Memory,
    edits: Memory,
    edit_staging: Pinned,
    chosen: Memory,
    workspace: Memory,
    /// Whose log-probabilities are wanted, of the rows of the step under way.
    wanted: Vec<bool>,
    /// Where chosen tokens come to the host, in turn: a step may run while the host reads those of the one before.
    hosts: [Pinned; 2],
    turn: usize,
    /// What was sent and not read yet, oldest first: whose log-probabilities are wanted, and the place in `hosts`.
    sent: VecDeque<(Vec<bool>, usize)>,
}

/// Whether the kernels can choose for these rows.
pub(super) fn can_sample(rows: &[Sampling]) -> bool {
    rows.iter().map(|row| row.edits.len()).sum::<usize>() <= MAX_EDITS
        && rows
            .iter()
            .all(|row| row.top_k <= ffi::MAX_TOP_K && row.logprobs.is_none_or(|n| n <= ffi::MAX_LOGPROBS))
}

impl Sampler {
    /// For up to `max_rows` rows a step, `rows_at_once` of them in one launch.
    pub fn new(device: &Arc<Device>, max_rows: usize, rows_at_once: usize, vocab: usize) -> Result<Self> {
        let bytes = |each: usize, n: usize| each.checked_mul(n);
        let [row, edit, out] =
            [size_of::<ffi::Sampling>(), size_of::<ffi::Edit>(), size_of::<ffi::Sampled>()];
        // SAFETY: only computes.
        let workspace = unsafe { ffi::q35_sample_workspace(rows_at_once as i32, vocab as i32) };
        Ok(Self {
            staging: Pinned::new(device, row * max_rows)?,
            rows: device.alloc(bytes(row, max_rows), "the sampler")?,
            edits: device.alloc(bytes(edit, MAX_EDITS), "the sampler")?,
            edit_staging: Pinned::new(device, edit * MAX_EDITS)?,
            chosen: device.zeros(bytes(out, max_rows), "the sampler")?,
            workspace: device.zeros(usize::try_from(workspace).ok(), "workspace of the sampler")?,
            wanted: Vec::with_capacity(max_rows),
            hosts: [Pinned::new(device, out * max_rows)?, Pinned::new(device, out * max_rows)?],
            turn: 0,
            sent: VecDeque::new(),
        })
    }

    /// Rows of the step under way.
    pub fn num_rows(&self) -> usize {
        self.wanted.len()
    }

    /// No rows: a step whose logits are read.
    pub fn clear(&mut self) {
        self.wanted.clear();
    }

    /// Sends how the rows of a step are sampled.
    pub fn begin(&mut self, rows: &[Sampling]) -> Result<()> {
        self.wanted.clear();
        self.wanted.extend(rows.iter().map(|row| row.logprobs.is_some()));
        self.staging.wait()?;
        let mut num_edits = 0;
        for (row, place) in rows.iter().zip(self.staging.items_mut::<ffi::Sampling>()) {
            *place = ffi::Sampling {
                uniform: row.uniform,
                temperature: row.temperature,
                top_p: row.top_p,
                min_p: row.min_p,
                repetition_penalty: row.repetition_penalty,
                frequency_penalty: row.frequency_penalty,
                presence_penalty: row.presence_penalty,
                top_k: row.top_k as i32,
                num_logprobs: row.logprobs.map_or(-1, |n| n as i32),
                edit_start: num_edits as i32,
                num_edits: row.edits.len() as i32,
            };
            num_edits += row.edits.len();
        }
        self.rows.write(0, &self.staging, 0..size_of::<ffi::Sampling>() * rows.len())?;
        if num_edits == 0 {
            return Ok(());
        }
        self.edit_staging.wait()?;
        let edits = rows.iter().flat_map(|row| &row.edits);
        for (edit, place) in edits.zip(self.edit_staging.items_mut::<ffi::Edit>()) {
            *place = ffi::Edit {
                token: edit.token as i32,
                bias: edit.bias,
                banned: edit.banned.into(),
                seen: edit.seen.into(),
                count: edit.count as i32,
            };
        }
        self.edits.write(0, &self.edit_staging, 0..size_of::<ffi::Edit>() * num_edits)
    }

    /// Chooses for rows `first..first + n` from `n` rows of logits, and puts the tokens where `tokens` begins. Returns the
    /// launcher's code.
    ///
    /// # Safety
    /// `logits` is f32 `[n, vocab]` on the device, `tokens` has room for all rows, and the context is current.
    pub unsafe fn launch(
        &self,
        stream: ffi::Stream,
        (first, n): (usize, usize),
        (vocab, num_tokens): (usize, usize),
        logits: *const f32,
        tokens: *mut i32,
    ) -> i32 {
        let at = |memory: &Memory, each: usize| memory.at(first * each);
        // SAFETY: the buffers are for as many rows as a step has.
        unsafe {
            ffi::q35_sample(
                stream,
                n as i32,
                vocab as i32,
                num_tokens as i32,
                logits,
                at(&self.rows, size_of::<ffi::Sampling>()) as *const ffi::Sampling,
                self.edits.ptr(),
                self.workspace.ptr(),
                at(&self.chosen, size_of::<ffi::Sampled>()) as *mut ffi::Sampled,
                tokens.wrapping_add(first),
            )
        }
    }

    /// Sends what was chosen to the host, on the stream.
    pub fn send(&mut self) -> Result<()> {
        let turn = self.turn;
        if self.sent.iter().any(|sent| sent.1 == turn) {
            return Err(Error::Internal("tokens of a third step before those of the first are read".into()));
        }
        self.chosen.send(&mut self.hosts[turn], size_of::<ffi::Sampled>() * self.wanted.len())?;
        self.sent.push_back((self.wanted.clone(), turn));
        self.turn = 1 - turn;
        Ok(())
    }

    /// What was sent first, once it is there.
    pub fn read(&mut self) -> Result<Vec<Sampled>> {
        let Some((wanted, turn)) = self.sent.pop_front() else {
            return Err(Error::Internal("tokens are read that were not sent".into()));
        };
        self.hosts[turn].wait()?;
        let chosen = self.hosts[turn].items::<ffi::Sampled>();
        Ok(wanted.iter().zip(chosen).map(|(&wanted, row)| sampled(row, wanted)).collect())
    }
}

fn sampled(row: &ffi::Sampled, wanted: bool) -> Sampled {
    let num = (row.num_top.max(0) as usize).min(ffi::MAX_LOGPROBS);
    let top = || row.top_tokens[..num].iter().map(|&id| id as u32).zip(row.top_logprobs).collect();
    Sampled {
        token: u32::try_from(row.token).ok(),
        logprobs: wanted.then(|| Logprobs {
            chosen: row.logprob,
            rank: row.rank.max(0) as usize,
            top: top(),
        }),
    }
}
