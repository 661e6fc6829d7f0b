//! Byte-pair merging: the lowest rank first, the leftmost of equals first, until no pair has a rank.
//!
//! Short pieces are merged in small arrays, long ones over a heap, so that no input is quadratic.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use super::chars::decode;
use super::vocab::ID_BITS;

/// More merges than this do not fit: a symbol and a rank have `ID_BITS` bits.
pub(super) const MAX_MERGES: usize = (1 << ID_BITS) - 256;
const RANK_BITS: u32 = 64 - 2 * ID_BITS;
const RANK_MASK: u64 = (1 << RANK_BITS) - 1;
/// No merge.
const NO_RANK: u32 = RANK_MASK as u32;
const FREE: u64 = u64::MAX;
/// Longest piece that is merged in arrays: one bit each in a word.
const SHORT: usize = 64;
/// Merges in the small table: the lowest ranks, which are most of those that come up.
const HOT: usize = 1 << 14;
const HOT_SHIFT: u32 = 64 - 15;
/// Bits in the filter.
const FILTER_BITS: usize = 1 << 21;
/// No symbol.
const NONE: u32 = u32::MAX;

/// The merges of a tokenizer.
///
/// Inside, a symbol is a byte, or 256 + the rank of the merge that makes it: what a merge makes is known without a
/// look-up. `ids` turns symbols into token ids at the end.
pub(super) struct Merges {
    ids: Vec<u32>,
    /// Rank of each pair of bytes: most look-ups, out of the way of the large table.
    byte_pairs: Box<[u32]>,
    /// The lowest ranks, as in `table`: small enough to stay near the processor.
    hot: Box<[u64]>,
    /// A bit that is set for each pair outside `hot`, by its hash: most pairs that do not merge end here.
    filter: Box<[u64]>,
    /// Open addressing: left << 44 | right << 24 | rank, or `FREE`.
    table: Box<[u64]>,
    shift: u32,
    /// Symbol of each character below U+10000 whose bytes always merge into one before anything else touches them.
    whole: Box<[u32]>,
    /// Symbol that each rank makes, where several ranks make one token.
    made: Option<Vec<u32>>,
}

/// Working memory of the long path, kept between pieces.
#[derive(Default)]
pub(super) struct MergeScratch {
    symbols: Vec<u32>,
    next: Vec<u32>,
    previous: Vec<u32>,
    heap: BinaryHeap<Reverse<(u32, u32, u32)>>,
}

