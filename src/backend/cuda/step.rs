//! What a step needs on the device besides weights and activations: the batch, uploaded once, and scratch memory. All of
//! it is allocated for the largest batch.

use std::ops::Range;
use std::sync::Arc;

use super::buffers::{attention_dims, delta_dims};
use super::device::{Device, Memory, Pinned};
use super::ffi;
use super::graph::{self, Shape};
use super::others::Others;
use super::rounding::Rounding;
use super::sample::Sampler;
use crate::backend::{Caches, KvCache, Rope};
use crate::batch::{Batch, BatchLimits, BatchSeq, MAX_LOGIT_ROWS, PAGE_LEN};
use crate::config::{FfnConfig, ModelConfig};
use crate::{Error, Result};

/// Rows that a launcher may be given at least (see [`super::Cuda`]).
pub(super) const MIN_WIDE_ROWS: usize = 17;

/// Sequences with more new tokens than this are prefill to the attention kernels.
const MAX_DECODE_LEN: usize = 8;

pub(super) struct Step {
    pub limits: BatchLimits,
    /// Of the model's sparse blocks.
    pub moe_dims: Option<ffi::MoeDims>,
    staging: Pinned,
    ints: Memory,
    /// The batch on the device, from [`Step::begin`].
    pub batch: ffi::Batch,
    /// Whether every sequence has one new token, whose logits are wanted, and nothing but lengths and contents decides
    /// what is launched.
    plain_decode: bool,
    logit_rows: Vec<usize>,
    logit_rows_at: *const i32,
    rows_staging: Pinned,
    rows: Memory,
    /// Room for the rows of any activation.
    pub gathered: Memory,
    pub delta: Memory,
    pub attention: Memory,
    /// Pages in fp8 of prefill sequences that attention can take at a time.
    pub room: usize,
    pub moe: Memory,
    /// Where products of steps of many tokens round their activations, if they do.
    pub rounding: Option<Rounding>,
    /// Of the decode kernel of the delta layers, zero between launches.
    pub counters: Memory,
    pub sampler: Sampler,
    pub inv_freq: Memory,
    pub axis: Memory,
    /// The other ranks, where there are any.
    pub others: Option<Others>,
}

// SAFETY: the raw pointers are device addresses inside memory that it owns.
unsafe impl Send for Step {}

