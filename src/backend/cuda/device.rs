//! A CUDA device: its context, one stream, and memory. What the driver is asked for goes through here.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use super::ffi::Plain;
use crate::{Error, Result};

/// The CUDA whose runtime is linked; an older driver cannot run it.
const NEEDED: (i32, i32) = (13, 0);
/// The oldest cards that there are kernels for.
const CAPABILITY: (i32, i32) = (8, 0);

const ADVICE: &str = "allowed: an NVIDIA GPU of compute capability 8.0 or later with a driver for CUDA 13 (580 or later), \
    or device=\"cpu\"";

/// A driver's error, and what was being done.
pub(super) fn failed(doing: &str, error: DriverError) -> Error {
    let text = error.error_string().ok().map(|s| s.to_string_lossy().into_owned());
    Error::Cuda {
        what: format!("{doing}: {}", text.unwrap_or_else(|| format!("{:?}", error.0))),
        advice: "the model is lost; make a new LLM".into(),
    }
}

fn not_there(what: impl Into<String>) -> Error {
    Error::Cuda { what: what.into(), advice: ADVICE.into() }
}

/// How many devices the driver has.
pub(super) fn num_devices() -> Result<usize> {
    // SAFETY: looks whether the library can be opened, and keeps nothing.
    if !unsafe { sys::is_culib_present() } {
        return Err(not_there("found no NVIDIA driver"));
    }
    let mut version = 0;
    // SAFETY: an integer to write to; may be called before `cuInit`.
    let asked = unsafe { sys::cuDriverGetVersion(&mut version) }.result();
    if asked.is_ok() && version < 1000 * NEEDED.0 + 10 * NEEDED.1 {
        return Err(not_there(format!("found a driver for CUDA {}.{}", version / 1000, version % 1000 / 10)));
    }
    let start = || result::init().and_then(|()| result::device::get_count());
    match start() {
        Ok(num) => Ok(num as usize),
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => Ok(0),
        Err(error) => Err(not_there(format!("found a driver that does not start ({:?})", error.0))),
    }
}

fn attribute(device: sys::CUdevice, attribute: Attribute) -> Result<i32> {
    // SAFETY: the device is one that the driver gave.
    unsafe { result::device::get_attribute(device, attribute) }.map_err(|e| failed("asking a device", e))
}

