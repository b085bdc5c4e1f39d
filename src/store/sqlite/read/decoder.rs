//! Decodes rows into events, and their numbers into streams and names.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use sqlx::Row;
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use uuid::Uuid;

use super::super::error::failed;
use super::super::number_cache::NumberCache;
use crate::codec::Codec;
use crate::event::{Category, EventName, InvalidName, Position, RecordedEvent, StreamId, Version};
use crate::store::StoreError;
use crate::store::columns::Columns;

/// Table of the log.
const EVENTS: &str = "storied_events";

/// Decodes the events of a page.
///
/// A page has few names and categories and many events. So each is looked up and checked once; the
/// numbers that the cache does not know are looked up together after the page.
pub(super) struct Decoder<'c> {
    doing: &'static str,
    codec: Codec,
    cache: &'c NumberCache,
    names: HashMap<i64, EventName>,
    pub(super) streams: HashMap<i64, StreamId>,
    /// Stream and name of an event until [`resolve`](Self::resolve).
    unresolved: (StreamId, EventName),
    /// Indices of events without their name, and its number.
    without_name: Vec<(usize, i64)>,
    /// Indices of events without their stream, and its number.
    without_stream: Vec<(usize, i64)>,
}

impl<'c> Decoder<'c> {
    pub(super) fn new(doing: &'static str, codec: Codec, cache: &'c NumberCache) -> Result<Self, StoreError> {
        let unresolved = || Ok((StreamId::new("unresolved", "unresolved")?, EventName::new("unresolved")?));
        let unresolved = unresolved().map_err(|error: InvalidName| invalid(doing, error))?;
        Ok(Self {
            doing,
            codec,
            cache,
            names: HashMap::new(),
            streams: HashMap::new(),
            unresolved,
            without_name: Vec::new(),
            without_stream: Vec::new(),
        })
    }

    pub(super) fn number(&self, row: &SqliteRow, column: usize) -> Result<u64, StoreError> {
        Columns::of(EVENTS, row).number(column).map_err(|error| failed(self.doing, error))
    }

    pub(super) fn optional_number(&self, row: &SqliteRow, column: usize) -> Result<Option<i64>, StoreError> {
        row.try_get(column).map_err(|error| failed(self.doing, error))
    }

    pub(super) fn corrupt(&self, reason: &str) -> StoreError {
        StoreError::Corrupt { reason: format!("{}: {reason}", self.doing) }
    }

    /// Decodes the event with the columns from version to time, which begin at the third column.
    ///
    /// `index` is its index in the page, for [`resolve`](Self::resolve).
    pub(super) fn event(
        &mut self,
        row: &SqliteRow,
        stream: i64,
        position: Position,
        index: usize,
    ) -> Result<RecordedEvent, StoreError> {
        let bytes = |column: usize| row.try_get::<Vec<u8>, _>(column).map(Bytes::from);
        let columns = || -> Result<_, sqlx::Error> {
            Ok((
                row.try_get::<i64, _>(3)?,
                row.try_get::<Uuid, _>(4)?,
                row.try_get::<Uuid, _>(5)?,
                bytes(6)?,
                bytes(7)?,
                Columns::of(EVENTS, row).time(8)?,
            ))
        };
        let (name, id, command_id, payload, metadata, recorded_at) =
            columns().map_err(|error| failed(self.doing, error))?;
        Ok(RecordedEvent {
            id,
            stream: self.stream(stream, index),
            version: Version::new(self.number(row, 2)?),
            position,
            name: self.name(name, index),
            codec: self.codec,
            payload,
            command_id,
            metadata,
            recorded_at,
        })
    }

    /// Returns a stream, or another one until [`resolve`](Self::resolve).
    fn stream(&mut self, number: i64, index: usize) -> StreamId {
        if let Some(stream) = self.streams.get(&number) {
            return stream.clone();
        }
        let Some(stream) = self.cache.stream(number) else {
            self.without_stream.push((index, number));
            return self.unresolved.0.clone();
        };
        self.streams.insert(number, stream.clone());
        stream
    }

