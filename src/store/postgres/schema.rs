//! Prepares a database for a store: migrations, identity, and the checks for a safe log.

mod checks;
mod identity;
mod index;
mod migrations;

use std::sync::Arc;

use sqlx::postgres::PgConnection;
use uuid::Uuid;

use self::checks::{CHECKING, check_database, check_log, check_server};
pub(crate) use self::identity::database_of;
use self::identity::identity;
use self::index::{index, is_indexed_by_name};
use self::migrations::{MIGRATING, Set, migrate};
use super::super::{Adoption, StoreError};
use super::connection::Connections;
use super::statements::Schema;
use crate::codec::Codec;

/// The facts about an opened event store.
pub(super) struct Prepared {
    pub(super) id: Uuid,
    pub(super) adoption: Adoption,
    /// Whether the log has an index by name.
    pub(super) indexed_by_name: bool,
}

/// Makes the schema an event store if it is not one yet, and checks that it is safe.
pub(super) async fn prepare(
    connections: &Arc<Connections>,
    schema: &Schema,
    codec: Codec,
    may_migrate: bool,
    index_by_name: bool,
) -> Result<Prepared, StoreError> {
    let mut session = connections.get(CHECKING).await?;
    check_server(&mut session).await?;
    check_database(&mut session, schema).await?;
    let mut current = true;
    for set in Set::all() {
        current &= set.is_current(&mut session, schema).await?;
    }
    session.finish(CHECKING).await?;
    if !current {
        if !may_migrate {
            return Err(StoreError::Incompatible {
                expected: format!("storied's tables in schema {} in this program's version", schema.name()),
                found: "no tables, or older ones".into(),
                advice: "run a program that may migrate (PostgresOptions::migrate), with a login that may create tables"
                    .into(),
            });
        }
        let mut session = connections.acquire(MIGRATING).await?;
        migrate(&mut session, schema, &Set::all(), Some(codec), !connections.persistent()).await?;
        if connections.persistent() {
            session.finish(MIGRATING).await?;
        }
    }
    let mut session = connections.get(CHECKING).await?;
    check_log(&mut session, schema).await?;
    let (id, adoption) = identity(&mut session, schema, codec).await?;
    let mut indexed = is_indexed_by_name(&mut session, schema).await?;
    session.finish(CHECKING).await?;
    if index_by_name && !indexed {
        index(connections, schema, may_migrate).await?;
        indexed = true;
    }
    Ok(Prepared { id, adoption, indexed_by_name: indexed })
}

/// Creates the tables for checkpoints and parked events if needed, in any database.
pub(crate) async fn prepare_read_model(
    connection: &mut PgConnection,
    schema: &Schema,
) -> Result<(), StoreError> {
    check_database(connection, schema).await?;
    let set = Set::progress();
    if set.is_current(connection, schema).await? {
        return Ok(());
    }
    migrate(connection, schema, &[set], None, false).await
}
