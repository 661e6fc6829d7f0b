//! Which layout to take of given cards: how many of them share a model, how many replicas of that there are, and the
//! precision; and why.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::Serialize;

use super::{Gpu, PlanOptions, PlanRow, Scheme, Split, row, step_seconds};
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
    /// Longest single sequence in tokens; 0 where nothing fits.
    pub max_context: usize,
    /// Sequences of `context` tokens that fit a replica at once.
    pub max_seqs: usize,
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
/// requests, or, where no bandwidth is known, the most replicas.
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
    let fits = |layout: &&Layout| layout.max_seqs > 0;
    let scheme = schemes.iter().find(|&&scheme| layouts.iter().any(|l| l.scheme == scheme && fits(&l)));
    let among: Vec<&Layout> = layouts.iter().filter(|l| Some(&l.scheme) == scheme).filter(fits).collect();
    let best = best(&among, |layout| layout.tokens_per_s);
    Choice {
        gpu: gpu.name.clone(),
        num_cards,
        num_seqs,
        chosen: best.map(|layout| Chosen {
            scheme: layout.scheme,
            tensor_parallel_size: layout.tensor_parallel_size,
            replicas: layout.replicas,
            idle_cards: layout.idle_cards,
        }),
        why: match best {
            Some(best) => why(best, &among, schemes, num_seqs, options),
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
    // The replica that has most of them.
    let batch = running.div_ceil(replicas);
    let seconds = step_seconds(gpu, part, weights, batch, options).filter(|_| running > 0);
    Some(Layout {
        scheme: row.scheme,
        tensor_parallel_size: row.num_cards,
        replicas,
        idle_cards: num_cards % row.num_cards,
        weights_gib_per_card: row.weights_gib_per_card?,
        max_context: row.max_context,
        max_seqs: row.max_seqs,
        tokens_per_s_alone: row.decode_limit_tokens_per_s,
        running,
        tokens_per_s: seconds.map(|seconds| running as f64 / seconds),
    })
}

/// The layout with the most of something; of equals the one with the fewest cards to a model.
fn best<'a>(layouts: &[&'a Layout], most: impl Fn(&Layout) -> Option<f64>) -> Option<&'a Layout> {
    let value = |layout: &Layout| most(layout).unwrap_or(0.0);
    layouts.iter().copied().rev().max_by(|a, b| value(a).total_cmp(&value(b)))
}

fn why(
    best: &Layout,
    among: &[&Layout],
    schemes: &[Scheme],
    num_seqs: usize,
    options: &PlanOptions,
) -> Vec<String> {
    let worse: Vec<_> =
        schemes.iter().take_while(|&&scheme| scheme != best.scheme).map(|scheme| scheme.name()).collect();
    let fits = format!(
        "{} fits, {:.1} GiB of weights on a card, with up to {} tokens of context",
        best.scheme.name(),
        best.weights_gib_per_card,
        best.max_context
    );
    let mut why = vec![match worse.is_empty() {
        true => format!("{fits}."),
        false => format!("{} fit no sequence of {} tokens; {fits}.", worse.join(", "), options.context),
    }];
    let size = |layout: &Layout| format!("tensor_parallel_size {}", layout.tensor_parallel_size);
    let Some(tokens) = best.tokens_per_s else {
        why.push("The card's bandwidth is not known: this has the most replicas that fit.".into());
        return why;
    };
    let others: Vec<&Layout> =
        among.iter().copied().filter(|l| l.tensor_parallel_size != best.tensor_parallel_size).collect();
    let second = self::best(&others, |layout| layout.tokens_per_s);
    let against = second.and_then(|l| Some(format!(", {:.0} with {}", l.tokens_per_s?, size(l))));
    why.push(format!(
        "{num_seqs} requests at once: at most {tokens:.0} tokens/s in all{}.",
        against.unwrap_or_default()
    ));
    if let Some(alone) = self::best(among, |layout| layout.tokens_per_s_alone)
        && let (Some(most), Some(here)) = (alone.tokens_per_s_alone, best.tokens_per_s_alone)
    {
        let same = alone.tensor_parallel_size == best.tensor_parallel_size;
        let against = if same { String::new() } else { format!(", {most:.0} with {}", size(alone)) };
        why.push(format!("One request alone: at most {here:.0} tokens/s{against}."));
    }
    why
}

fn why_not(gpu: &Gpu, layouts: &[Layout], options: &PlanOptions) -> String {
    let usable = gpu.memory_gib * options.memory_utilization - options.reserve_gib;
    let smallest = layouts.iter().min_by(|a, b| a.weights_gib_per_card.total_cmp(&b.weights_gib_per_card));
    let Some(layout) = smallest else {
        return "No precision that was asked for says anything about this model.".into();
    };
    let cards = match layout.tensor_parallel_size {
        1 => "a card".into(),
        n => format!("each of {n} cards that share it"),
    };
    format!(
        "Nothing fits with {} tokens of context: {} takes {:.1} GiB of weights on {cards}, which has {usable:.1} GiB for them \
         and for sequences.",
        options.context,
        layout.scheme.name(),
        layout.weights_gib_per_card,
    )
}

#[cfg(test)]
mod tests;
