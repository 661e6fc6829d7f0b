//! "Will it fit, and how fast could it be": arithmetic on a configuration alone, or ([`stored`]) on the headers of a
//! checkpoint. Touches no weight and no device. Speeds are floors on time (bytes that must be read over bandwidth), so real
//! speeds lie below them.
//!
//! GB is 1e9 bytes, GiB is 2^30. One decode step of a batch reads each weight it needs once, and for each
//! sequence reads its keys and values and reads and writes its delta-rule and convolution state.

mod caches;
mod family;
mod gpus;
#[cfg(feature = "cuda")]
mod memory;
mod stored;

pub use caches::{CacheBytes, cache_bytes};
pub use family::{FAMILY, family_config};
pub use gpus::{GPUS, Gpu, gpu};
#[cfg(feature = "cuda")]
pub use memory::memory;
pub use stored::stored;

use serde::Serialize;

use crate::backend::{Caches, KvCache, StateType};
use crate::config::{FfnConfig, LayerKind, ModelConfig, VisionConfig};
use crate::weights::quant::Quantization;
use crate::{Error, Result};

const GIB: f64 = (1u64 << 30) as f64;

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

/// What a matrix does, as far as quantisation schemes tell matrices apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Routed experts.
    Experts,
    SharedExpert,
    /// The feed-forward block of a dense model.
    DenseFfn,
    /// The large projections of both mixers.
    Mixer,
    Head,
    /// Embedding rows, norms, routers, gates, convolutions, beta and decay projections.
    Rest,
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

/// Storage of one matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightFormat {
    /// 16 bits.
    Bf16,
    /// 8 bits, and a 16-bit scale per block of 128 x 128.
    Fp8,
    /// 4 bits, and a 16-bit scale and a 4-bit zero point per 128 inputs of a row.
    Int4,
    /// 4 bits, and an 8-bit scale per 16 inputs of a row.
    Nvfp4,
}

impl WeightFormat {
    /// Bytes of a matrix `[rows, cols]`.
    pub fn bytes(self, rows: u64, cols: u64) -> u64 {
        let weights = rows * cols;
        match self {
            WeightFormat::Bf16 => 2 * weights,
            WeightFormat::Fp8 => weights + 2 * rows.div_ceil(128) * cols.div_ceil(128),
            WeightFormat::Int4 => weights.div_ceil(2) + (rows * cols.div_ceil(128) * 5).div_ceil(2),
            WeightFormat::Nvfp4 => weights.div_ceil(2) + rows * cols.div_ceil(16),
        }
    }
}

/// Which matrices of a model are stored how. Embedding, norms, routers, gates, convolutions and the small
/// projections of the DeltaNet layers are 16-bit in every scheme.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scheme {
    /// Everything in 16 bits.
    Bf16,
    /// FP8 for all large matrices, head in 16 bits: the official `-FP8` checkpoints.
    Fp8,
    /// FP8 for all large matrices and the head: `quantization="fp8"`.
    Fp8Head,
    /// Int4 for all large matrices, FP8 for the head: `quantization="int4"`.
    Int4,
    /// Int4 for the routed experts (dense: the feed-forward block) only: the official `-GPTQ-Int4` checkpoints.
    Int4Experts,
    /// NVFP4 for all large matrices, head in 16 bits.
    Nvfp4,
    /// NVFP4 for the routed experts only. Mixture-of-experts models only.
    Nvfp4Experts,
    /// Int4 for the experts, FP8 for the other large matrices and the head: `quantization="mixed"`.
    Mixed,
    /// As a checkpoint's files have them: [`stored`] counts them, no configuration says.
    Stored,
}

