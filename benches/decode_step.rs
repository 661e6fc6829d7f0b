//! A step of the engine on committed checkpoints a few thousand times smaller than the family's: what a step costs
//! besides its arithmetic (scheduling, dispatch, sampling), by number of sequences; and a prefill.

use std::path::PathBuf;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use qwen35rs::backend::cpu::Cpu;
use qwen35rs::config::ModelConfig;
use qwen35rs::engine::{Engine, EngineLimits};
use qwen35rs::model::Model;
use qwen35rs::request::SamplingParams;
use qwen35rs::weights::{Checkpoint, ModelTensors};

fn engine(name: &str) -> qwen35rs::Result<Engine<Cpu>> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data").join(name);
    let config = ModelConfig::from_dir(&path)?;
    let checkpoint = Checkpoint::open(&path)?;
    let tensors = ModelTensors::resolve(&checkpoint, &config)?;
    let model = Model::load(&config, tensors, None, Cpu::default(), |_, _| Ok(()))?;
    let limits = EngineLimits { max_model_len: Some(1024), max_num_seqs: 32, ..EngineLimits::default() };
    Engine::new(model, &limits, usize::MAX, Vec::new())
}

fn filled(name: &str, num_seqs: usize, prompt: usize) -> Engine<Cpu> {
    let made = engine(name).and_then(|mut engine| {
        let params = SamplingParams { temperature: 0.7, top_k: 20, top_p: 0.95, ..SamplingParams::default() };
        for i in 0..num_seqs {
            let prompt: Vec<u32> = (0..prompt).map(|t| ((t * 7 + i) % 150) as u32).collect();
            engine.add(&prompt, &params, 0)?;
        }
        Ok(engine)
    });
    match made {
        Ok(engine) => engine,
        Err(error) => panic!("{name}: {error}"),
    }
}

fn step(engine: &mut Engine<Cpu>) -> usize {
    match engine.step(|_| Ok(())) {
        Ok(outputs) => outputs.len(),
        Err(error) => panic!("{error}"),
    }
}

fn decode_step(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode_step");
    for name in ["dense_bf16", "moe_bf16"] {
        for num_seqs in [1usize, 8, 32] {
            group.throughput(Throughput::Elements(num_seqs as u64));
            group.bench_function(BenchmarkId::new(name, num_seqs), |b| {
                // A batch of steps from 32 tokens of context on, so that every sample sees the same contexts.
                b.iter_batched_ref(
                    || {
                        let mut engine = filled(name, num_seqs, 32);
                        while step(&mut engine) < num_seqs {}
                        engine
                    },
                    step,
                    BatchSize::PerIteration,
                );
            });
        }
        group.throughput(Throughput::Elements(512));
        group.bench_function(BenchmarkId::new(format!("{name}_prefill"), 512), |b| {
            b.iter_batched_ref(|| filled(name, 1, 512), step, BatchSize::PerIteration);
        });
    }
    group.finish();
}

criterion_group!(benches, decode_step);
criterion_main!(benches);
