//! Tags of events, and queries.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Database;
use super::fixture::{
    append_one, append_to, event, events, fill, ids, recorded_ids, stream, version, whole_log,
};
use crate::event::{Event, NewEvent, Position, Tags, Version};
use crate::store::{Append, AppendError, Appended, EventStore, ExpectedVersion, Query, StoreError};

/// Events of the suite, for queries with names.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum OrderEvent {
    Placed,
    Paid,
}

impl Event for OrderEvent {
    const CATEGORY: &'static str = "order";
}

/// Matches the events of a variant of [`OrderEvent`], once a tag is added.
pub(super) fn named(variant: &str) -> Query {
    Query::variants::<OrderEvent>([variant])
}

/// Returns a unique event with tags, given as `key:value key:value`.
pub(super) fn tagged(event_name: &str, tags: &str) -> NewEvent {
    let pairs = tags.split_whitespace().filter_map(|tag| tag.split_once(':'));
    let tags = pairs.fold(Tags::new(), |tags, (key, value)| tags.tag(key, value));
    NewEvent { tags, ..event(event_name) }
}

/// Appends an event to a stream, at any version; returns its position.
pub(super) async fn put(store: &dyn EventStore, id: impl fmt::Display, event: NewEvent) -> Position {
    append_to(store, &stream(id), ExpectedVersion::Any, vec![event]).await.unwrap().positions[0]
}

/// Returns the positions of the events that match a query.
pub(super) async fn found(store: &dyn EventStore, query: Query) -> Vec<Position> {
    store.read(query).await.unwrap().0.iter().map(|event| event.position).collect()
}

/// Matches the events of a course.
pub(super) fn course(id: &str) -> Query {
    Query::tagged("course", id)
}

/// Returns whether an append was refused as invalid.
fn is_invalid(answer: Result<Appended, AppendError>) -> bool {
    match answer {
        Ok(_) => false,
        Err(AppendError::Store(StoreError::Invalid { .. })) => true,
        Err(error) => panic!("{error:?}"),
    }
}

/// Checks queries by one tag, by several, by names, and by several items; in the order of the log.
pub async fn events_are_found_by_their_tags(database: Database) {
    let (store, other) = (database.open().await, database.open().await);
    for (id, (name, tags)) in [
        ("order.placed", "course:c1 student:s1"),
        ("order.paid", "course:c1"),
        ("order.placed", "student:s1 course:c2"),
        ("order.placed", ""),
        ("order.paid", "student:s1 term:t course:c1"),
        ("order.placed", "course:c1 student:s2"),
    ]
    .into_iter()
    .enumerate()
    {
        put(&*store, id, tagged(name, tags)).await;
    }
    let log = whole_log(&*store).await;
    for (query, expected) in [
        (course("c1"), vec![0, 1, 4, 5]),
        (Query::tagged("student", "s1"), vec![0, 2, 4]),
        (course("c1").tag("student", "s1"), vec![0, 4]),
        (course("c1").tag("student", "s1").tag("term", "t"), vec![4]),
        (course("c3"), vec![]),
        (course("s1"), vec![]),
        (course("c1").tag("student", "s3"), vec![]),
        (named("placed").tag("course", "c1"), vec![0, 5]),
        (Query::variants::<OrderEvent>(["placed", "paid"]).tag("course", "c1"), vec![0, 1, 4, 5]),
        (Query::any([course("c1"), Query::tagged("student", "s1")]), vec![0, 1, 2, 4, 5]),
        (Query::any([course("c2"), course("c1")]).tag("student", "s1"), vec![0, 2, 4]),
        (Query::any([named("paid"), named("placed")]).tag("student", "s1"), vec![0, 2, 4]),
        (Query::any([named("paid").tag("course", "c1"), course("c1").tag("student", "s2")]), vec![1, 4, 5]),
    ] {
        let expected: Vec<_> = expected.into_iter().map(|index: usize| log[index].clone()).collect();
        for store in [&store, &other] {
            let (events, _) = store.read(query.clone()).await.unwrap();
            assert_eq!(format!("{events:?}"), format!("{expected:?}"), "{query:?}");
        }
    }
}

