//! The vocabulary: token bytes by id, ids by token bytes, and GPT-2's printable form of bytes.
//!
//! Token bytes lie in one block of memory; the table over them is open addressing with a 32-bit tag per slot.

use std::collections::HashMap;

/// Ids fit into this many bits, so that a pair of them and a rank fit into one word.
pub(super) const ID_BITS: u32 = 20;

/// Marks the characters that stand for no byte in [`byte_of_char`].
const NO_BYTE: u16 = u16::MAX;

/// GPT-2's printable stand-in for each byte.
pub(super) const fn char_of_byte(byte: u8) -> u16 {
    match byte {
        33..=126 | 161..=172 | 174..=255 => byte as u16,
        0..=32 => 256 + byte as u16,
        127..=160 => 256 + 33 + (byte as u16 - 127),
        173 => 256 + 33 + 34,
    }
}

const BYTE_OF_CHAR: [u16; 0x144] = {
    let mut table = [NO_BYTE; 0x144];
    let mut byte = 0;
    while byte < 256 {
        table[char_of_byte(byte as u8) as usize] = byte as u16;
        byte += 1;
    }
    table
};

/// The byte that `c` stands for.
#[inline]
fn byte_of_char(c: char) -> Option<u8> {
    BYTE_OF_CHAR.get(c as usize).filter(|&&byte| byte != NO_BYTE).map(|&byte| byte as u8)
}

/// Appends the bytes that the printable form `text` stands for; `false`, and nothing appended, where one of its
/// characters stands for no byte.
#[inline]
pub(super) fn push_bytes_of(text: &str, out: &mut Vec<u8>) -> bool {
    let start = out.len();
    for c in text.chars() {
        match byte_of_char(c) {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                return false;
            }
        }
    }
    true
}

/// The printable form of `bytes`.
pub(super) fn printable(bytes: &[u8]) -> String {
    bytes.iter().filter_map(|&byte| char::from_u32(char_of_byte(byte).into())).collect()
}

/// A piece of at most 16 bytes as two little-endian words, zero-padded.
pub(super) type Key = [u64; 2];

const MASKS: [Key; 17] = {
    let mut masks = [[0u64; 2]; 17];
    let mut len = 1;
    while len <= 16 {
        masks[len] =
            if len <= 8 { [u64::MAX >> (64 - 8 * len), 0] } else { [u64::MAX, u64::MAX >> (128 - 8 * len)] };
        len += 1;
    }
    masks
};

/// The key of `text[start..end]`, which has at most 16 bytes.
#[inline(always)]
pub(super) fn key(text: &[u8], start: usize, end: usize) -> Key {
    let len = end - start;
    let mask = &MASKS[len];
    let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
    match text.get(start..start + 16) {
        Some(bytes) => [word(&bytes[..8]) & mask[0], word(&bytes[8..]) & mask[1]],
        None => {
            let mut bytes = [0; 16];
            bytes[..len].copy_from_slice(&text[start..end]);
            [word(&bytes[..8]), word(&bytes[8..])]
        }
    }
}

/// Hash of a piece of at most 16 bytes.
#[inline(always)]
pub(super) fn hash_key(key: Key) -> u64 {
    let product = u128::from(key[0] ^ 0x9e37_79b9_7f4a_7c15) * u128::from(key[1] ^ 0xd1b5_4a32_d192_ed03);
    product as u64 ^ (product >> 64) as u64
}

/// Hash of any piece; equal to that of its key where it has one.
#[inline]
pub(super) fn hash_bytes(bytes: &[u8]) -> u64 {
    let mut hash = 0;
    let mut rest = bytes;
    while rest.len() > 16 {
        hash = (hash ^ hash_key(key(rest, 0, 16))).rotate_left(29).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        rest = &rest[16..];
    }
    hash ^ hash_key(key(rest, 0, rest.len()))
}

/// Token bytes by id and ids by token bytes. Ids may have holes.
#[derive(Default)]
pub(super) struct Vocab {
    bytes: Vec<u8>,
    /// `(start, len)` in `bytes`, by id; `len` is `HOLE` where there is no such id.
    spans: Vec<(u32, u32)>,
    /// Open addressing: tag << 32 | id, or `FREE`.
    table: Vec<u64>,
    /// Vocabulary entries that hold a character that stands for no byte: they cannot come out of the merges.
    raw: HashMap<String, u32>,
    raw_by_id: HashMap<u32, String>,
    len: usize,
}

const HOLE: u32 = u32::MAX;
const FREE: u64 = u64::MAX;

impl Vocab {
    /// `entries` are `(printable form's bytes, or None for an entry of `raw`, id)`; ids are below `1 << ID_BITS`.
    /// Fails with the id that two entries share, or with an id whose token was listed before.
    pub(super) fn new(
        bytes: Vec<u8>,
        entries: &[(u32, u32, u32)],
        raw: HashMap<String, u32>,
    ) -> Result<Self, String> {
        let max =
            entries.iter().map(|e| e.0).chain(raw.values().copied()).max().map_or(0, |id| id as usize + 1);
        let slots = (2 * entries.len()).next_power_of_two().max(16);
        let mut vocab = Vocab {
            bytes,
            spans: vec![(0, HOLE); max],
            table: vec![FREE; slots],
            raw: HashMap::new(),
            raw_by_id: HashMap::new(),
            len: entries.len() + raw.len(),
        };
        for &(id, start, len) in entries {
            let span = &mut vocab.spans[id as usize];
            if span.1 != HOLE {
                return Err(format!("id {id} has two tokens"));
            }
            *span = (start, len);
            let hash = hash_bytes(&vocab.bytes[start as usize..(start + len) as usize]);
            let mut slot = hash as usize & (slots - 1);
            while vocab.table[slot] != FREE {
                let other = vocab.table[slot];
                if other >> 32 == hash >> 32 && vocab.get(other as u32) == vocab.get(id) {
                    return Err(format!("ids {} and {id} have the same token", other as u32));
                }
                slot = (slot + 1) & (slots - 1);
            }
            vocab.table[slot] = hash >> 32 << 32 | u64::from(id);
        }
        for (text, id) in raw {
            let span = &mut vocab.spans[id as usize];
            if span.1 != HOLE {
                return Err(format!("id {id} has two tokens"));
            }
            *span = (vocab.bytes.len() as u32, text.len() as u32);
            vocab.bytes.extend_from_slice(text.as_bytes());
            vocab.raw_by_id.insert(id, text.clone());
            vocab.raw.insert(text, id);
        }
        Ok(vocab)
    }

