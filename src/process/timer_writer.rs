//! A writer of timers that shares round trips.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot};

use crate::store::{DueTime, EventStore, NewTimer, StoreError, TimerRef};
use crate::supervised::Task;

/// Number of changes from which a write takes no further one.
const WRITE: usize = 5_000;

/// Interval between two reads of due timers, unless a timer is due earlier.
pub(super) const POLL: Duration = Duration::from_secs(1);

/// A writer that merges concurrent changes of a process' timers.
pub(super) struct TimerWriter {
    changes: mpsc::Sender<Change>,
    _task: Task,
}

struct Change {
    put: Vec<NewTimer>,
    remove: Vec<TimerRef>,
    done: oneshot::Sender<Result<(), StoreError>>,
}

impl TimerWriter {
    /// Starts the writer. `soon` is notified of timers that are due before the next poll.
    pub(super) fn start(store: Arc<dyn EventStore>, process: &'static str, soon: Arc<Notify>) -> Self {
        let (changes, queue) = mpsc::channel(1_024);
        Self { changes, _task: Task::spawn(write_all(store, process, queue, soon)) }
    }

    /// Deletes and writes timers. The change is durable when it returns.
    pub(super) async fn write(&self, put: Vec<NewTimer>, remove: Vec<TimerRef>) -> Result<(), StoreError> {
        let ended =
            || StoreError::Unavailable { reason: "the writer of timers has ended".into(), source: None };
        let (done, written) = oneshot::channel();
        self.changes.send(Change { put, remove, done }).await.map_err(|_| ended())?;
        written.await.map_err(|_| ended())?
    }
}

async fn write_all(
    store: Arc<dyn EventStore>,
    process: &'static str,
    mut queue: mpsc::Receiver<Change>,
    soon: Arc<Notify>,
) {
    while let Some(Change { mut put, mut remove, done }) = queue.recv().await {
        let mut waiting = vec![done];
        while put.len() + remove.len() < WRITE
            && let Ok(change) = queue.try_recv()
        {
            put.extend(change.put);
            remove.extend(change.remove);
            waiting.push(change.done);
        }
        let is_soon = put.iter().any(|timer| match timer.due {
            DueTime::After(wait) => wait < POLL,
            DueTime::At(_) => true,
        });
        let written = store.write_timers(process, put, remove).await;
        if is_soon && written.is_ok() {
            soon.notify_one();
        }
        for done in waiting {
            // A failed send means that the driver has ended.
            let _ = done.send(written.clone());
        }
    }
}
