//! NCCL: sums and gathers between cards that do not address each other's memory, on other hosts for example.
//!
//! Its communicator does not block. What is not done at once is waited for here, and a thread looks whether the
//! communicator or the device fails to answer. Then it aborts the communicator, which ends its kernels, and whatever waits
//! for the device goes on, to an error.

mod library;

use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use self::library::{BFLOAT16, Comm, Config, FLOAT32, IN_PROGRESS, Library, SUCCESS, SUM, UniqueId};
use super::device::Device;
use super::ffi;
use crate::ranks::{Group, PATIENCE, lost};
use crate::{Error, Result};

/// How long the host waits for the device inside one call: less than other ranks would, which then know why.
const WAIT: Duration = PATIENCE.checked_sub(Duration::from_secs(20)).expect("less than it");
/// How often the thread looks.
const LOOK: Duration = Duration::from_millis(100);
/// How long the others may take to end, too.
const ENDING: Duration = Duration::from_secs(10);
/// What is not done after so many looks is slept for.
const EAGER_LOOKS: u32 = 2000;

/// A rank's communicator.
pub(super) struct Nccl {
    shared: Arc<Shared>,
    device: Arc<Device>,
    watch: Option<JoinHandle<()>>,
}

/// What the thread that watches sees of it.
struct Shared {
    library: Library,
    rank: usize,
    /// How long a call may wait.
    patience: Duration,
    /// How long the host has waited for the device now.
    waited: Box<dyn Fn() -> Duration + Send + Sync>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Null once it is gone.
    comm: Comm,
    /// Why it is gone.
    lost: Option<String>,
    /// Whether nobody needs to watch any more.
    ended: bool,
}

/// A communicator that only one thread knows.
struct Gone(Comm);

// SAFETY: as for `State`.
unsafe impl Send for Gone {}
// SAFETY: a handle that may be used on any thread, by one at a time, which the mutex sees to.
unsafe impl Send for State {}

impl Nccl {
    /// Meets the other ranks, each with a card of its own. Up to `rows` rows of `width` are summed at once.
    ///
    /// # Errors
    /// As [`Library::open`] and [`Group::exchange`]; [`Error::Ranks`] with what NCCL says.
    pub fn join(
        device: &Arc<Device>,
        group: &dyn Group,
        folders: &[PathBuf],
        rows: usize,
        width: usize,
    ) -> Result<Self> {
        let (rank, world) = (group.rank(), group.world());
        let library = Library::open(folders)?;
        device.bind()?;
        let own = match rank {
            0 => library.unique_id().map_err(|code| refused(&library, 0, "starting", code))?.0.to_vec(),
            _ => Vec::new(),
        };
        let ids = group.exchange(&own, true)?;
        let id = ids.first().and_then(|id| id.as_ref().try_into().ok()).map(UniqueId);
        let id = id.ok_or_else(|| lost("rank 0 is another version of qwen35rs"))?;
        let clock = Arc::clone(device);
        let shared = Arc::new(Shared::new(library, rank, WAIT, move || clock.waited()));
        shared.meet(world, id)?;
        let (watched, name) = (Arc::clone(&shared), format!("qwen35rs-nccl{rank}"));
        let watch = std::thread::Builder::new().name(name).spawn(move || watched.watch());
        // Whatever fails from here on ends the communicator, too.
        let mut joined = Self { shared, device: Arc::clone(device), watch: None };
        let watch = watch.map_err(|e| Error::Internal(format!("no thread for a rank: {e}")))?;
        joined.watch = Some(watch);
        joined.warm_up(world, rows, width)?;
        Ok(joined)
    }

    /// NCCL connects ranks and takes memory when an algorithm is first used: now, not in a step whose memory is planned.
    fn warm_up(&self, world: usize, rows: usize, width: usize) -> Result<()> {
        const PART: usize = 64;
        let what = "sums over ranks";
        let bytes = rows.max(1).checked_mul(width).and_then(|n| n.checked_mul(2));
        let (sums, part) = (self.device.zeros(bytes, what)?, self.device.zeros(Some(4 * PART), what)?);
        let all = self.device.zeros(Some(4 * PART * world), what)?;
        let stream = self.device.stream().cast();
        self.device.bind()?;
        // SAFETY: rows of bf16 as many as there are; one row of each rank, and of all.
        unsafe {
            self.all_reduce(stream, sums.ptr(), width)?;
            self.all_reduce(stream, sums.ptr(), rows.max(1) * width)?;
            self.all_gather(stream, 1, PART, world, part.ptr(), all.ptr())?;
        }
        self.check_all()
    }

