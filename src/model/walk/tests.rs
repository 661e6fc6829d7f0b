//! What a walk shows, against the weights of the layer in f64; and where it arrives, against the forward.

use std::path::PathBuf;

use super::{Input, Walk};
use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::batch::{BatchLimits, DraftBatch};
use crate::config::ModelConfig;
use crate::model::Model;
use crate::weights::{Checkpoint, FfnTensors, LayerTensors, MixerTensors, ModelTensors, MtpTensors, Tensor};

fn open(name: &str) -> (ModelConfig, ModelTensors, Option<MtpTensors>) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data").join(name);
    let config = ModelConfig::from_dir(&path).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let tensors = ModelTensors::resolve(&checkpoint, &config).unwrap();
    let module = (config.num_mtp_layers > 0).then(|| MtpTensors::resolve(&checkpoint, &config).unwrap());
    (config, tensors, module)
}

fn ids(len: usize, salt: usize, vocab: usize) -> Vec<u32> {
    (0..len).map(|i| ((i * 37 + salt * 101 + i * i) % vocab) as u32).collect()
}

/// `x Wᵀ` of rows.
fn product(x: &[f32], w: &Tensor) -> Vec<f64> {
    let (k, w) = (w.num_cols(), w.to_f32());
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
    x.chunks(k).flat_map(|x| w.chunks(k).map(move |w| dot(x, w)).collect::<Vec<_>>()).collect()
}

fn rms_norm(x: &[f64], w: &Tensor, eps: f32) -> Vec<f64> {
    let w = w.to_f32();
    x.chunks(w.len())
        .flat_map(|x| {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
            let scale = (mean + f64::from(eps)).sqrt().recip();
            x.iter().zip(&w).map(|(x, w)| x * scale * (1.0 + f64::from(*w))).collect::<Vec<_>>()
        })
        .collect()
}

fn silu_mul(gate: &[f64], up: &[f64]) -> Vec<f64> {
    gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
}

#[track_caller]
fn near(got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(0.0, |most, x| f64::max(most, x.abs()));
    let off = got.iter().zip(want).fold(0.0, |most, (&x, y)| f64::max(most, (f64::from(x) - y).abs()));
    assert!(largest > 0.0 && off < 1e-4 * largest, "{off} of {largest}");
}

/// All that was shown of a sequence.
#[derive(Default)]
struct Seen {
    mixer: Vec<f32>,
    mixer_out: Vec<f32>,
    ffn: Vec<f32>,
    down: Vec<f32>,
    assignments: Vec<(Option<usize>, usize, Vec<f32>)>,
}

impl Seen {
    fn take(all: &mut Vec<Seen>, input: Input<'_, Cpu>, hidden: usize) {
        match input {
            Input::Mixer(x) => all.push(Seen { mixer: x.to_vec(), ..Seen::default() }),
            Input::MixerOut(x) => all.last_mut().unwrap().mixer_out = x.to_vec(),
            Input::Down(x) => all.last_mut().unwrap().down = x.to_vec(),
            Input::Ffn(x, scratch) => {
                let last = all.last_mut().unwrap();
                last.ffn = x.to_vec();
                let all = scratch.assignments(x.len() / hidden);
                last.assignments = all.map(|(e, t, act)| (e, t, act.to_vec())).collect();
            }
        }
    }

    /// Against the layer's weights, on a residual stream.
    fn check(&self, layer: &LayerTensors, before: &[f32], config: &ModelConfig) {
        let eps = config.rms_eps;
        let mut residual: Vec<f64> = before.iter().map(|&x| f64::from(x)).collect();
        near(&self.mixer, &rms_norm(&residual, &layer.input_layernorm, eps));
        let out = match &layer.mixer {
            MixerTensors::Attention { o_proj, .. } => o_proj,
            MixerTensors::DeltaNet { out_proj, .. } => out_proj,
        };
        residual.iter_mut().zip(product(&self.mixer_out, out)).for_each(|(r, x)| *r += x);
        near(&self.ffn, &rms_norm(&residual, &layer.post_attention_layernorm, eps));
        match &layer.ffn {
            FfnTensors::Dense { gate_proj, up_proj, .. } => {
                near(&self.down, &silu_mul(&product(&self.ffn, gate_proj), &product(&self.ffn, up_proj)));
            }
            FfnTensors::Moe { gate, experts, shared_gate_proj, shared_up_proj, .. } => {
                let num_experts = gate.num_rows();
                let (n, logits) = (self.ffn.len() / config.hidden, product(&self.ffn, gate));
                let gate_up = &experts.gate_up();
                assert_eq!(gate_up.len(), 1, "these are stacked");
                let width = gate_up[0].num_rows() / num_experts / 2;
                let mut routed = vec![Vec::new(); n];
                for (expert, t, act) in &self.assignments {
                    let x = &self.ffn[t * config.hidden..(t + 1) * config.hidden];
                    let (gate, up) = match expert {
                        Some(e) => {
                            routed[*t].push(logits[t * num_experts + e]);
                            let all = product(x, &gate_up[0]);
                            let (gate, up) = all[2 * e * width..][..2 * width].split_at(width);
                            (gate.to_vec(), up.to_vec())
                        }
                        None => (product(x, shared_gate_proj), product(x, shared_up_proj)),
                    };
                    near(&act[..gate.len()], &silu_mul(&gate, &up));
                }
                // Those of the largest logits, and the shared expert once a token.
                for (logits, routed) in logits.chunks(num_experts).zip(&routed) {
                    let least = routed.iter().copied().fold(f64::INFINITY, f64::min);
                    let larger = logits.iter().filter(|x| **x > least + 1e-6).count();
                    assert!(larger < routed.len() && !routed.is_empty());
                }
                assert_eq!(self.assignments.iter().filter(|(e, ..)| e.is_none()).count(), n);
            }
        }
    }
}

