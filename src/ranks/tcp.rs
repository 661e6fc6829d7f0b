//! Ranks that are processes, of one host or several: every other rank has a connection to rank 0.
//!
//! A message is a kind (one byte), a length (u64, little-endian), and so many bytes.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::{Group, PATIENCE, lost};
use crate::{Error, Result};

/// What a rank says first, with its rank and the world's size: which program it is.
const HELLO: &[u8; 16] = concat_version();
/// A rank that was started, and what it starts with, must come within this time.
const MEETING_PATIENCE: Duration = Duration::from_secs(300);
/// How often a rank that waits for another to come looks up, and tries again.
const RETRY: Duration = Duration::from_millis(50);
/// No message is larger; what claims to be is not one of ours.
const MAX_MESSAGE: u64 = 1 << 32;

const ORDER: u8 = 1;
const EXCHANGE: u8 = 2;
const FAILED: u8 = 3;
const ENDED: u8 = 4;

const fn concat_version() -> &'static [u8; 16] {
    // The layout of messages is that of this version alone.
    const TEXT: &[u8] = concat!("qwen35rs ", env!("CARGO_PKG_VERSION"), "           ").as_bytes();
    match TEXT.first_chunk() {
        Some(chunk) => chunk,
        None => b"qwen35rs        ",
    }
}

/// Who meets where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meeting {
    /// Counted from 0.
    pub rank: usize,
    /// Among the ranks of this host, from 0: which device it takes.
    pub local_rank: usize,
    /// How many meet.
    pub world: usize,
    /// Where rank 0 listens: `host:port`.
    pub address: String,
}

