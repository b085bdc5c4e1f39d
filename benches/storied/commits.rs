use sqlx::sqlite::SqliteConnection;
use sqlx::{Executor, PgConnection};
use storied::store::{Append, ExpectedVersion};
use storied::{EventStore, MemoryStore, Metadata, NewEvent, Position, ReadLog, StreamId};
use tempfile::TempDir;

use crate::args::StoreKind;
use crate::domain::AccountEvent;
use crate::limits::sqlite;
use crate::stores::{directory, postgres};

/// Single-row commits, one after the other, and a second connection that reads the last row.
pub enum SingleCommits {
    Memory(MemoryStore),
    Sqlite { connections: Box<[SqliteConnection; 2]>, _directory: TempDir },
    Postgres(Box<[PgConnection; 2]>),
}

impl SingleCommits {
    pub async fn open(kind: StoreKind) -> Self {
        match kind {
            StoreKind::Memory => Self::Memory(MemoryStore::new()),
            StoreKind::Sqlite => {
                let directory = directory();
                let mut writer = sqlite(&directory).await;
                let table = "CREATE TABLE raw_latency (id INTEGER PRIMARY KEY, body BLOB NOT NULL)";
                writer.execute(table).await.unwrap();
                let connections = Box::new([writer, sqlite(&directory).await]);
                Self::Sqlite { connections, _directory: directory }
            }
            StoreKind::Postgres => {
                let mut writer = postgres().await;
                let table = "DROP TABLE IF EXISTS raw_latency;
                    CREATE TABLE raw_latency (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, body bytea NOT NULL)";
                writer.execute(table).await.unwrap();
                Self::Postgres(Box::new([writer, postgres().await]))
            }
        }
    }

    pub async fn insert(&mut self, body: &[u8]) {
        const INSERT: &str = "INSERT INTO raw_latency (body) VALUES ($1)";
        match self {
            Self::Memory(store) => {
                let event = AccountEvent::Entered { text: "x".repeat(body.len()) };
                let new = NewEvent::encode(&event, store.info().codec, &Metadata::default()).unwrap();
                let stream = StreamId::new("account", "raw").unwrap();
                let append = Append::one(stream, ExpectedVersion::Any, vec![new]);
                for answer in store.append(vec![append]).await {
                    answer.unwrap();
                }
            }
            Self::Sqlite { connections, .. } => {
                sqlx::query(INSERT).bind(body).execute(&mut connections[0]).await.unwrap();
            }
            Self::Postgres(connections) => {
                sqlx::query(INSERT).bind(body).execute(&mut connections[0]).await.unwrap();
            }
        }
    }

    pub async fn read_last(&mut self) {
        const READ: &str = "SELECT body FROM raw_latency ORDER BY id DESC LIMIT 1";
        match self {
            Self::Memory(store) => {
                let head = store.high_water_mark().await.unwrap();
                let after = Position::new(head.get() - 1);
                let page = store.read_log(ReadLog::after(after).limit(1)).await.unwrap();
                assert_eq!(page.events.len(), 1);
            }
            Self::Sqlite { connections, .. } => {
                drop(sqlx::query(READ).fetch_one(&mut connections[1]).await.unwrap());
            }
            Self::Postgres(connections) => {
                drop(sqlx::query(READ).fetch_one(&mut connections[1]).await.unwrap());
            }
        }
    }

    pub async fn close(self) {
        if let Self::Postgres(mut connections) = self {
            connections[0].execute("DROP TABLE raw_latency").await.unwrap();
        }
    }
}
