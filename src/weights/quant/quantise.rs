//! Quantising: bf16 numbers to 4-bit integers or 8-bit floats with scales. The same operations in the same order as
//! `q35_quantise_int4` and `q35_quantise_fp8` of `cuda/launch.h`, so that a device and this file give the same bits.

use half::bf16;

use super::decode_e4m3;

/// Rows and columns of a block of 8-bit floats that share a scale.
pub const BLOCK: usize = 128;
/// Scales that are tried for a group of 4-bit integers.
const CANDIDATES: u8 = 8;
/// Partial sums of a group's squared errors: element i belongs to sum i % 32.
const LANES: usize = 32;
/// The largest number of e4m3.
const E4M3_MAX: f32 = 448.0;

/// Quantises rows of length `k` to codes 0 to 15 around 8 (`codes`, as many as there are weights) and a bf16 scale for
/// each `group` of a row (`scales`, widened). `w` are bf16 numbers, finite.
pub fn quantise_int4(w: &[f32], k: usize, group: usize, codes: &mut [u8], scales: &mut [f32]) {
    let groups = k.div_ceil(group.max(1)).max(1);
    let rows = w.chunks(k.max(1)).zip(codes.chunks_mut(k.max(1)));
    for ((w, codes), scales) in rows.zip(scales.chunks_mut(groups)) {
        let parts = w.chunks(group.max(1)).zip(codes.chunks_mut(group.max(1)));
        for ((w, codes), scale) in parts.zip(scales) {
            *scale = int4_scale(w);
            for (code, &x) in codes.iter_mut().zip(w) {
                *code = (to_int4(x, *scale) + 8.0) as u8;
            }
        }
    }
}

/// The numbers of codes that [`quantise_int4`] gave.
pub fn dequantise_int4(codes: &[u8], k: usize, group: usize, scales: &[f32], out: &mut [f32]) {
    let groups = k.div_ceil(group.max(1)).max(1);
    let rows = codes.chunks(k.max(1)).zip(out.chunks_mut(k.max(1)));
    for ((codes, out), scales) in rows.zip(scales.chunks(groups)) {
        let parts = codes.chunks(group.max(1)).zip(out.chunks_mut(group.max(1)));
        for ((codes, out), scale) in parts.zip(scales) {
            out.iter_mut().zip(codes).for_each(|(x, &code)| *x = (f32::from(code) - 8.0) * scale);
        }
    }
}

/// The scales that are tried for a group whose largest number is `most`.
pub fn int4_scales(most: f32) -> impl Iterator<Item = f32> {
    (0..CANDIDATES).map(move |i| bf16::from_f32(most * (1.0 - f32::from(i) / 32.0) / 7.0).to_f32())
}

/// Of the bf16 scales `max |w| (1 - i / 32) / 7`, i from 0 to 7, the first with the least squared error.
fn int4_scale(w: &[f32]) -> f32 {
    let most = w.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
    // A square of 20 bits is exact in f32 unless it is tiny: only then must product and sum be one operation.
    let tiny = w.iter().any(|x| *x != 0.0 && x.abs() < 2f32.powi(-40));
    let mut best = (0.0, f32::INFINITY);
    for (i, scale) in int4_scales(most).enumerate() {
        let error = if tiny {
            error(w, scale, |x, sum| x.mul_add(x, sum))
        } else {
            error(w, scale, |x, sum| x * x + sum)
        };
        if i == 0 || error < best.1 {
            best = (scale, error);
        }
    }
    best.0
}

/// The squared error of a scale, summed as a warp does it: by lanes, which are then added by halves.
#[inline(always)]
fn error(w: &[f32], scale: f32, add_square: impl Fn(f32, f32) -> f32) -> f32 {
    let mut sums = [0.0; LANES];
    for w in w.chunks(LANES) {
        for (sum, &x) in sums.iter_mut().zip(w) {
            // The product is exact: 4 bits by 8.
            *sum = add_square(x - to_int4(x, scale) * scale, *sum);
        }
    }
    let mut half = LANES / 2;
    while half > 0 {
        let old = sums;
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum += old[lane ^ half];
        }
        half /= 2;
    }
    sums[0]
}

/// From -8 to 7, to nearest even; 0 where the scale is.
#[inline(always)]
pub fn to_int4(x: f32, scale: f32) -> f32 {
    // Adding 1.5 * 2^23 leaves no bits for a fraction. `round_ties_even` is a call on older processors.
    const ROUND: f32 = 12_582_912.0;
    let steps = if scale > 0.0 { x / scale } else { 0.0 };
    (steps.clamp(-8.0, 7.0) + ROUND) - ROUND
}

