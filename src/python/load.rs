//! From the arguments of `LLM` to an engine that runs: the weights, onto one device or onto those of several ranks, which
//! are threads of this process or processes that were started together.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use pyo3::prelude::*;

use super::room::Need;
use crate::backend::{Backend, Caches, Device};
use crate::config::{ModelConfig, Shard};
use crate::engine::{Engine, EngineLimits, follow};
use crate::model::Model;
use crate::plan::what_fits;
use crate::ranks::{Collectives, Group, Meeting, PATIENCE, Poll, Tcp, Threads, agree, patience};
use crate::service::{Service, panicked};
use crate::weights::quant::Quantization;
use crate::weights::{Checkpoint, DType, ModelTensors, MtpTensors, ReadAhead};
use crate::{Error, Result};

/// How often a rank that follows lets Python handle its signals.
const SIGNAL_POLL: Duration = Duration::from_millis(50);

/// What weights may be held as, by the names of `dtype`; `auto` beside them is as they are stored.
const DTYPES: [(&str, DType); 3] =
    [("float32", DType::F32), ("bfloat16", DType::BF16), ("float16", DType::F16)];

/// The dtype of a name.
///
/// # Errors
/// `Request` with the names that there are.
pub(super) fn parse_dtype(name: &str) -> Result<Option<DType>> {
    match DTYPES.iter().find(|(known, _)| *known == name) {
        Some((_, dtype)) => Ok(Some(*dtype)),
        None if name == "auto" => Ok(None),
        None => Err(Error::request("dtype", name, "auto, float32, bfloat16, float16")),
    }
}

fn dtype_name(dtype: Option<DType>) -> &'static str {
    DTYPES.iter().find(|(_, known)| Some(*known) == dtype).map_or("auto", |(name, _)| name)
}

/// Whether the processes that were started together have met: they do so once.
static HAVE_MET: AtomicBool = AtomicBool::new(false);

/// The longest request, and whether the MTP module is loaded.
pub(super) type Sizes = (usize, bool);

/// What a model is made from.
pub(super) struct Load {
    pub path: PathBuf,
    /// Whether the weights are random and nothing is read.
    pub dummy: bool,
    pub config: ModelConfig,
    pub dtype: Option<DType>,
    /// What its matrices are quantised to as they are loaded.
    pub quantization: Option<Quantization>,
    /// Whether with its MTP module; `None` for where it can be run.
    pub mtp: Option<bool>,
    pub caches: Caches,
    /// Whether products of many tokens round their activations.
    pub fp8_activations: bool,
    pub limits: EngineLimits,
    /// Tokens that exist.
    pub num_tokens: usize,
    /// What decides the bits of a rank beside all this: the kind of its device, and how that computes.
    pub place: String,
    pub eos: Vec<u32>,
    pub progress: Option<Py<PyAny>>,
    pub ranks: Ranks,
}

/// How a model is shared.
#[derive(Clone)]
pub(super) struct Ranks {
    pub world: usize,
    pub expert_parallel: bool,
    /// Where they are processes: which this is, and where they meet.
    pub meeting: Option<Meeting>,
    /// How their devices add up.
    pub collectives: Collectives,
    /// How long they wait for each other in a step.
    pub patience: Duration,
}

impl Ranks {
    /// From `tensor_parallel_size`, and, where this process is not `alone`, what started it together with others.
    pub fn new(world: usize, expert_parallel: bool, alone: bool) -> Result<Self> {
        Shard::first(world, expert_parallel)?;
        let var = |name: &str| std::env::var(name).ok();
        let (collectives, patience) = match world {
            1 => (Collectives::Auto, PATIENCE),
            _ => (Collectives::from_env(var)?, patience(var)?),
        };
        let meeting = if world == 1 || alone { None } else { Meeting::from_env(var)? };
        match &meeting {
            Some(meeting) if meeting.world != world => Err(Error::request(
                "tensor_parallel_size",
                world,
                format!("{}, the number of processes that were started together", meeting.world),
            )),
            _ => Ok(Self { world, expert_parallel, meeting, collectives, patience }),
        }
    }

