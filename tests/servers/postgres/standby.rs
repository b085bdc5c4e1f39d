//! A primary with a streaming standby that is disconnected, queried by mistake, or promoted.
//!
//! With synchronous replication, every answer that confirms durability is on the standby (I3).

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use chrono::DateTime;
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgPoolOptions;
use sqlx::{AssertSqlSafe, Executor, PgConnection, PgPool};
use storied::projection::{ApplyError, Projection, ProjectionState};
use storied::store::{
    AppendError, Checkpoint, CheckpointKey, CommandRecord, DueTime, NewScheduledCommand, NewTimer,
    ProgressWrite, ScheduleStore, ScheduledQuery, StoredSchedule,
};
use storied::{
    Aggregate, AnyEvent, Context, Decided, Decision, Event, EventName, EventStore, ExecuteError, Filter,
    MemoryStore, NeverRejects, Position, PostgresOptions, PostgresReadModel, PostgresStore, ReadLog,
    RecordedEvent, Runtime, StoreError, Version,
};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::postgres::proxy::Proxy;
use crate::postgres::tools::{
    append, assert_sound, connect, event, events, eventually, exact, run, stream, whole_log,
};
use crate::support::{PgBouncer, PostgresServer};

/// A primary and its standby, which connects to it through a proxy.
struct Pair {
    primary: PostgresServer,
    standby: PostgresServer,
    link: Proxy,
    /// URL of a store's database on the primary.
    url: String,
}

impl Pair {
    async fn start(synchronous: bool) -> Self {
        let primary = PostgresServer::start().await;
        let url = primary.create_database().await;
        PostgresStore::connect(&url).await.unwrap();
        let link = Proxy::start(&primary.url()).await;
        let standby = primary.start_standby(link.port()).await;
        let pair = Self { primary, standby, link, url };
        if synchronous {
            run(&pair.url, "ALTER SYSTEM SET synchronous_standby_names = '*'").await;
            run(&pair.url, "SELECT pg_reload_conf()").await;
        }
        pair.is_replicating(if synchronous { "sync" } else { "async" }).await;
        pair
    }

    async fn is_replicating(&self, state: &str) {
        let mut connection = connect(&self.primary.url()).await;
        eventually("the standby follows", async || {
            sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_stat_replication WHERE sync_state = $1)")
                .bind(state)
                .fetch_one(&mut connection)
                .await
                .unwrap()
        })
        .await;
    }

    fn cut_off(&self) {
        self.link.connect_to(None);
    }

    async fn heal(&self) {
        self.link.connect_to(Some(self.primary.port()));
        self.is_replicating("sync").await;
    }

    fn options(&self) -> PostgresOptions {
        PostgresOptions::new().url(&self.url).migrate(false).acquire_timeout(Duration::from_secs(1))
    }

    /// Whether an event is visible on the primary.
    async fn shows(&self, id: Uuid) -> bool {
        sqlx::query_scalar("SELECT EXISTS (SELECT FROM storied.events WHERE id = $1)")
            .bind(id)
            .fetch_one(&mut connect(&self.url).await)
            .await
            .unwrap()
    }

    /// Waits until `commits` commits of the store's database wait for the standby.
    async fn waiting(&self, commits: i64) {
        let mut connection = connect(&self.url).await;
        eventually("a commit waits for the standby", async || {
            let waiting: i64 = sqlx::query_scalar(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'SyncRep'",
            )
            .fetch_one(&mut connection)
            .await
            .unwrap();
            waiting >= commits
        })
        .await;
    }

    /// Stops the primary and promotes the standby; returns the log there.
    async fn fail_over(&mut self) -> Vec<RecordedEvent> {
        self.primary.kill();
        self.standby.promote().await;
        let log = whole_log(&PostgresStore::connect(self.standby.url_like(&self.url)).await.unwrap()).await;
        assert_sound(&log);
        log
    }
}

/// An operator that repeatedly ends or cancels commits that wait for a standby.
struct Operator {
    stopping: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<()>,
}

