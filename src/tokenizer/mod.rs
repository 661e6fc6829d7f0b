//! Text to token ids and back, exactly as the checkpoint's own `tokenizer.json` says, or a GGUF file's metadata; and the chat template.
//!
//! ```text
//! text -> added tokens cut out (added) -> NFC (nfc) -> pieces (split, window) -> ids (pieces, bpe)
//! ids  -> bytes (vocab) -> text, whole or as it arrives (stream)
//! ```
//!
//! A [`Tokenizer`] is immutable and shared by `Arc`; what it remembers between calls is speed only, and bounded.

mod added;
mod bpe;
mod chars;
pub mod chat;
mod file;
mod gguf;
mod load;
mod memo;
mod nfc;
mod pieces;
mod split;
mod stream;
mod unicode;
mod vocab;
mod window;

use std::borrow::Cow;
use std::sync::Mutex;

use rayon::prelude::*;

pub use load::{AddedToken, find_tokenizer};
pub use stream::TextStream;

use crate::{Error, Result};
use added::Matcher;
use chars::CharTable;
use pieces::{PieceEncoder, Scratch};
use vocab::Vocab;
#[cfg(feature = "python")]
pub(crate) use vocab::prefetch;

/// A tokenizer of the family. `Send + Sync`; encoding and decoding take `&self`.
pub struct Tokenizer {
    vocab: Vocab,
    pieces: PieceEncoder,
    chars: CharTable,
    nfc: bool,
    /// Tokens looked for in the text as it is given.
    exact: Matcher,
    /// Tokens looked for after normalization.
    normalized: Matcher,
    /// By id, ascending.
    added: Vec<AddedToken>,
    /// Bit per id: a special token.
    special: Vec<bool>,
    eos: Option<u32>,
    pad: Option<u32>,
    /// Working memory of past calls, for calls to come: as many as ever ran at once.
    scratch: Mutex<Vec<Scratch>>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Tokenizer({} tokens, {} added)", self.len(), self.added.len())
    }
}

