//! The look-up of a command's events takes constant time, however many events share its id or
//! follow.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sqlx::{Connection, Row};
use storied::aggregate::AggregateOptions;
use storied::{
    Aggregate, Context, Decided, Decision, Event, EventStore, ExpectedVersion, NeverRejects, Position,
    PostgresOptions, PostgresStore, Runtime, SnapshotRevision, StoreError,
};
use uuid::{NoContext, Timestamp, Uuid};

use crate::postgres::tools::{append, connect, events, run, stream};
use crate::support::PostgresServer;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_that_many_events_have_is_looked_up_as_quickly() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresOptions::new().url(&url).index_by_name(true).connect().await.unwrap();
    // One id on two streams: 3,000 events on one, two on the other.
    let id = Uuid::new_v4();
    for (stream, count) in [(stream("many"), 3_000), (stream("few"), 2)] {
        let mut commanded = events(count);
        commanded.iter_mut().for_each(|event| event.command_id = id);
        append(&store, &stream, ExpectedVersion::Any, commanded).await.unwrap();
        append(&store, &stream, ExpectedVersion::Any, events(count)).await.unwrap();
    }
    let mut connection = connect(&url).await;
    let mut transaction = connection.begin().await.unwrap();
    let found = sqlx::query(
        "SELECT first_version, last_version FROM storied.command_events(
             ARRAY['order', 'order', 'order'], ARRAY['many', 'few', 'few'], ARRAY[$1, $1, gen_random_uuid()]) ORDER BY n",
    )
    .bind(id)
    .fetch_all(&mut *transaction)
    .await
    .unwrap();
    let found: Vec<(i64, i64)> = found.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(found, [(1, 3_000), (1, 2)]);
    let read = "SELECT pg_stat_get_xact_tuples_returned('storied.events_by_command_id'::regclass)";
    let read: i64 = sqlx::query_scalar(read).fetch_one(&mut *transaction).await.unwrap();
    assert!(read <= 4, "{read} entries of the index were read");
}

/// Entries that a login writes by calling the functions by hand hide no event, and no event is found
/// twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forged_correlations_hide_no_event() {
    let url = PostgresServer::shared().await.create_database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    append(&store, &stream("a"), ExpectedVersion::NoStream, events(4)).await.unwrap();
    let mut connection = connect(&url).await;
    let cause = Uuid::now_v7();
    for _ in 0..3 {
        // A stream that does not exist.
        let forged = "SELECT storied.append_one(storied.server(), 4, 999, NULL, version, category, name, gen_random_uuid(),
                gen_random_uuid(), payload, metadata, true, $1) FROM storied.events
            WHERE stream <> 999 OR version = (SELECT max(version) FROM storied.events WHERE stream = 999) ORDER BY stream = 999 DESC LIMIT 1";
        sqlx::query(forged).bind(cause).execute(&mut connection).await.unwrap();
    }
    let mut nested = events(3);
    nested.iter_mut().for_each(|event| event.correlation_id = Some(cause));
    append(&store, &stream("b"), ExpectedVersion::NoStream, nested.clone()).await.unwrap();
    // The id of its own command as the correlation id.
    let twice = "SELECT storied.append_one(storied.server(), position, stream, NULL, version, category, name, gen_random_uuid(),
            $1, payload, metadata, true, $1) FROM storied.events ORDER BY position DESC LIMIT 1";
    sqlx::query(twice).bind(cause).execute(&mut connection).await.unwrap();
    for limit in [1, 2, 100] {
        let (mut found, mut after) = (Vec::new(), Position::START);
        loop {
            let page = store.correlated(cause, after, limit).await.unwrap();
            let Some(last) = page.last() else { break };
            after = last.position;
            found.extend(page.into_iter().map(|event| (event.stream, event.version.get())));
        }
        assert_eq!(found, [1, 2, 3, 4].map(|version| (stream("b"), version)), "{limit}");
    }
    // Other lengths, and nulls.
    for (correlations, error) in
        [("ARRAY[$1, NULL]::uuid[]", false), ("ARRAY[NULL, $1]::uuid[]", true), ("'{}'::uuid[]", false)]
    {
        let call = format!(
            "SELECT storied.append_known(storied.server(), position, ARRAY[name, category], ARRAY[stream], ARRAY[version],
                 ARRAY[category], ARRAY[name], ARRAY[gen_random_uuid()], ARRAY[gen_random_uuid()], ARRAY[payload],
                 ARRAY[metadata], CASE WHEN $1::uuid IS NOT NULL THEN {correlations} END)
             FROM storied.events ORDER BY position DESC LIMIT 1"
        );
        let called =
            sqlx::query(sqlx::AssertSqlSafe(call)).bind(Uuid::now_v7()).execute(&mut connection).await;
        assert_eq!(called.is_err(), error, "{correlations}: {called:?}");
    }
}

