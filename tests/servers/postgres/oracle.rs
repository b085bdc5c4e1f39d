//! The order of the log under faults of writers and readers: no reader misses an event, receives
//! one twice or out of its stream's order. Mutations of the SQL must be detected by the oracle.
//!
//! `STORIED_STRESS=10` multiplies the duration by ten.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, Row};
use storied::store::{Append, AppendError, StoreError};
use storied::{
    EventStore, ExpectedVersion, NewEvent, Position, PostgresOptions, PostgresStore, ReadLog, StreamId,
};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::postgres::tools::{
    Dice, append, assert_sound, connect, events, eventually, exact, run, stream, whole_log,
};
use crate::support::PostgresServer;

const MIGRATION: &str = include_str!("../../../migrations/postgres/0001_events.sql");

const STREAMS: u64 = 40;

pub fn stress() -> u32 {
    std::env::var("STORIED_STRESS").ok().and_then(|factor| factor.parse().ok()).unwrap_or(1)
}

/// The way in which followers read.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Reader {
    /// Through the store, like users.
    Store,
    /// Like the publisher: up to the announced position. Each follower appends to a stream of its
    /// own. If no other append is in flight, that append also returns how far the log is readable.
    Told,
    /// Like the store, statement by statement.
    ByHand,
    /// All visible events after those already read.
    Naive,
    /// The high-water mark and the events in one statement.
    OneStatement,
    /// The high-water mark and the events in one snapshot of a transaction.
    OneSnapshot,
}

/// The activity beside the followers.
#[derive(Debug, Clone)]
struct Scene {
    reader: Reader,
    writers: u64,
    /// Whether writers append single events.
    single: bool,
    time: Duration,
    kills: bool,
    /// Database in which a foreign transaction stays open.
    foreign: Option<String>,
}

impl Scene {
    fn quiet(reader: Reader) -> Self {
        // Among eight writers, an append would never be alone.
        let writers = if reader == Reader::Told { 2 } else { 8 };
        Self {
            reader,
            writers,
            single: false,
            time: Duration::from_millis(1_200),
            kills: false,
            foreign: None,
        }
    }
}

impl From<Reader> for Scene {
    fn from(reader: Reader) -> Self {
        Self::quiet(reader)
    }
}

/// The faults, summed over the followers, and other counts.
#[derive(Debug, Default)]
struct Findings {
    events: usize,
    missed: usize,
    doubled: usize,
    disordered: usize,
    /// Acknowledged, but not in the log.
    lost: usize,
    conflicts: usize,
    rolled_back: usize,
    kills: usize,
    /// Time between acknowledgement and delivery, sorted.
    lags: Vec<Duration>,
}

impl Findings {
    fn faults(&self) -> usize {
        self.missed + self.doubled + self.disordered + self.lost
    }

    fn lag(&self, part: f64) -> Duration {
        let last = self.lags.len().saturating_sub(1);
        self.lags.get((last as f64 * part) as usize).copied().unwrap_or_default()
    }

    fn print(&self, what: &str) {
        println!(
            "{what}: {} events, {} conflicts, {} rolled back, {} back ends killed; {} missed, {} doubled, {} out of order, {} lost; lag p50 {:?} p99 {:?} max {:?}",
            self.events,
            self.conflicts,
            self.rolled_back,
            self.kills,
            self.missed,
            self.doubled,
            self.disordered,
            self.lost,
            self.lag(0.5),
            self.lag(0.99),
            self.lag(1.0),
        );
    }
}

/// State shared by the writers and followers of a run.
struct Shared {
    url: String,
    until: Instant,
    single: bool,
    written: AtomicBool,
    /// Number of followers that may be appending.
    appending: AtomicUsize,
    acknowledged: Mutex<HashMap<Uuid, Instant>>,
    conflicts: AtomicUsize,
    rolled_back: AtomicUsize,
    kills: AtomicUsize,
}

impl Shared {
    fn open(&self) -> bool {
        Instant::now() < self.until
    }

    fn acknowledge(&self, ids: &[Uuid]) {
        let now = Instant::now();
        self.acknowledged.lock().unwrap().extend(ids.iter().map(|id| (*id, now)));
    }

