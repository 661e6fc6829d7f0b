//! The rotary embedding: from `rope_parameters` to frequencies. Arithmetic follows Transformers
//! `modeling_rope_utils.py` step by step, in f32 where it uses f32.

use serde_json::Value;

use super::fields::Fields;
use super::{RopeConfig, YarnConfig};
use crate::{Error, Result};

/// Base of the frequencies when no key names one (`RotaryEmbeddingConfigMixin.default_theta`).
const DEFAULT_THETA: f64 = 10_000.0;
/// The reference's default T, H, W sections.
const DEFAULT_SECTION: [usize; 3] = [11, 11, 10];
/// `int(head_dim * factor)` must be a whole, even number of dimensions.
const DEFAULT_PARTIAL_ROTARY: f64 = 0.25;
const ROPE_TYPES: &str = "default, yarn";

impl RopeConfig {
    /// Frequencies that rotate: `rotary_dim / 2`.
    pub fn num_freqs(&self) -> usize {
        self.rotary_dim / 2
    }

    /// Radians per position of each frequency, YaRN applied. Shape `[rotary_dim / 2]`.
    pub fn inv_freq(&self) -> Vec<f32> {
        let dim = self.rotary_dim as f32;
        let power = |i: usize| {
            let exponent = (2 * i) as f32 / dim;
            // In f64 and rounded once: the correctly rounded f32 power.
            (f64::from(self.theta as f32)).powf(f64::from(exponent)) as f32
        };
        let plain = (0..self.num_freqs()).map(power);
        let Some(yarn) = &self.yarn else {
            return plain.map(|p| 1.0 / p).collect();
        };
        let (low, high) = self.correction_range(yarn);
        // The reference widens an empty range by this much to keep the ramp finite.
        let high = if low == high { high + 0.001 } else { high };
        plain
            .enumerate()
            .map(|(i, p)| {
                let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                let keep = 1.0 - ramp;
                let extended = 1.0 / (yarn.factor as f32 * p);
                extended * (1.0 - keep) + (1.0 / p) * keep
            })
            .collect()
    }

    /// Multiplied into cos and into sin, of the rotating dimensions only. 1 without YaRN.
    pub fn attention_scale(&self) -> f32 {
        self.yarn.as_ref().map_or(1.0, |yarn| yarn.attention_factor as f32)
    }

    /// Which position drives frequency `i`: 0, 1, 2 for T, H, W. Interleaved: T H W T H W ..., and T once
    /// a section is used up.
    pub fn axis(&self, i: usize) -> u8 {
        match i % 3 {
            1 if i < 3 * self.mrope_section[1] => 1,
            2 if i < 3 * self.mrope_section[2] => 2,
            _ => 0,
        }
    }

    /// [`RopeConfig::axis`] of every frequency. Shape `[rotary_dim / 2]`.
    pub fn frequency_axes(&self) -> Vec<u8> {
        (0..self.num_freqs()).map(|i| self.axis(i)).collect()
    }

    /// Frequencies up to the first bound are kept, from the second on divided by the factor.
    fn correction_range(&self, yarn: &YarnConfig) -> (f64, f64) {
        let dim = self.rotary_dim as f64;
        let bound = |rotations: f64| {
            let wavelengths = yarn.original_max_position as f64 / (rotations * 2.0 * std::f64::consts::PI);
            dim * wavelengths.ln() / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (bound(yarn.beta_fast), bound(yarn.beta_slow));
        if yarn.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low.max(0.0), high.min(dim - 1.0))
    }
}

/// Reads the rotary keys of the text configuration. `max_position` is `max_position_embeddings`.
pub(super) fn rope_config(text: &Fields, head_dim: usize, max_position: usize) -> Result<RopeConfig> {
    let section = source(text)?;
    let rope_type = rope_type(section.as_ref())?;
    let get = |key: &str| -> Result<Option<f64>> {
        let inner = section.as_ref().map(|s| s.number(key)).transpose()?.flatten();
        Ok(inner.or(text.number(key)?))
    };

    let theta = get("rope_theta")?.unwrap_or(DEFAULT_THETA);
    if !(theta > 1.0 && theta as f32 <= f32::MAX) {
        return Err(owner(section.as_ref(), text, "rope_theta").refuse("rope_theta", "a number above 1"));
    }
    let partial = get("partial_rotary_factor")?.unwrap_or(DEFAULT_PARTIAL_ROTARY);
    let rotary_dim = (head_dim as f64 * partial) as usize;
    if !(partial > 0.0 && partial <= 1.0) || rotary_dim == 0 || rotary_dim % 2 == 1 {
        let name = owner(section.as_ref(), text, "partial_rotary_factor").name("partial_rotary_factor");
        return Err(Error::config(
            name,
            format!("{partial} of head_dim {head_dim}, {} dimensions", head_dim as f64 * partial),
            "a share of head_dim that gives an even number of dimensions, at least 2",
        ));
    }
    if let Some(section) = &section {
        section.only_bool("mrope_interleaved", true)?;
    }
    let mrope_section = mrope_section(section.as_ref(), rotary_dim / 2)?;
    let yarn = match (&section, rope_type) {
        (Some(section), "yarn") => Some(yarn_config(section, text, max_position)?),
        _ => None,
    };
    Ok(RopeConfig { theta, rotary_dim, mrope_section, yarn })
}

