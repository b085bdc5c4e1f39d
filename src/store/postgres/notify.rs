//! Hints between processes that the log has new events.
//!
//! Losing a hint with a connection does no harm, because readers also poll. A hint is never part of
//! an append: PostgreSQL lets only one committing transaction notify at a time.

use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgListener, PgPool};
use tokio::time::Instant;

use super::super::StoreError;
use super::connection::Connections;
use super::error::failed;
use super::statements::Schema;

const DOING: &str = "notifying other processes";

/// Minimum interval between two hints.
const SELDOM: Duration = Duration::from_millis(10);

/// Pause after a failure to listen.
const BROKEN: Duration = Duration::from_secs(1);

/// Sends hints, and receives those of other processes.
#[derive(Debug, Clone)]
pub(super) struct Hints {
    channel: String,
    /// Pool of the one connection that listens.
    pool: PgPool,
}

impl Hints {
    pub(super) fn new(schema: &Schema, pool: PgPool) -> Self {
        Self { channel: format!("storied_{}", schema.name()), pool }
    }

    /// Notifies other processes of an append of this one, unless it has just done so.
    pub(super) async fn send(
        &self,
        connections: &Arc<Connections>,
        last: &mut Option<Instant>,
    ) -> Result<(), StoreError> {
        if last.is_some_and(|last| last.elapsed() < SELDOM) {
            return Ok(());
        }
        *last = Some(Instant::now());
        let mut session = connections.get(DOING).await?;
        sqlx::query("SELECT pg_notify($1, '')")
            .bind(&self.channel)
            .persistent(connections.persistent())
            .execute(&mut *session)
            .await
            .map_err(|error| failed(DOING, error))?;
        session.finish(DOING).await
    }

    /// Calls `hinted` for every hint, and whenever hints may have been missed. Never ends.
    pub(super) async fn listen(&self, hinted: impl Fn()) {
        loop {
            if let Err(error) = self.listen_until_broken(&hinted).await {
                tracing::debug!(%error, "could not receive hints of other processes; retrying");
            }
            tokio::time::sleep(BROKEN).await;
        }
    }

    async fn listen_until_broken(&self, hinted: &impl Fn()) -> Result<(), sqlx::Error> {
        let mut listener = PgListener::connect_with(&self.pool).await?;
        listener.listen(&self.channel).await?;
        loop {
            hinted();
            // `None` means that the connection was lost, with the hints sent meanwhile.
            listener.try_recv().await?;
        }
    }
}
