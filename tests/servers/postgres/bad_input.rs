//! Unsuitable databases and data that cannot be stored cause typed errors with advice, and no data
//! loss.

use std::fs;
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use chrono::DateTime;
use futures_util::future::join_all;
use sqlx::postgres::PgPoolOptions;
use sqlx::{AssertSqlSafe, Connection, Executor};
use storied::projection::{PostgresReadModel, ReadModel};
use storied::store::{
    Append, AppendError, CheckpointKey, CommandRecord, DueTime, NewScheduledCommand, ParkedEvent,
    ProgressWrite, ScheduleStore, ScheduledEnd, ScheduledOutcome, StoredSchedule,
};
use storied::{
    Codec, EventName, EventStore, ExpectedVersion, NewEvent, Position, PostgresOptions, PostgresStore,
    StoreError, StreamId, Version,
};
use uuid::Uuid;

use crate::postgres::tools::{
    append, as_user, assert_sound, connect, event, events, exact, run, stream, whole_log,
};
use crate::support::{PostgresServer, ThreadSubscriber};

const SECOND: Duration = Duration::from_secs(1);

async fn refused(options: PostgresOptions) -> StoreError {
    options.connect().await.map(drop).expect_err("this must be refused")
}

/// Returns the text of a refusal for good: `Incompatible` or `Misconfigured`.
fn incompatible(error: &StoreError) -> String {
    match error {
        StoreError::Incompatible { .. } | StoreError::Misconfigured { .. } => error.to_string(),
        error => panic!("{error:?}"),
    }
}

#[track_caller]
fn says(error: &StoreError, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

#[tokio::test]
async fn wrong_logins_and_databases() {
    let server = PostgresServer::start().await;
    let url = server.url();
    run(&url, "CREATE ROLE careful LOGIN PASSWORD 'right'").await;
    let hba = server.dir().join("data/pg_hba.conf");
    let rules = fs::read_to_string(&hba).unwrap();
    fs::write(&hba, format!("host all careful all scram-sha-256\n{rules}")).unwrap();
    run(&url, "SELECT pg_reload_conf()").await;
    tokio::time::sleep(Duration::from_millis(200)).await;

    let options = PostgresOptions::new().url(as_user(&url, "careful:s3cr3t"));
    assert!(!format!("{options:?}").contains("s3cr3t"));
    let error = refused(options).await;
    incompatible(&error);
    says(&error, &["careful", "password"]);
    assert!(!error.to_string().contains("s3cr3t") && !format!("{error:?}").contains("s3cr3t"));
    assert!(!error.is_transient());

    let error = refused(PostgresOptions::new().url(url.replace("/postgres", "/nowhere"))).await;
    incompatible(&error);
    says(&error, &["nowhere", "create it"]);

    // A correct password, but no right in the database.
    let error = refused(PostgresOptions::new().url(as_user(&url, "careful:right"))).await;
    assert!(matches!(error, StoreError::Storage { .. }), "{error:?}");
    says(&error, &["permission denied", "GRANT"]);

    let error = refused(PostgresOptions::new().url("postgres://u:s3cr3t@localhost:port/x")).await;
    assert!(matches!(error, StoreError::Invalid { .. }), "{error:?}");
    assert!(!format!("{error:?}").contains("s3cr3t"));

    let nobody = PostgresOptions::new().acquire_timeout(Duration::from_millis(300));
    let error = refused(nobody.url("postgres://storied@127.0.0.1:1/x")).await;
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error:?}");

    for schema in
        ["", "Upper", "a b", "x\"; DROP TABLE y; --", "pg_mine", "9lives", &"x".repeat(64), "ä", "a.b"]
    {
        let error = refused(PostgresOptions::new().url(&url).schema(schema)).await;
        assert!(matches!(error, StoreError::Invalid { .. }), "{schema}: {error:?}");
    }
}

