//! Weights on their way to the device, through two page-locked buffers of a fixed size: f32 vectors, and matrices as bf16
//! or in the form of their codes.
//!
//! An expert's matrix is small: what is packed on the device waits until a buffer is full, or its part whole, and then all
//! of it is read by all threads, sent in one copy and packed. Meanwhile the other buffer's copy is under way.

use std::ffi::c_int;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::device::{Device, Memory, Pinned};
use super::form::Part;
use super::{ffi, launch_failed};
use crate::weights::form::Form;
use crate::weights::{DType, Random, Tensor, release_behind};
use crate::{Error, Result};

/// Bytes of one of the two buffers, and of what lies on the device before it is packed.
pub(super) const BUFFER_BYTES: usize = 16 << 20;
/// Bytes that one thread converts at a time.
const PIECE_BYTES: usize = 1 << 18;
/// Where what is staged may begin.
const ALIGN: usize = 256;

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
    /// Bytes of the present buffer: `[0, sent)` are under way, `[sent, filled)` wait.
    sent: usize,
    filled: usize,
    waiting: Waiting,
    /// Whether anything is read: not for a card that is imagined.
    pub(super) reads: bool,
    /// Whether any weights so far are multiplied by tokens in e4m3 where that is asked for.
    pub(super) takes_rounded: bool,
    /// What is packed from, on the device: the bytes that waited in a buffer, at the same places.
    staging: Option<Memory>,
}

/// What is done when what waits in a buffer is sent.
#[derive(Default)]
struct Waiting {
    /// Bytes of tensors that are to be read to a place in the buffer, in its order.
    bytes: Vec<(Tensor, Range<usize>, usize)>,
    /// Launches that read them on the device, by their names.
    launches: Vec<(&'static str, Launch)>,
}

type Launch = Box<dyn FnOnce(ffi::Stream) -> c_int + Send>;

impl Uploader {
    pub fn new(device: &Arc<Device>) -> Result<Self> {
        let buffer = || Pinned::new(device, BUFFER_BYTES);
        let (buffers, waiting) = ([buffer()?, buffer()?], Waiting::default());
        let (device, reads) = (Arc::clone(device), !device.is_imagined());
        let takes_rounded = false;
        Ok(Self {
            device,
            buffers,
            turn: 0,
            sent: 0,
            filled: 0,
            waiting,
            reads,
            takes_rounded,
            staging: None,
        })
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
        let part = match form {
            Form::Bf16 => self.plain(tensors),
            form => self.pack(tensors, form).and_then(|part| self.flush().map(|()| part)),
        };
        // Launches to memory that is gone.
        self.waiting = Waiting::default();
        release_behind(tensors);
        part
    }

