//! The limits without storied, on the same machine in the same minute.

use std::time::Instant;

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous};
use sqlx::{ConnectOptions, Executor, Row};
use uuid::Uuid;

use crate::args::Plan;
use crate::domain::text;
use crate::measure::Run;
use crate::nats::STREAM;
use crate::stores::{POSTGRES_SCHEMA, directory, postgres};

const ROW: &str = "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";

/// Inserts rows like storied's into SQLite through sqlx.
///
/// Each INSERT and synced commit has `per_transaction` rows.
pub async fn sqlite_inserts(plan: &Plan, per_transaction: usize) -> Run {
    let directory = directory();
    let mut connection = open(&directory).await;
    let payload = text(plan.payload).into_bytes();
    let sql = format!("INSERT INTO events VALUES {}", vec![ROW; per_transaction].join(", "));
    let transactions = plan.events.div_ceil(per_transaction);
    let mut latencies = Vec::with_capacity(transactions);
    let mut position = 0_i64;
    let start = Instant::now();
    for _ in 0..transactions {
        let start = Instant::now();
        connection.execute("BEGIN IMMEDIATE").await.unwrap();
        let mut query = sqlx::query(sqlx::AssertSqlSafe(sql.as_str()));
        for _ in 0..per_transaction {
            position += 1;
            query = query
                .bind(position)
                .bind(position % 1_000)
                .bind(position)
                .bind(1)
                .bind(2)
                .bind(position)
                .bind(Uuid::now_v7())
                .bind(Uuid::now_v7())
                .bind(payload.clone())
                .bind(vec![0xa0_u8])
                .bind(None::<Uuid>);
        }
        query.execute(&mut connection).await.unwrap();
        connection.execute("COMMIT").await.unwrap();
        latencies.push(start.elapsed());
    }
    Run::new(transactions * per_transaction, start.elapsed(), latencies)
}

/// Reads all rows from SQLite through sqlx, in order.
///
/// It takes the columns of an event without decoding them.
pub async fn sqlite_read(expected: usize, filled: &std::path::Path) -> Run {
    use futures_util::TryStreamExt;
    let mut connection = SqliteConnectOptions::new()
        .filename(filled)
        .row_buffer_size(512)
        .disable_statement_logging()
        .connect()
        .await
        .unwrap();
    let start = Instant::now();
    let mut rows = sqlx::query(
        "SELECT position, stream, version, name, id, command_id, payload, metadata, recorded_at
         FROM storied_events ORDER BY position",
    )
    .fetch(&mut connection);
    let (mut events, mut bytes) = (0, 0);
    while let Some(row) = rows.try_next().await.unwrap() {
        let numbers = [0, 1, 2, 3, 8].map(|column| row.get::<i64, _>(column));
        bytes += [4, 5, 6, 7].map(|column| row.get::<&[u8], _>(column).len()).iter().sum::<usize>();
        events += usize::from(numbers.iter().all(|number| *number > 0));
    }
    assert!(bytes > 0 && events == expected, "{events} of {expected} events");
    Run::whole(events, start.elapsed())
}

/// Inserts rows like storied's into PostgreSQL through sqlx.
///
/// Each INSERT … unnest and commit has `per_transaction` rows. It uses `writers` connections
/// concurrently, and `streams` streams in turn. With 1, 1 and 1 it measures single-row commits, one
/// after the other.
pub async fn postgres_inserts(plan: &Plan, per_transaction: usize, writers: usize, streams: usize) -> Run {
    let mut setup = postgres().await;
    setup
        .execute(
            "DROP SCHEMA IF EXISTS raw_bench CASCADE; CREATE SCHEMA raw_bench;
             CREATE TABLE raw_bench.events (position bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, version bigint NOT NULL,
             recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(), stream bigint NOT NULL, id uuid NOT NULL,
             command_id uuid NOT NULL, category integer NOT NULL, name integer NOT NULL,
             payload bytea NOT NULL, metadata bytea NOT NULL, UNIQUE (stream, version));
             CREATE INDEX ON raw_bench.events (command_id, stream, version)",
        )
        .await
        .unwrap();
    let transactions = plan.events.div_ceil(per_transaction * writers);
    let mut connections = Vec::new();
    for _ in 0..writers {
        connections.push(postgres().await);
    }
    let start = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for (writer, mut connection) in connections.into_iter().enumerate() {
        let payload = text(plan.payload).into_bytes();
        tasks.spawn(async move {
            // In order of creation, as the numbers of storied are.
            let own = (streams / writers).max(per_transaction);
            let streams: Vec<i64> = (0..own).map(|stream| (stream * writers + writer) as i64).collect();
            let mut latencies = Vec::with_capacity(transactions);
            for transaction in 0..transactions {
                let start = Instant::now();
                let rows = transaction * per_transaction..(transaction + 1) * per_transaction;
                let versions: Vec<i64> = rows.clone().map(|row| (row / own) as i64 + 1).collect();
                let streams: Vec<i64> = rows.map(|row| streams[row % own]).collect();
                let ids: Vec<Uuid> = (0..per_transaction).map(|_| Uuid::now_v7()).collect();
                let inserted = sqlx::query(
                    "INSERT INTO raw_bench.events (version, stream, id, command_id, category, name, payload, metadata)
                     SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::uuid[], $4::uuid[], $5::integer[], $6::integer[],
                     $7::bytea[], $8::bytea[]) RETURNING position",
                )
                .bind(versions)
                .bind(streams)
                .bind(&ids)
                .bind(&ids)
                .bind(vec![1; per_transaction])
                .bind(vec![2; per_transaction])
                .bind(vec![&payload[..]; per_transaction])
                .bind(vec![&[0xa0_u8][..]; per_transaction])
                .fetch_all(&mut connection)
                .await
                .unwrap();
                assert_eq!(inserted.len(), per_transaction);
                latencies.push(start.elapsed());
            }
            latencies
        });
    }
    let latencies = tasks.join_all().await.concat();
    let run = Run::new(transactions * per_transaction * writers, start.elapsed(), latencies);
    setup.execute("DROP SCHEMA raw_bench CASCADE").await.unwrap();
    run
}

