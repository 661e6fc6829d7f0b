//! Cards that people have. Memory as the driver reports it, bandwidth as the vendor states it.

use serde::Serialize;

use crate::{Error, Result};

/// One kind of card.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Gpu {
    /// Its name.
    pub name: &'static str,
    /// Memory in GiB.
    pub memory_gib: f64,
    /// Memory bandwidth in GB/s.
    pub bandwidth_gbs: f64,
}

const fn card(name: &'static str, memory_gib: f64, bandwidth_gbs: f64) -> Gpu {
    Gpu { name, memory_gib, bandwidth_gbs }
}

/// The cards that `plan` knows.
pub const GPUS: [Gpu; 16] = [
    card("RTX 3090", 24.0, 936.0),
    card("RTX 4090", 24.0, 1008.0),
    card("RTX 5090", 31.8, 1792.0),
    card("RTX A6000", 48.0, 768.0),
    card("RTX 6000 Ada", 48.0, 960.0),
    card("RTX PRO 6000", 95.6, 1792.0),
    card("L4", 22.5, 300.0),
    card("L40S", 45.0, 864.0),
    card("A100 40GB", 40.0, 1555.0),
    card("A100 80GB", 80.0, 2039.0),
    card("H100 80GB", 79.6, 3350.0),
    card("H100 PCIe", 79.6, 2000.0),
    card("H100 NVL", 93.6, 3900.0),
    card("H200", 140.4, 4800.0),
    card("B200", 179.0, 8000.0),
    card("DGX Spark", 119.7, 273.0),
];

/// The card of a name, in any case, with or without spaces and dashes; and other cards that the name may mean.
///
/// # Errors
/// `Request` with the list of names.
pub fn gpu(name: &str) -> Result<(Gpu, Vec<&'static str>)> {
    let plain = |text: &str| -> String {
        text.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
    };
    let wanted = plain(name);
    let matches = |gpu: &&Gpu| {
        let known = plain(gpu.name);
        // "4090", "a6000", "a100-80", "h100" as people say them.
        known == wanted
            || known.strip_prefix("rtx").is_some_and(|short| short == wanted)
            || known.strip_suffix("gb").is_some_and(|short| short == wanted)
            || (wanted == "a100" || wanted == "h100") && known == format!("{wanted}80gb")
    };
    let found = GPUS.iter().find(matches).copied();
    let found = found.ok_or_else(|| Error::request("gpu", name, GPUS.map(|gpu| gpu.name).join(", ")))?;
    // Longer names by another word: an L4 is no L40S.
    let start = format!("{} ", name.trim().to_ascii_lowercase());
    let others =
        GPUS.iter().filter(|gpu| gpu.name != found.name && gpu.name.to_ascii_lowercase().starts_with(&start));
    Ok((found, others.map(|gpu| gpu.name).collect()))
}