impl Step {
    pub fn new(
        device: &Arc<Device>,
        config: &ModelConfig,
        limits: &BatchLimits,
        caches: Caches,
    ) -> Result<Self> {
        let tokens = limits.max_tokens.max(MIN_WIDE_ROWS);
        // token_ids, positions and seq_of; seven lists of the sequences; logit_rows.
        let num_ints = 6 * tokens + 7 * limits.max_seqs + limits.max_pages;
        let (max_tokens, max_seqs) = (tokens as i32, limits.max_seqs as i32);
        let elements = |n: i64, bytes: usize| usize::try_from(n).ok()?.checked_mul(bytes);
        let (delta, attention) = (delta_dims(&config.delta, caches.state), attention_dims(&config.attention));
        let max_len = i32::try_from(limits.max_len).unwrap_or(i32::MAX);
        // That of the longest sequence.
        let room = limits.max_len.div_ceil(PAGE_LEN);
        // SAFETY: these only compute.
        let (delta_len, attention_len) = unsafe {
            let attention_len = match caches.kv {
                KvCache::Auto => ffi::q35_attention_workspace(max_tokens, max_seqs, max_len, attention),
                KvCache::Fp8 => ffi::q35_attention_fp8_workspace(room as i32, max_seqs, attention),
            };
            (ffi::q35_delta_workspace(max_tokens, max_seqs, delta), attention_len)
        };
        let moe_dims = match config.ffn {
            FfnConfig::Dense { .. } => None,
            FfnConfig::Moe { num_experts, top_k, expert_width, shared_width } => {
                let [hidden, num_experts, top_k, width, shared_width] =
                    [config.hidden, num_experts, top_k, expert_width, shared_width].map(|n| n as i32);
                // Fewer experts, where others are elsewhere, need no more.
                let (first_expert, num_here) = (0, num_experts);
                Some(ffi::MoeDims { hidden, num_experts, top_k, width, shared_width, first_expert, num_here })
            }
        };
        // SAFETY: only computes.
        let moe_bytes = moe_dims.map_or(0, |dims| unsafe { ffi::q35_moe_workspace(max_tokens, dims) });
        let row_bytes =
            (4 * config.hidden).max(2 * config.attention.q_width()).max(2 * config.delta.value_width());
        let rope = Rope::new(&config.rope);
        let upload = |bytes: &[u8]| -> Result<Memory> {
            let mut host = Pinned::new(device, bytes.len())?;
            host.as_mut_slice().copy_from_slice(bytes);
            let memory = device.alloc(Some(bytes.len()), "frequencies")?;
            memory.write(0, &host, 0..bytes.len())?;
            host.wait()?;
            Ok(memory)
        };
        let inv_freq: Vec<u8> = rope.inv_freq.iter().flat_map(|x| x.to_ne_bytes()).collect();
        let null = std::ptr::null();
        Ok(Self {
            limits: *limits,
            moe_dims,
            staging: Pinned::new(device, 4 * num_ints)?,
            ints: device.alloc(Some(4 * num_ints), "the batch")?,
            batch: ffi::Batch {
                num_tokens: 0,
                num_seqs: 0,
                max_query_len: 0,
                max_kv_len: 0,
                token_ids: null,
                positions: null,
                seq_of: null,
                query_start: null,
                query_len: null,
                cached_len: null,
                chunked_len: null,
                slot: null,
                page_start: null,
                pages: null,
            },
            plain_decode: false,
            logit_rows: Vec::with_capacity(tokens),
            logit_rows_at: null,
            rows_staging: Pinned::new(device, 4 * tokens)?,
            rows: device.alloc(Some(4 * tokens), "row numbers")?,
            gathered: device.alloc(tokens.checked_mul(row_bytes), "activations")?,
            delta: device.alloc(elements(delta_len, 4), "workspace of the delta rule")?,
            attention: device.zeros(elements(attention_len, 4), "workspace of attention")?,
            room,
            moe: device.alloc(elements(moe_bytes, 1), "workspace of the experts")?,
            rounding: None,
            counters: device.zeros(
                limits.max_seqs.checked_mul(4 * config.delta.num_k_heads),
                "workspace of the delta rule",
            )?,
            sampler: Sampler::new(
                device,
                limits.max_seqs,
                limits.max_seqs.min(MAX_LOGIT_ROWS),
                config.vocab,
            )?,
            inv_freq: upload(&inv_freq)?,
            axis: upload(&rope.axis)?,
            others: None,
        })
    }

