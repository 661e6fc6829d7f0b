//! Weights on their way to the device: bf16 matrices and f32 vectors, through two page-locked buffers of a fixed size.

use std::ops::Range;
use std::sync::Arc;

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

    /// The rows of tensors, one after the other, rounded to bf16 where they are something else: quantised matrices too,
    /// as long as no kernel takes their codes.
    pub fn linear(&mut self, tensors: &[Tensor]) -> Result<Linear> {
        let num_in = tensors.first().and_then(|t| t.shape.last().copied()).unwrap_or(1);
        let len: usize = tensors.iter().map(Tensor::num_elements).sum();
        let memory = self.device.alloc(len.checked_mul(2), "weights")?;
        let mut offset = 0;
        for tensor in tensors {
            if let Some((seed, deviation)) = tensor.random_elements().and_then(Random::normal) {
                self.draw(&memory, offset, tensor.num_elements(), seed, deviation)?;
            } else {
                // By whole rows: what is encoded is decoded so.
                let row_len = 2 * tensor.num_cols();
                self.upload(&memory, offset, 2 * tensor.num_elements(), row_len, |place, out| {
                    let rows = place.start / row_len..place.end / row_len;
                    tensor.read_rows_as(rows, DType::BF16, out);
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
        self.upload(&memory, 0, 4 * values.len(), 4, |place, out| {
            for (x, out) in values[place.start / 4..].iter().zip(out.chunks_exact_mut(4)) {
                out.copy_from_slice(&x.to_ne_bytes());
            }
        })?;
        Ok(memory)
    }

    /// Sends `len` bytes to `offset`; `fill` gets the place of each piece among them, a whole number of `unit`s.
    fn upload(
        &mut self,
        memory: &Memory,
        offset: usize,
        len: usize,
        unit: usize,
        fill: impl Fn(Range<usize>, &mut [u8]) + Sync,
    ) -> Result<()> {
        let whole = |bytes: usize| bytes / unit.max(1) * unit;
        let (buffer_len, piece_len) = (whole(BUFFER_BYTES), whole(PIECE_BYTES).max(unit));
        if len > 0 && buffer_len == 0 {
            return Err(Error::config("tensor", unit, format!("rows of up to {BUFFER_BYTES} bytes")));
        }
        for start in (0..len).step_by(buffer_len.max(1)) {
            let part = buffer_len.min(len - start);
            let buffer = &mut self.buffers[self.turn];
            buffer.wait()?;
            let pieces = buffer.as_mut_slice()[..part].par_chunks_mut(piece_len.max(1)).enumerate();
            pieces.for_each(|(i, piece)| {
                let first = start + i * piece_len;
                fill(first..first + piece.len(), piece);
            });
            memory.write(offset + start, buffer, part)?;
            self.turn ^= 1;
        }
        Ok(())
    }
}

/// Refuses what a launcher's `int` does not hold.
pub(super) fn check_sizes(linear: &Linear) -> Result<()> {
    match i32::try_from(linear.num_in.max(linear.num_out)) {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::config("tensor", linear.num_in.max(linear.num_out), "sizes below 2^31")),
    }
}
