//! The read models: revenue by country and units by stock code, in the kind of database of the log.

mod postgres;
mod sqlite;

use std::collections::BTreeMap;

use rust_decimal::Decimal;
use storied::projection::{ApplyError, PerTarget};
use storied::runtime::Builder;
use storied::{PostgresReadModel, ProjectionOptions, SqliteReadModel};

use crate::domain::PRICE_DECIMALS;

/// The names of the projections.
pub(crate) const REVENUE: &str = "revenue_by_country";
pub(crate) const UNITS: &str = "units_by_stock_code";

/// Number of partitions, if several nodes can share them.
const PARTITIONS: u16 = 8;

/// The location of the read models.
#[derive(Debug, Clone)]
pub(crate) enum ReadModels {
    Sqlite(SqliteReadModel),
    Postgres(PostgresReadModel),
}

impl ReadModels {
    pub(crate) async fn create_tables(&self) -> Result<(), sqlx::Error> {
        match self {
            Self::Sqlite(model) => sqlite::create_tables(model.pool()).await,
            Self::Postgres(model) => postgres::create_tables(model.pool()).await,
        }
    }

    /// Registers the projections on a node.
    pub(crate) fn keep(&self, builder: Builder, options: &ProjectionOptions) -> Builder {
        match self {
            Self::Sqlite(model) => builder
                .projection_with(sqlite::RevenueByCountry, model.clone(), options.clone())
                .projection_with(sqlite::UnitsByStockCode, model.clone(), options.clone()),
            Self::Postgres(model) => builder
                .projection_with(
                    PerTarget::new(postgres::RevenueByCountry),
                    model.clone(),
                    options.clone().partitions(PARTITIONS),
                )
                .projection_with(
                    PerTarget::new(postgres::UnitsByStockCode),
                    model.clone(),
                    options.clone().partitions(PARTITIONS),
                ),
        }
    }

    /// Reads the totals.
    pub(crate) async fn totals(&self) -> Result<Totals, sqlx::Error> {
        let ((invoices, cancellations), revenue, units): ((i64, i64), Vec<_>, Vec<_>) = match self {
            Self::Sqlite(model) => {
                let pool = model.pool();
                (
                    sqlx::query_as(
                        "SELECT count(*) FILTER (WHERE NOT credit_note), count(*) FILTER (WHERE credit_note)
                         FROM invoices",
                    )
                    .fetch_one(pool)
                    .await?,
                    sqlx::query_as("SELECT country, revenue FROM revenue_by_country").fetch_all(pool).await?,
                    sqlx::query_as("SELECT stock_code, units FROM units_by_stock_code")
                        .fetch_all(pool)
                        .await?,
                )
            }
            Self::Postgres(model) => {
                let pool = model.pool();
                (
                    sqlx::query_as(
                        "SELECT count(*) FILTER (WHERE NOT credit_note), count(*) FILTER (WHERE credit_note)
                         FROM retail.invoices",
                    )
                    .fetch_one(pool)
                    .await?,
                    sqlx::query_as(
                        "SELECT country, sum(revenue)::bigint FROM retail.revenue_by_country GROUP BY country",
                    )
                    .fetch_all(pool)
                    .await?,
                    sqlx::query_as(
                        "SELECT stock_code, sum(units)::bigint FROM retail.units_by_stock_code GROUP BY stock_code",
                    )
                    .fetch_all(pool)
                    .await?,
                )
            }
        };
        let revenue = revenue.into_iter().map(|(country, revenue)| (country, from_sql(revenue)));
        Ok(Totals {
            invoices,
            cancellations,
            revenue_by_country: revenue.collect(),
            units_by_stock_code: units.into_iter().collect(),
        })
    }

    pub(crate) async fn close(&self) {
        match self {
            Self::Sqlite(model) => model.pool().close().await,
            Self::Postgres(model) => model.pool().close().await,
        }
    }
}

/// The totals of the read models.
#[derive(Debug)]
pub(crate) struct Totals {
    pub(crate) invoices: i64,
    pub(crate) cancellations: i64,
    pub(crate) revenue_by_country: BTreeMap<String, Decimal>,
    pub(crate) units_by_stock_code: BTreeMap<String, i64>,
}

fn to_sql(amount: Decimal) -> Result<i64, ApplyError> {
    let parts = amount * Decimal::from(10_i64.pow(PRICE_DECIMALS));
    if !parts.is_integer() {
        return Err(format!("{amount} has more than {PRICE_DECIMALS} decimals").into());
    }
    Ok(parts.try_into()?)
}

/// Returns the amount with at least two decimals.
fn from_sql(parts: i64) -> Decimal {
    let mut amount = Decimal::new(parts, PRICE_DECIMALS).normalize();
    amount.rescale(amount.scale().max(2));
    amount
}
