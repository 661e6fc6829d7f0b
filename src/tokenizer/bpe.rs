//! Byte-pair merging: the lowest rank first, the leftmost of equals first, until no pair has a rank.
//!
//! Short pieces are merged in small arrays, long ones over a heap, so that no input is quadratic.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::vocab::ID_BITS;

/// No merge.
pub(super) const NO_RANK: u32 = u32::MAX;
const RANK_BITS: u32 = 64 - 2 * ID_BITS;
/// More merges than this do not fit.
pub(super) const MAX_MERGES: usize = (1 << RANK_BITS) - 1;
const FREE: u64 = u64::MAX;
/// Longest piece that is merged in arrays.
const SHORT: usize = 96;

/// The merges of a tokenizer, and the tokens of the single bytes.
pub(super) struct Merges {
    /// Id of each byte's token.
    byte_ids: [u32; 256],
    /// Rank of each pair of bytes: most look-ups, out of the way of the large table.
    byte_pairs: Box<[u32]>,
    /// Open addressing: left << 44 | right << 24 | rank, or `FREE`.
    table: Box<[u64]>,
    shift: u32,
    /// Id that each rank makes.
    made: Vec<u32>,
}

/// Buffers of the long path, kept between pieces.
#[derive(Default)]
pub(super) struct MergeScratch {
    ids: Vec<u32>,
    next: Vec<u32>,
    previous: Vec<u32>,
    heap: BinaryHeap<Reverse<(u32, u32, u32)>>,
}

impl Merges {
    /// `merges` are `(left, right, made)` by rank; all ids are below `1 << ID_BITS`, at most [`MAX_MERGES`] of them.
    /// Of a pair that is listed twice the later rank holds, as in the reference.
    pub(super) fn new(byte_ids: [u32; 256], merges: &[(u32, u32, u32)]) -> Self {
        let slots = (2 * merges.len()).next_power_of_two().max(16);
        let mut new = Merges {
            byte_ids,
            byte_pairs: vec![NO_RANK; 1 << 16].into_boxed_slice(),
            table: vec![FREE; slots].into_boxed_slice(),
            shift: 64 - slots.trailing_zeros(),
            made: merges.iter().map(|merge| merge.2).collect(),
        };
        for (rank, &(left, right, _)) in merges.iter().enumerate() {
            let slot = new.slot(left, right);
            new.table[slot] = pair(left, right) << RANK_BITS | rank as u64;
        }
        for left in 0..256 {
            for right in 0..256 {
                new.byte_pairs[left << 8 | right] = new.rank(byte_ids[left], byte_ids[right]);
            }
        }
        new
    }

    /// The slot of a pair, or the free slot where it would stand.
    #[inline]
    fn slot(&self, left: u32, right: u32) -> usize {
        let pair = pair(left, right);
        let mut slot = (pair.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> self.shift) as usize;
        while self.table[slot] != FREE && self.table[slot] >> RANK_BITS != pair {
            slot = (slot + 1) & (self.table.len() - 1);
        }
        slot
    }

    #[inline]
    fn rank(&self, left: u32, right: u32) -> u32 {
        match self.table[self.slot(left, right)] {
            FREE => NO_RANK,
            entry => (entry & ((1 << RANK_BITS) - 1)) as u32,
        }
    }

    /// Appends the tokens of one piece.
    pub(super) fn encode(&self, piece: &[u8], scratch: &mut MergeScratch, out: &mut Vec<u32>) {
        if piece.len() <= SHORT { self.encode_short(piece, out) } else { self.encode_long(piece, scratch, out) }
    }

    fn encode_short(&self, piece: &[u8], out: &mut Vec<u32>) {
        let mut ids = [0u32; SHORT];
        let mut ranks = [NO_RANK; SHORT];
        let mut len = piece.len();
        for (id, &byte) in ids.iter_mut().zip(piece) {
            *id = self.byte_ids[byte as usize];
        }
        for (rank, bytes) in ranks.iter_mut().zip(piece.windows(2)) {
            *rank = self.byte_pairs[(bytes[0] as usize) << 8 | bytes[1] as usize];
        }
        while len > 1 {
            let (mut at, mut best) = (0, NO_RANK);
            for (i, &rank) in ranks[..len - 1].iter().enumerate() {
                if rank < best {
                    (at, best) = (i, rank);
                }
            }
            if best == NO_RANK {
                break;
            }
            ids[at] = self.made[best as usize];
            ids.copy_within(at + 2..len, at + 1);
            ranks.copy_within(at + 1..len, at);
            len -= 1;
            ranks[len - 1] = NO_RANK;
            if at + 1 < len {
                ranks[at] = self.rank(ids[at], ids[at + 1]);
            }
            if at > 0 {
                ranks[at - 1] = self.rank(ids[at - 1], ids[at]);
            }
        }
        out.extend_from_slice(&ids[..len]);
    }