    /// The sum of all ranks' bf16 `[len]`, in place, on the stream. Rounded to bf16 from rank to rank.
    ///
    /// # Errors
    /// [`Error::Ranks`]
    ///
    /// # Safety
    /// `x` is that much memory of the device, whose context is current.
    pub unsafe fn all_reduce(&self, stream: ffi::Stream, x: *mut ffi::Bf16, len: usize) -> Result<()> {
        let (x, stream) = (x.cast::<c_void>(), stream.cast());
        self.shared.call("all_reduce", |library, comm| {
            // SAFETY: the caller's.
            unsafe { (library.all_reduce)(x, x, len, BFLOAT16, SUM, comm, stream) }
        })
    }

    /// Rows `[n, width]` f32 of every rank, side by side: `[n, world * width]`, on the stream.
    ///
    /// # Errors
    /// [`Error::Ranks`]
    ///
    /// # Safety
    /// As [`Nccl::all_reduce`].
    pub unsafe fn all_gather(
        &self,
        stream: ffi::Stream,
        n: usize,
        width: usize,
        world: usize,
        part: *const f32,
        all: *mut f32,
    ) -> Result<()> {
        self.shared.call("all_gather", |library, comm| {
            // A row's parts lie one after the other, as NCCL puts them; of all rows together they do not.
            // SAFETY: the caller's.
            unsafe {
                let mut failed = (library.group_start)();
                for row in 0..n {
                    let (from, to) = (part.wrapping_add(row * width), all.wrapping_add(row * world * width));
                    if matches!(failed, SUCCESS | IN_PROGRESS) {
                        let (from, to, stream) = (from.cast(), to.cast(), stream.cast());
                        failed = (library.all_gather)(from, to, width, FLOAT32, comm, stream);
                    }
                }
                // Also where one was refused, or the next call would be part of this group.
                let end = (library.group_end)();
                if matches!(failed, SUCCESS | IN_PROGRESS) { end } else { failed }
            }
        })
    }

    /// Ends what waits for another rank.
    pub fn give_up(&self) {
        drop(self.shared.lose(&mut self.shared.state(), format!("rank {} has given up", self.shared.rank)));
    }

    /// Says whether it is gone, and why.
    pub fn check(&self) -> Result<()> {
        self.shared.alive().map(drop)
    }

    /// The same once everything that was launched has ended.
    pub fn check_all(&self) -> Result<()> {
        let ended = self.device.synchronize();
        self.check()?;
        ended
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // Whatever still runs here uses it. The thread sees that this ends.
        drop(self.device.synchronize());
        if let Some(watch) = self.watch.take() {
            self.shared.state().ended = true;
            self.shared.changed.notify_all();
            drop(watch.join());
        }
        self.shared.end(ENDING);
    }
}

impl Shared {
    fn new(
        library: Library,
        rank: usize,
        patience: Duration,
        waited: impl Fn() -> Duration + Send + Sync + 'static,
    ) -> Self {
        let state = State { comm: std::ptr::null_mut(), lost: None, ended: false };
        let (waited, changed) = (Box::new(waited), Condvar::new());
        Self { library, rank, patience, waited, state: Mutex::new(state), changed }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn alive(&self) -> Result<MutexGuard<'_, State>> {
        let state = self.state();
        match &state.lost {
            Some(why) => Err(lost(why.clone())),
            None => Ok(state),
        }
    }

    /// Makes the communicator.
    fn meet(&self, world: usize, id: UniqueId) -> Result<()> {
        let mut state = self.alive()?;
        let mut config = Config::non_blocking();
        let (library, rank) = (&self.library, self.rank as c_int);
        // SAFETY: a handle to write to, and a configuration that is read now.
        let code = unsafe {
            (library.comm_init_rank_config)(&mut state.comm, world as c_int, id, rank, &mut config)
        };
        self.finish("meeting the others", code, state)
    }

