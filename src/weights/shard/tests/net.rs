//! What ranks compute, in f64: a little of each layer, with every one of its tensors that is cut.

use super::{attention, delta, ffn, shards, triples};
use crate::config::ModelConfig;
use crate::weights::{FfnTensors, LayerTensors, MixerTensors, Tensor};

type Vector = Vec<f64>;

fn numbers(tensor: &Tensor) -> Vector {
    tensor.to_f32().into_iter().map(f64::from).collect()
}

fn times(tensor: &Tensor, x: &[f64]) -> Vector {
    let row = |row: &[f64]| row.iter().zip(x).map(|(w, x)| w * x).sum();
    assert_eq!(tensor.num_cols(), x.len());
    numbers(tensor).chunks(x.len()).map(row).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn add(sum: &mut Vector, x: &[f64]) {
    sum.resize(x.len(), 0.0);
    sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
}

fn swiglu(gate: &Tensor, up: &Tensor, down: &Tensor, x: &[f64]) -> Vector {
    let pairs = times(gate, x).into_iter().zip(times(up, x));
    times(down, &pairs.map(|(gate, up)| gate * sigmoid(gate) * up).collect::<Vec<_>>())
}

/// One token that attends to itself alone, with its score in place of its softmax, so that queries and keys matter.
fn attention(layer: &LayerTensors, config: &ModelConfig, x: &[f64]) -> Vector {
    let (dims, d) = (&config.attention, config.attention.head_dim);
    let [q, k, v] = [attention!(layer, q_proj), attention!(layer, k_proj), attention!(layer, v_proj)]
        .map(|tensor| times(tensor, x));
    let mut heads = Vec::new();
    for head in 0..dims.num_q_heads {
        let kv = head / (dims.num_q_heads / dims.num_kv_heads) * d;
        let (q, gate) = q[2 * head * d..2 * (head + 1) * d].split_at(d);
        let score = dot(q, &k[kv..kv + d]).tanh();
        heads.extend(v[kv..kv + d].iter().zip(gate).map(|(v, gate)| score * v * sigmoid(*gate)));
    }
    times(attention!(layer, o_proj), &heads)
}

/// The first token of a sequence.
fn delta_net(layer: &LayerTensors, config: &ModelConfig, x: &[f64]) -> Vector {
    let dims = &config.delta;
    let taps = numbers(delta!(layer, conv1d));
    let last = taps.chunks(dims.conv_kernel).map(|taps| taps[dims.conv_kernel - 1]);
    let mixed: Vector = times(delta!(layer, in_proj_qkv), x).iter().zip(last).map(|(x, w)| x * w).collect();
    let [z, b, a] = [delta!(layer, in_proj_z), delta!(layer, in_proj_b), delta!(layer, in_proj_a)]
        .map(|tensor| times(tensor, x));
    let (a_log, dt_bias) = (numbers(delta!(layer, a_log)), numbers(delta!(layer, dt_bias)));
    let (keys, values) = (dims.key_width(), dims.v_dim);
    let mut heads = Vec::new();
    for head in 0..dims.num_v_heads {
        let key = head / (dims.num_v_heads / dims.num_k_heads) * dims.k_dim;
        let (q, k) = (&mixed[key..key + dims.k_dim], &mixed[keys + key..keys + key + dims.k_dim]);
        let v = &mixed[2 * keys + head * values..][..values];
        let size =
            dot(q, k).tanh() * sigmoid(b[head]) * (a_log[head] * (a[head] + dt_bias[head]).tanh()).exp();
        heads.extend(v.iter().zip(&z[head * values..]).map(|(v, z)| size * v * z * sigmoid(*z)));
    }
    times(delta!(layer, out_proj), &heads)
}

/// Every expert, weighted by the router's logit of it; `first` is the first that is held.
fn experts(layer: &LayerTensors, first: usize, x: &[f64]) -> Vector {
    let logits = times(ffn!(layer, Moe, gate), x);
    let mut sum = Vec::new();
    for (e, triple) in triples(ffn!(layer, Moe, experts)).iter().enumerate() {
        let y = swiglu(&triple.gate_proj, &triple.up_proj, &triple.down_proj, x);
        let weight = sigmoid(logits[first + e]);
        add(&mut sum, &y.iter().map(|y| weight * y).collect::<Vec<_>>());
    }
    let (gate, up) = (ffn!(layer, Moe, shared_gate_proj), ffn!(layer, Moe, shared_up_proj));
    let gated = sigmoid(times(ffn!(layer, Moe, shared_expert_gate), x)[0]);
    let y = swiglu(gate, up, ffn!(layer, Moe, shared_down_proj), x);
    add(&mut sum, &y.iter().map(|y| gated * y).collect::<Vec<_>>());
    sum
}

/// What a mixer and what a feed-forward block say of `x`.
fn blocks(layer: &LayerTensors, config: &ModelConfig, first_expert: usize, x: &[f64]) -> [Vector; 2] {
    let mixer = match layer.mixer {
        MixerTensors::Attention { .. } => attention(layer, config, x),
        MixerTensors::DeltaNet { .. } => delta_net(layer, config, x),
    };
    let ffn = match &layer.ffn {
        FfnTensors::Dense { gate_proj, up_proj, down_proj } => swiglu(gate_proj, up_proj, down_proj, x),
        FfnTensors::Moe { .. } => experts(layer, first_expert, x),
    };
    [mixer, ffn]
}

/// That the sum over ranks is what the whole layer gives.
pub fn check_sums(whole: &LayerTensors, parts: &[LayerTensors], config: &ModelConfig, expert_parallel: bool) {
    let x: Vector = (0..config.hidden).map(|i| (i as f64 * 0.7 + 0.3).sin() / 8.0).collect();
    let want = blocks(whole, config, 0, &x);
    let mut sums = [Vec::new(), Vec::new()];
    for (shard, part) in shards(parts.len(), expert_parallel).zip(parts) {
        let local = config.sharded(shard).unwrap();
        let first = match config.ffn {
            crate::config::FfnConfig::Moe { num_experts, .. } => shard.experts(num_experts).start,
            crate::config::FfnConfig::Dense { .. } => 0,
        };
        let own = blocks(part, &local, first, &x);
        sums.iter_mut().zip(&own).for_each(|(sum, own)| add(sum, own));
    }
    for (sum, want) in sums.iter().zip(&want) {
        let size = want.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
        assert!(size > 0.0 && size.is_finite());
        assert!(sum.iter().zip(want).all(|(a, b)| (a - b).abs() <= 1e-10 * size), "{sum:?} {want:?}");
    }
}
