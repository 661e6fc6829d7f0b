//! The causal depthwise convolution of the delta layers, with SiLU, over ragged sequences.

use super::kernel::kernel;
use super::parallel::{self, Shared};
use super::simd::LANES;
use crate::weights::Tensor;

/// Channels a task takes: all tokens of a sequence for these channels, so that the task that reads a tail is
/// the one that replaces it.
const CHANNELS: usize = 256;

/// The taps `[C, 1, kernel]` as `[kernel, C]`, so that neighbouring channels are neighbours in memory.
pub fn tap_major(tensor: &Tensor) -> Vec<f32> {
    let wide = tensor.to_f32();
    let (channels, kernel) = (tensor.shape[0], wide.len() / tensor.shape[0].max(1));
    (0..kernel * channels).map(|i| wide[i % channels * kernel + i / channels]).collect()
}

/// One sequence of the convolution.
///
/// `x` `[num_tokens, x_stride]` (its first `channels` columns), `weight` `[kernel, channels]` (tap-major),
/// `tail` `[kernel - 1, channels]` (the inputs before the first token, zeros at the start of a sequence;
/// replaced by the last inputs), `out` `[num_tokens, channels]`.
pub fn causal_conv1d(
    x: &[f32],
    x_stride: usize,
    weight: &[f32],
    channels: usize,
    tail: &mut [f32],
    out: &mut [f32],
) {
    if channels == 0 {
        return;
    }
    let (kernel, num_tokens) = (weight.len() / channels, out.len() / channels);
    assert!(
        tail.len() == (kernel - 1) * channels
            && (num_tokens == 0 || x.len() >= (num_tokens - 1) * x_stride + channels)
    );
    let (out, tail) = (Shared::new(out), Shared::new(tail));
    parallel::for_each(channels.div_ceil(CHANNELS), CHANNELS * num_tokens * (kernel + 8), |task| {
        let c = task * CHANNELS..((task + 1) * CHANNELS).min(channels);
        let dims = Dims { x_stride, channels, kernel, num_tokens, first: c.start, last: c.end };
        conv_channels(x, weight, tail, out, dims);
    });
}

#[derive(Clone, Copy)]
struct Dims {
    x_stride: usize,
    channels: usize,
    kernel: usize,
    num_tokens: usize,
    first: usize,
    last: usize,
}

kernel! {
    fn conv_channels<V>(x: &'a [f32], weight: &'a [f32], tail: Shared<f32>, out: Shared<f32>, dims: Dims) {
        let Dims { x_stride, channels, kernel, num_tokens, first, last } = dims;
        let (tail, out) = (tail.get(), out.get());
        // Input `i` of the sequence: the tail holds those before the first token.
        let input = |i: usize, c: usize| -> *const f32 {
            if i < kernel - 1 { tail.add(i * channels + c) } else { x.as_ptr().add((i + 1 - kernel) * x_stride + c) }
        };
        for t in 0..num_tokens {
            let mut c = first;
            while c < last {
                let n = (last - c).min(LANES);
                let load = |p: *const f32| if n == LANES { V::load(p) } else { V::load_part(p, n) };
                let mut acc = V::splat(0.0);
                for tap in 0..kernel {
                    acc = load(weight.as_ptr().add(tap * channels + c)).fma(load(input(t + tap, c)), acc);
                }
                let (y, p) = (acc.silu(), out.add(t * channels + c));
                if n == LANES { y.store(p) } else { y.store_part(p, n) }
                c += n;
            }
        }
        // Oldest first: input `num_tokens + i` is never before input `i`, so nothing is read after it is replaced.
        for i in 0..kernel - 1 {
            for c in first..last {
                *tail.add(i * channels + c) = *input(num_tokens + i, c);
            }
        }
    }
}
