//! Connections from a pool of the application.

use std::ops::{Deref, DerefMut};
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnection, PgPool, Postgres};
use tokio::time::{Instant, timeout};

/// Maximum time for an idle connection to answer.
pub(super) const PING: Duration = Duration::from_secs(2);

/// A connection from the pool of the application.
///
/// If it is dropped without [`give_back`](Self::give_back), it is closed. A call that was dropped,
/// timed out or failed may have left an open transaction, an unread answer or a stale plan on it.
#[derive(Debug)]
pub(crate) struct Borrowed {
    connection: PoolConnection<Postgres>,
    clean: bool,
    acquired_at: Instant,
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
        Ok(Self { connection, clean: false, acquired_at: Instant::now() })
    }

    /// Returns the connection to the pool. No call may be in flight on it.
    pub(crate) fn give_back(mut self) {
        self.clean = true;
    }

    /// Returns the time since the pool lent the connection.
    pub(super) fn held_for(&self) -> Duration {
        self.acquired_at.elapsed()
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
