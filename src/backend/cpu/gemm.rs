//! Products with many tokens: both sides are laid out so that a register tile has features in its lanes and the
//! sums need no folding across lanes.
//!
//! ```text
//! x panel:  tiles of T tokens,    each [16][k / 16][T]    once per product, zeros past the last token and past k
//! w panel:  strips of 16 rows,    each [16][k / 16][16]   widened to f32, as many as half the L2 holds
//! ```
//!
//! The first index of a tile is k mod 16: the sixteen partial sums of `tile` are formed one after the other, and
//! added in the order of its fold, so that an output has the bits that it has alone.

use std::cell::RefCell;
use std::mem::MaybeUninit;

use super::parallel::{self, Shared};
use super::simd::{F32x16, Kernel, LANES, dispatch};
use super::tile::Element;

/// Tokens from which on laying out pays.
pub const MIN_TOKENS: usize = 8;

/// f32 of a w panel: 512 KiB.
const PANEL: usize = 1 << 17;

/// In which order partial sums are formed, each with the one eight lanes on, to which the fold adds it first: then
/// neighbours are added, then pairs of them, and so on.
const FIRST: [usize; 8] = [0, 4, 2, 6, 1, 5, 3, 7];

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Weights that can be laid out.
pub trait Strips {
    /// Writes sixteen rows from `row` on, a multiple of sixteen, widened, with row i in lane i: element k is at
    /// `to[((k % 16) * vectors + k / 16) * 16]`, where a row has that many `vectors` of sixteen, with zeros past k.
    /// Lanes of rows that do not exist hold anything.
    ///
    /// # Safety
    /// `V`'s instruction set is present, `row` exists, and there is room.
    unsafe fn strip<V: F32x16>(&self, row: usize, to: *mut f32);
}

/// Rows of plain elements, one after the other.
pub struct Rows<E> {
    /// Row 0.
    pub w: *const E,
    /// Rows there are.
    pub num_rows: usize,
    /// Elements of a row.
    pub k: usize,
}

impl<E: Element> Strips for Rows<E> {
    #[inline(always)]
    unsafe fn strip<V: F32x16>(&self, row: usize, to: *mut f32) {
        let vectors = self.k.div_ceil(LANES);
        for j in 0..vectors {
            // SAFETY: the rows have k elements; the caller's.
            unsafe {
                let mut v = [V::splat(0.0); LANES];
                for (i, v) in v.iter_mut().enumerate().take(self.num_rows - row) {
                    let from = self.w.add((row + i) * self.k + j * LANES);
                    *v = E::load_some::<V>(from, self.k - j * LANES);
                }
                for (l, v) in V::transpose(v).into_iter().enumerate() {
                    v.store(to.add((l * vectors + j) * LANES));
                }
            }
        }
    }
}

/// `out(t)[o] = x(t) · w[first + o]` for `num_out` rows of `w`, of k elements, and `num_rows` tokens.
///
/// # Safety
/// `V`'s instruction set is present and `V::TILE` is `(T, S)`. The rows exist; token t is written at `out(t)`
/// (`num_out` floats), which nobody else touches; `x` is their [`Panel`].
#[inline(always)]
pub unsafe fn product<V: F32x16, const T: usize, const S: usize>(
    w: &impl Strips,
    first: usize,
    num_out: usize,
    k: usize,
    num_rows: usize,
    x: *const f32,
    out: impl Fn(usize) -> *mut f32,
) {
    let vectors = k.div_ceil(LANES);
    let strip_len = LANES * vectors * LANES;
    // Strips start at multiples of sixteen; what they hold beyond the rows asked for is not written.
    let (start, end) = (first / LANES, (first + num_out).div_ceil(LANES));
    let room = (PANEL / strip_len.max(1)).clamp(1, (end - start).max(1));
    // Taken out and put back, not borrowed in a closure: a closure would lose the instruction set.
    let mut scratch = SCRATCH.take();
    grow(&mut scratch, room * strip_len);
    for block in (start..end).step_by(room) {
        let strips = room.min(end - block);
        for strip in 0..strips {
            // SAFETY: the scratch holds `room` strips.
            unsafe { w.strip::<V>((block + strip) * LANES, scratch.as_mut_ptr().add(strip * strip_len)) };
        }
        let mut t = 0;
        while t < num_rows {
            let whole = t + T <= num_rows;
            for strip in 0..strips {
                // SAFETY: both panels hold these tiles; the outputs are the caller's.
                unsafe {
                    let w = scratch.as_ptr().add(strip * strip_len);
                    let x = x.add(t * vectors * LANES);
                    let to = |i: usize| out(t + i);
                    let row = ((block + strip) * LANES) as isize - first as isize;
                    if whole {
                        store(sums::<V, T>(w, x, vectors), row, num_out, num_rows - t, to);
                    } else {
                        store(sums::<V, S>(w, x, vectors), row, num_out, num_rows - t, to);
                    }
                }
            }
            t += if whole { T } else { S };
        }
    }
    SCRATCH.set(scratch);
}

