//! Weights on their way to the device, through two page-locked buffers of a fixed size: f32 vectors, and matrices as bf16
//! or in the form of their codes.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::device::{Device, Memory, Pinned};
use super::form::{Form, Part};
use super::{ffi, launch_failed};
use crate::weights::{DType, Random, Tensor};
use crate::{Error, Result};

/// Bytes of one of the two buffers, and of what lies on the device before it is packed.
pub(super) const BUFFER_BYTES: usize = 16 << 20;
/// Bytes that one thread converts at a time.
const PIECE_BYTES: usize = 1 << 18;

/// A matrix `[num_out, num_in]`: parts of consecutive rows, each in one form. Most have one part.
pub struct Linear {
    pub(super) parts: Vec<Part>,
    pub(super) num_in: usize,
    pub(super) num_out: usize,
}

impl Linear {
    /// Whether all of it is rows of bf16.
    pub(super) fn is_plain(&self) -> bool {
        self.parts.iter().all(Part::is_plain)
    }

    /// Where its first part lies: all of it, if it was made [`Uploader::whole`].
    pub(super) fn ptr(&self) -> *const ffi::Bf16 {
        self.parts.first().map_or(std::ptr::null(), |part| part.memory.ptr())
    }

    /// The same for launchers that take any form.
    pub(super) fn packed(&self) -> ffi::Packed {
        match self.parts.first() {
            Some(part) => part.packed(self.num_in),
            None => Part::none(self.num_in),
        }
    }
}

/// The two buffers: one is filled while the other is copied.
pub(super) struct Uploader {
    pub(super) device: Arc<Device>,
    buffers: [Pinned; 2],
    turn: usize,
    /// What is packed from, on the device.
    staging: Option<Memory>,
}

impl Uploader {
    pub fn new(device: &Arc<Device>) -> Result<Self> {
        let buffer = || Pinned::new(device, BUFFER_BYTES);
        Ok(Self { device: Arc::clone(device), buffers: [buffer()?, buffer()?], turn: 0, staging: None })
    }

    /// The rows of tensors, one after the other, each in the form that its kernel wants.
    pub fn linear(&mut self, tensors: &[Tensor]) -> Result<Linear> {
        let forms: Vec<_> = tensors.iter().map(Form::of).collect();
        let mut parts = Vec::new();
        let mut first = 0;
        for form in forms.chunk_by(PartialEq::eq) {
            parts.push(self.part(&tensors[first..first + form.len()], form[0])?);
            first += form.len();
        }
        sized(tensors, parts)
    }

    /// The same in one part, of this form.
    pub fn whole(&mut self, tensors: &[Tensor], form: Form) -> Result<Linear> {
        let part = self.part(tensors, form)?;
        sized(tensors, vec![part])
    }

    fn part(&mut self, tensors: &[Tensor], form: Form) -> Result<Part> {
        match form {
            Form::Bf16 => self.plain(tensors),
            form => self.pack(tensors, form),
        }
    }

    /// As bf16, rounded where they are something else.
    fn plain(&mut self, tensors: &[Tensor]) -> Result<Part> {
        let len: usize = tensors.iter().map(Tensor::num_elements).sum();
        let memory = self.device.alloc(len.checked_mul(2), "weights")?;
        let mut offset = 0;
        for tensor in tensors {
            tensor.check_finite()?;
            if let Some(random) = tensor.random_elements().and_then(Random::normal) {
                self.draw(memory.at(offset), 0..tensor.num_elements(), random)?;
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
        Ok(Part::plain(memory, tensors.iter().map(Tensor::num_rows).sum()))
    }

    /// Elements of a random tensor, drawn on the device to `to`.
    pub(super) fn draw(&self, to: u64, elements: Range<usize>, (seed, deviation): (u64, f32)) -> Result<()> {
        if self.device.is_imagined() {
            return Ok(());
        }
        self.device.bind()?;
        let (stream, out) = (self.device.stream().cast(), to as *mut ffi::Bf16);
        let (first, num) = (elements.start as i64, elements.len() as i64);
        // SAFETY: inside the allocation, which was made for all elements.
        match unsafe { ffi::q35_fill_normal(stream, first, num, seed, deviation, out) } {
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

    /// Memory on the device for up to [`BUFFER_BYTES`] of what is packed next. Launches that read it are in order with
    /// the copies that fill it again.
    pub(super) fn staging(&mut self) -> Result<u64> {
        if self.staging.is_none() {
            self.staging = Some(self.device.alloc(Some(BUFFER_BYTES), "weights under way")?);
        }
        Ok(self.staging.as_ref().map_or(0, |memory| memory.at(0)))
    }

    /// Sends `len` bytes there, as [`Uploader::upload`] does.
    pub(super) fn stage(
        &mut self,
        len: usize,
        unit: usize,
        fill: impl Fn(Range<usize>, &mut [u8]) + Sync,
    ) -> Result<u64> {
        let at = self.staging()?;
        if let Some(memory) = self.staging.take() {
            let sent = self.upload(&memory, 0, len, unit, fill);
            self.staging = Some(memory);
            sent?;
        }
        Ok(at)
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

/// A matrix of these parts. Refuses what a launcher's `int` does not hold.
fn sized(tensors: &[Tensor], parts: Vec<Part>) -> Result<Linear> {
    let num_in = tensors.first().map_or(1, Tensor::num_cols);
    let num_out: usize = tensors.iter().map(Tensor::num_rows).sum();
    match i32::try_from(num_out.max(num_in)) {
        Ok(_) => Ok(Linear { parts, num_in, num_out }),
        Err(_) => Err(Error::config("tensor", num_out.max(num_in), "sizes below 2^31")),
    }
}
