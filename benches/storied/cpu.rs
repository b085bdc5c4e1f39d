//! CPU time of the server or of this process, from `/proc`: other load hardly changes it.

use std::path::Path;

use sqlx::{Executor, PgConnection, Row};
use storied::store::{Append, ExpectedVersion};
use storied::{Metadata, NewEvent, StreamId, Version};
use uuid::Uuid;

use crate::args::{Plan, StoreKind};
use crate::domain::{AccountEvent, text};
use crate::measure::{Comparison, Run};
use crate::stores::{POSTGRES_SCHEMA, Store, postgres};
use crate::workloads::{AGGREGATES, Execution, execute, inserts};

/// Number of events of a transaction, each of another stream.
const BATCH: usize = 30;
/// Number of streams that appends go to at a time.
const ACTIVE: usize = 2_000;
/// Number of transactions of one side before it is the other's turn.
const TURN: usize = 50;

/// Appends to the 2,000 newest of `streams` streams, 30 events of 30 streams a transaction.
///
/// The limit is an INSERT … unnest into a table with the same columns and indexes, with as many rows
/// for each stream. Both sides use one connection, in turns. The figure is the CPU time of the server
/// process for an event, in nanoseconds.
pub async fn server(plan: &Plan, streams: usize) -> Comparison {
    // A run that is too small to measure anything need not fill a large log.
    let streams = streams.min(plan.events * 100);
    let store = Store::fresh(StoreKind::Postgres).await;
    store.fill_in(&Plan { events: streams, ..plan.clone() }, streams, 500).await;
    let mut raw = postgres().await;
    let copy = format!(
        "DROP SCHEMA IF EXISTS raw_bench CASCADE; CREATE SCHEMA raw_bench;
         CREATE TABLE raw_bench.events (LIKE {POSTGRES_SCHEMA}.events INCLUDING DEFAULTS INCLUDING INDEXES);
         CREATE SEQUENCE raw_bench.positions;
         INSERT INTO raw_bench.events SELECT * FROM {POSTGRES_SCHEMA}.events ORDER BY position;
         SELECT setval('raw_bench.positions', {streams});"
    );
    raw.execute(sqlx::AssertSqlSafe(copy)).await.unwrap();
    for statement in
        [&format!("VACUUM ANALYZE {POSTGRES_SCHEMA}.events"), "VACUUM ANALYZE raw_bench.events", "CHECKPOINT"]
    {
        raw.execute(sqlx::AssertSqlSafe(statement.to_owned())).await.unwrap();
    }
    let numbers = format!("SELECT number, stream_id::bigint FROM {POSTGRES_SCHEMA}.streams ORDER BY 2");
    let numbers: Vec<i64> = raw
        .fetch_all(sqlx::AssertSqlSafe(numbers))
        .await
        .unwrap()
        .iter()
        .map(|row| row.get::<i64, _>(0))
        .collect();
    let event = AccountEvent::Entered { text: text(plan.payload) };
    let transactions = plan.events.div_ceil(BATCH);
    let mut costs = [0.0; 2];
    // The newest streams are the active ones; each side appends to them in turn.
    let active = ACTIVE.min(streams);
    let stream = |row: usize| streams - active + row % active;
    for turn in 0..transactions.div_ceil(TURN) {
        let rows = |transaction: usize| {
            let first = (turn * TURN + transaction) * BATCH;
            first..first + BATCH
        };
        let before = server_cpu(&mut raw).await;
        for transaction in 0..TURN {
            let append = |row: usize| {
                let new = NewEvent::encode(&event, store.port().info().codec, &Metadata::default()).unwrap();
                let expected = Version::NONE.plus(1 + (row / active) as u64);
                let stream = StreamId::new("account", stream(row)).unwrap();
                Append::one(stream, ExpectedVersion::Exact(expected), vec![new])
            };
            for answer in store.port().append(rows(transaction).map(append).collect()).await {
                answer.unwrap();
            }
        }
        costs[0] += server_cpu(&mut raw).await - before;
        let before = server_cpu(&mut raw).await;
        for transaction in 0..TURN {
            insert(
                &mut raw,
                &event,
                rows(transaction).map(|row| (numbers[stream(row)], 2 + (row / active) as i64)),
            )
            .await;
        }
        costs[1] += server_cpu(&mut raw).await - before;
    }
    let events = (transactions.div_ceil(TURN) * TURN * BATCH) as f64;
    let note = format!("{streams} streams, {active} of them active; less is better");
    let [ours, limit] = costs.map(|cost| Run::nanoseconds(cost / events));
    raw.execute("DROP SCHEMA raw_bench CASCADE").await.unwrap();
    Comparison { ours, limit, note }
}

/// Commands to 1,000 live aggregates, one event each, as in `commands`.
///
/// The figure is the CPU time of this process for a command, in nanoseconds. The limit writes the
/// rows.
pub async fn client(plan: &Plan) -> Comparison {
    let Execution { cpu, per_transaction, .. } = execute(plan, AGGREGATES).await;
    let before = client_cpu();
    inserts(plan, per_transaction, 2, AGGREGATES).await;
    let limit = (client_cpu() - before) / plan.events as f64;
    let note = format!("{per_transaction} events a transaction, the limit's as well; less is better");
    Comparison { ours: Run::nanoseconds(cpu), limit: Run::nanoseconds(limit), note }
}

/// Returns the CPU time of this process, in nanoseconds; threads that have ended included.
pub fn client_cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name of the program, in parentheses, may contain spaces. utime and stime are fields 14 and 15.
    let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ').skip(11).take(2);
    // Linux counts them in hundredths of a second.
    fields.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() * 1e7
}

fn spent(schedstat: &Path) -> f64 {
    let text = std::fs::read_to_string(schedstat).unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or_default()
}

/// Inserts a row of an event for each stream and version, in one statement.
pub async fn insert(
    connection: &mut PgConnection,
    event: &AccountEvent,
    rows: impl Iterator<Item = (i64, i64)>,
) {
    let new = NewEvent::encode(event, storied::Codec::Cbor, &Metadata::default()).unwrap();
    let (streams, versions): (Vec<i64>, Vec<i64>) = rows.unzip();
    let ids: Vec<Uuid> = streams.iter().map(|_| Uuid::now_v7()).collect();
    let inserted = sqlx::query(
        "INSERT INTO raw_bench.events (position, stream, version, name, category, id, command_id, payload, metadata)
         SELECT nextval('raw_bench.positions'), * FROM unnest($1::bigint[], $2::bigint[], $3::integer[], $4::integer[],
             $5::uuid[], $6::uuid[], $7::bytea[], $8::bytea[]) RETURNING position",
    )
    .bind(&streams)
    .bind(versions)
    .bind(vec![1; streams.len()])
    .bind(vec![2; streams.len()])
    .bind(&ids)
    .bind(&ids)
    .bind(vec![&*new.payload; streams.len()])
    .bind(vec![&*new.metadata; streams.len()])
    .fetch_all(connection)
    .await
    .unwrap();
    assert_eq!(inserted.len(), streams.len());
}

/// Returns the CPU time of all server processes of the database, in nanoseconds.
pub async fn server_cpu(connection: &mut PgConnection) -> f64 {
    let pids = "SELECT pid FROM pg_stat_activity WHERE datname = current_database()";
    let pids = connection.fetch_all(pids).await.unwrap();
    pids.iter().map(|row| spent(Path::new(&format!("/proc/{}/schedstat", row.get::<i32, _>(0))))).sum()
}
