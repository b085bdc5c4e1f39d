//! The read models: revenue by country and units by stock code, in a SQLite file of their own.

use std::collections::BTreeMap;

use rust_decimal::Decimal;

/// What the read models say.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    pub(crate) invoices: i64,
    pub(crate) cancellations: i64,
    pub(crate) revenue_by_country: BTreeMap<String, Decimal>,
    pub(crate) units_by_stock_code: BTreeMap<String, i64>,
}
