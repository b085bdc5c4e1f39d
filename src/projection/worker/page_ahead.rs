//! Reads a page of the log while the task applies the one before it.

use tokio::task::JoinSet;

use crate::event::Position;
use crate::projection::interruption::Interruption;
use crate::store::LogPage;

/// A page of the log that is being read; aborted on drop.
pub(super) struct PageAhead {
    pub(super) after: Position,
    pub(super) reading: JoinSet<Result<LogPage, Interruption>>,
}

impl PageAhead {
    /// Waits for the page. Cancel-safe.
    pub(super) async fn page(&mut self) -> Result<LogPage, Interruption> {
        match self.reading.join_next().await {
            Some(Ok(page)) => page,
            ended => {
                let reason = format!("reading the log failed: the task ended without an answer: {ended:?}");
                Err(Interruption::Later { reason })
            }
        }
    }
}
