//! Transactions on connections from a pool of the application.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use sqlx::SqlStr;
use sqlx::postgres::{PgConnection, PgPool, Postgres};
use sqlx_core::transaction::TransactionManager;
use tokio::time::{sleep, timeout};

use super::borrowed::{Borrowed, PING};

type Manager = <Postgres as sqlx::Database>::TransactionManager;

/// Time that a connection waits for the next transaction before the pool gets it back.
const KEEP: Duration = Duration::from_millis(100);

/// Maximum time between two returns of a connection to the pool, which enforces its lifetime then.
const LENT: Duration = Duration::from_secs(1);

/// A connection between two transactions; empty once one of its two owners has taken it.
type Slot = Mutex<Option<Borrowed>>;

/// Begins transactions, and keeps the connection of the last one for the next one.
///
/// The pool pings a connection when it lends it and when it gets it back: two round trips of each
/// transaction. Clones share the kept connections.
#[derive(Debug, Clone)]
pub(crate) struct TransactionPool {
    pool: PgPool,
    /// The tasks that return the connections own them: a connection can only be dropped within a
    /// runtime.
    kept: Arc<Mutex<Vec<Weak<Slot>>>>,
}

impl TransactionPool {
    pub(crate) fn new(pool: PgPool) -> Self {
        Self { pool, kept: Arc::default() }
    }

    pub(crate) fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// Begins a transaction with the statement `begin`.
    pub(crate) async fn begin(&self, begin: SqlStr) -> Result<BorrowedTransaction, sqlx::Error> {
        if let Some(mut connection) = self.take_kept()
            // A connection that died meanwhile is closed, as by the ping of the pool.
            && let Ok(Ok(())) = timeout(PING, Manager::begin(&mut connection, Some(begin.clone()))).await
        {
            return Ok(BorrowedTransaction { connection, pool: self.clone() });
        }
        let mut connection = Borrowed::acquire(&self.pool).await?;
        Manager::begin(&mut connection, Some(begin)).await?;
        Ok(BorrowedTransaction { connection, pool: self.clone() })
    }

    fn take_kept(&self) -> Option<Borrowed> {
        if self.pool.is_closed() {
            return None;
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(slot) = kept.pop() {
            if let Some(connection) = slot.upgrade().and_then(|slot| take(&slot)) {
                return Some(connection);
            }
        }
        None
    }

    /// Keeps a connection for the next transaction, unless other users of the pool may need it.
    fn keep(&self, connection: Borrowed) {
        let exhausted =
            self.pool.num_idle() == 0 && self.pool.size() >= self.pool.options().get_max_connections();
        if exhausted || self.pool.is_closed() || connection.held_for() >= LENT {
            return connection.give_back();
        }
        let slot = Arc::new(Slot::new(Some(connection)));
        {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.retain(|slot| slot.strong_count() > 0);
            kept.push(Arc::downgrade(&slot));
        }
        tokio::spawn(async move {
            sleep(KEEP).await;
            if let Some(connection) = take(&slot) {
                connection.give_back();
            }
        });
    }
}

fn take(slot: &Slot) -> Option<Borrowed> {
    slot.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// An open transaction on a [`Borrowed`] connection.
///
/// Only a confirmed commit returns the connection. The `Transaction` of sqlx always returns it, even
/// if `BEGIN` was sent and its answer was not awaited. The pool then hands out a connection inside
/// an open transaction, and its next user loses rows.
#[derive(Debug)]
pub(crate) struct BorrowedTransaction {
    connection: Borrowed,
    pool: TransactionPool,
}

impl BorrowedTransaction {
    pub(crate) async fn commit(mut self) -> Result<(), sqlx::Error> {
        Manager::commit(&mut self.connection).await?;
        self.pool.keep(self.connection);
        Ok(())
    }

    /// Rolls back and closes the connection.
    ///
    /// A statement that failed, for example with a stale plan, may fail on the connection again.
    pub(crate) async fn roll_back(mut self) -> Result<(), sqlx::Error> {
        Manager::rollback(&mut self.connection).await
    }

    pub(crate) fn connection(&mut self) -> &mut PgConnection {
        &mut self.connection
    }
}
