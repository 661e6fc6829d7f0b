//! Matrices in the forms that they have on the device: bf16, or codes and scales as `q35_packed` lays them out, and how they
//! get there.

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::device::Memory;
use super::weights::{BUFFER_BYTES, Uploader};
use super::{ffi, rounding};
use crate::gguf::TensorType;
use crate::weights::form::{Form, NVFP4_GROUP, TILE};
use crate::weights::quant::{BLOCK, Encoded, Fp8, Int4, Layout, Nvfp4, Scheme};
use crate::weights::{DType, Random, Tensor};
use crate::{Error, Result};

/// Consecutive rows of a matrix, in one form.
pub(super) struct Part {
    /// Codes, then scales, then zero points.
    pub memory: Memory,
    pub rows: usize,
    form: Form,
    scales_at: usize,
    zeros_at: usize,
}

impl Part {
    /// bf16 rows.
    pub fn plain(memory: Memory, rows: usize) -> Self {
        Self { memory, rows, form: Form::Bf16, scales_at: 0, zeros_at: 0 }
    }

    /// A matrix without rows.
    pub fn none(k: usize) -> ffi::Packed {
        let (codes, scales) = (std::ptr::null(), std::ptr::null());
        ffi::Packed { codes, scales, zeros: std::ptr::null(), rows: 0, k: k as i32, group: 0, kind: 0 }
    }

    /// Whether it is rows of bf16.
    pub fn is_plain(&self) -> bool {
        self.form == Form::Bf16
    }

    /// For a launcher.
    pub fn packed(&self, k: usize) -> ffi::Packed {
        let mut packed = Self::none(k);
        packed.codes = self.memory.ptr();
        packed.rows = self.rows as i32;
        let scales = self.memory.at(self.scales_at) as *const c_void;
        let zeros = self.memory.at(self.zeros_at) as *const u8;
        (packed.kind, packed.group) = match self.form {
            Form::Bf16 => return packed,
            Form::Int4 { bf16_scales, group, .. } => (if bf16_scales { 2 } else { 1 }, group as i32),
            Form::Fp8Blocks => (3, BLOCK as i32),
            Form::Fp8Rows => (4, k as i32),
            Form::Nvfp4 => (5, NVFP4_GROUP as i32),
            Form::Gguf(TensorType::Q4_K) => (6, TILE[1] as i32),
            Form::Gguf(TensorType::Q5_K) => (7, TILE[1] as i32),
            Form::Gguf(TensorType::Q6_K) => (8, TILE[1] as i32),
            Form::Gguf(_) => (9, TILE[1] as i32),
        };
        packed.scales = scales;
        if let Form::Int4 { zeros: true, .. } = self.form {
            packed.zeros = zeros;
        }
        packed
    }
}

/// A part that is being filled, from row `row` on.
pub(super) struct Filling {
    pub to: ffi::Packed,
    pub row: usize,
}

impl Uploader {
    /// Tensors of one form, with codes.
    pub(super) fn pack(&mut self, tensors: &[Tensor], form: Form) -> Result<Part> {
        let rows: usize = tensors.iter().map(Tensor::num_rows).sum();
        let k = tensors.first().map_or(0, Tensor::num_cols);
        self.takes_rounded |= rounding::takes(form, k);
        let [codes, scales, zeros] = form.bytes(rows, k).map(|bytes| bytes.next_multiple_of(256));
        let memory = self.device.alloc(Some(codes + scales + zeros), "weights")?;
        let part = Part { memory, rows, form, scales_at: codes, zeros_at: codes + scales };
        let mut filling = Filling { to: part.packed(k), row: 0 };
        for tensor in tensors {
            match (tensor.encoded(), tensor.scheme()) {
                (Some(Encoded::Int4(int4)), _) => self.pack_int4(&mut filling, int4)?,
                (Some(Encoded::Fp8(fp8)), _) => self.pack_fp8(&mut filling, fp8, &tensor.name)?,
                (Some(Encoded::Nvfp4(fp4)), _) => self.pack_fp4(&mut filling, fp4, &tensor.name)?,
                (Some(Encoded::Gguf(gguf)), _) if gguf.is_int4() => self.pack_q4_0(&mut filling, gguf)?,
                (Some(Encoded::Gguf(gguf)), _) => self.pack_gguf(&mut filling, gguf)?,
                (_, Some(scheme)) => self.quantise(&mut filling, tensor, scheme)?,
                _ => return Err(Error::Internal(format!("{} has no codes", tensor.name))),
            }
        }
        Ok(part)
    }

