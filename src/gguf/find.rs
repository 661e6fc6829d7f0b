//! Which GGUF file a path means.

use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Names of files that are no model by themselves: a vision projector, an MTP module.
const COMPANIONS: [&str; 2] = ["mmproj", "mtp-"];

/// The GGUF file that `path` means: itself by its extension, or the one that a directory without safetensors holds (of
/// a model in parts, the first). `None` where it means no GGUF file.
///
/// # Errors
/// `File` for a directory with several.
pub fn find(path: &Path) -> Result<Option<PathBuf>> {
    if !path.is_dir() {
        return Ok(is_gguf(path).then(|| path.to_path_buf()));
    }
    // A directory that cannot be read is for the caller to find.
    let Ok(entries) = std::fs::read_dir(path) else { return Ok(None) };
    let names: Vec<String> =
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    if names.iter().any(|name| name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json")) {
        return Ok(None);
    }
    let mut models: Vec<String> = names.into_iter().filter(|name| is_gguf(Path::new(name))).collect();
    if models.iter().any(|name| !is_companion(name)) {
        models.retain(|name| !is_companion(name));
    }
    for name in &mut models {
        if let Some((start, _, count)) = split_name(name) {
            *name = part_name(start, 0, count);
        }
    }
    models.sort();
    models.dedup();
    match models.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(path.join(one))),
        several => {
            let what =
                format!("found {}; expected one model, or the path of one of them", several.join(", "));
            Err(Error::file(path, what))
        }
    }
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

fn is_companion(name: &str) -> bool {
    COMPANIONS.iter().any(|start| name.starts_with(start))
}

/// Start, number (from 1) and count of a part's name, `START-00001-of-00003.gguf`.
fn split_name(name: &str) -> Option<(&str, usize, usize)> {
    let (start, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (start, number) = start.rsplit_once('-')?;
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    (digits(number) && digits(count)).then_some(())?;
    Some((start, number.parse().ok()?, count.parse().ok()?))
}

fn part_name(start: &str, no: usize, count: usize) -> String {
    format!("{start}-{:05}-of-{count:05}.gguf", no + 1)
}

/// The paths of a model's parts, given the first.
///
/// # Errors
/// `File` where its name is not that of the first of `count` parts.
pub(super) fn parts(path: &Path, count: usize) -> Result<Vec<PathBuf>> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    match split_name(name) {
        Some((start, 1, named)) if named == count => {
            Ok((0..count).map(|no| path.with_file_name(part_name(start, no, count))).collect())
        }
        Some((start, _, named)) if named == count => {
            let first = part_name(start, 0, count);
            Err(Error::file(path, format!("one of {count} parts; give the first, {first}")))
        }
        _ => {
            let what =
                format!("the header says {count} parts; expected a name like X-00001-of-{count:05}.gguf");
            Err(Error::file(path, what))
        }
    }
}
