//! `storied store adopt`.

use serde_json::json;
use storied::store::Adopt;

use crate::failure::Failure;
use crate::open::DatabaseArgs;
use crate::output::Output;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Tells a store that was moved or copied where it belongs now; stop its nodes first
    Adopt(AdoptArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct AdoptArgs {
    /// The original is gone: the store keeps its id
    #[arg(long, required_unless_present = "copy", conflicts_with = "copy")]
    moved: bool,

    /// The original lives on: the store gets a new id, and a publisher without a memory
    #[arg(long)]
    copy: bool,

    /// Gives a new id also where the store looks like the original, as after pg_basebackup
    #[arg(long, requires = "copy")]
    force: bool,
}

pub(crate) async fn run(command: Command, from: &DatabaseArgs, out: &mut Output) -> Result<(), Failure> {
    let Command::Adopt(args) = command;
    let shown = from.database()?.shown();
    let store = from.store().await?;
    let before = store.info();
    if args.copy && before.adoption.is_adopted() && !args.force {
        return Err(Failure::Refused(format!(
            "{shown} belongs to the store {}, and a new id would part it from its read models and its bus; if it is a physical copy, which looks like the original, add --force",
            before.id
        )));
    }
    let adopt = if args.copy { Adopt::Copy } else { Adopt::Moved };
    let id = store.adopt(adopt).await.map_err(|error| Failure::from(error).about(&shown))?;
    if out.json {
        return out.value(&json!({ "database": shown, "store_id": id, "was": before.id }));
    }
    match adopt {
        Adopt::Moved => out.line(format!("{shown} is the store {id}; start its nodes again")),
        Adopt::Copy => out.line(format!(
            "{shown} is the store {id}, a copy of {}; give it a namespace of its own and start its nodes again",
            before.id
        )),
    }
}
