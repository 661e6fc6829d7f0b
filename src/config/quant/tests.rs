//! What published configurations say, and exact refusals.

use serde_json::{Value, json};

use super::{Fp8Rule, Int4Rule, QuantConfig, QuantMethod};
use crate::Error;
use crate::config::ModelConfig;

fn read(quantization: Value) -> crate::Result<QuantConfig> {
    let text = json!({"model_type": "qwen3_5_text", "hidden_size": 64, "quantization_config": quantization});
    ModelConfig::from_value(&text).map(|config| config.quantization.unwrap())
}

fn refused(quantization: Value) -> (String, String) {
    match read(quantization.clone()) {
        Err(Error::Config { field, allowed, .. }) => {
            (field.trim_start_matches("quantization_config.").to_string(), allowed)
        }
        other => panic!("{quantization}: {other:?}"),
    }
}

fn group(weights: Value) -> Value {
    let groups = json!({"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": null}});
    json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups})
}

#[test]
fn published_configurations() {
    let fp8 = |blocks: &[[usize; 2]]| Some(Fp8Rule { blocks: blocks.to_vec() });
    let of = |method, fp8, int4, nvfp4| QuantConfig { method, fp8, int4, nvfp4 };
    let int4 = |groups: &[Option<usize>], needs_zeros, zeros_minus_one| {
        Some(Int4Rule { groups: groups.to_vec(), needs_zeros, zeros_minus_one })
    };
    use QuantMethod::{Awq, CompressedTensors, Fp8, Gptq, Modelopt};
    let cases = [
        (
            json!({
                "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
                "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head", "model.visual"],
                "weight_per_tensor": false, "act_per_tensor": false
            }),
            of(Fp8, fp8(&[[128, 128]]), None, false),
        ),
        (json!({"quant_method": "fp8"}), of(Fp8, fp8(&[[128, 128]]), None, false)),
        (json!({"quant_method": "fp8", "weight_block_size": null}), of(Fp8, fp8(&[]), None, false)),
        (
            json!({
                "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": true, "desc_act": false,
                "checkpoint_format": "gptq", "lm_head": false, "pack_dtype": "int32", "true_sequential": true,
                "dynamic": {
                    "lm_head": {}, "model.language_model.embed_tokens": {}, "-:.*attn.*": {},
                    "-:.*shared_expert.*": {}, "-:.*mtp.*": {}, "-:.*visual.*": {}
                }
            }),
            of(Gptq, None, int4(&[Some(128)], true, true), false),
        ),
        (
            json!({
                "quant_method": "gptq", "bits": 4, "group_size": -1, "checkpoint_format": "gptq_v2",
                "dynamic": {"+:.*down.*": {"bits": 4, "group_size": 32}, "-:.*x.*": {"bits": 8}}
            }),
            of(Gptq, None, int4(&[None, Some(32)], true, false), false),
        ),
        (
            json!({
                "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": true, "version": "gemm",
                "modules_to_not_convert": null
            }),
            of(Awq, None, int4(&[Some(128)], true, false), false),
        ),
        (
            json!({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}),
            of(Awq, None, int4(&[Some(64)], true, false), false),
        ),
        (
            json!({
                "quant_method": "auto-round", "bits": 4, "group_size": 128, "data_type": "int", "sym": true,
                "packing_format": "auto_round:auto_gptq",
                "extra_config": {
                    "model.layers.0.mlp.gate": {"bits": 16, "group_size": 64, "data_type": "float"},
                    "model.layers.0.mlp.a": {"bits": 4, "group_size": 32},
                    "model.layers.0.mlp.b": {"group_size": 32},
                    "model.layers.0.mlp.c": {"bits": 4, "group_size": 128}
                }
            }),
            of(Gptq, None, int4(&[Some(128), Some(32)], true, true), false),
        ),
        (
            group(json!({
                "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": true,
                "actorder": null, "dynamic": false, "block_structure": null, "observer": "mse"
            })),
            of(CompressedTensors, None, int4(&[Some(32)], false, false), false),
        ),
        (
            group(json!({
                "num_bits": 4, "type": "int", "group_size": 128, "symmetric": false, "actorder": "weight"
            })),
            of(CompressedTensors, None, int4(&[Some(128)], true, false), false),
        ),
        (
            group(json!({"num_bits": 4, "type": "int", "strategy": "channel"})),
            of(CompressedTensors, None, int4(&[None], false, false), false),
        ),
        (
            group(json!({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 64]})),
            of(CompressedTensors, fp8(&[[128, 64]]), None, false),
        ),
        (
            group(json!({"num_bits": 8, "type": "float", "strategy": "channel"})),
            of(CompressedTensors, fp8(&[]), None, false),
        ),
        (
            group(json!({
                "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
                "scale_dtype": "torch.float8_e4m3fn"
            })),
            of(CompressedTensors, None, None, true),
        ),
        (
            json!({
                "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"],
                "kv_cache_scheme": {"dynamic": false, "num_bits": 8, "type": "float"},
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}}
            }),
            of(Modelopt, None, None, true),
        ),
        (
            json!({
                "quant_method": "modelopt_mixed", "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {
                    "model.layers.0.mlp.experts": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
                    "model.layers.3.self_attn.q_proj": {"quant_algo": "FP8"}
                }
            }),
            of(Modelopt, fp8(&[[128, 128]]), None, true),
        ),
    ];
    for (config, want) in cases {
        assert_eq!(read(config.clone()).unwrap(), want, "{config}");
    }
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    let gptq = |key: &str, value: Value| {
        let mut config = json!({"quant_method": "gptq", "bits": 4, "group_size": 128});
        config[key] = value;
        config
    };
    let float = |value: Value| {
        let mut weights = json!({"num_bits": 8, "type": "float", "strategy": "channel"});
        weights.as_object_mut().unwrap().extend(value.as_object().unwrap().clone());
        group(weights)
    };
    let compressed = |key: &str, value: Value| {
        let mut config = group(json!({"num_bits": 4, "type": "int", "strategy": "channel"}));
        config[key] = value;
        config
    };
    let round = |key: &str, value: Value| {
        let mut config =
            json!({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"});
        config[key] = value;
        config
    };
    let int = |value: Value| {
        let mut weights = json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32});
        weights.as_object_mut().unwrap().extend(value.as_object().unwrap().clone());
        group(weights)
    };
    let cases = [
        (json!({}), "quant_method"),
        (json!({"quant_method": "bitsandbytes"}), "quant_method"),
        (json!({"quant_method": 4}), "quant_method"),
        (json!({"quant_method": "fp8", "fmt": "e5m2"}), "fmt"),
        (json!({"quant_method": "fp8", "scale_fmt": "ue8m0"}), "scale_fmt"),
        (json!({"quant_method": "fp8", "expert_dtype": "fp4"}), "expert_dtype"),
        (json!({"quant_method": "fp8", "weight_block_size": 128}), "weight_block_size"),
        (json!({"quant_method": "fp8", "weight_block_size": [128]}), "weight_block_size"),
        (json!({"quant_method": "fp8", "weight_block_size": [0, 128]}), "weight_block_size"),
        (json!({"quant_method": "gptq", "group_size": 128}), "bits"),
        (gptq("bits", json!(8)), "bits"),
        (gptq("bits", json!("4")), "bits"),
        (gptq("group_size", json!(0)), "group_size"),
        (gptq("group_size", json!(-2)), "group_size"),
        (gptq("desc_act", json!(true)), "desc_act"),
        (gptq("is_marlin_format", json!(true)), "is_marlin_format"),
        (gptq("checkpoint_format", json!("marlin")), "checkpoint_format"),
        (gptq("format", json!("bitblas")), "format"),
        (gptq("pack_dtype", json!("int8")), "pack_dtype"),
        (gptq("rotation", json!("hadamard")), "rotation"),
        (gptq("adapter", json!({"rank": 8})), "adapter"),
        (gptq("dynamic", json!([])), "dynamic"),
        (gptq("dynamic", json!({"+:x": {"bits": 8}})), "dynamic.+:x.bits"),
        (gptq("dynamic", json!({"x": {"desc_act": true}})), "dynamic.x.desc_act"),
        (json!({"quant_method": "awq", "bits": 8}), "bits"),
        (json!({"quant_method": "awq"}), "bits"),
        (json!({"quant_method": "awq", "w_bit": 3}), "w_bit"),
        (json!({"quant_method": "awq", "bits": 4, "zero_point": false}), "zero_point"),
        (json!({"quant_method": "awq", "bits": 4, "version": "gemv"}), "version"),
        (round("packing_format", json!("auto_round")), "packing_format"),
        (round("bits", json!(2)), "bits"),
        (round("rotation_config", json!({"block_size": 128})), "rotation_config"),
        (round("spinquant_config", json!({})), "spinquant_config"),
        (round("data_type", json!("mx_fp")), "data_type"),
        (round("extra_config", json!({"m": {"bits": 8}})), "extra_config.m.bits"),
        (compressed("format", json!("int-quantized")), "format"),
        (compressed("format", json!("marlin-24")), "format"),
        (compressed("config_groups", Value::Null), "config_groups"),
        (compressed("sparsity_config", json!({"format": "sparse-24-bitmask"})), "sparsity_config.format"),
        (compressed("transform_config", json!({"config_groups": {"R1": {}}})), "transform_config"),
        (int(json!({"num_bits": 8})), "config_groups.group_0.weights.num_bits"),
        (int(json!({"num_bits": null})), "config_groups.group_0.weights.num_bits"),
        (int(json!({"type": "bool"})), "config_groups.group_0.weights.type"),
        (int(json!({"strategy": "tensor"})), "config_groups.group_0.weights.strategy"),
        (int(json!({"group_size": -1})), "config_groups.group_0.weights.group_size"),
        (int(json!({"actorder": "group"})), "config_groups.group_0.weights.actorder"),
        (float(json!({"num_bits": 6})), "config_groups.group_0.weights.num_bits"),
        (float(json!({"strategy": "group", "group_size": 32})), "config_groups.group_0.weights.strategy"),
        (float(json!({"strategy": "block"})), "config_groups.group_0.weights.block_structure"),
        (float(json!({"num_bits": 4})), "config_groups.group_0.weights.strategy"),
        (
            float(json!({"num_bits": 4, "strategy": "tensor_group", "group_size": 32})),
            "config_groups.group_0.weights.group_size",
        ),
        (json!({"quant_method": "modelopt"}), "quant_algo"),
        (json!({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}), "quant_algo"),
        (json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}), "group_size"),
        (json!({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}), "quantized_layers"),
        (
            json!({
                "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"m": {"quant_algo": "MXFP8"}}
            }),
            "quantized_layers.m.quant_algo",
        ),
    ];
    for (config, field) in cases {
        assert_eq!(refused(config.clone()).0, field, "{config}");
    }
    assert_eq!(refused(json!({"quant_method": "x"})).1, super::METHODS);
}

