//! The header of one GGUF file, checked against the bytes that follow it. All numbers are little-endian; a text is its
//! length, a u64, and UTF-8.
//!
//! ```text
//! "GGUF"  version u32  number of tensors u64  number of keys u64
//! each key       text, type u32, value; of a list: type u32, length u64, items
//! each tensor    name, dimensions u32, each u64 (the last in memory first), type u32, offset u64
//! data           from the next multiple of the alignment on; each tensor from one, in the order of their offsets
//! ```
//!
//! Every range handed out lies in the file; nothing here trusts a number of the file before checking it, and nothing is
//! allocated for a number that the file only claims.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::Path;

use super::TensorType;
use super::value::{Kind, List, Value};
use crate::{Error, Result};

const MAX_KEYS: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 20;
const MAX_KEY_BYTES: u64 = (1 << 16) - 1;
const MAX_NAME_BYTES: u64 = 1 << 8;
/// Of a value. Chat templates are the longest there are.
const MAX_TEXT_BYTES: u64 = 1 << 24;
const MAX_DIMS: u32 = 4;
const MAX_ALIGNMENT: u64 = 1 << 20;
const DEFAULT_ALIGNMENT: u64 = 32;

/// What a file says of itself.
#[derive(Debug)]
pub(super) struct Header {
    pub values: BTreeMap<String, Value>,
    /// In order of their bytes.
    pub tensors: Vec<TensorInfo>,
}

/// One tensor of a header.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TensorInfo {
    pub name: String,
    pub kind: TensorType,
    /// Row-major: what the file lists, from last to first. No dimension is 0.
    pub shape: Vec<usize>,
    /// Its bytes, counted from the start of the file.
    pub range: Range<usize>,
}

/// Reads the header of a file. `path` is for errors only.
///
/// # Errors
/// `File` if the header is not what the format demands, `Config` for a value of it that is not, `Tensor` for a tensor of
/// a type that this crate does not read, or whose bytes are out of range, overlapping, or leave a gap.
pub(super) fn parse(bytes: &[u8], path: &Path) -> Result<Header> {
    let mut cursor = Cursor { bytes, at: 0, path };
    let magic = cursor.take(4, "the magic number")?;
    if magic != b"GGUF" {
        return cursor
            .fail(format!("it starts with {:?}, not with \"GGUF\"", magic.escape_ascii().to_string()));
    }
    match cursor.u32("the version")? {
        2 | 3 => {}
        version if version.swap_bytes() < 1 << 16 && version & 0xffff == 0 => {
            return cursor.fail("big-endian; allowed: little-endian".into());
        }
        version => return cursor.fail(format!("GGUF version {version}; allowed: 2, 3")),
    }
    let num_tensors = cursor.count("tensors", MAX_TENSORS)?;
    let num_keys = cursor.count("keys", MAX_KEYS)?;
    let mut values = BTreeMap::new();
    for _ in 0..num_keys {
        let key = cursor.text("a key", MAX_KEY_BYTES)?.to_owned();
        let value = cursor.value(&key)?;
        if values.insert(key.clone(), value).is_some() {
            return cursor.fail(format!("the key {key} twice"));
        }
    }
    let alignment = alignment(&values)?;
    let (mut found, mut seen) = (Vec::new(), HashSet::new());
    for _ in 0..num_tensors {
        let (tensor, offset) = cursor.tensor()?;
        if !seen.insert(tensor.name.clone()) {
            return Err(wrong(&tensor.name, "it twice", "it once"));
        }
        if offset % alignment != 0 {
            return Err(wrong(
                &tensor.name,
                format!("offset {offset}"),
                format!("a multiple of {alignment}"),
            ));
        }
        found.push((offset, tensor));
    }
    found.sort_by_key(|(offset, _)| *offset);
    // A file is shorter than 2^63 bytes.
    let start = (cursor.at as u64).next_multiple_of(alignment);
    let tensors = place(found, start, alignment, bytes.len() as u64, path)?;
    Ok(Header { values, tensors })
}

fn wrong(name: &str, found: impl Into<String>, expected: impl Into<String>) -> Error {
    Error::Tensor { name: name.to_string(), found: found.into(), expected: expected.into() }
}

fn alignment(values: &BTreeMap<String, Value>) -> Result<u64> {
    const KEY: &str = "general.alignment";
    match values.get(KEY) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(&Value::Integer(n)) if n > 0 && n <= MAX_ALIGNMENT.into() && (n as u64).is_power_of_two() => {
            Ok(n as u64)
        }
        Some(other) => Err(Error::config(KEY, other, format!("a power of two up to {MAX_ALIGNMENT}"))),
    }
}

