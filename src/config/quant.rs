//! `quantization_config`: the formats that the large matrices of a checkpoint may have. Which matrix has which one is
//! up to its tensors (`src/weights/quant`), so lists of modules that were left out are not obeyed here.
//!
//! What concerns activations and the cache of keys and values is known and ignored on purpose: both are held as they
//! are computed, which is closer to the model than what the file's program does.

use serde::Serialize;
use serde_json::Value;

use super::fields::{Fields, show};
use crate::{Error, Result};

const METHODS: &str = "fp8, gptq, awq, compressed-tensors, modelopt, auto-round";
const MAX_GROUP: u64 = 1 << 18;
/// The block of the official files, and of the reference where a file gives none.
const BLOCK: [usize; 2] = [128, 128];

/// What `quantization_config` allows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct QuantConfig {
    /// The program whose layout of tensors is used.
    pub method: QuantMethod,
    /// 8-bit floats; absent where the configuration has none.
    pub fp8: Option<Fp8Rule>,
    /// 4-bit integers; absent where the configuration has none.
    pub int4: Option<Int4Rule>,
    /// Whether there may be 4-bit floats with a scale for 16 inputs of a row.
    pub nvfp4: bool,
}

/// How the tensors of a quantised matrix are named and laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum QuantMethod {
    /// `weight` and `weight_scale_inv` or `weight_scale`.
    Fp8,
    /// `qweight` `[in / 8, out]`, `qzeros`, `scales`, `g_idx`.
    Gptq,
    /// `qweight` `[in, out / 8]`, `qzeros`, `scales`.
    Awq,
    /// `weight_packed` and its companions, or `weight` and `weight_scale`.
    CompressedTensors,
    /// `weight`, `weight_scale`, `weight_scale_2`.
    Modelopt,
}

/// What 8-bit floats may share a scale.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fp8Rule {
    /// Blocks of `[rows, columns]`. A row or the whole matrix may always have one scale.
    pub blocks: Vec<[usize; 2]>,
}

/// What 4-bit integers may look like.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Int4Rule {
    /// Inputs of a row that share a scale; `None` for the whole row.
    pub groups: Vec<Option<usize>>,
    /// Whether every matrix must have zero points in the file.
    pub needs_zeros: bool,
    /// Whether zero points are stored minus one.
    pub zeros_minus_one: bool,
}

/// The rule of a configuration, where it has one.
///
/// # Errors
/// `Config` for whatever would change the numbers and is not known here.
pub(super) fn quant_config(top: &Fields, text: &Fields) -> Result<Option<QuantConfig>> {
    let mut found: Option<QuantConfig> = None;
    for fields in [top, text] {
        for key in ["quantization_config", "compression_config"] {
            let Some(object) = fields.object(key)? else { continue };
            let config = one(&object)?;
            if found.as_ref().is_some_and(|earlier| *earlier != config) {
                return Err(fields.refuse(key, "the same as in the other place of this file, or nothing"));
            }
            found = Some(config);
        }
    }
    Ok(found)
}

fn one(fields: &Fields) -> Result<QuantConfig> {
    match fields.str("quant_method")? {
        Some("fp8") => fp8(fields),
        Some("gptq") => gptq(fields),
        Some("awq") => awq(fields),
        Some("compressed-tensors") => compressed_tensors(fields),
        Some("modelopt" | "modelopt_fp4" | "modelopt_mixed") => modelopt(fields),
        Some("auto-round") => auto_round(fields),
        _ => Err(fields.refuse("quant_method", METHODS)),
    }
}

fn fp8(fields: &Fields) -> Result<QuantConfig> {
    fields.only_str("fmt", &["e4m3", "float8_e4m3fn"])?;
    fields.only_str("scale_fmt", &["float"])?;
    fields.only_str("expert_dtype", &["fp8"])?;
    // An explicit `null` says one scale a matrix; nothing at all, the reference's default.
    let blocks = match (fields.has_key("weight_block_size"), block(fields, "weight_block_size")?) {
        (_, Some(block)) => vec![block],
        (true, None) => vec![],
        (false, None) => vec![BLOCK],
    };
    let fp8 = Some(Fp8Rule { blocks });
    Ok(QuantConfig { method: QuantMethod::Fp8, fp8, int4: None, nvfp4: false })
}

