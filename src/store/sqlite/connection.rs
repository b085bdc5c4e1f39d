//! The writing connection, and the reading connections.
//!
//! The store does not use the pool of sqlx. That pool pings every released connection, which is a
//! hop to the connection's thread for each read. It would also return a connection that was
//! abandoned inside a transaction.

use std::fmt;
use std::future::Future;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions, Executor};
use tokio::sync::{Mutex, OwnedMutexGuard, Semaphore, SemaphorePermit};
use tokio::time::timeout;

use super::super::{BoxFuture, StoreError};
use super::error::failed;

/// Maximum wait of a call for earlier calls of this process.
const PATIENCE: Duration = Duration::from_secs(30);
/// Number of connections that read at the same time, each with its own thread.
const READERS: usize = 4;

/// The owner of the writing connection, which serves one transaction after the other.
///
/// A caller that is dropped cannot leave a transaction half-way: it runs in a task of its own, or
/// the connection closes. The connection is released only after SQLite has confirmed the end of the
/// transaction. So no failure of a transaction affects the next one.
#[derive(Debug)]
pub(super) struct Writer {
    options: SqliteConnectOptions,
    /// The file at the path when it was opened.
    file: Option<FileId>,
    connection: Arc<Mutex<Option<SqliteConnection>>>,
}

/// The identity of a file: device and number. `None` where the system has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileId(u64, u64);

impl FileId {
    fn of(path: &Path) -> Option<Self> {
        let file = std::fs::metadata(path).ok()?;
        #[cfg(unix)]
        return Some(Self(
            std::os::unix::fs::MetadataExt::dev(&file),
            std::os::unix::fs::MetadataExt::ino(&file),
        ));
        #[cfg(not(unix))]
        return file.is_file().then_some(Self(0, 0));
    }
}

impl Writer {
    pub(super) fn new(options: SqliteConnectOptions, connection: SqliteConnection) -> Self {
        let file = FileId::of(options.get_filename());
        Self { options, file, connection: Arc::new(Mutex::new(Some(connection))) }
    }

    /// Checks that the database is still the file at its path. SQLite keeps writing to a deleted
    /// file, and its last close loses all of it.
    fn check_file(&self, doing: &str) -> Result<(), StoreError> {
        let path = self.options.get_filename();
        if FileId::of(path) == self.file {
            return Ok(());
        }
        let reason = format!(
            "{doing}: {} was deleted, moved or replaced while it was open; put the file back, or restart the program",
            path.display()
        );
        Err(StoreError::Storage { reason, source: None })
    }

    /// Waits for the writing connection, and checks that its file is unchanged.
    async fn lock(&self, doing: &str) -> Result<OwnedMutexGuard<Option<SqliteConnection>>, StoreError> {
        let slot = timeout(PATIENCE, self.connection.clone().lock_owned()).await;
        let Ok(slot) = slot else {
            let reason = format!("{doing}: other writes took longer than {PATIENCE:?}");
            return Err(StoreError::Unavailable { reason, source: None });
        };
        self.check_file(doing)?;
        Ok(slot)
    }

    /// Runs `work` on the writing connection; `work` begins and ends its transaction itself.
    ///
    /// `work` returns the connection, unless it may have an open transaction. It runs in the task of
    /// the caller, because a task of its own would start only after the caller's next yield.
    ///
    /// # Cancellation safety
    /// If the call is dropped, the connection closes. SQLite then rolls back a transaction whose
    /// commit has not begun.
    pub(super) async fn run<T, F>(
        &self,
        doing: &'static str,
        work: impl FnOnce(SqliteConnection) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = (T, Option<SqliteConnection>)>,
    {
        let mut slot = self.lock(doing).await?;
        let connection = match slot.take() {
            Some(connection) => connection,
            None => self.options.connect().await.map_err(|error| failed(doing, error))?,
        };
        let (result, connection) = work(connection).await;
        *slot = connection;
        Ok(result)
    }

    /// Runs `work` in a transaction that holds SQLite's write lock from its start.
    ///
    /// So the data that it reads stays current until it commits.
    ///
    /// # Cancellation safety
    /// If the call is dropped before its turn, nothing happens; after that the transaction runs to
    /// completion.
    pub(super) async fn transaction<T, E, W>(&self, doing: &'static str, work: W) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
        W: for<'c> FnOnce(&'c mut SqliteConnection) -> BoxFuture<'c, Result<T, E>> + Send + 'static,
    {
        let mut slot = self.lock(doing).await?;
        let options = self.options.clone();
        let task = tokio::spawn(async move {
            let refused = |error| E::from(failed(doing, error));
            let mut connection = match slot.take() {
                Some(connection) => connection,
                None => options.connect().await.map_err(refused)?,
            };
            connection.execute("BEGIN IMMEDIATE").await.map_err(refused)?;
            let worked = work(&mut connection).await;
            let ended = connection.execute(if worked.is_ok() { "COMMIT" } else { "ROLLBACK" }).await;
            if ended.is_ok() {
                *slot = Some(connection);
            }
            // SQLite rolls back by itself after some errors, and then has nothing left to roll back.
            let result = worked?;
            ended.map_err(refused)?;
            Ok(result)
        });
        task.await.unwrap_or_else(|error| {
            let reason = format!("{doing}: the transaction ended without a result");
            Err(StoreError::OutcomeUnknown { reason, source: Some(Arc::new(error)) }.into())
        })
    }
}

/// The reading connections: opened on first use and then kept.
pub(super) struct Readers {
    options: SqliteConnectOptions,
    permits: Semaphore,
    /// Idle connections, at most one for each permit.
    idle: std::sync::Mutex<Vec<SqliteConnection>>,
}

/// A reading connection in use.
pub(super) struct Reader<'a> {
    pub(super) connection: SqliteConnection,
    home: &'a Readers,
    /// Released after the connection is back.
    _permit: SemaphorePermit<'a>,
}

impl fmt::Debug for Readers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readers").field("free", &self.permits.available_permits()).finish_non_exhaustive()
    }
}

impl Readers {
    pub(super) fn new(options: SqliteConnectOptions) -> Self {
        Self { options, permits: Semaphore::new(READERS), idle: std::sync::Mutex::default() }
    }

    pub(super) async fn get(&self, doing: &str) -> Result<Reader<'_>, StoreError> {
        let Ok(Ok(permit)) = timeout(PATIENCE, self.permits.acquire()).await else {
            let reason = format!("{doing}: all reading connections were busy for {PATIENCE:?}");
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
    /// Releases the connection. If it is dropped instead, because a read failed or was cancelled,
    /// it closes.
    pub(super) fn give_back(self) {
        self.home.idle.lock().unwrap_or_else(PoisonError::into_inner).push(self.connection);
    }
}
