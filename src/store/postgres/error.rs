//! Maps the errors of PostgreSQL to errors of the store.

use std::error::Error;

use sqlx::error::DatabaseError;
use sqlx::postgres::{PgDatabaseError, PgSeverity};

use super::super::StoreError;
use super::super::columns::database_code;

/// The outcome of a failed statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ErrorClass {
    /// Unknown, possibly committed: the connection broke, or the server ended the session.
    Unknown,
    /// Rolled back by the server because of concurrent transactions; a retry may succeed.
    Retry,
    /// Rejected because of its content.
    Refused,
    /// Rolled back because of the state of the server.
    Failed,
}

/// SQLSTATE of `storied.append()`: another transaction was faster than a part of a larger append.
const OVERTAKEN: &str = "ST001";
/// SQLSTATE of storied: the settings of the server or session make the log unsafe.
const UNSAFE: &str = "ST002";
/// SQLSTATE of `storied.append()`: the sequence of positions is below the last event.
const SET_BACK: &str = "ST003";

pub(crate) fn class_of(error: &sqlx::Error) -> ErrorClass {
    let database = match error {
        sqlx::Error::Database(error) => error,
        sqlx::Error::Encode(_) | sqlx::Error::Configuration(_) => return ErrorClass::Refused,
        _ => return ErrorClass::Unknown,
    };
    verdict_of(&**database)
}

fn verdict_of(database: &dyn DatabaseError) -> ErrorClass {
    let severity = database.try_downcast_ref::<PgDatabaseError>().map(PgDatabaseError::severity);
    if matches!(severity, Some(PgSeverity::Fatal | PgSeverity::Panic)) {
        // The session ended. The transaction may be committed: a session can end between commit and
        // answer.
        return ErrorClass::Unknown;
    }
    match database.code().as_deref().unwrap_or_default() {
        OVERTAKEN => ErrorClass::Retry,
        UNSAFE | SET_BACK => ErrorClass::Failed,
        // A pooler reports that it lost its own connection to the server.
        code if code.starts_with("08") => ErrorClass::Unknown,
        // Transaction rollbacks: serialization failure, deadlock.
        code if code.starts_with("40") => ErrorClass::Retry,
        // An unavailable lock, a cancelled or timed-out statement, or a log without a free
        // position.
        "55P03" | "57014" | "2200H" => ErrorClass::Failed,
        code if ["28", "3D", "53", "57", "58", "25", "42"].iter().any(|class| code.starts_with(class)) => {
            ErrorClass::Failed
        }
        _ if database.try_downcast_ref().is_some_and(is_stale_session) => ErrorClass::Retry,
        _ => ErrorClass::Refused,
    }
}

/// Returns whether an error comes from the server or concurrent work, not from the statement.
///
/// `false` for errors of other origin.
pub(crate) fn is_outage(error: &(dyn Error + 'static)) -> bool {
    // The source of sqlx::Error::Database, which remains in an error that passes on only its
    // causes.
    if let Some(database) = error.downcast_ref::<Box<dyn DatabaseError>>() {
        return database.try_downcast_ref().is_some_and(is_outage_of);
    }
    let Some(error) = error.downcast_ref::<sqlx::Error>() else { return false };
    if let Some(database) = error.as_database_error() {
        return database.try_downcast_ref().is_some_and(is_outage_of);
    }
    let mistake =
        matches!(
            error,
            sqlx::Error::RowNotFound | sqlx::Error::ColumnNotFound(_) | sqlx::Error::TypeNotFound { .. }
        ) || matches!(error, sqlx::Error::ColumnIndexOutOfBounds { .. } | sqlx::Error::ColumnDecode { .. })
            || matches!(error, sqlx::Error::Decode(_));
    !mistake && class_of(error) != ErrorClass::Refused
}

fn is_outage_of(database: &PgDatabaseError) -> bool {
    let code = database.code();
    // A standby, or a server that is read-only for now.
    if is_stale_session(database) || code == "25006" {
        return true;
    }
    // A missing table or right stays missing: the error has to reach the author of the statement.
    let lasting = ["42", "25", "28", "3D"].iter().any(|class| code.starts_with(class));
    !lasting && verdict_of(database) != ErrorClass::Refused
}

/// Returns whether only this connection is affected: its plan or prepared statement is stale.
///
/// The same statement succeeds on a new connection.
fn is_stale_session(database: &PgDatabaseError) -> bool {
    match database.code() {
        // "cached plan must not change result type", in any language of the server.
        "0A000" => database.routine() == Some("RevalidateCachedQuery"),
        // A prepared statement is missing or already exists: an intermediary has exchanged
        // sessions.
        "26000" | "42P05" => true,
        _ => false,
    }
}

/// Returns whether an earlier statement of the same transaction may have caused the error.
pub(crate) fn may_be_of_transaction(error: &(dyn Error + 'static)) -> bool {
    let code = database_code(error);
    // The transaction failed, or is read-only, or its role or its path is another.
    matches!(code.as_deref(), Some("25P02" | "25006" | "42501" | "42P01"))
}

/// Returns whether the error is [`OVERTAKEN`], which is not a failure.
pub(crate) fn is_version_race(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|error| error.code().as_deref() == Some(OVERTAKEN))
}

/// Returns whether an append drew the position of another event.
pub(crate) fn is_position_taken(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|error| error.constraint() == Some("storied_events_position"))
}

