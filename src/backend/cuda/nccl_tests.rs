//! The communicator over a library that answers as it is told, and the library where there is none.

use std::ffi::{c_char, c_int, c_void};
use std::path::PathBuf;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::library::{Comm, Config, FILE, IN_PROGRESS, Library, SUCCESS, UniqueId};
use super::{LOOK, Shared};
use crate::Error;

const SYSTEM_ERROR: c_int = 2;
const REMOTE_ERROR: c_int = 6;
const PATIENCE: Duration = Duration::from_millis(300);
/// Of what is done in time, on a machine that has much else to do.
const ENDLESS: Duration = Duration::from_secs(200);

/// What the library says of a communicator, which is its address; and what was asked of it.
#[derive(Default)]
struct Fake {
    /// How often it says that it is not done.
    unfinished: AtomicU32,
    /// What it says then.
    answer: AtomicI32,
    /// What a sum and an end return.
    returned: AtomicI32,
    sums: AtomicU32,
    looks: AtomicU32,
    finalized: AtomicU32,
    destroyed: AtomicU32,
    aborted: AtomicU32,
    /// Milliseconds that the host has waited.
    waited: AtomicU64,
}

fn fake<'a>(comm: *const c_void) -> &'a Fake {
    // SAFETY: leaked by `new`, whose address every communicator here is.
    unsafe { &*comm.cast::<Fake>() }
}

fn count(counter: &AtomicU32) -> u32 {
    counter.load(Ordering::SeqCst)
}

unsafe extern "C" fn get_version(version: *mut c_int) -> c_int {
    // SAFETY: the caller's.
    unsafe { *version = 2_17_01 };
    SUCCESS
}

unsafe extern "C" fn get_error_string(code: c_int) -> *const c_char {
    let text = if code == REMOTE_ERROR { c"a rank is gone" } else { c"something else" };
    text.as_ptr()
}

unsafe extern "C" fn get_unique_id(_: *mut UniqueId) -> c_int {
    SYSTEM_ERROR
}

/// The identity names the fake.
unsafe extern "C" fn init(comm: *mut Comm, _: c_int, id: UniqueId, _: c_int, config: *mut Config) -> c_int {
    let (address, _) = id.0.split_first_chunk().unwrap();
    // SAFETY: the caller's; the first field of the configuration is its size.
    unsafe {
        assert_eq!(*config.cast::<usize>(), size_of::<Config>());
        *comm = usize::from_ne_bytes(*address) as Comm;
    }
    IN_PROGRESS
}

unsafe extern "C" fn get_async_error(comm: Comm, error: *mut c_int) -> c_int {
    let fake = fake(comm);
    fake.looks.fetch_add(1, Ordering::SeqCst);
    let left = fake.unfinished.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
    // SAFETY: the caller's.
    unsafe { *error = if left.is_ok() { IN_PROGRESS } else { fake.answer.load(Ordering::SeqCst) } };
    SUCCESS
}

unsafe extern "C" fn finalize(comm: Comm) -> c_int {
    fake(comm).finalized.fetch_add(1, Ordering::SeqCst);
    fake(comm).returned.load(Ordering::SeqCst)
}

unsafe extern "C" fn destroy(comm: Comm) -> c_int {
    fake(comm).destroyed.fetch_add(1, Ordering::SeqCst);
    SUCCESS
}

unsafe extern "C" fn abort(comm: Comm) -> c_int {
    fake(comm).aborted.fetch_add(1, Ordering::SeqCst);
    SUCCESS
}

unsafe extern "C" fn group() -> c_int {
    SUCCESS
}

unsafe extern "C" fn all_reduce(
    _: *const c_void,
    _: *mut c_void,
    _: usize,
    _: c_int,
    _: c_int,
    comm: Comm,
    _: *mut c_void,
) -> c_int {
    fake(comm).sums.fetch_add(1, Ordering::SeqCst);
    fake(comm).returned.load(Ordering::SeqCst)
}

unsafe extern "C" fn all_gather(
    _: *const c_void,
    _: *mut c_void,
    _: usize,
    _: c_int,
    _: Comm,
    _: *mut c_void,
) -> c_int {
    SUCCESS
}

