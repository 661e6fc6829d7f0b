//! GGUF metadata to a checked [`ModelConfig`]: written as the `config.json` that llama.cpp's converter read, and parsed as
//! one, so that the same limits and refusals apply. Errors name the key of the file.

use serde_json::{Map, Value as Json, json};

use super::{GenerationConfig, ModelConfig};
use crate::gguf::{Gguf, Value};
use crate::{Error, Result};

/// Keys behind the architecture's name, those of `config.json`, and whether the converter always writes them.
const KEYS: [(&str, &str, bool); 18] = [
    ("block_count", "num_hidden_layers", true),
    ("nextn_predict_layers", "mtp_num_hidden_layers", false),
    ("context_length", "max_position_embeddings", true),
    ("embedding_length", "hidden_size", true),
    ("attention.head_count", "num_attention_heads", true),
    ("attention.head_count_kv", "num_key_value_heads", true),
    ("attention.key_length", "head_dim", true),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps", true),
    ("ssm.conv_kernel", "linear_conv_kernel_dim", true),
    ("ssm.state_size", "linear_key_head_dim", true),
    ("ssm.group_count", "linear_num_key_heads", true),
    ("ssm.time_step_rank", "linear_num_value_heads", true),
    ("full_attention_interval", "full_attention_interval", false),
    ("rope.freq_base", "rope_theta", false),
    // Written by hand, and here for the names of errors.
    ("ssm.inner_size", "linear_value_head_dim", true),
    ("attention.recurrent_layers", "layer_types", false),
    ("rope.dimension_count", "partial_rotary_factor", true),
    ("rope.dimension_sections", "mrope_section", true),
];
const DENSE_KEYS: [(&str, &str, bool); 1] = [("feed_forward_length", "intermediate_size", true)];
const MOE_KEYS: [(&str, &str, bool); 4] = [
    ("expert_count", "num_experts", true),
    ("expert_used_count", "num_experts_per_tok", true),
    ("expert_feed_forward_length", "moe_intermediate_size", true),
    ("expert_shared_feed_forward_length", "shared_expert_intermediate_size", true),
];
const YARN_KEYS: [(&str, &str, bool); 6] = [
    ("rope.scaling.type", "rope_type", false),
    ("rope.scaling.factor", "factor", true),
    ("rope.scaling.original_context_length", "original_max_position_embeddings", true),
    ("rope.scaling.yarn_attn_factor", "attention_factor", false),
    ("rope.scaling.yarn_beta_fast", "beta_fast", false),
    ("rope.scaling.yarn_beta_slow", "beta_slow", false),
];
/// Keys that would change the result, and the one value of each that does not.
const NEUTRAL: [(&str, f64); 12] = [
    ("attention.causal", 1.0),
    ("attention.sliding_window", 0.0),
    ("attention.scale", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("logit_scale", 1.0),
    ("embedding_scale", 1.0),
    ("pooling_type", 0.0),
    // Softmax.
    ("expert_gating_func", 1.0),
    ("expert_weights_norm", 1.0),
    ("expert_weights_scale", 1.0),
    ("rope.scaling.yarn_ext_factor", 1.0),
];
const EOS: &str = "tokenizer.ggml.eos_token_id";
/// What the converter writes where `config.json` has no sections, however few frequencies there are.
const DEFAULT_SECTIONS: [i128; 4] = [11, 11, 10, 0];
/// More layers than any model, so that a list of them is not longer than needed.
const MAX_LAYERS: usize = 1 << 10;

/// What the metadata says of the model.
///
/// # Errors
/// `Config` for the first value that is missing or that cannot be run, by its key.
pub(super) fn model_config(gguf: &Gguf) -> Result<ModelConfig> {
    let reader = Reader::new(gguf)?;
    let value = reader.config()?;
    ModelConfig::from_value(&value).map_err(|error| reader.renamed(error))
}

struct Reader<'a> {
    gguf: &'a Gguf,
    arch: &'a str,
    moe: bool,
}

impl<'a> Reader<'a> {
    fn new(gguf: &'a Gguf) -> Result<Self> {
        const KEY: &str = "general.architecture";
        match gguf.text(KEY)? {
            Some(arch @ ("qwen35" | "qwen35moe")) => Ok(Self { gguf, arch, moe: arch == "qwen35moe" }),
            _ => Err(gguf.refuse(KEY, "\"qwen35\", \"qwen35moe\"")),
        }
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    fn keys(&self) -> impl Iterator<Item = &'static (&'static str, &'static str, bool)> {
        KEYS.iter().chain(if self.moe { MOE_KEYS.iter() } else { DENSE_KEYS.iter() })
    }

    fn required(&self, name: &str) -> Result<usize> {
        let key = self.key(name);
        self.gguf.size(&key)?.ok_or_else(|| self.gguf.refuse(&key, "an integer"))
    }

