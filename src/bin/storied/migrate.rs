//! `storied migrate`.

use serde_json::json;
use storied::{Codec, StoreError};

use crate::database::{DatabaseArgs, Tables};
use crate::failure::Failure;
use crate::output::Output;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Codec of the payloads of a new store [default: cbor]
    #[arg(long, value_parser = codec, value_name = "cbor|json")]
    codec: Option<Codec>,

    /// Indexes the log by event name, for selective readers; appends wait meanwhile
    #[arg(long)]
    index_by_name: bool,
}

fn codec(name: &str) -> Result<Codec, String> {
    Codec::from_name(name).ok_or_else(|| "expected cbor or json".into())
}

pub(crate) async fn run(args: &Args, from: &DatabaseArgs, out: &mut Output) -> Result<(), Failure> {
    let database = from.database()?;
    let tables = Tables { migrate: false, codec: args.codec, index_by_name: args.index_by_name };
    let (store, migrated) = match from.open(&database, tables).await {
        Ok(store) => (store, false),
        Err(error @ StoreError::Unavailable { .. }) => return Err(error.into()),
        // Migrating either fixes the cause, or fails with the same error.
        Err(_) => (from.open(&database, Tables { migrate: true, ..tables }).await?, true),
    };
    let info = store.info();
    if out.json {
        return out.value(&json!({
            "database": database.shown(), "backend": info.backend, "store_id": info.id, "codec": info.codec.name(), "migrated": migrated,
        }));
    }
    let what = if migrated { "is migrated" } else { "is up to date" };
    out.line(format!("{} {what}: store {}, {} payloads", database.shown(), info.id, info.codec))
}
