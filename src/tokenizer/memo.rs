//! What merging made of earlier pieces: bounded, and exact because whole pieces are compared.
//!
//! [`Memo`] holds pieces that took merging, at most 32 bytes each; [`Pending`] finds a piece that is about to be merged
//! already. Neither knows what a token is.

use super::vocab::{Key, key, prefetch};

/// Longest piece that is kept, in bytes, and most ids.
const MAX_LEN: usize = 32;
const MAX_IDS: usize = 7;
/// Entries, of 64 bytes each: enough for a few texts, and for any number of them.
const FEW: usize = 1 << 10;
const MANY: usize = 1 << 18;

/// A piece and its ids. The default holds no piece: no piece has length 0.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
struct Entry {
    key: [Key; 2],
    ids: [u32; MAX_IDS],
    len: u16,
    num_ids: u16,
}

/// One place for each hash; the last piece takes it.
pub(super) struct Memo {
    entries: Box<[Entry]>,
    inserted: usize,
}

impl Default for Memo {
    fn default() -> Self {
        Memo { entries: vec![Entry::default(); FEW].into_boxed_slice(), inserted: 0 }
    }
}

impl Memo {
    #[inline(always)]
    fn place(&self, hash: u64) -> usize {
        (hash >> 32) as usize & (self.entries.len() - 1)
    }

    /// Asks for what [`Memo::find`] will look at.
    #[inline(always)]
    pub(super) fn prefetch(&self, hash: u64) {
        prefetch(&self.entries[self.place(hash)]);
    }

    /// The ids of `piece`, whose hash is `hash`.
    #[inline(always)]
    pub(super) fn find(&self, piece: &[u8], hash: u64) -> Option<&[u32]> {
        let entry = &self.entries[self.place(hash)];
        (piece.len() <= MAX_LEN && entry.len as usize == piece.len() && entry.key == wide_key(piece))
            .then(|| &entry.ids[..entry.num_ids as usize])
    }

    /// Keeps the ids of a piece, where both are short enough.
    pub(super) fn insert(&mut self, piece: &[u8], hash: u64, ids: &[u32]) {
        if piece.len() > MAX_LEN || ids.len() > MAX_IDS {
            return;
        }
        self.inserted += 1;
        if self.entries.len() < MANY && self.inserted > FEW {
            // What the few held will be merged once more.
            self.entries = vec![Entry::default(); MANY].into_boxed_slice();
        }
        let mut entry = Entry { key: wide_key(piece), ..Entry::default() };
        entry.ids[..ids.len()].copy_from_slice(ids);
        (entry.len, entry.num_ids) = (piece.len() as u16, ids.len() as u16);
        let place = self.place(hash);
        self.entries[place] = entry;
    }
}

fn wide_key(piece: &[u8]) -> [Key; 2] {
    let middle = piece.len().min(16);
    [key(piece, 0, middle), key(piece, middle, piece.len())]
}

/// By hash: the number of a piece in a list. A number is believed only after a look at that piece, so that nothing is
/// ever cleared.
#[derive(Default)]
pub(super) struct Pending(Vec<u32>);

impl Pending {
    /// Number of a piece in `list` that has this hash and is `same`; `len`, which it will have next time, if there is
    /// none.
    #[inline(always)]
    pub(super) fn find_or_add<T>(&mut self, hash: u64, list: &[T], same: impl Fn(&T) -> bool) -> usize {
        self.0.resize(1 << 8, 0);
        let number = &mut self.0[(hash >> 20) as usize % (1 << 8)];
        if !list.get(*number as usize).is_some_and(same) {
            *number = list.len() as u32;
        }
        *number as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_in_one_place_are_told_apart() {
        let mut memo = Memo::default();
        let long = [7u8; MAX_LEN + 1];
        // The same hash for all of them: only the bytes and the length tell them apart.
        let pieces: [&[u8]; 7] =
            [b"a", b"a\0", b"\0a", &long[..16], &long[..17], &long[..MAX_LEN - 1], &long[..MAX_LEN]];
        for (i, piece) in pieces.iter().enumerate() {
            memo.insert(piece, 5, &[i as u32; MAX_IDS][..i + 1]);
            for (j, other) in pieces.iter().enumerate() {
                let found = memo.find(other, 5).map(<[u32]>::to_vec);
                assert_eq!(found, (i == j).then(|| vec![i as u32; i + 1]), "{i} {j}");
            }
        }
        memo.insert(b"a", 5, &[1]);
        memo.insert(&long, 5, &[2]);
        memo.insert(b"b", 5, &[3; MAX_IDS + 1]);
        assert_eq!(
            (memo.find(b"a", 5), memo.find(&long, 5), memo.find(b"b", 5)),
            (Some(&[1][..]), None, None)
        );
    }

    #[test]
    fn grows_once_and_no_further() {
        let mut memo = Memo::default();
        for i in 0..(3 * MANY as u64) {
            memo.insert(&i.to_le_bytes(), i << 32, &[i as u32]);
            assert_eq!(memo.find(&i.to_le_bytes(), i << 32), Some(&[i as u32][..]));
        }
        assert_eq!(memo.entries.len(), MANY);
    }

    #[test]
    fn pending_numbers_are_of_the_same_piece() {
        let (mut pending, mut list) = (Pending::default(), Vec::new());
        // All with one hash; then again for another list, which the old numbers do not fit.
        for pieces in [["a", "a", "b", "b", "a", "a"], ["c", "a", "a", "a", "c", "c"]] {
            list.clear();
            for piece in pieces {
                let number = pending.find_or_add(9, &list, |other| *other == piece);
                if number == list.len() {
                    list.push(piece);
                }
                assert_eq!(list[number], piece);
            }
            assert_eq!(list.len(), 3);
        }
    }
}
