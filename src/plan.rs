//! "Will it fit, and how fast could it be": arithmetic on a configuration alone, or ([`stored`]) on the headers of a
//! checkpoint. Touches no device, and no weight but the zero points of 4-bit integers. Speeds are floors on time (bytes that
//! must be read over bandwidth), so real speeds lie below them.
//!
//! Cards that share a model are ranks, each with its part of it (`config::Shard`). A step takes at least what a card's own
//! bytes take, and then the sums over ranks.
//!
//! GB is 1e9 bytes, GiB is 2^30. One decode step of a batch reads each weight it needs once, and for each
//! sequence reads its keys and values and reads and writes its delta-rule and convolution state.

mod caches;
mod family;
mod formats;
mod gpus;
mod layout;
mod matrices;
#[cfg(feature = "cuda")]
mod memory;
mod room;
mod smaller;
mod stored;
mod why;

pub use caches::{CacheBytes, cache_bytes};
pub use family::{FAMILY, family_config};
pub use formats::{Scheme, WeightFormat};
pub use gpus::{GPUS, Gpu, Link, gpu};
pub use layout::{Arguments, Choice, Chosen, Layout, Refused};
pub use matrices::{ParamCounts, Part, WeightBytes, expected_experts};
#[cfg(feature = "cuda")]
pub use memory::{DryRun, Held};
pub use smaller::what_fits;
pub use stored::stored;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use self::room::{GIB, Room};
use crate::backend::{Caches, KvCache, StateType};
use crate::config::{ModelConfig, Shard};
use crate::engine::EngineLimits;
use crate::ranks::MAX_CARDS;
use crate::{Error, Result};

/// Sums over ranks in a layer: behind its mixer, and behind its feed-forward block.
const ALL_REDUCES: usize = 2;

/// What a plan assumes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlanOptions {
    /// Tokens per sequence, for the number of sequences and for the speed.
    pub context: usize,
    /// Keys and values in fp8 in place of bf16.
    pub fp8_kv: bool,
    /// Recurrent states in f16 in place of f32.
    pub f16_state: bool,
    /// Hold the vision tower (bf16).
    pub with_vision: bool,
    /// Hold the MTP module (bf16) and its cache.
    pub with_mtp: bool,
    /// The longest sequence that an engine is to make buffers for; `None` for as long as there is room for.
    pub max_model_len: Option<usize>,
    /// Share of what weights and `reserve_gib` leave of a card that may be used: an engine's `gpu_memory_utilization`.
    pub memory_utilization: f64,
    /// GiB per card kept for the CUDA context, workspaces, activations and what ranks exchange.
    pub reserve_gib: f64,
    /// Microseconds of a sum over ranks, in a step of few tokens; `None` for what is assumed of a card's [`Link`].
    pub all_reduce_us: Option<f64>,
    /// Requests at once, over all replicas, that a layout is chosen for; `None` to choose none.
    pub num_seqs: Option<usize>,
}

impl Default for PlanOptions {
    fn default() -> Self {
        PlanOptions {
            context: 8192,
            fp8_kv: false,
            f16_state: false,
            with_vision: false,
            with_mtp: false,
            max_model_len: None,
            memory_utilization: EngineLimits::default().gpu_memory_utilization,
            reserve_gib: 1.5,
            all_reduce_us: None,
            num_seqs: None,
        }
    }
}

impl PlanOptions {
    /// How pages and slots are held.
    pub fn caches(&self) -> Caches {
        Caches {
            kv: if self.fp8_kv { KvCache::Fp8 } else { KvCache::Auto },
            state: if self.f16_state { StateType::F16 } else { StateType::F32 },
        }
    }

    /// What a sum over so many of these cards is taken to last.
    fn sum_us(&self, gpu: &Gpu, num_cards: usize) -> f64 {
        self.all_reduce_us.unwrap_or_else(|| gpu.link.all_reduce_us(num_cards))
    }
}

/// The part of a model that each of so many cards has.
///
/// # Errors
/// As [`ModelConfig::sharded`]; `Request` for more than [`MAX_CARDS`].
pub fn part_of(config: &ModelConfig, shard: Shard) -> Result<Part> {
    if shard.world > MAX_CARDS {
        let allowed = format!("at most {MAX_CARDS} in a plan, of cards that address each other's memory");
        return Err(Error::request("tensor_parallel_size", shard.world, allowed));
    }
    Part::new(config, shard)
}

