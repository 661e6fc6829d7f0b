//! `config.json` of a quantised checkpoint.

use std::path::Path;

use serde_json::{Value, json};

use super::matrix::Work;
use crate::weights::quant::{BLOCK, Quantization};
use crate::{Error, Result};

/// The configuration in `from`, with what it says of quantisation in place of what it said.
pub(super) fn quantised(from: &Path, quantization: Quantization, work: &[Work]) -> Result<Value> {
    let path = from.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let mut config: Value = serde_json::from_str(&text).map_err(|e| Error::file(&path, e.to_string()))?;
    let remove = |object: Option<&mut Value>| {
        if let Some(object) = object.and_then(Value::as_object_mut) {
            for key in ["quantization_config", "compression_config"] {
                object.shift_remove(key);
            }
        }
    };
    remove(config.get_mut("text_config"));
    remove(Some(&mut config));
    config["quantization_config"] = section(quantization, &plain_modules(work));
    Ok(config)
}

/// Modules with a matrix that stayed as it was.
fn plain_modules(work: &[Work]) -> Vec<&str> {
    let plain = work.iter().filter_map(|work| match work {
        Work::Copied(tensor) if tensor.shape.len() > 1 => tensor.name.strip_suffix(".weight"),
        _ => None,
    });
    plain.collect()
}

fn section(quantization: Quantization, ignore: &[&str]) -> Value {
    let int4 = |group: usize, targets: Value| {
        json!({
            "targets": targets,
            "weights": {
                "num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": group,
                "dynamic": false
            },
            "input_activations": null, "output_activations": null, "format": "pack-quantized"
        })
    };
    let whole = |format: &str, groups: Value| {
        json!({
            "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
            "config_groups": groups, "ignore": ignore, "kv_cache_scheme": null
        })
    };
    match quantization {
        Quantization::Fp8 => json!({
            "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
            "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": ignore
        }),
        Quantization::Int4 { group } => {
            whole("pack-quantized", json!({"group_0": int4(group, json!(["Linear"]))}))
        }
        Quantization::Mixed { group } => {
            // Routed experts, and every other projection. A name may begin with anything.
            let experts = json!([r"re:.*mlp\.experts\..*(gate|up|down)_proj$"]);
            let rest = json!([
                r"re:.*self_attn\.(q|k|v|o)_proj$",
                r"re:.*linear_attn\.(in_proj_qkv|in_proj_z|out_proj)$",
                r"re:.*mlp\.(shared_expert\.)?(gate|up|down)_proj$",
            ]);
            let fp8 = json!({
                "targets": rest,
                "weights": {
                    "num_bits": 8, "type": "float", "symmetric": true, "strategy": "block",
                    "block_structure": [BLOCK, BLOCK], "dynamic": false
                },
                "input_activations": {
                    "num_bits": 8, "type": "float", "symmetric": true, "strategy": "group", "group_size": BLOCK,
                    "dynamic": true
                },
                "output_activations": null, "format": "float-quantized"
            });
            whole("mixed-precision", json!({"group_0": int4(group, experts), "group_1": fp8}))
        }
    }
}
