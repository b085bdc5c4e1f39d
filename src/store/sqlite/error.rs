//! Maps the errors of SQLite to errors of the store.

use std::borrow::Cow;
use std::error::Error;

use sqlx::error::{BoxDynError, DatabaseError};
use sqlx::sqlite::SqliteError;

use super::super::StoreError;
use super::super::columns::database_code;

/// Returns whether an error comes from the database or concurrent work, not from the statement.
///
/// `false` for errors of other origin.
pub(crate) fn is_outage(error: &(dyn Error + 'static)) -> bool {
    use sqlx::Error::{Io, PoolClosed, PoolTimedOut, WorkerCrashed};
    let database = match error.downcast_ref::<sqlx::Error>() {
        Some(Io(_) | PoolTimedOut | PoolClosed | WorkerCrashed) => return true,
        Some(error) => error.as_database_error(),
        // The source of sqlx::Error::Database, which remains in an error that passes on only its
        // causes.
        None => error.downcast_ref::<Box<dyn DatabaseError>>().map(|error| &**error),
    };
    database.and_then(|error| error.try_downcast_ref::<SqliteError>()).is_some_and(|error| {
        // BUSY, LOCKED, READONLY, IOERR and FULL; the low byte is the class:
        // https://www.sqlite.org/rescode.html.
        let code = error.code().and_then(|code| code.parse::<u32>().ok());
        code.is_some_and(|code| matches!(code & 0xff, 5 | 6 | 8 | 10 | 13))
    })
}

/// Returns whether an earlier statement of the same transaction may have caused the error: `PRAGMA
/// query_only` makes the connection read-only.
pub(crate) fn may_be_of_transaction(error: &(dyn Error + 'static)) -> bool {
    let code = database_code(error);
    code.and_then(|code| code.parse::<u32>().ok()).is_some_and(|code| code & 0xff == 8)
}

/// Converts an error that occurred while `doing` something.
pub(crate) fn failed(doing: &str, error: sqlx::Error) -> StoreError {
    match &error {
        sqlx::Error::Database(database) => by_code(doing, &database.code(), database.message(), &error)
            .unwrap_or_else(|reason| reason.into_error(error)),
        sqlx::Error::PoolTimedOut => {
            StoreError::unavailable(format!("{doing}: no connection of the pool became free in time"), error)
        }
        sqlx::Error::PoolClosed | sqlx::Error::WorkerCrashed => {
            StoreError::unavailable(format!("{doing}: the connection is closed"), error)
        }
        sqlx::Error::Decode(_) | sqlx::Error::ColumnDecode { .. } => {
            StoreError::Corrupt { reason: format!("{doing}: {error}") }
        }
        sqlx::Error::Encode(_) => StoreError::Invalid { reason: format!("{doing}: {error}") },
        _ => StoreError::storage(format!("{doing}: {error}"), error),
    }
}

/// Converts an error in encoding a parameter.
pub(super) fn encoding(doing: &str, error: BoxDynError) -> StoreError {
    failed(doing, sqlx::Error::Encode(error))
}

/// Returns whether a unique key or a primary key refused a row: SQLITE_CONSTRAINT_UNIQUE and
/// SQLITE_CONSTRAINT_PRIMARYKEY.
pub(super) fn is_key_violation(error: &sqlx::Error) -> bool {
    database_code(error).is_some_and(|code| ["2067", "1555"].contains(&&*code))
}

/// Returns whether `storied_expected_events` refused an event that the log does not contain:
/// SQLITE_CONSTRAINT_TRIGGER with the text of the trigger.
pub(super) fn is_missing_anchor(error: &sqlx::Error) -> bool {
    let text = "the log does not contain the expected event";
    database_code(error).is_some_and(|code| code == "1811")
        && error.as_database_error().is_some_and(|error| error.message() == text)
}

/// An error that carries the driver's error.
enum Reason {
    Unavailable(String),
    Storage(String),
}

impl Reason {
    fn into_error(self, source: sqlx::Error) -> StoreError {
        match self {
            Reason::Unavailable(reason) => StoreError::unavailable(reason, source),
            Reason::Storage(reason) => StoreError::storage(reason, source),
        }
    }
}

fn by_code(
    doing: &str,
    code: &Option<Cow<'_, str>>,
    message: &str,
    error: &sqlx::Error,
) -> Result<StoreError, Reason> {
    let code: u32 = code.as_deref().and_then(|code| code.parse().ok()).unwrap_or(1);
    // https://www.sqlite.org/rescode.html; the low byte is the class.
    match code & 0xff {
        // BUSY, LOCKED
        5 | 6 => Err(Reason::Unavailable(format!(
            "{doing}: another process or transaction holds the database ({message})"
        ))),
        // NOMEM, INTERRUPT
        7 | 9 => Err(Reason::Unavailable(format!("{doing}: {message}"))),
        // READONLY
        8 => Err(Reason::Storage(format!(
            "{doing}: the file or its directory is read-only ({message}); give this program the right to write both"
        ))),
        // IOERR
        10 => Err(Reason::Storage(format!(
            "{doing}: the disk failed ({message}, code {code}); check it and its free space"
        ))),
        // FULL
        13 => Err(Reason::Storage(format!(
            "{doing}: the disk is full ({message}); free some space, then retry"
        ))),
        // CANTOPEN
        14 => Err(Reason::Storage(format!(
            "{doing}: {message}; check that the directory exists and that this program may write there"
        ))),
        // PERM, AUTH
        3 | 23 => Err(Reason::Storage(format!("{doing}: access denied ({message})"))),
        // CORRUPT
        11 => {
            Ok(StoreError::Corrupt { reason: format!("{doing}: {message}; restore the file from a backup") })
        }
        // TOOBIG, CONSTRAINT, MISMATCH
        18..=20 => Ok(StoreError::Invalid { reason: format!("{doing}: {message}") }),
        // NOTADB
        26 => Ok(StoreError::Incompatible {
            expected: "a SQLite database".into(),
            found: format!("another file ({message})"),
            advice: "check the path".into(),
        }),
        _ if message.starts_with("no such table: storied_") || message.starts_with("no such column") => {
            Ok(StoreError::Misconfigured {
                expected: "storied's tables".into(),
                found: message.to_owned(),
                advice: "run storied's migrations on this database".into(),
            })
        }
        _ => Err(Reason::Storage(format!("{doing}: {error}"))),
    }
}

/// Returns whether a commit failed because the file could not be synced.
///
/// Its frames are then in the write-ahead log. A crash may restore them, although no reader sees
/// them now. The codes are SQLITE_IOERR_FSYNC and SQLITE_IOERR_DIR_FSYNC.
pub(super) fn is_sync_failure(error: &StoreError) -> bool {
    let StoreError::Storage { source: Some(source), .. } = error else { return false };
    let code = source.downcast_ref::<sqlx::Error>().and_then(|error| error.as_database_error()?.code());
    code.is_some_and(|code| ["1034", "1290"].contains(&&*code))
}
