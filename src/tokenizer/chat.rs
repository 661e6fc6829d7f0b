//! Chat templates: a conversation to the text of a prompt, exactly as Jinja2 renders the checkpoint's own
//! template under Transformers. Owns the template and the checks of a conversation's shape; knows nothing
//! of token ids.

mod python;

use std::path::Path;
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind, State};
use serde_json::{Map, Value as Json};

use super::gguf;
use crate::gguf::Gguf;
use crate::{Error, Result, files};

/// The family's template as published with Qwen3.5-4B, -9B and -35B-A3B (Apache-2.0, see NOTICE).
const QWEN3_5: &str = include_str!("qwen3_5.jinja");
const NAME: &str = "chat_template";
/// Variables that `render` sets itself.
const RESERVED: [&str; 3] = ["messages", "tools", "add_generation_prompt"];

/// A compiled chat template. Cloning shares it.
#[derive(Clone)]
pub struct ChatTemplate {
    env: Arc<Environment<'static>>,
    source: Arc<str>,
    /// `bos_token` and kin, as templates of other releases may print them.
    special_tokens: Arc<[(String, String)]>,
}

impl ChatTemplate {
    /// The template of a checkpoint directory: `chat_template.jinja`, else the `chat_template` entry of
    /// `tokenizer_config.json` (of several, the one named `default`), else the built-in one. Of a GGUF file without a
    /// `tokenizer.json` beside it: that of its metadata, else the built-in one.
    ///
    /// # Errors
    /// `Io` if a file is there and cannot be read, `File` if it is not what its name says or if its template does
    /// not compile.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let file = crate::gguf::find(dir)?;
        let dir = match &file {
            Some(file) if !files::is_there(&file.with_file_name("tokenizer.json")) => {
                return Self::from_gguf(file);
            }
            Some(file) => file.parent().unwrap_or(dir),
            None => dir,
        };
        let config_path = dir.join("tokenizer_config.json");
        let config = match files::read_text_if_there(&config_path, files::SETTINGS)? {
            Some(text) => files::object(&config_path, &text)?,
            None => Json::Null,
        };
        let own_path = dir.join("chat_template.jinja");
        let (source, path) = match files::read_text_if_there(&own_path, files::SETTINGS)? {
            Some(text) => (Some(text), own_path),
            None => (template_entry(&config, &config_path)?, config_path),
        };
        let mut template = Self::compile(source.as_deref().unwrap_or(QWEN3_5))
            .map_err(|e| Error::file(path, format!("the chat template does not compile: {e}")))?;
        template.special_tokens = special_tokens(&config);
        Ok(template)
    }

    fn from_gguf(path: &Path) -> Result<Self> {
        let gguf = Gguf::open(path)?;
        let mut template = Self::compile(gguf::chat_template(&gguf)?.unwrap_or(QWEN3_5))
            .map_err(|e| Error::file(path, format!("the chat template does not compile: {e}")))?;
        template.special_tokens = gguf::special_tokens(&gguf)?.into();
        Ok(template)
    }

    /// Compiles a template's text.
    ///
    /// # Errors
    /// `Config` if it does not compile.
    #[allow(clippy::should_implement_trait)] // the trait has no room for this error's meaning
    pub fn from_str(source: &str) -> Result<Self> {
        Self::compile(source).map_err(|e| Error::config("chat_template", e, "a template that compiles"))
    }

    fn compile(source: &str) -> Result<Self, minijinja::Error> {
        let mut env = environment()?;
        env.add_template_owned(NAME, source.to_string())?;
        Ok(ChatTemplate { env: Arc::new(env), source: source.into(), special_tokens: Arc::new([]) })
    }

    /// The family's own template.
    ///
    /// # Errors
    /// Never in a build whose tests pass.
    pub fn built_in() -> Result<Self> {
        Self::from_str(QWEN3_5)
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a conversation.
    ///
    /// `messages` is a list of objects with a string `role` and a `content` that is a string, a list of
    /// part objects, or null. `tools` is a list of objects. `kwargs` holds the template's other variables,
    /// for example `enable_thinking` and `add_vision_id`. Arguments of tool calls may be given as JSON text,
    /// as in OpenAI's shape: they are parsed first, and an empty text or null counts as no arguments.
    ///
    /// # Errors
    /// `Request` if the conversation is not of this shape, naming the message; `Template` if the template
    /// itself refuses it.
    pub fn render(
        &self,
        messages: &Json,
        tools: Option<&Json>,
        add_generation_prompt: bool,
        kwargs: &Map<String, Json>,
    ) -> Result<String> {
        let messages = checked_messages(messages)?;
        let tools = checked_tools(tools)?;
        let value = |field: &str, json: &Json| {
            python::from_json(json)
                .ok_or_else(|| Error::request(field, "a value nested very deeply", "at most 256 levels"))
        };
        let mut variables: Vec<(&str, Value)> = Vec::with_capacity(kwargs.len() + 8);
        variables.extend(self.special_tokens.iter().map(|(k, v)| (k.as_str(), Value::from(v.as_str()))));
        variables.push(("documents", Value::from(())));
        for (key, json) in kwargs {
            if RESERVED.contains(&key.as_str()) {
                return Err(Error::request(
                    key,
                    "it twice",
                    "messages, tools and add_generation_prompt once",
                ));
            }
            variables.push((key, value(key, json)?));
        }
        variables.push(("messages", value("messages", &messages)?));
        variables.push(("tools", value("tools", &tools)?));
        variables.push(("add_generation_prompt", Value::from(add_generation_prompt)));
        let template = self.env.get_template(NAME).map_err(template_error)?;
        template.render(Value::from_pairs(variables)).map_err(template_error)
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("bytes", &self.source.len()).finish_non_exhaustive()
    }
}

