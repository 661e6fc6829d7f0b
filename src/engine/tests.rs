//! The engine on the CPU backend and the committed checkpoints: what a request gets does not depend on what else
//! happens.

mod late;
mod ranks;

use std::any::Any;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::PathBuf;

use proptest::prelude::*;

use self::late::{Late, Lent};
use super::{Engine, EngineLimits, StepOutput};
use crate::Error;
use crate::backend::cpu::Cpu;
use crate::backend::{Backend, Caches, KvCache, StateType};
use crate::config::ModelConfig;
use crate::model::Model;
use crate::request::{FinishReason, RequestId, SamplingParams};
use crate::weights::{Checkpoint, ModelTensors, MtpTensors};

/// Attention and delta layers, dense and sparse.
const CHECKPOINTS: [&str; 5] = ["dense_bf16", "moe_bf16", "dense_delta_only", MTP, SMALL];

/// With keys and values in fp8 and states in f16.
const SMALL: &str = "moe_bf16, small caches";

/// Has an MTP module, which is loaded here.
const MTP: &str = "moe_vision_mtp";

pub(crate) fn model(name: &str) -> Model<Cpu> {
    model_on(name, Cpu::default())
}

/// Where a checkpoint is, and how it holds what sequences leave behind.
fn folder_of(name: &str) -> (PathBuf, Caches) {
    let (folder, caches) = match name.split_once(',') {
        Some((folder, _)) => (folder, Caches { kv: KvCache::Fp8, state: StateType::F16 }),
        None => (name, Caches::default()),
    };
    (PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data").join(folder), caches)
}

pub(crate) fn model_on<B: Backend>(name: &str, backend: B) -> Model<B> {
    let (path, caches) = folder_of(name);
    let config = ModelConfig::from_dir(&path).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let tensors = ModelTensors::resolve(&checkpoint, &config).unwrap();
    let model = Model::load(&config, tensors, None, backend, |_, _| Ok(())).unwrap().with_caches(caches);
    match MtpTensors::resolve(&checkpoint, &config) {
        Ok(mtp) => model.with_mtp(mtp, None).unwrap(),
        Err(_) => model,
    }
}

pub(crate) fn limits() -> EngineLimits {
    EngineLimits {
        max_model_len: Some(256),
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        ..EngineLimits::default()
    }
}

fn engine(name: &str, limits: &EngineLimits) -> Engine<Cpu> {
    engine_with_eos(name, limits, Vec::new())
}

fn engine_with_eos(name: &str, limits: &EngineLimits, eos: Vec<u32>) -> Engine<Cpu> {
    Engine::new(model(name), limits, usize::MAX, eos).unwrap()
}

/// Bytes of `num_pages` pages of a checkpoint.
fn page_bytes(name: &str, num_pages: usize) -> usize {
    num_pages * model(name).page_bytes()
}

/// All that a request gave: tokens, and each log-probability to the bit.
type Outcome = (Vec<u32>, Vec<u32>, Option<FinishReason>);

fn collect(into: &mut BTreeMap<RequestId, Outcome>, outputs: Vec<StepOutput>) {
    for output in outputs {
        assert!(output.error.is_none(), "{:?}", output.error);
        let outcome = into.entry(output.id).or_default();
        assert!(outcome.2.is_none(), "an output after the end");
        outcome.0.extend(output.token);
        outcome.1.extend(output.logprobs.iter().flat_map(|l| {
            let top = l.top.iter().flat_map(|&(id, x)| [id, x.to_bits()]);
            [l.chosen.to_bits(), l.rank as u32].into_iter().chain(top)
        }));
        outcome.1.extend(output.logits.iter().map(|x| x.to_bits()));
        outcome.2 = output.finish;
    }
}

fn finish<B: Backend>(engine: &mut Engine<B>) -> BTreeMap<RequestId, Outcome> {
    let mut outcomes = BTreeMap::new();
    while !engine.is_idle() {
        collect(&mut outcomes, engine.step(|_| Ok(())).unwrap());
        assert_eq!(engine.scheduler.check_integrity(), Ok(()));
    }
    outcomes
}

fn sampled(seed: u64, max_tokens: usize) -> SamplingParams {
    SamplingParams {
        temperature: 0.9,
        top_p: 0.95,
        frequency_penalty: 0.2,
        seed: Some(seed),
        logprobs: Some(3),
        max_tokens: Some(max_tokens),
        ..SamplingParams::default()
    }
}

fn prompt(len: usize, salt: usize) -> Vec<u32> {
    (0..len).map(|i| ((i * 37 + salt * 101 + i * i) % 140) as u32).collect()
}

/// One request of a random set: prompt length, tokens to generate (none for logits, of drafts if it can be), step it
/// arrives at.
type Job = (usize, Option<usize>, usize);

fn add(engine: &mut Engine<Cpu>, i: usize, job: &Job) -> RequestId {
    match job.1 {
        Some(n) => engine.add(&prompt(job.0, i), &sampled(i as u64, n), 0).unwrap(),
        None if job.0 > 1 && engine.model().has_mtp() => engine.add_mtp_logits(&prompt(job.0, i)).unwrap(),
        None => engine.add_logits(&prompt(job.0, i)).unwrap(),
    }
}

/// A step, which its poll may end after so many calls.
fn step_until<B: Backend>(
    engine: &mut Engine<B>,
    stop: Option<usize>,
    outcomes: &mut BTreeMap<RequestId, Outcome>,
) {
    let polls = Cell::new(0);
    let poll = |_: &[RequestId]| {
        polls.set(polls.get() + 1);
        if stop.is_some_and(|stop| polls.get() > stop) { Err(Error::Interrupted) } else { Ok(()) }
    };
    match engine.step(poll) {
        Ok(outputs) => collect(outcomes, outputs),
        Err(Error::Interrupted) => assert!(stop.is_some()),
        Err(error) => panic!("{error}"),
    }
    assert_eq!(engine.scheduler.check_integrity(), Ok(()));
}

/// What came of a request is what it gave alone, or its start where it was aborted.
fn check_outcome(got: Outcome, alone: &Outcome, aborted: bool) {
    if got.2.is_none() && aborted {
        assert!(alone.0.starts_with(&got.0));
    } else {
        assert_eq!(&got, alone);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn a_request_gets_the_same_bits_in_any_company(
        jobs in prop::collection::vec((1usize..150, prop::option::weighted(0.75, 1usize..40), 0usize..12), 1..6),
        interrupts in prop::collection::vec((0usize..40, 0usize..6), 0..5),
        aborted in prop::option::of(0usize..6),
        which in 0..CHECKPOINTS.len(),
        num_pages in 4usize..9,
        max_num_batched_tokens in prop_oneof![Just(64usize), Just(128), Just(512)],
    ) {
        let name = CHECKPOINTS[which];
        let mut alone = Vec::new();
        let mut one = engine(name, &limits());
        for (i, job) in jobs.iter().enumerate() {
            let id = add(&mut one, i, job);
            alone.push(finish(&mut one).remove(&id).unwrap());
        }

        // Few pages: requests are sent back and computed again.
        let kv_cache_bytes = page_bytes(name, num_pages).max(1);
        let mut all = engine(name, &EngineLimits { kv_cache_bytes: Some(kv_cache_bytes), max_num_batched_tokens, ..limits() });
        let (mut ids, mut outcomes, mut step) = (BTreeMap::new(), BTreeMap::new(), 0);
        while ids.len() < jobs.len() || !all.is_idle() {
            for (i, job) in jobs.iter().enumerate().filter(|(_, job)| job.2 == step) {
                ids.insert(add(&mut all, i, job), i);
            }
            if step == 9 && let Some((&id, _)) = aborted.and_then(|a| ids.iter().nth(a)) {
                all.abort(id);
            }
            let stop = interrupts.iter().find(|x| x.0 == step).map(|x| x.1);
            step_until(&mut all, stop, &mut outcomes);
            step += 1;
        }
        let gone = aborted.and_then(|a| ids.keys().nth(a));
        for (id, i) in &ids {
            check_outcome(outcomes.remove(id).unwrap_or_default(), &alone[*i], Some(id) == gone);
        }
    }
}

#[test]
fn a_pool_too_small_for_all_sends_requests_back() {
    // Shown by counting prompt tokens: with room for all, each is computed once.
    let name = "dense_bf16";
    let run = |num_pages| {
        let kv_cache_bytes = page_bytes(name, num_pages);
        let mut engine = engine(
            name,
            &EngineLimits { kv_cache_bytes: Some(kv_cache_bytes), max_num_batched_tokens: 512, ..limits() },
        );
        for i in 0..4 {
            engine.add(&prompt(60, i), &sampled(i as u64, 30), 0).unwrap();
        }
        let (mut outcomes, mut steps) = (BTreeMap::new(), 0);
        while !engine.is_idle() {
            collect(&mut outcomes, engine.step(|_| Ok(())).unwrap());
            steps += 1;
        }
        (outcomes, steps)
    };
    let (plenty, few) = (run(16), run(4));
    assert_eq!(plenty.0, few.0);
    assert!(few.1 > plenty.1, "{} and {} steps", few.1, plenty.1);
}

#[test]
fn aborting_ends_a_request_and_only_that() {
    let mut engine = engine("moe_bf16", &limits());
    let ids: Vec<_> =
        (0..3).map(|i| engine.add(&prompt(20, i), &sampled(i as u64, 12), 0).unwrap()).collect();
    let mut outcomes = BTreeMap::new();
    for _ in 0..4 {
        collect(&mut outcomes, engine.step(|_| Ok(())).unwrap());
    }
    engine.abort(ids[1]);
    engine.abort(ids[1]);
    engine.abort(RequestId(999));
    let tokens = outcomes[&ids[1]].0.len();
    while !engine.is_idle() {
        collect(&mut outcomes, engine.step(|_| Ok(())).unwrap());
    }
    assert_eq!(outcomes[&ids[1]].0.len(), tokens);
    assert_eq!(outcomes[&ids[0]].2, Some(FinishReason::Length));
    assert_eq!(outcomes[&ids[2]].0.len(), 12);
    assert!(engine.step(|_| Ok(())).unwrap().is_empty());
}

#[test]
fn requests_that_cannot_be_served() {
    let mut engine = engine("dense_bf16", &EngineLimits { max_model_len: Some(16), ..limits() });
    let mut refused = |prompt: &[u32]| match engine.add(prompt, &SamplingParams::default(), 0) {
        Err(Error::Request { field, found, allowed }) => format!("{field}: {found}; {allowed}"),
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&[]), "prompt: 0 tokens; 1 to 15 tokens (max_model_len is 16)");
    assert_eq!(refused(&[1; 16]), "prompt: 16 tokens; 1 to 15 tokens (max_model_len is 16)");
    assert_eq!(refused(&[1, 151]), "prompt_token_ids: 151; token ids below 151");
    assert!(engine.add_logits(&[1; 16]).is_ok());
    assert!(engine.add_logits(&[1; 17]).is_err());
    assert!(engine.add(&[1; 15], &SamplingParams::default(), 0).is_ok());
    let ended = finish(&mut engine);
    assert_eq!(ended.len(), 2);
}

#[test]
fn drafts_change_nothing_else_and_need_the_module() {
    let (tokens, vocab) = (prompt(130, 3), 173);
    let rows = |max_num_batched_tokens| {
        let mut engine = engine(MTP, &EngineLimits { max_num_batched_tokens, ..limits() });
        let ids = [engine.add_logits(&tokens), engine.add_mtp_logits(&tokens), engine.add_logits(&tokens)];
        let outcomes = finish(&mut engine);
        ids.map(|id| outcomes[&id.unwrap()].1.clone())
    };
    let [logits, drafts, again] = rows(64);
    assert_eq!((logits.len(), drafts.len()), (130 * vocab, 129 * vocab));
    assert_eq!(logits, again);
    assert_eq!(rows(512), [logits, drafts.clone(), again]);
    // A draft depends on nothing after its two tokens.
    let mut shorter = engine(MTP, &limits());
    let id = shorter.add_mtp_logits(&tokens[..65]).unwrap();
    assert_eq!(finish(&mut shorter)[&id].1, drafts[..64 * vocab]);

    let error =
        |engine: &mut Engine<Cpu>, len| engine.add_mtp_logits(&tokens[..len]).unwrap_err().to_string();
    assert_eq!(
        error(&mut shorter, 1),
        "prompt: found 1 tokens; allowed: 2 to 256 tokens (max_model_len is 256)"
    );
    let without = error(&mut engine("dense_bf16", &limits()), 9);
    assert!(without.starts_with("mtp_logits: found a model that was loaded without"), "{without}");
}

#[test]
fn limits_that_cannot_be() {
    let make = |limits: EngineLimits| match Engine::new(model("dense_bf16"), &limits, usize::MAX, Vec::new())
    {
        Err(error) => error.to_string(),
        Ok(_) => panic!("accepted"),
    };
    let with = |change: fn(&mut EngineLimits)| {
        let mut limits = limits();
        change(&mut limits);
        make(limits)
    };
    assert_eq!(with(|l| l.max_num_seqs = 0), "max_num_seqs: found 0; allowed: at least 1");
    assert_eq!(
        with(|l| l.max_num_batched_tokens = 63),
        "max_num_batched_tokens: found 63; allowed: at least 64"
    );
    assert_eq!(with(|l| l.max_model_len = Some(0)), "max_model_len: found 0; allowed: 2 to 2048");
    let long = with(|l| l.max_model_len = Some(2049));
    assert_eq!(long, "max_model_len: found 2049; allowed: 2 to 2048, the context the checkpoint declares");
    assert_eq!(with(|l| l.kv_cache_bytes = Some(1)), "kv_cache_bytes: found 1; allowed: at least 24576");
    let memory = with(|l| l.kv_cache_bytes = Some(24_576));
    assert!(
        memory.starts_with("out of memory: ") && memory.contains("lower max_model_len to 64"),
        "{memory}"
    );
}

#[test]
fn stop_tokens_end_a_request_and_are_held_back_by_min_tokens() {
    let greedy =
        |max| SamplingParams { temperature: 0.0, max_tokens: Some(max), ..SamplingParams::default() };
    let name = "dense_bf16";
    let mut free = engine(name, &limits());
    let id = free.add(&prompt(9, 1), &greedy(30), 0).unwrap();
    let tokens = finish(&mut free).remove(&id).unwrap().0;
    let eos = tokens[4];
    let first = tokens.iter().position(|&t| t == eos).unwrap();

    let mut stopped = engine_with_eos(name, &limits(), vec![eos]);
    let mut run = |params: &SamplingParams| {
        let id = stopped.add(&prompt(9, 1), params, 0).unwrap();
        finish(&mut stopped).remove(&id).unwrap()
    };
    let (got, _, why) = run(&greedy(30));
    assert_eq!((got.as_slice(), why), (&tokens[..=first], Some(FinishReason::Stop)));
    let (got, _, why) = run(&SamplingParams { ignore_eos: true, ..greedy(30) });
    assert_eq!((got, why), (tokens.clone(), Some(FinishReason::Length)));
    let (got, _, _) = run(&SamplingParams { min_tokens: 12, ..greedy(30) });
    assert!(got.len() >= 12 && !got[..12].contains(&eos) && got[..first] == tokens[..first]);
    let other = tokens[1];
    let (got, _, why) = run(&SamplingParams { stop_token_ids: vec![other], ignore_eos: true, ..greedy(30) });
    assert_eq!((got.last(), why), (Some(&other), Some(FinishReason::Stop)));
}

/// A greedy request of a random set: prompt length, tokens to generate, steps between it and the one before, and a token
/// that its output would have at this place, to stop at.
type GreedyJob = (usize, usize, usize, Option<usize>);

fn greedy_params(job: &GreedyJob, output: Option<&[u32]>, i: usize) -> SamplingParams {
    let stop = output.and_then(|tokens| tokens.get(job.3?));
    SamplingParams {
        temperature: 0.0,
        max_tokens: Some(job.1),
        // Some look back at their tokens, so that no step may run ahead of them.
        repetition_penalty: if i % 5 == 4 { 1.1 } else { 1.0 },
        stop_token_ids: stop.copied().into_iter().collect(),
        min_tokens: if i % 3 == 2 { 2.min(job.1) } else { 0 },
        logit_bias: vec![(i as u32, 0.5)],
        ..SamplingParams::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn steps_that_run_ahead_of_their_tokens_change_nothing(
        jobs in prop::collection::vec((1usize..150, 1usize..40, 0usize..9, prop::option::of(0usize..30)), 1..6),
        interrupts in prop::collection::vec((0usize..60, 0usize..6), 0..5),
        aborted in prop::option::of((0usize..6, 0usize..30)),
        which in 0..CHECKPOINTS.len(),
        num_pages in 4usize..12,
    ) {
        let name = CHECKPOINTS[which];
        let mut one = engine(name, &limits());
        let mut alone = Vec::new();
        let mut params = Vec::new();
        for (i, job) in jobs.iter().enumerate() {
            let mut run = |params: &SamplingParams| {
                let id = one.add(&prompt(job.0, i), params, 0).unwrap();
                finish(&mut one).remove(&id).unwrap()
            };
            let whole = run(&greedy_params(job, None, i));
            params.push(greedy_params(job, Some(&whole.0), i));
            alone.push(run(&params[i]));
        }

        let kv_cache_bytes = Some(page_bytes(name, num_pages).max(1));
        let limits = EngineLimits { kv_cache_bytes, ..limits() };
        let mut late = Engine::new(model_on(name, Late::default()), &limits, usize::MAX, Vec::new()).unwrap();
        let (mut ids, mut outcomes, mut step, mut wait) = (BTreeMap::new(), BTreeMap::new(), 0, 0);
        while ids.len() < jobs.len() || !late.is_idle() {
            while let Some(job) = jobs.get(ids.len()).filter(|job| wait >= job.2) {
                let i = ids.len();
                ids.insert(late.add(&prompt(job.0, i), &params[i], 0).unwrap(), i);
                wait = 0;
            }
            wait += 1;
            if let Some((which, at)) = aborted && at == step && let Some((&id, _)) = ids.iter().nth(which) {
                late.abort(id);
            }
            let stop = interrupts.iter().find(|x| x.0 == step).map(|x| x.1);
            step_until(&mut late, stop, &mut outcomes);
            step += 1;
        }
        let gone = aborted.and_then(|(which, _)| ids.keys().nth(which));
        for (id, i) in &ids {
            check_outcome(outcomes.remove(id).unwrap_or_default(), &alone[*i], Some(id) == gone);
        }
    }
}

#[test]
fn a_step_runs_ahead_while_nothing_else_is_to_do() {
    let make =
        || Engine::new(model_on("moe_bf16", Late::default()), &limits(), usize::MAX, Vec::new()).unwrap();
    let greedy = |max, penalty| SamplingParams {
        temperature: 0.0,
        max_tokens: Some(max),
        repetition_penalty: penalty,
        ..SamplingParams::default()
    };
    let run = |engine: &mut Engine<Late>, params: &[SamplingParams]| {
        for (i, params) in params.iter().enumerate() {
            engine.add(&prompt(20, i), params, 0).unwrap();
        }
        let outcomes = finish(engine);
        assert_eq!(outcomes.len(), params.len());
        engine.model().backend().counts()
    };
    // The prompt's step, then 19 whose tokens the host has not seen, and none too many.
    assert_eq!(run(&mut make(), &[greedy(20, 1.0)]), (19, 20));
    assert_eq!(run(&mut make(), &[greedy(20, 1.2)]), (0, 20));
    // Two that end at different lengths: the end of the shorter is waited for.
    assert_eq!(run(&mut make(), &[greedy(20, 1.0), greedy(10, 1.0)]), (18, 20));
}

#[test]
fn logits_on_the_device_are_those_on_the_host() {
    // Four pages for two requests of three: one is sent back and starts over.
    for (name, num_pages) in [("moe_bf16", 16), ("dense_bf16", 4)] {
        let kv_cache_bytes = Some(page_bytes(name, num_pages).max(1));
        let limits = EngineLimits { kv_cache_bytes, ..limits() };
        let mut late = Engine::new(model_on(name, Late::default()), &limits, usize::MAX, Vec::new()).unwrap();
        let mut host = engine(name, &limits);
        let prompts = [prompt(130, 1), prompt(150, 2)];
        let ids = prompts.each_ref().map(|p| late.add_device_logits(p).unwrap());
        let expected = prompts.each_ref().map(|p| host.add_logits(p).unwrap());
        let expected_rows = finish(&mut host);
        let mut seen = 0;
        while !late.is_idle() {
            for output in late.step(|_| Ok(())).unwrap() {
                let i = ids.iter().position(|&id| id == output.id).unwrap();
                let memory: &dyn Any = output.device_logits.as_deref().unwrap();
                let rows = memory.downcast_ref::<Lent>().unwrap().0.lock().unwrap();
                let bits: Vec<u32> = rows.iter().map(|x| x.to_bits()).collect();
                assert!(output.logits.is_empty());
                assert_eq!(bits, expected_rows[&expected[i]].1);
                seen += 1;
            }
        }
        assert_eq!(seen, 2);
    }
    let refused = engine("moe_bf16", &limits()).add_device_logits(&[1]).unwrap_err().to_string();
    assert_eq!(refused, "on_device: found a model on the CPU; allowed: a model on a CUDA device");
}
