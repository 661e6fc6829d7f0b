//! The small files of a checkpoint, read whole: regular ones of a bounded size.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// Most bytes of a file of settings: a configuration, a chat template.
pub const SETTINGS: u64 = 16 << 20;
/// Most bytes of a file with an entry for each token or tensor.
pub const TABLE: u64 = 256 << 20;

/// The text of a file that a checkpoint must have, of at most so many bytes.
///
/// # Errors
/// `Io` if it is missing or cannot be read, `File` if it is not a regular file, too long, or not UTF-8.
pub fn read_text(path: &Path, most: u64) -> Result<String> {
    let file = open(path, |e| Error::io_of_checkpoint(path, e))?;
    let len = file.metadata().map_or(0, |meta| meta.len());
    let mut bytes = Vec::with_capacity(len.min(most) as usize + 1);
    file.take(most + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > most {
        return Err(Error::file(
            path,
            format!("longer than {most} bytes, the most that is read of such a file"),
        ));
    }
    String::from_utf8(bytes)
        .map_err(|e| Error::file(path, format!("not UTF-8 at byte {}", e.utf8_error().valid_up_to())))
}

/// As [`read_text`], of a file that a checkpoint may have; `None` where there is none.
///
/// # Errors
/// As [`read_text`]. A link to nothing is there and cannot be read.
pub fn read_text_if_there(path: &Path, most: u64) -> Result<Option<String>> {
    is_there(path).then(|| read_text(path, most)).transpose()
}

/// The JSON object of a file's text. A list is refused, which serde would take for an object's values in their order.
///
/// # Errors
/// `File` for anything else.
pub fn object<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T> {
    match text.trim_start().chars().next() {
        Some(first) if first != '{' => {
            Err(Error::file(path, format!("begins with {first:?}; expected a JSON object")))
        }
        _ => serde_json::from_str(text).map_err(|e| Error::file(path, e.to_string())),
    }
}

/// Whether a folder has something of that name, if only a link to nothing.
pub fn is_there(path: &Path) -> bool {
    !matches!(path.symlink_metadata(), Err(e) if e.kind() == ErrorKind::NotFound)
}

/// Opens a regular file; `refused` makes the system's errors ours.
///
/// # Errors
/// What `refused` makes, or `File` if it is not a regular file.
pub fn open(path: &Path, refused: impl Fn(io::Error) -> Error) -> Result<File> {
    // Asked before it is opened: opening a FIFO waits for a writer.
    let meta = std::fs::metadata(path).map_err(|e| match e.kind() {
        ErrorKind::NotFound if is_there(path) => {
            Error::io(path, io::Error::new(ErrorKind::NotFound, "a link to a file that does not exist"))
        }
        _ => refused(e),
    })?;
    if !meta.is_file() {
        return Err(Error::file(path, "not a regular file"));
    }
    File::open(path).map_err(refused)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_is_read_and_what_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("text"), "12345").unwrap();
        std::fs::write(path("bytes"), b"a\xff").unwrap();
        symlink(path("nothing"), path("dangling")).unwrap();
        symlink(path("loop"), path("loop")).unwrap();
        let said = |name: &str, most: u64| read_text(&path(name), most).map_err(|e| e.to_string());
        assert_eq!(said("text", 5).unwrap(), "12345");
        for (name, most, words) in [
            ("text", 4, "text: longer than 4 bytes"),
            ("bytes", 4, "bytes: not UTF-8 at byte 1"),
            ("dangling", 4, "dangling: a link to a file that does not exist"),
            ("loop", 4, "loop: Too many levels of symbolic links"),
            ("missing", 4, "missing: does not exist; the directory of a checkpoint holds"),
            (".", 4, "not a regular file"),
        ] {
            let error = said(name, most).unwrap_err();
            assert!(error.contains(words), "{name}: {error}");
        }
        assert_eq!(said("/dev/zero", 4).unwrap_err(), "/dev/zero: not a regular file");
        assert_eq!(read_text_if_there(&path("missing"), 4).unwrap(), None);
        assert!(read_text_if_there(&path("dangling"), 4).is_err());
    }

    #[test]
    fn a_list_is_no_object() {
        let said = |text: &str| object::<serde_json::Value>(Path::new("x"), text).map_err(|e| e.to_string());
        assert!(said(" {}").unwrap().is_object());
        assert_eq!(said("\n[]").unwrap_err(), "x: begins with '['; expected a JSON object");
        assert!(said("").unwrap_err().starts_with("x: EOF while parsing"));
    }
}
