//! The sampler against a plain one: f64, and a sort of the whole vocabulary.

use std::collections::HashMap;

use proptest::prelude::*;

use super::{Context, Scratch, argmax, nucleus, sample, top, uniform};
use crate::request::SamplingParams;

/// What surrounds a row of logits.
#[derive(Debug, Clone)]
struct Case {
    logits: Vec<f32>,
    params: SamplingParams,
    prompt: Vec<u32>,
    output: Vec<u32>,
    num_tokens: usize,
    eos: Vec<u32>,
}

impl Case {
    fn draw(&self, seed: u64, scratch: &mut Scratch) -> Option<(u32, Option<crate::request::TokenLogprobs>)> {
        let Case { logits, params, prompt, output, num_tokens, eos } = self;
        let context = Context { params, prompt, output, seed, num_tokens: *num_tokens, eos };
        sample(logits, &context, scratch)
    }

    /// Tokens that may be drawn, with their probabilities, best first. `slack` moves the thresholds of top-p and
    /// min-p: a token within rounding of one may fall on either side.
    fn oracle(&self, slack: f64) -> Vec<(u32, f64)> {
        let p = &self.params;
        let mut x: Vec<f64> = self.logits[..self.num_tokens].iter().map(|&x| f64::from(x)).collect();
        for &(id, bias) in &p.logit_bias {
            if let Some(x) = x.get_mut(id as usize) {
                *x += f64::from(bias);
            }
        }
        for (id, x) in x.iter_mut().enumerate() {
            let id = id as u32;
            let stops = p.stop_token_ids.contains(&id) || (!p.ignore_eos && self.eos.contains(&id));
            if self.output.len() < p.min_tokens && stops {
                *x = f64::NEG_INFINITY;
            }
            let count = self.output.iter().filter(|&&t| t == id).count();
            if count > 0 || self.prompt.contains(&id) {
                let penalty = f64::from(p.repetition_penalty);
                *x = if *x > 0.0 { *x / penalty } else { *x * penalty };
            }
            if count > 0 {
                *x -= f64::from(p.frequency_penalty) * count as f64 + f64::from(p.presence_penalty);
            }
        }
        let mut order: Vec<(u32, f64)> = x.iter().enumerate().map(|(i, &x)| (i as u32, x)).collect();
        order.retain(|x| !x.1.is_nan() && x.1 != f64::NEG_INFINITY);
        order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let Some(&best) = order.first() else { return Vec::new() };
        if p.temperature == 0.0 || best.1 == f64::INFINITY {
            return vec![(best.0, 1.0)];
        }
        if p.top_k > 0 {
            order.truncate(p.top_k);
        }
        let weight = |x: f64| ((x - best.1) / f64::from(p.temperature)).exp();
        let total: f64 = order.iter().map(|x| weight(x.1)).sum();
        let (mut sum, mut kept) = (0.0, Vec::new());
        for (i, &(id, x)) in order.iter().enumerate() {
            let w = weight(x);
            let inside = sum < (f64::from(p.top_p) + slack) * total && w >= f64::from(p.min_p) - slack;
            if i > 0 && !inside {
                break;
            }
            kept.push((id, w));
            sum += w;
        }
        let total: f64 = kept.iter().map(|x| x.1).sum();
        kept.into_iter().map(|(id, w)| (id, w / total)).collect()
    }
}

/// Logits on a coarse grid, so that ties are common and rounding decides nothing else.
fn logit() -> impl Strategy<Value = f32> {
    prop_oneof![
        20 => (-32i32..32).prop_map(|x| x as f32 / 8.0),
        1 => Just(f32::NEG_INFINITY),
        1 => Just(f32::NAN),
        1 => Just(-1e38),
    ]
}

fn case() -> impl Strategy<Value = Case> {
    let shape = (
        prop::collection::vec(logit(), 1..14),
        prop_oneof![1 => Just(0.0f32), 6 => (2i32..24).prop_map(|t| t as f32 / 8.0)],
        prop_oneof![Just(0usize), 1usize..16],
        prop_oneof![Just(1.0f32), (1i32..100).prop_map(|p| p as f32 / 100.0)],
        prop_oneof![Just(0.0f32), (0i32..=100).prop_map(|p| p as f32 / 100.0)],
        prop::collection::vec(0u32..14, 0..6),
        prop::collection::vec(0u32..14, 0..6),
        (
            0usize..8,
            prop::collection::vec(0u32..14, 0..3),
            prop::collection::vec(0u32..14, 0..3),
            any::<bool>(),
        ),
        prop::collection::hash_map(0u32..14, (-16i32..16).prop_map(|x| x as f32 / 4.0), 0..4),
        (prop_oneof![Just(1.0f32), Just(0.5), Just(2.0)], -8i32..=8, -8i32..=8, 0usize..4),
    );
    shape.prop_map(|(logits, temperature, top_k, top_p, min_p, prompt, output, stops, bias, penalties)| {
        let (min_tokens, eos, stop_token_ids, ignore_eos) = stops;
        let (repetition_penalty, frequency, presence, padding) = penalties;
        let num_tokens = logits.len().saturating_sub(padding).max(1);
        let params = SamplingParams {
            logit_bias: bias.into_iter().collect(),
            repetition_penalty,
            frequency_penalty: frequency as f32 / 4.0,
            presence_penalty: presence as f32 / 4.0,
            temperature,
            top_k,
            top_p,
            min_p,
            min_tokens,
            stop_token_ids,
            ignore_eos,
            ..SamplingParams::default()
        };
        Case { logits, params, prompt, output, num_tokens, eos }
    })
}