impl Operator {
    fn start(pair: &Pair, action: &'static str) -> Self {
        let (url, stopping) = (pair.url.clone(), Arc::new(AtomicBool::new(false)));
        let stop = stopping.clone();
        let task = tokio::spawn(async move {
            let mut connection = connect(&url).await;
            while !stop.load(Ordering::Relaxed) {
                connection
                    .execute(AssertSqlSafe(format!(
                        "SELECT {action}(pid) FROM pg_stat_activity
                         WHERE datname = current_database() AND wait_event = 'SyncRep'"
                    )))
                    .await
                    .unwrap();
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        Self { stopping, task }
    }

    /// Waits for the last statement, which would end a later wait on a busy machine.
    async fn stop(mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        (&mut self.task).await.unwrap();
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.task.abort();
    }
}

const ACTIONS: [&str; 2] = ["pg_terminate_backend", "pg_cancel_backend"];

#[derive(Debug, Clone, Copy)]
enum Way {
    Direct,
    Pool,
    Pooler,
}

/// An operator ends or cancels commits while the standby is disconnected: no receipt is given for
/// events that the standby lacks (F2).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receipt_is_on_the_standby() {
    let mut pair = Pair::start(true).await;
    let bouncer = PgBouncer::start(&pair.primary, 4).await;
    let mut receipts = HashSet::new();
    for way in [Way::Direct, Way::Pool, Way::Pooler] {
        let store = match way {
            Way::Direct => pair.options().connect().await,
            Way::Pool => {
                let pool = PgPoolOptions::new().max_connections(4).connect(&pair.url).await.unwrap();
                PostgresOptions::new()
                    .pool(pool)
                    .migrate(false)
                    .acquire_timeout(Duration::from_secs(1))
                    .connect()
                    .await
            }
            Way::Pooler => {
                pair.options().url(bouncer.through(&pair.url)).transaction_pooler(true).connect().await
            }
        }
        .unwrap();
        for action in ACTIONS {
            let before = event();
            receipts.insert(before.id);
            append(&store, &stream(before.id), exact(0), vec![before]).await.unwrap();
            pair.cut_off();
            let mut appends = JoinSet::new();
            for _ in 0..2 {
                let (store, new) = (store.clone(), event());
                appends.spawn(async move {
                    let id = new.id;
                    (id, append(&store, &stream(id), exact(0), vec![new]).await)
                });
            }
            pair.waiting(1).await;
            let operator = Operator::start(&pair, action);
            while let Some(answer) = appends.join_next().await {
                match answer.unwrap() {
                    (_, Err(AppendError::Store(StoreError::OutcomeUnknown { .. }))) => {}
                    (id, Ok(_)) => {
                        panic!("{way:?}, {action}: a receipt for {id}, which the standby lacks")
                    }
                    (_, Err(error)) => panic!("{way:?}, {action}: {error}"),
                }
            }
            operator.stop().await;
            pair.heal().await;
        }
    }
    // Disconnected permanently, while appends wait.
    let store = pair.options().connect().await.unwrap();
    pair.cut_off();
    let lost = event();
    let waiting = tokio::spawn({
        let (store, lost) = (store.clone(), lost.clone());
        async move { append(&store, &stream(lost.id), exact(0), vec![lost]).await }
    });
    pair.waiting(1).await;
    let log: HashSet<Uuid> = pair.fail_over().await.iter().map(|event| event.id).collect();
    assert!(receipts.is_subset(&log), "{receipts:?} and {log:?}");
    assert!(!log.contains(&lost.id));
    waiting.await.unwrap().unwrap_err();
}

/// The store loses its connection while a commit waits for the standby. Looking up the outcome does
/// not make the commit visible: only the standby decides.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recovery_leaves_a_commit_to_the_standby() {
    let pair = Pair::start(true).await;
    let proxy = Proxy::start(&pair.url).await;
    let store = pair.options().url(proxy.url()).connect().await.unwrap();
    append(&store, &stream("first"), exact(0), vec![event()]).await.unwrap();
    pair.cut_off();
    let begin = |new: storied::NewEvent| {
        let store = store.clone();
        tokio::spawn(async move { append(&store, &stream(new.id), exact(0), vec![new]).await })
    };
    let new = event();
    let id = new.id;
    let appending = begin(new);
    pair.waiting(1).await;
    proxy.cut_all();
    let answer = appending.await.unwrap();
    assert!(matches!(answer, Err(AppendError::Store(StoreError::OutcomeUnknown { .. }))), "{answer:?}");
    assert!(!pair.shows(id).await, "the commit became visible, and a failover would lose it");
    pair.heal().await;
    eventually("the commit goes on with the standby", async || pair.shows(id).await).await;

    // If the standby returns in time, the answer is a receipt.
    pair.cut_off();
    let new = event();
    let id = new.id;
    let appending = begin(new);
    pair.waiting(1).await;
    proxy.cut_all();
    tokio::time::sleep(Duration::from_millis(100)).await;
    pair.heal().await;
    appending.await.unwrap().unwrap();
    assert!(pair.shows(id).await);
}

/// During an outage of the standby, abandoned appends do not take all connections of the server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_that_wait_do_not_add_up() {
    let pair = Pair::start(true).await;
    let proxy = Proxy::start(&pair.url).await;
    let store =
        pair.options().url(proxy.url()).acquire_timeout(Duration::from_secs(2)).connect().await.unwrap();
    append(&store, &stream("first"), exact(0), vec![event()]).await.unwrap();
    let begin = || {
        let (store, new) = (store.clone(), event());
        tokio::spawn(async move { append(&store, &stream(new.id), exact(0), vec![new]).await })
    };
    // Eight connections, opened while the standby is present.
    for append in (0..8).map(|_| begin()).collect::<Vec<_>>() {
        append.await.unwrap().unwrap();
    }
    pair.cut_off();
    let appends: Vec<_> = (0..8).map(|_| begin()).collect();
    pair.waiting(8).await;
    proxy.cut_all();
    for append in appends {
        let answer = append.await.unwrap();
        assert!(matches!(answer, Err(AppendError::Store(StoreError::OutcomeUnknown { .. }))), "{answer:?}");
    }
    match begin().await.unwrap() {
        Err(AppendError::Store(StoreError::Unavailable { reason, .. })) => {
            assert!(reason.contains("limit 8"), "{reason}")
        }
        other => panic!("{other:?}"),
    }
    // Readers are not blocked.
    store.high_water_mark().await.unwrap();
    pair.heal().await;
    eventually("appends are accepted again", async || begin().await.unwrap().is_ok()).await;
}