#[tokio::test]
async fn other_schema_versions() {
    let server = PostgresServer::shared().await;
    let url = server.create_database().await;
    let verify = || PostgresOptions::new().url(&*url).migrate(false);
    says(&refused(verify()).await, &["no tables, or older ones", "may migrate"]);
    PostgresStore::connect(&url).await.unwrap();
    verify().connect().await.unwrap();

    // An older program has run fewer migrations, a newer one more.
    run(&url, "CREATE TABLE kept AS TABLE storied.migrations; DELETE FROM storied.migrations").await;
    incompatible(&refused(verify()).await);
    run(
        &url,
        "INSERT INTO storied.migrations TABLE kept;
         INSERT INTO storied.migrations SELECT 999, 'later', now(), true, checksum, 0 FROM kept WHERE version = 1",
    )
    .await;
    for error in [refused(verify()).await, refused(PostgresOptions::new().url(&url)).await] {
        incompatible(&error);
        says(&error, &["version 999", "newer program"]);
    }
    // A layout before the first release, which had more files.
    run(&url, "UPDATE storied.migrations SET checksum = 'x'").await;
    for more in ["SELECT 1", "DELETE FROM storied.migrations WHERE version = 999"] {
        run(&url, more).await;
        let error = refused(PostgresOptions::new().url(&url)).await;
        incompatible(&error);
        says(&error, &["not created by a released version", "use another schema or database"]);
    }
}

/// All settings that the order and durability of the log depend on.
#[tokio::test]
async fn unsafe_settings() {
    let mut server = PostgresServer::start().await;
    let url = server.create_database().await;
    let database = url.rsplit('/').next().unwrap().to_owned();
    let options = || PostgresOptions::new().url(&*url);
    let store = options().connect().await.unwrap();
    append(&store, &stream("a"), ExpectedVersion::NoStream, events(3)).await.unwrap();

    let error = refused(options().codec(Codec::Json)).await;
    says(&error, &["json", "cbor"]);
    incompatible(&error);

    for (setting, expected) in [
        ("synchronous_commit = off", "synchronous_commit on"),
        ("default_transaction_isolation = 'repeatable read'", "read committed"),
        ("default_transaction_read_only = on", "read_only"),
    ] {
        run(&server.url(), &format!("ALTER DATABASE {database} SET {setting}")).await;
        let error = refused(options()).await;
        incompatible(&error);
        says(&error, &[expected]);
        run(&server.url(), &format!("ALTER DATABASE {database} RESET ALL")).await;
    }

    for (broken, expected, repaired) in [
        ("CACHE 32", "CACHE 1", "CACHE 1"),
        ("INCREMENT 2", "INCREMENT 1", "INCREMENT 1"),
        ("CYCLE", "NO CYCLE", "NO CYCLE"),
        ("MAXVALUE 17592186044416", "MAXVALUE 17592186044415", "MAXVALUE 17592186044415"),
        ("NO MAXVALUE", "MAXVALUE 17592186044415", "MAXVALUE 17592186044415"),
        ("AS integer MAXVALUE 1000", "AS bigint", "AS bigint MAXVALUE 17592186044415"),
        ("MINVALUE -5", "MINVALUE 1", "MINVALUE 1"),
        ("START 2", "START 1", "START 1"),
        ("SET UNLOGGED", "logged tables and sequences", "SET LOGGED"),
        ("RESTART 3", "at 3 or higher", "RESTART 4"),
        ("RESTART 1; SELECT nextval('storied.positions')", "at 3 or higher", "RESTART 4"),
    ] {
        run(&url, &format!("ALTER SEQUENCE storied.positions {broken}")).await;
        let error = refused(options()).await;
        incompatible(&error);
        says(&error, &[expected]);
        run(&url, &format!("ALTER SEQUENCE storied.positions {repaired}")).await;
    }

    // Changed while a store is open.
    run(&server.url(), &format!("ALTER DATABASE {database} SET synchronous_commit = off")).await;
    let late = options();
    run(&url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'storied'")
        .await;
    let error = append(&store, &stream("a"), exact(3), events(1)).await.unwrap_err();
    assert!(matches!(error, AppendError::Store(StoreError::Misconfigured { .. })), "{error:?}");
    let id = Uuid::now_v7();
    let schedule = StoredSchedule { name: "s".into(), definition: Vec::new(), revision: 1, next_at: None };
    let command = NewScheduledCommand {
        id,
        target: "order/a".into(),
        body: Vec::new(),
        due: DueTime::After(Duration::ZERO),
        schedule: None,
    };
    for refused in [
        store.schedule_commands(vec![command]).await.map(drop),
        store.start_due_commands(1).await.map(drop),
        store.end_commands(vec![ScheduledEnd { id, outcome: ScheduledOutcome::Executed }], None).await,
        store.cancel_command(id).await.map(drop),
        store.retry_command(id).await.map(drop),
        store.write_schedule(schedule, Vec::new()).await.map(drop),
        store.remove_schedule("s", 1).await.map(drop),
    ] {
        assert!(matches!(refused, Err(StoreError::Misconfigured { .. })), "{refused:?}");
    }
    run(&server.url(), &format!("ALTER DATABASE {database} RESET ALL")).await;
    drop((store, late));

    // A standby.
    server.stop().await;
    fs::write(server.dir().join("data/standby.signal"), "").unwrap();
    server.restart().await;
    let error = refused(options()).await;
    incompatible(&error);
    says(&error, &["standby", "connect to the primary"]);
}

/// The last position is the highest that fits into the key of the low-water lock (F44).
#[tokio::test]
async fn positions_have_an_end() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    let last = (1_u64 << 44) - 1;
    run(&url, &format!("SELECT setval('storied.positions', {})", last - 3)).await;
    for version in [0, 1] {
        let position = append(&store, &stream("a"), exact(version), events(1)).await.unwrap().positions[0];
        assert_eq!(position.get(), last - 2 + version);
    }
    // A reader waits for an append below the end, as for any other append.
    let mut other = connect(&url).await;
    let mut open = other.begin().await.unwrap();
    crate::postgres::oracle::append_one(&mut open, &stream("b"), &event()).await.unwrap();
    assert_eq!(store.high_water_mark().await.unwrap().get(), last - 1);
    open.commit().await.unwrap();
    assert_eq!(whole_log(&store).await.iter().map(|event| event.position.get()).max(), Some(last));
    for count in [1, 2] {
        match append(&store, &stream("a"), exact(2), events(count)).await.unwrap_err() {
            AppendError::Store(error @ StoreError::Storage { .. }) => says(&error, &["all its positions"]),
            error => panic!("{error:?}"),
        }
    }
    assert_eq!(whole_log(&PostgresStore::connect(&url).await.unwrap()).await.len(), 3);
}

