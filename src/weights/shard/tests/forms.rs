//! What a part is made of: the mapped file where it can be, codes as they were, random elements, heads in GGUF's order; and
//! the family's own sizes.

use std::sync::Arc;

use super::made::{Draw, Format, Made, Sizes, model};
use super::{Matrix, attention, check_ffn, check_mixer, check_shapes, delta, ffn, ranks, shards};
use crate::config::{Fp8Rule, Int4Rule, LayerKind, ModelConfig, QuantConfig, QuantMethod, Shard};
use crate::gguf::TensorType;
use crate::plan::family_config;
use crate::weights::quant::{Encoded, Fp8, Gguf, HeadOrder, Moved, Quantization, Scheme};
use crate::weights::{
    Checkpoint, DType, Data, ExpertTensors, FfnTensors, LayerTensors, MixerTensors, ModelTensors, MtpTensors,
    Tensor, safetensors,
};

/// Like a small member of the family: heads of 64 and 128, widths of whole blocks.
const SIZES: Sizes = Sizes {
    hidden: 256,
    vocab: 24,
    num_k_heads: 8,
    per_k_head: 2,
    k_dim: 64,
    v_dim: 128,
    num_q_heads: 8,
    num_kv_heads: 2,
    head_dim: 64,
    width: 512,
    num_experts: None,
};

/// Where a tensor lies in the file, if nothing was copied.
fn mapped(tensor: &Tensor) -> Option<std::ops::Range<usize>> {
    match &tensor.data {
        Data::Mapped(_, range) => Some(range.clone()),
        _ => None,
    }
}

fn fp8(tensor: &Tensor) -> &Fp8 {
    match tensor.encoded() {
        Some(Encoded::Fp8(fp8)) => fp8,
        other => panic!("{other:?}"),
    }
}

#[test]
fn runs_of_rows_stay_in_the_file() {
    let made = model(&SIZES, Format::Bf16, false, 1);
    let whole = &made.tensors.layers[1];
    let range = mapped(attention!(whole, q_proj)).unwrap();
    for (rank, part) in ranks(whole, &made.config, 4, false).iter().enumerate() {
        let quarter = range.len() / 4;
        let own = range.start + rank * quarter..range.start + (rank + 1) * quarter;
        assert_eq!(mapped(attention!(part, q_proj)), Some(own));
        assert!(mapped(ffn!(part, Dense, up_proj)).is_some());
        assert!(mapped(ffn!(part, Dense, down_proj)).is_none());
    }
    // Codes too, and scales where no block is cut; other layouts have columns one after the other.
    let made = model(&SIZES, Format::Fp8([64, 64]), false, 2);
    let part = &ranks(&made.tensors.layers[1], &made.config, 4, false)[3];
    let parts = fp8(ffn!(part, Dense, gate_proj));
    assert!(mapped(&parts.codes).is_some() && mapped(&parts.scales).is_some());
    let made = model(&SIZES, Format::Gptq(64), false, 2);
    let part = &ranks(&made.tensors.layers[1], &made.config, 4, false)[3];
    let Some(Encoded::Int4(down)) = ffn!(part, Dense, down_proj).encoded() else { panic!("not int4") };
    assert!(
        [&down.codes, &down.scales, down.zeros.as_ref().unwrap()].map(mapped).iter().all(Option::is_some)
    );
}

#[test]
fn what_shares_a_scale_is_as_large_as_it_was_where_no_cut_goes_through_it() {
    let made = model(&SIZES, Format::Fp8([128, 128]), false, 3);
    let blocks = |layer: &LayerTensors| {
        let tensors = [ffn!(layer, Dense, gate_proj), ffn!(layer, Dense, down_proj)];
        let [q, o] = [attention!(layer, q_proj), attention!(layer, o_proj)];
        [tensors[0], tensors[1], q, o].map(|tensor| fp8(tensor).block)
    };
    for part in ranks(&made.tensors.layers[1], &made.config, 4, false) {
        assert_eq!(blocks(&part), [[128, 128]; 4]);
    }
    // Half a block for each: one scale for all its rows or columns. Two heads of 64 are a block.
    for part in ranks(&made.tensors.layers[1], &made.config, 8, false) {
        assert_eq!(blocks(&part), [[64, 128], [128, 64], [128, 128], [128, 64]]);
    }
    // A cut through a block and behind it.
    let sizes = Sizes { num_k_heads: 2, num_q_heads: 6, ..SIZES };
    let made = model(&sizes, Format::Packed(128), false, 3);
    let group = |layer: &LayerTensors| match attention!(layer, o_proj).encoded() {
        Some(Encoded::Int4(int4)) => int4.group,
        other => panic!("{other:?}"),
    };
    let groups: Vec<_> = ranks(&made.tensors.layers[1], &made.config, 2, false).iter().map(group).collect();
    assert_eq!(groups, [128, 64]);
}