#[test]
fn both_places_say_the_same_or_are_refused() {
    let at = |top: Value, text: Value| {
        let config = json!({
            "model_type": "qwen3_5", "quantization_config": top,
            "text_config": {"model_type": "qwen3_5_text", "hidden_size": 64, "quantization_config": text}
        });
        ModelConfig::from_value(&config)
    };
    let fp8 = json!({"quant_method": "fp8"});
    for (top, text) in [(&fp8, &Value::Null), (&Value::Null, &fp8), (&fp8, &fp8)] {
        let config = at(top.clone(), text.clone()).unwrap();
        assert_eq!(config.quantization.unwrap().method, QuantMethod::Fp8);
    }
    assert!(at(Value::Null, Value::Null).unwrap().quantization.is_none());
    let other = at(fp8, json!({"quant_method": "awq", "bits": 4}));
    assert!(
        matches!(&other, Err(Error::Config { field, .. }) if field == "text_config.quantization_config"),
        "{other:?}"
    );
}

#[test]
fn a_file_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, value: &Value| std::fs::write(dir.path().join(name), value.to_string()).unwrap();
    let mut config = json!({"model_type": "qwen3_5_text", "hidden_size": 64});
    let beside = json!({
        "producer": {"name": "modelopt", "version": "0.47"},
        "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": []}
    });
    write("config.json", &config);
    write("hf_quant_config.json", &beside);
    let found = ModelConfig::from_dir(dir.path()).unwrap().quantization.unwrap();
    assert_eq!((found.method, found.nvfp4), (QuantMethod::Modelopt, true));
    // What stands in the configuration itself wins.
    config["quantization_config"] = json!({"quant_method": "fp8"});
    write("config.json", &config);
    let found = ModelConfig::from_dir(dir.path()).unwrap().quantization.unwrap();
    assert_eq!(found.method, QuantMethod::Fp8);
    config["quantization_config"] = Value::Null;
    write("config.json", &config);
    assert!(ModelConfig::from_dir(dir.path()).unwrap().quantization.is_none());
    config.as_object_mut().unwrap().remove("quantization_config");
    write("config.json", &config);
    write("hf_quant_config.json", &json!([]));
    assert!(matches!(ModelConfig::from_dir(dir.path()), Err(Error::File { .. })));
}
