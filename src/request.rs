//! The nouns of serving: what a caller asks for, and where its request stands.

use std::sync::Arc;

use crate::batch::{PageId, SlotId};
use crate::lend::Lendable;
use crate::{Error, Result};

/// Identity of a request, unique in its engine; later requests have larger ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// How tokens are chosen and when a request ends. Steps apply in the order of the fields' groups.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Added to the logits of these tokens, before anything else.
    pub logit_bias: Vec<(u32, f32)>,
    /// Logits of tokens seen in prompt or output are divided (positive) or multiplied (negative) by it; > 0.
    pub repetition_penalty: f32,
    /// Times the count of a token in the output, subtracted from its logit; -2 to 2.
    pub frequency_penalty: f32,
    /// Subtracted from the logit of every token of the output; -2 to 2.
    pub presence_penalty: f32,

    /// Logits are divided by it; 0 takes the largest.
    pub temperature: f32,
    /// Only the k most likely tokens; 0 for all. Ties go to the lower id.
    pub top_k: usize,
    /// Only the most likely tokens whose probabilities (after `top_k`) reach this sum; (0, 1].
    pub top_p: f32,
    /// Only tokens at least this likely, relative to the most likely; [0, 1].
    pub min_p: f32,
    /// Random numbers depend on this and on the token's position alone.
    pub seed: Option<u64>,

    /// Log-probabilities of the chosen token and this many of the best, of the logits as the model gives them.
    pub logprobs: Option<usize>,
    /// Tokens to generate at most; `None` for as many as the context holds.
    pub max_tokens: Option<usize>,
    /// Stop tokens are not chosen before this many tokens.
    pub min_tokens: usize,
    /// Tokens that end the request, besides the model's own.
    pub stop_token_ids: Vec<u32>,
    /// Whether the model's own stop tokens are ordinary ones.
    pub ignore_eos: bool,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            logit_bias: Vec::new(),
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: None,
            logprobs: None,
            max_tokens: None,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
        }
    }
}

/// Most log-probabilities a request may ask for per token.
pub const MAX_LOGPROBS: usize = 1024;

impl SamplingParams {
    /// Refuses what cannot be served, by name.
    ///
    /// # Errors
    /// [`Error::Request`] naming the parameter, the value found and the values allowed.
    pub fn check(&self, vocab: usize) -> Result<()> {
        let number = |field: &str, x: f32, ok: bool, allowed: &str| {
            if ok && x.is_finite() { Ok(()) } else { Err(Error::request(field, x, allowed)) }
        };
        let t = self.temperature;
        number("temperature", t, t >= 0.0, "a finite number >= 0")?;
        number("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "0 < top_p <= 1")?;
        number("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "0 <= min_p <= 1")?;
        let r = self.repetition_penalty;
        number("repetition_penalty", r, r > 0.0, "a finite number > 0")?;
        for (field, x) in
            [("frequency_penalty", self.frequency_penalty), ("presence_penalty", self.presence_penalty)]
        {
            number(field, x, (-2.0..=2.0).contains(&x), "-2 to 2")?;
        }
        if self.max_tokens == Some(0) {
            return Err(Error::request(
                "max_tokens",
                0,
                "at least 1, or None for as many as the context holds",
            ));
        }
        if let Some(max) = self.max_tokens.filter(|&max| self.min_tokens > max) {
            return Err(Error::request("min_tokens", self.min_tokens, format!("at most max_tokens = {max}")));
        }
        if let Some(n) = self.logprobs.filter(|&n| n > MAX_LOGPROBS) {
            return Err(Error::request("logprobs", n, format!("0 to {MAX_LOGPROBS}")));
        }
        let known = |field: &str, id: u32| {
            if (id as usize) < vocab {
                Ok(())
            } else {
                Err(Error::request(field, id, format!("token ids below {vocab}")))
            }
        };
        self.stop_token_ids.iter().try_for_each(|&id| known("stop_token_ids", id))?;
        for &(id, bias) in &self.logit_bias {
            known("logit_bias", id)?;
            number("logit_bias", bias, true, "finite numbers")?;
        }
        Ok(())
    }

    /// Whether how a token is chosen depends on the tokens before it, not only on their number.
    pub fn looks_back(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }
}

/// Why a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token, or a stop string.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
}

/// Log-probabilities of one generated token, by the model's own logits.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Of the chosen token.
    pub chosen: f32,
    /// How many tokens are more likely than the chosen one, plus one.
    pub rank: usize,
    /// The best tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// What a request is answered with.
#[derive(Debug, Clone)]
pub enum Wanted {
    /// Generated tokens.
    Tokens(SamplingParams),
    /// Logits after each token of the prompt.
    Logits,
    /// The same, in memory of the device.
    DeviceLogits,
    /// Logits of the MTP module's drafts: of the token after each pair of neighbours in the prompt.
    MtpLogits,
}

/// A request inside the engine.
///
/// ```text
/// tokens:  [0, num_prompt) the prompt | [num_prompt, tokens.len()) generated
///          [0, computed_len) in pages and slot | the others still to compute; the last one's logits give the next
/// ```
#[derive(Debug)]
pub struct Request {
    /// Its identity.
    pub id: RequestId,
    /// Prompt and output.
    pub tokens: Vec<u32>,
    /// Length of the prompt.
    pub num_prompt: usize,
    /// Tokens whose keys, values and state are held.
    pub computed_len: usize,
    /// What it is answered with.
    pub wanted: Wanted,
    /// Key of its random numbers.
    pub seed: u64,
    /// Its pages, in the order of its tokens.
    pub pages: Vec<PageId>,
    /// Its state, while it runs.
    pub slot: Option<SlotId>,
    /// Logits of the computed prompt tokens, `[up to num_logit_rows, vocab]`, where they are wanted.
    pub logits: Vec<f32>,
    /// Where they go that are wanted on the device.
    pub device_logits: Option<Arc<dyn Lendable>>,
}

impl Request {
    /// Generated tokens.
    pub fn output(&self) -> &[u32] {
        &self.tokens[self.num_prompt..]
    }

    /// Whether the step that computes up to `len` tokens ends with logits to sample.
    pub fn samples_at(&self, len: usize) -> bool {
        self.params().is_some() && len == self.tokens.len()
    }

    /// Gives the output the token at a place: the next, or one that a placeholder was put for.
    pub fn set_token(&mut self, place: usize, token: u32) {
        match self.tokens.get_mut(place) {
            Some(placeholder) => *placeholder = token,
            None => self.tokens.push(token),
        }
    }

    /// How it is sampled, if it is.
    pub fn params(&self) -> Option<&SamplingParams> {
        match &self.wanted {
            Wanted::Tokens(params) => Some(params),
            Wanted::Logits | Wanted::DeviceLogits | Wanted::MtpLogits => None,
        }
    }

    /// Rows of logits that it is answered with.
    pub fn num_logit_rows(&self) -> usize {
        match self.wanted {
            Wanted::Tokens(_) => 0,
            Wanted::Logits | Wanted::DeviceLogits => self.num_prompt,
            Wanted::MtpLogits => self.num_prompt.saturating_sub(1),
        }
    }
}
