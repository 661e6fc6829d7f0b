//! Which form a matrix has: its tensors decide, and `quantization_config` says which forms may be there. A part that is
//! missing, misshapen or of a wrong dtype is a problem with a name; a part that no form takes is left, and refused with
//! every other tensor that nobody takes.

use std::collections::HashSet;
use std::sync::Arc;

use super::int4::Layout;
use super::{Encoded, Fp8, Int4, Nvfp4, fp8};
use crate::config::{QuantConfig, QuantMethod};
use crate::weights::{Checkpoint, DType, Data, Tensor};

/// Dtypes of scales.
pub(super) const FLOATS: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

/// What is wrong with a tensor.
#[derive(Debug)]
pub(in crate::weights) struct Problem {
    /// The tensor's name.
    pub name: String,
    pub found: String,
    pub expected: String,
}

/// The tensors around one matrix.
pub(super) struct Module<'a> {
    checkpoint: &'a Checkpoint,
    /// What the names of its parts begin with, and what stands for `weight`.
    base: &'a str,
    stacked: bool,
    taken: Vec<String>,
}

impl Module<'_> {
    /// The name in the file of a part such as `weight_scale`.
    fn name(&self, part: &str) -> String {
        match (self.stacked, part.strip_prefix("weight")) {
            // Stacked experts are parameters of one module: `gate_up_proj`, `gate_up_proj_scale_inv`.
            (true, Some(rest)) => format!("{}{rest}", self.base),
            _ => format!("{}.{part}", self.base),
        }
    }

    /// Whether a part is there.
    pub fn has(&self, part: &str) -> bool {
        self.checkpoint.contains(&self.name(part))
    }

    /// A problem with a part.
    pub fn problem(&self, part: &str, found: impl Into<String>, expected: impl Into<String>) -> Problem {
        Problem { name: self.name(part), found: found.into(), expected: expected.into() }
    }

    /// Takes a part of one of these dtypes and shapes.
    pub fn part(&mut self, part: &str, dtypes: &[DType], shapes: &[Vec<usize>]) -> Result<Tensor, Problem> {
        let dtypes_text = || dtypes.iter().map(|dtype| dtype.name()).collect::<Vec<_>>().join(" or ");
        let shapes_text = || {
            let mut allowed: Vec<String> = shapes.iter().map(|shape| format!("{shape:?}")).collect();
            let mut seen = HashSet::new();
            allowed.retain(|shape| seen.insert(shape.clone()));
            format!("shape {}", allowed.join(" or "))
        };
        let name = self.name(part);
        let Some(tensor) = self.checkpoint.get(&name) else {
            return Err(self.problem(part, "nothing", format!("{} of {}", dtypes_text(), shapes_text())));
        };
        self.taken.push(name);
        if !dtypes.contains(&tensor.dtype) {
            return Err(self.problem(part, format!("dtype {}", tensor.dtype), dtypes_text()));
        }
        if !shapes.contains(&tensor.shape) {
            return Err(self.problem(part, format!("shape {:?}", tensor.shape), shapes_text()));
        }
        Ok(tensor)
    }
}

/// A matrix that was found, and the names of its parts.
pub(in crate::weights) type Found = (Tensor, Vec<String>);

