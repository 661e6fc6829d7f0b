//! Sixteen f32 lanes, on AVX-512, AVX2 or plain Rust, chosen once at run time.
//!
//! Every kernel of the CPU backend is written once over [`F32x16`] and run by [`dispatch`]. The three
//! implementations do the same operations on the same lanes in the same order, fused multiply-add
//! included, so a result has the same bits on every machine.

use std::sync::OnceLock;

/// Lanes of a vector.
pub const LANES: usize = 16;

/// Sixteen f32 lanes.
///
/// # Safety
/// Every method needs the instruction set of its implementation, which [`dispatch`] has checked, and
/// pointers that are valid for the lanes it names (no alignment is needed).
pub unsafe trait F32x16: Copy {
    /// Weight rows and token rows of the largest register tile of a matrix product.
    const TILE: (usize, usize);
    /// All lanes `x`.
    unsafe fn splat(x: f32) -> Self;
    /// Sixteen f32.
    unsafe fn load(p: *const f32) -> Self;
    /// Sixteen bf16, widened.
    unsafe fn load_bf16(p: *const u16) -> Self;
    /// Sixteen IEEE f16, widened.
    unsafe fn load_f16(p: *const u16) -> Self;
    /// Writes sixteen f32.
    unsafe fn store(self, p: *mut f32);
    /// `self + b`
    unsafe fn add(self, b: Self) -> Self;
    /// `self - b`
    unsafe fn sub(self, b: Self) -> Self;
    /// `self * b`
    unsafe fn mul(self, b: Self) -> Self;
    /// `self * b + c`, rounded once.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    /// Larger of the two, lane by lane; `b` where either is NaN.
    unsafe fn max(self, b: Self) -> Self;
    /// `self / b`
    unsafe fn div(self, b: Self) -> Self;
    /// `2^self` for integral lanes in -126..=127.
    unsafe fn exp2i(self) -> Self;
    /// Nearest integer, ties to even.
    unsafe fn round(self) -> Self;
    /// Lanes i and i+8, then i and i+4, then i and i+2, then i and i+1 are added, for four vectors at once.
    unsafe fn sum4(v: [Self; 4]) -> [f32; 4];

    /// The sum of the lanes, in the order of [`F32x16::sum4`].
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the caller's.
        unsafe { Self::sum4([self; 4])[0] }
    }

    /// The first `n < 16` f32, the other lanes zero.
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> Self {
        let mut lanes = [0f32; LANES];
        // SAFETY: the caller's; n < 16.
        unsafe {
            std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
            Self::load(lanes.as_ptr())
        }
    }

    /// Writes the first `n < 16` lanes.
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, n: usize) {
        let mut lanes = [0f32; LANES];
        // SAFETY: the caller's; n < 16.
        unsafe {
            self.store(lanes.as_mut_ptr());
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n);
        }
    }

    /// The largest lane.
    #[inline(always)]
    unsafe fn max_lane(self) -> f32 {
        let mut lanes = [0f32; LANES];
        // SAFETY: the array holds sixteen lanes.
        unsafe { self.store(lanes.as_mut_ptr()) };
        lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }

    /// `e^self`: within 1 ulp of correctly rounded, 0 below -87.3 (no subnormals), clamped at 88.3.
    ///
    /// Cody and Waite's reduction by ln 2 and the degree-5 polynomial of Cephes' `expf`.
    #[inline(always)]
    #[allow(clippy::excessive_precision)] // the coefficients as Cephes prints them
    unsafe fn exp(self) -> Self {
        // SAFETY: the caller's.
        unsafe {
            let x = Self::splat(88.3).min(self);
            let n = x.max(Self::splat(-88.0)).mul(Self::splat(std::f32::consts::LOG2_E)).round();
            let n = n.max(Self::splat(-126.0));
            let r = n.fma(Self::splat(-0.693_359_375), x);
            let r = n.fma(Self::splat(2.121_944_4e-4), r);
            let p = Self::splat(1.987_569_15e-4);
            let p = p.fma(r, Self::splat(1.398_199_95e-3));
            let p = p.fma(r, Self::splat(8.333_451_9e-3));
            let p = p.fma(r, Self::splat(4.166_579_6e-2));
            let p = p.fma(r, Self::splat(1.666_666_55e-1));
            let p = p.fma(r, Self::splat(0.500_000_01));
            let y = p.fma(r.mul(r), r).add(Self::splat(1.0)).mul(n.exp2i());
            y.zero_where_less(self, Self::splat(-87.336_54))
        }
    }

    /// Smaller of the two; `b` where either is NaN.
    unsafe fn min(self, b: Self) -> Self;

    /// Zero in the lanes where `x < limit`.
    unsafe fn zero_where_less(self, x: Self, limit: Self) -> Self;

    /// `1 / (1 + e^-self)`
    #[inline(always)]
    unsafe fn sigmoid(self) -> Self {
        // SAFETY: the caller's.
        unsafe {
            let one = Self::splat(1.0);
            one.div(Self::splat(0.0).sub(self).exp().add(one))
        }
    }

    /// `self * sigmoid(self)`
    #[inline(always)]
    unsafe fn silu(self) -> Self {
        // SAFETY: the caller's.
        unsafe { self.mul(self.sigmoid()) }
    }
}

