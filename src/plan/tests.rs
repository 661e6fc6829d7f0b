use super::{
    FAMILY, GPUS, ParamCounts, Part, Plan, PlanOptions, Scheme, WeightBytes, cache_bytes, expected_experts,
    family_config, gpu,
};
use crate::backend::Caches;
use crate::config::{ModelConfig, Shard};
use crate::{Error, Result};

fn param_counts(config: &ModelConfig) -> ParamCounts {
    Part::whole(config).params()
}

fn weight_bytes(config: &ModelConfig, scheme: Scheme) -> Option<WeightBytes> {
    Part::whole(config).weights(scheme)
}

fn plan(config: &ModelConfig, cards: &[usize], schemes: &[Scheme], options: &PlanOptions) -> Result<Plan> {
    super::plan(config, &GPUS, cards, schemes, &|scheme, part| Ok(part.weights(scheme)), options)
}

#[test]
fn counts_equal_the_published_totals() {
    // Text, vision, MTP, total: the sums of the releases' safetensors files.
    let published: [[u64; 4]; 8] = [
        [752_393_024, 100_592_896, 20_452_864, 873_438_784],
        [1_881_825_088, 331_416_576, 60_828_160, 2_274_069_824],
        [4_205_751_296, 333_514_240, 120_599_552, 4_659_865_088],
        [8_953_803_264, 456_010_480, 243_290_624, 9_653_104_368],
        [26_895_998_464, 460_730_096, 424_699_392, 27_781_427_952],
        [34_660_610_688, 446_571_248, 844_640_768, 35_951_822_704],
        [122_111_526_912, 451_290_864, 2_523_679_232, 125_086_497_008],
        [396_346_350_336, 456_010_480, 6_595_568_128, 403_397_928_944],
    ];
    for (name, expected) in FAMILY.iter().zip(published) {
        let counts = param_counts(&family_config(name).unwrap());
        assert_eq!([counts.text, counts.vision, counts.mtp, counts.total], expected, "{name}");
    }
    let counts = param_counts(&family_config("122b").unwrap());
    assert_eq!(counts.attention_mixer, 78_643_712);
    assert_eq!(counts.delta_net_mixer, 88_523_008);
    assert_eq!(counts.ffn, 2_426_145_792);
    assert_eq!(counts.expert, 9_437_184);
    assert_eq!((counts.embedding, counts.lm_head), (762_839_040, 762_839_040));
    for (name, active) in
        [("122b", 9_008_449_536), ("35b", 2_946_429_568), ("397b", 16_331_922_176), ("27b", 25_624_600_064)]
    {
        assert_eq!(param_counts(&family_config(name).unwrap()).active, active, "{name}");
    }
}

#[test]
fn weight_bytes_equal_the_table() {
    // GB read per token and GB resident, as rounded in the table, for 122B, 35B, 397B and 27B.
    let table: [(Scheme, [[f64; 2]; 4]); 4] = [
        (Scheme::Bf16, [[18.02, 244.2], [5.89, 69.3], [32.66, 792.7], [51.25, 53.8]]),
        (Scheme::Fp8, [[9.83, 123.7], [3.48, 35.7], [17.50, 398.6], [26.93, 29.5]]),
        (Scheme::Int4Experts, [[12.65, 72.5], [4.40, 21.6], [21.49, 220.4], [25.91, 28.5]]),
        (Scheme::Nvfp4, [[6.24, 71.0], [2.43, 21.0], [10.87, 226.1], [16.28, 18.8]]),
    ];
    let check = |name: &str, scheme: Scheme, [read, resident]: [f64; 2]| {
        let WeightBytes { resident: r, read_per_token: t, .. } =
            weight_bytes(&family_config(name).unwrap(), scheme).unwrap();
        assert!((t as f64 / 1e9 - read).abs() < 0.0051, "{name} {scheme:?} read {t}");
        assert!((r as f64 / 1e9 - resident).abs() < 0.051, "{name} {scheme:?} resident {r}");
    };
    for (scheme, row) in table {
        for (name, values) in ["122b", "35b", "397b", "27b"].into_iter().zip(row) {
            check(name, scheme, values);
        }
    }
    for (name, values) in [("122b", [12.81, 77.5]), ("35b", [4.45, 23.0]), ("397b", [21.81, 237.0])] {
        check(name, Scheme::Nvfp4Experts, values);
    }
    assert_eq!(weight_bytes(&family_config("27b").unwrap(), Scheme::Nvfp4Experts), None);
}

