//! A thread that owns an engine, and handles to it. Callers submit requests and wait on their own channel; the
//! thread runs steps while any request is left. Dropping a [`Generation`] ends its requests.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::backend::cpu::parallel::claim;
use crate::backend::{Backend, Measured};
use crate::engine::{Engine, Report, StepOutput};
use crate::request::{RequestId, Wanted};
use crate::{Error, Result};

/// How often a wait for an engine that is being made is looked up from.
const POLL: Duration = Duration::from_millis(50);

/// What a caller wants of one prompt.
#[derive(Debug, Clone)]
pub struct Job {
    /// Token ids.
    pub prompt: Vec<u32>,
    /// What to answer with.
    pub wanted: Wanted,
    /// Tells the samples of one prompt apart.
    pub index: u64,
}

enum Command {
    Submit {
        jobs: Vec<Job>,
        events: Sender<StepOutput>,
        reply: Sender<Result<Vec<RequestId>>>,
    },
    /// Requests were put into the aborted set.
    Abort,
    /// What the engine holds is asked for.
    Report(Sender<Report>),
    /// What its device reaches is asked for.
    Measure(Sender<Result<Option<Measured>>>),
}

/// Handle to an engine's thread; the thread ends when the last handle and the last generation are dropped, which waits for
/// it: what the engine held is free then, and other ranks know.
#[derive(Clone)]
pub struct Service {
    commands: Sender<Command>,
    aborted: Arc<Mutex<HashSet<RequestId>>>,
    /// Why the thread ended, where an error ended it.
    ended: Arc<OnceLock<Error>>,
    /// After the commands, which it waits for.
    _thread: Arc<Joined>,
}

/// A thread that is waited for, in the process that has it: a fork has not.
struct Joined {
    process: u32,
    thread: Option<JoinHandle<()>>,
    waiting: Waiting,
}

/// Runs what waits for a thread to end, letting go meanwhile of what the caller holds and others want.
pub type Waiting = fn(&mut (dyn FnMut() + Send));

impl Drop for Joined {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take().filter(|_| self.process == std::process::id()) {
            let mut thread = Some(thread);
            // Its panics were caught.
            (self.waiting)(&mut || drop(thread.take().map(JoinHandle::join)));
        }
    }
}

/// The requests of one `submit`, and what has become of them.
pub struct Generation {
    ids: Vec<RequestId>,
    events: Receiver<StepOutput>,
    service: Service,
    /// Requests that have not ended, by place in `ids`.
    open: Vec<bool>,
}

/// What callers of a thread that has ended are told.
fn gone(ended: &OnceLock<Error>) -> Error {
    match ended.get() {
        Some(error @ (Error::Cuda { .. } | Error::Ranks { .. })) => error.again(),
        Some(Error::Internal(what)) => Error::Internal(format!("the engine's thread ended: {what}")),
        Some(error) => Error::Internal(format!("the engine's thread ended: {error}")),
        None => Error::Internal("the engine's thread ended; make a new LLM".into()),
    }
}

/// What came of waiting on a [`Generation`].
pub enum Event {
    /// The request at this place of the submitted jobs did a step.
    Output(usize, StepOutput),
    /// Nothing yet.
    Timeout,
    /// Every request has ended.
    Done,
}

