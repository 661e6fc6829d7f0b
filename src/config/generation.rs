//! `generation_config.json`: the checkpoint's own stop tokens and sampling defaults.

use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::ModelConfig;
use super::fields::Fields;
use crate::gguf::Gguf;
use crate::{Error, Result, files};

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
    /// Most tokens of prompt and output, where that is the limit. Not implemented: see [`GenerationConfig::check`].
    #[serde(skip)]
    max_length: Option<usize>,
}

/// What Transformers takes for no `max_length` at all.
const DEFAULT_MAX_LENGTH: usize = 20;

/// A value of Transformers that has no effect.
enum Neutral {
    /// Absent, `null`, or an empty list, object or string.
    Nothing,
    /// This number too.
    Number(f64),
    /// `false` too.
    False,
}

/// Keys that change what is generated and that are not implemented, with the value that has no effect.
const UNSUPPORTED: [(&str, Neutral); 28] = [
    ("num_beams", Neutral::Number(1.0)),
    ("num_beam_groups", Neutral::Number(1.0)),
    ("diversity_penalty", Neutral::Number(0.0)),
    ("constraints", Neutral::Nothing),
    ("force_words_ids", Neutral::Nothing),
    ("typical_p", Neutral::Number(1.0)),
    ("top_h", Neutral::Nothing),
    ("epsilon_cutoff", Neutral::Number(0.0)),
    ("eta_cutoff", Neutral::Number(0.0)),
    ("penalty_alpha", Neutral::Number(0.0)),
    ("dola_layers", Neutral::Nothing),
    ("guidance_scale", Neutral::Number(1.0)),
    ("encoder_repetition_penalty", Neutral::Number(1.0)),
    ("no_repeat_ngram_size", Neutral::Number(0.0)),
    ("encoder_no_repeat_ngram_size", Neutral::Number(0.0)),
    ("bad_words_ids", Neutral::Nothing),
    ("sequence_bias", Neutral::Nothing),
    ("suppress_tokens", Neutral::Nothing),
    ("begin_suppress_tokens", Neutral::Nothing),
    ("forced_bos_token_id", Neutral::Nothing),
    ("forced_eos_token_id", Neutral::Nothing),
    ("exponential_decay_length_penalty", Neutral::Nothing),
    ("min_length", Neutral::Number(0.0)),
    ("min_new_tokens", Neutral::Number(0.0)),
    ("max_time", Neutral::Nothing),
    ("stop_strings", Neutral::Nothing),
    ("watermarking_config", Neutral::Nothing),
    ("token_healing", Neutral::False),
];

impl Neutral {
    fn covers(&self, value: &Value) -> bool {
        let empty = match value {
            Value::Null => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            Value::String(text) => text.is_empty(),
            Value::Bool(_) | Value::Number(_) => false,
        };
        match self {
            Neutral::Nothing => empty,
            Neutral::Number(neutral) => empty || value.as_f64() == Some(*neutral),
            Neutral::False => empty || value == &Value::Bool(false),
        }
    }

    fn allowed(&self) -> String {
        let only = match self {
            Neutral::Nothing => "null".to_string(),
            Neutral::Number(neutral) => neutral.to_string(),
            Neutral::False => "false".to_string(),
        };
        format!("{only}; this version does not implement it")
    }
}

impl GenerationConfig {
    /// Reads `generation_config.json` of a checkpoint directory. A missing file gives the default. Of a GGUF file: the
    /// one beside it, else what its metadata say.
    ///
    /// # Errors
    /// `Io` if the file is there and cannot be read, `File` if it is not JSON, `Config` for a value of a
    /// wrong type or out of range, or one that asks for what is not implemented.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let found = crate::gguf::find(dir)?;
        let path = found.as_deref().and_then(Path::parent).unwrap_or(dir).join("generation_config.json");
        if let Some(file) = found.filter(|_| !files::is_there(&path)) {
            return super::gguf::generation_config(&Gguf::open(&file)?);
        }
        match files::read_text_if_there(&path, files::SETTINGS)? {
            Some(text) => Self::from_json(&text, &path),
            None => Ok(Self::default()),
        }
    }

    /// Reads the text of a `generation_config.json`. `origin` is the file that errors name.
    ///
    /// # Errors
    /// `File` if the text is not JSON, `Config` for a value of a wrong type or out of range, or one that asks for
    /// what is not implemented.
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
        for (key, neutral) in &UNSUPPORTED {
            if fields.get(key).is_some_and(|value| !neutral.covers(value)) {
                return Err(fields.refuse(key, neutral.allowed()));
            }
        }
        // The prompt counts too, so it is no limit of new tokens; Transformers reads it where there is none of those.
        let max_new_tokens = fields.integer("max_new_tokens", 1, u64::from(u32::MAX))?;
        let max_length = fields.integer("max_length", 0, u64::from(u32::MAX))?;
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
            max_new_tokens,
            max_length: max_length.filter(|&n| max_new_tokens.is_none() && n != DEFAULT_MAX_LENGTH),
        })
    }

    /// Checks what only the model can tell.
    ///
    /// # Errors
    /// `Config` for a stop token outside the vocabulary, and for a `max_length` below the context.
    pub fn check(&self, config: &ModelConfig) -> Result<()> {
        let (vocab, context) = (config.vocab, config.max_context());
        if let Some(id) = self.eos_token_ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::config(
                "generation_config.eos_token_id",
                id,
                format!("token ids, 0 to {}", vocab - 1),
            ));
        }
        match self.max_length {
            Some(n) if n < context => Err(Error::config(
                "generation_config.max_length",
                n,
                format!(
                    "null, or the context of {context} tokens and more; max_new_tokens limits the output"
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Whether the file asks for the most likely token at every step.
    pub fn is_greedy(&self) -> bool {
        self.do_sample == Some(false) || self.temperature == Some(0.0)
    }
}
