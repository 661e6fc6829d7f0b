//! Incremental decoding: text as its tokens arrive, never half a character.

use super::Tokenizer;
use crate::Result;

/// Bytes that have arrived and cannot be shown yet: the start of a character, at most three bytes.
///
/// Holds no tokenizer, so that an engine can keep one per request; [`TextStream::push`] is given the tokenizer.
#[derive(Debug, Clone)]
pub struct TextStream {
    held: Vec<u8>,
    skip_special: bool,
}

impl TextStream {
    /// `skip_special`: leave special tokens out of the text.
    pub fn new(skip_special: bool) -> Self {
        TextStream { held: Vec::with_capacity(8), skip_special }
    }

    /// Appends to `out` the text that becomes certain with token `id`, possibly none.
    ///
    /// What was pushed so far plus [`TextStream::finish`] equals [`Tokenizer::decode`] of all ids.
    /// Errors: [`crate::Error::Request`] for an id that is not in the vocabulary; nothing changes then.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32, out: &mut String) -> Result<()> {
        let Some(bytes) = tokenizer.decoded(id, self.skip_special)? else { return Ok(()) };
        if self.held.is_empty()
            && let Ok(text) = std::str::from_utf8(bytes)
        {
            out.push_str(text);
            return Ok(());
        }
        self.held.extend_from_slice(bytes);
        let held = push_lossy(&self.held, out);
        self.held.drain(..self.held.len() - held);
        Ok(())
    }

    /// Appends what is held, as U+FFFD; the stream is empty afterwards.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&String::from_utf8_lossy(&self.held));
        self.held.clear();
    }
}

/// Appends `bytes` with every invalid sequence as U+FFFD, except for the start of a character at the very end, whose
/// length is returned.
fn push_lossy(bytes: &[u8], out: &mut String) -> usize {
    let mut rest = bytes;
    loop {
        match std::str::from_utf8(rest) {
            Ok(text) => {
                out.push_str(text);
                return 0;
            }
            Err(error) => {
                let (valid, after) = rest.split_at(error.valid_up_to());
                out.push_str(&String::from_utf8_lossy(valid));
                let Some(bad) = error.error_len() else { return after.len() };
                out.push('\u{fffd}');
                rest = &after[bad..];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_cut_of_any_bytes_gives_the_same_text(
            bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(0xe6), Just(0x97), Just(0xf0), Just(0x9f)], 0..40),
            cuts in prop::collection::vec(1usize..4, 40),
        ) {
            let (mut out, mut held, mut at) = (String::new(), Vec::new(), 0);
            for cut in cuts {
                let end = (at + cut).min(bytes.len());
                held.extend_from_slice(&bytes[at..end]);
                at = end;
                let keep = push_lossy(&held, &mut out);
                prop_assert!(keep <= 3);
                held.drain(..held.len() - keep);
            }
            held.extend_from_slice(&bytes[at..]);
            out.push_str(&String::from_utf8_lossy(&held));
            prop_assert_eq!(out, String::from_utf8_lossy(&bytes));
        }
    }
}
