//! Imports the event table of a Go service on goes. This is the program of `docs/migration.md`.
//!
//! ```sh
//! cargo run --example import_goes -- postgres://localhost/old postgres://localhost/new
//! ```
//!
//! A second run continues after the last imported event; nothing is imported twice.

#![allow(missing_docs, missing_debug_implementations, reason = "docs/migration.md explains everything")]

use std::error::Error;
use std::io::{Write, stdout};
use std::process::ExitCode;
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures_util::TryStreamExt;
use serde::{Deserialize, Serialize};
use sqlx::{Connection, PgConnection, PgPool, Row};
use storied::store::{Append, AppendError};
use storied::{
    Event, EventStore, ExpectedVersion, Metadata, NewEvent, PostgresOptions, PostgresStore, StreamId, Version,
};
use tokio::time::timeout;
use uuid::Uuid;

type Failure = Box<dyn Error + Send + Sync>;

/// The current events, with the relevant parts of the old ones.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OrderEvent {
    Placed { customer: Uuid, pence: i64 },
    Cancelled { reason: String },
}

impl Event for OrderEvent {
    const CATEGORY: &'static str = "order";
}

/// An event of the old log.
pub struct Old {
    pub id: Uuid,
    pub name: String,
    pub at: DateTime<Utc>,
    pub aggregate: String,
    pub aggregate_id: Uuid,
    pub version: i64,
    pub data: String,
}

/// Reads in a possible order: by time, but the events of an aggregate by version.
const READ: &str = "
    SELECT id, name, time, aggregate_name, aggregate_id, data::text,
           row_number() OVER aggregate AS version
    FROM events
    WHERE aggregate_id IS NOT NULL
    WINDOW aggregate AS (PARTITION BY aggregate_name, aggregate_id ORDER BY aggregate_version)
    ORDER BY max(time) OVER aggregate, aggregate_name, aggregate_id, aggregate_version";

/// Translates an event of the old log.
pub fn translate(old: &Old) -> Result<OrderEvent, Failure> {
    #[derive(Deserialize)]
    struct Placed {
        #[serde(rename = "Customer")]
        customer: Uuid,
        #[serde(rename = "Total")]
        pence: i64,
    }
    match &*old.name {
        "shop.order.placed" => {
            let Placed { customer, pence } = serde_json::from_str(&old.data)?;
            Ok(OrderEvent::Placed { customer, pence })
        }
        // Its data is a plain string.
        "shop.order.cancelled" => Ok(OrderEvent::Cancelled { reason: serde_json::from_str(&old.data)? }),
        other => Err(format!("no translation of {other}").into()),
    }
}

/// Returns the append of an old event, with its old id, and its time in the metadata.
pub fn imported(old: &Old, store: &dyn EventStore) -> Result<Append, Failure> {
    let mut metadata = Metadata::default();
    metadata.user.insert("occurred_at".into(), old.at.to_rfc3339());
    metadata.user.insert("imported_from".into(), format!("{}({})", old.aggregate, old.aggregate_id));
    let mut event = NewEvent::encode(&translate(old)?, store.info().codec, &metadata)?;
    (event.id, event.command_id) = (old.id, old.id);
    let stream = StreamId::new(OrderEvent::CATEGORY, old.aggregate_id)?;
    let before = Version::new(u64::try_from(old.version)? - 1); // counted from 1
    Ok(Append::one(stream, ExpectedVersion::Exact(before), vec![event]))
}

/// Imports all new events one after the other, because the log has the order of the appends.
///
/// Returns their number.
pub async fn import(from: &PgPool, to: &PostgresStore) -> Result<u64, Failure> {
    let mut appended = 0;
    let mut rows = sqlx::query(READ).fetch(from);
    while let Some(row) = rows.try_next().await? {
        let old = Old {
            id: row.try_get("id")?,
            name: row.try_get("name")?,
            at: DateTime::from_timestamp_nanos(row.try_get("time")?),
            aggregate: row.try_get("aggregate_name")?,
            aggregate_id: row.try_get("aggregate_id")?,
            version: row.try_get("version")?,
            data: row.try_get("data")?,
        };
        let append = imported(&old, to)?;
        match to.append(vec![append]).await.pop().ok_or("an append got no answer")? {
            Ok(_) => appended += 1,
            Err(AppendError::Conflict(conflict)) => {
                // An earlier run has appended it, or another writer another event.
                let before = Version::new(u64::try_from(old.version)? - 1);
                let there = to.read_stream(&conflict.stream, before, 1).await?;
                if there.first().map(|event| event.id) != Some(old.id) {
                    return Err(format!("{} differs from the existing event: {conflict}", old.id).into());
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(appended)
}

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

const USAGE: &str = "usage: import_goes FROM TO, both a URL such as postgres://localhost/shop";

async fn run() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (from, to) = match arguments.as_slice() {
        [help] if help == "--help" => return Ok(writeln!(stdout(), "{USAGE}")?),
        [from, to] => (from, to),
        _ => return Err(USAGE.into()),
    };
    // A single connection first, because a pool would keep retrying silently.
    timeout(Duration::from_secs(2), PgConnection::connect(from))
        .await
        .map_err(|_| "opening FROM failed: no answer within 2 s")?
        .map_err(|error| format!("opening FROM failed: {error}"))?
        .close()
        .await?;
    let from = PgPool::connect(from).await?;
    let options = PostgresOptions::new()
        .url(to)
        .acquire_timeout(Duration::from_secs(2))
        .connect_timeout(Duration::from_secs(2));
    let to = options.connect().await.map_err(|error| format!("opening TO failed: {error}"))?;
    Ok(writeln!(stdout(), "{} events imported", import(&from, &to).await?)?)
}