/// The `chat_template` of a `tokenizer_config.json`: a text, or a list of named ones.
fn template_entry(config: &Json, path: &Path) -> Result<Option<String>> {
    let wrong = || Error::file(path, "chat_template: expected a string, or a list with one named default");
    match config.get("chat_template") {
        None | Some(Json::Null) => Ok(None),
        Some(Json::String(text)) => Ok(Some(text.clone())),
        Some(Json::Array(list)) => {
            let default = list.iter().find(|entry| entry["name"] == "default").ok_or_else(wrong)?;
            Ok(Some(default["template"].as_str().ok_or_else(wrong)?.to_string()))
        }
        Some(_) => Err(wrong()),
    }
}

/// `bos_token` and kin, each a text or an object that holds one.
fn special_tokens(config: &Json) -> Arc<[(String, String)]> {
    const KEYS: [&str; 4] = ["bos_token", "eos_token", "pad_token", "unk_token"];
    let text = |key: &str| {
        let entry = config.get(key)?;
        Some((key.to_string(), entry.as_str().or_else(|| entry["content"].as_str())?.to_string()))
    };
    KEYS.iter().filter_map(|key| text(key)).collect()
}

/// Checks the shape of the conversation, and parses tool-call arguments that are JSON text.
fn checked_messages(messages: &Json) -> Result<Json> {
    let Json::Array(list) = messages else {
        return Err(Error::request("messages", kind_of(messages), "a list of messages"));
    };
    let mut list = list.clone();
    for (i, message) in list.iter_mut().enumerate() {
        let at = format!("messages[{i}]");
        let Json::Object(message) = message else {
            return Err(Error::request(at, kind_of(message), "an object with role and content"));
        };
        match message.get("role") {
            Some(Json::String(_)) => {}
            other => {
                return Err(Error::request(format!("{at}.role"), found(other), "a string"));
            }
        }
        check_content(message.get("content"), &at)?;
        match message.get_mut("tool_calls") {
            None | Some(Json::Null) => {}
            Some(Json::Array(calls)) => {
                for (j, call) in calls.iter_mut().enumerate() {
                    parse_arguments(call, &format!("{at}.tool_calls[{j}]"))?;
                }
            }
            Some(other) => {
                let field = format!("{at}.tool_calls");
                return Err(Error::request(field, kind_of(other), "a list of tool calls"));
            }
        }
    }
    Ok(Json::Array(list))
}

fn check_content(content: Option<&Json>, at: &str) -> Result<()> {
    match content {
        None | Some(Json::Null | Json::String(_)) => Ok(()),
        Some(Json::Array(parts)) => match parts.iter().position(|part| !part.is_object()) {
            None => Ok(()),
            Some(j) => {
                let field = format!("{at}.content[{j}]");
                Err(Error::request(field, kind_of(&parts[j]), "an object: a text, image or video part"))
            }
        },
        Some(other) => {
            let allowed = "a string, a list of parts, or null";
            Err(Error::request(format!("{at}.content"), kind_of(other), allowed))
        }
    }
}

/// Makes `arguments` of a call (bare, or under `function`) a mapping.
fn parse_arguments(call: &mut Json, at: &str) -> Result<()> {
    const ALLOWED: &str = "an object, or the JSON text of one";
    if !call.is_object() {
        return Err(Error::request(at, kind_of(call), "an object with a function name and arguments"));
    }
    let (holder, at) = match call.get("function") {
        Some(Json::Object(_)) => (&mut call["function"], format!("{at}.function")),
        Some(other) if !other.is_null() => {
            return Err(Error::request(format!("{at}.function"), kind_of(other), "an object"));
        }
        _ => (call, at.to_string()),
    };
    if !holder["name"].is_string() {
        let found = found(holder.get("name"));
        return Err(Error::request(format!("{at}.name"), found, "a string"));
    }
    let field = format!("{at}.arguments");
    let parsed = match holder.get("arguments") {
        None | Some(Json::Object(_)) => return Ok(()),
        Some(Json::Null) => Json::Object(Map::new()),
        Some(Json::String(text)) if text.trim().is_empty() => Json::Object(Map::new()),
        Some(Json::String(text)) => match serde_json::from_str::<Json>(text) {
            Ok(json @ Json::Object(_)) => json,
            Ok(other) => return Err(Error::request(field, format!("text of {}", kind_of(&other)), ALLOWED)),
            Err(e) => return Err(Error::request(field, format!("text that is not JSON ({e})"), ALLOWED)),
        },
        Some(other) => return Err(Error::request(field, kind_of(other), ALLOWED)),
    };
    holder["arguments"] = parsed;
    Ok(())
}

