//! GGUF files, as llama.cpp's converter writes them: one file, or the parts that it was split into. Metadata by key,
//! tensors by name. Knows no model: configuration, weights and tokenizer ask for what they want.
//!
//! The format: ggml's docs/gguf.md; what else a reader has to refuse, ggml's gguf.cpp.

mod find;
mod header;
mod types;
mod value;

pub use find::find;
pub use types::TensorType;
pub use value::Value;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use self::header::TensorInfo;
use self::value::List;
use crate::{Error, Result, mapped};

/// A GGUF model, mapped.
#[derive(Debug)]
pub struct Gguf {
    files: Vec<PathBuf>,
    /// Of the first file.
    map: Arc<Mmap>,
    values: BTreeMap<String, Value>,
    tensors: Vec<Stored>,
}

/// A tensor in one of the files.
#[derive(Debug, Clone)]
pub struct Stored {
    /// The file's name of it.
    pub name: String,
    /// What its elements are stored as.
    pub kind: TensorType,
    /// Row-major shape, of the elements.
    pub shape: Vec<usize>,
    /// Its file.
    pub map: Arc<Mmap>,
    /// Its bytes in that file.
    pub range: Range<usize>,
}

const PART: &str = "split.no";
const NUM_PARTS: &str = "split.count";
const NUM_TENSORS: &str = "split.tensors.count";

impl Gguf {
    /// Maps a file and checks its header; of a model in parts, given the first, all of them.
    ///
    /// # Errors
    /// `Io` if a file cannot be opened; `File` for a bad header, or a part that is not what its name says; `Config` for a
    /// bad value; `Tensor` for a bad tensor, one of a type that is not read, or one in two parts.
    pub fn open(path: &Path) -> Result<Self> {
        let (map, header) = read(path)?;
        let mut gguf =
            Gguf { files: Vec::new(), map: Arc::clone(&map), values: header.values, tensors: Vec::new() };
        let parts = match gguf.size(NUM_PARTS)? {
            None | Some(0 | 1) => vec![path.to_path_buf()],
            Some(count) => find::parts(path, count)?,
        };
        let first = gguf.size(PART)?;
        if first.is_some_and(|no| no != 0) {
            return Err(Error::config(PART, first.unwrap_or_default(), "0, of the first part"));
        }
        gguf.add(&map, header.tensors);
        for (no, path) in parts.iter().enumerate().skip(1) {
            let (map, header) = read(path)?;
            let said = |key: &str| header.values.get(key).cloned();
            let expected = [(PART, no), (NUM_PARTS, parts.len())];
            for (key, expected) in expected {
                if said(key) != Some(Value::Integer(expected as i128)) {
                    let found = said(key).map_or("nothing".to_string(), |value| value.to_string());
                    return Err(Error::file(path, format!("{key}: found {found}; allowed: {expected}")));
                }
            }
            gguf.add(&map, header.tensors);
        }
        let mut seen = HashMap::new();
        for tensor in &gguf.tensors {
            if seen.insert(tensor.name.as_str(), ()).is_some() {
                return Err(Error::Tensor {
                    name: tensor.name.clone(),
                    found: "it in two parts".into(),
                    expected: "it in one".into(),
                });
            }
        }
        match gguf.size(NUM_TENSORS)? {
            Some(count) if parts.len() > 1 && count != gguf.tensors.len() => {
                let found = format!("{NUM_TENSORS} {count}, and {} tensors in all parts", gguf.tensors.len());
                Err(Error::file(path, found))
            }
            _ => Ok(Gguf { files: parts, ..gguf }),
        }
    }

    fn add(&mut self, map: &Arc<Mmap>, tensors: Vec<TensorInfo>) {
        let stored = |info: TensorInfo| Stored {
            name: info.name,
            kind: info.kind,
            shape: info.shape,
            map: Arc::clone(map),
            range: info.range,
        };
        self.tensors.extend(tensors.into_iter().map(stored));
    }

    /// The file, or the first of its parts.
    pub fn path(&self) -> &Path {
        &self.files[0]
    }

    /// The file, or its parts.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// All tensors.
    pub fn tensors(&self) -> &[Stored] {
        &self.tensors
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<&Stored> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// A value of the metadata.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// The error for a value.
    pub fn refuse(&self, key: &str, allowed: impl Into<String>) -> Error {
        let found = self.get(key).map_or("nothing".to_string(), |value| value.to_string());
        Error::config(key, found, allowed)
    }

    /// A text.
    ///
    /// # Errors
    /// `Config` for anything else.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(self.refuse(key, "a text")),
        }
    }

    /// A bool.
    ///
    /// # Errors
    /// `Config` for anything else.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(&Value::Bool(value)) => Ok(Some(value)),
            Some(_) => Err(self.refuse(key, "true or false")),
        }
    }

    /// A number that is not negative.
    ///
    /// # Errors
    /// `Config` for anything else.
    pub fn size(&self, key: &str) -> Result<Option<usize>> {
        match self.get(key) {
            None => Ok(None),
            Some(&Value::Integer(n)) if (0..=u32::MAX.into()).contains(&n) => Ok(Some(n as usize)),
            Some(_) => Err(self.refuse(key, format!("an integer from 0 to {}", u32::MAX))),
        }
    }

    fn list(&self, key: &str, allowed: &str) -> Result<Option<&List>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::List(list)) => Ok(Some(list)),
            Some(_) => Err(self.refuse(key, allowed)),
        }
    }

    /// A list of numbers or bools.
    ///
    /// # Errors
    /// `Config` for anything else.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<Value>>> {
        let allowed = "a list of numbers";
        let Some(list) = self.list(key, allowed)? else { return Ok(None) };
        list.numbers(&self.map).map(Some).ok_or_else(|| self.refuse(key, allowed))
    }

    /// A list of texts.
    ///
    /// # Errors
    /// `Config` for anything else.
    pub fn texts(&self, key: &str) -> Result<Option<impl Iterator<Item = &str>>> {
        let allowed = "a list of texts";
        let Some(list) = self.list(key, allowed)? else { return Ok(None) };
        list.texts(&self.map).map(Some).ok_or_else(|| self.refuse(key, allowed))
    }
}

fn read(path: &Path) -> Result<(Arc<Mmap>, header::Header)> {
    let map = mapped::map(path)?;
    let header = header::parse(&map, path)?;
    Ok((map, header))
}

#[cfg(test)]
mod tests;