/// Codes behind the width are zero points, so that kernels may add them up before they apply a scale.
#[test]
fn padding_is_zero_in_codes() {
    let sizes = Sizes { width: 192, ..SIZES };
    for format in [Format::Gptq(64), Format::Awq(64), Format::Packed(64), Format::PackedZeros(64)] {
        let made = model(&sizes, format, false, 4);
        let parts = ranks(&made.tensors.layers[0], &made.config, 2, false);
        // 128 of 192 each.
        for (tensor, is_padding) in [
            (ffn!(parts[1], Dense, up_proj), (|row, _| row >= 64) as fn(usize, usize) -> bool),
            (ffn!(parts[1], Dense, down_proj), |_, col| col >= 64),
        ] {
            let Some(Encoded::Int4(int4)) = tensor.encoded() else { panic!("not int4") };
            let (rows, cols, groups) = (int4.num_rows, int4.num_cols, int4.num_groups());
            let (mut codes, mut zeros) = (vec![0; rows * cols], vec![0; rows * groups]);
            int4.read_codes(0..rows, &mut codes);
            int4.read_zeros(0..rows, &mut zeros);
            let mut num = 0;
            for (i, &code) in codes.iter().enumerate().filter(|(i, _)| is_padding(i / cols, i % cols)) {
                assert_eq!((code, zeros[i / cols * groups + i % cols / int4.group]), (8, 8), "{format:?}");
                num += 1;
            }
            assert_eq!(num, 64 * 256);
        }
    }
}

/// Bytes of a file's mapping that are in memory for this process.
#[cfg(target_os = "linux")]
fn resident(path: &std::path::Path) -> usize {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut inside, mut found, mut sum) = (false, false, 0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap();
        if !first.ends_with(':') {
            inside = line.ends_with(path.to_str().unwrap());
            found |= inside;
        } else if inside && first == "Rss:" {
            sum += 1024 * words.next().unwrap().parse::<usize>().unwrap();
        }
    }
    assert!(found);
    sum
}

/// 32 MiB of experts, of which a rank reads its eighth.
#[cfg(target_os = "linux")]
#[test]
fn what_other_ranks_hold_is_not_read() {
    use std::io::Write;
    let (hidden, width, num_experts) = (256, 512, 32);
    let sizes = Sizes { hidden, width, num_experts: Some(num_experts), ..SIZES };
    let config = super::made::config(&sizes, Format::Bf16);
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in
        [("gate_up", [num_experts, 2 * width, hidden]), ("down", [num_experts, hidden, width])]
    {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        let entry = serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]});
        header.insert(name.into(), entry);
    }
    let header = serde_json::Value::from(header).to_string();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let mut file = std::fs::File::create(&path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    // Pages that nobody wrote are zeros, and are not there before they are read.
    file.set_len((8 + header.len() + end) as u64).unwrap();
    let random = ModelTensors::resolve(&Checkpoint::random(), &config).unwrap().layers.swap_remove(1);
    let open = || {
        let tensors = safetensors::open(&path).unwrap();
        let get = |name: &str| tensors.iter().find(|tensor| tensor.name == name).unwrap().clone();
        let mut layer = random.clone();
        if let FfnTensors::Moe { experts, .. } = &mut layer.ffn {
            *experts = ExpertTensors::Fused { gate_up_proj: get("gate_up"), down_proj: get("down") };
        }
        layer
    };
    // What the system maps around a page that is read.
    let around = 1 << 20;
    let read = |tensors: &[Tensor]| {
        for tensor in tensors {
            assert!(tensor.bytes().unwrap().iter().all(|&byte| byte == 0));
        }
    };
    let layer = open();
    let shard = Shard { rank: 3, world: 8, expert_parallel: true };
    let part = layer.sharded(&config, shard).unwrap();
    let experts = ffn!(part, Moe, experts);
    assert!(resident(&path) <= around, "cutting reads nothing");
    read(&experts.gate_up());
    read(&experts.down());
    let own = end / 8;
    assert!((own..=own + around).contains(&resident(&path)), "{} of {own}", resident(&path));
    drop((layer, part));
    // Slices of all experts: rows alone of gate and up.
    let layer = open();
    let FfnTensors::Moe { experts: ExpertTensors::Fused { gate_up_proj, .. }, .. } = &layer.ffn else {
        panic!("not stacked")
    };
    let before = resident(&path);
    let rows: Vec<_> =
        (0..num_experts).map(|e| gate_up_proj.row_slice(e * 1024 + 192..e * 1024 + 256)).collect();
    assert_eq!(resident(&path), before);
    read(&rows);
    // 32 KiB of each 512 KiB, and what is around them: less than half.
    assert!((1 << 20..end / 3).contains(&resident(&path)), "{}", resident(&path));
}

