//! Statements that PostgreSQL and SQLite share.
//!
//! They are written for the schema `storied`. Each database rewrites the names of the tables.

mod control;
mod progress;
mod rows;

use std::error::Error;
use std::future::Future;

use chrono::{DateTime, Utc};
use sqlx::{ColumnIndex, Decode, Row, SqlStr, Type};
use uuid::Uuid;

pub(crate) use self::control::Controls;
pub(crate) use self::progress::Progress;
use super::columns::{Columns, Time};
use super::error::StoreError;

/// Declares statements; `new` gets the function that rewrites their text for a database.
macro_rules! statements {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $sql:expr,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone)]
        pub(crate) struct $name {
            $(pub(crate) $field: sqlx::SqlStr,)+
        }

        impl $name {
            pub(crate) fn new(text: impl Fn(&str) -> sqlx::SqlStr) -> Self {
                Self { $($field: text($sql),)+ }
            }
        }
    };
}
pub(crate) use statements;

/// A value of a parameter.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Value<'v> {
    Number(u64),
    OptionalNumber(Option<u64>),
    Flag(Option<bool>),
    Text(&'v str),
    OptionalText(Option<&'v str>),
    Id(Option<Uuid>),
    Time(DateTime<Utc>),
}

/// A connection to a database.
pub(crate) trait Session: Send {
    type Row: TypedRow + Send;

    fn fetch(
        &mut self,
        sql: &SqlStr,
        persistent: bool,
        values: &[Value<'_>],
    ) -> impl Future<Output = Result<Vec<Self::Row>, sqlx::Error>> + Send;

    /// Returns the number of rows that the statement affected.
    fn execute(
        &mut self,
        sql: &SqlStr,
        persistent: bool,
        values: &[Value<'_>],
    ) -> impl Future<Output = Result<u64, sqlx::Error>> + Send;

    fn failed(doing: &str, error: sqlx::Error) -> StoreError;
}

/// Implements [`Session`]; `$time` converts a time to the database's form.
macro_rules! session {
    ($connection:ty, $row:ty, $failed:path, $time:expr) => {
        impl crate::store::sql::Session for $connection {
            type Row = $row;

            async fn fetch(
                &mut self,
                sql: &sqlx::SqlStr,
                persistent: bool,
                values: &[crate::store::sql::Value<'_>],
            ) -> Result<Vec<$row>, sqlx::Error> {
                crate::store::sql::bind_values!(sql, persistent, values, $time).fetch_all(self).await
            }

            async fn execute(
                &mut self,
                sql: &sqlx::SqlStr,
                persistent: bool,
                values: &[crate::store::sql::Value<'_>],
            ) -> Result<u64, sqlx::Error> {
                let query = crate::store::sql::bind_values!(sql, persistent, values, $time);
                query.execute(self).await.map(|done| done.rows_affected())
            }

            fn failed(doing: &str, error: sqlx::Error) -> crate::store::StoreError {
                $failed(doing, error)
            }
        }
    };
}

macro_rules! bind_values {
    ($sql:expr, $persistent:expr, $values:expr, $time:expr) => {{
        use crate::store::sql::{Value, to_sql};
        let mut query = sqlx::query($sql.clone()).persistent($persistent);
        for value in $values {
            query = match *value {
                Value::Number(number) => query.bind(to_sql(number)),
                Value::OptionalNumber(number) => query.bind(number.map(to_sql)),
                Value::Flag(flag) => query.bind(flag),
                Value::Text(text) => query.bind(text.to_owned()),
                Value::OptionalText(text) => query.bind(text.map(str::to_owned)),
                Value::Id(id) => query.bind(id),
                Value::Time(time) => query.bind($time(time)),
            };
        }
        query
    }};
}
pub(crate) use {bind_values, session};

/// Converts a number: the databases have no unsigned ones.
///
/// Stored numbers are far below the signed maximum.
pub(crate) fn to_sql(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// A row with the types of the shared statements; errors name the table and the column.
pub(crate) trait TypedRow {
    fn number(&self, table: &'static str, column: usize) -> Result<u64, sqlx::Error>;
    fn optional_number(&self, table: &'static str, column: usize) -> Result<Option<u64>, sqlx::Error>;
    fn flag(&self, table: &'static str, column: usize) -> Result<bool, sqlx::Error>;
    fn text(&self, table: &'static str, column: usize) -> Result<String, sqlx::Error>;
    fn optional_text(&self, table: &'static str, column: usize) -> Result<Option<String>, sqlx::Error>;
    fn id(&self, table: &'static str, column: usize) -> Result<Uuid, sqlx::Error>;
    fn time(&self, table: &'static str, column: usize) -> Result<DateTime<Utc>, sqlx::Error>;

    /// Returns a number of partitions or the index of one.
    fn partition(&self, table: &'static str, column: usize) -> Result<u16, sqlx::Error> {
        let number = self.number(table, column)?;
        u16::try_from(number).map_err(|error| undecodable(format!("{table}: {number} partitions: {error}")))
    }
}

impl<R> TypedRow for R
where
    R: Row,
    usize: ColumnIndex<R>,
    i64: for<'r> Decode<'r, R::Database> + Type<R::Database>,
    Option<i64>: for<'r> Decode<'r, R::Database> + Type<R::Database>,
    bool: for<'r> Decode<'r, R::Database> + Type<R::Database>,
    String: for<'r> Decode<'r, R::Database> + Type<R::Database>,
    Option<String>: for<'r> Decode<'r, R::Database> + Type<R::Database>,
    Uuid: for<'r> Decode<'r, R::Database> + Type<R::Database>,
    Time: for<'r> Decode<'r, R::Database> + Type<R::Database>,
{
    fn number(&self, table: &'static str, column: usize) -> Result<u64, sqlx::Error> {
        Columns::of(table, self).number(column)
    }

    fn optional_number(&self, table: &'static str, column: usize) -> Result<Option<u64>, sqlx::Error> {
        let columns = Columns::of(table, self);
        match columns.get::<Option<i64>>(column)? {
            Some(_) => columns.number(column).map(Some),
            None => Ok(None),
        }
    }

    fn flag(&self, table: &'static str, column: usize) -> Result<bool, sqlx::Error> {
        Columns::of(table, self).get(column)
    }

    fn text(&self, table: &'static str, column: usize) -> Result<String, sqlx::Error> {
        Columns::of(table, self).get(column)
    }

    fn optional_text(&self, table: &'static str, column: usize) -> Result<Option<String>, sqlx::Error> {
        Columns::of(table, self).get(column)
    }

    fn id(&self, table: &'static str, column: usize) -> Result<Uuid, sqlx::Error> {
        Columns::of(table, self).get(column)
    }

    fn time(&self, table: &'static str, column: usize) -> Result<DateTime<Utc>, sqlx::Error> {
        Columns::of(table, self).time(column)
    }
}

pub(crate) fn undecodable(error: impl Into<Box<dyn Error + Send + Sync>>) -> sqlx::Error {
    sqlx::Error::Decode(error.into())
}
