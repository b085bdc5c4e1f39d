//! Files, locks, other processes, and databases of other programs.

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions, Connection, Executor};
use storied::event::Tags;
use storied::store::{
    Append, AppendError, Appended, Checkpoint, CheckpointError, CheckpointKey, ControlChange, DueTime,
    EventStore, ExpectedVersion, NewScheduledCommand, ProgressWrite, ReadLog, ScheduleStore, ScheduledQuery,
    StoredSchedule, StreamAppend,
};
use storied::testing::store::Database;
use storied::{
    Codec, EventName, Filter, NewEvent, Position, RecordedEvent, SqliteOptions, SqliteStore, StoreError,
    StreamId, Version,
};
use tempfile::TempDir;
use uuid::Uuid;

/// Opening the store again acts like a second process on the same file.
pub(crate) async fn database() -> Database {
    let (directory, path) = file();
    Database::new(move || {
        let path = path.clone();
        async move { SqliteStore::open(path).await.unwrap() }
    })
    .keeping(directory)
}

/// A path for a database; the file does not exist yet.
fn file() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("events.db");
    (directory, path)
}

/// A connection outside of storied.
async fn stranger(path: &Path) -> SqliteConnection {
    SqliteConnectOptions::new().filename(path).create_if_missing(true).connect().await.unwrap()
}

fn stream(id: impl std::fmt::Display) -> StreamId {
    StreamId::new("order", id).unwrap()
}

fn event(name: &str) -> NewEvent {
    NewEvent {
        id: Uuid::now_v7(),
        name: EventName::new(name).unwrap(),
        payload: Bytes::from_static(b"\xf6"),
        command_id: Uuid::now_v7(),
        correlation_id: None,
        metadata: Bytes::from_static(b"\xa0"),
        tags: Tags::new(),
    }
}

fn one(id: &str, name: &str) -> Append {
    Append::one(stream(id), ExpectedVersion::Any, vec![event(name)])
}

async fn append(store: &SqliteStore, append: Append) -> Result<Appended, AppendError> {
    store.append(vec![append]).await.remove(0)
}

async fn log(store: &SqliteStore) -> Vec<RecordedEvent> {
    let (mut log, mut read) = (Vec::new(), ReadLog::after(Position::START).limit(usize::MAX));
    loop {
        let page = store.read_log(read.clone()).await.unwrap();
        read.after = page.scanned_to;
        let more = page.has_more();
        log.extend(page.events);
        if !more {
            return log;
        }
    }
}

/// Positions 1, 2, 3 … (refused appends take none), versions without holes.
async fn assert_sound(store: &SqliteStore, events: usize) {
    let log = log(store).await;
    assert_eq!(log.len(), events);
    let mut versions = std::collections::HashMap::new();
    for (event, position) in log.iter().zip(1..) {
        assert_eq!(event.position, Position::new(position));
        let version = versions.entry(event.stream.clone()).or_insert(Version::NONE);
        *version = version.next();
        assert_eq!(event.version, *version);
    }
}

fn refused<T: std::fmt::Debug>(answer: Result<T, AppendError>) -> StoreError {
    match answer {
        Err(AppendError::Store(error)) => error,
        other => panic!("expected a failure of the store, got {other:?}"),
    }
}

async fn save(store: &SqliteStore, from: Checkpoint, to: Checkpoint) -> Result<(), CheckpointError> {
    store.write_progress(vec![ProgressWrite::Checkpoint { key: CheckpointKey::new("p"), from, to }]).await
}

