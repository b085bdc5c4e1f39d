//! Read models in their own SQLite file, next to that of the event store.
//!
//! SQLite allows one writing transaction per file, so in one file the projections and the appends
//! would wait for each other. Two files lose nothing: only a read model and its checkpoint must
//! agree, and these commit together.

use sqlx::sqlite::{SqliteConnection, SqlitePool};
use storied::projection::ApplyError;
use storied::{Filter, Projection, RecordedEvent};

use super::{REVENUE, UNITS, to_sql};
use crate::domain::InvoiceEvent;

/// The tables.
///
/// Money is a whole number of the smallest unit of a price, because SQLite would add decimals as
/// floats.
const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS invoices (
        number TEXT PRIMARY KEY, credit_note INTEGER NOT NULL, country TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS revenue_by_country (
        country TEXT PRIMARY KEY, revenue INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS units_by_stock_code (
        stock_code TEXT PRIMARY KEY, units INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
";

pub(crate) async fn create_tables(pool: &SqlitePool) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(TABLES).execute(pool).await.map(drop)
}

/// The invoices, and the revenue of each country.
#[derive(Debug)]
pub(crate) struct RevenueByCountry;

impl Projection for RevenueByCountry {
    const NAME: &'static str = REVENUE;
    type Event = InvoiceEvent;
    type Transaction = SqliteConnection;

    async fn apply(
        &mut self,
        invoice: InvoiceEvent,
        recorded: &RecordedEvent,
        tx: &mut SqliteConnection,
    ) -> Result<(), ApplyError> {
        let number = recorded.stream.id();
        if let Some(header) = invoice.header() {
            sqlx::query("INSERT INTO invoices (number, credit_note, country) VALUES (?, ?, ?)")
                .bind(number)
                .bind(matches!(invoice, InvoiceEvent::CreditNoteOpened { .. }))
                .bind(&header.country)
                .execute(&mut *tx)
                .await?;
        }
        if let Some(line) = invoice.line() {
            let booked = sqlx::query(
                "INSERT INTO revenue_by_country SELECT country, ?1 FROM invoices WHERE number = ?2
                 ON CONFLICT (country) DO UPDATE SET revenue = revenue + excluded.revenue",
            )
            .bind(to_sql(line.amount())?)
            .bind(number)
            .execute(&mut *tx)
            .await?;
            if booked.rows_affected() == 0 {
                return Err(format!("a line of invoice {number} came before the invoice").into());
            }
        }
        Ok(())
    }

    async fn reset(&mut self, tx: &mut SqliteConnection) -> Result<(), ApplyError> {
        sqlx::raw_sql("DELETE FROM invoices; DELETE FROM revenue_by_country").execute(tx).await?;
        Ok(())
    }
}

/// The number of sold units minus the returned ones, of each article.
#[derive(Debug)]
pub(crate) struct UnitsByStockCode;

impl Projection for UnitsByStockCode {
    const NAME: &'static str = UNITS;
    type Event = InvoiceEvent;
    type Transaction = SqliteConnection;

    fn filter(&self) -> Filter {
        Filter::variants::<InvoiceEvent>(InvoiceEvent::LINES)
    }

    async fn apply(
        &mut self,
        invoice: InvoiceEvent,
        _: &RecordedEvent,
        tx: &mut SqliteConnection,
    ) -> Result<(), ApplyError> {
        if let Some(line) = invoice.line() {
            sqlx::query(
                "INSERT INTO units_by_stock_code VALUES (?, ?)
                 ON CONFLICT (stock_code) DO UPDATE SET units = units + excluded.units",
            )
            .bind(&line.stock_code)
            .bind(line.quantity)
            .execute(tx)
            .await?;
        }
        Ok(())
    }

    async fn reset(&mut self, tx: &mut SqliteConnection) -> Result<(), ApplyError> {
        sqlx::query("DELETE FROM units_by_stock_code").execute(tx).await?;
        Ok(())
    }
}
