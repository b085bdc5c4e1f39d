//! Decides that a commit is durable (I3), for every answer that rests on a read instead of an own commit.
//!
//! A commit that waits for a synchronous standby is invisible to other sessions. If the wait is cancelled, or its server
//! process ends, the commit becomes visible although no standby has it: visible on the primary does not mean durable. The
//! write-ahead log is replicated in its order. So a transaction that writes to it afterwards, and whose commit was
//! confirmed, proves that everything is replicated that was visible when it began.

use std::sync::Arc;
use std::time::Duration;

use super::super::StoreError;
use super::connection::{Backend, Session};
use super::error::failed;
use super::{Core, connection, notices};

const DOING: &str = "confirming that a commit is durable";

/// Confirms that everything is durable that `session` has read. In an explicit transaction, its commit completes the proof:
/// the caller answers only after that.
///
/// Without synchronous standbys this does nothing. With them it costs one transaction, and waits for them.
///
/// # Errors
/// `Unavailable` if the server cannot be asked. A standby that does not answer is waited for: the caller bounds the wait.
pub(super) async fn confirm(core: &Arc<Core>, session: &mut Session) -> Result<(), StoreError> {
    if !core.frontier.has_standbys() {
        return Ok(());
    }
    let doubt = |error| failed(DOING, error);
    let backend = match session.backend() {
        Some(backend) => Some(backend),
        // A pooler's server process may serve others by the time of a clean-up.
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

/// Runs `call`, which confirms something. A warning of the server beside its answers says that a wait was cancelled.
///
/// # Errors
/// Those of `call`, and `Unavailable` when a wait was cancelled.
pub(super) async fn uncancelled<T>(
    core: &Core,
    call: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    if !core.frontier.has_standbys() {
        return call.await;
    }
    match notices::watch(call).await {
        (_, true) => Err(cancelled()),
        (result, false) => result,
    }
}

/// The wait for a standby was cancelled.
pub(super) fn cancelled() -> StoreError {
    let reason = format!("{DOING}: the wait for a synchronous standby was cancelled on the server");
    StoreError::Unavailable { reason, source: None }
}

/// A confirmation under way. Dropped before its end, it ends the server process that waits in it, which has written nothing
/// that anybody could lose: during an outage of the standby, these processes would add up.
struct Waiting {
    core: Option<Arc<Core>>,
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
                tracing::debug!(%error, "a server process that waits for a standby could not be ended");
            }
        });
    }
}

async fn end(core: &Arc<Core>, backend: Backend) -> Result<(), StoreError> {
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

/// Confirms that everything is durable that was visible before the call.
pub(super) async fn confirm_all(core: &Arc<Core>) -> Result<(), StoreError> {
    if !core.frontier.has_standbys() {
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

/// No standby has confirmed in time.
pub(super) fn unconfirmed(limit: Duration) -> StoreError {
    StoreError::Unavailable {
        reason: format!(
            "{DOING}: no synchronous standby has confirmed it within {limit:?}; check the standbys"
        ),
        source: None,
    }
}