    /// The devices of the ranks of this process, by rank: from what the user called them.
    pub fn devices(&self, name: &str) -> Result<Vec<Device>> {
        let devices = match &self.meeting {
            None => Device::for_ranks(name, self.world, 0)?,
            Some(meeting) => Device::for_process(name, meeting.local_rank)?,
        };
        devices.iter().try_for_each(|device| device.require())?;
        Ok(devices)
    }

    /// Whether NCCL is one of the ways in which these devices may add up.
    pub fn may_load_nccl(&self, devices: &[Device]) -> bool {
        let cards = devices.iter().all(|device| device.ordinal().is_some());
        self.world > 1 && cards && self.collectives != Collectives::Direct
    }

    pub fn shard(&self, rank: usize) -> Shard {
        Shard { rank, world: self.world, expert_parallel: self.expert_parallel }
    }
}

impl Load {
    /// Loads it; the engine's thread does the work. `backend` makes that of a rank, which has no group alone. `room` is what
    /// decoded matrices and random weights may take of this host, where the device does not say itself that they are too
    /// large for it.
    ///
    /// # Errors
    /// What the files, the devices and the ranks say. Of a process that is not rank 0, [`Error::Followed`] once rank 0 has
    /// ended.
    pub fn start<B, F>(self, backend: F, room: Option<u64>) -> Result<(Service, Sizes)>
    where
        B: Backend + 'static,
        F: Fn(usize, Option<Arc<dyn Group>>) -> Result<B> + Send + Sync + 'static,
    {
        let cancelled = Arc::new(AtomicBool::new(false));
        let (load, backend) = (Arc::new(self), Arc::new(backend));
        let part = {
            let (load, seen) = (Arc::clone(&load), Arc::clone(&cancelled));
            move |rank: usize, group: Option<Arc<dyn Group>>| {
                load.part(rank, backend(rank, group.clone())?, group.as_deref(), room, &seen)
            }
        };
        // Ctrl-C ends the wait at once; the thread ends behind the layer that it is at.
        let poll = || {
            let signals = Python::attach(|py| py.check_signals());
            signals.map_err(|_| {
                cancelled.store(true, Ordering::Relaxed);
                Error::Interrupted
            })
        };
        let seen = Arc::clone(&cancelled);
        let notice = Notice::default();
        let waiting: Poll = Arc::new(move |waited, what| match seen.load(Ordering::Relaxed) {
            true => Err(Error::Interrupted),
            false => {
                notice.say(waited, what);
                Ok(())
            }
        });
        let patience = load.ranks.patience;
        if let Some(meeting) = load.ranks.meeting.clone().filter(|meeting| meeting.rank > 0) {
            let run = move || {
                let group: Arc<dyn Group> = Arc::new(Tcp::meet(&meeting, patience, waiting)?);
                let followed = part(meeting.rank, Some(Arc::clone(&group)))
                    .and_then(|model| follow(model, Arc::clone(&group)));
                followed.inspect_err(|error| group.fail(&error.to_string()))
            };
            return Err(on_a_thread(run, poll).err().unwrap_or(Error::Followed));
        }
        let make = move || {
            let group: Option<Arc<dyn Group>> = match (&load.ranks.meeting, load.ranks.world) {
                (Some(_), _) if HAVE_MET.load(Ordering::Relaxed) => {
                    return Err(Error::Ranks {
                        what: "the other processes follow the first LLM of this one, and end with it".into(),
                        advice: "one LLM for each start of the processes".into(),
                    });
                }
                (Some(meeting), _) => {
                    let group = Tcp::meet(meeting, patience, waiting)?;
                    HAVE_MET.store(true, Ordering::Relaxed);
                    Some(Arc::new(group))
                }
                (None, 1) => None,
                (None, world) => {
                    let part = part.clone();
                    let follow = move |group: Arc<dyn Group>| {
                        follow(part(group.rank(), Some(Arc::clone(&group)))?, group)
                    };
                    Some(Arc::new(Threads::lead(world, patience, waiting, follow)?))
                }
            };
            // What cannot be is said before anything is read.
            let can_be = load.limits.check(load.config.max_context());
            let made = can_be.and_then(|()| part(0, group.clone())).and_then(|model| {
                Engine::among(model, group.clone(), &load.limits, load.num_tokens, load.eos.clone())
            });
            let engine = made.inspect_err(|error| {
                if let Some(group) = &group {
                    group.fail(&error.to_string());
                }
            })?;
            let sizes = (engine.max_model_len(), engine.model().has_mtp());
            Ok((engine, sizes))
        };
        Service::start(make, poll, unlocked)
    }