impl Service {
    /// Starts the thread, and makes the engine on it. `poll` is called now and then meanwhile and may end the wait;
    /// `make` goes on then until it asks for itself. `waiting` is for the end of the thread.
    ///
    /// # Errors
    /// What `make` or `poll` returned.
    pub fn start<B, F, T>(make: F, poll: impl Fn() -> Result<()>, waiting: Waiting) -> Result<(Self, T)>
    where
        B: Backend + 'static,
        F: FnOnce() -> Result<(Engine<B>, T)> + Send + 'static,
        T: Send + 'static,
    {
        claim()?;
        let (commands, inbox) = channel();
        let aborted = Arc::new(Mutex::new(HashSet::new()));
        let (ready, made) = channel();
        let theirs = Arc::clone(&aborted);
        let ended = Arc::new(OnceLock::new());
        let their_end = Arc::clone(&ended);
        let thread = std::thread::Builder::new().name("qwen35rs-engine".into());
        let spawned = thread.spawn(move || match catch_unwind(AssertUnwindSafe(make)) {
            Ok(Ok((engine, extra))) => {
                if ready.send(Ok(extra)).is_ok() {
                    let owners = Vec::new();
                    Worker { engine, inbox, aborted: theirs, ended: their_end, owners }.run();
                }
            }
            Ok(Err(error)) => drop(ready.send(Err(error))),
            Err(panic) => drop(ready.send(Err(panicked(panic.as_ref())))),
        });
        let thread = spawned.map_err(|e| Error::Internal(format!("no thread for the engine: {e}")))?;
        let extra = loop {
            match made.recv_timeout(POLL) {
                Ok(extra) => break extra?,
                // Whoever ends the wait does not want to wait for the thread.
                Err(RecvTimeoutError::Timeout) => poll()?,
                Err(RecvTimeoutError::Disconnected) => return Err(gone(&ended)),
            }
        };
        let thread = Joined { process: std::process::id(), thread: Some(thread), waiting };
        Ok((Self { commands, aborted, ended, _thread: Arc::new(thread) }, extra))
    }

    /// Queues requests, all or none.
    ///
    /// # Errors
    /// [`Error::Request`] naming what cannot be served.
    pub fn submit(&self, jobs: Vec<Job>) -> Result<Generation> {
        claim()?;
        let (events, inbox) = channel();
        let (reply, answer) = channel();
        self.commands.send(Command::Submit { jobs, events, reply }).map_err(|_| self.gone())?;
        let ids = answer.recv().map_err(|_| self.gone())??;
        Ok(Generation { open: vec![true; ids.len()], ids, events: inbox, service: self.clone() })
    }

    /// What the engine holds, and what its device says of its last step.
    ///
    /// # Errors
    /// [`Error::Internal`] where the thread is gone.
    pub fn report(&self) -> Result<Report> {
        self.ask(Command::Report)
    }

    /// What the engine's device reaches, measured now.
    ///
    /// # Errors
    /// [`Error::Internal`] where the thread is gone, and what the device says.
    pub fn measure(&self) -> Result<Option<Measured>> {
        self.ask(Command::Measure)?
    }

    fn ask<T>(&self, question: impl FnOnce(Sender<T>) -> Command) -> Result<T> {
        claim()?;
        let (reply, answer) = channel();
        self.commands.send(question(reply)).map_err(|_| self.gone())?;
        answer.recv().map_err(|_| self.gone())
    }

    fn gone(&self) -> Error {
        gone(&self.ended)
    }

    fn abort(&self, ids: impl Iterator<Item = RequestId>) {
        lock(&self.aborted).extend(ids);
        // A thread that is gone has nothing left to abort.
        drop(self.commands.send(Command::Abort));
    }
}

impl Generation {
    /// Waits for the next output of any of its requests.
    ///
    /// # Errors
    /// [`Error::Internal`] where the engine's thread is gone, or a request failed.
    pub fn wait(&mut self, timeout: Duration) -> Result<Event> {
        loop {
            if !self.open.contains(&true) {
                return Ok(Event::Done);
            }
            let output = match self.events.recv_timeout(timeout) {
                Ok(output) => output,
                Err(RecvTimeoutError::Timeout) => return Ok(Event::Timeout),
                Err(RecvTimeoutError::Disconnected) => return Err(self.service.gone()),
            };
            // Outputs that were on their way when a request was closed are dropped here.
            let place = self.ids.iter().position(|&id| id == output.id).filter(|&i| self.open[i]);
            let Some(i) = place else { continue };
            if let Some(what) = output.error {
                return Err(Error::Model(what));
            }
            self.open[i] = output.finish.is_none();
            return Ok(Event::Output(i, output));
        }
    }

