//! How what sequences leave behind is held: keys and values in pages, recurrent states in slots.

use half::f16;

use crate::{Error, Result};

/// How keys and values are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvCache {
    /// As the device computes them: f32 on the CPU, bf16 on a GPU.
    #[default]
    Auto,
    /// A row (a token of a key head) as e4m3 codes and an f32 scale: [`quantise_row`].
    Fp8,
}

/// How the recurrent states of the delta layers are held. Convolution tails are as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StateType {
    /// f32.
    #[default]
    F32,
    /// f16: computed in f32, and rounded ([`to_f16`]) after each chunk of the chunked form and each token of the
    /// recurrence, however a sequence was cut into steps. Outputs are those of the state before it is rounded.
    F16,
}

/// Both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Caches {
    /// Keys and values.
    pub kv: KvCache,
    /// Recurrent states.
    pub state: StateType,
}

impl Caches {
    /// Of their names: `auto` or `fp8`, `float32` or `float16`.
    ///
    /// # Errors
    /// `Request` with the names that there are.
    pub fn from_names(kv_cache_dtype: &str, state_dtype: &str) -> Result<Self> {
        let kv = match kv_cache_dtype {
            "auto" => KvCache::Auto,
            "fp8" => KvCache::Fp8,
            other => return Err(Error::request("kv_cache_dtype", other, "auto, fp8")),
        };
        let state = match state_dtype {
            "float32" => StateType::F32,
            "float16" => StateType::F16,
            other => return Err(Error::request("state_dtype", other, "float32, float16")),
        };
        Ok(Self { kv, state })
    }

    /// Their names: of keys and values, and of states.
    pub fn names(self) -> [&'static str; 2] {
        let kv = match self.kv {
            KvCache::Auto => "auto",
            KvCache::Fp8 => "fp8",
        };
        let state = match self.state {
            StateType::F32 => "float32",
            StateType::F16 => "float16",
        };
        [kv, state]
    }
}

/// The largest number of e4m3.
const E4M3_MAX: f32 = 448.0;

/// The e4m3 code of `x`: nearest, ties to even, the largest number for what is larger, NaN for NaN.
pub fn encode_e4m3(x: f32) -> u8 {
    let (sign, size) = ((x.to_bits() >> 24) as u8 & 0x80, x.abs());
    if size.is_nan() {
        return sign | 0x7f;
    }
    let size = size.min(E4M3_MAX);
    // Below the smallest exponent, 2^-6, codes count in steps of 2^-9. Adding 2^14, whose last bit that is, rounds.
    if size < 0.015_625 {
        return sign | ((size + 16384.0).to_bits() & 0xff) as u8;
    }
    // Above, rounding may carry into the exponent.
    let bits = size.to_bits();
    let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
    sign | ((rounded >> 20) - (120 << 3)) as u8
}

/// Codes and scale of a row: the scale is max |x| / 448, a code that of x / scale. A row of zeros, or of numbers that are
/// too small for a scale, has scale 0 and codes 0; one with an infinity or a NaN in it has scale NaN, and is NaN.
pub fn quantise_row(x: &[f32], codes: &mut [u8]) -> f32 {
    // Bits of numbers without sign are in the order of the numbers, NaN last.
    let largest = f32::from_bits(x.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0));
    let scale = if largest.is_finite() { largest / E4M3_MAX } else { f32::NAN };
    for (code, x) in codes.iter_mut().zip(x) {
        *code = if scale == 0.0 { 0 } else { encode_e4m3(x / scale) };
    }
    scale
}

