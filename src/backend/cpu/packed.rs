//! bf16 matrices in three quarters of their bytes, to the bit: decoding reads weights as fast as memory gives them,
//! so fewer bytes are more tokens a second.
//!
//! The exponents of neighbouring weights are alike. A block of 128 is stored as 128 bytes of sign and mantissa and 128
//! codes of 4 bits, exponents counted from the block's smallest; where they span more than 16 binary orders the block
//! stays as it is (rare where weights are about normally distributed: a test holds the size).
//!
//! ```text
//! group of 16 rows:  blocks of 8 columns, then what is left of the columns as bf16, [k mod 8][16]
//! block:             two halves of 4 columns: [64] sign and mantissa, [32] codes     or as it is: [64] bf16
//! half:              bytes 2 r and 2 r + 1 are columns 0 and 1 of row r, in the second 32 bytes columns 2 and 3;
//!                    codes 2 r and 2 r + 1 have those of columns 0 and 1 in their low half, of 2 and 3 in their high
//! ```
//!
//! Rows are lanes: nothing is shuffled, and the sixteen partial sums of `tile` are sixteen vectors.
//! The method is our own; that bf16 weights carry some 11 bits of information each is the observation of DFloat11
//! (Zhang et al. 2025, arXiv 2504.11651).

use rayon::prelude::*;

use super::gemm::{Strips, store_at};
use super::linear::Stream;
use super::simd::{F32x16, Kernel, LANES, dispatch};
use super::tile::{Bf16, Element};

/// Columns of a block.
const BLOCK: usize = 8;
/// Groups of a chunk, which one thread packs.
const CHUNK: usize = 16;
/// The base of a block that is stored as it is. (Others have their low seven bits clear.)
const RAW: u16 = 0xffff;

/// A bf16 matrix `[num_out, num_in]`.
pub struct Packed {
    num_in: usize,
    num_out: usize,
    chunks: Vec<Chunk>,
}

#[derive(Default)]
struct Chunk {
    data: Vec<u8>,
    /// Where each group starts in `data`.
    starts: Vec<u32>,
    /// `[group][block]`: what is added to the codes, in the place of the exponent; or [`RAW`].
    bases: Vec<u16>,
}

impl Packed {
    /// Packs the rows of `bytes`, bf16.
    pub fn new(bytes: &[u8], num_in: usize) -> Self {
        let row_len = 2 * num_in;
        let num_out = bytes.len() / row_len.max(1);
        assert!(row_len * LANES * CHUNK <= u32::MAX as usize, "rows of {num_in}");
        let chunks =
            bytes.par_chunks((row_len * LANES * CHUNK).max(1)).map(|rows| Chunk::new(rows, num_in)).collect();
        Self { num_in, num_out, chunks }
    }

    /// Rows.
    pub fn num_out(&self) -> usize {
        self.num_out
    }

    /// Bytes in memory.
    #[cfg(test)]
    pub fn num_bytes(&self) -> usize {
        self.chunks.iter().map(|c| c.data.len() + 4 * c.starts.len() + 2 * c.bases.len()).sum()
    }

    /// Writes row `row`, widened.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        let vectors = self.num_in.div_ceil(LANES);
        let mut strip = vec![0.0; LANES * vectors * LANES];
        dispatch(ReadStrip { packed: self, row, to: &mut strip });
        for (k, out) in out.iter_mut().enumerate() {
            *out = strip[(k % LANES * vectors + k / LANES) * LANES + row % LANES];
        }
    }

    /// The group of rows `16 * group ..`.
    #[inline(always)]
    fn group(&self, group: usize) -> Group<'_> {
        let chunk = &self.chunks[group / CHUNK];
        let (at, blocks) = (group % CHUNK, self.num_in / BLOCK);
        Group {
            data: &chunk.data[chunk.starts[at] as usize..],
            bases: &chunk.bases[at * blocks..(at + 1) * blocks],
        }
    }
}

impl Stream for Packed {
    #[inline(always)]
    unsafe fn few<V: F32x16, const T: usize>(
        &self,
        first: usize,
        num_out: usize,
        x: [*const f32; T],
        out: [*mut f32; T],
    ) {
        for group in first / LANES..(first + num_out).div_ceil(LANES) {
            // SAFETY: the caller's; a group has all its rows.
            unsafe {
                let sums = self.group(group).sums::<V, T>(x, self.num_in);
                for t in 0..T {
                    let row = (group * LANES) as isize - first as isize;
                    store_at(fold(sums[t]), out[t], row, num_out);
                }
            }
        }
    }
}