    fn pack_int4(&mut self, f: &mut Filling, from: &Int4) -> Result<()> {
        let (groups, size) = (from.num_groups(), from.scales.dtype.size());
        let (order, minus_one) = match from.layout {
            Layout::Packed => (0, false),
            Layout::Gptq { minus_one } => (1, minus_one),
            Layout::Awq => (2, false),
        };
        let kind = if from.scales.dtype == DType::F16 { 1 } else { 2 };
        for rows in pieces(0..from.num_rows, from.num_cols / 2, TILE[0]) {
            let (to, row0, n) = (f.to, (f.row + rows.start) as c_int, rows.len() as c_int);
            let bytes = |tensor: &Tensor| tensor.num_bytes() / from.num_rows;
            let codes = self.stage_grid(&from.codes, from, rows.clone(), bytes(&from.codes))?;
            // SAFETY: rows of this matrix, of which `stage_grid` sends all that is read.
            self.queue("pack_int4", move |stream| unsafe {
                ffi::q35_pack_int4(stream, to, row0, n, codes as *const i32, order)
            });
            if let (Some(zeros), false) = (&from.zeros, to.zeros.is_null()) {
                // Eight rows share words; a tile has sixteen.
                let zeros = self.stage_words(zeros, from, rows.clone(), groups)?;
                // SAFETY: as above.
                self.queue("pack_zeros", move |stream| unsafe {
                    let zeros = zeros as *const i32;
                    ffi::q35_pack_zeros(stream, to, row0, n, zeros, order, minus_one.into())
                });
            }
            let scales = self.stage_grid(&from.scales, from, rows.clone(), groups * size)?;
            let strides = match from.layout {
                Layout::Packed => (groups as i64, 1),
                _ => (1, rows.len() as i64),
            };
            // SAFETY: as above.
            self.queue("pack_scales", move |stream| unsafe {
                let scales = scales as *const c_void;
                ffi::q35_pack_scales(stream, to, row0, n, scales, kind, 1, strides.0, strides.1)
            });
        }
        f.row += from.num_rows;
        Ok(())
    }

    /// Sends what belongs to `rows`, `row_bytes` each (on average): rows of a grid, or its columns where a checkpoint has
    /// outputs along them. A column may hold eight of them in a word.
    fn stage_grid(
        &mut self,
        tensor: &Tensor,
        from: &Int4,
        rows: Range<usize>,
        row_bytes: usize,
    ) -> Result<u64> {
        if from.layout == Layout::Packed {
            return self.stage_bytes(tensor, rows.start * row_bytes..rows.end * row_bytes);
        }
        let bytes = tensor.bytes().unwrap_or_default();
        // Lines of all outputs; of each, those of `rows`.
        let lines = tensor.shape[0].max(1);
        let line = bytes.len() / lines;
        let (start, len) = (line * rows.start / from.num_rows, line * rows.len() / from.num_rows);
        self.stage(lines * len, len, |place, out| {
            for (i, out) in out.chunks_exact_mut(len).enumerate() {
                let at = (place.start / len + i) * line + start;
                out.copy_from_slice(&bytes[at..at + len]);
            }
        })
    }

    /// [`Uploader::stage_grid`] of zero points, eight outputs to a word in every layout.
    fn stage_words(
        &mut self,
        tensor: &Tensor,
        from: &Int4,
        rows: Range<usize>,
        groups: usize,
    ) -> Result<u64> {
        if from.layout != Layout::Packed {
            return self.stage_grid(tensor, from, rows, groups * 4 / 8);
        }
        self.stage_bytes(tensor, rows.start / 8 * groups * 4..rows.end / 8 * groups * 4)
    }

