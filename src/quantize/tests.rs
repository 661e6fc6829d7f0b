//! The embedded model, quantised at load and in a file: which matrices, and the same numbers to the bit.

use std::path::{Path, PathBuf};

use half::bf16;
use serde_json::{Value, json};

use super::quantize;
use crate::config::ModelConfig;
use crate::weights::quant::{Encoded, Quantization, Scheme, dequantise_fp8, quantise_fp8};
use crate::weights::safetensors::parse_header;
use crate::weights::{Checkpoint, DType, ExpertTensors, FfnTensors, ModelTensors, MtpTensors, Tensor};
use crate::{Error, Result};

const ALL: [Quantization; 3] =
    [Quantization::Int4 { group: 32 }, Quantization::Fp8, Quantization::Mixed { group: 32 }];

fn embedded() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("python/qwen35rs/model")
}

fn model(dir: &Path) -> (ModelTensors, MtpTensors) {
    let (checkpoint, config) = (Checkpoint::open(dir).unwrap(), ModelConfig::from_dir(dir).unwrap());
    let tensors = ModelTensors::resolve(&checkpoint, &config).unwrap();
    (tensors, MtpTensors::resolve(&checkpoint, &config).unwrap())
}

fn run(from: &Path, to: &Path, quantization: Quantization) -> Result<super::Summary> {
    quantize(from, to, quantization, None, |_, _| Ok(()))
}

/// What a name is quantised to at load: 4 or 8 bits, or `None`.
fn bits(name: &str, quantization: Quantization) -> Option<u8> {
    let ends = |ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
    let expert = name.contains(".mlp.experts.") || name.contains(".mlp.shared_expert.");
    let projection =
        ["q", "k", "v", "o"].iter().any(|p| name.ends_with(&format!("self_attn.{p}_proj.weight")))
            || ends(&["in_proj_qkv.weight", "in_proj_z.weight", "linear_attn.out_proj.weight"]);
    match quantization {
        _ if name == "lm_head.weight" => Some(8),
        Quantization::Fp8 if expert || projection => Some(8),
        Quantization::Int4 { .. } if expert || projection => Some(4),
        Quantization::Mixed { .. } if expert => Some(4),
        Quantization::Mixed { .. } if projection => Some(8),
        _ => None,
    }
}

#[test]
fn names_decide_what_is_quantised() {
    for quantization in ALL {
        let (tensors, module) = model(&embedded());
        let (tensors, module) = (tensors.requantised(quantization), module.requantised(quantization));
        let mut num = [0, 0];
        for tensor in tensors.tensors().chain(module.tensors()) {
            let found = tensor.scheme().map(|scheme| match scheme {
                Scheme::Int4 { .. } => 4,
                Scheme::Fp8 { .. } => 8,
            });
            assert_eq!(found, bits(&tensor.name, quantization), "{} {quantization:?}", tensor.name);
            num[usize::from(found.is_some())] += 1;
            if found.is_some() {
                assert!(tensor.bytes().is_none() && tensor.encoded().is_none());
                assert_eq!((tensor.dtype, tensor.source().dtype), (DType::F32, DType::BF16));
            }
        }
        assert!(num[0] > 60 && num[1] > 40, "{num:?}");
    }
}

#[test]
fn random_weights_are_quantised_too() {
    let config = ModelConfig::from_dir(&embedded()).unwrap();
    let tensors = ModelTensors::resolve(&Checkpoint::random(), &config).unwrap();
    let tensors = tensors.requantised(Quantization::Int4 { group: 128 });
    let head = tensors.lm_head.unwrap();
    assert!(head.random_elements().is_none() && head.source().random_elements().is_some());
    head.check_finite().unwrap();
    let (before, after) = (head.source().to_f32(), head.to_f32());
    let error = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>();
    let relative = (error(&before, &after) / error(&before, &vec![0.0; before.len()])).sqrt();
    assert!((0.02..0.03).contains(&relative), "{relative}");
}

