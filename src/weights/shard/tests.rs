//! All ranks' parts together are the whole, element by element, in every format; and what ranks compute with them adds up.

mod forms;
mod made;
mod net;

use std::ops::Range;

use proptest::prelude::*;

use self::made::{Format, Made, Sizes, is_quantised, model};
use crate::config::{FfnConfig, ModelConfig, Shard};
use crate::weights::{
    Checkpoint, DType, Data, ExpertTensors, ExpertTriple, FfnTensors, LayerTensors, MixerTensors,
    ModelTensors, Tensor,
};

pub(super) fn shards(world: usize, expert_parallel: bool) -> impl Iterator<Item = Shard> {
    (0..world).map(move |rank| Shard { rank, world, expert_parallel })
}

/// The layer of every rank.
fn ranks(
    layer: &LayerTensors,
    config: &ModelConfig,
    world: usize,
    expert_parallel: bool,
) -> Vec<LayerTensors> {
    shards(world, expert_parallel).map(|shard| layer.sharded(config, shard).unwrap()).collect()
}

/// A matrix of numbers; a vector is a column.
#[derive(Debug, Clone, PartialEq)]
struct Matrix {
    cols: usize,
    data: Vec<f32>,
}

impl Matrix {
    fn of(tensor: &Tensor) -> Self {
        let cols = if tensor.shape.len() == 1 { 1 } else { tensor.num_cols() };
        // Zeros have no sign here.
        Matrix { cols, data: tensor.to_f32().into_iter().map(|x| x + 0.0).collect() }
    }

    fn num_rows(&self) -> usize {
        self.data.len() / self.cols.max(1)
    }

    fn rows(&self, rows: Range<usize>) -> Self {
        Matrix { cols: self.cols, data: self.data[rows.start * self.cols..rows.end * self.cols].to_vec() }
    }

    fn under(list: Vec<Matrix>) -> Self {
        let cols = list[0].cols;
        assert!(list.iter().all(|matrix| matrix.cols == cols));
        Matrix { cols, data: list.into_iter().flat_map(|matrix| matrix.data).collect() }
    }

    fn transposed(&self) -> Self {
        let rows = self.num_rows();
        let data =
            (0..self.cols).flat_map(|c| (0..rows).map(move |r| self.data[r * self.cols + c])).collect();
        Matrix { cols: rows, data }
    }

    /// Rows of zeros up to so many.
    fn with_zeros(mut self, rows: usize) -> Self {
        self.data.resize(rows * self.cols, 0.0);
        self
    }
}

/// The same matrix of each rank, under each other; by rows, or by columns.
fn together(parts: &[LayerTensors], of: impl Fn(&LayerTensors) -> &Tensor, by_columns: bool) -> Matrix {
    let matrix = |layer| {
        let matrix = Matrix::of(of(layer));
        if by_columns { matrix.transposed() } else { matrix }
    };
    Matrix::under(parts.iter().map(matrix).collect())
}

macro_rules! attention {
    ($layer:expr, $field:ident) => {
        match &$layer.mixer {
            MixerTensors::Attention { $field, .. } => $field,
            _ => unreachable!(),
        }
    };
}
macro_rules! delta {
    ($layer:expr, $field:ident) => {
        match &$layer.mixer {
            MixerTensors::DeltaNet { $field, .. } => $field,
            _ => unreachable!(),
        }
    };
}
macro_rules! ffn {
    ($layer:expr, $kind:ident, $field:ident) => {
        match &$layer.ffn {
            FfnTensors::$kind { $field, .. } => $field,
            _ => unreachable!(),
        }
    };
}
pub(super) use {attention, delta, ffn};

/// The experts one by one.
pub(super) fn triples(experts: &ExpertTensors) -> Vec<ExpertTriple> {
    match experts {
        ExpertTensors::PerExpert(list) => list.clone(),
        ExpertTensors::Fused { gate_up_proj, down_proj } => {
            let (num, width, hidden) = (gate_up_proj.shape[0], gate_up_proj.shape[1] / 2, down_proj.shape[1]);
            let one = |e: usize| ExpertTriple {
                gate_proj: numbers(gate_up_proj, 2 * e * width, width),
                up_proj: numbers(gate_up_proj, (2 * e + 1) * width, width),
                down_proj: numbers(down_proj, e * hidden, hidden),
            };
            (0..num).map(one).collect()
        }
    }
}

