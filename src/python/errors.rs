//! The exception classes, and which error becomes which.

use pyo3::exceptions::{
    PyException, PyKeyboardInterrupt, PyMemoryError, PyRuntimeError, PySystemExit, PyValueError,
};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};

use crate::Error;

struct Classes {
    base: Py<PyType>,
    config: Py<PyType>,
    request: Py<PyType>,
    memory: Py<PyType>,
    cuda: Py<PyType>,
    ranks: Py<PyType>,
}

fn classes(py: Python<'_>) -> PyResult<&'static Classes> {
    static CLASSES: PyOnceLock<Classes> = PyOnceLock::new();
    CLASSES.get_or_try_init(py, || {
        // As a class statement does: `type(name, bases, namespace)`.
        let class = |name: &str, doc: &str, bases: Vec<Bound<'_, PyType>>| -> PyResult<Py<PyType>> {
            let namespace = PyDict::new(py);
            namespace.set_item("__module__", "qwen35rs")?;
            namespace.set_item("__doc__", doc)?;
            let made = py.get_type::<PyType>().call1((name, PyTuple::new(py, bases)?, namespace))?;
            Ok(made.cast_into::<PyType>()?.unbind())
        };
        let base = class(
            "Qwen35Error",
            "Base of every error of qwen35rs.",
            vec![py.get_type::<PyException>()],
        )?;
        let derived = |name, doc, builtin: Bound<'_, PyType>| {
            class(name, doc, vec![base.bind(py).clone(), builtin])
        };
        Ok(Classes {
            config: derived(
                "ConfigError",
                "A configuration, checkpoint, tokenizer or template that cannot be run; says what was found and what is allowed.",
                py.get_type::<PyValueError>(),
            )?,
            request: derived(
                "RequestError",
                "A request or an argument that cannot be served; says what was found and what is allowed.",
                py.get_type::<PyValueError>(),
            )?,
            memory: derived(
                "OutOfMemoryError",
                "Not enough memory; says which setting to lower.",
                py.get_type::<PyMemoryError>(),
            )?,
            cuda: derived(
                "CudaError",
                "A GPU that is not there, cannot be used, or failed; says which.",
                py.get_type::<PyRuntimeError>(),
            )?,
            ranks: derived(
                "RankError",
                "Ranks that share a model and lost each other, or were not started alike; says which.",
                py.get_type::<PyRuntimeError>(),
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
            Error::Cuda { .. } => &classes.cuda,
            Error::Ranks { .. } => &classes.ranks,
            Error::Internal(_) | Error::Model(_) => &classes.base,
            Error::Interrupted => return PyKeyboardInterrupt::new_err(()),
            Error::Followed => return PySystemExit::new_err(0),
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
    m.add("OutOfMemoryError", &classes.memory)?;
    m.add("CudaError", &classes.cuda)?;
    m.add("RankError", &classes.ranks)
}