/// Checks that pages of any size make up the events of a query.
pub async fn queries_are_read_in_pages(database: Database) {
    let store = database.open().await;
    let new: Vec<NewEvent> = (0..300)
        .map(|n| {
            let (a, b) = (if n % 3 == 0 { "a:1" } else { "" }, if n % 4 == 0 { "b:2" } else { "" });
            tagged("order.placed", &format!("{a} {b}"))
        })
        .collect();
    fill(&*store, &stream("before"), 3).await;
    let appended = append_to(&*store, &stream("a"), ExpectedVersion::Any, new.clone()).await.unwrap();
    let (a, b) = (Query::tagged("a", 1), Query::tagged("b", 2));
    for query in [a.clone(), a.clone().tag("b", 2), Query::any([a, b])] {
        let matching = new.iter().zip(&appended.positions);
        let matching = matching.filter(|(event, _)| query.matches(&event.name, &event.tags));
        let expected: Vec<Position> = matching.map(|(_, position)| *position).collect();
        assert!(expected.len() >= 25);
        for limit in [1, 7, 25, 1_000] {
            let mut found: Vec<Position> = Vec::new();
            loop {
                let after = found.last().copied().unwrap_or_default();
                let page = store.matching(&query, after, limit).await.unwrap();
                assert!(page.len() <= limit);
                found.extend(page.iter().map(|event| event.position));
                if page.len() < limit {
                    break;
                }
            }
            assert_eq!(found, expected, "{query:?} by {limit}");
        }
        let end = Position::new(u64::MAX);
        assert!(store.matching(&query, end, 5).await.unwrap().is_empty());
    }
    // More than a page of a read.
    let many = (0..2_100).map(|_| tagged("order.placed", "many:1")).collect();
    let appended = append_to(&*store, &stream("many"), ExpectedVersion::Any, many).await.unwrap();
    assert_eq!(found(&*store, Query::tagged("many", 1)).await, appended.positions);
}

/// Checks that only tags count, not the text of a stream or of an event.
pub async fn events_without_tags_match_no_query(database: Database) {
    let store = database.open().await;
    fill(&*store, &stream("a"), 3).await;
    assert!(found(&*store, Query::tagged("order", "a")).await.is_empty());
    let position = put(&*store, "a", tagged("order.placed", "order:a")).await;
    fill(&*store, &stream("a"), 3).await;
    assert_eq!(found(&*store, Query::tagged("order", "a")).await, [position]);
    assert_eq!(found(&*store, named("placed").tag("order", "a")).await, [position]);
    let (_, boundary) = store.read(Query::tagged("order", "a")).await.unwrap();
    fill(&*store, &stream("a"), 3).await;
    let append = Append::one(stream("b"), ExpectedVersion::NoStream, events(1));
    append_one(&*store, append.unless(boundary)).await.unwrap();
}

/// Checks that tags are text of any kind, compared byte by byte.
pub async fn tags_with_odd_text_are_kept_apart(database: Database) {
    let store = database.open().await;
    let long = "x".repeat(190);
    let texts = [
        "a",
        "A",
        "a ",
        " a",
        "aa",
        "ä",
        "a\u{308}",
        "日本語",
        "🦀",
        "it's",
        "\"q\"",
        "back\\slash",
        "100%",
        "_",
        "a:b",
        ":",
        "[1,2]",
        "{}",
        "null",
        "0",
        "00",
        "$1",
        "?1",
        ";--",
        &long,
    ];
    let mut sent = Vec::new();
    // An append for each key: a back end may limit the number of tags of an append.
    for key in ["k", "K", "k.x", "k-x"] {
        let with =
            |text: &str| NewEvent { tags: Tags::new().tag(key, text).tag("all", 1), ..event("order.placed") };
        let new = texts.map(with).to_vec();
        sent.extend(ids(&new));
        append_to(&*store, &stream("a"), ExpectedVersion::Any, new).await.unwrap();
    }
    let mut expected = sent.iter();
    for key in ["k", "K", "k.x", "k-x"] {
        for (text, id) in texts.iter().zip(&mut expected) {
            for query in [Query::tagged(key, text), Query::tagged(key, text).tag("all", 1)] {
                let (events, _) = store.read(query).await.unwrap();
                assert_eq!(recorded_ids(&events), [*id], "{key}:{text}");
            }
        }
    }
    let all = store.read(Query::tagged("all", 1)).await.unwrap().0;
    assert_eq!(recorded_ids(&all), sent);
}

