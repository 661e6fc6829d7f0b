//! Calibration of `qwen35rs quantize`: what the matrices of each layer are multiplied with while the model reads a text,
//! and 4-bit integers that make up for their errors on it (`gptq.rs`).
//!
//! A layer at a time: the sequences are taken through it by [`Walk`], with the weights as they were before; its Hessians
//! are summed up, its matrices made and written, and the Hessians dropped. Later layers read what the unquantised ones
//! before them gave, so that one pass is enough and Hessians do not depend on the scheme.

mod sites;
mod text;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Value, json};

use self::sites::{Place, Site, places};
use super::gptq::{Curvature, Hessian};
use super::matrix::{Outcome, Work};
use crate::backend::cpu::{Cpu, parallel};
use crate::config::{FfnConfig, ModelConfig};
use crate::machine::available_memory;
use crate::model::{Input, Walk};
use crate::tokenizer::Tokenizer;
use crate::weights::quant::{Quantization, Scheme};
use crate::weights::write::{Entry, Made, Unit, write_checkpoint};
use crate::weights::{LayerTensors, ModelTensors, MtpTensors, Tensor};
use crate::{Error, Result};

/// Tokens that an expert must have seen for a Hessian of its own, in terms of the inputs of its matrix: gate and up, which
/// may have the layer's instead, and down. With fewer, what is fitted to them is farther off on other text
/// (`benches/results/cpu/calibrated.txt`).
const EXPERT_IN_TOKENS: usize = 4;
const EXPERT_DOWN_TOKENS: usize = 2;
/// Hessians that are factored at once.
const AT_ONCE: usize = 8;

/// A text, and how much of it is read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Calibration {
    /// Text in UTF-8; `.jsonl`: lines that are objects with a "text".
    pub files: Vec<PathBuf>,
    /// Tokens of a sequence.
    pub length: usize,
    /// Tokens of all sequences, at most; by default [`Calibration::TOKENS`], or as many more as let every expert see
    /// four times as many as it is wide, if all are hit alike.
    pub tokens: Option<usize>,
}

impl Calibration {
    /// Tokens of a sequence where nothing else is asked for.
    pub const LENGTH: usize = 2048;
    /// Tokens of all sequences of a model with few experts or none, where nothing else is asked for.
    pub const TOKENS: usize = 32_768;

    /// Refuses what cannot be done, before anything is read.
    ///
    /// # Errors
    /// `Request` that names the option.
    pub(super) fn check(&self, quantization: Quantization, config: &ModelConfig) -> Result<()> {
        if quantization.group().is_none() {
            let allowed = "int4 or mixed: FP8 is rounded to the nearest, and reads no text";
            return Err(Error::request("calibrate", "a text for scheme fp8", allowed));
        }
        let longest = config.max_position;
        if !(2..=longest).contains(&self.length) {
            let allowed = format!("2 to {longest} tokens (max_position_embeddings)");
            return Err(Error::request("calibration_length", self.length, allowed));
        }
        match self.tokens {
            Some(tokens) if tokens < self.length => {
                let allowed = format!("at least calibration_length, {}", self.length);
                Err(Error::request("calibration_tokens", tokens, allowed))
            }
            _ => Ok(()),
        }
    }

    /// Sequences that are read, if the text has as many.
    fn max_sequences(&self, config: &ModelConfig) -> usize {
        let tokens = self.tokens.unwrap_or(match config.ffn {
            FfnConfig::Dense { .. } => Self::TOKENS,
            FfnConfig::Moe { num_experts, top_k, expert_width, .. } => {
                let all = expert_width.saturating_mul(num_experts).saturating_mul(4);
                Self::TOKENS.max(all / top_k.max(1))
            }
        });
        tokens.max(self.length) / self.length
    }
}

/// What was read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Read {
    num_sequences: usize,
    num_tokens: usize,
}

/// What calibration did, over all matrices of 4-bit integers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CalibrationSummary {
    /// Sequences of the text.
    pub num_sequences: usize,
    /// Their tokens.
    pub num_tokens: usize,
    /// Matrices whose errors were fed back.
    pub num_calibrated: usize,
    /// Those that were rounded to the nearest for want of a Hessian.
    pub num_fallen_back: usize,
    /// The mean over the calibrated matrices of `tr(E H Eᵀ) / tr(W H Wᵀ)`, the squared error of their outputs on the text
    /// over the squares of the outputs; E is how far the matrix is off.
    pub weighted_error: f64,
    /// The same of rounding them to the nearest.
    pub rounded_weighted_error: f64,
}