    /// A number as JSON; of a list with one number a layer, that of the layers that have any.
    fn number(&self, name: &str) -> Result<Option<Json>> {
        let key = self.key(name);
        let number = |value: &Value| match value {
            Value::Integer(n) => i64::try_from(*n).ok().map(Json::from),
            Value::Float(x) => serde_json::Number::from_f64(*x).map(Json::from),
            _ => None,
        };
        let found = match self.gguf.get(&key) {
            None => return Ok(None),
            Some(Value::List(_)) => {
                let list = self.gguf.numbers(&key)?.unwrap_or_default();
                let mut some = list.iter().filter(|&value| *value != Value::Integer(0));
                let first = some.next().and_then(number);
                if some.any(|value| number(value) != first) {
                    return Err(self.gguf.refuse(&key, "one number for all layers that have any"));
                }
                first
            }
            Some(value) => number(value),
        };
        found.map(Some).ok_or_else(|| self.gguf.refuse(&key, "a number"))
    }

    fn config(&self) -> Result<Json> {
        self.refuse_what_cannot_run()?;
        let mut text = Map::new();
        for &(name, field, required) in self.keys() {
            match self.gguf.get(&self.key(name)) {
                None if required => return Err(self.gguf.refuse(&self.key(name), "a value")),
                None => {}
                Some(_) if matches!(field, "linear_value_head_dim" | "layer_types" | "mrope_section") => {}
                Some(_) => {
                    text.insert(field.into(), self.number(name)?.unwrap_or_default());
                }
            }
        }
        let model_type = if self.moe { "qwen3_5_moe_text" } else { "qwen3_5_text" };
        text.insert("model_type".into(), json!(model_type));
        self.layers(&mut text)?;
        self.heads(&mut text)?;
        self.rope(&mut text)?;
        let embedding = self.gguf.tensor("token_embd.weight");
        if let Some(tensor) = embedding {
            text.insert("vocab_size".into(), json!(tensor.shape[0]));
        }
        text.insert("tie_word_embeddings".into(), json!(self.gguf.tensor("output.weight").is_none()));
        if let Some(eos) = self.gguf.size(EOS)? {
            text.insert("eos_token_id".into(), json!(eos));
        }
        Ok(Json::Object(text))
    }

    fn refuse_what_cannot_run(&self) -> Result<()> {
        for (name, neutral) in NEUTRAL {
            let key = self.key(name);
            let fine = match self.gguf.get(&key) {
                None => true,
                Some(&Value::Bool(found)) => f64::from(u8::from(found)) == neutral,
                Some(&Value::Integer(found)) => found as f64 == neutral,
                Some(&Value::Float(found)) => found == neutral,
                Some(_) => false,
            };
            if !fine {
                return Err(self
                    .gguf
                    .refuse(&key, format!("nothing, or {neutral}: what it asks for is not done")));
            }
        }
        Ok(())
    }

    /// The layers of the MTP module are counted with the others in the file.
    fn layers(&self, text: &mut Map<String, Json>) -> Result<()> {
        let (all, mtp) = (self.required("block_count")?, self.mtp_layers()?);
        if mtp >= all || all > MAX_LAYERS {
            let allowed = format!("more than nextn_predict_layers, {mtp}, at most {MAX_LAYERS}");
            return Err(self.gguf.refuse(&self.key("block_count"), allowed));
        }
        let layers = all - mtp;
        text.insert("num_hidden_layers".into(), json!(layers));
        let key = self.key("attention.recurrent_layers");
        let Some(list) = self.gguf.numbers(&key)? else { return Ok(()) };
        let wrong = || self.gguf.refuse(&key, format!("{all} bools, false for the MTP module"));
        let kind = |value: &Value| match value {
            Value::Bool(true) | Value::Integer(1) => Some("linear_attention"),
            Value::Bool(false) | Value::Integer(0) => Some("full_attention"),
            _ => None,
        };
        let kinds: Vec<&str> = list.iter().map(kind).collect::<Option<_>>().ok_or_else(wrong)?;
        if kinds.len() != all || kinds[layers..].contains(&"linear_attention") {
            return Err(wrong());
        }
        // The interval beside it is the converter's default where the model has none.
        text.remove("full_attention_interval");
        text.insert("layer_types".into(), json!(kinds[..layers]));
        Ok(())
    }

    fn mtp_layers(&self) -> Result<usize> {
        Ok(self.gguf.size(&self.key("nextn_predict_layers"))?.unwrap_or(0))
    }

