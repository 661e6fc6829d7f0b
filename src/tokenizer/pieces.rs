//! Pieces of text to token ids: the loop that all encoding time is spent in.
//!
//! A piece of at most 16 bytes is looked up in a small cache of this thread's call; what is not there is looked up as
//! a whole token, or merged. A token found whole counts only after merging its bytes has once given it.

use std::sync::atomic::{AtomicU8, Ordering};

use super::bpe::{MergeScratch, Merges};
use super::chars::CharTable;
use super::split::next_piece;
use super::vocab::{Key, Vocab, hash_bytes, hash_key, key};
use super::window::{Starts, WINDOW, starts_for_this_machine};

/// Longest piece that the cache holds, in bytes.
const CACHED_LEN: usize = 16;
/// Most ids that the cache holds for a piece.
const CACHED_IDS: usize = 3;
/// Sets in the cache, of two pieces and 64 bytes each.
const SETS: usize = 1 << 15;

/// Whether merging a token's bytes gives that token.
const UNKNOWN: u8 = 0;
const REACHED: u8 = 1;
const NOT_REACHED: u8 = 2;

/// Everything that pieces need beyond the vocabulary.
pub(super) struct PieceEncoder {
    merges: Merges,
    /// By id: `UNKNOWN`, `REACHED` or `NOT_REACHED`. Written without order: the answer never changes.
    reached: Vec<AtomicU8>,
    starts: Starts,
}

/// A piece and its ids; `len` is 0 where there is none.
#[derive(Clone, Copy, Default)]
#[repr(C, align(32))]
struct Entry {
    key: Key,
    ids: [u32; CACHED_IDS],
    len: u8,
    num_ids: u8,
}

/// The first is the one that was asked for again; a new one replaces the second.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
struct Set([Entry; 2]);

/// Working memory of one call at a time; survives in the tokenizer's pool.
pub(super) struct Scratch {
    sets: Box<[Set]>,
    merge: MergeScratch,
}

impl Default for Scratch {
    fn default() -> Self {
        Scratch { sets: vec![Set::default(); SETS].into_boxed_slice(), merge: MergeScratch::default() }
    }
}

impl PieceEncoder {
    pub(super) fn new(merges: Merges, vocab: &Vocab) -> Self {
        let reached = (0..vocab.end()).map(|_| AtomicU8::new(UNKNOWN)).collect();
        PieceEncoder { merges, reached, starts: starts_for_this_machine() }
    }

    /// Appends the ids of `text`, which is UTF-8 and one stretch between added tokens.
    pub(super) fn encode(
        &self,
        chars: &CharTable,
        vocab: &Vocab,
        text: &[u8],
        scratch: &mut Scratch,
        out: &mut Vec<u32>,
    ) {
        let mut at = 0;
        let mut tail = [0; WINDOW];
        while at < text.len() {
            let len = (text.len() - at).min(WINDOW);
            let window = match text.get(at..at + WINDOW).and_then(|bytes| bytes.try_into().ok()) {
                Some(window) => window,
                None => {
                    tail[..len].copy_from_slice(&text[at..]);
                    &tail
                }
            };
            let (mut starts, ascii) = (self.starts)(window, len);
            starts &= starts - 1;
            let (base, mut start) = (at, at);
            while starts != 0 {
                let end = base + starts.trailing_zeros() as usize;
                self.piece(vocab, text, start, end, scratch, out);
                start = end;
                starts &= starts - 1;
            }
            at = start;
            // The piece that the window leaves open; and more of them where the text is not ASCII.
            if start == base || ascii < len || len < WINDOW {
                loop {
                    let end = next_piece(chars, text, at);
                    self.piece(vocab, text, at, end, scratch, out);
                    at = end;
                    match text.get(at..at + 8) {
                        Some(next) if next.is_ascii() => break,
                        _ if at >= text.len() => break,
                        _ => {}
                    }
                }
            }
        }
    }

    /// Appends the ids of the piece `text[start..end]`.
    #[inline(always)]
    fn piece(
        &self,
        vocab: &Vocab,
        text: &[u8],
        start: usize,
        end: usize,
        scratch: &mut Scratch,
        out: &mut Vec<u32>,
    ) {
        let len = end - start;
        if len > CACHED_LEN {
            return self.long_piece(vocab, &text[start..end], scratch, out);
        }
        let key = key(text, start, end);
        let hash = hash_key(key);
        let set = &mut scratch.sets[(hash >> 40) as usize & (SETS - 1)].0;
        for way in 0..2 {
            let entry = set[way];
            if entry.key == key && entry.len as usize == len {
                out.extend_from_slice(&entry.ids[..entry.num_ids as usize]);
                if way == 1 {
                    set.swap(0, 1);
                }
                return;
            }
        }
        self.new_piece(vocab, &text[start..end], key, hash, scratch, out);
    }

    /// Appends the ids of a piece that the cache lacks, and keeps them there.
    #[cold]
    #[inline(never)]
    fn new_piece(
        &self,
        vocab: &Vocab,
        piece: &[u8],
        key: Key,
        hash: u64,
        scratch: &mut Scratch,
        out: &mut Vec<u32>,
    ) {
        let before = out.len();
        self.merge(vocab, piece, hash, &mut scratch.merge, out);
        let ids = &out[before..];
        if ids.len() <= CACHED_IDS {
            let mut entry = Entry { key, len: piece.len() as u8, num_ids: ids.len() as u8, ..Entry::default() };
            entry.ids[..ids.len()].copy_from_slice(ids);
            let set = &mut scratch.sets[(hash >> 40) as usize & (SETS - 1)].0;
            set[usize::from(set[0].len != 0)] = entry;
        }
    }

    #[inline(never)]
    fn long_piece(&self, vocab: &Vocab, piece: &[u8], scratch: &mut Scratch, out: &mut Vec<u32>) {
        self.merge(vocab, piece, hash_bytes(piece), &mut scratch.merge, out);
    }

    /// Appends the ids of a piece: the whole token where merging is known to give it, or by merging.
    fn merge(&self, vocab: &Vocab, piece: &[u8], hash: u64, scratch: &mut MergeScratch, out: &mut Vec<u32>) {
        let whole = vocab.id_with_hash(piece, hash);
        let reached = whole.and_then(|id| self.reached.get(id as usize));
        if let (Some(id), Some(reached)) = (whole, reached) {
            match reached.load(Ordering::Relaxed) {
                REACHED => return out.push(id),
                NOT_REACHED => {}
                _ => {
                    let before = out.len();
                    self.merges.encode(piece, scratch, out);
                    let answer = if out[before..] == [id] { REACHED } else { NOT_REACHED };
                    reached.store(answer, Ordering::Relaxed);
                    return;
                }
            }
        }
        self.merges.encode(piece, scratch, out);
    }
}