impl Meeting {
    /// From what torchrun sets: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; or what Slurm does: SLURM_PROCID,
    /// SLURM_LOCALID, SLURM_NTASKS, beside the same two. The port is the one after MASTER_PORT, on which torchrun itself
    /// may listen, or QWEN35RS_PORT. `None` where nothing says that there are several.
    ///
    /// # Errors
    /// [`Error::Request`] naming a variable that is missing or not a number.
    pub fn from_env(var: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let number = |name: &str| -> Result<Option<usize>> {
            let Some(text) = var(name) else { return Ok(None) };
            let number = text.trim().parse().ok();
            number.map(Some).ok_or_else(|| Error::request(name, format!("{text:?}"), "a number"))
        };
        let first = |names: [&'static str; 2]| -> Result<Option<usize>> {
            Ok(match number(names[0])? {
                None => number(names[1])?,
                some => some,
            })
        };
        let world = match first(["WORLD_SIZE", "SLURM_NTASKS"])? {
            None | Some(0 | 1) => return Ok(None),
            Some(world) => world,
        };
        let Some(rank) = first(["RANK", "SLURM_PROCID"])? else { return Ok(None) };
        if rank >= world {
            return Err(Error::request("RANK", rank, format!("0 to {}", world - 1)));
        }
        let local_rank = first(["LOCAL_RANK", "SLURM_LOCALID"])?.unwrap_or(rank);
        let Some(host) = var("MASTER_ADDR") else {
            return Err(Error::request("MASTER_ADDR", "nothing", "the host of rank 0"));
        };
        let port = match number("QWEN35RS_PORT")? {
            Some(port) => port,
            None => {
                1 + number("MASTER_PORT")?.ok_or_else(|| {
                    Error::request(
                        "MASTER_PORT",
                        "nothing",
                        "a port of rank 0's host that is free, as is the next",
                    )
                })?
            }
        };
        let port = u16::try_from(port).map_err(|_| {
            Error::request("the port after MASTER_PORT, or QWEN35RS_PORT", port, "at most 65535")
        })?;
        Ok(Some(Self { rank, local_rank, world, address: format!("{host}:{port}") }))
    }
}

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
        let start = Instant::now();
        let wait = |what: &str| match start.elapsed() {
            waited if waited > patience => Err(lost(what)),
            waited => poll(waited, what).inspect(|()| std::thread::sleep(RETRY)),
        };
        let peers = match rank {
            0 => welcome(meeting, wait)?,
            _ => vec![visit(meeting, wait)?],
        };
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

    fn check(&self) -> Result<()> {
        self.failed.get().map_or(Ok(()), |why| Err(lost(why.clone())))
    }

    /// Remembers why no call will succeed any more, and tells the others.
    fn lose(&self, why: String) -> Error {
        if self.failed.set(why.clone()).is_ok() {
            for i in 0..self.peers.len() {
                // Those that are gone do not hear it.
                drop(write(&mut self.peer(i), FAILED, &[why.as_bytes()]));
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
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                Err(self.lose(format!("rank {rank} kept the others waiting for {:?}", self.patience)))
            }
            Err(e) => Err(self.lose(gone(rank, &e))),
        }
    }

    fn write(&self, i: usize, kind: u8, parts: &[&[u8]]) -> Result<()> {
        let written = write(&mut self.peer(i), kind, parts);
        written.map_err(|e| self.lose(gone(self.other(i), &e)))
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
        let patience = if unhurried { None } else { Some(self.patience) };
        if self.rank != 0 {
            self.write(0, EXCHANGE, &[mine])?;
            let Some(all) = self.read(0, EXCHANGE, patience)? else {
                return Err(self.lose("rank 0 has ended".into()));
            };
            return split(&all, self.world).ok_or_else(|| self.lose("rank 0 sent what is no answer".into()));
        }
        let mut all: Vec<Arc<[u8]>> = vec![mine.into()];
        for i in 0..self.peers.len() {
            match self.read(i, EXCHANGE, patience)? {
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

/// What an error of a connection says of the rank at its end.
fn gone(rank: usize, error: &std::io::Error) -> String {
    match error.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
            format!("rank {rank} has ended")
        }
        _ => format!("rank {rank}: {error}"),
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

fn write(peer: &mut TcpStream, kind: u8, parts: &[&[u8]]) -> std::io::Result<()> {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    let mut message = Vec::with_capacity(9 + len);
    message.push(kind);
    message.extend((len as u64).to_le_bytes());
    parts.iter().for_each(|part| message.extend_from_slice(part));
    peer.write_all(&message)
}

fn read(peer: &mut TcpStream) -> std::io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 9];
    peer.read_exact(&mut head)?;
    let mut len = [0; 8];
    len.copy_from_slice(&head[1..]);
    let len = u64::from_le_bytes(len);
    if len > MAX_MESSAGE {
        return Err(std::io::Error::new(ErrorKind::InvalidData, format!("a message of {len} bytes")));
    }
    let mut bytes = Vec::new();
    // Not what the head says before it is there.
    peer.take(len).read_to_end(&mut bytes)?;
    if bytes.len() as u64 != len {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    Ok((head[0], bytes))
}

/// The connections of the other ranks, in their order.
fn welcome(meeting: &Meeting, wait: impl Fn(&str) -> Result<()>) -> Result<Vec<TcpStream>> {
    let Meeting { world, address, .. } = meeting;
    let port = address.rsplit_once(':').map_or("0", |(_, port)| port);
    let cannot = |e: std::io::Error| {
        let found = format!("{port}, which cannot be listened on ({e})");
        Error::request("the port after MASTER_PORT, or QWEN35RS_PORT", found, "a free port")
    };
    let listener = TcpListener::bind(format!("[::]:{port}"));
    let listener = listener.or_else(|_| TcpListener::bind(format!("0.0.0.0:{port}"))).map_err(cannot)?;
    listener.set_nonblocking(true).map_err(cannot)?;
    let mut peers: Vec<Option<TcpStream>> = (1..*world).map(|_| None).collect();
    while let Some(missing) = peers.iter().position(Option::is_none) {
        match listener.accept() {
            Ok((stream, _)) => {
                // Whoever else comes to this port is sent away.
                if let Ok((rank, stream)) = greet(stream, *world)
                    && let Some(place @ None) = rank.checked_sub(1).and_then(|i| peers.get_mut(i))
                {
                    *place = Some(stream);
                }
            }
            Err(_) => wait(&format!("rank {} of {world} has not come to {address}", missing + 1))?,
        }
    }
    Ok(peers.into_iter().flatten().collect())
}

/// Who has come; it is told that it may stay.
fn greet(mut stream: TcpStream, world: usize) -> std::io::Result<(usize, TcpStream)> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut hello = [0; 32];
    stream.read_exact(&mut hello)?;
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&hello[at..at + 8]);
        u64::from_le_bytes(bytes) as usize
    };
    let rank = number(16);
    if hello[..16] != HELLO[..] || number(24) != world {
        let why = format!(
            "rank {rank} is of {} and of {} ranks; rank 0 is of {} and of {world}",
            String::from_utf8_lossy(&hello[..16]).trim(),
            number(24),
            String::from_utf8_lossy(HELLO).trim()
        );
        write(&mut stream, FAILED, &[why.as_bytes()])?;
        return Err(ErrorKind::InvalidData.into());
    }
    write(&mut stream, EXCHANGE, &[])?;
    Ok((rank, stream))
}

/// The connection to rank 0.
fn visit(meeting: &Meeting, wait: impl Fn(&str) -> Result<()>) -> Result<TcpStream> {
    let Meeting { rank, world, address, .. } = meeting;
    let hello = [&HELLO[..], &(*rank as u64).to_le_bytes(), &(*world as u64).to_le_bytes()].concat();
    loop {
        let failed = match connect(address, &hello) {
            Ok((EXCHANGE, _, stream)) => return Ok(stream),
            Ok((FAILED, why, _)) => {
                return Err(Error::Ranks {
                    what: String::from_utf8_lossy(&why).into_owned(),
                    advice: "start all ranks with the same qwen35rs and the same number of ranks".into(),
                });
            }
            Ok(_) => "what listens there does not answer as a rank".to_string(),
            Err(e) => e.to_string(),
        };
        wait(&format!("rank 0 is not to be reached at {address} ({failed})"))?;
    }
}

fn connect(address: &str, hello: &[u8]) -> std::io::Result<(u8, Vec<u8>, TcpStream)> {
    let mut last = std::io::Error::from(ErrorKind::NotFound);
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
            Ok(mut stream) => {
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(Duration::from_secs(10)))?;
                stream.write_all(hello)?;
                let (kind, bytes) = read(&mut stream)?;
                return Ok((kind, bytes, stream));
            }
            Err(e) => last = e,
        }
    }
    Err(last)
}
