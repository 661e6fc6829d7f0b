use serde_json::{Map, Value as Json, json};
use sha2::{Digest, Sha256};

use super::{ChatTemplate, QWEN3_5};
use crate::Error;

fn sha256(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn render(messages: Json, tools: Option<Json>, generate: bool, kwargs: Json) -> crate::Result<String> {
    let kwargs = kwargs.as_object().cloned().unwrap_or_default();
    ChatTemplate::built_in().unwrap().render(&messages, tools.as_ref(), generate, &kwargs)
}

fn weather() -> Json {
    json!([{"type": "function", "function": {
        "name": "get_weather",
        "description": "Get weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"]
        }
    }}])
}

/// Number of characters and SHA-256 of the text, rendered by Jinja2 from the published template.
#[track_caller]
fn check(text: crate::Result<String>, chars: usize, sha: &str) {
    let text = text.unwrap();
    assert_eq!((text.chars().count(), sha256(&text).as_str()), (chars, sha), "{text}");
}

#[test]
fn built_in_template_is_the_published_file() {
    assert_eq!(QWEN3_5.len(), 7756);
    assert_eq!(sha256(QWEN3_5), "a4aee8afcf2e0711942cf848899be66016f8d14a889ff9ede07bca099c28f715");
}

#[test]
fn vectors_of_plain_turns() {
    let hi = json!([{"role": "user", "content": "Hi"}]);
    check(
        render(hi.clone(), None, true, json!({})),
        60,
        "7562ba8388193b82d95953831c2d4d61f85796a9ea065d8d3e3db7b30d9a9447",
    );
    check(
        render(hi, None, true, json!({"enable_thinking": false})),
        71,
        "87b9f5b6243d88239331c78a91695eae31fdc67fcadd1bc07508791d9b1a03be",
    );
    let system =
        json!([{"role": "system", "content": "  Be brief. "}, {"role": "user", "content": " Hi \n"}]);
    check(
        render(system, None, false, json!({})),
        69,
        "427692759a69777dbd37371987dbd1a73ad2c5c845574edbf43c9fa5296ac307",
    );
    let inline = json!([
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nR1\n</think>\n\nB"},
        {"role": "user", "content": "c"}
    ]);
    check(
        render(inline, None, true, json!({})),
        122,
        "775032ca71a4c5913e44e9d3582b255ceb41805c8cc1fe9187051c7f35dbcfbe",
    );
    let reasoned = json!([
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "B", "reasoning_content": "R"}
    ]);
    check(
        render(reasoned, None, false, json!({})),
        83,
        "ad62607e984cb8628eb1a0986f5903d6a8a3ae918a043073136f200cf1ad34e0",
    );
    let plain = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "B"}]);
    check(
        render(plain, None, false, json!({})),
        82,
        "fb3e3bb6051a907333a1d005f35a139b87b8489581f5ff0ad4e0de2feac8089f",
    );
}

