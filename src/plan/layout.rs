//! Which layout to take of given cards: how many of them share a model, how many replicas of that there are, and the
//! precision; the arguments that load it; and why (`why.rs`).

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::Serialize;

use super::why::{why, why_not};
use super::{Gpu, Link, PlanOptions, PlanRow, Scheme, Split, room_of, row, step_seconds};
use crate::backend::{KvCache, StateType};
use crate::ranks::MAX_CARDS;

/// What a model can be held in as it is loaded, best first.
pub(super) const AT_LOAD: [Scheme; 4] = [Scheme::Bf16, Scheme::Fp8Head, Scheme::Mixed, Scheme::Int4];

/// One way to use some cards: replicas of a model, each on as many cards as share it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Layout {
    /// How the weights are stored.
    pub scheme: Scheme,
    /// Cards that share a model.
    pub tensor_parallel_size: usize,
    /// Models side by side.
    pub replicas: usize,
    /// Cards that are left over.
    pub idle_cards: usize,
    /// Weights on each card, in GiB.
    pub weights_gib_per_card: f64,
    /// Memory of each card that is left for sequences, in GiB; negative where the weights do not fit.
    pub free_gib_per_card: f64,
    /// Of it, what a sequence of `context` tokens takes.
    pub seq_gib_per_card: f64,
    /// Sequences of `context` tokens that fit a replica at once.
    pub max_seqs: usize,
    /// Of the requests that the layout is for, those of the replica that runs most of them.
    pub max_num_seqs: usize,
    /// Longest sequence in tokens where so many may run; 0 where nothing fits.
    pub max_context: usize,
    /// Tokens per second of one request alone at most, where it fits and the bandwidth is known.
    pub tokens_per_s_alone: Option<f64>,
    /// Of the requests that the layout is for, those that run at once.
    pub running: usize,
    /// Tokens per second of all of these at most.
    pub tokens_per_s: Option<f64>,
}

/// A number of cards that cannot share the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refused {
    /// How many.
    pub tensor_parallel_size: usize,
    /// Why not.
    pub why: String,
}

/// Arguments of `LLM` that load a layout, each by its name there. What is `None` is left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Arguments {
    /// Cards that share a model.
    pub tensor_parallel_size: usize,
    /// What its matrices are quantised to at load.
    pub quantization: Option<String>,
    /// Requests of a replica that run at once.
    pub max_num_seqs: usize,
    /// Where a length was asked for.
    pub max_model_len: Option<usize>,
    /// Where it is not the usual one.
    pub kv_cache_dtype: Option<&'static str>,
    /// The same.
    pub state_dtype: Option<&'static str>,
    /// Where the module is asked for.
    pub mtp: Option<bool>,
}

impl Arguments {
    fn of(layout: &Layout, options: &PlanOptions) -> Self {
        let (caches, [kv_cache_dtype, state_dtype]) = (options.caches(), options.caches().names());
        Arguments {
            tensor_parallel_size: layout.tensor_parallel_size,
            quantization: layout.scheme.quantization().map(|to| to.to_string()),
            max_num_seqs: layout.max_num_seqs,
            max_model_len: options.max_model_len,
            kv_cache_dtype: (caches.kv != KvCache::Auto).then_some(kv_cache_dtype),
            state_dtype: (caches.state != StateType::F32).then_some(state_dtype),
            mtp: options.with_mtp.then_some(true),
        }
    }
}

/// What to take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Chosen {
    /// The precision.
    pub scheme: Scheme,
    /// Cards that share a model.
    pub tensor_parallel_size: usize,
    /// Models side by side.
    pub replicas: usize,
    /// Cards that are left over.
    pub idle_cards: usize,
    /// What loads a replica.
    pub arguments: Arguments,
    /// What its checkpoint must be published in, where the arguments alone would give something else.
    pub published: Option<&'static str>,
}

/// The answer for a number of cards of one kind.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Choice {
    /// The card.
    pub gpu: Cow<'static, str>,
    /// How many there are.
    pub num_cards: usize,
    /// Requests at once that it is for.
    pub num_seqs: usize,
    /// What to take; `None` where nothing fits.
    pub chosen: Option<Chosen>,
    /// Why, in sentences.
    pub why: Vec<String>,
    /// What it was chosen from: every precision with every number of cards that can share the model.
    pub layouts: Vec<Layout>,
    /// Numbers of cards that cannot.
    pub refused: Vec<Refused>,
}

