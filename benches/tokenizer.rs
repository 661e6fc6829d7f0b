//! Encode, decode and load, on the files that `python -m qwen35rs.vocabulary models/qwen3_5-tokenizer` writes.
//!
//! `cargo bench --bench tokenizer`. The text is this crate's own sources: cache-warm, so only comparable with itself.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use qwen35rs::tokenizer::Tokenizer;

const DIRECTORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/qwen3_5-tokenizer");
const ENGLISH: &str = include_str!("../src/tokenizer/mod.rs");
const LANGUAGES: &str = "Съешь ещё этих мягких булок. 永和九年，岁在癸丑。नमस्ते दुनिया। いろはにほへと ちりぬるを。 \
                         Zażółć gęślą jaźń. كيف حالك اليوم؟ 다람쥐 헌 쳇바퀴에 타고파. ";

fn tokenizer(criterion: &mut Criterion) {
    let tokenizer = match Tokenizer::from_directory(DIRECTORY) {
        Ok(tokenizer) => tokenizer,
        Err(error) => panic!("{error}; run python -m qwen35rs.vocabulary {DIRECTORY}"),
    };
    criterion.benchmark_group("tokenizer/load").sample_size(10).bench_function("real", |bench| {
        bench.iter(|| Tokenizer::from_directory(DIRECTORY).map(|tokenizer| tokenizer.len()));
    });
    for (name, text) in [("english", ENGLISH.to_string()), ("languages", LANGUAGES.repeat(40))] {
        let ids = tokenizer.encode(&text);
        let mut group = criterion.benchmark_group("tokenizer");
        group.throughput(Throughput::Bytes(text.len() as u64));
        group.bench_function(format!("encode/{name}"), |bench| bench.iter(|| tokenizer.encode(&text)));
        group.bench_function(format!("decode/{name}"), |bench| bench.iter(|| tokenizer.decode(&ids, true)));
        group.finish();
    }
}

criterion_group!(benches, tokenizer);
criterion_main!(benches);
