//! Files, locks, other processes, and databases of other programs.

use std::collections::HashSet;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions, Connection, Executor};
use storied::store::{
    Append, AppendError, Appended, Checkpoint, CheckpointError, CheckpointKey, ControlChange, EventStore,
    ExpectedVersion, ProgressWrite, ReadLog, StreamAppend,
};
use storied::testing::store::Database;
use storied::{
    Codec, EventName, NewEvent, Position, RecordedEvent, SqliteOptions, SqliteStore, StoreError, StreamId,
    Version,
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
        metadata: Bytes::from_static(b"\xa0"),
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
    append(&store, one("a", "order.placed")).await.unwrap();
    let mut stranger = stranger(&path).await;
    for sql in ["UPDATE storied_events SET name = 'order.other'", "DELETE FROM storied_events"] {
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
            "CREATE TRIGGER poison BEFORE INSERT ON storied_events WHEN new.name = 'order.poison'
             BEGIN SELECT RAISE(ABORT, 'no poison here'); END;
             CREATE TRIGGER bane BEFORE INSERT ON storied_events WHEN new.name = 'order.bane'
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
             CREATE TRIGGER late AFTER INSERT ON storied_events WHEN new.name = 'order.late'
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
            "INSERT INTO storied_events VALUES (2, 'order', 'a', 2, 'no name!', x'00', x'00', x'', x'', 0);",
        )
        .await
        .unwrap();
    let error = store.read_log(ReadLog::after(Position::START)).await.unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error:?}");
    let error = store.read_stream(&stream("a"), Version::NONE, 9).await.unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error:?}");
    assert_eq!(store.read_log(ReadLog::after(Position::START).limit(1)).await.unwrap().events.len(), 1);
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
    for round in 0_u64.. {
        let batch: Vec<_> = (0..8)
            .map(|i| {
                let events = vec![event("order.placed"), event("order.paid")];
                Append::one(stream((round + i) % 20), ExpectedVersion::Any, events)
            })
            .collect();
        let ids: Vec<Uuid> = batch.iter().map(|append| append.streams[0].events[1].id).collect();
        for (answer, id) in store.append(batch).await.into_iter().zip(ids) {
            answer.unwrap();
            println!("acknowledged {id}");
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
        match append(&store, Append::one(stream("a"), ExpectedVersion::Any, vec![large()])).await {
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
    let mut other = stranger(&path).await;
    other.execute("DROP TRIGGER storied_events_no_update").await.unwrap();
    let max = i64::MAX.to_string();
    for (table, column, value) in [
        ("storied_leases", "expires_at", &*max),
        ("storied_leases", "epoch", "-1"),
        ("storied_leases", "ttl", "-1"),
        ("storied_events", "recorded_at", &max),
        ("storied_events", "recorded_at", "-9223372036854775808"),
    ] {
        let set = |value: &str| sqlx::AssertSqlSafe(format!("UPDATE {table} SET {column} = {value}"));
        other.execute(set(value)).await.unwrap();
        let read = match table {
            "storied_leases" => store.leases().await.map(drop),
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
