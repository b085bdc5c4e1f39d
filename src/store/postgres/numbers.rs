//! The numbers of streams and names, as far as this process has learned them.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::super::{Append, StoreError};
use super::connection::Session;
use super::error::failed;
use super::inner::PgInner;
use crate::event::{Category, EventName, Position, RecordedEvent, StreamId, Version};

/// Maximum number of streams whose number and end are cached, in each direction.
const STREAMS: NonZeroUsize = NonZeroUsize::new(50_000).unwrap();

/// Maximum number of names that are cached, in each direction.
const NAMES: usize = 100_000;

const NUMBERING: &str = "numbering event names";

/// An event of a stream that this process has seen.
#[derive(Debug, Clone, Copy)]
pub(super) struct SeenEvent {
    /// Number of the stream.
    pub(super) stream: i64,
    pub(super) version: Version,
    pub(super) position: Position,
}

/// The numbers that appends need.
///
/// They hold for one server process only: another one may lack a row that this process has seen.
#[derive(Debug)]
pub(super) struct ServerNumbers {
    /// The server process, as `storied.server()` returns it.
    pub(super) server: i64,
    names: HashMap<EventName, i32>,
    categories: HashMap<Category, i32>,
    last_events: LruCache<StreamId, SeenEvent>,
}

impl ServerNumbers {
    fn of(server: i64) -> Self {
        let (names, categories) = (HashMap::new(), HashMap::new());
        Self { server, names, categories, last_events: LruCache::new(STREAMS) }
    }

    pub(super) fn name(&self, name: &EventName) -> Option<i32> {
        self.names.get(name).copied()
    }

    pub(super) fn category(&self, stream: &StreamId) -> Option<i32> {
        self.categories.get(stream.category_name()).copied()
    }

    /// Returns the last event that this process has seen of a stream.
    pub(super) fn last_event(&mut self, stream: &StreamId) -> Option<SeenEvent> {
        self.last_events.get(stream).copied()
    }
}

/// The names and streams of numbers, which readers need.
///
/// They hold for every server: no number gets another meaning.
#[derive(Debug)]
struct Texts {
    names: HashMap<i32, EventName>,
    streams: LruCache<i64, StreamId>,
}

/// What this process has learned of the numbers of a store.
#[derive(Debug)]
pub(super) struct Numbers {
    server: Mutex<ServerNumbers>,
    texts: Mutex<Texts>,
}

impl Default for Numbers {
    fn default() -> Self {
        let texts = Texts { names: HashMap::new(), streams: LruCache::new(STREAMS) };
        Self { server: Mutex::new(ServerNumbers::of(0)), texts: Mutex::new(texts) }
    }
}

/// Events whose names and streams are numbers yet.
#[derive(Debug, Default)]
pub(super) struct NumberedEvents {
    pub(super) events: Vec<RecordedEvent>,
    /// For each event the numbers of its name and of its stream, if the stream is missing.
    pub(super) numbers: Vec<(i32, Option<i64>)>,
}

impl Numbers {
    /// Returns the numbers that appends need.
    pub(super) fn of_server(&self) -> MutexGuard<'_, ServerNumbers> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the last events of streams, as the server process `server` stored them.
    pub(super) fn learn(&self, server: i64, seen: Vec<(StreamId, SeenEvent)>) {
        {
            let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
            for (stream, event) in &seen {
                texts.streams.get_or_insert(event.stream, || stream.clone());
            }
        }
        let mut known = self.of_server();
        if known.server == server {
            for (stream, event) in seen {
                known.last_events.put(stream, event);
            }
        }
    }

    /// Drops the numbers of `server`, which is no longer the server process.
    pub(super) fn forget(&self, server: i64) {
        let mut known = self.of_server();
        if known.server == server {
            *known = ServerNumbers::of(0);
        }
    }

    /// Ensures that all names and categories of appends have numbers; most often they do.
    ///
    /// The numbers are committed before an append uses them.
    pub(super) async fn number_names(
        &self,
        core: &Arc<PgInner>,
        appends: &[&Append],
    ) -> Result<(), NumberingError> {
        let (mut names, mut categories) = (HashSet::new(), HashSet::new());
        {
            let known = self.of_server();
            for part in appends.iter().flat_map(|append| &append.streams) {
                if known.category(&part.stream).is_none() {
                    categories.insert(part.stream.category_name().clone());
                }
                let unknown = part.events.iter().filter(|event| known.name(&event.name).is_none());
                names.extend(unknown.map(|event| event.name.clone()));
            }
        }
        if names.is_empty() && categories.is_empty() {
            return Ok(());
        }
        let (names, categories): (Vec<_>, Vec<_>) =
            (names.into_iter().collect(), categories.into_iter().collect());
        let texts: Vec<&str> =
            names.iter().map(EventName::as_str).chain(categories.iter().map(Category::as_str)).collect();
        let session = core.connections.get(NUMBERING).await;
        let mut session = session.map_err(NumberingError::Store)?;
        let query = sqlx::query(core.sql.number_names.clone())
            .bind(texts)
            .persistent(core.connections.persistent())
            .fetch_one(&mut *session);
        let row = core.timed(query).await.map_err(NumberingError::Database)?;
        let columns = (row.try_get::<Vec<i32>, _>(0), row.try_get(1));
        let (numbers, server) = match columns {
            (Ok(numbers), Ok(server)) => (numbers, server),
            (Err(error), _) | (_, Err(error)) => return Err(NumberingError::Database(error)),
        };
        core.timed(session.done()).await.map_err(NumberingError::Database)?;
        let mut known = self.of_server();
        if known.server != server {
            *known = ServerNumbers::of(server);
        }
        if known.names.len() + names.len() > NAMES {
            known.names.clear();
        }
        let (of_names, of_categories) = numbers.split_at(names.len().min(numbers.len()));
        known.names.extend(names.into_iter().zip(of_names.iter().copied()));
        known.categories.extend(categories.into_iter().zip(of_categories.iter().copied()));
        Ok(())
    }

