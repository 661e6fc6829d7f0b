//! Tensors of GGUF files at their places: which name a place has there, and what llama.cpp's converter did to its
//! numbers, undone (its conversion/qwen.py):
//!
//! | tensors | what it did |
//! |---|---|
//! | norms, but for that of the delta layers | added one |
//! | `ssm_a` | `-exp(A_log)` |
//! | value heads of the delta layers | dealt them out over the key heads, see [`HeadOrder`] |
//! | experts | stacked gates, ups and downs, each by itself |
//! | convolution | left out the dimension of 1 |

use std::sync::Arc;

use super::names::Resolver;
use super::quant::{Encoded, Gguf, HeadOrder, Moved, Problem};
use super::{Checkpoint, DType, Data, ExpertTensors, ExpertTriple, Tensor};
use crate::config::{DeltaConfig, ModelConfig};
use crate::gguf::{Stored, TensorType};

/// Of a layer: what follows `model.layers.N.`, and what follows `blk.N.`.
const LAYER: [(&str, &str, Change); 29] = [
    ("input_layernorm.weight", "attn_norm.weight", Change::MinusOne),
    ("post_attention_layernorm.weight", "post_attention_norm.weight", Change::MinusOne),
    ("self_attn.q_proj.weight", "attn_q.weight", Change::None),
    ("self_attn.k_proj.weight", "attn_k.weight", Change::None),
    ("self_attn.v_proj.weight", "attn_v.weight", Change::None),
    ("self_attn.o_proj.weight", "attn_output.weight", Change::None),
    ("self_attn.q_norm.weight", "attn_q_norm.weight", Change::MinusOne),
    ("self_attn.k_norm.weight", "attn_k_norm.weight", Change::MinusOne),
    ("linear_attn.in_proj_qkv.weight", "attn_qkv.weight", Change::Channels),
    ("linear_attn.in_proj_z.weight", "attn_gate.weight", Change::HeadRows),
    ("linear_attn.in_proj_b.weight", "ssm_beta.weight", Change::Heads),
    ("linear_attn.in_proj_a.weight", "ssm_alpha.weight", Change::Heads),
    ("linear_attn.conv1d.weight", "ssm_conv1d.weight", Change::Channels),
    ("linear_attn.A_log", "ssm_a", Change::MinusExp),
    ("linear_attn.dt_bias", "ssm_dt.bias", Change::Heads),
    ("linear_attn.norm.weight", "ssm_norm.weight", Change::None),
    ("linear_attn.out_proj.weight", "ssm_out.weight", Change::HeadCols),
    ("mlp.gate_proj.weight", "ffn_gate.weight", Change::None),
    ("mlp.up_proj.weight", "ffn_up.weight", Change::None),
    ("mlp.down_proj.weight", "ffn_down.weight", Change::None),
    ("mlp.gate.weight", "ffn_gate_inp.weight", Change::None),
    ("mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight", Change::None),
    ("mlp.shared_expert.gate_proj.weight", "ffn_gate_shexp.weight", Change::None),
    ("mlp.shared_expert.up_proj.weight", "ffn_up_shexp.weight", Change::None),
    ("mlp.shared_expert.down_proj.weight", "ffn_down_shexp.weight", Change::None),
    ("mlp.experts.gate_up_proj", "ffn_gate_up_exps.weight", Change::None),
    ("mlp.experts.gate_proj", "ffn_gate_exps.weight", Change::None),
    ("mlp.experts.up_proj", "ffn_up_exps.weight", Change::None),
    ("mlp.experts.down_proj", "ffn_down_exps.weight", Change::None),
];
/// Of the MTP module, in the block after the last layer, beside a layer's.
const MTP: [(&str, &str, Change); 4] = [
    ("fc.weight", "nextn.eh_proj.weight", Change::None),
    ("pre_fc_norm_embedding.weight", "nextn.enorm.weight", Change::MinusOne),
    ("pre_fc_norm_hidden.weight", "nextn.hnorm.weight", Change::MinusOne),
    ("norm.weight", "nextn.shared_head_norm.weight", Change::MinusOne),
];
const WHOLE: [(&str, &str, Change); 3] = [
    ("model.embed_tokens.weight", "token_embd.weight", Change::None),
    ("model.norm.weight", "output_norm.weight", Change::MinusOne),
    ("lm_head.weight", "output.weight", Change::None),
];