/// The products of a strip and T tokens: a row in each lane.
#[inline(always)]
unsafe fn sums<V: F32x16, const T: usize>(w: *const f32, x: *const f32, vectors: usize) -> [V; T] {
    // SAFETY: strip and tile have sixteen times `vectors` steps of a vector and of T floats.
    unsafe {
        // Sums that wait for their partner.
        let mut waiting = [const { MaybeUninit::<[V; T]>::uninit() }; 3];
        for (i, l) in FIRST.into_iter().enumerate() {
            // Two partial sums at once, which the fold adds first.
            let (mut w0, mut x0) = (w.add(l * vectors * LANES), x.add(l * vectors * T));
            let (mut w1, mut x1) = (w0.add(8 * vectors * LANES), x0.add(8 * vectors * T));
            let (mut acc, mut other) = ([V::splat(0.0); T], [V::splat(0.0); T]);
            for _ in 0..vectors {
                let (a, b) = (V::load(w0), V::load(w1));
                for t in 0..T {
                    acc[t] = a.fma(V::splat(*x0.add(t)), acc[t]);
                    other[t] = b.fma(V::splat(*x1.add(t)), other[t]);
                }
                (w0, x0, w1, x1) = (w0.add(LANES), x0.add(T), w1.add(LANES), x1.add(T));
            }
            for t in 0..T {
                acc[t] = acc[t].add(other[t]);
            }
            // As a binary counter carries: each one bit of i is a sum that waits.
            for waiting in &waiting[..i.trailing_ones() as usize] {
                let waiting = waiting.assume_init_ref();
                for t in 0..T {
                    acc[t] = waiting[t].add(acc[t]);
                }
            }
            if i == FIRST.len() - 1 {
                return acc;
            }
            waiting[i.trailing_ones() as usize].write(acc);
        }
        unreachable!()
    }
}

/// Writes the sums of the first `num_tokens` tokens, of which lane 0 is feature `row` of those asked for.
#[inline(always)]
unsafe fn store<V: F32x16, const T: usize>(
    acc: [V; T],
    row: isize,
    num_out: usize,
    num_tokens: usize,
    out: impl Fn(usize) -> *mut f32,
) {
    for (t, acc) in acc.into_iter().enumerate().take(num_tokens) {
        // SAFETY: the caller's.
        unsafe { store_at(acc, out(t), row, num_out) };
    }
}

/// Writes lane i to `out[row + i]` where that is in `0..n`.
///
/// # Safety
/// `V`'s instruction set is present and `out` has room for n floats.
#[inline(always)]
pub unsafe fn store_at<V: F32x16>(v: V, out: *mut f32, row: isize, n: usize) {
    // SAFETY: the caller's.
    unsafe {
        if row >= 0 && row as usize + LANES <= n {
            return v.store(out.add(row as usize));
        }
        let mut lanes = [0f32; LANES];
        v.store(lanes.as_mut_ptr());
        let (skip, end) = ((-row).max(0), (n as isize - row).min(LANES as isize));
        for i in skip..end {
            *out.offset(row + i) = lanes[i as usize];
        }
    }
}

/// Tokens, laid out for products with several matrices. The memory goes back to its thread afterwards.
pub struct Panel(Vec<f32>);

thread_local! {
    static TOKENS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Panel {
    /// Lays out tokens `x(t)`, of k floats, over all threads if `shared`; nothing where there are too few to gain.
    ///
    /// # Safety
    /// Every token has its floats.
    pub unsafe fn new<X>(num_rows: usize, k: usize, x: X, shared: bool) -> Option<Self>
    where
        X: Fn(usize) -> *const f32 + Sync + Send,
    {
        if num_rows < MIN_TOKENS {
            return None;
        }
        let mut panel = TOKENS.take();
        let (full, rest) = dispatch(TileTokens);
        // The tiles that take the rest may have tokens too many.
        grow(&mut panel, (num_rows + rest) * k.next_multiple_of(LANES));
        let to = Shared::new(&mut panel);
        let (whole, x) = (num_rows / full, &x);
        let tile = |i: usize| {
            let (t, width) =
                if i < whole { (i * full, full) } else { (whole * full + (i - whole) * rest, rest) };
            dispatch(PackTile { t, width, num_rows, k, x, to });
        };
        let tiles = whole + (num_rows % full).div_ceil(rest);
        if shared {
            parallel::for_each(tiles, full * k, tile);
        } else {
            (0..tiles).for_each(tile);
        }
        Some(Self(panel))
    }

    /// The panel, as [`product`] wants it.
    pub fn as_ptr(&self) -> *const f32 {
        self.0.as_ptr()
    }
}

impl Drop for Panel {
    fn drop(&mut self) {
        TOKENS.set(std::mem::take(&mut self.0));
    }
}

/// Tokens of a whole tile and of those that take the rest.
struct TileTokens;

impl Kernel for TileTokens {
    type Out = (usize, usize);
    #[inline(always)]
    unsafe fn run<V: F32x16>(self) -> (usize, usize) {
        V::TILE
    }
}

/// Lays out a tile of `width` tokens from token `t` on, in the panel at `to`.
struct PackTile<'a, X> {
    t: usize,
    width: usize,
    num_rows: usize,
    k: usize,
    x: &'a X,
    to: Shared<f32>,
}

impl<X: Fn(usize) -> *const f32> Kernel for PackTile<'_, X> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<V: F32x16>(self) {
        let Self { t, width, num_rows, k, x, to } = self;
        let vectors = k.div_ceil(LANES);
        // SAFETY: `Panel::new` sized the panel; the tokens are its caller's.
        unsafe {
            let to = to.get().add(t * vectors * LANES);
            for j in 0..vectors {
                let mut v = [V::splat(0.0); LANES];
                for (i, v) in v.iter_mut().enumerate().take(width.min(num_rows - t)) {
                    *v = f32::load_some::<V>(x(t + i).add(j * LANES), k - j * LANES);
                }
                for (l, v) in V::transpose(v).into_iter().enumerate() {
                    v.store_part(to.add((l * vectors + j) * width), width);
                }
            }
        }
    }
}

fn grow(buffer: &mut Vec<f32>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
}