/// Rows as they are read, in memory.
fn numbers(tensor: &Tensor, first: usize, len: usize) -> Tensor {
    let mut data = vec![0.0; len * tensor.num_cols()];
    tensor.read_rows(first..first + len, &mut data);
    floats(vec![len, tensor.num_cols()], &data)
}

fn floats(shape: Vec<usize>, data: &[f32]) -> Tensor {
    let bytes: Vec<u8> = data.iter().flat_map(|x| x.to_le_bytes()).collect();
    Tensor { name: "x.weight".into(), dtype: DType::F32, shape, data: Data::Owned(bytes.into()) }
}

fn check_mixer(whole: &LayerTensors, parts: &[LayerTensors], config: &ModelConfig) {
    let world = parts.len();
    match &whole.mixer {
        MixerTensors::Attention { q_proj, k_proj, v_proj, o_proj, q_norm, k_norm } => {
            let dims = &config.attention;
            assert_eq!(together(parts, |l| attention!(l, q_proj), false), Matrix::of(q_proj));
            assert_eq!(together(parts, |l| attention!(l, o_proj), true), Matrix::of(o_proj).transposed());
            for (rank, part) in parts.iter().enumerate() {
                // The heads that its query heads read.
                let q = dims.num_q_heads / world;
                let per_kv = dims.num_q_heads / dims.num_kv_heads;
                let kv = rank * q / per_kv..((rank + 1) * q - 1) / per_kv + 1;
                let rows = kv.start * dims.head_dim..kv.end * dims.head_dim;
                assert_eq!(Matrix::of(attention!(part, k_proj)), Matrix::of(k_proj).rows(rows.clone()));
                assert_eq!(Matrix::of(attention!(part, v_proj)), Matrix::of(v_proj).rows(rows));
                assert_eq!(Matrix::of(attention!(part, q_norm)), Matrix::of(q_norm));
                assert_eq!(Matrix::of(attention!(part, k_norm)), Matrix::of(k_norm));
            }
        }
        MixerTensors::DeltaNet {
            in_proj_qkv,
            in_proj_z,
            in_proj_b,
            in_proj_a,
            conv1d,
            a_log,
            dt_bias,
            norm,
            out_proj,
        } => {
            let keys = config.delta.key_width();
            let sections = |whole: &Tensor, part: &dyn Fn(&LayerTensors) -> &Tensor| {
                let whole = Matrix::of(whole);
                let own = keys / world;
                let section = |rows: Range<usize>| {
                    let rows = |l: &LayerTensors| {
                        let part = Matrix::of(part(l));
                        let end = rows.end.min(part.num_rows());
                        part.rows(rows.start..end)
                    };
                    Matrix::under(parts.iter().map(rows).collect())
                };
                assert_eq!(section(0..own), whole.rows(0..keys));
                assert_eq!(section(own..2 * own), whole.rows(keys..2 * keys));
                assert_eq!(section(2 * own..usize::MAX), whole.rows(2 * keys..whole.num_rows()));
            };
            sections(in_proj_qkv, &|l| delta!(l, in_proj_qkv));
            sections(conv1d, &|l| delta!(l, conv1d));
            assert_eq!(together(parts, |l| delta!(l, in_proj_z), false), Matrix::of(in_proj_z));
            assert_eq!(together(parts, |l| delta!(l, in_proj_b), false), Matrix::of(in_proj_b));
            assert_eq!(together(parts, |l| delta!(l, in_proj_a), false), Matrix::of(in_proj_a));
            assert_eq!(together(parts, |l| delta!(l, a_log), false), Matrix::of(a_log));
            assert_eq!(together(parts, |l| delta!(l, dt_bias), false), Matrix::of(dt_bias));
            assert_eq!(together(parts, |l| delta!(l, out_proj), true), Matrix::of(out_proj).transposed());
            assert!(parts.iter().all(|l| Matrix::of(delta!(l, norm)) == Matrix::of(norm)));
        }
    }
}

