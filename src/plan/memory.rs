//! What an engine takes of each card, by making it on cards that are only imagined: the same code allocates, and nothing can
//! be forgotten.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

use super::part_of;
use crate::Result;
use crate::backend::Caches;
use crate::backend::cuda::Cuda;
use crate::config::{ModelConfig, Shard};
use crate::engine::{Engine, EngineLimits, Report, follow};
use crate::model::Model;
use crate::ranks::{Collectives, Group, PATIENCE, Threads};
use crate::weights::quant::Quantization;
use crate::weights::{Checkpoint, ModelTensors, MtpTensors};

/// Bytes of a card, by what they are for.
type Bytes = BTreeMap<&'static str, usize>;
type Ledger = Box<dyn Fn() -> Bytes + Send>;

/// How an engine would be made.
#[derive(Debug, Clone)]
pub struct DryRun {
    /// What the model is quantised to at load; otherwise as its checkpoint has it.
    pub quantization: Option<Quantization>,
    /// With the MTP module.
    pub mtp: bool,
    /// How pages and slots are held.
    pub caches: Caches,
    /// Its sizes.
    pub limits: EngineLimits,
    /// How ranks share the model, as the first of them.
    pub shard: Shard,
    /// Bytes of each card.
    pub card_bytes: usize,
}

/// What the cards hold.
#[derive(Debug, Clone, Serialize)]
pub struct Held {
    /// Of rank 0.
    #[serde(flatten)]
    pub report: Report,
    /// Bytes of each rank's card, by what they are for.
    pub ranks: Vec<Bytes>,
}

/// What every rank is made from.
struct Load {
    run: DryRun,
    config: ModelConfig,
    tensors: ModelTensors,
    module: Option<MtpTensors>,
    /// Of each rank, as they come.
    ledgers: Mutex<BTreeMap<usize, Ledger>>,
}

impl DryRun {
    /// What a model of this configuration would hold, with the weights of a checkpoint (of a [random](Checkpoint::random) one
    /// in bf16), and what is left for keys and values. Ranks are threads, each with a card.
    ///
    /// # Errors
    /// `OutOfMemory` for what does not fit, `Request` for limits that cannot be and for ranks that cannot share the model.
    pub fn held(self, config: &ModelConfig, checkpoint: &Checkpoint) -> Result<Held> {
        part_of(config, self.shard)?;
        let tensors = ModelTensors::resolve(checkpoint, config)?;
        let module = self.mtp.then(|| MtpTensors::resolve(checkpoint, config)).transpose()?;
        let (tensors, module) = match self.quantization {
            Some(to) => (tensors.requantised(to), module.map(|module| module.requantised(to))),
            None => (tensors, module),
        };
        let ledgers = Mutex::default();
        let load = Arc::new(Load { run: self, config: config.clone(), tensors, module, ledgers });
        let group: Option<Arc<dyn Group>> = match load.run.shard.world {
            1 => None,
            world => {
                let load = Arc::clone(&load);
                let other = move |group: Arc<dyn Group>| {
                    follow(load.part(group.rank(), Some(Arc::clone(&group)))?, group)
                };
                Some(Arc::new(Threads::lead(world, PATIENCE, Arc::new(|_, _| Ok(())), other)?))
            }
        };
        let made = load.part(0, group.clone()).and_then(|model| {
            Engine::among(model, group.clone(), &load.run.limits, config.vocab, Vec::new())
        });
        let engine = made.inspect_err(|error| {
            if let Some(group) = &group {
                group.fail(&error.to_string());
            }
        })?;
        let ledgers = load.ledgers.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Held { report: engine.report(), ranks: ledgers.values().map(|ledger| ledger()).collect() })
    }
}

