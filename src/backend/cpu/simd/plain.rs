//! Plain Rust lanes: the definition that the instruction sets equal.

use super::{F32x16, LANES};

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
    unsafe fn load_i8(p: *const i8) -> Self {
        // SAFETY: the caller's.
        Plain(unsafe { p.cast::<[i8; LANES]>().read_unaligned() }.map(f32::from))
    }
    #[inline(always)]
    unsafe fn load_packed(p: *const u8, base: u16) -> [Self; 2] {
        // SAFETY: the caller's; 96 bytes.
        let bytes = unsafe { p.cast::<[u8; 96]>().read_unaligned() };
        let bf16 = |half: usize, i: usize| {
            let (sign_mantissa, codes) = (u16::from(bytes[32 * half + i]), u16::from(bytes[64 + i]));
            let code = codes >> (4 * half) & 15;
            u32::from((sign_mantissa & 0x80) << 8 | sign_mantissa & 0x7f | ((code << 7) + base) & 0x7f80)
        };
        [0, 1].map(|half| {
            Plain(std::array::from_fn(|i| f32::from_bits(bf16(half, 2 * i) | bf16(half, 2 * i + 1) << 16)))
        })
    }
    #[inline(always)]
    unsafe fn split_pairs(self) -> [Self; 2] {
        let bits = self.0.map(f32::to_bits);
        [Plain(bits.map(|b| f32::from_bits(b << 16))), Plain(bits.map(|b| f32::from_bits(b & 0xffff_0000)))]
    }
    #[inline(always)]
    unsafe fn transpose(v: [Self; 16]) -> [Self; 16] {
        std::array::from_fn(|i| Plain(std::array::from_fn(|j| v[j].0[i])))
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