    /// The same over a linked list and a heap: n log n.
    fn encode_long(&self, piece: &[u8], scratch: &mut MergeScratch, out: &mut Vec<u32>) {
        const DEAD: u32 = u32::MAX;
        let len = piece.len() as u32;
        let MergeScratch { ids, next, previous, heap } = scratch;
        ids.clear();
        ids.extend(piece.iter().map(|&byte| self.byte_ids[byte as usize]));
        next.clear();
        next.extend(1..=len);
        previous.clear();
        previous.extend((0..len).map(|i| i.wrapping_sub(1)));
        // An entry names its right neighbour, so that one whose pair is gone can be told from a live one.
        let ranked = piece.windows(2).zip(0u32..).filter_map(|(bytes, at)| {
            let rank = self.byte_pairs[(bytes[0] as usize) << 8 | bytes[1] as usize];
            (rank != NO_RANK).then_some(Reverse((rank, at, at + 1)))
        });
        let mut entries = std::mem::take(heap).into_vec();
        entries.clear();
        entries.extend(ranked);
        *heap = BinaryHeap::from(entries);
        while let Some(Reverse((rank, at, right))) = heap.pop() {
            let (i, j) = (at as usize, right as usize);
            if ids[i] == DEAD || ids[j] == DEAD || next[i] != right || self.rank(ids[i], ids[j]) != rank {
                continue;
            }
            ids[i] = self.made[rank as usize];
            ids[j] = DEAD;
            let after = next[j];
            next[i] = after;
            if after < len {
                previous[after as usize] = at;
                let rank = self.rank(ids[i], ids[after as usize]);
                if rank != NO_RANK {
                    heap.push(Reverse((rank, at, after)));
                }
            }
            let before = previous[i];
            if before < len {
                let rank = self.rank(ids[before as usize], ids[i]);
                if rank != NO_RANK {
                    heap.push(Reverse((rank, before, at)));
                }
            }
        }
        let mut at = 0;
        while at < len {
            out.push(ids[at as usize]);
            at = next[at as usize];
        }
    }
}

#[inline(always)]
fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << ID_BITS | u64::from(right)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    /// The definition, word for word.
    fn plain(merges: &[(u32, u32, u32)], piece: &[u8]) -> Vec<u32> {
        let ranks: HashMap<_, _> = merges.iter().enumerate().map(|(rank, m)| ((m.0, m.1), (rank, m.2))).collect();
        let mut ids: Vec<u32> = piece.iter().map(|&byte| byte.into()).collect();
        let best = |ids: &[u32]| {
            let ranked = ids.windows(2).enumerate().filter_map(|(i, p)| ranks.get(&(p[0], p[1])).map(|m| (*m, i)));
            ranked.min_by_key(|((rank, _), i)| (*rank, *i))
        };
        while let Some(((_, made), at)) = best(&ids) {
            ids[at] = made;
            ids.remove(at + 1);
        }
        ids
    }

    fn encoder(merges: &[(u32, u32, u32)]) -> Merges {
        Merges::new(std::array::from_fn(|i| i as u32), merges)
    }

    /// Random merges over the letters a, b, c: each joins two ids that exist by then; pairs may repeat.
    fn merges() -> impl Strategy<Value = Vec<(u32, u32, u32)>> {
        prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..24).prop_map(|picks| {
            let mut ids: Vec<u32> = vec![97, 98, 99];
            let mut merges: Vec<(u32, u32, u32)> = Vec::new();
            for (left, right) in picks {
                let (left, right) = (ids[left.index(ids.len())], ids[right.index(ids.len())]);
                let made = merges.iter().find(|m| (m.0, m.1) == (left, right)).map_or(256 + merges.len() as u32, |m| m.2);
                merges.push((left, right, made));
                ids.push(made);
            }
            merges
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn both_paths_follow_the_definition(merges in merges(), piece in "[abc]{0,40}") {
            let encoder = encoder(&merges);
            let expected = plain(&merges, piece.as_bytes());
            let (mut short, mut long) = (Vec::new(), Vec::new());
            encoder.encode_short(piece.as_bytes(), &mut short);
            encoder.encode_long(piece.as_bytes(), &mut MergeScratch::default(), &mut long);
            prop_assert_eq!(&short, &expected);
            prop_assert_eq!(&long, &expected);
        }
    }

    #[test]
    fn a_pair_listed_twice_takes_its_later_rank() {
        let merges = [(97, 98, 256), (98, 97, 257), (97, 98, 256)];
        let mut out = Vec::new();
        encoder(&merges).encode(b"aba", &mut MergeScratch::default(), &mut out);
        assert_eq!(out, [97, 257]);
    }
}
