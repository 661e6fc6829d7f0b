//! What the command line and the tokenizer need besides: chat templates, plans and inspections. Structures
//! cross as JSON text.

use std::path::{Path, PathBuf};

use pyo3::prelude::*;
use serde::Serialize;
use serde_json::{Map, Value};

use super::{enter, to_py};
use crate::config::ModelConfig;
#[cfg(feature = "cuda")]
use crate::config::Shard;
#[cfg(feature = "cuda")]
use crate::engine::EngineLimits;
use crate::gguf;
use crate::inspect::inspect;
use crate::plan::{self, Part, PlanOptions, Scheme};
use crate::quantize::{Calibration, quantize};
use crate::tokenizer::chat::ChatTemplate;
#[cfg(feature = "cuda")]
use crate::weights::Checkpoint;
use crate::weights::Depth;
use crate::weights::quant::Quantization;
use crate::{Error, Result, files};

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyChatTemplate>()?;
    m.add_function(wrap_pyfunction!(inspect_checkpoint, m)?)?;
    m.add_function(wrap_pyfunction!(find_tokenizer, m)?)?;
    m.add_function(wrap_pyfunction!(quantize_checkpoint, m)?)?;
    m.add_function(wrap_pyfunction!(plan_model, m)?)?;
    m.add_function(wrap_pyfunction!(plan_memory, m)?)
}

fn parse(field: &str, text: &str) -> Result<Value> {
    serde_json::from_str(text).map_err(|e| Error::request(field, e, "values that JSON can hold"))
}

pub(super) fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::Internal(e.to_string()))
}

/// What a model is quantised to at load, by its name.
pub(super) fn parse_quantization(name: Option<&str>) -> Result<Option<Quantization>> {
    name.map(|name| Quantization::parse(name, Quantization::GROUP)).transpose()
}

/// A compiled chat template.
#[pyclass(name = "ChatTemplate", module = "qwen35rs._core", frozen)]
struct PyChatTemplate {
    inner: ChatTemplate,
}

#[pymethods]
impl PyChatTemplate {
    /// The template of a checkpoint directory, or the family's own where it has none.
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Ok(Self { inner: enter(py, || ChatTemplate::from_dir(&path))? })
    }

    /// Compiles a template's text.
    #[staticmethod]
    fn from_source(py: Python<'_>, source: &str) -> PyResult<Self> {
        Ok(Self { inner: enter(py, || ChatTemplate::from_str(source))? })
    }

    /// The template's text.
    #[getter]
    fn source(&self) -> &str {
        self.inner.source()
    }

    /// Renders a conversation; messages, tools and further variables are JSON text.
    fn render(
        &self,
        py: Python<'_>,
        messages: &str,
        tools: Option<&str>,
        add_generation_prompt: bool,
        kwargs: &str,
    ) -> PyResult<String> {
        enter(py, || {
            let messages = parse("messages", messages)?;
            let tools = tools.map(|t| parse("tools", t)).transpose()?;
            let kwargs = match parse("chat template variables", kwargs)? {
                Value::Object(map) => map,
                _ => Map::new(),
            };
            self.inner.render(&messages, tools.as_ref(), add_generation_prompt, &kwargs)
        })
    }
}

/// Where the tokenizer of a checkpoint is, for `Tokenizer.from_directory`; None where it has none.
#[pyfunction]
fn find_tokenizer(py: Python<'_>, path: PathBuf) -> PyResult<Option<PathBuf>> {
    enter(py, || crate::tokenizer::find_tokenizer(&path))
}

/// JSON description of a checkpoint directory, or of a GGUF file. `full` reads every byte for the fingerprint.
#[pyfunction]
fn inspect_checkpoint(py: Python<'_>, path: PathBuf, full: bool) -> PyResult<String> {
    let depth = if full { Depth::Full } else { Depth::Quick };
    enter(py, || json(&inspect(&path, depth)?))
}

