//! The tokenizer that a GGUF file keeps in its metadata. Of the pre-tokenizer it has a name, and of an added token its
//! text and whether it is a control token: what `tokenizer.json` says besides is that of the family (NFC before anything
//! else, no white space taken, nothing put before or after a text). Added tokens that look like `<|...|>` are control
//! tokens to llama.cpp's converter, whatever they were before.

use std::path::Path;

use serde::de::value::Error as Reason;

use super::file::{Components, MergeEntries, TokenName, TokenizerConfig, VocabEntries};
use super::load::Parts;
use super::{AddedToken, Tokenizer};
use crate::gguf::{Gguf, Value};
use crate::{Error, Result};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const TEMPLATE: &str = "tokenizer.chat_template";

/// `llama_token_type` of llama.h.
const NORMAL: i128 = 1;
const CONTROL: i128 = 3;
const USER_DEFINED: i128 = 4;
const UNUSED: i128 = 5;

/// Whether the file has a tokenizer.
pub(super) fn has_tokens(gguf: &Gguf) -> bool {
    gguf.get(TOKENS).is_some()
}

/// The file's chat template.
///
/// # Errors
/// `Config` where it is no text.
pub(super) fn chat_template(gguf: &Gguf) -> Result<Option<&str>> {
    gguf.text(TEMPLATE)
}

/// `bos_token` and kin, by the names that templates have for them.
///
/// # Errors
/// `Config` for an id that no token has.
pub(super) fn special_tokens(gguf: &Gguf) -> Result<Vec<(String, String)>> {
    const NAMES: [(&str, &str); 4] =
        [("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")];
    let mut found = Vec::new();
    for (name, key) in NAMES {
        let token = named(gguf, &format!("tokenizer.ggml.{key}_token_id"))?;
        found.extend(token.map(|token| (name.to_string(), token)));
    }
    Ok(found)
}

/// The text of the token whose id a key has.
fn named(gguf: &Gguf, key: &str) -> Result<Option<String>> {
    let Some(id) = gguf.size(key)? else { return Ok(None) };
    let token = gguf.texts(TOKENS)?.and_then(|mut tokens| tokens.nth(id));
    token.map(|token| Some(token.to_owned())).ok_or_else(|| gguf.refuse(key, "the id of a token"))
}

/// The type of each token.
fn types(gguf: &Gguf, num_tokens: usize) -> Result<Vec<i128>> {
    let Some(list) = gguf.numbers(TYPES)? else {
        return Err(gguf.refuse(TYPES, "a type for each token"));
    };
    if list.len() != num_tokens {
        return Err(gguf.refuse(TYPES, format!("a type for each of {num_tokens} tokens")));
    }
    let mut types = Vec::with_capacity(num_tokens);
    for (id, value) in list.iter().enumerate() {
        match value {
            &Value::Integer(kind @ (NORMAL | CONTROL | USER_DEFINED | UNUSED)) => types.push(kind),
            other => {
                let field = format!("{TYPES}[{id}]");
                return Err(Error::config(field, other, "1 (normal), 3 (control), 4 (added), 5 (unused)"));
            }
        }
    }
    Ok(types)
}

/// What the metadata say, and which tokens end a text and pad it.
///
/// # Errors
/// `Config` for what is missing, and for what this crate does not do exactly.
pub(super) fn parts(gguf: &Gguf) -> Result<(Parts, TokenizerConfig)> {
    if gguf.text(MODEL)? != Some("gpt2") {
        return Err(gguf.refuse(MODEL, "\"gpt2\", which is byte-level BPE"));
    }
    let marks_join = match gguf.text(PRE)? {
        Some("qwen35") => true,
        Some("qwen2") => false,
        _ => return Err(gguf.refuse(PRE, "\"qwen35\", \"qwen2\"")),
    };
    for key in ["add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix"] {
        let key = format!("tokenizer.ggml.{key}");
        if gguf.bool(&key)? == Some(true) {
            return Err(gguf.refuse(&key, "false: nothing is put before or after a text"));
        }
    }
    let tokens = gguf.texts(TOKENS)?.ok_or_else(|| gguf.refuse(TOKENS, "a list of tokens"))?;
    let tokens: Vec<&str> = tokens.collect();
    let (mut vocab, mut added) = (VocabEntries::default(), Vec::new());
    for (id, (&token, kind)) in tokens.iter().zip(types(gguf, tokens.len())?).enumerate() {
        let bad = |e: Reason| Error::config(format!("{TOKENS}[{id}]"), format!("{token:?}"), e.to_string());
        // Far fewer than 2^32: each takes nine bytes of the file's list, which is shorter than that.
        let id = u32::try_from(id).map_err(|_| gguf.refuse(TOKENS, "fewer tokens"))?;
        match kind {
            NORMAL => vocab.push(token, id).map_err(bad)?,
            UNUSED => {}
            kind => added.push(AddedToken {
                id,
                content: token.to_owned(),
                special: kind == CONTROL,
                lstrip: false,
                rstrip: false,
                normalized: false,
                single_word: false,
            }),
        }
    }
    let mut merges = MergeEntries::default();
    let list = gguf.texts(MERGES)?.ok_or_else(|| gguf.refuse(MERGES, "a list of merges"))?;
    for (i, merge) in list.enumerate() {
        let bad = |e: Reason| Error::config(format!("{MERGES}[{i}]"), format!("{merge:?}"), e.to_string());
        merges.push(merge).map_err(bad)?;
    }
    let token = |key: &str| Ok::<_, Error>(named(gguf, key)?.map(TokenName::Text));
    let config = TokenizerConfig {
        eos_token: token("tokenizer.ggml.eos_token_id")?,
        pad_token: token("tokenizer.ggml.padding_token_id")?,
        ..TokenizerConfig::default()
    };
    let components = Components { nfc: true, marks_join };
    Ok((Parts { components, vocab, merges, added, added_field: TOKENS }, config))
}

/// Sees that a `tokenizer.json` beside the file has the file's tokens, where the file has any.
///
/// # Errors
/// `File` for the first that differs.
pub(super) fn check_tokens(gguf: &Gguf, tokenizer: &Tokenizer, path: &Path) -> Result<()> {
    let Some(tokens) = gguf.texts(TOKENS)? else { return Ok(()) };
    let tokens: Vec<&str> = tokens.collect();
    for (id, (&token, kind)) in tokens.iter().zip(types(gguf, tokens.len())?).enumerate() {
        let found = u32::try_from(id).ok().and_then(|id| tokenizer.id_to_token(id).ok());
        if kind != UNUSED && found.as_deref() != Some(token) {
            let found = found.map_or("nothing".to_string(), |found| format!("{found:?}"));
            let what = format!("token {id} is {found}; in {} it is {token:?}", gguf.path().display());
            return Err(Error::file(path, what));
        }
    }
    Ok(())
}