const LIBRARY: Library = Library {
    get_version,
    get_error_string,
    get_unique_id,
    comm_init_rank_config: init,
    comm_get_async_error: get_async_error,
    comm_finalize: finalize,
    comm_destroy: destroy,
    comm_abort: abort,
    group_start: group,
    group_end: group,
    all_reduce,
    all_gather,
};

/// How often it was aborted, once that should have been seen.
fn aborted(fake: &Fake, expected: u32) -> u32 {
    let start = Instant::now();
    while count(&fake.aborted) != expected && start.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(5));
    }
    count(&fake.aborted)
}

/// A communicator that has not met the others, and the fake behind it.
fn new(patience: Duration) -> (Arc<Shared>, &'static Fake, UniqueId) {
    let fake: &Fake = Box::leak(Box::default());
    let mut id = UniqueId([0; 128]);
    id.0[..size_of::<usize>()].copy_from_slice(&(std::ptr::from_ref(fake) as usize).to_ne_bytes());
    let waited = || Duration::from_millis(fake.waited.load(Ordering::SeqCst));
    (Arc::new(Shared::new(LIBRARY, 1, patience, waited)), fake, id)
}

fn met() -> (Arc<Shared>, &'static Fake) {
    let (shared, fake, id) = new(PATIENCE);
    shared.meet(2, id).unwrap();
    (shared, fake)
}

fn sum(shared: &Shared) -> crate::Result<()> {
    let (null, stream) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the fake reads nothing.
    shared.call("all_reduce", |library, comm| unsafe {
        (library.all_reduce)(null, null, 0, 9, 0, comm, stream)
    })
}

