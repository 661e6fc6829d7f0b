//! Hostile headers and their exact errors.

use std::path::Path;

use super::header::{Header, parse};
use super::{Gguf, TensorType, Value, find};
use crate::{Error, Result};

/// A header, written piece by piece.
#[derive(Clone)]
struct File(Vec<u8>);

impl File {
    fn new(num_tensors: u64, num_keys: u64) -> Self {
        File(b"GGUF".to_vec()).u32(3).u64(num_tensors).u64(num_keys)
    }

    fn u32(self, n: u32) -> Self {
        self.bytes(&n.to_le_bytes())
    }

    fn u64(self, n: u64) -> Self {
        self.bytes(&n.to_le_bytes())
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn text(self, text: &[u8]) -> Self {
        self.u64(text.len() as u64).bytes(text)
    }

    fn tensor(self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        let head = self.text(name.as_bytes()).u32(dims.len() as u32);
        dims.iter().fold(head, |file, &dim| file.u64(dim)).u32(kind).u64(offset)
    }

    fn data(mut self, len: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(32) + len, 7);
        self
    }

    fn parse(&self) -> Result<Header> {
        parse(&self.0, Path::new("x.gguf"))
    }

    /// The text of the error, without the file's name.
    #[track_caller]
    fn error(&self) -> String {
        let error = self.parse().expect_err("it was read").to_string();
        error.strip_prefix("x.gguf: ").unwrap_or(&error).to_string()
    }
}

#[test]
fn a_good_file() {
    let file = File::new(2, 5)
        .text(b"a")
        .u32(4)
        .u32(7)
        .text(b"b")
        .u32(1)
        .bytes(&[0xfe])
        .text(b"c")
        .u32(6)
        .bytes(&0.5f32.to_le_bytes())
        .text(b"d")
        .u32(9)
        .u32(8)
        .u64(2)
        .text(b"x")
        .text("日".as_bytes())
        .text(b"e")
        .u32(9)
        .u32(7)
        .u64(2)
        .bytes(&[1, 0])
        // In the order of the list, not of the data.
        .tensor("late", &[256, 3], 14, 64)
        .tensor("first", &[3, 2, 2], 0, 0)
        .data(64 + 3 * 210);
    let header = file.parse().unwrap();
    assert_eq!(header.values["a"], Value::Integer(7));
    assert_eq!(header.values["b"], Value::Integer(-2));
    assert_eq!(header.values["c"], Value::Float(0.5));
    let Value::List(texts) = &header.values["d"] else { panic!() };
    assert_eq!(texts.texts(&file.0).unwrap().collect::<Vec<_>>(), ["x", "日"]);
    assert!(texts.numbers(&file.0).is_none());
    let Value::List(bools) = &header.values["e"] else { panic!() };
    assert_eq!(bools.numbers(&file.0).unwrap(), [Value::Bool(true), Value::Bool(false)]);
    assert!(bools.texts(&file.0).is_none());
    let found: Vec<_> =
        header.tensors.iter().map(|t| (t.name.as_str(), t.kind, t.shape.clone(), t.range.len())).collect();
    let expected =
        [("first", TensorType::F32, vec![2, 2, 3], 48), ("late", TensorType::Q6_K, vec![3, 256], 630)];
    assert_eq!(found, expected);
    assert_eq!(header.tensors[1].range.end, file.0.len());
    // Bytes after the last tensor are padding.
    assert!(file.bytes(&[0; 40]).parse().is_ok());
}

#[test]
fn every_shorter_file_is_refused() {
    let file = File::new(1, 2)
        .text(b"a")
        .u32(8)
        .text(b"text")
        .text(b"b")
        .u32(9)
        .u32(8)
        .u64(2)
        .text(b"x")
        .text(b"y")
        .tensor("t", &[8], 0, 0)
        .data(32);
    assert!(file.parse().is_ok());
    for len in 0..file.0.len() {
        let error = File(file.0[..len].to_vec()).error();
        assert!(error.starts_with("truncated"), "{len}: {error}");
    }
}

