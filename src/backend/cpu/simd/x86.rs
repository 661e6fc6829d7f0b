//! AVX-512 and AVX2 lanes.
#![allow(clippy::undocumented_unsafe_blocks)] // each method's contract is the trait's, word for word

use std::arch::x86_64::*;

use super::{F32x16, Kernel};

/// # Safety
/// The machine has AVX-512 F, BW, DQ and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: the caller's.
    unsafe { kernel.run::<Avx512>() }
}

/// # Safety
/// The machine has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: the caller's.
    unsafe { kernel.run::<Avx2>() }
}

/// The last two folds, of four vectors at once: lanes i and i+2, then i and i+1.
#[inline(always)]
unsafe fn sum4_m128(v: [__m128; 4]) -> [f32; 4] {
    // SAFETY: SSE is part of x86-64.
    unsafe {
        let (ab_lo, ab_hi) = (_mm_movelh_ps(v[0], v[1]), _mm_movehl_ps(v[1], v[0]));
        let (cd_lo, cd_hi) = (_mm_movelh_ps(v[2], v[3]), _mm_movehl_ps(v[3], v[2]));
        let (ab, cd) = (_mm_add_ps(ab_lo, ab_hi), _mm_add_ps(cd_lo, cd_hi));
        let even = _mm_shuffle_ps::<0b10_00_10_00>(ab, cd);
        let odd = _mm_shuffle_ps::<0b11_01_11_01>(ab, cd);
        std::mem::transmute(_mm_add_ps(even, odd))
    }
}

/// The first two folds: lanes i and i+8, then i and i+4.
#[inline(always)]
unsafe fn fold512(x: __m512) -> __m128 {
    // SAFETY: the caller's.
    unsafe { fold2x256(Avx2(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x))) }
}

#[inline(always)]
unsafe fn fold2x256(Avx2(lo, hi): Avx2) -> __m128 {
    // SAFETY: the caller's.
    unsafe {
        let y = _mm256_add_ps(lo, hi);
        _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps::<1>(y))
    }
}

#[inline(always)]
unsafe fn widen_bf16(p: *const u16) -> __m256 {
    // SAFETY: the caller's.
    unsafe {
        let h = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(h))
    }
}

#[inline(always)]
unsafe fn exp2i_256(x: __m256) -> __m256 {
    // SAFETY: the caller's.
    unsafe {
        let n = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127));
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(n))
    }
}

#[inline(always)]
unsafe fn keep_256(y: __m256, x: __m256, limit: __m256) -> __m256 {
    // SAFETY: the caller's.
    unsafe { _mm256_and_ps(y, _mm256_cmp_ps::<_CMP_NLT_UQ>(x, limit)) }
}

#[inline(always)]
unsafe fn transpose_8x8(v: [__m256; 8]) -> [__m256; 8] {
    // SAFETY: the caller's.
    unsafe {
        let mut quads = v;
        for g in 0..2 {
            let (a, b, c, d) = (v[4 * g], v[4 * g + 1], v[4 * g + 2], v[4 * g + 3]);
            let (ab_lo, ab_hi) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let (cd_lo, cd_hi) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
            quads[4 * g] = _mm256_shuffle_ps::<0x44>(ab_lo, cd_lo);
            quads[4 * g + 1] = _mm256_shuffle_ps::<0xee>(ab_lo, cd_lo);
            quads[4 * g + 2] = _mm256_shuffle_ps::<0x44>(ab_hi, cd_hi);
            quads[4 * g + 3] = _mm256_shuffle_ps::<0xee>(ab_hi, cd_hi);
        }
        let mut out = v;
        for c in 0..4 {
            out[c] = _mm256_permute2f128_ps::<0x20>(quads[c], quads[4 + c]);
            out[4 + c] = _mm256_permute2f128_ps::<0x31>(quads[c], quads[4 + c]);
        }
        out
    }
}

#[derive(Clone, Copy)]
pub struct Avx512(__m512);