impl Scheme {
    /// Every scheme that a configuration is enough for.
    pub const ALL: [Scheme; 8] = [
        Scheme::Bf16,
        Scheme::Fp8,
        Scheme::Fp8Head,
        Scheme::Int4,
        Scheme::Int4Experts,
        Scheme::Nvfp4,
        Scheme::Nvfp4Experts,
        Scheme::Mixed,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Scheme::Bf16 => "bf16",
            Scheme::Fp8 => "fp8",
            Scheme::Fp8Head => "fp8-head",
            Scheme::Int4 => "int4",
            Scheme::Int4Experts => "int4-experts",
            Scheme::Nvfp4 => "nvfp4",
            Scheme::Nvfp4Experts => "nvfp4-experts",
            Scheme::Mixed => "mixed",
            Scheme::Stored => "stored",
        }
    }

    /// The scheme of a name.
    ///
    /// # Errors
    /// `Request` with the list of names.
    pub fn from_name(name: &str) -> Result<Self> {
        let all = || Scheme::ALL.into_iter().chain([Scheme::Stored]);
        all().find(|scheme| scheme.name() == name).ok_or_else(|| {
            let names = all().map(Scheme::name).collect::<Vec<_>>().join(", ");
            Error::request("scheme", name, names)
        })
    }

    fn format(self, role: Role) -> WeightFormat {
        use WeightFormat::{Bf16, Fp8, Int4, Nvfp4};
        let [experts, shared, dense, mixer, head] = match self {
            Scheme::Bf16 | Scheme::Stored => [Bf16; 5],
            Scheme::Fp8 => [Fp8, Fp8, Fp8, Fp8, Bf16],
            Scheme::Fp8Head => [Fp8; 5],
            Scheme::Int4 => [Int4, Int4, Int4, Int4, Fp8],
            Scheme::Int4Experts => [Int4, Bf16, Int4, Bf16, Bf16],
            Scheme::Nvfp4 => [Nvfp4, Nvfp4, Nvfp4, Nvfp4, Bf16],
            Scheme::Nvfp4Experts => [Nvfp4, Bf16, Nvfp4, Bf16, Bf16],
            Scheme::Mixed => [Int4, Int4, Fp8, Fp8, Fp8],
        };
        match role {
            Role::Experts => experts,
            Role::SharedExpert => shared,
            Role::DenseFfn => dense,
            Role::Mixer => mixer,
            Role::Head => head,
            Role::Rest => Bf16,
        }
    }

    /// Whether the scheme says anything about this model.
    pub fn applies_to(self, config: &ModelConfig) -> bool {
        match self {
            Scheme::Nvfp4Experts => matches!(config.ffn, FfnConfig::Moe { .. }),
            scheme => scheme != Scheme::Stored,
        }
    }
}

impl From<Quantization> for Scheme {
    fn from(quantization: Quantization) -> Self {
        match quantization {
            Quantization::Int4 { .. } => Scheme::Int4,
            Quantization::Fp8 => Scheme::Fp8Head,
            Quantization::Mixed { .. } => Scheme::Mixed,
        }
    }
}

/// Bytes of the text model's weights under a scheme.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WeightBytes {
    /// The scheme.
    pub scheme: Scheme,
    /// Held in memory, vision and MTP not counted.
    pub resident: u64,
    /// Read for one token of one sequence.
    pub read_per_token: u64,
}

/// Counts the parameters of a model.
pub fn param_counts(config: &ModelConfig) -> ParamCounts {
    let elements = |m: &Matrices, count: u64| m.rows * m.cols * count;
    let sum = |list: &[Matrices]| list.iter().map(|m| elements(m, m.resident)).sum::<u64>();
    let embedding = config.vocab as u64 * config.hidden as u64;
    let model = text_matrices(config);
    let text = sum(&model) + if config.tied_embeddings { 0 } else { embedding };
    let vision = config.vision.as_ref().map_or(0, vision_params);
    let mtp = if config.num_mtp_layers > 0 { mtp_params(config) } else { 0 };
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
        embedding,
        lm_head: if config.tied_embeddings { 0 } else { embedding },
        attention_mixer: sum(&mixer(config, LayerKind::Attention, 1)),
        delta_net_mixer: sum(&mixer(config, LayerKind::DeltaNet, 1)),
        ffn: sum(&ffn(config, 1)),
        expert,
    }
}

/// Weight bytes of the text model; `None` where the scheme says nothing about this model.
pub fn weight_bytes(config: &ModelConfig, scheme: Scheme) -> Option<WeightBytes> {
    scheme.applies_to(config).then(|| {
        let (mut resident, mut read_per_token) = (0, 0);
        for m in text_matrices(config) {
            let bytes = scheme.format(m.role).bytes(m.rows, m.cols);
            resident += bytes * m.resident;
            read_per_token += bytes * m.read;
        }
        if !config.tied_embeddings {
            resident += 2 * config.vocab as u64 * config.hidden as u64;
        }
        WeightBytes { scheme, resident, read_per_token }
    })
}

/// Experts of a layer that a batch is expected to touch if routing were uniform: `E (1 - (1 - k/E)^B)`.
pub fn expected_experts(num_experts: usize, top_k: usize, batch: usize) -> f64 {
    let e = num_experts as f64;
    e * (1.0 - (1.0 - top_k as f64 / e).powf(batch as f64))
}

