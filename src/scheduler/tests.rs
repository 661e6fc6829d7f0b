//! The scheduler and the cache under any trace of arrivals, aborts and failed steps.

use std::collections::{BTreeMap, HashMap};

use proptest::prelude::*;

use super::{Scheduler, Step};
use crate::batch::{CHUNK_LEN, PAGE_LEN};
use crate::cache::{Cache, pages_for};
use crate::request::{Request, RequestId, SamplingParams, Wanted};

/// One request of a trace.
#[derive(Debug, Clone)]
struct Arrival {
    at: usize,
    num_prompt: usize,
    /// Tokens to generate; none for a request that wants logits, those of drafts where the prompt's length is even.
    num_output: Option<usize>,
    /// Step at which the caller gives up, if it does.
    abort_at: Option<usize>,
}

#[derive(Debug, Clone)]
struct Trace {
    arrivals: Vec<Arrival>,
    /// Steps that fail.
    failures: Vec<usize>,
    num_pages: usize,
    max_seqs: usize,
    max_prefill: usize,
}

/// A prompt length, often next to a boundary.
fn length() -> impl Strategy<Value = usize> {
    prop_oneof![1usize..300, (1usize..5, 0usize..3).prop_map(|(n, d)| n * CHUNK_LEN + d - 1)]
}

fn trace(failures: bool) -> impl Strategy<Value = Trace> {
    let arrival = (
        0usize..60,
        length(),
        prop::option::weighted(0.9, 1usize..90),
        prop::option::weighted(0.2, 0usize..90),
    );
    let arrivals = prop::collection::vec(arrival, 1..14).prop_map(|list| {
        let arrival =
            |(at, num_prompt, num_output, abort_at)| Arrival { at, num_prompt, num_output, abort_at };
        list.into_iter().map(arrival).collect::<Vec<_>>()
    });
    let failed = prop::collection::vec(0usize..120, if failures { 0..12 } else { 0..1 });
    let prefill = prop_oneof![Just(CHUNK_LEN), Just(100), Just(512), CHUNK_LEN..400];
    (arrivals, failed, 0usize..8, 1usize..6, prefill).prop_map(
        |(arrivals, failures, spare, max_seqs, max_prefill)| {
            // As the engine sizes it: the longest request fits alone.
            let longest =
                arrivals.iter().map(|a| a.num_prompt + a.num_output.unwrap_or(0)).max().unwrap_or(1);
            Trace { arrivals, failures, num_pages: pages_for(longest) + spare, max_seqs, max_prefill }
        },
    )
}

fn request(id: u64, arrival: &Arrival) -> Request {
    Request {
        id: RequestId(id),
        tokens: (0..arrival.num_prompt as u32).map(|t| t + 1000 * id as u32).collect(),
        num_prompt: arrival.num_prompt,
        computed_len: 0,
        wanted: match arrival.num_output {
            Some(_) => Wanted::Tokens(SamplingParams::default()),
            None if arrival.num_prompt.is_multiple_of(2) => Wanted::MtpLogits,
            None => Wanted::Logits,
        },
        seed: 0,
        pages: Vec::new(),
        slot: None,
        logits: Vec::new(),
        device_logits: None,
    }
}

