//! Connections from a pool of the application.

use std::ops::{Deref, DerefMut};
use std::time::Duration;

use sqlx::SqlStr;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnection, PgPool, Postgres};
use sqlx_core::transaction::TransactionManager;
use tokio::time::timeout;

type Manager = <Postgres as sqlx::Database>::TransactionManager;

/// Maximum time for an idle connection to answer the ping of the pool.
const PING: Duration = Duration::from_secs(2);

/// A connection from the pool of the application.
///
/// If it is dropped without [`give_back`](Self::give_back), it is closed. A call that was dropped,
/// timed out or failed may have left an open transaction, an unread answer or a stale plan on it.
#[derive(Debug)]
pub(crate) struct Borrowed {
    connection: PoolConnection<Postgres>,
    clean: bool,
}

impl Borrowed {
    /// Acquires a connection, within the time limit of the pool.
    pub(crate) async fn acquire(pool: &PgPool) -> Result<Self, sqlx::Error> {
        let acquire = async {
            // The pool pings an idle connection without a limit. If the ping is dropped, the pool
            // closes that connection and tries the next one. Otherwise each dead connection would
            // cost the whole time limit of the pool.
            while pool.num_idle() > 0 {
                if let Ok(acquired) = timeout(PING, pool.acquire()).await {
                    return acquired;
                }
            }
            pool.acquire().await
        };
        let limit = pool.options().get_acquire_timeout();
        let connection = timeout(limit, acquire).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))?;
        Ok(Self { connection, clean: false })
    }

    /// Returns the connection to the pool. No call may be in flight on it.
    pub(crate) fn give_back(mut self) {
        self.clean = true;
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        if !self.clean {
            self.connection.close_on_drop();
        }
    }
}

impl Deref for Borrowed {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.connection
    }
}

impl DerefMut for Borrowed {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.connection
    }
}

/// An open transaction on a [`Borrowed`] connection.
///
/// Only a confirmed commit returns the connection to the pool. The `Transaction` of sqlx always
/// returns it, even if `BEGIN` was sent and its answer was not awaited. The pool then hands out a
/// connection inside an open transaction, and its next user loses rows.
#[derive(Debug)]
pub(crate) struct BorrowedTransaction(Borrowed);

impl BorrowedTransaction {
    /// Begins a transaction with `begin`, or with a plain `BEGIN`.
    pub(crate) async fn begin(pool: &PgPool, begin: Option<SqlStr>) -> Result<Self, sqlx::Error> {
        let mut connection = Borrowed::acquire(pool).await?;
        Manager::begin(&mut connection, begin).await?;
        Ok(Self(connection))
    }

    pub(crate) async fn commit(mut self) -> Result<(), sqlx::Error> {
        Manager::commit(&mut self.0).await?;
        self.0.give_back();
        Ok(())
    }

    /// Rolls back and closes the connection.
    ///
    /// A statement that failed, for example with a stale plan, may fail on the connection again.
    pub(crate) async fn roll_back(mut self) -> Result<(), sqlx::Error> {
        Manager::rollback(&mut self.0).await
    }

    pub(crate) fn connection(&mut self) -> &mut PgConnection {
        &mut self.0
    }
}
