//! Ranks that add up among themselves: a region of memory on every rank's card, which all ranks address over NVLink or PCIe,
//! or, where several ranks have one card, in its memory.

use std::ffi::{c_char, c_int, c_uint};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use cudarc::driver::result;
use cudarc::driver::sys;

use super::device::{Device, Memory, Pinned, failed};
use super::ffi;
use crate::ranks::{Group, MAX_CARDS, PATIENCE};
use crate::{Error, Result};

/// How long a rank waits for another inside a kernel: less than the host would, which then knows why.
const WAIT: Duration = PATIENCE.checked_sub(Duration::from_secs(30)).expect("less than it");
/// Blocks of a sum, where ranks have cards of their own, and where they share one.
const CHANNELS: [i32; 2] = [64, 8];
const _: () = assert!(MAX_CARDS == ffi::MAX_RANKS, "cards that there are kernels for");
/// The smallest allocation that another process is given whole.
const MIN_BYTES: usize = 2 << 20;

/// What a rank says of its card, and of its region there.
#[derive(Clone)]
pub(super) struct Card {
    /// Of this process, on this host.
    pub process: String,
    ordinal: usize,
    pub uuid: [u8; 16],
    address: u64,
    handle: [u8; 64],
}

impl Card {
    /// Of this rank, without a region.
    pub fn new(device: &Device) -> Result<Self> {
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: 16 bytes to write to; the card is one that the driver gave.
        let asked = unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, device.ordinal() as c_int) };
        asked.result().map_err(|e| failed("asking a device", e))?;
        Ok(Self::named(process(), device.ordinal(), uuid.bytes.map(|byte| byte as u8)))
    }

    pub(super) fn named(process: String, ordinal: usize, uuid: [u8; 16]) -> Self {
        Self { process, ordinal, uuid, address: 0, handle: [0; 64] }
    }

    /// Those of all ranks.
    pub fn exchange(&self, group: &dyn Group) -> Result<Vec<Self>> {
        let all = group.exchange(&self.to_bytes(), true)?;
        let cards: Option<_> = all.iter().map(|bytes| Self::from_bytes(bytes)).collect();
        cards.ok_or_else(|| crate::ranks::lost("a rank is another version of qwen35rs"))
    }

    fn to_bytes(&self) -> Vec<u8> {
        let numbers = [self.ordinal as u64, self.address].map(u64::to_le_bytes).concat();
        [&numbers[..], &self.uuid, &self.handle, self.process.as_bytes()].concat()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (numbers, rest) = bytes.split_first_chunk::<16>()?;
        let (uuid, rest) = rest.split_first_chunk::<16>()?;
        let (handle, process) = rest.split_first_chunk::<64>()?;
        let number = |at: usize| u64::from_le_bytes(numbers[at..at + 8].try_into().unwrap_or_default());
        Some(Self {
            process: String::from_utf8_lossy(process).into_owned(),
            ordinal: number(0) as usize,
            uuid: *uuid,
            address: number(8),
            handle: *handle,
        })
    }

    pub fn host(&self) -> &str {
        self.process.rsplit_once(' ').map_or("", |(host, _)| host)
    }
}

/// The regions of all ranks, as this one addresses them.
pub(super) struct Peers {
    at: ffi::Peers,
    region: Arc<Memory>,
    status: Memory,
    /// Where the status comes to the host, with the tokens of a step.
    seen: Pinned,
    mappings: Vec<Mapping>,
    /// Regions of other ranks of this process, which are freed when nobody writes to them any more.
    others: Vec<Arc<Memory>>,
    /// The group, where the region is another process's too.
    lent: Option<Weak<dyn Group>>,
}

// SAFETY: the raw pointers are device addresses in memory that it owns or shares, or has mapped.
unsafe impl Send for Peers {}

/// Another process's region, or another card's context, as long as it is used.
enum Mapping {
    Region(sys::CUdeviceptr, Arc<Device>),
    Context(sys::CUdevice),
}

impl Drop for Mapping {
    fn drop(&mut self) {
        match self {
            Mapping::Region(ptr, device) => {
                if device.bind().is_ok() {
                    // SAFETY: opened in `join`; nothing that was launched uses it any more.
                    let _ = unsafe { sys::cuIpcCloseMemHandle(*ptr) };
                }
            }
            // SAFETY: retained in `reach`.
            Mapping::Context(card) => drop(unsafe { result::primary_ctx::release(*card) }),
        }
    }
}

