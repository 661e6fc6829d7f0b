//! `qwen35rs quantize`: a checkpoint to a quantised one that other programs read too. Quantises as a model is quantised
//! when it is loaded, a few matrices at a time, and says how far each is from what it was.
//!
//! Two things are not as at load, since no reader expects them in a file: the head is copied as it is, and in `mixed`
//! shared experts have 8 bits like the other dense matrices. `fp8` is written as the official releases are (method
//! `fp8`); `int4` and `mixed` in the naming of compressed-tensors. Experts are written one by one, as all of these have
//! them. 4-bit integers that are there already keep their codes, scales and zero points, whoever wrote them.

mod calibrate;
mod config;
mod gptq;
mod kept;
mod matrix;

pub use self::calibrate::{Calibration, CalibrationSummary};

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, json};

use self::calibrate::{Before, Note, Read, write_calibrated};
use self::kept::settle_zeros;
use self::matrix::{Deviation, Work};
use crate::config::ModelConfig;
use crate::gguf;
use crate::weights::quant::{Quantization, Scheme};
use crate::weights::write::{write_checkpoint, write_json};
use crate::weights::{Checkpoint, ExpertTensors, FfnTensors, LayerTensors, ModelTensors, MtpTensors, Tensor};
use crate::{Error, Result};

/// What was done.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Matrices that were quantised; experts count one by one.
    pub num_quantised: usize,
    /// Matrices that were in as few bits already, and kept their codes and scales.
    pub num_kept: usize,
    /// Bytes of all tensors before.
    pub bytes_before: u64,
    /// Bytes of all tensors now.
    pub bytes_after: u64,
    /// The root of the mean of squared errors over that of squared weights, of all quantised matrices together.
    pub relative_rms_error: f64,
    /// The same of the worst matrix.
    pub worst_relative_rms_error: f64,
    /// The worst matrix; empty where none was quantised.
    pub worst: String,
    /// Where a text was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration: Option<CalibrationSummary>,
}

/// Quantises the checkpoint in the directory `from` to the new or empty directory `to`. Tokenizer, chat template and
/// generation defaults are copied; `quantization_report.json` has the error of each matrix. It is written beside `to`
/// and renamed at the end. `progress(done, total)`, in bytes, may end it; nothing is left then.
///
/// With a `calibration` the model reads a text first, layer by layer on the CPU, and 4-bit integers make up for their
/// errors on it (GPTQ); 8-bit floats are rounded to the nearest as ever. Files and forms are the same.
///
/// # Errors
/// As [`Checkpoint::open`] and [`ModelTensors::resolve`]; with a calibration as [`crate::tokenizer::Tokenizer::from_directory`], `File` for
/// a text that is not UTF-8, `Request` for one that is too short and for options that cannot be, `OutOfMemory` where the
/// machine has no room. `Request` for a `to` that is neither new nor empty. `Tensor`
/// for a matrix with an element that is not finite, for one that is quantised in another form and would be kept, and
/// for one whose rows are not a whole number of groups. `Io` of files.
pub fn quantize(
    from: &Path,
    to: &Path,
    quantization: Quantization,
    calibration: Option<&Calibration>,
    progress: impl FnMut(u64, u64) -> Result<()>,
) -> Result<Summary> {
    check_target(to)?;
    if let Some(file) = gguf::find(from)? {
        let found = format!("{}, a GGUF file", file.display());
        return Err(Error::request("IN", found, "the directory of a checkpoint with *.safetensors"));
    }
    let config = ModelConfig::from_dir(from)?;
    calibration.map_or(Ok(()), |calibration| calibration.check(quantization, &config))?;
    let checkpoint = Checkpoint::open(from)?;
    let plain = ModelTensors::resolve(&checkpoint, &config)?;
    let has_module = config.num_mtp_layers > 0 && !plain.mtp.is_empty();
    let plain_module = has_module.then(|| MtpTensors::resolve(&checkpoint, &config)).transpose()?;
    let tensors = for_file(plain.clone(), quantization);
    let module = plain_module.clone().map(|module| module_for_file(module, quantization));
    check_groups(tensors.tensors().chain(module.iter().flat_map(MtpTensors::tensors)), quantization)?;

    let mut work = Vec::new();
    add(&mut work, [&tensors.embed_tokens, &tensors.norm], quantization)?;
    add(&mut work, &tensors.lm_head, quantization)?;
    for layer in &tensors.layers {
        add_layer(&mut work, layer, quantization)?;
    }
    match &module {
        Some(MtpTensors { fc, pre_fc_norm_embedding, pre_fc_norm_hidden, layer, norm }) => {
            add(&mut work, [fc, pre_fc_norm_embedding, pre_fc_norm_hidden, norm], quantization)?;
            add_layer(&mut work, layer, quantization)?;
        }
        None => work.extend(tensors.mtp.iter().cloned().map(Work::Copied)),
    }
    work.extend(tensors.vision.iter().cloned().map(Work::Copied));
    settle_zeros(&mut work);

    let folder = Folder::beside(to)?;
    let write = || {
        let (read, notes) = match calibration {
            Some(calibration) => {
                let before = Before { config: &config, tensors: &plain, module: plain_module.as_ref() };
                let (read, notes) =
                    write_calibrated(calibration, from, &before, &folder.path, &work, progress)?;
                (Some(read), notes)
            }
            None => {
                let notes = write_checkpoint(&folder.path, &work, |_, _| Ok(()), progress)?;
                (None, notes.into_iter().map(|note| note.map(|outcome| (outcome, None))).collect())
            }
        };
        let summary = report(&folder.path, quantization, &checkpoint, &work, &notes, calibration.zip(read))?;
        copy_others(from, &folder.path)?;
        // Last: a folder without it is no checkpoint.
        write_json(&folder.path.join("config.json"), &config::quantised(from, quantization, &work)?)?;
        Ok(summary)
    };
    let summary = write().map_err(|error| folder.named(error, to))?;
    folder.rename(to)?;
    Ok(summary)
}