impl CalibrationSummary {
    pub(super) fn new(read: Read, notes: &[Note]) -> Self {
        let Read { num_sequences, num_tokens } = read;
        let sources = || notes.iter().flatten().filter_map(|(_, source)| source.as_ref());
        let errors: Vec<[f64; 2]> = notes
            .iter()
            .flatten()
            .filter_map(|(outcome, _)| Some(outcome.calibrated.as_ref()?.weighted_errors()))
            .collect();
        let mean = |which: usize| {
            errors.iter().map(|errors| errors[which]).sum::<f64>() / errors.len().max(1) as f64
        };
        Self {
            num_sequences,
            num_tokens,
            num_calibrated: errors.len(),
            num_fallen_back: sources().filter(|source| matches!(source, Source::FellBack { .. })).count(),
            weighted_error: mean(1),
            rounded_weighted_error: mean(0),
        }
    }
}

/// What the report says of a matrix.
pub(super) fn facts(outcome: &Outcome, source: &Source) -> Value {
    let mut facts = json!(source);
    if let Some(calibrated) = &outcome.calibrated {
        let [rounded, own] = calibrated.weighted_errors();
        facts["weighted_error"] = json!(own);
        facts["rounded"] = json!({
            "relative_rms_error": calibrated.rounded.relative_rms(),
            "max_abs_error": calibrated.rounded.most,
            "weighted_error": rounded,
        });
    }
    facts
}

/// How one matrix came to its Hessian.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub(super) enum Source {
    /// Its errors were fed back.
    FedBack {
        /// Whose inputs: `own`, or of the whole `layer`, for an expert.
        hessian: &'static str,
        /// Tokens of it.
        tokens: usize,
        /// What was added to the diagonal, in terms of its mean.
        damping: f64,
    },
    /// It was rounded to the nearest.
    FellBack {
        /// Why.
        fallback: String,
    },
}

/// The note of one matrix.
pub(super) type Note = Option<(Outcome, Option<Source>)>;

/// The Hessians of a layer, or why there is none.
type Curvatures = BTreeMap<Site, std::result::Result<Curvature, String>>;

/// Tensors as they were before, that the text is read with.
pub(super) struct Before<'a> {
    pub config: &'a ModelConfig,
    pub tensors: &'a ModelTensors,
    pub module: Option<&'a MtpTensors>,
}

/// Writes `work` to `dir` as [`write_checkpoint`] does, with what `calibration` reads by the tokenizer of `from`. Gives
/// what was read, and of each matrix what became of it.
///
/// # Errors
/// As [`write_checkpoint`] and `text::sequences`; `OutOfMemory` where the machine has no room for it.
pub(super) fn write_calibrated(
    calibration: &Calibration,
    from: &Path,
    before: &Before<'_>,
    dir: &Path,
    work: &[Work],
    progress: impl FnMut(u64, u64) -> Result<()>,
) -> Result<(Read, Vec<Note>)> {
    parallel::claim()?;
    let tokenizer = Tokenizer::from_directory(from)?;
    let sequences = text::sequences(calibration, &tokenizer, before.config)?;
    drop(tokenizer);
    let ready = Ready::default();
    let units = planned(before, work, &ready);
    let mut wanted: BTreeMap<usize, BTreeSet<Site>> = BTreeMap::new();
    for (stage, site) in units.iter().filter_map(|unit| unit.place) {
        wanted.entry(stage).or_default().extend(site.collected(before.config));
    }
    check_memory(before, &sequences, &wanted, available_memory())?;
    let slices: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
    let mut walk = Walk::new(before.config, &before.tensors.embed_tokens, &slices, Cpu::default())?;
    let mut next = 0;
    let prepare = |stage: usize, poll: &mut dyn FnMut() -> Result<()>| {
        // What the last layer had is not needed, and its memory is.
        ready.set(Curvatures::new());
        while next < stage {
            let sites = wanted.get(&(next + 1)).cloned().unwrap_or_default();
            let hessians = read_layer(&mut walk, before, next, &sites, poll)?;
            next += 1;
            ready.set(factored(hessians, poll)?);
        }
        Ok(())
    };
    let notes = write_checkpoint(dir, &units, prepare, progress)?;
    let num_tokens = sequences.iter().map(Vec::len).sum();
    Ok((Read { num_sequences: sequences.len(), num_tokens }, notes))
}

