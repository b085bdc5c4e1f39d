//! Notices of waits in the log.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use tokio::time::timeout;

/// Time without a result until a log line reports the wait.
const QUIET: Duration = Duration::from_secs(1);

/// Runs `work`, and logs a warning if it takes longer than a second.
///
/// `reason` is what the work waits for, if that is known by then.
pub(crate) async fn with_notice<T>(
    what: &str,
    limit: Duration,
    reason: impl Fn() -> Option<String>,
    work: impl Future<Output = T>,
) -> T {
    let mut work = pin!(work);
    if let Ok(done) = timeout(QUIET, &mut work).await {
        return done;
    }
    let reason = reason().unwrap_or_else(|| "no answer yet".into());
    tracing::warn!("{what}: waiting ({reason}); giving up after {limit:?}");
    work.await
}
