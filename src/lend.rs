//! Results that stay on a device and go to whoever asked.

use crate::Result;

/// Memory on a device that other libraries can be lent.
pub trait Lendable: std::any::Any + std::fmt::Debug + Send + Sync {
    /// The number of its CUDA device.
    fn device(&self) -> usize;
    /// Where it is there.
    fn address(&self) -> u64;
    /// Lets a stream use it, which waits for what was launched; `None`: one that the caller sees to.
    fn share(&self, stream: Option<usize>) -> Result<()>;
}
