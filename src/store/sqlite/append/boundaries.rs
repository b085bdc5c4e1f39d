//! Checks the boundaries of a batch.

use std::collections::HashMap;

use sqlx::sqlite::{SqliteArguments, SqliteConnection};
use sqlx::{AssertSqlSafe, Row};

use super::super::convert::from_sql;
use super::super::error::{encoding, failed};
use super::super::number_cache::Facts;
use super::super::tag_query::add_crossing;
use super::look_up::{Failure, begin};
use super::statements::{DOING, run};
use crate::event::{NewEvent, Position};
use crate::store::{Append, AppendError, Appended, StoreError};

/// The events that the boundaries of a batch are checked against.
#[derive(Debug, Default)]
pub(super) struct BoundaryCheck<'b> {
    /// Last position of the log. [`Position::START`] if the batch has no boundary.
    pub(super) end: Position,
    /// First event of the log that crosses the boundary of an append, by the append's index.
    crossings: HashMap<usize, Position>,
    /// Tagged events of the accepted appends.
    accepted: Vec<(Position, &'b NewEvent)>,
}

impl<'b> BoundaryCheck<'b> {
    /// Looks up the events of the log that cross the boundaries of a batch.
    ///
    /// Begins the transaction if it is not `begun` and there are boundaries. Returns also whether it
    /// has begun.
    pub(super) async fn look_up(
        connection: &mut SqliteConnection,
        facts: &Facts<'_>,
        batch: &'b [Append],
        begun: bool,
    ) -> Result<(Self, bool), Failure> {
        let (mut check, mut begun) = (Self::default(), begun);
        for (index, append) in batch.iter().enumerate() {
            let Some(boundary) = &append.unless else { continue };
            // One statement for each: the text of all together would differ from batch to batch,
            // and would not stay prepared.
            let (mut sql, mut arguments) =
                if begun { (String::new(), SqliteArguments::default()) } else { begin(facts)? };
            add_crossing(&mut sql, &mut arguments, boundary).map_err(|error| encoding(DOING, error))?;
            let results = run(connection, AssertSqlSafe(sql), arguments).await;
            if let Some(error) = results.error {
                return Err(Failure::Statement(error));
            }
            begun = true;
            let Some(row) = results.rows.first() else {
                let reason = format!("{DOING}: the check of a boundary returned no row");
                return Err(StoreError::Corrupt { reason }.into());
            };
            let read =
                || -> Result<(Option<i64>, i64), sqlx::Error> { Ok((row.try_get(0)?, row.try_get(1)?)) };
            let (crossing, end) = read().map_err(|error| failed(DOING, error))?;
            check.end = Position::new(from_sql(end));
            if let Some(position) = crossing {
                check.crossings.insert(index, Position::new(from_sql(position)));
            }
        }
        Ok((check, begun))
    }

    /// I13: checks that no event crosses the boundary of an append.
    ///
    /// The write lock of the transaction keeps the result valid until the commit.
    pub(super) fn check(&self, index: usize, append: &Append) -> Result<(), AppendError> {
        let Some(boundary) = &append.unless else { return Ok(()) };
        let of_batch = || {
            let mut accepted = self.accepted.iter();
            let matching = accepted.find(|(_, event)| boundary.query().matches(&event.name, &event.tags));
            matching.map(|(position, _)| *position)
        };
        match self.crossings.get(&index).copied().or_else(of_batch) {
            Some(position) => Err(AppendError::crossed(boundary, position)),
            None => Ok(()),
        }
    }

    /// Adds the events of an accepted append: later boundaries of the batch do not know them.
    pub(super) fn accept(&mut self, append: &'b Append, appended: &Appended) {
        let events = append.streams.iter().flat_map(|part| &part.events);
        let tagged = appended.positions.iter().zip(events).filter(|(_, event)| !event.tags.is_empty());
        self.accepted.extend(tagged.map(|(position, event)| (*position, event)));
    }
}
