//! Operator requests to the nodes, from programs without the projection's code: see [`Request`].
//!
//! The owner of the projection checks for requests at takeover, and after each change of its
//! control.

use std::time::Duration;

use tokio::time::Instant;

use super::operators::Due;
use super::task::ProjectionTask;
use crate::event::Position;
use crate::partition::Partition;
use crate::projection::interruption::Interruption;
use crate::projection::layout::Role;
use crate::projection::{ControlError, Projection, ReadModel};
use crate::store::{CheckpointError, ProgressWrite, ReadLog, Request, StoreError, StoredRequest};

/// Number of requests per read.
const PAGE: usize = 1_000;

/// Pause before the retry of an operator request; the projection continues meanwhile.
const RETRY_PAUSE: Duration = Duration::from_secs(30);

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionTask<'_, P, R> {
    /// Acts on requests for a reset, a rebuild or its cancellation, if this node is responsible.
    ///
    /// The owner is responsible, or any node if the read model does not fit and so has no owner.
    pub(super) async fn see_to_requests(&mut self) -> Result<(), Interruption> {
        let context = self.context;
        let first = context.partition.is_none_or(|partition| partition.index() == 0);
        if context.role != Role::Live || !first || !self.read_model.shared() {
            self.operators.requests = Due(None);
            return Ok(());
        }
        if self.state.lease().is_none() && !self.looks_free() {
            return Ok(());
        }
        self.create().await?;
        for request in [Request::Reset, Request::CancelRebuild, Request::Rebuild] {
            let stored = self.read_model.requests(&context.name, request, 1).await?;
            let waiting =
                |stored: &StoredRequest| stored.request == request && stored.refused_reason.is_none();
            let Some(stored) = stored.into_iter().find(waiting) else { continue };
            tracing::info!(projection = context.name, %request, "executing an operator request");
            let done = match request {
                Request::Reset => self.reset(Some(&stored)).await,
                Request::CancelRebuild => self.cancel_rebuild(Some(&stored)).await,
                _ => self.rebuild(Some(&stored)).await,
            };
            self.answer(stored, done).await?;
        }
        self.operators.requests = Due(None);
        Ok(())
    }

    /// Retries the parked events of this partition that operators requested. Called as the owner.
    pub(super) async fn see_to_retries(&mut self) -> Result<(), Interruption> {
        let context = self.context;
        if context.role != Role::Live || !self.read_model.shared() {
            self.operators.retries = Due(None);
            return Ok(());
        }
        let mut from = Position::START;
        loop {
            let page = self.read_model.requests(&context.name, Request::Retry(from), PAGE).await?;
            let all = page.len() < PAGE;
            for stored in page {
                let Request::Retry(position) = stored.request else { continue };
                from = Position::new(position.get() + 1);
                if stored.refused_reason.is_some() {
                    continue;
                }
                let before = Position::new(position.get().saturating_sub(1));
                let page = context.store.read_log(ReadLog::after(before).upto(position).limit(1)).await?;
                let event = page.events.into_iter().find(|event| event.position == position);
                let is_here = |partition: Partition| {
                    // The first partition answers for events that do not exist.
                    event.as_ref().map_or(partition.index() == 0, |event| partition.contains(&event.stream))
                };
                if !context.partition.is_none_or(is_here) {
                    continue;
                }
                let done = match &event {
                    Some(event) => self.retry_parked(event, Some(&stored)).await,
                    None => Err(ControlError::NotParked { name: context.name.clone(), position }),
                };
                self.answer(stored, done).await?;
            }
            if all {
                break;
            }
        }
        self.operators.retries = Due(None);
        Ok(())
    }

    /// Returns whether a request still waits.
    pub(super) async fn is_waiting(&mut self, stored: &StoredRequest) -> Result<bool, StoreError> {
        let found = self.read_model.requests(&self.context.name, stored.request, 1).await?;
        Ok(found.first().is_some_and(|found| found.id == stored.id && found.refused_reason.is_none()))
    }

    /// Records that a request cannot be completed yet; returns the time of the next attempt.
    ///
    /// Other work continues meanwhile.
    pub(super) fn put_off(&self, error: &Interruption) -> Due {
        let projection = &self.context.name;
        tracing::warn!(projection, %error, again = ?RETRY_PAUSE, "could not complete an operator request; retrying");
        let error = format!("completing an operator request failed: {error}; retrying");
        self.context.status.send_modify(|status| status.last_error = Some(error));
        Due(Some(Instant::now() + RETRY_PAUSE))
    }

    /// Records a refusal with its reason, if the request still exists.
    async fn answer(
        &mut self,
        stored: StoredRequest,
        done: Result<(), ControlError>,
    ) -> Result<(), Interruption> {
        let error = match done {
            // The request was deleted with the change; a request that exists now is a new one.
            Ok(()) => return Ok(()),
            // A later attempt may succeed.
            Err(ControlError::Store(error)) if error.may_pass() => return Err(error.into()),
            Err(
                error @ (ControlError::Overloaded { .. }
                | ControlError::TimedOut { .. }
                | ControlError::Conflict { .. }
                | ControlError::Unavailable { .. }),
            ) => return Err(Interruption::Later { reason: error.to_string() }),
            Err(error) => error,
        };
        let (projection, request) = (self.context.name.clone(), stored.request);
        tracing::warn!(projection, %request, %error, "refused an operator request");
        let open = self.read_model.begin(&projection, Default::default(), None).await?;
        let refusal =
            ProgressWrite::RefuseRequest { projection, request, id: stored.id, reason: error.to_string() };
        match self.read_model.commit(open, vec![refusal]).await {
            // A request that was made meanwhile has its own turn.
            Ok(()) | Err(CheckpointError::Missing { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