/// `[rows, columns]`.
fn block(fields: &Fields, key: &str) -> Result<Option<[usize; 2]>> {
    let Some(value) = fields.get(key) else { return Ok(None) };
    let size = |v: &Value| v.as_u64().filter(|n| (1..=MAX_GROUP).contains(n)).map(|n| n as usize);
    let sizes: Option<Vec<usize>> = value.as_array().and_then(|list| list.iter().map(size).collect());
    match sizes.as_deref() {
        Some(&[rows, columns]) => Ok(Some([rows, columns])),
        _ => Err(fields.refuse(key, format!("two integers from 1 to {MAX_GROUP}"))),
    }
}

/// A group size: -1 is the whole row.
fn group(fields: &Fields, key: &str) -> Result<Option<Option<usize>>> {
    match fields.get(key) {
        None => Ok(None),
        Some(value) if value.as_i64() == Some(-1) => Ok(Some(None)),
        Some(value) => match value.as_u64().filter(|n| (1..=MAX_GROUP).contains(n)) {
            Some(n) => Ok(Some(Some(n as usize))),
            None => Err(fields.refuse(key, format!("-1, or an integer from 1 to {MAX_GROUP}"))),
        },
    }
}

/// One more size that groups may have: many modules have the same.
fn add_group(groups: &mut Vec<Option<usize>>, group: Option<Option<usize>>) {
    groups.extend(group.filter(|group| !groups.contains(group)));
}

fn only_bits(fields: &Fields, key: &str, required: bool) -> Result<()> {
    match fields.get(key) {
        Some(value) if value.as_u64() == Some(4) => Ok(()),
        None if !required => Ok(()),
        _ => Err(fields.refuse(key, "4")),
    }
}

const ROTATED: &str = "nothing: what it does to the weights is not known here";

fn gptq(fields: &Fields) -> Result<QuantConfig> {
    only_bits(fields, "bits", true)?;
    // With it, the rows of a matrix are grouped in an order of their own.
    fields.only_bool("desc_act", false)?;
    fields.only_bool("is_marlin_format", false)?;
    fields.only_str("pack_dtype", &["int32"])?;
    for key in ["rotation", "adapter"] {
        if fields.get(key).is_some() {
            return Err(fields.refuse(key, ROTATED));
        }
    }
    let mut minus_one = true;
    for key in ["checkpoint_format", "format"] {
        fields.only_str(key, &["gptq", "gptq_v2"])?;
        minus_one &= fields.str(key)? != Some("gptq_v2");
    }
    let mut groups = vec![group(fields, "group_size")?.unwrap_or(Some(128))];
    // Rules by module. Those that leave one out, `-:`, say what the tensors say again.
    if let Some(dynamic) = fields.object("dynamic")? {
        for pattern in dynamic.keys().filter(|pattern| !pattern.starts_with("-:")) {
            let Some(rule) = dynamic.object(pattern)? else { continue };
            only_bits(&rule, "bits", false)?;
            rule.only_bool("desc_act", false)?;
            add_group(&mut groups, group(&rule, "group_size")?);
        }
    }
    let int4 = Int4Rule { groups, needs_zeros: true, zeros_minus_one: minus_one };
    Ok(QuantConfig { method: QuantMethod::Gptq, fp8: None, int4: Some(int4), nvfp4: false })
}

fn awq(fields: &Fields) -> Result<QuantConfig> {
    only_bits(fields, "bits", fields.get("w_bit").is_none())?;
    only_bits(fields, "w_bit", false)?;
    fields.only_bool("zero_point", true)?;
    fields.only_str("version", &["gemm", "GEMM"])?;
    let sizes = [group(fields, "group_size")?, group(fields, "q_group_size")?];
    let groups = vec![sizes.into_iter().flatten().next().unwrap_or(Some(128))];
    let int4 = Int4Rule { groups, needs_zeros: true, zeros_minus_one: false };
    Ok(QuantConfig { method: QuantMethod::Awq, fp8: None, int4: Some(int4), nvfp4: false })
}

