//! What follows a failed call of an append: a look-up, another attempt or an error.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::super::{Append, StoreError};
use super::append_call::Outcome;
use super::append_failure::{CommitHandle, DOING, Failure};
use super::commit_recovery;
use super::inner::PgInner;

/// Maximum number of times the same events are sent, on the server's request or after a proven
/// loss.
const ATTEMPTS: u32 = 8;
/// Maximum number of lost races of an append without an exact expected version.
///
/// In each race another append succeeds.
const LOST_RACES: u32 = 1_000;

/// The failed calls of an append.
pub(super) struct AppendRetry<'a> {
    core: &'a Arc<PgInner>,
    attempts: u32,
    lost_races: u32,
    other_servers: u32,
}

impl<'a> AppendRetry<'a> {
    pub(super) fn new(core: &'a Arc<PgInner>) -> Self {
        Self { core, attempts: 0, lost_races: 0, other_servers: 0 }
    }

    /// Returns after a failed call when its appends may be sent again.
    ///
    /// If the call got no answer, looks up its events and returns the outcome of each append.
    ///
    /// # Errors
    /// The error of the appends, if there is no further attempt.
    pub(super) async fn after(
        &mut self,
        failure: Failure,
        appends: &[&Append],
    ) -> Result<Vec<Outcome>, StoreError> {
        match failure {
            Failure::VersionRace if self.lost_races < LOST_RACES => {
                self.lost_races += 1;
                pause(self.lost_races).await;
            }
            Failure::VersionRace => {
                let reason = format!("{DOING}: other writers were faster in every attempt; retry later");
                return Err(StoreError::Unavailable { reason, source: None });
            }
            Failure::OtherServer if self.other_servers < ATTEMPTS => self.other_servers += 1,
            Failure::OtherServer => {
                let reason = format!("{DOING}: every attempt reached another server process; retry later");
                return Err(StoreError::Unavailable { reason, source: None });
            }
            Failure::Retry(error) | Failure::NotSent(error) => {
                self.attempts += 1;
                if self.attempts >= ATTEMPTS {
                    return Err(error);
                }
                tracing::debug!(%error, attempts = self.attempts, "retrying append");
                pause(self.attempts).await;
            }
            Failure::Unknown(error, handle) => {
                let mut found = look_up(self.core, appends, &error, handle).await?;
                self.attempts += 1;
                if self.attempts >= ATTEMPTS {
                    for outcome in &mut found {
                        outcome.get_or_insert_with(|| Err(error.clone().into()));
                    }
                }
                return Ok(found);
            }
            Failure::Failed(error) => return Err(error),
        }
        Ok(Vec::new())
    }
}

/// Looks up the events of a call that got no answer. Appends without events are to be retried.
///
/// # Errors
/// `OutcomeUnknown` if the look-up fails.
async fn look_up(
    core: &Arc<PgInner>,
    appends: &[&Append],
    error: &StoreError,
    handle: CommitHandle,
) -> Result<Vec<Outcome>, StoreError> {
    match commit_recovery::resolve_unknown_commit(core, appends, handle).await {
        Ok(found) => {
            tracing::warn!(
                %error,
                happened = found.iter().flatten().count(),
                of = appends.len(),
                "append got no answer; looked up its events"
            );
            Ok(found.into_iter().map(|appended| appended.map(Ok)).collect())
        }
        Err(lookup) => Err(StoreError::OutcomeUnknown {
            reason: format!("{error}; looking up the events failed: {lookup}"),
            source: Some(Arc::new(error.clone())),
        }),
    }
}

/// Waits before a retry: longer with each retry, with jitter between competing writers.
async fn pause(times: u32) {
    let jitter = f64::from(Uuid::new_v4().as_fields().0) / f64::from(u32::MAX);
    let longest = Duration::from_micros(500) * times.min(60);
    tokio::time::sleep(longest.mul_f64(jitter)).await;
}
