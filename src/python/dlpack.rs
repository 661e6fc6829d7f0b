//! The DLPack protocol: tensors that other libraries lend, and those that they are given. No byte is copied.
#![cfg_attr(not(feature = "cuda"), allow(dead_code))] // nobody makes one

use std::ffi::{CStr, c_void};
use std::ptr::NonNull;
use std::sync::Arc;

use pyo3::exceptions::{PyBufferError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::ffi as py;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict, PyTuple};

use super::ops_shapes::{Shape, refuse};
use super::to_py;
use crate::lend::Lendable;

const UNUSED: &CStr = c"dltensor";
const USED: &CStr = c"used_dltensor";
/// `kDLCUDA`
const CUDA: i32 = 2;
/// The default stream as the protocol names it, where 0 could be another.
const DEFAULT_STREAM: isize = 1;

// `dlpack.h`, as it was before version 1: what every library gives and takes when nothing newer is asked for.

#[repr(C)]
struct Managed {
    data: *mut c_void,
    device: [i32; 2],
    ndim: i32,
    dtype: RawType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
    owner: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Managed)>,
}

#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
struct RawType {
    code: u8,
    bits: u8,
    lanes: u16,
}

/// Element types that cross.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Element {
    Int32,
    Int64,
    Float32,
    Bfloat16,
}

impl Element {
    const ALL: [Self; 4] = [Self::Int32, Self::Int64, Self::Float32, Self::Bfloat16];

    fn raw(self) -> RawType {
        let (code, bits) = match self {
            Self::Int32 => (0, 32),
            Self::Int64 => (0, 64),
            Self::Float32 => (2, 32),
            Self::Bfloat16 => (4, 16),
        };
        RawType { code, bits, lanes: 1 }
    }

    pub(super) fn size(self) -> usize {
        usize::from(self.raw().bits / 8)
    }
}

impl std::fmt::Display for Element {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Int32 => "int32",
            Self::Int64 => "int64",
            Self::Float32 => "float32",
            Self::Bfloat16 => "bfloat16",
        })
    }
}

/// A borrowed tensor, given back when this is dropped.
struct Lent(NonNull<Managed>);

impl Drop for Lent {
    fn drop(&mut self) {
        // SAFETY: the capsule is used up, so the tensor is ours to give back, once.
        unsafe {
            if let Some(deleter) = self.0.as_ref().deleter {
                deleter(self.0.as_ptr());
            }
        }
    }
}

/// An argument on a CUDA device: contiguous, and aligned to 16 bytes.
pub(super) struct Input {
    name: &'static str,
    dims: Vec<usize>,
    element: Element,
    address: u64,
    _lent: Lent,
}

