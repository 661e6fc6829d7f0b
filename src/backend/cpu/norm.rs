//! RMSNorm, its gated form, l2 norm and the elementwise pieces of the net, one row at a time, f32.

use super::kernel::kernel;
use super::simd::LANES;
use super::tile::dot;

kernel! {
    /// `out = x / sqrt(mean(x²) + eps) * w`. All `[width]`; `w` already holds the `1 +` of the zero-centred form.
    ///
    /// Source: Transformers `Qwen3_5RMSNorm`; own code.
    pub fn rms_norm<V>(x: &'a [f32], w: &'a [f32], eps: f32, out: &'a mut [f32]) {
        let n = x.len();
        assert!(w.len() == n && out.len() == n);
        let scale = 1.0 / (dot::<V>(x.as_ptr(), x.as_ptr(), n) / n as f32 + eps).sqrt();
        for ((o, x), w) in out.iter_mut().zip(x).zip(w) {
            *o = x * scale * w;
        }
    }
}

kernel! {
    /// `x = x / sqrt(mean(x²) + eps) * w * silu(z)` in place. All `[v_dim]`; `w` is plain.
    ///
    /// Source: Transformers `Qwen3_5RMSNormGated`; own code.
    pub fn gated_rms_norm<V>(x: &'a mut [f32], w: &'a [f32], z: &'a [f32], eps: f32) {
        let n = x.len();
        assert!(w.len() == n && z.len() == n);
        let scale = 1.0 / (dot::<V>(x.as_ptr(), x.as_ptr(), n) / n as f32 + eps).sqrt();
        let s = V::splat(scale);
        let p = x.as_mut_ptr();
        let mut i = 0;
        while i + LANES <= n {
            let gate = V::load(z.as_ptr().add(i)).silu();
            V::load(p.add(i)).mul(s).mul(V::load(w.as_ptr().add(i))).mul(gate).store(p.add(i));
            i += LANES;
        }
        if i < n {
            let gate = V::load_part(z.as_ptr().add(i), n - i).silu();
            let y = V::load_part(p.add(i), n - i).mul(s).mul(V::load_part(w.as_ptr().add(i), n - i)).mul(gate);
            y.store_part(p.add(i), n - i);
        }
    }
}

kernel! {
    /// `out = x / sqrt(sum(x²) + 1e-6) * scale`. Both `[k_dim]`.
    pub fn l2_norm<V>(x: &'a [f32], scale: f32, out: &'a mut [f32]) {
        let n = x.len();
        assert!(out.len() == n);
        let norm = scale / (dot::<V>(x.as_ptr(), x.as_ptr(), n) + 1e-6).sqrt();
        for (o, x) in out.iter_mut().zip(x) {
            *o = x * norm;
        }
    }
}

kernel! {
    /// `out = silu(gate) * up`. All of one length.
    pub fn silu_mul<V>(gate: &'a [f32], up: &'a [f32], out: &'a mut [f32]) {
        let n = out.len();
        assert!(gate.len() == n && up.len() == n);
        let mut i = 0;
        while i + LANES <= n {
            V::load(gate.as_ptr().add(i)).silu().mul(V::load(up.as_ptr().add(i))).store(out.as_mut_ptr().add(i));
            i += LANES;
        }
        if i < n {
            let y = V::load_part(gate.as_ptr().add(i), n - i).silu().mul(V::load_part(up.as_ptr().add(i), n - i));
            y.store_part(out.as_mut_ptr().add(i), n - i);
        }
    }
}

kernel! {
    /// `out *= sigmoid(gate)`. Both of one length.
    pub fn sigmoid_mul<V>(gate: &'a [f32], out: &'a mut [f32]) {
        let n = out.len();
        assert!(gate.len() == n);
        let p = out.as_mut_ptr();
        let mut i = 0;
        while i + LANES <= n {
            V::load(gate.as_ptr().add(i)).sigmoid().mul(V::load(p.add(i))).store(p.add(i));
            i += LANES;
        }
        if i < n {
            let y = V::load_part(gate.as_ptr().add(i), n - i).sigmoid().mul(V::load_part(p.add(i), n - i));
            y.store_part(p.add(i), n - i);
        }
    }
}

kernel! {
    /// `out += a * x`. Both of one length.
    pub fn axpy<V>(a: f32, x: &'a [f32], out: &'a mut [f32]) {
        assert!(x.len() == out.len());
        for (o, x) in out.iter_mut().zip(x) {
            *o = a.mul_add(*x, *o);
        }
    }
}
