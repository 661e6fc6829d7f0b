//! The matrices of a model, or of one rank's part of it ([`Part`]): their parameters, their bytes, and what of them a step
//! reads.

use serde::Serialize;

use super::cache_bytes;
use super::formats::{Role, Scheme};
use crate::Result;
use crate::backend::Caches;
use crate::config::{FfnConfig, LayerKind, ModelConfig, Shard, VisionConfig};

/// Numbers of parameters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ParamCounts {
    /// The text model: embedding, layers, final norm, and the head unless it is tied.
    pub text: u64,
    /// The vision tower; 0 without one.
    pub vision: u64,
    /// The multi-token-prediction module; 0 without one.
    pub mtp: u64,
    /// All of the above.
    pub total: u64,
    /// Weights of the text model that one token reads: all but the embedding (of which it reads a row) and
    /// the experts it is not sent to. A tied head counts.
    pub active: u64,
    /// The embedding.
    pub embedding: u64,
    /// The head; 0 when tied.
    pub lm_head: u64,
    /// One attention mixer.
    pub attention_mixer: u64,
    /// One Gated DeltaNet mixer.
    pub delta_net_mixer: u64,
    /// The feed-forward block of one layer.
    pub ffn: u64,
    /// One routed expert; 0 in a dense model.
    pub expert: u64,
}

/// Matrices of one shape: how many there are, and how many a token reads.
struct Matrices {
    role: Role,
    rows: u64,
    cols: u64,
    resident: u64,
    /// Experts are read by choice, so this is the number for a batch of one.
    read: u64,
}

/// Bytes of the text model's weights under a scheme, or of one rank's part of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WeightBytes {
    /// The scheme.
    pub scheme: Scheme,
    /// Held in memory, vision and MTP not counted.
    pub resident: u64,
    /// Read for one token of one sequence.
    pub read_per_token: u64,
    /// Of the routed experts, all of which are held; 0 in a dense model.
    pub experts: u64,
}

impl WeightBytes {
    /// Read in a step whose tokens hit so many experts of a layer, counted over all ranks.
    fn read(&self, config: &ModelConfig, experts_hit: f64) -> f64 {
        let more = match config.ffn {
            FfnConfig::Moe { num_experts, top_k, .. } => (experts_hit - top_k as f64) / num_experts as f64,
            FfnConfig::Dense { .. } => 0.0,
        };
        self.read_per_token as f64 + self.experts as f64 * more
    }
}

/// What is counted: a model, or one rank's part of it. All ranks' parts are the same size.
#[derive(Debug, Clone)]
pub struct Part {
    /// Its own geometry.
    config: ModelConfig,
    shard: Shard,
}

impl Part {
    /// The part that a rank has of a model of this configuration.
    ///
    /// # Errors
    /// As [`ModelConfig::sharded`].
    pub fn new(config: &ModelConfig, shard: Shard) -> Result<Self> {
        Ok(Part { config: config.sharded(shard)?, shard })
    }

    /// All of it.
    pub fn whole(config: &ModelConfig) -> Self {
        Part { config: config.clone(), shard: Shard::whole() }
    }

    /// Its geometry ([`ModelConfig::sharded`]).
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Whose it is.
    pub fn shard(&self) -> Shard {
        self.shard
    }

    /// Rows of the head that are here.
    fn head_rows(&self) -> u64 {
        self.shard.head_rows(self.config.vocab).len() as u64
    }

    /// Whether the embedding is held beside the head, and not as the head.
    pub(super) fn has_embedding(&self) -> bool {
        !self.config.tied_embeddings || self.head_rows() < self.config.vocab as u64
    }

