//! What a call returns.

use sqlx::Row;
use sqlx::postgres::PgRow;

use super::super::convert::from_sql;
use super::super::numbers::SeenEvent;
use crate::event::{Position, RecordedEvent, StreamId, Version};
use crate::store::{Append, AppendError, Appended, Conflict};

/// The outcome of an append.
///
/// `None` if another writer was faster, but the expected versions may still hold, or if another
/// transaction uses tags of a condition. Nothing was written then.
pub(in crate::store::postgres) type Outcome = Option<Result<Appended, AppendError>>;

/// The outcomes of a call, and the transaction's id.
///
/// The id is present if the transaction wrote events and a later look-up may need it.
pub(super) struct Reply {
    pub(super) outcomes: Vec<Outcome>,
    pub(super) transaction: Option<String>,
    /// The only event and the position before it in the log, if every position up to there is
    /// decided.
    pub(super) settled: Option<(Position, RecordedEvent)>,
    /// The server process.
    pub(super) server: i64,
    /// The last events of the streams after the append.
    pub(super) seen: Vec<(StreamId, SeenEvent)>,
}

impl Reply {
    /// Decodes the result of `storied.append()`; the migration describes it.
    pub(super) fn decode(row: &PgRow, appends: &[&Append], server: i64) -> Result<Option<Self>, sqlx::Error> {
        let Some(streams) = row.try_get::<Option<Vec<Option<i64>>>, _>(0)? else { return Ok(None) };
        let found: Vec<i64> = row.try_get(1)?;
        let lost: Option<Vec<bool>> = row.try_get(2)?;
        let positions: Option<Vec<i64>> = row.try_get(3)?;
        let mut streams = streams.into_iter();
        let mut found = found.into_iter().map(|version| Version::new(from_sql(version)));
        let mut lost = lost.unwrap_or_default().into_iter();
        let mut positions =
            positions.unwrap_or_default().into_iter().map(|position| Position::new(from_sql(position)));
        let mut outcomes = Vec::with_capacity(appends.len());
        let mut seen = Vec::with_capacity(found.len());
        for append in appends {
            let mut appended = Appended { versions: Vec::new(), positions: Vec::new() };
            let mut refused: Option<Outcome> = None;
            let mut ends = Vec::with_capacity(append.streams.len());
            for part in &append.streams {
                let before = found.next().unwrap_or(Version::NONE);
                let lost = lost.next().unwrap_or_default();
                let conflict = || Conflict {
                    stream: part.stream.clone(),
                    expected: part.expected,
                    actual: Some(before),
                };
                if !part.expected.allows(before) {
                    refused.get_or_insert_with(|| Some(Err(conflict().into())));
                } else if lost {
                    refused.get_or_insert(None);
                }
                let version = before.plus(part.events.len() as u64);
                appended.versions.push(version);
                appended.positions.extend(positions.by_ref().take(part.events.len()));
                if let (Some(stream), Some(&position)) = (streams.next().flatten(), appended.positions.last())
                {
                    ends.push((part.stream.clone(), SeenEvent { stream, version, position }));
                }
            }
            if refused.is_none() {
                seen.append(&mut ends);
            }
            outcomes.push(refused.unwrap_or(Some(Ok(appended))));
        }
        Ok(Some(Self { outcomes, transaction: row.try_get(4)?, settled: None, server, seen }))
    }
}
