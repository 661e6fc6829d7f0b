//! What tells checkpoints of one geometry apart, for ranks that start together.

use rayon::prelude::*;

use super::checkpoint::{Depth, SAMPLE_BYTES, hash_data};
use super::hash::Xxh64;
use super::quant::Encoded;
use super::{LayerTensors, ModelTensors, MtpTensors, Tensor};

impl ModelTensors {
    /// A name for what is loaded, `module` included where that is: XXH64 over names, types and shapes, and over samples of
    /// the data. Of a tensor they are those of [`Depth::Quick`], of each routed expert's matrices (of codes and of scales) the
    /// 4,096 bytes in the middle: of 512 experts in 60 layers, the largest model of the family, 0.25 GB, or 0.38 where each
    /// expert's two matrices in are apart. So another checkpoint is found, and one that differs in what was looked at; not
    /// every changed byte. Random tensors have no data.
    pub fn digest(&self, module: Option<&MtpTensors>) -> String {
        let (mut rest, mut experts) = (vec![&self.embed_tokens, &self.norm], Vec::new());
        rest.extend(&self.lm_head);
        rest.extend(module.into_iter().flat_map(MtpTensors::rest));
        for layer in self.layers.iter().chain(module.map(|module| &module.layer)) {
            rest.extend(LayerTensors::rest(layer));
            experts.extend(layer.experts());
        }
        let mut hash = Xxh64::default();
        for tensor in rest.iter().chain(&experts) {
            let line = format!("{} {} {:?}\n", tensor.name, tensor.type_name(), tensor.shape);
            hash.update(line.as_bytes());
        }
        let whole = rest.par_iter().map(|tensor| hash_parts(tensor, |data| hash_data(data, Depth::Quick)));
        let middles = experts.par_iter().map(|tensor| {
            // Of the experts of a layer in one tensor each.
            let several = if tensor.shape.len() == 3 { tensor.shape[0] } else { 1 };
            hash_parts(tensor, |data| hash_middles(data, several))
        });
        let hashes: Vec<Vec<u64>> = whole.chain(middles).collect();
        hashes.iter().flatten().for_each(|x| hash.update(&x.to_le_bytes()));
        format!("{:016x}", hash.finish())
    }
}

/// Of everything that a tensor is stored in.
fn hash_parts(tensor: &Tensor, hash: impl Fn(&[u8]) -> u64) -> Vec<u64> {
    let parts = tensor.encoded().map_or_else(|| vec![tensor], Encoded::parts);
    let stored = parts.into_iter().filter(|part| part.random_elements().is_none());
    stored.map(|part| hash(part.bytes().unwrap_or_default())).collect()
}

/// Of the middle of each of `several` equal pieces.
fn hash_middles(data: &[u8], several: usize) -> u64 {
    let even = if several > 0 && data.len().is_multiple_of(several) { several } else { 1 };
    let mut hash = Xxh64::default();
    for piece in data.chunks((data.len() / even).max(1)) {
        let len = piece.len().min(SAMPLE_BYTES);
        let start = (piece.len() - len) / 2;
        hash.update(&piece[start..start + len]);
    }
    hash.finish()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Value;

    use super::*;
    use crate::config::ModelConfig;
    use crate::weights::Checkpoint;

    fn digest(folder: &Path, with_module: bool) -> String {
        let config = ModelConfig::from_dir(folder).unwrap();
        let checkpoint = Checkpoint::open(folder).unwrap();
        let module = with_module.then(|| MtpTensors::resolve(&checkpoint, &config).unwrap());
        ModelTensors::resolve(&checkpoint, &config).unwrap().digest(module.as_ref())
    }

    #[test]
    fn a_byte_of_any_expert_and_of_the_module_is_seen() {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data/moe_ranks");
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(source.join("config.json"), folder.path().join("config.json")).unwrap();
        let data = std::fs::read(source.join("model.safetensors")).unwrap();
        let head = u64::from_le_bytes(data[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&data[8..8 + head]).unwrap();
        // Both digests with a byte flipped so far into a tensor.
        let flipped = |name: &str, at: f64| {
            let offsets = &header[name]["data_offsets"];
            let (start, end) = (offsets[0].as_u64().unwrap(), offsets[1].as_u64().unwrap());
            let mut data = data.clone();
            data[8 + head + start as usize + ((end - start) as f64 * at) as usize] ^= 1;
            std::fs::write(folder.path().join("model.safetensors"), data).unwrap();
            [false, true].map(|with_module| digest(folder.path(), with_module))
        };
        let same = [false, true].map(|with_module| digest(&source, with_module));
        assert_ne!(same[0], same[1]);
        // Of 24 experts in one tensor the fifth and the last.
        let fused = "model.language_model.layers.1.mlp.experts.gate_up_proj";
        for (name, at) in
            [(fused, 4.5 / 24.0), (fused, 23.5 / 24.0), ("model.language_model.norm.weight", 0.5)]
        {
            let other = flipped(name, at);
            assert!(other[0] != same[0] && other[1] != same[1], "{name} at {at}");
        }
        for name in ["mtp.fc.weight", "mtp.norm.weight", "mtp.layers.0.mlp.experts.7.down_proj.weight"] {
            let other = flipped(name, 0.5);
            assert!(other[0] == same[0] && other[1] != same[1], "{name}");
        }
    }

    #[test]
    fn of_long_pieces_the_middle_is_seen() {
        let mut data = vec![0u8; 3 * 10_000];
        let of = |data: &[u8]| (hash_middles(data, 3), hash_middles(data, 1), hash_middles(data, 7));
        let same = of(&data);
        data[25_000] ^= 1;
        let other = of(&data);
        assert!(other.0 != same.0 && other.1 == same.1 && other.1 == other.2);
        assert_eq!(
            (hash_middles(&[], 3), hash_middles(&[], 0)),
            (hash_middles(&[], 1), hash_middles(&[], 1))
        );
    }
}