impl Tokenizer {
    /// Token ids of `text`. Added tokens in it become their ids; the text between them goes through NFC.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        self.encode_with(text, false)
    }

    /// [`Tokenizer::encode`]; with `split_special_tokens` the text of a special token is text like any other.
    /// Added tokens that are not special (`<think>`) keep their ids either way, as in the reference.
    pub fn encode_with(&self, text: &str, split_special_tokens: bool) -> Vec<u32> {
        let mut scratch = self.lock().pop().unwrap_or_default();
        let mut out = std::mem::take(&mut scratch.out);
        out.clear();
        self.encode_using(&mut scratch, text, split_special_tokens, &mut out);
        let ids = out.as_slice().to_vec();
        // One very long text must not hold its memory for ever.
        if out.capacity() <= 1 << 20 {
            scratch.out = out;
        }
        self.lock().push(scratch);
        ids
    }

    /// [`Tokenizer::encode_with`], appending to `out`.
    pub fn encode_to(&self, text: &str, split_special_tokens: bool, out: &mut Vec<u32>) {
        let mut scratch = self.lock().pop().unwrap_or_default();
        self.encode_using(&mut scratch, text, split_special_tokens, out);
        self.lock().push(scratch);
    }

    fn encode_using(&self, scratch: &mut Scratch, text: &str, plain_special: bool, out: &mut Vec<u32>) {
        cut(&self.exact, text, plain_special, out, |text, out| {
            let text = if self.nfc { nfc::nfc(text, &self.chars) } else { Cow::Borrowed(text) };
            cut(&self.normalized, &text, plain_special, out, |text, out| {
                self.pieces.encode(&self.chars, &self.vocab, text.as_bytes(), scratch, out);
            });
        });
    }

    /// [`Tokenizer::encode_with`] for every text, over all cores.
    pub fn encode_batch<T: AsRef<str> + Sync>(
        &self,
        texts: &[T],
        split_special_tokens: bool,
    ) -> Vec<Vec<u32>> {
        texts.par_iter().map(|text| self.encode_with(text.as_ref(), split_special_tokens)).collect()
    }

    /// Text of `ids`, with U+FFFD for bytes that are not UTF-8. `skip_special_tokens` leaves special tokens out.
    ///
    /// Errors: [`Error::Request`] for an id that is not in the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        let mut bytes = Vec::with_capacity(4 * ids.len());
        for &id in ids {
            if let Some(token) = self.decoded(id, skip_special_tokens)? {
                bytes.extend_from_slice(token);
            }
        }
        Ok(String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned()))
    }

    /// The bytes that `id` adds to the text; `None` for a special token that is skipped.
    fn decoded(&self, id: u32, skip_special_tokens: bool) -> Result<Option<&[u8]>> {
        if skip_special_tokens && self.is_special(id) {
            return Ok(None);
        }
        self.token_bytes(id).map(Some)
    }

    /// The bytes that token `id` decodes to, not always UTF-8.
    ///
    /// Errors: [`Error::Request`] for an id that is not in the vocabulary.
    pub fn token_bytes(&self, id: u32) -> Result<&[u8]> {
        self.vocab.get(id).ok_or_else(|| self.unknown(id))
    }

    /// Token `id` as `tokenizer.json` spells it: bytes in GPT-2's printable form, added tokens as they are.
    ///
    /// Errors: [`Error::Request`] for an id that is not in the vocabulary.
    pub fn id_to_token(&self, id: u32) -> Result<String> {
        if let Some(token) = self.added_token(id) {
            return Ok(token.content.clone());
        }
        let bytes = self.token_bytes(id)?;
        Ok(self.vocab.raw(id).map_or_else(|| vocab::printable(bytes), str::to_owned))
    }

    /// Id of a token spelled as [`Tokenizer::id_to_token`] does.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        let added = self.added.iter().find(|added| added.content == token).map(|added| added.id);
        added.or_else(|| self.vocab.id_of_printable(token))
    }

    /// One more than the largest id: the number of ids that can be produced, added tokens included.
    #[allow(clippy::len_without_is_empty)] // never empty: every byte has a token
    pub fn len(&self) -> usize {
        self.vocab.end() as usize
    }

    /// Number of tokens in the model's own vocabulary, added tokens left out.
    pub fn vocab_size(&self) -> usize {
        self.vocab.len()
    }

    /// Added tokens by id, ascending.
    pub fn added_tokens(&self) -> &[AddedToken] {
        &self.added
    }

    /// Ids of the special tokens, ascending.
    pub fn special_ids(&self) -> impl Iterator<Item = u32> {
        self.added.iter().filter(|token| token.special).map(|token| token.id)
    }

    /// Whether `id` is a special token, which decoding can leave out.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize) == Some(&true)
    }

    /// `eos_token` of `tokenizer_config.json`, or what GGUF's metadata name.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }

    /// `pad_token` of `tokenizer_config.json`, or what GGUF's metadata name.
    pub fn pad_id(&self) -> Option<u32> {
        self.pad
    }

    fn added_token(&self, id: u32) -> Option<&AddedToken> {
        self.added.binary_search_by_key(&id, |token| token.id).ok().map(|i| &self.added[i])
    }

    fn unknown(&self, id: u32) -> Error {
        Error::request(
            "token id",
            id,
            format!("an id of the vocabulary, 0 to {}", self.len().saturating_sub(1)),
        )
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Scratch>> {
        // Working memory is valid in any state.
        self.scratch.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Appends the ids of the matches in `text`, and what `encode` makes of the text between them.
fn cut(
    matcher: &Matcher,
    text: &str,
    plain_special: bool,
    out: &mut Vec<u32>,
    mut encode: impl FnMut(&str, &mut Vec<u32>),
) {
    if matcher.is_empty() {
        return encode(text, out);
    }
    let mut done = 0;
    matcher.matches(text, plain_special, |found| {
        if done < found.start {
            encode(&text[done..found.start], out);
        }
        out.push(found.id);
        done = found.end;
    });
    if done < text.len() {
        encode(&text[done..], out);
    }
}