    async fn store(&self) -> PostgresStore {
        // Kills also hit a connection that checks the schema.
        loop {
            match PostgresOptions::new()
                .url(&*self.url)
                .migrate(false)
                .application_name("oracle")
                .connect()
                .await
            {
                Ok(store) => return store,
                Err(error) if error.is_transient() => continue,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

async fn oracle(url: &str, scene: Scene) -> Findings {
    run(url, "SELECT storied.number_names(ARRAY['order', 'order.placed'])").await;
    let shared = Arc::new(Shared {
        url: url.to_owned(),
        until: Instant::now() + scene.time,
        single: scene.single,
        written: AtomicBool::new(false),
        appending: AtomicUsize::new(0),
        acknowledged: Mutex::default(),
        conflicts: AtomicUsize::new(0),
        rolled_back: AtomicUsize::new(0),
        kills: AtomicUsize::new(0),
    });
    let mut followers = JoinSet::new();
    for chunk in [3, 7, 100] {
        followers.spawn(follow(shared.clone(), scene.reader, chunk));
    }
    let mut writers = JoinSet::new();
    for writer in 0..scene.writers {
        // The store would reject most mutations.
        if writer % 2 == 0 || !matches!(scene.reader, Reader::Store | Reader::Told) {
            writers.spawn(write_by_hand(shared.clone()));
        } else {
            writers.spawn(write(shared.clone()));
        }
    }
    if scene.kills {
        writers.spawn(kill(shared.clone()));
    }
    if let Some(database) = scene.foreign {
        writers.spawn(stand_open(shared.clone(), database));
    }
    while let Some(writer) = writers.join_next().await {
        writer.unwrap();
    }
    while shared.open() || shared.appending.load(Ordering::SeqCst) > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    shared.written.store(true, Ordering::SeqCst);

    let log: Vec<(i64, Uuid, String, i64)> =
        sqlx::query_as("SELECT position, id, stream_id, version FROM storied.log ORDER BY position")
            .fetch_all(&mut connect(url).await)
            .await
            .unwrap();
    let there: HashSet<Uuid> = log.iter().map(|(_, id, ..)| *id).collect();
    if scene.reader == Reader::Store {
        let log = whole_log(&shared.store().await).await;
        assert_eq!(log.len(), there.len());
        assert_sound(&log);
    }
    let acknowledged = shared.acknowledged.lock().unwrap().clone();
    let mut findings = Findings {
        events: log.len(),
        lost: acknowledged.keys().filter(|id| !there.contains(id)).count(),
        conflicts: shared.conflicts.load(Ordering::Relaxed),
        rolled_back: shared.rolled_back.load(Ordering::Relaxed),
        kills: shared.kills.load(Ordering::Relaxed),
        ..Findings::default()
    };
    let streams: HashMap<Uuid, (&String, i64)> =
        log.iter().map(|(_, id, stream, version)| (*id, (stream, *version))).collect();
    while let Some(follower) = followers.join_next().await {
        let seen: Vec<(Uuid, Instant)> = follower.unwrap();
        let distinct: HashSet<Uuid> = seen.iter().map(|(id, _)| *id).collect();
        findings.doubled += seen.len() - distinct.len();
        findings.missed += there.difference(&distinct).count();
        assert!(distinct.is_subset(&there), "a follower received an event that is not in the log");
        let mut versions: HashMap<&String, i64> = HashMap::new();
        for (id, at) in &seen {
            let (stream, version) = streams[id];
            let last = versions.entry(stream).or_default();
            findings.disordered += usize::from(version <= *last);
            *last = version;
            if let Some(acknowledged) = acknowledged.get(id) {
                findings.lags.push(at.saturating_duration_since(*acknowledged));
            }
        }
    }
    findings.lags.sort_unstable();
    findings
}

/// Appends through the store.
async fn write(shared: Arc<Shared>) {
    let dice = Dice::random();
    let store = shared.store().await;
    let mut own = HashMap::new();
    while shared.open() {
        let new = events(1 + dice.roll(3) as usize);
        let ids: Vec<_> = new.iter().map(|event| event.id).collect();
        let number = dice.roll(STREAMS);
        let expected = match own.get(&number) {
            Some(&version) if dice.roll(2) == 0 => ExpectedVersion::Exact(version),
            _ if dice.roll(8) == 0 => ExpectedVersion::NoStream,
            _ => ExpectedVersion::Any,
        };
        match append(&store, &stream(number), expected, new).await {
            Ok(appended) => {
                own.insert(number, appended.versions[0]);
                shared.acknowledge(&ids);
            }
            Err(storied::store::AppendError::Conflict(_)) => {
                _ = shared.conflicts.fetch_add(1, Ordering::Relaxed)
            }
            Err(error) => println!("a writer received: {error}"),
        }
        dice.pause(Duration::from_millis(4)).await;
    }
}

/// Appends like the store, but in its own transactions, which take a while and sometimes roll back.
async fn write_by_hand(shared: Arc<Shared>) {
    let dice = Dice::random();
    while shared.open() {
        let Ok(mut connection) =
            PgConnection::connect(&format!("{}?application_name=oracle", shared.url)).await
        else {
            continue;
        };
        while shared.open() {
            match transaction(&mut connection, &dice, shared.single).await {
                Ok(Some(ids)) => shared.acknowledge(&ids),
                Ok(None) => _ = shared.rolled_back.fetch_add(1, Ordering::Relaxed),
                // Killed, perhaps after the commit: this writer does not look it up.
                Err(_) => break,
            }
        }
    }
}

async fn transaction(
    connection: &mut PgConnection,
    dice: &Dice,
    single: bool,
) -> sqlx::Result<Option<Vec<Uuid>>> {
    let streams = if single { 0 } else { dice.roll(3) };
    let mut numbers: Vec<u64> = (0..=streams).map(|_| dice.roll(STREAMS)).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let streams: Vec<_> = numbers.into_iter().map(stream).collect();
    let mut transaction = connection.begin().await?;
    dice.pause(Duration::from_millis(2)).await;
    let mut new = Vec::new();
    for (index, stream) in streams.iter().enumerate() {
        let count = if single { 1 } else { 1 + dice.roll(3) as usize };
        new.extend(
            events(count)
                .into_iter()
                .enumerate()
                .map(|(n, event)| (index as i32 + 1, n as i32 + 1, stream, event)),
        );
    }
    let ids = match new.as_slice() {
        [(_, _, stream, event)] => append_one(&mut transaction, stream, event).await?,
        _ => append_many(&mut transaction, &streams, &new).await?,
    };
    dice.pause(Duration::from_millis(20)).await;
    if dice.roll(4) == 0 {
        transaction.rollback().await?;
        return Ok(None);
    }
    transaction.commit().await?;
    Ok(Some(ids))
}

/// Appends an event after the last one; returns its id, unless another transaction came first.
pub async fn append_one(
    connection: &mut PgConnection,
    stream: &StreamId,
    event: &NewEvent,
) -> sqlx::Result<Vec<Uuid>> {
    let (version, position, number): (i64, i64, Option<i64>) = sqlx::query_as(
        "SELECT coalesce(max(version), 0), coalesce(max(position), 0), storied.stream_number($1, $2)
         FROM storied.events WHERE stream = storied.stream_number($1, $2)",
    )
    .bind(stream.category())
    .bind(stream.id())
    .fetch_one(&mut *connection)
    .await?;
    if version == 0 && number.is_some() {
        let new = [(1, 1, stream, event.clone())];
        return append_many(connection, std::slice::from_ref(stream), &new).await;
    }
    if number.is_none() {
        sqlx::query("SELECT storied.number_names(ARRAY[$1, $2])")
            .bind(stream.category())
            .bind(event.name.as_str())
            .execute(&mut *connection)
            .await?;
    }
    let position: Option<Vec<i64>> = sqlx::query_scalar(
        "SELECT storied.append_one(storied.server(), nullif($1, 0), $2, CASE WHEN $2 IS NULL THEN $10 END, $3,
             (SELECT number FROM storied.names WHERE name = $4), (SELECT number FROM storied.names WHERE name = $5),
             $6, $7, $8, $9, true)",
    )
    .bind(position)
    .bind(number)
    .bind(version)
    .bind(stream.category())
    .bind(event.name.as_str())
    .bind(event.id)
    .bind(event.command_id)
    .bind(event.payload.to_vec())
    .bind(event.metadata.to_vec())
    .bind(stream.id())
    .fetch_one(connection)
    .await
    .or_else(|error| match error {
        // Another transaction came first.
        sqlx::Error::Database(error) if error.is_unique_violation() => Ok(None),
        error => Err(error),
    })?;
    Ok(position.map(|_| event.id).into_iter().collect())
}

/// Appends events, each with the index of its stream and its number in it, from 1; returns their
/// ids.
async fn append_many(
    connection: &mut PgConnection,
    streams: &[StreamId],
    new: &[(i32, i32, &StreamId, NewEvent)],
) -> sqlx::Result<Vec<Uuid>> {
    let events_of = |stream| new.iter().filter(|(_, _, of, _)| *of == stream).count() as i32;
    let row = sqlx::query(
        "SELECT lost FROM storied.append(storied.server(), NULL, array_fill(NULL::bigint, ARRAY[cardinality($1)]),
             ARRAY(SELECT n.number FROM unnest($1::text[]) WITH ORDINALITY AS p (name, i)
                 JOIN storied.names AS n ON n.name = p.name ORDER BY p.i),
             $2, $3, $4, $5, true,
             ARRAY(SELECT number FROM storied.names WHERE name = ANY ($1) OR name = ANY ($6)),
             ARRAY(SELECT n.number FROM unnest($6::text[]) WITH ORDINALITY AS e (name, i)
                 JOIN storied.names AS n ON n.name = e.name ORDER BY e.i),
             $7, $8, $9, $10)",
    )
    .bind(streams.iter().map(StreamId::category).collect::<Vec<_>>())
    .bind(streams.iter().map(StreamId::id).collect::<Vec<_>>())
    .bind((0..streams.len() as i32).collect::<Vec<_>>())
    .bind(vec![-1_i64; streams.len()])
    .bind(streams.iter().map(events_of).collect::<Vec<_>>())
    .bind(new.iter().map(|(.., event)| event.name.as_str()).collect::<Vec<_>>())
    .bind(new.iter().map(|(.., event)| event.id).collect::<Vec<_>>())
    .bind(new.iter().map(|(.., event)| event.command_id).collect::<Vec<_>>())
    .bind(new.iter().map(|(.., event)| event.payload.to_vec()).collect::<Vec<_>>())
    .bind(new.iter().map(|(.., event)| event.metadata.to_vec()).collect::<Vec<_>>())
    .fetch_one(connection)
    .await?;
    let lost: Option<Vec<bool>> = row.try_get(0)?;
    let won = |part: i32| lost.as_ref().is_none_or(|lost| !lost[part as usize - 1]);
    Ok(new.iter().filter(|(part, ..)| won(*part)).map(|(.., event)| event.id).collect())
}

/// Kills a connection every 60 ms.
async fn kill(shared: Arc<Shared>) {
    let mut connection = connect(&shared.url).await;
    while shared.open() {
        tokio::time::sleep(Duration::from_millis(60)).await;
        let killed = sqlx::query(
            "SELECT pg_terminate_backend(pid) FROM (
                 SELECT pid FROM pg_stat_activity WHERE application_name = 'oracle' AND datname = current_database()
                 ORDER BY random() LIMIT 1) AS victim",
        )
        .execute(&mut connection)
        .await
        .unwrap();
        shared.kills.fetch_add(killed.rows_affected() as usize, Ordering::Relaxed);
    }
}

/// Holds open a writing transaction without events: it blocks vacuum, and must not block readers.
async fn stand_open(shared: Arc<Shared>, database: String) {
    let mut connection = connect(&database).await;
    connection.execute("CREATE TABLE IF NOT EXISTS foreign_table (n int)").await.unwrap();
    let mut transaction = connection.begin().await.unwrap();
    transaction.execute("INSERT INTO foreign_table VALUES (1)").await.unwrap();
    tokio::time::sleep(shared.until.saturating_duration_since(Instant::now())).await;
    transaction.commit().await.unwrap();
}

/// Reads until all events are written and read; restarts now and then.
async fn follow(shared: Arc<Shared>, reader: Reader, chunk: usize) -> Vec<(Uuid, Instant)> {
    let dice = Dice::random();
    let mut seen = Vec::new();
    let mut checkpoint = Position::START;
    let mut store = None;
    let mut connection = connect(&shared.url).await;
    let (own, mut version) = (StreamId::new("told", Uuid::now_v7()).unwrap(), 0);
    let mut quiet = 0;
    loop {
        let finished = shared.written.load(Ordering::SeqCst);
        if dice.roll(200) == 0 {
            store = None;
        }
        let page = match reader {
            Reader::Store | Reader::Told => {
                let (store, appended) = match &mut store {
                    Some(store) => store,
                    none => {
                        let store = shared.store().await;
                        let appended = store.appended();
                        none.insert((store, appended))
                    }
                };
                let mut read = ReadLog::after(checkpoint).limit(chunk);
                if reader == Reader::Told && !finished {
                    shared.appending.fetch_add(1, Ordering::SeqCst);
                    if shared.open() {
                        let event = events(1);
                        let id = event[0].id;
                        if append(store, &own, exact(version), event).await.is_ok() {
                            version += 1;
                            shared.acknowledge(&[id]);
                        }
                    }
                    shared.appending.fetch_sub(1, Ordering::SeqCst);
                    read = read.upto(*appended.borrow_and_update());
                }
                match store.read_log(read).await {
                    Ok(page) => {
                        checkpoint = page.scanned_to;
                        page.events.iter().map(|event| (event.position, event.id)).collect()
                    }
                    Err(error) if error.is_transient() => continue,
                    Err(error) => panic!("{error}"),
                }
            }
            reader => read_by_hand(&mut connection, reader, checkpoint, chunk).await,
        };
        let now = Instant::now();
        seen.extend(page.iter().map(|(_, id)| (*id, now)));
        if let Some((position, _)) = page.last() {
            checkpoint = checkpoint.max(*position);
            quiet = 0;
            continue;
        }
        if finished {
            quiet += 1;
            if quiet > 2 {
                return seen;
            }
        }
        dice.pause(Duration::from_millis(3)).await;
    }
}

async fn read_by_hand(
    connection: &mut PgConnection,
    reader: Reader,
    after: Position,
    limit: usize,
) -> Vec<(Position, Uuid)> {
    let events = |upto: &str| {
        AssertSqlSafe(format!(
            "SELECT position, id FROM storied.events WHERE position > $1 AND position <= {upto} ORDER BY position LIMIT $2"
        ))
    };
    let (after, limit) = (after.get() as i64, limit as i64);
    let rows: Vec<(i64, Uuid)> = match reader {
        Reader::Store | Reader::Told | Reader::Naive => {
            sqlx::query_as(events("9223372036854775807")).bind(after).bind(limit).fetch_all(connection).await
        }
        Reader::ByHand => {
            let head: i64 = sqlx::query_scalar("SELECT head FROM storied.high_water_mark()")
                .fetch_one(&mut *connection)
                .await
                .unwrap();
            sqlx::query_as(events("$3")).bind(after).bind(limit).bind(head).fetch_all(connection).await
        }
        Reader::OneStatement => {
            sqlx::query_as(events("(SELECT low_water FROM storied.high_water_mark())"))
                .bind(after)
                .bind(limit)
                .fetch_all(connection)
                .await
        }
        Reader::OneSnapshot => {
            let mut transaction =
                connection.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ").await.unwrap();
            // A first query fixes the snapshot of the transaction.
            transaction.execute("SELECT count(*) FROM storied.meta").await.unwrap();
            let high_water_mark: i64 = sqlx::query_scalar("SELECT low_water FROM storied.high_water_mark()")
                .fetch_one(&mut *transaction)
                .await
                .unwrap();
            let rows = sqlx::query_as(events("$3"))
                .bind(after)
                .bind(limit)
                .bind(high_water_mark)
                .fetch_all(&mut *transaction)
                .await;
            transaction.commit().await.unwrap();
            rows
        }
    }
    .unwrap();
    rows.into_iter().map(|(position, id)| (Position::new(position as u64), id)).collect()
}

/// Creates an empty event store, with its functions changed by `mutate`.
async fn database(server: &PostgresServer, mutate: &[(&str, &str)]) -> String {
    let url = server.create_database().await;
    PostgresStore::connect(&url).await.unwrap();
    for name in ["settled", "append", "high_water_mark", "append_one"] {
        let start = MIGRATION.find(&format!("CREATE FUNCTION storied.{name}(")).unwrap();
        let end = start + MIGRATION[start..].find("END $$;").unwrap() + "END $$;".len();
        let mut function = MIGRATION[start..end].replacen("CREATE", "CREATE OR REPLACE", 1);
        for (from, to) in mutate {
            function = function.replace(from, to);
        }
        run(&url, &function).await;
    }
    url
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_miss_no_event() {
    let server = PostgresServer::shared().await;
    let url = server.create_database().await;
    PostgresStore::connect(&url).await.unwrap();
    let time = Duration::from_secs(5) * stress();
    let findings = oracle(&url, Scene { time, kills: true, ..Scene::quiet(Reader::Store) }).await;
    findings.print("with kills");
    assert_eq!(findings.faults(), 0);
    assert!(findings.events > 300 && findings.kills > 10 && findings.rolled_back > 20, "{findings:?}");
}

/// The same for readers that are notified of the mark by a lone append.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn notified_readers_miss_no_event() {
    let server = PostgresServer::shared().await;
    let time = Duration::from_secs(4) * stress();
    // A busy machine gets less done in the time: until it was enough to prove something.
    let (mut events, mut rolled_back) = (0, 0);
    while events <= 300 || rolled_back <= 5 {
        let url = server.create_database().await;
        PostgresStore::connect(&url).await.unwrap();
        let findings = oracle(&url, Scene { time, kills: true, ..Scene::quiet(Reader::Told) }).await;
        findings.print("notified, with kills");
        assert_eq!(findings.faults(), 0);
        (events, rolled_back) = (events + findings.events, rolled_back + findings.rolled_back);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_transactions_hold_back_no_reader() {
    let server = PostgresServer::shared().await;
    for other in [false, true] {
        let url = server.create_database().await;
        PostgresStore::connect(&url).await.unwrap();
        let (what, foreign) = if other {
            ("a transaction open in another database", server.create_database().await)
        } else {
            ("a transaction open in the same database", url.clone())
        };
        let time = Duration::from_secs(4) * stress();
        let scene = Scene { time, foreign: Some(foreign), ..Scene::quiet(Reader::Store) };
        let findings = oracle(&url, scene).await;
        findings.print(what);
        assert_eq!(findings.faults(), 0);
        // The foreign transaction stays open all the time. A reader that waited for it would delay
        // half of the events by half of that time. The longest lag is not tested: on a busy machine
        // it is that of the slowest follower.
        assert!(findings.lag(0.5) < time / 4, "{:?}", findings.lag(0.5));
    }
}

/// Runs until the oracle detects the mutation.
async fn must_fail(
    server: &PostgresServer,
    what: &str,
    scene: impl Into<Scene>,
    mutate: &[(&str, &str)],
    setup: &str,
) {
    let scene = scene.into();
    for round in 1..=40 {
        let url = database(server, mutate).await;
        run(&url, setup).await;
        let findings = oracle(&url, scene.clone()).await;
        if findings.faults() > 0 {
            findings.print(&format!("round {round}: {what}"));
            return;
        }
    }
    panic!("{what}: the oracle detected no fault");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_oracle_notices_mutations() {
    let server = PostgresServer::shared().await;
    let lock = {
        let start = MIGRATION.find("    PERFORM pg_advisory_xact_lock_shared(").unwrap();
        let end = start + MIGRATION[start..].find("0));").unwrap() + "0));".len();
        &MIGRATION[start..end]
    };
    let draw = "positions := ARRAY(SELECT nextval('storied.positions') FROM generate_series(1, events));";
    assert!(MIGRATION.contains(draw));
    const DRAW_ONE: &str = "drawn := nextval('storied.positions');";
    // The pause between the two is long enough to be detected on a busy machine.
    let moment = "PERFORM pg_sleep(0.005 * random());";
    let drawn_first = format!("{draw}\n{moment}\n{lock}");
    let locked_first = format!("{lock}\n{moment}");
    let refusal = "IF current_setting('transaction_isolation') <> 'read committed' THEN";
    assert!(MIGRATION.contains(refusal));

    must_fail(server, "the naive reader", Reader::Naive, &[], "").await;
    must_fail(server, "high-water mark and events in one statement", Reader::OneStatement, &[], "").await;
    must_fail(
        server,
        "high-water mark and events in one snapshot",
        Reader::OneSnapshot,
        &[(refusal, "IF false THEN")],
        "",
    )
    .await;
    must_fail(server, "lock after nextval", Reader::ByHand, &[(lock, ""), (draw, &drawn_first)], "").await;
    let one = format!("{lock}\n\n    {DRAW_ONE}");
    assert!(MIGRATION.contains(&one));
    let drawn_first = format!("{DRAW_ONE}\n{moment}\n{lock}");
    // Among many writers an older lock covers the pause.
    let few = Scene { writers: 3, ..Scene::quiet(Reader::ByHand) };
    let single = Scene { single: true, ..few.clone() };
    must_fail(server, "lock after the only nextval", single.clone(), &[(&one, &drawn_first)], "").await;
    let key = "coalesce(pg_sequence_last_value('storied.positions'), 0)";
    let own = lock.replace(key, "drawn");
    assert_ne!(own, lock);
    // Only appends that others commit between the draw and the lock go wrong here.
    let drawn_first = format!("{DRAW_ONE}\nPERFORM pg_sleep(0.06 * random());\n{own}");
    must_fail(server, "the key is the own position", single, &[(&one, &drawn_first)], "").await;
    // The key is the later value, read before the draw: another writer's position may come between.
    let last = lock.replace(key, &format!("{key} + events"));
    let slow_draws = draw.replace(
        "generate_series(1, events)",
        "generate_series(1, events) AS n, LATERAL (SELECT CASE WHEN n > 1 THEN pg_sleep(0.01) END) AS moment",
    );
    assert!(last != lock && slow_draws != draw);
    let own_last = [(lock, last.as_str()), (draw, slow_draws.as_str())];
    must_fail(server, "the key is the last own position", few, &own_last, "").await;
    // Followers are notified by appends that wrongly consider themselves alone.
    let part = |from: &str, to: &str| {
        let start = MIGRATION.find(from).unwrap();
        &MIGRATION[start..start + MIGRATION[start..].find(to).unwrap() + to.len()]
    };
    let check = part("    IF EXISTS (\n        SELECT FROM pg_locks", "    END IF;");
    let others = &check[check.find("EXISTS").unwrap()..check.find(" THEN").unwrap()];
    must_fail(server, "no check for other appends", Reader::Told, &[(check, "")], "").await;
    let one = format!("    {DRAW_ONE}");
    let looked_first = format!("PERFORM set_config('test.others', ({others})::text, true);\n{moment}\n{one}");
    let looked =
        "IF coalesce(current_setting('test.others', true), 'true')::boolean THEN RETURN NULL; END IF;";
    let too_early = [(check, looked), (one.as_str(), looked_first.as_str())];
    must_fail(server, "check before the draw", Reader::Told, &too_early, "").await;
    let previous = part("        coalesce((\n            SELECT e.position", "LIMIT 1), 0)");
    // The pause ends when an append commits that was in flight: that is the event to miss.
    let previous_first = format!(
        "early := {previous};
         IF {others} THEN
             FOR n IN 1..10 LOOP PERFORM pg_sleep(0.001); EXIT WHEN early <> {previous}; END LOOP;
         END IF;
         {check}"
    );
    let begin = part("BEGIN\n    -- After the draw, and before the query of the log", ".");
    let declared = format!("DECLARE early bigint;\n{begin}");
    // The replacement of the second contains the text of the first, so the first is replaced first.
    let too_old = [(previous, "early"), (check, previous_first.as_str()), (begin, declared.as_str())];
    must_fail(server, "the previous event before the check for other appends", Reader::Told, &too_old, "")
        .await;
    let (drawn, held) = {
        let find = |what: &str| MIGRATION.find(what).unwrap();
        let (drawn, held) = (find("    last_value := pg_sequence_last_value("), find("    low_water := (\n"));
        let lower = find("    low_water := least(");
        (&MIGRATION[drawn..held], &MIGRATION[held..lower])
    };
    let in_order = format!("{drawn}{held}");
    // Only a query that finds no lock at all goes wrong; among many writers that does not happen. The
    // pause then ends when the order matters: an append is in flight, and a later one is in the log.
    let lowest = &held[held.find("(\n").unwrap()..held.rfind(';').unwrap()];
    let pause = format!(
        "IF low_water IS NULL THEN
             FOR n IN 1..100 LOOP
                 PERFORM pg_sleep(0.002);
                 EXIT WHEN EXISTS (SELECT FROM storied.events AS e WHERE e.position > {lowest} + 1);
             END LOOP;
         END IF;"
    );
    let locks_first = format!("{held}{pause}\n{drawn}");
    let locks_first = [(in_order.as_str(), locks_first.as_str())];
    let few = Scene { writers: 2, ..Scene::quiet(Reader::ByHand) };
    must_fail(server, "the locks before the last position drawn", few, &locks_first, "").await;
    let database = [("d.datname = current_database()", "d.datname = 'template1'")];
    must_fail(server, "locks of another database", Reader::ByHand, &database, "").await;
    let cache = "ALTER SEQUENCE storied.positions CACHE 32";
    must_fail(server, "CACHE 32", Reader::ByHand, &[], cache).await;

    // Without a mutation there is no fault.
    for reader in [Reader::ByHand, Reader::Told] {
        let unchanged = self::database(server, &[(lock, &locked_first)]).await;
        let findings = oracle(&unchanged, Scene::quiet(reader)).await;
        findings.print("nothing changed");
        assert_eq!(findings.faults(), 0);
    }
}

/// Two concurrent appends to one stream must not reverse the order of positions. That could happen
/// if an append drew its position and then found the previous event at a higher one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn positions_grow_along_a_stream() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    append(&store, &stream(1), ExpectedVersion::NoStream, events(1)).await.unwrap();
    let mut faster = connect(&url).await;
    let numbers = "SELECT numbers FROM storied.number_names(ARRAY['order', 'order.placed'])";
    let numbers: Vec<i32> = sqlx::query_scalar(numbers).fetch_one(&mut faster).await.unwrap();
    let stream_number = "SELECT storied.stream_number('order', '1')";
    let stream_number: i64 = sqlx::query_scalar(stream_number).fetch_one(&mut faster).await.unwrap();
    // Whether or not the caller has seen the previous event.
    for (version, (position, number, id)) in
        [(Some(1_000_i64), Some(stream_number), None), (None, None, Some("1"))].into_iter().enumerate()
    {
        let version = version as i64 + 1;
        let mut transaction = faster.begin().await.unwrap();
        transaction.execute("LOCK TABLE storied.names").await.unwrap();
        let (url, names) = (url.clone(), numbers.clone());
        // Draws its position, then waits for the table of the names.
        let slower = tokio::spawn(async move {
            let sql = "SELECT a.versions, a.lost, a.positions FROM storied.append(storied.server(), $1, ARRAY[$2], $3, ARRAY[$4],
                 ARRAY[0], ARRAY[$5], ARRAY[1], false, $6, $7, ARRAY[$8], ARRAY[$8], ARRAY[''::bytea], ARRAY[''::bytea]) AS a";
            let row = sqlx::query(sql)
                .bind(position)
                .bind(number)
                .bind(&names[..1])
                .bind(id)
                .bind(version + 1)
                .bind(&names)
                .bind(&names[1..])
                .bind(Uuid::now_v7())
                .fetch_one(&mut connect(&url).await)
                .await
                .unwrap();
            (row.get::<Vec<i64>, _>(0), row.get::<Vec<bool>, _>(1), row.get::<Vec<i64>, _>(2)[0])
        });
        eventually("the position is drawn", async || {
            let waits =
                "SELECT count(*) FROM pg_locks WHERE relation = 'storied.names'::regclass AND NOT granted";
            sqlx::query_scalar::<_, i64>(waits).fetch_one(&mut *transaction).await.unwrap() == 1
        })
        .await;
        transaction.execute("SELECT set_config('storied_log.appending', 'on', true)").await.unwrap();
        let insert = "INSERT INTO storied.events (position, stream, version, name, category, id, command_id, payload, metadata)
            VALUES (nextval('storied.positions'), $1, $2, $3, $4, gen_random_uuid(), gen_random_uuid(), '', '') RETURNING position";
        let drawn_later: i64 = sqlx::query_scalar(insert)
            .bind(stream_number)
            .bind(version + 1)
            .bind(numbers[1])
            .bind(numbers[0])
            .fetch_one(&mut *transaction)
            .await
            .unwrap();
        transaction.commit().await.unwrap();
        let (versions, lost, drawn) = slower.await.unwrap();
        assert_eq!((versions, lost), (vec![version + 1], vec![true]));
        assert!(drawn < drawn_later);
    }
    // The faster functions refuse what they cannot check.
    for function in [
        "append_one(storied.server(), 1000, $1, NULL, 3, $2, $3, gen_random_uuid(), gen_random_uuid(), '', '', false)",
        "append_known(storied.server(), 1000, ARRAY[$2, $3], ARRAY[$1], ARRAY[3::bigint], ARRAY[$2], ARRAY[$3],
            ARRAY[gen_random_uuid()], ARRAY[gen_random_uuid()], ARRAY[''::bytea], ARRAY[''::bytea])",
    ] {
        let positions: Option<Vec<i64>> = sqlx::query_scalar(AssertSqlSafe(format!("SELECT storied.{function}")))
            .bind(stream_number)
            .bind(numbers[0])
            .bind(numbers[1])
            .fetch_one(&mut faster)
            .await
            .unwrap();
        assert_eq!(positions, None);
    }
    assert_sound(&whole_log(&store).await);
}

/// An event at the position that an append drew is not taken for its own, whatever its path.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sequence_that_was_set_back_is_an_error() {
    let url = PostgresServer::shared().await.create_database().await;
    let stores = [PostgresStore::connect(&url).await.unwrap(), PostgresStore::connect(&url).await.unwrap()];
    for id in ["a", "b"] {
        append(&stores[0], &stream(id), ExpectedVersion::NoStream, events(5)).await.unwrap();
    }
    // Position 2 is a hole: an append that tried again after position 1 would be missed by readers.
    run(
        &url,
        "ALTER TABLE storied.events DISABLE TRIGGER USER; DELETE FROM storied.events WHERE position = 2;
         UPDATE storied.events SET version = version - 1 WHERE position BETWEEN 3 AND 5;
         ALTER TABLE storied.events ENABLE TRIGGER USER",
    )
    .await;
    let one = |id: &str, expected, count| Append::one(stream(id), expected, events(count));
    for store in &stores {
        for batch in [
            vec![one("a", exact(4), 1)],
            vec![one("a", ExpectedVersion::Any, 1)],
            vec![one("a", exact(4), 2)],
            vec![one("a", ExpectedVersion::StreamExists, 2)],
            vec![one("a", exact(4), 1), one("b", exact(5), 1)],
            vec![one("new", ExpectedVersion::NoStream, 1), one("b", exact(5), 1)],
            vec![one("new", ExpectedVersion::NoStream, 1)],
        ] {
            run(&url, "SELECT setval('storied.positions', 1, false)").await;
            let text = format!("{batch:?}");
            for result in store.append(batch).await {
                match result.unwrap_err() {
                    AppendError::Store(error @ StoreError::Misconfigured { .. }) => {
                        assert!(error.to_string().contains("setval"), "{error}");
                    }
                    error => panic!("{error:?} after {text}"),
                }
            }
        }
    }
    // Set back to the last event, which only its id tells from the event to append.
    run(&url, "SELECT setval('storied.positions', (SELECT max(position) FROM storied.events), false)").await;
    append(&stores[1], &stream("b"), ExpectedVersion::Any, events(2)).await.unwrap();
    append(&stores[1], &stream("a"), exact(4), events(1)).await.unwrap();
    append(&stores[0], &stream("b"), exact(7), events(2)).await.unwrap();
    let log = whole_log(&stores[0]).await;
    assert_eq!(log.len(), 14);
    assert_sound(&log);
}

