//! The ragged batch: the one kind of work that runs. Prefill, a chunk of a prefill, one decode token and the
//! verification of drafted tokens are all sequences with `query_len` new tokens on top of `cached_len` old
//! ones.

use serde::{Deserialize, Serialize};

/// Tokens in a page of keys and values. Attention folds its running softmax at page boundaries, so the page
/// length is part of what a result's last bit depends on.
pub const PAGE_LEN: usize = 64;

/// Tokens in a chunk of the chunked delta rule, counted from the start of the sequence. A prefill is only ever
/// cut at a multiple of it, so that a sequence's chunks, and with them its bits, do not depend on the batch.
pub const CHUNK_LEN: usize = 64;

/// Tokens whose logits are computed at once; more are done in turns.
pub const MAX_LOGIT_ROWS: usize = 64;

/// Index of a page of keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PageId(pub u32);

/// Index of a recurrent-state slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SlotId(pub u32);

/// The largest batch that buffers are made for.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct BatchLimits {
    /// New tokens.
    pub max_tokens: usize,
    /// Sequences.
    pub max_seqs: usize,
    /// Tokens of one sequence, old and new.
    pub max_len: usize,
    /// Pages of all sequences.
    pub max_pages: usize,
}

/// What one `forward` computes.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Batch {
    /// New tokens of every sequence, one after the other.
    pub token_ids: Vec<u32>,
    /// Position of each new token on the T, H and W axis (all equal for text).
    pub positions: Vec<[u32; 3]>,
    /// The sequences, in the order of their tokens.
    pub seqs: Vec<BatchSeq>,
    /// Pages of every sequence, one after the other.
    pub pages: Vec<PageId>,
    /// Tokens (indices into `token_ids`) whose logits are wanted.
    pub logit_rows: Vec<usize>,
    /// Whether the tokens are those that the device chose last, row by row, and may not be known here yet: `token_ids`
    /// is not looked at then.
    pub follows: bool,
}

/// What the multi-token-prediction module computes after a forward.
///
/// Its token t is token t + 1 of a sequence, at position t, beside the hidden state that the forward left for token t.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct DraftBatch {
    /// Sequences with the pages of their requests. Slots and `logit_rows` are not used.
    pub batch: Batch,
    /// For each of its tokens, the place in the forward's `logit_rows` of the hidden state it goes with.
    pub hidden_rows: Vec<usize>,
}

/// One sequence of a batch.
///
/// ```text
/// tokens of the sequence:  [0, cached_len) in pages and slot | [cached_len, cached_len + query_len) computed now
/// tokens computed now:     [0, chunked_len) by the chunked delta rule | [chunked_len, query_len) by the recurrent
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct BatchSeq {
    /// Index of its first token in `Batch::token_ids`.
    pub query_start: usize,
    /// New tokens.
    pub query_len: usize,
    /// Tokens already in its pages and its slot.
    pub cached_len: usize,
    /// Leading new tokens that take the chunked form: those of the prompt. `cached_len` is then a multiple of
    /// `CHUNK_LEN`. Generated tokens always take the recurrent form, also when they are computed again after a
    /// preemption, so that a sequence has the same bits either way.
    pub chunked_len: usize,
    /// Its recurrent state.
    pub slot: SlotId,
    /// Index of its first page in `Batch::pages`.
    pub page_start: usize,
}

impl Batch {
    /// Number of new tokens.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// The page and the place in it of token `pos` of a sequence.
    pub fn place(&self, seq: &BatchSeq, pos: usize) -> (PageId, usize) {
        (self.pages[seq.page_start + pos / PAGE_LEN], pos % PAGE_LEN)
    }
}
