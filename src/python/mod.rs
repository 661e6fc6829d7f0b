//! The Python module `qwen35rs._core`: the only part of the crate that knows PyO3. In go strings, token ids,
//! numbers and settings; out come token ids, text, numbers and exceptions. Tensors cross in `ops` and in the
//! logits that were asked for, nowhere else.

mod dlpack;
mod engine;
mod errors;
mod load;
mod ops;
#[cfg(feature = "cuda")]
mod ops_cuda;
mod ops_shapes;
mod room;
mod tokenizer;
mod tools;

use pyo3::prelude::*;

pub(crate) use errors::to_py;

/// Runs `work` without the GIL and maps its error: the one door into the crate.
pub(crate) fn enter<T: Send>(py: Python<'_>, work: impl FnOnce() -> crate::Result<T> + Send) -> PyResult<T> {
    py.detach(work).map_err(to_py)
}

#[pymodule(gil_used = false)]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    errors::register(m)?;
    tokenizer::register(m)?;
    engine::register(m)?;
    ops::register(m)?;
    tools::register(m)
}
