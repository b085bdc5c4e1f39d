//! Tables of the progress of projections.

use std::convert::identity;

use sqlx::postgres::{PgConnection, PgRow};

use super::super::sql::{Progress, session};
use super::error::failed;
use super::statements::Schema;

session!(PgConnection, PgRow, failed, identity);

const NOW: &str = "clock_timestamp()";

/// Returns the progress in the schema of an event store.
pub(super) fn of_store(schema: &Schema, persistent: bool) -> Progress {
    Progress::new(|sql| schema.text(sql), NOW, "true", persistent)
}

/// Returns the progress in the schema of a read model; checkpoints move only if `begun` holds.
pub(crate) fn of_read_model(schema: &Schema, begun: &str) -> Progress {
    Progress::new(|sql| schema.text(sql), NOW, begun, true)
}
