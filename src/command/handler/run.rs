//! One attempt at a command: check for a record, handle the command, record the outcome.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use bytes::Bytes;
use chrono::DateTime;
use futures_util::FutureExt;
use tokio::time::{Instant, timeout_at};
use tracing::Instrument;
use uuid::Uuid;

use super::context::HandlerContext;
use super::job::{AttemptResult, Shared};
use super::message::WorkerPermit;
use super::worker_slot::WorkerSlot;
use super::{HandleError, Handler};
use crate::codec::{from_cbor, to_cbor};
use crate::command::ExecuteError;
use crate::command::dispatcher::Dispatcher;
use crate::command::target::{RoutedCommand, ToHandler};
use crate::command::wire::{Done, Failure, Outcome, lost_reply};
use crate::panic::panic_text;
use crate::store::CommandRecord;
use crate::time::after;

/// Reads a record, and checks that it belongs to this command.
fn recorded<H: Handler>(record: &CommandRecord, fingerprint: Uuid) -> AttemptResult {
    if record.name != H::NAME || record.fingerprint != fingerprint {
        return AttemptResult::CommandIdReused;
    }
    match from_cbor(&record.outcome) {
        Ok(outcome) => AttemptResult::Recorded { outcome, before: true },
        Err(error) => AttemptResult::Unreadable(error),
    }
}

/// Runs an attempt. Returns its result, and whether it freed a worker slot.
pub(super) async fn run<H: Handler>(
    shared: Arc<Shared<H>>,
    job: RoutedCommand<ToHandler<H>>,
    worker: WorkerPermit<H>,
) -> (AttemptResult, bool) {
    let Some(commands) = shared.commands.upgrade() else {
        return (AttemptResult::Unknown("runtime has ended".into()), false);
    };
    let deadline = after(shared.options.time_limit);
    let slot = Arc::new(WorkerSlot::new(worker));
    let context = HandlerContext::new(commands.clone(), job.id, job.metadata.clone(), deadline, slot);
    let ran = attempt(&shared, &commands, &job, &context, deadline).await;
    (ran, context.end())
}

async fn attempt<H: Handler>(
    shared: &Shared<H>,
    commands: &Dispatcher,
    job: &RoutedCommand<ToHandler<H>>,
    context: &HandlerContext,
    deadline: Instant,
) -> AttemptResult {
    let (id, fingerprint) = (job.id, Uuid::from_u128(job.fingerprint));
    match shared.store.command(id).await {
        Ok(None) => {}
        Ok(Some(record)) => return recorded::<H>(&record, fingerprint),
        Err(error) => return AttemptResult::Store(error),
    }
    if let Err(reason) = commands.hooks.before(&job.info()) {
        return AttemptResult::Refused(reason);
    }
    let handling = AssertUnwindSafe(shared.handler.handle(&job.command, context)).catch_unwind();
    // Spans of the handler are children of the command's span.
    let handled = timeout_at(deadline, handling.instrument(job.span.span())).await;
    let Ok(handled) = handled else {
        let limit = shared.options.time_limit;
        return AttemptResult::Unknown(format!(
            "handler exceeded its time limit of {limit:?} (HandlerOptions::time_limit)"
        ));
    };
    let outcome = match handled {
        Ok(Ok(reply)) => to_cbor(&reply)
            .map(|reply| Outcome::Done(Done { reply, ..Done::default() }))
            .unwrap_or_else(|error| Outcome::Error(lost_reply(error))),
        Ok(Err(HandleError::Rejected(error))) => Outcome::Error(Failure::of(&ExecuteError::Rejected(error))),
        Ok(Err(HandleError::Failed(reason))) => {
            return AttemptResult::Unknown(format!("handler failed: {reason}"));
        }
        Err(panic) => return AttemptResult::Unknown(format!("handler panicked: {}", panic_text(&*panic))),
    };
    let encoded = match to_cbor(&outcome) {
        Ok(encoded) => Bytes::from(encoded),
        Err(error) => return AttemptResult::Unknown(error.to_string()),
    };
    let record = CommandRecord {
        id,
        name: H::NAME.to_owned(),
        fingerprint,
        outcome: encoded.clone(),
        recorded_at: DateTime::UNIX_EPOCH,
    };
    match shared.store.record_command(record).await {
        Ok(ours) if ours.name == H::NAME && ours.fingerprint == fingerprint && ours.outcome == encoded => {
            AttemptResult::Recorded { outcome, before: false }
        }
        // An attempt on another node recorded its outcome first. That record counts.
        Ok(other) => recorded::<H>(&other, fingerprint),
        Err(error) => AttemptResult::Unknown(format!("cannot record its outcome: {error}")),
    }
}
