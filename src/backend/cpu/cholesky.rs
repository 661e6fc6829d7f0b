//! The triangular factor of the inverse of a symmetric matrix, f64: what error feedback needs of a Hessian.
//!
//! Column by column in strips of sixteen, so that four rows times a strip are one register tile; threads share rows of
//! the factor, and columns of its inverse. Every element is one sum in one order, on any number of threads.

use rayon::prelude::*;

use super::kernel::kernel;

/// Columns of a strip.
const W: usize = 16;
/// Rows of a tile.
const R: usize = 4;

/// For a symmetric positive definite `h` `[n, n]`, of which `element(i, j)` is read for i >= j: the upper triangular U
/// with `UᵀU = h⁻¹`, transposed, `[n, n]`, with zeros above the diagonal. `None` where a pivot is not positive and
/// finite: `h` is not positive definite, or too nearly not.
pub fn inverse_factor(n: usize, element: impl Fn(usize, usize) -> f64 + Sync) -> Option<Vec<f32>> {
    // Cholesky's factor with rows and columns in the opposite order: its inverse, turned back, is U, and no product
    // of factors is needed.
    let mut l = vec![0.0; n * n];
    l.par_chunks_mut(n.max(1)).enumerate().for_each(|(i, row)| {
        for (j, x) in row[..=i].iter_mut().enumerate() {
            *x = element(n - 1 - j, n - 1 - i);
        }
    });
    factor(&mut l, n)?;
    let mut u = vec![0.0; n * n];
    u.par_chunks_mut((W * n).max(1)).enumerate().for_each(|(chunk, rows)| {
        let width = rows.len() / n;
        let first = n - chunk * W - width;
        let strip = inverse_strip(&l, n, first, width);
        for (q, row) in rows.chunks_mut(n).enumerate() {
            for (x, p) in strip.iter().zip((0..n - first).rev()) {
                row[p] = x[width - 1 - q] as f32;
            }
        }
    });
    u.iter().all(|x| x.is_finite()).then_some(u)
}

/// The lower triangle of `a` `[n, n]` to that of L with `L Lᵀ = a`; `None` where a pivot is not positive and finite.
fn factor(a: &mut [f64], n: usize) -> Option<()> {
    for first in (0..n).step_by(W) {
        let width = W.min(n - first);
        let (done, rest) = a[first * n..].split_at_mut(width * n);
        let mut strip = vec![[0.0; W]; first];
        for (l, row) in done.chunks(n).enumerate() {
            strip.iter_mut().zip(row).for_each(|(s, &x)| s[l] = x);
        }
        let mut diagonal = [[0.0; W]; W];
        for (rows, diagonal) in done.chunks_mut(R * n).zip(diagonal.chunks_mut(R)) {
            less(rows, n, &strip, first, width, diagonal);
        }
        for l in 0..width {
            for m in 0..=l {
                let sum: f64 = (0..m).map(|i| diagonal[l][i] * diagonal[m][i]).sum();
                let x = diagonal[l][m] - sum;
                if l == m && !(x > 0.0 && x.is_finite()) {
                    return None;
                }
                diagonal[l][m] = if l == m { x.sqrt() } else { x / diagonal[m][m] };
            }
            done[l * n + first..][..=l].copy_from_slice(&diagonal[l][..=l]);
        }
        rest.par_chunks_mut(R * n).for_each(|rows| {
            let mut tile = [[0.0; W]; R];
            less(rows, n, &strip, first, width, &mut tile);
            for (row, x) in rows.chunks_mut(n).zip(&mut tile) {
                for l in 0..width {
                    let sum: f64 = (0..l).map(|m| x[m] * diagonal[l][m]).sum();
                    x[l] = (x[l] - sum) / diagonal[l][l];
                }
                row[first..first + width].copy_from_slice(&x[..width]);
            }
        });
    }
    Some(())
}

/// Columns `first..first + width` of up to R rows, less the products of what is before them with the strip, to `tile`.
fn less(rows: &[f64], n: usize, strip: &[[f64; W]], first: usize, width: usize, tile: &mut [[f64; W]]) {
    let mut sums = [[0.0; W]; R];
    let rows: Vec<&[f64]> = rows.chunks(n).collect();
    for (row, sum) in rows.iter().zip(&mut sums) {
        sum[..width].copy_from_slice(&row[first..first + width]);
    }
    // Rows that are not there are the first again.
    let all = std::array::from_fn(|r| &rows.get(r).unwrap_or(&rows[0])[..first]);
    subtract_products(all, strip, &mut sums);
    tile.iter_mut().zip(sums).take(rows.len()).for_each(|(x, sum)| *x = sum);
}