/// One scheme on a number of cards of one kind that share the model (tensor parallel). Where they cannot, only `refused`
/// says anything.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlanRow {
    /// The card.
    pub gpu: Cow<'static, str>,
    /// Number of cards, each a rank.
    pub num_cards: usize,
    /// How the weights are stored.
    pub scheme: Scheme,
    /// Why so many cannot share the model.
    pub refused: Option<String>,
    /// Weights on each card, in GiB.
    pub weights_gib_per_card: Option<f64>,
    /// Memory of each card that is left for sequences, in GiB; negative where the weights do not fit.
    pub free_gib_per_card: Option<f64>,
    /// Of it, what a sequence of `context` tokens takes.
    pub seq_gib_per_card: Option<f64>,
    /// What joins the cards.
    pub link: Link,
    /// Microseconds that a sum over them is taken to last.
    pub all_reduce_us: f64,
    /// Whether at least one sequence of one page fits.
    pub fits: bool,
    /// Longest single sequence in tokens, at most the model's own limit.
    pub max_context: usize,
    /// Sequences of `context` tokens that fit at once.
    pub max_seqs: usize,
    /// Tokens per second of one sequence of `context` tokens that bandwidth and sums over ranks allow at most, where it fits and
    /// the bandwidth is known.
    pub decode_limit_tokens_per_s: Option<f64>,
}

/// The answer of `plan` for one model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// Parameters.
    pub params: ParamCounts,
    /// Cache and state.
    pub cache: CacheBytes,
    /// Weight bytes under each scheme that applies.
    pub weights: Vec<WeightBytes>,
    /// What the rows assume.
    pub options: PlanOptions,
    /// One row per card, number of cards and scheme.
    pub rows: Vec<PlanRow>,
    /// The layout of each card and number of cards, where one was asked for.
    pub choices: Vec<Choice>,
}

/// Bytes of a part under a scheme; `None` where the scheme says nothing about the model.
pub type WeightsOf<'a> = &'a dyn Fn(Scheme, &Part) -> Result<Option<WeightBytes>>;

/// What so many ranks have of a model, or why they cannot share it.
type Split = std::result::Result<(Part, Vec<WeightBytes>), String>;

/// Plans a model on each of `gpus`, for each of `card_counts` and each of `schemes`: of none for all that apply, and a layout
/// is then chosen among those that a model can be quantised to at load.
///
/// # Errors
/// `Request` for a context of 0, a number of cards or of requests of 0, or a share of memory outside `(0, 1]`; what `weights`
/// says.
pub fn plan(
    config: &ModelConfig,
    gpus: &[Gpu],
    card_counts: &[usize],
    schemes: &[Scheme],
    weights: WeightsOf<'_>,
    options: &PlanOptions,
) -> Result<Plan> {
    check(config, card_counts, options)?;
    let whole = Part::whole(config);
    let asked = if schemes.is_empty() { &Scheme::ALL } else { schemes };
    let all = asked.iter().filter_map(|&scheme| weights(scheme, &whole).transpose());
    let all: Vec<WeightBytes> = all.collect::<Result<_>>()?;
    let most = options.num_seqs.and(card_counts.iter().copied().max()).unwrap_or(0).min(MAX_CARDS);
    let sizes: BTreeSet<usize> = card_counts.iter().copied().chain(1..=most).collect();
    let splits = sizes.into_iter().map(|world| Ok((world, split(config, world, &all, weights)?)));
    let splits: BTreeMap<usize, Split> = splits.collect::<Result<_>>()?;
    let (mut rows, mut choices) = (Vec::new(), Vec::new());
    for gpu in gpus {
        for &num_cards in card_counts {
            let split = &splits[&num_cards];
            rows.extend(all.iter().filter_map(|all| row(gpu, num_cards, split, all.scheme, options)));
            if let Some(num_seqs) = options.num_seqs {
                let among = if schemes.is_empty() { &layout::AT_LOAD[..] } else { schemes };
                choices.push(layout::choose(gpu, num_cards, num_seqs, &splits, among, options));
            }
        }
    }
    let (params, cache) = (whole.params(), cache_bytes(config));
    Ok(Plan { params, cache, weights: all, options: options.clone(), rows, choices })
}

