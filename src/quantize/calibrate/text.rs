//! Files of text to the tokens that calibration reads.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value;

use super::Calibration;
use crate::config::ModelConfig;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// Bytes of a file that are read for each token that is wanted: more than any text needs.
const BYTES_PER_TOKEN: u64 = 64;
/// And however few are wanted: a line of `.jsonl` must be whole.
const LEAST_BYTES: u64 = 1 << 20;

/// Sequences of `calibration.length` tokens: the files one after the other, cut where a sequence is full, until there are
/// as many as are wanted. What is left over is not used.
///
/// # Errors
/// `Io` of a file; `File` for one that is not UTF-8, and for a line of a `.jsonl` file that is no object with a "text".
/// `Request` for fewer tokens than a sequence has, and for tokens that the model does not have.
pub(super) fn sequences(
    calibration: &Calibration,
    tokenizer: &Tokenizer,
    config: &ModelConfig,
) -> Result<Vec<Vec<u32>>> {
    let (files, length) = (&calibration.files, calibration.length);
    let wanted = calibration.max_sequences(config).saturating_mul(length);
    let mut ids = Vec::new();
    for path in files {
        if ids.len() >= wanted {
            break;
        }
        let text = read(path, wanted - ids.len())?;
        if path.extension().is_some_and(|end| end.eq_ignore_ascii_case("jsonl")) {
            for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
                if ids.len() >= wanted {
                    break;
                }
                tokenizer.encode_to(&record(path, i + 1, line)?, false, &mut ids);
            }
        } else {
            tokenizer.encode_to(&text, false, &mut ids);
        }
    }
    if ids.len() < length {
        let names: Vec<String> = files.iter().map(|path| path.display().to_string()).collect();
        let found = format!("{} tokens in {}", ids.len(), names.join(", "));
        let allowed = format!("text of at least one sequence: {length} tokens (calibration_length)");
        return Err(Error::request("calibrate", found, allowed));
    }
    ids.truncate(wanted.min(ids.len() / length * length));
    if let Some(id) = ids.iter().find(|&&id| id as usize >= config.vocab) {
        let found = format!("token {id} of the tokenizer");
        return Err(Error::request("calibrate", found, format!("tokens below the model's {}", config.vocab)));
    }
    Ok(ids.chunks(length).map(<[u32]>::to_vec).collect())
}

/// As much of a file as may be needed for so many tokens. Of a longer one the last line, which may be cut, is left out.
fn read(path: &Path, num_tokens: usize) -> Result<String> {
    let io = |e| Error::io(path, e);
    let limit = BYTES_PER_TOKEN.saturating_mul(num_tokens as u64).max(LEAST_BYTES);
    let mut bytes = Vec::new();
    let size =
        File::open(path).map_err(io)?.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(io)?;
    if size as u64 > limit {
        let end = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let cut = || bytes.iter().rposition(|&byte| byte & 0xc0 != 0x80).unwrap_or(0);
        let keep = if end > 0 { end } else { cut() };
        bytes.truncate(keep);
    }
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::file(path, format!("byte {at}: found what is no UTF-8; calibration reads text"))
    })
}

/// The "text" of a line.
fn record(path: &Path, line: usize, json: &str) -> Result<String> {
    let wrong = |found: &str| {
        Error::file(path, format!("line {line}: found {found}; expected an object with \"text\", a string"))
    };
    match serde_json::from_str(json).map_err(|e| wrong(&format!("no JSON ({e})")))? {
        Value::Object(mut fields) => match fields.shift_remove("text") {
            Some(Value::String(text)) => Ok(text),
            Some(_) => Err(wrong("a \"text\" that is no string")),
            None => Err(wrong("an object without \"text\"")),
        },
        _ => Err(wrong("no object")),
    }
}
