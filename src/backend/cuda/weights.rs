//! Weights on their way to the device: bf16 matrices and f32 vectors, through two page-locked buffers of a fixed size.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use rayon::prelude::*;

use super::device::{Device, Memory, Pinned};
use super::{ffi, launch_failed};
use crate::weights::{DType, Random, Tensor};
use crate::{Error, Result};

/// Bytes of one of the two buffers.
const BUFFER_BYTES: usize = 16 << 20;
/// Bytes that one thread converts at a time.
const PIECE_BYTES: usize = 1 << 18;

/// A bf16 matrix `[num_out, num_in]`.
pub struct Linear {
    pub(super) memory: Memory,
    pub(super) num_in: usize,
    pub(super) num_out: usize,
}

/// The two buffers: one is filled while the other is copied.
pub(super) struct Uploader {
    device: Arc<Device>,
    buffers: [Pinned; 2],
    turn: usize,
}

impl Uploader {
    pub fn new(device: &Arc<Device>) -> Result<Self> {
        let buffer = || Pinned::new(device, BUFFER_BYTES);
        Ok(Self { device: Arc::clone(device), buffers: [buffer()?, buffer()?], turn: 0 })
    }

    /// The rows of tensors, one after the other, rounded to bf16 where they are something else.
    pub fn linear(&mut self, tensors: &[Tensor]) -> Result<Linear> {
        let num_in = tensors.first().and_then(|t| t.shape.last().copied()).unwrap_or(1);
        let len: usize = tensors.iter().map(Tensor::num_elements).sum();
        let memory = self.device.alloc(len.checked_mul(2), "weights")?;
        let mut offset = 0;
        for tensor in tensors {
            if let Some((seed, deviation)) = tensor.random_elements().and_then(Random::normal) {
                self.draw(&memory, offset, tensor.num_elements(), seed, deviation)?;
            } else {
                let (bytes, dtype) = (tensor.bytes(), tensor.dtype);
                self.upload(&memory, offset, 2 * tensor.num_elements(), |place, out| {
                    to_bf16(dtype, &bytes[place.start / 2 * dtype.size()..], out);
                })?;
                tensor.release();
            }
            offset += 2 * tensor.num_elements();
        }
        Ok(Linear { memory, num_in, num_out: len / num_in.max(1) })
    }

    /// Fills with random elements, on the device.
    fn draw(&self, memory: &Memory, offset: usize, num: usize, seed: u64, deviation: f32) -> Result<()> {
        if self.device.is_imagined() {
            return Ok(());
        }
        self.device.bind()?;
        let (stream, out) = (self.device.stream().cast(), memory.at(offset) as *mut ffi::Bf16);
        // SAFETY: inside the allocation, which was made for all tensors.
        match unsafe { ffi::q35_fill_normal(stream, num as i64, seed, deviation, out) } {
            0 => Ok(()),
            code => Err(launch_failed("fill_normal", code)),
        }
    }

    /// A small parameter.
    pub fn vector(&mut self, values: &[f32]) -> Result<Memory> {
        let memory = self.device.alloc(values.len().checked_mul(4), "weights")?;
        self.upload(&memory, 0, 4 * values.len(), |place, out| {
            for (x, out) in values[place.start / 4..].iter().zip(out.chunks_exact_mut(4)) {
                out.copy_from_slice(&x.to_ne_bytes());
            }
        })?;
        Ok(memory)
    }

    /// Sends `len` bytes to `offset`; `fill` gets the place of each piece among them.
    fn upload(
        &mut self,
        memory: &Memory,
        offset: usize,
        len: usize,
        fill: impl Fn(Range<usize>, &mut [u8]) + Sync,
    ) -> Result<()> {
        for start in (0..len).step_by(BUFFER_BYTES) {
            let part = BUFFER_BYTES.min(len - start);
            let buffer = &mut self.buffers[self.turn];
            buffer.wait()?;
            let pieces = buffer.as_mut_slice()[..part].par_chunks_mut(PIECE_BYTES).enumerate();
            pieces.for_each(|(i, piece)| {
                let first = start + i * PIECE_BYTES;
                fill(first..first + piece.len(), piece);
            });
            memory.write(offset + start, buffer, part)?;
            self.turn ^= 1;
        }
        Ok(())
    }
}

fn to_bf16(dtype: DType, bytes: &[u8], out: &mut [u8]) {
    let wide = |x: f32, out: &mut [u8]| out.copy_from_slice(&bf16::from_f32(x).to_ne_bytes());
    let out_pairs = out.chunks_exact_mut(2);
    match dtype {
        DType::F32 => {
            bytes.as_chunks().0.iter().zip(out_pairs).for_each(|(&x, out)| wide(f32::from_le_bytes(x), out))
        }
        DType::F16 => bytes
            .as_chunks()
            .0
            .iter()
            .zip(out_pairs)
            .for_each(|(&x, out)| wide(f16::from_le_bytes(x).to_f32(), out)),
        _ => out.copy_from_slice(&bytes[..out.len()]),
    }
}

/// Refuses what a launcher's `int` does not hold.
pub(super) fn check_sizes(linear: &Linear) -> Result<()> {
    match i32::try_from(linear.num_in.max(linear.num_out)) {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::config("tensor", linear.num_in.max(linear.num_out), "sizes below 2^31")),
    }
}
