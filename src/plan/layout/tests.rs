use super::*;
use crate::config::{FfnConfig, LayerKind, Shard};
use crate::plan::{Part, cache_bytes, family_config, gpu, plan};

/// Of so many cards; `schemes` are those that were asked for.
fn choice(name: &str, card: &str, num_cards: usize, num_seqs: usize, schemes: &[Scheme]) -> Choice {
    let (config, card) = (family_config(name).unwrap(), gpu(card).unwrap().0);
    let options = PlanOptions { num_seqs: Some(num_seqs), ..PlanOptions::default() };
    let weights = |scheme: Scheme, part: &Part| Ok(part.weights(scheme));
    let found = plan(&config, &[card], &[num_cards], schemes, &weights, &options).unwrap();
    assert_eq!(found.choices.len(), 1);
    found.choices.into_iter().next().unwrap()
}

fn taken(choice: &Choice) -> (Scheme, usize, usize, usize) {
    let chosen = choice.chosen.as_ref().unwrap();
    (chosen.scheme, chosen.tensor_parallel_size, chosen.replicas, chosen.idle_cards)
}

fn sizes(choice: &Choice) -> Vec<(usize, bool)> {
    choice.layouts.iter().map(|layout| (layout.tensor_parallel_size, layout.max_seqs > 0)).collect()
}

#[test]
fn the_122b_in_bf16_takes_two_h200s() {
    let found = choice("122b", "H200", 2, 32, &[Scheme::Bf16]);
    assert_eq!(taken(&found), (Scheme::Bf16, 2, 1, 0));
    assert_eq!(sizes(&found), [(1, false), (2, true)]);
    assert!(found.layouts[0].max_context == 0 && found.layouts[0].tokens_per_s_alone.is_none());
    let alone = choice("122b", "H200", 1, 32, &[Scheme::Bf16]);
    assert_eq!(alone.chosen, None);
    assert_eq!(
        alone.why,
        [
            "Nothing fits: bf16 takes 227.5 GiB of weights on the card of 140.4 GiB, which leaves nothing for sequences; one of \
             8192 tokens needs 0.33 GiB."
        ]
    );
    // Four are two pairs, or four together.
    let four = choice("122b", "H200", 4, 32, &[Scheme::Bf16]);
    assert_eq!(sizes(&four), [(1, false), (2, true), (4, true)]);
    assert_eq!(four.layouts[1].replicas, 2);
}

#[test]
fn the_first_precision_that_fits() {
    for (name, card, num_cards, scheme) in [
        ("122b", "H100 80GB", 1, Scheme::Mixed),
        ("122b", "H100 80GB", 2, Scheme::Fp8Head),
        ("122b", "H100 80GB", 4, Scheme::Bf16),
        ("122b", "H200", 1, Scheme::Fp8Head),
        ("35b", "RTX 4090", 1, Scheme::Mixed),
        ("27b", "RTX 4090", 1, Scheme::Int4),
        ("9b", "RTX 4090", 1, Scheme::Bf16),
    ] {
        let found = choice(name, card, num_cards, 1, &[]);
        assert_eq!(taken(&found).0, scheme, "{name} on {num_cards} {card}");
        let before: Vec<_> = AT_LOAD.iter().take_while(|&&other| other != scheme).map(|s| s.name()).collect();
        let start = match before.is_empty() {
            true => format!("{} fits, ", scheme.name()),
            false => format!("{} fit no sequence of ", before.join(", ")),
        };
        assert!(found.why[0].starts_with(&start), "{}", found.why[0]);
    }
    // What was asked for, though more would fit; int4 on one card of 80.
    assert_eq!(taken(&choice("122b", "H100 80GB", 1, 1, &[Scheme::Int4])), (Scheme::Int4, 1, 1, 0));
    assert_eq!(taken(&choice("9b", "H200", 1, 1, &[Scheme::Fp8])).0, Scheme::Fp8);
    let nothing = choice("27b", "H200", 1, 1, &[Scheme::Nvfp4Experts]);
    assert!(nothing.chosen.is_none() && nothing.why[0].starts_with("No precision"));
}

