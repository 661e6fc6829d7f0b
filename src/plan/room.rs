//! What a card has for sequences beside a rank's weights, and how many fit: the same sums that an engine does when it makes
//! its memory (`Engine::new`), with what its buffers take assumed.

use super::{PlanOptions, cache_bytes};
use crate::backend::KvCache;
use crate::batch::PAGE_LEN;
use crate::cache::pages_for;
use crate::config::ModelConfig;

pub(super) const GIB: f64 = (1u64 << 30) as f64;
/// Bytes of the buffers that are there for each sequence's token of a step; up to 0.4 MiB in the family.
const BUFFERS_PER_SEQ: f64 = 0.5 * (1u64 << 20) as f64;

/// Bytes of a card that are for sequences, and what these take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    /// Of what weights and buffers leave, the share that may be used.
    pub free: f64,
    /// A page of keys and values, in all layers.
    page: f64,
    /// The states of a sequence, and its buffers.
    slot: f64,
    /// Where pages are in fp8: what prompts are decoded to, for each token of the longest sequence.
    decoded: f64,
    /// What that may be at most.
    longest: usize,
    max_context: usize,
}

impl Room {
    /// Of so many bytes that weights and buffers leave; `config` is the rank's.
    pub fn new(left: f64, config: &ModelConfig, options: &PlanOptions) -> Self {
        let (cache, caches) = (cache_bytes(config), options.caches());
        let (kv, mtp_kv) = cache.kv(caches);
        let kv = kv + if options.with_mtp { mtp_kv } else { 0 };
        let width = config.attention.kv_width();
        Room {
            free: left * options.memory_utilization,
            page: (kv * PAGE_LEN as u64) as f64,
            slot: cache.state_per_seq(caches) as f64 + BUFFERS_PER_SEQ,
            decoded: if caches.kv == KvCache::Fp8 { (2 * 2 * width) as f64 } else { 0.0 },
            longest: options.max_model_len.unwrap_or(config.max_context()),
            max_context: config.max_context(),
        }
    }

    /// What a sequence of so many tokens takes.
    pub fn of_seq(&self, context: usize) -> f64 {
        self.slot + self.page * pages_for(context) as f64
    }

    /// What so many slots leave for pages.
    fn for_pages(&self, num_slots: usize) -> f64 {
        let left = (self.free - self.slot * num_slots as f64).max(0.0);
        // The longest sequence is as long as what is left, unless something says how long it is.
        let longest = (self.longest as f64).min(left / self.page * PAGE_LEN as f64);
        left - self.decoded * longest
    }

    /// The longest sequence where there are so many slots; 0 where none fits.
    pub fn max_context(&self, num_slots: usize) -> usize {
        // A float to integer cast saturates, and turns what is below zero into zero.
        let pages = (self.for_pages(num_slots) / self.page).floor() as usize;
        pages.saturating_mul(PAGE_LEN).min(self.max_context)
    }

    /// Sequences of so many tokens that fit at once.
    pub fn max_seqs(&self, context: usize) -> usize {
        let pages = self.page * pages_for(context) as f64;
        let fits = |&num: &usize| self.for_pages(num) >= pages * num as f64;
        let most = (self.free / self.of_seq(context)).floor() as usize;
        (1..=most).rev().find(fits).unwrap_or(0)
    }
}
