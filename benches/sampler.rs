//! One row of logits to a token, over the family's vocabulary of 248,320.

use criterion::{Criterion, criterion_group, criterion_main};
use qwen35rs::request::SamplingParams;
use qwen35rs::sampler::{Context, Scratch, sample, uniform};
use std::hint::black_box;

const VOCAB: usize = 248_320;

/// Near-normal logits with a tail, as a model's are: a few tokens hold most of the probability.
fn logits() -> Vec<f32> {
    let normal = |i: u64| (0..6).map(|k| uniform(k, i) as f32 - 0.5).sum::<f32>() * 1.4;
    (0..VOCAB as u64).map(|i| normal(i) * 3.0 + if i % 5000 == 0 { 12.0 } else { 0.0 }).collect()
}

fn sampler(c: &mut Criterion) {
    let logits = logits();
    let output: Vec<u32> = (0..500).map(|i| i * 331 % VOCAB as u32).collect();
    let base = SamplingParams { temperature: 0.7, ..SamplingParams::default() };
    let cases = [
        ("greedy", SamplingParams { temperature: 0.0, ..base.clone() }),
        ("temperature", base.clone()),
        ("top_p", SamplingParams { top_p: 0.9, ..base.clone() }),
        ("top_k_20_top_p", SamplingParams { top_k: 20, top_p: 0.95, ..base.clone() }),
        ("min_p", SamplingParams { min_p: 0.05, ..base.clone() }),
        (
            "top_k_20_top_p_penalties",
            SamplingParams {
                top_k: 20,
                top_p: 0.95,
                presence_penalty: 1.5,
                repetition_penalty: 1.05,
                ..base.clone()
            },
        ),
        ("greedy_logprobs_20", SamplingParams { temperature: 0.0, logprobs: Some(20), ..base }),
    ];
    let mut group = c.benchmark_group("sampler");
    let mut scratch = Scratch::default();
    for (name, params) in &cases {
        group.bench_function(*name, |b| {
            let mut seed = 0;
            b.iter(|| {
                seed += 1;
                let context =
                    Context { params, prompt: &[], output: &output, seed, num_tokens: VOCAB, eos: &[] };
                sample(black_box(&logits), &context, &mut scratch)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, sampler);
criterion_main!(benches);
