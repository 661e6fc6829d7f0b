//! Sixteen f32 lanes, on AVX-512, AVX2 or plain Rust, chosen once at run time.
//!
//! Every kernel of the CPU backend is written once over [`F32x16`] and run by [`dispatch`]. The three
//! implementations do the same operations on the same lanes in the same order, fused multiply-add
//! included, so a result has the same bits on every machine.

mod plain;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::OnceLock;

use self::plain::Plain;

/// Lanes of a vector.
pub const LANES: usize = 16;

/// Sixteen f32 lanes.
///
/// # Safety
/// Every method needs the instruction set of its implementation, which [`dispatch`] has checked, and
/// pointers that are valid for the lanes it names (no alignment is needed).
pub unsafe trait F32x16: Copy {
    /// Tokens of the register tile of a product with many tokens, and of the tiles that take the rest.
    const TILE: (usize, usize);
    /// All lanes `x`.
    unsafe fn splat(x: f32) -> Self;
    /// Sixteen f32.
    unsafe fn load(p: *const f32) -> Self;
    /// Sixteen bf16, widened.
    unsafe fn load_bf16(p: *const u16) -> Self;
    /// Sixteen IEEE f16, widened.
    unsafe fn load_f16(p: *const u16) -> Self;
    /// Sixteen i8, as f32.
    unsafe fn load_i8(p: *const i8) -> Self;
    /// 64 packed bf16 (see `packed`): two vectors of pairs. `base` is added to their exponents, in place.
    unsafe fn load_packed(p: *const u8, base: u16) -> [Self; 2];
    /// The bf16 pairs of sixteen lanes, widened: those in the low halves, those in the high halves.
    unsafe fn split_pairs(self) -> [Self; 2];
    /// Lane i of vector j becomes lane j of vector i. Moves bits, whatever they mean.
    unsafe fn transpose(v: [Self; 16]) -> [Self; 16];
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

#[cfg(test)]
mod tests;
