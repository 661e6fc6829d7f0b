//! `tokenizer.json` and `tokenizer_config.json`, read and checked: every component that shapes the result is the one
//! this crate implements exactly, or is refused by name.
//!
//! The vocabulary and the merges, nearly all of the file, go straight into flat buffers.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::AddedToken;
use super::vocab::push_bytes_of;
use crate::{Error, Result, files};

/// The pattern of Qwen3.5, in which marks join words.
const PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// The pattern of Qwen2 and Qwen3.
const PATTERN_QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// `tokenizer.json`. Truncation and padding are settings of a call, not of a tokenizer, and are not read.
#[derive(Deserialize)]
#[serde(expecting = "an object")]
pub(super) struct TokenizerFile {
    #[serde(default)]
    pub(super) added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    pub(super) model: Model,
}

/// The `model` of `tokenizer.json`.
#[derive(Deserialize)]
#[serde(expecting = "an object")]
pub(super) struct Model {
    #[serde(rename = "type", default)]
    kind: Value,
    #[serde(default)]
    dropout: Value,
    #[serde(default)]
    continuing_subword_prefix: Value,
    #[serde(default)]
    end_of_word_suffix: Value,
    #[serde(default)]
    byte_fallback: Value,
    #[serde(default)]
    ignore_merges: Value,
    pub(super) vocab: VocabEntries,
    pub(super) merges: MergeEntries,
}

/// The vocabulary as the file lists it: token bytes back to back.
#[derive(Default)]
pub(super) struct VocabEntries {
    pub(super) bytes: Vec<u8>,
    /// `(id, start, len)`
    pub(super) entries: Vec<(u32, u32, u32)>,
    /// Entries with a character that stands for no byte.
    pub(super) raw: HashMap<String, u32>,
}

/// The merges as the file lists them: the bytes of left and right parts back to back.
#[derive(Default)]
pub(super) struct MergeEntries {
    pub(super) bytes: Vec<u8>,
    /// End of each left part and of each right part.
    pub(super) ends: Vec<(u32, u32)>,
}

/// What `tokenizer.json` asks for beyond the model.
pub(super) struct Components {
    pub(super) nfc: bool,
    pub(super) marks_join: bool,
}

impl TokenizerFile {
    /// Checks every component; errors are [`Error::Config`] with the component's path.
    pub(super) fn components(&self) -> Result<Components> {
        let nfc = match kind(&self.normalizer) {
            "" if self.normalizer.is_null() => false,
            "NFC" => true,
            _ => return Err(refused("normalizer", &self.normalizer, "NFC, or null")),
        };
        let allowed =
            "a Sequence of Split (the pattern of Qwen3.5 or of Qwen2, Isolated) and ByteLevel (no regex)";
        let steps = match (kind(&self.pre_tokenizer), self.pre_tokenizer.get("pretokenizers")) {
            ("Sequence", Some(Value::Array(steps))) => steps.as_slice(),
            _ => &[],
        };
        let [split, byte_level] = steps else {
            return Err(refused("pre_tokenizer", &self.pre_tokenizer, allowed));
        };
        if kind(split) != "Split"
            || split["behavior"] != "Isolated"
            || !matches!(split.get("invert"), None | Some(Value::Bool(false)))
        {
            return Err(refused("pre_tokenizer.pretokenizers[0]", split, allowed));
        }
        let marks_join = match split["pattern"]["Regex"].as_str() {
            Some(PATTERN) => true,
            Some(PATTERN_QWEN2) => false,
            _ => {
                let allowed = format!("{PATTERN} or {PATTERN_QWEN2}");
                return Err(refused("pre_tokenizer.pretokenizers[0].pattern", &split["pattern"], &allowed));
            }
        };
        if kind(byte_level) != "ByteLevel"
            || byte_level["add_prefix_space"] != false
            || byte_level["use_regex"] != false
        {
            return Err(refused("pre_tokenizer.pretokenizers[1]", byte_level, allowed));
        }
        if !self.post_processor.is_null() && kind(&self.post_processor) != "ByteLevel" {
            return Err(refused("post_processor", &self.post_processor, "ByteLevel, or null"));
        }
        if kind(&self.decoder) != "ByteLevel" {
            return Err(refused("decoder", &self.decoder, "ByteLevel"));
        }
        self.model.check()?;
        Ok(Components { nfc, marks_join })
    }
}

