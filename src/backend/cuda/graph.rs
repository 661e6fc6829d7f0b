//! Recorded steps: a batch of one new token each is launched as one CUDA graph, from the second of its shape on, which is
//! recorded first. The first runs as it is, so that kernels are loaded and cuBLASLt has chosen.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys;

use super::device::{Device, failed};
use crate::Result;

/// Batches of more sequences are not recorded: their launches are hidden behind kernels that run longer.
pub(super) const MAX_SEQS: usize = 64;
/// Keys and values of a recorded shape go up to this, or to this times a power of four.
const MIN_KV_LEN: usize = 1024;
/// Shapes that are kept; past that the one that was not seen for longest is forgotten.
const MAX_GRAPHS: usize = 128;
/// Device memory that they take together, about.
pub(super) const RESERVED_BYTES: usize = 64 << 20;

/// What decides every launch of a recorded step: what else differs from step to step lies in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub seqs: usize,
    /// An upper bound of the sequences' lengths.
    pub kv_len: usize,
    /// Tokens that are chosen on the device.
    pub sampled: usize,
}

impl Shape {
    /// The bound that sequences of up to `len` tokens, of at most `max_len`, fall under.
    pub fn kv_bound(len: usize, max_len: usize) -> usize {
        let mut bound = MIN_KV_LEN;
        while bound < len {
            bound *= 4;
        }
        bound.min(max_len).max(len)
    }
}

/// A recorded step.
pub(super) struct Graph {
    exec: sys::CUgraphExec,
    /// Kernels and copies in it.
    pub num_nodes: usize,
    device: Arc<Device>,
}

// SAFETY: a driver handle, used by one thread at a time.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `ops` launches on the device's stream, without running it. `None` where the driver would not: another
    /// thread of the process that waits for the whole device ends every recording on it.
    ///
    /// # Errors
    /// What `ops` returned.
    pub fn record(device: &Arc<Device>, ops: impl FnOnce() -> Result<()>) -> Result<Option<Self>> {
        device.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives as long as the device; the recording ends below, whatever `ops` does.
        if unsafe { result::stream::begin_capture(device.stream(), mode) }.is_err() {
            return Ok(None);
        }
        let done = ops();
        device.bind()?;
        // SAFETY: as above.
        let Ok(graph) = (unsafe { result::stream::end_capture(device.stream()) }) else {
            return done.map(|()| None);
        };
        let mut num_nodes = 0;
        // SAFETY: the graph lives until it is destroyed here; the graph that can be launched holds all it needs.
        let exec = unsafe {
            let _ = sys::cuGraphGetNodes(graph, std::ptr::null_mut(), &mut num_nodes);
            let exec =
                done.is_ok().then(|| result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)));
            let _ = result::graph::destroy(graph);
            exec
        };
        done?;
        Ok(exec.and_then(Result::ok).map(|exec| Self { exec, num_nodes, device: Arc::clone(device) }))
    }

    /// Runs it, on the stream.
    pub fn launch(&self) -> Result<()> {
        self.device.bind()?;
        let _waiting = self.device.waiting();
        // SAFETY: both live.
        unsafe { result::graph::launch(self.exec, self.device.stream()) }
            .map_err(|e| failed("launching a step", e))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made in `record`; the driver waits for what still runs.
            let _ = unsafe { result::graph::exec_destroy(self.exec) };
        }
    }
}

/// The shapes that have been seen, with their recorded steps.
#[derive(Default)]
pub(super) struct Graphs {
    seen: Seen<Graph>,
    /// Nodes of the step that was launched last.
    pub last_num_nodes: Option<usize>,
}

/// What is known of shapes, of the latest [`MAX_GRAPHS`] of them.
struct Seen<T> {
    shapes: HashMap<Shape, (u64, Option<T>)>,
    /// Steps so far: when a shape was seen.
    now: u64,
}

impl<T> Default for Seen<T> {
    fn default() -> Self {
        Self { shapes: HashMap::new(), now: 0 }
    }
}

impl<T> Seen<T> {
    /// What is kept of a shape, which is seen now; `None` where it is new.
    fn see(&mut self, shape: Shape) -> Option<&mut Option<T>> {
        self.now += 1;
        let now = self.now;
        if !self.shapes.contains_key(&shape) {
            if self.shapes.len() >= MAX_GRAPHS {
                let oldest = self.shapes.iter().min_by_key(|(_, (seen, _))| *seen).map(|(shape, _)| *shape);
                drop(oldest.and_then(|oldest| self.shapes.remove(&oldest)));
            }
            self.shapes.insert(shape, (now, None));
            return None;
        }
        self.shapes.get_mut(&shape).map(|(seen, kept)| {
            *seen = now;
            kept
        })
    }
}

/// What is to be done about a step.
pub(super) enum Turn {
    Run,
    Record,
    Launched,
}

impl Graphs {
    /// Launches the recorded step of a shape, or says what to do in its place.
    pub fn turn(&mut self, shape: Shape) -> Result<Turn> {
        self.last_num_nodes = None;
        match self.seen.see(shape) {
            None => Ok(Turn::Run),
            Some(None) => Ok(Turn::Record),
            Some(Some(graph)) => {
                self.last_num_nodes = Some(graph.num_nodes);
                graph.launch().map(|()| Turn::Launched)
            }
        }
    }

    /// Keeps a recorded step, and launches it.
    pub fn keep(&mut self, shape: Shape, graph: Graph) -> Result<()> {
        self.last_num_nodes = Some(graph.num_nodes);
        graph.launch()?;
        if let Some(kept) = self.seen.see(shape) {
            *kept = Some(graph);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_GRAPHS, Seen, Shape};

    #[test]
    fn the_shape_that_was_not_seen_for_longest_is_forgotten() {
        let shape = |seqs| Shape { seqs, kv_len: 1024, sampled: 0 };
        let mut seen = Seen::default();
        for seqs in 0..MAX_GRAPHS {
            assert!(seen.see(shape(seqs)).is_none());
            *seen.see(shape(seqs)).unwrap() = Some(seqs);
        }
        assert_eq!(seen.see(shape(0)), Some(&mut Some(0)));
        assert!(seen.see(shape(MAX_GRAPHS)).is_none());
        assert_eq!(seen.see(shape(0)), Some(&mut Some(0)));
        assert_eq!(seen.see(shape(2)), Some(&mut Some(2)));
        assert!(seen.see(shape(1)).is_none(), "the oldest");
        assert_eq!(seen.shapes.len(), MAX_GRAPHS);
    }

    #[test]
    fn bounds_hold_and_are_few() {
        let bounds: std::collections::BTreeSet<_> = (1..=8192).map(|n| Shape::kv_bound(n, 8192)).collect();
        assert_eq!(bounds.into_iter().collect::<Vec<_>>(), [1024, 4096, 8192]);
        assert_eq!(Shape::kv_bound(1, 100), 100);
        assert!((1..=8192).all(|n| Shape::kv_bound(n, 8192) >= n));
    }
}
