//! Ranks that are processes, of one host or several: every other rank has a connection to rank 0.
//!
//! A message is a kind (one byte), a length (u64, little-endian), and so many bytes.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use super::meet::Meeting;
use super::waiting::{Clock, PIECE};
use super::{Group, Poll, lost};
use crate::{Error, Result};

/// A rank that was started, and what it starts with, must come within this time.
const MEETING_PATIENCE: Duration = Duration::from_secs(300);
/// No message is larger; what claims to be is not one of ours.
const MAX_MESSAGE: u64 = 1 << 32;
/// How long one who may not read any more is told why all has failed.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A rank that loads says so many times that it lives while it may keep the others waiting in a step.
const BEATS: u32 = 6;
/// It is given up after so many of these times without a word.
const SILENCE: u32 = 2;

const ORDER: u8 = 1;
pub(super) const EXCHANGE: u8 = 2;
pub(super) const FAILED: u8 = 3;
pub(super) const ENDED: u8 = 4;
const ALIVE: u8 = 5;
/// Bytes of a message before what it says.
pub(super) const HEAD_LEN: usize = 9;

/// One of the ranks.
pub struct Tcp {
    rank: usize,
    world: usize,
    patience: Duration,
    poll: Poll,
    /// Of rank 0, to each other rank; of another, to rank 0.
    peers: Arc<Vec<Mutex<TcpStream>>>,
    failed: OnceLock<String>,
    /// Whether the others know that this one has ended.
    ended: AtomicBool,
    /// The thread that gives signs of life ends with it.
    _beating: Sender<()>,
}

/// What has come.
enum Heard {
    Message(Vec<u8>),
    /// A sign of life.
    Alive,
    End,
}

impl Tcp {
    /// Waits until all have met. They wait for each other so long in a step; `poll` is called in waits that may be longer, this
    /// one too.
    ///
    /// # Errors
    /// [`Error::Ranks`] where not all come, or one that is none of them; what `poll` returned.
    pub fn meet(meeting: &Meeting, step: Duration, poll: Poll) -> Result<Self> {
        Self::meet_within(meeting, MEETING_PATIENCE, step, poll)
    }

    /// The same with another time for all to come.
    ///
    /// # Errors
    /// As [`Tcp::meet`].
    pub fn meet_within(meeting: &Meeting, patience: Duration, step: Duration, poll: Poll) -> Result<Self> {
        let &Meeting { rank, world, .. } = meeting;
        let peers = meeting.connections(patience, step, poll.as_ref())?;
        let peers: Arc<Vec<_>> = Arc::new(peers.into_iter().map(Mutex::new).collect());
        let (failed, ended) = (OnceLock::new(), AtomicBool::new(false));
        let (_beating, stop) = channel();
        let theirs = Arc::clone(&peers);
        let thread = std::thread::Builder::new().name("qwen35rs-alive".into());
        let spawned = thread.spawn(move || beat(&theirs, step / BEATS, &stop));
        spawned.map_err(|e| Error::Internal(format!("no thread for a rank: {e}")))?;
        Ok(Self { rank, world, patience: step, poll, peers, failed, ended, _beating })
    }

    /// The rank at the other end of connection `i`.
    fn other(&self, i: usize) -> usize {
        if self.rank == 0 { i + 1 } else { 0 }
    }

    fn peer(&self, i: usize) -> MutexGuard<'_, TcpStream> {
        self.peers[i].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers why no call will succeed any more, and tells the others.
    fn lose(&self, why: String) -> Error {
        if self.failed.set(why.clone()).is_ok() {
            for i in 0..self.peers.len() {
                // Those that are gone do not hear it, and who does not read is not waited for.
                let mut peer = self.peer(i);
                let quick = peer.set_write_timeout(Some(LAST_WORDS));
                drop(quick.and_then(|()| write(&mut peer, FAILED, &[why.as_bytes()])));
            }
        }
        lost(self.failed.get().cloned().unwrap_or(why))
    }

    /// What comes next of connection `i`; no message of another kind than `want`.
    fn read(&self, i: usize, want: u8, patience: Option<Duration>) -> Result<Heard> {
        let rank = self.other(i);
        let mut peer = self.peer(i);
        let message = peer.set_read_timeout(patience).and_then(|()| read(&mut peer));
        drop(peer);
        match message {
            Ok((kind, bytes)) if kind == want => Ok(Heard::Message(bytes)),
            Ok((ALIVE, _)) => Ok(Heard::Alive),
            Ok((ENDED, _)) => Ok(Heard::End),
            Ok((FAILED, why)) => Err(self.lose(String::from_utf8_lossy(&why).into_owned())),
            Ok((kind, _)) => Err(self.lose(format!("rank {rank} sent a message of kind {kind}"))),
            Err(e) => Err(self.lose(self.gone(i, &e))),
        }
    }

