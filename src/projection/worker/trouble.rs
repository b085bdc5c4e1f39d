//! What becomes of a projection whose store or read model fails.

use std::error::Error;
use std::time::Duration;

use tokio::time::Instant;

use super::Run;
use crate::projection::{Projection, ProjectionState, ReadModel};
use crate::store::{CheckpointError, StoreError};

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> Run<'_, P, R> {
    pub(super) fn stand_still(&mut self) {
        self.failed = true;
        self.restart();
        self.context.set(ProjectionState::Failed);
    }

    pub(super) async fn roll_back(&mut self, open: R::Open) {
        // It happens anyway when the connection goes; only later.
        if let Err(error) = self.read_model.rollback(open).await {
            tracing::warn!(projection = self.context.name, %error, "a transaction could not be rolled back at once");
        }
    }

    /// The checkpoint could not be moved.
    pub(super) fn refused(&mut self, error: &CheckpointError) {
        match error {
            CheckpointError::Stale { .. } => self.step_down(&error.to_string()),
            CheckpointError::Store(error) => {
                // Whether it was moved is found out by reading it.
                self.saved = None;
                self.restart();
                self.outage(error);
            }
        }
    }

    /// The store or the read model failed: tried again later, unless that cannot help.
    pub(super) fn outage(&mut self, error: &(dyn Error + 'static)) {
        let lasting = matches!(
            error.downcast_ref(),
            Some(StoreError::Incompatible { .. } | StoreError::Invalid { .. } | StoreError::Corrupt { .. })
        );
        if !lasting {
            return self.try_later(error);
        }
        tracing::error!(projection = self.context.name, %error, "the projection stands still");
        self.context.fail(ProjectionState::Failed, error.to_string());
        self.context.status.send_modify(|status| status.fits = false);
        self.reload();
        self.stand_still();
        self.surrender = true;
    }

    /// What is pending took too long and was dropped in the middle of it: with its connection, where there is one.
    pub(super) fn overran(&mut self, limit: Duration) {
        let doing = match self.applying.take() {
            Some(position) => format!("applying the event at position {position}"),
            None => "beginning or committing a transaction".to_owned(),
        };
        let reason = format!(
            "{doing}: not done within {limit:?}; the transaction was given up and is tried again (ProjectionOptions::transaction_timeout)"
        );
        // Whether it was committed is found out by reading the checkpoint.
        self.saved = None;
        self.restart();
        self.outage(&StoreError::not_now(reason));
    }

    pub(super) fn try_later(&mut self, error: &(dyn Error + 'static)) {
        let wait = self.backoff.next();
        self.wait_until = Instant::now() + wait;
        let projection = &self.context.name;
        tracing::warn!(projection, %error, ?wait, "the store or the read model failed and is tried again");
        self.context.fail(ProjectionState::Retrying, error.to_string());
    }
}
