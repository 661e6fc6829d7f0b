//! Products with many tokens: both sides are laid out so that a register tile reads two plain streams.
//!
//! ```text
//! x panel:  tiles of T tokens, each [k / 16][T][16]       once per product, zeros past the last token and past k
//! w panel:  tiles of R weight rows, each [k / 16][R][16]  widened to f32, as many rows as half the L2 holds
//! ```
//!
//! Rows a power of two apart would all fall into the same few sets of the first-level cache; interleaved they do
//! not. A tile of tokens stays in that cache over a block of k while the weight panel streams past from the
//! second; partial sums wait in memory between blocks. The order of additions is that of `linear::tile`.

use std::cell::RefCell;

use super::simd::{F32x16, LANES};
use super::tile::{Element, store_some};

/// Tokens from which on laying out pays.
pub const MIN_TOKENS: usize = 8;

/// Vectors of k in a block.
const BLOCK: usize = 32;

/// f32 of a weight panel: 128 KiB.
const PANEL: usize = 1 << 15;

#[derive(Default)]
struct Scratch {
    x: Vec<f32>,
    w: Vec<f32>,
    sums: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// `out(t)[o] = x(t) · w[o]` for `num_out` rows of `k` elements at `w` and `num_rows` tokens.
///
/// # Safety
/// As `Linear::rows`.
#[inline(always)]
pub unsafe fn product<V: F32x16, E: Element, const R: usize, const T: usize>(
    w: *const E,
    num_out: usize,
    k: usize,
    num_rows: usize,
    x: Tokens<impl Fn(usize) -> *const f32>,
    out: impl Fn(usize) -> *mut f32,
) {
    // SAFETY: the caller's; buffers are sized before their pointers are taken.
    unsafe {
        let vectors = k.div_ceil(LANES);
        let panel = (PANEL / k.max(1)).next_multiple_of(R).clamp(R, 16 * R);
        // Taken out and put back, not borrowed in a closure: a closure would lose the instruction set.
        let mut scratch = SCRATCH.take();
        let x_tiles = num_rows.div_ceil(T);
        grow(&mut scratch.w, panel * vectors * LANES);
        grow(&mut scratch.sums, panel * T * LANES);
        let x_panel = match x {
            Tokens::Packed(panel) => panel,
            Tokens::Rows(x) => {
                grow(&mut scratch.x, x_tiles * T * vectors * LANES);
                pack::<V, T>(0..x_tiles, num_rows, k, x, scratch.x.as_mut_ptr());
                scratch.x.as_ptr()
            }
        };
        for first in (0..num_out).step_by(panel) {
            let rows = panel.min(num_out - first);
            let w_tiles = rows.div_ceil(R);
            for tile in 0..w_tiles {
                let to = scratch.w.as_mut_ptr().add(tile * R * vectors * LANES);
                let row = |i: usize| (tile * R + i < rows).then(|| w.add((first + tile * R + i) * k));
                interleave::<V, E, R>(row, k, to);
            }
            for x_tile in 0..x_tiles {
                let x_at = x_panel.add(x_tile * T * vectors * LANES);
                let sums = scratch.sums.as_mut_ptr();
                let mut start = 0;
                while start < vectors {
                    let end = (start + BLOCK).min(vectors);
                    for w_tile in 0..w_tiles {
                        let w_at = scratch.w.as_ptr().add(w_tile * R * vectors * LANES);
                        let sums = sums.add(w_tile * T * R * LANES);
                        let acc = block::<V, R, T>(w_at, x_at, start, end, sums);
                        if end < vectors {
                            spill::<V, R, T>(acc, sums);
                            continue;
                        }
                        let o = w_tile * R;
                        for (i, acc) in acc.into_iter().enumerate() {
                            let t = x_tile * T + i;
                            if t >= num_rows {
                                break;
                            }
                            store_some::<V, R>(acc, out(t).add(first + o), rows - o);
                        }
                    }
                    start = end;
                }
            }
        }
        SCRATCH.set(scratch);
    }
}

/// Where the tokens of a product are.
pub enum Tokens<X> {
    /// Row t at `x(t)`.
    Rows(X),
    /// A panel that [`pack`] wrote.
    Packed(*const f32),
}

/// f32 of the x panel of `num_rows` tokens, for tiles of `T`.
pub fn packed_len(num_rows: usize, k: usize, tokens: usize) -> usize {
    num_rows.next_multiple_of(tokens) * k.next_multiple_of(LANES)
}

/// Lays out tiles `tiles` of the x panel at `to`, the start of the whole panel.
///
/// # Safety
/// Token t has k floats at `x(t)`, and the panel has [`packed_len`] floats.
#[inline(always)]
pub unsafe fn pack<V: F32x16, const T: usize>(
    tiles: std::ops::Range<usize>,
    num_rows: usize,
    k: usize,
    x: impl Fn(usize) -> *const f32,
    to: *mut f32,
) {
    for tile in tiles {
        // SAFETY: the caller's.
        unsafe {
            let to = to.add(tile * T * k.next_multiple_of(LANES));
            interleave::<V, f32, T>(|i| (tile * T + i < num_rows).then(|| x(tile * T + i)), k, to);
        }
    }
}

fn grow(buffer: &mut Vec<f32>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
}

/// Vectors `[start, end)` of a tile's products, on top of `sums` unless `start` is 0.
#[inline(always)]
unsafe fn block<V: F32x16, const R: usize, const T: usize>(
    w: *const f32,
    x: *const f32,
    start: usize,
    end: usize,
    sums: *const f32,
) -> [[V; R]; T] {
    // SAFETY: the panels hold `end` vectors of R and T rows; `sums` holds R * T vectors.
    unsafe {
        let mut acc = [[V::splat(0.0); R]; T];
        if start > 0 {
            for t in 0..T {
                for r in 0..R {
                    acc[t][r] = V::load(sums.add((t * R + r) * LANES));
                }
            }
        }
        let (mut w, mut x) = (w.add(start * R * LANES), x.add(start * T * LANES));
        for _ in start..end {
            let mut wv = [V::splat(0.0); R];
            for r in 0..R {
                wv[r] = V::load(w.add(r * LANES));
            }
            for t in 0..T {
                let xv = V::load(x.add(t * LANES));
                for r in 0..R {
                    acc[t][r] = wv[r].fma(xv, acc[t][r]);
                }
            }
            (w, x) = (w.add(R * LANES), x.add(T * LANES));
        }
        acc
    }
}

#[inline(always)]
unsafe fn spill<V: F32x16, const R: usize, const T: usize>(acc: [[V; R]; T], sums: *mut f32) {
    for t in 0..T {
        for r in 0..R {
            // SAFETY: `sums` holds R * T vectors.
            unsafe { acc[t][r].store(sums.add((t * R + r) * LANES)) };
        }
    }
}

/// Writes rows `0..N` (zeros where there is none) as `[k / 16][N][16]`, zeros past k.
#[inline(always)]
unsafe fn interleave<V: F32x16, E: Element, const N: usize>(
    row: impl Fn(usize) -> Option<*const E>,
    k: usize,
    to: *mut f32,
) {
    // SAFETY: rows have k elements; `to` has room for k rounded up, N times.
    unsafe {
        for i in 0..N {
            let to = to.add(i * LANES);
            let Some(from) = row(i) else {
                for v in 0..k.div_ceil(LANES) {
                    V::splat(0.0).store(to.add(v * N * LANES));
                }
                continue;
            };
            let whole = k / LANES;
            for v in 0..whole {
                E::load::<V>(from.add(v * LANES)).store(to.add(v * N * LANES));
            }
            if !k.is_multiple_of(LANES) {
                let last = E::load_part::<V>(from.add(whole * LANES), k % LANES);
                last.store(to.add(whole * N * LANES));
            }
        }
    }
}
