//! The connections of a store: a limited number, opened on first use and then kept.
//!
//! The store does not use the pool of sqlx, unless the application provides one. That pool pings
//! every released connection and waits for the answer without a limit. The ping is a second round
//! trip for each short statement.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool};
use sqlx::{ConnectOptions, Connection, Executor, Row, SqlStr};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};

use super::super::StoreError;
use super::borrowed::Borrowed;
use super::error::failed;
use super::notices;

/// Idle time after which a connection is pinged before use.
///
/// The ping is one round trip; it avoids an error after every restart of the server.
const TRUSTED: Duration = Duration::from_secs(1);

/// Maximum time for a connection to become usable again, or to close.
const GRACE: Duration = Duration::from_secs(5);

/// The source of connections.
pub(super) enum Source {
    /// Own connections of the store.
    Own(Box<PgConnectOptions>),
    /// Pool of the application; each call borrows a connection.
    Pool(PgPool),
}

/// The time limits of a store.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// Limit of the wait for a connection: a free one, or a new one while the server starts.
    pub(super) acquire: Duration,
    /// Limit of a call, longer than the server's statement timeout; then the connection is closed.
    pub(super) call: Option<Duration>,
}

pub(super) struct Connections {
    source: Source,
    pub(super) patience: Patience,
    /// Set for a pooler in transaction mode: related statements share a transaction.
    ///
    /// No statement is prepared under a name, because the next transaction may get another server
    /// process.
    transactional: bool,
    /// Statement that begins a transaction with its limits.
    begin: SqlStr,
    permits: Arc<Semaphore>,
    /// Idle connections, at most one for each permit.
    idle: Mutex<Vec<(Live, Instant)>>,
    /// See [`begun`](Self::begun).
    begun: AtomicU64,
    /// See [`refusal`](Self::refusal).
    refusal: Mutex<Option<String>>,
}

impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The options contain the password.
        f.debug_struct("Connections").field("free", &self.permits.available_permits()).finish_non_exhaustive()
    }
}

/// An open connection.
struct Live {
    connection: Inner,
    backend: Option<Backend>,
}

enum Inner {
    Own(Box<PgConnection>),
    Borrowed(Borrowed),
}

/// A server process; the start time distinguishes it from a later one with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Backend {
    pub(super) pid: i32,
    /// Start time in microseconds since 1970.
    pub(super) started: i64,
}

/// A connection in use.
///
/// If it is dropped instead of released, because a call failed or was cancelled, it is closed.
pub(super) struct Session {
    live: Live,
    home: Arc<Connections>,
    /// Whether an explicit transaction is open.
    open: bool,
    _permit: OwnedSemaphorePermit,
}

impl Connections {
    pub(super) fn new(
        source: Source,
        patience: Patience,
        transactional: bool,
        begin: SqlStr,
        limit: usize,
    ) -> Self {
        let permits = Arc::new(Semaphore::new(limit.max(1)));
        let (idle, begun, refusal) = (Mutex::default(), AtomicU64::new(0), Mutex::default());
        Self { source, patience, transactional, begin, permits, idle, begun, refusal }
    }

    /// Returns whether statements may be prepared under a name.
    pub(super) fn persistent(&self) -> bool {
        !self.transactional
    }

    /// Returns whether an append runs in an explicit transaction; its id then shows the outcome.
    ///
    /// If not, the server process belongs to this store alone and can be queried.
    pub(super) fn appends_in_transactions(&self) -> bool {
        self.transactional || matches!(self.source, Source::Pool(_))
    }

    /// Acquires a connection for independent statements.
    ///
    /// If the session may belong to others, the statements run in a transaction with the store's
    /// limits and planner settings.
    pub(super) async fn get(self: &Arc<Self>, doing: &str) -> Result<Session, StoreError> {
        let mut session = self.acquire(doing).await?;
        if self.appends_in_transactions() {
            session.begin().await.map_err(|error| failed(doing, error))?;
        }
        Ok(session)
    }

    /// Acquires a connection and begins a transaction.
    pub(super) async fn begin(self: &Arc<Self>, doing: &str) -> Result<Session, StoreError> {
        let mut session = self.acquire(doing).await?;
        session.begin().await.map_err(|error| failed(doing, error))?;
        Ok(session)
    }