/// Columns `first..first + width` of the inverse of the lower triangular `l`, from row `first` on.
fn inverse_strip(l: &[f64], n: usize, first: usize, width: usize) -> Vec<[f64; W]> {
    let mut strip = Vec::with_capacity(n - first);
    for start in (first..n).step_by(R) {
        let rows = start..n.min(start + R);
        let row = |i: usize| &l[i * n..][..n];
        let mut sums = [[0.0; W]; R];
        for (i, sum) in rows.clone().zip(&mut sums) {
            if i - first < width {
                sum[i - first] = 1.0;
            }
        }
        let before = std::array::from_fn(|r| &row((start + r).min(n - 1))[first..start]);
        subtract_products(before, &strip, &mut sums);
        for (i, mut sum) in rows.zip(sums) {
            for j in start..i {
                let done: &[f64; W] = &strip[j - first];
                sum.iter_mut().zip(done).for_each(|(x, y)| *x -= row(i)[j] * y);
            }
            sum.iter_mut().for_each(|x| *x /= row(i)[i]);
            strip.push(sum);
        }
    }
    strip
}

kernel! {
    /// `sums[r] -= sum_j rows[r][j] strip[j]`, j after j. Rows are as long as the strip.
    fn subtract_products<V>(rows: [&'a [f64]; R], strip: &'a [[f64; W]], sums: &'a mut [[f64; W]; R]) {
        let [a, b, c, d] = rows;
        let mut acc = *sums;
        for ((((s, a), b), c), d) in strip.iter().zip(a).zip(b).zip(c).zip(d) {
            for l in 0..W {
                acc[0][l] -= a * s[l];
                acc[1][l] -= b * s[l];
                acc[2][l] -= c * s[l];
                acc[3][l] -= d * s[l];
            }
        }
        *sums = acc;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::mix;

    fn symmetric(n: usize, seed: u64, damping: f64) -> Vec<f64> {
        let rows = n + 3;
        let x: Vec<f64> = (0..(rows * n) as u64)
            .map(|i| (mix(mix(seed).wrapping_add(i)) >> 40) as f64 / 8_388_608.0 - 1.0)
            .collect();
        let dot = |i: usize, j: usize| (0..rows).map(|t| x[t * n + i] * x[t * n + j]).sum::<f64>();
        (0..n * n).map(|at| dot(at / n, at % n) + if at / n == at % n { damping } else { 0.0 }).collect()
    }

    #[test]
    fn the_factor_times_itself_is_the_inverse() {
        for n in [1, 2, 3, 4, 15, 16, 17, 31, 50, 128, 131] {
            let h = symmetric(n, n as u64, 0.1 * n as f64);
            let ut = inverse_factor(n, |i, j| h[i * n + j]).unwrap();
            let u = |p: usize, q: usize| f64::from(ut[q * n + p]);
            for p in 0..n {
                assert!(u(p, p) > 0.0 && (0..p).all(|q| u(p, q) == 0.0));
            }
            // h UᵀU = 1.
            let inverse: Vec<f64> =
                (0..n * n).map(|at| (0..n).map(|p| u(p, at / n) * u(p, at % n)).sum()).collect();
            for i in 0..n {
                for j in 0..n {
                    let x: f64 = (0..n).map(|m| h[i * n + m] * inverse[m * n + j]).sum();
                    assert!((x - f64::from(u8::from(i == j))).abs() < 2e-5, "{n}: {i} {j} {x}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_positive_definite_has_none() {
        let n = 40;
        let mut h = symmetric(n, 7, 1.0);
        assert!(inverse_factor(n, |i, j| h[i * n + j]).is_some());
        h[33 * n + 33] = -1.0;
        assert!(inverse_factor(n, |i, j| h[i * n + j]).is_none());
        h[33 * n + 33] = f64::NAN;
        assert!(inverse_factor(n, |i, j| h[i * n + j]).is_none());
        assert!(inverse_factor(n, |_, _| 0.0).is_none());
        assert!(inverse_factor(n, |_, _| f64::INFINITY).is_none());
        assert_eq!(inverse_factor(0, |_, _| 0.0), Some(Vec::new()));
    }

    #[test]
    fn threads_change_no_bit() {
        let n = 200;
        let h = symmetric(n, 3, 5.0);
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| inverse_factor(n, |i, j| h[i * n + j]).unwrap())
        };
        assert_eq!(on(1), on(3));
    }
}