impl Peers {
    /// Opens a region on every rank's card, which are all on this host: rows that are summed are up to `width` wide, and
    /// `gather_bytes` are gathered at once. Where a rank cannot address another's, all of them are told why, and have none.
    /// `loads_kernels`: a library may load some while others run, which on a card that ranks share would wait for a kernel
    /// that waits for it.
    ///
    /// # Errors
    /// [`Error::Request`] for ranks that share a card and load kernels, [`Error::OutOfMemory`]; as [`Group::exchange`].
    pub fn join(
        device: &Arc<Device>,
        group: &Arc<dyn Group>,
        cards: &[Card],
        width: usize,
        gather_bytes: usize,
        loads_kernels: bool,
    ) -> Result<Result<Self, String>> {
        let (rank, world) = (group.rank(), group.world());
        let shares = shared(cards).is_some();
        if shares && loads_kernels {
            let allowed =
                "a card for each rank; or, for tests, deterministic=True and CUDA_MODULE_LOADING=EAGER";
            return Err(Error::request("device", "ranks that share a card", allowed));
        }
        let channels = CHANNELS[usize::from(shares)];
        let [region, status] = memory(device, world, channels, width, gather_bytes)?;
        device.synchronize()?;
        let region = Arc::new(region);
        show(device.ordinal(), &region);
        let several = cards.iter().any(|card| card.process != cards[rank].process);
        let mut own = Card { address: region.at(0), ..cards[rank].clone() };
        let mut why = String::new();
        if several {
            let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
            // SAFETY: the region is an allocation of its own.
            match unsafe { sys::cuIpcGetMemHandle(&mut handle, region.at(0)) }.result() {
                Ok(()) => own.handle = handle.reserved.map(|byte| byte as u8),
                Err(e) => why = reason(failed("sharing memory with another process", e)),
            }
        }
        let (mut regions, mut mappings) = ([std::ptr::null_mut(); ffi::MAX_RANKS], Vec::new());
        let mut others = Vec::new();
        for (other, card) in own.exchange(group.as_ref())?.iter().enumerate() {
            let at = match () {
                () if other == rank => Ok(region.at(0)),
                () if !why.is_empty() => break,
                () if card.process == own.process => reach(device, rank, other, card).and_then(|mapping| {
                    mappings.extend(mapping);
                    others.push(shown(card)?);
                    Ok(card.address)
                }),
                () => open(device, rank, other, card).map(|(at, mapping)| {
                    mappings.push(mapping);
                    at
                }),
            };
            match at {
                Ok(at) => regions[other] = at as *mut _,
                Err(error) => why = reason(error),
            }
        }
        // Before anybody writes to one, all are there.
        let reasons = group.exchange(why.as_bytes(), true)?;
        if let Some(why) = reasons.iter().find(|why| !why.is_empty()) {
            // Before anybody gives one back, nobody has it.
            drop(mappings);
            group.exchange(&[], true)?;
            return Ok(Err(String::from_utf8_lossy(why).into_owned()));
        }
        let at = ffi::Peers {
            rank: rank as i32,
            world: world as i32,
            channels,
            early: (!shares).into(),
            width: width as i32,
            gather_bytes: gather_bytes as i64,
            timeout_ns: WAIT.as_nanos() as i64,
            regions,
            status: status.ptr(),
        };
        let lent = several.then(|| Arc::downgrade(group));
        Ok(Ok(Self { at, region, status, seen: Pinned::new(device, 4)?, mappings, others, lent }))
    }

    /// The regions, for a launcher.
    pub fn at(&self) -> ffi::Peers {
        self.at
    }

    /// This rank's.
    pub fn region(&self) -> &Memory {
        &self.region
    }

    /// What a card that is only imagined would have, each rank having one of its own: nobody is there to be met.
    pub fn imagine(
        device: &Arc<Device>,
        (rank, world): (usize, usize),
        width: usize,
        gather_bytes: usize,
    ) -> Result<Self> {
        let [region, status] = memory(device, world, CHANNELS[0], width, gather_bytes)?;
        let at = ffi::Peers {
            rank: rank as i32,
            world: world as i32,
            channels: CHANNELS[0],
            early: 1,
            width: width as i32,
            gather_bytes: gather_bytes as i64,
            timeout_ns: WAIT.as_nanos() as i64,
            regions: [std::ptr::null_mut(); ffi::MAX_RANKS],
            status: status.ptr(),
        };
        let (mappings, others) = (Vec::new(), Vec::new());
        Ok(Self {
            at,
            region: Arc::new(region),
            status,
            seen: Pinned::new(device, 4)?,
            mappings,
            others,
            lent: None,
        })
    }

    /// Sends the status to the host, on the stream.
    pub fn send(&mut self) -> Result<()> {
        self.status.send(&mut self.seen, 4)
    }

    /// Says which rank was waited for in vain, by the last status that has come.
    pub fn check(&self) -> Result<()> {
        // SAFETY: four bytes of page-locked memory, aligned; a later status may be on its way.
        match unsafe { self.seen.as_slice().as_ptr().cast::<i32>().read_volatile() } {
            0 => Ok(()),
            lost => {
                let what = format!("rank {} kept rank {} waiting for {WAIT:?}", lost - 1, self.at.rank);
                Err(crate::ranks::lost(what))
            }
        }
    }

    /// The same of everything that was launched.
    pub fn check_all(&mut self) -> Result<()> {
        self.send()?;
        self.seen.wait()?;
        self.check()
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        // Whatever still runs here uses the other ranks' regions.
        drop(self.region.wait());
        self.mappings.clear();
        self.others.clear();
        // Where all end in order, nobody writes any more. Where they lost each other, a process that does not know it yet may:
        // then the region is kept as long as this one lives.
        let failed = |group: &Weak<dyn Group>| group.upgrade().is_none_or(|group| group.check().is_err());
        if self.lent.as_ref().is_some_and(failed) {
            std::mem::forget(Arc::clone(&self.region));
        }
    }
}

