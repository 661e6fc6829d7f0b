//! Pieces of text to token ids: the loop that all encoding time is spent in.
//!
//! A piece of at most 16 bytes is looked up in a cache of this thread's call; what is not there is looked up among the
//! pieces that took merging, then as a whole token, or merged. A token found whole counts only after merging its bytes
//! has once given it.

use std::sync::atomic::{AtomicU8, Ordering};

use super::bpe::{MergeScratch, Merges};
use super::chars::CharTable;
use super::memo::{Memo, Pending};
use super::split::next_piece;
use super::vocab::{Key, Vocab, hash_bytes, hash_key, key, prefetch};
use super::window::{Starts, WINDOW, starts_for_this_machine};

/// Longest piece that the cache holds, in bytes.
const CACHED_LEN: usize = 16;
/// Most ids that the cache holds for a piece.
const CACHED_IDS: usize = 3;
/// Sets in the cache, of two pieces and 64 bytes each: enough for a few texts, and for any number of them.
const FEW_SETS: usize = 1 << 12;
const MANY_SETS: usize = 1 << 17;
/// Most pieces in the queue; a window adds up to `WINDOW` to at most `QUEUE - WINDOW`. Their part of the cache stays in
/// the first level of the processor's.
const QUEUE: usize = 192;
/// Pieces that the cache does not have are found together, as soon as there are this many of them or of ids before them.
const MANY_MISSING: usize = 256;
const MANY_HITS: usize = 1 << 13;
/// Bits of an entry's last element that count its ids.
const NUM_IDS: u32 = 0xff;

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
    #[cfg(target_arch = "x86_64")]
    has_avx2: bool,
}

/// A piece and its ids. The default holds no piece: no piece has length 0.
#[derive(Clone, Copy, Default)]
#[repr(C, align(32))]
struct Entry {
    key: Key,
    /// The ids, and as the last element `len << 8 | num_ids`.
    ids: [u32; CACHED_IDS + 1],
}

impl Entry {
    #[inline(always)]
    fn holds(&self, key: Key, len: usize) -> bool {
        let other_len = u64::from(self.ids[CACHED_IDS] >> 8) ^ len as u64;
        (self.key[0] ^ key[0]) | (self.key[1] ^ key[1]) | other_len == 0
    }

    #[inline(always)]
    fn append_to(&self, out: &mut Vec<u32>) {
        out.reserve(CACHED_IDS + 1);
        let num_ids = ((self.ids[CACHED_IDS] & NUM_IDS) as usize).min(CACHED_IDS);
        // SAFETY: there is room for CACHED_IDS + 1 ids after the first out.len(), all of them are written, and
        // num_ids is at most CACHED_IDS. A plain extend costs a call of memmove per piece.
        unsafe {
            let at = out.len();
            out.as_mut_ptr().add(at).cast::<[u32; CACHED_IDS + 1]>().write_unaligned(self.ids);
            out.set_len(at + num_ids);
        }
    }
}

/// The first way keeps the lowest single id, which is the most frequent token; the second takes everything else.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
struct Set([Entry; 2]);

impl Set {
    /// Keeps a piece of at most `CACHED_LEN` bytes with at most `CACHED_IDS` ids.
    fn insert(&mut self, piece: &Piece, ids: &[u32]) {
        let mut entry = Entry { key: piece.key, ids: [0; CACHED_IDS + 1] };
        entry.ids[..ids.len()].copy_from_slice(ids);
        entry.ids[CACHED_IDS] = ((piece.end - piece.start) << 8 | ids.len()) as u32;
        let single = |entry: &Entry| entry.ids[CACHED_IDS] & NUM_IDS == 1;
        let [first, second] = &mut self.0;
        if !single(first) || single(&entry) && entry.ids[0] < first.ids[0] {
            *second = std::mem::replace(first, entry);
        } else {
            *second = entry;
        }
    }
}

/// The first cache.
struct Sets {
    sets: Box<[Set]>,
    inserted: usize,
}

impl Default for Sets {
    fn default() -> Self {
        Sets { sets: vec![Set::default(); FEW_SETS].into_boxed_slice(), inserted: 0 }
    }
}

impl Sets {
    #[inline(always)]
    fn place(&self, hash: u64) -> usize {
        (hash >> 40) as usize & (self.sets.len() - 1)
    }

    #[inline(always)]
    fn get(&self, hash: u64) -> &Set {
        &self.sets[self.place(hash)]
    }