#[test]
fn random_parts_are_drawn_by_the_rule_of_the_whole() {
    let mut config = family_config("9B").unwrap();
    config.num_mtp_layers = 1;
    let tensors = ModelTensors::resolve(&Checkpoint::random(), &config).unwrap();
    let mtp = MtpTensors::resolve(&Checkpoint::random(), &config).unwrap();
    let parts: Vec<_> = shards(8, false).map(|shard| mtp.sharded(&config, shard).unwrap()).collect();
    let normal = |tensor: &Tensor| tensor.random_elements().unwrap().normal().unwrap();
    for (whole, part) in [(&mtp.fc, &parts[5].fc), (&mtp.norm, &parts[5].norm)] {
        assert_eq!((normal(whole), &whole.shape), (normal(part), &part.shape));
    }
    let of = |i: usize, name: &str| match &parts[i].layer.mixer {
        MixerTensors::Attention { k_proj, .. } if name == "k" => normal(k_proj),
        MixerTensors::Attention { o_proj, .. } => normal(o_proj),
        _ => unreachable!(),
    };
    // Of four heads each is held by two ranks.
    assert_eq!(of(0, "k"), of(1, "k"));
    assert_ne!(of(1, "k").0, of(2, "k").0);
    // A row has an eighth of the inputs, and the deviation that suits all of them.
    let want = normal(attention!(mtp.layer, o_proj)).1;
    assert!((0..8).all(|i| of(i, "o").1 == want));
    let shard = Shard { rank: 1, world: 8, expert_parallel: false };
    let part = tensors.layers[0].sharded(&config, shard).unwrap();
    let numbers = delta!(part, out_proj).to_f32();
    let deviation = (numbers.iter().map(|x| x * x).sum::<f32>() / numbers.len() as f32).sqrt();
    assert!((deviation / (0.3 / 64.0) - 1.0).abs() < 0.02, "{deviation}");
    let a_log = delta!(part, a_log);
    assert_eq!(a_log.shape, [4]);
    assert!(a_log.to_f32().iter().all(|&x| (0.0..2.8).contains(&x)));
    assert_ne!(a_log.to_f32(), delta!(tensors.layers[0], a_log).to_f32()[4..8]);
    // Quantised at load, the same: its source is.
    let requantised = tensors.requantised(Quantization::Fp8).layers.swap_remove(0);
    let quantised = requantised.sharded(&config, shard).unwrap();
    let [source, plain] = [delta!(quantised, out_proj).source(), delta!(part, out_proj)];
    assert_eq!(normal(source), normal(plain));
}

