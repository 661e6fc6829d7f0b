//! The rules of `config.json`: which keys are read, their defaults, and what is refused.

use serde_json::Value;

use super::fields::{Fields, show};
use super::quant::quant_config;
use super::rope::rope_config;
use super::{AttentionConfig, DeltaConfig, FfnConfig, LayerKind, ModelConfig, RopeConfig, VisionConfig};
use crate::{Error, Result};

// Limits of single sizes. Their products, over all layers and experts and in bytes, fit a u64.
const MAX_HIDDEN: u64 = 1 << 17;
const MAX_WIDTH: u64 = 1 << 18;
const MAX_VOCAB: u64 = 1 << 24;
const MAX_LAYERS: u64 = 1 << 10;
const MAX_HEADS: u64 = 1 << 10;
const MAX_HEAD_DIM: u64 = 1 << 10;
const MAX_EXPERTS: u64 = 1 << 14;
/// Positions are 32-bit.
pub(super) const MAX_POSITION: u64 = (1 << 31) - 1;

const MODEL_TYPES: &str = "qwen3_5, qwen3_5_moe, qwen3_5_text, qwen3_5_moe_text";

/// What differs between the two classes of the reference.
struct Family {
    model_type: &'static str,
    architectures: [&'static str; 2],
    hidden: usize,
    layers: usize,
    kv_heads: usize,
}

const DENSE: Family = Family {
    model_type: "qwen3_5",
    architectures: ["Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"],
    hidden: 4096,
    layers: 32,
    kv_heads: 4,
};
const MOE: Family = Family {
    model_type: "qwen3_5_moe",
    architectures: ["Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"],
    hidden: 2048,
    layers: 40,
    kv_heads: 2,
};

pub(super) fn model_config(value: &Value) -> Result<ModelConfig> {
    let top = Fields::new("", value)?;
    let (family, text) = family(&top)?;
    let moe = family.model_type == MOE.model_type;
    refuse_what_cannot_run(&top, &text, family)?;

    let hidden = text.size("hidden_size", family.hidden, MAX_HIDDEN)?;
    let layers = layers(&text, family.layers)?;
    let attention = attention(&text, family.kv_heads)?;
    let max_position = text.size("max_position_embeddings", 32_768, MAX_POSITION)?;
    let rope: RopeConfig = rope_config(&text, attention.head_dim, max_position)?;
    let vision = top.object("vision_config")?.map(|fields| vision(&fields)).transpose()?;
    Ok(ModelConfig {
        model_type: family.model_type.to_string(),
        hidden,
        vocab: text.size("vocab_size", 248_320, MAX_VOCAB)?,
        layers,
        attention,
        delta: delta(&text)?,
        ffn: ffn(&text, moe)?,
        rms_eps: rms_eps(&text)?,
        rope,
        max_position,
        tied_embeddings: tied(&top, &text)?,
        has_vision: vision.is_some(),
        num_mtp_layers: mtp_layers(&text)?,
        vision,
        dtype: dtype(&top, &text)?,
        quantization: quant_config(&top, &text)?,
        eos_token_ids: text.token_ids("eos_token_id")?.or(top.token_ids("eos_token_id")?).unwrap_or_default(),
    })
}

/// Dense or experts, and the object that holds the text model's sizes.
fn family<'a>(top: &Fields<'a>) -> Result<(&'static Family, Fields<'a>)> {
    let of = |fields: &Fields, allowed: &str| -> Result<Option<(&'static Family, bool)>> {
        match fields.str("model_type")? {
            None => Ok(None),
            Some("qwen3_5") => Ok(Some((&DENSE, false))),
            Some("qwen3_5_moe") => Ok(Some((&MOE, false))),
            Some("qwen3_5_text") => Ok(Some((&DENSE, true))),
            Some("qwen3_5_moe_text") => Ok(Some((&MOE, true))),
            Some(_) => Err(fields.refuse("model_type", allowed)),
        }
    };
    let Some((family, is_text)) = of(top, MODEL_TYPES)? else {
        return Err(top.refuse("model_type", MODEL_TYPES));
    };
    let nested = top.object("text_config")?;
    match nested {
        Some(_) if is_text => {
            Err(Error::config("text_config", "an object", "nothing inside a configuration of a text model"))
        }
        Some(text) => {
            let allowed = format!("{0}_text", family.model_type);
            if let Some((inner, _)) = of(&text, &allowed)?
                && inner.model_type != family.model_type
            {
                return Err(text.refuse("model_type", allowed));
            }
            Ok((family, text))
        }
        // The reference would take every size from its class defaults here.
        None if !is_text && top.get("hidden_size").is_none() => {
            Err(top.refuse("text_config", "an object with the text model's sizes"))
        }
        None => Ok((family, top.clone())),
    }
}

