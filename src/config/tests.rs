use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{FfnConfig, GenerationConfig, LayerKind, ModelConfig};
use crate::Error;

/// A small mixture-of-experts configuration with every key that is read.
fn moe() -> Value {
    json!({
        "model_type": "qwen3_5_moe",
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "tie_word_embeddings": false,
        "text_config": {
            "model_type": "qwen3_5_moe_text",
            "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 4, "full_attention_interval": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "linear_num_key_heads": 2, "linear_num_value_heads": 6,
            "linear_key_head_dim": 8, "linear_value_head_dim": 4, "linear_conv_kernel_dim": 4,
            "num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16,
            "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
            "attn_output_gate": true, "attention_bias": false, "attention_dropout": 0.0,
            "mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1, "dtype": "bfloat16",
            "eos_token_id": 7,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1], "mrope_interleaved": true
            }
        },
        "vision_config": {"depth": 2, "hidden_size": 8, "num_heads": 2, "patch_size": [16, 16]}
    })
}

/// `moe()` with one value set. The path is dotted; `null` removes.
fn with(path: &str, value: Value) -> Value {
    let mut config = moe();
    let mut at = &mut config;
    for key in path.split('.') {
        at = &mut at[key];
    }
    *at = value;
    config
}

fn read(config: &Value) -> crate::Result<ModelConfig> {
    ModelConfig::from_json(&config.to_string(), Path::new("config.json"))
}

/// The field that is refused.
#[track_caller]
fn refused(config: &Value) -> String {
    match read(config) {
        Err(Error::Config { field, found, allowed }) => {
            assert!(!found.is_empty() && !allowed.is_empty());
            field
        }
        other => panic!("{config}: {other:?}"),
    }
}

#[test]
fn every_number_of_the_file() {
    let config = read(&moe()).unwrap();
    use LayerKind::{Attention, DeltaNet};
    assert_eq!(config.model_type, "qwen3_5_moe");
    assert_eq!((config.vocab, config.hidden, config.max_position), (100, 32, 4096));
    assert_eq!(config.layers, [DeltaNet, Attention, DeltaNet, Attention]);
    assert_eq!((config.attention.q_width(), config.attention.kv_width()), (64, 32));
    assert_eq!((config.delta.conv_channels(), config.delta.value_width()), (2 * 16 + 24, 24));
    let ffn = FfnConfig::Moe { num_experts: 8, top_k: 2, expert_width: 24, shared_width: 16 };
    assert_eq!(config.ffn, ffn);
    assert_eq!((config.rms_eps, config.tied_embeddings, config.num_mtp_layers), (1e-5, false, 1));
    assert_eq!((config.rope.theta, config.rope.rotary_dim), (1e7, 8));
    assert_eq!((config.rope.mrope_section, config.rope.yarn.is_none()), ([2, 1, 1], true));
    assert_eq!(config.dtype.as_deref(), Some("bfloat16"));
    assert_eq!(config.eos_token_ids, [7]);
    let vision = config.vision.unwrap();
    assert_eq!((vision.depth, vision.patch, vision.width, vision.num_positions), (2, 16, 4304, 2304));
}

#[test]
fn flat_files_and_missing_keys() {
    let mut flat = moe()["text_config"].clone();
    assert_eq!(read(&flat).unwrap().hidden, 32);
    flat["model_type"] = json!("qwen3_5_moe");
    assert!(!read(&flat).unwrap().has_vision);
    // The defaults of the reference's classes.
    let dense = read(&json!({"model_type": "qwen3_5_text"})).unwrap();
    assert_eq!((dense.hidden, dense.layers.len(), dense.attention.num_kv_heads), (4096, 32, 4));
    assert_eq!(dense.ffn, FfnConfig::Dense { width: 12288 });
    assert_eq!((dense.vocab, dense.max_position, dense.delta.num_v_heads), (248_320, 32_768, 32));
    assert_eq!((dense.rope.theta, dense.rope.rotary_dim), (10_000.0, 64));
    assert_eq!((dense.rope.mrope_section, dense.tied_embeddings), ([11, 11, 10], false));
    let moe = read(&json!({"model_type": "qwen3_5_moe_text"})).unwrap();
    assert_eq!((moe.hidden, moe.layers.len(), moe.attention.num_kv_heads), (2048, 40, 2));
    assert_eq!(moe.num_layers_of(LayerKind::Attention), 10);
    assert_eq!(refused(&json!({"model_type": "qwen3_5"})), "text_config");
}