#[test]
fn cache_bytes_equal_the_table() {
    let mib = 1 << 20;
    // KV per token, recurrent state, convolution state, MTP KV per token.
    let table: [(&str, [u64; 4]); 8] = [
        ("0.8b", [12_288, 18 * mib, 663_552, 2048]),
        ("2b", [12_288, 18 * mib, 663_552, 2048]),
        ("4b", [32_768, 48 * mib, 1_179_648, 4096]),
        ("9b", [32_768, 48 * mib, 1_179_648, 4096]),
        ("27b", [65_536, 144 * mib, 2_949_120, 4096]),
        ("35b", [20_480, 60 * mib, 1_474_560, 2048]),
        ("122b", [24_576, 144 * mib, 2_654_208, 2048]),
        ("397b", [30_720, 180 * mib, 3_317_760, 2048]),
    ];
    for (name, expected) in table {
        let cache = cache_bytes(&family_config(name).unwrap());
        let found = [cache.kv_per_token, cache.recurrent_per_seq, cache.conv_per_seq, cache.mtp_kv_per_token];
        assert_eq!(found, expected, "{name}");
        // Codes of a row of 256, and its scale.
        assert_eq!(cache.kv_per_token_fp8 * 512, cache.kv_per_token * 260);
        assert_eq!(cache.mtp_kv_per_token_fp8 * 512, cache.mtp_kv_per_token * 260);
        assert_eq!(cache.recurrent_per_seq_f16 * 2, cache.recurrent_per_seq);
    }
}

#[test]
fn names_of_the_family() {
    for name in ["Qwen3.5-122B-A10B", "qwen/qwen3.5-122b-a10b", "122B-A10B", " 122b "] {
        assert_eq!(family_config(name).unwrap().hidden, 3072, "{name}");
    }
    for name in ["", "122", "a10b", "Qwen3-8B", "122b-a3b"] {
        assert!(matches!(family_config(name), Err(Error::Request { .. })), "{name}");
    }
    for name in FAMILY {
        let config = family_config(name).unwrap();
        assert_eq!(config.max_context(), 262_144);
        assert!(config.has_vision && config.num_mtp_layers == 1);
    }
}

#[test]
fn names_of_cards() {
    for (said, name) in
        [("4090", "RTX 4090"), ("h100", "H100 80GB"), ("a100-80", "A100 80GB"), ("A6000", "RTX A6000")]
    {
        assert_eq!(gpu(said).unwrap().0.name, name);
    }
    for card in &GPUS {
        assert_eq!(gpu(&card.name).unwrap().0, *card);
    }
    for (said, others) in [
        ("A100", vec!["A100 40GB"]),
        ("h100", vec!["H100 PCIe", "H100 NVL"]),
        ("l4", vec![]),
        ("a100-40", vec![]),
    ] {
        assert_eq!(gpu(said).unwrap().1, others, "{said}");
    }
    assert!(matches!(gpu("rtx"), Err(Error::Request { .. })));
}

#[test]
fn experts_touched_by_a_batch() {
    for (batch, expected) in [(1, 8.0), (2, 15.8), (16, 102.0), (64, 222.4), (256, 255.9)] {
        assert!((expected_experts(256, 8, batch) - expected).abs() < 0.051);
    }
    let config = family_config("122b").unwrap();
    let caches = Caches::default();
    let (whole, fp8) = (Part::whole(&config), weight_bytes(&config, Scheme::Fp8).unwrap());
    let one = whole.step_bytes(&fp8, 1, 1, caches, None);
    let weights = fp8.read_per_token as f64;
    let cache = cache_bytes(&config);
    let expected = weights + cache.kv_per_token as f64 + 2.0 * cache.state_per_seq(caches) as f64;
    assert!((one / expected - 1.0).abs() < 1e-9);
    let small = PlanOptions { fp8_kv: true, f16_state: true, ..PlanOptions::default() }.caches();
    let saved = one - whole.step_bytes(&fp8, 1, 1, small, None);
    let expected = (cache.kv_per_token - cache.kv_per_token_fp8 + cache.recurrent_per_seq) as f64;
    assert!((saved / expected - 1.0).abs() < 1e-6);
}