/// Refuses the values that would change the result and that no code here obeys.
fn refuse_what_cannot_run(top: &Fields, text: &Fields, family: &Family) -> Result<()> {
    for fields in [top, text] {
        if let Some(value) = fields.get("architectures") {
            let known = |v: &Value| v.as_str().is_some_and(|name| family.architectures.contains(&name));
            if !value.as_array().is_some_and(|list| list.iter().all(known)) {
                let allowed = format!("a list of {}", family.architectures.join(" or "));
                return Err(fields.refuse("architectures", allowed));
            }
        }
    }
    // Both names are the same function.
    text.only_str("hidden_act", &["silu", "swish"])?;
    text.only_bool("attention_bias", false)?;
    text.only_bool("mlp_bias", false)?;
    text.only_bool("attn_output_gate", true)?;
    text.only_bool("use_sliding_window", false)?;
    if text.bool("use_sliding_window")?.is_none() && text.get("sliding_window").is_some() {
        return Err(text.refuse("sliding_window", "nothing: every attention layer sees the whole context"));
    }
    // Keys of the ancestors of this family; their defaults are what it does.
    if let Some(value) = text.get("mlp_only_layers")
        && !value.as_array().is_some_and(Vec::is_empty)
    {
        return Err(text.refuse("mlp_only_layers", "an empty list: every layer has the same block"));
    }
    if text.integer("decoder_sparse_step", 0, u64::MAX)?.is_some_and(|n| n != 1) {
        return Err(text.refuse("decoder_sparse_step", "1: every layer has the same block"));
    }
    text.only_bool("norm_topk_prob", true)?;
    // The recurrence is computed and kept in f32.
    text.only_str("mamba_ssm_dtype", &["float32"])
}

fn layers(text: &Fields, default: usize) -> Result<Vec<LayerKind>> {
    let count = text.size("num_hidden_layers", default, MAX_LAYERS)?;
    let interval = text.integer("full_attention_interval", 1, MAX_LAYERS)?;
    let by_interval = |interval: usize| -> Vec<LayerKind> {
        let kind = |i: usize| {
            if (i + 1).is_multiple_of(interval) { LayerKind::Attention } else { LayerKind::DeltaNet }
        };
        (0..count).map(kind).collect()
    };
    let Some(value) = text.get("layer_types") else {
        return Ok(by_interval(interval.unwrap_or(4)));
    };
    let allowed = || text.refuse("layer_types", format!("{count} times linear_attention or full_attention"));
    let kind = |v: &Value| match v.as_str() {
        Some("linear_attention") => Some(LayerKind::DeltaNet),
        Some("full_attention") => Some(LayerKind::Attention),
        _ => None,
    };
    let list = value.as_array().filter(|list| list.len() == count).ok_or_else(allowed)?;
    let mut layers = Vec::with_capacity(count);
    for (i, item) in list.iter().enumerate() {
        let field = format!("{}[{i}]", text.name("layer_types"));
        let refused = || Error::config(field, show(item), "linear_attention, full_attention");
        layers.push(kind(item).ok_or_else(refused)?);
    }
    match interval {
        Some(interval) if by_interval(interval) != layers => {
            Err(text.refuse("full_attention_interval", "the interval that layer_types has, or nothing"))
        }
        _ => Ok(layers),
    }
}

fn attention(text: &Fields, default_kv_heads: usize) -> Result<AttentionConfig> {
    let num_q_heads = text.size("num_attention_heads", 16, MAX_HEADS)?;
    let num_kv_heads = text.size("num_key_value_heads", default_kv_heads, MAX_HEADS)?;
    let head_dim = text.size("head_dim", 256, MAX_HEAD_DIM)?;
    if num_q_heads % num_kv_heads != 0 {
        return Err(Error::config(
            text.name("num_key_value_heads"),
            num_kv_heads,
            format!("a divisor of num_attention_heads, {num_q_heads}"),
        ));
    }
    Ok(AttentionConfig { num_q_heads, num_kv_heads, head_dim })
}

fn delta(text: &Fields) -> Result<DeltaConfig> {
    let num_k_heads = text.size("linear_num_key_heads", 16, MAX_HEADS)?;
    let num_v_heads = text.size("linear_num_value_heads", 32, MAX_HEADS)?;
    if num_v_heads % num_k_heads != 0 {
        return Err(Error::config(
            text.name("linear_num_value_heads"),
            num_v_heads,
            format!("a multiple of linear_num_key_heads, {num_k_heads}"),
        ));
    }
    Ok(DeltaConfig {
        num_k_heads,
        num_v_heads,
        k_dim: text.size("linear_key_head_dim", 128, MAX_HEAD_DIM)?,
        v_dim: text.size("linear_value_head_dim", 128, MAX_HEAD_DIM)?,
        // One tap keeps no state; more than 8 is no short convolution.
        conv_kernel: text.integer("linear_conv_kernel_dim", 2, 8)?.unwrap_or(4),
    })
}