fn checked_tools(tools: Option<&Json>) -> Result<Json> {
    match tools {
        None | Some(Json::Null) => Ok(Json::Null),
        Some(Json::Array(list)) => match list.iter().position(|tool| !tool.is_object()) {
            None => Ok(Json::Array(list.clone())),
            Some(i) => Err(Error::request(format!("tools[{i}]"), kind_of(&list[i]), "an object")),
        },
        Some(other) => Err(Error::request("tools", kind_of(other), "a list of tools")),
    }
}

fn found(value: Option<&Json>) -> &'static str {
    value.map_or("nothing", kind_of)
}

fn kind_of(value: &Json) -> &'static str {
    match value {
        Json::Null => "null",
        Json::Bool(_) => "true or false",
        Json::Number(_) => "a number",
        Json::String(_) => "a string",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    }
}

/// The template engine with Transformers' settings and Python's way of printing.
fn environment() -> Result<Environment<'static>, minijinja::Error> {
    let mut env = Environment::new();
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_unknown_method_callback(method);
    env.set_formatter(|out, _, value| Ok(out.write_str(&python::str(value))?));
    env.add_filter("tojson", to_json);
    env.add_filter("string", |value: &Value| python::str(value));
    // Undefined has no items; the engine's own filter refuses it.
    env.add_filter("items", |value: &Value| {
        if value.is_undefined() {
            Ok(Value::from_iter(Vec::<Value>::new()))
        } else {
            minijinja::filters::items(value)
        }
    });
    env.add_filter("trim", |text: &Value, chars: Option<String>| {
        let text = python::str(text);
        match chars {
            Some(chars) => text.trim_matches(|c| chars.contains(c)).to_string(),
            None => text.trim_matches(python::is_space).to_string(),
        }
    });
    // As Python has it: text and mappings are sequences, true and false are integers.
    env.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map)
    });
    env.add_test("iterable", |value: &Value| {
        use ValueKind::{Iterable, Map, Seq, String, Undefined};
        matches!(value.kind(), String | Seq | Map | Iterable | Undefined)
    });
    env.add_test("number", |value: &Value| value.is_number() || python::is_integer(value));
    env.add_test("integer", python::is_integer);
    env.add_function("raise_exception", |message: &Value| -> Result<Value, minijinja::Error> {
        let message = python::str(message);
        let error = minijinja::Error::new(ErrorKind::InvalidOperation, message.clone());
        Err(error.with_source(Raised(message)))
    });
    Ok(env)
}

/// Methods of Python's types; `strip` and kin by Python's notion of white space.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, minijinja::Error> {
    if let (Some(text), true) = (value.as_str(), args.iter().all(Value::is_none)) {
        match name {
            "strip" => return Ok(Value::from(text.trim_matches(python::is_space))),
            "lstrip" => return Ok(Value::from(text.trim_start_matches(python::is_space))),
            "rstrip" => return Ok(Value::from(text.trim_end_matches(python::is_space))),
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// `tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, as Transformers
/// defines it for chat templates.
fn to_json(value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<String, minijinja::Error> {
    let ensure_ascii = match args.first() {
        Some(flag) => flag.is_true(),
        None => kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    let indent: Option<usize> = kwargs.get("indent")?;
    let separators = match kwargs.get::<Option<Vec<String>>>("separators")?.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => {
            return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "separators: expected two"));
        }
        None => (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string()),
    };
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    python::to_json(value, &python::JsonStyle { ensure_ascii, indent, sort_keys, separators })
}

/// What a template passed to `raise_exception`, found again under the engine's own error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn template_error(error: minijinja::Error) -> Error {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(inner) = source {
        if let Some(Raised(message)) = inner.downcast_ref() {
            return Error::Template(message.clone());
        }
        source = inner.source();
    }
    // The template is at fault here, whatever the conversation is.
    let broken = matches!(
        error.kind(),
        ErrorKind::SyntaxError
            | ErrorKind::UnknownFilter
            | ErrorKind::UnknownTest
            | ErrorKind::UnknownFunction
            | ErrorKind::TemplateNotFound
            | ErrorKind::UnknownBlock
    );
    match broken {
        true => {
            Error::config("chat_template", error, "filters, tests and functions of the published templates")
        }
        false => Error::Template(error.to_string()),
    }
}

#[cfg(test)]
mod tests;
