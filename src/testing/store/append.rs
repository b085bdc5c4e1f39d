//! Expected versions, atomicity, and unchanged content.

use std::time::Duration;

use bytes::Bytes;
use chrono::Utc;
use uuid::Uuid;

use super::Database;
use super::fixture::{
    append_one, append_to, assert_sound, conflict, event, events, fill, ids, name, recorded_ids, stream,
    version, whole_log,
};
use crate::event::{NewEvent, Position, StreamId, Tags, Version};
use crate::store::{Append, AppendError, Conflict, ExpectedVersion, StoreError, StreamAppend};

/// Checks every expectation on streams with no, one and three events.
pub async fn expected_versions_decide(database: Database) {
    let store = database.open().await;
    let forms = |version: u64| {
        [
            (ExpectedVersion::Any, true),
            (ExpectedVersion::NoStream, version == 0),
            (ExpectedVersion::StreamExists, version > 0),
            (ExpectedVersion::Exact(Version::NONE), version == 0),
            (ExpectedVersion::Exact(Version::new(1)), version == 1),
            (ExpectedVersion::Exact(Version::new(3)), version == 3),
            (ExpectedVersion::Exact(Version::new(4)), false),
        ]
    };
    for before in [0, 1, 3] {
        for (form, (expected, allowed)) in forms(before).into_iter().enumerate() {
            let stream = stream(format!("{before}-{form}"));
            if before > 0 {
                fill(&*store, &stream, before as usize).await;
            }
            let answer = append_to(&*store, &stream, expected, events(2)).await;
            if allowed {
                let appended = answer.unwrap_or_else(|error| panic!("{expected} at {before}: {error}"));
                assert_eq!(appended.versions, [Version::new(before + 2)]);
                assert_eq!(version(&*store, &stream).await, Version::new(before + 2));
            } else {
                let actual = Version::new(before);
                let found = Conflict { stream: stream.clone(), expected, actual: Some(actual) };
                assert_eq!(conflict(answer), found);
                assert_eq!(version(&*store, &stream).await, actual);
            }
        }
    }
    assert_sound(&whole_log(&*store).await);
}

/// Checks that a conflict is typed, and has what a new decision needs.
pub async fn conflicts_report_expected_and_actual(database: Database) {
    let store = database.open().await;
    fill(&*store, &stream("a"), 2).await;
    let expected = ExpectedVersion::Exact(Version::new(1));
    let found = conflict(append_to(&*store, &stream("a"), expected, events(1)).await);
    assert_eq!(found.stream, stream("a"));
    assert_eq!(found.expected, expected);
    assert_eq!(found.actual, Some(Version::new(2)));
    // With this version, the next attempt succeeds.
    let actual = ExpectedVersion::Exact(found.actual.unwrap());
    append_to(&*store, &stream("a"), actual, events(1)).await.unwrap();
}

/// Checks that a rejected append leaves no visible trace and blocks no other append.
pub async fn refused_appends_leave_no_trace(database: Database) {
    let store = database.open().await;
    fill(&*store, &stream("a"), 1).await;
    let before = recorded_ids(&whole_log(&*store).await);
    for _ in 0..20 {
        conflict(append_to(&*store, &stream("a"), ExpectedVersion::NoStream, events(5)).await);
        conflict(append_to(&*store, &stream("b"), ExpectedVersion::StreamExists, events(5)).await);
    }
    assert_eq!(recorded_ids(&whole_log(&*store).await), before);
    let appended =
        append_to(&*store, &stream("a"), ExpectedVersion::Exact(Version::new(1)), events(1)).await.unwrap();
    assert_eq!(appended.versions, [Version::new(2)]);
    assert_sound(&whole_log(&*store).await);
}