#[test]
fn the_35b_on_1_2_4_and_8() {
    for num_cards in [1, 2, 4, 8] {
        let want: Vec<_> = [1, 2, 4, 8].into_iter().filter(|&n| n <= num_cards).collect();
        for num_seqs in [1, 32, 256] {
            let found = choice("35b", "H100 80GB", num_cards, num_seqs, &[Scheme::Bf16]);
            let sizes: Vec<_> = found.layouts.iter().map(|l| l.tensor_parallel_size).collect();
            assert_eq!(sizes, want);
            let chosen = found.chosen.as_ref().unwrap();
            let best = found.layouts.iter().map(|l| l.tokens_per_s.unwrap()).fold(0.0, f64::max);
            for layout in &found.layouts {
                assert_eq!(layout.tensor_parallel_size * layout.replicas + layout.idle_cards, num_cards);
                assert!(layout.running <= num_seqs && layout.running <= layout.replicas * layout.max_seqs);
                if layout.tensor_parallel_size == chosen.tensor_parallel_size {
                    assert_eq!(layout.tokens_per_s, Some(best));
                }
            }
            let refused: Vec<_> = found.refused.iter().map(|r| r.tensor_parallel_size).collect();
            assert_eq!(refused, [3, 5, 6, 7].into_iter().filter(|&n| n <= num_cards).collect::<Vec<_>>());
        }
        // One alone: even eight save more of 1.8 ms of bytes than the 0.5 ms that sums take.
        let one = choice("35b", "H100 80GB", num_cards, 1, &[Scheme::Bf16]);
        assert_eq!(taken(&one), (Scheme::Bf16, num_cards, 1, 0));
    }
    // A small model gains nothing from two: the sums take longer than the bytes that are saved.
    assert_eq!(taken(&choice("0.8b", "H100 80GB", 2, 1, &[])), (Scheme::Bf16, 1, 2, 0));
}

#[test]
fn floors_are_bytes_and_sums() {
    let config = family_config("35b").unwrap();
    let found = choice("35b", "H100 80GB", 4, 1, &[Scheme::Int4]);
    for layout in &found.layouts {
        let world = layout.tensor_parallel_size;
        let local = config.sharded(Shard { rank: 0, world, expert_parallel: false }).unwrap();
        let part = Part::new(&config, Shard { rank: 0, world, expert_parallel: false }).unwrap();
        let cache = cache_bytes(&local);
        let state = cache.recurrent_per_seq + cache.conv_per_seq;
        let bytes =
            part.weights(Scheme::Int4).unwrap().read_per_token + 8192 * cache.kv_per_token + 2 * state;
        let sums = if world == 1 { 0.0 } else { 80.0 * 6e-6 };
        let want = 1.0 / (bytes as f64 / 3.35e12 + sums);
        let found = layout.tokens_per_s_alone.unwrap();
        assert!((found / want - 1.0).abs() < 1e-9, "{world}: {found} {want}");
    }
}

#[test]
fn what_can_run_is_what_is_said() {
    let found = choice("27b", "RTX 5090", 1, 32, &[]);
    assert_eq!(taken(&found), (Scheme::Fp8Head, 1, 1, 0));
    let layout = found.layouts.iter().find(|layout| layout.scheme == Scheme::Fp8Head).unwrap();
    assert!((1..8).contains(&layout.running) && layout.running == layout.max_num_seqs);
    let more = found.layouts.iter().find(|layout| layout.scheme == Scheme::Int4).unwrap().running;
    assert_eq!(
        found.why[1],
        format!("{} of 32 requests fit at once; int4 would run {more}.", layout.running)
    );
    assert!(found.why[2].starts_with(&format!("{} requests at once: at most ", layout.running)));
    let chosen = found.chosen.unwrap();
    assert_eq!(
        chosen.arguments,
        Arguments {
            tensor_parallel_size: 1,
            quantization: Some("fp8".into()),
            max_num_seqs: layout.running,
            max_model_len: None,
            kv_cache_dtype: None,
            state_dtype: None,
            mtp: None,
        }
    );
    // One request is not said twice.
    let one = choice("27b", "RTX 5090", 1, 1, &[]);
    assert_eq!(one.why.len(), 2);
    assert!(one.why[1].starts_with("One request alone: at most "));
    // Requests are dealt out, and a replica runs its share.
    let many = choice("9b", "H100 80GB", 8, 20, &[]);
    let chosen = many.chosen.unwrap();
    assert_eq!(chosen.arguments.max_num_seqs, 20usize.div_ceil(chosen.replicas));
}

