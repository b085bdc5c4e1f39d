//! In-memory read models, which this node keeps for itself.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::context::TaskConfig;
use super::task::ProjectionTask;
use super::user_code::is_outage;
use crate::projection::error::NoReset;
use crate::projection::interruption::Interruption;
use crate::projection::memory_run::MemoryRun;
use crate::projection::{Projection, ReadModel};
use crate::store::{Checkpoint, StoreError};

/// Maximum wait of a start for the previous run before it reports that and retries.
const PATIENCE: Duration = Duration::from_millis(500);

/// Pause between two checks.
const RETRY: Duration = Duration::from_millis(5);

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionTask<'_, P, R> {
    /// Empties the read model before its first event: the memory may hold the state of an earlier
    /// run.
    pub(super) async fn empty_memory(&mut self) -> Result<(), Interruption> {
        let none = Checkpoint::default();
        if self.read_model.shared() || self.read_model.checkpoint(&self.key).await? != none {
            return Ok(());
        }
        let context = self.context;
        if !self.inbox.is_stopping() {
            previous_run_ended(context).await?;
        }
        let mut open = self.read_model.begin(&context.name, none, None).await?;
        let emptied = self.users_reset(&mut open).await;
        self.roll_back(open).await;
        emptied.map_err(|error| {
            let name = &context.name;
            if error.is::<NoReset>() {
                let reason = format!(
                    "starting in-memory projection {name} failed: it has no reset, so the state of an earlier run would stay; implement Projection::reset to empty the state"
                );
                return StoreError::Invalid { reason }.into();
            }
            let reason = format!("emptying the memory of projection {name} failed: {error}");
            // Its own error stays until the program or the reset changes.
            match is_outage(&error) {
                true => Interruption::Later { reason },
                false => StoreError::Invalid { reason }.into(),
            }
        })
    }
}

/// Waits for an `apply` of the previous run in this process: it may fold into the same memory.
async fn previous_run_ended(context: &TaskConfig) -> Result<(), Interruption> {
    let TaskConfig { name, store, .. } = context;
    let deadline = Instant::now() + PATIENCE;
    while MemoryRun::is_ending(store.info().id, name) {
        if Instant::now() >= deadline {
            let reason = format!(
                "starting projection {name} failed: the apply of its previous run in this process has not returned; a dropped runtime cannot interrupt an apply that blocks its thread"
            );
            return Err(Interruption::Later { reason });
        }
        sleep(RETRY).await;
    }
    Ok(())
}
