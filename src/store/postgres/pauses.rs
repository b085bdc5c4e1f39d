//! Pauses of projections.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::super::StoreError;
use super::error::failed;
use super::inner::PgInner;

pub(super) async fn paused(core: &Arc<PgInner>) -> Result<BTreeSet<String>, StoreError> {
    const DOING: &str = "reading the paused projections";
    let mut session = core.connections.get(DOING).await?;
    let paused: Vec<String> = sqlx::query_scalar(core.sql.paused.clone())
        .persistent(core.connections.persistent())
        .fetch_all(&mut *session)
        .await
        .map_err(|error| failed(DOING, error))?;
    session.finish(DOING).await?;
    Ok(paused.into_iter().collect())
}

pub(super) async fn set_paused(core: &Arc<PgInner>, name: &str, paused: bool) -> Result<(), StoreError> {
    let doing = format!("pausing or resuming {name}");
    let mut session = core.connections.get(&doing).await?;
    sqlx::query(if paused { core.sql.pause.clone() } else { core.sql.resume.clone() })
        .bind(name)
        .persistent(core.connections.persistent())
        .execute(&mut *session)
        .await
        .map_err(|error| failed(&doing, error))?;
    session.finish(&doing).await
}