/// Bytes that one decode step of `batch` sequences, each `context` tokens long, moves at least.
/// `None` where the scheme says nothing about this model.
pub fn step_bytes(
    config: &ModelConfig,
    scheme: Scheme,
    batch: usize,
    context: usize,
    caches: Caches,
) -> Option<f64> {
    let experts = match config.ffn {
        FfnConfig::Moe { num_experts, top_k, .. } => expected_experts(num_experts, top_k, batch),
        FfnConfig::Dense { .. } => 1.0,
    };
    step_bytes_with(config, scheme, batch, context, caches, experts)
}

/// The same, with the number of experts that the batch touches in a layer.
pub fn step_bytes_with(
    config: &ModelConfig,
    scheme: Scheme,
    batch: usize,
    context: usize,
    caches: Caches,
    experts: f64,
) -> Option<f64> {
    if !scheme.applies_to(config) {
        return None;
    }
    let weights: f64 = text_matrices(config)
        .iter()
        .map(|m| {
            let bytes = scheme.format(m.role).bytes(m.rows, m.cols) as f64;
            let read = match config.ffn {
                FfnConfig::Moe { num_experts, .. } if m.role == Role::Experts => {
                    m.resident as f64 * experts / num_experts as f64
                }
                _ => m.read as f64,
            };
            bytes * read
        })
        .sum();
    Some(weights + batch as f64 * sequence_bytes(config, context, caches))
}

/// Keys and values of one sequence, and its states twice.
fn sequence_bytes(config: &ModelConfig, context: usize, caches: Caches) -> f64 {
    let cache = cache_bytes(config);
    cache.kv(caches).0 as f64 * context as f64 + 2.0 * cache.state_per_seq(caches) as f64
}