#[derive(Default, Serialize, Deserialize)]
struct Account(u64);

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Deposited {
    Deposited { amount: u64 },
}

impl Event for Deposited {
    const CATEGORY: &'static str = "account";
}

impl Aggregate for Account {
    type Event = Deposited;
    type Command = u64;
    type Reply = u64;
    type Error = NeverRejects;

    fn handle(&self, amount: &u64, _: &Context<'_>) -> Decided<Self> {
        Ok(Decision::event(Deposited::Deposited { amount: *amount }).reply(self.0 + amount))
    }

    fn apply(&mut self, Deposited::Deposited { amount }: &Deposited) {
        self.0 += amount;
    }
}

/// Before the repetition, the server itself writes many commands to the aggregate. `STORIED_EVENTS`
/// is their number; default: 20,000.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_command_is_answered_at_once() {
    let others: u64 = std::env::var("STORIED_EVENTS").map_or(20_000, |events| events.parse().unwrap());
    let url = PostgresServer::shared().await.create_database().await;
    let start = async || -> Result<Runtime, StoreError> {
        let store = PostgresStore::connect(&url).await?;
        let options = AggregateOptions::<Account>::new().snapshot_every(1_000_000, SnapshotRevision(1));
        Ok(Runtime::builder().store(store).aggregate_with(options).start().await.unwrap())
    };
    let runtime = start().await.unwrap();
    let execute = async |runtime: &Runtime, id: Uuid, amount: u64| {
        runtime.execute::<Account>("a", amount).command_id(id).timeout(Duration::ZERO).await.unwrap()
    };
    let ids = [
        Uuid::now_v7(),
        Uuid::new_v4(),
        Uuid::new_v5(&Uuid::nil(), b"a request"),
        Uuid::new_v7(Timestamp::from_unix(NoContext, 0, 0)),
    ];
    let mut first = Vec::new();
    for id in ids {
        first.push(execute(&runtime, id, 100).await);
    }
    runtime.shutdown().await.unwrap();
    let began = Instant::now();
    run(
        &url,
        &format!(
            "BEGIN; SET LOCAL storied_log.appending = 'on'; SET LOCAL synchronous_commit = off;
             INSERT INTO storied.events
                 (position, version, stream, id, command_id, category, name, payload, metadata)
             SELECT nextval('storied.positions'), 4 + n, stream, gen_random_uuid(),
                 (lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000)::bigint), 12, '0') || '7'
                     || substr(md5(n::text), 1, 3) || '8' || substr(md5(n::text), 4, 15))::uuid,
                 category, name, payload, '\\xa0'
             FROM storied.events, generate_series(1, {others}) AS n
             WHERE version = 1 ORDER BY n; COMMIT"
        ),
    )
    .await;
    eprintln!("{others} commands of others written in {:?}", began.elapsed());
    let runtime = start().await.unwrap();
    let began = Instant::now();
    let next = execute(&runtime, Uuid::now_v7(), 1).await;
    assert_eq!((next.version.get(), next.reply), (others + 5, 100 * (others + 4) + 1));
    eprintln!("the aggregate was folded in {:?}", began.elapsed());
    let mut times = Vec::new();
    for (id, first) in ids.iter().zip(&first) {
        let began = Instant::now();
        let again = execute(&runtime, *id, 100).await;
        times.push(began.elapsed());
        assert!(again.duplicate, "{again:?}");
        assert_eq!(
            (again.version, again.position, again.events, again.reply),
            (first.version, first.position, 1, first.reply)
        );
    }
    eprintln!("repetitions were answered in {times:?}");
    // On a busy machine a single repetition may wait; not all of them do.
    assert!(times.iter().min().is_some_and(|time| *time < Duration::from_millis(50)), "{times:?}");
    runtime.shutdown().await.unwrap();
}
