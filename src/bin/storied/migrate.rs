//! `storied migrate`.

use serde_json::json;
use storied::{Codec, StoreError};

use crate::failure::Failure;
use crate::open::{DatabaseArgs, Tables};
use crate::output::Output;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How a store that is new keeps payloads [default: cbor]
    #[arg(long, value_parser = codec, value_name = "cbor|json")]
    codec: Option<Codec>,

    /// Index the log by event name, for those who ask for few events among many; appends wait until it is made
    #[arg(long)]
    index_by_name: bool,
}

fn codec(name: &str) -> Result<Codec, String> {
    Codec::from_name(name).ok_or_else(|| "it should be cbor or json".into())
}

pub(crate) async fn run(args: &Args, from: &DatabaseArgs, out: &mut Output) -> Result<(), Failure> {
    let database = from.database()?;
    let tables = Tables { migrate: false, codec: args.codec, index_by_name: args.index_by_name };
    let (store, migrated) = match from.open(&database, tables).await {
        Ok(store) => (store, false),
        Err(error @ StoreError::Unavailable { .. }) => return Err(error.into()),
        // Whatever it has against it: either migrating helps, or says the same.
        Err(_) => (from.open(&database, Tables { migrate: true, ..tables }).await?, true),
    };
    let info = store.info();
    if out.json {
        return out.value(&json!({
            "database": database.shown(), "backend": info.backend, "store_id": info.id, "codec": info.codec.name(), "migrated": migrated,
        }));
    }
    let what = if migrated { "is migrated" } else { "was up to date already" };
    out.line(format!("{} {what}: store {}, {} payloads", database.shown(), info.id, info.codec))
}