/// Answers that rest on a read are as durable as others: a repeated command, a handler's record, a
/// checkpoint, a lease and a repeated timer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_rests_on_a_read_is_on_the_standby() {
    let mut pair = Pair::start(true).await;
    let store = pair.options().connect().await.unwrap();
    let runtime = Runtime::builder().store(store.clone()).aggregate::<Account>().start().await.unwrap();
    let mut known = HashSet::new();
    for action in ACTIONS {
        let (id, account) = (Uuid::now_v7(), Uuid::now_v7());
        known.insert(account.to_string());
        let deposit = || runtime.execute::<Account>(account, Deposit(1)).command_id(id);
        let record = CommandRecord {
            id,
            name: "deposit".into(),
            fingerprint: id,
            outcome: Bytes::from_static(b"done"),
            recorded_at: DateTime::UNIX_EPOCH,
        };
        let (none, first) = (
            Checkpoint::default(),
            Checkpoint { position: Position::new(1), epoch: 1, ..Checkpoint::default() },
        );
        let name = id.to_string();
        let key = CheckpointKey::new(&name);
        let timer = NewTimer {
            instance: "i".into(),
            name: "reminder".into(),
            version: Version::new(1),
            due: DueTime::After(Duration::ZERO),
        };
        let put_timer = || store.write_timers(&name, vec![timer.clone()], Vec::new());
        let command = |id| NewScheduledCommand {
            id,
            target: "account/a".into(),
            body: Vec::new(),
            due: DueTime::After(Duration::from_secs(3_600)),
            schedule: None,
        };
        let schedule =
            StoredSchedule { name: name.clone(), definition: Vec::new(), revision: 1, next_at: None };
        let schedule_command = || store.schedule_commands(vec![command(id)]);
        let write_schedule = || store.write_schedule(schedule.clone(), Vec::new());
        let cancelled = Uuid::now_v7();
        store.schedule_commands(vec![command(cancelled)]).await.unwrap();
        pair.cut_off();
        let operator = Operator::start(&pair, action);
        let (executed, recorded, saved, leased, put) = tokio::join!(
            deposit(),
            store.record_command(record.clone()),
            store.write_progress(vec![ProgressWrite::Checkpoint { key: key.clone(), from: none, to: first }]),
            store.acquire_lease(&name, id, Duration::from_secs(60)),
            put_timer(),
        );
        assert!(matches!(executed, Err(ExecuteError::OutcomeUnknown { .. })), "{executed:?}");
        assert!(recorded.is_err() && saved.is_err() && leased.is_err(), "{recorded:?} {saved:?} {leased:?}");
        assert!(matches!(put, Err(StoreError::Unavailable { .. })), "{put:?}");
        let answers = tokio::join!(schedule_command(), write_schedule(), store.cancel_command(cancelled));
        assert!(answers.0.is_err() && answers.1.is_err() && answers.2.is_err(), "{answers:?}");
        // All commits are visible now …
        let account = storied::StreamId::new("account", account).unwrap();
        eventually("it became visible", async || {
            !store.read_stream(&account, Version::NONE, 1).await.unwrap().is_empty()
                && store.checkpoint(&key).await.unwrap() == first
                && store.leases().await.unwrap().iter().any(|info| info.lease.name == name)
                && !store.due_timers(&name, 1).await.unwrap().timers.is_empty()
                && store.scheduled_command(id).await.unwrap().is_some()
                && store.schedule(&name).await.unwrap().is_some()
                && store.scheduled_command(cancelled).await.unwrap().is_none()
        })
        .await;
        // … and none of them is an answer.
        let (executed, recorded, found, leased, put) = tokio::join!(
            deposit(),
            store.record_command(record.clone()),
            store.command(id),
            store.acquire_lease(&name, id, Duration::from_secs(60)),
            put_timer(),
        );
        assert!(matches!(put, Err(StoreError::Unavailable { .. })), "{put:?}");
        assert!(matches!(executed, Err(ExecuteError::OutcomeUnknown { .. })), "{executed:?}");
        assert!(recorded.is_err() && found.is_err() && leased.is_err(), "{recorded:?} {found:?} {leased:?}");
        let answers = tokio::join!(schedule_command(), write_schedule(), store.cancel_command(cancelled));
        assert!(answers.0.is_err() && answers.1.is_err() && answers.2.is_err(), "{answers:?}");
        operator.stop().await;
        pair.heal().await;
        assert!(deposit().await.unwrap().duplicate);
        assert_eq!(store.record_command(record.clone()).await.unwrap().outcome, record.outcome);
        assert_eq!(store.command(id).await.unwrap().unwrap().outcome, record.outcome);
        assert!(store.acquire_lease(&name, id, Duration::from_secs(60)).await.unwrap().is_some());
        put_timer().await.unwrap();
        assert_eq!(schedule_command().await.unwrap()[0].id, id);
        assert!(!write_schedule().await.unwrap());
        assert_eq!(store.cancel_command(cancelled).await.unwrap(), None);
    }
    let log = pair.fail_over().await;
    let there: HashSet<String> = log.iter().map(|event| event.stream.id().to_owned()).collect();
    assert_eq!(there, known);
}

