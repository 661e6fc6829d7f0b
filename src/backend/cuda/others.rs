//! The other ranks of a step, and which way their cards add up: in memory that all address, or by NCCL. All ranks go the
//! same way, since they choose by what all have told each other.

use std::ffi::c_int;
use std::path::PathBuf;
use std::sync::Arc;

use super::buffers::{Buf, Vector};
use super::device::Device;
use super::nccl::Nccl;
use super::peers::{Card, Peers, shared};
use super::{Cuda, ffi};
use crate::ranks::{Collectives, Group};
use crate::{Error, Result};

/// A rank of several.
pub(super) struct Ranks {
    pub group: Arc<dyn Group>,
    collectives: Collectives,
    /// Where NCCL's wheel may be.
    folders: Vec<PathBuf>,
}

/// The others, as this rank adds up with them.
pub(super) enum Others {
    Direct(Box<Peers>),
    Nccl(Nccl),
}

/// What a step sums and gathers at most.
pub(super) struct Largest {
    pub rows: usize,
    pub width: usize,
    pub gather_bytes: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Direct,
    Nccl,
}

const ADVICE: &str = "allowed: ranks on one host whose cards address each other's memory (QWEN35RS_COLLECTIVES=direct), or \
    a card for each rank (nccl), or what is better of the two (auto)";

/// The ways that are there, the better first.
fn ways(cards: &[Card], wish: Collectives, deterministic: bool) -> Result<Vec<Way>> {
    let world = cards.len();
    let hosts = cards.iter().position(|card| card.host() != cards[0].host());
    let not_direct = match hosts {
        Some(rank) => {
            Some(format!("rank 0 is on {}, rank {rank} on {}", cards[0].host(), cards[rank].host()))
        }
        None if world > ffi::MAX_RANKS => {
            Some(format!("{world} ranks: more than {} do not address each other", ffi::MAX_RANKS))
        }
        None => None,
    };
    let not_nccl = match shared(cards) {
        Some((a, b)) => Some(format!("ranks {a} and {b} have one card, and NCCL wants one for each")),
        // Two are added up in one way only.
        None if deterministic && world > 2 => {
            Some(format!("deterministic=True: the order of NCCL's sums over {world} ranks follows the batch"))
        }
        None => None,
    };
    let ways = [(Way::Direct, not_direct, Collectives::Nccl), (Way::Nccl, not_nccl, Collectives::Direct)];
    let (mut there, mut reasons) = (Vec::new(), Vec::new());
    for (way, why, refused_by) in ways {
        match why {
            _ if wish == refused_by => {}
            None => there.push(way),
            Some(why) => reasons.push(why),
        }
    }
    if there.is_empty() { Err(unreachable(&reasons)) } else { Ok(there) }
}

/// Whether the driver loads a library's kernels for the cards of several ranks when the first of them wants one: then it waits
/// for cards that wait for that rank.
fn loads_for_all(cards: &[Card], rank: usize) -> bool {
    let at_once = std::env::var("CUDA_MODULE_LOADING").is_ok_and(|mode| mode.eq_ignore_ascii_case("EAGER"));
    let same = cards.iter().filter(|card| card.process == cards[rank].process).count();
    at_once && same > 1 && shared(cards).is_none()
}

fn unreachable(reasons: &[String]) -> Error {
    Error::Cuda { what: reasons.join("; "), advice: ADVICE.into() }
}

impl Ranks {
    /// Meets the others. `loads_kernels` is as [`Peers::join`] has it.
    ///
    /// # Errors
    /// [`Error::Cuda`] for cards that cannot add up as the user wishes, or at all, and where NCCL is wanted and not
    /// installed; [`Error::Request`] for ranks that would wait for each other's kernels to be loaded; [`Error::OutOfMemory`]; as
    /// [`Group::exchange`].
    pub fn join(
        &self,
        device: &Arc<Device>,
        deterministic: bool,
        loads_kernels: bool,
        largest: &Largest,
    ) -> Result<Others> {
        let &Largest { rows, width, gather_bytes } = largest;
        let group = &self.group;
        if device.is_imagined() {
            let rank = (group.rank(), group.world());
            return Ok(Others::Direct(Box::new(Peers::imagine(device, rank, width, gather_bytes)?)));
        }
        device.bind()?;
        let cards = Card::new(device)?.exchange(group.as_ref())?;
        if loads_kernels && loads_for_all(&cards, group.rank()) {
            let allowed = "LAZY, which is the default; a process for each rank; or deterministic=True";
            return Err(Error::request("CUDA_MODULE_LOADING", "EAGER, with ranks that are threads", allowed));
        }
        let mut reasons = Vec::new();
        for way in ways(&cards, self.collectives, deterministic)? {
            match way {
                Way::Direct => {
                    match Peers::join(device, group, &cards, width, gather_bytes, loads_kernels)? {
                        Ok(peers) => return Ok(Others::Direct(Box::new(peers))),
                        Err(why) => reasons.push(why),
                    }
                }
                Way::Nccl => {
                    return Ok(Others::Nccl(Nccl::join(device, group.as_ref(), &self.folders, rows, width)?));
                }
            }
        }
        Err(unreachable(&reasons))
    }
}

impl Others {
    /// Sends what the others' state is to the host, on the stream.
    pub fn send(&mut self) -> Result<()> {
        match self {
            Self::Direct(peers) => peers.send(),
            // The host hears of it by itself.
            Self::Nccl(_) => Ok(()),
        }
    }

