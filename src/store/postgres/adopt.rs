//! Adoption of a copied or moved store.

use std::sync::Arc;

use uuid::Uuid;

use super::super::{Adopt, StoreError};
use super::error::failed;
use super::inner::PgInner;

pub(super) const ADOPTING: &str = "adopting the event store";

/// Makes the current database the store's own.
pub(super) async fn adopt(core: &Arc<PgInner>, adopt: Adopt) -> Result<Uuid, StoreError> {
    let adopting = |error| failed(ADOPTING, error);
    let persistent = core.connections.persistent();
    let mut session = core.connections.begin(ADOPTING).await?;
    let query = |sql: &sqlx::SqlStr| sqlx::query(sql.clone()).persistent(persistent);
    let sql = &core.sql;
    query(&sql.record_home).execute(&mut *session).await.map_err(adopting)?;
    let old = core.info.id;
    let id = match adopt {
        Adopt::Moved => old,
        Adopt::Copy => {
            let new = Uuid::new_v4();
            query(&sql.new_identity).bind(new.to_string()).execute(&mut *session).await.map_err(adopting)?;
            query(&sql.disown_publisher).execute(&mut *session).await.map_err(adopting)?;
            query(&sql.own_projections).bind(old).bind(new).execute(&mut *session).await.map_err(adopting)?;
            query(&sql.own_checkpoints).bind(old).bind(new).execute(&mut *session).await.map_err(adopting)?;
            query(&sql.free_leases).execute(&mut *session).await.map_err(adopting)?;
            new
        }
    };
    session.finish(ADOPTING).await?;
    Ok(id)
}