/// The commit of a projection becomes visible because an operator ends its wait. The owner reads
/// its checkpoint again, and reports no progress before a commit of its own is on the standby (F2).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_that_is_claimed_is_on_the_standby() {
    let pair = Pair::start(true).await;
    run(&pair.url, "CREATE TABLE seen (position bigint)").await;
    let pool = PgPool::connect(&pair.url).await.unwrap();
    let store = MemoryStore::new();
    let seen = PostgresReadModel::new(pool);
    let builder = Runtime::builder().store(store.clone()).projection(Seen, seen);
    let runtime = builder.start().await.unwrap();
    let projection = runtime.projection("seen").unwrap();
    let patience = Duration::from_secs(20);
    let first = append(&store, &stream(1), exact(0), events(1)).await.unwrap().positions[0];
    projection.caught_up_to_within(first, patience).await.unwrap();
    pair.cut_off();
    let operator = Operator::start(&pair, "pg_terminate_backend");
    let second = append(&store, &stream(1), exact(1), events(1)).await.unwrap().positions[0];
    let mut other = connect(&pair.url).await;
    eventually("the commit is visible", async || {
        let seen: i64 = sqlx::query_scalar("SELECT count(*) FROM seen").fetch_one(&mut other).await.unwrap();
        seen == 2
    })
    .await;
    // Several claims.
    let reported = projection.caught_up_to_within(second, Duration::from_secs(2)).await;
    assert!(reported.is_err(), "{:?}", projection.status());
    operator.stop().await;
    pair.heal().await;
    projection.caught_up_to_within(second, patience).await.unwrap();
    let seen: i64 = sqlx::query_scalar("SELECT count(*) FROM seen").fetch_one(&mut other).await.unwrap();
    assert_eq!(seen, 2);
    runtime.shutdown().await.unwrap();
}

