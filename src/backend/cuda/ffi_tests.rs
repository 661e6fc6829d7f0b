//! The declarations against the header's text: names, fields and arguments, with their types.

use std::collections::BTreeMap;

const HEADER: &str = include_str!("../../../cuda/launch.h");
const RUST: &str = concat!(include_str!("ffi.rs"), include_str!("ffi_ranks.rs"));
const PEERS: &str = include_str!("peers.rs");

fn without_comments(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join(" ")
}

/// A type as both languages would call it: its scalar, and whether it is a mutable or a constant pointer.
fn c_type(text: &str) -> String {
    let mutable = if text.contains("const ") { "const " } else { "mut " };
    let words: Vec<_> = text.replace('*', " ").split_whitespace().map(String::from).collect();
    let scalar = words.iter().find(|w| *w != "const").cloned().unwrap_or_default();
    if text.contains('*') { format!("*{mutable}{scalar}") } else { scalar }
}

fn rust_type(text: &str) -> String {
    let names = [
        ("c_int", "int"),
        ("i32", "int32_t"),
        ("i64", "int64_t"),
        ("u64", "uint64_t"),
        ("u32", "uint32_t"),
        ("u8", "uint8_t"),
        ("f32", "float"),
        ("f64", "double"),
        ("Bf16", "q35_bf16"),
        ("c_void", "void"),
        ("Stream", "*mut void"),
        ("Batch", "q35_batch"),
        ("DeltaDims", "q35_delta_dims"),
        ("AttentionDims", "q35_attention_dims"),
        ("MoeDims", "q35_moe_dims"),
        ("MoeWeights", "q35_moe_weights"),
        ("Packed", "q35_packed"),
        ("HeadOrder", "q35_head_order"),
        ("PackedMoe", "q35_packed_moe_weights"),
        ("Peers", "q35_peers"),
        ("Sampling", "q35_sampling"),
        ("Edit", "q35_edit"),
        ("Sampled", "q35_sampled"),
    ];
    if let Some((element, len)) =
        text.trim().strip_prefix('[').and_then(|t| t[..t.len() - 1].split_once("; "))
    {
        return format!("[{}; Q35_{len}]", rust_type(element));
    }
    let (pointer, scalar) = match text.trim().split_once(' ') {
        Some((pointer, scalar)) => (format!("{pointer} "), scalar),
        None => (String::new(), text.trim()),
    };
    let name =
        names.iter().find(|(rust, _)| *rust == scalar).unwrap_or_else(|| panic!("unknown type {text}"));
    format!("{pointer}{}", name.1)
}

/// `(types of the arguments) -> result` by name.
fn in_header() -> BTreeMap<String, String> {
    let text = without_comments(HEADER);
    let mut found = BTreeMap::new();
    for statement in text.split(';') {
        let Some((head, arguments)) = statement.rsplit_once('(') else { continue };
        let words: Vec<_> = head.split_whitespace().collect();
        let [.., result, name] = words[..] else { continue };
        let types: Vec<_> = arguments.trim_end().trim_end_matches(')').split(',').map(c_type).collect();
        found.insert(name.to_string(), format!("({}) -> {result}", types.join(", ")));
    }
    found
}

fn in_rust() -> BTreeMap<String, String> {
    let text = without_comments(RUST);
    let mut found = BTreeMap::new();
    for function in text.split("pub fn ").skip(1) {
        let (name, rest) = function.split_once('(').unwrap();
        let (arguments, rest) = rest.split_once(')').unwrap();
        let result = rest.split("->").nth(1).unwrap().split(';').next().unwrap();
        let arguments = arguments.split(',').filter(|a| !a.trim().is_empty());
        let types: Vec<_> = arguments.map(|a| rust_type(a.split_once(':').unwrap().1)).collect();
        if name.starts_with("q35_") {
            found.insert(name.to_string(), format!("({}) -> {}", types.join(", "), rust_type(result)));
        }
    }
    found
}

#[test]
fn functions_are_those_of_the_header() {
    let (header, rust) = (in_header(), in_rust());
    assert_eq!(header.len(), 54, "{:?}", header.keys());
    assert_eq!(rust, header);
}

#[test]
fn constants_are_those_of_the_header() {
    assert!(HEADER.contains("Q35_MAX_RANKS = 8,") && RUST.contains("MAX_RANKS: usize = 8;"));
    assert!(HEADER.contains("Q35_MAX_CHANNELS = 64,") && PEERS.contains("CHANNELS: [i32; 2] = [64, 8];"));
    assert!(HEADER.contains("Q35_GATHERED_AT = 16384 ") && RUST.contains("GATHERED_AT: usize = 16384;"));
    assert!(HEADER.contains("enum { Q35_MAX_TOP_K = 1024, Q35_MAX_LOGPROBS = 32 };"));
    assert!(RUST.contains("MAX_TOP_K: usize = 1024;") && RUST.contains("MAX_LOGPROBS: usize = 32;"));
}

#[test]
fn structs_are_those_of_the_header() {
    let header = without_comments(HEADER);
    let rust = without_comments(RUST);
    let names = [
        ("q35_batch", "Batch"),
        ("q35_delta_dims", "DeltaDims"),
        ("q35_attention_dims", "AttentionDims"),
        ("q35_moe_dims", "MoeDims"),
        ("q35_moe_weights", "MoeWeights"),
        ("q35_packed", "Packed"),
        ("q35_head_order", "HeadOrder"),
        ("q35_packed_moe_weights", "PackedMoe"),
        ("q35_peers", "Peers"),
        ("q35_sampling", "Sampling"),
        ("q35_edit", "Edit"),
        ("q35_sampled", "Sampled"),
    ];
    for (c_name, rust_name) in names {
        let end = header.find(&format!("}} {c_name};")).unwrap();
        let body = &header[header[..end].rfind('{').unwrap() + 1..end];
        let mut theirs = Vec::new();
        for line in body.split(';').filter(|line| !line.trim().is_empty()) {
            let kind = c_type(line.split(',').next().unwrap());
            for field in line.split(',') {
                let name = field.split_whitespace().next_back().unwrap().trim_start_matches('*');
                theirs.push(match name.strip_suffix(']').and_then(|name| name.split_once('[')) {
                    Some((name, len)) => format!("{name}: [{kind}; {len}]"),
                    None => format!("{name}: {kind}"),
                });
            }
        }
        let start = rust.find(&format!("pub struct {rust_name} {{")).unwrap();
        let body = rust[start..].split_once('{').unwrap().1.split_once('}').unwrap().0;
        let mine = body.split(',').filter(|line| !line.trim().is_empty()).map(|line| {
            let (name, kind) = line.trim().trim_start_matches("pub ").split_once(':').unwrap();
            format!("{name}: {}", rust_type(kind))
        });
        assert_eq!(mine.collect::<Vec<_>>(), theirs, "{c_name}");
    }
}