/// Checks that reads and appends refuse an invalid query, and accept the largest valid one.
pub async fn invalid_queries_are_refused(database: Database) {
    let store = database.open().await;
    let items = |count: usize| Query::any((0..count).map(|n| Query::tagged("a", n)));
    let tags = |count: usize| (1..count).fold(Query::tagged("a", 0), |query, n| query.tag("a", n));
    let queries = [
        Query::any([]),
        named("placed"),
        named("unknown").tag("a", 1),
        items(Query::MAX_ITEMS + 1),
        tags(Query::MAX_TAGS + 1),
        Query::tagged("a b", 1),
        Query::tagged("", 1),
        Query::tagged("a", ""),
        Query::tagged("a", "x\ny"),
        Query::tagged("a", "x".repeat(200)),
        Query::any([Query::tagged("a", 1), Query::tagged("ä", 1)]),
        Query::any([Query::tagged("a", 1), named("placed")]),
    ];
    let count = queries.len();
    for (n, query) in queries.into_iter().enumerate() {
        let read = store.read(query.clone()).await.map(drop);
        let matching = store.matching(&query, Position::START, 10).await.map(drop);
        for answer in [read, matching] {
            let Err(StoreError::Invalid { reason }) = &answer else { panic!("{query:?}: {answer:?}") };
            assert!(reason.starts_with("invalid query: "), "{reason}");
        }
        let plain = |id: &str| Append::one(stream(format!("{id}-{n}")), ExpectedVersion::NoStream, events(1));
        let batch = vec![plain("a"), plain("b").unless(query.exists()), plain("c")];
        let invalid: Vec<bool> = store.append(batch).await.into_iter().map(is_invalid).collect();
        assert_eq!(invalid, [false, true, false]);
    }
    assert_eq!(whole_log(&*store).await.len(), 2 * count);
    let part = |n: usize| (1..4).fold(Query::tagged("a", 4 * n), |query, k| query.tag("a", 4 * n + k));
    for query in [items(Query::MAX_ITEMS), tags(Query::MAX_TAGS), Query::any((0..16).map(part))] {
        let (_, boundary) = store.read(query).await.unwrap();
        let append = Append::one(stream("d"), ExpectedVersion::Any, events(1));
        append_one(&*store, append.unless(boundary)).await.unwrap();
    }
}

/// Checks that an event with invalid tags is refused alone.
pub async fn invalid_tags_are_refused_alone(database: Database) {
    let store = database.open().await;
    let tags = |count: usize| (1..count).fold(Tags::new().tag("a", 0), |tags, n| tags.tag("a", n));
    let mut expected = Vec::new();
    for (n, tags) in [
        tags(Tags::MAX + 1),
        Tags::new().tag("a", 0).tag("a b", 1),
        Tags::new().tag("a", 0).tag("", 1),
        Tags::new().tag("a", 0).tag("b", ""),
        Tags::new().tag("a", 0).tag("b", "\0"),
        Tags::new().tag("a", 0).tag("b", "x".repeat(199)),
    ]
    .into_iter()
    .enumerate()
    {
        let one =
            |id: &str, events| Append::one(stream(format!("{id}-{n}")), ExpectedVersion::NoStream, events);
        let bad = NewEvent { tags, ..event("order.placed") };
        let good = [tagged("order.placed", "a:0"), tagged("order.placed", "a:0")];
        expected.extend(ids(&good));
        let [first, last] = good.map(|event| vec![event]);
        let batch = vec![one("a", first), one("b", vec![event("order.placed"), bad]), one("c", last)];
        let invalid: Vec<bool> = store.append(batch).await.into_iter().map(is_invalid).collect();
        assert_eq!(invalid, [false, true, false]);
        assert_eq!(version(&*store, &stream(format!("b-{n}"))).await, Version::NONE);
    }
    let mut stored = recorded_ids(&store.read(Query::tagged("a", 0)).await.unwrap().0);
    stored.sort_unstable();
    expected.sort_unstable();
    assert_eq!(stored, expected);
    // The tags of all events of an append have a limit, too.
    let many = |id: &str, count: usize| {
        let event = |n: usize| NewEvent { tags: Tags::new().tag("c", n), ..event("order.placed") };
        Append::one(stream(id), ExpectedVersion::NoStream, (0..count).map(event).collect())
    };
    let batch = vec![many("d", Append::MAX_TAGS), many("e", Append::MAX_TAGS + 1)];
    let invalid: Vec<bool> = store.append(batch).await.into_iter().map(is_invalid).collect();
    assert_eq!(invalid, [false, true]);
    assert_eq!(version(&*store, &stream("e")).await, Version::NONE);
    // The most and longest tags.
    let value = |n: usize| format!("{n:0>198}");
    let most = (0..Tags::MAX).fold(Tags::new(), |tags, n| tags.tag("b", value(n)));
    let position = put(&*store, "most", NewEvent { tags: most, ..event("order.placed") }).await;
    let all = (1..Tags::MAX).fold(Query::tagged("b", value(0)), |query, n| query.tag("b", value(n)));
    assert_eq!(found(&*store, all).await, [position]);
}
