//! The Python module `qwen35rs._core`: the only part of the crate that knows PyO3.

mod tokenizer;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

pyo3::create_exception!(_core, Qwen35Error, pyo3::exceptions::PyException);

/// Runs `work` without the GIL and maps its error.
pub(crate) fn enter<T: Send>(py: Python<'_>, work: impl FnOnce() -> crate::Result<T> + Send) -> PyResult<T> {
    py.detach(work).map_err(to_py)
}

/// The Python exception of an error.
pub(crate) fn to_py(error: crate::Error) -> PyErr {
    match error {
        crate::Error::Io { ref path, ref source } => {
            let kind = source.kind();
            std::io::Error::new(kind, format!("{}: {source}", path.display())).into()
        }
        error => PyValueError::new_err(error.to_string()),
    }
}

#[pymodule(gil_used = false)]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("Qwen35Error", m.py().get_type::<Qwen35Error>())?;
    tokenizer::register(m)
}