/// A standby that lacks events takes over under running nodes (F43): fewer events than the sequence
/// is logged ahead. A store that has read them reports the loss. So does a projection that claims a
/// read model elsewhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_that_loses_events_is_noticed() {
    let mut pair = Pair::start(false).await;
    let tables = PostgresServer::shared().await.create_database().await;
    run(&tables, "CREATE TABLE seen (position bigint)").await;
    let proxy = Proxy::start(&pair.url).await;
    let options = pair.options().url(proxy.url());
    let store = options.clone().connect().await.unwrap();
    let pool = PgPool::connect(&tables).await.unwrap();
    let node = async |store: PostgresStore| {
        let seen = PostgresReadModel::new(pool.clone());
        Runtime::builder().store(store).projection(Seen, seen).start().await.unwrap()
    };
    let runtime = node(store.clone()).await;
    append(&store, &stream(1), exact(0), events(3)).await.unwrap();
    let mut standby = connect(&pair.standby.url_like(&pair.url)).await;
    eventually("the standby has three", async || {
        let events: i64 =
            sqlx::query_scalar("SELECT count(*) FROM storied.events").fetch_one(&mut standby).await.unwrap();
        events == 3
    })
    .await;
    pair.cut_off();
    let lost = append(&store, &stream(1), exact(3), events(2)).await.unwrap().positions[1];
    runtime.projection("seen").unwrap().caught_up_to_within(lost, Duration::from_secs(20)).await.unwrap();
    pair.primary.kill();
    pair.standby.promote().await;
    proxy.connect_to(Some(pair.standby.port()));

    eventually("the store detects the loss", async || match store.high_water_mark().await {
        Err(StoreError::Incompatible { found, .. }) => found.contains("no event there"),
        Err(error) if error.is_transient() => false,
        other => panic!("{other:?}"),
    })
    .await;
    // The new primary continues, and its log soon exceeds the old one.
    let other = options.connect().await.unwrap();
    assert!(append(&other, &stream(1), exact(3), events(1)).await.unwrap().positions[0] > lost);
    let failed = async |runtime: &Runtime| {
        let projection = runtime.projection("seen").unwrap();
        let mut status = projection.watch();
        let failed = status.wait_for(|status| status.state == ProjectionState::Failed);
        tokio::time::timeout(Duration::from_secs(20), failed)
            .await
            .unwrap_or_else(|_| panic!("the projection never failed: {:?}", projection.status()))
            .unwrap()
            .last_error
            .clone()
            .unwrap()
    };
    // The running projection has applied events that are missing in the log.
    let error = failed(&runtime).await;
    assert!(error.contains("no event there"), "{error}");
    runtime.shutdown().await.unwrap();
    // A new node has read no event: the checkpoint of the read model shows the loss.
    let runtime = node(other).await;
    let error = failed(&runtime).await;
    assert!(error.contains(&format!("position {lost}")) && error.contains("reset"), "{error}");
    runtime.projection("seen").unwrap().reset().await.unwrap();
    runtime.projection("seen").unwrap().wait_until_caught_up(Duration::from_secs(20)).await.unwrap();
    let seen: i64 = sqlx::query_scalar("SELECT count(*) FROM seen").fetch_one(&pool).await.unwrap();
    assert_eq!(seen, 4);
    runtime.shutdown().await.unwrap();
}