/// Gate, up and down of each rank against the whole, whose width is followed by zeros.
fn check_triple(whole: [&Tensor; 3], parts: &[[Tensor; 3]]) {
    let [gate, up, down] = whole.map(Matrix::of);
    let join = |i: usize, by_columns: bool| {
        let matrix = |part: &[Tensor; 3]| {
            let matrix = Matrix::of(&part[i]);
            if by_columns { matrix.transposed() } else { matrix }
        };
        Matrix::under(parts.iter().map(matrix).collect())
    };
    let local = parts[0][0].num_rows();
    assert!(
        parts
            .iter()
            .all(|[gate, up, down]| { [gate.num_rows(), up.num_rows(), down.num_cols()] == [local; 3] })
    );
    let all = local * parts.len();
    assert_eq!(join(0, false), gate.with_zeros(all));
    assert_eq!(join(1, false), up.with_zeros(all));
    assert_eq!(join(2, true), down.transposed().with_zeros(all));
}

fn check_ffn(whole: &LayerTensors, parts: &[LayerTensors], expert_parallel: bool) {
    let clones = |list: [&Tensor; 3]| list.map(Tensor::clone);
    match &whole.ffn {
        FfnTensors::Dense { gate_proj, up_proj, down_proj } => {
            let part = |l: &LayerTensors| {
                clones([ffn!(l, Dense, gate_proj), ffn!(l, Dense, up_proj), ffn!(l, Dense, down_proj)])
            };
            check_triple([gate_proj, up_proj, down_proj], &parts.iter().map(part).collect::<Vec<_>>());
        }
        FfnTensors::Moe {
            gate,
            experts,
            shared_gate_proj,
            shared_up_proj,
            shared_down_proj,
            shared_expert_gate,
        } => {
            let part = |l: &LayerTensors| {
                let (gate, up) = (ffn!(l, Moe, shared_gate_proj), ffn!(l, Moe, shared_up_proj));
                clones([gate, up, ffn!(l, Moe, shared_down_proj)])
            };
            let shared: Vec<_> = parts.iter().map(part).collect();
            check_triple([shared_gate_proj, shared_up_proj, shared_down_proj], &shared);
            for part in parts {
                assert_eq!(Matrix::of(ffn!(part, Moe, gate)), Matrix::of(gate));
                assert_eq!(Matrix::of(ffn!(part, Moe, shared_expert_gate)), Matrix::of(shared_expert_gate));
            }
            let list = |e: &ExpertTriple| [e.gate_proj.clone(), e.up_proj.clone(), e.down_proj.clone()];
            let whole = triples(experts);
            let parts: Vec<Vec<_>> = parts.iter().map(|l| triples(ffn!(l, Moe, experts))).collect();
            let held: usize = parts.iter().map(Vec::len).sum();
            assert_eq!(held, whole.len() * if expert_parallel { 1 } else { parts.len() });
            for (e, whole) in whole.iter().enumerate() {
                let of: Vec<_> = match expert_parallel {
                    true => vec![list(parts.concat().get(e).unwrap())],
                    false => parts.iter().map(|part| list(&part[e])).collect(),
                };
                check_triple([&whole.gate_proj, &whole.up_proj, &whole.down_proj], &of);
            }
        }
    }
}

/// That shapes are those of the local geometry, whatever the layer's experts are stored as.
fn check_shapes(parts: &[LayerTensors], config: &ModelConfig, index: usize, expert_parallel: bool) {
    for (shard, part) in shards(parts.len(), expert_parallel).zip(parts) {
        let local = config.sharded(shard).unwrap();
        let want = ModelTensors::resolve(&Checkpoint::random(), &local).unwrap().layers.swap_remove(index);
        let shapes = |layer: &LayerTensors| -> Vec<_> {
            let is_expert = |tensor: &&Tensor| !tensor.name.contains(".experts.");
            layer.tensors().into_iter().filter(is_expert).map(|tensor| tensor.shape.clone()).collect()
        };
        assert_eq!(shapes(part), shapes(&want), "{shard:?}");
        if let FfnConfig::Moe { num_experts, expert_width, .. } = local.ffn {
            let experts = ffn!(part, Moe, experts);
            let sum = |list: Vec<Tensor>| list.iter().map(Tensor::num_rows).sum::<usize>();
            let held = shard.experts(num_experts).len();
            assert_eq!(sum(experts.gate_up()), held * 2 * expert_width);
            assert_eq!(sum(experts.down()), held * config.hidden);
            assert!(experts.down().iter().all(|tensor| tensor.num_cols() == expert_width));
        }
    }
}

