//! The gates of the delta rule as its launcher takes them.

use half::bf16;

use crate::{Error, Result};

/// Rows [b | a] in bf16 with beta = sigmoid(b) and g = -softplus(a).
pub(super) fn gates(g: &[f32], beta: &[f32], num_heads: usize) -> Result<Vec<bf16>> {
    // At 80 a sigmoid is 0 or 1 in f32, and a softplus nothing beside 1; a decay of e^-10000 is 0.
    let bounded = |x: f64, most: f64| bf16::from_f64(x.clamp(-80.0, most));
    let mut rows = Vec::with_capacity(2 * g.len());
    for (g, beta) in g.chunks_exact(num_heads).zip(beta.chunks_exact(num_heads)) {
        for &beta in beta {
            if !(0.0..=1.0).contains(&beta) {
                return Err(Error::request("beta", beta, "0 to 1 on a GPU"));
            }
            let beta = f64::from(beta);
            rows.push(bounded((beta / (1.0 - beta)).ln(), 80.0));
        }
        for &g in g {
            if g.is_nan() || g > 0.0 {
                return Err(Error::request("g", g, "0 or less on a GPU"));
            }
            let decay = -f64::from(g);
            rows.push(bounded(if decay > 20.0 { decay } else { decay.exp_m1().ln() }, 1e4));
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the launcher makes of b and a.
    fn seen(rows: &[bf16]) -> (f64, f64) {
        let [b, a] = [rows[0], rows[1]].map(|x| x.to_f64());
        (1.0 / (1.0 + (-b).exp()), -if a > 20.0 { a } else { a.exp().ln_1p() })
    }

    #[test]
    fn gates_come_back() {
        for i in 0..=1000 {
            let beta = i as f32 / 1000.0;
            for g in [0.0, -1e-6, -0.001, -0.1, -0.7, -3.0, -19.0, -21.0, -90.0, -1e4, f32::NEG_INFINITY] {
                let (found_beta, found_g) = seen(&gates(&[g], &[beta], 1).unwrap());
                assert!((found_beta - f64::from(beta)).abs() < 1e-3, "{beta}: {found_beta}");
                assert!((found_g.exp() - f64::from(g).exp()).abs() < 1e-3, "{g}: {found_g}");
            }
        }
        // What is a bf16 before is the same bf16 after.
        for a in [-6.25f64, -1.0, 0.25, 0.5, 3.0, 18.0, 40.0] {
            let g = -if a > 20.0 { a } else { a.exp().ln_1p() } as f32;
            let beta = (1.0 / (1.0 + (-a / 8.0).exp())) as f32;
            let rows = gates(&[g], &[beta], 1).unwrap();
            assert_eq!([rows[0].to_f64(), rows[1].to_f64()], [a / 8.0, a]);
        }
    }

    #[test]
    fn gates_that_no_kernel_takes() {
        for (g, beta) in [(0.1, 0.5), (f32::NAN, 0.5), (-1.0, 1.1), (-1.0, -0.1), (-1.0, f32::NAN)] {
            assert!(gates(&[g], &[beta], 1).is_err());
        }
    }
}
