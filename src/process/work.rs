//! The work of an instance's driver, and the answers that its sender waits for.

use tokio::sync::oneshot;

use super::routes::RouteKind;
use crate::event::{RecordedEvent, Version};

/// A unit of work for an instance.
pub(super) enum WorkKind {
    /// Deliver events in log order, up to the first transient error. `late`: the follower had parked
    /// them.
    Deliver { events: Vec<(RecordedEvent, RouteKind)>, late: bool },
    /// Fire a timer that is due.
    Fire { timer: String, version: Version },
    /// Continue with what is left to do.
    Resume,
}

/// A unit of work in the queue of an instance.
pub(super) struct Work {
    pub(super) kind: WorkKind,
    /// Receives the results when the inputs are durable in the stream of the instance.
    pub(super) recorded: oneshot::Sender<Vec<Result<Version, WorkError>>>,
    /// Receives a message when nothing is left to do; closes if something is left for later.
    pub(super) finished: oneshot::Sender<()>,
}

/// Reason why an input was not recorded.
#[derive(Debug, Clone)]
pub(super) enum WorkError {
    /// A repetition may succeed.
    Transient(String),
    /// The instance cannot be loaded, or the input cannot be stored.
    Permanent(String),
}

/// A unit of work as its sender sees it.
pub(super) struct PendingWork {
    pub(super) instance: String,
    inputs: usize,
    recorded: oneshot::Receiver<Vec<Result<Version, WorkError>>>,
    finished: oneshot::Receiver<()>,
}

impl PendingWork {
    pub(super) fn new(instance: String, kind: WorkKind) -> (Work, Self) {
        let inputs = match &kind {
            WorkKind::Deliver { events, .. } => events.len(),
            WorkKind::Fire { .. } | WorkKind::Resume => 1,
        };
        let (recorded, is_recorded) = oneshot::channel();
        let (finished, is_finished) = oneshot::channel();
        let pending = Self { instance, inputs, recorded: is_recorded, finished: is_finished };
        (Work { kind, recorded, finished }, pending)
    }

    /// Waits until the inputs are durable. Returns the version of the instance after each of them.
    pub(super) async fn recorded(&mut self) -> Vec<Result<Version, WorkError>> {
        let dropped = || Err(WorkError::Transient("the driver of the instance ended".into()));
        match (&mut self.recorded).await {
            Ok(results) => results,
            Err(_) => (0..self.inputs).map(|_| dropped()).collect(),
        }
    }

    /// Waits until nothing is left to do. Returns `false` if something is left for later.
    pub(super) async fn finished(&mut self) -> bool {
        (&mut self.finished).await.is_ok()
    }
}
