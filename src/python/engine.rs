//! `_core.Engine` and `_core.Generation`: a loaded model, and requests under way. `qwen35rs.LLM` is the thin
//! class over them.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use numpy::{PyArray2, PyArrayMethods};
use pyo3::prelude::*;

use super::dlpack::{DeviceTensor, Element};
use super::load::{Load, Ranks, parse_dtype};
use super::tokenizer::{Ids, PyTokenizer};
use super::tools::{json, model_config, parse_quantization};
use super::{enter, to_py};
use crate::backend::cpu::Cpu;
use crate::backend::{Caches, Device};
use crate::config::{GenerationConfig, ModelConfig};
use crate::engine::{EngineLimits, StepOutput};
use crate::gguf;
use crate::machine::available_memory;
use crate::plan::{Part, Scheme};
use crate::ranks::Group;
use crate::request::{FinishReason, SamplingParams, Wanted};
use crate::service::{Event, Generation, Job, Service};
use crate::text::RequestText;
use crate::tokenizer::Tokenizer;
use crate::weights::quant::Quantization;
use crate::{Error, Result};

/// Most samples of one prompt.
const MAX_SAMPLES: i64 = 4096;

/// How long a wait is before Python may handle its signals.
const SIGNAL_POLL: Duration = Duration::from_millis(20);

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(check_sampling_params, m)?)?;
    m.add_function(wrap_pyfunction!(check_devices, m)?)?;
    m.add_class::<PyEngine>()?;
    m.add_class::<PyGeneration>()?;
    m.add_class::<PyDelta>()
}

/// The fields of `qwen35rs.SamplingParams`; `None` where the checkpoint's `generation_config.json` decides.
#[derive(FromPyObject)]
struct PySamplingParams {
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<i64>,
    min_p: Option<f64>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    repetition_penalty: Option<f64>,
    max_tokens: Option<i64>,
    min_tokens: i64,
    stop: Vec<String>,
    include_stop_str_in_output: bool,
    stop_token_ids: Vec<i64>,
    ignore_eos: bool,
    skip_special_tokens: bool,
    seed: Option<i64>,
    logprobs: Option<i64>,
    n: i64,
    logit_bias: Option<HashMap<i64, f64>>,
}

impl PySamplingParams {
    /// With the checkpoint's defaults. `vocab` bounds token ids.
    fn resolve(&self, defaults: &GenerationConfig, vocab: usize) -> Result<SamplingParams> {
        let id = |field: &str, id: i64| {
            let known = u32::try_from(id).ok().filter(|&id| (id as usize) < vocab);
            known.ok_or_else(|| Error::request(field, id, format!("token ids, 0 to {}", vocab - 1)))
        };
        let count = |field: &str, x: i64, min: i64| {
            let ok = usize::try_from(x).ok().filter(|_| x >= min);
            ok.ok_or_else(|| Error::request(field, x, format!("at least {min}")))
        };
        if !(1..=MAX_SAMPLES).contains(&self.n) {
            return Err(Error::request("n", self.n, format!("1 to {MAX_SAMPLES}")));
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(Error::request("stop", "an empty string", "strings of at least one character"));
        }
        let greedy = defaults.do_sample == Some(false);
        let temperature = if greedy { Some(0.0) } else { defaults.temperature };
        let or = |own: Option<f64>, default: Option<f64>, neutral: f32| {
            own.or(default).map_or(neutral, |x| x as f32)
        };
        let top_k = match self.top_k {
            None => defaults.top_k.unwrap_or(0),
            Some(-1) => 0,
            Some(k) => count("top_k", k, 0)
                .map_err(|_| Error::request("top_k", k, "a number of tokens; 0 or -1 for all of them"))?,
        };
        let max_tokens = self.max_tokens.map(|x| count("max_tokens", x, 1)).transpose()?;
        let params = SamplingParams {
            logit_bias: self
                .logit_bias
                .iter()
                .flatten()
                .map(|(&token, &bias)| Ok((id("logit_bias", token)?, bias as f32)))
                .collect::<Result<_>>()?,
            repetition_penalty: or(self.repetition_penalty, defaults.repetition_penalty, 1.0),
            frequency_penalty: or(self.frequency_penalty, defaults.frequency_penalty, 0.0),
            presence_penalty: or(self.presence_penalty, defaults.presence_penalty, 0.0),
            temperature: or(self.temperature, temperature, 1.0),
            top_k,
            top_p: or(self.top_p, defaults.top_p, 1.0),
            min_p: or(self.min_p, defaults.min_p, 0.0),
            seed: self.seed.map(|s| s as u64),
            logprobs: self.logprobs.map(|x| count("logprobs", x, 0)).transpose()?,
            max_tokens: max_tokens.or(defaults.max_new_tokens),
            min_tokens: count("min_tokens", self.min_tokens, 0)?,
            stop_token_ids: self
                .stop_token_ids
                .iter()
                .map(|&x| id("stop_token_ids", x))
                .collect::<Result<_>>()?,
            ignore_eos: self.ignore_eos,
        };
        params.check(vocab).map_err(|error| self.as_given(error))?;
        Ok(params)
    }

