//! The one error type of the crate. Every variant says what was found and what is allowed; `src/python`
//! gives each variant its Python class.

use std::path::PathBuf;

/// What went wrong, by who can mend it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value in a configuration file that cannot be run. `field` is its dotted path in the file.
    #[error("{field}: found {found}; allowed: {allowed}")]
    Config {
        /// Dotted path of the value, for example `text_config.rope_parameters.rope_type`.
        field: String,
        /// The value that was found, or `nothing` where it is missing.
        found: String,
        /// What would be accepted.
        allowed: String,
    },
    /// A file whose bytes are not what its format demands.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and where.
        what: String,
    },
    /// A tensor of a checkpoint that is missing, extra, misshapen or of a wrong dtype.
    #[error("tensor {name}: found {found}; expected {expected}")]
    Tensor {
        /// The tensor's name, as the checkpoint spells it.
        name: String,
        /// What the checkpoint holds.
        found: String,
        /// What the configuration asks for.
        expected: String,
    },
    /// A request, or an argument of a call, that cannot be served.
    #[error("{field}: found {found}; allowed: {allowed}")]
    Request {
        /// The parameter's name.
        field: String,
        /// The value that was found.
        found: String,
        /// What would be accepted.
        allowed: String,
    },
    /// Not enough memory; says which setting to lower.
    #[error("out of memory: {what}; {advice}")]
    OutOfMemory {
        /// What was being allocated, and its size.
        what: String,
        /// The setting to lower, and to what.
        advice: String,
    },
    /// A GPU that is not there, cannot be used, or failed.
    #[error("cuda: {what}; {advice}")]
    Cuda {
        /// What was found, or what failed and how.
        what: String,
        /// What would do, or what to do now.
        advice: String,
    },
    /// Ranks that share a model and lost each other, or were not started alike.
    #[error("ranks: {what}; {advice}")]
    Ranks {
        /// Which rank, and what of it.
        what: String,
        /// What to do now.
        advice: String,
    },
    /// A chat template that refused the conversation, or that could not be rendered.
    #[error("chat template: {0}")]
    Template(String),
    /// The operating system refused a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's own error.
        source: std::io::Error,
    },
    /// A request that the model could not finish: its weights or its input gave no finite logit.
    #[error("{0}")]
    Model(String),
    /// The caller asked to stop (Ctrl-C).
    #[error("interrupted")]
    Interrupted,
    /// Not a failure: this process was a rank that did as rank 0 ordered, and rank 0 has ended.
    #[error("rank 0 has ended")]
    Followed,
    /// A broken invariant of this crate: a bug.
    #[error("internal error, please report it: {0}")]
    Internal(String),
}

/// `std::result::Result` with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A configuration value that cannot be run.
    pub fn config(field: impl Into<String>, found: impl ToString, allowed: impl Into<String>) -> Self {
        Error::Config { field: field.into(), found: found.to_string(), allowed: allowed.into() }
    }

    /// A request or an argument that cannot be served.
    pub fn request(field: impl Into<String>, found: impl ToString, allowed: impl Into<String>) -> Self {
        Error::Request { field: field.into(), found: found.to_string(), allowed: allowed.into() }
    }

    /// A device's or the ranks' error for another caller; of any other its text.
    pub(crate) fn again(&self) -> Self {
        match self {
            Error::Cuda { what, advice } => Error::Cuda { what: what.clone(), advice: advice.clone() },
            Error::Ranks { what, advice } => Error::Ranks { what: what.clone(), advice: advice.clone() },
            error => Error::Internal(error.to_string()),
        }
    }

    /// A file whose content is wrong.
    pub fn file(path: impl Into<PathBuf>, what: impl Into<String>) -> Self {
        Error::File { path: path.into(), what: what.into() }
    }

    /// As [`Error::io`], of a file that every checkpoint has: where it is missing, what a checkpoint is.
    pub fn io_of_checkpoint(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        let source = match source.kind() {
            std::io::ErrorKind::NotFound => std::io::Error::new(
                std::io::ErrorKind::NotFound,
                "does not exist; the directory of a checkpoint holds config.json, tokenizer.json and *.safetensors, or a GGUF file",
            ),
            _ => source,
        };
        Error::io(path, source)
    }

    /// An operating-system error on a path.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io { path: path.into(), source }
    }
}
