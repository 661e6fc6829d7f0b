//! What one rank holds of a model's tensors, shaped as its geometry says ([`ModelConfig::sharded`]): a slice of a matrix's
//! rows, or of its columns, so that each rank computes some heads, some of a block's width, or some experts, and the
//! sum over all ranks is what the whole model computes.
//!
//! ```text
//! rows        in_proj_qkv (q, k, v apart), conv1d, in_proj_z, in_proj_b, in_proj_a, A_log, dt_bias, q_proj, k_proj,
//!             v_proj, gate_proj, up_proj; the head
//! columns     out_proj, o_proj, down_proj
//! whole       norms, the router, the gate of the shared expert, the embedding; what is not a layer's of the MTP module
//! ```

mod codes;
mod cut;

use std::ops::Range;

use rayon::prelude::*;

use self::cut::Axis;
use super::{
    ExpertTensors, ExpertTriple, FfnTensors, LayerTensors, MixerTensors, ModelTensors, MtpTensors, Tensor,
};
use crate::config::{FfnConfig, ModelConfig, Shard};
use crate::{Error, Result};

impl ModelTensors {
    /// A rank's rows of the head ([`Shard::head_rows`]); of the embedding where that is the head.
    pub fn sharded_head(&self, shard: Shard) -> Tensor {
        let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
        head.row_slice(shard.head_rows(head.num_rows()))
    }
}

impl MtpTensors {
    /// A rank's part of the module: its layer as [`LayerTensors::sharded`], the rest whole.
    ///
    /// # Errors
    /// As [`LayerTensors::sharded`].
    pub fn sharded(&self, config: &ModelConfig, shard: Shard) -> Result<MtpTensors> {
        Ok(MtpTensors {
            fc: self.fc.clone(),
            pre_fc_norm_embedding: self.pre_fc_norm_embedding.clone(),
            pre_fc_norm_hidden: self.pre_fc_norm_hidden.clone(),
            layer: self.layer.sharded(config, shard)?,
            norm: self.norm.clone(),
        })
    }
}

impl LayerTensors {
    /// A rank's part of the layer, `config` being the geometry of the whole model. Rows stay in the mapped file where they
    /// are one range of it; columns, and rows from several ranges, are copied, so that what was copied lives as long as
    /// the result. Of the whole nothing else is read.
    ///
    /// # Errors
    /// As [`ModelConfig::sharded`].
    pub fn sharded(&self, config: &ModelConfig, shard: Shard) -> Result<LayerTensors> {
        let local = config.sharded(shard)?;
        if shard.is_whole() {
            return Ok(self.clone());
        }
        Ok(LayerTensors {
            input_layernorm: self.input_layernorm.clone(),
            post_attention_layernorm: self.post_attention_layernorm.clone(),
            mixer: self.mixer.sharded(config, &local, shard),
            ffn: self.ffn.sharded(config, &local, shard)?,
        })
    }
}

/// So many rows or columns for each of these.
fn times(range: Range<usize>, size: usize) -> Range<usize> {
    range.start * size..range.end * size
}

impl MixerTensors {
    fn sharded(&self, config: &ModelConfig, local: &ModelConfig, shard: Shard) -> MixerTensors {
        match self {
            MixerTensors::Attention { q_proj, k_proj, v_proj, o_proj, q_norm, k_norm } => {
                let sizes = &config.attention;
                let q_heads = shard.part(sizes.num_q_heads, local.attention.num_q_heads);
                let kv_rows = times(shard.kv_heads(sizes.num_kv_heads), sizes.head_dim);
                MixerTensors::Attention {
                    // Each query head is followed by its gate.
                    q_proj: q_proj.row_slice(times(q_heads.clone(), 2 * sizes.head_dim)),
                    k_proj: k_proj.row_slice(kv_rows.clone()),
                    v_proj: v_proj.row_slice(kv_rows),
                    o_proj: o_proj.column_slice(times(q_heads, sizes.head_dim)),
                    q_norm: q_norm.clone(),
                    k_norm: k_norm.clone(),
                }
            }
            MixerTensors::DeltaNet {
                in_proj_qkv,
                in_proj_z,
                in_proj_b,
                in_proj_a,
                conv1d,
                a_log,
                dt_bias,
                norm,
                out_proj,
            } => {
                let sizes = &config.delta;
                let k_heads = shard.part(sizes.num_k_heads, local.delta.num_k_heads);
                let v_heads = shard.part(sizes.num_v_heads, local.delta.num_v_heads);
                let (keys, values) = (times(k_heads, sizes.k_dim), times(v_heads.clone(), sizes.v_dim));
                let from = |first: usize, rows: &Range<usize>| first + rows.start..first + rows.end;
                let channels =
                    [keys.clone(), from(sizes.key_width(), &keys), from(2 * sizes.key_width(), &values)];
                let taps = vec![local.delta.conv_channels(), 1, sizes.conv_kernel];
                MixerTensors::DeltaNet {
                    in_proj_qkv: in_proj_qkv.row_slices(&channels),
                    in_proj_z: in_proj_z.row_slice(values.clone()),
                    in_proj_b: in_proj_b.row_slice(v_heads.clone()),
                    in_proj_a: in_proj_a.row_slice(v_heads.clone()),
                    conv1d: conv1d.cut_to(&Axis::of(&channels), &conv1d.all_cols(), taps),
                    a_log: a_log.row_slice(v_heads.clone()),
                    dt_bias: dt_bias.row_slice(v_heads),
                    norm: norm.clone(),
                    out_proj: out_proj.column_slice(values),
                }
            }
        }
    }
}