/// The handle of a device that can be used.
pub(super) fn find(ordinal: usize) -> Result<sys::CUdevice> {
    let num = num_devices()?;
    if ordinal >= num {
        let found = match num {
            0 => "found no device".into(),
            num => format!("found {num} devices, and no cuda:{ordinal}"),
        };
        return Err(not_there(found));
    }
    let device = result::device::get(ordinal as c_int).map_err(|e| failed("opening a device", e))?;
    let capability = (
        attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    if capability < CAPABILITY {
        let name = result::device::get_name(device).unwrap_or_default();
        let (major, minor) = capability;
        return Err(not_there(format!("cuda:{ordinal}: found {name}, compute capability {major}.{minor}")));
    }
    Ok(device)
}

/// The primary context of a device, and the stream that everything runs on.
pub struct Device {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// Bytes of a card that is only imagined: its memory is counted, and nothing runs.
    imagined: Option<usize>,
    /// Bytes that are allocated, by what they are for.
    ledger: Mutex<BTreeMap<&'static str, usize>>,
    clock: Clock,
}

// SAFETY: driver handles may be used from any thread that has the context current, which `bind` sees to.
unsafe impl Send for Device {}
// SAFETY: as above; the driver locks what it must.
unsafe impl Sync for Device {}

impl Device {
    /// Opens a device.
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        let device = find(ordinal)?;
        // SAFETY: the device is one that the driver gave; released in `drop`.
        let context = unsafe { result::primary_ctx::retain(device) }
            .map_err(|e| failed(&format!("cuda:{ordinal}: opening it"), e))?;
        let stream = std::ptr::null_mut();
        let (ledger, clock) = (Mutex::default(), Clock::new());
        let mut opened = Self { device, context, stream, imagined: None, ledger, clock };
        opened.bind()?;
        opened.stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(|e| failed("making a stream", e))?;
        Ok(Arc::new(opened))
    }

    /// A card with so much memory, none of it real: what is allocated on it is counted.
    pub fn imagine(bytes: usize) -> Arc<Self> {
        let (context, stream) = (std::ptr::null_mut(), std::ptr::null_mut());
        let (ledger, clock) = (Mutex::default(), Clock::new());
        Arc::new(Self { device: 0, context, stream, imagined: Some(bytes), ledger, clock })
    }

    /// Its number.
    pub fn ordinal(&self) -> usize {
        self.device as usize
    }

    /// Whether it is only imagined.
    pub fn is_imagined(&self) -> bool {
        self.imagined.is_some()
    }

    /// Bytes that are allocated, by what they are for.
    pub fn ledger(&self) -> BTreeMap<&'static str, usize> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn account(&self, what: &'static str, change: impl FnOnce(usize) -> usize) {
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = ledger.entry(what).or_default();
        *bytes = change(*bytes);
    }

    /// Makes the context that of the calling thread.
    pub fn bind(&self) -> Result<()> {
        if self.is_imagined() {
            return Ok(());
        }
        // SAFETY: the context lives as long as self.
        unsafe { result::ctx::set_current(self.context) }.map_err(|e| failed("using the device", e))
    }

    /// The stream, for the driver.
    pub fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Says that the host is in a call that may wait for the device, as long as this lives.
    pub fn waiting(&self) -> Waiting<'_> {
        self.clock.start()
    }

    /// How long the host has been in such a call.
    pub fn waited(&self) -> Duration {
        self.clock.waited()
    }

    /// Waits for everything that was launched.
    pub fn synchronize(&self) -> Result<()> {
        self.bind()?;
        let _waiting = self.waiting();
        // SAFETY: the stream lives as long as self.
        unsafe { result::stream::synchronize(self.stream) }.map_err(|e| failed("running the net", e))
    }

    /// Bytes that can be allocated.
    pub fn free_memory(&self) -> Result<usize> {
        if let Some(bytes) = self.imagined {
            return Ok(bytes.saturating_sub(self.ledger().values().sum()));
        }
        self.synchronize()?;
        Ok(result::mem_get_info().map_err(|e| failed("asking for free memory", e))?.0)
    }

    /// Memory, unset; `None` for a size that overflowed.
    pub fn alloc(self: &Arc<Self>, bytes: Option<usize>, what: &'static str) -> Result<Memory> {
        self.bind()?;
        let size = bytes.map_or("over 2^64".into(), |n| n.to_string());
        let ptr = match bytes {
            Some(0) => 0,
            Some(n) if self.is_imagined() => match self.free_memory()? < n {
                true => return Err(self.too_large(what, &size)),
                false => 0,
            },
            // SAFETY: freed in `drop`; nothing reads it before it is written (or zeroed).
            Some(n) => match unsafe { result::malloc_sync(n) } {
                Ok(ptr) => ptr,
                Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                    return Err(self.too_large(what, &size));
                }
                Err(error) => return Err(failed("allocating memory", error)),
            },
            None => return Err(self.too_large(what, &size)),
        };
        let bytes = bytes.unwrap_or_default();
        self.account(what, |sum| sum + bytes);
        Ok(Memory { ptr, bytes, what, device: Arc::clone(self) })
    }

    /// Memory of zeros.
    pub fn zeros(self: &Arc<Self>, bytes: Option<usize>, what: &'static str) -> Result<Memory> {
        let memory = self.alloc(bytes, what)?;
        memory.clear(0, memory.bytes)?;
        Ok(memory)
    }

    fn too_large(&self, what: &str, size: &str) -> Error {
        let free = self.free_memory().map_or("unknown".into(), |n| n.to_string());
        let settings = match what.starts_with("weights") {
            true => "take a quantization in fewer bits, a larger tensor_parallel_size or a smaller model",
            false => {
                "lower max_model_len, max_num_seqs, max_num_batched_tokens, kv_cache_bytes or gpu_memory_utilization"
            }
        };
        Error::OutOfMemory {
            what: format!("{what} ({size} bytes; the device has {free} free)"),
            advice: format!("{settings}, or end what else runs on the device"),
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.is_imagined() {
            return;
        }
        let own = OwnContext::keep();
        if self.bind().is_ok() && !self.stream.is_null() {
            // SAFETY: made in `open`, used by nobody any more.
            let _ = unsafe { result::stream::destroy(self.stream) };
        }
        // Before the context may be gone.
        drop(own);
        // SAFETY: retained in `open`.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// Since when the host waits: milliseconds since it was made, and one; 0 while it does not.
struct Clock(Instant, AtomicU64);

impl Clock {
    fn new() -> Self {
        Self(Instant::now(), AtomicU64::new(0))
    }

    fn now(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(1)
    }

    fn start(&self) -> Waiting<'_> {
        // What is inside another call began with that.
        let first = self.1.compare_exchange(0, self.now(), Ordering::Relaxed, Ordering::Relaxed);
        Waiting(first.is_ok().then_some(&self.1))
    }

    fn waited(&self) -> Duration {
        match self.1.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            since => Duration::from_millis(self.now().saturating_sub(since)),
        }
    }
}