    /// Ends one request: no more outputs of it.
    pub fn close(&mut self, i: usize) {
        if std::mem::replace(&mut self.open[i], false) {
            self.service.abort(std::iter::once(self.ids[i]));
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        let open: Vec<_> = self.ids.iter().zip(&self.open).filter(|x| *x.1).map(|x| *x.0).collect();
        if !open.is_empty() {
            self.service.abort(open.into_iter());
        }
    }
}

struct Worker<B: Backend> {
    inbox: Receiver<Command>,
    aborted: Arc<Mutex<HashSet<RequestId>>>,
    ended: Arc<OnceLock<Error>>,
    owners: Vec<(RequestId, Sender<StepOutput>)>,
    /// Gone last: callers hear of its end before it has given its memory back, which may have to wait for a device.
    engine: Engine<B>,
}

impl<B: Backend> Worker<B> {
    fn run(mut self) {
        while self.take_commands() {
            if self.owners.is_empty() {
                continue;
            }
            let (engine, aborted) = (&mut self.engine, &self.aborted);
            // A step of which every request was aborted ends at the next layer.
            let poll = |ids: &[RequestId]| {
                let aborted = lock(aborted);
                let wanted = aborted.is_empty() || ids.iter().any(|id| !aborted.contains(id));
                if wanted { Ok(()) } else { Err(Error::Interrupted) }
            };
            // Ranks wait for each other, which the threads that they share must not.
            let step = || match engine.is_alone() {
                true => rayon::scope(|_| engine.step(poll)),
                false => engine.step(poll),
            };
            let error = match catch_unwind(AssertUnwindSafe(step)) {
                Ok(Ok(outputs)) => {
                    outputs.into_iter().for_each(|output| self.deliver(output));
                    continue;
                }
                Ok(Err(Error::Interrupted)) => continue,
                Ok(Err(error)) => error,
                Err(panic) => panicked(panic.as_ref()),
            };
            // Dropping the senders tells every caller; the engine's state is not to be trusted.
            self.engine.fail(&error);
            return drop(self.ended.set(error));
        }
    }

    /// Handles what has come in, waiting where there is nothing else to do. False when all handles are gone.
    fn take_commands(&mut self) -> bool {
        loop {
            let command = if self.owners.is_empty() {
                self.inbox.recv().map_err(|_| TryRecvError::Disconnected)
            } else {
                self.inbox.try_recv()
            };
            match command {
                Ok(Command::Submit { jobs, events, reply }) => {
                    let ids = self.add(jobs, &events);
                    drop(reply.send(ids));
                }
                Ok(Command::Report(reply)) => drop(reply.send(self.engine.report())),
                Ok(Command::Measure(reply)) => drop(reply.send(self.engine.model().backend().measure())),
                Ok(Command::Abort) => {
                    let ids = std::mem::take(&mut *lock(&self.aborted));
                    ids.iter().for_each(|&id| self.engine.abort(id));
                    self.owners.retain(|(id, _)| !ids.contains(id));
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn add(&mut self, jobs: Vec<Job>, events: &Sender<StepOutput>) -> Result<Vec<RequestId>> {
        let mut ids = Vec::with_capacity(jobs.len());
        let several = jobs.len() > 1;
        for (i, job) in jobs.iter().enumerate() {
            let added = match &job.wanted {
                Wanted::Tokens(params) => self.engine.add(&job.prompt, params, job.index),
                Wanted::Logits => self.engine.add_logits(&job.prompt),
                Wanted::DeviceLogits => self.engine.add_device_logits(&job.prompt),
                Wanted::MtpLogits => self.engine.add_mtp_logits(&job.prompt),
            };
            match added {
                Ok(id) => ids.push(id),
                Err(error) => {
                    ids.iter().for_each(|&id| self.engine.abort(id));
                    return Err(match error {
                        Error::Request { field, found, allowed } if several => {
                            Error::Request { field: format!("request {i}: {field}"), found, allowed }
                        }
                        error => error,
                    });
                }
            }
        }
        self.owners.extend(ids.iter().map(|&id| (id, events.clone())));
        Ok(ids)
    }

    fn deliver(&mut self, output: StepOutput) {
        let Some(i) = self.owners.iter().position(|(id, _)| *id == output.id) else { return };
        let ended = output.finish.is_some() || output.error.is_some();
        // A caller that is gone has dropped its generation, whose abort is on its way.
        drop(self.owners[i].1.send(output));
        if ended {
            self.owners.swap_remove(i);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a panic says.
pub(crate) fn panicked(panic: &(dyn std::any::Any + Send)) -> Error {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    Error::Internal(text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("panic").into())
}

#[cfg(test)]
mod tests;
