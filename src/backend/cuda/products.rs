//! The launches of products: of a part of a matrix, of the sparse block, and of the norms around that.

use std::ffi::c_int;

use super::blas::Blas;
use super::buffers::{Buf, Moe, MoeWeights, Vector};
use super::form::Part;
use super::others::Others;
use super::step::MIN_WIDE_ROWS;
use super::{Cuda, ffi};
use crate::Error;
use crate::backend::{Backend, Precision};

impl Cuda {
    /// With each part of a matrix in turn; few rows take codes and the plain rows behind them in one kernel.
    pub(super) fn products(&self, n: usize, x: &Buf, parts: &[Part], out: &mut Buf) {
        if let [packed, plain] = parts
            && n < MIN_WIDE_ROWS
            && !packed.is_plain()
            && plain.is_plain()
        {
            self.launch("linear", n, |_, stream| {
                let (w, tail, rows) = (packed.packed(x.width), plain.memory.ptr(), plain.rows as c_int);
                let (x, y, stride) = (x.memory.ptr(), out.memory.ptr(), out.width as c_int);
                let (n, wide) = (n as c_int, (out.precision == Precision::Full).into());
                // SAFETY: shapes are those of the trait; `wide` says what `out` holds.
                Ok(unsafe { ffi::q35_packed_linear_tail(stream, n, w, tail, rows, x, y, wide, stride) })
            });
            return;
        }
        let mut first = 0;
        for part in parts {
            self.product(n, x, part, out, first);
            first += part.rows;
        }
    }

    /// Columns `first` and on of `out`, as many as the part has rows.
    fn product(&self, n: usize, x: &Buf, part: &Part, out: &mut Buf, first: usize) {
        let wide = out.precision == Precision::Full;
        let (num_in, stride) = (x.width, out.width);
        self.launch("linear", n, |step, stream| {
            let (x, y) = (x.memory.ptr(), out.memory.at(first * if wide { 4 } else { 2 }) as *mut _);
            let n_rows = n as c_int;
            if !part.is_plain() {
                let (w, wide) = (part.packed(num_in), wide.into());
                let stride = stride as c_int;
                let rounding = step.rounding.as_ref().map_or(Ok(None), |r| r.of_linear(n, num_in))?;
                // SAFETY: shapes are those of the trait; `wide` says what `out` holds; `memory` is large enough.
                return Ok(unsafe {
                    match rounding {
                        Some(memory) => {
                            ffi::q35_fp8_token_linear(stream, n_rows, w, x, memory, y, wide, stride)
                        }
                        None => ffi::q35_packed_linear(stream, n_rows, w, x, y, wide, stride),
                    }
                });
            }
            let w: *const ffi::Bf16 = part.memory.ptr();
            let shape = (n, num_in, part.rows, stride, wide);
            // SAFETY: shapes are those of the trait; `launch` has bound the device.
            let by_blas =
                |blas: &Blas| unsafe { blas.linear(&self.device, shape, x.cast(), w.cast(), y) }.is_ok();
            if n >= MIN_WIDE_ROWS && self.blas.as_ref().is_some_and(by_blas) {
                return Ok(0);
            }
            let (num_in, rows, stride) = (num_in as c_int, part.rows as c_int, stride as c_int);
            // SAFETY: shapes are those of the trait; `wide` says what `out` holds.
            Ok(unsafe {
                match wide {
                    true => ffi::q35_linear_f32(stream, n_rows, num_in, rows, x, w, y.cast(), stride),
                    false => ffi::q35_linear(stream, n_rows, num_in, rows, x, w, y.cast(), stride),
                }
            })
        });
    }

    /// As [`Backend::moe`].
    pub(super) fn experts(&self, n: usize, x: &Buf, m: &Moe, out: &mut Buf) {
        let n = self.num_rows(n, x.rows.min(out.rows));
        self.launch("moe", n, |step, stream| {
            let (x, workspace, out) = (x.memory.ptr(), step.moe.ptr(), out.memory.ptr());
            let rounded = step.rounding.as_ref().map_or(Ok(None), |r| r.of_experts(n, m.dims))?;
            let (n, dims) = (n as c_int, m.dims);
            let (residual, norm) = (std::ptr::null_mut(), std::ptr::null());
            // SAFETY: shapes are those of the trait; workspace and memory are for the largest batch.
            Ok(unsafe {
                match (m.weights(), rounded) {
                    (MoeWeights::Plain(w), _) => ffi::q35_moe(stream, n, dims, w, x, workspace, out),
                    (MoeWeights::Packed(w), None) => {
                        ffi::q35_packed_moe(stream, n, dims, w, x, workspace, out)
                    }
                    (MoeWeights::Packed(w), Some(memory)) => ffi::q35_fp8_token_moe(
                        stream, n, dims, w, x, workspace, memory, residual, norm, 0.0, out,
                    ),
                }
            })
        });
    }

    /// As [`Backend::norm_moe`].
    pub(super) fn norm_experts(
        &self,
        n: usize,
        residual: &mut Buf,
        norm: (&Vector, f32),
        x: &mut Buf,
        m: &Moe,
        block: &mut Buf,
    ) {
        let rows = self.num_rows(n, residual.rows.min(x.rows).min(block.rows));
        if rows >= MIN_WIDE_ROWS && matches!(m.weights(), MoeWeights::Packed(_)) {
            self.rmsnorm_residual(rows, Some(block), residual, norm.0, norm.1, x);
            self.experts(rows, x, m, block);
            return;
        }
        self.few_experts(rows, block.memory.ptr(), residual, norm, x, m, block);
    }