/// The host in a call that may wait for the device.
pub struct Waiting<'a>(Option<&'a AtomicU64>);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(since) = self.0 {
            since.store(0, Ordering::Relaxed);
        }
    }
}

/// Device memory.
pub struct Memory {
    ptr: sys::CUdeviceptr,
    bytes: usize,
    what: &'static str,
    device: Arc<Device>,
}

impl Memory {
    /// The address, on the device.
    pub fn ptr<T>(&self) -> *mut T {
        self.ptr as *mut T
    }

    /// The address as the driver names it, `offset` bytes in.
    pub fn at(&self, offset: usize) -> sys::CUdeviceptr {
        self.ptr + offset as u64
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Zeroes `len` bytes from `offset`, on the stream.
    pub fn clear(&self, offset: usize, len: usize) -> Result<()> {
        self.check(offset, len)?;
        if len == 0 || self.device.is_imagined() {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: inside the allocation.
        unsafe { result::memset_d8_async(self.at(offset), 0, len, self.device.stream) }
            .map_err(|e| failed("clearing memory", e))
    }

    /// Fills what begins at `offset` with a range of host memory, on the stream.
    pub fn write(&self, offset: usize, host: &Pinned, range: Range<usize>) -> Result<()> {
        self.check(offset, range.len())?;
        if self.device.is_imagined() {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: inside the allocation; the caller waits before host memory changes (`Pinned::wait`).
        unsafe { result::memcpy_htod_async(self.at(offset), &host.as_slice()[range], self.device.stream) }
            .map_err(|e| failed("copying to the device", e))?;
        host.record()
    }

    /// Copies the leading bytes to the host and waits for them.
    pub fn read(&self, host: &mut Pinned, len: usize) -> Result<()> {
        self.send(host, len)?;
        host.wait()
    }

    /// Copies the leading bytes to the host, on the stream; `Pinned::wait` waits for them.
    pub fn send(&self, host: &mut Pinned, len: usize) -> Result<()> {
        self.check(0, len)?;
        self.device.bind()?;
        let stream = self.device.stream;
        // SAFETY: inside the allocation, and waited for before anyone looks or host memory goes (`Pinned::wait`).
        unsafe { result::memcpy_dtoh_async(&mut host.as_mut_slice()[..len], self.ptr, stream) }
            .map_err(|e| failed("copying from the device", e))?;
        host.record()
    }

    /// Waits until nothing uses it any more.
    pub fn wait(&self) -> Result<()> {
        if self.device.is_imagined() { Ok(()) } else { self.device.synchronize() }
    }

    /// Copies `len` bytes of `from`, from `skip` on, to `offset`, on the stream.
    pub fn copy(&self, offset: usize, from: &Memory, skip: usize, len: usize) -> Result<()> {
        self.check(offset, len)?;
        from.check(skip, len)?;
        self.device.bind()?;
        // SAFETY: inside both allocations.
        unsafe { result::memcpy_dtod_async(self.at(offset), from.at(skip), len, self.device.stream) }
            .map_err(|e| failed("copying on the device", e))
    }

    /// Copies `n` rows of `width` bytes of `from` to the columns from `offset` of rows of `pitch` bytes, on the stream.
    pub fn copy_columns(
        &self,
        n: usize,
        offset: usize,
        pitch: usize,
        from: &Memory,
        width: usize,
    ) -> Result<()> {
        self.check(0, n * pitch)?;
        from.check(0, n * width)?;
        if n * width == 0 {
            return Ok(());
        }
        self.device.bind()?;
        let copy = sys::CUDA_MEMCPY2D {
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcDevice: from.ptr,
            srcPitch: width,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstDevice: self.at(offset),
            dstPitch: pitch,
            WidthInBytes: width,
            Height: n,
            srcXInBytes: 0,
            srcY: 0,
            srcHost: std::ptr::null(),
            srcArray: std::ptr::null_mut(),
            dstXInBytes: 0,
            dstY: 0,
            dstHost: std::ptr::null_mut(),
            dstArray: std::ptr::null_mut(),
        };
        // SAFETY: inside both allocations: `offset` and `width` are columns of the rows of `self`.
        unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.device.stream) }
            .result()
            .map_err(|e| failed("copying on the device", e))
    }

    fn check(&self, offset: usize, len: usize) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.bytes => Ok(()),
            _ => Err(Error::Internal(format!("{len} bytes at {offset} of {}", self.bytes))),
        }
    }
}

/// While it lives, the calling thread may be given another context; then it has its own again.
pub struct OwnContext(sys::CUcontext);

