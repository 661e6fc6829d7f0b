//! Checkpoints of any geometry, of random bytes in every format, in a file as programs write it.

use serde_json::{Map, Value, json};

use crate::config::ModelConfig;
use crate::random::mix;
use crate::weights::tests::{dir, file};
use crate::weights::{Checkpoint, DType, ModelTensors, MtpTensors, Tensor};

/// How matrices are stored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Format {
    Bf16,
    /// Rows and columns of a block.
    Fp8([usize; 2]),
    Fp8Rows,
    Fp8Whole,
    /// Inputs that share a scale.
    Gptq(usize),
    Awq(usize),
    Packed(usize),
    /// With zero points.
    PackedZeros(usize),
    ModeloptFp4,
    PackedFp4,
}

impl Format {
    /// Its `quantization_config`.
    fn config(self) -> Option<Value> {
        let groups = |weights: Value| {
            json!({"quant_method": "compressed-tensors", "config_groups":
                {"group_0": {"targets": ["Linear"], "weights": weights}}})
        };
        let int4 = |group: usize, symmetric: bool| {
            groups(json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": group,
                "symmetric": symmetric}))
        };
        Some(match self {
            Format::Bf16 => return None,
            Format::Fp8(block) => json!({"quant_method": "fp8", "weight_block_size": block}),
            Format::Fp8Rows | Format::Fp8Whole => json!({"quant_method": "fp8"}),
            Format::Gptq(group) => json!({"quant_method": "gptq", "bits": 4, "group_size": group}),
            Format::Awq(group) => json!({"quant_method": "awq", "bits": 4, "group_size": group}),
            Format::Packed(group) => int4(group, true),
            Format::PackedZeros(group) => int4(group, false),
            Format::ModeloptFp4 => json!({"quant_method": "modelopt", "quant_algo": "NVFP4"}),
            Format::PackedFp4 => {
                groups(json!({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}))
            }
        })
    }
}

/// Numbers that follow each other.
pub struct Draw(u64);

impl Draw {
    pub fn new(seed: u64) -> Self {
        Draw(mix(seed))
    }

    fn next(&mut self) -> u64 {
        self.0 = mix(self.0);
        self.0
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }

    /// Codes of e4m3 that are numbers, of a sign where scales have none.
    fn e4m3(&mut self, len: usize, signs: bool) -> Vec<u8> {
        let mask = if signs { 0xff } else { 0x7f };
        let number = |byte: u8| if byte & 0x7f == 0x7f { byte & 0x8f } else { byte };
        self.bytes(len).into_iter().map(|byte| number(byte & mask)).collect()
    }

    /// Floats of a size that suits weights and scales.
    pub fn floats(&mut self, dtype: DType, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for _ in 0..len {
            let x = (self.next() >> 40) as f32 / 8_388_608.0 - 1.0;
            match dtype {
                DType::F32 => bytes.extend(x.to_le_bytes()),
                DType::F16 => bytes.extend(half::f16::from_f32(x).to_le_bytes()),
                _ => bytes.extend(half::bf16::from_f32(x).to_le_bytes()),
            }
        }
        bytes
    }
}

type Part = (String, DType, Vec<usize>, Vec<u8>);

/// The tensors of a file that are one matrix, or a stack of them.
fn parts(name: &str, shape: &[usize], format: Format, draw: &mut Draw) -> Vec<Part> {
    use DType::{BF16, F8_E4M3, F16, F32, I32, I64, U8};
    let (base, sep) = name.strip_suffix(".weight").map_or((name, "_"), |base| (base, "."));
    let (stack, [rows, cols]) = match *shape {
        [rows, cols] => (vec![], [rows, cols]),
        [matrices, rows, cols] => (vec![matrices], [rows, cols]),
        _ => unreachable!(),
    };
    let count = |shape: &[usize]| shape.iter().product::<usize>();
    let full = |shape: &[usize]| [&stack[..], shape].concat();
    let named = |part: &str| format!("{base}{sep}{part}");
    let mut int4 = |names: [&str; 3], codes: [usize; 2], scales: [usize; 2], zeros: Option<[usize; 2]>| {
        let dtype = if names[0] == "qweight" { F16 } else { BF16 };
        let mut list = vec![
            (named(names[0]), I32, codes.to_vec(), draw.bytes(4 * count(&codes))),
            (named(names[1]), dtype, scales.to_vec(), draw.floats(dtype, count(&scales))),
        ];
        list.extend(zeros.map(|z| (named(names[2]), I32, z.to_vec(), draw.bytes(4 * count(&z)))));
        list
    };
    let groups = |group: usize| cols.div_ceil(group.min(cols));
    match format {
        Format::Bf16 => vec![(name.into(), BF16, shape.to_vec(), draw.floats(BF16, count(shape)))],
        Format::Fp8(_) | Format::Fp8Rows | Format::Fp8Whole => {
            let (dtype, grid) = match format {
                Format::Fp8(block) => (BF16, full(&[rows.div_ceil(block[0]), cols.div_ceil(block[1])])),
                Format::Fp8Rows => (F32, full(&[rows, 1])),
                _ => (F32, full(&[1])),
            };
            let scale = if sep == "_" { format!("{base}_scale_inv") } else { named("weight_scale_inv") };
            vec![
                (name.into(), F8_E4M3, shape.to_vec(), draw.e4m3(count(shape), true)),
                (scale, dtype, grid.clone(), draw.floats(dtype, count(&grid))),
            ]
        }
        Format::Gptq(group) => {
            let names = ["qweight", "scales", "qzeros"];
            int4(names, [cols / 8, rows], [groups(group), rows], Some([groups(group), rows / 8]))
        }
        Format::Awq(group) => {
            let names = ["qweight", "scales", "qzeros"];
            int4(names, [cols, rows / 8], [groups(group), rows], Some([groups(group), rows / 8]))
        }
        Format::Packed(group) | Format::PackedZeros(group) => {
            let names = ["weight_packed", "weight_scale", "weight_zero_point"];
            let zeros = matches!(format, Format::PackedZeros(_)).then(|| [rows.div_ceil(8), groups(group)]);
            let mut list = int4(names, [rows, cols.div_ceil(8)], [rows, groups(group)], zeros);
            let shape = [rows as i64, cols as i64].into_iter().flat_map(i64::to_le_bytes).collect();
            list.push((named("weight_shape"), I64, vec![2], shape));
            list
        }
        Format::ModeloptFp4 | Format::PackedFp4 => {
            let [codes, global] = match format {
                Format::ModeloptFp4 => ["weight", "weight_scale_2"],
                _ => ["weight_packed", "weight_global_scale"],
            };
            vec![
                (named(codes), U8, vec![rows, cols / 2], draw.bytes(rows * cols / 2)),
                (named("weight_scale"), F8_E4M3, vec![rows, cols / 16], draw.e4m3(rows * cols / 16, false)),
                (named(global), F32, vec![1], 0.75f32.to_le_bytes().to_vec()),
            ]
        }
    }
}

