//! A checkpoint directory: one safetensors file, or the shards that an index names; or a GGUF file.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Bound;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};

use super::hash::Xxh64;
use super::names::MTP_PREFIX;
use super::{Tensor, gguf, safetensors};
use crate::config::ModelConfig;
use crate::gguf::Gguf;
use crate::{Error, Result, files};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Bytes hashed at the start, in the middle and at the end of a tensor by a quick fingerprint.
pub(super) const SAMPLE_BYTES: usize = 4096;

/// Every tensor of a checkpoint, mapped from its files. Nothing is read until it is looked at.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    dir: PathBuf,
    files: Vec<PathBuf>,
    tensors: BTreeMap<String, Tensor>,
    source: Source,
}

/// Where the tensors are from.
#[derive(Debug, Clone, PartialEq)]
enum Source {
    Safetensors,
    /// With what the names of its MTP module begin with, where it has one.
    Gguf(Option<String>),
    /// Nowhere: it has every tensor that is asked for.
    Random,
}

/// How much of a checkpoint a fingerprint looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Names, dtypes, shapes, and at most 12 KiB of each tensor. Seconds for the largest checkpoints.
    Quick,
    /// Every byte. Bound by the disk.
    Full,
}

impl Checkpoint {
    /// Opens a directory that holds `model.safetensors`, or else `model.safetensors.index.json` and its
    /// shards; or one `.safetensors` file; or what [`crate::gguf::find`] finds. Maps every file and checks every
    /// header.
    ///
    /// # Errors
    /// `Io` if a file cannot be opened; `File` for a directory without weights, a bad index, or a bad
    /// header; `Tensor` for a bad entry of a header, a tensor in two shards, or a tensor that is not in
    /// the shard the index says.
    pub fn open(dir: &Path) -> Result<Self> {
        if let Some(file) = crate::gguf::find(dir)? {
            return Self::open_gguf(dir, &file);
        }
        if dir.is_file() {
            return Self::open_single(dir, dir.to_path_buf());
        }
        let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
        if files::is_there(&single) {
            return Self::open_single(dir, single);
        }
        if files::is_there(&index) {
            return Self::open_shards(dir, &index);
        }
        let entries = std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))?;
        let others = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned());
        let mut others: Vec<_> = others
            .filter(|name| [".safetensors", ".bin", ".pt", ".pth"].iter().any(|end| name.ends_with(end)))
            .collect();
        others.sort();
        let found = if others.is_empty() { "no weights".to_string() } else { others.join(", ") };
        Err(Error::file(dir, format!("found {found}; expected {SINGLE} or {INDEX}")))
    }

    /// Not a checkpoint: every tensor of whatever model, of random elements.
    pub fn random() -> Self {
        Checkpoint {
            dir: PathBuf::new(),
            files: Vec::new(),
            tensors: BTreeMap::new(),
            source: Source::Random,
        }
    }

    /// Whether it is [`Checkpoint::random`].
    pub fn is_random(&self) -> bool {
        self.source == Source::Random
    }

    /// Whether it is a GGUF file, with names and numbers of its own.
    pub fn is_gguf(&self) -> bool {
        matches!(self.source, Source::Gguf(_))
    }

    /// Whether a tensor is of the multi-token-prediction module, by its name.
    pub fn is_of_mtp(&self, tensor: &Tensor) -> bool {
        let prefix = match &self.source {
            Source::Gguf(prefix) => prefix.as_deref(),
            Source::Safetensors | Source::Random => Some(MTP_PREFIX),
        };
        prefix.is_some_and(|prefix| tensor.name.starts_with(prefix))
    }

    fn open_single(dir: &Path, file: PathBuf) -> Result<Self> {
        let tensors = safetensors::open(&file)?.into_iter().map(|t| (t.name.clone(), t)).collect();
        Ok(Checkpoint { dir: dir.to_path_buf(), files: vec![file], tensors, source: Source::Safetensors })
    }

    fn open_gguf(dir: &Path, file: &Path) -> Result<Self> {
        let found = Gguf::open(file)?;
        let tensors = found.tensors().iter().map(|t| (t.name.clone(), gguf::stored(t))).collect();
        // A configuration that cannot be run is for others to refuse.
        let config = ModelConfig::from_gguf(&found).ok().filter(|config| config.num_mtp_layers > 0);
        let mtp = config.map(|config| gguf::block_prefix(config.layers.len()));
        let files = found.files().to_vec();
        Ok(Checkpoint { dir: dir.to_path_buf(), files, tensors, source: Source::Gguf(mtp) })
    }

    fn open_shards(dir: &Path, index: &Path) -> Result<Self> {
        let weight_map = read_index(index)?;
        let mut shards: BTreeMap<&str, usize> = BTreeMap::new();
        for shard in weight_map.values() {
            let next = shards.len();
            shards.entry(shard).or_insert(next);
        }
        let mut files = Vec::with_capacity(shards.len());
        let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
        for shard in shards.keys() {
            let path = dir.join(shard);
            for tensor in safetensors::open(&path)? {
                let name = tensor.name.clone();
                match weight_map.get(&name) {
                    Some(owner) if owner == shard => {}
                    owner => {
                        let expected = match owner {
                            Some(owner) => format!("it in {owner} only, as {INDEX} says"),
                            None => format!("a tensor that {INDEX} names"),
                        };
                        return Err(Error::Tensor { name, found: format!("it in {shard}"), expected });
                    }
                }
                tensors.insert(name, tensor);
            }
            files.push(path);
        }
        if let Some((name, shard)) = weight_map.iter().find(|(name, _)| !tensors.contains_key(*name)) {
            return Err(Error::Tensor {
                name: name.clone(),
                found: "nothing".to_string(),
                expected: format!("it in {shard}, as {INDEX} says"),
            });
        }
        Ok(Checkpoint { dir: dir.to_path_buf(), files, tensors, source: Source::Safetensors })
    }

    /// The directory (or file) that was opened.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The files, by name.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// A tensor by its name in the checkpoint.
    pub fn get(&self, name: &str) -> Option<Tensor> {
        self.tensors.get(name).cloned()
    }

    /// A tensor that a model wants; of random elements it has this shape, otherwise the checkpoint's own.
    pub(super) fn tensor(&self, name: &str, shape: &[usize]) -> Option<Tensor> {
        if self.is_random() { Some(Tensor::random(name.into(), shape)) } else { self.get(name) }
    }

    /// Whether the checkpoint has a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensors whose names begin so.
    pub(super) fn starting(&self, prefix: &str) -> impl Iterator<Item = &Tensor> {
        let after = self.tensors.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
        after.map(|(_, tensor)| tensor).take_while(move |tensor| tensor.name.starts_with(prefix))
    }

    /// The first name at or after `start`, in order of bytes.
    pub(super) fn name_from(&self, start: &str) -> Option<&str> {
        let mut after = self.tensors.range::<str, _>((Bound::Included(start), Bound::Unbounded));
        after.next().map(|(name, _)| name.as_str())
    }

    /// Every tensor, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Tensor> {
        self.tensors.values()
    }

    /// Number of tensors.
    pub fn num_tensors(&self) -> usize {
        self.tensors.len()
    }

    /// Bytes of all tensors, headers not counted.
    pub fn total_bytes(&self) -> u64 {
        self.iter().map(|t| t.num_bytes() as u64).sum()
    }

    /// A name for the content, the same however the tensors are spread over files. Not a defence against
    /// someone who forges a checkpoint.
    ///
    /// XXH64 (seed 0) over, for every tensor in order of its name's bytes: name, a zero byte, dtype name, a
    /// zero byte, number of dimensions and each dimension as little-endian u64, and the XXH64 of its data
    /// as little-endian u64. `Full` hashes all data of a tensor. `Quick` hashes the whole of it up to
    /// 12,288 bytes, and of a longer one the first 4,096, the 4,096 from `len / 2` on, and the last 4,096.
    /// Written as `quick:` or `full:` and 16 hexadecimal digits.
    pub fn fingerprint(&self, depth: Depth) -> String {
        let tensors: Vec<&Tensor> = self.iter().collect();
        // Of what a file holds only GGUF's blocks are encoded, each tensor in one part.
        let stored = |t: &&Tensor| t.encoded().and_then(|encoded| encoded.parts().first().copied()).cloned();
        let data = |t: &&Tensor| match stored(t) {
            Some(codes) => hash_data(codes.bytes().unwrap_or_default(), depth),
            None => hash_data(t.bytes().unwrap_or_default(), depth),
        };
        let data_hashes: Vec<u64> = tensors.par_iter().map(data).collect();
        let mut hash = Xxh64::default();
        for (tensor, data_hash) in tensors.iter().zip(data_hashes) {
            hash.update(tensor.name.as_bytes());
            hash.update(&[0]);
            hash.update(tensor.type_name().as_bytes());
            hash.update(&[0]);
            hash.update(&(tensor.shape.len() as u64).to_le_bytes());
            for &dim in &tensor.shape {
                hash.update(&(dim as u64).to_le_bytes());
            }
            hash.update(&data_hash.to_le_bytes());
        }
        let kind = match depth {
            Depth::Quick => "quick",
            Depth::Full => "full",
        };
        format!("{kind}:{:016x}", hash.finish())
    }
}

