//! The quick start of README.md. It creates shop.db and read.db in the current directory.
#![allow(missing_docs, missing_debug_implementations, reason = "README.md explains everything")]
#![cfg_attr(rustfmt, rustfmt_skip)]

use std::io::{Write, stdout};

use serde::{Deserialize, Serialize};
use sqlx::{SqliteConnection, SqlitePool};
use storied::projection::{ApplyError, Projection, SqliteReadModel};
use storied::{Aggregate, Context, Decided, Event, RecordedEvent, Runtime, SqliteStore};

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum OrderEvent { Placed { pence: i64 } }                  // stored, published and filtered as `order.placed`
impl Event for OrderEvent { const CATEGORY: &'static str = "order"; }
#[derive(Serialize, Deserialize)] struct Place { pence: i64 }
#[derive(Debug, Serialize, Deserialize, thiserror::Error)]
#[error("the order has been placed already")]
struct AlreadyPlaced;

#[derive(Default)] struct Order { placed: bool }
impl Aggregate for Order {                                 // plain code: only decides and folds
    type Event = OrderEvent; type Command = Place; type Reply = (); type Error = AlreadyPlaced;
    fn handle(&self, place: &Place, _: &Context<'_>) -> Decided<Self> {
        if self.placed { Err(AlreadyPlaced) } else { Ok(OrderEvent::Placed { pence: place.pence }.into()) }
    }
    fn apply(&mut self, _: &OrderEvent) { self.placed = true; }
}

struct Revenue;                                            // a read model in SQL, exactly once
impl Projection for Revenue {
    const NAME: &'static str = "revenue"; type Event = OrderEvent; type Transaction = SqliteConnection;
    async fn apply(&mut self, event: OrderEvent, _: &RecordedEvent, tx: &mut SqliteConnection) -> Result<(), ApplyError> {
        let OrderEvent::Placed { pence } = event;
        sqlx::query("INSERT INTO revenue VALUES (?)").bind(pence).execute(tx).await?;
        Ok(())
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let read = SqlitePool::connect("sqlite:read.db?mode=rwc").await?;
    sqlx::query("CREATE TABLE IF NOT EXISTS revenue (pence)").execute(&read).await?;
    let runtime = Runtime::builder().store(SqliteStore::open("shop.db").await?).aggregate::<Order>()
        .projection(Revenue, SqliteReadModel::new(read.clone())).start().await?;

    match runtime.execute::<Order>("17", Place { pence: 1_299 }).await {
        Ok(receipt) => runtime.projection("revenue")?.caught_up_to(receipt.position).await?,   // read your own writes
        Err(refused) => writeln!(stdout(), "{refused}")?,  // second run: the first receipt is durable
    }
    let revenue: i64 = sqlx::query_scalar("SELECT sum(pence) FROM revenue").fetch_one(&read).await?;
    writeln!(stdout(), "{revenue} pence")?;                // 1299 pence in every run
    Ok(runtime.shutdown().await?)
}
