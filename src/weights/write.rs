//! Writes a checkpoint: safetensors files of a bounded size, and their index. Tensors are made a few at a time, so that
//! memory holds no more than those.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::DType;
use crate::{Error, Result};

/// Bytes of a file, where no single group of tensors is larger.
const SHARD_BYTES: u64 = 5_000_000_000;
/// Bytes of tensors that are made at once.
const MADE_BYTES: u64 = 256 << 20;
/// The same of tensors of a stage, which take long: `progress` is to be heard between them.
const STAGED_BYTES: u64 = 16 << 20;

/// A tensor that is to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// The name it gets.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Row-major shape.
    pub shape: Vec<usize>,
}

impl Entry {
    fn num_bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.bits()).div_ceil(8) as u64
    }
}

/// The elements of each tensor of a unit, and its note.
pub type Made<'a, Note> = (Vec<Cow<'a, [u8]>>, Note);

/// Tensors that are made together and lie in one file.
pub trait Unit: Sync {
    /// What is found out while they are made.
    type Note: Send;

    /// The tensors, in order.
    fn entries(&self) -> Vec<Entry>;

    /// What has to be prepared before it can be made; 0 for nothing. No stage comes back after a later one.
    fn stage(&self) -> usize {
        0
    }

    /// Their little-endian elements, in the same order.
    ///
    /// # Errors
    /// Whatever is wrong with what they are made from.
    fn make(&self) -> Result<Made<'_, Self::Note>>;
}

/// Writes the tensors of `units` to `dir`, in their order: `model.safetensors`, or shards of at most 5 GB and their
/// index. `prepare(stage, poll)` is called before the first unit of each stage, if that is not 0. `progress(done, total)`,
/// in bytes, may end it; `poll` calls it with what it had last. Gives the note of each unit.
///
/// # Errors
/// What a unit, `prepare` or `progress` says; `Io` of a file.
pub fn write_checkpoint<U: Unit>(
    dir: &Path,
    units: &[U],
    prepare: impl FnMut(usize, &mut dyn FnMut() -> Result<()>) -> Result<()>,
    progress: impl FnMut(u64, u64) -> Result<()>,
) -> Result<Vec<U::Note>> {
    write_shards(dir, units, SHARD_BYTES, prepare, progress)
}

fn write_shards<U: Unit>(
    dir: &Path,
    units: &[U],
    shard_bytes: u64,
    mut prepare: impl FnMut(usize, &mut dyn FnMut() -> Result<()>) -> Result<()>,
    mut progress: impl FnMut(u64, u64) -> Result<()>,
) -> Result<Vec<U::Note>> {
    let sizes: Vec<u64> =
        units.iter().map(|unit| unit.entries().iter().map(Entry::num_bytes).sum()).collect();
    let total = sizes.iter().sum();
    let mut shards: Vec<Range<usize>> = Vec::new();
    let mut filled = 0;
    for (i, size) in sizes.iter().enumerate() {
        if shards.is_empty() || filled > 0 && filled + size > shard_bytes {
            shards.push(i..i);
            filled = 0;
        }
        filled += size;
        if let Some(shard) = shards.last_mut() {
            shard.end = i + 1;
        }
    }
    let mut prepared = 0;
    let (mut weight_map, mut notes, mut done) = (Map::new(), Vec::with_capacity(units.len()), 0);
    for (i, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_string(),
            n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        };
        let path = dir.join(&name);
        let io = |e| Error::io(&path, e);
        let mut file = BufWriter::new(File::create(&path).map_err(io)?);
        let entries: Vec<Entry> = units[shard.clone()].iter().flat_map(Unit::entries).collect();
        file.write_all(&header(&entries)).map_err(io)?;
        weight_map.extend(entries.into_iter().map(|entry| (entry.name, Value::from(name.as_str()))));
        let mut next = shard.start;
        while next < shard.end {
            let (first, mut bytes, stage) = (next, 0, units[next].stage());
            if stage != 0 && stage != prepared {
                prepare(stage, &mut || progress(done, total))?;
                prepared = stage;
            }
            let limit = if stage == 0 { MADE_BYTES } else { STAGED_BYTES };
            let fits = |unit: usize, bytes| bytes + sizes[unit] <= limit && units[unit].stage() == stage;
            while next < shard.end && (next == first || fits(next, bytes)) {
                bytes += sizes[next];
                next += 1;
            }
            let made: Vec<_> = units[first..next].par_iter().map(Unit::make).collect::<Result<_>>()?;
            for (parts, note) in made {
                parts.iter().try_for_each(|part| file.write_all(part)).map_err(io)?;
                notes.push(note);
            }
            done += bytes;
            progress(done, total)?;
        }
        file.into_inner().map_err(|e| io(e.into_error()))?.sync_all().map_err(io)?;
    }
    if shards.len() > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write_json(&dir.join("model.safetensors.index.json"), &index)?;
    }
    Ok(notes)
}