    /// Acquires a connection outside any transaction.
    pub(super) async fn acquire(self: &Arc<Self>, doing: &str) -> Result<Session, StoreError> {
        let deadline = Instant::now() + self.patience.acquire;
        let permit = match timeout_at(deadline, self.permits.clone().acquire_owned()).await {
            Ok(Ok(permit)) => permit,
            _ => {
                let reason = format!("{doing}: all connections were busy for {:?}", self.patience.acquire);
                return Err(StoreError::Unavailable { reason, source: None });
            }
        };
        let mut pause = Duration::from_millis(10);
        loop {
            while let Some((mut live, since)) = self.pop() {
                let limit = deadline.min(Instant::now() + GRACE);
                if since.elapsed() < TRUSTED || matches!(timeout_at(limit, live.ping()).await, Ok(Ok(()))) {
                    return Ok(self.session(live, permit));
                }
                // The other connections have been idle for longer, and each ping could take as
                // long.
                self.purge();
            }
            // Boxed: it is rare, and would make the future of every call ten times as large.
            let error = match timeout_at(deadline, Box::pin(self.open())).await {
                Ok(Ok(live)) => return Ok(self.session(live, permit)),
                Ok(Err(error)) => error,
                Err(_elapsed) => sqlx::Error::PoolTimedOut,
            };
            // While the server starts or is out of connections, another caller may release a
            // connection.
            if !for_now(&error) || Instant::now() + pause >= deadline {
                return Err(failed(doing, error));
            }
            self.set_refusal(&error);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(250));
        }
    }

    /// Returns the last answer of a server that may accept connections soon.
    pub(super) fn refusal(&self) -> Option<String> {
        self.refusal.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_refusal(&self, error: &sqlx::Error) {
        let reason = match (error, &self.source) {
            (sqlx::Error::Io(error), Source::Own(options)) if options.get_socket().is_none() => {
                format!("{}:{}: {}", options.get_host(), options.get_port(), error.kind())
            }
            (sqlx::Error::Io(error), _) => error.kind().to_string(),
            (error, _) => error.to_string(),
        };
        *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
    }

    fn session(self: &Arc<Self>, live: Live, permit: OwnedSemaphorePermit) -> Session {
        Session { live, home: self.clone(), open: false, _permit: permit }
    }

    fn pop(&self) -> Option<(Live, Instant)> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    /// Drops all idle connections: one broke, and the others may have too.
    pub(super) fn purge(&self) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Returns a count of connection attempts and opened connections.
    ///
    /// While the count is unchanged, all reads went to the same server as before.
    pub(super) fn begun(&self) -> u64 {
        self.begun.load(Ordering::Acquire)
    }

    /// Counts before and after opening: meanwhile another server may take over.
    ///
    /// So data known under either count is not trusted with this connection.
    async fn open(&self) -> Result<Live, sqlx::Error> {
        self.begun.fetch_add(1, Ordering::AcqRel);
        let live = self.connect().await;
        notices::forget();
        self.begun.fetch_add(1, Ordering::AcqRel);
        live
    }

    async fn connect(&self) -> Result<Live, sqlx::Error> {
        let options = match &self.source {
            Source::Own(options) => options,
            Source::Pool(pool) => {
                let borrowed = Borrowed::acquire(pool).await?;
                return Ok(Live { connection: Inner::Borrowed(borrowed), backend: None });
            }
        };
        let mut live = Live { connection: Inner::Own(Box::new(options.connect().await?)), backend: None };
        if !self.transactional {
            live.backend = Some(identify(&mut live).await?);
        }
        Ok(live)
    }
}

/// Returns whether a server with this answer may accept a connection soon.
fn for_now(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => error.kind() == std::io::ErrorKind::ConnectionRefused,
        // The server is starting or stopping, or has reached its connection limit.
        sqlx::Error::Database(error) => matches!(error.code().as_deref(), Some("57P03" | "53300")),
        _ => false,
    }
}

/// Returns the server process of a connection.
pub(super) async fn identify(connection: &mut PgConnection) -> Result<Backend, sqlx::Error> {
    let row = sqlx::query(
        "SELECT pid, (extract(epoch FROM backend_start) * 1000000)::bigint
         FROM pg_stat_activity WHERE pid = pg_backend_pid()",
    )
    .persistent(false)
    .fetch_one(connection)
    .await?;
    Ok(Backend { pid: row.try_get(0)?, started: row.try_get(1)? })
}

impl Session {
    /// Returns the server process of the connection, if it belongs to this store alone.
    pub(super) fn backend(&self) -> Option<Backend> {
        self.live.backend
    }

    /// Returns whether a pooler may give each transaction another server process.
    pub(super) fn is_transactional(&self) -> bool {
        self.home.transactional
    }

    async fn begin(&mut self) -> Result<(), sqlx::Error> {
        self.open = true;
        let begin = self.home.begin.clone();
        self.execute(begin).await.map(drop)
    }

    /// Commits the transaction, if there is one, and releases the connection.
    pub(super) async fn done(mut self) -> Result<(), sqlx::Error> {
        if self.open {
            self.execute("COMMIT").await?;
        }
        self.give_back();
        Ok(())
    }

    /// Ends the session like [`done`](Self::done), with an error for callers of the store.
    pub(super) async fn finish(self, doing: &str) -> Result<(), StoreError> {
        self.done().await.map_err(|error| failed(doing, error))
    }

    /// Rolls the transaction back; if that fails, the connection is closed.
    pub(super) async fn roll_back(mut self) {
        if !self.open || matches!(timeout(GRACE, self.execute("ROLLBACK")).await, Ok(Ok(_))) {
            self.give_back();
        }
    }

    fn give_back(self) {
        let Session { live, home, .. } = self;
        match live.connection {
            Inner::Own(_) => {
                home.idle.lock().unwrap_or_else(PoisonError::into_inner).push((live, Instant::now()));
            }
            Inner::Borrowed(borrowed) => borrowed.give_back(),
        }
    }
}

impl Deref for Session {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.live
    }
}

impl DerefMut for Session {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.live
    }
}

impl Deref for Live {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        match &self.connection {
            Inner::Own(connection) => connection,
            Inner::Borrowed(borrowed) => borrowed,
        }
    }
}

impl DerefMut for Live {
    fn deref_mut(&mut self) -> &mut PgConnection {
        match &mut self.connection {
            Inner::Own(connection) => connection,
            Inner::Borrowed(borrowed) => borrowed,
        }
    }
}
