//! The same of sums over ranks.

use std::ffi::{c_int, c_void};

use super::{Bf16, MoeDims, MoeWeights, PackedMoe, Peers, Stream};

unsafe extern "C" {
    pub fn q35_peer_bytes(world: c_int, channels: c_int, width: c_int, gather_bytes: i64) -> i64;
    pub fn q35_all_reduce(
        stream: Stream,
        peers: Peers,
        n: c_int,
        width: c_int,
        x: *const Bf16,
        out: *mut Bf16,
    ) -> c_int;
    pub fn q35_all_reduce_norm(
        stream: Stream,
        peers: Peers,
        n: c_int,
        width: c_int,
        delta: *const Bf16,
        residual: *mut f32,
        w: *const f32,
        eps: f32,
        out: *mut Bf16,
    ) -> c_int;
    pub fn q35_gather_columns(stream: Stream, peers: Peers, n: c_int, width: c_int, x: *const f32) -> c_int;
    pub fn q35_all_reduce_norm_moe(
        stream: Stream,
        peers: Peers,
        n: c_int,
        dims: MoeDims,
        weights: MoeWeights,
        delta: *const Bf16,
        residual: *mut f32,
        norm: *const f32,
        eps: f32,
        x: *mut Bf16,
        workspace: *mut c_void,
        out: *mut Bf16,
    ) -> c_int;
    pub fn q35_all_reduce_packed_norm_moe(
        stream: Stream,
        peers: Peers,
        n: c_int,
        dims: MoeDims,
        weights: PackedMoe,
        delta: *const Bf16,
        residual: *mut f32,
        norm: *const f32,
        eps: f32,
        x: *mut Bf16,
        workspace: *mut c_void,
        out: *mut Bf16,
    ) -> c_int;
}
