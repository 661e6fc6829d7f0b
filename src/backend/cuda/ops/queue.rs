//! A stream of the caller's, and memory that is allocated and freed in its order.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use half::bf16;

use super::super::buffers::product;
use super::super::device::{self, OwnContext};
use super::super::ffi;
use super::{ADVICE, F32};
use crate::lend::Lendable;
use crate::{Error, Result};

/// An address on a device.
pub(super) type Address = sys::CUdeviceptr;

fn failed(doing: &str, error: DriverError) -> Error {
    let text = error.error_string().ok().map(|s| s.to_string_lossy().into_owned());
    Error::Cuda {
        what: format!("{doing}: {}", text.unwrap_or_else(|| format!("{:?}", error.0))),
        advice: ADVICE.into(),
    }
}

/// The primary context of a device, kept for good: memory made here may outlive everything else.
fn context(ordinal: usize) -> Result<sys::CUcontext> {
    static KEPT: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(&context) = kept.get(&ordinal) {
        return Ok(context as sys::CUcontext);
    }
    let device = device::find(ordinal)?;
    // SAFETY: the device is one that the driver gave.
    let context = unsafe { result::primary_ctx::retain(device) }
        .map_err(|e| failed(&format!("cuda:{ordinal}: opening it"), e))?;
    kept.insert(ordinal, context as usize);
    Ok(context)
}

/// A stream of the caller's.
#[derive(Debug)]
pub struct Queue {
    ordinal: usize,
    context: sys::CUcontext,
    stream: sys::CUstream,
}

// SAFETY: driver handles may be used from any thread that has the context current, which `bind` sees to.
unsafe impl Send for Queue {}
// SAFETY: as above; the driver locks what it must.
unsafe impl Sync for Queue {}

/// Memory of the caller's on the device of a queue: `len` elements of `size` bytes.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub(super) at: Address,
    pub(super) len: usize,
    pub(super) size: usize,
    life: PhantomData<&'a ()>,
}

impl View<'_> {
    /// Elements at an address.
    ///
    /// # Safety
    /// They are on the device, and there until what is launched on them has run, in the order of the queue's stream.
    pub unsafe fn new(at: u64, len: usize, size: usize) -> Self {
        Self { at, len, size, life: PhantomData }
    }

    pub(super) fn ptr<T>(&self) -> *mut T {
        self.at as *mut T
    }

    fn bytes(&self) -> usize {
        self.len * self.size
    }

    /// The same bytes as smaller elements.
    pub(super) fn of_size(self, size: usize) -> Self {
        Self { len: self.bytes() / size, size, ..self }
    }
}

/// Memory made on a queue, freed in the order of its stream.
#[derive(Debug)]
pub struct Memory {
    pub(super) at: Address,
    pub(super) len: usize,
    pub(super) size: usize,
    queue: Arc<Queue>,
    /// Whether another stream may use it.
    elsewhere: AtomicBool,
}

impl Lendable for Memory {
    fn device(&self) -> usize {
        self.queue.ordinal
    }

    fn address(&self) -> u64 {
        self.at
    }

    fn share(&self, stream: Option<usize>) -> Result<()> {
        let own = self.queue.stream;
        if stream == Some(own as usize) {
            return Ok(());
        }
        self.elsewhere.store(true, Ordering::Relaxed);
        let Some(stream) = stream else { return Ok(()) };
        let _current = self.queue.bind()?;
        let order = || {
            let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
            let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            // SAFETY: two streams that live, and an event that the driver frees when it has happened.
            unsafe {
                let done = result::event::record(event, own)
                    .and_then(|()| result::stream::wait_event(stream as sys::CUstream, event, flags));
                result::event::destroy(event).and(done)
            }
        };
        order().map_err(|e| failed("ordering two streams", e))
    }
}

impl Memory {
    pub(super) fn view(&self) -> View<'_> {
        View { at: self.at, len: self.len, size: self.size, life: PhantomData }
    }

    pub(super) fn ptr<T>(&self) -> *mut T {
        self.at as *mut T
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.at == 0 {
            return;
        }
        let Ok(_current) = self.queue.bind() else { return };
        // SAFETY: allocated by `alloc`; what uses it is on this stream alone.
        let in_order = || unsafe { result::free_async(self.at, self.queue.stream) };
        if *self.elsewhere.get_mut() || in_order().is_err() {
            // The order of one stream says nothing of the others.
            let _ = result::ctx::synchronize();
            // SAFETY: nothing that was launched is still running.
            let _ = unsafe { result::free_sync(self.at) };
        }
    }
}

impl Queue {
    /// A stream of a device, 0 for the default stream.
    ///
    /// # Errors
    /// [`Error::Cuda`] where there is no such device; [`Error::Request`] for a stream that is being captured.
    pub fn open(ordinal: usize, stream: usize) -> Result<Arc<Self>> {
        let queue = Self { ordinal, context: context(ordinal)?, stream: stream as sys::CUstream };
        let _current = queue.bind()?;
        // SAFETY: a stream of the caller's, who waits for us.
        let status = unsafe { result::stream::is_capturing(queue.stream) };
        match status.map_err(|e| failed("looking at the stream", e))? {
            sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE => Ok(Arc::new(queue)),
            _ => Err(Error::request(
                "stream",
                "one that is being captured in a graph",
                "any other: ops allocate memory and send numbers to the device",
            )),
        }
    }