    /// Ends what waits for another rank.
    pub fn give_up(&self) {
        match self {
            // Its kernels do so by themselves, after a while.
            Self::Direct(_) => {}
            Self::Nccl(nccl) => nccl.give_up(),
        }
    }

    /// Says whether a rank was lost, by the last state that has come.
    ///
    /// # Errors
    /// [`Error::Ranks`]
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Direct(peers) => peers.check(),
            Self::Nccl(nccl) => nccl.check(),
        }
    }

    /// The same of everything that was launched.
    ///
    /// # Errors
    /// As [`Others::check`].
    pub fn check_all(&mut self) -> Result<()> {
        match self {
            Self::Direct(peers) => peers.check_all(),
            Self::Nccl(nccl) => nccl.check_all(),
        }
    }
}

impl Cuda {
    /// Why a rank was lost: what the ranks have told each other, where they have, and not that they wait in vain.
    pub(super) fn why_lost(&self, error: Error) -> Error {
        self.ranks.as_ref().and_then(|ranks| ranks.group.check().err()).unwrap_or(error)
    }

    /// Sees, at the end of everything that was launched, whether a rank was lost; `check` says it.
    pub(super) fn check_others(&self) {
        if self.ranks.is_some() {
            self.launch("asking for the ranks' status", 1, |step, _| {
                let asked = step.others.as_mut().map_or(Ok(()), Others::check_all);
                asked.map_err(|error| self.why_lost(error)).map(|()| 0)
            });
        }
    }

    /// One of several ranks, which add up as `collectives` says; `folders` are searched for NCCL's wheel.
    #[must_use]
    pub fn among(mut self, group: Arc<dyn Group>, collectives: Collectives, folders: Vec<PathBuf>) -> Self {
        self.ranks = Some(Ranks { group, collectives, folders });
        self
    }

    /// Whether this is a rank of several whose cards address each other's memory.
    pub(super) fn adds_up_directly(&self) -> bool {
        let state = self.state();
        matches!(state.step.as_ref().and_then(|step| step.others.as_ref()), Some(Others::Direct(_)))
    }

    /// Runs what all ranks run, where there are several.
    fn together(&self, name: &str, n: usize, call: impl FnOnce(&mut Others, ffi::Stream) -> Result<c_int>) {
        self.launch(name, n, |step, stream| match &mut step.others {
            Some(others) => call(others, stream),
            None => Err(Error::Internal(format!("{name} without other ranks"))),
        });
    }

    /// As [`crate::backend::Backend::all_reduce`].
    pub(super) fn sum(&self, n: usize, x: &Buf) {
        let at = x.memory.ptr::<ffi::Bf16>();
        self.together("all_reduce", n, |others, stream| match others {
            Others::Direct(peers) => {
                let (rows, width) = (n as c_int, x.width as c_int);
                // SAFETY: shapes are those of the trait, no wider than what the ranks have met for.
                Ok(unsafe { ffi::q35_all_reduce(stream, peers.at(), rows, width, at, at) })
            }
            // SAFETY: as above.
            Others::Nccl(nccl) => unsafe { nccl.all_reduce(stream, at, n * x.width) }.map(|()| 0),
        });
    }

    /// As [`crate::backend::Backend::all_reduce_norm`].
    pub(super) fn sum_norm(&self, n: usize, delta: &Buf, residual: &Buf, w: &Vector, eps: f32, out: &Buf) {
        let (rows, width) = (n as c_int, residual.width as c_int);
        let at = delta.memory.ptr::<ffi::Bf16>();
        let (residual, w, out) = (residual.memory.ptr(), w.0.ptr(), out.memory.ptr());
        self.together("all_reduce_norm", n, |others, stream| match others {
            // SAFETY: as above.
            Others::Direct(peers) => Ok(unsafe {
                ffi::q35_all_reduce_norm(stream, peers.at(), rows, width, at, residual, w, eps, out)
            }),
            // SAFETY: as above.
            Others::Nccl(nccl) => unsafe {
                nccl.all_reduce(stream, at, n * delta.width)?;
                Ok(ffi::q35_rmsnorm_residual(stream, rows, width, at, residual, w, eps, out))
            },
        });
    }

    /// As [`crate::backend::Backend::all_gather`].
    pub(super) fn gather_parts(&self, n: usize, part: &Buf, out: &Buf) {
        let from = part.memory.ptr::<f32>();
        self.together("all_gather", n, |others, stream| match others {
            Others::Direct(peers) => {
                let (rows, width) = (n as c_int, part.width as c_int);
                // SAFETY: as above.
                match unsafe { ffi::q35_gather_columns(stream, peers.at(), rows, width, from.cast()) } {
                    0 => {
                        let bytes = n * out.row_bytes();
                        out.memory.copy(0, peers.region(), ffi::GATHERED_AT, bytes).map(|()| 0)
                    }
                    code => Ok(code),
                }
            }
            Others::Nccl(nccl) => {
                debug_assert!(out.width.is_multiple_of(part.width));
                // SAFETY: as above; `out` has a part of each rank.
                unsafe {
                    nccl.all_gather(stream, n, part.width, out.width / part.width, from, out.memory.ptr())
                }
                .map(|()| 0)
            }
        });
    }
}

#[cfg(test)]
#[path = "others_tests.rs"]
mod tests;
