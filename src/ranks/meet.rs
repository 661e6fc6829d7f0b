//! How ranks that are processes meet: where, by what started them; who is one of them, and who is not.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};

use super::lost;
use super::tcp::{ENDED, EXCHANGE, FAILED, HEAD_LEN, head, next_kind, write};
use crate::{Error, Result};

/// What a rank says first: this, its rank, the number of ranks, and its version.
const HELLO: &[u8; 8] = b"qwen35rs";
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Bytes of a version, filled up with zeros.
const VERSION_LEN: usize = 40;
const _: () = assert!(VERSION.len() <= VERSION_LEN, "versions that differ look different");
const HELLO_LEN: usize = 24 + VERSION_LEN;
/// What a rank answers that has been told that it has a place.
const HERE: u8 = 0x51;
/// How often a rank that waits for another to come looks up, and tries again.
const RETRY: Duration = Duration::from_millis(50);
/// Whoever comes says who it is within this time, for others wait behind it.
const GREETING: Duration = Duration::from_secs(1);
/// Whoever comes is answered within this time, or comes again.
const ANSWER: Duration = Duration::from_secs(10);
/// No first answer is longer.
const MAX_ANSWER: u64 = 1 << 16;
/// A host that says nothing for so long is asked whether it is there, and then at this interval, so many times.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(30), Duration::from_secs(10), 3);

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
    /// From what torchrun sets: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; or what Slurm's srun does:
    /// SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NUM_TASKS (a batch script itself has none), beside the last two. The port is
    /// the one after MASTER_PORT, on which torchrun itself may listen, or QWEN35RS_PORT. `None` where nothing says that
    /// there are several.
    ///
    /// # Errors
    /// [`Error::Request`] naming a variable that is missing or not a number.
    pub fn from_env(var: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let number = |name: &str| -> Result<Option<usize>> {
            let Some(text) = var(name) else { return Ok(None) };
            let number = text.trim().parse().ok().filter(|&n| n <= i32::MAX as usize);
            let allowed = format!("a number from 0 to {}", i32::MAX);
            number.map(Some).ok_or_else(|| Error::request(name, format!("{text:?}"), allowed))
        };
        let first = |names: [&'static str; 2]| -> Result<Option<(&str, usize)>> {
            for name in names {
                if let Some(number) = number(name)? {
                    return Ok(Some((name, number)));
                }
            }
            Ok(None)
        };
        let (of_world, world) = match first(["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])? {
            None | Some((_, 1)) => return Ok(None),
            Some((name, 0)) => return Err(Error::request(name, 0, "at least 1")),
            Some(world) => world,
        };
        let Some((of_rank, rank)) = first(["RANK", "SLURM_PROCID"])? else {
            let allowed = format!("which of the {world} processes this is ({of_world} is {world})");
            return Err(Error::request("RANK", "nothing", allowed));
        };
        if rank >= world {
            return Err(Error::request(of_rank, rank, format!("0 to {}", world - 1)));
        }
        let local_rank = first(["LOCAL_RANK", "SLURM_LOCALID"])?.map_or(rank, |(_, local)| local);
        let Some(host) = var("MASTER_ADDR") else {
            return Err(Error::request("MASTER_ADDR", "nothing", "the host of rank 0"));
        };
        let port = match (number("QWEN35RS_PORT")?, number("MASTER_PORT")?) {
            (Some(0), _) => return Err(Error::request("QWEN35RS_PORT", 0, "1 to 65535")),
            (None, Some(0)) => return Err(Error::request("MASTER_PORT", 0, "1 to 65534")),
            (Some(port), _) => port,
            (None, Some(port)) => port + 1,
            (None, None) => {
                let allowed = "a port of rank 0's host that is free, as is the next";
                return Err(Error::request("MASTER_PORT", "nothing", allowed));
            }
        };
        let port = u16::try_from(port).map_err(|_| {
            Error::request("the port after MASTER_PORT, or QWEN35RS_PORT", port, "at most 65535")
        })?;
        Ok(Some(Self { rank, local_rank, world, address: format!("{host}:{port}") }))
    }

    /// A connection to each other rank, in their order, of rank 0; to rank 0, of another. `poll` is called meanwhile, with
    /// how long it has waited and for what. What is sent waits `step` for one who does not read.
    ///
    /// # Errors
    /// [`Error::Ranks`] where not all come, or one that is none of them; what `poll` returned.
    pub(super) fn connections(
        &self,
        patience: Duration,
        step: Duration,
        poll: &dyn Fn(Duration, &str) -> Result<()>,
    ) -> Result<Vec<TcpStream>> {
        let start = Instant::now();
        let wait = |what: &str| match start.elapsed() {
            waited if waited > patience => Err(lost(what)),
            waited => poll(waited, what),
        };
        let peers = if self.rank == 0 { welcome(self, wait)? } else { vec![visit(self, wait)?] };
        let cannot = |e: std::io::Error| Error::Internal(format!("a connection of ranks: {e}"));
        for peer in &peers {
            let (idle, interval, retries) = KEEPALIVE;
            let keepalive = TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(retries);
            // A host that is lost says nothing; one that is there and stopped answers.
            SockRef::from(peer).set_tcp_keepalive(&keepalive).map_err(cannot)?;
            peer.set_write_timeout(Some(step)).map_err(cannot)?;
        }
        Ok(peers)
    }
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
    let mut sent_away = String::new();
    while let Some(missing) = peers.iter().position(Option::is_none) {
        wait(&format!("rank {} of {world} has not come to {address}{sent_away}", missing + 1))?;
        match listener.accept() {
            Ok((stream, _)) => match greet(stream, &mut peers) {
                Ok(()) => {}
                Err(Away::Version(why)) => {
                    // Those that have met hear it too.
                    let met = peers.iter_mut().flatten();
                    met.for_each(|peer| drop(write(peer, FAILED, &[why.as_bytes()])));
                    return Err(unlike(why));
                }
                Err(Away::Other(why)) => sent_away = format!(" (who came was sent away: {why})"),
            },
            Err(_) => std::thread::sleep(RETRY),
        }
    }
    Ok(peers.into_iter().flatten().collect())
}

