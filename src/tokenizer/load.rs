//! From the files of a checkpoint, or the metadata of a GGUF file, to a [`Tokenizer`].

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde::Deserialize;

use super::Tokenizer;
use super::added::Matcher;
use super::bpe::{MAX_MERGES, Merges};
use super::chars::CharTable;
use super::file::{Components, MergeEntries, TokenName, TokenizerConfig, TokenizerFile, VocabEntries, read};
use super::gguf;
use super::nfc::nfc;
use super::pieces::PieceEncoder;
use super::vocab::{ID_BITS, Vocab};
use crate::gguf::Gguf;
use crate::{Error, Result, files};

/// A token that is looked for in the text before anything else.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(expecting = "an object")]
pub struct AddedToken {
    /// Its id.
    pub id: u32,
    /// Its text.
    pub content: String,
    /// Whether decoding can leave it out.
    #[serde(default)]
    pub special: bool,
    /// Whether it takes the white space before it.
    #[serde(default)]
    pub lstrip: bool,
    /// Whether it takes the white space after it.
    #[serde(default)]
    pub rstrip: bool,
    /// Whether it is looked for after normalization.
    #[serde(default)]
    pub normalized: bool,
    /// Whether it matches whole words only, which is refused.
    #[serde(default)]
    pub(super) single_word: bool,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a checkpoint directory, and `tokenizer_config.json` where there is one. Of a GGUF file
    /// ([`crate::gguf::find`]): those beside it, whose tokens must be the file's own; where there are none, its metadata.
    ///
    /// Errors: [`Error::Io`] for a file that cannot be read, [`Error::File`] for a malformed one, [`Error::Config`]
    /// for a component that this crate does not implement exactly.
    pub fn from_directory(directory: impl AsRef<Path>) -> Result<Self> {
        let directory = directory.as_ref();
        let Some(file) = crate::gguf::find(directory)? else { return beside(directory) };
        let gguf = Gguf::open(&file)?;
        match file.parent().filter(|folder| files::is_there(&folder.join(TOKENIZER))) {
            Some(folder) => {
                let tokenizer = beside(folder)?;
                gguf::check_tokens(&gguf, &tokenizer, &folder.join(TOKENIZER))?;
                Ok(tokenizer)
            }
            None => {
                let (parts, config) = gguf::parts(&gguf)?;
                build(parts, config, &file)
            }
        }
    }

    /// Reads a `tokenizer.json` alone. Errors as for [`Tokenizer::from_directory`].
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        load(path.as_ref(), TokenizerConfig::default())
    }
}

/// The place that has the tokenizer of a checkpoint, for [`Tokenizer::from_directory`]: a GGUF file or a directory;
/// `None` where its files hold no tokenizer. Of a `config.json`, those beside it count.
///
/// # Errors
/// As for [`Gguf::open`].
pub fn find_tokenizer(path: &Path) -> Result<Option<PathBuf>> {
    if let Some(file) = crate::gguf::find(path)? {
        let has = files::is_there(&file.with_file_name(TOKENIZER)) || gguf::has_tokens(&Gguf::open(&file)?);
        return Ok(has.then_some(file));
    }
    let folder = if path.is_file() { path.parent().unwrap_or(path) } else { path };
    Ok(files::is_there(&folder.join(TOKENIZER)).then(|| folder.to_path_buf()))
}

const TOKENIZER: &str = "tokenizer.json";

/// What shapes a tokenizer, checked, whatever file says it.
pub(super) struct Parts {
    pub(super) components: Components,
    pub(super) vocab: VocabEntries,
    pub(super) merges: MergeEntries,
    pub(super) added: Vec<AddedToken>,
    /// What errors call the list of added tokens.
    pub(super) added_field: &'static str,
}

fn beside(folder: &Path) -> Result<Tokenizer> {
    let path = folder.join("tokenizer_config.json");
    let config = if files::is_there(&path) { read(&path)? } else { TokenizerConfig::default() };
    load(&folder.join(TOKENIZER), config)
}

fn load(path: &Path, config: TokenizerConfig) -> Result<Tokenizer> {
    let file: TokenizerFile = read(path)?;
    let parts = Parts {
        components: file.components()?,
        vocab: file.model.vocab,
        merges: file.model.merges,
        added: file.added_tokens,
        added_field: "tokenizer.json: added_tokens",
    };
    build(parts, config, path)
}