#[test]
fn layer_types_and_interval() {
    let types = json!(["full_attention", "full_attention", "linear_attention", "linear_attention"]);
    let path = "text_config.layer_types";
    assert_eq!(refused(&with(path, types.clone())), "text_config.full_attention_interval");
    let mut config = with(path, types);
    config["text_config"]["full_attention_interval"] = Value::Null;
    assert_eq!(read(&config).unwrap().layers[1], LayerKind::Attention);
    assert_eq!(refused(&with(path, json!(["linear_attention"]))), path);
    let bad = json!(["linear_attention", "sliding_attention", "linear_attention", "full_attention"]);
    assert_eq!(refused(&with(path, bad)), "text_config.layer_types[1]");
    assert_eq!(
        read(&with("text_config.full_attention_interval", Value::Null)).unwrap().layers[3],
        LayerKind::Attention
    );
}

#[test]
fn tied_embeddings() {
    let tied = |top: Value, inner: Value| {
        let mut config = with("tie_word_embeddings", top);
        config["text_config"]["tie_word_embeddings"] = inner;
        read(&config).unwrap().tied_embeddings
    };
    assert!(tied(json!(true), json!(false)) && tied(Value::Null, json!(true)));
    assert!(!tied(json!(false), json!(true)) && !tied(Value::Null, Value::Null));
}

#[test]
fn what_cannot_run_is_refused_by_name() {
    let cases = [
        ("model_type", json!("qwen3_next")),
        ("model_type", Value::Null),
        ("model_type", json!(3)),
        ("architectures", json!(["Qwen3NextForCausalLM"])),
        ("architectures", json!(["Qwen3_5ForCausalLM"])),
        ("architectures", json!("Qwen3_5MoeForCausalLM")),
        ("quantization_config", json!("fp8")),
        ("dtype", json!("float8_e4m3fn")),
        ("tie_word_embeddings", json!("yes")),
        ("vision_config", json!(3)),
        ("vision_config.num_heads", json!(3)),
        ("vision_config.patch_size", json!([16, 8])),
        ("text_config", json!([])),
        ("text_config.model_type", json!("qwen3_5_text")),
        ("text_config.quantization_config", json!(["gptq"])),
        ("text_config.hidden_act", json!("gelu")),
        ("text_config.attention_bias", json!(true)),
        ("text_config.mlp_bias", json!(true)),
        ("text_config.attn_output_gate", json!(false)),
        ("text_config.use_sliding_window", json!(true)),
        ("text_config.sliding_window", json!(4096)),
        ("text_config.mlp_only_layers", json!([0])),
        ("text_config.decoder_sparse_step", json!(2)),
        ("text_config.norm_topk_prob", json!(false)),
        ("text_config.mamba_ssm_dtype", json!("bfloat16")),
        ("text_config.mtp_num_hidden_layers", json!(2)),
        ("text_config.mtp_use_dedicated_embeddings", json!(true)),
        ("text_config.num_key_value_heads", json!(3)),
        ("text_config.linear_num_value_heads", json!(5)),
        ("text_config.num_experts_per_tok", json!(9)),
        ("text_config.linear_conv_kernel_dim", json!(1)),
        ("text_config.linear_conv_kernel_dim", json!(9)),
        ("text_config.rms_norm_eps", json!(0.0)),
        ("text_config.rms_norm_eps", json!(1e-60)),
        ("text_config.rms_norm_eps", json!("1e-6")),
        ("text_config.full_attention_interval", json!(0)),
        ("text_config.eos_token_id", json!("x")),
        ("text_config.eos_token_id", json!([1, -1])),
        ("text_config.rope_parameters", json!("yarn")),
        ("text_config.rope_parameters.rope_type", json!("linear")),
        ("text_config.rope_parameters.rope_type", json!("dynamic")),
        ("text_config.rope_parameters.rope_type", json!("llama3")),
        ("text_config.rope_parameters.rope_type", json!("longrope")),
        ("text_config.rope_parameters.rope_type", json!("proportional")),
        ("text_config.rope_parameters.type", json!("yarn")),
        ("text_config.rope_parameters.factor", json!(4.0)),
        ("text_config.rope_parameters.rope_theta", json!(1.0)),
        ("text_config.rope_parameters.rope_theta", json!("1e7")),
        ("text_config.rope_parameters.partial_rotary_factor", json!(0.3125)), // 5 of 16
        ("text_config.rope_parameters.partial_rotary_factor", json!(1.5)),
        ("text_config.rope_parameters.partial_rotary_factor", json!(0)),
        ("text_config.rope_parameters.mrope_section", json!([2, 2, 1])),
        ("text_config.rope_parameters.mrope_section", json!([0, 2, 2])),
        ("text_config.rope_parameters.mrope_section", json!([4])),
        ("text_config.rope_parameters.mrope_section", json!([2, 1, 1.0])),
        ("text_config.rope_parameters.mrope_interleaved", json!(false)),
        ("text_config.rope_parameters.full_attention", json!({})),
        ("text_config.rope_scaling", json!({"rope_type": "default"})),
    ];
    for (path, value) in cases {
        assert_eq!(refused(&with(path, value.clone())), path, "{value}");
    }
    // Every size: zero, absurd, and of a wrong type.
    for key in [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_conv_kernel_dim",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "max_position_embeddings",
    ] {
        let path = format!("text_config.{key}");
        for value in [
            json!(0),
            json!(-1),
            json!(1u64 << 40),
            json!(u64::MAX),
            json!(4.0),
            json!("4"),
            json!([4]),
            json!(true),
        ] {
            assert_eq!(refused(&with(&path, value)), path);
        }
    }
}

