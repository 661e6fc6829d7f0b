//! Byte-pair merging: the lowest rank first, the leftmost of equals first, until no pair has a rank.
//!
//! Short pieces are merged in small arrays, long ones over a heap, so that no input is quadratic.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use super::chars::decode;
use super::vocab::{ID_BITS, prefetch};

/// More merges than this do not fit: a symbol and a rank have `ID_BITS` bits.
pub(super) const MAX_MERGES: usize = (1 << ID_BITS) - 257;
const RANK_BITS: u32 = 64 - 2 * ID_BITS;
const RANK_MASK: u64 = (1 << RANK_BITS) - 1;
/// No merge.
const NO_RANK: u32 = u32::MAX;
const FREE: u64 = u64::MAX;
/// Longest piece that is merged in arrays: one bit each in a word.
const SHORT: usize = 64;
/// Pieces that are merged in turns.
const LANES: usize = 8;
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
    /// By hash, `left << 44 | right << 24 | rank + 1`, or `FREE`. What a full bucket has no room for is in the next.
    table: Box<[Bucket]>,
    shift: u32,
    /// By character below U+10000: the symbol that its bytes merge into, or `NONE`, and the highest rank on the way.
    whole: Box<[[u32; 2]]>,
    /// Lowest rank that joins a byte to the first byte of a character, and the last byte of one to the next byte.
    before_lead: Box<[u32]>,
    after_last: Box<[u32]>,
    /// Symbol that each rank makes, where several ranks make one token.
    made: Option<Vec<u32>>,
}

/// A short piece on its way. A symbol stands where its first byte does.
struct Lane {
    symbols: [u32; SHORT],
    /// Rank of a symbol's pair with the next one, as `rank << 6 | place`, so that the smallest is the leftmost of the
    /// lowest; `STAY` where there is no merge and no symbol.
    ranks: [i32; SHORT],
    /// A bit for each place where a symbol stands.
    alive: u64,
    /// The pairs that the last merge made, at `at` and at `left`, still to be looked up; `FREE`, which has no rank, where
    /// it made none.
    right_pair: u64,
    left_pair: u64,
    at: usize,
    left: usize,
    /// How much of `ranks` is in use, a multiple of 16.
    padded: usize,
    piece: usize,
}

impl Default for Lane {
    fn default() -> Self {
        let (symbols, ranks) = ([0; SHORT], [STAY; SHORT]);
        Lane {
            symbols,
            ranks,
            alive: 0,
            right_pair: FREE,
            left_pair: FREE,
            at: 0,
            left: 0,
            padded: 0,
            piece: 0,
        }
    }
}

const STAY: i32 = i32::MAX;

#[inline(always)]
fn entry(rank: u32, at: usize) -> i32 {
    if rank == NO_RANK { STAY } else { (rank << 6) as i32 | at as i32 }
}

/// Eight pairs in one cache line: compared all at once, because which of them it is cannot be predicted.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Bucket([u64; 8]);

impl Bucket {
    /// Rank of a pair plus one, or 0.
    #[inline(always)]
    fn find(&self, pair: u64) -> u64 {
        self.0
            .iter()
            .fold(0, |found, &entry| found | if entry >> RANK_BITS == pair { entry & RANK_MASK } else { 0 })
    }

    #[inline(always)]
    fn is_full(&self) -> bool {
        self.0[7] != FREE
    }
}

