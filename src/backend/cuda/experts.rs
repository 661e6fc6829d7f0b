//! The launches of the sparse block and of the norms around it.

use std::ffi::c_int;

use super::buffers::{Buf, Moe, Vector};
use super::step::MIN_WIDE_ROWS;
use super::{Cuda, ffi};
use crate::backend::Backend;

impl Cuda {
    /// As [`Backend::moe`].
    pub(super) fn experts(&self, n: usize, x: &Buf, m: &Moe, out: &mut Buf) {
        let n = self.num_rows(n, x.rows.min(out.rows));
        self.launch("moe", n, |step, stream| {
            let (x, workspace, out) = (x.memory.ptr(), step.moe.ptr(), out.memory.ptr());
            // SAFETY: shapes are those of the trait; the workspace is for the largest batch.
            Ok(unsafe { ffi::q35_moe(stream, n as c_int, m.dims, m.weights(), x, workspace, out) })
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
        let n = self.num_rows(n, residual.rows.min(x.rows).min(block.rows));
        self.launch("norm_moe", n, |step, stream| {
            let (block, residual, x) = (block.memory.ptr(), residual.memory.ptr(), x.memory.ptr());
            let (norm, eps, workspace) = (norm.0.0.ptr(), norm.1, step.moe.ptr());
            // SAFETY: shapes are those of the trait; the workspace is for the largest batch.
            Ok(unsafe {
                ffi::q35_norm_moe(
                    stream,
                    n as c_int,
                    m.dims,
                    m.weights(),
                    block,
                    residual,
                    norm,
                    eps,
                    x,
                    workspace,
                    block,
                )
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
            let (norm, workspace, dims) = (after.0.ptr(), step.moe.ptr(), m.dims);
            // SAFETY: shapes are those of the trait; the workspace is for the largest batch.
            Ok(unsafe {
                ffi::q35_moe_then_norm(
                    stream,
                    rows as c_int,
                    dims,
                    m.weights(),
                    x,
                    workspace,
                    residual,
                    norm,
                    eps,
                    x,
                )
            })
        });
    }
}