    /// An error with the number that the caller gave, where the check saw it rounded to float32.
    fn as_given(&self, error: Error) -> Error {
        let Error::Request { field, found, mut allowed } = error else { return error };
        let given = match field.as_str() {
            "temperature" => self.temperature,
            "top_p" => self.top_p,
            "min_p" => self.min_p,
            "presence_penalty" => self.presence_penalty,
            "frequency_penalty" => self.frequency_penalty,
            "repetition_penalty" => self.repetition_penalty,
            "logit_bias" => {
                self.logit_bias.iter().flatten().map(|(_, x)| *x).find(|x| !(*x as f32).is_finite())
            }
            _ => None,
        };
        let Some(x) = given else { return Error::Request { field, found, allowed } };
        if x.is_finite() && x != 0.0 && !(x as f32).is_normal() {
            allowed.push_str(", in float32");
        }
        let in_full = x == 0.0 || !x.is_finite() || (1e-5..1e16).contains(&x.abs());
        Error::request(field, if in_full { x.to_string() } else { format!("{x:e}") }, allowed)
    }
}

/// Refuses what no model could serve, by name. For `SamplingParams.__init__`.
#[pyfunction]
fn check_sampling_params(params: PySamplingParams) -> PyResult<()> {
    params.resolve(&GenerationConfig::default(), u32::MAX as usize).map(drop).map_err(to_py)
}

/// Sees that `LLM`'s arguments of these names can be served: before anything large is fetched. `alone`: by a process that is
/// no rank, whatever the environment says.
#[pyfunction]
#[pyo3(signature = (device, tensor_parallel_size, expert_parallel, *, alone = false))]
fn check_devices(
    py: Python<'_>,
    device: &str,
    tensor_parallel_size: usize,
    expert_parallel: bool,
    alone: bool,
) -> PyResult<()> {
    enter(py, || Ranks::new(tensor_parallel_size, expert_parallel, alone)?.devices(device).map(drop))
}

/// Has numpy's functions looked up, which happens once, by Python code. Ctrl-C in the middle of it would be taken for a broken
/// numpy, so it happens on a thread that gets no signals.
fn find_numpy(py: Python<'_>) {
    let look = || Python::attach(|py| drop(PyArray2::<f32>::zeros(py, [0, 0], false)));
    // Whoever needs what is not found says so.
    drop(py.detach(|| std::thread::spawn(look).join()));
}

/// A model on a device, with a thread that runs it.
#[pyclass(name = "Engine", module = "qwen35rs._core", frozen)]
struct PyEngine {
    service: Service,
    tokenizer: Option<Py<PyTokenizer>>,
    defaults: GenerationConfig,
    /// What each rank has of the model.
    part: Part,
    quantization: Option<Quantization>,
    caches: Caches,
    /// Rows of the head.
    #[pyo3(get)]
    vocab: usize,
    #[pyo3(get)]
    max_model_len: usize,
    #[pyo3(get)]
    num_layers: usize,
    #[pyo3(get)]
    max_num_seqs: usize,
    #[pyo3(get)]
    max_num_batched_tokens: usize,
    #[pyo3(get)]
    has_mtp: bool,
    #[pyo3(get)]
    eos_token_ids: Vec<u32>,
    /// `cpu`, `cuda:N`, or `cuda:N,M` of several ranks.
    #[pyo3(get)]
    device: String,
}