#[test]
fn values_that_change_nothing_are_taken() {
    for (path, value) in [
        ("text_config.unknown", json!({"a": 1})),
        ("text_config.hidden_act", json!("swish")),
        ("text_config.sliding_window", Value::Null),
        ("text_config.router_aux_loss_coef", json!(0.001)),
        ("text_config.rope_parameters.type", json!("default")),
        ("text_config.rope_parameters.type", json!("mrope")),
        ("transformers_version", json!("5.23.0")),
        ("vision_config", Value::Null),
        ("text_config.rope_scaling", json!({})),
    ] {
        read(&with(path, value.clone())).unwrap_or_else(|e| panic!("{path} {value}: {e}"));
    }
    // The older spelling.
    let mut old = moe();
    old["text_config"]["rope_parameters"] = Value::Null;
    old["text_config"]["rope_theta"] = json!(5e5);
    old["text_config"]["partial_rotary_factor"] = json!(0.5);
    old["text_config"]["rope_scaling"] = json!({"type": "yarn", "factor": 2, "mrope_section": [2, 1, 1]});
    let rope = read(&old).unwrap().rope;
    assert_eq!((rope.theta, rope.rotary_dim, rope.mrope_section), (5e5, 8, [2, 1, 1]));
    assert_eq!(rope.yarn.unwrap().original_max_position, 4096);
}

#[test]
fn files_that_are_no_configuration() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(ModelConfig::from_dir(dir.path()), Err(Error::Io { .. })));
    let path = dir.path().join("config.json");
    for text in ["", "{", "{\"model_type\": NaN}", "\u{feff}{}"] {
        std::fs::write(&path, text).unwrap();
        assert!(matches!(ModelConfig::from_dir(dir.path()), Err(Error::File { .. })), "{text:?}");
    }
    std::fs::write(&path, b"{\"a\": \"\xff\"}").unwrap();
    assert!(matches!(ModelConfig::from_dir(dir.path()), Err(Error::File { .. })));
    for text in ["[]", "3", "null", "{}"] {
        std::fs::write(&path, text).unwrap();
        assert!(matches!(ModelConfig::from_dir(dir.path()), Err(Error::Config { .. })), "{text:?}");
    }
}

fn rope(head_dim: usize, max_position: usize, parameters: Value) -> super::RopeConfig {
    let config = json!({
        "model_type": "qwen3_5_text", "head_dim": head_dim, "max_position_embeddings": max_position,
        "rope_parameters": parameters
    });
    read(&config).unwrap().rope
}