/// Checks that an append to several streams is atomic.
///
/// A conflict in its second part undoes the first.
pub async fn several_streams_are_all_or_nothing(database: Database) {
    let store = database.open().await;
    fill(&*store, &stream("b"), 1).await;
    let part =
        |id: &str, expected, count| StreamAppend { stream: stream(id), expected, events: events(count) };

    let append = Append::all(vec![
        part("a", ExpectedVersion::NoStream, 2),
        part("b", ExpectedVersion::NoStream, 1),
        part("c", ExpectedVersion::Any, 1),
    ]);
    let found = conflict(append_one(&*store, append).await);
    assert_eq!((found.stream, found.actual), (stream("b"), Some(Version::new(1))));
    assert_eq!(version(&*store, &stream("a")).await, Version::NONE);
    assert_eq!(version(&*store, &stream("c")).await, Version::NONE);

    let append = Append::all(vec![
        part("a", ExpectedVersion::NoStream, 2),
        part("b", ExpectedVersion::Exact(Version::new(1)), 3),
        part("c", ExpectedVersion::Any, 1),
    ]);
    let new: Vec<Uuid> = append.streams.iter().flat_map(|part| ids(&part.events)).collect();
    let appended = append_one(&*store, append).await.unwrap();
    assert_eq!(appended.versions, [Version::new(2), Version::new(4), Version::new(1)]);
    let log = whole_log(&*store).await;
    assert_sound(&log);
    assert_eq!(recorded_ids(&log[1..]), new, "the parts are in the log in their order");
    let positions: Vec<Position> = log[1..].iter().map(|event| event.position).collect();
    assert_eq!(appended.positions, positions);
}

/// Checks that each append of a batch is decided alone. Answers have the order of the appends.
pub async fn batches_are_refused_piecewise(database: Database) {
    let store = database.open().await;
    for i in 0..30 {
        fill(&*store, &stream(format!("taken-{i}")), 1).await;
    }
    let mut batch = Vec::new();
    let mut wanted = Vec::new();
    for i in 0..30 {
        let refused = i % 3 == 1;
        let to = if refused { stream(format!("taken-{i}")) } else { stream(i) };
        let new = events(1 + i % 2);
        if !refused {
            wanted.extend(ids(&new));
        }
        batch.push(Append::one(to, ExpectedVersion::NoStream, new));
    }
    let answers = store.append(batch).await;
    assert_eq!(answers.len(), 30);
    for (i, answer) in answers.into_iter().enumerate() {
        if i % 3 == 1 {
            assert_eq!(conflict(answer).actual, Some(Version::new(1)));
        } else {
            assert_eq!(answer.unwrap().versions, [Version::new(1 + i as u64 % 2)]);
        }
    }
    let log = whole_log(&*store).await;
    assert_sound(&log);
    let mut found = recorded_ids(&log[30..]);
    found.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(found, wanted);
}

/// Checks that a batch has a stream at most once: a later append to it is rejected, and no other.
pub async fn a_stream_comes_once_in_a_batch(database: Database) {
    let store = database.open().await;
    let exact = |version| ExpectedVersion::Exact(Version::new(version));
    let to = |id: &str, expected, count| Append::one(stream(id), expected, events(count));
    let part = |id: &str, expected| StreamAppend { stream: stream(id), expected, events: events(1) };
    let answers = store
        .append(vec![
            to("a", ExpectedVersion::NoStream, 2),
            to("a", exact(2), 1),
            Append::all(vec![part("b", ExpectedVersion::NoStream), part("a", ExpectedVersion::Any)]),
            to("b", ExpectedVersion::NoStream, 1),
            to("b", ExpectedVersion::Any, 1),
        ])
        .await;
    let accepted: Vec<bool> = answers
        .iter()
        .map(|answer| match answer {
            Ok(_) => true,
            Err(AppendError::Store(StoreError::Invalid { .. })) => false,
            Err(error) => panic!("{error}"),
        })
        .collect();
    assert_eq!(accepted, [true, false, false, true, false]);
    // In batches of their own, they are decided one after the other.
    let mut versions = Vec::new();
    for (expected, count) in [(exact(2), 1), (exact(2), 1), (ExpectedVersion::NoStream, 1), (exact(3), 2)] {
        versions.push(match append_to(&*store, &stream("a"), expected, events(count)).await {
            Ok(appended) => Ok(appended.versions[0].get()),
            Err(AppendError::Conflict(conflict)) => Err(conflict.actual.unwrap().get()),
            Err(error) => panic!("{error}"),
        });
    }
    assert_eq!(versions, [Ok(3), Err(3), Err(3), Ok(5)]);
    let log = whole_log(&*store).await;
    assert_sound(&log);
    assert_eq!(log.len(), 6);
}