/// The new primary lacks the last events of one stream, the row of another, and the row of a name.
/// The program has cached all of them, and leaves no hole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn numbers_that_a_failover_lost_are_not_used() {
    for single in [true, false] {
        let mut pair = Pair::start(false).await;
        let proxy = Proxy::start(&pair.url).await;
        let store = pair.options().url(proxy.url()).connect().await.unwrap();
        append(&store, &stream("old"), exact(0), events(3)).await.unwrap();
        let mut standby = connect(&pair.standby.url_like(&pair.url)).await;
        let count = "SELECT count(*) = 3 FROM storied.events";
        eventually("the standby has three", async || {
            sqlx::query_scalar(count).fetch_one(&mut standby).await.unwrap()
        })
        .await;
        pair.cut_off();
        let named = || storied::NewEvent { name: EventName::new("order.lost").unwrap(), ..event() };
        append(&store, &stream("old"), exact(3), vec![named()]).await.unwrap();
        append(&store, &stream("young"), exact(0), vec![named()]).await.unwrap();
        // The standby knows that the sequence may be 32 values ahead of its last one.
        for n in 0..40 {
            append(&store, &stream(n), exact(0), vec![named()]).await.unwrap();
        }
        let numbers = "SELECT number FROM storied.streams WHERE stream_id <> 'old'";
        let lost: Vec<i64> =
            sqlx::query_scalar(numbers).fetch_all(&mut connect(&pair.url).await).await.unwrap();
        assert_eq!(lost.len(), 41);
        pair.primary.kill();
        pair.standby.promote().await;
        proxy.connect_to(Some(pair.standby.port()));

        let count = if single { 1 } else { 2 };
        let settled = async |id: &str, version: u64| loop {
            let new = (0..count).map(|_| named()).collect();
            match append(&store, &stream(id), exact(version), new).await {
                Err(AppendError::Store(error)) if error.is_transient() => {}
                settled => break settled,
            }
        };
        for (id, version, actual) in [("old", 4, 3), ("young", 1, 0)] {
            let conflict = match settled(id, version).await {
                Err(AppendError::Conflict(conflict)) => conflict.actual,
                other => panic!("{other:?}"),
            };
            assert_eq!(conflict, Some(Version::new(actual)), "{id}");
            settled(id, actual).await.unwrap();
            settled(id, actual + count).await.unwrap();
        }
        let found: i64 = sqlx::query_scalar(numbers).fetch_one(&mut standby).await.unwrap();
        assert!(!lost.contains(&found), "a number is never given again");
        let log = whole_log(&pair.options().url(proxy.url()).connect().await.unwrap()).await;
        assert_sound(&log);
        assert_eq!(log.len() as u64, 3 + 4 * count);
        assert!(log[3..].iter().all(|event| event.name == *"order.lost"));
    }
}

