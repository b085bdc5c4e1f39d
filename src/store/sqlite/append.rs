//! Appends a batch with few statements, because each costs a hop to the connection's thread.
//!
//! If the cache knows all numbers and versions that a batch needs, one hop begins the transaction,
//! inserts the events and commits. Otherwise a look-up precedes it, for what is unknown only. If an
//! event violates the key of its stream, or the cache is of another log, the transaction is rolled
//! back, and the batch is appended again with everything looked up.

mod boundaries;
mod insert;
mod look_up;
mod statements;

use std::collections::HashMap;

use sqlx::Executor;
use sqlx::sqlite::SqliteConnection;

use self::boundaries::BoundaryCheck;
use self::insert::{EventRow, NewStream};
pub(super) use self::statements::DOING;
use super::super::append::SizeLimits;
use super::super::version_check::StreamVersions;
use super::super::{Append, AppendError, Appended, StoreError};
use super::error::{failed, is_key_violation, is_missing_anchor};
use super::number_cache::{Anchor, Facts, NumberCache};
use crate::event::{Position, StreamId, Version};

/// SQLite limits a row to 1,000,000,000 bytes; the other columns are small.
pub(super) const LIMITS: SizeLimits = SizeLimits { event: 999_000_000, batch: usize::MAX };

/// The result of a written batch.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) answers: Vec<Result<Appended, AppendError>>,
    /// Last written event: if it is in the log, all are.
    pub(super) proof: Option<Anchor>,
}

/// The reason why a batch was not written.
#[derive(Debug)]
pub(super) enum Failure {
    /// Nothing was written.
    Refused(StoreError),
    /// The commit failed, so probably no data was written.
    Commit(StoreError, Written),
    /// Facts of the cache were wrong: newer events of another process, or another log.
    Outdated { is_other_log: bool, error: StoreError },
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Refused(error)
    }
}

impl From<look_up::Failure> for Failure {
    fn from(failure: look_up::Failure) -> Self {
        match failure {
            look_up::Failure::Statement(error) => refused(error),
            look_up::Failure::Store(error) => Self::Refused(error),
        }
    }
}

/// Converts the error of a statement before the commit.
fn refused(error: sqlx::Error) -> Failure {
    let (is_other_log, is_key_violation) = (is_missing_anchor(&error), is_key_violation(&error));
    let error = failed(DOING, error);
    if is_other_log || is_key_violation {
        Failure::Outdated { is_other_log, error }
    } else {
        Failure::Refused(error)
    }
}

/// Writes a batch in a transaction of its own.
///
/// Returns the connection, unless it may have an open transaction. If the call is dropped, the
/// connection closes: SQLite rolls the transaction back, or the commit was already under way.
pub(super) async fn append(
    mut connection: SqliteConnection,
    batch: &[Append],
    cache: &NumberCache,
) -> (Result<Written, Failure>, Option<SqliteConnection>) {
    let mut facts = cache.facts(batch);
    loop {
        let looks_up_all = facts.anchor.is_none();
        let result = attempt(&mut connection, batch, facts, cache).await;
        let clean = match &result {
            Ok(written) if written.proof.is_some() => true,
            // Only refused appends: the transaction is open and empty.
            _ => connection.execute("ROLLBACK").await.is_ok(),
        };
        match result {
            Err(Failure::Outdated { is_other_log, .. }) if clean && !looks_up_all => {
                if is_other_log {
                    tracing::warn!("the event store was replaced by another log while it was open");
                    cache.clear();
                }
                facts = Facts::default();
            }
            result => return (result, clean.then_some(connection)),
        }
    }
}

