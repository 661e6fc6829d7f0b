//! The geometry of one rank's part of a model, where several devices share it: tensor parallel, with experts cut or
//! whole (Shoeybi et al. 2019, Megatron-LM; Lepikhin et al. 2020, GShard). Pure arithmetic: which tensors go where is
//! `src/weights/shard.rs`.
//!
//! ```text
//! delta layers    key heads and their value heads / world
//! attention       query heads / world; key-value heads / world, or the one that a rank's queries read
//! dense, shared   width / world
//! experts         width / world, or with expert_parallel num_experts / world of them whole
//! head            rows / world where that is a multiple of 4, else whole
//! embedding, norms, router, gate of the shared expert    whole
//! ```

use std::ops::Range;

use super::{FfnConfig, LayerKind, ModelConfig, QuantConfig};
use crate::{Error, Result};

/// Inputs that kernels of 4-bit codes take at a time: no cut of a matrix that may have them is finer, unless a rank's
/// part is smaller.
const CODES: usize = 64;
/// Logits that the kernel which gathers those of all ranks takes at a time.
const GATHERED: usize = 4;
/// Sizes that an error lists at most.
const MAX_LISTED: usize = 1 << 10;

/// Which part of a model a rank holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// Counted from 0.
    pub rank: usize,
    /// Ranks that share a model.
    pub world: usize,
    /// Whether a rank holds some experts whole, and not a slice of each.
    pub expert_parallel: bool,
}

impl Shard {
    /// The only rank.
    pub const fn whole() -> Self {
        Shard { rank: 0, world: 1, expert_parallel: false }
    }

    /// Rank 0 of so many, from what a user asked for.
    ///
    /// # Errors
    /// `Request` for no ranks, and for experts of one rank.
    pub fn first(world: usize, expert_parallel: bool) -> Result<Self> {
        if world == 0 {
            return Err(Error::request("tensor_parallel_size", 0, "at least 1"));
        }
        if expert_parallel && world == 1 {
            let allowed = "False, or a tensor_parallel_size of at least 2";
            return Err(Error::request("expert_parallel", "True with one rank", allowed));
        }
        Ok(Shard { rank: 0, world, expert_parallel })
    }

    /// Whether the rank holds all of the model.
    pub fn is_whole(self) -> bool {
        self.world == 1
    }

    /// The routed experts that it holds, of all or of a slice of each: which rows of the router, and in that order.
    pub fn experts(self, num_experts: usize) -> Range<usize> {
        if self.expert_parallel { self.part(num_experts, num_experts / self.world) } else { 0..num_experts }
    }

    /// The rows of the head that it holds: all of them where they do not divide into parts that can be gathered.
    pub fn head_rows(self, vocab: usize) -> Range<usize> {
        let divides = vocab.is_multiple_of(self.world.saturating_mul(GATHERED));
        if divides { self.part(vocab, vocab / self.world) } else { 0..vocab }
    }

    /// The key-value heads that it holds: of fewer than there are ranks the one that its query heads read.
    pub fn kv_heads(self, num_kv_heads: usize) -> Range<usize> {
        let first = self.rank * num_kv_heads / self.world;
        first..first + (num_kv_heads / self.world).max(1)
    }

    /// Its share of `size` things where each rank has room for `local`: the last ranks may have fewer, or none.
    pub(crate) fn part(self, size: usize, local: usize) -> Range<usize> {
        let start = self.rank.saturating_mul(local).min(size);
        start..start.saturating_add(local).min(size)
    }
}

impl ModelConfig {
    /// The geometry of one rank's part. The sizes of the vocabulary and `num_experts` stay those of the whole model:
    /// every rank has the whole embedding and the whole router ([`Shard::head_rows`] and [`Shard::experts`] say what
    /// it has of the head and of the experts).
    ///
    /// Widths of feed-forward blocks are divided, and rounded up to whole blocks of the formats that the
    /// configuration allows where a cut would fall into one; what is then past the whole width is zeros, at the last
    /// ranks. So all ranks have the same geometry.
    ///
    /// # Errors
    /// `Request` where the model does not divide so, naming `tensor_parallel_size`, the sizes that would do, and
    /// what has to divide; where `rank` is none of the `world`; where experts that a model has not are to be shared out.
    pub fn sharded(&self, shard: Shard) -> Result<ModelConfig> {
        let Shard { rank, world, expert_parallel } = shard;
        if expert_parallel && let FfnConfig::Dense { .. } = self.ffn {
            return Err(Error::request("expert_parallel", "True, for a model without experts", "False"));
        }
        if !self.divides(world, expert_parallel) {
            return Err(self.indivisible(world, expert_parallel));
        }
        if rank >= world {
            return Err(Error::request("rank", rank, format!("0 to {}", world - 1)));
        }
        let mut local = self.clone();
        if shard.is_whole() {
            return Ok(local);
        }
        if self.has_delta() {
            local.delta.num_k_heads /= world;
            local.delta.num_v_heads /= world;
        }
        if self.has_attention() {
            local.attention.num_q_heads /= world;
            local.attention.num_kv_heads = shard.kv_heads(self.attention.num_kv_heads).len();
        }
        let width_of = |width: usize| local_width(width, world, self.quantization.as_ref());
        match &mut local.ffn {
            FfnConfig::Dense { width } => *width = width_of(*width),
            FfnConfig::Moe { expert_width, shared_width, .. } => {
                if !expert_parallel {
                    *expert_width = width_of(*expert_width);
                }
                *shared_width = width_of(*shared_width);
            }
        }
        Ok(local)
    }

