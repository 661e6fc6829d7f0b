//! Every form against what the packages that define it decode (`tests/golden/make_quant.py`), bit for bit; and what is
//! said of a part that is wrong.

use std::path::Path;

use serde_json::{Value, json};

use super::{Encoded, Scheme, decode_e2m1, decode_e4m3, find, is_ignored};
use crate::config::{ModelConfig, QuantConfig};
use crate::weights::tests::{dir, file};
use crate::weights::{Checkpoint, DType, Tensor};

fn config(quantization: &Value) -> QuantConfig {
    let text = json!({"model_type": "qwen3_5_text", "hidden_size": 64, "quantization_config": quantization});
    ModelConfig::from_value(&text).unwrap().quantization.unwrap()
}

/// What a matrix's part of a file is called: stacked experts have no `.weight`.
fn logical(module: &str, shape: &[usize]) -> String {
    if shape.len() == 3 { module.to_string() } else { format!("{module}.weight") }
}

#[test]
fn recorded_matrices_are_decoded_to_the_bit() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/quant");
    let cases: Value = serde_json::from_slice(&std::fs::read(folder.join("cases.json")).unwrap()).unwrap();
    let (mut num_modules, mut formats) = (0, std::collections::BTreeSet::new());
    for (name, case) in cases.as_object().unwrap() {
        let checkpoint = Checkpoint::open(&folder.join(format!("{name}.safetensors"))).unwrap();
        let config = config(&case["quantization_config"]);
        for (module, facts) in case["modules"].as_object().unwrap() {
            let shape: Vec<usize> = serde_json::from_value(facts["shape"].clone()).unwrap();
            let name = logical(module, &shape);
            let (tensor, parts) = find(&checkpoint, Some(&config), &name, &shape).unwrap().unwrap();
            // Every part is taken once, but for those that are about activations.
            let all = checkpoint.iter().filter(|t| t.name.starts_with(module.as_str()));
            let rest = all.filter(|t| !parts.contains(&t.name) && !t.name.contains(".input_"));
            assert_eq!(rest.count(), 0, "{name}");
            assert_eq!(parts.iter().collect::<std::collections::HashSet<_>>().len(), parts.len());
            check(&tensor, &checkpoint.get(&format!("expected.{module}")).unwrap(), &shape);
            let encoded = tensor.encoded().unwrap();
            formats.insert(encoded.format());
            // What has 4 bits stays as it is, whatever is asked for.
            let four = matches!(encoded, Encoded::Int4(_) | Encoded::Nvfp4(_));
            let asked = tensor.clone().requantised(Scheme::Int4 { group: 32 });
            assert_eq!((asked.scheme().is_none(), asked.encoded().is_some()), (four, four));
            let asked = tensor.clone().requantised(Scheme::Fp8 { matrix_rows: shape[shape.len() - 2] });
            assert!(asked.scheme().is_none() && asked.encoded().is_some());
            let stored: usize = encoded.parts().iter().map(|t| t.bytes().unwrap().len()).sum();
            assert_eq!(tensor.num_bytes(), stored);
            assert!(tensor.bytes().is_none() && stored < 4 * tensor.num_elements());
            num_modules += 1;
        }
    }
    assert_eq!(num_modules, 27);
    let formats: Vec<_> = formats.iter().map(String::as_str).collect();
    assert_eq!(
        formats,
        [
            "fp8, a scale per block of 128 x 128",
            "fp8, a scale per block of 16 x 24",
            "fp8, a scale per block of 16 x 8",
            "fp8, a scale per row",
            "fp8, one scale",
            "int4 (awq), groups of 32",
            "int4 (compressed-tensors), a scale per row",
            "int4 (compressed-tensors), groups of 128",
            "int4 (compressed-tensors), groups of 32",
            "int4 (compressed-tensors), groups of 64",
            "int4 (gptq), groups of 32",
            "nvfp4 (compressed-tensors)",
            "nvfp4 (modelopt)",
        ]
    );
}

