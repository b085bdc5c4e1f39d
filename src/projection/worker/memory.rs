//! A read model that this node keeps for itself, in memory.

use super::Run;
use crate::projection::error::NoReset;
use crate::projection::{Projection, ReadModel};
use crate::store::{Checkpoint, StoreError};

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> Run<'_, P, R> {
    /// Empties the read model of this node before its first event: the memory may hold what an earlier run folded.
    pub(super) async fn empty_memory(&mut self) -> Result<(), StoreError> {
        let none = Checkpoint::default();
        if self.read_model.shared() || self.read_model.checkpoint(&self.row).await? != none {
            return Ok(());
        }
        let mut open = self.read_model.begin(&self.row, none).await?;
        let emptied = self.users_reset(&mut open).await;
        self.roll_back(open).await;
        emptied.map_err(|error| {
            let name = &self.context.name;
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