    /// Counts its parameters; those of the vision tower are not divided.
    pub fn params(&self) -> ParamCounts {
        let config = &self.config;
        let elements = |m: &Matrices, count: u64| m.rows * m.cols * count;
        let sum = |list: &[Matrices]| list.iter().map(|m| elements(m, m.resident)).sum::<u64>();
        let (vocab, hidden) = (config.vocab as u64, config.hidden as u64);
        let model = self.text_matrices();
        let text = sum(&model) + if self.has_embedding() { vocab * hidden } else { 0 };
        let vision = config.vision.as_ref().map_or(0, vision_params);
        let mtp = if config.num_mtp_layers > 0 { self.mtp_params() } else { 0 };
        let expert = match config.ffn {
            FfnConfig::Moe { expert_width, .. } => 3 * (expert_width * config.hidden) as u64,
            FfnConfig::Dense { .. } => 0,
        };
        ParamCounts {
            text,
            vision,
            mtp,
            total: text + vision + mtp,
            active: model.iter().map(|m| elements(m, m.read)).sum(),
            embedding: vocab * hidden,
            lm_head: if self.has_embedding() { self.head_rows() * hidden } else { 0 },
            attention_mixer: sum(&mixer(config, LayerKind::Attention, 1)),
            delta_net_mixer: sum(&mixer(config, LayerKind::DeltaNet, 1)),
            ffn: sum(&self.ffn(1)),
            expert,
        }
    }

    /// Bytes of its weights; `None` where the scheme says nothing about this model.
    pub fn weights(&self, scheme: Scheme) -> Option<WeightBytes> {
        scheme.applies_to(&self.config).then(|| {
            let (mut resident, mut read_per_token, mut experts) = (0, 0, 0);
            for m in self.text_matrices() {
                let bytes = scheme.format(m.role).bytes(m.rows, m.cols);
                resident += bytes * m.resident;
                read_per_token += bytes * m.read;
                if m.role == Role::Experts {
                    experts += bytes * m.resident;
                }
            }
            if self.has_embedding() {
                resident += 2 * self.config.vocab as u64 * self.config.hidden as u64;
            }
            WeightBytes { scheme, resident, read_per_token, experts }
        })
    }

    /// Bytes that one decode step of `batch` sequences, each `context` tokens long, moves at least: weights once, each
    /// sequence's keys and values, and its states twice. `experts_hit`: experts of a layer that the batch touches, over all
    /// ranks; `None` for as many as under uniform routing ([`expected_experts`]).
    pub fn step_bytes(
        &self,
        weights: &WeightBytes,
        batch: usize,
        context: usize,
        caches: Caches,
        experts_hit: Option<f64>,
    ) -> f64 {
        let experts_hit = experts_hit.unwrap_or(match self.config.ffn {
            FfnConfig::Moe { num_experts, top_k, .. } => expected_experts(num_experts, top_k, batch),
            FfnConfig::Dense { .. } => 0.0,
        });
        let cache = cache_bytes(&self.config);
        let sequence = cache.kv(caches).0 as f64 * context as f64 + 2.0 * cache.state_per_seq(caches) as f64;
        weights.read(&self.config, experts_hit) + batch as f64 * sequence
    }

    /// Every matrix of the text model but the embedding, unless the head is the embedding.
    fn text_matrices(&self) -> Vec<Matrices> {
        let config = &self.config;
        let (hidden, num_layers) = (config.hidden as u64, config.layers.len() as u64);
        let mut list = vec![
            all(Role::Head, self.head_rows(), hidden, 1),
            // Two norms a layer, and the final one.
            all(Role::Rest, 1, hidden, 2 * num_layers + 1),
        ];
        for kind in [LayerKind::Attention, LayerKind::DeltaNet] {
            list.extend(mixer(config, kind, config.num_layers_of(kind) as u64));
        }
        list.extend(self.ffn(num_layers));
        list
    }

