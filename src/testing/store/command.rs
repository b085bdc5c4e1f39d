//! Records of commands, and the events that commands caused.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use chrono::DateTime;
use uuid::Uuid;

use super::Database;
use super::fixture::{append_one, events, fill, ids, recorded_ids, stream};
use crate::event::{Metadata, NewEvent, Position, StreamId, Version};
use crate::store::{Append, CommandEvents, CommandRecord, EventStore, ExpectedVersion, StreamAppend};

fn record(id: Uuid, outcome: &'static [u8]) -> CommandRecord {
    CommandRecord {
        id,
        name: "bank.transfer".into(),
        fingerprint: Uuid::new_v5(&id, outcome),
        outcome: Bytes::from_static(outcome),
        recorded_at: DateTime::UNIX_EPOCH,
    }
}

/// Checks that the first record stays unchanged.
///
/// It is found from everywhere, and has the time of the store.
pub async fn the_first_record_of_a_command_counts(database: Database) {
    let store = database.open().await;
    let id = Uuid::now_v7();
    assert_eq!(store.command(id).await.unwrap(), None);
    let first = store.record_command(record(id, b"first\0")).await.unwrap();
    assert_eq!(CommandRecord { recorded_at: DateTime::UNIX_EPOCH, ..first.clone() }, record(id, b"first\0"));
    assert!(first.recorded_at > DateTime::UNIX_EPOCH, "the store's clock");
    assert_eq!(store.record_command(record(id, b"second")).await.unwrap(), first);
    let other = database.open().await;
    assert_eq!(other.record_command(record(id, b"")).await.unwrap(), first);
    assert_eq!(other.command(id).await.unwrap(), Some(first));
    assert_eq!(other.command(Uuid::now_v7()).await.unwrap(), None);
    let empty = Uuid::now_v7();
    assert_eq!(other.record_command(record(empty, b"")).await.unwrap().outcome, Bytes::new());
}