/// Bits of the frequencies, computed by Transformers 5.23 (`Qwen3_5TextRotaryEmbedding`, torch on a CPU).
/// Their power function may be off by the last bit, so one unit is allowed.
#[track_caller]
fn assert_bits(rope: &super::RopeConfig, expected: &[u32]) {
    let found: Vec<u32> = rope.inv_freq().iter().map(|f| f.to_bits()).collect();
    assert_eq!(found.len(), expected.len());
    for (i, (&a, &b)) in found.iter().zip(expected).enumerate() {
        assert!(a.abs_diff(b) <= 1, "frequency {i}: {a} is not {b}");
    }
}

#[test]
fn frequencies_of_the_family() {
    let rope = rope(256, 262_144, json!({"rope_theta": 1e7}));
    assert_bits(
        &rope,
        &[
            1065353216, 1058714411, 1052440603, 1046607925, 1040747895, 1034226006, 1028093503, 1022431607,
            1016180025, 1009782866, 1003801109, 998282877, 991652109, 985388013, 979567074, 973680130,
            967166816, 961044673, 955395298, 949115006, 942726994, 936756289, 931212715, 924590020,
            918335681, 912526534, 906612554, 900107852, 893996119, 888359325, 882050190, 875671364,
        ],
    );
    let axes: String = rope.frequency_axes().iter().map(|&axis| ['T', 'H', 'W'][axis as usize]).collect();
    assert_eq!(axes, "THWTHWTHWTHWTHWTHWTHWTHWTHWTHWTH");
    // Positions (5, 7, 11): cos and sin of frequency 1, which H drives, and of 2, which W drives.
    let freqs = rope.inv_freq();
    for (i, position, cos, sin) in [
        (0, 5.0, 0.283_662_185, -0.958_924_275),
        (1, 7.0, -0.463_830_664, -0.885_923_877),
        (2, 11.0, -0.640_749_103, -0.767_750_342),
        (15, 5.0, 0.999_996_577, 0.002_616_493),
        (31, 7.0, 1.0, 0.000_001_158),
    ] {
        let angle = f64::from(position * freqs[i]);
        assert!((angle.cos() - cos).abs() < 1e-6 && (angle.sin() - sin).abs() < 1e-6, "{i}");
    }
    assert_eq!(rope.attention_scale(), 1.0);
}

#[test]
fn yarn_as_the_reference_computes_it() {
    let four = rope(
        256,
        262_144,
        json!({
            "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10],
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262_144
        }),
    );
    assert!((four.yarn.as_ref().unwrap().attention_factor - 1.138_629_436).abs() < 1e-9);
    let plain = rope(256, 262_144, json!({"rope_theta": 1e7})).inv_freq();
    let multipliers: Vec<f32> = four.inv_freq().iter().zip(plain).map(|(a, b)| a / b).collect();
    assert!(multipliers[..15].iter().all(|&m| m == 1.0) && multipliers[22..].iter().all(|&m| m == 0.25));
    for (m, expected) in
        multipliers[15..22].iter().zip([0.9062, 0.8125, 0.7188, 0.625, 0.5312, 0.4375, 0.3437])
    {
        assert!((m - expected).abs() < 6e-5, "{m}");
    }
    assert_bits(
        &rope(
            256,
            262_144,
            json!({
                "rope_theta": 1e7, "partial_rotary_factor": 0.25, "rope_type": "yarn", "factor": 2.5,
                "original_max_position_embeddings": 65_536, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": false,
                "mscale": 0.7, "mscale_all_dim": 0.3
            }),
        ),
        &[
            1065353216, 1058714411, 1052440603, 1046607925, 1040747895, 1034226006, 1028093503, 1022431607,
            1016180025, 1009782866, 1003801109, 998282877, 991652109, 985146183, 977112638, 968702147,
            959742002, 950029671, 943832449, 938092336, 932020085, 925565799, 919515001, 913951854,
            907473869, 901148830, 895254237, 889536163, 882969055, 876781898, 871053948, 864953808,
        ],
    );
    let small = rope(
        48,
        262_144,
        json!({
            "rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_type": "yarn", "factor": 8.0,
            "original_max_position_embeddings": 64
        }),
    );
    assert_bits(
        &small,
        &[
            1065353216, 1052355039, 1039675612, 1024249037, 1002315413, 993033670, 983815946, 974657658,
            965554537, 956502639, 947083868, 937552039,
        ],
    );
    assert_eq!(small.mrope_section, [4, 4, 4]);
    assert_eq!(rope(24, 64, json!({"partial_rotary_factor": 0.75})).mrope_section, [3, 3, 3]);
}

