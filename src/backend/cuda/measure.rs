//! What a card reaches: the bandwidth and the rate of products that speeds are set beside.

use std::sync::Arc;
use std::time::Instant;

use super::blas::Blas;
use super::device::Device;
use super::{ffi, launch_failed};
use crate::Result;
use crate::backend::Measured;

const BYTES: usize = 1 << 30;
/// Of the square matrices that are multiplied.
const SIZE: usize = 8192;
const REPEATS: u32 = 20;

/// Reads memory and multiplies matrices, some ten milliseconds each; `None` where there is no memory left for it.
pub(super) fn measure(device: &Arc<Device>, blas: Option<&Blas>) -> Result<Option<Measured>> {
    let Ok(memory) = device.zeros(Some(BYTES), "measurements") else { return Ok(None) };
    let read = |from: usize| {
        let (x, out) = (memory.at(from) as *const std::ffi::c_void, memory.ptr());
        // SAFETY: inside the allocation.
        match unsafe { ffi::q35_read(device.stream().cast(), (BYTES - from) as i64, x, out) } {
            0 => Ok(()),
            code => Err(launch_failed("read", code)),
        }
    };
    let seconds = repeat(device, || read(0))?;
    let read_bytes_per_s = BYTES as f64 / seconds;
    let flops_per_s = match blas {
        None => None,
        Some(blas) => {
            let matrix = 2 * SIZE * SIZE;
            let [a, b, out] = [0, matrix, 2 * matrix].map(|at| memory.at(at) as *mut std::ffi::c_void);
            // Normal numbers: the rate depends on how many bits change.
            for (seed, x) in [a, b].into_iter().enumerate() {
                let (stream, n) = (device.stream().cast(), (SIZE * SIZE) as i64);
                // SAFETY: inside the allocation.
                match unsafe { ffi::q35_fill_normal(stream, 0, n, seed as u64, 1.0, x.cast()) } {
                    0 => {}
                    code => return Err(launch_failed("fill_normal", code)),
                }
            }
            let shape = (SIZE, SIZE, SIZE, SIZE, false);
            // SAFETY: three matrices inside the allocation.
            let product = || Ok(unsafe { blas.linear(device, shape, a, b, out) }.is_ok());
            match product()? {
                true => {
                    let seconds = repeat(device, || product().map(|_| ()))?;
                    Some(2.0 * (SIZE as f64).powi(3) / seconds)
                }
                false => None,
            }
        }
    };
    Ok(Some(Measured { read_bytes_per_s, flops_per_s }))
}

/// Seconds of one `work`.
fn repeat(device: &Device, work: impl Fn() -> Result<()>) -> Result<f64> {
    for _ in 0..3 {
        work()?;
    }
    device.synchronize()?;
    let start = Instant::now();
    for _ in 0..REPEATS {
        work()?;
    }
    device.synchronize()?;
    Ok(start.elapsed().as_secs_f64() / f64::from(REPEATS))
}