fn ffn(text: &Fields, moe: bool) -> Result<FfnConfig> {
    if !moe {
        if text.integer("num_experts", 0, u64::MAX)?.is_some_and(|n| n > 0) {
            return Err(text.refuse("num_experts", "nothing in a dense model; experts need qwen3_5_moe"));
        }
        return Ok(FfnConfig::Dense { width: text.size("intermediate_size", 12_288, MAX_WIDTH)? });
    }
    let num_experts = text.size("num_experts", 256, MAX_EXPERTS)?;
    let top_k = text.size("num_experts_per_tok", 8, MAX_EXPERTS)?;
    if top_k > num_experts {
        return Err(Error::config(
            text.name("num_experts_per_tok"),
            top_k,
            format!("at most num_experts, {num_experts}"),
        ));
    }
    Ok(FfnConfig::Moe {
        num_experts,
        top_k,
        expert_width: text.size("moe_intermediate_size", 512, MAX_WIDTH)?,
        shared_width: text.size("shared_expert_intermediate_size", 512, MAX_WIDTH)?,
    })
}

fn rms_eps(text: &Fields) -> Result<f32> {
    match text.number("rms_norm_eps")? {
        None => Ok(1e-6),
        Some(eps) if eps as f32 > 0.0 && eps <= 1.0 => Ok(eps as f32),
        Some(_) => Err(text.refuse("rms_norm_eps", "a number above 0 (in f32) and at most 1")),
    }
}

/// The flag beside `text_config` decides, as in the reference; the one inside counts when that is absent.
fn tied(top: &Fields, text: &Fields) -> Result<bool> {
    let inner = text.bool("tie_word_embeddings")?;
    Ok(top.bool("tie_word_embeddings")?.or(inner).unwrap_or(false))
}

fn mtp_layers(text: &Fields) -> Result<usize> {
    let layers = text.integer("mtp_num_hidden_layers", 0, 1)?.unwrap_or(0);
    if layers > 0 {
        text.only_bool("mtp_use_dedicated_embeddings", false)?;
    }
    Ok(layers)
}

fn dtype(top: &Fields, text: &Fields) -> Result<Option<String>> {
    let mut found = None;
    // `torch_dtype` is the older name.
    for fields in [text, top] {
        for key in ["torch_dtype", "dtype"] {
            fields.only_str(key, &["bfloat16", "float16", "float32"])?;
            found = fields.str(key)?.or(found);
        }
    }
    Ok(found.map(String::from))
}

fn vision(fields: &Fields) -> Result<VisionConfig> {
    let hidden = fields.size("hidden_size", 1152, MAX_HIDDEN)?;
    let num_heads = fields.size("num_heads", 16, MAX_HEADS)?;
    if hidden % num_heads != 0 {
        let allowed = format!("a divisor of hidden_size, {hidden}");
        return Err(Error::config(fields.name("num_heads"), num_heads, allowed));
    }
    Ok(VisionConfig {
        depth: fields.size("depth", 27, MAX_LAYERS)?,
        hidden,
        width: fields.size("intermediate_size", 4304, MAX_WIDTH)?,
        num_heads,
        in_channels: fields.size("in_channels", 3, 64)?,
        patch: square(fields, "patch_size", 16)?,
        temporal_patch: square(fields, "temporal_patch_size", 2)?,
        merge: fields.size("spatial_merge_size", 2, 64)?,
        out_hidden: fields.size("out_hidden_size", 3584, MAX_HIDDEN)?,
        num_positions: fields.size("num_position_embeddings", 2304, MAX_VOCAB)?,
    })
}

/// An integer, or a list that repeats one integer: the reference takes both for these two sizes.
fn square(fields: &Fields, key: &str, default: usize) -> Result<usize> {
    const MAX: u64 = 1 << 10;
    let Some(Value::Array(list)) = fields.get(key) else { return fields.size(key, default, MAX) };
    let first = list.first().and_then(Value::as_u64).filter(|n| (1..=MAX).contains(n));
    match first {
        Some(n) if list.iter().all(|v| v.as_u64() == Some(n)) => Ok(n as usize),
        _ => Err(fields.refuse(key, format!("an integer from 1 to {MAX}, or a list that repeats one"))),
    }
}