    fn insert(&mut self, piece: &Piece, ids: &[u32]) {
        self.inserted += 1;
        if self.sets.len() < MANY_SETS && self.inserted > FEW_SETS {
            self.sets = vec![Set::default(); MANY_SETS].into_boxed_slice();
        }
        let place = self.place(piece.hash);
        self.sets[place].insert(piece, ids);
    }
}

/// Pieces that are cut and not looked up yet.
///
/// By the time that one is looked up, its part of the cache has come from memory.
struct Queue {
    pieces: Box<[Piece]>,
    len: usize,
}

impl Default for Queue {
    fn default() -> Self {
        Queue { pieces: vec![Piece::default(); QUEUE].into_boxed_slice(), len: 0 }
    }
}

/// `text[start..end]`; `key` only where it is short enough for the first cache.
#[derive(Clone, Copy, Default)]
struct Piece {
    key: Key,
    hash: u64,
    start: usize,
    end: usize,
}

impl Queue {
    #[inline(always)]
    fn push(&mut self, text: &[u8], start: usize, end: usize, scratch: &Scratch) {
        let Some(piece) = self.pieces.get_mut(self.len) else { return };
        *piece = Piece { start, end, ..Piece::default() };
        if end - start <= CACHED_LEN {
            piece.key = key(text, start, end);
            piece.hash = hash_key(piece.key);
            prefetch(scratch.sets.get(piece.hash));
        } else {
            piece.hash = hash_bytes(&text[start..end]);
        }
        self.len += 1;
    }
}

/// Working memory of one call at a time; survives in the tokenizer's pool.
#[derive(Default)]
pub(super) struct Scratch {
    queue: Queue,
    /// For ids on their way to a caller; not used here.
    pub(super) out: Vec<u32>,
    sets: Sets,
    /// Asked where `sets` has no answer.
    memo: Memo,
    pending: Pending,
    merge: MergeScratch,
    /// Of the pieces that are not in the output yet: the ids of those that the first cache has; the others, with the
    /// number of those ids before them; where in `ids` each one's ids are; and the ids.
    hits: Vec<u32>,
    missing: Vec<(Piece, u32)>,
    found: Vec<(u32, u32)>,
    ids: Vec<u32>,
    /// Pieces to be merged, each once; and which of `found` waits for which of them.
    to_merge: Vec<ToMerge>,
    merged: Vec<(u32, u32)>,
    waiting: Vec<(u32, u32)>,
}

struct ToMerge {
    /// The token that it spells, if there is one.
    whole: Option<u32>,
    hash: u64,
    start: usize,
    end: usize,
}

impl PieceEncoder {
    pub(super) fn new(merges: Merges, vocab: &Vocab) -> Self {
        let reached = (0..vocab.end()).map(|_| AtomicU8::new(UNKNOWN)).collect();
        PieceEncoder {
            merges,
            reached,
            starts: starts_for_this_machine(),
            #[cfg(target_arch = "x86_64")]
            has_avx2: is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("bmi1")
                && is_x86_feature_detected!("bmi2")
                && is_x86_feature_detected!("lzcnt")
                && is_x86_feature_detected!("popcnt"),
        }
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
        #[cfg(target_arch = "x86_64")]
        if self.has_avx2 {
            // SAFETY: `has_avx2` says that this machine has the features that the function asks for.
            return unsafe { self.encode_avx2(chars, vocab, text, scratch, out) };
        }
        self.encode_any(chars, vocab, text, scratch, out);
    }

    /// The same code, compiled for processors with AVX2: nearly all there are.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
    fn encode_avx2(
        &self,
        chars: &CharTable,
        vocab: &Vocab,
        text: &[u8],
        scratch: &mut Scratch,
        out: &mut Vec<u32>,
    ) {
        self.encode_any(chars, vocab, text, scratch, out);
    }

