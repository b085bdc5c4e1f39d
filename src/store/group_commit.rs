//! The group-commit writer: concurrent appends of all aggregates of a process share transactions.
//!
//! A transaction takes all appends that were queued while the previous one was in flight, so a lone
//! append never waits and a busy store gets large transactions. Each stream is in at most one
//! transaction in flight.
//!
//! A second transaction starts beside one in flight if that one is small or slow: it keeps a disk or a
//! network busy, and no processor. Otherwise the appends wait for its end and share the next
//! transaction, which starts before the answers: the store works while callers go on.
//!
//! If an append fails, the appends decided on its events fail too, and no others. If the store
//! refuses the content of a transaction, the writer sends its appends again in halves, until the
//! refused append is alone.

mod committer;
mod counters;
mod pending;

use std::fmt;
use std::sync::Arc;

use tokio::sync::mpsc;

use self::committer::{Committer, QUEUE};
use self::counters::Counters;
pub use self::counters::WriterStatus;
pub(crate) use self::pending::{AppendResult, PendingAppend, SpeculationChain};
use super::EventStore;
use crate::telemetry::Metrics;

/// A handle through which aggregates submit appends; cheap to clone.
///
/// The writer's task ends when the last handle is dropped and all submissions are answered.
#[derive(Clone)]
pub(crate) struct GroupCommitter {
    submissions: mpsc::Sender<PendingAppend>,
    counters: Arc<Counters>,
    metrics: Metrics,
}

impl fmt::Debug for GroupCommitter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GroupCommitter").field("status", &self.status()).finish_non_exhaustive()
    }
}

impl GroupCommitter {
    /// Starts the writer of a store.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(crate) fn start(store: Arc<dyn EventStore>, metrics: Metrics) -> Self {
        let (submissions, receiver) = mpsc::channel(QUEUE);
        let counters = Arc::new(Counters::default());
        let task = Committer::new(store, counters.clone(), metrics.clone());
        tokio::spawn(task.run(receiver));
        Self { submissions, counters, metrics }
    }

    /// Returns the metrics that submitters also record to.
    pub(crate) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Submits an append; waits while the queue is full.
    ///
    /// `done` is always called, unless the writer has ended and this returns the submission.
    pub(crate) async fn submit(&self, submission: PendingAppend) -> Result<(), PendingAppend> {
        self.submissions.send(submission).await.map_err(|error| error.0)
    }

    pub(crate) fn status(&self) -> WriterStatus {
        self.counters.status(self.submissions.max_capacity() - self.submissions.capacity())
    }
}