    /// As [`Backend::all_reduce_norm_moe`]: a row alone is added up, normed and routed by one kernel, where cards address each
    /// other's memory.
    pub(super) fn sum_norm_experts(
        &self,
        n: usize,
        residual: &mut Buf,
        norm: (&Vector, f32),
        x: &mut Buf,
        m: &Moe,
        block: &mut Buf,
    ) {
        let rows = self.num_rows(n, residual.rows.min(x.rows).min(block.rows));
        if rows < MIN_WIDE_ROWS && self.adds_up_directly() {
            self.sum_few_experts(rows, residual, norm, x, m, block);
            return;
        }
        self.all_reduce_norm(n, block, residual, norm.0, norm.1, x);
        if rows < MIN_WIDE_ROWS {
            // The kernels of few rows norm them anew.
            self.few_experts(rows, std::ptr::null(), residual, norm, x, m, block);
        } else {
            self.experts(rows, x, m, block);
        }
    }

    fn sum_few_experts(
        &self,
        rows: usize,
        residual: &mut Buf,
        norm: (&Vector, f32),
        x: &mut Buf,
        m: &Moe,
        block: &mut Buf,
    ) {
        let weights = m.weights();
        self.launch("all_reduce_norm_moe", rows, |step, stream| {
            let Some(Others::Direct(peers)) = &step.others else {
                return Err(Error::Internal("a sum over ranks without them".into()));
            };
            let (peers, n, dims) = (peers.at(), rows as c_int, m.dims);
            let (delta, out) = (block.memory.ptr::<ffi::Bf16>(), block.memory.ptr());
            let (residual, x) = (residual.memory.ptr(), x.memory.ptr());
            let (norm, eps, workspace) = (norm.0.0.ptr(), norm.1, step.moe.ptr());
            // SAFETY: shapes are those of the trait, no wider than what the ranks have met for; the workspace is for the
            // largest batch.
            Ok(unsafe {
                match weights {
                    MoeWeights::Plain(w) => ffi::q35_all_reduce_norm_moe(
                        stream, peers, n, dims, w, delta, residual, norm, eps, x, workspace, out,
                    ),
                    MoeWeights::Packed(w) => ffi::q35_all_reduce_packed_norm_moe(
                        stream, peers, n, dims, w, delta, residual, norm, eps, x, workspace, out,
                    ),
                }
            })
        });
    }

    /// The residual stream with the change in `delta`, where there is one; its norm, to x; and the experts of that.
    #[allow(clippy::too_many_arguments)]
    fn few_experts(
        &self,
        rows: usize,
        delta: *const ffi::Bf16,
        residual: &mut Buf,
        norm: (&Vector, f32),
        x: &mut Buf,
        m: &Moe,
        block: &mut Buf,
    ) {
        let weights = m.weights();
        self.launch("norm_moe", rows, |step, stream| {
            let (block, residual, x) = (block.memory.ptr(), residual.memory.ptr(), x.memory.ptr());
            let (norm, eps, workspace) = (norm.0.0.ptr(), norm.1, step.moe.ptr());
            let (n, dims) = (rows as c_int, m.dims);
            // SAFETY: shapes are those of the trait; the workspace is for the largest batch.
            Ok(unsafe {
                match weights {
                    MoeWeights::Plain(w) => {
                        ffi::q35_norm_moe(stream, n, dims, w, delta, residual, norm, eps, x, workspace, block)
                    }
                    MoeWeights::Packed(w) => ffi::q35_packed_norm_moe(
                        stream, n, dims, w, delta, residual, norm, eps, x, workspace, block,
                    ),
                }
            })
        });
    }

    /// As [`Backend::norm_moe_norm`]: few rows take the norm before the experts along with them, many the norm after.
    pub(super) fn norm_experts_norm(
        &self,
        n: usize,
        residual: &mut Buf,
        (before, after, eps): (&Vector, &Vector, f32),
        x: &mut Buf,
        m: &Moe,
        block: &mut Buf,
    ) {
        let rows = self.num_rows(n, residual.rows.min(x.rows).min(block.rows));
        if rows < MIN_WIDE_ROWS {
            self.norm_experts(n, residual, (before, eps), x, m, block);
            self.rmsnorm_residual(n, Some(block), residual, after, eps, x);
            return;
        }
        self.rmsnorm_residual(rows, Some(block), residual, before, eps, x);
        self.launch("moe_then_norm", rows, |step, stream| {
            let (residual, x): (_, *mut ffi::Bf16) = (residual.memory.ptr(), x.memory.ptr());
            let (norm, workspace) = (after.0.ptr(), step.moe.ptr());
            let rounded = step.rounding.as_ref().map_or(Ok(None), |r| r.of_experts(rows, m.dims))?;
            let (n, dims) = (rows as c_int, m.dims);
            // SAFETY: shapes are those of the trait; workspace and memory are for the largest batch.
            Ok(unsafe {
                match (m.weights(), rounded) {
                    (MoeWeights::Plain(w), _) => {
                        ffi::q35_moe_then_norm(stream, n, dims, w, x, workspace, residual, norm, eps, x)
                    }
                    (MoeWeights::Packed(w), None) => ffi::q35_packed_moe_then_norm(
                        stream, n, dims, w, x, workspace, residual, norm, eps, x,
                    ),
                    (MoeWeights::Packed(w), Some(memory)) => ffi::q35_fp8_token_moe(
                        stream, n, dims, w, x, workspace, memory, residual, norm, eps, x,
                    ),
                }
            })
        });
    }
}
