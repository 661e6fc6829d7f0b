//! A model shared by ranks, as threads: what it says is what it says alone, to the rounding of sums in f32.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::*;
use crate::Result;
use crate::batch::{Batch, BatchLimits, BatchSeq, PAGE_LEN, PageId, SlotId};
use crate::config::Shard;
use crate::engine::follow;
use crate::engine::runner::{Loaded, Runner};
use crate::ranks::{Group, Threads};

/// Checkpoints, and the numbers of ranks that share them.
const SHARED: [(&str, &[usize]); 6] = [
    ("dense_bf16", &[2]),
    ("dense_r3", &[2]),
    ("moe_bf16", &[2]),
    ("moe_ranks", &[2, 3, 4, 8]),
    (MTP, &[2]),
    (SMALL, &[2]),
];

fn part(name: &str, shard: Shard, group: Arc<dyn Group>) -> Result<Model<Cpu>> {
    let (folder, caches) = folder_of(name);
    let config = ModelConfig::from_dir(&folder)?;
    let checkpoint = Checkpoint::open(&folder)?;
    let tensors = ModelTensors::resolve(&checkpoint, &config)?;
    let model = Model::load_shard(&config, shard, tensors, None, Cpu::among(group), |_, _| Ok(()))?;
    let model = model.with_caches(caches);
    match MtpTensors::resolve(&checkpoint, &config) {
        Ok(mtp) => model.with_mtp(mtp.sharded(&config, shard)?, None),
        Err(_) => Ok(model),
    }
}

/// Rank 0 of so many, the others of which follow.
fn lead(name: &str, world: usize, expert_parallel: bool) -> Threads {
    let own = name.to_string();
    Threads::lead(world, Duration::from_secs(20), Arc::new(|_, _| Ok(())), move |group| {
        let shard = Shard { rank: group.rank(), world, expert_parallel };
        follow(part(&own, shard, Arc::clone(&group))?, group)
    })
    .unwrap()
}

/// An engine of so many ranks.
fn shared(name: &str, world: usize, expert_parallel: bool, limits: &EngineLimits) -> Engine<Cpu> {
    let first: Arc<dyn Group> = Arc::new(lead(name, world, expert_parallel));
    let model = part(name, Shard { rank: 0, world, expert_parallel }, Arc::clone(&first)).unwrap();
    Engine::among(model, Some(first), limits, usize::MAX, Vec::new()).unwrap()
}

/// Logits of some prompts, drafts where there are any, and texts, greedy and sampled, of a full engine.
fn results(engine: &mut Engine<Cpu>) -> (Vec<Vec<f32>>, Vec<Vec<u32>>) {
    let mut ids = Vec::new();
    for (i, len) in [1, 5, 64, 130].into_iter().enumerate() {
        ids.push(engine.add_logits(&prompt(len, i)).unwrap());
    }
    if engine.model().has_mtp() {
        ids.push(engine.add_mtp_logits(&prompt(70, 1)).unwrap());
    }
    let greedy = SamplingParams { max_tokens: Some(12), temperature: 0.0, ..SamplingParams::default() };
    for i in 0..3 {
        ids.push(engine.add(&prompt(20 + 31 * i, i), &greedy, 0).unwrap());
        ids.push(engine.add(&prompt(9 + 40 * i, i), &sampled(i as u64, 8), 0).unwrap());
    }
    let outcomes = finish(engine);
    let of = |id: &RequestId| &outcomes[id];
    let logits = ids.iter().map(of).filter(|o| o.0.is_empty());
    let logits = logits.map(|o| o.1.iter().map(|&bits| f32::from_bits(bits)).collect()).collect();
    (logits, ids.iter().map(of).filter(|o| !o.0.is_empty()).map(|o| o.0.clone()).collect())
}

#[test]
fn ranks_say_what_one_says() {
    for (name, worlds) in SHARED {
        let alone = results(&mut engine(name, &limits()));
        for &world in worlds {
            for expert_parallel in [false, true] {
                if expert_parallel && !name.starts_with("moe") {
                    continue;
                }
                let (logits, texts) = results(&mut shared(name, world, expert_parallel, &limits()));
                for (logits, alone) in logits.iter().zip(&alone.0) {
                    let largest = alone.iter().fold(0f32, |most, x| most.max(x.abs()));
                    let apart = logits.iter().zip(alone).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
                    // Codes of small caches may fall to the other side of a rounding.
                    let bound = if name == SMALL { 2e-2 } else { 2e-5 };
                    assert!(apart <= bound * largest, "{name}, {world} ranks: {apart} of {largest}");
                }
                if name != SMALL {
                    assert_eq!(texts, alone.1, "{name}, {world} ranks");
                }
            }
        }
    }
}