    /// Returns a name, or another one until [`resolve`](Self::resolve).
    fn name(&mut self, number: i64, index: usize) -> EventName {
        if let Some(name) = self.names.get(&number) {
            return name.clone();
        }
        let Some(name) = self.cache.event_name(number) else {
            self.without_name.push((index, number));
            return self.unresolved.1.clone();
        };
        self.names.insert(number, name.clone());
        name
    }

    /// Looks up the streams and names that the cache does not know.
    ///
    /// A later statement suffices, because numbers do not change.
    pub(super) async fn resolve(
        mut self,
        connection: &mut SqliteConnection,
        events: &mut [RecordedEvent],
    ) -> Result<(), StoreError> {
        if !self.without_name.is_empty() {
            self.look_up_names(connection).await?;
        }
        if !self.without_stream.is_empty() {
            self.look_up_streams(connection).await?;
        }
        for (index, number) in &self.without_name {
            let Some(name) = self.names.get(number) else {
                return Err(self.corrupt(&format!("storied_names has no number {number}")));
            };
            if let Some(event) = events.get_mut(*index) {
                event.name = name.clone();
            }
        }
        for (index, number) in &self.without_stream {
            let Some(stream) = self.streams.get(number) else {
                return Err(self.corrupt(&format!("storied_streams has no number {number}")));
            };
            if let Some(event) = events.get_mut(*index) {
                event.stream = stream.clone();
            }
        }
        Ok(())
    }

    async fn look_up_names(&mut self, connection: &mut SqliteConnection) -> Result<(), StoreError> {
        let sql = "SELECT number, name FROM storied_names WHERE number IN (SELECT value FROM json_each(?))";
        let rows = sqlx::query(sql)
            .bind(json_numbers(&self.without_name))
            .fetch_all(connection)
            .await
            .map_err(|error| failed(self.doing, error))?;
        for row in &rows {
            let read = || -> Result<(i64, &str), sqlx::Error> { Ok((row.try_get(0)?, row.try_get(1)?)) };
            let (number, name) = read().map_err(|error| failed(self.doing, error))?;
            let name = EventName::new(name).map_err(|error| invalid(self.doing, error))?;
            self.cache.add_event_name(number, &name);
            self.names.insert(number, name);
        }
        Ok(())
    }

    async fn look_up_streams(&mut self, connection: &mut SqliteConnection) -> Result<(), StoreError> {
        let sql = "SELECT stream.number, category.number, category.name, stream.stream_id
            FROM json_each(?) AS wanted
            CROSS JOIN storied_streams AS stream ON stream.number = wanted.value
            CROSS JOIN storied_names AS category ON category.number = stream.category";
        let rows = sqlx::query(sql)
            .bind(json_numbers(&self.without_stream))
            .fetch_all(connection)
            .await
            .map_err(|error| failed(self.doing, error))?;
        let mut categories: HashMap<i64, Category> = HashMap::new();
        for row in &rows {
            let read = || -> Result<(i64, i64, &str, &str), sqlx::Error> {
                Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?))
            };
            let (number, category, name, id) = read().map_err(|error| failed(self.doing, error))?;
            let category = match categories.get(&category) {
                Some(category) => category.clone(),
                None => {
                    let name = match self.cache.category(category) {
                        Some(name) => name,
                        None => Category::new(name).map_err(|error| invalid(self.doing, error))?,
                    };
                    self.cache.add_category(category, &name);
                    categories.insert(category, name.clone());
                    name
                }
            };
            let stream = StreamId::stored(category, Arc::from(id));
            self.cache.add_stream(number, &stream);
            self.streams.insert(number, stream);
        }
        Ok(())
    }
}

fn invalid(doing: &str, error: InvalidName) -> StoreError {
    StoreError::Corrupt { reason: format!("{doing}: {error}") }
}

/// Encodes the distinct numbers as a list for `json_each`.
fn json_numbers(of: &[(usize, i64)]) -> String {
    let numbers: BTreeSet<i64> = of.iter().map(|(_, number)| *number).collect();
    serde_json::Value::from_iter(numbers).to_string()
}