    /// Calls the library, and waits until what it does on the host is done. On the device it may still be under way.
    fn call(&self, doing: &str, call: impl FnOnce(&Library, Comm) -> c_int) -> Result<()> {
        let state = self.alive()?;
        let code = call(&self.library, state.comm);
        self.finish(doing, code, state)
    }

    fn finish<'a>(&'a self, doing: &str, mut code: c_int, mut state: MutexGuard<'a, State>) -> Result<()> {
        let (start, mut looks) = (Instant::now(), 0);
        while code == IN_PROGRESS {
            if start.elapsed() > self.patience {
                let why = format!("rank {}: {doing} kept it waiting for {:?}", self.rank, self.patience);
                return Err(self.lose(&mut state, why));
            }
            drop(state);
            looks += 1;
            match looks < EAGER_LOOKS {
                true => std::thread::yield_now(),
                false => std::thread::sleep(Duration::from_micros(200)),
            }
            state = self.alive()?;
            code = self.progress(state.comm);
        }
        match code {
            SUCCESS => Ok(()),
            code => {
                let why = refusal(&self.library, self.rank, doing, code);
                Err(self.lose(&mut state, why))
            }
        }
    }

    /// Whether the last call is done, or what went wrong since.
    fn progress(&self, comm: Comm) -> c_int {
        let mut code = SUCCESS;
        // SAFETY: the communicator is not gone; an integer to write to.
        match unsafe { (self.library.comm_get_async_error)(comm, &mut code) } {
            SUCCESS => code,
            failed => failed,
        }
    }

    /// Gives the communicator up.
    fn lose(&self, state: &mut State, why: String) -> Error {
        self.abort(std::mem::replace(&mut state.comm, std::ptr::null_mut()));
        lost(state.lost.get_or_insert(why).clone())
    }

    /// Ends what the communicator does, on a thread of its own: NCCL may wait for recorded steps to go, which the caller
    /// has. Nobody else calls anything of it then, as NCCL demands.
    fn abort(&self, comm: Comm) {
        if comm.is_null() {
            return;
        }
        let (abort, comm) = (self.library.comm_abort, Gone(comm));
        let run = move || {
            let Gone(comm) = { comm };
            // SAFETY: a communicator that is not gone; nobody has it any more.
            let _ = unsafe { abort(comm) };
        };
        // Without a thread to be had, the communicator is left as it is.
        drop(std::thread::Builder::new().name("qwen35rs-nccl-abort".into()).spawn(run));
    }

    fn watch(&self) {
        let mut state = self.state();
        while !state.ended && state.lost.is_none() {
            self.look(&mut state);
            state = self.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Gives the communicator up where it says that it is broken, or a rank does not answer.
    fn look(&self, state: &mut State) {
        if state.comm.is_null() {
            return;
        }
        let why = match self.progress(state.comm) {
            SUCCESS | IN_PROGRESS if (self.waited)() <= self.patience => return,
            SUCCESS | IN_PROGRESS => {
                format!("another rank kept rank {} waiting for {:?} (NCCL)", self.rank, self.patience)
            }
            code => refusal(&self.library, self.rank, "a sum or a gather", code),
        };
        drop(self.lose(state, why));
    }

    /// Ends the communicator: in order where the others do so, too.
    fn end(&self, patience: Duration) {
        let mut state = self.state();
        let comm = std::mem::replace(&mut state.comm, std::ptr::null_mut());
        state.lost.get_or_insert_with(|| "it has ended".into());
        if comm.is_null() {
            return;
        }
        let start = Instant::now();
        // SAFETY: not gone before, and nobody has it any more.
        unsafe {
            let mut code = (self.library.comm_finalize)(comm);
            while code == IN_PROGRESS && start.elapsed() < patience {
                std::thread::sleep(Duration::from_millis(1));
                code = self.progress(comm);
            }
            match code {
                SUCCESS => drop((self.library.comm_destroy)(comm)),
                _ => self.abort(comm),
            }
        }
    }
}

fn refusal(library: &Library, rank: usize, doing: &str, code: c_int) -> String {
    format!("rank {rank}: {doing}: NCCL: {} (code {code}; NCCL_DEBUG=WARN says more)", library.text(code))
}

fn refused(library: &Library, rank: usize, doing: &str, code: c_int) -> Error {
    lost(refusal(library, rank, doing, code))
}

#[cfg(test)]
#[path = "nccl_tests.rs"]
mod tests;
