//! A model shared by ranks, as threads: what it says is what it says alone, to the rounding of sums in f32.

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::Result;
use crate::config::Shard;
use crate::engine::follow;
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

/// An engine of so many ranks.
fn shared(name: &str, world: usize, expert_parallel: bool, limits: &EngineLimits) -> Engine<Cpu> {
    let own = name.to_string();
    let first: Arc<dyn Group> = Arc::new(
        Threads::lead(world, Duration::from_secs(20), Arc::new(|_, _| Ok(())), move |group| {
            let shard = Shard { rank: group.rank(), world, expert_parallel };
            follow(part(&own, shard, Arc::clone(&group))?, group)
        })
        .unwrap(),
    );
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
