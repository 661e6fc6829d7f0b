//! Threads of the CPU backend: parallel loops over tasks that write disjoint places.

use std::sync::atomic::{AtomicU32, Ordering};

use rayon::prelude::*;

use crate::{Error, Result};

/// The process whose threads these are.
static OWNER: AtomicU32 = AtomicU32::new(0);

/// To be called before anything here: the threads belong to the first process that called.
///
/// # Errors
/// [`Error::Request`] in a process forked from one that has called it: threads do not survive a fork, and waiting
/// for them would never end.
pub fn claim() -> Result<()> {
    let process = std::process::id();
    match OWNER.compare_exchange(0, process, Ordering::Relaxed, Ordering::Relaxed) {
        Err(owner) if owner != process => Err(Error::request(
            "process",
            format!("a fork of process {owner}, in which qwen35rs has started its threads"),
            "a process that is spawned (multiprocessing.get_context('spawn')), or forked before the first use",
        )),
        _ => Ok(()),
    }
}

/// Multiply-adds (or comparable work) below which a loop is not worth waking another thread.
const SERIAL_WORK: usize = 1 << 15;

/// A pointer that tasks of one parallel loop write through, at places that do not overlap.
#[derive(Clone, Copy)]
pub struct Shared<T>(*mut T);

impl<T> Shared<T> {
    /// Shares the elements of a slice.
    pub fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr())
    }

    /// The pointer. (A method, so that closures capture the wrapper and not its field.)
    #[inline(always)]
    pub fn get(self) -> *mut T {
        self.0
    }

    /// Elements `[start, start + len)`.
    ///
    /// # Safety
    /// They are inside the slice that was shared, and no other task touches them meanwhile.
    #[inline(always)]
    pub unsafe fn slice<'a>(self, start: usize, len: usize) -> &'a mut [T] {
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

// SAFETY: users write disjoint places, and say so where they do.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

/// Runs `task(0) .. task(n - 1)`, on several threads where `work_per_task` makes it worth while.
pub fn for_each(n: usize, work_per_task: usize, task: impl Fn(usize) + Sync + Send) {
    if n <= 1 || n * work_per_task <= SERIAL_WORK || rayon::current_num_threads() == 1 {
        (0..n).for_each(task);
    } else {
        let at_least = SERIAL_WORK.div_ceil(2 * work_per_task.max(1)).max(1);
        (0..n).into_par_iter().with_min_len(at_least).for_each(task);
    }
}

/// How many of `n` items a task takes, so that a task is worth its dispatch and every thread gets several.
/// A multiple of 32: whole strips of the weights.
pub fn items_per_task(n: usize, work_per_item: usize) -> usize {
    let threads = rayon::current_num_threads();
    if n * work_per_item <= SERIAL_WORK || threads == 1 {
        return n.max(1);
    }
    let tasks = (n * work_per_item / SERIAL_WORK).clamp(1, threads * 8);
    n.div_ceil(tasks).next_multiple_of(32)
}
