//! Matrix products against plain sums in f64.

use super::{Data, Linear, Part};
use crate::backend::cpu::gemm::Panel;
use crate::backend::cpu::packed::Packed;
use crate::backend::cpu::parallel::Shared;
use crate::weights::DType;

/// Numbers in -2..2, the same for the same salt.
pub(crate) fn numbers(n: usize, salt: u64) -> Vec<f32> {
    (0..n).map(|i| (crate::sampler::uniform(salt, i as u64) * 4.0 - 2.0) as f32).collect()
}

/// A matrix of these numbers, rounded to `dtype`.
pub(crate) fn owned(data: &[f32], num_in: usize, dtype: DType) -> Linear {
    let part = |data: &[f32], start: usize| {
        let bytes: Vec<u8> = match dtype {
            DType::BF16 => data.iter().flat_map(|&x| half::bf16::from_f32(x).to_ne_bytes()).collect(),
            DType::F16 => data.iter().flat_map(|&x| half::f16::from_f32(x).to_ne_bytes()).collect(),
            _ => data.iter().flat_map(|x| x.to_ne_bytes()).collect(),
        };
        Part { rows: start..start + data.len() / num_in, data: Data::Owned(bytes, dtype) }
    };
    // Two parts, as q, k and v of a layer are.
    let num_out = data.len() / num_in;
    let cut = num_out / 3;
    let (a, b) = data.split_at(cut * num_in);
    Linear { parts: vec![part(a, 0), part(b, cut)], num_in, num_out }
}

const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// [`owned`] in every form that a matrix of that dtype can have.
pub(crate) fn forms(data: &[f32], num_in: usize, dtype: DType) -> Vec<Linear> {
    let plain = owned(data, num_in, dtype);
    if dtype != DType::BF16 {
        return vec![plain];
    }
    let mut packed = owned(data, num_in, dtype);
    for part in &mut packed.parts {
        part.data = match &part.data {
            Data::Owned(bytes, DType::BF16) => Data::Packed(Packed::new(bytes, num_in)),
            _ => unreachable!(),
        };
    }
    vec![plain, packed]
}

/// Numbers whose exponents spread here and there, zeros, infinities and NaN among them.
fn uneven(n: usize, salt: u64) -> Vec<f32> {
    let odd = |i: usize, x: f32| match (crate::sampler::uniform(salt ^ 7, i as u64) * 4000.0) as u32 {
        0 => 0.0,
        1 => x * 1e-30,
        2 => x * 1e20,
        3 => -0.0,
        _ => x,
    };
    numbers(n, salt).into_iter().enumerate().map(|(i, x)| odd(i, x)).collect()
}

#[test]
fn packed_rows_are_the_same_bits() {
    for num_in in [1, 31, 127, 128, 129, 160, 255, 256, 384, 1000] {
        for num_out in [1, 2, 3, 4, 5, 7, 255, 256, 257, 300] {
            let mut data = uneven(num_in * num_out, 5);
            for (i, x) in
                [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE / 4.0].into_iter().enumerate()
            {
                let n = data.len();
                data[(i * 7919) % n] = x;
            }
            let [plain, packed] = <[Linear; 2]>::try_from(forms(&data, num_in, DType::BF16)).ok().unwrap();
            let (mut a, mut b) = (vec![0.0; num_in], vec![0.0; num_in]);
            for row in 0..num_out {
                plain.read_row(row, &mut a);
                packed.read_row(row, &mut b);
                assert!(
                    a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{num_in} {num_out} {row}"
                );
            }
        }
    }
}

