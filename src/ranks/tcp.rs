//! Ranks that are processes, of one host or several: every other rank has a connection to rank 0.
//!
//! A message is a kind (one byte), a length (u64, little-endian), and so many bytes.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::meet::Meeting;
use super::{Group, PATIENCE, lost};
use crate::{Error, Result};

/// A rank that was started, and what it starts with, must come within this time.
const MEETING_PATIENCE: Duration = Duration::from_secs(300);
/// No message is larger; what claims to be is not one of ours.
const MAX_MESSAGE: u64 = 1 << 32;
/// How long one who may not read any more is told why all has failed.
const LAST_WORDS: Duration = Duration::from_secs(1);

const ORDER: u8 = 1;
pub(super) const EXCHANGE: u8 = 2;
pub(super) const FAILED: u8 = 3;
pub(super) const ENDED: u8 = 4;
/// Bytes of a message before what it says.
pub(super) const HEAD_LEN: usize = 9;

/// One of the ranks.
pub struct Tcp {
    rank: usize,
    world: usize,
    patience: Duration,
    /// Of rank 0, to each other rank; of another, to rank 0.
    peers: Vec<Mutex<TcpStream>>,
    failed: OnceLock<String>,
    /// Whether the others know that this one has ended.
    ended: AtomicBool,
}

impl Tcp {
    /// Waits until all have met. `poll` is called meanwhile, with how long it has waited and for what, and may end the wait.
    ///
    /// # Errors
    /// [`Error::Ranks`] where not all come, or one that is none of them; what `poll` returned.
    pub fn meet(meeting: &Meeting, poll: impl Fn(Duration, &str) -> Result<()>) -> Result<Self> {
        Self::meet_within(meeting, MEETING_PATIENCE, PATIENCE, poll)
    }

    /// The same with other times to wait: for all to come, and later for each other in a step.
    ///
    /// # Errors
    /// As [`Tcp::meet`].
    pub fn meet_within(
        meeting: &Meeting,
        patience: Duration,
        step: Duration,
        poll: impl Fn(Duration, &str) -> Result<()>,
    ) -> Result<Self> {
        let &Meeting { rank, world, .. } = meeting;
        let peers = meeting.connections(patience, step, poll)?;
        let peers = peers.into_iter().map(Mutex::new).collect();
        let (failed, ended) = (OnceLock::new(), AtomicBool::new(false));
        Ok(Self { rank, world, patience: step, peers, failed, ended })
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

    /// A message of connection `i`, which may be the end; of another kind than `want` only that.
    fn read(&self, i: usize, want: u8, patience: Option<Duration>) -> Result<Option<Vec<u8>>> {
        let rank = self.other(i);
        let mut peer = self.peer(i);
        let message = peer.set_read_timeout(patience).and_then(|()| read(&mut peer));
        drop(peer);
        match message {
            Ok((kind, bytes)) if kind == want => Ok(Some(bytes)),
            Ok((ENDED, _)) => Ok(None),
            Ok((FAILED, why)) => Err(self.lose(String::from_utf8_lossy(&why).into_owned())),
            Ok((kind, _)) => Err(self.lose(format!("rank {rank} sent a message of kind {kind}"))),
            Err(e) => Err(self.lose(self.gone(i, &e))),
        }
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
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                format!("rank {rank} kept the others waiting for {:?}", self.patience)
            }
            _ => format!("rank {rank}: {error}"),
        }
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
            // Rank 0, which waits for the others in turn, is to be the first to give up: it knows who is late.
            let patience = if unhurried { None } else { Some(self.patience + self.patience / 4) };
            self.write(0, EXCHANGE, &[mine])?;
            let Some(all) = self.read(0, EXCHANGE, patience)? else {
                return Err(self.lose("rank 0 has ended".into()));
            };
            return split(&all, self.world).ok_or_else(|| self.lose("rank 0 sent what is no answer".into()));
        }
        let mut all: Vec<Arc<[u8]>> = vec![mine.into()];
        let deadline = Instant::now() + self.patience;
        for i in 0..self.peers.len() {
            // No time at all would be all the time.
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            match self.read(i, EXCHANGE, if unhurried { None } else { Some(left) })? {
                Some(bytes) => all.push(bytes.into()),
                None => return Err(self.lose(format!("rank {} has ended", self.other(i)))),
            }
        }
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
        Ok(self.read(0, ORDER, None)?.map(Into::into))
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

/// The kind of the message that comes next, where one is there.
pub(super) fn next_kind(peer: &TcpStream) -> std::io::Result<Option<u8>> {
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
