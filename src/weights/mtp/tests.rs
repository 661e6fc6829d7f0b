//! The module's names, in every layout, and what is said where one is wrong.

use crate::Error;
use crate::config::ModelConfig;
use crate::weights::tests::{Entry, config, dir, entries, tensors};
use crate::weights::{Checkpoint, DType, ExpertTensors, FfnTensors, MixerTensors, ModelTensors, MtpTensors};

fn declared(moe: bool) -> ModelConfig {
    ModelConfig { num_mtp_layers: 1, ..config(moe, false) }
}

/// The module's tensors: its layer is named and shaped as the model's second, which has attention.
fn module(moe: bool, fused: bool) -> Vec<Entry> {
    let mut list: Vec<Entry> = entries("mtp.", moe, fused)
        .into_iter()
        .filter(|entry| entry.0.starts_with("mtp.layers.1."))
        .map(|(name, dtype, shape)| (name.replace("layers.1", "layers.0"), dtype, shape))
        .collect();
    for (name, shape) in [
        ("fc", vec![6, 12]),
        ("pre_fc_norm_embedding", vec![6]),
        ("pre_fc_norm_hidden", vec![6]),
        ("norm", vec![6]),
    ] {
        list.push((format!("mtp.{name}.weight"), DType::BF16, shape));
    }
    list
}

/// Of a checkpoint that has the model and these tensors. The model itself resolves whatever they are.
fn resolve(list: &[Entry], config: &ModelConfig) -> crate::Result<MtpTensors> {
    let moe = matches!(config.ffn, crate::config::FfnConfig::Moe { .. });
    let all = [entries("model.", moe, true), list.to_vec()].concat();
    let all: Vec<_> = all.iter().map(|(n, d, s)| (n.as_str(), *d, s.clone())).collect();
    let dir = dir(&[("model.safetensors", tensors(&all))]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(ModelTensors::resolve(&checkpoint, config).unwrap().mtp.len(), list.len());
    MtpTensors::resolve(&checkpoint, config)
}

fn error(list: &[Entry], config: &ModelConfig) -> (String, String, String) {
    match resolve(list, config) {
        Err(Error::Tensor { name, found, expected }) => (name, found, expected),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_layout_resolves() {
    for (moe, fused) in [(false, false), (true, true), (true, false)] {
        let found = resolve(&module(moe, fused), &declared(moe)).unwrap();
        let names = [&found.fc, &found.pre_fc_norm_embedding, &found.pre_fc_norm_hidden, &found.norm];
        assert_eq!(
            names.map(|t| t.name.as_str()),
            [
                "mtp.fc.weight",
                "mtp.pre_fc_norm_embedding.weight",
                "mtp.pre_fc_norm_hidden.weight",
                "mtp.norm.weight"
            ]
        );
        let MixerTensors::Attention { q_proj, .. } = &found.layer.mixer else { panic!("no attention") };
        assert_eq!(q_proj.name, "mtp.layers.0.self_attn.q_proj.weight");
        match &found.layer.ffn {
            FfnTensors::Dense { .. } => assert!(!moe),
            FfnTensors::Moe { experts: ExpertTensors::Fused { .. }, .. } => assert!(fused),
            FfnTensors::Moe { experts: ExpertTensors::PerExpert(list), .. } => {
                assert_eq!(
                    (fused, list[2].up_proj.name.as_str()),
                    (false, "mtp.layers.0.mlp.experts.2.up_proj.weight")
                );
            }
        }
    }
}

#[test]
fn each_tensor_that_is_missing_or_wrong_names_itself() {
    let config = declared(true);
    for fused in [true, false] {
        let list = module(true, fused);
        for i in 0..list.len() {
            let mut fewer = list.clone();
            let (name, _, shape) = fewer.remove(i);
            assert_eq!(error(&fewer, &config), (name.clone(), "nothing".into(), format!("shape {shape:?}")));
            let mut wrong = list.clone();
            wrong[i].2.push(2);
            assert_eq!(error(&wrong, &config).0, name);
            let mut quantized = list.clone();
            quantized[i].1 = DType::F8_E4M3;
            assert_eq!(error(&quantized, &config).0, name);
            assert_eq!(error(&quantized, &config).1, "dtype F8_E4M3");
        }
    }
    let mut more = module(true, true);
    more.push(("mtp.layers.1.input_layernorm.weight".into(), DType::BF16, vec![6]));
    let (name, _, expected) = error(&more, &config);
    assert_eq!(name, "mtp.layers.1.input_layernorm.weight");
    assert_eq!(expected, "no such tensor in this model");
}

#[test]
fn a_checkpoint_without_it_says_so() {
    let (name, found, expected) = error(&[], &declared(false));
    assert_eq!((name.as_str(), found.as_str()), ("mtp.*", "nothing"));
    assert!(expected.ends_with("saved without it"), "{expected}");
    let undeclared = resolve(&module(false, false), &config(false, false));
    assert!(
        matches!(&undeclared, Err(Error::Config { field, found, .. }) if field == "mtp_num_hidden_layers" && found == "0"),
        "{undeclared:?}"
    );
}
