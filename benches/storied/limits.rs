//! What there is to be had without storied, on the same machine in the same minute.

use std::time::Instant;

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous};
use sqlx::{ConnectOptions, Executor, Row};
use uuid::Uuid;

use crate::args::Plan;
use crate::domain::text;
use crate::measure::Run;
use crate::stores::directory;

const ROW: &str = "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";

/// SQLite through sqlx with nothing above: rows like storied's, `per_transaction` of them in one INSERT and commit, synced.
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
                .bind("account")
                .bind((position % 1_000).to_string())
                .bind(position)
                .bind("account.entered")
                .bind(Uuid::now_v7())
                .bind(Uuid::now_v7())
                .bind(payload.clone())
                .bind(vec![0xa0_u8])
                .bind(position);
        }
        query.execute(&mut connection).await.unwrap();
        connection.execute("COMMIT").await.unwrap();
        latencies.push(start.elapsed());
    }
    Run::new(transactions * per_transaction, start.elapsed(), latencies)
}

/// SQLite through sqlx: all rows in order, with the columns that an event is made of, taken but not decoded.
pub async fn sqlite_read(plan: &Plan, filled: &std::path::Path) -> Run {
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
        "SELECT position, category, stream_id, version, name, id, command_id, payload, metadata, recorded_at
         FROM storied_events ORDER BY position",
    )
    .fetch(&mut connection);
    let (mut events, mut bytes) = (0, 0);
    while let Some(row) = rows.try_next().await.unwrap() {
        let numbers = [0, 3, 9].map(|column| row.get::<i64, _>(column));
        let texts = [1, 2, 4].map(|column| row.get::<&str, _>(column).len());
        let blobs = [5, 6, 7, 8].map(|column| row.get::<&[u8], _>(column).len());
        bytes += texts.iter().chain(&blobs).sum::<usize>();
        events += usize::from(numbers[0] > 0);
    }
    assert!(bytes > 0 && events == plan.events, "{events} of {} events", plan.events);
    Run::whole(events, start.elapsed())
}

async fn open(directory: &tempfile::TempDir) -> SqliteConnection {
    let mut connection = SqliteConnectOptions::new()
        .filename(directory.path().join("raw.db"))
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .disable_statement_logging()
        .connect()
        .await
        .unwrap();
    connection
        .execute(
            "CREATE TABLE events (position INTEGER PRIMARY KEY, category TEXT, stream_id TEXT, version INTEGER, name TEXT,
             id BLOB, command_id BLOB, payload BLOB, metadata BLOB, recorded_at INTEGER,
             UNIQUE (stream_id, category, version)) STRICT",
        )
        .await
        .unwrap();
    connection
}
