//! Which device a model runs on, from what the user called it.

use crate::{Error, Result};

/// A device by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// The CPU.
    Cpu,
    /// A CUDA device by its number.
    Cuda(usize),
}

/// Says what `auto` is, for tests and for machines whose GPU is somebody else's.
const VARIABLE: &str = "QWEN35RS_DEVICE";

impl Device {
    /// `cpu`, `cuda` (device 0), `cuda:N`, or `auto`: what QWEN35RS_DEVICE names, else a CUDA device where there is one
    /// that can be used, else the CPU.
    ///
    /// # Errors
    /// [`Error::Request`] for any other name. Whether a named device is there is not asked.
    pub fn parse(name: &str) -> Result<Self> {
        if name != "auto" {
            return Self::from_name("device", name);
        }
        match std::env::var(VARIABLE) {
            Ok(name) if !name.is_empty() && name != "auto" => Self::from_name(VARIABLE, &name),
            _ if require(0).is_ok() => Ok(Self::Cuda(0)),
            _ => Ok(Self::Cpu),
        }
    }

    /// Sees that it is there and can be used.
    ///
    /// # Errors
    /// [`Error::Cuda`] naming what was found in its place.
    pub fn require(self) -> Result<()> {
        match self {
            Self::Cpu => Ok(()),
            Self::Cuda(ordinal) => require(ordinal),
        }
    }

    /// The devices of `world` ranks of a process, of which the first takes `first` beyond the device that the name means:
    /// as many as there are ranks. `cuda:N,M,...` names that of each rank; a device may have several.
    ///
    /// # Errors
    /// As [`Device::parse`], and for a list of another length.
    pub fn for_ranks(name: &str, world: usize, first: usize) -> Result<Vec<Self>> {
        if let Some(list) = name.strip_prefix("cuda:").filter(|list| list.contains(',')) {
            let each: Vec<Self> = list
                .split(',')
                .map(|n| Self::from_name("device", &format!("cuda:{n}")))
                .collect::<Result<_>>()
                .map_err(|_| {
                    Error::request("device", format!("{name:?}"), "numbers between commas: cuda:0,1")
                })?;
            let needed = first.saturating_add(world);
            if each.len() < needed || (first == 0 && each.len() > world && world > 1) {
                let allowed = format!("one for each of the {needed} ranks");
                return Err(Error::request("device", format!("{name:?}"), allowed));
            }
            return Ok(each[first..needed].to_vec());
        }
        Ok(match Self::parse(name)? {
            Self::Cpu => vec![Self::Cpu; world],
            Self::Cuda(n) => {
                (0..world).map(|rank| Self::Cuda(n.saturating_add(first).saturating_add(rank))).collect()
            }
        })
    }

    /// The device of a rank that is a process, by its place among those of its host. Where the process sees one card,
    /// which what started it has chosen (Slurm's `--gpus-per-task=1`), it is that.
    ///
    /// # Errors
    /// As [`Device::for_ranks`].
    pub fn for_process(name: &str, local_rank: usize) -> Result<Vec<Self>> {
        Self::for_process_that_sees(name, local_rank, num_cards)
    }

    fn for_process_that_sees(
        name: &str,
        local_rank: usize,
        num_cards: impl FnOnce() -> usize,
    ) -> Result<Vec<Self>> {
        let by_place = Self::for_ranks(name, 1, local_rank)?;
        let listed = name.contains(',');
        let its_own = !listed && local_rank > 0 && by_place[0] != Self::Cpu && num_cards() == 1;
        if its_own { Self::for_ranks(name, 1, 0) } else { Ok(by_place) }
    }

    /// What a list of them is called.
    pub fn name_of(devices: &[Self]) -> String {
        let ordinals: Option<Vec<String>> =
            devices.iter().map(|device| device.ordinal().map(|n| n.to_string())).collect();
        ordinals.map_or_else(|| Self::Cpu.to_string(), |ordinals| format!("cuda:{}", ordinals.join(",")))
    }

    /// The number of a CUDA device.
    pub fn ordinal(self) -> Option<usize> {
        match self {
            Self::Cpu => None,
            Self::Cuda(ordinal) => Some(ordinal),
        }
    }

