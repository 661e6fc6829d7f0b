//! Text of a request, whatever the cuts between its tokens.

use std::sync::{Arc, OnceLock};

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::{RequestText, overlap};
use crate::tokenizer::Tokenizer;

/// GPT-2's printable form of a byte.
fn printable(byte: u8) -> char {
    let plain = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let code = match u32::from(byte) {
        b if plain(b) => b,
        b => 256 + (0..b).filter(|&x| !plain(x)).count() as u32,
    };
    char::from_u32(code).unwrap()
}

/// Tokens of one, two and three bytes: id = byte, then these.
const LONGER: [&str; 8] = ["ab", "bc", "abc", "é", "日", "<e", "nd", "\n\n"];

/// Ids are bytes, then `LONGER`, then the special token `<end>`.
fn tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    let make = || {
        let mut vocab = Map::new();
        for byte in 0..=255u8 {
            vocab.insert(printable(byte).to_string(), json!(byte));
        }
        let (mut id, mut merges) = (256, Vec::new());
        for text in LONGER {
            let form: Vec<String> = text.bytes().map(|b| printable(b).to_string()).collect();
            vocab.insert(form.concat(), json!(id));
            id += 1;
            merges.push(match form.len() {
                3 if text == "日" => continue, // decoded only: it has no merge
                n => [form[..n - 1].concat(), form[n - 1].clone()].join(" "),
            });
        }
        let split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        let file = json!({
            "version": "1.0",
            "added_tokens": [{"id": 264, "content": "<end>", "special": true, "lstrip": false, "rstrip": false,
                              "normalized": false, "single_word": false}],
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": false},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}]},
            "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                      "vocab": Value::Object(vocab), "merges": merges},
        });
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
        Arc::new(Tokenizer::from_directory(dir.path()).unwrap())
    };
    Arc::clone(TOKENIZER.get_or_init(make))
}

/// Pushes tokens until the text ends: all text shown, pieces, and whether a stop string ended it.
fn run(ids: &[u32], stop: &[&str], include: bool) -> (String, Vec<String>, bool) {
    let stop = stop.iter().map(|s| s.to_string()).collect();
    let mut text = RequestText::new(tokenizer(), stop, include, true);
    let mut pieces = Vec::new();
    for &id in ids {
        let (piece, stopped) = text.push(id).unwrap();
        pieces.push(piece);
        if stopped {
            return (pieces.concat(), pieces, true);
        }
    }
    let (rest, stopped) = text.finish();
    pieces.push(rest);
    (pieces.concat(), pieces, stopped)
}

/// What the text is by definition: cut at the stop string that is complete first.
fn expected(text: &str, stop: &[&str], include: bool) -> (String, bool) {
    let ends = stop.iter().filter_map(|s| text.find(s).map(|at| (at + s.len(), at)));
    match ends.min() {
        Some((end, at)) => (text[..if include { end } else { at }].to_string(), true),
        None => (text.to_string(), false),
    }
}

#[test]
fn overlap_is_the_longest_start_of_the_stop_string() {
    assert_eq!(overlap("abc", "cd"), 1);
    assert_eq!(overlap("aab", "aabaab"), 3);
    assert_eq!(overlap("ab", "ab"), 0);
    assert_eq!(overlap("xé", "éé"), 2);
    assert_eq!(overlap("", "a"), 0);
}

#[test]
fn the_tokenizer_of_these_tests() {
    let t = tokenizer();
    assert_eq!(t.encode("a<end>"), [97, 264]);
    assert_eq!(t.decode(&[256, 260, 264], true).unwrap(), "ab日");
}

#[test]
fn stop_strings_over_tokens() {
    let bytes = |s: &str| s.bytes().map(u32::from).collect::<Vec<_>>();
    let (text, pieces, stopped) = run(&bytes("one STOP two"), &["STOP"], false);
    assert_eq!((text.as_str(), stopped), ("one ", true));
    assert_eq!(pieces.len(), 8); // nothing is shown of it, and it ends at its last byte
    assert_eq!(run(&bytes("one STOP two"), &["STOP"], true).0, "one STOP");
    // The start of a stop string that does not come is shown after all.
    let (text, pieces, _) = run(&bytes("a STO!"), &["STOP"], false);
    assert_eq!(text, "a STO!");
    assert_eq!(pieces[2..6], ["", "", "", "STO!"]);
    // ... also at the end.
    assert_eq!(run(&bytes("a STO"), &["STOP"], false).0, "a STO");
    // A special token has no text, and so is in no stop string.
    assert_eq!(run(&[97, 264, 98], &["<end>"], false).0, "ab");
    // Of two, the one that is complete first.
    assert_eq!(run(&bytes("xabc"), &["abc", "b"], false).0, "xa");
    assert_eq!(run(&[120, 258], &["abc", "b"], false).0, "xa");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn stop_strings_over_any_tokens(
        ids in prop::collection::vec(prop_oneof![
            3 => 256u32..265, 2 => 97u32..101, 1 => Just(10u32), 1 => prop::sample::select(b"\xe6\x97\xa5\xc3\xa9".to_vec()).prop_map(u32::from),
        ], 0..24),
        stop in prop::collection::vec(prop::sample::select(vec![
            "a", "abc", "bca", "cab", "日", "é", "éa", "\n\n", "<end", "end", "aab", "ababc", "\u{fffd}", "a日",
        ]), 0..4),
        include in any::<bool>(),
    ) {
        let whole = tokenizer().decode(&ids, true).unwrap();
        let (text, pieces, stopped) = run(&ids, &stop, include);
        prop_assert_eq!((text, stopped), expected(&whole, &stop, include), "{:?}", pieces);
    }

    #[test]
    fn nothing_is_held_without_a_stop_string(ids in prop::collection::vec(256u32..264, 0..12)) {
        let (text, pieces, _) = run(&ids, &[], false);
        prop_assert!(pieces[..ids.len()].iter().all(|p| !p.is_empty()));
        prop_assert_eq!(text, tokenizer().decode(&ids, true).unwrap());
    }
}

#[test]
fn an_unknown_token_is_an_error() {
    let mut text = RequestText::new(tokenizer(), vec![], false, true);
    assert!(text.push(265).is_err());
    assert_eq!(text.push(97).unwrap().0, "a");
}
