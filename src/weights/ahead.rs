//! Files read ahead of a loader, and given back behind it, on other threads: what it reads next is on its way while it works
//! on what it has.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use memmap2::Mmap;

use super::quant::Encoded;
use super::{Data, ModelTensors, Tensor};
use crate::mapped;

/// Bytes between two tensors that are not worth another request. An expert's third matrix lies between two that are read
/// one after the other.
const GAP: usize = 4 << 20;

type Span = (Arc<Mmap>, Range<usize>);

/// A thread that has the layers of a model read, a layer before they are loaded. Nothing waits for it, and it ends by
/// itself.
pub struct ReadAhead {
    sender: Option<Sender<Vec<Span>>>,
    /// What is not asked for yet, in the order of a load: the head, then each layer.
    waiting: std::vec::IntoIter<Vec<Span>>,
    asked: usize,
}

impl ReadAhead {
    /// Starts the thread; without one nothing is read ahead.
    pub fn new(tensors: &ModelTensors) -> Self {
        let layers = tensors.layers.iter().map(|layer| spans(layer.tensors()));
        let waiting: Vec<_> = std::iter::once(spans(&tensors.lm_head)).chain(layers).collect();
        let (sender, receiver) = channel::<Vec<Span>>();
        let thread = std::thread::Builder::new().name("qwen35rs-read-ahead".into());
        let work = move || {
            for (map, range) in receiver.into_iter().flatten() {
                mapped::read_ahead(&map, range);
            }
        };
        let sender = thread.spawn(work).ok().map(|_| sender);
        Self { sender, waiting: waiting.into_iter(), asked: 0 }
    }

    /// So many of these steps are loaded: has the next two read, of which the first should be there.
    pub fn loaded(&mut self, done: usize) {
        while self.asked < done.saturating_add(2) {
            let Some(spans) = self.waiting.next() else { return };
            self.asked += 1;
            if let Some(sender) = &self.sender {
                // A thread that is gone reads nothing ahead.
                let _ = sender.send(spans);
            }
        }
    }
}

/// As [`Tensor::release`] of each, on another thread: of a file in memory that takes a fortieth of the time of reading it.
pub fn release_behind(tensors: &[Tensor]) {
    let spans = spans(tensors);
    if !spans.is_empty() {
        rayon::spawn(move || spans.into_iter().for_each(|(map, range)| mapped::release(&map, range)));
    }
}

/// Where tensors lie in files, neighbours as one.
fn spans<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Vec<Span> {
    let mut found: BTreeMap<(usize, usize), Span> = BTreeMap::new();
    tensors.into_iter().for_each(|tensor| place(tensor, &mut found));
    let mut merged: Vec<Span> = Vec::new();
    for (map, range) in found.into_values() {
        match merged.last_mut() {
            Some((last, before))
                if Arc::ptr_eq(last, &map) && range.start <= before.end.saturating_add(GAP) =>
            {
                before.end = before.end.max(range.end);
            }
            _ => merged.push((map, range)),
        }
    }
    merged
}

/// Adds the parts of a tensor by file and place.
fn place(tensor: &Tensor, found: &mut BTreeMap<(usize, usize), Span>) {
    match &tensor.data {
        Data::Mapped(map, range) => {
            let key = (Arc::as_ptr(map) as usize, range.start);
            found.insert(key, (Arc::clone(map), range.clone()));
        }
        Data::Random(_) | Data::Owned(_) => {}
        Data::Encoded(encoded) => Encoded::parts(encoded).into_iter().for_each(|part| place(part, found)),
        Data::Requantised(requantised) => place(requantised.source(), found),
    }
}

#[cfg(test)]
mod tests {
    use super::super::quant::Scheme;
    use super::super::safetensors;
    use super::*;

    #[test]
    fn neighbours_are_one_request() {
        let (near, far) = (100, GAP + 4);
        let mut end = 0;
        let mut header = serde_json::Map::new();
        for (name, len) in [("a", 64), ("gap", near), ("b", 36), ("hole", far), ("c", 8)] {
            let dtype = if name.len() == 1 { "BF16" } else { "U8" };
            let shape = if name.len() == 1 { vec![1, len / 2] } else { vec![len] };
            let facts = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [end, end + len]});
            header.insert(name.into(), facts);
            end += len;
        }
        let text = serde_json::Value::from(header).to_string();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.bytes().chain(std::iter::repeat_n(0, end)));
        std::fs::write(&path, bytes).unwrap();
        let tensors = safetensors::open(&path).unwrap();
        let get = |name: &str| tensors.iter().find(|t| t.name == name).unwrap().clone();
        let quantised = get("a").requantised(Scheme::Int4 { group: 32 });
        let found = spans(&[get("c"), get("b"), quantised, Tensor::random("r".into(), &[4, 4])]);
        let base = 8 + text.len();
        let ranges: Vec<_> = found.iter().map(|(_, range)| range.start - base..range.end - base).collect();
        assert_eq!(ranges, [0..64 + near + 36, end - 8..end]);

        found.iter().for_each(|(map, range)| mapped::read_ahead(map, range.clone()));
        release_behind(&tensors);
        assert_eq!(get("b").bytes().unwrap(), vec![0; 36]);
    }
}