    /// Replaces the numbers of events by their names and streams.
    ///
    /// An event whose stream does not exist is ignored. Only a program that calls `storied.append()`
    /// by hand can write one; it must not stop the readers of the log.
    ///
    /// # Errors
    /// `Corrupt` if a name has no row.
    pub(super) async fn resolve(
        &self,
        core: &Arc<PgInner>,
        doing: &str,
        numbered: NumberedEvents,
    ) -> Result<Vec<RecordedEvent>, StoreError> {
        let NumberedEvents { mut events, numbers } = numbered;
        let (names, streams) = self.fill(&mut events, &numbers);
        if !names.is_empty() || !streams.is_empty() {
            let mut session = core.connections.get(doing).await?;
            if !names.is_empty() {
                self.read_names(core, &mut session, doing, &names).await?;
            }
            let found = if streams.is_empty() {
                HashMap::new()
            } else {
                self.read_streams(core, &mut session, doing, &streams).await?
            };
            session.finish(doing).await?;
            let mut strays = HashSet::new();
            for (event, (_, stream)) in events.iter_mut().zip(&numbers) {
                let Some(number) = stream.filter(|number| streams.contains(number)) else { continue };
                match found.get(&number) {
                    Some(stream) => event.stream = stream.clone(),
                    None => _ = strays.insert(event.position),
                }
            }
            if let Some(number) = self.fill_names(&mut events, &numbers).first() {
                return Err(corrupt(doing, &format!("name {number} has no text")));
            }
            for position in &strays {
                tracing::error!(
                    %position,
                    "ignored an event without a stream: a program has called storied.append() by hand"
                );
            }
            events.retain(|event| !strays.contains(&event.position));
        }
        Ok(events)
    }

    /// Replaces the known numbers; returns the unknown ones.
    fn fill(&self, events: &mut [RecordedEvent], numbers: &[(i32, Option<i64>)]) -> (Vec<i32>, Vec<i64>) {
        let mut unknown = HashSet::new();
        {
            let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
            for (event, (_, stream)) in events.iter_mut().zip(numbers) {
                let Some(number) = stream else { continue };
                match texts.streams.get(number) {
                    Some(stream) => event.stream = stream.clone(),
                    None => _ = unknown.insert(*number),
                }
            }
        }
        (self.fill_names(events, numbers), unknown.into_iter().collect())
    }

    fn fill_names(&self, events: &mut [RecordedEvent], numbers: &[(i32, Option<i64>)]) -> Vec<i32> {
        let mut unknown = HashSet::new();
        let texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        for (event, (name, _)) in events.iter_mut().zip(numbers) {
            match texts.names.get(name) {
                Some(name) => event.name = name.clone(),
                None => _ = unknown.insert(*name),
            }
        }
        unknown.into_iter().collect()
    }

    async fn read_names(
        &self,
        core: &PgInner,
        session: &mut Session,
        doing: &str,
        numbers: &[i32],
    ) -> Result<(), StoreError> {
        let rows = sqlx::query(core.sql.names.clone())
            .bind(numbers)
            .persistent(core.connections.persistent())
            .fetch_all(&mut **session)
            .await
            .map_err(|error| failed(doing, error))?;
        for row in &rows {
            let columns = || -> Result<(i32, String), sqlx::Error> { Ok((row.try_get(0)?, row.try_get(1)?)) };
            let (number, name) = columns().map_err(|error| failed(doing, error))?;
            let name = EventName::new(name).map_err(|error| corrupt(doing, &error.to_string()))?;
            let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
            if texts.names.len() >= NAMES {
                texts.names.clear();
            }
            texts.names.insert(number, name);
        }
        Ok(())
    }

    async fn read_streams(
        &self,
        core: &PgInner,
        session: &mut Session,
        doing: &str,
        numbers: &[i64],
    ) -> Result<HashMap<i64, StreamId>, StoreError> {
        let rows = sqlx::query(core.sql.streams.clone())
            .bind(numbers)
            .persistent(core.connections.persistent())
            .fetch_all(&mut **session)
            .await
            .map_err(|error| failed(doing, error))?;
        let mut categories: HashMap<String, Category> = HashMap::new();
        let mut found = HashMap::with_capacity(rows.len());
        let columns = |row: &PgRow| -> Result<(i64, String, String), sqlx::Error> {
            Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))
        };
        for row in &rows {
            let (number, category, id) = columns(row).map_err(|error| failed(doing, error))?;
            let category = match categories.get(&category) {
                Some(category) => category.clone(),
                None => {
                    let checked =
                        Category::new(&category).map_err(|error| corrupt(doing, &error.to_string()))?;
                    categories.entry(category).or_insert(checked).clone()
                }
            };
            found.insert(number, StreamId::stored(category, id.into()));
        }
        let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        for (number, stream) in &found {
            texts.streams.put(*number, stream.clone());
        }
        Ok(found)
    }
}

fn corrupt(doing: &str, reason: &str) -> StoreError {
    StoreError::Corrupt { reason: format!("{doing}: {reason}") }
}

/// The reason why names could not be numbered. Nothing else was written.
#[derive(Debug)]
pub(super) enum NumberingError {
    Store(StoreError),
    Database(sqlx::Error),
}