/// Quantises a checkpoint directory to another one; JSON of what was done. `progress(done, total)`, in bytes, is called
/// as tensors are written, and may raise; Ctrl-C ends it too, and nothing is left. With files of text to `calibrate`,
/// 4-bit integers by GPTQ.
#[pyfunction]
#[pyo3(signature = (path, out, *, scheme, group_size, progress, calibrate=Vec::new(), calibration_length=None,
    calibration_tokens=None))]
#[allow(clippy::too_many_arguments)]
fn quantize_checkpoint(
    py: Python<'_>,
    path: PathBuf,
    out: PathBuf,
    scheme: &str,
    group_size: usize,
    progress: Option<Py<PyAny>>,
    calibrate: Vec<PathBuf>,
    calibration_length: Option<usize>,
    calibration_tokens: Option<usize>,
) -> PyResult<String> {
    let report = |done: u64, total: u64| {
        Python::attach(|py| {
            py.check_signals()?;
            progress.as_ref().map_or(Ok(()), |progress| progress.call1(py, (done, total)).map(drop))
        })
        .map_err(|_| Error::Interrupted)
    };
    enter(py, || {
        let quantization = Quantization::parse(scheme, group_size)?;
        let calibration = if calibrate.is_empty() {
            let given =
                [("calibration_length", calibration_length), ("calibration_tokens", calibration_tokens)];
            if let Some((field, Some(n))) = given.into_iter().find(|(_, n)| n.is_some()) {
                return Err(Error::request(field, format!("{n}, and no text"), "with calibrate alone"));
            }
            None
        } else {
            let length = calibration_length.unwrap_or(Calibration::LENGTH);
            Some(Calibration { files: calibrate, length, tokens: calibration_tokens })
        };
        json(&quantize(&path, &out, quantization, calibration.as_ref(), report)?)
    })
}

#[derive(Serialize)]
struct ModelPlan {
    config: ModelConfig,
    /// Whether its weights are loaded as they are stored: those of a quantised checkpoint, or of GGUF.
    stored: bool,
    /// Of each card that was named: which it is, and others that the name may mean.
    cards: Vec<NamedCard>,
    #[serde(flatten)]
    plan: plan::Plan,
}

#[derive(Serialize)]
struct NamedCard {
    named: String,
    card: String,
    others: Vec<&'static str>,
}

/// A dry run that does not fit.
#[cfg(feature = "cuda")]
#[derive(Serialize)]
struct TooLarge {
    error: String,
    #[serde(flatten)]
    needed: plan::Held,
}

/// The configuration of a directory, of a GGUF file, of a `config.json`, or of a size of the family by its name.
pub(super) fn model_config(model: &Path) -> Result<ModelConfig> {
    if model.is_dir() || model.is_file() && gguf::find(model)?.is_some() {
        ModelConfig::from_dir(model)
    } else if model.is_file() {
        ModelConfig::from_json(&files::read_text(model, files::SETTINGS)?, model)
    } else {
        plan::family_config(&model.to_string_lossy()).map_err(|error| match error {
            Error::Request { field, found, allowed } => {
                let paths = "the path of a checkpoint's directory, of a config.json or of a GGUF file";
                Error::Request { field, found, allowed: format!("{allowed}, or {paths}") }
            }
            error => error,
        })
    }
}

/// Whether the weights of a model are loaded as they are stored, and not all in bf16.
fn is_stored(model: &Path, config: &ModelConfig) -> Result<bool> {
    Ok(config.quantization.is_some() || model.exists() && gguf::find(model)?.is_some())
}