/// The text of an error of ranks, as long as it is one.
fn text(result: crate::Result<()>) -> String {
    match result {
        Err(Error::Ranks { what, .. }) => what,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_call_is_waited_for_until_it_is_done() {
    let (shared, fake, id) = new(ENDLESS);
    fake.unfinished.store(3, Ordering::SeqCst);
    shared.meet(2, id).unwrap();
    assert_eq!((count(&fake.unfinished), count(&fake.looks)), (0, 4));
    fake.returned.store(IN_PROGRESS, Ordering::SeqCst);
    // As many as are slept for, too.
    fake.unfinished.store(super::EAGER_LOOKS + 5, Ordering::SeqCst);
    sum(&shared).unwrap();
    assert_eq!((count(&fake.unfinished), count(&fake.sums), count(&fake.aborted)), (0, 1, 0));
}

#[test]
fn a_call_that_is_never_done_loses_the_others() {
    let (shared, fake, id) = new(PATIENCE);
    fake.unfinished.store(u32::MAX, Ordering::SeqCst);
    let start = Instant::now();
    assert_eq!(text(shared.meet(2, id)), "rank 1: meeting the others kept it waiting for 300ms");
    assert!(start.elapsed() >= PATIENCE);
    assert_eq!(aborted(fake, 1), 1);
    // What comes later asks the library nothing.
    assert_eq!(text(sum(&shared)), "rank 1: meeting the others kept it waiting for 300ms");
    shared.end(PATIENCE);
    assert_eq!((count(&fake.sums), aborted(fake, 1), count(&fake.finalized)), (0, 1, 0));
}

#[test]
fn what_the_library_says_is_said() {
    let refusal = |code: &str| format!("rank 1: all_reduce: NCCL: {code}; NCCL_DEBUG=WARN says more)");
    let (shared, fake) = met();
    fake.returned.store(SYSTEM_ERROR, Ordering::SeqCst);
    assert_eq!(text(sum(&shared)), refusal("something else (code 2"));
    assert_eq!(aborted(fake, 1), 1);
    // Found out while it waits.
    let (shared, fake, id) = new(ENDLESS);
    shared.meet(2, id).unwrap();
    fake.returned.store(IN_PROGRESS, Ordering::SeqCst);
    fake.unfinished.store(2, Ordering::SeqCst);
    fake.answer.store(REMOTE_ERROR, Ordering::SeqCst);
    assert_eq!(text(sum(&shared)), refusal("a rank is gone (code 6"));
    assert_eq!(aborted(fake, 1), 1);
}

#[test]
fn a_rank_that_does_not_answer_is_given_up_while_the_host_waits() {
    let (shared, fake) = met();
    let watched = Arc::clone(&shared);
    let watch = std::thread::spawn(move || watched.watch());
    // As long as the host does not wait, nothing is wrong, whatever time goes by.
    std::thread::sleep(4 * LOOK);
    fake.waited.store(PATIENCE.as_millis() as u64, Ordering::SeqCst);
    std::thread::sleep(4 * LOOK);
    sum(&shared).unwrap();
    assert_eq!(count(&fake.aborted), 0);
    fake.waited.fetch_add(1, Ordering::SeqCst);
    // The thread ends by itself.
    watch.join().unwrap();
    assert_eq!(aborted(fake, 1), 1);
    assert_eq!(text(sum(&shared)), "another rank kept rank 1 waiting for 300ms (NCCL)");
}

#[test]
fn a_rank_that_is_gone_is_noticed_while_nobody_calls() {
    let (shared, fake) = met();
    fake.answer.store(REMOTE_ERROR, Ordering::SeqCst);
    shared.watch();
    assert_eq!(aborted(fake, 1), 1);
    assert!(text(shared.alive().map(drop)).contains("a rank is gone (code 6"));
}

#[test]
fn it_ends_in_order_where_the_others_do() {
    let ended = |fake: &Fake, aborts| (count(&fake.finalized), count(&fake.destroyed), aborted(fake, aborts));
    let (shared, fake) = met();
    fake.returned.store(IN_PROGRESS, Ordering::SeqCst);
    fake.unfinished.store(5, Ordering::SeqCst);
    shared.end(ENDLESS);
    assert_eq!(ended(fake, 0), (1, 1, 0));
    shared.end(ENDLESS);
    assert_eq!(ended(fake, 0), (1, 1, 0));
    let (shared, fake) = met();
    fake.returned.store(IN_PROGRESS, Ordering::SeqCst);
    fake.unfinished.store(u32::MAX, Ordering::SeqCst);
    shared.end(PATIENCE);
    assert_eq!(ended(fake, 1), (1, 0, 1));
    let (shared, fake) = met();
    fake.returned.store(REMOTE_ERROR, Ordering::SeqCst);
    shared.end(PATIENCE);
    assert_eq!(ended(fake, 1), (1, 0, 1));
}

#[test]
fn its_thread_ends_when_nobody_needs_it() {
    let (shared, fake) = met();
    let watched = Arc::clone(&shared);
    let watch = std::thread::spawn(move || watched.watch());
    shared.state.lock().unwrap_or_else(PoisonError::into_inner).ended = true;
    shared.changed.notify_all();
    watch.join().unwrap();
    assert_eq!(count(&fake.aborted), 0);
}

#[test]
fn a_library_that_is_missing_is_named_with_what_to_install() {
    let open = |folders: &[PathBuf], name: &str| match Library::open_named(folders, name) {
        Err(Error::Cuda { what, advice }) => (what, advice),
        other => panic!("{:?}", other.map(drop)),
    };
    let (what, advice) = open(&[], "libnccl-that-is-nowhere.so.2");
    assert!(what.starts_with("found no NCCL (libnccl-that-is-nowhere.so.2: "), "{what}");
    assert!(advice.contains("pip install 'qwen35rs[cuda]'"), "{advice}");
    // A wheel whose file is broken is what is talked of.
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("nvidia/nccl/lib");
    std::fs::create_dir_all(&place).unwrap();
    let file = place.join("libnccl-that-is-broken.so.2");
    std::fs::write(&file, "not a library").unwrap();
    let (what, _) = open(&["elsewhere".into(), folder.path().into()], "libnccl-that-is-broken.so.2");
    assert!(what.contains(file.to_str().unwrap()), "{what}");
    assert_eq!(FILE, "libnccl.so.2");
}

#[test]
fn a_library_that_is_too_old_is_refused() {
    let error = LIBRARY.check_version().unwrap_err().to_string();
    assert!(error.starts_with("cuda: found NCCL 2.17; allowed: 2.18 or later: pip install"), "{error}");
}