    /// What every connection gives. Whoever it waits for, it looks at all of them.
    fn collect(&self, unhurried: bool) -> Result<Vec<Vec<u8>>> {
        // Rank 0, which waits for all the others, is to be the first to give up: it knows who is late.
        let patience = if self.rank == 0 { self.patience } else { self.patience + self.patience / 4 };
        let mut come: Vec<Option<Vec<u8>>> = vec![None; self.peers.len()];
        let (mut clock, mut heard) = (Clock::start(), vec![Duration::ZERO; come.len()]);
        while let Some(first) = come.iter().position(Option::is_none) {
            let arrived = self.arrives(first)?;
            let waited = clock.tick();
            for i in (first..come.len()).chain(0..first) {
                if come[i].is_some() {
                    self.last_words(i)?;
                } else if (i == first && arrived) || self.has_come(i)? {
                    heard[i] = waited;
                    match self.read(i, EXCHANGE, Some(self.patience))? {
                        Heard::Message(bytes) => come[i] = Some(bytes),
                        Heard::Alive => {}
                        Heard::End => return Err(self.lose(format!("rank {} has ended", self.other(i)))),
                    }
                }
                if come[first].is_some() {
                    // In a step the next one's is there, mostly: nobody else is looked at.
                    break;
                }
            }
            if unhurried {
                self.wait_on(&come, &heard, waited, SILENCE * patience)?;
            } else if waited > patience && come[first].is_none() {
                return Err(self.lose(self.late(first)));
            }
        }
        Ok(come.into_iter().flatten().collect())
    }

    /// Goes on waiting for those that have not come, unless one has said nothing for so long.
    fn wait_on(
        &self,
        come: &[Option<Vec<u8>>],
        heard: &[Duration],
        waited: Duration,
        silence: Duration,
    ) -> Result<()> {
        let missing = (0..come.len()).filter(|&i| come[i].is_none());
        // The one that has said nothing for longest.
        let Some(i) = missing.min_by_key(|&i| heard[i]) else { return Ok(()) };
        let (rank, silent) = (self.other(i), waited.saturating_sub(heard[i]));
        if silent > silence {
            let seconds = silence.as_secs_f64();
            return Err(self.lose(format!("rank {rank} has given no sign of life for {seconds:.0} seconds")));
        }
        let other = if rank == 0 { ", or waits for another" } else { "" };
        let seconds = silent.as_secs();
        (self.poll)(
            waited,
            &format!(
                "rank {rank} has not come so far{other}; its last sign of life was {seconds} seconds ago"
            ),
        )
    }

    /// Whether something comes of connection `i` in a piece of waiting.
    fn arrives(&self, i: usize) -> Result<bool> {
        let peer = self.peer(i);
        let looked = peer.set_read_timeout(Some(PIECE)).and_then(|()| peer.peek(&mut [0]));
        drop(peer);
        match looked {
            // Also its end, which reading tells.
            Ok(_) => Ok(true),
            Err(e) if is_wait(&e) || e.kind() == ErrorKind::Interrupted => Ok(false),
            Err(e) => Err(self.lose(self.gone(i, &e))),
        }
    }

    /// The same of what is there already.
    fn has_come(&self, i: usize) -> Result<bool> {
        let looked = peek_kind(&self.peer(i));
        looked.map(|kind| kind.is_some()).map_err(|e| self.lose(self.gone(i, &e)))
    }

    pub(super) fn write(&self, i: usize, kind: u8, parts: &[&[u8]]) -> Result<()> {
        let written = write(&mut self.peer(i), kind, parts);
        written.map_err(|e| {
            // Whoever cannot be told any more may have said why before.
            self.last_words(i).err().unwrap_or_else(|| self.lose(self.gone(i, &e)))
        })
    }

    /// What an error of a connection says of the rank at its end.
    fn gone(&self, i: usize, error: &std::io::Error) -> String {
        let rank = self.other(i);
        match error.kind() {
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
                format!("rank {rank} has ended")
            }
            _ if is_wait(error) => self.late(i),
            _ => format!("rank {rank}: {error}"),
        }
    }

    fn late(&self, i: usize) -> String {
        format!("rank {} kept the others waiting for {:?}", self.other(i), self.patience)
    }

    /// Sees, without waiting, whether the rank at the end of connection `i` has failed or is gone.
    fn last_words(&self, i: usize) -> Result<()> {
        let next = next_kind(&self.peer(i));
        match next {
            // No order and no exchange has this kind: reading it says why.
            Ok(Some(FAILED)) => self.read(i, ORDER, Some(LAST_WORDS)).map(drop),
            Ok(_) => Ok(()),
            Err(e) => Err(self.lose(self.gone(i, &e))),
        }
    }
}

