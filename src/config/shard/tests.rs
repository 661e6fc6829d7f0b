use proptest::prelude::*;

use super::*;
use crate::config::{Fp8Rule, Int4Rule, QuantMethod};
use crate::plan::family_config;

fn whole(name: &str) -> ModelConfig {
    family_config(name).unwrap()
}

fn shard(rank: usize, world: usize) -> Shard {
    Shard { rank, world, expert_parallel: false }
}

fn formats(fp8: &[[usize; 2]], int4: bool, nvfp4: bool) -> Option<QuantConfig> {
    let fp8 = (!fp8.is_empty()).then(|| Fp8Rule { blocks: fp8.to_vec() });
    let int4 = int4.then(|| Int4Rule { groups: vec![Some(128)], needs_zeros: false, zeros_minus_one: false });
    Some(QuantConfig { method: QuantMethod::CompressedTensors, fp8, int4, nvfp4 })
}

/// Key, value, query and key-value heads, the width of the block or of an expert, and that of the shared expert.
fn sizes(config: &ModelConfig) -> [usize; 6] {
    let [width, shared] = match config.ffn {
        FfnConfig::Dense { width } => [width, 0],
        FfnConfig::Moe { expert_width, shared_width, .. } => [expert_width, shared_width],
    };
    let (delta, attention) = (&config.delta, &config.attention);
    [delta.num_k_heads, delta.num_v_heads, attention.num_q_heads, attention.num_kv_heads, width, shared]
}

#[test]
fn the_family_on_2_4_and_8_ranks() {
    let table = [
        ("0.8B", 2, [8, 8, 4, 1, 1792, 0]),
        ("0.8B", 4, [4, 4, 2, 1, 896, 0]),
        ("27B", 2, [8, 24, 12, 2, 8704, 0]),
        ("27B", 4, [4, 12, 6, 1, 4352, 0]),
        ("27B", 8, [2, 6, 3, 1, 2176, 0]),
        ("35B", 2, [8, 16, 8, 1, 256, 256]),
        ("35B", 4, [4, 8, 4, 1, 128, 128]),
        ("35B", 8, [2, 4, 2, 1, 64, 64]),
        ("122B", 2, [8, 32, 16, 1, 512, 512]),
        ("122B", 4, [4, 16, 8, 1, 256, 256]),
        ("122B", 8, [2, 8, 4, 1, 128, 128]),
        ("397B", 2, [8, 32, 16, 1, 512, 512]),
        ("397B", 4, [4, 16, 8, 1, 256, 256]),
        ("397B", 8, [2, 8, 4, 1, 128, 128]),
    ];
    for (name, world, want) in table {
        let plain = whole(name);
        // No format of a release makes a part larger.
        for quantization in [None, formats(&[[128, 128]], false, false), formats(&[], true, true)] {
            let config = ModelConfig { quantization, ..plain.clone() };
            for rank in 0..world {
                let local = config.sharded(shard(rank, world)).unwrap();
                assert_eq!(sizes(&local), want, "{name} on {world}");
                let rest = |config: &ModelConfig| {
                    let mut rest = config.clone();
                    (rest.delta, rest.attention) = (plain.delta.clone(), plain.attention.clone());
                    rest.ffn = plain.ffn.clone();
                    rest
                };
                assert_eq!(rest(&local), config);
            }
            let experts = Shard { rank: 1, world, expert_parallel: true };
            if let FfnConfig::Moe { num_experts, top_k, expert_width, .. } = config.ffn {
                let ffn = FfnConfig::Moe { num_experts, top_k, expert_width, shared_width: want[5] };
                assert_eq!(config.sharded(experts).unwrap().ffn, ffn);
                assert_eq!(experts.experts(num_experts), num_experts / world..2 * num_experts / world);
            }
        }
    }
}

#[test]
fn widths_are_whole_blocks_where_a_cut_would_fall_into_one() {
    let local = |width: usize, world: usize, formats: Option<QuantConfig>| {
        assert_eq!(local_width(width, world, None), width / world);
        local_width(width, world, formats.as_ref())
    };
    let fp8 = || formats(&[[128, 128]], false, false);
    let (int4, nvfp4) = (|| formats(&[], true, false), || formats(&[], false, true));
    // 0.8B on 8 ranks: 28 blocks, so seven ranks have four and the last has none.
    assert_eq!(local(3584, 8, fp8()), 512);
    assert_eq!(shard(6, 8).part(3584, 512), 3072..3584);
    assert_eq!(shard(7, 8).part(3584, 512), 3584..3584);
    assert_eq!(local(3584, 8, int4()), 448);
    // All of a part in one block needs no more.
    assert_eq!(local(512, 8, fp8()), 64);
    assert_eq!(local(512, 16, fp8()), 32);
    assert_eq!(local(640, 2, fp8()), 384);
    assert_eq!(local(640, 2, int4()), 320);
    assert_eq!(local(64, 8, int4()), 8);
    assert_eq!(local(64, 8, nvfp4()), 64);
    assert_eq!(local(64, 4, nvfp4()), 16);
    assert_eq!(local(96, 2, nvfp4()), 64);
    // Blocks of two sizes, and one that no part fits.
    assert_eq!(local(1536, 4, formats(&[[128, 128]], false, true)), 384);
    assert_eq!(local(1200, 4, formats(&[[1, 48], [1, 64]], false, false)), 384);
    assert_eq!(local(300, 2, formats(&[[1, usize::MAX], [1, 64]], false, false)), 300);
}

