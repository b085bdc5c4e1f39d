//! Calls the user's code, catches its panics and recognizes transient errors.

use std::error::Error;
use std::future::Future;
use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;

use crate::event::RecordedEvent;
use crate::outage;
use crate::panic::panic_text;
use crate::projection::{ApplyError, ControlError, Projection, TargetUnavailable, WaitError};
use crate::transient::causes;

/// Decodes and applies one event; a panic becomes an error.
pub(super) async fn apply<P: Projection>(
    projection: &mut P,
    event: &RecordedEvent,
    transaction: &mut P::Transaction,
) -> Result<(), ApplyError> {
    catch_panic(async { projection.apply(event.decode()?, event, transaction).await }).await
}

pub(super) async fn catch_panic(
    user: impl Future<Output = Result<(), ApplyError>>,
) -> Result<(), ApplyError> {
    match AssertUnwindSafe(user).catch_unwind().await {
        Ok(result) => result,
        Err(panic) => Err(format!("the projection panicked: {}", panic_text(&*panic)).into()),
    }
}

/// Returns whether the error, or one of its causes, is transient and no fault of the event.
pub(super) fn is_outage(error: &ApplyError) -> bool {
    let transient = |cause: &(dyn Error + 'static)| {
        let control = cause.downcast_ref::<ControlError>().is_some_and(ControlError::is_transient);
        cause.is::<TargetUnavailable>()
            || control
            || cause.downcast_ref::<WaitError>().is_some_and(WaitError::is_transient)
    };
    causes(&**error).any(transient) || outage::is_outage(&**error)
}
