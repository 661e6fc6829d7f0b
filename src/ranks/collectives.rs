//! How ranks on CUDA devices add up, as far as the user says: QWEN35RS_COLLECTIVES.

use crate::{Error, Result};

/// Which way sums and gathers over ranks take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Collectives {
    /// Memory that all cards address, where they can; NCCL where they cannot.
    #[default]
    Auto,
    /// Memory that all cards address.
    Direct,
    /// NCCL.
    Nccl,
}

impl Collectives {
    /// The environment's variable.
    pub const VARIABLE: &str = "QWEN35RS_COLLECTIVES";

    /// Its value; `auto` where there is none.
    ///
    /// # Errors
    /// [`Error::Request`] for a value that means nothing.
    pub fn from_env(var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        match var(Self::VARIABLE).as_deref() {
            None | Some("" | "auto") => Ok(Self::Auto),
            Some("direct") => Ok(Self::Direct),
            Some("nccl") => Ok(Self::Nccl),
            Some(other) => Err(Error::request(Self::VARIABLE, format!("{other:?}"), "auto, direct, nccl")),
        }
    }

    /// As the variable has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Direct => "direct",
            Self::Nccl => "nccl",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Collectives;

    #[test]
    fn a_value_that_means_nothing_is_refused_by_name() {
        let read = |value: Option<&str>| Collectives::from_env(|_| value.map(String::from));
        assert_eq!(read(None).unwrap(), Collectives::Auto);
        assert_eq!(read(Some("")).unwrap(), Collectives::Auto);
        for way in [Collectives::Auto, Collectives::Direct, Collectives::Nccl] {
            assert_eq!(read(Some(way.name())).unwrap(), way);
        }
        let error = read(Some("NCCL")).unwrap_err().to_string();
        assert_eq!(error, "QWEN35RS_COLLECTIVES: found \"NCCL\"; allowed: auto, direct, nccl");
    }
}
