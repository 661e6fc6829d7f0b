//! Small f32 products inside a kernel: the chunks of the delta rule and the pages of attention.
//!
//! Each output element is computed in one fixed order over k, whatever the tile: a row's result does not
//! depend on how many rows are computed with it.

use super::simd::{F32x16, LANES};
use super::tile::{store_sums, tile};

/// `c[i, j] = a[i] · b[j]` for the rows i from `first(j)` on, and some before: `a` `[m, k]`, `b` `[n, k]`, `c` `[m, n]`
/// with the row strides given.
///
/// # Safety
/// `V`'s instruction set is present and the matrices have the rows and strides named.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub unsafe fn matmul_nt<V: F32x16>(
    m: usize,
    n: usize,
    k: usize,
    first: impl Fn(usize) -> usize,
    a: *const f32,
    a_stride: usize,
    b: *const f32,
    b_stride: usize,
    c: *mut f32,
    c_stride: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut j = 0;
        while j + 4 <= n {
            let rows = [0, 1, 2, 3].map(|r| b.add((j + r) * b_stride));
            let mut i = first(j);
            while i + 4 <= m {
                let cols = [0, 1, 2, 3].map(|t| a.add((i + t) * a_stride));
                let acc = tile::<V, f32, 4, 4>(rows, cols, k);
                for t in 0..4 {
                    store_sums::<V, 4>(acc[t], c.add((i + t) * c_stride + j));
                }
                i += 4;
            }
            while i < m {
                let acc = tile::<V, f32, 4, 1>(rows, [a.add(i * a_stride)], k);
                store_sums::<V, 4>(acc[0], c.add(i * c_stride + j));
                i += 1;
            }
            j += 4;
        }
        while j < n {
            for i in first(j)..m {
                let acc = tile::<V, f32, 1, 1>([b.add(j * b_stride)], [a.add(i * a_stride)], k);
                store_sums::<V, 1>(acc[0], c.add(i * c_stride + j));
            }
            j += 1;
        }
    }
}

/// `c[i] = c[i] * scale(i) + sum_{j < k(i)} a[i, j] b[j]`: `a` `[m, k]`, `b` `[k, n]`, `c` `[m, n]`, with the
/// row strides given. Terms are added in the order of j.
///
/// # Safety
/// As [`matmul_nt`].
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub unsafe fn matmul_nn<V: F32x16>(
    m: usize,
    n: usize,
    k: impl Fn(usize) -> usize,
    scale: impl Fn(usize) -> f32,
    a: *const f32,
    a_stride: usize,
    b: *const f32,
    b_stride: usize,
    c: *mut f32,
    c_stride: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut j = 0;
        while j + 4 * LANES <= n {
            let mut i = 0;
            while i + 4 <= m {
                nn_tile::<V, 4, 4>(i, &k, &scale, a, a_stride, b.add(j), b_stride, c.add(j), c_stride);
                i += 4;
            }
            while i < m {
                nn_tile::<V, 1, 4>(i, &k, &scale, a, a_stride, b.add(j), b_stride, c.add(j), c_stride);
                i += 1;
            }
            j += 4 * LANES;
        }
        while j + LANES <= n {
            for i in 0..m {
                nn_tile::<V, 1, 1>(i, &k, &scale, a, a_stride, b.add(j), b_stride, c.add(j), c_stride);
            }
            j += LANES;
        }
        if j < n {
            for i in 0..m {
                let p = c.add(i * c_stride + j);
                let mut acc = V::load_part(p, n - j).mul(V::splat(scale(i)));
                for l in 0..k(i) {
                    let row = V::load_part(b.add(l * b_stride + j), n - j);
                    acc = V::splat(*a.add(i * a_stride + l)).fma(row, acc);
                }
                acc.store_part(p, n - j);
            }
        }
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn nn_tile<V: F32x16, const R: usize, const N: usize>(
    i: usize,
    k: &impl Fn(usize) -> usize,
    scale: &impl Fn(usize) -> f32,
    a: *const f32,
    a_stride: usize,
    b: *const f32,
    b_stride: usize,
    c: *mut f32,
    c_stride: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut acc = [[V::splat(0.0); N]; R];
        for r in 0..R {
            let s = V::splat(scale(i + r));
            for v in 0..N {
                acc[r][v] = V::load(c.add((i + r) * c_stride + v * LANES)).mul(s);
            }
        }
        // `k` does not fall from row to row: the first row has the fewest terms.
        let (short, long) = (k(i), k(i + R - 1));
        for l in 0..short {
            let mut row = [V::splat(0.0); N];
            for v in 0..N {
                row[v] = V::load(b.add(l * b_stride + v * LANES));
            }
            for r in 0..R {
                let x = V::splat(*a.add((i + r) * a_stride + l));
                for v in 0..N {
                    acc[r][v] = x.fma(row[v], acc[r][v]);
                }
            }
        }
        for l in short..long {
            for r in 0..R {
                if l < k(i + r) {
                    let x = V::splat(*a.add((i + r) * a_stride + l));
                    for v in 0..N {
                        acc[r][v] = x.fma(V::load(b.add(l * b_stride + v * LANES)), acc[r][v]);
                    }
                }
            }
        }
        for r in 0..R {
            for v in 0..N {
                acc[r][v].store(c.add((i + r) * c_stride + v * LANES));
            }
        }
    }
}
