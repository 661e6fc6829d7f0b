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
/// Most pieces in the queue; a window adds up to `WINDOW` to at most `QUEUE - WINDOW`.
const QUEUE: usize = 128;
/// Bits of an entry's last element that count its ids.
const NUM_IDS: u32 = 0xff;

/// Longest piece that the second cache holds, in bytes, and most ids.
const WIDE_LEN: usize = 32;
const WIDE_IDS: usize = 7;
/// Entries in the second cache, of 64 bytes each.
const WIDE: usize = 1 << 16;

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
}

/// The first way keeps the lowest single id, which is the most frequent token; the second takes everything else.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
struct Set([Entry; 2]);

/// A piece that took merging, and its ids; the last element is as in [`Entry`].
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
struct WideEntry {
    key: [Key; 2],
    ids: [u32; WIDE_IDS + 1],
}

/// Pieces that are cut and not looked up yet.
///
/// By the time that one is looked up, its part of the cache has come from memory.
struct Queue {
    pieces: [Piece; QUEUE],
    len: usize,
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
            prefetch(&scratch.sets[set_of(piece.hash)]);
        } else {
            piece.hash = hash_bytes(&text[start..end]);
        }
        self.len += 1;
    }
}

#[inline(always)]
fn set_of(hash: u64) -> usize {
    (hash >> 40) as usize & (SETS - 1)
}

#[inline(always)]
fn wide_of(hash: u64) -> usize {
    (hash >> 32) as usize & (WIDE - 1)
}

/// Asks for the first cache line of `target`.
#[inline(always)]
pub(super) fn prefetch<T>(target: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of a valid reference; it changes nothing.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(target).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = target;
}

/// Working memory of one call at a time; survives in the tokenizer's pool.
pub(super) struct Scratch {
    sets: Box<[Set]>,
    /// Asked where `sets` has no answer: by far larger than what the processor keeps close.
    wide: Box<[WideEntry]>,
    merge: MergeScratch,
}

impl Default for Scratch {
    fn default() -> Self {
        Scratch {
            sets: vec![Set::default(); SETS].into_boxed_slice(),
            wide: vec![WideEntry::default(); WIDE].into_boxed_slice(),
            merge: MergeScratch::default(),
        }
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
        let mut queue = Queue { pieces: [Piece::default(); QUEUE], len: 0 };
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
            if queue.len > QUEUE - WINDOW {
                self.flush(vocab, text, &mut queue, scratch, out);
            }
        }
        self.flush(vocab, text, &mut queue, scratch, out);
    }

    /// Appends the ids of the pieces in the queue and empties it.
    fn flush(
        &self,
        vocab: &Vocab,
        text: &[u8],
        queue: &mut Queue,
        scratch: &mut Scratch,
        out: &mut Vec<u32>,
    ) {
        let pieces = &queue.pieces[..std::mem::take(&mut queue.len)];
        out.reserve(pieces.len() + CACHED_IDS);
        // What pieces that the first cache lacks will need is on its way before the first of them is looked up.
        for &Piece { key, hash, start, end } in pieces {
            if !scratch.sets[set_of(hash)].0.iter().any(|entry| entry.holds(key, end - start)) {
                prefetch(&scratch.wide[wide_of(hash)]);
                vocab.prefetch(hash);
            }
        }
        for &Piece { key, hash, start, end } in pieces {
            let len = end - start;
            if len > CACHED_LEN {
                self.long_piece(vocab, &text[start..end], hash, scratch, out);
                continue;
            }
            let set = &scratch.sets[set_of(hash)].0;
            // Chosen without a branch: which of the two it is cannot be predicted.
            let entry = &set[usize::from(set[1].holds(key, len))];
            if !entry.holds(key, len) {
                self.new_piece(vocab, &text[start..end], key, hash, scratch, out);
                continue;
            }
            out.reserve(CACHED_IDS + 1);
            let num_ids = (entry.ids[CACHED_IDS] & NUM_IDS) as usize;
            // SAFETY: there is room for CACHED_IDS + 1 ids after the first out.len(), all of them are written, and
            // num_ids is at most CACHED_IDS. A plain extend costs a call of memmove per piece.
            unsafe {
                let at = out.len();
                out.as_mut_ptr().add(at).cast::<[u32; CACHED_IDS + 1]>().write_unaligned(entry.ids);
                out.set_len(at + num_ids);
            }
        }
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
        self.wide_piece(vocab, piece, [key, [0; 2]], hash, scratch, out);
        let ids = &out[before..];
        if ids.len() <= CACHED_IDS {
            let mut entry = Entry { key, ids: [0; CACHED_IDS + 1] };
            entry.ids[..ids.len()].copy_from_slice(ids);
            entry.ids[CACHED_IDS] = (piece.len() << 8 | ids.len()) as u32;
            let set = &mut scratch.sets[set_of(hash)].0;
            let single = |entry: &Entry| entry.ids[CACHED_IDS] & NUM_IDS == 1;
            let [first, second] = set;
            if !single(first) || single(&entry) && entry.ids[0] < first.ids[0] {
                *second = std::mem::replace(first, entry);
            } else {
                *second = entry;
            }
        }
    }

    #[inline(never)]
    fn long_piece(&self, vocab: &Vocab, piece: &[u8], hash: u64, scratch: &mut Scratch, out: &mut Vec<u32>) {
        if piece.len() <= WIDE_LEN {
            let keys = [key(piece, 0, CACHED_LEN), key(piece, CACHED_LEN, piece.len())];
            self.wide_piece(vocab, piece, keys, hash, scratch, out);
        } else {
            self.merge(vocab, piece, hash, &mut scratch.merge, out);
        }
    }

    /// Appends the ids of a piece by the second cache, where it is of use.
    fn wide_piece(
        &self,
        vocab: &Vocab,
        piece: &[u8],
        keys: [Key; 2],
        hash: u64,
        scratch: &mut Scratch,
        out: &mut Vec<u32>,
    ) {
        let entry = &mut scratch.wide[wide_of(hash)];
        if entry.key == keys && (entry.ids[WIDE_IDS] >> 8) as usize == piece.len() {
            return out.extend_from_slice(&entry.ids[..(entry.ids[WIDE_IDS] & NUM_IDS) as usize]);
        }
        let before = out.len();
        self.merge(vocab, piece, hash, &mut scratch.merge, out);
        let ids = &out[before..];
        if (2..=WIDE_IDS).contains(&ids.len()) {
            entry.key = keys;
            entry.ids[..ids.len()].copy_from_slice(ids);
            entry.ids[WIDE_IDS] = (piece.len() << 8 | ids.len()) as u32;
        }
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