impl Group for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.world
    }

    fn exchange(&self, mine: &[u8], unhurried: bool) -> Result<Vec<Arc<[u8]>>> {
        self.check()?;
        if self.rank != 0 {
            self.write(0, EXCHANGE, &[mine])?;
            let all = self.collect(unhurried)?.pop().and_then(|all| split(&all, self.world));
            return all.ok_or_else(|| self.lose("rank 0 sent what is no answer".into()));
        }
        let mut all: Vec<Arc<[u8]>> = vec![mine.into()];
        all.extend(self.collect(unhurried)?.into_iter().map(Arc::from));
        let lens: Vec<[u8; 8]> = all.iter().map(|bytes| (bytes.len() as u64).to_le_bytes()).collect();
        let parts: Vec<&[u8]> = lens.iter().map(|l| &l[..]).chain(all.iter().map(|b| &b[..])).collect();
        (0..self.peers.len()).try_for_each(|i| self.write(i, EXCHANGE, &parts))?;
        Ok(all)
    }

    fn send(&self, order: &[u8]) -> Result<()> {
        self.check()?;
        (0..self.peers.len()).try_for_each(|i| self.write(i, ORDER, &[order]))
    }

    fn receive(&self) -> Result<Option<Arc<[u8]>>> {
        self.check()?;
        loop {
            match self.read(0, ORDER, None)? {
                Heard::Message(order) => return Ok(Some(order.into())),
                Heard::Alive => {}
                Heard::End => return Ok(None),
            }
        }
    }

    fn check(&self) -> Result<()> {
        match self.failed.get() {
            Some(why) => Err(lost(why.clone())),
            // The others end then, too.
            None if self.ended.load(Ordering::Relaxed) => Ok(()),
            None => (0..self.peers.len()).try_for_each(|i| self.last_words(i)),
        }
    }

    fn fail(&self, why: &str) {
        drop(self.lose(format!("rank {}: {why}", self.rank)));
    }

    fn end(&self) {
        if self.failed.get().is_none() && !self.ended.swap(true, Ordering::Relaxed) {
            for i in 0..self.peers.len() {
                drop(write(&mut self.peer(i), ENDED, &[]));
            }
        }
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        self.end();
    }
}

/// What every rank gave: their lengths, then their bytes.
fn split(all: &[u8], world: usize) -> Option<Vec<Arc<[u8]>>> {
    let (lens, mut rest) = all.split_at_checked(8 * world)?;
    let mut parts = Vec::with_capacity(world);
    for len in lens.as_chunks().0 {
        let (part, behind) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
        parts.push(part.into());
        rest = behind;
    }
    rest.is_empty().then_some(parts)
}

pub(super) fn write(peer: &mut TcpStream, kind: u8, parts: &[&[u8]]) -> std::io::Result<()> {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    let mut message = Vec::with_capacity(9 + len);
    message.push(kind);
    message.extend((len as u64).to_le_bytes());
    parts.iter().for_each(|part| message.extend_from_slice(part));
    peer.write_all(&message)
}

/// Gives the others a sign of life now and then, until the other end of `stop` is gone.
fn beat(peers: &[Mutex<TcpStream>], interval: Duration, stop: &Receiver<()>) {
    while stop.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
        // A connection on which this rank itself waits for the other is left alone: nobody waits for this one there. So a
        // rank without orders is silent, and signs that nobody reads do not pile up.
        for mut peer in peers.iter().filter_map(|peer| peer.try_lock().ok()) {
            // One that cannot be told is found to be gone by whoever needs it.
            drop(write(&mut peer, ALIVE, &[]));
        }
    }
}

/// The kind of the message that comes next, where one is there; signs of life are none.
pub(super) fn next_kind(mut peer: &TcpStream) -> std::io::Result<Option<u8>> {
    loop {
        match peek_kind(peer)? {
            Some(ALIVE) => peer.read_exact(&mut [0; HEAD_LEN])?,
            kind => return Ok(kind),
        }
    }
}

/// Whether a connection has only not said anything yet.
fn is_wait(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// The kind of what comes next, where something is there.
fn peek_kind(peer: &TcpStream) -> std::io::Result<Option<u8>> {
    let mut kind = [0];
    let looked = peer.set_nonblocking(true).and_then(|()| peer.peek(&mut kind));
    peer.set_nonblocking(false)?;
    match looked {
        Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
        Ok(_) => Ok(Some(kind[0])),
        Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(e),
    }
}

/// Kind and length.
pub(super) fn head(bytes: [u8; HEAD_LEN]) -> (u8, u64) {
    let mut len = [0; 8];
    len.copy_from_slice(&bytes[1..]);
    (bytes[0], u64::from_le_bytes(len))
}

fn read(peer: &mut TcpStream) -> std::io::Result<(u8, Vec<u8>)> {
    let mut bytes = [0; HEAD_LEN];
    peer.read_exact(&mut bytes)?;
    let (kind, len) = head(bytes);
    if len > MAX_MESSAGE {
        return Err(std::io::Error::new(ErrorKind::InvalidData, format!("a message of {len} bytes")));
    }
    let mut bytes = Vec::new();
    // Not what the head says before it is there.
    peer.take(len).read_to_end(&mut bytes)?;
    if bytes.len() as u64 != len {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    Ok((kind, bytes))
}