/// The key of the lock is not `SELECT last_value`. That value is read without the lock of the
/// sequence's page. For a moment it shows a value that is reserved in the write-ahead log but not
/// drawn, and the high-water mark would be too high.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn last_value_runs_ahead() {
    let server = PostgresServer::shared().await;
    let url = database(server, &[]).await;
    let mut tasks = JoinSet::new();
    let seen = Arc::new(AtomicBool::new(false));
    for _ in 0..3 {
        let (url, seen) = (url.clone(), seen.clone());
        tasks.spawn(async move {
            let mut connection = connect(&url).await;
            while !seen.load(Ordering::SeqCst) {
                let draw = "SELECT count(nextval('storied.positions')) FROM generate_series(1, 20000)";
                connection.execute(draw).await.unwrap();
            }
        });
    }
    let mut connection = connect(&url).await;
    connection
        .execute(
            "CREATE FUNCTION ahead(out unlocked bigint, out locked bigint) LANGUAGE plpgsql AS $$ BEGIN
                 unlocked := 0; locked := 0;
                 FOR i IN 1..20000 LOOP
                     SELECT last_value INTO unlocked FROM storied.positions;
                     locked := greatest(locked, pg_sequence_last_value('storied.positions'));
                     IF unlocked > locked THEN RETURN; END IF;
                 END LOOP;
             END $$",
        )
        .await
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(40);
    while !seen.load(Ordering::SeqCst) {
        assert!(Instant::now() < deadline, "last_value never ran ahead");
        let (unlocked, locked): (i64, i64) =
            sqlx::query_as("SELECT unlocked, locked FROM ahead()").fetch_one(&mut connection).await.unwrap();
        if unlocked > locked {
            println!("last_value {unlocked} while {locked} was the last drawn");
            seen.store(true, Ordering::SeqCst);
        }
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
}