/// The error of an append whose sequence of positions was set back.
pub(crate) fn set_back(doing: &str, message: &str) -> StoreError {
    StoreError::Misconfigured {
        expected: "the sequence of positions at the last event or higher".into(),
        found: format!("{message} ({doing})"),
        advice: "a copy, restore or replication has not advanced the sequence: stop all writers and, in the schema of the store, SELECT setval('positions', (SELECT max(position) FROM events))".into(),
    }
}

/// As [`failed`], for a write that a caller repeats under the same id.
///
/// `OutcomeUnknown` if the write may have taken effect.
pub(super) fn failed_write(doing: &str, error: sqlx::Error) -> StoreError {
    let class = class_of(&error);
    match failed(doing, error) {
        StoreError::Unavailable { reason, source } if class == ErrorClass::Unknown => {
            StoreError::OutcomeUnknown { reason, source }
        }
        other => other,
    }
}

/// Converts an error that occurred while `doing` something.
pub(crate) fn failed(doing: &str, error: sqlx::Error) -> StoreError {
    match &error {
        sqlx::Error::Database(database) => {
            let code = database.code().unwrap_or_default().into_owned();
            let message = database.message().to_owned();
            if database.try_downcast_ref::<PgDatabaseError>().is_some_and(is_stale_session) {
                return StoreError::unavailable(
                    format!("{doing}: {message}; the connection is replaced"),
                    error,
                );
            }
            by_code(doing, &code, &message, error)
        }
        sqlx::Error::Decode(_)
        | sqlx::Error::ColumnDecode { .. }
        | sqlx::Error::ColumnNotFound(_)
        | sqlx::Error::ColumnIndexOutOfBounds { .. }
        | sqlx::Error::RowNotFound => StoreError::Corrupt { reason: format!("{doing}: {error}") },
        sqlx::Error::Encode(_) | sqlx::Error::Configuration(_) => {
            StoreError::Invalid { reason: format!("{doing}: {error}") }
        }
        // Waiting fixes neither a certificate nor a server without TLS.
        sqlx::Error::Tls(_) => no_tls(doing, &error),
        sqlx::Error::Io(io) if io.kind() == std::io::ErrorKind::InvalidData => no_tls(doing, &error),
        sqlx::Error::Protocol(text) if is_other_protocol(text) => StoreError::Misconfigured {
            expected: "a PostgreSQL server".into(),
            found: format!("a server with another protocol ({doing}: {text})"),
            advice: "check host and port of the database URL".into(),
        },
        sqlx::Error::PoolTimedOut => StoreError::unavailable(
            format!("{doing}: no connection became free or could be opened in time"),
            error,
        ),
        _ => {
            StoreError::unavailable(format!("{doing}: the connection to PostgreSQL failed ({error})"), error)
        }
    }
}

/// Returns whether the first byte of a connection shows that the server is no PostgreSQL.
///
/// sqlx reads 0 if the connection was cut. 0x45 begins an error of PostgreSQL, for example that it
/// has too many clients.
fn is_other_protocol(text: &str) -> bool {
    text.contains("SSLRequest") && !["0x00", "0x45"].iter().any(|byte| text.contains(byte))
}