/// Gate and up of a stacked tensor are matrices of their own, however few rows they have.
#[test]
fn stacks_are_quantised_matrix_by_matrix() {
    let (tensors, _) = model(&embedded());
    let tensors = tensors.requantised(Quantization::Fp8);
    let FfnTensors::Moe { experts: ExpertTensors::Fused { gate_up_proj: stack, .. }, .. } =
        &tensors.layers[0].ffn
    else {
        panic!("experts of the embedded model are stacked");
    };
    let (k, rows) = (stack.num_cols(), stack.num_rows());
    let width = stack.shape[1] / 2;
    assert!(width < 128);
    let source = stack.source().to_f32();
    let mut want = vec![0.0; source.len()];
    for (w, out) in source.chunks(width * k).zip(want.chunks_mut(width * k)) {
        let (mut codes, mut scales) = (vec![0; w.len()], vec![0.0; k.div_ceil(128)]);
        quantise_fp8(w, k, &mut codes, &mut scales);
        dequantise_fp8(&codes, k, &scales, out);
    }
    assert_eq!(stack.to_f32(), want);
    for some in [0..1, 5..width + 3, width - 1..3 * width + 1, rows - 2..rows, 7..7] {
        let mut out = vec![f32::NAN; some.len() * k];
        stack.read_rows(some.clone(), &mut out);
        assert_eq!(out, want[some.start * k..some.end * k]);
    }
    let rounded: Vec<u8> = want.iter().flat_map(|&x| bf16::from_f32(x).to_ne_bytes()).collect();
    assert_eq!(stack.convert(DType::BF16), rounded);
}

#[test]
fn what_is_in_few_bits_stays() {
    let folder = tempfile::tempdir().unwrap();
    let [fp8, int4] = ["fp8", "int4"].map(|name| folder.path().join(name));
    run(&embedded(), &fp8, Quantization::Fp8).unwrap();
    run(&embedded(), &int4, Quantization::Int4 { group: 64 - 32 }).unwrap();
    let scheme_of = |dir: &Path, quantization, expert: bool| {
        let tensors = model(dir).0.requantised(quantization);
        let end = if expert { "experts.3.up_proj.weight" } else { "in_proj_qkv.weight" };
        let tensor = tensors.tensors().find(|t| t.name.ends_with(end)).unwrap().clone();
        (tensor.encoded().is_some(), tensor.scheme())
    };
    let group = 32;
    for expert in [true, false] {
        assert_eq!(scheme_of(&fp8, Quantization::Fp8, expert), (true, None));
        assert_eq!(
            scheme_of(&fp8, Quantization::Int4 { group }, expert),
            (false, Some(Scheme::Int4 { group }))
        );
        for quantization in ALL {
            assert_eq!(scheme_of(&int4, quantization, expert), (true, None));
        }
    }
    assert_eq!(scheme_of(&fp8, Quantization::Mixed { group }, true), (false, Some(Scheme::Int4 { group })));
    assert_eq!(scheme_of(&fp8, Quantization::Mixed { group }, false), (true, None));

    // In a file: dense matrices are copied, experts are decoded and quantised again.
    let mixed = folder.path().join("mixed");
    let summary = run(&fp8, &mixed, Quantization::Mixed { group }).unwrap();
    assert!(summary.num_kept > 20 && summary.num_quantised > 100, "{summary:?}");
    let of = |dir: &Path, q: Quantization| model(dir).0.requantised(q);
    let (got, want) = (model(&mixed).0, of(&fp8, Quantization::Mixed { group }));
    let numbers = |tensors: &ModelTensors, end: &str| {
        tensors.tensors().find(|t| t.name.ends_with(end)).unwrap().to_f32()
    };
    for end in ["3.linear_attn.out_proj.weight", "0.linear_attn.out_proj.weight", "experts.3.up_proj.weight"]
    {
        if want.tensors().any(|t| t.name.ends_with(end)) {
            assert_eq!(numbers(&got, end), numbers(&want, end), "{end}");
        }
    }
    // Integers stay in a file that can have them.
    let text = run(&int4, &folder.path().join("again"), ALL[1]).unwrap_err().to_string();
    assert!(
        text.contains("found int4 (compressed-tensors), groups of 32; expected a matrix in more bits than"),
        "{text}"
    );
}

