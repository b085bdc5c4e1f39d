//! Read models in their own schema of the database of the event store, partitioned over all nodes.
//!
//! Each partition keeps its own sums, and reading adds them up. In a shared row, partitions would
//! wait for each other at every invoice from the United Kingdom.

use sqlx::postgres::{PgConnection, PgPool};
use storied::projection::{ApplyError, BuildTarget};
use storied::{Filter, Projection, RecordedEvent};

use super::{REVENUE, UNITS, to_sql};
use crate::domain::InvoiceEvent;

/// The tables. Money is a whole number of the smallest unit of a price, as in SQLite.
const TABLES: &str = "
    CREATE SCHEMA IF NOT EXISTS retail;
    CREATE TABLE IF NOT EXISTS retail.invoices (
        number text PRIMARY KEY, credit_note boolean NOT NULL, country text NOT NULL
    );
    CREATE TABLE IF NOT EXISTS retail.revenue_by_country (
        country text NOT NULL, partition integer NOT NULL, revenue bigint NOT NULL, PRIMARY KEY (country, partition)
    );
    CREATE TABLE IF NOT EXISTS retail.units_by_stock_code (
        stock_code text NOT NULL, partition integer NOT NULL, units bigint NOT NULL, PRIMARY KEY (stock_code, partition)
    );
";

pub(crate) async fn create_tables(pool: &PgPool) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(TABLES).execute(pool).await.map(drop)
}

/// The invoices, and the revenue of each country.
#[derive(Debug)]
pub(crate) struct RevenueByCountry(pub(crate) BuildTarget);

impl Projection for RevenueByCountry {
    const NAME: &'static str = REVENUE;
    type Event = InvoiceEvent;
    type Transaction = PgConnection;

    async fn apply(
        &mut self,
        invoice: InvoiceEvent,
        recorded: &RecordedEvent,
        tx: &mut PgConnection,
    ) -> Result<(), ApplyError> {
        let number = recorded.stream.id();
        if let Some(header) = invoice.header() {
            sqlx::query("INSERT INTO retail.invoices (number, credit_note, country) VALUES ($1, $2, $3)")
                .bind(number)
                .bind(matches!(invoice, InvoiceEvent::CreditNoteOpened { .. }))
                .bind(&header.country)
                .execute(&mut *tx)
                .await?;
        }
        if let Some(line) = invoice.line() {
            let booked = sqlx::query(
                "INSERT INTO retail.revenue_by_country AS r
                 SELECT country, $3, $1 FROM retail.invoices WHERE number = $2
                 ON CONFLICT (country, partition) DO UPDATE SET revenue = r.revenue + excluded.revenue",
            )
            .bind(to_sql(line.amount())?)
            .bind(number)
            .bind(i32::from(self.0.partition.index()))
            .execute(&mut *tx)
            .await?;
            if booked.rows_affected() == 0 {
                return Err(format!("a line of invoice {number} came before the invoice").into());
            }
        }
        Ok(())
    }

    async fn reset(&mut self, tx: &mut PgConnection) -> Result<(), ApplyError> {
        sqlx::raw_sql("DELETE FROM retail.invoices; DELETE FROM retail.revenue_by_country")
            .execute(tx)
            .await?;
        Ok(())
    }
}

/// The number of sold units minus the returned ones, of each article.
#[derive(Debug)]
pub(crate) struct UnitsByStockCode(pub(crate) BuildTarget);

impl Projection for UnitsByStockCode {
    const NAME: &'static str = UNITS;
    type Event = InvoiceEvent;
    type Transaction = PgConnection;

    fn filter(&self) -> Filter {
        Filter::variants::<InvoiceEvent>(InvoiceEvent::LINES)
    }

    async fn apply(
        &mut self,
        invoice: InvoiceEvent,
        _: &RecordedEvent,
        tx: &mut PgConnection,
    ) -> Result<(), ApplyError> {
        if let Some(line) = invoice.line() {
            sqlx::query(
                "INSERT INTO retail.units_by_stock_code AS u VALUES ($1, $2, $3)
                 ON CONFLICT (stock_code, partition) DO UPDATE SET units = u.units + excluded.units",
            )
            .bind(&line.stock_code)
            .bind(i32::from(self.0.partition.index()))
            .bind(line.quantity)
            .execute(tx)
            .await?;
        }
        Ok(())
    }

    async fn reset(&mut self, tx: &mut PgConnection) -> Result<(), ApplyError> {
        sqlx::query("DELETE FROM retail.units_by_stock_code").execute(tx).await?;
        Ok(())
    }
}
