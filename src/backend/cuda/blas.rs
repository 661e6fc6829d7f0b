//! cuBLASLt, loaded when a device is opened: products with many rows. It chooses its algorithm by the number of rows, so
//! a row's last bits depend on how many others there are; `deterministic` leaves it out.

use std::collections::HashMap;
use std::ffi::c_void;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{self, cudaDataType as DataType};

use super::device::{Device, Memory};
use crate::Result;

/// The library of CUDA 13, as its wheel and the system name it.
const FILE: &str = "libcublasLt.so.13";
/// What Hopper's algorithms want at most.
const WORKSPACE_BYTES: usize = 32 << 20;
const WORKSPACE: &str = "workspace of cuBLASLt";

/// `cublasOperation_t`: transposed.
const CUBLAS_OP_T: i32 = 1;

/// A product's shape: rows, inputs, outputs, elements from a row of the output to the next, and whether it is f32.
pub(super) type Shape = (usize, usize, usize, usize, bool);

/// A handle of the library.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: Memory,
    /// What the library said of each shape; `None` where it refused.
    algorithms: Mutex<HashMap<Shape, Option<sys::cublasLtMatmulAlgo_t>>>,
}

// SAFETY: a handle may be used by several threads.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

/// What the library would take of a card that is only imagined.
pub(super) fn imagine(device: &Arc<Device>) -> Result<Memory> {
    device.alloc(Some(WORKSPACE_BYTES), WORKSPACE)
}

impl Blas {
    /// The library, where it is found: in one of `folders` (which hold `nvidia/cu13/lib` where the wheel is
    /// installed), or where the system looks.
    pub fn open(device: &Arc<Device>, folders: &[PathBuf]) -> Result<Option<Self>> {
        let files = folders.iter().map(|folder| folder.join("nvidia/cu13/lib").join(FILE));
        for file in files.filter(|file| file.is_file()) {
            // SAFETY: loading it runs its initialisers, as the load by name below does. It stays loaded, so that the
            // load by name finds it.
            if let Ok(library) = unsafe { libloading::Library::new(file) } {
                std::mem::forget(library);
                break;
            }
        }
        // SAFETY: looks whether the library can be opened.
        if !unsafe { sys::is_culib_present() } {
            return Ok(None);
        }
        device.bind()?;
        let Ok(handle) = result::create_handle() else { return Ok(None) };
        let workspace = device.alloc(Some(WORKSPACE_BYTES), WORKSPACE)?;
        Ok(Some(Self { handle, workspace, algorithms: Mutex::default() }))
    }

    /// `out = x Wᵀ`, bf16 operands, f32 sums.
    ///
    /// # Errors
    /// Where the library refuses the shape; nothing is launched then.
    ///
    /// # Safety
    /// Pointers are those of `q35_linear`, and the context is current.
    pub unsafe fn linear(
        &self,
        device: &Device,
        shape: Shape,
        x: *const c_void,
        w: *const c_void,
        out: *mut c_void,
    ) -> Result<(), CublasError> {
        // The library is column-major: its A is W (transposed), its B is x and its D is out.
        let (n, num_in, num_out, stride, wide) = shape;
        let mut algorithms = self.algorithms.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(None) = algorithms.get(&shape) {
            return Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED));
        }
        let out_type = if wide { DataType::CUDA_R_32F } else { DataType::CUDA_R_16BF };
        let product = Product::new()?;
        let a = Layout::new(DataType::CUDA_R_16BF, num_in, num_out, num_in)?;
        let b = Layout::new(DataType::CUDA_R_16BF, num_in, n, num_in)?;
        let d = Layout::new(out_type, num_out, n, stride)?;
        let algorithm = match algorithms.get(&shape) {
            Some(Some(algorithm)) => *algorithm,
            _ => {
                let found = self.choose(&product, [&a, &b, &d]);
                algorithms.insert(shape, found.as_ref().ok().copied());
                found?
            }
        };
        let (one, zero) = (1f32, 0f32);
        // SAFETY: descriptors live until the call returns; the caller vouches for the pointers.
        unsafe {
            result::matmul(
                self.handle,
                product.0,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                w,
                a.0,
                x,
                b.0,
                out,
                d.0,
                out,
                d.0,
                &algorithm,
                self.workspace.ptr(),
                self.workspace.bytes(),
                device.stream().cast(),
            )
        }
    }

    fn choose(
        &self,
        product: &Product,
        [a, b, d]: [&Layout; 3],
    ) -> Result<sys::cublasLtMatmulAlgo_t, CublasError> {
        let preference = result::create_matmul_pref()?;
        let bytes = self.workspace.bytes();
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: the attribute is a u64; descriptors live until the calls return.
        unsafe {
            let set = result::set_matmul_pref_attribute(
                preference,
                attribute,
                (&raw const bytes).cast(),
                size_of_val(&bytes),
            );
            let found = set.and_then(|()| {
                result::get_matmul_algo_heuristic(self.handle, product.0, a.0, b.0, d.0, d.0, preference)
            });
            let _ = result::destroy_matmul_pref(preference);
            Ok(found?.algo)
        }
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: made in `open`.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// f32 sums, A transposed.
struct Product(sys::cublasLtMatmulDesc_t);

impl Product {
    fn new() -> Result<Self, CublasError> {
        let made = Self(result::create_matmul_desc(
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            DataType::CUDA_R_32F,
        )?);
        let transposed = CUBLAS_OP_T;
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        // SAFETY: the attribute is an i32.
        unsafe {
            result::set_matmul_desc_attribute(made.0, attribute, (&raw const transposed).cast(), 4)?;
        }
        Ok(made)
    }
}

impl Drop for Product {
    fn drop(&mut self) {
        // SAFETY: made in `new`.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// A column-major matrix.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(kind: DataType, rows: usize, columns: usize, stride: usize) -> Result<Self, CublasError> {
        Ok(Self(result::create_matrix_layout(kind, rows as u64, columns as u64, stride as i64)?))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made in `new`.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}