/// Numbers of the modules of a model, experts one by one.
fn matrices(tensors: Vec<&Tensor>) -> Vec<(String, Vec<f32>)> {
    let mut list = Vec::new();
    for tensor in tensors {
        let numbers = tensor.to_f32();
        let Some(base) = tensor.name.strip_suffix("gate_up_proj") else {
            match tensor.name.strip_suffix("experts.down_proj") {
                None => list.push((tensor.name.clone(), numbers)),
                Some(base) => list.extend(
                    numbers
                        .chunks(numbers.len() / tensor.shape[0])
                        .enumerate()
                        .map(|(e, part)| (format!("{base}experts.{e}.down_proj.weight"), part.to_vec())),
                ),
            }
            continue;
        };
        for (i, part) in numbers.chunks(numbers.len() / tensor.shape[0] / 2).enumerate() {
            let which = ["gate", "up"][i % 2];
            list.push((format!("{base}{}.{which}_proj.weight", i / 2), part.to_vec()));
        }
    }
    list.sort_by(|a, b| a.0.cmp(&b.0));
    list
}

#[test]
fn a_file_holds_what_loading_computes() {
    for quantization in ALL {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("new/out");
        let mut seen = Vec::new();
        let summary = quantize(&embedded(), &out, quantization, None, |done, total| {
            seen.push((done, total));
            Ok(())
        })
        .unwrap();
        assert_eq!(
            seen.last().map(|&(done, total)| (done, total)),
            Some((summary.bytes_after, summary.bytes_after))
        );
        let (bf16, bf16_module) = model(&embedded());
        let head = bf16.lm_head.clone();
        let (mut want, module) = (bf16.requantised(quantization), bf16_module.requantised(quantization));
        want.lm_head = head;
        if let Quantization::Mixed { .. } = quantization {
            want.layers.iter_mut().for_each(|layer| super::shared_for_file(layer, quantization));
        }
        let (got, got_module) = model(&out);
        assert_eq!(matrices(got.tensors().collect()), matrices(want.tensors().collect()), "{quantization:?}");
        let module_names = |module: &MtpTensors| {
            matrices(
                module
                    .tensors()
                    .filter(|t| !t.name.contains("shared_expert"))
                    .cloned()
                    .collect::<Vec<_>>()
                    .iter()
                    .collect(),
            )
        };
        assert_eq!(module_names(&got_module), module_names(&module));
        let encoded = got.tensors().filter(|t| t.encoded().is_some()).count();
        assert!(encoded > 300 && summary.num_quantised > encoded && summary.num_kept == 0);
        let is_int4 = |t: &Tensor| matches!(t.encoded(), Some(Encoded::Int4(_)));
        let num_int4 = got.tensors().filter(|t| is_int4(t)).count();
        assert_eq!(num_int4 > 0, quantization != Quantization::Fp8);

        // The report says the errors that there are.
        let text = std::fs::read_to_string(out.join("quantization_report.json")).unwrap();
        let report: Value = serde_json::from_str(&text).unwrap();
        let name = "model.language_model.layers.0.linear_attn.out_proj";
        let tensor = |tensors: &ModelTensors| {
            tensors.tensors().find(|t| t.name == format!("{name}.weight")).unwrap().to_f32()
        };
        let (before, after) = (tensor(&model(&embedded()).0), tensor(&got));
        let errors: Vec<f64> =
            before.iter().zip(&after).map(|(&x, &y)| f64::from(x) - f64::from(y)).collect();
        let sum = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>();
        let squares = sum(&before.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
        let facts = &report["matrices"][name];
        let near = |found: &Value, want: f64| (found.as_f64().unwrap() / want - 1.0).abs() < 1e-9;
        assert!(near(&facts["relative_rms_error"], (sum(&errors) / squares).sqrt()));
        assert!(near(&facts["max_abs_error"], errors.iter().fold(0.0, |m, x| f64::max(m, x.abs()))));
        assert_eq!(report["summary"], serde_json::to_value(&summary).unwrap());
        assert_eq!(report["matrices"].as_object().unwrap().len(), summary.num_quantised);
        for file in ["tokenizer.json", "chat_template.jinja", "generation_config.json"] {
            assert_eq!(std::fs::read(out.join(file)).unwrap(), std::fs::read(embedded().join(file)).unwrap());
        }
    }
}

/// Nothing is beside it but what was there.
#[track_caller]
fn refused(from: &Path, quantization: Quantization) -> String {
    let folder = tempfile::tempdir().unwrap();
    let error = run(from, &folder.path().join("out"), quantization).unwrap_err();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    error.to_string()
}

#[test]
fn nothing_is_left_of_what_fails() {
    let groups = refused(&embedded(), Quantization::Int4 { group: 128 });
    assert!(
        groups.ends_with(
            "found rows of 32; expected rows of whole groups of 128 (--group-size); --group-size 32 does for all"
        ),
        "{groups}"
    );

    let bad = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(embedded().join(name), bad.path().join(name)).unwrap();
    }
    let path = bad.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let name = "model.language_model.layers.2.linear_attn.in_proj_z.weight";
    let info = parse_header(&bytes, &path).unwrap().into_iter().find(|t| t.name == name).unwrap();
    let at = info.range.start + 2 * (3 * info.shape[1] + 7);
    bytes[at..at + 2].copy_from_slice(&bf16::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let want = format!(
        "tensor {name}: found NaN in row 3, column 7; expected finite numbers, where they are quantised"
    );
    for quantization in ALL {
        assert_eq!(refused(bad.path(), quantization), want);
        let tensors = model(bad.path()).0.requantised(quantization);
        let tensor = tensors.tensors().find(|t| t.name == name).unwrap();
        assert_eq!(tensor.check_finite().unwrap_err().to_string(), want);
    }

    let folder = tempfile::tempdir().unwrap();
    let stop = |_, _| Err(Error::Interrupted);
    let stopped = quantize(&embedded(), &folder.path().join("out"), ALL[1], None, stop);
    assert!(matches!(stopped, Err(Error::Interrupted)));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);

    let (empty, full, file) =
        (folder.path().join("empty"), folder.path().join("full"), folder.path().join("file"));
    std::fs::create_dir_all(&empty).unwrap();
    std::fs::create_dir_all(full.join("x")).unwrap();
    std::fs::write(&file, "x").unwrap();
    for (path, what) in [(&full, "which is not empty"), (&file, "which is no directory")] {
        let text = run(&embedded(), path, ALL[1]).unwrap_err().to_string();
        assert!(text.contains(what) && text.contains("allowed: a directory that is new or empty"), "{text}");
    }
    run(&embedded(), &empty, ALL[1]).unwrap();
    assert!(empty.join("config.json").exists());
}