/// Checks that an invalid append is rejected before anything happens. Other appends are unaffected.
pub async fn invalid_appends_are_refused_alone(database: Database) {
    let store = database.open().await;
    let part = |id: &str, count| StreamAppend {
        stream: stream(id),
        expected: ExpectedVersion::Any,
        events: events(count),
    };
    let answers = store
        .append(vec![
            Append::all(vec![]),
            Append::all(vec![part("good", 1)]),
            Append::all(vec![part("a", 0)]),
            Append::all(vec![part("a", 1), part("b", 0)]),
            Append::all(vec![part("a", 1), part("b", 1), part("a", 1)]),
            Append::all(vec![part("a", 1), part("b", 1)]),
        ])
        .await;
    let invalid: Vec<bool> = answers
        .iter()
        .map(|answer| match answer {
            Ok(_) => false,
            Err(AppendError::Store(StoreError::Invalid { .. })) => true,
            Err(error) => panic!("{error:?}"),
        })
        .collect();
    assert_eq!(invalid, [true, false, true, true, true, false]);
    assert_eq!(whole_log(&*store).await.len(), 3);
    assert!(store.append(vec![]).await.is_empty(), "no appends, no answers");
}

/// Checks that versions are 1, 2, 3 …. Positions increase along the log and match the answers.
pub async fn versions_have_no_gaps_and_positions_increase(database: Database) {
    let store = database.open().await;
    let mut positions = Vec::new();
    for round in 0..20 {
        positions.extend(fill(&*store, &stream(round % 3), 1 + round % 4).await);
    }
    let log = whole_log(&*store).await;
    assert_sound(&log);
    assert_eq!(positions, log.iter().map(|event| event.position).collect::<Vec<_>>());
    assert!(positions[0] > Position::START);
}

/// Checks ids, names, bytes of any kind and size, time and codec.
pub async fn everything_of_an_event_comes_back(database: Database) {
    let store = database.open().await;
    let payloads = [
        Bytes::new(),
        Bytes::from_static(b"\0"),
        Bytes::from((0..=255).collect::<Vec<u8>>()),
        Bytes::from_static("text, ünïcødé 🦀".as_bytes()),
        Bytes::from((0..1 << 20).map(|i| (i % 251) as u8).collect::<Vec<u8>>()),
    ];
    let sent: Vec<NewEvent> = payloads
        .iter()
        .enumerate()
        .map(|(i, payload)| NewEvent {
            id: Uuid::now_v7(),
            name: name(&format!("order.kind_{i}-x")),
            payload: payload.clone(),
            command_id: Uuid::new_v4(),
            correlation_id: None,
            metadata: payloads[payloads.len() - 1 - i].clone(),
            tags: Tags::new(),
        })
        .collect();
    let before = Utc::now();
    let appended = append_to(&*store, &stream("a"), ExpectedVersion::NoStream, sent.clone()).await.unwrap();
    let after = Utc::now();
    // The clock of the store may differ from that of this machine, but not by a day.
    let slack = Duration::from_secs(60);

    let by_stream = store.read_stream(&stream("a"), Version::NONE, 100).await.unwrap();
    let by_log = whole_log(&*store).await;
    for found in [by_stream, by_log] {
        assert_eq!(found.len(), sent.len());
        for (i, (found, sent)) in found.iter().zip(&sent).enumerate() {
            assert_eq!(found.id, sent.id);
            assert_eq!(found.stream, stream("a"));
            assert_eq!(found.version, Version::new(i as u64 + 1));
            assert_eq!(found.position, appended.positions[i]);
            assert_eq!(found.name, sent.name);
            assert_eq!(found.codec, store.info().codec);
            assert!(found.payload == sent.payload, "the payload of event {i} changed");
            assert_eq!(found.command_id, sent.command_id);
            assert!(found.metadata == sent.metadata, "the metadata of event {i} changed");
            assert!(found.recorded_at >= before - slack && found.recorded_at <= after + slack);
        }
    }
}