/// Sees that a directory can be renamed to `to`, before there is one.
fn check_target(to: &Path) -> Result<()> {
    let refuse = |found: &str| Err(Error::request("OUT", found, "a directory that is new or empty"));
    let name = to.display();
    if to.is_symlink() {
        return refuse(&format!("{name}, a symbolic link"));
    }
    let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if let (Ok(own), Ok(around)) = (to.metadata(), parent.metadata())
        && own.dev() != around.dev()
    {
        return refuse(&format!("{name}, where another file system is mounted: name a directory inside"));
    }
    match std::fs::read_dir(to) {
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => refuse(&format!("{}, which is not empty", to.display())),
        },
        Err(_) if to.exists() => refuse(&format!("{}, which is no directory", to.display())),
        Err(_) => Ok(()),
    }
}

/// The tensors as a file has them.
fn for_file(mut tensors: ModelTensors, quantization: Quantization) -> ModelTensors {
    let head = tensors.lm_head.take();
    tensors = tensors.requantised(quantization);
    tensors.lm_head = head;
    tensors.layers.iter_mut().for_each(|layer| shared_for_file(layer, quantization));
    tensors
}

fn module_for_file(module: MtpTensors, quantization: Quantization) -> MtpTensors {
    let mut module = module.requantised(quantization);
    shared_for_file(&mut module.layer, quantization);
    module
}

/// Readers that decode a file tell experts from the rest, and take one form for each.
fn shared_for_file(layer: &mut LayerTensors, quantization: Quantization) {
    if let (
        Quantization::Mixed { .. },
        FfnTensors::Moe { shared_gate_proj, shared_up_proj, shared_down_proj, .. },
    ) = (quantization, &mut layer.ffn)
    {
        for tensor in [shared_gate_proj, shared_up_proj, shared_down_proj] {
            let matrix_rows = tensor.num_rows();
            *tensor = tensor.source().clone().requantised(Scheme::Fp8 { matrix_rows });
        }
    }
}

fn add_layer(work: &mut Vec<Work>, layer: &LayerTensors, quantization: Quantization) -> Result<()> {
    if let FfnTensors::Moe { experts: ExpertTensors::Fused { gate_up_proj, down_proj }, .. } = &layer.ffn {
        let fused = [&gate_up_proj.name, &down_proj.name];
        let rest = layer.tensors().into_iter().filter(|tensor| !fused.contains(&&tensor.name));
        add(work, rest, quantization)?;
        let (num_experts, width) = (gate_up_proj.shape[0], gate_up_proj.shape[1] / 2);
        let hidden = down_proj.shape[1];
        let base = gate_up_proj.name.strip_suffix("gate_up_proj").unwrap_or_default();
        for e in 0..num_experts {
            for (name, tensor, first, rows) in [
                ("gate_proj", gate_up_proj, 2 * e * width, width),
                ("up_proj", gate_up_proj, (2 * e + 1) * width, width),
                ("down_proj", down_proj, e * hidden, hidden),
            ] {
                let module = format!("{base}{e}.{name}");
                work.push(Work::matrix(module, tensor, first..first + rows, quantization)?);
            }
        }
        return Ok(());
    }
    add(work, layer.tensors(), quantization)
}

fn add<'a>(
    work: &mut Vec<Work>,
    tensors: impl IntoIterator<Item = &'a Tensor>,
    quantization: Quantization,
) -> Result<()> {
    for tensor in tensors {
        let rows = 0..tensor.num_rows();
        work.push(match (tensor.scheme(), tensor.encoded()) {
            (None, None) => Work::Copied(tensor.clone()),
            _ => {
                let module = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
                Work::matrix(module.to_string(), tensor, rows, quantization)?
            }
        });
    }
    Ok(())
}

