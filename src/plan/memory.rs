//! What an engine takes of one card, by making it on a card that is only imagined: the same code allocates, and nothing
//! can be forgotten.

use crate::Result;
use crate::backend::Caches;
use crate::backend::cuda::Cuda;
use crate::config::ModelConfig;
use crate::engine::{Engine, EngineLimits, Report};
use crate::model::Model;
use crate::weights::quant::Quantization;
use crate::weights::{Checkpoint, ModelTensors, MtpTensors};

/// What a model of this configuration holds on a card of so many bytes, as its checkpoint has it (of a
/// [random](Checkpoint::random) one, in bf16) or quantised at load, and what is left for keys and values.
///
/// # Errors
/// `OutOfMemory` for what does not fit, `Request` for limits that cannot be.
pub fn memory(
    config: &ModelConfig,
    checkpoint: &Checkpoint,
    quantization: Option<Quantization>,
    mtp: bool,
    caches: Caches,
    limits: &EngineLimits,
    card_bytes: usize,
) -> Result<Report> {
    let mut tensors = ModelTensors::resolve(checkpoint, config)?;
    if let Some(quantization) = quantization {
        tensors = tensors.requantised(quantization);
    }
    let model = Model::load(config, tensors, None, Cuda::imagine(card_bytes)?, |_, _| Ok(()))?;
    let mut model = model.with_caches(caches);
    if mtp {
        let module = MtpTensors::resolve(checkpoint, config)?;
        let module = match quantization {
            Some(quantization) => module.requantised(quantization),
            None => module,
        };
        model = model.with_mtp(module, None)?;
    }
    Ok(Engine::new(model, limits, config.vocab, Vec::new())?.report())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{KvCache, StateType};
    use crate::plan::{Scheme, family_config, weight_bytes};

    fn of(name: &str, gib: usize) -> Result<Report> {
        held(name, gib, Caches::default())
    }

    fn held(name: &str, gib: usize, caches: Caches) -> Result<Report> {
        let limits =
            EngineLimits { max_num_seqs: 64, max_num_batched_tokens: 8192, ..EngineLimits::default() };
        memory(&family_config(name)?, &Checkpoint::random(), None, false, caches, &limits, gib << 30)
    }

    #[test]
    fn weights_are_those_of_the_other_plan() {
        let report = of("35b", 80).unwrap();
        let other = weight_bytes(&family_config("35b").unwrap(), Scheme::Bf16).unwrap();
        let found = report.stats.memory["weights"] as f64;
        assert!((found / other.resident as f64 - 1.0).abs() < 1e-3, "{found} {}", other.resident);
        let total: usize = report.stats.memory.values().sum();
        assert!(total < 80 << 30 && report.num_pages * report.page_bytes < total);
        assert!(report.max_model_len > 8192);
    }

    #[test]
    fn a_quantised_checkpoint_is_held_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = ("python/qwen35rs/model", folder.path().join("fp8"));
        let from = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(from);
        crate::quantize::quantize(&from, &to, Quantization::Fp8, None, |_, _| Ok(())).unwrap();
        let config = ModelConfig::from_dir(&to).unwrap();
        let held = |checkpoint: &Checkpoint, quantization| {
            let limits = EngineLimits::default();
            let report =
                memory(&config, checkpoint, quantization, false, Caches::default(), &limits, 8 << 30)
                    .unwrap();
            report.stats.memory["weights"] as f64
        };
        let checkpoint = Checkpoint::open(&to).unwrap();
        let (codes, plain) = (held(&checkpoint, None), held(&Checkpoint::random(), None));
        // Its experts are too small for kernels that take codes; its projections are a byte an element, and scales.
        let tensors = ModelTensors::resolve(&checkpoint, &config).unwrap();
        let projections =
            tensors.tensors().filter(|tensor| tensor.encoded().is_some() && !tensor.name.contains("expert"));
        let saved: usize = projections.map(|tensor| tensor.num_elements()).sum();
        let found = (plain - codes) as usize;
        assert!(found < saved && found > saved - saved / 100, "{found} {saved}");
        assert!(saved > 1 << 20 && crate::plan::stored(&to, &config).unwrap().resident < codes as u64);
    }

    #[test]
    fn small_caches_hold_more() {
        let caches = Caches { kv: KvCache::Fp8, state: StateType::F16 };
        let (plain, small) = (of("35b", 80).unwrap(), held("35b", 80, caches).unwrap());
        // Bytes of a row of 256 elements and its scale.
        assert_eq!(small.page_bytes * 512, plain.page_bytes * 260);
        assert_eq!(2 * small.stats.memory["recurrent states"], plain.stats.memory["recurrent states"]);
        let [more, less] = [&small, &plain].map(|report| report.num_pages as f64);
        assert!(more > 1.7 * less, "{more} {less}");
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let text = of("122b", 80).unwrap_err().to_string();
        assert!(text.contains("weights") && text.contains("the device has"), "{text}");
    }
}