/// The f16 that a state's element becomes: nearest, ties to even; what is larger than the largest becomes that, and not
/// infinity.
pub fn to_f16(x: f32) -> f16 {
    f16::from_f32(x.clamp(-65504.0, 65504.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::quant::decode_e4m3;

    /// By the definition: the nearest of all numbers, of two the one with an even code.
    fn nearest(x: f32) -> u8 {
        let x = f64::from(x).clamp(-448.0, 448.0);
        let codes = (0..=0x7eu8).chain(0x80..=0xfe).filter(|&c| (c >= 0x80) == x.is_sign_negative());
        codes
            .min_by(|&a, &b| {
                let far = |c: u8| (f64::from(decode_e4m3(c)) - x).abs();
                far(a).total_cmp(&far(b)).then((a & 1).cmp(&(b & 1)))
            })
            .unwrap()
    }

    #[test]
    fn codes_are_the_nearest() {
        for code in (0..=0x7eu8).chain(0x80..=0xfe) {
            assert_eq!(encode_e4m3(decode_e4m3(code)), code);
        }
        // Every number, the points between neighbours, and what is next to both.
        for code in 0..0x7eu8 {
            let (low, high) = (decode_e4m3(code), decode_e4m3(code + 1));
            for at in [low, (low + high) / 2.0, high] {
                for bits in at.to_bits().saturating_sub(2)..at.to_bits() + 3 {
                    for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                        assert_eq!(encode_e4m3(x), nearest(x), "{x:e}");
                    }
                }
            }
        }
        for x in [448.0, 449.0, 463.9, 464.0, 1e9, f32::INFINITY] {
            assert_eq!([encode_e4m3(x), encode_e4m3(-x)], [0x7e, 0xfe]);
        }
        assert_eq!([encode_e4m3(0.0), encode_e4m3(-0.0), encode_e4m3(f32::NAN) & 0x7f], [0, 0x80, 0x7f]);
    }

    #[test]
    fn rows_keep_their_largest_and_show_what_is_not_finite() {
        let mut codes = [9u8; 4];
        for largest in [1e-40f32, 3e-36, 1e-3, 1.0, 7.3, 3e38, f32::MAX] {
            let scale = quantise_row(&[largest, -largest, largest / 3.0, 0.0], &mut codes);
            assert_eq!(scale, largest / 448.0);
            assert_eq!([codes[0], codes[1], codes[3]], [0x7e, 0xfe, 0], "{largest:e}");
            if largest > 1e-35 {
                let third = decode_e4m3(codes[2]) * scale;
                assert!((third / (largest / 3.0) - 1.0).abs() <= 0.0625, "{third:e}");
            }
        }
        for x in [[0.0; 4], [-0.0; 4], [1e-45, 0.0, -1e-45, 0.0]] {
            assert_eq!((quantise_row(&x, &mut codes), codes), (0.0, [0; 4]));
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN] {
            let scale = quantise_row(&[1.0, bad, 0.0, -2.0], &mut codes);
            assert!(scale.is_nan() && codes.iter().all(|&c| (decode_e4m3(c) * scale).is_nan()));
        }
    }

    #[test]
    fn rows_are_those_of_torch() {
        #[derive(serde::Deserialize)]
        struct Row {
            x: Vec<u32>,
            scale: u32,
            codes: Vec<u8>,
        }
        let rows: Vec<Row> = serde_json::from_str(include_str!("../../tests/golden/caches.json")).unwrap();
        for Row { x, scale, codes } in rows {
            let x: Vec<f32> = x.into_iter().map(f32::from_bits).collect();
            let mut found = vec![0; x.len()];
            assert_eq!((quantise_row(&x, &mut found).to_bits(), &found), (scale, &codes));
        }
    }

    #[test]
    fn states_saturate() {
        for (x, y) in [(65504.0, 65504.0), (65520.0, 65504.0), (1e30, 65504.0), (f32::NEG_INFINITY, -65504.0)]
        {
            assert_eq!(to_f16(x).to_f32(), y);
        }
        assert!(to_f16(f32::NAN).is_nan());
        assert_eq!(
            [to_f16(1.0 + 1.0 / 2048.0), to_f16(1.0 + 3.0 / 2048.0)].map(f16::to_bits),
            [0x3c00, 0x3c02]
        );
    }

    #[test]
    fn names() {
        let caches = Caches { kv: KvCache::Fp8, state: StateType::F16 };
        assert_eq!(Caches::from_names("fp8", "float16").unwrap(), caches);
        assert_eq!(Caches::from_names("auto", "float32").unwrap(), Caches::default());
        assert_eq!(caches.names(), ["fp8", "float16"]);
        assert_eq!(Caches::default().names(), ["auto", "float32"]);
        let text = |kv, state| Caches::from_names(kv, state).unwrap_err().to_string();
        assert_eq!(text("int8", "float32"), "kv_cache_dtype: found int8; allowed: auto, fp8");
        assert_eq!(text("auto", "bfloat16"), "state_dtype: found bfloat16; allowed: float32, float16");
    }
}