fn build(parts: Parts, config: TokenizerConfig, path: &Path) -> Result<Tokenizer> {
    let bad = |what: String| Error::file(path, what);
    let Parts { components, vocab: entries, merges: merge_entries, added: added_tokens, added_field } = parts;

    let max_id = entries.entries.iter().map(|entry| entry.0).chain(entries.raw.values().copied());
    if let Some(id) = max_id.chain(added_tokens.iter().map(|token| token.id)).find(|&id| id >> ID_BITS != 0) {
        return Err(bad(format!("token id {id}: ids must be below {}", 1 << ID_BITS)));
    }
    let mut vocab = Vocab::new(entries.bytes, &entries.entries, entries.raw).map_err(bad)?;
    let merges = merges(&merge_entries, &vocab).map_err(bad)?;

    let chars = CharTable::new(components.marks_join);
    // The reference keeps the text of such a token as the normalizer leaves it.
    let normalize = |mut token: AddedToken| {
        if token.normalized && components.nfc {
            token.content = nfc(&token.content, &chars).into_owned();
        }
        token
    };
    let mut added = Vec::new();
    for token in added_tokens.into_iter().map(normalize) {
        add(&mut added, token, &mut vocab, added_field)?;
    }
    let mut more: Vec<AddedToken> = Vec::new();
    for (id, token) in config.added_tokens_decoder {
        let field = format!("tokenizer_config.json: added_tokens_decoder.{id}");
        let Some(id) = id.parse().ok().filter(|id: &u32| id >> ID_BITS == 0) else {
            return Err(Error::config(field, "this key", format!("an id below {}", 1 << ID_BITS)));
        };
        more.push(AddedToken {
            id,
            content: token.content,
            special: token.special,
            lstrip: token.lstrip,
            rstrip: token.rstrip,
            normalized: token.normalized,
            single_word: token.single_word,
        });
    }
    more.sort_by_key(|token| token.id);
    for token in more.into_iter().map(normalize) {
        // What tokenizer.json says of a token stands.
        match added.iter().find(|known| known.content == token.content) {
            Some(known) if known.id != token.id => {
                let field = format!("tokenizer_config.json: added_tokens_decoder.{}", token.id);
                return Err(Error::config(
                    field,
                    token.content,
                    format!("its id in tokenizer.json, {}", known.id),
                ));
            }
            Some(_) => {}
            None => add(&mut added, token, &mut vocab, "tokenizer_config.json: added_tokens_decoder")?,
        }
    }

    let (normalized, exact): (Vec<_>, Vec<_>) = added.iter().partition(|token| token.normalized);
    let exact = Matcher::new(exact.into_iter());
    let normalized = Matcher::new(normalized.into_iter());
    added.sort_by_key(|token| token.id);
    let mut special = vec![false; vocab.end() as usize];
    for token in added.iter().filter(|token| token.special) {
        special[token.id as usize] = true;
    }
    let mut tokenizer = Tokenizer {
        pieces: PieceEncoder::new(merges, &vocab),
        vocab,
        chars,
        nfc: components.nfc,
        exact,
        normalized,
        added,
        special,
        eos: None,
        pad: None,
        scratch: Mutex::new(Vec::new()),
    };
    tokenizer.eos = named(&tokenizer, "eos_token", config.eos_token)?;
    tokenizer.pad = named(&tokenizer, "pad_token", config.pad_token)?;
    Ok(tokenizer)
}

/// The id of a token that `tokenizer_config.json` names.
fn named(tokenizer: &Tokenizer, field: &str, token: Option<TokenName>) -> Result<Option<u32>> {
    let Some(token) = token else { return Ok(None) };
    match tokenizer.token_to_id(token.text()) {
        Some(id) => Ok(Some(id)),
        None => Err(Error::config(
            format!("tokenizer_config.json: {field}"),
            format!("{:?}", token.text()),
            "a token of the vocabulary",
        )),
    }
}

/// Adds one token under the id that the reference would give it, which must be the one it declares.
fn add(added: &mut Vec<AddedToken>, token: AddedToken, vocab: &mut Vocab, list: &str) -> Result<()> {
    let refuse = |what: &str, found: String, allowed: String| {
        Err(Error::config(format!("{list}: {what} of token {:?}", token.content), found, allowed))
    };
    if token.content.is_empty() {
        return refuse("content", "nothing".into(), "some text".into());
    }
    if token.single_word {
        return refuse("single_word", "true".into(), "false".into());
    }
    if let Some(known) = added.iter().find(|known| known.content == token.content) {
        return if *known == token {
            Ok(())
        } else {
            refuse("id or flags", "two entries that differ".into(), "one entry".into())
        };
    }
    let known = vocab.id_of_printable(&token.content);
    let next = added.iter().map(|token| token.id + 1).fold(vocab.len() as u32, u32::max);
    let expected = known.unwrap_or(next);
    if token.id != expected {
        let why = if known.is_some() { "its id in the vocabulary" } else { "the next free id" };
        return refuse("id", token.id.to_string(), format!("{why}, {expected}"));
    }
    if known.is_none() {
        vocab.add(token.id, &token.content);
    }
    added.push(token);
    Ok(())
}

/// The merges by id, and the tokens of the single bytes.
fn merges(entries: &MergeEntries, vocab: &Vocab) -> std::result::Result<Merges, String> {
    let mut byte_ids = [0; 256];
    for (byte, id) in (0..=255).zip(&mut byte_ids) {
        *id = vocab
            .id(&[byte])
            .ok_or_else(|| format!("model.vocab has no token for the single byte {byte}"))?;
    }
    let bytes = &entries.bytes;
    if entries.ends.len() > MAX_MERGES {
        return Err(format!("model.merges: {} merges; at most {MAX_MERGES}", entries.ends.len()));
    }
    let mut merges = Vec::with_capacity(entries.ends.len());
    let mut start = 0;
    for (rank, &(middle, end)) in entries.ends.iter().enumerate() {
        let token = |start: u32, end: u32| {
            let part = &bytes[start as usize..end as usize];
            vocab.id(part).ok_or_else(|| {
                let part = super::vocab::printable(part);
                format!("model.merges[{rank}]: {part:?} is not in the vocabulary")
            })
        };
        if middle == start || end == middle {
            return Err(format!("model.merges[{rank}] has an empty part"));
        }
        merges.push((token(start, middle)?, token(middle, end)?, token(start, end)?));
        start = end;
    }
    Ok(Merges::new(byte_ids, &merges, |id| vocab.get(id).unwrap_or_default()))
}