#[test]
fn what_is_no_gguf() {
    let head = |magic: &[u8], version: u32| File(magic.to_vec()).u32(version).u64(0).u64(0).error();
    assert_eq!(head(b"ggml", 3), r#"it starts with "ggml", not with "GGUF""#);
    assert_eq!(head(b"GGUF", 1), "GGUF version 1; allowed: 2, 3");
    assert_eq!(head(b"GGUF", 4), "GGUF version 4; allowed: 2, 3");
    assert_eq!(head(b"GGUF", 3u32.swap_bytes()), "big-endian; allowed: little-endian");
    assert_eq!(File::new(1 << 40, 0).error(), "1099511627776 tensors; allowed: at most 1048576");
    assert_eq!(File::new(0, u64::MAX).error(), "18446744073709551615 keys; allowed: at most 65536");
}

#[test]
fn bad_values() {
    let one = |key: &[u8], kind: u32| File::new(0, 1).text(key).u32(kind);
    assert_eq!(one(b"\xff", 4).u32(0).error(), "a key at byte 24 is not UTF-8");
    assert_eq!(one(&[b'k'; 1 << 16], 4).error(), "a key of 65536 bytes at byte 24; allowed: at most 65535");
    assert_eq!(one(b"k", 13).error(), "k: found type number 13; allowed: the format's types, 0 to 12");
    assert_eq!(one(b"k", 7).bytes(&[2]).error(), "k: found byte 2; allowed: 0 or 1");
    assert_eq!(
        one(b"k", 9).u32(9).u64(0).error(),
        "k: found a list of lists; allowed: a list of numbers or texts"
    );
    for (kind, name) in [(0, "U8"), (8, "Text"), (10, "U64")] {
        let expected = format!("truncated: k has {} items of {name}, and 3 bytes follow", u64::MAX);
        assert_eq!(one(b"k", 9).u32(kind).u64(u64::MAX).bytes(&[0; 3]).error(), expected);
    }
    assert_eq!(
        one(b"k", 8).u64(1 << 50).error(),
        "a text of 1125899906842624 bytes at byte 37; allowed: at most 16777216".replace("a text", "k")
    );
    let twice = File::new(0, 2).text(b"k").u32(0).bytes(&[1]).text(b"k").u32(0).bytes(&[1]);
    assert_eq!(twice.error(), "the key k twice");
}

#[test]
fn bad_tensors() {
    let one = |dims: &[u64], kind: u32, offset: u64| File::new(1, 0).tensor("t", dims, kind, offset).data(64);
    let shape = "expected a shape above 0 whose size fits 64 bits";
    for (file, error) in [
        (one(&[], 0, 0), "tensor t: found 0 dimensions; expected 1 to 4".to_string()),
        (one(&[1; 5], 0, 0), "tensor t: found 5 dimensions; expected 1 to 4".into()),
        (one(&[4, 0], 0, 0), format!("tensor t: found shape [0, 4]; {shape}")),
        (one(&[1 << 32, 1 << 32], 0, 0), format!("tensor t: found shape [4294967296, 4294967296]; {shape}")),
        (one(&[1 << 62], 0, 0), format!("tensor t: found shape [{}]; {shape}", 1u64 << 62)),
        (
            one(&[48], 8, 0),
            "tensor t: found rows of 48 elements in Q8_0; expected rows of whole blocks of 32".into(),
        ),
        (one(&[4], 0, 8), "tensor t: found offset 8; expected a multiple of 32".into()),
        (
            one(&[4], 0, 32),
            "tensor t: found bytes from 32 on, after a gap; expected bytes from 0 on, after the tensor before it"
                .into(),
        ),
        (
            one(&[17], 0, 0),
            "truncated, shorter than its header says: t has 68 bytes from 0 on, and 64 bytes follow the header"
                .into(),
        ),
    ] {
        assert_eq!(file.error(), error);
    }
    let two = |name: &str, offset| {
        File::new(2, 0).tensor("t", &[9], 0, 0).tensor(name, &[1], 0, offset).data(128).error()
    };
    assert_eq!(two("t", 64), "tensor t: found it twice; expected it once");
    assert!(two("u", 32).contains("found bytes from 32 on, overlapping another tensor"));
    assert!(two("u", u64::MAX - 31).contains("after a gap"));
    let long = "n".repeat(257);
    assert_eq!(
        File::new(1, 0).tensor(&long, &[1], 0, 0).error(),
        "a tensor's name of 257 bytes at byte 24; allowed: at most 256"
    );
}

#[test]
fn paths() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let touch = |name: &str| std::fs::write(at(name), b"").unwrap();
    assert_eq!(find(dir.path()).unwrap(), None);
    assert_eq!(find(&at("none")).unwrap(), None);
    assert_eq!(find(&at("none.gguf")).unwrap(), Some(at("none.gguf")));
    touch("mmproj-x.gguf");
    assert_eq!(find(dir.path()).unwrap(), Some(at("mmproj-x.gguf")));
    touch("x-00002-of-00002.gguf");
    assert_eq!(find(dir.path()).unwrap(), Some(at("x-00001-of-00002.gguf")));
    touch("y.gguf");
    let Err(Error::File { what, .. }) = find(dir.path()) else { panic!() };
    assert_eq!(what, "found x-00001-of-00002.gguf, y.gguf; expected one model, or the path of one of them");
    touch("model.safetensors");
    assert_eq!(find(dir.path()).unwrap(), None);
    assert!(matches!(Gguf::open(dir.path()), Err(Error::File { .. })));
}
