//! Ranks: devices that share a model, each with its part of the weights (`config::Shard`), one thread or one process each.
//! Rank 0 schedules; the others do what it orders. Here is how they talk: small things, over the host. What devices add up
//! among themselves is the backend's.

mod collectives;
mod meet;
mod tcp;
mod threads;
mod waiting;

use std::sync::Arc;
use std::time::Duration;

pub use collectives::Collectives;
pub use meet::Meeting;
pub use tcp::Tcp;
pub use threads::Threads;
pub use waiting::{Poll, patience};

use crate::{Error, Result};

/// How long ranks wait for each other in a step, unless the user says otherwise ([`patience`]).
pub const PATIENCE: Duration = Duration::from_secs(60);

/// CUDA devices that share a model at most.
pub const MAX_CARDS: usize = 8;

/// The ranks of a model, as one of them sees them.
pub trait Group: Send + Sync {
    /// Counted from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn world(&self) -> usize;

    /// Gives every rank what each gave, in the order of ranks. All call it, and it waits for all: no longer than a step
    /// may take, or, `unhurried`, as long as those that have not come yet give signs of life.
    ///
    /// # Errors
    /// [`Error::Ranks`] where a rank has ended, failed or kept the others waiting. No call succeeds afterwards. What the
    /// [`Poll`] of an unhurried wait returned.
    fn exchange(&self, mine: &[u8], unhurried: bool) -> Result<Vec<Arc<[u8]>>>;

    /// Sends an order to every other rank. For rank 0.
    ///
    /// # Errors
    /// As [`Group::exchange`].
    fn send(&self, order: &[u8]) -> Result<()>;

    /// Waits for an order of rank 0; `None` once it has ended. For the others.
    ///
    /// # Errors
    /// As [`Group::exchange`].
    fn receive(&self) -> Result<Option<Arc<[u8]>>>;

    /// Says, without waiting, whether the ranks have lost each other.
    ///
    /// # Errors
    /// As [`Group::exchange`].
    fn check(&self) -> Result<()>;

    /// Ends what any rank waits for, with this error.
    fn fail(&self, why: &str);

    /// Says that rank 0 has ended, before all that it holds is given back. For rank 0; dropping does it too.
    fn end(&self);
}

/// The error of ranks that lost each other.
pub(crate) fn lost(what: impl Into<String>) -> Error {
    Error::Ranks { what: what.into(), advice: "the model is lost; start all ranks again".into() }
}

/// The smallest of what the ranks have, where they have any.
///
/// # Errors
/// As [`Group::exchange`].
pub fn least(group: &dyn Group, mine: Option<usize>) -> Result<Option<usize>> {
    let bytes = mine.map_or(u64::MAX, |n| n as u64).to_le_bytes();
    let all = group.exchange(&bytes, true)?;
    let numbers = all.iter().filter_map(|bytes| Some(u64::from_le_bytes(bytes.as_ref().try_into().ok()?)));
    Ok(numbers.min().filter(|&n| n != u64::MAX).map(|n| n as usize))
}

/// What the ranks of this host have together, by what each has.
///
/// # Errors
/// As [`Group::exchange`].
pub fn sum_of_host(group: &dyn Group, host: &str, mine: u64) -> Result<u64> {
    let all = group.exchange(&[&mine.to_le_bytes(), host.as_bytes()].concat(), true)?;
    let here = all.iter().filter_map(|bytes| {
        let (number, other) = bytes.split_first_chunk()?;
        (other == host.as_bytes()).then(|| u64::from_le_bytes(*number))
    });
    Ok(here.fold(0, u64::saturating_add))
}

/// Sees that all ranks were started alike: each names its things, in the same order.
///
/// # Errors
/// [`Error::Ranks`] naming the first thing that differs, and both values.
pub fn agree(group: &dyn Group, things: &[(String, String)]) -> Result<()> {
    let text = |things: &[(String, String)]| {
        things.iter().map(|(name, value)| format!("{name}\0{value}")).collect::<Vec<_>>().join("\x01")
    };
    let all = group.exchange(text(things).as_bytes(), true)?;
    let first: Vec<&str> = std::str::from_utf8(&all[0]).unwrap_or_default().split('\x01').collect();
    for (rank, other) in all.iter().enumerate().skip(1) {
        let other: Vec<&str> = std::str::from_utf8(other).unwrap_or_default().split('\x01').collect();
        if let Some((a, b)) = first.iter().zip(&other).find(|(a, b)| a != b) {
            let (name, a) = a.split_once('\0').unwrap_or((a, ""));
            let b = b.split_once('\0').map_or(*b, |b| b.1);
            return Err(Error::Ranks {
                what: format!("{name}: rank 0 has {a}, rank {rank} has {b}"),
                advice: "start all ranks with the same qwen35rs, checkpoint and arguments".into(),
            });
        }
        if first.len() != other.len() {
            return Err(lost(format!("rank {rank} is another version of qwen35rs")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