/// Hessians of the layer whose matrices are being made.
#[derive(Default)]
struct Ready(Mutex<Arc<Curvatures>>);

impl Ready {
    fn set(&self, curvatures: Curvatures) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(curvatures);
    }

    fn get(&self) -> Arc<Curvatures> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A tensor or a matrix, and where its Hessian is.
struct Planned<'a> {
    work: &'a Work,
    /// The layer, from 1, and the place in it, of what is to be calibrated.
    place: Option<(usize, Site)>,
    ready: &'a Ready,
}

impl Unit for Planned<'_> {
    type Note = Note;

    fn entries(&self) -> Vec<Entry> {
        self.work.entries()
    }

    fn stage(&self) -> usize {
        self.place.map_or(0, |(stage, _)| stage)
    }

    fn make(&self) -> Result<Made<'_, Note>> {
        let Some((_, site)) = self.place else {
            let (parts, outcome) = self.work.made(None)?;
            return Ok((parts, outcome.map(|outcome| (outcome, None))));
        };
        let curvatures = self.ready.get();
        let (curvature, source) = find(&curvatures, site);
        let (parts, outcome) = self.work.made(curvature)?;
        Ok((parts, outcome.map(|outcome| (outcome, Some(source)))))
    }
}

/// The Hessian of a place: of an expert without one of its own, the layer's.
fn find(curvatures: &Curvatures, site: Site) -> (Option<&Curvature>, Source) {
    let (found, hessian) = match (curvatures.get(&site), site) {
        (Some(Err(_)) | None, Site::ExpertIn(_)) => (curvatures.get(&Site::Ffn), "layer"),
        (found, _) => (found, "own"),
    };
    match found {
        Some(Ok(curvature)) => {
            let (tokens, damping) = (curvature.num_tokens, curvature.damping);
            (Some(curvature), Source::FedBack { hessian, tokens, damping })
        }
        Some(Err(why)) => (None, Source::FellBack { fallback: why.clone() }),
        None => (None, Source::FellBack { fallback: "its inputs were not read".into() }),
    }
}

/// The units of `work`, and the places of those that get 4-bit integers.
fn planned<'a>(before: &Before<'_>, work: &'a [Work], ready: &'a Ready) -> Vec<Planned<'a>> {
    let layers = before.tensors.layers.iter().chain(before.module.map(|module| &module.layer));
    let places: HashMap<String, (usize, Place)> = layers
        .enumerate()
        .flat_map(|(i, layer)| places(layer).into_iter().map(move |(name, place)| (name, (i + 1, place))))
        .collect();
    let place = |work: &Work| match work {
        Work::Matrix { tensor, rows, scheme: Scheme::Int4 { .. }, .. } => {
            let (stage, place) = places.get(tensor.name.as_str())?;
            Some((*stage, place.of(rows.start)))
        }
        _ => None,
    };
    work.iter().map(|work| Planned { work, place: place(work), ready }).collect()
}

/// Takes the sequences through layer `index`, or after the last one the module's, and sums up the Hessians of `sites`.
fn read_layer(
    walk: &mut Walk<'_, Cpu>,
    before: &Before<'_>,
    index: usize,
    sites: &BTreeSet<Site>,
    poll: &mut dyn FnMut() -> Result<()>,
) -> Result<BTreeMap<Site, Hessian>> {
    let Before { config, tensors, module } = before;
    let mut hessians: BTreeMap<Site, Hessian> =
        sites.iter().map(|&site| (site, Hessian::new(site.width(config, index)))).collect();
    let see = |input: Input<'_, Cpu>| {
        poll()?;
        add(&mut hessians, config.hidden, input);
        Ok(())
    };
    match (tensors.layers.get(index), module) {
        (Some(layer), _) => walk.layer(layer, see)?,
        (None, Some(module)) => walk.module(&tensors.norm, module, see)?,
        (None, None) => return Err(Error::Internal(format!("no layer {index} to read"))),
    }
    Ok(hessians)
}

