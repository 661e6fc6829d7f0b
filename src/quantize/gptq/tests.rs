//! Against the paper's algorithm in f64, inverse and all, and against the recorded one of numpy
//! (`tests/golden/make_gptq.py`).

use std::path::Path;

use half::bf16;

use super::{Curvature, Hessian};
use crate::random::mix;
use crate::weights::Checkpoint;
use crate::weights::quant::{dequantise_int4, quantise_int4};

fn draw(len: usize, seed: u64) -> Vec<f32> {
    let number = |i: u64| (mix(mix(seed).wrapping_add(i)) >> 40) as f32 / 8_388_608.0 - 1.0;
    (0..len as u64).map(number).collect()
}

fn weights(rows: usize, k: usize, seed: u64) -> Vec<f32> {
    draw(rows * k, seed).iter().map(|x| bf16::from_f32(0.05 * x).to_f32()).collect()
}

/// Tokens whose elements go together, and of different sizes.
fn inputs(tokens: usize, k: usize, seed: u64) -> Vec<f32> {
    let (noise, common, mixing) = (draw(tokens * k, seed), draw(tokens * 8, seed + 1), draw(8 * k, seed + 2));
    let element = |t: usize, i: usize| {
        let shared: f32 = (0..8).map(|c| common[t * 8 + c] * mixing[c * k + i]).sum();
        (shared + 0.3 * noise[t * k + i]) * if i % 17 == 3 { 4.0 } else { 1.0 }
    };
    (0..tokens * k).map(|at| element(at / k, at % k)).collect()
}

fn hessian(x: &[f32], k: usize) -> Hessian {
    let mut hessian = Hessian::new(k);
    // In two pieces, and elements behind a row do not count.
    let rows: Vec<&[f32]> = (0..x.len() / k).map(|t| &x[t * k..]).collect();
    let (first, second) = rows.split_at(rows.len() / 3);
    hessian.add(first);
    hessian.add(&[]);
    hessian.add(second);
    hessian
}

/// `sum x xᵀ`
fn exact(x: &[f32], k: usize) -> Vec<f64> {
    let mut h = vec![0.0; k * k];
    for x in x.chunks(k) {
        for i in 0..k {
            h[i * k..(i + 1) * k].iter_mut().zip(x).for_each(|(h, y)| *h += f64::from(x[i]) * f64::from(*y));
        }
    }
    h
}

/// `sum e H eᵀ`
fn exact_norm(e: &[f64], h: &[f64], k: usize) -> f64 {
    let row = |e: &[f64]| (0..k * k).map(|at| e[at / k] * h[at] * e[at % k]).sum::<f64>();
    e.chunks(k).map(row).sum()
}

/// The inverse by Gauss and Jordan.
fn inverse(mut a: Vec<f64>, k: usize) -> Vec<f64> {
    let mut b: Vec<f64> = (0..k * k).map(|at| f64::from(u8::from(at / k == at % k))).collect();
    for p in 0..k {
        let pivot = a[p * k + p];
        for j in 0..k {
            a[p * k + j] /= pivot;
            b[p * k + j] /= pivot;
        }
        for i in (0..k).filter(|&i| i != p) {
            let x = a[i * k + p];
            for j in 0..k {
                a[i * k + j] -= x * a[p * k + j];
                b[i * k + j] -= x * b[p * k + j];
            }
        }
    }
    b
}

/// Takes input `j` out of the inverse: what it then is of the inputs that are left.
fn eliminate(inverse: &mut [f64], k: usize, j: usize) {
    let (row, pivot) = (inverse[j * k..(j + 1) * k].to_vec(), inverse[j * k + j]);
    for i in 0..k {
        for l in 0..k {
            inverse[i * k + l] -= row[i] * row[l] / pivot;
        }
    }
}

