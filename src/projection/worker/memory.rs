//! A read model that this node keeps for itself, in memory.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{Context, Run};
use crate::projection::error::NoReset;
use crate::projection::{MemoryRun, Projection, ReadModel};
use crate::store::{Checkpoint, StoreError};

/// Time that a start waits for the previous run before it reports that and tries again.
const PATIENCE: Duration = Duration::from_millis(500);

/// The pause between two looks.
const RETRY: Duration = Duration::from_millis(5);

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> Run<'_, P, R> {
    /// Empties the read model of this node before its first event: the memory may hold what an earlier run folded.
    pub(super) async fn empty_memory(&mut self) -> Result<(), StoreError> {
        let none = Checkpoint::default();
        if self.read_model.shared() || self.read_model.checkpoint(&self.row).await? != none {
            return Ok(());
        }
        let context = self.context;
        if !self.inbox.is_stopping() {
            previous_run_ended(context).await?;
        }
        let mut open = self.read_model.begin(&self.row, none).await?;
        let emptied = self.users_reset(&mut open).await;
        self.roll_back(open).await;
        emptied.map_err(|error| {
            let name = &context.name;
            if error.is::<NoReset>() {
                let reason = format!(
                    "projection {name} keeps its state in memory and has no reset, so the state of an earlier run would stay; implement Projection::reset so that it empties the state"
                );
                return StoreError::Invalid { reason };
            }
            let reason = format!("emptying the memory of projection {name}: {error}");
            StoreError::Unavailable { reason, source: None }
        })
    }
}

/// Waits for an `apply` of the previous run of this projection in this process: it may fold into the same memory.
async fn previous_run_ended(context: &Context) -> Result<(), StoreError> {
    let Context { name, store, .. } = context;
    let deadline = Instant::now() + PATIENCE;
    while MemoryRun::is_ending(store.info().id, name) {
        if Instant::now() >= deadline {
            let reason = format!(
                "the previous run of projection {name} in this process is still in its apply; a runtime that is dropped cannot interrupt an apply that blocks its thread"
            );
            return Err(StoreError::Unavailable { reason, source: None });
        }
        sleep(RETRY).await;
    }
    Ok(())
}