    #[inline(always)]
    fn encode_any(
        &self,
        chars: &CharTable,
        vocab: &Vocab,
        text: &[u8],
        scratch: &mut Scratch,
        out: &mut Vec<u32>,
    ) {
        let mut at = 0;
        let mut tail = [0; WINDOW];
        let mut queue = std::mem::replace(&mut scratch.queue, Queue { pieces: Box::default(), len: 0 });
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
                queue.push(text, start, end, scratch);
                start = end;
                starts &= starts - 1;
            }
            at = start;
            // The piece that the window leaves open; and more of them where the text is not ASCII.
            if start == base || ascii < len || len < WINDOW {
                while queue.len < QUEUE && at < text.len() {
                    let end = next_piece(chars, text, at);
                    queue.push(text, at, end, scratch);
                    at = end;
                    if text.get(at..at + 8).is_some_and(<[u8]>::is_ascii) {
                        break;
                    }
                }
            }
            if queue.len > QUEUE - WINDOW || at == text.len() {
                look_up(vocab, &mut queue, scratch);
                let many = scratch.missing.len() >= MANY_MISSING || scratch.hits.len() >= MANY_HITS;
                if many || at == text.len() {
                    self.flush(vocab, text, scratch, out);
                }
            }
        }
        scratch.queue = queue;
    }

    /// Appends the ids of all pieces that were looked up.
    #[inline(always)]
    fn flush(&self, vocab: &Vocab, text: &[u8], scratch: &mut Scratch, out: &mut Vec<u32>) {
        if !scratch.missing.is_empty() {
            self.find_missing(vocab, text, scratch);
        }
        let mut done = 0;
        for (&(piece, before), &(start, end)) in scratch.missing.iter().zip(&scratch.found) {
            let ids = &scratch.ids[start as usize..end as usize];
            out.extend_from_slice(&scratch.hits[done..before as usize]);
            out.extend_from_slice(ids);
            done = before as usize;
            if piece.end - piece.start <= CACHED_LEN && ids.len() <= CACHED_IDS {
                scratch.sets.insert(&piece, ids);
            }
        }
        out.extend_from_slice(&scratch.hits[done..]);
        scratch.hits.clear();
        scratch.missing.clear();
    }
    /// Finds the ids of the missing pieces: `scratch.found` says where in `scratch.ids` those of each are.
    #[inline(always)]
    fn find_missing(&self, vocab: &Vocab, text: &[u8], scratch: &mut Scratch) {
        let Scratch { memo, pending, merge, missing, found, ids, to_merge, merged, waiting, .. } = scratch;
        ids.clear();
        found.clear();
        to_merge.clear();
        waiting.clear();
        for &(Piece { hash, start, end, .. }, _) in &*missing {
            let bytes = &text[start..end];
            let before = ids.len() as u32;
            if let Some(known) = memo.find(bytes, hash) {
                ids.extend_from_slice(known);
            } else {
                let whole = vocab.id_with_hash(bytes, hash);
                match whole {
                    Some(id) if self.reached[id as usize].load(Ordering::Relaxed) == REACHED => ids.push(id),
                    _ => {
                        // A new word often comes several times in a row.
                        let same = |other: &ToMerge| text[other.start..other.end] == *bytes;
                        let number = pending.find_or_add(hash, to_merge, same);
                        if number == to_merge.len() {
                            to_merge.push(ToMerge { whole, hash, start, end });
                        }
                        waiting.push((found.len() as u32, number as u32));
                    }
                }
            }
            found.push((before, ids.len() as u32));
        }
        merged.clear();
        self.merges.encode(text, to_merge.iter().map(|piece| (piece.start, piece.end)), merge, ids, merged);
        for &(at, number) in &*waiting {
            found[at as usize] = merged[number as usize];
        }
        for (piece, &(first, end)) in to_merge.iter().zip(&*merged) {
            let ids = &ids[first as usize..end as usize];
            match piece.whole {
                Some(id) => {
                    let answer = if *ids == [id] { REACHED } else { NOT_REACHED };
                    self.reached[id as usize].store(answer, Ordering::Relaxed);
                    if answer == NOT_REACHED {
                        memo.insert(&text[piece.start..piece.end], piece.hash, ids);
                    }
                }
                None => memo.insert(&text[piece.start..piece.end], piece.hash, ids),
            }
        }
    }
}

/// Empties the queue into `scratch.hits` and `scratch.missing`.
#[inline(always)]
fn look_up(vocab: &Vocab, queue: &mut Queue, scratch: &mut Scratch) {
    let mut hits = std::mem::take(&mut scratch.hits);
    for piece in &queue.pieces[..std::mem::take(&mut queue.len)] {
        let set = &scratch.sets.get(piece.hash).0;
        // Chosen without a branch: which of the two it is cannot be predicted.
        let entry = &set[usize::from(set[1].holds(piece.key, piece.end - piece.start))];
        if entry.holds(piece.key, piece.end - piece.start) {
            entry.append_to(&mut hits);
        } else {
            scratch.missing.push((*piece, hits.len() as u32));
            // What it needs next is on its way before the first of them is looked up.
            scratch.memo.prefetch(piece.hash);
            vocab.prefetch(piece.hash);
        }
    }
    scratch.hits = hits;
}