#[test]
fn inputs_are_those_of_the_layers() {
    for name in ["dense_bf16", "moe_bf16", "moe_vision_mtp"] {
        let (config, tensors, module) = open(name);
        let sequences = [ids(70, 1, 140), ids(70, 2, 140)];
        let slices: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
        let mut walk = Walk::new(&config, &tensors.embed_tokens, &slices, Cpu::default()).unwrap();
        let residuals = |walk: &mut Walk<'_, Cpu>, n: usize| -> Vec<Vec<f32>> {
            walk.residuals.iter_mut().map(|x| walk.backend.read(x, n).to_vec()).collect()
        };
        for layer in &tensors.layers {
            let before = residuals(&mut walk, 70);
            let mut seen = Vec::new();
            walk.layer(layer, |input| {
                Seen::take(&mut seen, input, config.hidden);
                Ok(())
            })
            .unwrap();
            assert_eq!(seen.len(), 2);
            seen.iter().zip(&before).for_each(|(seen, before)| seen.check(layer, before, &config));
        }

        // Where the layers end, and the module's: at the model's own logits.
        let mut model = Model::load(&config, tensors.clone(), None, Cpu::default(), |_, _| Ok(())).unwrap();
        if let Some(module) = &module {
            model = model.with_mtp(module.clone(), None).unwrap();
        }
        let ends = residuals(&mut walk, 70);
        let mut drafts = Vec::new();
        if let Some(module) = &module {
            let mut seen = Vec::new();
            walk.module(&tensors.norm, module, |input| {
                Seen::take(&mut seen, input, config.hidden);
                Ok(())
            })
            .unwrap();
            assert_eq!((seen.len(), seen[0].mixer.len()), (2, 69 * config.hidden));
            drafts = residuals(&mut walk, 69);
        }
        let limits = BatchLimits { max_tokens: 70, max_seqs: 1, max_len: 70, max_pages: 2 };
        let (mut w, mut memory) = (model.workspace(&limits).unwrap(), model.memory(2, 1).unwrap());
        for (i, ids) in sequences.iter().enumerate() {
            let logits_of = |residual: &[f32], norm: &Tensor| {
                let residual: Vec<f64> = residual.iter().map(|&x| f64::from(x)).collect();
                let x: Vec<f32> =
                    rms_norm(&residual, norm, config.rms_eps).iter().map(|&x| x as f32).collect();
                product(&x, tensors.lm_head.as_ref().unwrap_or(&tensors.embed_tokens))
            };
            let mut batch = super::sequence(ids);
            batch.logit_rows = (0..70).collect();
            model.clear_slot(&mut memory, 0);
            model.forward(&batch, &mut memory, &mut w, || Ok(())).unwrap();
            let last: Vec<usize> = (60..70).collect();
            let want = logits_of(&ends[i][60 * config.hidden..], &tensors.norm);
            model.compute_logits(&last, None, &mut w);
            near(&model.read_logits(last.len(), &mut w), &want);
            if let Some(module) = &module {
                let batch = DraftBatch { batch: super::sequence(&ids[1..]), hidden_rows: (0..69).collect() };
                model.forward_mtp(&batch, &mut memory, &mut w, || Ok(())).unwrap();
                let want = logits_of(&drafts[i][60 * config.hidden..], &module.norm);
                model.compute_logits(&last[..9], None, &mut w);
                near(&model.read_logits(9, &mut w), &want);
            }
        }
    }
}