/// The first precision that fits with `context` tokens, and in it the layout with the most tokens per second of `num_seqs`
/// requests, or, where no bandwidth is known, with the most requests that run at once. Cards that only a network joins share
/// a model where no precision fits one of them.
pub(super) fn choose(
    gpu: &Gpu,
    num_cards: usize,
    num_seqs: usize,
    splits: &BTreeMap<usize, Split>,
    schemes: &[Scheme],
    options: &PlanOptions,
) -> Choice {
    let sizes = || splits.range(1..=num_cards.min(MAX_CARDS));
    let layouts: Vec<_> = schemes
        .iter()
        .flat_map(|&scheme| sizes().map(move |(&size, split)| (scheme, size, split)))
        .filter_map(|(scheme, size, split)| {
            let row = row(gpu, size, split, scheme, options)?;
            layout(gpu, num_cards, num_seqs, split, row, options)
        })
        .collect();
    let refused = sizes().filter_map(|(&tensor_parallel_size, split)| {
        Some(Refused { tensor_parallel_size, why: split.as_ref().err()?.clone() })
    });
    let fitting: Vec<&Layout> = layouts.iter().filter(|layout| layout.running > 0).collect();
    let alone: Vec<&Layout> = fitting.iter().copied().filter(|l| l.tensor_parallel_size == 1).collect();
    let fitting = if gpu.link == Link::Network && !alone.is_empty() { alone } else { fitting };
    let scheme = schemes.iter().find(|&&scheme| fitting.iter().any(|layout| layout.scheme == scheme));
    let among: Vec<&Layout> = fitting.iter().copied().filter(|l| Some(&l.scheme) == scheme).collect();
    let best = best(&among);
    Choice {
        gpu: gpu.name.clone(),
        num_cards,
        num_seqs,
        chosen: best.map(|layout| Chosen {
            scheme: layout.scheme,
            tensor_parallel_size: layout.tensor_parallel_size,
            replicas: layout.replicas,
            idle_cards: layout.idle_cards,
            arguments: Arguments::of(layout, options),
            published: layout.scheme.published(),
        }),
        why: match best {
            Some(best) => why(gpu, best, &among, &fitting, schemes, num_seqs, options),
            None => vec![why_not(gpu, &layouts, options)],
        },
        refused: refused.collect(),
        layouts,
    }
}

fn layout(
    gpu: &Gpu,
    num_cards: usize,
    num_seqs: usize,
    split: &Split,
    row: PlanRow,
    options: &PlanOptions,
) -> Option<Layout> {
    let (part, weights) = split.as_ref().ok()?;
    let weights = weights.iter().find(|weights| weights.scheme == row.scheme)?;
    let replicas = num_cards / row.num_cards;
    let running = num_seqs.min(replicas.saturating_mul(row.max_seqs));
    let max_num_seqs = running.div_ceil(replicas);
    let room = room_of(gpu, part, weights, options);
    let seconds = step_seconds(gpu, part, weights, max_num_seqs, options).filter(|_| running > 0);
    Some(Layout {
        scheme: row.scheme,
        tensor_parallel_size: row.num_cards,
        replicas,
        idle_cards: num_cards % row.num_cards,
        weights_gib_per_card: row.weights_gib_per_card?,
        free_gib_per_card: row.free_gib_per_card?,
        seq_gib_per_card: row.seq_gib_per_card?,
        max_seqs: row.max_seqs,
        max_num_seqs,
        max_context: if running > 0 { room.max_context(max_num_seqs) } else { 0 },
        tokens_per_s_alone: row.decode_limit_tokens_per_s.filter(|_| running > 0),
        running,
        tokens_per_s: seconds.map(|seconds| running as f64 / seconds),
    })
}

/// The layout with the most tokens per second, or with the most requests that run; of equals the one with the fewest cards to
/// a model.
pub(super) fn best<'a>(layouts: &[&'a Layout]) -> Option<&'a Layout> {
    let value = |layout: &Layout| (layout.tokens_per_s.unwrap_or(0.0), layout.running);
    layouts.iter().copied().rev().max_by(|a, b| {
        let ((a, running), (b, others)) = (value(a), value(b));
        a.total_cmp(&b).then(running.cmp(&others))
    })
}

#[cfg(test)]
mod tests;