    /// Gives `id` the bytes of `text`, for decoding: an added token that the model's vocabulary lacks.
    pub(super) fn add(&mut self, id: u32, text: &str) {
        if self.spans.len() <= id as usize {
            self.spans.resize(id as usize + 1, (0, HOLE));
        }
        let start = self.bytes.len();
        if !push_bytes_of(text, &mut self.bytes) {
            self.bytes.extend_from_slice(text.as_bytes());
        }
        self.spans[id as usize] = (start as u32, (self.bytes.len() - start) as u32);
    }

    /// Number of entries in the model's own vocabulary, added tokens left out.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// One more than the largest id, added tokens included.
    pub(super) fn end(&self) -> u32 {
        self.spans.len() as u32
    }

    /// The bytes that `id` decodes to.
    #[inline]
    pub(super) fn get(&self, id: u32) -> Option<&[u8]> {
        let &(start, len) = self.spans.get(id as usize)?;
        self.bytes.get(start as usize..start as usize + len as usize).filter(|_| len != HOLE)
    }

    /// The entry of the model's vocabulary with these bytes.
    #[inline]
    pub(super) fn id(&self, bytes: &[u8]) -> Option<u32> {
        self.id_with_hash(bytes, hash_bytes(bytes))
    }

    /// [`Vocab::id`], for a caller that knows the hash.
    #[inline(always)]
    pub(super) fn id_with_hash(&self, bytes: &[u8], hash: u64) -> Option<u32> {
        let mask = self.table.len().wrapping_sub(1);
        let mut slot = hash as usize & mask;
        loop {
            let &entry = self.table.get(slot)?;
            if entry == FREE {
                return None;
            }
            if entry >> 32 == hash >> 32 && self.get(entry as u32) == Some(bytes) {
                return Some(entry as u32);
            }
            slot = (slot + 1) & mask;
        }
    }

    /// Asks for what [`Vocab::id_with_hash`] will look at first.
    #[inline(always)]
    pub(super) fn prefetch(&self, hash: u64) {
        if let Some(entry) = self.table.get(hash as usize & self.table.len().wrapping_sub(1)) {
            prefetch(entry);
        }
    }

    /// The entry of the model's vocabulary with this printable form.
    pub(super) fn id_of_printable(&self, text: &str) -> Option<u32> {
        let mut bytes = Vec::new();
        if push_bytes_of(text, &mut bytes) { self.id(&bytes) } else { self.raw.get(text).copied() }
    }

    /// The entry of `raw` with this id.
    pub(super) fn raw(&self, id: u32) -> Option<&str> {
        self.raw_by_id.get(&id).map(String::as_str)
    }
}

/// Asks for the first cache line of `target`.
#[inline(always)]
pub(crate) fn prefetch<T>(target: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of a valid reference; it changes nothing.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(target).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = target;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn printable_forms_are_a_bijection() {
        let all: Vec<u8> = (0..=255).collect();
        let text = printable(&all);
        assert_eq!(text.chars().count(), 256);
        assert!(text.starts_with("ĀāĂ") && text.contains("Ġ!\"") && text.ends_with("þÿ"));
        let mut back = Vec::new();
        assert!(push_bytes_of(&text, &mut back));
        assert_eq!(back, all);
        assert!(!push_bytes_of("a b", &mut back));
        assert_eq!(back, all);
    }

    #[test]
    fn keys_ignore_what_follows_the_piece() {
        let text = b"0123456789abcdefghijklmnop";
        for len in 0..=16 {
            let (inside, at_end) = (key(text, 3, 3 + len), key(&text[3..3 + len], 0, len));
            assert_eq!(inside, at_end, "{len}");
            assert_eq!(hash_bytes(&text[3..3 + len]), hash_key(inside));
        }
    }

    #[test]
    fn finds_what_it_holds() {
        let entries = [(0, 0, 1), (2, 1, 2), (1, 0, 3)];
        let raw = HashMap::from([("x y".to_string(), 4)]);
        let mut vocab = Vocab::new(b"abc".to_vec(), &entries, raw).unwrap();
        assert_eq!(
            (vocab.id(b"a"), vocab.id(b"bc"), vocab.id(b"abc"), vocab.id(b"ab")),
            (Some(0), Some(2), Some(1), None)
        );
        assert_eq!((vocab.get(3), vocab.get(4), vocab.get(9)), (None, Some(&b"x y"[..]), None));
        assert_eq!((vocab.id_of_printable("x y"), vocab.id(b"x y")), (Some(4), None));
        vocab.add(6, "Ġz");
        assert_eq!((vocab.get(6), vocab.end(), vocab.len()), (Some(&b" z"[..]), 7, 4));
        assert!(Vocab::new(b"aa".to_vec(), &[(0, 0, 1), (1, 1, 1)], HashMap::new()).is_err());
        assert!(Vocab::new(b"ab".to_vec(), &[(0, 0, 1), (0, 1, 1)], HashMap::new()).is_err());
    }
}