/// A JSON file, for people too.
///
/// # Errors
/// `Io` of the file.
pub fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = format!("{value:#}\n");
    std::fs::write(path, text).map_err(|e| Error::io(path, e))
}

/// Length and JSON, padded to 8 bytes.
fn header(entries: &[Entry]) -> Vec<u8> {
    let mut map = Map::new();
    map.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut end = 0;
    for entry in entries {
        let start = end;
        end += entry.num_bytes();
        let facts = json!({"dtype": entry.dtype.name(), "shape": entry.shape, "data_offsets": [start, end]});
        map.insert(entry.name.clone(), facts);
    }
    let mut text = Value::Object(map).to_string();
    let padded = text.len().next_multiple_of(8);
    text.extend(std::iter::repeat_n(' ', padded - text.len()));
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.into_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::Checkpoint;

    struct Filled(&'static str, usize, u8);

    impl Unit for Filled {
        type Note = u8;

        fn entries(&self) -> Vec<Entry> {
            let entry = |part: &str, len| Entry {
                name: format!("{}.{part}", self.0),
                dtype: DType::U8,
                shape: vec![len],
            };
            vec![entry("a", self.1), entry("b", 3)]
        }

        fn stage(&self) -> usize {
            usize::from(self.2) / 2 * 7
        }

        fn make(&self) -> Result<Made<'_, u8>> {
            if self.2 == 99 {
                return Err(Error::Internal("refused".into()));
            }
            Ok((vec![vec![self.2; self.1].into(), vec![self.2 + 1; 3].into()], self.2))
        }
    }

    #[test]
    fn shards_are_read_again() {
        let units = [Filled("x", 5, 1), Filled("y", 1, 2), Filled("z", 40, 3), Filled("w", 2, 4)];
        for (limit, files) in [(u64::MAX, 1), (20, 3), (1, 4)] {
            let dir = tempfile::tempdir().unwrap();
            let mut seen = Vec::new();
            let mut stages = Vec::new();
            let prepare = |stage, poll: &mut dyn FnMut() -> Result<()>| {
                stages.push(stage);
                poll()
            };
            let notes = write_shards(dir.path(), &units, limit, prepare, |done, total| {
                seen.push((done, total));
                Ok(())
            });
            assert_eq!(stages, [7, 14]);
            // What had been done before a stage is said again where it begins.
            let twice = seen.windows(2).filter(|pair| pair[0] == pair[1]).map(|pair| pair[0].0);
            assert_eq!(twice.collect::<Vec<_>>(), [8, 55]);
            assert_eq!(notes.unwrap(), [1, 2, 3, 4]);
            assert!(seen.is_sorted() && seen.last() == Some(&(60, 60)));
            let found = Checkpoint::open(dir.path()).unwrap();
            assert_eq!((found.files().len(), found.num_tensors(), found.total_bytes()), (files, 8, 60));
            for unit in &units {
                assert_eq!(
                    found.get(&format!("{}.a", unit.0)).unwrap().bytes().unwrap(),
                    vec![unit.2; unit.1]
                );
                assert_eq!(found.get(&format!("{}.b", unit.0)).unwrap().bytes().unwrap(), [unit.2 + 1; 3]);
            }
        }
    }

    #[test]
    fn errors_end_it() {
        let dir = tempfile::tempdir().unwrap();
        let units = [Filled("x", 5, 1), Filled("y", 1, 99)];
        let text =
            write_checkpoint(dir.path(), &units, |_, _| Ok(()), |_, _| Ok(())).unwrap_err().to_string();
        assert!(text.contains("refused"), "{text}");
        let stop = || Err(Error::Interrupted);
        let stopped = write_checkpoint(dir.path(), &units[..1], |_, _| Ok(()), |_, _| stop());
        assert!(matches!(stopped, Err(Error::Interrupted)));
        let stopped = write_checkpoint(dir.path(), &[Filled("x", 5, 2)], |_, poll| poll(), |_, _| stop());
        assert!(matches!(stopped, Err(Error::Interrupted)));
        let stopped = write_checkpoint(dir.path(), &[Filled("x", 5, 2)], |_, _| stop(), |_, _| Ok(()));
        assert!(matches!(stopped, Err(Error::Interrupted)));
    }
}