impl Input {
    /// Takes an argument of one of these types from a device, ready for work on a stream, 0 for the default one.
    pub(super) fn take(
        name: &'static str,
        value: &Bound<'_, PyAny>,
        (device, stream): (usize, usize),
        elements: &[Element],
    ) -> PyResult<Self> {
        let python = value.py();
        let kwargs = PyDict::new(python);
        kwargs.set_item("stream", if stream == 0 { DEFAULT_STREAM } else { stream as isize })?;
        let given = value.call_method("__dlpack__", (), Some(&kwargs)).map_err(|error| {
            // A plain RuntimeError: classes of its own are for what is wrong with the device.
            let is_refusal = error.is_instance_of::<PyBufferError>(python)
                || error.get_type(python).is(python.get_type::<PyRuntimeError>())
                || error.is_instance_of::<PyTypeError>(python)
                || error.is_instance_of::<PyValueError>(python);
            let found = || format!("{} ({})", class_of(value), error.value(python));
            if is_refusal { refuse(name, found(), "a tensor that DLPack can lend") } else { error }
        })?;
        let capsule = given.cast::<PyCapsule>().ok().filter(|c| c.is_valid_checked(Some(UNUSED)));
        let Some(capsule) = capsule else {
            let found = format!("{} whose __dlpack__ gives {}", class_of(value), class_of(&given));
            return Err(refuse(name, found, "one that gives an unused capsule named dltensor"));
        };
        let managed = capsule.pointer_checked(Some(UNUSED))?.cast::<Managed>();
        // SAFETY: a capsule, and a name that lives forever.
        if unsafe { py::PyCapsule_SetName(capsule.as_ptr(), USED.as_ptr()) } != 0 {
            return Err(PyErr::fetch(python));
        }
        let lent = Lent(managed);
        // SAFETY: what a capsule of this name holds, until it is given back.
        let tensor = unsafe { lent.0.as_ref() };

        if tensor.device != [CUDA, i32::try_from(device).unwrap_or(-1)] {
            let found = format!("a tensor on DLPack's device {:?}", tensor.device);
            return Err(refuse(name, found, format!("cuda:{device}")));
        }
        let Some(&element) = elements.iter().find(|e| e.raw() == tensor.dtype) else {
            let allowed: Vec<_> = elements.iter().map(ToString::to_string).collect();
            return Err(refuse(name, format!("dtype {}", dtype_name(tensor.dtype)), allowed.join(" or ")));
        };
        let rank = usize::try_from(tensor.ndim).unwrap_or_default();
        let list = |p: *mut i64| match rank {
            0 => &[][..],
            // SAFETY: as many as there are dimensions.
            _ => unsafe { std::slice::from_raw_parts(p, rank) },
        };
        let shape = list(tensor.shape);
        let dims = shape.iter().map(|&d| usize::try_from(d).ok().filter(|&d| d <= i32::MAX as usize));
        let (Some(dims), true) = (dims.collect::<Option<Vec<_>>>(), fits_memory(shape)) else {
            return Err(refuse(name, format!("shape {shape:?}"), "sizes below 2^31"));
        };
        if !tensor.strides.is_null() && !is_contiguous(shape, list(tensor.strides)) {
            let found = format!("strides {:?} of shape {shape:?}", list(tensor.strides));
            return Err(refuse(name, found, "a contiguous tensor (.contiguous() makes one)"));
        }
        let address = tensor.data as u64 + tensor.byte_offset;
        if !address.is_multiple_of(16) && !dims.contains(&0) {
            let found = format!("memory {} bytes after a multiple of 16", address % 16);
            return Err(refuse(
                name,
                found,
                "a tensor that begins at a multiple of 16 bytes (.clone() does)",
            ));
        }
        Ok(Self { name, dims, element, address, _lent: lent })
    }

    pub(super) fn shape(&self) -> Shape<'_> {
        Shape { name: self.name, dims: &self.dims }
    }

    /// `[channels, 1, kernel]` is `[channels, kernel]`.
    pub(super) fn without_middle(mut self) -> Self {
        if let [_, 1, _] = self.dims[..] {
            self.dims.remove(1);
        }
        self
    }

    /// `[width]` is `[1, width]`.
    pub(super) fn into_rows(mut self) -> Self {
        if self.dims.len() == 1 {
            self.dims.insert(0, 1);
        }
        self
    }

    /// What it is made of, on its device, as long as it is borrowed.
    #[cfg(feature = "cuda")]
    pub(super) fn view(&self) -> crate::backend::cuda::ops::View<'_> {
        let len = self.dims.iter().product();
        // SAFETY: what the protocol promises of a tensor; what is launched on it is ordered by its library's stream.
        unsafe { crate::backend::cuda::ops::View::new(self.address, len, self.element.size()) }
    }
}

fn class_of(value: &Bound<'_, PyAny>) -> String {
    value.get_type().name().map_or_else(|_| "an object".into(), |name| name.to_string())
}

fn dtype_name(dtype: RawType) -> String {
    let kind = match dtype.code {
        0 => "int",
        1 => "uint",
        2 => "float",
        4 => "bfloat",
        5 => "complex",
        6 => "bool",
        code => return format!("of DLPack's code {code}"),
    };
    let known = Element::ALL.iter().find(|e| e.raw() == dtype).map(ToString::to_string);
    known.unwrap_or_else(|| match dtype.lanes {
        1 => format!("{kind}{}", dtype.bits),
        lanes => format!("{kind}{}x{lanes}", dtype.bits),
    })
}

/// Whether the bytes of a tensor can be counted.
fn fits_memory(shape: &[i64]) -> bool {
    shape.iter().try_fold(8i64, |n, &d| n.checked_mul(d)).is_some()
}

/// Whether elements follow one another. The stride of a single one says nothing.
fn is_contiguous(shape: &[i64], strides: &[i64]) -> bool {
    let mut next = 1i64;
    for (&len, &stride) in shape.iter().zip(strides).rev() {
        if len != 1 && stride != next {
            return shape.contains(&0);
        }
        next = next.saturating_mul(len);
    }
    true
}