fn no_tls(doing: &str, error: &sqlx::Error) -> StoreError {
    StoreError::Misconfigured {
        expected: "a TLS connection as the database URL requires".into(),
        found: format!("{error} ({doing})"),
        advice: "check sslmode, sslrootcert and the host name of the URL, and the server's certificate"
            .into(),
    }
}

// https://www.postgresql.org/docs/current/errcodes-appendix.html
fn by_code(doing: &str, code: &str, message: &str, error: sqlx::Error) -> StoreError {
    let misconfigured = |expected: &str, advice: &str| StoreError::Misconfigured {
        expected: expected.into(),
        found: format!("{message} ({doing}, SQLSTATE {code})"),
        advice: advice.into(),
    };
    match code {
        UNSAFE => misconfigured(
            "a primary server and a session with synchronous_commit on and isolation level read committed",
            "change the setting, or connect to the primary",
        ),
        SET_BACK => set_back(doing, message),
        "28P01" | "28000" => misconfigured(
            "a login that PostgreSQL accepts",
            "check user name and password of the database URL, and pg_hba.conf on the server",
        ),
        "08P01" if message.contains("unsupported startup parameter") => misconfigured(
            "a connection to PostgreSQL itself, or PostgresOptions::transaction_pooler",
            "set that option if the connection goes through a pooler such as PgBouncer",
        ),
        "3D000" => {
            misconfigured("an existing database", "create it, or correct the name in the database URL")
        }
        "42P01" | "42883" | "3F000" | "42703" | "42809" => {
            misconfigured("storied's tables and functions", "run storied's migrations on this database")
        }
        "42501" => StoreError::storage(
            format!(
                "{doing}: {message}; GRANT this login the rights in docs/postgres-grants.sql, or migrate with a login that may create tables"
            ),
            error,
        ),
        "25006" => StoreError::unavailable(
            format!("{doing}: {message}; the server is a standby or set to read-only"),
            error,
        ),
        // The answers of a standby to pg_current_wal_lsn() and to BEGIN READ WRITE.
        "55000" | "0A000" => StoreError::unavailable(
            format!("{doing}: {message}; if the server is a standby in recovery, connect to the primary"),
            error,
        ),
        // The sequence of positions has an end.
        "2200H" => StoreError::storage(
            format!(
                "{doing}: the log has used all its positions ({message}); start a new store in another schema"
            ),
            error,
        ),
        "53100" => StoreError::storage(
            format!("{doing}: the server's disk is full ({message}); free some space, then retry"),
            error,
        ),
        "53300" => StoreError::unavailable(
            format!(
                "{doing}: {message}; raise the server's max_connections, or lower PostgresOptions::max_connections in each process"
            ),
            error,
        ),
        "53200" | "53400" => {
            StoreError::unavailable(format!("{doing}: the server is short of resources ({message})"), error)
        }
        "57014" => StoreError::unavailable(
            format!("{doing}: cancelled, or took longer than statement_timeout ({message})"),
            error,
        ),
        _ => match code.get(..2).unwrap_or_default() {
            "08" | "40" | "55" | "57" => StoreError::unavailable(format!("{doing}: {message}"), error),
            // Bad data, a violated constraint, too large, or refused by a trigger.
            "22" | "23" | "54" | "P0" => StoreError::Invalid { reason: format!("{doing}: {message}") },
            "58" => StoreError::storage(format!("{doing}: the server's disk failed ({message})"), error),
            "XX" if message.contains("invalid memory alloc request size") => {
                StoreError::Invalid { reason: format!("{doing}: too large for PostgreSQL ({message})") }
            }
            _ => StoreError::storage(format!("{doing}: {message} (SQLSTATE {code})"), error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_connection_is_no_other_protocol() {
        let answer = |byte| {
            let text =
                format!("unexpected response from SSLRequest: {byte} (sqlx_postgres::connection::tls:95)");
            failed("connecting", sqlx::Error::Protocol(text)).is_transient()
        };
        assert_eq!(["0x00", "0x45", "0x48", "0x49"].map(answer), [true, true, false, false]);
    }
}
