//! What the CUDA backend holds on its device: activations, parameters, pages, slots; and their sizes.

use std::sync::Arc;

use super::device::{Device, Memory, Pinned};
use super::ffi;
use super::weights::Linear;
use crate::Result;
use crate::backend::{Precision, StateType};
use crate::batch::PAGE_LEN;
use crate::config::{AttentionConfig, DeltaConfig};

/// Activations `[rows, width]`.
pub struct Buf {
    pub(super) memory: Memory,
    pub(super) rows: usize,
    pub(super) width: usize,
    pub(super) precision: Precision,
    /// Where it is read to.
    pub(super) host: Option<Pinned>,
}

impl Buf {
    pub(super) fn row_bytes(&self) -> usize {
        self.width * bytes_of(self.precision)
    }

    /// The leading rows, on the host, once everything that was launched has run.
    pub(super) fn fetch(&mut self, device: &Arc<Device>, rows: usize) -> Result<&Pinned> {
        let bytes = rows * self.row_bytes();
        let host = match &mut self.host {
            Some(host) => host,
            none => none.insert(Pinned::new(device, self.memory.bytes())?),
        };
        self.memory.read(host, bytes)?;
        Ok(host)
    }
}

/// A small f32 parameter.
pub struct Vector(pub(super) Memory);

/// The weights of one sparse block.
pub struct Moe {
    pub(super) dims: ffi::MoeDims,
    pub(super) router: Linear,
    pub(super) gate_up: Linear,
    pub(super) down: Linear,
    pub(super) shared_gate_up: Linear,
    pub(super) shared_down: Linear,
    pub(super) shared_gate: Linear,
}

/// Where the weights of a sparse block are.
pub(super) enum MoeWeights {
    /// All of them as bf16.
    Plain(ffi::MoeWeights),
    /// Some as codes.
    Packed(ffi::PackedMoe),
}

impl Moe {
    pub(super) fn weights(&self) -> MoeWeights {
        let (router, shared_gate) = (self.router.ptr(), self.shared_gate.ptr());
        let matrices = [&self.gate_up, &self.down, &self.shared_gate_up, &self.shared_down];
        if matrices.iter().all(|m| m.is_plain()) {
            let [gate_up, down, shared_gate_up, shared_down] = matrices.map(Linear::ptr);
            let weights = ffi::MoeWeights { router, gate_up, down, shared_gate_up, shared_down, shared_gate };
            return MoeWeights::Plain(weights);
        }
        let [gate_up, down, shared_gate_up, shared_down] = matrices.map(Linear::packed);
        let weights = ffi::PackedMoe { gate_up, down, shared_gate_up, shared_down, router, shared_gate };
        MoeWeights::Packed(weights)
    }
}

/// Keys and values of one attention layer.
pub enum Pages {
    /// Each bf16 `[num_pages, num_kv_heads, PAGE_LEN, head_dim]`.
    Bf16 { k: Memory, v: Memory },
    /// Codes and scales of both (see `cuda/launch.h`).
    Fp8(Memory),
}

/// States f32 or f16 `[num_slots, V, k_dim, v_dim]` and convolution tails bf16 `[num_slots, kernel - 1, C]`.
pub struct Slots {
    pub(super) state: Memory,
    pub(super) tail: Memory,
    pub(super) state_type: StateType,
    pub(super) state_bytes: usize,
    pub(super) tail_bytes: usize,
}

pub(super) fn bytes_of(precision: Precision) -> usize {
    match precision {
        Precision::Full => 4,
        Precision::Compute => 2,
    }
}

/// Bytes of a slot's state and of its tail.
pub(super) fn slot_parts(dims: &DeltaConfig, state: StateType) -> (usize, usize) {
    let element = match state {
        StateType::F32 => 4,
        StateType::F16 => 2,
    };
    (element * dims.num_v_heads * dims.k_dim * dims.v_dim, 2 * (dims.conv_kernel - 1) * dims.conv_channels())
}

/// Bytes of a page of keys and values in fp8: of each row, codes and a scale.
pub(super) fn fp8_page_bytes(dims: &AttentionConfig) -> usize {
    2 * PAGE_LEN * dims.num_kv_heads * (dims.head_dim + 4)
}

pub(super) fn product(dims: &[usize]) -> Option<usize> {
    dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
}

/// Whether rows follow one another.
pub(super) fn is_run(rows: &[usize]) -> bool {
    rows.windows(2).all(|pair| pair[0] + 1 == pair[1])
}

pub(super) fn delta_dims(dims: &DeltaConfig, state: StateType) -> ffi::DeltaDims {
    ffi::DeltaDims {
        num_k_heads: dims.num_k_heads as i32,
        num_v_heads: dims.num_v_heads as i32,
        k_dim: dims.k_dim as i32,
        v_dim: dims.v_dim as i32,
        conv_kernel: dims.conv_kernel as i32,
        half_states: i32::from(state == StateType::F16),
    }
}

pub(super) fn attention_dims(dims: &AttentionConfig) -> ffi::AttentionDims {
    ffi::AttentionDims {
        num_q_heads: dims.num_q_heads as i32,
        num_kv_heads: dims.num_kv_heads as i32,
        head_dim: dims.head_dim as i32,
    }
}
