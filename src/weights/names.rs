//! The one map from checkpoint names to places in the net. Names are the checkpoint's, to the letter.

use std::collections::HashSet;

use super::gguf::Places;
use super::quant::{self, Problem};
use super::{
    Checkpoint, ExpertTensors, ExpertTriple, FfnTensors, LayerTensors, MixerTensors, ModelTensors, Tensor,
};
use crate::config::{FfnConfig, LayerKind, ModelConfig, QuantConfig};
use crate::{Error, Result};

/// Prefixes of the text model: releases with a vision tower, and text-only exports. Exports that say
/// `language_model.model.` come from a library that adds one to the norm weights, so they are not taken.
const PREFIXES: [&str; 2] = ["model.language_model.", "model."];
const VISION_PREFIXES: [&str; 2] = ["model.visual.", "visual."];
pub(super) const MTP_PREFIX: &str = "mtp.";
const LM_HEAD: &str = "lm_head.weight";
/// What all parts of it begin with, should it be encoded.
const LM_HEAD_PARTS: &str = "lm_head.";

impl ModelTensors {
    /// Finds every tensor that `config` asks for, and checks shape and dtype of each. A matrix may be encoded in any of
    /// the forms that the configuration's `quantization_config` allows, whatever the matrices beside it are.
    ///
    /// Accepts experts fused or one by one, layer by layer. Tensors of the vision tower and of the MTP
    /// module are kept aside. With tied embeddings, an `lm_head.weight` that equals the embedding is
    /// dropped and one that differs is used: the reference decides the same way.
    ///
    /// # Errors
    /// `Tensor` for the first tensor that is missing, misshapen, of a dtype that does not load, or not
    /// part of the model; its text says how many more there are.
    pub fn resolve(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Self> {
        let has_embedding =
            |prefix: &&&str| checkpoint.starting(&format!("{prefix}embed_tokens.")).next().is_some();
        // GGUF has names of its own for the places of a text model.
        let default = if checkpoint.is_gguf() { &PREFIXES[1] } else { &PREFIXES[0] };
        let prefix = PREFIXES.iter().find(has_embedding).unwrap_or(default);
        let mut resolver = Resolver::new(checkpoint, config);
        let tensors = resolver.model(config, prefix);
        let (vision, mtp) = resolver.leftovers();
        match (tensors, resolver.into_error()) {
            (_, Some(error)) => Err(error),
            (Some(mut tensors), None) => {
                (tensors.vision, tensors.mtp) = (vision, mtp);
                Ok(tensors)
            }
            (None, None) => Err(Error::Internal("a tensor is missing and no problem was noted".to_string())),
        }
    }
}

impl ModelTensors {
    /// Bytes of weights that one token reads, as they are stored (of a quantised matrix codes, scales and zero points):
    /// everything but the embedding (unless it is the head) and the experts the token is not sent to.
    pub fn bytes_per_token(&self, config: &ModelConfig) -> u64 {
        let size = |tensors: Vec<&Tensor>| tensors.into_iter().map(|t| t.num_bytes() as u64).sum::<u64>();
        let (num_experts, top_k) = match config.ffn {
            FfnConfig::Moe { num_experts, top_k, .. } => (num_experts as u64, top_k as u64),
            FfnConfig::Dense { .. } => (1, 1),
        };
        let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
        let layers = self.layers.iter().map(|l| size(l.rest()) + size(l.experts()) / num_experts * top_k);
        size(vec![head, &self.norm]) + layers.sum::<u64>()
    }
}

impl MixerTensors {
    /// Every tensor of the mixer.
    pub fn tensors(&self) -> Vec<&Tensor> {
        match self {
            MixerTensors::Attention { q_proj, k_proj, v_proj, o_proj, q_norm, k_norm } => {
                vec![q_proj, k_proj, v_proj, o_proj, q_norm, k_norm]
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
                vec![in_proj_qkv, in_proj_z, in_proj_b, in_proj_a, conv1d, a_log, dt_bias, norm, out_proj]
            }
        }
    }
}

/// Takes tensors one by one; notes what is wrong and goes on, so that all problems are counted.
pub(super) struct Resolver<'a> {
    checkpoint: &'a Checkpoint,
    quantization: Option<&'a QuantConfig>,
    /// The places of a GGUF file.
    places: Option<Places>,
    /// Tensors of the file that have a place, and the names of all places.
    taken: HashSet<String>,
    problems: Vec<Problem>,
}

