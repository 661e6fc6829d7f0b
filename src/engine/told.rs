//! Steps as rank 0 tells them to the others: what those know already is left out. Both sides remember the pages of each
//! slot as they were told last, and a step has what is new of them; of text, positions follow from lengths; rows that are
//! sampled alike say so once. A step of short sequences and one of long ones then have about the same size.

use std::borrow::Cow;
use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::backend::Sampling;
use crate::batch::{Batch, BatchSeq, DraftBatch, PageId, SlotId};
use crate::ranks;

/// The pages of each slot, as they were told last.
#[derive(Default)]
pub(super) struct Told(HashMap<SlotId, Vec<PageId>>);

/// A [`Batch`], less what [`Told`] has.
#[derive(Serialize, Deserialize)]
pub(super) struct ToldBatch<'a> {
    /// None where they are not looked at.
    token_ids: Cow<'a, [u32]>,
    /// `None` for those of text.
    positions: Option<Cow<'a, [[u32; 3]]>>,
    seqs: Vec<ToldSeq<'a>>,
    logit_rows: Cow<'a, [usize]>,
    follows: bool,
}

/// A [`BatchSeq`] and its pages: the first so many of what is known, and others.
#[derive(Serialize, Deserialize)]
struct ToldSeq<'a> {
    query_len: usize,
    cached_len: usize,
    chunked_len: usize,
    slot: SlotId,
    num_known: usize,
    new_pages: Cow<'a, [PageId]>,
}

/// A [`DraftBatch`].
#[derive(Serialize, Deserialize)]
pub(super) struct ToldDrafts<'a> {
    batch: ToldBatch<'a>,
    hidden_rows: Cow<'a, [usize]>,
}

/// How a row is sampled: as the one before, but for its random number, or as it says.
#[derive(Serialize, Deserialize)]
pub(super) struct ToldSampling<'a> {
    uniform: f64,
    settings: Option<Cow<'a, Sampling>>,
}

impl Told {
    /// What the others need of a batch; it counts as told.
    pub fn shorten<'a>(&mut self, batch: &'a Batch) -> ToldBatch<'a> {
        let ends = batch.seqs.iter().skip(1).map(|seq| seq.page_start).chain([batch.pages.len()]);
        let seqs = batch.seqs.iter().zip(ends).map(|(seq, end)| {
            let pages = &batch.pages[seq.page_start..end];
            let known = self.0.entry(seq.slot).or_default();
            let num_known = known.iter().zip(pages).take_while(|(known, page)| known == page).count();
            known.truncate(num_known);
            known.extend_from_slice(&pages[num_known..]);
            let &BatchSeq { query_len, cached_len, chunked_len, slot, .. } = seq;
            let new_pages = pages[num_known..].into();
            ToldSeq { query_len, cached_len, chunked_len, slot, num_known, new_pages }
        });
        let seqs: Vec<_> = seqs.collect();
        let is_text = batch.positions.iter().copied().eq(text_positions(&seqs));
        ToldBatch {
            seqs,
            token_ids: if batch.follows { [].as_slice().into() } else { batch.token_ids.as_slice().into() },
            positions: (!is_text).then(|| batch.positions.as_slice().into()),
            logit_rows: batch.logit_rows.as_slice().into(),
            follows: batch.follows,
        }
    }

    /// The same of drafts.
    pub fn shorten_drafts<'a>(&mut self, drafts: &'a DraftBatch) -> ToldDrafts<'a> {
        ToldDrafts { batch: self.shorten(&drafts.batch), hidden_rows: drafts.hidden_rows.as_slice().into() }
    }

    /// The batch that rank 0 has shortened.
    ///
    /// # Errors
    /// Where it counts on more pages than were told here.
    pub fn batch(&mut self, told: ToldBatch<'_>) -> Result<Batch> {
        let positions = match told.positions {
            Some(positions) => positions.into_owned(),
            None => text_positions(&told.seqs).collect(),
        };
        let mut batch = Batch {
            token_ids: told.token_ids.into_owned(),
            positions,
            logit_rows: told.logit_rows.into_owned(),
            follows: told.follows,
            ..Batch::default()
        };
        let mut query_start = 0;
        for ToldSeq { query_len, cached_len, chunked_len, slot, num_known, new_pages } in told.seqs {
            let known = self.0.entry(slot).or_default();
            if num_known > known.len() {
                return Err(ranks::lost("rank 0 counts on pages that it has not told"));
            }
            known.truncate(num_known);
            known.extend_from_slice(&new_pages);
            let page_start = batch.pages.len();
            batch.pages.extend_from_slice(known);
            batch.seqs.push(BatchSeq { query_start, query_len, cached_len, chunked_len, slot, page_start });
            query_start += query_len;
        }
        if batch.follows {
            batch.token_ids = vec![0; query_start];
        }
        Ok(batch)
    }

    /// The drafts that rank 0 has shortened.
    ///
    /// # Errors
    /// As [`Told::batch`].
    pub fn drafts(&mut self, told: ToldDrafts<'_>) -> Result<DraftBatch> {
        Ok(DraftBatch { batch: self.batch(told.batch)?, hidden_rows: told.hidden_rows.into_owned() })
    }
}

/// The positions of text, which are the same on every axis.
fn text_positions(seqs: &[ToldSeq<'_>]) -> impl Iterator<Item = [u32; 3]> {
    seqs.iter().flat_map(|seq| (seq.cached_len..seq.cached_len + seq.query_len).map(|p| [p as u32; 3]))
}

/// How rows are sampled, without what they share with the row before.
pub(super) fn shorten_sampling(rows: &[Sampling]) -> Vec<ToldSampling<'_>> {
    let mut before: Option<&Sampling> = None;
    let mut shortened = Vec::with_capacity(rows.len());
    for row in rows {
        let alike = before.is_some_and(|before| row.is_alike(before));
        shortened
            .push(ToldSampling { uniform: row.uniform, settings: (!alike).then_some(Cow::Borrowed(row)) });
        before = Some(row);
    }
    shortened
}

/// Those rows again.
///
/// # Errors
/// Where the first has no settings.
pub(super) fn sampling(told: Vec<ToldSampling<'_>>) -> Result<Vec<Sampling>> {
    let mut rows: Vec<Sampling> = Vec::with_capacity(told.len());
    for ToldSampling { uniform, settings } in told {
        let settings = settings.map(Cow::into_owned).or_else(|| rows.last().cloned());
        let settings = settings.ok_or_else(|| ranks::lost("rank 0 has not told how a row is sampled"))?;
        rows.push(Sampling { uniform, ..settings });
    }
    Ok(rows)
}

#[cfg(test)]
mod tests;