/// Every matrix of the text model but the embedding, unless the head is the embedding.
fn text_matrices(config: &ModelConfig) -> Vec<Matrices> {
    let (vocab, hidden) = (config.vocab as u64, config.hidden as u64);
    let num_layers = config.layers.len() as u64;
    let mut list = vec![
        all(Role::Head, vocab, hidden, 1),
        // Two norms a layer, and the final one.
        all(Role::Rest, 1, hidden, 2 * num_layers + 1),
    ];
    for kind in [LayerKind::Attention, LayerKind::DeltaNet] {
        list.extend(mixer(config, kind, config.num_layers_of(kind) as u64));
    }
    list.extend(ffn(config, num_layers));
    list
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

fn ffn(config: &ModelConfig, layers: u64) -> Vec<Matrices> {
    let hidden = config.hidden as u64;
    match config.ffn {
        FfnConfig::Dense { width } => vec![
            all(Role::DenseFfn, width as u64, hidden, 2 * layers),
            all(Role::DenseFfn, hidden, width as u64, layers),
        ],
        FfnConfig::Moe { num_experts, top_k, expert_width, shared_width } => {
            let (e, k) = (num_experts as u64 * layers, top_k as u64 * layers);
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
fn mtp_params(config: &ModelConfig) -> u64 {
    let hidden = config.hidden as u64;
    let mut layer = mixer(config, LayerKind::Attention, 1);
    layer.extend(ffn(config, 1));
    let layer: u64 = layer.iter().map(|m| m.rows * m.cols * m.resident).sum();
    2 * hidden * hidden + 3 * hidden + layer + 2 * hidden
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

/// What a plan assumes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlanOptions {
    /// Tokens per sequence, for the number of sequences and for the speed.
    pub context: usize,
    /// Keys and values in fp8 in place of bf16.
    pub fp8_kv: bool,
    /// Recurrent states in f16 in place of f32.
    pub f16_state: bool,
    /// Hold the vision tower (bf16).
    pub with_vision: bool,
    /// Hold the MTP module (bf16) and its cache.
    pub with_mtp: bool,
    /// Share of a card's memory that may be used.
    pub memory_utilization: f64,
    /// GiB per card kept for the CUDA context, workspaces and activations.
    pub reserve_gib: f64,
}

impl Default for PlanOptions {
    fn default() -> Self {
        PlanOptions {
            context: 8192,
            fp8_kv: false,
            f16_state: false,
            with_vision: false,
            with_mtp: false,
            memory_utilization: 0.95,
            reserve_gib: 1.5,
        }
    }
}

impl PlanOptions {
    /// How pages and slots are held.
    pub fn caches(&self) -> Caches {
        Caches {
            kv: if self.fp8_kv { KvCache::Fp8 } else { KvCache::Auto },
            state: if self.f16_state { StateType::F16 } else { StateType::F32 },
        }
    }
}

/// One scheme on a number of cards of one kind, split evenly (tensor parallel).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlanRow {
    /// The card.
    pub gpu: &'static str,
    /// Number of cards.
    pub num_cards: usize,
    /// How the weights are stored.
    pub scheme: Scheme,
    /// Weights on each card, in GiB.
    pub weights_gib_per_card: f64,
    /// Memory of each card that is left for sequences, in GiB; negative where the weights do not fit.
    pub free_gib_per_card: f64,
    /// Whether at least one sequence of one token fits.
    pub fits: bool,
    /// Longest single sequence in tokens, at most the model's own limit.
    pub max_context: usize,
    /// Sequences of `context` tokens that fit at once.
    pub max_seqs: usize,
    /// Tokens per second of one sequence of `context` tokens that the bandwidth allows at most.
    pub decode_limit_tokens_per_s: f64,
}

/// The answer of `plan` for one model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// Parameters.
    pub params: ParamCounts,
    /// Cache and state.
    pub cache: CacheBytes,
    /// Weight bytes under each scheme that applies.
    pub weights: Vec<WeightBytes>,
    /// What the rows assume.
    pub options: PlanOptions,
    /// One row per card, number of cards and scheme.
    pub rows: Vec<PlanRow>,
}

/// Plans a model on each of `gpus`, for each of `card_counts` and each of `weights`.
///
/// Weights and delta-rule states are split evenly; keys and values by whole heads, so more cards than
/// heads hold copies.
///
/// # Errors
/// `Request` for a context of 0, a number of cards of 0, or a share of memory outside `(0, 1]`.
pub fn plan(
    config: &ModelConfig,
    gpus: &[Gpu],
    card_counts: &[usize],
    weights: Vec<WeightBytes>,
    options: &PlanOptions,
) -> Result<Plan> {
    if options.context == 0 || options.context > config.max_context() {
        let allowed = format!("from 1 to {}, the model's longest context", config.max_context());
        return Err(Error::request("context", options.context, allowed));
    }
    let utilization = options.memory_utilization;
    if !(utilization > 0.0 && utilization <= 1.0) {
        return Err(Error::request("memory_utilization", utilization, "above 0, at most 1"));
    }
    if !(options.reserve_gib >= 0.0 && options.reserve_gib.is_finite()) {
        return Err(Error::request("reserve_gib", options.reserve_gib, "0 or more"));
    }
    if card_counts.contains(&0) {
        return Err(Error::request("card_counts", 0, "1 or more"));
    }
    let mut rows = Vec::new();
    for gpu in gpus {
        for &num_cards in card_counts {
            for weights in &weights {
                rows.push(row(config, gpu, num_cards, weights, options));
            }
        }
    }
    Ok(Plan {
        params: param_counts(config),
        cache: cache_bytes(config),
        weights,
        options: options.clone(),
        rows,
    })
}

fn row(
    config: &ModelConfig,
    gpu: &Gpu,
    num_cards: usize,
    weights: &WeightBytes,
    options: &PlanOptions,
) -> PlanRow {
    let cards = num_cards as f64;
    let params = param_counts(config);
    let extra = if options.with_vision { 2 * params.vision } else { 0 }
        + if options.with_mtp { 2 * params.mtp } else { 0 };
    let weights_per_card = (weights.resident + extra) as f64 / cards;
    let usable = gpu.memory_gib * GIB * options.memory_utilization - options.reserve_gib * GIB;
    let free = usable - weights_per_card;

    let cache = cache_bytes(config);
    let caches = options.caches();
    let (kv, mtp_kv) = cache.kv(caches);
    let kv = kv + if options.with_mtp { mtp_kv } else { 0 };
    let kv_per_card = kv as f64 / cards.min(config.attention.num_kv_heads as f64);
    let state_per_card = cache.state_per_seq(caches) as f64 / cards;
    let max_context = if kv_per_card > 0.0 { (free - state_per_card) / kv_per_card } else { f64::MAX };
    // A float to integer cast saturates, and turns what is below zero into zero.
    let max_context = (max_context.floor() as usize).min(config.max_context());
    let per_seq = state_per_card + kv_per_card * options.context as f64;
    let max_seqs = (free / per_seq).floor() as usize;
    let bytes = weights.read_per_token as f64 + sequence_bytes(config, options.context, caches);
    let fits = free >= state_per_card + kv_per_card;
    PlanRow {
        gpu: gpu.name,
        num_cards,
        scheme: weights.scheme,
        weights_gib_per_card: weights_per_card / GIB,
        free_gib_per_card: free / GIB,
        fits,
        max_context: if fits { max_context } else { 0 },
        max_seqs: if fits { max_seqs } else { 0 },
        decode_limit_tokens_per_s: if fits { gpu.bandwidth_gbs * 1e9 * cards / bytes } else { 0.0 },
    }
}

#[cfg(test)]
mod tests;