#[test]
fn heads_that_several_ranks_read() {
    let kv = |world: usize, num: usize| (0..world).map(|r| shard(r, world).kv_heads(num)).collect::<Vec<_>>();
    assert_eq!(kv(4, 2), [0..1, 0..1, 1..2, 1..2]);
    assert_eq!(kv(2, 4), [0..2, 2..4]);
    assert_eq!(kv(3, 1), [0..1, 0..1, 0..1]);
    let two = Shard { rank: 1, world: 2, expert_parallel: false };
    assert_eq!((two.head_rows(248_320), two.head_rows(7)), (124_160..248_320, 0..7));
    // 124,039 logits each would divide, and could not be gathered.
    assert_eq!((two.head_rows(248_078), two.head_rows(248_080)), (0..248_078, 124_040..248_080));
    assert_eq!(two.experts(256), 0..256);
    assert!(Shard::whole().is_whole() && !two.is_whole());
    assert_eq!((Shard::whole().head_rows(7), Shard::whole().experts(3)), (0..7, 0..3));
}

#[test]
fn one_rank_has_the_whole_model() {
    for quantization in [None, formats(&[[128, 128]], true, true)] {
        let mut config = ModelConfig { quantization, ..whole("0.8B") };
        config.ffn = FfnConfig::Dense { width: 100 };
        assert_eq!(config.sharded(Shard::whole()).unwrap(), config);
    }
}

#[test]
fn what_does_not_divide_is_named() {
    let error = |config: &ModelConfig, shard: Shard| config.sharded(shard).unwrap_err().to_string();
    assert_eq!(
        error(&whole("27B"), shard(0, 3)),
        "tensor_parallel_size: found 3; allowed: 1, 2, 4, 8, which divide 16 key and 48 value heads of delta layers, \
         24 query heads, 4 key-value heads (or a multiple of them), a width of 17408"
    );
    assert_eq!(
        error(&whole("35B"), shard(0, 32)),
        "tensor_parallel_size: found 32; allowed: 1, 2, 4, 8, 16, which divide 16 key and 32 value heads of delta \
         layers, 16 query heads, 2 key-value heads (or a multiple of them), experts 512 wide, a shared expert 512 wide"
    );
    assert_eq!(
        error(&whole("122B"), Shard { rank: 0, world: 0, expert_parallel: true }),
        "tensor_parallel_size: found 0; allowed: 1, 2, 4, 8, 16, which divide 16 key and 64 value heads of delta \
         layers, 32 query heads, 2 key-value heads (or a multiple of them), 256 experts, a shared expert 1024 wide"
    );
    assert_eq!(
        error(&whole("27B"), Shard { rank: 0, world: 2, expert_parallel: true }),
        "expert_parallel: found True, for a model without experts; allowed: False"
    );
    assert_eq!(error(&whole("122B"), shard(2, 2)), "rank: found 2; allowed: 0 to 1");
    assert_eq!(
        error(&whole("122B"), shard(usize::MAX, 1)),
        "rank: found 18446744073709551615; allowed: 0 to 0"
    );
    // Layers that are not there divide by anything; those of the MTP module are there.
    let mut config = whole("35B");
    config.layers = vec![LayerKind::DeltaNet];
    config.attention.num_q_heads = 5;
    config.attention.num_kv_heads = 5;
    assert!(error(&config, shard(0, 2)).contains("5 query heads"));
    config.num_mtp_layers = 0;
    assert_eq!(config.sharded(shard(0, 2)).unwrap().attention, config.attention);
    assert!(!error(&config, shard(0, 3)).contains("query"));
}

proptest! {
    /// Whatever the widths and formats: parts are equal, in order, and all of it; and no larger than is needed.
    #[test]
    fn parts_are_all_of_it(
        even in 1usize..3000, world in 1usize..17,
        blocks in prop::collection::vec((1usize..300).prop_map(|n| [n, n]), 0..3), int4: bool, nvfp4: bool,
    ) {
        let width = even * world;
        let local = local_width(width, world, formats(&blocks, int4, nvfp4).as_ref());
        let parts: Vec<_> = (0..world).map(|rank| shard(rank, world).part(width, local)).collect();
        prop_assert_eq!(parts[0].start, 0);
        prop_assert_eq!(parts[world - 1].end, width);
        prop_assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
        prop_assert!(parts.iter().all(|part| part.len() <= local));
        prop_assert!((even..=width).contains(&local));
        // Codes of a word are together, wherever parts meet.
        let word = if nvfp4 { 16 } else if int4 { 8 } else { 1 };
        prop_assert!(parts.iter().all(|part| part.start.is_multiple_of(word) || part.start == width));
        // A block of 8-bit floats is of one part, or one part of it; unless one rank has all.
        for [_, block] in blocks.iter().filter(|_| local < width) {
            prop_assert!(local.is_multiple_of(*block) || block.is_multiple_of(local));
        }
    }
}
