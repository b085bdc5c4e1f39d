//! Operator requests to the nodes, from programs without the projection's code: see [`Request`].

use std::time::Duration;

use tokio::time::Instant;

use super::task::ProjectionTask;
use crate::event::Position;
use crate::partition::Partition;
use crate::projection::interruption::Interruption;
use crate::projection::layout::{Role, bump};
use crate::projection::{ControlError, Projection, ReadModel, Request};
use crate::store::{CheckpointError, ParkedEvent, ReadLog};

/// Number of requests in the first read; doubled while no request can be completed.
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
            self.requests_due = false;
            return Ok(());
        }
        if self.lease.is_none() && !self.looks_free() {
            return Ok(());
        }
        self.create().await?;
        for request in [Request::Reset, Request::CancelRebuild, Request::Rebuild] {
            let row = context.layout.request(request.kind());
            for kept in ReadModel::parked(self.read_model, &row, 1).await? {
                if kept.attempts > 0 {
                    continue;
                }
                tracing::info!(projection = context.name, %request, "executing an operator request");
                let done = match request {
                    Request::Reset => self.reset(Some(&row)).await,
                    Request::CancelRebuild => self.cancel_rebuild(Some(&row)).await,
                    _ => self.rebuild(Some(&row)).await,
                };
                self.answer(&row, kept, done).await?;
            }
        }
        self.requests_due = false;
        Ok(())
    }

    /// Retries the parked events of this partition that operators requested. Called as the owner.
    pub(super) async fn see_to_retries(&mut self) -> Result<(), Interruption> {
        let context = self.context;
        if context.role != Role::Live || !self.read_model.shared() {
            self.retries_due = false;
            return Ok(());
        }
        let row = context.layout.request(Request::Retry(Position::START).kind());
        let mut limit = PAGE;
        loop {
            let mut more = false;
            let stand = ReadModel::parked(self.read_model, &row, limit).await?;
            let all = stand.len() < limit;
            for kept in stand {
                if kept.attempts > 0 {
                    continue;
                }
                let position = kept.position;
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
                    Some(event) => self.retry_parked(event, Some(&row)).await,
                    None => Err(ControlError::NotParked { name: context.name.clone(), position }),
                };
                self.answer(&row, kept, done).await?;
                more = true;
            }
            if !more && all {
                break;
            }
            if !more {
                // Refused requests and those of other partitions stay: read further to see the ones
                // after them.
                limit = limit.saturating_mul(2);
            }
        }
        self.retries_due = false;
        Ok(())
    }

    /// Records that a request cannot be completed yet; returns the time of the next attempt.
    ///
    /// Other work continues meanwhile.
    pub(super) fn put_off(&self, error: &Interruption) -> Instant {
        let projection = &self.context.name;
        tracing::warn!(projection, %error, again = ?RETRY_PAUSE, "could not complete an operator request; retrying");
        let error = format!("completing an operator request failed: {error}; retrying");
        self.context.status.send_modify(|status| status.last_error = Some(error));
        Instant::now() + RETRY_PAUSE
    }

    /// Records a refusal with its reason, if the request still exists.
    async fn answer(
        &mut self,
        row: &str,
        kept: ParkedEvent,
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
        tracing::warn!(projection = self.context.name, request = %kept.name, %error, "refused an operator request");
        // Before the check whether the request is still the same: a new request moves this
        // checkpoint.
        let found = ReadModel::checkpoint(self.read_model, row).await?;
        let stand = ReadModel::parked(self.read_model, row, usize::MAX).await?;
        if !stand.iter().any(|request| request.event_id == kept.event_id) {
            return Ok(());
        }
        let refusal = ParkedEvent { attempts: 1, error: error.to_string(), ..kept };
        let open = self.read_model.begin(row, found).await?;
        match self.read_model.commit(open, row, found, bump(found), Some(refusal)).await {
            // A request that was made meanwhile has its own turn.
            Ok(()) | Err(CheckpointError::Stale { .. }) => Ok(()),
            Err(CheckpointError::Store(error)) => Err(error.into()),
        }
    }
}