const DRAWS: u64 = 400;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn draws_what_a_sort_would_and_as_often(case in case()) {
        let mut scratch = Scratch::default();
        let mut counts: HashMap<u32, u64> = HashMap::new();
        for seed in 0..DRAWS {
            match case.draw(seed, &mut scratch) {
                Some((token, None)) => *counts.entry(token).or_default() += 1,
                Some(_) => panic!("log-probabilities that nobody asked for"),
                None => prop_assert!(case.oracle(0.0).is_empty()),
            }
        }
        // A few parts in a million: the rounding of f32 weights.
        let (most, least) = (case.oracle(4e-6), case.oracle(-4e-6));
        for token in counts.keys() {
            prop_assert!(most.iter().any(|x| x.0 == *token), "{token} drawn, not in {most:?}");
        }
        for (token, p) in &least {
            let sure = p - most.iter().find(|x| x.0 == *token).map_or(0.0, |x| x.1);
            if sure.abs() > 1e-3 {
                continue; // a neighbour on the threshold changes its share
            }
            let (expected, got) = (p * DRAWS as f64, *counts.get(token).unwrap_or(&0) as f64);
            let bound = 6.0 * (expected * (1.0 - p)).sqrt() + 2.0;
            prop_assert!((got - expected).abs() <= bound, "{token}: {got} draws, expected {expected}");
        }
    }

    #[test]
    fn a_draw_depends_on_seed_and_position_alone(case in case(), seed in any::<u64>(), other in case()) {
        let mut used = Scratch::default();
        let first = case.draw(seed, &mut Scratch::default());
        other.draw(seed, &mut used);
        prop_assert_eq!(case.draw(seed, &mut used), first);
    }

    #[test]
    fn logprobs_are_log_softmax_of_the_raw_logits(mut case in case(), n in 0usize..20) {
        case.params.logprobs = Some(n);
        let raw: Vec<f64> = case.logits[..case.num_tokens].iter().map(|&x| f64::from(x)).collect();
        let numbers: Vec<f64> = raw.iter().copied().filter(|x| !x.is_nan()).collect();
        let max = numbers.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let norm = max + numbers.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
        let Some((token, logprobs)) = case.draw(1, &mut Scratch::default()) else { return Ok(()) };
        let logprobs = logprobs.unwrap();
        let close = |got: f32, id: u32| {
            let want = raw[id as usize] - norm;
            (f64::from(got) - want).abs() <= 2e-6 * want.abs().max(1.0)
        };
        prop_assert!(close(logprobs.chosen, token));
        prop_assert_eq!(logprobs.rank, 1 + numbers.iter().filter(|&&x| x > raw[token as usize]).count());
        let mut order: Vec<u32> = (0..raw.len() as u32).filter(|&i| raw[i as usize] > f64::NEG_INFINITY).collect();
        order.sort_by(|&a, &b| raw[b as usize].total_cmp(&raw[a as usize]).then(a.cmp(&b)));
        order.truncate(n);
        prop_assert_eq!(logprobs.top.iter().map(|x| x.0).collect::<Vec<_>>(), order);
        for (id, x) in logprobs.top {
            prop_assert!(close(x, id));
        }
    }

    #[test]
    fn top_is_a_sort_cut_short(
        row in prop::collection::vec((0i32..500).prop_map(|x| x as f32), 1..3000),
        k in 1usize..400,
    ) {
        let mut order: Vec<(f32, u32)> = row.iter().enumerate().map(|(i, &w)| (w, i as u32)).collect();
        order.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut got = Vec::new();
        top(&row, k, &mut got);
        prop_assert_eq!(&got[..], &order[..k.min(row.len())]);
    }

    #[test]
    fn nucleus_is_the_head_of_a_sort_and_holds_enough(
        row in prop::collection::vec((0i32..500).prop_map(|x| (-x as f32 / 10.0).exp()), 1..3000),
        top_p in 0.001f32..1.0,
    ) {
        let mut order: Vec<(f32, u32)> = row.iter().enumerate().map(|(i, &w)| (w, i as u32)).collect();
        order.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut got = Vec::new();
        nucleus(&row, top_p, &mut got);
        prop_assert_eq!(&got[..], &order[..got.len()]);
        let sum = |list: &[(f32, u32)]| list.iter().map(|c| f64::from(c.0)).sum::<f64>();
        prop_assert!(sum(&got) >= f64::from(top_p) * sum(&order) * (1.0 - 1e-12));
    }

    #[test]
    fn argmax_is_the_first_of_the_largest(
        row in prop::collection::vec(prop_oneof![8 => (-5i32..5).prop_map(|x| x as f32), 1 => Just(f32::NAN),
            1 => Just(f32::NEG_INFINITY), 1 => Just(f32::INFINITY)], 0..700),
    ) {
        let mut best: Option<usize> = None;
        for (i, x) in row.iter().enumerate().filter(|x| *x.1 > f32::NEG_INFINITY) {
            if best.is_none_or(|b| *x > row[b]) {
                best = Some(i);
            }
        }
        prop_assert_eq!(argmax(&row), best.map(|b| b as u32));
    }
}

