//! `generation_config.json`: the checkpoint's own stop tokens and sampling defaults.

use std::path::Path;

use serde::Serialize;

use super::fields::Fields;
use super::read_error;
use crate::{Error, Result};

/// What a checkpoint says about generation. Absent keys stay `None`, and the caller's defaults apply.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct GenerationConfig {
    /// Tokens that end a turn; empty if the file names none.
    pub eos_token_ids: Vec<u32>,
    /// Padding token.
    pub pad_token_id: Option<u32>,
    /// First token of a text, unused by the family.
    pub bos_token_id: Option<u32>,
    /// `false` asks for the most likely token, whatever the values below.
    pub do_sample: Option<bool>,
    /// Divides the logits; 0 is greedy.
    pub temperature: Option<f64>,
    /// Share of probability that is kept, in `(0, 1]`.
    pub top_p: Option<f64>,
    /// Tokens that are kept; 0 keeps all.
    pub top_k: Option<usize>,
    /// Share of the best token's probability below which a token is dropped, in `[0, 1]`.
    pub min_p: Option<f64>,
    /// Divides the positive logits of tokens that occurred; 1 is none.
    pub repetition_penalty: Option<f64>,
    /// Subtracted from the logits of tokens that occurred; 0 is none.
    pub presence_penalty: Option<f64>,
    /// Subtracted per occurrence; 0 is none.
    pub frequency_penalty: Option<f64>,
    /// Most tokens to generate.
    pub max_new_tokens: Option<usize>,
}

impl GenerationConfig {
    /// Reads `generation_config.json` of a checkpoint directory. A missing file gives the default.
    ///
    /// # Errors
    /// `Io` if the file is there and cannot be read, `File` if it is not JSON, `Config` for a value of a
    /// wrong type or out of range.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("generation_config.json");
        match std::fs::read_to_string(&path) {
            Ok(text) => Self::from_json(&text, &path),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(read_error(&path, e)),
        }
    }

    /// Reads the text of a `generation_config.json`. `origin` is the file that errors name.
    ///
    /// # Errors
    /// `File` if the text is not JSON, `Config` for a value of a wrong type or out of range.
    pub fn from_json(text: &str, origin: &Path) -> Result<Self> {
        let value = serde_json::from_str(text).map_err(|e| Error::file(origin, format!("not JSON: {e}")))?;
        let fields = Fields::new("generation_config", &value)?;
        let id = |key: &str| {
            let max = u64::from(u32::MAX);
            Ok::<_, Error>(fields.integer(key, 0, max)?.and_then(|n| u32::try_from(n).ok()))
        };
        let positive = |key: &str, max: f64| match fields.number_in(key, 0.0, max)? {
            Some(0.0) => Err(fields.refuse(key, format!("a number above 0, at most {max}"))),
            other => Ok(other),
        };
        Ok(GenerationConfig {
            eos_token_ids: fields.token_ids("eos_token_id")?.unwrap_or_default(),
            pad_token_id: id("pad_token_id")?,
            bos_token_id: id("bos_token_id")?,
            do_sample: fields.bool("do_sample")?,
            temperature: fields.number_in("temperature", 0.0, 1e6)?,
            top_p: positive("top_p", 1.0)?,
            top_k: fields.integer("top_k", 0, u64::from(u32::MAX))?,
            min_p: fields.number_in("min_p", 0.0, 1.0)?,
            repetition_penalty: positive("repetition_penalty", 1e6)?,
            presence_penalty: fields.number_in("presence_penalty", -1e6, 1e6)?,
            frequency_penalty: fields.number_in("frequency_penalty", -1e6, 1e6)?,
            max_new_tokens: fields.integer("max_new_tokens", 1, u64::from(u32::MAX))?,
        })
    }

    /// Whether the file asks for the most likely token at every step.
    pub fn is_greedy(&self) -> bool {
        self.do_sample == Some(false) || self.temperature == Some(0.0)
    }
}