impl Load {
    /// A rank's part of the model, on its card.
    fn part(&self, rank: usize, group: Option<Arc<dyn Group>>) -> Result<Model<Cuda>> {
        let (config, shard) = (&self.config, Shard { rank, ..self.run.shard });
        let card = Cuda::imagine(self.run.card_bytes)?;
        let mut ledgers = self.ledgers.lock().unwrap_or_else(PoisonError::into_inner);
        ledgers.insert(rank, Box::new(card.ledger()));
        drop(ledgers);
        let card = match group {
            Some(group) => card.among(group, Collectives::Auto, Vec::new()),
            None => card,
        };
        let tensors = self.tensors.clone();
        let model = Model::load_shard(config, shard, tensors, None, card, |_, _| Ok(()))?;
        let model = model.with_caches(self.run.caches);
        match &self.module {
            Some(module) => model.with_mtp(module.sharded(config, shard)?, None),
            None => Ok(model),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{KvCache, StateType};
    use crate::plan::{Part, PlanOptions, Scheme, family_config, gpu, plan};

    fn limits() -> EngineLimits {
        EngineLimits { max_num_seqs: 64, max_num_batched_tokens: 8192, ..EngineLimits::default() }
    }

    /// In bf16, on one card.
    fn alone(gib: usize) -> DryRun {
        let (caches, shard) = (Caches::default(), Shard::whole());
        let limits = limits();
        DryRun { quantization: None, mtp: false, caches, limits, shard, card_bytes: gib << 30 }
    }

    fn shared(world: usize, gib: usize) -> DryRun {
        DryRun { shard: Shard::first(world, false).unwrap(), ..alone(gib) }
    }

    fn of(name: &str, run: DryRun) -> Result<Held> {
        run.held(&family_config(name)?, &Checkpoint::random())
    }

    #[test]
    fn weights_are_those_of_the_other_plan() {
        let Held { report, ranks } = of("35b", alone(80)).unwrap();
        assert_eq!(ranks, std::slice::from_ref(&report.stats.memory));
        let other = Part::whole(&family_config("35b").unwrap()).weights(Scheme::Bf16).unwrap();
        let found = report.stats.memory["weights"] as f64;
        assert!((found / other.resident as f64 - 1.0).abs() < 1e-3, "{found} {}", other.resident);
        let total: usize = report.stats.memory.values().sum();
        assert!(total < 80 << 30 && report.num_pages * report.page_bytes < total);
        assert!(report.max_model_len > 8192);
    }

    #[test]
    fn a_quantised_checkpoint_is_held_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = ("python/qwen35rs/model", folder.path().join("fp8"));
        let from = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(from);
        crate::quantize::quantize(&from, &to, Quantization::Fp8, None, |_, _| Ok(())).unwrap();
        let config = ModelConfig::from_dir(&to).unwrap();
        let held = |checkpoint: &Checkpoint, quantization| {
            let run = DryRun { quantization, limits: EngineLimits::default(), ..alone(8) };
            run.held(&config, checkpoint).unwrap().ranks[0]["weights"] as f64
        };
        let checkpoint = Checkpoint::open(&to).unwrap();
        let (codes, plain) = (held(&checkpoint, None), held(&Checkpoint::random(), None));
        // Its experts are too small for kernels that take codes; its projections are a byte an element, and scales.
        let tensors = ModelTensors::resolve(&checkpoint, &config).unwrap();
        let projections =
            tensors.tensors().filter(|tensor| tensor.encoded().is_some() && !tensor.name.contains("expert"));
        let saved: usize = projections.map(|tensor| tensor.num_elements()).sum();
        let found = (plain - codes) as usize;
        assert!(found < saved && found > saved - saved / 100, "{found} {saved}");
        assert!(
            saved > 1 << 20
                && crate::plan::stored(&to, &config, &Part::whole(&config)).unwrap().resident < codes as u64
        );
    }

    #[test]
    fn small_caches_hold_more() {
        let caches = Caches { kv: KvCache::Fp8, state: StateType::F16 };
        let [plain, small] =
            [alone(80), DryRun { caches, ..alone(80) }].map(|run| of("35b", run).unwrap().report);
        // Bytes of a row of 256 elements and its scale.
        assert_eq!(small.page_bytes * 512, plain.page_bytes * 260);
        assert_eq!(2 * small.stats.memory["recurrent states"], plain.stats.memory["recurrent states"]);
        let [more, less] = [&small, &plain].map(|report| report.num_pages as f64);
        assert!(more > 1.7 * less, "{more} {less}");
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let text = of("122b", alone(80)).unwrap_err().to_string();
        assert!(text.contains("weights") && text.contains("the device has"), "{text}");
    }

    #[test]
    fn ranks_share_what_can_be_shared() {
        let whole = of("122b", alone(300)).unwrap().report;
        for (world, page_share) in [(2, 2), (4, 2), (8, 2)] {
            let Held { report, ranks } = of("122b", shared(world, 140)).unwrap();
            assert_eq!(ranks.len(), world);
            assert!(ranks.iter().all(|bytes| *bytes == ranks[0]) && ranks[0] == report.stats.memory);
            // Two heads of keys and values: from two ranks on each has one.
            assert_eq!(report.page_bytes * page_share, whole.page_bytes, "{world}");
            let states = |report: &Report| report.stats.memory["recurrent states"];
            assert_eq!(states(&report) * world, states(&whole));
            let pages = ranks[0]["pages of keys"] + ranks[0]["pages of values"];
            assert_eq!(pages, report.num_pages * report.page_bytes);
            assert!(ranks[0].values().sum::<usize>() <= 140 << 30);
            let part = Part::new(&family_config("122b").unwrap(), Shard::first(world, false).unwrap());
            let counted = part.unwrap().weights(Scheme::Bf16).unwrap().resident as f64;
            let found = ranks[0]["weights"] as f64;
            assert!((found / counted - 1.0).abs() < 1e-3, "{world}: {found} {counted}");
        }
        let text = of("122b", alone(140)).unwrap_err().to_string();
        assert!(text.contains("out of memory: weights"), "{text}");
    }

    #[test]
    fn quantised_parts_are_as_large_as_they_are_counted() {
        let config = family_config("35b").unwrap();
        for quantization in [
            Quantization::Fp8,
            Quantization::Int4 { group: Quantization::GROUP },
            Quantization::Mixed { group: Quantization::GROUP },
        ] {
            for world in [1, 2, 4] {
                let run = DryRun { quantization: Some(quantization), ..shared(world, 80) };
                let found = of("35b", run).unwrap().ranks[0]["weights"] as f64;
                let part = Part::new(&config, Shard::first(world, false).unwrap()).unwrap();
                let counted = part.weights(quantization.into()).unwrap().resident as f64;
                assert!((found / counted - 1.0).abs() < 0.02, "{quantization:?} {world}: {found} {counted}");
            }
        }
    }

    #[test]
    fn regions_are_those_of_the_kernels() {
        let region = |world: usize| of("122b", shared(world, 140)).unwrap().ranks[0]["sums over ranks"];
        // 64 rows of logits behind flags and counts; of 64 channels and each rank 2 x 2 rows of bf16, and 4 chunks, of 5 rows
        // of two ranks, or of 2 rows and twice that for sums of four or more; and the status.
        let (logits, row) = (16_384 + 64 * 248_320 * 4, 2 * 3072);
        assert_eq!(region(2), logits + 64 * 2 * (4 * row + 4 * 5 * row) + 4);
        assert_eq!(region(4), logits + 64 * 4 * (4 * row + 4 * 2 * row + 4 * 2 * 2 * row) + 4);
        let alone = of("35b", alone(80)).unwrap();
        assert!(!alone.ranks[0].contains_key("sums over ranks"));
    }

    #[test]
    fn ranks_that_cannot_share_are_refused() {
        let error = |run: DryRun| of("35b", run).unwrap_err().to_string();
        assert!(error(shared(3, 80)).starts_with("tensor_parallel_size: found 3; allowed: 1, 2, 4, 8, 16"));
        assert_eq!(
            error(shared(16, 80)),
            "tensor_parallel_size: found 16; allowed: at most 8 in a plan, of cards that address each other's memory"
        );
    }

    #[test]
    fn whole_experts_take_as_much_as_slices_of_all() {
        let weights = |run: DryRun| of("35b", run).unwrap().ranks[0]["weights"] as f64;
        let experts = DryRun { shard: Shard::first(2, true).unwrap(), ..shared(2, 80) };
        assert!((weights(experts) / weights(shared(2, 80)) - 1.0).abs() < 1e-3);
    }

    #[test]
    fn what_is_chosen_can_be_loaded() {
        for (name, card, num_cards, num_seqs) in [
            ("122b", "H200", 2, 32),
            ("122b", "H100 80GB", 1, 8),
            ("122b", "H100 80GB", 4, 32),
            ("35b", "H100 80GB", 8, 64),
            ("35b", "RTX 4090", 2, 8),
            ("397b", "H200", 8, 32),
            ("27b", "RTX 4090", 4, 8),
        ] {
            let (config, card) = (family_config(name).unwrap(), gpu(card).unwrap().0);
            let options = PlanOptions { num_seqs: Some(num_seqs), ..PlanOptions::default() };
            let weights = |scheme: Scheme, part: &Part| Ok(part.weights(scheme));
            let found =
                plan(&config, std::slice::from_ref(&card), &[num_cards], &[], &weights, &options).unwrap();
            let chosen = found.choices[0].chosen.as_ref().unwrap();
            let quantization = match chosen.scheme {
                Scheme::Bf16 => None,
                Scheme::Fp8Head => Some(Quantization::Fp8),
                Scheme::Mixed => Some(Quantization::Mixed { group: Quantization::GROUP }),
                _ => Some(Quantization::Int4 { group: Quantization::GROUP }),
            };
            let limits = EngineLimits {
                max_num_seqs: num_seqs.div_ceil(chosen.replicas),
                max_model_len: Some(options.context),
                ..EngineLimits::default()
            };
            let run = DryRun {
                quantization,
                limits,
                card_bytes: (card.memory_gib * f64::from(1 << 30)) as usize,
                ..shared(chosen.tensor_parallel_size, 0)
            };
            let held = run.held(&config, &Checkpoint::random());
            assert!(held.is_ok(), "{name} on {num_cards} {}: {chosen:?} {:?}", card.name, held.err());
        }
    }
}
