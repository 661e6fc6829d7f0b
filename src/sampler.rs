//! Logits to a token: bias, penalties, temperature, top-k, top-p, min-p, and the log-probabilities asked for.
//!
//! A token depends on its own row, its request's parameters and output, and `(seed, position)`: not on the
//! batch. No step sorts the vocabulary.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use crate::backend::cpu::softmax::{exp_weights, log_sum_exp};
use crate::backend::{Edit, Sampling};
use crate::random::mix;
use crate::request::{SamplingParams, TokenLogprobs};

/// What the sampler must know of a request.
pub struct Context<'a> {
    /// How to sample.
    pub params: &'a SamplingParams,
    /// The prompt.
    pub prompt: &'a [u32],
    /// Generated so far.
    pub output: &'a [u32],
    /// Key of the request's random numbers.
    pub seed: u64,
    /// Tokens below this id exist; the rows above it are padding and are never chosen.
    pub num_tokens: usize,
    /// The model's stop tokens.
    pub eos: &'a [u32],
}

impl Context<'_> {
    /// How many of the largest logits decide the token; `None` where all do.
    pub fn num_candidates(&self) -> Option<usize> {
        let p = self.params;
        let as_they_are = p.logit_bias.is_empty()
            && p.repetition_penalty == 1.0
            && p.frequency_penalty == 0.0
            && p.presence_penalty == 0.0
            && self.output.len() >= p.min_tokens;
        match p.top_k {
            _ if !as_they_are || p.logprobs.is_some() => None,
            _ if p.temperature == 0.0 => Some(1),
            0 => None,
            k => Some(k),
        }
    }

    /// The same in plain numbers, with bias, stop tokens that are held back and penalties by token.
    pub fn sampling(&self) -> Sampling {
        let p = self.params;
        let mut edits: BTreeMap<u32, Edit> = BTreeMap::new();
        for &(id, bias) in &p.logit_bias {
            edits.entry(id).or_default().bias += bias;
        }
        if self.output.len() < p.min_tokens {
            let own = if p.ignore_eos { &[] } else { self.eos };
            for &id in own.iter().chain(&p.stop_token_ids) {
                edits.entry(id).or_default().banned = true;
            }
        }
        if p.repetition_penalty != 1.0 {
            for &id in self.prompt.iter().chain(self.output) {
                edits.entry(id).or_default().seen = true;
            }
        }
        if p.frequency_penalty != 0.0 || p.presence_penalty != 0.0 {
            for &id in self.output {
                edits.entry(id).or_default().count += 1;
            }
        }
        edits.iter_mut().for_each(|(&id, edit)| edit.token = id);
        Sampling {
            uniform: uniform(self.seed, self.output.len() as u64),
            temperature: p.temperature,
            top_p: p.top_p,
            min_p: p.min_p,
            top_k: p.top_k,
            logprobs: p.logprobs,
            repetition_penalty: p.repetition_penalty,
            frequency_penalty: p.frequency_penalty,
            presence_penalty: p.presence_penalty,
            edits: edits.into_values().collect(),
        }
    }
}

/// Scratch of [`sample`], reused from call to call.
#[derive(Default)]
pub struct Scratch {
    row: Vec<f32>,
    weights: Vec<f32>,
    candidates: Vec<(f32, u32)>,
}

/// Chooses a token from its logits `[vocab]`. `None` where no logit is a number above -inf.
pub fn sample(
    logits: &[f32],
    context: &Context<'_>,
    scratch: &mut Scratch,
) -> Option<(u32, Option<TokenLogprobs>)> {
    let logits = &logits[..context.num_tokens];
    if context.num_candidates() == Some(1) {
        return argmax(logits).map(|token| (token, None));
    }
    let mut row = std::mem::take(&mut scratch.row);
    row.clear();
    row.extend_from_slice(logits);
    let token = choose(&mut row, context, scratch);
    scratch.row = row;
    let token = token?;
    Some((token, context.params.logprobs.map(|n| logprobs(logits, token, n, scratch))))
}