/// A sequence that was moved on and not drawn from since is not an empty log (F45).
#[tokio::test]
async fn a_moved_sequence_is_no_empty_log() {
    for moved in [
        "ALTER SEQUENCE storied.positions RESTART WITH 100",
        "SELECT setval('storied.positions', 100, false)",
    ] {
        let url = PostgresServer::shared().await.create_database().await;
        let store = PostgresStore::connect(&url).await.unwrap();
        let third =
            append(&store, &stream("a"), ExpectedVersion::NoStream, events(3)).await.unwrap().positions[2];
        run(&url, moved).await;
        let fresh = PostgresStore::connect(&url).await.unwrap();
        for store in [&store, &fresh] {
            assert_eq!(store.high_water_mark().await.unwrap(), third);
            assert_eq!(whole_log(store).await.len(), 3);
        }
        let next = append(&store, &stream("a"), exact(3), events(1)).await.unwrap().positions[0];
        assert_eq!(next.get(), 100);
        for store in [&store, &fresh] {
            assert_eq!(store.high_water_mark().await.unwrap(), next);
            assert_eq!(whole_log(store).await.len(), 4);
        }
    }
}

/// An append is answered, and settles the mark, after the end of its statement, where PostgreSQL
/// commits, and not with its row (F46). A constraint that is checked at the commit shows the
/// difference.
#[tokio::test]
async fn an_append_is_answered_after_the_commit() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    let appended = store.appended();
    let first = append(&store, &stream("a"), exact(0), events(1)).await.unwrap().positions[0];
    run(
        &url,
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not at the commit'; END $$;
         CREATE CONSTRAINT TRIGGER late AFTER INSERT ON storied.events DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    .await;
    for count in [1, 2] {
        let error = append(&store, &stream("a"), exact(1), events(count)).await.unwrap_err();
        assert!(error.to_string().contains("not at the commit"), "{error}");
    }
    assert!(*appended.borrow() <= first);
    assert_eq!(store.high_water_mark().await.unwrap(), first);
    assert_eq!(whole_log(&store).await.len(), 1);
}