/// Adds what was seen to the Hessians that are wanted of it.
fn add(hessians: &mut BTreeMap<Site, Hessian>, hidden: usize, input: Input<'_, Cpu>) {
    let mut seen: BTreeMap<Site, Vec<&[f32]>> = BTreeMap::new();
    let (site, x) = match input {
        Input::Mixer(x) => (Site::Mixer, x),
        Input::MixerOut(x) => (Site::MixerOut, x),
        Input::Down(x) => (Site::Down, x),
        Input::Ffn(x, _) => (Site::Ffn, x),
    };
    if let Some(hessian) = hessians.get(&site) {
        seen.insert(site, x.chunks_exact(hessian.num_inputs()).collect());
    }
    if let Input::Ffn(x, scratch) = input {
        for (expert, t, act) in scratch.assignments(x.len() / hidden) {
            match expert {
                Some(e) => {
                    seen.entry(Site::ExpertIn(e)).or_default().push(&x[t * hidden..(t + 1) * hidden]);
                    seen.entry(Site::ExpertDown(e)).or_default().push(act);
                }
                None => seen.entry(Site::SharedDown).or_default().push(act),
            }
        }
    }
    hessians.par_iter_mut().for_each(|(site, hessian)| {
        if let Some(inputs) = seen.get(site) {
            hessian.add(inputs);
        }
    });
}

/// Hessians as the feedback needs them, or why they cannot be had.
fn factored(hessians: BTreeMap<Site, Hessian>, poll: &mut dyn FnMut() -> Result<()>) -> Result<Curvatures> {
    let mut curvatures = Curvatures::new();
    let mut hessians = hessians.into_iter().peekable();
    while hessians.peek().is_some() {
        poll()?;
        let some: Vec<_> = hessians.by_ref().take(AT_ONCE).collect();
        curvatures.par_extend(some.into_par_iter().map(|(site, hessian)| (site, curvature(site, hessian))));
    }
    Ok(curvatures)
}

fn curvature(site: Site, hessian: Hessian) -> std::result::Result<Curvature, String> {
    let times = match site {
        Site::ExpertIn(_) => EXPERT_IN_TOKENS,
        Site::ExpertDown(_) => EXPERT_DOWN_TOKENS,
        _ => 0,
    };
    let (seen, wanted) = (hessian.num_tokens(), times * hessian.num_inputs());
    if seen < wanted {
        return Err(format!("its expert saw {seen} tokens; {wanted} are needed"));
    }
    Curvature::new(hessian)
        .ok_or_else(|| "its Hessian is zero, not finite, or not positive definite with any damping".into())
}

/// Refuses what the machine has no room for: the residual stream, the Hessians of a layer and their factors, and the
/// layer itself.
fn check_memory(
    before: &Before<'_>,
    sequences: &[Vec<u32>],
    wanted: &BTreeMap<usize, BTreeSet<Site>>,
    room: Option<u64>,
) -> Result<()> {
    let (config, threads) = (before.config, rayon::current_num_threads().min(AT_ONCE));
    let num_tokens: usize = sequences.iter().map(Vec::len).sum();
    let residuals = 4 * (num_tokens * config.hidden) as u64;
    let hessians = |(&stage, sites): (&usize, &BTreeSet<Site>)| {
        let mut squares: Vec<u64> =
            sites.iter().map(|site| (site.width(config, stage - 1) as u64).pow(2)).collect();
        squares.sort_unstable_by(|a, b| b.cmp(a));
        // f32 sums; an f64 factor, its inverse in f32, and half of that again in blocks, as many as there are threads.
        4 * squares.iter().sum::<u64>() + 14 * squares.iter().take(threads).sum::<u64>()
    };
    let hessians = wanted.iter().map(hessians).max().unwrap_or(0);
    let layers = before.tensors.layers.iter().chain(before.module.map(|module| &module.layer));
    let layer_bytes = |layer: &LayerTensors| {
        let bytes =
            |t: &&Tensor| (t.num_elements() * if t.encoded().is_some() { 4 } else { t.dtype.size() }) as u64;
        layer.tensors().iter().map(bytes).sum::<u64>()
    };
    let layer = layers.map(layer_bytes).max().unwrap_or(0);
    let bytes = residuals + hessians + layer;
    match room {
        Some(room) if bytes > room => Err(Error::OutOfMemory {
            what: format!(
                "calibration ({bytes} bytes: {residuals} for {num_tokens} tokens, {hessians} for the Hessians of a \
                 layer, {layer} for its weights; the machine has {room} available)"
            ),
            advice: "lower calibration_tokens, or take a machine with more memory".into(),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