#[test]
fn parts_are_cut_and_then_quantised() {
    let sizes = Sizes { hidden: 64, num_k_heads: 4, head_dim: 128, num_experts: Some(2), ..SIZES };
    for quantization in
        [Quantization::Int4 { group: 64 }, Quantization::Fp8, Quantization::Mixed { group: 128 }]
    {
        for fused in [true, false] {
            let Made { tensors, config, .. } = &model(&sizes, Format::Bf16, fused, 5);
            let tensors = tensors.clone().requantised(quantization);
            // All cuts are at blocks, so that the whole has the same codes.
            for (index, layer) in tensors.layers.iter().enumerate() {
                let parts = ranks(layer, config, 4, false);
                let is_quantised = |tensor: &&&Tensor| tensor.scheme().is_some();
                let num = |layer: &LayerTensors| layer.tensors().iter().filter(is_quantised).count();
                assert_eq!(num(&parts[1]), num(layer) + if fused { 4 } else { 0 });
                check_mixer(layer, &parts, config);
                check_ffn(layer, &parts, false);
                check_shapes(&parts, config, index, false);
                check_ffn(layer, &ranks(layer, config, 2, true), true);
            }
        }
    }
    // Blocks are counted from the first row of the part, which is one matrix.
    let tensor =
        Tensor::random("x.weight".into(), &[4, 256, 96]).requantised(Scheme::Fp8 { matrix_rows: 256 });
    let part = tensor.row_slice(256 + 64..256 + 256);
    assert_eq!((part.scheme(), &part.shape[..]), (Some(Scheme::Fp8 { matrix_rows: 192 }), &[192, 96][..]));
    let part = tensor.row_slice(256..768);
    assert_eq!(part.scheme(), Some(Scheme::Fp8 { matrix_rows: 256 }));
    let int4 = tensor.source().clone().requantised(Scheme::Int4 { group: 64 });
    assert_eq!(int4.column_slice(0..48).scheme(), Some(Scheme::Int4 { group: 48 }));
}

/// A matrix in a GGUF file.
fn gguf(shape: [usize; 2], kind: TensorType, moved: Option<Moved>, draw: &mut Draw) -> Tensor {
    let [rows, cols] = shape;
    let row_bytes = cols / kind.block_len() * kind.block_bytes();
    let mut bytes = match kind {
        TensorType::F32 => draw.floats(DType::F32, rows * cols),
        TensorType::BF16 => draw.floats(DType::BF16, rows * cols),
        _ => draw.bytes(rows * row_bytes),
    };
    // Scales that are numbers.
    let scales: &[usize] = match kind {
        TensorType::Q8_0 | TensorType::Q4_0 => &[0],
        TensorType::Q4_K | TensorType::Q5_K => &[0, 2],
        TensorType::Q6_K => &[208],
        _ => &[],
    };
    for block in bytes.chunks_exact_mut(kind.block_bytes()) {
        for &at in scales {
            block[at..at + 2].copy_from_slice(&draw.floats(DType::F16, 1));
        }
    }
    let tensor = |dtype, shape: Vec<usize>, data| Tensor { name: "x.weight".into(), dtype, shape, data };
    let codes = tensor(DType::U8, vec![rows, row_bytes], Data::Owned(bytes.into()));
    let encoded = Encoded::Gguf(Gguf { codes, kind, num_cols: cols, moved });
    tensor(DType::F32, shape.to_vec(), Data::Encoded(Arc::new(encoded)))
}

