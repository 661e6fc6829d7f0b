//! GGUF's blocks on their way to the forms of the device.

use std::ffi::{c_int, c_void};

use super::ffi;
use super::form::{Filling, pieces};
use super::weights::Uploader;
use crate::Result;
use crate::weights::form::{Q4_0_GROUP, TILE};
use crate::weights::quant::{Gguf, Moved};

impl Uploader {
    pub(super) fn pack_q4_0(&mut self, f: &mut Filling, from: &Gguf) -> Result<()> {
        let (k, groups) = (from.num_cols, from.num_cols / Q4_0_GROUP);
        for rows in pieces(0..from.codes.num_rows(), k / 2, TILE[0]) {
            let (to, row0, n) = (f.to, (f.row + rows.start) as c_int, rows.len() as c_int);
            let line = k / 2;
            let codes = self.stage(rows.len() * line, line, |place, out| {
                for (i, out) in out.chunks_exact_mut(line).enumerate() {
                    from.read_int4_codes(rows.start + place.start / line + i, out);
                }
            })?;
            // SAFETY: rows of this matrix, all of which are sent before.
            self.queue("pack_int4", move |stream| unsafe {
                ffi::q35_pack_int4(stream, to, row0, n, codes as *const i32, 0)
            });
            let line = 2 * groups;
            let scales = self.stage(rows.len() * line, line, |place, out| {
                for (i, out) in out.chunks_exact_mut(line).enumerate() {
                    from.read_int4_scales(rows.start + place.start / line + i, out);
                }
            })?;
            // SAFETY: as above.
            self.queue("pack_scales", move |stream| unsafe {
                let scales = scales as *const c_void;
                ffi::q35_pack_scales(stream, to, row0, n, scales, 1, 1, groups as i64, 1)
            });
        }
        f.row += from.codes.num_rows();
        Ok(())
    }

    /// K-quants and Q8_0: whole rows of blocks. Columns find their places on the device.
    pub(super) fn pack_gguf(&mut self, f: &mut Filling, from: &Gguf) -> Result<()> {
        let line = from.codes.num_cols();
        let order = match from.moved {
            Some(Moved::Cols(order)) => ffi::HeadOrder {
                start: order.start as i32,
                num_k_heads: order.num_k_heads as i32,
                per_k_head: order.per_k_head as i32,
                head_dim: order.head_dim as i32,
            },
            _ => ffi::HeadOrder { start: 0, num_k_heads: 0, per_k_head: 0, head_dim: 0 },
        };
        for rows in pieces(0..from.codes.num_rows(), line, TILE[0]) {
            let (to, row0, n) = (f.to, (f.row + rows.start) as c_int, rows.len() as c_int);
            let blocks = match from.moved {
                Some(Moved::Rows(_)) => self.stage(rows.len() * line, line, |place, out| {
                    for (i, out) in out.chunks_exact_mut(line).enumerate() {
                        out.copy_from_slice(from.row_codes(rows.start + place.start / line + i));
                    }
                })?,
                _ => self.stage_bytes(&from.codes, rows.start * line..rows.end * line)?,
            };
            // SAFETY: rows of this matrix, all of which are sent before.
            self.queue("pack_gguf", move |stream| unsafe {
                ffi::q35_pack_gguf(stream, to, row0, n, blocks as *const u8, order)
            });
        }
        f.row += from.codes.num_rows();
        Ok(())
    }
}