/// Writes the layouts of GPTQ or AWQ.
fn auto_round(fields: &Fields) -> Result<QuantConfig> {
    const PACKINGS: [&str; 2] = ["auto_round:auto_gptq", "auto_round:auto_awq"];
    only_bits(fields, "bits", true)?;
    for key in ["rotation_config", "spinquant_config", "hadamard_config", "transform_config"] {
        if fields.get(key).is_some() {
            return Err(fields.refuse(key, ROTATED));
        }
    }
    fields.only_str("data_type", &["int"])?;
    let method = match fields.str("packing_format")? {
        Some("auto_round:auto_gptq") => QuantMethod::Gptq,
        Some("auto_round:auto_awq") => QuantMethod::Awq,
        _ => return Err(fields.refuse("packing_format", PACKINGS.join(", "))),
    };
    let mut groups = vec![group(fields, "group_size")?.unwrap_or(Some(128))];
    // Modules with a rule of their own; 16 bits and more are modules that were left out.
    if let Some(extra) = fields.object("extra_config")? {
        for name in extra.keys() {
            let Some(rule) = extra.object(name)? else { continue };
            match rule.integer("bits", 1, 64)? {
                Some(16..) => {}
                None | Some(4) => add_group(&mut groups, group(&rule, "group_size")?),
                _ => return Err(rule.refuse("bits", "4, or 16 and more for a module that was left out")),
            }
        }
    }
    let zeros_minus_one = method == QuantMethod::Gptq;
    let int4 = Int4Rule { groups, needs_zeros: true, zeros_minus_one };
    Ok(QuantConfig { method, fp8: None, int4: Some(int4), nvfp4: false })
}

fn compressed_tensors(fields: &Fields) -> Result<QuantConfig> {
    const FORMATS: [&str; 5] =
        ["pack-quantized", "nvfp4-pack-quantized", "float-quantized", "naive-quantized", "mixed-precision"];
    fields.only_str("format", &FORMATS)?;
    if let Some(sparsity) = fields.object("sparsity_config")? {
        sparsity.only_str("format", &["dense"])?;
    }
    // Weights that are rotated need activations that are.
    if let Some(transform) = fields.object("transform_config")?
        && transform.object("config_groups")?.is_some_and(|groups| groups.keys().next().is_some())
    {
        return Err(fields.refuse("transform_config", "no transforms of weights or activations"));
    }
    let mut config =
        QuantConfig { method: QuantMethod::CompressedTensors, fp8: None, int4: None, nvfp4: false };
    let groups = fields.object("config_groups")?;
    let groups = groups.ok_or_else(|| fields.refuse("config_groups", "an object of groups of modules"))?;
    for name in groups.keys() {
        let Some(rule) = groups.object(name)? else { continue };
        rule.only_str("format", &FORMATS)?;
        let Some(weights) = rule.object("weights")? else { continue };
        match (weights.str("type")?.unwrap_or("int"), weights.get("num_bits").and_then(Value::as_u64)) {
            ("int", Some(4)) => packed_int4(&weights, &mut config)?,
            ("float", Some(8)) => {
                let rule = config.fp8.get_or_insert(Fp8Rule { blocks: vec![] });
                match strategy(&weights)? {
                    "tensor" | "channel" => {}
                    "block" => {
                        let size = block(&weights, "block_structure")?;
                        let missing = || weights.refuse("block_structure", "two integers");
                        rule.blocks.push(size.ok_or_else(missing)?);
                    }
                    _ => return Err(weights.refuse("strategy", "tensor, channel, block")),
                }
            }
            ("float", Some(4)) => {
                if strategy(&weights)? != "tensor_group" {
                    return Err(weights.refuse("strategy", "tensor_group"));
                }
                if weights.get("group_size").and_then(Value::as_u64) != Some(16) {
                    return Err(weights.refuse("group_size", "16"));
                }
                config.nvfp4 = true;
            }
            ("int", _) => return Err(weights.refuse("num_bits", "4 (of type int)")),
            ("float", _) => return Err(weights.refuse("num_bits", "4 or 8 (of type float)")),
            _ => return Err(weights.refuse("type", "int, float")),
        }
    }
    Ok(config)
}