/// Column after column, with the inverse updated after each: numbers and scales.
fn paper(w: &[f32], k: usize, group: usize, h: &[f64], damping: f64) -> (Vec<f64>, Vec<f32>) {
    let mean = (0..k).map(|i| h[i * k + i]).sum::<f64>() / k as f64;
    let damped = (0..k * k).map(|at| h[at] + if at / k == at % k { damping * mean } else { 0.0 }).collect();
    let mut left = inverse(damped, k);
    let mut w: Vec<f64> = w.iter().map(|&x| f64::from(x)).collect();
    let rows = w.len() / k;
    let mut scales = vec![0f32; rows * k / group];
    for j in 0..k {
        if j % group == 0 {
            let (mut ahead, mut costs) = (left.clone(), Vec::new());
            for i in j..j + group {
                costs.push(1.0 / ahead[i * k + i]);
                eliminate(&mut ahead, k, i);
            }
            for r in 0..rows {
                let w = &w[r * k + j..r * k + j + group];
                let most = w.iter().fold(0.0, |most, x| f64::max(most, x.abs()));
                let candidate = |i: usize| bf16::from_f64(most * (1.0 - i as f64 / 32.0) / 7.0).to_f32();
                let error = |scale: f64| -> f64 {
                    w.iter().zip(&costs).map(|(x, cost)| cost * (x - nearest(*x, scale)).powi(2)).sum()
                };
                let errors = (0..8).map(|i| (candidate(i), error(f64::from(candidate(i)))));
                let best = errors.reduce(|a, b| if b.1 < a.1 { b } else { a }).unwrap();
                scales[r * (k / group) + j / group] = best.0;
            }
        }
        for r in 0..rows {
            let scale = f64::from(scales[r * (k / group) + j / group]);
            let chosen = nearest(w[r * k + j], scale);
            let error = (w[r * k + j] - chosen) / left[j * k + j];
            for l in j + 1..k {
                w[r * k + l] -= error * left[j * k + l];
            }
            w[r * k + j] = chosen;
        }
        eliminate(&mut left, k, j);
    }
    (w, scales)
}

fn nearest(x: f64, scale: f64) -> f64 {
    if scale > 0.0 { (x / scale).round_ties_even().clamp(-8.0, 7.0) * scale } else { 0.0 }
}

/// Codes as numbers, and the scales.
fn fed_back(curvature: &Curvature, w: &[f32], k: usize, group: usize) -> (Vec<f32>, Vec<f32>) {
    let (mut codes, mut scales) = (vec![99; w.len()], vec![f32::NAN; w.len() / group]);
    curvature.quantise_int4(w, group, &mut codes, &mut scales);
    assert!(codes.iter().all(|&code| code < 16));
    let mut numbers = vec![f32::NAN; w.len()];
    dequantise_int4(&codes, k, group, &scales, &mut numbers);
    (numbers, scales)
}

fn off(w: &[f32], numbers: &[f32]) -> Vec<f64> {
    w.iter().zip(numbers).map(|(&x, &y)| f64::from(x) - f64::from(y)).collect()
}

/// Shapes within a block of 128 columns and beyond one, and rows for several threads.
const SHAPES: [(usize, usize, usize); 6] =
    [(3, 32, 32), (5, 64, 32), (70, 160, 32), (4, 192, 64), (9, 256, 128), (2, 384, 128)];

