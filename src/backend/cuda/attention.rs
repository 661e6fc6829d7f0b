//! The launches of the attention layers, over pages in bf16 and in fp8.

use std::ffi::c_int;

use super::buffers::{Buf, Pages, Vector, attention_dims};
use super::{Cuda, ffi};
use crate::backend::Rope;
use crate::batch::Batch;
use crate::config::AttentionConfig;

impl Cuda {
    /// As [`crate::backend::Backend::qk_norm_rope_write`].
    #[allow(clippy::too_many_arguments)]
    pub(super) fn write_pages(
        &self,
        batch: &Batch,
        dims: &AttentionConfig,
        rope: &Rope,
        norms: (&Vector, &Vector),
        eps: f32,
        projected: &Buf,
        q: &mut Buf,
        pages: &mut Pages,
    ) {
        self.launch("qk_norm_rope_write", batch.num_tokens(), |step, stream| {
            let (dims, stride) = (attention_dims(dims), projected.width as c_int);
            let (q_norm, k_norm) = (norms.0.0.ptr(), norms.1.0.ptr());
            let (inv_freq, axis) = (step.inv_freq.ptr(), step.axis.ptr());
            let (half, scale) = (rope.inv_freq.len() as c_int, rope.scale);
            let (x, q) = (projected.memory.ptr(), q.memory.ptr());
            // SAFETY: shapes are those of the trait; the frequencies are those of the model's configuration.
            Ok(unsafe {
                match pages {
                    Pages::Bf16 { k, v } => ffi::q35_qk_norm_rope_write(
                        stream,
                        step.batch,
                        dims,
                        q_norm,
                        k_norm,
                        eps,
                        inv_freq,
                        axis,
                        half,
                        scale,
                        x,
                        stride,
                        q,
                        k.ptr(),
                        v.ptr(),
                    ),
                    Pages::Fp8(pages) => ffi::q35_qk_norm_rope_write_fp8(
                        stream,
                        step.batch,
                        dims,
                        q_norm,
                        k_norm,
                        eps,
                        inv_freq,
                        axis,
                        half,
                        scale,
                        x,
                        stride,
                        q,
                        pages.ptr(),
                    ),
                }
            })
        });
    }

    /// As [`crate::backend::Backend::gated_attention`].
    pub(super) fn attend(
        &self,
        batch: &Batch,
        dims: &AttentionConfig,
        q: &Buf,
        projected: &Buf,
        pages: &Pages,
        out: &mut Buf,
    ) {
        self.launch("gated_attention", batch.num_tokens(), |step, stream| {
            let (dims, stride) = (attention_dims(dims), projected.width as c_int);
            let (q, x, out) = (q.memory.ptr(), projected.memory.ptr(), out.memory.ptr());
            let (room, max_seqs) = (step.room as c_int, step.limits.max_seqs as c_int);
            let workspace = step.attention.ptr();
            // SAFETY: shapes are those of the trait; the workspace is for the largest batch, and for the pages of the
            // prefill of each piece.
            Ok(unsafe {
                match pages {
                    Pages::Bf16 { k, v } => ffi::q35_gated_attention(
                        stream,
                        step.batch,
                        dims,
                        q,
                        x,
                        stride,
                        k.ptr(),
                        v.ptr(),
                        workspace,
                        out,
                    ),
                    Pages::Fp8(pages) => step
                        .pieces(batch)
                        .into_iter()
                        .map(|piece| {
                            ffi::q35_gated_attention_fp8(
                                stream,
                                piece,
                                dims,
                                q,
                                x,
                                stride,
                                pages.ptr(),
                                room,
                                max_seqs,
                                workspace,
                                out,
                            )
                        })
                        .find(|&code| code != 0)
                        .unwrap_or(0),
                }
            })
        });
    }
}
