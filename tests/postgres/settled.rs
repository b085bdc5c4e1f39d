//! What an append that is alone tells its own process: how far the log may be read, and what it has just written. That nobody
//! misses an event by it is for the oracle.

use sqlx::Connection;
use storied::{EventStore, Position, PostgresStore, ReadLog, StoreError};

use crate::oracle::append_one;
use crate::support::PostgresServer;
use crate::tools::{append, connect, events, eventually, exact, run, stream, whole_log};

/// An append that is alone says how far the log may be read, and nobody has to ask the server for it; beside another one it
/// does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_append_that_is_alone_settles_itself() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    let mut appended = store.appended();
    let next =
        async |version| append(&store, &stream(1), exact(version), events(1)).await.unwrap().positions[0];
    let first = next(0).await;
    appended.wait_for(|head| *head == first).await.unwrap();
    // The server is asked once behind the last connection that was made.
    store.frontier().await.unwrap();
    run(&url, "ALTER FUNCTION storied.frontier() RENAME TO nobody_asks").await;
    let second = next(1).await;
    assert_eq!(*appended.borrow_and_update(), second);
    let told = store.read_log(ReadLog::after(first).upto(second)).await.unwrap();

    let mut other = connect(&url).await;
    let mut begun = other.begin().await.unwrap();
    let event = events(1).remove(0);
    append_one(&mut begun, &stream(2), &event).await.unwrap();
    let fourth = next(2).await;
    assert_eq!(*appended.borrow_and_update(), second);
    begun.commit().await.unwrap();
    run(&url, "ALTER FUNCTION storied.nobody_asks() RENAME TO frontier").await;
    appended.wait_for(|head| *head == fourth).await.unwrap();

    // Kept here or read there: the same.
    let log = whole_log(&PostgresStore::connect(&url).await.unwrap()).await;
    assert_eq!(log.len(), 4);
    assert_eq!(format!("{:?}", told.events), format!("{:?}", &log[1..2]));
    assert_eq!(log[2].id, event.id);

    // A page ends at an event, also where the log has a hole.
    assert!(append(&store, &stream(1), exact(0), events(1)).await.is_err());
    let sixth = next(3).await;
    let hole = Position::new(sixth.get() - 1);
    let page = store.read_log(ReadLog::after(fourth).upto(hole)).await.unwrap();
    assert_eq!((page.events.len(), page.scanned_to), (0, fourth));
}

/// A server that takes over may not have what the one before it had acknowledged. What this process remembers of that is no
/// event of the log any more, and what it has read there is missing (F43): its sequence does not tell.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_server_does_not_have_is_not_remembered() {
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
    eventually("the loss is noticed", async || match store.frontier().await {
        Err(StoreError::Incompatible { expected, found, .. }) => {
            assert!(
                expected.contains(&format!("position {last}")) && found.contains("none"),
                "{expected}; {found}"
            );
            true
        }
        Err(error) if error.is_transient() => false,
        other => panic!("{other:?}"),
    })
    .await;
    // Also after an append that was alone: it does not settle what is missing.
    let next = append(&store, &stream(2), exact(0), events(1)).await.unwrap().positions[0];
    assert!(*appended.borrow_and_update() < next);
    assert!(matches!(store.read_log(newest.clone()).await, Err(StoreError::Incompatible { .. })));
    // Another process has not read it.
    let fresh = PostgresStore::connect(&url).await.unwrap();
    assert_eq!(fresh.read_log(newest).await.unwrap().events.len(), 0);
    assert_eq!(fresh.frontier().await.unwrap(), next);
}