/// Why one who has come has no place.
enum Away {
    /// A rank of another version: these never meet.
    Version(String),
    /// Not one of these ranks, or not now: the one who belongs here may still come.
    Other(String),
}

impl From<std::io::Error> for Away {
    fn from(error: std::io::Error) -> Self {
        Self::Other(format!("it did not say in time who it is, {error}"))
    }
}

/// Gives one who has come, and has not gone since, its place among the others, or tells it why it has none.
fn greet(mut stream: TcpStream, peers: &mut [Option<TcpStream>]) -> std::result::Result<(), Away> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(GREETING))?;
    let hello: [u8; HELLO_LEN] = read_within(&mut stream, GREETING)?;
    if hello[..8] != HELLO[..] {
        return Err(Away::Other("it is no rank".into()));
    }
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&hello[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let (rank, of, world) = (number(8), number(16), peers.len() as u64 + 1);
    let version = String::from_utf8_lossy(&hello[24..]);
    let version = version.trim_end_matches('\0');
    let place = usize::try_from(rank).ok().and_then(|rank| peers.get_mut(rank.checked_sub(1)?));
    let away = match place {
        _ if version != VERSION => {
            let version = version.escape_debug();
            Away::Version(format!("rank {rank} is of qwen35rs {version}, rank 0 of qwen35rs {VERSION}"))
        }
        _ if of != world => Away::Other(format!("it is rank {rank} of {of} ranks, and rank 0 is of {world}")),
        // One that came before and has ended leaves its place.
        Some(place) if place.as_ref().is_none_or(has_ended) => {
            write(&mut stream, EXCHANGE, &[])?;
            // What it said may have waited here longer than it did.
            let [HERE] = read_within(&mut stream, GREETING)? else {
                return Err(Away::Other("it is no rank".into()));
            };
            // Who does not hear this has not met, and comes again.
            write(&mut stream, EXCHANGE, &[])?;
            *place = Some(stream);
            return Ok(());
        }
        Some(_) => Away::Other(format!("two processes say that they are rank {rank}")),
        None => Away::Other(format!("a process says that it is rank {rank} of {world}, beside rank 0")),
    };
    let (Away::Version(why) | Away::Other(why)) = &away;
    write(&mut stream, FAILED, &[why.as_bytes()])?;
    Err(away)
}

