//! The one connection that writes, and the few that read. Not sqlx's pool: it pings every connection that comes back, which
//! is a trip to the connection's thread for each read, and would return one that was abandoned inside a transaction.

use std::fmt;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions, Executor};
use tokio::sync::{Mutex, Semaphore, SemaphorePermit};
use tokio::time::timeout;

use super::super::{BoxFuture, StoreError};
use super::error::failed;

/// Owns the writing connection, and lets one transaction after the other have it.
///
/// A transaction runs in its own task: a caller that goes away cannot leave it half-way. And the connection is put back
/// only after SQLite has confirmed that the transaction ended, so whatever goes wrong in one is never seen by the next.
#[derive(Debug)]
pub(super) struct Writer {
    options: SqliteConnectOptions,
    /// How long a transaction waits for those before it.
    patience: Duration,
    connection: Arc<Mutex<Option<SqliteConnection>>>,
}

/// Why a transaction has no result.
#[derive(Debug)]
pub(super) enum Failure<T, E> {
    /// Nothing was written.
    Refused(E),
    /// The commit failed, which should mean that nothing was written. `T` is what would have been returned.
    Commit(StoreError, T),
    /// The program is shutting down, or the transaction's task panicked; nobody knows.
    Lost(StoreError),
}

impl<T, E: From<StoreError>> Failure<T, E> {
    /// For those who cannot or need not find out whether a failed commit happened after all.
    pub(super) fn into_error(self) -> E {
        match self {
            Failure::Refused(error) => error,
            Failure::Commit(error, _) | Failure::Lost(error) => error.into(),
        }
    }
}

impl Writer {
    pub(super) fn new(
        options: SqliteConnectOptions,
        patience: Duration,
        connection: SqliteConnection,
    ) -> Self {
        Self { options, patience, connection: Arc::new(Mutex::new(Some(connection))) }
    }

    /// Runs `work` in a transaction that holds SQLite's write lock from its start, so that what it reads stays true until
    /// it commits. Cancelled before its turn, nothing happens; after that it runs to its end.
    pub(super) async fn transaction<T, E, W>(&self, doing: &'static str, work: W) -> Result<T, Failure<T, E>>
    where
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
        W: for<'c> FnOnce(&'c mut SqliteConnection) -> BoxFuture<'c, Result<T, E>> + Send + 'static,
    {
        let slot = timeout(self.patience, self.connection.clone().lock_owned()).await;
        let Ok(mut slot) = slot else {
            let reason = format!("{doing}: other writes took longer than {:?}", self.patience);
            return Err(Failure::Refused(StoreError::Unavailable { reason, source: None }.into()));
        };
        let options = self.options.clone();
        let task = tokio::spawn(async move {
            let refused = |error| Failure::Refused(E::from(failed(doing, error)));
            let mut connection = match slot.take() {
                Some(connection) => connection,
                None => options.connect().await.map_err(refused)?,
            };
            connection.execute("BEGIN IMMEDIATE").await.map_err(refused)?;
            let worked = work(&mut connection).await;
            let ended = connection.execute(if worked.is_ok() { "COMMIT" } else { "ROLLBACK" }).await;
            let ended = ended.map_err(|error| failed(doing, error));
            if ended.is_ok() {
                *slot = Some(connection);
            }
            match (worked, ended) {
                (Ok(result), Ok(_)) => Ok(result),
                (Ok(result), Err(error)) => Err(Failure::Commit(error, result)),
                // SQLite rolls back by itself after some errors, and then has nothing left to roll back.
                (Err(error), _) => Err(Failure::Refused(error)),
            }
        });
        task.await.unwrap_or_else(|error| {
            let reason = format!("{doing}: the transaction was torn down");
            Err(Failure::Lost(StoreError::OutcomeUnknown { reason, source: Some(Arc::new(error)) }))
        })
    }
}

/// The connections that read. Opened when they are needed first, and kept.
pub(super) struct Readers {
    options: SqliteConnectOptions,
    /// How long a read waits for a connection.
    patience: Duration,
    permits: Semaphore,
    /// At most one for each permit.
    idle: std::sync::Mutex<Vec<SqliteConnection>>,
}

/// A connection to read with.
pub(super) struct Reader<'a> {
    pub(super) connection: SqliteConnection,
    home: &'a Readers,
    /// Freed after the connection is back.
    _permit: SemaphorePermit<'a>,
}

impl fmt::Debug for Readers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readers").field("free", &self.permits.available_permits()).finish_non_exhaustive()
    }
}

impl Readers {
    pub(super) fn new(options: SqliteConnectOptions, patience: Duration, connections: usize) -> Self {
        Self { options, patience, permits: Semaphore::new(connections), idle: std::sync::Mutex::default() }
    }

    pub(super) async fn get(&self, doing: &str) -> Result<Reader<'_>, StoreError> {
        let Ok(Ok(permit)) = timeout(self.patience, self.permits.acquire()).await else {
            let reason = format!("{doing}: all reading connections were busy for {:?}", self.patience);
            return Err(StoreError::Unavailable { reason, source: None });
        };
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let connection = match idle {
            Some(connection) => connection,
            None => self.options.connect().await.map_err(|error| failed(doing, error))?,
        };
        Ok(Reader { connection, home: self, _permit: permit })
    }
}

impl Reader<'_> {
    /// For the next one. A reader that is dropped instead, because a read failed or was given up, closes its connection.
    pub(super) fn give_back(self) {
        self.home.idle.lock().unwrap_or_else(PoisonError::into_inner).push(self.connection);
    }
}