#[test]
fn a_rank_that_ends_ends_the_engine() {
    let first = Threads::lead(2, Duration::from_secs(20), Arc::new(|_, _| Ok(())), |group| {
        // It gets as far as the memory, and one order more.
        crate::ranks::least(group.as_ref(), None)?;
        group.receive()?;
        crate::ranks::least(group.as_ref(), None)?;
        group.receive()?;
        group.exchange(&[], true)?;
        group.receive()?;
        Err(Error::Internal("no luck".into()))
    });
    let first: Arc<dyn Group> = Arc::new(first.unwrap());
    let shard = Shard { rank: 0, world: 2, expert_parallel: false };
    let model = part("moe_bf16", shard, Arc::clone(&first)).unwrap();
    let mut engine = Engine::among(model, Some(first), &limits(), usize::MAX, Vec::new()).unwrap();
    engine.add(&prompt(20, 1), &sampled(1, 5), 0).unwrap();
    let error = loop {
        match engine.step(|_| Ok(())) {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    let text = error.to_string();
    assert!(
        matches!(error, Error::Ranks { .. }) && text.contains("rank 1: ") && text.contains("no luck"),
        "{text}"
    );
}

#[test]
fn an_abandoned_step_leaves_the_ranks_together() {
    let mut engine = shared("moe_bf16", 2, false, &limits());
    let id = engine.add(&prompt(100, 1), &sampled(1, 5), 0).unwrap();
    assert!(matches!(engine.step(|_| Err(Error::Interrupted)), Err(Error::Interrupted)));
    let outcomes = finish(&mut engine);
    assert_eq!(outcomes[&id].0.len(), 5);
}

/// Counts the bytes of orders.
struct Counted {
    group: Threads,
    sent: AtomicUsize,
}

impl Group for Counted {
    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn world(&self) -> usize {
        self.group.world()
    }

    fn exchange(&self, mine: &[u8], unhurried: bool) -> Result<Vec<Arc<[u8]>>> {
        self.group.exchange(mine, unhurried)
    }

    fn send(&self, order: &[u8]) -> Result<()> {
        self.sent.fetch_add(order.len(), Ordering::Relaxed);
        self.group.send(order)
    }

    fn receive(&self) -> Result<Option<Arc<[u8]>>> {
        self.group.receive()
    }

    fn check(&self) -> Result<()> {
        self.group.check()
    }

    fn fail(&self, why: &str) {
        self.group.fail(why);
    }

    fn end(&self) {
        self.group.end();
    }
}

/// One token of each of so many sequences, on top of so many old ones.
fn decode(num_seqs: usize, cached_len: usize, pages_each: usize) -> Batch {
    let mut batch = Batch { positions: vec![[cached_len as u32; 3]; num_seqs], ..Batch::default() };
    for i in 0..num_seqs {
        batch.token_ids.push((7 * i % 140) as u32);
        batch.logit_rows.push(i);
        let seq = BatchSeq {
            query_start: i,
            query_len: 1,
            cached_len,
            chunked_len: 0,
            slot: SlotId(i as u32),
            page_start: batch.pages.len(),
        };
        batch.seqs.push(seq);
        let num_pages = cached_len / PAGE_LEN + 1;
        batch.pages.extend((0..num_pages).map(|page| PageId((i * pages_each + page) as u32)));
    }
    batch
}

/// What the other ranks are told of a step is as long as its tokens, whatever came before them.
#[test]
fn orders_of_long_sequences_are_short() {
    const NAME: &str = "dense_attention_only";
    let (num_seqs, old, pages_each) = (64, 16_382, 258);
    let runner = |model: Model<Cpu>, group: Option<Arc<dyn Group>>| -> Runner<Cpu> {
        let loaded = Loaded::new(model, group);
        loaded.free_memory().unwrap();
        let max_pages = num_seqs * pages_each;
        let limits = BatchLimits { max_tokens: 64, max_seqs: num_seqs, max_len: 17_000, max_pages };
        let workspace = loaded.workspace(&limits).unwrap();
        loaded.free_memory().unwrap();
        loaded.with_memory(max_pages, num_seqs, workspace).unwrap()
    };
    let mut alone = runner(model(NAME), None);
    let counted = Arc::new(Counted { group: lead(NAME, 2, false), sent: AtomicUsize::new(0) });
    let group: Arc<dyn Group> = counted.clone();
    let shard = Shard { rank: 0, world: 2, expert_parallel: false };
    let mut first = runner(part(NAME, shard, Arc::clone(&group)).unwrap(), Some(group));
    let rows: Vec<usize> = (0..num_seqs).collect();
    // The first tells all pages; the third begins a page in every sequence.
    let bounds = [40_000, 1_100, 1_400, 1_100];
    for (i, bound) in bounds.into_iter().enumerate() {
        let batch = decode(num_seqs, old + i, pages_each);
        counted.sent.store(0, Ordering::Relaxed);
        let mut logits = [&mut first, &mut alone].map(|runner| {
            runner.forward(&batch, || Ok(())).unwrap();
            runner.logits(&rows, None).unwrap().into_owned()
        });
        let sent = counted.sent.load(Ordering::Relaxed);
        assert!(sent <= bound, "{sent} bytes of step {i}");
        let [found, want] = &mut logits;
        let largest = want.iter().fold(0f32, |most, x| most.max(x.abs()));
        let apart = found.iter().zip(want).map(|(a, b)| (*a - *b).abs()).fold(0f32, f32::max);
        assert!(apart <= 2e-5 * largest, "{apart} of {largest}");
    }
}
