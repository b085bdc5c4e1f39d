//! Locations of read models, and a projection that records the received events there.

use std::future::Future;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex};

use sqlx::postgres::{PgConnection, PgPool, PgPoolOptions};
use sqlx::sqlite::SqliteConnection;
use storied::projection::{ApplyError, AtLeastOnce, Delivery, ReadModel, SqliteReadModel};
use storied::{
    AnyEvent, EventSet, EventStore, Filter, MemoryStore, Position, PostgresReadModel, PostgresStore,
    Projection, RecordedEvent, SqliteStore,
};
use tempfile::TempDir;

use crate::projection::fixtures::{Hook, hook};
use crate::support::PostgresServer;

/// A read model in the location that users of its store would choose.
pub trait Place: Clone + Send + Sync + 'static {
    type Tx: Send + 'static;
    type Model: ReadModel<Transaction = Self::Tx>;
    /// Whether the writes and the checkpoint commit together.
    const TOGETHER: bool;

    /// Creates a new store and a location for its read models.
    fn open() -> impl Future<Output = (Arc<dyn EventStore>, Self)> + Send;

    fn model(&self) -> impl Future<Output = Self::Model> + Send;

    fn write(
        &self,
        name: &str,
        position: Position,
        tx: &mut Self::Tx,
    ) -> impl Future<Output = Result<(), ApplyError>> + Send;

    fn clear(&self, name: &str, tx: &mut Self::Tx) -> impl Future<Output = Result<(), ApplyError>> + Send;

    /// As `clear`, but with an exclusive lock, as a drop of a table.
    fn clear_alone(
        &self,
        name: &str,
        tx: &mut Self::Tx,
    ) -> impl Future<Output = Result<(), ApplyError>> + Send {
        self.clear(name, tx)
    }

    /// Returns the positions written under a name, in order.
    fn seen(&self, name: &str) -> impl Future<Output = Vec<Position>> + Send;
}

/// In another system, which deduplicates by the key.
#[derive(Clone, Default)]
pub struct Outside(Arc<Mutex<Vec<(String, Position)>>>);

impl Place for Outside {
    type Tx = Delivery;
    type Model = AtLeastOnce;
    const TOGETHER: bool = false;

    async fn open() -> (Arc<dyn EventStore>, Self) {
        (Arc::new(MemoryStore::new()), Self::default())
    }

    async fn model(&self) -> AtLeastOnce {
        AtLeastOnce::new()
    }

    async fn write(&self, name: &str, position: Position, _: &mut Delivery) -> Result<(), ApplyError> {
        let mut seen = self.0.lock().unwrap();
        let row = (name.to_owned(), position);
        if !seen.contains(&row) {
            seen.push(row);
        }
        Ok(())
    }

    async fn clear(&self, name: &str, _: &mut Delivery) -> Result<(), ApplyError> {
        self.0.lock().unwrap().retain(|(of, _)| of != name);
        Ok(())
    }

    async fn seen(&self, name: &str) -> Vec<Position> {
        let seen = self.0.lock().unwrap();
        seen.iter().filter(|(of, _)| of == name).map(|(_, position)| *position).collect()
    }
}

/// In a database beside that of the store.
#[derive(Clone)]
pub struct InSqlite(Arc<TempDir>, sqlx::SqlitePool);

/// In the database of the store.
#[derive(Clone)]
pub struct InPostgres(PgPool);

macro_rules! in_sql {
    ($place:ty, $tx:ty, $pool:tt) => {
        async fn write(&self, name: &str, position: Position, tx: &mut $tx) -> Result<(), ApplyError> {
            let insert = sqlx::query("INSERT INTO seen (name, position) VALUES ($1, $2)");
            insert.bind(name).bind(position.get() as i64).execute(tx).await?;
            Ok(())
        }

        async fn clear(&self, name: &str, tx: &mut $tx) -> Result<(), ApplyError> {
            sqlx::query("DELETE FROM seen WHERE name = $1").bind(name).execute(tx).await?;
            Ok(())
        }

        async fn seen(&self, name: &str) -> Vec<Position> {
            let select = sqlx::query_scalar("SELECT position FROM seen WHERE name = $1 ORDER BY id");
            let rows: Vec<i64> = select.bind(name).fetch_all(&self.$pool).await.unwrap();
            rows.into_iter().map(|position| Position::new(position as u64)).collect()
        }
    };
}

