//! Pauses of projections.

use std::collections::BTreeSet;

use sqlx::sqlite::SqliteConnection;

use super::super::StoreError;
use super::error::failed;

pub(super) async fn paused(connection: &mut SqliteConnection) -> Result<BTreeSet<String>, StoreError> {
    let names: Vec<String> = sqlx::query_scalar("SELECT name FROM storied_paused")
        .fetch_all(connection)
        .await
        .map_err(|error| failed("reading the paused projections", error))?;
    Ok(names.into_iter().collect())
}

pub(super) async fn set_paused(
    connection: &mut SqliteConnection,
    name: &str,
    paused: bool,
) -> Result<(), StoreError> {
    sqlx::query(if paused {
        "INSERT OR IGNORE INTO storied_paused (name) VALUES (?)"
    } else {
        "DELETE FROM storied_paused WHERE name = ?"
    })
    .bind(name)
    .execute(connection)
    .await
    .map_err(|error| failed(&format!("pausing or resuming {name}"), error))?;
    Ok(())
}
