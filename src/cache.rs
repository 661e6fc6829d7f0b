//! Who owns which page and which slot. No device and no data: only the accounts.

use crate::batch::{PAGE_LEN, PageId, SlotId};
use crate::request::Request;

/// Free pages and free slots.
#[derive(Debug)]
pub struct Cache {
    free_pages: Vec<PageId>,
    free_slots: Vec<SlotId>,
    num_pages: usize,
    num_slots: usize,
}

/// Pages that `len` tokens need.
pub fn pages_for(len: usize) -> usize {
    len.div_ceil(PAGE_LEN)
}

impl Cache {
    /// All pages and slots free.
    pub fn new(num_pages: usize, num_slots: usize) -> Self {
        Self {
            free_pages: (0..num_pages as u32).rev().map(PageId).collect(),
            free_slots: (0..num_slots as u32).rev().map(SlotId).collect(),
            num_pages,
            num_slots,
        }
    }

    /// Pages in all.
    pub fn num_pages(&self) -> usize {
        self.num_pages
    }

    /// Free pages.
    pub fn num_free_pages(&self) -> usize {
        self.free_pages.len()
    }

    /// Gives a request the pages that `len` tokens need, and a slot. Whether the slot is new to it (and holds
    /// somebody else's state), or `None`, changing nothing, where there is not enough.
    pub fn reserve(&mut self, request: &mut Request, len: usize) -> Option<bool> {
        let missing = pages_for(len).saturating_sub(request.pages.len());
        let new_slot = request.slot.is_none();
        if missing > self.free_pages.len() || (new_slot && self.free_slots.is_empty()) {
            return None;
        }
        request.pages.extend(self.free_pages.split_off(self.free_pages.len() - missing).into_iter().rev());
        if new_slot {
            request.slot = self.free_slots.pop();
        }
        Some(new_slot)
    }

    /// Takes back all that a request holds; it must be computed from its first token again.
    pub fn release(&mut self, request: &mut Request) {
        self.free_pages.extend(request.pages.drain(..).rev());
        self.free_slots.extend(request.slot.take());
        request.computed_len = 0;
        request.logits.clear();
    }

    /// Every page and slot has exactly one owner: a request, or the free list.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check_integrity<'a>(&self, requests: impl Iterator<Item = &'a Request>) -> Result<(), String> {
        let mut pages: Vec<u32> = self.free_pages.iter().map(|p| p.0).collect();
        let mut slots: Vec<u32> = self.free_slots.iter().map(|s| s.0).collect();
        for r in requests {
            if r.computed_len > r.tokens.len() || pages_for(r.computed_len) > r.pages.len() {
                return Err(format!(
                    "{:?}: {} tokens computed in {} pages",
                    r.id,
                    r.computed_len,
                    r.pages.len()
                ));
            }
            if r.computed_len > 0 && r.slot.is_none() {
                return Err(format!("{:?}: {} tokens computed and no slot", r.id, r.computed_len));
            }
            pages.extend(r.pages.iter().map(|p| p.0));
            slots.extend(r.slot.iter().map(|s| s.0));
        }
        for (what, mut owned, num) in [("page", pages, self.num_pages), ("slot", slots, self.num_slots)] {
            owned.sort_unstable();
            if !owned.iter().copied().eq(0..num as u32) {
                return Err(format!("{what}s with an owner: {owned:?} of {num}"));
            }
        }
        Ok(())
    }
}
