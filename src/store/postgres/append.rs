//! Appending: one round trip per batch, and the recovery of appends without an answer.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::super::{Append, AppendError, Appended, Conflict, StoreError};
use super::append_batch::{self, AppendGroup};
use super::append_call::call;
use super::append_outcome::{AppendOutcome, CommitHandle, DOING, Failure};
use super::commit_recovery;
use super::inner::PgInner;

/// Maximum number of times the same events are sent, on the server's request or after a proven
/// loss.
const ATTEMPTS: u32 = 8;
/// Maximum number of lost races of an append without an exact expected version.
///
/// In each race another append succeeds.
const LOST_RACES: u32 = 1_000;

/// Appends a batch. Once polled, it must run to completion.
pub(super) async fn append(core: &Arc<PgInner>, batch: &[Append]) -> Vec<Result<Appended, AppendError>> {
    let _appending = core.high_water_mark.appending();
    let mut answers: Vec<Option<Result<Appended, AppendError>>> = Vec::with_capacity(batch.len());
    let mut todo = Vec::with_capacity(batch.len());
    for (index, append) in batch.iter().enumerate() {
        answers.push(match append_batch::check(append) {
            Ok(()) => {
                todo.push(index);
                None
            }
            Err(error) => Some(Err(error.into())),
        });
    }
    let mut coalesce = true;
    while !todo.is_empty() {
        let plan = append_batch::plan(batch, &todo, coalesce);
        todo = plan.deferred;
        for call in &plan.calls {
            for (unit, outcome) in call.iter().zip(send_until_resolved(core, call).await) {
                if let AppendOutcome::Failed(StoreError::Invalid { .. }) = &outcome
                    && unit.appends.len() > 1
                {
                    // Each append is sent alone, to find the one that cannot be stored.
                    coalesce = false;
                    todo.extend(&unit.appends);
                    continue;
                }
                record_outcome(batch, unit, outcome, &mut answers, &mut todo);
            }
        }
        todo.sort_unstable();
    }
    let missing = || StoreError::Corrupt { reason: "an append received no result".into() };
    let answers: Vec<_> =
        answers.into_iter().map(|answer| answer.unwrap_or_else(|| Err(missing().into()))).collect();
    let last = answers.iter().flatten().filter_map(|appended| appended.positions.last()).max();
    if let Some(&last) = last {
        core.high_water_mark.announce(last);
    }
    answers
}

/// Answers the appends of a unit; appends to be decided again go back to `todo`.
fn record_outcome(
    batch: &[Append],
    unit: &AppendGroup<'_>,
    outcome: AppendOutcome,
    answers: &mut [Option<Result<Appended, AppendError>>],
    todo: &mut Vec<usize>,
) {
    let mut answer = |index: usize, result| {
        if let Some(answer) = answers.get_mut(index) {
            *answer = Some(result);
        }
    };
    match outcome {
        AppendOutcome::Appended(parts) => {
            if let ([_, _, ..], [(base, positions)]) = (unit.appends.as_slice(), parts.as_slice()) {
                // Several appends to one stream share the versions and positions of the unit.
                let (mut end, mut rest) = (*base, positions.as_slice());
                for &index in &unit.appends {
                    let events = batch
                        .get(index)
                        .map_or(0, |append| append.streams.iter().map(|part| part.events.len()).sum());
                    let (own, behind) = rest.split_at(events.min(rest.len()));
                    (end, rest) = (end.plus(own.len() as u64), behind);
                    answer(index, Ok(Appended { versions: vec![end], positions: own.to_vec() }));
                }
                return;
            }
            let versions = parts.iter().map(|(base, positions)| base.plus(positions.len() as u64)).collect();
            let positions = parts.into_iter().flat_map(|(_, positions)| positions).collect();
            if let Some(&index) = unit.appends.first() {
                answer(index, Ok(Appended { versions, positions }));
            }
        }
        AppendOutcome::Conflict(part, actual) => {
            let mut appends = unit.appends.iter().copied();
            let (Some(first), Some(part)) = (appends.next(), unit.parts.get(part)) else { return };
            let (stream, expected) = (part.stream.clone(), part.expected);
            let conflict = Conflict { stream, expected, actual: Some(actual) };
            answer(first, Err(conflict.into()));
            // They were merged with the first on the assumption that it succeeds.
            todo.extend(appends);
        }
        AppendOutcome::VersionRace => {
            let reason = format!("{DOING}: other writers were faster in every attempt; retry later");
            for &index in &unit.appends {
                answer(index, Err(StoreError::Unavailable { reason: reason.clone(), source: None }.into()));
            }
        }
        AppendOutcome::Failed(error) => {
            for &index in &unit.appends {
                answer(index, Err(error.clone().into()));
            }
        }
    }
}