    fn heads(&self, text: &mut Map<String, Json>) -> Result<()> {
        let (width, heads) = (self.required("ssm.inner_size")?, self.required("ssm.time_step_rank")?);
        if heads == 0 || width % heads != 0 {
            let allowed = format!("a multiple of ssm.time_step_rank, {heads}");
            return Err(self.gguf.refuse(&self.key("ssm.inner_size"), allowed));
        }
        text.insert("linear_value_head_dim".into(), json!(width / heads));
        let (keys, values) = (self.required("attention.key_length")?, self.key("attention.value_length"));
        match self.gguf.size(&values)? {
            Some(found) if found != keys => {
                Err(self.gguf.refuse(&values, format!("attention.key_length, {keys}")))
            }
            _ => Ok(()),
        }
    }

    fn rope(&self, text: &mut Map<String, Json>) -> Result<()> {
        let (head_dim, dims) =
            (self.required("attention.key_length")?, self.required("rope.dimension_count")?);
        // The share whose product with the head is a number of dimensions again.
        let mut share = dims as f64 / head_dim.max(1) as f64;
        if ((head_dim as f64 * share) as usize) < dims {
            share = share.next_up();
        }
        text.insert("partial_rotary_factor".into(), json!(share));
        let mut rope = Map::new();
        let key = self.key("rope.dimension_sections");
        let sections: Vec<i128> = self.gguf.numbers(&key)?.unwrap_or_default().iter().map(integer).collect();
        let half = (dims / 2) as i128;
        let [t, h, w, 0] = sections.as_slice() else {
            return Err(self.gguf.refuse(&key, "four integers, the last of them 0"));
        };
        if sections != DEFAULT_SECTIONS || half == DEFAULT_SECTIONS.iter().sum::<i128>() {
            let sizes: Option<Vec<u32>> = [t, h, w].into_iter().map(|&n| u32::try_from(n).ok()).collect();
            let wrong = || self.gguf.refuse(&key, "sizes that are not negative");
            rope.insert("mrope_section".into(), json!(sizes.ok_or_else(wrong)?));
        }
        let scaling = self.key("rope.scaling.type");
        match self.gguf.text(&scaling)? {
            None | Some("none") => {}
            Some("yarn") => {
                rope.insert("rope_type".into(), json!("yarn"));
                for &(name, field, required) in &YARN_KEYS[1..] {
                    match self.number(name)? {
                        None if required => return Err(self.gguf.refuse(&self.key(name), "a number")),
                        found => rope.extend(found.map(|found| (field.to_string(), found))),
                    }
                }
            }
            Some(_) => return Err(self.gguf.refuse(&scaling, "\"none\", \"yarn\"")),
        }
        if !rope.is_empty() {
            text.insert("rope_parameters".into(), Json::Object(rope));
        }
        Ok(())
    }

    /// The same error by the key of the file.
    fn renamed(&self, error: Error) -> Error {
        let Error::Config { field, found, allowed } = error else { return error };
        if field == "vocab_size" {
            return Error::config("token_embd.weight", format!("{found} rows"), allowed);
        }
        let last = field.split(['.', '[']).find(|part| !part.is_empty() && *part != "rope_parameters");
        let mut keys = self.keys().chain(&YARN_KEYS);
        match keys.find(|(_, of, _)| Some(*of) == last) {
            Some((name, ..)) => Error::config(self.key(name), found, allowed),
            None if field == "eos_token_id" => Error::config(EOS, found, allowed),
            None => Error::config(field, found, allowed),
        }
    }
}

fn integer(value: &Value) -> i128 {
    match value {
        Value::Integer(n) => *n,
        _ => -1,
    }
}

/// The sampling defaults that newer converters keep.
pub(super) fn generation_config(gguf: &Gguf) -> Result<GenerationConfig> {
    const KEYS: [(&str, &str); 5] = [
        ("general.sampling.temp", "temperature"),
        ("general.sampling.top_p", "top_p"),
        ("general.sampling.top_k", "top_k"),
        ("general.sampling.min_p", "min_p"),
        ("general.sampling.penalty_repeat", "repetition_penalty"),
    ];
    let mut fields = Map::new();
    for (key, field) in KEYS {
        let number = match gguf.get(key) {
            None => continue,
            Some(&Value::Integer(n)) => i64::try_from(n).ok().map(Json::from),
            // As the file's program wrote it: the shortest decimal of the f32.
            Some(&Value::Float(x)) => (x as f32).to_string().parse::<f64>().ok().map(Json::from),
            Some(_) => None,
        };
        fields.insert(field.into(), number.ok_or_else(|| gguf.refuse(key, "a number"))?);
    }
    let text = Json::Object(fields).to_string();
    GenerationConfig::from_json(&text, gguf.path()).map_err(|error| match error {
        Error::Config { field, found, allowed } => {
            let named = KEYS.iter().find(|(_, of)| field.ends_with(of));
            Error::config(named.map_or(field.clone(), |(key, _)| key.to_string()), found, allowed)
        }
        other => other,
    })
}