    fn pack_fp8(&mut self, f: &mut Filling, from: &Fp8, name: &str) -> Result<()> {
        let (k, num_groups) = (from.num_cols, from.num_cols.div_ceil(from.block[1]));
        let matrices = from.codes.num_rows() / from.num_rows.max(1);
        let block_rows = from.block[0].min(from.num_rows);
        // A piece is of whole blocks, or inside of one that is too large.
        let (span, unit) = match block_rows * k <= BUFFER_BYTES {
            true => (from.num_rows, block_rows.next_multiple_of(TILE[0])),
            false => (block_rows, TILE[0]),
        };
        for first in (0..matrices * from.num_rows).step_by(span.max(1)) {
            let end = (first + span).min((first / from.num_rows + 1) * from.num_rows);
            for rows in pieces(first..end, k, unit) {
                let (to, row0, n) = (f.to, (f.row + rows.start) as c_int, rows.len() as c_int);
                if self.reads {
                    check_e4m3(from.code_rows(rows.clone()), rows.start, k, name)?;
                }
                let codes = self.stage_bytes(&from.codes, rows.start * k..rows.end * k)?;
                // SAFETY: rows of this matrix, all of which are sent before.
                self.queue("pack_fp8", move |stream| unsafe {
                    ffi::q35_pack_fp8(stream, to, row0, n, codes as *const u8)
                });
                let lines = rows.len().div_ceil(block_rows);
                let scales = self.stage(4 * lines * num_groups, 4 * num_groups, |place, out| {
                    let mut line = vec![0f32; num_groups];
                    for (i, out) in out.chunks_exact_mut(4 * num_groups).enumerate() {
                        from.read_scales(
                            rows.start + (place.start / (4 * num_groups) + i) * block_rows,
                            &mut line,
                        );
                        out.as_chunks_mut()
                            .0
                            .iter_mut()
                            .zip(&line)
                            .for_each(|(out, x)| *out = x.to_ne_bytes());
                    }
                })?;
                let (block_rows, stride) = (block_rows as c_int, num_groups as i64);
                // SAFETY: as above.
                self.queue("pack_scales", move |stream| unsafe {
                    let scales = scales as *const c_void;
                    ffi::q35_pack_scales(stream, to, row0, n, scales, 0, block_rows, stride, 1)
                });
            }
        }
        f.row += from.codes.num_rows();
        Ok(())
    }

    fn pack_fp4(&mut self, f: &mut Filling, from: &Nvfp4, name: &str) -> Result<()> {
        let (k, whole) = (from.num_cols, from.whole());
        let (line, scale_line) = (k / 2, k / NVFP4_GROUP);
        for rows in pieces(0..from.codes.num_rows(), line + scale_line, TILE[0]) {
            let (to, row0, n) = (f.to, (f.row + rows.start) as c_int, rows.len() as c_int);
            let (codes, scales) = (from.code_rows(rows.clone()), from.scale_rows(rows.clone()));
            if self.reads {
                check_e4m3(scales, rows.start, scale_line, name)?;
            }
            // The scales behind the codes.
            let at = self.stage(codes.len() + scales.len(), 1, |place, out| {
                let (first, rest) = out.split_at_mut(codes.len().saturating_sub(place.start).min(out.len()));
                first.copy_from_slice(&codes[place.start.min(codes.len())..][..first.len()]);
                let start = (place.start + first.len()).saturating_sub(codes.len());
                rest.copy_from_slice(&scales[start..][..rest.len()]);
            })?;
            let scales_at = at + codes.len() as u64;
            // SAFETY: rows of this matrix, all of which are sent before.
            self.queue("pack_fp4", move |stream| unsafe {
                ffi::q35_pack_fp4(stream, to, row0, n, at as *const u8, scales_at as *const u8, whole)
            });
        }
        f.row += from.codes.num_rows();
        Ok(())
    }