// SAFETY: `run_avx512` alone instantiates kernels with it.
unsafe impl F32x16 for Avx512 {
    const TILE: (usize, usize) = (12, 4);
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        unsafe { Self(_mm512_set1_ps(x)) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        unsafe { Self(_mm512_loadu_ps(p)) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        unsafe {
            let h = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(h)))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        unsafe { Self(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self {
        unsafe { Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_packed(p: *const u8, base: u16) -> [Self; 2] {
        unsafe {
            let base = _mm512_set1_epi16(base.cast_signed());
            let codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(p.add(64).cast()));
            let low = _mm512_slli_epi16::<7>(_mm512_and_si512(codes, _mm512_set1_epi16(15)));
            // The low codes are left below the exponent, where the mask passes them over.
            let exponents =
                (_mm512_add_epi16(low, base), _mm512_add_epi16(_mm512_slli_epi16::<3>(codes), base));
            let mask = _mm512_set1_epi16(0x807f_u16.cast_signed());
            let first = _mm512_cvtepi8_epi16(_mm256_loadu_si256(p.cast()));
            let second = _mm512_cvtepi8_epi16(_mm256_loadu_si256(p.add(32).cast()));
            // mask ? bytes : exponents
            let first = _mm512_ternarylogic_epi32::<0xca>(mask, first, exponents.0);
            let second = _mm512_ternarylogic_epi32::<0xca>(mask, second, exponents.1);
            [Self(_mm512_castsi512_ps(first)), Self(_mm512_castsi512_ps(second))]
        }
    }
    #[inline(always)]
    unsafe fn split_pairs(self) -> [Self; 2] {
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            let high = _mm512_and_si512(bits, _mm512_set1_epi32(0xffff_0000_u32.cast_signed()));
            [Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))), Self(_mm512_castsi512_ps(high))]
        }
    }
    #[inline(always)]
    unsafe fn transpose(v: [Self; 16]) -> [Self; 16] {
        unsafe {
            let mut pairs = v;
            for i in 0..8 {
                let (a, b) = (v[2 * i].0, v[2 * i + 1].0);
                (pairs[2 * i], pairs[2 * i + 1]) =
                    (Self(_mm512_unpacklo_ps(a, b)), Self(_mm512_unpackhi_ps(a, b)));
            }
            // quads[4 g + c]: column c of each 128 bits, of rows 4 g to 4 g + 3.
            let mut quads = pairs;
            for g in 0..4 {
                for c in 0..2 {
                    let a = _mm512_castps_pd(pairs[4 * g + c].0);
                    let b = _mm512_castps_pd(pairs[4 * g + 2 + c].0);
                    quads[4 * g + 2 * c] = Self(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)));
                    quads[4 * g + 2 * c + 1] = Self(_mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
                }
            }
            let mut out = quads;
            for c in 0..4 {
                let (a, b, d, e) = (quads[c].0, quads[4 + c].0, quads[8 + c].0, quads[12 + c].0);
                let (ab, de) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(d, e));
                out[c] = Self(_mm512_shuffle_f32x4::<0x88>(ab, de));
                out[8 + c] = Self(_mm512_shuffle_f32x4::<0xdd>(ab, de));
                let (ab, de) = (_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(d, e));
                out[4 + c] = Self(_mm512_shuffle_f32x4::<0x88>(ab, de));
                out[12 + c] = Self(_mm512_shuffle_f32x4::<0xdd>(ab, de));
            }
            out
        }
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, n: usize) {
        unsafe { _mm512_mask_storeu_ps(p, ((1u32 << n) - 1) as u16, self.0) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        unsafe { Self(_mm512_add_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        unsafe { Self(_mm512_sub_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        unsafe { Self(_mm512_mul_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        unsafe { Self(_mm512_fmadd_ps(self.0, b.0, c.0)) }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        unsafe { Self(_mm512_max_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        unsafe { Self(_mm512_min_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        unsafe { Self(_mm512_div_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn exp2i(self) -> Self {
        unsafe {
            let n = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(n)))
        }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        unsafe { Self(_mm512_roundscale_ps::<0>(self.0)) }
    }
    #[inline(always)]
    unsafe fn sum4(v: [Self; 4]) -> [f32; 4] {
        unsafe { sum4_m128([fold512(v[0].0), fold512(v[1].0), fold512(v[2].0), fold512(v[3].0)]) }
    }
    #[inline(always)]
    unsafe fn zero_where_less(self, x: Self, limit: Self) -> Self {
        unsafe {
            let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x.0, limit.0);
            Self(_mm512_maskz_mov_ps(keep, self.0))
        }
    }
}

#[derive(Clone, Copy)]
pub struct Avx2(__m256, __m256);

// SAFETY: `run_avx2` alone instantiates kernels with it.
unsafe impl F32x16 for Avx2 {
    const TILE: (usize, usize) = (3, 1);
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        unsafe { Self(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        unsafe { Self(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        unsafe { Self(widen_bf16(p), widen_bf16(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        unsafe {
            Self(
                _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self {
        unsafe {
            let (low, high) = (_mm_loadl_epi64(p.cast()), _mm_loadl_epi64(p.add(8).cast()));
            Self(
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high)),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_packed(p: *const u8, base: u16) -> [Self; 2] {
        unsafe {
            let mut out = [[_mm256_setzero_ps(); 2]; 2];
            let base = _mm256_set1_epi16(base.cast_signed());
            let mask = _mm256_set1_epi16(0x807f_u16.cast_signed());
            for i in 0..2 {
                let codes = _mm256_cvtepu8_epi16(_mm_loadu_si128(p.add(64 + 16 * i).cast()));
                let low = _mm256_slli_epi16::<7>(_mm256_and_si256(codes, _mm256_set1_epi16(15)));
                let exponents =
                    [_mm256_add_epi16(low, base), _mm256_add_epi16(_mm256_slli_epi16::<3>(codes), base)];
                for half in 0..2 {
                    let bytes = _mm256_cvtepi8_epi16(_mm_loadu_si128(p.add(32 * half + 16 * i).cast()));
                    let kept = _mm256_andnot_si256(mask, exponents[half]);
                    out[half][i] = _mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(mask, bytes), kept));
                }
            }
            [Self(out[0][0], out[0][1]), Self(out[1][0], out[1][1])]
        }
    }
    #[inline(always)]
    unsafe fn split_pairs(self) -> [Self; 2] {
        unsafe {
            let mask = _mm256_castsi256_ps(_mm256_set1_epi32(0xffff_0000_u32.cast_signed()));
            let a = _mm256_slli_epi32::<16>(_mm256_castps_si256(self.0));
            let b = _mm256_slli_epi32::<16>(_mm256_castps_si256(self.1));
            [
                Self(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)),
                Self(_mm256_and_ps(self.0, mask), _mm256_and_ps(self.1, mask)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn transpose(v: [Self; 16]) -> [Self; 16] {
        unsafe {
            let mut out = v;
            for (from, top) in [(0, true), (8, false)] {
                let (mut low, mut high) = ([v[0].0; 8], [v[0].0; 8]);
                for i in 0..8 {
                    (low[i], high[i]) = (v[from + i].0, v[from + i].1);
                }
                (low, high) = (transpose_8x8(low), transpose_8x8(high));
                for i in 0..8 {
                    if top {
                        (out[i].0, out[8 + i].0) = (low[i], high[i]);
                    } else {
                        (out[i].1, out[8 + i].1) = (low[i], high[i]);
                    }
                }
            }
            out
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe {
            _mm256_storeu_ps(p, self.0);
            _mm256_storeu_ps(p.add(8), self.1);
        }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        unsafe { Self(_mm256_add_ps(self.0, b.0), _mm256_add_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        unsafe { Self(_mm256_sub_ps(self.0, b.0), _mm256_sub_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        unsafe { Self(_mm256_mul_ps(self.0, b.0), _mm256_mul_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        unsafe { Self(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)) }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        unsafe { Self(_mm256_max_ps(self.0, b.0), _mm256_max_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        unsafe { Self(_mm256_min_ps(self.0, b.0), _mm256_min_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        unsafe { Self(_mm256_div_ps(self.0, b.0), _mm256_div_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn exp2i(self) -> Self {
        unsafe { Self(exp2i_256(self.0), exp2i_256(self.1)) }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        unsafe { Self(_mm256_round_ps::<0>(self.0), _mm256_round_ps::<0>(self.1)) }
    }
    #[inline(always)]
    unsafe fn sum4(v: [Self; 4]) -> [f32; 4] {
        unsafe { sum4_m128([fold2x256(v[0]), fold2x256(v[1]), fold2x256(v[2]), fold2x256(v[3])]) }
    }
    #[inline(always)]
    unsafe fn zero_where_less(self, x: Self, limit: Self) -> Self {
        unsafe { Self(keep_256(self.0, x.0, limit.0), keep_256(self.1, x.1, limit.1)) }
    }
}