/// A result on a CUDA device, for `from_dlpack` of any library. Its memory is given back, in the order of the stream
/// that it was made on, when neither this nor any tensor made of it is left.
#[pyclass(frozen, module = "qwen35rs._core")]
pub(super) struct DeviceTensor {
    owner: Arc<dyn Lendable>,
    dims: Vec<usize>,
    element: Element,
}

impl DeviceTensor {
    pub(super) fn new(owner: Arc<dyn Lendable>, dims: &[usize], element: Element) -> Self {
        Self { owner, dims: dims.to_vec(), element }
    }
}

/// What a capsule's tensor points to.
struct Export {
    managed: Managed,
    shape: Vec<i64>,
    strides: Vec<i64>,
    _owner: Arc<dyn Lendable>,
}

/// Of a [`Managed`] made here; from any thread, with or without the interpreter.
unsafe extern "C" fn delete(managed: *mut Managed) {
    // SAFETY: `owner` is the box that the tensor is in, and a consumer calls this once.
    drop(unsafe { Box::from_raw((*managed).owner.cast::<Export>()) });
}

/// Of a capsule: gives back what nobody has taken.
unsafe extern "C" fn forget(capsule: *mut py::PyObject) {
    // SAFETY: the interpreter's call, with the capsule that is going.
    unsafe {
        if py::PyCapsule_IsValid(capsule, UNUSED.as_ptr()) == 1 {
            delete(py::PyCapsule_GetPointer(capsule, UNUSED.as_ptr()).cast());
        }
    }
}

#[pymethods]
impl DeviceTensor {
    /// Its sizes.
    #[getter]
    fn shape<'py>(&self, python: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(python, &self.dims)
    }

    /// The name of its type.
    #[getter]
    fn dtype(&self) -> String {
        self.element.to_string()
    }

    /// `cuda:N`
    #[getter]
    fn device(&self) -> String {
        format!("cuda:{}", self.owner.device())
    }

    fn __dlpack_device__(&self) -> (i32, usize) {
        (CUDA, self.owner.device())
    }

    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        python: Python<'py>,
        stream: Option<isize>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, usize)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        // A newer consumer takes this version too.
        let _ = max_version;
        if dl_device.is_some_and(|wanted| wanted != self.__dlpack_device__()) {
            return Err(PyBufferError::new_err(format!(
                "the tensor is on cuda:{} and stays there",
                self.owner.device()
            )));
        }
        if copy == Some(true) {
            return Err(PyBufferError::new_err("the tensor is lent, not copied"));
        }
        let stream = match stream.unwrap_or(DEFAULT_STREAM) {
            -1 => None,
            DEFAULT_STREAM => Some(0),
            stream if stream > DEFAULT_STREAM => Some(stream as usize),
            stream => {
                let text = format!("stream: found {stream}; allowed: a stream's address, 1, 2 or -1");
                return Err(PyBufferError::new_err(text));
            }
        };
        self.owner.share(stream).map_err(to_py)?;

        let shape: Vec<i64> = self.dims.iter().map(|&d| d as i64).collect();
        let mut strides = vec![1i64; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i] * shape[i].max(1);
        }
        let mut export = Box::new(Export {
            managed: Managed {
                data: self.owner.address() as *mut c_void,
                device: [CUDA, i32::try_from(self.owner.device()).unwrap_or(-1)],
                ndim: shape.len() as i32,
                dtype: self.element.raw(),
                shape: std::ptr::null_mut(),
                strides: std::ptr::null_mut(),
                byte_offset: 0,
                owner: std::ptr::null_mut(),
                deleter: Some(delete),
            },
            shape,
            strides,
            _owner: Arc::clone(&self.owner),
        });
        export.managed.shape = export.shape.as_mut_ptr();
        export.managed.strides = export.strides.as_mut_ptr();
        let export = Box::into_raw(export);
        // SAFETY: just made; the lists stay where they are. A capsule that is not made leaves it to `delete`.
        unsafe {
            (*export).managed.owner = export.cast();
            let managed = &raw mut (*export).managed;
            PyCapsule::new_with_pointer_and_destructor(
                python,
                NonNull::new_unchecked(managed.cast()),
                UNUSED,
                Some(forget),
            )
            .inspect_err(|_| delete(managed))
        }
    }

    fn __repr__(&self) -> String {
        format!(
            "DeviceTensor(shape={:?}, dtype={}, device=cuda:{})",
            self.dims,
            self.element,
            self.owner.device()
        )
    }
}