/// An intermediary routes a running program to the standby, which lacks the newest events and sees
/// no locks (F46). No page is read there, whatever connections the store uses.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_read_on_a_standby() {
    let pair = Pair::start(false).await;
    let bouncers = [PgBouncer::start(&pair.primary, 2).await, PgBouncer::start(&pair.standby, 2).await];
    for way in [Way::Direct, Way::Pool, Way::Pooler] {
        let (proxy, to) = match way {
            Way::Pooler => (Proxy::start(&bouncers[0].through(&pair.url)).await, bouncers[1].port()),
            _ => (Proxy::start(&pair.url).await, pair.standby.port()),
        };
        let store = match way {
            Way::Direct => pair.options().url(proxy.url()).connect().await,
            Way::Pooler => pair.options().url(proxy.url()).transaction_pooler(true).connect().await,
            Way::Pool => {
                let pool = PgPool::connect(proxy.url()).await.unwrap();
                PostgresOptions::new().pool(pool).migrate(false).connect().await
            }
        }
        .unwrap();
        let id = Uuid::now_v7();
        let last = append(&store, &stream(id), exact(0), events(3)).await.unwrap().positions[2];
        let filtered = Filter::all().with_names([storied::EventName::new("order.placed").unwrap()]);
        assert_eq!(store.high_water_mark().await.unwrap(), last);
        proxy.connect_to(Some(to));
        let since = Instant::now();
        let mut refused = 0;
        let all = ScheduledQuery::default();
        let of_schedule = ScheduledQuery { state: None, schedule: Some("s".into()) };
        while refused < 8 {
            assert!(since.elapsed() < Duration::from_secs(30));
            let answers = [
                // The mark is cached, so the statement of the page has to refuse.
                store.read_log(ReadLog::after(Position::START).upto(last)).await.err(),
                store
                    .read_log(ReadLog::after(Position::START).upto(last).filter(filtered.clone()))
                    .await
                    .err(),
                store.read_stream(&stream(id), Version::NONE, 10).await.err(),
                store.command(id).await.err(),
                store.event_id_at(last).await.err(),
                store.high_water_mark().await.err(),
                store.due_timers("p", 10).await.err(),
                store.timers(None, None, 10).await.err(),
                store.scheduled_command(id).await.err(),
                store.scheduled_commands(&all, None, 10).await.err(),
                store.scheduled_commands(&of_schedule, None, 10).await.err(),
                store.schedule("s").await.err(),
                store.schedules(None, 10).await.err(),
                store.due_schedules(10).await.err(),
            ];
            let mut answers = Vec::from(answers);
            if !matches!(way, Way::Direct) {
                // Its statement depends on no server state, so the transaction has to refuse.
                answers.push(store.checkpoint(&CheckpointKey::new("seen")).await.err());
            }
            for answer in answers {
                let error = answer.unwrap_or_else(|| panic!("{way:?}: read on a standby"));
                assert!(matches!(error, StoreError::Unavailable { .. }), "{way:?}: {error:?}");
                refused += usize::from(error.to_string().contains("standby"));
            }
        }
        proxy.connect_to(Some(match way {
            Way::Pooler => bouncers[0].port(),
            _ => pair.primary.port(),
        }));
        eventually("back on the primary", async || store.high_water_mark().await.is_ok()).await;
        assert_eq!(store.read_stream(&stream(id), Version::NONE, 10).await.unwrap().len(), 3);
    }
}

#[derive(Default)]
struct Account(i64);

#[derive(Debug, Serialize, Deserialize)]
struct Deposit(i64);

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum AccountEvent {
    Deposited { amount: i64 },
}

impl Event for AccountEvent {
    const CATEGORY: &'static str = "account";
}

impl Aggregate for Account {
    type Event = AccountEvent;
    type Command = Deposit;
    type Reply = i64;
    type Error = NeverRejects;

    fn handle(&self, deposit: &Deposit, _: &Context<'_>) -> Decided<Self> {
        Ok(Decision::event(AccountEvent::Deposited { amount: deposit.0 }).reply(self.0 + deposit.0))
    }

    fn apply(&mut self, AccountEvent::Deposited { amount }: &AccountEvent) {
        self.0 += amount;
    }
}

struct Seen;

impl Projection for Seen {
    const NAME: &'static str = "seen";
    type Event = AnyEvent;
    type Transaction = PgConnection;

    async fn apply(
        &mut self,
        _: AnyEvent,
        event: &RecordedEvent,
        tx: &mut PgConnection,
    ) -> Result<(), ApplyError> {
        let position = event.position.get() as i64;
        sqlx::query("INSERT INTO seen VALUES ($1)").bind(position).execute(tx).await?;
        Ok(())
    }

    async fn reset(&mut self, tx: &mut PgConnection) -> Result<(), ApplyError> {
        sqlx::query("TRUNCATE seen").execute(tx).await?;
        Ok(())
    }
}
