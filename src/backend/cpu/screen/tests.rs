//! The screen against the whole product: the same largest logits, to the bit, and few rows read.

use super::{MIN_ROWS, Screen};
use crate::backend::cpu::linear::Linear;
use crate::backend::cpu::linear::tests::{numbers, owned};
use crate::weights::DType;

/// The k largest, best first, lower index first among equals.
fn top(row: &[f32], k: usize) -> Vec<(u32, usize)> {
    let mut order: Vec<usize> = (0..row.len()).filter(|&i| !row[i].is_nan()).collect();
    order.sort_by(|&a, &b| row[b].partial_cmp(&row[a]).unwrap().then(a.cmp(&b)));
    order.into_iter().take(k).map(|i| (row[i].to_bits(), i)).collect()
}

/// Checks every token's k largest; returns the share of the rows that were computed.
fn check(w: &Linear, x: &[f32], num_rows: usize, k: usize, num_tokens: usize) -> f64 {
    let screen = Screen::new(w).unwrap();
    let mut whole = vec![f32::NAN; num_rows * w.num_out];
    let mut screened = whole.clone();
    w.forward(x, &mut whole, num_rows);
    assert!(screen.top_logits(w, x, num_rows, k, num_tokens, &mut screened));
    let mut computed = 0;
    for (a, b) in whole.chunks_exact(w.num_out).zip(screened.chunks_exact(w.num_out)) {
        assert_eq!(top(&a[..num_tokens], k), top(&b[..num_tokens], k));
        for (i, (a, b)) in a.iter().zip(b).enumerate() {
            let left_out = *b == f32::NEG_INFINITY;
            assert!(left_out || a.to_bits() == b.to_bits(), "logit {i}: {a} and {b}");
            assert!(left_out || i < num_tokens, "padding row {i} was computed");
            computed += usize::from(!left_out);
        }
    }
    computed as f64 / (num_rows * num_tokens) as f64
}

#[test]
fn the_largest_logits_are_exact_and_few_are_computed() {
    for dtype in [DType::BF16, DType::F32, DType::F16] {
        for (num_in, num_out) in [(256, MIN_ROWS + 128), (100, MIN_ROWS + 67), (1024, 6000)] {
            let w = owned(&numbers(num_in * num_out, 1), num_in, dtype);
            for num_rows in [1, 2, 3, 4, 5, 8] {
                let x = numbers(num_rows * num_in, num_rows as u64);
                for (k, most) in [(1, 0.1), (5, 0.2), (16, 0.4)] {
                    let share = check(&w, &x, num_rows, k, num_out - 5);
                    assert!(share < most, "{dtype:?} {num_in}x{num_out}, {k} of {num_rows}: {share}");
                }
            }
        }
    }
}

#[test]
fn rows_that_are_hard_to_tell_apart() {
    let (num_in, num_out) = (64, MIN_ROWS + 130);
    let mut data = numbers(num_in * num_out, 3);
    // Equal rows, rows one rounding apart, huge and tiny ones, and rows that are no numbers.
    for row in 0..num_out {
        let values = &mut data[row * num_in..(row + 1) * num_in];
        match row % 50 {
            0..5 => values.copy_from_slice(&numbers(num_in, 9)),
            5..10 => {
                values.copy_from_slice(&numbers(num_in, 9));
                let k = row % num_in;
                values[k] = f32::from_bits(values[k].to_bits() + 1);
            }
            10 => values.iter_mut().for_each(|x| *x *= 1e-30),
            11 => values.fill(0.0),
            12 => values[7] = f32::NAN,
            13 => values[3] *= 30.0,
            14 => values.iter_mut().for_each(|x| *x *= 1e-42),
            _ => {}
        }
    }
    for dtype in [DType::F32, DType::BF16] {
        let w = owned(&data, num_in, dtype);
        for salt in 0..4 {
            let mut x = numbers(num_in, 20 + salt);
            if salt == 3 {
                x.copy_from_slice(&numbers(num_in, 9)); // the equal rows are the best
            }
            for k in [1, 2, 16] {
                check(&w, &x, 1, k, num_out);
            }
            x.iter_mut().for_each(|x| *x *= 1e30);
            check(&w, &x, 1, 3, num_out);
        }
    }
    // Sums that overflow, or that are below what f32 tells apart: the whole product decides.
    let w = owned(&data, num_in, DType::F32);
    for size in [1e36, 1e-30, 0.0] {
        let x: Vec<f32> = numbers(num_in, 5).iter().map(|x| x * size).collect();
        let mut out = vec![0.0; num_out];
        assert!(!Screen::new(&w).unwrap().top_logits(&w, &x, 1, 1, num_out, &mut out), "{size}");
    }
    let infinite: Vec<f32> = (0..num_in).map(|i| if i == 3 { f32::INFINITY } else { 1.0 }).collect();
    let w = owned(&data, num_in, DType::BF16);
    let mut out = vec![0.0; num_out];
    assert!(!Screen::new(&w).unwrap().top_logits(&w, &infinite, 1, 1, num_out, &mut out), "no bound holds");
}

#[test]
fn a_small_head_is_not_copied() {
    assert!(Screen::new(&owned(&numbers(4 * 32, 1), 4, DType::BF16)).is_none());
}