    /// As bf16, rounded where they are something else.
    fn plain(&mut self, tensors: &[Tensor]) -> Result<Part> {
        let len: usize = tensors.iter().map(Tensor::num_elements).sum();
        let memory = self.device.alloc(len.checked_mul(2), "weights")?;
        let mut offset = 0;
        for tensor in tensors {
            if self.reads {
                tensor.check_finite()?;
            }
            if let Some(random) = tensor.random_elements().and_then(Random::normal) {
                self.draw(memory.at(offset), 0..tensor.num_elements(), random)?;
            } else {
                // By whole rows: what is encoded is decoded so.
                let row_len = 2 * tensor.num_cols();
                self.upload(&memory, offset, 2 * tensor.num_elements(), row_len, |place, out| {
                    let rows = place.start / row_len..place.end / row_len;
                    tensor.read_rows_as(rows, DType::BF16, out);
                })?;
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

    /// Where `len` bytes will lie there, for a launch that is [queued](Uploader::queue) before anything else is staged.
    /// `fill` gets the place of each piece among them, a whole number of `unit`s.
    pub(super) fn stage(
        &mut self,
        len: usize,
        unit: usize,
        fill: impl Fn(Range<usize>, &mut [u8]) + Sync,
    ) -> Result<u64> {
        let at = self.room(len)?;
        if self.reads {
            fill_pieces(&mut self.buffers[self.turn].as_mut_slice()[at..at + len], unit, 0, fill);
        }
        Ok(self.staging()? + at as u64)
    }

    /// The same for bytes of a tensor as they are: they are read when they are sent.
    pub(super) fn stage_bytes(&mut self, tensor: &Tensor, bytes: Range<usize>) -> Result<u64> {
        let at = self.room(bytes.len())?;
        if self.reads {
            self.waiting.bytes.push((tensor.clone(), bytes, at));
        }
        Ok(self.staging()? + at as u64)
    }

    /// Launches something on the stream, behind the copy of what was staged for it.
    pub(super) fn queue(
        &mut self,
        name: &'static str,
        call: impl FnOnce(ffi::Stream) -> c_int + Send + 'static,
    ) {
        self.waiting.launches.push((name, Box::new(call)));
    }

    /// Reads and sends what waits, and launches what was queued.
    pub(super) fn flush(&mut self) -> Result<()> {
        let Waiting { bytes, launches } = std::mem::take(&mut self.waiting);
        let (first, end) = (self.sent, self.filled);
        self.sent = end;
        let buffer = &mut self.buffers[self.turn];
        let (mut rest, mut offset, mut pieces) = (buffer.as_mut_slice(), 0, Vec::new());
        for (tensor, range, at) in &bytes {
            let (_, place) = rest.split_at_mut(at - offset);
            let (place, behind) = place.split_at_mut(range.len());
            (rest, offset) = (behind, at + range.len());
            let from = &tensor.bytes().unwrap_or_default()[range.clone()];
            pieces.extend(place.chunks_mut(PIECE_BYTES).zip(from.chunks(PIECE_BYTES)));
        }
        pieces.into_par_iter().for_each(|(place, from)| place.copy_from_slice(from));
        if let Some(staging) = self.staging.as_ref().filter(|_| first < end) {
            staging.write(first, buffer, first..end)?;
        }
        if self.device.is_imagined() {
            return Ok(());
        }
        self.device.bind()?;
        let stream: ffi::Stream = self.device.stream().cast();
        launches.into_iter().try_for_each(|(name, launch)| match launch(stream) {
            0 => Ok(()),
            code => Err(launch_failed(name, code)),
        })
    }

    /// A place for `len` bytes in the present buffer, behind what is in it; or in the other one, as soon as that was
    /// copied.
    fn room(&mut self, len: usize) -> Result<usize> {
        if len > BUFFER_BYTES {
            return Err(Error::config("tensor", len, format!("rows of up to {BUFFER_BYTES} bytes")));
        }
        let at = self.filled.next_multiple_of(ALIGN);
        if at + len <= BUFFER_BYTES {
            self.filled = at + len;
            return Ok(at);
        }
        self.flush()?;
        self.turn ^= 1;
        self.buffers[self.turn].wait()?;
        (self.sent, self.filled) = (0, len);
        Ok(0)
    }

    /// Sends `len` bytes to `offset` of `memory`, with `fill` as of [`Uploader::stage`].
    fn upload(
        &mut self,
        memory: &Memory,
        offset: usize,
        len: usize,
        unit: usize,
        fill: impl Fn(Range<usize>, &mut [u8]) + Sync,
    ) -> Result<()> {
        self.flush()?;
        let step = (BUFFER_BYTES / unit.max(1) * unit).max(unit).max(1);
        for start in (0..len).step_by(step) {
            let part = step.min(len - start);
            let at = self.room(part)?;
            let buffer = &mut self.buffers[self.turn];
            if self.reads {
                fill_pieces(&mut buffer.as_mut_slice()[at..at + part], unit, start, &fill);
            }
            memory.write(offset + start, buffer, at..at + part)?;
            self.sent = self.filled;
        }
        Ok(())
    }
}

/// Fills bytes by all threads, in pieces of whole `unit`s, the first of which begins at `start`.
fn fill_pieces(out: &mut [u8], unit: usize, start: usize, fill: impl Fn(Range<usize>, &mut [u8]) + Sync) {
    let piece_len = (PIECE_BYTES / unit.max(1) * unit).max(unit).max(1);
    let one = |i: usize, piece: &mut [u8]| {
        let first = start + i * piece_len;
        fill(first..first + piece.len(), piece);
    };
    match out.len() {
        0 => return,
        len if len <= piece_len => return one(0, out),
        _ => {}
    }
    out.par_chunks_mut(piece_len).enumerate().for_each(|(i, piece)| one(i, piece));
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

#[cfg(test)]
#[path = "weights_tests.rs"]
mod tests;
