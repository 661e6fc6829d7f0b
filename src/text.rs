//! Text of one request as it is generated: characters are never split, and a stop string is never shown.

use std::sync::Arc;

use crate::Result;
use crate::tokenizer::{TextStream, Tokenizer};

/// The text of a request, from its tokens.
///
/// ```text
/// text so far:  [0, shown) given to the caller | [shown, text.len()) could be the start of a stop string
/// ```
pub struct RequestText {
    tokenizer: Arc<Tokenizer>,
    stream: TextStream,
    stop: Vec<String>,
    include_stop: bool,
    /// What was decoded and not yet shown.
    held: String,
}

impl RequestText {
    /// `stop`: strings that end the text; `include_stop` leaves the one that did in it.
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        stop: Vec<String>,
        include_stop: bool,
        skip_special_tokens: bool,
    ) -> Self {
        let stream = TextStream::new(skip_special_tokens);
        Self { tokenizer, stream, stop, include_stop, held: String::new() }
    }

    /// The text that becomes certain with a token, and whether a stop string ended it.
    ///
    /// # Errors
    /// [`crate::Error::Request`] for an id that the tokenizer does not have.
    pub fn push(&mut self, token: u32) -> Result<(String, bool)> {
        self.stream.push(&self.tokenizer, token, &mut self.held)?;
        Ok(self.take(false))
    }

    /// The rest, when the request ended, and whether a stop string was in it.
    pub fn finish(&mut self) -> (String, bool) {
        self.stream.finish(&mut self.held);
        self.take(true)
    }

    fn take(&mut self, end: bool) -> (String, bool) {
        // Of several, the one that is complete first: the choice must not depend on the cuts between tokens.
        let found = self.stop.iter().filter_map(|s| self.held.find(s).map(|at| (at + s.len(), at))).min();
        if let Some((end, at)) = found {
            self.held.truncate(if self.include_stop { end } else { at });
            return (std::mem::take(&mut self.held), true);
        }
        let keep = if end { 0 } else { self.stop.iter().map(|s| overlap(&self.held, s)).max().unwrap_or(0) };
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }
}

/// Length of the longest proper prefix of `stop` that `text` ends with.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    (1..=longest)
        .rev()
        .find(|&n| stop.is_char_boundary(n) && text.as_bytes().ends_with(&stop.as_bytes()[..n]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests;