/// Sends calls until every unit has an outcome.
///
/// A call that the server refuses as a whole is split, until each unit that cannot be stored is
/// alone.
async fn send_until_resolved(core: &Arc<PgInner>, units: &[AppendGroup<'_>]) -> Vec<AppendOutcome> {
    let mut outcomes: Vec<Option<AppendOutcome>> = units.iter().map(|_| None).collect();
    let mut groups: Vec<Vec<usize>> = vec![(0..units.len()).collect()];
    while let Some(mut group) = groups.pop() {
        let (mut attempts, mut lost_races) = (0, 0);
        while !group.is_empty() {
            let members: Vec<&AppendGroup<'_>> = group.iter().filter_map(|&index| units.get(index)).collect();
            let failure = match call(core, &members).await {
                Ok(found) => {
                    group = file(group, found, &mut outcomes, lost_races >= LOST_RACES);
                    if !group.is_empty() {
                        lost_races += 1;
                        pause(lost_races).await;
                    }
                    continue;
                }
                Err(failure) => failure,
            };
            let error = match failure {
                Failure::Refused(_) if group.len() > 1 => {
                    groups.push(group.split_off(group.len() / 2));
                    groups.push(group);
                    break;
                }
                Failure::Refused(error) | Failure::Failed(error) => error,
                Failure::VersionRace if group.len() > 1 && lost_races > 0 => {
                    groups.push(group.split_off(group.len() / 2));
                    groups.push(group);
                    break;
                }
                Failure::VersionRace if lost_races < LOST_RACES => {
                    lost_races += 1;
                    pause(lost_races).await;
                    continue;
                }
                Failure::VersionRace => {
                    for index in group {
                        set(&mut outcomes, index, AppendOutcome::VersionRace);
                    }
                    break;
                }
                Failure::Retry(error) | Failure::NotSent(error) => {
                    attempts += 1;
                    if attempts < ATTEMPTS {
                        tracing::debug!(%error, attempts, "retrying append");
                        pause(attempts).await;
                        continue;
                    }
                    error
                }
                Failure::Unknown(error, handle) => match look_up(core, &members, &error, handle).await {
                    Ok(found) => {
                        group = file(group, found, &mut outcomes, false);
                        attempts += 1;
                        if attempts < ATTEMPTS {
                            continue;
                        }
                        error
                    }
                    Err(unknown) => unknown,
                },
            };
            for index in group {
                set(&mut outcomes, index, AppendOutcome::Failed(error.clone()));
            }
            break;
        }
    }
    let missing = || StoreError::Corrupt { reason: "an append received no outcome".into() };
    outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(|| AppendOutcome::Failed(missing()))).collect()
}

/// Looks up the events of a call that got no answer. Units without events are to be retried.
///
/// # Errors
/// `OutcomeUnknown` if the look-up fails.
async fn look_up(
    core: &Arc<PgInner>,
    members: &[&AppendGroup<'_>],
    error: &StoreError,
    handle: CommitHandle,
) -> Result<Vec<AppendOutcome>, StoreError> {
    match commit_recovery::resolve_unknown_commit(core, members, handle).await {
        Ok(found) => {
            tracing::warn!(
                %error,
                happened = found.iter().filter(|outcome| outcome.is_some()).count(),
                of = members.len(),
                "append got no answer; looked up its events"
            );
            Ok(found.into_iter().map(|outcome| outcome.unwrap_or(AppendOutcome::VersionRace)).collect())
        }
        Err(lookup) => Err(StoreError::OutcomeUnknown {
            reason: format!("{error}; looking up the events failed: {lookup}"),
            source: Some(Arc::new(error.clone())),
        }),
    }
}

fn set(outcomes: &mut [Option<AppendOutcome>], index: usize, outcome: AppendOutcome) {
    if let Some(slot) = outcomes.get_mut(index) {
        *slot = Some(outcome);
    }
}

/// Stores the outcomes of a group; returns the units to retry. With `all`, it returns none.
fn file(
    group: Vec<usize>,
    found: Vec<AppendOutcome>,
    outcomes: &mut [Option<AppendOutcome>],
    all: bool,
) -> Vec<usize> {
    let mut rest = Vec::new();
    for (index, outcome) in group.into_iter().zip(found) {
        match outcome {
            AppendOutcome::VersionRace if !all => rest.push(index),
            outcome => set(outcomes, index, outcome),
        }
    }
    rest
}

/// Waits before a retry: longer with each retry, with jitter between competing writers.
async fn pause(times: u32) {
    let jitter = f64::from(Uuid::new_v4().as_fields().0) / f64::from(u32::MAX);
    let longest = Duration::from_micros(500) * times.min(60);
    tokio::time::sleep(longest.mul_f64(jitter)).await;
}