/// Writes the error of each matrix, and sums them up.
fn report(
    dir: &Path,
    quantization: Quantization,
    checkpoint: &Checkpoint,
    work: &[Work],
    notes: &[Note],
    calibration: Option<(&Calibration, Read)>,
) -> Result<Summary> {
    let mut matrices = Map::new();
    let (mut all, mut worst, mut worst_error) = (Deviation::default(), String::new(), 0.0);
    let mut num_quantised = 0;
    for (work, note) in work.iter().zip(notes) {
        let (Work::Matrix { module, .. }, Some((outcome, source))) = (work, note) else { continue };
        let deviation = &outcome.deviation;
        num_quantised += 1;
        all.add(deviation);
        let error = deviation.relative_rms();
        if error > worst_error {
            (worst_error, worst) = (error, module.clone());
        }
        let mut facts = json!({
            "format": work.format(),
            "relative_rms_error": error,
            "max_abs_error": deviation.most,
        });
        if let Some(source) = source {
            facts["calibration"] = calibrate::facts(outcome, source);
        }
        matrices.insert(module.clone(), facts);
    }
    let kept = |work: &&Work| matches!(work, Work::Kept { .. } | Work::KeptInt4 { .. });
    let summary = Summary {
        num_quantised,
        num_kept: work.iter().filter(kept).count(),
        bytes_before: checkpoint.total_bytes(),
        bytes_after: Checkpoint::open(dir)?.total_bytes(),
        relative_rms_error: all.relative_rms(),
        worst_relative_rms_error: worst_error,
        worst,
        calibration: calibration.map(|(_, read)| CalibrationSummary::new(read, notes)),
    };
    let mut report = json!({"quantization": quantization, "summary": summary, "matrices": matrices});
    if let Some((calibration, _)) = calibration {
        report["calibration"] = json!(calibration);
    }
    write_json(&dir.join("quantization_report.json"), &report)?;
    Ok(summary)
}

/// Copies what is neither weights nor their index nor `config.json`.
fn copy_others(from: &Path, to: &Path) -> Result<()> {
    let own = ["config.json", "quantization_report.json"];
    for entry in std::fs::read_dir(from).map_err(|e| Error::io(from, e))? {
        let path = entry.map_err(|e| Error::io(from, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let wanted = [".json", ".jinja", ".txt", ".model"].iter().any(|end| name.ends_with(end))
            || ["LICENSE", "NOTICE"].iter().any(|start| name.starts_with(start));
        let is_index = name.ends_with(".safetensors.index.json");
        if wanted && !is_index && !own.contains(&name.as_str()) && path.is_file() {
            let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
            std::fs::write(to.join(&name), bytes).map_err(|e| Error::io(to.join(&name), e))?;
        }
    }
    Ok(())
}

/// A folder that goes away unless it gets its name.
struct Folder {
    path: PathBuf,
}

impl Folder {
    fn beside(to: &Path) -> Result<Self> {
        let name = to.file_name().map(|name| name.to_string_lossy().into_owned());
        let name = name.ok_or_else(|| Error::request("OUT", to.display(), "a path that ends in a name"))?;
        let path = to.with_file_name(format!(".{name}.partial-{}", std::process::id()));
        let folder = Self { path };
        std::fs::create_dir_all(&folder.path).map_err(|e| folder.named(Error::io(&folder.path, e), to))?;
        Ok(folder)
    }

    /// An error of writing to it says `to`, which is what the caller knows.
    fn named(&self, error: Error, to: &Path) -> Error {
        let Error::Io { path, source } = error else { return error };
        let Ok(file) = path.strip_prefix(&self.path) else { return Error::Io { path, source } };
        let what = match file.file_name() {
            Some(name) => format!("OUT could not be written: {}: {source}", name.to_string_lossy()),
            None => format!("OUT could not be made: {source}"),
        };
        Error::io(to, std::io::Error::new(source.kind(), what))
    }

    fn rename(self, to: &Path) -> Result<()> {
        // Over an empty directory too.
        std::fs::rename(&self.path, to).map_err(|e| match e.kind() {
            std::io::ErrorKind::DirectoryNotEmpty | std::io::ErrorKind::AlreadyExists => {
                let found = format!("{}, which something else has filled meanwhile", to.display());
                Error::request("OUT", found, "a directory that is new or empty")
            }
            _ => Error::io(to, e),
        })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // After the rename it is not there.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// Sees that rows are whole groups: where a file says groups, no reader takes a shorter one. Loading does.
fn check_groups<'a>(tensors: impl Iterator<Item = &'a Tensor>, quantization: Quantization) -> Result<()> {
    let int4: Vec<&Tensor> =
        tensors.filter(|tensor| matches!(tensor.scheme(), Some(Scheme::Int4 { .. }))).collect();
    let whole =
        |tensor: &Tensor, group: usize| tensor.num_cols() > 0 && tensor.num_cols().is_multiple_of(group);
    let group = quantization.group().unwrap_or(1);
    let Some(tensor) = int4.iter().find(|tensor| !whole(tensor, group)) else { return Ok(()) };
    let fits = Quantization::GROUPS.into_iter().rev().find(|&size| int4.iter().all(|t| whole(t, size)));
    let instead = match fits {
        Some(size) => format!("--group-size {size} does for all"),
        None => {
            format!("no --group-size does for all; --scheme fp8, or quantization=\"{quantization}\" at load")
        }
    };
    Err(Error::Tensor {
        name: tensor.name.clone(),
        found: format!("rows of {}", tensor.num_cols()),
        expected: format!("rows of whole groups of {group} (--group-size); {instead}"),
    })
}

#[cfg(test)]
mod tests;