#[test]
fn what_fits_nothing_has_no_speed() {
    // Some tokens fit, but no sequence as long as that is asked for.
    let (config, card) = (family_config("27b").unwrap(), gpu("RTX 4090").unwrap().0);
    let options = PlanOptions { num_seqs: Some(4), context: 131_072, ..PlanOptions::default() };
    let weights = |scheme: Scheme, part: &Part| Ok(part.weights(scheme));
    let found = plan(&config, &[card], &[1], &[Scheme::Int4], &weights, &options).unwrap();
    let (row, choice) = (&found.rows[0], &found.choices[0]);
    assert!(row.fits && row.max_seqs == 0 && choice.chosen.is_none());
    assert!(choice.layouts.iter().all(|l| l.max_context == 0 && l.tokens_per_s_alone.is_none()));
    let why = &choice.why[0];
    assert!(why.contains("GiB for sequences; one of 131072 tokens needs 8.14 GiB."), "{why}");
}

#[test]
fn cards_have_links() {
    let (config, weights) = (family_config("9b").unwrap(), |s: Scheme, p: &Part| Ok(p.weights(s)));
    let with = |all_reduce_us: Option<f64>, card: &str, num_cards: usize| {
        let options = PlanOptions { all_reduce_us, ..PlanOptions::default() };
        let cards = [gpu(card).unwrap().0];
        let found = plan(&config, &cards, &[num_cards], &[Scheme::Bf16], &weights, &options).unwrap();
        let row = found.rows[0].clone();
        (row.all_reduce_us, 1.0 / row.decode_limit_tokens_per_s.unwrap())
    };
    for (card, num_cards, want) in [
        ("H100 80GB", 2, 6.0),
        ("H100 80GB", 8, 6.0),
        ("RTX 4090", 2, 20.0),
        ("L40S", 4, 20.0),
        ("H100 NVL", 2, 6.0),
        ("H100 NVL", 4, 20.0),
        ("DGX Spark", 2, 60.0),
    ] {
        let ((found, seconds), (_, without)) =
            (with(None, card, num_cards), with(Some(0.0), card, num_cards));
        assert_eq!(found, want, "{num_cards} x {card}");
        assert!((seconds - without - 64.0 * want * 1e-6).abs() < 1e-9, "{num_cards} x {card}");
    }
    assert_eq!(with(Some(11.5), "RTX 4090", 2).0, 11.5);
}

#[test]
fn a_network_is_taken_where_nothing_else_fits() {
    // Two would fit it in bf16: one takes it in fewer bits.
    let shared = choice("122b", "H200", 2, 4, &[]);
    assert_eq!(taken(&shared), (Scheme::Bf16, 2, 1, 0));
    let spark = choice("122b", "DGX Spark", 4, 4, &[]);
    assert!(spark.layouts.iter().any(|l| l.scheme == Scheme::Bf16 && l.running > 0));
    let (scheme, size, replicas, _) = taken(&spark);
    assert_eq!((scheme, size, replicas), (Scheme::Fp8Head, 1, 4));
    let place =
        "bf16 fit no sequence of 8192 tokens on one card, and only a network joins them; fp8-head fits";
    assert!(spark.why[0].starts_with(place), "{}", spark.why[0]);
    let (_, size, ..) = taken(&choice("397b", "DGX Spark", 4, 4, &[]));
    assert!(size > 1);
}

#[test]
fn what_must_be_published_is_said() {
    for (scheme, published) in [
        (Scheme::Fp8, Some("fp8, as the official -FP8 ones")),
        (Scheme::Int4Experts, Some("int4 experts, as the official -GPTQ-Int4 ones")),
        (Scheme::Nvfp4, Some("nvfp4")),
        (Scheme::Nvfp4Experts, Some("nvfp4 experts")),
        (Scheme::Bf16, None),
        (Scheme::Fp8Head, None),
        (Scheme::Int4, None),
        (Scheme::Mixed, None),
    ] {
        let chosen = choice("35b", "H200", 1, 1, &[scheme]).chosen.unwrap();
        assert_eq!(chosen.published, published);
        // What nobody publishes is made at load.
        let made = chosen.arguments.quantization.is_some() || scheme == Scheme::Bf16;
        assert_eq!(made, published.is_none(), "{scheme:?}");
    }
}