    fn has_delta(&self) -> bool {
        self.layers.contains(&LayerKind::DeltaNet)
    }

    fn has_attention(&self) -> bool {
        self.layers.contains(&LayerKind::Attention) || self.num_mtp_layers > 0
    }

    /// Whether so many ranks can share the model.
    fn divides(&self, world: usize, expert_parallel: bool) -> bool {
        let by = |size: usize| world > 0 && size.is_multiple_of(world);
        let delta = by(self.delta.num_k_heads) && by(self.delta.num_v_heads);
        let kv_heads = self.attention.num_kv_heads;
        let attention = by(self.attention.num_q_heads) && (by(kv_heads) || world.is_multiple_of(kv_heads));
        let ffn = match self.ffn {
            FfnConfig::Dense { width } => by(width),
            FfnConfig::Moe { num_experts, expert_width, shared_width, .. } => {
                by(if expert_parallel { num_experts } else { expert_width }) && by(shared_width)
            }
        };
        (delta || !self.has_delta()) && (attention || !self.has_attention()) && ffn
    }

    fn indivisible(&self, world: usize, expert_parallel: bool) -> Error {
        let sizes: Vec<_> = (1..=MAX_LISTED).filter(|&n| self.divides(n, expert_parallel)).collect();
        let sizes: Vec<_> = sizes.iter().map(usize::to_string).collect();
        let mut of = Vec::new();
        if self.has_delta() {
            let delta = &self.delta;
            of.push(format!(
                "{} key and {} value heads of delta layers",
                delta.num_k_heads, delta.num_v_heads
            ));
        }
        if self.has_attention() {
            let attention = &self.attention;
            let (q, kv) = (attention.num_q_heads, attention.num_kv_heads);
            of.push(format!("{q} query heads, {kv} key-value heads (or a multiple of them)"));
        }
        match self.ffn {
            FfnConfig::Dense { width } => of.push(format!("a width of {width}")),
            FfnConfig::Moe { num_experts, expert_width, shared_width, .. } => {
                of.push(match expert_parallel {
                    true => format!("{num_experts} experts, a shared expert {shared_width} wide"),
                    false => format!("experts {expert_width} wide, a shared expert {shared_width} wide"),
                })
            }
        }
        let allowed = format!("{}, which divide {}", sizes.join(", "), of.join(", "));
        Error::request("tensor_parallel_size", world, allowed)
    }
}

/// The width of a rank's part of a block `width` wide, which `world` divides.
fn local_width(width: usize, world: usize, formats: Option<&QuantConfig>) -> usize {
    let even = width / world;
    let Some(QuantConfig { fp8, int4, nvfp4, .. }) = formats else { return even };
    // What a cut should not fall into, and what it must not: codes of a byte or a word lie together.
    let mut units: Vec<(usize, usize)> =
        fp8.iter().flat_map(|rule| &rule.blocks).map(|block| (block[1], 1)).collect();
    units.extend(int4.iter().map(|_| (CODES, 8)));
    units.extend(nvfp4.then_some((CODES, 16)));
    // All parts in one block, as blocks are large or parts are small.
    let cuts_nothing = |&(unit, least): &(usize, usize)| {
        even.is_multiple_of(unit) || unit.is_multiple_of(even) && even.is_multiple_of(least)
    };
    if units.iter().all(cuts_nothing) {
        return even;
    }
    let unit = units.iter().try_fold(1usize, |all, &(unit, _)| (all / gcd(all, unit)).checked_mul(unit));
    unit.and_then(|unit| even.checked_next_multiple_of(unit)).map_or(width, |local| local.min(width))
}

/// The greatest common divisor; the other one where one is 0.
pub(crate) fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests;