/// What the converter did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    None,
    MinusOne,
    MinusExp,
    /// Queries, keys and the value heads after them, along the rows.
    Channels,
    HeadRows,
    /// One row a head.
    Heads,
    HeadCols,
}

/// The names of a model's places in GGUF.
pub(super) struct Places {
    num_layers: usize,
    delta: DeltaConfig,
}

impl Places {
    pub fn new(config: &ModelConfig) -> Self {
        Self { num_layers: config.layers.len(), delta: config.delta.clone() }
    }

    /// The file's name of a place.
    pub fn name(&self, place: &str) -> Option<String> {
        self.entry(place).map(|(name, _)| name)
    }

    /// The file's name of a place, and what was done to it.
    fn entry(&self, place: &str) -> Option<(String, Change)> {
        let of = |table: &[(&str, &'static str, Change)], place: &str| {
            table.iter().find(|(name, ..)| *name == place).map(|&(_, own, change)| (own, change))
        };
        if let Some((own, change)) = of(&WHOLE, place) {
            return Some((own.to_string(), change));
        }
        let (block, (own, change)) = if let Some(rest) = place.strip_prefix("mtp.") {
            let found = match rest.strip_prefix("layers.0.") {
                Some(rest) => of(&LAYER, rest),
                None => of(&MTP, rest),
            };
            (self.num_layers, found?)
        } else {
            let (block, rest) = place.strip_prefix("model.layers.")?.split_once('.')?;
            (block.parse().ok()?, of(&LAYER, rest)?)
        };
        Some((format!("{}{own}", block_prefix(block)), change))
    }

    /// The tensor at a place, as the model has it.
    pub fn find(&self, checkpoint: &Checkpoint, place: &str, shape: &[usize]) -> Result<Tensor, Problem> {
        let Some((name, change)) = self.entry(place) else {
            let (found, expected) = ("no name for it in GGUF".into(), format!("shape {shape:?}"));
            return Err(Problem { name: place.into(), found, expected });
        };
        let problem = |found: String, expected: String| Problem { name: name.clone(), found, expected };
        let expected = || format!("shape {shape:?}");
        let tensor = checkpoint.get(&name).ok_or_else(|| problem("nothing".into(), expected()))?;
        // The converter drops and keeps dimensions of 1.
        let dims = |shape: &[usize]| shape.iter().copied().filter(|&dim| dim != 1).collect::<Vec<_>>();
        if dims(&tensor.shape) != dims(shape) {
            return Err(problem(format!("shape {:?}", tensor.shape), expected()));
        }
        let tensor = Tensor { shape: shape.to_vec(), ..tensor };
        self.undo(tensor, change).map_err(|found| problem(found, "numbers of at most 0: -exp(A_log)".into()))
    }

    fn undo(&self, tensor: Tensor, change: Change) -> Result<Tensor, String> {
        let delta = &self.delta;
        let per_k_head = delta.num_v_heads / delta.num_k_heads;
        let order = |start: usize, head_dim: usize| HeadOrder {
            start,
            num_k_heads: delta.num_k_heads,
            per_k_head,
            head_dim,
        };
        let channels = order(2 * delta.key_width(), delta.v_dim);
        let moved = match change {
            Change::None => None,
            Change::MinusOne => {
                let numbers = tensor.to_f32().into_iter().map(|x| x - 1.0).collect();
                return Ok(owned(tensor, numbers));
            }
            Change::MinusExp => {
                let numbers = reordered(&tensor.to_f32(), 1, order(0, 1));
                if let Some((i, x)) = numbers.iter().enumerate().find(|(_, x)| x.is_nan() || **x > 0.0) {
                    return Err(format!("{x} for head {i}"));
                }
                let log = |x: f32| f64::from(-x).ln() as f32;
                return Ok(owned(tensor, numbers.into_iter().map(log).collect()));
            }
            Change::Channels => Some(Moved::Rows(channels)),
            Change::HeadRows => Some(Moved::Rows(order(0, delta.v_dim))),
            Change::Heads => Some(Moved::Rows(order(0, 1))),
            Change::HeadCols => Some(Moved::Cols(order(0, delta.v_dim))),
        };
        let Some(moved) = moved.filter(|_| per_k_head > 1 && delta.num_k_heads > 1) else {
            return Ok(tensor);
        };
        Ok(match moved {
            // Small parameters: `[heads]`, `[channels, 1, taps]`.
            Moved::Rows(order) if tensor.shape.len() != 2 => {
                let unit = tensor.shape[1..].iter().product();
                let numbers = reordered(&tensor.to_f32(), unit, order);
                owned(tensor, numbers)
            }
            moved => with_order(tensor, moved),
        })
    }
}

/// What the names of a block begin with.
pub(super) fn block_prefix(block: usize) -> String {
    format!("blk.{block}.")
}

/// A tensor of a file, under the file's name.
pub(super) fn stored(stored: &Stored) -> Tensor {
    let data = Data::Mapped(Arc::clone(&stored.map), stored.range.clone());
    let tensor = |dtype, shape, data| Tensor { name: stored.name.clone(), dtype, shape, data };
    let shape = stored.shape.clone();
    match stored.kind {
        TensorType::F32 => tensor(DType::F32, shape, data),
        TensorType::F16 => tensor(DType::F16, shape, data),
        TensorType::BF16 => tensor(DType::BF16, shape, data),
        kind => {
            let num_cols = shape.last().copied().unwrap_or(1);
            let row_bytes = num_cols / kind.block_len() * kind.block_bytes();
            let num_rows = stored.range.len() / row_bytes.max(1);
            let codes = tensor(DType::U8, vec![num_rows, row_bytes], data);
            let gguf = Gguf { codes, kind, num_cols, moved: None };
            tensor(DType::F32, shape, Data::Encoded(Arc::new(Encoded::Gguf(gguf))))
        }
    }
}

/// The matrix with heads where the model has them.
fn with_order(tensor: Tensor, moved: Moved) -> Tensor {
    let gguf = match &tensor.data {
        Data::Encoded(encoded) => match encoded.as_ref() {
            Encoded::Gguf(gguf) => Gguf { moved: Some(moved), ..gguf.clone() },
            _ => return tensor,
        },
        _ => {
            let kind = match tensor.dtype {
                DType::F32 => TensorType::F32,
                DType::F16 => TensorType::F16,
                _ => TensorType::BF16,
            };
            let (num_rows, num_cols) = (tensor.num_rows(), tensor.num_cols());
            let shape = vec![num_rows, num_cols * tensor.dtype.size()];
            let codes = Tensor { dtype: DType::U8, shape, ..tensor.clone() };
            Gguf { codes, kind, num_cols, moved: Some(moved) }
        }
    };
    Tensor { data: Data::Encoded(Arc::new(Encoded::Gguf(gguf))), ..tensor }
}

fn reordered(numbers: &[f32], unit: usize, order: HeadOrder) -> Vec<f32> {
    let places = 0..numbers.len() / unit.max(1);
    places.flat_map(|i| &numbers[order.source(i) * unit..][..unit]).copied().collect()
}

fn owned(tensor: Tensor, numbers: Vec<f32>) -> Tensor {
    let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    Tensor { dtype: DType::F32, data: Data::Owned(bytes.into()), ..tensor }
}

impl Resolver<'_> {
    /// Experts that are stacked by projection, as matrices one by one.
    pub(super) fn stacked_experts(
        &mut self,
        prefix: &str,
        num_experts: usize,
        width: usize,
        hidden: usize,
    ) -> Option<ExpertTensors> {
        let mut take = |name: &str, shape: [usize; 2]| {
            self.take(format!("{prefix}{name}"), &[num_experts, shape[0], shape[1]])
        };
        let down = take("down_proj", [hidden, width]);
        let (gate, up, [up_first, stride]) = match self.has(&format!("{prefix}gate_up_proj")) {
            true => {
                let both = self.take(format!("{prefix}gate_up_proj"), &[num_experts, 2 * width, hidden]);
                (both.clone(), both, [width, 2 * width])
            }
            false => {
                let mut take =
                    |name: &str| self.take(format!("{prefix}{name}"), &[num_experts, width, hidden]);
                (take("gate_proj"), take("up_proj"), [0, width])
            }
        };
        let (gate, up, down) = (gate?, up?, down?);
        let rows = |tensor: &Tensor, first: usize, len: usize| tensor.row_slice(first..first + len);
        let triple = |e: usize| ExpertTriple {
            gate_proj: rows(&gate, e * stride, width),
            up_proj: rows(&up, e * stride + up_first, width),
            down_proj: rows(&down, e * hidden, hidden),
        };
        Some(ExpertTensors::PerExpert((0..num_experts).map(triple).collect()))
    }
}