/// Gives each tensor its bytes; `found` is in order of offsets, counted from `start`, and sizes are in `range.end`.
fn place(
    found: Vec<(u64, TensorInfo)>,
    start: u64,
    alignment: u64,
    file_len: u64,
    path: &Path,
) -> Result<Vec<TensorInfo>> {
    let mut tensors = Vec::with_capacity(found.len());
    let mut next = 0u64;
    for (offset, mut tensor) in found {
        if offset != next {
            let what = if offset < next { "overlapping another tensor" } else { "after a gap" };
            let found = format!("bytes from {offset} on, {what}");
            return Err(wrong(
                &tensor.name,
                found,
                format!("bytes from {next} on, after the tensor before it"),
            ));
        }
        let len = tensor.range.end as u64;
        let room = file_len.saturating_sub(start).checked_sub(offset);
        if room.is_none_or(|room| len > room) {
            let what = format!(
                "truncated, shorter than its header says: {} has {len} bytes from {offset} on, and {} bytes follow \
                 the header",
                tensor.name,
                file_len.saturating_sub(start)
            );
            return Err(Error::file(path, what));
        }
        // Inside the file, which is mapped: it fits.
        let first = (start + offset) as usize;
        tensor.range = first..first + len as usize;
        next = (offset + len).next_multiple_of(alignment);
        tensors.push(tensor);
    }
    Ok(tensors)
}

/// A place in the file.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    path: &'a Path,
}

impl<'a> Cursor<'a> {
    fn fail<T>(&self, what: String) -> Result<T> {
        Err(Error::file(self.path, what))
    }

    fn rest(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8]> {
        if len > self.rest() {
            let (at, rest) = (self.at, self.rest());
            return self.fail(format!("truncated: {what} at byte {at} has {len} bytes, and {rest} follow"));
        }
        let bytes = &self.bytes[self.at..self.at + len as usize];
        self.at += len as usize;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn count(&mut self, what: &str, max: u64) -> Result<u64> {
        match self.u64("a count")? {
            n if n > max => self.fail(format!("{n} {what}; allowed: at most {max}")),
            n => Ok(n),
        }
    }

    fn text(&mut self, what: &str, max: u64) -> Result<&'a str> {
        let (at, len) = (self.at, self.u64(what)?);
        if len > max {
            return self.fail(format!("{what} of {len} bytes at byte {at}; allowed: at most {max}"));
        }
        let bytes = self.take(len, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text),
            Err(_) => self.fail(format!("{what} at byte {at} is not UTF-8")),
        }
    }

    fn kind(&mut self, key: &str) -> Result<Kind> {
        let number = self.u32("a type")?;
        let allowed = || Error::config(key, format!("type number {number}"), "the format's types, 0 to 12");
        Kind::from_number(number).ok_or_else(allowed)
    }

    fn value(&mut self, key: &str) -> Result<Value> {
        match self.kind(key)? {
            Kind::List => self.list(key),
            Kind::Text => Ok(Value::Text(self.text(key, MAX_TEXT_BYTES)?.to_owned())),
            kind => {
                let bytes = self.take(kind.size() as u64, key)?;
                kind.read(bytes).ok_or_else(|| Error::config(key, format!("byte {}", bytes[0]), "0 or 1"))
            }
        }
    }

    fn list(&mut self, key: &str) -> Result<Value> {
        let kind = self.kind(key)?;
        let len = self.u64(key)?;
        // Also where a text is empty there is its length.
        let too_long = len.checked_mul(kind.size() as u64).is_none_or(|bytes| bytes > self.rest());
        if too_long {
            let rest = self.rest();
            return self
                .fail(format!("truncated: {key} has {len} items of {kind:?}, and {rest} bytes follow"));
        }
        let start = self.at;
        match kind {
            Kind::List => return Err(Error::config(key, "a list of lists", "a list of numbers or texts")),
            Kind::Text => {
                for _ in 0..len {
                    self.text(key, MAX_TEXT_BYTES)?;
                }
            }
            kind => {
                self.take(len * kind.size() as u64, key)?;
            }
        }
        Ok(Value::List(List { kind, len: len as usize, range: start..self.at }))
    }

    /// A tensor, whose range holds its size so far, and its offset.
    fn tensor(&mut self) -> Result<(TensorInfo, u64)> {
        let name = self.text("a tensor's name", MAX_NAME_BYTES)?.to_owned();
        let num_dims = self.u32("a number of dimensions")?;
        if num_dims == 0 || num_dims > MAX_DIMS {
            return Err(wrong(&name, format!("{num_dims} dimensions"), format!("1 to {MAX_DIMS}")));
        }
        let mut dims = Vec::new();
        for _ in 0..num_dims {
            dims.push(self.u64("a dimension")?);
        }
        dims.reverse();
        let number = self.u32("a tensor's type")?;
        let kind = TensorType::from_number(number)
            .map_err(|found| wrong(&name, found, format!("one of {}", TensorType::names())))?;
        let offset = self.u64("an offset")?;
        let cols = dims[dims.len() - 1];
        if cols % kind.block_len() as u64 != 0 {
            let expected = format!("rows of whole blocks of {}", kind.block_len());
            return Err(wrong(&name, format!("rows of {cols} elements in {kind}"), expected));
        }
        let elements = dims.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim));
        let bytes = elements.filter(|&n| n > 0).and_then(|n| {
            (n / kind.block_len() as u64).checked_mul(kind.block_bytes() as u64).map(usize::try_from)
        });
        let Some(Ok(bytes)) = bytes else {
            return Err(wrong(&name, format!("shape {dims:?}"), "a shape above 0 whose size fits 64 bits"));
        };
        // Not above the number of elements, which fits.
        let shape = dims.into_iter().map(|dim| dim as usize).collect();
        Ok((TensorInfo { name, kind, shape, range: 0..bytes }, offset))
    }
}