/// Whether files have a matrix quantised.
pub fn is_quantised(name: &str) -> bool {
    let name = name.strip_suffix(".weight").unwrap_or(name);
    name.ends_with("_proj") || name.ends_with("in_proj_qkv") || name.ends_with("in_proj_z")
}

/// The sizes of a model of two layers, one of each mixer.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub hidden: usize,
    pub vocab: usize,
    pub num_k_heads: usize,
    pub per_k_head: usize,
    pub k_dim: usize,
    pub v_dim: usize,
    pub num_q_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// Of a dense block; of experts and of the shared one.
    pub width: usize,
    pub num_experts: Option<usize>,
}

/// Its configuration, in a format.
pub fn config(sizes: &Sizes, format: Format) -> ModelConfig {
    let mut text = json!({
        "model_type": if sizes.num_experts.is_some() { "qwen3_5_moe_text" } else { "qwen3_5_text" },
        "vocab_size": sizes.vocab, "hidden_size": sizes.hidden, "num_hidden_layers": 2,
        "full_attention_interval": 2, "num_attention_heads": sizes.num_q_heads,
        "num_key_value_heads": sizes.num_kv_heads, "head_dim": sizes.head_dim,
        "linear_num_key_heads": sizes.num_k_heads,
        "linear_num_value_heads": sizes.num_k_heads * sizes.per_k_head,
        "linear_key_head_dim": sizes.k_dim, "linear_value_head_dim": sizes.v_dim,
        "intermediate_size": sizes.width, "mtp_num_hidden_layers": 1, "tie_word_embeddings": false,
    });
    if let Some(num_experts) = sizes.num_experts {
        text["num_experts"] = json!(num_experts);
        text["num_experts_per_tok"] = json!(2);
        text["moe_intermediate_size"] = json!(sizes.width);
        text["shared_expert_intermediate_size"] = json!(sizes.width);
    }
    if let Some(quantization) = format.config() {
        text["quantization_config"] = quantization;
    }
    ModelConfig::from_value(&text).unwrap()
}

/// A model in a file, its experts stacked or one by one.
pub struct Made {
    pub tensors: ModelTensors,
    pub mtp: MtpTensors,
    pub config: ModelConfig,
    _dir: tempfile::TempDir,
}

pub fn model(sizes: &Sizes, format: Format, fused: bool, seed: u64) -> Made {
    let config = config(sizes, format);
    let mut draw = Draw::new(seed);
    // Names and shapes, of which it has every one.
    let random = Checkpoint::random();
    let places = ModelTensors::resolve(&random, &config).unwrap();
    let mtp = MtpTensors::resolve(&random, &config).unwrap();
    let (mut header, mut data) = (Map::new(), Vec::new());
    let mut add = |name: &str, shape: &[usize]| {
        let format = if is_quantised(name) { format } else { Format::Bf16 };
        let list = match shape.len() {
            2 => parts(name, shape, format, &mut draw),
            3 if !name.ends_with("conv1d.weight") => parts(name, shape, format, &mut draw),
            _ => {
                let len = shape.iter().product();
                vec![(name.to_string(), DType::F32, shape.to_vec(), draw.floats(DType::F32, len))]
            }
        };
        for (name, dtype, shape, bytes) in list {
            let start = data.len();
            data.extend(bytes);
            let entry = json!({"dtype": dtype.name(), "shape": shape, "data_offsets": [start, data.len()]});
            header.insert(name, entry);
        }
    };
    for Tensor { name, shape, .. } in places.tensors().chain(mtp.tensors()) {
        match (name.rsplit_once(".experts."), &shape[..]) {
            (Some((base, "gate_up_proj")), &[num, both, cols]) if !fused => (0..num).for_each(|e| {
                let mut one =
                    |part: &str| add(&format!("{base}.experts.{e}.{part}.weight"), &[both / 2, cols]);
                one("gate_proj");
                one("up_proj");
            }),
            (Some((base, "down_proj")), &[num, rows, cols]) if !fused => {
                (0..num).for_each(|e| add(&format!("{base}.experts.{e}.down_proj.weight"), &[rows, cols]))
            }
            _ => add(name, shape),
        }
    }
    let dir = dir(&[("model.safetensors", file(&Value::Object(header).to_string(), &data))]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let tensors = ModelTensors::resolve(&checkpoint, &config).unwrap();
    let mtp = MtpTensors::resolve(&checkpoint, &config).unwrap();
    Made { tensors, mtp, config, _dir: dir }
}