pub(super) fn hash_data(data: &[u8], depth: Depth) -> u64 {
    let mut hash = Xxh64::default();
    if depth == Depth::Full || data.len() <= 3 * SAMPLE_BYTES {
        hash.update(data);
    } else {
        let middle = data.len() / 2;
        hash.update(&data[..SAMPLE_BYTES]);
        hash.update(&data[middle..middle + SAMPLE_BYTES]);
        hash.update(&data[data.len() - SAMPLE_BYTES..]);
    }
    hash.finish()
}

/// The index's map from tensor to shard.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let index: Index = files::object(path, &files::read_text(path, files::TABLE)?)?;
    for (name, shard) in &index.weight_map.0 {
        // One plain name: neither a path out of the directory nor one below it.
        let plain = Path::new(shard).file_name().is_some_and(|f| f == shard.as_str());
        if !plain || shard.contains(['/', '\\', '\0']) || !shard.ends_with(".safetensors") {
            let what =
                format!("{name} is in {shard:?}; allowed: the name of a .safetensors file beside the index");
            return Err(Error::file(path, what));
        }
    }
    Ok(index.weight_map.0)
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct Index {
    weight_map: WeightMap,
}

/// A map whose names may not repeat.
struct WeightMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object from tensor names to file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut names = BTreeMap::new();
                while let Some((name, shard)) = map.next_entry::<String, String>()? {
                    if names.contains_key(&name) {
                        return Err(de::Error::custom(format!("{name} twice")));
                    }
                    names.insert(name, shard);
                }
                Ok(WeightMap(names))
            }
        }
        deserializer.deserialize_map(Names)
    }
}
