//! Files mapped into memory, read-only: the one place that does it.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use crate::{Error, Result, files};

/// Maps a regular file.
///
/// # Errors
/// `Io` if it cannot be opened or mapped, `File` if it is not a regular file.
pub fn map(path: &Path) -> Result<Arc<Mmap>> {
    let file = files::open(path, |e| Error::io(path, e))?;
    // SAFETY: the map is read-only, and checkpoints are not written to while they are in use. Should
    // another program shorten the file, reads past its new end raise SIGBUS; no memory is corrupted.
    let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
    Ok(Arc::new(map))
}

/// Lets the system drop a part of the map from memory: it comes back from the file when it is read again.
pub fn release(map: &Mmap, range: Range<usize>) {
    #[cfg(unix)]
    // SAFETY: the map is read-only, so what is dropped comes back as it was. A refusal changes nothing.
    let _ =
        unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
}

/// Asks the system to read a part of the file now. Waits until the disk has been asked for all of it.
pub fn read_ahead(map: &Mmap, range: Range<usize>) {
    #[cfg(unix)]
    // A refusal changes nothing.
    let _ = map.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
}
