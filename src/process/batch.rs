//! Batches of work for instances, from the follower and from the timers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::time::{Instant, timeout_at};

use super::Process;
use super::driver::drive;
use super::drivers::{Active, Drivers};
use super::work::{PendingWork, WorkError, WorkKind};
use crate::event::Version;

/// Time that a batch waits for the end of its work, after its inputs are recorded.
///
/// Work that takes longer continues without the batch. A timer then resumes it if this node dies.
const GRACE: Duration = Duration::from_millis(50);

/// The end of a batch of work.
pub(super) struct BatchEnd {
    /// The results of each unit of work, in their order.
    pub(super) recorded: Vec<Vec<Result<Version, WorkError>>>,
    /// Instances with work that is not finished, with the version of that work.
    pub(super) unfinished: BTreeMap<String, Version>,
}

impl<P: Process> Drivers<P> {
    /// Runs a batch until all inputs are recorded, and a short time longer.
    pub(super) async fn run(self: &Arc<Self>, batch: Vec<(String, WorkKind)>) -> BatchEnd {
        let mut pending = Vec::with_capacity(batch.len());
        for (instance, kind) in batch {
            // I10: an instance with a driver does not wait for others. The semaphore is never closed.
            let slot = match self.is_active(&instance) {
                true => None,
                false => self.slots.clone().acquire_owned().await.ok(),
            };
            pending.push(self.submit(instance, kind, slot));
        }
        let mut recorded = Vec::with_capacity(pending.len());
        for work in &mut pending {
            recorded.push(work.recorded().await);
        }
        let deadline = Instant::now() + GRACE;
        let mut unfinished = BTreeMap::new();
        for (mut work, recorded) in pending.into_iter().zip(&recorded) {
            let is_finished = timeout_at(deadline, work.finished()).await;
            let last = recorded.iter().rev().find_map(|result| result.as_ref().ok());
            if let Some(version) = last
                && !is_finished.unwrap_or(false)
            {
                unfinished.insert(work.instance, *version);
            }
        }
        BatchEnd { recorded, unfinished }
    }

    /// Queues work for an instance, and starts its driver if it has none.
    fn submit(
        self: &Arc<Self>,
        instance: String,
        kind: WorkKind,
        slot: Option<OwnedSemaphorePermit>,
    ) -> PendingWork {
        let (work, pending) = PendingWork::new(instance.clone(), kind);
        let mut active = self.active();
        if let Some(active) = active.get_mut(&instance) {
            active.queue.push_back(work);
            active.wake.notify_one();
        } else {
            let wake = Arc::new(Notify::new());
            active.insert(instance.clone(), Active { queue: [work].into(), wake: wake.clone() });
            tokio::spawn(drive(self.clone(), instance, wake, slot));
        }
        pending
    }
}