impl Model {
    fn check(&self) -> Result<()> {
        let empty = |value: &Value| value.is_null() || *value == "";
        let off = |value: &Value| value.is_null() || *value == false;
        let zero = |value: &Value| value.is_null() || value.as_f64() == Some(0.0);
        for (name, value, fine, allowed) in [
            ("type", &self.kind, self.kind.is_null() || self.kind == "BPE", "BPE"),
            ("dropout", &self.dropout, zero(&self.dropout), "null"),
            (
                "continuing_subword_prefix",
                &self.continuing_subword_prefix,
                empty(&self.continuing_subword_prefix),
                "null, or empty",
            ),
            (
                "end_of_word_suffix",
                &self.end_of_word_suffix,
                empty(&self.end_of_word_suffix),
                "null, or empty",
            ),
            ("byte_fallback", &self.byte_fallback, off(&self.byte_fallback), "false"),
            ("ignore_merges", &self.ignore_merges, off(&self.ignore_merges), "false"),
        ] {
            if !fine {
                return Err(refused(&format!("model.{name}"), value, allowed));
            }
        }
        Ok(())
    }
}

fn kind(component: &Value) -> &str {
    component.get("type").and_then(Value::as_str).unwrap_or("")
}

fn refused(component: &str, found: &Value, allowed: &str) -> Error {
    let mut found = found.to_string();
    if let Some((cut, _)) = found.char_indices().nth(300) {
        found.truncate(cut);
        found.push_str("...");
    }
    Error::config(format!("tokenizer.json: {component}"), found, allowed)
}

/// Reads a JSON file into `T`; a missing file is [`Error::Io`], a malformed one [`Error::File`].
pub(super) fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    files::object(path, &files::read_text(path, files::TABLE)?)
}

impl<'de> Deserialize<'de> for VocabEntries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(VocabEntries::default())
    }
}

impl<'de> Visitor<'de> for VocabEntries {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a map from token to id")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self, A::Error> {
        while let Some(token) = map.next_key_seed(PushBytes(&mut self.bytes))? {
            let id = map.next_value()?;
            self.place(token, id)?;
        }
        Ok(self)
    }
}

impl VocabEntries {
    /// Adds a token by its printable form.
    pub(super) fn push<E: serde::de::Error>(&mut self, text: &str, id: u32) -> Result<(), E> {
        let token = PushBytes(&mut self.bytes).visit_str(text)?;
        self.place(token, id)
    }

    fn place<E: serde::de::Error>(&mut self, token: Pushed, id: u32) -> Result<(), E> {
        match token {
            Pushed::Bytes(start, len) => self.entries.push((id, start, len)),
            Pushed::Raw(text) => {
                if self.raw.insert(text.clone(), id).is_some() {
                    return Err(E::custom(format!("token {text:?} is listed twice")));
                }
            }
        }
        Ok(())
    }
}

impl MergeEntries {
    /// Adds a merge, two tokens with a space between them.
    pub(super) fn push<E: serde::de::Error>(&mut self, text: &str) -> Result<(), E> {
        PushMerge(self).visit_str(text)
    }
}

/// Where a string's bytes went.
enum Pushed {
    /// `(start, len)`
    Bytes(u32, u32),
    /// Nowhere: one of its characters stands for no byte.
    Raw(String),
}

/// Appends the bytes that a JSON string stands for.
struct PushBytes<'a>(&'a mut Vec<u8>);