#[pymethods]
impl PyEngine {
    /// Loads a checkpoint directory onto a device, with its MTP module where `mtp` says so; `None` for where it can be
    /// run. `progress(done, total)` is called as layers are loaded. With the load format `dummy`, `path` may also be a
    /// `config.json` or a size of the family, and the weights are random.
    #[new]
    #[pyo3(signature = (path, tokenizer, *, load_format, device, dtype, quantization, deterministic, enforce_eager, tensor_parallel_size, expert_parallel, mtp, kv_cache_dtype, state_dtype, activation_dtype, max_model_len, max_num_seqs, max_num_batched_tokens, kv_cache_bytes, gpu_memory_utilization, seed, progress))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        tokenizer: Option<Py<PyTokenizer>>,
        load_format: &str,
        device: &str,
        dtype: &str,
        quantization: Option<&str>,
        deterministic: bool,
        enforce_eager: bool,
        tensor_parallel_size: usize,
        expert_parallel: bool,
        mtp: Option<bool>,
        kv_cache_dtype: &str,
        state_dtype: &str,
        activation_dtype: &str,
        max_model_len: Option<usize>,
        max_num_seqs: usize,
        max_num_batched_tokens: usize,
        kv_cache_bytes: Option<usize>,
        gpu_memory_utilization: f64,
        seed: u64,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        find_numpy(py);
        let dummy = match load_format {
            "auto" => false,
            "dummy" => true,
            other => return Err(to_py(Error::request("load_format", other, "auto, dummy"))),
        };
        let dtype = parse_dtype(dtype).map_err(to_py)?;
        let quantization = parse_quantization(quantization).map_err(to_py)?;
        let caches = Caches::from_names(kv_cache_dtype, state_dtype).map_err(to_py)?;
        let fp8_activations = match activation_dtype {
            "auto" => false,
            "fp8" => true,
            other => return Err(to_py(Error::request("activation_dtype", other, "auto, fp8"))),
        };
        let (ranks, devices) = enter(py, || {
            let ranks = Ranks::new(tensor_parallel_size, expert_parallel, false)?;
            let devices = ranks.devices(device)?;
            if fp8_activations && devices.iter().any(|device| device.ordinal().is_none()) {
                return Err(Error::request("activation_dtype", "fp8 on the CPU", "auto (fp8 on a GPU)"));
            }
            Ok((ranks, devices))
        })?;
        let limits = EngineLimits {
            max_model_len,
            max_num_seqs,
            max_num_batched_tokens,
            kv_cache_bytes,
            gpu_memory_utilization,
            seed,
        };
        let text: Option<Arc<Tokenizer>> = tokenizer.as_ref().map(|t| Arc::clone(&t.get().inner));
        let folders = py.import("sys")?.getattr("path")?.extract::<Vec<PathBuf>>().unwrap_or_default();
        if ranks.may_load_nccl(&devices) {
            // NVLink multicast belongs to the whole host, and a program that fails in it can take the cards from others: it
            // is used where the user says so. Set as Python programs set it, under the interpreter's lock, before NCCL is
            // loaded.
            let environment = py.import("os")?.getattr("environ")?;
            environment.call_method1("setdefault", ("NCCL_NVLS_ENABLE", "0"))?;
        }
        enter(py, move || {
            let config = if dummy { model_config(&path)? } else { ModelConfig::from_dir(&path)? };
            let defaults = match path.is_dir() || gguf::find(&path)?.is_some() {
                true => GenerationConfig::from_dir(&path)?,
                false => GenerationConfig::default(),
            };
            defaults.check(&config)?;
            let eos_token_ids = stop_tokens(&defaults, text.as_deref(), config.vocab);
            let num_tokens = text.map_or(config.vocab, |t| t.len());
            let (vocab, eos) = (config.vocab, eos_token_ids.clone());
            let (part, num_layers) = (Part::new(&config, ranks.shard(0))?, config.layers.len());
            let place = match devices.iter().any(|device| device.ordinal().is_some()) {
                true => format!("cuda, deterministic={deterministic}"),
                false => "cpu".into(),
            };
            let load = Load {
                path,
                dummy,
                config,
                dtype,
                quantization,
                mtp,
                caches,
                fp8_activations,
                limits,
                num_tokens,
                place,
                eos,
                progress,
                ranks,
            };
            let ordinals: Option<Vec<usize>> = devices.iter().map(|device| device.ordinal()).collect();
            let (service, (max_model_len, has_mtp)) = match ordinals {
                None => {
                    let cpu =
                        |_, group: Option<Arc<dyn Group>>| Ok(group.map_or_else(Cpu::default, Cpu::among));
                    load.start(cpu, available_memory())?
                }
                Some(ordinals) => load.start_cuda(ordinals, folders, deterministic, enforce_eager)?,
            };
            let device = Device::name_of(&devices);
            Ok(Self {
                service,
                tokenizer,
                defaults,
                part,
                quantization,
                caches,
                vocab,
                max_model_len,
                num_layers,
                max_num_seqs,
                max_num_batched_tokens,
                has_mtp,
                eos_token_ids,
                device,
            })
        })
    }

    /// Queues `n` samples of each prompt. `params` is one `SamplingParams` per prompt.
    fn generate(
        &self,
        py: Python<'_>,
        prompts: Vec<Ids>,
        params: Vec<PySamplingParams>,
    ) -> PyResult<PyGeneration> {
        let tokenizer = self.tokenizer.as_ref().map(|t| Arc::clone(&t.get().inner));
        let generation = enter(py, || {
            let (mut jobs, mut texts) = (Vec::new(), Vec::new());
            for (prompt, params) in prompts.into_iter().zip(&params) {
                if tokenizer.is_none() && !params.stop.is_empty() {
                    let allowed = "no stop strings: this checkpoint has no tokenizer; use stop_token_ids";
                    return Err(Error::request("stop", format!("{:?}", params.stop), allowed));
                }
                let resolved = params.resolve(&self.defaults, self.vocab)?;
                for index in 0..params.n as u64 {
                    texts.push(tokenizer.clone().map(|t| {
                        let skip = params.skip_special_tokens;
                        RequestText::new(t, params.stop.clone(), params.include_stop_str_in_output, skip)
                    }));
                    let wanted = Wanted::Tokens(resolved.clone());
                    jobs.push(Job { prompt: prompt.0.clone(), wanted, index });
                }
            }
            let stops = jobs.iter().map(|j| stops_of(j, &self.eos_token_ids)).collect();
            let started = Instant::now();
            Ok(Under { generation: self.service.submit(jobs)?, started, texts, stops })
        })?;
        Ok(PyGeneration { inner: Mutex::new(generation), closed: AtomicBool::new(false) })
    }

    /// JSON of what the engine holds and what its device says of its last step.
    fn report(&self, py: Python<'_>) -> PyResult<String> {
        enter(py, || json(&self.service.report()?))
    }

    /// JSON of what the device reaches at best, measured now; `null` where nothing is measured.
    fn measure(&self, py: Python<'_>) -> PyResult<String> {
        enter(py, || json(&self.service.measure()?))
    }

    /// What a decode step needs of each rank, in bf16 or as the model was quantised at load: `(bytes, active parameters)`.
    /// `experts_hit`: experts of a layer that it reads, of all ranks'; 0 for as many as it would under uniform routing.
    fn step_facts(&self, batch: usize, context: usize, experts_hit: usize) -> (f64, u64) {
        let scheme = self.quantization.map_or(Scheme::Bf16, Scheme::from);
        let hit = Some(experts_hit as f64).filter(|&hit| hit > 0.0);
        let bytes = self
            .part
            .weights(scheme)
            .map(|weights| self.part.step_bytes(&weights, batch, context, self.caches, hit));
        (bytes.unwrap_or_default(), self.part.params().active)
    }

    /// float32 logits of every token of a prompt, `[num_tokens, vocab]`.
    fn logits<'py>(&self, py: Python<'py>, prompt: Ids) -> PyResult<Bound<'py, PyArray2<f32>>> {
        self.rows(py, prompt, Wanted::Logits)
    }

    /// The same, in memory of the model's device.
    fn device_logits(&self, py: Python<'_>, prompt: Ids) -> PyResult<DeviceTensor> {
        let num_rows = prompt.0.len();
        let lost = || to_py(Error::Internal("logits were lost".into()));
        let memory = self.answer(py, prompt, Wanted::DeviceLogits)?.device_logits.ok_or_else(lost)?;
        Ok(DeviceTensor::new(memory, &[num_rows, self.vocab], Element::Float32))
    }

    /// float32 logits of the MTP module's drafts over a prompt, `[num_tokens - 1, vocab]`.
    fn mtp_logits<'py>(&self, py: Python<'py>, prompt: Ids) -> PyResult<Bound<'py, PyArray2<f32>>> {
        self.rows(py, prompt, Wanted::MtpLogits)
    }
}

