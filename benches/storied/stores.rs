use sqlx::{Connection, Executor, PgConnection};
use storied::store::{Append, ExpectedVersion};
use storied::{
    EventStore, MemoryStore, Metadata, NewEvent, PostgresOptions, PostgresStore, SqliteStore, StreamId,
};
use tempfile::TempDir;

use crate::args::{Plan, StoreKind};
use crate::domain::{AccountEvent, text};

/// A new store, and its location.
#[derive(Clone)]
pub enum Store {
    Memory(MemoryStore),
    Sqlite(SqliteStore, std::sync::Arc<TempDir>),
    Postgres(PostgresStore),
}

impl Store {
    pub async fn fresh(kind: StoreKind) -> Self {
        match kind {
            StoreKind::Memory => Store::Memory(MemoryStore::new()),
            StoreKind::Sqlite => {
                let directory = directory();
                let store = SqliteStore::open(directory.path().join("events.db")).await.unwrap();
                Store::Sqlite(store, directory.into())
            }
            StoreKind::Postgres => {
                let mut connection = postgres().await;
                connection.execute("DROP SCHEMA IF EXISTS storied_bench CASCADE").await.unwrap();
                let options = PostgresOptions::new().url(postgres_url().await).schema(POSTGRES_SCHEMA);
                Store::Postgres(options.connect().await.unwrap())
            }
        }
    }

    /// Opens a filled store of another process, at its [`place`](Self::place).
    pub async fn existing(kind: StoreKind, place: &str) -> Self {
        match kind {
            StoreKind::Memory => Self::fresh(kind).await,
            StoreKind::Sqlite => {
                let directory = directory();
                Store::Sqlite(SqliteStore::open(place).await.unwrap(), directory.into())
            }
            StoreKind::Postgres => {
                let options = PostgresOptions::new().url(place).schema(POSTGRES_SCHEMA);
                Store::Postgres(options.connect().await.unwrap())
            }
        }
    }

    /// Returns the location for another process.
    pub async fn place(&self) -> String {
        match self {
            Store::Memory(_) => String::new(),
            Store::Sqlite(_, directory) => directory.path().join("events.db").to_str().unwrap().into(),
            Store::Postgres(_) => postgres_url().await,
        }
    }

    pub fn port(&self) -> &dyn EventStore {
        match self {
            Store::Memory(store) => store,
            Store::Sqlite(store, _) => store,
            Store::Postgres(store) => store,
        }
    }

    pub fn builder(&self) -> storied::runtime::Builder {
        match self.clone() {
            Store::Memory(store) => storied::Runtime::builder().store(store),
            Store::Sqlite(store, _) => storied::Runtime::builder().store(store),
            Store::Postgres(store) => storied::Runtime::builder().store(store),
        }
    }

    /// Appends `plan.events` events, over `streams` streams in turn.
    pub async fn fill(&self, plan: &Plan, streams: usize) {
        self.fill_in(plan, streams, 500).await;
    }

    /// Appends `plan.events` events over `streams` streams, `batch` events at a time.
    pub async fn fill_in(&self, plan: &Plan, streams: usize, batch: usize) {
        let event = AccountEvent::Entered { text: text(plan.payload) };
        let codec = self.port().info().codec;
        let events: Vec<usize> = (0..plan.events).collect();
        // A batch has a stream at most once.
        for batch in events.chunks(batch.min(streams)) {
            let append = |n: &usize| {
                let new = NewEvent::encode(&event, codec, &Metadata::default()).unwrap();
                Append::one(StreamId::new("account", n % streams).unwrap(), ExpectedVersion::Any, vec![new])
            };
            for answer in self.port().append(batch.iter().map(append).collect()).await {
                answer.unwrap();
            }
        }
    }

    /// Does the deferred work of the server after [`fill`](Self::fill).
    ///
    /// It would slow down the first run.
    pub async fn settle(&self) {
        if let Store::Postgres(_) = self {
            for statement in [format!("VACUUM ANALYZE {POSTGRES_SCHEMA}.events"), "CHECKPOINT".to_owned()] {
                postgres().await.execute(sqlx::AssertSqlSafe(statement)).await.unwrap();
            }
        }
    }
}

pub const POSTGRES_SCHEMA: &str = "storied_bench";

/// Returns the server of the environment, or a private one with default durability.
async fn postgres_url() -> String {
    match std::env::var("DATABASE_URL") {
        Ok(url) if !url.is_empty() => url,
        _ => crate::support::PostgresServer::shared().await.url(),
    }
}

pub async fn postgres() -> PgConnection {
    PgConnection::connect(&postgres_url().await).await.unwrap()
}

/// Creates a directory in the build directory, because /tmp may be in memory.
pub fn directory() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Drops the schema, so that nothing stays on a shared server.
pub async fn clean() {
    if std::env::var("DATABASE_URL").is_ok_and(|url| !url.is_empty()) {
        let drop = format!("DROP SCHEMA IF EXISTS {POSTGRES_SCHEMA} CASCADE");
        postgres().await.execute(sqlx::AssertSqlSafe(drop)).await.unwrap();
    }
}