/// A kernel over any vector implementation. `run` must be `#[inline(always)]`.
pub trait Kernel {
    /// What it returns.
    type Out;
    /// # Safety
    /// The instruction set of `V` is present.
    unsafe fn run<V: F32x16>(self) -> Self::Out;
}

/// The instruction sets that a kernel can run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Isa {
    Avx512,
    Avx2,
    Plain,
}

/// The best instruction set of this machine. `QWEN35RS_ISA=avx2` or `plain` lowers it (for tests).
pub fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(|| {
        let wish = std::env::var("QWEN35RS_ISA").unwrap_or_default();
        let all = available();
        all.iter().copied().find(|i| format!("{i:?}").eq_ignore_ascii_case(&wish)).unwrap_or(all[0])
    })
}

/// The instruction sets of this machine, best first; `Plain` is always there.
pub fn available() -> Vec<Isa> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if std::is_x86_feature_detected!("avx512f")
            && std::is_x86_feature_detected!("avx512bw")
            && std::is_x86_feature_detected!("avx512dq")
            && std::is_x86_feature_detected!("avx512vl")
        {
            found.push(Isa::Avx512);
        }
        if std::is_x86_feature_detected!("avx2")
            && std::is_x86_feature_detected!("fma")
            && std::is_x86_feature_detected!("f16c")
        {
            found.push(Isa::Avx2);
        }
    }
    found.push(Isa::Plain);
    found
}

/// Runs a kernel on the best instruction set of this machine.
#[inline]
pub fn dispatch<K: Kernel>(kernel: K) -> K::Out {
    dispatch_on(isa(), kernel)
}

/// Runs a kernel on one instruction set, which must be among [`available`].
#[inline]
pub fn dispatch_on<K: Kernel>(isa: Isa, kernel: K) -> K::Out {
    match isa {
        // SAFETY: `isa` and `available` list only what the machine has.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { x86::run_avx512(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::run_avx2(kernel) },
        // SAFETY: plain Rust needs no instruction set.
        _ => unsafe { kernel.run::<Plain>() },
    }
}

/// Plain Rust lanes: the definition that the others equal.
#[derive(Clone, Copy)]
pub struct Plain([f32; LANES]);

impl Plain {
    #[inline(always)]
    fn map2(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Plain(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }
}

// SAFETY: no instruction set is needed; pointers are the caller's.
unsafe impl F32x16 for Plain {
    const TILE: (usize, usize) = (2, 2);
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Plain([x; LANES])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller's.
        Plain(unsafe { p.cast::<[f32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: the caller's.
        let h = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        Plain(h.map(|b| f32::from_bits(u32::from(b) << 16)))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        // SAFETY: the caller's.
        let h = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        Plain(h.map(|b| half::f16::from_bits(b).to_f32()))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller's.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        self.map2(b, |x, y| x + y)
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        self.map2(b, |x, y| x - y)
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        self.map2(b, |x, y| x * y)
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        Plain(std::array::from_fn(|i| self.0[i].mul_add(b.0[i], c.0[i])))
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        self.map2(b, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        self.map2(b, |x, y| if x < y { x } else { y })
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        self.map2(b, |x, y| x / y)
    }
    #[inline(always)]
    unsafe fn exp2i(self) -> Self {
        Plain(self.0.map(|n| f32::from_bits(((n as i32 + 127) << 23) as u32)))
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        Plain(self.0.map(f32::round_ties_even))
    }
    #[inline(always)]
    unsafe fn sum4(v: [Self; 4]) -> [f32; 4] {
        v.map(|Plain(mut x)| {
            for width in [8, 4, 2, 1] {
                for i in 0..width {
                    x[i] += x[i + width];
                }
            }
            x[0]
        })
    }
    #[inline(always)]
    unsafe fn zero_where_less(self, x: Self, limit: Self) -> Self {
        Plain(std::array::from_fn(|i| if x.0[i] < limit.0[i] { 0.0 } else { self.0[i] }))
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks)] // each method's contract is the trait's, word for word
mod x86 {
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

    #[derive(Clone, Copy)]
    pub struct Avx512(__m512);

    // SAFETY: `run_avx512` alone instantiates kernels with it.
    unsafe impl F32x16 for Avx512 {
        const TILE: (usize, usize) = (4, 6);
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
        const TILE: (usize, usize) = (2, 3);
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
}

#[cfg(test)]
mod tests;
