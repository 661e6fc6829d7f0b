//! Places and memory; what is written is tested from Python (`tests/test_calibrate.py`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::sites::{Place, Site, places};
use super::{Before, Calibration, check_memory};
use crate::config::{FfnConfig, ModelConfig};
use crate::plan::family_config;
use crate::weights::{Checkpoint, ModelTensors, MtpTensors};

fn embedded() -> (ModelConfig, ModelTensors, MtpTensors) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/qwen35rs/model");
    let (config, checkpoint) = (ModelConfig::from_dir(&dir).unwrap(), Checkpoint::open(&dir).unwrap());
    let tensors = ModelTensors::resolve(&checkpoint, &config).unwrap();
    let module = MtpTensors::resolve(&checkpoint, &config).unwrap();
    (config, tensors, module)
}

/// Every place is as wide as the tensors that stand there.
#[test]
fn places_are_as_wide_as_their_tensors() {
    let (config, tensors, module) = embedded();
    let mut seen = BTreeSet::new();
    for (index, layer) in tensors.layers.iter().chain([&module.layer]).enumerate() {
        let places: BTreeMap<String, Place> = places(layer).into_iter().collect();
        for tensor in layer.tensors() {
            let Some(place) = places.get(&tensor.name) else {
                assert!(
                    tensor.shape.len() == 1 || !tensor.name.contains("_proj.weight") || tensor.num_rows() < 8
                );
                continue;
            };
            for row in [0, tensor.num_rows() - 1] {
                let site = place.of(row);
                seen.insert(site);
                assert_eq!(site.width(&config, index), tensor.num_cols(), "{}", tensor.name);
            }
        }
    }
    let last = 15;
    let all =
        [Site::Mixer, Site::MixerOut, Site::Ffn, Site::SharedDown, Site::ExpertIn(0), Site::ExpertIn(last)];
    let all: BTreeSet<Site> = all.into_iter().chain([Site::ExpertDown(0), Site::ExpertDown(last)]).collect();
    assert!(seen.is_superset(&all), "{seen:?}");
}

/// Experts of a small model have Hessians of their own, those of a large one the layer's.
#[test]
fn wide_experts_share_a_hessian() {
    let (config, ..) = embedded();
    assert_eq!(Site::ExpertIn(3).collected(&config), [Site::ExpertIn(3), Site::Ffn]);
    for name in ["35b-a3b", "122b-a10b"] {
        let config = family_config(name).unwrap();
        assert_eq!(Site::ExpertIn(3).collected(&config), [Site::Ffn], "{name}");
        assert_eq!(Site::ExpertDown(3).collected(&config), [Site::ExpertDown(3)]);
    }
}

#[test]
fn too_little_memory_is_said_before_anything_is_read() {
    let (_, tensors, module) = embedded();
    let config = family_config("122b-a10b").unwrap();
    let FfnConfig::Moe { num_experts, .. } = config.ffn else { panic!("122B has experts") };
    let before = Before { config: &config, tensors: &tensors, module: Some(&module) };
    let sites: BTreeSet<Site> = [Site::Mixer, Site::MixerOut, Site::Ffn, Site::SharedDown]
        .into_iter()
        .chain((0..num_experts).map(Site::ExpertDown))
        .collect();
    let sequences = vec![vec![0; 2048]; 16];
    let check = |room| check_memory(&before, &sequences, &[(1, sites.clone())].into(), room);
    check(None).unwrap();
    check(Some(64 << 30)).unwrap();
    let text = check(Some(1 << 30)).unwrap_err().to_string();
    // 32,768 tokens of 3,072 in f32.
    assert!(
        text.contains("402653184 for 32768 tokens") && text.contains("has 1073741824 available"),
        "{text}"
    );
    assert!(text.ends_with("lower calibration_tokens, or take a machine with more memory"), "{text}");
    // In f32 one of 8,192 inputs, two of 3,072 and 257 of 1,024; beside them the factors of the largest.
    let squares = [[8192u64, 3072, 3072], [1024; 3], [1024; 3]].concat();
    let threads = rayon::current_num_threads().min(8);
    let factors = 14 * squares.iter().take(threads).map(|k| k * k).sum::<u64>();
    let hessians = 4 * (8192 * 8192 + 2 * 3072 * 3072 + 257 * 1024 * 1024) + factors;
    assert!(text.contains(&format!("{hessians} for the Hessians of a layer")), "{text}");
}

#[test]
fn more_experts_want_more_text() {
    let sequences = |config: &ModelConfig, length, tokens| {
        Calibration { files: Vec::new(), length, tokens }.max_sequences(config)
    };
    let small = embedded().0;
    assert_eq!(sequences(&small, 2048, None), 16);
    assert_eq!(sequences(&small, 3000, Some(6000)), 2);
    // 256 experts of which 8 are hit, 1,024 wide: each is to see 4,096.
    let large = family_config("122b-a10b").unwrap();
    assert_eq!(sequences(&large, 2048, None), 64);
    assert_eq!(sequences(&large, 2048, Some(4095)), 1);
    assert_eq!(sequences(&family_config("27b").unwrap(), 2048, None), 16);
    assert_eq!(sequences(&large, 1 << 20, None), 1);
}