/// Working memory, kept between pieces.
#[derive(Default)]
pub(super) struct MergeScratch {
    lanes: Vec<Lane>,
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
        let buckets = merges.len().div_ceil(4).next_power_of_two().max(2);
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
            whole: vec![[NONE; 2]; 1 << 16].into_boxed_slice(),
            before_lead: vec![NO_RANK; 1 << 16].into_boxed_slice(),
            after_last: vec![NO_RANK; 1 << 16].into_boxed_slice(),
            table: vec![Bucket([FREE; 8]); buckets].into_boxed_slice(),
            shift: 64 - buckets.trailing_zeros(),
            made: several.then(|| merges.iter().map(|m| symbols[m.2 as usize]).collect()),
        };
        for (rank, merge) in merges.iter().enumerate() {
            let (left, right) = (symbols[merge.0 as usize], symbols[merge.1 as usize]);
            if left == NONE || right == NONE {
                continue;
            }
            let pair = pair(left, right);
            new.insert(pair, rank as u32);
            if left < 256 && right < 256 {
                new.byte_pairs[(left << 8 | right) as usize] = rank as u32;
            }
        }
        new.find_whole_characters(&symbols, merges, token);
        new
    }

    /// Fills `whole`, `before_lead` and `after_last`.
    ///
    /// A merge joins part of a character to what stands beside it only if its right side is the start of a character
    /// and nothing else, or its left side the end of one. A character whose own merges all have lower ranks than
    /// every such merge that its neighbours allow is one symbol before anything else can happen to it.
    fn find_whole_characters<'a>(
        &mut self,
        symbols: &[u32],
        merges: &[(u32, u32, u32)],
        token: impl Fn(u32) -> &'a [u8],
    ) {
        let continues = |byte: &u8| byte & 0xc0 == 0x80;
        // Parts of two and three bytes are rare enough to forget what stands beside them.
        let mut touched: HashMap<&[u8], u32> = HashMap::new();
        // A character that joins its neighbours at a lower rank than its own merges would be there too early.
        let mut lowest_use = vec![NO_RANK; symbols.len()];
        for (rank, merge) in merges.iter().enumerate() {
            if symbols[merge.0 as usize] == NONE || symbols[merge.1 as usize] == NONE {
                continue;
            }
            for part in [merge.0, merge.1] {
                let lowest = &mut lowest_use[part as usize];
                *lowest = (rank as u32).min(*lowest);
            }
            let (left, right, rank) = (token(merge.0), token(merge.1), rank as u32);
            let (last, first) = (left[left.len() - 1], right[0]);
            let beside = (last as usize) << 8 | first as usize;
            let starts = first >= 0xc0 && right.len() < 4 && right[1..].iter().all(continues);
            let ends = left.len() < 4 && left.iter().all(continues) && !continues(&first);
            for (part, is_part, table) in
                [(right, starts, &mut self.before_lead), (left, ends, &mut self.after_last)]
            {
                if is_part && part.len() == 1 {
                    table[beside] = table[beside].min(rank);
                } else if is_part {
                    let lowest = touched.entry(part).or_insert(rank);
                    *lowest = rank.min(*lowest);
                }
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
            let inner = [bytes.get(..2), bytes.get(1..)].into_iter().flatten().filter(|_| bytes.len() == 3);
            let lowest = inner.filter_map(|part| touched.get(part)).min();
            if let [symbol] = *parts
                && lowest.is_none_or(|&rank| highest < rank)
                && highest < lowest_use[self.ids[symbol as usize] as usize]
            {
                self.whole[c as usize] = [symbol, highest];
            }
        }
    }

    /// The symbol at `at` that merging `piece` starts from, and its length in bytes.
    #[inline(always)]
    fn first_symbol(&self, piece: &[u8], at: usize) -> (usize, u32) {
        let byte = piece[at];
        if byte >= 0xc0 {
            let (code, len) = decode(piece, at);
            let beside = |left: u8, right: u8| (left as usize) << 8 | right as usize;
            if let Some(&[symbol, highest]) = self.whole.get(code)
                && symbol != NONE
                && (at == 0 || highest < self.before_lead[beside(piece[at - 1], byte)])
                && piece
                    .get(at + len)
                    .is_none_or(|&next| highest < self.after_last[beside(piece[at + len - 1], next)])
            {
                return (len, symbol);
            }
        }
        (1, byte.into())
    }

    #[inline(always)]
    fn rank(&self, left: u32, right: u32) -> u32 {
        self.rank_of(pair(left, right))
    }

    #[inline(always)]
    fn rank_of(&self, pair: u64) -> u32 {
        let mut bucket = self.bucket(pair);
        let mut found = self.table[bucket].find(pair);
        while found == 0 && self.table[bucket].is_full() {
            bucket = (bucket + 1) & (self.table.len() - 1);
            found = self.table[bucket].find(pair);
        }
        // 0 becomes NO_RANK.
        (found as u32).wrapping_sub(1)
    }

    /// Adds a pair, or gives one that is there another rank.
    fn insert(&mut self, pair: u64, rank: u32) {
        let mut bucket = self.bucket(pair);
        loop {
            for entry in &mut self.table[bucket].0 {
                if *entry == FREE || *entry >> RANK_BITS == pair {
                    *entry = pair << RANK_BITS | u64::from(rank + 1);
                    return;
                }
            }
            bucket = (bucket + 1) & (self.table.len() - 1);
        }
    }

    #[inline(always)]
    fn bucket(&self, pair: u64) -> usize {
        (pair.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> self.shift) as usize
    }

    #[inline(always)]
    fn made(&self, rank: u32) -> u32 {
        match &self.made {
            None => 256 + rank,
            Some(made) => made[rank as usize],
        }
    }

    /// Appends the tokens of every piece of `text` to `ids`, and to `spans` where in `ids` they are, in the order of
    /// `pieces`. Their order in `ids` is any.
    ///
    /// Short pieces take turns, merge by merge: while the ranks that one needs come from memory, others go on.
    #[inline(always)]
    pub(super) fn encode(
        &self,
        text: &[u8],
        pieces: impl ExactSizeIterator<Item = (usize, usize)>,
        scratch: &mut MergeScratch,
        ids: &mut Vec<u32>,
        spans: &mut Vec<(u32, u32)>,
    ) {
        let first_span = spans.len();
        spans.resize(first_span + pieces.len(), (0, 0));
        let mut waiting = pieces.enumerate();
        let mut lanes = std::mem::take(&mut scratch.lanes);
        lanes.resize_with(LANES, Lane::default);
        // Lanes at work come first.
        let mut order: [usize; LANES] = std::array::from_fn(|i| i);
        let mut running = 0;
        loop {
            while running < LANES {
                let Some((i, (start, end))) = waiting.next() else { break };
                let piece = &text[start..end];
                if piece.len() <= SHORT {
                    let lane = &mut lanes[order[running]];
                    self.start(lane, piece);
                    lane.piece = first_span + i;
                    running += 1;
                } else {
                    let before = ids.len();
                    self.encode_long(piece, scratch, ids);
                    spans[first_span + i] = (before as u32, ids.len() as u32);
                }
            }
            if running == 0 {
                break;
            }
            let mut i = 0;
            while i < running {
                if self.step(&mut lanes[order[i]]) {
                    i += 1;
                    continue;
                }
                let (lane, before) = (&lanes[order[i]], ids.len());
                let mut alive = lane.alive;
                while alive != 0 {
                    ids.push(self.ids[lane.symbols[alive.trailing_zeros() as usize % SHORT] as usize]);
                    alive &= alive - 1;
                }
                spans[lane.piece] = (before as u32, ids.len() as u32);
                running -= 1;
                order.swap(i, running);
            }
        }
        scratch.lanes = lanes;
    }

    /// Fills a lane with the symbols that merging starts from.
    #[inline(always)]
    fn start(&self, lane: &mut Lane, piece: &[u8]) {
        lane.padded = piece.len().next_multiple_of(16).min(SHORT);
        lane.ranks[..lane.padded].fill(STAY);
        lane.alive = 0;
        (lane.right_pair, lane.left_pair) = (FREE, FREE);
        // Nothing follows the last symbol: its place has no rank.
        let last = piece.len().saturating_sub(1);
        (lane.at, lane.left) = (last, last);
        let (mut at, mut previous) = (0, SHORT);
        while at < piece.len() {
            let (len, symbol) = self.first_symbol(piece, at);
            lane.symbols[at % SHORT] = symbol;
            lane.alive |= 1 << at;
            if previous < SHORT {
                let left = lane.symbols[previous];
                let rank = if left < 256 && symbol < 256 {
                    self.byte_pairs[(left << 8 | symbol) as usize & 0xffff]
                } else {
                    self.rank(left, symbol)
                };
                lane.ranks[previous] = entry(rank, previous);
            }
            (previous, at) = (at, at + len);
        }
    }

    /// One merge, if there is one left; asks memory for what the next one needs.
    #[inline(always)]
    fn step(&self, lane: &mut Lane) -> bool {
        // The two ranks that the last merge changed stay out of the array until the others are read: reading what was
        // just written would wait for the writing.
        let right_rank = entry(self.rank_of(lane.right_pair), lane.at);
        let left_rank = entry(self.rank_of(lane.left_pair), lane.left);
        let best = lowest(&lane.ranks[..lane.padded]).min(right_rank).min(left_rank);
        if best == STAY {
            return false;
        }
        lane.ranks[lane.at % SHORT] = right_rank;
        lane.ranks[lane.left % SHORT] = left_rank;
        let at = best as usize % SHORT;
        let after = lane.alive & (u64::MAX << 1 << at);
        let right = after.trailing_zeros() as usize % SHORT;
        lane.alive &= !(1 << right);
        let made = self.made(best as u32 >> 6);
        lane.symbols[at] = made;
        lane.ranks[right] = STAY;
        lane.ranks[at] = STAY;
        lane.at = at;
        // Without branches: whether a neighbour is there cannot be predicted. Where there is none, the place that was
        // looked at for it does not matter, and the rank that is found goes to the symbol that is gone.
        let after = after & after.wrapping_sub(1);
        let next = lane.symbols[after.trailing_zeros() as usize % SHORT];
        lane.right_pair = if after == 0 { FREE } else { pair(made, next) };
        prefetch(&self.table[self.bucket(lane.right_pair)]);
        let before = lane.alive & ((1 << at) - 1);
        lane.left = if before == 0 { right } else { 63 - before.leading_zeros() as usize };
        lane.ranks[lane.left % SHORT] = STAY;
        let previous = lane.symbols[lane.left % SHORT];
        lane.left_pair = if before == 0 { FREE } else { pair(previous, made) };
        prefetch(&self.table[self.bucket(lane.left_pair)]);
        true
    }

    /// The same over a linked list and a heap: n log n.
    #[inline(never)]
    fn encode_long(&self, piece: &[u8], scratch: &mut MergeScratch, out: &mut Vec<u32>) {
        const DEAD: u32 = u32::MAX;
        let len = piece.len() as u32;
        let MergeScratch { symbols, next, previous, heap, .. } = scratch;
        for list in [&mut *symbols, &mut *next, &mut *previous] {
            list.clear();
            list.resize(piece.len(), DEAD);
        }
        // By place, as in the short path.
        let mut last = DEAD;
        let mut start = 0;
        while start < piece.len() {
            let (width, symbol) = self.first_symbol(piece, start);
            symbols[start] = symbol;
            next[start] = (start + width) as u32;
            previous[start] = last;
            last = start as u32;
            start += width;
        }
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

/// The smallest of some ranks, whose number is a multiple of 16: sixteen columns first, then across them, so that it is
/// a handful of vector instructions.
#[inline(always)]
fn lowest(ranks: &[i32]) -> i32 {
    let mut columns = [STAY; 16];
    for chunk in ranks.as_chunks::<16>().0 {
        for (column, &rank) in columns.iter_mut().zip(chunk) {
            *column = rank.min(*column);
        }
    }
    let mut width = 8;
    while width > 0 {
        for i in 0..width {
            columns[i] = columns[i].min(columns[i + width]);
        }
        width /= 2;
    }
    columns[0]
}

#[inline(always)]
fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << ID_BITS | u64::from(right)
}

#[cfg(test)]
mod tests;