/// The step is a batch that the model may be given.
fn check_step(s: &Scheduler, step: &Step, trace: &Trace) {
    let batch = &step.batch;
    assert_eq!(batch.seqs.len(), step.requests.len());
    // Not by age: one that starts over after a failure comes after younger ones that were not in the failed step.
    let distinct: std::collections::BTreeSet<_> = step.requests.iter().collect();
    assert!(distinct.len() == step.requests.len() && distinct.len() <= trace.max_seqs);
    assert_eq!(batch.logit_rows.len(), step.logit_owners.len());
    assert_eq!(batch.positions.len(), batch.token_ids.len());
    let prefill: usize = batch.seqs.iter().map(|x| x.query_len).filter(|&n| n > 1).sum();
    assert!(prefill <= trace.max_prefill, "{prefill} prompt tokens");
    assert!(batch.num_tokens() <= trace.max_prefill + trace.max_seqs);

    let (mut next_token, mut next_page, mut rows) = (0, 0, Vec::new());
    let mut draft_seqs = step.drafts.batch.seqs.iter();
    for (id, seq) in step.requests.iter().zip(&batch.seqs) {
        let r = s.running(*id).expect("a request of the step runs");
        assert_eq!((seq.query_start, seq.page_start), (next_token, next_page));
        assert_eq!(seq.cached_len, r.computed_len);
        assert_eq!(Some(seq.slot), r.slot);
        let (start, end) = (seq.cached_len, seq.cached_len + seq.query_len);
        assert!(seq.query_len > 0 && end <= r.tokens.len());
        assert_eq!(batch.token_ids[next_token..next_token + seq.query_len], r.tokens[start..end]);
        let positions = &batch.positions[next_token..next_token + seq.query_len];
        assert!(positions.iter().enumerate().all(|(i, p)| *p == [(start + i) as u32; 3]));
        // Inside the prompt, chunks start and end where those of an undivided prefill do.
        assert!(start >= r.num_prompt || start % CHUNK_LEN == 0, "prefill starts at {start}");
        assert!(end >= r.num_prompt || end % CHUNK_LEN == 0, "prefill cut at {end} of {}", r.num_prompt);
        assert_eq!(seq.chunked_len, r.num_prompt.saturating_sub(start).min(seq.query_len));
        assert!(r.pages.len() * PAGE_LEN >= end, "{} pages for {end} tokens", r.pages.len());
        assert_eq!(batch.pages[next_page..next_page + r.pages.len()], r.pages[..]);
        // A slot that starts a sequence is cleared, and no other is.
        assert_eq!(step.new_slots.contains(&seq.slot), start == 0);
        let last = next_token + seq.query_len - 1;
        match &r.wanted {
            Wanted::Tokens(_) if end == r.tokens.len() => rows.push((last, *id)),
            Wanted::Tokens(_) => {}
            Wanted::Logits | Wanted::DeviceLogits => rows.extend((next_token..=last).map(|row| (row, *id))),
            Wanted::MtpLogits => {
                // Every token that has one after it, each beside that one, in the same places of the same pages.
                let len = seq.query_len.min(r.num_prompt - 1 - start);
                let drafts = draft_seqs.next().expect("drafts of the request");
                assert_eq!((drafts.query_len, drafts.cached_len), (len, start));
                let tokens = drafts.query_start..drafts.query_start + len;
                assert_eq!(step.drafts.batch.token_ids[tokens.clone()], r.tokens[start + 1..][..len]);
                assert_eq!(step.drafts.batch.positions[tokens.clone()], positions[..len]);
                assert_eq!(step.drafts.batch.pages[drafts.page_start..][..r.pages.len()], r.pages[..]);
                let hidden = &step.drafts.hidden_rows[tokens];
                assert!(hidden.iter().copied().eq(rows.len()..rows.len() + len));
                rows.extend((next_token..next_token + len).map(|row| (row, *id)));
            }
        }
        (next_token, next_page) = (next_token + seq.query_len, next_page + r.pages.len());
    }
    assert_eq!((next_token, next_page), (batch.token_ids.len(), batch.pages.len()));
    let owned: Vec<_> = batch.logit_rows.iter().copied().zip(step.logit_owners.iter().copied()).collect();
    assert_eq!(owned, rows);
    assert!(draft_seqs.next().is_none());
}

