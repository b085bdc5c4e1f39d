//! Applying what is pending: transactions, the event that fails, and what becomes of it.

use std::future::Future;
use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;
use tokio::time::Instant;

use super::{Pending, Run, Suspect};
use crate::backoff::Backoff;
use crate::event::{DecodeError, RecordedEvent};
use crate::projection::error::causes;
use crate::projection::{
    ApplyError, FailurePolicy, Projection, ProjectionState, ProjectionStatus, ReadModel, TargetUnavailable,
};
use crate::store::{Checkpoint, ParkedEvent};
use crate::supervised::panic_text;
use crate::telemetry::Timer;

/// Applies one event; a panic is an error like another.
pub(super) async fn apply<P: Projection>(
    projection: &mut P,
    event: &RecordedEvent,
    transaction: &mut P::Transaction,
) -> Result<(), ApplyError> {
    contained(async { projection.apply(event, transaction).await }).await
}

pub(super) async fn contained(user: impl Future<Output = Result<(), ApplyError>>) -> Result<(), ApplyError> {
    match AssertUnwindSafe(user).catch_unwind().await {
        Ok(result) => result,
        Err(panic) => Err(format!("it panicked: {}", panic_text(&*panic)).into()),
    }
}

/// Whether the error, or what caused it, says that the event's bytes cannot be read: they never will.
fn is_undecodable(error: &ApplyError) -> bool {
    causes(&**error).any(|cause| cause.is::<DecodeError>())
}