#[test]
fn packed_products_are_the_same_bits() {
    for (num_in, num_out) in [(128, 9), (384, 70), (1000, 300), (100, 5), (1024, 64)] {
        let [plain, packed] =
            <[Linear; 2]>::try_from(forms(&uneven(num_in * num_out, 6), num_in, DType::BF16)).ok().unwrap();
        for num_rows in [1, 2, 3, 4, 7, 8, 12, 25, 64] {
            let x = numbers(num_rows * num_in, 2);
            let product = |w: &Linear| {
                let mut out = vec![f32::NAN; num_rows * num_out];
                w.forward(&x, &mut out, num_rows);
                out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            assert!(product(&plain) == product(&packed), "{num_in} {num_out} {num_rows}");
            // Some of the features, from any row on, as experts are computed.
            for (first, n) in [(1, 3), (num_out / 2, num_out / 2), (num_out - 1, 1), (2, num_out - 2)] {
                let part = |w: &Linear| {
                    let mut out = vec![f32::NAN; num_rows * n];
                    let at = Shared::new(&mut out);
                    let row = |t: usize| x[t * num_in..].as_ptr();
                    // SAFETY: there are these features, tokens, and room.
                    unsafe {
                        let panel = Panel::new(num_rows, num_in, row, false);
                        w.rows(first..first + n, num_rows, row, panel.as_ref(), |t| at.get().add(t * n));
                    }
                    out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                };
                assert!(part(&plain) == part(&packed), "{num_in} {num_out} {num_rows} {first}");
            }
        }
    }
}

#[test]
fn packing_saves_a_quarter_of_an_ordinary_matrix() {
    let (num_in, num_out) = (1024, 256);
    let normal = |i: usize| {
        let u = |k: u64| crate::sampler::uniform(k, i as u64).max(1e-12);
        ((-2.0 * u(1).ln()).sqrt() * (std::f64::consts::TAU * u(2)).cos() * 0.02) as f32
    };
    let data: Vec<f32> = (0..num_in * num_out).map(normal).collect();
    let bytes: Vec<u8> = data.iter().flat_map(|&x| half::bf16::from_f32(x).to_ne_bytes()).collect();
    let packed = Packed::new(&bytes, num_in);
    let share = packed.num_bytes() as f64 / bytes.len() as f64;
    assert!((0.75..0.77).contains(&share), "{share}");
}

#[test]
fn products_equal_sums() {
    for dtype in DTYPES {
        for num_in in [1, 15, 16, 17, 31, 100] {
            for num_out in [1, 2, 3, 4, 7, 33] {
                let w = owned(&numbers(num_in * num_out, 1), num_in, dtype);
                let mut wide = vec![0.0; num_in * num_out];
                wide.chunks_exact_mut(num_in).enumerate().for_each(|(i, row)| w.read_row(i, row));
                for num_rows in [0, 1, 2, 5, 6, 7, 8, 13, 64] {
                    let x = numbers(num_rows * num_in, 2);
                    let mut out = vec![f32::NAN; num_rows * num_out + 1];
                    w.forward(&x, &mut out, num_rows);
                    assert!(out[num_rows * num_out].is_nan(), "writes past the end");
                    for t in 0..num_rows {
                        let x = &x[t * num_in..(t + 1) * num_in];
                        let mut alone = vec![0.0; num_out];
                        w.forward(x, &mut alone, 1);
                        for o in 0..num_out {
                            let terms =
                                x.iter().zip(&wide[o * num_in..]).map(|(&x, &w)| f64::from(x) * f64::from(w));
                            let (sum, size) = terms.fold((0.0, 0.0), |(s, a), x| (s + x, a + x.abs()));
                            let got = out[t * num_out + o];
                            let bound = size * f64::from(f32::EPSILON) * (num_in as f64 / 16.0 + 6.0);
                            assert!(
                                (f64::from(got) - sum).abs() <= bound,
                                "{dtype:?} {num_in}x{num_out}: {got}, {sum}"
                            );
                            assert_eq!(got.to_bits(), alone[o].to_bits(), "a row depends on its batch");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn large_products_give_each_row_its_own_bits() {
    // More features than a panel holds, more of k than a block: the same sums as one row alone.
    for dtype in DTYPES {
        for (num_in, num_out, num_rows) in [(700, 130, 33), (2500, 70, 17), (5000, 67, 9), (33, 1000, 64)] {
            let w = owned(&numbers(num_in * num_out, 1), num_in, dtype);
            let x = numbers(num_rows * num_in, 2);
            let (mut all, mut alone) = (vec![f32::NAN; num_rows * num_out], vec![0.0; num_out]);
            w.forward(&x, &mut all, num_rows);
            for (x, row) in x.chunks_exact(num_in).zip(all.chunks_exact(num_out)) {
                w.forward(x, &mut alone, 1);
                assert!(
                    row.iter().zip(&alone).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{dtype:?} {num_in}"
                );
            }
        }
    }
}

#[test]
fn rows_are_widened_exactly() {
    let data = numbers(7 * 19, 3);
    for dtype in DTYPES {
        let w = owned(&data, 19, dtype);
        let mut row = vec![0.0; 19];
        for i in 0..7 {
            w.read_row(i, &mut row);
            for (got, &x) in row.iter().zip(&data[i * 19..]) {
                let want = match dtype {
                    DType::BF16 => half::bf16::from_f32(x).to_f32(),
                    DType::F16 => half::f16::from_f32(x).to_f32(),
                    _ => x,
                };
                assert_eq!(*got, want);
            }
        }
    }
}

#[test]
fn tensors_are_converted_where_another_dtype_is_wished() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data/dense_bf16");
    let config = crate::config::ModelConfig::from_dir(&path).unwrap();
    let checkpoint = crate::weights::Checkpoint::open(&path).unwrap();
    let tensor = crate::weights::ModelTensors::resolve(&checkpoint, &config).unwrap().embed_tokens;
    let plain = tensor.to_f32();
    let width = config.hidden;
    for (dtype, exact) in
        [(None, true), (Some(DType::F32), true), (Some(DType::BF16), true), (Some(DType::F16), false)]
    {
        let w = Linear::new(&[tensor.clone(), tensor.clone()], dtype);
        assert_eq!((w.num_in, w.num_out), (width, 2 * config.vocab));
        let mut row = vec![0.0; width];
        for i in [0, config.vocab - 1, config.vocab, 2 * config.vocab - 1] {
            w.read_row(i, &mut row);
            for (got, want) in row.iter().zip(&plain[i % config.vocab * width..]) {
                let want = if exact { *want } else { half::f16::from_f32(*want).to_f32() };
                assert_eq!(*got, want);
            }
        }
    }
}
