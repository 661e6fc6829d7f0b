//! Weights that nobody trained: `load_format="dummy"`. A model of any configuration, with the activations and the
//! routing of a trained one in size, so that speed and memory are measured without a download.

use std::sync::{Arc, OnceLock};

use half::bf16;

use super::{DType, Data, Tensor};
use crate::random::mix;

/// Fewer elements are not worth a thread.
const MIN_PIECE: usize = 1 << 16;

/// How the elements of a tensor are drawn, and the elements, once somebody looks at them.
#[derive(Debug)]
pub struct Random {
    seed: u64,
    rule: Rule,
    num_elements: usize,
    drawn: OnceLock<Vec<u8>>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Rule {
    /// Mean and deviation.
    Normal(f32, f32),
    /// The logarithm of 1 to 16: decays as a trained model starts with.
    ALog,
    /// The inverse softplus of time steps of 1/1000 to 1/10.
    DtBias,
}

impl Rule {
    /// By the name in the checkpoint. Scales are about those of a trained model: unit activations inside a layer, a
    /// residual stream that grows slowly, logits some units wide.
    fn of(name: &str, shape: &[usize]) -> Self {
        let fan_in = shape.last().map_or(1.0, |&n| (n.max(1) as f32).sqrt());
        let ends = |ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
        match () {
            () if ends(&[".A_log"]) => Rule::ALog,
            () if ends(&[".dt_bias"]) => Rule::DtBias,
            () if ends(&["linear_attn.norm.weight"]) => Rule::Normal(1.0, 0.1),
            () if shape.len() == 1 => Rule::Normal(0.0, 0.1),
            () if ends(&["embed_tokens.weight"]) => Rule::Normal(0.0, 0.5),
            // What is added to the stream.
            () if ends(&["o_proj.weight", "out_proj.weight", "down_proj", "down_proj.weight"]) => {
                Rule::Normal(0.0, 0.3 / fan_in)
            }
            () if ends(&["mlp.gate.weight"]) => Rule::Normal(0.0, 2.0 / fan_in),
            () if ends(&["lm_head.weight"]) => Rule::Normal(0.0, 3.0 / fan_in),
            () => Rule::Normal(0.0, 1.0 / fan_in),
        }
    }

    /// The element of 48 random bits.
    fn element(self, bits: u64) -> f32 {
        let u = ((bits >> 40) as f32 + 0.5) * (-24f32).exp2();
        match self {
            // Box and Muller 1958; as the device's kernel does it.
            Rule::Normal(mean, deviation) => {
                let turn = (bits & 0xff_ffff) as f32 * (-24f32).exp2();
                let x = (-2.0 * u.ln()).sqrt() * (2.0 * std::f32::consts::PI * turn).cos();
                mean + deviation * x
            }
            Rule::ALog => (1.0 + 15.0 * u).ln(),
            Rule::DtBias => {
                let step = 1e-3 * 100f32.powf(u);
                step + (-(-step).exp_m1()).ln()
            }
        }
    }
}

impl Random {
    /// Seed and deviation, where the elements are normal around zero: a device may draw them itself, by the same
    /// generator.
    pub fn normal(&self) -> Option<(u64, f32)> {
        match self.rule {
            Rule::Normal(0.0, deviation) => Some((self.seed, deviation)),
            _ => None,
        }
    }

    /// So many elements for a part of the tensor, by the rule of the whole: the same for the same part.
    pub(super) fn part(&self, places: impl Iterator<Item = usize>, num_elements: usize) -> Random {
        let seed = places.fold(self.seed, |seed, place| mix(seed ^ place as u64));
        Random { seed, rule: self.rule, num_elements, drawn: OnceLock::new() }
    }