    /// A rank's part of the model, on its device.
    fn part<B: Backend>(
        &self,
        rank: usize,
        backend: B,
        group: Option<&dyn Group>,
        room: Option<u64>,
        cancelled: &AtomicBool,
    ) -> Result<Model<B>> {
        let (config, shard) = (&self.config, self.ranks.shard(rank));
        let checkpoint = if self.dummy { Checkpoint::random() } else { Checkpoint::open(&self.path)? };
        let mut tensors = ModelTensors::resolve(&checkpoint, config)?;
        let module = match self.mtp {
            Some(false) => None,
            Some(true) => Some(MtpTensors::resolve(&checkpoint, config)?),
            None => MtpTensors::resolve(&checkpoint, config).ok(),
        };
        if let Some(group) = group.filter(|_| self.ranks.meeting.is_some()) {
            agree(group, &self.things(&tensors, module.as_ref()))?;
        }
        if let Some(quantization) = self.quantization {
            tensors = tensors.requantised(quantization);
        }
        let need = match self.dummy {
            true => Need::random(config, shard)?,
            false => Need::decoded(&tensors, self.dtype, shard),
        };
        need.check(group, room)?;
        let mut ahead = (shard.is_whole()).then(|| ReadAhead::new(&tensors));
        let report = |done, total| {
            if let Some(ahead) = &mut ahead {
                ahead.loaded(done);
            }
            group.map_or(Ok(()), |group| group.check())?;
            match cancelled.load(Ordering::Relaxed) {
                true => Err(Error::Interrupted),
                false if rank > 0 => Ok(()),
                false => report(&self.progress, done, total),
            }
        };
        let free = backend.free_memory()?;
        let loaded = Model::load_shard(config, shard, tensors, self.dtype, backend, report);
        let explain = |error| what_fits(error, &checkpoint, config, shard, self.quantization, free);
        let model = loaded.map_err(explain)?.with_caches(self.caches);
        let Some(mut module) = module else { return Ok(model) };
        if let Some(quantization) = self.quantization {
            module = module.requantised(quantization);
        }
        model.with_mtp(module.sharded(config, shard)?, self.dtype)
    }

    /// What must be the same on all ranks.
    fn things(&self, tensors: &ModelTensors, module: Option<&MtpTensors>) -> Vec<(String, String)> {
        let config = serde_json::to_value(&self.config).ok();
        let fields = config.as_ref().and_then(|config| config.as_object()).into_iter().flatten();
        let mut things: Vec<_> =
            fields.map(|(name, value)| (format!("config {name}"), value.to_string())).collect();
        let quantization = self.quantization.map_or("none".into(), |to| to.to_string());
        let [kv_cache_dtype, state_dtype] = self.caches.names();
        let others = [
            (Collectives::VARIABLE, self.ranks.collectives.name().into()),
            ("expert_parallel", self.ranks.expert_parallel.to_string()),
            ("device", self.place.clone()),
            ("dtype", dtype_name(self.dtype).into()),
            ("quantization", quantization),
            ("kv_cache_dtype", kv_cache_dtype.into()),
            ("state_dtype", state_dtype.into()),
            ("activation_dtype", if self.fp8_activations { "fp8" } else { "auto" }.into()),
            ("mtp", module.is_some().to_string()),
            ("checkpoint", tensors.digest(module)),
        ];
        things.extend(others.map(|(name, value)| (name.to_string(), value)));
        things
    }

