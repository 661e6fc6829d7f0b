//! The gated delta rule of one value head (128 x 128, as in every model of the family): the recurrent form of a
//! decode step, and the chunked form of a prefill.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use qwen35rs::backend::cpu::delta_rule::{Head, OutRows, gated_delta_rule};
use qwen35rs::sampler::uniform;

const DIM: usize = 128;

fn numbers(n: usize, salt: u64) -> Vec<f32> {
    (0..n).map(|i| uniform(salt, i as u64) as f32 - 0.5).collect()
}

fn delta_rule(c: &mut Criterion) {
    let mut group = c.benchmark_group("delta_rule");
    for (form, num_tokens) in [("recurrent", 1), ("recurrent", 64), ("chunked", 64), ("chunked", 512)] {
        let (q, k, v) =
            (numbers(num_tokens * DIM, 1), numbers(num_tokens * DIM, 2), numbers(num_tokens * DIM, 3));
        let g: Vec<f32> = numbers(num_tokens, 4).iter().map(|x| -x.abs()).collect();
        let beta = numbers(num_tokens, 5);
        let head = Head {
            q: &q,
            k: &k,
            v: &v,
            strides: [DIM; 3],
            g: &g,
            beta: &beta,
            k_dim: DIM,
            v_dim: DIM,
            scale: (DIM as f32).sqrt().recip(),
            qk_l2norm: true,
        };
        let (mut state, mut out) = (numbers(DIM * DIM, 6), vec![0.0; num_tokens * DIM]);
        let chunked_len = if form == "chunked" { num_tokens } else { 0 };
        group.throughput(Throughput::Elements(num_tokens as u64));
        group.bench_function(BenchmarkId::new(form, num_tokens), |b| {
            b.iter(|| {
                let rows = OutRows { out: out.as_mut_ptr(), stride: DIM };
                // SAFETY: `out` has a row for every token, and nobody else has it.
                unsafe { gated_delta_rule(head, chunked_len, &mut state, rows) }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, delta_rule);
criterion_main!(benches);