/// Tries to write a batch, based on `facts`.
async fn attempt<'b>(
    connection: &mut SqliteConnection,
    batch: &'b [Append],
    mut facts: Facts<'b>,
    cache: &NumberCache,
) -> Result<Written, Failure> {
    let parts = || batch.iter().flat_map(|append| &append.streams);
    let unknown: Vec<&StreamId> =
        parts().map(|part| &part.stream).filter(|stream| !facts.streams.contains_key(stream)).collect();
    let mut begun = false;
    let mut last_number = 0;
    if !unknown.is_empty() {
        last_number = look_up::streams(connection, &mut facts, &unknown).await?;
        begun = true;
    }
    let (boundaries, mut begun) = BoundaryCheck::look_up(connection, &facts, batch, begun).await?;
    let versions = facts.streams.iter().map(|(stream, fact)| ((*stream).clone(), fact.version)).collect();
    // Without boundaries, the positions count from the end of the log, which the insert finds.
    let versions = StreamVersions::new(versions, boundaries.end);
    let mut answers = decide(batch, versions, boundaries);
    let accepted: Vec<(&Append, &Appended)> = batch
        .iter()
        .zip(&answers)
        .filter_map(|(append, answer)| Some((append, answer.as_ref().ok()?)))
        .collect();
    if accepted.is_empty() {
        return Ok(Written { answers, proof: None });
    }
    begun |= look_up::names(connection, &mut facts, &accepted, begun).await?;
    let (rows, created) = rows(&accepted, &facts, last_number)?;
    let Some(last_id) = rows.last().map(|row| row.event.id) else {
        return Ok(Written { answers, proof: None });
    };
    let inserted = insert::insert_and_commit(connection, &rows, &created, facts.anchor, begun).await;
    let (end, commit) = match inserted {
        Ok(end) => (end, Ok(())),
        Err(insert::Failure::Commit(end, error)) => (end, Err(error)),
        Err(insert::Failure::Insert(error)) => return Err(refused(error)),
        Err(insert::Failure::Store(error)) => return Err(error.into()),
    };
    let streams: Vec<(&StreamId, i64, Version)> = ends(&accepted, &facts, &created);
    let names = std::mem::take(&mut facts.names);
    drop((rows, accepted));
    let last = answers.iter().flatten().filter_map(|appended| appended.positions.last()).max();
    let before = end.get() - last.map_or(0, |last| last.get());
    for position in answers.iter_mut().flatten().flat_map(|appended| &mut appended.positions) {
        *position = Position::new(before + position.get());
    }
    let written = Written { answers, proof: Some((end, last_id)) };
    match commit {
        Ok(()) => {
            cache.committed((end, last_id), streams, &names);
            Ok(written)
        }
        Err(error) => Err(Failure::Commit(failed(DOING, error), written)),
    }
}

/// Accepts or refuses each append, in their order.
fn decide<'b>(
    batch: &'b [Append],
    mut versions: StreamVersions,
    mut boundaries: BoundaryCheck<'b>,
) -> Vec<Result<Appended, AppendError>> {
    let mut decide_one = |index: usize, append: &'b Append| -> Result<Appended, AppendError> {
        boundaries.check(index, append)?;
        let appended = versions.assign(append)?;
        boundaries.accept(append, &appended);
        Ok(appended)
    };
    batch.iter().enumerate().map(|(index, append)| decide_one(index, append)).collect()
}

/// Returns the rows of the accepted appends, and the streams that they create.
fn rows<'b>(
    accepted: &[(&'b Append, &Appended)],
    facts: &Facts<'b>,
    last_number: i64,
) -> Result<(Vec<EventRow<'b>>, Vec<NewStream<'b>>), StoreError> {
    let number = |name: &str| {
        facts.names.get(name).copied().ok_or_else(|| StoreError::Corrupt {
            reason: format!("{DOING}: storied_names has no number for {name:?}"),
        })
    };
    let mut created: Vec<NewStream<'b>> = Vec::new();
    let mut rows = Vec::with_capacity(accepted.len());
    for (append, appended) in accepted {
        for (part, end) in append.streams.iter().zip(&appended.versions) {
            let category = number(part.stream.category())?;
            let stream = match facts.streams.get(&part.stream).and_then(|fact| fact.number) {
                Some(number) => number,
                None => {
                    let number = last_number + 1 + created.len() as i64;
                    created.push(NewStream { number, category, stream: &part.stream });
                    number
                }
            };
            let before = end.get() - part.events.len() as u64;
            for (event, n) in part.events.iter().zip(1..) {
                let name = number(event.name.as_str())?;
                rows.push(EventRow { stream, version: before + n, category, name, event });
            }
        }
    }
    Ok((rows, created))
}

/// Returns the new versions of all streams of the accepted appends, with their numbers.
fn ends<'b>(
    accepted: &[(&'b Append, &Appended)],
    facts: &Facts<'b>,
    created: &[NewStream<'b>],
) -> Vec<(&'b StreamId, i64, Version)> {
    let created: HashMap<&StreamId, i64> = created.iter().map(|new| (new.stream, new.number)).collect();
    let parts = accepted.iter().flat_map(|(append, appended)| append.streams.iter().zip(&appended.versions));
    parts
        .filter_map(|(part, version)| {
            let known = facts.streams.get(&part.stream).and_then(|fact| fact.number);
            let number = known.or_else(|| created.get(&part.stream).copied())?;
            Some((&part.stream, number, *version))
        })
        .collect()
}