    /// Puts a batch on the device, in one copy.
    pub fn begin(&mut self, batch: &Batch) -> Result<()> {
        let (n, limits) = (batch.num_tokens(), &self.limits);
        let fits = n <= limits.max_tokens
            && batch.seqs.len() <= limits.max_seqs
            && batch.pages.len() <= limits.max_pages
            && batch.logit_rows.len() <= limits.max_tokens;
        if !fits {
            return Err(Error::Internal(format!(
                "a batch of {n} tokens, {} sequences and {} pages; buffers are for {limits:?}",
                batch.seqs.len(),
                batch.pages.len()
            )));
        }
        self.staging.wait()?;
        // Tokens that the device has chosen are there already.
        let known = if batch.follows { n } else { 0 };
        let base = self.ints.ptr::<i32>().cast_const();
        let mut ints = Ints { bytes: self.staging.as_mut_slice(), len: 0, base: base.wrapping_add(known) };
        let seqs = &batch.seqs;
        self.sampler.clear();
        self.plain_decode = seqs.len() <= graph::MAX_SEQS
            && seqs.iter().all(|s| s.query_len == 1)
            && batch.logit_rows.iter().copied().eq(0..n);
        let mut max_kv_len = seqs.iter().map(|s| s.cached_len + s.query_len).max().unwrap_or(0);
        if self.plain_decode {
            max_kv_len = Shape::kv_bound(max_kv_len, limits.max_len);
        }
        self.batch = ffi::Batch {
            num_tokens: n as i32,
            num_seqs: seqs.len() as i32,
            max_query_len: seqs.iter().map(|s| s.query_len).max().unwrap_or(0) as i32,
            max_kv_len: max_kv_len as i32,
            token_ids: match batch.follows {
                true => base,
                false => ints.push(batch.token_ids.iter().map(|&id| id as i32)),
            },
            positions: ints.push(batch.positions.iter().flatten().map(|&p| p as i32)),
            seq_of: ints
                .push(seqs.iter().enumerate().flat_map(|(i, s)| std::iter::repeat_n(i as i32, s.query_len))),
            query_start: ints.push(seqs.iter().map(|s| s.query_start as i32)),
            query_len: ints.push(seqs.iter().map(|s| s.query_len as i32)),
            cached_len: ints.push(seqs.iter().map(|s| s.cached_len as i32)),
            chunked_len: ints.push(seqs.iter().map(|s| s.chunked_len as i32)),
            slot: ints.push(seqs.iter().map(|s| s.slot.0 as i32)),
            page_start: ints.push(seqs.iter().map(|s| s.page_start as i32)),
            pages: std::ptr::null(),
        };
        self.logit_rows_at = ints.push(batch.logit_rows.iter().map(|&row| row as i32));
        // Last, so that in a recorded step all addresses are those of the step that was recorded.
        self.batch.pages = ints.push(batch.pages.iter().map(|p| p.0 as i32));
        let len = 4 * ints.len;
        self.logit_rows.clone_from(&batch.logit_rows);
        self.ints.write(4 * known, &self.staging, 0..len)
    }

    /// Where the tokens that are chosen go, a row each: they are the first of the next batch, if that follows.
    pub fn next_tokens(&self) -> *mut i32 {
        self.ints.ptr()
    }

    /// What decides the launches of the batch, where it can be recorded.
    pub fn shape(&self) -> Option<Shape> {
        self.plain_decode.then(|| Shape {
            seqs: self.batch.num_seqs as usize,
            kv_len: self.batch.max_kv_len as usize,
            sampled: self.sampler.num_rows(),
        })
    }

    /// Whether every sequence has one new token.
    pub fn is_decode(&self) -> bool {
        self.batch.max_query_len == 1
    }

    /// The batch in pieces of neighbouring sequences whose prefill there is room for; mostly that is all of it.
    pub fn pieces(&self, batch: &Batch) -> Vec<ffi::Batch> {
        cut(&batch.seqs, self.room).into_iter().map(|range| self.part(&batch.seqs, range)).collect()
    }

    fn part(&self, seqs: &[BatchSeq], range: Range<usize>) -> ffi::Batch {
        if range.len() == seqs.len() {
            return self.batch;
        }
        let (whole, first, seqs) = (&self.batch, range.start, &seqs[range]);
        ffi::Batch {
            num_tokens: seqs.iter().map(|s| s.query_len as i32).sum(),
            num_seqs: seqs.len() as i32,
            max_query_len: seqs.iter().map(|s| s.query_len as i32).max().unwrap_or(0),
            query_start: whole.query_start.wrapping_add(first),
            query_len: whole.query_len.wrapping_add(first),
            cached_len: whole.cached_len.wrapping_add(first),
            chunked_len: whole.chunked_len.wrapping_add(first),
            slot: whole.slot.wrapping_add(first),
            page_start: whole.page_start.wrapping_add(first),
            ..*whole
        }
    }