/// The matrix that is called `name` in a checkpoint of plain floats, where it is encoded; `None` where it is plain, or
/// not there at all.
pub(in crate::weights) fn find(
    checkpoint: &Checkpoint,
    config: Option<&QuantConfig>,
    name: &str,
    shape: &[usize],
) -> Result<Option<Found>, Problem> {
    let (base, stacked, rows, cols) = match (shape, name.strip_suffix(".weight")) {
        (&[rows, cols], Some(base)) => (base, None, rows, cols),
        (&[matrices, rows, cols], None) => (name, Some(matrices), rows, cols),
        _ => return Ok(None),
    };
    let mut module = Module { checkpoint, base, stacked: stacked.is_some(), taken: Vec::new() };
    let mut forms = ["weight", "weight_packed", "qweight"].into_iter().filter(|form| module.has(form));
    let Some(form) = forms.next() else { return Ok(None) };
    if let Some(second) = forms.next() {
        let found = format!("it beside {}", module.name(form));
        return Err(module.problem(second, found, "one of the two"));
    }
    let Some(tensor) = checkpoint.get(&module.name(form)) else { return Ok(None) };
    if stacked.is_some() && form != "weight" {
        return Err(module.problem(form, "a stack of matrices", "a module of its own for each expert"));
    }
    let method = config.map(|config| config.method);
    let rules =
        config.map(|config| (&config.fp8, &config.int4, config.nvfp4)).unwrap_or((&None, &None, false));
    let encoded = match (form, tensor.dtype, method, rules) {
        ("weight", fp8::CODES, Some(method), (Some(rule), _, _)) => {
            let codes = module.part(form, &[fp8::CODES], &[shape.to_vec()])?;
            Encoded::Fp8(Fp8::new(&mut module, codes, stacked, [rows, cols], rule, method)?)
        }
        ("weight", DType::U8, Some(QuantMethod::Modelopt), (_, _, true)) if stacked.is_none() => {
            Encoded::Nvfp4(Nvfp4::new(&mut module, [rows, cols], false)?)
        }
        // A plain matrix; or of a dtype that the caller refuses.
        ("weight", dtype, ..) if dtype.is_loadable() => return Ok(None),
        ("weight_packed", DType::U8, Some(QuantMethod::CompressedTensors), (_, _, true)) => {
            Encoded::Nvfp4(Nvfp4::new(&mut module, [rows, cols], true)?)
        }
        ("weight_packed", DType::I32, Some(QuantMethod::CompressedTensors), (_, Some(rule), _)) => {
            Encoded::Int4(Int4::new(&mut module, [rows, cols], Layout::Packed, rule)?)
        }
        ("qweight", _, Some(QuantMethod::Gptq), (_, Some(rule), _)) => {
            let layout = Layout::Gptq { minus_one: rule.zeros_minus_one };
            Encoded::Int4(Int4::new(&mut module, [rows, cols], layout, rule)?)
        }
        ("qweight", _, Some(QuantMethod::Awq), (_, Some(rule), _)) => {
            Encoded::Int4(Int4::new(&mut module, [rows, cols], Layout::Awq, rule)?)
        }
        _ => return Err(module.problem(form, format!("dtype {}", tensor.dtype), allowed(config))),
    };
    let data = Data::Encoded(Arc::new(encoded));
    let tensor = Tensor { name: name.to_string(), dtype: DType::F32, shape: shape.to_vec(), data };
    Ok(Some((tensor, module.taken)))
}

/// What a matrix may be.
fn allowed(config: Option<&QuantConfig>) -> String {
    let Some(config) = config else {
        return "BF16, F16 or F32, as the configuration has no quantization_config".into();
    };
    let forms = [(config.fp8.is_some(), "fp8"), (config.int4.is_some(), "int4"), (config.nvfp4, "nvfp4")];
    let forms: Vec<_> = forms.into_iter().filter(|(is, _)| *is).map(|(_, form)| form).collect();
    let by = match config.method {
        QuantMethod::Fp8 => "fp8",
        QuantMethod::Gptq => "gptq",
        QuantMethod::Awq => "awq",
        QuantMethod::CompressedTensors => "compressed-tensors",
        QuantMethod::Modelopt => "modelopt",
    };
    format!("BF16, F16 or F32, or {} as {by} stores it (quantization_config)", forms.join(" or "))
}

/// Whether a tensor that no place takes says only how activations, or keys and values, may be rounded. `taken` are the
/// names of places.
pub(in crate::weights) fn is_ignored(name: &str, taken: &HashSet<String>) -> bool {
    let Some((base, part)) = name.rsplit_once('.') else { return false };
    let has = |rest: &str| taken.contains(&format!("{base}{rest}.weight"));
    match part {
        "input_scale" | "input_global_scale" | "activation_scale" => has(""),
        "k_scale" | "v_scale" | "q_scale" => {
            base.ends_with(".self_attn") && has(".k_proj") || base.contains(".self_attn.") && has("")
        }
        "output_scale" => (base.ends_with(".k_proj") || base.ends_with(".v_proj")) && has(""),
        _ => false,
    }
}
