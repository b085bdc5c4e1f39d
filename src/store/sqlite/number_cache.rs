//! The numbers of streams and names that this process knows.
//!
//! A committed number never changes and is never used again, so it needs no look-up once it is
//! known. The cache learns only from committed transactions.
//!
//! All of its content was read from a log that contains the event `anchor`. If that event is
//! missing, the file was replaced by another log, such as a restored backup, and nothing of the
//! content is valid. A reader compares the anchor with the log, an append has SQLite compare it.

use std::collections::HashMap;
use std::fmt;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;
use uuid::Uuid;

use super::super::{Append, ExpectedVersion};
use crate::event::{Category, EventName, Position, StreamId, Version};

/// Maximum number of streams in each of the two caches, which is more than the default number of
/// live aggregates.
const STREAMS: NonZeroUsize = NonZeroUsize::new(1 << 14).unwrap();
/// Maximum number of names; a program has few.
const NAMES: usize = 1 << 14;

/// An event of the log: its position and id.
pub(super) type Anchor = (Position, Uuid);

/// The state of a stream that an append is based on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StreamFact {
    /// `None` if the stream has no events.
    pub(super) number: Option<i64>,
    pub(super) version: Version,
}

/// Facts about the streams and the names of a batch.
#[derive(Debug, Default)]
pub(super) struct Facts<'b> {
    /// Event that must be in the log, unless the facts were read in the transaction of the append.
    pub(super) anchor: Option<Anchor>,
    pub(super) streams: HashMap<&'b StreamId, StreamFact>,
    pub(super) names: HashMap<&'b str, i64>,
}

/// The bounded cache of a store.
#[derive(Default)]
pub(super) struct NumberCache {
    content: Mutex<Content>,
}

struct Content {
    anchor: Option<Anchor>,
    /// Numbers of event names and of categories.
    numbers: HashMap<Arc<str>, i64>,
    event_names: HashMap<i64, EventName>,
    categories: HashMap<i64, Category>,
    /// Number and last known version, which is a lower bound.
    streams: LruCache<StreamId, (i64, Version)>,
    by_number: LruCache<i64, StreamId>,
}

impl Default for Content {
    fn default() -> Self {
        Self {
            anchor: None,
            numbers: HashMap::new(),
            event_names: HashMap::new(),
            categories: HashMap::new(),
            streams: LruCache::new(STREAMS),
            by_number: LruCache::new(STREAMS),
        }
    }
}

impl fmt::Debug for NumberCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let content = self.content();
        let (anchor, streams, names) = (content.anchor, content.streams.len(), content.numbers.len());
        f.debug_struct("NumberCache")
            .field("anchor", &anchor)
            .field("streams", &streams)
            .field("names", &names)
            .finish_non_exhaustive()
    }
}

impl NumberCache {
    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the event that the log must contain, if there is content.
    pub(super) fn anchor(&self) -> Option<Anchor> {
        self.content().anchor
    }

    /// Forgets everything, because the log does not contain `anchor`.
    pub(super) fn clear(&self) {
        *self.content() = Content::default();
    }

    /// Returns the facts that suffice to append without a look-up.
    ///
    /// The version of a stream is one if the append expects exactly the last known version. Versions
    /// never decrease, so the stream is at that version, or the insert violates the key. An append of
    /// several parts needs that of each: if the look-up refuses one, an earlier one may be the first
    /// that does not fit.
    pub(super) fn facts<'b>(&self, batch: &'b [Append]) -> Facts<'b> {
        let mut facts = Facts::default();
        let content = &mut *self.content();
        facts.anchor = content.anchor;
        if facts.anchor.is_none() {
            return facts;
        }
        let mut add_name = |name: &'b str, numbers: &HashMap<Arc<str>, i64>| {
            if let Some(number) = numbers.get(name) {
                facts.names.insert(name, *number);
            }
        };
        for append in batch {
            for part in &append.streams {
                add_name(part.stream.category(), &content.numbers);
                for event in &part.events {
                    add_name(event.name.as_str(), &content.numbers);
                }
            }
            let known = append.streams.iter().map(|part| {
                let (number, version) = *content.streams.get(&part.stream)?;
                let fact = StreamFact { number: Some(number), version };
                (part.expected == ExpectedVersion::Exact(version)).then_some((&part.stream, fact))
            });
            facts.streams.extend(known.collect::<Option<Vec<_>>>().unwrap_or_default());
        }
        facts
    }

    /// Records the facts of a committed append; `anchor` is its last event.
    pub(super) fn committed<'b>(
        &self,
        anchor: Anchor,
        streams: impl IntoIterator<Item = (&'b StreamId, i64, Version)>,
        names: &HashMap<&'b str, i64>,
    ) {
        let content = &mut *self.content();
        content.raise(anchor);
        for (name, number) in names {
            if !content.numbers.contains_key(*name) {
                if content.numbers.len() >= NAMES {
                    content.numbers.clear();
                }
                content.numbers.insert(Arc::from(*name), *number);
            }
        }
        for (stream, number, version) in streams {
            content.learn(stream, number, version);
        }
    }

    /// Records the version of a stream that a reader has found; `anchor` is its event of that version.
    pub(super) fn read_stream(&self, stream: &StreamId, number: i64, version: Version, anchor: Anchor) {
        let content = &mut *self.content();
        content.raise(anchor);
        content.learn(stream, number, version);
    }

    /// Records the last event of a page before the names and streams of its events.
    pub(super) fn read_log(&self, anchor: Anchor) {
        self.content().raise(anchor);
    }

    pub(super) fn stream(&self, number: i64) -> Option<StreamId> {
        self.content().by_number.get(&number).cloned()
    }

    pub(super) fn event_name(&self, number: i64) -> Option<EventName> {
        self.content().event_names.get(&number).cloned()
    }

    pub(super) fn category(&self, number: i64) -> Option<Category> {
        self.content().categories.get(&number).cloned()
    }

    pub(super) fn add_stream(&self, number: i64, stream: &StreamId) {
        self.content().by_number.put(number, stream.clone());
    }

    pub(super) fn add_event_name(&self, number: i64, name: &EventName) {
        insert_bounded(&mut self.content().event_names, number, name.clone());
    }

    pub(super) fn add_category(&self, number: i64, category: &Category) {
        insert_bounded(&mut self.content().categories, number, category.clone());
    }
}