impl PyEngine {
    /// The rows of logits that a prompt is answered with.
    fn rows<'py>(&self, py: Python<'py>, prompt: Ids, wanted: Wanted) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let logits = self.answer(py, prompt, wanted)?.logits;
        let num_rows = logits.len() / self.vocab;
        numpy::PyArray1::from_vec(py, logits).reshape([num_rows, self.vocab])
    }

    /// The one output of a request without tokens.
    fn answer(&self, py: Python<'_>, prompt: Ids, wanted: Wanted) -> PyResult<StepOutput> {
        let job = Job { prompt: prompt.0, wanted, index: 0 };
        let mut generation = enter(py, || self.service.submit(vec![job]))?;
        loop {
            match enter(py, || generation.wait(SIGNAL_POLL))? {
                Event::Timeout => py.check_signals()?,
                Event::Output(_, output) => return Ok(output),
                Event::Done => return Err(to_py(Error::Internal("logits were lost".into()))),
            }
        }
    }
}

/// The tokens that end a turn: those of `generation_config.json`, or the tokenizer's end of turn and end of text.
fn stop_tokens(defaults: &GenerationConfig, tokenizer: Option<&Tokenizer>, vocab: usize) -> Vec<u32> {
    let mut ids = defaults.eos_token_ids.clone();
    if let Some(t) = tokenizer.filter(|_| ids.is_empty()) {
        ids.extend(t.eos_id());
        ids.extend(["<|im_end|>", "<|endoftext|>"].iter().filter_map(|s| t.token_to_id(s)));
        ids.sort_unstable();
        ids.dedup();
    }
    ids.retain(|&id| (id as usize) < vocab);
    ids
}