#[test]
fn yarn_keys() {
    let yarn = |extra: Value| {
        let mut config = with("text_config.rope_parameters.rope_type", json!("yarn"));
        for (key, value) in extra.as_object().unwrap() {
            config["text_config"]["rope_parameters"][key] = value.clone();
        }
        config
    };
    let ok = |extra: Value| read(&yarn(extra)).unwrap().rope.yarn.unwrap();
    // Without a length of its own, the file's longest context; 0 and null count as absent.
    let plain = ok(json!({"factor": 4, "beta_fast": 0, "beta_slow": null, "mscale": 0.7}));
    assert_eq!((plain.original_max_position, plain.beta_fast, plain.beta_slow), (4096, 32.0, 1.0));
    assert!(plain.truncate && (plain.attention_factor - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-15);
    assert_eq!(ok(json!({"factor": null, "original_max_position_embeddings": 1024})).factor, 4.0);
    assert_eq!(ok(json!({"factor": 2, "attention_factor": 1.5})).attention_factor, 1.5);
    assert_eq!(ok(json!({"factor": 1})).attention_factor, 1.0);
    let config = read(&yarn(json!({"factor": 4.0}))).unwrap();
    assert_eq!((config.max_position, config.max_context()), (4096, 16_384));
    for (key, value) in [
        ("factor", Value::Null),
        ("factor", json!(0.5)),
        ("factor", json!("4")),
        ("attention_factor", json!(0.0)),
        ("attention_factor", json!(-1.0)),
        ("beta_fast", json!(0.5)),
        ("beta_slow", json!(-1)),
        ("mscale", json!("x")),
        ("truncate", json!(1)),
        ("original_max_position_embeddings", json!(0)),
        ("original_max_position_embeddings", json!(1.5)),
    ] {
        let mut extra = json!({"factor": 4.0});
        extra[key] = value.clone();
        if value.is_null() {
            extra = json!({});
        }
        assert_eq!(refused(&yarn(extra)), format!("text_config.rope_parameters.{key}"), "{value}");
    }
}

#[test]
fn generation_defaults() {
    let read = |text: &str| GenerationConfig::from_json(text, Path::new("generation_config.json"));
    let found = read(
        r#"{"bos_token_id": 1, "eos_token_id": [3, 4], "pad_token_id": 0, "do_sample": true, "top_k": 20,
            "top_p": 0.95, "temperature": 0.6, "transformers_version": "5"}"#,
    )
    .unwrap();
    assert_eq!(
        (found.eos_token_ids.as_slice(), found.top_k, found.top_p),
        ([3, 4].as_slice(), Some(20), Some(0.95))
    );
    assert!(!found.is_greedy());
    assert_eq!(read(r#"{"eos_token_id": 5}"#).unwrap().eos_token_ids, [5]);
    assert!(read(r#"{"do_sample": false, "temperature": 1.0}"#).unwrap().is_greedy());
    for (key, values) in [
        ("eos_token_id", vec!["\"x\"", "-1", "[1, null]", "1.5", "4294967296"]),
        ("do_sample", vec!["1", "\"true\""]),
        ("temperature", vec!["-1", "\"1\"", "1e999"]),
        ("top_p", vec!["0", "1.1"]),
        ("top_k", vec!["-1", "1.0"]),
        ("min_p", vec!["2"]),
        ("repetition_penalty", vec!["0", "-1"]),
        ("presence_penalty", vec!["true"]),
        ("max_new_tokens", vec!["0", "[]"]),
    ] {
        for value in values {
            match read(&format!("{{\"{key}\": {value}}}")) {
                Err(Error::Config { field, .. }) => assert_eq!(field, format!("generation_config.{key}")),
                other => panic!("{key} {value}: {other:?}"),
            }
        }
    }
    // What has no effect in Transformers passes, and so does what only keeps books.
    for neutral in [
        r#"{"num_beams": 1, "typical_p": 1.0, "min_length": 0, "guidance_scale": null, "suppress_tokens": []}"#,
        r#"{"transformers_version": "5", "use_cache": true, "_from_model_config": true, "max_length": 20}"#,
    ] {
        assert_eq!(read(neutral).unwrap(), GenerationConfig::default());
    }
    for (key, value, allowed) in [
        ("num_beams", "4", "1; "),
        ("typical_p", "0.9", "1; "),
        ("epsilon_cutoff", "0.001", "0; "),
        ("eta_cutoff", "0.001", "0; "),
        ("no_repeat_ngram_size", "3", "0; "),
        ("encoder_no_repeat_ngram_size", "3", "0; "),
        ("min_new_tokens", "5", "0; "),
        ("min_length", "5", "0; "),
        ("guidance_scale", "1.5", "1; "),
        ("penalty_alpha", "0.6", "0; "),
        ("diversity_penalty", "0.5", "0; "),
        ("suppress_tokens", "[1]", "null; "),
        ("begin_suppress_tokens", "[1]", "null; "),
        ("bad_words_ids", "[[1]]", "null; "),
        ("stop_strings", "[\"a\"]", "null; "),
        ("stop_strings", "\"a\"", "null; "),
        ("forced_eos_token_id", "0", "null; "),
        ("forced_bos_token_id", "0", "null; "),
        ("sequence_bias", "[[[1],2.0]]", "null; "),
        ("exponential_decay_length_penalty", "[1,1.1]", "null; "),
        ("token_healing", "true", "false; "),
    ] {
        match read(&format!("{{\"{key}\": {value}}}")) {
            Err(Error::Config { field, found, allowed: words }) => {
                assert_eq!((field, found.as_str()), (format!("generation_config.{key}"), value));
                assert!(words.starts_with(allowed), "{key}: {words}");
            }
            other => panic!("{key} {value}: {other:?}"),
        }
    }
    assert!(matches!(read("["), Err(Error::File { .. })));
    assert!(matches!(read("[]"), Err(Error::Config { .. })));
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(GenerationConfig::from_dir(dir.path()).unwrap(), GenerationConfig::default());
}

#[test]
fn generation_against_the_model() {
    let model = read(&moe()).unwrap();
    let check = |text: &str| {
        GenerationConfig::from_json(text, Path::new("generation_config.json")).unwrap().check(&model)
    };
    let (last, context) = (model.vocab - 1, model.max_context());
    check(&format!(r#"{{"eos_token_id": [0, {last}], "max_length": {context}}}"#)).unwrap();
    check(r#"{"max_length": 30, "max_new_tokens": 5}"#).unwrap();
    let error = |text: &str| check(text).unwrap_err().to_string();
    assert_eq!(
        error(&format!(r#"{{"eos_token_id": [0, {}]}}"#, model.vocab)),
        format!("generation_config.eos_token_id: found {}; allowed: token ids, 0 to {last}", model.vocab)
    );
    let found = error(r#"{"max_length": 30}"#);
    assert!(
        found.starts_with("generation_config.max_length: found 30; allowed: null, or the context"),
        "{found}"
    );
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z_]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z_]{1,8}", inner, 0..3)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    /// Any value under any key is either taken or refused as a `Config` error; and what is taken is sound.
    #[test]
    fn any_value_anywhere(section in 0..4usize, key in any::<prop::sample::Index>(), value in any_json()) {
        let mut config = moe();
        let at = match section {
            0 => &mut config,
            1 => &mut config["text_config"],
            2 => &mut config["text_config"]["rope_parameters"],
            _ => &mut config["vision_config"],
        };
        let map = at.as_object_mut().unwrap();
        let name = map.keys().nth(key.index(map.len())).unwrap().clone();
        map[&name] = value;
        match read(&config) {
            Ok(config) => {
                prop_assert_eq!(config.rope.mrope_section.iter().sum::<usize>(), config.rope.num_freqs());
                prop_assert!(config.rope.inv_freq().iter().all(|f| f.is_finite() && *f > 0.0));
                let counts = crate::plan::Part::whole(&config).params();
                prop_assert!(counts.active <= counts.text);
            }
            Err(Error::Config { .. }) => {}
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}