#[test]
fn heads_in_the_order_of_gguf_are_cut_in_that_of_the_model() {
    use TensorType::{BF16, F32, Q4_0, Q4_K, Q5_K, Q6_K, Q8_0};
    let mut draw = Draw::new(7);
    for (kind, per_k_head) in [(F32, 2), (BF16, 3), (Q8_0, 2), (Q4_0, 3), (Q4_K, 2), (Q5_K, 3), (Q6_K, 2)] {
        let sizes = Sizes { num_k_heads: 4, per_k_head, ..SIZES };
        let Made { mut tensors, config, .. } = model(&sizes, Format::Bf16, false, 6);
        let order = |start: usize, head_dim: usize| HeadOrder { start, num_k_heads: 4, per_k_head, head_dim };
        let layer = &mut tensors.layers[0];
        if let MixerTensors::DeltaNet { in_proj_qkv, in_proj_z, in_proj_b, out_proj, .. } = &mut layer.mixer {
            let width = config.delta.value_width();
            let channels = Moved::Rows(order(config.delta.key_width() * 2, 128));
            *in_proj_qkv = gguf([config.delta.conv_channels(), 256], kind, Some(channels), &mut draw);
            *in_proj_z = gguf([width, 256], kind, Some(Moved::Rows(order(0, 128))), &mut draw);
            *in_proj_b = gguf([width / 128, 256], kind, Some(Moved::Rows(order(0, 1))), &mut draw);
            *out_proj = gguf([256, width], kind, Some(Moved::Cols(order(0, 128))), &mut draw);
        }
        if let FfnTensors::Dense { gate_proj, up_proj, down_proj } = &mut layer.ffn {
            *gate_proj = gguf([512, 256], kind, None, &mut draw);
            *up_proj = gguf([512, 256], kind, None, &mut draw);
            *down_proj = gguf([256, 512], kind, None, &mut draw);
        }
        for world in [1, 2, 4] {
            let parts = ranks(layer, &config, world, false);
            check_mixer(layer, &parts, &config);
            check_ffn(layer, &parts, false);
            check_shapes(&parts, &config, 0, false);
            // Codes stay codes but where a block of 256 is cut; floats in the order of the model are like any other.
            let is_kept = |tensor: &Tensor| tensor.encoded().is_some_and(Encoded::is_quantised);
            for part in &parts {
                let matrices =
                    [delta!(part, in_proj_qkv), delta!(part, in_proj_z), ffn!(part, Dense, up_proj)];
                assert!(matrices.into_iter().all(|tensor| is_kept(tensor) == kind.is_quantised()));
                let cut = kind.block_len() == 256 && world == 4;
                let columns = [delta!(part, out_proj), ffn!(part, Dense, down_proj)];
                assert!(columns.into_iter().all(|tensor| is_kept(tensor) == (kind.is_quantised() && !cut)));
                if world > 1 && !kind.is_quantised() {
                    assert!(matrices.into_iter().all(|tensor| tensor.bytes().is_some()));
                    assert!(
                        matrices.into_iter().all(|tensor| (tensor.dtype == DType::BF16) == (kind == BF16))
                    );
                }
            }
        }
    }
}

/// What no scale grid or word can be cut to is decoded, exactly.
#[test]
fn the_last_resort() {
    let mut num = 0;
    for format in [Format::Gptq(32), Format::Awq(32), Format::PackedZeros(32), Format::ModeloptFp4] {
        let made = model(&SIZES, format, false, 8);
        for tensor in [ffn!(made.tensors.layers[0], Dense, up_proj), delta!(made.tensors.layers[0], out_proj)]
        {
            let whole = Matrix::of(tensor);
            let rows = tensor.row_slices(&[3..10, 100..101, 7..8]);
            let want = [whole.rows(3..10), whole.rows(100..101), whole.rows(7..8)];
            assert_eq!(Matrix::of(&rows), Matrix::under(want.to_vec()));
            let columns = tensor.column_slice(5..31);
            assert_eq!(Matrix::of(&columns), whole.transposed().rows(5..31).transposed());
            num += [&rows, &columns].iter().filter(|tensor| tensor.bytes().is_some()).count();
        }
    }
    // AWQ has rows in words, GPTQ columns; zero points are in words of rows.
    assert_eq!(num, 2 * (2 + 1 + 2 + 1));
}

#[test]
#[should_panic(expected = "a part of x.weight")]
fn no_part_is_of_another_tensor() {
    let bytes = Data::Owned(vec![0; 64].into());
    let tensor = Tensor { name: "x.weight".into(), dtype: DType::F32, shape: vec![4, 4], data: bytes };
    let _ = tensor.row_slice(3..5);
}

