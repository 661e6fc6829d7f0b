//! What a checkpoint holds: geometry, counts, formats, and a name for its content. Reads headers
//! and, for a fingerprint, data; loads nothing.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use crate::config::{GenerationConfig, ModelConfig};
use crate::plan::{CacheBytes, ParamCounts, Part, cache_bytes};
use crate::weights::{Checkpoint, Depth, ExpertTensors, FfnTensors, ModelTensors, MtpTensors, Tensor};
use crate::{Error, Result};

/// A checkpoint directory, described.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    /// The directory.
    pub dir: String,
    /// The configuration; absent if this crate cannot run it.
    pub config: Option<ModelConfig>,
    /// Parameters that the configuration asks for.
    pub params: Option<ParamCounts>,
    /// Bytes per token and per sequence.
    pub cache: Option<CacheBytes>,
    /// The checkpoint's generation defaults.
    pub generation: Option<GenerationConfig>,
    /// The files, by name.
    pub files: Vec<FileSize>,
    /// Tensors in all files.
    pub num_tensors: usize,
    /// Their elements.
    pub num_elements: u64,
    /// Their bytes.
    pub tensor_bytes: u64,
    /// Tensors by element type.
    pub dtypes: Vec<DTypeShare>,
    /// Matrices of the text model, and of an MTP module that can be loaded, by how they are quantised; empty where none
    /// is.
    pub quantized: Vec<QuantShare>,
    /// Tensors of a vision tower.
    pub num_vision_tensors: usize,
    /// Tensors of an MTP module.
    pub num_mtp_tensors: usize,
    /// Why `mtp=True` is refused; absent if it is not.
    pub mtp_refused: Option<String>,
    /// `fused`, `per_expert` or `mixed`, or `stacked` by projection in a GGUF file; absent in a dense model or where the tensors do not match.
    pub expert_layout: Option<&'static str>,
    /// Bytes of weights read for one token, as stored. Absent where the tensors do not match.
    pub weight_bytes_per_token: Option<u64>,
    /// See [`Checkpoint::fingerprint`].
    pub fingerprint: String,
    /// Why this crate cannot load the checkpoint; absent if it can.
    pub refused: Option<String>,
}

/// One file and its size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileSize {
    /// Its name in the directory.
    pub name: String,
    /// Its bytes.
    pub bytes: u64,
}

/// The tensors of one element type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DTypeShare {
    /// The header's name of the type.
    pub dtype: &'static str,
    /// Tensors.
    pub num_tensors: usize,
    /// Elements.
    pub num_elements: u64,
    /// Bytes.
    pub bytes: u64,
}

/// The matrices of one quantised form.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct QuantShare {
    /// The form, whose layout it is where that matters, and what shares a scale.
    pub format: String,
    /// Matrices; stacked experts count one by one.
    pub num_matrices: usize,
    /// Their elements.
    pub num_elements: u64,
    /// Bytes of codes, scales and zero points.
    pub bytes: u64,
}

/// Describes a checkpoint directory. A configuration that cannot be run, or tensors that do not match it,
/// are part of the answer (`refused`).
///
/// # Errors
/// As [`Checkpoint::open`]; and `Io` or `File` if `config.json` cannot be read or is not JSON.
pub fn inspect(dir: &Path, depth: Depth) -> Result<Inspection> {
    let checkpoint = Checkpoint::open(dir)?;
    let mut refused = None;
    let config = unless_refused(ModelConfig::from_dir(dir), &mut refused)?;
    let generation = unless_refused(GenerationConfig::from_dir(dir), &mut refused)?;
    if let (Some(config), Some(generation)) = (&config, &generation) {
        unless_refused(generation.check(config), &mut refused)?;
    }
    let tensors = match &config {
        Some(config) => unless_refused(ModelTensors::resolve(&checkpoint, config), &mut refused)?,
        None => None,
    };
    let mut mtp_refused = refused.clone();
    let module = match &config {
        Some(config) => unless_refused(MtpTensors::resolve(&checkpoint, config), &mut mtp_refused)?,
        None => None,
    };
    let places =
        tensors.iter().flat_map(ModelTensors::tensors).chain(module.iter().flat_map(MtpTensors::tensors));
    let quantized = quantized(places);
    let mut dtypes: BTreeMap<_, DTypeShare> = BTreeMap::new();
    for tensor in checkpoint.iter() {
        let empty = DTypeShare { dtype: tensor.type_name(), num_tensors: 0, num_elements: 0, bytes: 0 };
        let share = dtypes.entry(tensor.type_name()).or_insert(empty);
        share.num_tensors += 1;
        share.num_elements += tensor.num_elements() as u64;
        share.bytes += tensor.num_bytes() as u64;
    }
    let mut dtypes: Vec<_> = dtypes.into_values().collect();
    dtypes.sort_by_key(|share| std::cmp::Reverse(share.bytes));
    let mut files = Vec::new();
    for path in checkpoint.files() {
        let bytes = std::fs::metadata(path).map_err(|e| Error::io(path, e))?.len();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        files.push(FileSize { name, bytes });
    }
    let starting = |prefixes: &[&str]| {
        checkpoint.iter().filter(|t| prefixes.iter().any(|prefix| t.name.starts_with(prefix))).count()
    };
    Ok(Inspection {
        dir: dir.display().to_string(),
        params: config.as_ref().map(|config| Part::whole(config).params()),
        cache: config.as_ref().map(cache_bytes),
        generation,
        files,
        num_tensors: checkpoint.num_tensors(),
        num_elements: dtypes.iter().map(|share| share.num_elements).sum(),
        tensor_bytes: checkpoint.total_bytes(),
        dtypes,
        quantized,
        num_vision_tensors: starting(&["model.visual.", "visual."]),
        num_mtp_tensors: checkpoint.iter().filter(|t| checkpoint.is_of_mtp(t)).count(),
        mtp_refused,
        // In GGUF an expert is a slice of a stack, by itself in its place only.
        expert_layout: match tensors.as_ref().and_then(expert_layout) {
            Some("per_expert") if checkpoint.is_gguf() => Some("stacked"),
            layout => layout,
        },
        weight_bytes_per_token: tensors.as_ref().zip(config.as_ref()).map(|(t, c)| t.bytes_per_token(c)),
        fingerprint: checkpoint.fingerprint(depth),
        config,
        refused,
    })
}

