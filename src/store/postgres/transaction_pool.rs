//! Transactions on connections from a pool of the application.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use sqlx::SqlStr;
use sqlx::postgres::{PgConnection, PgPool, Postgres};
use sqlx_core::transaction::TransactionManager;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use super::borrowed::{Borrowed, PING};

type Manager = <Postgres as sqlx::Database>::TransactionManager;

/// Time that a connection waits for the next transaction before the pool gets it back.
const KEEP: Duration = Duration::from_millis(100);

/// Maximum time between two returns of a connection to the pool, which enforces its lifetime then.
const LENT: Duration = Duration::from_secs(1);

/// A connection between two transactions; empty once one of its two owners has taken it.
type Slot = Mutex<Option<Kept>>;

/// A connection that waits for the next transaction until a time.
#[derive(Debug)]
struct Kept {
    until: Instant,
    connection: Connection,
}

#[derive(Debug)]
enum Connection {
    Idle(Borrowed),
    /// The statement `begin` is being sent, or its transaction has begun.
    Begun {
        begin: SqlStr,
        connection: JoinHandle<Option<Borrowed>>,
    },
}

impl Connection {
    fn serves(&self, begin: &SqlStr) -> bool {
        match self {
            Self::Idle(_) => true,
            Self::Begun { begin: begun, .. } => begun.as_str() == begin.as_str(),
        }
    }

    /// Returns the connection with an open transaction, if it is alive.
    async fn begun(self, begin: SqlStr) -> Option<Borrowed> {
        match self {
            Self::Idle(connection) => begin_on(connection, begin).await,
            // Limited, because the task may belong to a runtime that nothing drives.
            Self::Begun { connection, .. } => timeout(PING, connection).await.ok()?.ok().flatten(),
        }
    }

    async fn give_back(self) {
        match self {
            Self::Idle(connection) => connection.give_back(),
            Self::Begun { connection, .. } => {
                if let Ok(Some(mut connection)) = connection.await
                    && let Ok(Ok(())) = timeout(PING, Manager::rollback(&mut connection)).await
                {
                    connection.give_back();
                }
            }
        }
    }
}

/// Begins a transaction on a kept connection.
///
/// A connection that died meanwhile is closed, as by the ping of the pool.
async fn begin_on(mut connection: Borrowed, begin: SqlStr) -> Option<Borrowed> {
    let begun = timeout(PING, Manager::begin(&mut connection, Some(begin))).await;
    matches!(begun, Ok(Ok(()))).then_some(connection)
}

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
        if let Some(kept) = self.take_kept(|kept| kept.connection.serves(&begin))
            && let Some(connection) = kept.connection.begun(begin.clone()).await
        {
            return Ok(BorrowedTransaction { connection, pool: self.clone() });
        }
        let mut connection = Borrowed::acquire(&self.pool).await?;
        Manager::begin(&mut connection, Some(begin)).await?;
        Ok(BorrowedTransaction { connection, pool: self.clone() })
    }

    /// Begins a transaction that the next [`begin`](Self::begin) of the same statement returns.
    ///
    /// Only on a kept connection, and no longer than that would be kept anyway: no other user of the
    /// pool waits for it.
    pub(crate) fn begin_ahead(&self, begin: SqlStr) {
        let enough = Instant::now() + KEEP / 2;
        let idle = |kept: &Kept| matches!(kept.connection, Connection::Idle(_)) && kept.until >= enough;
        let Some(Kept { until, connection: Connection::Idle(connection) }) = self.take_kept(idle) else {
            return;
        };
        let connection = tokio::spawn(begin_on(connection, begin.clone()));
        self.keep_until(until, Connection::Begun { begin, connection });
    }

    /// Takes the last kept connection that is suitable.
    fn take_kept(&self, suitable: impl Fn(&Kept) -> bool) -> Option<Kept> {
        if self.pool.is_closed() {
            return None;
        }
        let now = Instant::now();
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|slot| slot.strong_count() > 0);
        for at in (0..kept.len()).rev() {
            let taken = kept[at].upgrade().and_then(|slot| {
                // The task that gives it back may be late.
                let suits = |kept: &mut Kept| kept.until > now && suitable(kept);
                slot.lock().unwrap_or_else(PoisonError::into_inner).take_if(suits)
            });
            if taken.is_some() {
                kept.remove(at);
                return taken;
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
        self.keep_until(Instant::now() + KEEP, Connection::Idle(connection));
    }

    fn keep_until(&self, until: Instant, connection: Connection) {
        let slot = Arc::new(Slot::new(Some(Kept { until, connection })));
        {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.retain(|slot| slot.strong_count() > 0);
            kept.push(Arc::downgrade(&slot));
        }
        tokio::spawn(async move {
            sleep_until(until).await;
            let kept = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(kept) = kept {
                kept.connection.give_back().await;
            }
        });
    }
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
