use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::safetensors::parse_header;
use super::{Checkpoint, DType, Depth, ExpertTensors, FfnTensors, MixerTensors, ModelTensors};
use crate::Error;
use crate::config::ModelConfig;

/// The bytes of a file with this header and this much data.
pub(super) fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// A file of tensors, one after the other, with bytes that tell them apart.
pub(super) fn tensors(list: &[(&str, DType, Vec<usize>)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (i, (name, dtype, shape)) in list.iter().enumerate() {
        let start = data.len();
        let len = shape.iter().product::<usize>() * dtype.bits() / 8;
        data.extend((0..len).map(|j| (i * 7 + j) as u8));
        let entry = json!({"dtype": dtype.name(), "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.to_string(), entry);
    }
    file(&Value::Object(header).to_string(), &data)
}

fn parse(bytes: &[u8]) -> crate::Result<Vec<super::safetensors::TensorInfo>> {
    parse_header(bytes, Path::new("x.safetensors"))
}

/// `what` of the `File` error.
#[track_caller]
fn file_error(bytes: &[u8]) -> String {
    match parse(bytes) {
        Err(Error::File { what, .. }) => what,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_good_file() {
    let bytes = tensors(&[
        ("b", DType::BF16, vec![2, 3]),
        ("a", DType::F32, vec![]),
        ("empty", DType::F32, vec![0, 5]),
        ("half", DType::F4, vec![3, 2]),
    ]);
    let found = parse(&bytes).unwrap();
    let names: Vec<_> = found.iter().map(|t| (t.name.as_str(), t.range.len())).collect();
    assert_eq!(names, [("b", 12), ("a", 4), ("empty", 0), ("half", 3)]);
    assert_eq!(parse(&file("{}", &[])).unwrap(), []);
    assert_eq!(parse(&file("{\"__metadata__\":{\"format\":\"pt\"}}   ", &[])).unwrap(), []);
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = tensors(&[("a", DType::BF16, vec![2, 2]), ("b", DType::F32, vec![3])]);
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for len in 0..bytes.len() {
        match parse(&bytes[..len]) {
            Err(Error::File { what, .. }) if len < 8 => {
                assert_eq!(what, format!("{len} bytes; a safetensors file has at least 8"))
            }
            Err(Error::File { what, .. }) if len < header => assert!(what.starts_with("truncated"), "{what}"),
            Err(Error::File { path, what }) => {
                let entry = if len < header + 8 { "a has bytes 0..8" } else { "b has bytes 8..20" };
                let follow = format!("and {} bytes follow the header", len - header);
                // Entries are checked in the header's order, and "b" may end past a file that "a" fits.
                let words = format!("truncated, shorter than its header says: {entry}, {follow}");
                assert_eq!((path, what), (Path::new("x.safetensors").into(), words), "at {len}");
            }
            other => panic!("at {len}: {other:?}"),
        }
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert_eq!(file_error(&longer), "1 bytes after the last tensor");
}

#[test]
fn headers_that_are_no_headers() {
    for (header, reason) in [
        ("", "EOF"),
        ("[]", "invalid type: sequence"),
        ("{", "EOF"),
        ("{} x", "trailing"),
        (r#"{"a":{"dtype":"F32","shape":[1]}}"#, "a: missing field `data_offsets`"),
        (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}"#, "a: invalid length 1"),
        (r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, "a: invalid value"),
        (r#"{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}"#, "a: invalid type"),
        (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}"#, "a: unknown field `x`"),
        (r#"{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}"#, "a: duplicate field"),
        (
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
            "a twice",
        ),
        (r#"{"__metadata__":{"a":1}}"#, "__metadata__: invalid type"),
    ] {
        let what = file_error(&file(header, &[0; 4]));
        assert!(what.contains(reason), "{header}: {what}");
    }
    let mut bytes = u64::MAX.to_le_bytes().to_vec();
    bytes.extend_from_slice(b"{}");
    assert_eq!(file_error(&bytes), "a header of 18446744073709551615 bytes; allowed: at most 100000000");
    let mut bytes = 4u64.to_le_bytes().to_vec();
    bytes.extend_from_slice(b"{\"\xff\"");
    assert_eq!(file_error(&bytes), "the header is not UTF-8 at byte 10");
}

#[test]
fn entries_that_cannot_be() {
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        let header = format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#);
        match parse(&file(&header, &[0; 8])) {
            Err(Error::Tensor { name, found, expected }) => {
                assert_eq!(name, "t");
                format!("{found}; {expected}")
            }
            other => panic!("{other:?}"),
        }
    };
    assert!(entry("F7", "[1]", "[0,8]").starts_with("dtype \"F7\"; one of F32, F16, BF16"));
    assert_eq!(entry("F32", "[3]", "[0,8]"), "8 bytes; 12 bytes for F32 [3]");
    assert_eq!(entry("F32", "[]", "[0,8]"), "8 bytes; 4 bytes for F32 []");
    assert_eq!(entry("F32", "[2]", "[8,0]"), "bytes 8..0; an end that is not before the start");
    let overflow = "shape [4294967296, 4294967296]; a shape whose size fits 64 bits";
    assert_eq!(entry("F32", "[4294967296,4294967296]", "[0,8]"), overflow);
    // A product that wraps to the right number of bytes.
    assert!(entry("U8", "[9223372036854775809,2]", "[0,8]").contains("fits 64 bits"));
    assert_eq!(entry("F4", "[3]", "[0,2]"), "12 bits for F4 [3]; a whole number of bytes");
}

#[test]
fn gaps_and_overlaps() {
    let two = |a: [usize; 2], b: [usize; 2]| {
        let of =
            |[from, to]: [usize; 2]| json!({"dtype": "U8", "shape": [to - from], "data_offsets": [from, to]});
        match parse(&file(&json!({"a": of(a), "b": of(b)}).to_string(), &[0; 8])) {
            Err(Error::Tensor { name, found, expected }) => (name, found, expected),
            other => panic!("{other:?}"),
        }
    };
    let (name, found, expected) = two([0, 5], [4, 8]);
    assert_eq!((name.as_str(), found.as_str()), ("b", "bytes from 4 on, overlapping another tensor"));
    assert_eq!(expected, "bytes from 5 on, where the tensor before it ends");
    assert_eq!(two([0, 8], [0, 8]).0, "b");
    let (name, found, _) = two([0, 3], [4, 8]);
    assert_eq!((name.as_str(), found.as_str()), ("b", "bytes from 4 on, after a gap"));
    assert_eq!(two([1, 4], [4, 8]).0, "a");
}

proptest! {
    #[test]
    fn flipped_bytes_never_panic(at in any::<prop::sample::Index>(), mask in 1..=255u8) {
        let mut bytes = tensors(&[("a", DType::BF16, vec![2, 2]), ("b.c", DType::F32, vec![3]), ("d", DType::F4, vec![2])]);
        let i = at.index(bytes.len());
        bytes[i] ^= mask;
        check_any(&bytes)?;
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        check_any(&bytes)?;
    }

    #[test]
    fn random_headers_never_panic(
        entries in prop::collection::vec(
            ("[a-c]", prop_oneof![Just("F32"), Just("BF16"), Just("F4"), Just("F6_E2M3"), Just("X")],
             prop::collection::vec(prop_oneof![0..6u64, any::<u64>()], 0..4),
             prop_oneof![0..40u64, any::<u64>()], prop_oneof![0..40u64, any::<u64>()]),
            0..5),
        data in 0..40usize,
    ) {
        let text: Vec<String> = entries
            .iter()
            .map(|(name, dtype, shape, from, to)| {
                format!("\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{from},{to}]}}")
            })
            .collect();
        check_any(&file(&format!("{{{}}}", text.join(",")), &vec![0; data]))?;
    }
}

/// Whatever the bytes are: a typed error, or ranges that cover the data and fit their shapes.
fn check_any(bytes: &[u8]) -> Result<(), TestCaseError> {
    match parse(bytes) {
        Ok(list) => {
            let mut total = 0;
            for t in &list {
                prop_assert!(t.range.end <= bytes.len());
                let bits =
                    if t.shape.contains(&0) { 0 } else { t.shape.iter().product::<usize>() * t.dtype.bits() };
                prop_assert_eq!(t.range.len() * 8, bits);
                total += t.range.len();
            }
            let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            prop_assert_eq!(8 + header + total, bytes.len());
        }
        Err(Error::File { .. } | Error::Tensor { .. }) => {}
        Err(other) => prop_assert!(false, "{}", other),
    }
    Ok(())
}

/// A directory with these files.
pub(super) fn dir(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn index(map: Value) -> (&'static str, Vec<u8>) {
    (
        "model.safetensors.index.json",
        json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string().into(),
    )
}

fn one(name: &str) -> Vec<u8> {
    tensors(&[(name, DType::F32, vec![2])])
}

#[test]
fn single_file_and_shards() {
    let whole =
        dir(&[("model.safetensors", tensors(&[("a", DType::F32, vec![2]), ("b", DType::BF16, vec![3])]))]);
    let single = Checkpoint::open(whole.path()).unwrap();
    assert_eq!((single.num_tensors(), single.total_bytes(), single.files().len()), (2, 14, 1));
    assert_eq!(single.get("a").unwrap().bytes().unwrap(), [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!((single.get("b").unwrap().shape, single.get("b").unwrap().num_elements()), (vec![3], 3));
    assert!(single.get("c").is_none());
    let path: PathBuf = whole.path().join("model.safetensors");
    assert_eq!(Checkpoint::open(&path).unwrap().num_tensors(), 2);

    let b = tensors(&[("b", DType::BF16, vec![3])]);
    let mut b_shifted = b.clone();
    let start = b.len() - 6;
    for (j, byte) in b_shifted[start..].iter_mut().enumerate() {
        *byte = (7 + j) as u8;
    }
    let split = dir(&[
        ("m-1.safetensors", one("a")),
        ("m-2.safetensors", b_shifted),
        index(json!({"a": "m-1.safetensors", "b": "m-2.safetensors"})),
    ]);
    let sharded = Checkpoint::open(split.path()).unwrap();
    assert_eq!(sharded.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(sharded.files().len(), 2);
    for depth in [Depth::Quick, Depth::Full] {
        assert_eq!(single.fingerprint(depth), sharded.fingerprint(depth));
    }
}

#[test]
fn shards_and_index_that_disagree() {
    let open = |files: &[(&str, Vec<u8>)]| Checkpoint::open(dir(files).path()).unwrap_err();
    let missing = open(&[
        ("m-1.safetensors", one("a")),
        index(json!({"a": "m-1.safetensors", "b": "m-1.safetensors"})),
    ]);
    assert!(
        matches!(&missing, Error::Tensor { name, found, .. } if name == "b" && found == "nothing"),
        "{missing}"
    );
    let no_shard = open(&[index(json!({"a": "m-1.safetensors"}))]);
    assert!(matches!(&no_shard, Error::Io { path, .. } if path.ends_with("m-1.safetensors")), "{no_shard}");
    let twice = open(&[
        ("m-1.safetensors", one("a")),
        ("m-2.safetensors", tensors(&[("a", DType::F32, vec![2]), ("b", DType::F32, vec![2])])),
        index(json!({"a": "m-1.safetensors", "b": "m-2.safetensors"})),
    ]);
    assert!(
        matches!(&twice, Error::Tensor { name, found, .. } if name == "a" && found == "it in m-2.safetensors")
    );
    let unnamed = open(&[
        ("m-1.safetensors", tensors(&[("a", DType::F32, vec![2]), ("z", DType::F32, vec![2])])),
        index(json!({"a": "m-1.safetensors"})),
    ]);
    assert!(matches!(&unnamed, Error::Tensor { name, .. } if name == "z"));
    for shard in [
        "../m.safetensors",
        "/etc/m.safetensors",
        "d/m.safetensors",
        "d\\m.safetensors",
        "..",
        "",
        "m.bin",
        "a\0.safetensors",
    ] {
        let error = open(&[index(json!({"a": shard}))]);
        assert!(
            matches!(&error, Error::File { what, .. } if what.starts_with("a is in")),
            "{shard:?}: {error}"
        );
    }
    for text in [
        "",
        "[]",
        "{}",
        r#"{"weight_map": []}"#,
        r#"{"weight_map": {"a": 1}}"#,
        r#"{"weight_map": {"a": "m.safetensors", "a": "m.safetensors"}}"#,
    ] {
        let error = open(&[("model.safetensors.index.json", text.into())]);
        assert!(matches!(error, Error::File { .. }), "{text}: {error}");
    }
}

#[test]
fn directories_without_weights() {
    let other = Checkpoint::open(dir(&[("model.bin", vec![]), ("config.json", vec![])]).path()).unwrap_err();
    assert!(matches!(&other, Error::File { what, .. } if what.starts_with("found model.bin;")), "{other}");
    assert!(matches!(Checkpoint::open(dir(&[]).path()), Err(Error::File { .. })));
    assert!(matches!(Checkpoint::open(Path::new("/nonexistent/model")), Err(Error::Io { .. })));
    let empty = Checkpoint::open(dir(&[("model.safetensors", vec![])]).path()).unwrap_err();
    assert!(matches!(&empty, Error::File { what, .. } if what.starts_with("0 bytes")), "{empty}");
}

#[test]
fn fingerprints_see_what_they_say() {
    let build = |len: usize, flip: Option<usize>, name: &str, dtype: DType| {
        let mut bytes = tensors(&[(name, dtype, vec![len / dtype.size()])]);
        if let Some(i) = flip {
            let at = bytes.len() - len + i;
            bytes[at] ^= 1;
        }
        let dir = dir(&[("model.safetensors", bytes)]);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        (checkpoint.fingerprint(Depth::Quick), checkpoint.fingerprint(Depth::Full))
    };
    let base = build(20_000, None, "a", DType::F32);
    assert_eq!(base, build(20_000, None, "a", DType::F32));
    assert!(base.0.starts_with("quick:") && base.1.starts_with("full:") && base.0.len() == 22);
    for other in [
        build(20_000, None, "b", DType::F32),
        build(20_000, None, "a", DType::I32),
        build(20_004, None, "a", DType::F32),
    ] {
        assert!(other.0 != base.0 && other.1 != base.1);
    }
    for seen in [0, 4095, 10_000, 14_095, 15_904, 19_999] {
        let flipped = build(20_000, Some(seen), "a", DType::F32);
        assert!(flipped.0 != base.0 && flipped.1 != base.1, "{seen}");
    }
    for unseen in [4096, 9_999, 14_096, 15_903] {
        let flipped = build(20_000, Some(unseen), "a", DType::F32);
        assert!(flipped.0 == base.0 && flipped.1 != base.1, "{unseen}");
    }
    assert_ne!(build(12_288, Some(5000), "a", DType::F32).0, build(12_288, None, "a", DType::F32).0);
}

// ---------------------------------------------------------------------------------------------------
// Names

pub(super) fn config(moe: bool, tied: bool) -> ModelConfig {
    let mut text = json!({
        "model_type": if moe { "qwen3_5_moe_text" } else { "qwen3_5_text" },
        "vocab_size": 11, "hidden_size": 6, "num_hidden_layers": 2, "full_attention_interval": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 3,
        "linear_value_head_dim": 5, "intermediate_size": 9, "tie_word_embeddings": tied
    });
    if moe {
        text["num_experts"] = json!(3);
        text["num_experts_per_tok"] = json!(2);
        text["moe_intermediate_size"] = json!(7);
        text["shared_expert_intermediate_size"] = json!(5);
    }
    ModelConfig::from_value(&text).unwrap()
}

pub(super) type Entry = (String, DType, Vec<usize>);

/// Every tensor of `config`, under a prefix.
pub(super) fn entries(prefix: &str, moe: bool, fused: bool) -> Vec<Entry> {
    use DType::{BF16, F32};
    let mut list = vec![];
    let mut add = |name: String, dtype: DType, shape: &[usize]| list.push((name, dtype, shape.to_vec()));
    add(format!("{prefix}embed_tokens.weight"), BF16, &[11, 6]);
    add(format!("{prefix}norm.weight"), BF16, &[6]);
    add("lm_head.weight".into(), BF16, &[11, 6]);
    for i in 0..2 {
        let at = format!("{prefix}layers.{i}.");
        add(format!("{at}input_layernorm.weight"), BF16, &[6]);
        add(format!("{at}post_attention_layernorm.weight"), BF16, &[6]);
        if i == 1 {
            for (name, shape) in
                [("q_proj", [64, 6]), ("k_proj", [16, 6]), ("v_proj", [16, 6]), ("o_proj", [6, 32])]
            {
                add(format!("{at}self_attn.{name}.weight"), BF16, &shape);
            }
            add(format!("{at}self_attn.q_norm.weight"), BF16, &[8]);
            add(format!("{at}self_attn.k_norm.weight"), BF16, &[8]);
        } else {
            for (name, shape) in [
                ("in_proj_qkv", [32, 6]),
                ("in_proj_z", [20, 6]),
                ("in_proj_b", [4, 6]),
                ("in_proj_a", [4, 6]),
                ("out_proj", [6, 20]),
            ] {
                add(format!("{at}linear_attn.{name}.weight"), BF16, &shape);
            }
            add(format!("{at}linear_attn.conv1d.weight"), BF16, &[32, 1, 4]);
            add(format!("{at}linear_attn.A_log"), F32, &[4]);
            add(format!("{at}linear_attn.dt_bias"), BF16, &[4]);
            add(format!("{at}linear_attn.norm.weight"), F32, &[5]);
        }
        let mut triple = |at: String, width: usize| {
            add(format!("{at}gate_proj.weight"), BF16, &[width, 6]);
            add(format!("{at}up_proj.weight"), BF16, &[width, 6]);
            add(format!("{at}down_proj.weight"), BF16, &[6, width]);
        };
        if !moe {
            triple(format!("{at}mlp."), 9);
            continue;
        }
        triple(format!("{at}mlp.shared_expert."), 5);
        if !fused {
            (0..3).for_each(|e| triple(format!("{at}mlp.experts.{e}."), 7));
        } else {
            add(format!("{at}mlp.experts.gate_up_proj"), BF16, &[3, 14, 6]);
            add(format!("{at}mlp.experts.down_proj"), BF16, &[3, 6, 7]);
        }
        add(format!("{at}mlp.gate.weight"), BF16, &[3, 6]);
        add(format!("{at}mlp.shared_expert_gate.weight"), BF16, &[1, 6]);
    }
    list
}

fn resolve(list: &[Entry], config: &ModelConfig) -> crate::Result<ModelTensors> {
    let list: Vec<_> = list.iter().map(|(n, d, s)| (n.as_str(), *d, s.clone())).collect();
    let dir = dir(&[("model.safetensors", tensors(&list))]);
    ModelTensors::resolve(&Checkpoint::open(dir.path()).unwrap(), config)
}

#[test]
fn every_layout_resolves() {
    for prefix in ["model.language_model.", "model."] {
        for (moe, fused) in [(false, false), (true, true), (true, false)] {
            let mut list = entries(prefix, moe, fused);
            list.push(("model.visual.patch_embed.proj.bias".into(), DType::BF16, vec![3]));
            list.push(("mtp.fc.weight".into(), DType::BF16, vec![6, 12]));
            let found = resolve(&list, &config(moe, false)).unwrap();
            assert_eq!((found.layers.len(), found.vision.len(), found.mtp.len()), (2, 1, 1));
            assert!(found.lm_head.is_some());
            assert!(
                matches!(&found.layers[0].mixer, MixerTensors::DeltaNet { a_log, .. } if a_log.dtype == DType::F32)
            );
            assert!(matches!(&found.layers[1].mixer, MixerTensors::Attention { .. }));
            match &found.layers[0].ffn {
                FfnTensors::Dense { down_proj, .. } => {
                    assert_eq!((moe, &down_proj.shape), (false, &vec![6, 9]))
                }
                FfnTensors::Moe { experts: ExpertTensors::Fused { .. }, .. } => assert!(fused),
                FfnTensors::Moe { experts: ExpertTensors::PerExpert(list), .. } => {
                    assert_eq!((fused, list.len()), (false, 3))
                }
            }
        }
    }
    let text: usize =
        entries("model.", true, true).iter().map(|(_, d, s)| d.size() * s.iter().product::<usize>()).sum();
    let found = resolve(&entries("model.", true, true), &config(true, false)).unwrap();
    // Without the embedding and without one of the three experts, in both layers.
    let expected = text - 2 * 66 - 2 * 2 * 3 * 42;
    assert_eq!(found.bytes_per_token(&config(true, false)), expected as u64);
}

#[test]
fn tied_heads() {
    let mut list = entries("model.", false, false);
    // The same bytes as the embedding would need the same place in the file; these differ.
    assert!(resolve(&list, &config(false, true)).unwrap().lm_head.is_some());
    list.retain(|(name, ..)| name != "lm_head.weight");
    assert!(resolve(&list, &config(false, true)).unwrap().lm_head.is_none());
    let error = resolve(&list, &config(false, false)).unwrap_err();
    assert!(
        matches!(&error, Error::Tensor { name, found, expected }
        if name == "lm_head.weight" && found == "nothing" && expected == "shape [11, 6]"),
        "{error}"
    );
    // Equal bytes: a head that is the embedding is dropped.
    let header = json!({
        "model.embed_tokens.weight": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]},
        "lm_head.weight": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [4, 8]},
        "model.norm.weight": {"dtype": "BF16", "shape": [2], "data_offsets": [8, 12]}
    });
    let dir = dir(&[("model.safetensors", file(&header.to_string(), &[1, 2, 3, 4, 1, 2, 3, 4, 0, 0, 0, 0]))]);
    let mut tiny = config(false, true);
    (tiny.vocab, tiny.hidden) = (1, 2);
    tiny.layers.clear();
    assert!(ModelTensors::resolve(&Checkpoint::open(dir.path()).unwrap(), &tiny).unwrap().lm_head.is_none());
}

#[test]
fn missing_extra_and_misshapen() {
    let list = entries("model.language_model.", true, true);
    let config = config(true, false);
    let error = |list: &[Entry]| match resolve(list, &config) {
        Err(Error::Tensor { name, found, expected }) => (name, found, expected),
        other => panic!("{:?}", other.err()),
    };
    // Each tensor missing, and each of a wrong shape, names itself.
    for i in 0..list.len() {
        let mut fewer = list.clone();
        let (name, _, shape) = fewer.remove(i);
        if !name.ends_with("embed_tokens.weight") {
            assert_eq!(error(&fewer), (name.clone(), "nothing".into(), format!("shape {shape:?}")));
        }
        let mut wrong = list.clone();
        wrong[i].2.push(2);
        let (found_name, found, expected) = error(&wrong);
        assert_eq!((found_name, found), (name, format!("shape {:?}", wrong[i].2)));
        assert_eq!(expected, format!("shape {shape:?}"));
    }
    let mut more = list.clone();
    more.push(("model.language_model.layers.2.input_layernorm.weight".into(), DType::BF16, vec![6]));
    let (name, found, expected) = error(&more);
    assert_eq!(name, "model.language_model.layers.2.input_layernorm.weight");
    assert_eq!((found.as_str(), expected.as_str()), ("BF16 [6]", "no such tensor in this model"));
    more.push(("zzz".into(), DType::BF16, vec![6]));
    more.remove(1);
    let (name, _, expected) = error(&more);
    assert_eq!(name, "model.language_model.norm.weight");
    assert!(expected.ends_with("(and 2 more tensors like this or otherwise wrong)"), "{expected}");
    let mut quantized = list.clone();
    quantized[5].1 = DType::F8_E4M3;
    let (name, found, _) = error(&quantized);
    assert_eq!((name, found.as_str()), (quantized[5].0.clone(), "dtype F8_E4M3"));
    // An expert missing among single ones, and both layouts at once.
    let mut single = entries("model.language_model.", true, false);
    single.retain(|(name, ..)| !name.ends_with("layers.1.mlp.experts.2.up_proj.weight"));
    assert_eq!(error(&single).0, "model.language_model.layers.1.mlp.experts.2.up_proj.weight");
    let mut both = list.clone();
    both.extend(
        entries("model.language_model.", true, false)
            .into_iter()
            .filter(|(name, ..)| name.contains("layers.0.mlp.experts.")),
    );
    assert_eq!(error(&both).0, "model.language_model.layers.0.mlp.experts.down_proj");
}
