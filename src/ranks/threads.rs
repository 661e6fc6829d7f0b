//! Ranks that are threads of one process.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::waiting::{Clock, PIECE};
use super::{Group, Poll, lost};
use crate::{Error, Result};

/// One of them. Dropping rank 0's ends the others, and waits until they have; dropping another's before that is a failure
/// of all.
pub struct Threads {
    rank: usize,
    shared: Arc<Shared>,
    /// Of rank 0, the others, where it has started them.
    others: Vec<JoinHandle<()>>,
}

struct Shared {
    world: usize,
    patience: Duration,
    poll: Poll,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Exchanges that are complete.
    rounds: u64,
    /// What was given for the next.
    given: Vec<Option<Arc<[u8]>>>,
    /// What the last one gave.
    result: Vec<Arc<[u8]>>,
    /// Orders under way to each rank.
    orders: Vec<VecDeque<Arc<[u8]>>>,
    /// Whether rank 0 has ended.
    ended: bool,
    failed: Option<String>,
}

impl Threads {
    /// A handle for each of `world` ranks, which wait so long for each other in a step, and call `poll` in waits that may
    /// be longer.
    pub fn group(world: usize, patience: Duration, poll: Poll) -> Vec<Threads> {
        let state =
            State { given: vec![None; world], orders: vec![VecDeque::new(); world], ..State::default() };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        let shared = Arc::new(Shared { world, patience, poll, state, changed });
        let handle = |rank| Threads { rank, shared: Arc::clone(&shared), others: Vec::new() };
        (0..world).map(handle).collect()
    }

    /// Rank 0 of a [group](Threads::group), each other of which runs `follow` on a thread; its error or panic fails all of them.
    ///
    /// # Errors
    /// [`Error::Internal`] where there is no thread to be had.
    pub fn lead<F>(world: usize, patience: Duration, poll: Poll, follow: F) -> Result<Threads>
    where
        F: Fn(Arc<dyn Group>) -> Result<()> + Send + Sync + 'static,
    {
        let mut groups = Self::group(world, patience, poll).into_iter();
        let mut first = groups.next().ok_or_else(|| Error::Internal("a group of no ranks".into()))?;
        let follow = Arc::new(follow);
        for group in groups {
            let (group, follow): (Arc<dyn Group>, _) = (Arc::new(group), Arc::clone(&follow));
            let thread = std::thread::Builder::new().name(format!("qwen35rs-rank{}", group.rank()));
            let run = move || match catch_unwind(AssertUnwindSafe(|| follow(Arc::clone(&group)))) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => group.fail(&error.to_string()),
                Err(_) => group.fail("it panicked"),
            };
            let spawned = thread.spawn(run);
            let spawned = spawned.map_err(|e| Error::Internal(format!("no thread for a rank: {e}")))?;
            first.others.push(spawned);
        }
        Ok(first)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `ready` gives something.
    fn wait<'a, T>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        wait: Wait,
        mut ready: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T> {
        let Shared { patience, poll, changed, .. } = self.shared.as_ref();
        let (mut clock, mut waited) = (Clock::start(), Duration::ZERO);
        loop {
            if let Some(value) = ready(&mut state) {
                return Ok(value);
            }
            if let Some(why) = &state.failed {
                return Err(lost(why.clone()));
            }
            let missing = state.given.iter().position(Option::is_none).unwrap_or_default();
            if wait == Wait::Step && waited > *patience {
                let why = format!("rank {missing} kept the others waiting for {patience:?}");
                state.failed = Some(why.clone());
                changed.notify_all();
                return Err(lost(why));
            }
            if wait == Wait::Order {
                state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state = changed.wait_timeout(state, PIECE).unwrap_or_else(PoisonError::into_inner).0;
            waited = clock.tick();
            if wait == Wait::Unhurried && waited >= PIECE {
                // Whoever is called may wait itself, and the others are not to wait for that.
                drop(state);
                poll(waited, &format!("rank {missing} has not come so far"))?;
                state = self.state();
            }
        }
    }
}

/// What is waited for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// An order: for ever, which is how long a model may have nothing to do.
    Order,
    /// Ranks in a step.
    Step,
    /// Ranks that may take long. One that is a thread of this process is no less alive than who waits.
    Unhurried,
}

impl Group for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.shared.world
    }

    fn exchange(&self, mine: &[u8], unhurried: bool) -> Result<Vec<Arc<[u8]>>> {
        self.check()?;
        let mut state = self.state();
        let round = state.rounds;
        state.given[self.rank] = Some(mine.into());
        if state.given.iter().all(Option::is_some) {
            state.result = state.given.iter_mut().filter_map(Option::take).collect();
            state.rounds += 1;
            self.shared.changed.notify_all();
        }
        let wait = if unhurried { Wait::Unhurried } else { Wait::Step };
        // The next round cannot be complete before this rank has given for it.
        self.wait(state, wait, |state| {
            if state.rounds > round {
                return Some(state.result.clone());
            }
            if state.ended {
                state.failed.get_or_insert_with(|| "rank 0 has ended".into());
            }
            None
        })
    }

    fn send(&self, order: &[u8]) -> Result<()> {
        self.check()?;
        let mut state = self.state();
        let order: Arc<[u8]> = order.into();
        state.orders.iter_mut().skip(1).for_each(|orders| orders.push_back(Arc::clone(&order)));
        self.shared.changed.notify_all();
        Ok(())
    }

    fn receive(&self) -> Result<Option<Arc<[u8]>>> {
        self.wait(self.state(), Wait::Order, |state| match state.orders[self.rank].pop_front() {
            None if state.ended && state.failed.is_none() => Some(None),
            order => order.map(Some),
        })
    }

    fn check(&self) -> Result<()> {
        self.state().failed.as_ref().map_or(Ok(()), |why| Err(lost(why.clone())))
    }

    fn fail(&self, why: &str) {
        self.state().failed.get_or_insert_with(|| format!("rank {}: {why}", self.rank));
        self.shared.changed.notify_all();
    }

    fn end(&self) {
        self.state().ended = true;
        self.shared.changed.notify_all();
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let mut state = self.state();
        if self.rank == 0 {
            state.ended = true;
        } else if !state.ended {
            let why = format!("rank {} has ended", self.rank);
            state.failed.get_or_insert(why);
        }
        drop(state);
        self.shared.changed.notify_all();
        // Their panics were caught.
        self.others.drain(..).for_each(|thread| drop(thread.join()));
    }
}