impl Place for InSqlite {
    type Tx = SqliteConnection;
    type Model = SqliteReadModel;
    const TOGETHER: bool = true;

    async fn open() -> (Arc<dyn EventStore>, Self) {
        let dir = TempDir::new().unwrap();
        let store = SqliteStore::open(dir.path().join("events.db")).await.unwrap();
        let model = SqliteReadModel::open(dir.path().join("read-model.db")).await.unwrap();
        let pool = model.pool().clone();
        let table = "CREATE TABLE seen (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT, position INTEGER)";
        sqlx::query(table).execute(&pool).await.unwrap();
        (Arc::new(store), Self(Arc::new(dir), pool))
    }

    async fn model(&self) -> SqliteReadModel {
        SqliteReadModel::open(self.0.path().join("read-model.db")).await.unwrap()
    }

    in_sql!(InSqlite, SqliteConnection, 1);
}

impl Place for InPostgres {
    type Tx = PgConnection;
    type Model = PostgresReadModel;
    const TOGETHER: bool = true;

    async fn open() -> (Arc<dyn EventStore>, Self) {
        Self::at(&PostgresServer::shared().await.create_database().await).await
    }

    async fn model(&self) -> PostgresReadModel {
        PostgresReadModel::new(self.0.clone())
    }

    async fn clear_alone(&self, name: &str, tx: &mut PgConnection) -> Result<(), ApplyError> {
        sqlx::query("LOCK TABLE seen IN ACCESS EXCLUSIVE MODE").execute(&mut *tx).await?;
        self.clear(name, tx).await
    }

    in_sql!(InPostgres, PgConnection, 0);
}

impl InPostgres {
    /// Opens both in an empty database.
    pub async fn at(url: &str) -> (Arc<dyn EventStore>, Self) {
        let store = PostgresStore::connect(url).await.unwrap();
        let pool = PgPoolOptions::new().max_connections(4).connect(url).await.unwrap();
        let table = "CREATE TABLE seen (id bigint GENERATED ALWAYS AS IDENTITY, name text, position bigint)";
        sqlx::query(table).execute(&pool).await.unwrap();
        (Arc::new(store), Self(pool))
    }
}

/// Records events under its name, and after a rebuild under its name and version.
pub struct Writes<P, E = AnyEvent> {
    place: P,
    name: String,
    version: u64,
    filter: Filter,
    hook: Hook,
    event: PhantomData<fn(E)>,
}

impl<P: Place> Writes<P> {
    pub fn new(place: P, name: &str) -> Self {
        let (name, hook, event) = (name.into(), hook(|_| Ok(())), PhantomData);
        Self { place, name, version: 0, filter: Filter::all(), hook, event }
    }

    /// Receives decoded events.
    pub fn decoded<E: EventSet>(self) -> Writes<P, E> {
        let Self { place, name, version, hook, .. } = self;
        Writes { place, name, version, filter: Filter::of::<E>(), hook, event: PhantomData }
    }
}

impl<P: Place, E: EventSet> Writes<P, E> {
    pub fn filter(self, filter: Filter) -> Self {
        Self { filter, ..self }
    }

    pub fn hook(self, hook: Hook) -> Self {
        Self { hook, ..self }
    }

    pub fn version(self, version: u64) -> Self {
        Self { version, ..self }
    }

    fn table(&self) -> String {
        match self.version {
            0 => self.name.clone(),
            version => format!("{}@{version}", self.name),
        }
    }
}

impl<P: Place, E: EventSet> Projection for Writes<P, E> {
    const NAME: &'static str = "writes";
    type Event = E;
    type Transaction = P::Tx;

    fn name(&self) -> &str {
        &self.name
    }

    fn filter(&self) -> Filter {
        self.filter.clone()
    }

    async fn apply(&mut self, _: E, event: &RecordedEvent, tx: &mut P::Tx) -> Result<(), ApplyError> {
        if P::TOGETHER {
            // Before the failure, which then has something to roll back.
            self.place.write(&self.table(), event.position, tx).await?;
            (self.hook)(event).await
        } else {
            (self.hook)(event).await?;
            self.place.write(&self.table(), event.position, tx).await
        }
    }

    async fn reset(&mut self, tx: &mut P::Tx) -> Result<(), ApplyError> {
        self.place.clear(&self.table(), tx).await
    }

    async fn drop_version(&mut self, tx: &mut P::Tx) -> Result<(), ApplyError> {
        self.place.clear_alone(&self.table(), tx).await
    }
}