/// Quantises the rows of one row of blocks (`BLOCK` rows of length `k`, or fewer) to e4m3, with a scale for each `BLOCK`
/// columns: `max |w| / 448`. `w` are bf16 numbers, finite.
pub fn quantise_fp8(w: &[f32], k: usize, codes: &mut [u8], scales: &mut [f32]) {
    scales.fill(0.0);
    for w in w.chunks(k.max(1)) {
        for (w, scale) in w.chunks(BLOCK).zip(scales.iter_mut()) {
            *scale = w.iter().fold(*scale, |most, x| most.max(x.abs()));
        }
    }
    scales.iter_mut().for_each(|scale| *scale /= E4M3_MAX);
    for (w, codes) in w.chunks(k.max(1)).zip(codes.chunks_mut(k.max(1))) {
        for ((w, codes), &scale) in w.chunks(BLOCK).zip(codes.chunks_mut(BLOCK)).zip(scales.iter()) {
            for (code, &x) in codes.iter_mut().zip(w) {
                *code = if scale > 0.0 { encode_e4m3(x / scale) } else { 0 };
            }
        }
    }
}

/// The numbers of codes that [`quantise_fp8`] gave.
pub fn dequantise_fp8(codes: &[u8], k: usize, scales: &[f32], out: &mut [f32]) {
    for (codes, out) in codes.chunks(k.max(1)).zip(out.chunks_mut(k.max(1))) {
        for ((codes, out), scale) in codes.chunks(BLOCK).zip(out.chunks_mut(BLOCK)).zip(scales) {
            out.iter_mut().zip(codes).for_each(|(x, &code)| *x = decode_e4m3(code) * scale);
        }
    }
}