/// Another encoding would reject single texts, much later.
#[tokio::test]
async fn databases_that_are_not_in_utf_8() {
    let server = PostgresServer::shared().await;
    let utf8 = PostgresStore::connect(server.create_database().await).await.unwrap();
    let store: std::sync::Arc<dyn EventStore> = std::sync::Arc::new(utf8);
    for encoding in ["LATIN1", "SQL_ASCII", "EUC_JP"] {
        let name = format!("in_{}", encoding.to_lowercase());
        run(&server.url(), &format!("CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0")).await;
        let url = server.url().replace("/postgres", &format!("/{name}"));
        let error = refused(PostgresOptions::new().url(&url)).await;
        incompatible(&error);
        says(&error, &["UTF8", encoding, &name]);
        let model = PostgresReadModel::new(PgPoolOptions::new().connect_lazy(&url).unwrap());
        let error = model.prepare(&store).await.unwrap_err();
        incompatible(&error);
        says(&error, &["UTF8", encoding]);
    }
}

/// Tables that the application creates without a schema would be created beside storied's.
#[tokio::test]
async fn a_login_that_is_called_like_the_schema() {
    let url = PostgresServer::shared().await.create_database().await;
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    let _subscriber = ThreadSubscriber::set(subscriber);
    let warned = || String::from_utf8_lossy(&log.0.lock().unwrap()).contains("search_path");
    // The login of these tests is storied. Before the first start there is no such schema.
    PostgresStore::connect(&url).await.unwrap();
    assert!(!warned());
    PostgresStore::connect(format!("{url}?options=-csearch_path%3Dpublic")).await.unwrap();
    assert!(!warned());
    PostgresStore::connect(&url).await.unwrap();
    assert!(warned());
}

/// Captured log lines.
#[derive(Clone, Default)]
struct Log(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The log accepts events only through its functions, and keeps them.
#[tokio::test]
async fn the_log_is_guarded() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    append(&store, &stream("a"), ExpectedVersion::NoStream, events(2)).await.unwrap();
    let mut connection = connect(&url).await;
    for (sql, expected) in [
        (
            "INSERT INTO storied.events SELECT 99, stream, 3, now(), name, category, id, id, payload, metadata FROM storied.events LIMIT 1",
            "would be missed",
        ),
        ("INSERT INTO storied.tags VALUES ('a:1', 1, 1)", "would be missed"),
        ("UPDATE storied.tags SET name = 1", "append-only"),
        ("DELETE FROM storied.tags", "append-only"),
        ("TRUNCATE storied.tags", "append-only"),
        ("UPDATE storied.events SET name = 1", "append-only"),
        ("UPDATE storied.streams SET stream_id = 'x'", "append-only"),
        ("DELETE FROM storied.names", "append-only"),
        ("DELETE FROM storied.events", "append-only"),
        ("TRUNCATE storied.events", "append-only"),
        ("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT storied.high_water_mark()", "read committed"),
    ] {
        let error = connection.execute(AssertSqlSafe(sql)).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{sql}: {error}");
        connection.execute("ROLLBACK").await.unwrap();
    }
    assert_eq!(whole_log(&store).await.len(), 2);
}

