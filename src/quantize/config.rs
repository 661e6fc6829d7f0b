//! `config.json` of a quantised checkpoint.

use std::collections::HashSet;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::matrix::Work;
use crate::weights::quant::{BLOCK, Quantization, Scheme};
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
    config["quantization_config"] = section(quantization, work);
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

/// What modules of one group of the file have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// With the inputs that share a scale; `None` for a row.
    Int4 {
        group: Option<usize>,
        symmetric: bool,
    },
    Fp8,
}

/// Modules that have one form as a rule, as patterns: routed experts, and every other projection. A name may begin with
/// anything.
const CLASSES: [&str; 4] = [
    r"re:.*mlp\.experts\..*(gate|up|down)_proj$",
    r"re:.*self_attn\.(q|k|v|o)_proj$",
    r"re:.*linear_attn\.(in_proj_qkv|in_proj_z|out_proj)$",
    r"re:.*mlp\.(shared_expert\.)?(gate|up|down)_proj$",
];

/// Which of the patterns a module's name fits.
fn class_of(module: &str) -> Option<usize> {
    let (parent, last) = module.rsplit_once('.')?;
    let ffn = ["gate_proj", "up_proj", "down_proj"].contains(&last);
    let ends = |end: &str| parent.ends_with(end);
    match last {
        _ if ffn && parent.contains("mlp.experts.") => Some(0),
        "q_proj" | "k_proj" | "v_proj" | "o_proj" if ends("self_attn") => Some(1),
        "in_proj_qkv" | "in_proj_z" | "out_proj" if ends("linear_attn") => Some(2),
        _ if ffn && (ends("mlp") || ends("mlp.shared_expert")) => Some(3),
        _ => None,
    }
}

/// The quantised modules and their forms.
fn forms_of(quantization: Quantization, work: &[Work]) -> Vec<(&str, Form)> {
    let several = |work: &Work| match work {
        Work::KeptInt4 { int4, .. } if int4.num_groups() > 1 => Some(int4.group),
        _ => None,
    };
    let sizes: HashSet<usize> = work.iter().filter_map(several).collect();
    let forms = work.iter().filter_map(|work| match work {
        Work::Copied(_) => None,
        Work::Matrix { module, scheme: Scheme::Int4 { .. }, .. } => {
            Some((module.as_str(), Form::Int4 { group: quantization.group(), symmetric: true }))
        }
        Work::KeptInt4 { module, int4, zeros } => {
            // A row that is one group is called a row, unless others have groups of its size.
            let group = sizes.get(&int4.group).copied();
            Some((module.as_str(), Form::Int4 { group, symmetric: !zeros }))
        }
        Work::Matrix { module, .. } | Work::Kept { module, .. } => Some((module.as_str(), Form::Fp8)),
    });
    forms.collect()
}

/// The forms of a file, and the modules that have each: as patterns, and by name where those of one pattern differ.
fn groups(quantization: Quantization, work: &[Work]) -> Vec<(Form, Vec<&str>)> {
    let int4 = Form::Int4 { group: quantization.group(), symmetric: true };
    let mut groups: Vec<(Form, Vec<&str>)> = vec![(int4, vec![]), (Form::Fp8, vec![])];
    let mut add = |form: Form, target| match groups.iter_mut().find(|(known, _)| *known == form) {
        Some((_, targets)) => targets.push(target),
        None => groups.push((form, vec![target])),
    };
    let modules = forms_of(quantization, work);
    for (class, &pattern) in CLASSES.iter().enumerate() {
        let own: Vec<_> = modules.iter().filter(|(module, _)| class_of(module) == Some(class)).collect();
        let only_experts = matches!(quantization, Quantization::Mixed { .. }) && class > 0;
        let usual = if only_experts { Form::Fp8 } else { int4 };
        match own.first().map_or(usual, |first| first.1) {
            form if own.iter().all(|(_, other)| *other == form) => add(form, pattern),
            _ => own.iter().for_each(|&&(module, form)| add(form, module)),
        }
    }
    modules
        .iter()
        .filter(|(module, _)| class_of(module).is_none())
        .for_each(|&(module, form)| add(form, module));
    groups.retain(|(_, targets)| !targets.is_empty());
    groups
}

fn group(form: Form, targets: &[&str]) -> Value {
    match form {
        Form::Int4 { group, symmetric } => json!({
            "targets": targets,
            "weights": {
                "num_bits": 4, "type": "int", "symmetric": symmetric,
                "strategy": if group.is_some() { "group" } else { "channel" }, "group_size": group,
                "dynamic": false
            },
            "input_activations": null, "output_activations": null, "format": "pack-quantized"
        }),
        Form::Fp8 => json!({
            "targets": targets,
            "weights": {
                "num_bits": 8, "type": "float", "symmetric": true, "strategy": "block",
                "block_structure": [BLOCK, BLOCK], "dynamic": false
            },
            "input_activations": {
                "num_bits": 8, "type": "float", "symmetric": true, "strategy": "group", "group_size": BLOCK,
                "dynamic": true
            },
            "output_activations": null, "format": "float-quantized"
        }),
    }
}

fn section(quantization: Quantization, work: &[Work]) -> Value {
    let ignore = plain_modules(work);
    let format = match quantization {
        Quantization::Fp8 => {
            return json!({
                "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
                "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": ignore
            });
        }
        Quantization::Int4 { .. } => "pack-quantized",
        Quantization::Mixed { .. } => "mixed-precision",
    };
    let mut groups = groups(quantization, work);
    if let [(_, targets)] = &mut groups[..] {
        *targets = vec!["Linear"];
    }
    let named = groups.iter().enumerate();
    let named = named.map(|(i, (form, targets))| (format!("group_{i}"), group(*form, targets)));
    json!({
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
        "config_groups": named.collect::<Map<_, _>>(), "ignore": ignore, "kv_cache_scheme": null
    })
}
