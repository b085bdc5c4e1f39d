//! Leases.

use std::time::Duration;

use sqlx::sqlite::{SqliteConnection, SqliteRow};
use uuid::Uuid;

use super::super::columns::Columns;
use super::super::{Lease, LeaseInfo, StoreError};
use super::convert::{now, to_sql};
use super::error::failed;

const LEASES: &str = "reading the leases";

/// Returns the time `ttl` from now.
///
/// All processes with the file open run on one machine, so its clock is the store's.
fn later(ttl: Duration) -> i64 {
    now().saturating_add(micros(ttl))
}

fn micros(ttl: Duration) -> i64 {
    // The limit of 1,000 years keeps every sum in the range of a time.
    const LONGEST: i64 = 1_000 * 366 * 86_400 * 1_000_000;
    i64::try_from(ttl.as_micros()).unwrap_or(LONGEST).min(LONGEST)
}

/// Returns whether the stored lease has the owner and the epoch of `lease`.
pub(super) async fn is_current(
    connection: &mut SqliteConnection,
    doing: &str,
    lease: &Lease,
) -> Result<bool, StoreError> {
    sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM storied_leases WHERE name = ? AND owner = ? AND epoch = ?)",
    )
    .bind(&lease.name)
    .bind(lease.owner)
    .bind(to_sql(lease.epoch))
    .fetch_one(connection)
    .await
    .map_err(|error| failed(doing, error))
}

pub(super) async fn acquire_lease(
    connection: &mut SqliteConnection,
    name: String,
    owner: Uuid,
    ttl: Duration,
) -> Result<Option<Lease>, StoreError> {
    sqlx::query(
        "INSERT INTO storied_leases (name, owner, epoch, expires_at, ttl) VALUES (?1, ?2, 1, ?3, ?5)
         ON CONFLICT (name) DO UPDATE
         SET owner = ?2, epoch = epoch + (owner <> ?2), expires_at = ?3, ttl = ?5
         WHERE owner = ?2 OR expires_at <= ?4
         RETURNING epoch",
    )
    .bind(name.as_str())
    .bind(owner)
    .bind(later(ttl))
    .bind(now())
    .bind(micros(ttl))
    .fetch_optional(connection)
    .await
    .and_then(|row| row.map(|row| lease(&row, &name, owner)).transpose())
    .map_err(|error| failed(&format!("acquiring the lease {name}"), error))
}

pub(super) async fn take_over_lease(
    connection: &mut SqliteConnection,
    seen: LeaseInfo,
    owner: Uuid,
    ttl: Duration,
) -> Result<Option<Lease>, StoreError> {
    sqlx::query(
        "UPDATE storied_leases SET owner = ?2, epoch = epoch + (owner <> ?2), expires_at = ?3, ttl = ?4
         WHERE name = ?1 AND epoch = ?5 AND expires_at = ?6 RETURNING epoch",
    )
    .bind(seen.lease.name.as_str())
    .bind(owner)
    .bind(later(ttl))
    .bind(micros(ttl))
    .bind(to_sql(seen.lease.epoch))
    .bind(seen.expires_at.timestamp_micros())
    .fetch_optional(connection)
    .await
    .and_then(|row| row.map(|row| lease(&row, &seen.lease.name, owner)).transpose())
    .map_err(|error| failed(&format!("taking over the lease {}", seen.lease.name), error))
}

/// Returns the lease `name` of `owner` with the epoch that a statement returned.
fn lease(row: &SqliteRow, name: &str, owner: Uuid) -> Result<Lease, sqlx::Error> {
    Ok(Lease { name: name.to_owned(), owner, epoch: Columns::of("storied_leases", row).number(0)? })
}

pub(super) async fn renew_lease(
    connection: &mut SqliteConnection,
    lease: &Lease,
    ttl: Duration,
) -> Result<bool, StoreError> {
    set_expiry(connection, lease, later(ttl), Some(ttl), "renewing").await
}

pub(super) async fn release_lease(
    connection: &mut SqliteConnection,
    lease: &Lease,
) -> Result<(), StoreError> {
    set_expiry(connection, lease, 0, None, "releasing").await.map(drop)
}

/// Changes the expiry of a lease that `lease` still describes and that was not released.
async fn set_expiry(
    connection: &mut SqliteConnection,
    lease: &Lease,
    expires_at: i64,
    ttl: Option<Duration>,
    doing: &str,
) -> Result<bool, StoreError> {
    let changed = sqlx::query(
        "UPDATE storied_leases SET expires_at = ?, ttl = coalesce(?, ttl)
         WHERE name = ? AND owner = ? AND epoch = ? AND expires_at > 0",
    )
    .bind(expires_at)
    .bind(ttl.map(micros))
    .bind(lease.name.as_str())
    .bind(lease.owner)
    .bind(to_sql(lease.epoch))
    .execute(connection)
    .await
    .map_err(|error| failed(&format!("{doing} the lease {}", lease.name), error))?;
    Ok(changed.rows_affected() > 0)
}

pub(super) async fn leases(connection: &mut SqliteConnection) -> Result<Vec<LeaseInfo>, StoreError> {
    let now = now();
    let info = |row: SqliteRow| -> Result<_, sqlx::Error> {
        let row = Columns::of("storied_leases", &row);
        let expires_at = row.time(3)?;
        let lease = Lease { name: row.get(0)?, owner: row.get(1)?, epoch: row.number(2)? };
        let ttl = Duration::from_micros(row.number(4)?);
        Ok(LeaseInfo { lease, expires_at, ttl, live: expires_at.timestamp_micros() > now })
    };
    sqlx::query("SELECT name, owner, epoch, expires_at, ttl FROM storied_leases ORDER BY name")
        .fetch_all(connection)
        .await
        .and_then(|rows| rows.into_iter().map(info).collect())
        .map_err(|error| failed(LEASES, error))
}