/// A rank's part of the width of a SwiGLU, and room for as much as any rank has.
#[derive(Clone)]
struct Width {
    own: Range<usize>,
    local: usize,
}

impl Width {
    fn new(shard: Shard, whole: usize, local: usize) -> Self {
        Width { own: shard.part(whole, local), local }
    }

    /// Of a matrix whose rows from `first` on are the width.
    fn rows(&self, tensor: &Tensor, first: usize) -> Tensor {
        let rows = Axis::padded(first + self.own.start..first + self.own.end, self.local);
        tensor.cut(&rows, &tensor.all_cols())
    }

    /// Of a matrix in `rows` whose columns are the width.
    fn cols(&self, tensor: &Tensor, rows: &Axis) -> Tensor {
        tensor.cut(rows, &Axis::padded(self.own.clone(), self.local))
    }

    fn triple(&self, [gate, up, down]: [&Tensor; 3]) -> ExpertTriple {
        ExpertTriple {
            gate_proj: self.rows(gate, 0),
            up_proj: self.rows(up, 0),
            down_proj: self.cols(down, &down.all_rows()),
        }
    }
}

impl FfnTensors {
    fn sharded(&self, config: &ModelConfig, local: &ModelConfig, shard: Shard) -> Result<FfnTensors> {
        match (self, &config.ffn, &local.ffn) {
            (
                FfnTensors::Dense { gate_proj, up_proj, down_proj },
                FfnConfig::Dense { width },
                FfnConfig::Dense { width: local },
            ) => {
                let ExpertTriple { gate_proj, up_proj, down_proj } =
                    Width::new(shard, *width, *local).triple([gate_proj, up_proj, down_proj]);
                Ok(FfnTensors::Dense { gate_proj, up_proj, down_proj })
            }
            (
                FfnTensors::Moe {
                    gate,
                    experts,
                    shared_gate_proj,
                    shared_up_proj,
                    shared_down_proj,
                    shared_expert_gate,
                },
                FfnConfig::Moe { num_experts, expert_width, shared_width, .. },
                FfnConfig::Moe { expert_width: local_width, shared_width: local_shared, .. },
            ) => {
                let shared = Width::new(shard, *shared_width, *local_shared).triple([
                    shared_gate_proj,
                    shared_up_proj,
                    shared_down_proj,
                ]);
                let experts = match shard.expert_parallel {
                    true => experts.range(shard.experts(*num_experts), *num_experts),
                    false => experts.slices(&Width::new(shard, *expert_width, *local_width), *num_experts),
                };
                Ok(FfnTensors::Moe {
                    gate: gate.clone(),
                    experts,
                    shared_gate_proj: shared.gate_proj,
                    shared_up_proj: shared.up_proj,
                    shared_down_proj: shared.down_proj,
                    shared_expert_gate: shared_expert_gate.clone(),
                })
            }
            _ => Err(Error::Internal("a feed-forward block of another kind than the configuration's".into())),
        }
    }
}

impl ExpertTensors {
    /// Some of the experts, whole.
    fn range(&self, experts: Range<usize>, num_experts: usize) -> ExpertTensors {
        let some = |tensor: &Tensor| {
            let rows = Axis::run(times(experts.clone(), tensor.num_rows() / num_experts));
            let shape = [&[experts.len()], &tensor.shape[1..]].concat();
            tensor.cut_to(&rows, &tensor.all_cols(), shape)
        };
        match self {
            ExpertTensors::PerExpert(list) => ExpertTensors::PerExpert(list[experts].to_vec()),
            ExpertTensors::Fused { gate_up_proj, down_proj } => {
                ExpertTensors::Fused { gate_up_proj: some(gate_up_proj), down_proj: some(down_proj) }
            }
        }
    }

    /// A slice of each.
    fn slices(&self, width: &Width, num_experts: usize) -> ExpertTensors {
        match self {
            ExpertTensors::PerExpert(list) => {
                let one = |e: &ExpertTriple| width.triple([&e.gate_proj, &e.up_proj, &e.down_proj]);
                ExpertTensors::PerExpert(list.par_iter().map(one).collect())
            }
            ExpertTensors::Fused { gate_up_proj, down_proj } => {
                let (both, hidden) =
                    (gate_up_proj.num_rows() / num_experts, down_proj.num_rows() / num_experts);
                let one = |e: usize| ExpertTriple {
                    gate_proj: width.rows(gate_up_proj, e * both),
                    up_proj: width.rows(gate_up_proj, e * both + both / 2),
                    down_proj: width.cols(down_proj, &Axis::run(times(e..e + 1, hidden))),
                };
                ExpertTensors::PerExpert((0..num_experts).into_par_iter().map(one).collect())
            }
        }
    }
}

#[cfg(test)]
mod tests;
