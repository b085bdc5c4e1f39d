//! A hint from process to process: "there is something new". Only a hint, since polling stands behind it; so it may be lost
//! with a connection, and is never part of an append: PostgreSQL lets one committing transaction notify at a time.

use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgListener, PgPool};
use tokio::time::Instant;

use super::super::StoreError;
use super::Core;
use super::error::failed;
use super::sql::Schema;

const DOING: &str = "notifying other processes";

/// Hints are sent at most so often.
const SELDOM: Duration = Duration::from_millis(10);

/// After a failure to listen.
const BROKEN: Duration = Duration::from_secs(1);

/// Sends hints, and waits for those of others.
#[derive(Debug, Clone)]
pub(super) struct Hints {
    channel: String,
    /// Of the one connection that listens.
    pool: PgPool,
}

impl Hints {
    pub(super) fn new(schema: &Schema, pool: PgPool) -> Self {
        Self { channel: format!("storied_{}", schema.name()), pool }
    }

    /// Tells others that this process has appended, unless it has just done so.
    pub(super) async fn send(&self, core: &Arc<Core>, last: &mut Option<Instant>) -> Result<(), StoreError> {
        if last.is_some_and(|last| last.elapsed() < SELDOM) {
            return Ok(());
        }
        *last = Some(Instant::now());
        let mut session = core.connections.get(DOING).await?;
        sqlx::query("SELECT pg_notify($1, '')")
            .bind(&self.channel)
            .persistent(core.connections.persistent())
            .execute(&mut *session)
            .await
            .map_err(|error| failed(DOING, error))?;
        session.finish(DOING).await
    }

    /// Calls `hinted` for every hint, and whenever some may have been missed. Never ends.
    pub(super) async fn listen(&self, hinted: impl Fn()) {
        loop {
            if let Err(error) = self.listen_until_broken(&hinted).await {
                tracing::debug!(%error, "hints of other processes are not heard");
            }
            tokio::time::sleep(BROKEN).await;
        }
    }

    async fn listen_until_broken(&self, hinted: &impl Fn()) -> Result<(), sqlx::Error> {
        let mut listener = PgListener::connect_with(&self.pool).await?;
        listener.listen(&self.channel).await?;
        loop {
            hinted();
            // None says that the connection was lost, and what was sent meanwhile with it.
            listener.try_recv().await?;
        }
    }
}
