//! The register tile of every matrix product: what a weight element is, sums of sixteen lanes, and their fold.
//!
//! An output is always sixteen partial sums over k (lane i takes k = i, i + 16, ...) and the fold of
//! `F32x16::sum4`, whatever tile it is in.

use super::simd::{F32x16, LANES};

/// The dot product of two f32 vectors, by the same partial sums as a product's.
#[inline(always)]
pub unsafe fn dot<V: F32x16>(a: *const f32, b: *const f32, n: usize) -> f32 {
    // SAFETY: the caller's; both have n elements.
    unsafe { tile::<V, f32, 1, 1>([a], [b], n)[0][0].sum() }
}

/// How a weight element is loaded and widened.
pub trait Element: Copy {
    /// Sixteen of them. # Safety: valid for sixteen elements, any alignment.
    unsafe fn load<V: F32x16>(p: *const Self) -> V;
    /// One of them. # Safety: valid for one element, any alignment.
    unsafe fn widen(p: *const Self) -> f32;
    /// `n < 16` of them, the other lanes zero. # Safety: valid for n elements.
    #[inline(always)]
    unsafe fn load_part<V: F32x16>(p: *const Self, n: usize) -> V {
        let mut lanes = [0f32; LANES];
        // SAFETY: the caller's.
        unsafe {
            for (i, lane) in lanes.iter_mut().enumerate().take(n) {
                *lane = Self::widen(p.add(i));
            }
            V::load(lanes.as_ptr())
        }
    }
    /// Sixteen of them, or as many as there are. # Safety: valid for min(n, 16) elements, n > 0.
    #[inline(always)]
    unsafe fn load_some<V: F32x16>(p: *const Self, n: usize) -> V {
        // SAFETY: the caller's.
        unsafe { if n >= LANES { Self::load::<V>(p) } else { Self::load_part::<V>(p, n) } }
    }
}

/// bfloat16 bits.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Bf16(u16);

/// IEEE half bits.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct F16(u16);

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<V: F32x16>(p: *const Self) -> V {
        // SAFETY: the caller's.
        unsafe { V::load(p) }
    }
    #[inline(always)]
    unsafe fn widen(p: *const Self) -> f32 {
        // SAFETY: the caller's.
        unsafe { p.read_unaligned() }
    }
}

impl Element for Bf16 {
    #[inline(always)]
    unsafe fn load<V: F32x16>(p: *const Self) -> V {
        // SAFETY: the caller's.
        unsafe { V::load_bf16(p.cast()) }
    }
    #[inline(always)]
    unsafe fn widen(p: *const Self) -> f32 {
        // SAFETY: the caller's.
        f32::from_bits(u32::from(unsafe { p.read_unaligned() }.0) << 16)
    }
}

impl Element for F16 {
    #[inline(always)]
    unsafe fn load<V: F32x16>(p: *const Self) -> V {
        // SAFETY: the caller's.
        unsafe { V::load_f16(p.cast()) }
    }
    #[inline(always)]
    unsafe fn widen(p: *const Self) -> f32 {
        // SAFETY: the caller's.
        half::f16::from_bits(unsafe { p.read_unaligned() }.0).to_f32()
    }
}

/// `R` weight rows times `T` token rows: one vector of partial sums each.
#[inline(always)]
pub unsafe fn tile<V: F32x16, E: Element, const R: usize, const T: usize>(
    w: [*const E; R],
    x: [*const f32; T],
    k: usize,
) -> [[V; R]; T] {
    // SAFETY: the caller's.
    unsafe { tile_onto([[V::splat(0.0); R]; T], w, x, k) }
}

/// [`tile`] on top of the partial sums of the k before.
#[inline(always)]
pub unsafe fn tile_onto<V: F32x16, E: Element, const R: usize, const T: usize>(
    mut acc: [[V; R]; T],
    w: [*const E; R],
    x: [*const f32; T],
    k: usize,
) -> [[V; R]; T] {
    // SAFETY: every row has k elements.
    unsafe {
        let mut i = 0;
        while i + LANES <= k {
            let mut wv = [V::splat(0.0); R];
            for r in 0..R {
                wv[r] = E::load::<V>(w[r].add(i));
            }
            for t in 0..T {
                let xv = V::load(x[t].add(i));
                for r in 0..R {
                    acc[t][r] = wv[r].fma(xv, acc[t][r]);
                }
            }
            i += LANES;
        }
        if i < k {
            for t in 0..T {
                let xv = V::load_part(x[t].add(i), k - i);
                for r in 0..R {
                    acc[t][r] = E::load_part::<V>(w[r].add(i), k - i).fma(xv, acc[t][r]);
                }
            }
        }
        acc
    }
}

/// Folds the partial sums of `R` neighbouring outputs and writes them.
#[inline(always)]
pub unsafe fn store_sums<V: F32x16, const R: usize>(acc: [V; R], out: *mut f32) {
    // SAFETY: `out` has room for R floats.
    unsafe {
        let mut r = 0;
        while r + 4 <= R {
            let sums = V::sum4([acc[r], acc[r + 1], acc[r + 2], acc[r + 3]]);
            out.add(r).cast::<[f32; 4]>().write_unaligned(sums);
            r += 4;
        }
        while r < R {
            *out.add(r) = acc[r].sum();
            r += 1;
        }
    }
}

/// [`store_sums`] of the first `n` of `R`.
#[inline(always)]
pub unsafe fn store_some<V: F32x16, const R: usize>(acc: [V; R], out: *mut f32, n: usize) {
    // SAFETY: `out` has room for n floats.
    unsafe {
        if n >= R {
            return store_sums::<V, R>(acc, out);
        }
        let mut all = [0f32; R];
        store_sums::<V, R>(acc, all.as_mut_ptr());
        std::ptr::copy_nonoverlapping(all.as_ptr(), out, n);
    }
}
