//! Every instruction set gives the same bits; the exponential is right.

use std::fmt::Write;
use std::process::Command;

use super::{F32x16, Isa, Kernel, LANES, available, dispatch_on, isa};
use crate::backend::cpu::attention::{PagedRows, Queries, attend};
use crate::backend::cpu::conv1d::causal_conv1d;
use crate::backend::cpu::delta_rule::{Head, OutRows, gated_delta_rule};
use crate::backend::cpu::linear::tests::{forms, numbers, owned};
use crate::backend::cpu::moe::{Moe, Scratch};
use crate::backend::cpu::parallel::Shared;
use crate::backend::cpu::{norm, softmax};
use crate::batch::PAGE_LEN;
use crate::weights::DType;

struct Exp<'a>(&'a [f32], &'a mut [f32]);

impl Kernel for Exp<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<V: F32x16>(self) {
        for (x, y) in self.0.chunks_exact(LANES).zip(self.1.chunks_exact_mut(LANES)) {
            // SAFETY: both chunks have sixteen elements; `dispatch_on` was given an instruction set that is there.
            unsafe { V::load(x.as_ptr()).exp().store(y.as_mut_ptr()) }
        }
    }
}

fn exp(isa: Isa, x: &[f32]) -> Vec<f32> {
    let mut padded = x.to_vec();
    padded.resize(x.len().next_multiple_of(LANES), 0.0);
    let mut y = vec![0.0; padded.len()];
    dispatch_on(isa, Exp(&padded, &mut y));
    y.truncate(x.len());
    y
}

#[test]
fn exp_is_right_on_its_whole_range() {
    // Every 1009th float of the range, from both ends of zero.
    let negative = (0..(-87.336_54f32).to_bits() - (-0.0f32).to_bits())
        .step_by(1009)
        .map(|b| f32::from_bits((1 << 31) + b));
    let positive = (0..88.3f32.to_bits()).step_by(1009).map(f32::from_bits);
    let x: Vec<f32> = negative.chain(positive).chain([88.3, -87.336_54, -0.0, 0.0]).collect();
    let first = exp(Isa::Plain, &x);
    let mut worst = 0.0f64;
    for (&x, &y) in x.iter().zip(&first) {
        let want = f64::from(x).exp();
        let ulp = f64::from(f32::from_bits((want as f32).to_bits() + 1)) - f64::from(want as f32);
        worst = worst.max((f64::from(y) - want).abs() / ulp);
    }
    assert!(worst <= 2.0, "{worst} ulp");
    for isa in available() {
        assert!(exp(isa, &x).iter().zip(&first).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa:?}");
    }
}

#[test]
fn exp_outside_its_range() {
    let x = [
        -87.4,
        -88.0,
        -1e3,
        -3e38,
        f32::NEG_INFINITY,
        0.0,
        88.4,
        1e3,
        3e38,
        f32::INFINITY,
        f32::NAN,
        -f32::NAN,
    ];
    for isa in available() {
        let y = exp(isa, &x);
        assert_eq!(y[..6], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0], "{isa:?}");
        let top = exp(isa, &[88.3])[0];
        assert!(top.is_finite() && y[6..10] == [top; 4], "{isa:?}: {y:?}");
        assert!(y[10..].iter().all(|y| y.is_nan()), "{isa:?}: {y:?}");
    }
}

fn hash(values: &[f32]) -> u64 {
    // FNV-1a over the bits; every NaN is one.
    let bits = values.iter().map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() });
    bits.flat_map(u32::to_le_bytes)
        .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

const LENS: [usize; 9] = [0, 1, 2, 15, 16, 17, 33, 64, 100];