fn stops_of(job: &Job, eos: &[u32]) -> Vec<u32> {
    let Wanted::Tokens(params) = &job.wanted else { return Vec::new() };
    let own = if params.ignore_eos { &[] } else { eos };
    own.iter().chain(&params.stop_token_ids).copied().collect()
}

/// Requests under way; an iterator over their [`PyDelta`]s. Dropping it ends them.
#[pyclass(name = "Generation", module = "qwen35rs._core", frozen)]
struct PyGeneration {
    inner: Mutex<Under>,
    /// Set by `close`. Whoever holds `inner` looks at it behind the lock, so that a close that did not get the lock is seen.
    closed: AtomicBool,
}

struct Under {
    generation: Generation,
    /// When they were submitted.
    started: Instant,
    texts: Vec<Option<RequestText>>,
    /// Tokens that end each request, whose text is not shown.
    stops: Vec<Vec<u32>>,
}

/// What one step added to one request.
#[allow(clippy::type_complexity)] // the tuple is what Python sees
#[pyclass(name = "Delta", module = "qwen35rs._core", frozen, get_all)]
struct PyDelta {
    /// Which request: prompts in order, the samples of one prompt side by side.
    index: usize,
    /// Text that became certain, possibly none.
    text: String,
    /// The new token.
    token_id: u32,
    /// `(logprob, rank, [(token id, logprob), ...])` where asked for.
    logprobs: Option<(f32, usize, Vec<(u32, f32)>)>,
    /// `stop`, `length`, or `None` while the request goes on.
    finish_reason: Option<&'static str>,
    /// When its step ended, in seconds from the submission of the requests.
    seconds: f64,
}

#[pymethods]
impl PyGeneration {
    fn __iter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<PyDelta>> {
        loop {
            let event = enter(py, || {
                let mut under = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
                Ok(match under.generation.wait(SIGNAL_POLL)? {
                    Event::Timeout => None,
                    Event::Done => Some(None),
                    Event::Output(i, output) => Some(Some(under.delta(i, output)?)),
                })
            })?;
            if self.closed.load(Ordering::SeqCst) {
                self.close();
                return Ok(None);
            }
            match event {
                Some(delta) => return Ok(delta),
                None => py.check_signals()?,
            }
        }
    }

    /// Ends the requests, from any thread; one that waits for the next delta gets the end.
    fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        let mut under = match self.inner.try_lock() {
            Ok(under) => under,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // The thread that waits there finds `closed` set when it is back, at the latest after `SIGNAL_POLL`.
            Err(TryLockError::WouldBlock) => return,
        };
        (0..under.texts.len()).for_each(|i| under.generation.close(i));
    }
}

impl Under {
    fn delta(&mut self, index: usize, output: StepOutput) -> Result<PyDelta> {
        let token_id = output.token.unwrap_or_default();
        let mut finish = output.finish;
        let (mut text, mut stopped) = (String::new(), false);
        if let Some(request) = &mut self.texts[index] {
            let hidden = finish == Some(FinishReason::Stop) && self.stops[index].contains(&token_id);
            if !hidden {
                (text, stopped) = request.push(token_id)?;
            }
            if finish.is_some() && !stopped {
                let (rest, found) = request.finish();
                text.push_str(&rest);
                stopped = found;
            }
            if stopped {
                self.generation.close(index);
                finish = Some(FinishReason::Stop);
            }
        }
        Ok(PyDelta {
            index,
            text,
            token_id,
            logprobs: output.logprobs.map(|l| (l.chosen, l.rank, l.top)),
            finish_reason: finish.map(|f| match f {
                FinishReason::Stop => "stop",
                FinishReason::Length => "length",
            }),
            seconds: output.at.duration_since(self.started).as_secs_f64(),
        })
    }
}
