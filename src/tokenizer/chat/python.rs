//! Values between JSON and templates, printed the way Python prints them: templates are written for
//! Jinja2, where `true` prints as `True`, `1.0` keeps its point, and `tojson` is `json.dumps`.

use std::fmt::Write;
use std::sync::Arc;

use minijinja::value::{Object, ObjectRepr, Value, ValueKind};
use minijinja::{Error, ErrorKind};
use serde_json::Value as Json;

/// Deeper nesting than any conversation has; keeps recursion off the end of the stack.
const MAX_DEPTH: usize = 256;

/// A JSON value as a template sees it. `None` if it is nested too deeply. Numbers keep their kind: an
/// integer of any size stays one, anything with a point or an exponent is a float.
pub(super) fn from_json(json: &Json) -> Option<Value> {
    from_json_at(json, 0)
}

fn from_json_at(json: &Json, depth: usize) -> Option<Value> {
    if depth > MAX_DEPTH {
        return None;
    }
    Some(match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(number) => from_number(number),
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(list) => {
            let items: Option<Vec<Value>> = list.iter().map(|item| from_json_at(item, depth + 1)).collect();
            Value::from(items?)
        }
        Json::Object(map) => {
            let pairs: Option<Vec<(&str, Value)>> = map
                .iter()
                .map(|(key, value)| Some((key.as_str(), from_json_at(value, depth + 1)?)))
                .collect();
            Value::from_pairs(pairs?)
        }
    })
}

fn from_number(number: &serde_json::Number) -> Value {
    // With arbitrary precision this is the text of the file.
    let text = number.to_string();
    if text.contains(['.', 'e', 'E']) {
        // A JSON number always parses; beyond the range of f64 it is an infinity, as in Python.
        return Value::from(text.parse::<f64>().unwrap_or(f64::NAN));
    }
    match text.parse::<i128>() {
        Ok(n) => i64::try_from(n).map_or_else(|_| Value::from(n), Value::from),
        Err(_) => Value::from_object(BigInt(text)),
    }
}

/// An integer that no machine word holds: kept as its digits.
#[derive(Debug)]
struct BigInt(String);

impl Object for BigInt {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether Python's `isinstance(value, int)` holds.
pub(super) fn is_integer(value: &Value) -> bool {
    value.is_integer() || value.kind() == ValueKind::Bool || value.downcast_object_ref::<BigInt>().is_some()
}

/// Python's `str(value)`. Undefined prints as nothing.
pub(super) fn str(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.as_str().map_or_else(|| value.to_string(), String::from),
        _ => {
            let mut out = String::new();
            repr_into(&mut out, value);
            out
        }
    }
}

fn repr_into(out: &mut String, value: &Value) {
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value, "inf", "nan")),
        ValueKind::String => repr_string(out, &value.to_string()),
        ValueKind::Seq => {
            out.push('[');
            for (i, item) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr_into(out, &item);
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr_into(out, &key);
                out.push_str(": ");
                repr_into(out, &value.get_item(&key).unwrap_or_default());
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
}

fn repr_string(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if (c as u32) < 0x20 || (0x7f..0xa1).contains(&(c as u32)) => {
                // Writing to a string cannot fail.
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// An integer's digits, or a float as Python's `repr` prints it: the shortest digits that read back, with
/// an exponent from 1e16 up and below 1e-4.
fn number(value: &Value, infinity: &str, nan: &str) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(x) = f64::try_from(value.clone()) else { return value.to_string() };
    if x.is_nan() {
        return nan.to_string();
    }
    if x.is_infinite() {
        return format!("{}{infinity}", if x < 0.0 { "-" } else { "" });
    }
    let scientific = format!("{x:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = x.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// How `tojson` writes; the defaults are those of `json.dumps(x, ensure_ascii=False)`.
pub(super) struct JsonStyle {
    pub ensure_ascii: bool,
    /// Spaces per level; `None` writes one line.
    pub indent: Option<usize>,
    pub sort_keys: bool,
    /// Between items, and between key and value.
    pub separators: (String, String),
}

/// Python's `json.dumps(value)`.
pub(super) fn to_json(value: &Value, style: &JsonStyle) -> Result<String, Error> {
    let mut out = String::new();
    json_into(&mut out, value, style, 0)?;
    Ok(out)
}

fn json_into(out: &mut String, value: &Value, style: &JsonStyle, depth: usize) -> Result<(), Error> {
    let fail = |what: String| Err(Error::new(ErrorKind::InvalidOperation, what));
    if depth > MAX_DEPTH {
        return fail("a value nested too deeply for tojson".to_string());
    }
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&number(value, "Infinity", "NaN")),
        ValueKind::String => json_string(out, &value.to_string(), style.ensure_ascii),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            json_items(out, ['[', ']'], items, style, depth, |out, item| {
                json_into(out, item, style, depth + 1)
            })?;
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if style.sort_keys {
                keys.sort();
            }
            json_items(out, ['{', '}'], keys, style, depth, |out, key| {
                let name = match key.kind() {
                    ValueKind::String | ValueKind::Number => key.to_string(),
                    kind => return fail(format!("{kind} is not a key of JSON")),
                };
                json_string(out, &name, style.ensure_ascii);
                out.push_str(&style.separators.1);
                json_into(out, &value.get_item(key)?, style, depth + 1)
            })?;
        }
        _ => match value.downcast_object_ref::<BigInt>() {
            Some(BigInt(digits)) => out.push_str(digits),
            None => return fail(format!("{} cannot be written as JSON", value.kind())),
        },
    }
    Ok(())
}

fn json_items(
    out: &mut String,
    [open, close]: [char; 2],
    items: Vec<Value>,
    style: &JsonStyle,
    depth: usize,
    write: impl Fn(&mut String, &Value) -> Result<(), Error>,
) -> Result<(), Error> {
    let newline = |out: &mut String, depth: usize| {
        if let Some(indent) = style.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent.saturating_mul(depth).min(1 << 16)));
        }
    };
    out.push(open);
    for (i, item) in items.iter().enumerate() {
        if i > 0 {
            out.push_str(&style.separators.0);
        }
        newline(out, depth + 1);
        write(out, item)?;
    }
    if !items.is_empty() {
        newline(out, depth);
    }
    out.push(close);
    Ok(())
}

fn json_string(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 || (ensure_ascii && !c.is_ascii()) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    // Writing to a string cannot fail.
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// What Python's `str.strip()` removes: Unicode white space, and four separators besides.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}