    #[cfg(feature = "cuda")]
    pub fn start_cuda(
        self,
        ordinals: Vec<usize>,
        folders: Vec<PathBuf>,
        deterministic: bool,
        enforce_eager: bool,
    ) -> Result<(Service, Sizes)> {
        use crate::backend::cuda::Cuda;
        if self.dtype.is_some_and(|dtype| dtype != DType::BF16) {
            let found = dtype_name(self.dtype);
            return Err(Error::request("dtype", found, "auto, bfloat16 (on a CUDA device)"));
        }
        let (here, collectives) = (self.ranks.meeting.is_none(), self.ranks.collectives);
        let fp8_activations = self.fp8_activations;
        let make = move |rank: usize, group: Option<Arc<dyn Group>>| {
            let ordinal = ordinals[if here { rank } else { 0 }];
            let mut cuda = Cuda::new(ordinal, &folders, deterministic, !enforce_eager)?;
            if fp8_activations {
                cuda = cuda.with_fp8_activations()?;
            }
            Ok(match group {
                Some(group) => cuda.among(group, collectives, folders.clone()),
                None => cuda,
            })
        };
        self.start(make, None)
    }

    #[cfg(not(feature = "cuda"))]
    pub fn start_cuda(
        self,
        ordinals: Vec<usize>,
        _: Vec<PathBuf>,
        _: bool,
        _: bool,
    ) -> Result<(Service, Sizes)> {
        use crate::backend::cpu::Cpu;
        ordinals.into_iter().try_for_each(|ordinal| Device::Cuda(ordinal).require())?;
        self.start(|_, group| Ok(group.map_or_else(Cpu::default, Cpu::among)), None)
    }
}

/// Says through Python's `logging`, now and then, what ranks wait for while they meet and load.
#[derive(Default)]
struct Notice(AtomicU64);

impl Notice {
    fn say(&self, waited: Duration, what: &str) {
        // What was said before belongs to another wait where that was longer.
        let said = Some(self.0.load(Ordering::Relaxed)).filter(|&said| said <= waited.as_secs()).unwrap_or(0);
        if waited.as_secs() < if said == 0 { 10 } else { said + 60 } {
            return;
        }
        self.0.store(waited.as_secs(), Ordering::Relaxed);
        let text = format!("qwen35rs: waiting for {:.0} seconds: {what}", waited.as_secs_f64());
        // A note that cannot be written is no reason to end.
        Python::attach(|py| {
            let logging = py.import("logging").and_then(|m| m.call_method1("getLogger", ("qwen35rs",)));
            drop(logging.and_then(|logger| logger.call_method1("warning", ("%s", text))));
        });
    }
}

/// Runs something that may take long on a thread, whose end or error this waits for; `poll` may end the wait.
fn on_a_thread(
    run: impl FnOnce() -> Result<()> + Send + 'static,
    poll: impl Fn() -> Result<()>,
) -> Result<()> {
    let (done, ended) = mpsc::channel();
    let thread = std::thread::Builder::new().name("qwen35rs-rank".into());
    let run =
        move || catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Err(panicked(panic.as_ref())));
    let spawned = thread.spawn(move || drop(done.send(run())));
    spawned.map_err(|e| Error::Internal(format!("no thread for a rank: {e}")))?;
    loop {
        match ended.recv_timeout(SIGNAL_POLL) {
            Ok(result) => return result,
            Err(mpsc::RecvTimeoutError::Timeout) => poll()?,
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Err(Error::Internal("a rank's thread is gone".into()));
            }
        }
    }
}

/// Lets Python's other threads run while this one waits.
fn unlocked(wait: &mut (dyn FnMut() + Send)) {
    // Where the interpreter ends, its lock is not to be had, and need not be given back.
    if Python::try_attach(|py| py.detach(&mut *wait)).is_none() {
        wait();
    }
}

/// Tells Python how far the load is; what that raises ends it.
fn report(progress: &Option<Py<PyAny>>, done: usize, total: usize) -> Result<()> {
    let Some(progress) = progress else { return Ok(()) };
    Python::attach(|py| progress.call1(py, (done, total)).map(drop)).map_err(|_| Error::Interrupted)
}
