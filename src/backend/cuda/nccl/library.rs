//! The library: where it is found, and what is called of it.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::PathBuf;

use crate::{Error, Result};

/// Its name, in its wheel and on the system, for every CUDA.
pub const FILE: &str = "libnccl.so.2";
/// Where the wheel has it, in a folder of packages.
const FOLDER: &str = "nvidia/nccl/lib";
/// The oldest that is taken, as NCCL numbers its versions: 2.18.
const OLDEST: c_int = 2_18_00;

const INSTALL: &str =
    "pip install 'qwen35rs[cuda]', or ranks on one host whose cards address each other's memory";

/// `ncclResult_t`: what is no error.
pub const SUCCESS: c_int = 0;
pub const IN_PROGRESS: c_int = 7;
/// `ncclDataType_t`
pub const FLOAT32: c_int = 7;
pub const BFLOAT16: c_int = 9;
/// `ncclRedOp_t`
pub const SUM: c_int = 0;

/// `ncclComm_t`
pub type Comm = *mut c_void;
type Stream = *mut c_void;

/// `ncclUniqueId`
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId(pub [u8; 128]);

/// `ncclConfig_t` as it was in version 2.14, which later versions take and fill up.
#[repr(C)]
pub struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    /// Inside the struct's size, and not of that version: unset.
    cga_cluster_size: c_int,
}

impl Config {
    /// Of a communicator whose calls return before they are done.
    pub fn non_blocking() -> Self {
        let (size, cga_cluster_size) = (size_of::<Self>(), c_int::MIN);
        Self { size, magic: 0xcafe_beef, version: 2_14_00, blocking: 0, cga_cluster_size }
    }
}

/// What is called of it. All return `ncclResult_t`, but for the text.
#[derive(Clone, Copy)]
pub struct Library {
    pub get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    pub get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    pub get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    pub comm_init_rank_config: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> c_int,
    pub comm_get_async_error: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    pub comm_finalize: unsafe extern "C" fn(Comm) -> c_int,
    pub comm_destroy: unsafe extern "C" fn(Comm) -> c_int,
    pub comm_abort: unsafe extern "C" fn(Comm) -> c_int,
    pub group_start: unsafe extern "C" fn() -> c_int,
    pub group_end: unsafe extern "C" fn() -> c_int,
    /// From, to, elements, their type, the operation.
    pub all_reduce:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int,
    /// From, to, elements of one rank, their type.
    pub all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, Stream) -> c_int,
}

impl Library {
    /// In one of `folders`, where its wheel is installed; else a copy that this process has loaded already, or the
    /// system's.
    ///
    /// # Errors
    /// [`Error::Cuda`] where there is none, or one that is too old: with what is to be installed.
    pub fn open(folders: &[PathBuf]) -> Result<Self> {
        Self::open_named(folders, FILE)
    }

    pub(super) fn open_named(folders: &[PathBuf], name: &str) -> Result<Self> {
        let in_folders = folders.iter().map(|folder| folder.join(FOLDER).join(name));
        let mut why = String::new();
        for place in in_folders.filter(|file| file.is_file()).chain([PathBuf::from(name)]) {
            // SAFETY: loading it runs its initialisers, as for any program that is linked with it.
            match unsafe { libloading::Library::new(&place) } {
                Ok(file) => return Self::of(file),
                // What is wrong with a wheel's says more than that the system has none.
                Err(error) if why.is_empty() => why = text(&error),
                Err(_) => {}
            }
        }
        Err(Error::Cuda { what: format!("found no NCCL ({why})"), advice: format!("allowed: {INSTALL}") })
    }

    fn of(file: libloading::Library) -> Result<Self> {
        let missing = |e: libloading::Error| Error::Cuda {
            what: format!("found an NCCL without what is called ({})", text(&e)),
            advice: format!("allowed: NCCL 2.18 or later: {INSTALL}"),
        };
        // SAFETY: the signatures are those of nccl.h.
        let library = unsafe {
            Self {
                get_version: symbol(&file, "ncclGetVersion").map_err(missing)?,
                get_error_string: symbol(&file, "ncclGetErrorString").map_err(missing)?,
                get_unique_id: symbol(&file, "ncclGetUniqueId").map_err(missing)?,
                comm_init_rank_config: symbol(&file, "ncclCommInitRankConfig").map_err(missing)?,
                comm_get_async_error: symbol(&file, "ncclCommGetAsyncError").map_err(missing)?,
                comm_finalize: symbol(&file, "ncclCommFinalize").map_err(missing)?,
                comm_destroy: symbol(&file, "ncclCommDestroy").map_err(missing)?,
                comm_abort: symbol(&file, "ncclCommAbort").map_err(missing)?,
                group_start: symbol(&file, "ncclGroupStart").map_err(missing)?,
                group_end: symbol(&file, "ncclGroupEnd").map_err(missing)?,
                all_reduce: symbol(&file, "ncclAllReduce").map_err(missing)?,
                all_gather: symbol(&file, "ncclAllGather").map_err(missing)?,
            }
        };
        // Its threads may run when nobody calls it any more: it stays.
        std::mem::forget(file);
        library.check_version()?;
        Ok(library)
    }

    pub(super) fn check_version(&self) -> Result<()> {
        let mut version = 0;
        // SAFETY: an integer to write to.
        let code = unsafe { (self.get_version)(&mut version) };
        if code == SUCCESS && version >= OLDEST {
            return Ok(());
        }
        let (major, minor) = (version / 10_000, version / 100 % 100);
        Err(Error::Cuda {
            what: format!("found NCCL {major}.{minor}"),
            advice: format!("allowed: 2.18 or later: {INSTALL}"),
        })
    }

    /// Where ranks will meet, for rank 0 to tell the others.
    ///
    /// # Errors
    /// The library's code.
    pub fn unique_id(&self) -> Result<UniqueId, c_int> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: as many bytes as it writes.
        match unsafe { (self.get_unique_id)(&mut id) } {
            SUCCESS => Ok(id),
            code => Err(code),
        }
    }

    /// What a code means.
    pub fn text(&self, code: c_int) -> String {
        // SAFETY: there is a text for every code, which lives forever.
        unsafe { CStr::from_ptr((self.get_error_string)(code)) }.to_string_lossy().into_owned()
    }
}

/// What the system said.
fn text(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// # Safety
/// `T` is the function's type.
unsafe fn symbol<T: Copy>(file: &libloading::Library, name: &str) -> Result<T, libloading::Error> {
    // SAFETY: the caller's; the library stays loaded.
    unsafe { file.get::<T>(name).map(|symbol| *symbol) }
}
