//! Handling of interruptions: failures of the store and the read model, and others that may pass.

use std::error::Error;
use std::time::Duration;

use super::task::ProjectionTask;
use crate::projection::interruption::Interruption;
use crate::projection::{Projection, ProjectionState, ReadModel};
use crate::store::StoreError;

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionTask<'_, P, R> {
    pub(super) fn stop(&mut self) {
        self.state.stop();
        self.show();
    }

    pub(super) async fn roll_back(&mut self, open: R::Open) {
        // The rollback happens with the end of the connection anyway, only later.
        if let Err(error) = self.read_model.rollback(open).await {
            tracing::warn!(projection = self.context.name, %error, "could not roll back a transaction at once");
        }
    }

    /// Handles a failed move of the checkpoint.
    pub(super) fn on_checkpoint_error(&mut self, error: impl Into<Interruption>) {
        match error.into() {
            Interruption::Fenced { reason } => self.step_down(&reason),
            interruption @ (Interruption::Store(_) | Interruption::Later { .. }) => {
                // Reading the checkpoint shows whether it was moved.
                self.state.lose_checkpoint();
                self.on_interruption(&interruption);
            }
        }
    }

    /// Handles an interruption: retries later, unless a retry cannot succeed.
    pub(super) fn on_interruption(&mut self, interruption: &Interruption) {
        match interruption {
            Interruption::Store(error) => self.on_unavailable(error),
            Interruption::Fenced { .. } | Interruption::Later { .. } => self.schedule_retry(interruption),
        }
    }

    /// Handles a failure of the store or the read model: retries later, unless a retry cannot
    /// succeed.
    pub(super) fn on_unavailable(&mut self, error: &(dyn Error + 'static)) {
        // Only evidence about the data: a refused login or a changed setting (`Misconfigured`) ends
        // without a restart, like any outage.
        let lasting = matches!(
            error.downcast_ref(),
            Some(StoreError::Incompatible { .. } | StoreError::Invalid { .. } | StoreError::Corrupt { .. })
        );
        if !lasting {
            return self.schedule_retry(error);
        }
        tracing::error!(projection = self.context.name, %error, "stopped the projection");
        self.context.fail(ProjectionState::Failed, error.to_string());
        self.context.status.send_modify(|status| status.fits = false);
        self.reload();
        self.stop();
        // The failure may be this node's only, so another node may succeed.
        self.takeover.released = self.state.leave().or(self.takeover.released.take());
    }

    /// Handles pending work that exceeded its time limit and was dropped, with its connection, if
    /// any.
    pub(super) fn overran(&mut self, limit: Duration) {
        let doing = match self.state.reading_mut().and_then(|reading| reading.applying.take()) {
            Some(position) => format!("applying the event at position {position}"),
            None => "beginning or committing a transaction".to_owned(),
        };
        let reason = format!(
            "{doing} failed: not done within {limit:?}; the transaction was aborted and is retried (ProjectionOptions::transaction_timeout)"
        );
        // Reading the checkpoint shows whether it was committed.
        self.state.lose_checkpoint();
        self.schedule_retry(&Interruption::Later { reason });
    }

    pub(super) fn schedule_retry(&mut self, error: &(dyn Error + 'static)) {
        let wait = self.retry.later();
        let projection = &self.context.name;
        tracing::warn!(projection, %error, ?wait, "retrying after a failure of the store or the read model");
        self.context.fail(ProjectionState::Retrying, error.to_string());
    }
}