/// That what was encoded still is.
fn check_forms(whole: &LayerTensors, parts: &[LayerTensors]) {
    let quantised = |layer: &LayerTensors, wanted: bool| {
        let tensors = layer.tensors().into_iter().filter(|tensor| is_quantised(&tensor.name));
        tensors.filter(|tensor| tensor.encoded().is_some() == wanted).count()
    };
    if quantised(whole, true) > 0 {
        assert!(parts.iter().all(|part| quantised(part, false) == 0));
    }
}

fn check(made: &Made, world: usize, expert_parallel: bool) {
    let layers = made.tensors.layers.iter().chain([&made.mtp.layer]);
    // The module's layer is one of attention.
    for (layer, index) in layers.zip([0, 1, 1]) {
        let parts = ranks(layer, &made.config, world, expert_parallel);
        check_mixer(layer, &parts, &made.config);
        check_ffn(layer, &parts, expert_parallel);
        check_shapes(&parts, &made.config, index, expert_parallel);
        check_forms(layer, &parts);
        net::check_sums(layer, &parts, &made.config, expert_parallel);
    }
}

prop_compose! {
    fn sizes()(world in prop::sample::select(vec![1usize, 2, 3, 4, 8]))(
        world in Just(world),
        hidden in prop::sample::select(vec![16usize, 48, 64]),
        num_k_heads in 1..3usize,
        per_k_head in 1..4usize,
        k_dim in prop::sample::select(vec![8usize, 16]),
        v_dim in prop::sample::select(vec![16usize, 32]),
        num_q_heads in 1..3usize,
        // So many per rank, or ranks per head.
        num_kv_heads in 0..4usize,
        head_dim in prop::sample::select(vec![16usize, 32]),
        // In sixteenths of a step of 16 for all ranks.
        width in 1..9usize,
        num_experts in prop::option::of(1..3usize),
    ) -> (usize, Sizes) {
        let num_q_heads = world * num_q_heads;
        let divides = |&n: &usize| num_q_heads.is_multiple_of(n) && (n.is_multiple_of(world) || world.is_multiple_of(n));
        let possible: Vec<usize> = (1..=num_q_heads).filter(divides).collect();
        let sizes = Sizes {
            hidden,
            vocab: 24,
            num_k_heads: world * num_k_heads,
            per_k_head, k_dim, v_dim, num_q_heads,
            num_kv_heads: possible[num_kv_heads % possible.len()],
            head_dim,
            width: 16 * width * if world == 3 { 3 } else { world.div_ceil(2) },
            num_experts: num_experts.map(|n| n * world.max(2)),
        };
        (world, sizes)
    }
}

fn formats() -> impl Strategy<Value = Format> {
    prop::sample::select(vec![
        Format::Bf16,
        Format::Fp8([16, 24]),
        Format::Fp8([32, 32]),
        Format::Fp8([128, 128]),
        Format::Fp8Rows,
        Format::Fp8Whole,
        Format::Gptq(32),
        Format::Gptq(128),
        Format::Awq(32),
        Format::Awq(64),
        Format::Packed(32),
        Format::Packed(48),
        Format::PackedZeros(32),
        Format::PackedZeros(128),
        Format::ModeloptFp4,
        Format::PackedFp4,
    ])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(160))]

    #[test]
    fn parts_make_the_whole((world, sizes) in sizes(), format in formats(), ep in any::<bool>(), fused in any::<bool>(), seed in any::<u64>()) {
        // Stacks are of floats, or of 8 bits.
        let fused = fused && matches!(format, Format::Bf16 | Format::Fp8(_) | Format::Fp8Rows | Format::Fp8Whole);
        let made = model(&sizes, format, fused, seed);
        check(&made, world, ep && sizes.num_experts.is_some());
    }
}
