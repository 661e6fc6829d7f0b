//! Choosing tokens on a device: what it must know of a row of logits, and what comes of it. The meaning is that of
//! `sampler.rs`.

use serde::{Deserialize, Serialize};

/// How one token is chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// The row's random number, in [0, 1).
    pub uniform: f64,
    /// 0 for the largest logit.
    pub temperature: f32,
    /// 1 for all.
    pub top_p: f32,
    /// 0 for all.
    pub min_p: f32,
    /// 0 for all.
    pub top_k: usize,
    /// Log-probabilities of the chosen token and of so many of the best.
    pub logprobs: Option<usize>,
    /// 1 for none.
    pub repetition_penalty: f32,
    /// 0 for none.
    pub frequency_penalty: f32,
    /// 0 for none.
    pub presence_penalty: f32,
    /// Tokens whose logits are changed first, none of them twice.
    pub edits: Vec<Edit>,
}

impl Sampling {
    /// Whether another row is sampled in the same way, with a random number of its own.
    pub fn is_alike(&self, other: &Sampling) -> bool {
        // Each field is named, so that a new one is not forgotten; what is long comes last.
        fn settings(row: &Sampling) -> impl PartialEq {
            let Sampling {
                uniform: _,
                temperature,
                top_p,
                min_p,
                top_k,
                logprobs,
                repetition_penalty,
                frequency_penalty,
                presence_penalty,
                edits,
            } = row;
            let penalties = (repetition_penalty, frequency_penalty, presence_penalty);
            (temperature, top_p, min_p, top_k, logprobs, penalties, edits)
        }
        settings(self) == settings(other)
    }
}

/// A token whose logit is changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Edit {
    /// Which.
    pub token: u32,
    /// Added.
    pub bias: f32,
    /// Then -inf.
    pub banned: bool,
    /// In prompt or output: then the repetition penalty.
    pub seen: bool,
    /// Times it is in the output: then the other penalties, where it is.
    pub count: u32,
}

impl Edit {
    /// The logit that the token has then.
    pub fn apply(&self, s: &Sampling, x: f32) -> f32 {
        let mut x = if self.banned { f32::NEG_INFINITY } else { x + self.bias };
        if self.seen {
            x = if x > 0.0 { x / s.repetition_penalty } else { x * s.repetition_penalty };
        }
        if self.count > 0 {
            x -= s.frequency_penalty * self.count as f32 + s.presence_penalty;
        }
        x
    }
}

/// What was chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// `None` where no logit is a number above -inf.
    pub token: Option<u32>,
    /// Where asked for.
    pub logprobs: Option<Logprobs>,
}

/// Log-probabilities, of the logits as they are.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// Of the chosen token.
    pub chosen: f32,
    /// Its rank, 1 for the best.
    pub rank: usize,
    /// The best tokens, best first.
    pub top: Vec<(u32, f32)>,
}