#[test]
fn cards_that_do_not_divide() {
    let found = choice("35b", "H100 80GB", 3, 1, &[Scheme::Bf16]);
    assert_eq!(taken(&found), (Scheme::Bf16, 2, 1, 1));
    assert_eq!(
        found.refused,
        [Refused {
            tensor_parallel_size: 3,
            why: "tensor_parallel_size: found 3; allowed: 1, 2, 4, 8, 16, which divide 16 key and 32 value heads of delta \
                  layers, 16 query heads, 2 key-value heads (or a multiple of them), experts 512 wide, a shared expert 512 \
                  wide"
                .into(),
        }]
    );
    // More cards than share a model.
    let many = choice("397b", "H100 80GB", 20, 32, &[Scheme::Int4]);
    assert!(many.layouts.iter().all(|layout| layout.tensor_parallel_size <= MAX_CARDS));
    let eight = many.layouts.iter().find(|layout| layout.tensor_parallel_size == 8).unwrap();
    assert_eq!((eight.replicas, eight.idle_cards), (2, 4));
}

#[test]
fn a_card_of_so_much_memory() {
    let found = choice("35b", "48GiB", 4, 32, &[Scheme::Bf16]);
    // Nothing is known of its speed: as many replicas as fit.
    assert_eq!(taken(&found), (Scheme::Bf16, 2, 2, 0));
    assert_eq!(found.gpu, "48.0 GiB");
    assert!(found.layouts.iter().all(|l| l.tokens_per_s.is_none() && l.tokens_per_s_alone.is_none()));
    assert_eq!(found.why[1], "The card's bandwidth is not known: this runs the most requests at once.");
    // Two replicas have room for fewer than four cards together.
    let found = choice("35b", "40GiB", 4, 512, &[Scheme::Bf16]);
    assert_eq!(taken(&found), (Scheme::Bf16, 4, 1, 0));
    assert_eq!(found.why[1], "207 of 512 requests fit at once.");
    for (name, gib) in [("48GB", 48e9 / (1u64 << 30) as f64), ("1073741824", 1.0), (" 1024 gib ", 1024.0)] {
        let card = gpu(name).unwrap().0;
        assert!((card.memory_gib - gib).abs() < 1e-9 && card.bandwidth_gbs.is_none(), "{name}");
    }
    for name in ["4091", "0GiB", "-5GiB", "1025GiB", "NaNGiB", "infGB", "GiB", ""] {
        let error = gpu(name).unwrap_err().to_string();
        assert!(error.contains("DGX Spark; or 1 GiB to 1024 GiB of memory, as in 48GiB"), "{error}");
    }
}

#[test]
fn ranks_have_their_share_and_what_all_have() {
    for name in ["0.8b", "9b", "27b", "35b", "122b", "397b"] {
        let config = family_config(name).unwrap();
        let whole = Part::whole(&config).params();
        let (hidden, kv_heads) = (config.hidden as u64, config.attention.num_kv_heads as u64);
        let num = |kind| config.num_layers_of(kind) as u64;
        let (attention, delta) = (num(LayerKind::Attention), num(LayerKind::DeltaNet));
        let router = match config.ffn {
            FfnConfig::Moe { num_experts, .. } => (num_experts as u64 + 1) * hidden,
            FfnConfig::Dense { .. } => 0,
        };
        let layers = attention + delta;
        let norms = (2 * layers + 1) * hidden + 512 * attention + 128 * delta;
        for world in [2u64, 4, 8] {
            let shard = Shard { rank: 0, world: world as usize, expert_parallel: false };
            let part = Part::new(&config, shard).unwrap();
            let here = part.params();
            // Heads of keys and values that more than one rank has.
            let copies = world.saturating_sub(kv_heads) * 2 * 256 * hidden * attention;
            let all = norms + layers * router + whole.embedding;
            // The embedding is the head as well, or beside it.
            let twice = if config.tied_embeddings { whole.embedding } else { 0 };
            assert_eq!(world * here.text, whole.text + (world - 1) * all + copies + twice, "{name} {world}");
            let bf16 = part.weights(Scheme::Bf16).unwrap();
            assert_eq!(bf16.resident, 2 * here.text);
            assert_eq!(bf16.read_per_token, 2 * here.active);
            assert_eq!(here.lm_head * world, whole.embedding);
        }
        if let FfnConfig::Dense { .. } = config.ffn {
            continue;
        }
        let experts = Shard { rank: 0, world: 2, expert_parallel: true };
        let (sliced, some) = (Shard { expert_parallel: false, ..experts }, experts);
        let [sliced, some] = [sliced, some].map(|shard| Part::new(&config, shard).unwrap().params());
        assert_eq!((sliced.text, sliced.active), (some.text, some.active), "{name}");
    }
}
