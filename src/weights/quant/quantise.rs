//! Quantising: bf16 numbers to 4-bit integers or 8-bit floats with scales. The same operations in the same order as
//! `q35_quantise_int4` and `q35_quantise_fp8` of `cuda/launch.h`, so that a device and this file give the same bits.

use half::bf16;

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

/// Of the bf16 scales `max |w| (1 - i / 32) / 7`, i from 0 to 7, the first with the least squared error.
fn int4_scale(w: &[f32]) -> f32 {
    let most = w.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
    // A square of 20 bits is exact in f32 unless it is tiny: only then must product and sum be one operation.
    let tiny = w.iter().any(|x| *x != 0.0 && x.abs() < 2f32.powi(-40));
    let mut best = (0.0, f32::INFINITY);
    for i in 0..CANDIDATES {
        let scale = bf16::from_f32(most * (1.0 - f32::from(i) / 32.0) / 7.0).to_f32();
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
fn to_int4(x: f32, scale: f32) -> f32 {
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
