//! The CUDA backend: bf16 weights and activations, f32 residual stream, states and logits, on one device and one stream.
//! The ops call the launchers of `cuda/launch.h` and return at once; the first error is kept, and `check` gives it.
//!
//! A token's bits depend on the batch in one way: sums have one order up to 16 rows, another in the kernel for more, and
//! cuBLASLt's own where it is used. With `deterministic`, every product takes the kernel for many rows.

mod attention;
mod blas;
mod buffers;
mod device;

mod ffi;
mod form;
mod form_gguf;
mod graph;
mod launches;
mod lend;
mod measure;
mod nccl;
pub mod ops;
mod others;
mod peers;
mod products;
mod rounding;
mod rows;
mod sample;
mod step;
mod weights;

use std::collections::BTreeMap;
use std::ffi::{CStr, c_int};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::blas::Blas;
use self::device::{Device, Memory};
use self::graph::Graphs;
use self::others::Ranks;
use self::step::{MIN_WIDE_ROWS, Step};
use self::weights::{Linear, Uploader};
use crate::weights::Tensor;
use crate::weights::form::Form;
use crate::{Error, Result};

/// Bytes that the driver takes for a context with these kernels and cuBLASLt's, about.
const CONTEXT_BYTES: usize = 640 << 20;

/// The backend: a device, and what the step under way has on it.
pub struct Cuda {
    device: Arc<Device>,
    /// Gone first: what waits for another rank ends with it, and for that the others would wait.
    state: Mutex<State>,
    blas: Option<Blas>,
    deterministic: bool,
    /// Whether decode steps are recorded.
    records: bool,
    /// Whether steps of many tokens round activations to e4m3.
    fp8_activations: bool,
    /// The ranks that share the model.
    ranks: Option<Ranks>,
    uploader: Mutex<Option<Uploader>>,
    /// What the driver and libraries take, on a card that is only imagined.
    _taken: Vec<Memory>,
}

#[derive(Default)]
struct State {
    /// Gone before the ranks that they add up with, who wait for that.
    graphs: Graphs,
    step: Option<Step>,
    error: Option<Error>,
}

/// Sees that device `ordinal` is there and can be used.
///
/// # Errors
/// [`Error::Cuda`] naming what was found in its place.
pub fn require(ordinal: usize) -> Result<()> {
    device::find(ordinal).map(drop)
}

/// Cards that this process sees; none where there is no driver that can be used.
pub fn num_cards() -> usize {
    device::num_devices().unwrap_or_default()
}

/// What a launcher's code means.
fn launch_failed(name: &str, code: c_int) -> Error {
    // SAFETY: the runtime has a text for every code, which lives forever.
    let text = unsafe { CStr::from_ptr(ffi::cudaGetErrorString(code)) };
    let what = format!("{name}: {} (error {code})", text.to_string_lossy());
    Error::Cuda { what, advice: "the model is lost; make a new LLM".into() }
}

impl Cuda {
    /// Opens a device. `folders` are searched for cuBLASLt's wheel before the system is. With `deterministic` a
    /// request's bits do not depend on the batch, at the cost of speed. With `records` the kernels of a decode step are
    /// launched together, as a graph.
    ///
    /// # Errors
    /// [`Error::Cuda`] naming what was found in place of a device that can be used.
    pub fn new(ordinal: usize, folders: &[PathBuf], deterministic: bool, records: bool) -> Result<Self> {
        let device = Device::open(ordinal)?;
        let blas = if deterministic { None } else { Blas::open(&device, folders)? };
        let (state, uploader) = (Mutex::default(), Mutex::default());
        let (ranks, _taken) = (None, Vec::new());
        let fp8_activations = false;
        Ok(Self { device, blas, deterministic, records, fp8_activations, ranks, state, uploader, _taken })
    }

    /// The same with activations rounded to e4m3, a scale for each token, in steps of 256 tokens or more (of any number with
    /// `deterministic`) and products with weights in FP8 or in symmetric 4-bit integers of groups of 128 or of rows: about
    /// twice the tensor cores' rate. A model without such weights is refused by its scratch memory.
    ///
    /// # Errors
    /// [`Error::Cuda`] on a device without such products.
    pub fn with_fp8_activations(mut self) -> Result<Self> {
        self.device.bind()?;
        rounding::require()?;
        self.fp8_activations = true;
        Ok(self)
    }

    /// A card with so much memory that is only imagined: a model can be loaded with random weights, and its memory
    /// counted, but not run. Needs no driver.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] for a card on which nothing fits.
    pub fn imagine(bytes: usize) -> Result<Self> {
        let device = Device::imagine(bytes);
        let context = device.alloc(Some(CONTEXT_BYTES), "the driver and its kernels")?;
        let taken = vec![context, blas::imagine(&device)?];
        let (state, uploader) = (Mutex::default(), Mutex::default());
        let (blas, deterministic, records, fp8_activations) = (None, false, true, false);
        let (ranks, _taken) = (None, taken);
        Ok(Self { device, blas, deterministic, records, fp8_activations, ranks, state, uploader, _taken })
    }

    /// What its device has allocated, by what it is for, whenever it is asked: also where the backend has gone to a thread.
    pub fn ledger(&self) -> impl Fn() -> BTreeMap<&'static str, usize> + Send + use<> {
        let device = Arc::clone(&self.device);
        move || device.ledger()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a launcher, unless one has failed before or there is nothing to do.
    fn launch(&self, name: &str, n: usize, call: impl FnOnce(&mut Step, ffi::Stream) -> Result<c_int>) {
        let mut state = self.state();
        if n == 0 || state.error.is_some() {
            return;
        }
        let Some(step) = &mut state.step else {
            state.error = Some(Error::Internal(format!("{name} without scratch")));
            return;
        };
        // A full queue waits for the device, too.
        let _waiting = self.device.waiting();
        let launched = self.device.bind().and_then(|()| call(step, self.device.stream().cast()));
        state.error = match launched {
            Ok(0) => None,
            Ok(code) => Some(launch_failed(name, code)),
            Err(error) => Some(error),
        };
    }

    fn upload<T>(&self, work: impl FnOnce(&mut Uploader) -> Result<T>) -> Result<T> {
        let mut uploader = self.uploader.lock().unwrap_or_else(PoisonError::into_inner);
        let uploader = match &mut *uploader {
            Some(uploader) => uploader,
            none => none.insert(Uploader::new(&self.device)?),
        };
        work(uploader)
    }

    /// A matrix in one part.
    fn whole(&self, tensors: &[Tensor], form: Form) -> Result<Linear> {
        self.upload(|uploader| uploader.whole(tensors, form))
    }

    /// Rows that a product is computed for. Those above `n` are whatever the buffers hold, and nobody reads them.
    fn num_rows(&self, n: usize, capacity: usize) -> usize {
        if self.deterministic && n > 0 { n.max(MIN_WIDE_ROWS.min(capacity)) } else { n }
    }
}