/// One line per op and size, with a hash of its output.
fn digest() -> String {
    let mut lines = String::new();
    let mut line = |op: &str, size: &[usize], values: &[f32]| {
        writeln!(lines, "{op} {size:?} {:016x}", hash(values)).unwrap();
    };
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        for num_in in &LENS[1..] {
            for num_out in [1, 3, 4, 7, 33] {
                for num_rows in [0, 1, 2, 3, 7, 8, 13] {
                    for w in forms(&numbers(num_in * num_out, 1), *num_in, dtype) {
                        let mut out = vec![0.0; num_rows * num_out];
                        w.forward(&numbers(num_rows * num_in, 2), &mut out, num_rows);
                        line(&format!("linear {dtype:?}"), &[*num_in, num_out, num_rows], &out);
                    }
                }
            }
        }
    }
    for (num_in, num_out, num_rows) in [(700, 130, 33), (2500, 70, 17), (33, 1000, 64)] {
        for w in forms(&numbers(num_in * num_out, 1), num_in, DType::BF16) {
            let mut out = vec![0.0; num_rows * num_out];
            w.forward(&numbers(num_rows * num_in, 2), &mut out, num_rows);
            line("linear", &[num_in, num_out, num_rows], &out);
        }
    }
    for n in LENS {
        let (mut a, b, c) = (numbers(n, 3), numbers(n, 4), numbers(n, 5));
        let mut out = vec![0.0; n];
        if n > 0 {
            norm::rms_norm(&a, &b, 1e-6, &mut out);
            line("rms_norm", &[n], &out);
            norm::l2_norm(&a, 0.3, &mut out);
            line("l2_norm", &[n], &out);
        }
        norm::silu_mul(&a, &b, &mut out);
        line("silu_mul", &[n], &out);
        norm::axpy(0.7, &a, &mut out);
        line("axpy", &[n], &out);
        norm::sigmoid_mul(&b, &mut out);
        line("sigmoid_mul", &[n], &out);
        norm::gated_rms_norm(&mut a, &b, &c, 1e-6);
        line("gated_rms_norm", &[n], &a);
        let mut weights = Vec::new();
        let hostile: Vec<f32> =
            b.iter().enumerate().map(|(i, &x)| if i % 5 == 4 { f32::NAN } else { 40.0 * x }).collect();
        softmax::exp_weights(&hostile, 80.0, 1.3, &mut weights);
        line("exp_weights", &[n], &weights);
        for channels in [1, 15, 16, 17, 300] {
            let mut tail = numbers(3 * channels, 6);
            let mut out = vec![0.0; n * channels];
            causal_conv1d(
                &numbers(n * channels, 7),
                channels,
                &numbers(4 * channels, 8),
                channels,
                &mut tail,
                &mut out,
            );
            line("conv1d", &[n, channels], &[out, tail].concat());
        }
        for (k_dim, v_dim) in [(1, 1), (15, 17), (16, 16), (24, 33), (128, 128)] {
            for chunked_len in [0, n / 2, n] {
                let g: Vec<f32> = numbers(n, 9).iter().map(|x| -x.abs()).collect();
                let (q, k, v) = (numbers(n * k_dim, 10), numbers(n * k_dim, 11), numbers(n * v_dim, 12));
                let beta = numbers(n, 13);
                let head = Head {
                    q: &q,
                    k: &k,
                    v: &v,
                    strides: [k_dim, k_dim, v_dim],
                    g: &g,
                    beta: &beta,
                    k_dim,
                    v_dim,
                    scale: 0.3,
                    qk_l2norm: true,
                };
                let (mut state, mut out) = (numbers(k_dim * v_dim, 14), vec![0.0; n * v_dim]);
                let rows = OutRows { out: out.as_mut_ptr(), stride: v_dim };
                // SAFETY: `out` has a row for every token, and nobody else has it.
                unsafe { gated_delta_rule(head, chunked_len, &mut state, rows) };
                line("delta_rule", &[n, k_dim, v_dim, chunked_len], &[out, state].concat());
            }
        }
    }
    for num_tokens in [1usize, 2, 5, 16] {
        for first_pos in [0usize, 1, 62, 63, 64, 130] {
            for (group, head_dim) in [(1, 1), (2, 15), (3, 16), (4, 17), (2, 64)] {
                let num_pages = (first_pos + num_tokens).div_ceil(PAGE_LEN);
                let q = numbers(num_tokens * group * head_dim, 15);
                let (keys, values) = (
                    numbers(num_pages * PAGE_LEN * head_dim, 16),
                    numbers(num_pages * PAGE_LEN * head_dim, 17),
                );
                let stride = group * head_dim;
                let queries = Queries { q: &q, stride, group, head_dim, first_pos, num_tokens, scale: 0.4 };
                let (k, v) = (
                    |i: usize| keys[i * PAGE_LEN * head_dim..].as_ptr(),
                    |i: usize| values[i * PAGE_LEN * head_dim..].as_ptr(),
                );
                let mut out = vec![0.0; q.len()];
                let pages = (
                    PagedRows { page: &k, row_stride: head_dim },
                    PagedRows { page: &v, row_stride: head_dim },
                );
                attend(queries, pages.0, pages.1, Shared::new(&mut out));
                line("attention", &[num_tokens, first_pos, group, head_dim], &out);
            }
        }
    }
    for (n, hidden, width) in [(1, 15, 17), (3, 33, 16), (20, 16, 1)] {
        let dtype = DType::BF16;
        let moe = Moe {
            router: owned(&numbers(6 * hidden, 18), hidden, dtype),
            gate_up: owned(&numbers(6 * 2 * width * hidden, 19), hidden, dtype),
            down: owned(&numbers(6 * hidden * width, 20), width, dtype),
            shared: Some((
                owned(&numbers(2 * 5 * hidden, 21), hidden, dtype),
                owned(&numbers(hidden * 5, 22), 5, dtype),
            )),
            shared_gate: Some(owned(&numbers(hidden, 23), hidden, dtype)),
            top_k: 3,
            here: 0..usize::MAX,
        };
        let mut out = vec![0.0; n * hidden];
        moe.forward(n, &numbers(n * hidden, 24), &mut Scratch::default(), &mut out);
        line("moe", &[n, hidden, width], &out);
    }
    lines
}

/// Run for each instruction set by the test below, which compares what it prints.
#[test]
fn every_op_has_a_digest() {
    let digest = digest();
    assert!(digest.lines().count() > 1000);
    println!("isa {:?}", isa());
    println!("{digest}");
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    // The choice is made once per process, so each instruction set has a process of its own.
    let mut first: Option<(Isa, Vec<String>)> = None;
    for isa in available() {
        let run = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "backend::cpu::simd::tests::every_op_has_a_digest", "--nocapture"])
            .env("QWEN35RS_ISA", format!("{isa:?}"))
            .output()
            .unwrap();
        let text = String::from_utf8(run.stdout).unwrap();
        assert!(run.status.success(), "{isa:?}: {text}");
        assert!(text.contains(&format!("isa {isa:?}\n")), "{text}");
        let lines: Vec<String> = text.lines().filter(|l| l.contains('[')).map(str::to_string).collect();
        assert!(lines.len() > 1000);
        match &first {
            None => first = Some((isa, lines)),
            Some((best, want)) => {
                assert_eq!(lines.len(), want.len());
                let differ: Vec<_> = lines.iter().zip(want).filter(|(a, b)| a != b).collect();
                assert!(
                    differ.is_empty(),
                    "{isa:?} and {best:?} differ in {} of {}: {:?}",
                    differ.len(),
                    want.len(),
                    &differ[..differ.len().min(9)]
                );
            }
        }
    }
}