/// All elements at once, by pieces of rows, and rounded: the same bits, but that a zero may have the other sign.
fn check(tensor: &Tensor, expected: &Tensor, shape: &[usize]) {
    assert_eq!((&tensor.shape[..], &expected.shape[..], tensor.dtype), (shape, shape, DType::F32));
    let want = expected.to_f32();
    let same = |got: &[f32], want: &[f32]| {
        let bits = |x: f32| if x == 0.0 { 0 } else { x.to_bits() };
        assert!(got.iter().zip(want).all(|(&a, &b)| bits(a) == bits(b)), "{}", tensor.name);
    };
    same(&tensor.to_f32(), &want);
    let (num_rows, num_cols) = (tensor.num_rows(), tensor.num_cols());
    for rows in [0..1, 1..num_rows, num_rows - 1..num_rows, 3..6, num_rows / 2..num_rows, 2..2] {
        let mut got = vec![f32::NAN; rows.len() * num_cols];
        tensor.read_rows(rows.clone(), &mut got);
        same(&got, &want[rows.start * num_cols..rows.end * num_cols]);
    }
    let by_threads = tensor.convert(DType::F32);
    let by_threads: Vec<f32> = by_threads.as_chunks().0.iter().map(|&x| f32::from_ne_bytes(x)).collect();
    assert_eq!(by_threads.len(), want.len());
    same(&by_threads, &want);
    let rounded = tensor.convert(DType::BF16);
    let expected: Vec<u8> =
        tensor.to_f32().iter().flat_map(|&x| half::bf16::from_f32(x).to_ne_bytes()).collect();
    assert_eq!(rounded, expected);
}

/// A decoded 4-bit matrix is what its normal form says, whatever the layout.
#[test]
fn integers_have_one_normal_form() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/quant");
    let cases: Value = serde_json::from_slice(&std::fs::read(folder.join("cases.json")).unwrap()).unwrap();
    let mut num = 0;
    for (name, case) in cases.as_object().unwrap() {
        let checkpoint = Checkpoint::open(&folder.join(format!("{name}.safetensors"))).unwrap();
        for (module, facts) in case["modules"].as_object().unwrap() {
            let shape: Vec<usize> = serde_json::from_value(facts["shape"].clone()).unwrap();
            let config = config(&case["quantization_config"]);
            let found = find(&checkpoint, Some(&config), &logical(module, &shape), &shape).unwrap().unwrap();
            let Some(Encoded::Int4(int4)) = found.0.encoded() else { continue };
            let (rows, cols, groups) = (int4.num_rows, int4.num_cols, int4.num_groups());
            assert_eq!([rows, cols], shape[..]);
            let (mut codes, mut zeros) = (vec![99; rows * cols], vec![99; rows * groups]);
            let mut scales = vec![0.0; rows * groups];
            int4.read_codes(0..rows, &mut codes);
            int4.read_zeros(0..rows, &mut zeros);
            int4.read_scales(0..rows, &mut scales);
            assert!(codes.iter().chain(&zeros).all(|&q| q < 16));
            let want = checkpoint.get(&format!("expected.{module}")).unwrap().to_f32();
            for r in 0..rows {
                for k in 0..cols {
                    let at = r * groups + k / int4.group;
                    let x = (f32::from(codes[r * cols + k]) - f32::from(zeros[at])) * scales[at];
                    assert_eq!(x, want[r * cols + k]);
                }
            }
            num += 1;
        }
    }
    assert_eq!(num, 14);
}

#[test]
fn small_floats() {
    // Of e4m3: zero, the smallest, the largest below and the first above the change of form, 1, the largest, NaN.
    for (code, x) in
        [(0, 0.0), (1, 1.0 / 512.0), (7, 7.0 / 512.0), (8, 1.0 / 64.0), (0x38, 1.0), (0x7e, 448.0)]
    {
        assert_eq!(decode_e4m3(code).to_bits(), f32::to_bits(x));
        assert_eq!(decode_e4m3(code | 0x80).to_bits(), f32::to_bits(-x));
    }
    assert!(decode_e4m3(0x7f).is_nan() && decode_e4m3(0xff).is_nan());
    let positive: Vec<f32> = (0..0x7f).map(decode_e4m3).collect();
    assert!(positive.windows(2).all(|w| w[0] < w[1]) && positive.iter().all(|x| x.is_finite()));
    let positive: Vec<f32> = (0..8).map(decode_e2m1).collect();
    assert_eq!(positive, [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]);
    assert!((0..8).all(|code| decode_e2m1(code | 8) == -decode_e2m1(code)));
}

