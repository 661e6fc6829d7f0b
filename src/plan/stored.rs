//! What the weights of a checkpoint that is quantised already come to once they are loaded: counted, tensor by tensor.

use std::path::Path;

use super::{Part, Scheme, WeightBytes};
use crate::Result;
use crate::config::{FfnConfig, ModelConfig};
use crate::weights::form::{BlockSizes, Form};
use crate::weights::{Checkpoint, FfnTensors, LayerTensors, ModelTensors, Tensor};

/// The weights in `dir` as a GPU holds them, or as that of a rank holds its part; `config` is the whole model's.
///
/// # Errors
/// As [`Checkpoint::open`] and [`ModelTensors::resolve`].
pub fn stored(dir: &Path, config: &ModelConfig, part: &Part) -> Result<WeightBytes> {
    stored_in(&Checkpoint::open(dir)?, config, part)
}

/// Those of a checkpoint.
pub(super) fn stored_in(checkpoint: &Checkpoint, config: &ModelConfig, part: &Part) -> Result<WeightBytes> {
    let tensors = ModelTensors::resolve(checkpoint, config)?;
    // The same places, whose parts are made without reading anything.
    let shapes = ModelTensors::resolve(&Checkpoint::random(), config)?;
    let head = tensors.lm_head.as_ref().unwrap_or(&tensors.embed_tokens);
    // Rows are read from the embedding, also where it is the head: it has no codes.
    let embedding = held_as(Form::Bf16, [&tensors.embed_tokens]);
    let (head, beside) = match part.has_embedding() {
        true => (held(head, &shapes.sharded_head(part.shard())), embedding),
        false => (embedding, 0),
    };
    let (mut always, mut experts) = (head + held(&tensors.norm, &tensors.norm), 0);
    for (layer, shape) in tensors.layers.iter().zip(&shapes.layers) {
        let here = shape.sharded(config, part.shard())?;
        let block = block_of(layer);
        let is_shared = |tensor: &Tensor| block[2..].iter().flatten().any(|other| other.name == tensor.name);
        let rest = layer.rest().into_iter().zip(here.rest()).filter(|(tensor, _)| !is_shared(tensor));
        always += rest.map(|(tensor, here)| held(tensor, here)).sum::<u64>();
        let [gate_up, down, shared_gate_up, shared_down] = held_in_block(&block, &block_of(&here), part);
        experts += gate_up + down;
        always += shared_gate_up + shared_down;
    }
    let read = match config.ffn {
        FfnConfig::Moe { num_experts, top_k, .. } => experts / num_experts as u64 * top_k as u64,
        FfnConfig::Dense { .. } => 0,
    };
    Ok(WeightBytes {
        scheme: Scheme::Stored,
        resident: always + experts + beside,
        read_per_token: always + read,
        experts,
    })
}

/// The matrices into the routed experts, and out of them; those of the shared expert.
fn block_of(layer: &LayerTensors) -> [Vec<Tensor>; 4] {
    match &layer.ffn {
        FfnTensors::Dense { .. } => Default::default(),
        FfnTensors::Moe { experts, shared_gate_proj, shared_up_proj, shared_down_proj, .. } => [
            experts.gate_up(),
            experts.down(),
            vec![shared_gate_proj.clone(), shared_up_proj.clone()],
            vec![shared_down_proj.clone()],
        ],
    }
}

/// Bytes of what is `here` of a sparse block's matrices, each in the form that all of its tensors have.
fn held_in_block(whole: &[Vec<Tensor>; 4], here: &[Vec<Tensor>; 4], part: &Part) -> [u64; 4] {
    let FfnConfig::Moe { top_k, expert_width, shared_width, .. } = part.config().ffn else { return [0; 4] };
    let sizes = BlockSizes { hidden: part.config().hidden, width: expert_width, shared_width, top_k };
    let form = |i: usize| {
        let (rows, k) = here[i].first().map_or((0, 0), |tensor| (tensor.num_rows(), tensor.num_cols()));
        Form::of_all(whole[i].iter().map(|tensor| Form::of_part(tensor, rows, k)))
    };
    let forms = Form::of_block([0, 1, 2, 3].map(form), sizes);
    [0, 1, 2, 3].map(|i| held_as(forms[i], &here[i]))
}

/// Bytes of what is `here` of a tensor.
fn held(whole: &Tensor, here: &Tensor) -> u64 {
    held_as(Form::of_part(whole, here.num_rows(), here.num_cols()), [here])
}

/// Bytes of tensors whose rows are of one length, in a form.
fn held_as<'a>(form: Form, tensors: impl IntoIterator<Item = &'a Tensor>) -> u64 {
    let sizes = tensors.into_iter().map(|tensor| (tensor.num_rows(), tensor.num_cols()));
    sizes.map(|(rows, k)| form.bytes(rows, k).iter().sum::<usize>() as u64).sum()
}