fn check(config: &ModelConfig, card_counts: &[usize], options: &PlanOptions) -> Result<()> {
    if options.context == 0 || options.context > config.max_context() {
        let allowed = format!("from 1 to {}, the model's longest context", config.max_context());
        return Err(Error::request("context", options.context, allowed));
    }
    let utilization = options.memory_utilization;
    if !(utilization > 0.0 && utilization <= 1.0) {
        return Err(Error::request("memory_utilization", utilization, "above 0, at most 1"));
    }
    let all_reduce_us = options.all_reduce_us.unwrap_or(0.0);
    for (name, value) in [("reserve_gib", options.reserve_gib), ("all_reduce_us", all_reduce_us)] {
        if !(value >= 0.0 && value.is_finite()) {
            return Err(Error::request(name, value, "0 or more"));
        }
    }
    if card_counts.contains(&0) {
        return Err(Error::request("card_counts", 0, "1 or more"));
    }
    match options.num_seqs {
        Some(0) => Err(Error::request("max_num_seqs", 0, "1 or more")),
        _ => Ok(()),
    }
}

/// `all`: what the whole model has.
fn split(config: &ModelConfig, world: usize, all: &[WeightBytes], weights: WeightsOf<'_>) -> Result<Split> {
    let part = match part_of(config, Shard { rank: 0, world, expert_parallel: false }) {
        Ok(part) if world == 1 => return Ok(Ok((part, all.to_vec()))),
        Ok(part) => part,
        Err(error) => return Ok(Err(error.to_string())),
    };
    let bytes = all.iter().filter_map(|all| weights(all.scheme, &part).transpose());
    let bytes = bytes.collect::<Result<_>>()?;
    Ok(Ok((part, bytes)))
}

/// `None` where the scheme says nothing about the model.
fn row(gpu: &Gpu, num_cards: usize, split: &Split, scheme: Scheme, options: &PlanOptions) -> Option<PlanRow> {
    let refused = PlanRow {
        gpu: gpu.name.clone(),
        num_cards,
        scheme,
        refused: None,
        weights_gib_per_card: None,
        free_gib_per_card: None,
        seq_gib_per_card: None,
        link: gpu.link,
        all_reduce_us: options.sum_us(gpu, num_cards),
        fits: false,
        max_context: 0,
        max_seqs: 0,
        decode_limit_tokens_per_s: None,
    };
    let (part, weights) = match split {
        Ok((part, weights)) => (part, weights.iter().find(|weights| weights.scheme == scheme)?),
        Err(why) => return Some(PlanRow { refused: Some(why.clone()), ..refused }),
    };
    let room = room_of(gpu, part, weights, options);
    let max_context = room.max_context(1);
    let alone = step_seconds(gpu, part, weights, 1, options).filter(|_| max_context > 0);
    Some(PlanRow {
        weights_gib_per_card: Some(held_bytes(part, weights, options) / GIB),
        free_gib_per_card: Some(room.free / GIB),
        seq_gib_per_card: Some(room.of_seq(options.context) / GIB),
        fits: max_context > 0,
        max_context,
        max_seqs: room.max_seqs(options.context),
        decode_limit_tokens_per_s: alone.map(|seconds| 1.0 / seconds),
        ..refused
    })
}

/// What a card has for sequences.
fn room_of(gpu: &Gpu, part: &Part, weights: &WeightBytes, options: &PlanOptions) -> Room {
    let left = (gpu.memory_gib - options.reserve_gib) * GIB - held_bytes(part, weights, options);
    Room::new(left, part.config(), options)
}

/// Bytes of weights on a card, with what else is to be held. The vision tower is whole on every card.
fn held_bytes(part: &Part, weights: &WeightBytes, options: &PlanOptions) -> f64 {
    let params = part.params();
    let extra = if options.with_vision { 2 * params.vision } else { 0 }
        + if options.with_mtp { 2 * params.mtp } else { 0 };
    (weights.resident + extra) as f64
}

/// What one decode step of `batch` sequences takes at least, where the bandwidth is known: a card's bytes, and the sums over
/// ranks.
fn step_seconds(
    gpu: &Gpu,
    part: &Part,
    weights: &WeightBytes,
    batch: usize,
    options: &PlanOptions,
) -> Option<f64> {
    let bytes = part.step_bytes(weights, batch, options.context, options.caches(), None);
    let sums = if part.shard().is_whole() { 0 } else { ALL_REDUCES * part.config().layers.len() };
    let sum_us = options.sum_us(gpu, part.shard().world);
    Some(bytes / (gpu.bandwidth_gbs? * 1e9) + sums as f64 * sum_us * 1e-6)
}

#[cfg(test)]
mod tests;
