//! Looks up what a batch needs to know of its streams and names.

use std::collections::BTreeSet;

use sqlx::sqlite::{SqliteArguments, SqliteConnection};
use sqlx::{AssertSqlSafe, Row};

use super::super::convert::{from_sql, json_list, json_streams};
use super::super::error::failed;
use super::super::number_cache::{Facts, StreamFact};
use super::statements::{BEGIN, DOING, EXPECT_ANCHOR, add, add_anchor, run};
use crate::event::{StreamId, Version};
use crate::store::{Append, Appended, StoreError};

/// The reason why a look-up has no result.
#[derive(Debug)]
pub(super) enum Failure {
    Statement(sqlx::Error),
    Store(StoreError),
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// `CROSS JOIN` keeps the order of the joins: one look-up in each index for each stream.
const STREAMS: &str = "
    SELECT NULL, coalesce(max(number), 0), 0 FROM storied_streams
    UNION ALL
    SELECT wanted.key, stream.number,
        coalesce((SELECT max(version) FROM storied_events WHERE stream = stream.number), 0)
    FROM json_each(?) AS wanted
    CROSS JOIN storied_names AS category ON category.name = wanted.value ->> 0
    CROSS JOIN storied_streams AS stream
        ON stream.stream_id = wanted.value ->> 1 AND stream.category = category.number";

/// Existing names keep their numbers.
const NAMES: &str = "
    INSERT INTO storied_names (name) SELECT value FROM json_each(?) WHERE true ON CONFLICT DO NOTHING;
    SELECT number, name FROM storied_names WHERE name IN (SELECT value FROM json_each(?))";

/// Begins a transaction and looks up unknown streams.
///
/// Returns the last number of a stream.
pub(super) async fn streams<'b>(
    connection: &mut SqliteConnection,
    facts: &mut Facts<'b>,
    unknown: &[&'b StreamId],
) -> Result<i64, Failure> {
    let (sql, mut arguments) = begin(facts)?;
    add(&mut arguments, json_streams(unknown.iter().copied()))?;
    let results = run(connection, AssertSqlSafe(sql + STREAMS), arguments).await;
    if let Some(error) = results.error {
        return Err(Failure::Statement(error));
    }
    for stream in unknown {
        facts.streams.insert(stream, StreamFact { number: None, version: Version::NONE });
    }
    let mut last_number = 0;
    for row in &results.rows {
        let read = || -> Result<(Option<i64>, i64, i64), sqlx::Error> {
            Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))
        };
        let (key, number, version) = read().map_err(|error| failed(DOING, error))?;
        match key.map(|key| usize::try_from(key).ok().and_then(|key| unknown.get(key))) {
            None => last_number = number,
            Some(Some(stream)) => {
                let fact = StreamFact { number: Some(number), version: Version::new(from_sql(version)) };
                facts.streams.insert(stream, fact);
            }
            Some(None) => {
                let reason = format!("{DOING}: SQLite returned an unexpected stream");
                return Err(StoreError::Corrupt { reason }.into());
            }
        }
    }
    Ok(last_number)
}

/// Looks up the unknown names of the accepted appends, and numbers the new ones.
///
/// Begins the transaction if it is not `begun` and there are unknown names; returns whether the
/// transaction has begun.
pub(super) async fn names<'b>(
    connection: &mut SqliteConnection,
    facts: &mut Facts<'b>,
    accepted: &[(&'b Append, &Appended)],
    begun: bool,
) -> Result<bool, Failure> {
    let parts = accepted.iter().flat_map(|(append, _)| &append.streams);
    let names = parts.flat_map(|part| {
        let names = part.events.iter().map(|event| event.name.as_str());
        std::iter::once(part.stream.category()).chain(names)
    });
    let unknown: BTreeSet<&'b str> = names.filter(|name| !facts.names.contains_key(name)).collect();
    if unknown.is_empty() {
        return Ok(begun);
    }
    let (sql, mut arguments) =
        if begun { (String::new(), SqliteArguments::default()) } else { begin(facts)? };
    let list = json_list(unknown.iter().copied());
    add(&mut arguments, list.clone())?;
    add(&mut arguments, list)?;
    let results = run(connection, AssertSqlSafe(sql + NAMES), arguments).await;
    if let Some(error) = results.error {
        return Err(Failure::Statement(error));
    }
    for row in &results.rows {
        let read = || -> Result<(i64, &str), sqlx::Error> { Ok((row.try_get(0)?, row.try_get(1)?)) };
        let (number, name) = read().map_err(|error| failed(DOING, error))?;
        if let Some(name) = unknown.get(name) {
            facts.names.insert(name, number);
        }
    }
    Ok(true)
}

/// Returns the statements that begin a transaction, with their arguments.
pub(super) fn begin(facts: &Facts<'_>) -> Result<(String, SqliteArguments), StoreError> {
    let (mut sql, mut arguments) = (BEGIN.to_owned(), SqliteArguments::default());
    if let Some(anchor) = facts.anchor {
        sql += EXPECT_ANCHOR;
        add_anchor(&mut arguments, anchor)?;
    }
    Ok((sql, arguments))
}