/// Plays a trace to its end, as the engine would, and gives the order in which requests were first run.
fn play(trace: &Trace) -> Vec<RequestId> {
    let mut s =
        Scheduler::new(Cache::new(trace.num_pages, trace.max_seqs), trace.max_prefill, trace.max_seqs);
    let mut live: BTreeMap<RequestId, Arrival> = BTreeMap::new();
    let (mut next_id, mut admitted, mut failed) = (0, Vec::new(), false);
    let mut seen: HashMap<RequestId, usize> = HashMap::new();
    // Every step computes at least a token of the oldest request; a failure costs what was computed so far.
    let tokens = |a: &Arrival| a.num_prompt + a.num_output.unwrap_or(0);
    let total: usize = trace.arrivals.iter().map(tokens).sum();
    let bound = 200 + (trace.failures.len() + 2) * 2 * total;
    let mut arrivals = trace.arrivals.clone();
    arrivals.sort_by_key(|a| a.at);
    let mut arrivals = arrivals.into_iter().peekable();
    for step_idx in 0.. {
        assert!(step_idx < bound, "not done after {bound} steps: {:?}", live.keys());
        while let Some(arrival) = arrivals.next_if(|a| a.at <= step_idx) {
            s.add(request(next_id, &arrival));
            live.insert(RequestId(next_id), arrival);
            next_id += 1;
        }
        let gone: Vec<_> = live.iter().filter(|x| x.1.abort_at == Some(step_idx)).map(|x| *x.0).collect();
        for id in gone {
            let removed = s.remove(id).expect("a live request");
            assert!(removed.pages.is_empty() && removed.slot.is_none());
            assert!(s.remove(id).is_none() && s.running(id).is_none());
            live.remove(&id);
        }
        assert_eq!(s.check_integrity(), Ok(()));
        assert_eq!(s.is_idle(), live.is_empty());
        if live.is_empty() {
            match arrivals.peek() {
                Some(_) => continue,
                None => break,
            }
        }

        let step = s.schedule();
        assert_eq!(s.check_integrity(), Ok(()));
        assert!(!step.requests.is_empty(), "requests wait and none runs");
        check_step(&s, &step, trace);
        if !failed {
            // The oldest of all makes progress, and nobody runs before somebody older.
            assert_eq!(step.requests.first(), live.keys().next());
            let oldest_waiting = s.waiting.front().map(|r| r.id);
            let youngest_running = s.running.last().map(|r| r.id);
            assert!(oldest_waiting.is_none() || youngest_running < oldest_waiting);
        }
        for id in &step.requests {
            if seen.insert(*id, step_idx).is_none() {
                admitted.push(*id);
            }
        }

        if trace.failures.contains(&step_idx) {
            failed = true;
            s.abort(&step.requests);
            assert_eq!(s.check_integrity(), Ok(()));
            assert!(step.requests.iter().all(|&id| s.running(id).is_none()));
            continue;
        }
        s.commit(&step);
        assert_eq!(s.check_integrity(), Ok(()));
        for (&row, &id) in step.batch.logit_rows.iter().zip(&step.logit_owners) {
            let Some(r) = s.running_mut(id) else { continue };
            if r.params().is_some() {
                r.tokens.push(row as u32);
                if Some(r.output().len()) == live[&id].num_output {
                    s.remove(id);
                    live.remove(&id);
                }
            } else {
                // One "logit" per token: itself, so that a restart that forgets to clear them shows.
                r.logits.push(step.batch.token_ids[row] as f32);
                if r.logits.len() == r.num_logit_rows() {
                    let r = s.remove(id).expect("runs");
                    assert!(r.logits.iter().zip(&r.tokens).all(|(&l, &t)| l == t as f32));
                    live.remove(&id);
                }
            }
        }
        assert_eq!(s.check_integrity(), Ok(()));
    }
    assert_eq!(s.cache.num_free_pages(), trace.num_pages);
    admitted
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_request_ends_and_is_admitted_in_its_order(trace in trace(false)) {
        prop_assert!(play(&trace).is_sorted());
    }

    #[test]
    fn failed_steps_lose_nothing(trace in trace(true)) {
        play(&trace);
    }
}

#[test]
fn the_youngest_gives_way() {
    // Two requests of one page each, and a third page: when both need a second one, the younger is sent back.
    let mut s = Scheduler::new(Cache::new(3, 2), 512, 2);
    let arrival = |num_prompt| Arrival { at: 0, num_prompt, num_output: Some(80), abort_at: None };
    s.add(request(0, &arrival(PAGE_LEN)));
    s.add(request(1, &arrival(PAGE_LEN)));
    let step = s.schedule();
    assert_eq!(step.requests, [RequestId(0), RequestId(1)]);
    s.commit(&step);
    for id in 0..2 {
        s.running_mut(RequestId(id)).unwrap().tokens.push(7);
    }
    let step = s.schedule();
    assert_eq!(step.requests, [RequestId(0)]);
    assert!(s.running(RequestId(1)).is_none());
    assert_eq!(s.check_integrity(), Ok(()));
}

#[test]
fn a_broken_account_is_noticed() {
    let mut s = Scheduler::new(Cache::new(3, 2), 512, 2);
    s.add(request(0, &Arrival { at: 0, num_prompt: 70, num_output: Some(1), abort_at: None }));
    let step = s.schedule();
    s.commit(&step);
    let page = s.running[0].pages.pop().unwrap();
    assert!(s.check_integrity().unwrap_err().contains("70 tokens computed in 1 pages"));
    s.running[0].pages.push(page);
    s.running[0].pages.push(page);
    assert!(s.check_integrity().unwrap_err().starts_with("pages with an owner"));
    s.running[0].pages.pop();
    let slot = s.running[0].slot.take();
    assert!(s.check_integrity().unwrap_err().contains("no slot"));
    s.running[0].slot = slot;
    assert_eq!(s.check_integrity(), Ok(()));
}