/// The error of ranks that were not started as one.
fn unlike(why: String) -> Error {
    let advice = "start each rank once, all with the same qwen35rs and the same number of ranks";
    Error::Ranks { what: why, advice: advice.into() }
}

/// Whether the other end of a connection is gone, or says that it ends; not where it has said something else before.
fn has_ended(stream: &TcpStream) -> bool {
    matches!(next_kind(stream), Err(_) | Ok(Some(ENDED | FAILED)))
}

/// The connection to rank 0.
fn visit(meeting: &Meeting, wait: impl Fn(&str) -> Result<()>) -> Result<TcpStream> {
    let Meeting { rank, world, address, .. } = meeting;
    let hello = hello(*rank, *world, VERSION);
    loop {
        let failed = match connect(address, &hello) {
            Ok((EXCHANGE, _, stream)) => return Ok(stream),
            Ok((FAILED, why, _)) => return Err(unlike(String::from_utf8_lossy(&why).into_owned())),
            Ok(_) => "what listens there does not answer as a rank".to_string(),
            Err(e) => e.to_string(),
        };
        wait(&format!("rank 0 is not to be reached at {address} ({failed})"))?;
        std::thread::sleep(RETRY);
    }
}

/// What rank `rank` of `world` says first.
pub(super) fn hello(rank: usize, world: usize, version: &str) -> Vec<u8> {
    let numbers = [rank as u64, world as u64].map(u64::to_le_bytes).concat();
    let mut hello = [&HELLO[..], &numbers, version.as_bytes()].concat();
    hello.resize(HELLO_LEN, 0);
    hello
}

/// What is answered at `address`, and the connection: rank 0 has given this one its place where it is an exchange.
fn connect(address: &str, hello: &[u8]) -> std::io::Result<(u8, Vec<u8>, TcpStream)> {
    let mut last = std::io::Error::from(ErrorKind::NotFound);
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, ANSWER) {
            Ok(mut stream) => {
                stream.set_nodelay(true)?;
                stream.set_write_timeout(Some(ANSWER))?;
                stream.write_all(hello)?;
                let (kind, len) = head(read_within::<HEAD_LEN>(&mut stream, ANSWER)?);
                let mut answer = Vec::new();
                if len <= MAX_ANSWER {
                    (&mut stream).take(len).read_to_end(&mut answer)?;
                }
                // What is longer, or ends before its end, is no answer.
                let mut kind = if answer.len() as u64 == len { kind } else { 0 };
                if kind == EXCHANGE {
                    stream.write_all(&[HERE])?;
                    (kind, _) = head(read_within(&mut stream, ANSWER)?);
                }
                return Ok((kind, answer, stream));
            }
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// The next `N` bytes, all of which come within this time.
fn read_within<const N: usize>(stream: &mut TcpStream, time: Duration) -> std::io::Result<[u8; N]> {
    let deadline = Instant::now() + time;
    let (mut bytes, mut have) = ([0; N], 0);
    while have < N {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut bytes[have..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => have += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Err(ErrorKind::TimedOut.into()),
            Err(e) => return Err(e),
        }
    }
    Ok(bytes)
}
