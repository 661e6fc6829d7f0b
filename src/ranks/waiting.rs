//! How ranks wait for each other: in short pieces, so that they see more meanwhile than whom they wait for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::PATIENCE;
use crate::{Error, Result};

/// Called while ranks wait for one that may take long, with how long they have and for what; its error ends the wait.
pub type Poll = Arc<dyn Fn(Duration, &str) -> Result<()> + Send + Sync>;

/// How long a rank waits before it looks around.
pub(super) const PIECE: Duration = Duration::from_millis(100);

const VARIABLE: &str = "QWEN35RS_PATIENCE";

/// How long ranks wait for each other in a step: so many seconds as QWEN35RS_PATIENCE says, else [`PATIENCE`].
///
/// # Errors
/// [`Error::Request`] for what is no number of seconds.
pub fn patience(var: impl Fn(&str) -> Option<String>) -> Result<Duration> {
    let Some(text) = var(VARIABLE) else { return Ok(PATIENCE) };
    let seconds = text.trim().parse().ok().filter(|seconds| (1..=86_400).contains(seconds));
    let wrong = || Error::request(VARIABLE, format!("{text:?}"), "seconds, 1 to 86400");
    seconds.map(Duration::from_secs).ok_or_else(wrong)
}

/// Time that was waited, by one who looks at it after every piece. While the whole process is stopped (Ctrl-Z) none of it
/// goes by: whoever kept it waiting was stopped, too.
pub(super) struct Clock {
    waited: Duration,
    last: Instant,
}

impl Clock {
    pub fn start() -> Self {
        Self { waited: Duration::ZERO, last: Instant::now() }
    }

    /// What was waited, with the piece that is over now.
    pub fn tick(&mut self) -> Duration {
        let now = Instant::now();
        self.waited += (now - self.last).min(2 * PIECE);
        self.last = now;
        self.waited
    }
}