    /// Quantises on the device: [`crate::weights::quant::quantise_int4`], `quantise_fp8`.
    fn quantise(&mut self, f: &mut Filling, tensor: &Tensor, scheme: Scheme) -> Result<()> {
        let (k, source) = (tensor.num_cols(), tensor.source());
        let (matrix_rows, unit) = match scheme {
            Scheme::Int4 { .. } => (tensor.num_rows(), TILE[0]),
            Scheme::Fp8 { matrix_rows } => (matrix_rows.max(1), BLOCK),
        };
        let random = source.random_elements().and_then(Random::normal);
        for matrix in 0..tensor.num_rows() / matrix_rows {
            let first = matrix * matrix_rows;
            for rows in pieces(first..first + matrix_rows, 2 * k, unit) {
                let (to, row0, n) = (f.to, (f.row + rows.start) as c_int, rows.len() as c_int);
                let w = match random {
                    Some(random) => {
                        // Over what a launch may still wait for.
                        self.flush()?;
                        let at = self.staging()?;
                        self.draw(at, rows.start * k..rows.end * k, random)?;
                        at
                    }
                    None => {
                        let bad = AtomicUsize::new(usize::MAX);
                        let at = self.stage(2 * rows.len() * k, 2 * k, |place, out| {
                            let first = rows.start + place.start / (2 * k);
                            source.read_rows_as(first..first + out.len() / (2 * k), DType::BF16, out);
                            if let Some(i) = find_infinite(out) {
                                bad.fetch_min(first * k + i, Ordering::Relaxed);
                            }
                        })?;
                        match bad.into_inner() {
                            usize::MAX => at,
                            i => return Err(tensor.not_finite_at(i)),
                        }
                    }
                };
                // SAFETY: rows of this matrix, all of which are sent or drawn before.
                self.queue("quantise", move |stream| unsafe {
                    let w = w as *const ffi::Bf16;
                    match scheme {
                        Scheme::Int4 { .. } => ffi::q35_quantise_int4(stream, to, row0, n, w),
                        Scheme::Fp8 { .. } => ffi::q35_quantise_fp8(stream, to, row0, n, w),
                    }
                });
            }
        }
        f.row += tensor.num_rows();
        Ok(())
    }
}

/// Refuses e4m3 codes, rows of `width` from row `first` on, that are no numbers: kernels take them for some.
fn check_e4m3(codes: &[u8], first: usize, width: usize, name: &str) -> Result<()> {
    match find_nan(codes) {
        None => Ok(()),
        Some(at) => Err(Error::Tensor {
            name: name.to_string(),
            found: format!("NaN in row {}, column {}", first + at / width, at % width),
            expected: "finite numbers".into(),
        }),
    }
}

/// The place of a code that is no number.
fn find_nan(codes: &[u8]) -> Option<usize> {
    let is_nan = |code: &u8| code & 0x7f == 0x7f;
    let blocks = codes.par_chunks(BLOCK * BLOCK).enumerate();
    blocks.find_map_first(|(i, block)| {
        // The largest first: a loop without a way out is one for vectors.
        let any = block.iter().fold(0, |most, code| most.max(code & 0x7f)) == 0x7f;
        any.then(|| i * BLOCK * BLOCK + block.iter().position(is_nan).unwrap_or_default())
    })
}

/// The place of an element of bf16 that is no finite number.
fn find_infinite(elements: &[u8]) -> Option<usize> {
    const EXPONENT: u16 = 0x7f80;
    let bits = |x: &[u8; 2]| u16::from_le_bytes(*x) & EXPONENT;
    let elements = elements.as_chunks().0;
    let any = elements.iter().fold(0, |most, x| most.max(bits(x))) == EXPONENT;
    any.then(|| elements.iter().position(|x| bits(x) == EXPONENT)).flatten()
}

/// Rows by pieces that fit the staging memory, each but the last of whole `unit`s.
pub(super) fn pieces(
    rows: Range<usize>,
    row_bytes: usize,
    unit: usize,
) -> impl Iterator<Item = Range<usize>> {
    let step = (BUFFER_BYTES / row_bytes.max(1) / unit * unit).max(unit);
    rows.clone().step_by(step).map(move |first| first..(first + step).min(rows.end))
}
