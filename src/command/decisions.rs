//! The decisions in flight on this node: their limit, their tasks and their end.

use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::Instant;
use uuid::Uuid;

use super::NotExecutedKind;
use super::admission::Admission;

/// Maximum number of decisions in flight on a node.
const IN_FLIGHT: usize = 1_024;

/// Time that a decision waits for a permit.
const ADMISSION_TIMEOUT: Duration = Duration::from_secs(1);

/// The decisions in flight on this node.
#[derive(Debug)]
pub(super) struct Decisions {
    admission: Admission,
    /// Tokio runtime of the node.
    executor: Handle,
    /// Ends all tasks when it changes, or when it is dropped with the node.
    stopped: watch::Sender<()>,
}

impl Decisions {
    /// Creates the state of a node that runs in the current tokio runtime.
    pub(super) fn new() -> Self {
        Self {
            admission: Admission::new(IN_FLIGHT, ADMISSION_TIMEOUT, "decisions in flight on this node"),
            executor: Handle::current(),
            stopped: watch::Sender::new(()),
        }
    }

    /// Acquires a permit for a decision, see [`Admission::admit`].
    pub(super) async fn admit(
        &self,
        id: Uuid,
        deadline: Instant,
    ) -> Result<OwnedSemaphorePermit, NotExecutedKind> {
        self.admission.admit(id, deadline).await
    }

    /// Runs an admitted decision, however long its caller waits, until the node stops.
    pub(super) fn spawn(
        &self,
        permit: OwnedSemaphorePermit,
        decision: impl Future<Output = ()> + Send + 'static,
    ) {
        let mut stopped = self.stopped.subscribe();
        // The caller may run in another tokio runtime, which may end before the node.
        self.executor.spawn(async move {
            let _permit = permit;
            tokio::select! {
                biased;
                () = decision => {}
                _ = stopped.changed() => {}
            }
        });
    }

    /// Stops admission, waits for the decisions in flight, and stops the rest.
    ///
    /// Returns the number of decisions without an answer at the deadline.
    pub(super) async fn shut_down(&self, deadline: Instant) -> usize {
        let unanswered = self.admission.shut_down(deadline).await;
        self.stopped.send_replace(());
        unanswered
    }
}