/// The object that holds the rotary keys. `rope_scaling` is its older name; the reference lets it win, so
/// a file that has both must say the same in both.
fn source<'a>(text: &Fields<'a>) -> Result<Option<Fields<'a>>> {
    let new = text.object("rope_parameters")?;
    // An empty one counts as absent there.
    let old = text.object("rope_scaling")?.filter(|fields| fields.keys().next().is_some());
    if let (Some(_), Some(_)) = (&new, &old)
        && text.get("rope_parameters") != text.get("rope_scaling")
    {
        return Err(text.refuse("rope_scaling", "nothing, or the same as rope_parameters"));
    }
    let section = old.or(new);
    if let Some(section) = &section
        && let Some(key) = section.keys().find(|key| matches!(*key, "full_attention" | "linear_attention"))
    {
        return Err(section.refuse(key, "one set of rotary parameters for all layers"));
    }
    Ok(section)
}

fn rope_type<'a>(section: Option<&Fields<'a>>) -> Result<&'a str> {
    let Some(section) = section else { return Ok("default") };
    let (new, old) = (section.str("rope_type")?, section.str("type")?);
    let key = if new.is_some() { "rope_type" } else { "type" };
    let found = new.or(old).unwrap_or("default");
    if !matches!(found, "default" | "yarn") {
        return Err(section.refuse(key, ROPE_TYPES));
    }
    if let (Some(new), Some(old)) = (new, old) {
        // `mrope` is how older files of the family's ancestors spelled the default.
        if new != old && !(old == "mrope" && new == "default") {
            return Err(section.refuse("type", format!("nothing, or {new} as in rope_type")));
        }
    }
    if found == "default" {
        // A factor without a type that uses it is a mistake in the file, and not a plain rope.
        if section.number("factor")?.is_some_and(|factor| factor != 1.0) {
            return Err(section.refuse("factor", "nothing with rope_type default"));
        }
    }
    Ok(found)
}

/// The object that a fallback key was read from.
fn owner<'f, 'a>(section: Option<&'f Fields<'a>>, text: &'f Fields<'a>, key: &str) -> &'f Fields<'a> {
    match section {
        Some(section) if section.get(key).is_some() || text.get(key).is_none() => section,
        _ => text,
    }
}

/// The T, H, W sections. The reference's default is cut to the frequencies there are, as its slices are.
fn mrope_section(section: Option<&Fields>, num_freqs: usize) -> Result<[usize; 3]> {
    let Some((section, value)) = section.and_then(|s| s.get("mrope_section").map(|v| (s, v))) else {
        let cut = |axis: usize| num_freqs.saturating_sub(axis).div_ceil(3).min(DEFAULT_SECTION[axis]);
        let (h, w) = (cut(1), cut(2));
        return Ok([num_freqs - h - w, h, w]);
    };
    let allowed = || {
        section.refuse(
            "mrope_section",
            format!(
                "three integers [T, H, W] that sum to {num_freqs} and can be interleaved as T H W T H W ..."
            ),
        )
    };
    let list = value.as_array().ok_or_else(allowed)?;
    let read = |v: &Value| v.as_u64().filter(|&n| n <= num_freqs as u64).map(|n| n as usize);
    let sizes: Vec<usize> = list.iter().map(read).collect::<Option<_>>().ok_or_else(allowed)?;
    let &[t, h, w] = sizes.as_slice() else { return Err(allowed()) };
    // The last H sits at frequency 3h - 2, the last W at 3w - 1.
    let fits = t + h + w == num_freqs && 3 * h < num_freqs + 2 && 3 * w < num_freqs + 1;
    if fits { Ok([t, h, w]) } else { Err(allowed()) }
}

fn yarn_config(section: &Fields, text: &Fields, max_position: usize) -> Result<YarnConfig> {
    const MAX_FACTOR: f64 = 65_536.0;
    const MAX_ROTATIONS: f64 = 1e9;
    // The reference lets the key beside `rope_parameters` win, and then `max_position_embeddings` fill in.
    let key = "original_max_position_embeddings";
    let max = super::parse::MAX_POSITION;
    let original_max_position = match text.integer(key, 1, max)? {
        Some(n) => n,
        None => section.integer(key, 1, max)?.unwrap_or(max_position),
    };
    let factor = match section.number_in("factor", 1.0, MAX_FACTOR)? {
        Some(factor) => factor,
        // Only an explicit null asks for the ratio.
        None if section.has_key("factor") && max_position >= original_max_position => {
            max_position as f64 / original_max_position as f64
        }
        None => return Err(section.refuse("factor", format!("a number from 1 to {MAX_FACTOR}"))),
    };
    // Zero counts as absent in the reference, for these four.
    let nonzero =
        |key: &str| Ok::<_, Error>(section.number_in(key, 0.0, MAX_ROTATIONS)?.filter(|&x| x != 0.0));
    let beta_fast = nonzero("beta_fast")?.unwrap_or(32.0);
    let beta_slow = nonzero("beta_slow")?.unwrap_or(1.0);
    if beta_fast < beta_slow {
        return Err(section.refuse("beta_fast", format!("a number not below beta_slow, {beta_slow}")));
    }
    let mscale_of = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    let attention_factor = match section.number_in("attention_factor", 0.0, MAX_FACTOR)? {
        Some(found) if found > 0.0 => found,
        Some(_) => return Err(section.refuse("attention_factor", "a number above 0")),
        None => match (nonzero("mscale")?, nonzero("mscale_all_dim")?) {
            (Some(mscale), Some(all_dim)) => mscale_of(mscale) / mscale_of(all_dim),
            _ => mscale_of(1.0),
        },
    };
    let truncate = section.bool("truncate")?.unwrap_or(true);
    Ok(YarnConfig { factor, original_max_position, beta_fast, beta_slow, attention_factor, truncate })
}
