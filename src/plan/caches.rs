//! What sequences hold: keys and values by the token, states by the sequence.

use serde::Serialize;

use crate::backend::{Caches, KvCache, StateType};
use crate::config::{LayerKind, ModelConfig};

/// Bytes that grow with tokens and with sequences.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CacheBytes {
    /// Keys and values of one token, bf16.
    pub kv_per_token: u64,
    /// Keys and values of one token, fp8, with their scales.
    pub kv_per_token_fp8: u64,
    /// Keys and values of one token in the MTP layer, bf16; 0 without one.
    pub mtp_kv_per_token: u64,
    /// The same in fp8.
    pub mtp_kv_per_token_fp8: u64,
    /// Delta-rule state of one sequence, f32.
    pub recurrent_per_seq: u64,
    /// The same in f16.
    pub recurrent_per_seq_f16: u64,
    /// Convolution tail of one sequence, bf16.
    pub conv_per_seq: u64,
}

impl CacheBytes {
    /// Both states of a sequence.
    pub fn state_per_seq(&self, caches: Caches) -> u64 {
        let recurrent = match caches.state {
            StateType::F32 => self.recurrent_per_seq,
            StateType::F16 => self.recurrent_per_seq_f16,
        };
        recurrent + self.conv_per_seq
    }

    /// Keys and values of one token, and those of the MTP layer.
    pub fn kv(&self, caches: Caches) -> (u64, u64) {
        match caches.kv {
            KvCache::Auto => (self.kv_per_token, self.mtp_kv_per_token),
            KvCache::Fp8 => (self.kv_per_token_fp8, self.mtp_kv_per_token_fp8),
        }
    }
}

/// Cache and state bytes.
pub fn cache_bytes(config: &ModelConfig) -> CacheBytes {
    let kv_elements = 2 * config.attention.kv_width() as u64;
    let kv_fp8 = kv_elements + 2 * 4 * config.attention.num_kv_heads as u64;
    let num_attention = config.num_layers_of(LayerKind::Attention) as u64;
    let num_delta = config.num_layers_of(LayerKind::DeltaNet) as u64;
    let delta = &config.delta;
    let state = (delta.num_v_heads * delta.k_dim * delta.v_dim) as u64;
    let conv = ((delta.conv_kernel - 1) * delta.conv_channels()) as u64;
    CacheBytes {
        kv_per_token: 2 * num_attention * kv_elements,
        kv_per_token_fp8: num_attention * kv_fp8,
        mtp_kv_per_token: 2 * kv_elements * config.num_mtp_layers as u64,
        mtp_kv_per_token_fp8: kv_fp8 * config.num_mtp_layers as u64,
        recurrent_per_seq: 4 * num_delta * state,
        recurrent_per_seq_f16: 2 * num_delta * state,
        conv_per_seq: 2 * num_delta * conv,
    }
}