#[test]
fn vectors_of_tools() {
    let hi = json!({"role": "user", "content": "Hi"});
    check(
        render(json!([hi]), Some(weather()), true, json!({})),
        1194,
        "5561971dfa1bcc9ea683084144a5518e79fe687555a1ca206147d59995b5516b",
    );
    check(
        render(json!([{"role": "system", "content": "Sys"}, hi]), Some(weather()), true, json!({})),
        1199,
        "97f1cacb188f2e83673a54cb927f1cdc88c75b2d63bacf4a15e31664a8bcd431",
    );
    let calls = json!([
        {"role": "user", "content": "w?"},
        {"role": "assistant", "content": "", "reasoning_content": "need tool", "tool_calls": [
            {"function": {"name": "get_weather", "arguments": {
                "city": "Paris", "days": 2, "opts": {"a": [1, "é"]}, "flag": true, "none": null, "f": 1.0
            }}},
            {"function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
        ]},
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": " rain "}
    ]);
    check(
        render(calls, None, true, json!({})),
        594,
        "a0ca03ed8009ee4d7835269530bb8d1739ea6906509a9894d4d042112dd267ab",
    );
    let sha = "7c006d8ff7baac10d4e6c0b56177758cb090ed59b924d02ff613ddbb70631397";
    for arguments in [json!({"city": "Paris"}), json!("{\"city\": \"Paris\"}")] {
        for call in [
            json!({"name": "get_weather", "arguments": arguments}),
            json!({"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}),
        ] {
            let messages = json!([
                {"role": "user", "content": "w?"},
                {"role": "assistant", "content": "Let me check.", "tool_calls": [call]}
            ]);
            check(render(messages, None, false, json!({})), 192, sha);
        }
    }
}

#[test]
fn vectors_of_images_and_videos() {
    let image = json!([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]);
    check(
        render(image, None, true, json!({})),
        106,
        "35821ee27f2ab651c7af89763a47cfad706f0918565387d9843d24e4d97cf2d4",
    );
    let both = json!([{"role": "user", "content": [
        {"type": "video"}, {"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "What?"}
    ]}]);
    check(
        render(both, None, true, json!({"add_vision_id": true})),
        169,
        "e65ef1a61e0826b87db35fa541e862b1cb5345c82838a02fcfa0fffd7370a344",
    );
}

#[track_caller]
fn refused(messages: Json, tools: Option<Json>) -> Error {
    render(messages, tools, true, json!({})).unwrap_err()
}

#[test]
fn the_template_refuses_by_its_own_words() {
    let cases = [
        (json!([]), "No messages provided."),
        (json!([{"role": "system", "content": "x"}]), "No user query found in messages."),
        (
            json!([{"role": "user", "content": "<tool_response>x</tool_response>"}]),
            "No user query found in messages.",
        ),
        (
            json!([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]),
            "System message must be at the beginning.",
        ),
        (
            json!([{"role": "system", "content": [{"type": "image"}]}, {"role": "user", "content": "x"}]),
            "System message cannot contain images.",
        ),
        (
            json!([{"role": "user", "content": "x"}, {"role": "developer", "content": "y"}]),
            "Unexpected message role.",
        ),
        (json!([{"role": "user", "content": [{"type": "audio"}]}]), "Unexpected item type in content."),
    ];
    for (messages, words) in cases {
        match refused(messages.clone(), None) {
            Error::Template(text) => assert_eq!(text, words),
            other => panic!("{messages}: {other}"),
        }
    }
}

#[test]
fn a_misshapen_conversation_names_the_message() {
    let user = json!({"role": "user", "content": "x"});
    let call = |call: Json| json!([user, {"role": "assistant", "content": "", "tool_calls": [call]}]);
    let cases = [
        (json!("x"), "messages"),
        (json!({"role": "user"}), "messages"),
        (json!([user, 3]), "messages[1]"),
        (json!([user, {"content": "x"}]), "messages[1].role"),
        (json!([{"role": 1, "content": "x"}]), "messages[0].role"),
        (json!([{"role": "user", "content": 3}]), "messages[0].content"),
        (json!([{"role": "user", "content": {"type": "text", "text": "x"}}]), "messages[0].content"),
        (json!([{"role": "user", "content": [{"text": "x"}, "y"]}]), "messages[0].content[1]"),
        (json!([{"role": "assistant", "tool_calls": {}}]), "messages[0].tool_calls"),
        (call(json!("f")), "messages[1].tool_calls[0]"),
        (call(json!({"arguments": {}})), "messages[1].tool_calls[0].name"),
        (call(json!({"function": "f"})), "messages[1].tool_calls[0].function"),
        (
            call(json!({"function": {"name": "f", "arguments": "{\"a\": "}})),
            "messages[1].tool_calls[0].function.arguments",
        ),
        (call(json!({"name": "f", "arguments": "[1]"})), "messages[1].tool_calls[0].arguments"),
        (call(json!({"name": "f", "arguments": [1]})), "messages[1].tool_calls[0].arguments"),
    ];
    for (messages, field) in cases {
        match refused(messages.clone(), None) {
            Error::Request { field: found, .. } => assert_eq!(found, field, "{messages}"),
            other => panic!("{messages}: {other}"),
        }
    }
    for (tools, field) in [(json!({}), "tools"), (json!([{}, "f"]), "tools[1]")] {
        match refused(json!([user]), Some(tools)) {
            Error::Request { field: found, .. } => assert_eq!(found, field),
            other => panic!("{other}"),
        }
    }
    let twice = render(json!([user]), None, true, json!({"messages": []}));
    assert!(matches!(twice, Err(Error::Request { .. })), "{twice:?}");
}

/// Renders an expression over `x`.
fn expr(source: &str, x: &str) -> String {
    let template = ChatTemplate::from_str(source).unwrap();
    let kwargs = Map::from_iter([("x".to_string(), serde_json::from_str(x).unwrap())]);
    template.render(&json!([]), None, false, &kwargs).unwrap()
}

#[test]
fn values_print_as_in_python() {
    let cases = [
        ("true", "True"),
        ("null", "None"),
        ("1", "1"),
        ("-0", "0"),
        ("1.0", "1.0"),
        ("-0.0", "-0.0"),
        ("1e3", "1000.0"),
        ("1e15", "1000000000000000.0"),
        ("1e16", "1e+16"),
        ("123456789012345678.0", "1.2345678901234568e+17"),
        ("0.0001", "0.0001"),
        ("0.00001", "1e-05"),
        ("1.5e-300", "1.5e-300"),
        ("5e-324", "5e-324"),
        ("1e400", "inf"),
        ("9223372036854775808", "9223372036854775808"),
        (
            "340282366920938463463374607431768211456000000000000000000000000000001",
            "340282366920938463463374607431768211456000000000000000000000000000001",
        ),
        ("\"é<\"", "é<"),
        (r#"[1, "it's", {"a": null, "b": [true]}]"#, r#"[1, "it's", {'a': None, 'b': [True]}]"#),
        (r#"["a\n\\"]"#, r"['a\n\\']"),
    ];
    for (json, printed) in cases {
        assert_eq!(expr("{{ x }}", json), printed, "{json}");
        assert_eq!(expr("{{ x | string }}", json), printed, "{json}");
    }
}

#[test]
fn tojson_is_json_dumps() {
    let cases = [
        (
            r#"{"b": 1, "a": [1.0, 1e20, true, null], "": {}}"#,
            r#"{"b": 1, "a": [1.0, 1e+20, true, null], "": {}}"#,
        ),
        (
            r#""<a href='x'>&é\u2028\u007f\u0001\b\f\n\"\\/""#,
            "\"<a href='x'>&é\u{2028}\u{7f}\\u0001\\b\\f\\n\\\"\\\\/\"",
        ),
        ("[]", "[]"),
        ("1e400", "Infinity"),
        ("100000000000000000000000000000000000000000", "100000000000000000000000000000000000000000"),
    ];
    for (json, dumped) in cases {
        assert_eq!(expr("{{ x | tojson }}", json), dumped);
    }
    assert_eq!(expr("{{ x | tojson(ensure_ascii=true) }}", "\"é😀\""), r#""\u00e9\ud83d\ude00""#);
    assert_eq!(
        expr("{{ x | tojson(indent=2) }}", r#"{"a":[1,{}],"b":[]}"#),
        "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": []\n}"
    );
    assert_eq!(
        expr("{{ x | tojson(sort_keys=true, separators=[',', ':']) }}", r#"{"b":1,"a":[2,3]}"#),
        r#"{"a":[2,3],"b":1}"#
    );
}

#[test]
fn scoping_and_white_space_follow_jinja2() {
    // `if` opens no scope, `for` does, a namespace crosses it; loop variables may be assigned.
    let scoped = "{% set ns = namespace(n=0) %}{% set c = 'out' %}{% for i in x %}{% if true %}{% set c = i %}\
        {% set i = i * 2 %}{% endif %}{{ c }}:{{ i }},{% set ns.n = ns.n + i %}{% endfor %}{{ c }}{{ ns.n }}";
    assert_eq!(expr(scoped, "[1, 2]"), "1:2,2:4,out6");
    assert_eq!(expr("{% if true %}\n  a\n  {% endif %}\nb\n", "1"), "  a\nb");
    assert_eq!(
        expr("{{ x | trim }}|{{ x.strip() }}|{{ x.rstrip('\\n') | length }}", r#""\u001c\u00a0a\u0085\n""#),
        "a|a|4"
    );
    assert_eq!(expr("{{ x.split('b')[-1] }}{{ x[::-1] }}{{ 'a' in x }}", "\"abc\""), "ccbaTrue");
    assert_eq!(expr("{{ missing }}{{ x.missing }}", "{}"), "");
}

#[test]
fn kinds_are_pythons() {
    let kinds = "{{ x is sequence }}{{ x is iterable }}{{ x is mapping }}{{ x is number }}{{ x is integer }}";
    for (json, expected) in [
        ("\"a\"", "TrueTrueFalseFalseFalse"),
        ("[]", "TrueTrueFalseFalseFalse"),
        ("{}", "TrueTrueTrueFalseFalse"),
        ("true", "FalseFalseFalseTrueTrue"),
        ("1.0", "FalseFalseFalseTrueFalse"),
        ("1", "FalseFalseFalseTrueTrue"),
        ("100000000000000000000000000000000000000000", "FalseFalseFalseTrueTrue"),
        ("null", "FalseFalseFalseFalseFalse"),
    ] {
        assert_eq!(expr(kinds, json), expected, "{json}");
    }
    assert_eq!(
        expr("{{ missing|items|list }}{% for k, v in x|items %}{{ k }}{{ v }}{% endfor %}", "{\"a\": 1}"),
        "[]a1"
    );
}

#[test]
fn nesting_without_end_is_an_error_and_not_a_crash() {
    let mut deep = json!(1);
    for _ in 0..2000 {
        deep = json!([deep]);
    }
    let found = render(json!([{"role": "user", "content": "x"}]), None, true, json!({"deep": deep}));
    assert!(matches!(found, Err(Error::Request { .. })));
}

#[test]
fn a_directory_names_its_template() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    let source = |path| ChatTemplate::from_dir(path).map(|t| t.source().to_string());
    assert_eq!(source(path).unwrap(), QWEN3_5);
    let config = path.join("tokenizer_config.json");
    std::fs::write(&config, r#"{"eos_token": {"content": "<end>"}}"#).unwrap();
    assert_eq!(source(path).unwrap(), QWEN3_5);
    std::fs::write(&config, r#"{"chat_template": "A{{ eos_token }}", "eos_token": {"content": "<end>"}}"#)
        .unwrap();
    let template = ChatTemplate::from_dir(path).unwrap();
    assert_eq!(template.render(&json!([]), None, false, &Map::new()).unwrap(), "A<end>");
    std::fs::write(&config, r#"{"chat_template": [{"name": "default", "template": "B"}]}"#).unwrap();
    assert_eq!(source(path).unwrap(), "B");
    std::fs::write(&config, r#"{"chat_template": 1}"#).unwrap();
    assert!(matches!(source(path), Err(Error::File { .. })));
    std::fs::write(path.join("chat_template.jinja"), "C").unwrap();
    assert_eq!(source(path).unwrap(), "C");
    std::fs::write(path.join("chat_template.jinja"), "{% if %}").unwrap();
    assert!(matches!(source(path), Err(Error::File { path, .. }) if path.ends_with("chat_template.jinja")));
    assert!(matches!(ChatTemplate::from_str("{% if %}"), Err(Error::Config { .. })));
    std::fs::write(&config, "{").unwrap();
    assert!(matches!(source(path), Err(Error::File { .. })));
}