impl Chunk {
    fn new(rows: &[u8], num_in: usize) -> Self {
        let row_len = 2 * num_in;
        let (mut chunk, blocks) = (Self::default(), num_in / BLOCK);
        chunk.data.reserve_exact(rows.len() * 4 / 5);
        for group in rows.chunks(LANES * row_len) {
            chunk.starts.push(chunk.data.len() as u32);
            // Rows that the last group lacks are zeros.
            let mut padded = Vec::new();
            let group = if group.len() == LANES * row_len {
                group
            } else {
                padded.extend_from_slice(group);
                padded.resize(LANES * row_len, 0);
                &padded
            };
            for block in 0..blocks {
                let at = chunk.data.len();
                chunk.data.resize(at + 2 * half_len(RAW), 0);
                let base = dispatch(PackBlock { group, row_len, block, to: &mut chunk.data[at..] });
                chunk.data.truncate(at + 2 * half_len(base));
                chunk.bases.push(base);
            }
            for k in blocks * BLOCK..num_in {
                for row in 0..LANES {
                    chunk.data.extend_from_slice(&group[row * row_len + 2 * k..][..2]);
                }
            }
        }
        chunk.data.shrink_to_fit();
        chunk
    }
}

/// Packs a block where it can be packed; returns its base.
struct PackBlock<'a> {
    /// Sixteen rows of `row_len` bytes.
    group: &'a [u8],
    row_len: usize,
    block: usize,
    to: &'a mut [u8],
}

impl Kernel for PackBlock<'_> {
    type Out = u16;
    #[inline(always)]
    unsafe fn run<V: F32x16>(self) -> u16 {
        // In their order in the block: by pairs of columns, then rows.
        let mut w = [0u16; BLOCK * LANES];
        for (row, bytes) in self.group.chunks_exact(self.row_len).enumerate() {
            let bytes = &bytes[2 * BLOCK * self.block..][..2 * BLOCK];
            for k in 0..BLOCK {
                w[k / 2 * 2 * LANES + 2 * row + k % 2] = u16::from_le_bytes([bytes[2 * k], bytes[2 * k + 1]]);
            }
        }
        let (mut low, mut high) = (u16::MAX, 0);
        for w in w {
            (low, high) = (low.min(w & 0x7f80), high.max(w & 0x7f80));
        }
        let packs = high - low < 16 << 7;
        let base = if packs { low } else { RAW };
        for (half, to) in w.chunks_exact(64).zip(self.to.chunks_exact_mut(half_len(base))) {
            if packs {
                let (bytes, codes) = to.split_at_mut(64);
                for (byte, w) in bytes.iter_mut().zip(half) {
                    *byte = ((w >> 8) & 0x80 | w & 0x7f) as u8;
                }
                for (i, code) in codes.iter_mut().enumerate() {
                    let (a, b) = ((half[i] & 0x7f80) - low, (half[32 + i] & 0x7f80) - low);
                    *code = (a >> 7 | b >> 3) as u8;
                }
            } else {
                for (to, w) in to.chunks_exact_mut(2).zip(half) {
                    to.copy_from_slice(&w.to_le_bytes());
                }
            }
        }
        base
    }
}

struct ReadStrip<'a> {
    packed: &'a Packed,
    row: usize,
    to: &'a mut [f32],
}

impl Kernel for ReadStrip<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<V: F32x16>(self) {
        // SAFETY: `read_row` made the room.
        unsafe { self.packed.strip::<V>(self.row, self.to.as_mut_ptr()) }
    }
}

/// Sixteen rows.
struct Group<'a> {
    data: &'a [u8],
    bases: &'a [u16],
}

/// Bytes of half a block.
#[inline(always)]
fn half_len(base: u16) -> usize {
    if base == RAW { 128 } else { 96 }
}

/// Half a block: columns 0 and 1 of row i in lane i of the first vector, 2 and 3 in the second.
#[inline(always)]
unsafe fn load_half<V: F32x16>(p: *const u8, base: u16) -> [V; 2] {
    // SAFETY: the caller's.
    unsafe {
        if base == RAW { [V::load(p.cast()), V::load(p.add(64).cast())] } else { V::load_packed(p, base) }
    }
}

/// The sum of sixteen partial sums, in the order of `F32x16::sum4`.
#[inline(always)]
unsafe fn fold<V: F32x16>(mut sums: [V; LANES]) -> V {
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            // SAFETY: the caller's.
            sums[i] = unsafe { sums[i].add(sums[i + width]) };
        }
    }
    sums[0]
}

