//! One safetensors file: its header, checked against the bytes that follow it.
//!
//! ```text
//! [0, 8)        header length n, little-endian
//! [8, 8 + n)    header: a JSON object, name -> {dtype, shape, data_offsets}
//! [8 + n, end)  data; the tensors cover it exactly, without gap or overlap
//! ```
//!
//! Every offset handed out lies in the file; nothing here trusts a number of the file before checking it.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};

use super::{DType, Data, Tensor};
use crate::{Error, Result, mapped};

/// The format's own limit of a header.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// One tensor of a header, its range in bytes of the whole file.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// The tensor's name.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Row-major shape; empty for a scalar.
    pub shape: Vec<usize>,
    /// Its bytes, counted from the start of the file.
    pub range: Range<usize>,
}

/// Maps a file and checks its header.
///
/// # Errors
/// `Io` if the file cannot be opened or mapped, `File` or `Tensor` as in [`parse_header`].
pub fn open(path: &Path) -> Result<Vec<Tensor>> {
    let map = mapped::map(path)?;
    let tensors = parse_header(&map, path)?;
    let tensor = |info: TensorInfo| Tensor {
        name: info.name,
        dtype: info.dtype,
        shape: info.shape,
        data: Data::Mapped(Arc::clone(&map), info.range),
    };
    Ok(tensors.into_iter().map(tensor).collect())
}

/// The tensors of a safetensors file, in order of their bytes. `path` is for errors only.
///
/// # Errors
/// `File` if the header is not what the format demands; `Tensor` if an entry of it is not: an unknown
/// dtype, a shape whose size overflows, bytes that are out of range, of the wrong number, overlapping, or
/// that leave a gap.
pub fn parse_header(bytes: &[u8], path: &Path) -> Result<Vec<TensorInfo>> {
    let fail = |what: String| Err(Error::file(path, what));
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return fail(format!("{} bytes; a safetensors file has at least 8", bytes.len()));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return fail(format!("a header of {length} bytes; allowed: at most {MAX_HEADER_BYTES}"));
    }
    // Below the limit, so it fits.
    let length = length as usize;
    if length > rest.len() {
        return fail(format!("truncated: a header of {length} bytes, and {} bytes follow", rest.len()));
    }
    let (header, data) = rest.split_at(length);
    let text = match std::str::from_utf8(header) {
        Ok(text) => text,
        Err(e) => return fail(format!("the header is not UTF-8 at byte {}", 8 + e.valid_up_to())),
    };
    let entries = match serde_json::from_str::<Header>(text) {
        Ok(header) => header.0,
        Err(e) => return fail(format!("the header is not a table of tensors: {e}")),
    };
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        tensors.push(check_entry(name, entry, 8 + length, data.len(), path)?);
    }
    tensors.sort_by_key(|t| (t.range.start, t.range.end));
    check_coverage(&tensors, 8 + length, bytes.len(), path)?;
    Ok(tensors)
}

/// Checks one entry by itself. `start` is where the data begins in the file.
fn check_entry(name: String, entry: Entry, start: usize, data_len: usize, path: &Path) -> Result<TensorInfo> {
    let wrong = |found: String, expected: String| Error::Tensor { name: name.clone(), found, expected };
    let Some(dtype) = DType::from_name(&entry.dtype) else {
        let names: Vec<_> = DType::ALL.iter().map(|(_, name, _)| *name).collect();
        return Err(wrong(format!("dtype {:?}", entry.dtype), format!("one of {}", names.join(", "))));
    };
    let bits =
        entry.shape.iter().try_fold(dtype.bits() as u64, |bits, &dim| bits.checked_mul(dim)).ok_or_else(
            || wrong(format!("shape {:?}", entry.shape), "a shape whose size fits 64 bits".to_string()),
        )?;
    if bits % 8 != 0 {
        let found = format!("{bits} bits for {dtype} {:?}", entry.shape);
        return Err(wrong(found, "a whole number of bytes".to_string()));
    }
    let [from, to] = entry.data_offsets;
    if from > to {
        return Err(wrong(format!("bytes {from}..{to}"), "an end that is not before the start".to_string()));
    }
    if to > data_len as u64 {
        return Err(Error::file(
            path,
            format!(
                "truncated, shorter than its header says: {name} has bytes {from}..{to}, and {data_len} bytes \
                 follow the header"
            ),
        ));
    }
    if to - from != bits / 8 {
        let expected = format!("{} bytes for {dtype} {:?}", bits / 8, entry.shape);
        return Err(wrong(format!("{} bytes", to - from), expected));
    }
    // A zero in the shape lets the other dimensions be anything; they still have to be a `usize`.
    let shape: Option<Vec<usize>> = entry.shape.iter().map(|&dim| usize::try_from(dim).ok()).collect();
    let Some(shape) = shape else {
        let found = format!("shape {:?}", entry.shape);
        return Err(wrong(found, "dimensions that fit this machine's words".to_string()));
    };
    // Both are at most `data_len`, checked above.
    Ok(TensorInfo { dtype, shape, range: start + from as usize..start + to as usize, name })
}

/// Checks that the sorted tensors cover `start..end` exactly.
fn check_coverage(tensors: &[TensorInfo], start: usize, end: usize, path: &Path) -> Result<()> {
    let mut covered = start;
    for tensor in tensors {
        if tensor.range.start != covered {
            let what =
                if tensor.range.start < covered { "overlapping another tensor" } else { "after a gap" };
            return Err(Error::Tensor {
                name: tensor.name.clone(),
                found: format!("bytes from {} on, {what}", tensor.range.start - start),
                expected: format!("bytes from {} on, where the tensor before it ends", covered - start),
            });
        }
        covered = tensor.range.end;
    }
    if covered != end {
        return Err(Error::file(path, format!("{} bytes after the last tensor", end - covered)));
    }
    Ok(())
}

/// The header's entries in its own order; a name twice is an error.
struct Header(Vec<(String, Entry)>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut seen = HashSet::new();
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(de::Error::custom(format!("{name} twice")));
                    }
                    let named = |e: A::Error| de::Error::custom(format!("{name}: {e}"));
                    if name == "__metadata__" {
                        map.next_value::<std::collections::BTreeMap<String, String>>().map_err(named)?;
                    } else {
                        let entry = map.next_value().map_err(named)?;
                        entries.push((name, entry));
                    }
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