    /// How many experts the last layer's tokens went to, once all has run; known of a decode step.
    pub fn experts_hit(&self, device: &Arc<Device>) -> Result<Option<usize>> {
        let Some(dims) = self.moe_dims.filter(|_| self.plain_decode && !device.is_imagined()) else {
            return Ok(None);
        };
        let n = self.batch.num_tokens;
        // SAFETY: only computes.
        let at = unsafe { ffi::q35_moe_experts_at(n, dims) } as usize;
        let len = 4 * n as usize * dims.top_k as usize;
        let mut host = Pinned::new(device, at + len)?;
        self.moe.read(&mut host, at + len)?;
        let hit: std::collections::BTreeSet<&[u8]> = host.as_slice()[at..at + len].chunks_exact(4).collect();
        Ok(Some(hit.len()))
    }

    /// Row numbers on the device: those of the batch's logits are there already.
    pub fn rows(&mut self, rows: &[usize]) -> Result<*const i32> {
        if rows == self.logit_rows {
            return Ok(self.logit_rows_at);
        }
        self.rows_staging.wait()?;
        let mut ints = Ints { bytes: self.rows_staging.as_mut_slice(), len: 0, base: self.rows.ptr() };
        let at = ints.push(rows.iter().map(|&row| row as i32));
        let len = 4 * ints.len;
        self.rows.write(0, &self.rows_staging, 0..len)?;
        Ok(at)
    }
}

/// Neighbouring sequences whose prefill has at most `room` pages, or single ones.
fn cut(seqs: &[BatchSeq], room: usize) -> Vec<Range<usize>> {
    let (mut pieces, mut first, mut used) = (Vec::new(), 0, 0);
    for (i, seq) in seqs.iter().enumerate() {
        let prefill = seq.query_len > MAX_DECODE_LEN;
        let pages = if prefill { (seq.cached_len + seq.query_len).div_ceil(PAGE_LEN) } else { 0 };
        if used > 0 && used + pages > room {
            pieces.push(first..i);
            (first, used) = (i, 0);
        }
        used += pages;
    }
    pieces.push(first..seqs.len());
    pieces
}

/// Lists of int32, one after the other.
struct Ints<'a> {
    bytes: &'a mut [u8],
    len: usize,
    base: *const i32,
}

impl Ints<'_> {
    /// Appends a list; returns its address on the device.
    fn push(&mut self, list: impl Iterator<Item = i32>) -> *const i32 {
        let at = self.base.wrapping_add(self.len);
        for (item, place) in list.zip(self.bytes[4 * self.len..].chunks_exact_mut(4)) {
            place.copy_from_slice(&item.to_ne_bytes());
            self.len += 1;
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::SlotId;

    #[test]
    fn pieces_have_room() {
        let seqs = |lens: &[(usize, usize)]| -> Vec<BatchSeq> {
            lens.iter()
                .map(|&(cached_len, query_len)| BatchSeq {
                    query_start: 0,
                    query_len,
                    cached_len,
                    chunked_len: 0,
                    slot: SlotId(0),
                    page_start: 0,
                })
                .collect()
        };
        // Pages of prefill: 2, none, 1, 3, 1, none.
        let all = seqs(&[(100, 9), (900, 1), (0, 64), (128, 64), (0, 20), (70, 8)]);
        let ends = |seqs: &[BatchSeq], room: usize| -> Vec<usize> {
            let pieces = cut(seqs, room);
            let starts: Vec<usize> = pieces.iter().map(|piece| piece.start).collect();
            let ends: Vec<usize> = pieces.iter().map(|piece| piece.end).collect();
            assert_eq!((starts[0], &starts[1..]), (0, &ends[..ends.len() - 1]));
            ends
        };
        for (room, want) in [(7, &[6][..]), (6, &[4, 6]), (4, &[3, 6]), (3, &[3, 4, 6])] {
            assert_eq!(ends(&all, room), want, "{room}");
        }
        assert_eq!(ends(&seqs(&[(70, 8); 9]), 1), [9]);
        assert_eq!(ends(&[], 1), [0]);
    }
}