/// JSON plan of a model, named by a family name or by the path of a checkpoint or of a `config.json`. With `num_seqs`, a layout
/// is chosen for each card and number of cards, for so many requests at once.
#[pyfunction]
#[pyo3(signature = (model, *, gpus, cards, schemes, context, fp8_kv, f16_state, with_vision, with_mtp, num_seqs=None, max_model_len=None, all_reduce_us=None))]
#[allow(clippy::too_many_arguments)]
fn plan_model(
    py: Python<'_>,
    model: PathBuf,
    gpus: Vec<String>,
    cards: Vec<usize>,
    schemes: Vec<String>,
    context: usize,
    fp8_kv: bool,
    f16_state: bool,
    with_vision: bool,
    with_mtp: bool,
    num_seqs: Option<usize>,
    max_model_len: Option<usize>,
    all_reduce_us: Option<f64>,
) -> PyResult<String> {
    let make = || {
        let config = model_config(&model)?;
        let named: Vec<_> = gpus.iter().map(|name| Ok((name, plan::gpu(name)?))).collect::<Result<_>>()?;
        let gpus = match named.is_empty() {
            true => plan::GPUS.to_vec(),
            false => named.iter().map(|(_, (gpu, _))| gpu.clone()).collect(),
        };
        let card = |(name, (gpu, others)): (&String, (plan::Gpu, _))| NamedCard {
            named: name.clone(),
            card: gpu.name.into_owned(),
            others,
        };
        let named = named.into_iter().map(card).collect();
        let schemes: Vec<_> = schemes.iter().map(|name| Scheme::from_name(name)).collect::<Result<_>>()?;
        let weights = |scheme: Scheme, part: &Part| match scheme {
            Scheme::Stored => {
                let path = model.as_path();
                let is_gguf = path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
                if !path.is_dir() && !is_gguf {
                    let found = format!("stored, of {}", model.display());
                    return Err(Error::request("scheme", found, "that of a checkpoint with its weights"));
                }
                plan::stored(path, &config, part).map(Some)
            }
            scheme => Ok(part.weights(scheme)),
        };
        let options = PlanOptions {
            context,
            fp8_kv,
            f16_state,
            with_vision,
            with_mtp,
            num_seqs,
            max_model_len,
            all_reduce_us,
            ..PlanOptions::default()
        };
        let plan = plan::plan(&config, &gpus, &cards, &schemes, &weights, &options)?;
        let stored = is_stored(&model, &config)?;
        json(&ModelPlan { config, stored, cards: named, plan })
    };
    py.detach(make).map_err(to_py)
}

/// JSON of what this version would hold of a model on each of so many cards of so much memory, and leave for keys and values;
/// or what is wrong and what they would have to hold at least; None where it was built without CUDA. The model is named as for
/// [`plan_model`].
#[pyfunction]
#[pyo3(signature = (model, *, gpu, quantization, mtp, fp8_kv, f16_state, max_model_len, max_num_seqs, max_num_batched_tokens, gpu_memory_utilization, tensor_parallel_size=1, expert_parallel=false))]
#[allow(clippy::too_many_arguments, unused_variables)]
fn plan_memory(
    py: Python<'_>,
    model: PathBuf,
    gpu: &str,
    quantization: Option<&str>,
    mtp: bool,
    fp8_kv: bool,
    f16_state: bool,
    max_model_len: Option<usize>,
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
    gpu_memory_utilization: f64,
    tensor_parallel_size: usize,
    expert_parallel: bool,
) -> PyResult<Option<String>> {
    #[cfg(feature = "cuda")]
    return py
        .detach(|| {
            let config = model_config(&model)?;
            let checkpoint = match is_stored(&model, &config)? {
                true => Checkpoint::open(&model)?,
                false => Checkpoint::random(),
            };
            let limits = EngineLimits {
                max_model_len,
                max_num_seqs,
                max_num_batched_tokens,
                gpu_memory_utilization,
                ..EngineLimits::default()
            };
            let run = plan::DryRun {
                quantization: parse_quantization(quantization)?,
                mtp,
                caches: PlanOptions { fp8_kv, f16_state, ..PlanOptions::default() }.caches(),
                limits,
                shard: Shard::first(tensor_parallel_size, expert_parallel)?,
                card_bytes: (plan::gpu(gpu)?.0.memory_gib * f64::from(1 << 30)) as usize,
            };
            match run.clone().held(&config, &checkpoint) {
                Err(Error::OutOfMemory { what, advice }) => {
                    let needed = run.needed(&config, &checkpoint)?;
                    json(&TooLarge { error: format!("{what}; {advice}"), needed }).map(Some)
                }
                held => json(&held?).map(Some),
            }
        })
        .map_err(to_py);
    #[cfg(not(feature = "cuda"))]
    Ok(None)
}
