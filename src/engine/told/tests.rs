//! Whatever was told before, what comes out is what went in; and how little that takes.

use proptest::prelude::*;

use super::*;
use crate::backend::Edit;
use crate::engine::runner::Order;

fn over_the_wire<T: Serialize + serde::de::DeserializeOwned>(told: &T) -> T {
    postcard::from_bytes(&postcard::to_stdvec(told).unwrap()).unwrap()
}

/// A batch of sequences, each a slot, its pages, and its old and new tokens.
fn batch(seqs: &[(u32, Vec<u32>, usize, usize)], is_text: bool, follows: bool) -> Batch {
    let mut batch = Batch { follows, ..Batch::default() };
    for (slot, pages, cached_len, query_len) in seqs {
        let query_start = batch.token_ids.len();
        batch.seqs.push(BatchSeq {
            query_start,
            query_len: *query_len,
            cached_len: *cached_len,
            chunked_len: query_len / 2,
            slot: SlotId(*slot),
            page_start: batch.pages.len(),
        });
        batch.pages.extend(pages.iter().copied().map(PageId));
        for pos in *cached_len..cached_len + query_len {
            batch.token_ids.push(if follows { 0 } else { 7 + pos as u32 });
            let pos = pos as u32;
            batch.positions.push(if is_text { [pos; 3] } else { [pos, pos / 2, 5] });
        }
        batch.logit_rows.push(query_start + query_len - 1);
    }
    batch
}

proptest! {
    #[test]
    fn what_comes_out_is_what_went_in(
        steps in prop::collection::vec(
            (
                prop::collection::vec((0u32..4, prop::collection::vec(0u32..3, 0..6), 0usize..200, 1usize..5), 0..5),
                any::<bool>(),
                any::<bool>(),
            ),
            1..12,
        ),
    ) {
        let (mut first, mut other) = (Told::default(), Told::default());
        for (seqs, is_text, follows) in &steps {
            let batch = batch(seqs, *is_text, *follows);
            let told = over_the_wire(&first.shorten(&batch));
            prop_assert_eq!(&other.batch(told).unwrap(), &batch);
            // Drafts have no slots of their own, and go by the same accounts.
            let hidden_rows: Vec<usize> = (0..batch.logit_rows.len()).collect();
            let drafts = DraftBatch { batch, hidden_rows };
            let told = over_the_wire(&first.shorten_drafts(&drafts));
            prop_assert_eq!(&other.drafts(told).unwrap(), &drafts);
        }
    }
}

fn settings(uniform: f64, temperature: f32, edits: Vec<Edit>) -> Sampling {
    Sampling {
        uniform,
        temperature,
        top_p: 0.95,
        min_p: 0.0,
        top_k: 20,
        logprobs: None,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
        presence_penalty: 0.0,
        edits,
    }
}

#[test]
fn rows_that_are_sampled_alike_say_so_once() {
    let edit = Edit { token: 7, bias: 1.5, ..Edit::default() };
    let rows = [
        settings(0.25, 0.7, vec![]),
        settings(0.5, 0.7, vec![]),
        settings(0.5, 0.9, vec![]),
        settings(0.75, 0.9, vec![edit]),
        settings(0.125, 0.9, vec![edit]),
        settings(0.25, 0.7, vec![]),
    ];
    let told = shorten_sampling(&rows);
    let has: Vec<bool> = told.iter().map(|row| row.settings.is_some()).collect();
    assert_eq!(has, [true, false, true, true, false, true]);
    assert_eq!(sampling(over_the_wire(&told)).unwrap(), rows);
    assert!(sampling(told.into_iter().skip(1).collect()).is_err());
}

#[test]
fn rows_are_alike_only_if_every_setting_is() {
    let row = settings(0.25, 0.7, vec![]);
    let others: [fn(&mut Sampling); 9] = [
        |row| row.temperature = 0.8,
        |row| row.top_p = 0.9,
        |row| row.min_p = 0.1,
        |row| row.top_k = 21,
        |row| row.logprobs = Some(0),
        |row| row.repetition_penalty = 1.1,
        |row| row.frequency_penalty = 0.1,
        |row| row.presence_penalty = 0.1,
        |row| row.edits.push(Edit::default()),
    ];
    for (i, change) in others.into_iter().enumerate() {
        let mut other = row.clone();
        change(&mut other);
        let rows = [row.clone(), other];
        assert_eq!(sampling(over_the_wire(&shorten_sampling(&rows))).unwrap(), rows, "{i}");
    }
}

#[test]
fn pages_that_were_not_told_are_an_error() {
    let mut first = Told::default();
    let long = batch(&[(1, vec![4, 5, 6], 150, 1)], true, false);
    first.shorten(&long);
    let told = first.shorten(&long);
    assert!(Told::default().batch(told).is_err());
}

/// A decode step of 64 sequences is as long as their tokens, not as their past.
#[test]
fn a_step_of_long_sequences_is_short() {
    let mut told = Told::default();
    for past in [16_384, 262_000] {
        let step = |past: usize| {
            let pages =
                |slot: u32| (0..past.div_ceil(64) as u32 + 1).map(|page| slot * 5_000 + page).collect();
            let seqs: Vec<_> = (0..64).map(|slot| (slot, pages(slot), past, 1)).collect();
            batch(&seqs, true, false)
        };
        told.shorten(&step(past));
        // Most steps need no page; here at last all sequences do, two each.
        for (past, most) in [(past + 1, 1_700), (past + 128, 2_048)] {
            let batch = step(past);
            let rows: Vec<_> = (0..64).map(|i| settings(f64::from(i) / 64.0, 0.7, vec![])).collect();
            let order = Order::Launch(told.shorten(&batch), shorten_sampling(&rows), 248_320);
            let size = order.to_bytes().unwrap().len();
            assert!(size <= most, "{size} bytes for {past} old tokens");
        }
    }
}
