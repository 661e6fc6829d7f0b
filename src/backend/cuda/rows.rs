//! Rows gathered, scattered, put side by side and kept, on the device's stream.

use std::ffi::c_int;

use super::buffers::{Buf, is_run};
use super::{Cuda, ffi};
use crate::backend::Precision;

impl Cuda {
    /// As [`crate::backend::Backend::gather`].
    pub(super) fn gather_of(&self, rows: &[usize], x: &Buf, out: &mut Buf) {
        debug_assert!(x.width == out.width);
        self.launch("gather", rows.len(), |step, stream| {
            let (row_bytes, num) = (x.row_bytes(), rows.len());
            if is_run(rows) && x.precision == out.precision {
                return out.memory.copy(0, &x.memory, rows[0] * row_bytes, num * row_bytes).map(|()| 0);
            }
            let same = x.precision == out.precision;
            let to = if same { out.memory.ptr() } else { step.gathered.ptr() };
            let (at, elements) = (step.rows(rows)?, (num * x.width) as i64);
            // SAFETY: rows of x, as many as fit `to`.
            let code =
                unsafe { ffi::q35_gather(stream, at, num as c_int, x.memory.ptr(), row_bytes as i64, to) };
            let from = &step.gathered;
            Ok(match (code, x.precision, out.precision) {
                (0, Precision::Compute, Precision::Full) => {
                    // SAFETY: as many elements as were gathered.
                    unsafe { ffi::q35_to_f32(stream, elements, from.ptr(), out.memory.ptr()) }
                }
                (0, Precision::Full, Precision::Compute) => {
                    // SAFETY: as above.
                    unsafe { ffi::q35_to_bf16(stream, elements, from.ptr(), out.memory.ptr()) }
                }
                _ => code,
            })
        });
    }

    /// As [`crate::backend::Backend::scatter`].
    pub(super) fn scatter_of(&self, rows: &[usize], x: &Buf, out: &mut Buf) {
        debug_assert!(x.width == out.width && x.precision == out.precision);
        self.launch("scatter", rows.len(), |_, _| {
            let (bytes, mut done) = (x.row_bytes(), 0);
            for run in rows.chunk_by(|a, b| a + 1 == *b) {
                out.memory.copy(run[0] * bytes, &x.memory, done * bytes, run.len() * bytes)?;
                done += run.len();
            }
            Ok(0)
        });
    }

    /// As [`crate::backend::Backend::concat`].
    pub(super) fn concat_of(&self, n: usize, left: &Buf, right: &Buf, out: &mut Buf) {
        debug_assert!(left.width + right.width == out.width);
        self.launch("concat", n, |_, _| {
            let (a, b, pitch) = (left.row_bytes(), right.row_bytes(), out.row_bytes());
            out.memory.copy_columns(n, 0, pitch, &left.memory, a)?;
            out.memory.copy_columns(n, a, pitch, &right.memory, b)?;
            Ok(0)
        });
    }

    /// As [`crate::backend::Backend::keep_rows`].
    pub(super) fn kept_rows_of(&self, rows: &[usize], buf: &mut Buf) {
        if is_run(rows) && rows.first() == Some(&0) {
            return;
        }
        self.launch("keep_rows", rows.len(), |step, stream| {
            let row_bytes = buf.row_bytes();
            let (at, to) = (step.rows(rows)?, step.gathered.ptr());
            let num = rows.len() as c_int;
            // SAFETY: rows of the buffer, as many as fit `gathered`.
            let code = unsafe { ffi::q35_gather(stream, at, num, buf.memory.ptr(), row_bytes as i64, to) };
            match code {
                0 => buf.memory.copy(0, &step.gathered, 0, rows.len() * row_bytes).map(|()| 0),
                code => Ok(code),
            }
        });
    }
}