#[test]
fn codes_are_those_of_the_paper() {
    let mut gain = Vec::new();
    for (seed, (rows, k, group)) in SHAPES.into_iter().enumerate() {
        let seed = 10 * seed as u64;
        let (w, x) = (weights(rows, k, seed), inputs(2 * k, k, seed + 1));
        let curvature = Curvature::new(hessian(&x, k)).unwrap();
        assert_eq!((curvature.damping, curvature.num_tokens), (0.01, 2 * k));
        let h = exact(&x, k);
        let (want, want_scales) = paper(&w, k, group, &h, 0.01);
        let (got, scales) = fed_back(&curvature, &w, k, group);
        assert_eq!(scales, want_scales, "{k}");
        let different = got.iter().zip(&want).filter(|(x, y)| (f64::from(**x) - **y).abs() > 1e-7).count();
        assert_eq!(different, 0, "{k}");

        let mut rounded = vec![0.0; w.len()];
        let (mut codes, mut scales) = (vec![0; w.len()], vec![0.0; w.len() / group]);
        quantise_int4(&w, k, group, &mut codes, &mut scales);
        dequantise_int4(&codes, k, group, &scales, &mut rounded);
        let norm = |numbers: &[f32]| exact_norm(&off(&w, numbers), &h, k);
        gain.push(norm(&got) / norm(&rounded));
        for numbers in [&got, &rounded, &vec![0.0; w.len()]] {
            let e: Vec<f32> = w.iter().zip(numbers).map(|(x, y)| x - y).collect();
            let (found, want) = (curvature.norm(&e), norm(numbers));
            assert!((found / want - 1.0).abs() < 1e-3, "{k}: {found} {want}");
        }
    }
    assert!(gain.iter().all(|gain| *gain < 0.8), "{gain:?}");
}

#[test]
fn codes_are_those_of_the_recorded_runs() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gptq.safetensors");
    let recorded = Checkpoint::open(&path).unwrap();
    let mut seen = 0;
    for group in [32, 64, 128] {
        let part = |name: &str| recorded.get(&format!("{group}.{name}")).unwrap();
        let (w, x, k) = (part("weight").to_f32(), part("inputs").to_f32(), part("weight").num_cols());
        let (want, want_scales) = (part("numbers").to_f32(), part("scales").to_f32());
        let (got, scales) = fed_back(&Curvature::new(hessian(&x, k)).unwrap(), &w, k, group);
        assert_eq!((scales, got), (want_scales, want), "{group}");
        seen += w.len();
    }
    assert!(seen > 3000);
}

#[test]
fn damping_grows_where_it_must() {
    let k = 64;
    // One token, twice: of rank one.
    let x = draw(k, 5);
    let curvature = Curvature::new(hessian(&[&x[..], &x[..]].concat(), k)).unwrap();
    assert_eq!(curvature.damping, 0.01);
    let of =
        |sum: Vec<f32>| Curvature::new(Hessian { sum, k, num_tokens: 1 }).map(|curvature| curvature.damping);
    // A diagonal of ones but for an element: no sum of squares, and definite only with more than 0.5.
    let diagonal = |x: f32| -> Vec<f32> {
        (0..k * k)
            .map(|at| {
                if at / k != at % k {
                    0.0
                } else if at == 0 {
                    x
                } else {
                    1.0
                }
            })
            .collect()
    };
    assert_eq!(of(diagonal(1.0)), Some(0.01));
    assert_eq!(of(diagonal(-0.05)), Some(0.1));
    assert_eq!(of(diagonal(-0.5)), Some(1.0));
    assert_eq!(of(diagonal(-5.0)), Some(10.0));
    assert_eq!(of(diagonal(-20.0)), None);
    assert_eq!(of(diagonal(f32::NAN)), None);
    assert_eq!(of(vec![0.0; k * k]), None);
}

/// Inputs that go their own ways: nothing can be made up for, and scales are those of rounding.
#[test]
fn without_correlation_nothing_is_fed_back() {
    let (rows, k, group) = (3, 160, 32);
    let w = weights(rows, k, 77);
    let sum = (0..k * k).map(|at| f32::from(u8::from(at / k == at % k))).collect();
    let curvature = Curvature::new(Hessian { sum, k, num_tokens: 1 }).unwrap();
    let (got, _) = fed_back(&curvature, &w, k, group);
    let (mut codes, mut scales, mut want) =
        (vec![0; w.len()], vec![0.0; w.len() / group], vec![0.0; w.len()]);
    quantise_int4(&w, k, group, &mut codes, &mut scales);
    dequantise_int4(&codes, k, group, &scales, &mut want);
    assert_eq!(got, want);
}