/// Checks that concurrent records of one command have one winner, and that all callers receive it.
pub async fn one_of_many_rivals_records_a_command(database: Database) {
    const OUTCOMES: [&[u8]; 8] = [b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7"];
    let stores = [database.open().await, database.open().await];
    for _ in 0..20 {
        let id = Uuid::now_v7();
        let rivals = OUTCOMES.iter().enumerate().map(|(n, outcome)| {
            let store = stores[n % 2].clone();
            tokio::spawn(async move { store.record_command(record(id, outcome)).await.unwrap() })
        });
        let results = futures_util::future::join_all(rivals).await;
        let winner = stores[0].command(id).await.unwrap().unwrap();
        assert!(results.into_iter().all(|result| result.unwrap() == winner), "exactly one first record");
    }
}

/// Checks concurrent records and lookups.
///
/// Every caller receives the record of its own command, in any order and on any connection.
pub async fn many_commands_are_recorded_at_once(database: Database) {
    let stores = [database.open().await, database.open().await];
    let ids: Vec<_> = (0..200).map(|_| Uuid::now_v7()).collect();
    let known = stores[0].record_command(record(Uuid::now_v7(), b"x")).await.unwrap().id;
    let both = ids.iter().zip(ids.iter().rev()).flat_map(|(one, other)| [(0, *one), (1, *other)]);
    let tasks = both.map(|(n, id)| {
        let store = stores[n].clone();
        tokio::spawn(async move {
            let recorded = store.record_command(record(id, b"x")).await.unwrap();
            (id, recorded.clone(), store.command(id).await.unwrap() == Some(recorded))
        })
    });
    let mut firsts = std::collections::HashMap::new();
    // The same command concurrently, too.
    let repeated = futures_util::future::join_all((0..10).map(|_| stores[0].command(known))).await;
    assert!(repeated.into_iter().all(|found| found.unwrap().is_some_and(|found| found.id == known)));
    for task in futures_util::future::join_all(tasks).await {
        let (id, recorded, found) = task.unwrap();
        assert!(found && recorded.id == id && recorded.fingerprint == record(id, b"x").fingerprint);
        assert_eq!(*firsts.entry(id).or_insert(recorded.recorded_at), recorded.recorded_at, "recorded once");
    }
    assert_eq!(firsts.len(), ids.len());
}

/// Checks that old records are deleted, a bounded number per call, and may be recorded again.
pub async fn old_records_are_forgotten(database: Database) {
    let store = database.open().await;
    let ids: Vec<_> = (0..5).map(|_| Uuid::now_v7()).collect();
    for id in &ids {
        store.record_command(record(*id, b"x")).await.unwrap();
    }
    assert_eq!(store.forget_commands(Duration::from_secs(3_600), 10).await.unwrap(), 0);
    assert_eq!(store.forget_commands(Duration::MAX, 10).await.unwrap(), 0);
    assert_eq!(store.forget_commands(Duration::ZERO, 3).await.unwrap(), 3);
    assert_eq!(store.forget_commands(Duration::ZERO, 10).await.unwrap(), 2);
    for id in &ids {
        assert_eq!(store.command(*id).await.unwrap(), None);
    }
    assert_eq!(store.record_command(record(ids[0], b"y")).await.unwrap().outcome, Bytes::from_static(b"y"));
}

/// Appends events of `command` to `stream`, and returns their range.
async fn commanded(store: &dyn EventStore, stream: &StreamId, command: Uuid, count: usize) -> CommandEvents {
    let mut caused = events(count);
    caused.iter_mut().for_each(|event| event.command_id = command);
    let append = Append::one(stream.clone(), ExpectedVersion::Any, caused);
    let appended = append_one(store, append).await.unwrap();
    let last = appended.versions[0];
    let first = Version::new(last.get() + 1 - count as u64);
    CommandEvents { first, last, position: *appended.positions.last().unwrap() }
}

/// Checks that the events of a command are found by its id.
///
/// Ids may be of any kind; only streams with such events have a result.
pub async fn events_of_a_command_are_found(database: Database) {
    let store = database.open().await;
    let ids = [
        Uuid::now_v7(),
        Uuid::new_v4(),
        Uuid::nil(),
        Uuid::max(),
        // A UUIDv7 of 1970.
        Uuid::from_u128(0x7000_8000_0000_0000_0001),
    ];
    // Ids that differ in case or in a trailing space, and the same id in another category.
    let streams =
        [stream("a"), stream("A"), stream("a "), stream("é/%"), StreamId::new("order2", "a").unwrap()];
    for stream in &streams {
        fill(&*store, stream, 2).await;
        assert_eq!(store.command_events(stream, ids[0]).await.unwrap(), None);
    }
    let mut expected = Vec::new();
    for (count, id) in (1..).zip(ids) {
        for stream in &streams[..4] {
            expected.push((stream.clone(), id, commanded(&*store, stream, id, count).await));
            fill(&*store, stream, 1).await;
        }
    }
    let other = database.open().await;
    for (stream, id, events) in &expected {
        assert_eq!(store.command_events(stream, *id).await.unwrap(), Some(*events), "{stream} {id}");
        assert_eq!(other.command_events(stream, *id).await.unwrap(), Some(*events), "{stream} {id}");
        assert_eq!(store.command_events(stream, Uuid::new_v4()).await.unwrap(), None);
    }
    for id in ids {
        assert_eq!(store.command_events(&streams[4], id).await.unwrap(), None);
        assert_eq!(store.command_events(&stream("never"), id).await.unwrap(), None);
    }
    // Each of many concurrent lookups gets its answer.
    let found = expected.iter().map(|(stream, id, _)| store.command_events(stream, *id));
    let found = futures_util::future::join_all(found).await;
    for ((stream, id, events), found) in expected.iter().zip(found) {
        assert_eq!(found.unwrap(), Some(*events), "{stream} {id}");
    }
    // Appended again, as an import may do: the range is from the first event to the last.
    let (stream, id, before) = &expected[0];
    let later = commanded(&*store, stream, *id, 2).await;
    let all = CommandEvents { first: before.first, ..later };
    assert_eq!(store.command_events(stream, *id).await.unwrap(), Some(all));
}

/// Returns events with metadata, all of `command` and with `correlation`.
fn correlated(command: Uuid, correlation: Uuid, count: usize) -> Vec<NewEvent> {
    let metadata = Metadata { correlation_id: Some(correlation), ..Metadata::default() }.encode().unwrap();
    let correlated = |event| NewEvent {
        command_id: command,
        correlation_id: Some(correlation),
        metadata: metadata.clone(),
        ..event
    };
    events(count).into_iter().map(correlated).collect()
}

/// Checks that the events of a command and of its nested commands are found by its id.
pub async fn events_are_found_by_their_correlation(database: Database) {
    let store = database.open().await;
    let (trigger, nested) = (Uuid::now_v7(), Uuid::now_v7());
    let mut expected = Vec::new();
    fill(&*store, &stream("a"), 1).await;
    let mut append = async |id: &str, expected_version, events: Vec<NewEvent>| {
        let wanted = ids(&events);
        let appended = append_one(&*store, Append::one(stream(id), expected_version, events)).await;
        if appended.is_ok() {
            expected.extend(wanted);
        }
        fill(&*store, &stream("between"), 1).await;
        appended
    };
    // The command itself, with and without its id as the correlation id.
    append("a", ExpectedVersion::Any, correlated(trigger, trigger, 1)).await.unwrap();
    let mut plain = events(1);
    plain[0].command_id = trigger;
    append("b", ExpectedVersion::NoStream, plain).await.unwrap();
    // Nested commands: to a new stream, to a known one, and several events.
    append("c", ExpectedVersion::NoStream, correlated(nested, trigger, 1)).await.unwrap();
    append("c", ExpectedVersion::Exact(Version::new(1)), correlated(nested, trigger, 1)).await.unwrap();
    append("c", ExpectedVersion::Exact(Version::new(2)), correlated(nested, trigger, 3)).await.unwrap();
    append("d", ExpectedVersion::Any, correlated(Uuid::now_v7(), trigger, 2)).await.unwrap();
    // A refused append leaves no trace.
    append("c", ExpectedVersion::NoStream, correlated(nested, trigger, 2)).await.unwrap_err();
    append("c", ExpectedVersion::Exact(Version::new(3)), correlated(nested, trigger, 1)).await.unwrap_err();
    // A batch of which one append is refused, one is without a correlation and one has two streams.
    let several = correlated(Uuid::now_v7(), trigger, 3);
    let [first, second, third] = [0, 1, 2].map(|n| vec![several[n].clone()]);
    let batch = vec![
        Append::one(stream("c"), ExpectedVersion::NoStream, correlated(nested, trigger, 1)),
        Append::one(stream("e"), ExpectedVersion::NoStream, first),
        Append::one(stream("f"), ExpectedVersion::NoStream, events(2)),
        Append::all(vec![
            StreamAppend { stream: stream("g"), expected: ExpectedVersion::NoStream, events: second },
            StreamAppend { stream: stream("h"), expected: ExpectedVersion::NoStream, events: third },
        ]),
    ];
    let outcomes = store.append(batch).await;
    assert_eq!(outcomes.iter().map(Result::is_ok).collect::<Vec<_>>(), [false, true, true, true]);
    let in_batch: Vec<Uuid> = ids(&several);
    // A batch of one-event appends to known streams.
    let known = correlated(Uuid::now_v7(), trigger, 2);
    let batch = vec![
        Append::one(stream("e"), ExpectedVersion::Exact(Version::new(1)), vec![known[0].clone()]),
        Append::one(stream("g"), ExpectedVersion::Exact(Version::new(1)), vec![known[1].clone()]),
        Append::one(stream("f"), ExpectedVersion::Exact(Version::new(2)), events(1)),
    ];
    assert!(store.append(batch).await.iter().all(Result::is_ok));
    let other = database.open().await;
    for store in [&store, &other] {
        let found = store.correlated(trigger, Position::START, 100).await.unwrap();
        assert!(found.is_sorted_by(|a, b| a.position < b.position));
        assert_eq!(recorded_ids(&found)[..expected.len()], expected);
        let rest: BTreeSet<Uuid> = found[expected.len()..].iter().map(|event| event.id).collect();
        assert_eq!(rest, in_batch.iter().copied().chain(ids(&known)).collect());
        assert_eq!(found[2].stream, stream("c"));
        assert_eq!(found[2].decode_metadata().unwrap().correlation_id, Some(trigger));
        // In pages.
        let mut pages = Vec::new();
        while let page @ [.., last] =
            &store.correlated(trigger, pages.last().map_or(Position::START, |(at, _)| *at), 2).await.unwrap()
                [..]
        {
            assert!(page.len() <= 2 && last.position > Position::START);
            pages.extend(page.iter().map(|event| (event.position, event.id)));
        }
        assert_eq!(pages.iter().map(|(_, id)| *id).collect::<Vec<_>>(), recorded_ids(&found));
        assert_eq!(store.correlated(trigger, Position::START, 0).await.unwrap().len(), 1);
        // A nested command by itself.
        assert_eq!(store.correlated(nested, Position::START, 100).await.unwrap().len(), 5);
        assert!(store.correlated(Uuid::now_v7(), Position::START, 100).await.unwrap().is_empty());
    }
}