impl<'de> serde::de::DeserializeSeed<'de> for PushBytes<'_> {
    type Value = Pushed;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Pushed, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for PushBytes<'_> {
    type Value = Pushed;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a token")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Pushed, E> {
        let start = self.0.len();
        if !push_bytes_of(text, self.0) {
            return Ok(Pushed::Raw(text.to_owned()));
        }
        let end = u32::try_from(self.0.len()).map_err(|_| E::custom("more than 4 GiB of tokens"))?;
        Ok(Pushed::Bytes(start as u32, end - start as u32))
    }
}

impl<'de> Deserialize<'de> for MergeEntries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(MergeEntries::default())
    }
}

impl<'de> Visitor<'de> for MergeEntries {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a list of merges")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut seq: A) -> Result<Self, A::Error> {
        while seq.next_element_seed(PushMerge(&mut self))?.is_some() {}
        Ok(self)
    }
}

/// Appends one merge, `["a", "b"]` or `"a b"`.
struct PushMerge<'a>(&'a mut MergeEntries);

impl<'de> serde::de::DeserializeSeed<'de> for PushMerge<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl PushMerge<'_> {
    fn push<E: serde::de::Error>(self, left: Pushed, right: Pushed) -> Result<(), E> {
        match (left, right) {
            (Pushed::Bytes(left, left_len), Pushed::Bytes(right, right_len)) => {
                self.0.ends.push((left + left_len, right + right_len));
                Ok(())
            }
            // Such a pair cannot come up, but it takes a rank.
            _ => Err(E::custom("a merge holds a character that stands for no byte")),
        }
    }
}

impl<'de> Visitor<'de> for PushMerge<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a merge: two tokens, as a list or with a space between them")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<(), E> {
        if text.starts_with("#version") {
            return Ok(());
        }
        let mut parts = text.split(' ');
        let (Some(left), Some(right), None) = (parts.next(), parts.next(), parts.next()) else {
            return Err(E::custom(format!("merge {text:?} is not two tokens with a space between them")));
        };
        let left = PushBytes(&mut self.0.bytes).visit_str(left)?;
        let right = PushBytes(&mut self.0.bytes).visit_str(right)?;
        self.push(left, right)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let left = seq.next_element_seed(PushBytes(&mut self.0.bytes))?;
        let right = seq.next_element_seed(PushBytes(&mut self.0.bytes))?;
        let (Some(left), Some(right)) = (left, right) else {
            return Err(A::Error::custom("a merge has fewer than two tokens"));
        };
        if seq.next_element::<serde::de::IgnoredAny>()?.is_some() {
            return Err(A::Error::custom("a merge has more than two tokens"));
        }
        self.push(left, right)
    }
}

/// The part of `tokenizer_config.json` that matters here.
#[derive(Deserialize, Default)]
#[serde(expecting = "an object")]
pub(super) struct TokenizerConfig {
    #[serde(default)]
    pub(super) added_tokens_decoder: HashMap<String, ConfigToken>,
    #[serde(default)]
    pub(super) eos_token: Option<TokenName>,
    #[serde(default)]
    pub(super) pad_token: Option<TokenName>,
}

/// An entry of `added_tokens_decoder`; flags that are missing are off.
#[derive(Deserialize)]
#[serde(expecting = "an object")]
pub(super) struct ConfigToken {
    pub(super) content: String,
    #[serde(default)]
    pub(super) single_word: bool,
    #[serde(default)]
    pub(super) lstrip: bool,
    #[serde(default)]
    pub(super) rstrip: bool,
    #[serde(default)]
    pub(super) normalized: bool,
    #[serde(default)]
    pub(super) special: bool,
}

/// A token's text, alone or with its flags.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string, or an object with a content")]
pub(super) enum TokenName {
    /// `"<|im_end|>"`
    Text(String),
    /// `{"content": "<|im_end|>", ...}`
    Token {
        /// The text.
        content: String,
    },
}

impl TokenName {
    pub(super) fn text(&self) -> &str {
        match self {
            TokenName::Text(text) | TokenName::Token { content: text } => text,
        }
    }
}
