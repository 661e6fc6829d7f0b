//! How much of the context an engine has pages for.

use super::{EngineLimits, KV_CACHE_BYTES};
use crate::batch::{CHUNK_LEN, PAGE_LEN};
use crate::cache::pages_for;
use crate::{Error, Result};

/// The longest sequence where nothing says how long it is, and hardly anything is left for it.
const LEAST_LEN: usize = 16_384;

/// Bytes of a device that are for pages, slots and buffers.
#[derive(Clone, Copy)]
pub(super) struct Budget {
    /// All of them.
    pub bytes: usize,
    /// Of a slot.
    pub slot_bytes: usize,
    /// Of the buffers that are there.
    pub buffers: usize,
}

impl Budget {
    /// What so many slots leave for pages.
    fn left(&self, num_slots: usize) -> usize {
        let slots = self.slot_bytes.saturating_mul(num_slots);
        self.bytes.saturating_sub(slots.saturating_add(self.buffers))
    }

    /// Slots that leave so many bytes for pages.
    fn slots_beside(&self, pages: usize) -> usize {
        let left = self.bytes.saturating_sub(self.buffers).saturating_sub(pages);
        left.checked_div(self.slot_bytes).unwrap_or(0)
    }
}

pub(super) struct Pages {
    pub max_model_len: usize,
    pub num_pages: usize,
}

impl Pages {
    /// As many pages as every slot could use, within `kv_cache_bytes`, or within what a device has for them.
    pub fn fit(
        limits: &EngineLimits,
        context: usize,
        page_bytes: usize,
        budget: Option<Budget>,
    ) -> Result<Self> {
        let left = budget.map(|budget| budget.left(limits.max_num_seqs));
        let bytes = limits.kv_cache_bytes.or(left).unwrap_or(KV_CACHE_BYTES);
        let affordable = bytes.checked_div(page_bytes).map_or(context, |pages| pages * PAGE_LEN);
        let raise = if budget.is_some() { "gpu_memory_utilization" } else { "kv_cache_bytes" };
        let needed = pages_for(limits.max_model_len.unwrap_or(1)).saturating_mul(page_bytes);
        // Fewer slots may leave enough.
        let fewer = budget.map_or(0, |budget| budget.slots_beside(needed)).min(limits.max_num_seqs);
        let fewer = (fewer > 0).then(|| format!("max_num_seqs to {fewer}"));
        let max_model_len = match limits.max_model_len {
            _ if affordable == 0 => {
                let len = if limits.max_model_len.is_some() { "max_model_len, " } else { "" };
                let lower = fewer.unwrap_or_else(|| format!("{len}max_num_seqs or max_num_batched_tokens"));
                return Err(Error::OutOfMemory {
                    what: format!("{bytes} bytes are left for keys and values; a page needs {page_bytes}"),
                    advice: format!("lower {lower}, or raise {raise}"),
                });
            }
            Some(len) if pages_for(len) * PAGE_LEN > affordable => {
                let fewer = fewer.map(|fewer| format!(", {fewer}")).unwrap_or_default();
                return Err(Error::OutOfMemory {
                    what: format!(
                        "keys and values of one sequence of {len} tokens need {needed} bytes; {bytes} are left"
                    ),
                    advice: format!("lower max_model_len to {affordable}{fewer}, or raise {raise}"),
                });
            }
            Some(len) => len,
            None => context.min(affordable),
        };
        let wanted = pages_for(max_model_len).saturating_mul(limits.max_num_seqs);
        let num_pages = wanted.min(affordable.max(max_model_len.next_multiple_of(PAGE_LEN)) / PAGE_LEN);
        Ok(Self { max_model_len, num_pages })
    }

    /// Those of one sequence, where there is no room for more: about as long as what its buffers would leave.
    pub fn least(limits: &EngineLimits, context: usize) -> Self {
        let max_model_len = limits.max_model_len.unwrap_or(LEAST_LEN).min(context);
        Self { max_model_len, num_pages: pages_for(max_model_len) }
    }
}

pub(super) fn at_least(field: &str, found: usize, min: usize) -> Result<()> {
    if found >= min { Ok(()) } else { Err(Error::request(field, found, format!("at least {min}"))) }
}

impl EngineLimits {
    /// Sees that they can be, as far as that can be said of a model of so long a context before it is loaded.
    ///
    /// # Errors
    /// [`Error::Request`] naming the first that cannot.
    pub fn check(&self, context: usize) -> Result<()> {
        at_least("max_num_seqs", self.max_num_seqs, 1)?;
        at_least("max_num_batched_tokens", self.max_num_batched_tokens, CHUNK_LEN)?;
        let utilization = self.gpu_memory_utilization;
        if !(utilization > 0.0 && utilization <= 1.0) {
            return Err(Error::request("gpu_memory_utilization", utilization, "above 0 and at most 1"));
        }
        let allowed = match self.max_model_len {
            Some(len) if len < 2 => format!("2 to {context}"),
            Some(len) if len > context => format!("2 to {context}, the context the checkpoint declares"),
            _ => return Ok(()),
        };
        Err(Error::request("max_model_len", self.max_model_len.unwrap_or_default(), allowed))
    }
}