fn plain(logits: Vec<f32>, params: SamplingParams) -> Case {
    Case { num_tokens: logits.len(), logits, params, prompt: vec![], output: vec![], eos: vec![] }
}

#[test]
fn every_mix_of_filters_survives_extreme_rows() {
    let rows = [
        vec![f32::NAN; 9],
        vec![f32::NEG_INFINITY; 9],
        vec![f32::INFINITY; 9],
        vec![0.0; 9],
        vec![f32::MAX, f32::MIN, 0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY],
        vec![f32::MAX, f32::MAX, f32::MIN, -0.0, 0.0, f32::MIN_POSITIVE],
        vec![1.0],
        vec![88.0, -88.0, 1e30, 1e-30],
    ];
    let mut scratch = Scratch::default();
    for row in rows {
        let numbers = row.iter().any(|&x| x > f32::NEG_INFINITY);
        for temperature in [0.0, f32::from_bits(1), 1e-39, 1e-38, 1e-6, 1.0, 1e6, f32::MAX] {
            for top_k in [0, 1, 3, 9, 1000] {
                for top_p in [f32::MIN_POSITIVE, 0.5, 1.0] {
                    for min_p in [0.0, 0.5, 1.0] {
                        let params = SamplingParams {
                            temperature,
                            top_k,
                            top_p,
                            min_p,
                            logprobs: Some(4),
                            ..SamplingParams::default()
                        };
                        let drawn = plain(row.clone(), params).draw(3, &mut scratch);
                        assert_eq!(drawn.is_some(), numbers);
                        assert!(drawn.is_none_or(|(id, _)| row[id as usize] > f32::NEG_INFINITY));
                    }
                }
            }
        }
    }
}

#[test]
fn top_k_takes_the_most_likely_however_flat_the_weights() {
    // At this temperature every weight rounds to one; the logits still tell the tokens apart.
    let logits = (0..300).map(|i| i as f32 / 300.0).collect();
    let params = SamplingParams { temperature: 1e9, top_k: 5, ..SamplingParams::default() };
    let case = plain(logits, params);
    for seed in 0..50 {
        assert!(case.draw(seed, &mut Scratch::default()).unwrap().0 >= 295);
    }
}

#[test]
fn top_k_of_the_whole_vocabulary_is_none() {
    let logits: Vec<f32> = (0..200).map(|i| (i % 17) as f32 / 4.0).collect();
    let draw = |top_k: usize, seed: u64| {
        let params = SamplingParams { top_k, top_p: 0.9, ..SamplingParams::default() };
        plain(logits.clone(), params).draw(seed, &mut Scratch::default()).unwrap().0
    };
    for seed in 0..500 {
        assert_eq!(draw(0, seed), draw(200, seed));
        assert_eq!(draw(0, seed), draw(100_000, seed));
    }
}

#[test]
fn the_distribution_is_the_softmax() {
    // Chi-square over 20 tokens, 40,000 draws, fixed seeds: 19 degrees of freedom, 0.1 % point 43.8.
    let logits: Vec<f32> = (0..20).map(|i| (i * 7 % 20) as f32 / 6.0).collect();
    let case = plain(logits.clone(), SamplingParams { temperature: 1.5, ..SamplingParams::default() });
    let mut scratch = Scratch::default();
    let mut counts = [0u32; 20];
    for seed in 0..40_000 {
        counts[case.draw(seed, &mut scratch).unwrap().0 as usize] += 1;
    }
    let weights: Vec<f64> = logits.iter().map(|&x| (f64::from(x) / 1.5).exp()).collect();
    let total: f64 = weights.iter().sum();
    let chi2: f64 = counts
        .iter()
        .zip(&weights)
        .map(|(&count, w)| {
            let expected = 40_000.0 * w / total;
            (f64::from(count) - expected).powi(2) / expected
        })
        .sum();
    assert!(chi2 < 43.8, "chi-square {chi2}");
}

#[test]
fn uniform_is_even_over_seeds_and_over_positions() {
    for by_seed in [true, false] {
        let mut cells = [0u32; 50];
        for i in 0..50_000u64 {
            let u = if by_seed { uniform(i, 3) } else { uniform(3, i) };
            assert!((0.0..1.0).contains(&u));
            cells[(u * 50.0) as usize] += 1;
        }
        let chi2: f64 = cells.iter().map(|&c| (f64::from(c) - 1000.0).powi(2) / 1000.0).sum();
        assert!(chi2 < 85.4, "chi-square {chi2}, 49 degrees of freedom"); // the 0.1 % point
    }
}