    /// As bf16.
    pub(super) fn bytes(&self) -> &[u8] {
        self.drawn.get_or_init(|| {
            // Of q35_fill_normal: element i depends on the seed and i alone.
            const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
            let key = mix(self.seed);
            let mut bytes = vec![0; 2 * self.num_elements];
            let draw = |first: usize, out: &mut [u8]| {
                for (i, out) in out.chunks_exact_mut(2).enumerate() {
                    // `mix` adds a step of its own.
                    let at = ((first + i) as u64).wrapping_mul(STEP).wrapping_sub(STEP);
                    let bits = mix(key.wrapping_add(at));
                    out.copy_from_slice(&bf16::from_f32(self.rule.element(bits)).to_ne_bytes());
                }
            };
            // Threads of its own: one of a pool that waits here for others might take up a task that waits for this.
            let num_threads = std::thread::available_parallelism().map_or(1, usize::from);
            let piece = self.num_elements.div_ceil(num_threads).max(MIN_PIECE);
            std::thread::scope(|scope| {
                for (i, out) in bytes.chunks_mut(2 * piece).enumerate() {
                    let draw = &draw;
                    scope.spawn(move || draw(i * piece, out));
                }
            });
            bytes
        })
    }
}

impl Tensor {
    /// A tensor of random elements, the same for the same name.
    pub(super) fn random(name: String, shape: &[usize]) -> Self {
        let seed = name.bytes().fold(0, |seed, byte| mix(seed ^ u64::from(byte)));
        let rule = Rule::of(&name, shape);
        let num_elements = shape.iter().product();
        let data = Data::Random(Arc::new(Random { seed, rule, num_elements, drawn: OnceLock::new() }));
        Tensor { name, dtype: DType::BF16, shape: shape.to_vec(), data }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(name: &str, shape: &[usize]) -> Vec<f64> {
        let tensor = Tensor::random(name.into(), shape);
        assert_eq!(tensor.bytes().unwrap().len(), 2 * tensor.num_elements());
        let pairs = tensor.bytes().unwrap().chunks_exact(2);
        pairs.map(|b| f64::from(bf16::from_ne_bytes([b[0], b[1]]).to_f32())).collect()
    }

    #[test]
    fn moments_are_those_of_the_rule() {
        let of = |name: &str, shape: &[usize]| {
            let x = values(name, shape);
            let mean = x.iter().sum::<f64>() / x.len() as f64;
            (mean, (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64).sqrt())
        };
        for (name, shape, want) in [
            ("model.layers.0.mlp.gate.weight", vec![256, 1024], (0.0, 2.0 / 32.0)),
            ("model.layers.0.self_attn.q_proj.weight", vec![300, 1024], (0.0, 1.0 / 32.0)),
            ("model.layers.0.mlp.experts.down_proj", vec![4, 300, 256], (0.0, 0.3 / 16.0)),
            ("model.layers.0.linear_attn.norm.weight", vec![100_000], (1.0, 0.1)),
        ] {
            let (mean, deviation) = of(name, &shape);
            assert!((mean - want.0).abs() < 0.01 * f64::max(want.1, 0.1), "{name}: mean {mean}");
            assert!((deviation / want.1 - 1.0).abs() < 0.01, "{name}: deviation {deviation}");
        }
    }

    #[test]
    fn decays_are_in_their_ranges() {
        let a_log = values("model.layers.0.linear_attn.A_log", &[4096]);
        assert!(a_log.iter().all(|&x| (0.0..=2.79).contains(&x)));
        let softplus = |x: f64| x.exp().ln_1p();
        let steps: Vec<_> =
            values("model.layers.0.linear_attn.dt_bias", &[4096]).into_iter().map(softplus).collect();
        assert!(steps.iter().all(|&x| (0.0009..=0.11).contains(&x)));
    }

    #[test]
    fn many_may_ask_at_once() {
        use rayon::prelude::*;
        for round in 0..20 {
            let tensor = Tensor::random(format!("{round}.weight"), &[700, 700]);
            let sums: Vec<u64> = (0..64)
                .into_par_iter()
                .map(|_| tensor.bytes().unwrap().iter().map(|&b| u64::from(b)).sum())
                .collect();
            assert!(sums.windows(2).all(|pair| pair[0] == pair[1]));
        }
    }

    #[test]
    fn names_decide() {
        let [a, b, c] = ["x.weight", "x.weight", "y.weight"].map(|name| values(name, &[64, 64]));
        assert_eq!(a, b);
        assert_ne!(a, c);
    }
}
