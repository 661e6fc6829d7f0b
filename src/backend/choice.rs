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

    fn from_name(field: &str, name: &str) -> Result<Self> {
        match name.split_once(':') {
            None if name == "cpu" => Some(Self::Cpu),
            None if name == "cuda" => Some(Self::Cuda(0)),
            Some(("cuda", number)) if number.bytes().all(|b| b.is_ascii_digit()) => {
                number.parse().ok().filter(|&n| n < i32::MAX as usize).map(Self::Cuda)
            }
            _ => None,
        }
        .ok_or_else(|| Error::request(field, format!("{name:?}"), r#""auto", "cpu", "cuda", "cuda:N""#))
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
    fn names() {
        let parse = |name: &str| Device::parse(name).map_err(|e| e.to_string());
        assert_eq!(parse("cpu"), Ok(Device::Cpu));
        assert_eq!(parse("cuda"), Ok(Device::Cuda(0)));
        assert_eq!(parse("cuda:7"), Ok(Device::Cuda(7)));
        assert_eq!(Device::Cuda(7).to_string(), "cuda:7");
        for name in ["", "gpu", "cuda:", "cuda:-1", "cuda:1x", "cuda:99999999999999999999", "cpu:0"] {
            let allowed = r#""auto", "cpu", "cuda", "cuda:N""#;
            assert_eq!(parse(name), Err(format!("device: found {name:?}; allowed: {allowed}")));
        }
    }
}