#[test]
fn the_configuration_says_what_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let section = |name: &str, quantization| {
        let out = folder.path().join(name);
        run(&embedded(), &out, quantization).unwrap();
        let text = std::fs::read_to_string(out.join("config.json")).unwrap();
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config.as_object_mut().unwrap().shift_remove("quantization_config").unwrap()
    };
    let int4 = section("int4", ALL[0]);
    assert_eq!(int4["config_groups"]["group_0"]["targets"], json!(["Linear"]));
    assert_eq!(int4["config_groups"]["group_0"]["weights"]["group_size"], json!(32));
    let fp8 = section("fp8", ALL[1]);
    assert_eq!((&fp8["quant_method"], &fp8["weight_block_size"]), (&json!("fp8"), &json!([128, 128])));
    let mixed = section("mixed", ALL[2]);
    assert_eq!(mixed["config_groups"].as_object().unwrap().len(), 2);
    let ignored: Vec<&str> = int4["ignore"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    for module in ["lm_head", "mtp.fc", "model.language_model.layers.0.mlp.gate"] {
        assert!(ignored.contains(&module), "{module}");
    }
    for part in ["in_proj_a", "in_proj_b", "conv1d", "shared_expert_gate"] {
        assert!(ignored.iter().any(|name| name.ends_with(part)), "{part}");
    }
    assert!(!ignored.iter().any(|name| name.ends_with("_proj")));
    assert_eq!((&mixed["ignore"], &fp8["modules_to_not_convert"]), (&int4["ignore"], &int4["ignore"]));
    // A quantised one is described anew.
    let again = folder.path().join("again");
    run(&folder.path().join("fp8"), &again, Quantization::Int4 { group: 32 }).unwrap();
    let config = ModelConfig::from_dir(&again).unwrap().quantization.unwrap();
    assert!(config.int4.is_some() && config.fp8.is_none());
}