/// Two stores in one database, one in a schema that needs quotes, beside the application's
/// migrations.
#[tokio::test]
async fn stores_share_a_database() {
    let url = PostgresServer::shared().await.create_database().await;
    run(
        &url,
        "CREATE TABLE _sqlx_migrations (version bigint PRIMARY KEY); INSERT INTO _sqlx_migrations VALUES (1)",
    )
    .await;
    let pool = PgPoolOptions::new().max_connections(2).connect(&url).await.unwrap();
    // Many at once, half of them through the application's pool.
    let opening: Vec<_> = (0..6)
        .map(|number| {
            let options = PostgresOptions::new().url(&*url).schema(["user", "storied"][number % 2]);
            let options = if number < 3 { options } else { options.pool(pool.clone()) };
            tokio::spawn(options.connect())
        })
        .collect();
    let mut stores = Vec::new();
    for store in opening {
        stores.push(store.await.unwrap().unwrap());
    }
    assert_eq!(stores[0].info().id, stores[4].info().id);
    assert_ne!(stores[0].info().id, stores[1].info().id);
    for (round, store) in stores.iter().enumerate() {
        append(store, &stream(round / 2), ExpectedVersion::NoStream, events(3)).await.unwrap();
    }
    for store in &stores {
        let log = whole_log(store).await;
        assert_sound(&log);
        assert_eq!(log.len(), 9);
    }
    let mut transaction = pool.begin().await.unwrap();
    let kept: i64 = sqlx::query_scalar("SELECT count(*) FROM _sqlx_migrations")
        .fetch_one(&mut *transaction)
        .await
        .unwrap();
    assert_eq!(kept, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn huge_and_poisoned_events() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    let sized = |bytes: usize| NewEvent { payload: Bytes::from(vec![7; bytes]), ..event() };
    let one = |id: &str, event| Append::one(stream(id), ExpectedVersion::NoStream, vec![event]);
    let answers = store
        .append(vec![
            one("a", sized(10)),
            one("b", sized(100_000_000)),
            one("c", sized(60_000_000)),
            one("d", sized(1)),
        ])
        .await;
    assert!(matches!(answers[1], Err(AppendError::Store(StoreError::Invalid { .. }))), "{:?}", answers[1]);
    assert!(answers[1].as_ref().unwrap_err().to_string().contains("100000001 bytes"));
    for index in [0, 2, 3] {
        answers[index].as_ref().unwrap();
    }
    assert_eq!(store.read_stream(&stream("c"), Version::NONE, 1).await.unwrap()[0].payload.len(), 60_000_000);

    // An event that only the server can reject: nothing of its batch is written, and a command that
    // has it fails alone.
    run(
        &url,
        "CREATE FUNCTION public.name_of(number integer) RETURNS text LANGUAGE sql IMMUTABLE
             RETURN (SELECT n.name FROM storied.names AS n WHERE n.number = name_of.number);
         ALTER TABLE storied.events ADD CHECK (public.name_of(name) <> 'order.poison');
         CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN 
            IF public.name_of(new.name) = 'order.curse' THEN RAISE EXCEPTION 'no curse' USING ERRCODE = 'SHOP1'; END IF;
            RAISE EXCEPTION 'no bane'; END $$;
         CREATE TRIGGER bane BEFORE INSERT ON storied.events FOR EACH ROW WHEN (public.name_of(new.name) IN ('order.bane', 'order.curse'))
         EXECUTE FUNCTION refuse()",
    )
    .await;
    let before = whole_log(&store).await.len();
    for name in ["order.poison", "order.bane", "order.curse"] {
        let poison = NewEvent { name: EventName::new(name).unwrap(), ..event() };
        for answer in store.append(vec![one("p1", event()), one("p2", poison), one("p3", event())]).await {
            assert!(matches!(answer, Err(AppendError::Store(StoreError::Invalid { .. }))), "{answer:?}");
        }
    }
    assert_eq!(whole_log(&store).await.len(), before);
    crate::support::unstorable::fails_alone(store.clone()).await;
    assert_sound(&whole_log(&store).await);

    // NUL is the one character that PostgreSQL cannot store.
    let recorded = &store.read_stream(&stream("a"), Version::NONE, 1).await.unwrap()[0];
    let parked = ParkedEvent::new(recorded, "a\0b".into(), 3);
    let key = CheckpointKey::new("p");
    store.write_progress(vec![ProgressWrite::Park { key: key.clone(), event: parked }]).await.unwrap();
    assert_eq!(store.parked(&key, Position::START, 10).await.unwrap()[0].error, "a\u{fffd}b");
    for id in ["", "\0", "a\0", &"x".repeat(1 << 20)] {
        StreamId::new("order", id).unwrap_err();
    }
    for category in ["", "a\"b", "o'r", "ä", "a..b", &"x".repeat(1 << 20)] {
        StreamId::new(category, "1").unwrap_err();
    }
}

/// If the server has no free connection, a store continues with its open ones. A store without any
/// waits, and then reports the cause.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_a_free_connection() {
    let server = PostgresServer::start_with(&["max_connections=10"]).await;
    let options = PostgresOptions::new().url(server.create_database().await).acquire_timeout(SECOND);
    let store = options.clone().connect().await.unwrap();
    let mut others = Vec::new();
    // Recently closed connections may still count.
    let mut taken = 0;
    while taken < 10 {
        while let Ok(other) = sqlx::PgConnection::connect(&server.url()).await {
            others.push(other);
        }
        let ours = "SELECT count(*) FROM pg_stat_activity WHERE datname LIKE 'test%' AND backend_type = 'client backend'";
        let ours: i64 = sqlx::query_scalar(ours).fetch_one(&mut others[0]).await.unwrap();
        taken = others.len() + usize::try_from(ours).unwrap();
    }
    for asked in join_all((0..50).map(|_| store.leases())).await {
        asked.unwrap();
    }
    let error = refused(options).await;
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error:?}");
    for said in ["too many clients", "max_connections"] {
        assert!(error.to_string().contains(said), "{error}");
    }
}

