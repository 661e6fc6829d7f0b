//! Exponentials over a row of logits.

use super::kernel::kernel;
use super::simd::LANES;

/// `out = exp((row - max) * inverse_temperature)`; NaN becomes 0.
pub fn exp_weights(row: &[f32], max: f32, inverse_temperature: f32, out: &mut Vec<f32>) {
    out.resize(row.len(), 0.0);
    exp_scaled(row, max, inverse_temperature, out);
}

/// `ln(sum(exp(row)))`, the sum in f64.
pub fn log_sum_exp(row: &[f32]) -> f32 {
    let max = row.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
    let mut weights = Vec::new();
    exp_weights(row, max, 1.0, &mut weights);
    max + weights.iter().map(|&w| f64::from(w)).sum::<f64>().ln() as f32
}

kernel! {
    fn exp_scaled<V>(row: &'a [f32], max: f32, scale: f32, out: &'a mut [f32]) {
        let n = row.len();
        assert!(out.len() == n);
        let mut i = 0;
        while i < n {
            let w = (n - i).min(LANES);
            let x = if w == LANES { V::load(row.as_ptr().add(i)) } else { V::load_part(row.as_ptr().add(i), w) };
            let y = x.sub(V::splat(max)).mul(V::splat(scale)).exp().max(V::splat(0.0));
            let p = out.as_mut_ptr().add(i);
            if w == LANES { y.store(p) } else { y.store_part(p, w) }
            i += w;
        }
    }
}