impl Content {
    fn raise(&mut self, anchor: Anchor) {
        if self.anchor.is_none_or(|(position, _)| position < anchor.0) {
            self.anchor = Some(anchor);
        }
    }

    fn learn(&mut self, stream: &StreamId, number: i64, version: Version) {
        match self.streams.get_mut(stream) {
            Some(known) => *known = (number, known.1.max(version)),
            None => _ = self.streams.put(stream.clone(), (number, version)),
        }
    }
}

fn insert_bounded<T>(names: &mut HashMap<i64, T>, number: i64, name: T) {
    if names.len() >= NAMES {
        names.clear();
    }
    names.insert(number, name);
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::event::{NewEvent, Tags};

    fn append(id: u64, expected: ExpectedVersion) -> Append {
        let event = NewEvent {
            id: Uuid::now_v7(),
            name: EventName::new("order.placed").unwrap(),
            payload: Bytes::new(),
            command_id: Uuid::now_v7(),
            correlation_id: None,
            metadata: Bytes::new(),
            tags: Tags::new(),
        };
        Append::one(StreamId::new("order", id).unwrap(), expected, vec![event])
    }

    #[test]
    fn only_an_exact_expectation_of_the_last_known_version_needs_no_look_up() {
        let cache = NumberCache::default();
        let exact = |version| ExpectedVersion::Exact(Version::new(version));
        let batch = [append(1, exact(7))];
        assert!(cache.facts(&batch).streams.is_empty(), "nothing is known");
        let anchor = (Position::new(9), Uuid::now_v7());
        let stream = &batch[0].streams[0].stream;
        cache.committed(anchor, [(stream, 3, Version::new(7))], &HashMap::from([("order", 1)]));
        let facts = cache.facts(&batch);
        assert_eq!(facts.anchor, Some(anchor));
        let fact = StreamFact { number: Some(3), version: Version::new(7) };
        assert_eq!(facts.streams.get(stream), Some(&fact));
        assert_eq!(facts.names, HashMap::from([("order", 1)]));
        for expected in [exact(6), exact(8), ExpectedVersion::Any, ExpectedVersion::StreamExists] {
            assert!(cache.facts(&[append(1, expected)]).streams.is_empty(), "{expected}");
        }
        // A late reader takes nothing back.
        cache.read_stream(stream, 3, Version::new(5), (Position::new(4), Uuid::now_v7()));
        assert_eq!(cache.facts(&batch).anchor, Some(anchor));
        assert_eq!(cache.facts(&batch).streams.len(), 1);
        cache.clear();
        assert_eq!((cache.anchor(), cache.facts(&batch).streams.len()), (None, 0));
    }

    #[test]
    fn the_cache_is_bounded() {
        let cache = NumberCache::default();
        for number in 0..2 * STREAMS.get() as u64 {
            let (stream, position) = (StreamId::new("order", number).unwrap(), Position::new(number + 1));
            let (number, name) = (number as i64, format!("order.n{number}"));
            let names = HashMap::from([(&*name, number)]);
            cache.committed((position, Uuid::nil()), [(&stream, number, Version::new(1))], &names);
            cache.add_stream(number, &stream);
            cache.add_event_name(number, &EventName::new(&name).unwrap());
            cache.add_category(number, &Category::new(&name).unwrap());
        }
        let content = cache.content();
        assert_eq!((content.streams.len(), content.by_number.len()), (STREAMS.get(), STREAMS.get()));
        for names in [content.numbers.len(), content.event_names.len(), content.categories.len()] {
            assert!(names <= NAMES, "{names}");
        }
    }
}