fn strategy<'a>(weights: &Fields<'a>) -> Result<&'a str> {
    Ok(match (weights.str("strategy")?, group(weights, "group_size")?) {
        (Some(strategy), _) => strategy,
        // What a file means that leaves it out.
        (None, None) => "tensor",
        (None, Some(None)) => "channel",
        (None, Some(Some(_))) => "group",
    })
}

fn packed_int4(weights: &Fields, config: &mut QuantConfig) -> Result<()> {
    let size = match strategy(weights)? {
        "channel" => None,
        "group" => match group(weights, "group_size")? {
            Some(Some(size)) => Some(size),
            _ => return Err(weights.refuse("group_size", "an integer")),
        },
        _ => return Err(weights.refuse("strategy", "group, channel")),
    };
    // `weight` and `static` leave the order of the inputs as it is.
    match weights.get("actorder") {
        None | Some(Value::Bool(false)) => {}
        Some(Value::String(order)) if matches!(order.as_str(), "weight" | "static") => {}
        Some(_) => return Err(weights.refuse("actorder", "null, false, weight, static")),
    }
    let symmetric = weights.bool("symmetric")?.unwrap_or(true);
    let rule =
        config.int4.get_or_insert(Int4Rule { groups: vec![], needs_zeros: true, zeros_minus_one: false });
    add_group(&mut rule.groups, Some(size));
    rule.needs_zeros &= !symmetric;
    Ok(())
}

fn modelopt(fields: &Fields) -> Result<QuantConfig> {
    const KNOWN: &str = "FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, NVFP4, W4A16_NVFP4, W4A8_NVFP4_FP8";
    let mut config = QuantConfig { method: QuantMethod::Modelopt, fp8: None, int4: None, nvfp4: false };
    let mut add = |fields: &Fields| -> Result<()> {
        match fields.str("quant_algo")? {
            Some("FP8" | "FP8_PER_CHANNEL_PER_TOKEN" | "FP8_PB_WO") => {
                config.fp8 = Some(Fp8Rule { blocks: vec![BLOCK] });
            }
            Some("NVFP4" | "W4A16_NVFP4" | "W4A8_NVFP4_FP8") => {
                if fields.integer("group_size", 1, MAX_GROUP)?.is_some_and(|size| size != 16) {
                    return Err(fields.refuse("group_size", "16"));
                }
                config.nvfp4 = true;
            }
            _ => return Err(fields.refuse("quant_algo", format!("{KNOWN}, MIXED_PRECISION"))),
        }
        Ok(())
    };
    // A file of its own has it one level deeper.
    let nested = fields.object("quantization")?;
    let fields = nested.as_ref().unwrap_or(fields);
    if fields.str("quant_algo")? == Some("MIXED_PRECISION") {
        let layers = fields.object("quantized_layers")?;
        let layers =
            layers.ok_or_else(|| fields.refuse("quantized_layers", "an object from modules to formats"))?;
        for name in layers.keys() {
            match layers.object(name)? {
                Some(rule) => add(&rule)?,
                None => return Err(layers.refuse(name, "an object with quant_algo")),
            }
        }
    } else {
        add(fields)?;
    }
    Ok(config)
}

/// The configuration with what a file of its own beside it says, as some exports have it.
pub(super) fn with_file(value: &mut Value, quantization: Value, origin: &std::path::Path) -> Result<()> {
    let Value::Object(map) = value else { return Ok(()) };
    let Value::Object(mut inner) = quantization else {
        return Err(Error::file(origin, format!("found {}; allowed: an object", show(&quantization))));
    };
    inner.entry("quant_method").or_insert_with(|| "modelopt".into());
    map.insert("quantization_config".into(), Value::Object(inner));
    Ok(())
}

#[cfg(test)]
mod tests;
