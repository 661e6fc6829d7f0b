//! Cards that people have. Memory as the driver reports it, bandwidth and links as the vendor states them.

use std::borrow::Cow;

use serde::Serialize;

use crate::{Error, Result};

/// What joins cards that share a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Link {
    /// NVLink among all cards of a machine.
    Nvlink,
    /// NVLink between two, over a bridge; PCIe among more.
    Bridge,
    /// PCIe.
    Pcie,
    /// A network: each card is alone in its machine.
    Network,
}

impl Link {
    /// Microseconds that are assumed for a sum of few rows over so many cards. Over NVLink sums of up to 64 rows take 2.9 to
    /// 6.2 between two H200s (`benches/results/h200x2/all_reduce.txt`). The others are not measured: about what NCCL is
    /// reported to take between cards on PCIe, and between machines.
    pub fn all_reduce_us(self, num_cards: usize) -> f64 {
        match self {
            Link::Nvlink => 6.0,
            Link::Bridge if num_cards <= 2 => 6.0,
            Link::Bridge | Link::Pcie => 20.0,
            Link::Network => 60.0,
        }
    }
}

/// One kind of card.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Gpu {
    /// Its name, or its memory where that is all that is known.
    pub name: Cow<'static, str>,
    /// Memory in GiB.
    pub memory_gib: f64,
    /// Memory bandwidth in GB/s, where it is known.
    pub bandwidth_gbs: Option<f64>,
    /// What joins it to others.
    pub link: Link,
}

const fn card(name: &'static str, memory_gib: f64, bandwidth_gbs: f64, link: Link) -> Gpu {
    Gpu { name: Cow::Borrowed(name), memory_gib, bandwidth_gbs: Some(bandwidth_gbs), link }
}

/// The cards that `plan` knows.
pub static GPUS: [Gpu; 16] = [
    card("RTX 3090", 24.0, 936.0, Link::Bridge),
    card("RTX 4090", 24.0, 1008.0, Link::Pcie),
    card("RTX 5090", 31.8, 1792.0, Link::Pcie),
    card("RTX A6000", 48.0, 768.0, Link::Bridge),
    card("RTX 6000 Ada", 48.0, 960.0, Link::Pcie),
    card("RTX PRO 6000", 95.6, 1792.0, Link::Pcie),
    card("L4", 22.5, 300.0, Link::Pcie),
    card("L40S", 45.0, 864.0, Link::Pcie),
    card("A100 40GB", 40.0, 1555.0, Link::Nvlink),
    card("A100 80GB", 80.0, 2039.0, Link::Nvlink),
    card("H100 80GB", 79.6, 3350.0, Link::Nvlink),
    card("H100 PCIe", 79.6, 2000.0, Link::Bridge),
    card("H100 NVL", 93.6, 3900.0, Link::Bridge),
    card("H200", 140.4, 4800.0, Link::Nvlink),
    card("B200", 179.0, 8000.0, Link::Nvlink),
    card("DGX Spark", 119.7, 273.0, Link::Network),
];

/// The card of a name, in any case, with or without spaces and dashes; and other cards that the name may mean. Or one of so
/// much memory: `48GiB`, `48 GB`, or a number of bytes.
///
/// # Errors
/// `Request` with the list of names.
pub fn gpu(name: &str) -> Result<(Gpu, Vec<&'static str>)> {
    let plain = |text: &str| -> String {
        text.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
    };
    let wanted = plain(name);
    let matches = |gpu: &&Gpu| {
        let known = plain(&gpu.name);
        // "4090", "a6000", "a100-80", "h100" as people say them.
        known == wanted
            || known.strip_prefix("rtx").is_some_and(|short| short == wanted)
            || known.strip_suffix("gb").is_some_and(|short| short == wanted)
            || (wanted == "a100" || wanted == "h100") && known == format!("{wanted}80gb")
    };
    let Some(found) = GPUS.iter().find(matches).cloned() else {
        let names: Vec<_> = GPUS.iter().map(|gpu| gpu.name.as_ref()).collect();
        let allowed = || format!("{}; or 1 GiB to 1024 GiB of memory, as in 48GiB", names.join(", "));
        let found = of_memory(name).ok_or_else(|| Error::request("gpu", name, allowed()))?;
        return Ok((found, Vec::new()));
    };
    // Longer names by another word: an L4 is no L40S.
    let start = format!("{} ", name.trim().to_ascii_lowercase());
    let is_longer =
        |other: &&Gpu| other.name != found.name && other.name.to_ascii_lowercase().starts_with(&start);
    let others = GPUS.iter().filter(is_longer).map(|other| other.name.as_ref()).collect();
    Ok((found, others))
}

/// A card of so much memory, of which nothing else is known.
fn of_memory(text: &str) -> Option<Gpu> {
    let text = text.trim().to_ascii_lowercase();
    let (number, unit) = match (text.strip_suffix("gib"), text.strip_suffix("gb")) {
        (Some(number), _) => (number, f64::from(1 << 30)),
        (_, Some(number)) => (number, 1e9),
        _ => (text.as_str(), 1.0),
    };
    let memory_gib = number.trim().parse::<f64>().ok()? * unit / f64::from(1 << 30);
    let name = Cow::Owned(format!("{memory_gib:.1} GiB"));
    (1.0..=1024.0).contains(&memory_gib).then_some(Gpu {
        name,
        memory_gib,
        bandwidth_gbs: None,
        link: Link::Pcie,
    })
}
