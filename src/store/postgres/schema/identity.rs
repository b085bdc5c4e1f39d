//! The identity of the store, and the database and schema that are its home.

use std::collections::HashMap;
use std::fmt;

use sqlx::Row;
use sqlx::postgres::PgConnection;
use uuid::Uuid;

use super::super::error::failed;
use super::super::statements::Schema;
use super::checks::CHECKING;
use crate::codec::Codec;
use crate::store::{Adoption, Home, StoreError};

/// Returns the identity of the store, created with its tables, and whether this database is its
/// home.
pub(super) async fn identity(
    connection: &mut PgConnection,
    schema: &Schema,
    codec: Codec,
) -> Result<(Uuid, Adoption), StoreError> {
    let found = home_of(connection, schema).await?;
    let meta: HashMap<String, String> = sqlx::query(schema.text("SELECT key, value FROM storied.meta"))
        .persistent(false)
        .fetch_all(connection)
        .await
        .and_then(|rows| rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect())
        .map_err(|error| failed(CHECKING, error))?;
    let value = |key: &str| {
        meta.get(key)
            .map(String::as_str)
            .ok_or_else(|| StoreError::Corrupt { reason: format!("{}.meta has no {key}", schema.name()) })
    };
    let database = Database::of(value("server")?, value("database_oid")?, value("database")?);
    let recorded = database.home(value("schema_oid")?, value("schema")?);
    let adoption = Adoption::of(recorded, found);
    let found = value("codec")?;
    if Codec::from_name(found) != Some(codec) {
        return Err(StoreError::Incompatible {
            expected: format!("an event store with {codec} payloads"),
            found: format!("an event store with {found} payloads"),
            advice: "open it with the codec of its creation (PostgresOptions::codec), or use another schema"
                .into(),
        });
    }
    let id = value("store_id")?;
    let id = id.parse().map_err(|error| StoreError::Corrupt {
        reason: format!("{}.meta has the store id {id:?}: {error}", schema.name()),
    })?;
    Ok((id, adoption))
}

/// A database of a server.
pub(crate) struct Database {
    /// System identifier and object id.
    ///
    /// Both survive a failover to a streaming standby and a renaming. A copy made by the server or
    /// by `pg_restore` never has both.
    identity: String,
    /// Display form, such as `database shop (16384) of server 7312…`.
    shown: String,
}

impl Database {
    fn of(server: &str, oid: &str, name: &str) -> Self {
        Self {
            identity: format!("{server} {oid}"),
            shown: format!("database {name} ({oid}) of server {server}"),
        }
    }

    /// Returns the home of a store in this database.
    ///
    /// The object id of its schema survives a renaming; a copy made by `pg_restore` never has it.
    fn home(&self, oid: &str, name: &str) -> Home {
        Home {
            identity: format!("{} {oid}", self.identity),
            shown: format!("schema {name} ({oid}) in {}", self.shown),
        }
    }

    /// Returns whether the home of the store is in this database.
    pub(crate) fn holds(&self, home: &Home) -> bool {
        home.identity.rsplit_once(' ').is_some_and(|(database, _)| database == self.identity)
    }
}

impl fmt::Display for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

/// Returns the database of a connection.
pub(crate) async fn database_of(connection: &mut PgConnection) -> Result<Database, StoreError> {
    let (server, oid, name): (String, String, String) = sqlx::query_as(
        "SELECT system_identifier::text, oid::text, datname::text FROM pg_control_system(), pg_database
         WHERE datname = current_database()",
    )
    .persistent(false)
    .fetch_one(connection)
    .await
    .map_err(|error| failed(CHECKING, error))?;
    Ok(Database::of(&server, &oid, &name))
}

/// Returns the home of the store in `schema`.
async fn home_of(connection: &mut PgConnection, schema: &Schema) -> Result<Home, StoreError> {
    let database = database_of(connection).await?;
    let oid: String = sqlx::query_scalar(
        schema
            .text("SELECT relnamespace::text FROM pg_catalog.pg_class WHERE oid = 'storied.meta'::regclass"),
    )
    .persistent(false)
    .fetch_one(connection)
    .await
    .map_err(|error| failed(CHECKING, error))?;
    Ok(database.home(&oid, schema.name()))
}