    fn from_name(field: &str, name: &str) -> Result<Self> {
        match name.split_once(':') {
            None if name == "cpu" => Some(Self::Cpu),
            None if name == "cuda" => Some(Self::Cuda(0)),
            Some(("cuda", number)) if number.bytes().all(|b| b.is_ascii_digit()) => {
                number.parse().ok().filter(|&n| n < i32::MAX as usize).map(Self::Cuda)
            }
            _ => None,
        }
        .ok_or_else(|| {
            // The variable names one device, an argument also those of several ranks.
            let lists = if field == VARIABLE { "" } else { r#", "cuda:N,M""# };
            Error::request(field, format!("{name:?}"), format!(r#""auto", "cpu", "cuda", "cuda:N"{lists}"#))
        })
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

#[cfg(feature = "cuda")]
fn require(ordinal: usize) -> Result<()> {
    super::cuda::require(ordinal)
}

/// Cards that this process sees.
#[cfg(feature = "cuda")]
fn num_cards() -> usize {
    super::cuda::num_cards()
}

#[cfg(not(feature = "cuda"))]
fn num_cards() -> usize {
    0
}

#[cfg(not(feature = "cuda"))]
fn require(_: usize) -> Result<()> {
    Err(Error::Cuda {
        what: "found a qwen35rs that was built without CUDA".into(),
        advice: "allowed: a build with its `cuda` feature, or device=\"cpu\"".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::Device;

    #[test]
    fn names_of_ranks() {
        let devices = |name: &str, world, first| {
            let devices = Device::for_ranks(name, world, first);
            devices.map(|d| Device::name_of(&d)).map_err(|e| e.to_string())
        };
        assert_eq!(devices("cpu", 3, 0), Ok("cpu".into()));
        assert_eq!(devices("cuda", 2, 0), Ok("cuda:0,1".into()));
        assert_eq!(devices("cuda:2", 2, 0), Ok("cuda:2,3".into()));
        assert_eq!(devices("cuda", 1, 3), Ok("cuda:3".into()));
        assert_eq!(devices("cuda:0,0", 2, 0), Ok("cuda:0,0".into()));
        assert_eq!(devices("cuda:4,6", 1, 1), Ok("cuda:6".into()));
        let wrong = r#"device: found "cuda:0,1,2"; allowed: one for each of the 2 ranks"#;
        assert_eq!(devices("cuda:0,1,2", 2, 0), Err(wrong.into()));
        let wrong = r#"device: found "cuda:0,"; allowed: numbers between commas: cuda:0,1"#;
        assert_eq!(devices("cuda:0,", 2, 0), Err(wrong.into()));
        assert!(devices("cuda:0,1", 3, 0).is_err() && devices("cuda:0,1", 1, usize::MAX).is_err());
    }

    #[test]
    fn a_process_that_sees_one_card_takes_it() {
        let device = |name: &str, local_rank, cards| {
            Device::name_of(&Device::for_process_that_sees(name, local_rank, || cards).unwrap())
        };
        assert_eq!((device("cuda", 1, 1), device("cuda:0", 3, 1)), ("cuda:0".into(), "cuda:0".into()));
        assert_eq!((device("cuda", 1, 2), device("cuda:2", 1, 8)), ("cuda:1".into(), "cuda:3".into()));
        // What a user lists is taken at its word.
        assert_eq!((device("cuda:4,6", 1, 1), device("cuda:0,0", 1, 1)), ("cuda:6".into(), "cuda:0".into()));
        let nobody_asks = || panic!("for the CPU");
        assert_eq!(Device::for_process_that_sees("cpu", 1, nobody_asks).unwrap(), [Device::Cpu]);
    }

    #[test]
    fn names() {
        let parse = |name: &str| Device::parse(name).map_err(|e| e.to_string());
        assert_eq!(parse("cpu"), Ok(Device::Cpu));
        assert_eq!(parse("cuda"), Ok(Device::Cuda(0)));
        assert_eq!(parse("cuda:7"), Ok(Device::Cuda(7)));
        assert_eq!(Device::Cuda(7).to_string(), "cuda:7");
        for name in ["", "gpu", "cuda:", "cuda:-1", "cuda:1x", "cuda:99999999999999999999", "cpu:0"] {
            let allowed = r#""auto", "cpu", "cuda", "cuda:N", "cuda:N,M""#;
            assert_eq!(parse(name), Err(format!("device: found {name:?}; allowed: {allowed}")));
        }
    }
}
