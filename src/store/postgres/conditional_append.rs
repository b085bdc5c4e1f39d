//! Appends under a condition: no event crosses the boundary of a decision (I13).
//!
//! Each is a transaction of its own. It locks tags of its query exclusively, and never waits long
//! for them, because appends of others would wait with it. While others use the tags, it backs off.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use super::super::{Append, AppendError, Appended, Boundary, StoreError};
use super::append_call::{Condition, Outcome, call};
use super::append_failure::DOING;
use super::append_retry::AppendRetry;
use super::inner::PgInner;
use crate::backoff::Backoff;

/// Number of attempts that do not wait for tags. Later ones wait for a moment, in the queue of the
/// locks, because a tag in constant use is never free by chance.
const TRIES: u32 = 5;

/// Shortest and longest wait between two attempts.
const BACKOFF: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(20)];

/// Time without success after which the append fails.
const PATIENCE: Duration = Duration::from_secs(10);

/// Appends unless an event crosses `boundary`.
pub(super) async fn append_unless(
    core: &Arc<PgInner>,
    append: &Append,
    boundary: &Boundary,
) -> Result<Appended, AppendError> {
    let give_up = Instant::now() + PATIENCE;
    let mut retry = AppendRetry::new(core);
    let [shortest, longest] = BACKOFF;
    let mut backoff = Backoff::new(shortest, longest);
    let mut attempts = 0;
    loop {
        let condition = Condition { boundary, may_wait: attempts >= TRIES };
        let permit = timeout_at(give_up, core.conditional_permits.acquire(condition.may_wait)).await;
        let Ok(permit) = permit else { return Err(busy().into()) };
        let called = call(core, &[append], Some(condition)).await;
        drop(permit);
        match called {
            Ok(outcomes) => {
                if let Some(outcome) = first(outcomes) {
                    return outcome;
                }
                if Instant::now() >= give_up {
                    return Err(busy().into());
                }
                attempts += 1;
                sleep(backoff.next()).await;
            }
            Err(failure) => {
                if let Some(outcome) = first(retry.after(failure, &[append]).await?) {
                    return outcome;
                }
            }
        }
    }
}

fn first(outcomes: Vec<Outcome>) -> Option<Result<Appended, AppendError>> {
    outcomes.into_iter().flatten().next()
}

fn busy() -> StoreError {
    let reason = format!(
        "{DOING}: other transactions used the tags or streams of the decision for {PATIENCE:?}; retry later"
    );
    StoreError::Unavailable { reason, source: None }
}
