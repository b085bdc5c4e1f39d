//! Leases.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::super::columns::Columns;
use super::super::{Lease, LeaseInfo, StoreError};
use super::convert::{micros, to_sql};
use super::error::failed;
use super::inner::PgInner;

pub(super) async fn acquire_lease(
    core: &Arc<PgInner>,
    name: &str,
    owner: Uuid,
    ttl: Duration,
) -> Result<Option<Lease>, StoreError> {
    let doing = format!("acquiring the lease {name}");
    let mut session = core.connections.get(&doing).await?;
    let row = sqlx::query(core.sql.acquire_lease.clone())
        .bind(name)
        .bind(owner)
        .bind(micros(ttl))
        .persistent(core.connections.persistent())
        .fetch_optional(&mut *session)
        .await
        .map_err(|error| failed(&doing, error))?;
    session.finish(&doing).await?;
    row.map(|row| lease(&row, name, owner)).transpose().map_err(|error| failed(&doing, error))
}

pub(super) async fn take_over_lease(
    core: &Arc<PgInner>,
    seen: &LeaseInfo,
    owner: Uuid,
    ttl: Duration,
) -> Result<Option<Lease>, StoreError> {
    let name = &seen.lease.name;
    let doing = format!("taking over the lease {name}");
    let mut session = core.connections.get(&doing).await?;
    let row = sqlx::query(core.sql.take_over_lease.clone())
        .bind(name.as_str())
        .bind(owner)
        .bind(micros(ttl))
        .bind(to_sql(seen.lease.epoch))
        .bind(seen.expires_at)
        .persistent(core.connections.persistent())
        .fetch_optional(&mut *session)
        .await
        .map_err(|error| failed(&doing, error))?;
    session.finish(&doing).await?;
    row.map(|row| lease(&row, name, owner)).transpose().map_err(|error| failed(&doing, error))
}

/// Returns the lease `name` of `owner` with the epoch that a statement returned.
fn lease(row: &PgRow, name: &str, owner: Uuid) -> Result<Lease, sqlx::Error> {
    Ok(Lease { name: name.to_owned(), owner, epoch: Columns::of("leases", row).number(0)? })
}

pub(super) async fn renew_leases(
    core: &Arc<PgInner>,
    leases: &[Lease],
    ttl: Duration,
) -> Result<Vec<bool>, StoreError> {
    const DOING: &str = "renewing leases";
    let key = |lease: &Lease| (lease.name.clone(), lease.owner, to_sql(lease.epoch));
    let (mut names, mut owners, mut epochs) = (Vec::new(), Vec::new(), Vec::new());
    for (name, owner, epoch) in leases.iter().map(key) {
        names.push(name);
        owners.push(owner);
        epochs.push(epoch);
    }
    let mut session = core.connections.get(DOING).await?;
    let renewed: Vec<(String, Uuid, i64)> = sqlx::query_as(core.sql.renew_leases.clone())
        .bind(names)
        .bind(owners)
        .bind(epochs)
        .bind(micros(ttl))
        .persistent(core.connections.persistent())
        .fetch_all(&mut *session)
        .await
        .map_err(|error| failed(DOING, error))?;
    session.finish(DOING).await?;
    let renewed: HashSet<_> = renewed.into_iter().collect();
    Ok(leases.iter().map(|lease| renewed.contains(&key(lease))).collect())
}

pub(super) async fn release_lease(core: &Arc<PgInner>, lease: &Lease) -> Result<(), StoreError> {
    let doing = format!("releasing the lease {}", lease.name);
    let mut session = core.connections.get(&doing).await?;
    sqlx::query(core.sql.release_lease.clone())
        .bind(lease.name.as_str())
        .bind(lease.owner)
        .bind(to_sql(lease.epoch))
        .persistent(core.connections.persistent())
        .execute(&mut *session)
        .await
        .map_err(|error| failed(&doing, error))?;
    session.finish(&doing).await
}

pub(super) async fn leases(core: &Arc<PgInner>) -> Result<Vec<LeaseInfo>, StoreError> {
    const DOING: &str = "reading the leases";
    let info = |row: PgRow| -> Result<_, sqlx::Error> {
        let row = Columns::of("leases", &row);
        let lease = Lease { name: row.get(0)?, owner: row.get(1)?, epoch: row.number(2)? };
        let ttl = Duration::from_micros(row.number(5)?);
        Ok(LeaseInfo { lease, expires_at: row.time(3)?, ttl, live: row.get(4)? })
    };
    let mut session = core.connections.get(DOING).await?;
    let leases = sqlx::query(core.sql.leases.clone())
        .persistent(core.connections.persistent())
        .fetch_all(&mut *session)
        .await
        .and_then(|rows| rows.into_iter().map(info).collect())
        .map_err(|error| failed(DOING, error))?;
    session.finish(DOING).await?;
    Ok(leases)
}
