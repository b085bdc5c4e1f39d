//! Connections of a pool that belongs to the application.

use std::ops::{Deref, DerefMut};
use std::time::Duration;

use sqlx::SqlStr;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnection, PgPool, Postgres};
use sqlx_core::transaction::TransactionManager;
use tokio::time::timeout;

type Manager = <Postgres as sqlx::Database>::TransactionManager;

/// How long an idle connection may take to answer the pool's ping.
const PING: Duration = Duration::from_secs(2);

/// A connection of the application's pool. Dropped without [`give_back`](Self::give_back) it is closed: a call that was
/// dropped, timed out or failed may have left an open transaction, an unread answer or a stale plan on it.
#[derive(Debug)]
pub(crate) struct Borrowed {
    connection: PoolConnection<Postgres>,
    clean: bool,
}

impl Borrowed {
    /// Takes a connection, within the pool's own time limit.
    pub(crate) async fn acquire(pool: &PgPool) -> Result<Self, sqlx::Error> {
        let acquire = async {
            // The pool pings an idle connection without a limit. A dropped ping closes that connection, and the next one
            // gets its turn: otherwise each connection that died silently would cost the pool's whole time limit.
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

    /// Returns the connection to the pool. Nothing may be under way on it.
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

/// An open transaction on a [`Borrowed`] connection. Only a confirmed commit returns the connection to the pool.
///
/// sqlx's own `Transaction` returns it always: also when `BEGIN` was sent and its answer was not awaited. Then the pool hands
/// out a connection inside an open transaction, and the next user of it loses its rows.
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

    /// Rolls back and closes the connection: what failed on it may fail there again, as a statement whose plan is stale.
    pub(crate) async fn roll_back(mut self) -> Result<(), sqlx::Error> {
        Manager::rollback(&mut self.0).await
    }

    pub(crate) fn connection(&mut self) -> &mut PgConnection {
        &mut self.0
    }
}