// ---------------------------------------------------------------------------------------------------
// Parts that are wrong

#[derive(Clone)]
struct Part {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    data: Option<Vec<u8>>,
}

fn part(name: &str, dtype: DType, shape: &[usize]) -> Part {
    Part { name: name.into(), dtype, shape: shape.to_vec(), data: None }
}

fn with(part: Part, data: Vec<u8>) -> Part {
    Part { data: Some(data), ..part }
}

/// A checkpoint of these tensors; bytes that nobody gave are zeros.
fn checkpoint(parts: &[Part]) -> (tempfile::TempDir, Checkpoint) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for Part { name, dtype, shape, data: bytes } in parts {
        let len = shape.iter().product::<usize>() * dtype.bits() / 8;
        let start = data.len();
        data.extend(bytes.clone().filter(|bytes| bytes.len() == len).unwrap_or(vec![0; len]));
        let entry = json!({"dtype": dtype.name(), "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.clone(), entry);
    }
    let dir = dir(&[("model.safetensors", file(&Value::Object(header).to_string(), &data))]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

fn error(parts: &[Part], quantization: Option<&Value>, shape: &[usize]) -> Option<String> {
    let (_dir, checkpoint) = checkpoint(parts);
    let config = quantization.map(config);
    let problem = find(&checkpoint, config.as_ref(), &logical("a.b", shape), shape).err()?;
    Some(format!("{}: {}; {}", problem.name, problem.found, problem.expected))
}

fn order(groups: impl Iterator<Item = i32>) -> Vec<u8> {
    groups.flat_map(i32::to_le_bytes).collect()
}

/// A good matrix of 16 x 64 in every layout: its quantization_config, parts, and whether a part may be absent.
fn good() -> Vec<(Value, Vec<(Part, bool)>)> {
    use DType::{BF16, F8_E4M3, F32, I32, I64, U8};
    let must =
        |name: &str, dtype: DType, shape: &[usize]| (part(&format!("a.b.{name}"), dtype, shape), false);
    let groups = |weights: Value| json!({"group_0": {"targets": ["Linear"], "weights": weights}});
    let compressed =
        |weights: Value| json!({"quant_method": "compressed-tensors", "config_groups": groups(weights)});
    let shape = |mut part: (Part, bool)| {
        part.0.data = Some([16i64, 64].into_iter().flat_map(i64::to_le_bytes).collect());
        part
    };
    let g_idx = with(part("a.b.g_idx", I32, &[64]), order((0..64).map(|i| i / 32)));
    let packed = |symmetric: bool| json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": symmetric});
    let float4 = json!({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16});
    vec![
        (
            json!({"quant_method": "fp8", "weight_block_size": [8, 32]}),
            vec![must("weight", F8_E4M3, &[16, 64]), must("weight_scale_inv", BF16, &[2, 2])],
        ),
        (
            json!({"quant_method": "gptq", "bits": 4, "group_size": 32}),
            vec![
                must("qweight", I32, &[8, 16]),
                must("qzeros", I32, &[2, 2]),
                must("scales", BF16, &[2, 16]),
                (g_idx, true),
            ],
        ),
        (
            json!({"quant_method": "awq", "bits": 4, "group_size": 32}),
            vec![
                must("qweight", I32, &[64, 2]),
                must("qzeros", I32, &[2, 2]),
                must("scales", BF16, &[2, 16]),
            ],
        ),
        (
            compressed(packed(true)),
            vec![
                must("weight_packed", I32, &[16, 8]),
                must("weight_scale", BF16, &[16, 2]),
                shape(must("weight_shape", I64, &[2])),
            ],
        ),
        (
            compressed(packed(false)),
            vec![
                must("weight_packed", I32, &[16, 8]),
                must("weight_scale", F32, &[16, 2]),
                must("weight_zero_point", I32, &[2, 2]),
                shape(must("weight_shape", I64, &[2])),
            ],
        ),
        (
            compressed(float4),
            vec![
                must("weight_packed", U8, &[16, 32]),
                must("weight_scale", F8_E4M3, &[16, 4]),
                must("weight_global_scale", F32, &[1]),
            ],
        ),
        (
            json!({"quant_method": "modelopt", "quant_algo": "NVFP4"}),
            vec![
                must("weight", U8, &[16, 32]),
                must("weight_scale", F8_E4M3, &[16, 4]),
                must("weight_scale_2", F32, &[]),
            ],
        ),
    ]
}

#[test]
fn each_part_that_is_missing_or_wrong_names_itself() {
    for (config, parts) in good() {
        let whole: Vec<Part> = parts.iter().map(|(part, _)| part.clone()).collect();
        assert_eq!(error(&whole, Some(&config), &[16, 64]), None, "{config}");
        for (i, (part, optional)) in parts.iter().enumerate() {
            let mut fewer = whole.clone();
            fewer.remove(i);
            let found = error(&fewer, Some(&config), &[16, 64]);
            // Without its codes a matrix is missing as a plain one would be, which the caller says.
            let expected = (i > 0 && !optional).then(|| format!("{}: nothing; ", part.name));
            assert_eq!(found.is_some(), expected.is_some(), "{config} {}", part.name);
            if let (Some(found), Some(expected)) = (&found, expected) {
                assert!(found.starts_with(&expected), "{found}");
            }
            let mut wrong = whole.clone();
            wrong[i].shape.push(2);
            let found = error(&wrong, Some(&config), &[16, 64]).unwrap();
            assert!(
                found.starts_with(&format!("{}: shape {:?}; shape [", part.name, wrong[i].shape)),
                "{found}"
            );
            let mut wrong = whole.clone();
            wrong[i].dtype = DType::F64;
            match error(&wrong, Some(&config), &[16, 64]) {
                Some(found) => assert!(found.starts_with(&format!("{}: dtype F64; ", part.name)), "{found}"),
                None => panic!("{config} {}", part.name),
            }
            // No layout has a float where codes or zero points are, or an integer where scales are.
            let mut wrong = whole.clone();
            let is_float = matches!(part.dtype, DType::BF16 | DType::F32);
            wrong[i].dtype = if is_float { DType::I32 } else { DType::F8_E5M2 };
            let found = error(&wrong, Some(&config), &[16, 64]).unwrap();
            assert!(found.contains("dtype "), "{found}");
        }
        // Other sizes than the model's.
        assert!(error(&whole, Some(&config), &[16, 128]).is_some(), "{config}");
        assert!(error(&whole, Some(&config), &[32, 64]).is_some(), "{config}");
        // Codes that the configuration does not announce.
        let found = error(&whole, None, &[16, 64]).unwrap();
        assert!(
            found.ends_with("BF16, F16 or F32, as the configuration has no quantization_config"),
            "{found}"
        );
        for (other, _) in good() {
            if error(&whole, Some(&other), &[16, 64]).is_none() {
                // What may be symmetric may have zero points nevertheless.
                let same = [&config, &other].map(|c| &c["quant_method"]);
                assert!(same[0] == same[1], "{config} {other}");
            }
        }
        // The same matrix twice.
        let mut both = whole.clone();
        let plain = !whole.iter().any(|part| part.name == "a.b.weight");
        let second = if plain { "a.b.weight" } else { "a.b.qweight" };
        both.push(part(second, DType::BF16, &[16, 64]));
        let found = error(&both, Some(&config), &[16, 64]).unwrap();
        assert!(found.contains(": it beside a.b.weight; one of the two"), "{found}");
    }
}

#[test]
fn the_words_of_errors() {
    let all = good();
    let say = |i: usize, change: &dyn Fn(&mut Vec<Part>)| {
        let (config, parts) = &all[i];
        let mut parts: Vec<Part> = parts.iter().map(|(part, _)| part.clone()).collect();
        change(&mut parts);
        error(&parts, Some(config), &[16, 64]).unwrap()
    };
    assert_eq!(
        say(0, &|parts| parts[1].shape = vec![1, 2]),
        "a.b.weight_scale_inv: shape [1, 2]; shape [] or [1] or [1, 1] or [16] or [16, 1] or [2, 2]"
    );
    assert_eq!(
        say(0, &|parts| parts[1].dtype = DType::F8_E8M0),
        "a.b.weight_scale_inv: dtype F8_E8M0; BF16 or F16 or F32"
    );
    assert_eq!(
        say(0, &|parts| parts[0].dtype = DType::F8_E5M2),
        "a.b.weight: dtype F8_E5M2; BF16, F16 or F32, or fp8 as fp8 stores it (quantization_config)"
    );
    assert_eq!(say(1, &|parts| parts[2].shape = vec![1, 16]), "a.b.scales: shape [1, 16]; shape [2, 16]");
    assert_eq!(
        say(1, &|parts| parts[3].data = Some(order((0..64).map(|i| i % 2)))),
        "a.b.g_idx: group 1 for input 1; group 0: inputs in order, 32 to a group"
    );
    assert_eq!(
        say(1, &|parts| parts[3].data = Some(order((0..64).map(|i| if i == 63 { -1 } else { i / 32 })))),
        "a.b.g_idx: group -1 for input 63; group 1: inputs in order, 32 to a group"
    );
    assert_eq!(
        say(3, &|parts| parts[2].data = Some([64i64, 16].into_iter().flat_map(i64::to_le_bytes).collect())),
        "a.b.weight_shape: [64, 16]; [16, 64]"
    );
    assert_eq!(say(4, &|parts| drop(parts.remove(2))), "a.b.weight_zero_point: nothing; I32 of shape [2, 2]");
    let sizes = |i: usize, shape: [usize; 2]| {
        error(&[part(&all[i].1[0].0.name, DType::I32, &[1])], Some(&all[i].0), &shape)
    };
    assert_eq!(
        sizes(1, [12, 64]).unwrap(),
        "a.b.qweight: a matrix of 12 x 64; sizes that are multiples of 8"
    );
    assert_eq!(
        error(&[part("a.b.weight", DType::U8, &[16, 4])], Some(&all[6].0), &[16, 8]).unwrap(),
        "a.b.weight: a matrix of 16 x 8; a number of inputs that is a multiple of 16"
    );
    // Scales that two group sizes of the configuration could mean.
    let mut two = all[1].0.clone();
    two["dynamic"] = json!({"x": {"group_size": 48}});
    let parts: Vec<Part> = all[1].1.iter().map(|(part, _)| part.clone()).collect();
    assert_eq!(
        error(&parts, Some(&two), &[16, 64]).unwrap(),
        "a.b.scales: shape [2, 16], which groups of 32 and of 48 have; a shape of one group size"
    );
    // A plain matrix has no business here, nor has what is no matrix.
    assert!(error(&[part("a.b.weight", DType::BF16, &[16, 64])], Some(&all[0].0), &[16, 64]).is_none());
    assert!(error(&[part("a.b.weight", DType::F8_E4M3, &[16])], Some(&all[0].0), &[16]).is_none());
}

#[test]
fn dimensions_that_one_program_keeps() {
    let parts = [
        part("a.b.weight", DType::F8_E4M3, &[130, 300]),
        part("a.b.weight_scale", DType::F32, &[2, 1, 3, 1]),
    ];
    let modelopt = json!({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"});
    assert_eq!(error(&parts, Some(&modelopt), &[130, 300]), None);
    let found = error(&parts, Some(&json!({"quant_method": "fp8"})), &[130, 300]).unwrap();
    assert!(found.starts_with("a.b.weight_scale: shape [2, 1, 3, 1]; shape [] or"), "{found}");
}

#[test]
fn stacked_experts() {
    let config = json!({"quant_method": "fp8", "weight_block_size": [8, 32]});
    let parts = [part("a.b", DType::F8_E4M3, &[3, 16, 64]), part("a.b_scale_inv", DType::F32, &[3, 2, 2])];
    assert_eq!(error(&parts, Some(&config), &[3, 16, 64]), None);
    let wrong = [parts[0].clone(), part("a.b_scale_inv", DType::F32, &[2, 2])];
    assert!(error(&wrong, Some(&config), &[3, 16, 64]).unwrap().starts_with("a.b_scale_inv: shape [2, 2]; "));
    assert!(error(&parts[..1], Some(&config), &[3, 16, 64]).unwrap().starts_with("a.b_scale_inv: nothing; "));
    // Nobody has seen the other forms stacked, so their order is not guessed: neither of a stack nor of one matrix.
    let int4 = &good()[3].0;
    for shape in [vec![3, 16, 8], vec![16, 8]] {
        let parts = [part("a.b_packed", DType::I32, &shape), part("a.b_scale", DType::BF16, &[16, 2])];
        let words = "a.b_packed: a stack of matrices; a module of its own for each expert";
        assert_eq!(error(&parts, Some(int4), &[3, 16, 64]).unwrap(), words);
    }
}

/// Any dtypes, shapes and contents: a matrix that can be read, or a problem that says something.
#[test]
fn nothing_panics() {
    use proptest::prelude::*;
    const NAMES: [&str; 12] = [
        "weight",
        "weight_scale_inv",
        "weight_scale",
        "weight_scale_2",
        "weight_packed",
        "weight_shape",
        "weight_zero_point",
        "weight_global_scale",
        "qweight",
        "qzeros",
        "scales",
        "g_idx",
    ];
    let all = good();
    let size = || prop::sample::select(vec![0usize, 1, 2, 4, 8, 16, 32, 64]);
    let dtype = || prop::sample::select(DType::ALL.map(|(dtype, ..)| dtype).to_vec());
    let other = (prop::sample::select(NAMES.to_vec()), dtype(), prop::collection::vec(size(), 0..4));
    let seeds = (0..all.len(), 0..all.len(), prop::collection::vec(other, 0..3), any::<u8>());
    let strategy = (seeds, prop::collection::vec(any::<prop::sample::Index>(), 0..2), (size(), size()));
    proptest!(ProptestConfig::with_cases(600), |(drawn in strategy)| {
        let ((of, config_of, others, byte), removed, (rows, cols)) = drawn;
        let mut parts: Vec<Part> = all[of].1.iter().map(|(part, _)| part.clone()).collect();
        for index in removed {
            parts.remove(index.index(parts.len()));
        }
        for (name, dtype, shape) in others {
            let name = format!("a.b.{name}");
            parts.retain(|part| part.name != name);
            let bits = shape.iter().product::<usize>() * dtype.bits();
            if bits % 8 == 0 {
                parts.push(with(part(&name, dtype, &shape), vec![byte; bits / 8]));
            }
        }
        let (_dir, checkpoint) = checkpoint(&parts);
        for (config, shape) in [(of, [16, 64]), (config_of, [16, 64]), (of, [rows, cols])] {
            let config = self::config(&all[config].0);
            match find(&checkpoint, Some(&config), "a.b.weight", &shape) {
                Ok(Some((tensor, _))) => {
                    prop_assert_eq!(tensor.to_f32().len(), shape[0] * shape[1]);
                    prop_assert_eq!(tensor.convert(DType::BF16).len(), 2 * shape[0] * shape[1]);
                }
                Ok(None) => {}
                Err(problem) => {
                    prop_assert!(problem.name.starts_with("a.b.") && problem.found.len() > 1);
                    prop_assert!(problem.expected.len() > 2);
                }
            }
        }
    });
}

#[test]
fn scales_of_activations_are_known_and_no_others() {
    let taken = [
        "m.self_attn.k_proj.weight",
        "m.self_attn.v_proj.weight",
        "m.self_attn.q_proj.weight",
        "m.up.weight",
    ];
    let taken = taken.map(String::from).into();
    for name in [
        "m.up.input_scale",
        "m.up.input_global_scale",
        "m.up.activation_scale",
        "m.self_attn.k_scale",
        "m.self_attn.v_scale",
        "m.self_attn.k_proj.k_scale",
        "m.self_attn.v_proj.v_scale",
        "m.self_attn.k_proj.output_scale",
    ] {
        assert!(is_ignored(name, &taken), "{name}");
    }
    for name in [
        "m.up.weight_scale",
        "m.up.weight_scale_2",
        "m.up.pre_quant_scale",
        "m.up.k_scale",
        "m.up.output_scale",
        "m.up.bias",
        "m.down.input_scale",
        "n.self_attn.k_scale",
        "m.self_attn.q_proj.output_scale",
        "input_scale",
    ] {
        assert!(!is_ignored(name, &taken), "{name}");
    }
}