impl Merges {
    /// `byte_ids` are the tokens of the single bytes; `merges` are `(left, right, made)` by rank, at most
    /// [`MAX_MERGES`]. Of a pair that is listed twice the later rank holds, as in the reference.
    /// `token` gives the bytes of an id.
    pub(super) fn new<'a>(
        byte_ids: [u32; 256],
        merges: &[(u32, u32, u32)],
        token: impl Fn(u32) -> &'a [u8],
    ) -> Self {
        let slots = (2 * merges.len()).next_power_of_two().max(16);
        let mut ids = byte_ids.to_vec();
        ids.extend(merges.iter().map(|merge| merge.2));
        // Symbol of each token: of ranks that make the same one, the first. A part that no merge makes has none.
        let end =
            merges.iter().flat_map(|m| [m.0, m.1, m.2]).chain(byte_ids).max().map_or(0, |id| id as usize + 1);
        let mut symbols = vec![NONE; end];
        for (symbol, &id) in ids.iter().enumerate().rev() {
            symbols[id as usize] = symbol as u32;
        }
        let several = merges.iter().enumerate().any(|(rank, m)| symbols[m.2 as usize] != 256 + rank as u32);
        let mut new = Merges {
            ids,
            byte_pairs: vec![NO_RANK; 1 << 16].into_boxed_slice(),
            whole: vec![NONE; 1 << 16].into_boxed_slice(),
            hot: vec![FREE; 1 << (64 - HOT_SHIFT)].into_boxed_slice(),
            filter: vec![0; FILTER_BITS / 64].into_boxed_slice(),
            table: vec![FREE; slots].into_boxed_slice(),
            shift: 64 - slots.trailing_zeros(),
            made: several.then(|| merges.iter().map(|m| symbols[m.2 as usize]).collect()),
        };
        for (rank, merge) in merges.iter().enumerate() {
            let (left, right) = (symbols[merge.0 as usize], symbols[merge.1 as usize]);
            if left == NONE || right == NONE {
                continue;
            }
            let pair = pair(left, right);
            let hash = hash(pair);
            let entry = pair << RANK_BITS | rank as u64;
            if rank < HOT {
                let slot = find(&new.hot, HOT_SHIFT, pair, hash);
                new.hot[slot] = entry;
            } else {
                // A pair that the small table has too would be found there, with the rank that does not hold.
                let slot = find(&new.hot, HOT_SHIFT, pair, hash);
                if new.hot[slot] != FREE {
                    new.hot[slot] = entry;
                }
                let slot = find(&new.table, new.shift, pair, hash);
                new.table[slot] = entry;
                let bit = hash as usize >> 8 & (FILTER_BITS - 1);
                new.filter[bit / 64] |= 1 << (bit % 64);
            }
            if left < 256 && right < 256 {
                new.byte_pairs[(left << 8 | right) as usize] = rank as u32;
            }
        }
        new.find_whole_characters(&symbols, merges, token);
        new
    }

    /// Fills `whole`. A merge joins part of a character with what stands beside it only if its right side is the
    /// start of a character and nothing else, or its left side the end of one. A character whose own merges all come
    /// before every such merge of its parts is one symbol before anything else can happen to it.
    fn find_whole_characters<'a>(
        &mut self,
        symbols: &[u32],
        merges: &[(u32, u32, u32)],
        token: impl Fn(u32) -> &'a [u8],
    ) {
        let mut touched: HashMap<&[u8], u32> = HashMap::new();
        let mut touch = |part: &'a [u8], rank: usize| {
            let first = touched.entry(part).or_insert(NO_RANK);
            *first = (*first).min(rank as u32);
        };
        for (rank, merge) in merges.iter().enumerate() {
            if symbols[merge.0 as usize] == NONE || symbols[merge.1 as usize] == NONE {
                continue;
            }
            let (left, right) = (token(merge.0), token(merge.1));
            if right[0] >= 0xc0 && right.len() < 4 && right[1..].iter().all(|byte| byte & 0xc0 == 0x80) {
                touch(right, rank);
            }
            if left.len() < 4 && left.iter().all(|byte| byte & 0xc0 == 0x80) && right[0] & 0xc0 != 0x80 {
                touch(left, rank);
            }
        }
        for c in ('\u{80}'..='\u{ffff}').filter(|c| c.len_utf8() < 4) {
            let mut buffer = [0; 4];
            let bytes = c.encode_utf8(&mut buffer).as_bytes();
            let (mut parts, mut highest) = (bytes.iter().map(|&byte| u32::from(byte)).collect::<Vec<_>>(), 0);
            while let Some((rank, at)) = parts
                .windows(2)
                .zip(0..)
                .map(|(p, at)| (self.rank(p[0], p[1]), at))
                .min()
                .filter(|m| m.0 != NO_RANK)
            {
                parts[at] = self.made(rank);
                parts.remove(at + 1);
                highest = highest.max(rank);
            }
            let first_touch = (1..bytes.len())
                .flat_map(|i| [&bytes[..i], &bytes[i..]])
                .filter_map(|part| touched.get(part))
                .min();
            if let [symbol] = *parts
                && first_touch.is_none_or(|&rank| highest < rank)
            {
                self.whole[c as usize] = symbol;
            }
        }
    }

    /// Calls `each(at, len, symbol)` for the symbols that merging `piece` starts from.
    #[inline(always)]
    fn first_symbols(&self, piece: &[u8], mut each: impl FnMut(usize, usize, u32)) {
        let mut at = 0;
        while let Some(&byte) = piece.get(at) {
            if byte >= 0xc0 {
                let (code, len) = decode(piece, at);
                if let Some(&symbol) = self.whole.get(code).filter(|&&symbol| symbol != NONE) {
                    each(at, len, symbol);
                    at += len;
                    continue;
                }
            }
            each(at, 1, byte.into());
            at += 1;
        }
    }

    #[inline(always)]
    fn rank(&self, left: u32, right: u32) -> u32 {
        let pair = pair(left, right);
        let hash = hash(pair);
        let mut entry = self.hot[find(&self.hot, HOT_SHIFT, pair, hash)];
        let bit = hash as usize >> 8 & (FILTER_BITS - 1);
        if entry == FREE && self.filter[bit / 64] >> (bit % 64) & 1 != 0 {
            entry = self.table[find(&self.table, self.shift, pair, hash)];
        }
        // FREE has NO_RANK in its low bits.
        (entry & RANK_MASK) as u32
    }

    #[inline(always)]
    fn made(&self, rank: u32) -> u32 {
        match &self.made {
            None => 256 + rank,
            Some(made) => made[rank as usize],
        }
    }

    /// Appends the tokens of one piece.
    pub(super) fn encode(&self, piece: &[u8], scratch: &mut MergeScratch, out: &mut Vec<u32>) {
        if piece.len() <= SHORT {
            self.encode_short(piece, out)
        } else {
            self.encode_long(piece, scratch, out)
        }
    }

    fn encode_short(&self, piece: &[u8], out: &mut Vec<u32>) {
        // A symbol stands where its first byte does; so does the rank of its pair with the next one, as
        // rank << 6 | place, so that the smallest is the leftmost of the lowest.
        const STAY: i32 = i32::MAX;
        let mut symbols = [0u32; SHORT];
        let mut ranks = [STAY; SHORT];
        let entry =
            |rank: u32, at: usize| if rank == NO_RANK { STAY } else { (rank << 6) as i32 | at as i32 };
        let padded = piece.len().next_multiple_of(16).min(SHORT);
        let (mut alive, mut previous) = (0u64, SHORT);
        self.first_symbols(piece, |at, _, symbol| {
            symbols[at % SHORT] = symbol;
            alive |= 1 << at;
            if previous < SHORT {
                let left = symbols[previous];
                let rank = if left < 256 && symbol < 256 {
                    self.byte_pairs[(left << 8 | symbol) as usize & 0xffff]
                } else {
                    self.rank(left, symbol)
                };
                ranks[previous] = entry(rank, previous);
            }
            previous = at;
        });
        loop {
            let best = ranks[..padded].chunks_exact(16).flatten().fold(STAY, |best, &rank| best.min(rank));
            if best == STAY {
                break;
            }
            let at = best as usize % SHORT;
            let after = alive & (u64::MAX << 1 << at);
            let right = after.trailing_zeros() as usize % SHORT;
            alive &= !(1 << right);
            ranks[right] = STAY;
            let made = self.made(best as u32 >> 6);
            symbols[at] = made;
            let after = after & after.wrapping_sub(1);
            let before = alive & ((1 << at) - 1);
            ranks[at] = if after == 0 {
                STAY
            } else {
                entry(self.rank(made, symbols[after.trailing_zeros() as usize % SHORT]), at)
            };
            if before != 0 {
                let left = 63 - before.leading_zeros() as usize;
                ranks[left] = entry(self.rank(symbols[left], made), left);
            }
        }
        while alive != 0 {
            out.push(self.ids[symbols[alive.trailing_zeros() as usize % SHORT] as usize]);
            alive &= alive - 1;
        }
    }

    /// The same over a linked list and a heap: n log n.
    fn encode_long(&self, piece: &[u8], scratch: &mut MergeScratch, out: &mut Vec<u32>) {
        const DEAD: u32 = u32::MAX;
        let len = piece.len() as u32;
        let MergeScratch { symbols, next, previous, heap } = scratch;
        for list in [&mut *symbols, &mut *next, &mut *previous] {
            list.clear();
            list.resize(piece.len(), DEAD);
        }
        // By place, as in the short path.
        let mut last = DEAD;
        self.first_symbols(piece, |at, width, symbol| {
            symbols[at] = symbol;
            next[at] = (at + width) as u32;
            previous[at] = last;
            last = at as u32;
        });
        // An entry names its right neighbour, so that one whose pair is gone can be told from a live one.
        let ranked = (0..len).filter_map(|at| {
            let (left, right) = (symbols[at as usize], *next.get(at as usize)?);
            let rank = self.rank(left, *symbols.get(right as usize).filter(|_| left != DEAD)?);
            (rank != NO_RANK).then_some(Reverse((rank, at, right)))
        });
        let mut entries = std::mem::take(heap).into_vec();
        entries.clear();
        entries.extend(ranked);
        *heap = BinaryHeap::from(entries);
        while let Some(Reverse((rank, at, right))) = heap.pop() {
            let (i, j) = (at as usize, right as usize);
            if symbols[i] == DEAD
                || symbols[j] == DEAD
                || next[i] != right
                || self.rank(symbols[i], symbols[j]) != rank
            {
                continue;
            }
            symbols[i] = self.made(rank);
            symbols[j] = DEAD;
            let after = next[j];
            next[i] = after;
            if after < len {
                previous[after as usize] = at;
                let rank = self.rank(symbols[i], symbols[after as usize]);
                if rank != NO_RANK {
                    heap.push(Reverse((rank, at, after)));
                }
            }
            let before = previous[i];
            if before < len {
                let rank = self.rank(symbols[before as usize], symbols[i]);
                if rank != NO_RANK {
                    heap.push(Reverse((rank, before, at)));
                }
            }
        }
        let mut at = 0;
        while at < len {
            out.push(self.ids[symbols[at as usize] as usize]);
            at = next[at as usize];
        }
    }
}

