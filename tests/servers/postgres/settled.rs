//! A lone append notifies its own process of the high-water mark and caches its event.
//!
//! The oracle tests that readers miss no event by it.

use sqlx::Connection;
use storied::{EventStore, ExpectedVersion, Position, PostgresOptions, PostgresStore, ReadLog, StoreError};

use crate::postgres::oracle::append_one;
use crate::postgres::tools::{append, connect, events, eventually, exact, run, stream, whole_log};
use crate::support::PostgresServer;

/// A lone append returns how far the log is readable, so no query of the server is needed. With
/// another append in flight, it does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_append_advances_the_mark() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    let mut appended = store.appended();
    let next =
        async |version| append(&store, &stream(1), exact(version), events(1)).await.unwrap().positions[0];
    let first = next(0).await;
    appended.wait_for(|head| *head == first).await.unwrap();
    // The server is queried once after the last connection was opened.
    store.high_water_mark().await.unwrap();
    run(&url, "ALTER FUNCTION storied.high_water_mark() RENAME TO hidden_high_water_mark").await;
    let second = next(1).await;
    assert_eq!(*appended.borrow_and_update(), second);
    let told = store.read_log(ReadLog::after(first).upto(second)).await.unwrap();
    // The first event of a stream, and one without an exact expectation.
    for (id, expected) in [(8, exact(0)), (8, ExpectedVersion::Any), (9, ExpectedVersion::Any)] {
        let position = append(&store, &stream(id), expected, events(1)).await.unwrap().positions[0];
        assert_eq!(*appended.borrow_and_update(), position);
    }
    let before_other = *appended.borrow();

    let mut other = connect(&url).await;
    let mut begun = other.begin().await.unwrap();
    let event = events(1).remove(0);
    append_one(&mut begun, &stream(2), &event).await.unwrap();
    let last = next(2).await;
    assert_eq!(*appended.borrow_and_update(), before_other);
    begun.commit().await.unwrap();
    run(&url, "ALTER FUNCTION storied.hidden_high_water_mark() RENAME TO high_water_mark").await;
    appended.wait_for(|head| *head == last).await.unwrap();

    // Cached events are equal to those read from the server.
    let log = whole_log(&PostgresStore::connect(&url).await.unwrap()).await;
    assert_eq!(log.len(), 7);
    assert_eq!(format!("{:?}", told.events), format!("{:?}", &log[1..2]));
    assert_eq!(log[5].id, event.id);

    // A page ends at an event, also if the log has a hole.
    assert!(append(&store, &stream(1), exact(0), events(1)).await.is_err());
    let after_hole = next(3).await;
    let hole = Position::new(after_hole.get() - 1);
    let page = store.read_log(ReadLog::after(last).upto(hole)).await.unwrap();
    assert_eq!((page.events.len(), page.scanned_to), (0, last));
}

/// A connection to a pooler may lead to another server than before, which only a query finds out.
#[tokio::test]
async fn an_append_through_a_pooler_settles_nothing() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresOptions::new().url(&url).transaction_pooler(true).connect().await.unwrap();
    let mut appended = store.appended();
    append(&store, &stream(1), exact(0), events(1)).await.unwrap();
    let head = store.high_water_mark().await.unwrap();
    appended.wait_for(|known| *known == head).await.unwrap();
    run(&url, "ALTER FUNCTION storied.high_water_mark() RENAME TO hidden_high_water_mark").await;
    append(&store, &stream(1), exact(1), events(1)).await.unwrap();
    append(&store, &stream(2), exact(0), events(1)).await.unwrap();
    assert_eq!(*appended.borrow_and_update(), head);
}

/// A server that takes over may lack events that the previous one acknowledged (F43).
///
/// Such events in the cache are not part of the log any more, and events that were read are
/// missing. The sequence does not show it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_missing_on_a_new_primary_are_not_cached() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    let mut appended = store.appended();
    let mut last = Position::START;
    for version in 0..3 {
        let done = append(&store, &stream(1), exact(version), events(1)).await.unwrap();
        (_, last) = (last, done.positions[0]);
        appended.wait_for(|head| *head >= last).await.unwrap();
    }
    let newest = ReadLog::after(Position::new(last.get() - 1)).upto(last);
    assert_eq!(store.read_log(newest.clone()).await.unwrap().events.len(), 1);
    run(
        &url,
        &format!(
            "ALTER TABLE storied.events DISABLE TRIGGER USER; DELETE FROM storied.events WHERE position = {last};
             ALTER TABLE storied.events ENABLE TRIGGER USER;
             SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE pid <> pg_backend_pid() AND datname = current_database()"
        ),
    )
    .await;
    eventually("the loss is detected", async || match store.high_water_mark().await {
        Err(StoreError::Incompatible { expected, found, .. }) => {
            assert!(
                expected.contains(&format!("position {last}")) && found.contains("no event"),
                "{expected}; {found}"
            );
            true
        }
        Err(error) if error.is_transient() => false,
        other => panic!("{other:?}"),
    })
    .await;
    // Also after a lone append: it does not settle the missing events.
    let next = append(&store, &stream(2), exact(0), events(1)).await.unwrap().positions[0];
    assert!(*appended.borrow_and_update() < next);
    assert!(matches!(store.read_log(newest.clone()).await, Err(StoreError::Incompatible { .. })));
    // Another process has not read the lost events.
    let fresh = PostgresStore::connect(&url).await.unwrap();
    assert_eq!(fresh.read_log(newest).await.unwrap().events.len(), 0);
    assert_eq!(fresh.high_water_mark().await.unwrap(), next);
}

/// Events that follow the mark without a hole are read without a query of the mark, unless the
/// server lacks the event at the mark.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consecutive_events_are_read_without_the_mark() {
    let url = PostgresServer::shared().await.create_database().await;
    let (writer, reader) =
        (PostgresStore::connect(&url).await.unwrap(), PostgresStore::connect(&url).await.unwrap());
    let write = async |version, count| {
        let done = append(&writer, &stream(1), exact(version), events(count)).await.unwrap();
        *done.positions.last().unwrap()
    };
    write(0, 1).await;
    let mark = reader.high_water_mark().await.unwrap();
    run(&url, "ALTER FUNCTION storied.high_water_mark() RENAME TO hidden_high_water_mark").await;
    let last = write(1, 3).await;
    let page = reader.read_log(ReadLog::after(mark)).await.unwrap();
    assert_eq!((page.events.len(), page.scanned_to, page.head), (3, last, last));

    // The position of a refused append is a hole, and could be that of an append in flight.
    assert!(append(&writer, &stream(1), exact(0), events(1)).await.is_err());
    let beyond = write(4, 1).await;
    assert!(beyond.get() > last.get() + 1);
    reader.read_log(ReadLog::after(last)).await.unwrap_err();
    run(&url, "ALTER FUNCTION storied.hidden_high_water_mark() RENAME TO high_water_mark").await;
    let page = reader.read_log(ReadLog::after(last)).await.unwrap();
    assert_eq!((page.events.len(), page.scanned_to), (1, beyond));

    // As on a server that took over without that event, and gave its position to another one.
    let lost = format!(
        "ALTER TABLE storied.events DISABLE TRIGGER USER;
         UPDATE storied.events SET id = gen_random_uuid() WHERE position = {beyond};
         ALTER TABLE storied.events ENABLE TRIGGER USER"
    );
    run(&url, &lost).await;
    write(5, 1).await;
    let error = reader.read_log(ReadLog::after(beyond)).await.unwrap_err();
    assert!(matches!(error, StoreError::Incompatible { .. }), "{error}");
}
