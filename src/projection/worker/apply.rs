//! Application of pending events: transactions, and the handling of a failing event.

use chrono::{DateTime, Utc};
use tokio::time::Instant;

use super::reading::{Pending, Suspect};
use super::task::ProjectionTask;
use super::user_code::{apply, is_outage};
use crate::backoff::Backoff;
use crate::event::{DecodeError, DecodeErrorKind, Position, RecordedEvent};
use crate::projection::{
    ApplyError, FailurePolicy, Projection, ProjectionState, ProjectionStatus, ReadModel, UnknownNames,
};
use crate::store::{Checkpoint, CheckpointError, CheckpointKey, ParkedEvent, ProgressWrite, StoreError};
use crate::transient::causes;

/// Number of transactions in a row that must become unusable, while others succeed, until an event
/// is the cause. An outage may end between the two: a server that becomes a standby is read-only,
/// and the next connection reaches the new primary.
const UNUSABLE: u32 = 3;

/// Returns why this event's bytes cannot be decoded, if the error or one of its causes says so.
///
/// A retry cannot succeed then. A decode error of another event, which the projection may have
/// read, does not count.
fn undecodable<'e>(error: &'e ApplyError, event: &RecordedEvent) -> Option<&'e DecodeErrorKind> {
    causes(&**error)
        .filter_map(|cause| cause.downcast_ref::<DecodeError>())
        .find(|error| error.stream == event.stream && error.version == event.version)
        .map(|error| &error.kind)
}

