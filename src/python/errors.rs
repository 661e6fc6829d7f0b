//! The exception classes, and which error becomes which.

use pyo3::exceptions::{PyException, PyKeyboardInterrupt, PyMemoryError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyTuple, PyType};

use crate::Error;

struct Classes {
    base: Py<PyType>,
    config: Py<PyType>,
    request: Py<PyType>,
    memory: Py<PyType>,
}

fn classes(py: Python<'_>) -> PyResult<&'static Classes> {
    static CLASSES: PyOnceLock<Classes> = PyOnceLock::new();
    CLASSES.get_or_try_init(py, || {
        let class = |name: &std::ffi::CStr, doc: &std::ffi::CStr, bases: Vec<Bound<'_, PyAny>>| {
            let bases = PyTuple::new(py, bases)?;
            PyErr::new_type(py, name, Some(doc), Some(bases.as_any()), None)
        };
        let base = class(
            c"qwen35rs.Qwen35Error",
            c"Base of every error of qwen35rs.",
            vec![py.get_type::<PyException>().into_any()],
        )?;
        let derived = |name, doc, builtin: Bound<'_, PyType>| {
            class(name, doc, vec![base.bind(py).clone().into_any(), builtin.into_any()])
        };
        Ok(Classes {
            config: derived(
                c"qwen35rs.ConfigError",
                c"A configuration, checkpoint, tokenizer or template that cannot be run; says what was found and what is allowed.",
                py.get_type::<PyValueError>(),
            )?,
            request: derived(
                c"qwen35rs.RequestError",
                c"A request or an argument that cannot be served; says what was found and what is allowed.",
                py.get_type::<PyValueError>(),
            )?,
            memory: derived(
                c"qwen35rs.OutOfMemoryError",
                c"Not enough memory; says which setting to lower.",
                py.get_type::<PyMemoryError>(),
            )?,
            base,
        })
    })
}

/// The Python exception of an error.
pub(crate) fn to_py(error: Error) -> PyErr {
    Python::attach(|py| {
        let classes = match classes(py) {
            Ok(classes) => classes,
            Err(error) => return error,
        };
        let class = match &error {
            Error::Config { .. } | Error::File { .. } | Error::Tensor { .. } => &classes.config,
            Error::Request { .. } | Error::Template(_) => &classes.request,
            Error::OutOfMemory { .. } => &classes.memory,
            Error::Internal(_) => &classes.base,
            Error::Interrupted => return PyKeyboardInterrupt::new_err(()),
            Error::Io { path, source } => {
                // The builtin class of the kind, with the path in its text.
                let text = format!("{}: {source}", path.display());
                return std::io::Error::new(source.kind(), text).into();
            }
        };
        PyErr::from_type(class.bind(py).clone(), error.to_string())
    })
}

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    let classes = classes(m.py())?;
    m.add("Qwen35Error", &classes.base)?;
    m.add("ConfigError", &classes.config)?;
    m.add("RequestError", &classes.request)?;
    m.add("OutOfMemoryError", &classes.memory)
}