    /// Makes its context the calling thread's, until what it returns goes.
    pub(super) fn bind(&self) -> Result<OwnContext> {
        let own = OwnContext::keep().map_err(|e| failed("using the device", e))?;
        // SAFETY: a primary context that is never released.
        unsafe { result::ctx::set_current(self.context) }.map_err(|e| failed("using the device", e))?;
        Ok(own)
    }

    pub(super) fn on(&self) -> ffi::Stream {
        self.stream.cast()
    }

    /// Memory, unset.
    pub(super) fn alloc(self: &Arc<Self>, dims: &[usize], size: usize) -> Result<Memory> {
        let full = |bytes: String| Error::OutOfMemory {
            what: format!("{bytes} bytes on the device for an op"),
            advice: "give it fewer tokens, or free what else is there (torch.cuda.empty_cache())".into(),
        };
        let len = product(dims);
        let Some(bytes) = len.and_then(|n| n.checked_mul(size)) else {
            return Err(full("over 2^64".into()));
        };
        let at = match bytes {
            0 => 0,
            // SAFETY: freed in `drop`; nothing reads it before it is written.
            _ => match unsafe { result::malloc_async(self.stream, bytes) } {
                Ok(at) => at,
                Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                    return Err(full(bytes.to_string()));
                }
                Err(error) => return Err(failed("allocating memory", error)),
            },
        };
        let elsewhere = AtomicBool::new(false);
        Ok(Memory { at, len: len.unwrap_or_default(), size, queue: Arc::clone(self), elsewhere })
    }

    /// Memory of as many elements as a workspace function says. Zeros, which some launchers want before the first use.
    pub(super) fn workspace(self: &Arc<Self>, elements: i64, size: usize) -> Result<Memory> {
        self.zeros(&[usize::try_from(elements).unwrap_or_default()], size)
    }

    pub(super) fn zeros(self: &Arc<Self>, dims: &[usize], size: usize) -> Result<Memory> {
        let memory = self.alloc(dims, size)?;
        self.clear(memory.at, memory.view().bytes())?;
        Ok(memory)
    }

    fn clear(&self, at: Address, bytes: usize) -> Result<()> {
        match bytes {
            0 => Ok(()),
            // SAFETY: callers give what they allocated.
            _ => unsafe { result::memset_d8_async(at, 0, bytes, self.stream) }
                .map_err(|e| failed("clearing memory", e)),
        }
    }

    /// What follows finds done what came before. `out` is not empty, and written by what follows.
    pub(super) fn fence(&self, out: &Memory) -> Result<()> {
        self.clear(out.at, 1)
    }

    /// bf16 elements of these bits.
    pub(super) fn fill16(&self, at: Address, bits: u16, len: usize) -> Result<()> {
        // SAFETY: callers give what they allocated, and at least one element.
        unsafe { sys::cuMemsetD16Async(at, bits, len, self.stream) }
            .result()
            .map_err(|e| failed("filling memory", e))
    }

    pub(super) fn fill(&self, at: Address, value: f32, len: usize) -> Result<()> {
        // SAFETY: as above.
        unsafe { sys::cuMemsetD32Async(at, value.to_bits(), len, self.stream) }
            .result()
            .map_err(|e| failed("filling memory", e))
    }

    pub(super) fn copy(&self, to: Address, from: View<'_>) -> Result<()> {
        match from.bytes() {
            0 => Ok(()),
            // SAFETY: callers give what they allocated, and what is as large.
            bytes => unsafe { result::memcpy_dtod_async(to, from.at, bytes, self.stream) }
                .map_err(|e| failed("copying on the device", e)),
        }
    }

    /// Sends numbers to the device. They are read before this returns: pageable memory is staged first.
    pub(super) fn upload<T>(self: &Arc<Self>, values: &[T]) -> Result<Memory> {
        let memory = self.alloc(&[values.len()], size_of::<T>())?;
        if !values.is_empty() {
            // SAFETY: just allocated for as many.
            unsafe { result::memcpy_htod_async(memory.at, values, self.stream) }
                .map_err(|e| failed("copying to the device", e))?;
        }
        Ok(memory)
    }

    /// Waits, and reads bf16 or f32.
    pub(super) fn read(&self, x: View<'_>) -> Result<Vec<f32>> {
        let (mut wide, mut narrow) = (Vec::new(), Vec::new());
        if x.len == 0 {
            return Ok(wide);
        }
        // SAFETY: as many elements as there are, waited for before anyone looks.
        unsafe {
            let asked = if x.size == F32 {
                wide.resize(x.len, 0f32);
                result::memcpy_dtoh_async(&mut wide, x.at, self.stream)
            } else {
                narrow.resize(x.len, bf16::ZERO);
                result::memcpy_dtoh_async(&mut narrow, x.at, self.stream)
            };
            let done = result::stream::synchronize(self.stream);
            asked.and(done).map_err(|e| failed("copying from the device", e))?;
        }
        wide.extend(narrow.iter().map(|x| x.to_f32()));
        Ok(wide)
    }
}
