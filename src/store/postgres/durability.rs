//! Confirms that a commit is durable (I3), for answers that rest on a read.
//!
//! A commit that waits for a synchronous standby is invisible to other sessions. If the wait is
//! cancelled, or its server process ends, the commit becomes visible although no standby has it: a
//! commit that is visible on the primary need not be durable. The write-ahead log is replicated in
//! order. So a later transaction that writes to it, and whose commit is confirmed, proves that all
//! data visible at its start is replicated.

use std::sync::Arc;
use std::time::Duration;

use super::super::StoreError;
use super::connection::{Backend, Session};
use super::error::failed;
use super::inner::PgInner;
use super::{connection, notices};

const DOING: &str = "confirming that a commit is durable";

/// Confirms that all data read by `session` is durable.
///
/// In an explicit transaction its commit completes the proof: the caller must commit before it
/// answers. Without synchronous standbys this does nothing. With them it costs one transaction and
/// waits for them.
///
/// # Errors
/// `Unavailable` if the server cannot be queried. The wait for a standby has no limit here; the
/// caller limits it.
pub(super) async fn confirm(core: &Arc<PgInner>, session: &mut Session) -> Result<(), StoreError> {
    if !core.high_water_mark.has_standbys() {
        return Ok(());
    }
    let doubt = |error| failed(DOING, error);
    let backend = match session.backend() {
        Some(backend) => Some(backend),
        // The server process of a pooler may serve other clients before a clean-up.
        None if session.is_transactional() => None,
        None => Some(connection::identify(session).await.map_err(doubt)?),
    };
    let waiting = Waiting { core: Some(core.clone()), backend };
    // A transaction id alone does not make a commit wait; a record in the write-ahead log does.
    sqlx::query("SELECT pg_logical_emit_message(true, 'storied', '')")
        .persistent(core.connections.persistent())
        .execute(&mut **session)
        .await
        .map_err(doubt)?;
    waiting.ended();
    Ok(())
}

/// Runs `call`, which confirms durability, and detects a cancelled wait by the server's warning.
///
/// # Errors
/// Those of `call`, and `Unavailable` if a wait was cancelled.
pub(super) async fn uncancelled<T>(
    core: &PgInner,
    call: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    if !core.high_water_mark.has_standbys() {
        return call.await;
    }
    match notices::watch(call).await {
        (_, true) => Err(cancelled()),
        (result, false) => result,
    }
}

/// Returns the error of a cancelled wait for a standby.
pub(super) fn cancelled() -> StoreError {
    let reason = format!("{DOING}: the wait for a synchronous standby was cancelled on the server");
    StoreError::Unavailable { reason, source: None }
}

/// A confirmation in flight.
///
/// If it is dropped before its end, it terminates the waiting server process. That process has
/// written no data that could be lost. Without the termination, such processes would accumulate
/// during an outage of the standby.
struct Waiting {
    core: Option<Arc<PgInner>>,
    backend: Option<Backend>,
}

impl Waiting {
    fn ended(mut self) {
        self.core = None;
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let (Some(core), Some(backend)) = (self.core.take(), self.backend) else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(async move {
            if let Err(error) = core.timed_call(DOING, end(&core, backend)).await {
                tracing::debug!(%error, "could not terminate a server process that waits for a standby");
            }
        });
    }
}

async fn end(core: &Arc<PgInner>, backend: Backend) -> Result<(), StoreError> {
    let mut session = core.connections.get(DOING).await?;
    sqlx::query(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
         WHERE pid = $1 AND (extract(epoch FROM backend_start) * 1000000)::bigint = $2 AND wait_event = 'SyncRep'",
    )
    .bind(backend.pid)
    .bind(backend.started)
    .persistent(core.connections.persistent())
    .execute(&mut *session)
    .await
    .map_err(|error| failed(DOING, error))?;
    session.finish(DOING).await
}

/// Confirms that all data visible before the call is durable.
pub(super) async fn confirm_all(core: &Arc<PgInner>) -> Result<(), StoreError> {
    if !core.high_water_mark.has_standbys() {
        return Ok(());
    }
    let limit = core.connections.patience.acquire * 2;
    let confirmed = async {
        let mut session = core.connections.get(DOING).await?;
        confirm(core, &mut session).await?;
        session.finish(DOING).await
    };
    let confirmed = uncancelled(core, confirmed);
    tokio::time::timeout(limit, confirmed).await.unwrap_or_else(|_| Err(unconfirmed(limit)))
}

impl PgInner {
    /// Runs a call that commits, like [`timed_call`](Self::timed_call); its result is durable.
    pub(super) async fn commit_call<T, E: From<StoreError>>(
        self: &Arc<Self>,
        doing: &str,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let (result, cancelled) = self.watched(self.timed_call(doing, call)).await;
        if cancelled && result.is_ok() {
            confirm_all(self).await?;
        }
        result
    }
}

/// Returns the error of a confirmation that did not arrive in time.
pub(super) fn unconfirmed(limit: Duration) -> StoreError {
    StoreError::Unavailable {
        reason: format!(
            "{DOING}: no synchronous standby has confirmed the commit within {limit:?}; check the standbys"
        ),
        source: None,
    }
}