/// Command records share a statement; one that PostgreSQL cannot store does not affect the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_cannot_be_kept_is_refused_alone() {
    let server = PostgresServer::start().await;
    let store = PostgresStore::connect(server.create_database().await).await.unwrap();
    let record = |n: u32| CommandRecord {
        id: Uuid::now_v7(),
        name: if n % 10 == 3 { "a\0b".into() } else { "bank.transfer".into() },
        fingerprint: Uuid::now_v7(),
        outcome: vec![0; 100].into(),
        recorded_at: DateTime::UNIX_EPOCH,
    };
    let answers = join_all((0..100).map(record).map(|record| store.record_command(record))).await;
    for (n, answer) in answers.into_iter().enumerate() {
        match answer {
            Ok(_) => assert_ne!(n % 10, 3),
            Err(StoreError::Invalid { .. }) => assert_eq!(n % 10, 3),
            Err(error) => panic!("{n}: {error:?}"),
        }
    }
}

/// The disk becomes full while writers write.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can mount a small disk");
        return;
    }
    let server = PostgresServer::start().await;
    let disk = SmallDisk::mount(&server.dir().join("disk"));
    let url = server.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    run(&url, &format!("CREATE TABLESPACE small LOCATION '{}'", disk.0.display())).await;
    run(&url, "ALTER TABLE storied.events SET TABLESPACE small").await;

    // Data that cannot be compressed.
    let noise: Vec<u8> = (0..12_500).flat_map(|_| uuid::Uuid::new_v4().into_bytes()).collect();
    let large = || NewEvent { payload: Bytes::from(noise.clone()), ..event() };
    let mut version = 0;
    let error = loop {
        match append(&store, &stream("a"), exact(version), vec![large()]).await {
            Ok(_) => version += 1,
            Err(error) => break error,
        }
        assert!(version < 200, "the disk never became full");
    };
    assert!(matches!(error, AppendError::Store(StoreError::Storage { .. })), "{error:?}");
    assert!(error.to_string().contains("disk is full"), "{error}");
    let log = whole_log(&store).await;
    assert_eq!(log.len() as u64, version, "the log differs from the acknowledged events");

    // With free space, appends continue.
    run(&url, "ALTER TABLE storied.events SET TABLESPACE pg_default").await;
    append(&store, &stream("a"), exact(version), vec![large()]).await.unwrap();
    assert_sound(&whole_log(&store).await);
    drop(server);
}

/// A disk of 8 MB.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(path: &Path) -> Self {
        fs::create_dir(path).unwrap();
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"]).arg(path).status().unwrap();
        assert!(mounted.success(), "mounting a small disk");
        let owner = fs::metadata(path.parent().unwrap().join("data")).unwrap();
        let owner = std::os::unix::fs::MetadataExt::uid(&owner);
        chown(path, Some(owner), None).unwrap();
        Self(path.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Also while a server still uses it.
        _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}
