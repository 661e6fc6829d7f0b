//! Typed reads from one JSON object, with errors that name the dotted path. Owns no rules of the model.

use serde_json::{Map, Value};

use crate::{Error, Result};

/// A JSON object and its dotted path (empty at the top of a file). A `null` counts as absent.
#[derive(Clone)]
pub(super) struct Fields<'a> {
    path: String,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The object at `path`; a `Config` error if `value` is not an object.
    pub fn new(path: impl Into<String>, value: &'a Value) -> Result<Self> {
        let path = path.into();
        match value {
            Value::Object(map) => Ok(Fields { path, map }),
            other => {
                let name = if path.is_empty() { "config.json".to_string() } else { path };
                Err(Error::config(name, show(other), "a JSON object"))
            }
        }
    }

    /// Dotted path of a key.
    pub fn name(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_string() } else { format!("{}.{key}", self.path) }
    }

    /// The value of a key, unless it is missing or `null`.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// Whether the key is there at all, `null` included.
    pub fn has_key(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    pub fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str)
    }

    /// The `Config` error for the value of a key.
    pub fn refuse(&self, key: &str, allowed: impl Into<String>) -> Error {
        let found = self.get(key).map_or_else(|| "nothing".to_string(), show);
        Error::config(self.name(key), found, allowed)
    }

    fn typed<T>(&self, key: &str, what: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| self.refuse(key, what)),
        }
    }

    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub fn str(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// A finite number.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", |v| v.as_f64().filter(|x| x.is_finite()))
    }

    /// A number in `min..=max`.
    pub fn number_in(&self, key: &str, min: f64, max: f64) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(x) if x < min || x > max => Err(self.refuse(key, format!("a number from {min} to {max}"))),
            other => Ok(other),
        }
    }

    /// An integer in `min..=max`.
    pub fn integer(&self, key: &str, min: u64, max: u64) -> Result<Option<usize>> {
        let what = format!("an integer from {min} to {max}");
        self.typed(key, &what, |v| v.as_u64().filter(|n| (min..=max).contains(n)))?
            .map(|n| usize::try_from(n).map_err(|_| self.refuse(key, what.clone())))
            .transpose()
    }

    /// An integer in `1..=max`, or the default.
    pub fn size(&self, key: &str, default: usize, max: u64) -> Result<usize> {
        Ok(self.integer(key, 1, max)?.unwrap_or(default))
    }

    /// A nested object.
    pub fn object(&self, key: &str) -> Result<Option<Fields<'a>>> {
        self.get(key).map(|value| Fields::new(self.name(key), value)).transpose()
    }

    /// A token id, or a list of them.
    pub fn token_ids(&self, key: &str) -> Result<Option<Vec<u32>>> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        self.typed(key, "a token id or a list of token ids", |v| match v {
            Value::Array(list) => list.iter().map(id).collect(),
            single => id(single).map(|id| vec![id]),
        })
    }

    /// Refuses every value of `key` but `wanted`; absent is fine.
    pub fn only_bool(&self, key: &str, wanted: bool) -> Result<()> {
        match self.bool(key)? {
            Some(found) if found != wanted => Err(self.refuse(key, wanted.to_string())),
            _ => Ok(()),
        }
    }

    /// Refuses every string of `key` that is not in `allowed`; absent is fine.
    pub fn only_str(&self, key: &str, allowed: &[&str]) -> Result<()> {
        match self.str(key)? {
            Some(found) if !allowed.contains(&found) => Err(self.refuse(key, allowed.join(", "))),
            _ => Ok(()),
        }
    }
}

/// A JSON value for an error message, shortened.
pub(super) fn show(value: &Value) -> String {
    const MAX_CHARS: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