impl<'a> Resolver<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint, config: &'a ModelConfig) -> Self {
        let quantization = config.quantization.as_ref();
        let places = checkpoint.is_gguf().then(|| Places::new(config));
        Self { checkpoint, quantization, places, taken: HashSet::new(), problems: Vec::new() }
    }

    /// Whether the file has a tensor for a place of GGUF.
    pub(super) fn has(&self, place: &str) -> bool {
        let name = self.places.as_ref().and_then(|places| places.name(place));
        name.is_some_and(|name| self.checkpoint.contains(&name))
    }

    fn note(&mut self, name: String, found: impl Into<String>, expected: impl Into<String>) {
        self.problems.push(Problem { name, found: found.into(), expected: expected.into() });
    }

    /// The tensor of this name, if it is there with this shape, plain or encoded.
    pub(super) fn take(&mut self, name: String, shape: &[usize]) -> Option<Tensor> {
        if let Some(places) = &self.places {
            self.taken.extend(places.name(&name));
            let found = places.find(self.checkpoint, &name, shape);
            return found.map_err(|problem| self.problems.push(problem)).ok();
        }
        self.taken.insert(name.clone());
        match quant::find(self.checkpoint, self.quantization, &name, shape) {
            Ok(None) => self.take_plain(name, shape),
            Ok(Some((tensor, parts))) => {
                self.taken.extend(parts);
                Some(tensor)
            }
            Err(problem) => {
                self.problems.push(problem);
                // One problem of a matrix is enough.
                let base = name.strip_suffix("weight").unwrap_or(&name);
                self.taken.extend(self.checkpoint.starting(base).map(|tensor| tensor.name.clone()));
                None
            }
        }
    }

    fn take_plain(&mut self, name: String, shape: &[usize]) -> Option<Tensor> {
        let Some(tensor) = self.checkpoint.tensor(&name, shape) else {
            self.note(name, "nothing", format!("shape {shape:?}"));
            return None;
        };
        if tensor.shape != shape {
            self.note(name, format!("shape {:?}", tensor.shape), format!("shape {shape:?}"));
            return None;
        }
        if !tensor.dtype.is_loadable() {
            self.note(name, format!("dtype {}", tensor.dtype), "BF16, F16 or F32");
            return None;
        }
        Some(tensor)
    }

    fn model(&mut self, config: &ModelConfig, prefix: &str) -> Option<ModelTensors> {
        let (vocab, hidden) = (config.vocab, config.hidden);
        let embed_tokens = self.take(format!("{prefix}embed_tokens.weight"), &[vocab, hidden]);
        let norm = self.take(format!("{prefix}norm.weight"), &[hidden]);
        let lm_head = self.lm_head(config, embed_tokens.as_ref());
        let layers: Vec<_> = config
            .layers
            .iter()
            .enumerate()
            .map(|(i, &kind)| self.layer(config, kind, &format!("{prefix}layers.{i}.")))
            .collect();
        Some(ModelTensors {
            embed_tokens: embed_tokens?,
            norm: norm?,
            lm_head: lm_head?,
            layers: layers.into_iter().collect::<Option<_>>()?,
            vision: Vec::new(),
            mtp: Vec::new(),
        })
    }

    /// The outer `None` is a problem, the inner one a head that is the embedding.
    fn lm_head(&mut self, config: &ModelConfig, embedding: Option<&Tensor>) -> Option<Option<Tensor>> {
        if config.tied_embeddings && self.checkpoint.starting(LM_HEAD_PARTS).next().is_none() {
            return Some(None);
        }
        let head = self.take(LM_HEAD.to_string(), &[config.vocab, config.hidden])?;
        let same = |e: &Tensor| e.dtype == head.dtype && e.bytes().is_some() && e.bytes() == head.bytes();
        let tied = config.tied_embeddings && embedding.is_some_and(same);
        Some((!tied).then_some(head))
    }

    pub(super) fn layer(
        &mut self,
        config: &ModelConfig,
        kind: LayerKind,
        prefix: &str,
    ) -> Option<LayerTensors> {
        let hidden = config.hidden;
        let input_layernorm = self.take(format!("{prefix}input_layernorm.weight"), &[hidden]);
        let post_attention_layernorm =
            self.take(format!("{prefix}post_attention_layernorm.weight"), &[hidden]);
        let mixer = match kind {
            LayerKind::Attention => self.attention(config, &format!("{prefix}self_attn.")),
            LayerKind::DeltaNet => self.delta_net(config, &format!("{prefix}linear_attn.")),
        };
        let ffn = self.ffn(config, &format!("{prefix}mlp."));
        Some(LayerTensors {
            input_layernorm: input_layernorm?,
            post_attention_layernorm: post_attention_layernorm?,
            mixer: mixer?,
            ffn: ffn?,
        })
    }

    fn attention(&mut self, config: &ModelConfig, prefix: &str) -> Option<MixerTensors> {
        let (hidden, sizes) = (config.hidden, &config.attention);
        let mut take = |name: &str, shape: &[usize]| self.take(format!("{prefix}{name}.weight"), shape);
        // Each query head is followed by its gate, hence twice the width.
        let q_proj = take("q_proj", &[2 * sizes.q_width(), hidden]);
        let k_proj = take("k_proj", &[sizes.kv_width(), hidden]);
        let v_proj = take("v_proj", &[sizes.kv_width(), hidden]);
        let o_proj = take("o_proj", &[hidden, sizes.q_width()]);
        let q_norm = take("q_norm", &[sizes.head_dim]);
        let k_norm = take("k_norm", &[sizes.head_dim]);
        Some(MixerTensors::Attention {
            q_proj: q_proj?,
            k_proj: k_proj?,
            v_proj: v_proj?,
            o_proj: o_proj?,
            q_norm: q_norm?,
            k_norm: k_norm?,
        })
    }

    fn delta_net(&mut self, config: &ModelConfig, prefix: &str) -> Option<MixerTensors> {
        let (hidden, sizes) = (config.hidden, &config.delta);
        let (heads, channels, width) = (sizes.num_v_heads, sizes.conv_channels(), sizes.value_width());
        let mut take = |name: &str, shape: &[usize]| self.take(format!("{prefix}{name}"), shape);
        let in_proj_qkv = take("in_proj_qkv.weight", &[channels, hidden]);
        let in_proj_z = take("in_proj_z.weight", &[width, hidden]);
        let in_proj_b = take("in_proj_b.weight", &[heads, hidden]);
        let in_proj_a = take("in_proj_a.weight", &[heads, hidden]);
        let conv1d = take("conv1d.weight", &[channels, 1, sizes.conv_kernel]);
        let a_log = take("A_log", &[heads]);
        let dt_bias = take("dt_bias", &[heads]);
        let norm = take("norm.weight", &[sizes.v_dim]);
        let out_proj = take("out_proj.weight", &[hidden, width]);
        Some(MixerTensors::DeltaNet {
            in_proj_qkv: in_proj_qkv?,
            in_proj_z: in_proj_z?,
            in_proj_b: in_proj_b?,
            in_proj_a: in_proj_a?,
            conv1d: conv1d?,
            a_log: a_log?,
            dt_bias: dt_bias?,
            norm: norm?,
            out_proj: out_proj?,
        })
    }

    fn ffn(&mut self, config: &ModelConfig, prefix: &str) -> Option<FfnTensors> {
        let hidden = config.hidden;
        match config.ffn {
            FfnConfig::Dense { width } => {
                let triple = self.triple(prefix, width, hidden)?;
                let ExpertTriple { gate_proj, up_proj, down_proj } = triple;
                Some(FfnTensors::Dense { gate_proj, up_proj, down_proj })
            }
            FfnConfig::Moe { num_experts, expert_width, shared_width, .. } => {
                let gate = self.take(format!("{prefix}gate.weight"), &[num_experts, hidden]);
                let experts = self.experts(&format!("{prefix}experts."), num_experts, expert_width, hidden);
                let shared = self.triple(&format!("{prefix}shared_expert."), shared_width, hidden);
                let shared_expert_gate =
                    self.take(format!("{prefix}shared_expert_gate.weight"), &[1, hidden]);
                let ExpertTriple { gate_proj, up_proj, down_proj } = shared?;
                Some(FfnTensors::Moe {
                    gate: gate?,
                    experts: experts?,
                    shared_gate_proj: gate_proj,
                    shared_up_proj: up_proj,
                    shared_down_proj: down_proj,
                    shared_expert_gate: shared_expert_gate?,
                })
            }
        }
    }

    /// The routed experts: one by one if anything of a single expert is there, else fused.
    fn experts(
        &mut self,
        prefix: &str,
        num_experts: usize,
        width: usize,
        hidden: usize,
    ) -> Option<ExpertTensors> {
        if self.places.is_some() {
            return self.stacked_experts(prefix, num_experts, width, hidden);
        }
        // Digits come before letters.
        let first =
            self.checkpoint.name_from(&format!("{prefix}0")).and_then(|name| name.strip_prefix(prefix));
        let has_single = first.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
        if has_single {
            let triples: Vec<_> =
                (0..num_experts).map(|e| self.triple(&format!("{prefix}{e}."), width, hidden)).collect();
            return triples.into_iter().collect::<Option<_>>().map(ExpertTensors::PerExpert);
        }
        let gate_up_proj = self.take(format!("{prefix}gate_up_proj"), &[num_experts, 2 * width, hidden]);
        let down_proj = self.take(format!("{prefix}down_proj"), &[num_experts, hidden, width]);
        Some(ExpertTensors::Fused { gate_up_proj: gate_up_proj?, down_proj: down_proj? })
    }

    fn triple(&mut self, prefix: &str, width: usize, hidden: usize) -> Option<ExpertTriple> {
        let mut take = |name: &str, shape: &[usize]| self.take(format!("{prefix}{name}.weight"), shape);
        let gate_proj = take("gate_proj", &[width, hidden]);
        let up_proj = take("up_proj", &[width, hidden]);
        let down_proj = take("down_proj", &[hidden, width]);
        Some(ExpertTriple { gate_proj: gate_proj?, up_proj: up_proj?, down_proj: down_proj? })
    }

    /// The vision and MTP tensors; notes every other tensor that was not taken.
    fn leftovers(&mut self) -> (Vec<Tensor>, Vec<Tensor>) {
        let (mut vision, mut mtp) = (Vec::new(), Vec::new());
        for tensor in self.checkpoint.iter() {
            if VISION_PREFIXES.iter().any(|prefix| tensor.name.starts_with(prefix)) {
                vision.push(tensor.clone());
            } else if self.checkpoint.is_of_mtp(tensor) {
                mtp.push(tensor.clone());
            } else {
                self.note_unless_taken(tensor);
            }
        }
        (vision, mtp)
    }

    pub(super) fn note_unless_taken(&mut self, tensor: &Tensor) {
        let ignored = self.quantization.is_some() && quant::is_ignored(&tensor.name, &self.taken);
        if !self.taken.contains(&tensor.name) && !ignored {
            let found = format!("{} {:?}", tensor.type_name(), tensor.shape);
            self.note(tensor.name.clone(), found, "no such tensor in this model");
        }
    }

    /// The first problem, with the number of the others.
    pub(super) fn into_error(self) -> Option<Error> {
        let more = self.problems.len().saturating_sub(1);
        let Problem { name, found, mut expected } = self.problems.into_iter().next()?;
        if more > 0 {
            expected.push_str(&format!(" (and {more} more tensors like this or otherwise wrong)"));
        }
        Some(Error::Tensor { name, found, expected })
    }
}