#[inline(always)]
fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << ID_BITS | u64::from(right)
}

/// The slot of a pair in an open-addressing table, or the free slot where it would stand.
#[inline(always)]
fn find(table: &[u64], shift: u32, pair: u64, hash: u64) -> usize {
    let mut slot = (hash >> shift) as usize;
    while table[slot] != FREE && table[slot] >> RANK_BITS != pair {
        slot = (slot + 1) & (table.len() - 1);
    }
    slot
}

#[inline(always)]
fn hash(pair: u64) -> u64 {
    pair.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    /// The definition, word for word.
    fn plain(merges: &[(u32, u32, u32)], piece: &[u8]) -> Vec<u32> {
        let ranks: HashMap<_, _> =
            merges.iter().enumerate().map(|(rank, m)| ((m.0, m.1), (rank, m.2))).collect();
        let mut ids: Vec<u32> = piece.iter().map(|&byte| byte.into()).collect();
        let best = |ids: &[u32]| {
            let ranked =
                ids.windows(2).enumerate().filter_map(|(i, p)| ranks.get(&(p[0], p[1])).map(|m| (*m, i)));
            ranked.min_by_key(|((rank, _), i)| (*rank, *i))
        };
        while let Some(((_, made), at)) = best(&ids) {
            ids[at] = made;
            ids.remove(at + 1);
        }
        ids
    }

    fn encoder(merges: &[(u32, u32, u32)]) -> Merges {
        {
            let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
            for merge in merges {
                let made = [tokens[merge.0 as usize].as_slice(), &tokens[merge.1 as usize]].concat();
                tokens.resize(tokens.len().max(merge.2 as usize + 1), Vec::new());
                tokens[merge.2 as usize] = made;
            }
            Merges::new(std::array::from_fn(|i| i as u32), merges, |id| &tokens[id as usize])
        }
    }

    /// Random merges over the letters a, b, c: each joins two ids that exist by then; pairs may repeat.
    fn merges() -> impl Strategy<Value = Vec<(u32, u32, u32)>> {
        prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..24).prop_map(
            |picks| {
                let mut ids: Vec<u32> = vec![97, 98, 99];
                let mut merges: Vec<(u32, u32, u32)> = Vec::new();
                for (left, right) in picks {
                    let (left, right) = (ids[left.index(ids.len())], ids[right.index(ids.len())]);
                    let made = merges
                        .iter()
                        .find(|m| (m.0, m.1) == (left, right))
                        .map_or(256 + merges.len() as u32, |m| m.2);
                    merges.push((left, right, made));
                    ids.push(made);
                }
                merges
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn both_paths_follow_the_definition(merges in merges(), piece in "[abc]{0,40}") {
            let encoder = encoder(&merges);
            let expected = plain(&merges, piece.as_bytes());
            let (mut short, mut long) = (Vec::new(), Vec::new());
            let mut scratch = MergeScratch::default();
            encoder.encode_short(piece.as_bytes(), &mut short);
            encoder.encode_long(piece.as_bytes(), &mut scratch, &mut long);
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