#[test]
fn a_plan_of_the_122b() {
    let config = family_config("122b").unwrap();
    let options = PlanOptions::default();
    let plan = plan(&config, &[1, 2, 4, 8], &[], &options).unwrap();
    assert_eq!(plan.rows.len(), GPUS.len() * 4 * Scheme::ALL.len());
    let find = |gpu: &str, cards: usize, scheme: Scheme| {
        plan.rows.iter().find(|r| r.gpu == gpu && r.num_cards == cards && r.scheme == scheme).unwrap()
    };
    // 61 GiB of int4 on a card of 80: fits, and the limit is 3.35 TB/s over 6.4 GB.
    let row = find("H100 80GB", 1, Scheme::Int4);
    assert!(row.fits && row.max_context == 262_144 && row.max_seqs > 16, "{row:?}");
    assert!((450.0..600.0).contains(&row.decode_limit_tokens_per_s.unwrap()), "{row:?}");
    let row = find("H100 80GB", 1, Scheme::Bf16);
    assert!(!row.fits && row.max_context == 0 && row.max_seqs == 0 && row.free_gib_per_card.unwrap() < 0.0);
    assert!(find("H100 80GB", 4, Scheme::Bf16).fits);
    for (i, row) in plan.rows.iter().enumerate() {
        assert_eq!(row.fits, row.max_context > 0, "{i}: {row:?}");
        assert!(row.max_seqs == 0 || row.max_context >= options.context, "{i}: {row:?}");
    }
    let json = serde_json::to_string(&plan).unwrap();
    assert!(json.contains("\"scheme\":\"int4-experts\""));
}

#[test]
fn a_plan_refuses_by_name() {
    let config = family_config("0.8b").unwrap();
    let field = |options: PlanOptions, cards: usize| match plan(&config, &[cards], &[], &options) {
        Err(Error::Request { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    let with = PlanOptions::default;
    assert_eq!(field(PlanOptions { context: 0, ..with() }, 1), "context");
    assert_eq!(field(PlanOptions { context: 1 << 40, ..with() }, 1), "context");
    assert_eq!(field(PlanOptions { memory_utilization: 0.0, ..with() }, 1), "memory_utilization");
    assert_eq!(field(PlanOptions { memory_utilization: f64::NAN, ..with() }, 1), "memory_utilization");
    assert_eq!(field(PlanOptions { reserve_gib: -1.0, ..with() }, 1), "reserve_gib");
    assert_eq!(field(PlanOptions { all_reduce_us: Some(f64::INFINITY), ..with() }, 1), "all_reduce_us");
    assert_eq!(field(PlanOptions { num_seqs: Some(0), ..with() }, 1), "max_num_seqs");
    assert_eq!(field(with(), 0), "card_counts");
    assert!(matches!(Scheme::from_name("q4"), Err(Error::Request { .. })));
    for scheme in Scheme::ALL {
        assert_eq!(Scheme::from_name(scheme.name()).unwrap(), scheme);
    }
}

#[test]
fn parts_of_files_are_as_large_as_those_of_their_configuration() {
    // Nothing in it is quantised, so a GPU holds all of it in 16 bits.
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("python/qwen35rs/model");
    let config = ModelConfig::from_dir(&dir).unwrap();
    for (world, expert_parallel) in [(1, false), (2, false), (2, true)] {
        let part = Part::new(&config, Shard::first(world, expert_parallel).unwrap()).unwrap();
        let found = super::stored(&dir, &config, &part).unwrap();
        let counted = part.weights(Scheme::Bf16).unwrap();
        assert_eq!(WeightBytes { scheme: Scheme::Bf16, ..found }, counted, "{world} {expert_parallel}");
    }
}

#[test]
fn cards_that_cannot_share_a_model() {
    let config = family_config("35b").unwrap();
    let found = plan(&config, &[2, 3, 16], &[Scheme::Int4], &PlanOptions::default()).unwrap();
    for row in &found.rows {
        let why = row.refused.as_deref().unwrap_or_default();
        match row.num_cards {
            2 => assert!(why.is_empty() && row.weights_gib_per_card.is_some()),
            3 => assert!(why.starts_with("tensor_parallel_size: found 3; allowed: 1, 2, 4, 8, 16, which")),
            _ => assert_eq!(
                why,
                "tensor_parallel_size: found 16; allowed: at most 8 in a plan, of cards that address each other's memory"
            ),
        }
        assert!(why.is_empty() || !row.fits && row.max_seqs == 0 && row.weights_gib_per_card.is_none());
    }
    assert!(found.choices.is_empty());
    assert_eq!(field_of(Shard::first(0, false)), "tensor_parallel_size");
    assert_eq!(field_of(Shard::first(1, true)), "expert_parallel");
}

fn field_of(found: Result<Shard>) -> String {
    match found {
        Err(Error::Request { field, .. }) => field,
        other => panic!("{other:?}"),
    }
}