    fn ffn(&self, layers: u64) -> Vec<Matrices> {
        let hidden = self.config.hidden as u64;
        match self.config.ffn {
            FfnConfig::Dense { width } => vec![
                all(Role::DenseFfn, width as u64, hidden, 2 * layers),
                all(Role::DenseFfn, hidden, width as u64, layers),
            ],
            FfnConfig::Moe { num_experts, top_k, expert_width, shared_width } => {
                let here = self.shard.experts(num_experts).len();
                // Of a token's experts those that are here, on average.
                let (e, k) = (here as u64 * layers, (top_k * here) as u64 * layers / num_experts as u64);
                let (m, s) = (expert_width as u64, shared_width as u64);
                vec![
                    Matrices { role: Role::Experts, rows: m, cols: hidden, resident: 2 * e, read: 2 * k },
                    Matrices { role: Role::Experts, rows: hidden, cols: m, resident: e, read: k },
                    all(Role::SharedExpert, s, hidden, 2 * layers),
                    all(Role::SharedExpert, hidden, s, layers),
                    all(Role::Rest, num_experts as u64 + 1, hidden, layers),
                ]
            }
        }
    }

    /// `fc`, three norms, and one attention layer with the model's feed-forward block.
    fn mtp_params(&self) -> u64 {
        let hidden = self.config.hidden as u64;
        let mut layer = mixer(&self.config, LayerKind::Attention, 1);
        layer.extend(self.ffn(1));
        let layer: u64 = layer.iter().map(|m| m.rows * m.cols * m.resident).sum();
        2 * hidden * hidden + 3 * hidden + layer + 2 * hidden
    }
}

/// Experts of a layer that a batch is expected to touch if routing were uniform: `E (1 - (1 - k/E)^B)`.
pub fn expected_experts(num_experts: usize, top_k: usize, batch: usize) -> f64 {
    let e = num_experts as f64;
    e * (1.0 - (1.0 - top_k as f64 / e).powf(batch as f64))
}

fn all(role: Role, rows: u64, cols: u64, count: u64) -> Matrices {
    Matrices { role, rows, cols, resident: count, read: count }
}

fn mixer(config: &ModelConfig, kind: LayerKind, layers: u64) -> Vec<Matrices> {
    let hidden = config.hidden as u64;
    match kind {
        LayerKind::Attention => {
            let (q, kv) = (config.attention.q_width() as u64, config.attention.kv_width() as u64);
            vec![
                all(Role::Mixer, 2 * q, hidden, layers),
                all(Role::Mixer, kv, hidden, 2 * layers),
                all(Role::Mixer, hidden, q, layers),
                all(Role::Rest, 1, config.attention.head_dim as u64, 2 * layers),
            ]
        }
        LayerKind::DeltaNet => {
            let delta = &config.delta;
            let (channels, width) = (delta.conv_channels() as u64, delta.value_width() as u64);
            let heads = delta.num_v_heads as u64;
            vec![
                all(Role::Mixer, channels, hidden, layers),
                all(Role::Mixer, width, hidden, layers),
                all(Role::Mixer, hidden, width, layers),
                all(Role::Rest, heads, hidden, 2 * layers),
                all(Role::Rest, channels, delta.conv_kernel as u64, layers),
                all(Role::Rest, 1, heads, 2 * layers),
                all(Role::Rest, 1, delta.v_dim as u64, layers),
            ]
        }
    }
}

fn vision_params(vision: &VisionConfig) -> u64 {
    let of = |n: usize| n as u64;
    let (h, f, out) = (of(vision.hidden), of(vision.width), of(vision.out_hidden));
    let patch = h * of(vision.in_channels * vision.temporal_patch * vision.patch * vision.patch) + h;
    let positions = of(vision.num_positions) * h;
    // Two norms with bias; qkv, proj, fc1, fc2 with bias.
    let block = 4 * h + (3 * h * h + 3 * h) + (h * h + h) + (f * h + f) + (h * f + h);
    let merged = h * of(vision.merge * vision.merge);
    let merger = 2 * h + (merged * merged + merged) + (out * merged + out);
    patch + positions + of(vision.depth) * block + merger
}
