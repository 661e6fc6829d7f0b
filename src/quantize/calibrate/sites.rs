//! The places of a layer whose inputs make a Hessian, and which tensor stands at which.

use crate::config::{FfnConfig, LayerKind, ModelConfig};
use crate::weights::{ExpertTensors, FfnTensors, LayerTensors, MixerTensors, Tensor};

/// Bytes that the Hessians of the experts' gate and up projections may take, all of a layer together, for each expert to
/// have its own: experts of a small model. Where there are more, or they are wide, the layer's is that of all.
const OWN_BYTES: usize = 1 << 30;

/// A place in a layer whose inputs matrices share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Site {
    /// Projections into the mixer.
    Mixer,
    /// The projection out of it.
    MixerOut,
    /// Gate and up, over all tokens.
    Ffn,
    /// The down projection of a dense model.
    Down,
    /// That of the shared expert.
    SharedDown,
    /// Gate and up of a routed expert, over its tokens.
    ExpertIn(usize),
    /// The down projection of a routed expert.
    ExpertDown(usize),
}

impl Site {
    /// The places whose Hessians a matrix at this one needs.
    pub fn collected(self, config: &ModelConfig) -> Vec<Site> {
        match (self, &config.ffn) {
            (Site::ExpertIn(_), FfnConfig::Moe { num_experts, .. }) => {
                let bytes = 4 * num_experts.saturating_mul(config.hidden).saturating_mul(config.hidden);
                if bytes <= OWN_BYTES { vec![self, Site::Ffn] } else { vec![Site::Ffn] }
            }
            _ => vec![self],
        }
    }

    /// Inputs of a matrix here, in the layer of that index; behind the last layer is the module's.
    pub fn width(self, config: &ModelConfig, index: usize) -> usize {
        match (self, &config.ffn) {
            (Site::Mixer | Site::Ffn | Site::ExpertIn(_), _) => config.hidden,
            (Site::MixerOut, _) => match config.layers.get(index) {
                Some(LayerKind::DeltaNet) => config.delta.value_width(),
                Some(LayerKind::Attention) | None => config.attention.q_width(),
            },
            (_, FfnConfig::Dense { width }) => *width,
            (Site::SharedDown, FfnConfig::Moe { shared_width, .. }) => *shared_width,
            (_, FfnConfig::Moe { expert_width, .. }) => *expert_width,
        }
    }
}

/// The place of a tensor's rows: a tensor may be of all experts.
#[derive(Clone, Copy)]
pub(super) enum Place {
    /// All of them.
    One(Site),
    /// So many of each expert.
    Each(fn(usize) -> Site, usize),
}

impl Place {
    /// Of rows from `row` on.
    pub fn of(self, row: usize) -> Site {
        match self {
            Place::One(site) => site,
            Place::Each(site, rows) => site(row / rows.max(1)),
        }
    }
}

/// The tensors of a layer that may be quantised, by name.
pub(super) fn places(layer: &LayerTensors) -> Vec<(String, Place)> {
    let mut list = Vec::new();
    let mut add = |place: Place, tensors: &[&Tensor]| {
        list.extend(tensors.iter().map(|tensor| (tensor.name.clone(), place)));
    };
    match &layer.mixer {
        MixerTensors::Attention { q_proj, k_proj, v_proj, o_proj, .. } => {
            add(Place::One(Site::Mixer), &[q_proj, k_proj, v_proj]);
            add(Place::One(Site::MixerOut), &[o_proj]);
        }
        MixerTensors::DeltaNet { in_proj_qkv, in_proj_z, out_proj, .. } => {
            add(Place::One(Site::Mixer), &[in_proj_qkv, in_proj_z]);
            add(Place::One(Site::MixerOut), &[out_proj]);
        }
    }
    match &layer.ffn {
        FfnTensors::Dense { gate_proj, up_proj, down_proj } => {
            add(Place::One(Site::Ffn), &[gate_proj, up_proj]);
            add(Place::One(Site::Down), &[down_proj]);
        }
        FfnTensors::Moe { experts, shared_gate_proj, shared_up_proj, shared_down_proj, .. } => {
            add(Place::One(Site::Ffn), &[shared_gate_proj, shared_up_proj]);
            add(Place::One(Site::SharedDown), &[shared_down_proj]);
            match experts {
                ExpertTensors::Fused { gate_up_proj, down_proj } => {
                    add(Place::Each(Site::ExpertIn, gate_up_proj.shape[1]), &[gate_up_proj]);
                    add(Place::Each(Site::ExpertDown, down_proj.shape[1]), &[down_proj]);
                }
                ExpertTensors::PerExpert(experts) => {
                    for (e, expert) in experts.iter().enumerate() {
                        add(Place::One(Site::ExpertIn(e)), &[&expert.gate_proj, &expert.up_proj]);
                        add(Place::One(Site::ExpertDown(e)), &[&expert.down_proj]);
                    }
                }
            }
        }
    }
    list
}