/// Checks that ids are text of any kind, compared byte by byte.
///
/// The category is part of the identity.
pub async fn streams_with_odd_ids_are_kept_apart(database: Database) {
    let store = database.open().await;
    let long = "x".repeat(400);
    let texts = [
        "a",
        "A",
        "a ",
        " a",
        "ä",
        "a\u{308}",
        "日本語",
        "🦀",
        "it's",
        "\"q\"",
        "back\\slash",
        "100%",
        "under_score",
        "a/b",
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
    let streams: Vec<StreamId> = ["order", "shop.order", "Order"]
        .iter()
        .flat_map(|category| texts.iter().map(move |text| StreamId::new(category, text).unwrap()))
        .collect();
    let sent: Vec<NewEvent> = events(streams.len());
    let batch = streams
        .iter()
        .zip(&sent)
        .map(|(stream, event)| Append::one(stream.clone(), ExpectedVersion::NoStream, vec![event.clone()]))
        .collect();
    for answer in store.append(batch).await {
        answer.unwrap();
    }
    for (stream, sent) in streams.iter().zip(&sent) {
        let found = store.read_stream(stream, Version::NONE, 10).await.unwrap();
        assert_eq!(recorded_ids(&found), [sent.id], "{stream}");
        assert_eq!(found[0].stream, *stream);
        let only = crate::store::Filter::all().with_streams([stream.clone()]);
        let found =
            super::fixture::scan(&*store, crate::store::ReadLog::after(Position::START).filter(only)).await.0;
        assert_eq!(recorded_ids(&found), [sent.id], "{stream}");
    }
    let log = whole_log(&*store).await;
    assert_eq!(log.iter().map(|event| event.stream.clone()).collect::<Vec<_>>(), streams);
}

/// Checks batches around the sizes at which a back end may split them.
pub async fn large_batches_arrive_whole(database: Database) {
    let store = database.open().await;
    let mut sent = Vec::new();
    for count in [1, 2, 3, 7, 8, 9, 63, 64, 65, 127, 128, 129, 1_000, 2_500] {
        // Half of them in one append, half in separate appends.
        let new = events(count);
        sent.extend(ids(&new));
        let mut batch =
            vec![Append::one(stream("one"), ExpectedVersion::Any, new[..count.div_ceil(2)].to_vec())];
        for (i, event) in new[count.div_ceil(2)..].iter().enumerate() {
            batch.push(Append::one(stream(i), ExpectedVersion::Any, vec![event.clone()]));
        }
        for answer in store.append(batch).await {
            answer.unwrap();
        }
    }
    let log = whole_log(&*store).await;
    assert_sound(&log);
    let mut found = recorded_ids(&log);
    found.sort_unstable();
    sent.sort_unstable();
    assert_eq!(found, sent);
}

/// Checks that a reopened store is the same store, with all its content.
pub async fn appended_events_survive_reopening(database: Database) {
    let store = database.open().await;
    let info = store.info().clone();
    fill(&*store, &stream("a"), 3).await;
    let before = recorded_ids(&whole_log(&*store).await);
    drop(store);
    let store = database.open().await;
    assert_eq!(store.info().id, info.id);
    assert_eq!(store.info().codec, info.codec);
    assert_eq!(recorded_ids(&whole_log(&*store).await), before);
    let expected = ExpectedVersion::Exact(Version::new(3));
    append_to(&*store, &stream("a"), expected, vec![event("order.placed")]).await.unwrap();
}