/// Reads all rows from PostgreSQL through sqlx, in order.
///
/// It takes the columns of an event without decoding them.
pub async fn postgres_read(expected: usize) -> Run {
    use futures_util::TryStreamExt;
    let mut connection = postgres().await;
    let start = Instant::now();
    let sql = format!(
        "SELECT position, stream, version, category, name, id, command_id, payload, metadata, recorded_at
         FROM {POSTGRES_SCHEMA}.events ORDER BY position"
    );
    let mut rows = sqlx::query(sqlx::AssertSqlSafe(sql)).fetch(&mut connection);
    let (mut events, mut bytes) = (0, 0);
    while let Some(row) = rows.try_next().await.unwrap() {
        let numbers = [0, 1, 2].map(|column| row.get::<i64, _>(column));
        let names = [3, 4].map(|column| row.get::<i32, _>(column));
        let ids = [5, 6].map(|column| row.get::<Uuid, _>(column));
        let blobs = [7, 8].map(|column| row.get::<&[u8], _>(column).len());
        let time: chrono::DateTime<chrono::Utc> = row.get(9);
        bytes += blobs.iter().sum::<usize>();
        events += usize::from(
            numbers.iter().all(|number| *number > 0)
                && names[0] != names[1]
                && !ids[0].is_nil()
                && time.timestamp() > 0,
        );
    }
    assert!(bytes > 0 && events == expected, "{events} of {expected} events");
    Run::whole(events, start.elapsed())
}

/// Publishes with async-nats into the log stream that storied has filled, after its messages.
///
/// The messages are copies, with the same headers and bodies. Each has the expected last sequence
/// and optionally a new id, 256 in flight.
pub async fn jetstream_publishes(plan: &Plan, client: &async_nats::Client, with_ids: bool) -> Run {
    use async_nats::jetstream::message::PublishMessage;
    const WINDOW: usize = 256;
    const ID: &str = "Nats-Msg-Id";
    let context =
        async_nats::jetstream::context::ContextBuilder::new().max_ack_inflight(WINDOW).build(client.clone());
    let stream = context.get_stream(STREAM).await.unwrap();
    let one = stream.get_raw_message(1).await.unwrap();
    let first = stream.cached_info().state.last_sequence;
    assert_eq!(first, plan.events as u64);
    let copied = one.headers.iter().filter(|(name, _)| name.as_ref() as &str != ID);
    let headers: Vec<(async_nats::HeaderName, String)> =
        copied.map(|(name, values)| (name.clone(), values[0].as_str().to_owned())).collect();
    let mut window = std::collections::VecDeque::with_capacity(WINDOW);
    let start = Instant::now();
    for sequence in first..2 * first {
        if window.len() == WINDOW {
            let oldest: async_nats::jetstream::context::PublishAckFuture = window.pop_front().unwrap();
            oldest.await.unwrap();
        }
        let mut message = async_nats::HeaderMap::new();
        for (name, value) in &headers {
            message.insert(name.clone(), value.as_str());
        }
        if with_ids {
            message.insert(ID, Uuid::now_v7().to_string());
        }
        message.insert("Nats-Expected-Last-Sequence", sequence.to_string());
        let message = PublishMessage::build().headers(message).payload(one.payload.clone());
        window.push_back(context.send_publish(one.subject.clone(), message).await.unwrap());
    }
    for oldest in window {
        oldest.await.unwrap();
    }
    Run::whole(plan.events, start.elapsed())
}

async fn open(directory: &tempfile::TempDir) -> SqliteConnection {
    let mut connection = sqlite(directory).await;
    connection
        .execute(
            "CREATE TABLE events (position INTEGER PRIMARY KEY, stream INTEGER, version INTEGER, category INTEGER, name INTEGER,
             recorded_at INTEGER, id BLOB, command_id BLOB, payload BLOB, metadata BLOB, correlation_id BLOB, UNIQUE (stream, version)) STRICT",
        )
        .await
        .unwrap();
    connection
}

pub async fn sqlite(directory: &tempfile::TempDir) -> SqliteConnection {
    SqliteConnectOptions::new()
        .filename(directory.path().join("raw.db"))
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .disable_statement_logging()
        .connect()
        .await
        .unwrap()
}