/// A rank's region, and its status.
fn memory(
    device: &Arc<Device>,
    world: usize,
    channels: i32,
    width: usize,
    gather_bytes: usize,
) -> Result<[Memory; 2]> {
    // SAFETY: only computes.
    let bytes = unsafe { ffi::q35_peer_bytes(world as c_int, channels, width as c_int, gather_bytes as i64) };
    let bytes = usize::try_from(bytes).ok().map(|bytes| bytes.max(MIN_BYTES));
    let what = "sums over ranks";
    Ok([device.zeros(bytes, what)?, device.zeros(Some(4), what)?])
}

/// Which process this is, among those of all hosts: the host's name and boot, then the process, by a name of its own, since
/// containers count theirs from 1.
fn process() -> String {
    static OWN: OnceLock<String> = OnceLock::new();
    let line = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_string();
    let (name, boot) = (line("/proc/sys/kernel/hostname"), line("/proc/sys/kernel/random/boot_id"));
    let own = OWN.get_or_init(|| line("/proc/sys/kernel/random/uuid"));
    format!("{name}/{boot} {}-{own}", std::process::id())
}

/// The regions of this process's ranks, by card and address.
static SHOWN: Mutex<Vec<(usize, Weak<Memory>)>> = Mutex::new(Vec::new());

/// Lets the ranks of this process find a region.
fn show(ordinal: usize, region: &Arc<Memory>) {
    let mut all = SHOWN.lock().unwrap_or_else(PoisonError::into_inner);
    all.retain(|(_, region)| region.strong_count() > 0);
    all.push((ordinal, Arc::downgrade(region)));
}

/// The region of another rank of this process.
fn shown(card: &Card) -> Result<Arc<Memory>> {
    let all = SHOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let of_card = all.iter().filter(|(ordinal, _)| *ordinal == card.ordinal);
    let mut regions = of_card.filter_map(|(_, region)| region.upgrade());
    let found = regions.find(|region| region.at(0) == card.address);
    found.ok_or_else(|| Error::Internal("another rank's memory is not where it says".into()))
}

/// What an error says, without the advice.
fn reason(error: Error) -> String {
    match error {
        Error::Cuda { what, .. } => what,
        other => other.to_string(),
    }
}

/// Two ranks that have one card, if any do.
pub(super) fn shared(cards: &[Card]) -> Option<(usize, usize)> {
    let mut pairs = (0..cards.len()).flat_map(|b| (0..b).map(move |a| (a, b)));
    pairs.find(|&(a, b)| cards[a].uuid == cards[b].uuid)
}

/// Sees that a card of this process is within reach.
fn reach(device: &Arc<Device>, rank: usize, other: usize, card: &Card) -> Result<Option<Mapping>> {
    if card.ordinal == device.ordinal() {
        return Ok(None);
    }
    let (here, there) = (device.ordinal() as c_int, card.ordinal as c_int);
    let mut can = 0;
    // SAFETY: cards that the driver gave.
    unsafe { sys::cuDeviceCanAccessPeer(&mut can, here, there) }
        .result()
        .map_err(|e| failed("asking for access to another card", e))?;
    if can == 0 {
        return Err(Error::Cuda {
            what: format!(
                "cuda:{here} (rank {rank}) cannot address the memory of cuda:{there} (rank {other})"
            ),
            advice: "allowed: cards that can, over NVLink or PCIe (nvidia-smi topo -p2p r)".into(),
        });
    }
    // SAFETY: released when the mapping is dropped.
    let context = unsafe { result::primary_ctx::retain(there) }
        .map_err(|e| failed("opening another rank's card", e))?;
    let mapping = Mapping::Context(there);
    device.bind()?;
    // SAFETY: both contexts live.
    match unsafe { sys::cuCtxEnablePeerAccess(context, 0 as c_uint) } {
        sys::CUresult::CUDA_SUCCESS | sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => {
            Ok(Some(mapping))
        }
        error => Err(failed("getting access to another card", result::DriverError(error))),
    }
}

/// The region of another process of this host.
fn open(device: &Arc<Device>, rank: usize, other: usize, card: &Card) -> Result<(sys::CUdeviceptr, Mapping)> {
    let handle = sys::CUipcMemHandle { reserved: card.handle.map(|byte| byte as c_char) };
    let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as c_uint;
    let mut ptr = 0;
    device.bind()?;
    // SAFETY: a handle that the other process got for memory that it keeps until no rank writes to it. In order, processes
    // free theirs when they have closed the others', not when the others have closed theirs.
    unsafe { sys::cuIpcOpenMemHandle_v2(&mut ptr, handle, flags) }
        .result()
        .map_err(|e| failed(&format!("rank {rank} opening the memory of rank {other}"), e))?;
    Ok((ptr, Mapping::Region(ptr, Arc::clone(device))))
}