fn choose(row: &mut [f32], context: &Context<'_>, scratch: &mut Scratch) -> Option<u32> {
    let sampling = context.sampling();
    for edit in &sampling.edits {
        if let Some(x) = row.get_mut(edit.token as usize) {
            *x = edit.apply(&sampling, *x);
        }
    }
    let p = context.params;
    let best = argmax(row)?;
    if p.temperature == 0.0 || p.top_k == 1 {
        return Some(best);
    }
    let max = row[best as usize];
    if max == f32::INFINITY {
        return Some(best);
    }
    let u = sampling.uniform;
    // Finite, so that the best token's weight is exp(0) = 1 and never NaN.
    let scale = (1.0 / p.temperature).min(f32::MAX);
    let Scratch { weights, candidates, .. } = scratch;
    let total: f64 = if p.top_k > 0 && p.top_k < row.len() {
        // By their logits, which tell apart what the weights of a high temperature do not.
        top(row, p.top_k, candidates);
        row.iter_mut().zip(&*candidates).for_each(|(x, c)| *x = c.0);
        exp_weights(&row[..candidates.len()], max, scale, weights);
        candidates.iter_mut().zip(&*weights).for_each(|(c, &w)| c.0 = w);
        weights.iter().map(|&w| f64::from(w)).sum()
    } else {
        exp_weights(row, max, scale, weights);
        if p.top_p >= 1.0 {
            // min-p is a threshold on the weight, since the best one has weight 1.
            let kept = |w: f32| if w >= p.min_p { f64::from(w) } else { 0.0 };
            return pick(weights.iter().enumerate().map(|(i, &w)| (i as u32, kept(w))), u).or(Some(best));
        }
        nucleus(weights, p.top_p, candidates)
    };
    let mut sum = 0.0;
    let keep = candidates.iter().take_while(|c| {
        let before = sum;
        sum += f64::from(c.0);
        before < f64::from(p.top_p) * total && c.0 >= p.min_p
    });
    let keep = keep.count().max(1);
    pick(candidates[..keep].iter().map(|&(w, i)| (i, f64::from(w))), u).or(Some(best))
}

/// The largest logit, the lowest id of equals; NaN is passed over.
pub fn argmax(row: &[f32]) -> Option<u32> {
    let mut best = f32::NEG_INFINITY;
    let mut at = None;
    // Block by block, so that the common case is a vectorised maximum.
    for (b, block) in row.chunks(256).enumerate() {
        let max = block.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
        if max > best {
            best = max;
            at = block.iter().position(|&x| x == max).map(|i| (b * 256 + i) as u32);
        }
    }
    at
}

/// The first entry at which the running sum of weights passes `u` times their total.
fn pick(weights: impl Iterator<Item = (u32, f64)> + Clone, u: f64) -> Option<u32> {
    let total: f64 = weights.clone().map(|w| w.1).sum();
    let (target, mut sum) = (u * total, 0.0);
    let mut last = None;
    for (id, w) in weights {
        if w > 0.0 {
            sum += w;
            last = Some(id);
            if sum > target {
                break;
            }
        }
    }
    last
}

/// Larger first, lower id first among equals.
fn rank(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// The k largest numbers above -inf, largest first.
fn top(weights: &[f32], k: usize, out: &mut Vec<(f32, u32)>) {
    out.clear();
    let room = 2 * k + 256;
    let mut floor = f32::NEG_INFINITY;
    for (b, block) in weights.chunks(64).enumerate() {
        let max = block.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
        // An equal one with a higher id loses to one that is already held.
        if max <= floor {
            continue;
        }
        out.extend(block.iter().enumerate().filter(|x| *x.1 > floor).map(|(i, &w)| (w, (b * 64 + i) as u32)));
        if out.len() > room {
            out.select_nth_unstable_by(k - 1, rank);
            out.truncate(k);
            floor = out[k - 1].0;
        }
    }
    out.sort_unstable_by(rank);
    out.truncate(k);
}

/// Enough of the largest weights, largest first, to hold `top_p` of the total, which is returned.
fn nucleus(weights: &[f32], top_p: f32, out: &mut Vec<(f32, u32)>) -> f64 {
    let total = weights.iter().map(|&w| f64::from(w)).sum::<f64>();
    let target = f64::from(top_p) * total;
    let mut floor = 0.01f32;
    loop {
        out.clear();
        out.extend(weights.iter().enumerate().filter(|x| *x.1 >= floor).map(|(i, &w)| (w, i as u32)));
        if floor == 0.0 || out.iter().map(|c| f64::from(c.0)).sum::<f64>() >= target {
            break;
        }
        floor = if floor > 1e-12 { floor * 0.01 } else { 0.0 };
    }
    out.sort_unstable_by(rank);
    total
}

fn logprobs(raw: &[f32], chosen: u32, n: usize, scratch: &mut Scratch) -> TokenLogprobs {
    let norm = log_sum_exp(raw);
    let x = raw[chosen as usize];
    let better = raw.iter().filter(|&&y| y > x).count();
    let candidates = &mut scratch.candidates;
    if n > 0 {
        top(raw, n, candidates);
    } else {
        candidates.clear();
    }
    TokenLogprobs {
        chosen: x - norm,
        rank: better + 1,
        top: candidates.iter().map(|&(y, id)| (id, y - norm)).collect(),
    }
}

/// A number in [0, 1) that depends on nothing but the key and the index (SplitMix64, Steele et al. 2014).
pub fn uniform(seed: u64, index: u64) -> f64 {
    (mix(mix(seed) ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15)) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests;
