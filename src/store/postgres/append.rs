//! Appending: one round trip per batch, and the recovery of appends without an answer.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::super::append::{SizeLimits, append_valid};
use super::super::{Append, AppendError, Appended, StoreError};
use super::append_call::{Outcome, call};
use super::append_failure::{CommitHandle, DOING, Failure};
use super::commit_recovery;
use super::inner::PgInner;

/// PostgreSQL limits to 1 GB the message and every structure built from it.
const LIMITS: SizeLimits = SizeLimits { event: 100_000_000, batch: 400_000_000 };
/// Maximum number of times the same events are sent, on the server's request or after a proven
/// loss.
const ATTEMPTS: u32 = 8;
/// Maximum number of lost races of an append without an exact expected version.
///
/// In each race another append succeeds.
const LOST_RACES: u32 = 1_000;

/// Appends a batch. Once polled, it must run to completion.
pub(super) async fn append(core: &Arc<PgInner>, batch: Vec<Append>) -> Vec<Result<Appended, AppendError>> {
    let _appending = core.high_water_mark.appending();
    let send = |batch| async move { send_until_resolved(core, batch).await };
    let answers = append_valid(batch, LIMITS, send).await;
    let last = answers.iter().flatten().filter_map(|appended| appended.positions.last()).max();
    if let Some(&last) = last {
        core.high_water_mark.announce(last);
    }
    answers
}

/// Sends calls until every append of the batch has an outcome.
async fn send_until_resolved(core: &Arc<PgInner>, batch: Vec<Append>) -> Vec<Result<Appended, AppendError>> {
    let mut outcomes: Vec<Outcome> = vec![None; batch.len()];
    let (mut attempts, mut lost_races, mut other_servers) = (0, 0, 0);
    let error = loop {
        let pending = || batch.iter().zip(&outcomes).filter(|(_, outcome)| outcome.is_none());
        let appends: Vec<&Append> = pending().map(|(append, _)| append).collect();
        if appends.is_empty() {
            break None;
        }
        let failure = match call(core, &appends).await {
            Ok(found) => {
                resolve(&mut outcomes, found);
                Failure::VersionRace
            }
            Err(failure) => failure,
        };
        match failure {
            Failure::VersionRace if outcomes.iter().all(Option::is_some) => {}
            Failure::VersionRace if lost_races < LOST_RACES => {
                lost_races += 1;
                pause(lost_races).await;
            }
            Failure::VersionRace => {
                let reason = format!("{DOING}: other writers were faster in every attempt; retry later");
                break Some(StoreError::Unavailable { reason, source: None });
            }
            Failure::OtherServer if other_servers < ATTEMPTS => other_servers += 1,
            Failure::OtherServer => {
                let reason = format!("{DOING}: every attempt reached another server process; retry later");
                break Some(StoreError::Unavailable { reason, source: None });
            }
            Failure::Retry(error) | Failure::NotSent(error) => {
                attempts += 1;
                if attempts == ATTEMPTS {
                    break Some(error);
                }
                tracing::debug!(%error, attempts, "retrying append");
                pause(attempts).await;
            }
            Failure::Unknown(error, handle) => match look_up(core, &appends, &error, handle).await {
                Ok(found) => {
                    resolve(&mut outcomes, found);
                    attempts += 1;
                    if attempts == ATTEMPTS {
                        break Some(error);
                    }
                }
                Err(unknown) => break Some(unknown),
            },
            Failure::Failed(error) => break Some(error),
        }
    };
    let error = error.unwrap_or_else(|| StoreError::Corrupt { reason: "an append got no outcome".into() });
    outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(|| Err(error.clone().into()))).collect()
}

/// Stores the outcomes of the appends that had none.
fn resolve(outcomes: &mut [Outcome], found: Vec<Outcome>) {
    for (slot, outcome) in outcomes.iter_mut().filter(|slot| slot.is_none()).zip(found) {
        *slot = outcome;
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