#[test]
fn rows_of_the_head() {
    let Made { mut tensors, .. } = model(&SIZES, Format::Bf16, false, 9);
    for tied in [false, true] {
        let whole = tensors.lm_head.clone().unwrap_or(tensors.embed_tokens.clone());
        let parts = shards(3, false).map(|shard| Matrix::of(&tensors.sharded_head(shard))).collect();
        assert_eq!(Matrix::under(parts), Matrix::of(&whole));
        // Of 24 rows seven ranks each have all, and so have four, whose six could not be gathered.
        for world in [4, 7] {
            let all = Shard { rank: 2, world, expert_parallel: false };
            assert_eq!(Matrix::of(&tensors.sharded_head(all)), Matrix::of(&whole));
        }
        assert_eq!(tensors.lm_head.is_none(), tied);
        tensors.lm_head = None;
    }
}

/// The family at full size, in the formats of releases: shapes, forms, bytes. Nothing is read.
#[test]
fn the_family_on_2_4_and_8_ranks() {
    let release = |fp8: bool, int4: bool| QuantConfig {
        method: QuantMethod::CompressedTensors,
        fp8: fp8.then(|| Fp8Rule { blocks: vec![[128, 128]] }),
        int4: int4.then(|| Int4Rule { groups: vec![Some(128)], needs_zeros: false, zeros_minus_one: false }),
        nvfp4: !fp8 && !int4,
    };
    for name in ["27B", "35B", "122B", "397B"] {
        for format in ["bf16", "fp8", "int4", "nvfp4", "fp8 at load", "int4 at load"] {
            let quantization = match format {
                "fp8" => Some(release(true, false)),
                "int4" => Some(release(false, true)),
                "nvfp4" => Some(release(false, false)),
                _ => None,
            };
            let config = ModelConfig { quantization, ..family_config(name).unwrap() };
            let mut tensors = ModelTensors::resolve(&Checkpoint::random(), &config).unwrap();
            tensors = match format {
                "fp8 at load" => tensors.requantised(Quantization::Fp8),
                "int4 at load" => tensors.requantised(Quantization::Int4 { group: 128 }),
                _ => tensors,
            };
            let kinds = [LayerKind::DeltaNet, LayerKind::Attention];
            for kind in kinds.map(|kind| config.layers.iter().position(|&other| other == kind).unwrap()) {
                for (world, experts) in [(2, false), (4, false), (8, false), (8, true)] {
                    if experts && name == "27B" {
                        continue;
                    }
                    check_large(&tensors.layers[kind], &config, kind, world, experts);
                }
            }
        }
    }
}

fn check_large(
    layer: &LayerTensors,
    config: &ModelConfig,
    index: usize,
    world: usize,
    expert_parallel: bool,
) {
    let parts = ranks(layer, config, world, expert_parallel);
    check_shapes(&parts, config, index, expert_parallel);
    let sum = |layer: &LayerTensors, size: &dyn Fn(&Tensor) -> usize| -> usize {
        let is_cut = |tensor: &&Tensor| tensor.name.contains("_proj");
        layer.tensors().into_iter().filter(is_cut).map(size).sum()
    };
    // Beside the copies of key-value heads nothing is held twice, and nothing is padding.
    let copies = |size: &dyn Fn(&Tensor) -> usize| match &layer.mixer {
        MixerTensors::Attention { k_proj, v_proj, .. } => {
            (world / config.attention.num_kv_heads.min(world) - 1) * (size(k_proj) + size(v_proj))
        }
        MixerTensors::DeltaNet { .. } => 0,
    };
    let held = |size: &dyn Fn(&Tensor) -> usize| parts.iter().map(|part| sum(part, size)).sum::<usize>();
    let whole = |size: &dyn Fn(&Tensor) -> usize| sum(layer, size) + copies(size);
    assert_eq!(held(&Tensor::num_elements), whole(&Tensor::num_elements));
    // Smaller parts have more scales: at most one for 64 inputs in place of one for 128.
    let (held, whole) = (held(&Tensor::num_bytes), whole(&Tensor::num_bytes));
    assert!((whole..whole + whole / 32).contains(&held), "{held} of {whole}");
    // Tiles of 16 rows and 64 inputs, which kernels of codes take.
    for tensor in parts.iter().flat_map(LayerTensors::tensors).filter(|tensor| tensor.scheme().is_some()) {
        assert!(tensor.num_rows().is_multiple_of(16) && tensor.num_cols().is_multiple_of(64), "{tensor:?}");
    }
}
