//! The eight sizes of the family, as configurations without a file.

use serde_json::{Value, json};

use crate::config::ModelConfig;
use crate::{Error, Result};

/// Names of the sizes.
pub const FAMILY: [&str; 8] = [
    "Qwen3.5-0.8B",
    "Qwen3.5-2B",
    "Qwen3.5-4B",
    "Qwen3.5-9B",
    "Qwen3.5-27B",
    "Qwen3.5-35B-A3B",
    "Qwen3.5-122B-A10B",
    "Qwen3.5-397B-A17B",
];

/// What differs between the sizes.
struct Size {
    hidden: usize,
    layers: usize,
    q_heads: usize,
    kv_heads: usize,
    v_heads: usize,
    ffn: Ffn,
    tied: bool,
    /// Depth, width, heads and feed-forward width of the vision tower.
    vision: [usize; 4],
}

enum Ffn {
    Dense(usize),
    /// Experts, top-k, and the width of routed and shared experts.
    Moe(usize, usize, usize),
}

const LARGE_VISION: [usize; 4] = [27, 1152, 16, 4304];

#[rustfmt::skip]
const SIZES: [Size; 8] = [
    Size { hidden: 1024, layers: 24, q_heads:  8, kv_heads: 2, v_heads: 16, ffn: Ffn::Dense(3584),        tied: true,  vision: [12, 768, 12, 3072] },
    Size { hidden: 2048, layers: 24, q_heads:  8, kv_heads: 2, v_heads: 16, ffn: Ffn::Dense(6144),        tied: true,  vision: [24, 1024, 16, 4096] },
    Size { hidden: 2560, layers: 32, q_heads: 16, kv_heads: 4, v_heads: 32, ffn: Ffn::Dense(9216),        tied: true,  vision: [24, 1024, 16, 4096] },
    Size { hidden: 4096, layers: 32, q_heads: 16, kv_heads: 4, v_heads: 32, ffn: Ffn::Dense(12288),       tied: false, vision: LARGE_VISION },
    Size { hidden: 5120, layers: 64, q_heads: 24, kv_heads: 4, v_heads: 48, ffn: Ffn::Dense(17408),       tied: false, vision: LARGE_VISION },
    Size { hidden: 2048, layers: 40, q_heads: 16, kv_heads: 2, v_heads: 32, ffn: Ffn::Moe(256, 8, 512),   tied: false, vision: LARGE_VISION },
    Size { hidden: 3072, layers: 48, q_heads: 32, kv_heads: 2, v_heads: 64, ffn: Ffn::Moe(256, 8, 1024),  tied: false, vision: LARGE_VISION },
    Size { hidden: 4096, layers: 60, q_heads: 32, kv_heads: 2, v_heads: 64, ffn: Ffn::Moe(512, 10, 1024), tied: false, vision: LARGE_VISION },
];

/// The configuration of a size of the family: `Qwen3.5-122B-A10B`, `Qwen/Qwen3.5-122B-A10B`, `122b-a10b`
/// or `122b`, in any case.
///
/// # Errors
/// `Request` with the list of names.
pub fn family_config(name: &str) -> Result<ModelConfig> {
    let wanted = name.trim().to_ascii_lowercase();
    let wanted = wanted.strip_prefix("qwen/").unwrap_or(&wanted);
    let wanted = wanted.strip_prefix("qwen3.5-").unwrap_or(wanted);
    let known = |full: &str| {
        let short = full["Qwen3.5-".len()..].to_ascii_lowercase();
        short == wanted || short.split('-').next() == Some(wanted)
    };
    match FAMILY.iter().position(|full| known(full)) {
        Some(i) => ModelConfig::from_value(&config_json(&SIZES[i])),
        None => {
            let found = if wanted.is_empty() { "an empty name" } else { name };
            Err(Error::request("model", found, FAMILY.join(", ")))
        }
    }
}

/// The parts of a release's `config.json` that this crate reads.
fn config_json(size: &Size) -> Value {
    let mut text = json!({
        "vocab_size": 248_320,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "full_attention_interval": 4,
        "num_attention_heads": size.q_heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": size.v_heads,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262_144,
        "mtp_num_hidden_layers": 1,
        "eos_token_id": 248_044,
        "dtype": "bfloat16",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
            "mrope_interleaved": true,
        },
    });
    let model_type = match size.ffn {
        Ffn::Dense(width) => {
            text["intermediate_size"] = json!(width);
            "qwen3_5"
        }
        Ffn::Moe(num_experts, top_k, width) => {
            text["num_experts"] = json!(num_experts);
            text["num_experts_per_tok"] = json!(top_k);
            text["moe_intermediate_size"] = json!(width);
            text["shared_expert_intermediate_size"] = json!(width);
            "qwen3_5_moe"
        }
    };
    let [depth, hidden, num_heads, width] = size.vision;
    json!({
        "model_type": model_type,
        "tie_word_embeddings": size.tied,
        "text_config": text,
        "vision_config": {
            "depth": depth,
            "hidden_size": hidden,
            "num_heads": num_heads,
            "intermediate_size": width,
            "out_hidden_size": size.hidden,
        },
    })
}
