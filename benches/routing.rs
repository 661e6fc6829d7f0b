//! Expert routing: softmax over 256 experts, the best eight, per token. Times per call; tokens/s by criterion's
//! throughput.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use qwen35rs::backend::cpu::moe::route;
use qwen35rs::sampler::uniform;
use std::hint::black_box;

fn routing(c: &mut Criterion) {
    let mut group = c.benchmark_group("routing");
    for (num_experts, top_k) in [(256, 8), (512, 10)] {
        for num_tokens in [1usize, 64, 512] {
            let logits: Vec<f32> =
                (0..num_tokens * num_experts).map(|i| uniform(1, i as u64) as f32 * 8.0).collect();
            let mut weights = vec![0.0; num_tokens * top_k];
            let mut experts = vec![0; num_tokens * top_k];
            group.throughput(Throughput::Elements(num_tokens as u64));
            group.bench_function(BenchmarkId::new(format!("{top_k}_of_{num_experts}"), num_tokens), |b| {
                b.iter(|| route(black_box(&logits), num_experts, top_k, &mut weights, &mut experts));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, routing);
criterion_main!(benches);
