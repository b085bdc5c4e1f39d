//! The numbers of streams and names, as far as this process has learned them.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};

use lru::LruCache;

use super::super::Append;
use crate::event::{Category, EventName, Position, RecordedEvent, StreamId, Version};

/// Maximum number of streams whose number and end are cached, in each direction.
const STREAMS: NonZeroUsize = NonZeroUsize::new(50_000).unwrap();

/// Maximum number of names that are cached, in each direction.
const NAMES: usize = 100_000;

/// No server process: none has this number.
const UNKNOWN: i64 = 0;

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
        Self { server: Mutex::new(ServerNumbers::of(UNKNOWN)), texts: Mutex::new(texts) }
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
        if known.server == UNKNOWN {
            *known = ServerNumbers::of(server);
        }
        if known.server == server {
            for (stream, event) in seen {
                match known.last_events.get_mut(&stream) {
                    Some(last) if last.version >= event.version => {}
                    Some(last) => *last = event,
                    None => _ = known.last_events.put(stream, event),
                }
            }
        }
    }

    /// Drops the numbers of `server`, which is no longer the server process.
    pub(super) fn forget(&self, server: i64) {
        let mut known = self.of_server();
        if known.server == server {
            *known = ServerNumbers::of(UNKNOWN);
        }
    }

    /// Returns the names and categories of appends that have no numbers yet.
    pub(super) fn unnumbered(&self, appends: &[&Append]) -> (Vec<EventName>, Vec<Category>) {
        let (mut names, mut categories) = (HashSet::new(), HashSet::new());
        let known = self.of_server();
        for part in appends.iter().flat_map(|append| &append.streams) {
            if known.category(&part.stream).is_none() {
                categories.insert(part.stream.category_name().clone());
            }
            let unknown = part.events.iter().filter(|event| known.name(&event.name).is_none());
            names.extend(unknown.map(|event| event.name.clone()));
        }
        (names.into_iter().collect(), categories.into_iter().collect())
    }

    /// Records the numbers of names and categories on the server process `server`.
    pub(super) fn learn_names(
        &self,
        server: i64,
        names: impl ExactSizeIterator<Item = (EventName, i32)>,
        categories: impl ExactSizeIterator<Item = (Category, i32)>,
    ) {
        let mut known = self.of_server();
        if known.server != server {
            *known = ServerNumbers::of(server);
        }
        if known.names.len() + names.len() > NAMES {
            known.names.clear();
        }
        if known.categories.len() + categories.len() > NAMES {
            known.categories.clear();
        }
        known.names.extend(names);
        known.categories.extend(categories);
    }

    /// Records the names of numbers.
    pub(super) fn learn_texts(&self, names: impl Iterator<Item = (i32, EventName)>) {
        let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        for (number, name) in names {
            if texts.names.len() >= NAMES {
                texts.names.clear();
            }
            texts.names.insert(number, name);
        }
    }

    /// Records the streams of numbers.
    pub(super) fn learn_streams(&self, streams: &HashMap<i64, StreamId>) {
        let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        for (number, stream) in streams {
            texts.streams.put(*number, stream.clone());
        }
    }

    /// Replaces the known numbers; returns the unknown ones.
    pub(super) fn fill(
        &self,
        events: &mut [RecordedEvent],
        numbers: &[(i32, Option<i64>)],
    ) -> (Vec<i32>, Vec<i64>) {
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

    /// As [`fill`](Self::fill), for names only.
    pub(super) fn fill_names(
        &self,
        events: &mut [RecordedEvent],
        numbers: &[(i32, Option<i64>)],
    ) -> Vec<i32> {
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
}