/// The e4m3 code of a number, to nearest even; what is larger than the largest becomes it.
pub fn encode_e4m3(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    let size = x.abs().min(E4M3_MAX);
    // Below 2^-6 codes count in steps of 2^-9.
    if size < 2f32.powi(-6) {
        return sign | (size * 512.0).round_ties_even() as u8;
    }
    let bits = size.to_bits();
    sign | ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20).wrapping_sub(120 << 3) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::mix;

    /// bf16 numbers, some of them far larger than the others.
    fn numbers(len: usize, seed: u64, size: f32) -> Vec<f32> {
        let draw = |i: u64| {
            let bits = mix(mix(seed).wrapping_add(i));
            let x = (bits >> 40) as f32 / 8_388_608.0 - 1.0;
            let x = if bits.is_multiple_of(61) { 5.0 * x } else { x };
            bf16::from_f32(x * size).to_f32()
        };
        (0..len as u64).map(draw).collect()
    }

    /// The kernel's own words, one thread after the other.
    fn kernel(w: &[f32]) -> (f32, Vec<i32>) {
        let code = |x: f32, scale: f32| match scale > 0.0 {
            true => (x / scale).round_ties_even().clamp(-8.0, 7.0),
            false => 0.0,
        };
        let most = w.iter().fold(0.0, |m: f32, x| m.max(x.abs()));
        let mut best: Option<(f32, f32)> = None;
        for c in 0..8 {
            let scale = bf16::from_f32(most * (1.0 - c as f32 / 32.0) / 7.0).to_f32();
            let mut lanes = [0f32; 32];
            for (i, &x) in w.iter().enumerate() {
                let off = (-code(x, scale)).mul_add(scale, x);
                lanes[i % 32] = off.mul_add(off, lanes[i % 32]);
            }
            for step in [16, 8, 4, 2, 1] {
                lanes = std::array::from_fn(|lane| lanes[lane] + lanes[lane ^ step]);
            }
            assert!(lanes.iter().all(|x| x.to_bits() == lanes[0].to_bits()));
            if best.is_none_or(|(_, least)| lanes[0] < least) {
                best = Some((scale, lanes[0]));
            }
        }
        let (scale, _) = best.unwrap();
        (scale, w.iter().map(|&x| code(x, scale) as i32).collect())
    }

    #[test]
    fn int4_is_what_the_kernel_does() {
        let mut chosen = std::collections::BTreeSet::new();
        for seed in 0..600 {
            let group = [32, 64, 128][seed % 3];
            let k = [32, 128, 130, 256, 7][seed / 3 % 5];
            // Down to where squares are subnormal, and below it.
            let size = [1.0, 0.03, 300.0, 1e-12, 1e-19, 1e-21, 1e-36, 1e-39][seed / 15 % 8];
            let mut w = numbers(2 * k, seed as u64, size);
            if seed % 10 == 0 {
                w.iter_mut().skip(1).step_by(2).for_each(|x| *x *= 2f32.powi(-60));
            }
            let groups = k.div_ceil(group);
            let (mut codes, mut scales) = (vec![99; 2 * k], vec![f32::NAN; 2 * groups]);
            quantise_int4(&w, k, group, &mut codes, &mut scales);
            for (r, (w, codes)) in w.chunks(k).zip(codes.chunks(k)).enumerate() {
                for (g, (w, codes)) in w.chunks(group).zip(codes.chunks(group)).enumerate() {
                    let (scale, want) = kernel(w);
                    assert_eq!(scales[r * groups + g].to_bits(), scale.to_bits(), "seed {seed}");
                    assert_eq!(codes.iter().map(|&c| i32::from(c) - 8).collect::<Vec<_>>(), want);
                    let most = w.iter().fold(0.0, |m: f32, x| m.max(x.abs()));
                    chosen.insert((64.0 * scale * 7.0 / most) as i32);
                }
            }
        }
        assert!(chosen.len() > 4, "more than one candidate is ever taken: {chosen:?}");
    }

    #[test]
    fn int4_has_the_least_error_and_the_nearest_codes() {
        for seed in 1000..1100 {
            let w = numbers(128, seed, 0.05);
            let (mut codes, mut scales) = (vec![0; 128], vec![0.0]);
            quantise_int4(&w, 128, 128, &mut codes, &mut scales);
            let error = |scale: f64| -> f64 {
                let off = |&x: &f32| {
                    let x = f64::from(x);
                    (-8..8).map(|q| (x - f64::from(q) * scale).powi(2)).fold(f64::INFINITY, f64::min)
                };
                w.iter().map(off).sum()
            };
            let mut back = vec![0.0; 128];
            dequantise_int4(&codes, 128, 128, &scales, &mut back);
            let own: f64 = w.iter().zip(&back).map(|(&x, &y)| (f64::from(x) - f64::from(y)).powi(2)).sum();
            assert!((own / error(f64::from(scales[0])) - 1.0).abs() < 1e-12);
            let most = w.iter().fold(0.0, |m: f32, x| m.max(x.abs()));
            for i in 0..8 {
                let scale = bf16::from_f32(most * (1.0 - i as f32 / 32.0) / 7.0).to_f32();
                assert!(own <= error(f64::from(scale)) * (1.0 + 1e-5), "seed {seed}, candidate {i}");
            }
        }
    }

    #[test]
    fn zeros_stay_zero() {
        let (mut codes, mut scales, mut back) = (vec![0; 40], vec![f32::NAN; 2], vec![f32::NAN; 40]);
        quantise_int4(&[0.0; 40], 40, 32, &mut codes, &mut scales);
        dequantise_int4(&codes, 40, 32, &scales, &mut back);
        assert_eq!((codes, scales, back), (vec![8; 40], vec![0.0; 2], vec![0.0; 40]));
        let (mut codes, mut scales, mut back) = (vec![9; 40], vec![f32::NAN; 1], vec![f32::NAN; 40]);
        quantise_fp8(&[0.0; 40], 20, &mut codes, &mut scales);
        dequantise_fp8(&codes, 20, &scales, &mut back);
        assert_eq!((codes, scales, back), (vec![0; 40], vec![0.0], vec![0.0; 40]));
    }

    /// Every bf16 number, against a search among all codes: the nearest, of two the even one.
    #[test]
    fn e4m3_is_the_nearest() {
        let numbers: Vec<(f64, u8)> = (0..127).map(|code| (f64::from(decode_e4m3(code)), code)).collect();
        assert!(numbers.windows(2).all(|pair| pair[0].0 < pair[1].0));
        for bits in 0..=u16::MAX {
            let x = bf16::from_bits(bits).to_f32();
            if !x.is_finite() {
                continue;
            }
            let size = f64::from(x).abs().min(448.0);
            let above = numbers.partition_point(|&(y, _)| y < size);
            let (high, low) = (numbers[above], numbers[above.saturating_sub(1)]);
            let want = match (high.0 - size).total_cmp(&(size - low.0)) {
                std::cmp::Ordering::Less => high.1,
                std::cmp::Ordering::Greater => low.1,
                std::cmp::Ordering::Equal if high.1 % 2 == 0 => high.1,
                std::cmp::Ordering::Equal => low.1,
            };
            let sign = if x.is_sign_negative() { 0x80 } else { 0 };
            assert_eq!(encode_e4m3(x), want | sign, "{x:e}");
        }
    }

    #[test]
    fn fp8_blocks_have_scales_of_their_own() {
        for k in [300, 128, 1] {
            let rows = 70;
            let mut w = numbers(rows * k, k as u64, 0.1);
            w[5 * k + k - 1] = 4.0;
            let blocks = k.div_ceil(BLOCK);
            let (mut codes, mut scales) = (vec![0; w.len()], vec![0.0; blocks]);
            quantise_fp8(&w, k, &mut codes, &mut scales);
            let of_block = |b: usize| (0..rows * k).filter(move |i| i % k / BLOCK == b);
            for (b, &scale) in scales.iter().enumerate() {
                let most = of_block(b).fold(0.0, |most: f32, i| most.max(w[i].abs()));
                assert_eq!(scale, most / 448.0);
            }
            assert_eq!(scales[blocks - 1], 4.0 / 448.0);
            let mut back = vec![f32::NAN; w.len()];
            dequantise_fp8(&codes, k, &scales, &mut back);
            for (i, (&x, &y)) in w.iter().zip(&back).enumerate() {
                // Half a step of three bits, or of the smallest numbers.
                let bound = f64::max(f64::from(x.abs()) / 16.0, f64::from(scales[i % k / BLOCK]) / 1024.0);
                assert!((f64::from(x) - f64::from(y)).abs() <= 1.000001 * bound, "{x} {y}");
            }
        }
    }
}
