//! Waiting for a store that is unreachable at startup.

use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use crate::backoff::Backoff;
use crate::event::Position;
use crate::notice::with_notice;
use crate::store::{EventStore, StoreError};
use crate::time::after;

/// Default time limit of a start.
pub(crate) const START_TIMEOUT: Duration = Duration::from_secs(30);

/// Reads the high-water mark of the log; retries for at most `limit` while the store is unreachable.
///
/// # Errors
/// The error of the last attempt.
pub(crate) async fn end_of_log(store: &dyn EventStore, limit: Duration) -> Result<Position, StoreError> {
    wait_for("reading the high-water mark", limit, || None, || store.high_water_mark()).await
}

/// Repeats `attempt` until it succeeds, fails permanently, or `limit` is over.
///
/// Each failure is a log line, and so is a first attempt of more than a second. Then `reason` is what
/// it waits for. A limit of zero means one attempt.
///
/// # Errors
/// The error of the last attempt.
pub(crate) async fn wait_for<T, F>(
    what: &'static str,
    limit: Duration,
    reason: impl Fn() -> Option<String>,
    mut attempt: impl FnMut() -> F,
) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    if limit.is_zero() {
        return attempt().await;
    }
    let deadline = after(limit);
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
    let mut last = None;
    loop {
        let attempt = async {
            match last {
                // Later attempts follow a log line.
                Some(_) => attempt().await,
                None => with_notice(what, limit, &reason, attempt()).await,
            }
        };
        match timeout_at(deadline, attempt).await {
            Ok(Err(error @ (StoreError::Unavailable { .. } | StoreError::OutcomeUnknown { .. }))) => {
                let wait = backoff.next();
                if Instant::now() + wait >= deadline {
                    return Err(error);
                }
                let left = deadline.saturating_duration_since(Instant::now());
                tracing::warn!(what, %error, ?left, "waiting for the event store");
                last = Some(error);
                sleep(wait).await;
            }
            Ok(result) => return result,
            Err(_) => {
                return Err(last.unwrap_or_else(|| {
                    let reason = format!("{what}: no answer within {limit:?}");
                    StoreError::Unavailable { reason, source: None }
                }));
            }
        }
    }
}
