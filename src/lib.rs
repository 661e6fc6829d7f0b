//! qwen35rs: an inference engine for the Qwen3.5 family.
//!
//! One step, as `engine` runs it:
//!
//! ```text
//! schedule: which tokens of which requests, which pages and slots   (scheduler, cache)
//! run:      Batch -> Model::forward -> logits -> sampler            (model, backend, sampler)
//! commit:   tokens appended, pages and slots kept or given back     (scheduler, cache)
//! ```
//!
//! ARCHITECTURE.md holds the map of the files and the invariants.

pub mod backend;
pub mod batch;
pub mod cache;
pub mod config;
pub mod engine;
pub mod error;
pub mod files;
pub mod gguf;
pub mod inspect;
pub mod lend;
pub mod machine;
pub mod mapped;
pub mod model;
pub mod plan;
#[cfg(feature = "python")]
mod python;
pub mod quantize;
pub mod random;
pub mod ranks;
pub mod request;
pub mod sampler;
pub mod scheduler;
pub mod service;
pub mod text;
pub mod tokenizer;
pub mod weights;

pub use error::{Error, Result};