#[tokio::test]
async fn everything_survives_reopening() {
    let (_directory, path) = file();
    let store = SqliteStore::open(&path).await.unwrap();
    append(&store, one("a", "order.placed")).await.unwrap();
    let at = Checkpoint { position: Position::new(1), epoch: 1, generation: 1, delivered: Position::new(7) };
    save(&store, Checkpoint::default(), at).await.unwrap();
    store.control("p", ControlChange::Pause).await.unwrap();
    let lease = store.acquire_lease("l", Uuid::new_v4(), Duration::from_secs(60)).await.unwrap().unwrap();
    drop(store);

    let store = SqliteStore::open(&path).await.unwrap();
    assert_eq!(*store.appended().borrow(), Position::new(1));
    assert_eq!(store.checkpoint(&CheckpointKey::new("p")).await.unwrap(), at);
    assert!(store.controls().await.unwrap()["p"].paused);
    assert_eq!(store.leases().await.unwrap()[0].lease, lease);
    append(&store, one("a", "order.placed")).await.unwrap();
    assert_sound(&store, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_new_file_may_be_opened_by_many_at_once() {
    for _ in 0..5 {
        let (_directory, path) = file();
        let openings: Vec<_> = (0..12)
            .map(|i| {
                let path = path.clone();
                tokio::spawn(async move {
                    let store = SqliteStore::open(path).await.unwrap();
                    append(&store, one(&i.to_string(), "order.placed")).await.unwrap();
                    store
                })
            })
            .collect();
        let mut stores = Vec::new();
        for opening in openings {
            stores.push(opening.await.unwrap());
        }
        let ids: HashSet<Uuid> = stores.iter().map(|store| store.info().id).collect();
        assert_eq!(ids.len(), 1, "one file is one store");
        assert_sound(&stores[0], 12).await;
    }
}

#[tokio::test]
async fn the_codec_is_remembered() {
    let (_directory, path) = file();
    let store = SqliteOptions::new(&path).codec(Codec::Json).open().await.unwrap();
    assert_eq!(store.info().codec, Codec::Json);
    drop(store);
    let error = SqliteStore::open(&path).await.unwrap_err();
    assert!(matches!(error, StoreError::Incompatible { .. }), "{error:?}");
    assert!(error.to_string().contains("json"), "{error}");
    SqliteOptions::new(&path).codec(Codec::Json).open().await.unwrap();
}

#[tokio::test]
async fn another_kind_of_file_is_left_alone() {
    let (_directory, path) = file();
    let content = "invoice,stock code,quantity\n".repeat(500);
    std::fs::write(&path, &content).unwrap();
    let error = SqliteStore::open(&path).await.unwrap_err();
    assert!(matches!(error, StoreError::Incompatible { .. }), "{error:?}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
}

#[tokio::test]
async fn a_database_of_a_newer_program_is_left_alone() {
    for table in ["storied_migrations", "storied_read_model_migrations"] {
        let (_directory, path) = file();
        drop(SqliteStore::open(&path).await.unwrap());
        let sql = format!(
            "INSERT INTO {table} (version, description, success, checksum, execution_time) VALUES (9999, 'later', TRUE, x'00', 0)"
        );
        stranger(&path).await.execute(sqlx::AssertSqlSafe(sql)).await.unwrap();
        let error = SqliteStore::open(&path).await.unwrap_err();
        assert!(matches!(error, StoreError::Incompatible { .. }), "{error:?}");
        assert!(error.to_string().contains("9999"), "{error}");
    }
}

#[tokio::test]
async fn changed_migrations_are_detected() {
    let (_directory, path) = file();
    drop(SqliteStore::open(&path).await.unwrap());
    stranger(&path).await.execute("UPDATE storied_migrations SET checksum = x'00'").await.unwrap();
    let error = SqliteStore::open(&path).await.unwrap_err();
    assert!(matches!(error, StoreError::Incompatible { .. }), "{error:?}");
}

#[tokio::test]
async fn a_read_model_may_live_in_the_same_file() {
    let (_directory, path) = file();
    stranger(&path).await.execute("CREATE TABLE revenue (country TEXT, pence INTEGER)").await.unwrap();
    let store = SqliteStore::open(&path).await.unwrap();
    append(&store, one("a", "order.placed")).await.unwrap();
    stranger(&path).await.execute("INSERT INTO revenue VALUES ('FR', 100)").await.unwrap();
}

#[tokio::test]
async fn impossible_paths_are_explained() {
    let (directory, path) = file();
    let missing = directory.path().join("no/such/directory/events.db");
    let error = SqliteStore::open(&missing).await.unwrap_err();
    assert!(matches!(error, StoreError::Storage { .. }), "{error:?}");
    assert!(
        error.to_string().contains("no/such/directory") && error.to_string().contains("directory exist"),
        "{error}"
    );

    let error = SqliteStore::open(directory.path()).await.unwrap_err();
    assert!(matches!(error, StoreError::Invalid { .. }), "{error:?}");
    assert!(error.to_string().contains("is a directory"), "{error}");

    let error = SqliteOptions::new(&path).create_if_missing(false).open().await.unwrap_err();
    assert!(matches!(error, StoreError::Incompatible { .. }), "{error:?}");
    assert!(error.to_string().contains("no such file"), "{error}");
    assert!(!path.exists());

    for memory in [":memory:", ""] {
        let error = SqliteStore::open(memory).await.unwrap_err();
        assert!(matches!(error, StoreError::Invalid { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn recorded_events_cannot_be_changed() {
    let (_directory, path) = file();
    let store = SqliteStore::open(&path).await.unwrap();
    let tagged = NewEvent { tags: Tags::new().tag("course", "c1"), ..event("order.placed") };
    append(&store, Append::one(stream("a"), ExpectedVersion::Any, vec![tagged])).await.unwrap();
    let mut stranger = stranger(&path).await;
    for sql in [
        "UPDATE storied_events SET name = 7",
        "DELETE FROM storied_events",
        "UPDATE storied_streams SET stream_id = 'b'",
        "DELETE FROM storied_streams",
        "UPDATE storied_names SET name = 'order.other'",
        "DELETE FROM storied_names",
        "UPDATE storied_tags SET position = 7",
        "DELETE FROM storied_tags",
    ] {
        let error = stranger.execute(sql).await.unwrap_err();
        assert!(error.to_string().contains("append-only"), "{error}");
    }
    assert_sound(&store, 1).await;
}

#[tokio::test]
async fn a_locked_database_is_unavailable_until_released() {
    let (_directory, path) = file();
    let store = SqliteOptions::new(&path).busy_timeout(Duration::from_millis(100)).open().await.unwrap();
    append(&store, one("a", "order.placed")).await.unwrap();
    let mut stranger = stranger(&path).await;
    let lock = stranger.begin_with("BEGIN IMMEDIATE").await.unwrap();
    let started = Instant::now();
    for _ in 0..3 {
        let error = refused(append(&store, one("a", "order.placed")).await);
        assert!(matches!(error, StoreError::Unavailable { .. }) && error.is_transient(), "{error:?}");
    }
    assert!(started.elapsed() < Duration::from_secs(5));
    let moved = save(&store, Checkpoint::default(), Checkpoint::default()).await;
    assert!(matches!(moved, Err(CheckpointError::Store(StoreError::Unavailable { .. }))), "{moved:?}");
    assert_eq!(log(&store).await.len(), 1, "reads go on");
    lock.rollback().await.unwrap();
    append(&store, one("a", "order.placed")).await.unwrap();
    assert_sound(&store, 2).await;
}

#[tokio::test]
async fn an_oversized_append_fails_alone() {
    let (_directory, path) = file();
    let store = SqliteStore::open(&path).await.unwrap();
    // Untouched zeroed memory is not allocated.
    let huge = NewEvent { payload: Bytes::from(vec![0; 1_000_000_001]), ..event("order.huge") };
    let huge = Append::one(stream("b"), ExpectedVersion::Any, vec![event("order.placed"), huge]);
    let answers = store.append(vec![one("a", "order.placed"), huge, one("c", "order.placed")]).await;
    let [first, second, third] = answers.try_into().unwrap();
    first.unwrap();
    let error = refused(second);
    assert!(matches!(error, StoreError::Invalid { .. }), "{error:?}");
    assert!(error.to_string().contains("order.huge"), "{error}");
    third.unwrap();
    assert_sound(&store, 2).await;
}

/// An event that SQLite refuses only at the insert: by a trigger, once in each of the ways of SQL.
#[tokio::test]
async fn a_poisoned_append_fails_alone() {
    let (_directory, path) = file();
    let store = SqliteStore::open(&path).await.unwrap();
    stranger(&path)
        .await
        .execute(
            "CREATE TRIGGER poison BEFORE INSERT ON storied_events WHEN new.name = (SELECT number FROM storied_names WHERE name = 'order.poison')
             BEGIN SELECT RAISE(ABORT, 'no poison here'); END;
             CREATE TRIGGER bane BEFORE INSERT ON storied_events WHEN new.name = (SELECT number FROM storied_names WHERE name = 'order.bane')
             BEGIN SELECT RAISE(ROLLBACK, 'no bane either'); END;",
        )
        .await
        .unwrap();
    let part = |id: &str, name: &str| StreamAppend {
        stream: stream(id),
        expected: ExpectedVersion::Any,
        events: vec![event("order.placed"), event(name)],
    };
    for name in ["order.poison", "order.bane"] {
        // Nothing of the batch is written, and the next one is.
        let batch =
            vec![one("1", "order.placed"), Append::all(vec![part("2", "order.placed"), part("new", name)])];
        for answer in store.append(batch).await {
            let error = refused(answer);
            assert!(matches!(error, StoreError::Invalid { .. }), "{error:?}");
            assert!(
                error
                    .to_string()
                    .contains(["no poison here", "no bane either"][usize::from(name == "order.bane")]),
                "{error}"
            );
        }
        append(&store, one("1", "order.placed")).await.unwrap();
    }
    crate::support::unstorable::fails_alone(store.clone()).await;
    assert!(store.read_stream(&stream("new"), Version::NONE, 9).await.unwrap().is_empty());
    assert_sound(&store, 2 + 51).await;
}

/// A constraint that SQLite checks at the commit: the failed commit is not taken for a success, and
/// does not affect the next one.
#[tokio::test]
async fn a_failed_commit_is_reported() {
    let (_directory, path) = file();
    let store = SqliteStore::open(&path).await.unwrap();
    stranger(&path)
        .await
        .execute(
            "CREATE TABLE parent (id INTEGER PRIMARY KEY);
             CREATE TABLE child (id INTEGER REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED);
             CREATE TRIGGER late AFTER INSERT ON storied_events WHEN new.name = (SELECT number FROM storied_names WHERE name = 'order.late')
             BEGIN INSERT INTO child VALUES (7); END;",
        )
        .await
        .unwrap();
    for _ in 0..3 {
        let error = refused(append(&store, one("a", "order.late")).await);
        assert!(matches!(error, StoreError::Invalid { .. }), "{error:?}");
        append(&store, one("a", "order.placed")).await.unwrap();
    }
    assert_sound(&store, 3).await;
}

#[tokio::test]
async fn the_checkpoint_of_another_store_is_refused() {
    let (_directory, path) = file();
    let store = SqliteStore::open(&path).await.unwrap();
    let at = Checkpoint { position: Position::new(5), epoch: 1, ..Checkpoint::default() };
    save(&store, Checkpoint::default(), at).await.unwrap();
    stranger(&path).await.execute("UPDATE storied_checkpoints SET store_id = randomblob(16)").await.unwrap();
    let error = store.checkpoint(&CheckpointKey::new("p")).await.unwrap_err();
    assert!(matches!(error, StoreError::Incompatible { .. }), "{error:?}");
    for from in [at, Checkpoint::default()] {
        let saved = save(&store, from, at).await;
        assert!(matches!(saved, Err(CheckpointError::Store(StoreError::Incompatible { .. }))), "{saved:?}");
    }
}

#[tokio::test]
async fn unreadable_rows_are_an_error() {
    let (_directory, path) = file();
    let store = SqliteStore::open(&path).await.unwrap();
    append(&store, one("a", "order.placed")).await.unwrap();
    stranger(&path)
        .await
        .execute(
            "INSERT INTO storied_names VALUES (99, 'no name!');
             INSERT INTO storied_events VALUES (2, 1, 2, 1, 99, 0, randomblob(16), randomblob(16), x'', x'', NULL);",
        )
        .await
        .unwrap();
    let error = store.read_log(ReadLog::after(Position::START)).await.unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error:?}");
    let error = store.read_stream(&stream("a"), Version::NONE, 9).await.unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error:?}");
    assert_eq!(store.read_log(ReadLog::after(Position::START).limit(1)).await.unwrap().events.len(), 1);
}

/// The columns of the view, in the order of the log.
async fn log_in_clear(path: &Path) -> Vec<(i64, String, String, i64, String, String, String, String)> {
    sqlx::query_as(
        "SELECT position, category, stream_id, version, name, id, command_id, recorded_at FROM storied_log
         ORDER BY position",
    )
    .fetch_all(&mut stranger(path).await)
    .await
    .unwrap()
}

#[tokio::test]
async fn a_view_shows_the_log_in_clear() {
    let (_directory, path) = file();
    let store = SqliteStore::open(&path).await.unwrap();
    let other = Append::one(
        StreamId::new("shop.order", "it's").unwrap(),
        ExpectedVersion::NoStream,
        vec![event("order.placed"), event("order.paid")],
    );
    for answer in store.append(vec![one("a", "order.placed"), other, one("b", "order")]).await {
        answer.unwrap();
    }
    let events = log(&store).await;
    let shown = log_in_clear(&path).await;
    assert_eq!(shown.len(), 4);
    for (event, row) in events.iter().zip(shown) {
        let (position, category, id, version, name, event_id, command_id, recorded_at) = row;
        assert_eq!(Position::new(position as u64), event.position);
        assert_eq!(StreamId::new(category, id).unwrap(), event.stream);
        assert_eq!(Version::new(version as u64), event.version);
        assert_eq!(name, event.name.as_str());
        assert_eq!(event_id.parse::<Uuid>().unwrap(), event.id);
        assert_eq!(command_id.parse::<Uuid>().unwrap(), event.command_id);
        let recorded_at: chrono::DateTime<chrono::Utc> = recorded_at.parse().unwrap();
        assert_eq!(recorded_at, event.recorded_at);
    }
    let content: Vec<(Vec<u8>, Vec<u8>)> = sqlx::query_as("SELECT payload, metadata FROM storied_log")
        .fetch_all(&mut stranger(&path).await)
        .await
        .unwrap();
    assert!(content.iter().all(|(payload, metadata)| payload == b"\xf6" && metadata == b"\xa0"));
    // Each text is stored once: 3 streams; 2 categories and 3 event names, one of which is a category.
    for (table, rows) in [("storied_streams", 3), ("storied_names", 4)] {
        let sql = sqlx::AssertSqlSafe(format!("SELECT count(*) FROM {table}"));
        let found: i64 = sqlx::query_scalar(sql).fetch_one(&mut stranger(&path).await).await.unwrap();
        assert_eq!(found, rows, "{table}");
    }
}

fn exact(id: &str, version: u64, names: &[&str]) -> Append {
    let events = names.iter().map(|name| event(name)).collect();
    Append::one(stream(id), ExpectedVersion::Exact(Version::new(version)), events)
}

/// Numbers that a rolled back transaction assigned are not remembered.
#[tokio::test]
async fn numbers_of_a_rolled_back_append_are_forgotten() {
    let (_directory, path) = file();
    let store = SqliteStore::open(&path).await.unwrap();
    append(&store, exact("a", 0, &["order.placed"])).await.unwrap();
    stranger(&path)
        .await
        .execute(
            "CREATE TRIGGER full BEFORE INSERT ON storied_events WHEN new.version = 7
             BEGIN SELECT RAISE(ABORT, 'no more room'); END;",
        )
        .await
        .unwrap();
    // The names, the stream `b` and its first events are written, then rolled back.
    let names =
        ["order.one", "order.two", "order.three", "order.four", "order.five", "order.six", "order.seven"];
    let error = refused(append(&store, exact("b", 0, &names)).await);
    assert!(error.to_string().contains("no more room"), "{error}");
    // The same numbers now mean something else.
    let second = SqliteStore::open(&path).await.unwrap();
    append(&second, exact("c", 0, &["order.eight"])).await.unwrap();
    append(&store, exact("b", 0, &["order.one"])).await.unwrap();
    append(&store, exact("c", 1, &["order.two"])).await.unwrap();
    append(&second, exact("b", 1, &["order.six"])).await.unwrap();
    append(&store, exact("a", 1, &["order.eight"])).await.unwrap();
    for store in [&store, &second, &SqliteStore::open(&path).await.unwrap()] {
        assert_sound(store, 6).await;
        let log = log(store).await;
        let log: Vec<_> = log.iter().map(|event| (event.stream.id(), event.name.as_str())).collect();
        assert_eq!(
            log,
            [
                ("a", "order.placed"),
                ("c", "order.eight"),
                ("b", "order.one"),
                ("c", "order.two"),
                ("b", "order.six"),
                ("a", "order.eight"),
            ]
        );
    }
}

/// A backup that SQLite restores into the open file has the same device and number, but another log.
#[tokio::test]
async fn numbers_of_a_replaced_log_are_forgotten() {
    let (directory, path) = file();
    let store = SqliteStore::open(&path).await.unwrap();
    append(&store, exact("a", 0, &["order.placed"])).await.unwrap();
    let backup = directory.path().join("backup.db");
    let vacuum = sqlx::AssertSqlSafe(format!("VACUUM INTO '{}'", backup.display()));
    stranger(&path).await.execute(vacuum).await.unwrap();
    append(&store, exact("b", 0, &["order.paid"])).await.unwrap();
    append(&store, exact("b", 1, &["order.sent"])).await.unwrap();
    assert_sound(&store, 3).await;
    // After a restore, the file has the content of the backup, and later other events.
    let mut restored = stranger(&path).await;
    let attach = sqlx::AssertSqlSafe(format!("ATTACH '{}' AS backup", backup.display()));
    restored.execute(attach).await.unwrap();
    for table in ["events", "streams", "names"] {
        let sql = format!(
            "DROP TRIGGER storied_{table}_no_delete; DELETE FROM main.storied_{table};
             INSERT INTO main.storied_{table} SELECT * FROM backup.storied_{table}"
        );
        restored.execute("PRAGMA foreign_keys = OFF").await.unwrap();
        restored.execute(sqlx::AssertSqlSafe(sql)).await.unwrap();
    }
    let second = SqliteStore::open(&path).await.unwrap();
    append(&second, exact("c", 0, &["order.lost", "order.found"])).await.unwrap();

    // `b` had the number and the version of `c`, and `order.paid` the number of `order.found`.
    let conflict = append(&store, exact("b", 2, &["order.paid"])).await.unwrap_err();
    let AppendError::Conflict(conflict) = conflict else { panic!("{conflict:?}") };
    assert_eq!(conflict.actual, Some(Version::NONE));
    append(&store, exact("b", 0, &["order.paid"])).await.unwrap();
    for store in [&store, &second] {
        assert_sound(store, 4).await;
        let log = log(store).await;
        let log: Vec<_> = log.iter().map(|event| (event.stream.id(), event.name.as_str())).collect();
        let c = [("c", "order.lost"), ("c", "order.found")];
        assert_eq!(log, [&[("a", "order.placed")][..], &c[..], &[("b", "order.paid")][..]].concat());
    }
}

/// A reader, too, forgets the numbers of a replaced log.
#[tokio::test]
async fn a_page_of_a_replaced_log_has_the_names_of_that_log() {
    let (_directory, path) = file();
    let store = SqliteStore::open(&path).await.unwrap();
    append(&store, exact("a", 0, &["order.placed", "order.paid"])).await.unwrap();
    let second = SqliteStore::open(&path).await.unwrap();
    for store in [&store, &second] {
        assert_sound(store, 2).await;
    }
    let third = SqliteStore::open(&path).await.unwrap();
    for event in log(&store).await {
        assert_eq!(third.correlated(event.command_id, Position::START, 9).await.unwrap().len(), 1);
    }
    let mut restored = stranger(&path).await;
    restored
        .execute(
            "DROP TRIGGER storied_events_no_update; DROP TRIGGER storied_streams_no_update;
             DROP TRIGGER storied_names_no_update;
             UPDATE storied_events SET id = randomblob(16);
             UPDATE storied_streams SET stream_id = 'z';
             UPDATE storied_names SET name = 'order.returned' WHERE name = 'order.paid'",
        )
        .await
        .unwrap();
    let events = log(&store).await;
    assert_eq!((events[1].stream.id(), events[1].name.as_str()), ("z", "order.returned"));
    // Each store forgets by its own first read.
    let events = second.read_stream(&stream("z"), Version::NONE, 9).await.unwrap();
    assert_eq!(events[1].name.as_str(), "order.returned");
    assert_eq!(log(&third).await[1].name.as_str(), "order.returned");
}

/// Two stores on one file, like two processes, create the same stream and the same names at the same
/// time.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_processes_create_a_stream_once() {
    let (_directory, path) = file();
    let stores = [SqliteStore::open(&path).await.unwrap(), SqliteStore::open(&path).await.unwrap()];
    for round in 0..40 {
        let id = round.to_string();
        let name = format!("order.kind_{}", round / 4);
        let answers = stores.each_ref().map(|store| {
            let (store, new) = (store.clone(), exact(&id, 0, &[&name, "order.paid"]));
            tokio::spawn(async move { append(&store, new).await })
        });
        let mut written = 0;
        for answer in answers {
            match answer.await.unwrap() {
                Ok(_) => written += 1,
                Err(AppendError::Conflict(conflict)) => {
                    assert_eq!(conflict.actual, Some(Version::new(2)));
                }
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(written, 1);
        // Both go on with the stream, whichever created it.
        for (store, version) in stores.iter().zip(2..) {
            append(store, exact(&id, version, &[&name])).await.unwrap();
        }
    }
    for store in &stores {
        assert_sound(store, 160).await;
    }
    let numbers: (i64, i64) = sqlx::query_as("SELECT count(*), max(number) FROM storied_streams")
        .fetch_one(&mut stranger(&path).await)
        .await
        .unwrap();
    assert_eq!(numbers, (40, 40));
}

/// Another process has appended to one stream of a batch whose numbers and versions are known.
#[tokio::test]
async fn a_conflict_in_a_batch_of_thirty_refuses_one_append() {
    let (_directory, path) = file();
    let store = SqliteStore::open(&path).await.unwrap();
    let second = SqliteStore::open(&path).await.unwrap();
    let batch = |version: u64, names: &[&str]| -> Vec<Append> {
        (0..30).map(|n| exact(&n.to_string(), version, names)).collect()
    };
    for answer in store.append(batch(0, &["order.placed"])).await {
        answer.unwrap();
    }
    // One event meets the first of the two events that the batch would append.
    append(&second, exact("7", 1, &["order.stolen"])).await.unwrap();
    let answers = store.append(batch(1, &["order.paid", "order.sent"])).await;
    let mut positions = 32..;
    for (n, answer) in answers.into_iter().enumerate() {
        match answer {
            Ok(appended) => {
                assert_ne!(n, 7);
                assert_eq!(appended.versions, [Version::new(3)]);
                let expected: Vec<_> = positions.by_ref().take(2).map(Position::new).collect();
                assert_eq!(appended.positions, expected);
            }
            Err(AppendError::Conflict(conflict)) => {
                assert_eq!((conflict.stream, conflict.actual), (stream("7"), Some(Version::new(2))));
                assert_eq!(n, 7);
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert_sound(&store, 31 + 58).await;
    // An expected version after the end is refused as well, and leaves no hole.
    let ahead = append(&store, exact("3", 5, &["order.paid"])).await.unwrap_err();
    assert!(matches!(ahead, AppendError::Conflict(_)), "{ahead:?}");
    assert_sound(&second, 31 + 58).await;
}

/// Names that one process adds and another filters by: a name and its aliases are literal.
#[tokio::test]
async fn filters_find_names_that_another_process_added() {
    let (_directory, path) = file();
    let store = SqliteStore::open(&path).await.unwrap();
    let name = |name: &str| EventName::new(name).unwrap();
    let filter = Filter::all().with_names([name("order.placed"), name("order.created")]);
    let read = ReadLog::after(Position::START).filter(filter);
    assert!(store.read_log(read.clone()).await.unwrap().events.is_empty());
    let second = SqliteStore::open(&path).await.unwrap();
    // `order.created` is an alias of `order.placed`. A category may have the name of an event.
    append(&second, exact("a", 0, &["order.created", "order.paid", "order.placed"])).await.unwrap();
    let named = StreamId::new("order.placed", "a").unwrap();
    let named = Append::one(named, ExpectedVersion::NoStream, vec![event("order.paid")]);
    append(&second, named).await.unwrap();
    let page = store.read_log(read).await.unwrap();
    let found: Vec<_> = page.events.iter().map(|event| event.name.as_str()).collect();
    assert_eq!(found, ["order.created", "order.placed"]);
    assert_eq!(page.scanned_to, Position::new(4));
    let category = Filter::all().category("order.placed");
    let page = store.read_log(ReadLog::after(Position::START).filter(category)).await.unwrap();
    assert_eq!(page.events.len(), 1);
    assert_eq!(page.events[0].position, Position::new(4));
}

/// A database of the layout before streams had numbers.
#[tokio::test]
async fn a_database_of_an_older_layout_is_refused() {
    let (_directory, path) = file();
    let mut stranger = stranger(&path).await;
    stranger
        .execute(
            "PRAGMA journal_mode = WAL;
             CREATE TABLE storied_migrations (version INTEGER, description TEXT, installed_on TIMESTAMP, success BOOLEAN,
                 checksum BLOB, execution_time INTEGER);
             INSERT INTO storied_migrations VALUES (1, 'events', 0, TRUE, x'00', 0), (2, 'commands', 0, TRUE, x'00', 0);
             CREATE TABLE storied_events (position INTEGER PRIMARY KEY, category TEXT, stream_id TEXT, version INTEGER);
             INSERT INTO storied_events VALUES (1, 'order', 'a', 1)",
        )
        .await
        .unwrap();
    for migrate in [true, false] {
        let error = SqliteOptions::new(&path).migrate(migrate).open().await.unwrap_err();
        assert!(matches!(error, StoreError::Incompatible { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("unreleased") && text.contains("use a new file"), "{text}");
    }
    let tables = "SELECT count(*) FROM sqlite_master WHERE name LIKE 'storied\\_%' ESCAPE '\\'";
    let tables: i64 = sqlx::query_scalar(tables).fetch_one(&mut stranger).await.unwrap();
    assert_eq!(tables, 2, "the database is unchanged");
}

/// This test binary, running one of the ignored tests below on `path`.
fn child(test: &str, path: &Path) -> Command {
    let mut command = crate::support::test_process(module_path!(), test);
    command.env("STORIED_CHILD_DB", path);
    command
}

fn childs_path() -> PathBuf {
    std::env::var_os("STORIED_CHILD_DB").expect("run by another test").into()
}

/// Appends batches without end and prints the ids of acknowledged ones.
#[tokio::test]
#[ignore = "run by a_killed_process_loses_nothing_acknowledged"]
async fn child_appends() {
    let store = SqliteStore::open(childs_path()).await.unwrap();
    let mut last = HashMap::new();
    for round in 0_u64.. {
        // Every second batch expects the versions that this process knows, and needs no look-up.
        let expected = |stream: &StreamId| match last.get(stream) {
            Some(&version) if round % 2 == 0 => ExpectedVersion::Exact(version),
            _ => ExpectedVersion::Any,
        };
        let batch: Vec<_> = (0..8)
            .map(|i| {
                let (stream, events) =
                    (stream((round + i) % 20), vec![event("order.placed"), event("order.paid")]);
                Append::one(stream.clone(), expected(&stream), events)
            })
            .collect();
        let parts: Vec<_> = batch
            .iter()
            .map(|append| &append.streams[0])
            .map(|it| (it.stream.clone(), it.events[1].id))
            .collect();
        for (answer, (stream, id)) in store.append(batch).await.into_iter().zip(parts) {
            match answer {
                Ok(appended) => {
                    last.insert(stream, appended.versions[0]);
                    println!("acknowledged {id}");
                }
                Err(AppendError::Conflict(conflict)) => _ = last.insert(stream, conflict.actual.unwrap()),
                Err(error) => panic!("{error}"),
            }
        }
    }
}

#[tokio::test]
async fn a_killed_process_loses_nothing_acknowledged() {
    let (_directory, path) = file();
    let mut acknowledged = HashSet::new();
    for round in 0..8 {
        let mut children: Vec<_> =
            (0..2).map(|_| child("child_appends", &path).stdout(Stdio::piped()).spawn().unwrap()).collect();
        std::thread::sleep(Duration::from_millis(60 + 35 * round));
        for child in &mut children {
            child.kill().unwrap();
        }
        for mut child in children {
            let printed = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
            // The last line may be torn.
            acknowledged
                .extend(printed.filter_map(|line| line.strip_prefix("acknowledged ")?.parse::<Uuid>().ok()));
            child.wait().unwrap();
        }
    }
    let store = SqliteStore::open(&path).await.unwrap();
    let log = log(&store).await;
    assert_sound(&store, log.len()).await;
    assert!(!acknowledged.is_empty());
    let found: HashSet<Uuid> = log.iter().map(|event| event.id).collect();
    assert!(acknowledged.is_subset(&found));
    assert_eq!(log.len() % 2, 0, "an append is stored partially");
    append(&store, one("a", "order.placed")).await.unwrap();
}

/// Appends until the disk (a limit on the size of files) is full.
#[tokio::test]
#[ignore = "run by a_full_disk_is_an_error_and_no_damage"]
async fn child_fills_the_disk() {
    let store = SqliteStore::open(childs_path()).await.unwrap();
    let large = || NewEvent { payload: Bytes::from(vec![1; 100_000]), ..event("order.placed") };
    let mut events = 0;
    let error = loop {
        // A version that the process knows: the usual transaction of an aggregate.
        let expected = ExpectedVersion::Exact(Version::new(events as u64));
        match append(&store, Append::one(stream("a"), expected, vec![large()])).await {
            Ok(_) => events += 1,
            Err(error) => break error,
        }
    };
    assert!(events > 0);
    assert!(matches!(error, AppendError::Store(StoreError::Storage { .. })), "{error:?}");
    let again = append(&store, Append::one(stream("a"), ExpectedVersion::Any, vec![large()])).await;
    assert!(matches!(again, Err(AppendError::Store(StoreError::Storage { .. }))), "{again:?}");
    assert_sound(&store, events).await;
    println!("events {events}");
}

#[tokio::test]
async fn a_full_disk_is_an_error_and_no_damage() {
    let (_directory, path) = file();
    drop(SqliteStore::open(&path).await.unwrap());
    let fills = child("child_fills_the_disk", &path);
    // Files of at most 1 MB (the unit is 512 bytes, or 1 KB in some shells). A larger write is an
    // error, not a signal.
    let mut limited = Command::new("sh");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 1000; exec \"$0\" \"$@\""]);
    limited.arg(fills.get_program()).args(fills.get_args()).env("STORIED_CHILD_DB", &path);
    let output = limited.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let events = text.lines().find_map(|line| line.strip_prefix("events ")).unwrap().parse().unwrap();
    // With free space, the store works again.
    let store = SqliteStore::open(&path).await.unwrap();
    assert_sound(&store, events).await;
    append(&store, one("a", "order.placed")).await.unwrap();
}

#[tokio::test]
#[ignore = "run by a_read_only_file_is_explained"]
async fn child_opens_a_read_only_file() {
    let error = SqliteStore::open(childs_path()).await.unwrap_err();
    assert!(matches!(error, StoreError::Storage { .. }), "{error:?}");
    assert!(
        error.to_string().contains("right to write") || error.to_string().contains("this program may write"),
        "{error}"
    );
    println!("refused");
}

#[tokio::test]
async fn a_read_only_file_is_explained() {
    let (directory, path) = file();
    drop(SqliteStore::open(&path).await.unwrap());
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444)).unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o555)).unwrap();
    let mut opens = child("child_opens_a_read_only_file", &path);
    if std::fs::metadata(&path).unwrap().uid() == 0 {
        // Root can write to read-only files, so the child runs as the user nobody.
        opens.uid(65_534).gid(65_534);
    }
    let output = opens.output().unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("refused"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Numbers that storied never writes are errors, not panics.
#[tokio::test]
async fn numbers_that_storied_never_writes_are_errors() {
    let (_directory, path) = file();
    let store = SqliteStore::open(&path).await.unwrap();
    append(&store, one("a", "order.placed")).await.unwrap();
    store.acquire_lease("l", uuid::Uuid::now_v7(), std::time::Duration::MAX).await.unwrap().unwrap();
    store.leases().await.unwrap();
    let schedule = StoredSchedule {
        name: "s".into(),
        definition: Vec::new(),
        revision: 1,
        next_at: Some(chrono::DateTime::UNIX_EPOCH),
    };
    let command = NewScheduledCommand {
        id: Uuid::now_v7(),
        target: "order/a".into(),
        body: Vec::new(),
        due: DueTime::After(Duration::ZERO),
        schedule: None,
    };
    assert!(store.write_schedule(schedule, vec![command]).await.unwrap());
    let mut other = stranger(&path).await;
    other.execute("DROP TRIGGER storied_events_no_update").await.unwrap();
    let max = i64::MAX.to_string();
    for (table, column, value) in [
        ("storied_leases", "expires_at", &*max),
        ("storied_leases", "epoch", "-1"),
        ("storied_leases", "ttl", "-1"),
        ("storied_events", "recorded_at", &max),
        ("storied_events", "recorded_at", "-9223372036854775808"),
        ("storied_scheduled_commands", "due_at", &max),
        ("storied_schedules", "revision", "-1"),
        ("storied_schedules", "next_at", &max),
    ] {
        let set = |value: &str| sqlx::AssertSqlSafe(format!("UPDATE {table} SET {column} = {value}"));
        other.execute(set(value)).await.unwrap();
        let read = match table {
            "storied_leases" => store.leases().await.map(drop),
            "storied_scheduled_commands" => {
                store.scheduled_commands(&ScheduledQuery::default(), None, 9).await.map(drop)
            }
            "storied_schedules" => store.schedule("s").await.map(drop),
            _ => store.read_stream(&stream("a"), Version::NONE, 9).await.map(drop),
        };
        let StoreError::Corrupt { reason } = read.unwrap_err() else { panic!("{table}.{column}") };
        assert!(reason.contains(&format!("{table}.{column}")), "{reason}");
        other.execute(set("1")).await.unwrap();
    }
}

/// SQLite goes on writing to such a file, which is lost with its last close.
#[tokio::test]
async fn a_file_that_was_deleted_or_replaced_takes_no_more_events() {
    for replaced in [false, true] {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("events.db");
        let store = SqliteStore::open(&path).await.unwrap();
        append(&store, one("a", "made")).await.unwrap();
        let aside = dir.path().join("aside.db");
        std::fs::rename(&path, &aside).unwrap();
        if replaced {
            std::fs::write(&path, "").unwrap();
        }
        let error = append(&store, one("a", "made")).await.unwrap_err();
        let AppendError::Store(StoreError::Storage { reason, .. }) = &error else { panic!("{error:?}") };
        assert!(reason.contains("was deleted, moved or replaced"), "{reason}");
        std::fs::rename(&aside, &path).unwrap();
        append(&store, one("a", "made")).await.unwrap();
    }
}

/// The conflict is that of the first part that does not fit, also if the process has older knowledge
/// of that part.
#[tokio::test]
async fn the_first_part_that_does_not_fit_is_the_conflict() {
    let (_directory, path) = file();
    let (store, other) = (SqliteStore::open(&path).await.unwrap(), SqliteStore::open(&path).await.unwrap());
    let part = |id: &str, version| StreamAppend {
        stream: stream(id),
        expected: ExpectedVersion::Exact(Version::new(version)),
        events: vec![event("order.placed")],
    };
    for id in ["a", "b"] {
        append(&store, one(id, "order.placed")).await.unwrap();
    }
    append(&other, one("a", "order.placed")).await.unwrap();
    for (parts, conflict) in [
        ([part("a", 1), part("b", 9)], ("a", 2)),
        ([part("b", 9), part("a", 1)], ("b", 1)),
        ([part("b", 1), part("a", 1)], ("a", 2)),
    ] {
        match append(&store, Append::all(parts.into())).await {
            Err(AppendError::Conflict(found)) => {
                let actual = found.actual.map(Version::get);
                assert_eq!((found.stream, actual), (stream(conflict.0), Some(conflict.1)));
            }
            other => panic!("{other:?}"),
        }
    }
}