impl OwnContext {
    /// What the thread has now.
    pub fn keep() -> std::result::Result<Self, DriverError> {
        Ok(Self(result::ctx::get_current()?.unwrap_or(std::ptr::null_mut())))
    }
}

impl Drop for OwnContext {
    fn drop(&mut self) {
        // SAFETY: the thread's own context of before, or none.
        let _ = unsafe { result::ctx::set_current(self.0) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // Lent memory goes on whatever thread its last holder has, which may use another device.
        let _own = (!self.device.is_imagined()).then(OwnContext::keep);
        self.device.account(self.what, |sum| sum.saturating_sub(self.bytes));
        if self.ptr != 0 && self.device.bind().is_ok() {
            // SAFETY: allocated by `alloc`; the driver waits for what still uses it.
            let _ = unsafe { result::free_sync(self.ptr) };
        }
    }
}

/// Host memory that the device can copy from and to while the host goes on.
pub struct Pinned {
    ptr: *mut u8,
    bytes: usize,
    copied: sys::CUevent,
    device: Arc<Device>,
}

// SAFETY: plain memory, and a driver handle.
unsafe impl Send for Pinned {}
// SAFETY: shared references only read it.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Zeros.
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<Self> {
        device.bind()?;
        if device.is_imagined() {
            let memory = vec![0u64; bytes.div_ceil(8)].into_boxed_slice();
            let (ptr, copied) = (Box::into_raw(memory).cast(), std::ptr::null_mut());
            return Ok(Self { ptr, bytes, copied, device: Arc::clone(device) });
        }
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let copied = result::event::create(flags).map_err(|e| failed("making an event", e))?;
        // SAFETY: freed in `drop`; at least one byte is asked for.
        let made = unsafe { result::malloc_host(bytes.max(1), 0) };
        let ptr: *mut u8 = made
            .map_err(|_| Error::OutOfMemory {
                what: format!("page-locked host memory ({bytes} bytes)"),
                advice: "raise the limit on locked memory, or lower max_num_batched_tokens".into(),
            })?
            .cast();
        // SAFETY: just allocated with this size.
        unsafe { ptr.write_bytes(0, bytes) };
        Ok(Self { ptr, bytes, copied, device: Arc::clone(device) })
    }

    /// What it holds.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: initialised in `new`, as long as self.
        unsafe { std::slice::from_raw_parts(self.ptr, self.bytes) }
    }

    /// What it holds. Call [`Pinned::wait`] first where a copy from it may be under way.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed uniquely.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.bytes) }
    }

    /// What it holds, as items from its start.
    pub fn items<T: Plain>(&self) -> &[T] {
        // SAFETY: page-locked memory is aligned, the items lie inside it, and every bit pattern is one.
        unsafe { std::slice::from_raw_parts(self.ptr.cast(), self.bytes / size_of::<T>()) }
    }

    /// The same, to write. Call [`Pinned::wait`] first.
    pub fn items_mut<T: Plain>(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed uniquely.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.cast(), self.bytes / size_of::<T>()) }
    }

    fn record(&self) -> Result<()> {
        // SAFETY: event and stream live.
        unsafe { result::event::record(self.copied, self.device.stream) }
            .map_err(|e| failed("recording an event", e))
    }

    /// Waits until the last copy from or to it is done.
    pub fn wait(&self) -> Result<()> {
        if self.device.is_imagined() {
            return Ok(());
        }
        self.device.bind()?;
        let _waiting = self.device.waiting();
        // SAFETY: the event lives; one that was never recorded is done.
        unsafe { result::event::synchronize(self.copied) }.map_err(|e| failed("running the net", e))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.device.is_imagined() {
            let memory = std::ptr::slice_from_raw_parts_mut(self.ptr.cast::<u64>(), self.bytes.div_ceil(8));
            // SAFETY: the box that was made in `new`.
            drop(unsafe { Box::from_raw(memory) });
        } else if self.wait().is_ok() {
            // SAFETY: made in `new`; nothing copies from it any more.
            unsafe {
                let _ = result::event::destroy(self.copied);
                let _ = result::free_host(self.ptr.cast());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Clock;
    use std::time::Duration;

    #[test]
    fn the_outermost_call_is_what_the_host_waits_in() {
        let (clock, pause) = (Clock::new(), Duration::from_millis(20));
        assert_eq!(clock.waited(), Duration::ZERO);
        let outer = clock.start();
        std::thread::sleep(pause);
        drop(clock.start());
        assert!(clock.waited() >= pause, "an inner call ended it");
        drop(outer);
        std::thread::sleep(pause);
        assert_eq!(clock.waited(), Duration::ZERO);
    }
}