/// The value; or `None`, with the first reason kept, if this crate cannot run what was found.
fn unless_refused<T>(found: Result<T>, refused: &mut Option<String>) -> Result<Option<T>> {
    match found {
        Ok(value) => Ok(Some(value)),
        Err(error @ (Error::Config { .. } | Error::Tensor { .. })) => {
            refused.get_or_insert_with(|| error.to_string());
            Ok(None)
        }
        Err(other) => Err(other),
    }
}

/// Encoded matrices by form, the form with most bytes first.
fn quantized<'a>(places: impl Iterator<Item = &'a Tensor>) -> Vec<QuantShare> {
    let mut shares: BTreeMap<String, QuantShare> = BTreeMap::new();
    for tensor in places {
        let Some(encoded) = tensor.encoded().filter(|encoded| encoded.is_quantised()) else { continue };
        let format = encoded.format();
        let empty = QuantShare { format: format.clone(), num_matrices: 0, num_elements: 0, bytes: 0 };
        let share = shares.entry(format).or_insert(empty);
        share.num_matrices += tensor.shape[..tensor.shape.len() - 2].iter().product::<usize>();
        share.num_elements += tensor.num_elements() as u64;
        share.bytes += tensor.num_bytes() as u64;
    }
    let mut shares: Vec<_> = shares.into_values().collect();
    shares.sort_by_key(|share| std::cmp::Reverse(share.bytes));
    shares
}

fn expert_layout(tensors: &ModelTensors) -> Option<&'static str> {
    let (mut fused, mut per_expert) = (false, false);
    for layer in &tensors.layers {
        if let FfnTensors::Moe { experts, .. } = &layer.ffn {
            match experts {
                ExpertTensors::Fused { .. } => fused = true,
                ExpertTensors::PerExpert(_) => per_expert = true,
            }
        }
    }
    match (fused, per_expert) {
        (true, true) => Some("mixed"),
        (true, false) => Some("fused"),
        (false, true) => Some("per_expert"),
        (false, false) => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::inspect;
    use crate::Error;
    use crate::weights::Depth;

    #[test]
    fn a_checkpoint_that_cannot_run_is_still_described() {
        let dir = tempfile::tempdir().unwrap();
        let header = json!({
            "__metadata__": {"format": "pt"},
            "model.visual.x": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]},
            "mtp.y": {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [6, 10]},
            "model.norm.weight": {"dtype": "BF16", "shape": [2], "data_offsets": [10, 14]}
        })
        .to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(&[1; 14]);
        std::fs::write(dir.path().join("model.safetensors"), &bytes).unwrap();
        assert!(matches!(inspect(dir.path(), Depth::Quick), Err(Error::Io { .. })));

        std::fs::write(dir.path().join("config.json"), r#"{"model_type": "qwen3_5_text", "hidden_size": 2}"#)
            .unwrap();
        let found = inspect(dir.path(), Depth::Quick).unwrap();
        assert_eq!((found.num_tensors, found.num_elements, found.tensor_bytes), (3, 9, 14));
        assert_eq!((found.num_vision_tensors, found.num_mtp_tensors), (1, 1));
        assert_eq!(found.files[0].bytes, bytes.len() as u64);
        let shares: Vec<_> = found.dtypes.iter().map(|s| (s.dtype, s.num_tensors, s.bytes)).collect();
        assert_eq!(shares, [("BF16", 2, 10), ("F8_E4M3", 1, 4)]);
        assert!(found.config.is_some() && found.weight_bytes_per_token.is_none());
        let refused = found.refused.unwrap();
        assert!(
            refused.starts_with("tensor model.language_model.embed_tokens.weight: found nothing"),
            "{refused}"
        );

        std::fs::write(
            dir.path().join("config.json"),
            r#"{"model_type": "qwen3_5_text", "quantization_config": {"quant_method": "hqq"}}"#,
        )
        .unwrap();
        let found = inspect(dir.path(), Depth::Full).unwrap();
        assert!(found.config.is_none() && found.fingerprint.starts_with("full:"));
        assert!(found.refused.unwrap().starts_with("quantization_config.quant_method: found \"hqq\""));
    }
}