/// Returns whether a transaction without events succeeds.
async fn commits_without_events(read_model: &impl ReadModel, key: &CheckpointKey, saved: Checkpoint) -> bool {
    let write = ProgressWrite::Checkpoint { key: key.clone(), from: saved, to: saved };
    match read_model.begin(&key.projection, saved, None).await {
        Ok(open) => read_model.commit(open, vec![write]).await.is_ok(),
        Err(_) => false,
    }
}

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionTask<'_, P, R> {
    /// Returns the time of the next attempt, if the first pending event has failed and must wait.
    pub(super) fn left_alone(&self) -> Option<Instant> {
        let reading = self.state.reading()?;
        let (suspect, first) = (reading.suspect.as_ref()?, reading.pending.as_ref()?.events.front()?);
        let retryable = !suspect.permanent && suspect.attempts < self.context.options.attempts;
        (retryable && first.position >= suspect.position && suspect.retry_at > Instant::now())
            .then_some(suspect.retry_at)
    }

    /// Applies as many of the pending events as fit into one transaction.
    pub(super) async fn apply_pending(&mut self, saved: Checkpoint, pending: Pending) {
        let suspected = self.state.suspect().map_or(pending.events.len(), |suspect| {
            pending.events.partition_point(|event| event.position < suspect.position)
        });
        let count = match self.state.suspect() {
            Some(suspect) if suspected == 0 => {
                if suspect.permanent || suspect.attempts >= self.context.options.attempts {
                    return self.give_up(saved, pending).await;
                }
                // Alone, so that its failure rolls back no other event.
                1
            }
            _ => suspected.min(self.batching.size.get()),
        };
        let transaction_timeout = self.context.options.transaction_timeout;
        let begun =
            self.read_model.begin(&self.context.name, saved, Some(self.context.transaction_limit())).await;
        let mut open = match begun {
            Ok(open) => open,
            Err(error) => {
                self.state.set_pending(pending);
                return self.on_unavailable(&error);
            }
        };
        // Not earlier: a smaller batch would wait for a connection as long.
        let began = Instant::now();
        let mut applied = 0;
        let mut failure = None;
        // A slow batch is committed early, long before the time limit of its transaction.
        let enough = transaction_timeout / 2;
        for event in pending.events.iter().take(count) {
            if applied > 0 && (began.elapsed() >= enough || self.inbox.is_stopping()) {
                break;
            }
            self.set_applying(Some(event.position));
            let transaction = self.read_model.transaction(&mut open);
            match apply(&mut self.instance.projection, event, transaction).await {
                Ok(()) => applied += 1,
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        self.set_applying(None);
        let Some(error) = failure else { return self.commit(open, saved, pending, applied, began).await };
        let mut outage = is_outage(&error);
        if self.read_model.rolls_back() {
            self.roll_back(open).await;
            if outage && self.read_model.may_be_of_event(&*error) {
                let alone = commits_without_events(self.read_model, &self.key, saved).await;
                outage = !self.is_of_event(alone);
            }
            if !outage {
                self.suspect_of(&pending, applied, &error);
            }
            self.state.set_pending(pending);
        } else {
            if !outage {
                self.suspect_of(&pending, applied, &error);
            }
            if applied > 0 {
                self.commit(open, saved, pending, applied, began).await;
                // Otherwise the commit has failed, and its error decides about the retry.
                if self.state.owning().is_none() {
                    return;
                }
            } else {
                self.state.set_pending(pending);
                self.roll_back(open).await;
            }
        }
        if outage {
            self.on_unavailable(&*error);
        }
    }

    fn set_applying(&mut self, event: Option<Position>) {
        if let Some(reading) = self.state.reading_mut() {
            reading.applying = event;
        }
    }

    /// Returns whether the database rejected the writes at the commit, so that all were rolled
    /// back.
    fn is_refusal(&self, error: &StoreError) -> bool {
        let definite = matches!(error, StoreError::Invalid { .. } | StoreError::Storage { .. });
        definite && self.read_model.rolls_back() && !self.read_model.is_outage(error)
    }

    /// Returns whether an event made the transaction unusable, as far as one without events shows:
    /// `alone` states whether that one succeeded just now.
    fn is_of_event(&mut self, alone: bool) -> bool {
        let unusable = &mut self.batching.unusable;
        *unusable = if alone { unusable.saturating_add(1) } else { 0 };
        *unusable >= UNUSABLE
    }

    /// Records which event failed, and the number of attempts.
    fn suspect_of(&mut self, pending: &Pending, index: usize, error: &ApplyError) {
        let Some(event) = pending.events.get(index) else { return };
        let options = &self.context.options;
        let before = self.state.suspect().filter(|suspect| suspect.position == event.position);
        let attempts = before.map_or(0, |suspect| suspect.attempts) + 1;
        let (first, max) = options.backoff;
        let mut backoff = Backoff::new(first.saturating_mul(2_u32.saturating_pow(attempts - 1)), max);
        tracing::warn!(
            projection = self.context.name, position = %event.position, stream = %event.stream, event = %event.name, attempts,
            %error, "could not apply an event"
        );
        let undecodable = undecodable(error, event);
        let unknown_event =
            options.unknown_names == UnknownNames::Skip && undecodable == Some(&DecodeErrorKind::UnknownName);
        let text = format!(
            "applying {} at position {} (version {} of {}) failed: {error}",
            event.name, event.position, event.version, event.stream
        );
        self.context.fail(ProjectionState::Retrying, text);
        let suspect = Suspect {
            position: event.position,
            attempts,
            error: error.to_string(),
            permanent: undecodable.is_some(),
            unknown_event,
            retry_at: Instant::now() + backoff.next(),
        };
        if let Some(reading) = self.state.reading_mut() {
            reading.suspect = Some(suspect);
        }
    }

    /// Commits the first `count` pending events in a transaction that began at `began`.
    async fn commit(
        &mut self,
        open: R::Open,
        saved: Checkpoint,
        mut pending: Pending,
        count: usize,
        began: Instant,
    ) {
        let all = count == pending.events.len();
        let last = if all { None } else { pending.events.get(count - 1) };
        let to = Checkpoint { position: last.map_or(pending.upto, |event| event.position), ..saved };
        let write = ProgressWrite::Checkpoint { key: self.key.clone(), from: saved, to };
        let ended = self.read_model.commit(open, vec![write]).await;
        if let Err(CheckpointError::Store(error)) = &ended {
            let mut of_event = self.is_refusal(error);
            if !of_event && self.read_model.rolls_back() && self.read_model.may_be_of_event(error) {
                let alone = commits_without_events(self.read_model, &self.key, saved).await;
                of_event = self.is_of_event(alone);
            }
            if of_event {
                // The database checks some constraints only at the commit, and does not report which
                // event broke one. Nor does it report who made the transaction unusable.
                match count {
                    1 => self.suspect_of(&pending, 0, &ApplyError::from(error.clone())),
                    _ => self.batching.size.one(),
                }
                self.state.set_pending(pending);
                return;
            }
        }
        if let Err(error) = ended {
            return self.on_checkpoint_error(error);
        }
        self.retry.succeeded();
        let took = began.elapsed();
        self.batching.size.took(count, took);
        self.context.metrics.applied(&self.context.name, took);
        let last = pending.events.drain(..count).next_back();
        let oldest = last.map(|event| event.recorded_at);
        self.committed(to, pending, oldest, |status| status.events_applied += count as u64);
        self.snapshot_behind(count as u64).await;
    }

    /// Records the checkpoint `to`, with the recorded time `last`; continues with the remaining
    /// events.
    fn committed(
        &mut self,
        to: Checkpoint,
        left: Pending,
        last: Option<DateTime<Utc>>,
        count: impl FnOnce(&mut ProjectionStatus),
    ) {
        self.state.committed(to);
        self.batching.unusable = 0;
        self.timing.applied();
        self.report_applied();
        self.context.status.send_modify(|status| {
            count(status);
            let next = left.events.front().map(|event| event.recorded_at);
            status.moved_to(to.position, next.or(last));
            if self.state.suspect().is_none() && status.state == ProjectionState::Retrying {
                status.state = ProjectionState::CatchingUp;
            }
        });
        if left.events.is_empty() {
            // After the last event, there may have been events of other projections.
            self.enqueue(left.events, left.upto);
        } else {
            self.state.set_pending(left);
        }
    }

    /// Stops before the first pending event, or skips or parks it, as the options say.
    async fn give_up(&mut self, saved: Checkpoint, mut pending: Pending) {
        let (Some(suspect), Some(event)) = (self.state.suspect(), pending.events.front()) else { return };
        let context = self.context;
        let (name, attempts, error) = (&context.name, suspect.attempts, &suspect.error);
        let parked = if suspect.unknown_event {
            None
        } else if context.options.on_failure == FailurePolicy::Park {
            Some(ParkedEvent::new(event, error.clone(), attempts))
        } else {
            tracing::error!(
                projection = name, position = %event.position, stream = %event.stream, event = %event.name, attempts, error,
                "stopped the projection before this event"
            );
            return self.stop();
        };
        let to = Checkpoint { position: event.position, ..saved };
        let open = match self.read_model.begin(name, saved, None).await {
            Ok(open) => open,
            Err(error) => {
                self.state.set_pending(pending);
                return self.on_unavailable(&error);
            }
        };
        let parks = parked.is_some();
        let mut writes = vec![ProgressWrite::Checkpoint { key: self.key.clone(), from: saved, to }];
        writes.extend(parked.map(|event| ProgressWrite::Park { key: self.key.clone(), event }));
        if let Err(error) = self.read_model.commit(open, writes).await {
            return self.on_checkpoint_error(error);
        }
        if parks {
            tracing::error!(
                projection = name, position = %event.position, stream = %event.stream, event = %event.name, attempts, error,
                "parked the event; the projection continues"
            );
        } else {
            tracing::info!(
                projection = name, position = %event.position, stream = %event.stream, event = %event.name,
                "skipped an event with an unknown name"
            );
        }
        self.retry.succeeded();
        let last = pending.events.pop_front().map(|event| event.recorded_at);
        self.committed(to, pending, last, |status| {
            *if parks { &mut status.events_parked } else { &mut status.events_skipped } += 1;
        });
        self.snapshot_behind(1).await;
    }
}
