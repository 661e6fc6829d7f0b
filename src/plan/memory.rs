//! What an engine takes of each card, by making it on cards that are only imagined: the same code allocates, and nothing can
//! be forgotten.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

use super::{cache_bytes, part_of, what_fits};
use crate::Result;
use crate::backend::cuda::Cuda;
use crate::backend::{Backend, Caches};
use crate::batch::PAGE_LEN;
use crate::cache::pages_for;
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
    checkpoint: Checkpoint,
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
        self.limits.check(config.max_context())?;
        part_of(config, self.shard)?;
        let tensors = ModelTensors::resolve(checkpoint, config)?;
        let module = self.mtp.then(|| MtpTensors::resolve(checkpoint, config)).transpose()?;
        let (tensors, module) = match self.quantization {
            Some(to) => (tensors.requantised(to), module.map(|module| module.requantised(to))),
            None => (tensors, module),
        };
        let ledgers = Mutex::default();
        let (config, checkpoint) = (config.clone(), checkpoint.clone());
        let load = Arc::new(Load { run: self, config, checkpoint, tensors, module, ledgers });
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
            Engine::among(model, group.clone(), &load.run.limits, load.config.vocab, Vec::new())
        });
        let engine = made.inspect_err(|error| {
            if let Some(group) = &group {
                group.fail(&error.to_string());
            }
        })?;
        let ledgers = load.ledgers.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Held { report: engine.report(), ranks: ledgers.values().map(|ledger| ledger()).collect() })
    }

    /// What cards would have to hold at least where these are too small: with pages for one sequence, as long as is asked for or
    /// of one page.
    ///
    /// # Errors
    /// As [`DryRun::held`], but for memory.
    pub fn needed(mut self, config: &ModelConfig, checkpoint: &Checkpoint) -> Result<Held> {
        self.limits.check(config.max_context())?;
        let part = part_of(config, self.shard)?;
        let (kv, mtp_kv) = cache_bytes(part.config()).kv(self.caches);
        let token_bytes = (kv + if self.mtp { mtp_kv } else { 0 }) as usize;
        let len = self.limits.max_model_len.unwrap_or(PAGE_LEN).min(config.max_context());
        self.limits.max_model_len = Some(len);
        self.limits.kv_cache_bytes = Some(pages_for(len) * PAGE_LEN * token_bytes);
        self.card_bytes = usize::MAX;
        self.held(config, checkpoint)
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
        let free = card.free_memory()?;
        let loaded = Model::load_shard(config, shard, tensors, None, card, |_, _| Ok(()));
        let explain = |error| what_fits(error, &self.checkpoint, config, shard, self.run.quantization, free);
        let model = loaded.map_err(explain)?.with_caches(self.run.caches);
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
    use crate::plan::{Arguments, Gpu, Part, PlanOptions, Scheme, family_config, gpu, plan};

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
        assert!(saved > 1 << 20);
    }

    /// The model's projections keep their codes; its experts are too small for kernels that take them.
    #[test]
    fn a_quantised_checkpoint_is_counted_as_it_is_held() {
        let folder = tempfile::tempdir().unwrap();
        let from = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("python/qwen35rs/model");
        for to in [Quantization::Fp8, Quantization::Int4 { group: 32 }, Quantization::Mixed { group: 32 }] {
            let dir = folder.path().join(to.to_string());
            crate::quantize::quantize(&from, &dir, to, None, |_, _| Ok(())).unwrap();
            let (config, checkpoint) =
                (ModelConfig::from_dir(&dir).unwrap(), Checkpoint::open(&dir).unwrap());
            for world in [1, 2, 4] {
                let Ok(part) = Part::new(&config, Shard::first(world, false).unwrap()) else { continue };
                let counted = crate::plan::stored(&dir, &config, &part).unwrap().resident as f64;
                let run = DryRun { limits: EngineLimits::default(), ..shared(world, 8) };
                let found = run.held(&config, &checkpoint).unwrap().ranks[0]["weights"] as f64;
                // Vectors are f32 there.
                assert!((counted / found - 1.0).abs() < 0.02, "{to} {world}: {counted} {found}");
            }
        }
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

    /// The engine that these arguments make on a card.
    fn made_by(arguments: &Arguments, card: &Gpu) -> DryRun {
        let Arguments { tensor_parallel_size, max_num_seqs, max_model_len, mtp, .. } = *arguments;
        let parse = |name: &str| Quantization::parse(name, Quantization::GROUP).unwrap();
        let (kv, state) =
            (arguments.kv_cache_dtype.unwrap_or("auto"), arguments.state_dtype.unwrap_or("float32"));
        DryRun {
            quantization: arguments.quantization.as_deref().map(parse),
            mtp: mtp.unwrap_or(false),
            caches: Caches::from_names(kv, state).unwrap(),
            limits: EngineLimits { max_num_seqs, max_model_len, ..EngineLimits::default() },
            shard: Shard::first(tensor_parallel_size, false).unwrap(),
            card_bytes: (card.memory_gib * f64::from(1 << 30)) as usize,
        }
    }

    /// Loads what is chosen for each of these numbers of cards and of requests, with the arguments that are said, and no others.
    /// How many there were.
    fn load_all(name: &str, card: &str, options: &PlanOptions) -> usize {
        let (config, card) = (family_config(name).unwrap(), gpu(card).unwrap().0);
        let weights = |scheme: Scheme, part: &Part| Ok(part.weights(scheme));
        let mut num_loaded = 0;
        for num_seqs in [1, 32, 300] {
            let options = PlanOptions { num_seqs: Some(num_seqs), ..options.clone() };
            let cards = std::slice::from_ref(&card);
            let found = plan(&config, cards, &[1, 2, 4, 8], &[], &weights, &options).unwrap();
            for choice in found.choices {
                let Some(chosen) = choice.chosen else { continue };
                let arguments = &chosen.arguments;
                let said = format!("{name} on {} {}: {arguments:?}", choice.num_cards, card.name);
                let held = made_by(arguments, &card).held(&config, &Checkpoint::random());
                let report = held.unwrap_or_else(|error| panic!("{said}: {error}")).report;
                // As many as are said run at once, and are as long as is said.
                let all = arguments.max_num_seqs * pages_for(options.context);
                assert!(arguments.max_num_seqs <= num_seqs && report.num_pages >= all, "{said}");
                let same = |layout: &&crate::plan::Layout| {
                    layout.scheme == chosen.scheme
                        && layout.tensor_parallel_size == chosen.tensor_parallel_size
                };
                let layout = choice.layouts.iter().find(same).unwrap();
                let longest = options.max_model_len.unwrap_or(layout.max_context);
                assert!(report.max_model_len >= longest && layout.max_context >= longest, "{said}");
                num_loaded += 1;
            }
        }
        num_loaded
    }

    #[test]
    fn what_is_chosen_can_be_loaded() {
        let mut num_loaded = 0;
        for name in ["0.8b", "4b", "9b", "27b", "35b", "122b", "397b"] {
            for card in ["RTX 4090", "RTX 5090", "H100 80GB", "H200", "DGX Spark"] {
                num_loaded += load_all(name, card, &PlanOptions::default());
            }
        }
        assert!(num_loaded > 300, "{num_loaded}");
    }

    #[test]
    fn what_is_chosen_can_be_loaded_with_all_that_was_asked_for() {
        let all = PlanOptions {
            context: 32_768,
            max_model_len: Some(32_768),
            fp8_kv: true,
            f16_state: true,
            with_mtp: true,
            ..PlanOptions::default()
        };
        let fp8 = PlanOptions { fp8_kv: true, ..PlanOptions::default() };
        let long = PlanOptions { context: 131_072, max_model_len: Some(131_072), ..PlanOptions::default() };
        for options in [all, fp8, long] {
            for (name, card) in [
                ("9b", "RTX 4090"),
                ("27b", "RTX 5090"),
                ("27b", "L40S"),
                ("35b", "RTX 4090"),
                ("122b", "H100 80GB"),
                ("397b", "H200"),
            ] {
                assert!(load_all(name, card, &options) > 0, "{name} on {card}: {options:?}");
            }
        }
    }

    /// What an error says would do, does.
    #[test]
    fn advice_can_be_loaded() {
        let number = |text: &str, before: &str| -> usize {
            let (_, after) = text.split_once(before).unwrap_or_else(|| panic!("{before} in {text}"));
            after.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
        };
        for (name, gib, caches) in [
            ("27b", 60, Caches::default()),
            ("9b", 22, Caches { kv: KvCache::Fp8, state: StateType::F32 }),
            ("122b", 240, Caches::default()),
        ] {
            let full = DryRun { caches, ..alone(gib) };
            let with = |max_num_seqs: usize, max_model_len: Option<usize>| {
                let limits = EngineLimits { max_num_seqs, max_model_len, ..EngineLimits::default() };
                of(name, DryRun { limits, ..full.clone() })
            };
            let text = with(512, None).unwrap_err().to_string();
            assert!(text.contains("are left for keys and values"), "{text}");
            let fewer = number(&text, "lower max_num_seqs to ");
            let found = with(fewer, None);
            assert!(found.is_ok(), "{name}: {text}; then {:?}", found.err());
            // No fewer than it takes.
            assert!(with(fewer + 4, None).is_err(), "{name}: {text}");
            let text = with(fewer / 2, Some(262_144)).unwrap_err().to_string();
            let shorter = number(&text, "lower max_model_len to ");
            assert!(with(fewer / 2, Some(shorter)).is_ok() && shorter < 262_144, "{name}: {text}");
        }
    }

    #[test]
    fn weights_that_are_too_large_say_what_would_fit() {
        let said = |name: &str, run: DryRun| of(name, run).unwrap_err().to_string();
        assert_eq!(
            said("122b", alone(80)),
            "out of memory: weights (227.5 GiB; the device has 79.3 GiB free); what would fit: quantization=\"mixed\" (62.4 GiB), \
             or tensor_parallel_size=4 (58.0 GiB on each device); or end what else runs on the device"
        );
        assert_eq!(
            said("397b", alone(80)),
            "out of memory: weights (738.3 GiB; the device has 79.3 GiB free); what would fit: tensor_parallel_size=4 with \
             quantization=\"int4\" (50.1 GiB on each device); or end what else runs on the device"
        );
        let text = said("397b", alone(8));
        assert!(text.contains("take a device with more memory or a smaller model, or end"), "{text}");
        let text = said("122b", shared(2, 80));
        assert!(text.contains("GiB on each device; the device has") && text.contains("=4 ("), "{text}");
        // Whatever it is that is too large.
        let run = DryRun { quantization: Some(Quantization::Fp8), ..alone(80) };
        assert!(said("122b", run).contains("quantization=\"mixed\" ("));
        // Buffers are no weights.
        let limits = EngineLimits { max_num_batched_tokens: 1 << 20, ..limits() };
        let text = said("35b", DryRun { limits, ..alone(80) });
        assert!(
            text.contains("lower max_model_len, max_num_seqs") && !text.contains("quantization"),
            "{text}"
        );
    }

    #[test]
    fn a_card_of_80_gb_holds_the_122b_in_four_bits() {
        let group = Quantization::GROUP;
        for quantization in [Quantization::Int4 { group }, Quantization::Mixed { group }] {
            let card_bytes = (gpu("H100 80GB").unwrap().0.memory_gib * f64::from(1 << 30)) as usize;
            let limits = EngineLimits::default();
            let run = DryRun { quantization: Some(quantization), limits, card_bytes, ..alone(0) };
            let report = of("122b", run).unwrap().report;
            assert!(report.max_model_len >= 65_536, "{quantization:?}: {}", report.max_model_len);
        }
    }

    #[test]
    fn what_is_needed_is_what_then_fits() {
        for run in [alone(80), shared(2, 80)] {
            let config = family_config("122b").unwrap();
            assert!(run.clone().held(&config, &Checkpoint::random()).is_err());
            let limits = EngineLimits { max_model_len: Some(1000), ..limits() };
            let run = DryRun { limits, ..run };
            let Held { report, ranks } = run.clone().needed(&config, &Checkpoint::random()).unwrap();
            assert_eq!((report.max_model_len, report.num_pages), (1000, 16));
            let most = ranks.iter().map(|bytes| bytes.values().sum::<usize>()).max().unwrap();
            let weights = ranks[0]["weights"];
            let card_bytes = weights + (most - weights) * 10 / 8;
            assert!(DryRun { card_bytes, ..run.clone() }.held(&config, &Checkpoint::random()).is_ok());
            let card_bytes = most - (1 << 20);
            assert!(DryRun { card_bytes, ..run }.held(&config, &Checkpoint::random()).is_err());
        }
    }
}
