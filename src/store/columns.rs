//! Checked decoding of column values.
//!
//! A login with the documented rights can write to most tables, so no value may end a task.

use std::borrow::Cow;
use std::error::Error;
use std::fmt::Display;

use chrono::{DateTime, Datelike, Utc};
use sqlx::error::{BoxDynError, DatabaseError};
use sqlx::{Column, ColumnIndex, Decode, Row, Type};

use super::scheduled::ScheduledState;
use crate::transient::causes;

/// Returns the code of a database error, or of one among its causes.
pub(super) fn database_code<'e>(error: &'e (dyn Error + 'static)) -> Option<Cow<'e, str>> {
    causes(error).find_map(|cause| match cause.downcast_ref::<sqlx::Error>() {
        Some(error) => error.as_database_error()?.code(),
        // The source of sqlx::Error::Database, in an error that passes on only its causes.
        None => cause.downcast_ref::<Box<dyn DatabaseError>>()?.code(),
    })
}

/// A time in the years 1 to 9999.
///
/// The decoder of sqlx panics at `infinity` and at later years.
pub(super) struct Time(pub(super) DateTime<Utc>);

impl Time {
    /// Converts microseconds since 1970.
    fn from_micros(micros: Option<i64>) -> Result<Self, BoxDynError> {
        let time = micros.and_then(DateTime::from_timestamp_micros);
        let time = time.filter(|time| (1..=9999).contains(&time.year()));
        time.map(Self).ok_or_else(|| "expected a time in the years 1 to 9999".into())
    }
}

#[cfg(feature = "postgres")]
mod postgres {
    use sqlx::Postgres;
    use sqlx::postgres::{PgTypeInfo, PgValueFormat, PgValueRef};

    use super::{BoxDynError, DateTime, Decode, Time, Type, Utc};

    /// Microseconds from 1970 to 2000, the epoch of PostgreSQL.
    const YEAR_2000: i64 = 946_684_800_000_000;

    impl Type<Postgres> for Time {
        fn type_info() -> PgTypeInfo {
            <DateTime<Utc> as Type<Postgres>>::type_info()
        }
    }

    impl<'r> Decode<'r, Postgres> for Time {
        fn decode(value: PgValueRef<'r>) -> Result<Self, BoxDynError> {
            if value.format() == PgValueFormat::Text {
                return Ok(Self(<DateTime<Utc> as Decode<Postgres>>::decode(value)?));
            }
            Self::from_micros(<i64 as Decode<Postgres>>::decode(value)?.checked_add(YEAR_2000))
        }
    }
}

#[cfg(feature = "sqlite")]
mod sqlite {
    use sqlx::Sqlite;
    use sqlx::sqlite::{SqliteTypeInfo, SqliteValueRef};

    use super::{BoxDynError, Decode, Time, Type};

    impl Type<Sqlite> for Time {
        fn type_info() -> SqliteTypeInfo {
            <i64 as Type<Sqlite>>::type_info()
        }
    }

    impl<'r> Decode<'r, Sqlite> for Time {
        fn decode(value: SqliteValueRef<'r>) -> Result<Self, BoxDynError> {
            Self::from_micros(Some(<i64 as Decode<Sqlite>>::decode(value)?))
        }
    }
}

/// The columns of a row; errors name the table and the column.
pub(super) struct Columns<'r, R> {
    table: &'static str,
    row: &'r R,
}

impl<'r, R: Row> Columns<'r, R>
where
    usize: ColumnIndex<R>,
{
    pub(super) fn of(table: &'static str, row: &'r R) -> Self {
        Self { table, row }
    }

    /// Decodes a column.
    pub(super) fn get<T>(&self, column: usize) -> Result<T, sqlx::Error>
    where
        T: Decode<'r, R::Database> + Type<R::Database>,
    {
        self.row.try_get(column).map_err(|error| match error {
            sqlx::Error::ColumnDecode { source, .. } => self.unreadable(column, &*source),
            other => other,
        })
    }

    /// Decodes a number that must not be negative.
    pub(super) fn number(&self, column: usize) -> Result<u64, sqlx::Error>
    where
        i64: Decode<'r, R::Database> + Type<R::Database>,
    {
        let number: i64 = self.get(column)?;
        u64::try_from(number)
            .map_err(|_| self.unreadable(column, &format!("expected a number ≥ 0, found {number}")))
    }

    /// Decodes a time in the years 1 to 9999.
    pub(super) fn time(&self, column: usize) -> Result<DateTime<Utc>, sqlx::Error>
    where
        Time: Decode<'r, R::Database> + Type<R::Database>,
    {
        self.get::<Time>(column).map(|time| time.0)
    }

    /// Decodes a time in the years 1 to 9999, or NULL.
    pub(super) fn optional_time(&self, column: usize) -> Result<Option<DateTime<Utc>>, sqlx::Error>
    where
        Option<Time>: Decode<'r, R::Database> + Type<R::Database>,
    {
        self.get::<Option<Time>>(column).map(|time| time.map(|time| time.0))
    }

    /// Decodes the state of a scheduled command.
    pub(super) fn state(&self, column: usize) -> Result<ScheduledState, sqlx::Error>
    where
        String: Decode<'r, R::Database> + Type<R::Database>,
    {
        let name: String = self.get(column)?;
        ScheduledState::parse(&name)
            .ok_or_else(|| self.unreadable(column, &format!("expected a state, found {name:?}")))
    }

    fn unreadable(&self, column: usize, problem: &(impl Display + ?Sized)) -> sqlx::Error {
        let name = self.row.try_column(column).map_or("?", |column| column.name());
        sqlx::Error::Decode(format!("{}.{name}: {problem}", self.table).into())
    }
}
