//! Rows of results in memory that outlives the model, for other libraries.

use std::any::Any;
use std::sync::Arc;

use super::Cuda;
use super::buffers::{Buf, product};
use super::device::Memory;
use crate::backend::Backend;
use crate::lend::Lendable;
use crate::{Error, Result};

/// Complete when it is lent, so that no stream has to wait; freed when nothing runs on the device that could read it.
pub(super) struct Lent {
    memory: Memory,
    ordinal: usize,
}

impl std::fmt::Debug for Lent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes on cuda:{}", self.memory.bytes(), self.ordinal)
    }
}

impl Lendable for Lent {
    fn device(&self) -> usize {
        self.ordinal
    }

    fn address(&self) -> u64 {
        self.memory.at(0)
    }

    fn share(&self, _stream: Option<usize>) -> Result<()> {
        Ok(())
    }
}

impl Cuda {
    pub(super) fn lend(&self, rows: usize, width: usize) -> Result<Arc<dyn Lendable>> {
        let bytes = product(&[4, rows, width]);
        // What recorded steps will need is not for lending.
        let free = self.free_memory()?.unwrap_or_default();
        if bytes.is_none_or(|bytes| bytes > free) {
            let size = bytes.map_or("over 2^64".into(), |n| n.to_string());
            return Err(Error::OutOfMemory {
                what: format!("logits that stay on the device ({size} bytes; it has {free} to spare)"),
                advice: "give fewer tokens, lower gpu_memory_utilization, or leave out on_device".into(),
            });
        }
        let memory = self.device.alloc(bytes, "tensors that are lent")?;
        Ok(Arc::new(Lent { memory, ordinal: self.device.ordinal() }))
    }

    pub(super) fn copy_rows(&self, n: usize, x: &Buf, to: &dyn Lendable, at: usize) -> Result<()> {
        let to: &dyn Any = to;
        let Some(to) = to.downcast_ref::<Lent>() else {
            return Err(Error::Internal("rows for memory that this device has not lent".into()));
        };
        let bytes = x.row_bytes();
        to.memory.copy(at * bytes, &x.memory, 0, n * bytes)?;
        self.device.synchronize()
    }
}