/// Whether the error, or what caused it, says that the read model cannot be reached: no event is to blame for that.
pub(super) fn is_outage(read_model: &impl ReadModel, error: &ApplyError) -> bool {
    causes(&**error).any(|cause| cause.is::<TargetUnavailable>()) || read_model.is_outage(&**error)
}

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> Run<'_, P, R> {
    /// Applies as many of the pending events as go into one transaction.
    pub(super) async fn apply_pending(&mut self, saved: Checkpoint, pending: Pending) {
        let suspected = self.suspect.as_ref().map_or(pending.events.len(), |suspect| {
            pending.events.partition_point(|event| event.position < suspect.position)
        });
        let count = match &self.suspect {
            Some(suspect) if suspected == 0 => {
                if suspect.hopeless || suspect.attempts >= self.context.options.attempts {
                    return self.give_up(saved, pending).await;
                }
                if suspect.due > Instant::now() {
                    let due = suspect.due;
                    self.pending = Some(pending);
                    return self.idle(due).await;
                }
                // Alone, so that it takes nobody with it.
                1
            }
            _ => suspected.min(self.context.options.batch),
        };
        let timer = Timer::start();
        let mut open = match self.read_model.begin(&self.row, saved).await {
            Ok(open) => open,
            Err(error) => {
                self.pending = Some(pending);
                return self.outage(&error);
            }
        };
        let mut applied = 0;
        let mut failure = None;
        for event in pending.events.iter().take(count) {
            let transaction = self.read_model.transaction(&mut open);
            match apply(&mut self.instance.projection, event, transaction).await {
                Ok(()) => applied += 1,
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        let Some(error) = failure else {
            self.commit(open, saved, pending, count).await;
            return self.context.metrics.applied(&self.context.name, timer);
        };
        let outage = is_outage(self.read_model, &error);
        if !outage {
            self.suspect_of(&pending, applied, &error);
        }
        if applied > 0 && !self.read_model.rolls_back() {
            self.commit(open, saved, pending, applied).await;
            // Otherwise the commit has failed, and that is what is waited for.
            if self.saved.is_none() {
                return;
            }
        } else {
            self.pending = Some(pending);
            self.roll_back(open).await;
        }
        if outage {
            self.outage(&*error);
        }
    }

    /// Remembers which event failed, and how often.
    fn suspect_of(&mut self, pending: &Pending, index: usize, error: &ApplyError) {
        let Some(event) = pending.events.get(index) else { return };
        let options = &self.context.options;
        let before = self.suspect.take().filter(|suspect| suspect.position == event.position);
        let attempts = before.map_or(0, |suspect| suspect.attempts) + 1;
        let (first, max) = options.backoff;
        let mut backoff = Backoff::new(first.saturating_mul(2_u32.saturating_pow(attempts - 1)), max);
        tracing::warn!(
            projection = self.context.name, position = %event.position, stream = %event.stream, event = %event.name, attempts,
            %error, "an event could not be applied"
        );
        let text = format!(
            "{} at position {} (version {} of {}) could not be applied: {error}",
            event.name, event.position, event.version, event.stream
        );
        self.context.fail(ProjectionState::Retrying, text);
        self.suspect = Some(Suspect {
            position: event.position,
            attempts,
            error: error.to_string(),
            hopeless: is_undecodable(error),
            due: Instant::now() + backoff.next(),
        });
    }

    /// Commits the first `count` pending events.
    async fn commit(&mut self, open: R::Open, saved: Checkpoint, mut pending: Pending, count: usize) {
        let all = count == pending.events.len();
        let last = if all { None } else { pending.events.get(count - 1) };
        let to = Checkpoint { position: last.map_or(pending.upto, |event| event.position), ..saved };
        if let Err(error) = self.read_model.commit(open, &self.row, saved, to, None).await {
            return self.refused(&error);
        }
        self.backoff.succeeded();
        pending.events.drain(..count);
        self.committed(to, pending, |status| status.events_applied += count as u64);
    }

    /// The checkpoint is at `to`; goes on with what is left.
    fn committed(&mut self, to: Checkpoint, left: Pending, count: impl FnOnce(&mut ProjectionStatus)) {
        self.saved = Some(to);
        self.applied = to.position;
        self.timing.applied();
        self.tell_applied();
        if self.suspect.as_ref().is_some_and(|suspect| suspect.position <= to.position) {
            self.suspect = None;
        }
        self.context.status.send_modify(|status| {
            count(status);
            status.position = to.position;
            status.head = status.head.max(to.position);
            if self.suspect.is_none() && status.state == ProjectionState::Retrying {
                status.state = ProjectionState::CatchingUp;
            }
        });
        if left.events.is_empty() {
            // Behind the last event there may have been some that are none of this projection's business.
            self.enqueue(left.events, left.upto);
        } else {
            self.pending = Some(left);
        }
    }

    /// The first pending event will not be applied: what then, says the policy.
    async fn give_up(&mut self, saved: Checkpoint, mut pending: Pending) {
        let (Some(suspect), Some(event)) = (&self.suspect, pending.events.front()) else { return };
        let context = self.context;
        match context.options.on_failure {
            FailurePolicy::Stop => {
                tracing::error!(
                    projection = context.name, position = %event.position, stream = %event.stream, event = %event.name,
                    attempts = suspect.attempts, error = suspect.error, "the projection stands still before this event"
                );
                self.stand_still();
            }
            FailurePolicy::Park => {
                let parked = ParkedEvent::new(event, suspect.error.clone(), suspect.attempts);
                let to = Checkpoint { position: event.position, ..saved };
                let open = match self.read_model.begin(&self.row, saved).await {
                    Ok(open) => open,
                    Err(error) => {
                        self.pending = Some(pending);
                        return self.outage(&error);
                    }
                };
                if let Err(error) = self.read_model.commit(open, &self.row, saved, to, Some(parked)).await {
                    return self.refused(&error);
                }
                tracing::error!(
                    projection = context.name, position = %event.position, stream = %event.stream, event = %event.name,
                    attempts = suspect.attempts, error = suspect.error, "the event was parked, and the projection goes on"
                );
                self.backoff.succeeded();
                pending.events.pop_front();
                self.committed(to, pending, |status| status.events_parked += 1);
            }
        }
    }
}