/// Adds the products of a block, of columns k to k + 7, as far as they are of this pass; returns where the next one is.
/// `odd` says which half of sixteen columns it has.
#[inline(always)]
unsafe fn block<V: F32x16, const T: usize>(
    acc: &mut [[[V; T]; 4]; 4],
    p: *const u8,
    base: u16,
    (odd, pass): (usize, usize),
    x: [*const f32; T],
    k: usize,
) -> *const u8 {
    // SAFETY: the caller's.
    unsafe {
        for half in 0..2 {
            let place = 2 * odd + half;
            if place * T / 4 != pass {
                continue;
            }
            let [a, b] = load_half::<V>(p.add(half * half_len(base)), base);
            let ([w0, w1], [w2, w3]) = (a.split_pairs(), b.split_pairs());
            for (i, w) in [w0, w1, w2, w3].into_iter().enumerate() {
                for t in 0..T {
                    let x = V::splat(*x[t].add(k + half * 4 + i));
                    acc[place % (4 / T)][i][t] = w.fma(x, acc[place % (4 / T)][i][t]);
                }
            }
        }
        p.add(2 * half_len(base))
    }
}

impl Group<'_> {
    /// Partial sums `[token][k mod 16]`, a row in each lane. With T tokens the rows pass T times, a T-th of their
    /// columns at a time: always sixteen sums in registers, and only the first pass waits for memory.
    #[inline(always)]
    unsafe fn sums<V: F32x16, const T: usize>(&self, x: [*const f32; T], num_in: usize) -> [[V; LANES]; T] {
        // SAFETY: the group has these blocks, and the tokens `num_in` floats.
        unsafe {
            let mut sums = [[V::splat(0.0); LANES]; T];
            let mut end = self.data.as_ptr();
            for pass in 0..T {
                // The sums of 4 / T halves, of the four that sixteen columns have.
                let mut acc = [[[V::splat(0.0); T]; 4]; 4];
                let mut p = self.data.as_ptr();
                let pairs = self.bases.chunks_exact(2);
                let last = pairs.remainder().first();
                let mut k = 0;
                for bases in pairs {
                    p = block::<V, T>(&mut acc, p, bases[0], (0, pass), x, k);
                    p = block::<V, T>(&mut acc, p, bases[1], (1, pass), x, k + BLOCK);
                    k += LANES;
                }
                if let Some(&base) = last {
                    p = block::<V, T>(&mut acc, p, base, (0, pass), x, k);
                }
                for place in 0..4 / T {
                    for i in 0..4 {
                        for t in 0..T {
                            sums[t][(pass * (4 / T) + place) * 4 + i] = acc[place][i][t];
                        }
                    }
                }
                end = p;
            }
            // What is left, and zeros up to a multiple of sixteen, as everywhere.
            let packed = self.bases.len() * BLOCK;
            for k in packed..num_in.next_multiple_of(LANES) {
                for t in 0..T {
                    let (w, x) = if k < num_in {
                        (Bf16::load::<V>(end.cast::<Bf16>().add((k - packed) * LANES)), *x[t].add(k))
                    } else {
                        (V::splat(0.0), 0.0)
                    };
                    sums[t][k % LANES] = w.fma(V::splat(x), sums[t][k % LANES]);
                }
            }
            sums
        }
    }
}

impl Strips for Packed {
    #[inline(always)]
    unsafe fn strip<V: F32x16>(&self, row: usize, to: *mut f32) {
        let vectors = self.num_in.div_ceil(LANES);
        let group = self.group(row / LANES);
        // SAFETY: the group holds its blocks; the room is the caller's.
        unsafe {
            let at = |k: usize| to.add((k % LANES * vectors + k / LANES) * LANES);
            let mut p = group.data.as_ptr();
            for (block, &base) in group.bases.iter().enumerate() {
                for half in 0..2 {
                    let k = block * BLOCK + half * 4;
                    let [a, b] = load_half::<V>(p, base);
                    let ([w0, w1], [w2, w3]) = (a.split_pairs(), b.split_pairs());
                    w0.store(at(k));
                    w1.store(at(k + 1));
                    w2.store(at(k + 2));
                    w3.store(at(k + 3));
                    p = p.add(half_len(base));
                }
            }
            let packed = group.bases.len() * BLOCK;
            for k in packed..vectors * LANES {
                let w = if k < self.num_in {
                    Bf16::load::<V>(p.cast::<Bf16>().add((k - packed) * LANES))
                } else {
                    V::splat(0.0)
                };
                w.store(at(k));
            }
        }
    }
}
